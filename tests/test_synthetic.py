"The embedded scenes: same bytes, complete files, labels that agree with the pixels, no short cut through colour."
import json

import numpy as np
import pytest
import rasterio
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_selfsup.data.synthetic import (CLASSES, COVER, FROM_TO, GSD, LAND_COVER, MODALITIES, NODATA, PX, TARGETS,
                                       Building, deal, make_scene, rng_for, spectrum, sunlit, write_scenes)
from rs_selfsup.modalities import DataError


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def scene(): return make_scene((0, 0), 128, collars=0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('synth')
    return write_scenes(out, 2, 96, modalities=tuple(GSD), collars=1., progress=False).parent


def test_same_bytes_whatever_the_processes(folder, tmp_path):
    write_scenes(tmp_path, 2, 96, modalities=tuple(GSD), workers=2, collars=1., progress=False)
    assert content(tmp_path) == content(folder)


def test_a_sensor_does_not_depend_on_the_others(scene):
    alone = make_scene((0, 0), 128, ('sar',), collars=0)
    np.testing.assert_array_equal(alone['sar'], scene['sar'])
    assert not np.array_equal(make_scene((0, 1), 128, ('rgb',), collars=0)['rgb'], scene['rgb'])


def test_complete_scenes_are_kept_and_incomplete_ones_made_again(folder, tmp_path):
    args = dict(modalities=('rgb', 'dsm'), progress=False)
    write_scenes(tmp_path, 2, 64, **args)
    want, kept = content(tmp_path), (tmp_path/'scene_00/rgb.tif').stat().st_mtime_ns
    (tmp_path/'scene_01').rename(tmp_path/'.scene_01.part')     # as a killed run leaves it
    (tmp_path/'.scene_01.part/rgb.tif').write_bytes(b'cut')
    write_scenes(tmp_path, 2, 64, **args)
    assert content(tmp_path) == want and (tmp_path/'scene_00/rgb.tif').stat().st_mtime_ns == kept
    write_scenes(tmp_path, 2, 64, seed=1, **args)
    assert content(tmp_path)['scene_00/rgb.tif'] != want['scene_00/rgb.tif']


def test_files_declare_crs_grid_and_nodata(folder):
    doc = yaml.safe_load((folder/'scenes.yaml').read_text())
    assert doc['anchor'] == 'rgb' and doc['tile_label'] == 'tile_class' and list(doc['modalities']) == list(GSD)
    for s in doc['scenes']:
        for m, path in s['rasters'].items():
            with rasterio.open(folder/path) as f:
                assert f.crs.to_epsg() == 32631 and f.res == (GSD[m], GSD[m]) and f.nodata == NODATA[m]
                assert f.count == len(MODALITIES[m].get('bands') or {'rgb': 'rgb', 'dsm': 'z'}[MODALITIES[m]['preset']])
                assert f.bounds.left == pytest.approx(400000 + 196*int(s['name'][-1]))
                assert f.bounds.right - f.bounds.left >= 96
                values = f.read(masked=True)
                if m not in ('ms10',): assert 0 < values.mask.mean() < .6
                assert np.isfinite(values.compressed()).all()
        for t, path in s['targets'].items():
            if t == 'buildings': continue                           # a list, see tests/test_boxes.py
            with rasterio.open(folder/path) as f:
                assert f.shape == (192, 192)
                if TARGETS[t]['kind'] == 'mask': assert f.read(1).max() < len(TARGETS[t]['classes'])


def test_reads_as_scenes(folder):
    rasters = pytest.importorskip('rs_selfsup.data.rasters')
    scenes = rasters.load_scenes(folder/'scenes.yaml')
    assert list(scenes.modalities) == list(GSD) and scenes.classes == list(CLASSES) and len(scenes.scenes) == 2


def test_ms10_covers_a_side_that_is_no_multiple_of_ten(scene):
    assert [scene[m].shape for m in ('ms10', 'rgb', 'ms2')] == [(10, 13, 13), (3, 256, 256), (8, 64, 64)]


def test_labels_agree(scene):
    change, from_to, cover = scene['change'], scene['from_to'], scene['landcover']
    np.testing.assert_array_equal(change == 1, from_to > 0)
    names = list(FROM_TO)
    for i in (3, 4): assert (cover[from_to == i] == COVER['building']).all(), names[i]
    for i in (1, 2): assert (cover[from_to == i] != COVER['building']).all(), names[i]
    assert (scene['height'][cover == COVER['water']] == 0).all()
    assert (scene['height'][cover == COVER['building']] > 2).all()


def test_boxes_lie_on_buildings():
    s = make_scene((3, 0), 256, ('rgb',), collars=0)
    there = [b for b in s['buildings'] if b.first and all(0 < v < 256 for v in (b.x, b.y))]
    assert len(there) > 8
    on = [s['landcover'][int(b.y/PX), int(b.x/PX)] == COVER['building'] for b in there]
    gone = [s['landcover'][int(b.y/PX), int(b.x/PX)] != COVER['building'] for b in s['buildings'] if not b.first]
    assert np.mean(on) == 1 and np.mean(gone or [1]) > .9


def test_geojson_holds_both_boxes(folder):
    features = [f for i in (0, 1) for f in json.loads((folder/f'scene_0{i}/buildings.geojson').read_text())['features']]
    assert features
    for f in features:
        xs, ys = np.array(f['geometry']['coordinates'][0]).T
        assert f['bbox'] == [xs.min(), ys.min(), xs.max(), ys.max()] and len(f['properties']['box']) == 5


@pytest.mark.parametrize('kw,word', [(dict(size_m=100.5), 'multiple of 2'), (dict(size_m=8), 'at least 32'),
                                     (dict(modalities=('rgb', 'swir')), 'swir')])
def test_bad_scene(kw, word):
    with pytest.raises(DataError, match=word): make_scene(0, **kw)


@pytest.mark.parametrize('kw,word', [(dict(n_scenes=0), 'n_scenes'), (dict(modalities=('dsm',)), 'anchor')])
def test_bad_request(kw, word, tmp_path):
    with pytest.raises(DataError, match=word): write_scenes(tmp_path, **kw)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 6.3), st.floats(2, 30), st.floats(2, 30), st.sampled_from(['gable', 'hip', 'saw', 'flat']))
def test_building_geometry(angle, length, width, roof):
    b = Building(50., 60., length, width, angle, 3., 2., roof, {'tiles': 1.}, 1., 'house')
    c = b.corners()
    np.testing.assert_allclose(c.mean(0), [50, 60], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(np.roll(c, -1, 0) - c, axis=1), [length, width]*2, rtol=1e-6)
    u, v = np.meshgrid(np.linspace(-length/2, length/2, 9), np.linspace(-width/2, width/2, 9))
    assert 3 - 1e-6 <= b.top(u, v).min() and b.top(u, v).max() <= 5 + 1e-6


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 6.28), st.floats(.5, 1.2))
def test_shadow_has_the_length_of_trigonometry(azimuth, elevation):
    z = np.zeros((96, 96), np.float32); z[48, 48] = 8
    r, c = np.nonzero(sunlit(z, azimuth, elevation) < .5)
    far = np.hypot(r - 48, c - 48).max()*PX if len(r) else 0
    assert abs(far - 8/np.tan(elevation)) < 1.6
    if far > 3: assert np.dot((c.mean() - 48, r.mean() - 48), (np.sin(azimuth), -np.cos(azimuth))) < 0


@given(st.integers(1, 40), st.integers(0, 99))
def test_classes_are_dealt_evenly(count, seed):
    n = [deal(rng_for(seed), count).count(k) for k in CLASSES]
    assert sum(n) == count and max(n) - min(n) <= 1


def test_spectra():
    assert len(LAND_COVER) == 7 and len(CLASSES) == 8
    for k in ('grass', 'soil', 'turbid'): assert (0 < spectrum(k)).all() and (spectrum(k) < .7).all()
    assert spectrum('grass')[9] > 5*spectrum('grass')[5] and spectrum('clear')[9] < spectrum('clear')[5]


def test_band_statistics_do_not_solve_the_label():
    linear = pytest.importorskip('sklearn.linear_model')
    from sklearn.metrics import balanced_accuracy_score
    def tiles(seeds, t=32):
        xs, ys = [], []
        for i in seeds:
            s = make_scene((1, i), 256, ('rgb', 'dsm'), collars=0)
            x = np.concatenate([s['rgb'].astype(np.float32), s['dsm']])
            x = x.reshape(4, 16, t, 16, t).transpose(1, 3, 0, 2, 4).reshape(256, 4, -1)
            y = s['tile_class'].reshape(16, t, 16, t).transpose(0, 2, 1, 3).reshape(256, -1)
            n = np.array([np.bincount(k, minlength=8) for k in y]); ok = n.max(1) >= .6*t*t
            xs.append(np.concatenate([x.mean(2), x.std(2)], 1)[ok]); ys.append(n.argmax(1)[ok])
        return np.concatenate(xs), np.concatenate(ys)
    (a, ya), (b, yb) = tiles(range(8)), tiles(range(100, 104))
    mean, std = a.mean(0), a.std(0)
    guess = linear.LogisticRegression(C=10, max_iter=500).fit((a - mean)/std, ya).predict((b - mean)/std)
    assert .25 < balanced_accuracy_score(yb, guess) < .6


def test_smallest_scene_under_a_low_sun():
    "Shadows longer than the scene end with it"
    for i in (0, 9):
        assert make_scene((8, i), 32, ("rgb",), collars=0)["rgb"].shape == (3, 64, 64)
