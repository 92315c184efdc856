"""Examines a data set in TAU's layout: lists, labels and every audio file; each finding comes with its remedy."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from datasets.audio import AudioFormat, odd_samples, open_audio, read_blocks, read_format
from datasets.known import DataSet, known_as
from datasets.tau import (
    META_COLUMNS,
    TEST_LIST,
    DataError,
    Evaluation,
    Meta,
    is_evaluation_set,
    parse_clip_name,
    read_evaluation,
    read_meta,
    read_table,
)
from datasets.tau import test_rows as rows_for_test
from datasets.tau import train_rows as rows_for_training

RATE = 44100  # Hz, of all published data sets
N_EXAMPLES = 5
INTEGER_SUBTYPES = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32"}
DOWNLOAD_AGAIN = "extract its archive again (`python run_dataset.py download` repairs what is missing)"


@dataclass
class Finding:
    problem: str
    remedy: str
    files: list[str] = field(default_factory=list)  # what it concerns

    def __str__(self) -> str:
        examples = "".join(f"\n    {file}" for file in self.files[:N_EXAMPLES])
        more = f"\n    and {len(self.files) - N_EXAMPLES} more" if len(self.files) > N_EXAMPLES else ""
        count = f"{len(self.files)} x " if self.files else ""
        return f"  {count}{self.problem}{examples}{more}\n    -> {self.remedy}"


@dataclass(frozen=True)
class Examined:
    """What one audio file turned out to be."""

    format: AudioFormat | None = None  # None: unreadable
    n_read: int = 0  # samples that could be decoded
    is_silent: bool = False
    odd: str = ""  # what is wrong with the samples, in words
    digest: bytes = b""  # of the samples


def check(root: Path | str, quick: bool = False, progress: bool = True) -> tuple[str, list[Finding]]:
    """Counts and examines a data set.

    Args:
        root: folder of meta.csv.
        quick: read headers only; silent, duplicate and cut-short clips are then not found.

    Returns:
        A table of counts beside the published ones, and the findings; none when all is well.

    Raises:
        DataError: when meta.csv itself, or the list of an evaluation set, cannot be read.
    """
    if is_evaluation_set(root):
        return _check_evaluation(read_evaluation(root), quick, progress)
    meta = read_meta(root)
    known = known_as(meta.root, len(meta), is_labelled=True)
    findings: list[Finding] = []
    parts: dict[str, np.ndarray] = {}
    for name, read in (("train", rows_for_training), ("test", rows_for_test)):
        try:
            parts[name] = read(meta)
        except DataError as error:
            findings.append(Finding(str(error), "put the published evaluation_setup folder back in its place"))
    if len(parts) == 2 and len(both := np.intersect1d(parts["train"], parts["test"])):
        files = meta.files[both].tolist()
        findings.append(Finding("clip in both the training and the test part", "take it out of one of them", files))
    n_found = {"all": len(meta)} | {name: len(rows) for name, rows in parts.items()}
    findings += _check_counts(n_found, known)
    findings += _check_names(meta)
    findings += _check_files(meta, known, quick, progress)
    return _counts_table(meta, parts, _parts_table(n_found, known)), findings


def _check_evaluation(clips: Evaluation, quick: bool, progress: bool) -> tuple[str, list[Finding]]:
    known = known_as(clips.root, len(clips), is_labelled=False)
    n_found = {"all": len(clips)}
    findings = [*_check_counts(n_found, known), *_check_files(clips, known, quick, progress)]
    lines = ["an evaluation set, without labels", "", *_parts_table(n_found, known)]
    if clips.recording_device is not None:
        lines += ["", f"{'device':<20}{'all':>9}"]
        lines += [f"{name:<20}{n:>9,}" for name, n in sorted(Counter(clips.recording_device).items())]
    return "\n".join(lines), findings


def _published(known: DataSet | None) -> dict[str, int]:
    counts = {} if known is None else {"all": known.n_clips, "train": known.n_train, "test": known.n_test}
    return {name: n for name, n in counts.items() if n is not None}


def _parts_table(n_found: dict[str, int], known: DataSet | None) -> list[str]:
    published = _published(known)
    lines = [f"{'part':<12}{'clips':>9}" + (f"{'published':>12}" if published else "")]
    for name, n in n_found.items():
        lines.append(f"{name:<12}{n:>9,}" + (f"{published[name]:>12,}" if name in published else ""))
    return lines


def _counts_table(meta: Meta, parts: dict[str, np.ndarray], lines: list[str]) -> str:
    for kind, codes, names in (
        ("scene", meta.scene, meta.scenes),
        ("device", meta.recording_device, meta.recording_devices),
        ("city", meta.city, meta.cities),
    ):
        lines += ["", f"{kind:<20}{'all':>9}" + "".join(f"{part:>9}" for part in parts)]
        for code, name in enumerate(names):
            in_parts = "".join(f"{int((codes[rows] == code).sum()):>9,}" for rows in parts.values())
            lines.append(f"{name:<20}{int((codes == code).sum()):>9,}{in_parts}")
    return "\n".join(lines)


def _check_counts(n_found: dict[str, int], known: DataSet | None) -> Iterator[Finding]:
    names = {"all": "the list of clips", "train": "training part", "test": "test part"}
    for name, n in _published(known).items():
        if n_found.get(name, n) != n:
            problem = f"{names[name]} has {n_found[name]:,} clips, published are {n:,}"
            yield Finding(problem, "extract the meta archive again")


def _check_names(meta: Meta) -> Iterator[Finding]:
    """Compares meta.csv's columns with what the file names say, where these follow TAU's pattern."""
    table = read_table(meta.root / "meta.csv", META_COLUMNS)
    wrong = []
    for file, scene, identifier, device in zip(*(table[name] for name in META_COLUMNS), strict=True):
        name = parse_clip_name(file)
        if name and (name.scene, f"{name.city}-{name.location}", name.recording_device) != (scene, identifier, device):
            wrong.append(file)
    if wrong:
        yield Finding("labels in meta.csv do not agree with the file name", "extract the meta archive again", wrong)


def _check_files(meta: Meta | Evaluation, known: DataSet | None, quick: bool, progress: bool) -> Iterator[Finding]:
    """Examines the audio files; where no format is published, the most frequent one is taken for right."""
    is_labelled = isinstance(meta, Meta)
    listing = "meta.csv" if is_labelled else TEST_LIST.name
    leave_out = "leave it out of meta.csv" if is_labelled else "a submission answers for it as it is"
    expected = None if known is None else AudioFormat(RATE, known.seconds * RATE)
    listed = {Path(file).as_posix() for file in meta.files}
    present = {
        f"{folder}/{entry.name}"
        for folder in sorted({Path(file).parent.as_posix() for file in listed} | {"audio"})
        if (meta.root / folder).is_dir()
        for entry in os.scandir(meta.root / folder)
        if entry.is_file() and (f"{folder}/{entry.name}" in listed or _is_audio(entry.name))
    }
    if missing := sorted(listed - present):
        yield Finding("listed clip has no file", f"extract all archives: {DOWNLOAD_AGAIN}", missing)
    if extra := sorted(present - listed):
        yield Finding(f"audio file that {listing} does not list", f"delete it, or add it to {listing}", extra)

    by_format: dict[AudioFormat, list[str]] = defaultdict(list)
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    unreadable, cut, silent, odd = [], [], [], []
    files = sorted(listed & present)
    for file, found in _examine_all(meta.root, files, quick, progress):
        if found.format is None:
            unreadable.append(file)
            continue
        by_format[found.format].append(file)
        if quick:
            continue
        if found.n_read != found.format.n_frames:
            cut.append(file)
        elif found.odd:
            odd.append(f"{file}: {found.odd}")
        elif found.is_silent:
            silent.append(file)
        else:
            by_digest[found.digest].append(file)
    if unreadable:
        yield Finding("file cannot be read as audio", DOWNLOAD_AGAIN, unreadable)
    if cut:
        yield Finding("file is cut short", DOWNLOAD_AGAIN, cut)
    if odd:
        yield Finding("samples are not those of a recording", f"write it anew, or {leave_out}", odd)
    if silent:
        yield Finding("clip is silent", f"{DOWNLOAD_AGAIN}; if it stays silent, {leave_out}", silent)
    if twins := [f"{' = '.join(sorted(same))}" for same in by_digest.values() if len(same) > 1]:
        yield Finding("clips hold the same samples", "keep one of them, or extract their archives again", sorted(twins))
    if by_format:
        usual = expected or Counter({form: len(of) for form, of in by_format.items()}).most_common(1)[0][0]
        for form, of in by_format.items():
            if form == usual:
                continue
            what = "another rate" if form.sample_rate != usual.sample_rate else "another length"
            yield Finding(f"{what}: {form} instead of {usual}", f"convert it, or {leave_out}", of)


def _examine_all(root: Path, files: list[str], quick: bool, progress: bool) -> Iterator[tuple[str, Examined]]:
    waiting = iter(files)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        with tqdm(total=len(files), desc="checking", unit="clip", disable=None if progress else True) as bar:
            while piece := list(islice(waiting, 1024)):
                yield from zip(piece, pool.map(lambda file: _examine(root / file, quick), piece), strict=True)
                bar.update(len(piece))


def _is_audio(name: str) -> bool:
    """Whether a file looks like a recording; what Macs leave beside files (._x.wav) does not."""
    return not name.startswith(".") and Path(name).suffix[1:].upper() in soundfile.available_formats()


def _examine(path: Path, quick: bool) -> Examined:
    try:
        if quick:
            return Examined(read_format(path))
        with open_audio(path) as file:
            form, is_seekable = AudioFormat(file.samplerate, file.frames), file.seekable()
            # Integers are compared as they are; floats as integers would lose their range.
            is_integer = file.subtype in INTEGER_SUBTYPES
            blocks = list(read_blocks(file, "int32" if is_integer else "float32"))
    except DataError:
        return Examined()
    samples = np.concatenate(blocks) if blocks else np.zeros((0, 1), np.int32)
    if not is_seekable:
        form = AudioFormat(form.sample_rate, len(samples))
    odd = "" if is_integer else (odd_samples(samples) or "")
    digest = hashlib.blake2b(np.ascontiguousarray(samples), digest_size=16).digest()
    return Examined(form, len(samples), not samples.any(), odd, digest)
