"The four Learners on real tiles: a run that was killed and resumed ends with the bits of the run that nobody disturbed."

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from rs_selfsup.callbacks import read_checkpoint
from rs_selfsup.data.loading import dataloaders
from rs_selfsup.data.synthetic import write_scenes
from rs_selfsup.data.tiles import build_store
from rs_selfsup.export import load_encoder
from rs_selfsup.pretrain import LEARNERS

pytestmark = pytest.mark.usefixtures("one_thread")
NET = dict(embed_dim=24, depth=2, num_heads=2)
OWN = dict(
    mssdf=dict(NET, fusion_depth=1, decoder_depth=1),
    cmid=dict(modality="rgb", queue=8, prototypes=16, width=16, dim=8),
    rsdnet=dict(NET, sensors=["ms2"], img_size=16),
    xstars=dict(NET, n_local=1, local_size=16, prototypes=16, head_hidden=16, bottleneck=8, project=8, project_hidden=16),
)
CNN = dict(cmid="test_resnet")  # BatchNorm: its statistics are part of the run


def make(store, method):
    dls = dataloaders(store, bs=4, seed=0, splits=("train",))
    name, patch = (CNN[method], None) if method in CNN else ("vit_tiny_patch16_224", 8)
    return LEARNERS[method](dls, name, patch, 0, **OWN[method])


def train(learn, folder, **kw):
    with learn.no_bar(), learn.no_logging():
        learn.fit_pretrain(2, lr=1e-3, checkpoint_dir=folder, save_every=2, knn=False, **kw)
    return learn


class Kill(Callback):
    "The machine stops in the middle of a step"
    order = 19

    def after_pred(self):
        if self.training and self.learn.step == 7:  # six steps lie in the last checkpoint, two of them of the second epoch
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    scenes = write_scenes(root / "scenes", 4, 64, modalities=("rgb", "ms2"), progress=False)
    return build_store(scenes, root / "store", tile=64, block=64, splits=(1, 0, 0), progress=False)


@pytest.mark.parametrize("method", LEARNERS)
def test_a_killed_run_resumes_to_the_same_bits(store, tmp_path, method):
    whole = train(make(store, method), tmp_path / "whole")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    args = [sys.executable, __file__, store.path, tmp_path / "cut", method]
    p = subprocess.run([str(a) for a in args], env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == -signal.SIGKILL, p.stderr[-2000:]
    assert read_checkpoint(tmp_path / "cut")["step"] == 6
    again = train(make(store, method), tmp_path / "cut", resume=True)
    a, b = whole.method.state_dict(), again.method.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    enc = load_encoder(again.export_encoder(tmp_path / "enc.safetensors", modality="all"))
    assert all(torch.equal(v, enc.state_dict()[k]) for k, v in whole.method.encoder.state_dict().items() if k in enc.state_dict())


if __name__ == "__main__":
    from rs_selfsup.data.tiles import TileStore

    torch.set_num_threads(1)
    train(make(TileStore(Path(sys.argv[1])), sys.argv[3]), sys.argv[2], cbs=[Kill()])
