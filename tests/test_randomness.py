"""Counter-based random numbers: known answers, independence of the batch, statistics."""
import warnings

import torch
from hypothesis import given, settings, strategies as st

from rs_selfsup.randomness import STREAMS, keys, mix, uniform

i64 = st.integers(-2**63, 2**63-1)


def mix_py(x):
    x %= 2**64
    x = (x ^ (x >> 30))*0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27))*0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_splitmix64_known_answer():
    state = torch.tensor(1234567)+torch.arange(1, 4)*(0x9E3779B97F4A7C15-2**64)
    assert [v % 2**64 for v in mix(state).tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(i64, min_size=1, max_size=20))
@settings(deadline=None, max_examples=30)
def test_mix_is_the_unsigned_arithmetic(xs):
    assert [v % 2**64 for v in mix(torch.tensor(xs)).tolist()] == [mix_py(x) for x in xs]


@given(i64, st.integers(0, 10**6), st.lists(st.integers(0, 2**62), min_size=2, max_size=9, unique=True), st.integers(0, 2000))
@settings(deadline=None, max_examples=30)
def test_bits_do_not_depend_on_the_batch(seed, epoch, tiles, stream):
    tiles = torch.tensor(tiles)
    k = keys(seed, epoch, tiles)
    assert k.unique().numel() == len(tiles)
    u = uniform(k, 11, stream)
    assert u.dtype == torch.float32 and (u >= 0).all() and (u < 1).all()
    assert torch.equal(uniform(keys(seed, epoch, tiles.flip(0)), 11, stream).flip(0), u)
    assert torch.equal(uniform(k[1:2], 5, stream), u[1:2, :5])


def chi2_z(u, m=64):
    n = torch.bincount((u.flatten()*m).long(), minlength=m).double()
    return (((n-n.mean())**2/n.mean()).sum()-(m-1)).item()/(2*(m-1))**.5


def test_uniform_across_keys_positions_streams_and_epochs():
    tiles = torch.arange(2000)
    u = uniform(keys(0, 0, tiles), 100, STREAMS['mask'])
    assert abs(chi2_z(u)) < 4 and abs(chi2_z(u[:, :1])) < 4 and abs(chi2_z(u[:1])) < 4
    others = [u.roll(1, 0), u.roll(1, 1), uniform(keys(0, 0, tiles), 100, STREAMS['mask2']), uniform(keys(0, 1, tiles), 100, STREAMS['mask']),
              uniform(keys(1, 0, tiles), 100, STREAMS['mask'])]
    for v in others:
        assert abs(torch.corrcoef(torch.stack([u.flatten(), v.flatten()]))[0, 1]) < 4/u.numel()**.5
        assert abs(chi2_z((u*8).floor()/8+v/8)) < 4                                    # pairs: 8 x 8 cells


def test_no_overflow_warnings_and_distinct_streams():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        uniform(keys(-2**63, 2**40, torch.tensor([2**63-1, -2**63])), 3, 10**9)
    s = sorted(STREAMS.values())
    assert all(b-a >= 100 for a, b in zip(s, s[1:]))
