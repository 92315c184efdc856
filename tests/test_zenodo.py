"""Zenodo records and their archives, against a local server that answers in the form of Zenodo's records API."""

import gc
import json
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.fetch import download, zenodo, zip_archive
from helpers.fetch.download import DownloadError
from helpers.fetch.zenodo import download_record, plan, read_record
from helpers.fetch.zip_archive import extract_zip
from tests.http_server import FileServer, Served, make_zip, publish_record

pytestmark = pytest.mark.slow

TOP = "TAU-urban-acoustic-scenes-2022-mobile-development"
RECORD = 6337421


AUDIO = [
    {f"{TOP}/audio/airport-lisbon-1000-40000-{i}-{device}.wav": os.urandom(2000) for i in range(5)} for device in "ab"
]
META = {
    f"{TOP}/": b"",
    f"{TOP}/meta.csv": b"filename\tscene_label\n",
    f"{TOP}/evaluation_setup/fold1_train.csv": b"f\n",
}
ARCHIVES = {
    f"{TOP}.audio.1.zip": make_zip(AUDIO[0]),
    f"{TOP}.audio.2.zip": make_zip(AUDIO[1]),
    f"{TOP}.meta.zip": make_zip(META),
    "LICENSE.txt": b"terms",
}
UNPACKED = {name: content for part in (*AUDIO, META) for name, content in part.items() if not name.endswith("/")}


@pytest.fixture(autouse=True)
def direct_and_fast(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(os, "sync", lambda: None)  # waits for whatever else this computer writes
    gc.disable()  # what it would finalise while a parser is at its recursion limit fails, and fails the test
    yield
    gc.enable()


@pytest.fixture
def server():
    with FileServer() as running:
        publish_record(running, RECORD, ARCHIVES)
        yield running


def get_record(server: FileServer, root: Path, **options) -> Path:
    return download_record(RECORD, root, api=server.url("/api"), backoff=0.001, **options)


def content(root: Path) -> dict[str, bytes]:
    """Everything below root but the notes about progress."""
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".zenodo_")}


def content_path(key: str) -> str:
    return f"/api/records/{RECORD}/files/{key}/content"


def test_downloads_unpacks_and_returns_the_folder_with_meta(server, tmp_path):
    root, said = tmp_path / "new" / "root", []
    assert get_record(server, root, report=said.append) == root / TOP
    assert content(root) == UNPACKED | {"LICENSE.txt": b"terms"}
    assert "4 of 4 files" in said[0] and len(said) == 5


def test_archives_are_kept_on_request(server, tmp_path):
    get_record(server, tmp_path, keep_archives=True)
    assert content(tmp_path) == UNPACKED | ARCHIVES
    get_record(server, tmp_path)  # kept on purpose: a later run leaves them alone
    assert content(tmp_path) == UNPACKED | ARCHIVES


def test_a_second_run_needs_no_network(server, tmp_path):
    get_record(server, tmp_path)
    server.requests.clear()
    assert get_record(server, tmp_path, report=lambda text: pytest.fail(text)) == tmp_path / TOP
    assert server.requests == []


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_lost_clips_bring_back_their_archive_alone(server, tmp_path, monkeypatch, damage):
    get_record(server, tmp_path)
    clip = tmp_path / next(iter(AUDIO[1]))
    clip.unlink() if damage == "missing" else clip.write_bytes(b"RIFF")
    server.requests.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # a kill with the archive just arrived
        patch.setattr(zenodo, "extract_zip", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        get_record(server, tmp_path)
    get_record(server, tmp_path)
    assert content(tmp_path) == UNPACKED | {"LICENSE.txt": b"terms"}
    asked = [path for path, _ in server.requests]
    assert sorted(asked) == [f"/api/records/{RECORD}"] * 2 + [content_path(f"{TOP}.audio.2.zip")]


def test_a_broken_download_goes_on_at_its_byte(server, tmp_path):
    path = content_path(f"{TOP}.audio.2.zip")
    server.files[path].drop_after, server.files[path].n_drops = 5000, 1
    with pytest.raises(DownloadError, match="run again to resume"):
        get_record(server, tmp_path, n_tries=1)
    assert set(content(tmp_path)) >= set(AUDIO[0])
    get_record(server, tmp_path)
    assert content(tmp_path) == UNPACKED | {"LICENSE.txt": b"terms"}
    assert server.ranges(path)[0] is None and server.ranges(path)[1] is not None
    assert len(server.ranges(content_path(f"{TOP}.audio.1.zip"))) == 1


def test_a_kill_while_unpacking_goes_on_at_the_entry(server, tmp_path, monkeypatch):
    unpack, done = zip_archive._unpack, []

    def killed(opened, info, target):
        if len(done) == 3:
            raise KeyboardInterrupt
        unpack(opened, info, target)
        done.append(info.filename)

    monkeypatch.setattr(zip_archive, "_unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        get_record(server, tmp_path)
    again = []
    monkeypatch.setattr(zip_archive, "_unpack", lambda o, i, t: (again.append(i.filename), unpack(o, i, t)))
    get_record(server, tmp_path)
    assert content(tmp_path) == UNPACKED | {"LICENSE.txt": b"terms"}
    assert len(done) == 3 and not set(done) & set(again)
    assert len(server.ranges(content_path(f"{TOP}.audio.1.zip"))) == 1


def test_an_archive_left_by_a_kill_before_its_deletion_is_deleted(server, tmp_path, monkeypatch):
    def killed(path, done):
        if done is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zenodo, "_delete_archive", killed)
        get_record(server, tmp_path)
    assert (tmp_path / f"{TOP}.audio.1.zip").exists()
    get_record(server, tmp_path)
    assert content(tmp_path) == UNPACKED | {"LICENSE.txt": b"terms"}
    assert len(server.ranges(content_path(f"{TOP}.audio.1.zip"))) == 1


def test_a_run_killed_by_sigkill_is_finished_by_the_next(server, tmp_path, caplog):
    program = (
        "import sys; from helpers.fetch.zenodo import download_record; "
        f"download_record({RECORD}, sys.argv[1], api={server.url('/api')!r}, backoff=0.001)"
    )
    server.files[content_path(f"{TOP}.audio.2.zip")].drop_after = 3000
    server.files[content_path(f"{TOP}.audio.2.zip")].stall = True
    command = [sys.executable, "-c", program, str(tmp_path)]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / f"{TOP}.audio.2.zip.part", time.monotonic() + 20
    while not part.exists():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    server.files[content_path(f"{TOP}.audio.2.zip")].drop_after = None
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(get_record, server, tmp_path)  # waits until the first is no more
        while "waiting for it" not in caplog.text:
            assert time.monotonic() < deadline and not second.done()
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        second.result()
    assert content(tmp_path) == UNPACKED | {"LICENSE.txt": b"terms"}


def test_a_wrong_checksum_stops_with_the_name(server, tmp_path):
    path = content_path(f"{TOP}.audio.1.zip")
    server.files[path] = Served(server.files[path].content[:-1] + b"?")
    with pytest.raises(DownloadError, match=r"audio\.1\.zip.* md5 .* instead of"):
        get_record(server, tmp_path)
    assert content(tmp_path) == {}


def test_disk_space_is_checked_before_anything_starts(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "free_bytes", lambda path: 30_000)
    said = []
    with pytest.raises(DownloadError, match=r"record 6337421 needs .* has 30.0?kB free; make room"):
        get_record(server, tmp_path, report=said.append)
    assert len(said) == 1 and "Disk space needed" in said[0]
    assert [path for path, _ in server.requests] == [f"/api/records/{RECORD}"]


def test_the_plan_follows_what_is_on_disk(server, tmp_path):
    files = read_record(RECORD, server.url("/api"))
    sizes = {file.key: file.size for file in files}
    zips = [file.size for file in files if file.is_zip]
    unpacked = [round(size * zenodo.UNPACKED_RATIO) for size in zips]
    fresh = plan(RECORD, files, tmp_path)
    assert fresh.todo == tuple(files) and fresh.n_download == sum(sizes.values())
    assert fresh.n_unpacked == sum(unpacked) and len(fresh.describe().splitlines()) == 3
    # the second audio archive is the last big one: all unpacked by then, the two archives one after the other
    assert fresh.n_needed == max(unpacked[0] + unpacked[1] + zips[1], sum(unpacked) + max(zips[2], 5))
    assert plan(RECORD, files, tmp_path, keep_archives=True).n_needed == sum(unpacked) + sum(sizes.values())

    (tmp_path / f"{TOP}.audio.1.zip").write_bytes(ARCHIVES[f"{TOP}.audio.1.zip"])  # here: its unpacked size is exact
    (tmp_path / f"{TOP}.audio.2.zip.part").write_bytes(ARCHIVES[f"{TOP}.audio.2.zip"][:1000])
    later = plan(RECORD, files, tmp_path)
    assert later.n_download == sum(sizes.values()) - zips[0] - 1000
    assert later.n_unpacked == sum(map(len, AUDIO[0].values())) + sum(unpacked[1:])

    get_record(server, tmp_path)
    done = plan(RECORD, files, tmp_path)
    assert done.todo == () and done.n_needed == 0
    assert "0 of 4 files" in done.describe()


def test_the_form_of_newer_answers_is_read_too(server):
    links = {"self": "http://127.0.0.1/meta", "content": "http://127.0.0.1/content"}
    entry = {"key": "a.zip", "size": 3, "checksum": "md5:" + "AB" * 16, "links": links}
    server.files["/api/records/1"] = Served(json.dumps({"files": [entry]}).encode())
    assert read_record(1, server.url("/api/")) == [zenodo.RecordFile("a.zip", 3, "ab" * 16, "http://127.0.0.1/content")]


def test_an_unknown_record_is_named(server, tmp_path):
    with pytest.raises(DownloadError, match=r"has no record 42 .*check the number") as caught:
        download_record(42, tmp_path, api=server.url("/api"))
    assert caught.value.status == 404


def test_an_unreachable_host_is_named(tmp_path):
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9/api/records/1: Connection refused .tried 2 times"):
        download_record(1, tmp_path, api="http://127.0.0.1:9/api", n_tries=2, backoff=0.001)


def test_a_busy_api_is_asked_again(server):
    server.files[f"/api/records/{RECORD}"].statuses = [429, 503]
    assert len(read_record(RECORD, server.url("/api"), backoff=0.001)) == 4


GOOD = {"key": "a.zip", "size": 3, "checksum": "md5:" + "ab" * 16, "links": {"self": "http://127.0.0.1/a"}}


BAD = [
    {"checksum": "crc:00"},
    {"checksum": None},
    {"size": "3"},
    {"links": {}},
    {"links": {"self": "file:///etc/passwd"}},
]
BAD += [{"key": key} for key in ("../a.zip", "/etc/a.zip", "..\\a.zip", "..", "", 7)]
SHAPES = [[], {"id": 1}, {"files": "none"}, {"files": [{"key": "a.zip"}]}]


@pytest.mark.parametrize("answer", SHAPES + [{"files": [GOOD | change]} for change in BAD], ids=str)
def test_an_answer_of_another_form_is_refused(server, answer):
    server.files["/api/records/1"] = Served(json.dumps(answer).encode(), content_type="application/json")
    with pytest.raises(DownloadError, match="not a Zenodo record") as caught:
        read_record(1, server.url("/api"))
    assert "\n" not in str(caught.value)


def test_answers_without_json_or_files_are_named(server):
    server.files["/api/records/1"] = Served(b"<html>", content_type="text/html")
    with pytest.raises(DownloadError, match=r"not JSON \(text/html\)"):
        read_record(1, server.url("/api"))
    server.files["/api/records/1"] = Served(b'{"files": []}')
    with pytest.raises(DownloadError, match="restricted"):
        read_record(1, server.url("/api"))


def test_a_record_without_meta_is_named(server, tmp_path):
    publish_record(server, 7, {"a.zip": make_zip({"x/a.wav": b"a"})})
    with pytest.raises(DownloadError, match=r"holds no meta\.csv"):
        download_record(7, tmp_path, api=server.url("/api"))


def test_damaged_notes_only_cost_time(server, tmp_path, caplog):
    get_record(server, tmp_path)
    for note in (tmp_path / f".zenodo_{RECORD}").iterdir():
        note.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert get_record(server, tmp_path) == tmp_path / TOP
    assert "damaged" in caplog.text and content(tmp_path) == UNPACKED | {"LICENSE.txt": b"terms"}


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path.write_bytes(make_zip(entries, compression))
    return path


def test_unpacks_every_entry(tmp_path):
    archive = write_zip(tmp_path / "a.zip", META | AUDIO[0] | {"empty": b""})
    files = extract_zip(archive, tmp_path / "out")
    expected = {name: data for name, data in (META | AUDIO[0] | {"empty": b""}).items() if not name.endswith("/")}
    assert [path.relative_to(tmp_path / "out").as_posix() for path in files] == list(expected)
    assert content(tmp_path / "out") == expected


def test_entries_that_are_there_are_skipped_and_wrong_ones_are_not(tmp_path):
    archive, out = write_zip(tmp_path / "a.zip", {"a": b"aaaa", "b": b"bbbb", "c": b"cccc"}), tmp_path / "out"
    extract_zip(archive, out)
    (out / "b").write_bytes(b"B")
    (out / "c").write_bytes(b"CCCC")  # size fits, CRC does not
    before = (out / "a").stat().st_ino
    extract_zip(archive, out)
    assert content(out) == {"a": b"aaaa", "b": b"bbbb", "c": b"cccc"} and (out / "a").stat().st_ino == before


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "..", "C:/evil", "c:evil", "..\\evil", "\\evil", ".", "./good"]
)
def test_names_that_lead_outside_are_refused_before_anything_is_written(tmp_path, name):
    archive = write_zip(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    with pytest.raises(DownloadError, match=r"a\.zip: entry .*nothing was unpacked"):
        extract_zip(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_special_files_are_refused(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = (kind | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DownloadError, match="'link' is a link or a special file"):
        extract_zip(tmp_path / "a.zip", tmp_path / "out")


def test_a_link_on_disk_does_not_lead_outside(tmp_path):
    archive, out, outside = write_zip(tmp_path / "a.zip", {"audio/x": b"new"}), tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (out / "audio").symlink_to(outside)
    with pytest.raises(DownloadError, match="a link that leads outside"):
        extract_zip(archive, out)
    (out / "audio").unlink()
    (out / "audio").mkdir()
    for there in (b"old", b"new"):
        (outside / "x").write_bytes(there)
        (out / "audio" / "x").unlink(missing_ok=True)
        (out / "audio" / "x").symlink_to(outside / "x")
        extract_zip(archive, out)
        assert not (out / "audio" / "x").is_symlink()  # replaced, not followed
        assert (outside / "x").read_bytes() == there and content(out) == {"audio/x": b"new"}


def patched(data: bytes, header: bytes, offset: int, value: int) -> bytes:
    """A zip whose first header of that kind has another byte at offset."""
    changed = bytearray(data)
    changed[data.index(header) + offset] = value
    return bytes(changed)


def test_encrypted_archives_are_refused(tmp_path):
    data = patched(make_zip({"secret": b"x"}), b"PK\x03\x04", 6, 1)
    (tmp_path / "a.zip").write_bytes(patched(data, b"PK\x01\x02", 8, 1))
    with pytest.raises(DownloadError, match="'secret' is encrypted"):
        extract_zip(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_share_a_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    with pytest.raises(DownloadError, match="has no name of its own"):
        extract_zip(tmp_path / "a.zip", tmp_path / "out")


def test_a_damaged_entry_leaves_no_file(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"good": b"0" * 99, "bad": b"1234567890" * 9}, zipfile.ZIP_STORED)
    archive.write_bytes(archive.read_bytes().replace(b"1234567890", b"1234567899", 1))
    with pytest.raises(DownloadError, match=r"a\.zip is not a whole zip archive \(Bad CRC-32.*bad.*delete it"):
        extract_zip(archive, tmp_path / "out")
    assert content(tmp_path / "out") == {"good": b"0" * 99}


def test_an_entry_shorter_than_it_says_is_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(patched(make_zip({"x": b"12345"}), b"PK\x01\x02", 24, 9))
    with pytest.raises(DownloadError, match="x is shorter than it says"):
        extract_zip(tmp_path / "a.zip", tmp_path / "out")
    assert content(tmp_path / "out") == {}


@pytest.mark.parametrize("n_kept", [0, 10, 500])
def test_a_truncated_archive_is_named(tmp_path, n_kept):
    archive = write_zip(tmp_path / "a.zip", AUDIO[0])
    archive.write_bytes(archive.read_bytes()[:n_kept])
    with pytest.raises(DownloadError, match=r"a\.zip is not a whole zip archive"):
        extract_zip(archive, tmp_path / "out")


def test_the_space_for_what_is_missing_is_checked_first(tmp_path, monkeypatch):
    archive, out = write_zip(tmp_path / "a.zip", {"a": bytes(6000), "b": bytes(3000)}), tmp_path / "out"
    monkeypatch.setattr(download, "free_bytes", lambda path: 5000)
    with pytest.raises(DownloadError, match=r"unpacking .*a\.zip needs 9\.00kB"):
        extract_zip(archive, out)
    assert not out.exists()
    out.mkdir()
    (out / "a").write_bytes(bytes(6000))
    extract_zip(archive, out)
    assert content(out) == {"a": bytes(6000), "b": bytes(3000)}


VICTIM = {"key": "../victim.txt", "size": 6, "md5": "0" * 32, "url": "http://127.0.0.1:9/x"}
PLANTED = {
    ".zenodo_7/record.json": json.dumps([VICTIM]).encode(),
    "./.Zenodo_7/lock": b"{}",
    ".zenodo_7/victim.txt.done": b"{}",
    "b.zip.part": b"x",
    "b.zip.part.json": b"{}",
}


def test_notes_in_an_archive_are_left_out(server, tmp_path, caplog):
    """An archive that brought them could name files to delete, anywhere."""
    root, victim = tmp_path / "root", tmp_path / "victim.txt"
    victim.write_text("mine")
    stamp = json.dumps({"md5": "0" * 32, "delete_archive": True, "files": {}}).encode()
    publish_record(
        server, 7, {"a.zip": make_zip({"x/meta.csv": b"m", **PLANTED, ".zenodo_7/../victim.txt.done": stamp})}
    )
    with pytest.raises(DownloadError, match="leads outside"):
        download_record(7, root, api=server.url("/api"))
    publish_record(server, 7, {"a.zip": make_zip({"x/meta.csv": b"m", **PLANTED})})
    shutil.rmtree(root)
    for _ in range(2):
        assert download_record(7, root, api=server.url("/api")) == root / "x"
    assert "5 entries are notes about the progress of a download and are left out" in caplog.text
    assert sorted(path.name for path in root.iterdir()) == [".zenodo_7", "x"]
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("key", ["../victim.txt", "/victim.zip", "a\0.zip", ".zenodo_7", "a/b.zip", 7, None])
def test_stored_records_are_checked_like_fetched_ones(server, tmp_path, key, caplog):
    root, victim = tmp_path / "root", tmp_path / "victim.txt"
    publish_record(server, 7, {"a.zip": make_zip({"x/meta.csv": b"m"})})
    download_record(7, root, api=server.url("/api"))
    victim.write_text("mine")
    (root / ".zenodo_7" / "record.json").write_text(json.dumps([VICTIM | {"key": key}]))
    stamp = {"md5": VICTIM["md5"], "delete_archive": True, "files": {}}
    (root / "victim.txt.done").write_text(json.dumps(stamp))
    assert download_record(7, root, api=server.url("/api")) == root / "x"
    assert victim.read_text() == "mine" and "record.json" in caplog.text


def test_links_in_the_place_of_notes_are_not_followed(server, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    publish_record(server, 7, {"a.zip": make_zip({"x/meta.csv": b"m"})})
    outside.mkdir()
    root.mkdir()
    (root / ".zenodo_7").symlink_to(outside)
    with pytest.raises(DownloadError, match=r"\.zenodo_7 is a link.*remove it"):
        download_record(7, root, api=server.url("/api"))
    (root / ".zenodo_7").unlink()
    (root / ".zenodo_7").mkdir()
    (root / "x").mkdir()
    names = ("a.zip.part", "a.zip.part.json", ".zenodo_7/record.json", ".zenodo_7/a.zip.done", "x/.unpacking.part")
    for name in names:
        (outside / "mine").write_text("[]")
        (root / name).symlink_to(outside / "mine")
    assert download_record(7, root, api=server.url("/api")) == root / "x"
    assert (outside / "mine").read_text() == "[]"
    assert not [path for path in root.rglob("*") if path.is_symlink()]


def test_mutated_notes_never_end_in_a_traceback_or_leave_the_folder(server, tmp_path, monkeypatch):
    """200 mutations, without a network: each either needs Zenodo again, or goes on with what is there."""
    root, outside = tmp_path / "root", tmp_path / "victim.zip"
    publish_record(server, 7, {"a.zip": make_zip({"x/meta.csv": b"m", "x/audio/a.wav": b"a"})})
    download_record(7, root, api=server.url("/api"))
    outside.write_text("mine")
    notes = {path: path.read_bytes() for path in (root / ".zenodo_7").glob("*.*")}
    assert len(notes) == 2
    monkeypatch.setattr(zenodo, "read_record", lambda *_, **__: (_ for _ in ()).throw(DownloadError("no network")))
    rng = random.Random(0)
    values = (
        None,
        True,
        -1,
        1.5,
        "x",
        "../victim.zip",
        [],
        {},
        {"../victim.zip": 4},
        [[]],
        10**30,
        "²",
        "a\0b",
        "é" * 300,
    )
    n_refused = 0
    for _ in range(200):
        for path, content in notes.items():
            path.write_bytes(mutated(content, rng, values))
        try:
            assert download_record(7, root, api=server.url("/api"), report=lambda _: None) == root / "x"
        except DownloadError as error:
            assert "\n" not in str(error)
            n_refused += 1
        assert outside.read_text() == "mine"
    assert 50 < n_refused < 200


def mutated(content: bytes, rng: random.Random, values: tuple) -> bytes:
    """A JSON file with another value somewhere, or with damaged bytes, or as it was."""
    kind = rng.randrange(4)
    if kind == 0:
        return content
    if kind == 1:
        place = rng.randrange(len(content))
        return content[:place] + rng.randbytes(rng.randrange(3)) + content[place + rng.randrange(3) :]
    if kind == 2:
        return content[: rng.randrange(len(content))] if rng.random() < 0.9 else b"[" * 100_000
    parsed = node = json.loads(content)
    while True:
        key = rng.choice(range(len(node)) if isinstance(node, list) else list(node))
        if not node[key] or not isinstance(node[key], list | dict) or rng.random() < 0.3:
            break
        node = node[key]
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(values)
    return json.dumps(parsed).encode()


def test_mutated_archives_never_end_in_a_traceback(tmp_path, monkeypatch):
    rng, good = random.Random(0), make_zip({"x/meta.csv": b"m" * 300, "x/a.wav": bytes(200), "x/b/": b""})
    n_refused = 0
    for i in range(200):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / "a.zip").write_bytes(content)
        try:
            extract_zip(tmp_path / "a.zip", tmp_path / "out" / str(i))
        except OSError as error:
            assert "\n" not in str(error)
            n_refused += 1
    assert n_refused > 100 and sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]


def test_without_a_network_the_stored_list_and_files_put_there_by_hand_suffice(server, tmp_path, monkeypatch, caplog):
    path = content_path(f"{TOP}.audio.2.zip")
    server.files[path].drop_after = 0
    with pytest.raises(DownloadError, match=rf"may be put at {tmp_path}/.*audio\.2\.zip"):
        get_record(server, tmp_path, n_tries=1)
    for key, content_ in ARCHIVES.items():
        (tmp_path / key).write_bytes(content_)
    assert download_record(RECORD, tmp_path, api="http://127.0.0.1:9/api", n_tries=1) == tmp_path / TOP
    assert "going on with the list" in caplog.text
    with pytest.raises(DownloadError, match=r"or fetch the data set by other means .*records/6337421.*--dataset_dir"):
        download_record(RECORD, tmp_path / "new", api="http://127.0.0.1:9/api", n_tries=1)


def test_an_endless_or_deeply_nested_answer_of_the_api_is_refused(server):
    server.files["/api/records/1"] = Served(b"[" * 100_000, content_type="application/json")
    with pytest.raises(DownloadError, match="not JSON"):
        read_record(1, server.url("/api"))
    server.files["/api/records/1"] = Served(b" " * (2**24 + 2**17), content_type="application/json")
    with pytest.raises(DownloadError, match="larger than any"):
        read_record(1, server.url("/api"))
