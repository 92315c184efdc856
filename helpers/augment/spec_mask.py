"""Frequency and time masking of SpecAugment.

Source: D. S. Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
Interspeech 2019, https://arxiv.org/abs/1904.08779. Widths and positions are drawn as torchaudio's masking does.
Departure from the published training, which on its torchaudio 0.11 shared one mask in the batch: every clip has its
own, unless `shared`.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from datasets.waveforms import Batch
from helpers.augment.augmentation import Augmentation, Setting
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class SpecMaskConfig:
    freqm: Annotated[int, "widest frequency mask plus one, in mel bins; 0 is off", Bounds(0)] = 48
    timem: Annotated[int, "widest time mask plus one, in frames; 0 is off", Bounds(0)] = 0
    mask_p: Annotated[float, "share of clips with each of the two masks; 0 is off", Bounds(0, 1)] = 1.0

    def __post_init__(self):
        check_numbers(self)


class SpecMask(Augmentation):
    """Sets one random band of each spectrogram to `value`.

    The width is floor(U[0, max_width)), so at most max_width - 1; the position is uniform.

    Args:
        max_width: exclusive bound of the width, in mel bins or frames; 0 is off.
        axis: "mel" or "time".
        value: what a masked cell holds, on the scale of the spectrogram.
        shared: one mask for the whole batch, as in the published training.
        p: share of the clips; 0 is off.

    Raises:
        ValueError: for a value out of range or an unknown axis.
    """

    stage = "log_mel"

    def __init__(
        self, max_width: int, axis: Literal["mel", "time"], value: float, shared: bool = False, p: float = 1.0
    ):
        super().__init__()
        if axis not in ("mel", "time"):
            raise ValueError(f"axis must be mel or time, got {axis!r}")
        if max_width < 0:
            raise ValueError(f"width of the {axis} mask must be >= 0, got {max_width}")
        if not 0 <= p <= 1:
            raise ValueError(f"probability of the {axis} mask must be in [0, 1], got {p}")
        self.max_width, self.axis, self.value, self.shared, self.p = max_width, axis, value, shared, p

    @classmethod
    def from_config(cls, config: SpecMaskConfig, setting: Setting) -> nn.Module:
        for name, size in zip(("freqm", "timem"), setting.shape or (), strict=False):
            if getattr(config, name) > size:
                raise ValueError(f"{name} must be <= {size}, the size of the spectrogram, got {getattr(config, name)}")
        common = {"value": setting.mask_value, "p": config.mask_p}
        return nn.Sequential(cls(config.freqm, "mel", **common), cls(config.timem, "time", **common))

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.max_width == 0 or self.p == 0:
            return batch
        log_mel = batch.log_mel  # (batch, 1, mel, time)
        dim = 2 if self.axis == "mel" else 3
        masked = random_bands(log_mel, dim, self.max_width, 1 if self.shared else len(log_mel))
        if self.p < 1:
            masked &= torch.rand(len(masked), 1, 1, 1, device=log_mel.device) < self.p
        return replace(batch, log_mel=log_mel.masked_fill(masked, self.value))


def random_bands(log_mel: Tensor, dim: int, max_width: int, n_masks: int) -> Tensor:
    """Draws masks that are True on one band of axis `dim`: (mask, 1, mel, 1) or (mask, 1, 1, time)."""
    size = log_mel.shape[dim]
    width, position = torch.rand(2, n_masks, 1, 1, 1, device=log_mel.device)
    width = width * max_width
    start = (position * (size - width)).floor()
    cell = torch.arange(size, device=log_mel.device).view([-1 if i == dim else 1 for i in range(4)])
    return (cell >= start) & (cell < start + width.floor())
