"A run that was really killed, at any step, ends with the bits of the run that nobody disturbed."
import json, os, random, signal, subprocess, sys, time, warnings
from pathlib import Path
import pytest, torch
import toy_pretrain as toy
from rs_selfsup.callbacks import checkpoints, read_checkpoint, read_log
from rs_selfsup.modalities import DataError

SCRIPT = Path(toy.__file__)


pytestmark = pytest.mark.usefixtures("one_thread")


def start(*args, **kw):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)


def whole_run(folder, accumulate=1, workers=0):
    learn = toy.toy_learner(toy.Toy(), workers=workers, every=2)
    learn.fit_pretrain(3, lr=1e-2, accumulate=accumulate, checkpoint_dir=folder, save_every=3, knn=False)
    return learn


def resumed(folder, workers=0):
    learn = toy.toy_learner(toy.Toy(seed=7), workers=workers, every=2)      # other initial weights: all must come from the file
    learn.steps.base = learn.seed = 0
    learn.resume(folder, save_every=3, knn=False)
    return learn


def same_run(a, b, fa, fb):
    for k, v in a.method.state_dict().items(): assert torch.equal(v, b.method.state_dict()[k]), k
    sa, sb = a.opt.opt.state_dict()['state'], b.opt.opt.state_dict()['state']
    assert all(torch.equal(v, sb[i][k]) for i in sa for k, v in sa[i].items())
    assert a.recorder.losses == b.recorder.losses and a.recorder.lrs == b.recorder.lrs
    timed = {'images_per_s', 'data_wait', 'seconds'}
    rows = [[{k: v for k, v in r.items() if k not in timed} for r in read_log(f)] for f in (fa, fb)]
    assert rows[0] == rows[1]
    tables = [[line.rsplit(',', 1)[0] for line in (Path(f) / 'log.csv').read_text().splitlines()] for f in (fa, fb)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize('event,accumulate,workers', [('after_batch', 1, 0), ('after_pred', 4, 2), ('after_step', 2, 0)])
def test_killed_at_a_random_step(tmp_path, event, accumulate, workers):
    whole = whole_run(tmp_path / 'whole', accumulate, workers)
    at = random.randint(4, whole.n_steps - 2)           # another step in every run of the tests
    p = start(tmp_path / 'a', '--kill', event, at, '--accumulate', accumulate, '--workers', workers)
    said = p.communicate(timeout=300)[0]
    assert p.returncode == -signal.SIGKILL, said
    assert 0 < read_checkpoint(tmp_path / 'a')['step'] <= at
    same_run(whole, resumed(tmp_path / 'a', workers), tmp_path / 'whole', tmp_path / 'a')


def test_killed_from_outside(tmp_path):
    whole = whole_run(tmp_path / 'whole')
    p = start(tmp_path / 'a', '--wait')
    while p.poll() is None and len(checkpoints(tmp_path / 'a')) < 2: time.sleep(.01)
    time.sleep(random.random() * .1)
    p.kill(); p.communicate(timeout=60)
    same_run(whole, resumed(tmp_path / 'a'), tmp_path / 'whole', tmp_path / 'a')


def test_killed_while_writing(tmp_path, monkeypatch):
    whole = whole_run(tmp_path / 'whole')

    class Gone(Exception): pass
    def replace(a, b):
        if str(b).endswith('step-00000009.ckpt'): raise Gone('between writing and renaming')
        return rename(a, b)
    rename = os.replace
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(Gone): whole_run(tmp_path / 'a')
    monkeypatch.undo()
    assert list((tmp_path / 'a').glob('.step-*.tmp')) and read_checkpoint(tmp_path / 'a')['step'] == 6
    same_run(whole, resumed(tmp_path / 'a'), tmp_path / 'whole', tmp_path / 'a')
    assert not list((tmp_path / 'a').glob('.*.tmp'))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, number):
    whole = whole_run(tmp_path / 'whole')

    class Press(toy.Callback):
        def after_pred(self):
            if self.training and self.learn.step == 7: os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    learn = toy.toy_learner(toy.Toy(), every=2, cbs=Press())
    with pytest.raises(KeyboardInterrupt, match=r'stopped at step 8 of 18; go on with learn.resume\('):
        learn.fit_pretrain(3, lr=1e-2, checkpoint_dir=tmp_path / 'a', save_every=3, knn=False)
    assert signal.getsignal(number) is before and read_checkpoint(tmp_path / 'a')['step'] == 8
    b = resumed(tmp_path / 'a')
    assert b.recorder.losses == whole.recorder.losses
    assert all(torch.equal(v, b.method.state_dict()[k]) for k, v in whole.method.state_dict().items())


def test_second_ctrl_c_stops_at_once(tmp_path):
    class Press(toy.Callback):
        def after_pred(self):
            if self.training and self.learn.step == 7: os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): toy.toy_learner(cbs=Press()).fit_pretrain(3, checkpoint_dir=tmp_path, knn=False)
    assert signal.getsignal(signal.SIGINT) is before and read_checkpoint(tmp_path)['step'] == 6     # the one after the first epoch


def short(folder, **kw):
    learn = toy.toy_learner(**{k: kw.pop(k) for k in ('bs', 'seed', 'model') if k in kw})
    learn.fit_pretrain(**{**dict(epochs=1, lr=1e-2, checkpoint_dir=folder, save_every=2, knn=False), **kw})
    return learn


def test_cut_short_falls_back_with_a_warning(tmp_path):
    short(tmp_path)
    newest, second = checkpoints(tmp_path)[:2]
    newest.write_bytes(newest.read_bytes()[:len(newest.read_bytes()) // 2])
    with pytest.warns(UserWarning, match=newest.name): assert read_checkpoint(tmp_path)['file'] == str(second)
    for p in checkpoints(tmp_path): p.write_bytes(b'')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(DataError, match='cut short.*older'): read_checkpoint(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self): return print, ('executed',)
    torch.save(dict(format='rs_selfsup.checkpoint', x=Evil()), tmp_path / 'step-00000001.ckpt')
    with pytest.raises(DataError, match='not a checkpoint'): read_checkpoint(tmp_path)
    torch.save(dict(a=1), tmp_path / 'step-00000001.ckpt')
    with pytest.raises(DataError, match='not a checkpoint of this package'): read_checkpoint(tmp_path)


def test_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(DataError, match='no checkpoint'): short(tmp_path, resume=True)
    with pytest.raises(DataError, match='no such'): toy.toy_learner().resume(tmp_path / 'none')
    with pytest.raises(DataError, match='checkpoint_dir'): short(None, resume=True)
    assert short(tmp_path, resume='auto').step == 6                             # nothing there: starts


@pytest.mark.parametrize('change,named', [(dict(epochs=2), 'fit.epochs: 1 in the checkpoint, 2 now'), (dict(bs=2), 'data.batch_size: 4'),
                                          (dict(seed=1), 'seed: 0'),
                                          (dict(lr=1e-3), 'fit.lr: 0.01'), (dict(accumulate=2), 'fit.accumulate: 1')])
def test_other_settings_are_named(tmp_path, change, named):
    short(tmp_path)
    with pytest.raises(DataError, match=named): short(tmp_path, resume=True, **change)


def test_another_model_is_named(tmp_path):
    short(tmp_path)
    with pytest.raises(DataError, match='another model.*encoder.1.running_mean'): short(tmp_path, resume=True, model=toy.Toy(bn=False))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    short(tmp_path)
    with pytest.raises(DataError, match='holds a run already'): short(tmp_path)


def test_newest_are_kept_and_a_finished_run_is_left_alone(tmp_path):
    learn = short(tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ['step-00000006.ckpt', 'step-00000004.ckpt']
    log = (tmp_path / 'log.jsonl').read_text()
    again = toy.toy_learner(toy.Toy(seed=3)); again.seed = again.steps.base = 0
    again.resume(tmp_path, knn=False)
    assert torch.equal(again.method.head.weight, learn.method.head.weight) and (tmp_path / 'log.jsonl').read_text() == log


def test_checkpoint_holds_everything(tmp_path):
    short(tmp_path, resume='auto')
    c = torch.load(checkpoints(tmp_path)[0], weights_only=True)
    assert {'model', 'opt', 'scaler', 'random', 'epoch', 'batch', 'step', 'config', 'package', 'callbacks'} <= set(c)
    assert {k.split('.')[0] for k in c['model']} == {'encoder', 'teacher', 'head', 'scale'}
    assert set(c['random_sizes']) == {'torch', 'cuda', 'numpy', 'python'}
    assert json.loads(json.dumps(c['config'])) == c['config'] and c['config']['seed'] == 0
