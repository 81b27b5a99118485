"Data recipes: every file against the schema and on a small copy of its dataset, downloads that break, archives that bite"

import errno
import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import stat
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

from rs_selfsup import recipes
from rs_selfsup.data.rasters import parse_target
from rs_selfsup.modalities import DataError
from rs_selfsup.recipe_examples import place_boxes, write_example
from rs_selfsup.recipes import RecipeFile, download, fetch, load_recipe, prepare, recipe_folder, recipe_names, recipe_page, unpack

NAMES = recipe_names()
LAYOUTS = [(n, layout) for n in NAMES for layout in yaml.safe_load((recipe_folder() / f"{n}.yaml").read_text())["scenes"]]
NEEDED = (
    "millionaid sen12ms ssl4eo_s12 msc_france potsdam vaihingen us3d_dfc2019 dfc2018 geonrw flair naip_3dep ucmerced aid resisc45 eurosat_rgb eurosat "
    "bigearthnet dfc2020 loveda isaid levir_cd second oscd cdd dsifn_cd dior dota_v1 vhr10 fair1m"
).split()


# ---------------------------------------------------------------- the files themselves
def test_every_dataset_named_in_the_plan_has_a_recipe():
    assert not set(NEEDED) - set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_schema(name):
    r = load_recipe(name)
    page = recipe_page(r)
    assert r.title in page and r.licence["terms"] in page and all(layout in page for layout in r.scenes)
    assert "statistic" not in (recipe_folder() / f"{name}.yaml").read_text().replace("Colour statistics", "").lower()
    for f in r.files:
        assert f.md5 or f.sha256 or any(u.startswith("files") for u in r.unverified)
    for block in r.scenes.values():
        for t in (block.get("targets") or {}).values():
            spec = parse_target("t", t)
            assert len(spec.colors) in (0, len(spec.classes))


def test_no_address_twice_and_none_without_https():
    urls = [(f.url, r.name) for r in map(load_recipe, NAMES) for f in r.files if f.url]
    assert len({u for u, _ in urls}) == len(urls)
    assert all(u.startswith("https://") for u, _ in urls)


# ---------------------------------------------------------------- a small copy of each dataset
LOSSY = (".jpg",)


@pytest.mark.parametrize("name, layout", LAYOUTS, ids=[f"{n}-{k}" for n, k in LAYOUTS])
def test_prepare_on_a_small_copy(name, layout, tmp_path):
    "Names are found, official splits kept, and what is stored is what the files hold, class by class and band by band"
    r = load_recipe(name)
    block = r.scenes[layout]
    if "example" not in block:
        pytest.skip("described scene by scene: tested on the real file")
    n, arrays = write_example(r, tmp_path / "data", layout)
    found, scenes, counts, store = prepare(
        r, tmp_path / "data", tmp_path / "store", layout=layout, tile=n, splits=(1, 0, 0), progress=False
    )
    assert found == layout and len(store) > 0 and not store.report["failed"]
    assert len(scenes) == len({s.name for s in scenes}) <= len(block["example"]["words"])
    parts = {s.name: s.split or "train" for s in scenes}
    assert all(parts[s] == k for s, k in zip(store.index.scene, store.index.split))
    labels, several = {s.name: s.label for s in scenes}, block["discover"].get("labels")
    assert (store.labels is not None) == bool(several)
    if several:
        named = {tuple(sorted({several["classes"].get(c, c) for c in v if c not in several["ignore"]})) for v in arrays.values() if isinstance(v, list)}
        assert {tuple(sorted(store.classes[k] for k in np.flatnonzero(row == 1))) for row in store.labels} <= named and (store.labels >= 0).all()
        assert len(np.unique(store.labels, axis=0)) == len(store)
    assert all(labels[s] is None or store.classes[i] == labels[s] for s, i in zip(store.index.scene, store.index.label))
    batch = store.read(np.arange(len(store)))
    for i, s in enumerate(store.index.scene):
        for m, files in scenes[s].rasters.items():
            want = np.concatenate([picked(arrays, f) for f in files])
            got = batch["images"][m][i]
            assert got.shape == want.shape
            if not any(f.path.endswith(LOSSY) for f in files):
                assert np.array_equal(got, want)
        for t, f in scenes[s].targets.items():
            if scenes.targets[t].kind == "boxes":
                same_boxes(batch["targets"][t][i], place_boxes(n, len(scenes.targets[t].classes), name in TURNED))
            if scenes.targets[t].kind == "mask":
                same_classes(batch["targets"][t][i], arrays[Path(f.path)], scenes.targets[t], f)


TURNED = ("dota_v1", "fair1m")


def same_boxes(got, want):
    "As drawn, in any order; a turned box may be given with its sides exchanged"
    got, want = (x[np.argsort(x[:, 1])] for x in (got[~np.isnan(got[:, 0])], want))
    assert len(got) == 3 and np.array_equal(got[:, 0], want[:, 0]) and np.allclose(got[:, 1:3], want[:, 1:3], atol=0.1)
    swap = abs(got[:, 3] - want[:, 3]) > 0.5
    assert np.allclose(np.where(swap[:, None], got[:, [4, 3]], got[:, 3:5]), want[:, 3:5], atol=0.1)
    assert np.allclose(np.sin(got[:, 5] + swap * np.pi / 2 - want[:, 5]), 0, atol=0.02)


def picked(arrays, f):
    x = arrays[Path(f.path)]
    return x if f.bands is None else x[[b - 1 for b in f.bands]]


def same_classes(got, raw, spec, f):
    if f.path.endswith(LOSSY):
        return
    raw = raw if f.bands is None else raw[[b - 1 for b in f.bands]]
    raw = raw.astype(np.int64)
    code = raw[0] * 65536 + raw[1] * 256 + raw[2] if spec.palette else raw[0]
    of = {}
    for i, v in enumerate(spec.values or range(len(spec.classes))):
        of.update({k: i for k in (v if isinstance(v, list) else [v])})
    want = np.vectorize(lambda v: of.get(int(v), 255))(code)
    assert np.array_equal(got, want)


# ---------------------------------------------------------------- real samples
REAL = dict(
    eurosat_rgb=("eurosat_rgb", "classes", 2695),
    bigearthnet=("bigearthnet_s1s2_original", "example_pairs", 6),
    flair=("flair_rgbn_height", "samples", 5),
    neon_trees=("neon_rgb_chm", "published", 2),
    levir_cd=("change_pairs/samples_LEVIR", "published", 11),
    dsifn_cd=("change_pairs/samples_DSIFN", "flat", 10),
    aerial_boxes=("aerial_boxes/data/test", "published", 43),
    worldcereal=("worldcereal_cube", "published", 10),
    treesatai=("treesat_aerial_s1_s2/tests/data", "aerial", 1),
    naip_3dep=("naip_rgbn", "naip_only", 202),
)


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_samples_are_found(name, real_data):
    folder, layout, n = REAL[name]
    found, scenes, counts, _ = prepare(load_recipe(name), real_data / folder)
    assert (found, len(scenes), sum(counts.values())) == (layout, n, n)


# ---------------------------------------------------------------- downloads
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass

    def do_GET(self):
        s = self.server
        rng, tag = self.headers.get("Range"), self.headers.get("If-Range")
        s.asked.append(rng)
        start = int(rng[6:-1]) if rng and s.ranges and tag in (None, s.tag) else 0
        if start and start >= len(s.data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(s.data) - start))
        self.send_header("ETag", s.tag)
        self.end_headers()
        body = s.data[start:]
        if s.cuts:
            s.cuts -= 1
            body = body[: s.after]
        self.wfile.write(body)


@contextmanager
def serving(data, cuts=0, after=3000, tag='"a"', ranges=True):
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.data, s.cuts, s.after, s.tag, s.ranges, s.asked = data, cuts, after, tag, ranges, []
    threading.Thread(target=s.serve_forever, daemon=True).start()
    try:
        yield s, f"http://127.0.0.1:{s.server_port}/file"
    finally:
        s.shutdown()
        s.server_close()


DATA = np.random.default_rng(0).bytes(10_000)
MD5 = hashlib.md5(DATA).hexdigest()


def left(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*"))


def test_half_a_download_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "TRIES", 1)
    f = RecipeFile("f.bin", md5=MD5)
    with serving(DATA, cuts=1) as (s, f.url):
        with pytest.raises(DataError, match="3.0 kB are here; run it again to go on"):
            download(f, tmp_path, progress=False)
        assert left(tmp_path) == ["f.bin.part", "f.bin.part.mark"]
        assert download(f, tmp_path, progress=False).read_bytes() == DATA
        assert s.asked == [None, "bytes=3000-"] and left(tmp_path) == ["f.bin"]


@pytest.mark.parametrize("change", [dict(tag='"b"'), dict(ranges=False)])
def test_a_file_that_changed_or_a_server_without_ranges_starts_again(tmp_path, monkeypatch, change):
    monkeypatch.setattr(recipes, "TRIES", 1)
    f = RecipeFile("f.bin")
    with serving(DATA[::-1], cuts=1) as (_, f.url), pytest.raises(DataError):
        download(f, tmp_path, progress=False)
    with serving(DATA, **change) as (s, f.url):
        assert download(f, tmp_path, progress=False).read_bytes() == DATA
        assert s.asked == ["bytes=3000-"]


def test_a_part_longer_than_the_file_starts_again(tmp_path):
    (tmp_path / "f.bin.part").write_bytes(bytes(20_000))
    f = RecipeFile("f.bin", md5=MD5)
    with serving(DATA) as (s, f.url):
        assert download(f, tmp_path, progress=False).read_bytes() == DATA
        assert s.asked == ["bytes=20000-", None]


@pytest.mark.parametrize("kind", ["md5", "sha256", "size"])
def test_a_wrong_checksum_leaves_nothing(tmp_path, kind):
    f = RecipeFile("f.bin", **{kind: 9_999 if kind == "size" else "0" * dict(md5=32, sha256=64)[kind]})
    with serving(DATA) as (_, f.url), pytest.raises(DataError, match="9999" if kind == "size" else "the recipe says 0000"):
        download(f, tmp_path, progress=False)
    assert left(tmp_path) == []


def test_a_server_that_says_no_is_asked_once(tmp_path):
    with serving(DATA) as (s, url), pytest.raises(DataError, match="404"):
        s.RequestHandlerClass = type("No", (Handler,), dict(do_GET=lambda self: (s.asked.append(1), self.send_error(404))))
        download(RecipeFile("f.bin", url), tmp_path, progress=False)
    assert len(s.asked) == 1 and left(tmp_path) == []


def test_no_room_is_said_before_a_byte_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10_000, 5_000, 5_000))
    with serving(DATA) as (_, url), pytest.raises(DataError, match="f.bin needs 10.0 kB, and 5.0 kB are free"):
        download(RecipeFile("f.bin", url), tmp_path, progress=False)
    assert not (tmp_path / "f.bin").exists() and not (tmp_path / "f.bin.part").exists()


def fills_up(monkeypatch, after):
    "An `open` whose files say that the disk is full after so many writes"
    real, count = open, itertools.count()

    def opened(path, mode="r", *a, **kw):
        o = real(path, mode, *a, **kw)
        if "b" not in mode or not set("wa") & set(mode):
            return o
        write = o.write

        class Full:
            def __enter__(self): return self
            def __exit__(self, *e): o.close()
            def tell(self): return o.tell()

            def write(self, block):
                if next(count) >= after:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(block)

        return Full()

    monkeypatch.setattr(recipes, "open", opened, raising=False)


def test_a_disk_that_fills_up_while_downloading(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "BLOCK", 1000)
    fills_up(monkeypatch, after=3)
    with serving(DATA) as (_, url), pytest.raises(DataError, match="the disk is full; f.bin.part was removed again"):
        download(RecipeFile("f.bin", url), tmp_path, progress=False)
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_while_unpacking(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {f"d/{k}.bin": DATA for k in range(5)})
    fills_up(monkeypatch, after=3)
    with pytest.raises(DataError, match="the disk is full; what was unpacked was removed again"):
        unpack(archive, tmp_path / "out")
    assert left(tmp_path / "out") == []


# ---------------------------------------------------------------- archives
def make_zip(path, entries, links=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in entries.items():
            z.writestr(name, data)
        for name, to in links:
            i = zipfile.ZipInfo(name)
            i.create_system, i.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            z.writestr(i, to)
    return path


def make_tar(path, entries, links=(), kind=tarfile.SYMTYPE):
    with tarfile.open(path, "w:gz") as t:
        for name, data in entries.items():
            i = tarfile.TarInfo(name)
            i.size = len(data)
            t.addfile(i, io.BytesIO(data))
        for name, to in links:
            i = tarfile.TarInfo(name)
            i.type, i.linkname = kind, to
            t.addfile(i)
    return path


MAKE = dict(zip=make_zip, tar=make_tar)


@pytest.fixture(params=["zip", "tar"])
def make(request, tmp_path):
    end = dict(zip=".zip", tar=".tar.gz")[request.param]
    return lambda *a, **kw: MAKE[request.param](tmp_path / f"a{end}", *a, **kw)


def refused(archive, out, match, **kw):
    with pytest.raises(DataError, match=match):
        unpack(archive, out, **kw)
    assert left(out) == [] if out.exists() else True


def test_an_archive_is_unpacked(make, tmp_path):
    archive = make({"a/b.bin": DATA, "c.txt": b"x", "__MACOSX/a/._b.bin": b"y"})
    assert unpack(archive, tmp_path / "out") == 2
    assert left(tmp_path / "out") == ["a", "a/b.bin", "c.txt"] and (tmp_path / "out/a/b.bin").read_bytes() == DATA
    assert unpack(archive, tmp_path / "out") == 2


@pytest.mark.parametrize("name", ["../up.txt", "a/../../up.txt", "/abs.txt", "a\\..\\up.txt", "C:/up.txt"])
def test_paths_outside_are_refused(make, tmp_path, name):
    archive = make({"good.txt": b"1", name: b"2"})
    refused(archive, tmp_path / "deep/out", "leads outside the folder")
    assert not list(tmp_path.rglob("up.txt")) and not Path("/abs.txt").exists()


@pytest.mark.parametrize("to", ["/etc/passwd", "../../up", "good.txt"])
def test_links_are_refused(make, tmp_path, to):
    refused(make({"good.txt": b"1"}, links=[("link", to)]), tmp_path / "out", "is a link or a device")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_hard_links_and_devices_are_refused(tmp_path, kind):
    archive = make_tar(tmp_path / "a.tar.gz", {"good.txt": b"1"}, links=[("x", "good.txt")], kind=kind)
    refused(archive, tmp_path / "out", "is a link or a device")


def test_writing_through_a_link_is_refused(tmp_path):
    archive = make_tar(tmp_path / "a.tar.gz", {}, links=[("d", str(tmp_path / "elsewhere"))])
    (tmp_path / "elsewhere").mkdir()
    with tarfile.open(tmp_path / "b.tar", "w") as t:
        for name, size, kind in (("d", 0, tarfile.SYMTYPE), ("d/x", 1, tarfile.REGTYPE)):
            i = tarfile.TarInfo(name)
            i.type, i.size, i.linkname = kind, size, str(tmp_path / "elsewhere")
            t.addfile(i, io.BytesIO(b"1"))
    for a in (archive, tmp_path / "b.tar"):
        refused(a, tmp_path / "out", "is a link or a device")
    assert left(tmp_path / "elsewhere") == []


def test_bombs_are_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "SMALL", 1_000_000)
    archive = make({"zeros": bytes(20_000_000)})
    refused(archive, tmp_path / "out", "more than it claims")
    assert unpack(archive, tmp_path / "out", unpacked=20_000_000) == 1


def test_more_files_than_anybody_needs(make, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "MOST_FILES", 10)
    refused(make({str(k): b"" for k in range(11)}), tmp_path / "out", "or 10 files")
    with zipfile.ZipFile(tmp_path / "folders.zip", "w") as z:
        for k in range(11):
            z.writestr(f"{k}/", "")
    refused(tmp_path / "folders.zip", tmp_path / "out", "or 10 files")


def test_more_than_the_recipe_says(make, tmp_path):
    refused(make({"a": DATA, "b": DATA}), tmp_path / "out", "more than it claims", unpacked=15_000)


def test_an_entry_larger_than_its_own_header(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"a": bytes(100_000)})
    raw = archive.read_bytes()
    size = (100_000).to_bytes(4, "little")
    assert raw.count(size) == 2
    archive.write_bytes(raw.replace(size, (10).to_bytes(4, "little")))
    refused(archive, tmp_path / "out", "damaged|cut short")


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_an_archive_cut_short(make, tmp_path, part):
    archive = make({f"{k}.bin": DATA for k in range(5)})
    archive.write_bytes(archive.read_bytes()[: int(part * archive.stat().st_size)])
    refused(archive, tmp_path / "out", "damaged|no zip archive")


def test_a_locked_archive(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"a": DATA})
    raw = bytearray(archive.read_bytes())
    for at in (raw.find(b"PK\3\4") + 6, raw.find(b"PK\1\2") + 8):
        raw[at] |= 1
    archive.write_bytes(raw)
    refused(archive, tmp_path / "out", "damaged .*encrypted")


def test_no_room_to_unpack(make, tmp_path, monkeypatch):
    archive = make({"a": DATA, "b": DATA})
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(9_000, 0, 9_000))
    refused(archive, tmp_path / "out", "unpacking a.* needs")


def test_what_lies_there_is_not_overwritten(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/z.txt").write_text("mine")
    with pytest.raises(DataError, match="lies here already"):
        unpack(make({"a.txt": b"1", "z.txt": b"theirs"}), tmp_path / "out")
    assert left(tmp_path / "out") == ["z.txt"] and (tmp_path / "out/z.txt").read_text() == "mine"


def test_what_a_killed_run_left_is_cleared(make, tmp_path):
    archive = make({"a.txt": b"1"})
    old = tmp_path / "out" / f".unpacking-{archive.name}"
    (old / "x").mkdir(parents=True)
    unpack(archive, tmp_path / "out")
    assert left(tmp_path / "out") == ["a.txt"]


# ---------------------------------------------------------------- fetch
@pytest.fixture
def toy():
    r = load_recipe("eurosat_rgb")
    r.files = [RecipeFile("a.zip"), RecipeFile("list.txt", into="lists")]
    return r


def test_fetch_asks_for_the_licence_before_anything_else(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "isatty", lambda n: False)
    with serving(DATA) as (s, toy.files[0].url):
        for kw, why in ((dict(ask=lambda q: "no"), "nothing was fetched"), (dict(), "--accept-licence")):
            with pytest.raises(DataError, match=why):
                fetch(toy, tmp_path / "d", **kw)
    assert s.asked == [] and not (tmp_path / "d").exists() and toy.licence["terms"] in capsys.readouterr().out


def test_fetch_unpacks_once_and_takes_what_was_put_there_by_hand(toy, tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x/y.txt": b"1"})
    (tmp_path / "d/archives").mkdir(parents=True)
    with pytest.raises(DataError, match="to be fetched by hand: a.zip, list.txt"):
        fetch(toy, tmp_path / "d", accepted=True)
    shutil.move(archive, tmp_path / "d/archives")
    with serving(b"names") as (s, toy.files[1].url):
        for _ in range(2):
            fetch(toy, tmp_path / "d", accepted=True, keep=False, progress=False)
    assert len(s.asked) == 1
    assert [p for p in left(tmp_path / "d") if "." in Path(p).name[1:]] == [".fetched/a.zip.json", ".fetched/list.txt.json", "lists/list.txt", "x/y.txt"]
    assert json.loads((tmp_path / "d/.fetched/a.zip.json").read_text())["name"] == "a.zip"


@pytest.mark.parametrize("where", ["archives", ".", "lists"])
def test_a_plain_file_that_was_put_there_by_hand_goes_to_its_place(toy, tmp_path, where):
    toy.files = toy.files[1:]
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / "list.txt").write_text("names")
    fetch(toy, tmp_path, accepted=True)
    assert (tmp_path / "lists/list.txt").read_text() == "names"
    assert [p for p in left(tmp_path) if p.endswith("list.txt")] == ["lists/list.txt"]


def test_fetch_checks_what_was_put_there_by_hand(toy, tmp_path):
    toy.files = [RecipeFile("a.zip", md5="0" * 32)]
    make_zip(tmp_path / "a.zip", {"x.txt": b"1"})
    with pytest.raises(DataError, match="the md5 is"):
        fetch(toy, tmp_path, accepted=True)
    assert left(tmp_path) == ["a.zip"]


def test_fetch_knows_the_size_before(toy, tmp_path, monkeypatch):
    toy.files = [RecipeFile("a.zip", "https://example.org/a.zip", size=10**9, unpacked=10**10)]
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(0, 0, 10**9))
    with pytest.raises(DataError, match="needs 11.0 GB, and 1.0 GB are free"):
        fetch(toy, tmp_path, accepted=True)


def test_what_no_program_can_fetch_says_how(tmp_path):
    r = load_recipe("aid")
    with pytest.raises(DataError, match="cannot be fetched by a program.*Fetch AID from the page"):
        fetch(r, tmp_path, accepted=True)


# ---------------------------------------------------------------- the command line
def test_list_and_show(capsys):
    from rs_selfsup.cli import main

    assert main(["data", "list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == NAMES
    assert main(["data", "show", NAMES[0]]) == 0 and load_recipe(NAMES[0]).title in capsys.readouterr().out
    assert main(["data", "show"]) == 2 and main(["data", "fetch", NAMES[0]]) == 2
    assert main(["data", "show", "eurosat_rgd"]) == 2 and "Did you mean 'eurosat_rgb'" in capsys.readouterr().err
