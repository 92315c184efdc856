"""Builds a waveform store: block by block in several threads, in a folder beside it that is renamed when it is whole.

A journal of the finished blocks lets a build that was killed go on. A block counts as finished only while its audio
files are as they were (size and time of the last change) and its bytes on the disk have their checksum.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from datasets.audio import AudioFormat, Sampling, read_audio, resample, to_int16
from datasets.files import write_json
from datasets.store_spec import Sources, StoreSpec, file_checksum
from datasets.tau import DataError, follows

T = TypeVar("T")

N_SPOT_CHECKS = 64  # clips of a finished store that are read from their sources again


def build_store(folder: Path, spec: StoreSpec, sources: Sources, progress: bool = True) -> None:
    """Writes the store; goes on where an interrupted build of the same clips stopped.

    Raises:
        DataError: for an audio file that is missing, unreadable or unlike the others; what is done is kept.
        OSError: when the disk is too small or not writable, with the folder; what was written is given back.
    """
    building = folder.with_name(folder.name + ".building")
    if building.exists() and not building.is_dir():
        raise DataError(f"{building} is in the way of building a store: remove it")
    try:
        _write(folder, building, spec, sources, progress)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise OSError(error.errno, f"{error.strerror or error}, while building a store in", str(building)) from error


def _write(folder: Path, building: Path, spec: StoreSpec, sources: Sources, progress: bool) -> None:
    building.mkdir(parents=True, exist_ok=True)
    root, path = sources.root, building / "waveforms.i16"
    _make_room(path, folder, spec)
    with open(path, "r+b" if path.exists() else "w+b") as file:
        _allocate(file, spec.n_bytes)
        journal = _Journal(building, file, spec, sources)
        todo = [i for i in range(len(spec.blocks)) if i not in journal.done]
        read = ClipReader(root, spec)

        def build_block(i: int) -> tuple[int, list[int]]:
            start, stop = spec.blocks[i]
            clips = np.empty((stop - start, spec.n_samples), np.int16)
            file_checksums = []
            for row in range(start, stop):
                file_checksums.append(file_checksum(root / spec.files[row]))
                clips[row - start] = read(row)
            os.pwrite(file.fileno(), clips.data, 2 * start * spec.n_samples)
            return zlib.crc32(clips), file_checksums

        with tqdm(
            total=len(spec.files), desc="caching", unit="clip", disable=None if progress else True, smoothing=0.05
        ) as bar:
            bar.update(sum(spec.blocks[i][1] - spec.blocks[i][0] for i in journal.done))
            for i, (checksum, file_checksums) in _in_threads(build_block, todo):
                journal.write(i, checksum, file_checksums)
                bar.update(spec.blocks[i][1] - spec.blocks[i][0])
        os.fsync(file.fileno())
        _spot_check(read, file, spec)
    blocks = [journal.done[i] for i in range(len(spec.blocks))]
    manifest = asdict(spec) | {
        "root": str(root.resolve()),
        "source_mtimes_ns": sources.mtimes_ns,
        "source_checksums": [value for _, values in blocks for value in values],
        "checksums": [checksum for checksum, _ in blocks],
        "mtime_ns": path.stat().st_mtime_ns,
    }
    write_json(building / "manifest.json", manifest)
    journal.path.unlink()
    if folder.exists():
        shutil.rmtree(folder)
    building.rename(folder)


def _make_room(path: Path, folder: Path, spec: StoreSpec) -> None:
    """Refuses a store that the disk cannot hold; gives up one that cannot be used when that makes the room.

    Raises:
        DataError: naming the folder, with the bytes that are there and needed.
    """
    there = path.stat().st_blocks * 512 if path.is_file() else 0
    needed = spec.n_bytes - there
    if shutil.disk_usage(path.parent).free < needed and folder.is_dir():
        shutil.rmtree(folder)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        if not there:
            shutil.rmtree(path.parent, ignore_errors=True)
        raise DataError(
            f"{folder.parent}: {free / 1e9:.2f} GB are free on this disk, the store of {len(spec.files):,} clips at "
            f"{spec.sample_rate} Hz needs {needed / 1e9:.2f} GB more: name another folder with --cache_path"
        )


def _allocate(file: BinaryIO, n_bytes: int) -> None:
    """Takes the space, so that a full disk shows now and not after an hour."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    file.truncate(n_bytes)


class ClipReader:
    """Called with a row, reads what that row of a store must hold: (sample,) int16."""

    def __init__(self, root: Path, spec: StoreSpec):
        self.root, self.spec = root, spec
        self.source = AudioFormat(spec.source_rate, spec.source_frames)
        self.follows = np.append(follows(spec.files) if spec.is_joined else np.zeros(len(spec.files), bool), False)

    def __call__(self, row: int) -> np.ndarray:
        before, after = self.follows[row], self.follows[row + 1]
        if not (before or after):
            return to_int16(self._read(row, self.spec.sampling))
        n = self.spec.n_context
        parts = [self._read(row, self.spec.source_rate)]
        if before:
            parts.insert(0, self._read(row - 1, self.spec.source_rate)[-n:])
        if after:
            parts.append(self._read(row + 1, self.spec.source_rate)[:n])
        start = n * self.spec.sample_rate // self.spec.source_rate if before else 0
        joined = resample(np.concatenate(parts), self.spec.source_rate, self.spec.sampling)
        return to_int16(joined[start : start + self.spec.n_samples])

    def _read(self, row: int, sampling: Sampling | int) -> np.ndarray:
        return read_audio(self.root / self.spec.files[row], sampling, self.source)


def _spot_check(read: ClipReader, file: BinaryIO, spec: StoreSpec) -> None:
    """Reads some clips from their sources again, as nothing else has seen what was written.

    Raises:
        DataError: when a row is not its clip.
    """
    n_clips = len(spec.files)
    for row in sorted({round(i * (n_clips - 1) / (N_SPOT_CHECKS - 1)) for i in range(N_SPOT_CHECKS)}):
        stored = os.pread(file.fileno(), 2 * spec.n_samples, 2 * row * spec.n_samples)
        if stored != read(row).tobytes():
            raise DataError(
                f"{file.name} does not hold {spec.files[row]} as it is now: was the data set changed meanwhile, or is "
                "the disk failing? Remove the folder and run again"
            )


class _Journal:
    """The finished blocks of a build, one line each: checksums of what was written and of the audio files."""

    def __init__(self, building: Path, file: BinaryIO, spec: StoreSpec, sources: Sources):
        self.path = building / "journal.jsonl"
        self.done: dict[int, tuple[int, list[int]]] = {}  # block -> checksum, checksums of its files
        self._spec, self._sources = spec, sources
        header = hashlib.sha256(json.dumps(asdict(spec) | {"source_bytes": None}).encode()).hexdigest()
        lines = []
        with suppress(OSError, UnicodeDecodeError):
            lines = self.path.read_text(encoding="utf-8").splitlines()
        if lines[:1] == [header]:
            for line in lines[1:]:
                self._read(line, file)
        self.path.write_text(header + "\n", encoding="utf-8")  # without lines that are torn or out of date
        for block, (checksum, file_checksums) in list(self.done.items()):
            self.write(block, checksum, file_checksums)

    def _read(self, line: str, file: BinaryIO) -> None:
        """Takes a line over when it is whole, its sources are as they were, and the bytes are on the disk."""
        try:
            block, checksum, state, file_checksums = json.loads(line)
            start, stop = self._spec.blocks[block]
            n_bytes = 2 * (stop - start) * self._spec.n_samples
            content = os.pread(file.fileno(), n_bytes, 2 * start * self._spec.n_samples)
        except (ValueError, TypeError, IndexError, RecursionError):
            return
        fits = state == self._sources.state(start, stop) and zlib.crc32(content) == checksum
        if fits and isinstance(file_checksums, list) and len(file_checksums) == stop - start:
            self.done[block] = checksum, file_checksums

    def write(self, block: int, checksum: int, file_checksums: Sequence[int]) -> None:
        self.done[block] = checksum, list(file_checksums)
        state = self._sources.state(*self._spec.blocks[block])
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([block, checksum, state, list(file_checksums)]) + "\n")


def _in_threads(task: Callable[[int], T], items: list[int]) -> Iterator[tuple[int, T]]:
    """Yields (item, task(item)) as they finish. Decoding and resampling run outside the interpreter lock."""
    n_threads = max(1, min(os.cpu_count() or 1, 16))
    queue = iter(items)
    running: dict[Future, int] = {}
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            while True:
                for item in queue:
                    running[pool.submit(task, item)] = item
                    if len(running) >= 2 * n_threads:  # few blocks in memory, whatever the size of the data set
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()
