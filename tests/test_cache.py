import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from datasets import cache, store_build, store_spec
from datasets.audio import Sampling, read_audio, to_int16
from datasets.audio_files import AudioFiles
from datasets.cache import find_problem, open_store
from datasets.store_spec import make_spec
from datasets.tau import DataError, read_meta, segment_order
from models import FRONTENDS

pytestmark = pytest.mark.slow


def open_quietly(root: Path, cache_path: Path, rate: int | Sampling = 32000) -> cache.WaveformStore:
    return open_store(read_meta(root), rate, cache_path, progress=False)


def test_clips_are_those_that_librosa_reads(tau, tmp_path):
    store = open_quietly(tau.root, tmp_path)
    meta = read_meta(tau.root)
    files = meta.files[[0, 17, 40]]
    clips = store.read(store.rows(files))
    assert clips.shape == (3, 32000)
    for file, clip in zip(files, clips, strict=True):
        expected, _ = librosa.load(tau.root / file, sr=32000)
        np.testing.assert_array_equal(clip, to_int16(expected))


def test_real_clips_are_resampled_as_for_the_published_checkpoint(shared):
    data = torch.load(shared("golden/cpjku_dcase23/checkpoint_real_clips.pt"), weights_only=True)
    for file, expected in zip(data["files"], data["wave32k"].numpy(), strict=True):
        waveform = read_audio(shared("audio/tau22_samples") / file, 32000)
        np.testing.assert_allclose(waveform, expected, rtol=0, atol=1e-6)


def test_a_front_end_may_want_torchaudios_filter(tau, tmp_path):
    """As the front ends do whose authors resample with it; both stores lie in one folder."""
    plain = open_quietly(tau.root, tmp_path, 32000)
    store = open_quietly(tau.root, tmp_path, Sampling(32000, "sinc"))
    assert store.folder.parent == plain.folder.parent and store.folder != plain.folder
    resample = torchaudio.transforms.Resample(44100, 32000)
    for file, samples in zip(store.spec.files, store.read(np.arange(3)), strict=False):
        expected = resample(torch.from_numpy(soundfile.read(tau.root / file, dtype="float32")[0]))
        np.testing.assert_array_equal(samples, to_int16(expected.numpy()))
    files = AudioFiles(tau.root, np.array(store.spec.files), Sampling(32000, "sinc"))
    read = files.read(files.rows(store.spec.files[2:5]))
    np.testing.assert_array_equal(to_int16(read), store.read(np.arange(2, 5)))
    wanted = {name: kind.resampler for name, (_, kind) in FRONTENDS.items()}
    assert {name for name, resampler in wanted.items() if resampler != "soxr_hq"} == {"dcase24_mel", "dragonsearch_mel"}


def test_ten_second_clips_work(shared, tmp_path):
    source = shared("audio/tau20_samples") / "metro_station-paris.wav"
    root = tmp_path / "tau20"
    (root / "audio").mkdir(parents=True)
    name = "audio/metro_station-paris-1-2-a.wav"
    (root / name).write_bytes(source.read_bytes())
    (root / "meta.csv").write_text(
        f"filename\tscene_label\tidentifier\tsource_label\n{name}\tmetro_station\tparis-1\ta\n"
    )
    store = open_quietly(root, tmp_path, rate=32000)
    expected, _ = librosa.load(source, sr=32000)
    assert store.n_samples == len(expected) == 320_000
    np.testing.assert_array_equal(store.read(np.array([0]))[0], to_int16(expected))


def test_rows_are_in_segment_order(tau, tmp_path):
    store = open_quietly(tau.root, tmp_path)
    meta = read_meta(tau.root)
    assert store.spec.files == meta.files[segment_order(meta.files)].tolist()


def test_a_second_opening_builds_nothing(tau, tmp_path, monkeypatch):
    open_quietly(tau.root, tmp_path)
    monkeypatch.setattr(cache, "build_store", None)
    open_quietly(tau.root, tmp_path)


def test_other_rates_and_lists_have_stores_of_their_own(tau, own_tau, tmp_path):
    folders = {
        open_quietly(root, tmp_path, rate).folder for root in (tau.root, own_tau.root) for rate in (16000, 44100)
    }
    assert len(folders) == 4


def test_a_store_outlives_its_audio(tau, tmp_path, caplog):
    before = open_quietly(tau.root, tmp_path).read(np.array([3]))
    (tau.root / "audio").rename(tau.root / "elsewhere")
    np.testing.assert_array_equal(open_quietly(tau.root, tmp_path).read(np.array([3])), before)
    assert "has no audio; using the store" in caplog.text


def damage_content(folder: Path) -> None:
    with open(folder / "waveforms.i16", "r+b") as file:
        file.seek(70_000)
        file.write(b"\x55\x55\x55")


def damage_length(folder: Path) -> None:
    os.truncate(folder / "waveforms.i16", 1000)


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def other_resampler(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"resampler": "linear"}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_content, "checksum"),
        (damage_length, "has 1000 bytes"),
        (damage_manifest, "no manifest"),
        (other_resampler, "resampler is linear"),
        (lambda folder: (folder / "waveforms.i16").unlink(), "missing"),
    ],
)
def test_a_store_that_does_not_fit_is_built_again(tau, tmp_path, caplog, damage, reason):
    store = open_quietly(tau.root, tmp_path)
    expected = np.array(store.waveforms)
    damage(store.folder)
    again = open_quietly(tau.root, tmp_path)
    assert reason in caplog.text
    np.testing.assert_array_equal(again.waveforms, expected)


def test_a_changed_audio_file_is_noticed(tau, tmp_path, caplog):
    open_quietly(tau.root, tmp_path)
    file = tau.root / read_meta(tau.root).files[5]
    soundfile.write(file, np.zeros(44100), 44100, subtype="PCM_16")  # same format, other size
    store = open_quietly(tau.root, tmp_path)
    assert f"first audio/{file.name}" in caplog.text
    assert not store.read(store.rows([f"audio/{file.name}"])).any()


@pytest.mark.parametrize(
    ("break_file", "message"),
    [
        (lambda path: path.unlink(), "1 of .* clips .* have no audio file"),
        (lambda path: path.write_bytes(b""), "cannot be read as audio"),
        (lambda path: path.write_bytes(b"RIFF" + b"?" * 1000), "cannot be read as audio"),
        (lambda path: path.write_bytes(path.read_bytes()[:60_000]), "cut short|have 44100 samples"),
        (lambda path: soundfile.write(path, np.ones(48000), 48000), "48000 samples at 48000 Hz"),
        (lambda path: soundfile.write(path, np.ones(44099), 44100), "44099 samples"),
    ],
)
def test_a_broken_clip_is_named(tau, tmp_path, break_file, message):
    file = read_meta(tau.root).files[20]
    break_file(tau.root / file)
    with pytest.raises(DataError, match=message) as caught:
        open_quietly(tau.root, tmp_path)
    assert Path(file).name in str(caught.value)


def test_a_killed_build_goes_on_where_it_stopped(tau, tmp_path, monkeypatch):
    """SIGKILL in the middle; the next build reads only what is not in the journal."""
    script = textwrap.dedent(
        f"""
        import time
        from datasets import cache, store_build, store_spec
        from datasets.tau import read_meta
        store_spec.BLOCK_ROWS = 4
        slow = store_build.read_audio
        def read_audio(*arguments):
            time.sleep(0.02)
            return slow(*arguments)
        store_build.read_audio = read_audio
        cache.open_store(read_meta({str(tau.root)!r}), 32000, {str(tmp_path)!r}, progress=False)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.building/journal.jsonl"))) == 0 or n_journal_lines(tmp_path) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_done = n_journal_lines(tmp_path) - 1
    assert 0 < n_done < 18

    monkeypatch.setattr(store_spec, "BLOCK_ROWS", 4)
    monkeypatch.setattr(store_build, "N_SPOT_CHECKS", 2)
    read = []
    monkeypatch.setattr(store_build, "read_audio", lambda path, *rest: read.append(path) or read_audio(path, *rest))
    store = open_quietly(tau.root, tmp_path)
    assert len(read) <= 72 - 4 * n_done + 2
    meta = read_meta(tau.root)
    for file in meta.files[[0, 30, 71]]:
        expected = to_int16(read_audio(tau.root / file, 32000))
        np.testing.assert_array_equal(store.read(store.rows([file]))[0], expected)
    assert find_problem(store.folder, *make_spec(meta, 32000), verify=True) is None


def n_journal_lines(cache_path: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in cache_path.glob("*.building/journal.jsonl"))


def test_a_full_disk_is_an_os_error(tau, tmp_path, monkeypatch):
    def fallocate(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(OSError, match="No space left"):
        open_quietly(tau.root, tmp_path)


def test_a_name_that_the_store_does_not_hold_is_an_error(tau, tmp_path):
    with pytest.raises(DataError, match="audio/none"):
        open_quietly(tau.root, tmp_path).rows(["audio/none.wav"])


def test_windows_are_pieces_of_the_rows_end_to_end(tau, tmp_path):
    store = open_quietly(tau.root, tmp_path, rate=44100)
    n_rows, n_samples = store.waveforms.shape
    joined = np.concatenate([store.read(np.array([row]))[0] for row in range(n_rows)])
    starts = np.array([44100, 0, len(joined) - 1000, 3 * 44100 - 1, 7])
    windows = store.read_windows(starts, 1000)
    assert windows.shape == (5, 1000)
    assert windows.dtype == np.int16
    for window, start in zip(windows, starts, strict=True):
        np.testing.assert_array_equal(window, joined[start : start + 1000])
    np.testing.assert_array_equal(store.read_windows(np.array([2 * n_samples]), n_samples), store.read(np.array([2])))
    assert store.read_windows(np.array([], dtype=np.int64), 1000).shape == (0, 1000)


@pytest.mark.parametrize("start", [-1, 72 * 44100 - 999])
def test_a_window_beyond_the_file_is_an_error(tau, tmp_path, start):
    store = open_quietly(tau.root, tmp_path, rate=44100)
    with pytest.raises(IndexError, match="do not lie within"):
        store.read_windows(np.array([0, start]), 1000)
