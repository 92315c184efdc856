"""Files of the published system that are fetched when they are first needed, into `resources/`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.files import locked
from datasets.impulse_responses import MICIRP_URL
from datasets.tau import SUBSET_URL
from datasets.teacher_logits import TEACHER_LOGITS_URL
from helpers.download import fetch, fetch_recorded
from models.passt import ARCHITECTURES, RELEASES
from models.teachers import RELEASE, TEACHERS

PUBLISHED_RUN = "c0a7nzin"
PUBLISHED_URL = (
    "https://raw.githubusercontent.com/fschmid56/cpjku_dcase23/2e20abaa64264f227c50696e5a43d4c706543ff4/"
    f"DCASE23_Task1/{PUBLISHED_RUN}/checkpoints/epoch%3D149-step%3D81900.ckpt"
)
PUBLISHED_SHA256 = "41a1ff72cadb90f6ce0345ed961822f7d0a77ab92b5fcafe9e07d00d891ce118"

log = logging.getLogger(__name__)

RESOURCES = Path(__file__).resolve().parent.parent / "resources"


def micirp_folder(folder: Path = RESOURCES / "dirs", url: str = MICIRP_URL) -> Path:
    """The folder of the 66 MicIRP responses, fetched and checked against resources/micirp.sha256 where missing."""
    lines = (RESOURCES / "micirp.sha256").read_text(encoding="utf-8").splitlines()
    wanted = {file: digest for digest, file in (line.split(maxsplit=1) for line in lines)}
    with _alone(*(folder / file for file in wanted)) as missing:
        if missing:
            log.info("fetching %d MicIRP impulse responses (Creative Commons) into %s", len(missing), folder)
        for file, digest in wanted.items():
            fetch(f"{url}/{file.replace('&', '%26')}", folder / file, sha256=digest, progress=False)
    return folder


def teacher_logits_file(folder: Path = RESOURCES, url: str = TEACHER_LOGITS_URL) -> Path:
    """The published ensemble's logits for TAU22; size and checksum are recorded at the first download."""
    return _recorded(url, folder / "ensemble_logits.pt")


def teacher_file(name: str, folder: Path = RESOURCES, url: str = RELEASE) -> Path:
    """The weights of a published teacher; size and checksum are recorded at the first download.

    Args:
        name: key of models.teachers.TEACHERS.
        url: of the folder that the file is in.
    """
    file = TEACHERS[name].file
    return _recorded(f"{url}/{file}", folder / file)


def passt_file(arch: str, folder: Path = RESOURCES, url: str = RELEASES) -> Path:
    """PaSST's weights from AudioSet; size and checksum are recorded at the first download.

    Raises:
        ValueError: for an architecture without such weights.
    """
    weights = ARCHITECTURES[arch].weights
    if weights is None:
        raise ValueError(f"{arch} has no weights from AudioSet: name a file with --pretrained, or none")
    return _recorded(f"{url}/{weights}", folder / Path(weights).name)


def subset_file(subset: int, folder: Path = RESOURCES / "split_setup", url: str = SUBSET_URL) -> Path:
    """The list of one of TAU22's data-efficient training splits."""
    return _recorded(url.format(subset=subset), folder / f"split{subset}.csv")


def published_checkpoint(folder: Path = RESOURCES, url: str = PUBLISHED_URL) -> Path:
    """The published CP-Mobile student, fetched when missing."""
    path = folder / f"{PUBLISHED_RUN}.ckpt"
    with _alone(path):
        return fetch(url, path, sha256=PUBLISHED_SHA256)


def _recorded(url: str, path: Path) -> Path:
    with _alone(path):
        return fetch_recorded(url, path, path.with_name("checksums.json"))


@contextmanager
def _alone(*paths: Path) -> Iterator[list[Path]]:
    """Those of the files in one folder that are missing, for one process at a time: the others wait, and find them."""
    if all(path.is_file() for path in paths):
        yield []
        return
    folder = paths[0].parent
    with locked(folder / ".lock", f"the folder {folder}", wait=True):
        yield [path for path in paths if not path.is_file()]
