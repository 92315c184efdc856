"""Files of the published system that are fetched when they are first needed, into `resources/`."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datasets.files import ContentError
from datasets.impulse_responses import MICIRP_URL
from datasets.tau import SUBSET_URL
from datasets.teacher_logits import TEACHER_LOGITS_URL, is_logits, read_logits_file
from datasets.torch_file import read_torch_file
from helpers.checkpoints.foreign import recognise
from helpers.fetch.download import UnreachableError, fetch
from helpers.fetch.recorded import fetch_recorded
from models import get_model
from models.published import PUBLISHED, Published
from models.state_dicts import differences

log = logging.getLogger(__name__)

RESOURCES = Path(__file__).resolve().parents[2] / "resources"


def micirp_folder(folder: Path = RESOURCES / "dirs", url: str = MICIRP_URL) -> Path:
    """The folder of the 66 MicIRP responses, fetched and checked against resources/micirp.sha256 where missing."""
    lines = (RESOURCES / "micirp.sha256").read_text(encoding="utf-8").splitlines()
    wanted = {file: digest for digest, file in (line.split(maxsplit=1) for line in lines)}
    missing = [file for file in wanted if not (folder / file).is_file()]
    if missing:
        log.info("fetching %d MicIRP impulse responses (Creative Commons) into %s", len(missing), folder)
    with _or_else("name a folder of responses with --dirs_path, or train without them (--dir_prob 0)"):
        for file, digest in wanted.items():
            fetch(f"{url}/{file.replace('&', '%26')}", folder / file, sha256=digest, progress=False)
    return folder


def teacher_logits_file(folder: Path = RESOURCES, url: str = TEACHER_LOGITS_URL) -> Path:
    """The published ensemble's logits for TAU22; size and checksum are recorded once it has loaded."""
    with _or_else("name a file with --teacher_logits, or train on the labels alone (--kd_lambda 1)"):
        return _recorded(url, folder / "ensemble_logits.pt", _check_logits)


def published_file(name: str, folder: Path = RESOURCES, url: str | None = None) -> Path:
    """The weights of a published network; size and checksum are those of its row, or recorded once it has loaded.

    Args:
        name: key of models.published.PUBLISHED.
        url: of the file, where it is not at its authors'.
    """
    row = PUBLISHED[name]
    path, url = folder / row.file, url or row.url
    if row.licence is None and not path.exists():
        log.info("fetching %s; its repository states no licence", url)
    if row.sha256 is not None:
        return fetch(url, path, sha256=row.sha256)
    return _recorded(url, path, partial(_check_published, row))


def pretrained_file(network: str, url: str, folder: Path = RESOURCES) -> Path:
    """Published weights to start a network from; size and checksum are recorded once it has loaded.

    Args:
        network: key of models.MODELS that the file must hold.
    """
    with _or_else("name a file with --pretrained, or none"):
        return _recorded(url, folder / url.rsplit("/", 1)[-1], partial(_check_network, network))


def subset_file(subset: int, folder: Path = RESOURCES / "split_setup", url: str = SUBSET_URL) -> Path:
    """The list of one of TAU22's data-efficient training splits."""
    return _recorded(url.format(subset=subset), folder / f"split{subset}.csv", _check_list)


@contextmanager
def _or_else(remedy: str) -> Iterator[None]:
    """Adds what to do without the file to the message of a download that fails."""
    try:
        yield
    except UnreachableError as error:
        raise UnreachableError(f"{error}; or {remedy}", error.status) from error


def _recorded(url: str, path: Path, check: Callable[[Path], Any]) -> Path:
    return fetch_recorded(url, path, path.with_name("checksums.json"), check)


def _check_logits(path: Path) -> None:
    try:
        if not is_logits(read_logits_file(path)):
            raise ContentError("holds other things")
    except ContentError as error:
        raise ContentError(f"{path} is no file of teacher logits: {error}") from error


def _weights(path: Path) -> Mapping[str, Any]:
    try:
        content = read_torch_file(path)
        if not isinstance(content, Mapping):
            raise ContentError(f"holds a {type(content).__name__}")
    except ContentError as error:
        raise ContentError(f"{path} {error}") from error
    return content


def _check_published(row: Published, path: Path) -> None:
    state = _weights(path)
    with torch.device("meta"):  # names and shapes are all that is wanted
        expected = get_model(row.architecture, **row.options).state_dict()
    if what := differences(state, expected):
        raise ContentError(f"{path} is not the {row.architecture}: {what}")


def _check_network(network: str, path: Path) -> None:
    name = recognise(path, _weights(path))["model"]["name"]
    if name != network:
        raise ContentError(f"{path} holds a {name} network")


def _check_list(path: Path) -> None:
    with path.open("rb") as file:
        header = file.readline(1000)
    if b"filename" not in header.removeprefix(b"\xef\xbb\xbf").strip().split(b"\t"):
        raise ContentError(f"{path} is no list of clips: its first line names no column filename")
