"""The recording devices of the embedded data set, and microphones for device augmentation.

A device filters what it hears, adds its own noise, compresses and limits. Its response comes from a few parameters:
band limits, tilt and resonances. The impulse responses for augmentation belong to other microphones of the same family.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from datasets.synthetic.signals import (
    GRID_HZ,
    N_SAMPLES,
    SAMPLE_RATE,
    log_uniform,
    noise_spectrum,
    spectrum_of,
    stretch,
)

N_IR_SAMPLES = 4096  # 93 ms: by then every response of the family has decayed


@dataclass(frozen=True)
class Microphone:
    """What a recording device does to sound; the defaults do nothing."""

    high_pass_hz: float = 20.0
    low_pass_hz: float = 20000.0
    slope: int = 2  # order of both band limits
    tilt_db: float = 0.0  # per octave around 1 kHz
    peaks: tuple[tuple[float, float, float], ...] = ()  # (Hz, dB, width in octaves)
    gain_db: float = 0.0
    noise_db: float = -85.0  # level of its own noise, relative to full scale
    noise_tilt_db: float = -3.0  # per octave
    ratio: float = 1.0  # of the compressor; 1 is off
    threshold_db: float = -35.0  # level above which the compressor acts

    def response_db(self, hz: ndarray) -> ndarray:
        """Magnitude response in dB at the frequencies `hz` > 0."""
        octave = np.log2(hz / 1000)
        db = self.gain_db + self.tilt_db * np.clip(octave, -4, 4)
        db -= 10 * np.log10(1 + (self.high_pass_hz / hz) ** (2 * self.slope))
        db -= 10 * np.log10(1 + (hz / self.low_pass_hz) ** (2 * self.slope))
        for centre, peak_db, width in self.peaks:
            db += peak_db * np.exp(-0.5 * ((octave - np.log2(centre / 1000)) / width) ** 2)
        return np.maximum(db, -80)

    def impulse_response(self) -> ndarray:
        """Minimum-phase impulse response (sample,) of `N_IR_SAMPLES` at 44.1 kHz."""
        n_fft = 4 * N_IR_SAMPLES
        hz = np.maximum(np.arange(n_fft // 2 + 1) * (SAMPLE_RATE / n_fft), 1.0)
        cepstrum = np.fft.irfft(self.response_db(hz) * (np.log(10) / 20), n_fft)
        cepstrum[1 : n_fft // 2] *= 2  # folding the anti-causal half makes the phase minimal
        cepstrum[n_fft // 2 + 1 :] = 0
        response = np.fft.irfft(np.exp(np.fft.rfft(cepstrum)), n_fft)[:N_IR_SAMPLES]
        return response * np.minimum(1, np.linspace(4, 0, N_IR_SAMPLES))  # ends in silence


# The reference device a, two other real ones (b, c), and simulated ones: these filter and compress what a recorded.
MICROPHONES: dict[str, Microphone] = {
    "a": Microphone(30, 18000, noise_db=-78),
    "b": Microphone(110, 12000, 2, -0.6, ((350, 4, 0.5), (2600, 6, 0.6)), -3, -66, -4, 1.4),
    "c": Microphone(80, 14500, 1, 0.9, ((900, -5, 0.6), (5500, 6, 0.5)), 2, -68, -2, 1.3),
    "s1": Microphone(160, 9500, 2, 0.7, ((700, 5, 0.4), (3200, 5, 0.5)), -1, -70, -3, 1.7),
    "s2": Microphone(60, 7500, 2, -1.2, ((220, 5, 0.5), (1700, -6, 0.5)), 1, -68, -5, 1.5),
    "s3": Microphone(220, 13000, 1, 0.3, ((500, -5, 0.5), (1300, 6, 0.4), (6500, 5, 0.4)), -2, -72, -3, 1.6),
    "s4": Microphone(280, 6500, 2, 1.4, ((1100, 8, 0.4), (4200, 6, 0.3)), -2, -66, -3, 1.8),
    "s5": Microphone(100, 10500, 2, -2.0, ((450, 8, 0.5), (2300, -9, 0.5), (7000, 7, 0.4)), 0, -66, -4, 1.6),
    "s6": Microphone(330, 15000, 3, 0.8, ((650, -8, 0.5), (2800, 9, 0.35), (9000, 6, 0.4)), 1, -64, -2, 2.0),
}


def random_microphone(rng: Generator) -> Microphone:
    """Another microphone of the same family: noiseless and linear, for impulse responses."""
    peaks = [
        (log_uniform(rng, 150, 9000), float(rng.normal(0, 6)), float(rng.uniform(0.25, 0.7)))
        for _ in range(rng.integers(2, 6))
    ]
    return Microphone(
        high_pass_hz=log_uniform(rng, 30, 450),
        low_pass_hz=log_uniform(rng, 5500, 18000),
        slope=int(rng.integers(1, 4)),
        tilt_db=float(rng.normal(0, 1.2)),
        peaks=tuple(peaks),
        gain_db=float(rng.normal(-1, 2)),
    )


@lru_cache(maxsize=len(MICROPHONES))
def _transfer(microphone: Microphone) -> ndarray:
    """Response at the bins of a recording, (bin,); 1.8 MB each, so only the nine devices are kept."""
    return spectrum_of(microphone.impulse_response())


def record(spectrum: ndarray, recording_device: str, rng: Generator) -> ndarray:
    """What a device of the data set records.

    Args:
        spectrum: (bin,) of a recording, see `render_scene`.
        recording_device: key of `MICROPHONES`.
        rng: draws the device's own noise.

    Returns:
        (sample,) float32, 10 s at 44.1 kHz, within -0.95 .. 0.95.
    """
    chain = ["a", recording_device] if recording_device.startswith("s") else [recording_device]
    for name in chain:
        microphone = MICROPHONES[name]
        noise = noise_spectrum(rng, microphone.noise_tilt_db * np.log2(GRID_HZ / 1000))
        # Parseval: a spectrum of norm n is a waveform of root mean square n * sqrt(2) / n_samples.
        noise *= 10 ** (microphone.noise_db / 20) * N_SAMPLES / np.sqrt(2 * np.square(noise.view(np.float32)).sum())
        # Not the operator: it may reuse a temporary and swap the factors, and complex products round by their order.
        # The cache's result is such a temporary when another thread has filled it meanwhile.
        spectrum = np.multiply(spectrum, _transfer(microphone)) + noise
    x = np.fft.irfft(spectrum, N_SAMPLES)
    if microphone.ratio > 1:
        frame_power = np.square(x).reshape(-1, SAMPLE_RATE // 50).mean(axis=1)  # 20 ms
        attack = np.convolve(frame_power, np.full(5, 0.2), mode="same")
        excess_db = np.maximum(10 * np.log10(attack + 1e-12) - microphone.threshold_db, 0)
        x *= 10 ** (-stretch(np.append(excess_db, excess_db[-1])) * (1 - 1 / microphone.ratio) / 20)
    return (0.95 * np.tanh(x / 0.95)).astype(np.float32)
