"""Recordings of any rate, format and length: cut as they should be, answered, and what cannot be read is said."""

import io
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import run_evaluation
from datasets.audio import RESAMPLERS, Sampling, read_audio, resample
from datasets.tau import SCENES, DataError
from helpers.checkpoints.checkpoint import CheckpointError, describe, load_checkpoint, load_model, save_checkpoint
from helpers.evaluate.recordings import decoded, find_recordings, read_pcm, read_recording, resampled, windows
from models import FRONTENDS, MODELS, get_frontend, get_model

RATE = 8000
PUBLISHED = "golden/cpjku_dcase23/c0a7nzin/checkpoints/epoch=149-step=81900.ckpt"


def noise(seconds: float, rate: int = 44100, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal(round(seconds * rate)).astype(np.float32)


def pieces(samples: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(samples, np.cumsum(sizes)[np.cumsum(sizes) < len(samples)])


# ---- streams and windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_rate", [32000, 16000, 44100, 48000])
@pytest.mark.parametrize("n_samples", [1, 999, 44100, 100_001])
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_a_stream_is_resampled_as_the_whole(new_rate, n_samples, resampler):
    x, sampling = noise(3)[:n_samples], Sampling(new_rate, resampler)
    whole = resample(x, 44100, sampling)
    stream = np.concatenate(list(resampled(iter(pieces(x, [7, 40000, 1, 30000])), 44100, sampling)))
    assert len(stream) == len(whole)
    np.testing.assert_allclose(stream, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("hop", [3, 10, 14])
@pytest.mark.parametrize("n_samples", [10, 11, 30, 57])
def test_windows_are_cut_across_pieces(hop, n_samples):
    x = np.arange(n_samples, dtype=np.float32)
    found = list(windows(iter(pieces(x, [4, 1, 0, 22, 9])), 10, hop))
    starts = list(range(0, n_samples - 9, hop))
    if starts[-1] + 10 < n_samples:
        starts.append(n_samples - 10)
    assert [one.start for one in found] == starts
    for one in found:
        assert one.end == one.start + 10 and one.samples.tolist() == x[one.start : one.end].tolist()


def test_a_short_recording_is_repeated_and_an_empty_one_refused():
    (one,) = windows(iter([np.array([1.0, 2.0, 3.0], np.float32)]), 8, 8)
    assert (one.start, one.end, one.samples.tolist()) == (0, 3, [1, 2, 3, 1, 2, 3, 1, 2])
    with pytest.raises(DataError, match="holds no samples"):
        list(windows(iter([np.zeros(0, np.float32)]), 8, 8))


@pytest.mark.parametrize(("form", "subtype"), [("u8", "PCM_U8"), ("s16le", "PCM_16"), ("s24le", "PCM_24"),
                                               ("s32le", "PCM_32"), ("f32le", "FLOAT")])  # fmt: skip
def test_raw_samples_are_those_of_a_file(tmp_path, form, subtype):
    stereo = np.stack([noise(0.3), noise(0.3, seed=1)], axis=1)
    soundfile.write(tmp_path / "x.wav", stereo, 44100, subtype=subtype)
    with soundfile.SoundFile(tmp_path / "x.raw", "w", 44100, 2, subtype, format="RAW") as file:
        file.write(stereo)
    raw = (tmp_path / "x.raw").read_bytes()
    found = np.concatenate(list(read_pcm(io.BytesIO(raw + b"\0"), form, 44100, 2, RATE)))
    np.testing.assert_allclose(found, read_audio(tmp_path / "x.wav", RATE), rtol=0, atol=1e-6)
    assert abs(decoded(raw, form)).max() <= 1


@pytest.mark.parametrize(("name", "subtype"), [("x.wav", "PCM_24"), ("x.flac", "PCM_16"), ("x.ogg", "VORBIS"),
                                               ("x.mp3", None), ("x.aiff", "PCM_16")])  # fmt: skip
def test_files_of_any_format_are_read_as_elsewhere(tmp_path, name, subtype):
    soundfile.write(tmp_path / name, np.stack([noise(1.3), noise(1.3, seed=1)], axis=1), 44100, subtype=subtype)
    found = np.concatenate(list(read_recording(tmp_path / name, RATE)))
    whole = read_audio(tmp_path / name, RATE)
    np.testing.assert_allclose(found, whole, rtol=0, atol=2e-6)


def test_memory_does_not_grow_with_a_recording(tmp_path):
    for seconds in (60, 300):
        with soundfile.SoundFile(tmp_path / f"{seconds}.wav", "w", 44100, 1, "PCM_16") as file:
            for second in range(seconds):
                file.write(noise(1, seed=second))
    largest = []
    for seconds in (60, 300):
        tracemalloc.start()
        n_windows = sum(1 for _ in windows(read_recording(tmp_path / f"{seconds}.wav", RATE), RATE, RATE))
        largest.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert n_windows == seconds
    assert largest[1] < 1.2 * largest[0]


def test_folders_are_searched_and_other_files_counted(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.wav", "a.flac", "deep/c.WAV", "notes.txt", ".hidden.wav"):
        (tmp_path / name).write_bytes(b"")
    found, skipped = find_recordings(tmp_path)
    assert [file.name for file in found] == ["a.flac", "b.wav", "c.WAV"] and skipped == 1


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def network(tmp_path, monkeypatch) -> Path:
    """A small network with scenes of its own, trained on clips of half a second."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = get_model("cp_mobile", base_channels=8, n_classes=3)
    frontend = get_frontend("cp_mel", sample_rate=RATE, n_fft=512, win_length=256, hop_length=125, n_mels=32)
    parts = {"model": describe(model, MODELS), "frontend": describe(frontend, FRONTENDS)}
    save_checkpoint(tmp_path / "net.pt", {**parts, "scenes": ["kitchen", "office", "yard"], "clip_samples": RATE // 2})
    return tmp_path / "net.pt"


def expected(network: Path, samples: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    loaded = load_model(network)
    with torch.no_grad():
        logits = loaded.model(loaded.frontend(torch.from_numpy(samples)[None]))
    return (logits / temperature).softmax(dim=1)[0].numpy()


def test_a_long_recording_is_answered_over_time(network, capsys):
    soundfile.write("long.wav", noise(2.3, 22050), 22050, subtype="FLOAT")
    options = ["--model", "net.pt", "long.wav", "--temperature", "2"]
    assert run_evaluation.main([*options, "--hop", "0.25", "--output", "out/scenes.csv"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("long.wav (2.3 s)\n") and "over time:" in printed and "0:00.0 - " in printed
    table = pd.read_csv("out/scenes.csv")
    assert list(table.columns) == ["file", "start", "end", "scene", "probability", "kitchen", "office", "yard"]
    assert table.start.tolist() == [0.25 * i for i in range(8)] + [1.8]
    whole = read_audio(Path("long.wav"), RATE)
    for row in table.itertuples():
        start = round(row.start * RATE)
        values = expected(network, whole[start : start + RATE // 2], 2.0)
        np.testing.assert_allclose([row.kitchen, row.office, row.yard], values, rtol=0, atol=2e-5)
        assert row.scene == ["kitchen", "office", "yard"][values.argmax()]
    assert run_evaluation.main([*options, "--output", "scenes.json"]) == 0
    (content,) = json.loads(Path("scenes.json").read_text())
    assert content["file"] == "long.wav" and len(content["windows"]) == 5
    means = [window["probabilities"]["yard"] for window in content["windows"]]
    assert content["probabilities"]["yard"] == pytest.approx(np.mean(means), abs=1e-5)


def test_standard_input_is_answered_as_it_comes(network, monkeypatch, capsys):
    raw = (np.clip(noise(1.2, RATE), -1, 1) * 32767).astype("<i2").tobytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    assert run_evaluation.main(["--model", "net.pt", "-", "--pcm_rate", str(RATE), "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15] for line in lines] == ["0:00.0 - 0:00.5", "0:00.5 - 0:01.0", "0:00.7 - 0:01.2"]


def test_what_is_broken_in_a_folder_is_named_and_the_others_answered(network, capsys):
    Path("folder").mkdir()
    soundfile.write("folder/good.wav", noise(0.6), 44100)
    Path("folder/broken.wav").write_bytes(b"RIFF nonsense")
    Path("folder/notes.txt").write_text("x")
    assert run_evaluation.main(["--model", "net.pt", "folder"]) == 1
    printed = capsys.readouterr()
    assert "folder/good.wav (0.6 s)" in printed.out and "1 files that are no audio were left out" in printed.out
    assert "folder/broken.wav cannot be read as audio" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.wav"], "nothing.wav is missing"),
        (["empty.wav"], "empty.wav holds no samples"),
        (["nan.wav"], "nan.wav holds samples that are NaN"),
        (["net.pt"], "net.pt cannot be read as audio"),
        (["folder"], "folder holds no audio files"),
        (["a.wav", "-"], "- stands for standard input and goes alone"),
        (["a.wav", "--output", "x.txt"], "--output x.txt: must end in .csv or .json"),
        (["a.wav", "--model", "nobody"], "no teacher nobody"),
        (["a.wav", "--hop", "0"], "--hop: must be > 0"),
        (["a.wav", "--window", "0.01"], "does not take clips of 80 samples"),
    ],
)
def test_bad_input_is_one_line(network, capsys, arguments, message):
    soundfile.write("a.wav", noise(0.6), 44100)
    soundfile.write("empty.wav", noise(0), 44100)
    soundfile.write("nan.wav", np.array([0.1, np.nan], np.float32), 44100, subtype="FLOAT")
    Path("folder").mkdir()
    with pytest.raises((SystemExit, DataError, CheckpointError)) as stop:
        run_evaluation.main(["--model", "net.pt", *arguments])
    assert message in f"{stop.value}{capsys.readouterr().err}"
    assert not Path("x.txt").exists()


def test_the_published_student_knows_real_recordings(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clips = sorted(shared("audio/tau22_samples").glob("*.wav"))
    options = ["--model", str(shared(PUBLISHED)), *map(str, clips), "--output", "s.csv"]
    assert run_evaluation.main(options) == 0
    table = pd.read_csv("s.csv")
    data = torch.load(shared("golden/cpjku_dcase23/checkpoint_real_clips.pt"), weights_only=True)
    wanted = [SCENES[i] for i in data["logits"].argmax(dim=1).tolist()] if len(data["logits"]) == len(clips) else None
    right = [scene == clip.name.split("-")[0] for scene, clip in zip(table.scene, clips, strict=True)]
    assert sum(right) >= 6 and (wanted is None or table.scene.tolist() == wanted)


def test_a_network_may_say_that_it_does_not_know(network, capsys):
    soundfile.write("a.wav", noise(1.0), 44100)
    options = ["--model", "net.pt", "a.wav", "--output", "s.csv", "--unknown_below"]
    assert run_evaluation.main([*options, "0.999"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("a.wav (1.0 s): unknown, the most likely are\n") and "0:00.0 - 0:01.0  unknown" in printed
    assert pd.read_csv("s.csv").scene.tolist() == ["unknown"] * 2
    assert run_evaluation.main([*options, "0.1"]) == 0 and "unknown" not in capsys.readouterr().out


def test_the_temperature_of_a_checkpoint_is_taken(network):
    content = load_checkpoint(network)
    del content["format"]
    save_checkpoint(network, content | {"temperature": 3.0})
    soundfile.write("a.wav", noise(0.5, RATE), RATE, subtype="FLOAT")
    for more, temperature in (([], 3.0), (["--temperature", "1"], 1.0)):
        run_evaluation.main(["--model", "net.pt", "a.wav", "--output", "s.csv", *more])
        row = pd.read_csv("s.csv").iloc[0]
        wanted = expected(network, read_audio(Path("a.wav"), RATE), temperature)
        np.testing.assert_allclose([row.kitchen, row.office, row.yard], wanted, rtol=0, atol=2e-5)
