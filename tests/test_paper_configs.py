"The configs with the papers' settings: read by the command line, and a Learner of small parts made from each trains a step"

import re
import tomllib

import pytest
import torch

from rs_selfsup.cli import build_parser, layered, learner
from rs_selfsup.recipe_examples import write_example
from rs_selfsup.recipes import load_recipe, prepare

TINY = dict(embed_dim=24, depth=1, num_heads=2)
HEADS = dict(queue=2, prototypes=32, width=32)
STAND_IN = dict(  # config -> recipe, layout, side of the tiles, encoder, settings that only make it small
    mssdf_paper=("potsdam", "published", 96, "vit_tiny_patch16_224", TINY | dict(decoder_dim=24, decoder_heads=2)),
    cmid_resnet50_paper=("millionaid", "published", 64, "resnet18", HEADS),
    cmid_swin_paper=("millionaid", "published", 64, "swin_tiny_patch4_window7_224", HEADS | dict(img_size=64, window_size=2, depths=[1, 1, 1, 1])),
    rsdnet_paper=("sen12ms", "all_for_pretraining", 64, "resnet18", dict(hidden=32)),
    xstars_paper=("msc_france", "published", 560, "vit_tiny_patch16_224", TINY | dict(prototypes=32, head_hidden=32)),
    xstars_continual_paper=("msc_france", "published", 560, "vit_tiny_patch16_224", TINY | dict(prototypes=32, head_hidden=32)),
)


def read(file, store="STORE"):
    return layered(build_parser(), ["pretrain", str(store), "OUT", "--config", str(file)])


def test_every_config_has_a_stand_in(root):
    assert {p.stem for p in (root / "experiments").glob("*.toml")} == set(STAND_IN)


@pytest.mark.parametrize("name", STAND_IN)
def test_every_number_says_where_it_is_from(root, name):
    text = (root / "experiments" / f"{name}.toml").read_text()
    said = re.compile(r"#.*\b(abstract|code|readme|issues?|BYOL|DINO|ours)\b")
    rows = [line for line in text.splitlines() if "=" in line and line[0] not in "#["]
    assert len(rows) > 10 and not [r for r in rows if not said.search(r) and not r.startswith("method")]
    assert read(root / "experiments" / f"{name}.toml").epochs == tomllib.loads(text)["epochs"]


@pytest.mark.parametrize("name", STAND_IN)
def test_a_learner_is_made_of_it(root, name, tmp_path, one_thread):
    recipe, layout, side, encoder, small = STAND_IN[name]
    write_example(recipe, tmp_path / "data", layout, side)
    r = load_recipe(recipe)
    r.scenes[layout]["splits"] = {"rest": "deal"}
    store = prepare(r, tmp_path / "data", tmp_path / "store", layout, tile=side, splits=(1, 0, 0), progress=False)[3]
    args = read(root / "experiments" / f"{name}.toml", store.path)
    config = vars(args) | dict(store=str(store.path), encoder=encoder, bs=2, workers=0, threads=1, precision="fp32")
    config["settings"] = args.settings | small
    if "continual_from" in config["settings"]:
        config["settings"]["continual_from"] = spot(config, tmp_path)
    learn = learner(config)
    loss = learn.method(learn.dls.train.one_batch()[0])
    assert set(loss) >= {k for k, w in learn.method.weights.items() if w} and all(torch.isfinite(v) for v in loss.values())
    sum(learn.method.weights[k] * v for k, v in loss.items()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learn.method.encoder.parameters())


def spot(config, folder):
    "The encoder that the continual training starts from"
    settings = {k: v for k, v in config["settings"].items() if k not in ("continual_from", "sensors")}
    first = learner(config | dict(settings=settings | dict(weights={"dino": 1, "msad": 0}), modalities=["spot"]))
    return str(first.export_encoder(folder / "spot.safetensors", modality="all"))
