"""Answers of a system in a file: written by us, handed in to a challenge, or a plain array in the split's order."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from datasets.files import ContentError, replacing
from datasets.tau import DataError
from datasets.torch_file import read_torch_file

SMALLEST = (
    2.0**-23
)  # of a probability, where written ones are 0: the epsilon of float32, at which scikit-learn cuts too
MOST_OFF = 0.02  # that the probabilities of a clip may differ from 1 in sum; published tables are rounded
NAMES, DECISION = ("filename", "file"), "scene_label"
NO_CLASS = {*NAMES, DECISION, "scene", "start", "end", "probability"}  # columns that are none


@dataclass(frozen=True)
class Predictions:
    """Answers from a file.

    Args:
        logits: (clip, class); of probabilities, their logarithms.
        files: names of the clips (clip,), without folders; None for an array in the order of the split.
        scenes: what the columns stand for; None for an array.
    """

    path: Path
    logits: Tensor
    files: list[str] | None = None
    scenes: tuple[str, ...] | None = None

    def of(self, files: Sequence[str], scenes: Sequence[str]) -> Tensor:
        """The answers (clip, class) for these clips, classes in the order of `scenes`.

        Raises:
            DataError: when clips or scenes of the file are not exactly these.
        """
        self.check(scenes)
        logits = self.logits
        if self.scenes is not None:
            logits = logits[:, [self.scenes.index(scene) for scene in scenes]]
        if self.files is None:
            if len(logits) != len(files):
                raise DataError(f"{self.path} holds {len(logits)} rows, there are {len(files)} clips")
            return logits
        row_of = {name: row for row, name in enumerate(self.files)}
        wanted = [_base(file) for file in files]
        missing = [name for name in wanted if name not in row_of]
        if missing:
            raise DataError(f"{self.path} lacks {len(missing)} of {len(wanted)} clips, first {missing[0]}")
        extra = row_of.keys() - set(wanted)
        if extra:
            raise DataError(f"{self.path} holds {len(extra)} clips that are not asked for, first {min(extra)}")
        return logits[[row_of[name] for name in wanted]]

    def check(self, scenes: Sequence[str]) -> None:
        """Raises DataError when the file's classes are not these scenes."""
        n_classes = self.logits.shape[1]
        if n_classes != len(scenes) or (self.scenes is not None and set(self.scenes) != set(scenes)):
            held = f"{n_classes} classes" if self.scenes is None else f"the classes {', '.join(self.scenes)}"
            raise DataError(f"{self.path} holds {held}; the data set has {', '.join(scenes)}")


def is_predictions(path: Path) -> bool:
    """Whether a file is one of answers, not of weights: a table, a NumPy array, or a bare tensor of PyTorch's."""
    if path.suffix in (".csv", ".tsv", ".npy"):
        return True
    if path.suffix not in (".pt", ".pth"):
        return False
    try:
        return isinstance(read_torch_file(path), Tensor)
    except ContentError:
        return False


def read_predictions(path: Path) -> Predictions:
    """Reads a table with a column of file names and one for each class, or an array (clip, class).

    Tables are separated by tabs, as all submissions to the challenge are, or by commas; of several rows for a file, one
    for each window of a recording, the mean counts. Arrays hold logits, or probabilities where every row is one.

    Raises:
        DataError: naming the file and line that do not fit.
    """
    if path.suffix in (".csv", ".tsv"):
        return _read_table(path)
    try:
        values = np.load(path, allow_pickle=False) if path.suffix == ".npy" else read_torch_file(path)
    except (ContentError, ValueError, EOFError) as error:
        raise DataError(f"{path} holds no array of answers: {error}") from error
    values = torch.as_tensor(values)
    if values.ndim != 2 or not values.is_floating_point() or not len(values):
        raise DataError(f"{path} must hold numbers (clip, class), got {tuple(values.shape)} {values.dtype}")
    values = values.double()
    if not values.isfinite().all():
        raise DataError(f"{path} row {int((~values.isfinite()).any(1).nonzero()[0])} holds NaN or infinity")
    if (values >= 0).all() and ((values.sum(dim=1) - 1).abs() <= MOST_OFF).all():
        values = _logarithms(values)
    return Predictions(path, values)


def _read_table(path: Path) -> Predictions:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no table of answers: {error}") from error
    scenes = tuple(name for name in columns if name not in NO_CLASS)
    key = next((name for name in NAMES if name in columns), None)
    if key is None or not scenes or not rows:
        raise DataError(f"{path} must have a column filename, one for each class, and rows; its first line is "
                        f"{', '.join(columns) or 'empty'}")  # fmt: skip
    answers: dict[str, list[list[float]]] = {}
    for line, row in enumerate(rows, start=2):
        try:
            values = [float(row[scene]) for scene in scenes]
        except (TypeError, ValueError):
            raise DataError(f"{path} line {line}: there must be a number for each class") from None
        if not all(0 <= value <= 1 + MOST_OFF for value in values) or abs(sum(values) - 1) > MOST_OFF:
            raise DataError(f"{path} line {line}: these are no probabilities: {values}")
        answers.setdefault(_base(row[key]), []).append(values)
    if "start" not in columns and len(answers) < len(rows):
        twice = next(name for name, found in answers.items() if len(found) > 1)
        raise DataError(f"{path} names {twice} more than once")
    means = torch.tensor([np.mean(found, axis=0).tolist() for found in answers.values()], dtype=torch.float64)
    return Predictions(path, _logarithms(means), list(answers), scenes)


def write_predictions(path: Path, files: Sequence[str], probabilities: Tensor, scenes: Sequence[str]) -> None:
    """Writes probabilities (clip, class) as the challenge has them since 2021: a row each, separated by tabs."""
    best = probabilities.argmax(dim=1).tolist()
    with replacing(path) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["filename", DECISION, *scenes])
        for name, row, i in zip(files, probabilities.tolist(), best, strict=True):
            writer.writerow([name, scenes[i], *(f"{value:.8g}" for value in row)])


def _base(file: str) -> str:
    return PurePosixPath(file.replace("\\", "/")).name


def _logarithms(probabilities: Tensor) -> Tensor:
    probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
    return probabilities.clamp_min(SMALLEST).log()
