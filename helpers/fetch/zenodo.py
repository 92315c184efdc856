"""Downloads and unpacks the files of a Zenodo record, one archive after the other, so that little more disk is needed
than the unpacked data takes.

Progress is kept in `<root>/.zenodo_<record>/`: the file list of the record (which Zenodo never changes under a number)
and, for every file that is done, its checksum and the names and sizes of what it left on disk. A run after a kill goes
on at the byte or archive entry where the last one stopped; files that went missing later bring back their archive.
What is read back from there is checked as what Zenodo answers is, and nothing of it ever comes out of an archive.
"""

import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets.files import ContentError, check_content, locked, matching, read_state, write_json
from datasets.tau import TEST_LIST
from helpers.fetch.download import (
    DownloadError,
    UnreachableError,
    again,
    backing_off,
    check_space,
    fetch,
    format_bytes,
    free_bytes,
    get,
)
from helpers.fetch.zip_archive import ZIP_ERRORS, extract_zip, is_inside

logger = logging.getLogger(__name__)

ZENODO_API = "https://zenodo.org/api"
# 24-bit audio hardly compresses: TAU22's archives unpack to about 1.1 times their size; the rest is margin
UNPACKED_RATIO = 1.2
MAX_ANSWER_BYTES = 2**24  # of the API
MAX_BYTES = 10**15  # of a file; more is a damaged number
# One file of a record, from Zenodo or from our notes; first of all no name that leads elsewhere.
RECORD_FILE = {
    "key": matching(lambda key: is_inside(key) and "/" not in key and not key.startswith("."), "must be a file name"),
    "size": matching(lambda size: type(size) is int and 0 <= size <= MAX_BYTES, "must be a number of bytes"),
    "md5": matching(lambda md5: re.fullmatch("[0-9a-f]{32}", md5) is not None, "must be 32 hexadecimal digits"),
    "url": matching(lambda url: url.startswith(("http://", "https://")), "must be a web address"),
}
STAMP = {
    "md5": str,
    "delete_archive": bool,
    "files": matching(
        lambda files: all(is_inside(name) and type(size) is int for name, size in files.items()),
        "must be sizes of files below the folder",
    ),
}


@dataclass(frozen=True)
class RecordFile:
    """One file of a record: name, size in bytes, published MD5 (hexadecimal), download address."""

    key: str
    size: int
    md5: str
    url: str

    @property
    def is_zip(self) -> bool:
        return self.key.lower().endswith(".zip")


@dataclass(frozen=True)
class Plan:
    """What is left to do for a record, and the disk space it takes; sizes in bytes.

    Args:
        n_unpacked: estimate of what unpacking will add, UNPACKED_RATIO per archive byte.
        n_needed: most disk space in use at any moment beyond what is in use now.
    """

    record_id: int
    root: Path
    keep_archives: bool
    files: tuple[RecordFile, ...]
    todo: tuple[RecordFile, ...]
    n_download: int
    n_unpacked: int
    n_needed: int
    n_free: int

    def describe(self) -> str:
        """Three lines for the terminal."""
        fate = "are kept" if self.keep_archives else "are deleted one by one as they are unpacked"
        return (
            f"Zenodo record {self.record_id}: {len(self.todo)} of {len(self.files)} files to do, "
            f"{format_bytes(self.n_download)} to download\n"
            f"Unpacked into {self.root}: about {format_bytes(self.n_unpacked)}; archives {fate}\n"
            f"Disk space needed on the way: {format_bytes(self.n_needed)}; free: {format_bytes(self.n_free)}"
        )


def read_record(record_id: int, api: str = ZENODO_API, *, n_tries: int = 5, backoff: float = 1.0) -> list[RecordFile]:
    """Asks Zenodo which files a record has.

    Raises:
        DownloadError: unreachable, no such record, or an answer of another form than Zenodo's.
    """
    url = f"{api.rstrip('/')}/records/{record_id}"
    try:
        answer = fetch_json(url, n_tries=n_tries, backoff=backoff)
        files = _checked([_entry(item) for item in answer["files"]])
    except DownloadError as error:
        if error.status in (404, 410):
            message = f"{url}: Zenodo has no record {record_id} (any more); check the number at https://zenodo.org"
            raise DownloadError(message, error.status) from error
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{url}: the answer is not a Zenodo record with its files ({error!r}); check the address of the API"
        raise DownloadError(message) from error
    if not files:
        raise DownloadError(f"{url}: the record shows no files; it may be restricted, open it in a browser")
    return files


def _entry(item: dict[str, Any]) -> dict[str, Any]:
    """Takes one entry of Zenodo's list; any error means that it has not the form of one."""
    links, md5 = item["links"], item["checksum"].lower()
    url = links.get("content") or links["self"]  # where there are both, self describes the file and content is the file
    return {"key": item["key"], "size": item["size"], "md5": md5.removeprefix("md5:"), "url": url}


def _checked(entries: list[dict[str, Any]]) -> list[RecordFile]:
    """Raises ContentError for what no record holds."""
    check_content({"files": entries}, {"files": [RECORD_FILE]})
    if len({entry["key"] for entry in entries}) < len(entries):
        raise ContentError("two files of one name")
    return [RecordFile(**{name: entry[name] for name in RECORD_FILE}) for entry in entries]


def plan(record_id: int, files: Iterable[RecordFile], root: Path | str, keep_archives: bool = False) -> Plan:
    """Works out what is left to do and the disk space it needs. Writes nothing."""
    root, files = Path(root), tuple(files)
    todo = _not_done(files, root, root / f".zenodo_{record_id}")
    in_use = most = n_download = n_unpacked = 0
    for file in todo:  # the order of download_record
        here = _bytes_here(root / file.key)
        unpacked = _unpacked_size(root / file.key, file, root) if file.is_zip else 0
        n_download += max(file.size - here, 0)
        n_unpacked += unpacked
        in_use += max(file.size - here, 0) + unpacked
        most = max(most, in_use)
        if file.is_zip and not keep_archives:
            in_use -= file.size
    return Plan(record_id, root, keep_archives, files, todo, n_download, n_unpacked, most, free_bytes(root))


def download_record(
    record_id: int,
    root: Path | str,
    *,
    api: str = ZENODO_API,
    keep_archives: bool = False,
    n_tries: int = 5,
    progress: bool = True,
    backoff: float = 1.0,
    report: Callable[[str], None] = logger.info,
) -> Path:
    """Downloads every file of a record into root, verifies it, unpacks the zip archives there and deletes them.

    Returns at once, without the network, when everything is in place. Waits while another process does the same.

    Args:
        record_id: number of the record.
        root: folder for all of it; made when missing.
        api: address of Zenodo's API.
        keep_archives: keep the archives beside what they held.
        n_tries, progress, backoff: as in `helpers.fetch.download.fetch`.
        report: receives the plan and one line per file.

    Returns:
        The folder that holds meta.csv, or evaluation_setup with the list of an evaluation set.

    Raises:
        DownloadError: Zenodo cannot be reached or does not know the record; the disk is too small; a file does not fit
            its checksum; an archive is damaged or unsafe; the record holds neither.
    """
    root = Path(root)
    state = root / f".zenodo_{record_id}"
    if state.is_symlink():
        raise DownloadError(
            f"{state} is a link, and progress is kept in a folder of that name; remove it and run again"
        )
    state.mkdir(parents=True, exist_ok=True)
    with locked(state / "lock", f"the download into {root}", wait=True):
        files, todo = _stored_record(state), ()
        if files is None or _not_done(files, root, state):
            files = _current_record(record_id, files, api, n_tries, backoff)
            write_json(state / "record.json", [asdict(file) for file in files])
            work = plan(record_id, files, root, keep_archives)
            todo = work.todo
            report(work.describe())
        for file in set(files) - set(todo):  # left by a kill between the stamp and the deletion
            _delete_archive(root / file.key, _read_stamp(state, file))
        if todo:
            check_space(work.n_needed, root, f"Zenodo record {record_id}")
        for number, file in enumerate(todo, start=1):
            report(f"{file.key}: {number} of {len(todo)}, {format_bytes(file.size)}")
            path = root / file.key
            fetch(file.url, path, md5=file.md5, size=file.size, n_tries=n_tries, progress=progress, backoff=backoff)
            left = extract_zip(path, root, progress=progress) if file.is_zip else [path]
            if hasattr(os, "sync"):
                os.sync()  # the clips must be on the disk, not only in memory, before their archive goes
            names = {item.relative_to(root).as_posix(): item.stat().st_size for item in left}
            done = {"md5": file.md5, "delete_archive": file.is_zip and not keep_archives, "files": names}
            write_json(state / f"{file.key}.done", done)
            _delete_archive(path, done)
        return _meta_folder(record_id, files, root, state)


def _current_record(
    record_id: int, stored: list[RecordFile] | None, api: str, n_tries: int, backoff: float
) -> list[RecordFile]:
    """The files as Zenodo lists them now (addresses may have moved), or as stored where it cannot be reached."""
    try:
        return read_record(record_id, api, n_tries=n_tries, backoff=backoff)
    except UnreachableError as error:
        if error.status is not None:
            raise
        if stored is None:
            raise UnreachableError(
                f"{error}; or fetch the data set by other means (https://zenodo.org/records/{record_id}), unpack all "
                "archives into one folder, and name that to the other commands with --dataset_dir"
            ) from error
        logger.warning("%s; going on with the list of files stored earlier", error)
        return stored


def fetch_json(url: str, *, n_tries: int = 5, backoff: float = 1.0) -> Any:
    """Asks a web API; returns the decoded answer. Raises DownloadError, with `status` where the server refused."""

    retry = backing_off(n_tries, backoff)

    def ask() -> Any:
        with get(url, {"Accept": "application/json"}, retry) as response:
            content = bytearray()
            for chunk in response.iter_content(2**16):
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise DownloadError(f"{url}: the answer is larger than any of a web API; check the address")
            try:
                return json.loads(content)
            except (ValueError, RecursionError) as error:
                kind = response.headers.get("Content-Type", "no content type")
                message = f"{url}: the answer is not JSON ({kind}); check the address and that no proxy replaces it"
                raise DownloadError(message) from error

    return again(ask, retry)


def _stored_record(state: Path) -> list[RecordFile] | None:
    """The record's files as noted, checked like Zenodo's answer; None when that is missing or damaged."""
    try:
        return _checked(read_state(state / "record.json", [RECORD_FILE]) or []) or None
    except ContentError as error:
        logger.warning("%s is damaged (%s) and ignored", state / "record.json", error)
        return None


def _read_stamp(state: Path, file: RecordFile) -> dict[str, Any] | None:
    """What is noted of a file that is done; None when that is missing or damaged, which only costs doing it again."""
    return read_state(state / f"{file.key}.done", STAMP)


def _not_done(files: Iterable[RecordFile], root: Path, state: Path) -> tuple[RecordFile, ...]:
    """Files without a stamp, or whose content is no longer on disk with its size."""

    @cache  # one listing for all archives that share a folder
    def sizes(folder: Path) -> dict[str, int]:
        items = os.scandir(folder) if folder.is_dir() else []
        return {item.name: item.stat().st_size for item in items if item.is_file()}

    def is_done(file: RecordFile) -> bool:
        done = _read_stamp(state, file)
        if done is None or done["md5"] != file.md5:
            return False
        for name, size in done["files"].items():
            folder, _, base = name.rpartition("/")
            if sizes(root / folder).get(base) != size:
                logger.info("%s is missing or has another size; its archive %s is needed again", root / name, file.key)
                return False
        return True

    return tuple(file for file in files if not is_done(file))


def _bytes_here(path: Path) -> int:
    """Bytes of a file, or of its part, that an earlier run left."""
    for candidate in (path, path.with_name(path.name + ".part")):
        if candidate.exists():
            return candidate.stat().st_size
    return 0


def _unpacked_size(path: Path, file: RecordFile, root: Path) -> int:
    """Bytes that unpacking will add: exact for an archive that is here, else estimated."""
    try:
        with zipfile.ZipFile(path) as opened:
            entries = opened.infolist()
        return sum(info.file_size for info in entries if _bytes_here(root / info.filename) != info.file_size)
    except (OSError, *ZIP_ERRORS):  # a bad one is refused by its checksum when its turn comes
        return round(file.size * UNPACKED_RATIO)


def _delete_archive(path: Path, done: dict | None) -> None:
    if done is not None and done["delete_archive"] and path.suffix.lower() == ".zip":
        path.unlink(missing_ok=True)


def _meta_folder(record_id: int, files: Iterable[RecordFile], root: Path, state: Path) -> Path:
    names = [name for file in files for name in (_read_stamp(state, file) or {"files": ()})["files"]]
    for listing in ("meta.csv", TEST_LIST.as_posix()):
        found = [name for name in names if f"/{name}".endswith(f"/{listing}")]
        if found:
            place = min(found, key=lambda name: name.count("/"))
            return root / place.removesuffix(listing)
    raise DownloadError(
        f"Zenodo record {record_id} holds no meta.csv and no {TEST_LIST.name}; it is not a data set laid out like TAU22"
    )
