"""Gain: a clip becomes louder or softer.

As dragonsearch's DCASE-Task1 has it (there always half the amplitude), samples beyond full scale are clipped.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch

from datasets.waveforms import Batch
from helpers.augment.augmentation import Augmentation
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class GainConfig:
    gain_p: Annotated[float, "share of clips with another gain; 0 is off", Bounds(0, 1)] = 0.5
    gain_low: Annotated[float, "smallest gain in dB", Bounds(-100, 100)] = -6.0
    gain_high: Annotated[float, "largest gain in dB", Bounds(-100, 100)] = 6.0

    def __post_init__(self):
        check_numbers(self)
        if self.gain_low > self.gain_high:
            raise ValueError(f"gain_low must be <= gain_high ({self.gain_high:g}), got {self.gain_low:g}")


class Gain(Augmentation):
    """Multiplies the waveforms of some clips by a factor each, uniform in dB, and clips them to [-1, 1]."""

    stage = "waveform"

    def __init__(self, config: GainConfig):
        super().__init__()
        self.config = config

    def forward(self, batch: Batch) -> Batch:
        config, x = self.config, batch.waveform  # (batch, sample)
        if not self.training or config.gain_p == 0:
            return batch
        on, place = torch.rand(2, len(x), 1, device=x.device)
        db = config.gain_low + place * (config.gain_high - config.gain_low)
        factor = torch.where(on < config.gain_p, 10 ** (db / 20), 1.0)
        # A clip that stays as it is may reach beyond full scale, as floats from a resampler do.
        return replace(batch, waveform=torch.where(on < config.gain_p, (x * factor).clamp_(-1, 1), x))
