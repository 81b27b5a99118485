"What several test files share: generated batches, and a mode that forbids reading from the device."

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rs_selfsup.data.loading import Batch
from rs_selfsup.randomness import keys


def fields(n, size, mods, seed=0, full=True):
    "Smooth random fields, seen by every modality at its own resolution; `size` in pixels of 0.5 m."
    g = torch.Generator().manual_seed(seed)
    f = F.interpolate(torch.rand(n, 3, 4, 4, generator=g), size=size, mode="bicubic").clamp(0, 1) * 255
    images, valid = {}, {}
    for m, mod in mods.items():
        s = round(size * 0.5 / mod.gsd)
        x = F.interpolate(f, size=s, mode="area")
        images[m] = x if mod.n_bands == 3 else x.mean(1, keepdim=True).repeat(1, mod.n_bands, 1, 1)
        valid[m] = torch.ones(n, 1, s, s, dtype=torch.bool)
    if not full:
        for i, m in enumerate(mods):
            valid[m][i % n] = False
            valid[m][(i + 1) % n, :, : valid[m].shape[2] // 2] = False
    return Batch(images, valid, tile=torch.arange(n), key=keys(seed, 0, torch.arange(n)), full=full)


class NoSync(TorchDispatchMode):
    "Raises where a value would be read back to the host."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert str(func) not in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"), func
        return func(*args, **(kwargs or {}))
