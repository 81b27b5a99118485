"""Losses: closed form, naive loop, limit identity, oracle; float32 under autocast; validity; published defects."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from rs_selfsup.losses.alignment import NEGATIVES, _rows, dense_infonce
from rs_selfsup.losses.core import float32
from rs_selfsup.losses.reconstruction import masked_mse, normalize_targets
from rs_selfsup.losses.redundancy import linear_hsic

TERMS = {**{f'infonce {n}': lambda a, b, v, n=n: dense_infonce(a, b, v, negatives=n) for n in NEGATIVES},
         **{f'hsic {n}': lambda a, b, v, n=n: linear_hsic(a, b, v, normalize=n) for n in ('none', 'width', 'cka')},
         'mse': masked_mse}
terms = pytest.mark.parametrize('f', TERMS.values(), ids=TERMS)


def data(seed=0, B=4, N=9, D=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, D, generator=g), torch.randn(B, N, D, generator=g), torch.rand(B, N, generator=g) > .3


@terms
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_float32_whatever_autocast_does(f, dtype):
    a, b, v = data()
    a, b = a.to(dtype), b.to(dtype)
    x = a.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16): loss = f(x, b, v)
    assert loss.dtype == torch.float32 and torch.equal(loss, f(a.float(), b.float(), v))
    loss.backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all() and x.grad.abs().sum() > 0


@terms
def test_invalid_tokens_may_hold_anything(f):
    a, b, v = data()
    a.requires_grad_()
    loss = f(a, torch.where(v[..., None], b, torch.nan), v)
    loss.backward()
    assert torch.equal(loss, f(torch.where(v[..., None], a, torch.inf), b, v))
    assert a.grad.isfinite().all() and (a.grad[~v] == 0).all() and (a.grad[v] != 0).any()


@terms
def test_nothing_valid_is_zero_with_finite_gradient(f):
    a, b, v = data()
    a.requires_grad_()
    loss = f(a, b, torch.zeros_like(v))
    loss.backward()
    assert loss == 0 and a.grad.isfinite().all()


@terms
def test_zero_tokens_have_finite_gradient(f):
    a, b, v = data()
    z = torch.zeros_like(a).requires_grad_()
    f(z, b, v).backward()
    assert z.grad.isfinite().all()


def test_float32_restores_autocast_and_keeps_doubles():
    f = float32(lambda x: x@x.T)
    with torch.autocast('cpu', torch.bfloat16):
        assert f(torch.ones(2, 2)).dtype == torch.float32
        with pytest.raises(ZeroDivisionError): float32(lambda x: 1/0)(torch.ones(1))
        assert torch.is_autocast_enabled('cpu')
    assert f(torch.ones(2, 2, dtype=torch.float64)).dtype == torch.float64


# --- alignment

def infonce_loop(a, b, v, negatives, tau=.07):
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    places, out = v.nonzero().tolist(), []
    for x, y in ((a, b), (b, a)):
        for i, j in places:
            keys = [(k, m) for k, m in places if negatives == 'all' or (m == j if negatives == 'batch@position' else k == i)]
            if len(keys) > 1: out.append(torch.stack([x[i, j]@y[k] for k in map(tuple, keys)]).div(tau).logsumexp(0)-x[i, j]@y[i, j]/tau)
    return torch.stack(out).mean()


@pytest.mark.parametrize('negatives', NEGATIVES)
@pytest.mark.parametrize('chunk', [1, 30, 2**25])
def test_infonce_is_the_loop_in_pieces_too(negatives, chunk):
    a, b, v = data(1)
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    one, two = dense_infonce(x, b, v, negatives=negatives, chunk=chunk), infonce_loop(y, b, v, negatives)
    one.backward(), two.backward()
    torch.testing.assert_close(one, two), torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize('negatives,k', zip(NEGATIVES, (4, 9, 36)))
def test_infonce_closed_forms(negatives, k):
    same, eye = torch.ones(4, 9, 3), torch.eye(36).view(4, 9, 36)
    assert dense_infonce(same, same, negatives=negatives).item() == pytest.approx(math.log(k), rel=1e-5)
    assert dense_infonce(eye, eye, temperature=.5, negatives=negatives).item() == pytest.approx(math.log(1+(k-1)*math.exp(-2)), rel=1e-5)


def test_infonce_rows_against_lightly():
    NTXentLoss = pytest.importorskip('lightly.loss').NTXentLoss
    z = F.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    real = ~torch.eye(12, dtype=torch.bool)[:, None].transpose(0, 1)
    total = sum(_rows(z[None, i:i+1], z[None], torch.ones(1, 1).bool(), real[0, i][None], torch.tensor([(i+6) % 12]), .1) for i in range(12))
    torch.testing.assert_close(total/12, NTXentLoss(temperature=.1)(z[:6], z[6:]), rtol=1e-4, atol=1e-5)


def test_published_defect_position_alone_solves_negatives_of_the_same_image():
    g = torch.Generator().manual_seed(0)
    code = torch.randn(1, 64, 32, generator=g)
    a, b = (code+.1*torch.randn(16, 64, 32, generator=g) for _ in 'ab')
    assert dense_infonce(a, b, negatives='position@image') < .1*math.log(64)
    assert dense_infonce(a, b) > .95*math.log(16)
    content = torch.randn(16, 64, 32, generator=g)
    assert dense_infonce(a+content, b+content) < .1 < 2 < dense_infonce(a+content, (b+content).roll(1, 0))


def test_published_defect_three_dimensional_tokens_are_taken():
    a, b, _ = data()
    for f in TERMS.values(): assert f(a, b, torch.ones(4, 9, dtype=torch.bool)).ndim == 0


def test_batch_of_one():
    a, b, v = data(B=1)
    with pytest.raises(ValueError, match="needs at least two samples in the batch.*Use a larger batch, or negatives='position@image'"): dense_infonce(a, b)
    assert dense_infonce(a, b, negatives='position@image').isfinite()
    with pytest.raises(ValueError, match='Use one of'): dense_infonce(a, b, negatives='x')


def test_a_place_without_negatives_is_left_out():
    a, b, _ = data(B=3, N=2)
    v = torch.tensor([[True, True], [True, False], [True, False]])
    torch.testing.assert_close(dense_infonce(a, b, v), dense_infonce(a[:, :1], b[:, :1]))


# --- reconstruction

def test_masked_mse_loop_limit_and_closed_form():
    p, t, m = data(2)
    loop = torch.stack([(p[i, j]-t[i, j]).square().mean() for i, j in m.nonzero().tolist()]).mean()
    torch.testing.assert_close(masked_mse(p, t, m), loop)
    torch.testing.assert_close(masked_mse(p, t, torch.ones_like(m)), F.mse_loss(p, t))
    assert masked_mse(t+3, t, m).item() == pytest.approx(9, rel=1e-5)


def test_targets_get_no_gradient_and_only_masked_tokens_do():
    p, t, m = data(3)
    p.requires_grad_(), t.requires_grad_()
    masked_mse(p, t, m).backward()
    assert t.grad is None and torch.equal(p.grad.abs().sum(-1) > 0, m)


@given(st.floats(1e-2, 1e3), st.floats(-50, 50))
@settings(deadline=None, max_examples=20)
def test_normalized_targets_ignore_scale_and_offset(scale, offset):
    t = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).double()
    n = normalize_targets(t*scale+offset)
    torch.testing.assert_close(n, normalize_targets(t), atol=.05, rtol=.01)
    torch.testing.assert_close(n.mean(-1), torch.zeros(2, 3).double(), atol=1e-6, rtol=0)


# --- redundancy

def test_hsic_closed_forms():
    x = torch.randn(200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = (torch.linalg.qr(x-x.mean(0))[0]*199**.5).view(10, 20, 16)
    for n, value in (('none', 16), ('width', 1), ('cka', 1)): assert linear_hsic(white, white, normalize=n).item() == pytest.approx(value)
    assert linear_hsic(white[..., :8], white[..., 8:]).item() == pytest.approx(0, abs=1e-12)


def test_hsic_loop_kernel_form_and_invariances():
    a, b, v = data(4)
    b = b[..., :5]
    x, y = a[v], b[v]
    loop = sum(torch.cov(torch.stack([x[:, i], y[:, j]]))[0, 1]**2 for i in range(8) for j in range(5))
    torch.testing.assert_close(linear_hsic(a, b, v, normalize='none'), loop)
    torch.testing.assert_close(linear_hsic(a, b, v), loop/40**.5)
    H = torch.eye(len(x))-1/len(x)
    K, L = H@(x@x.T)@H, H@(y@y.T)@H
    torch.testing.assert_close(linear_hsic(a, b, v, normalize='cka'), (K*L).sum()/((K*K).sum()*(L*L).sum()).sqrt())
    torch.testing.assert_close(linear_hsic(a+100, 3*b, v), 9*linear_hsic(a, b, v), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="Use 'width'"): linear_hsic(a, b, normalize='x')


def test_published_defect_hsic_does_not_overflow_in_half_precision():
    a = (50*torch.randn(1, 2000, 64, generator=torch.Generator().manual_seed(0))).half()
    assert linear_hsic(a, a, normalize='none').isfinite() and linear_hsic(a, a, normalize='none') > 65504


@pytest.mark.parametrize('name', [n for n in TERMS if n != 'mse'])
def test_gradcheck(name):
    a, b, v = data(5, 3, 4, 3)
    assert torch.autograd.gradcheck(lambda x, y: TERMS[name](x, y, v), (a.double().requires_grad_(), b.double().requires_grad_()))
