"""What every file of ours is written, locked and read with: atomic replacement, one lock, one check of the content."""

import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import IO, Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from helpers.errors import UserError

log = logging.getLogger(__name__)

# What flock answers on a file system without locks (some Lustre and NFS mounts).
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
TEMPORARY = re.compile(r"\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>\d+)\.tmp")


class BusyError(UserError, OSError):
    """Another process holds a lock; one line with the file and what to do."""


class ContentError(UserError, ValueError):
    """What is in a file is not what such a file holds; names the entry, without the file's name."""


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO]:
    """Opens a file that takes the place of `path` once it is written whole: readers see the old or the new content.

    The content is on the disk when the block ends; when it ends with an exception, `path` is as it was. What a killed
    process left beside `path` is removed by the next one that writes it.

    Args:
        mode: "w" (UTF-8 text) or "wb".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{_host()}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link there would be followed
        with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # as from a full disk
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def replacing_folder(path: Path, over: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `path` once the block ends; when it ends with an exception, `path` is as it was.

    Args:
        over: what is at `path` already gives way; else it is refused.

    Raises:
        ContentError: when something is at `path` and must stay.
    """
    if not over and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ContentError(f"{path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all; NaN and infinity are refused."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    with replacing(path) as file:
        file.write(text + "\n")


def plain(value: Any) -> Any:
    """The value in terms of JSON: paths and configs as text and objects, tensors and NumPy numbers as numbers."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"cannot be written as JSON: {value!r} of type {type(value).__name__}")


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files of `path` whose processes, on this machine, have ended."""
    with suppress(OSError):
        for other in path.parent.glob(f"{_escaped(path.name)}.*.tmp"):
            found = TEMPORARY.fullmatch(other.name[len(path.name) :])
            if found and found["host"] == _host() and not _is_alive(int(found["pid"])):
                other.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, what: str, wait: bool = False, keep: bool = True) -> Iterator[None]:
    """Holds the lock file `path`, one process at a time; a killed process loses it.

    On a file system without locks a marker file beside it stands in, which names its process: that of an ended process
    on the same machine is taken over.

    Args:
        path: the lock file, made where missing.
        what: what is in use, for messages: "run abcd1234".
        wait: wait for the other process, and say so once; otherwise that is an error.
        keep: leave the lock file in place; otherwise it goes with the lock.

    Raises:
        BusyError: another process holds it, and `wait` is off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, fallback_to_soft=False)  # its own way round would take an old lock file for one that is held
    try:
        _acquire(lock, what, wait)
    except BusyError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise OSError(f"{path} is a link where a lock file is kept; remove it and run again") from error
        if error.errno not in NO_LOCKS:
            raise
        marker = path.with_name(path.name + ".held")
        log.warning("%s: this file system has no locks (%s); %s stands in for one", path, error.strerror, marker)
        lock = SoftFileLock(marker)
        _acquire(lock, what, wait)
    try:
        yield
    finally:
        if not keep:  # before the release: a process that waits for the removed file then looks for a new one
            with suppress(OSError):
                path.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: BaseFileLock, what: str, wait: bool) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise BusyError(
                f"{what} is in use by another process; wait until that is done, or stop it ({_where(lock)})"
            ) from None
        log.warning("%s is in use by another process: waiting for it (%s)", what, _where(lock))
        lock.acquire()


def _where(lock: BaseFileLock) -> str:
    remedy = "; remove it if its process, on another machine, was killed" if isinstance(lock, SoftFileLock) else ""
    return f"lock: {lock.lock_file}{remedy}"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: when it cannot be read.
        ContentError: when it is no JSON, or nested beyond reason, or no regular file.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for somebody to write
        raise ContentError("no regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ContentError(f"no JSON ({reason})") from error


def read_state(path: Path, schema: Any) -> Any:
    """What a JSON file of ours says about progress; None when it is missing or does not fit, which only costs time.

    Args:
        schema: as an entry of the schema of `check_content`.
    """
    try:
        content = read_json(path)
        check_content({"content": content}, {"content": schema})
        return content
    except FileNotFoundError:
        return None
    except (OSError, ContentError) as error:
        log.warning("%s cannot be used (%s) and is ignored", path, error)
        return None


def check_content(content: Any, schema: Mapping[str, Any], where: str = "") -> None:
    """Compares what was read from a file with what such a file holds.

    Args:
        content: anything.
        schema: key -> what its value must be. That is a type, a tuple of types (`type(None)` among them allows None), a
            schema of a mapping within, a list of one of these for a list of such items, or a function that returns
            what is wrong with a value in words, or None. A key that ends in "?" may be missing; others that the schema
            does not name are allowed. True and False are no numbers here.
        where: name of the mapping that is checked, for messages.

    Raises:
        ContentError: with the first entry that does not fit.
    """
    if not isinstance(content, Mapping):
        raise ContentError(f"{where or 'the content'} is {_name(content)} where a mapping is needed")
    for key, wanted in schema.items():
        name, is_optional = key.removesuffix("?"), key.endswith("?")
        entry = f"{where}.{name}" if where else name
        if name in content:
            _check_value(content[name], wanted, entry)
        elif not is_optional:
            raise ContentError(f"{entry} is missing")


def _check_value(value: Any, wanted: Any, entry: str) -> None:
    if isinstance(wanted, Mapping):
        check_content(value, wanted, entry)
    elif isinstance(wanted, list):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise ContentError(f"{entry} is {_name(value)} where a list is needed")
        for i, item in enumerate(value):
            _check_value(item, wanted[0], f"{entry}[{i}]")
    elif isinstance(wanted, type | tuple):
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ContentError(f"{entry} is {_name(value)} where {names} is needed")
    elif (problem := wanted(value)) is not None:
        raise ContentError(f"{entry} {problem}")


def matching(wanted: Callable[[Any], bool], problem: str) -> Callable[[Any], str | None]:
    """A schema entry from a condition; `problem` is what is said of a value that fails it: "must be positive"."""

    def check(value: Any) -> str | None:
        try:
            return None if wanted(value) else f"{problem}, is {value!r:.60}"
        except (TypeError, ValueError, AttributeError):
            return f"{problem}, is {_name(value)}"

    return check


def _name(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
