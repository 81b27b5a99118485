"Exported files: what plain timm does with them, and what happens to files that are something else."

import argparse
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from rs_selfsup.backbones import Backbone
from rs_selfsup.data.augment import Normalize
from rs_selfsup.encoders import MultiModalViT
from rs_selfsup.export import (
    create_timm,
    export_encoder,
    init_encoder,
    load_encoder,
    load_weights,
    read_checkpoint,
    read_header,
    strip_names,
)
from rs_selfsup.modalities import DataError, preset

TINY = dict(embed_dim=48, depth=2, num_heads=3)
MODS = dict(rgb=preset("rgb", 0.5), dsm=preset("dsm", 0.5), s1=preset("s1", 10.0))


@pytest.fixture
def enc():
    return MultiModalViT("vit_tiny_patch16_224", MODS, "rgb", patch_size=4, img_size=40, **TINY).eval()


@pytest.mark.parametrize("m, size", [("rgb", 40), ("dsm", 40), ("s1", 2)])
def test_strictly_loadable_into_plain_timm(enc, tmp_path, m, size):
    file = export_encoder(enc, tmp_path / "e.safetensors", modality=m)
    s = read_header(file)["timm_settings"]
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=s["patch_size"], in_chans=s["in_chans"], num_classes=0, **TINY
    ).eval()
    plain.load_state_dict(load_file(file), strict=True)
    x = torch.randn(2, MODS[m].n_bands, size, size)
    torch.testing.assert_close(plain.forward_features(x), enc(x, m), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_encoder(file)(x, m), enc(x, m), atol=1e-6, rtol=1e-5)


def test_the_size_last_trained_at(enc, tmp_path):
    enc.train()(torch.zeros(1, 3, 24, 32), "rgb")
    enc.eval()(torch.zeros(1, 3, 8, 8), "rgb")
    file = export_encoder(enc, tmp_path / "e.safetensors")
    assert load_file(file)["pos_embed"].shape == (1, 1 + 6 * 8, 48)


def test_every_stem(enc, tmp_path):
    back = load_encoder(
        export_encoder(enc, tmp_path / "e.safetensors", modality="all", stats=dict(rgb=dict(mean=np.ones(3))))
    )
    assert back.stats["rgb"]["mean"] == [1, 1, 1]
    for k, v in enc.state_dict().items():
        assert torch.equal(v, back.state_dict()[k])


@pytest.mark.parametrize("shared", [False, True])
def test_shared_stem(tmp_path, shared):
    enc = MultiModalViT(
        "vit_tiny_patch16_224",
        {m: MODS[m] for m in ("rgb", "dsm")},
        "rgb",
        patch_size=4,
        img_size=8,
        shared_stem=shared,
        **TINY,
    ).eval()
    x = torch.randn(1, 1, 8, 8)
    for kind in ("dsm", "all"):
        back = load_encoder(export_encoder(enc, tmp_path / f"{kind}.safetensors", modality=kind))
        torch.testing.assert_close(back(x, "dsm"), enc(x, "dsm"))


def test_unknown_modality_and_settings(enc, tmp_path):
    with pytest.raises(DataError, match="no modality 'nir'"):
        export_encoder(enc, tmp_path / "e.safetensors", modality="nir")
    own = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, **TINY)
    with pytest.raises(DataError, match="timm builds"):
        export_encoder(MultiModalViT(own, MODS, "rgb"), tmp_path / "e.safetensors")
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(enc, tmp_path, monkeypatch):
    file = export_encoder(enc, tmp_path / "e.safetensors")
    before = file.read_bytes()

    def fail(*a, **k):
        raise OSError("disk full")

    monkeypatch.setattr("rs_selfsup.export.save_file", fail)
    with pytest.raises(OSError):
        export_encoder(enc, file, modality="dsm")
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_cut_short_anywhere(enc, tmp_path):
    data = export_encoder(enc, tmp_path / "e.safetensors").read_bytes()
    for n in (0, 5, 8, 9, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:n])
        with pytest.raises(DataError, match=f"cut.safetensors: cut short: {n} bytes"):
            load_encoder(tmp_path / "cut.safetensors")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


def test_nothing_is_unpickled(enc, tmp_path):
    torch.save(dict(x=Bomb()), tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(pickle.dumps(Bomb()))
    for f in ("a.pt", "b.safetensors"):
        for read in (load_encoder, create_timm, read_header, lambda p: init_encoder(enc, p)):
            with pytest.raises(DataError, match=f"{f}: a pickled checkpoint"):
                read(tmp_path / f)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is text",
        b"\x89PNG\r\n\x1a\n" + bytes(90),
        b"II*\0" + bytes(90),
        (20).to_bytes(8, "little") + b"{ this is no json at" + bytes(9),
        (7).to_bytes(8, "little") + b'{"a":1}',
    ],
)
def test_not_safetensors(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError, match="not a safetensors file"):
        read_header(tmp_path / "x")


def test_missing_file_and_foreign_header(enc, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_encoder(tmp_path / "nothing.safetensors")
    save_file(enc.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="no header of rs_selfsup"):
        load_encoder(tmp_path / "x.safetensors")


def test_under_95_percent_fails(enc):
    state = enc.state_dict()
    names = [k for k in state if "blocks.0" in k]
    few = {k: v for k, v in state.items() if k not in names}
    with pytest.raises(DataError, match="the weights do not fit the model"):
        load_weights(enc, few)
    assert load_weights(enc, {k: v for k, v in state.items() if k != "vit.norm.bias"}).missing == ["vit.norm.bias"]


def test_init_from_timm_with_another_patch_and_bands(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, **TINY)
    save_file(net.state_dict(), tmp_path / "t.safetensors")
    mods = dict(rgbn=preset("rgbn", 0.5), dsm=preset("dsm", 0.5))
    enc = MultiModalViT("vit_tiny_patch16_224", mods, "rgbn", patch_size=16, **TINY)
    report = init_encoder(enc, tmp_path / "t.safetensors")
    assert report.share == 1 and "vit.head.weight" in report.unexpected
    w, old = enc.stems["rgbn"].proj.weight.detach(), net.patch_embed.proj.weight.detach()
    torch.testing.assert_close(w[:, :3], old * 0.75)
    torch.testing.assert_close(w[:, 3], old.mean(1) * 0.75)
    torch.testing.assert_close(enc.vit.blocks[1].mlp.fc1.weight, net.blocks[1].mlp.fc1.weight)


def test_init_from_an_export(enc, tmp_path):
    export_encoder(enc, tmp_path / "e.safetensors", modality="all")
    new = MultiModalViT("vit_tiny_patch16_224", MODS, "rgb", patch_size=4, **TINY)
    init_encoder(new, tmp_path / "e.safetensors")
    for k, v in enc.state_dict().items():
        assert torch.equal(v, new.state_dict()[k]), k


def test_the_header_says_how_to_normalise(enc, tmp_path):
    stats = {
        m: dict(mean=[7.0] * v.n_bands, std=[2.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[9.0] * v.n_bands)
        for m, v in MODS.items()
    }
    file = export_encoder(
        enc, tmp_path / "e.safetensors", modality="all", stats=stats, normalize=Normalize(MODS, stats)
    )
    recipe = load_encoder(file).recipe
    assert recipe["s1"] == dict(mean=[7, 7], std=[2, 2], minus_tile_mean=False)
    x = torch.rand(1, 1, 8, 8) * 9
    r = recipe["dsm"]
    y = (x - (x.mean() if r["minus_tile_mean"] else 0) - r["mean"][0]) / r["std"][0]
    torch.testing.assert_close(Normalize(MODS, stats)(dict(dsm=x))["dsm"], y)


# Backbones

SWIN = dict(img_size=32, depths=(1, 1), embed_dim=24, num_heads=(1, 2))
CNNS = dict(
    test_resnet={}, convnext_atto=dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), swin_tiny_patch4_window7_224=SWIN
)


def stats_of(mods):
    return {
        m: dict(mean=[7.0] * v.n_bands, std=[2.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[9.0] * v.n_bands)
        for m, v in mods.items()
    }


@pytest.mark.parametrize("name", CNNS)
def test_backbone_is_strictly_loadable_into_plain_timm(name, tmp_path):
    e = Backbone(name, MODS, "rgb", **CNNS[name]).eval()
    for m in ("s1",):
        file = export_encoder(
            e, tmp_path / "e.safetensors", modality=m, stats=stats_of(MODS), normalize=Normalize(MODS, stats_of(MODS))
        )
        plain = timm.create_model(name, in_chans=MODS[m].n_bands, num_classes=0, **CNNS[name]).eval()
        plain.load_state_dict(load_file(file), strict=True)
        x = torch.randn(2, MODS[m].n_bands, 32, 32)
        y = e.feature_map(x, m)
        for other in (load_encoder(file), e):
            torch.testing.assert_close(other.feature_map(x, m), y)
        torch.testing.assert_close(create_timm(file)(x), plain(x))
        h = read_header(file)
        assert (h["kind"], h["modality"], list(h["modalities"])) == ("backbone", m, [m])
        assert (
            h["normalize"][m] == dict(mean=[7] * MODS[m].n_bands, std=[2] * MODS[m].n_bands, minus_tile_mean=False)
            and h["stats"][m]["std"][0] == 2
        )
    assert create_timm(file, num_classes=5)(x).shape == (2, 5)


@pytest.mark.parametrize("channels", [None, 1])
def test_every_first_convolution(channels, tmp_path):
    e = Backbone("test_resnet", MODS, "rgb", channels=channels, mask_at="layer1").eval()
    e.sizes["dsm"] = (64, 96)
    back = load_encoder(export_encoder(e, tmp_path / "e.safetensors", modality="all"))
    assert list(back.state_dict()) == list(e.state_dict()) and all(
        torch.equal(v, back.state_dict()[k]) for k, v in e.state_dict().items()
    )
    assert (back.channels, back.mask_at, back.sizes, list(back.modalities)) == (channels, "layer1", e.sizes, list(MODS))
    one = load_encoder(export_encoder(e, tmp_path / "s1.safetensors", modality="s1"))
    x = torch.randn(1, channels or 2, 32, 32)
    torch.testing.assert_close(one.feature_map(x, "s1"), e.feature_map(x, "s1"))
    assert create_timm(tmp_path / "e.safetensors", "dsm")(torch.randn(1, 1, 32, 32)).shape == (1, 96)


def test_an_export_leaves_the_random_numbers_alone(enc, tmp_path):
    state = torch.get_rng_state()
    export_encoder(enc, tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_header_as_long_as_a_pickle_is_marked(tmp_path):
    "The first bytes of a safetensors file are a length, which may be that of a pickle's mark"
    for length in (0x0280, 0x0480, 0x4B50):  # '\x80\x02', '\x80\x04', 'PK'
        for fill in range(length - 200, length):
            save_file(dict(a=torch.zeros(2)), tmp_path / "x", dict(note="n" * fill))
            if int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") == length:
                break
        else:
            pytest.fail("no such header")
        assert read_checkpoint(tmp_path / "x")["a"].shape == (2,)


# Weights from elsewhere


def vit_state(**kw):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=3, **TINY, **kw
    ).state_dict()


def as_file(kind, state, path):
    "The state dict as it lies in the checkpoints of others"
    zero = {k: torch.zeros_like(v) for k, v in state.items()}
    front = lambda p, s: {p + k: v for k, v in s.items()}
    files = dict(
        dino_teacher=dict(student=front("module.backbone.", zero), teacher=front("backbone.", state) | {"head.mlp.0.weight": torch.zeros(2)}, epoch=3),
        dino_backbone=front("module.backbone.", state),
        mae=dict(model=state | {"mask_token": torch.zeros(1, 1, 8)} | front("decoder_blocks.0.", zero)),
        mae_encoder=dict(model=front("encoder.", state) | front("decoder.", {"a": torch.zeros(1)})),
        state_dict=dict(state_dict=front("module.", state), lr=0.1),
        both=front("student.", zero) | front("teacher.", state), compiled=front("_orig_mod.module.net.", state),
    )  # fmt: skip
    torch.save(files[kind], path)
    return path


@pytest.mark.parametrize(
    "kind", ["dino_teacher", "dino_backbone", "mae", "mae_encoder", "state_dict", "both", "compiled"]
)
def test_checkpoints_of_others(enc, tmp_path, kind):
    state = vit_state()
    report = init_encoder(enc, as_file(kind, state, tmp_path / "c.pth"))
    assert report.share == 1 and "vit.pos_embed" in report.unexpected
    for k, v in enc.vit.state_dict().items():
        assert torch.equal(v, state[k]), k
    assert torch.equal(enc.stems["rgb"].proj.weight, state["patch_embed.proj.weight"])
    torch.testing.assert_close(enc.stems["dsm"].proj.weight[:, 0], state["patch_embed.proj.weight"].sum(1))


def test_the_same_file_as_safetensors(enc, tmp_path):
    save_file({f"module.backbone.{k}": v for k, v in vit_state().items()}, tmp_path / "c.safetensors")
    assert init_encoder(enc, tmp_path / "c.safetensors").share == 1


def test_too_little_lists_what_is_missing(enc, tmp_path):
    state = {k.replace("blocks.0", "layer.0"): v for k, v in vit_state().items()}
    torch.save(dict(model=state), tmp_path / "c.pth")
    before = {k: v.clone() for k, v in enc.state_dict().items()}
    with pytest.raises(
        DataError, match=r"c.pth: the weights do not fit.*Missing: vit.blocks.0.norm1.weight, vit.blocks.0.norm1.bias, "
    ):
        init_encoder(enc, tmp_path / "c.pth")
    assert all(torch.equal(v, before[k]) for k, v in enc.state_dict().items())
    torch.save(dict(model={"x." + k.replace(".", "_"): v for k, v in state.items()}), tmp_path / "d.pth")
    with pytest.raises(DataError, match="3% matched: 1 matched"):  # next to nothing fits: never silently
        init_encoder(enc, tmp_path / "d.pth")


def test_files_without_weights(enc, tmp_path):
    torch.save(dict(epoch=3), tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    torch.save(dict(model=vit_state(), args=argparse.Namespace(lr=1)), tmp_path / "c.pt")
    why_not = {
        "a.pt": "no tensors in it, only epoch",
        "b.pt": "holds a list",
        "c.pt": "with objects in it.*keep its weights alone",
        "none.pt": "no such file",
    }
    for f, why in why_not.items():
        with pytest.raises(DataError, match=f"{f}: .*{why}"):
            init_encoder(enc, tmp_path / f)


def test_torchvision_names(tmp_path):
    theirs = torchvision.models.VisionTransformer(32, 4, 2, 3, 48, 192)
    save_file(theirs.state_dict(), tmp_path / "tv.safetensors")
    e = MultiModalViT("vit_tiny_patch16_224", dict(rgb=MODS["rgb"]), "rgb", patch_size=4, **TINY).eval()
    report = init_encoder(e, tmp_path / "tv.safetensors")
    assert report.share == 1
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0, **TINY).eval()
    state = strip_names(theirs.state_dict(), plain.state_dict())
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")})
    theirs.heads = torch.nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), theirs.eval()(x), atol=1e-5, rtol=1e-4)
    assert torch.equal(e.vit.blocks[1].mlp.fc2.weight, plain.blocks[1].mlp.fc2.weight)


def test_backbone_from_torchvision(tmp_path):
    theirs = torchvision.models.resnet18().eval()
    old = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}  # as in files of 2017
    torch.save(old, tmp_path / "r.pth")
    e = Backbone("resnet18", MODS, "rgb").eval()
    report = init_encoder(e, tmp_path / "r.pth")
    assert report.share == 1 and sorted(report.unexpected) == ["net.fc.bias", "net.fc.weight"]
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        e(x, "rgb"), torch.nn.Sequential(*list(theirs.children())[:-1])(x).flatten(1), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(e.switch.convs["s1"].weight.sum(1), theirs.conv1.weight.sum(1), atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="do not fit.*Missing: net"):
        init_encoder(Backbone("resnet50", MODS, "rgb"), tmp_path / "r.pth")


def test_backbone_from_its_export(tmp_path):
    e, new = (Backbone("test_resnet", MODS, "rgb") for _ in range(2))
    export_encoder(e, tmp_path / "e.safetensors", modality="all")
    init_encoder(new, tmp_path / "e.safetensors")
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in e.state_dict().items())
    export_encoder(e, tmp_path / "s1.safetensors", modality="s1")
    other = Backbone("test_resnet", dict(s1=MODS["s1"], dsm=MODS["dsm"]), "s1")
    init_encoder(other, tmp_path / "s1.safetensors")
    assert torch.equal(other.switch.convs["s1"].weight, e.switch.convs["s1"].weight)
    torch.testing.assert_close(
        other.switch.convs["dsm"].weight[:, 0], e.switch.convs["s1"].weight.sum(1), atol=1e-5, rtol=1e-4
    )


def test_a_backbone_keeps_its_learned_positions(tmp_path):
    kw = dict(img_size=28, depth=1, embed_dim=48, num_heads=3)
    e = Backbone("eva02_tiny_patch14_224", MODS, "rgb", **kw).eval()
    back, x = load_encoder(export_encoder(e, tmp_path / "e.safetensors", modality="dsm")), torch.randn(1, 1, 28, 28)
    assert back.load_report.share == 1 and torch.equal(back.net.pos_embed, e.net.pos_embed)
    torch.testing.assert_close(back.feature_map(x, "dsm"), e.feature_map(x, "dsm"))
