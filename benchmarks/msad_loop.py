"""MSAD of all places at once against a loop over places, as X-STARS was released.

    python benchmarks/msad_loop.py                     # 12 images, 197 tokens, 3 sensors: seconds on one core
    python benchmarks/msad_loop.py --heads             # minutes on a CPU
    python benchmarks/msad_loop.py --heads --device cuda

Forward and backward, median of five. The loss alone on given projections: `msad` against `msad_loop`. With its heads: one per
sensor on all tokens, against the released three, which are called for one place, pair and sensor at a time.

Both ways do the same arithmetic. What is saved are thousands of small operations a step: much on a device that waits for launches,
on one CPU core 14 times at a width of 64, 3 at 256 and nothing at 1,024, where the products themselves take the time.
"""

import argparse
import itertools
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from rs_selfsup.losses.msad import msad, msad_loop
from rs_selfsup.methods.core import mlp


class Residual(nn.Module):
    "The released head by its description: two linear layers with a residual between, dropout, LayerNorm"
    def __init__(self, dim, out=1024):
        super().__init__()
        self.a, self.b, self.drop, self.norm = nn.Linear(dim, out), nn.Linear(out, out), nn.Dropout(.2), nn.LayerNorm(out)

    def forward(self, x):
        h = self.a(x)
        return self.norm(self.drop(self.b(F.gelu(h))) + h)


def loop_with_heads(f, shared, first, second):
    "One place and pair after the other, every head called for each; with the gradient the release cuts off"
    terms = []
    for s, t in itertools.combinations(f, 2):
        for x, y in zip(f[s].unbind(1), f[t].unbind(1)):
            a, b = first(shared(x)), second(shared(y))
            terms.append(msad_loop({s: a[:, None], t: b[:, None]}))
    return torch.stack(terms).mean()


def seconds(step, inputs, device, repeats):
    "Median time of a step and its backward pass; the first is not counted"
    took = []
    for _ in range(repeats + 1):
        for x in inputs:
            x.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


def _with_heads(f, dim, project, device):
    own = nn.ModuleDict({m: mlp((dim, 1024, project), None, nn.GELU) for m in f}).to(device)
    shared, first, second = (Residual(d).to(device) for d in (dim, 1024, 1024))
    return f, lambda: msad({m: own[m](x) for m, x in f.items()}), lambda: loop_with_heads(f, shared, first, second)


def bench_msad(batch=12, tokens=197, sensors=3, dim=192, project=256, heads=False, device="cpu", repeats=5):
    "Seconds of both ways, and their ratio, for the loss alone and, with `heads`, together with them"
    torch.manual_seed(0)
    many = lambda d: {f"s{i}": torch.randn(batch, tokens, d, device=device, requires_grad=True) for i in range(sensors)}
    z = many(project)
    ways = dict(loss=(z, lambda: msad(z), lambda: msad_loop(z, temperature=project**.5)))
    if heads:
        ways["heads"] = _with_heads(many(dim), dim, project, device)
    out = {}
    for name, (inputs, ours, loop) in ways.items():
        a, b = (seconds(step, list(inputs.values()), device, repeats) for step in (ours, loop))
        out[name] = dict(vectorised_s=a, loop_s=b, ratio=b / a)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k, v in dict(batch=12, tokens=197, sensors=3, dim=192, project=256, repeats=5).items():
        p.add_argument(f"--{k}", type=int, default=v)
    p.add_argument("--device", default="cpu")
    p.add_argument("--heads", action="store_true", help="also with the projection heads")
    for name, r in bench_msad(**vars(p.parse_args())).items():
        print(f"{name}: all at once {1e3 * r['vectorised_s']:.1f} ms, loop {1e3 * r['loop_s']:.0f} ms, {r['ratio']:.0f} times faster")


if __name__ == "__main__":
    main()
