import sys

import pytest

import run_dataset
from helpers import cli
from tests.http_server import FileServer, make_zip, publish_record


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("TAU22_DIR", raising=False)


def outcome(arguments: list[str], monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["run_dataset.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.run(run_dataset.main)
    return caught.value.code


def test_a_downloaded_data_set_checks_and_caches(tau, tmp_path, monkeypatch, capsys):
    top = "TAU-mobile-development"
    paths = sorted(path for path in tau.root.rglob("*") if path.is_file())
    entries = {f"{top}/{path.relative_to(tau.root)}": path.read_bytes() for path in paths}
    audio = {name: content for name, content in entries.items() if name.endswith(".wav")}
    rest = {name: content for name, content in entries.items() if name not in audio}
    with FileServer() as server:
        publish_record(server, 6337421, {"a.audio.1.zip": make_zip(audio), "a.meta.zip": make_zip(rest)})
        download = ["download", "--record", 6337421, "--dataset_dir", tmp_path / "my data"]
        download += ["--zenodo_api", server.url("/api")]
        assert outcome(download, monkeypatch) == 0
    folder = tmp_path / "my data" / top
    next_command = f"next: python run_dataset.py check --dataset_dir '{folder}'"
    assert f"the data set is in {folder}; {next_command}" in capsys.readouterr().out
    assert outcome(["check", "--dataset_dir", folder], monkeypatch) == 0
    assert "all is well" in capsys.readouterr().out
    cache = ["cache", "--dataset_dir", folder, "--cache_path", tmp_path / "cache", "--resample_rate", 8000]
    assert outcome(cache, monkeypatch) == 0
    assert "72 clips at 8000 Hz" in capsys.readouterr().out

    sorted((folder / "audio").iterdir())[0].unlink()
    assert outcome(["check", "--dataset_dir", folder], monkeypatch) == 1
    output = capsys.readouterr().out
    assert "1 x listed clip has no file" in output
    assert output.strip().endswith("1 problem")


def test_an_unreachable_host_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    arguments = ["download", "--dataset_dir", tmp_path, "--zenodo_api", "http://127.0.0.1:9/api"]
    assert outcome(arguments, monkeypatch) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.splitlines()[-1].startswith("error: ")
    assert "127.0.0.1:9" in errors
    assert "Traceback" not in errors


def test_a_missing_folder_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys):
    assert outcome(["check", "--dataset_dir", tmp_path / "none"], monkeypatch) == 2
    assert "meta.csv is missing" in capsys.readouterr().err
    assert outcome(["check"], monkeypatch) == 2
    assert "--dataset_dir" in capsys.readouterr().err
