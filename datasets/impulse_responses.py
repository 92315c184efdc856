"""Impulse responses of old microphones (MicIRP), used to make a clip sound as if another device had recorded it.

Source: Xaudia, "Microphone Impulse Response Project", http://micirp.blogspot.com (Creative Commons). The published
repository holds 66 of them; its system is described in T. Morocutti, F. Schmid, K. Koutini, G. Widmer, "Device-Robust
Acoustic Scene Classification via Impulse Response Augmentation", EUSIPCO 2023.
"""

from pathlib import Path

import numpy as np

from datasets.audio import read_audio
from datasets.tau import DataError

# The commit that the checksums in resources/micirp.sha256 were taken at.
MICIRP_URL = (
    "https://raw.githubusercontent.com/fschmid56/cpjku_dcase23/2e20abaa64264f227c50696e5a43d4c706543ff4/datasets/dirs"
)
REMEDY = "remove it from the folder of --dirs_path, or put a good one in its place"


def read_impulse_responses(folder: Path | str, sample_rate: int) -> list[np.ndarray]:
    """Reads every wav file below `folder`, in sorted order: float32 arrays (tap,) at `sample_rate` Hz.

    Raises:
        DataError: when the folder is missing or holds no wav file, or a file cannot be read or is silent.
    """
    responses = [read_audio(file, sample_rate, remedy=REMEDY) for file in response_files(folder)]
    for file, response in zip(response_files(folder), responses, strict=True):
        if not np.any(response):
            raise DataError(f"{file} is silent or empty, an impulse response must hold samples: {REMEDY}")
    return responses


def response_files(folder: Path | str) -> list[Path]:
    """Every wav file below `folder`, in sorted order; what systems leave beside files (._x.wav of a Mac) is none.

    Raises:
        DataError: when there is none.
    """
    files = sorted(file for file in Path(folder).rglob("*.wav") if not file.name.startswith(".") and not file.is_dir())
    if not files:
        raise DataError(
            f"{folder} holds no impulse responses (*.wav): name their folder with --dirs_path, or train without them "
            "(--dir_prob 0)"
        )
    return files
