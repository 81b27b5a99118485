"CMID: one test per defect of the published code that applies here, and the promises of the page."

import dataclasses
import math

import pytest
import toy_pretrain as toy
import torch
from toy_ground import NoSync
from torch.nn import functional as F

from rs_selfsup.backbones import create_encoder
from rs_selfsup.data.augment import Batch, Normalize
from rs_selfsup.data.views import View, Window, cell_centres, draw_window
from rs_selfsup.losses.contrastive import infonce
from rs_selfsup.methods.cmid import CMID, fill_mean, match_cells, pick, random_blocks, to_pixels
from rs_selfsup.modalities import DataError, preset
from rs_selfsup.pretrain import PretrainLearner
from rs_selfsup.randomness import STREAMS, keys

MODS = dict(rgb=preset("rgb", 0.5), dsm=preset("dsm", 0.5), s1=preset("s1", 2.0))


pytestmark = pytest.mark.usefixtures("one_thread")


def tiles(n=6, size=64, mods=("rgb",), seed=0, full=True):
    "Smooth random fields, seen by every modality at its own resolution."
    g = torch.Generator().manual_seed(seed)
    f = F.interpolate(torch.rand(n, 3, 5, 5, generator=g), size=size, mode="bicubic").clamp(0, 1) * 255
    images, valid = {}, {}
    for m in mods:
        s = round(size * 0.5 / MODS[m].gsd)
        x = F.interpolate(f, size=s, mode="area")
        images[m] = x if MODS[m].n_bands == 3 else x.mean(1, keepdim=True).repeat(1, MODS[m].n_bands, 1, 1)
        valid[m] = torch.ones(n, 1, s, s, dtype=torch.bool)
    if not full:
        for m in mods:
            valid[m][0], valid[m][1, :, : valid[m].shape[2] // 2] = False, False
    return Batch(images, valid, tile=torch.arange(n), key=keys(seed, 0, torch.arange(n)), full=full)


def make(name="test_resnet", mods=("rgb",), seed=0, net=None, published=False, **kw):
    torch.manual_seed(seed)
    mods = {m: MODS[m] for m in mods}
    stats = {m: dict(mean=[128.0] * v.n_bands, std=[50.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[255.0] * v.n_bands) for m, v in mods.items()}
    enc = create_encoder(name, mods, next(iter(mods)), **(net or {}))
    kw = {**dict(block=16, queue=32, prototypes=64, width=64, dim=16), **kw}
    return (CMID.published if published else CMID)(enc, Normalize(mods, stats), **kw)


def places(window, grid=(7, 7), size=(224, 224)):
    return cell_centres(View({}, {}, window, size), grid)


# --- defects of the published code

def windows(n=2000, **kw):
    k = keys(5, 0, torch.arange(n))
    return draw_window(k, 0, **kw), draw_window(k, 1, **kw)


def test_defect_1_offsets_are_pixels_not_fractions():
    "The published rule anchors every crop at the corner: its pairs are a cell apart, ours a quarter of one."
    a, b = windows()
    d = match_cells(places(a), places(b))[2]
    assert d.shape == (2000, 20) and round(d.median().item()) == 7

    def corner(w):
        half = w.half.abs()
        return dataclasses.replace(w, mid=half - 1 + (w.mid / (1 - half).clamp(min=1e-6) + 1) / 224)
    i, j, *_ = match_cells(places(corner(a)), places(corner(b)))
    at = lambda w, i: places(w).gather(1, i[..., None].expand(-1, -1, 2))
    wrong = (at(a, i) - at(b, j)).norm(dim=2)
    assert 30 < wrong.median() < 40 and (wrong > 32).float().mean() > 0.45 > 0.05 > (d > 32).float().mean()


def test_defect_1_against_brute_force_on_2000_pairs():
    "The centres by the corners of each crop, the pairs by a loop over all of them: mirrors, turns, aspect ratios."
    a, b = windows()
    assert (a.half < 0).any() and a.transpose.any() and (a.half.abs()[:, 0] != a.half.abs()[:, 1]).any()

    def centres(w, n):
        top, left = ((w.mid[n, k] - w.half[n, k].abs() + 1).item() * 112 for k in (0, 1))
        h, v = (w.half[n, k].abs().item() * 224 / 7 for k in (0, 1))
        rows, cols = ([s + (i + 0.5) * c for i in range(7)] for s, c in ((top, h), (left, v)))
        rows, cols = rows[:: -1 if w.half[n, 0] < 0 else 1], cols[:: -1 if w.half[n, 1] < 0 else 1]
        return [(rows[q], cols[p]) if w.transpose[n] else (rows[p], cols[q]) for p in range(7) for q in range(7)]
    pa, pb = places(a), places(b)
    _, _, near, _ = match_cells(pa, pb)
    for n in range(2000):
        ca, cb = centres(a, n), centres(b, n)
        if n < 50:
            torch.testing.assert_close(pa[n], torch.tensor(ca), atol=1e-2, rtol=0)
        want = sorted(min(math.dist(p, q) for q in cb) for p in ca)[:20]
        torch.testing.assert_close(near[n], torch.tensor(want), atol=1e-2, rtol=1e-4)


def test_defect_1_the_step_uses_the_matches():
    "Maps that hold their own places are paired within a third of a cell; the wrong view's map would be far off."
    method, batch = make(), tiles(32)
    views = method.views(batch)
    maps = torch.cat([cell_centres(v, (4, 4)).mT.unflatten(2, (4, 4)) for v in views])
    i, j, ok = method.pairs(views, (4, 4))
    assert ok is None
    s, t = pick(maps, i), pick(torch.cat(maps.chunk(2)[::-1]), j)
    assert (s - t).norm(dim=2).median() < 16 / 3
    assert (s - pick(maps, j)).norm(dim=2).median() > 8


def test_defect_2_both_views_of_the_student_are_filled():
    method, batch = make(), tiles()
    seen = []
    method.encoder.register_forward_pre_hook(lambda *a: None)
    take = method.encoder.feature_map
    method.encoder.feature_map = lambda x, m, hidden=None, token=None: seen.append((x, hidden)) or take(x, m, hidden, token)
    views = method.views(batch)
    method.predict(batch.key, views, "rgb")
    x, hidden = seen[0]
    assert len(x) == 12 and (hidden.flatten(1).float().mean(1) == 10 / 16).all()
    for n in range(12):
        flat = x[n][:, hidden[n, 0]]
        torch.testing.assert_close(flat, flat[:, :1].expand_as(flat))
        torch.testing.assert_close(flat[:, 0], torch.cat([v.images["rgb"] for v in views])[n].mean((1, 2)), atol=1e-5, rtol=1e-4)


def test_defects_3_4_9_queue_holds_each_key_once_at_unit_length_for_any_batch():
    method = make(queue=50)
    method(tiles(6))
    queue = method.queue["rgb"]
    assert queue.real.sum() == 12 and torch.unique(queue.keys[queue.real], dim=0).shape[0] == 12
    torch.testing.assert_close(queue.keys[queue.real].norm(dim=1), torch.ones(12))
    for n in (5, 7, 3):                              # 50 is a multiple of none
        method(tiles(n))
    assert queue.real.sum() == 42 and queue.at == 42


def test_defect_9_a_batch_of_one_is_an_error_that_says_so():
    with pytest.raises(DataError, match="a batch of one.*Use a batch of two"):
        make()(tiles(1))


def test_defect_17_any_bands_sizes_and_backbones():
    for name, net, size in (("test_vit", {}, 96), ("test_resnet", {}, 128), ("test_convnext", {}, 64)):
        for mods in (("s1",), ("dsm",)):
            k = MODS[mods[0]].gsd / 0.5
            terms = make(name, mods, net=net)(tiles(3, int(size * k), mods))
            assert all(v.isfinite() for v in terms.values())


def test_spectra_of_each_picture_not_of_the_mean():
    "With pictures that cancel in the mean, the published form sees nothing."
    method, batch = make(fft_weight=1.0), tiles(2)
    z = torch.randn(1, 3, 64, 64)
    x = torch.cat([z, -z, z, -z])                    # views A and B of two images
    h = to_pixels(random_blocks(batch.key, (4, 4)), 16)[:1].expand(4, -1, -1, -1)
    with torch.no_grad():
        for p in method.decoder.parameters():
            p.zero_()
    y = torch.zeros(4, method.encoder.embed_dim, 2, 2)
    spatial = 0.0
    for per_sample in (True, False):
        method.per_sample, method.fft_weight = per_sample, 1.0
        both = method.rec_loss("rgb", x=x, valid=None, hidden=h, student=y)
        method.fft_weight = 0.0
        spatial = method.rec_loss("rgb", x=x, valid=None, hidden=h, student=y)
        assert (both - spatial > 0.01) == per_sample
    assert spatial > 0


# --- promises of the page

def test_masks_are_counted_independent_and_of_the_key_alone():
    k = keys(1, 0, torch.arange(3000))
    a, b = random_blocks(k, (7, 7)), random_blocks(k, (7, 7), stream=STREAMS["mask"] + 1)
    assert (a.sum((1, 2)) == 30).all() and (random_blocks(k, (5, 2), 0.5).sum((1, 2)) == 5).all()
    both = (a & b).float().mean()
    assert abs(both - (30 / 49) ** 2) < 0.01         # the two views' masks know nothing of each other
    assert torch.equal(random_blocks(k[100:103], (7, 7)), a[100:103])


def test_fill_is_a_limit_of_nothing_hidden_and_of_all_hidden():
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(fill_mean(x, torch.zeros(2, 1, 8, 8).bool()), x)
    torch.testing.assert_close(fill_mean(x, torch.ones(2, 1, 8, 8).bool()), x.mean((2, 3), keepdim=True).expand_as(x))


def test_match_cells_limits_invalid_cells_and_other_grids():
    w = Window(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.bool))
    a = places(w, (4, 4), (64, 64))
    i, j, d, ok = match_cells(a, a)
    assert torch.equal(i, j) and (d == 0).all() and ok is None and i.shape == (1, 16)
    b = places(w, (2, 2), (64, 64))
    _, j, d, ok = match_cells(a, b, 16, max_distance=11.32)
    torch.testing.assert_close(d, torch.full((1, 16), 128 ** 0.5))
    assert ok.all() and (torch.bincount(j[0]) == 4).all()
    assert not match_cells(a, b, 16, max_distance=11.3)[3].any()
    none = torch.zeros(1, 16, dtype=torch.bool)
    assert not match_cells(a, a, 5, ok_b=none)[3].any() and not match_cells(a, a, 5, ok_a=none)[3].any()


def test_hidden_pixels_reach_the_student_only_through_the_mean():
    "The gradient of the student's map at hidden pixels is that of the fill: equal everywhere in a band."
    method, batch = make().eval(), tiles(3)
    views = method.views(batch)
    x = views[0].images["rgb"].requires_grad_()
    out = method.predict(batch.key, views, "rgb")
    (out["student"][:3] ** 2).sum().backward()
    for g, h in zip(x.grad, out["hidden"][:3, 0]):
        torch.testing.assert_close(g[:, h], g[:, h][:, :1].expand(-1, int(h.sum())), atol=1e-6, rtol=1e-4)
        assert g[:, ~h].std() > 0


def test_closed_form_of_the_global_term():
    method, batch = make(global_loss="in-batch"), tiles()
    out = method.predict(batch.key, method.views(batch), "rgb")
    got = method.glob_loss("rgb", **out)
    q = F.normalize(method.projector(out["student"].mean((2, 3))), dim=1)
    k = F.normalize(method.teacher_projector(out["teacher"].mean((2, 3))), dim=1)
    (qa, qb), (ka, kb) = q.chunk(2), k.chunk(2)
    want = sum(F.cross_entropy(u @ v.T / 0.2, torch.arange(6)) for u, v in ((qa, kb), (qb, ka))) / 2
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(infonce(qa, kb), F.cross_entropy(qa @ kb.T / 0.2, torch.arange(6)))


def test_teacher_keeps_its_own_batchnorm_statistics():
    "They are of whole images; the student's are of hidden ones."
    method = make()
    for _ in range(5):
        method(tiles())
        method.update_teacher(0.9)
    pairs = [(t, s) for (k, t), s in zip(method.teacher.state_dict().items(), method.encoder.state_dict().values()) if "running_var" in k]
    assert pairs and not any(torch.equal(t, s) for t, s in pairs)
    for t, s in ((method.teacher, method.encoder), (method.teacher_head, method.head), (method.teacher_projector, method.projector)):
        assert not any(p.requires_grad for p in t.parameters())
        assert [k for k, _ in t.named_parameters()] == [k for k, _ in s.named_parameters()]
    before = [p.clone() for p in method.teacher_head.parameters()]
    for p in method.head.parameters():
        p.data += 1
    method.update_teacher(0.75)
    for b, t, s in zip(before, method.teacher_head.parameters(), method.head.parameters()):
        torch.testing.assert_close(t, 0.75 * b + 0.25 * s.data)


def test_validation_moves_neither_queue_nor_centre():
    method = make()
    method(tiles())
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.eval()
    with torch.no_grad():
        method(tiles(seed=3))
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


@pytest.mark.parametrize("kw", [{}, dict(global_loss="in-batch", max_distance=9.0), dict(global_loss="byol", per_sample=False)])
@pytest.mark.parametrize("full", [True, False])
def test_no_sync_every_parameter_has_a_gradient_and_terms_are_float32(kw, full):
    method, batch = make(mods=("rgb", "dsm"), **kw), tiles(mods=("rgb", "dsm"), full=full)
    with NoSync(), torch.autocast("cpu", torch.bfloat16):
        terms = method(batch)
        sum(terms.values()).backward()
        method.update_teacher(0.9)
    assert list(terms) == ["rec", "glob", "loc"] and all(v.dtype == torch.float32 and v.isfinite() for v in terms.values())
    assert all((p.grad is not None and p.grad.isfinite().all()) == p.requires_grad for p in method.parameters())


@pytest.mark.parametrize("weights", [dict(rec=0), dict(glob=0), dict(loc=0), dict(glob=0, loc=0)])
def test_a_term_of_weight_zero_is_left_out_with_its_parts(weights):
    method = make(weights=weights)
    terms = method(tiles())
    assert set(terms) == {"rec", "glob", "loc"} - set(weights)
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    method.update_teacher(0.9)


def test_nodata_changes_nothing_whatever_stands_there():
    method, batch = make().eval(), tiles(full=False)
    a = method(batch)
    batch.images["rgb"] = batch.images["rgb"].masked_fill(~batch.valid["rgb"], 1e6)
    b = method(batch)
    assert all(torch.equal(a[k], b[k]) and a[k].isfinite() for k in a)


def test_batch_composition_does_not_change_views_or_masks():
    method, batch = make(), tiles(6)
    a, b = method.views(batch), method.views(batch.index(slice(4, 6)))
    for v, w in zip(a, b):
        torch.testing.assert_close(v.images["rgb"][4:], w.images["rgb"], atol=1e-6, rtol=0)
    assert torch.equal(method.masks(batch.key, a, "rgb")[0].unflatten(0, (2, 6))[:, 4:].flatten(0, 1), method.masks(batch.key[4:], b, "rgb")[0])


def test_bad_input_names_the_mend():
    with pytest.raises(DataError, match="does not divide into blocks of 128 px"):
        make(block=128)(tiles())
    with pytest.raises(DataError, match="view of 48 px.*size=32 or size=64"):
        make(size=48)(tiles())
    with pytest.raises(DataError, match="tile of 16 x 16 px"):
        make()(tiles(size=16))
    with pytest.raises(DataError, match="mask_ratio 1.0"):
        make(mask_ratio=1.0)
    with pytest.raises(DataError, match="'queue', 'in-batch', 'byol'"):
        make(global_loss="moco")
    with pytest.raises(ValueError, match="larger than the data set of 100 tiles"):
        make(queue=4096).check_data(100)


def test_one_modality_of_several():
    method = make(mods=("rgb", "dsm"), modality="dsm")
    sum(method(tiles(mods=("rgb", "dsm"))).values()).backward()
    assert method.names == ["dsm"] and all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert method.features(tiles(mods=("rgb", "dsm"))).shape == (6, method.encoder.embed_dim)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from rs_selfsup.data.synthetic import write_scenes
    from rs_selfsup.data.tiles import build_store
    folder = tmp_path_factory.mktemp("cmid")
    yaml = write_scenes(folder / "scenes", n_scenes=4, size_m=128, seed=1, modalities=("rgb",), collars=0.0, progress=False)
    return build_store(yaml, folder / "store", tile=64, progress=False)


def learner(store, seed=0):
    from rs_selfsup.data.loading import dataloaders
    method = make(seed=seed, warmup_epochs=2)
    return toy.quiet(PretrainLearner(dataloaders(store, bs=8, device="cpu"), method, every=1))


def test_a_stopped_run_resumes_bitwise_with_queue_and_centre(store, tmp_path):
    class Gone(Exception):
        pass

    class Stop(toy.Callback):
        def after_step(self):
            if self.learn.step == n + 1:
                raise Gone("in the middle of an epoch")
    fit = dict(lr=1e-3, save_every=1, knn=False, monitor=False)
    whole = learner(store)
    n = len(whole.dls.train)
    whole.fit_pretrain(3, checkpoint_dir=tmp_path / "whole", **fit)
    with pytest.raises(Gone):
        learner(store).fit_pretrain(3, checkpoint_dir=tmp_path / "a", cbs=Stop(), **fit)
    again = learner(store, seed=9)                   # other weights: all must come from the file
    again.resume(tmp_path / "a", knn=False, monitor=False)
    assert again.method.teacher_t == whole.method.teacher_t and again.method.center.abs().sum() > 0
    for k, v in whole.method.state_dict().items():
        assert torch.equal(v, again.method.state_dict()[k]), k


def test_show_results_draws_it(store):
    import matplotlib.pyplot as plt
    learn = learner(store)
    fig = learn.show_results(max_n=2)
    assert len(fig.axes) == 6 and learn.method.training
    plt.close(fig)
