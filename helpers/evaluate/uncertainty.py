"""How sure scores are: intervals of one system and differences of two, from resampled recordings; McNemar's test.

The clips of a recording are alike, on all devices that recorded it together, so recordings are drawn, not clips: an
interval from clips would be far too narrow. Sources: B. Efron, R. J. Tibshirani, "An Introduction to the Bootstrap",
1993, for percentile intervals; A. C. Davison, D. V. Hinkley, "Bootstrap Methods and Their Application", 1997, section
3.8, for clusters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from datasets.waveforms import Clips
from helpers.metrics import Judged, judge

ROUNDS_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """A score, and the ends of its confidence interval; draws without any clip of a group do not count for it."""

    value: float
    low: float
    high: float


def intervals(
    clips: Clips, logits: Tensor, groups: Mapping[str, Sequence[str]], n_rounds: int = 10_000, level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:  # fmt: skip
    """Confidence intervals of all accuracies and losses that `helpers.metrics.score` gives, by the same keys.

    Args:
        logits: (clip, class).
        groups: names of recording devices by device group.
        n_rounds: draws of as many recordings as there are.
        level: share of the draws inside.
    """
    judged = judge(clips, logits, groups)
    return _intervals(_drawn([judged], clips, n_rounds, seed), [judged], level)


def differences(
    clips: Clips, first: Tensor, second: Tensor, groups: Mapping[str, Sequence[str]], n_rounds: int = 10_000,
    level: float = 0.95, seed: int = 0,
) -> dict[str, Interval]:  # fmt: skip
    """Second minus first of two systems' scores on the same clips, paired: both are drawn the same recordings."""
    judged = [judge(clips, logits, groups) for logits in (first, second)]
    return _intervals(_drawn(judged, clips, n_rounds, seed), judged, level)


def _intervals(drawn: dict[str, np.ndarray], judged: list[Judged], level: float) -> dict[str, Interval]:
    values = [one.scores() for one in judged]
    ends = (50 * (1 - level), 50 * (1 + level))
    found = {}
    for key, draws in drawn.items():
        value = values[-1][key] - (values[0][key] if len(values) == 2 else 0.0)
        low, high = np.nanpercentile(draws, ends)
        found[key] = Interval(value, float(low), float(high))
    return found


def _drawn(judged: list[Judged], clips: Clips, n_rounds: int, seed: int) -> dict[str, np.ndarray]:
    """Each score (round,) of drawn recordings, or the differences of two systems'."""
    names, recording = np.unique(clips.meta.recording[clips.rows].astype(str), return_inverse=True)
    sums = [one.sums(recording, len(names)) for one in judged]  # (recording, sum) each
    rng, parts = np.random.default_rng(seed), []
    for start in range(0, n_rounds, ROUNDS_AT_ONCE):
        n = min(ROUNDS_AT_ONCE, n_rounds - start)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n).astype(np.float64)
        scores = [one.scores_of(times @ own) for one, own in zip(judged, sums, strict=True)]
        parts.append(scores[0] if len(scores) == 1 else {key: scores[1][key] - scores[0][key] for key in scores[0]})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def mcnemar(clips: Clips, first: Tensor, second: Tensor) -> float:
    """Probability, were both systems as good, that they differ in who is right at least as much as here.

    Exact, two-sided, from the clips that one of them gets right and the other wrong. It takes clips for independent,
    which those of a recording are not: for a verdict take the interval of `differences`.
    Source: Q. McNemar, Psychometrika 12, 1947.
    """
    target = clips.scene.cpu()
    right = [(logits.argmax(dim=1) == target).numpy() for logits in (first, second)]
    alone = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    n, k = sum(alone), min(alone)
    if n == 0:
        return 1.0
    # In logarithms: of thousands of clips the terms are far below any float.
    terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    largest = max(terms)
    return min(1.0, 2 * math.exp(largest) * math.fsum(math.exp(term - largest) for term in terms))
