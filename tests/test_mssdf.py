"MSSDF: one test per defect of the published code, and the promises of the page."

import copy
import functools
import os
import socket

import pytest
import torch
import toy_ground as ground
from torch import nn
from torch.nn import functional as F

from rs_selfsup.data.augment import Normalize
from rs_selfsup.encoders import MultiModalViT
from rs_selfsup.losses.alignment import dense_infonce
from rs_selfsup.methods.core import area_pool, pca_rgb
from rs_selfsup.methods.mssdf import MSSDF, spread_tokens, visible_tokens
from rs_selfsup.modalities import DataError, preset

TWO = dict(rgb=preset("rgb", 0.5), dsm=preset("dsm", 0.5))
THREE = dict(TWO, s1=preset("s1", 2.0))
FOUR = dict(TWO, s2=preset("s2_l2a", 10.0), s1=preset("s1", 2.0))


pytestmark = pytest.mark.usefixtures("one_thread")


def fields(n, size, mods=TWO, **kw):
    return ground.fields(n, size, mods, **kw)


def make(mods=TWO, published=False, seed=0, **kw):
    torch.manual_seed(seed)
    enc = MultiModalViT("vit_tiny_patch16_224", mods, "rgb", patch_size=4, embed_dim=64, depth=2, num_heads=4)
    stats = {m: dict(mean=[128.0] * v.n_bands, std=[50.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[255.0] * v.n_bands) for m, v in mods.items()}
    kw = {**dict(fusion_depth=1, decoder_depth=2), **kw}
    return (MSSDF.published if published else MSSDF)(enc, Normalize(mods, stats), **kw)


def total(method, terms):
    return sum(method.weights[k] * v for k, v in terms.items())


def train(method, steps, size=16, n=32):
    opt = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)
    for i in range(steps):
        total(method, method.train()(fields(n, size, seed=i))).backward()
        opt.step()
        opt.zero_grad()
        method.update_teacher(0.99)
    return method


# --- defects of the published code

def test_mssdf_ema_is_not_inverted():
    method = make()
    before = [p.clone() for p in method.teacher.parameters()]
    for p in method.encoder.parameters():
        p.data += torch.randn_like(p)
    method.update_teacher(0.9)
    for t, b, s in zip(method.teacher.parameters(), before, method.encoder.parameters()):
        torch.testing.assert_close(t, 0.9 * b + 0.1 * s, atol=1e-5, rtol=1e-5)
    method.update_teacher(1.0)
    method.update_teacher(0.0)
    assert all(torch.equal(t, s) for t, s in zip(method.teacher.parameters(), method.encoder.parameters()))


def test_buffers_follow_too():
    method = make()
    for e in (method.encoder, method.teacher):
        e.vit.register_buffer("count", torch.zeros(1, dtype=torch.long))
    method.encoder.vit.count += 5
    method.update_teacher(0.999)
    assert method.teacher.vit.count == 5


def test_teacher_starts_as_the_student():
    method = make(THREE)
    student, teacher = method.encoder.state_dict(), method.teacher.state_dict()
    assert list(student) == list(teacher) and any("stems.s1" in k for k in teacher)
    for k in student:
        assert torch.equal(student[k], teacher[k]) and student[k].data_ptr() != teacher[k].data_ptr()


def test_cls_is_never_masked():
    "The student's class token sees exactly the visible patches, and every hidden one is invisible to all it predicts."
    method, batch = make(), fields(4, 16)
    batch.images = method.normalize(batch.images)
    for m in TWO:
        batch.images[m].requires_grad_()
    out = method.predict(batch)
    sum((t * torch.randn(64)).sum() for t in out["cls"].values()).backward()
    for m in TWO:
        touched = F.max_pool2d(batch.images[m].grad.abs().sum(1), 4).flatten(1) > 0
        assert torch.equal(touched, ~out["hidden"][m])
        assert (touched.sum(1) == 4).all()


def test_predictions_do_not_see_hidden_pixels():
    method, batch = make(), fields(4, 16)
    batch.images = method.normalize(batch.images)
    a = method.eval().predict(batch)
    for m in TWO:
        up = a["hidden"][m].view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        batch.images[m] = torch.where(up, torch.randn_like(batch.images[m]), batch.images[m])
    z = method.normalize(batch.images)
    patches = {m: method.encoder.patches(z[m], m) for m in TWO}
    for m in TWO:
        index, _ = visible_tokens(a["hidden"][m], 4)
        b = method.encoder.trunk(method.encoder.tokens(patches[m], m, (4, 4), index))
        torch.testing.assert_close(b[:, 0], a["cls"][m])


def test_scores_are_taken_before_normalisation():
    "Shifting and stretching what the z-scores are made of leaves the masks alone; the values themselves count."
    batch = fields(4, 16)
    method, other = make(), make()
    stats = {m: dict(mean=[10.0] * v.n_bands, std=[3.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[255.0] * v.n_bands) for m, v in TWO.items()}
    other.normalize = Normalize(TWO, stats)
    a, b = (x.masks(batch, x.normalize(batch.images)) for x in (method, other))
    for m in TWO:
        torch.testing.assert_close(a[2][m], b[2][m], atol=0.05, rtol=1e-3)
        assert a[2][m].min() >= 0
        assert (a[0][m] == b[0][m]).float().mean() > 0.95


def test_reconstruction_counts_hidden_tokens_only():
    method, batch = make(), fields(4, 16)
    out = method.predict(batch)
    a = method.losses(**out)["rec"]
    for m in TWO:
        out["pred"][m] = torch.where(out["hidden"][m][..., None], out["pred"][m], 1e3)
    torch.testing.assert_close(method.losses(**out)["rec"], a)


@pytest.mark.parametrize("p", [0.1, 0.7])
@pytest.mark.parametrize("rule", ["complementary", "literal"])
def test_visible_counts_never_break_a_reshape(rule, p):
    method = make(crossmodal=rule, crossmodal_p=dict(start=p))
    terms = method(fields(6, 16))
    assert all(v.isfinite() for v in terms.values())
    hidden = method.masks(fields(6, 16), method.normalize(fields(6, 16).images))[0]["dsm"].sum(1)
    assert (hidden == 12).all() if rule == "complementary" else (hidden >= 12).all()


def test_decoder_follows_the_encoders_width():
    enc = MultiModalViT("vit_tiny_patch16_224", TWO, "rgb", patch_size=8, embed_dim=1024, depth=1, num_heads=16)
    method = MSSDF(enc, make().normalize, fusion_depth=1, decoder_depth=1)
    assert method.width == 512 and method.predict(fields(2, 16))["pred"]["rgb"].shape == (2, 4, 1024)


def test_teacher_tokens_are_without_cls_and_without_gradient():
    out = make().predict(fields(3, 16))
    assert out["target"]["rgb"].shape == (3, 16, 64) and not out["target"]["rgb"].requires_grad


def test_teacher_is_never_in_training_mode():
    method = make()
    method.train()
    assert not any(m.training for m in method.teacher.modules()) and method.encoder.training


def test_alignment_is_not_solved_by_position():
    "After a short training the loss against another image's tokens is far worse; with the published negatives it is not."
    found = {}
    for negatives in ("batch@position", "position@image"):
        method = train(make(negatives=negatives, align_on="all"), 60).eval()
        with torch.no_grad():
            p = method.predict(fields(32, 16, seed=10**6))["pred"]
        loss = functools.partial(dense_infonce, negatives=negatives)
        found[negatives] = loss(p["rgb"], p["dsm"]).item(), loss(p["rgb"], p["dsm"].roll(1, 0)).item()
    right, other = found["batch@position"]
    assert other > right + 2
    right, other = found["position@image"]
    assert other < right + 0.5


def test_alignment_compares_sensors_and_not_the_fusion_with_itself():
    "With the height model of another image the default suffers; the decoder's tokens, which share the fusion, do not notice."
    gap = {}
    for align_on in ("visible", "tile", "all"):
        method = train(make(align_on=align_on), 60).eval()
        batch, swapped = fields(32, 16, seed=10**6), fields(32, 16, seed=10**6)
        swapped.images["dsm"] = swapped.images["dsm"].roll(1, 0)
        with torch.no_grad():
            gap[align_on] = (method(swapped)["align"] - method(batch)["align"]).item()
    assert gap["visible"] > 1 and gap["tile"] > 1 and gap["all"] < 0.5


def test_visible_tokens_meet_on_the_coarser_grid():
    method = make()
    g, to = torch.Generator().manual_seed(0), (2, 2)
    tokens, index = torch.randn(3, 5, 4, generator=g), torch.stack([torch.randperm(16, generator=g)[:5] for _ in range(3)])
    full, there = spread_tokens(tokens, index, None, (4, 4), to)
    for b in range(3):
        for cell in range(4):
            mine = [k for k in range(5) if (index[b, k] // 8) * 2 + index[b, k] % 4 // 2 == cell]
            assert there[b, cell] == bool(mine)
            if mine:
                torch.testing.assert_close(full[b, cell], tokens[b, mine].mean(0))
    assert method.align_on == "visible"


def test_published_variant_has_its_names():
    method = make(published=True)
    assert (method.crossmodal, method.negatives, method.hsic, method.target_norm) == ("literal", "position@image", "none", None)
    assert all(v.isfinite() for v in method(fields(4, 16)).values())
    assert make(published=True, hsic="cka").hsic == "cka"


# --- validity

def test_nodata_has_no_say():
    for mods, size in ((TWO, 16), (THREE, 16), (FOUR, 40)):
        method, batch = make(mods).eval(), fields(4, size, mods, full=False)
        a = method(batch)
        for m in mods:
            batch.images[m] = torch.where(batch.valid[m], batch.images[m], 1e6)
        b = method(batch)
        for k in a:
            assert torch.equal(a[k], b[k]) and a[k].isfinite()


def test_a_missing_modality_leaves_the_other_samples_alone():
    method = make(weights=dict(align=0, hsic=0)).eval()
    batch = fields(4, 16)
    batch.full = False
    batch.valid["dsm"][2] = False
    whole, part = method.predict(batch), method.predict(batch.index(torch.tensor([0, 1, 3])))
    for m in TWO:
        torch.testing.assert_close(whole["pred"][m][[0, 1, 3]], part["pred"][m], atol=1e-5, rtol=1e-4)


def test_full_and_padded_paths_agree():
    for kw in ({}, dict(fusion_depth=0), dict(mask_per_modality=True)):
        method, batch = make(**kw).eval(), fields(4, 16)
        a = method(batch)
        batch.full = False
        b = method(batch)
        for k in a:
            torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=1e-4)


def test_sample_without_any_data():
    method, batch = make(), fields(3, 16)
    batch.full = False
    for m in TWO:
        batch.valid[m][1] = False
    total(method, method(batch)).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


# --- the step

@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kw", [{}, dict(crossmodal="literal", mask="block"), dict(align_on="masked", mask_per_modality=True, hsic="cka", negatives="all")])
def test_no_synchronisation_in_a_step(kw, full):
    method, batch = make(FOUR, **kw), fields(4, 40, FOUR, full=full)
    with ground.NoSync():
        total(method, method(batch)).backward()
        method.update_teacher(0.99)


def test_every_parameter_has_a_gradient():
    for mods, size, kw in ((TWO, 16, {}), (FOUR, 40, {}), (TWO, 16, dict(weights=dict(cls=0, align=0, hsic=0)))):
        method = make(mods, **kw)
        total(method, method(fields(4, size, mods))).backward()
        assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_losses_are_float32_under_autocast():
    method = make()
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(fields(4, 16))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in terms.values())
    total(method, terms).backward()


def test_masks_depend_on_the_tile_alone():
    method, batch = make(), fields(6, 16)
    part = batch.index(torch.tensor([4, 1]))
    a, b = (method.masks(x, method.normalize(x.images))[0] for x in (batch, part))
    for m in TWO:
        assert torch.equal(a[m][[4, 1]], b[m])


def test_two_modalities_complete_each_other_more_and_more():
    method, batch, both = make(), fields(64, 32), []
    for epoch in (0, 30, 60):
        method.set_epoch(epoch)
        h = method.masks(batch, method.normalize(batch.images))[0]
        both.append((~h["rgb"] & ~h["dsm"]).sum().item())
    assert both[0] > both[1] > both[2]


def test_loss_goes_down():
    method, batch = make(), fields(32, 16, seed=10**6)
    before = total(method, method.eval()(batch)).item()
    assert total(method, train(method, 40).eval()(batch)).item() < 0.8 * before


def test_deepcopy_and_state_dict():
    method = make(THREE)
    twin = copy.deepcopy(method)
    other = make(THREE, seed=1)
    other.load_state_dict(method.state_dict())
    batch = fields(4, 16, THREE)
    a = method.eval()(batch)
    for m in (twin, other):
        b = m.eval()(batch)
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kw, says", [
    (dict(mask="blocks"), "unknown mask"), (dict(crossmodal="yes"), "unknown crossmodal"),
    (dict(hsic="no"), "unknown hsic"), (dict(negatives="image"), "unknown negatives"),
    (dict(mask_ratio=1.0), "mask_ratio"), (dict(weights=dict(r=1)), "loss term"),
])
def test_settings_that_mean_nothing(kw, says):
    with pytest.raises(DataError, match=says):
        make(**kw)


def test_batch_of_one():
    with pytest.raises(DataError, match="a batch of one"):
        make()(fields(1, 16))
    assert make(negatives="position@image")(fields(1, 16))["align"].isfinite()


def test_one_modality_alone():
    with pytest.raises(DataError, match="compares modalities"):
        make(dict(rgb=TWO["rgb"]))
    method = make(dict(rgb=TWO["rgb"]), weights=dict(align=0, hsic=0, cls=0))
    assert list(method(fields(2, 16, dict(rgb=TWO["rgb"])))) == ["rec"]


def test_area_pool_keeps_the_mean():
    x = torch.randn(2, 15 * 10, 3)
    for to in ((6, 4), (15, 10), (30, 1), (7, 9)):
        torch.testing.assert_close(area_pool(x, (15, 10), to).mean(1), x.mean(1), atol=1e-6, rtol=1e-5)


def test_pictures():
    method, batch = make(FOUR), fields(4, 40, FOUR, full=False)
    seen = method.visualize(batch)
    assert seen["features"]["s2"].shape == (4, 2, 2, 3) and seen["masks"]["rgb"].shape == (4, 10, 10)
    assert 0 <= seen["features"]["rgb"].min() and seen["features"]["rgb"].max() <= 1 and method.training
    assert torch.equal(pca_rgb(torch.zeros(1, 3, 8)), torch.zeros(1, 3, 3))


# --- two processes

def _two(rank, port, method, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for full in (True, False):
        m = nn.parallel.DistributedDataParallel(copy.deepcopy(method))
        terms = m(fields(8, 16, full=full).index(slice(4 * rank, 4 * rank + 4)))
        total(m.module, terms).backward()
        if rank == 0:
            grads = {n: p.grad for n, p in m.module.named_parameters() if p.grad is not None}
            torch.save(({k: v.item() for k, v in terms.items()}, grads), folder / f"{full}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    method = make()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_two, (port, method, tmp_path), nprocs=2)
    for full in (True, False):
        terms, grads = torch.load(tmp_path / f"{full}.pt")
        method.zero_grad()
        one = method(fields(8, 16, full=full))
        total(method, one).backward()
        for k in one:
            assert abs(one[k].item() - terms[k]) < 1e-4 * max(1, abs(terms[k])), (full, k)
        for n, p in method.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(grads[n], p.grad, atol=2e-5, rtol=1e-3)
