"""Teacher logits: one row of class scores for each clip, matched by file name.

Three forms are read:
- our own (written by run_teacher_logits.py): a dict with `files` (list of names), `logits` (clip, class) and `scenes`
  (the class order); what else is in it tells where it comes from;
- the published `ensemble_logits.pt`: a bare tensor (rows, 10), row r for row r of TAU22's meta.csv; it holds the rows
  twice, the second half (time-rolled clips) is not used;
- `predictions_<subset>.pt` of easy_dcase_task1: a bare tensor (rows, 10), row r for row r of `<subset>.csv`, a list
  beside the file, or one of the data set's, or of its data-efficient splits.

Sources: https://github.com/fschmid56/cpjku_dcase23, release ensemble_logits; https://github.com/yqcai888/easy_dcase_task1.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.tau import DataError, Meta, read_table

TEACHER_LOGITS_URL = "https://github.com/fschmid56/cpjku_dcase23/releases/download/ensemble_logits/ensemble_logits.pt"
OWN_FORM = {"files", "logits", "scenes"}
PREDICTIONS = re.compile(r"predictions_(?P<subset>.+)\.pt")
FOLDS = {"train": "fold1_train.csv", "valid": "fold1_evaluate.csv", "test": "fold1_evaluate.csv"}
# A teacher of this data set is far better than chance on its own training clips; rows of another list are not.
ALIGNED_ACCURACY_OVER_CHANCE = 3.0
MIN_CLIPS_TO_JUDGE = 100


def is_logits(content: Any) -> bool:
    """Whether what `torch.load` returned is a file of logits, not a checkpoint."""
    return isinstance(content, Tensor) or (isinstance(content, Mapping) and content.keys() >= OWN_FORM)


def read_teacher_logits(
    path: Path | str,
    meta: Meta,
    rows: np.ndarray,
    find_split: Callable[[int], Path] | None = None,
    part: str = "training",
) -> np.ndarray:
    """Logits (clip, class) float16 for the clips at `rows` of meta.csv.

    Args:
        find_split: gives the list of a data-efficient split by its percentage, for `predictions_split<n>.pt` without
            `split<n>.csv` beside it; None knows none.
        part: what the clips are called in messages.

    Raises:
        DataError: when the file is no logits file, has other classes, lacks a clip, holds values that are not finite,
            or does not know the labels better than by chance (the rows belong to another list).
    """
    with np.errstate(over="ignore"):  # told below
        logits = read_logits(path, meta, rows, find_split, part).astype(np.float16)
    if not np.isfinite(logits).all():
        raise DataError(f"{path} holds logits beyond the range of 16-bit floats")
    return logits


def read_logits(
    path: Path | str,
    meta: Meta,
    rows: np.ndarray,
    find_split: Callable[[int], Path] | None = None,
    part: str = "training",
) -> np.ndarray:
    """As `read_teacher_logits`, in the precision of the file: (clip, class) float16, float32 or float64."""
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: name the file of teacher logits with --teacher_logits") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        raise DataError(f"{path} is no file of teacher logits: delete it to have it fetched again") from error
    if isinstance(content, dict):
        files, logits = _own_form(path, content, meta)
    else:
        files, logits = _bare_tensor(path, content, meta, find_split)
    row_of = meta.row_of if files is None else {file: row for row, file in enumerate(files)}
    missing = [file for file in meta.files[rows] if file not in row_of]
    if missing:
        raise DataError(f"{path} has no logits for {len(missing)} of {len(rows)} {part} clips, first {missing[0]}")
    selected = logits[[row_of[file] for file in meta.files[rows]]]
    # numpy has no bfloat16, every value of which float32 holds.
    taken = (selected.float() if selected.dtype == torch.bfloat16 else selected).numpy()
    if not np.isfinite(taken).all():
        raise DataError(f"{path} holds logits that are not finite")
    _check_alignment(path, taken, meta, rows, part)
    return taken


def _check_alignment(path: Path, logits: np.ndarray, meta: Meta, rows: np.ndarray, part: str) -> None:
    accuracy = float((logits.argmax(axis=1) == meta.scene[rows]).mean())
    chance = 1 / len(meta.scenes)
    if len(rows) >= MIN_CLIPS_TO_JUDGE and accuracy < min(ALIGNED_ACCURACY_OVER_CHANCE * chance, (1 + chance) / 2):
        raise DataError(
            f"{path} does not fit {meta.root / 'meta.csv'}: the teacher is right on {accuracy:.1%} of the {part} "
            f"clips, chance is {chance:.1%}; the rows belong to another list of clips"
        )


def _own_form(path: Path, content: Mapping[str, Any], meta: Meta) -> tuple[list[str], Tensor]:
    if not content.keys() >= OWN_FORM:
        raise DataError(f"{path} lacks one of files, logits, scenes; it has {', '.join(map(str, [*content][:5]))}")
    files, logits, scenes = content["files"], content["logits"], tuple(content["scenes"])
    if scenes != meta.scenes:
        raise DataError(f"{path} is for the scenes {', '.join(scenes)}, the data set has {', '.join(meta.scenes)}")
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(files), len(scenes)):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"{path} has logits {shape} for {len(files)} files and {len(scenes)} scenes")
    return files, logits


def _bare_tensor(
    path: Path, logits: object, meta: Meta, find_split: Callable[[int], Path] | None
) -> tuple[list[str] | None, Tensor]:
    """File names by row, None for the rows of meta.csv, and the logits."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        raise DataError(f"{path} holds no table of logits (clip, class): delete it to have it fetched again")
    n_rows, n_classes = logits.shape
    if match := PREDICTIONS.fullmatch(path.name):
        source = _subset_list(path, match["subset"], meta, find_split)
        files = read_table(source, ["filename"]).filename.tolist()
        if n_rows != len(files):
            raise DataError(f"{path} has {n_rows} rows of logits, but {source} lists {len(files)} clips")
        if n_classes != len(meta.scenes):
            raise DataError(f"{path} has logits of {n_classes} scenes, the data set has {len(meta.scenes)}")
        return files, logits
    if n_rows not in (len(meta), 2 * len(meta)) or n_classes != len(meta.scenes):
        raise DataError(
            f"{path} has {n_rows} x {n_classes} logits; {meta.root / 'meta.csv'} asks for {len(meta)} (or twice "
            f"that) x {len(meta.scenes)}: the file belongs to another data set"
        )
    return None, logits


def _subset_list(path: Path, subset: str, meta: Meta, find_split: Callable[[int], Path] | None) -> Path:
    """The list whose rows `predictions_<subset>.pt` follows."""
    beside = path.with_name(f"{subset}.csv")
    if beside.is_file():
        return beside
    if subset == "total":
        return meta.root / "meta.csv"
    if subset in FOLDS:
        return meta.root / "evaluation_setup" / FOLDS[subset]
    split = re.fullmatch(r"split(\d+)", subset)
    if split is None or find_split is None:
        raise DataError(f"{path} follows the rows of {subset}.csv: put that list beside it, as {beside}")
    return find_split(int(split[1]))
