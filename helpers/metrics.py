"""Scores of one evaluation, computed once from stored predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.waveforms import Clips


@dataclass(frozen=True)
class Scores:
    """Accuracy and mean loss of one group of clips."""

    acc: float
    loss: float
    count: int


def score(clips: Clips, logits: Tensor, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Metrics of logits (clip, class) for `clips`, keyed by path; only scenes, devices, cities that occur have keys.

    `acc` and `loss` over all clips, `macro_avg_acc` (mean over the scenes), then `acc/<group>` for device groups and
    `acc/scene/<name>`, `acc/device/<name>`, `acc/city/<name>`, each with `loss/...` and `count/...` alike.

    Args:
        groups: names of recording devices by device group.
    """
    scene, device, city = (t.cpu().numpy() for t in (clips.scene, clips.recording_device, clips.city))
    meta = clips.meta
    logits = logits.double()
    target = torch.from_numpy(scene)
    loss = F.cross_entropy(logits, target, reduction="none").numpy()
    correct = (logits.argmax(dim=1) == target).numpy()

    def of(selected: np.ndarray) -> Scores:
        return Scores(float(correct[selected].mean()), float(loss[selected].mean()), int(selected.sum()))

    parts: dict[str, Scores] = {}
    for group, names in groups.items():
        selected = np.isin(device, [i for i, name in enumerate(meta.recording_devices) if name in names])
        if selected.any():
            parts[group] = of(selected)
    for kind, codes, names in (
        ("scene", scene, meta.scenes),
        ("device", device, meta.recording_devices),
        ("city", city, meta.cities),
    ):
        parts |= {f"{kind}/{names[code]}": of(codes == code) for code in np.unique(codes)}

    whole = of(np.ones(len(clips), dtype=bool))
    scene_accuracies = [scores.acc for key, scores in parts.items() if key.startswith("scene/")]
    metrics = {
        "acc": whole.acc,
        "macro_avg_acc": float(np.mean(scene_accuracies)),
        "loss": whole.loss,
        "count": whole.count,
    }
    for field in ("acc", "loss", "count"):
        metrics |= {f"{field}/{key}": getattr(scores, field) for key, scores in parts.items()}
    return metrics
