"Classes of whole tiles: what is frozen or unlabelled stays out of it, what has no data says nothing, and a map of windows lies where it should."

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rs_selfsup.backbones import create_encoder
from rs_selfsup.cli import main
from rs_selfsup.data.loading import dataloaders
from rs_selfsup.data.synthetic import write_scenes
from rs_selfsup.data.tiles import TileStore, build_store
from rs_selfsup.downstream.classification import ClassificationLearner, store_classes, tile_classes
from rs_selfsup.downstream.core import load_model, save_model
from rs_selfsup.downstream.height import HeightLearner
from rs_selfsup.evaluate import probe_table
from rs_selfsup.export import export_encoder
from rs_selfsup.inference import predict_array, predict_scene
from rs_selfsup.data.rasters import load_scenes
from rs_selfsup.modalities import DataError
from rs_selfsup.recipe_examples import write_example
from rs_selfsup.recipes import load_recipe, prepare

pytestmark = pytest.mark.usefixtures("one_thread")
NET = dict(embed_dim=24, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    d = tmp_path_factory.mktemp("classification")
    scenes = write_scenes(d / "scenes", 6, 96, modalities=("rgb", "dsm"), progress=False, collars=0.5)
    return build_store(scenes, d / "store", tile=32, block=64, splits=(0.6, 0.2, 0.2), min_valid=0.2, progress=False)


def vit(store, modalities=("rgb",)):
    return create_encoder("vit_tiny_patch16_224", {m: store.modalities[m] for m in modalities}, modalities[0], patch_size=8, **NET)


def make(store, encoder=None, **kw):
    return ClassificationLearner(dataloaders(store, bs=16, seed=0), encoder or vit(store), **kw)


def train(learn, epochs=1, **kw):
    with learn.no_bar(), learn.no_logging():
        learn.fit_task(epochs, **kw)
    return learn


def with_labels(store, folder, labels):
    "A copy of the store with these labels in its index and its files"
    copy = TileStore(shutil.copytree(store.path, folder))
    index = copy.index.copy()
    index["label"] = labels
    index.to_csv(copy.path / "index.csv", index=False)
    (copy.path / "label" / "c.0").write_bytes(np.asarray(labels, np.int64).tobytes())
    return TileStore(copy.path)


@pytest.mark.parametrize("decoder", ["linear", "attention"])
def test_a_frozen_encoder_does_not_move_not_even_its_batchnorm(store, decoder):
    enc = create_encoder("test_resnet", {"rgb": store.modalities["rgb"]}, "rgb")
    with torch.no_grad():  # as after some training
        for m in enc.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_()
    old = {k: v.clone() for k, v in enc.state_dict().items()}
    learn = make(store, enc, decoder=decoder)
    head = {k: v.clone() for k, v in learn.task_model.head.state_dict().items()}
    new = train(learn).task_model.encoder.state_dict()
    assert all(torch.equal(v, new[k]) for k, v in old.items())
    assert not any(torch.equal(head[k], v) for k, v in learn.task_model.head.state_dict().items() if k.endswith("weight"))


def test_cut_and_resumed_is_the_same_run(store, tmp_path):
    enc = vit(store)
    run = lambda folder, **kw: train(make(store, enc, mode="finetune", decoder="attention"), 3, checkpoint_dir=tmp_path / folder, save_every=5, **kw)
    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    files = sorted((tmp_path / "cut").glob("step-*.ckpt"))
    assert len(files) > 2
    for f in files[1:]: f.unlink()  # as if it had been killed soon after the first of them
    again = run("cut", resume=True)
    a, b = whole.method.state_dict(), again.method.state_dict()
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_unlabelled_tiles_do_not_count(store, tmp_path):
    label = store.index["label"].to_numpy().copy()
    out = np.arange(len(label)) % 3 == 0
    label[out] = -1
    part = with_labels(store, tmp_path / "store", label)
    learn = make(part, mode="finetune")
    assert set(learn.dls.train.dataset.ids) == set(part.split("train")) - set(np.flatnonzero(label < 0))
    assert learn.counts.sum() == len(learn.dls.train.dataset)
    batch = next(iter(learn.tiles("val", 64)))
    kept = batch.label >= 0
    assert 0 < kept.sum() < len(kept)
    learn.model.eval()
    with torch.no_grad():
        a, b = learn.method(batch)["ce"], learn.method(batch.index(kept))["ce"]
    assert torch.allclose(a, b, atol=1e-6)
    metric = learn.task_model.metric()
    with torch.no_grad():
        learn.task_model.score(metric, learn.task_model(batch), learn.method.truth(batch))
    assert metric.matrix.sum() == kept.sum()
    none = batch.index(~kept)
    with torch.no_grad():
        assert learn.method(none)["ce"] == 0


def test_several_labels_against_a_loop():
    g = torch.Generator().manual_seed(0)
    for k in range(300):
        n, present = 1 + k % 6, (0.05, 0.25, 0.6, 1.0)[k % 4]
        mask = torch.randint(0, n, (1, 5, 7), generator=g)
        mask[torch.rand(1, 5, 7, generator=g) < (k % 5) / 4] = 255
        known = [v for v in mask.flatten().tolist() if v != 255]
        share = [sum(v == c for v in known) / max(1, len(known)) for c in range(n)]
        assert tile_classes(mask, n, present, True)[0].tolist() == ([int(s >= present - 1e-7) for s in share] if known else [-1] * n)
        best = max(range(n), key=lambda c: share[c])
        assert tile_classes(mask, n, present)[0].item() == (best if known and share[best] >= present - 1e-7 else -1)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("decoder", ["linear", "attention"])
def test_what_has_no_data_does_not_change_the_answer(store, decoder, multilabel):
    learn = make(store, vit(store, ("rgb", "dsm")), target="landcover", multilabel=multilabel, decoder=decoder)
    batch = next(iter(learn.tiles("train", 8)))
    batch.valid, batch.full = {m: v.clone() for m, v in batch.valid.items()}, False
    for m in ("rgb", "dsm"): batch.valid[m][0, :, :12] = False  # one and a half rows of patches
    batch.valid["dsm"][1] = False
    other = replace(batch, targets={k: t.clone() for k, t in batch.targets.items()}, images=type(batch.images)(batch.images))
    other.targets["landcover"][0, :12] = 1
    for m in ("rgb", "dsm"):  # patches without data hold anything
        gone = torch.nn.functional.max_pool2d(batch.valid[m].float(), 8).repeat_interleave(8, 2).repeat_interleave(8, 3) == 0
        assert gone[0].sum() == 8 * 32
        other.images[m] = batch.images[m].masked_fill(gone, 7.0)
    learn.model.eval()
    assert torch.equal(learn.method.truth(batch), learn.method.truth(other))
    with torch.no_grad():
        assert torch.allclose(learn.task_model(batch), learn.task_model(other), atol=1e-5)


def test_a_tile_without_data_has_no_class(store):
    learn = make(store)
    batch = next(iter(learn.tiles("train", 8)))
    batch.valid, batch.full = {m: v.clone() for m, v in batch.valid.items()}, False
    batch.valid["rgb"][0] = False
    assert learn.method.truth(batch).tolist() == [-1, *batch.label[1:].tolist()]


def test_class_ids_beyond_the_classes(store, tmp_path):
    label = store.index["label"].to_numpy().copy()
    label[store.split("train")[3]] = 11
    with pytest.raises(DataError, match=r"'label': class ids \[11\] in a target of 8 classes"):
        make(with_labels(store, tmp_path / "store", label))
    bad = TileStore(store.path)
    bad.targets["landcover"].classes = bad.targets["landcover"].classes[:3]
    with pytest.raises(DataError, match=r"'landcover': class ids \[3.* in a target of 3 classes"):
        make(bad, target="landcover", multilabel=True)


def test_a_store_without_labels(store, tmp_path):
    with pytest.raises(DataError, match="no tile has a label.*tile_label"):
        make(with_labels(store, tmp_path / "a", np.full(len(store), -1)))
    label = np.full(len(store), -1)
    label[store.split("val")] = 1
    with pytest.raises(DataError, match="training tiles has a class"):
        make(with_labels(store, tmp_path / "b", label))


def test_few_labels_keep_every_class(store):
    for kw in (dict(), dict(target="landcover", multilabel=True)):
        few, many = make(store, label_fraction=0.05, **kw), make(store, **kw)
        assert len(few.dls.train.dataset) < 0.3 * len(many.dls.train.dataset)
        assert torch.equal(few.counts > 0, many.counts > 0)
    rare = store_classes(store, "landcover", store.split("train"), True)
    assert torch.equal((rare == 1).sum(0), many.counts)


def test_its_file_and_those_of_other_tasks(store, tmp_path):
    for kw in (dict(smoothing=0.1, pool="both", dropout=0.1), dict(target="landcover", multilabel=True, present=0.2, decoder="attention", heads=3)):
        learn = make(store, **kw)
        again = load_model(save_model(learn.task_model, tmp_path / "m.safetensors"), "classification")
        batch = next(iter(learn.tiles("val", 8)))
        with torch.no_grad():
            assert torch.equal(again(batch), learn.task_model.eval()(batch))
        assert torch.equal(again.truth(batch, kw.get("target")), learn.method.truth(batch)) and again.settings == learn.task_model.settings
    height = HeightLearner(dataloaders(store, bs=16), vit(store), "height", "linear")
    file = save_model(height.task_model, tmp_path / "h.safetensors")
    with pytest.raises(DataError, match="a model for height, not for classification"):
        load_model(file, "classification")


@pytest.mark.parametrize("flags", ["", "--target landcover --decoder attention --set multilabel=true"])
def test_from_the_command_line_to_a_map(store, tmp_path, flags, capsys):
    export_encoder(vit(store), tmp_path / "enc.safetensors", modality="all", stats=store.stats, size=(32, 32))
    args = f"finetune {store.path} {tmp_path}/run --task classification --encoder {tmp_path}/enc.safetensors --epochs 1 --workers 0 {flags}"
    assert main(args.split()) == 0, capsys.readouterr().err
    assert {"model.safetensors", "metrics.json", "results.png", "curves.png"} <= {f.name for f in (tmp_path / "run").iterdir()}
    assert ("mAP" if flags else "OA") in (tmp_path / "run" / "metrics.json").read_text()
    scenes = Path(store.path).parent / "scenes"
    file = f"{tmp_path}/run/model.safetensors"
    assert main(f"predict {file} {scenes}/scenes.yaml {tmp_path}/map.tif --name scene_01".split()) == 0, capsys.readouterr().err
    model = load_model(file)
    with rasterio.open(tmp_path / "map.tif") as f, rasterio.open(scenes / "scene_01" / "rgb.tif") as rgb:
        t = rgb.transform
        assert f.crs == rgb.crs and f.transform == t @ t.scale(16) and f.nodata == 255
        assert f.shape == (-(-rgb.height // 16), -(-rgb.width // 16))
        y, valid = f.read(), rgb.dataset_mask() > 0
        share = valid.reshape(f.height, 16, f.width, 16).mean((1, 3))
        assert ((y[0] != 255) == (share >= 0.5)).all()
        assert (y[y != 255] < (201 if flags else 8)).all()
        if flags:
            assert f.descriptions == tuple(model.classes) and f.scales[0] == 0.005
        else:
            assert f.tags(1)["CLASS_0"] == model.classes[0] and f.colormap(1)[255][3] == 0
    assert main(f"predict {file} {scenes}/scenes.yaml {tmp_path}/b.tif --name scene_01 --overlap 0.25".split()) == 2
    assert "overlap of 0, .5 or .75" in capsys.readouterr().err


def test_a_map_in_strips_is_that_of_one_piece(store, tmp_path):
    model = make(store).task_model
    scenes = load_scenes(Path(store.path).parent / "scenes" / "scenes.yaml")
    one, ok = predict_array(model, "scene_02", scenes=scenes, overlap=0.75)
    predict_scene(model, "scene_02", tmp_path / "m.tif", scenes=scenes, overlap=0.75, panel=64, progress=False)
    with rasterio.open(tmp_path / "m.tif") as f:
        y = f.read(1)
        assert y.shape == ok.shape == (24, 24) and f.transform.a == 8 * scenes.modalities["rgb"].gsd
    assert ((y != 255) == ok).all()
    sure = np.sort(one, 0)[-1] - np.sort(one, 0)[-2] > 1e-4  # batches of another size differ in the last bits
    assert (y == one.argmax(0))[ok & sure].all() and (ok & sure).sum() > 100
    assert np.allclose(one.sum(0)[ok], 1, atol=1e-5)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    "BigEarthNet as published, a few patches more than the example has: each twice, in train and in val"
    root, r = tmp_path_factory.mktemp("several"), load_recipe("bigearthnet")
    block = r.scenes["published"]
    block["example"]["words"] = [{"scene": f"S2A_MSIL2A_20170613T101031_{k}_{j}"} for k in range(2) for j in range(6)]
    block["splits"] = {"names": {"train": [w["scene"] for w in block["example"]["words"][:6]], "val": [w["scene"] for w in block["example"]["words"][6:]]}}
    write_example(r, root / "data", "published")
    for k in range(6):  # the same ground and labels in val
        for p in (root / "data").glob(f"*/*_0_{k}/*"):
            q = Path(str(p).replace(f"_0_{k}", f"_1_{k}"))
            q.write_bytes(p.read_bytes())
    return r, root


def test_several_labels_of_a_dataset(several):
    r, root = several
    store = prepare(r, root / "data", root / "store", "published", tile=48, progress=False)[3]
    assert (store.index.label == -1).all() and store.labels.shape == (12, 19) and set(store.labels.sum(1)) == {3}
    batch = dataloaders(store, bs=4).train.one_batch()[0]
    assert torch.equal(batch.label, torch.from_numpy(store.labels[batch.tile.numpy()].astype(np.int64)))
    enc = create_encoder("vit_tiny_patch16_224", store.modalities, "s2_10m", patch_size=6, **NET)
    learn = ClassificationLearner(dataloaders(store, bs=6), enc, multilabel=True, mode="finetune", layer_decay=1.0)
    assert learn.method.target is None and learn.task_model.classes == r.scenes["published"]["classes"] == store.classes
    assert learn.counts.tolist() == (store.labels[store.split("train")] == 1).sum(0).tolist()
    before = learn.validate()["mAP"]
    train(learn, 30, lr=5e-3)
    assert learn.validate()["mAP"] > before + 0.2
    with pytest.raises(DataError, match="several labels.*multilabel=True"):
        ClassificationLearner(dataloaders(store, bs=6), enc)
    with pytest.raises(DataError, match="several labels.*multilabel"): probe_table(enc, store)


def test_patches_without_a_list_of_labels(several):
    "Unknown labels teach nothing and are not counted; an empty list says that no class holds"
    r, root = several
    names = sorted(p.name for p in (root / "data/BigEarthNet-v1.0").iterdir())
    lists = [root / "data/BigEarthNet-v1.0" / n / f"{n}_labels_metadata.json" for n in names]
    kept = [p.read_text() for p in lists]
    try:
        lists[0].unlink()
        lists[1].write_text('{"labels": ["Airports"]}')
        store = prepare(r, root / "data", root / "unknown", "published", tile=48, progress=False)[3]
        of = {s: store.labels[i] for i, s in enumerate(store.index.scene)}
        assert (of[names[0]] == -1).all() and (of[names[1]] == 0).all() and store.report["unlabelled"] == 1
        enc = create_encoder("test_resnet", {"s2_10m": store.modalities["s2_10m"]}, "s2_10m")
        assert len(ClassificationLearner(dataloaders(store, bs=6), enc, multilabel=True).dls.train.dataset) == 5
        lists[2].write_text('{"labels": ["Pasture"]}')
        with pytest.raises(DataError, match="unknown label of scene .*Did you mean 'Pastures'"):
            prepare(r, root / "data", layout="published")
    finally:
        for p, text in zip(lists, kept): p.write_text(text)


@pytest.mark.data
def test_bigearthnet_labels(real_data, tmp_path):
    store = prepare(load_recipe("bigearthnet"), real_data / "bigearthnet_s1s2_original", tmp_path / "store", progress=False)[3]
    found = {s: [store.classes[k] for k in np.flatnonzero(row == 1)] for s, row in zip(store.index.scene, store.labels)}
    assert found["4_55"] == ["Pastures"] and found["36_85"] == ["Arable land", "Pastures"] and len(found["69_24"]) == 5


@pytest.mark.data
def test_eurosat(real_data, root, tmp_path, monkeypatch):
    monkeypatch.setenv("RS_SELFSUP_DATA", str(real_data))
    store = build_store(root / "data_recipes/scenes/eurosat_rgb.yaml", tmp_path / "store", tile=64, splits=(0.6, 0.2, 0.2), progress=False)
    enc = create_encoder("vit_tiny_patch16_224", store.modalities, "rgb", patch_size=16, **NET)
    learn = ClassificationLearner(dataloaders(store, bs=32), enc, mode="finetune", layer_decay=1.0)
    assert learn.task_model.classes == sorted(p.name for p in (real_data / "eurosat_rgb").iterdir() if p.is_dir())
    train(learn, 3, lr=3e-3)
    assert learn.validate()["OA"] > 0.3
