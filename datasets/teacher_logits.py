"""Teacher logits: one row of class scores for each clip, matched by file name.

Four forms are read:
- our own (written by run_teacher_logits.py): a dict with `files` (list of names), `logits` (clip, class) and `scenes`
  (the class order); what else is in it tells where it comes from;
- the published `ensemble_logits.pt`: a bare tensor (rows, 10), row r for row r of TAU22's meta.csv; it holds the rows
  twice, the second half (time-rolled clips) is not used;
- `predictions_<subset>.pt` of easy_dcase_task1: a bare tensor (rows, 10), row r for row r of `<subset>.csv`, a list
  beside the file, or one of the data set's, or of its data-efficient splits;
- the table of a challenge entry, parted by tabs or commas: filename, scene_label, and a column of logits or
  probabilities for each scene, in any order.

Sources: https://github.com/fschmid56/cpjku_dcase23, release ensemble_logits; https://github.com/yqcai888/easy_dcase_task1.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from datasets.files import ContentError, check_content
from datasets.tau import DataError, Meta, read_table
from datasets.torch_file import read_torch_file

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

TEACHER_LOGITS_URL = "https://github.com/fschmid56/cpjku_dcase23/releases/download/ensemble_logits/ensemble_logits.pt"
OWN_FORM = {"files": [str], "logits": Tensor, "scenes": [str]}
TABLE_COLUMNS = ("filename", "scene_label")  # what a table begins with; a column for each scene follows
PREDICTIONS = re.compile(r"predictions_(?P<subset>.+)\.pt")
FOLDS = {"train": "fold1_train.csv", "valid": "fold1_evaluate.csv", "test": "fold1_evaluate.csv"}
# A teacher of this data set is far better than chance on its own training clips; rows of another list are not.
ALIGNED_ACCURACY_OVER_CHANCE = 3.0
MIN_CLIPS_TO_JUDGE = 100
MIN_PROBABILITY = 1e-7  # what a probability of 0 is taken for: it was rounded


def is_logits(content: Any) -> bool:
    """Whether what a file holds are logits, not a checkpoint."""
    return isinstance(content, Tensor) or (isinstance(content, Mapping) and content.keys() >= OWN_FORM.keys())


def read_logits_file(path: Path) -> Any:
    """What a file of teacher logits holds: a bare tensor, or our own form, in which tables come as well.

    Raises:
        OSError: when it is missing or cannot be read.
        ContentError: when it is neither a table nor a file of `torch.save`.
    """
    if path.is_file() and begins_as_table(path):
        return _table(path)
    return read_torch_file(path)


def begins_as_table(path: Path) -> bool:
    """Whether a file begins as a table of scores does."""
    with path.open("rb") as file:
        return re.match(rb'(\xef\xbb\xbf)?"?filename"?[\t,;]', file.read(20)) is not None


def read_score_table(path: Path) -> tuple["pandas.DataFrame", list[str], np.ndarray]:
    """A table that is parted by tabs, commas or semicolons, its scenes, and its scores (clip, class) float64.

    Raises:
        ContentError: for bytes that are no text, rows of unequal length, or scores that are no numbers.
    """
    import pandas  # slow to import, and not needed for --help

    try:
        table = pandas.read_csv(path, sep=None, engine="python", encoding="utf-8-sig", skipinitialspace=True)
    except (ValueError, pandas.errors.ParserError) as error:
        raise ContentError(f"is no table that can be read ({error})") from error
    table.columns = [str(column).strip() for column in table.columns]
    scenes = [column for column in table.columns if column not in TABLE_COLUMNS]
    try:
        return table, scenes, table[scenes].to_numpy(dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ContentError(f"holds scores that are no numbers ({error})") from error


def _table(path: Path) -> dict[str, Any]:
    table, scenes, values = read_score_table(path)
    if len(values) and (values >= 0).all() and (np.abs(values.sum(axis=1) - 1) < 0.01 * len(scenes)).all():
        values = np.log(np.maximum(values, MIN_PROBABILITY))  # log-probabilities are logits
    files = [str(file).strip() for file in table.filename]
    return {"files": files, "logits": torch.from_numpy(values), "scenes": scenes, "is_table": True}


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
        content = read_logits_file(path)
        if isinstance(content, Mapping):
            check_content(content, OWN_FORM)
            files, logits = _own_form(path, content, meta)
        elif isinstance(content, Tensor):
            files, logits = _bare_tensor(path, content, meta, find_split)
        else:
            raise ContentError(f"holds an object of type {type(content).__name__}")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: name the file of teacher logits with --teacher_logits") from error
    except ContentError as error:
        raise DataError(f"{path} is no file of teacher logits: {error}") from error
    row_of = meta.row_of if files is None else _row_of(path, files, logits)
    missing = [file for file in meta.files[rows] if file not in row_of]
    if missing:
        raise DataError(f"{path} has no logits for {len(missing)} of {len(rows)} {part} clips, first {missing[0]}")
    selected = logits[[row_of[file] for file in meta.files[rows]]]
    # numpy has no bfloat16, every value of which float32 holds.
    taken = (selected.float() if selected.dtype not in (torch.float16, torch.float64) else selected).numpy()
    if not np.isfinite(taken).all():
        raise DataError(f"{path} holds logits that are not finite")
    _check_alignment(path, taken, meta, rows, part, is_named=isinstance(content, Mapping))
    return taken


def _row_of(path: Path, files: Sequence[str], logits: Tensor) -> dict[str, int]:
    """File name -> row; a clip may be listed again with the same row.

    Raises:
        DataError: for a clip with two different rows.
    """
    row_of: dict[str, int] = {}
    for row, file in enumerate(files):
        first = row_of.setdefault(file, row)
        if first != row and not torch.equal(logits[first], logits[row]):
            raise DataError(f"{path} names {file} twice, with different logits: leave one of them in it")
    return row_of


def _check_alignment(
    path: Path, logits: np.ndarray, meta: Meta, rows: np.ndarray, part: str, is_named: bool
) -> None:  # fmt: skip
    """Rows without names that know no labels are of another list; with names it is a bad teacher, and said so."""
    accuracy = float((logits.argmax(axis=1) == meta.scene[rows]).mean())
    chance = 1 / len(meta.scenes)
    enough = min(ALIGNED_ACCURACY_OVER_CHANCE * chance, (1 + chance) / 2)
    if len(rows) < MIN_CLIPS_TO_JUDGE or accuracy >= enough:
        return
    found = f"the teacher is right on {accuracy:.1%} of the {part} clips, chance is {chance:.1%}"
    if not is_named:
        raise DataError(
            f"{path} does not fit {meta.root / 'meta.csv'}: {found}; the rows belong to another list of clips"
        )
    log.warning("%s: %s", path, found)


def _own_form(path: Path, content: Mapping[str, Any], meta: Meta) -> tuple[list[str], Tensor]:
    files, scenes = list(content["files"]), tuple(content["scenes"])
    is_table = content.get("is_table") is True
    if scenes != meta.scenes and not (is_table and sorted(scenes) == sorted(meta.scenes)):
        raise DataError(f"{path} is for the scenes {', '.join(scenes)}, the data set has {', '.join(meta.scenes)}")
    logits = _plain(content["logits"])
    if tuple(logits.shape) != (len(files), len(scenes)):
        raise DataError(f"{path} has logits {tuple(logits.shape)} for {len(files)} files and {len(scenes)} scenes")
    if is_table:  # its columns have names
        logits = logits[:, [scenes.index(scene) for scene in meta.scenes]]
        known, folder = set(meta.row_of), "audio/"
        files = [folder + file if file not in known and folder + file in known else file for file in files]
    return files, logits


def _plain(logits: Tensor) -> Tensor:
    """Without what training, or saving a part of a network, leaves on a tensor.

    Raises:
        ContentError: for other values than floating-point ones that lie in the file.
    """
    if logits.layout != torch.strided or logits.device.type != "cpu" or not logits.is_floating_point():
        kind = f"{logits.layout} {logits.dtype} on {logits.device}".replace("torch.", "")
        raise ContentError(f"its logits are {kind}, where floating-point values are needed")
    return logits.detach()


def _bare_tensor(
    path: Path, logits: Tensor, meta: Meta, find_split: Callable[[int], Path] | None
) -> tuple[list[str] | None, Tensor]:
    """File names by row, None for the rows of meta.csv, and the logits."""
    logits = _plain(logits)
    if logits.ndim != 2:
        raise ContentError(f"its tensor has the shape {tuple(logits.shape)}, where (clip, class) is needed")
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
    split = re.fullmatch(r"split([0-9]{1,9})", subset)
    if split is None or find_split is None:
        raise DataError(f"{path} follows the rows of {subset}.csv: put that list beside it, as {beside}")
    return find_split(int(split[1]))
