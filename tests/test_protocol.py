"The protocol: the cache changes nothing, the table loses nothing, the intervals are right."

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rs_selfsup import protocol
from rs_selfsup.backbones import create_encoder
from rs_selfsup.cli import main
from rs_selfsup.data.loading import dataloaders
from rs_selfsup.data.synthetic import write_scenes
from rs_selfsup.data.tiles import build_store
from rs_selfsup.downstream.change import ChangeLearner
from rs_selfsup.downstream.classification import ClassificationLearner
from rs_selfsup.downstream.core import few_labels
from rs_selfsup.downstream.detection import DetectionLearner
from rs_selfsup.downstream.height import HeightLearner
from rs_selfsup.downstream.segmentation import SegmentationLearner
from rs_selfsup.evaluate import random_like
from rs_selfsup.export import export_encoder, load_encoder
from rs_selfsup.metrics import ChangeMetrics, DepthMetrics, DetectionMetrics, SegmentationMetrics
from rs_selfsup.modalities import DataError
from rs_selfsup.protocol import CachedTiles, append_row, bootstrap, cached, group_metrics, merged
from rs_selfsup.protocol import COLUMNS, differences, evaluate, means, newest, plan, read_results

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = {SegmentationLearner: "landcover", HeightLearner: "height", ChangeLearner: "change", ClassificationLearner: None, DetectionLearner: "buildings"}
SHOWN = {HeightLearner: "RMSE", DetectionLearner: "AP50"}  # of the others: OA
NET = dict(embed_dim=24, depth=2, num_heads=2)
ROW = {c: 0 for c in COLUMNS} | dict(scores='{"mIoU": 0.5, "OA": 0.25}', machine="a, b")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    d = tmp_path_factory.mktemp("protocol")
    scenes = write_scenes(d / "scenes", 8, 96, modalities=("rgb", "dsm", "rgb_t2"), progress=False, collars=0.5)
    return build_store(scenes, d / "store", tile=32, block=96, splits=(0.4, 0.1, 0.5), min_valid=0.2, seed=6, progress=False)


@pytest.fixture(scope="module")
def encoder(store):
    torch.manual_seed(1)
    enc = create_encoder("vit_tiny_patch16_224", {"rgb": store.modalities["rgb"]}, "rgb", patch_size=8, **NET)
    file = Path(store.path).parent / "enc.safetensors"
    export_encoder(enc, file, modality="all", stats=store.stats, size=(32, 32))
    return file


@pytest.fixture
def config(store, encoder):
    task = dict(task="segmentation", target="landcover", modalities=["rgb"])
    return dict(store=str(store.path), fractions=[50], epochs=2, lr=1e-2, bs=16, encoders=dict(ours=str(encoder), random="random"), tasks=[task])


def make(store, encoder, learner=SegmentationLearner, augment=False, **kw):
    return learner(dataloaders(store, bs=16, seed=0, augment=augment, crop=kw.pop("crop", None)), encoder, kw.pop("target", TARGET.get(learner)), **kw)


def train(learn, epochs=2):
    with learn.no_bar(), learn.no_logging():
        learn.fit_task(epochs, lr=3e-3)
    return learn


# -- the cache ----------------
@pytest.mark.parametrize("learner, kw", [
    (SegmentationLearner, dict(decoder="linear")), (SegmentationLearner, dict(decoder="upernet", width=8, label_fraction=0.3)),
    (HeightLearner, dict(decoder="dpt", width=8)), (ChangeLearner, dict(join="concatenation", crop=24)), (ChangeLearner, dict(decoder="fpn", width=8)),
    (ClassificationLearner, dict(decoder="linear")), (ClassificationLearner, dict(decoder="attention")), (DetectionLearner, dict(decoder="fcos", width=32)),
])  # fmt: skip
def test_cached_equals_uncached(store, encoder, learner, kw):
    "In float32 but for the rounding of another batch size, closely in float16; nodata, crops, few labels, dropout and two dates included"
    plain, quick, half = (make(store, encoder, learner, **kw) for _ in range(3))
    train(plain)
    with cached(quick, dtype=torch.float32) as known:
        train(quick)
        assert len(known) == 2  # train and val, which the Learner validates on
        scores = quick.validate("test")
    with cached(half):
        train(half)
    a, b, c = (x.method.state_dict() for x in (plain, quick, half))
    apart = lambda p, q: max((v.float() - q[k].float()).abs().max().item() for k, v in p.items())
    assert apart(a, b) < 1e-3 and 0 < apart(a, c) < 5e-2
    for x in (plain, quick): assert x.validate("test") == pytest.approx(scores, nan_ok=True, rel=1e-3, abs=1e-3)
    k = SHOWN.get(learner, "OA")
    assert half.validate("test")[k] == pytest.approx(scores[k], rel=0.02, abs=0.02)
    assert "maps" not in vars(quick.task_model) and quick.dls.train.augment is not None  # as before


def test_nothing_is_encoded_or_read_twice(store, encoder, monkeypatch):
    learn, seen = make(store, encoder), []
    with cached(learn):
        learn.validate("test")
        monkeypatch.setattr(type(learn.task_model.features), "forward", lambda self, *a: seen.append(1))
        monkeypatch.setattr(type(store), "read", lambda self, *a, **kw: seen.append(1))
        train(learn)
        learn.validate("test")
    assert not seen


def test_maps_beyond_the_limit_lie_in_files(store, encoder, tmp_path):
    learn = make(store, encoder, decoder="fpn", width=8)
    a, b = (CachedTiles(learn, store.split("val"), limit=n, folder=tmp_path) for n in (100, 0))
    assert len(list(tmp_path.iterdir())) == 4 and b.kept.keys() == a.kept.keys() == {("rgb",)}
    assert all(torch.equal(x, y) and x.dtype == torch.float16 for x, y in zip(a.kept[("rgb",)], b.kept[("rgb",)]))
    with pytest.raises(DataError, match="no room"):
        protocol.reserve((2**45,), folder=tmp_path)


class Peeking(SegmentationLearner):
    class model_class(SegmentationLearner.model_class):
        def losses(self, out, batch, target):
            return {k: v + 0 * batch.images["rgb"].mean() for k, v in super().losses(out, batch, target).items()}


def test_a_task_that_looks_at_its_images_is_probed_without_a_cache(store, encoder):
    learn = make(store, encoder, Peeking, target="landcover")
    with pytest.raises(DataError, match="looks at its images"), cached(learn):
        pass
    with protocol.perhaps_cached(learn):
        assert learn.dls.train.augment is not None
        train(learn, 1)
    with pytest.raises(DataError, match="probe"), cached(make(store, encoder, mode="finetune")):
        pass


# -- the table of rows ----------------
def test_a_line_cut_anywhere_costs_that_line_alone(tmp_path):
    file = tmp_path / "r.csv"
    append_row(file, ROW | dict(config="a", memory=1.0))
    head = len(file.read_bytes())
    append_row(file, ROW | dict(config="b", memory=1234.56))
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        first = len(whole) - 1 <= cut and ["a", "b"] or head - 1 <= cut and ["a"] or []
        assert read_results(file)["config"].tolist() == first if cut else True
        assert append_row(file, ROW | dict(config="c"))
        assert read_results(file)["config"].tolist() == [*first, "c"] and file.read_bytes().endswith(b"\n")
        assert pd.read_csv(file)["config"].tolist() == [*first, "c"]  # for anybody's reader


def test_rows_are_added_and_nothing_else(tmp_path):
    file, before = tmp_path / "r.csv", b""
    for i in range(5):
        append_row(file, ROW | dict(config=f"{i}", value=0.1 * i, lo=math.nan, scores=json.dumps(dict(OA=i, note='"quoted",\n'))))
        now = file.read_bytes()
        assert now.startswith(before) and now.count(b"\n") == i + 2
        before = now
    rows = read_results(file)
    assert rows["value"].tolist() == [0.1 * i for i in range(5)] and rows["lo"].isna().all() and json.loads(rows["scores"][3])["OA"] == 3
    assert not append_row(file, ROW | dict(config="3")) and file.read_bytes() == before


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "a,b", "time,commit,pac\n", ",".join(COLUMNS[:-1]) + "\n1,2"])
def test_another_table_is_refused_and_left_alone(tmp_path, text):
    file = tmp_path / "other.csv"
    file.write_text(text)
    for call in (lambda: append_row(file, ROW), lambda: read_results(file)):
        with pytest.raises(DataError, match="other.csv: has other columns"):
            call()
    assert file.read_text() == text


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    file = tmp_path / "r.csv"
    for c in "abc":
        append_row(file, ROW | dict(config=c))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2][:20], lines[3], ""]))
    with pytest.raises(DataError, match="line 3 is not a row"):
        read_results(file)


def test_a_full_disk_leaves_no_half_row(tmp_path, monkeypatch):
    file, write = tmp_path / "r.csv", os.write
    append_row(file, ROW | dict(config="a"))
    before = file.read_bytes()
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(DataError, match="disk is full"):
        append_row(file, ROW | dict(config="b"))
    monkeypatch.undo()
    assert file.read_bytes() == before


WRITER = """
import sys
from rs_selfsup.protocol import COLUMNS, append_row
row = {c: 0 for c in COLUMNS} | dict(scores="x" * 3000)
print("ready", flush=True); sys.stdin.readline()
for i in range(60): append_row(sys.argv[1], row | dict(config=f"{sys.argv[2]}{i}"))
"""


def test_two_processes_at_once(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    args = dict(env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    both = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "r.csv"), c], **args) for c in "ab"]
    for p in both: assert p.stdout.readline() == "ready\n"
    for p in both: p.stdin.write("go\n"), p.stdin.flush()
    with ThreadPoolExecutor() as pool:  # and threads of this one
        list(pool.map(lambda i: append_row(tmp_path / "r.csv", ROW | dict(config=f"c{i}")), range(60)))
    assert [p.wait(500) for p in both] == [0, 0]
    rows = read_results(tmp_path / "r.csv")
    assert sorted(rows["config"]) == sorted(f"{c}{i}" for c in "abc" for i in range(60))
    with open(tmp_path / "r.csv", newline="") as f:
        assert {len(line) for line in csv.reader(f)} == {len(COLUMNS)}


# -- runs ----------------
def test_rows_say_what_was_done(store, config, tmp_path):
    config |= dict(fractions=[20, 100], modes=["probe", "finetune", "scratch"], epochs=dict(probe=2, finetune=1, scratch=1))
    rows = evaluate(config, tmp_path / "r.csv", progress=False)
    n = rows.groupby("mode", sort=False)["encoder"].agg(list).to_dict()
    assert n == dict(probe=["ours", "random"] * 2, finetune=["ours"] * 2, scratch=["random"] * 2)
    ids = store.split("train")
    assert rows.groupby("labels")["n"].agg(["min", "max"]).values.tolist() == [[n := len(few_labels(store, ids, 0.2)), n], [len(ids)] * 2]
    assert rows["memory"].between(50, 50000).all() and (rows["seconds"] > 0).all() and (rows["package"] == protocol.rs_selfsup.__version__).all()
    assert (rows["lo"] <= rows["value"]).all() and (rows["value"] <= rows["hi"]).all() and (rows["metric"] == "mIoU").all()
    scores = json.loads(rows["scores"][0])
    assert scores["mIoU"] == rows["value"][0] and {"mF1", "OA"} <= scores.keys() and json.loads(rows["settings"][0])["epochs"] == 2
    run = plan(config)[0]
    learn = protocol.make_learner(run)
    assert learn.task_model.frozen and learn.mode == "probe"
    whole = [r for r in plan(config | dict(modes=["finetune", "scratch"]))]
    assert {(r.encoder, protocol.make_learner(r).layer_decay) for r in whole} == {("ours", 0.75), ("random", 1.0)}


def test_a_random_encoder_is_the_files_with_the_seeds_weights(store, config, encoder):
    runs = {(r.encoder, r.seed): protocol.open_source(r, store) for r in plan(config | dict(seeds=[3, 4]))}
    file, a, b = (runs[k] for k in (("ours", 3), ("random", 3), ("random", 4)))
    w = [e.vit.blocks[0].attn.qkv.weight for e in (file, a, b, random_like(file, 3))]
    assert torch.equal(w[1], w[3]) and not torch.equal(w[1], w[2]) and not torch.equal(w[0], w[1]) and a.stats == file.stats
    named = plan(config | dict(encoders=dict(small=dict(name="vit_tiny_patch16_224", patch_size=8, **NET)), modes=["scratch"]))
    assert list(protocol.open_source(named[0], store).modalities) == ["rgb"]


def test_a_pretraining_for_each_seed(config, encoder, tmp_path):
    for s in range(2):
        (tmp_path / f"run_{s}").mkdir()
        (tmp_path / f"run_{s}" / "enc.safetensors").write_bytes(encoder.read_bytes())
    c = config | dict(encoders=dict(ours=f"{tmp_path}/run_{{seed}}/enc.safetensors"), seeds=2)
    assert [Path(r.source).parent.name for r in plan(c)] == ["run_0", "run_1"]
    with pytest.raises(DataError, match="run_2"):
        plan(c | dict(seeds=3))


def test_a_changed_config_is_another_run_and_the_same_one_is_none(config, encoder, tmp_path):
    out = tmp_path / "r.csv"
    evaluate(config, out, progress=False)
    before = out.read_bytes()
    assert len(evaluate(config, out, progress=False)) == 2 and out.read_bytes() == before
    keys = lambda **kw: {protocol.run_key(r) for r in plan(config | kw)}
    known = set(read_results(out)["config"])
    assert keys() == known
    for kw in (dict(lr=2e-2), dict(epochs=3), dict(seeds=[1]), dict(fractions=[51]), dict(split="val"), dict(crop=24), dict(settings=dict(balance=0))):
        assert not keys(**kw) & known, kw
    moved, new = tmp_path / "moved.safetensors", tmp_path / "new.safetensors"
    moved.write_bytes(encoder.read_bytes())
    assert keys(encoders=dict(ours=str(moved), random="random")) == known  # a file is what is in it
    export_encoder(random_like(load_encoder(encoder), 9), new, modality="all", stats=load_encoder(encoder).stats, size=(32, 32))
    assert len(keys(encoders=dict(ours=str(new), random="random")) & known) == 1  # the random one is the same
    evaluate(config | dict(lr=2e-2), out, progress=False)
    assert out.read_bytes().startswith(before) and len(read_results(out)) == 4
    assert sorted(newest(read_results(out))["setting"].unique()) == ["lr=0.01", "lr=0.02"]


def test_killed_and_started_again(config, tmp_path):
    "What is in the table when the machine stops stays there, and is not run again"
    out, file = tmp_path / "r.csv", tmp_path / "c.json"
    config |= dict(seeds=4)
    file.write_text(json.dumps(config))
    code = "import sys, torch; torch.set_num_threads(1); from rs_selfsup.protocol import evaluate; evaluate(sys.argv[1], sys.argv[2], progress=False)"
    p = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(file), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.time() + 300
    while time.time() < end and p.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 3): time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    before = out.read_bytes()
    n = len(read_results(out))
    assert 2 <= n < 8
    ran = []
    row = protocol.run_row
    with pytest.MonkeyPatch.context() as m:
        m.setattr(protocol, "run_row", lambda r: ran.append(r) or row(r))
        rows = evaluate(config, out, progress=False)
    assert len(rows) == 8 and len(ran) == 8 - n and out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert rows[rows["seed"] == 0]["value"].tolist() == evaluate(config | dict(seeds=1), tmp_path / "new.csv", progress=False)["value"].tolist()


def test_errors_are_clear_and_come_before_any_run(store, config, encoder, tmp_path):
    task = dict(task="segmentation", target="landcover")
    for kw, word in [
        (dict(tasks=[dict(task="segmentatoin")]), "unknown task 'segmentatoin'. Did you mean 'segmentation'"),
        (dict(tasks=[task | dict(target="landcovr")]), "unknown target 'landcovr'"),
        (dict(tasks=[task | dict(metric="mIUo")]), "unknown metric of segmentation 'mIUo'"),
        (dict(tasks=[task | dict(decodr="fpn")]), "unknown setting of segmentation 'decodr'"),
        (dict(tasks=[task | dict(modalities=["sar"])]), "sar"),
        (dict(tasks=[task | dict(epochs=dict(finetune=3))]), "epochs for"),
        (dict(encoders=dict(a="none.safetensors")), "none.safetensors: there is no such encoder file"),
        (dict(encoders=dict(a=str(encoder), r="random b")), "unknown encoder file 'b'"),
        (dict(encoders=dict(a=str(encoder), b=str(encoder), r="random")), "random like which of"),
        (dict(encoders={}), "no encoders"),
        (dict(store=str(tmp_path / "nowhere")), "nowhere"),
        (dict(fractions=[120]), "120 %"),
        (dict(seed=3), "unknown setting 'seed'. Did you mean 'seeds'"),
        (dict(modes=["scratch"], encoders=dict(a=str(encoder))), "no encoder for mode 'scratch'"),
    ]:
        with pytest.raises(DataError, match="(?s)" + word.replace("?", r"\?")):
            evaluate(config | kw, tmp_path / "r.csv", progress=False)
    with pytest.raises(DataError, match="no such file"):
        evaluate(tmp_path / "no.toml", tmp_path / "r.csv")
    with pytest.raises(DataError, match="unknown task of this config"):
        plan(config, only=["change"])
    assert not (tmp_path / "r.csv").exists()


# -- intervals ----------------
def naive(metric, groups, score, draws, seed):
    g, values = np.random.default_rng(seed), []
    for _ in range(draws):
        m = metric()
        for i in g.integers(0, len(groups), len(groups)):
            m.update(*groups[i])
        values.append(m.compute()[score])
    return np.nanquantile(values, [0.025, 0.975])


@pytest.mark.parametrize("kind", ["segmentation", "change", "height", "detection"])
def test_the_bootstrap_is_that_of_resampled_pixels(kind):
    g = torch.Generator().manual_seed(0)
    classes = lambda k: (torch.randint(0, k, (2, 6, 6), generator=g), torch.randint(0, k, (2, 6, 6), generator=g))
    metres = lambda: (torch.rand(2, 6, 6, generator=g) + 1, torch.rand(2, 6, 6, generator=g) + 1)
    metric, score, draw = dict(segmentation=(lambda: SegmentationMetrics(4), "mIoU", lambda: classes(4)), change=(ChangeMetrics, "F1", lambda: classes(2)),
                               height=(DepthMetrics, "RMSE", metres), detection=(lambda: DetectionMetrics(2), "AP50", lambda: boxes(g)))[kind]  # fmt: skip
    groups = [draw() for _ in range(5)]
    parts = [metric().update(*x) for x in groups]
    before = [m.compute() for m in parts]
    n = 20 if kind == "detection" else 60
    assert bootstrap(parts, score, n, seed=7) == pytest.approx(naive(metric, groups, score, n, 7))
    for m, b in zip(parts, before): assert m.compute() == pytest.approx(b, nan_ok=True)  # left as they were
    assert all(map(math.isnan, bootstrap(parts[:1], score))) and all(map(math.isnan, bootstrap(parts, score, 0)))


def boxes(g):
    at = torch.rand(4, 2, generator=g) * 20
    true = dict(boxes=torch.cat([at, at + 5], 1), labels=torch.randint(0, 2, (4,), generator=g))
    pred = dict(boxes=true["boxes"] + torch.rand(4, 4, generator=g), labels=true["labels"], scores=torch.rand(4, generator=g))
    return [pred], [true]


def test_scenes_together_are_the_split(store, encoder):
    learn = train(make(store, encoder, ChangeLearner))
    parts = group_metrics(learn)
    index = store.index.set_index("tile").loc[store.split("test")]
    assert list(parts) == list(dict.fromkeys(index["group"])) and len(parts) == 4
    assert merged(parts.values()).compute() == learn.validate("test")
    assert all(merged(parts.values()).state["matrix"].sum() > m.state["matrix"].sum() for m in parts.values())


# -- the summary ----------------
def table(series, **kw):
    same = ROW | dict(store="s", task="height", target="h", decoder="linear", mode="probe", labels=0.1, metric="RMSE", settings="{}") | kw
    return pd.DataFrame([same | dict(encoder=e, seed=s, value=v) for e, vs in series.items() for s, v in enumerate(vs)])


def test_means_and_differences_by_hand():
    rows = newest(table(dict(a=(1.0, 2.0, 3.0), b=(11.0, 12.0, 13.0), c=(1.5, 2.5, 3.5))))
    m = means(rows).set_index("encoder")
    half = 4.302653 * 1 / math.sqrt(3)  # t(.975, 2 degrees of freedom) times the standard error
    assert m.loc["a", ["value", "value lo", "value hi", "seeds"]].tolist() == pytest.approx([2, 2 - half, 2 + half, 3])
    d = differences(rows).set_index("compared")
    assert d["verdict"].to_dict() == {"a - b": "better, intervals apart", "a - c": "better, intervals overlap", "b - c": "worse, intervals apart"}
    assert d.loc["a - c", ["difference", "paired", "paired lo", "paired hi"]].tolist() == pytest.approx([-0.5] * 4)  # not a bit of noise once paired
    assert differences(newest(table(dict(a=(1.0, 2), b=(9.0, 8)), metric="mIoU")))["verdict"].tolist() == ["worse, intervals overlap"]


def test_only_what_belongs_together_is_averaged():
    whole = table(dict(a=(7.0, 8.0)), mode="finetune"), table(dict(r=(9.0, 9.5)), mode="scratch")
    rows = pd.concat([table(dict(a=(1.0, 2.0))), table(dict(a=(5.0, 6.0)), labels=1.0), *whole])
    assert means(newest(rows))["value"].tolist() == [1.5, 5.5, 7.5, 9.25]
    assert differences(newest(rows))["compared"].tolist() == ["a finetune - r scratch"]
    with pytest.raises(DataError, match="labels"):
        means(newest(rows), ("task", "encoder", "mode"))
    repeated = pd.concat([table(dict(a=(1.0, 2.0))), table(dict(a=(3.0,)))])  # the same encoder's name with another file
    assert means(newest(repeated))["value"].tolist() == [2.5]
    settings = pd.concat([table(dict(a=(1.0, 2.0)), settings='{"lr": 1}'), table(dict(a=(3.0,)), settings='{"lr": 2}')])
    assert means(newest(settings))["setting"].tolist() == ["lr=1", "lr=2"]


def test_from_the_command_line(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enc = "\n".join(f'{k} = "{v}"' for k, v in config["encoders"].items())
    tasks = '[[tasks]]\ntask = "segmentation"\ntarget = "landcover"\n[[tasks]]\ntask = "height"\ntarget = "height"\ndecoder = "linear"\n'
    Path("five.toml").write_text(f'store = "{config["store"]}"\nseeds = 2\nepochs = 1\nbs = 16\n[encoders]\n{enc}\n{tasks}')
    assert main(["evaluate", "five.toml", "--only", "height", "--processes", "2"]) == 0
    assert "intervals" in capsys.readouterr().out and len(read_results("five.csv")) == 4
    assert main(["table", "five.csv", "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert ("| ours - random |" in out or "| random - ours |" in out) and out.splitlines()[1].startswith("| --- |")
    assert main(["table", "five.csv", "--by", "task", "encoder"]) == 0 and main(["table", "five.csv", "--by", "tsk"]) == 2
    assert main(["evaluate", "five.toml", "--only", "hieght"]) == 2 and "Did you mean 'height'" in capsys.readouterr().err
