"""What costs nothing on the real input of `benchmarks/evaluate/real_*.toml`: the commonest class, the mean height, everything changed, colour statistics.

    python benchmarks/real_baselines.py --out benchmarks/results/real_baselines.csv      # after the stores are built; seconds

Constants come from the training tiles, figures are of the test tiles, by the metrics of the tasks.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from rs_selfsup.data.tiles import TileStore
from rs_selfsup.downstream.segmentation import count_classes
from rs_selfsup.losses.dense import IGNORE
from rs_selfsup.metrics import ChangeMetrics, ClassificationMetrics, DepthMetrics, SegmentationMetrics

SETS = [
    ("runs/eurosat", "classification", "label"),
    ("runs/flair_blocks", "segmentation", "landcover"),
    ("runs/flair_scenes", "segmentation", "landcover"),
    ("runs/flair_blocks", "height", "above_ground"),
    ("runs/flair_scenes", "height", "above_ground"),
    ("runs/neon", "height", "canopy"),
    ("runs/levir", "change", "change"),
    ("runs/dsifn", "change", "change"),
]


def truth(store, split, target):
    "Values of a split: classes, metres, or the tiles' labels"
    ids = store.split(split)
    if target == "label": return store.index.set_index("tile").loc[ids, "label"].to_numpy()
    return np.asarray(store.read(ids)["targets"][target])


def colours(store, split):
    "Mean and standard deviation of each band of a tile"
    x = store.read(store.split(split))["images"][store.anchor].astype(np.float32)
    return np.concatenate([x.mean((2, 3)), x.std((2, 3))], 1)


def ridge(store, classes, strength=1.0):
    "Least squares on one column per class: scores of the test tiles"
    x, y = colours(store, "train"), truth(store, "train", "label")
    mean, std = x.mean(0), x.std(0)
    wide = lambda x: np.concatenate([(z := (x - mean) / std), z**2, z[:, :, None].repeat(6, 2).reshape(len(z), -1) * np.tile(z, 6), np.ones((len(z), 1))], 1)
    a = wide(x)
    w = np.linalg.solve(a.T @ a + strength * np.eye(a.shape[1]), a.T @ np.eye(classes)[y])
    return torch.from_numpy(wide(colours(store, "test")) @ w)


def baselines(path, task, target):
    "Rows (name, scores) of one store"
    store = TileStore(path)
    test, train = truth(store, "test", target), store.split("train")
    if task == "height":
        known = truth(store, "train", target)
        for name, value in (("mean height", np.nanmean(known)), ("median height", np.nanmedian(known))):
            m = DepthMetrics(least=1.0)
            m.update(torch.full(test.shape, float(value)), torch.from_numpy(test).float(), torch.from_numpy(np.isfinite(test)))
            yield name, m.compute()
        return
    if task == "classification": names, counts = store.classes, torch.bincount(torch.tensor(truth(store, "train", target)), minlength=len(store.classes))
    else:
        names = store.targets[target].classes
        counts = count_classes(store, target, train, len(names))
    constant = {"all changed": 1} if task == "change" else {f"commonest class: {names[int(counts.argmax())]}": int(counts.argmax())}
    kind = dict(classification=ClassificationMetrics, segmentation=SegmentationMetrics).get(task)
    for name, c in constant.items():
        m = kind(names) if kind else ChangeMetrics()
        m.update(torch.from_numpy(np.where(test == IGNORE, 0, c)), torch.from_numpy(test.astype(np.int64)))
        yield name, m.compute()
    if task == "classification":
        m = kind(names)
        m.update(ridge(store, len(names)), torch.tensor(test))
        yield "colour statistics, ridge", m.compute()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("real_baselines.csv"))
    out, rows = p.parse_args().out, []
    for path, task, target in SETS:
        store, about = TileStore(path), dict(store=Path(path).name, task=task)
        about |= {s: len(store.split(s)) for s in ("train", "val", "test")}
        for name, scores in baselines(path, task, target):
            rows.append(about | dict(what=name, scores=json.dumps({k: float(v) for k, v in scores.items()})))
            print(about, name, {k: round(float(v), 3) for k, v in scores.items() if "/" not in k})
    with open(out, "w", newline="") as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader(), w.writerows(rows)


if __name__ == "__main__":
    main()
