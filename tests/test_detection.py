"Detection: every detector learns, what does not count leaves no trace, and a scene in windows holds the boxes of the scene in one piece."

import json
import math
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
import yaml
from rs_selfsup.backbones import create_encoder
from rs_selfsup.cli import main
from rs_selfsup.data.augment import Batch, Normalize, Normalized
from rs_selfsup.data.loading import dataloaders
from rs_selfsup.data.tiles import TileStore, build_store
from rs_selfsup.downstream.core import load_model, save_model
from rs_selfsup.downstream.detection import DetectionLearner, DetectionModel, survey_boxes
from rs_selfsup.heads.detection import box_corners, inside, true_boxes
from rs_selfsup.inference import predict_scene
from rs_selfsup.inference_boxes import detect_scene
from rs_selfsup.metrics import rotated_iou
from rs_selfsup.modalities import DataError, preset

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = {"fcos": {}, "retinanet": dict(sizes=[8, 12, 16, 24]), "fasterrcnn": dict(sizes=[8, 12, 16, 24], proposals=200), "rotated": {}}
NAN = math.nan


def rectangles(side, boxes, rng):
    "Bright rectangles on dark noise, (3, side, side) uint8"
    at = torch.from_numpy(np.stack(np.mgrid[:side, :side][::-1], -1).reshape(-1, 2) + 0.5).float()
    lit = inside(at, torch.from_numpy(boxes).float()).any(1).view(side, side).numpy()
    return (rng.uniform(30, 80, (3, side, side)) + 150 * lit).astype(np.uint8)


def draw(rng, n, side, gap=30):
    "Boxes at random angles that do not touch, (n, 5)"
    cells = rng.permutation((side // gap) ** 2)[:n]
    middle = np.stack([cells % (side // gap), cells // (side // gap)], 1) * gap + gap / 2
    return np.c_[middle + rng.uniform(-4, 4, (n, 2)), rng.uniform(12, 18, n), rng.uniform(6, 8, n), rng.uniform(-1.5, 1.5, n)]


def make_store(folder, n=4, side=192, unknown=()):
    "A store of scenes with turned boxes in DOTA files"
    folder.mkdir(parents=True)
    rng, scenes = np.random.default_rng(0), []
    for i in range(n):
        boxes = draw(rng, 18, side)
        kw = dict(crs="EPSG:32631", transform=rasterio.Affine(0.5, 0, 4e5 + 1000 * i, 0, -0.5, 5e6))
        with rasterio.open(folder / f"s{i}.tif", "w", driver="GTiff", height=side, width=side, count=3, dtype="uint8", **kw) as f:
            f.write(rectangles(side, boxes, rng))
        q = box_corners(torch.from_numpy(boxes)).numpy().reshape(-1, 8)
        (folder / f"s{i}.txt").write_text("\n".join(" ".join(f"{v:.2f}" for v in r) + " roof 0" for r in q))
        targets = {} if i in unknown else {"targets": {"roofs": f"s{i}.txt"}}
        scenes.append({"name": f"s{i}", "rasters": {"rgb": f"s{i}.tif"}, **targets})
    about = dict(version=1, anchor="rgb", modalities={"rgb": {"preset": "rgb", "gsd": 0.5}}, scenes=scenes)
    about["targets"] = {"roofs": dict(kind="boxes", classes=["roof", "shed"], format="dota")}
    (folder / "scenes.yaml").write_text(yaml.safe_dump(about))
    return folder / "scenes.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    d = tmp_path_factory.mktemp("detection")
    return build_store(make_store(d / "scenes"), d / "store", tile=64, block=192, splits=(0.5, 0.25, 0.25), progress=False)


def make_model(name, encoder=None, gsd=0.5, **kw):
    torch.manual_seed(0)
    mods = {"rgb": preset("rgb", 0.5)}
    enc = encoder or create_encoder("test_resnet", mods, "rgb")
    stats = {m: dict(mean=[0.0] * s.n_bands, std=[1.0] * s.n_bands, p01=[0.0] * s.n_bands, p99=[1.0] * s.n_bands) for m, s in enc.modalities.items()}
    rotated, kw = name == "rotated", {**ALL[name], **kw}
    name = "fcos" if rotated else name
    return DetectionModel(enc, Normalize(enc.modalities, stats), 2, gsd, 64, decoder=name, rotated=rotated, width=32, classes=["a", "b"], **kw)


def make_batch(n=1, seed=0, side=64):
    rng = np.random.default_rng(seed)
    boxes = [draw(rng, 3, side) for _ in range(n)]
    x = torch.stack([torch.from_numpy(rectangles(side, b, rng)).float() / 50 - 2 for b in boxes])
    target = torch.stack([torch.cat([torch.tensor([[0.0], [1], [0]]), torch.from_numpy(b).float()], 1) for b in boxes])
    return Batch(Normalized(rgb=x), dict(rgb=torch.ones(n, 1, side, side, dtype=torch.bool)), dict(t=target), full=True)


def terms(model, batch, seed=0):
    torch.manual_seed(seed)  # Faster R-CNN draws a sample
    return model.losses(model(batch), batch, model.truth(batch, "t"))


@pytest.mark.parametrize("name", [n for n in ALL if n != "rotated"])  # which learns more further down
def test_a_picture_by_heart(name):
    model, batch = make_model(name), make_batch()
    opt = torch.optim.AdamW(model.parameters(), 2e-3)
    model.train()
    for k in range(60):
        loss = sum(terms(model, batch, k).values())
        opt.zero_grad()
        loss.backward()
        opt.step()
    model.eval()
    with torch.no_grad():
        found = model.predict(batch)
    metric = model.metric()
    model.score(metric, found, batch.targets["t"])
    assert metric.compute()["AP50"] > 0.95


@pytest.mark.parametrize("name", ALL)
def test_what_is_ignored_or_unknown_does_not_count(name):
    model, batch = make_model(name).eval(), make_batch(2)
    alone = terms(model, batch.index(slice(1)))
    target = batch.targets["t"].clone()
    target[1] = NAN
    target[1, 0, 0] = -2
    half = terms(model, replace(batch, targets=dict(t=target)))
    dark = Normalized(rgb=batch.images["rgb"] * torch.tensor([1.0, 0]).view(2, 1, 1, 1))
    other = terms(model, replace(batch, images=dark, targets=dict(t=target)))
    assert all(torch.equal(v, half[k]) for k, v in other.items())
    assert all(torch.allclose(v, half[k], rtol=0.3 if name == "fasterrcnn" else 1e-4) for k, v in alone.items())  # proposals at equal scores
    target[0] = target[1]
    nothing = terms(model, replace(batch, targets=dict(t=target)))
    assert set(nothing) == set(alone) and all(v == 0 and v.requires_grad for v in nothing.values())
    target = torch.full((2, 1, 6), NAN)
    empty = terms(model, replace(batch, targets=dict(t=target)))
    assert sum(empty.values()) > 0 and all(v.isfinite() for v in empty.values())
    target[:, 0] = torch.tensor([-1, 32, 32, 400, 400, 0.0])
    off = terms(model, replace(batch, targets=dict(t=target)))
    assert all(v == 0 for v in off.values())
    sum(off.values()).backward()


def test_a_box_in_an_ignored_one_counts():
    model, batch = make_model("rotated").eval(), make_batch()
    ignored = torch.tensor([-1, 32, 32, 400, 400, 0.0]).expand(1, 1, 6)
    more = terms(model, replace(batch, targets=dict(t=torch.cat([batch.targets["t"], ignored], 1))))
    plain = terms(model, batch)
    assert more["cls"] < plain["cls"] and all(torch.equal(more[k], plain[k]) for k in ("box", "ctr", "angle"))


@pytest.mark.parametrize("name", ALL)
def test_no_detection_is_an_honest_zero(name):
    model, batch = make_model(name, score=0.9999).eval(), make_batch(2)
    with torch.no_grad():
        found = model.predict(batch)
    assert [len(d["boxes"]) for d in found] == [0, 0] and all(d["boxes"].shape[1] == 4 + model.rotated for d in found)
    metric = model.metric()
    model.score(metric, found, batch.targets["t"])
    assert metric.compute()["AP50"] == 0


def test_false_alarms_on_ignored_boxes_are_none():
    model = make_model("fcos")
    box = torch.tensor([[10.0, 10, 30, 26], [40, 40, 50, 50]])
    found = [dict(boxes=box, scores=torch.tensor([0.9, 0.5]), labels=torch.tensor([0, 0]))]
    target = torch.tensor([[[0, 45, 45, 10, 10, 0], [-1, 20, 18, 20, 16, 0]]])
    scores = []
    for t in (target, target[:, :1]):
        metric = model.metric()
        model.score(metric, found, t)
        scores.append(metric.compute()["AP50"])
    assert scores == [1.0, 0.5]
    metric = model.metric()
    model.score(metric, found, torch.tensor([[[-2, NAN, NAN, NAN, NAN, NAN]]]))
    assert math.isnan(metric.compute()["AP50"])


def test_two_sensors_of_any_bands_and_boxes_in_the_pixels_of_a_third():
    mods = {"ms": preset("s2_l2a", 2.0), "sar": preset("s1", 4.0)}
    enc = create_encoder("vit_tiny_patch16_224", mods, "ms", patch_size=4, embed_dim=24, depth=4, num_heads=2)
    model = make_model("rotated", enc, gsd=0.5)
    x = Normalized({m: torch.randn(2, s.n_bands, n, n) for (m, s), n in zip(mods.items(), (16, 8))})
    ok = {m: torch.ones(2, 1, *v.shape[-2:], dtype=torch.bool) for m, v in x.items()}
    ok["sar"][1] = False
    batch = Batch(x, ok, dict(t=make_batch(2).targets["t"]))
    assert model.head.strides == [4.0, 8.0, 16.0, 32.0]  # tokens of 4 px at 2 m, in pixels of 0.5 m
    out = model(batch)
    assert out["size"].tolist() == [64, 64] and [y.shape[-1] for y in out["maps"]] == [16, 8, 4, 2]
    sum(terms(model, batch).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in mods for p in enc.stems[m].parameters() if p.ndim > 1)


def train(learn, epochs, **kw):
    with learn.no_bar(), learn.no_logging():
        learn.fit_task(epochs, **kw)
    return learn


def test_a_frozen_encoder_and_the_file(store, tmp_path):
    enc = create_encoder("test_resnet", {"rgb": store.modalities["rgb"]}, "rgb")
    learn = train(DetectionLearner(dataloaders(store, bs=6), enc, detector="retinanet", width=32, label_fraction=0.5), 1)
    new = learn.task_model.encoder.state_dict()
    assert all(torch.equal(v, new[k]) for k, v in enc.state_dict().items())
    model = load_model(save_model(learn.task_model, tmp_path / "m.safetensors"), "detection")
    assert model.frozen and model.classes == ["roof", "shed"] and model.settings["sizes"] == learn.task_model.settings["sizes"]
    batch, learn.task_model.training = next(iter(learn.tiles("val", 4))), False
    learn.task_model.eval()
    with torch.no_grad():
        a, b = learn.task_model.predict(batch), model.predict(batch)
    assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)


def read(path):
    with sqlite3.connect(path) as db:
        rows = db.execute(f'SELECT geom, name, score, area_m2 FROM "{path.stem}"').fetchall()
        srs = db.execute("SELECT srs_id FROM gpkg_geometry_columns").fetchone()[0]
    return np.array([np.frombuffer(g[-80:], "<f8").reshape(5, 2)[:4] for g, *_ in rows]).reshape(-1, 4, 2), [r[1:] for r in rows], srs


def test_from_the_command_line_to_polygons(store, tmp_path, capsys):
    scenes = store.path.parent / "scenes"
    flags = "--task detection --encoder test_resnet --mode finetune --epochs 40 --bs 4 --lr 2e-3 --workers 0 --set width=32"
    assert main(f"finetune {store.path} {tmp_path}/run {flags}".split()) == 0, capsys.readouterr().err
    assert {"model.safetensors", "metrics.json", "results.png", "curves.png"} <= {f.name for f in (tmp_path / "run").iterdir()}
    assert json.loads((tmp_path / "run/metrics.json").read_text())["AP50"] > 0.5
    name = store.index[store.index.split == "test"].scene.iloc[0]
    call = f"predict {tmp_path}/run/model.safetensors {scenes}/scenes.yaml {tmp_path}/%s.gpkg --name {name} %s"
    found = {}
    for out, more in (("tiled", "--overlap 32"), ("other", "--overlap 24"), ("whole", "--window 192 --overlap 0")):
        assert main((call % (out, more)).split()) == 0, capsys.readouterr().err
        found[out] = read(tmp_path / f"{out}.gpkg")
    corners, rows, srs = found["tiled"]
    assert srs == 32631 and all(r[0] == "roof" and 0.3 <= r[1] <= 1 and r[2] > 0 for r in rows)
    truth = np.loadtxt(scenes / f"{name}.txt", usecols=range(8)).reshape(-1, 4, 2)
    left = 4e5 + 1000 * int(name[1:])
    middle = {k: (v[0].mean(1) - [left, 5e6]) / [0.5, -0.5] for k, v in found.items()}
    far = {k: np.linalg.norm(m[:, None] - truth.mean(1), axis=-1) for k, m in middle.items()}
    once = [(d.min(0) < 4).sum() for d in far.values()]
    assert min(once) >= 14 and max(once) - min(once) <= 2  # of 18 roofs
    for k in ("tiled", "other"):  # no roof twice: at most as many boxes more than roofs as in one piece, and one
        assert len(middle[k]) - (far[k].min(0) < 4).sum() <= len(middle["whole"]) - (far["whole"].min(0) < 4).sum() + 1
    angle = np.arctan2(*(truth[:, 1] - truth[:, 0]).T[::-1])
    q = (corners - [left, 5e6]) / [0.5, -0.5]
    near = far["tiled"].argmin(0)[far["tiled"].min(0) < 3]
    turn = np.arctan2(*(q[near, 1] - q[near, 0]).T[::-1]) - angle[far["tiled"].min(0) < 3]
    assert np.median(np.rad2deg(np.abs(np.arcsin(np.sin(turn))))) < 8
    model = load_model(tmp_path / "run/model.safetensors")
    with pytest.raises(DataError, match="model for detection, which makes no map"):
        predict_scene(model, {"rgb": str(scenes / "s0.tif")}, tmp_path / "map.tif")
    with pytest.raises(DataError, match="not written as .tif"):
        detect_scene(model, {"rgb": str(scenes / "s0.tif")}, tmp_path / "map.tif")
    assert main((call % ("more", "--probabilities")).split()) == 2 and "Leave it out" in capsys.readouterr().err


def test_unknown_scenes_and_wrong_targets(tmp_path, store):
    d = tmp_path / "d"
    half = build_store(make_store(d, unknown=(0, 1)), tmp_path / "store", tile=64, block=192, splits=(1.0, 0.0, 0.0), progress=False)
    dls, enc = dataloaders(half, bs=4, splits="train"), create_encoder("test_resnet", {"rgb": half.modalities["rgb"]}, "rgb")
    learn = DetectionLearner(dls, enc, width=32)
    assert len(learn.dls.train.dataset) == 18 < len(dls.train.dataset) and learn.counts["unknown"] == 0
    assert learn.task_model.rotated and learn.counts["roof"] > 20 and learn.counts["shed"] == 0
    few = DetectionLearner(dls, enc, width=32, empty=0.0, label_fraction=0.5)
    assert 0 < len(few.dls.train.dataset) <= 9 and few.counts["empty"] == 0
    with pytest.raises(DataError, match="unknown target|no target|'rooves'"):
        DetectionLearner(dls, enc, "rooves", width=32)
    with pytest.raises(DataError, match="retinanet has no rotated boxes"):
        DetectionLearner(dls, enc, detector="retinanet", rotated=True, width=32)
    bad = TileStore(half.path)
    bad.targets["roofs"].classes = bad.targets["roofs"].classes[1:]
    rows = bad._boxes["roofs"][0]
    rows[:, 0] = 3
    with pytest.raises(DataError, match="class 3, but there are 1"):
        survey_boxes(bad, "roofs", half.split("train"))
    rows[:, 0] = -1
    with pytest.raises(DataError, match="no box in"):
        survey_boxes(bad, "roofs", half.split("train"))


def test_boxes_of_upright_detectors_are_those_around_turned_ones():
    model, batch = make_model("retinanet"), make_batch()
    truth = true_boxes(batch.targets["t"])[0]
    q = box_corners(truth["boxes"])
    found = [dict(boxes=torch.cat([q.amin(1), q.amax(1)], 1), scores=torch.ones(3), labels=truth["labels"])]
    metric = model.metric()
    model.score(metric, found, batch.targets["t"])
    assert metric.compute()["AP50:95"] == 1 and (rotated_iou(truth["boxes"], truth["boxes"]).diagonal() > 0.999).all()


def test_levels_of_an_encoder_of_another_pixel_size():
    "Cells are counted in pixels of the boxes, whatever the encoder was pre-trained on"
    here = make_model("fcos")
    far = create_encoder("test_resnet", {"rgb": preset("rgb", 2.0)}, "rgb")
    stats = {"rgb": dict(mean=[0.0] * 3, std=[1.0] * 3, p01=[0.0] * 3, p99=[1.0] * 3)}
    model = DetectionModel(far, Normalize({"rgb": preset("rgb", 0.5)}, stats), 2, 0.5, 64, decoder="fcos", width=32, classes=["a", "b"])
    near = create_encoder("test_resnet", {"rgb": preset("rgb", 0.5)}, "rgb")
    same = DetectionModel(near, Normalize({"rgb": preset("rgb", 0.5)}, stats), 2, 0.5, 64, decoder="fcos", width=32, classes=["a", "b"])
    assert model.head.strides == same.head.strides and here.head.strides[0] <= 8


@pytest.mark.data
def test_cars_and_houses(real_data, root, tmp_path, monkeypatch):
    monkeypatch.setenv("RS_SELFSUP_DATA", str(real_data))
    store = build_store(root / "data_recipes/scenes/aerial_boxes.yaml", tmp_path / "store", tile=128, stride=256, splits=(1, 0, 0), progress=False)
    enc = create_encoder("test_resnet", {"rgb": store.modalities["rgb"]}, "rgb")
    learn = DetectionLearner(dataloaders(store, bs=8, splits="train"), enc, mode="finetune", width=32, empty=0.2)
    assert not learn.task_model.rotated and learn.counts["Car"] > 20
    batch = learn.dls.train.one_batch()[0]
    before = sum(learn.method(batch).values()).item()
    train(learn, 3, lr=1e-3)
    learn.model.eval()
    with torch.no_grad():
        assert sum(learn.method(batch).values()).item() < before
