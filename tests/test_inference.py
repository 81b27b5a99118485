"Maps of whole scenes: the arithmetic of windows, the files, runs that are killed, disks that are full."

import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import sqlite3
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray
import torch
from rasterio.transform import from_origin

from rs_selfsup import inference as inf
from rs_selfsup.data.augment import Normalize
from rs_selfsup.data.rasters import load_scenes
from rs_selfsup.inference import (
    Mapper, Tiling, ToyModel, blend_weights, embed_scene, max_seam, open_scene, other_date, pca_picture, polygons, predict_array, predict_memory,
    predict_scene, starts, stretched_scene, write_gpkg,
)
from rs_selfsup.modalities import DataError, preset

RGB, MS = preset("rgb", 0.5), preset("s2_10m").replace(name="ms", gsd=2.0)
CHM = preset("chm").replace(name="chm", gsd=1.0)
pytestmark = pytest.mark.usefixtures("one_thread")


def tif(path, x, gsd, nodata=None, x0=4e5, y0=5e6, crs="EPSG:32631", **kw):
    "A file at (x0, y0)"
    path = Path(path)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(x), height=x.shape[1], width=x.shape[2], dtype=x.dtype, nodata=nodata, crs=crs,
        transform=from_origin(x0, y0, gsd, gsd), **kw,
    ) as f:
        f.write(x)
    return str(path)


def smooth(rng, shape, lo, hi):
    "Blobs: something a convolution can look at"
    x = torch.nn.functional.interpolate(torch.from_numpy(rng.uniform(lo, hi, (1, shape[0], 9, 9))), shape[1:], mode="bicubic")
    return x[0].clamp(lo, hi).numpy()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "90 x 150 px of RGB with a slanted collar, 2 m multispectral, 1 m heights"
    d, rng = tmp_path_factory.mktemp("scene"), np.random.default_rng(0)
    rgb = smooth(rng, (3, 90, 150), 1, 254).astype("uint8")
    i, j = np.mgrid[:90, :150]
    rgb[:, (j < 70) & (i < 60 - j // 2)] = 0
    ms, chm = smooth(rng, (4, 23, 38), 100, 4000).astype("uint16") // 2 * 2, smooth(rng, (1, 45, 75), 0, 30).astype("float32")
    chm[:, 30:40, 50:60] = -9999
    return dict(
        rgb=tif(d / "rgb.tif", rgb, 0.5, nodata=0), ms=tif(d / "ms.tif", ms, 2.0, nodata=0), chm=tif(d / "chm.tif", chm, 1.0, nodata=-9999),
        rgb2=tif(d / "rgb2.tif", rgb[:, ::-1].copy(), 0.5, nodata=0),
    )


def stats(m):
    mean, std = dict(rgb=(127.0, 60.0), ms=(2000.0, 1000.0), chm=(15.0, 8.0))[m.name]
    return {k: [v] * m.n_bands for k, v in dict(mean=mean, std=std, p01=mean - 2 * std, p99=mean + 2 * std).items()}


def model_of(mods=(RGB, MS), **kw):
    torch.manual_seed(3)
    m = ToyModel({o.name: o for o in mods}, stats={o.name: stats(o) for o in mods}, **kw)
    for p in m.parameters():
        p.data *= 2
    return m


def pick(files, *names):
    return {n: files[n] for n in names}


# ---------------------------------------------------------------- arithmetic
@pytest.mark.parametrize("window,overlap", [(8, 0), (64, 16), (64, 32), (64, 60), (1024, 512)])
def test_weights_are_positive_and_smooth(window, overlap):
    w = blend_weights(window, overlap)
    assert w.min() > 0 and w.max() <= 1 and torch.equal(w, w.T) and torch.equal(w, w.flip(0))
    assert overlap == 0 or w[window // 2].diff().abs().max() < 2.0 / overlap
    if 0 < overlap <= window // 2:
        v = w.diagonal().sqrt()
        torch.testing.assert_close(v[-overlap:] + v[:overlap], torch.ones(overlap), atol=1e-6, rtol=0)


def test_strips_are_the_scene_each_pixel_once():
    rng = np.random.default_rng(0)
    for _ in range(60):
        unit = int(rng.choice([1, 2, 4]))
        step = unit * int(rng.choice([1, 2]))
        window = step * int(rng.integers(2, 12))
        overlap = step * int(rng.integers(0, window // step))
        h, w = rng.integers(1, 200, 2)
        t = Tiling(int(h), int(w), window, overlap, step, unit, panel=int(rng.integers(1, 120)))
        seen, ground = np.zeros(t.shape, int), np.zeros(t.shape, int)
        for k, (a, _, cols) in enumerate(t.panels):
            for j, r in enumerate(t.rows):
                s = t.strip(k, j)
                seen[s.toslices()] += 1
                assert s.height * unit <= window and (a % unit, r % unit) == (0, 0)
            for c in cols:
                for r in t.rows:
                    ground[r // unit : (r + window) // unit, c // unit : (c + window) // unit] += 1
        assert (seen == 1).all() and (ground > 0).all()
        assert sorted({c for _, _, cols in t.panels for c in cols}) == t.cols == starts(int(w), window, window - overlap, step)


WINDOWS = [
    dict(window=32), dict(window=40, overlap=0.5, bs=3), dict(window=48, overlap=0),
    dict(window=20, overlap=12, bs=1), dict(window=64, panel=50), dict(window=256),
]


@pytest.mark.parametrize("kw", WINDOWS)
def test_pixelwise_model_gives_the_direct_map(files, kw):
    "Computed here without any of it: read the files, normalise, apply"
    m = model_of()
    with rasterio.open(files["rgb"]) as f, rasterio.open(files["ms"]) as g:
        ms = g.read().astype("int32").repeat(4, 1).repeat(4, 2)[:, :90, :150]
        z = m.normalize({"rgb": torch.from_numpy(f.read())[None], "ms": torch.from_numpy(ms)[None]})
        real = torch.from_numpy(f.read_masks(1) > 0)
    with torch.no_grad():
        want = (2 * m.net(torch.cat([z["rgb"], z["ms"]], 1))).softmax(1)[0].numpy()
    p, ok = predict_array(m, pick(files, "rgb", "ms"), **kw)
    assert np.array_equal(ok, real.numpy()) and 0.5 < ok.mean() < 1
    np.testing.assert_allclose(p[:, ok], want[:, ok], atol=2e-6)
    assert np.array_equal(p.argmax(0)[ok], want.argmax(0)[ok]) and len(np.unique(want.argmax(0)[ok])) > 2


def test_seams_vanish_with_blending(files):
    m, scene = model_of((RGB,), kernel=5, depth=3, tile=40), files["rgb"]
    hard, soft, wide = (max_seam(m, scene, overlap=o) for o in (0, 0.25, 0.5))
    assert hard > 0.1 and soft < hard / 3 and wide < hard / 10, (hard, soft, wide)
    assert max_seam(model_of((RGB,), tile=40), scene) < 1e-5


def test_windows_without_a_valid_pixel_are_skipped(files):
    calls, m = [], model_of()
    m.register_forward_hook(lambda mod, args, out: calls.append(len(out)))
    with open_scene(pick(files, "rgb", "ms"), m) as r, Mapper(m) as mapper:
        t = inf.plan_tiling(r, m, 16, 0)
        list(inf.blended(mapper, [inf.Date(r, m)], t, 5))
    with rasterio.open(files["rgb"]) as f:
        ok = f.read_masks(1) > 0
    some = sum(ok[r : r + 16, c : c + 16].any() for r in t.rows for c in t.cols)
    assert sum(calls) == mapper.windows == some and mapper.skipped == t.n - some > 0 and max(calls) <= 5


def test_what_is_required(files):
    m = model_of((RGB, CHM))
    scene = pick(files, "rgb", "chm")
    valid = {r: predict_array(m, scene, window=32, require=r)[1] for r in (None, "all", "chm")}
    hole = np.zeros((90, 150), bool)
    hole[60:80, 100:120] = True
    assert np.array_equal(valid["all"], valid[None] & ~hole) and np.array_equal(valid["chm"], ~hole)
    with pytest.raises(DataError, match="modality in 'require' 'chn'. Did you mean 'chm'"):
        predict_array(m, scene, require="chn")


def test_other_scale_is_brought_to_that_of_training(files, tmp_path):
    "The same reflectance, stored as fractions"
    with rasterio.open(files["ms"]) as f:
        x = f.read()
    near = dict(preset="s2_10m", gsd=2)
    one = load_scenes(dict(anchor="ms", modalities=dict(ms=near), scenes=[dict(name="a", rasters=dict(ms=files["ms"]))]))
    halved = tif(tmp_path / "half.tif", x // 2, 2.0)
    two = load_scenes(dict(anchor="ms", modalities=dict(ms=dict(**near, scale=2)), scenes=[dict(name="a", rasters=dict(ms=halved))]))
    m = model_of((one.modalities["ms"],), tile=16)
    a, b = (predict_array(m, "a", scenes=s)[0] for s in (one, two))
    assert np.abs(a - b).max() < 1e-3


# ---------------------------------------------------------------- files
def test_class_map_read_back(files, tmp_path):
    m = model_of()
    m.classes = ["water", "<field> & wood", "häuser", "road"]
    r = predict_scene(m, pick(files, "rgb", "ms"), tmp_path / "sub" / "map.tif", window=32, probabilities=True, progress=False)
    p, ok = predict_array(m, pick(files, "rgb", "ms"), window=32)
    with rasterio.open(r.path) as f, rasterio.open(files["rgb"]) as src:
        assert (f.crs, f.transform, f.shape, f.nodata, f.dtypes[0]) == (src.crs, src.transform, src.shape, 255, "uint8")
        x = f.read(1)
        assert np.array_equal(x, np.where(ok, p.argmax(0), 255)) and np.array_equal(f.read_masks(1) > 0, ok)
        cmap = f.colormap(1)
        assert all(cmap[i] == (*c, 255) for i, c in enumerate(m.colors)) and cmap[255][3] == 0
        assert [f.tags(1)[f"CLASS_{i}"] for i in range(4)] == m.classes and f.tags()["task"] == "segmentation" and f.tags()["window"] == "32"
        assert f.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    with rasterio.open(r.probabilities) as f:
        q = f.read()
        assert f.descriptions == tuple(m.classes) and f.scales == (0.005,) * 4 and f.nodata == 255
        assert (q[:, ~ok] == 255).all() and np.abs(q[:, ok] * 0.005 - p[:, ok]).max() <= 0.00251
    da = rioxarray.open_rasterio(r.path, masked=True)
    assert da.rio.crs.to_epsg() == 32631 and da.rio.transform().almost_equals(from_origin(4e5, 5e6, 0.5, 0.5)) and int(da.isnull().sum()) == (~ok).sum()
    assert (r.pixels, r.valid, round(sum(r.shares.values()), 6)) == (90 * 150, ok.sum(), 1) and r.windows > 0
    assert "90" in str(r) or "13,500 px" in str(r)
    left = sorted(o.name for o in r.path.parent.iterdir())
    assert left == ["map.tif", "map.tif.aux.xml", "map_probabilities.tif"]


def test_height_map(files, tmp_path):
    m = model_of(task="height")
    r = predict_scene(m, pick(files, "rgb", "ms"), tmp_path / "h.tif", window=32, progress=False)
    p, ok = predict_array(m, pick(files, "rgb", "ms"), window=32)
    with rasterio.open(r.path) as f:
        x = f.read(1)
        assert f.dtypes[0] == "float32" and np.isnan(f.nodata) and f.units == ("metre",) and np.array_equal(np.isfinite(x), ok)
    assert np.array_equal(x[ok], p[0][ok]) and r.valid == ok.sum() and r.shares == {} and not (tmp_path / "h.tif.aux.xml").exists()


def test_panels_do_not_show(files, tmp_path):
    m, scene = model_of((RGB,), kernel=3), files["rgb"]
    a, b = (predict_scene(m, scene, tmp_path / f"{n}.tif", window=32, panel=n, progress=False) for n in (40, 8192))
    with rasterio.open(a.path) as f, rasterio.open(b.path) as g:
        assert (f.read() == g.read()).mean() > 0.9999            # batches differ, so may the last bit
    assert a.windows > b.windows


@pytest.mark.parametrize("size", [(20, 30), (64, 10), (1, 1)])
def test_scene_smaller_than_a_window(tmp_path, size):
    x = np.random.default_rng(0).integers(1, 255, (3, *size), dtype=np.uint8)
    m = model_of((RGB,))
    r = predict_scene(m, tif(tmp_path / "s.tif", x, 0.5), tmp_path / "m.tif", progress=False)
    with rasterio.open(r.path) as f:
        assert f.shape == size and r.valid == r.pixels == x[0].size and r.windows == 1
        with torch.no_grad():
            assert np.array_equal(f.read(1), m.net(m.normalize({"rgb": torch.from_numpy(x)[None]})["rgb"])[0].argmax(0))


def test_two_dates(files, tmp_path):
    m = model_of((RGB,), task="change", classes=2)
    r = predict_scene(m, files["rgb"], tmp_path / "c.tif", scene2=files["rgb2"], window=32, progress=False)
    with rasterio.open(files["rgb"]) as f, rasterio.open(files["rgb2"]) as g:
        ok = (f.read_masks(1) > 0) & (g.read_masks(1) > 0)
        a, b = (m.normalize({"rgb": torch.from_numpy(o.read())[None]})["rgb"] for o in (f, g))
    with torch.no_grad():
        want = m.net((a - b).abs())[0].argmax(0).numpy()
    with rasterio.open(r.path) as f:
        assert np.array_equal(f.read(1), np.where(ok, want, 255)) and 0 < ok.sum() < ok.size
    yaml = dict(anchor="rgb", modalities=dict(rgb=dict(preset="rgb", gsd=0.5), rgb_t2=dict(preset="rgb", gsd=0.5)))
    S = load_scenes(dict(**yaml, scenes=[dict(name="a", rasters=dict(rgb=files["rgb"], rgb_t2=files["rgb2"]))]))
    p, valid = predict_array(m, S.open("a"), other_date(S.open("a"), rgb="rgb_t2"), window=32)
    assert np.array_equal(valid, ok) and np.array_equal(p.argmax(0)[ok], want[ok])


# ---------------------------------------------------------------- misuse
def test_misuse_is_explained(files, tmp_path):
    seg, change, high = model_of(), model_of((RGB,), task="change", classes=2), model_of((RGB,), task="height")
    out, both = tmp_path / "m.tif", pick(files, "rgb", "ms")
    x = np.ones((3, 90, 150), np.uint8)
    small, far = tif(tmp_path / "small.tif", x[:, :80], 0.5), tif(tmp_path / "far.tif", x, 0.5, crs="EPSG:32632")
    shifted = tif(tmp_path / "shifted.tif", x, 0.5, x0=4e5 + 30)

    def fails(words, *a, **kw):
        with pytest.raises(DataError) as e:
            predict_scene(*a, progress=False, **kw)
        for w in words:
            assert w in str(e.value), str(e.value)

    fails(["has no 'ms'", "It has rgb"], seg, pick(files, "rgb"), out)
    fails(["is a model for height, not for segmentation"], high, files["rgb"], out, task="segmentation")
    fails(["needs a second date", "scene2"], change, files["rgb"], out)
    fails(["takes one date"], seg, both, out, scene2=both)
    fails(["has no probabilities"], high, files["rgb"], out, probabilities=True)
    fails(["small.tif", "80 x 150", "rgb.tif", "90 x 150"], change, files["rgb"], out, scene2=small)
    fails(["far.tif", "EPSG:32632", "EPSG:32631"], change, files["rgb"], out, scene2=far)
    fails(["shifted.tif", "begin elsewhere"], change, files["rgb"], out, scene2=shifted)
    fails(["this is a folder"], seg, both, tmp_path)
    with pytest.raises(DataError, match="rgb.tif: this is a file of the scene"):
        predict_scene(seg, both, files["rgb"], progress=False)
    fails(["is not written as .png"], seg, both, tmp_path / "m.png")
    fails(["multiple of 4"], seg, both, out, window=50)
    fails(["rgb: the model was trained on red (DN8)", "height (metre)"], high, dict(rgb=files["chm"]), out, scenes=load_scenes(
        dict(anchor="rgb", modalities=dict(rgb=dict(preset="chm", gsd=0.5)), scenes=[dict(name="a", rasters=dict(rgb=files["chm"]))])))
    fails(["there is no such file"], high, tmp_path / "none.tif", out)
    high.task = "embedding"
    fails(["embed_scene"], high, files["rgb"], out)
    (tmp_path / "file").write_text("")
    fails(["file: this folder cannot be written to"], seg, both, tmp_path / "file" / "m.tif")
    seg.net[0].weight.data[:] = torch.nan
    fails(["no numbers"], seg, both, out)
    assert not out.exists()


def test_model_is_left_as_it_was(files):
    m = model_of((RGB,))
    m.train()
    m.net[0].eval()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    predict_array(m, files["rgb"])
    assert m.training and m.net[1].training and not m.net[0].training
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


# ---------------------------------------------------------------- killed, full
def forked(job, *args):
    "Run in a fork, which needs no second import; its exit code"
    p = multiprocessing.get_context("fork").Process(target=job, args=args)
    p.start()
    p.join(60)
    assert p.exitcode is not None
    return p.exitcode


def die_after(n, m, scene, out):
    torch.set_num_threads(1)
    put, seen = inf.Sheet.put, []

    def killed(self, k, j, x):
        if len(seen) == n:                                          # amid a strip: half a file is there
            self.strip(k, j).with_suffix(".part").write_bytes(b"II*")
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(j)
        put(self, k, j, x)

    inf.Sheet.put = killed
    predict_scene(m, scene, out, window=32, overlap=0.5, panel=60, progress=False, probabilities=True)


@pytest.mark.parametrize("n", [0, 1, 6, 13])
def test_killed_and_resumed_gives_the_same_pixels(files, tmp_path, n):
    m, scene, out = model_of(kernel=5), pick(files, "rgb", "ms"), tmp_path / "map.tif"
    kw = dict(window=32, overlap=0.5, panel=60, progress=False, probabilities=True)
    assert forked(die_after, n, m, scene, out) == -signal.SIGKILL
    assert not out.exists() and (tmp_path / "map.tif.partial").is_dir()
    r, whole = predict_scene(m, scene, out, **kw), predict_scene(m, scene, tmp_path / "whole.tif", **kw)
    assert r.resumed == n // 2 and (n < 2 or r.windows < whole.windows)
    for a, b in ((r.path, whole.path), (r.probabilities, whole.probabilities)):
        assert a.read_bytes() == b.read_bytes()
    assert not (tmp_path / "map.tif.partial").exists()


def test_another_model_or_setting_does_not_continue(files, tmp_path):
    m, scene, out = model_of(), pick(files, "rgb", "ms"), tmp_path / "map.tif"
    forked(die_after, 4, m, scene, out)
    kw = dict(window=32, overlap=0.5, panel=60, progress=False, probabilities=True)
    other = model_of(kernel=3)
    for words, mm, more in (("another model", other, {}), ("another windows", m, dict(overlap=0.25)), ("another require", m, dict(require="all")),
                            ("another outputs", m, dict(probabilities=False))):
        with pytest.raises(DataError, match=words):
            predict_scene(mm, scene, out, **{**kw, **more})
    os.utime(scene["ms"], (1, 1))
    with pytest.raises(DataError, match="another files"):
        predict_scene(m, scene, out, **kw)
    assert not out.exists()
    assert predict_scene(m, scene, out, **kw, resume=False).resumed == 0 and out.exists()


@pytest.mark.parametrize("where", ["strip", "final", "name"])
def test_full_disk(files, tmp_path, monkeypatch, where):
    "No map, a sentence, and the next run goes on; a map that was there stays"
    m, out = model_of((RGB,)), tmp_path / "map.tif"
    old = predict_scene(m, files["rgb"], out, window=64, progress=False).path.read_bytes()

    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as p:
        if where == "strip":
            p.setattr(rasterio.io.DatasetWriter, "write", full)
        elif where == "final":
            p.setattr(rasterio.shutil, "copy", full)
        else:
            p.setattr(inf.os, "replace", lambda a, b: full() if Path(b) == out else os.rename(a, b))
        with pytest.raises(DataError, match=r"map.tif: it could not be written \(.*No space left.*\); no map was left. Make room"):
            predict_scene(m, files["rgb"], out, window=32, progress=False)
    assert out.read_bytes() == old
    r = predict_scene(m, files["rgb"], out, window=32, progress=False)
    assert r.resumed == (0 if where == "strip" else 4) and out.read_bytes() != old


def limited(size, m, scene, out):
    "No file may grow beyond `size`: what GDAL writes fails as on a full disk"
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        predict_scene(m, scene, out, window=32, progress=False, probabilities=True)
    except DataError as e:
        os._exit(7 if "could not be written" in str(e) else 8)
    os._exit(0)


def test_writing_that_really_fails_is_seen(files, tmp_path):
    "GDAL does not always say so: whatever comes out is whole, or there is nothing"
    m, codes = model_of(kernel=3), []
    scene = pick(files, "rgb", "ms")
    want = predict_scene(m, scene, tmp_path / "want.tif", window=32, progress=False, probabilities=True)
    for size in (2000, 6000, 12000, 20000, 30000, 45000, 10**7):
        out = tmp_path / f"{size}.tif"
        codes.append(forked(limited, size, m, scene, out))
        assert out.exists() == (codes[-1] == 0)
        if out.exists():
            assert out.read_bytes() == want.path.read_bytes()
    assert codes[0] == 7 and codes[-1] == 0 and set(codes) == {0, 7}, codes


# ---------------------------------------------------------------- vectors
@pytest.fixture
def class_map(tmp_path):
    x = np.zeros((1, 40, 60), np.uint8)
    x[0, 5:20, 10:30], x[0, 8:12, 14:18], x[0, 30, 50], x[0, :, :4] = 1, 2, 2, 255
    path = tmp_path / "map.tif"
    with rasterio.open(path, "w", driver="GTiff", count=1, height=40, width=60, dtype="uint8", nodata=255, crs="EPSG:32631",
                       transform=from_origin(4e5, 5e6, 2, 2)) as f:
        f.write(x)
        f.write_colormap(1, {0: (1, 2, 3, 255), 1: (255, 0, 0, 255), 2: (0, 0, 255, 255)})
        f.update_tags(1, CLASS_0="grass", CLASS_1="roof", CLASS_2="pool")
    return path


def wkb_rings(blob):
    "Header and WKB, read by the standard"
    assert blob[:4] == b"GP\0\3"
    srs, x0, x1, y0, y1 = struct.unpack("<i4d", blob[4:40])
    order, kind, n = struct.unpack("<BII", blob[40:49])
    assert (order, kind) == (1, 3)
    at, rings = 49, []
    for _ in range(n):
        k = struct.unpack("<I", blob[at : at + 4])[0]
        rings.append(np.frombuffer(blob, "<f8", 2 * k, at + 4).reshape(k, 2))
        at += 4 + 16 * k
    assert at == len(blob) and (rings[0].min(0) == (x0, y0)).all() and (rings[0].max(0) == (x1, y1)).all()
    return srs, rings


def test_polygons(class_map, tmp_path):
    v = polygons(class_map, tmp_path / "v.gpkg")
    db = sqlite3.connect(v.path)
    rows = db.execute("SELECT value, name, color, area_m2, geom FROM map ORDER BY area_m2").fetchall()
    grass = 4.0 * (56 * 40 - 301)
    want = [(2, "pool", "#0000ff", 4.0), (2, "pool", "#0000ff", 64.0), (1, "roof", "#ff0000", 1136.0), (0, "grass", "#010203", grass)]
    assert [r[:4] for r in rows] == want
    assert v.features == 4
    srs, rings = wkb_rings(rows[2][4])
    assert srs == 32631 and len(rings) == 2 and (rings[0][0] == rings[0][-1]).all() and rings[0].min(0).tolist() == [400020, 4999960]
    assert db.execute("PRAGMA application_id").fetchone()[0] == 0x47504B47 and db.execute("PRAGMA user_version").fetchone()[0] == 10300
    assert db.execute("PRAGMA foreign_key_check").fetchall() == [] and db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert {r[0] for r in db.execute("SELECT srs_id FROM gpkg_spatial_ref_sys")} == {-1, 0, 4326, 32631}
    assert db.execute("SELECT table_name, data_type, srs_id, min_x, max_y FROM gpkg_contents").fetchall() == [("map", "features", 32631, 400008.0, 5e6)]
    assert db.execute("SELECT column_name, geometry_type_name, z, m FROM gpkg_geometry_columns").fetchall() == [("geom", "POLYGON", 0, 0)]
    db.close()


def test_polygons_in_strips_and_sieved(class_map, tmp_path):
    total = lambda p: dict(sqlite3.connect(p).execute("SELECT name, SUM(area_m2) FROM map GROUP BY name").fetchall())
    whole, cut = polygons(class_map, tmp_path / "a.gpkg"), polygons(class_map, tmp_path / "b.gpkg", rows=7)
    assert total(whole.path) == total(cut.path) and cut.features > whole.features
    few = polygons(class_map, tmp_path / "c.gpkg", least=20, classes=["roof", 2])
    assert few.features == 1 and total(few.path) == {"roof": 1200.0}
    with pytest.raises(DataError, match="Did you mean 'pool'"):
        polygons(class_map, tmp_path / "d.gpkg", classes=["poool"])
    with pytest.raises(DataError, match="there is no such map"):
        polygons(tmp_path / "none.tif", tmp_path / "d.gpkg")
    with pytest.raises(DataError, match="is not written as .geojson"):
        polygons(class_map, tmp_path / "d.geojson")
    assert sorted(o.name for o in tmp_path.iterdir()) == ["a.gpkg", "b.gpkg", "c.gpkg", "map.tif"]


def test_vectors_on_a_full_disk_leave_nothing(class_map, tmp_path, monkeypatch):
    def rows():
        yield [[(0, 0), (1, 0), (1, 1), (0, 0)]], (1,)
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(DataError, match="v.gpkg: it could not be written .database or disk is full.*Make room"):
        write_gpkg(tmp_path / "v.gpkg", "v", None, dict(value="INTEGER"), rows())
    assert [o.name for o in tmp_path.iterdir()] == ["map.tif"]


def gdal():
    "GDAL's vector side, which rasterio ships but does not show"
    libs = sorted((Path(rasterio.__file__).parent.parent / "rasterio.libs").glob("libgdal*"))
    if not libs:
        pytest.skip("rasterio was built against a GDAL elsewhere")
    lib = ctypes.CDLL(str(libs[0]))
    pointers = "GDALOpenEx GDALDatasetGetLayer GDALGetRasterBand OGR_L_GetNextFeature OGR_F_GetGeometryRef OGR_L_GetSpatialRef"
    kinds = dict.fromkeys(pointers.split(), ctypes.c_void_p) | dict(
        OGR_L_GetFeatureCount=ctypes.c_longlong, OGR_G_Area=ctypes.c_double, OGR_F_GetFieldAsString=ctypes.c_char_p,
        OSRGetAuthorityCode=ctypes.c_char_p, GDALGetRasterCategoryNames=ctypes.POINTER(ctypes.c_char_p),
    )
    for name, kind in kinds.items():
        getattr(lib, name).restype = kind
    lib.GDALAllRegister()
    return lib


def test_gdal_reads_the_geopackage(class_map, tmp_path):
    v, g, p = polygons(class_map, tmp_path / "v.gpkg"), gdal(), ctypes.c_void_p
    ds = g.GDALOpenEx(str(v.path).encode(), 0x04, None, None, None)
    assert ds, "GDAL does not open it"
    layer = g.GDALDatasetGetLayer(p(ds), 0)
    assert g.OGR_L_GetFeatureCount(p(layer), 1) == 4
    assert g.OSRGetAuthorityCode(p(g.OGR_L_GetSpatialRef(p(layer))), None) == b"32631"
    seen = Counter()
    while f := g.OGR_L_GetNextFeature(p(layer)):
        seen[g.OGR_F_GetFieldAsString(p(f), 1)] += g.OGR_G_Area(p(g.OGR_F_GetGeometryRef(p(f))))
        g.OGR_F_Destroy(p(f))
    g.GDALClose(p(ds))
    assert seen == {b"pool": 68.0, b"roof": 1136.0, b"grass": 4.0 * (56 * 40 - 301)}


def test_gdal_reads_the_class_names(files, tmp_path):
    m = model_of((RGB,))
    m.classes = ["a", "b & c", "d", "e"]
    r, g, p = predict_scene(m, files["rgb"], tmp_path / "m.tif", progress=False), gdal(), ctypes.c_void_p
    ds = g.GDALOpenEx(str(r.path).encode(), 0x02, None, None, None)
    band = p(g.GDALGetRasterBand(p(ds), 1))
    g.GDALGetMetadata(band, None)                                   # GDAL reads the sidecar when metadata are asked for, as gdalinfo and QGIS do
    names = g.GDALGetRasterCategoryNames(band)
    assert [names[i].decode() for i in range(4)] == m.classes
    g.GDALClose(p(ds))


# ---------------------------------------------------------------- embeddings
class Means(torch.nn.Module):
    "An encoder whose tokens are the means of their pixels"
    def __init__(self, m, patch=4):
        super().__init__()
        self.modalities, self.anchor, self.patch_size, self.sizes, self.patch = {m.name: m}, m.name, {m.name: patch}, {m.name: (32, 32)}, patch
        self.stats = {m.name: dict(mean=[0.0] * m.n_bands, std=[1.0] * m.n_bands, p01=[0.0] * m.n_bands, p99=[1.0] * m.n_bands)}

    def feature_map(self, x, mod):
        return torch.nn.functional.avg_pool2d(x, self.patch)


@pytest.mark.parametrize("bits", [16, 32])
def test_embeddings_are_the_tokens(tmp_path, bits):
    x = np.random.default_rng(0).integers(1, 255, (3, 90, 150), dtype=np.uint8)
    x[:, :, :21] = 0
    r = embed_scene(Means(RGB), tif(tmp_path / "x.tif", x, 0.5, nodata=0), tmp_path / "e.tif", bits=bits, progress=False)
    with rasterio.open(r.path) as f:
        y = f.read()
        assert (f.count, f.shape, f.res, f.nodata is not None) == (3, (23, 38), (2.0, 2.0), True) and f.transform.c == 4e5
    want = x[:, :88, :148].astype(float).reshape(3, 22, 4, 37, 4).mean((2, 4))
    assert np.isnan(y[:, :, :5]).all() and np.isfinite(y[:, :22, 5:37]).all()          # 21 px: 5 tokens, and a quarter of the sixth
    np.testing.assert_allclose(y[:, :22, 6:37], want[:, :, 6:], rtol=2e-3 if bits == 16 else 1e-6)
    picture = pca_picture(r.path, tmp_path / "p.png")
    assert picture.shape == (23, 38, 4) and np.array_equal(picture[..., 3] > 0, np.isfinite(y[0])) and picture[..., :3].std() > 10
    pca_picture(r.path, tmp_path / "p.tif")
    with rasterio.open(tmp_path / "p.tif") as f, rasterio.open(tmp_path / "p.png") as g:
        assert f.crs.to_epsg() == 32631 and np.array_equal(f.read(), g.read()) and np.array_equal(f.read().transpose(1, 2, 0), picture)


def test_embeddings_of_a_transformer(files, tmp_path):
    from rs_selfsup.encoders import MultiModalViT

    enc = MultiModalViT("vit_tiny_patch16_224", {"rgb": RGB}, "rgb", patch_size=8, img_size=32, depth=1, embed_dim=24, num_heads=2)
    stats = Normalize({"rgb": RGB}, {"rgb": inf._middle(RGB)})
    r = embed_scene(enc, files["rgb"], tmp_path / "e.tif", normalize=stats, progress=False)
    with rasterio.open(r.path) as f:
        assert f.count == 24 and f.shape == (12, 19) and f.tags()["modality"] == "rgb"
    with pytest.raises(DataError, match="without statistics of 'rgb'"):
        embed_scene(enc, files["rgb"], tmp_path / "e2.tif")


# ---------------------------------------------------------------- memory
def peak(n, folder, queue):
    torch.set_num_threads(1)
    m = ToyModel({"rgb": preset("rgb", 1.0)}, tile=128, width=2)
    predict_scene(m, stretched_scene(folder, m.modalities, 200), f"{folder}/warm.tif", progress=False)
    scene = stretched_scene(folder, m.modalities, n)
    Path("/proc/self/clear_refs").write_text("5")
    before = inf._memory("VmRSS")
    r = predict_scene(m, scene, f"{folder}/map.tif", progress=False, panel=1024, overlap=0)
    queue.put((r.pixels, inf._memory("VmHWM") - before))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_scene(tmp_path):
    "Sixteen times the pixels: 16 MB of input and 16 MB of map more, were they kept"
    used, ctx = {}, multiprocessing.get_context("fork")
    rasterio.env.set_gdal_config("GDAL_CACHEMAX", 16 << 20)
    for n in (1000, 4000):
        (tmp_path / str(n)).mkdir()
        q = ctx.Queue()
        p = ctx.Process(target=peak, args=(n, tmp_path / str(n), q))
        p.start()
        used[n] = q.get(timeout=60)
        p.join(10)
    assert used[4000][0] == 16 * used[1000][0]
    assert used[4000][1] < used[1000][1] + 20, used


@pytest.mark.slow
def test_predict_memory(monkeypatch):
    monkeypatch.setenv("GDAL_CACHEMAX", "16")
    small, large = (predict_memory(n, panel=1024) for n in (1000, 8000))
    assert 0 < large < small + 40, (small, large)
