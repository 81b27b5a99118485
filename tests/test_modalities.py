"What a band is, and the messages for what it is not"

import json, pickle
import numpy as np, pytest, yaml
from hypothesis import given, settings, strategies as st
from rs_selfsup.modalities import Band, DataError, Modality, PRESETS, UNITS, band_from, check_values, preset, unit


def test_error_message_has_file_band_problem_and_mend():
    e = DataError("is empty", file="a.tif", band="B02", fix="Fetch it again.")
    assert str(e) == "a.tif: B02: is empty. Fetch it again." and isinstance(e, ValueError)
    assert str(DataError("is empty")) == "is empty"
    back = pickle.loads(pickle.dumps(e))
    assert str(back) == str(e) and (back.file, back.band, back.problem, back.fix) == (
        "a.tif",
        "B02",
        "is empty",
        "Fetch it again.",
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: preset("rbg"), ["unknown preset 'rbg'", "Did you mean 'rgb'?"]),
        (lambda: unit("meter"), ["Did you mean 'metre'?"]),
        (lambda: unit("furlong"), ["Known: DN8"]),
        (lambda: Band("a", "Reflectance"), ["Did you mean 'reflectance'?"]),
        (lambda: Band("a", "metre", scale=0), ["scale of 0"]),
        (lambda: band_from({"name": "a", "unit": "metre", "nodta": 0}), ["Did you mean 'nodata'?"]),
        (lambda: band_from({"name": "a"}), ["has no 'unit'"]),
        (lambda: band_from("red"), ["a band must be written as"]),
        (lambda: Modality("m", (), 1, "height"), ["has no band"]),
        (lambda: preset("rgb").replace(kind="rgb"), ["unknown kind of modality"]),
        (lambda: preset("rgb").select(["grey"]), ["unknown band 'grey'"]),
        (lambda: Modality.from_dict(dict(name="a", band=[], gsd=1, kind="sar")), ["Did you mean 'bands'?"]),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(DataError) as e:
        make()
    for w in words:
        assert w in str(e.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_yaml(name):
    m = preset(name)
    assert (
        Modality.from_dict(json.loads(json.dumps(m.to_dict())))
        == m
        == Modality.from_dict(yaml.safe_load(yaml.safe_dump(m.to_dict())))
    )
    assert m.n_bands == len(m.band_names) == len(m.units) == len(m.scales) == len(m.offsets) and m.name == name
    assert pickle.loads(pickle.dumps(m)) == m and hash(m) == hash(preset(name))


def test_presets_are_what_they_say():
    assert (
        preset("s2_l2a").n_bands == 12 and "B10" not in preset("s2_l2a").band_names and preset("s2_l1c").n_bands == 13
    )
    assert {n for k in ("s2_10m", "s2_20m", "s2_60m") for n in preset(k).band_names} == set(preset("s2_l2a").band_names)
    assert [preset(k).gsd for k in ("s2_10m", "s2_20m", "s2_60m", "landsat8")] == [10, 20, 60, 30]
    assert preset("rgb", 0.5).gsd == 0.5 and preset("chm").kind == "height" and preset("s1").units == ["dB", "dB"]


def test_rgb_is_found_by_name_wavelength_or_not_at_all():
    names = lambda k: [preset(k).band_names[i] for i in preset(k).rgb]
    assert (
        names("rgbn") == ["red", "green", "blue"]
        and names("s2_l1c") == ["B04", "B03", "B02"]
        and names("landsat8") == ["B4", "B3", "B2"]
    )
    assert (
        preset("nir").rgb is None
        and preset("s1").rgb is None
        and preset("dsm").rgb is None
        and len(set(preset("s2_20m").rgb)) == 3
    )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(UNITS)), st.integers(0, 2**32 - 1))
def test_values_inside_the_limits_pass(name, seed):
    u, b = UNITS[name], Band("b", name)
    v = np.random.default_rng(seed).uniform(u.lo, u.hi, 200)
    v[0] = u.lo  # so that dB has a negative one
    check_values(np.rint(v) if name in ("DN8", "DN", "reflectance_1e4") else v, None, b)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(UNITS)), st.sampled_from([1e30, -1e30, np.inf, -np.inf, np.nan]), st.integers(0, 199))
def test_one_impossible_value_is_enough_unless_invalid(name, value, at):
    u, b = UNITS[name], Band("b", name)
    v, ok = np.linspace(u.lo, u.hi, 200), np.ones(200, bool)
    v[at], ok[at] = value, False
    with pytest.raises(DataError):
        check_values(v, None, b)
    if name not in ("DN8", "DN", "reflectance_1e4") and at:
        check_values(v, ok, b)


def test_reflectance_declared_in_the_wrong_unit():
    "The commonest silent failure: three input scales that all train"
    r = np.random.default_rng(0).uniform(0.01, 0.5, 1000)
    check_values(r, None, Band("b", "reflectance"))
    check_values(r * 1e4, None, Band("b", "reflectance_1e4"))
    check_values(np.rint(r * 255), None, Band("b", "DN8"))
    for v, u in (
        (r * 1e4, "reflectance"),
        (r * 255, "reflectance"),
        (r, "reflectance_1e4"),
        (r, "DN8"),
        (r * 1e4, "DN8"),
    ):
        with pytest.raises(DataError, match="absurd"):
            check_values(v, None, Band("b", u))


def test_clouds_are_no_error_but_undeclared_nodata_is():
    v = np.full(1000, 800.0)
    v[:150] = 17000
    check_values(v, None, Band("b", "reflectance_1e4"))
    with pytest.raises(DataError, match="write nodata: -9999"):
        check_values(np.array([1.0, -9999]), None, Band("h", "metre"))
    with pytest.raises(DataError, match="nodata: -32768"):
        check_values(np.array([1.0, -32768]), None, Band("h", "metre"))


def test_scaled_bands_are_checked_in_their_unit():
    b = preset("landsat8").bands[0]
    check_values(b.physical(np.array([7273, 20000, 43636])), None, b)
    with pytest.raises(DataError):
        check_values(b.physical(np.array([65535] * 10)).repeat(10) * 10, None, b)


def test_valid_mask_broadcasts_and_empty_is_fine():
    check_values(np.zeros((3, 4, 4)), np.zeros((4, 4), bool), Band("b", "kelvin"))
    check_values(np.zeros((0,)), None, Band("b", "kelvin"))
