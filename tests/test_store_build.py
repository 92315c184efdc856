"""What must never happen to a store: rows of silence, rows of another data set, a disk filled to the brim."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datasets import cache, store_build, store_spec
from datasets.audio import read_audio, to_int16
from datasets.cache import WaveformStore, find_problem, open_store
from datasets.store_spec import make_spec
from datasets.tau import DataError, read_meta

pytestmark = pytest.mark.slow

RATE = 8000
N_CLIPS = 24


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A data set of 24 short clips in blocks of four."""
    monkeypatch.setattr(store_spec, "BLOCK_ROWS", 4)
    return write_data_set(tmp_path / "data" / "set", seed=0)


def write_data_set(root: Path, seed: int) -> Path:
    (root / "audio").mkdir(parents=True)
    names = [f"audio/bus-lyon-{i // 4}-{i}-{i % 4}-a.wav" for i in range(N_CLIPS)]
    rng = np.random.default_rng(seed)
    for name in names:
        soundfile.write(root / name, rng.uniform(-0.5, 0.5, RATE), RATE, subtype="PCM_16")
    lines = [f"{name}\tbus\tlyon-1\ta" for name in names]
    (root / "meta.csv").write_text("\n".join(["filename\tscene_label\tidentifier\tsource_label", *lines]) + "\n")
    return root


def open_quietly(root: Path, cache_path: Path, **options) -> WaveformStore:
    return open_store(read_meta(root), RATE, cache_path, progress=False, **options)


def assert_holds(store: WaveformStore, root: Path) -> None:
    for row, file in enumerate(store.spec.files):
        np.testing.assert_array_equal(store.waveforms[row], to_int16(read_audio(root / file, RATE)), err_msg=file)


def interrupted_build(root: Path, cache_path: Path) -> tuple[Path, bytes]:
    """A build that met a clip cut short; returns the clip and what was in it."""
    broken = root / read_meta(root).files[18]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:5000])
    with pytest.raises(DataError, match=broken.name):
        open_quietly(root, cache_path)
    (journal,) = cache_path.glob("*.building/journal.jsonl")
    assert len(journal.read_text().splitlines()) > 1
    return broken, whole


def test_a_clip_that_was_repaired_leaves_no_silence(root, tmp_path):
    broken, whole = interrupted_build(root, tmp_path / "cache")
    broken.write_bytes(whole)
    assert_holds(open_quietly(root, tmp_path / "cache"), root)


def test_a_finished_block_whose_clip_changed_is_read_again(root, tmp_path):
    broken, whole = interrupted_build(root, tmp_path / "cache")
    broken.write_bytes(whole)
    for file in read_meta(root).files[:4]:  # same length, other sound
        soundfile.write(root / file, np.full(RATE, 0.25), RATE, subtype="PCM_16")
    assert_holds(open_quietly(root, tmp_path / "cache"), root)


def test_a_journal_without_its_data_is_not_believed(root, tmp_path):
    broken, whole = interrupted_build(root, tmp_path / "cache")
    broken.write_bytes(whole)
    (data,) = (tmp_path / "cache").glob("*.building/waveforms.i16")
    data.unlink()
    assert_holds(open_quietly(root, tmp_path / "cache"), root)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"{}\n", b"\x00" * 100, None, "lines"])
def test_a_damaged_journal_is_no_obstacle(root, tmp_path, damage):
    broken, whole = interrupted_build(root, tmp_path / "cache")
    broken.write_bytes(whole)
    (journal,) = (tmp_path / "cache").glob("*.building/journal.jsonl")
    if damage is None:
        damage = journal.read_bytes()[:-7]
    elif damage == "lines":
        odd = [[0], [99, 1, 2, []], ["a", "b", "c", "d"], None, 7, [0, 1, 2, None], [-1, 0, 0, []], [1.5, 0, 0, []]]
        damage = journal.read_bytes() + "".join(json.dumps(line) + "\n" for line in odd).encode() + b"[" * 5000
    journal.write_bytes(damage)
    assert_holds(open_quietly(root, tmp_path / "cache"), root)


def test_what_was_written_is_compared_with_the_sources(root, tmp_path, monkeypatch):
    monkeypatch.setattr(store_build.os, "pwrite", lambda *_: None)  # a disk that forgets
    with pytest.raises(DataError, match="does not hold"):
        open_quietly(root, tmp_path / "cache")


def test_clips_processed_in_place_are_noticed(root, tmp_path, caplog):
    open_quietly(root, tmp_path / "cache")
    file = root / read_meta(root).files[7]
    soundfile.write(file, np.full(RATE, 0.25), RATE, subtype="PCM_16")  # same size
    assert_holds(open_quietly(root, tmp_path / "cache"), root)
    assert f"audio/{file.name} is not what it was built from" in caplog.text


def test_data_sets_with_the_same_names_and_sizes_have_stores_of_their_own(root, tmp_path, monkeypatch):
    other = write_data_set(tmp_path / "elsewhere" / "set", seed=1)
    folders = {open_quietly(path, tmp_path / "cache").folder for path in (root, other)}
    assert len(folders) == 2
    monkeypatch.setattr(cache, "build_store", None)  # from here on nothing is built
    for path in (root, other, root):
        assert_holds(open_quietly(path, tmp_path / "cache"), path)
        assert_holds(open_quietly(path, tmp_path / "cache", checked=True), path)


def test_a_copy_of_a_data_set_uses_its_store_and_is_compared_once(root, tmp_path, monkeypatch):
    folder = open_quietly(root, tmp_path / "cache").folder
    copy = shutil.copytree(root, tmp_path / "mounted" / "set", copy_function=shutil.copyfile)  # other times
    shutil.rmtree(root)
    compared = []
    checksum = cache.file_checksum
    monkeypatch.setattr(cache, "build_store", None)
    monkeypatch.setattr(cache, "file_checksum", lambda path: compared.append(path) or checksum(path))
    assert open_quietly(copy, tmp_path / "cache").folder == folder
    assert len(compared) == N_CLIPS
    assert open_quietly(copy, tmp_path / "cache").folder == folder
    assert len(compared) == N_CLIPS


def test_a_touched_store_is_verified_once(root, tmp_path, monkeypatch):
    store = open_quietly(root, tmp_path / "cache")
    os.utime(store.folder / "waveforms.i16", (1, 1))
    assert find_problem(store.folder, *make_spec(read_meta(root), RATE)) is None
    monkeypatch.setattr(cache.zlib, "crc32", None)
    assert find_problem(store.folder, *make_spec(read_meta(root), RATE)) is None


MANIFEST_DAMAGE = {
    "checksums": [[], [1], "no", None, {}],
    "files": [7, [], [3], None, "no"],
    "source_bytes": [7, [1], [None]],
    "source_mtimes_ns": [None, [1]],
    "source_checksums": [3, []],
    "n_samples": [0, -1, 2**70, "8000", 1.5, None, True],
    "mtime_ns": [None, "1"],
    "root": [None, 3],
    "version": [None, "2"],
}


@pytest.mark.parametrize("name", MANIFEST_DAMAGE)
def test_a_damaged_manifest_means_another_build(root, tmp_path, name):
    store = open_quietly(root, tmp_path / "cache")
    path = store.folder / "manifest.json"
    for value in (*MANIFEST_DAMAGE[name], "left out"):
        manifest = json.loads(path.read_text()) | {name: value}
        if value == "left out":
            del manifest[name]
        path.write_text(json.dumps(manifest))
        assert_holds(open_quietly(root, tmp_path / "cache"), root)
    path.write_text("[" * 100_000)
    assert_holds(open_quietly(root, tmp_path / "cache"), root)


Usage = namedtuple("Usage", "total used free")


def test_a_store_that_does_not_fit_is_refused_before_it_is_written(root, tmp_path, monkeypatch):
    monkeypatch.setattr(store_build.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 100_000))
    with pytest.raises(DataError, match=f"{tmp_path / 'cache'}: 0.00 GB are free .* --cache_path"):
        open_quietly(root, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.building"))


@pytest.mark.parametrize("number", [27, 28])  # file too large, no space left
def test_a_disk_that_fails_gets_its_space_back(root, tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        open_quietly(root, tmp_path / "cache")
    assert caught.value.filename.endswith(".building")
    assert not list((tmp_path / "cache").glob("*.building"))


def test_a_file_in_the_way_is_named(root, tmp_path):
    folder = open_quietly(root, tmp_path / "cache").folder
    shutil.rmtree(folder)
    folder.with_name(folder.name + ".building").touch()
    with pytest.raises(DataError, match=r"\.building is in the way"):
        open_quietly(root, tmp_path / "cache")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 32768.0])
def test_samples_that_no_recording_holds_are_refused_by_name(root, tmp_path, value):
    file = root / read_meta(root).files[9]
    samples = np.zeros(RATE, np.float32)
    samples[77] = value
    soundfile.write(file, samples, RATE, subtype="FLOAT")
    with pytest.raises(DataError, match=f"{file.name} holds samples"):
        open_quietly(root, tmp_path / "cache")


def test_the_odd_clip_is_named_also_when_it_is_the_first(root, tmp_path):
    first = make_spec(read_meta(root), RATE)[0].files[0]
    soundfile.write(root / first, np.zeros(RATE + 1), RATE, subtype="PCM_16")
    with pytest.raises(DataError, match=f"{Path(first).name} has {RATE + 1} samples"):
        open_quietly(root, tmp_path / "cache")


def test_clips_beside_meta_csv_are_found_in_words(root, tmp_path):
    for file in (root / "audio").iterdir():
        file.rename(root / file.name)
    with pytest.raises(DataError, match=r"it lies in .*, move such files into"):
        open_quietly(root, tmp_path / "cache")
