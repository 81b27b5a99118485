"The tutorial that adds a method: as short as it says, and its method does in other hands what it does there."

import json

import pytest
import torch
import toy_ground as ground

from rs_selfsup.data.augment import Normalize
from rs_selfsup.modalities import preset
from rs_selfsup.pretrain import LEARNERS

PARTS = "import Method", "def disagreement", "class SimSiam(", "(self:SimSiam", "class SimSiamLearner"
MODS = dict(rgb=preset("rgb", 0.5), dsm=preset("dsm", 0.5))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cells(root):
    book = json.loads((root / "nbs" / "tutorials" / "02_a_fifth_method.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]


@pytest.fixture
def simsiam(cells, monkeypatch):
    "The class, from the cells that make it; names of methods are as before afterwards."
    monkeypatch.setattr("rs_selfsup.pretrain.LEARNERS", dict(LEARNERS))
    names = dict(torch=torch)
    for cell in cells:
        if any(s in cell for s in PARTS):
            exec(cell, names)
    return names["SimSiam"]


def make(simsiam, **kw):
    torch.manual_seed(0)
    stats = {m: dict(mean=[128.0] * v.n_bands, std=[50.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[255.0] * v.n_bands) for m, v in MODS.items()}
    net = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2, dim=32)
    return simsiam.create("vit_tiny_patch16_224", MODS, "rgb", Normalize(MODS, stats), **net, **kw)


def test_fewer_than_two_hundred_lines(cells):
    assert sum(bool(line.strip()) and not line.strip().startswith("#") for c in cells for line in c.splitlines()) < 200


@pytest.mark.parametrize("full", [True, False])
def test_no_read_from_the_device_float32_and_every_gradient(simsiam, full):
    method, batch = make(simsiam), ground.fields(6, 32, MODS, full=full)
    with ground.NoSync(), torch.autocast("cpu", torch.bfloat16):
        terms = method(batch)
        terms["agree"].backward()
        method.update_teacher(0.9)
    assert list(terms) == ["agree"] and terms["agree"].dtype == torch.float32 and -1 <= terms["agree"] <= 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_the_gradient_is_that_of_the_predictions_alone(simsiam):
    "With a predictor that takes no gradient to the projections, nothing is left but what `stop` would have stopped."
    grads = {}
    for stop in (True, False):
        method, batch = make(simsiam, stop=stop), ground.fields(6, 32, MODS)
        method.predictor.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
        method(batch)["agree"].backward()
        grads[stop] = [p.grad is not None and p.grad.abs().sum() > 0 for p in method.projector.parameters()]
    assert not any(grads[True]) and any(grads[False])


def test_nodata_changes_nothing(simsiam):
    method, batch = make(simsiam).eval(), ground.fields(6, 32, MODS, full=False)
    a = method(batch)["agree"]
    for m in MODS:
        batch.images[m] = batch.images[m].masked_fill(~batch.valid[m], 1e6)
    assert torch.equal(method(batch)["agree"], a) and a.isfinite()
