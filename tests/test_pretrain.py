"The Learner: real MSSDF on generated tiles, tiny."
import math
import pytest, torch
import toy_pretrain as toy
from rs_selfsup.callbacks import TermRecorder, param_groups, read_log
from rs_selfsup.data.loading import dataloaders
from rs_selfsup.data.synthetic import write_scenes
from rs_selfsup.data.tiles import build_store
from rs_selfsup.methods.mssdf import MSSDF
from rs_selfsup.modalities import DataError
from rs_selfsup.pretrain import MSSDFLearner, bare_loop, default_lr

SMALL = dict(patch_size=8, embed_dim=24, depth=1, num_heads=3, decoder_depth=1, fusion_depth=1)


@pytest.fixture(scope='session')
def store(tmp_path_factory):
    d = tmp_path_factory.mktemp('store')
    return build_store(write_scenes(d / 'scenes', 2, 96, modalities=('rgb', 'dsm'), progress=False), d / 'store', tile=32, splits=(.7, .3, 0), progress=False)


@pytest.fixture
def make(store, tmp_path):
    def f(bs=4, seed=0, workers=0, **kw):
        dls = dataloaders(store, bs=bs, device='cpu', seed=seed, workers=workers, path=tmp_path)
        return toy.quiet(MSSDFLearner(dls, 'vit_tiny_patch16_224', seed=seed, every=2, **{**SMALL, **kw}))
    return f


def test_optimiser_groups_and_default_rate(make):
    learn = make()
    learn.create_opt()
    decay, rest = param_groups(learn.opt)
    assert decay['weight_decay'] == .05 and rest['weight_decay'] == 0 and decay['betas'] == (.9, .95) and decay['fused']
    assert all(p.ndim > 1 for p in decay['params']) and all(p.ndim < 2 for p in rest['params'])
    trained = {id(p) for g in (decay, rest) for p in g['params']}
    assert trained == {id(p) for p in learn.method.parameters() if p.requires_grad} and not any(id(p) in trained for p in learn.method.teacher.parameters())
    assert default_lr(256) == 1.5e-4


@pytest.mark.parametrize('accumulate', [1, 2])
def test_default_rate_counts_accumulation(make, accumulate):
    learn = make()
    learn.fit_pretrain(1, accumulate=accumulate, monitor=False, knn=False)
    assert max(learn.recorder.lrs) == pytest.approx(1.5e-4 * 4 * accumulate / 256)


def test_seed_fixes_everything_and_leaves_the_generator_alone(make):
    torch.manual_seed(1); state = torch.get_rng_state()
    a = make(); a.fit_pretrain(1, lr=1e-3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    b = make(); b.fit_pretrain(1, lr=1e-3)
    assert all(torch.equal(v, b.method.state_dict()[k]) for k, v in a.method.state_dict().items()) and a.recorder.losses == b.recorder.losses
    c = make(seed=1)
    assert not torch.equal(c.method.encoder.vit.blocks[0].mlp.fc1.weight, make().method.encoder.vit.blocks[0].mlp.fc1.weight)


def test_resume_with_real_loaders_and_workers(make, tmp_path):
    class Halt(toy.Callback):
        order = 200
        def after_batch(self):
            if self.learn.step == 4: raise KeyboardInterrupt
    whole = make(workers=1); whole.fit_pretrain(2, lr=1e-3, checkpoint_dir=tmp_path / 'whole', save_every=3)
    part = make(workers=1)
    with pytest.raises(KeyboardInterrupt): part.fit_pretrain(2, lr=1e-3, checkpoint_dir=tmp_path / 'part', save_every=3, cbs=Halt())
    again = make(workers=1); again.resume(tmp_path / 'part')
    assert again.recorder.losses == whole.recorder.losses and [v[:-1] for v in again.recorder.values] == [v[:-1] for v in whole.recorder.values]
    assert all(torch.equal(v, again.method.state_dict()[k]) for k, v in whole.method.state_dict().items())
    for change in (dict(mask_ratio=.5), dict(embed_dim=48), dict(seed=1), dict(bs=2)):
        with pytest.raises(DataError, match='other settings'): make(**change).resume(tmp_path / 'part')


def test_no_fastai_loop_same_weights(make):
    "The bare loop takes the same steps, so it ends with the same weights"
    a, b = make(), make()
    n = 2 * len(a.dls.train)
    a.fit_pretrain(2, monitor=False, knn=False)
    b.dls.train.set_epoch(0)
    b.method.set_epoch(0)
    assert bare_loop(b, n)['images'] == 4 * n
    for k, v in a.method.state_dict().items(): torch.testing.assert_close(b.method.state_dict()[k], v, rtol=1e-5, atol=1e-6)


def test_bf16_losses_are_float32(make):
    learn, kinds = make().to_bf16(), set()
    class See(toy.Callback):
        def after_pred(self): kinds.update(v.dtype for v in self.pred.values())
    learn.fit_pretrain(1, cbs=See())
    assert kinds == {torch.float32} and learn.mixed_precision.mode == 'bf16' and all(map(math.isfinite, learn.recorder.losses))
    with torch.autocast('cpu', torch.bfloat16): raw = [v.dtype for v in learn.method(next(iter(learn.dls.train))[0]).values()]
    assert set(raw) == {torch.float32}                                # the method itself, not fastai's to_float


def test_fastai_conventions(make):
    learn = make(bs=2)
    before = {k: v.clone() for k, v in learn.method.state_dict().items()}
    assert learn.lr_find(num_it=12, show_plot=False).valley > 0
    assert all(torch.equal(v, before[k]) for k, v in learn.method.state_dict().items())
    learn.fit(1, 1e-3)
    assert len(learn.validate()) == len(learn.recorder.metric_names) - 2 and isinstance(learn.recorder, TermRecorder)
    assert learn.show_training_loop is not None and learn.model is learn.method and type(learn.model) is MSSDF


def test_pictures_and_export(make, tmp_path):
    learn = make()
    fig = learn.show_results(max_n=2)
    assert len(fig.axes) == 2 * 3 * 2
    learn.export_encoder(tmp_path / 'enc.safetensors')
    assert (tmp_path / 'enc.safetensors').stat().st_size > 1000


def test_no_validation_set(store, tmp_path):
    dls = dataloaders(store, bs=4, device='cpu', splits=('train',), path=tmp_path)
    learn = toy.quiet(MSSDFLearner(dls, 'vit_tiny_patch16_224', **SMALL))
    learn.fit_pretrain(1, checkpoint_dir=tmp_path / 'run')
    row = dict(zip(learn.recorder.metric_names[1:], learn.final_record))
    assert row['valid_loss'] is None and row['train_loss'] > 0 and row['spread'] > 0
    assert 0 <= row['knn'] <= 1 and len(read_log(tmp_path / 'run')) > 2        # the store has labels all the same


def test_knn_column(make):
    learn = make()
    learn.fit_pretrain(1)
    assert 0 <= dict(zip(learn.recorder.metric_names[1:], learn.final_record))['knn'] <= 1


def test_unknown_encoder_and_settings(make, store, tmp_path):
    dls = dataloaders(store, bs=4, device='cpu', path=tmp_path)
    with pytest.raises(DataError): MSSDFLearner(dls, 'vit_tiny_patch16_2244')
    with pytest.raises((DataError, TypeError), match='mask_rato'): make(mask_rato=.5)
    with pytest.raises(DataError, match='batch of one'): make(bs=1).fit_pretrain(1, knn=False)


def test_old_and_new_run_do_not_mix(make, tmp_path):
    learn = make()
    learn.fit_pretrain(1, checkpoint_dir=tmp_path / 'a')
    with pytest.raises(DataError, match='holds a run already'): learn.fit_pretrain(1, checkpoint_dir=tmp_path / 'a')
    learn.fit_pretrain(1, checkpoint_dir=tmp_path / 'b')
    assert learn.opt.opt.state_dict()['state'][0]['step'] == len(learn.dls.train)       # a fresh optimiser


def test_a_run_that_is_only_resumed_exports_positions_of_its_own_tiles(make, tmp_path):
    learn = make()
    learn.fit_pretrain(1, checkpoint_dir=tmp_path / "run")
    again = make()
    again.resume(tmp_path / "run")  # ended: no step is taken, so no image tells the encoder its size
    a, b = (o.method.encoder.timm_state("rgb", o.method.encoder.sizes["rgb"]) for o in (learn, again))
    assert all(torch.equal(a[k], b[k]) for k in a) and a["pos_embed"].shape == b["pos_embed"].shape
