"Two gloo processes under torchrun train as one process with the doubled batch does."
import os, subprocess, sys
from pathlib import Path
import pytest, torch
import toy_pretrain as toy
from rs_selfsup.callbacks import checkpoints, read_log

SCRIPT = Path(toy.__file__)


def launch(n, *args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n)] if n > 1 else []
    r = subprocess.run([sys.executable, *command, str(SCRIPT), *map(str, args)], env=env, capture_output=True, text=True, timeout=400)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


def alone(folder, bs, accumulate=1):
    torch.set_num_threads(1)
    learn = toy.toy_learner(toy.Toy(bn=False, dropout=0.), bs=bs, n=24, valid=False, every=2)
    learn.fit_pretrain(2, lr=1e-2, accumulate=accumulate, checkpoint_dir=folder, save_every=3, knn=False)
    return learn


@pytest.mark.parametrize('accumulate', [1, 3])
def test_two_processes_are_one(tmp_path, accumulate):
    one = alone(tmp_path / 'one', 8, accumulate)
    said = launch(2, tmp_path / 'two', '--bs', 4, '--samples', 24, '--epochs', 2, '--plain', '--out', tmp_path / 'out', '--accumulate', accumulate)
    a, b = (torch.load(f'{tmp_path}/out.{r}', weights_only=True) for r in (0, 1))
    for k, v in one.method.state_dict().items():
        torch.testing.assert_close(a['model'][k], v, rtol=1e-5, atol=1e-6)
        assert torch.equal(a['model'][k], b['model'][k])
    torch.testing.assert_close(a['losses'], torch.tensor(one.recorder.losses), rtol=1e-5, atol=1e-6)
    rows = [[r for r in rows if r['kind'] == 'step'] for rows in (one.recorder.log_rows, read_log(tmp_path / 'two'))]
    assert [r['step'] for r in rows[0]] == [r['step'] for r in rows[1]] and len(rows[0])
    for r, s in zip(*rows):
        for k in ('loss', 'match', 'even', 'lr', 'momentum', 'grad_norm'): assert r[k] == pytest.approx(s[k], rel=1e-4), k
    # only one writes: no row twice, one table on the screen, checkpoints with the random states of both
    assert len(read_log(tmp_path / 'two')) == len(one.recorder.log_rows)
    assert said.count('[0, ') == 1
    assert torch.load(checkpoints(tmp_path / 'two')[0], weights_only=True)['random'].shape[0] == 2


def test_two_processes_resume(tmp_path):
    args = ('--bs', 2, '--samples', 12, '--epochs', 2)
    launch(2, tmp_path / 'whole', *args, '--out', tmp_path / 'w')
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(SCRIPT), str(tmp_path / 'a'),
                        *map(str, args), '--kill', 'after_step', '5'], env=env, capture_output=True, text=True, timeout=400)
    assert r.returncode != 0
    launch(2, tmp_path / 'a', '--resume', *args, '--out', tmp_path / 'b')
    for rank in (0, 1):
        w, b = (torch.load(f'{tmp_path}/{o}.{rank}', weights_only=True)['model'] for o in 'wb')
        assert all(torch.equal(v, b[k]) for k, v in w.items())


def test_mssdf_on_two_processes_is_one(tmp_path):
    "Every term and every weight, with the same tiles and the same masks"
    from rs_selfsup.data.synthetic import write_scenes
    from rs_selfsup.data.tiles import build_store
    torch.set_num_threads(1)
    scenes = write_scenes(tmp_path / 'scenes', 2, 96, modalities=('rgb', 'dsm'), progress=False)
    build_store(scenes, tmp_path / 'store', tile=32, splits=(.7, .3, 0), progress=False)
    one = toy.mssdf_learner(tmp_path / 'store', 8)
    one.fit_pretrain(1, lr=1e-2, checkpoint_dir=tmp_path / 'one', save_every=3, knn=False)
    launch(2, tmp_path / 'two', '--bs', 4, '--epochs', 1, '--out', tmp_path / 'out', '--store', tmp_path / 'store')
    two = torch.load(f'{tmp_path}/out.0', weights_only=True)['model']
    rows = [[r for r in read_log(tmp_path / n) if r['kind'] == 'step'] for n in ('one', 'two')]
    assert len(rows[0]) == len(rows[1]) > 3
    for r, s in zip(*rows):
        for k in ('rec', 'align', 'hsic', 'cls', 'loss', 'grad_norm'): assert r[k] == pytest.approx(s[k], rel=2e-4, abs=1e-6), k
    for k, v in one.method.state_dict().items(): torch.testing.assert_close(two[k], v, rtol=1e-4, atol=1e-6)
