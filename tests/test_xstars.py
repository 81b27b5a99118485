"X-STARS: one test per defect of the published code, and the promises of the page."

import copy
import math

import pytest
import torch
import toy_ground as ground
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rs_selfsup import export
from rs_selfsup.backbones import create_encoder
from rs_selfsup.data.augment import Normalize
from rs_selfsup.data.loading import dataloaders
from rs_selfsup.encoders import MultiModalViT
from rs_selfsup.export import export_encoder, load_encoder
from rs_selfsup.losses.distillation import koleo
from rs_selfsup.losses.msad import msad
from rs_selfsup.methods.xstars import XSTARS, Looked, cross_sensor_retrieval, look, meet, recall_at_1, turns
from rs_selfsup.modalities import Band, DataError, Modality, preset

TWO = dict(rgb=preset("rgb", 0.5), nir=preset("nir", 0.5))
THREE = dict(TWO, spot=preset("rgbn", 1.5))
COARSE = dict(rgb=preset("rgb", 0.5), s2=preset("s2_l2a", 10.0))
SMALL = dict(prototypes=64, head_hidden=32, bottleneck=16, project=16, project_hidden=32, n_local=2, freeze_last=0)


pytestmark = pytest.mark.usefixtures("one_thread")


def fields(n, size, mods=TWO, **kw):
    return ground.fields(n, size, mods, **kw)


def normalizer(mods):
    return Normalize(mods, {m: dict(mean=[128.0] * v.n_bands, std=[50.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[255.0] * v.n_bands) for m, v in mods.items()})


def encoder(mods=TWO, patch=4, seed=0, anchor=None, **kw):
    torch.manual_seed(seed)
    kw = {**dict(embed_dim=32, depth=2, num_heads=4), **kw}
    return MultiModalViT("vit_tiny_patch16_224", mods, anchor or next(iter(mods)), patch_size=patch, **kw)


def make(mods=TWO, seed=0, patch=4, store=None, **kw):
    enc = kw.pop("encoder", None) or encoder(mods, patch, seed)
    torch.manual_seed(seed)
    return XSTARS(enc, normalizer(store or mods), **{**SMALL, **kw})


def total(method, terms):
    return sum(method.weights[k] * v for k, v in terms.items())


def train(method, steps, mods=TWO, size=16, n=16):
    opt = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)
    for i in range(steps):
        total(method, method.train()(fields(n, size, mods, seed=i))).backward()
        opt.step()
        opt.zero_grad()
        method.update_teacher(0.99)
    return method


# --- defects of the published code, numbered as in its review

def test_defect_1_msad_has_a_gradient():
    "The release gathers its terms by torch.tensor, which cuts the graph"
    for kw in ({}, dict(teacher_side=True), dict(targets="soft", label_smoothing=0.3), dict(include_cls=True)):
        method = make(THREE, patch=6, weights=dict(dino=0), **kw).train()
        loss = method(fields(4, 24, THREE))
        assert list(loss) == ["msad"] and loss["msad"].requires_grad
        loss["msad"].backward()
        for m in THREE:
            assert method.encoder.stems[m].proj.weight.grad.abs().sum() > 0
            assert all(p.grad.abs().sum() > 0 for p in method.msad_heads[m].parameters())
        assert all(b.attn.qkv.weight.grad.abs().sum() > 0 for b in method.encoder.vit.blocks)


def test_defect_1_and_the_loss_falls():
    method = make(weights=dict(dino=0), seed=1)
    before = method.eval()(fields(16, 16, seed=99))["msad"].item()
    after = train(method, 30).eval()(fields(16, 16, seed=99))["msad"].item()
    assert after < 0.6 * before


def test_defect_2_heads_are_trained_and_saved():
    method = make(THREE, patch=6)
    names = {n for n, _ in method.named_parameters() if n.startswith("msad_heads.")}
    assert len(names) == 3 * 4 and names <= set(method.state_dict())
    before = {n: p.clone() for n, p in method.named_parameters()}
    train(method, 2, THREE, 24, 4)
    assert all((method.get_parameter(n) != before[n]).any() for n in names)
    other = make(THREE, patch=6, seed=5)
    other.load_state_dict(method.state_dict())
    batch = fields(4, 24, THREE)
    assert torch.equal(method.eval()(batch)["msad"], other.eval()(batch)["msad"])


def test_defect_2_one_head_for_each_sensor_whatever_the_pair():
    method, used = make(THREE, patch=6).eval(), []
    for m, head in method.msad_heads.items():
        head.register_forward_hook(lambda mod, args, out, m=m: used.append(m))
    method._msad(*method._inputs(fields(4, 24, THREE)))
    assert used == ["rgb", "nir", "rgb", "spot", "nir", "spot"]
    assert len({id(h) for h in method.msad_heads.values()}) == 3


def test_defect_3_and_4_cosines_with_a_real_temperature():
    "The length of the projections does not matter, and soft targets are not one-hot"
    method, batch = train(make(weights=dict(dino=0)), 15).eval(), fields(8, 16, seed=99)
    a = method(batch)["msad"]
    for head in method.msad_heads.values():
        for p in head[-1].parameters():
            p.data *= 30
    torch.testing.assert_close(method(batch)["msad"], a, rtol=1e-4, atol=1e-5)
    method.targets = "soft"
    assert (method(batch)["msad"] - a).abs() > 0.01


def timm_state(enc, m="rgb", size=(16, 16)):
    return {k: v.clone().contiguous() for k, v in enc.timm_state(m, size).items()}


def test_defect_5_checkpoints_load_or_fail_loudly(tmp_path):
    "The release loads MAE weights under wrong names with strict=False: nothing arrives, and nobody is told"
    rgb, store = dict(rgb=TWO["rgb"]), TWO
    src = encoder(rgb, seed=7)
    save_file(timm_state(src), tmp_path / "timm.safetensors")
    kw = dict(store=store, anchor_sensors=["rgb"])
    method = make(encoder=encoder(dict(nir=TWO["nir"])), continual_from=tmp_path / "timm.safetensors", **kw)
    for e in (method.encoder, method.teacher, method.anchor_encoder):
        for k, v in src.vit.state_dict().items():
            assert torch.equal(e.vit.state_dict()[k], v), k
    assert torch.equal(method.anchor_encoder.stems["rgb"].proj.weight, src.stems["rgb"].proj.weight)
    torch.testing.assert_close(method.encoder.stems["nir"].proj.weight, src.stems["rgb"].proj.weight.mean(1, keepdim=True) * 3)
    save_file({k.replace("blocks", "layers"): v for k, v in timm_state(src).items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(DataError, match="do not fit"):
        make(encoder=encoder(dict(nir=TWO["nir"])), continual_from=tmp_path / "wrong.safetensors", **kw)
    with pytest.raises(DataError, match="do not fit"):
        make(encoder=encoder(dict(nir=TWO["nir"]), depth=3), continual_from=tmp_path / "timm.safetensors", **kw)
    with pytest.raises(DataError, match="does not say which sensor"):
        make(encoder=encoder(dict(nir=TWO["nir"])), continual_from=tmp_path / "timm.safetensors", store=store)


@pytest.mark.skipif(not hasattr(export, "read_checkpoint"), reason="init_encoder reads safetensors only so far")
@pytest.mark.parametrize("kind", ["dino", "dino_full", "mae"])
def test_defect_5_published_layouts(tmp_path, kind):
    "Checkpoints as DINO and MAE write them: pickled, with prefixes, extra heads and a decoder"
    src = encoder(dict(rgb=TWO["rgb"]), seed=7)
    state = timm_state(src)
    if kind == "dino_full":
        one = {**{f"module.backbone.{k}": v for k, v in state.items()}, "module.head.mlp.0.weight": torch.zeros(4, 4)}
        state = dict(student=one, teacher={k.replace("module.", ""): v for k, v in one.items()}, epoch=3)
    if kind == "mae":
        state = dict(model={**state, "mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)})
    torch.save(state, tmp_path / "ckpt.pth")
    method = make(encoder=encoder(dict(nir=TWO["nir"])), store=TWO, anchor_sensors=["rgb"], continual_from=tmp_path / "ckpt.pth")
    for e in (method.encoder, method.teacher, method.anchor_encoder):
        for k, v in src.vit.state_dict().items():
            assert torch.equal(e.vit.state_dict()[k], v), k


def continual(tmp_path, **kw):
    old = encoder(dict(rgb=TWO["rgb"]), seed=7, drop_path_rate=0.5)
    file = export_encoder(old, tmp_path / "rgb.safetensors", "all", normalize=normalizer(TWO))
    return make(encoder=encoder(dict(nir=TWO["nir"]), drop_path_rate=0.5), store=TWO, continual_from=file, **kw), load_encoder(file)


def test_defect_6_the_frozen_anchor_is_deterministic(tmp_path):
    method, old = continual(tmp_path)
    batch = fields(8, 16)
    z = method.normalize(batch.images)
    method.train()
    a, b = (method.look_at("rgb", z["rgb"]).places for _ in range(2))
    assert torch.equal(a, b) and torch.equal(a, look(old, z["rgb"], "rgb").places) and not a.requires_grad
    assert not torch.equal(*(method.look_at("nir", z["nir"]).places for _ in range(2)))
    assert not any(m.training for m in method.anchor_encoder.modules())
    before = copy.deepcopy(method.anchor_encoder.state_dict())
    train(method, 3)
    assert all(torch.equal(v, before[k]) for k, v in method.anchor_encoder.state_dict().items())
    assert not {id(p) for p in method.anchor_encoder.parameters()} & {id(p) for p in method.parameters() if p.requires_grad}


def test_defect_7_normalised_once():
    "Stored values and z-scores of them give the same losses"
    method, batch = make().eval(), fields(4, 16)
    a = method(batch)
    batch.images = method.normalize(batch.images)
    b = method(batch)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_defect_8_only_the_asked_sensors_are_needed():
    method, batch = make(THREE, patch=6, sensors=["rgb", "spot"]).train(), fields(4, 24, THREE)
    del batch.images["nir"], batch.valid["nir"]
    total(method, method(batch)).backward()
    assert method.needed == ["rgb", "spot"] and set(method.msad_heads) == {"rgb", "spot"}
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())
    assert not method.encoder.stems["nir"].proj.weight.requires_grad
    del batch.images["spot"], batch.valid["spot"]
    with pytest.raises(DataError, match="no spot"):
        method(batch)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        name = str(func)
        assert name not in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"), f"{name} synchronises"
        return func(*args, **(kwargs or {}))


def test_defect_9_no_loop_over_places_or_samples():
    method = make().train()
    counts = []
    for n, size in ((4, 16), (8, 32)):
        method(fields(n, size))
        with Count() as c:
            total(method, method(fields(n, size))).backward()
        counts.append(c.n)
    assert counts[0] == counts[1]


BOTH = [dict(weights=dict(koleo=0.1), learn_temperature=True), dict(collapse="sinkhorn", teacher_side=True)]


def _two(rank, methods, folder):
    for i, method in enumerate(methods):
        for full in (True, False):
            m = nn.parallel.DistributedDataParallel(copy.deepcopy(method))
            terms = m(fields(10, 24, THREE, full=full).index(slice(5 * rank, 5 * rank + 5)))
            total(m.module, terms).backward()
            if rank == 0:
                grads = {n: p.grad for n, p in m.module.named_parameters() if p.grad is not None}
                torch.save(({k: v.item() for k, v in terms.items()}, grads, m.module.center), folder / f"{i}{full}.pt")


def test_defect_10_two_processes_train_as_one(tmp_path):
    "Negatives, centre, prototypes and the turns of the sensors are those of the global batch"
    methods = [make(THREE, patch=6, **kw).train() for kw in BOTH]
    ground.two_processes(_two, methods, tmp_path)
    for i, method in enumerate(methods):
        for full in (True, False):
            terms, grads, center = torch.load(tmp_path / f"{i}{full}.pt")
            one = copy.deepcopy(method)
            found = one(fields(10, 24, THREE, full=full))
            total(one, found).backward()
            for k in found:
                assert abs(found[k].item() - terms[k]) < 1e-4 * max(1, abs(terms[k])), (full, k)
            torch.testing.assert_close(one.center, center, atol=1e-6, rtol=1e-4)
            for n, p in one.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(grads[n], p.grad, atol=3e-5, rtol=2e-3, msg=n)


# --- the promises of the page

def test_value_of_msad_is_the_loss_on_the_pairs():
    method = make(THREE, patch=6).eval()
    z, valid = method._inputs(fields(4, 24, THREE))
    f = {m: method.msad_heads[m](look(method.encoder, z[m], m).places) for m in THREE}
    torch.testing.assert_close(method._msad(z, valid), msad(f), rtol=1e-5, atol=1e-6)


def test_constant_features_cost_log_b_and_order_does_not_matter():
    method, batch = make(weights=dict(dino=0)).eval(), fields(6, 16)
    a = method(batch)["msad"]
    torch.testing.assert_close(method(batch.index(torch.tensor([3, 1, 5, 0, 2, 4])))["msad"], a, rtol=1e-5, atol=1e-5)
    for head in method.msad_heads.values():
        head[-1].weight.data.zero_()
        head[-1].bias.data.fill_(1)
    assert abs(method(batch)["msad"].item() - math.log(6)) < 1e-5


def test_grids_of_different_gsd_meet_by_pooling():
    "Ten by ten tokens of 4 m and four by four pixels of 10 m: fine features averaged over the ground of the coarse ones"
    method = make(COARSE, patch=8).eval()
    z, valid = method._inputs(fields(3, 80, COARSE))
    seen = {m: method.look_at(m, z[m]) for m in COARSE}
    assert {m: s.grid for m, s in seen.items()} == dict(rgb=(10, 10), s2=(4, 4))
    up = seen["rgb"].places.mT.unflatten(2, (10, 10)).repeat_interleave(2, 2).repeat_interleave(2, 3)    # 20 x 20 is a multiple of both
    want = F.avg_pool2d(up, 5).flatten(2).mT
    x, real = meet(seen["rgb"], (4, 4))
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)
    assert real is None
    heads = method.msad_heads
    torch.testing.assert_close(method._msad(z, valid), msad(dict(a=heads["rgb"](want), b=heads["s2"](seen["s2"].places))), rtol=1e-4, atol=1e-5)


def test_pooling_leaves_out_nodata():
    x, real = torch.randn(2, 16, 3), torch.rand(2, 16) > 0.4
    real[0, [0, 1, 4, 5]], real[1, [0, 1, 4, 5]] = torch.tensor([True, False, True, False]), torch.tensor([True, False, False, False])
    y, ok = meet(Looked(None, x, real, (4, 4)), (2, 2))
    torch.testing.assert_close(y[0, 0], x[0, [0, 4]].mean(0))
    torch.testing.assert_close(y[1, 0], x[1, 0])
    assert ok[0, 0] and not ok[1, 0]


def test_invalid_pixels_change_nothing_and_missing_sensors_are_finite():
    method, batch = make(weights=dict(koleo=0.1)).train(), fields(6, 16, full=False)
    center = method.center.clone()
    a = method(batch)
    for m in TWO:
        batch.images[m] = batch.images[m].masked_fill(~batch.valid[m], 1e5)
    method.center.copy_(center)
    b = method(batch)
    assert all(torch.equal(a[k], b[k]) and a[k].isfinite() for k in a)
    for m in TWO:
        batch.valid[m][:] = False
    total(method, method(batch)).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_every_trained_parameter_gets_a_gradient_and_teachers_none():
    for kw in ({}, dict(teacher_side=True), dict(weights=dict(msad=0)), dict(weights=dict(dino=0)), dict(n_local=0), dict(freeze_last=1)):
        method = make(**kw).train()
        total(method, method(fields(4, 16))).backward()
        assert all((p.grad is not None) == p.requires_grad for p in method.parameters()), kw
        assert not any(p.requires_grad for t in method.teachers for p in getattr(method, t).parameters())


def test_prototypes_rest_in_the_first_epoch():
    method = make(freeze_last=1).train()
    total(method, method(fields(4, 16))).backward()
    assert method.head.prototypes.grad.abs().sum() == 0 and method.head.mlp[0].weight.grad.abs().sum() > 0
    method.set_epoch(1)
    total(method, method(fields(4, 16))).backward()
    assert method.head.prototypes.grad.abs().sum() > 0


def test_temperatures_follow_the_epoch():
    method = make(teacher_temperature=(0.04, 0.08), teacher_warmup=4)
    found = []
    for e in range(6):
        method.set_epoch(e)
        found.append(round(method.teacher_t, 3))
    assert found == [0.04, 0.05, 0.06, 0.07, 0.08, 0.08]


def test_sensors_take_turns():
    "Every row has one sensor, every sensor its share, and every row meets every sensor in S epochs"
    for n, s in ((12, 3), (7, 2), (2, 3)):
        who = torch.full((s, n), -1)
        for epoch in range(s):
            for m, rows in enumerate(turns(s, epoch)):
                assert (who[epoch, rows] == -1).all()
                who[epoch, rows] = m
        assert (who.sort(0).values == torch.arange(s)[:, None]).all()


def test_views_of_a_tile_are_of_one_sensor():
    method, batch = make().train(), fields(6, 16)
    z, valid = method._inputs(batch)
    views = method.views(z, valid, batch.key)
    assert {m: [len(v) for v in vs] for m, vs in views.items()} == dict(rgb=[3] * 4, nir=[3] * 4)
    assert all(list(v.images) == [m] for m, vs in views.items() for v in vs)
    again = method.views(z, valid, batch.key)
    assert all(torch.equal(v.images[m], w.images[m]) for m in views for v, w in zip(views[m], again[m]))
    method.set_epoch(1)
    assert torch.equal(method.views(z, valid, batch.key)["rgb"][0].window.mid, views["nir"][0].window.mid)


def test_center_moves_in_training_only_and_after_its_use():
    method, batch = make(), fields(4, 16)
    method.eval()(batch)
    assert method.center.abs().sum() == 0
    a = method.train()(batch)["dino"].item()
    assert method.center.abs().sum() > 0
    method.center.zero_()
    assert method.train()(batch)["dino"].item() == a


def test_learned_temperature_is_bounded():
    method = make(learn_temperature=True, weights=dict(dino=0)).train()
    method(fields(4, 16))["msad"].backward()
    assert method.log_scale.grad != 0
    method.log_scale.data.fill_(9)
    method(fields(4, 16))["msad"].backward()
    assert abs(method._temperature().item() - 0.01) < 1e-6 and method.log_scale.item() < 4.61


def test_teacher_side_gets_no_gradient_and_changes_the_loss():
    method, batch = make(teacher_side=True, weights=dict(dino=0)).train(), fields(6, 16)
    same = make(weights=dict(dino=0)).train()(batch)["msad"]
    torch.testing.assert_close(method(batch)["msad"], same, rtol=1e-5, atol=1e-6)       # at the start the teacher is the student
    for p in method.teacher_msad.parameters():
        p.data += 0.1 * torch.randn_like(p)
    loss = method(batch)["msad"]
    assert (loss - same).abs() > 1e-4
    loss.backward()
    assert all(p.grad is None for t in method.teachers for p in getattr(method, t).parameters())


def test_bad_input_is_said():
    rgb = dict(rgb=TWO["rgb"])
    with pytest.raises(DataError, match="got only"):
        make(rgb)
    assert list(make(rgb, weights=dict(msad=0)).eval()(fields(4, 16, rgb))) == ["dino"]
    with pytest.raises(DataError, match="batch of one"):
        make()(fields(1, 16))
    far = fields(4, 16)
    far.images["nir"], far.valid["nir"] = far.images["nir"][..., :8, :8], far.valid["nir"][..., :8, :8]
    with pytest.raises(DataError, match="do not cover the same ground: rgb 8 x 8 m, nir 4 x 4 m"):
        make()(far)
    with pytest.raises(DataError, match="local view of 3 px of rgb is smaller than its patch of 4 px"):
        make(local_size=3)(fields(4, 16))
    with pytest.raises(DataError, match="smaller than its patch"):
        make(patch=12)(fields(4, 12))
    with pytest.raises(DataError, match="unknown collapse"):
        make(collapse="mean")
    with pytest.raises(DataError, match="no modality"):
        make(sensors=["sar"])
    with pytest.raises(DataError, match="without a frozen encoder"):
        make(anchor_sensors=["rgb"])
    keyless = fields(4, 16)
    keyless.key = None
    with pytest.raises(DataError, match="without keys"):
        make()(keyless)


# --- continual

def test_continual_starts_all_three_from_the_file(tmp_path):
    method, old = continual(tmp_path)
    assert (method.sensors, method.anchor_sensors, method.pairs) == (["nir"], ["rgb"], [("nir", "rgb")])
    for e in (method.encoder, method.teacher, method.anchor_encoder):
        assert all(torch.equal(v, old.vit.state_dict()[k]) for k, v in e.vit.state_dict().items())
    terms = method.train()(fields(4, 16))
    assert list(terms) == ["dino", "msad"]
    total(method, terms).backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())


def test_continual_uses_the_statistics_of_the_file(tmp_path):
    "The anchor sees z-scores as it knows them, whatever today's store says"
    old = encoder(dict(rgb=TWO["rgb"]), seed=7)
    stats = {m: dict(mean=[90.0] * v.n_bands, std=[20.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[255.0] * v.n_bands) for m, v in TWO.items()}
    file = export_encoder(old, tmp_path / "rgb.safetensors", "all", normalize=Normalize(TWO, stats))
    method, batch = make(encoder=encoder(dict(nir=TWO["nir"])), store=TWO, continual_from=file), fields(4, 16)
    seen = method.look_at("rgb", method.normalize(batch.images)["rgb"]).places
    torch.testing.assert_close(seen, look(old.eval(), Normalize(TWO, stats)(batch.images)["rgb"], "rgb").places, rtol=1e-4, atol=1e-4)


def test_continual_refuses_bands_the_file_does_not_know(tmp_path):
    old = encoder(dict(rgb=TWO["rgb"]), seed=7)
    file = export_encoder(old, tmp_path / "rgb.safetensors", "all")
    more = dict(TWO, rgb=Modality("rgb", [Band(n, "DN8") for n in ("red", "green", "edge")], 0.5, "optical"))
    with pytest.raises(DataError, match="edge"):
        make(encoder=encoder(dict(nir=TWO["nir"])), store=more, continual_from=file)
    with pytest.raises(DataError, match="does not know 'nir'"):
        make(encoder=encoder(dict(nir=TWO["nir"])), store=TWO, continual_from=file, anchor_sensors=["nir"])
    save_file(timm_state(old), tmp_path / "timm.safetensors")
    with pytest.raises(DataError, match="red, green and blue"):
        make(encoder=encoder(dict(nir=TWO["nir"])), store=TWO, continual_from=tmp_path / "timm.safetensors", anchor_sensors=["nir"])


def test_frozen_copy_is_a_copy_and_may_know_other_sensors():
    anchor = encoder(dict(spot=THREE["spot"]), patch=4, seed=3)
    method = make(encoder=encoder(TWO, 6), store=THREE, anchor_encoder=anchor)
    assert method.pairs == [("rgb", "spot"), ("nir", "spot")] and method.needed == ["rgb", "nir", "spot"]
    anchor.vit.norm.weight.data.fill_(9)
    assert (method.anchor_encoder.vit.norm.weight == 1).all()
    total(method, method.train()(fields(4, 24, THREE))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())


# --- training, looking, retrieving

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from rs_selfsup.data.synthetic import write_scenes
    from rs_selfsup.data.tiles import build_store
    folder = tmp_path_factory.mktemp("xstars")
    scenes = write_scenes(folder / "scenes", 2, 96, modalities=("rgb", "ms2"), progress=False)
    return build_store(scenes, folder / "store", tile=32, splits=(0.7, 0.3, 0), progress=False)


def learner(store, bs=8, seed=0, **kw):
    from fastai.callback.progress import ProgressCallback

    from rs_selfsup.callbacks import keep_random_state
    from rs_selfsup.pretrain import PretrainLearner
    dls = dataloaders(store, bs=bs, device="cpu")
    with keep_random_state():
        method = XSTARS(encoder(store.modalities, 8, seed, "rgb"), dls.normalize, **{**SMALL, "freeze_last": 1, **kw})
    return PretrainLearner(dls, method, seed=0, every=1).remove_cb(ProgressCallback)


def test_resumes_to_the_same_bits(store, tmp_path):
    from fastai.callback.core import Callback

    class Stop(Callback):
        def after_step(self):
            if self.training and self.learn.step == 7:
                raise RuntimeError("power cut")

    how = dict(lr=1e-3, save_every=3, knn=False)
    whole = learner(store)
    whole.fit_pretrain(2, checkpoint_dir=tmp_path / "whole", **how)
    cut = learner(store)
    with pytest.raises(RuntimeError, match="power cut"):
        cut.fit_pretrain(2, checkpoint_dir=tmp_path / "cut", cbs=Stop(), **how)
    again = learner(store, seed=5)
    again.resume(tmp_path / "cut", knn=False)
    a, b = whole.method.state_dict(), again.method.state_dict()
    assert a["center"].abs().sum() > 0 and list(a) == list(b)
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert whole.recorder.losses == again.recorder.losses


def test_show_results_and_retrieval(store):
    learn = learner(store)
    fig = learn.show_results(max_n=2)
    assert len(fig.axes) == 2 * 6
    v = learn.method.visualize(learn.dls.valid.one_batch()[0])
    assert v["features"]["rgb"].shape[1:] == (4, 4, 3) and v["masks"]["ms2"].shape[1:] == (4, 4)
    r = cross_sensor_retrieval(learn.method, store, "rgb", "ms2", split="val")
    assert set(r) == {"features", "centred", "msad", "n", "chance"} and 0 <= r["msad"] <= 1 and r["chance"] == 1 / r["n"]
    e = cross_sensor_retrieval(learn.method.encoder, learn.dls.valid, "rgb", "ms2")
    assert "msad" not in e and e["features"] == r["features"]
    assert cross_sensor_retrieval(learn.method, store, "rgb", "ms2", n=5, split="val")["n"] == 5
    with pytest.raises(DataError, match="the same sensor"):
        cross_sensor_retrieval(learn.method, store, "rgb", "rgb", split="val")


def test_recall_closed_form():
    x = torch.eye(4)
    assert recall_at_1(x, x) == 1 and recall_at_1(x, x.roll(1, 0)) == 0
    assert recall_at_1(x, x[[0, 1, 3, 2]]) == 0.5


def test_a_backbone_works_too():
    enc = create_encoder("resnet10t", TWO, "rgb")
    method = make(encoder=enc).train()
    total(method, method(fields(4, 96, full=False))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())


def test_published_variant():
    method = XSTARS.published(encoder(), normalizer(TWO), prototypes=64, head_hidden=32)
    assert (method.n_local, method.targets, method.label_smoothing, method.include_cls) == (8, "soft", 0.3, True)
    assert method.train()(fields(4, 16))["msad"].requires_grad


def test_half_precision_losses_are_float32():
    method = make(weights=dict(koleo=0.1)).train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(fields(4, 16, full=False))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in terms.values())
    total(method, terms).backward()


def test_linear_retrieval_finds_what_a_linear_map_can(tmp_path, monkeypatch):
    "Features of b are a rotation of those of a: the map finds all; with features of other tiles it is at chance."
    from rs_selfsup.methods import xstars

    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    x = {s: torch.randn(n, 4, 8, generator=g) for s, n in (("train", 200), ("test", 50))}
    ok = {s: torch.rand(o.shape[:2], generator=g) < 0.9 for s, o in x.items()}
    same = {s: [o, (o @ turn + 3) * ok[s][..., None], ok[s]] for s, o in x.items()}
    monkeypatch.setattr(xstars, "_places", lambda model, store, split, names, n, bs: same[split])
    assert xstars.linear_retrieval(None, None, "a", "b") == 1
    other = {s: [torch.randn(o.shape, generator=g), *same[s][1:]] for s, o in x.items()}
    monkeypatch.setattr(xstars, "_places", lambda model, store, split, names, n, bs: other[split])
    assert xstars.linear_retrieval(None, None, "a", "b") < 0.2


# --- known traps of its parts

def test_koleo_is_of_features_before_the_head_and_of_each_view_alone():
    "Across views, the nearest neighbour would be the same image; behind the head, unit vectors of prototypes."
    method, batch = make(weights=dict(koleo=1.0), gather=False).eval(), fields(6, 16)
    term = method(batch)["koleo"]
    z, valid = method._inputs(batch)
    both = [torch.cat(o) for o in zip(*(method._see(method.encoder, vs[:2], m)[0] for m, vs in method.views(z, valid, batch.key).items()))]
    want = torch.stack([koleo(x) for x in both]).mean()
    torch.testing.assert_close(term, want)
    for p in method.head.parameters():
        p.data += torch.randn_like(p)
    torch.testing.assert_close(method(batch)["koleo"], want)


def test_copies_of_a_tile_in_a_batch_are_finite():
    method, batch = make(weights=dict(koleo=1.0)).train(), fields(6, 16)
    for m in TWO:
        batch.images[m][:] = batch.images[m][:1]
    batch.key[:] = batch.key[:1]
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(batch)
    total(method, terms).backward()
    assert all(v.isfinite() for v in terms.values()) and all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("kw", [{}, dict(teacher_side=True)])
def test_teacher_is_a_network_of_its_own_and_gives_the_targets(kw):
    "The trap of two names for one module: the target would be the student itself."
    method, batch = make(**kw).eval(), fields(6, 16)
    pairs = [(getattr(method, t), getattr(method, s)) for t, s in method.teachers.items()]
    assert not {p.data_ptr() for t, _ in pairs for p in t.parameters()} & {p.data_ptr() for _, s in pairs for p in s.parameters()}
    for t, term in dict(teacher="dino", teacher_head="dino", teacher_msad="msad").items():
        if not hasattr(method, t):
            continue
        was = method(batch)
        for p in getattr(method, t).parameters():
            p.data += 0.1 * torch.randn_like(p)
        now = method(batch)
        assert (now[term] - was[term]).abs() > 1e-5 and ("teacher_msad" in method.teachers or torch.equal(now["msad"], was["msad"]))


def test_pairs_of_the_same_view_do_not_count():
    "Two global views and no local ones: each is asked about the other, and never about itself."
    method, batch = make(n_local=0, weights=dict(msad=0)).eval(), fields(6, 16)
    z, valid = method._inputs(batch)
    seen = [(method._see(method.encoder, vs, m)[0], method._see(method.teacher, vs, m)[0]) for m, vs in method.views(z, valid, batch.key).items()]
    s, t = (torch.cat(o, 1) for o in zip(*seen))
    s, t = method.head(s), ((method.teacher_head(t) - method.center) / method.teacher_t).softmax(-1)
    want = -sum((t[i] * (s[1 - i] / 0.1).log_softmax(-1)).sum(-1).mean() for i in (0, 1)) / 2
    torch.testing.assert_close(method(batch)["dino"], want)


def test_collapsed_prototypes_cost_log_k():
    method, batch = make(weights=dict(msad=0)), fields(6, 16)
    for head in (method.head, method.teacher_head):
        head.prototypes.data[:] = head.prototypes.data[:1]
    torch.testing.assert_close(method(batch)["dino"], torch.tensor(math.log(64)))


def test_nodata_may_be_nan():
    method, batch = make(weights=dict(koleo=0.1)).eval(), fields(6, 16, full=False)
    a = method(batch)
    for m in TWO:
        batch.images[m] = batch.images[m].masked_fill(~batch.valid[m], math.nan)
    b = method(batch)
    assert all(torch.equal(a[k], b[k]) and a[k].isfinite() for k in a)
