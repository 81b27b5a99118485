"Scenes in, windows out: alignment against plain numpy, validity, every kind of bad input, real files where they are"

import os, warnings
from pathlib import Path
import numpy as np, pytest, rasterio
from hypothesis import given, settings, strategies as st
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.warp import transform as transform_points
from rs_selfsup.data.rasters import RasterFile, Scene, SceneReader, Scenes, load_scenes, after, at
from rs_selfsup.modalities import DataError, preset

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("RS_SELFSUP_DATA") or ROOT / "../shared/data")
X0, Y0 = 500000.0, 6000000.0


def north_up(res, x0=X0, y0=Y0):
    return Affine(res, 0, x0, 0, -res, y0)


def write(path, x, transform=None, crs="EPSG:32631", driver="GTiff", **kw):
    x = x[None] if x.ndim == 2 else x
    path.parent.mkdir(parents=True, exist_ok=True)
    if driver not in ("PNG", "JPEG"):
        kw = dict(transform=transform or north_up(1), crs=crs) | kw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver=driver, count=x.shape[0], height=x.shape[1], width=x.shape[2], dtype=x.dtype, **kw
        ) as f:
            f.write(x)
    return str(path)


def scenes_of(modalities, rasters, anchor=None, targets=None, target_files=None, **top):
    d = dict(
        anchor=anchor or next(iter(modalities)),
        modalities=modalities,
        scenes=[dict(name="a", rasters=rasters, targets=target_files or {})],
        **top,
    )
    if targets:
        d["targets"] = targets
    return load_scenes(d)


def fails(contains, modalities, rasters, window=None, **kw):
    "Opening (or reading) must raise a DataError that holds all of these words"
    with pytest.raises(DataError) as e:
        S = scenes_of(modalities, rasters, **kw)
        with S.open() as r:
            r.read(*(window or (0, 0, r.height, r.width)))
            r.read_targets(*(window or (0, 0, r.height, r.width)))
    for c in [contains] if isinstance(contains, str) else contains:
        assert c in str(e.value), str(e.value)
    return e.value


@pytest.fixture
def rng():
    return np.random.default_rng(0)


RGB, DSM = dict(preset="rgb", gsd=1), dict(preset="dsm", gsd=1)


# ---------------------------------------------------------------- plain windows
def test_plain_window_is_the_file(tmp_path, rng):
    x = rng.integers(0, 255, (3, 50, 60), dtype=np.uint8)
    S = scenes_of(dict(rgb=RGB), dict(rgb=write(tmp_path / "a.tif", x)))
    with S.open() as r:
        im, ok = r.read(7, 9, 20, 30)
        assert (r.height, r.width, r.factors, r.crs) == (50, 60, {"rgb": 1}, CRS.from_epsg(32631))
        assert np.array_equal(im["rgb"], x[:, 7:27, 9:39]) and im["rgb"].dtype == np.uint8 and ok["rgb"].all()
        assert r.transform == north_up(1)


@settings(max_examples=40, deadline=None)
@given(st.integers(-30, 70), st.integers(-30, 80), st.integers(1, 40), st.integers(1, 40))
def test_outside_is_zero_and_invalid(tmp_path_factory, row, col, h, w):
    path = tmp_path_factory.getbasetemp() / "pad.tif"
    x = np.random.default_rng(1).integers(1, 255, (1, 50, 60), dtype=np.uint8)
    if not path.exists():
        write(path, x)
    S = scenes_of(dict(nir=dict(preset="nir", gsd=1)), dict(nir=str(path)))
    with S.open(check=False) as r:
        im, ok = r.read(row, col, h, w)
    full, real = np.zeros((1, 200, 200), np.uint8), np.zeros((200, 200), bool)
    full[:, 60:110, 60:120], real[60:110, 60:120] = x, True
    at = slice(row + 60, row + 60 + h), slice(col + 60, col + 60 + w)
    assert np.array_equal(im["nir"], full[(slice(None), *at)]) and np.array_equal(ok["nir"], real[at])


def test_integer_factor_and_offset_read_without_warping(tmp_path, rng):
    "A height model of 1 m beside an image of 0.1 m, corners 3 and 5 image pixels apart: nothing is resampled"
    im, z = rng.integers(0, 255, (3, 100, 100), dtype=np.uint8), rng.uniform(0, 30, (1, 10, 10)).astype("f4")
    S = scenes_of(
        dict(rgb=dict(preset="rgb", gsd=0.1), chm=dict(preset="chm", gsd=1)),
        dict(
            rgb=write(tmp_path / "a.tif", im, north_up(0.1)),
            chm=write(tmp_path / "z.tif", z, north_up(1, X0 + 0.5, Y0 - 0.3)),
        ),
    )
    with S.open() as r:
        assert {m: l[0].how for m, l in r.layers.items()} == dict(rgb="plain", chm="plain")
        assert (r.height, r.width) == (97, 95) and r.transform.almost_equals(north_up(0.1, X0 + 0.5, Y0 - 0.3), 1e-6)
        x, ok = r.read(0, 0, 90, 90)
        assert (
            np.array_equal(x["rgb"], im[:, 3:93, 5:95]) and np.array_equal(x["chm"], z[:, :9, :9]) and ok["chm"].all()
        )


def test_window_must_be_whole_pixels_of_every_modality(tmp_path):
    S = scenes_of(
        dict(rgb=RGB, s2=dict(preset="s2_10m", gsd=2)),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8)),
            s2=write(tmp_path / "b.tif", np.full((4, 4, 4), 500, np.uint16), north_up(2)),
        ),
    )
    with S.open() as r, pytest.raises(ValueError, match="multiples of 2"):
        r.read(0, 1, 4, 4)


# ---------------------------------------------------------------- resampling
def test_block_average_and_strict_validity(tmp_path, rng):
    z = rng.uniform(0, 30, (1, 40, 40)).astype("f4")
    z[0, 5, 5] = -9999
    S = scenes_of(
        dict(rgb=RGB, dsm=dict(preset="dsm", gsd=4)),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, 40, 40), np.uint8)),
            dsm=write(tmp_path / "z.tif", z, nodata=-9999),
        ),
    )
    with S.open() as r:
        assert r.layers["dsm"][0].how == "block"
        x, ok = r.read(0, 0, 40, 40)
    want = z.reshape(10, 4, 10, 4).mean((1, 3))
    assert not ok["dsm"][1, 1] and ok["dsm"].sum() == 99 and x["dsm"][0, 1, 1] == 0
    assert np.allclose(x["dsm"][0][ok["dsm"]], want[ok["dsm"]], atol=1e-4)


def test_one_file_per_band_at_other_resolutions(tmp_path, rng):
    "The BigEarthNet layout asked for as one 10 m modality: coarser bands are interpolated, the rim is not lost"
    T = dict(B02=(10, 12), B05=(20, 6), B01=(60, 2))
    y, x = np.mgrid[:12, :12]
    plane = lambda res, n: (
        1000 + 3 * res * (np.mgrid[:n, :n][1] + 0.5) + 2 * res * (np.mgrid[:n, :n][0] + 0.5)
    ).astype(np.uint16)
    files = {b: write(tmp_path / f"{b}.tif", plane(*T[b]), north_up(T[b][0])) for b in T}
    S = scenes_of(dict(s2=dict(preset="s2_l2a", bands=list(T))), dict(s2=dict(files=files)))
    with S.open() as r:
        assert [l.how for l in r.layers["s2"]] == ["plain", "warp", "warp"] and (r.height, r.width) == (12, 12)
        im, ok = r.read(0, 0, 12, 12)
        parts = [r.read(0, c, 12, 4)[0]["s2"] for c in (0, 4, 8)]
    assert ok["s2"].all() and im["s2"].dtype == np.uint16
    assert np.array_equal(np.concatenate(parts, 2), im["s2"])  # windows fit together without a seam
    want = plane(10, 12).astype(float)
    assert (
        np.array_equal(im["s2"][0], want) and np.abs(im["s2"][1] - want)[1:-1, 1:-1].max() <= 1
    )  # bilinear is exact on a plane
    assert np.abs(im["s2"][2] - want)[3:-3, 3:-3].max() <= 1


@pytest.mark.parametrize("shift", [0.5, 0.25])
def test_half_pixel_shift_is_bilinear(tmp_path, rng, shift):
    z = rng.uniform(0, 30, (1, 20, 20)).astype("f4")
    S = scenes_of(
        dict(rgb=RGB, dsm=DSM),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, 20, 20), np.uint8)),
            dsm=write(tmp_path / "z.tif", z, north_up(1, X0 - shift)),
        ),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, 20, 19)
    assert r.layers["dsm"][0].how == "warp" if r.layers else True
    assert (
        np.allclose(x["dsm"][0][:, :19], (1 - shift) * z[0, :, :19] + shift * z[0, :, 1:], atol=1e-3)
        and ok["dsm"][:, :19].all()
    )


def test_warped_pixel_is_valid_only_where_its_sources_are(tmp_path, rng):
    z = rng.uniform(0, 30, (1, 20, 20)).astype("f4")
    z[0, 8, 8] = np.nan
    S = scenes_of(
        dict(rgb=RGB, dsm=DSM),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, 20, 20), np.uint8)),
            dsm=write(tmp_path / "z.tif", z, north_up(1, X0 + 0.5, Y0 + 0.5)),
        ),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, 20, 20)
    want = np.ones((20, 20), bool)
    want[7:9, 8:10] = False  # the four that touch the NaN
    want[-1] = False  # half a pixel below the file
    inside = np.s_[:, 1:]  # column 0: its centre lies on the file's edge
    assert (
        np.array_equal(ok["dsm"][inside], want[inside])
        and (x["dsm"][0][~ok["dsm"]] == 0).all()
        and np.isfinite(x["dsm"]).all()
    )


def test_other_projection_against_direct_evaluation(tmp_path):
    "A smooth function sampled in UTM 32 and read on a UTM 31 grid agrees with evaluating it there"
    crs31, crs32, n = CRS.from_epsg(32631), CRS.from_epsg(32632), 60
    T31 = north_up(10, 690000, 5500000)
    cx, cy = transform_points(crs31, crs32, [690300], [5499700])
    T32 = north_up(10, round(cx[0]) - 600, round(cy[0]) + 600)
    f = lambda x, y: 100 + 20 * np.sin((x - 260000) / 90) + 20 * np.cos((y - 5500000) / 110)
    r_, c_ = np.mgrid[:120, :120] + 0.5
    z = f(*at(T32, c_, r_)).astype("f4")[None]
    S = scenes_of(
        dict(rgb=dict(preset="rgb", gsd=10), dsm=dict(preset="dsm", gsd=10)),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, n, n), np.uint8), T31),
            dsm=write(tmp_path / "z.tif", z, T32, "EPSG:32632"),
        ),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, n, n)
        part = r.read(20, 20, 8, 8)[0]["dsm"]
    rr, cc = np.mgrid[:n, :n] + 0.5
    xs, ys = transform_points(crs31, crs32, *(np.ravel(o) for o in at(T31, cc, rr)))
    want = f(np.array(xs), np.array(ys)).reshape(n, n)
    assert ok["dsm"].all() and np.abs(x["dsm"][0] - want).max() < 0.08
    assert np.allclose(part[0], x["dsm"][0, 20:28, 20:28], atol=1e-3)  # the same numbers whatever the window


def test_rotated_file_onto_north_up_anchor(tmp_path):
    f = lambda x, y: 50 + (x - X0) / 4 + (y - Y0) / 8
    T = after(after(Affine.translation(X0 + 5, Y0 - 25), Affine.rotation(30)), Affine.scale(1, -1))
    r_, c_ = np.mgrid[:40, :40] + 0.5
    S = scenes_of(
        dict(rgb=RGB, dsm=DSM),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, 60, 60), np.uint8)),
            dsm=write(tmp_path / "z.tif", f(*at(T, c_, r_)).astype("f4"), T),
        ),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, 60, 60)
    rr, cc = np.mgrid[:60, :60] + 0.5
    pc, pr = at(~T, *at(north_up(1), cc, rr))
    inside, clear = (pc > 0) & (pc < 40) & (pr > 0) & (pr < 40), (pc > 0.6) & (pc < 39.4) & (pr > 0.6) & (pr < 39.4)
    assert np.array_equal(ok["dsm"], inside) and 0.2 < inside.mean() < 0.8
    assert np.abs(x["dsm"][0] - f(*at(north_up(1), cc, rr)))[clear].max() < 0.01


def test_rotated_anchor_keeps_its_grid(tmp_path, rng):
    T = after(after(Affine.translation(X0, Y0), Affine.rotation(20)), Affine.scale(1, -1))
    im, z = rng.integers(0, 255, (3, 30, 30), dtype=np.uint8), rng.uniform(0, 9, (1, 15, 15)).astype("f4")
    S = scenes_of(
        dict(rgb=RGB, dsm=dict(preset="dsm", gsd=2)),
        dict(rgb=write(tmp_path / "a.tif", im, T), dsm=write(tmp_path / "z.tif", z, after(T, Affine.scale(2)))),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, 30, 30)
        assert r.transform.almost_equals(T, 1e-6) and [l[0].how for l in r.layers.values()] == ["plain", "plain"]
    assert np.array_equal(x["rgb"], im) and np.array_equal(x["dsm"], z)


def test_finer_anchor_file_is_coarsened_to_its_gsd(tmp_path, rng):
    im = rng.integers(0, 255, (3, 40, 40), dtype=np.uint8)
    S = scenes_of(dict(rgb=RGB), dict(rgb=write(tmp_path / "a.tif", im, north_up(0.25))))
    with S.open() as r:
        x, _ = r.read(0, 0, 10, 10)
        assert (r.height, r.width, r.transform.a) == (10, 10, 1)
    assert np.array_equal(x["rgb"], np.rint(im.reshape(3, 10, 4, 10, 4).mean((2, 4))))


def test_partial_overlap_keeps_the_anchors_extent(tmp_path, rng):
    z = rng.uniform(1, 9, (1, 20, 20)).astype("f4")
    S = scenes_of(
        dict(rgb=RGB, dsm=DSM),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, 20, 20), np.uint8)),
            dsm=write(tmp_path / "z.tif", z, north_up(1, X0 + 12, Y0 + 5)),
        ),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, 20, 20)
    want = np.zeros((20, 20), bool)
    want[:15, 12:] = True
    assert np.array_equal(ok["dsm"], want) and np.array_equal(x["dsm"][0][:15, 12:], z[0, 5:, :8]) and ok["rgb"].all()


def test_a_modality_may_be_missing(tmp_path):
    a = write(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8))
    S = load_scenes(dict(anchor="rgb", modalities=dict(rgb=RGB, dsm=DSM), scenes=[dict(name="a", rasters=dict(rgb=a))]))
    with S.open() as r:
        x, ok = r.read(0, 0, 8, 8)
        assert r.present == ["rgb"] and x["dsm"].shape == (1, 8, 8) and not ok["dsm"].any()


# ---------------------------------------------------------------- without georeference
def test_image_folders_match_by_pixel_ratio(tmp_path, rng):
    im, lo = rng.integers(0, 255, (3, 64, 48), dtype=np.uint8), rng.integers(0, 255, (1, 32, 24), dtype=np.uint8)
    S = scenes_of(
        dict(rgb=RGB, nir=dict(preset="nir", gsd=2)),
        dict(rgb=write(tmp_path / "a.png", im, driver="PNG"), nir=write(tmp_path / "b.png", lo, driver="PNG")),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, 64, 48)
        assert r.crs is None and r.layers["nir"][0].how == "plain" and abs(r.transform.a) == 1
    assert np.array_equal(x["rgb"], im) and np.array_equal(x["nir"], lo) and ok["nir"].all()


def test_plain_image_beside_a_georeferenced_anchor(tmp_path, rng):
    lo = rng.integers(0, 255, (1, 16, 16), dtype=np.uint8)
    S = scenes_of(
        dict(rgb=RGB, nir=dict(preset="nir", gsd=2)),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, 32, 32), np.uint8)),
            nir=write(tmp_path / "b.png", lo, driver="PNG"),
        ),
    )
    with S.open() as r:
        assert np.array_equal(r.read(0, 0, 32, 32)[0]["nir"], lo)


def test_labels_follow_folders(tmp_path, rng):
    for c in ("crop", "wood"):
        for i in (1, 2, 10):
            write(tmp_path / c / f"{c}_{i}.png", rng.integers(0, 255, (3, 8, 8), dtype=np.uint8), driver="PNG")
    S = load_scenes(
        dict(anchor="rgb", modalities=dict(rgb=RGB), discover=dict(pattern="{label}/{scene}.png")), root=tmp_path
    )
    assert (
        S.classes == ["crop", "wood"]
        and [s.name for s in S][:3] == ["crop_1", "crop_2", "crop_10"]
        and S["wood_2"].label == "wood"
    )


# ---------------------------------------------------------------- nodata in all its forms
def test_internal_mask_band(tmp_path):
    p = write(tmp_path / "a.tif", np.full((3, 16, 16), 9, np.uint8))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(p, "r+") as f:
        m = np.full((16, 16), 255, np.uint8)
        m[:4] = 0
        f.write_mask(m)
    with scenes_of(dict(rgb=RGB), dict(rgb=p)).open() as r:
        ok = r.read(0, 0, 16, 16)[1]["rgb"]
    assert not ok[:4].any() and ok[4:].all()


def test_alpha_is_a_mask_and_no_band(tmp_path):
    x = np.full((4, 16, 16), 9, np.uint8)
    x[3] = 255
    x[3, :, :5] = 0
    p = write(tmp_path / "a.png", x, driver="PNG")
    with scenes_of(dict(rgb=RGB), dict(rgb=p)).open() as r:
        im, ok = r.read(0, 0, 16, 16)
    assert im["rgb"].shape[0] == 3 and not ok["rgb"][:, :5].any() and ok["rgb"][:, 5:].all()


def test_near_infrared_in_a_channel_called_alpha(tmp_path, rng):
    x = rng.integers(0, 255, (4, 16, 16), dtype=np.uint8)
    x[3, 0] = 0
    p = write(tmp_path / "a.tif", x, photometric="RGB", alpha="YES")
    both = (
        dict(rgb=RGB, nir=dict(preset="nir", gsd=1)),
        dict(rgb=dict(path=p, bands=[1, 2, 3]), nir=dict(path=p, bands=[4])),
    )
    with scenes_of(*both).open() as r:
        im, ok = r.read(0, 0, 16, 16)
    assert np.array_equal(im["nir"], x[3:]) and ok["nir"].all() and ok["rgb"].all()
    fails(["a.tif: band 4", "is it data (near infrared)?", "alpha: false"], dict(rgb=RGB), dict(rgb=p))
    with scenes_of(dict(rgb=RGB), dict(rgb=dict(path=p, bands=[1, 2, 3], alpha=False))).open() as r:
        assert r.read(0, 0, 16, 16)[1]["rgb"].all()


def test_nodata_may_be_corrected(tmp_path):
    x = np.full((3, 8, 8), 7, np.uint8)
    x[:, 0] = 255
    p = write(tmp_path / "a.tif", x, nodata=255)
    ok = lambda **o: (
        SceneReader.__enter__(scenes_of(dict(rgb=RGB), dict(rgb=dict(path=p, **o))).open())
        .read(0, 0, 8, 8)[1]["rgb"]
        .sum()
    )
    assert ok() == 56 and ok(nodata="none") == 64 and ok(nodata=7) == 8


def test_coarse_band_is_not_contaminated_by_nodata(tmp_path):
    z = np.full((1, 8, 8), 10, np.float32)
    z[0, 0, 0] = -3.4e38
    S = scenes_of(
        dict(rgb=RGB, dsm=dict(preset="dsm", gsd=2)),
        dict(
            rgb=write(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8)),
            dsm=write(tmp_path / "z.tif", z, nodata=-3.4e38),
        ),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, 8, 8)
    assert set(np.unique(x["dsm"])) == {0, 10} and ok["dsm"].sum() == 15


# ---------------------------------------------------------------- overrides
def test_wrong_transform_is_overridden(tmp_path, rng):
    "A file whose header says 60 m although it covers the same ground as its 10 m neighbour"
    s2, s1 = rng.integers(100, 4000, (4, 12, 12), dtype=np.uint16), rng.uniform(-20, -5, (2, 12, 12)).astype("f4")
    files = dict(s2=write(tmp_path / "s2.tif", s2, north_up(60)), s1=write(tmp_path / "s1.tif", s1, north_up(10)))
    mods = dict(s2=dict(preset="s2_10m"), s1=dict(preset="s1"))
    fails(["s2.tif", "pixels of 60 m", "modality 's2' says 10 m", "gsd: 10 at the raster"], mods, files)
    fails(["s2.tif", "pixels of 60 m"], mods, files, anchor="s1")
    for o in (dict(gsd=10), dict(georef="ignore"), dict(transform=list(north_up(10))[:6])):
        for anchor in ("s1", "s2"):
            if anchor == "s2" and "georef" in o:
                continue
            with scenes_of(mods, files | dict(s2=dict(path=files["s2"], **o)), anchor=anchor).open() as r:
                x, ok = r.read(0, 0, 12, 12)
                assert np.array_equal(x["s2"], s2) and np.array_equal(x["s1"], s1) and ok["s2"].all() and ok["s1"].all()


def test_crs_override(tmp_path):
    x = np.ones((3, 8, 8), np.uint8)
    S = scenes_of(
        dict(rgb=RGB, nir=dict(preset="nir", gsd=1)),
        dict(
            rgb=write(tmp_path / "a.tif", x),
            nir=dict(path=write(tmp_path / "b.tif", x[:1], crs=None), crs="EPSG:32631"),
        ),
    )
    with S.open() as r:
        assert r.read(0, 0, 8, 8)[1]["nir"].all()


def test_scale_folds_into_the_modality_or_converts(tmp_path):
    im, z = np.ones((3, 8, 8), np.uint8), np.full((1, 8, 8), 50, np.uint8)
    a, h = write(tmp_path / "a.tif", im), write(tmp_path / "h.tif", z)
    rows = lambda *hs: [dict(name=f"s{i}", rasters=dict(rgb=a, dsm=o)) for i, o in enumerate(hs)]
    top = dict(anchor="rgb", modalities=dict(rgb=RGB, dsm=DSM))
    S = load_scenes({**top, "scenes": rows(dict(path=h, scale=0.2), dict(path=h, scale=0.2))})
    with S.open(1) as r:
        assert (
            r.dtypes["dsm"] == np.uint8
            and S.modalities["dsm"].scales == [0.2]
            and (r.read(0, 0, 8, 8)[0]["dsm"] == 50).all()
        )
    S = load_scenes({**top, "scenes": rows(dict(path=h, scale=0.2), h)})
    for i, want in enumerate((10, 50)):
        with S.open(i) as r:
            assert (
                r.dtypes["dsm"] == np.float32
                and np.allclose(r.read(0, 0, 8, 8)[0]["dsm"], want)
                and S.modalities["dsm"].scales == [1]
            )


# ---------------------------------------------------------------- targets
MASK = dict(lc=dict(kind="mask", classes=["water", "field", "wood"]))


def test_targets(tmp_path, rng):
    im, lc, z = (
        np.ones((3, 8, 8), np.uint8),
        rng.integers(0, 3, (1, 8, 8), dtype=np.uint8),
        np.full((1, 4, 4), 7, np.float32),
    )
    lc[0, 0], z[0, 0, 0] = 255, -9999
    S = scenes_of(
        dict(rgb=RGB),
        dict(rgb=write(tmp_path / "a.tif", im)),
        targets={**MASK, "h": dict(kind="regression", unit="metre")} | dict(lc={**MASK["lc"], "nodata": 255}),
        target_files=dict(lc=write(tmp_path / "l.tif", lc), h=write(tmp_path / "h.tif", z, north_up(2), nodata=-9999)),
    )
    with S.open() as r:
        t = r.read_targets(0, 0, 8, 8)
        out = r.read_targets(-4, -4, 8, 8)
    assert np.array_equal(t["lc"], lc[0]) and t["lc"].dtype == np.uint8 and t["h"].dtype == np.float32
    assert np.isnan(t["h"][:2, :2]).all() and (t["h"][4:, 4:] == 7).all()
    assert (out["lc"][:4] == 255).all() and np.isnan(out["h"][:4]).all()


LENGTHS_STORED = [
    (dict(unit="metre"), {}, 25.0),
    (dict(unit="metre", scale=0.2), {}, 5.0),
    (dict(unit="metre"), dict(scale=0.2), 5.0),
    (dict(unit="metre", scale=3.0), dict(scale=0.2), 5.0),  # the file knows better
    (dict(unit="centimetre"), {}, 0.25),
    (dict(unit="cm", scale=20, offset=-100), {}, 4.0),
    (dict(unit="cm"), dict(scale=20), 5.0),
    (dict(unit="dm"), {}, 2.5),
    (dict(unit="ft"), {}, 7.62),
    (dict(unit="kelvin", offset=200.0), {}, 225.0),
]


@pytest.mark.parametrize("spec,file,want", LENGTHS_STORED)
def test_a_target_comes_out_in_metres(tmp_path, spec, file, want):
    "Whatever it was stored in; nodata is a stored value"
    z = np.full((1, 8, 8), 25, np.uint8)
    z[0, 0, 0] = 255
    S = scenes_of(
        dict(rgb=RGB),
        dict(rgb=write(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8))),
        targets=dict(h=dict(kind="regression", nodata=255, **spec)),
        target_files=dict(h=dict(path=write(tmp_path / "h.tif", z), **file)),
    )
    with S.open() as r:
        t = r.read_targets(0, 0, 8, 8)["h"]
    assert S.targets["h"].unit == ("metre" if spec["unit"] != "kelvin" else "kelvin")
    assert np.isnan(t[0, 0]) and np.allclose(t.ravel()[1:], want, atol=1e-5)


def test_a_target_in_no_known_unit(tmp_path):
    files = dict(rgb=write(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8)))
    for spec, words in (
        (dict(unit="furlong"), ["unit of target 'h'", "furlong"]),
        ({}, ["unit of target 'h'"]),
        (dict(unit="centimeters"), ["Did you mean 'centimeter'?"]),
        (dict(unit="cm", scale="0,2"), ["target 'h'", "scale is '0,2'"]),
    ):
        fails(words, dict(rgb=RGB), files, targets=dict(h=dict(kind="regression", **spec)))
    z = write(tmp_path / "h.tif", np.full((1, 8, 8), 40000, np.uint16))  # millimetres that nobody declared
    fails(["h.tif", "target 'h'", "absurd for metre"], dict(rgb=RGB), files, targets=dict(h=dict(kind="regression", unit="metre")), target_files=dict(h=z))


def test_a_target_and_a_modality_of_one_name(tmp_path):
    "Found by a pattern, they stay two things"
    write(tmp_path / "a_rgb.tif", np.ones((3, 8, 8), np.uint8))
    write(tmp_path / "a_h.tif", np.full((1, 8, 8), 7, np.float32))
    S = load_scenes(
        dict(
            anchor="rgb",
            modalities=dict(rgb=RGB, h=dict(preset="ndsm", gsd=1)),
            targets=dict(h=dict(kind="regression", unit="dm")),
            discover=dict(rasters=dict(rgb="{scene}_rgb.tif", h="{scene}_h.tif"), targets=dict(h="{scene}_h.tif")),
        ),
        root=tmp_path,
    )
    with S.open() as r:
        assert (r.read(0, 0, 8, 8)[0]["h"] == 7).all() and np.allclose(r.read_targets(0, 0, 8, 8)["h"], 0.7)


def test_labels_are_never_mixed(tmp_path, rng):
    "Nearest on a finer, a coarser and a shifted label raster: only values that were there"
    for res, n, x0 in ((0.5, 16, X0), (2, 4, X0), (1, 8, X0 - 0.4)):
        lc = rng.choice(np.array([1, 7], np.uint8), (1, n, n))
        S = scenes_of(
            dict(rgb=RGB),
            dict(rgb=write(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8))),
            targets=dict(lc=dict(kind="mask", classes={1: "a", 7: "b"})),
            target_files=dict(lc=write(tmp_path / "l.tif", lc, north_up(res, x0))),
        )
        with S.open() as r:
            t = r.read_targets(0, 0, 8, 8)["lc"]
        assert set(np.unique(t)) <= {0, 1, 255} and (t != 255).mean() > 0.8
        if res == 2:
            assert np.array_equal(t, np.kron((lc[0] == 7), np.ones((2, 2))))


def test_label_outside_the_classes(tmp_path):
    lc = np.zeros((1, 8, 8), np.uint8)
    lc[0, 3, 3] = 9
    files = dict(rgb=write(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8)))
    fails(
        ["l.tif", "target 'lc'", "label values 9", "3 classes", "ignore: [value]"],
        dict(rgb=RGB),
        files,
        targets=MASK,
        target_files=dict(lc=write(tmp_path / "l.tif", lc)),
    )
    S = scenes_of(
        dict(rgb=RGB),
        files,
        targets=dict(lc={**MASK["lc"], "ignore": [9]}),
        target_files=dict(lc=str(tmp_path / "l.tif")),
    )
    with S.open() as r:
        assert r.read_targets(0, 0, 8, 8)["lc"][3, 3] == 255


# ---------------------------------------------------------------- bad input: each names the file, the band and the mend
def one(p, **o):
    return dict(rgb=RGB), dict(rgb=dict(path=str(p), **o))


def test_empty_file(tmp_path):
    (tmp_path / "e.tif").touch()
    fails(["e.tif", "the file is empty", "Fetch it again"], *one(tmp_path / "e.tif"))


def test_missing_file(tmp_path):
    write(tmp_path / "abc.tif", np.ones((3, 4, 4), np.uint8))
    fails(["no such file", "Did you mean 'abc.tif'"], *one(tmp_path / "abd.tif"))


def test_not_a_raster(tmp_path):
    (tmp_path / "t.tif").write_text("hello")
    fails(["t.tif", "GDAL cannot read this", "no raster"], *one(tmp_path / "t.tif"))


@pytest.mark.parametrize("ext, driver", [("tif", "GTiff"), ("png", "PNG"), ("jpg", "JPEG"), ("jp2", "JP2OpenJPEG")])
def test_truncated_file(tmp_path, rng, ext, driver):
    p = Path(write(tmp_path / f"cut.{ext}", rng.integers(0, 255, (3, 300, 300), dtype=np.uint8), driver=driver))
    whole = p.read_bytes()
    for share in (0.6, 0.02):
        p.write_bytes(whole[: int(len(whole) * share)])
        fails([f"cut.{ext}", "damaged"], *one(p))


def test_truncated_netcdf(tmp_path):
    pytest.importorskip("h5py", reason="NetCDF needs h5py")
    xr = pytest.importorskip("xarray")
    p = tmp_path / "c.nc"
    xr.Dataset({"a": (("y", "x"), np.random.default_rng(0).random((300, 300)))}).to_netcdf(p, engine="h5netcdf")
    p.write_bytes(p.read_bytes()[:3000])
    fails(["c.nc", "cannot"], dict(dsm=DSM), dict(dsm=dict(path=str(p), variables=["a"])))


def test_no_projection_where_one_is_needed(tmp_path):
    a, b = (
        write(tmp_path / "a.tif", np.ones((3, 30, 30), np.uint8)),
        write(tmp_path / "b.png", np.ones((1, 20, 30), np.uint8), driver="PNG"),
    )
    fails(
        ["b.png", "no projection is known", "30 x 20", "30 x 30 (a.tif)", "crs: and transform:"],
        dict(rgb=RGB, nir=dict(preset="nir", gsd=1)),
        dict(rgb=a, nir=b),
    )


def test_no_overlap(tmp_path):
    a, b = (
        write(tmp_path / "a.tif", np.ones((3, 30, 30), np.uint8)),
        write(tmp_path / "b.tif", np.ones((1, 30, 30), np.uint8), north_up(1, X0 + 5000)),
    )
    fails(
        ["b.tif", "does not overlap the anchor", "EPSG:32631", "crs: or transform:"],
        dict(rgb=RGB, nir=dict(preset="nir", gsd=1)),
        dict(rgb=a, nir=b),
    )


def test_no_overlap_in_another_projection(tmp_path):
    a, b = (
        write(tmp_path / "a.tif", np.ones((3, 30, 30), np.uint8)),
        write(tmp_path / "b.tif", np.ones((1, 30, 30), np.uint8), north_up(1), "EPSG:32633"),
    )
    fails(["b.tif", "does not overlap"], dict(rgb=RGB, nir=dict(preset="nir", gsd=1)), dict(rgb=a, nir=b))


def test_wrong_band_count(tmp_path):
    p = write(tmp_path / "a.tif", np.ones((5, 8, 8), np.uint8))
    fails(["a.tif", "5 bands for modality 'rgb', which has 3 (red, green, blue)", "bands: [...]"], *one(p))
    fails(["a.tif", "no band 7, only 1 to 5"], *one(p, bands=[1, 2, 7]))


def test_alpha_explains_a_missing_band(tmp_path):
    p = write(tmp_path / "a.tif", np.ones((4, 8, 8), np.uint8), photometric="RGB", alpha="YES")
    fails(
        ["3 bands for modality 'rgbn', which has 4", "alpha band as well"],
        dict(rgbn=dict(preset="rgbn", gsd=1)),
        dict(rgbn=p),
    )


def test_mixed_dtypes(tmp_path):
    files = {
        b: write(tmp_path / f"{b}.tif", np.full((1, 8, 8), 100, t))
        for b, t in zip(("B02", "B03", "B04", "B08"), ("u2", "u2", "f4", "u2"))
    }
    mods = dict(s2=dict(preset="s2_10m", gsd=1))
    fails(
        ["modality 's2' mixes dtypes", "uint16", "float32", "B04.tif", "dtype: float32"],
        mods,
        dict(s2=dict(files=files)),
    )
    with scenes_of(dict(s2=dict(preset="s2_10m", gsd=1, dtype="float32")), dict(s2=dict(files=files))).open() as r:
        assert r.read(0, 0, 8, 8)[0]["s2"].dtype == np.float32 == r.dtypes["s2"]


def test_all_nodata(tmp_path):
    for x, kw in ((np.zeros((3, 700, 700), np.uint8), dict(nodata=0)),):
        p = write(tmp_path / "a.tif", x, **kw)
        fails(["a.tif", "every pixel of modality 'rgb' is nodata", "Leave the scene out"], *one(p))
        x[:, 600, 40] = 5  # a single real pixel, off the sampled windows
        with scenes_of(*one(write(tmp_path / "b.tif", x, **kw))).open() as r:
            assert r.read(600, 40, 1, 1)[1]["rgb"].all()


def test_infinite_values(tmp_path):
    z = np.ones((1, 8, 8), np.float32)
    z[0, 2, 2] = np.inf
    fails(["z.tif", "height", "1 values are infinite", "nodata"], dict(dsm=DSM), dict(dsm=write(tmp_path / "z.tif", z)))


def test_nan_is_nodata(tmp_path):
    z = np.ones((1, 8, 8), np.float32)
    z[0, 2, 2] = np.nan
    with scenes_of(dict(dsm=DSM), dict(dsm=write(tmp_path / "z.tif", z))).open() as r:
        x, ok = r.read(0, 0, 8, 8)
    assert not ok["dsm"][2, 2] and ok["dsm"].sum() == 63 and x["dsm"][0, 2, 2] == 0


@pytest.mark.parametrize(
    "unit, value, words",
    [
        ("metre", -9999, "write nodata: -9999"),
        ("reflectance", 3000, "absurd for reflectance"),
        ("dB", 200, "absurd for dB"),
    ],
)
def test_absurd_values(tmp_path, unit, value, words):
    z = np.full((1, 300, 300), 0.5, np.float32)
    z[0, :, :100] = value
    mods = dict(x=dict(bands=[dict(name="b", unit=unit)], gsd=1, kind="height"))
    fails(["z.tif: b", words, "Correct unit, scale, offset or nodata"], mods, dict(x=write(tmp_path / "z.tif", z)))


def test_absurd_value_far_from_the_samples(tmp_path):
    z = np.full((1, 700, 700), 5, np.float32)
    z[0, 600, 40] = -9999
    S = scenes_of(dict(dsm=DSM), dict(dsm=write(tmp_path / "z.tif", z)))
    with S.open() as r:
        r.read(0, 0, 100, 100)
        with pytest.raises(DataError, match="write nodata: -9999"):
            r.read(512, 0, 188, 188)


def test_file_of_several_bands_names_the_right_one(tmp_path):
    files = {b: write(tmp_path / f"{b}.tif", np.full((1, 8, 8), 100.0, "f4")) for b in ("B02", "B03", "B04", "B08")}
    write(tmp_path / "B04.tif", np.full((1, 8, 8), 1e6, "f4"))
    fails(["B04.tif: B04", "absurd"], dict(s2=dict(preset="s2_10m", gsd=1)), dict(s2=dict(files=files)))


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}\nscens: []",
            ["unknown key in the scene file 'scens'", "Did you mean 'scenes'?"],
        ),
        ("anchor: rbg\nmodalities: {rgb: {preset: rgb, gsd: 1}}", ["unknown anchor 'rbg'", "Did you mean 'rgb'?"]),
        ("anchor: rgb\nmodalities: {rgb: {preset: rgbb, gsd: 1}}", ["unknown preset", "Did you mean 'rgb'?"]),
        ("anchor: rgb\nmodalities: {rgb: {preset: rgb}}", ["modality 'rgb' does not say its gsd"]),
        (
            "anchor: x\nmodalities: {x: {bands: [{name: a, unit: meter}], gsd: 1, kind: height}}",
            ["unknown unit 'meter'", "Did you mean 'metre'?"],
        ),
        ("anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}", ["no scene was described or found"]),
        (
            "anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}\nscenes: [{name: a, rasters: {rgb: a.tif}}, {name: a, rasters: {rgb: b.tif}}]",
            ["scene names must be unique", ": a"],
        ),
        (
            "anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}\nscenes: [{name: a, rasters: {rgb: {path: a.tif, nodta: 0}}}]",
            ["Did you mean 'nodata'?"],
        ),
        (
            "anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}\nscenes: [{name: a, rasters: {rbg: a.tif}}]",
            ["unknown modality of scene 'a' 'rbg'"],
        ),
        (
            "anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}\nclasses: [wood]\nscenes: [{name: a, label: wod, rasters: {rgb: a.tif}}]",
            ["label of scene 'a'", "Did you mean 'wood'?"],
        ),
        (
            "anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}, dsm: {preset: dsm, gsd: 0.5}}\nscenes: [{name: a, rasters: {rgb: a.tif}}]",
            ["is finer than the anchor", "Write anchor: dsm"],
        ),
        (
            "anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 0.6}, s2: {preset: s2_10m}}\nscenes: [{name: a, rasters: {rgb: a.tif}}]",
            ["16.67 pixels of the anchor", "gsd: 9.6 or gsd: 10.2"],
        ),
        (
            'anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}\ndiscover: {pattern: "{scene}.tif"}',
            ["no file matches"],
        ),
        (
            'anchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}\ndiscover: {root: nowhere, pattern: "{scene}.tif"}',
            ["this folder does not exist"],
        ),
        ("a: [1", ["this is not YAML"]),
        ("version: 7", ["version 7"]),
    ],
)
def test_scene_file_mistakes(tmp_path, text, words):
    (tmp_path / "scenes.yaml").write_text(text)
    with pytest.raises(DataError) as e:
        load_scenes(tmp_path / "scenes.yaml")
    for w in words + ([] if "discover" in text else ["scenes.yaml"]):
        assert w in str(e.value)


def test_two_files_for_one_scene(tmp_path):
    for c in "ab":
        write(tmp_path / c / "1.tif", np.ones((3, 4, 4), np.uint8))
    d = dict(anchor="rgb", modalities=dict(rgb=RGB), discover=dict(pattern="{label}/{scene}.tif"))
    with pytest.raises(DataError, match="two files for rgb of scene"):
        load_scenes(d, tmp_path)
    d["discover"]["scene"] = "{label}_{scene}"
    assert [s.name for s in load_scenes(d, tmp_path)] == ["a_1", "b_1"]


def test_errors_leave_no_file_open(tmp_path):
    S = scenes_of(*one(write(tmp_path / "a.tif", np.zeros((3, 8, 8), np.uint8), nodata=0)))
    r = S.open()
    with pytest.raises(DataError):
        r.__enter__()
    assert not r._handles


# ---------------------------------------------------------------- cubes
@pytest.fixture
def cube():
    xr = pytest.importorskip("xarray")
    v = np.random.default_rng(0).integers(100, 3000, (3, 2, 8, 10)).astype("i2")
    y, x = Y0 - 5 - 10 * np.arange(8), X0 + 5 + 10 * np.arange(10)
    ds = xr.Dataset(
        {b: (("t", "y", "x"), v[:, i]) for i, b in enumerate(("B02", "B03"))},
        dict(t=[0, 1, 2], y=y, x=x),
        dict(crs="EPSG:32631"),
    )
    ds["B02"].attrs["_FillValue"] = np.int16(-1)
    ds["B02"][1, 0, 0] = -1
    return ds, v


@pytest.mark.parametrize("kind", ["nc", "zarr", "south_up"])
def test_cube(tmp_path, cube, kind):
    ds, v = cube
    if kind == "zarr":
        p = tmp_path / "c.zarr"
        pytest.importorskip("zarr")
        ds.to_zarr(p)
    else:
        pytest.importorskip("h5py", reason="NetCDF needs h5py")
        p = tmp_path / "c.nc"
        (ds.isel(y=slice(None, None, -1)) if kind == "south_up" else ds).to_netcdf(p, engine="h5netcdf")
    mods = dict(s2=dict(preset="s2_10m", bands=["B02", "B03"]))
    S = scenes_of(mods, dict(s2=dict(path=str(p), variables=["B02", "B03"], select=dict(t=1))))
    with S.open() as r:
        assert r.transform == north_up(10) and r.crs == CRS.from_epsg(32631) and (r.height, r.width) == (8, 10)
        x, ok = r.read(0, 0, 8, 10)
        part = r.read(2, 3, 4, 5)[0]["s2"]
    assert (
        not ok["s2"][0, 0]
        and ok["s2"].sum() == 79
        and np.array_equal(x["s2"][:, 1:], v[1, :, 1:])
        and np.array_equal(part, v[1, :, 2:6, 3:8])
    )
    fails(["dimension t has 3 entries", "select: {t: 0}"], mods, dict(s2=dict(path=str(p), variables=["B02", "B03"])))
    fails("Did you mean 'B03'?", mods, dict(s2=dict(path=str(p), variables=["B02", "B30"], select=dict(t=1))))


# ---------------------------------------------------------------- other formats
@pytest.mark.parametrize("driver, kw", [("COG", {}), ("JP2OpenJPEG", dict(QUALITY=100, REVERSIBLE="YES"))])
def test_formats(tmp_path, rng, driver, kw):
    x = rng.integers(0, 255, (3, 64, 64), dtype=np.uint8)
    p = write(tmp_path / ("a.jp2" if driver.startswith("JP2") else "a.tif"), x, driver=driver, **kw)
    with scenes_of(dict(rgb=RGB), dict(rgb=p)).open() as r:
        assert np.array_equal(r.read(0, 0, 64, 64)[0]["rgb"], x) and r.transform == north_up(1)


def test_vrt(tmp_path, rng):
    x = rng.integers(0, 255, (3, 16, 16), dtype=np.uint8)
    src = write(tmp_path / "a.tif", x)
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{i}"><SimpleSource><SourceFilename>{src}</SourceFilename>'
        f'<SourceBand>{b}</SourceBand></SimpleSource></VRTRasterBand>'
        for i, b in enumerate((3, 2, 1), 1)
    )
    (tmp_path / "a.vrt").write_text(
        f'<VRTDataset rasterXSize="16" rasterYSize="16"><SRS>EPSG:32631</SRS><GeoTransform>{X0},1,0,{Y0},0,-1</GeoTransform>{bands}</VRTDataset>'
    )
    with scenes_of(dict(rgb=RGB), dict(rgb=str(tmp_path / "a.vrt"))).open() as r:
        assert np.array_equal(r.read(0, 0, 16, 16)[0]["rgb"], x[::-1])


# ---------------------------------------------------------------- by hand, without YAML
def test_scenes_by_hand(tmp_path):
    p = write(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8))
    S = Scenes({"rgb": preset("rgb", 1)}, [Scene("a", {"rgb": [RasterFile(p)]})], "rgb")
    with SceneReader(S[0], S) as r:
        assert r.read(0, 0, 8, 8)[1]["rgb"].all()


def test_root_and_environment(tmp_path, monkeypatch):
    write(tmp_path / "d/a.tif", np.ones((3, 8, 8), np.uint8))
    (tmp_path / "s.yaml").write_text(
        'root: ${NOT_SET:-d}\nanchor: rgb\nmodalities: {rgb: {preset: rgb, gsd: 1}}\ndiscover: {pattern: "{scene}.tif"}'
    )
    assert len(load_scenes(tmp_path / "s.yaml")) == 1 == len(load_scenes(tmp_path / "s.yaml", root=tmp_path / "d"))
    monkeypatch.setenv("NOT_SET", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        load_scenes(tmp_path / "s.yaml")


# ---------------------------------------------------------------- real files
RECIPES = sorted((ROOT / "data_recipes/scenes").glob("*.yaml"))
HOW = dict(
    naip_rgbn=dict(rgb="plain", nir="plain"),
    neon_rgb_chm=dict(rgb="plain", chm="plain"),
    bigearthnet_s1s2=dict(s2="plain", s1="plain"),
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe(recipe, monkeypatch):
    if not DATA.is_dir():
        pytest.skip("the sample data is not here (RS_SELFSUP_DATA)")
    monkeypatch.setenv("RS_SELFSUP_DATA", str(DATA.resolve()))
    S = load_scenes(recipe)
    assert len(S) >= 2
    for s in S.scenes[:3]:
        with SceneReader(s, S) as r:
            n = max(r.factors.values())
            x, ok = r.read(0, 0, r.height // n * n, r.width // n * n)
            r.read_targets(0, 0, n, n)
            assert set(x) == set(S.modalities) and all(o.mean() > 0.95 for o in ok.values())
            if recipe.stem in HOW:
                assert {m: l[0].how for m, l in r.layers.items()} == HOW[recipe.stem]


def real(path):
    if not (DATA / path).exists():
        pytest.skip("the sample data is not here (RS_SELFSUP_DATA)")
    return str(DATA / path)


def test_real_years_of_a_place_share_a_group():
    real("naip_rgbn")
    S = load_scenes(ROOT / "data_recipes/scenes/naip_rgbn.yaml", root=DATA / "naip_rgbn")
    assert S["chico_2018_3"].group == S["chico_2020_3"].group == "chico_3" and len({s.group for s in S}) == 106


def test_real_collar():
    S = scenes_of(
        dict(rgb=dict(preset="rgb", gsd=300)), dict(rgb=real("georeferenced/rasterio/tests/data/RGB.byte.tif"))
    )
    with S.open() as r:
        ok = r.read(0, 0, r.height, r.width)[1]["rgb"]
        with rasterio.open(S[0].rasters["rgb"][0].path) as f:
            want = f.dataset_mask() > 0
    assert np.array_equal(ok, want) and 0.5 < ok.mean() < 0.8


def test_real_cube():
    pytest.importorskip("h5py", reason="NetCDF needs h5py")
    p = real("worldcereal_cube/worldcereal_preprocessed_inputs.nc")
    names = [f"S2-L2A-{b}" for b in ("B02", "B03", "B04", "B08")]
    S = scenes_of(
        dict(s2=dict(preset="s2_10m"), dem=dict(bands=[dict(name="elevation", unit="metre")], gsd=10, kind="height")),
        dict(
            s2=dict(path=p, variables=names, select=dict(t=3)),
            dem=dict(path=p, variables=["elevation"], select=dict(t="2021-02-01")),
        ),
    )
    with S.open() as r:
        x, ok = r.read(0, 0, 100, 100)
        assert (
            r.crs == CRS.from_epsg(32631)
            and r.transform.a == 10
            and x["s2"].dtype == np.uint16
            and ok["s2"].mean() > 0.9
            and len(r._handles) == 1
        )


def test_real_aerial_tile_calls_near_infrared_alpha():
    p = real("treesat_aerial_s1_s2/tests/data/aerial/Betula_spec._1_15679_WEFL_NLF.tif")
    with scenes_of(dict(rgbn=dict(preset="rgbn", gsd=0.2)), dict(rgbn=dict(path=p, bands=[1, 2, 3, 4]))).open() as r:
        assert r.read(0, 0, 304, 304)[1]["rgbn"].all()
    fails(["alpha", "near infrared"], dict(rgb=dict(preset="rgb", gsd=0.2)), dict(rgb=p))


def test_real_cube_without_projection_matches_by_ground():
    "NEON's 426 band cube declares no projection, its transform is the image's"
    S = scenes_of(
        dict(rgb=dict(preset="rgb", gsd=0.1), hs=dict(bands=[dict(name="b", unit="DN")], gsd=1, kind="optical")),
        dict(
            rgb=real("neon_rgb_chm/evaluation/RGB/SJER_052.tif"),
            hs=dict(path=real("neon_rgb_chm/evaluation/Hyperspectral/SJER_052_hyperspectral.tif"), bands=[60]),
        ),
    )
    with S.open() as r:
        assert r.layers["hs"][0].how == "plain" and r.read(0, 0, 400, 400)[1]["hs"].mean() > 0.95


# ---------------------------------------------------------------- finding scenes
@pytest.mark.parametrize('pattern', ['{scene}/{modality}.tif', '{modality}/{scene}.tif', '{scene}_{modality}.tif'])
def test_discover_by_modality(tmp_path, pattern):
    for s in ('a', 'b'):
        for m, n in (('rgb', 3), ('nir', 1)):
            write(tmp_path / pattern.format(scene=s, modality=m), np.full((n, 4, 4), 9, np.uint8))
    d = dict(anchor='rgb', modalities=dict(rgb=RGB, nir=dict(preset='nir', gsd=1)), discover=dict(pattern=pattern))
    S = load_scenes(d, tmp_path)
    assert [s.name for s in S] == ['a', 'b'] and set(S['b'].rasters) == {'rgb', 'nir'}
    with S.open('b') as r:
        assert r.read(0, 0, 4, 4)[1]['nir'].all()


def test_discover_by_band(tmp_path):
    for i, b in enumerate(('B02', 'B03', 'B04', 'B08')):
        write(tmp_path / f'x/x_{b}.tif', np.full((1, 4, 4), 100 + i, np.uint16), north_up(10))
    d = dict(anchor='s2', modalities=dict(s2='s2_10m'), discover=dict(pattern='{scene}/{scene}_{band}.tif'))
    with load_scenes(d, tmp_path).open('x') as r:
        assert r.read(0, 0, 4, 4)[0]['s2'][:, 0, 0].tolist() == [100, 101, 102, 103]
    (tmp_path / 'x/x_B03.tif').rename(tmp_path / 'x_B03.tif')
    with pytest.raises(DataError, match='B03'):
        load_scenes(d, tmp_path)


def test_a_folder_without_one_band(tmp_path):
    for s, bands in (('x', 'B02 B03 B04 B08'), ('y', 'B02 B04 B08')):
        for b in bands.split():
            write(tmp_path / f'{s}/{b}.tif', np.full((1, 4, 4), 100, np.uint16), north_up(10))
    d = dict(anchor='s2', modalities=dict(s2='s2_10m'), discover=dict(pattern='{scene}/{band}.tif'))
    with pytest.raises(DataError, match="scene 'y' has no file for B03"):
        load_scenes(d, tmp_path)


def test_coarser_files_of_different_phase(tmp_path):
    "The start that suits the coarsest wins, the others are warped"
    rgb = write(tmp_path / 'a.tif', np.ones((3, 40, 40), np.uint8))
    dsm = write(tmp_path / 'd.tif', np.ones((1, 6, 6), np.float32), north_up(8, X0 + 3, Y0 - 3))
    nir = write(tmp_path / 'n.tif', np.ones((1, 20, 20), np.uint8), north_up(2))
    mods = dict(rgb=RGB, dsm=dict(preset='dsm', gsd=8), nir=dict(preset='nir', gsd=2))
    with scenes_of(mods, dict(rgb=rgb, dsm=dsm, nir=nir)).open() as r:
        assert {m: ls[0].how for m, ls in r.layers.items()} == dict(rgb='plain', dsm='plain', nir='warp')
        assert r.transform == north_up(1, X0 + 3, Y0 - 3)


def test_two_readers_close_in_any_order(tmp_path):
    S = scenes_of(dict(rgb=RGB), dict(rgb=write(tmp_path / 'a.tif', np.ones((3, 8, 8), np.uint8))))
    a, b = S.open().__enter__(), S.open().__enter__()
    a.close()
    assert b.read(0, 0, 8, 8)[1]['rgb'].all()
    b.close()


def test_real_radar_bands_are_in_the_order_their_names_say(real_data):
    "Like-polarised backscatter is stronger than cross-polarised: by 5 to 15 dB on these samples."
    scenes = load_scenes(Path(__file__).parents[1] / "data_recipes/scenes/bigearthnet_s1s2.yaml")
    assert scenes.modalities["s1"].band_names == ["VV", "VH"]
    for scene in scenes.scenes:
        with SceneReader(scene, scenes) as r:
            images, valid = r.read(0, 0, r.height, r.width)
        vv, vh = images["s1"][:, np.squeeze(valid["s1"])].mean(1)
        assert vv > vh + 3
