"""Teacher logits: one row of class scores for each training clip, matched by file name.

Two forms are read:
- the published `ensemble_logits.pt`: a bare tensor (rows, 10), row r for row r of TAU22's meta.csv; it holds the rows
  twice, the second half (time-rolled clips) is not used;
- our own: a dict with `files` (list of names), `logits` (clip, class) and `scenes` (the class order).

Source of the first: https://github.com/fschmid56/cpjku_dcase23, release ensemble_logits.
"""

from pathlib import Path

import numpy as np
import torch

from datasets.tau import DataError, Meta

TEACHER_LOGITS_URL = "https://github.com/fschmid56/cpjku_dcase23/releases/download/ensemble_logits/ensemble_logits.pt"
# A teacher of this data set is far better than chance on its own training clips; rows of another list are not.
ALIGNED_ACCURACY_OVER_CHANCE = 3.0
MIN_CLIPS_TO_JUDGE = 100


def read_teacher_logits(path: Path | str, meta: Meta, rows: np.ndarray) -> np.ndarray:
    """Logits (clip, class) float16 for the clips at `rows` of meta.csv.

    Raises:
        DataError: when the file is no logits file, has other classes, lacks a clip, holds values that are not finite,
            or does not know the labels better than by chance (the rows belong to another list).
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: name the file of teacher logits with --teacher_logits") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        raise DataError(f"{path} is no file of teacher logits: delete it to have it fetched again") from error
    if isinstance(content, dict):
        logits = _by_name(path, content, meta, rows)
    else:
        logits = _by_meta_row(path, content, meta, rows)
    if not np.isfinite(logits).all():
        raise DataError(f"{path} holds logits that are not finite")
    accuracy = float((logits.argmax(axis=1) == meta.scene[rows]).mean())
    chance = 1 / len(meta.scenes)
    if len(rows) >= MIN_CLIPS_TO_JUDGE and accuracy < min(ALIGNED_ACCURACY_OVER_CHANCE * chance, (1 + chance) / 2):
        raise DataError(
            f"{path} does not fit {meta.root / 'meta.csv'}: the teacher is right on {accuracy:.1%} of the training "
            f"clips, chance is {chance:.1%}; the rows belong to another list of clips"
        )
    return logits


def _by_name(path: Path, content: dict, meta: Meta, rows: np.ndarray) -> np.ndarray:
    if not {"files", "logits", "scenes"} <= set(content):
        raise DataError(f"{path} lacks one of files, logits, scenes; it has {', '.join(map(str, content))}")
    files, logits, scenes = content["files"], content["logits"], tuple(content["scenes"])
    if scenes != meta.scenes:
        raise DataError(f"{path} is for the scenes {', '.join(scenes)}, the data set has {', '.join(meta.scenes)}")
    if tuple(logits.shape) != (len(files), len(scenes)):
        raise DataError(f"{path} has logits {tuple(logits.shape)} for {len(files)} files and {len(scenes)} scenes")
    row_of = {file: row for row, file in enumerate(files)}
    missing = [file for file in meta.files[rows] if file not in row_of]
    if missing:
        raise DataError(f"{path} has no logits for {len(missing)} of {len(rows)} training clips, first {missing[0]}")
    return logits.half().numpy()[[row_of[file] for file in meta.files[rows]]]


def _by_meta_row(path: Path, logits: object, meta: Meta, rows: np.ndarray) -> np.ndarray:
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        raise DataError(f"{path} holds no table of logits (clip, class): delete it to have it fetched again")
    n_rows, n_classes = logits.shape
    if n_rows not in (len(meta), 2 * len(meta)) or n_classes != len(meta.scenes):
        raise DataError(
            f"{path} has {n_rows} x {n_classes} logits; {meta.root / 'meta.csv'} asks for {len(meta)} (or twice "
            f"that) x {len(meta.scenes)}: the file belongs to another data set"
        )
    return logits[torch.from_numpy(rows)].half().numpy()
