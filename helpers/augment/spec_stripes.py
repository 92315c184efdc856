"""SpecAugment with several stripes on each axis.

Source: D. S. Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
Interspeech 2019, https://arxiv.org/abs/1904.08779, as PANNs' torchlibrosa and SP4ASC draw it. Departure: SP4ASC sets
stripes to zero behind its first batch norm, about the mean of each band; here, before the network, to that mean.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch

from datasets.waveforms import Batch
from helpers.augment.augmentation import Augmentation, Setting
from helpers.augment.stripes import random_stripes
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class SpecStripesConfig:
    stripes_p: Annotated[float, "share of clips with stripes; 0 is off", Bounds(0, 1)] = 1.0
    time_width: Annotated[int, "widest time stripe plus one, in frames", Bounds(1)] = 128
    n_time_stripes: Annotated[int, "time stripes; 0 is off", Bounds(0, 100)] = 2
    mel_width: Annotated[int, "widest frequency stripe plus one, in mel bins", Bounds(1)] = 32
    n_mel_stripes: Annotated[int, "frequency stripes; 0 is off", Bounds(0, 100)] = 2

    def __post_init__(self):
        check_numbers(self)


class SpecStripes(Augmentation):
    """Sets stripes of each spectrogram to the batch's mean of every band; stripes may overlap.

    A stripe's width is uniform in {0, ..., widest - 1}, its start in {0, ..., size - width - 1}.

    Raises:
        ValueError: from `from_config`, for stripes that may be as wide as the spectrogram.
    """

    stage = "log_mel"

    def __init__(self, config: SpecStripesConfig):
        super().__init__()
        self.config = config

    @classmethod
    def from_config(cls, config: SpecStripesConfig, setting: Setting) -> "SpecStripes":
        n_stripes = {"mel_width": config.n_mel_stripes, "time_width": config.n_time_stripes}
        for name, size in zip(n_stripes, setting.shape or (), strict=False):
            if n_stripes[name] and getattr(config, name) > size:
                raise ValueError(f"{name} must be <= {size}, the size of the spectrogram, got {getattr(config, name)}")
        return cls(config)

    def forward(self, batch: Batch) -> Batch:
        config, x = self.config, batch.log_mel  # (batch, 1, mel, time)
        if not self.training or config.stripes_p == 0:
            return batch
        mel = random_stripes(len(x), config.n_mel_stripes, config.mel_width, x.shape[2], x.device)
        time = random_stripes(len(x), config.n_time_stripes, config.time_width, x.shape[3], x.device)
        on = torch.rand(len(x), 1, 1, 1, device=x.device) < config.stripes_p
        masked = on & (mel[:, None, :, None] | time[:, None, None, :])
        return replace(batch, log_mel=torch.where(masked, x.mean(dim=(0, 3), keepdim=True), x))
