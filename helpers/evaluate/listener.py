"""A network that listens: windows of recordings in, probabilities of scenes out, as text or tables."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch

from datasets.audio import Sampling
from datasets.files import replacing
from datasets.tau import parse_clip_name
from helpers.evaluate.recordings import windows
from helpers.report.text import align

BATCH = 32  # windows that a network answers at once
UNKNOWN = "unknown"
BAR = 24  # characters of a probability of 1


@dataclass(frozen=True)
class Answer:
    """What a network says of a window: seconds from `start` to `end`, and probabilities (class,)."""

    start: float
    end: float
    probabilities: np.ndarray


@dataclass(frozen=True)
class Listener:
    """A network with its front end, ready to answer."""

    model: torch.nn.Module
    frontend: torch.nn.Module
    scenes: tuple[str, ...]
    sampling: Sampling
    n_samples: int
    hop: int
    unknown_below: float
    device: torch.device

    def name(self, probabilities: np.ndarray) -> str:
        """The most likely scene, or that it is not known."""
        best = int(probabilities.argmax())
        return self.scenes[best] if probabilities[best] >= self.unknown_below else UNKNOWN

    @torch.inference_mode()
    def answers(self, pieces: Iterator[np.ndarray], batch: int = BATCH) -> Iterator[Answer]:
        """Answers the windows of a recording, a batch at a time."""
        waiting, rate = windows(pieces, self.n_samples, self.hop), self.sampling.rate
        while some := list(islice(waiting, batch)):
            waveform = torch.from_numpy(np.stack([window.samples for window in some])).to(self.device)
            logits = self.model(self.frontend(waveform)).float()
            for window, row in zip(some, logits.softmax(dim=1).cpu().numpy(), strict=True):
                yield Answer(window.start / rate, window.end / rate, row)


def described(name: str, answers: Sequence[Answer], listener: Listener, n_top: int) -> list[str]:
    """Lines for people: the most likely scenes of a recording, and over time where it has several windows."""
    mean = np.mean([answer.probabilities for answer in answers], axis=0)
    best = np.argsort(-mean)[:n_top]
    rows = [[listener.scenes[i], f"{mean[i]:.2f}", "#" * round(BAR * mean[i])] for i in best]
    lines = [f"{name} ({answers[-1].end:.1f} s)"]
    if listener.name(mean) == UNKNOWN:
        lines[0] += f": {UNKNOWN}, the most likely are"
    lines += [f"  {line.rstrip()}" for line in align([[a, b, c.ljust(BAR)] for a, b, c in rows])]
    if len(answers) > 1:
        spans = []
        for scene, group in groupby(answers, key=lambda answer: listener.name(answer.probabilities)):
            same = list(group)
            sure = np.mean([answer.probabilities.max() for answer in same])
            spans.append([f"{clock(same[0].start)} - {clock(same[-1].end)}", scene, f"{sure:.2f}"])
        lines += ["  over time:", *(f"    {line}" for line in align(spans, n_left=2))]
    return lines


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are some."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def right_ones(answered: Mapping[str, Sequence[Answer]], listener: Listener) -> str | None:
    """How many recordings are right, in words, of those whose scene their folder or a name in TAU's pattern tells."""
    known = {}
    for file in answered:
        name, folder = parse_clip_name(file), Path(file).parent.name
        scene = name.scene if name is not None else Path(file).stem.split("-")[0]
        if scene in listener.scenes or folder in listener.scenes:
            known[file] = scene if scene in listener.scenes else folder
    if not known:
        return None
    means = {file: np.mean([one.probabilities for one in answered[file]], axis=0) for file in known}
    n_right = sum(listener.scenes[int(means[file].argmax())] == scene for file, scene in known.items())
    return f"{n_right} of {len(known)} recordings whose scene is known are right: {n_right / len(known):.1%}"


def write_answers(path: Path, answered: dict[str, list[Answer]], listener: Listener) -> None:
    """All windows as a table, a line each, or as JSON by recording."""
    scenes = listener.scenes
    with replacing(path) as file:
        if path.suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "start", "end", "scene", "probability", *scenes])
            for name, answers in answered.items():
                for one in answers:
                    values = [f"{value:.6f}" for value in (one.probabilities.max(), *one.probabilities)]
                    scene = listener.name(one.probabilities)
                    writer.writerow([name, f"{one.start:.3f}", f"{one.end:.3f}", scene, *values])
            return
        content = []
        for name, answers in answered.items():
            spans = [
                {"start": one.start, "end": one.end, "probabilities": _by_scene(one.probabilities, scenes)}
                for one in answers
            ]
            mean = np.mean([one.probabilities for one in answers], axis=0)
            content.append({"file": name, "scene": listener.name(mean),
                            "probabilities": _by_scene(mean, scenes), "windows": spans})  # fmt: skip
        json.dump(content, file, indent=1)


def _by_scene(probabilities: np.ndarray, scenes: Sequence[str]) -> dict[str, float]:
    return {scene: round(float(value), 6) for scene, value in zip(scenes, probabilities, strict=True)}
