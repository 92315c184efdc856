"""The waveform store: all clips of a data set at one sampling rate as 16-bit mono in one memory-mapped file.

    <cache_path>/<data set>_r<rate>_<list>/waveforms.i16     (clip, sample) int16, rows in `segment_order`
    <cache_path>/<data set>_r<rate>_<list>/manifest.json     what the rows are and how they were made

A store is built in `<folder>.building` beside it, block by block in several threads, and renamed when it is whole. A
journal of the finished blocks lets a killed build go on. Clips are found by file name; `<list>` is a digest of all
names, so two data sets never share a folder. A store is used only while names, sizes of the audio files, resampler and
checksums fit; otherwise it is built again and the log says why.
"""

import hashlib
import json
import logging
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr
from tqdm import tqdm

from datasets.audio import RESAMPLER, AudioFormat, read_audio, read_format, resampled_length, to_int16
from datasets.tau import DataError, Meta, segment_order

try:
    import fcntl
except ImportError:  # Windows: builds of one store are not guarded against each other
    fcntl = None

log = logging.getLogger(__name__)

STORE_VERSION = 1
BLOCK_ROWS = 256  # clips that one task resamples and one checksum covers


@dataclass(frozen=True)
class StoreSpec:
    """Everything that decides the content of a store; two equal specs mean the same bytes."""

    version: int
    sample_rate: int  # Hz
    n_samples: int  # per clip, after resampling
    source_rate: int  # Hz
    source_frames: int  # samples per clip, before resampling
    resampler: str
    files: list[str]  # by row
    source_bytes: list[int]  # size of each audio file, by row

    @property
    def n_bytes(self) -> int:
        return 2 * len(self.files) * self.n_samples

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of each block."""
        n = len(self.files)
        return [(start, min(start + BLOCK_ROWS, n)) for start in range(0, n, BLOCK_ROWS)]

    def difference(self, other: dict) -> str | None:
        """Names what differs from the spec in a manifest, in a few words; None when nothing does."""
        for name, value in asdict(self).items():
            if other.get(name) == value:
                continue
            if name not in ("files", "source_bytes"):
                return f"{name} is {other.get(name)}, needed is {value}"
            theirs = other.get(name) or []
            row = next((i for i, (a, b) in enumerate(zip(theirs, value, strict=False)) if a != b), None)
            return f"{name} differ, " + (
                f"{len(theirs)} and {len(value)}" if row is None else f"first {self.files[row]}"
            )
        return None


class WaveformStore:
    """An open store; `waveforms` is a read-only (clip, sample) int16 array in the file."""

    def __init__(self, folder: Path, spec: StoreSpec):
        self.folder = folder
        self.spec = spec
        self.sample_rate, self.n_samples = spec.sample_rate, spec.n_samples
        self.waveforms = np.memmap(folder / "waveforms.i16", np.int16, "r", shape=(len(spec.files), spec.n_samples))
        self._row_of = {file: row for row, file in enumerate(spec.files)}

    def rows(self, files: np.ndarray) -> np.ndarray:
        """Rows (n,) of the named clips.

        Raises:
            DataError: for a name that the store does not hold.
        """
        try:
            return np.array([self._row_of[file] for file in files], dtype=np.int64)
        except KeyError as error:
            raise DataError(f"{self.folder} holds no clip {error.args[0]}") from error

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Copies the rows (n,) out of the file: (n, sample) int16."""
        clips = self.waveforms[rows]
        self._release_pages()
        return clips

    def read_windows(self, starts: np.ndarray, n_samples: int) -> np.ndarray:
        """Copies windows out of the file as if its rows were one long recording: (n, n_samples) int16.

        Args:
            starts: first sample (n,) of each window, counted from the start of row 0; a window may cross rows.
            n_samples: length of a window.

        Raises:
            IndexError: for a window that does not lie within the file.
        """
        samples = np.asarray(self.waveforms).reshape(-1)  # np.memmap's own slices cost more to make
        if len(starts) and not (0 <= starts.min() and starts.max() + n_samples <= len(samples)):
            raise IndexError(
                f"windows of {n_samples} samples from {starts.min()} to {starts.max()} do not lie within "
                f"{self.folder}, which holds {len(samples)} samples"
            )
        windows = np.lib.stride_tricks.sliding_window_view(samples, n_samples)[starts]
        self._release_pages()
        return windows

    def _release_pages(self) -> None:
        """The pages stay in the system's cache, but no longer count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.waveforms._mmap.madvise(mmap.MADV_DONTNEED)


def open_store(meta: Meta, sample_rate: int, cache_path: Path | str, progress: bool = True) -> WaveformStore:
    """Opens the store of a data set at `sample_rate` Hz and builds it first where there is none that fits.

    Raises:
        DataError: for an audio file that is missing, unreadable or unlike the others.
        OSError: when the disk is full or not writable.
    """
    if not (meta.root / "audio").is_dir() and (folder := _folder(meta, sample_rate, cache_path)).is_dir():
        log.warning("%s has no audio; using the store %s, built from it earlier", meta.root, folder)
        spec = StoreSpec(**{name: _read_manifest(folder)[name] for name in StoreSpec.__dataclass_fields__})
    else:
        spec = make_spec(meta, sample_rate)
        folder = _folder(meta, sample_rate, cache_path)
    problem = find_problem(folder, spec)
    if problem is not None:
        with _exclusive(folder):
            problem = find_problem(folder, spec)  # another process may have built it meanwhile
            if problem is not None:
                if folder.exists():
                    log.warning("building %s again: %s", folder, problem)
                build_store(meta.root, folder, spec, progress)
    return WaveformStore(folder, spec)


def make_spec(meta: Meta, sample_rate: int) -> StoreSpec:
    """Describes the store that the data set on disk asks for; touches every audio file's size, reads one header."""
    order = segment_order(meta.files)
    files = [str(meta.files[i]) for i in order]
    sizes = _source_bytes(meta.root, files)
    source = read_format(meta.root / files[0])
    if source.n_frames == 0:
        raise DataError(f"{meta.root / files[0]} holds no samples: extract it again")
    return StoreSpec(
        version=STORE_VERSION,
        sample_rate=sample_rate,
        n_samples=resampled_length(source.n_frames, source.sample_rate, sample_rate),
        source_rate=source.sample_rate,
        source_frames=source.n_frames,
        resampler=f"{RESAMPLER} of soxr {soxr.__version__}",
        files=files,
        source_bytes=sizes,
    )


def find_problem(folder: Path, spec: StoreSpec, verify: bool = False) -> str | None:
    """Says why a store cannot be used as it is; None when it fits.

    The checksums of the content are compared where the file was touched since the build, or always with `verify`.
    """
    if not folder.is_dir():
        return "not there"
    try:
        manifest = _read_manifest(folder)
    except DataError as error:
        return str(error)
    if (difference := spec.difference(manifest)) is not None:
        return difference
    try:
        status = (folder / "waveforms.i16").stat()
    except FileNotFoundError:
        return "waveforms.i16 is missing"
    if status.st_size != spec.n_bytes:
        return f"waveforms.i16 has {status.st_size} bytes, needed are {spec.n_bytes}"
    if verify or status.st_mtime_ns != manifest["mtime_ns"]:
        waveforms = np.memmap(folder / "waveforms.i16", np.int16, "r", shape=(len(spec.files), spec.n_samples))
        for (start, stop), checksum in zip(spec.blocks, manifest["checksums"], strict=True):
            if zlib.crc32(waveforms[start:stop]) != checksum:
                return f"rows {start} to {stop - 1} do not have their checksum"
    return None


def build_store(root: Path, folder: Path, spec: StoreSpec, progress: bool = True) -> None:
    """Writes the store; goes on where an interrupted build of the same spec stopped."""
    building = folder.with_name(folder.name + ".building")
    journal = _Journal(building, spec)
    path = building / "waveforms.i16"
    with open(path, "r+b" if path.exists() else "w+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, spec.n_bytes)  # a full disk shows now, not after an hour
        else:
            file.truncate(spec.n_bytes)
        todo = [i for i in range(len(spec.blocks)) if i not in journal.done]
        source = AudioFormat(spec.source_rate, spec.source_frames)

        def build_block(i: int) -> int:
            start, stop = spec.blocks[i]
            clips = np.empty((stop - start, spec.n_samples), np.int16)
            for row in range(start, stop):
                clips[row - start] = to_int16(read_audio(root / spec.files[row], spec.sample_rate, source))
            os.pwrite(file.fileno(), clips.data, 2 * start * spec.n_samples)
            return zlib.crc32(clips)

        with tqdm(
            total=len(spec.files), desc="caching", unit="clip", disable=None if progress else True, smoothing=0.05
        ) as bar:
            bar.update(sum(spec.blocks[i][1] - spec.blocks[i][0] for i in journal.done))
            for i, checksum in _in_threads(build_block, todo):
                journal.write(i, checksum)
                bar.update(spec.blocks[i][1] - spec.blocks[i][0])
        os.fsync(file.fileno())
    manifest = asdict(spec) | {
        "checksums": [journal.done[i] for i in range(len(spec.blocks))],
        "mtime_ns": path.stat().st_mtime_ns,
    }
    with open(building / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    journal.remove()
    if folder.exists():
        shutil.rmtree(folder)
    building.rename(folder)


class _Journal:
    """The finished blocks of a build and their checksums, one line each, for exactly one spec."""

    def __init__(self, building: Path, spec: StoreSpec):
        self.path = building / "journal.jsonl"
        self.done: dict[int, int] = {}  # block -> checksum
        digest = hashlib.sha256(json.dumps(asdict(spec)).encode()).hexdigest()
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        if not lines or lines[0] != digest:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            self.path.write_text(digest + "\n", encoding="utf-8")
        for line in lines[1:]:
            fields = line.split()
            if len(fields) == 3 and fields[2] == ".":  # a line torn by a kill lacks its end
                self.done[int(fields[0])] = int(fields[1])

    def write(self, block: int, checksum: int) -> None:
        self.done[block] = checksum
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{block} {checksum} .\n")

    def remove(self) -> None:
        self.path.unlink()


def _in_threads(task, items: list[int]) -> Iterator[tuple[int, int]]:
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


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lets one process at a time build a store; the system frees the lock of a killed one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _folder(meta: Meta, sample_rate: int, cache_path: Path | str) -> Path:
    digest = hashlib.sha256("\n".join(sorted(map(str, meta.files))).encode()).hexdigest()[:8]
    return Path(cache_path) / f"{meta.root.resolve().name}_r{sample_rate}_{digest}"


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not {"checksums", "mtime_ns", *StoreSpec.__dataclass_fields__} <= set(
            manifest
        ):
            raise ValueError("fields are missing")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no manifest of a store ({error})") from error
    return manifest


def _source_bytes(root: Path, files: list[str]) -> list[int]:
    """Sizes of the audio files, one folder listing instead of one look-up per clip.

    Raises:
        DataError: when files are missing: how many, and the first.
    """
    sizes: dict[str, int] = {}
    for folder in sorted({str(Path(file).parent) for file in files}):
        if (root / folder).is_dir():
            with os.scandir(root / folder) as entries:
                sizes.update((f"{folder}/{entry.name}", entry.stat().st_size) for entry in entries if entry.is_file())
    missing = [file for file in files if Path(file).as_posix() not in sizes]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} clips in {root / 'meta.csv'} have no audio file, first "
            f"{root / missing[0]}: extract all archives, or `python run_dataset.py check` for the whole list"
        )
    return [sizes[Path(file).as_posix()] for file in files]
