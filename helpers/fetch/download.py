"""Downloads that survive a broken line and verify what arrived.

A file comes in as `<name>.part` beside its final place, with `<name>.part.json` saying what it is a part of, and gets
its final name only when it is complete and its checksum fits: whatever carries the final name is whole. Of several
processes that want one file, on one machine or on several with a common file system, one fetches and the others wait.
"""

import hashlib
import logging
import os
import random
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError, NameResolutionError

from datasets.files import ContentError, check_content, locked, matching, read_json, write_json
from helpers.errors import UserError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**16  # small: a connection that breaks loses at most one chunk
TIMEOUT_S = (10.0, 60.0)  # to connect, and between two pieces of an answer
MAX_WAIT_S = 120.0  # upper bound of every pause, also of one the server asks for
MARGIN_BYTES = 2**24  # left free by downloads of unknown size
MAX_ANSWER_BYTES = 2**24  # of a web API
ORIGIN = {"url": str, "version?": (str, type(None)), "total?": (int, type(None))}
RECORD = {
    "sha256": matching(lambda text: re.fullmatch("[0-9a-f]{64}", text) is not None, "must be 64 hexadecimal digits"),
    "size": matching(lambda n: type(n) is int and n >= 0, "must be a number of bytes"),
}


class DownloadError(UserError, OSError):
    """A download or an archive that cannot be used; one line with the address or file, the reason and the remedy.

    Args:
        message: that line.
        status: HTTP status that caused it; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class ChecksumError(DownloadError):
    """A file, on disk or on the server, that is not the expected one."""


class UnreachableError(DownloadError):
    """The server gives no answer, or none that holds what was asked for."""


class TryAgain(Exception):
    """A failure that may pass; wait_s is the pause the server asks for, in seconds."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class UnresolvedError(TryAgain):
    """A host name that does not resolve: without a network, or misspelt. It may pass where the host answered before."""


def fetch(
    url: str,
    path: Path | str,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    n_tries: int = 5,
    progress: bool = True,
    backoff: float = 1.0,
) -> Path:
    """Downloads one file, or returns at once when it is there and fits. Memory use does not grow with the file.

    Args:
        url: http or https address.
        path: where the file goes; missing folders are made.
        sha256, md5: expected checksum, hexadecimal; None is not checked.
        size: expected size in bytes; None is not checked.
        n_tries: tries in a row that bring nothing new before it gives up; one that got further starts the count anew.
        progress: progress bar, on a terminal only.
        backoff: pause before the second try in seconds; doubles with every try, up to MAX_WAIT_S.

    Raises:
        DownloadError: the file there, or the one that arrived, does not fit; the server cannot be reached, refuses, or
            sends a web page, or nothing where size and checksum are unknown; the disk is too small.
    """
    path = Path(path)
    expected = {"sha256": sha256, "md5": md5, "size": size}
    if path.exists():
        return _kept(path, url, expected)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with locked(part.with_name(part.name + ".lock"), f"the download of {path}", wait=True, keep=False):
        if path.exists():  # another process brought it
            return _kept(path, url, expected)
        with _open_part(part) as file:
            transfer = _Transfer(url, path, file, size, sha256 is not None or md5 is not None, progress)
            try:
                retry(transfer.run, n_tries, backoff, n_bytes=transfer.n_bytes)
                if transfer.n_bytes() == 0 and not any(value is not None for value in expected.values()):
                    raise UnreachableError(f"{url}: the server sent an empty file; check that the address is right")
                os.fsync(file.fileno())
            except BaseException as error:
                kept = "; what arrived is kept, run again to resume"
                if transfer.n_bytes() == 0 or not transfer.can_resume:
                    _remove_part(part)
                    kept = ""
                if isinstance(error, UnreachableError):
                    message = f"{error}{kept}; a copy fetched by other means may be put at {path.absolute()}"
                    raise UnreachableError(message, error.status) from error
                raise
        if problem := mismatch(part, **expected):
            _remove_part(part)
            raise ChecksumError(f"{url}: what arrived {problem}; it was removed, run again to download it anew")
        os.replace(part, path)
        _remove_part(part)
    return path


def _kept(path: Path, url: str, expected: Mapping[str, Any]) -> Path:
    """The file that is there already.

    Raises:
        ChecksumError: it is not the expected one.
    """
    if not path.is_file():
        problem = "is no regular file"
    elif any(value is not None for value in expected.values()):
        problem = mismatch(path, **expected)
    else:
        problem = None if path.stat().st_size else "is empty"
    if problem:
        raise ChecksumError(f"{path} {problem}; delete it to have it downloaded again from {url}")
    return path


def fetch_recorded(
    url: str,
    path: Path | str,
    checksums: Path | str,
    check: Callable[[Path], Any] | None = None,
    **options: Any,
) -> Path:
    """Downloads a file whose checksum nobody published: the first use records it, every later one compares.

    Size and SHA-256 go into the json file `checksums`, under the path relative to that file's folder. A file that is
    there but not recorded is recorded as it is; what does not pass `check` never is. The whole file is hashed at every
    use, with no shortcut over its time stamp: the files are small (a second per gigabyte), and a swapped file can carry
    any time stamp.

    Args:
        url, path: as for `fetch`.
        checksums: json file, made when it is missing.
        check: raises ValueError for a file that is not what it should be; None takes any.
        options: n_tries, progress and backoff of `fetch`.

    Raises:
        DownloadError: as `fetch`; the file does not pass `check`, or differs from its record; the json file is not
            readable.
    """
    path, checksums = Path(path), Path(checksums)
    key = Path(os.path.relpath(path.resolve(), checksums.resolve().parent)).as_posix()
    if key not in _read_records(checksums):
        lock = checksums.with_name(checksums.name + ".lock")
        with locked(lock, f"the download of {path}", wait=True, keep=False):
            records = _read_records(checksums)  # again: another process may have added to it
            if key not in records:
                was_there = path.exists()
                fetch(url, path, **options)
                if check is not None:
                    _prove(path, url, check, was_there)
                record = {"url": url, "size": path.stat().st_size, "sha256": file_hash(path, "sha256")}
                write_json(checksums, records | {key: record})
                return path
    record = _read_records(checksums)[key]
    try:
        return fetch(url, path, sha256=record["sha256"], size=record["size"], **options)
    except ChecksumError as error:
        raise ChecksumError(f"{error}; or, to accept the change, remove '{key}' from {checksums}") from error


def _prove(path: Path, url: str, check: Callable[[Path], Any], was_there: bool) -> None:
    """Raises DownloadError for a file that is not what it should be; one that was just fetched is removed."""
    try:
        check(path)
    except ValueError as error:
        if was_there:
            message = f"{error}; put the right file there, or delete it to have it downloaded from {url}"
        else:
            path.unlink()
            message = (
                f"{url}: what arrived is not the file that is published there ({error}); it was removed, run again "
                f"later, or put a copy fetched by other means at {path.absolute()}"
            )
        raise DownloadError(message) from error


def mismatch(path: Path, *, sha256: str | None = None, md5: str | None = None, size: int | None = None) -> str | None:
    """Says in what a file differs from what is expected of it ("has 3 bytes instead of 5"); None when it fits."""
    n_bytes = path.stat().st_size
    if size is not None and n_bytes != size:
        return f"has {n_bytes} bytes instead of {size}"
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected is not None and (found := file_hash(path, name)) != expected.lower():
            return f"has {name} {found} instead of {expected.lower()}"
    return None


def file_hash(path: Path, name: str) -> str:
    """Hexadecimal hash of a file; name as in hashlib ("sha256", "md5")."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()


def free_bytes(path: Path | str) -> int:
    """Free disk space in bytes where path lies or would lie; path and its parents need not exist."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(n_bytes: int, folder: Path, purpose: str) -> None:
    """Raises DownloadError when fewer than n_bytes are free where folder lies or would lie."""
    if n_bytes > (n_free := free_bytes(folder)):
        raise DownloadError(
            f"{purpose} needs {format_bytes(n_bytes)} of disk space, but {folder} has {format_bytes(n_free)} free; "
            "make room or choose another folder"
        )


def format_bytes(n_bytes: float) -> str:
    """Size for people, in decimal units: "27.5GB"."""
    return tqdm.format_sizeof(n_bytes, "B")


def read_state(path: Path, schema: Any) -> Any:
    """What a JSON file of ours says about progress; None when it is missing or does not fit, which only costs time.

    A link or a special file in its place is not followed.

    Args:
        schema: as an entry of the schema of `check_content`.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ContentError("is no regular file")
        content = read_json(path)
        check_content({"content": content}, {"content": schema})
        return content
    except FileNotFoundError:
        return None
    except (OSError, ContentError) as error:
        logger.warning("%s cannot be used (%s) and is ignored", path, error)
        return None


def retry(action: Callable[[], Any], n_tries: int, backoff: float, n_bytes: Callable[[], int] = lambda: 0) -> Any:
    """Repeats action while it raises TryAgain; after n_tries in a row without a new top of n_bytes, UnreachableError.

    A name that does not resolve is asked for once where nothing has arrived before.
    """
    first = most = n_bytes()
    n_failed = 0
    while True:
        try:
            return action()
        except TryAgain as error:
            failure = error
        if n_bytes() > most:
            most, n_failed = n_bytes(), 0
        n_failed += 1
        if n_failed >= n_tries or (isinstance(failure, UnresolvedError) and most == first):
            tried = "once" if n_failed == 1 else f"{n_failed} times"
            raise UnreachableError(f"{failure} (tried {tried}); check the network and try again later")
        wait_s = failure.wait_s
        if wait_s is None:  # jitter, so that many clients cut off together do not come back together
            wait_s = backoff * 2 ** (n_failed - 1) * random.uniform(0.5, 1.0)
        wait_s = min(wait_s, MAX_WAIT_S)
        logger.warning("%s; next try in %.0f s (%d of %d)", failure, wait_s, n_failed + 1, n_tries)
        time.sleep(wait_s)


@contextmanager
def get(url: str, headers: dict[str, str]) -> Iterator[requests.Response]:
    """GET; failures, also those while the body is read, become TryAgain where they may pass, else DownloadError."""
    try:
        with _request(url, headers) as response:
            code, answer = response.status_code, f"{url}: the server answered {response.status_code} {response.reason}"
            if code >= 500 or code in (408, 429):
                raise TryAgain(answer, _retry_after(response))
            if code not in (200, 206, 416):
                raise UnreachableError(f"{answer}; check that the address is right and still public", status=code)
            yield response
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        reason = _reason(error)
        if isinstance(error, requests.exceptions.SSLError) and "CERTIFICATE" in reason:
            raise UnreachableError(f"{url}: {reason}; check the clock and the certificates of this computer") from error
        kind = UnresolvedError if isinstance(_inner(error), NameResolutionError) else TryAgain
        raise kind(f"{url}{_through(url)}: {reason}") from error
    except requests.RequestException as error:
        message = f"{url}{_through(url)}: {_reason(error)}; check the address and where it leads"
        raise UnreachableError(message) from error


def _request(url: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
    except requests.RequestException:
        raise
    except (ValueError, HTTPError) as error:  # what requests lets through of addresses that it is led to
        raise requests.exceptions.InvalidURL(str(error)) from error


def _through(url: str) -> str:
    """Names the proxy that the environment sets for an address, without its password; empty where there is none."""
    try:
        proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    except ValueError:  # of an address that is none
        return ""
    return f" (through the proxy {proxy.rpartition('@')[2]})" if proxy else ""


def _inner(error: requests.RequestException) -> Any:
    """What happened, inside the nested exceptions of requests and urllib3."""
    inner = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)
    return getattr(inner, "original_error", inner)  # of a proxy


def _reason(error: requests.RequestException) -> str:
    """The short reason in words."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    inner = _inner(error)
    system = getattr(getattr(inner, "__cause__", None), "strerror", None)
    if isinstance(inner, NameResolutionError):
        name = re.search("resolve '(.*?)'", str(inner))
        return f"the name {name[1] if name else 'of the host'} does not resolve ({system or 'no address'})"
    if system:
        return str(system)
    if isinstance(inner, BaseException) and inner.args:
        inner = inner.args[0]
    return " ".join(str(inner).split()).rstrip(".")


def _whole_number(text: str) -> int | None:
    """The number in a header; None where there is none (other scripts have digits that int() does not know)."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def _retry_after(response: requests.Response) -> float | None:
    """The pause asked for in seconds, given as a number or a date; None when there is none that can be read."""
    value = response.headers.get("Retry-After", "").strip()
    if (seconds := _whole_number(value)) is not None:
        return float(seconds)
    try:
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


def _open_part(part: Path) -> BinaryIO:
    """Opens the part file for appending. A link in its place is removed, not followed.

    Raises:
        DownloadError: something else that is no file is in its place.
    """
    if part.is_symlink():
        logger.warning("%s is a link where a part of a download is kept; it is removed", part)
        part.unlink()
    problem = f"{part} is no regular file, where a part of a download is kept; remove it and run again"
    if part.exists() and not part.is_file():  # opening a pipe would wait for somebody to read
        raise DownloadError(problem)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return open(os.open(part, flags, 0o666), "ab", buffering=0)


class _Transfer:
    """Brings a part file to its full size; every `run` is one request, which resumes where the last one ended.

    Args:
        url, path, size, progress: as in `fetch`.
        file: part file, open for appending.
        has_checksum: the result will be verified, so resuming is safe even where the server names no version.
    """

    def __init__(self, url: str, path: Path, file: BinaryIO, size: int | None, has_checksum: bool, progress: bool):
        self.url, self.path, self.file, self.size = url, path, file, size
        self.has_checksum, self.progress = has_checksum, progress
        self.origin_file = path.with_name(path.name + ".part.json")
        self.can_resume = True  # until an answer tells otherwise

    def n_bytes(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def start_over(self, why: str) -> TryAgain:
        self.file.truncate(0)
        return TryAgain(f"{self.url}: {why}, starting over")

    def run(self) -> None:
        origin = read_state(self.origin_file, ORIGIN) or {}  # none or a torn one: origin unknown
        version, total_then = _usable(origin.get("version")), origin.get("total")
        whole = total_then if self.size is None else self.size
        same = origin.get("url", self.url) == self.url and (self.has_checksum or version is not None)
        if not same or (whole is not None and self.n_bytes() > whole):
            self.file.truncate(0)
        n_have = self.n_bytes()
        if n_have and n_have == whole:
            return
        headers = {"Accept-Encoding": "identity"}  # the bytes as they are: lengths and ranges count them
        if n_have:
            headers["Range"] = f"bytes={n_have}-"
            if version is not None:
                headers["If-Range"] = version
        with get(self.url, headers) as response:
            start, total = _content_range(response)
            if response.status_code == 416 and n_have and total == n_have and self.has_checksum:
                return  # complete already
            if response.status_code == 416:
                raise self.start_over("the part on disk does not belong to the file")
            if response.status_code == 206:
                now = _version(response)
                # Without a checksum nothing else would notice that the file has become another one.
                is_other = now != version if not self.has_checksum else version and now and version != now
                if start != n_have or (n_have and is_other):
                    raise self.start_over("the server sent another part than asked for")
                if n_have and None not in (total, total_then) and total != total_then:
                    raise self.start_over(f"the file has {total} bytes now and had {total_then}")
                total = total_then if total is None else total
            else:  # a server without ranges, or the file has changed: all of it comes
                total = _whole_number(response.headers.get("Content-Length", ""))
            self.receive(response, total)

    def receive(self, response: requests.Response, total: int | None) -> None:
        """Takes the answer's body; total is the size of the whole file in bytes, None where the server is silent."""
        if self.size is not None and total not in (None, self.size):
            raise ChecksumError(
                f"{self.url}: the server offers {total} bytes instead of {self.size}; the published file has changed, "
                "look for a newer version of this project"
            )
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise DownloadError(f"{self.url}: the server sends it {encoding}-encoded, unasked; use another mirror")
        chunks = response.iter_content(CHUNK_BYTES)
        chunk = next(chunks, b"")
        self.refuse_web_page(response, chunk)
        if response.status_code == 200:  # not before: a proxy's page must not cost the part
            self.file.truncate(0)
        n_have = self.n_bytes()
        total = self.size if total is None else total
        check_space((total or n_have) - n_have, self.path.parent, f"downloading {self.url}")
        version = _version(response)
        self.can_resume = self.has_checksum or version is not None
        write_json(self.origin_file, {"url": self.url, "version": version, "total": total})
        disable = None if self.progress else True  # None: off where it is not a terminal
        bar = {"unit": "B", "unit_scale": True, "desc": self.path.name, "leave": False}
        with tqdm(total=total, initial=n_have, disable=disable, **bar) as shown:
            while chunk:
                if total is not None and n_have + len(chunk) > total:
                    raise self.start_over(f"more than the announced {total} bytes arrived")
                if total is None and free_bytes(self.path.parent) < MARGIN_BYTES + len(chunk):
                    self.file.truncate(0)
                    raise DownloadError(
                        f"{self.url}: the server does not tell the size, and {format_bytes(n_have)} have filled the "
                        f"disk of {self.path.parent}; what arrived was removed, make room or choose another folder"
                    )
                n_have += (n_written := self.write(chunk))
                shown.update(n_written)
                chunk = chunk[n_written:] or next(chunks, b"")
        if total is not None and n_have < total:
            raise TryAgain(f"{self.url}: the connection ended after {n_have} of {total} bytes")

    def write(self, chunk: bytes) -> int:
        try:
            return self.file.write(chunk)
        except OSError as error:
            message = f"{self.path}: {error.strerror} while writing; once that is solved, run again to resume"
            raise DownloadError(message) from error

    def refuse_web_page(self, response: requests.Response, chunk: bytes) -> None:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        is_page = chunk.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))
        sent = None
        if (is_page or kind == "text/html") and self.path.suffix not in (".html", ".htm"):
            sent = "a web page"
        elif kind == "application/json" and self.path.suffix != ".json" and not self.has_checksum:
            sent = "a JSON message"
        if sent is not None:
            raise UnreachableError(
                f"{self.url}: the server sent {sent} instead of {self.path.name}; a login or a proxy may be in the "
                "way, open the address in a browser"
            )


def _version(response: requests.Response) -> str | None:
    """What names this version of the file in If-Range: a strong ETag, else the date; None where there is neither."""
    etag = response.headers.get("ETag")
    return _usable(etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified"))


def _usable(version: str | None) -> str | None:
    """None for what cannot be sent back in a header."""
    return version if version and version.isascii() and version.isprintable() and len(version) < 1000 else None


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """(first byte, size of the whole file) out of Content-Range; None for what it does not say."""
    value = response.headers.get("Content-Range", "").strip()
    found = re.fullmatch(r"bytes (?:([0-9]+)-[0-9]+|\*)/([0-9]+|\*)", value)
    start, whole = found.groups() if found else (None, None)
    return _whole_number(start or ""), _whole_number(whole or "")


def _read_records(checksums: Path) -> dict[str, dict[str, Any]]:
    if not checksums.exists():
        return {}
    try:
        if not checksums.is_file():
            raise ContentError("no regular file")
        records = read_json(checksums)
        check_content(records, {})
        for key, record in records.items():
            check_content(record, RECORD, key)
    except ContentError as error:
        raise DownloadError(f"{checksums} is damaged ({error}); restore it, or delete it to record anew") from error
    return records


def _remove_part(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
