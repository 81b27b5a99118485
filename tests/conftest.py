"Settings for all tests: real data when it is there, few threads, no network, no windows."

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def data_folder():
    "Folder of the real sample data, or None."
    path = Path(os.environ.get("RS_SELFSUP_DATA") or ROOT.parent / "shared" / "data")
    return path if path.is_dir() else None


def pytest_collection_modifyitems(items):
    slow = os.environ.get("RS_SELFSUP_SLOW", "0") not in ("", "0")
    skips = {
        "slow": None if slow else "slow: set RS_SELFSUP_SLOW=1 to run it",
        "cuda": None if torch.cuda.is_available() else "needs a CUDA device",
        "data": None if data_folder() else "no real sample data: set RS_SELFSUP_DATA to its folder",
    }
    for item in items:
        for marker, reason in skips.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def root():
    "Top of the repository."
    return ROOT


@pytest.fixture(scope="session")
def real_data():
    "Folder of the real sample data (RS_SELFSUP_DATA); the test is skipped without it."
    path = data_folder()
    if path is None:
        pytest.skip("no real sample data: set RS_SELFSUP_DATA to its folder")
    return path


@pytest.fixture(autouse=True)
def _seed():
    "Every test starts from the same random state."
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    "Tensors this small are slower on two threads, and far slower on a busy machine."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
