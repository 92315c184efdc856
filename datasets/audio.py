"""Reading one audio file as the published systems did: mono, resampled as librosa or torchaudio do by default."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
import soxr

from datasets.tau import DataError

SOXR, SINC = "soxr_hq", "sinc"  # librosa's default; torchaudio's, which front ends ask for that were published so
RESAMPLERS = {SOXR: "soxr", SINC: "torchaudio"}  # and the packages that have them
FULL_SCALE = 32768  # int16 steps per unit of amplitude
LARGEST_SAMPLE = 8.0  # float recordings may exceed full scale, but not by 18 dB
LOWEST_RATE, HIGHEST_RATE = 100, 768_000  # Hz
MAX_FRAMES_PER_BYTE = 10_000  # silence in FLAC has some 340 samples a byte; far beyond that a header lies
BLOCK_FRAMES = 1 << 20
EXTRACT = "extract it again"


@dataclass(frozen=True, order=True)
class Sampling:
    """How waveforms are brought to the rate of a front end, in Hz."""

    rate: int
    resampler: str = SOXR

    @classmethod
    def of(cls, rate: "Sampling | int") -> "Sampling":
        return rate if isinstance(rate, Sampling) else cls(rate)

    @property
    def described(self) -> str:
        """The resampler with its version."""
        package = RESAMPLERS[self.resampler]
        return f"{self.resampler} of {package} {version(package)}"


@dataclass(frozen=True)
class AudioFormat:
    sample_rate: int  # Hz
    n_frames: int  # samples per channel

    def __str__(self) -> str:
        return f"{self.n_frames} samples at {self.sample_rate} Hz"


def read_format(path: Path, remedy: str = EXTRACT) -> AudioFormat:
    """Sampling rate and length from the header.

    Raises:
        DataError: when the file is missing, no audio, or has a header that cannot be true.
    """
    with open_audio(path, remedy) as file:
        found = AudioFormat(file.samplerate, file.frames)
        if file.seekable():
            return found
        return AudioFormat(found.sample_rate, sum(map(len, read_blocks(file))))  # GSM: the header does not tell


def read_audio(
    path: Path, sampling: Sampling | int, expected: AudioFormat | None = None, remedy: str = EXTRACT
) -> np.ndarray:
    """Reads a file as mono float32 (sample,) in [-1, 1], resampled to a rate in Hz.

    Memory grows with the samples that are there, whatever the header says.

    Args:
        remedy: what the user can do about a broken file, for messages.

    Raises:
        DataError: when the file is missing, no audio, cut short, not of the `expected` format, or holds samples that
            are not finite or far beyond full scale.
    """
    with open_audio(path, remedy) as file:
        rate, n_frames, is_seekable = file.samplerate, file.frames, file.seekable()
        if expected is not None and (rate, n_frames) != (expected.sample_rate, expected.n_frames) and is_seekable:
            found = AudioFormat(rate, n_frames)
            raise DataError(f"{path} has {found}, the other clips have {expected}: all clips of a data set must agree")
        blocks = list(read_blocks(file))
    waveform = np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32)  # (sample, channel)
    if is_seekable and len(waveform) != n_frames:
        raise DataError(f"{path} is cut short: {len(waveform)} of {n_frames} samples: {remedy}")
    if expected is not None and len(waveform) != expected.n_frames:
        raise DataError(f"{path} has {len(waveform)} samples, the other clips have {expected}: all clips must agree")
    if (problem := odd_samples(waveform)) is not None:
        raise DataError(f"{path} {problem}")
    waveform = waveform[:, 0] if waveform.shape[1] == 1 else waveform.mean(axis=1)
    return resample(waveform, rate, sampling)


def odd_samples(waveform: np.ndarray) -> str | None:
    """Says what is wrong with samples that no recording holds: NaN, infinity, floats that stand for integers."""
    if not waveform.size:
        return None
    low, high = float(waveform.min()), float(waveform.max())  # NaN where there is one
    if not (np.isfinite(low) and np.isfinite(high)):
        return "holds samples that are NaN or infinite: write it anew"
    if max(-low, high) > LARGEST_SAMPLE:
        return (
            f"holds samples up to {max(-low, high):g} where 1 is full scale: divide them (by 32768 where they were "
            "16-bit integers) and write it anew"
        )
    return None


@contextmanager
def open_audio(path: Path, remedy: str = EXTRACT) -> Iterator[soundfile.SoundFile]:
    """An audio file whose header has been looked at.

    Raises:
        DataError: when the file is missing, no audio, or has a header that cannot be true; from the block too.
    """
    if not path.exists():
        listing = " (`python run_dataset.py check` lists all)" if remedy == EXTRACT else ""
        raise DataError(f"{path} is missing: {remedy}{listing}")
    if not path.is_file():  # opening a pipe would wait for somebody to write
        raise DataError(f"{path} is no regular file: {remedy}")
    try:
        with soundfile.SoundFile(str(path)) as file:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise DataError(
                    f"{path} has a rate of {file.samplerate} Hz, which no recording has ({LOWEST_RATE} .. "
                    f"{HIGHEST_RATE}): {remedy}"
                )
            if file.seekable() and file.frames > MAX_FRAMES_PER_BYTE * path.stat().st_size:
                raise DataError(f"{path} cannot hold the {file.frames} samples that its header tells of: {remedy}")
            yield file
    except DataError:
        raise
    # What soundfile raises for damaged files: its own errors, and those of its own checks.
    except (soundfile.SoundFileError, OSError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        if (denied := _denied(path)) is not None:
            raise DataError(f"{path} cannot be read: {denied}") from error
        reason = str(error).rstrip(".").rsplit(": ", 1)[-1] or type(error).__name__
        raise DataError(f"{path} cannot be read as audio ({reason}): {remedy}") from error


def _denied(path: Path) -> str | None:
    """Why the system does not let a file be read, which soundfile does not tell; None when it does."""
    try:
        path.open("rb").close()
    except OSError as error:
        return error.strerror
    return None


def read_blocks(file: soundfile.SoundFile, dtype: str = "float32") -> Iterator[np.ndarray]:
    """The samples that are there, (sample, channel), a piece at a time."""
    while len(block := file.read(BLOCK_FRAMES, dtype=dtype, always_2d=True)):
        yield block


def resample(waveform: np.ndarray, rate: int, sampling: Sampling | int) -> np.ndarray:
    """Resamples (sample,) to the length `resampled_length`, the same samples as librosa.load or torchaudio give."""
    sampling = Sampling.of(sampling)
    new_rate = sampling.rate
    if rate == new_rate:
        return waveform
    if sampling.resampler == SINC:
        return _sinc(rate, new_rate)(waveform)
    resampled = soxr.resample(waveform, rate, new_rate, quality=SOXR)
    n_samples = resampled_length(len(waveform), rate, new_rate)
    return np.pad(resampled[:n_samples], (0, max(0, n_samples - len(resampled))))


@lru_cache
def _sinc(rate: int, new_rate: int) -> Callable[[np.ndarray], np.ndarray]:
    import torch  # here, so that what only reads lists need not wait for it
    from torchaudio.transforms import Resample

    transform = Resample(rate, new_rate)

    def apply(waveform: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return transform(torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))).numpy()

    return apply


def resampled_length(n_frames: int, rate: int, new_rate: int) -> int:
    return -(-n_frames * new_rate // rate)  # rounded up, as librosa does


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Rounds to 16 bits; what resampling lifted above full scale is clipped."""
    return np.clip(np.rint(waveform * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
