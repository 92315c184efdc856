import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from scipy.stats import kstest

from datasets.audio import resample, to_int16
from datasets.cache import open_joined_store, open_store
from datasets.crops import CroppedClips, ShiftedClips, find_runs
from datasets.tau import DataError, hold_out_recordings, read_meta, train_rows
from datasets.waveforms import Clips, batches, epoch_order
from tests.conftest import TauFolder, make_tau
from tests.golden_inputs import wave

CPU = torch.device("cpu")
RATE, N_SAMPLES, N_SEGMENTS = 4000, 200, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> TauFolder:
    """Three scenes; on two devices each has a recording of five segments for training and one for testing."""
    root = tmp_path_factory.mktemp("crops") / "tau"
    scenes, devices = ["bus", "park", "tram"], ["a", "s1"]
    return make_tau(root, scenes, devices, devices, N_SEGMENTS, rate=RATE, seconds=N_SAMPLES / RATE)


def make_clips(folder: TauFolder, rows: np.ndarray | None = None, cls: type = CroppedClips, seed: int = 0) -> Clips:
    """The training part (or `rows`), shuffled so that nothing rests on the order of rows."""
    meta = read_meta(folder.root)
    rows = np.random.default_rng(seed).permutation(train_rows(meta) if rows is None else rows)
    logits = np.random.default_rng(5).standard_normal((len(rows), 10)).astype(np.float16)
    return cls(meta, rows, open_store(meta, RATE, folder.root / "cache", progress=False), logits)


def slow_runs(clips: Clips) -> list[list[int]]:
    """Positions of the clips of each run, from their names alone: an independent reference."""

    def parts(position: int) -> tuple[str, str, int]:
        recording, segment, device = re.fullmatch(r"audio/(.+)-(\d+)-(\w+)\.wav", clips.files[position]).groups()
        return recording, device, int(segment)

    runs = []
    for _, group in groupby(sorted(range(len(clips)), key=parts), key=lambda position: parts(position)[:2]):
        for position in group:
            if runs and parts(runs[-1][-1]) == (*parts(position)[:2], parts(position)[2] - 1):
                runs[-1].append(position)
            else:
                runs.append([position])
    return runs


def joined(clips: Clips, run: list[int]) -> np.ndarray:
    """The segments of a run one after the other (sample,), read clip by clip."""
    return np.concatenate([clips.store.read(clips.store.rows([clips.files[i]]))[0] for i in run])


def find_starts(clips: CroppedClips, waveform: torch.Tensor) -> np.ndarray:
    """Where in its own run each item's window (clip, sample) lies; fails where it lies nowhere."""
    starts = np.full(len(clips), -1)
    for run in slow_runs(clips):
        whole = np.lib.stride_tricks.sliding_window_view(joined(clips, run), clips.store.n_samples)
        for i in run:
            (found,) = np.nonzero((whole == waveform[i].numpy()).all(axis=1))
            assert len(found) == 1, f"the window of {clips.files[i]} is found {len(found)} times in its run"
            starts[i] = found[0]
    return starts


def whole_epoch(clips: CroppedClips, seed: int, epoch: int):
    clips.start_epoch(seed, epoch)
    return clips.batch(torch.arange(len(clips)))


def without(files: list[str], *patterns: str) -> list[str]:
    return [file for file in files if not any(re.search(pattern, file) for pattern in patterns)]


def rows_of(folder: TauFolder, files: list[str]) -> np.ndarray:
    meta = read_meta(folder.root)
    return np.array([meta.row_of[file] for file in files])


def train_files(folder: TauFolder) -> list[str]:
    meta = read_meta(folder.root)
    return meta.files[train_rows(meta)].tolist()


def test_every_item_is_a_window_of_the_joined_segments_of_its_own_recording(folder):
    clips = make_clips(folder)
    assert sorted(map(len, slow_runs(clips))) == [N_SEGMENTS] * 6
    batch = whole_epoch(clips, seed=0, epoch=0)
    assert batch.waveform.shape == (30, N_SAMPLES)
    assert batch.waveform.dtype == torch.int16
    starts = find_starts(clips, batch.waveform)
    assert (starts % N_SAMPLES != 0).mean() > 0.9  # they do cross segments
    plain = make_clips(folder, cls=Clips).batch(torch.arange(30))  # what is known of an item is what is known of clip i
    assert torch.equal(batch.target, plain.target)
    assert torch.equal(batch.recording_device, plain.recording_device)
    assert clips.files.tolist() == make_clips(folder, cls=Clips).files.tolist()


@pytest.mark.parametrize(
    ("patterns", "lengths"),
    [
        (["park.*-2-a"], [2, 2, 5, 5, 5, 5, 5]),  # a segment that belongs to another part
        (["park.*-0-a", "tram.*-4-s1"], [4, 4, 5, 5, 5, 5]),
        (["bus", "-s1"], [5, 5]),
    ],
)
def test_windows_hold_nothing_but_the_parts_own_clips(folder, patterns, lengths):
    clips = make_clips(folder, rows_of(folder, without(train_files(folder), *patterns)))
    assert sorted(map(len, slow_runs(clips))) == lengths
    for epoch in range(20):
        starts = find_starts(clips, whole_epoch(clips, seed=1, epoch=epoch).waveform)
        alone = [i for run in slow_runs(clips) if len(run) == 1 for i in run]
        assert not starts[alone].any()


def test_held_out_recordings_are_not_touched(folder):
    meta = read_meta(folder.root)
    kept, held = hold_out_recordings(meta, train_rows(meta), 0.34, seed=0)
    for rows in (kept, held):
        clips = make_clips(folder, rows)
        find_starts(clips, whole_epoch(clips, seed=0, epoch=0).waveform)


def test_a_segment_missing_in_the_data_set_ends_a_run(tmp_path):
    """Segments 1 and 3 are neighbours in the store, but not in time."""
    folder = TauFolder(tmp_path / "gap", rate=RATE, seconds=0.05)
    files = [folder.add("bus", "paris", 1, segment, "a") for segment in (0, 1, 3, 4)]
    folder.write_lists(files, [folder.add("park", "milan", 2, 0, "a")])
    clips = make_clips(folder)
    assert sorted(map(len, slow_runs(clips))) == [2, 2]
    for epoch in range(30):
        find_starts(clips, whole_epoch(clips, seed=0, epoch=epoch).waveform)


def test_names_of_another_pattern_give_whole_clips(folder):
    names = np.array(["audio/a.wav", "audio/b.wav", "audio/bus-paris-1-1-0-a.wav", "audio/bus-paris-1-1-1-a.wav"])
    first, length = find_runs(np.arange(4), names)
    assert first.tolist() == [0, 1, 2, 2]
    assert length.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "other",
    ["audio/bus-paris-1-1-1-b.wav", "audio/bus-paris-1-2-1-a.wav", "audio/bus-lyon-1-1-1-a.wav"],
    ids=["device", "recording", "city"],
)
def test_what_follows_in_time_but_is_of_another_recording_or_device_is_another_run(other):
    _, length = find_runs(np.arange(2), np.array(["audio/bus-paris-1-1-0-a.wav", other]))
    assert length.tolist() == [1, 1]


def test_clips_that_are_no_neighbours_in_the_store_are_no_run():
    names = np.array([f"audio/bus-paris-1-1-{segment}-a.wav" for segment in range(3)])
    first, length = find_runs(np.array([4, 5, 7]), names)
    assert first.tolist() == [0, 0, 2]
    assert length.tolist() == [2, 2, 1]


def test_windows_are_a_function_of_seed_and_epoch(folder):
    clips = make_clips(folder)
    first = whole_epoch(clips, 3, 7).waveform
    others = [whole_epoch(clips, seed, epoch).waveform for seed, epoch in ((3, 8), (4, 7), (7, 3))]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(whole_epoch(make_clips(folder), 3, 7).waveform, first)  # another process


def test_starts_are_uniform_over_the_run(folder):
    clips = make_clips(folder)
    starts = np.stack([find_starts(clips, whole_epoch(clips, 0, epoch).waveform) for epoch in range(100)])
    last = (N_SEGMENTS - 1) * N_SAMPLES
    assert starts.min() < 10  # 3000 draws of 801 starts: both ends are reached
    assert starts.max() > last - 10
    assert kstest((starts.ravel() + 0.5) / (last + 1), "uniform").pvalue > 0.01
    # The items of a run draw for themselves, and so do the epochs.
    deviations = starts - starts.mean(axis=0)
    correlation = np.corrcoef(deviations.T) - np.eye(len(clips))
    assert np.abs(correlation).max() < 0.45  # 4.5 sigma, of 435 pairs
    assert len(set(map(tuple, starts.tolist()))) == 100


def test_both_ends_of_a_run_can_be_drawn(tmp_path):
    folder = TauFolder(tmp_path / "short", rate=100, seconds=0.04)  # 4 samples: 5 starts in a run of two
    files = [folder.add("bus", "paris", 1, segment, "a") for segment in (0, 1)]
    folder.write_lists(files, [folder.add("park", "milan", 2, 0, "a")])
    meta = read_meta(folder.root)
    clips = CroppedClips(meta, train_rows(meta), open_store(meta, 100, tmp_path / "cache", progress=False))
    whole = joined(clips, [0, 1])
    seen = {tuple(row) for epoch in range(60) for row in whole_epoch(clips, 0, epoch).waveform.tolist()}
    assert seen == {tuple(whole[start : start + 4].tolist()) for start in range(5)}


@pytest.mark.parametrize("loaded_first", [True, False])
def test_windows_from_the_devices_memory_are_those_of_the_store(folder, loaded_first):
    rows = rows_of(folder, without(train_files(folder), "park.*-2-a", "bus.*-3-s1"))
    from_store, on_device = make_clips(folder, rows), make_clips(folder, rows)
    from_store.start_epoch(2, 1)
    if loaded_first:
        on_device.load_onto(CPU)
    on_device.start_epoch(2, 1)
    if not loaded_first:
        on_device.load_onto(CPU)
    assert on_device.n_bytes == 2 * len(rows) * N_SAMPLES
    order = epoch_order(len(rows), 2, 1)
    pairs = zip(
        batches(from_store, order, 8, CPU, n_ahead=0), batches(on_device, order, 8, CPU, n_ahead=0), strict=True
    )
    for a, b in pairs:
        for name in ("waveform", "target", "recording_device", "teacher_logits"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    # The file is not needed any more.
    on_device.store = SimpleNamespace(n_samples=N_SAMPLES)
    on_device.start_epoch(2, 2)
    assert torch.equal(on_device.batch(order).waveform, whole_epoch(from_store, 2, 2).waveform[order])


def test_teacher_logits_are_weighted_by_the_overlap(folder):
    clips = make_clips(folder, rows_of(folder, without(train_files(folder), "park.*-2-a")))
    batch = whole_epoch(clips, 0, 0)
    starts = find_starts(clips, batch.waveform)
    for run in slow_runs(clips):
        for i in run:
            overlap = np.bincount(
                np.arange(starts[i], starts[i] + N_SAMPLES) // N_SAMPLES, minlength=len(run)
            )  # samples of the window in each segment
            expected = overlap @ clips.teacher_logits[run].double().numpy() / N_SAMPLES
            np.testing.assert_allclose(batch.teacher_logits[i], expected, rtol=0, atol=1e-6)  # float32 rounding
    assert batch.teacher_logits.dtype == torch.float32


def test_teacher_logits_of_whole_segments_are_exact(folder):
    clips = make_clips(folder)
    clips.start_epoch(0, 0)
    for segment in range(N_SEGMENTS):
        clips._starts[:] = segment * N_SAMPLES
        batch = clips.batch(torch.arange(len(clips)))
        for run in slow_runs(clips):
            whole = clips.teacher_logits[run[segment]].float()
            assert torch.equal(batch.teacher_logits[run], whole.expand(len(run), -1))
            row = torch.from_numpy(clips.store.read(clips.store.rows([clips.files[run[segment]]])))
            assert torch.equal(batch.waveform[run], row.expand(len(run), -1))


def test_teacher_logits_may_be_attached_later(folder):
    clips = make_clips(folder)
    logits, clips.teacher_logits = clips.teacher_logits, None
    assert whole_epoch(clips, 0, 0).teacher_logits is None
    clips.teacher_logits = logits
    assert torch.equal(whole_epoch(clips, 0, 0).teacher_logits, whole_epoch(make_clips(folder), 0, 0).teacher_logits)


@pytest.mark.parametrize("n_ahead", [0, 1, 3])
def test_an_interrupted_epoch_goes_on_with_the_same_windows(folder, n_ahead):
    clips = make_clips(folder)
    clips.start_epoch(0, 4)
    order = epoch_order(len(clips), 0, 4)
    whole = list(batches(clips, order, 8, CPU, n_ahead=n_ahead))
    assert [len(batch.waveform) for batch in whole] == [8, 8, 8, 6]
    again = make_clips(folder)
    again.start_epoch(0, 4)
    rest = list(batches(again, order, 8, CPU, start=2, n_ahead=n_ahead))
    assert len(rest) == 2
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.waveform, b.waveform)
        assert torch.equal(a.teacher_logits, b.teacher_logits)
        assert a.waveform.dtype == torch.float32
    in_order = whole_epoch(clips, 0, 4).waveform[order]
    assert torch.equal(torch.cat([batch.waveform for batch in whole]), in_order.float() / 32768)


def test_ten_second_recordings_are_joined_from_real_segments(shared, tmp_path):
    """A real recording, cut into segments as TAU22 does: windows are pieces of the recording itself."""
    source, rate = soundfile.read(shared("audio/tau20_samples") / "metro_station-paris.wav", dtype="int16")
    source = source if source.ndim == 1 else source[:, 0]
    folder = real_segments(tmp_path / "real", source[: 10 * rate], rate, 10)
    meta = read_meta(folder.root)
    clips = CroppedClips(meta, train_rows(meta), open_store(meta, rate, tmp_path / "cache", progress=False))
    clips.start_epoch(0, 0)
    starts = clips._starts.tolist()
    assert max(starts) > 4 * rate
    for start, window in zip(starts, clips.batch(torch.arange(9)).waveform.numpy(), strict=True):
        np.testing.assert_array_equal(window, source[start : start + rate])


def real_segments(root: Path, source: np.ndarray, rate: int, n_segments: int) -> TauFolder:
    """A recording (sample,) int16, cut into segments as TAU22's are; the last one is the test part."""
    folder = TauFolder(root, rate=rate)
    files = [folder.add("metro_station", "paris", 1, segment, "a") for segment in range(n_segments)]
    for file, segment in zip(files, np.split(source, n_segments), strict=True):
        soundfile.write(folder.root / file, segment, rate, subtype="PCM_16")
    folder.write_lists(files[:-1], files[-1:])
    return folder


@pytest.mark.parametrize("rate", [32000, 22050, 8000])
def test_windows_of_resampled_recordings_hold_no_clicks(shared, tmp_path, rate):
    source, source_rate = soundfile.read(shared("audio/tau20_samples") / "metro_station-paris.wav", dtype="int16")
    source = source[: 4 * source_rate] if source.ndim == 1 else source[: 4 * source_rate, 0]
    meta = read_meta(real_segments(tmp_path / "real", source, source_rate, 4).root)
    whole = to_int16(resample(source.astype(np.float32) / 32768, source_rate, rate))
    plain = open_store(meta, rate, tmp_path / "cache", progress=False)
    store = open_joined_store(meta, plain, tmp_path / "cache", progress=False)
    assert np.abs(np.ravel(store.waveforms).astype(int) - whole).max() <= 1  # the last bit of float32 resampling
    assert np.abs(np.ravel(plain.waveforms).astype(int) - whole).max() > 10  # what is mended
    alone = to_int16(resample(source[:source_rate].astype(np.float32) / 32768, source_rate, rate))
    np.testing.assert_array_equal(plain.waveforms[0], alone)  # single clips stay as published checkpoints heard them
    assert open_joined_store(meta, plain, tmp_path / "cache", progress=False).folder == store.folder


def test_a_joined_store_is_built_from_neighbours_alone(tmp_path):
    """A missing segment, another device and names of another pattern are resampled as they stand."""
    source = np.random.default_rng(0).integers(-9000, 9000, (5, 1000), dtype=np.int16)
    folder = TauFolder(tmp_path / "tau", rate=1000)
    files = [
        folder.add("bus", "paris", 1, segment, device) for segment, device in ((0, "a"), (1, "a"), (3, "a"), (4, "b"))
    ]
    for file, segment in zip(files, source, strict=False):
        soundfile.write(folder.root / file, segment, 1000, subtype="PCM_16")
    folder.write_lists(files[:3], files[3:])
    meta = read_meta(folder.root)
    plain = open_store(meta, 500, tmp_path / "cache", progress=False)
    store = open_joined_store(meta, plain, tmp_path / "cache", progress=False)
    same = (store.waveforms == plain.waveforms).all(axis=1)
    assert dict(zip(store.spec.files, same.tolist(), strict=True)) == dict(
        zip(files, [False, False, True, True], strict=True)
    )


def test_where_nothing_is_resampled_there_is_one_store(folder, tmp_path):
    meta = read_meta(folder.root)
    store = open_store(meta, RATE, tmp_path, progress=False)
    assert open_joined_store(meta, store, tmp_path) is store


def test_segments_of_a_broken_number_of_samples_are_resampled_alone_and_told(folder, tmp_path, caplog):
    meta = read_meta(folder.root)  # 200 samples at 4000 Hz are 110.25 at 2205
    store = open_store(meta, 2205, tmp_path, progress=False)
    assert open_joined_store(meta, store, tmp_path) is store
    assert "windows click where they meet" in caplog.text


def test_an_epoch_must_be_started(folder):
    with pytest.raises(RuntimeError, match="start_epoch"):
        make_clips(folder).batch(torch.arange(2))


def test_plain_clips_take_no_notice_of_epochs(folder):
    clips = make_clips(folder, cls=Clips)
    before = clips.batch(torch.arange(4)).waveform
    clips.start_epoch(0, 1)
    assert torch.equal(clips.batch(torch.arange(4)).waveform, before)


def test_clips_without_neighbours_are_refused(folder):
    rows = rows_of(folder, without(train_files(folder), "-[13]-"))
    with pytest.raises(DataError, match=r"need neighbouring segments, .* has none: leave --cropped away"):
        make_clips(folder, rows)


# ---- shifted clips --------------------------------------------------------------------------------------------------


def test_shifted_clips_are_those_that_dragonsearch_means(shared, tmp_path):
    """Its intended crops, sample by sample; clips of a recording of its own stand in another order in meta.csv."""
    (case,) = torch.load(shared("golden/dragonsearch/shifted_crops.pt"), weights_only=True)["cases"]
    rate, recording = case["rate"], wave((1, 10 * case["rate"]), case["key"], 1.0)[0]
    folder = TauFolder(tmp_path / "tau", rate=rate)
    levels = (recording / recording.abs().max() * 30000).round().to(torch.int16)
    for file, segment in zip(case["filenames"], levels.view(10, rate), strict=True):
        soundfile.write(folder.root / file, segment.numpy(), rate, subtype="PCM_16")
        folder.rows.append((file, "park", "lyon-1060", "a"))
    folder.rows = [folder.rows[i] for i in (3, 7, 0, 9, 5, 1, 8, 2, 6, 4)]
    folder.write_lists(case["filenames"], case["filenames"])
    meta = read_meta(folder.root)
    store = open_store(meta, rate, tmp_path / "cache", progress=False)
    clips = ShiftedClips(meta, train_rows(meta), store)
    assert clips.shifts.tolist() == case["shifts_samples"]
    exact = (case["exact_crops"] / recording.abs().max() * 30000).round().to(torch.int16)  # (shift, segment, sample)
    seen = set()
    for epoch in range(60):
        clips.start_epoch(0, epoch)
        for file, window in zip(clips.files, clips.batch(torch.arange(10)).waveform, strict=True):
            segment = case["filenames"].index(file)
            (shift,) = (i for i in range(9) if torch.equal(window, exact[i, segment]))
            seen.add((shift, segment))
    assert len(seen) == 90  # every one of them


def test_shifted_clips_mix_the_logits_of_the_segments_that_they_overlap(folder):
    plain = make_clips(folder, cls=Clips)
    clips = ShiftedClips(plain.meta, plain.rows, plain.store, plain.teacher_logits, step=0.01)
    clips.start_epoch(0, 0)
    batch = clips.batch(torch.arange(len(clips)))
    for run in slow_runs(plain):
        whole = joined(plain, run).astype(np.int32)
        for number, position in enumerate(run):
            before = run[number - 1]  # the last, of the first
            shifts = [
                shift
                for shift in (40, 80, 120, 160)
                if np.array_equal(np.roll(whole, shift)[number * N_SAMPLES :][:N_SAMPLES], batch.waveform[position])
            ]
            share = shifts[0] / N_SAMPLES
            wanted = share * plain.teacher_logits[before] + (1 - share) * plain.teacher_logits[position]
            torch.testing.assert_close(
                batch.teacher_logits[position], torch.as_tensor(wanted).float(), rtol=0, atol=2e-3
            )
    with pytest.raises(DataError, match=r"crop_shift must be below 0\.05, the seconds of a clip, got 0\.1"):
        make_clips(folder, cls=ShiftedClips)


def test_shifted_clips_are_the_same_from_the_memory_of_a_device(folder):
    plain = make_clips(folder, cls=Clips)
    clips = [ShiftedClips(plain.meta, plain.rows, plain.store, plain.teacher_logits, step=0.01) for _ in "ab"]
    clips[1].load_onto(CPU)
    for part in clips:
        part.start_epoch(2, 3)
    a, b = (part.batch(torch.arange(len(part))) for part in clips)
    assert torch.equal(a.waveform, b.waveform) and torch.equal(a.teacher_logits, b.teacher_logits)
