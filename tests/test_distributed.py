"""Two gloo processes: every loss and its gradient (after DDP's averaging) equal one process on the whole batch."""
import subprocess
import sys

import pytest
import torch

from rs_selfsup.distributed import all_sum, gather, global_mean, is_main, rank, world

WORKER = '''
import sys, torch, torch.distributed as dist
from rs_selfsup.distributed import all_sum, gather, global_mean, is_main, rank, world
from rs_selfsup.losses.alignment import NEGATIVES, dense_infonce
from rs_selfsup.losses.reconstruction import masked_mse
from rs_selfsup.losses.redundancy import linear_hsic
torch.set_num_threads(1)

TERMS = {**{f'infonce {n} {c}': lambda a, b, v, n=n, c=c: dense_infonce(a, b, v, negatives=n, chunk=c) for n in NEGATIVES for c in (2**25, 20)},
         **{f'hsic {n}': lambda a, b, v, n=n: linear_hsic(a, b, v, normalize=n) for n in ('none', 'width', 'cka')}, 'mse': masked_mse}

def model():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 12)

def step(net, x, v):
    "All terms on the two halves of one model's output: value and gradient each"
    out = {}
    for name, f in TERMS.items():
        net.zero_grad()
        y = net(x)
        loss = f(y[..., :6], y[..., 6:]+y[..., :6].roll(1, -1), v)
        loss.backward()
        out[name] = torch.cat([loss.detach().view(1), *[p.grad.flatten() for p in net.parameters()]])
    return out

def batch():
    g = torch.Generator().manual_seed(1)
    v = torch.rand(6, 7, generator=g) > .4
    v[:3, 2] = False; v[3, 4] = True; v[[0, 1, 2, 4, 5], 4] = False       # a place real on one rank only, one without negatives
    return torch.randn(6, 7, 5, generator=g), v

def main(r, store, result):
    dist.init_process_group('gloo', init_method='file://'+store, rank=r, world_size=2)
    x, v = batch()
    part = slice(3*r, 3*r+3)
    out = step(torch.nn.parallel.DistributedDataParallel(model()), x[part], v[part])
    z = torch.full((2, 2), float(r), requires_grad=True)
    (gather(z)*torch.arange(8.).view(4, 2)*(r+1)).sum().backward()
    s = torch.tensor(1.+r, requires_grad=True)
    (all_sum(s)**2*(r+1)).backward()
    one = torch.randn(1, 3, 4)
    out['basics'] = (world(), rank(), is_main(), gather(z).tolist(), z.grad.tolist(), all_sum(s).item(), s.grad.item(), gather(torch.tensor([r == 0])).tolist(),
                     global_mean(torch.tensor(2.*r), r).item(), global_mean(torch.tensor(0.), 0).item())
    out['batch of one per rank'] = dense_infonce(one, one).isfinite().item()
    torch.save(out, result)
    dist.destroy_process_group()

if __name__ == '__main__': main(int(sys.argv[1]), *sys.argv[2:])
'''


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    d = tmp_path_factory.mktemp('ddp')
    (d/'worker.py').write_text(WORKER)
    ps = [subprocess.Popen([sys.executable, d/'worker.py', str(r), d/'store', d/f'out{r}.pt'], stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    ns = {'__name__': 'worker'}
    exec(WORKER, ns)
    single = ns['step'](ns['model'](), *ns['batch']())
    for p in ps:
        err = p.communicate(timeout=300)[1]
        assert p.returncode == 0, err
    return single, [torch.load(d/f'out{r}.pt') for r in (0, 1)]


def test_every_loss_and_gradient_is_the_single_process_one(runs):
    single, ranks = runs
    for name, want in single.items():
        for got in ranks: torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5, msg=lambda m: f'{name}: {m}')
        assert torch.equal(ranks[0][name], ranks[1][name]), name


def test_basics_on_two_processes(runs):
    a, b = (r['basics'] for r in runs[1])
    rows = [[0., 0.], [0., 0.], [1., 1.], [1., 1.]]
    assert a == (2, 0, True, rows, [[0., 3.], [6., 9.]], 3., 18., [True, False], 2., 0.)
    assert b == (2, 1, False, rows, [[12., 15.], [18., 21.]], 3., 18., [True, False], 2., 0.)
    assert all(r['batch of one per rank'] for r in runs[1])


def test_identity_without_a_process_group():
    x = torch.randn(3, requires_grad=True)
    assert (world(), rank(), is_main()) == (1, 0, True) and gather(x) is x and all_sum(x) is x
    assert global_mean(torch.tensor(6.), torch.tensor(3)) == 2 and global_mean(torch.tensor(0.), 0) == 0
