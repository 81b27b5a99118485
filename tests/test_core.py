"What methods share: the teacher, the settings, the checks, the heads."

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rs_selfsup.backbones import Backbone
from rs_selfsup.encoders import MultiModalViT
from rs_selfsup.methods.core import (
    Method,
    PrototypeHead,
    check_batch,
    check_choice,
    check_weights,
    ema_update,
    frozen_copy,
    mlp,
    rest_unused,
)
from rs_selfsup.modalities import DataError, preset

MODS = dict(rgb=preset("rgb", 0.5), dsm=preset("dsm", 0.5))
TINY = dict(patch_size=8, embed_dim=48, depth=1, num_heads=3)


class Net(nn.Module):
    "Everything a real student has: frozen parameters, BatchNorm, dropout, a table and a counter"

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.drop, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
        self.a.bias.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        return self.b(self.drop(self.bn(self.a(x))))


class Toy(Method):
    teachers = dict(teacher="encoder", slow="head")

    def __init__(self, encoder, normalize=None, scale=1.0, weights=None):
        super().__init__(encoder, normalize, check_weights(weights, dict(loss=1.0)))
        self.scale, self.head = scale, mlp((2, 8, 2))
        self.make_teachers()


class Child(Toy):
    "Hands what it does not know on"

    def __init__(self, encoder, normalize=None, extra=0, **kw):
        self.extra = extra
        super().__init__(encoder, normalize, **kw)


def test_closed_form_over_many_steps():
    student, m = Net().double(), 0.7
    teacher = frozen_copy(student)
    names = [n for n, _ in student.named_parameters()]
    want = {n: p.detach().clone() for n, p in student.named_parameters()}
    for _ in range(20):
        for p in student.parameters():
            p.data.normal_()
        want = {n: m * w + (1 - m) * student.get_parameter(n).detach() for n, w in want.items()}
        ema_update(teacher, student, m)
    for n in names:  # also the frozen ones
        torch.testing.assert_close(teacher.get_parameter(n), want[n])
        assert not teacher.get_parameter(n).requires_grad
    assert not student.a.bias.requires_grad and student.a.weight.requires_grad


def test_limits():
    student, teacher = Net(), frozen_copy(Net())
    before = copy.deepcopy(teacher.state_dict())
    ema_update(teacher, student, 1.0)
    assert all(torch.equal(p, before[n]) for n, p in teacher.named_parameters())
    ema_update(teacher, student, 0.0)
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in teacher.state_dict().items())


def test_buffers_of_all_kinds():
    student = Net()
    teacher = frozen_copy(student)
    student(torch.randn(16, 3) + 5)
    student.centre += 1.0
    student.count += 3
    ema_update(teacher, student, 0.99, own_norm=True)
    assert teacher.count == 3 and teacher.centre.tolist() == [1, 1]
    assert teacher.bn.num_batches_tracked == 0 and teacher.bn.running_mean.abs().max() == 0
    ema_update(teacher, student, 0.99)
    assert teacher.bn.num_batches_tracked == 1 and torch.equal(teacher.bn.running_mean, student.bn.running_mean)
    assert teacher.bn.num_batches_tracked.dtype == torch.int64


def test_nothing_to_average_and_nothing_in_common():
    ema_update(nn.Identity(), nn.Identity(), 0.9)
    for other in (nn.Linear(3, 4), nn.Sequential(Net(), nn.Linear(2, 2))):
        with pytest.raises(DataError, match="built differently"):
            ema_update(Net(), other, 0.9)


def test_no_graph_through_the_update():
    student = Net()
    teacher = frozen_copy(student)
    ema_update(teacher, student, 0.5)
    assert all(p.grad_fn is None and p.is_leaf for p in teacher.parameters())
    teacher.eval()(torch.randn(2, 3)).sum()
    student(torch.randn(4, 3)).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", ["batch", "running"])
def test_modes_of_the_copies(kind):
    class Mine(Toy):
        batch_norm = kind

    m = Mine(Net())
    for _ in range(2):  # train, eval, and train again
        m.train()
        assert m.encoder.drop.training and not m.teacher.drop.training and not m.teacher.training
        assert m.teacher.bn.training is (kind == "batch") and m.slow[1].training is (kind == "batch")
        m.eval()
        assert not any(o.training for o in m.modules())


@pytest.mark.parametrize("kind", ["batch", "running"])
def test_statistics_of_the_teachers_batchnorm(kind):
    class Mine(Toy):
        batch_norm = kind

    m, x, y = Mine(Net()).train(), torch.randn(512, 3), torch.randn(512, 3) * 9
    for _ in range(80):
        with torch.no_grad():
            m.encoder(y), m.teacher(x)
        m.update_teacher(1.0)
    with torch.no_grad():
        own = m.teacher.a(x).var(0)
    same = torch.allclose(m.teacher.bn.running_var, own, rtol=0.02)
    assert same is (kind == "batch")
    assert torch.equal(m.teacher.bn.running_var, m.encoder.bn.running_var) is (kind == "running")


def test_teachers_start_as_students_and_travel_with_the_state():
    m = Toy(Net())
    for t, s in m.teachers.items():
        a, b = getattr(m, t).state_dict(), getattr(m, s).state_dict()
        assert list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].data_ptr() != b[k].data_ptr() for k in a)
    m.update_teacher(0.5)
    other = Toy(Net())
    other.load_state_dict(m.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in m.state_dict().items())
    assert m.epoch == 0
    assert not any(p.requires_grad for t in m.teachers for p in getattr(m, t).parameters())


def test_a_method_without_teacher():
    class Alone(Method):
        def __init__(self, encoder):
            super().__init__(encoder, None, dict(a=1))
            self.make_teachers()

    m = Alone(Net())
    before = copy.deepcopy(m.state_dict())
    m.train().update_teacher(0.5)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_teacher_of_a_backbone_masks_with_its_own_token():
    class Masked(Method):
        teachers = dict(teacher="encoder")

        def __init__(self, encoder, normalize=None):
            super().__init__(encoder, normalize, dict(a=1))
            self.make_teachers()

    m = Masked.create("test_resnet", MODS, "rgb", None)
    x, hidden, token = torch.randn(2, 3, 64, 64), torch.ones(2, 1, 64, 64).bool(), torch.randn(m.encoder.mask_dim)
    m.eval()
    with torch.no_grad():
        a, b = m.teacher.feature_map(x, "rgb", hidden, token), m.encoder.feature_map(x, "rgb", hidden, token)
        torch.testing.assert_close(a, b)
        assert (a - m.teacher.feature_map(x, "rgb")).abs().max() > 1e-3


def test_settings_find_their_place():
    m = Child.create("vit_tiny_patch16_224", MODS, "rgb", None, scale=3.0, extra=2, weights=dict(loss=2), **TINY)
    assert (m.scale, m.extra, m.weights, m.encoder.embed_dim) == (3.0, 2, dict(loss=2), 48) and isinstance(
        m.encoder, MultiModalViT
    )
    m = Child.create("test_resnet", MODS, "rgb", None, channels=1)
    assert isinstance(m.encoder, Backbone) and m.encoder.channels == 1
    enc = m.encoder
    assert Child.create(enc, MODS, "rgb", None, extra=1).encoder is enc


TYPOS = dict(scael="scale", extr="extra", drop_pat_rate="drop_path_rate", shared_stm="shared_stem", weigths="weights")


@pytest.mark.parametrize("typo, near", TYPOS.items())
def test_unknown_settings_are_named(typo, near):
    with pytest.raises(DataError, match=f"unknown setting '{typo}' of Child.*Did you mean '{near}'"):
        Child.create("vit_tiny_patch16_224", MODS, "rgb", None, **{typo: 1}, **TINY)


def test_settings_that_would_vanish():
    enc = MultiModalViT("vit_tiny_patch16_224", MODS, "rgb", **TINY)
    for kw in (dict(depth=3), dict(patch_size=16)):
        with pytest.raises(
            DataError, match=f"unknown setting '{next(iter(kw))}' of Toy with an encoder that exists already"
        ):
            Toy.create(enc, MODS, "rgb", None, **kw)
    with pytest.raises(DataError, match="unknown setting 'qqq'.*Settings of the method: extra, scale, weights"):
        Child.create("test_resnet", MODS, "rgb", None, qqq=1)
    with pytest.raises(DataError, match="'test_resnet' has no patches whose size could be set. Leave patch_size out"):
        Child.create("test_resnet", MODS, "rgb", None, patch_size=8)
    with pytest.raises(
        DataError, match="no encoder named 'vit_tiny_patch16'"
    ):  # an error of another kind stays what it is
        Toy.create("vit_tiny_patch16", MODS, "rgb", None)


def test_checks():
    assert check_weights(dict(b=0), dict(a=1, b=2)) == dict(a=1, b=0)
    nan = float("nan")
    for bad, why in (
        (dict(c=1), "unknown loss term c"),
        (dict(a=-1), "weight -1"),
        (dict(a=nan), "weight nan"),
        (dict(a=0, b=0), "nothing to learn"),
    ):
        with pytest.raises(DataError, match=why):
            check_weights(bad, dict(a=1, b=2))
    defaults = dict(a=1)
    check_weights(dict(a=5), defaults)
    assert defaults == dict(a=1)
    check_choice("x", None, ("a", None)), check_batch(1, "", 2)
    with pytest.raises(DataError, match="unknown x 'b'"):
        check_choice("x", "b", ("a", None))
    with pytest.raises(DataError, match="a batch of one: no pair"):
        check_batch(1, "no pair")


@pytest.mark.parametrize("norm", ["batch", "layer", None])
@pytest.mark.parametrize("last", [False, True])
def test_mlp(norm, last):
    net = mlp((6, 8, 8, 3), norm, nn.GELU, last)
    kinds = [type(o) for o in net]
    n = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, None: None}[norm]
    body = [nn.Linear] + ([n] if n else []) + [nn.GELU]
    assert kinds == body * 2 + [nn.Linear] + ([n] if n and last else [])
    for a, b in zip(net, net[1:]):
        if isinstance(a, nn.Linear):
            assert (a.bias is None) is (n is not None and isinstance(b, n))
    assert (net[-1].bias is not None) and net(torch.randn(4, 6)).shape == (4, 3)


def test_prototypes():
    head, x = PrototypeHead(6, 10, 8, 4, norm="layer"), torch.randn(2, 3, 6)
    y = head(x)
    assert y.shape == (2, 3, 10) and head(x[0, :1]).shape == (1, 10)
    with torch.no_grad():
        naive = torch.tensor(
            [
                [[F.cosine_similarity(head.mlp(x[i, j]), w, dim=0) for w in head.prototypes] for j in range(3)]
                for i in range(2)
            ]
        )
    torch.testing.assert_close(y, naive, atol=1e-5, rtol=1e-4)


def test_frozen_prototypes_have_a_gradient_of_zero():
    head = PrototypeHead(6, 10, 8, 4)
    head.frozen = True
    x = torch.randn(5, 6, requires_grad=True)
    frozen = head(x)
    head.frozen = False
    torch.testing.assert_close(frozen, head(x))
    frozen.square().sum().backward()
    assert torch.equal(head.prototypes.grad, torch.zeros(10, 4)) and x.grad.abs().sum() > 0
    head(x).square().sum().backward()
    assert head.prototypes.grad.abs().sum() > 0


IDLE = dict(test_convnext=["head.norm.weight", "head.norm.bias"], mobilenetv3_small_050=["conv_head.weight", "conv_head.bias"], test_resnet=[])


@pytest.mark.parametrize("name, idle", IDLE.items())
def test_parts_behind_the_last_map_are_not_trained(name, idle):
    "A distributed run ends where a trained parameter gets no gradient."
    enc = Backbone(name, MODS, "rgb")
    method = Toy(enc)
    assert [n for n, p in enc.net.named_parameters() if not p.requires_grad] == idle
    sum(enc.feature_map(torch.randn(2, m.n_bands, 64, 64), k).sum() for k, m in MODS.items()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in enc.parameters()) and method.encoder is enc
    net = MultiModalViT("vit_tiny_patch16_224", MODS, "rgb", **TINY)
    rest_unused(net)
    assert all(p.requires_grad for n, p in net.named_parameters() if "pos" not in n)
