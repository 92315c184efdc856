"""Frequency and time masking of SpecAugment.

Source: D. S. Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
Interspeech 2019, https://arxiv.org/abs/1904.08779. Widths and positions are drawn as torchaudio's masking does.
Departure from the published training, which on its torchaudio 0.11 shared one mask in the batch: every clip has its
own, unless `shared`.

`ShareMask` is the form of easy_dcase_task1, whose teachers it trained: a width relative to the spectrogram, and a coin
for the batch.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from datasets.waveforms import Batch


class SpecMask(nn.Module):
    """Sets one random band of each spectrogram to `value`.

    The width is floor(U[0, max_width)), so at most max_width - 1; the position is uniform.

    Args:
        max_width: exclusive bound of the width, in mel bins or frames; 0 is off.
        axis: "mel" or "time".
        value: what a masked cell holds, on the scale of the spectrogram.
        shared: one mask for the whole batch, as in the published training.

    Raises:
        ValueError: if max_width is negative or the axis unknown.
    """

    def __init__(self, max_width: int, axis: Literal["mel", "time"], value: float, shared: bool = False):
        super().__init__()
        if axis not in ("mel", "time"):
            raise ValueError(f"axis must be mel or time, got {axis!r}")
        if max_width < 0:
            raise ValueError(f"width of the {axis} mask must be >= 0, got {max_width}")
        self.max_width, self.axis, self.value, self.shared = max_width, axis, value, shared

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.max_width == 0:
            return batch
        log_mel = batch.log_mel  # (batch, 1, mel, time)
        dim = 2 if self.axis == "mel" else 3
        masked = random_bands(log_mel, dim, self.max_width, 1 if self.shared else len(log_mel))
        return replace(batch, log_mel=log_mel.masked_fill(masked, self.value))


class ShareMask(nn.Module):
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

    def __init__(self, max_share: float, axis: Literal["mel", "time"], value: float, p: float = 1.0):
        super().__init__()
        if axis not in ("mel", "time"):
            raise ValueError(f"axis must be mel or time, got {axis!r}")
        if not 0 <= max_share <= 1:
            raise ValueError(f"share of the {axis} mask must be in [0, 1], got {max_share}")
        if not 0 <= p <= 1:
            raise ValueError(f"probability of the {axis} mask must be in [0, 1], got {p}")
        self.max_share, self.axis, self.value, self.p = max_share, axis, value, p

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.max_share == 0 or self.p == 0:
            return batch
        log_mel = batch.log_mel  # (batch, 1, mel, time)
        dim = 2 if self.axis == "mel" else 3
        masked = random_bands(log_mel, dim, round(self.max_share * log_mel.shape[dim]), len(log_mel))
        # Asked for on the device, so that nobody waits for the coin.
        masked &= torch.rand((), device=log_mel.device) < self.p
        return replace(batch, log_mel=log_mel.masked_fill(masked, self.value))


def random_bands(log_mel: Tensor, dim: int, max_width: int, n_masks: int) -> Tensor:
    """Draws masks that are True on one band of axis `dim`: (mask, 1, mel, 1) or (mask, 1, 1, time)."""
    size = log_mel.shape[dim]
    width, position = torch.rand(2, n_masks, 1, 1, 1, device=log_mel.device)
    width = width * max_width
    start = (position * (size - width)).floor()
    cell = torch.arange(size, device=log_mel.device).view([-1 if i == dim else 1 for i in range(4)])
    return (cell >= start) & (cell < start + width.floor())
