"""Losses of BYOL, DINO, MoCo, MSAD and masked pixels: closed form, loop, limit, oracle; validity; the defects of the published code; two processes."""
import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from rs_selfsup.losses.alignment import NEGATIVES, dense_infonce, neighbours
from rs_selfsup.losses.contrastive import Queue, check_queue, infonce
from rs_selfsup.losses.distillation import (byol_loss, centred_softmax, dino_loss, koleo, prototype_loss, sinkhorn, teacher_entropy,
                                            temperature_schedule, update_center)
from rs_selfsup.losses.msad import msad, msad_loop
from rs_selfsup.losses.reconstruction import focal_frequency, focal_l1


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def below(p, *shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < p


MASK = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
OLD = randn(10, 8, seed=9)
# name -> loss of two (6, 8) tensors and a mask of rows
ROWS = {'byol': byol_loss, 'prototype': lambda a, b, m: prototype_loss(a, b.nan_to_num(0, 0, 0).float().softmax(-1), m), 'koleo': lambda a, b, m: koleo(a, m),
        'infonce': lambda a, b, m: infonce(a, b, mask=m), 'queue': lambda a, b, m: infonce(a, b, OLD, torch.arange(10) < 7, m),
        'msad': lambda a, b, m: msad({'s1': a[:, None], 's2': b[:, None]}, {'s1': m[:, None]}),
        'msad soft': lambda a, b, m: msad({'s1': a[:, None], 's2': b[:, None]}, {'s1': m[:, None]}, targets='soft', label_smoothing=.3)}
IMAGES = {'focal L1': focal_l1, 'frequency': lambda p, t, m: focal_frequency(p, t, m, m),
          'frequency, batch mean': lambda p, t, m: focal_frequency(p, t, m, m, per_sample=False)}
ALL = {**{n: (f, randn(6, 8), randn(6, 8, seed=1), MASK, MASK[:, None]) for n, f in ROWS.items()},
       **{n: (f, randn(3, 2, 8, 8), randn(3, 2, 8, 8, seed=1), *[below(.7, 3, 1, 8, 8)]*2) for n, f in IMAGES.items()}}
every = pytest.mark.parametrize('f,a,b,m,where', ALL.values(), ids=ALL)


@every
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_float32_whatever_autocast_does(f, a, b, m, where, dtype):
    a, b = a.to(dtype), b.to(dtype)
    x = a.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16): loss = f(x, b, m)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, f(a.float(), b.float(), m))
    loss.backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all() and x.grad.abs().sum() > 0


@every
def test_what_does_not_count_may_hold_anything(f, a, b, m, where):
    x = torch.where(where, a, torch.nan).requires_grad_()
    loss = f(x, torch.where(where, b, torch.inf), m)
    loss.backward()
    torch.testing.assert_close(loss, f(a, b, m))
    assert x.grad.isfinite().all() and (x.grad[~where.expand_as(a)] == 0).all() and (x.grad[where.expand_as(a)] != 0).any()


@every
def test_nothing_that_counts_is_zero_with_finite_gradient(f, a, b, m, where):
    x = a.clone().requires_grad_()
    loss = f(x, b, m & False)
    loss.backward()
    assert loss == 0 and x.grad.isfinite().all()


@every
def test_zeros_have_finite_gradient(f, a, b, m, where):
    x = torch.zeros_like(a).requires_grad_()
    f(x, b, m).backward()
    assert x.grad.isfinite().all()


# --- distillation

def test_byol_closed_forms_and_no_gradient_to_the_target():
    p, z = randn(6, 8).requires_grad_(), randn(6, 8, seed=1).requires_grad_()
    assert byol_loss(z, z).item() == pytest.approx(0, abs=1e-6) and byol_loss(-z, z).item() == pytest.approx(4)
    assert byol_loss(torch.eye(4)[:2], torch.eye(4)[2:]).item() == pytest.approx(2)
    byol_loss(p, z).backward()
    assert z.grad is None and p.grad.abs().sum() > 0
    torch.testing.assert_close(byol_loss(p, z), 2+2*pytest.importorskip('lightly.loss').NegativeCosineSimilarity()(p, z))


def test_dino_and_its_centre_against_lightly():
    ref, c = pytest.importorskip('lightly.loss').DINOLoss(12, teacher_temp=.05, warmup_teacher_temp_epochs=1), torch.zeros(12)
    for step in range(3):
        g, views = randn(2, 6, 12, seed=step), list(randn(5, 6, 12, seed=10+step))
        torch.testing.assert_close(dino_loss(views, list(centred_softmax(g, c, .05))), ref(list(g), views))
        c = update_center(c, g)
        torch.testing.assert_close(c, ref.center.flatten())


def test_dino_takes_each_pair_of_different_views_once():
    views, probs = list(randn(10, 4, 7)), list(randn(2, 4, 7, seed=1).softmax(-1))
    pairs = [prototype_loss(views[j], probs[i]) for i in range(2) for j in range(10) if i != j]
    assert len(pairs) == 18
    torch.testing.assert_close(dino_loss(views, probs), torch.stack(pairs).mean())
    with pytest.raises(ValueError, match='Give at least two views'): dino_loss(views[:1], probs[:1])


def test_prototype_loss_of_cells_closed_forms():
    s, t, m = randn(3, 4, 9), randn(3, 4, 9, seed=1).softmax(-1).requires_grad_(), below(.7, 3, 4)
    loop = torch.stack([-(t[b, i]*(s[b, i]/.1).log_softmax(-1)).sum() for b, i in m.nonzero().tolist()]).mean()
    torch.testing.assert_close(prototype_loss(s, t, m), loop)
    assert prototype_loss(torch.zeros_like(s), t).item() == pytest.approx(math.log(9))            # the collapse line
    torch.testing.assert_close(prototype_loss(.1*t.log(), t), teacher_entropy(t))                 # no divergence left
    assert not prototype_loss(s, t).requires_grad


def test_centre_is_used_before_it_is_updated_and_stays_without_rows():
    c = torch.zeros(5)
    new = update_center(c, torch.ones(3, 5))
    assert c.eq(0).all() and torch.allclose(new, torch.full((5,), .1))
    assert torch.equal(update_center(new, torch.ones(3, 5), torch.zeros(3).bool()), new)


def test_sinkhorn_is_the_published_one_and_does_not_overflow():
    naive = pytest.importorskip('lightly.loss.swav_loss').sinkhorn
    g = randn(24, 8)+randn(8, seed=1)
    for i in (1, 3, 10): torch.testing.assert_close(sinkhorn(g, .5, i), naive(g, i, .5))
    hot = 3*g
    assert not naive(hot, 3, .04).isfinite().all()
    torch.testing.assert_close(sinkhorn(hot, .04).double(), naive(hot.double(), 3, .04), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(sinkhorn(g, .5, 500).sum(0), torch.full((8,), 3.), rtol=1e-2, atol=1e-2)
    keep = torch.arange(24) % 3 > 0
    torch.testing.assert_close(sinkhorn(g.masked_fill(~keep[:, None], torch.nan), .5, mask=keep)[keep], sinkhorn(g[keep], .5))


@given(st.floats(0, 500), st.floats(1, 400))
def test_temperature_schedule_is_linear_then_constant(step, warmup):
    t = temperature_schedule(step, warmup)
    assert t == pytest.approx(.04+.03*min(step/warmup, 1)) and temperature_schedule(step, 0) == .07


def test_entropies_tell_the_two_collapses_apart():
    for p, one, mean in ((torch.full((16, 8), 1/8), math.log(8), math.log(8)), (torch.eye(8)[[3]*16], 0, 0), (torch.eye(8).repeat(2, 1), 0, math.log(8))):
        assert teacher_entropy(p).item() == pytest.approx(one, abs=1e-6) and teacher_entropy(p, marginal=True).item() == pytest.approx(mean, abs=1e-6)


def test_koleo_is_published_but_bounded_for_copies():
    ref, x = pytest.importorskip('lightly.loss').KoLeoLoss(), randn(10, 6)
    torch.testing.assert_close(koleo(x, eps=1e-8), ref(x))
    twice = torch.cat([x, x+1e-7*randn(10, 6, seed=1)]).requires_grad_()
    assert torch.autograd.grad(koleo(twice), twice)[0].norm() < 1e3 < 1e5 < torch.autograd.grad(ref(twice), twice)[0].norm()
    with pytest.raises(ValueError, match='at least two samples'): koleo(x[:1])
    assert koleo(x, torch.arange(10) == 3) == 0                                                    # alone: no neighbour


# --- contrastive

def test_infonce_closed_forms_and_limits():
    eye, q, k = torch.eye(8), randn(6, 8), randn(6, 8, seed=1)
    assert infonce(eye[:4], eye[:4], eye[4:]).item() == pytest.approx(math.log(1+4*math.exp(-5)))
    assert infonce(torch.ones(4, 8), torch.ones(4, 8), torch.ones(3, 8)).item() == pytest.approx(math.log(4))
    torch.testing.assert_close((infonce(q, k)+infonce(k, q))/2, dense_infonce(q[:, None], k[:, None], temperature=.2))
    loop = torch.stack([infonce(q[b:b+1], k[b:b+1], k, torch.arange(6) != b) for b in range(6)]).mean()
    torch.testing.assert_close(infonce(q, k), loop)
    with pytest.raises(ValueError, match='Use a larger batch, or a Queue'): infonce(q[:1], k[:1])


def test_infonce_with_a_queue_is_lightlys():
    ref = pytest.importorskip('lightly.loss').NTXentLoss(temperature=.2, memory_bank_size=(10, 8))
    bank, q, k = ref.memory_bank.bank.clone(), randn(6, 8), randn(6, 8, seed=1)
    torch.testing.assert_close(infonce(q, k, bank), ref(q, k))


def test_queue_is_normalised_along_features():
    queue = Queue(7, 8)
    queue.enqueue(100*randn(5, 8))
    torch.testing.assert_close(queue.keys.norm(dim=1), queue.real.float())
    queue.enqueue(randn(5, 8, seed=1).half())
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(7))


def test_queue_slots_without_a_key_are_never_negatives():
    q, k, queue = randn(6, 8), randn(6, 8, seed=1), Queue(50, 8)
    assert infonce(q, k, queue.keys, queue.real) == 0
    queue.enqueue(OLD)
    torch.testing.assert_close(infonce(q, k, queue.keys, queue.real), infonce(q, k, OLD))


@given(st.integers(1, 9), st.lists(st.integers(1, 25), min_size=1, max_size=8))
@settings(deadline=None, max_examples=30)
def test_queue_keeps_the_latest_keys_whatever_the_batch_size(size, batches):
    queue, plain, n = Queue(size, 2), [], 0
    for b in batches:
        angle = torch.arange(n, n+b)*.01
        queue.enqueue(torch.stack([angle.cos(), angle.sin()], -1))
        plain, n = [*plain, *angle.tolist()][-size:], n+b
    held = torch.atan2(*queue.keys[queue.real].T.flip(0))
    torch.testing.assert_close(held.sort().values, torch.tensor(plain).sort().values)
    assert queue.at.item() == n % size and len(queue) == size


def test_queue_resumes_to_the_bit_and_takes_no_host_value():
    a, b = Queue(7, 8), Queue(7, 8)
    a.enqueue(OLD, torch.arange(10) % 3 > 0)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for x in (a, b): x.enqueue(randn(3, 8))
    assert set(a.state_dict()) == {'keys', 'real', 'at'} and all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))
    with torch.device('meta'): Queue(7, 8).enqueue(torch.zeros(3, 8))                             # a .item() would raise here


def test_keys_may_enter_before_backward():
    queue, w = Queue(7, 8), torch.eye(8).requires_grad_()
    queue.enqueue(OLD)
    loss = infonce(randn(6, 8)@w, randn(6, 8, seed=1), queue.keys, queue.real)
    want, = torch.autograd.grad(loss, w, retain_graph=True)
    queue.enqueue(randn(6, 8, seed=1))
    assert torch.equal(torch.autograd.grad(loss, w)[0], want)


def test_queue_larger_than_the_data_set_is_an_error():
    check_queue(5000, 5000)
    with pytest.raises(ValueError, match='larger than the data set of 5000 tiles.*Use a size of about 500'): check_queue(65536, 5000)


# --- msad

def sensors(B=5, N=9, D=8): return {m: randn(B, N, D, seed=i) for i, m in enumerate(('spot', 's2', 'l8'))}


@pytest.mark.parametrize('negatives', NEGATIVES)
@pytest.mark.parametrize('targets', ['hard', 'soft'])
def test_msad_has_a_gradient(negatives, targets):
    feats = {m: t.requires_grad_() for m, t in sensors().items()}
    heads = {m: randn(8, 4, seed=9).requires_grad_() for m in feats}
    msad({m: feats[m]@heads[m] for m in feats}, negatives=negatives, targets=targets).backward()
    assert all(t.grad.norm() > 0 for t in (*feats.values(), *heads.values()))


def test_msad_gradient_is_the_naive_loops():
    z = {m: t.requires_grad_() for m, t in sensors().items()}
    terms = []
    for s, t in (('spot', 's2'), ('spot', 'l8'), ('s2', 'l8')):
        for i in range(9):
            a, b = (F.normalize(z[m][:, i], dim=-1) for m in (s, t))
            y = ((a@a.T+b@b.T)/2/.07).softmax(-1).detach()
            terms += [F.cross_entropy(l/.07, y, label_smoothing=.3) for l in (a@b.T, b@a.T)]
    loop, ours = torch.stack(terms).mean(), msad(z, targets='soft', label_smoothing=.3)
    torch.testing.assert_close(ours, loop)
    for g, w in zip(torch.autograd.grad(ours, list(z.values())), torch.autograd.grad(loop, list(z.values()))): torch.testing.assert_close(g, w)


@pytest.mark.parametrize('kw', [{}, {'targets': 'soft'}, {'label_smoothing': .3}, {'targets': 'soft', 'label_smoothing': .3}], ids=str)
def test_msad_closed_forms_and_invariances(kw):
    z, order = sensors(), torch.tensor([3, 0, 4, 1, 2])
    assert msad({m: torch.ones(5, 9, 8) for m in z}, **kw).item() == pytest.approx(math.log(5), rel=1e-6)
    torch.testing.assert_close(msad({m: z[m][order] for m in reversed(z)}, **kw), msad(z, **kw))
    torch.testing.assert_close(msad({m: (i+1)*10*t for i, (m, t) in enumerate(z.items())}, **kw), msad(z, **kw))
    if not kw: assert msad({m: z['s2'] for m in z}, temperature=1e-3).item() == pytest.approx(0, abs=1e-6)


def test_published_msad_is_ours_with_hard_targets_at_a_thousandth():
    z = {m: 32*F.normalize(t, dim=-1) for m, t in sensors(D=1024).items()}
    for lam in (.3, 0.): torch.testing.assert_close(msad_loop(z, label_smoothing=lam), msad(z, temperature=1/1024, label_smoothing=lam), rtol=1e-4, atol=1e-4)
    leaf = {m: t.requires_grad_() for m, t in z.items()}
    assert all(g.norm() > 0 for g in torch.autograd.grad(msad_loop(leaf), list(leaf.values())))


def test_msad_uses_places_where_both_sensors_are_real():
    z, v = sensors(), {m: below(.7, 5, 9, seed=i) for i, m in enumerate(('s2', 'l8'))}
    want = [dense_infonce(z['spot'], z['s2'], v['s2']), dense_infonce(z['spot'], z['l8'], v['l8']), dense_infonce(z['s2'], z['l8'], v['s2'] & v['l8'])]
    torch.testing.assert_close(msad(z, v), torch.stack(want).mean())


def test_msad_says_what_is_wrong():
    z = sensors()
    with pytest.raises(ValueError, match=r"'l8': \(5, 4, 8\).*Pool the finer grid"): msad({'spot': z['spot'], 'l8': z['l8'][:, :4]})
    with pytest.raises(ValueError, match='at least two sensors, got spot'): msad({'spot': z['spot']})
    with pytest.raises(ValueError, match="Use 'hard' or 'soft'"): msad(z, targets='x')
    with pytest.raises(ValueError, match="radius=1 is for negatives='position@image'"): msad(z, radius=1)
    with pytest.raises(ValueError, match=r'Say grid=\(rows, columns\)'): msad({m: t[:, :6] for m, t in z.items()}, negatives='position@image', radius=1)


def test_neighbours_are_no_negatives():
    a, b = randn(2, 12, 8), randn(2, 12, 8, seed=1)
    near, n = neighbours((3, 4), 1), {m: F.normalize(t, dim=-1) for m, t in (('a', a), ('b', b))}
    cos = n['a']@n['b'].mT/.07
    want = torch.stack([F.cross_entropy(c.masked_fill(near, -torch.inf).flatten(0, 1), torch.arange(12).repeat(2)) for c in (cos, cos.mT)]).mean()
    torch.testing.assert_close(dense_infonce(a, b, negatives='position@image', radius=1, grid=(3, 4)), want)
    assert near.sum(1)[5] == 8 and near.sum(1)[0] == 3


# --- pixels

def test_focal_l1_loop_and_limits():
    x, y, m = randn(3, 2, 8, 8), randn(3, 2, 8, 8, seed=1), below(.6, 3, 1, 8, 8)
    d = (x-y).abs()[m.expand_as(x)]
    torch.testing.assert_close(focal_l1(x, y, m), (d*(2*(.2*d).sigmoid()-1)).mean())
    for kw in (dict(alpha=1e8), dict(gamma=0)): torch.testing.assert_close(focal_l1(x, y, m, **kw), d.mean())
    assert focal_l1(y+.01, y, m).item() == pytest.approx(.1*.01**2, rel=1e-2)


def test_frequency_loss_without_weight_is_the_squared_error():
    x, y, m = randn(3, 2, 8, 12), randn(3, 2, 8, 12, seed=1), below(.6, 3, 1, 8, 12)
    torch.testing.assert_close(focal_frequency(x, y, m, alpha=0), torch.where(m, x-y, (.001+.999/2)*(x-y)).square().mean())
    torch.testing.assert_close(focal_frequency(x, y, m | True, alpha=0, log=False), F.mse_loss(x, y))
    torch.testing.assert_close(focal_frequency(x, y, m | True, m, alpha=0), (x-y)[m.expand_as(x)].square().mean())


def test_frequency_loss_is_the_published_one_with_the_batch_mean():
    x, y, m = randn(3, 2, 8, 8), randn(3, 2, 8, 8, seed=1), (below(.6, 3, 1, 8, 8)).float()
    f = m+(1-m)*.001
    delta = (torch.fft.fft2(x*f+(.5*x+.5*y)*(1-f), norm='ortho')-torch.fft.fft2(y, norm='ortho')).mean(0)
    w = delta.abs().add(1).log()
    torch.testing.assert_close(focal_frequency(x, y, m.bool(), per_sample=False), (w/w.max()*delta.abs()**2).mean())


def test_frequency_loss_is_per_sample_by_default():
    y = randn(4, 2, 8, 8)
    swapped, m = y[[1, 0, 3, 2]], torch.ones(4, 1, 8, 8).bool()
    assert focal_frequency(swapped, y, m) > .5
    assert focal_frequency(swapped, y, m, per_sample=False) < 1e-10                               # the published form cannot see it
    torch.testing.assert_close(focal_frequency(swapped, y, m), torch.stack([focal_frequency(swapped[i:i+1], y[i:i+1], m[:1]) for i in range(4)]).mean())


def test_frequency_gradient_is_for_hidden_pixels():
    x, y, m = randn(3, 2, 8, 8).requires_grad_(), randn(3, 2, 8, 8, seed=1).requires_grad_(), below(.6, 3, 1, 8, 8)
    g, = torch.autograd.grad(focal_frequency(x, y, m, unmasked_weight=0), x)
    assert torch.equal(g != 0, m.expand_as(x))
    g, h = torch.autograd.grad(focal_frequency(x, y, m), x)[0], m.expand_as(x)
    assert 0 < g[~h].abs().mean() < .01*g[h].abs().mean()
    focal_frequency(x, y, m).backward()
    assert y.grad is None


# --- two processes

WORKER = '''
import sys, torch, torch.distributed as dist
from rs_selfsup.distributed import all_sum
from rs_selfsup.losses.contrastive import Queue, infonce
from rs_selfsup.losses.distillation import byol_loss, centred_softmax, dino_loss, koleo, prototype_loss, sinkhorn, teacher_entropy, update_center
from rs_selfsup.losses.msad import msad
from rs_selfsup.losses.reconstruction import focal_frequency, focal_l1
torch.set_num_threads(1)

def sensors(y): return dict(zip('abc', (y, y.roll(1, -1), y.roll(2, -1)+y)))

QUEUE = Queue(9, 6)
def terms():
    "name -> loss of y (B, N, 6) and validity v (B, N)"
    pictures = lambda y: y[..., None].expand(-1, -1, -1, 4)
    out = {'byol': lambda y, v: byol_loss(y, y.roll(1, -1), v), 'prototype': lambda y, v: prototype_loss(y, y.roll(1, 1).softmax(-1), v),
           'dino': lambda y, v: dino_loss(list(y.unbind(1)), list(y[:, :2].softmax(-1).unbind(1)), v[:, 0]),
           'koleo': lambda y, v: koleo(y[:, 0], v[:, 0]), 'infonce': lambda y, v: infonce(y[:, 0], y[:, 1], mask=v[:, 0]),
           'infonce in pieces': lambda y, v: infonce(y[:, 0], y[:, 1], mask=v[:, 0], chunk=7),
           'queue': lambda y, v: infonce(y[:, 0], y[:, 1], QUEUE.keys, QUEUE.real, v[:, 0]),
           'focal L1': lambda y, v: focal_l1(pictures(y), pictures(y.roll(1, -1)), v[..., None, None])}
    frequency = lambda y, v, s: focal_frequency(pictures(y), pictures(y.roll(1, -1)), v[..., None, None], (v.roll(1, 1) | v)[..., None, None], per_sample=s)
    for s in (True, False): out[f'frequency {s}'] = lambda y, v, s=s: frequency(y, v, s)
    for n in ('batch@position', 'position@image', 'all'):
        for t in ('hard', 'soft'): out[f'msad {n} {t}'] = lambda y, v, n=n, t=t: msad(sensors(y), {'b': v}, n, targets=t, label_smoothing=.1, chunk=50)
    return out

def model():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 6)

def step(net, x, v):
    "All terms: value and gradient each"
    out = {}
    for name, f in terms().items():
        net.zero_grad()
        loss = f(net(x), v)
        loss.backward()
        out[name] = torch.cat([loss.detach().view(1), *[p.grad.flatten() for p in net.parameters()]])
    return out

def state(y, v, part):
    "What all ranks must agree on, and their own rows of what they must not"
    y, v = y[part], v[part]
    queue = Queue(9, 6)
    for i in range(2): queue.enqueue(y[:, i], v[:, i])
    probs = centred_softmax(y, torch.ones(6), .5)
    same = dict(keys=queue.keys, real=queue.real, at=queue.at, centre=update_center(torch.ones(6), y, v),
                entropy=teacher_entropy(probs, v), marginal=teacher_entropy(probs, v, marginal=True))
    return same, dict(sinkhorn=sinkhorn(y, .5), masked=sinkhorn(y, .5, mask=v)*v[..., None])

def batch():
    g = torch.Generator().manual_seed(1)
    v = torch.rand(6, 9, generator=g) > .3
    v[:3, 2] = False                                       # a place that is real on one rank only
    v[0, :2] = True
    return torch.randn(6, 9, 5, generator=g), v

def fill(v):
    g = torch.Generator().manual_seed(3)
    return torch.randn(6, 6, generator=g)

def main(r, store, result):
    dist.init_process_group('gloo', init_method='file://'+store, rank=r, world_size=2)
    x, v = batch()
    part = slice(3*r, 3*r+3)
    QUEUE.enqueue(fill(v)[part])
    out = step(torch.nn.parallel.DistributedDataParallel(model()), x[part], v[part])
    torch.save((out, *state(x[..., [0, 1, 2, 3, 4, 0]], v, part), QUEUE.state_dict()), result)
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
    x, v = ns['batch']()
    ns['QUEUE'].enqueue(ns['fill'](v))
    single = ns['step'](ns['model'](), x, v), *ns['state'](x[..., [0, 1, 2, 3, 4, 0]], v, slice(None)), ns['QUEUE'].state_dict()
    for p in ps:
        err = p.communicate(timeout=300)[1]
        assert p.returncode == 0, err
    return single, [torch.load(d/f'out{r}.pt') for r in (0, 1)]


def test_every_loss_and_gradient_is_the_single_process_one(runs):
    (single, *_), ranks = runs
    for name, want in single.items():
        for got in ranks: torch.testing.assert_close(got[0][name], want, rtol=1e-4, atol=1e-5, msg=lambda m: f'{name}: {m}')
        assert torch.equal(ranks[0][0][name], ranks[1][0][name]), name


def test_centre_sinkhorn_and_entropies_are_the_single_process_ones(runs):
    (_, same, rows, _), ranks = runs
    for name in ('centre', 'entropy', 'marginal'):
        for got in ranks: torch.testing.assert_close(got[1][name], same[name], msg=lambda m: f'{name}: {m}')
    for name, want in rows.items(): torch.testing.assert_close(torch.cat([got[2][name] for got in ranks]), want, msg=lambda m: f'{name}: {m}')


def test_keys_enter_the_queue_once(runs):
    (_, same, _, filled), ranks = runs
    for got in ranks:
        for name in ('keys', 'real', 'at'): assert torch.equal(got[1][name], same[name]) and torch.equal(got[3][name], filled[name]), name
    assert filled['real'].sum() == 6 and filled['at'] == 6                                         # six keys on two ranks: not twelve
    assert len(filled['keys'][filled['real']].unique(dim=0)) == 6
