"""Unpacks zip archives that may hold anything: nothing outside the folder, nothing half written."""

import logging
import lzma
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from helpers.fetch.download import DownloadError, check_space

logger = logging.getLogger(__name__)

NOTES = re.compile(
    r"\.zenodo_[^/]*(/.*)?|[^/]*\.part(\.json|\.lock)?|(.*/)?\.unpacking\.part", re.IGNORECASE | re.DOTALL
)
# What zipfile raises for archives that are damaged.
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError, IndexError,
    KeyError, OverflowError, struct.error,
)  # fmt: skip


def extract_zip(archive: Path | str, root: Path | str, progress: bool = True) -> list[Path]:
    """Unpacks a zip archive into root, skipping entries that already lie there with their size and CRC.

    Every entry is checked before the first is written, and written under another name until its CRC has been verified.
    Names that are kept for the progress of downloads are left out, with a warning.

    Args:
        archive: zip file.
        root: folder; made when missing. Nothing is ever written outside.
        progress: progress bar, on a terminal only.

    Returns:
        All files of the archive but those left out, in its order, with root in front.

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
    except ZIP_ERRORS as error:
        raise DownloadError(
            f"{archive} is not a whole zip archive ({error}); delete it and download it again"
        ) from error
    return [target for info, target in entries if not info.is_dir()]


def _safe_entries(opened: zipfile.ZipFile, archive: Path, root: Path) -> list[tuple[zipfile.ZipInfo, Path]]:
    """Pairs every entry with its place on disk; refuses the archive when one of them is unsafe."""
    entries, notes = {}, []
    for info in opened.infolist():
        if is_inside(info.filename) and NOTES.fullmatch(str(PurePosixPath(info.filename))):
            notes.append(info.filename)
            continue
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        target = root / PurePosixPath(name)
        problem = None
        if not is_inside(name):
            problem = "leads outside the folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a special file"
        elif info.flag_bits & 1:
            problem = "is encrypted"
        elif target in entries or target in (root, archive):
            problem = "has no name of its own"
        if problem:
            raise DownloadError(f"{archive}: entry {name!r} {problem}; nothing was unpacked, do not use this archive")
        entries[target] = info
    inside = root.resolve()
    for folder in {target.parent for target in entries}:  # a link that already lies in root may lead out of it as well
        if not folder.resolve().is_relative_to(inside):
            raise DownloadError(f"{archive}: {folder} is a link that leads outside {root}; remove it and run again")
    if notes:
        what = "are notes about the progress of a download and are left out"
        logger.warning("%s: %d entries %s, first %r", archive, len(notes), what, notes[0])
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
        temporary.unlink(missing_ok=True)  # a link there would be followed
        with opened.open(info) as source, temporary.open("xb") as file:
            shutil.copyfileobj(source, file, 2**20)
        if temporary.stat().st_size != info.file_size:
            raise zipfile.BadZipFile(f"{info.filename} is shorter than it says")
        os.replace(temporary, target)
    except OSError as error:
        message = f"{target}: {error.strerror or error} while unpacking; once that is solved, run again to resume"
        raise DownloadError(message) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_inside(name: str) -> bool:
    """Whether a path, with slashes, stays below the folder that it is taken in."""
    is_absolute = name.startswith("/") or re.match("[A-Za-z]:", name) is not None
    return bool(name) and not is_absolute and "\\" not in name and "\0" not in name and ".." not in name.split("/")
