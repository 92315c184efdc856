"""Pitch shift: sounds higher or lower, of the same length.

A phase vocoder stretches the waveform and resampling brings it back, as `torchaudio.functional.pitch_shift` does, with
the same result. Departure: it resamples with the few samples around each new one; torchaudio's kernel for the odd
ratios of semitones takes 5 GB and 16 s for a clip of a second. One shift serves the whole batch.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from datasets.waveforms import Batch
from helpers.augment.augmentation import Augmentation, Setting
from models.bounds import Bounds, check_numbers

N_FFT = 512
ZEROS, ROLL_OFF = 6, 0.99  # torchaudio's: zero crossings of the low-pass to either side, and its edge


@dataclass(frozen=True)
class PitchShiftConfig:
    pitch_p: Annotated[float, "share of clips with another pitch; 0 is off", Bounds(0, 1)] = 0.3
    pitch_low: Annotated[float, "lowest shift in semitones", Bounds(-24, 24)] = -2.0
    pitch_high: Annotated[float, "highest shift in semitones; drawn for each batch", Bounds(-24, 24)] = 2.0

    def __post_init__(self):
        check_numbers(self)
        if self.pitch_low > self.pitch_high:
            raise ValueError(f"pitch_low must be <= pitch_high ({self.pitch_high:g}), got {self.pitch_low:g}")


class PitchShift(Augmentation):
    """Shifts some clips of a batch by a number of semitones, uniform between the two and the same for all of them.

    Args:
        sample_rate: of the waveforms in Hz.
    """

    stage = "waveform"

    def __init__(self, config: PitchShiftConfig, sample_rate: int):
        super().__init__()
        self.config, self.sample_rate = config, sample_rate

    @classmethod
    def from_config(cls, config: PitchShiftConfig, setting: Setting) -> "PitchShift":
        return cls(config, setting.sample_rate)

    def forward(self, batch: Batch) -> Batch:
        config, x = self.config, batch.waveform  # (batch, sample)
        if not self.training or config.pitch_p == 0:
            return batch
        # How many clips and how far decides what is computed, so these draws are read from the host's generator.
        chosen = (torch.rand(len(x)) < config.pitch_p).nonzero()[:, 0].to(x.device)
        n_steps = config.pitch_low + torch.rand(()).item() * (config.pitch_high - config.pitch_low)
        if len(chosen) == 0:
            return batch
        with torch.autocast(x.device.type, enabled=False):
            return replace(batch, waveform=x.index_copy(0, chosen, pitch_shift(x[chosen], self.sample_rate, n_steps)))


def pitch_shift(waveform: Tensor, sample_rate: int, n_steps: float) -> Tensor:
    """Waveforms (batch, sample) whose pitch is `n_steps` semitones higher."""
    from torchaudio.functional import phase_vocoder  # slow to import

    hop, window = N_FFT // 4, torch.hann_window(N_FFT, device=waveform.device)
    rate = 2.0 ** (-n_steps / 12)
    spectrum = torch.stft(waveform, N_FFT, hop, window=window, return_complex=True)  # (batch, bin, time)
    advance = torch.linspace(0, math.pi * hop, spectrum.shape[1], device=waveform.device)[:, None]
    n_samples = waveform.shape[1]
    stretched = phase_vocoder(spectrum, rate, advance)
    stretched = torch.istft(stretched, N_FFT, hop, window=window, length=round(n_samples / rate))
    shifted = resample(stretched, int(sample_rate / rate), sample_rate)[:, :n_samples]
    return torch.nn.functional.pad(shifted, (0, n_samples - shifted.shape[1]))


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resamples (batch, sample) with torchaudio's low-pass, a sinc under a Hann window; any ratio of the rates."""
    cutoff = min(rate, new_rate) * ROLL_OFF / rate  # relative to the old rate
    width = math.ceil(ZEROS / cutoff)
    n_new = -(-waveform.shape[1] * new_rate // rate)
    # Float64 and the ratio as whole numbers: a late sample's place would lose its fraction.
    place = torch.arange(n_new, device=waveform.device, dtype=torch.float64) * rate / new_rate  # in old samples
    first = place.floor().long() - width
    padded = torch.nn.functional.pad(waveform, (width, 2 * width + 2))
    result = waveform.new_zeros(len(waveform), n_new)
    for k in range(2 * width + 2):
        t = ((first + k - place) * cutoff).clamp(-ZEROS, ZEROS)
        weight = torch.sinc(t) * torch.cos(t * math.pi / ZEROS / 2) ** 2 * cutoff  # (new sample,)
        result.addcmul_(padded[:, first + k + width], weight.to(waveform.dtype))
    return result
