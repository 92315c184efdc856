"""Clips read from their audio files when they are asked for: for what is gone through once, and without rounding."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from datasets.audio import Sampling, read_audio, read_format, resampled_length
from datasets.store_spec import find_sources


class AudioFiles:
    """Stands where a `datasets.cache.WaveformStore` does.

    Args:
        root: folder of the data set, which the names (clip,) are relative to.
        sampling: the clips' new rate in Hz, and the resampler.

    Raises:
        DataError: when files are missing, or the first one is no audio.
    """

    def __init__(self, root: Path, files: np.ndarray, sampling: Sampling | int):
        self.root, self.files, self.sampling = root, files, Sampling.of(sampling)
        find_sources(self.root, list(self.files))
        self.source = read_format(self.root / self.files[0])
        self.sample_rate = self.sampling.rate
        self.n_samples = resampled_length(self.source.n_frames, self.source.sample_rate, self.sample_rate)
        self._row_of = {file: row for row, file in enumerate(self.files)}
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def rows(self, files: np.ndarray) -> np.ndarray:
        """Rows (n,) of clips by name, as in `read`."""
        return np.array([self._row_of[file] for file in files], dtype=np.int64)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Reads clips (n,) from their files: (n, sample) float32.

        Raises:
            DataError: for a file that is no audio, cut short, or unlike the first one.
        """
        paths = [self.root / self.files[row] for row in rows]
        return np.stack(list(self._pool.map(lambda path: read_audio(path, self.sampling, self.source), paths)))
