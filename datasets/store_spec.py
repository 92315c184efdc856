"""What a waveform store is made from, and what its manifest says of it."""

import math
import os
import posixpath
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.audio import Sampling, read_format, resampled_length
from datasets.files import ContentError, check_content, matching, read_json
from datasets.tau import DataError, Evaluation, Meta, segment_order

STORE_VERSION = 2  # 1 knew neither times nor checksums of the audio files
BLOCK_ROWS = 256  # clips that one task resamples and one checksum covers
JOINED = ", segments joined"  # of StoreSpec.resampler
CONTEXT_FRAMES = 4096  # of the segments beside it that are resampled with a joined segment; soxr's filters are shorter
N_FORMATS = 9  # headers that decide what most clips are like


@dataclass(frozen=True)
class StoreSpec:
    """Everything that decides the content of a store beside the content of the audio files."""

    version: int
    sample_rate: int  # Hz
    n_samples: int  # per clip, after resampling
    source_rate: int  # Hz
    source_frames: int  # samples per clip, before resampling
    resampler: str  # with its version, and whether segments were joined
    files: list[str]  # by row
    source_bytes: list[int]  # size of each audio file, by row

    @property
    def n_bytes(self) -> int:
        return 2 * len(self.files) * self.n_samples

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.sample_rate, self.resampler.partition(" of ")[0])

    @property
    def is_joined(self) -> bool:
        """Whether the segments of a recording were joined and resampled as one; else each clip was resampled alone."""
        return self.resampler.endswith(JOINED)

    @property
    def n_context(self) -> int:
        """Samples of its neighbours that a joined segment is resampled with: whole periods of both rates."""
        period = self.source_rate // math.gcd(self.source_rate, self.sample_rate)
        return min(-(-CONTEXT_FRAMES // period) * period, self.source_frames)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of each block."""
        n = len(self.files)
        return [(start, min(start + BLOCK_ROWS, n)) for start in range(0, n, BLOCK_ROWS)]

    def difference(self, other: dict) -> str | None:
        """Names what differs from the spec in a manifest, in a few words; None when nothing does."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
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


@dataclass(frozen=True)
class Sources:
    """The audio files of a data set as they are on the disk, by row."""

    root: Path
    n_bytes: list[int]
    mtimes_ns: list[int]  # time of the last change

    def state(self, start: int, stop: int) -> int:
        """A digest of size and time of the files of some rows; another one when any of them was written again.

        The rows beside them count too: a joined row is resampled with a part of them.
        """
        rows = slice(max(0, start - 1), stop + 1)
        return zlib.crc32(repr((self.n_bytes[rows], self.mtimes_ns[rows])).encode())


POSITIVE = matching(lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0, "must be a positive number")
NUMBERS = matching(
    lambda values: isinstance(values, list) and all(type(value) is int for value in values), "must be a list of numbers"
)
MANIFEST = {
    "version": int,
    "sample_rate": POSITIVE,
    "n_samples": POSITIVE,
    "source_rate": POSITIVE,
    "source_frames": POSITIVE,
    "resampler": str,
    "files": matching(
        lambda files: isinstance(files, list) and files and all(type(file) is str for file in files),
        "must be a list of names",
    ),
    "source_bytes": NUMBERS,
    "checksums": NUMBERS,
    "mtime_ns": int,
}
SINCE_VERSION_2 = {"root": str, "source_mtimes_ns": NUMBERS, "source_checksums": NUMBERS}


def read_manifest(folder: Path) -> dict:
    """The manifest of a store, each entry of the kind and length that it must have.

    Raises:
        DataError: when it is missing or damaged.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        check_content(manifest, MANIFEST)
        if manifest["version"] >= STORE_VERSION:
            check_content(manifest, SINCE_VERSION_2)
        n_files = len(manifest["files"])
        lengths = dict.fromkeys(("source_bytes", "source_mtimes_ns", "source_checksums"), n_files)
        for name, length in (lengths | {"checksums": -(-n_files // BLOCK_ROWS)}).items():
            if name in manifest and len(manifest[name]) != length:
                raise ContentError(f"{name} has {len(manifest[name])} entries for {n_files} files")
    except (OSError, ContentError) as error:
        raise DataError(f"{path} is no manifest of a store ({error})") from error
    return manifest


def make_spec(
    meta: Meta | Evaluation, sampling: Sampling | int, order: Sequence[str] | None = None, joined: bool = False
) -> tuple[StoreSpec, Sources]:
    """Describes the store that the data set on disk asks for; looks up every audio file's size, reads few headers.

    Args:
        order: the names of the clips in the order of `segment_order`, where that is known; sorting takes a while.
        joined: the segments of a recording are to be resampled as one.

    Raises:
        DataError: for files that are missing, empty, or no audio.
    """
    sampling = Sampling.of(sampling)
    files = list(order) if order is not None else [str(meta.files[i]) for i in segment_order(meta.files)]
    sources = find_sources(meta.root, files)
    # The odd one out may be the first.
    spread = sorted({round(i * (len(files) - 1) / (N_FORMATS - 1)) for i in range(N_FORMATS)})
    source, _ = Counter(read_format(meta.root / files[row]) for row in spread).most_common(1)[0]
    if source.n_frames == 0:
        raise DataError(f"{meta.root / files[spread[0]]} holds no samples: extract it again")
    spec = StoreSpec(
        version=STORE_VERSION,
        sample_rate=sampling.rate,
        n_samples=resampled_length(source.n_frames, source.sample_rate, sampling.rate),
        source_rate=source.sample_rate,
        source_frames=source.n_frames,
        resampler=f"{sampling.described}{JOINED if joined else ''}",
        files=files,
        source_bytes=sources.n_bytes,
    )
    return spec, sources


def find_sources(root: Path, files: Sequence[str]) -> Sources:
    """Size and time of the audio files, one folder listing instead of one look-up per clip.

    Raises:
        DataError: when files are missing: how many, the first, and where it lies instead.
    """
    found: dict[str, os.stat_result] = {}
    for folder in sorted({posixpath.dirname(file) for file in files}):  # pathlib would take seconds for TAU22
        if (root / folder).is_dir():
            with os.scandir(root / folder) as entries:
                prefix = folder + "/" if folder else ""
                found.update((prefix + one.name, one.stat()) for one in entries if one.is_file())
    status = [found.get(file) or found.get(posixpath.normpath(file)) for file in files]
    missing = [file for file, one in zip(files, status, strict=True) if one is None]
    if missing:
        beside = root / posixpath.basename(missing[0])
        remedy = "extract all archives, or `python run_dataset.py check` for the whole list"
        if beside.is_file():
            remedy = f"it lies in {root}, move such files into {(root / missing[0]).parent}"
        raise DataError(
            f"{len(missing)} of {len(files)} clips of {root} have no audio file, first {root / missing[0]}: {remedy}"
        )
    return Sources(root, [one.st_size for one in status], [one.st_mtime_ns for one in status])


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        return zlib.crc32(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): extract it again") from error
