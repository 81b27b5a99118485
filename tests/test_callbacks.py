"Callbacks of the pre-training loop, on a toy with BatchNorm, frozen parameters, an odd last batch and five bands."
import json, math, signal, warnings
import numpy as np, pandas as pd, pytest, torch
import toy_pretrain as toy
from fastai.callback.core import Callback, CancelFitException
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from rs_selfsup.callbacks import (ClipGrad, CollapseMonitor, CollapseWarning, FullCheckpoint, GradAccumulate, Precision, RunLog, WarmupCosine, checkpoints,
    cosine, differences, feature_health, knn_vote, param_groups, random_state, read_log, seed_all, set_random_state, warmup_cosine)
from rs_selfsup.modalities import DataError


class Spy(Callback):
    "Calls `f` at an event"
    order = 150
    def __init__(self, event, f): self.event, self.f = event, f
    def __call__(self, name):
        if name == self.event: self.f(self.learn)


# ---- schedules
@given(st.integers(2, 500), st.floats(0, .9), st.floats(1e-6, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_schedule_rises_falls_and_stays_in_bounds(total, warmup, peak, share):
    v = [warmup_cosine(k, total, peak, peak * share, warmup) for k in range(total)]
    up = int(round(total * warmup))
    assert all(a < b for a, b in zip(v[:up], v[1:up])) and all(a >= b for a, b in zip(v[up:], v[up + 1:]))
    assert max(v) <= peak * (1 + 1e-9) and min(v) >= 0 and v[0] > 0          # the first step is not wasted
    if up < total - 1: assert v[-1] == pytest.approx(peak * share)


def test_schedules_reach_the_optimiser_once_per_step_and_are_undone():
    seen = []
    learn = toy.toy_learner(cbs=Spy('after_step', lambda l: seen.append([(g['lr'], g['weight_decay']) for g in param_groups(l.opt)])))
    learn.create_opt()
    old = [(g['lr'], g['weight_decay']) for g in param_groups(learn.opt)]
    learn.fit(2, cbs=[WarmupCosine(.1, .01, .25, (.05, .2)), GradAccumulate(2)])
    want = [(warmup_cosine(k, 6, .1, .01, .25), cosine(k, 6, .05, .2)) for k in range(6)]
    assert [s[0] for s in seen] == want and all(s[1][1] == 0 for s in seen)          # vectors never decay
    assert [(g['lr'], g['weight_decay']) for g in param_groups(learn.opt)] == old


# ---- teacher
def test_teacher_follows_after_the_step_with_its_buffers():
    learn = toy.toy_learner()
    learn.teacher_ema.momentum = (.5, 1.)
    want, ks = {}, []
    def before(l): want.update(teacher={k: v.clone() for k, v in l.method.teacher.state_dict().items()})
    def after(l):
        ks.append(m := cosine(l.step - 1, l.n_steps, .5, 1.))
        for k, t in l.method.teacher.state_dict().items():
            s = l.method.encoder.state_dict()[k]
            torch.testing.assert_close(t, s if 'running' in k or 'num' in k else m * want['teacher'][k] + (1 - m) * s)
    learn.fit(2, cbs=[Spy('before_step', before), Spy('after_step', after)])
    assert len(ks) == 12 and ks[-1] == 1.


@pytest.mark.parametrize('n', [1, 2, 4, 6])
def test_one_step_of_everything_per_accumulated_group(n):
    moved = []
    model = toy.Toy()
    model.update_teacher, move = lambda m: (moved.append(m), move(m)), model.update_teacher
    learn = toy.toy_learner(model)
    learn.fit(2, cbs=GradAccumulate(n))
    assert learn.step == learn.n_steps == len(moved) == 2 * math.ceil(6 / n)


def test_accumulated_gradient_is_the_mean_and_nothing_is_lost():
    grads = []
    learn = toy.toy_learner(toy.Toy(bn=False, dropout=0.), n=24)
    learn.fit(1, lr=0., cbs=[GradAccumulate(3), Spy('after_backward', lambda l: grads.append(l.method.head.weight.grad.clone()))])
    # lr is 0, so the single batches can be computed afterwards
    single = []
    learn.dls.train.set_epoch(0)
    for b, _ in learn.dls.train:
        learn.model.zero_grad(); learn.loss_func(learn.model(b)).backward()
        single.append(learn.model.head.weight.grad.clone())
    torch.testing.assert_close(grads[2], sum(single[:3]) / 3); torch.testing.assert_close(grads[5], sum(single[3:]) / 3)
    with pytest.raises(DataError): GradAccumulate(0)


def test_accumulation_equals_the_big_batch():
    out = []
    for bs, n in ((8, 1), (4, 2), (2, 4)):
        learn = toy.toy_learner(toy.Toy(bn=False, dropout=0.), bs=bs, n=24)
        learn.method.weights['even'] = 0.                        # compares samples: not a mean over them
        learn.fit(2, lr=1e-2, cbs=[GradAccumulate(n), WarmupCosine(1e-2)])
        out.append({k: v.clone() for k, v in learn.method.state_dict().items()})
    for o in out[1:]:
        for k, v in out[0].items(): torch.testing.assert_close(o[k], v, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_norm():
    norms = []
    def norm(l): norms.append((float(l.grad_norm), float(torch.stack([p.grad.norm() for p in l.method.parameters() if p.grad is not None]).norm())))
    toy.toy_learner().fit(1, cbs=[ClipGrad(.1), Spy('before_step', norm)])
    assert norms and all(b <= .1001 for _, b in norms) and any(a > .1 for a, _ in norms)


# ---- precision
def test_bf16_reaches_the_model_and_not_the_losses():
    model, kinds = toy.Toy(), set()
    learn = toy.toy_learner(model).to_bf16()
    learn.fit(1, cbs=Spy('after_loss', lambda l: kinds.update([l.loss.dtype, *(v.dtype for v in l.pred.values())])))
    assert model.dtypes == {torch.bfloat16, torch.float32} or model.dtypes == {torch.bfloat16}
    assert kinds == {torch.float32} and all(p.dtype == torch.float32 for p in model.parameters()) and not torch.is_autocast_enabled('cpu')
    assert learn.to_fp16().mixed_precision.mode == 'fp16' and len([c for c in learn.cbs if isinstance(c, Precision)]) == 1
    assert 'mixed_precision' not in learn.to_fp32().__dict__


def test_fp16_overflow_skips_optimiser_and_teacher():
    moved = []
    learn = toy.toy_learner().to_fp16()
    learn.method.update_teacher = moved.append
    def spoil(l):
        if l.step == 2: l.method.head.weight.grad[0, 0] = math.inf
    weights = []
    learn.fit(1, cbs=[Spy('after_backward', spoil), Spy('after_batch', lambda l: weights.append(l.method.head.weight.clone()) if l.training else None)])
    assert torch.equal(weights[2], weights[1]) and not torch.equal(weights[3], weights[2])
    assert len(moved) == 5 and learn.step == 6                    # the schedule goes on


def test_scaler_is_resumed(tmp_path):
    class Halt(Callback):
        order = 200
        def after_batch(self):
            if self.learn.step == 5: raise RuntimeError
    learns = []
    for halt in (None, Halt()):
        l = toy.toy_learner().to_fp16(); learns.append(l)
        try: l.fit_pretrain(2, lr=1e-2, checkpoint_dir=tmp_path / str(halt), save_every=4, knn=False, cbs=halt)
        except (RuntimeError, IndexError): l = learns[-1] = toy.toy_learner().to_fp16(); l.resume(tmp_path / str(halt), knn=False)
    c = [torch.load(checkpoints(tmp_path / str(n))[0], weights_only=True) for n in ('None', 'Halt')]
    assert c[0]['scaler']['_growth_tracker'] == c[1]['scaler']['_growth_tracker'] > 0
    assert all(torch.equal(v, learns[1].method.state_dict()[k]) for k, v in learns[0].method.state_dict().items())


# ---- recorder and log
def test_table_has_every_term_and_means_are_right():
    seen = []
    learn = toy.toy_learner()
    terms = lambda pred: {k: float(v.detach()) for k, v in pred.items()}
    look = lambda l: seen.append((l.training, len(l.xb[0]), float(l.loss.detach()), terms(l.pred)))
    learn.fit(1, cbs=Spy('after_batch', look))
    row = dict(zip(learn.recorder.metric_names[1:], learn.final_record))
    for training, prefix in ((True, ''), (False, 'valid_')):
        part = [s[1:] for s in seen if s[0] == training]
        for k in ('match', 'even'): assert row[prefix + k] == pytest.approx(sum(n * t[k] for n, _, t in part) / sum(n for n, *_ in part), rel=1e-5)
        assert row['train_loss' if training else 'valid_loss'] == pytest.approx(sum(n * l for n, l, _ in part) / sum(n for n, *_ in part), rel=1e-5)


def test_no_reading_between_intervals(monkeypatch):
    reads, on = [], []
    learn = toy.toy_learner(every=3)
    for name in ('item', 'tolist', '__float__', '__bool__', 'cpu', 'numpy'):
        f = getattr(torch.Tensor, name)
        def spy(self, *a, _f=f, _n=name, **k):
            if on: reads.append((_n, learn.step))
            return _f(self, *a, **k)
        monkeypatch.setattr(torch.Tensor, name, spy)
    def begin(l):
        if l.training: on.append(1)
    learn.fit(1, cbs=[Spy('before_batch', begin), Spy('after_batch', lambda l: on.clear()), WarmupCosine(1e-3), GradAccumulate(1)])
    fused = {s for n, s in reads}
    assert fused <= {3, 6}, reads


def test_loss_that_is_not_finite_stops_with_its_name():
    learn = toy.toy_learner()
    def spoil(l):
        if l.training and l.step == 2: l.method.head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match='match'): learn.fit(1, cbs=Spy('before_batch', spoil))


def test_log_is_one_row_per_reading_and_tensorboard_gets_them(tmp_path):
    learn = toy.toy_learner(every=4)
    learn.fit(2, cbs=RunLog(tmp_path, tensorboard=True))
    rows = read_log(tmp_path)
    assert rows == json.loads(json.dumps(learn.recorder.log_rows)) and [r['step'] for r in rows if r['kind'] == 'step'] == [4, 6, 10, 12]
    table = pd.read_csv(tmp_path / 'log.csv')
    assert list(table) == list(learn.recorder.metric_names) and len(table) == 2 and np.allclose(table.valid_loss, [v[1] for v in learn.recorder.values])
    assert list((tmp_path / 'tensorboard').iterdir())


# ---- collapse
def forced(kind):
    def f(l):
        last = l.method.encoder[5]
        if kind == 'complete': last.weight.data.mul_(.1); last.bias.data.fill_(1.)
        if kind == 'dimensional': last.weight.data.copy_(1000 * torch.linspace(-1, 1, 6)[:, None] * torch.tensor([1, -1] * 4)); last.bias.data.fill_(1.)
    return Spy('after_step', f)


@pytest.mark.parametrize('kind', ['complete', 'dimensional', None])
def test_collapse_is_named_once(kind, tmp_path):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        toy.toy_learner().fit(3, cbs=[CollapseMonitor(every=2, n=8), RunLog(tmp_path), forced(kind)])
    said = [str(o.message) for o in w if issubclass(o.category, CollapseWarning)]
    events = [r['of'] for r in read_log(tmp_path) if r['kind'] == 'event']
    assert (events == [kind] and said[0].startswith(kind)) if kind else not said and not events


def test_monitor_changes_nothing():
    out = []
    for cbs in ([], [CollapseMonitor(every=1, n=8)]):
        learn = toy.toy_learner(); learn.fit(2, lr=1e-2, cbs=cbs); out.append(learn)
    assert all(torch.equal(v, out[1].method.state_dict()[k]) for k, v in out[0].method.state_dict().items())
    assert out[0].recorder.losses == out[1].recorder.losses


def test_monitor_is_rare_by_default():
    learn, often, default = toy.toy_learner(), CollapseMonitor(every=10, n=8), CollapseMonitor(n=8)      # 6 steps per epoch
    learn.fit(4, cbs=often)
    assert [h[0] for h in often.history] == [0, 10, 20, 24] and all(v[-2] is not None for v in learn.recorder.values)
    learn.fit(1, cbs=default)
    assert [h[0] for h in default.history] == [0, 6]


def test_feature_health_closed_forms():
    d = 16
    simplex = torch.eye(d)
    s, r, u = feature_health(simplex)
    assert r == pytest.approx(d - 1, rel=1e-6) and u == pytest.approx(-4) and s == pytest.approx(math.sqrt(1 - 1 / d))
    s, r, u = feature_health(torch.tensor([[1., 0], [-1, 0]]))
    assert r == pytest.approx(1) and u == pytest.approx(-8)
    s, r, u = feature_health(torch.ones(10, d))
    assert s == 0 and abs(u) < 1e-9 and torch.isfinite(r)
    x = torch.randn(50, d)
    torch.testing.assert_close(feature_health(x), feature_health(x * 7))                      # length does not matter
    q = torch.linalg.qr(torch.randn(d, d))[0]
    torch.testing.assert_close(feature_health(x)[1:], feature_health(x @ q)[1:], rtol=1e-4, atol=1e-4)


# ---- kNN
def test_knn_against_a_loop():
    torch.manual_seed(0)
    x, y, q = torch.randn(40, 5), torch.randint(3, (40,)), torch.randn(9, 5)
    for i, guess in enumerate(knn_vote(x, y, q, k=7, temperature=.2)):
        cos = F.cosine_similarity(q[i], x)
        votes = [sum(math.exp(float(cos[j]) / .2) for j in cos.topk(7).indices if y[j] == c) for c in range(3)]
        assert int(guess) == int(np.argmax(votes))
    assert len(knn_vote(x[:3], y[:3], q, k=20)) == 9                                          # fewer than k


# ---- random states
def test_random_states_come_back():
    seed_all(3, 4); state = random_state()
    a = torch.rand(3), np.random.rand(3), np.random.randn()
    set_random_state({k: v.clone() for k, v in state.items()})
    assert torch.equal(a[0], torch.rand(3)) and (a[1] == np.random.rand(3)).all() and a[2] == np.random.randn()


def test_a_fit_leaves_the_generators_as_they_were():
    torch.manual_seed(5); a = torch.rand(2); torch.manual_seed(5)
    learn = toy.toy_learner(); torch.manual_seed(5); learn.fit(1)
    assert torch.equal(a, torch.rand(2))


# ---- exits
EVENTS = 'before_fit before_train before_batch after_pred before_step after_step after_batch after_train after_epoch'.split()


@pytest.mark.parametrize('error', [CancelFitException, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize('event', EVENTS)
def test_every_exit_restores(tmp_path, event, error):
    def fail(l):
        if l.step >= 3 * (event != 'before_fit'): raise error('x')
    learn = toy.toy_learner().to_bf16()
    learn.create_opt()
    cbs = [WarmupCosine(1e-2, weight_decay=(.05, .2)), ClipGrad(), GradAccumulate(2), CollapseMonitor(), RunLog(tmp_path), FullCheckpoint(tmp_path),
           Spy(event, fail)]
    n, handler, state, logger = len(learn.cbs), signal.getsignal(signal.SIGINT), torch.get_rng_state(), learn.logger
    old = [(g['lr'], g['weight_decay']) for g in param_groups(learn.opt)]
    try: learn.fit(2, lr=old[0][0], cbs=cbs)
    except error: assert error is not CancelFitException
    assert [(g['lr'], g['weight_decay']) for g in param_groups(learn.opt)] == old and len(learn.cbs) == n and learn.logger is logger
    assert signal.getsignal(signal.SIGINT) is handler and torch.equal(torch.get_rng_state(), state)
    assert not torch.is_autocast_enabled('cpu') and type(learn.model) is toy.Toy and cbs[4].files == ()


def test_differences_name_nested_settings():
    assert differences(dict(a=1, b=dict(c=2, d=3)), dict(a=1, b=dict(c=5, e=1))) == ['b.c: 2 in the checkpoint, 5 now',
                                                                                    "b.d: 3 in the checkpoint, '(not set)' now",
                                                                                    "b.e: '(not set)' in the checkpoint, 1 now"]
