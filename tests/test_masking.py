"""Adaptive and cross-modal masks: score against the plain loop, statistics of the draw, exact counts, published defects."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rs_selfsup.masking.adaptive import (block_mask, information_score, information_score_loop, information_weights, make_mask, sample_mask,
                                         token_validity)
from rs_selfsup.masking.crossmodal import crossmodal_mask, crossmodal_mask_literal, crossmodal_probability
from rs_selfsup.randomness import STREAMS, keys, uniform

GRIDS = st.tuples(st.integers(1, 8), st.integers(1, 8))


def draws(n, b, stream='mask'):
    return uniform(keys(0, 0, torch.arange(b)), n, STREAMS[stream])


@given(st.integers(1, 5), st.sampled_from([1, 2, 3, 4, 7, 16]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_score_is_the_loop(c, p, gh, gw, seed):
    x = torch.randint(0, 256, (2, c, gh*p, gw*p), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    loop = np.stack([information_score_loop(i, p) for i in x.numpy()])
    np.testing.assert_allclose(information_score(x, p).numpy(), loop, atol=2e-3, rtol=1e-5)
    full = torch.ones(2, 1, gh*p, gw*p, dtype=torch.bool)
    np.testing.assert_allclose(information_score(x, p, full).numpy(), loop, atol=2e-3, rtol=1e-5)


def test_score_matches_scipy_sobel():
    ndimage = pytest.importorskip('scipy.ndimage')
    g = torch.rand(16, 16, dtype=torch.float64)*255
    mag = np.hypot(ndimage.sobel(g.numpy(), 0, mode='mirror'), ndimage.sobel(g.numpy(), 1, mode='mirror')).mean()
    assert information_score(g[None, None], 16).item() == pytest.approx(mag+g.var(correction=0).item(), rel=1e-5)


def test_variance_is_exact_at_the_bright_end():
    x = 250+torch.rand(50, 3, 16, 16)*.5
    loop = np.stack([information_score_loop(i, 16) for i in x.double().numpy()])
    np.testing.assert_allclose(information_score(x, 16).numpy(), loop, atol=2e-3)
    assert (information_score(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), 16) == 0).all()


def test_published_defect_scores_are_not_wrapped():
    "Values are used as they are: a brighter copy scores the same, a stronger one more; nothing is cast to eight bits"
    x = torch.rand(1, 3, 32, 32)*100
    torch.testing.assert_close(information_score(x+150, 16), information_score(x, 16), rtol=1e-3, atol=1e-2)
    assert (information_score(2*x, 16) > 2*information_score(x, 16)).all()


def test_nodata_counts_neither_in_gradient_nor_in_variance():
    x, valid = torch.rand(4, 3, 32, 32)*255, torch.rand(4, 1, 32, 32) > .2
    a = information_score(torch.where(valid, x, 0.), 16, valid)
    for junk in (255., torch.nan, torch.inf): assert torch.equal(a, information_score(torch.where(valid, x, junk), 16, valid))
    flat = torch.where(valid, 40., 255.).expand(4, 3, 32, 32)
    assert (information_score(flat, 16, valid) < 1e-3).all() and (information_score(flat, 16) > 100).all()
    assert (information_score(x, 16, valid & ~valid) == 0).all()


def test_bits_do_not_depend_on_the_batch():
    x = torch.rand(9, 3, 64, 96)*255
    full = information_score(x, 16)
    for s in (slice(0, 1), slice(3, 8), slice(8, 9)): assert torch.equal(information_score(x[s], 16), full[s])


def test_image_not_divisible_by_the_patch():
    for f in (lambda: information_score(torch.zeros(1, 3, 40, 32), 16), lambda: token_validity(torch.ones(1, 1, 40, 32).bool(), 16)):
        with pytest.raises(ValueError, match='40 x 32 px is not divisible by the patch of 16 px. Crop it to 32 x 32'): f()


@given(st.integers(2, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_weights_follow_numpy_percentiles_of_the_valid_tokens(n, seed):
    g = torch.Generator().manual_seed(seed)
    s, ok = torch.rand(3, n, generator=g), torch.rand(3, n, generator=g) < .7
    w = information_weights(s, ok)
    for i in range(3):
        v = s[i][ok[i]].double().numpy()
        if not len(v): continue
        lo, hi = (np.float32(q) for q in np.percentile(v, (20, 80)))
        near = np.minimum(abs(v-lo), abs(v-hi)) < 1e-6                                  # an order statistic on the quantile: rounding decides
        expect = np.where(v < lo, .8, np.where(v > hi, .3, .5)).astype(np.float32)
        assert (near | (w[i][ok[i]].numpy() == expect)).all()
    assert (w[~ok] == 0).all()


@pytest.mark.parametrize('ratio,freq', {.5: (.668, .498, .339), .6: (.770, .601, .427), .75: (.897, .760, .574), .9: (.981, .915, .773)}.items())
def test_published_frequencies(ratio, freq):
    noise, scores = draws(400, 2000), uniform(keys(1, 0, torch.arange(2000)), 400)
    w = information_weights(scores)
    m = make_mask('adaptive', scores, ratio, noise)
    inv = make_mask('inverted', scores, ratio, noise)
    for f, v in zip(freq, (.8, .5, .3)):
        assert m[w == v].float().mean().item() == pytest.approx(f, abs=.005)
        assert inv[w == {.8: .3, .5: .5, .3: .8}[v]].float().mean().item() == pytest.approx(f, abs=.005)


def test_race_is_numpys_sequential_draw():
    w, rng = torch.tensor([[4., 2., 1., 1.]]), np.random.default_rng(0)
    m = sample_mask(w.expand(20000, -1), .5, draws(4, 20000)).float()
    ref = np.zeros((20000, 4))
    for r in ref: r[rng.choice(4, 2, replace=False, p=w[0].numpy()/8)] = 1
    np.testing.assert_allclose(m.mean(0).numpy(), ref.mean(0), atol=.015)
    np.testing.assert_allclose((m.T@m/20000).numpy(), ref.T@ref/20000, atol=.015)


@given(GRIDS, st.floats(0, 1), st.sampled_from(['adaptive', 'inverted', 'random', 'block']), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_exact_count_of_valid_tokens(grid, ratio, kind, share, seed):
    g, n = torch.Generator().manual_seed(seed), grid[0]*grid[1]
    s, noise, ok = torch.rand(4, n, generator=g), torch.rand(4, n, generator=g), torch.rand(4, n, generator=g) < share
    m = make_mask(kind, s, ratio, noise, grid, ok)
    assert m.dtype == torch.bool and m.shape == (4, n)
    assert m.sum(1).tolist() == [int(ratio*k) for k in ok.sum(1).tolist()] and not (m & ~ok).any()
    assert make_mask(kind, s, ratio, noise, grid).sum(1).tolist() == [int(ratio*n)]*4
    assert torch.equal(make_mask(kind, s[1:2], ratio, noise[1:2], grid, ok[1:2]), m[1:2])


def test_samples_are_independent_and_seeded():
    s = torch.zeros(500, 100)
    a, b = (make_mask('random', s, .75, draws(100, 500, k)).float() for k in ('mask', 'mask2'))
    assert torch.equal(a, make_mask('random', s, .75, draws(100, 500)).float())
    for other in (b, a.roll(1, 0)): assert abs(torch.corrcoef(torch.stack([a.flatten(), other.flatten()]))[0, 1]) < 4/50000**.5
    np.testing.assert_allclose(a.mean(0), .75, atol=.1)


def test_blocks_are_blocks_and_bad_kinds_are_named():
    m = block_mask(.5, draws(400, 200), (20, 20)).view(200, 20, 20)
    assert (m[:, 1:] == m[:, :-1]).float().mean() > .8
    with pytest.raises(ValueError, match="Use 'adaptive'"): make_mask('x', None, .5, torch.rand(1, 4))
    with pytest.raises(ValueError, match='does not have the 5 tokens'): block_mask(.5, torch.rand(1, 5), (2, 2))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_published_defect_crossmodal_keeps_the_visible_count(p, ra, rb, seed):
    g = torch.Generator().manual_seed(seed)
    a, b, va, vb = (torch.rand(5, 49, generator=g) < r for r in (ra, rb, .8, .8))
    a, b, noise = a & va, b & vb, torch.rand(5, 49, generator=g)
    new = crossmodal_mask(a, b, p, noise, va, vb)
    assert torch.equal(new.sum(1), b.sum(1)) and not (new & ~vb).any()
    changed = new != b
    assert not (changed & ~(va & vb)).any()
    assert (new[changed] != a[changed]).all()                                # what changes becomes complementary
    assert torch.equal(crossmodal_mask(a, b, 0., noise, va, vb), b)


def test_overlap_falls_with_p():
    a, b = (make_mask('random', None, .75, draws(400, 500, k)) for k in ('mask', 'mask2'))
    for p in (0, .1, .4, .7, 1):
        twice = (~(a | crossmodal_mask(a, b, p, draws(400, 500, 'crossmodal')))).float().mean().item()
        assert twice == pytest.approx(.0625*(1-p), abs=.003)


@pytest.mark.parametrize('p,ratio', [(.1, .775), (.4, .851), (.7, .925)])
def test_literal_rule_has_the_measured_ratio(p, ratio):
    b = make_mask('random', None, .75, draws(400, 2000))
    new = crossmodal_mask_literal(b, p, draws(400, 2000, 'crossmodal'))
    assert new.float().mean().item() == pytest.approx(ratio, abs=.003) and not (b & ~new).any()


def test_schedule():
    assert [round(crossmodal_probability(e), 6) for e in (0, 9, 10, 59, 60, 499)] == [.1, .1, .2, .6, .7, .7]
