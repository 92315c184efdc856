"""Calibration against plain loops, SciPy's optimiser, and networks that are as sure as they are right."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from helpers.evaluate.calibration import fit_temperature, reliability


def made(n: int, true_temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (clip, class), and targets drawn from their softmax at a temperature: perfectly calibrated there."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    target = torch.multinomial((logits / true_temperature).softmax(1), 1, generator=generator)[:, 0]
    return logits, target


@pytest.mark.parametrize("bins", ["width", "count"])
def test_bins_are_those_of_a_plain_loop(bins):
    logits, target = made(997, 2.0)
    found = reliability(logits, target, n_bins=10, bins=bins)
    sure, answer = logits.softmax(1).max(1)
    order = sure.argsort(stable=True).tolist()
    groups: dict[int, list[int]] = {}
    for place, i in enumerate(order):
        number = min(int(sure[i] * 10), 9) if bins == "width" else place * 10 // 997
        groups.setdefault(number, []).append(i)
    rows = [groups[number] for number in sorted(groups)]
    assert found.count.tolist() == [len(row) for row in rows]
    np.testing.assert_allclose(found.confidence, [sure[row].mean() for row in rows])
    right = (answer == target).double()
    np.testing.assert_allclose(found.accuracy, [right[row].mean() for row in rows])
    expected = sum(len(row) * abs(sure[row].mean() - right[row].mean()) for row in rows) / 997
    assert found.error == pytest.approx(expected.item())


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(true):
    logits, target = made(20_000, true)
    found = fit_temperature(logits, target)
    best = minimize_scalar(lambda t: F.cross_entropy(logits / t, target).item(), bounds=(0.05, 20), method="bounded")
    assert found == pytest.approx(best.x, rel=1e-3) == pytest.approx(true, rel=0.05)
    assert reliability(logits, target, found).error < 0.015
    if true != 1:
        assert reliability(logits, target).error > 2 * reliability(logits, target, found).error


def test_extremes_end_at_the_bounds():
    logits = torch.eye(3).repeat(4, 1)
    target = torch.arange(3).repeat(4)
    assert fit_temperature(logits, target) == pytest.approx(0.05)  # always right: the surer the better
    assert fit_temperature(logits, target.roll(1)) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="needs clips"):
        reliability(logits[:0], target[:0])
