"""Intervals and tests of scores against plain loops, SciPy, and simulations of what they promise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from datasets.tau import DEVICE_GROUPS, SCENES
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


def test_scores_of_the_baselines_are_the_published_ones(shared):
    data = torch.load(shared("golden/dcase_baselines/metrics_all_devices.pt"), weights_only=True)
    devices = ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6")
    n = len(data["labels"])
    meta = SimpleNamespace(scenes=SCENES, recording_devices=devices, cities=("city",), recording=np.arange(n))
    device = torch.tensor([devices.index(name) for name in data["devices"]])
    part = Part(meta, np.arange(n), data["labels"], device, 0 * device)
    found = score(part, data["logits"].float(), DEVICE_GROUPS)
    published = data["r25_val"]
    for key, value in published.items():
        name = key.removeprefix("val/")
        kind, _, of = name.partition(".")
        kind = {"acc": "acc", "loss": "loss", "lloss": "loss", "macro_avg_acc": "macro_avg_acc"}.get(kind)
        if kind is None or name == "loss":  # counts; the published loss is a mean of batch means
            continue
        place = of and (of if of in DEVICE_GROUPS else f"device/{of}" if of in devices else f"scene/{of}")
        assert found[f"{kind}/{place}".removesuffix("/")] == pytest.approx(value, rel=1e-5), key
