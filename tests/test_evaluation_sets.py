import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import run_dataset
from datasets.cache import open_store
from datasets.doctor import check
from datasets.known import DATASETS, known_as
from datasets.tau import DataError, is_evaluation_set, read_clips, read_evaluation, read_meta
from tests.http_server import FileServer, make_zip, publish_record
from tests.test_run_dataset import no_proxy, outcome  # noqa: F401 (a fixture)

DEVICES = ["a", "unknown", "s3", "b", "unknown", "a"]


def write_set(root: Path, devices: list[str] | None = None, n: int = 6) -> Path:
    """An evaluation set as published: clips with numbers for names, in an order of the list's own."""
    (root / "audio").mkdir(parents=True)
    (root / "evaluation_setup").mkdir()
    order = [*range(n)][::-1]
    for i in order:
        samples = np.random.default_rng(i).uniform(-0.5, 0.5, 800)
        soundfile.write(root / "audio" / f"{i}.wav", samples, 800, subtype="PCM_24")
    lines = ["filename", *(f"audio/{i}.wav" for i in order)]
    if devices is not None:
        lines = [f"{line}\t{name}" for line, name in zip(lines, ["device_id", *devices], strict=True)]
    (root / "evaluation_setup" / "fold1_test.csv").write_text("\n".join(lines) + "\n")
    return root


def test_clips_keep_the_order_of_the_list_and_have_no_labels(tmp_path):
    clips = read_evaluation(write_set(tmp_path / "eval", DEVICES))
    assert clips.files.tolist() == [f"audio/{i}.wav" for i in range(5, -1, -1)]
    assert clips.recording_device.tolist() == DEVICES
    assert not hasattr(clips, "scene") and not hasattr(clips, "scenes")
    assert read_evaluation(write_set(tmp_path / "older")).recording_device is None


def test_the_store_holds_them_by_name(tmp_path):
    clips = read_clips(write_set(tmp_path / "eval"))
    store = open_store(clips, 800, tmp_path / "cache", progress=False)
    read = store.read(store.rows(clips.files))
    for file, samples in zip(clips.files, read, strict=True):
        wanted = soundfile.read(clips.root / file)[0]
        assert np.abs(samples / 32768 - wanted).max() <= 0.5 / 32768 + 1e-6


@pytest.mark.parametrize("edition", ["2024", "2025"])
def test_lists_are_read_as_the_published_submissions_have_them(shared, tmp_path, edition):
    folder = shared(f"golden/dcase_baselines/submission_{edition}")
    (tmp_path / "evaluation_setup").mkdir()
    shutil.copy(folder / "fold1_test.csv", tmp_path / "evaluation_setup")
    clips = read_evaluation(tmp_path)
    answers = [line.split("\t")[0] for line in (folder / "output.csv").read_text().splitlines()[1:]]
    assert [Path(file).name for file in clips.files] == [Path(name).name for name in answers]
    assert (clips.recording_device is not None) == (edition == "2025")


def test_check_and_cache_take_them(tmp_path, capsys):
    root = write_set(tmp_path / "eval", DEVICES)
    assert run_dataset.main(["check", "--dataset_dir", str(root)]) == 0
    table = capsys.readouterr().out
    assert "without labels" in table and "all is well" in table
    assert [line.split() for line in table.splitlines() if line.startswith("unknown")] == [["unknown", "2"]]
    command = ["cache", "--dataset_dir", str(root), "--cache_path", str(tmp_path / "c"), "--resample_rate", "400"]
    assert run_dataset.main(command) == 0
    assert "6 clips at 400 Hz" in capsys.readouterr().out
    (root / "audio" / "3.wav").unlink()
    (root / "audio" / "7.wav").write_bytes(b"")
    assert run_dataset.main(["check", "--dataset_dir", str(root)]) == 1
    table = capsys.readouterr().out
    assert "1 x listed clip has no file" in table and "1 x audio file that fold1_test.csv does not list" in table


def test_published_counts_are_compared(tmp_path):
    root = write_set(tmp_path / "TAU-urban-acoustic-scenes-2025-mobile-evaluation")
    _, findings = check(root, progress=False)
    problems = [finding.problem for finding in findings]
    assert "the list of clips has 6 clips, published are 178,930" in problems
    assert any(problem.startswith("another rate: 800 samples at 800 Hz") for problem in problems)


def test_nothing_is_trained_or_scored_on_them(tmp_path, monkeypatch, capsys):
    root = write_set(tmp_path / "eval")
    (root / "meta.csv").write_text("filename\naudio/0.wav\n")  # some editions have one, with nothing else in it
    assert is_evaluation_set(root)
    with pytest.raises(DataError, match="is an evaluation set without labels"):
        read_meta(root)
    command = ["preview", "--dataset_dir", root, "--cache_path", tmp_path / "c", "--out", tmp_path / "p"]
    assert outcome(command, monkeypatch) == 2
    assert "is an evaluation set without labels" in capsys.readouterr().err


def test_a_development_set_that_lacks_a_list_is_none(tau):
    setup = tau.root / "evaluation_setup"
    (setup / "fold1_train.csv").rename(setup / "fold1_test.csv")
    assert not is_evaluation_set(tau.root)
    assert any("fold1_train.csv is missing" in finding.problem for finding in check(tau.root, quick=True)[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\naudio/0.wav\n", "lacks the column"),
        ("filename\n", "lists no clips"),
        ("filename\naudio/0.wav\naudio/0.wav\n", "more than once"),
        ("filename\n../0.wav\n", "does not lie in"),
        ("filename\tdevice_id\naudio/0.wav\t\n", "line 2: the column device_id is empty"),
    ],
)
def test_a_broken_list_is_one_clear_error(tmp_path, text, message):
    root = write_set(tmp_path / "eval")
    (root / "evaluation_setup" / "fold1_test.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_evaluation(root)


def test_a_set_is_downloaded_by_name(tmp_path, capsys):
    folder = DATASETS["eval25"].folder
    root = write_set(tmp_path / folder, DEVICES)
    entries = {f"{folder}/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with FileServer() as server:
        publish_record(server, DATASETS["eval25"].record, {"a.zip": make_zip(entries)})
        command = ["download", "--set", "eval25", "--dataset_dir", str(tmp_path / "data")]
        assert run_dataset.main([*command, "--zenodo_api", server.url("/api")]) == 0
    assert f"the data set is in {tmp_path / 'data' / folder}" in capsys.readouterr().out
    assert read_evaluation(tmp_path / "data" / folder).recording_device.tolist() == DEVICES


def test_a_set_without_a_known_record_says_where_to_look(monkeypatch, capsys):
    assert outcome(["download", "--set", "eval24"], monkeypatch) == 2
    error = capsys.readouterr().err
    assert "https://dcase.community/challenge2024/" in error and "--record" in error


def test_the_table_of_data_sets(shared):
    assert DATASETS["tau22"].record == 6337421
    records = [row.record for row in DATASETS.values() if row.record is not None]
    assert len(records) == len(set(records))
    published = json.loads(shared("golden/dcase_baselines/splits.json").read_text())
    for name, key in (("eval22", "2022_2023"), ("eval23", "2022_2023"), ("eval24", "2024"), ("eval25", "2025")):
        assert DATASETS[name].n_clips == published[f"evaluation_{key}"]["items"]
    tau20, tau22 = DATASETS["tau20"], DATASETS["tau22"]
    for field in ("n_clips", "n_train", "n_test"):
        assert 10 * getattr(tau20, field) == getattr(tau22, field)
    assert known_as(Path("any"), 230_350, is_labelled=True) is tau22
    assert known_as(Path("any"), 118_800, is_labelled=False) is None  # two editions
