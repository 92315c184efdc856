"""The public data sets that the toolkit knows: one row each, with Zenodo record, folder and published counts."""

from dataclasses import dataclass
from pathlib import Path

TASK_2022 = "https://dcase.community/challenge2022/task-low-complexity-acoustic-scene-classification"
TASK_2024 = "https://dcase.community/challenge2024/task-data-efficient-low-complexity-acoustic-scene-classification"


@dataclass(frozen=True)
class DataSet:
    """A published data set in TAU's layout.

    Args:
        title: for people.
        folder: name of its folder in the archives.
        record: number of its Zenodo record; None where it is not known here, see `page`.
        n_clips: audio files; None is not published.
        n_train, n_test: clips of fold1_train.csv and fold1_evaluate.csv; None for evaluation sets, which have neither.
        seconds: length of a clip, at 44.1 kHz.
        page: where it is described.
    """

    title: str
    folder: str
    record: int | None
    n_clips: int | None
    n_train: int | None = None
    n_test: int | None = None
    seconds: int = 1
    page: str = ""

    @property
    def is_labelled(self) -> bool:
        return self.n_train is not None


def _tau(year: int, kind: str, record: int | None, *counts: int | None, seconds: int = 1, page: str = "") -> DataSet:
    page = page or f"https://zenodo.org/records/{record}"
    title = f"TAU Urban Acoustic Scenes {year} Mobile, {kind} set"
    return DataSet(
        title, f"TAU-urban-acoustic-scenes-{year}-mobile-{kind}", record, *counts, seconds=seconds, page=page
    )


# Keys are the choices on the command line. The evaluation sets of 2022 and 2023 have the same number of clips.
DATASETS = {
    "tau22": _tau(2022, "development", 6337421, 230_350, 139_620, 29_680),
    "tau20": _tau(2020, "development", 3819968, 23_035, 13_962, 2_968, seconds=10),
    "eval21": _tau(2021, "evaluation", 4767109, None, seconds=10),
    "eval22": _tau(2022, "evaluation", None, 118_800, page=TASK_2022),
    "eval23": _tau(2023, "evaluation", 7870258, 118_800),
    "eval24": _tau(2024, "evaluation", None, 135_730, page=TASK_2024),
    "eval25": _tau(2025, "evaluation", 15517945, 178_930),
}


def known_as(root: Path, n_clips: int, is_labelled: bool) -> DataSet | None:
    """The published data set that a folder is, whole or not, by its name or else by the number of its clips."""
    name = root.resolve().name
    alike = [row for row in DATASETS.values() if row.is_labelled == is_labelled]
    by_name = [row for row in alike if row.folder == name]
    by_count = [row for row in alike if row.n_clips == n_clips and is_labelled]
    return next(iter(by_name + by_count), None)
