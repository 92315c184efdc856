"""Impulse responses of old microphones (MicIRP), used to make a clip sound as if another device had recorded it.

Source: Xaudia, "Microphone Impulse Response Project", http://micirp.blogspot.com (Creative Commons). The published
repository holds 66 of them; its system is described in T. Morocutti, F. Schmid, K. Koutini, G. Widmer, "Device-Robust
Acoustic Scene Classification via Impulse Response Augmentation", EUSIPCO 2023.
"""

import os
from pathlib import Path

import numpy as np

from datasets.audio import read_audio, read_format
from datasets.tau import DataError

# The commit that the checksums in resources/micirp.sha256 were taken at.
MICIRP_URL = (
    "https://raw.githubusercontent.com/fschmid56/cpjku_dcase23/2e20abaa64264f227c50696e5a43d4c706543ff4/datasets/dirs"
)
REMEDY = "remove it from the folder of --dirs_path, or put a good one in its place"
LONGEST = 60.0  # seconds; the longest halls ring for 15
FAINTEST = 2.0**-16  # half a step of 16 bits


def read_impulse_responses(folder: Path | str, sample_rate: int, n_samples: int | None = None) -> list[np.ndarray]:
    """Reads every wav file below `folder`, in sorted order: float32 arrays (tap,) at `sample_rate` Hz.

    Args:
        n_samples: length of the clips; what lies beyond in a response is never heard. None: no limit.

    Raises:
        DataError: when the folder is missing or holds no wav file, or a file cannot be read, is silent, or too long to
            be a response.
    """
    responses = []
    for file in response_files(folder):
        found = read_format(file, REMEDY)
        if found.n_frames > LONGEST * found.sample_rate:
            seconds = found.n_frames / found.sample_rate
            raise DataError(f"{file} lasts {seconds:.0f} s, which no impulse response does ({LONGEST:.0f} s): {REMEDY}")
        response = read_audio(file, sample_rate, remedy=REMEDY)
        if not np.any(np.abs(response[:n_samples]) >= FAINTEST):
            where = "" if n_samples is None or len(response) <= n_samples else " for the length of a clip"
            raise DataError(f"{file} is silent or empty{where}, an impulse response must hold samples: {REMEDY}")
        responses.append(response)
    return responses


def response_files(folder: Path | str) -> list[Path]:
    """Every wav file below `folder`, in sorted order; hidden files and folders (._x.wav of a Mac) do not count.

    Raises:
        DataError: when there is none, or something else has the name of one; OSError for a folder that cannot be read.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is no folder: name the one that holds the impulse responses with --dirs_path")
    files = []
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if name.lower().endswith(".wav") and not name.startswith(".")]
    if not files:
        raise DataError(
            f"{folder} holds no impulse responses (*.wav): name their folder with --dirs_path, or train without them "
            "(--dir_prob 0)"
        )
    for file in files:
        if not file.is_file():  # opening a pipe would wait for somebody to write
            what = "a link that leads nowhere" if file.is_symlink() and not file.exists() else "no regular file"
            raise DataError(f"{file} is {what}: {REMEDY}")
    return sorted(files)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
