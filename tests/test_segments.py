import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

import run_dataset
from datasets.doctor import check
from datasets.segments import cut_data_set, segment_name
from datasets.tau import DataError, parse_clip_name, read_meta, recording_key
from datasets.tau import test_rows as rows_for_test
from datasets.tau import train_rows as rows_for_training
from tests.conftest import TauFolder
from tests.test_run_dataset import outcome

RATE = 800


class Tau20(TauFolder):
    """Clips of ten seconds under TAU 2020's names, 24 bit, every sample another one."""

    def add(self, scene: str, city: str, recording: int, device: str) -> str:
        file = f"audio/{scene}-{city}-{recording}-{100 + recording}-{device}.wav"
        samples = np.random.default_rng(len(self.rows)).integers(-(2**23), 2**23, 10 * RATE) * 256
        soundfile.write(self.root / file, samples.astype(np.int32), RATE, subtype="PCM_24")
        self.rows.append((file, scene, f"{city}-{recording}", device))
        return file

    def write_lists(self, train: list[str], test: list[str]) -> None:
        super().write_lists(train, test)
        setup = self.root / "evaluation_setup"
        scenes = {file: scene for file, scene, *_ in self.rows}
        for name, files in (("fold1_train", train), ("fold1_evaluate", test)):
            lines = ["filename\tscene_label", *(f"{file}\t{scenes[file]}" for file in files)]
            (setup / f"{name}.csv").write_text("\r\n".join(lines) + "\r\n")
        (setup / "fold1_test.csv").write_text("\n".join(["filename", *test]) + "\n")


@pytest.fixture
def tau20(tmp_path) -> Tau20:
    folder = Tau20(tmp_path / "tau20", RATE)
    train = [folder.add(scene, "paris", 1, device) for scene in ("tram", "bus") for device in ("s1", "a")]
    folder.add("bus", "paris", 3, "a")  # in neither part
    test = [folder.add(scene, "milan", 2, "b") for scene in ("tram", "bus")]
    folder.write_lists(train[::-1], test)
    return folder


def read(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int32")[0]


def test_segments_are_the_clips_to_the_sample_under_tau22s_names(tau20, tmp_path, capsys):
    out = tmp_path / "cut"
    assert run_dataset.main(["cut", "--dataset_dir", str(tau20.root), "--out", str(out)]) == 0
    assert "70 segments" in capsys.readouterr().out
    for file, *_ in tau20.rows:
        segments = [out / segment_name(file, k) for k in range(10)]
        assert np.array_equal(np.concatenate([read(path) for path in segments]), read(tau20.root / file))
        assert {soundfile.info(path).subtype for path in segments} == {"PCM_24"}
        assert {soundfile.info(path).frames for path in segments} == {RATE}
    assert sorted(path.name for path in out.iterdir()) == ["audio", "cut.json", "evaluation_setup", "meta.csv"]
    assert check(out, progress=False)[1] == []


def test_lists_keep_order_and_columns(tau20, tmp_path):
    out = tmp_path / "cut"
    cut_data_set(tau20.root, out, progress=False)
    before, after = (pd.read_csv(root / "meta.csv", sep="\t") for root in (tau20.root, out))
    assert list(after) == list(before)
    assert [*after.filename[:2]] == ["audio/tram-paris-1-101-0-s1.wav", "audio/tram-paris-1-101-1-s1.wav"]
    assert after.scene_label.tolist() == before.scene_label.repeat(10).tolist()
    for name in ("fold1_train", "fold1_evaluate", "fold1_test"):
        before, after = (pd.read_csv(root / f"evaluation_setup/{name}.csv", sep="\t") for root in (tau20.root, out))
        assert list(after) == list(before)
        assert after.filename.tolist() == [segment_name(file, k) for file in before.filename for k in range(10)]
    meta = read_meta(out)
    assert (len(meta), len(rows_for_training(meta)), len(rows_for_test(meta))) == (70, 40, 20)
    assert len(set(meta.recording)) == 5  # one for the devices that recorded together
    name = parse_clip_name(meta.files[3])
    assert (name.recording, name.segment, name.recording_device) == ("101", 3, "s1")


@pytest.mark.slow
def test_names_and_order_are_those_of_the_real_tau22(shared):
    """TAU 2020's list is TAU22's without segments, in the same order: cutting its names must give TAU22's back."""
    index = pd.read_csv(shared("audio/tau22_index.csv.gz"))
    for fold in (index, index[index.fold == "train"], index[index.fold == "test"]):
        names = fold.filename.str.replace(r"-\d-([^-]+)$", r"-\1", regex=True)
        clips = names[names != names.shift()]
        assert len(clips) * 10 == len(fold) and clips.is_unique
        assert [segment_name(file, k) for file in clips for k in range(10)] == fold.filename.tolist()


def test_a_real_clip_of_tau20_is_read_whole_and_cut(shared, tmp_path):
    source = next(shared("audio/tau20_samples").glob("*.wav"))
    root = tmp_path / "real"
    (root / "audio").mkdir(parents=True)
    (root / "evaluation_setup").mkdir()
    file = "audio/metro_station-paris-1-2-a.wav"
    shutil.copy(source, root / file)
    (root / "meta.csv").write_text(
        f"filename\tscene_label\tidentifier\tsource_label\n{file}\tmetro_station\tparis-1\ta\n"
    )
    for name in ("fold1_train", "fold1_evaluate"):
        (root / "evaluation_setup" / f"{name}.csv").write_text(f"filename\n{file}\n")
    assert read_meta(root).recording.tolist() == ["audio/metro_station-paris-1-2".removeprefix("audio/")]
    cut_data_set(root, tmp_path / "cut", progress=False)
    segments = [tmp_path / "cut" / segment_name(file, k) for k in range(10)]
    assert {(i.frames, i.samplerate, i.subtype) for i in map(soundfile.info, segments)} == {(44100, 44100, "PCM_24")}
    assert np.array_equal(np.concatenate([read(path) for path in segments]), read(source))
    assert recording_key(str(segments[0])) == recording_key(str(segments[9]))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_32", "FLOAT", "DOUBLE"])
def test_other_sample_formats_stay_as_they_are(tau20, tmp_path, subtype):
    samples = np.random.default_rng(0).uniform(-1, 1, 10 * RATE)
    for file, *_ in tau20.rows:
        soundfile.write(tau20.root / file, samples, RATE, subtype=subtype)
    cut_data_set(tau20.root, tmp_path / "cut", progress=False)
    file = tau20.rows[0][0]
    segments = [tmp_path / "cut" / segment_name(file, k) for k in range(10)]
    joined = np.concatenate([soundfile.read(path)[0] for path in segments])
    assert np.array_equal(joined, soundfile.read(tau20.root / file)[0])
    assert {soundfile.info(path).subtype for path in segments} == {subtype}


def test_an_interrupted_cut_goes_on(tau20, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    write, n_left = soundfile.write, 25

    def write_some(*arguments, **options):
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise KeyboardInterrupt
        write(*arguments, **options)

    monkeypatch.setattr(soundfile, "write", write_some)
    with pytest.raises(KeyboardInterrupt):
        cut_data_set(tau20.root, out, progress=False)
    assert not (out / "meta.csv").exists()
    monkeypatch.setattr(soundfile, "write", write)
    there = {path: path.stat().st_mtime_ns for path in (out / "audio").glob("[!.]*.wav")}
    assert 0 < len(there) <= 25
    half = next(iter(there))
    os.truncate(half, 1000)  # as after a loss of power
    del there[half]
    assert cut_data_set(tau20.root, out, progress=False) == 70
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert check(out, progress=False)[1] == []
    assert not [*out.rglob("*.part")]


def lines(text: str, change) -> str:
    return "\n".join(change(text.splitlines())) + "\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root, file: soundfile.write(file, np.ones(9 * RATE), RATE), "9 seconds|not 10 seconds"),
        (lambda root, file: soundfile.write(file, np.ones(8000), 800, format="OGG"), "code anew"),
        (lambda root, file: soundfile.write(file, np.ones(9000), 900), "all clips of a data set must agree"),
        (lambda root, file: file.write_bytes(file.read_bytes()[:500]), "cut short|not 10 seconds"),
        (lambda root, file: file.unlink(), "is missing"),
        (lambda root, file: (root / "evaluation_setup/x.csv").write_text("filename\nno.wav\n"), "lists no.wav"),
    ],
)
def test_what_does_not_fit_is_one_line(tau20, tmp_path, monkeypatch, capsys, damage, message):
    damage(tau20.root, tau20.root / tau20.rows[3][0])
    assert outcome(["cut", "--dataset_dir", tau20.root, "--out", tmp_path / "cut"], monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and any(part in error for part in message.split("|")), error
    assert not (tmp_path / "cut" / "meta.csv").exists()


def test_clips_of_one_second_are_refused_by_name(tau, tmp_path):
    with pytest.raises(DataError, match="is not named <scene>-<city>-<location>-<recording>-<device>"):
        cut_data_set(tau.root, tmp_path / "cut", progress=False)


def test_a_folder_with_something_else_is_refused(tau20, tmp_path):
    out = tmp_path / "cut"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="is not empty"):
        cut_data_set(tau20.root, out, progress=False)
    (out / "thesis.tex").unlink()
    cut_data_set(tau20.root, out, progress=False)
    path = tau20.root / "evaluation_setup" / "fold1_train.csv"
    path.write_text(lines(path.read_text(), lambda rows: rows[:-1]))
    with pytest.raises(DataError, match="holds segments of tau20, from other lists"):
        cut_data_set(tau20.root, out, progress=False)
