"""Recordings of any length as windows for a network: read, mixed, resampled and cut piece by piece.

Memory does not grow with a recording. What comes out is what reading and resampling it whole would give.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from datasets.audio import SINC, SOXR, Sampling, odd_samples, open_audio, read_blocks, resample, resampled_length
from datasets.tau import DataError

REMEDY = "name another recording, or convert it to wav"
# Raw samples: NumPy's type, and the value of full scale.
PCM = {"u8": ("u1", 128), "s16le": ("<i2", 32768), "s24le": (None, 1 << 23), "s32le": ("<i4", 1 << 31),
       "f32le": ("<f4", 1)}  # fmt: skip
BYTES = {"u8": 1, "s16le": 2, "s24le": 3, "s32le": 4, "f32le": 4}


@dataclass(frozen=True)
class Window:
    """A stretch of a recording.

    Args:
        samples: (sample,) float32, always of the length that was asked for.
        start, end: in samples of the resampled recording; of a recording that is shorter, its own.
    """

    samples: np.ndarray
    start: int
    end: int


def find_recordings(path: Path) -> tuple[list[Path], int]:
    """The audio files of a folder and of those in it, sorted; and how many other files there are.

    A file stands for itself, whatever its name.
    """
    if not path.is_dir():
        return [path], 0
    known = {f".{name.lower()}" for name in soundfile.available_formats()} | {".mp3", ".opus"}
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    found = [file for file in files if file.suffix.lower() in known]
    return found, len(files) - len(found)


def read_recording(path: Path, sampling: Sampling | int) -> Iterator[np.ndarray]:
    """Pieces (sample,) float32 of a file at a rate in Hz; channels are averaged.

    Raises:
        DataError: when it is missing, no audio, or holds samples that no recording holds.
    """
    with open_audio(path, REMEDY) as file:
        yield from resampled(_mono(read_blocks(file), path), file.samplerate, sampling)


def read_pcm(stream: BinaryIO, form: str, rate: int, n_channels: int, sampling: Sampling | int) -> Iterator[np.ndarray]:
    """Pieces (sample,) float32 of raw samples at another rate in Hz, as they come.

    Args:
        form: of a sample, a key of PCM; channels take turns.
        rate: of the stream in Hz.

    Raises:
        DataError: for samples that no recording holds.
    """

    def blocks() -> Iterator[np.ndarray]:
        n_frame = BYTES[form] * n_channels
        rest = b""
        while piece := stream.read(n_frame * max(1, rate // 10)):
            piece = rest + piece
            n_whole = len(piece) // n_frame * n_frame
            rest = piece[n_whole:]
            if n_whole:
                yield decoded(piece[:n_whole], form).reshape(-1, n_channels)

    yield from resampled(_mono(blocks(), "standard input"), rate, sampling)


def decoded(raw: bytes, form: str) -> np.ndarray:
    """Samples as float32 in [-1, 1]."""
    kind, full_scale = PCM[form]
    if kind is None:  # three bytes: as the upper ones of four
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return (padded.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    samples = np.frombuffer(raw, kind).astype(np.float32)
    return (samples - 128) / 128 if form == "u8" else samples / np.float32(full_scale)


def _mono(blocks: Iterator[np.ndarray], name: object) -> Iterator[np.ndarray]:
    for block in blocks:
        if (problem := odd_samples(block)) is not None:
            raise DataError(f"{name} {problem}")
        yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


def resampled(blocks: Iterator[np.ndarray], rate: int, sampling: Sampling | int) -> Iterator[np.ndarray]:
    """Resamples a stream of pieces (sample,), as `datasets.audio.resample` does the whole."""
    sampling = Sampling.of(sampling)
    new_rate = sampling.rate
    if rate == new_rate:
        yield from blocks
        return
    if sampling.resampler == SINC:
        yield from _in_overlaps(blocks, rate, sampling)
        return
    stream = soxr.ResampleStream(rate, new_rate, 1, dtype="float32", quality=SOXR)
    n_in = n_out = 0
    for block in blocks:
        n_in += len(block)
        piece = stream.resample_chunk(np.ascontiguousarray(block))
        n_out += len(piece)
        yield piece
    last = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    left = max(0, resampled_length(n_in, rate, new_rate) - n_out)
    yield np.pad(last[:left], (0, max(0, left - len(last))))


def _in_overlaps(blocks: Iterator[np.ndarray], rate: int, sampling: Sampling) -> Iterator[np.ndarray]:
    """A filter without state: each piece is resampled with enough of its neighbours, which are cut off again."""
    period = rate // math.gcd(rate, sampling.rate)  # samples after which both rates meet
    step = period * sampling.rate // rate
    reach = 8 * -(-rate // sampling.rate)  # of torchaudio's filter: six zeros of its sinc to either side
    context = -(-reach // period) * period
    kept, first, done = np.zeros(0, np.float32), 0, 0  # first: position of kept[0]; done: what has been given back
    for block in blocks:
        kept = np.concatenate([kept, block])
        end = max(done, (first + len(kept) - context) // period * period)
        if end > done:
            new = resample(kept, rate, sampling)
            yield new[(done - first) // period * step : (end - first) // period * step]
            done, drop = end, max(0, end - context - first)
            kept, first = kept[drop:], first + drop
    if len(kept):
        yield resample(kept, rate, sampling)[(done - first) // period * step :]


def windows(pieces: Iterator[np.ndarray], length: int, hop: int) -> Iterator[Window]:
    """Cuts a stream of pieces (sample,) into windows of `length` samples, `hop` apart.

    What is left at the end is answered with a window that ends with the recording; a recording that is shorter than a
    window is repeated until it fills one.

    Raises:
        DataError: for a stream without samples.
    """
    kept, first, start, covered = np.zeros(0, np.float32), 0, 0, 0  # first: position of kept[0]
    for piece in pieces:
        kept = np.concatenate([kept, piece])
        while start + length <= first + len(kept):
            yield Window(kept[start - first : start - first + length], start, start + length)
            covered, start = start + length, start + hop
        drop = min(start, first + len(kept) - length) - first  # the last window may need the latest samples
        if drop > 0:
            kept, first = kept[drop:], first + drop
    end = first + len(kept)
    if end == 0:
        raise DataError("holds no samples")
    if end < length:
        yield Window(np.resize(kept, length), 0, end)
    elif covered < end:
        yield Window(kept[-length:], end - length, end)
