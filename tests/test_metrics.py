"""Metrics: 1,000 random cases of each task against its reference; ties, duplicates, empty classes; streams, merging, two processes; misuse."""
import contextlib
import io
import math
import multiprocessing
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import cohen_kappa_score

from rs_selfsup.metrics import (ChangeMetrics, ClassificationMetrics, DepthMetrics, DetectionMetrics, MultilabelMetrics,
                                SegmentationMetrics, SemanticChangeMetrics, rotated_iou)
from rs_selfsup.modalities import DataError

CASES = 1000


def close(got, want, where, tol=1e-12):
    for k, v in want.items():
        assert got[k] == pytest.approx(float(v), rel=tol, abs=tol, nan_ok=True), (where, k)


def stream(metric, *args):
    "The batch in up to three updates, the last of them of another accumulator that is merged."
    n = len(args[0])
    cuts = sorted({0, n // 3, n // 2, n})
    parts = [[x[i:j] for x in args] for i, j in zip(cuts, cuts[1:])]
    for p in parts[:-1]: metric.update(*p)
    other = object.__new__(type(metric))
    vars(other).update(metric.settings())
    return metric.merge(other.reset().update(*parts[-1])).compute()


def mean(x):
    x = [v for v in x if not math.isnan(v)]
    return sum(x) / len(x) if x else math.nan


def ratio(a, b): return float(a) / float(b) if b else math.nan


# ---- one class per place -------------------------------------------------------------------------------------------------

def by_sets(pred, target, n):
    "OA, F1 and IoU of flat arrays, class by class."
    iou, f1 = [], []
    for c in range(n):
        p, t = pred == c, target == c
        iou.append(ratio((p & t).sum(), (p | t).sum()))
        f1.append(ratio(2 * (p & t).sum(), p.sum() + t.sum()))
    return ratio((pred == target).sum(), len(pred)), f1, iou


def test_classification_is_torchmetrics():
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
    rng = np.random.default_rng(0)
    for case in range(CASES // 2):
        n, b = rng.integers(2, 8), rng.integers(1, 30)
        target = torch.tensor(rng.integers(0, max(1, n - case % 3), b))  # often without the last classes
        scores = torch.tensor(rng.random((b, n)).round(1))  # with ties
        if case % 2: scores = scores.half()
        target[torch.tensor(rng.random(b) < .2)] = -1
        if case % 50 == 0: target[:] = -1
        got = stream(ClassificationMetrics(n), scores, target)
        known = target >= 0
        if not known.any():
            assert all(map(math.isnan, got.values()))
            continue
        args = scores.argmax(1)[known], target[known], int(n)
        close(got, dict(OA=multiclass_accuracy(*args, average='micro'), F1_macro=multiclass_f1_score(*args, average='macro'),
                        F1_micro=multiclass_f1_score(*args, average='micro')), case, 1e-6)


def test_multilabel_is_torchmetrics():
    from torchmetrics.functional.classification import (binary_average_precision, multilabel_accuracy, multilabel_exact_match,
                                                        multilabel_f1_score)
    rng = np.random.default_rng(0)
    for case in range(CASES // 2):
        n, b = int(rng.integers(2, 6)), int(rng.integers(1, 25))
        logits = case % 2 == 1
        scores = torch.tensor(rng.random((b, n)).round(2 if case % 3 else 1))
        if logits: scores = (scores - .5) * 9
        target = torch.tensor(rng.random((b, n)) < rng.choice([0, .1, .5, 1], n)).long()
        if case % 4 == 0: target[torch.tensor(rng.random((b, n)) < .3)] = -1
        if case % 100 == 0: target[:] = -1
        m = MultilabelMetrics(n, logits=logits)
        got = stream(m, scores, target)
        known, prob = target >= 0, scores.sigmoid() if logits else scores
        if not known.any():
            assert all(map(math.isnan, got.values()))
            continue
        yes, true = (prob > .5) & known, target == 1
        rank = torch.unique(scores, return_inverse=True)[1].view(b, n) / 1000  # torch's sigmoid does not keep ties
        ap = [float(binary_average_precision(rank[known[:, c], c], target[known[:, c], c])) if true[:, c].any() else math.nan for c in range(n)]
        if case % 5 == 0: np.testing.assert_allclose(m.average_precision(), ap, atol=1e-6)
        f1 = [ratio(2 * (yes & true)[:, c].sum(), yes[:, c].sum() + true[:, c].sum()) for c in range(n)]
        micro = float(binary_average_precision(rank[known], target[known])) if true.any() else math.nan
        close(got, dict(mAP=mean(ap), mAP_micro=micro, F1_macro=mean(f1)), case, 1e-6)
        close(got, dict(F1_micro=ratio(2 * (yes & true).sum(), yes.sum() + true.sum()), OA=ratio((yes == true)[known].sum(), known.sum())), case)
        if known.all():
            close(got, dict(OA=multilabel_accuracy(prob, target, n, average='micro'), OA_subset=multilabel_exact_match(prob, target, n)), case, 1e-6)
            if yes.any() or true.any(): close(got, dict(F1_micro=multilabel_f1_score(prob, target, n, average='micro')), case, 1e-6)


def maps(rng, case, n):
    "Prediction, truth with 255, validity; the prediction holds anything where it does not count."
    shape = int(rng.integers(1, 5)), int(rng.integers(1, 9)), int(rng.integers(1, 9))
    target, pred = rng.integers(0, max(1, n - case % 3), shape), rng.integers(0, n, shape)
    pred = np.where(rng.random(shape) < .6, target, pred)
    target[rng.random(shape) < .1] = 255
    valid = rng.random((shape[0], 1, *shape[1:])) < rng.choice([.3, .9, 1])
    if case % 40 == 0: target[:] = 255
    if case % 40 == 1: valid[:] = False
    keep = (target != 255) & valid[:, 0]
    return np.where(keep, pred, 77), target, valid, keep


def test_segmentation_is_torchmetrics():
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score, multiclass_jaccard_index
    rng = np.random.default_rng(0)
    for case in range(CASES):
        n = int(rng.integers(2, 8))
        pred, target, valid, keep = maps(rng, case, n)
        got = stream(SegmentationMetrics(n), torch.tensor(pred), torch.tensor(target), torch.tensor(valid))
        p, t = pred[keep], target[keep]
        oa, f1, iou = by_sets(p, t, n)
        close(got, {'mIoU': mean(iou), 'mF1': mean(f1), 'OA': oa, **{f'IoU/{c}': x for c, x in enumerate(iou)}}, case)
        if case % 2 or not len(p): continue
        args = torch.tensor(p), torch.tensor(t), n
        close(got, dict(OA=multiclass_accuracy(*args, average='micro'), mF1=multiclass_f1_score(*args, average='macro')), case, 1e-6)
        theirs = multiclass_jaccard_index(*args, average='none').tolist()
        close(got, {f'IoU/{c}': x for c, x in enumerate(theirs) if not math.isnan(iou[c])}, case, 1e-6)


def test_scores_and_classes_count_alike():
    scores, target = torch.randn(2, 5, 6, 7), torch.randint(5, (2, 6, 7))
    a, b, c = (SegmentationMetrics(5) for _ in range(3))
    a.update(scores, target), b.update(scores.argmax(1), target[:, None]), c.update(scores.argmax(1)[:, None].byte(), target.short())
    assert a.compute() == b.compute() == c.compute()


def test_nan_scores_are_an_error_only_where_they_count():
    scores, target = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 4, 4))
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    scores[0, 1, 2, 2], valid[0, 2, 2] = math.nan, False
    assert SegmentationMetrics(3).update(scores, target, valid).matrix.sum() == 15
    with pytest.raises(DataError, match='is nan'): SegmentationMetrics(3).update(scores, target)


# ---- change --------------------------------------------------------------------------------------------------------------

def test_change_is_torchmetrics():
    from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index, binary_precision, binary_recall
    rng = np.random.default_rng(0)
    for case in range(CASES // 2):
        pred, target, valid, keep = maps(rng, case, 2)
        if case % 7 == 0: target, pred = np.where(keep, 0, target), np.where(keep, pred * (case % 14 == 0), pred)
        got = stream(ChangeMetrics(), torch.tensor(pred), torch.tensor(target), torch.tensor(valid))
        p, t = pred[keep], target[keep]
        oa, f1, iou = by_sets(p, t, 2)
        close(got, dict(F1=f1[1], IoU=iou[1], mIoU=mean(iou), OA=oa, precision=ratio((p & t).sum(), p.sum()), recall=ratio((p & t).sum(), t.sum())), case)
        if case % 2 or not (p | t).any(): continue
        args = torch.tensor(p), torch.tensor(t)
        close(got, dict(F1=binary_f1_score(*args), IoU=binary_jaccard_index(*args)), case, 1e-6)
        if p.any() and t.any(): close(got, dict(precision=binary_precision(*args), recall=binary_recall(*args)), case, 1e-6)


@pytest.mark.filterwarnings('ignore')  # the reference divides 0 by 0 and says so
def test_sek_is_cohens_kappa_without_the_unchanged():
    rng = np.random.default_rng(0)
    for case in range(CASES // 2):
        n, shape = int(rng.integers(2, 8)), (2, int(rng.integers(2, 4)), 6, 5)
        target, pred = rng.integers(0, n, shape), rng.integers(0, n, shape)
        target[:, rng.random(shape[1:]) < .5] = 0
        pred = np.where(rng.random(shape) < .6, target, pred)
        if case % 50 == 0: pred, target = pred * 0, target * 0
        valid = rng.random(shape[1:]) < (0 if case % 50 == 1 else .9)
        m = SemanticChangeMetrics(n)
        for i in range(shape[1]): m.update(torch.tensor(pred[:, i:i + 1]), list(torch.tensor(target[:, i:i + 1])), torch.tensor(valid[i:i + 1]))
        p, t = pred[:, valid].ravel(), target[:, valid].ravel()
        same, some = ratio(((p == 0) & (t == 0)).sum(), ((p == 0) | (t == 0)).sum()), ratio(((p > 0) & (t > 0)).sum(), ((p > 0) | (t > 0)).sum())
        keep = (p > 0) | (t > 0)
        kappa = cohen_kappa_score(t[keep], p[keep]) if len({*t[keep], *p[keep]}) > 1 else math.nan
        close(m.compute(), dict(SeK=kappa * math.exp(some - 1) if keep.any() else math.nan, mIoU=mean([same, some]), IoU=some,
                                F1=ratio(2 * ((p > 0) & (t > 0)).sum(), (p > 0).sum() + (t > 0).sum())), case, 1e-9)


# ---- height --------------------------------------------------------------------------------------------------------------

def test_depth_is_the_formula():
    from sklearn.metrics import mean_absolute_error, root_mean_squared_error
    rng = np.random.default_rng(0)
    for case in range(CASES):
        shape = int(rng.integers(1, 5)), 1, int(rng.integers(1, 9)), int(rng.integers(1, 9))
        t = rng.normal(10 if case % 2 else 0, 6, shape).astype('float32')
        p = (t * rng.uniform(.5, 2, shape) + rng.normal(0, 1, shape)).astype('float32')
        hole, valid = rng.random(shape), rng.random(shape) < .9
        t[hole < .1], t[(hole > .1) & (hole < .2)], t[(hole > .2) & (hole < .25)] = np.nan, -9999, np.inf
        if case % 40 == 0: t[:] = -9999
        if case % 40 == 1: valid[:] = False
        if case % 40 == 2: t = -np.abs(t)
        keep = np.isfinite(t) & (t != -9999) & valid
        p[~keep] = rng.choice([np.nan, np.inf, 0])
        got = stream(DepthMetrics(-9999, case % 3), torch.tensor(p), torch.tensor(t), torch.tensor(valid))
        x, y = p[keep].astype(float), t[keep].astype(float)
        up = [(a, b) for a, b in zip(x, y) if b > case % 3]
        want = {f'delta{k}': ratio(sum(a > 0 and a < b * 1.25**k and b < a * 1.25**k for a, b in up), len(up)) for k in (1, 2, 3)}
        want['AbsRel'] = mean([abs(a - b) / b for a, b in up])
        want |= dict(RMSE=root_mean_squared_error(y, x), MAE=mean_absolute_error(y, x)) if len(x) else dict(RMSE=math.nan, MAE=math.nan)
        close(got, want, case, 1e-9)


# ---- detection -----------------------------------------------------------------------------------------------------------

def scene(rng, n, rotated):
    """An image's true boxes and detections: on a coarse grid, with ties of scores, duplicates, misses and false ones. Upright boxes are
    whole numbers, so that IoUs tie and meet the thresholds exactly; rotated ones are not, as rounding would decide these cases."""
    def some(k):
        b = np.c_[rng.integers(0, 8, (k, 2)) * 4., rng.integers(1, 6, (k, 2)) * 4.] + (rng.uniform(-.2, .2, (k, 4)) if rotated else 0)
        return np.c_[b, rng.choice([0, .3, np.pi / 2, -1.2, 3], k)] if rotated else np.c_[b[:, :2], b[:, :2] + b[:, 2:]]
    g = int(rng.integers(0, 6))
    boxes, labels = some(g), rng.integers(0, n, g)
    found = rng.integers(0, g, int(rng.integers(0, 9))) if g else np.zeros(0, int)
    shift = rng.integers(-1, 2, (len(found), 2)) + (rng.uniform(-.2, .2, 2) if rotated else 0.)
    near = boxes[found]
    near[:, :2] += shift
    if not rotated: near[:, 2:] += shift * rng.integers(0, 2, (len(found), 1))
    false = some(int(rng.integers(0, 4)))
    b = np.r_[near, false]
    l = np.r_[np.where(rng.random(len(found)) < .9, labels[found], rng.integers(0, n, len(found))), rng.integers(0, n, len(false))]
    return (dict(boxes=torch.tensor(b).float() if not rotated else torch.tensor(b), scores=torch.tensor(rng.random(len(b)).round(1)), labels=torch.tensor(l)),
            dict(boxes=torch.tensor(boxes), labels=torch.tensor(labels)))


def naive_overlap(a, b):
    "Area in common of two rotated boxes: one clipped by the other's edges, corner by corner."
    def corners(r):
        cx, cy, w, h, angle = (float(v) for v in r)
        c, s = math.cos(angle), math.sin(angle)
        return [(cx + x * c - y * s, cy + x * s + y * c) for x, y in ((-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2))]
    poly, clip = corners(a), corners(b)
    for (x0, y0), (x1, y1) in zip(clip, clip[1:] + clip[:1]):
        side = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in poly]
        new = []
        for i in range(len(poly)):
            j = (i + 1) % len(poly)
            if side[i] >= 0: new.append(poly[i])
            if (side[i] >= 0) != (side[j] >= 0):
                t = side[i] / (side[i] - side[j])
                new.append(tuple(u + t * (v - u) for u, v in zip(poly[i], poly[j])))
        poly = new
    return sum(poly[i - 1][0] * y - poly[i - 1][1] * x for i, (x, y) in enumerate(poly)) / 2


def naive_iou(a, b):
    both = naive_overlap(a, b)
    return both / (float(a[2] * a[3]) + float(b[2] * b[3]) - both)


def coco(pred, target, n, rotated, most):
    "pycocotools' AP50, AP75, AP50:95; rotated boxes with the naive IoU in place of its own."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Rotated(COCOeval):
        def computeIoU(self, image, label):
            d = sorted(self._dts[image, label], key=lambda d: -d['score'])[:self.params.maxDets[-1]]
            g = self._gts[image, label]
            return np.array([[naive_iou(x['r'], y['r']) for y in g] for x in d]) if d or g else []

    def rows(image, boxes, labels, scores=None):
        for k, (b, label) in enumerate(zip(boxes.tolist(), labels.tolist())):
            xywh = [0, 0, b[2], b[3]] if rotated else [b[0], b[1], b[2] - b[0], b[3] - b[1]]
            score = {} if scores is None else dict(score=scores[k].item())
            yield dict(image_id=image, category_id=label, bbox=xywh, area=xywh[2] * xywh[3], iscrowd=0, r=np.array(b), **score)

    gt, dt = COCO(), COCO()
    for c, rs in ((gt, [list(rows(i, t['boxes'], t['labels'])) for i, t in enumerate(target)]),
                  (dt, [list(rows(i, p['boxes'], p['labels'], p['scores'])) for i, p in enumerate(pred)])):
        c.dataset = dict(images=[dict(id=i) for i in range(len(pred))], categories=[dict(id=k) for k in range(n)],
                         annotations=[dict(r, id=i + 1) for i, r in enumerate(sum(rs, []))])
        c.createIndex()
    e = (Rotated if rotated else COCOeval)(gt, dt, 'bbox')
    e.params.areaRng, e.params.areaRngLbl, e.params.maxDets = [[0, 1e10]], ['all'], [most]
    e.evaluate(), e.accumulate()
    precision = e.eval['precision'][..., 0, 0]  # (10, 101, n), -1 for a class without truth
    figure = lambda p: p[p > -1].mean() if (p > -1).any() else math.nan
    return {'AP50': figure(precision[0]), 'AP75': figure(precision[5]), 'AP50:95': figure(precision),
            **{f'AP50/{c}': figure(precision[0, :, c]) for c in range(n)}}


@pytest.mark.parametrize('rotated', [False, True], ids=['upright', 'rotated'])
def test_detection_is_pycocotools(rotated):
    pytest.importorskip('pycocotools')
    rng = np.random.default_rng(0)
    for case in range(CASES // 2):
        n, images, most = int(rng.integers(1, 4)), int(rng.integers(1, 5)), 2 if case % 5 == 0 else 100
        pred, target = zip(*(scene(rng, n, rotated) for _ in range(images)))
        with contextlib.redirect_stdout(io.StringIO()): want = coco(pred, target, n, rotated, most)
        close(stream(DetectionMetrics(n, rotated, most), pred, target), want, case, 1e-9)


def test_rotated_iou_is_the_naive_loop():
    rng = np.random.default_rng(0)
    for case in range(100):
        a, b = (np.c_[rng.uniform(0, 50, (4, 2)), rng.uniform(2, 40, (4, 2)), rng.uniform(-4, 4, 4)] for _ in range(2))
        if case % 4 == 0: b = a + rng.choice([0, 1e-15, 1e-12, 1e-9], a.shape)  # edges that coincide, or nearly
        if case % 4 == 1: b = np.c_[a[:, :2], a[:, [3, 2]], a[:, 4] + np.pi / 2]
        want = [[naive_iou(x, y) for y in b] for x in a]
        np.testing.assert_allclose(rotated_iou(a, b), want, atol=1e-9)
        np.testing.assert_allclose(rotated_iou(b, a).T, want, atol=1e-9)


def test_rotated_iou_is_shapely():
    shapely = pytest.importorskip('shapely')
    rng = np.random.default_rng(0)
    boxes = np.c_[rng.uniform(0, 100, (150, 2)), rng.uniform(1, 60, (150, 2)), rng.uniform(-4, 4, 150)]
    u = np.stack([boxes[:, 2:3] / 2 * [-1, 1, 1, -1], boxes[:, 3:4] / 2 * [-1, -1, 1, 1]], -1)
    c, s = np.cos(boxes[:, 4])[:, None], np.sin(boxes[:, 4])[:, None]
    p = shapely.polygons(np.stack([c * u[..., 0] - s * u[..., 1], s * u[..., 0] + c * u[..., 1]], -1) + boxes[:, None, :2])
    both = shapely.area(shapely.intersection(p[:, None], p[None]))
    np.testing.assert_allclose(rotated_iou(boxes, boxes), both / (shapely.area(p)[:, None] + shapely.area(p) - both), atol=1e-11)


def test_upright_is_rotated_by_nothing():
    rng = np.random.default_rng(1)
    for _ in range(20):
        pred, target = zip(*(scene(rng, 2, False) for _ in range(3)))

        def turn(d):
            lo, hi = d['boxes'][:, :2], d['boxes'][:, 2:]
            return {**d, 'boxes': torch.cat([(lo + hi) / 2, hi - lo, lo[:, :1] * 0], 1)}

        want = DetectionMetrics(2).update(pred, target).compute()
        close(DetectionMetrics(2, rotated=True).update([*map(turn, pred)], [*map(turn, target)]).compute(), want, 'upright', 1e-9)


# ---- all of them ---------------------------------------------------------------------------------------------------------

def filled(part):
    "Every metric, with the images of `part`."
    g = torch.Generator().manual_seed(0)
    maps, heights, scores = torch.randint(4, (2, 2, 6, 5, 5), generator=g), torch.rand(2, 6, 5, 5, generator=g)*9, torch.rand(6, 4, generator=g)
    boxes = torch.rand(6, 3, 5, generator=g)*torch.tensor([4., 4., 9., 9., 1.])+1
    a, b = maps[..., part, :, :]
    pred = [dict(boxes=x, scores=torch.tensor([.9, .9, .3]), labels=[0, 1, 0]) for x in boxes[part]]
    true = [dict(boxes=x[:2]+.3, labels=[0, 1]) for x in boxes[part]]
    return [ClassificationMetrics(4).update(scores[part], maps[0, 0, part, 0, 0]), MultilabelMetrics(4).update(scores[part], maps[0, 0, part, 0, :4] > 1),
            SegmentationMetrics(4).update(a[0], b[0]), ChangeMetrics().update(a[0] > 1, b[0] > 1), SemanticChangeMetrics(4).update(a, b),
            DepthMetrics().update(heights[0, part], heights[1, part]), DetectionMetrics(2, rotated=True).update(pred, true)]


METRICS = filled(slice(0, 6))
every = pytest.mark.parametrize('k', range(len(METRICS)), ids=[type(m).__name__ for m in METRICS])


@every
def test_merged_is_whole_and_reset_is_empty(k):
    a, b = filled(slice(0, 2))[k], filled(slice(2, 6))[k]
    before = b.compute()
    close(a.merge(b).compute(), METRICS[k].compute(), k)
    assert b.compute() == before  # the other is left alone
    assert all(map(math.isnan, a.reset().compute().values())) and all(type(v) is float for v in METRICS[k].compute().values())
    with pytest.raises(DataError, match='cannot be merged'): a.merge(METRICS[k - 1])


def worker(r, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=r, world_size=2)
    mine = filled(slice(0, 2) if r == 0 else slice(2, 6))
    before = [m.compute() for m in mine]
    out = [m.synced().compute() for m in mine]
    assert [m.synced().compute() for m in mine] == out and [m.compute() for m in mine] == before
    torch.save(out, folder / f'out{r}')
    dist.destroy_process_group()


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='needs fork')
def test_two_processes_are_one(tmp_path):
    jobs = [multiprocessing.get_context('fork').Process(target=worker, args=(r, tmp_path), daemon=True) for r in (0, 1)]
    for j in jobs: j.start()
    for j in jobs: j.join(120)
    assert [j.exitcode for j in jobs] == [0, 0]
    a, b = (torch.load(tmp_path / f'out{r}') for r in (0, 1))
    assert repr(a) == repr(b)
    for m, got in zip(METRICS, a): close(got, m.compute(), type(m).__name__)


@every
def test_a_plain_install_is_enough(k):
    "pycocotools, shapely and torchmetrics are for the tests alone."
    source = sys.modules[type(METRICS[k]).__module__].__file__
    with open(source, encoding='utf-8') as f: text = f.read()
    assert not any(f'import {n}' in text or f'from {n}' in text for n in ('pycocotools', 'shapely', 'torchmetrics'))


box = dict(boxes=[[0., 0, 4, 4]], scores=[.5], labels=[0])
none = dict(boxes=[], scores=[], labels=[])
square, z = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).long()


@pytest.mark.parametrize('metric, args, said', [
    (SegmentationMetrics(3), (z, z + 3), 'truth has class 3, classes are 0 to 2'),
    (SegmentationMetrics(3, ignore=None), (z, z + 255), 'truth has class 255'),
    (SegmentationMetrics(3), (z + 3, z), 'prediction has class 3'),
    (SegmentationMetrics(3), (z, z - 1), 'truth has class -1'),
    (SegmentationMetrics(3), (z, z[:, :1]), r'shape \(1, 2, 2\), truth of shape \(1, 1, 2\)'),
    (SegmentationMetrics(3), (z, z, z[:, :1] > 0), 'validity of shape'),
    (SegmentationMetrics(3), (z, z, square), 'validity of dtype torch.float32'),
    (SegmentationMetrics(3), (z, square), 'truth of dtype torch.float32'),
    (SegmentationMetrics(3), (square, z), 'Give scores with 3 channels'),
    (ClassificationMetrics(3), (torch.zeros(2, 4), torch.zeros(2).long()), 'for 3 classes'),
    (ClassificationMetrics(3), (torch.tensor([3]), torch.tensor([0])), 'prediction has class 3'),
    (MultilabelMetrics(2), (torch.ones(1, 3), torch.ones(1, 3)), r'Give \(B, 2\)'),
    (MultilabelMetrics(2), (torch.full((1, 2), math.nan), torch.ones(1, 2)), 'is nan'),
    (MultilabelMetrics(2), (torch.full((1, 2), 2.), torch.ones(1, 2)), 'probability 2.0. Give the sigmoid'),
    (MultilabelMetrics(2), (torch.ones(1, 2), torch.full((1, 2), 3)), 'label 3'),
    (ChangeMetrics(), (z + 2, z), 'prediction has class 2'),
    (SemanticChangeMetrics(3), ((z, z), (z, z + 3)), 'truth has class 3'),
    (SemanticChangeMetrics(3), ((z,), (z, z)), '1 maps predicted, 2 true'),
    (DepthMetrics(), (z, square), 'prediction of dtype torch.int64'),
    (DepthMetrics(), (square, z.short()), 'truth of dtype torch.int16. Convert it to metres'),
    (DepthMetrics(), (square, square[:, :1]), 'truth of shape'),
    (DepthMetrics(), (square, square, z[:, :1] > 0), 'validity of shape'),
    (DepthMetrics(), (square + math.nan, square), 'prediction of nan where the truth is known'),
    (DetectionMetrics(1), ([dict(box, boxes=[[4., 4, 0, 0]])], [none]), r'prediction 0: box 0 \[4.0, 4.0, 0.0, 0.0\] has no area.*swap'),
    (DetectionMetrics(1), ([none], [dict(box, boxes=[[4., 4, 4, 9]])]), 'truth 0: box 0.*has no area'),
    (DetectionMetrics(1), ([dict(box, boxes=[[0, 0, math.inf, 4]])], [none]), 'is not finite'),
    (DetectionMetrics(1), ([dict(box, labels=[1])], [none]), 'label 1, classes are 0 to 0'),
    (DetectionMetrics(1), ([dict(box, labels=[.5])], [none]), 'label 0.5'),
    (DetectionMetrics(1), ([dict(box, scores=[.5, .5])], [none]), 'scores of shape'),
    (DetectionMetrics(1), ([dict(box, scores=[math.nan])], [none]), 'a score is nan'),
    (DetectionMetrics(1), ([box], []), 'predictions of 1 images, truth of 0'),
    (DetectionMetrics(1), ([{}], [none]), "has no 'boxes'"),
    (DetectionMetrics(1, rotated=True), ([box], [none]), r'Give \(n, 5\)'),
    (DetectionMetrics(1, rotated=True), ([dict(box, boxes=[[0., 0, 4, -4, 0]])], [none]), 'has no area'),
    (DetectionMetrics(1, rotated=True), ([dict(box, boxes=[[0., 0, 4, 4, 90]])], [none]), 'Angles are in radians'),
])
def test_misuse_is_named_and_counts_nothing(metric, args, said):
    with pytest.raises(DataError, match=said): metric.update(*args)
    assert all(map(math.isnan, metric.compute().values()))


@pytest.mark.cuda
def test_on_the_device_as_on_the_cpu():
    scores, target, heights = torch.randn(2, 5, 32, 32), torch.randint(5, (2, 32, 32)), torch.rand(2, 2, 1, 32, 32) * 9
    gpu = lambda *x: [t.cuda() for t in x]
    valid = target > 0
    assert SegmentationMetrics(5).update(*gpu(scores, target, valid)).compute() == SegmentationMetrics(5).update(scores, target, valid).compute()
    assert SegmentationMetrics(5).update(scores.cuda(), target, valid).matrix.sum() == valid.sum()
    close(DepthMetrics().update(*gpu(*heights)).compute(), DepthMetrics().update(*heights).compute(), 'depth', 1e-9)
