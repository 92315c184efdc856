"""Downloads and unpacks the files of a Zenodo record, one archive after the other, so that little more disk is needed
than the unpacked data takes.

Progress is kept in `<root>/.zenodo_<record>/`: the file list of the record (which Zenodo never changes under a number)
and, for every file that is done, its checksum and the names and sizes of what it left on disk. A run after a kill goes
on at the byte or archive entry where the last one stopped; files that went missing later bring back their archive.
"""

import json
import logging
import lzma
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from helpers.download import (
    DownloadError,
    check_space,
    fetch,
    format_bytes,
    free_bytes,
    get,
    lock_file,
    retry,
    write_json,
)

logger = logging.getLogger(__name__)

ZENODO_API = "https://zenodo.org/api"
# 24-bit audio hardly compresses: TAU22's archives unpack to about 1.1 times their size; the rest is margin
UNPACKED_RATIO = 1.2


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
        record_id, root, keep_archives: as in `download_record`.
        files: all files of the record.
        todo: those not yet done.
        n_download: still to be downloaded.
        n_unpacked: estimate of what unpacking will add, UNPACKED_RATIO per archive byte.
        n_needed: most disk space in use at any moment beyond what is in use now.
        n_free: disk space free now.
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
    except DownloadError as error:
        if error.status in (404, 410):
            message = f"{url}: Zenodo has no record {record_id} (any more); check the number at https://zenodo.org"
            raise DownloadError(message, error.status) from error
        raise
    try:
        files = [_record_file(entry) for entry in answer["files"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{url}: the answer is not a Zenodo record with its files ({error!r}); check the address of the API"
        raise DownloadError(message) from error
    if not files:
        raise DownloadError(f"{url}: the record shows no files; it may be restricted, open it in a browser")
    return files


def plan(record_id: int, files: Iterable[RecordFile], root: Path | str, keep_archives: bool = False) -> Plan:
    """Works out what is left to do and the disk space it needs. Writes nothing."""
    root, files = Path(root), tuple(files)
    todo = _not_done(files, root, _state_dir(root, record_id))
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

    Returns at once, without the network, when everything is in place.

    Args:
        record_id: number of the record.
        root: folder for all of it; made when missing.
        api: address of Zenodo's API.
        keep_archives: keep the archives beside what they held.
        n_tries, progress, backoff: as in `helpers.download.fetch`.
        report: receives the plan and one line per file.

    Returns:
        The folder that holds meta.csv.

    Raises:
        DownloadError: Zenodo cannot be reached or does not know the record; the disk is too small; a file does not fit
            its checksum; an archive is damaged or unsafe; the record holds no meta.csv.
    """
    root = Path(root)
    state = _state_dir(root, record_id)
    state.mkdir(parents=True, exist_ok=True)
    with lock_file(state / "lock"):
        files, todo = _stored_record(state), ()
        if files is None or _not_done(files, root, state):  # addresses may have moved since the list was stored
            files = read_record(record_id, api, n_tries=n_tries, backoff=backoff)
            write_json(state / "record.json", [asdict(file) for file in files])
            work = plan(record_id, files, root, keep_archives)
            todo = work.todo
            report(work.describe())
        for file in set(files) - set(todo):  # left by a kill between the stamp and the deletion
            _delete_archive(root / file.key, _read_state(_stamp(state, file)))
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
            write_json(_stamp(state, file), done)
            _delete_archive(path, done)
        return _meta_folder(record_id, files, root, state)


def fetch_json(url: str, *, n_tries: int = 5, backoff: float = 1.0) -> Any:
    """Asks a web API; returns the decoded answer. Raises DownloadError, with `status` where the server refused."""

    def ask() -> Any:
        with get(url, {"Accept": "application/json"}) as response:
            try:
                return response.json()
            except ValueError as error:
                kind = response.headers.get("Content-Type", "no content type")
                message = f"{url}: the answer is not JSON ({kind}); check the address and that no proxy replaces it"
                raise DownloadError(message) from error

    return retry(ask, n_tries, backoff)


def extract_zip(archive: Path | str, root: Path | str, progress: bool = True) -> list[Path]:
    """Unpacks a zip archive into root, skipping entries that already lie there with their size and CRC.

    Every entry is checked before the first is written, and written under another name until its CRC has been verified.

    Args:
        archive: zip file.
        root: folder; made when missing. Nothing is ever written outside.
        progress: progress bar, on a terminal only.

    Returns:
        All files of the archive, in its order, with root in front.

    Raises:
        DownloadError: the archive is damaged or encrypted, holds links or names that lead outside root, or unpacks to
            more than the disk has free.
    """
    archive, root = Path(archive), Path(root)
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _safe_entries(opened, archive, root)
            todo = [(info, target) for info, target in entries if not _is_unpacked(info, target)]
            n_bytes = sum(info.file_size for info, _ in todo)
            check_space(n_bytes, root, f"unpacking {archive}")
            bar = {"unit": "B", "unit_scale": True, "desc": f"unpacking {archive.name}", "leave": False}
            with tqdm(total=n_bytes, disable=None if progress else True, **bar) as shown:
                for info, target in todo:
                    _unpack(opened, info, target)
                    shown.update(info.file_size)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise DownloadError(
            f"{archive} is not a whole zip archive ({error}); delete it and download it again"
        ) from error
    return [target for info, target in entries if not info.is_dir()]


def _safe_entries(opened: zipfile.ZipFile, archive: Path, root: Path) -> list[tuple[zipfile.ZipInfo, Path]]:
    """Pairs every entry with its place on disk; refuses the archive when one of them is unsafe."""
    entries: dict[Path, zipfile.ZipInfo] = {}
    for info in opened.infolist():
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        target = root / PurePosixPath(name)
        problem = None
        if name.startswith("/") or "\\" in name or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
            problem = "leads outside the folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a special file"
        elif info.flag_bits & 1:
            problem = "is encrypted"
        elif target in entries or target == root:
            problem = "has no name of its own"
        if problem:
            raise DownloadError(f"{archive}: entry {name!r} {problem}; nothing was unpacked, do not use this archive")
        entries[target] = info
    inside = root.resolve()
    for folder in {target.parent for target in entries}:  # a link that already lies in root may lead out of it as well
        if not folder.resolve().is_relative_to(inside):
            raise DownloadError(f"{archive}: {folder} is a link that leads outside {root}; remove it and run again")
    return [(info, target) for target, info in entries.items()]


def _is_unpacked(info: zipfile.ZipInfo, target: Path) -> bool:
    if info.is_dir():
        return target.is_dir()
    if target.is_symlink() or not target.is_file() or target.stat().st_size != info.file_size:
        return False
    crc = 0
    with target.open("rb") as file:
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc == info.CRC


def _unpack(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    if info.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / ".unpacking.part"  # one name: a kill leaves at most one, and the next run reuses it
    try:
        with opened.open(info) as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        if temporary.stat().st_size != info.file_size:
            raise zipfile.BadZipFile(f"{info.filename} is shorter than it says")
        os.replace(temporary, target)
    except OSError as error:
        message = f"{target}: {error.strerror or error} while unpacking; once that is solved, run again to resume"
        raise DownloadError(message) from error
    finally:
        temporary.unlink(missing_ok=True)


def _record_file(entry: dict[str, Any]) -> RecordFile:
    """Takes one entry of Zenodo's list; any error means that it has not the form of one."""
    key, size, checksum, links = entry["key"], entry["size"], entry["checksum"], entry["links"]
    if not key or PurePosixPath(key).name != key or "\\" in key or key.startswith("."):
        raise ValueError(f"unsafe file name {key!r}")
    if not isinstance(size, int) or not re.fullmatch("md5:[0-9a-fA-F]{32}", checksum):
        raise ValueError(f"size {size!r} and checksum {checksum!r} of {key}")
    url = links.get("content") or links["self"]  # where there are both, self describes the file and content is the file
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"address {url!r} of {key}")
    return RecordFile(key, size, checksum.removeprefix("md5:").lower(), url)


def _state_dir(root: Path, record_id: int) -> Path:
    return root / f".zenodo_{record_id}"


def _stamp(state: Path, file: RecordFile) -> Path:
    return state / f"{file.key}.done"


def _read_state(path: Path) -> Any:
    """Decoded json file of ours; None when it is missing or damaged, which only costs doing its part again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged (%s) and ignored", path, error)
        return None


def _stored_record(state: Path) -> list[RecordFile] | None:
    stored = _read_state(state / "record.json")
    return None if stored is None else [RecordFile(**entry) for entry in stored]


def _not_done(files: Iterable[RecordFile], root: Path, state: Path) -> tuple[RecordFile, ...]:
    """Files without a stamp, or whose content is no longer on disk with its size."""
    sizes: dict[str, dict[str, int]] = {}  # of the files in each folder: one listing for all archives that share it
    return tuple(file for file in files if not _is_done(file, root, _read_state(_stamp(state, file)), sizes))


def _is_done(file: RecordFile, root: Path, done: dict | None, sizes: dict[str, dict[str, int]]) -> bool:
    if done is None or done["md5"] != file.md5:
        return False
    for name, size in done["files"].items():
        folder, _, base = name.rpartition("/")
        if folder not in sizes:
            path = root / folder
            items = os.scandir(path) if path.is_dir() else []
            sizes[folder] = {item.name: item.stat().st_size for item in items if item.is_file()}
        if sizes[folder].get(base) != size:
            logger.info("%s is missing or has another size; its archive %s is needed again", root / name, file.key)
            return False
    return True


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
    except (FileNotFoundError, zipfile.BadZipFile):  # a bad one is refused by its checksum when its turn comes
        return round(file.size * UNPACKED_RATIO)
    return sum(info.file_size for info in entries if _bytes_here(root / info.filename) != info.file_size)


def _delete_archive(path: Path, done: dict | None) -> None:
    if done is not None and done["delete_archive"]:
        path.unlink(missing_ok=True)


def _meta_folder(record_id: int, files: Iterable[RecordFile], root: Path, state: Path) -> Path:
    names = [name for file in files for name in _read_state(_stamp(state, file))["files"]]
    found = [name for name in names if f"/{name}".endswith("/meta.csv")]
    if not found:
        raise DownloadError(f"Zenodo record {record_id} holds no meta.csv; it is not a data set laid out like TAU22")
    return (root / min(found, key=lambda name: name.count("/"))).parent
