"RSDnet: the trap of BatchNorm, the pairs, the limits of the loss, nodata, bad input."

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_ground import NoSync, sgd_steps, two_processes

from rs_selfsup.callbacks import feature_health
from rs_selfsup.data.augment import Normalize, Normalized
from rs_selfsup.data.loading import Batch
from rs_selfsup.methods.rsdnet import BandEncoder, RSDNet, choose_bands, group_norm
from rs_selfsup.modalities import Band, DataError, Modality, preset
from rs_selfsup.randomness import keys

PAIR = dict(s2=preset("s2_l2a"), s1=preset("s1"))
STILL = dict(area=(1, 1), ratio=(1, 1), flips=False, rot90=False, gain=0, shift=0)


pytestmark = pytest.mark.usefixtures("one_thread")


def statistics(mods):
    return {m: dict(mean=[0.0] * o.n_bands, std=[2.0] * o.n_bands, p01=[-2.0] * o.n_bands, p99=[2.0] * o.n_bands) for m, o in mods.items()}


def fields(n=6, side=16, mods=PAIR, seed=0, full=True, finest=10.0):
    "Smooth random ground, seen by every band with its own gain and noise; radar with the opposite sign."
    g = torch.Generator().manual_seed(seed)
    ground = F.interpolate(torch.randn(n, 1, 5, 5, generator=g), size=side, mode="bicubic")
    images, valid = {}, {}
    for m, o in mods.items():
        s = round(side * finest / o.gsd)
        k = torch.linspace(0.5, 1.5, o.n_bands).view(-1, 1, 1) * (-1 if o.kind == "sar" else 1)
        images[m] = F.interpolate(ground, size=s, mode="area") * k + 0.1 * torch.randn(n, o.n_bands, s, s, generator=g)
        valid[m] = torch.ones(n, 1, s, s, dtype=torch.bool)
    return Batch(Normalized(images), valid, tile=torch.arange(n), key=keys(seed, 0, torch.arange(n)), full=full)


def make(scheme="single", mods=PAIR, anchor="s2", seed=0, **kw):
    torch.manual_seed(seed)
    kw = {**dict(output_stride=8, hidden=64, dim=16), **kw}
    return RSDNet.create("resnet10t", mods, anchor, Normalize(mods, statistics(mods)), scheme=scheme, **kw)


def vision_transformer(patch_size):
    mods = dict(rgb=preset("rgb", 0.5), ms=preset("rgbn", 2.0))
    small = dict(embed_dim=24, depth=1, num_heads=2, img_size=8, hidden=32, dim=8)
    return RSDNet.create("vit_tiny_patch16_224", mods, "rgb", Normalize(mods, statistics(mods)), patch_size=patch_size, **small), mods


# --- both views in one forward

def counted(method, batch):
    "How often each network's first norm runs in a step, on how many images."
    seen = dict(encoder=[], teacher=[])
    hooks = [
        next(m for m in getattr(method, k).modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))).register_forward_pre_hook(
            lambda mod, args, k=k: seen[k].append(len(args[0])))
        for k in seen
    ]
    method.compare(method.views(batch)[0])
    for h in hooks:
        h.remove()
    return seen


def test_each_network_sees_both_views_in_one_forward():
    assert counted(make(), fields(6)) == dict(encoder=[12], teacher=[12])


def test_two_forwards_hide_the_scale_of_a_sensor_and_one_does_not():
    enc = BandEncoder("resnet10t", PAIR, "s2", output_stride=8).train()
    a = torch.randn(8, 1, 16, 16)
    gap = lambda y, z: ((y - z).norm() / z.norm()).item()
    stats = copy.deepcopy(enc)
    leak = gap(enc(a, "s2"), enc(4 * a, "s1"))
    first = lambda e: next(m for m in e.modules() if isinstance(m, nn.BatchNorm2d)).running_var
    one, two = copy.deepcopy(stats), copy.deepcopy(stats)
    one(a, "s2"), two(4 * a, "s1")
    assert leak < 1e-3 < 0.1 < gap(*enc(torch.cat([a, 4 * a]), "s2").chunk(2))
    torch.testing.assert_close(first(two) - 0.9, 16 * (first(one) - 0.9), atol=1e-4, rtol=1e-3)     # the statistics know the sensor
    assert gap(enc.eval()(a, "s2"), enc(4 * a, "s1")) > 0.1         # and evaluation has only one set of them


def test_views_share_their_batch_statistics():
    method = make()
    (x, y), _, _ = method.views(fields())
    x.requires_grad_()
    both = method.encoder.pooled(torch.cat([x, y]))
    both[len(x):].sum().backward()
    assert x.grad.abs().max() > 0                                   # the second view's features know the first
    group = make(norm="group")
    x.grad = None
    group.encoder.pooled(torch.cat([x, y]))[len(x):].sum().backward()
    assert x.grad.abs().max() == 0


def test_group_norm_keeps_weights_and_activations():
    net = nn.Sequential(nn.Conv2d(1, 48, 3), nn.BatchNorm2d(48))
    net[1].weight.data.uniform_()
    w = net[1].weight
    group_norm(net)
    assert isinstance(net[1], nn.GroupNorm) and net[1].num_groups == 16 and net[1].weight is w
    enc = BandEncoder("efficientnet_b0", PAIR, "s2", norm="group")
    acts = [m for m in enc.modules() if type(m).__name__ == "GroupNormAct"]
    assert acts and any(isinstance(m.act, nn.SiLU) for m in acts)


# --- pairs

def test_cross_pairs_always_cross():
    for scheme in ("single", "three"):
        method = make(scheme)
        kind = torch.tensor([method.encoder.modalities[c.modality].kind == "sar" for c in method.encoder.table])
        u, v = method.draw(keys(3, 1, torch.arange(5000)))
        assert not kind[u].any() and kind[v].all()


def test_share_of_cross_pairs_in_the_union():
    method = make(pairs="union")
    u, v = method.draw(keys(1, 0, torch.arange(30000)))
    sar = torch.tensor([c.modality == "s1" for c in method.encoder.table])
    p = 2 * (10 / 12) * (2 / 12)
    share = (sar[u] != sar[v]).float().mean().item()
    assert abs(p - 0.278) < 1e-3 and abs(share - p) < 3 * (p * (1 - p) / 30000) ** 0.5
    # the two draws know nothing of each other: each of 144 pairs is as likely
    counts = (u * 12 + v).flatten().bincount(minlength=144)
    chi2 = ((counts - 30000 / 144) ** 2 / (30000 / 144)).sum().item()
    assert chi2 < 143 + 4 * (2 * 143) ** 0.5


def test_three_are_different_uniform_and_in_order():
    method = make("three", sensors=["s2"])
    u, v = method.draw(keys(0, 0, torch.arange(24000)))
    assert (u.diff(dim=1) > 0).all() and (v.diff(dim=1) > 0).all() and not torch.equal(u, v)
    n = torch.unique(u, dim=0, return_counts=True)[1]
    assert len(n) == 120 and ((n - 200).abs() < 5 * 200**0.5).all()


def test_a_draw_belongs_to_its_tile_alone():
    method, key = make(), keys(0, 2, torch.arange(40))
    for a, b in zip(method.draw(key), method.draw(key[[7, 31]])):
        assert torch.equal(a[[7, 31]], b)
    assert not torch.equal(method.draw(key)[0], method.draw(keys(0, 3, torch.arange(40)))[0])


# --- views

def test_a_view_of_the_whole_tile_is_the_band():
    method, batch = make(crops="same", **STILL), fields()
    (x, y), _, (u, v) = method.views(batch)
    for i in range(len(batch)):
        c, d = method.encoder.table[u[i]], method.encoder.table[v[i]]
        torch.testing.assert_close(x[i, 0], batch.images[c.modality][i, c.i], atol=1e-4, rtol=0)
        torch.testing.assert_close(y[i, 0], batch.images[d.modality][i, d.i], atol=1e-4, rtol=0)


def test_finer_sensors_are_averaged_to_the_coarser_grid():
    mods = dict(s2=preset("s2_l2a"), s1=preset("s1", 2.0))
    batch = fields(4, 16, mods)
    method = make(mods=mods, anchor="s1", crops="same", **STILL)
    (x, y), _, (_, v) = method.views(batch)
    assert batch.images["s1"].shape[-1] == 80 and x.shape == y.shape == (4, 1, 16, 16)
    for i in range(4):
        c = method.encoder.table[v[i]]
        torch.testing.assert_close(y[i, 0], F.avg_pool2d(batch.images["s1"][i, c.i][None], 5)[0], atol=1e-4, rtol=0)


def test_same_crops_show_the_same_ground_and_independent_ones_do_not():
    mods = dict(s2=preset("s2_l2a"), s1=preset("s1"))
    batch = fields(8, 24, mods)
    ground = batch.images["s2"][:, 3:4]
    batch.images = Normalized({m: ground.repeat(1, o.n_bands, 1, 1) for m, o in mods.items()})
    for crops, equal in (("same", True), ("independent", False)):
        (x, y), _, _ = make(crops=crops, gain=0, shift=0).views(batch)
        assert torch.allclose(x, y, atol=1e-5) == equal


def test_radar_is_never_relit():
    batch = fields(8, 16)
    for db, moved in ((0, False), (2, True)):
        (_, y), _, _ = make(crops="same", **{**STILL, "gain": 0.4, "shift": 0.4, "db": db}).views(batch)
        (x0, y0), _, _ = make(crops="same", **STILL).views(batch)
        d = y - y0
        assert (d.abs().max() > 0.1) == moved
        torch.testing.assert_close(d, d[:, :, :1, :1].expand_as(d), atol=1e-4, rtol=0)   # an offset, and nothing else
        assert d.abs().max() <= 2 / 2 + 1e-4                                            # 2 dB of a deviation of 2 dB


# --- the loss

def test_identical_views_and_an_identity_cost_nothing():
    method = make()
    method.predictor = nn.Identity()
    x = fields().images["s2"][:, :1]
    assert method.compare([x, x])["byol"].abs() < 1e-4
    assert method.compare([x, -x.flip(0)])["byol"] > 1e-3


def test_the_loss_is_the_sum_of_both_directions():
    method = make().eval()
    x, _, _ = method.views(fields())
    f = lambda e, p, v: p(e.pooled(v))
    p = [method.predictor(f(method.encoder, method.projector, v)) for v in x]
    z = [f(method.teacher, method.teacher_projector, v) for v in x]
    want = sum((2 - 2 * F.cosine_similarity(a, b)).mean() for a, b in zip(p, z[::-1]))
    torch.testing.assert_close(method.compare(x)["byol"], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(method.compare(x)["byol"], method.compare(x[::-1])["byol"], atol=1e-5, rtol=1e-5)


def test_against_lightly():
    lightly = pytest.importorskip("lightly.loss")
    method = make().eval()
    x, _, _ = method.views(fields())
    p = [method.predictor(method.projector(method.encoder.pooled(v))) for v in x]
    z = [method.teacher_projector(method.teacher.pooled(v)) for v in x]
    cosine = lightly.NegativeCosineSimilarity()
    torch.testing.assert_close(method.compare(x)["byol"], 4 + 2 * (cosine(p[0], z[1]) + cosine(p[1], z[0])), atol=1e-5, rtol=1e-5)


def test_the_target_gets_no_gradient_and_has_no_predictor():
    method = make()
    method(fields())["byol"].backward()
    assert set(method.teachers) == {"teacher", "teacher_projector"} and not hasattr(method, "teacher_predictor")
    assert all(p.grad is None and not p.requires_grad for k in method.teachers for p in getattr(method, k).parameters())
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_moving_average_with_buffers():
    method = make()
    for p in method.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p)
    method(fields())
    before = copy.deepcopy(method.teacher)
    method.update_teacher(0.9)
    for t, b, s in zip(method.teacher.parameters(), before.parameters(), method.encoder.parameters()):
        torch.testing.assert_close(t, 0.9 * b + 0.1 * s, atol=1e-5, rtol=1e-5)
    # BatchNorm of the teacher has statistics of its own; all other buffers are the student's
    norms = lambda net: [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for t, b, s in zip(norms(method.teacher), norms(before), norms(method.encoder)):
        assert torch.equal(t.running_mean, b.running_mean) and not torch.equal(t.running_mean, s.running_mean)
        assert t.num_batches_tracked == s.num_batches_tracked == 1
    three = make("three")
    three.encoder.std_s1.fill_(7)
    three.update_teacher(0.9)
    assert (three.teacher.std_s1 == 7).all()


def test_a_repeated_band_is_one_band_with_the_summed_kernel():
    three, one = (BandEncoder("resnet10t", PAIR, "s2", channels=c, output_stride=8).eval() for c in (3, 1))
    state = {k: v.sum(1, keepdim=True) if v.shape != one.state_dict()[k].shape else v for k, v in three.state_dict().items() if k in one.state_dict()}
    one.load_state_dict(state)
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(three(x.expand(-1, 3, -1, -1), "s2"), one(x, "s2"), atol=1e-4, rtol=1e-4)


def train(method, steps=40, lr=1e-3, **kw):
    opt, log = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr), []
    for i in range(steps):
        loss = method.train()(fields(16, 16, seed=i))["byol"]
        loss.backward()
        opt.step()
        opt.zero_grad()
        method.update_teacher(0.95)
        log.append(loss.item())
    return log


def test_it_learns_and_does_not_collapse():
    method = make(crops="same")
    log = train(method)
    assert sum(log[-10:]) < 0.7 * sum(log[:10])
    b = fields(64, 16, seed=10**6)
    y = method.encoder.eval().features(b.images)
    spread, rank, _ = feature_health(y).tolist()
    assert spread > 0.02 and rank > 1.25
    flat = feature_health(y.mean(0) + 1e-4 * torch.randn_like(y))[0].item()
    assert flat < 0.01                                              # what a collapse would look like


# --- nodata

def test_invalid_pixels_do_not_matter():
    for kw in (dict(crops="same"), {}, dict(pairs="union")):
        method = make(**kw)
        out = []
        for fill in (0.0, 1e6):
            b = fields(full=False)
            b.valid["s2"][0, :, :, :9] = False
            b.valid["s1"][1] = False
            b.images = {m: (2 * b.images[m]).masked_fill(~b.valid[m], fill) for m in PAIR}     # stored values
            out.append(method(b)["byol"])
        assert torch.equal(*out) and out[0].isfinite()


def test_pairs_without_common_ground_do_not_count():
    method = make(crops="same", **STILL)
    b = fields(full=False)
    b.valid["s2"][0, ..., :8], b.valid["s1"][0, ..., 8:] = False, False
    x, ok, _ = method.views(b)
    assert [o[0].any().item() for o in ok] == [False, False] and ok[0][1:].all()
    for m in PAIR:
        b.valid[m][:] = False
    loss = method(b)["byol"]
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_full_and_masked_paths_agree():
    method, a, b = make(), fields(), fields(full=False)
    torch.testing.assert_close(method(a)["byol"], method(b)["byol"], atol=1e-5, rtol=1e-4)


# --- whole tiles

def test_features_are_the_mean_over_bands_and_any_size_will_do():
    enc = make().encoder.eval()
    for side in (16, 20):
        b = fields(3, side)
        each, real = enc.look_features(b.images)
        assert each.shape == (3, 12, enc.embed_dim) and real.all()
        torch.testing.assert_close(enc.features(b.images), each.mean(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(enc.features(b.images, pool="concat"), each.flatten(1))
        b.valid["s1"][:] = False
        torch.testing.assert_close(enc.features(b.images, b.valid), enc.features(b.images, modality="s2"), atol=1e-4, rtol=1e-4)


def test_a_mean_over_a_padded_tile_leaves_the_padding_out():
    enc = BandEncoder("resnet10t", PAIR, "s2", output_stride=8).eval()
    x = torch.ones(1, 1, 8, 12)
    enc.feature_map = lambda x, mod: F.avg_pool2d(x, 8)
    y, _ = enc.look_features(dict(s2=x.expand(1, 12, 8, 12), s1=x.expand(1, 2, 8, 12)), None, [(0,)])
    torch.testing.assert_close(y.flatten(), torch.tensor([(1 + 0.5 * 0.5) / 1.5]))


def test_fresh_and_on():
    enc = make("three").encoder
    twin = enc.fresh()
    assert [(k, v.shape) for k, v in twin.state_dict().items()] == [(k, v.shape) for k, v in enc.state_dict().items()]
    assert not torch.equal(*(next(e.net.parameters()) for e in (enc, twin))) and twin.table == enc.table
    assert torch.equal(twin.std_s1, enc.std_s1) and (enc.std_s1 == 2).all()
    ms = make(sensors=["s2"]).encoder
    wide = ms.on(PAIR)
    assert list(ms.modalities) == ["s2"] and list(wide.modalities) == ["s2", "s1"] and wide.net is ms.net


def test_group_norm_survives_fresh():
    enc = make(norm="group").encoder
    assert not any(isinstance(m, nn.BatchNorm2d) for m in enc.fresh().modules())


# --- the step

@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kw", [{}, dict(scheme="three", crops="same")])
def test_no_synchronisation_in_a_step(kw, full):
    method, batch = make(**kw), fields(full=full)
    with NoSync():
        method(batch)["byol"].backward()
        method.update_teacher(0.99)


def test_float32_under_autocast():
    method = make()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(fields())["byol"]
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()


def test_state_dict_round_trip():
    a, b = make("three"), make("three", seed=1)
    b.load_state_dict(a.state_dict())
    batch = fields()
    assert torch.equal(a.eval()(batch)["byol"], b.eval()(batch)["byol"])


def test_pictures():
    method, batch = make("three"), fields(3, 20)
    seen = method.visualize(batch)
    assert seen["features"]["s2"].shape == (3, 3, 3, 3) and not seen["masks"]["s1"].any() and method.training
    assert seen["drawn"][1] == ["s1 VV+VH+VV-VH"] * 3 and seen["views"][0].shape == (3, 3, 16, 16)


# --- bad input

def test_settings_that_mean_nothing():
    landsat = dict(a=preset("landsat8"), b=preset("s2_20m"))
    power = dict(s2=PAIR["s2"], s1=Modality("s1", [Band("VV", "power"), Band("VH", "power")], 10.0, "sar"))
    for says, f in {
        "B04 is the only band": lambda: make(sensors=["s2"], bands=dict(s2=["B04"])),
        "needs an optical and a radar modality": lambda: make(sensors=["s2"], pairs="cross"),
        "cannot be drawn from": lambda: make("three", bands=dict(s1=["VV"])),
        "unknown scheme": lambda: make("two"),
        "unknown pairs": lambda: make(pairs="both"),
        "unknown crops": lambda: make(crops="one"),
        "unknown norm": lambda: make(norm="layer"),
        "unknown loss term": lambda: make(weights=dict(rec=1)),
        "unknown modality": lambda: make(sensors=["sar"]),
        "unknown band": lambda: make(bands=dict(s2=["B10"])),
        "no common grid": lambda: make(mods=landsat, anchor="b"),
        "difference in dB only": lambda: make("three", mods=power),
        "sees no single bands": lambda: RSDNet(nn.Linear(2, 2), Normalize(PAIR, statistics(PAIR))),
        "has no patch size to choose": lambda: make(patch_size=16),
        "Choose a multiple of 4 px": lambda: vision_transformer(6),
        "holds heights": lambda: choose_bands(dict(PAIR, dsm=preset("dsm", 10.0)), ["s2", "dsm"]),
        "no optical or radar band": lambda: make(mods=dict(dsm=preset("dsm", 10.0)), anchor="dsm"),
    }.items():
        with pytest.raises(DataError, match=says):
            f()


def test_batches_that_cannot_be_used():
    method = make()
    with pytest.raises(DataError, match="a batch of one"):
        method(fields(1))
    with pytest.raises(DataError, match="smaller than the stride of 8 px"):
        method.views(fields(2, 6))
    with pytest.raises(DataError, match="Choose 8"):
        make(size=12).views(fields(2, 16))
    only = fields(2)
    only.images = Normalized(s2=only.images["s2"])
    with pytest.raises(DataError, match="the batch has no 's1'"):
        method(only)
    torn = fields(2)
    torn.images = Normalized(s2=torn.images["s2"], s1=torn.images["s1"][..., :8, :8])
    with pytest.raises(DataError, match="same ground"):
        method(torn)


@pytest.mark.parametrize("scheme", ["single", "three"])
def test_an_exported_encoder_knows_its_bands(scheme, tmp_path):
    "What comes back from the file sees the bands of the one that was written, and says the same of a tile."
    from rs_selfsup.export import export_encoder, load_encoder

    norm = "group" if scheme == "three" else "batch"
    method = make(scheme, norm=norm).eval()
    path = export_encoder(method.encoder, tmp_path / "e.safetensors", "all")
    back = load_encoder(path)
    assert type(back) is BandEncoder and back.bands == method.encoder.bands and back.norm == norm
    batch = fields(n=2)
    with torch.no_grad():
        torch.testing.assert_close(back.features(batch.images), method.encoder.features(batch.images))


def test_a_vision_transformer_sees_patches_of_the_common_grid(tmp_path):
    from rs_selfsup.export import export_encoder, load_encoder

    method, mods = vision_transformer(8)
    batch = fields(4, 32, mods, finest=0.5)
    assert method.encoder.stride == 2 and method.views(batch)[0][0].shape[-2:] == (8, 8)  # 8 px of 0.5 m are 2 px of 2 m
    loss = sum(method(batch).values())
    loss.backward()
    assert loss.isfinite() and method.encoder.switch.convs["shared"].weight.grad.abs().sum() > 0
    back = load_encoder(export_encoder(method.encoder, tmp_path / "e.safetensors", "all"))
    z = method.normalize(batch.images, None)
    torch.testing.assert_close(back.eval().features(z), method.encoder.eval().features(z))


# --- pitfalls of its data and of BYOL

def test_pitfall_the_60_m_bands_are_left_out_by_name():
    "One list in circulation drops B12 and keeps B10; another counts bands from one."
    want = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
    for name in ("s2_l1c", "s2_l2a"):
        assert choose_bands(dict(s2=preset(name)))["s2"] == want
    assert choose_bands(PAIR)["s1"] == ["VV", "VH"]


def test_pitfall_bands_are_found_by_name_wherever_they_lie():
    "EuroSAT keeps B8A last: a network asked by name gives what it gave."
    method, batch = make(), fields(3)
    bands = list(PAIR["s2"].bands)
    order = [i for i, b in enumerate(bands) if b.name != "B8A"] + [i for i, b in enumerate(bands) if b.name == "B8A"]
    moved = dict(PAIR, s2=Modality("s2", [bands[i] for i in order], 10.0, "optical"))
    enc = method.encoder.eval()
    there = enc.on(moved, method.encoder.bands)
    images = Normalized(dict(batch.images, s2=batch.images["s2"][:, order]))
    assert [enc.look_name(l) for l in enc.looks()] == [there.look_name(l) for l in there.looks()] and order != sorted(order)
    torch.testing.assert_close(there.features(images, pool="concat"), enc.features(batch.images, pool="concat"), atol=1e-5, rtol=1e-4)


def test_pitfall_radar_keeps_its_sign():
    "A division by -25 makes water bright: more dB must stay more."
    method, batch = make(crops="same", **STILL), fields(4)
    stored = torch.linspace(-25, 0, 16).expand(4, 2, 16, 16)
    batch.images = dict(s2=batch.images["s2"], s1=stored)
    y = method.views(batch)[0][1]
    torch.testing.assert_close(y, (stored / 2)[:, :1], atol=1e-4, rtol=1e-4)                # deviation 2 dB, mean 0
    assert (y.diff(dim=3) > 0).all()


def test_pitfall_ratio_of_polarisations_is_a_difference_in_db():
    torch.manual_seed(0)
    stats = statistics(PAIR)
    stats["s1"].update(mean=[-11.0, -18.0], std=[3.0, 5.0])
    norm = Normalize(PAIR, stats)
    enc = RSDNet.create("resnet10t", PAIR, "s2", norm, scheme="three", output_stride=8, hidden=64, dim=16).encoder
    db = torch.randn(2, 2, 8, 8) * 4 - 15
    at = next(i for i, c in enumerate(enc.table) if c.minus is not None)
    x, _ = enc.stack(norm(dict(s2=torch.zeros(2, 12, 8, 8), s1=db)))
    torch.testing.assert_close(x[:, at], (db[:, 0] - db[:, 1] - (-11 + 18)) / 4, atol=1e-5, rtol=1e-4)


def test_pitfall_a_data_set_without_radar_can_be_asked():
    "EuroSAT has none: an encoder of both sensors gives what it gives for the optical bands."
    method, batch = make(), fields(3)
    alone = method.encoder.eval().on(dict(s2=PAIR["s2"]))
    only = Normalized(s2=batch.images["s2"])
    assert len(alone.looks()) == 10
    torch.testing.assert_close(alone.features(only), method.encoder.features(batch.images, modality="s2"), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone.features(only), method.encoder.features(only), atol=1e-5, rtol=1e-4)


def test_pitfall_the_encoder_is_not_told_which_band_it_sees():
    "One picture under twelve names has one feature: what tells bands apart must be in the pixels."
    enc, x = make().encoder.eval(), torch.randn(2, 1, 16, 16)
    y, real = enc.look_features({m: x.expand(-1, o.n_bands, -1, -1) for m, o in PAIR.items()})
    assert y.shape[1] == 12 and real.all()
    torch.testing.assert_close(y, y[:, :1].expand_as(y), atol=1e-5, rtol=1e-4)


def test_pitfall_weights_of_a_colour_network_are_summed_over_the_colours():
    enc = BandEncoder("resnet10t", PAIR, "s2", output_stride=8)
    w = torch.randn(enc.switch.convs["shared"].weight.shape[0], 3, *enc.switch.convs["shared"].weight.shape[2:])
    enc.adapt(w)
    torch.testing.assert_close(enc.switch.convs["shared"].weight, w.sum(1, keepdim=True))


def test_pitfall_no_norm_and_no_rectifier_on_what_is_compared():
    method = make()
    for head in (method.projector, method.predictor):
        assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"] and head[-1].bias is not None
    assert method.projector[0].in_features == method.encoder.embed_dim and method.predictor[0].in_features == method.projector[-1].out_features


def test_pitfall_the_target_is_a_network_of_its_own():
    "In a library of good name, target and online network were one object."
    method, batch = make(), fields()
    pairs = [(getattr(method, t), getattr(method, s)) for t, s in method.teachers.items()]
    assert not {p.data_ptr() for t, _ in pairs for p in t.parameters()} & {p.data_ptr() for _, s in pairs for p in s.parameters()}
    before = [p.clone() for t, _ in pairs for p in t.parameters()]
    opt = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    method(batch)["byol"].backward()
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, (p for t, _ in pairs for p in t.parameters())))
    x = method.eval().views(batch)[0]
    for part in (method.teacher, method.teacher_projector):         # each has a part in the target
        was = method.compare(x)["byol"]
        for p in part.parameters():
            p.data += 0.1 * torch.randn_like(p)
        assert (method.compare(x)["byol"] - was).abs() > 1e-5


def test_pitfall_a_target_with_statistics_of_the_batch():
    "Both networks normalise by the batch while they train, and neither when asked."
    method, (x, y) = make(), torch.randn(2, 6, 1, 16, 16).unbind()
    for train in (True, False):
        method.train(train)
        for net in (method.encoder, method.teacher):
            a, b = (net.pooled(torch.cat([x, z]))[:6] for z in (y, 3 * y))
            assert torch.allclose(a, b, atol=1e-5) != train


def test_pitfall_missing_radar_may_be_nan():
    method, out = make(crops="same"), []
    for fill in (0.0, math.nan):
        b = fields(full=False)
        b.valid["s1"][0, :, :, :5], b.valid["s2"][2] = False, False
        b.images = {m: b.images[m].masked_fill(~b.valid[m], fill) for m in PAIR}
        out.append(method(b)["byol"])
    assert torch.equal(*out) and out[0].isfinite()


# --- two processes

DDP = dict(batch={}, group=dict(norm="group"), three=dict(scheme="three", crops="same"))


def _two(rank, folder):
    for name, kw in DDP.items():
        part, method = slice(4 * rank, 4 * rank + 4), make(**kw)
        with torch.no_grad():
            still = copy.deepcopy(method).eval()(fields(8, full=False).index(part))["byol"]
        torch.save((still, *sgd_steps(method.train(), [fields(8, seed=i).index(part) for i in range(3)])), folder / f"{name}{rank}.pt")
    with pytest.raises(DataError, match="a batch of one"):          # nobody to normalise with, though the other process has an image
        method(fields(1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(_two, folder)
    return {name: [torch.load(folder / f"{name}{r}.pt") for r in (0, 1)] for name in DDP}


@pytest.mark.parametrize("name", DDP)
def test_two_processes_have_the_same_losses_and_weights(name, ranks):
    (_, a, s), (_, b, t) = ranks[name]
    own = ("running_mean", "running_var")                           # of its own tiles, until the next forward takes the first process's
    assert torch.equal(a, b) and all(torch.equal(v, t[k]) for k, v in s.items() if not k.endswith(own))
    norms = {k for k, v in s.items() if k.endswith(own) and not torch.equal(v, t[k])}
    assert any("projector" in k for k in norms) and any("encoder.net" in k for k in norms) == (name != "group")


@pytest.mark.parametrize("name", DDP)
def test_two_processes_are_one_but_for_the_statistics_of_their_norms(name, ranks):
    "Evaluated, the loss is that of the whole batch; in training, the mean over two that normalise by themselves."
    method = make(**DDP[name])
    with torch.no_grad():
        for still, *_ in ranks[name]:
            torch.testing.assert_close(still, copy.deepcopy(method).eval()(fields(8, full=False))["byol"], atol=1e-5, rtol=1e-5)
        halves = [copy.deepcopy(method).train()(fields(8).index(slice(i, i + 4)))["byol"] for i in (0, 4)]
        torch.testing.assert_close(ranks[name][0][1][0, 0], sum(halves) / 2, atol=1e-5, rtol=1e-5)
        assert (method.train()(fields(8))["byol"] - sum(halves) / 2).abs() > 1e-4
