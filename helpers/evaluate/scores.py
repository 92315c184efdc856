"""Where a system is right: tables by scene and device, confusions, and sureness; and what intervals need of them.

The plain scores, by scene, device, device group and city, are in `helpers/metrics.py`. Everything here comes from
counts, so a group without clips is left out or masked, never NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from datasets.waveforms import Clips
from helpers.evaluate.calibration import Bins, bins_of


class Measure(Protocol):
    """Scores that follow from sums over clips, which recordings contribute one by one."""

    def sums(self, part: np.ndarray, n_parts: int) -> np.ndarray:
        """Sums (part, column) float64 of the clips of each part; `part` (clip,) numbers them."""

    def scores_of(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (...,) by key, of sums (..., column); NaN where there are no clips for one."""


def accuracy_by(
    clips: Clips, logits: Tensor, kind: Literal["scene", "device", "city"], names: Sequence[str] | None = None,
    absent: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Accuracies of logits (clip, class) by scene, recording device or city.

    dragonsearch's DevAccuracy and CityAccuracy are `kind` device and city with `absent` 0.

    Args:
        names: which, and in which order; None: all that the data set knows.
        absent: of those without clips; None leaves them out.
    """
    codes, known = {
        "scene": (clips.scene, clips.meta.scenes),
        "device": (clips.recording_device, clips.meta.recording_devices),
        "city": (clips.city, clips.meta.cities),
    }[kind]
    codes = codes.cpu().numpy()
    right = np.bincount(codes, _right(clips, logits), len(known))
    count = np.bincount(codes, minlength=len(known))
    found = {name: float(right[i] / count[i]) for i, name in enumerate(known) if count[i]}
    wanted = known if names is None else names
    return {name: found.get(name, absent) for name in wanted if name in found or absent is not None}


@dataclass(frozen=True)
class ClassDeviceTable:
    """Accuracies by scene and recording device.

    Args:
        right, count: (scene, device) int64, clips.
    """

    scenes: tuple[str, ...]
    devices: tuple[str, ...]
    right: np.ndarray
    count: np.ndarray

    @property
    def accuracy(self) -> np.ma.MaskedArray:
        """(scene, device), masked where there are no clips."""
        return np.ma.masked_array(self.right / np.maximum(self.count, 1), self.count == 0)

    def class_average(self, published: bool = False) -> np.ma.MaskedArray:
        """(scene,): means over the devices that have the scene; the published ones take 0 for those without."""
        accuracy = self.accuracy
        return accuracy.filled(0).mean(axis=1) if published else accuracy.mean(axis=1)

    @property
    def domain_average(self) -> np.ma.MaskedArray:
        """(device,): means over the scenes that the device has."""
        return self.accuracy.mean(axis=0)

    def markdown(self, published: bool = False) -> str:
        """As easy_dcase_task1 writes it, in percent; the last cell is the mean of the devices' means.

        Args:
            published: `Class Avg.` divides by the number of devices, also where some have no clip of the scene.
        """
        averages, devices = self.class_average(published), self.domain_average
        rows = [["Class", *self.devices, "Class Avg."], ["---"] * (len(self.devices) + 2)]
        for i, scene in enumerate(self.scenes):
            rows.append([scene, *map(_percent, self.accuracy[i]), _percent(averages[i])])
        rows.append(["Domain Avg.", *map(_percent, devices), _percent(devices.mean())])
        return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def class_device_table(clips: Clips, logits: Tensor, all_names: bool = False) -> ClassDeviceTable:
    """The table of logits (clip, class); scenes and devices that occur, or all that the data set knows."""
    meta, scene, device = clips.meta, clips.scene.cpu().numpy(), clips.recording_device.cpu().numpy()
    n_devices = len(meta.recording_devices)
    shape = (len(meta.scenes), n_devices)
    cell = scene * n_devices + device
    right = np.bincount(cell, _right(clips, logits), shape[0] * shape[1]).astype(np.int64).reshape(shape)
    count = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    rows, columns = np.arange(shape[0]), np.arange(shape[1])
    if not all_names:
        rows, columns = np.flatnonzero(count.any(axis=1)), np.flatnonzero(count.any(axis=0))
    cut = np.ix_(rows, columns)
    names = tuple(meta.scenes[i] for i in rows), tuple(meta.recording_devices[j] for j in columns)
    return ClassDeviceTable(*names, right[cut], count[cut])


def _right(clips: Clips, logits: Tensor) -> np.ndarray:
    return logits.argmax(dim=1).cpu().numpy() == clips.scene.cpu().numpy()


def _percent(value: float) -> str:
    return "N/A" if np.ma.is_masked(value) else f"{100 * value:.1f}"


@dataclass(frozen=True)
class Confusions:
    """Which scene is taken for which, as shares of the true scene: `confusion/<true>/<answer>`.

    Args:
        answers, targets: class numbers (clip,).
    """

    answers: np.ndarray
    targets: np.ndarray
    scenes: tuple[str, ...]

    def sums(self, part: np.ndarray, n_parts: int) -> np.ndarray:
        """Clips (part, true class * answer)."""
        n_classes = len(self.scenes)
        n_cells = n_classes**2
        cell = part * n_cells + self.targets * n_classes + self.answers
        return np.bincount(cell, minlength=n_parts * n_cells).reshape(n_parts, n_cells).astype(np.float64)

    def scores_of(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        n_classes = len(self.scenes)
        counts = sums.reshape(*sums.shape[:-1], n_classes, n_classes)
        n_clips = counts.sum(axis=-1, keepdims=True)
        shares = np.divide(counts, n_clips, out=np.full(counts.shape, np.nan), where=n_clips > 0)
        there = np.unique(self.targets)
        return {
            f"confusion/{self.scenes[i]}/{answer}": shares[..., i, j]
            for i in there
            for j, answer in enumerate(self.scenes)
        }


@dataclass(frozen=True)
class Sureness:
    """The expected calibration error, and accuracies by how sure the system is: `ece`, `acc/sure/<bin>`.

    Args:
        sure: probability of the answer (clip,).
        right: (clip,) bool.
        name: of the error; of the bins too where they are of the same width.
        n_bins, bins: as of `helpers.evaluate.calibration.reliability`; bins of as many clips stay where they are when
            recordings are drawn.
    """

    sure: np.ndarray
    right: np.ndarray
    name: str = "ece"
    n_bins: int = 15
    bins: Bins = "width"

    def sums(self, part: np.ndarray, n_parts: int) -> np.ndarray:
        """Probabilities, right answers and clips (part, 3 * bin)."""
        cell = part * self.n_bins + bins_of(self.sure, self.n_bins, self.bins)
        size = n_parts * self.n_bins
        fields = [np.bincount(cell, values, size) for values in (self.sure, self.right, np.ones(len(cell)))]
        return np.concatenate([field.reshape(n_parts, self.n_bins) for field in fields], axis=1)

    def scores_of(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Beside the scores `<error>/chance`: how far all bins together lie from where those of all clips lie."""
        sure, right, count = np.split(sums, 3, axis=-1)
        gaps = (sure - right) / count.sum(axis=-1, keepdims=True)  # (..., bin)
        whole = np.bincount(bins_of(self.sure, self.n_bins, self.bins), self.sure - self.right, self.n_bins)
        scores = {
            self.name: np.abs(gaps).sum(axis=-1),
            f"{self.name}/chance": np.abs(gaps - whole / len(self.sure)).sum(axis=-1),
        }
        if self.bins == "width":
            shares = np.divide(right, count, out=np.full(count.shape, np.nan), where=count > 0)
            there = np.unique(bins_of(self.sure, self.n_bins))
            scores |= {f"acc/sure/{i}": shares[..., i] for i in there}
        return scores


def details(clips: Clips, logits: Tensor) -> list[Measure]:
    """Confusions and calibration errors of logits (clip, class), for intervals."""
    targets = clips.scene.cpu().numpy()
    sure, answers = (value.numpy() for value in logits.double().softmax(dim=1).cpu().max(dim=1))
    right = answers == targets
    adaptive = Sureness(sure, right, "ece_adaptive", bins="count")
    return [Confusions(answers, targets, clips.meta.scenes), Sureness(sure, right), adaptive]
