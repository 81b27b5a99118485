"One geometry for all modalities, exact validity, statistics of the random parameters."

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_selfsup.data.augment import Augment, Batch, Normalize, check_crop, draw_placement, move, move_all, move_each, to_float
from rs_selfsup.modalities import Band, DataError, Modality, preset
from rs_selfsup.randomness import keys

FACTORS = dict(rgb=1, s2=4, coarse=8)
MODALITIES = dict(rgb=preset("rgb", 0.5), s2=Modality("s2", (Band("B02", "reflectance_1e4"), Band("B03", "reflectance_1e4")), 2, "optical"),
                  coarse=Modality("coarse", (Band("VV", "dB"),), 4, "sar"))
STATS = {m: dict(mean=[10.0 + i for i in range(o.n_bands)], std=[2.0] * o.n_bands, p01=[1.0] * o.n_bands, p99=[30.0] * o.n_bands)
         for m, o in MODALITIES.items()}


def coordinates(B=6, size=48):
    "Every pixel holds the ground coordinates of its centre, twice: rows, columns (and a constant)."
    images, valid = {}, {}
    for m, f in FACTORS.items():
        at = (torch.arange(size // f) + 0.5) * f
        x = torch.stack(torch.meshgrid(at, at, indexing="ij") + (torch.zeros(size // f, size // f),))[: MODALITIES[m].n_bands]
        images[m] = x.expand(B, *x.shape).clone()
        valid[m] = torch.rand(B, 1, size // f, size // f) < 0.8
    tile = torch.arange(B)
    return Batch(images, valid, dict(row=images["rgb"][:, 0].clone(), flat=tile), tile, tile, keys(0, 0, tile))


def same_place(b, names=("s2", "coarse")):
    return all(torch.allclose(F.avg_pool2d(b.images["rgb"][:, : b.images[m].shape[1]], FACTORS[m]), b.images[m], atol=1e-4) for m in names)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), crop=st.sampled_from([8, 16, 24, 40, 48]), flips=st.booleans(), rot90=st.booleans(),
       snap=st.sampled_from([None, 8, 16, 24]))
def test_same_geometry(seed, crop, flips, rot90, snap):
    b = coordinates()
    b.key = keys(seed, 3, b.tile)
    out = Augment(MODALITIES, crop=crop, flips=flips, rot90=rot90, snap=snap).geometry(b)
    assert same_place(out) and torch.equal(out.targets["row"], out.images["rgb"][:, 0]) and torch.equal(out.targets["flat"], b.targets["flat"])
    lowest = out.images["rgb"].amin((2, 3))[:, :2] - 0.5
    assert (lowest % (24 if snap == 24 else snap or 8) == 0).all()
    for m, v in out.valid.items():                                         # validity follows its pixel exactly
        r, c = (out.images["rgb"][:, i] if m == "rgb" else F.avg_pool2d(out.images["rgb"][:, i:i + 1], FACTORS[m])[:, 0] for i in (0, 1))
        i = torch.arange(len(v))[:, None, None].expand_as(r)
        assert torch.equal(v[:, 0], b.valid[m][i, 0, (r // FACTORS[m]).long(), (c // FACTORS[m]).long()])


def test_geometry_shows_when_it_is_not_the_same():
    b = Augment(MODALITIES, crop=24).geometry(coordinates())
    b.images["s2"] = b.images["s2"].flip(3)
    assert not same_place(b)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40), dtype=st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.int32]), factor=st.sampled_from([1, 2, 4]))
def test_gather_is_the_naive_loop(seed, dtype, factor):
    x = torch.randint(0, 100, (5, 3, 32 // factor, 40 // factor)).to(dtype)
    p = draw_placement(keys(seed, 0, torch.arange(5)), (32, 40), (16, 16), 4)
    assert torch.equal(move_each(x, p, (16, 16), factor), move_all(x, p, (16, 16), factor))


def test_uint16_keeps_its_values():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 65536, (4, 2, 16, 16)).astype(np.uint16))
    p = draw_placement(keys(0, 0, torch.arange(4)), (16, 16), (16, 16))
    out = move(x, p, (16, 16))
    assert out.dtype == torch.uint16
    assert torch.equal(to_float(out), move_all(to_float(x), p, (16, 16)))
    assert to_float(x).max() > 32768


def test_scale_jitter_keeps_ground_and_validity():
    b = coordinates(B=16)
    full = Augment(MODALITIES, crop=32, scale=(0.7, 2.0)).geometry(replace(b, valid={m: torch.ones_like(v) for m, v in b.valid.items()}))
    for m in ("s2", "coarse"):                                             # linear coordinates survive bilinear sampling but at the tile's rim
        d = (F.avg_pool2d(full.images["rgb"][:, : full.images[m].shape[1]], FACTORS[m]) - full.images[m]).abs()
        assert d.max() < FACTORS[m] / 2 and d.median() < 0.01
    ones = replace(b, images={m: torch.where(v, 1.0, float("nan")).expand_as(b.images[m]) for m, v in b.valid.items()})
    out = Augment(MODALITIES, crop=32, scale=(0.7, 2.0)).geometry(ones)
    for m, v in out.valid.items():
        x = out.images[m][v.expand_as(out.images[m])]
        assert (x - 1).abs().max() < 1e-5 and v.any() and not v.all()


def test_each_sample_alone_is_the_same_bits():
    b = coordinates()
    a = Augment(MODALITIES, crop=24, normalize=Normalize(MODALITIES, STATS))
    whole = a(b)
    for i in range(len(b)):
        one = a(b.index(slice(i, i + 1)))
        assert all(torch.equal(one.images[m], whole.images[m][i:i + 1]) and torch.equal(one.valid[m], whole.valid[m][i:i + 1]) for m in MODALITIES)


def test_invalid_pixels_are_zero_whatever_they_held():
    b = coordinates()
    b.images = {m: x.masked_fill(~b.valid[m], v) for (m, x), v in zip(b.images.items(), (float("nan"), float("inf"), -9999.0))}
    out = Augment(MODALITIES, crop=24, db=1.0, normalize=Normalize(MODALITIES, STATS))(b)
    for m, x in out.images.items():
        assert x.isfinite().all() and (x[~out.valid[m].expand_as(x)] == 0).all()


def test_statistics_of_the_parameters():
    key = keys(0, 0, torch.arange(20000))
    p = draw_placement(key, (48, 48), (24, 24), 8)
    for o in (p.row, p.col):
        share = torch.bincount(o, minlength=25)[::8] / len(o)
        assert (share - 1 / 4).abs().max() < 0.015
    both = torch.stack([o.float() for o in (p.row, p.col, p.flip_rows, p.flip_cols, p.transpose)])
    assert (torch.corrcoef(both) - torch.eye(5)).abs().max() < 0.03        # independent of each other
    other = draw_placement(keys(0, 1, torch.arange(20000)), (48, 48), (24, 24), 8)
    assert abs((other.row == p.row).float().mean() - 1 / 4) < 0.015        # and of the last epoch


def test_light_touches_optical_only():
    a = Augment(MODALITIES, normalize=Normalize(MODALITIES, STATS))
    c = a.changes(keys(0, 0, torch.arange(1000)))
    assert set(c) == {"rgb", "s2"}
    assert c["s2"][0].std(dim=1).abs().max() < 1e-6                        # one gain for all bands of a sample
    assert c["s2"][1].std(dim=1).mean() > 0.01                             # an offset for each
    thermal = Modality("t", (Band("TIR", "kelvin"),), 100, "optical")
    norm = Normalize(dict(t=thermal), dict(t=dict(mean=[290.0], std=[5.0], p01=[280.0], p99=[300.0])))
    gain, shift = Augment(dict(t=thermal), normalize=norm).changes(keys(0, 0, torch.arange(9)))["t"]
    assert (gain == 1).all() and (shift == 0).all()


@pytest.mark.parametrize("kw,words", [(dict(crop=56), "larger than the tiles of 48 x 48 px"), (dict(crop=20), "Choose a multiple of 8, e.g. 16 or 24"),
                                      (dict(crop=4), "Choose a multiple of 8, e.g. 8"), (dict(crop=48, scale=(0.5, 1)), "needs 96 px")])
def test_bad_crops(kw, words):
    with pytest.raises(DataError, match=words):
        Augment(MODALITIES, **kw).geometry(coordinates())


def test_turning_an_oblong_tile():
    with pytest.raises(DataError, match="rot90=False"):
        check_crop(dict(rgb=(48, 96)), None)
    assert check_crop(dict(rgb=(48, 96)), None, rot90=False)[:2] == (48, 96)


def test_to_255():
    norm = Normalize(MODALITIES, STATS)
    x = torch.randint(0, 256, (2, 3, 16, 16)).byte()
    assert torch.equal(norm.to_255(norm(dict(rgb=x))["rgb"], "rgb"), x.float())
    s2 = torch.tensor([0.0, 1.0, 15.5, 30.0, 99.0]).view(1, 1, 1, 5).expand(1, 2, 1, 5)
    torch.testing.assert_close(norm.to_255(norm(dict(s2=s2))["s2"], "s2")[0, 0, 0], torch.tensor([0, 0, 127.5, 255, 255]))
    dsm = Normalize(dict(dsm=preset("dsm")), dict(dsm=dict(mean=[100.0], std=[10.0], p01=[0], p99=[1])))
    z = torch.tensor([[0.0, 1, 2, 9], [0, 4, 8, 99]]).view(2, 1, 1, 4) + 50
    valid = torch.tensor([True, True, True, False]).expand(2, 1, 1, 4)
    y = dsm.to_255(dsm(dict(dsm=z), dict(dsm=valid))["dsm"], "dsm", valid)[:, 0, 0]
    torch.testing.assert_close(y, torch.tensor([[0, 127.5, 255, 0], [0, 127.5, 255, 0]]), atol=1e-2, rtol=0)


def test_nothing_reads_from_the_device():
    b, a = coordinates(), Augment(MODALITIES, crop=24, normalize=Normalize(MODALITIES, STATS))
    b.images["s2"] = b.images["s2"].to(torch.uint16)
    out = a(b.to("meta"))                                                  # tensors without data: .item() or nonzero would raise
    assert out.images["s2"].device.type == "meta" and out.images["s2"].shape[-1] == 6


@pytest.mark.cuda
def test_cuda_is_the_cpu_bit_for_bit():
    b = coordinates()
    b.images["s2"] = (b.images["s2"] * 1000).to(torch.uint16)
    a = Augment(MODALITIES, crop=24, photometric=False, normalize=Normalize(MODALITIES, STATS))
    cpu, gpu = a(b), a(b.to("cuda"))
    for m in MODALITIES:
        assert torch.equal(cpu.images[m], gpu.images[m].cpu()) and torch.equal(cpu.valid[m], gpu.valid[m].cpu())
