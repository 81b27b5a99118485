"Pictures of any modality: right range, right values, invalid pixels visible and without influence"

import subprocess, sys
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from rs_selfsup.modalities import Band, DataError, Modality, preset
from rs_selfsup.show import hillshade, show_modalities, to_rgb


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["optical", "sar", "height"]),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 999),
)
def test_always_a_picture(kind, bands, h, w, seed):
    rng = np.random.default_rng(seed)
    m = Modality("m", tuple(Band(f"b{i}", "DN") for i in range(bands)), 1, kind)
    x, ok = rng.normal(0, 1e4, (bands, h, w)), rng.random((h, w)) < 0.7
    x[0, 0, 0] = np.nan
    pic = to_rgb(x, m, ok)
    assert (
        pic.shape == (h, w, 3)
        and pic.dtype == np.float32
        and np.isfinite(pic).all()
        and pic.min() >= 0
        and pic.max() <= 1
    )


@pytest.mark.parametrize("name", ["rgb", "nir", "s2_l2a", "s2_20m", "s2_60m", "s1", "dsm"])
def test_invalid_values_have_no_influence(name):
    rng, m = np.random.default_rng(0), preset(name)
    x = rng.uniform(1, 60, (m.n_bands, 32, 32))
    ok = np.ones((32, 32), bool)
    ok[:8] = False
    a, b = (to_rgb(np.where(ok, x, v), m, ok) for v in (0, -9999))
    assert np.array_equal(a, b) and not np.array_equal(a[:8], to_rgb(x, m)[:8])


def test_eight_bit_as_stored():
    x = np.random.default_rng(0).integers(0, 256, (3, 9, 9)).astype(np.uint8)
    assert np.allclose(to_rgb(x, preset("rgb")), np.moveaxis(x, 0, -1) / 255, atol=1e-6)


def test_limits_make_pictures_comparable():
    m = preset("s2_10m")
    a, b = np.full((4, 4, 4), 1000.0), np.full((4, 4, 4), 2000.0)
    pa, pb = (to_rgb(v, m, limits=(0, 4000)) for v in (a, b))
    assert np.allclose(pa, 0.25) and np.allclose(pb, 0.5)
    assert np.allclose(to_rgb(a, m, limits=((0, 0, 0), (1000, 2000, 4000)))[0, 0], (1, 0.5, 0.25))


def test_wrong_band_count():
    with pytest.raises(DataError, match=r"not \(3, H, W\)"):
        to_rgb(np.zeros((4, 8, 8)), preset("rgb"))


def test_hillshade_is_lambert():
    ramp = np.arange(9.0)[None].repeat(9, 0)
    for az in (0, 90, 200, 315):
        n = np.array([-1, 0, 1]) / np.sqrt(2)  # rises to the east: the normal leans west
        sun = np.array(
            [np.cos(np.pi / 4) * np.sin(np.radians(az)), np.cos(np.pi / 4) * np.cos(np.radians(az)), np.sin(np.pi / 4)]
        )
        assert np.isclose(hillshade(ramp, azimuth=az)[4, 4], max(0, n @ sun), atol=1e-5)
    north = hillshade(-np.arange(9.0)[:, None].repeat(9, 1), azimuth=180)  # falls to the south: faces it
    assert np.isclose(north[4, 4], 1, atol=1e-5)


def test_show_needs_no_matplotlib_until_it_draws():
    code = (
        'import sys, rs_selfsup.show, numpy as np; from rs_selfsup.modalities import preset; '
        'rs_selfsup.show.to_rgb(np.zeros((1, 4, 4)), preset("dsm")); assert "matplotlib" not in sys.modules'
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_side_by_side():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    mods = {k: preset(k) for k in ("rgb", "s1", "dsm")}
    images = {k: np.random.default_rng(0).uniform(0, 9, (m.n_bands, 8, 8)) for k, m in mods.items()}
    axs = show_modalities(images, mods, {"rgb": np.ones((1, 8, 8), bool)}, title="x")
    assert len(axs) == 3 and axs[0].get_title() == "x  rgb" and len(axs[1].images) == 1
    plt.close("all")
