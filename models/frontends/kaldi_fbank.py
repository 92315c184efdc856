"""Kaldi filter banks, batched: the front end of BEATs.

Source: D. Povey et al., "The Kaldi Speech Recognition Toolkit", ASRU 2011 (`compute-fbank-feats`, as in
`torchaudio.compliance.kaldi.fbank` without dither), with the settings and the normalisation of S. Chen et al., "BEATs:
Audio Pre-Training with Acoustic Tokenizers", ICML 2023, https://github.com/microsoft/unilm/tree/master/beats.
Departures: none in the result, to rounding; a batch at a time, on the device.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from models.bounds import MAX_FFT, MAX_MELS, MOST, Bounds, check_hop, check_numbers
from models.frontends import mel

POVEY_EXPONENT = 0.85  # the window is a Hann window to this power
FULL_SCALE = 2.0**15  # Kaldi computes on 16-bit sample values
POWER_FLOOR = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class KaldiFbankConfig:
    sample_rate: Annotated[int, "sampling rate of the waveform in Hz", Bounds(1)] = 16000
    win_length: Annotated[int | None, "length of a frame in samples; None: 25 ms", Bounds(3, MAX_FFT)] = None
    hop_length: Annotated[int | None, "step from frame to frame in samples; None: 10 ms", Bounds(1)] = None
    n_mels: Annotated[int, "number of mel bands", Bounds(1, MAX_MELS)] = 128
    f_min: Annotated[float, "lower edge of the lowest band in Hz", Bounds(0)] = 20.0
    f_max: Annotated[float | None, "upper edge of the highest band in Hz; None: half the rate", Bounds(0)] = None
    dataset_mean: Annotated[float, "subtracted from the logarithm; BEATs' value for AudioSet", Bounds(-MOST)] = 15.41663
    dataset_std: Annotated[
        float, "the result is divided by twice this; BEATs' value for AudioSet", Bounds(0, above=True)
    ] = 6.55582

    def __post_init__(self):
        check_numbers(self)
        for name, default in (
            ("win_length", self.sample_rate * 25 // 1000),
            ("hop_length", self.sample_rate * 10 // 1000),
            ("f_max", self.sample_rate / 2),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_numbers(self)  # of a low rate, 10 ms are no sample
        check_hop(self)
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"f_min and f_max must satisfy 0 <= f_min < f_max <= {self.sample_rate / 2} Hz (half the sample rate), "
                f"got f_min {self.f_min}, f_max {self.f_max}"
            )

    @property
    def n_fft(self) -> int:
        """Length of the Fourier transform in samples: the frame's, rounded up to a power of two."""
        return 1 << (self.win_length - 1).bit_length()


def mel_bank(config: KaldiFbankConfig) -> Tensor:
    """Kaldi's triangles on the mel axis, (mel, n_fft / 2): unit peak; the Nyquist bin has no weight.

    In float32, step by step as Kaldi does it: a bin that stands on the edge of a filter has a weight of rounding alone,
    and where it is the only one of a narrow filter, its logarithm depends on that rounding.
    """
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (config.f_min, config.f_max))
    step = (high - low) / (config.n_mels + 1)
    band = torch.arange(config.n_mels)[:, None]
    left, centre, right = low + band * step, low + (band + 1.0) * step, low + (band + 2.0) * step  # (mel, 1)
    bin_hz = config.sample_rate / config.n_fft * torch.arange(config.n_fft // 2)
    bin_mel = 1127.0 * (1.0 + bin_hz / 700.0).log()  # (bin,)
    return torch.minimum((bin_mel - left) / (centre - left), (right - bin_mel) / (right - centre)).clamp_min(0)


class KaldiFbank(mel.Mel):
    """Maps waveforms (batch, sample) in [-1, 1] to normalised filter banks (batch, 1, mel, time), float32.

    Frames: 1 + floor((sample - win_length) / hop_length); there is no padding, the samples after the last whole frame
    are not used. The result is the same in training and eval mode. No parameters, no state.

    Raises:
        ValueError: for clips shorter than one frame.
    """

    # What a masked cell holds: 0, about the mean of AudioSet, as in the published fine-tuning.
    mask_value = 0.0
    preemphasis = 0.97
    is_centred = False
    removes_mean = True
    warns_of_empty_bands = False  # the published setting has one

    def __init__(self, config: KaldiFbankConfig):
        window = torch.hann_window(config.win_length, periodic=False).pow(POVEY_EXPONENT)
        # The first sample of a frame has weight 0, so frames start at the second. Scaling by a power of two is exact.
        super().__init__(config, FULL_SCALE * window[1:], mel_bank(config))

    def compress_(self, bands: Tensor) -> Tensor:
        mean, scale = self.config.dataset_mean, 2 * self.config.dataset_std
        return bands.clamp_min_(POWER_FLOOR).log_().sub_(mean).mul_(1 / scale)

    @property
    def normalisation(self) -> str:
        """From the power in a band, of samples times 32768, to the output, for the metadata of files."""
        mean, scale = self.config.dataset_mean, 2 * self.config.dataset_std
        return f"log_mel = (ln(max(power, {POWER_FLOOR:.8g})) - {mean:.8g}) / {scale:.8g}"
