"""Cuts the ten-second clips of a data set in TAU's layout into segments of one second, as TAU22 was made of TAU 2020.

    audio/<scene>-<city>-<location>-<recording>-<device>.wav      441,000 samples at 44.1 kHz
    audio/<scene>-<city>-<location>-<recording>-<k>-<device>.wav  samples 44,100 k to 44,100 (k + 1), k from 0

Every table of the data set keeps its order and its columns, with a line for each segment in the place of the clip's.
The samples are copied in the format that they have, so the joined segments are the clip.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from tqdm import tqdm

from datasets.audio import AudioFormat, open_audio
from datasets.files import locked, read_state, replacing, write_json
from datasets.tau import META_COLUMNS, DataError, Meta, read_meta, read_table

if TYPE_CHECKING:
    import pandas

N_SEGMENTS = 10  # of a clip, one second each
# Sample formats that come out as they went in, and the type that they are read as.
EXACT = {"PCM_S8": "int16", "PCM_U8": "int16", "PCM_16": "int16", "PCM_24": "int32", "PCM_32": "int32",
         "FLOAT": "float32", "DOUBLE": "float64"}  # fmt: skip
NOTE = "cut.json"  # in the new folder: what it is made of


@dataclass(frozen=True)
class Clip:
    """A clip to cut.

    Args:
        targets: where its segments go, a second each, in order.
        is_whole: it must be as long as its segments together; else what follows them is left out.
    """

    source: Path
    targets: list[Path]
    is_whole: bool = True


def segment_name(file: str, k: int) -> str:
    """The name of segment k of a clip: its number goes before the device.

    Raises:
        DataError: for a name that is not TAU 2020's.
    """
    path = Path(file)
    parts = path.stem.split("-")
    if len(parts) != 5:
        raise DataError(
            f"{file} is not named <scene>-<city>-<location>-<recording>-<device>, as the clips of ten seconds are"
        )
    return path.with_name("-".join([*parts[:4], str(k), parts[4]]) + path.suffix).as_posix()


def cut_data_set(root: Path, out: Path, progress: bool = True) -> int:
    """Writes a data set of ten-second clips as one of one-second segments; returns how many.

    Goes on where an earlier run stopped; meta.csv is written last.

    Args:
        root: folder of meta.csv.
        out: folder of the new data set.

    Raises:
        DataError: for names, tables and clips that do not fit, and for a folder that holds something else.
    """
    meta = read_meta(root)
    tables = {Path("meta.csv"): read_table(meta.root / "meta.csv", META_COLUMNS)}
    for path in sorted((meta.root / "evaluation_setup").glob("*.csv")):
        tables[path.relative_to(meta.root)] = read_table(path, ["filename"])
    for place, table in tables.items():
        if unknown := [file for file in table.filename if file not in meta.row_of]:
            raise DataError(f"{meta.root / place} lists {unknown[0]}, which meta.csv does not have")
    segments = {file: [segment_name(file, k) for k in range(N_SEGMENTS)] for file in map(str, meta.files)}
    clips = [Clip(meta.root / file, [out / name for name in names]) for file, names in segments.items()]
    with writing_to(out, f"segments of {meta.root.resolve().name}", digest_of(meta)):
        cut_clips(clips, progress)
        for name in ("LICENSE", "README.md", "README.html"):
            if (meta.root / name).is_file():
                shutil.copy(meta.root / name, out / name)
        for place in sorted(tables, key=lambda place: place.name == "meta.csv"):
            longer = tables[place].loc[np.repeat(np.arange(len(tables[place])), N_SEGMENTS)].copy()
            longer["filename"] = [name for file in tables[place].filename for name in segments[file]]
            write_table(out / place, longer)
    return N_SEGMENTS * len(clips)


def cut_clips(clips: Sequence[Clip], progress: bool = True) -> None:
    """Cuts clips of ten seconds, in several threads; what is there already is left.

    Raises:
        DataError: for the first clip that cannot be cut; what is done stays.
    """
    check_room(clips)
    for folder in {target.parent for clip in clips for target in clip.targets}:
        folder.mkdir(parents=True, exist_ok=True)
    rate = None  # of the first clip, which all must have
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        with tqdm(total=len(clips), desc="cutting", unit="clip", disable=None if progress else True) as bar:
            for piece in _pieces(clips, 256):
                for clip, found in zip(piece, pool.map(cut_clip, piece), strict=True):
                    rate = rate or found
                    if found != rate:
                        raise DataError(f"{clip.source} has a rate of {found} Hz, the clips before it of {rate} Hz: "
                                        "all clips of a data set must agree")  # fmt: skip
                bar.update(len(piece))
    if hasattr(os, "sync"):
        os.sync()  # before meta.csv says that they are there


def cut_clip(clip: Clip) -> int:
    """Writes the segments that are missing; returns the rate in Hz.

    Raises:
        DataError: when the clip has not the length of its segments, or samples that would be coded anew.
    """
    with open_audio(clip.source) as file:
        container, subtype, channels, rate = file.format, file.subtype, file.channels, file.samplerate
        n_samples = len(clip.targets) * rate
        if file.frames < n_samples or (clip.is_whole and file.frames > n_samples):
            raise DataError(f"{clip.source} has {file.frames} samples at {rate} Hz, not {len(clip.targets)} seconds: "
                            "it cannot be cut into whole segments")  # fmt: skip
        if subtype not in EXACT:
            raise DataError(f"{clip.source} holds {subtype} samples, which a copy would code anew: convert it to wav")
        form = AudioFormat(rate, rate)
        missing = [k for k, target in enumerate(clip.targets) if not _is_there(target, form, subtype, channels)]
        samples = file.read(n_samples, dtype=EXACT[subtype], always_2d=True) if missing else None  # (sample, channel)
    if missing and len(samples) != n_samples:
        raise DataError(f"{clip.source} is cut short: {len(samples)} of {n_samples} samples: extract it again")
    for k in missing:
        target = clip.targets[k]
        temporary = target.with_name(f".{target.name}.part")
        soundfile.write(temporary, samples[k * rate : (k + 1) * rate], rate, subtype=subtype, format=container)
        os.replace(temporary, target)
    return rate


def _is_there(target: Path, form: AudioFormat, subtype: str, channels: int) -> bool:
    if not target.is_file():
        return False
    try:
        found = soundfile.info(str(target))
    except (soundfile.SoundFileError, OSError):  # what a machine that lost its power left
        return False
    return (AudioFormat(found.samplerate, found.frames), found.subtype, found.channels) == (form, subtype, channels)


def _pieces(items: Sequence, n: int) -> Iterator[list]:
    waiting = iter(items)
    while piece := list(islice(waiting, n)):
        yield piece


def check_room(clips: Sequence[Clip]) -> None:
    """Raises DataError where the disk has no room for the segments that are missing."""
    todo = [clip for clip in clips if not clip.targets[-1].is_file()]
    try:
        n_bytes = sum(clip.source.stat().st_size for clip in todo)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing: extract all archives") from error
    if todo:
        folder = next(path for path in todo[0].targets[0].parents if path.exists())
        if (free := shutil.disk_usage(folder).free) < n_bytes:
            raise DataError(
                f"{folder} has {free / 1e9:.1f} GB free, the segments need {n_bytes / 1e9:.1f} GB: make room"
            )


@contextmanager
def writing_to(out: Path, what: str, digest: str) -> Iterator[None]:
    """Holds a folder while a data set is written to it.

    Args:
        what: the data set, for people.
        digest: of what it is made of; a folder that was begun with another one is refused.

    Raises:
        DataError: for a folder that holds something else; BusyError where another process writes to it.
    """
    made_of = {"what": what, "digest": digest}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".cut.lock", f"the folder {out}", keep=False):
        begun = read_state(out / NOTE, {"what": str, "digest": str})
        if begun is None and any(path.name != ".cut.lock" for path in out.iterdir()):
            raise DataError(f"{out} is not empty: name another folder")
        if begun is not None and begun != made_of:
            raise DataError(f"{out} holds {begun['what']}, from other lists: name another folder, or remove it")
        write_json(out / NOTE, made_of)
        yield


def digest_of(meta: Meta) -> str:
    """Of the lists of a data set, which decide what is written; its folder may move."""
    content = [sorted(meta.root.glob("*.csv")), sorted((meta.root / "evaluation_setup").glob("*.csv"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for paths in content for path in paths)).hexdigest()[:16]


def write_table(path: Path, table: "pandas.DataFrame") -> None:
    """Writes a tab-separated table whole or not at all."""
    with replacing(path) as file:
        table.to_csv(file, sep="\t", index=False, lineterminator="\n")
