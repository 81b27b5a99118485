"The stream of batches: the same for (seed, epoch, tile) whatever the batch size, the workers, the ranks or a resume."

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import rs_selfsup.data.loading as loading
from rs_selfsup.callbacks import fixed_sample
from rs_selfsup.data.augment import Augment, Normalize
from rs_selfsup.data.loading import Batch, BatchToModel, TileLoader, TileReader, cut_batches, dataloaders, eval_loader, tile_order
from rs_selfsup.data.synthetic import write_scenes
from rs_selfsup.data.tiles import TileStore, build_store
from rs_selfsup.modalities import DataError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    d = tmp_path_factory.mktemp("loading")
    yaml = write_scenes(d / "scenes", n_scenes=4, size_m=160, modalities=("rgb", "dsm", "ms2"), progress=False, collars=1.0)
    return build_store(yaml, d / "tiles", tile=80, block=80, buffer=0, splits=(0.7, 0.3, 0), min_valid=0.2, progress=False)


def loader(store, split="train", crop=64, seed=0, **kw):
    norm = Normalize(store.modalities, store.stats)
    kw = dict(bs=4, shuffle=True, drop_last=True) | kw
    return TileLoader(TileReader(store, store.split(split), seed), augment=Augment(store.modalities, crop, normalize=norm), **kw)


def flat(b):
    "All tensors of a batch, one list per sample. Boxes without the rows that pad them: those depend on the company."
    boxes = [[o[~o.isnan().all(-1)] for o in x] for k, x in b.targets.items() if k == "buildings"]
    dense = [x for k, x in b.targets.items() if k != "buildings"]
    parts = [*b.images.values(), *b.valid.values(), *dense, *boxes, b.label, b.key]
    return {int(t): [p[i] for p in parts] for i, t in enumerate(b.tile)}


def samples(dl):
    return {t: v for b, _ in dl for t, v in flat(b).items()}


def same(a, b):
    common = set(a) & set(b)
    return len(common) > 0 and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for t in common for x, y in zip(a[t], b[t]))


def tiles(dl):
    return [b.tile.tolist() for b, _ in dl]


def test_holes_are_there(store):
    "The other tests mean something only if some tiles have invalid pixels and some are full."
    full = [b.full for b, _ in loader(store, bs=1)]
    assert any(full) and not all(full)


@pytest.mark.parametrize("kw", [dict(bs=7), dict(bs=1), dict(workers=2),
                                pytest.param(dict(workers=1, context="spawn"), marks=pytest.mark.slow)], ids=str)
def test_same_bits_whatever_the_batch_size_and_the_workers(store, kw):
    reference, other = loader(store, drop_last=False), loader(store, drop_last=False, **kw)
    for _ in range(2):
        a, b = samples(reference), samples(other)
        assert set(a) == set(b) == set(store.split("train").tolist()) and same(a, b)
    assert reference.epoch == other.epoch == 2


def test_another_epoch_or_seed_is_another_stream(store):
    a, dl = samples(loader(store)), loader(store)
    dl.set_epoch(1)
    assert not same(a, samples(dl)) and not same(a, samples(loader(store, seed=1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_is_the_undisturbed_stream(store, workers, monkeypatch):
    whole, dl = loader(store), loader(store, workers=workers)
    whole.set_epoch(3)
    undisturbed = [b for b, _ in whole]
    for k in (1, 2, len(whole)):
        dl.set_epoch(3)
        dl.skip(k)
        rest = [b for b, _ in dl]
        assert len(rest) == len(undisturbed) - k
        assert all(same(flat(a), flat(b)) for a, b in zip(undisturbed[k:], rest))
        assert dl.epoch == 4 and len(dl) == len(whole)
    if workers == 0:                                       # what is skipped is not read
        asked, read = [], TileStore.read
        monkeypatch.setattr(TileStore, "read", lambda self, ids, **kw: asked.append(list(ids)) or read(self, ids, **kw))
        dl.set_epoch(3)
        dl.skip(2)
        assert tiles(dl) == asked == [b.tile.tolist() for b in undisturbed[2:]]


def test_a_fixed_sample_leaves_the_place_in_the_stream(store):
    "The collapse monitor looks at the training loader of a store without validation tiles: a resumed epoch lost its place."
    whole, dl = loader(store), loader(store)
    first = [t for b in fixed_sample(whole, 6) for t in b.tile.tolist()]
    whole.set_epoch(3)
    undisturbed = tiles(whole)
    dl.set_epoch(3)
    dl.skip(2)
    assert [t for b in fixed_sample(dl, 6) for t in b.tile.tolist()] == first and len(first) == 6
    assert tiles(dl) == undisturbed[2:]


def test_one_read_per_batch(store, monkeypatch):
    asked, read = [], TileStore.read
    monkeypatch.setattr(TileStore, "read", lambda self, ids, **kw: asked.append(len(ids)) or read(self, ids, **kw))
    list(loader(store, bs=5))
    assert asked == [5] * (len(store.split("train")) // 5)


def test_ranks_share_the_global_batch(store, monkeypatch):
    one = loader(store, bs=6)
    whole = [b for b, _ in one]
    assert len(whole) == len(one) > 1
    monkeypatch.setattr(loading, "world", lambda: 2)
    parts = []
    for r in (0, 1):
        monkeypatch.setattr(loading, "rank", lambda r=r: r)
        dl = loader(store, bs=3)
        parts.append([b for b, _ in dl])
        assert len(dl) == len(parts[-1]) == len(whole)
    for w, a, b in zip(whole, *parts):
        assert torch.equal(w.tile, torch.cat([a.tile, b.tile])) and same(flat(w), flat(a)) and same(flat(w), flat(b))
    seen = []
    for r in (0, 1):                                       # validation: equally many batches of equal size on all ranks
        monkeypatch.setattr(loading, "rank", lambda r=r: r)
        val = loader(store, "val", bs=2, shuffle=False, drop_last=False)
        seen.append(tiles(val))
        assert len(val) == len(seen[-1])
    assert [len(t) for t in seen[0]] == [len(t) for t in seen[1]]
    every = sorted(sum(sum(seen, []), []))
    assert len(every) == len(set(every)) >= len(store.split("val")) - 1
    assert len(eval_loader(store, "val", bs=100).batches()[0]) == len(store.split("val"))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_cut_batches(n, world):
    order = np.arange(n)
    for drop in (True, False):
        parts = [cut_batches(order, 2, drop, r, world) for r in range(world)]
        assert len({tuple(map(len, p)) for p in parts}) == 1
        used = np.sort(np.concatenate([np.concatenate(p) if p else np.array([], int) for p in parts]))
        assert len(used) == len(set(used.tolist())) and len(used) == (n // (2 * world) * 2 * world if drop else n // world * world)


def test_order_is_a_permutation_of_the_tiles():
    ids = np.array([3, 9, 4, 100, 7])
    assert sorted(tile_order(ids, 0, 0)) == sorted(ids) and (tile_order(ids, 0, 0) == tile_order(ids[::-1], 0, 0)).all()
    assert len({tuple(tile_order(np.arange(6), 0, e)) for e in range(200)}) > 100


def test_workers_start_once_and_no_random_state_is_used(store):
    dl = loader(store, workers=2)
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), tiles(dl)
    pids = [w.pid for w in dl._pool._iterator._workers]
    for i, _ in enumerate(dl):                             # left early, and nested
        if i == 1:
            break
    dl.set_epoch(0)
    for a, (b, _) in zip(first, dl):
        assert a == b.tile.tolist()
        if a == first[1]:
            dl.set_epoch(0)
            assert tiles(dl) == first
    assert [w.pid for w in dl._pool._iterator._workers] == pids
    assert torch.equal(before, torch.get_rng_state())


def test_validation_is_the_same_every_epoch_and_whole(store):
    dls = dataloaders(store, bs=5, crop=64, device="cpu")
    a, b = samples(dls.valid), samples(dls.valid)
    assert same(a, b) and sorted(a) == store.split("val").tolist() and dls.valid.epoch == 0


def test_eval_loader_normalises_with_what_it_is_given(store):
    other = Normalize(store.modalities, {m: dict(s, mean=[0.0] * len(s["mean"]), std=[1.0] * len(s["std"])) for m, s in store.stats.items()})
    (b,) = eval_loader(store, "val", bs=100, normalize=other, device="cpu", targets=True)
    raw = store.read(b.tile.numpy())
    assert isinstance(b, Batch) and b.tile.tolist() == store.split("val").tolist()
    assert (b.images["rgb"].numpy() == raw["images"]["rgb"] * b.valid["rgb"].numpy()).all()
    assert set(b.targets) == set(store.targets) and (b.label.numpy() == raw["label"]).all()
    ids = store.split("val")[[2, 0]]
    (b,) = eval_loader(store, "val", ids=ids, device="cpu")
    assert b.tile.tolist() == ids.tolist()


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(3, 1)

    def forward(self, batch):
        return dict(fit=((self.w(batch.images["rgb"].mean((2, 3)))[:, 0] - batch.images["dsm"].mean((1, 2, 3))) ** 2).mean())


def test_learner(store, tmp_path):
    import fastai.callback.schedule  # noqa: F401  (patches Learner)
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    dls = dataloaders(store, bs=4, crop=64, device="cpu", workers=1)
    learn = Learner(dls, Toy(), lambda terms, batch: terms["fit"], opt_func=SGD, lr=0.05, path=tmp_path, cbs=BatchToModel)
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[0]
        learn.lr_find(num_it=5, show_plot=False)
        dls.train.set_epoch(0)
        learn.fit(3)
        assert learn.validate()[0] < before
        assert dls.train.epoch == 3 and dls.n_inp == 1
        alone = Learner(dataloaders(store, bs=4, device="cpu", splits=("train",)), Toy(), lambda t, b: t["fit"], path=tmp_path)
        with alone.no_bar(), alone.no_logging():
            alone.fit(1)                                   # nothing to validate on is no error


def test_loader_pickles_without_its_workers(store):
    dl = loader(store, workers=1)
    list(dl)
    again = pickle.loads(pickle.dumps(dl))
    again.set_epoch(0)
    assert same(samples(again), samples(loader(store)))


def test_normalising_twice_is_harmless(store):
    dls = dataloaders(store, bs=4, device="cpu")
    b = dls.one_batch()[0]
    assert dls.normalize(b.images, b.valid) is b.images
    assert dls.normalize(b.to("cpu").index(slice(2)).images)["rgb"].shape[0] == 2
    assert torch.equal(dls.normalize(b.index(slice(2)).images)["rgb"], b.images["rgb"][:2])


def test_show_batch(store):
    import matplotlib.pyplot as plt

    dls = dataloaders(store, bs=4, crop=64, device="cpu")
    dls.show_batch(max_n=2)
    axs = plt.gcf().axes
    assert len(axs) == 6 and all(ax.images for ax in axs)
    b = dls.one_batch()[0]
    shown = dls.show_batch((b, b), max_n=2, show=False)
    assert torch.equal(shown.images["rgb"], b.images["rgb"][:2])
    plt.close("all")


@pytest.mark.parametrize("kw,words", [
    (dict(bs=1000), "batch size 1000, but there are"), (dict(bs=0), "a batch of 0 tiles"), (dict(crop=96), "larger than the tiles of 80 x 80 px"),
    (dict(crop=66), "Choose a multiple of 4, e.g. 64 or 68"), (dict(splits=("trian", "val")), "Did you mean 'train'"),
    (dict(splits=("train", "test")), "split 'test' holds no tile")], ids=str)
def test_bad_input(store, kw, words):
    with pytest.raises(DataError, match=words) as e:
        dataloaders(store, **dict(dict(bs=4, device="cpu"), **kw))
    assert str(store.path) in str(e.value)


def test_not_a_store(tmp_path):
    with pytest.raises(DataError, match="no tile store"):
        dataloaders(tmp_path)


def test_batch_of_one_warns(store):
    with pytest.warns(UserWarning, match="batches of one tile"):
        dataloaders(store, bs=1, device="cpu")


@pytest.mark.cuda
def test_cuda_gets_the_same_stream(store):
    cpu, gpu = loader(store), loader(store, workers=2, device="cuda")
    gpu.augment.light = cpu.augment.light = None
    a, b = samples(cpu), samples(gpu)
    assert same(a, {t: [x.cpu() for x in v] for t, v in b.items()})
