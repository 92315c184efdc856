"""Downloads that survive a broken line and verify what arrived.

A file comes in as `<name>.part` beside its final place, with `<name>.part.json` saying what it is a part of, and gets
its final name only when it is complete and its checksum fits: whatever carries the final name is whole. Of several
processes that want one file, on one machine or on several with a common file system, one fetches and the others wait.
Pauses between tries are those of urllib3's `Retry`.
"""

import hashlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError, MaxRetryError, NameResolutionError
from urllib3.util import Retry

from datasets.files import locked, matching, read_state, write_json
from helpers.errors import UserError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**16  # small: a connection that breaks loses at most one chunk
TIMEOUT_S = (10.0, 60.0)  # to connect, and between two pieces of an answer
MAX_WAIT_S = 120  # upper bound of every pause, also of one the server asks for
MARGIN_BYTES = 2**24  # left free by downloads of unknown size
# What can be sent back in a header to name a version.
VERSION = matching(lambda s: s is None or (s.isascii() and s.isprintable() and 0 < len(s) < 1000), "must fit a header")
ORIGIN = {"url": str, "version?": VERSION, "total?": (int, type(None))}


class DownloadError(UserError, OSError):
    """A download or an archive that cannot be used; one line with the address or file, the reason and the remedy.

    `status` is the HTTP status that caused it; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class ChecksumError(DownloadError):
    """A file, on disk or on the server, that is not the expected one."""


class UnreachableError(DownloadError):
    """The server gives no answer, or none that holds what was asked for."""


class BrokenError(Exception):
    """An answer that ended early, or with the wrong part; asking again may bring the rest."""


class UnresolvedError(BrokenError):
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
        backoff: the second try follows at once, the third after twice this many seconds, later ones after twice the
            pause before, up to MAX_WAIT_S; chance adds up to `backoff`, so that clients cut off together come apart.

    Raises:
        DownloadError: the file there, or the one that arrived, does not fit; the server cannot be reached, refuses, or
            sends a web page, or nothing where size and checksum are unknown; the disk is too small.
    """
    path, expected = Path(path), {"sha256": sha256, "md5": md5, "size": size}
    part = path.with_name(path.name + ".part")
    if not path.exists():
        with locked(part.with_name(part.name + ".lock"), f"the download of {path}", wait=True, keep=False):
            if not path.exists():  # no other process has brought it
                _Transfer(url, path, part, size, bool(sha256 or md5), progress).complete(backing_off(n_tries, backoff))
                if problem := mismatch(part, **expected):
                    _remove_part(part)
                    raise ChecksumError(f"{url}: what arrived {problem}; it was removed, run again to download it anew")
                os.replace(part, path)
                _remove_part(part)
                return path
    if problem := mismatch(path, **expected):
        raise ChecksumError(f"{path} {problem}; delete it to have it downloaded again from {url}")
    return path


def mismatch(path: Path, *, sha256: str | None = None, md5: str | None = None, size: int | None = None) -> str | None:
    """Says in what a file differs from what is expected of it ("has 3 bytes instead of 5"); None when it fits."""
    if not path.is_file():
        return "is no regular file"
    n_bytes = path.stat().st_size
    if size is not None and n_bytes != size:
        return f"has {n_bytes} bytes instead of {size}"
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected is not None and (found := file_hash(path, name)) != expected.lower():
            return f"has {name} {found} instead of {expected.lower()}"
    return "is empty" if n_bytes == 0 and (sha256, md5, size) == (None, None, None) else None


def file_hash(path: Path, name: str) -> str:
    """Hexadecimal hash of a file; name as in hashlib ("sha256", "md5")."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()


def by_hand(path: Path) -> str:
    """The remedy that always works."""
    return f"a copy fetched by other means may be put at {path.absolute()}"


def free_bytes(path: Path | str) -> int:
    """Free disk space in bytes where path lies or would lie; path and its parents need not exist."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


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


class _Retry(Retry):
    """urllib3's pauses; fails at once where waiting does not help, and says when a server is asked again."""

    def __repr__(self) -> str:  # urllib3 itself says "Retrying (...)" where no connection was made
        return f"try {len(self.history) + 1} of {len(self.history) + self.total + 1}"

    def increment(self, method=None, url=None, response=None, error=None, _pool=None, _stacktrace=None) -> "_Retry":
        if isinstance(error, NameResolutionError) or "CERTIFICATE" in str(error):
            raise MaxRetryError(_pool, url, error) from error
        following = super().increment(method, url, response, error, _pool, _stacktrace)
        if not isinstance(error, HTTPError):
            logger.warning("%s; %r", error or f"{url}: the server answered {response.status}", following)
        return following

    def parse_retry_after(self, retry_after: str) -> float:
        try:
            return super().parse_retry_after(retry_after)
        except (HTTPError, ValueError, OverflowError):  # unreadable: the pause is our own
            return 0.0


def backing_off(n_tries: int, backoff: float) -> Retry:
    """The pauses between tries; arguments as for `fetch`."""
    limits = {"backoff_max": MAX_WAIT_S, "retry_after_max": MAX_WAIT_S}
    passing = {408, 429, *range(500, 600)}
    return _Retry(n_tries - 1, status_forcelist=passing, backoff_factor=backoff, backoff_jitter=backoff, **limits)


def again(action: Callable[[], Any], retry: Retry, n_bytes: Callable[[], int] = lambda: 0) -> Any:
    """Repeats action after BrokenError; UnreachableError once that brought no new top of n_bytes too often in a row.

    A name that does not resolve is asked for once where nothing has arrived before.
    """
    first = most = n_bytes()
    left = retry
    while True:
        try:
            return action()
        except BrokenError as error:
            if n_bytes() > most:
                most, left = n_bytes(), retry
            if isinstance(error, UnresolvedError) and most == first:
                raise _given_up(error, 1) from error
            try:
                left = left.increment(error=error)
            except MaxRetryError:
                raise _given_up(error, retry.total + 1) from error
        left.sleep()


def _given_up(problem: Any, n_tries: int) -> UnreachableError:
    tried = "once" if n_tries == 1 else f"{n_tries} times"
    return UnreachableError(f"{problem} (tried {tried}); check the network and try again later")


@contextmanager
def get(url: str, headers: dict[str, str], retry: Retry) -> Iterator[requests.Response]:
    """GET, asked again until an answer begins; UnreachableError without one, BrokenError while its body is read."""
    with requests.Session() as session:
        session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retry))
        session.mount("https://", requests.adapters.HTTPAdapter(max_retries=retry))
        try:
            response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
        except (requests.RequestException, ValueError, HTTPError) as error:  # the latter of addresses it is led to
            cause = _cause(error)
            message = _described(url, cause)
            if isinstance(cause, socket.gaierror):
                name = re.search("resolve '(.*?)'", str(error))
                message = f"{url}: the name {name[1] if name else 'of the host'} does not resolve ({cause.strerror})"
                raise UnresolvedError(message) from error
            if "CERTIFICATE" in message:
                raise UnreachableError(f"{message}; check the clock and the certificates of this computer") from error
            if isinstance(error, requests.ConnectionError | requests.exceptions.RetryError):
                raise _given_up(message, retry.total + 1) from error
            raise UnreachableError(f"{message}; check the address and where it leads") from error
        with response:
            if (code := response.status_code) not in (200, 206, 416):
                answer = f"{url}: the server answered {code} {response.reason}"
                raise UnreachableError(f"{answer}; check that the address is right and still public", status=code)
            try:
                yield response
            except requests.RequestException as error:
                raise BrokenError(_described(url, _cause(error))) from error


def _cause(error: BaseException) -> BaseException:
    """What happened, inside the nested exceptions of requests and urllib3."""
    names = ("reason", "original_error", "__cause__")
    inside = [*(getattr(error, name, None) for name in names), *error.args[:1]]
    inner = next((item for item in inside if isinstance(item, BaseException)), None)
    return error if inner is None else _cause(inner)


def _described(url: str, cause: BaseException) -> str:
    """One line: the address, the proxy that the environment sets for it, without its password, and the cause."""
    try:
        proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    except ValueError:  # of an address that is none
        proxy = None
    through = f" (through the proxy {proxy.rpartition('@')[2]})" if proxy else ""
    words = " ".join(str(getattr(cause, "strerror", None) or cause).split())
    return f"{url}{through}: {words.rstrip('.') or type(cause).__name__}"


def _remove_part(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".json").unlink(missing_ok=True)


class _Transfer:
    """Brings a part file to its full size; arguments as for `fetch`.

    `origin` is what is known of where the part comes from: its address, version and whole size. Going on with a part
    takes a version, unless a checksum will tell whether that went well.
    """

    def __init__(self, url: str, path: Path, part: Path, size: int | None, has_checksum: bool, progress: bool):
        self.url, self.path, self.part, self.size = url, path, part, size
        self.has_checksum, self.progress = has_checksum, progress
        self.note = part.with_name(part.name + ".json")
        self.origin = read_state(self.note, ORIGIN) or {}

    def complete(self, retry: Retry) -> None:
        """Asks until the file is whole and on the disk; a part that cannot be gone on with later is removed."""
        if self.part.is_symlink():
            logger.warning("%s is a link where a part of a download is kept; it is removed", self.part)
            self.part.unlink()
        if self.part.exists() and not self.part.is_file():  # opening a pipe would wait for somebody to read
            raise DownloadError(f"{self.part} is no regular file, where a part is kept; remove it and run again")
        with self.part.open("ab", buffering=0) as self.file:
            try:
                again(lambda: self.ask(retry), retry, self.n_bytes)
                if self.n_bytes() == 0 and not self.has_checksum and self.size is None:
                    raise UnreachableError(
                        f"{self.url}: the server sent an empty file; check that the address is right"
                    )
                os.fsync(self.file.fileno())
            except BaseException as error:
                kept = "; what arrived is kept, run again to resume"
                if self.n_bytes() == 0 or not self.can_resume():
                    _remove_part(self.part)
                    kept = ""
                if isinstance(error, UnreachableError):
                    raise UnreachableError(f"{error}{kept}; {by_hand(self.path)}", error.status) from error
                if isinstance(error, OSError) and not isinstance(error, DownloadError):  # a full disk
                    message = f"{self.path}: {error.strerror} while writing; once that is solved, run again to resume"
                    raise DownloadError(message) from error
                raise

    def n_bytes(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def can_resume(self) -> bool:
        return self.has_checksum or self.origin.get("version") is not None

    def started_over(self, why: str) -> BrokenError:
        self.file.truncate(0)
        return BrokenError(f"{self.url}: {why}, starting over")

    def ask(self, retry: Retry) -> None:
        """One request, which goes on where the last one ended."""
        version, total_then = self.origin.get("version"), self.origin.get("total")
        whole = total_then if self.size is None else self.size
        is_ours = self.can_resume() and self.origin.get("url", self.url) == self.url
        if not is_ours or (whole is not None and self.n_bytes() > whole):
            self.file.truncate(0)
        if (n_have := self.n_bytes()) and n_have == whole:
            return
        headers = {"Accept-Encoding": "identity"}  # the bytes as they are: lengths and ranges count them
        if n_have:
            headers |= {"Range": f"bytes={n_have}-"} | ({"If-Range": version} if version else {})
        with get(self.url, headers, retry) as response:
            start, total = _extent(response)
            if response.status_code == 416 and n_have and total == n_have and self.has_checksum:
                return  # complete already
            if response.status_code != 200:  # that comes whole: from a server without ranges, or of a changed file
                now = _version(response)
                # Without a checksum nothing else would notice that the file has become another one.
                is_other = now != version and (not self.has_checksum or None not in (now, version))
                is_other |= None not in (total, total_then) and total != total_then
                if start != n_have or (n_have and is_other):
                    raise self.started_over("the server sent another part than asked for, or of another file")
                total = total_then if total is None else total
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
        self.refuse_message(response, chunk)
        if response.status_code == 200:  # not before: a proxy's page must not cost the part
            self.file.truncate(0)
        n_have = self.n_bytes()
        total = self.size if total is None else total
        check_space((total or n_have) - n_have, self.path.parent, f"downloading {self.url}")
        self.origin = {"url": self.url, "version": _version(response), "total": total}
        write_json(self.note, self.origin)
        disable = None if self.progress else True  # None: off where it is not a terminal
        bar = {"unit": "B", "unit_scale": True, "desc": self.path.name, "leave": False}
        with tqdm(total=total, initial=n_have, disable=disable, **bar) as shown:
            while chunk:
                if total is None:
                    purpose = f"going on with {self.url}, of which the server does not tell the size,"
                    check_space(MARGIN_BYTES + len(chunk), self.path.parent, purpose)
                elif n_have + len(chunk) > total:
                    raise self.started_over(f"more than the announced {total} bytes arrived")
                n_have += (n_written := self.file.write(chunk))
                shown.update(n_written)
                chunk = chunk[n_written:] or next(chunks, b"")
        if total is not None and n_have < total:
            raise BrokenError(f"{self.url}: the connection ended after {n_have} of {total} bytes")

    def refuse_message(self, response: requests.Response, chunk: bytes) -> None:
        """Raises UnreachableError for a web page or a JSON message in the place of another file."""
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        is_page = kind == "text/html" or chunk.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))
        is_message = kind == "application/json" and not self.has_checksum
        if (is_page and self.path.suffix not in (".html", ".htm")) or (is_message and self.path.suffix != ".json"):
            raise UnreachableError(
                f"{self.url}: the server sent a {'web page' if is_page else 'JSON message'} instead of "
                f"{self.path.name}; a login or a proxy may be in the way, open the address in a browser"
            )


def _version(response: requests.Response) -> str | None:
    """What names this version of the file in If-Range: a strong ETag, else the date; None where there is neither."""
    etag = response.headers.get("ETag", "W/")
    version = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
    return None if VERSION(version) else version


def _extent(response: requests.Response) -> tuple[int | None, int | None]:
    """(first byte, size of the whole file) of an answer; None for what its headers do not say, or not in digits."""
    named = response.headers.get("Content-Range", "").strip().removeprefix("bytes ")
    if response.status_code == 200:
        named = f"0-/{response.headers.get('Content-Length')}"
    found = re.fullmatch(r"(?:([0-9]{1,15})-[0-9]*|\*)/(?:([0-9]{1,15})|\*)", named)
    start, total = found.groups() if found else (None, None)
    return start and int(start), total and int(total)
