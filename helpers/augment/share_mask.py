"""Frequency and time masking with widths relative to the spectrogram, and a coin for the batch.

Source: easy_dcase_task1, whose teachers it trained, https://github.com/yqcai888/easy_dcase_task1; the masks are those
of SpecAugment (spec_mask.py).
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import nn

from datasets.waveforms import Batch
from helpers.augment.augmentation import Augmentation, Setting
from helpers.augment.spec_mask import random_bands
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class ShareMaskConfig:
    mask_share: Annotated[float, "widest masks of both axes, as shares of the spectrogram; 0 is off", Bounds(0, 1)] = (
        0.0
    )
    share_mask_p: Annotated[float, "share of batches with each of the two masks; 0 is off", Bounds(0, 1)] = 1.0

    def __post_init__(self):
        check_numbers(self)


class ShareMask(Augmentation):
    """With probability `p`, once for the whole batch, sets one random band of each spectrogram to `value`.

    Widths are drawn as those of `SpecMask` with max_width = round(max_share * size of the axis), half to even.

    Args:
        max_share: share of the axis that bounds the width, in [0, 1]; 0 is off.
        axis: "mel" or "time".
        value: what a masked cell holds, on the scale of the spectrogram; published: 0.
        p: probability for a batch; 0 is off.

    Raises:
        ValueError: for a value out of range or an unknown axis.
    """

    stage = "log_mel"

    def __init__(self, max_share: float, axis: Literal["mel", "time"], value: float, p: float = 1.0):
        super().__init__()
        if axis not in ("mel", "time"):
            raise ValueError(f"axis must be mel or time, got {axis!r}")
        if not 0 <= max_share <= 1:
            raise ValueError(f"share of the {axis} mask must be in [0, 1], got {max_share}")
        if not 0 <= p <= 1:
            raise ValueError(f"probability of the {axis} mask must be in [0, 1], got {p}")
        self.max_share, self.axis, self.value, self.p = max_share, axis, value, p

    @classmethod
    def from_config(cls, config: ShareMaskConfig, setting: Setting) -> nn.Module:
        masks = [cls(config.mask_share, axis, value=0.0, p=config.share_mask_p) for axis in ("mel", "time")]
        return nn.Sequential(*masks)

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.max_share == 0 or self.p == 0:
            return batch
        log_mel = batch.log_mel  # (batch, 1, mel, time)
        dim = 2 if self.axis == "mel" else 3
        masked = random_bands(log_mel, dim, round(self.max_share * log_mel.shape[dim]), len(log_mel))
        # Asked for on the device, so that nobody waits for the coin.
        masked &= torch.rand((), device=log_mel.device) < self.p
        return replace(batch, log_mel=log_mel.masked_fill(masked, self.value))
