"""What is recorded of a run beside its folder: the interface of W&B, TensorBoard and nothing."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Run:
    """What a backend may know about the run it records."""

    dir: Path
    id: str
    project: str
    experiment_name: str | None
    options: dict[str, Any]
    resume_epoch: int | None  # epochs finished by the checkpoint that the run goes on from; None for a new run


class Sound(NamedTuple):
    """A clip to listen to."""

    name: str
    caption: str
    samples: np.ndarray  # (sample,) float32 in [-1, 1]
    rate: int  # Hz


class Table(NamedTuple):
    columns: list[str]
    rows: list[list[Any]]


@dataclasses.dataclass(frozen=True)
class Results:
    """What a finished run or an evaluation shows of itself at the end.

    Args:
        metrics: of the last epoch.
        scenes: names of the classes.
        targets, answers: class numbers (clip,) of the test part.
        tables: by name.
        figures: PNG files by name.
        sounds: clips to listen to.
        checkpoints: files.
    """

    metrics: Mapping[str, float]
    scenes: tuple[str, ...]
    targets: np.ndarray
    answers: np.ndarray
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    sounds: Sequence[Sound] = ()
    checkpoints: Sequence[Path] = ()


class NoLogger:
    """Records nothing besides the run folder."""

    def __init__(self, run: Run):
        pass

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        pass

    def show(self, results: Results) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        pass
