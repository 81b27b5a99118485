"A tiny method and loader for the tests of callbacks and Learner; run as a script it trains (test_resume, test_ddp)."
import argparse, copy, json, math, os, signal
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch import nn
from torch.nn import functional as F
from rs_selfsup.data.loading import Batch
from rs_selfsup.distributed import gather, global_mean, rank, world
from rs_selfsup.pretrain import PretrainLearner


class Toy(nn.Module):
    "BatchNorm buffers, a frozen parameter, dropout, two loss terms, five bands"
    def __init__(self, seed=0, bn=True, dropout=.2):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Conv2d(5, 8, 3), nn.BatchNorm2d(8) if bn else nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                     nn.Linear(8, 6))
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.head, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(()), requires_grad=False)
        self.weights, self.dropout, self.seen_epochs, self.dtypes = dict(match=1., even=.5), dropout, [], set()
    def set_epoch(self, epoch): self.seen_epochs.append(epoch)
    def features(self, batch, which='encoder'): return getattr(self, which)(batch.images['ms'])
    def forward(self, batch):
        x = batch.images['ms']
        s = self.head(self.encoder(F.dropout(x, self.dropout, self.training))) * self.scale
        self.dtypes.add(s.dtype)
        with torch.no_grad(): t = self.teacher(x)
        with torch.autocast(x.device.type, enabled=False):
            s, t = s.float(), t.float()
            match = global_mean((s - t - 1).pow(2).sum(), torch.tensor(float(s.numel())))
            return dict(match=match, even=gather(s).mean(0).pow(2).mean())
    @torch.no_grad()
    def update_teacher(self, momentum):
        for t, s in zip(self.teacher.parameters(), self.encoder.parameters()): t.lerp_(s, 1 - momentum)
        for t, s in zip(self.teacher.buffers(), self.encoder.buffers()): t.copy_(s)


class Collate:
    def __call__(self, items):
        i, x = torch.tensor([i for i, _ in items]), torch.stack([x for _, x in items])
        b = Batch({'ms': x}, {'ms': torch.ones(len(i), 1, 8, 8).bool()}, tile=i, label=i % 3, full=True)
        return b, b


class Loader:
    "Deterministic order by (seed, epoch), `skip`, a slice of every global batch per process"
    def __init__(self, x, bs=4, workers=0, shuffle=True, seed=0):
        self.x, self.bs, self.workers, self.shuffle, self.seed, self.epoch, self.at = x, bs, workers, shuffle, seed, 0, 0
    def __len__(self): return math.ceil(len(self.x) / (self.bs * world()))
    def set_epoch(self, epoch): self.epoch = epoch
    def skip(self, k): self.at = k
    def __iter__(self):
        n, (first, self.at) = len(self.x), (self.at, 0)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + self.epoch)) if self.shuffle else torch.arange(n)
        batches = [b.tolist()[rank() * self.bs:][:self.bs] for b in order.split(self.bs * world())][first:]
        data = list(enumerate(self.x))
        yield from torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=self.workers, collate_fn=Collate())


def toy_dls(bs=4, n=22, workers=0, seed=0, valid=True):
    x = torch.randn(n, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoaders(*[Loader(x, bs, workers, seed=seed), Loader(x[:8], 4, shuffle=False)][:1 + valid], device='cpu')


def toy_learner(model=None, cbs=None, seed=0, bs=4, n=22, workers=0, valid=True, every=4):
    learn = PretrainLearner(toy_dls(bs, n, workers, seed, valid), model or Toy(seed), seed=seed, every=every, cbs=cbs, config=dict(model='toy'))
    return quiet(learn)


def quiet(learn):
    from fastai.callback.progress import ProgressCallback
    return learn.remove_cb(ProgressCallback)


def mssdf_learner(store, bs):
    "The real method on real loaders; plain SGD, whose step is as exact as its gradient (Adam turns a gradient of rounding noise into a whole step)"
    from fastai.optimizer import OptimWrapper
    from rs_selfsup.data.loading import dataloaders
    from rs_selfsup.pretrain import MSSDFLearner
    learn = MSSDFLearner(dataloaders(store, bs=bs, device='cpu'), 'vit_tiny_patch16_224', every=1, patch_size=8, embed_dim=24, depth=1, num_heads=3,
                         decoder_depth=1, fusion_depth=1)
    learn.opt_func = lambda groups, lr: OptimWrapper(opt=torch.optim.SGD([dict(params=list(g), weight_decay=0.) for g in groups], lr=lr))
    return quiet(learn)


class Kill(Callback):
    "The process is gone, without a word, at an event of a step"
    order = 300
    def __init__(self, event, step): self.event, self.at = event, step
    def __call__(self, name):
        if name == self.event and self.training and self.learn.step >= self.at: os.kill(os.getpid(), signal.SIGKILL)


def main():
    p = argparse.ArgumentParser()
    p.add_argument('dir'); p.add_argument('--resume', action='store_true'); p.add_argument('--kill', nargs=2)
    p.add_argument('--accumulate', type=int, default=1)
    p.add_argument('--workers', type=int, default=0); p.add_argument('--bs', type=int, default=4)
    p.add_argument('--samples', type=int, default=22)
    p.add_argument('--epochs', type=int, default=3); p.add_argument('--plain', action='store_true')
    p.add_argument('--out'); p.add_argument('--wait', action='store_true')
    p.add_argument('--store')
    a = p.parse_args()
    torch.set_num_threads(1)
    cbs = [Kill(a.kill[0], int(a.kill[1]))] if a.kill else []
    if a.store: learn = mssdf_learner(a.store, a.bs)
    else: learn = toy_learner(Toy(bn=not a.plain, dropout=0. if a.plain else .2), bs=a.bs, n=a.samples, workers=a.workers, valid=not a.plain, every=2)
    if a.wait: learn.add_cb(Slow())
    how = dict(cbs=cbs, save_every=3, knn=False)
    if a.resume: learn.resume(a.dir, **how)
    else: learn.fit_pretrain(a.epochs, lr=1e-2, accumulate=a.accumulate, checkpoint_dir=a.dir, **how)
    if a.out:
        torch.save(dict(model=learn.method.state_dict(), opt=learn.opt.opt.state_dict(), losses=torch.tensor(learn.recorder.losses)), f'{a.out}.{rank()}')
        with open(f'{a.out}.{rank()}.json', 'w') as f: json.dump([r for r in learn.recorder.log_rows if r['kind'] == 'step'], f)


class Slow(Callback):
    def after_batch(self):
        import time
        time.sleep(.05)


if __name__ == '__main__': main()
