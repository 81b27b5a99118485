"CMID: one test per defect of the published code that applies here, and the promises of the page."

import dataclasses
import functools
import inspect
import math
import re

import pytest
import toy_pretrain as toy
import torch
from toy_ground import NoSync, sgd_steps, two_processes
from torch.nn import functional as F

from rs_selfsup.backbones import create_encoder
from rs_selfsup.callbacks import OnlineKNN, cosine
from rs_selfsup.data.augment import Batch, Normalize
from rs_selfsup.data.views import View, Window, cell_centres, draw_window
from rs_selfsup.losses.contrastive import infonce
from rs_selfsup.methods.cmid import CMID, fill_mean, match_cells, pick, pooled, random_blocks, to_pixels
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


def make(name="test_resnet", mods=("rgb",), seed=0, net=None, published=False, relief=5.0, **kw):
    torch.manual_seed(seed)
    mods = {m: MODS[m] for m in mods}
    stats = {m: dict(mean=[128.0] * v.n_bands, std=[50.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[255.0] * v.n_bands) for m, v in mods.items()}
    enc = create_encoder(name, mods, next(iter(mods)), **(net or {}))
    kw = {**dict(block=16, queue=32, prototypes=64, width=64, dim=16), **kw}
    return (CMID.published if published else CMID)(enc, Normalize(mods, stats, relief), **kw)


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


# --- more of them, which need a trained step or a store (its entries 5, 13: only in scripts that have no counterpart here)

SETTINGS = dict(                                     # a value that is not the default of `make`
    size=32, modality="dsm", area=(0.9, 1.0), ratio=(1.0, 1.0), flips=False, rot90=False, gain=0.0, shift=0.0, db=3.0, metres=2.0, sigma=(3.0, 4.0),
    block=32, mask_ratio=0.3, fft_weight=0.0, per_sample=False, global_loss="in-batch", queue=7, temperature=0.5, matches=2, max_distance=0.5, prototypes=16,
    student_temp=0.3, teacher_temp=(0.2, 0.3), warmup_epochs=2, center_momentum=0.1, width=32, dim=8, head_norm="layer", min_valid=0.99)


def three_steps(**kw):
    "Losses of three batches in the second epoch, with and without nodata."
    method = make("test_vit", ("rgb", "dsm", "s1"), relief=None, **kw)
    method.set_epoch(1)
    batches = [tiles(4, 64, ("rgb", "dsm", "s1"), seed=i, full=i != 1) for i in range(3)]
    with torch.no_grad():
        return torch.tensor([list(method(b).values()) for b in batches])


by_default = functools.lru_cache(three_steps)


def test_defect_8_no_setting_is_left_out_and_a_repetition_is_no_change():
    torch.testing.assert_close(three_steps(), by_default(), atol=1e-6, rtol=1e-6)
    names = set(inspect.signature(CMID.__init__).parameters)
    assert names - set(SETTINGS) == {"self", "encoder", "normalize", "gather", "weights"}        # the last two have tests of their own


@pytest.mark.parametrize("name", SETTINGS)
def test_defect_8_every_setting_does_something(name):
    "Three flags of the published script are read and then forgotten."
    assert by_default().isfinite().all() and (three_steps(**{name: SETTINGS[name]}) - by_default()).abs().max() > 1e-4


def test_defect_8_accumulation_is_of_gradients_and_the_norm_is_bounded(store):
    "The published --accumulation-steps changes the learning rate alone, and max_grad_norm nothing."
    norms, followed = [], []

    class Watch(toy.Callback):
        order = 1000

        def before_step(self):
            norms.append(torch.stack([p.grad.norm() for p in self.learn.method.parameters() if p.grad is not None]).norm().item())

    learn = learner(store)
    update = learn.method.update_teacher
    learn.method.update_teacher = lambda m: (followed.append(m), update(m))
    n = len(learn.dls.train)
    learn.fit_pretrain(1, lr=1e-3, accumulate=n, clip=0.01, knn=False, monitor=False, cbs=Watch())
    assert n > 2 and len(norms) == len(followed) == 1 and norms[0] == pytest.approx(0.01, rel=1e-3)


def test_defect_10_every_epoch_has_an_order_and_views_of_its_own(store):
    "There, epochs 0 and 1 share their order, and all later ones are one late; a resumed run would be another."
    learn, rows = learner(store), []

    class Watch(toy.Callback):
        def before_batch(self):
            if self.training:
                view = self.learn.method.views(self.xb[0])[0]
                rows.extend((self.learn.epoch, t, k) for t, k in zip(self.xb[0].tile.tolist(), view.window.mid.tolist()))

    learn.fit_pretrain(3, lr=1e-3, knn=False, monitor=False, cbs=Watch())
    order = [[t for e, t, _ in rows if e == i] for i in range(3)]
    view = [{t: k for e, t, k in rows if e == i} for i in range(3)]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        both = view[i].keys() & view[j].keys()
        assert order[i] != order[j] and len(both) > 10 and not any(view[i][t] == view[j][t] for t in both)


def test_defect_6_and_11_every_labelled_tile_is_asked_about_once(store):
    "The published accuracy is of whole shuffled batches (36 of 420 tiles left out), its kNN of ten batches."
    from rs_selfsup.evaluate import Features, extract_features, linear_probe, split_features
    learn = learner(store)
    splits = split_features(learn.dls.store, lambda dl: extract_features(learn.method.encoder, dl), bs=5, normalize=learn.method.normalize, device="cpu")
    for name, f in zip(("train", "val", "test"), splits):
        assert len(f) % 5 and f.tile.tolist() == learn.dls.store.split(name).tolist()
    ask = [f.labelled for f in splits]
    r = linear_probe(*ask, draws=0, max_iter=20)
    assert len(r.pred) == len(ask[2]) and r.score == (r.pred == ask[2].label).mean()
    other = Features(ask[2].x, ask[2].label[::-1].copy(), ask[2].tile)
    assert linear_probe(*ask[:2], other, draws=0, max_iter=20).C == r.C                          # chosen on val, never on test
    online = OnlineKNN()
    online.learn = learn
    online.before_fit()
    for ids, f in zip(online.ids, ask):
        x, y = online.vectors(ids)
        assert len(f) > 10 and ids.tolist() == f.tile.tolist() and y.tolist() == f.label.tolist()
        torch.testing.assert_close(x, torch.tensor(f.x), atol=1e-4, rtol=1e-4)


def test_defect_7_and_12_a_run_leaves_logs_and_plain_tensors(store, tmp_path):
    "There, a picture every iteration; checkpoints that pickle Python objects, which whoever loads them executes."
    learn = learner(store)
    learn.fit_pretrain(1, lr=1e-3, checkpoint_dir=tmp_path, save_every=2, knn=False, monitor=False)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".ckpt", ".csv", ".jsonl"} and len(files) < 2 + len(learn.dls.train)
    for p in files:
        if p.suffix == ".ckpt":
            torch.load(p, weights_only=True)
    learn.export_encoder(tmp_path / "e.safetensors")
    from safetensors import safe_open
    with safe_open(tmp_path / "e.safetensors", "pt") as f:
        assert set(f.keys()) == set(learn.method.encoder.timm_state("rgb"))


def test_defect_14_published_is_what_the_page_says_is_published():
    "There, the files beside the paper are of other runs. Here the comment at each setting is the variant."
    said = {}
    for line in inspect.getsource(CMID.__init__).splitlines():
        if m := re.match(r"\s+(\w+):.*=(.*?),\s*#(.*)", line):
            name, default, text = m.groups()
            if "(published)" in text and default.startswith("True"):
                said[name] = False                       # 'True ...; False (published)'
            elif p := re.search(r"published: ([\w.,]+)", text):
                said[name] = False if p[1] == "no" else float(p[1].replace(",", ""))
    assert said == dict(rot90=False, gain=0.4, per_sample=False, queue=65536.0)
    ours, theirs = make(queue=4096).config, make(published=True, queue=65536).config
    assert {k: v for k, v in theirs.items() if v != ours[k]} == said
    told = dict(mask_ratio=0.6, area=(0.3, 1.0), ratio=(3 / 4, 4 / 3), matches=20, temperature=0.2, student_temp=0.1, teacher_temp=(0.04, 0.07),
                warmup_epochs=50, center_momentum=0.9, fft_weight=1.0, global_loss="queue")
    assert {k: theirs[k] for k in told} == told
    default = {k: p.default for k, p in inspect.signature(CMID.__init__).parameters.items()}
    assert [default[k] for k in ("block", "prototypes", "width", "dim", "head_norm")] == [32, 2048, 2048, 256, "auto"]
    assert make(published=True).weights == dict(rec=1.0, glob=1.0, loc=1.0)


@pytest.mark.parametrize("loss", ["queue", "in-batch", "byol"])
@pytest.mark.parametrize("net, size, stride", [("test_resnet", 96, 32), ("test_vit", 80, 16), ("test_convnext", 64, 32), ("resnet10t", 64, 8)])
def test_defect_15_grid_and_widths_are_the_encoders(net, size, stride, loss):
    "There, a grid of a 32nd of the size, two known widths, and 2048 alone for BYOL."
    method = make(net, net=dict(output_stride=8) if stride == 8 else {}, global_loss=loss)
    assert method.projector[0].in_features == method.head.mlp[0].in_features == method.encoder.embed_dim != 2048
    seen, f = [], method.pairs
    method.pairs = lambda views, grid, share=None: seen.append(tuple(grid)) or f(views, grid, share)
    sum(method(tiles(3, size)).values()).backward()
    assert seen == [(size // stride,) * 2] and all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_defect_16_hidden_means_hidden():
    "One of their two masks is inverted. Ours: True is what the student cannot see, and what is painted."
    method, batch = make("test_vit", mask_ratio=0.75), tiles(4)
    seen = method.visualize(batch)
    blocks, x, y = seen["masks"]["rgb"], seen["images"]["rgb"], seen["reconstruction"]["rgb"]
    assert (blocks.sum((1, 2)) == 12).all()
    hidden = to_pixels(blocks, 16).expand_as(x)
    assert torch.equal(x[~hidden], y[~hidden]) and (x[hidden] != y[hidden]).float().mean() > 0.99
    view = method.whole(batch)
    out = method.predict(batch.key, (view, view), "rgb")
    for where, moved in ((out["hidden"], True), (~out["hidden"], False)):       # in space alone: spectra see a thousandth of the rest
        method.fft_weight = 0.0
        was = method.rec_loss("rgb", **out)
        other = {**out, "x": out["x"] + where.float()}
        assert torch.equal(method.rec_loss("rgb", **other), was) != moved


def test_defect_16_one_normalisation_with_the_stores_statistics():
    "There, the constants of another data set in training, and of a third in the pictures."
    method, batch = make("test_vit").eval(), tiles(4)
    torch.testing.assert_close(method.normalize.physical(method.visualize(batch)["images"]["rgb"], "rgb"), batch.images["rgb"], atol=1e-3, rtol=1e-5)
    stored = method(batch)
    batch.images = method.normalize(batch.images)
    once = method(batch)
    assert all(torch.equal(stored[k], once[k]) for k in stored)


# --- what its description says of the step, and known traps of its parts

def test_teacher_follows_after_each_step_from_the_first(store):
    "There, the average is taken before the step, so it lags by one, and the first is skipped."
    learn, seen = learner(store), []

    class Watch(toy.Callback):
        order = 1000

        def before_step(self):
            self.old = self.learn.method.teacher_head.mlp[0].weight.clone()

        def after_step(self):
            m = cosine(self.learn.step - 1, self.learn.n_steps, 0.5, 1.0)
            now = self.learn.method.head.mlp[0].weight
            torch.testing.assert_close(self.learn.method.teacher_head.mlp[0].weight, m * self.old + (1 - m) * now)
            seen.append((now - self.old).abs().max().item())

    learn.fit_pretrain(1, lr=1e-2, momentum=(0.5, 1.0), knn=False, monitor=False, cbs=Watch())
    assert len(seen) == len(learn.dls.train) and min(seen) > 0


def test_teacher_is_a_network_of_its_own_and_gives_the_targets():
    "The trap of two names for one module: the target would be the student itself."
    method, batch = make().eval(), tiles()
    pairs = [(getattr(method, t), getattr(method, s)) for t, s in method.teachers.items()]
    assert not {p.data_ptr() for t, _ in pairs for p in t.parameters()} & {p.data_ptr() for _, s in pairs for p in s.parameters()}
    views = method.views(batch)
    before = method.predict(batch.key, views, "rgb")
    for p in method.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    after = method.predict(batch.key, views, "rgb")
    assert torch.equal(before["student"], after["student"]) and not torch.equal(before["teacher"], after["teacher"])
    torch.testing.assert_close(after["teacher"], method.teacher.feature_map(after["x"], "rgb"))           # of whole views
    method.queue["rgb"].enqueue(torch.randn(8, 16))
    for part, term in ((method.teacher_projector, "glob"), (method.teacher_head, "loc")):
        was = getattr(method, f"{term}_loss")("rgb", views=views, **after)
        for p in part.parameters():
            p.data += 0.1 * torch.randn_like(p)
        assert not torch.equal(getattr(method, f"{term}_loss")("rgb", views=views, **after), was)


def test_no_gradient_reaches_the_target():
    "Through teacher, keys, queue, prototypes' targets or the colours that are painted."
    method, batch = make("test_vit"), tiles()
    method(tiles(seed=1))                                    # the queue holds keys
    views = method.views(batch)
    out = {k: v.detach().requires_grad_() if k in ("student", "teacher") else v for k, v in method.predict(batch.key, views, "rgb").items()}
    for term in ("glob", "loc"):
        out["student"].grad = None
        getattr(method, f"{term}_loss")("rgb", views=views, **out).backward()
        assert out["student"].grad.abs().sum() > 0 and out["teacher"].grad is None
    assert all(p.grad is None for k in method.teachers for p in getattr(method, k).parameters()) and not method.queue["rgb"].keys.requires_grad


def test_keys_enter_the_queue_after_the_loss_and_b_before_a():
    "The first loss has no negative; those of the second are the first step's keys, and no key is its own negative."
    method, batch = make("test_vit", queue=64), [tiles(seed=i) for i in range(2)]
    outs = [method.predict(b.key, method.views(b), "rgb") for b in batch]
    keys_of = lambda o: torch.cat(F.normalize(method.teacher_projector(pooled(o["teacher"])), dim=1).chunk(2)[::-1])
    first, second = (method.glob_loss("rgb", **o) for o in outs)
    assert first == 0
    q, k = (F.normalize(p(pooled(outs[1][n])), dim=1) for p, n in ((method.projector, "student"), (method.teacher_projector, "teacher")))
    k = torch.cat(k.chunk(2)[::-1])
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ keys_of(outs[0]).T], 1) / 0.2
    torch.testing.assert_close(second, F.cross_entropy(logits, torch.zeros(12, dtype=torch.long)))
    torch.testing.assert_close(method.queue["rgb"].keys[:24], torch.cat([keys_of(o) for o in outs]))


def test_closed_form_of_the_byol_variant():
    "Half the sum of both directions, 2 - 2 cos each."
    method, batch = make("test_vit", global_loss="byol").eval(), tiles()
    out = method.predict(batch.key, method.views(batch), "rgb")
    p, z = method.predictor(method.projector(pooled(out["student"]))), method.teacher_projector(pooled(out["teacher"]))
    (pa, pb), (za, zb) = p.chunk(2), z.chunk(2)
    want = sum((2 - 2 * F.cosine_similarity(a, b)).mean() for a, b in ((pa, zb), (pb, za))) / 2
    torch.testing.assert_close(method.glob_loss("rgb", **out), want)


def test_center_moves_once_a_step_after_both_directions_used_it():
    "There, it moves between the directions: the second is judged by another centre."
    method, batch = make("test_vit", center_momentum=0.5), tiles()
    method.center.normal_(0, 0.1)
    old, views = method.center[0].clone(), method.views(batch)
    out = method.predict(batch.key, views, "rgb")
    i, j, _ = method.pairs(views, out["student"].shape[-2:])
    s, t = method.head(pick(out["student"], i)), method.teacher_head(pick(torch.cat(out["teacher"].chunk(2)[::-1]), j))
    want = -(((t - old) / method.teacher_t).softmax(-1) * (s / 0.1).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(method.loc_loss("rgb", views, **out), want)
    torch.testing.assert_close(method.center[0], 0.5 * old + 0.5 * t.flatten(0, 1).mean(0))


def test_teacher_that_says_everything_costs_log_k():
    "Where `loc` is pinned when the prototypes collapse: a value to recognise."
    method, batch = make("test_vit"), tiles()
    method.teacher_head.prototypes.data[:] = method.teacher_head.prototypes.data[:1]
    method.head.prototypes.data[:] = method.head.prototypes.data[:1]
    torch.testing.assert_close(method(batch)["loc"], torch.tensor(math.log(64)))


@pytest.mark.parametrize("size", [48, 80])
def test_spectra_of_any_side_under_half_precision(size):
    "Half-precision transforms know powers of two alone, and overflow."
    method = make("test_vit")
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(tiles(3, size))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in terms.values())


def test_nodata_may_be_nan():
    method, batch = make("test_vit").eval(), tiles(full=False)
    a = method(batch)
    batch.images["rgb"] = batch.images["rgb"].masked_fill(~batch.valid["rgb"], math.nan)
    b = method(batch)
    assert all(torch.equal(a[k], b[k]) and a[k].isfinite() for k in a)


# --- two processes

DDP = dict(
    queue=dict(name="test_vit", queue=24), convnext=dict(name="test_convnext", queue=50),
    batch=dict(name="test_vit", global_loss="in-batch", max_distance=12.0), spectra=dict(name="test_vit", per_sample=False),
    norms=dict(name="test_resnet"), byol=dict(name="test_resnet", global_loss="byol"))


def global_batches(part=slice(None)):
    return [tiles(8, seed=i, full=i != 1).index(part) for i in range(3)]


def _two(rank, folder):
    for name, kw in DDP.items():
        torch.save(sgd_steps(make(**kw).train(), global_batches(slice(4 * rank, 4 * rank + 4))), folder / f"{name}{rank}.pt")
    make("test_vit")(tiles(1).index(slice(0, 1)))            # one image per process: two to tell apart
    with pytest.raises(DataError, match="a batch of one"):
        make(global_loss="byol")(tiles(1))                   # but none to normalise with


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(_two, folder)
    return {name: [torch.load(folder / f"{name}{r}.pt") for r in (0, 1)] for name in DDP}


@pytest.mark.parametrize("name", DDP)
def test_two_processes_have_the_same_losses_weights_queue_and_centre(name, ranks):
    (a, s), (b, t) = ranks[name]
    own = ("running_mean", "running_var")                    # of its own images, until the next forward takes the first process's
    assert torch.equal(a, b) and all(torch.equal(v, t[k]) for k, v in s.items() if not k.endswith(own))
    assert any(not torch.equal(v, t[k]) for k, v in s.items() if k.endswith(own)) == (name in ("norms", "byol"))
    if name == "convnext":                                   # 3 steps of 16 keys, each once; a tile without data has none
        keys = s["queue.rgb.keys"][s["queue.rgb.real"]]
        assert s["queue.rgb.at"] == 48 and len(keys) == len(keys.unique(dim=0)) == 46


@pytest.mark.parametrize("name", [n for n in DDP if n not in ("norms", "byol")])
def test_two_processes_are_one_with_the_whole_batch(name, ranks):
    losses, state = sgd_steps(make(**DDP[name]).train(), global_batches())
    torch.testing.assert_close(ranks[name][0][0], losses, atol=1e-5, rtol=1e-4)
    for k, v in ranks[name][0][1].items():
        torch.testing.assert_close(v, state[k], atol=2e-5, rtol=1e-3, msg=lambda m, k=k: f"{k}: {m}")
