"""Building blocks of the embedded data set's sound: seeded generators, shaped noise, tones, slow curves, grains.

Everything works on whole recordings of 10 s at 44.1 kHz: (sample,), or (bin,) for their spectra.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy import ndarray
from numpy.random import Generator

SAMPLE_RATE = 44100  # Hz, as TAU22
RECORDING_SECONDS = 10
N_SAMPLES = SAMPLE_RATE * RECORDING_SECONDS
N_BINS = N_SAMPLES // 2 + 1

# Spectral shapes are drawn on 1/24 octaves from 20 Hz upwards and looked up per FFT bin; bins below 20 Hz stay silent.
GRID_HZ = 20.0 * 2.0 ** (np.arange(245) / 24)  # 20 Hz to 23 kHz


def named_rng(seed: int, *names: str) -> Generator:
    """Generator that depends on the seed and the names alone (Python's own hash() differs between processes)."""
    digest = hashlib.sha256("/".join(names).encode()).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return Generator(np.random.SFC64(np.random.SeedSequence([seed, *words])))


@lru_cache(maxsize=1)
def _grid_cell() -> ndarray:
    """For each FFT bin of a recording, its cell of the 1/24-octave grid; cell 0 is everything below 20 Hz."""
    hz = np.arange(N_BINS) * (SAMPLE_RATE / N_SAMPLES)
    cell = np.zeros(N_BINS, dtype=np.int64)
    cell[1:] = np.clip(np.round(24 * np.log2(hz[1:] / GRID_HZ[0])) + 1, 0, len(GRID_HZ))
    return cell


def per_bin(curve_db: ndarray) -> ndarray:
    """Amplitude of each FFT bin (bin,) for a curve in dB over the grid."""
    table = np.concatenate([[0.0], 10 ** (curve_db / 20)]).astype(np.float32)
    return table[_grid_cell()]


def curve(*points: tuple[float, float]) -> ndarray:
    """dB over the grid, linear in log frequency between the (Hz, dB) points."""
    hz, db = zip(*points, strict=True)
    return np.interp(np.log2(GRID_HZ), np.log2(hz), db)


def spectrum_of(x: ndarray) -> ndarray:
    """(sample,) to (bin,) complex64; by way of float64, in which NumPy's forward transform is the faster one."""
    return np.fft.rfft(x.astype(np.float64), N_SAMPLES).astype(np.complex64)


def noise_spectrum(rng: Generator, curve_db: ndarray) -> ndarray:
    white = rng.standard_normal(2 * N_BINS, dtype=np.float32).view(np.complex64)
    return white * per_bin(curve_db)


def noise(rng: Generator, *points: tuple[float, float]) -> ndarray:
    """Gaussian noise (sample,) whose spectrum follows the (Hz, dB) points."""
    return np.fft.irfft(noise_spectrum(rng, curve(*points)), N_SAMPLES)


def filtered(x: ndarray, *points: tuple[float, float]) -> ndarray:
    return np.fft.irfft(spectrum_of(x) * per_bin(curve(*points)), N_SAMPLES)


def stretch(knots: ndarray) -> ndarray:
    """Joins knots, evenly spread over the recording, by straight lines: (sample,)."""
    n_per_knot = -(-N_SAMPLES // (len(knots) - 1))
    ramp = np.arange(n_per_knot, dtype=np.float32) / n_per_knot
    start, step = knots[:-1, None].astype(np.float32), np.diff(knots)[:, None].astype(np.float32)
    return (start + step * ramp).reshape(-1)[:N_SAMPLES]


def wander(rng: Generator, per_second: float, depth: float) -> ndarray:
    """Slow random curve (sample,), mean 0 and standard deviation `depth` at its knots."""
    return stretch(depth * rng.standard_normal(max(3, int(RECORDING_SECONDS * per_second) + 2)))


def swell(rng: Generator, per_second: float, depth_db: float) -> ndarray:
    """Slow random gain (sample,) around 1."""
    return 10 ** (wander(rng, per_second, depth_db) / 20)


def tone(hz: ndarray, harmonics: ndarray) -> ndarray:
    """Harmonic tone (sample,) of varying frequency (sample,); `harmonics` are amplitudes of 1 x, 2 x, ... `hz`."""
    turn = np.arange(2048) / 2048 * 2 * np.pi
    order = np.arange(1, len(harmonics) + 1)[:, None]
    offset = 2.4 * order**2  # spreads the phases: no click where all harmonics would meet
    table = (np.asarray(harmonics)[:, None] * np.sin(order * turn + offset)).sum(axis=0).astype(np.float32)
    phase = np.cumsum(hz / SAMPLE_RATE, dtype=np.float64)
    return table[(phase * 2048).astype(np.int64) & 2047]


def scatter(out: ndarray, seconds: ndarray, grain: Callable[[], ndarray]) -> ndarray:
    """Adds a new grain at each time that lies inside the recording."""
    for start in (seconds * SAMPLE_RATE).astype(int):
        if 0 <= start < N_SAMPLES:
            piece = grain()[: N_SAMPLES - start]
            out[start : start + len(piece)] += piece
    return out


def decay(seconds: float, n_seconds: float) -> ndarray:
    return np.exp(-np.arange(int(n_seconds * SAMPLE_RATE), dtype=np.float32) / (seconds * SAMPLE_RATE))


def silence() -> ndarray:
    return np.zeros(N_SAMPLES, dtype=np.float32)


def log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
