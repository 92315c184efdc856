"""Intervals and tests of scores against plain loops, SciPy, and simulations of what they promise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from helpers.evaluate.calibration import reliability
from helpers.evaluate.confusions import confusion_matrix
from helpers.evaluate.scores import class_device_table
from helpers.evaluate.uncertainty import differences, intervals, mcnemar
from helpers.metrics import score

N_SCENES = 4
GROUPS = {"seen": ("a",), "unseen": ("b",)}


def make_clips(n_recordings: int, n_each: int = 10, seed: int = 0) -> SimpleNamespace:
    """A part of a data set: recordings of one scene each, half their clips on either device."""
    rng = np.random.default_rng(seed)
    recording = np.repeat(np.arange(n_recordings), n_each)
    meta = SimpleNamespace(
        scenes=tuple("wxyz"), recording_devices=("a", "b"), cities=("oslo",),
        recording=np.array([f"r{i}" for i in recording], dtype=object),
    )  # fmt: skip
    scene = rng.integers(N_SCENES, size=n_recordings)[recording]
    device = np.arange(len(recording)) % 2
    return Part(meta, np.arange(len(recording)), *(torch.from_numpy(x) for x in (scene, device, 0 * device)))


class Part(SimpleNamespace):
    def __init__(self, meta, rows, scene, device, city):
        super().__init__(meta=meta, rows=rows, scene=scene, recording_device=device, city=city)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> "Part":
        parts = (self.scene, self.recording_device, self.city)
        return Part(self.meta, self.rows[index], *(part[torch.from_numpy(index)] for part in parts))


def answers(clips: Part, skill: float, seed: int) -> torch.Tensor:
    """Logits that are right or wrong for whole recordings, and a little noise."""
    rng = np.random.default_rng(seed)
    _, number = np.unique(clips.meta.recording[clips.rows].astype(str), return_inverse=True)
    right = rng.random(number.max() + 1)[number] < skill
    guess = np.where(right, clips.scene.numpy(), (clips.scene.numpy() + 1) % N_SCENES)
    logits = rng.normal(0, 0.3, (len(clips), N_SCENES))
    logits[np.arange(len(clips)), guess] += 2
    return torch.from_numpy(logits)


def test_intervals_are_those_of_drawn_recordings():
    clips = make_clips(40)
    logits = answers(clips, 0.7, 1)
    found = intervals(clips, logits, GROUPS, n_rounds=300, seed=5)
    plain = score(clips, logits, GROUPS)
    assert set(found) == {key for key in plain if "count" not in key}
    names, number = np.unique(clips.meta.recording.astype(str), return_inverse=True)
    draws = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), size=300)
    by_hand = {key: [] for key in found}
    for times in draws:
        index = np.concatenate([np.repeat(np.flatnonzero(number == i), n) for i, n in enumerate(times)]).astype(int)
        scores = score(clips.take(index), logits[torch.from_numpy(index)], GROUPS)
        for key, values in by_hand.items():
            values.append(scores.get(key, np.nan))
    assert len(names) == 40
    for key, interval in found.items():
        assert interval.value == pytest.approx(plain[key], rel=1e-12)
        low, high = np.nanpercentile(by_hand[key], (2.5, 97.5))
        assert (interval.low, interval.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9)), key


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of systems that get 70 % of all recordings right; intervals from clips would cover it in half of the cases."""
    covered, n = 0, 200
    for seed in range(n):
        clips = make_clips(60, seed=seed)
        one = intervals(clips, answers(clips, 0.7, 1000 + seed), {}, n_rounds=200, seed=seed)["acc"]
        covered += one.low <= 0.7 <= one.high
    assert 0.88 <= covered / n <= 0.99  # 95 %, with percentiles of few recordings


def test_two_systems_are_compared_on_the_same_recordings():
    clips = make_clips(50)
    first = answers(clips, 0.6, 2)
    second = first.clone()
    wrong = first.argmax(dim=1) != clips.scene
    mended = wrong & (torch.arange(len(clips)) % 20 < 10)  # of some recordings
    second[mended] = torch.eye(N_SCENES, dtype=torch.float64)[clips.scene[mended]] * 3
    found = differences(clips, first, second, GROUPS, n_rounds=300)
    a, b = score(clips, first, GROUPS), score(clips, second, GROUPS)
    for key in ("acc", "macro_avg_acc", "loss/unseen"):
        assert found[key].value == pytest.approx(b[key] - a[key])
    assert 0 < found["acc"].low < found["acc"].value < found["acc"].high
    same = differences(clips, first, first, GROUPS, n_rounds=100)["acc"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize(("alone", "both"), [((0, 0), 5), ((3, 9), 10), ((70, 20), 0), ((900, 1000), 50)])
def test_mcnemar_is_the_exact_test(alone, both):
    n = sum(alone) + both
    clips = make_clips(n, 1)
    right = torch.eye(N_SCENES)[clips.scene]
    wrong = right.roll(1, dims=1)
    first, second = right.clone(), right.clone()
    second[: alone[0]] = wrong[: alone[0]]
    first[alone[0] : sum(alone)] = wrong[alone[0] : sum(alone)]
    expected = 1.0 if not sum(alone) else binomtest(min(alone), sum(alone)).pvalue
    assert mcnemar(clips, first, second) == pytest.approx(min(1.0, expected), rel=1e-9)


def test_p_belongs_to_the_interval():
    """Below 5 % where the interval of 95 % does not hold 0; as often as that for systems that are equally good."""
    n_below, n = 0, 200
    for seed in range(n):
        clips = make_clips(60, seed=seed)
        pair = [answers(clips, 0.7, 1000 * i + seed) for i in (1, 2)]
        one = differences(clips, *pair, {}, n_rounds=200, seed=seed)["acc"]
        assert 2 / 201 <= one.p <= 1
        if abs(one.p - 0.05) > 0.02:  # percentiles of 200 draws lie between draws
            assert (one.p < 0.05) == (not one.low <= 0 <= one.high)
        n_below += one.p < 0.05
    assert 0.01 <= n_below / n <= 0.12
    assert differences(clips, pair[0], pair[0], {}, n_rounds=50)["acc"].p == 1


def test_details_have_intervals_of_drawn_recordings():
    clips = make_clips(30, seed=3)
    logits = answers(clips, 0.6, 4)
    found = intervals(clips, logits, GROUPS, n_rounds=120, seed=2, detail=True)
    _, number = np.unique(clips.meta.recording.astype(str), return_inverse=True)
    table, names = class_device_table(clips, logits), clips.meta.scenes
    by_hand: dict[str, list] = {}
    for times in np.random.default_rng(2).multinomial(30, np.full(30, 1 / 30), size=120):
        index = np.concatenate([np.repeat(np.flatnonzero(number == i), n) for i, n in enumerate(times)]).astype(int)
        part, chosen = clips.take(index), logits[torch.from_numpy(index)]
        drawn = class_device_table(part, chosen, all_names=True)
        counts = confusion_matrix(chosen.argmax(1).numpy(), part.scene.numpy(), N_SCENES)
        shares = counts[0] / counts[0].sum() if counts[0].any() else np.full(N_SCENES, np.nan)
        values = {
            "acc/scene/x/device/b": drawn.accuracy.filled(np.nan)[1, 1],
            "domain_avg_acc": drawn.domain_average.mean(),
            "confusion/w/x": shares[1],
            "ece": reliability(chosen, part.scene).error,
        }
        for key, value in values.items():
            by_hand.setdefault(key, []).append(value)
    for key, draws in by_hand.items():
        low, high = np.nanpercentile(draws, (2.5, 97.5))
        if key == "ece":
            low = max(0, 2 * found[key].value - high)  # far from what chance could make of it
        assert (found[key].low, found[key].high) == (pytest.approx(low), pytest.approx(high)), key
    assert found["acc/scene/x/device/b"].value == table.accuracy[1, 1]
    assert found["domain_avg_acc"].value == pytest.approx(table.domain_average.mean())
    assert found["ece_adaptive"].value == pytest.approx(reliability(logits, clips.scene, bins="count").error)
    confused = {key for key in found if key.startswith("confusion/")}
    assert confused == {f"confusion/{true}/{answer}" for true in names for answer in names}
    assert any(key.startswith("acc/sure/") for key in found) and not any(key.endswith("/chance") for key in found)
    pair = differences(clips, logits, answers(clips, 0.8, 5), GROUPS, n_rounds=50, detail=True)
    assert "domain_avg_acc" in pair and not any("sure" in key or "chance" in key for key in pair)


@pytest.mark.parametrize("too_sure", [0.0, 0.1])
def test_intervals_of_the_calibration_error_hold_the_truth(too_sure):
    """Percentiles alone never hold it for a calibrated system, as chance only adds to the error."""
    rng, covered, n, n_recordings = np.random.default_rng(1), 0, 60, 150
    for _ in range(n):
        clips = make_clips(n_recordings)
        sure = np.repeat(rng.uniform(0.4, 0.95, n_recordings), 10)
        right = np.repeat(rng.random(n_recordings), 10) < sure - too_sure
        answer = np.where(right, clips.scene.numpy(), (clips.scene.numpy() + 1) % N_SCENES)
        probabilities = np.repeat(((1 - sure) / (N_SCENES - 1))[:, None], N_SCENES, axis=1)
        probabilities[np.arange(len(sure)), answer] = sure
        one = intervals(clips, torch.from_numpy(np.log(probabilities)), {}, n_rounds=150, detail=True)["ece"]
        covered += one.low <= too_sure <= one.high
    assert covered / n >= 0.85


def test_groups_in_a_single_recording_have_no_interval():
    clips = make_clips(12)
    clips.scene[:10], clips.scene[10:] = 0, clips.scene[10:].clamp_min(1)
    logits = answers(clips, 0.6, 1)
    found = intervals(clips, logits, GROUPS, n_rounds=3, detail=True)  # some groups are in no draw
    assert "acc/scene/w" in score(clips, logits, GROUPS) and "acc" in found
    assert not any("scene/w" in key or "confusion/w" in key for key in found)
    assert all(np.isfinite([one.value, one.low, one.high]).all() for one in found.values())
    assert intervals(clips.take(np.arange(10)), logits[:10], GROUPS, n_rounds=3) == {}
