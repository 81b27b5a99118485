"Segmentation, height and change: what is frozen stays frozen, what has no data does not count, what was killed goes on, and a map is a map."

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from fastai.callback.core import Callback
from rs_selfsup.backbones import create_encoder
from rs_selfsup.callbacks import param_groups, read_checkpoint, warmup_cosine
from rs_selfsup.cli import main
from rs_selfsup.data.loading import dataloaders
from rs_selfsup.data.synthetic import write_scenes
from rs_selfsup.data.tiles import TileStore, build_store
from rs_selfsup.downstream.change import ChangeLearner
from rs_selfsup.downstream.core import few_labels, load_model, save_model
from rs_selfsup.downstream.height import HeightLearner
from rs_selfsup.downstream.segmentation import SegmentationLearner
from rs_selfsup.export import export_encoder
from rs_selfsup.modalities import DataError

pytestmark = pytest.mark.usefixtures("one_thread")
NET = dict(embed_dim=24, depth=2, num_heads=2)
TARGET = {SegmentationLearner: "landcover", HeightLearner: "height", ChangeLearner: "change"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    d = tmp_path_factory.mktemp("downstream")
    scenes = write_scenes(d / "scenes", 4, 128, modalities=("rgb", "dsm", "rgb_t2"), progress=False, collars=0.5)
    return build_store(scenes, d / "store", tile=32, block=64, splits=(0.6, 0.2, 0.2), min_valid=0.2, progress=False)


def vit(store, modalities=("rgb",), **kw):
    return create_encoder("vit_tiny_patch16_224", {m: store.modalities[m] for m in modalities}, modalities[0], patch_size=8, **{**NET, **kw})


def make(store, learner=SegmentationLearner, encoder=None, **kw):
    dls = dataloaders(store, bs=16, seed=0, splits=("train", "val"))
    return learner(dls, encoder or vit(store), kw.pop("target", TARGET[learner]), **kw)


def train(learn, epochs=1, **kw):
    with learn.no_bar(), learn.no_logging():
        learn.fit_task(epochs, **kw)
    return learn


def test_an_encoder_of_another_pixel_size(store, tmp_path):
    "Pre-trained on coarser pixels: maps, losses and the model file go by the pixels of the task's store"
    here = store.modalities["rgb"]
    far = create_encoder("vit_tiny_patch16_224", {"rgb": here.replace(gsd=3 * here.gsd)}, "rgb", patch_size=8, **NET)
    learn = train(make(store, encoder=far))
    assert learn.validate("val")["mIoU"] > 0
    batch = learn.dls.train.one_batch()[0]
    assert learn.task_model(batch).shape[-2:] == batch.images["rgb"].shape[-2:] == learn.method.truth(batch).shape[-2:]
    model = load_model(save_model(learn.task_model, tmp_path / "model.safetensors"))
    assert model.modalities["rgb"].gsd == here.gsd == model.gsd and model.encoder.modalities["rgb"].gsd == 3 * here.gsd


class Kill(Callback):
    "The machine stops in the middle of a step"
    order = 19

    def after_pred(self):
        if self.training and self.learn.step == 17:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_run(store, folder, **kw):
    return train(make(store, mode="finetune", decoder="fpn", width=8), 3, checkpoint_dir=folder, save_every=5, **kw)


def test_killed_and_resumed_is_the_same_run(store, tmp_path):
    torch.manual_seed(0)
    whole = killed_run(store, tmp_path / "whole")
    args = [sys.executable, __file__, str(store.path), str(tmp_path / "cut")]
    p = subprocess.run(args, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300)
    assert p.returncode == -signal.SIGKILL, p.stderr[-2000:]
    c = read_checkpoint(tmp_path / "cut")
    assert c["step"] == 15 and c["step"] % len(whole.dls.train)  # in the middle of an epoch
    torch.manual_seed(0)
    again = killed_run(store, tmp_path / "cut", resume=True)
    a, b = whole.method.state_dict(), again.method.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_every_layer_has_its_share_of_the_rate(store):
    seen = []

    class Look(Callback):
        order = 50

        def after_step(self):
            seen.append([(g["lr"], g["lr_scale"]) for g in param_groups(self.learn.opt)])

    learn = train(make(store, mode="finetune", layer_decay=0.5), 2, lr=1e-2, cbs=[Look()])
    n = 2 * len(learn.dls.train)
    assert len(seen) == n and len({s for _, s in seen[0]}) >= 4
    for k, groups in enumerate(seen):
        peak = warmup_cosine(k, n, 1e-2, 1e-2 / 30, 0.1)
        assert all(lr == pytest.approx(peak * s) for lr, s in groups)


def test_a_frozen_encoder_does_not_move_not_even_its_batchnorm(store):
    enc = create_encoder("test_resnet", {"rgb": store.modalities["rgb"]}, "rgb")
    with torch.no_grad():  # as after some training
        for m in enc.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_()
    old = {k: v.clone() for k, v in enc.state_dict().items()}
    learn = train(make(store, encoder=enc))
    new = learn.task_model.encoder.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(v, new[k]) for k, v in old.items())
    tuned = train(make(store, encoder=enc, mode="finetune")).task_model.encoder.state_dict()
    assert not any(torch.equal(v, tuned[k]) for k, v in old.items() if k.endswith(("running_mean", "conv1.weight")))


@pytest.mark.parametrize("learner", TARGET)
def test_what_has_no_data_does_not_count(store, learner):
    learn = make(store, learner, decoder="fpn", width=8)
    batch = next(b for b in learn.tiles("train", 16) if not b.full)
    hole = ~batch.valid["rgb"][:, 0]
    assert hole.any() and not hole.all()
    truth = learn.method.truth(batch)
    assert (truth[hole] == 255).all() if learner is not HeightLearner else truth[hole].isnan().all()
    other = replace(batch, targets={k: t.clone() for k, t in batch.targets.items()}, images=type(batch.images)(batch.images))
    other.targets[learn.method.target][hole] = 1
    for m in ("rgb", "rgb_t2"):
        other.images[m] = batch.images[m].masked_fill(~batch.valid[m], 0.0)
    learn.model.eval()
    with torch.no_grad():
        a, b = learn.method(batch), learn.method(other)
    assert all(torch.allclose(v, b[k]) and v.isfinite() for k, v in a.items())


def test_few_labels_are_nested_and_as_many_as_said(store):
    ids = store.split("train")
    parts = [few_labels(store, ids, f, seed=3) for f in (0.05, 0.2, 0.7, 1.0)]
    assert all(set(a) <= set(b) for a, b in zip(parts, parts[1:])) and set(parts[-1]) == set(ids)
    assert abs(len(parts[1]) - 0.2 * len(ids)) <= 8
    learn = make(store, label_fraction=0.05)  # fewer tiles than a batch: the batch shrinks
    assert learn.dls.train.bs == len(learn.dls.train.dataset) == len(few_labels(store, ids, 0.05, 0)) < 16
    train(learn)


def test_statistics_are_those_of_the_encoder_and_of_the_first_date(store, tmp_path):
    stats = {"rgb": {k: [v + 7 for v in vs] if k == "mean" else vs for k, vs in store.stats["rgb"].items()}}
    export_encoder(vit(store), tmp_path / "enc.safetensors", modality="all", stats=stats, size=(32, 32))
    learn = make(store, ChangeLearner, tmp_path / "enc.safetensors")
    again = load_model(save_model(learn.task_model, tmp_path / "m.safetensors"))
    for n in (learn.dls.normalize, learn.task_model.normalize, learn.dls.train.augment.normalize, again.normalize):
        for m in ("rgb", "rgb_t2"):
            assert n.const(m, "mean", torch.empty(0)).flatten().tolist() == pytest.approx(stats["rgb"]["mean"])


def test_class_ids_beyond_the_classes(store, tmp_path):
    copy = shutil.copytree(store.path, tmp_path / "store")
    bad = TileStore(copy)
    bad.targets["landcover"].classes = bad.targets["landcover"].classes[:3]
    with pytest.raises(DataError, match=r"class ids \[3.* in a target of 3 classes"):
        SegmentationLearner(dataloaders(bad, bs=16), vit(store), "landcover")


def test_an_encoder_and_a_store_without_a_common_sensor(store):
    sar = {"sar": replace(store.modalities["rgb"], name="sar")}
    with pytest.raises(DataError, match="'sar'.*the store has"):
        make(store, encoder=create_encoder("vit_tiny_patch16_224", sar, "sar", patch_size=8, **NET))
    other = {"rgb": replace(store.modalities["rgb"], bands=tuple(reversed(store.modalities["rgb"].bands)))}
    with pytest.raises(DataError, match="knows rgb as"):
        make(store, encoder=create_encoder("vit_tiny_patch16_224", other, "rgb", patch_size=8, **NET))


def test_a_file_of_another_task_or_of_none(store, tmp_path):
    file = save_model(make(store, HeightLearner).task_model, tmp_path / "h.safetensors")
    with pytest.raises(DataError, match="a model for height, not for segmentation"):
        load_model(file, "segmentation")
    export_encoder(vit(store), tmp_path / "enc.safetensors", size=(32, 32))
    with pytest.raises(DataError, match="no model of a task"):
        load_model(tmp_path / "enc.safetensors")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match="h.safetensors"):
        load_model(file)


def test_a_model_of_heights_does_not_read_the_answer(tmp_path):
    "The same raster as modality and target is refused, by name; as modality alone, or as target alone, it is not"
    d = write_scenes(tmp_path / "scenes", 2, 64, modalities=("rgb",), progress=False)
    text = yaml.safe_load(d.read_text())
    text["modalities"]["ndsm"] = dict(preset="ndsm", gsd=0.5)
    text["targets"] = dict(height=dict(kind="regression", unit="metre"))
    del text["tile_label"], text["classes"]
    for s in text["scenes"]:
        s["targets"] = dict(height=s["targets"]["height"])
        s["rasters"]["ndsm"] = s["targets"]["height"]
    d.write_text(yaml.safe_dump(text))
    store = build_store(d, tmp_path / "store", tile=32, splits=(1, 0, 0), progress=False)
    dls, enc = dataloaders(store, bs=8, splits=("train",)), vit(store, ("rgb", "ndsm"))
    with pytest.raises(DataError, match="'ndsm', which the model reads, is target 'height' itself"):
        HeightLearner(dls, enc, mode="finetune")
    assert list(HeightLearner(dls, enc, modalities=["rgb"]).task_model.modalities) == ["rgb"]


@pytest.mark.parametrize("task", ["segmentation", "height", "change"])
def test_from_the_command_line_to_a_map(store, tmp_path, task, capsys):
    learner = dict(segmentation=SegmentationLearner, height=HeightLearner, change=ChangeLearner)[task]
    export_encoder(vit(store), tmp_path / "enc.safetensors", modality="all", stats=store.stats, size=(32, 32))
    args = f"finetune {store.path} {tmp_path}/run --task {task} --encoder {tmp_path}/enc.safetensors --target {TARGET[learner]} --epochs 1 --workers 0"
    assert main(args.split()) == 0
    assert {"model.safetensors", "metrics.json", "results.png", "curves.png"} <= {f.name for f in (tmp_path / "run").iterdir()}
    scenes = Path(store.path).parent / "scenes"
    assert main(f"predict {tmp_path}/run/model.safetensors {scenes}/scenes.yaml {tmp_path}/map.tif --name scene_01".split()) == 0, capsys.readouterr().err
    with rasterio.open(tmp_path / "map.tif") as f, rasterio.open(scenes / "scene_01" / "rgb.tif") as rgb:
        assert (f.crs, f.transform, f.shape) == (rgb.crs, rgb.transform, rgb.shape)
        y, valid = f.read(1), rgb.dataset_mask() > 0
        known = np.isfinite(y) if task == "height" else y != 255
        if task != "change":
            assert (known == valid).mean() > 0.999
        assert known.any()


def test_a_coarse_sensor_is_mapped_on_the_grid_of_the_labels(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", 3, 128, modalities=("rgb", "ms2"), progress=False)
    store = build_store(scenes, tmp_path / "store", tile=64, block=64, splits=(0.6, 0.2, 0.2), progress=False)
    enc = create_encoder("vit_tiny_patch16_224", {"ms2": store.modalities["ms2"]}, "ms2", patch_size=4, **NET)
    save_model(make(store, encoder=enc).task_model, tmp_path / "m.safetensors")
    assert main(f"predict {tmp_path}/m.safetensors {tmp_path}/scenes/scenes.yaml {tmp_path}/map.tif --name scene_00".split()) == 0
    with rasterio.open(tmp_path / "map.tif") as f, rasterio.open(tmp_path / "scenes/scene_00/rgb.tif") as rgb:
        assert (f.crs, f.transform, f.shape) == (rgb.crs, rgb.transform, rgb.shape) and (f.read(1) < 7).all()


@pytest.mark.data
def test_land_cover_of_real_tiles(real_data, root, tmp_path, monkeypatch):
    monkeypatch.setenv("RS_SELFSUP_DATA", str(real_data))
    store = build_store(root / "data_recipes/scenes/flair_rgbn_height.yaml", tmp_path / "store", tile=128, splits=(1, 0, 0), progress=False)
    dls = dataloaders(store, bs=16, splits=("train",))
    enc = create_encoder("vit_tiny_patch16_224", {"rgbn": store.modalities["rgbn"]}, "rgbn", patch_size=16, **NET)
    learn = SegmentationLearner(dls, enc, mode="finetune", decoder="fpn", width=16)
    before = learn.validate("train")
    train(learn, 4, lr=3e-3)
    assert learn.validate("train")["OA"] > before["OA"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    killed_run(TileStore(Path(sys.argv[1])), sys.argv[2], cbs=[Kill()])
