"""Files of the published system that are fetched when they are first needed, into `resources/`."""

import logging
from pathlib import Path

from datasets.impulse_responses import MICIRP_URL
from datasets.tau import SUBSET_URL
from datasets.teacher_logits import TEACHER_LOGITS_URL
from helpers.download import fetch, fetch_recorded

log = logging.getLogger(__name__)

RESOURCES = Path(__file__).resolve().parent.parent / "resources"


def micirp_folder(folder: Path = RESOURCES / "dirs", url: str = MICIRP_URL) -> Path:
    """The folder of the 66 MicIRP responses, fetched and checked against resources/micirp.sha256 where missing."""
    lines = (RESOURCES / "micirp.sha256").read_text(encoding="utf-8").splitlines()
    wanted = {file: digest for digest, file in (line.split(maxsplit=1) for line in lines)}
    missing = [file for file in wanted if not (folder / file).is_file()]
    if missing:
        log.info("fetching %d MicIRP impulse responses (Creative Commons) into %s", len(missing), folder)
    for file, digest in wanted.items():
        fetch(f"{url}/{file.replace('&', '%26')}", folder / file, sha256=digest, progress=False)
    return folder


def teacher_logits_file(folder: Path = RESOURCES, url: str = TEACHER_LOGITS_URL) -> Path:
    """The published ensemble's logits for TAU22; size and checksum are recorded at the first download."""
    return fetch_recorded(url, folder / "ensemble_logits.pt", folder / "checksums.json")


def subset_file(subset: int, folder: Path = RESOURCES / "split_setup", url: str = SUBSET_URL) -> Path:
    """The list of one of TAU22's data-efficient training splits."""
    return fetch_recorded(url.format(subset=subset), folder / f"split{subset}.csv", folder / "checksums.json")
