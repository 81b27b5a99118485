"Encoders: what the notebook shows, seen from outside; and every way to misuse them."

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_selfsup.encoders import (MultiModalViT, Stem, adapt_stem, band_colour, create_vit, ground_positions, patchify,
                                 sincos, take)
from rs_selfsup.modalities import Band, DataError, Modality, preset

TINY = dict(embed_dim=48, depth=2, num_heads=3)
MODS = dict(rgb=preset("rgb", 0.5), dsm=preset("dsm", 0.5), s2=preset("s2_l2a", 10.0))


def make(mods=MODS, **kw):
    return MultiModalViT("vit_tiny_patch16_224", mods, "rgb", **{**dict(patch_size=4), **TINY, **kw}).eval()


@given(patch=st.integers(1, 5), gh=st.integers(1, 4), gw=st.integers(1, 4), bands=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_stem_is_a_convolution(patch, gh, gw, bands):
    stem, x = Stem(bands, patch, 8), torch.randn(2, bands, gh * patch, gw * patch)
    torch.testing.assert_close(stem(patchify(x, patch)), stem.proj(x).flatten(2).mT, atol=1e-5, rtol=1e-4)


@given(factor=st.integers(1, 8), n=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_coarse_token_lies_amid_the_fine_ones(factor, n):
    fine = ground_positions((n * factor, n * factor)).view(n, factor, n, factor, 2).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(ground_positions((n, n), float(factor)), fine)


def test_positions_differ_everywhere():
    code = sincos(ground_positions((32, 32)), 64)
    distance = torch.cdist(code, code) + 9 * torch.eye(1024)
    assert distance.min() > 0.1


@pytest.mark.parametrize("name, says", [
    ("vit_smal_patch16_224", "vit_small_patch16_224"),
    ("resnet18", "not a plain VisionTransformer"),
    ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
    ("vit_small_r26_s32_224", "HybridEmbed"),
    ("qqqqqqqq", "timm knows no encoder"),
])
def test_unknown_encoder(name, says):
    with pytest.raises(DataError, match=says):
        create_vit(name)


def test_class_token_is_asked_for():
    name = "vit_medium_patch16_gap_256"
    with pytest.raises(DataError, match="class_token=True"):
        create_vit(name, embed_dim=48, depth=1, num_heads=3)
    assert create_vit(name, embed_dim=48, depth=1, num_heads=3, class_token=True, global_pool="token").cls_token is not None


@pytest.mark.parametrize("size, good", [((30, 32), "28 or 32 px"), ((32, 3), "4 px"), ((33, 33), "32 or 36 px")])
def test_image_size_not_divisible_by_the_patch(size, good):
    with pytest.raises(DataError, match=rf"rgb image of {size[0]} x {size[1]} px .* patches of 4 px.*{good}"):
        make()(torch.zeros(1, 3, *size), "rgb")


def test_wrong_band_count():
    with pytest.raises(DataError, match="dsm has 3 bands, its stem takes 1"):
        make()(torch.zeros(1, 3, 8, 8), "dsm")
    with pytest.raises(DataError, match="A shared stem takes 1 or 3 bands"):
        make(dict(rgb=MODS["rgb"], s2=MODS["s2"]), shared_stem=True)(torch.zeros(1, 12, 8, 8), "s2")


def test_colours_by_name_and_wavelength_not_by_order():
    assert [band_colour(Band(n, "DN8")) for n in ("Red", "g", "BLUE", "nir")] == [0, 1, 2, None]
    assert [band_colour(b) for b in preset("landsat8").bands] == [None, 2, 1, 0, None, None, None]
    weight = torch.randn(8, 3, 4, 4)
    odd = Modality("x", [Band("nir", "DN8"), Band("blue", "DN8"), Band("red", "DN8")], 1.0, "optical")
    w = adapt_stem(weight, odd, 4)
    torch.testing.assert_close(w, torch.stack([weight.mean(1), weight[:, 2], weight[:, 0]], 1))


def test_registers_are_not_returned():
    enc = MultiModalViT("vit_base_patch14_reg4_dinov2", MODS, "rgb", patch_size=4, **TINY).eval()
    assert enc(torch.zeros(1, 3, 8, 8), "rgb").shape == (1, 5, 48)


def test_other_size_after_construction():
    enc = make()
    small = enc.positions("rgb", (2, 2))
    big = enc.positions("rgb", (4, 4)).view(4, 4, -1)
    torch.testing.assert_close(small.view(2, 2, -1), big[:2, :2])
    assert enc(torch.zeros(1, 3, 24, 40), "rgb").shape == (1, 61, 48)


def test_padding_is_never_attended_to():
    enc, x = make(), torch.randn(2, 3, 16, 16)
    index = torch.stack([torch.randperm(16)[:6] for _ in range(2)])
    ok = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0]]).bool()
    out = enc(x, "rgb", index, ok)
    for b in range(2):
        alone = enc(x[b:b + 1], "rgb", index[b:b + 1, ok[b]])
        torch.testing.assert_close(out[b, 0], alone[0, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out[b, 1:][ok[b]], alone[0, 1:], atol=1e-5, rtol=1e-4)


def test_fused_attention_takes_the_mask():
    from torch.profiler import profile
    enc = make()
    with profile() as p:
        enc(torch.randn(2, 3, 16, 16), "rgb", key_valid=torch.ones(2, 16, dtype=torch.bool))
    assert any("flash_attention_for_cpu" in e.key for e in p.key_averages())


def test_features_of_the_valid_part_alone():
    enc, x = make(), torch.randn(2, 3, 16, 16)
    ok = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    ok[:, :, :, 8:] = False
    torch.testing.assert_close(enc.features(dict(rgb=x), dict(rgb=ok)), enc.features(dict(rgb=x[..., :8])), atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="unknown pool"):
        enc.features(dict(rgb=x), pool="max")


def test_grad_checkpointing_changes_nothing():
    enc = make(drop_path_rate=0.0).train()
    x = torch.randn(2, 3, 16, 16)
    grads = []
    for on in (False, True):
        enc.vit.set_grad_checkpointing(on)
        enc.zero_grad()
        enc(x, "rgb", key_valid=torch.arange(16).expand(2, -1) < 11).pow(2).sum().backward()
        grads.append(enc.stems["rgb"].proj.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_a_model_of_ones_own():
    own = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5, **TINY)
    weight = own.patch_embed.proj.weight.detach().clone()
    enc = MultiModalViT(own, MODS, "rgb")
    assert enc.patch_size == dict(rgb=8, dsm=8, s2=1)
    torch.testing.assert_close(enc.stems["rgb"].proj.weight.detach(), weight)


def test_take():
    x = torch.randn(3, 5, 2)
    i = torch.tensor([[4, 0], [1, 1], [2, 3]])
    assert torch.equal(take(x, i), torch.stack([x[b, i[b]] for b in range(3)]))
