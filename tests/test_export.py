"Exported files: what plain timm does with them, and what happens to files that are something else."

import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from rs_selfsup.encoders import MultiModalViT
from rs_selfsup.export import create_timm, export_encoder, init_encoder, load_encoder, load_weights, read_header
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
    plain = timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=s["patch_size"], in_chans=s["in_chans"], num_classes=0, **TINY).eval()
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
    back = load_encoder(export_encoder(enc, tmp_path / "e.safetensors", modality="all", stats=dict(rgb=dict(mean=np.ones(3)))))
    assert back.stats["rgb"]["mean"] == [1, 1, 1]
    for k, v in enc.state_dict().items():
        assert torch.equal(v, back.state_dict()[k])


@pytest.mark.parametrize("shared", [False, True])
def test_shared_stem(tmp_path, shared):
    enc = MultiModalViT("vit_tiny_patch16_224", {m: MODS[m] for m in ("rgb", "dsm")}, "rgb", patch_size=4, img_size=8, shared_stem=shared, **TINY).eval()
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


@pytest.mark.parametrize("data", [b"hello, this is text", b"\x89PNG\r\n\x1a\n" + bytes(90), b"II*\0" + bytes(90),
                                  (20).to_bytes(8, "little") + b"{ this is no json at" + bytes(9), (7).to_bytes(8, "little") + b'{"a":1}'])
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
    from rs_selfsup.data.augment import Normalize
    stats = {m: dict(mean=[7.0] * v.n_bands, std=[2.0] * v.n_bands, p01=[0.0] * v.n_bands, p99=[9.0] * v.n_bands) for m, v in MODS.items()}
    file = export_encoder(enc, tmp_path / "e.safetensors", modality="all", stats=stats, normalize=Normalize(MODS, stats))
    recipe = load_encoder(file).recipe
    assert recipe["s1"] == dict(mean=[7, 7], std=[2, 2], minus_tile_mean=False)
    x = torch.rand(1, 1, 8, 8) * 9
    r = recipe["dsm"]
    y = (x - (x.mean() if r["minus_tile_mean"] else 0) - r["mean"][0]) / r["std"][0]
    torch.testing.assert_close(Normalize(MODS, stats)(dict(dsm=x))["dsm"], y)
