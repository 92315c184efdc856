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


def read_impulse_responses(folder: Path | str, sample_rate: int) -> list[np.ndarray]:
    """Reads every wav file below `folder`, in sorted order: float32 arrays (tap,) at `sample_rate` Hz.

    Raises:
        DataError: when the folder is missing or holds no wav file, or a file cannot be read or is silent.
    """
    folder = Path(folder)
    files = sorted(folder.rglob("*.wav"))
    if not files:
        raise DataError(
            f"{folder} holds no impulse responses (*.wav): name their folder with --dirs_path, or train without them "
            "(--dir_prob 0)"
        )
    responses = [read_audio(file, sample_rate) for file in files]
    for file, response in zip(files, responses, strict=True):
        if not np.any(response):
            raise DataError(f"{file} is silent or empty: an impulse response must hold samples")
    return responses
