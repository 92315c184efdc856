"""Downloads against a local server that cuts, stalls, lies and refuses."""

import errno
import fcntl
import gc
import hashlib
import io
import json
import logging
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from helpers.fetch import download
from helpers.fetch.download import DownloadError, fetch, free_bytes
from helpers.fetch.recorded import fetch_recorded
from tests.http_server import FileServer, Served

pytestmark = pytest.mark.slow

CONTENT = hashlib.sha256(b"a file of 300,000 bytes").digest() * 9375
OTHER = hashlib.sha256(b"another version of it").digest() * 9375
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def direct_and_fast(monkeypatch):
    """No proxy for the local server; chunks small enough that little is lost at a cut."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "CHUNK_BYTES", 1000)
    gc.disable()  # what it would finalise while a parser is at its recursion limit fails, and fails the test
    yield
    gc.enable()


@pytest.fixture
def server():
    with FileServer() as running:
        yield running


@pytest.fixture
def serve(server):
    """serve(content, faults...) -> address of /data.bin."""

    def put(content: bytes = CONTENT, **faults) -> str:
        server.files["/data.bin"] = Served(content, **faults)
        return server.url("/data.bin")

    return put


def quick(url, path, **options):
    return fetch(url, path, backoff=0.001, **options)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_downloads_verifies_and_leaves_nothing_else(server, serve, tmp_path):
    path = tmp_path / "new" / "folder" / "data.bin"
    assert quick(serve(), path, sha256=SHA256, md5=MD5.upper(), size=len(CONTENT)) == path
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["data.bin"]
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_downloads_an_empty_file(serve, tmp_path):
    assert quick(serve(b""), tmp_path / "data.bin", size=0).read_bytes() == b""
    assert names(tmp_path) == ["data.bin"]


def test_a_file_that_fits_is_not_asked_for_again(server, serve, tmp_path):
    url = serve()
    (tmp_path / "data.bin").write_bytes(CONTENT)
    quick(url, tmp_path / "data.bin", sha256=SHA256, size=len(CONTENT))
    assert server.requests == []


@pytest.mark.parametrize("expected", [{"sha256": SHA256}, {"md5": MD5}, {"size": len(CONTENT)}], ids=str)
def test_a_file_that_does_not_fit_is_named_and_kept(serve, tmp_path, expected):
    path = tmp_path / "data.bin"
    path.write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"data\.bin has .* instead of .*delete it") as caught:
        quick(serve(), path, **expected)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == b"mine"


def test_resumes_where_the_connection_broke(server, serve, tmp_path):
    url = serve(drop_after=100_000, n_drops=2, etag='"v1"')
    path = quick(url, tmp_path / "data.bin", n_tries=2)  # two drops, but each brings something new
    assert path.read_bytes() == CONTENT
    starts = [int(value.removeprefix("bytes=").removesuffix("-")) for value in server.ranges("/data.bin")[1:]]
    assert len(starts) == 2 and 95_000 < starts[0] <= 100_000 and 190_000 < starts[1] <= 200_000
    assert server.requests[1][1]["If-Range"] == '"v1"'


def test_a_later_call_resumes(server, serve, tmp_path):
    url = serve(drop_after=100_000, n_drops=1, etag='"v1"')
    with pytest.raises(DownloadError, match="run again to resume"):
        quick(url, tmp_path / "data.bin", n_tries=1)
    part = tmp_path / "data.bin.part"
    n_have = part.stat().st_size
    assert n_have > 95_000
    assert quick(url, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.ranges("/data.bin") == [None, f"bytes={n_have}-"]


def test_without_etag_resumes_only_when_a_checksum_will_tell(server, serve, tmp_path):
    for checksum, resumes in (({}, False), ({"md5": MD5}, True)):
        url = serve(drop_after=100_000, n_drops=1)
        path = tmp_path / f"{resumes}.bin"
        server.requests.clear()
        assert quick(url, path, **checksum).read_bytes() == CONTENT
        assert (server.ranges("/data.bin")[1] is not None) == resumes


def test_a_date_names_the_version_where_there_is_no_etag(server, serve, tmp_path):
    url = serve(drop_after=100_000, n_drops=1, headers={"Last-Modified": "Fri, 03 Mar 2023 10:20:13 GMT"})
    server.files["/data.bin"].ignore_if_range = True
    assert quick(url, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.requests[1][1]["If-Range"] == "Fri, 03 Mar 2023 10:20:13 GMT"


@pytest.mark.parametrize("ignore_if_range", [False, True], ids=["answers with 200", "answers with 206"])
def test_a_file_changed_in_between_starts_over(serve, tmp_path, ignore_if_range):
    with pytest.raises(DownloadError):
        quick(serve(OTHER, drop_after=100_000, etag='"v1"'), tmp_path / "data.bin", n_tries=1)
    url = serve(etag='"v2"', ignore_if_range=ignore_if_range)
    assert quick(url, tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_part_of_another_address_is_dropped(server, serve, tmp_path):
    server.files["/old.bin"] = Served(OTHER, drop_after=100_000, etag='"v1"')
    with pytest.raises(DownloadError):
        quick(server.url("/old.bin"), tmp_path / "data.bin", n_tries=1)
    assert quick(serve(etag='"v1"'), tmp_path / "data.bin", sha256=SHA256).read_bytes() == CONTENT
    assert server.ranges("/data.bin") == [None]


@pytest.mark.parametrize("fault", ["ignore_range", "wrong_range"])
def test_starts_over_where_the_server_cannot_resume(server, serve, tmp_path, fault, caplog):
    url = serve(drop_after=100_000, n_drops=1, etag='"v1"', **{fault: True})
    assert quick(url, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.ranges("/data.bin")[1] is not None
    assert ("another part than asked for" in caplog.text) == (fault == "wrong_range")


def test_a_server_that_cannot_resume_and_always_breaks_ends(server, serve, tmp_path):
    with pytest.raises(DownloadError, match=r"ended after|IncompleteRead"):
        quick(serve(drop_after=100_000, ignore_range=True), tmp_path / "data.bin", n_tries=3)
    assert len(server.requests) == 3  # the second and third got no further than the first


@pytest.mark.parametrize(("n_extra", "n_requests"), [(0, 1), (5, 2)], ids=["complete part", "part too long"])
def test_416_ends_a_complete_part_and_restarts_another(server, serve, tmp_path, n_extra, n_requests):
    (tmp_path / "data.bin.part").write_bytes(CONTENT + b"x" * n_extra)
    assert quick(serve(), tmp_path / "data.bin", sha256=SHA256).read_bytes() == CONTENT
    assert len(server.requests) == n_requests


def test_a_complete_part_of_known_size_needs_no_request(server, serve, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    quick(serve(), tmp_path / "data.bin", sha256=SHA256, size=len(CONTENT))
    assert server.requests == [] and names(tmp_path) == ["data.bin"]


def test_a_wrong_checksum_removes_the_part(serve, tmp_path):
    with pytest.raises(DownloadError, match=r"sha256 .* instead of .*removed"):
        quick(serve(OTHER), tmp_path / "data.bin", sha256=SHA256)
    assert names(tmp_path) == []


def test_a_wrong_size_is_noticed_before_anything_is_written(serve, tmp_path):
    with pytest.raises(DownloadError, match="offers 300000 bytes instead of 7"):
        quick(serve(), tmp_path / "data.bin", size=7)
    assert names(tmp_path) == []


def test_a_truncated_answer_without_length_is_noticed_by_its_size(serve, tmp_path):
    with pytest.raises(DownloadError, match="ended after 1000 of 300000 bytes"):
        quick(serve(no_length=True, drop_after=1000), tmp_path / "data.bin", size=len(CONTENT), n_tries=2)
    whole = quick(serve(no_length=True), tmp_path / "whole.bin", size=len(CONTENT))
    assert whole.read_bytes() == CONTENT


def test_passing_failures_are_retried(server, serve, tmp_path):
    url = serve(statuses=[503, 500, 429, 502])
    assert quick(url, tmp_path / "data.bin").read_bytes() == CONTENT
    assert len(server.requests) == 5


def test_gives_up_after_n_tries(server, serve, tmp_path):
    with pytest.raises(DownloadError, match=r"503 .*tried 3 times.*try again later"):
        quick(serve(statuses=[503] * 9), tmp_path / "data.bin", n_tries=3)
    assert len(server.requests) == 3
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(server, serve, tmp_path, status):
    with pytest.raises(DownloadError, match=f"data.bin: the server answered {status}.*check that") as caught:
        quick(serve(statuses=[status]), tmp_path / "data.bin")
    assert len(server.requests) == 1 and caught.value.status == status


def test_pauses_double_and_retry_after_is_honoured_up_to_the_bound(serve, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    fetch(serve(statuses=[503] * 4), tmp_path / "a", backoff=8.0)  # asked again at once, then after pauses
    assert all(p <= pause <= p + 8 for pause, p in zip(pauses, (16, 32, 64), strict=True))
    pauses.clear()
    with pytest.raises(DownloadError):
        fetch(serve(drop_after=0), tmp_path / "broken", backoff=8.0)
    assert all(p <= pause <= p + 8 for pause, p in zip(pauses, (16, 32, 64), strict=True))
    pauses.clear()
    fetch(serve(statuses=[503] * 6), tmp_path / "many", n_tries=7, backoff=50.0)
    assert max(pauses) == download.MAX_WAIT_S

    far_off = "Fri, 31 Dec 9999 23:59:59 -2359"
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    for asked, low, high in (("7", 7, 7), (in_a_minute, 50, 61), ("86400", 120, 120), (far_off, 120, 120)):
        pauses.clear()
        fetch(serve(statuses=[429], retry_after=asked), tmp_path / f"b{asked}", backoff=1.0)
        assert len(pauses) == 1 and low <= pauses[0] <= high, asked


@pytest.mark.parametrize(
    "page",
    [
        Served(b"please log in", content_type="text/html; charset=utf-8"),
        Served(b"\n<!DOCTYPE html><p>", content_type=""),
    ],
    ids=["by header", "by content"],
)
def test_a_web_page_is_not_taken_for_the_file(server, tmp_path, page):
    server.files["/data.bin"] = page
    with pytest.raises(DownloadError, match=r"web page instead of data\.bin.*open the address"):
        quick(server.url("/data.bin"), tmp_path / "data.bin")
    assert names(tmp_path) == [] and len(server.requests) == 1
    assert quick(server.url("/data.bin"), tmp_path / "page.html").read_bytes() == page.content


def test_a_web_page_does_not_cost_the_part(server, serve, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:100_000])
    with pytest.raises(DownloadError, match="web page"):
        quick(serve(b"<html>", content_type="text/html", ignore_range=True), tmp_path / "data.bin", md5=MD5)
    quick(serve(), tmp_path / "data.bin", md5=MD5)
    assert server.ranges("/data.bin") == ["bytes=100000-"] * 2


def test_compressed_transfer_is_refused(serve, tmp_path):
    with pytest.raises(DownloadError, match="gzip-encoded"):
        quick(serve(headers={"Content-Encoding": "gzip"}), tmp_path / "data.bin")


def test_too_small_a_disk_is_named_before_the_download(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "free_bytes", lambda path: 200_000)
    with pytest.raises(DownloadError, match=rf"needs 300kB of disk space, but {tmp_path} has 200kB free; make room"):
        quick(serve(), tmp_path / "data.bin")
    assert names(tmp_path) == []
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:150_000])  # what is there needs no room any more
    assert quick(serve(), tmp_path / "data.bin", md5=MD5).read_bytes() == CONTENT


def test_a_write_that_fails_keeps_the_part(serve, tmp_path):
    url = serve()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the nearest thing to a full disk
    try:
        with pytest.raises(DownloadError, match=r"data\.bin: File too large while writing.*run again to resume"):
            quick(url, tmp_path / "data.bin", md5=MD5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "data.bin.part").stat().st_size == 100_000
    assert quick(url, tmp_path / "data.bin", md5=MD5).read_bytes() == CONTENT


def writing(monkeypatch, n_at_most: int) -> list[int]:
    """Lets the part file take so many bytes at a time; the list receives how many each write took."""
    written, really = [], Path.open

    class PartFile(io.FileIO):
        def write(self, chunk):
            written.append(super().write(chunk[:n_at_most]))
            return written[-1]

    def open_(path, mode="r", *args, **options):
        return PartFile(path, mode) if path.suffix == ".part" and mode == "ab" else really(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_)
    return written


def test_writes_that_take_a_part_of_the_bytes_are_continued(serve, tmp_path, monkeypatch):
    written = writing(monkeypatch, n_at_most=300)
    assert quick(serve(), tmp_path / "data.bin").read_bytes() == CONTENT
    assert max(written) == 300 and sum(written) == len(CONTENT)


def test_unreachable_and_malformed_addresses_are_named(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.bin"
        with pytest.raises(DownloadError, match=r"data\.bin: Connection refused \(tried 2 times") as caught:
            quick(url, tmp_path / "data.bin", n_tries=2)
    assert url in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DownloadError, match="check the address"):
        quick("ftp://127.0.0.1/data.bin", tmp_path / "data.bin")
    assert names(tmp_path) == []


def test_a_silent_server_times_out_and_the_rest_follows(server, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", (1.0, 0.2))
    url = serve(drop_after=100_000, n_drops=1, stall=True)
    assert quick(url, tmp_path / "data.bin", sha256=SHA256).read_bytes() == CONTENT
    assert server.ranges("/data.bin")[1] is not None


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_killed_download_is_resumed(server, serve, tmp_path, kill):
    url = serve(drop_after=200_000, n_drops=1, stall=True, etag='"v1"')
    path = tmp_path / "data.bin"
    program = (
        "import signal; from helpers.fetch import download; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored where the tests run in the background
        f"download.CHUNK_BYTES = 1000; download.fetch({url!r}, {str(path)!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[1], stderr=subprocess.PIPE)
    part, deadline = tmp_path / "data.bin.part", time.monotonic() + 20
    while not part.exists() or part.stat().st_size < 200_000:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    assert (tmp_path / "data.bin.part.lock").exists()
    child.send_signal(kill)
    child.communicate()
    assert part.stat().st_size == 200_000
    assert quick(url, path).read_bytes() == CONTENT
    assert server.ranges("/data.bin") == [None, "bytes=200000-"]


def test_memory_does_not_grow_with_the_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK_BYTES", 2**16)
    content = bytes(30_000_000)
    server.files["/big.bin"], md5 = Served(content), hashlib.md5(content).hexdigest()
    tracemalloc.start()
    quick(server.url("/big.bin"), tmp_path / "big.bin", size=30_000_000, md5=md5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_retries_are_logged(serve, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        quick(serve(statuses=[503]), tmp_path / "data.bin")
    assert "503" in caplog.text and "2 of 5" in caplog.text


def test_the_first_use_records_and_later_ones_compare(server, serve, tmp_path):
    url, path, checksums = serve(), tmp_path / "sub" / "data.bin", tmp_path / "checksums.json"
    fetch_recorded(url, path, checksums, backoff=0.001)
    record = json.loads(checksums.read_text())
    assert record == {"sub/data.bin": {"url": url, "size": len(CONTENT), "sha256": SHA256}}
    assert fetch_recorded(url, path, checksums) == path
    assert len(server.requests) == 1

    stat = path.stat()
    path.write_bytes(OTHER)  # same size, same time: swapped on purpose
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(
        DownloadError, match=r"sub/data\.bin has sha256 .*delete it .*remove 'sub/data\.bin' from .*json"
    ):
        fetch_recorded(url, path, checksums)
    path.unlink()
    assert fetch_recorded(url, path, checksums).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [OTHER, b"short"], ids=["same size", "other size"])
def test_a_recorded_file_that_changed_on_the_server_is_refused(serve, tmp_path, content):
    path, checksums = tmp_path / "data.bin", tmp_path / "checksums.json"
    fetch_recorded(serve(), path, checksums)
    path.unlink()
    with pytest.raises(DownloadError, match=r"instead of .*remove 'data\.bin' from"):
        fetch_recorded(serve(content), path, checksums)
    assert not path.exists()


def test_a_file_put_there_by_hand_is_recorded(server, serve, tmp_path):
    path, checksums = tmp_path / "data.bin", tmp_path / "new" / "checksums.json"
    path.write_bytes(CONTENT)
    fetch_recorded(serve(), path, checksums)
    assert json.loads(checksums.read_text())["../data.bin"]["sha256"] == SHA256
    assert server.requests == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"data.bin": {"size": 3}}'])
def test_a_damaged_record_is_named(serve, tmp_path, text):
    (tmp_path / "checksums.json").write_text(text)
    with pytest.raises(DownloadError, match=r"checksums\.json is damaged"):
        fetch_recorded(serve(), tmp_path / "data.bin", tmp_path / "checksums.json")


def test_free_space_is_known_for_folders_to_come(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    assert free_bytes("not/yet/there") > 0


def test_an_empty_answer_is_refused_where_nothing_is_known(serve, tmp_path):
    with pytest.raises(DownloadError, match=r"sent an empty file.*may be put at .*data\.bin"):
        fetch_recorded(serve(b""), tmp_path / "data.bin", tmp_path / "checksums.json")
    assert names(tmp_path) == []
    (tmp_path / "data.bin").touch()
    with pytest.raises(DownloadError, match=r"data\.bin is empty; delete it"):
        fetch_recorded(serve(), tmp_path / "data.bin", tmp_path / "checksums.json")


@pytest.mark.parametrize(
    "first, second",
    [
        ({"etag": '"v1"'}, {"etag": None}),
        ({"etag": '"v1"'}, {"etag": '"v2"'}),
        ({"headers": {"Last-Modified": "yesterday"}}, {"headers": {"Last-Modified": "today"}}),
        ({"headers": {"Last-Modified": "yesterday"}}, {}),
        ({"etag": '"v1"'}, {"etag": '"v1"', "content": CONTENT + b"more"}),
    ],
    ids=str,
)
def test_a_changed_file_is_never_stitched_without_a_checksum(serve, tmp_path, first, second):
    with pytest.raises(DownloadError):
        quick(serve(OTHER, drop_after=100_000, **first), tmp_path / "data.bin", n_tries=1)
    url = serve(**{"content": CONTENT, "ignore_if_range": True} | second)
    assert quick(url, tmp_path / "data.bin").read_bytes() == second.get("content", CONTENT)


def test_what_cannot_be_resumed_is_not_kept(serve, tmp_path):
    with pytest.raises(DownloadError, match="IncompleteRead") as caught:
        quick(serve(drop_after=100_000), tmp_path / "data.bin", size=len(CONTENT), n_tries=1)
    assert "run again to resume" not in str(caught.value) and names(tmp_path) == []


@pytest.mark.parametrize("total, content", [(len(OTHER), OTHER), (None, CONTENT)])
def test_a_complete_part_without_a_checksum_is_taken_where_it_is_known_to_be(serve, tmp_path, total, content):
    """As after a kill before the last step; the file on the server is another by now."""
    url = serve(etag='"v2"', ignore_if_range=True)
    (tmp_path / "data.bin.part").write_bytes(OTHER)
    (tmp_path / "data.bin.part.json").write_text(json.dumps({"url": url, "version": '"v1"', "total": total}))
    assert quick(url, tmp_path / "data.bin").read_bytes() == content


def test_a_body_without_end_is_not_read_past_the_known_size(serve, tmp_path, monkeypatch):
    written = writing(monkeypatch, n_at_most=10**9)
    with pytest.raises(DownloadError, match="more than the announced 50000 bytes"):
        quick(serve(no_length=True), tmp_path / "data.bin", size=50_000, n_tries=1)
    assert sum(written) <= 50_000 and names(tmp_path) == []


def test_a_json_message_is_not_taken_for_the_file(serve, tmp_path):
    with pytest.raises(DownloadError, match=r"JSON message instead of data\.bin"):
        quick(serve(b'{"error": "rate limit"}', content_type="application/json"), tmp_path / "data.bin")


def test_a_link_in_the_place_of_a_part_is_removed(serve, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("data.bin.part", "data.bin.part.json"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    assert quick(serve(), tmp_path / "data.bin").read_bytes() == CONTENT
    assert (tmp_path / "mine").read_text() == "mine" and names(tmp_path) == ["data.bin", "mine"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["data.bin", "data.bin.part", "checksums.json"])
def test_what_is_no_file_is_named(serve, tmp_path, make, name):
    make(tmp_path / name)
    with pytest.raises(OSError, match=rf"{name} .*(no regular file|Is a directory)"):
        fetch_recorded(serve(), tmp_path / "data.bin", tmp_path / "checksums.json")


def test_a_second_process_waits_for_the_first(server, serve, tmp_path, caplog):
    url = serve(drop_after=200_000, n_drops=1, stall=True, etag='"v1"')
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(quick, url, tmp_path / "data.bin")
        while len(server.requests) == 0:
            time.sleep(0.01)
        second = pool.submit(quick, url, tmp_path / "data.bin")
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        server.closing.set()  # ends the stall
        assert first.result() == second.result() == tmp_path / "data.bin"
    assert len(server.requests) == 2 and names(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(serve, tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert quick(serve(), tmp_path / "data.bin").read_bytes() == CONTENT
    assert "has no locks" in caplog.text and names(tmp_path) == ["data.bin"]


def test_a_name_that_does_not_resolve_is_tried_once(tmp_path, monkeypatch):
    asked = []

    def unknown(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        DownloadError, match=r"name no\.such\.host does not resolve .*tried once.*may be put at"
    ) as caught:
        quick("http://no.such.host/data.bin", tmp_path / "data.bin")
    assert asked == ["no.such.host"] and str(tmp_path / "data.bin") in str(caught.value)


def test_a_proxy_that_fails_is_named_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"through the proxy 127\.0\.0\.1:9\): Connection refused") as caught:
        quick("http://example.org/data.bin", tmp_path / "data.bin", n_tries=1)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    [None, "", "/data.bin", "gopher://x/",
     "http://[::1", "http://127.0.0.1:99999999/", "http://127.0.0.1:²/", "http:///",
     "http://\0/",
     "//", "http://" + "a" * 300 + "/", "http://.../", "http://é\xff/", "file:///etc/passwd", "?" * 70_000],
    ids=lambda text: repr(text)[:20],
)  # fmt: skip
def test_redirects_that_lead_nowhere_are_one_line(server, serve, tmp_path, location):
    url = serve(headers={} if location is None else {"Location": location})
    server.files["/data.bin"].status = 302
    with pytest.raises(DownloadError, match=r"data\.bin: ") as caught:
        quick(url, tmp_path / "data.bin", n_tries=2)
    assert "\n" not in str(caught.value) and names(tmp_path) == []


@pytest.mark.parametrize(
    "headers",
    [{"Content-Length": "²"}, {"Content-Length": "9" * 5000}, {"Content-Length": "-5"}, {"Content-Length": "1, 2"},
     {"Content-Range": f"bytes 0-1/{'9' * 5000}"}, {"ETag": "\xff\xfe²"}, {"Last-Modified": "é"}],
    ids=lambda headers: str(headers)[:30],
)  # fmt: skip
def test_headers_that_cannot_be_read_are_passed_over_or_one_line(serve, tmp_path, headers):
    url = serve(no_length="Content-Length" in headers, headers=headers, drop_after=100_000, n_drops=1)
    try:
        assert quick(url, tmp_path / "data.bin", sha256=SHA256, n_tries=3).read_bytes() == CONTENT
    except DownloadError as error:
        assert "data.bin: " in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("asked", ["soon", "²", "9" * 5000, "Mon, 01 Jan 99999 00:00:00 GMT"])
def test_a_pause_that_cannot_be_read_is_our_own(serve, tmp_path, monkeypatch, asked):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    fetch(serve(statuses=[429] * 2, retry_after=asked), tmp_path / "data.bin", backoff=8.0)
    assert len(pauses) == 1 and 16 <= pauses[0] <= 24


def test_mutated_notes_of_a_download_never_end_in_a_traceback_or_a_stitched_file(server, serve, tmp_path):
    rng, url = random.Random(0), serve(etag='"v2"')
    values = (None, True, -1, 1.5, "x", [], {}, 10**30, "²", "a\0b", "a\r\nX: y", '"v1"', "é", "x" * 70_000)
    whole = {"url": url, "version": '"v1"', "total": len(OTHER)}
    for i in range(100):
        content = json.dumps(whole | {rng.choice(list(whole)): rng.choice(values)}).encode()
        if i % 3 == 0:
            place = rng.randrange(len(content))
            content = content[:place] + rng.randbytes(rng.randrange(3)) + content[place + rng.randrange(3) :]
        elif i % 50 == 1:
            content = b"[" * 100_000
        (tmp_path / "data.bin.part").write_bytes(OTHER[:1000])
        (tmp_path / "data.bin.part.json").write_bytes(content)
        assert quick(url, tmp_path / "data.bin").read_bytes() == CONTENT
        (tmp_path / "data.bin").unlink()


def test_mutated_checksums_are_named(serve, tmp_path):
    rng, path, checksums = random.Random(0), tmp_path / "data.bin", tmp_path / "checksums.json"
    fetch_recorded(serve(), path, checksums)
    good = checksums.read_bytes()
    for _ in range(200):
        place = rng.randrange(len(good))
        damaged = good[:place] + rng.randbytes(rng.randrange(3)) + good[place + rng.randrange(3) :]
        checksums.write_bytes(damaged)
        try:
            fetch_recorded(serve(), path, checksums)
        except DownloadError as error:
            assert "checksums.json" in str(error) and "\n" not in str(error)
    checksums.write_bytes(b"[" * 100_000)
    with pytest.raises(DownloadError, match=r"checksums\.json is damaged"):
        fetch_recorded(serve(), path, checksums)


def test_a_body_of_unknown_size_does_not_fill_the_disk(serve, tmp_path, monkeypatch):
    n_free = 2**24 + 100_000
    monkeypatch.setattr(download, "free_bytes", lambda _: n_free - (tmp_path / "data.bin.part").stat().st_size)
    with pytest.raises(DownloadError, match=r"does not tell the size, needs 16\.8MB of disk space.*make room"):
        quick(serve(no_length=True), tmp_path / "data.bin")
    assert names(tmp_path) == []
