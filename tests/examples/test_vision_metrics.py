"""The metrics of examples/vision against plain NumPy and examples worked by hand."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")

from vision.metrics import F1, Accuracy, Depth, Normals, Segmentation, Task, delta_m, delta_p

SHAPE = (2, 6, 8)  # B, H, W


def batches(count=3):
    """Outputs and truths of dense tasks, a share of the pixels without each."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        label = random.integers(-1, 4, SHAPE)
        scores = random.standard_normal((SHAPE[0], 4, *SHAPE[1:]))
        depth = random.random((SHAPE[0], 1, *SHAPE[1:])) + 0.5
        depth[random.random(depth.shape) < 0.3] = 0
        normal, guess = (random.standard_normal((SHAPE[0], 3, *SHAPE[1:])) for _ in range(2))
        normal, guess = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (normal, guess))
        near = random.random(SHAPE) < 0.5
        guess = np.where(near[:, None], normal + 0.15 * guess, guess)
        guess /= np.linalg.norm(guess, axis=1, keepdims=True)
        normal = np.where((random.random(SHAPE) < 0.3)[:, None], 0, normal)
        found.append((scores, label, random.random(depth.shape) + 0.5, depth, guess, normal))
    return found


def filled(meter, pairs):
    for pair in pairs:
        meter.add(*map(torch.from_numpy, pair))
    return list(meter.values().values())


def test_segmentation_is_of_all_pixels_with_a_label():
    pairs = [(scores, label) for scores, label, *_ in batches()]
    said = np.concatenate([scores.argmax(1).ravel() for scores, _ in pairs])
    true = np.concatenate([label.ravel() for _, label in pairs])
    said, true = said[true >= 0], true[true >= 0]
    overlaps = [((said == c) & (true == c)).sum() / ((said == c) | (true == c)).sum() for c in range(4)]
    assert filled(Segmentation(4), pairs) == pytest.approx([np.mean(overlaps), (said == true).mean()])


def test_segmentation_by_hand():
    """One row of four pixels: 0 0 1 and none; said 0 1 1 1. Class 2 is neither there nor said."""
    scores = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 1]]]), 3).movedim(-1, 1).float()
    meter = Segmentation(3)
    meter.add(scores, torch.tensor([[[0, 0, 1, -1]]]))
    assert meter.values() == pytest.approx({"mIoU": (1 / 2 + 1 / 2) / 2, "pixel accuracy": 2 / 3})


@pytest.mark.parametrize("pooled", [True, False])
def test_depth_is_of_pixels_with_a_depth(pooled):
    pairs = [(said, depth) for _, _, said, depth, *_ in batches()]
    errors = [np.abs(said - depth)[depth > 0] for said, depth in pairs]
    relative = [error / depth[depth > 0] for error, (_, depth) in zip(errors, pairs, strict=True)]
    expected = [
        np.concatenate(x).mean() if pooled else np.mean([part.mean() for part in x]) for x in (errors, relative)
    ]
    assert filled(Depth(pooled), pairs) == pytest.approx(expected)


@pytest.mark.parametrize("pooled", [True, False])
def test_normals_are_of_pixels_with_a_normal(pooled):
    pairs = [(guess, normal) for *_, guess, normal in batches()]
    angles = [
        np.degrees(np.arccos(np.clip((guess * normal).sum(1), -1, 1)))[np.abs(normal).sum(1) > 0]
        for guess, normal in pairs
    ]

    def of(x):
        return np.array([x.mean(), np.median(x), *((x < bound).mean() for bound in (11.25, 22.5, 30))])

    expected = of(np.concatenate(angles)) if pooled else np.mean([of(x) for x in angles], 0)
    assert 0 < expected[2] < expected[3] < expected[4] < 1
    assert filled(Normals(pooled), pairs) == pytest.approx(list(expected))


def test_a_batch_without_a_valid_pixel_has_no_say():
    said, depth = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 4.0)
    for pooled in (True, False):
        meter = Depth(pooled)
        meter.add(said, torch.zeros_like(depth))
        assert all(math.isnan(x) for x in meter.values().values())
        meter.add(said, depth)
        assert meter.values() == {"absolute error": 3.0, "relative error": 0.75}


def test_accuracy_and_f1_by_hand():
    accuracy = Accuracy()
    accuracy.add(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    accuracy.add(torch.tensor([[0.8, 0.2]]), torch.tensor([0]))
    assert accuracy.values() == pytest.approx({"accuracy": 2 / 3})
    f1 = F1()  # 2 hits, 1 false alarm, 1 miss: precision 2/3, recall 2/3
    f1.add(torch.tensor([[1.0], [2.0], [0.5]]), torch.tensor([1.0, 1.0, 0.0]))
    f1.add(torch.tensor([[-1.0], [-2.0]]), torch.tensor([1.0, 0.0]))
    assert f1.values() == pytest.approx({"F1": 2 / 3})
    none = F1()
    none.add(torch.tensor([[-1.0]]), torch.tensor([1.0]))
    assert none.values() == {"F1": 0.0}


def test_delta_m_is_over_metrics_and_delta_p_over_tasks():
    tasks = (Task("a", {"x": True, "y": False}), Task("b", {"z": True}))
    base = {"a": {"x": 0.5, "y": 2.0}, "b": {"z": 10.0}}
    metrics = {"a": {"x": 0.6, "y": 1.0}, "b": {"z": 9.0}}  # +20 %, +50 %, -10 %
    assert delta_m(tasks, metrics, base) == pytest.approx(-(20 + 50 - 10) / 3)
    assert delta_p(tasks, metrics, base) == pytest.approx(((20 + 50) / 2 - 10) / 2)
    assert delta_m(tasks, base, base) == delta_p(tasks, base, base) == 0
