"""The waveform store: all clips of a data set at one sampling rate as 16-bit mono in one memory-mapped file.

    <cache_path>/<data set>_r<rate>_<list>/waveforms.i16     (clip, sample) int16, rows in `segment_order`
    <cache_path>/<data set>_r<rate>_<list>/manifest.json     what the rows are and how they were made
    <cache_path>/<data set>_r<rate>_<list>_joined/           the same for windows of recordings (`open_joined_store`)

Clips are found by file name; `<list>` is a digest of all names, and data sets with the same names but other audio get
`-2`, `-3`, ... behind it. A store is used only while names, sizes and times of the audio files, resampler and checksums
fit; otherwise it is built again (store_build.py) and the log says why. Where files have other times, as in a copy of
the data set, their bytes decide, and the new times are remembered.
"""

import hashlib
import logging
import mmap
import zlib
from itertools import count
from pathlib import Path

import numpy as np

from datasets.audio import SOXR, Sampling
from datasets.files import locked, write_json
from datasets.store_build import build_store
from datasets.store_spec import Sources, StoreSpec, file_checksum, make_spec, read_manifest
from datasets.tau import DataError, Evaluation, Meta

log = logging.getLogger(__name__)

N_COMPARED = 2000  # audio files with other times whose bytes are compared


class WaveformStore:
    """An open store; `waveforms` is a read-only (clip, sample) int16 array in the file."""

    def __init__(self, folder: Path, spec: StoreSpec):
        self.folder = folder
        self.spec = spec
        self.sample_rate, self.n_samples = spec.sample_rate, spec.n_samples
        self.waveforms = np.memmap(folder / "waveforms.i16", np.int16, "r", shape=(len(spec.files), spec.n_samples))
        self._row_of = {file: row for row, file in enumerate(spec.files)}

    def source_checksums(self, rows: np.ndarray) -> list[int]:
        """Checksums of the audio files that rows (n,) were made from; empty for a store without them."""
        checksums = read_manifest(self.folder).get("source_checksums", [])
        return [checksums[row] for row in rows] if checksums else []

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


def open_store(
    meta: Meta | Evaluation,
    sampling: Sampling | int,
    cache_path: Path | str,
    progress: bool = True,
    checked: bool = False,
    joined: bool = False,
) -> WaveformStore:
    """Opens the store of a data set at a rate in Hz and builds it first where there is none that fits.

    Args:
        checked: another process of the same run has just opened it, so the audio files need not be looked at again.
        joined: the segments of a recording are resampled as one; see `open_joined_store`.

    Raises:
        DataError: for an audio file that is missing, unreadable or unlike the others, and for a disk that is too small.
        OSError: when the disk is not writable.
    """
    sampling = Sampling.of(sampling)
    root, has_audio = meta.root.resolve(), (meta.root / "audio").is_dir()
    folders = _folders(meta, sampling, cache_path, joined)
    recorded = [(folder, spec) for folder in folders if (spec := _recorded_spec(folder, meta)) is not None]
    if checked or not has_audio:
        for folder, spec in sorted(recorded, key=lambda found: _root_of(found[0]) != root):
            is_own = _root_of(folder) == root
            if (is_own or not has_audio) and find_problem(folder, spec) is None:
                if not has_audio:
                    log.warning("%s has no audio; using the store %s, built from it earlier", meta.root, folder)
                return WaveformStore(folder, spec)
    spec, sources = make_spec(meta, sampling, recorded[0][1].files if recorded else None, joined)
    folder, problem = _find_folder(folders, spec, sources)
    if problem is not None:
        with locked(folders[0].with_name(folders[0].name + ".lock"), f"the store {folders[0]}", wait=True):
            folders = _folders(meta, sampling, cache_path, joined)
            folder, problem = _find_folder(folders, spec, sources)  # another process may have built it meanwhile
            if problem is not None:
                if folder.exists():
                    log.warning("building %s again: %s", folder, problem)
                build_store(folder, spec, sources, progress)
    return WaveformStore(folder, spec)


def open_joined_store(
    meta: Meta, store: WaveformStore, cache_path: Path | str, progress: bool = True, checked: bool = False
) -> WaveformStore:
    """The store for windows that cross the segments of a recording, at the rate of `store`, whose clips stand alone.

    It is `store` itself where nothing is resampled, and where a segment is no whole number of samples at both rates, so
    that joined rows would drift apart.

    Raises:
        DataError, OSError: as `open_store`.
    """
    rate, source_rate, n_frames = store.sample_rate, store.spec.source_rate, store.spec.source_frames
    if rate == source_rate:
        return store
    if n_frames * rate % source_rate:
        log.warning("segments of %d samples at %d Hz are resampled one by one: windows click where they meet",
                    n_frames, source_rate)  # fmt: skip
        return store
    return open_store(meta, store.spec.sampling, cache_path, progress, checked, joined=True)


def find_problem(folder: Path, spec: StoreSpec, sources: Sources | None = None, verify: bool = False) -> str | None:
    """Says why a store cannot be used as it is; None when it fits.

    The checksums of the content are compared where the file was touched since the build, or always with `verify`; its
    new time is remembered.

    Args:
        sources: of the spec's files; None does not compare the audio files.
    """
    if not folder.is_dir():
        return "not there"
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return str(error)
    if (difference := spec.difference(manifest)) is not None:
        return difference
    path = folder / "waveforms.i16"
    try:
        status = path.stat()
    except FileNotFoundError:
        return "waveforms.i16 is missing"
    if status.st_size != spec.n_bytes:
        return f"waveforms.i16 has {status.st_size} bytes, needed are {spec.n_bytes}"
    news: dict[str, object] = {}
    if sources is not None and sources.mtimes_ns != manifest["source_mtimes_ns"]:
        if (problem := _changed_source(spec, sources, manifest)) is not None:
            return problem
        news["source_mtimes_ns"] = sources.mtimes_ns
    if verify or status.st_mtime_ns != manifest["mtime_ns"]:
        with open(path, "rb") as file:
            for (start, stop), checksum in zip(spec.blocks, manifest["checksums"], strict=True):
                if zlib.crc32(file.read(2 * (stop - start) * spec.n_samples)) != checksum:
                    return f"rows {start} to {stop - 1} do not have their checksum"
        news["mtime_ns"] = status.st_mtime_ns
    if news and any(manifest[name] != value for name, value in news.items()):
        try:
            write_json(folder / "manifest.json", manifest | news)
        except OSError as error:  # a folder that may only be read: the next start compares again
            log.info("%s is compared with its checksums at every start (%s)", folder, error.strerror)
    return None


def _changed_source(spec: StoreSpec, sources: Sources, manifest: dict) -> str | None:
    """Names an audio file whose bytes are not those that the store was built from, of those with another time."""
    changed = [
        row for row, (now, then) in enumerate(zip(sources.mtimes_ns, manifest["source_mtimes_ns"], strict=True))
        if now != then
    ]  # fmt: skip
    if len(changed) > N_COMPARED:  # a copy of the whole data set: some of its clips stand for all
        changed = changed[:: -(-len(changed) // N_COMPARED)]
    log.info("comparing %d audio files whose times have changed", len(changed))
    for row in changed:
        if file_checksum(sources.root / spec.files[row]) != manifest["source_checksums"][row]:
            return f"{spec.files[row]} is not what it was built from"
    return None


def _find_folder(folders: list[Path], spec: StoreSpec, sources: Sources) -> tuple[Path, str | None]:
    """The folder of the store that fits, or where to build one and why."""
    problems = {folder: find_problem(folder, spec, sources) for folder in folders}
    fitting = [folder for folder, problem in problems.items() if problem is None]
    if fitting:
        return fitting[0], None
    root = sources.root.resolve()
    for folder in folders:
        other = _root_of(folder)
        if other in (None, root) or not (other / "audio").is_dir():  # not of another data set with the same names
            return folder, problems[folder]
    raise AssertionError("the last folder is not there and so belongs to nobody")


def _folders(meta: Meta | Evaluation, sampling: Sampling, cache_path: Path | str, joined: bool) -> list[Path]:
    """Where stores of such a list of clips are, and after them the first place where none is."""
    digest = hashlib.sha256("\n".join(sorted(map(str, meta.files))).encode()).hexdigest()[:8]
    kind = ("" if sampling.resampler == SOXR else f"_{sampling.resampler}") + ("_joined" if joined else "")
    first = Path(cache_path) / f"{meta.root.resolve().name}_r{sampling.rate}_{digest}{kind}"
    folders = [first]
    for number in count(2):
        if not folders[-1].is_dir():
            return folders
        folders.append(first.with_name(f"{first.name}-{number}"))


def _recorded_spec(folder: Path, meta: Meta | Evaluation) -> StoreSpec | None:
    """What the manifest of a store of the same clips says; None where there is no such store."""
    try:
        manifest = read_manifest(folder)
    except DataError:
        return None
    if len(manifest["files"]) != len(meta) or set(manifest["files"]) != set(meta.files):
        return None
    return StoreSpec(**{name: manifest[name] for name in StoreSpec.__dataclass_fields__})


def _root_of(folder: Path) -> Path | None:
    """The data set that a store was built from; None where that is not known."""
    try:
        root = read_manifest(folder).get("root")
    except DataError:
        return None
    return None if root is None else Path(root)
