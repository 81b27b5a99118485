"Views: the imported module against brute force; what a view must not do to nodata; numbers that follow the tile."

import itertools

import pytest
import torch
import torch.nn.functional as F

from rs_selfsup.backbones import Backbone
from rs_selfsup.data.augment import Batch, Normalize, Normalized, draw_change
from rs_selfsup.data.views import (
    View,
    Window,
    blur,
    cell_centres,
    check_view,
    cut,
    draw_window,
    halvings,
    multi_crop,
    relight,
    whole_window,
)
from rs_selfsup.encoders import MultiModalViT
from rs_selfsup.modalities import DataError, Modality, preset
from rs_selfsup.randomness import STREAMS, keys, mix

KEY = keys(0, 0, torch.arange(32))


def coordinates(n, side=48, factors=(1, 2, 3)):
    "Tiles whose two bands are the row and column of the ground, on three grids"
    out = {}
    for f in factors:
        at = (torch.arange(side // f) + 0.5) * f
        out[f"by{f}"] = torch.stack(torch.meshgrid(at, at, indexing="ij"))[None].expand(n, -1, -1, -1)
    return Batch(Normalized(out), {}, key=KEY[:n], full=True)


@pytest.mark.parametrize("rows, cols, turn", itertools.product((1, -1), (1, -1), (False, True)))
def test_the_eight_symmetries_are_exact(rows, cols, turn):
    x = torch.randn(1, 2, 12, 12)
    w = Window(torch.tensor([[rows, cols]]).float(), torch.zeros(1, 2), torch.tensor([turn]))
    want = x.flip([d for d, s in ((2, rows), (3, cols)) if s < 0])
    want = want.mT if turn else want
    torch.testing.assert_close(cut(Batch({"a": x}, {}, full=True), w, 12).images["a"], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [6, 12, 24, 48])
def test_pixels_are_where_cell_centres_says(size):
    v = cut(coordinates(32), draw_window(KEY, area=(0.05, 1)), size)
    k = halvings(v.window, v.size, size)
    for m, x in v.images.items():
        f = int(m[2:])
        n, edge = size // f, (0.5 * f * 2**k)[:, None, None]
        off = (x.flatten(2).mT - cell_centres(v, (n, n)).clamp(min=edge).clamp(max=48 - edge)).abs()
        odd = torch.tensor([48 // f % 2 ** int(i) != 0 for i in k])  # blocks that share a pixel
        assert off[~odd].max() < 1e-3 and (not odd.any() or off[odd].max() < 0.5 * f * 2 ** k.max())


def test_an_inner_crop_is_a_slice():
    x = torch.randn(1, 3, 16, 16)
    w = Window(torch.full((1, 2), 0.5), torch.tensor([[-0.25, 0.5]]), torch.zeros(1, dtype=torch.bool))
    v = cut(Batch({"a": x}, {}, full=True), w, 8)
    torch.testing.assert_close(v.images["a"], x[:, :, 2:10, 8:16], atol=1e-5, rtol=0)


def test_every_pixel_counts_when_the_window_is_large():
    x = torch.randn(4, 1, 64, 64, requires_grad=True)
    for size in (8, 16, 20, 32, 64):
        (g,) = torch.autograd.grad(
            cut(Batch({"a": x}, {}, full=True), whole_window(KEY[:4]), size).images["a"].sum(), x
        )
        assert (g > 0).all(), size


def test_halving_is_area_averaging():
    x = torch.randn(2, 3, 64, 64)
    for size in (32, 16, 8):
        v = cut(Batch({"a": x}, {}, full=True), whole_window(KEY[:2]), size)
        torch.testing.assert_close(v.images["a"], F.avg_pool2d(x, 64 // size), atol=1e-5, rtol=0)


def test_each_tile_has_its_own_level():
    half = torch.tensor([[0.2, 0.2], [0.5, 0.1], [0.6, 0.3], [1.0, 1.0]])
    w = Window(half, 0 * half, torch.zeros(4, dtype=torch.bool))
    assert halvings(w, (64, 64), 16).tolist() == [0, 1, 1, 2] and halvings(w, (64, 64), 64).tolist() == [0] * 4
    x = torch.randn(4, 1, 64, 64)
    together = cut(Batch({"a": x}, {}, full=True), w, 16).images["a"]
    for i in range(4):
        alone = cut(
            Batch({"a": x[i : i + 1]}, {}, full=True), Window(half[i : i + 1], 0 * half[:1], w.transpose[:1]), 16
        )
        torch.testing.assert_close(alone.images["a"], together[i : i + 1])


@pytest.mark.parametrize("size", [8, 16, 32])
def test_nodata_never_shows(size):
    ok = torch.rand(32, 1, 32, 32) > 0.02
    x = torch.ones(32, 1, 32, 32).masked_fill(~ok, -1e4)
    v = cut(Batch({"a": x}, {"a": ok}, key=KEY), draw_window(KEY), size)
    y, valid = v.images["a"], v.valid["a"]
    assert (y[~valid] == 0).all() and (y[valid] - 1).abs().max() < 0.02 and 0.02 < valid.float().mean() < 0.999
    for u in (relight(v, _norm(), KEY), blur(v, KEY)):
        assert (u.images["a"][~valid] == 0).all()


def test_valid_tiles_stay_valid():
    ok = torch.ones(32, 1, 32, 32, dtype=torch.bool)
    v = cut(Batch({"a": torch.randn(32, 1, 32, 32)}, {"a": ok}, key=KEY), draw_window(KEY), 16)
    assert v.valid["a"].all()


def _norm(mods=None):
    mods = mods or dict(a=Modality("a", (dict(name="x", unit="DN8"),), 1.0, "optical"))
    stats = {
        m: dict(
            mean=[30.0 + i for i in range(o.n_bands)],
            std=[7.0] * o.n_bands,
            p01=[0.0] * o.n_bands,
            p99=[99.0] * o.n_bands,
        )
        for m, o in mods.items()
    }
    return Normalize(mods, stats)


def test_light_is_that_of_stored_values():
    mods = dict(rgb=preset("rgb", 1.0), s1=preset("s1", 1.0), ndsm=preset("ndsm", 1.0), dsm=preset("dsm", 1.0))
    norm, raw = _norm(mods), {m: torch.rand(3, o.n_bands, 8, 8) * 90 for m, o in mods.items()}
    args = dict(gain=0.3, shift=0.2, db=2.0, metres=4.0)
    view = cut(Batch(norm(raw), {}, key=KEY[:3], full=True), whole_window(KEY[:3]), 8)
    lit = relight(view, norm, KEY[:3], 5, **args).images
    for i, (m, x) in enumerate(raw.items()):
        c = draw_change(
            mods[m],
            mix(KEY[:3] + 5),
            norm.const(m, "std", x),
            norm.const(m, "lit", x),
            STREAMS["light"] - STREAMS["photometric"] + i,
            **args,
        )
        torch.testing.assert_close(lit[m], norm._one(x, m, None, c), atol=1e-4, rtol=1e-4)
        assert (lit[m] - norm(raw)[m]).abs().max() > 0.01 or m == "dsm"


def test_light_of_view_11_is_not_the_blur_of_view_1():
    norm, x = _norm(), torch.ones(4000, 1, 1, 1)
    many = keys(0, 0, torch.arange(4000))
    make = lambda n: (
        relight(View(dict(a=x), dict(a=x > 0), whole_window(many), (1, 1), True), norm, many, n, gain=0, shift=1.0)
        .images["a"]
        .flatten()
        - 1
    )
    shifts = torch.stack([make(n) for n in (0, 1, 10, 11, 99)])
    assert torch.corrcoef(shifts).triu(1).abs().max() < 0.06 and (shifts.std(1) - 0.577).abs().max() < 0.03


def test_numbers_follow_the_tile_not_the_batch():
    norm, x = _norm(), torch.randn(32, 1, 16, 16)

    def go(rows):
        b = Batch(dict(a=x[rows]), {}, key=KEY[rows], full=True)
        return [blur(relight(v, norm, b.key, i), b.key, i).images["a"] for i, v in enumerate(multi_crop(b, 16, 2, 8))]

    rows = torch.tensor([7, 3, 30])
    for a, b in zip(go(torch.arange(32)), go(rows)):
        torch.testing.assert_close(a[rows], b, atol=1e-6, rtol=1e-6)


def test_blur_against_a_direct_convolution():
    x, ok = torch.randn(1, 1, 20, 20), torch.rand(1, 1, 20, 20) > 0.2
    v = blur(View(dict(a=x), dict(a=ok), whole_window(KEY[:1]), (20, 20)), KEY[:1], sigma=(1.2, 1.2)).images["a"]
    i, j = 9, 11
    w = torch.exp(-((torch.arange(20)[:, None] - i) ** 2 + (torch.arange(20)[None] - j) ** 2) / (2 * 1.2**2)) * ok[0, 0]
    w = w * ((torch.arange(20)[:, None] - i).abs() <= 4) * ((torch.arange(20)[None] - j).abs() <= 4)
    if ok[0, 0, i, j]:
        torch.testing.assert_close(v[0, 0, i, j], (w * x[0, 0]).sum() / w.sum(), atol=1e-5, rtol=1e-4)
    assert (v[~ok] == 0).all()


def test_what_does_not_fit_is_said():
    b = coordinates(2)
    with pytest.raises(
        DataError, match="every 6 px they all do.*multiple of 6, e.g. 12"
    ):  # 2 and 3, not the larger of them
        cut(b, whole_window(b.key), 15)
    with pytest.raises(DataError, match="larger than the tiles of 48 px"):
        cut(b, whole_window(b.key), 54)
    with pytest.raises(DataError, match="stored values"):
        cut(Batch(dict(a=torch.zeros(2, 1, 8, 8, dtype=torch.int16)), {}), whole_window(b.key), 8)
    with pytest.raises(DataError, match="without keys"):
        multi_crop(Batch(dict(a=torch.zeros(2, 1, 8, 8)), {}), 8)
    for bad in (dict(area=(0, 1)), dict(area=(0.5, 0.2)), dict(ratio=(2, 1))):
        with pytest.raises(DataError, match="no shares|no range"):
            draw_window(KEY, **bad)


def test_views_are_checked_against_the_encoder():
    mods = dict(rgb=preset("rgb", 0.5), s1=preset("s1", 2.0))
    vit = MultiModalViT("vit_tiny_patch16_224", mods, "rgb", patch_size=8, embed_dim=48, depth=1, num_heads=3)
    check_view(vit, 64, 64)
    for size, tile, why in (
        (4, None, "does not divide into patches of 8 px"),
        (65, None, "every 4 px"),
        (64, 32, "larger than the tiles of 32"),
    ):
        with pytest.raises(DataError, match=why):
            check_view(vit, size, tile)
    cnn = Backbone("test_resnet", mods, "rgb")
    check_view(cnn, 128)
    with pytest.raises(DataError, match="a view of 64 px: s1 image of 16 x 16 px does not divide into cells of 32 px"):
        check_view(cnn, 64)
