"""Scores of one evaluation, computed once from stored predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.waveforms import Clips

FIELDS = ("acc", "loss", "count")
CELL = "/device/"  # between scene and device in the name of a group of both


@dataclass(frozen=True)
class Judged:
    """What a system did with each clip, and the groups that clips are in.

    Args:
        correct: (clip,) bool.
        loss: (clip,) float64, the logarithmic loss.
        groups: (clip,) bool by name; the first, called "", is all clips. Each has a clip.
    """

    correct: np.ndarray
    loss: np.ndarray
    groups: Mapping[str, np.ndarray]

    def sums(self, part: np.ndarray, n_parts: int) -> np.ndarray:
        """Correct clips, losses and clips of each group, added up by part: (part, 3 * group) float64.

        Args:
            part: (clip,) numbers of the parts, such as recordings.
        """
        columns = []
        for mask in self.groups.values():
            own = part[mask]
            fields = (self.correct[mask], self.loss[mask], None)  # None: each clip counts for one
            columns += [np.bincount(own, field, n_parts) for field in fields]
        return np.stack(columns, axis=1).astype(np.float64)

    def scores_of(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """The scores, by key, of sums (..., 3 * group); NaN where a group has no clips there.

        Keys are `acc`, `loss`, `acc/<group>`, `loss/<group>`, and `macro_avg_acc` and `macro_avg_loss`, means over the
        scenes there are; with cells also `domain_avg_acc`, the mean over devices of their means over scenes.
        """
        correct, loss, count = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, len(FIELDS)), -1, 0)
        with np.errstate(invalid="ignore"):
            found = {"acc": correct / count, "loss": loss / count}  # (..., group)
        names = list(self.groups)
        scores = {
            f"{field}/{name}".removesuffix("/"): values[..., i]
            for field, values in found.items()
            for i, name in enumerate(names)
        }
        of_scenes = {i: name.partition(CELL)[2] for i, name in enumerate(names) if name.startswith("scene/")}
        scenes = [i for i, device in of_scenes.items() if not device]
        for field, values in found.items():
            scores[f"macro_avg_{field}"] = _mean(values[..., scenes], count[..., scenes] > 0)
        cells: dict[str, list[int]] = {}
        for i, device in of_scenes.items():
            if device:
                cells.setdefault(device, []).append(i)
        if cells:
            devices = [_mean(found["acc"][..., own], count[..., own] > 0) for own in cells.values()]
            there = [count[..., own].sum(axis=-1) > 0 for own in cells.values()]
            scores["domain_avg_acc"] = _mean(np.stack(devices, axis=-1), np.stack(there, axis=-1))
        return scores

    def scores(self) -> dict[str, float]:
        """Those of all clips."""
        whole = self.sums(np.zeros(len(self.loss), dtype=np.int64), 1)[0]
        return {key: float(value) for key, value in self.scores_of(whole).items()}


def _mean(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is there; 0 where nothing is."""
    return np.where(there, values, 0).sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)


def judge(clips: Clips, logits: Tensor, groups: Mapping[str, Sequence[str]], cells: bool = False) -> Judged:
    """Judges logits (clip, class) for `clips`; only scenes, devices and cities that occur are groups.

    Args:
        groups: names of recording devices by device group.
        cells: each scene on each device is a group too, `scene/<name>/device/<name>`.
    """
    scene, device, city = (t.cpu().numpy() for t in (clips.scene, clips.recording_device, clips.city))
    meta = clips.meta
    logits = logits.double()
    target = torch.from_numpy(scene)
    masks = {"": np.ones(len(clips), dtype=bool)}
    for group, names in groups.items():
        selected = np.isin(device, [i for i, name in enumerate(meta.recording_devices) if name in names])
        if selected.any():
            masks[group] = selected
    for kind, codes, names in (
        ("scene", scene, meta.scenes),
        ("device", device, meta.recording_devices),
        ("city", city, meta.cities),
    ):
        masks |= {f"{kind}/{names[code]}": codes == code for code in np.unique(codes)}
    if cells:
        for i, j in np.unique(np.stack([scene, device]), axis=1).T:
            name = f"scene/{meta.scenes[i]}{CELL}{meta.recording_devices[j]}"
            masks[name] = (scene == i) & (device == j)
    loss = F.cross_entropy(logits, target, reduction="none").numpy()
    return Judged((logits.argmax(dim=1) == target).numpy(), loss, masks)


def score(clips: Clips, logits: Tensor, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Metrics of logits (clip, class) for `clips`, keyed by path; only scenes, devices, cities that occur have keys.

    `acc` and `loss` over all clips, `macro_avg_acc` and `macro_avg_loss` (means over the scenes), then `acc/<group>`
    for device groups and `acc/scene/<name>`, `acc/device/<name>`, `acc/city/<name>`, each with `loss/...` and
    `count/...` alike.

    Args:
        groups: names of recording devices by device group.
    """
    judged = judge(clips, logits, groups)
    scores = judged.scores()
    counts = {f"count/{name}".removesuffix("/"): int(mask.sum()) for name, mask in judged.groups.items()}
    first = ["acc", "macro_avg_acc", "loss"]
    return {key: scores[key] for key in first} | {"count": counts["count"]} | scores | counts
