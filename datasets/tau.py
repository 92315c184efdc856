"""The TAU Urban Acoustic Scenes layout: class lists, file names, meta.csv and the split files of one data set.

Source: A. Mesaros, T. Heittola, T. Virtanen, "A multi-device dataset for urban acoustic scene classification", DCASE
Workshop 2018; TAU Urban Acoustic Scenes 2022 Mobile, development dataset, https://zenodo.org/records/6337421.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.known import DATASETS
from helpers.errors import UserError

if TYPE_CHECKING:
    import pandas

# The published order: sorted, and what the output units of every published checkpoint stand for.
SCENES = (
    "airport", "bus", "metro", "metro_station", "park",
    "public_square", "shopping_mall", "street_pedestrian", "street_traffic", "tram",
)  # fmt: skip
RECORDING_DEVICES = ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6")
UNKNOWN_DEVICE = "unknown"  # in evaluation sets: one that nobody trains on
CITIES = (
    "barcelona", "helsinki", "lisbon", "london", "lyon", "milan", "paris", "prague", "stockholm", "vienna",
)  # fmt: skip
DEVICE_GROUPS = {"real": ("a", "b", "c"), "seen": ("s1", "s2", "s3"), "unseen": ("s4", "s5", "s6")}

TAU22 = DATASETS["tau22"]
SUBSETS = (5, 10, 25, 50, 100)  # percent of the training part, DCASE 2024 Task 1
SUBSET_URL = "https://github.com/CPJKU/dcase2024_task1_baseline/releases/download/files/split{subset}.csv"
META_COLUMNS = ("filename", "scene_label", "identifier", "source_label")
RECORDING_COLUMN = "recording"  # may follow them: what must stay together when recordings are held out
TEST_LIST = Path("evaluation_setup", "fold1_test.csv")  # of an evaluation set: all there is
# Absolute paths, drives, folders above, and what no file is called.
LEAVES_FOLDER = re.compile(r"^[/\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)|[\x00-\x1f]")

log = logging.getLogger(__name__)


class DataError(UserError, ValueError):
    """The data set, a store or a list does not fit; the message names the file and the remedy in one line."""


@dataclass(frozen=True)
class ClipName:
    """The parts of `<scene>-<city>-<location>-<recording>-<segment>-<recording device>.wav`."""

    scene: str
    city: str
    location: str
    recording: str
    segment: int
    recording_device: str


def parse_clip_name(file: str) -> ClipName | None:
    """Splits a file name into its parts; None where it does not follow TAU22's pattern."""
    parts = Path(file).stem.split("-")
    if len(parts) != 6 or not re.fullmatch("[0-9]{1,9}", parts[4]):
        return None
    return ClipName(*parts[:4], int(parts[4]), parts[5])


def recording_key(file: str) -> str:
    """What the clips of one recording share over all segments and devices; a name of another pattern stands alone."""
    name = parse_clip_name(file)
    return file if name is None else f"{name.scene}-{name.city}-{name.location}-{name.recording}"


def recordings_of(files: Sequence[str], identifiers: Sequence[str], devices: Sequence[str]) -> tuple[np.ndarray, str]:
    """What each clip was cut from, the same for all devices that recorded it together; and in words how that was found.

    In TAU's names, `<scene>-<city>-<location>-<recording>[-<segment>]-<recording device>` (with a segment since 2022),
    it is what stands before segment and device. For other names the column identifier of meta.csv decides.
    """
    recordings, n_named = [], 0
    for file, identifier, device in zip(files, identifiers, devices, strict=True):
        parts = Path(file).stem.split("-")
        is_named = parts[-1] == device and (len(parts) == 5 or parse_clip_name(file) is not None)
        n_named += is_named
        recordings.append("-".join(parts[:4]) if is_named else f"identifier {identifier}")
    words = "the file names, up to segment and device"
    if n_named == 0:
        words = "the column identifier of meta.csv"
    elif n_named < len(files):
        words += f" (the column identifier for {len(files) - n_named} clips with other names)"
    return np.array(recordings, dtype=object), words


def segment_order(files: Sequence[str]) -> np.ndarray:
    """Order (n,) that puts the segments of one recording by one device side by side, in time."""

    def key(i: int) -> tuple[str, str, int, str]:
        name = parse_clip_name(files[i])
        if name is None:
            return files[i], "", 0, files[i]
        return recording_key(files[i]), name.recording_device, name.segment, files[i]

    return np.array(sorted(range(len(files)), key=key), dtype=np.int64)


def follows(files: Sequence[str]) -> np.ndarray:
    """Whether each clip (n,) is the next segment of the recording, by the same device, of the clip before it."""
    result = np.zeros(len(files), dtype=bool)
    expected = None
    for i, file in enumerate(files):
        name = parse_clip_name(file)
        here = None if name is None else (recording_key(file), name.recording_device, name.segment)
        result[i] = here is not None and here == expected
        expected = None if here is None else (*here[:2], here[2] + 1)
    return result


@dataclass(frozen=True, eq=False)
class Meta:
    """One data set as its meta.csv tells it; arrays (n,) in the order of that file.

    `scene`, `recording_device` and `city` are positions in the name tuples beside them.
    """

    root: Path
    files: np.ndarray  # file names as written in meta.csv, relative to root
    scene: np.ndarray
    recording_device: np.ndarray
    city: np.ndarray
    scenes: tuple[str, ...]
    recording_devices: tuple[str, ...]
    cities: tuple[str, ...]
    recording: np.ndarray | None = None  # what each clip was cut from, see `recordings_of`
    recordings_by: str = ""  # how that was found, in words

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """File name -> row of meta.csv."""
        return {file: row for row, file in enumerate(self.files)}

    @property
    def is_tau22(self) -> bool:
        """Whether this is the published development set: the published logits and splits belong to it."""
        return len(self) == TAU22.n_clips and (self.scenes, self.recording_devices) == (SCENES, RECORDING_DEVICES)


def read_table(path: Path, columns: Sequence[str]) -> "pandas.DataFrame":
    """Reads a tab-separated file, everything as text; checks that `columns` are there.

    Raises:
        DataError: when the file is missing, unreadable, empty or lacks a column.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is missing: name the extracted data set with --dataset_dir or TAU22_DIR, or fetch it with "
            f"`python run_dataset.py download` ({TAU22.page})"
        )
    import pandas  # slow to import, and not needed for --help

    try:
        table = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"{path} is no tab-separated table ({error}): extract it again") from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(table.columns)}")
    if table.empty:
        raise DataError(f"{path} lists no clips: extract the data set again")
    return table


def _encode(values: "pandas.Series", published: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Positions in the published list when it holds every value, else in the sorted values themselves."""
    import pandas

    present = set(values)
    names = published if present <= set(published) else tuple(sorted(present))
    return pandas.Categorical(values, categories=list(names)).codes.astype(np.int64), names


def is_evaluation_set(root: Path | str) -> bool:
    """Whether a folder holds an evaluation set: a list of clips to classify, and none to train or score on."""
    setup = Path(root) / "evaluation_setup"
    labelled = (setup / "fold1_train.csv", setup / "fold1_evaluate.csv")
    return (Path(root) / TEST_LIST).is_file() and not any(path.is_file() for path in labelled)


def _check_filenames(path: Path, files: "pandas.Series") -> None:
    """Raises DataError where a list names a file twice, or one outside of the data set's folder."""
    outside = np.flatnonzero(files.str.contains(LEAVES_FOLDER))
    if len(outside):
        line = outside[0]
        raise DataError(f"{path} line {line + 2}: {files[line]!r} does not lie in the data set's folder")
    twice = files[files.duplicated()]
    if len(twice):
        raise DataError(f"{path} lists {twice.iloc[0]} more than once ({len(twice)} repeated lines): remove them")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A list of clips without labels; arrays (n,) in the order of the list, which submissions keep.

    It has no scenes at all, so that nobody takes a missing label for the first of them.
    """

    root: Path
    files: np.ndarray  # file names as written in the list, relative to root
    recording_device: np.ndarray | None  # names, `unknown` for devices that nobody trains on; None where none are told

    def __len__(self) -> int:
        return len(self.files)


def read_evaluation(root: Path | str) -> Evaluation:
    """Reads `root`/evaluation_setup/fold1_test.csv: the column filename, and device_id where there is one.

    Raises:
        DataError: when it is missing, lacks a column, is empty, names a file twice, or one outside of `root`.
    """
    path = Path(root) / TEST_LIST
    table = read_table(path, ["filename"])
    _check_filenames(path, table.filename)
    devices = None
    if "device_id" in table:
        blank = np.flatnonzero(table.device_id.str.strip() == "")
        if len(blank):
            raise DataError(f"{path} line {blank[0] + 2}: the column device_id is empty")
        devices = table.device_id.str.strip().to_numpy(dtype=object)
    return Evaluation(Path(root), table.filename.to_numpy(dtype=object), devices)


def read_meta(root: Path | str) -> Meta:
    """Reads `root`/meta.csv.

    Blanks around labels are not part of them: they are taken off, and the log says so.

    Raises:
        DataError: when it is missing, lacks a column, is empty, names a file twice, or one outside of `root`.
    """
    path = Path(root) / "meta.csv"
    if is_evaluation_set(root):
        raise DataError(f"{root} is an evaluation set without labels: nothing can be trained or scored on it")
    table = read_table(path, META_COLUMNS)
    for column in META_COLUMNS:
        blank = np.flatnonzero(table[column].str.strip() == "")
        if len(blank):
            raise DataError(f"{path} line {blank[0] + 2}: the column {column} is empty")
    _check_filenames(path, table.filename)
    for column in META_COLUMNS[1:]:
        stripped = table[column].str.strip()
        if n_blank := int((stripped != table[column]).sum()):
            log.warning("%s: blanks around %d values of %s are taken off", path, n_blank, column)
        table[column] = stripped
    scene, scenes = _encode(table.scene_label, SCENES)
    recording_device, recording_devices = _encode(table.source_label, RECORDING_DEVICES)
    city, cities = _encode(table.identifier.str.split("-").str[0], CITIES)
    files = table.filename.to_numpy(dtype=object)
    recording, recordings_by = recordings_of(files, table.identifier, table.source_label)
    if RECORDING_COLUMN in table:
        recording, recordings_by = table[RECORDING_COLUMN].to_numpy(dtype=object), "the column recording of meta.csv"
    return Meta(
        Path(root), files, scene, recording_device, city, scenes, recording_devices, cities, recording, recordings_by
    )


def read_clips(root: Path | str) -> Meta | Evaluation:
    """A data set with labels or without, whichever the folder holds. Raises DataError as the two readers."""
    return read_evaluation(root) if is_evaluation_set(root) else read_meta(root)


def read_split(meta: Meta, path: Path) -> np.ndarray:
    """Rows of meta.csv that `path` (a table with the column filename) lists, ascending.

    The list's own order does not matter, parity with the published loader.

    Raises:
        DataError: when the file cannot be read or lists a clip that meta.csv does not know.
    """
    files = read_table(path, ["filename"]).filename
    rows = np.array(sorted({meta.row_of.get(file, -1) for file in files}), dtype=np.int64)
    if rows[0] < 0:
        unknown = [file for file in files if file not in meta.row_of]
        raise DataError(
            f"{path} lists {len(unknown)} clip(s) that {meta.root / 'meta.csv'} does not have, first {unknown[0]}"
        )
    return rows


def train_rows(meta: Meta) -> np.ndarray:
    return read_split(meta, meta.root / "evaluation_setup" / "fold1_train.csv")


def test_rows(meta: Meta) -> np.ndarray:
    return read_split(meta, meta.root / "evaluation_setup" / "fold1_evaluate.csv")


def hold_out_recordings(meta: Meta, rows: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits `rows` into (kept, held out); about `fraction` of the recordings are held out, whole and on all devices.

    Raises:
        DataError: when one of the two parts would be empty.
    """
    keys = meta.recording[rows].astype(str)
    recordings = np.unique(keys)
    n_held = round(fraction * len(recordings))
    if not 0 < n_held < len(recordings):
        raise DataError(
            f"val_fraction {fraction} of {len(recordings)} recordings leaves one part empty: choose another fraction"
        )
    held = np.random.default_rng(seed).choice(recordings, n_held, replace=False)
    is_held = np.isin(keys, held)
    return rows[~is_held], rows[is_held]


def device_groups(meta: Meta, rows_for_training: np.ndarray) -> dict[str, tuple[str, ...]]:
    """Recording devices by group: real, seen, unseen.

    TAU22's own groups where its device names are used. Another data set does not tell which devices are simulated, so
    there are two groups: devices that occur in the training part, and all others.
    """
    if meta.recording_devices == RECORDING_DEVICES:
        return DEVICE_GROUPS
    in_training = set(meta.recording_device[rows_for_training])
    by_name = {name: i in in_training for i, name in enumerate(meta.recording_devices)}
    return {
        "seen": tuple(name for name, seen in by_name.items() if seen),
        "unseen": tuple(name for name, seen in by_name.items() if not seen),
    }
