"""What the loggers show of a finished run or an evaluation, from its answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from helpers.data import Data
from helpers.evaluate.scores import class_device_table
from helpers.metrics import score
from helpers.report.sections import hardest_clips
from helpers.runs.backend import Results, Sound, Table

N_SOUNDS = 4
KINDS = {"scenes": "scene", "recording_devices": "device", "cities": "city"}


def results_of(
    data: Data, logits: Tensor, metrics: Mapping[str, float], folder: Path, checkpoints: Sequence[Path] = ()
) -> Results:
    """Tables, figures and sounds of logits (clip, class) on the test part.

    Args:
        folder: holds the figures of the report as PNG files.
    """
    clips, logits = data.test, logits.cpu()
    scores = score(clips, logits, data.groups)
    tables = {}
    for title, kind in KINDS.items():
        names = [key.split("/")[-1] for key in scores if key.startswith(f"acc/{kind}/")]
        rows = [[name, *(scores[f"{field}/{kind}/{name}"] for field in ("acc", "loss", "count"))] for name in names]
        tables[title] = Table([kind, "accuracy", "log loss", "clips"], rows)
    cells = class_device_table(clips, logits)
    accuracy = cells.accuracy.filled(float("nan")).tolist()
    rows = [[scene, *(None if value != value else value for value in row)]
            for scene, row in zip(cells.scenes, accuracy, strict=True)]  # fmt: skip
    tables["scenes_by_device"] = Table(["scene", *cells.devices], rows)
    sounds = []
    if clips.store is not None:
        shown = hardest_clips(clips, logits, N_SOUNDS)
        waveform = clips.batch(torch.tensor(shown)).to(torch.device("cpu")).waveform.numpy()
        for i, samples in zip(shown, waveform, strict=True):
            true, answer = (clips.meta.scenes[int(j)] for j in (clips.scene[i], logits[i].argmax()))
            device = clips.recording_devices[int(clips.recording_device[i])]
            caption = f"{true} on device {device}, taken for {answer}"
            sounds.append(Sound(Path(str(clips.files[i])).stem, caption, samples, clips.store.sample_rate))
    figures = {f"figures/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    answers = logits.argmax(dim=1).numpy()
    return Results(metrics, clips.meta.scenes, clips.scene.cpu().numpy(), answers, tables, figures, sounds, checkpoints)
