import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys

import pytest

from datasets.files import BusyError, ContentError, check_content, locked, matching, read_json, replacing, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with replacing(path) as file:
        file.write("new")
    assert path.read_text() == "new"


def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a", "wb") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_process_left_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    path = tmp_path / "last[1].pt"  # a name with a glob's characters
    script = (
        "import os, sys; from pathlib import Path; from datasets.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file: file.write('x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, path], check=False)
    assert len(os.listdir(tmp_path)) == 1
    living = tmp_path / os.listdir(tmp_path)[0].replace(".tmp", "").rsplit(".", 1)[0]
    living = living.with_name(f"{living.name}.{os.getppid()}.tmp")
    living.touch()
    write_json(path, 1)
    assert sorted(os.listdir(tmp_path)) == [path.name, living.name]


def hold(path, ready, done):
    with locked(path, "x"):
        ready.set()
        done.wait(30)


@pytest.mark.parametrize("number", [None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_lock_is_held_by_one_process(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "lock").touch()  # as an earlier process left it
    if number is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "lock", ready, done))
    other.start()
    assert ready.wait(30)
    with pytest.raises(BusyError, match="run abc is in use by another process"), locked(tmp_path / "lock", "run abc"):
        pass
    other.kill()  # takes its lock with it
    other.join()
    with locked(tmp_path / "lock", "run abc", wait=True):
        pass
    assert ("has no locks" in caplog.text) == (number is not None)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr("datasets.files._host", lambda: "host")
    (tmp_path / f"a.txt.host.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    write_json(tmp_path / "a.txt", 1)
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "a.txt").is_symlink()


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="lock is a link where a lock file is kept"), locked(tmp_path / "lock", "x"):
        pass
    assert not (tmp_path / "mine").exists()


SCHEMA = {"n": int, "name?": (str, type(None)), "parts": [{"size": matching(lambda n: n > 0, "must be positive")}]}


def test_content_that_fits_its_schema_passes():
    check_content({"n": 1, "parts": [{"size": 2}], "other": object()}, SCHEMA)
    check_content({"n": 1, "parts": (), "name": None}, SCHEMA)


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "the content is None where a mapping is needed"),
        ({}, "n is missing"),
        ({"n": True, "parts": []}, "n is of type bool where int is needed"),
        ({"n": 1, "name": 2, "parts": []}, "name is of type int where str or None is needed"),
        ({"n": 1, "parts": 3}, "parts is of type int where a list is needed"),
        ({"n": 1, "parts": "ab"}, "parts is of type str where a list is needed"),
        ({"n": 1, "parts": [{"size": 1}, {"size": -1}]}, r"parts\[1\].size must be positive, is -1"),
        ({"n": 1, "parts": [{"size": "x"}]}, r"parts\[0\].size must be positive, is of type str"),
    ],
)
def test_content_that_does_not_is_named(content, problem):
    with pytest.raises(ContentError, match=problem):
        check_content(content, SCHEMA)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
def test_a_file_that_is_no_json_is_an_error_of_its_own(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ContentError, match="no JSON"):
        read_json(tmp_path / "a.json")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*network\.onnx'"),
        replacing(tmp_path / "network.onnx") as file,
    ):
        file.write("x")
    assert not list(tmp_path.iterdir())
