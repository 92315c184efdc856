import csv
import functools
import hashlib
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datasets import synthetic
from datasets.synthetic import SYNTHETIC_NOTICE, write_synthetic
from datasets.synthetic import devices as synthetic_devices
from datasets.synthetic.devices import MICROPHONES, N_IR_SAMPLES, Microphone
from datasets.synthetic.scenes import SCENE_SOURCES
from datasets.tau import CITIES, RECORDING_DEVICES, SCENES, parse_clip_name, recording_key

pytestmark = pytest.mark.slow

N_TRAIN, N_TEST = 10, 10  # recordings: one per scene and part
ONE_RECORDING_EACH = {"n_train_recordings": 1, "n_test_recordings": 1, "n_workers": 1}


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def contents(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root`."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "set", N_TRAIN, N_TEST, n_workers=2)


@pytest.fixture(scope="module")
def generated_small(tmp_path_factory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "small", **ONE_RECORDING_EACH)


@pytest.fixture
def small(generated_small, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(generated_small, tmp_path / "small")


@pytest.fixture(scope="module")
def cached_render():
    return functools.cache(synthetic.render_scene)


@pytest.fixture
def quick(monkeypatch, cached_render) -> None:
    """For tests that write the same recordings over and over: renders each of them once."""
    monkeypatch.setattr(synthetic, "render_scene", cached_render)


def parts(root: Path) -> tuple[list[str], list[str]]:
    lists = (root / "evaluation_setup" / f"fold1_{name}.csv" for name in ("train", "evaluate"))
    train, test = ([row["filename"] for row in read_rows(path)] for path in lists)
    return train, test


# ---- layout


def test_lists_and_files_agree(root):
    meta = read_rows(root / "meta.csv")
    names = [row["filename"] for row in meta]
    train, test = parts(root)
    assert list(meta[0]) == ["filename", "scene_label", "identifier", "source_label"]
    assert len(set(names)) == len(names) == 10 * (N_TRAIN + N_TEST)
    assert sorted(names) == sorted(f"audio/{path.name}" for path in (root / "audio").iterdir())
    assert sorted(names) == sorted(train + test) and not set(train) & set(test)
    assert [row["filename"] for row in read_rows(root / "evaluation_setup/fold1_test.csv")] == test
    scene_of = {row["filename"]: row["scene_label"] for row in meta}
    for name in ("train", "evaluate"):
        for row in read_rows(root / "evaluation_setup" / f"fold1_{name}.csv"):
            assert row["scene_label"] == scene_of[row["filename"]]
    for row in meta:
        name = parse_clip_name(row["filename"])
        assert row["scene_label"] == name.scene and name.scene in SCENES
        assert row["identifier"] == f"{name.city}-{name.location}" and name.city in CITIES
        assert row["source_label"] == name.recording_device and name.recording_device in RECORDING_DEVICES


def test_parts_are_balanced_and_share_neither_locations_nor_unseen_devices(root):
    train, test = ([parse_clip_name(file) for file in files] for files in parts(root))
    for names in (train, test):
        assert Counter(name.scene for name in names) == dict.fromkeys(SCENES, 10)
    assert not {name.location for name in train} & {name.location for name in test}
    assert {name.recording_device for name in test} == set(RECORDING_DEVICES)
    assert {name.recording_device for name in train} <= {"a", "b", "c", "s1", "s2", "s3"}


@pytest.mark.parametrize("n_recordings", [20, 30, 100, 170])
def test_training_part_is_mostly_device_a_in_sets_of_any_size(n_recordings):
    devices = Counter(recording.device for recording in synthetic._plan_train(n_recordings, 0))
    assert set(devices) == {"a", "b", "c", "s1", "s2", "s3"}
    assert 0.65 <= devices["a"] / n_recordings <= 0.75


def test_default_size_uses_all_cities_and_scores_device_groups_on_the_same_events():
    train, test = synthetic._plan_train(170, 0), synthetic._plan_test(120, 1)
    assert {recording.city for recording in train} == {recording.city for recording in test} == set(CITIES)
    city_of = {recording.location: recording.city for recording in train}
    assert all(city_of[recording.location] == recording.city for recording in train)
    assert min(Counter(city_of.values()).values()) >= 4, "several locations per city"
    assert {len(group) for group in group_by_event(test).values()} == {3}
    for devices in group_by_event(test).values():
        assert {"real" if d in "abc" else "unseen" if d in ("s4", "s5", "s6") else "seen" for d in devices} == {
            "real",
            "seen",
            "unseen",
        }
    beside_a = [devices for devices in group_by_event(train).values() if set(devices) - {"a"}]
    assert sum("a" in devices for devices in beside_a) >= 0.9 * len(beside_a)
    counts = Counter(recording.device for recording in test)
    assert max(counts.values()) - min(counts.values()) <= 2


def group_by_event(plan):
    events = {}
    for recording in plan:
        events.setdefault(recording.event, []).append(recording.device)
    return events


def test_smaller_set_holds_the_first_recordings_of_a_larger(root, generated_small):
    larger = contents(root)
    smaller = {
        name: digest for name, digest in contents(generated_small).items() if name.startswith(("audio/", "dirs/"))
    }
    assert len(smaller) == 20 + synthetic.N_DIRS
    assert smaller.items() <= larger.items()


# ---- audio


def test_clips_have_the_published_format_and_sane_levels(root):
    for path in sorted((root / "audio").iterdir()):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (44100, 1, "PCM_24", 44100), path
        x, _ = soundfile.read(path, dtype="float32")
        assert np.abs(x).max() < 0.96, f"{path} reaches full scale"
        assert 10 ** (-65 / 20) < x.std() < 10 ** (-6 / 20), f"{path} is silent or too loud"


def test_ten_segments_join_without_a_seam(root):
    train, test = parts(root)
    jumps = []
    for first in (file for file in train + test if parse_clip_name(file).segment == 0):
        name = parse_clip_name(first)
        files = [f"{recording_key(first)}-{i}-{name.recording_device}.wav" for i in range(10)]
        clips = [soundfile.read(root / "audio" / Path(file).name)[0] for file in files]
        typical = np.sqrt(np.mean(np.diff(np.concatenate(clips)) ** 2))
        jumps += [(after[0] - before[-1]) / typical for before, after in pairwise(clips)]
    assert len(jumps) == 9 * (N_TRAIN + N_TEST)
    # Steps across the seams are as large as anywhere else, about 1; clips in a wrong order give 8.
    assert np.sqrt(np.mean(np.square(jumps))) < 2


def test_every_recording_and_every_device_sounds_different(root):
    digests = contents(root / "audio")
    assert len(set(digests.values())) == len(digests)


def test_devices_of_one_event_hear_the_same_scene(tmp_path):
    test = synthetic._plan_test(30, 1)
    events = group_by_event(test)
    first = next(iter(events))
    recordings = [recording for recording in test if recording.event == first]
    assert len(recordings) == 3
    spectrum = synthetic.render_scene(0, recordings[0].scene, recordings[0].identifier, first)
    levels = []
    for recording in recordings:
        x = synthetic.record(spectrum, recording.device, synthetic.named_rng(0, recording.device))
        levels.append(20 * np.log10(np.sqrt(np.square(x).reshape(-1, 4410).mean(axis=1))))  # every 100 ms
    for level in levels[1:]:
        assert np.corrcoef(levels[0], level)[0, 1] > 0.5


def test_no_source_gives_a_scene_away():
    uses = Counter(source for recipe in SCENE_SOURCES.values() for source in recipe)
    assert set(SCENE_SOURCES) == set(SCENES)
    assert min(uses.values()) >= 2


def test_impulse_responses_are_audible_and_differ_from_the_devices(root):
    responses = [soundfile.read(path) for path in sorted((root / "dirs").iterdir())]
    assert len(responses) == synthetic.N_DIRS
    of_devices = [microphone.impulse_response() for microphone in MICROPHONES.values()]
    spectra = []
    for response, rate in responses:
        assert rate == 44100 and len(response) == N_IR_SAMPLES
        assert 0.05 < np.linalg.norm(response) < 5 and np.abs(response).max() < 0.96
        assert np.abs(response).argmax() < 50, "minimum phase: no delay"
        spectra.append(response)
    for i, response in enumerate(spectra):
        assert all(np.abs(response - other).max() > 1e-3 for other in spectra[:i] + of_devices)


def test_impulse_response_has_the_magnitude_of_the_description():
    microphone = Microphone(150, 9000, 2, 0.5, ((1000, 6, 0.5),), -3)
    hz = np.array([200, 500, 1000, 2000, 4000, 8000.0])
    turns = np.exp(-2j * np.pi * np.outer(hz, np.arange(N_IR_SAMPLES)) / 44100)
    measured = 20 * np.log10(np.abs(turns @ microphone.impulse_response()))
    # The closing fade smears the response over some 10 Hz.
    np.testing.assert_allclose(measured, microphone.response_db(hz), atol=0.3)


# ---- generating


def test_bytes_do_not_depend_on_the_number_of_workers(generated_small, tmp_path):
    three_workers = write_synthetic(tmp_path / "three", **ONE_RECORDING_EACH | {"n_workers": 3})
    assert contents(three_workers) == contents(generated_small)


def test_recording_does_not_depend_on_which_thread_filled_the_cache(monkeypatch):
    spectrum = synthetic.render_scene(0, "park", "park-lyon-1", "park-lyon-1-2")
    synthetic_devices._transfer(MICROPHONES["a"])
    cached = synthetic.record(spectrum, "a", synthetic.named_rng(0, "a"))
    monkeypatch.setattr(synthetic_devices, "_transfer", synthetic_devices._transfer.__wrapped__)
    np.testing.assert_array_equal(synthetic.record(spectrum, "a", synthetic.named_rng(0, "a")), cached)


def test_another_seed_gives_other_audio_under_other_names(small, tmp_path):
    other = write_synthetic(tmp_path / "other", seed=1, **ONE_RECORDING_EACH)
    for folder in ("audio", "dirs"):
        assert not set(contents(small / folder).values()) & set(contents(other / folder).values())
    # A store of waveforms cannot tell two files of one name and size apart.
    assert not set(contents(small / "audio")) & set(contents(other / "audio"))


def test_finished_set_is_reused_untouched(small, monkeypatch):
    def refuse(*args):
        raise AssertionError("generated again")

    monkeypatch.setattr(synthetic, "_write_audio", refuse)
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert write_synthetic(small, **ONE_RECORDING_EACH) == small
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_what_a_mac_leaves_beside_files_does_not_count(small, monkeypatch):
    (small / "audio/._x.wav").touch()
    monkeypatch.setattr(synthetic, "_prepare", lambda *_: pytest.fail("it is generated again"))
    write_synthetic(small, **ONE_RECORDING_EACH)


def test_interrupted_generation_is_redone(small, quick, tmp_path, monkeypatch):
    expected = contents(small)
    broken = tmp_path / "broken"
    n_calls = 0
    write_wav = synthetic._write_wav

    def stop_midway(path, x):
        nonlocal n_calls
        n_calls += 1
        if n_calls == synthetic.N_DIRS + 7:
            raise KeyboardInterrupt
        write_wav(path, x)

    monkeypatch.setattr(synthetic, "_write_wav", stop_midway)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(broken, **ONE_RECORDING_EACH)
    monkeypatch.setattr(synthetic, "_write_wav", write_wav)
    assert not (broken / "synthetic.json").exists() and (broken / "synthetic.incomplete").exists()
    (broken / "audio/x.wav.1.partial").touch()  # of a killed process
    truncated = next((broken / "audio").glob("*.wav"))
    truncated.write_bytes(truncated.read_bytes()[:1000])
    assert contents(write_synthetic(broken, **ONE_RECORDING_EACH)) == expected


@pytest.mark.parametrize(
    "change", ["clip deleted", "clip cut", "clip added", "other version", "unreadable manifest", "other size"]
)
def test_set_that_does_not_fit_is_replaced(small, quick, change):
    expected = contents(small)
    if change == "clip deleted":
        next((small / "audio").iterdir()).unlink()
    elif change == "clip cut":
        next((small / "audio").iterdir()).write_bytes(b"RIFF")
    elif change == "clip added":
        shutil.copy(next((small / "audio").iterdir()), small / "audio/more.wav")
    elif change == "other version":
        manifest = json.loads((small / "synthetic.json").read_text())
        (small / "synthetic.json").write_text(json.dumps(manifest | {"generator_version": 0}))
    elif change == "unreadable manifest":
        (small / "synthetic.json").write_bytes(b"\xff{")
    else:
        write_synthetic(small, n_train_recordings=2, n_test_recordings=1, n_workers=1)
        assert contents(small) != expected
    assert contents(write_synthetic(small, **ONE_RECORDING_EACH)) == expected


def test_two_processes_generate_one_set_once(small, quick, tmp_path, monkeypatch):
    """As the first processes of two machines do, at the same moment: the second waits."""
    n_generated, write_audio = [], synthetic._write_audio
    monkeypatch.setattr(synthetic, "_write_audio", lambda *rest: n_generated.append(1) or write_audio(*rest))
    with ThreadPoolExecutor(2) as pool:
        roots = list(pool.map(lambda _: write_synthetic(tmp_path / "set", **ONE_RECORDING_EACH), range(2)))
    assert len(n_generated) == 1
    assert contents(roots[0]) == contents(small)


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio/mine.wav").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="not generated here"):
        write_synthetic(tmp_path, **ONE_RECORDING_EACH)
    assert contents(tmp_path) == {"audio/mine.wav": hashlib.sha256(b"mine").hexdigest()}


def test_full_disk_is_reported_before_anything_is_generated(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(OSError, match=r"1 MB are free on this disk, .* needs 3 MB"):
        write_synthetic(tmp_path / "set", **ONE_RECORDING_EACH)
    assert not list(tmp_path.rglob("*.wav"))


@pytest.mark.parametrize("name", ["n_train_recordings", "n_test_recordings", "n_workers", "seed"])
@pytest.mark.parametrize("value", [-1, 2.5, "3", True])
def test_numbers_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= [01], got {value!r}"):
        write_synthetic(tmp_path / "set", **{**ONE_RECORDING_EACH, name: value})
    assert not (tmp_path / "set").exists()


def test_everything_says_what_it_is(root):
    assert "NOT TAU22" in SYNTHETIC_NOTICE and "say nothing about TAU22" in SYNTHETIC_NOTICE
    assert SYNTHETIC_NOTICE in (root / "README.md").read_text()
    manifest = json.loads((root / "synthetic.json").read_text())
    assert manifest["notice"] == SYNTHETIC_NOTICE
    assert (manifest["n_train_clips"], manifest["n_test_clips"]) == (10 * N_TRAIN, 10 * N_TEST)
    assert not (root / "synthetic.incomplete").exists()
