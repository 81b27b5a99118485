"Backbones: every family says the same thing as plain timm; copies, sizes, precision, and settings that must not vanish."

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from rs_selfsup.backbones import AddToken, Backbone, as_map, create_encoder, find_layout, first_weight, from_map
from rs_selfsup.encoders import MultiModalViT
from rs_selfsup.methods.core import frozen_copy
from rs_selfsup.modalities import DataError, preset

MODS = dict(rgb=preset("rgb", 0.5), dsm=preset("dsm", 0.5), s1=preset("s1", 2.0))
SWIN = dict(img_size=64, depths=(1, 2, 1, 1), embed_dim=24, num_heads=(1, 2, 2, 4))
FAMILY = dict(
    test_resnet={}, resnet18={}, convnext_atto=dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), regnetx_002={}, test_efficientnet={}, tf_efficientnet_lite0={},
    swin_tiny_patch4_window7_224=SWIN, swinv2_tiny_window8_256=SWIN, pvt_v2_b0={}, mambaout_femto=dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
)  # fmt: skip


def make(name, **kw):
    torch.manual_seed(0)
    return Backbone(name, MODS, "rgb", **{**FAMILY[name], **kw}).eval()


@pytest.mark.parametrize("name", FAMILY)
def test_the_same_as_plain_timm(name):
    e, x = make(name), torch.randn(2, 2, 64, 64)
    plain = timm.create_model(name, in_chans=2, num_classes=0, **FAMILY[name]).eval()
    plain.load_state_dict(e.timm_state("s1"), strict=True)
    y = e.feature_map(x, "s1")
    assert y.shape == (2, e.embed_dim, 64 // e.stride, 64 // e.stride)
    torch.testing.assert_close(as_map(plain.forward_features(x), e.layout, y.shape[-2:]), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "mambaout_femto"])
def test_the_token_lands_where_the_input_is_hidden(name):
    e, seen = make(name), []
    e.net.get_submodule(e.mask_at).register_forward_hook(
        lambda m, a, y: seen.append(as_map(y, e.add_token.layout, (16, 16)))
    )
    x, hidden, token = torch.randn(1, 3, 64, 64), torch.zeros(1, 1, 64, 64, dtype=torch.bool), torch.randn(e.mask_dim)
    hidden[:, :, 8:16, 48:] = True
    hidden[:, :, :2, :4] = True  # half of a cell
    e.feature_map(x, "rgb"), e.feature_map(x, "rgb", hidden, token)
    added, want = (seen[1] - seen[0])[0], torch.zeros(e.mask_dim, 16, 16)
    want[:, 2:4, 12:] = token[:, None, None]
    want[:, 0, 0] = token / 2
    torch.testing.assert_close(added, want, atol=1e-5, rtol=1e-5)
    assert e.add_token.hidden is None and e.add_token.token is None


def test_a_failed_pass_leaves_no_token_behind():
    e = make("test_resnet")
    with pytest.raises(RuntimeError):
        e.feature_map(torch.randn(1, 3, 64, 64), "rgb", torch.ones(1, 1, 64, 64).bool(), torch.randn(7))
    assert e.add_token.hidden is None


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("copied", [copy.deepcopy, frozen_copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copy_has_its_own_hook_and_convolutions(name, copied):
    e = make(name)
    t = copied(e)
    hooks = list(t.net.get_submodule(t.mask_at)._forward_hooks.values())
    assert len(hooks) == 1 and hooks[0] is t.add_token and t.add_token is not e.add_token
    for p in e.parameters():
        p.data.zero_()
    x, hidden = torch.randn(1, 3, 64, 64), torch.ones(1, 1, 64, 64).bool()
    with torch.no_grad():
        a, b = t.feature_map(x, "rgb"), t.feature_map(x, "rgb", hidden, torch.randn(t.mask_dim))
        e.add_token.hidden, e.add_token.token, e.switch.use = hidden, torch.randn(e.mask_dim), "dsm"
        torch.testing.assert_close(t.feature_map(x, "rgb"), a)
    assert (a - b).abs().max() > 1e-4


def test_layout_is_never_a_guess():
    torch.manual_seed(0)
    e = Backbone(
        "swin_tiny_patch4_window7_224",
        dict(rgb=MODS["rgb"]),
        "rgb",
        img_size=96,
        depths=(1, 1),
        embed_dim=24,
        num_heads=(1, 2),
    )
    assert e.mask_dim == 24 and e.add_token.layout == "NHWC"  # stem: (1, 24, 24, 24)
    e = Backbone("test_resnet", dict(rgb=MODS["rgb"]), "rgb")
    assert e.feature_map(torch.randn(1, 3, 64, 64), "rgb").shape == (1, 96, 2, 2)
    x = torch.randn(1, 3, 96 * 32, 32)  # a map of 96 x 1 cells, 96 channels
    assert e.feature_map(x, "rgb").shape == (1, 96, 96, 1)
    for shape in ((1, 64, 64, 64), (1, 5, 5, 7), (1, 50, 8), (1, 64), (1, 512, 7, 7)):
        with pytest.raises(DataError, match="can hold the channels"):
            find_layout(shape, (256, 256), 8 if len(shape) == 3 else None)


def test_maps_and_back():
    y = torch.randn(2, 3, 4, 6)
    for layout in ("NCHW", "NHWC", "NLC"):
        torch.testing.assert_close(as_map(from_map(y, layout), layout, (4, 6)), y)
    add = AddToken("NLC", 2)
    add.hidden, add.token = torch.ones(2, 1, 8, 12).bool(), torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(add(None, None, torch.zeros(2, 24, 3)), add.token.expand(2, 24, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_one_convolution_for_all(channels):
    e = make("test_resnet", channels=channels)
    assert list(e.switch.convs) == ["shared"] and e.switch.convs["shared"].in_channels == channels
    x = torch.randn(2, channels, 64, 64)
    torch.testing.assert_close(e.feature_map(x, "rgb"), e.feature_map(x, "s1"))
    with pytest.raises(DataError, match=f"the first convolution takes {channels}.*leave `channels` out"):
        e.feature_map(torch.randn(2, 2, 64, 64), "s1")
    assert e.features(dict(rgb=x, s1=x)).shape == (2, 192)


def test_weights_for_other_bands():
    w = torch.randn(4, 3, 3, 3)
    x = torch.randn(1, 1, 8, 8)
    want = nn.functional.conv2d(x.expand(1, 3, 8, 8), w)
    for n in (1, 2, 5):  # a grey image gives the same, whatever its bands
        torch.testing.assert_close(
            nn.functional.conv2d(x.expand(1, n, 8, 8), first_weight(w, n)), want, atol=1e-5, rtol=1e-4
        )
    torch.testing.assert_close(first_weight(w, 3), w)
    e = make("test_resnet", channels=3)
    v = torch.randn_like(e.switch.convs["shared"].weight)
    e.adapt(v)
    assert torch.equal(e.switch.convs["shared"].weight, v)
    e = make("convnext_atto")
    v, b = torch.randn(8, 3, 4, 4), torch.randn(8)
    e.adapt(v, b)
    for conv in e.switch.convs.values():
        torch.testing.assert_close(conv.weight.sum(1), v.sum(1), atol=1e-5, rtol=1e-4)
        assert torch.equal(conv.bias, b)
    assert torch.equal(e.switch.convs["rgb"].weight, v)


def test_convolutions_of_other_kinds_stay_what_they_are():
    e = make("tf_efficientnet_lite0")
    assert {type(c).__name__ for c in e.switch.convs.values()} == {"Conv2dSame"}
    spread = {m: c.weight.std().item() for m, c in make("test_resnet").switch.convs.items()}
    assert max(spread.values()) < 1.2 * min(spread.values())  # timm's own initialisation


def test_sizes():
    e = make("test_resnet")
    assert e.feature_map(torch.randn(1, 1, 32, 96), "dsm").shape == (1, 96, 1, 3)
    for h, w, near in ((33, 64, "32 or 64"), (16, 16, "32"), (64, 100, "96 or 128")):
        with pytest.raises(
            DataError, match=f"dsm image of {h} x {w} px does not divide into cells of 32 px. Nearest sizes: {near} px"
        ):
            e.feature_map(torch.randn(1, 1, h, w), "dsm")
    assert e.tile_multiple == 128 and e.patch_size == dict(rgb=32, dsm=32, s1=32)
    any_size = make("swin_tiny_patch4_window7_224", strict_img_size=False)
    assert any_size.feature_map(torch.randn(1, 1, 96, 32), "dsm").shape == (1, 192, 3, 1)
    with pytest.raises(DataError, match=r"made for 64 x 64 px.*img_size=\(96, 96\)"):
        make("swin_tiny_patch4_window7_224").feature_map(torch.randn(1, 1, 96, 96), "dsm")
    oblong = make("swinv2_tiny_window8_256", img_size=(32, 64))
    assert oblong.feature_map(torch.randn(1, 3, 32, 64), "rgb").shape == (1, 192, 1, 2)


def test_features_weigh_by_validity():
    e = make("test_resnet")
    images = {m: torch.randn(3, v.n_bands, 64, 64) for m, v in MODS.items()}
    ok = {m: torch.rand(3, 1, 64, 64) > 0.3 for m in MODS}
    ok["s1"][2] = False
    f = e.features(images, ok).split(96, 1)
    for i, m in enumerate(MODS):
        y, share = e.feature_map(images[m], m), ok[m].float().unfold(2, 32, 32).unfold(3, 32, 32).mean((-1, -2))
        want = (y * share).sum((2, 3)) / share.sum((2, 3)).clamp(min=1e-6)
        torch.testing.assert_close(f[i], want, atol=1e-5, rtol=1e-4)
    assert (f[2][2] == 0).all() and e.features(images, modality="dsm").shape == (3, 96)
    with pytest.raises(DataError, match="without class token"):
        e.features(images, pool="both")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    e = make("convnext_atto").to(dtype)
    x, hidden = torch.randn(1, 3, 64, 64, dtype=dtype), torch.ones(1, 1, 64, 64).bool()
    assert e.feature_map(x, "rgb", hidden, torch.randn(8)).dtype == dtype
    assert e.features(dict(rgb=x), dict(rgb=hidden)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        y = make("convnext_atto").feature_map(x.float(), "rgb", hidden, torch.randn(8))
    assert y.isfinite().all()


def test_gradients_reach_what_was_used_only():
    e = make("test_resnet").train()
    token = nn.Parameter(torch.zeros(e.mask_dim))
    e.feature_map(torch.randn(2, 3, 64, 64), "rgb", torch.ones(2, 1, 64, 64).bool(), token).square().sum().backward()
    assert (
        token.grad.abs().sum() > 0
        and e.switch.convs["rgb"].weight.grad is not None
        and e.switch.convs["dsm"].weight.grad is None
    )
    assert e.sizes == dict(rgb=(64, 64), dsm=(160, 160), s1=(160, 160))


def test_there_and_back():
    e, f = make("test_resnet"), Backbone("test_resnet", MODS, "rgb").eval()
    f.load_state_dict(e.state_dict(), strict=True)
    x = torch.randn(1, 2, 64, 64)
    torch.testing.assert_close(f.feature_map(x, "s1"), e.feature_map(x, "s1"))


@pytest.mark.parametrize("kind", ["cnn", "swin", "vit"])
def test_fresh_is_the_same_architecture(kind):
    e = dict(
        cnn=lambda: make("test_resnet", channels=1, mask_at="layer1"),
        swin=lambda: make("swin_tiny_patch4_window7_224"),
        vit=lambda: MultiModalViT(
            "vit_tiny_patch16_224", MODS, "rgb", patch_size=4, shared_stem=True, embed_dim=48, depth=1, num_heads=3
        ),
    )[kind]()
    e.sizes["rgb"] = (96, 96)
    f = e.fresh()
    assert {k: v.shape for k, v in e.state_dict().items()} == {k: v.shape for k, v in f.state_dict().items()}
    assert (
        f.sizes == e.sizes
        and f.sizes is not e.sizes
        and type(f) is type(e)
        and f.mask_dim == e.mask_dim
        and f.patch_size == e.patch_size
    )
    assert any((a != b).any() for a, b in zip(e.parameters(), f.parameters()))


def test_a_model_of_ones_own_cannot_be_made_again():
    own = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    with pytest.raises(DataError, match="cannot be built again"):
        MultiModalViT(own, MODS, "rgb").fresh()


def test_vit_has_the_same_face():
    e = MultiModalViT("vit_tiny_patch16_224", MODS, "rgb", patch_size=8, embed_dim=48, depth=2, num_heads=3).eval()
    x, hidden, token = torch.randn(1, 3, 32, 16), torch.zeros(1, 1, 32, 16).bool(), torch.randn(48)
    hidden[:, :, :8, 8:] = True
    y = e.embed(x, "rgb")
    y[:, 1] += token
    torch.testing.assert_close(
        e.feature_map(x, "rgb", hidden, token), e.trunk(y)[:, 1:].mT.unflatten(2, (4, 2)), atol=1e-5, rtol=1e-4
    )
    assert e.mask_dim == 48


def test_which_encoder_a_name_means():
    assert isinstance(create_encoder("deit_tiny_patch16_224", MODS, "rgb", patch_size=8, depth=1), MultiModalViT)
    own = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert isinstance(create_encoder(own, MODS, "rgb"), MultiModalViT)
    e = make("test_resnet")
    assert create_encoder(e, MODS, "rgb") is e
    with pytest.raises(DataError, match="exists already; pretrained would change nothing"):
        create_encoder(e, MODS, "rgb", pretrained=True)
    with pytest.raises(DataError, match="no encoder named 'resnet19'. Nearest names"):
        create_encoder("resnet19", MODS, "rgb")
    with pytest.raises(DataError, match="is no encoder"):
        create_encoder(nn.Identity(), MODS, "rgb")
    with pytest.raises(DataError, match="anchor 'nir'"):
        Backbone("test_resnet", MODS, "nir")
    for name in ("fastvit_t8", "mobileone_s0"):
        with pytest.raises(DataError, match="no single first convolution"):
            Backbone(name, MODS, "rgb")
    with pytest.raises(DataError, match="img_sise"):
        make("swin_tiny_patch4_window7_224", img_sise=32)


def test_networks_of_one_size_that_do_not_say_so():
    e = Backbone("hiera_tiny_224", dict(rgb=MODS["rgb"]), "rgb", embed_dim=24, num_heads=1, stages=(1, 1, 1, 1)).eval()
    assert e.fixed and e.layout == "NLC" and e.feature_map(torch.randn(1, 3, 224, 224), "rgb").shape == (1, 192, 7, 7)
    with pytest.raises(DataError, match="was made for 224 x 224 px"):
        e.grid("rgb", (64, 64))


def test_a_stem_that_hands_on_more_than_a_map():
    with pytest.raises(DataError, match="features of shape .*Name another module as mask_at"):
        Backbone("xcit_nano_12_p8_224", dict(rgb=MODS["rgb"]), "rgb", depth=1)
