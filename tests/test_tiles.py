"The tile store: split without leaks, built without loss, read without surprises."

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin
from rasterio.warp import transform as warp

from rs_selfsup.data import tiles
from rs_selfsup.data.rasters import load_scenes
from rs_selfsup.data.tiles import Ground, Place, TileStore, assign_splits, build_store, tile_grid
from rs_selfsup.modalities import DataError

MODS = {"rgb": {"preset": "rgb", "gsd": 1.0}, "dsm": {"preset": "dsm", "gsd": 2.0}}


def write(path, x, gsd=1.0, x0=4e5, y0=5.4e6, crs="EPSG:32631", nodata=None, **kw):
    "A GeoTIFF from (C, H, W)."
    path.parent.mkdir(parents=True, exist_ok=True)
    place = dict(crs=crs, transform=from_origin(x0, y0, gsd, gsd)) if crs else {}
    kw = dict(driver="GTiff", count=len(x), height=x.shape[1], width=x.shape[2], dtype=x.dtype, nodata=nodata) | place | kw
    with rasterio.open(path, "w", **kw) as f:
        f.write(x)
    return str(path)


def scene(tmp, name="a", h=128, w=128, seed=0, x0=4e5, y0=5.4e6, hole=0, crs="EPSG:32631", dsm=True, **kw):
    "RGB at 1 m and DSM at 2 m; the first `hole` columns are nodata (0) in rgb."
    rng = np.random.default_rng(seed)
    rgb = rng.integers(1, 255, (3, h, w), dtype=np.uint8)
    rgb[:, :, :hole] = 0
    at = dict(x0=x0, y0=y0, crs=crs)
    rasters = {"rgb": {"path": write(tmp / name / "rgb.tif", rgb, nodata=0, **at)}}
    if dsm:
        rasters["dsm"] = write(tmp / name / "dsm.tif", rng.normal(50, 9, (1, h // 2, w // 2)).astype(np.float32), 2.0, **at)
    return dict(name=name, rasters=rasters, **kw)


def scenes(*items, mods=MODS, **kw):
    return load_scenes(dict(anchor="rgb", modalities=mods, scenes=list(items), **kw))


def build(sc, out, tile=32, progress=False, **kw):
    return build_store(sc, out, tile=tile, progress=progress, **kw)


def digest(folder):
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("store")
    sc = scenes(scene(tmp, "a", hole=40), scene(tmp, "b", x0=5e5, seed=1), scene(tmp, "c", x0=6e5, seed=2, dsm=False))
    return build(sc, tmp / "out")


# ---------------------------------------------------------------------------------------------------------------- splits


def ground_points(place, rc, tile, n=9):
    "Points on the outline of every tile, metres, in three dimensions (WGS84): (tiles, points, 3)."
    e = np.linspace(0, tile, n)
    x = np.concatenate([e, np.full(n, tile), e, np.zeros(n)])
    y = np.concatenate([np.zeros(n), e, np.full(n, tile), e])
    px, py = rc[:, 1:] + x, rc[:, :1] + y
    t = place.transform
    lon, lat = warp(place.crs, "EPSG:4326", (t.a * px + t.b * py + t.c).ravel(), (t.d * px + t.e * py + t.f).ravel())
    lon, lat = np.radians(lon), np.radians(lat)
    a, e2 = 6378137.0, 0.00669437999
    nn = a / np.sqrt(1 - e2 * np.sin(lat) ** 2)
    xyz = np.stack([nn * np.cos(lat) * np.cos(lon), nn * np.cos(lat) * np.sin(lon), nn * (1 - e2) * np.sin(lat)], -1)
    return xyz.reshape(len(rc), -1, 3)


def least_distance(points, split):
    "Between the outlines of tiles of different splits."
    from scipy.spatial import cKDTree

    trees = [cKDTree(points[split == s].reshape(-1, 3)) for s in range(3) if (split == s).any()]
    pairs = [(a, b) for i, a in enumerate(trees) for b in trees[i + 1 :]]
    return min((a.query(b.data)[0].min() for a, b in pairs), default=np.inf)


def square(x, y, n=640, gsd=1.0, crs="EPSG:32631", turn=0.0, **kw):
    t = from_origin(4e5 + x, 5.4e6 - y, gsd, gsd) * rasterio.Affine.rotation(turn)
    return Place("s", n, n, t, crs, **kw)


@given(
    st.lists(st.tuples(st.integers(-900, 900), st.integers(-900, 900), st.sampled_from([0, 0, 17])), min_size=1, max_size=4),
    st.sampled_from([0, 20, 90]),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_splits_keep_their_distance_on_the_ground(at, buffer, seed):
    places = [square(x, y, turn=turn) for x, y, turn in at]
    grids = [tile_grid(640, 640, 40)] * len(places)
    s = Ground(places, grids, 40, block=160, buffer=buffer).deal(seed=seed)
    points = np.concatenate([ground_points(p, g, 40) for p, g in zip(places, grids)])
    assert set(s.split) >= {0, 1, 2}
    assert least_distance(points, s.split) >= max(buffer, 0) - 1e-3


def test_two_dates_in_two_projections_agree():
    "The same ground in UTM zones 31 and 32: the second date must follow the first."
    a = Place("a", 1600, 1600, from_origin(7e5, 5.4e6, 1, 1), "EPSG:32631")
    x, y = warp("EPSG:32631", "EPSG:32632", [7e5], [5.4e6])
    b = Place("b", 1600, 1600, from_origin(x[0], y[0], 1, 1), "EPSG:32632")
    grid = tile_grid(1600, 1600, 50)
    s = Ground([a, b], [grid, grid], 50, buffer=30).deal()
    assert len(set(s.cluster)) == 1 and set(s.split) >= {0, 1, 2}
    points = np.concatenate([ground_points(p, grid, 50) for p in (a, b)])
    assert least_distance(points, s.split) >= 30


def test_neighbours_that_overlap_are_one_cluster():
    places, grid = [square(600 * i, 0) for i in range(4)], tile_grid(640, 640, 40)
    s = Ground(places, [grid] * 4, 40, block=160, buffer=50).deal()
    points = np.concatenate([ground_points(p, grid, 40) for p in places])
    assert len(set(s.cluster)) == 1 and set(s.split) >= {0, 1, 2} and least_distance(points, s.split) >= 50


def test_web_mercator_metres_are_not_ground_metres():
    p = Place("a", 1600, 1600, from_origin(2e5, 8.4e6, 1, 1), "EPSG:3857")
    grid = tile_grid(1600, 1600, 50)
    s = Ground([p], [grid], 50, block=100, buffer=40).deal()
    assert least_distance(ground_points(p, grid, 50), s.split) >= 40


def test_degrees():
    p = Place("a", 1600, 1600, from_origin(5, 60, 1e-4, 1e-4), "EPSG:4326")
    grid = tile_grid(1600, 1600, 50)
    s = Ground([p], [grid], 50, buffer=300).deal()
    assert set(s.split) >= {0, 1, 2} and least_distance(ground_points(p, grid, 50), s.split) >= 300


def test_groups_of_photos_stay_together():
    places = [Place(f"p{i}", 64, 64, group=f"g{i // 3}") for i in range(60)]
    s = Ground(places, [tile_grid(64, 64, 32)] * 60, 32).deal()
    by = s.split.reshape(20, 12)
    assert (by == by[:, :1]).all() and set(s.split) == {0, 1, 2}


def test_one_large_photo_is_cut_into_blocks():
    s = Ground([Place("p", 1280, 1280)], [tile_grid(1280, 1280, 32)], 32, buffer=40).deal()
    assert set(s.split) >= {0, 1, 2}
    b = s.boxes
    for i in np.flatnonzero(s.split == 1):
        other = b[(s.split >= 0) & (s.split != 1)]
        d = np.maximum(np.maximum(b[i, :2] - other[:, 2:], other[:, :2] - b[i, 2:]), 0)
        assert np.hypot(*d.T).min() >= 40


@given(st.lists(st.integers(0, 50), min_size=3, max_size=40), st.integers(0, 9))
def test_no_split_is_empty(weights, seed):
    out = assign_splits(weights, (0.8, 0.1, 0.1), seed)
    if sum(w > 0 for w in weights) >= 3:
        assert all(np.asarray(weights)[out == s].sum() > 0 for s in range(3))


def test_a_split_is_dealt_again_when_nodata_empties_it(tmp_path):
    "Scene by scene, a third of them almost all nodata: val and test must still get tiles."
    items = [scene(tmp_path, f"s{i}", x0=4e5 + 1e4 * i, seed=i, hole=120 if i % 3 else 0) for i in range(9)]
    for seed in range(4):
        s = build(scenes(*items), tmp_path / f"o{seed}", seed=seed)
        assert set(s.index.split) == {"train", "val", "test"}


# ------------------------------------------------------------------------------------------------------------- contents


def test_tiles_are_what_the_files_hold(store, tmp_path):
    with rasterio.open(store.path.parent / "a" / "rgb.tif") as f:
        rgb = f.read()
    with rasterio.open(store.path.parent / "a" / "dsm.tif") as f:
        dsm = f.read()
    rows = store.index[store.index.scene == "a"]
    b = store.read(rows.tile)
    for k, r in enumerate(rows.itertuples()):
        assert (b["images"]["rgb"][k] == rgb[:, r.row : r.row + 32, r.col : r.col + 32]).all()
        assert (b["images"]["dsm"][k] == dsm[:, r.row // 2 : r.row // 2 + 16, r.col // 2 : r.col // 2 + 16]).all()
        assert (b["valid"]["rgb"][k, 0] == (rgb[:, r.row : r.row + 32, r.col : r.col + 32] != 0).all(0)).all()
        assert r.valid_rgb >= 0.5 and r.valid_rgb == pytest.approx(b["valid"]["rgb"][k].mean(), abs=1e-4)


def test_min_valid_is_reported_and_missing_modality_recorded(store):
    # columns 0..39 of scene a are nodata: the first column of tiles is empty, the second 3/4 valid
    assert sorted(store.index[store.index.scene == "a"].col.unique()) == [32, 64, 96]
    assert store.report["left_out"]["few_valid"] == 4
    c = store.index[store.index.scene == "c"]
    assert len(c) == 16 and (c.valid_dsm == 0).all() and not c.full_dsm.any()
    assert store.report["missing_modality"] == {"dsm": 16}
    assert not store.read(c.tile)["valid"]["dsm"].any()
    text = (store.path / "report.md").read_text()
    assert "4 tiles with less than 50% valid pixels" in text and "16 tiles without any valid pixel of dsm" in text


def test_full_batches_have_no_validity(store):
    ids = store.index[(store.index.full_rgb) & (store.index.full_dsm)].tile.to_numpy()
    assert store.read(ids)["valid"] == {"rgb": None, "dsm": None}


def test_statistics_ignore_nodata_and_other_splits(store):
    train = store.split("train")
    b = store.read(train)
    for m, mod in store.modalities.items():
        valid = b["valid"][m]
        ok = np.ones((len(train), *store.tile_size[m]), bool) if valid is None else valid[:, 0]
        for i, _ in enumerate(mod.bands):
            x = b["images"][m][:, i][ok].astype(float)
            s = {k: v[i] for k, v in store.stats[m].items()}
            assert [s["mean"], s["std"], s["min"], s["max"]] == pytest.approx([x.mean(), x.std(), x.min(), x.max()], rel=1e-5)
            assert [s["p01"], s["p50"], s["p98"]] == pytest.approx(np.quantile(x, [0.01, 0.5, 0.98], method="inverted_cdf"), rel=2e-3)
            assert s["pixels"] == ok.sum()


def test_statistics_are_physical(tmp_path):
    one = scene(tmp_path, dsm=False)
    mods = {"rgb": {"preset": "rgb", "gsd": 1.0, "scale": 0.5, "offset": 10}}
    s = build(scenes(one, mods=mods), tmp_path / "o", splits=(1, 0, 0)).stats["rgb"]
    assert s["min"] == [10.5] * 3 and s["max"] == [137.0] * 3 and s["p50"][0] == pytest.approx(74, abs=2)


def test_targets_and_tile_labels(tmp_path):
    a = scene(tmp_path, dsm=False)
    mask = np.full((1, 128, 128), 1, np.uint8)
    mask[0, :, 64:] = 2
    mask[0, :, 70:96] = 0
    mask[0, 96:, :] = 255
    height = np.where(mask == 255, -1, mask.astype(np.float32))
    a["targets"] = {"cover": write(tmp_path / "m.tif", mask), "height": write(tmp_path / "h.tif", height, nodata=-1)}
    spec = {
        "cover": {"kind": "mask", "classes": ["x", "y", "z"], "nodata": 255},
        "height": {"kind": "regression", "unit": "metre"},
    }
    s = build(scenes(a, mods={"rgb": MODS["rgb"]}, targets=spec, tile_label="cover"), tmp_path / "o", splits=(1, 0, 0))
    lab = {(r.row, r.col): r.label for r in s.index.itertuples()}
    assert [lab[0, c] for c in (0, 32, 64, 96)] == [1, 1, 0, 2] and lab[96, 0] == -1
    assert s.classes == ["x", "y", "z"] and s.targets["cover"].classes == ["x", "y", "z"]
    b = s.read(np.arange(len(s)))
    t = s.index.reset_index().set_index(["row", "col"]).tile
    assert (b["targets"]["cover"][t[96, 0]] == 255).all() and np.isnan(b["targets"]["height"][t[96, 0]]).all()
    assert b["targets"]["height"].dtype == np.float32 and (b["targets"]["height"][t[0, 0]] == 1).all()
    assert b["label"].dtype == np.int64 and b["label"][t[0, 64]] == 0


def test_scene_labels(tmp_path):
    items = [scene(tmp_path, n, x0=4e5 + 1e4 * i, dsm=False, label=n) for i, n in enumerate("qpr")]
    s = build(scenes(*items, mods={"rgb": MODS["rgb"]}), tmp_path / "o")
    assert s.classes == ["p", "q", "r"] and (s.index.label == s.index.scene.map({"p": 0, "q": 1, "r": 2})).all()


def test_xarray_opens_it(store):
    import warnings

    import xarray as xr

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds = xr.open_zarr(store.path)
    assert ds.rgb.dims == ("tile", "band", "y", "x") and list(ds.band.values) == ["red", "green", "blue"]
    assert ds.dsm.dims == ("tile", "band_dsm", "y_dsm", "x_dsm") and list(ds.band_dsm.values) == ["height"]
    assert {"scene", "split", "row", "col", "label"} <= set(ds.coords)
    assert list(ds.scene.values) == list(store.index.scene) and list(ds.split.values) == list(store.index.split)
    b = store.read(np.arange(len(store)))
    assert (ds.rgb.values == b["images"]["rgb"]).all() and (ds.valid_rgb.values == b["valid"]["rgb"][:, 0]).all()
    assert (ds.valid_dsm.values == b["valid"]["dsm"][:, 0]).all()


def test_index_is_geojson_in_degrees(store):
    d = json.loads((store.path / "index.geojson").read_text())
    assert d["type"] == "FeatureCollection" and len(d["features"]) == len(store)
    f, row = d["features"][0], store.index.iloc[0]
    x, y = warp("EPSG:32631", "EPSG:4326", [4e5 + row.col], [5.4e6 - row.row])
    assert f["geometry"]["coordinates"][0][0] == pytest.approx([x[0], y[0]], abs=1e-6)
    assert f["geometry"]["coordinates"][0][0] == f["geometry"]["coordinates"][0][-1] and f["properties"]["split"] == row.split


def test_photos_have_no_outline_and_the_report_says_so(tmp_path):
    from PIL import Image

    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    items = [dict(name=f"s{i}", rasters={"rgb": str(tmp_path / f"{i}.png")}) for i in range(6)]
    s = build(scenes(*items, mods={"rgb": MODS["rgb"]}), tmp_path / "o")
    assert all(f["geometry"] is None for f in json.loads((s.path / "index.geojson").read_text())["features"])
    assert "6 scenes without a CRS" in (s.path / "report.md").read_text() and set(s.index.split) == {"train", "val", "test"}


# ------------------------------------------------------------------------------------------------------------ processes


def test_any_number_of_workers_writes_the_same_bytes(store, tmp_path):
    tmp = store.path.parent
    sc = scenes(*[dict(name=n, rasters={m: str(tmp / n / f"{m}.tif") for m in (("rgb",) if n == "c" else ("rgb", "dsm"))}) for n in "abc"])
    build(sc, tmp_path / "one")
    build(sc, tmp_path / "two", workers=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


KILL = """
import sys, json, time
from rs_selfsup.data import tiles
from rs_selfsup.data.rasters import load_scenes
tiles.UNIT_BYTES = 1
tiles.CHUNK_BYTES = 1 << 14
add = tiles.Journal.add
def slow(self, **d): add(self, **d); time.sleep(.03)
if sys.argv[3] == 'slow': tiles.Journal.add = slow
tiles.build_store(load_scenes(json.loads(open(sys.argv[1]).read())), sys.argv[2], tile=32, workers=int(sys.argv[4]), progress=False)
"""


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_run_again_gives_the_same_bytes(tmp_path, workers):
    items = [scene(tmp_path, n, h=256, x0=4e5 + 1e4 * i, seed=i, hole=20) for i, n in enumerate("abc")]
    (tmp_path / "cut").mkdir()
    with open(items[1]["rasters"]["rgb"]["path"], "r+b") as f:  # scene b fails halfway, and must leave nothing behind
        f.truncate(60000)
    (tmp_path / "s.json").write_text(json.dumps(dict(anchor="rgb", modalities=MODS, scenes=items)))

    def run(out, *args):
        return subprocess.Popen([sys.executable, "-c", KILL, str(tmp_path / "s.json"), str(tmp_path / out), *map(str, args)])

    assert run("whole", "fast", 1).wait() == 0
    journal, lines = tmp_path / "cut" / "journal.jsonl", 5
    for _ in range(2):
        p = run("cut", "slow", workers)
        end = time.time() + 30
        while p.poll() is None and time.time() < end:
            if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.005)
        assert p.poll() is None, "the build ended before it could be killed"
        p.send_signal(signal.SIGKILL)
        p.wait()
        with pytest.raises(DataError, match="not finished.*Run the same build again"):
            TileStore(tmp_path / "cut")
        with pytest.raises(FileNotFoundError):
            __import__("xarray").open_zarr(tmp_path / "cut", consolidated=False)
        lines += 6
    assert run("cut", "fast", workers).wait() == 0
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")
    assert "scene b:" in (tmp_path / "cut" / "report.md").read_text()


def test_finished_build_returns_at_once_and_others_are_refused(tmp_path):
    sc = scenes(scene(tmp_path))
    s = build(sc, tmp_path / "o")
    stamp = os.stat(s.path / "store.json").st_mtime_ns
    build(sc, tmp_path / "o")
    assert os.stat(s.path / "store.json").st_mtime_ns == stamp
    with pytest.raises(DataError, match="finished store with other settings"):
        build(sc, tmp_path / "o", seed=1)


def test_peak_memory_does_not_grow_with_the_scene(tmp_path):
    "A scene 9 times as large, units of 1 MB: the same memory within a few MB."
    code = """
import os, resource, sys
from rs_selfsup.data import tiles, rasters
tiles.UNIT_BYTES = 1 << 20
sc = rasters.load_scenes(dict(anchor='rgb', modalities=dict(rgb=dict(preset='rgb', gsd=1.)), scenes=[dict(name='a', rasters=dict(rgb=sys.argv[1]))]))
tiles.build_store(sc, sys.argv[2], tile=128, progress=False)
if os.path.exists('/proc/self/status'):  # not ru_maxrss, which a process inherits from the one that started it
    print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))
else: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20)
"""
    peak = []
    for n in (1024, 3072):
        path = write(tmp_path / f"{n}.tif", np.full((3, n, n), 7, np.uint8), tiled=True, compress="deflate", zlevel=1)
        args = [sys.executable, "-c", code, path, str(tmp_path / f"o{n}")]
        out = subprocess.run(args, capture_output=True, text=True, check=True, env={**os.environ, "GDAL_CACHEMAX": "8"})
        peak.append(int(out.stdout))
    assert peak[1] - peak[0] < 25, peak


def test_store_travels_to_workers(store):
    import torch

    again = pickle.loads(pickle.dumps(store))
    ids = np.array([5, 1, 5])
    assert len(pickle.dumps(store)) < 50_000
    assert all((again.read(ids)["images"][m] == store.read(ids)["images"][m]).all() for m in store.modalities)

    class Tiles(torch.utils.data.Dataset):
        def __len__(self):
            return len(store)

        def __getitem__(self, i):
            return torch.from_numpy(store.read([i])["images"]["rgb"][0])

    got = torch.cat(list(torch.utils.data.DataLoader(Tiles(), batch_size=8, num_workers=2)))
    assert (got.numpy() == store.read(np.arange(len(store)))["images"]["rgb"]).all()


def test_many_open_files_are_bounded(tmp_path):
    f = tiles.TileFiles(tmp_path, (4,), "uint8", 1)
    for i in range(300):
        f.put(i, np.full(4, i % 256))
    assert (f.take(np.arange(300))[:, 0] == np.arange(300) % 256).all() and len(f._open) <= 128


# ------------------------------------------------------------------------------------------------------------ bad input


def copy(store, tmp_path):
    import shutil

    return Path(shutil.copytree(store.path, tmp_path / "copy"))


def test_ids_outside(store):
    for bad in ([-1], [len(store)], [0.5]):
        with pytest.raises(IndexError):
            store.read(bad)


def test_not_a_store(tmp_path):
    with pytest.raises(DataError, match="no tile store"):
        TileStore(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        TileStore(tmp_path / "nothing")


def test_store_of_another_version(store, tmp_path):
    p = copy(store, tmp_path)
    d = json.loads((p / "store.json").read_text()) | {"version": 99}
    (p / "store.json").write_text(json.dumps(d))
    with pytest.raises(DataError, match="store of version 99, this package reads version 1"):
        TileStore(p)


def test_missing_chunk(store, tmp_path):
    p = copy(store, tmp_path)
    (p / "rgb" / "c.0.0.0.0").unlink()
    with pytest.raises(DataError, match=r"rgb/c\.0.*is missing"):
        TileStore(p)
    with pytest.raises(DataError, match=r"rgb/c\.0.*is missing"):
        TileStore(p, check=False).read([0])


def test_short_chunk(store, tmp_path):
    p = copy(store, tmp_path)
    f = p / "dsm" / "c.0.0.0.0"
    os.truncate(f, f.stat().st_size - 4)
    with pytest.raises(DataError, match=r"dsm/c\.0.*too short"):
        TileStore(p)
    with pytest.raises(DataError, match=r"dsm/c\.0.*too short"):
        TileStore(p, check=False).read([len(store) - 1])


def test_missing_validity(store, tmp_path):
    p = copy(store, tmp_path)
    (p / "valid_rgb" / "c.0.0.0").unlink()
    with pytest.raises(DataError, match=r"valid_rgb/c\.0.*is missing"):
        TileStore(p)


@pytest.mark.parametrize("keep", [0, 40, -9, -1])
def test_truncated_index(store, tmp_path, keep):
    p = copy(store, tmp_path)
    raw = (p / "index.csv").read_bytes()
    (p / "index.csv").write_bytes(raw[:keep])
    with pytest.raises(DataError, match=r"index\.csv: the index is cut short"):
        _ = TileStore(p).index


@pytest.mark.parametrize("name", ["store.json", "stats.json", "report.json"])
def test_truncated_json(store, tmp_path, name):
    p = copy(store, tmp_path)
    (p / name).write_text((p / name).read_text()[:50])
    with pytest.raises(DataError, match=f"{name}.*cut short"):
        s = TileStore(p)
        _ = s.stats, s.report


def test_truncated_label_column(store, tmp_path):
    p = copy(store, tmp_path)
    os.truncate(p / "label" / "c.0", 8)
    with pytest.raises(DataError, match="1 of"):
        TileStore(p)


def test_bad_scenes_are_reported_and_the_others_stored(tmp_path):
    good = scene(tmp_path, "good")
    empty = scene(tmp_path, "empty", x0=5e5, seed=1)
    Path(empty["rasters"]["rgb"]["path"]).write_bytes(b"")
    cut = scene(tmp_path, "cut", x0=6e5, seed=2)
    with open(cut["rasters"]["dsm"], "r+b") as f:
        f.truncate(9000)
    wide = scene(tmp_path, "wide", x0=7e5, seed=3)
    write(tmp_path / "wide" / "rgb.tif", np.ones((3, 128, 128), np.uint16), x0=7e5)
    s = build(scenes(empty, good, cut, wide), tmp_path / "o")
    only = build(scenes(good), tmp_path / "only")
    assert set(s.index.scene) == {"good"} and len(s) == len(only) and sorted(s.report["failed"]) == ["cut", "empty", "wide"]
    text = (s.path / "report.md").read_text()
    assert "empty/rgb.tif" in text and "cut/dsm.tif" in text and "uint16 here but uint8" in text
    assert (s.read([3])["images"]["rgb"] == only.read([3])["images"]["rgb"]).all()


def test_tile_larger_than_some_scene_is_reported(tmp_path):
    s = build(scenes(scene(tmp_path, "a"), scene(tmp_path, "b", h=24, x0=5e5)), tmp_path / "o")
    assert s.report["left_out"]["too_small_scenes"] == 1 and "1 scene smaller than a tile: b" in (s.path / "report.md").read_text()


def test_tile_larger_than_every_scene(tmp_path):
    with pytest.raises(DataError, match="no tile is left: 1 scene.* smaller than a tile of 256 x 256"):
        build(scenes(scene(tmp_path)), tmp_path / "o", tile=256)
    assert not (tmp_path / "o" / "store.json").exists()


def test_nothing_valid_enough(tmp_path):
    with pytest.raises(DataError, match="no tile is left: .*too few valid pixels"):
        build(scenes(scene(tmp_path, hole=100, w=128)), tmp_path / "o", tile=128, min_valid=0.9)


def test_every_scene_bad(tmp_path):
    a = scene(tmp_path)
    Path(a["rasters"]["rgb"]["path"]).write_bytes(b"no raster")
    with pytest.raises(DataError, match="no tile is left: 1 scene.*failed.*rgb.tif"):
        build(scenes(a), tmp_path / "o")


def test_tile_that_does_not_fit_the_factors(tmp_path):
    with pytest.raises(DataError, match="tile = 33 anchor pixels is no multiple of 2.*tile=32 or 34"):
        build(scenes(scene(tmp_path)), tmp_path / "o", tile=33)


def test_splits_must_be_shares(tmp_path):
    with pytest.raises(DataError, match="no shares"):
        build(scenes(scene(tmp_path)), tmp_path / "o", splits=(0.9, 0.1))


def test_unknown_split(store):
    with pytest.raises(DataError, match="no split is called 'valid'"):
        store.split("valid")


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.data
def test_naip_years_of_one_place_stay_together(real_data, tmp_path):
    d = dict(
        anchor="rgb",
        modalities={"rgb": {"preset": "rgb", "gsd": 0.6}, "nir": {"preset": "nir", "gsd": 0.6}},
        discover=dict(
            root=str(real_data / "naip_rgbn/images"),
            pattern="{city}_{year}_{index}.tif",
            scene="{city}_{year}_{index}",
            group="{city}_{index}",
            rasters={"rgb": {"path": "{city}_{year}_{index}.tif", "bands": [1, 2, 3]}, "nir": {"path": "{city}_{year}_{index}.tif", "bands": [4]}},
        ),
    )
    sc = load_scenes(d)
    sc.scenes = sc.scenes[:40]
    s = build(sc, tmp_path / "o", tile=128)
    assert s.index.groupby("group").split.nunique().max() == 1 and set(s.index.split) == {"train", "val", "test"}


def test_some_modalities_of_a_store(store):
    some = TileStore(store.path, modalities=["dsm", "rgb"])
    assert list(some.modalities) == [m for m in store.modalities if m in ("rgb", "dsm")]
    a, b = some.read([1, 0]), store.read([1, 0])
    assert set(a["images"]) == set(a["valid"]) == {"rgb", "dsm"}
    for m in a["images"]: np.testing.assert_array_equal(a["images"][m], b["images"][m])
    for k in a["targets"]: np.testing.assert_array_equal(a["targets"][k], b["targets"][k])
    with pytest.raises(DataError, match="no modality 'thermal' here.*Choose from"): TileStore(store.path, modalities=["rgb", "thermal"])
    with pytest.raises(DataError, match="is the anchor"): TileStore(store.path, modalities=["dsm"])
