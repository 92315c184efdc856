"""What a system answers for the clips of a data set: from a network, or from a file that somebody has written.

Files are read in four forms:
- our own file of logits, as run_teacher_logits.py writes it;
- the table of a challenge entry, 2021 to 2025: filename (with or without `audio/`), scene_label, and a column of
  probabilities for each scene, in any order, parted by tabs, commas or semicolons;
- a plain array (clip, class), .pt or .npy, whose rows follow the list of the split, or all of meta.csv.

Unlike teacher logits, which only have to hold the training part, these have to be exactly the clips that are scored.
"""

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.files import ContentError, check_content, replacing
from datasets.tau import SCENES, TEST_LIST, DataError, Evaluation, Meta, read_table, test_rows
from datasets.teacher_logits import OWN_FORM, begins_as_table, read_score_table
from datasets.torch_file import read_torch_file
from datasets.waveforms import Clips

log = logging.getLogger(__name__)

# What a probability of 0 is taken for, as by scikit-learn and SP4ASC with float32.
SMALLEST = float(np.finfo(np.float32).eps)
FOLDER = "audio/"
EVALUATION_LIST = Path("evaluation_setup", "fold1_evaluate.csv")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits (clip, class) float64 of clips, and what the data set knows of them.

    Scores take `clips` and `logits`, see `helpers.metrics.score` and `helpers.evaluate.uncertainty`.

    Args:
        files: (clip,) names, as the data set writes them.
        scenes: what the columns stand for.
        clips: labels, devices, cities and recordings; None for an evaluation set, which has no labels.
        recording_device: (clip,) names; None where none are told.

    Raises:
        ValueError: when they do not fit each other.
        DataError: for logits that are not finite.
    """

    files: np.ndarray
    logits: Tensor
    scenes: tuple[str, ...]
    clips: Clips | None = None
    recording_device: np.ndarray | None = None

    def __post_init__(self):
        if tuple(self.logits.shape) != (len(self.files), len(self.scenes)):
            n_files, n_scenes = len(self.files), len(self.scenes)
            raise ValueError(f"logits {tuple(self.logits.shape)} do not fit {n_files} files and {n_scenes} scenes")
        odd = (~self.logits.isfinite()).any(dim=1).nonzero()
        if len(odd):
            raise DataError(f"the answer for {self.files[odd[0, 0]]} is not finite ({len(odd)} clips in all)")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def probabilities(self) -> Tensor:
        """(clip, class)."""
        return self.logits.softmax(dim=1)

    @property
    def target(self) -> np.ndarray | None:
        """(clip,) numbers of the true scenes; None for an evaluation set."""
        return None if self.clips is None else self.clips.scene.cpu().numpy()

    @property
    def city(self) -> np.ndarray | None:
        """(clip,) names."""
        return None if self.clips is None else _named(self.clips.meta.cities, self.clips.city)

    @property
    def recording(self) -> np.ndarray | None:
        """(clip,) what each clip was cut from."""
        clips = self.clips
        return None if clips is None or clips.meta.recording is None else clips.meta.recording[clips.rows]

    def aligned_to(self, other: "Predictions") -> "Predictions":
        """The same answers, with clips and scenes in the order of another system's, for paired tests.

        Raises:
            DataError: when the two are not about the same clips and scenes.
        """
        if set(self.scenes) != set(other.scenes):
            raise DataError(f"systems of other scenes: {', '.join(self.scenes)}; and {', '.join(other.scenes)}")
        row_of = {file: row for row, file in enumerate(self.files)}
        different = row_of.keys() ^ set(other.files)
        if different or len(row_of) < len(self) or len(self) != len(other):
            first = f", first {min(different)}" if different else ": a clip is repeated"
            raise DataError(f"the systems do not answer the same clips ({len(different)} differ{first})")
        rows = [row_of[file] for file in other.files]
        columns = [self.scenes.index(scene) for scene in other.scenes]
        return replace(other, logits=self.logits[rows][:, columns])


def is_predictions(path: Path) -> bool:
    """Whether a file is one of answers, not of weights."""
    if path.suffix in (".csv", ".tsv", ".txt", ".npy"):
        return True
    try:
        content = read_torch_file(path)
    except (ContentError, OSError):
        return False
    return isinstance(content, Tensor) or (isinstance(content, Mapping) and content.keys() >= OWN_FORM.keys())


def write_predictions(path: Path, files: Sequence[str], logits: Tensor, scenes: Sequence[str]) -> None:
    """Writes logits (clip, class) as the challenge's table of probabilities: a row each, separated by tabs."""
    probabilities = logits.double().softmax(dim=1)
    with replacing(path) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["filename", "scene_label", *scenes])
        for name, row, i in zip(files, probabilities.tolist(), logits.argmax(dim=1).tolist(), strict=True):
            writer.writerow([name, scenes[i], *(f"{value:.8g}" for value in row)])


def predictions_of(clips: Clips, logits: Tensor) -> Predictions:
    """What a network answers: logits (clip, class) of any type; the clips of a Meta are `Clips(meta, rows, None)`."""
    devices = _named(clips.meta.recording_devices, clips.recording_device)
    return Predictions(clips.files, logits.detach().cpu().double(), tuple(clips.meta.scenes), clips, devices)


def _named(names: Sequence[str], codes: Tensor) -> np.ndarray:
    return np.array(names, dtype=object)[codes.cpu().numpy()]


def read_predictions(path: Path | str, data: Meta | Evaluation, rows: np.ndarray | None = None) -> Predictions:
    """Reads a file of answers for a part of a data set, matched by file name; arrays by the order of the list.

    Clips that repeat, are missing, or are not of this part are refused; only our own file of logits may hold other
    clips of the data set.

    Args:
        data: with labels or without.
        rows: of meta.csv, which arrays then follow; None: the test part, and arrays follow its list.

    Raises:
        DataError: when the file does not fit, in one line.
    """
    path = Path(path)
    is_labelled = isinstance(data, Meta)
    try:
        content = _read(path)
        values, scenes = _columns(path, content, data)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: name a file of predictions") from error
    except (ContentError, OSError) as error:
        raise DataError(f"{path} is no file of predictions: {error}") from error
    clips = Clips(data, test_rows(data) if rows is None else rows, None) if is_labelled else None
    wanted = clips.files if is_labelled else data.files
    named = isinstance(content, Mapping)
    is_table = named and "labels" in content
    files = [str(file).strip() for file in content["files"]] if named else _rows_of(path, len(values), data, rows)
    place_of = {file: i for i, file in enumerate(wanted)}
    others = set() if is_table else set(data.files)
    order = _match(path, files, place_of, others)
    chosen = [files[i] for i in order]
    logits = values[order]
    if not np.isfinite(logits).all():
        odd = ~np.isfinite(logits).all(axis=1)
        raise DataError(f"{path}: the answer for {chosen[int(odd.argmax())]} is no number ({odd.sum()} in all)")
    if is_table or not named:
        logits = _as_logits(path, chosen, logits)
    if is_table and content["labels"] is not None:
        logits = _follow_labels(path, [content["labels"][i] for i in order], chosen, logits, scenes)
    if clips is None:
        return Predictions(wanted, torch.from_numpy(logits), scenes, None, data.recording_device)
    found = predictions_of(clips, torch.from_numpy(logits))
    if not named:
        _warn_of_chance(path, found)
    return found


def _read(path: Path) -> Any:
    """A mapping with `files`, `logits`, `scenes` (and `labels`, of a table), or an array.

    Raises:
        OSError: when it cannot be read.
        ContentError: when it is none of the forms.
    """
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ContentError(f"holds no array of numbers ({error})") from error
    if not path.is_file() or not begins_as_table(path):
        content = read_torch_file(path)
        if isinstance(content, Mapping):
            check_content(content, OWN_FORM)
            return {key: content[key] for key in OWN_FORM}
        return content
    table, scenes, values = read_score_table(path)
    labels = [str(label).strip() for label in table.scene_label] if "scene_label" in table else None
    return {"files": table.filename, "logits": values, "scenes": scenes, "labels": labels}


def _columns(path: Path, content: Any, data: Meta | Evaluation) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values (row, class) float64 in the order of the scenes, and those."""
    values = content["logits"] if isinstance(content, Mapping) else content
    if isinstance(values, Tensor) and values.layout == torch.strided:
        values = values.detach().double().numpy() if values.is_floating_point() else values.numpy()
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f" or not len(values):
        shape = f" {tuple(values.shape)} {values.dtype}" if hasattr(values, "shape") else ""
        raise ContentError(
            f"floating-point numbers (clip, class) are needed, it holds a {type(values).__name__}{shape}"
        )
    known = data.scenes if isinstance(data, Meta) else None
    scenes = tuple(content["scenes"]) if isinstance(content, Mapping) else known or SCENES
    if values.shape[1] != len(scenes) or len(set(scenes)) < len(scenes):
        raise ContentError(f"it holds {values.shape[1]} columns for the scenes {', '.join(scenes)}")
    if known is not None and set(scenes) != set(known):
        raise DataError(f"{path} is for the scenes {', '.join(scenes)}; the data set has {', '.join(known)}")
    ordered = tuple(known or (SCENES if set(scenes) == set(SCENES) else sorted(scenes)))
    return values.astype(np.float64)[:, [scenes.index(scene) for scene in ordered]], ordered


def _rows_of(path: Path, n_rows: int, data: Meta | Evaluation, rows: np.ndarray | None) -> list[str]:
    """The clips that the rows of an array are about."""
    if isinstance(data, Evaluation):
        files, source = list(data.files), data.root / TEST_LIST
    elif rows is None:
        source = data.root / EVALUATION_LIST
        files = read_table(source, ["filename"]).filename.tolist()
    else:
        files, source = list(data.files[rows]), "the part that is scored"
    if n_rows == len(files):
        return files
    if isinstance(data, Meta) and n_rows == len(data):
        return list(data.files)
    raise DataError(f"{path} has {n_rows} rows, {source} has {len(files)} clips")


def _match(path: Path, files: Sequence[str], place_of: Mapping[str, int], others: set[str]) -> np.ndarray:
    """The row (clip,) of each clip; `others` are clips that may be in the file as well."""
    row_of = np.full(len(place_of), -1)
    for row, file in enumerate(files):
        name = next((name for name in (file, FOLDER + file, file.removeprefix(FOLDER)) if name in place_of), None)
        if name is None and file not in others:
            raise DataError(f"{path} holds {file}, which is not among the {len(place_of)} clips that are scored")
        if name is not None:
            if row_of[place_of[name]] >= 0:
                raise DataError(f"{path} holds {file} more than once: leave one of them in it")
            row_of[place_of[name]] = row
    missing = [name for name, place in place_of.items() if row_of[place] < 0]
    if missing:
        raise DataError(f"{path} lacks {len(missing)} of {len(place_of)} clips, first {missing[0]}")
    return row_of


def _as_logits(path: Path, files: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities; what most rows say are logits stays as it is.

    Probabilities are rounded: to hundredths where all of them are such, else to thousandths or finer.
    """
    hundredths = np.abs(100 * values - np.round(100 * values)).max() < 1e-6
    tolerance = values.shape[1] * (0.005 if hundredths else 0.0005) + 1e-6
    sums = values.sum(axis=1)
    odd = (np.abs(sums - 1) > tolerance) | (values < 0).any(axis=1)
    if (values < 0).any() and odd.mean() > 0.5:
        return values
    if odd.any():
        i = int(odd.argmax())
        what = f"hold {values[i].min():.4g}" if values[i].min() < 0 else f"add up to {sums[i]:.4g}, not to 1"
        raise DataError(f"{path}: the probabilities of {files[i]} {what} ({odd.sum()} clips in all)")
    return np.log(np.maximum(values, SMALLEST))


def _follow_labels(
    path: Path, labels: Sequence[str], files: Sequence[str], logits: np.ndarray, scenes: Sequence[str]
) -> np.ndarray:  # fmt: skip
    """Checks the column scene_label; where rounded probabilities are equal it tells which was the largest."""
    number = {scene: i for i, scene in enumerate(scenes)}
    for label, file in zip(labels, files, strict=True):
        if label not in number:
            raise DataError(f"{path} calls {file} {label!r}, which is none of {', '.join(scenes)}")
    at = np.arange(len(logits)), np.array([number[label] for label in labels])
    tied = logits[at] == logits.max(axis=1)
    if not tied.all():
        log.warning("%s: %d labels are not the most probable scene; the probabilities count", path, (~tied).sum())
    logits = logits.copy()
    logits[at] += np.where(tied, 1e-9, 0)  # moves no loss that anybody can see
    return logits


def _warn_of_chance(path: Path, found: Predictions) -> None:
    """Rows in another order than the list's know nothing."""
    chance, accuracy = 1 / len(found.scenes), float((found.logits.argmax(dim=1).numpy() == found.target).mean())
    if len(found) >= 100 and accuracy < chance + 3 * np.sqrt(chance * (1 - chance) / len(found)):
        log.warning("%s is right on %.1f%% of the clips, chance is %.1f%%: do its rows follow the list?", path,
                    100 * accuracy, 100 * chance)  # fmt: skip
