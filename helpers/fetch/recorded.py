"""Downloads whose checksum nobody published: the first use records it, every later one compares."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets.files import ContentError, check_content, locked, matching, read_json, write_json
from helpers.fetch.download import ChecksumError, DownloadError, by_hand, fetch, file_hash

RECORD = {
    "sha256": matching(lambda text: re.fullmatch("[0-9a-f]{64}", text) is not None, "must be 64 hexadecimal digits"),
    "size": matching(lambda n: type(n) is int and n >= 0, "must be a number of bytes"),
}


def fetch_recorded(
    url: str, path: Path | str, checksums: Path | str, check: Callable[[Path], Any] | None = None, **options: Any
) -> Path:
    """Downloads a file, or compares the one that is there with what the first use recorded.

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
    if record := _read_records(checksums).get(key):
        try:
            return fetch(url, path, sha256=record["sha256"], size=record["size"], **options)
        except ChecksumError as error:
            raise ChecksumError(f"{error}; or, to accept the change, remove '{key}' from {checksums}") from error
    with locked(checksums.with_name(checksums.name + ".lock"), f"the download of {path}", wait=True, keep=False):
        records = _read_records(checksums)
        if key not in records:
            was_there = path.exists()
            fetch(url, path, **options)
            try:
                if check is not None:
                    check(path)
            except ValueError as error:
                remedy = f"put the right file there, or delete it to have it downloaded from {url}"
                if was_there:
                    raise DownloadError(f"{error}; {remedy}") from error
                path.unlink()
                what = f"{url}: what arrived is not the file that is published there ({error})"
                raise DownloadError(f"{what}; it was removed, run again later, or {by_hand(path)}") from error
            record = {"url": url, "size": path.stat().st_size, "sha256": file_hash(path, "sha256")}
            write_json(checksums, records | {key: record})
            return path
    return fetch_recorded(url, path, checksums, check, **options)  # another process has recorded it


def _read_records(checksums: Path) -> dict[str, dict[str, Any]]:
    try:
        records = read_json(checksums)
        check_content(records, {})
        for key, record in records.items():
            check_content(record, RECORD, key)
        return records
    except FileNotFoundError:
        return {}
    except ContentError as error:
        raise DownloadError(f"{checksums} is damaged ({error}); restore it, or delete it to record anew") from error
