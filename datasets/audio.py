"""Reading one audio file as the published systems did: mono, resampled with soxr's HQ recipe (librosa's default)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from datasets.tau import DataError

RESAMPLER = "soxr_hq"
FULL_SCALE = 32768  # int16 steps per unit of amplitude


@dataclass(frozen=True)
class AudioFormat:
    sample_rate: int  # Hz
    n_frames: int  # samples per channel

    def __str__(self) -> str:
        return f"{self.n_frames} samples at {self.sample_rate} Hz"


def read_format(path: Path) -> AudioFormat:
    """Sampling rate and length from the header.

    Raises:
        DataError: when the file is missing or no audio.
    """
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, error) from error
    return AudioFormat(info.samplerate, info.frames)


def read_audio(path: Path, sample_rate: int, expected: AudioFormat | None = None) -> np.ndarray:
    """Reads a file as mono float32 (sample,) in [-1, 1], resampled to `sample_rate` Hz.

    Raises:
        DataError: when the file is missing, no audio, cut short, or not of the `expected` format.
    """
    try:
        with soundfile.SoundFile(str(path)) as file:
            found = AudioFormat(file.samplerate, file.frames)
            waveform = file.read(dtype="float32", always_2d=True)  # (sample, channel)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, error) from error
    if len(waveform) != found.n_frames:
        raise DataError(f"{path} is cut short: {len(waveform)} of {found.n_frames} samples: extract it again")
    if expected is not None and found != expected:
        raise DataError(f"{path} has {found}, the other clips have {expected}: all clips of a data set must agree")
    waveform = waveform[:, 0] if waveform.shape[1] == 1 else waveform.mean(axis=1)
    return resample(waveform, found.sample_rate, sample_rate)


def resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resamples (sample,) to the length `resampled_length`, the same samples as librosa.load gives."""
    if rate == new_rate:
        return waveform
    resampled = soxr.resample(waveform, rate, new_rate, quality=RESAMPLER)
    n_samples = resampled_length(len(waveform), rate, new_rate)
    return np.pad(resampled[:n_samples], (0, max(0, n_samples - len(resampled))))


def resampled_length(n_frames: int, rate: int, new_rate: int) -> int:
    return -(-n_frames * new_rate // rate)  # rounded up, as librosa does


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Rounds to 16 bits; what resampling lifted above full scale is clipped."""
    return np.clip(np.rint(waveform * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def _unreadable(path: Path, error: Exception) -> DataError:
    if not path.exists():
        return DataError(f"{path} is missing: extract the data set again (`python run_dataset.py check` lists all)")
    reason = str(error).rstrip(".").rsplit(": ", 1)[-1]
    return DataError(f"{path} cannot be read as audio ({reason}): extract it again")
