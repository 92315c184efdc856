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
from helpers.evaluate.scores import Measure, details
from helpers.metrics import judge

ROUNDS_AT_ONCE = 500
# Calibration errors are sums of distances, so chance adds to them, and to draws of recordings once more.
CALIBRATION_ERRORS = ("ece", "ece_adaptive")
CHANCE = "/chance"  # how far chance alone moves them, for their intervals
CURVE = "acc/sure/"  # accuracies by the probability of the answer


@dataclass(frozen=True)
class Interval:
    """A score, and the ends of its confidence interval; draws without any clip of a group do not count for it."""

    value: float
    low: float
    high: float

    def in_percent(self, sign: str = "") -> str:
        """Both ends, in percent; `sign` is + for differences."""
        return f"{100 * self.low:{sign}.2f} .. {100 * self.high:{sign}.2f}"


@dataclass(frozen=True)
class Difference(Interval):
    """Of two systems' scores, with p: the two-sided probability that belongs to the interval.

    But for the rounding of few rounds it is below 1 - `level` where the interval does not hold 0; it is never below
    2 / (rounds + 1).
    """

    p: float


def intervals(
    clips: Clips, logits: Tensor, groups: Mapping[str, Sequence[str]], n_rounds: int = 10_000, level: float = 0.95,
    seed: int = 0, detail: bool = False,
) -> dict[str, Interval]:  # fmt: skip
    """Confidence intervals of all accuracies and losses that `helpers.metrics.score` gives, by the same keys.

    Scores of groups that are in a single recording are left out: nothing tells how much they vary.

    Args:
        logits: (clip, class).
        groups: names of recording devices by device group.
        n_rounds: draws of as many recordings as there are.
        level: share of the draws inside.
        detail: also of each scene on each device, `domain_avg_acc`, confusions and calibration errors, see
            `helpers.evaluate.scores`.
    """
    measures = _measures(clips, logits, groups, detail)
    drawn, (values,) = _drawn([measures], clips, n_rounds, seed)
    found = {key: Interval(values[key], *ends) for key, ends in _ends(drawn, level).items()}
    for key in CALIBRATION_ERRORS:
        if key in found:
            # The lower end is mirrored at the score ("basic" in Davison and Hinkley, 5.2), which takes off what chance
            # has added; and 0 where chance could have made all of it.
            one, chance = found[key], found.pop(key + CHANCE)
            low = 0.0 if one.value <= chance.high else max(0.0, 2 * one.value - one.high)
            found[key] = Interval(one.value, low, one.high)
    return found


def differences(
    clips: Clips, first: Tensor, second: Tensor, groups: Mapping[str, Sequence[str]], n_rounds: int = 10_000,
    level: float = 0.95, seed: int = 0, detail: bool = False,
) -> dict[str, Difference]:  # fmt: skip
    """Second minus first of two systems' scores on the same clips, paired: both are drawn the same recordings.

    Calibration curves are left out: the clips of a bin are others for each system.
    """
    measures = [_measures(clips, logits, groups, detail) for logits in (first, second)]
    drawn, (before, after) = _drawn(measures, clips, n_rounds, seed)
    drawn = {key: draws for key, draws in drawn.items() if not key.startswith(CURVE) and not key.endswith(CHANCE)}
    found = {}
    for key, (low, high) in _ends(drawn, level).items():
        draws = drawn[key][~np.isnan(drawn[key])]
        n_beyond = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
        p = min(1.0, 2 * (n_beyond + 1) / (len(draws) + 1))
        found[key] = Difference(after[key] - before[key], low, high, p)
    return found


def _measures(clips: Clips, logits: Tensor, groups: Mapping[str, Sequence[str]], detail: bool) -> list[Measure]:
    return [judge(clips, logits, groups, cells=detail), *(details(clips, logits) if detail else [])]


def _ends(drawn: Mapping[str, np.ndarray], level: float) -> dict[str, tuple[float, float]]:
    """The percentiles of draws (round,) by key; draws that are NaN do not count, keys without others are left out."""
    found = {}
    for key, draws in drawn.items():
        there = draws[~np.isnan(draws)]
        if len(there):
            low, high = np.percentile(there, (50 * (1 - level), 50 * (1 + level)))
            found[key] = (float(low), float(high))
    return found


def _drawn(
    systems: list[list[Measure]], clips: Clips, n_rounds: int, seed: int
) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Each score (round,) of drawn recordings, or the differences of two systems'; and each system's own scores."""
    names, recording = np.unique(clips.meta.recording[clips.rows].astype(str), return_inverse=True)
    sums = [[measure.sums(recording, len(names)) for measure in measures] for measures in systems]

    def scores(number: int, weights: np.ndarray | None) -> dict[str, np.ndarray]:
        """Of a system, with recordings weighted (..., recording); None: of each alone."""
        found = {}
        for measure, own in zip(systems[number], sums[number], strict=True):
            found |= measure.scores_of(own if weights is None else weights @ own)
        return found

    whole = np.ones(len(names))
    values = [{key: float(value) for key, value in scores(i, whole).items()} for i in range(len(systems))]
    kept = set(values[0])
    for i in range(len(systems)):
        kept &= {key for key, alone in scores(i, None).items() if np.count_nonzero(~np.isnan(alone)) > 1}
    rng, parts = np.random.default_rng(seed), []
    for start in range(0, n_rounds, ROUNDS_AT_ONCE):
        n = min(ROUNDS_AT_ONCE, n_rounds - start)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n).astype(np.float64)
        drawn = [scores(i, times) for i in range(len(systems))]
        parts.append(drawn[0] if len(drawn) == 1 else {key: drawn[1][key] - drawn[0][key] for key in kept})
    order = [key for key in values[0] if key in kept]
    return {key: np.concatenate([part[key] for part in parts]) for key in order}, values


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
