"What several test files share: generated batches, a mode that forbids reading from the device, two processes."

import os
import socket

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


def two_processes(f, *args):
    "f(rank, *args) in two gloo processes."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (port, f, args), nprocs=2)


def _enter(rank, port, f, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    f(rank, *args)
    torch.distributed.destroy_process_group()


def sgd_steps(method, batches, momentum=0.9):
    "Losses (steps, terms) of plain SGD, whose step is as exact as its gradient, and the state after them."
    net = torch.nn.parallel.DistributedDataParallel(method) if torch.distributed.is_initialized() else method
    opt = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    losses = []
    for batch in batches:
        terms = net(batch)
        sum(method.weights[k] * v for k, v in terms.items()).backward()
        opt.step()
        opt.zero_grad()
        method.update_teacher(momentum)
        losses.append(torch.stack(list(terms.values())).detach())
    return torch.stack(losses), {k: v.clone() for k, v in method.state_dict().items()}
