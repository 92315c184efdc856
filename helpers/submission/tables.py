"""The tables and scores of a submission, in the forms that the editions have."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.files import replacing
from datasets.tau import DEVICE_GROUPS, RECORDING_DEVICES, SCENES
from datasets.waveforms import Clips
from helpers.metrics import score
from helpers.submission.rules import COLUMNS


def write_output(path: Path, files: Sequence[str], logits: Tensor, in_short: bool) -> None:
    """Writes logits (clip, class) as the published scripts do: softmax in half precision, a row a clip, in order.

    Args:
        in_short: as in 2024: file names without their folder, and the shortest text of a number; else as in 2025.
    """
    probabilities = logits.half().softmax(dim=1).numpy()
    with replacing(path) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, row in zip(files, probabilities, strict=True):
            numbers = [str(value) for value in row] if in_short else row.astype(float).tolist()
            name = name.removeprefix("audio/") if in_short else name
            writer.writerow([name, SCENES[int(row.argmax())], *numbers])


def metrics_of(clips: Clips, logits: Tensor, batch_size: int) -> dict[str, float | None]:
    """The 69 scores of info.json for logits (clip, class), by the published names; None for groups without clips.

    Losses are those of half precision. `test/loss` is the mean over batches, whose last may be shorter: so it is
    defined there.
    """
    logits, target = logits.half(), clips.scene.cpu()
    loss = F.cross_entropy(logits, target, reduction="none").float().numpy()
    right = (logits.argmax(dim=1) == target).numpy()
    device, scene = clips.recording_device.cpu().numpy(), target.numpy()
    device_names = np.array(clips.meta.recording_devices, dtype=object)[device]

    def of(mask: np.ndarray, name: str, loss_name: str, count_name: str) -> dict[str, float | None]:
        n = int(mask.sum())
        return {
            f"test/acc.{name}": float(right[mask].mean()) if n else None,
            f"test/{loss_name}.{name}": float(loss[mask].mean()) if n else None,
            f"test/{count_name}.{name}": float(n),
        }

    found: dict[str, float | None] = {}
    for name in RECORDING_DEVICES:
        found |= of(device_names == name, name, "loss", "cnt")
    for group, names in DEVICE_GROUPS.items():
        found |= of(np.isin(device_names, names), group, "lloss", "count")
    for i, name in enumerate(SCENES):
        found |= of(scene == i, name, "loss", "cnt")
    by_scene = [found[f"test/acc.{name}"] for name in SCENES]
    batches = [float(part.mean()) for part in np.split(loss, range(batch_size, len(loss), batch_size))]
    whole = {
        "test/acc": float(right.mean()),
        "test/macro_avg_acc": None if None in by_scene else float(np.mean(by_scene)),
        "test/loss": float(torch.tensor(np.mean(batches)).half()),
    }
    return whole | found


def development_scores(clips: Clips, logits: Tensor, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The block of scores in the meta information: accuracies in percent, and log losses; only what has clips."""
    scores = score(clips, logits, groups)

    def block(name: str) -> dict[str, float]:
        return {"accuracy": round(100 * scores[f"acc{name}"], 2), "logloss": round(scores[f"loss{name}"], 4)}

    overall = {
        "accuracy": round(100 * scores["macro_avg_acc"], 2),
        "logloss": round(scores["macro_avg_loss"], 4),
    }
    meta = clips.meta
    return {
        "overall": overall,
        "class_wise": {name: block(f"/scene/{name}") for name in meta.scenes if f"acc/scene/{name}" in scores},
        "device_wise": {
            name: block(f"/device/{name}") for name in meta.recording_devices if f"acc/device/{name}" in scores
        },
    }


def half_state(network: torch.nn.Module) -> dict[str, Tensor]:
    """The weights as half-precision scripts save them: floats in 16 bits, counters as they are."""
    return {
        name: value.half() if value.is_floating_point() else value.clone()
        for name, value in network.state_dict().items()
    }
