"""Frequency and time masking of SpecAugment.

Source: D. S. Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
Interspeech 2019, https://arxiv.org/abs/1904.08779. Widths and positions are drawn as torchaudio's masking does.
Departure from the published training, which on its torchaudio 0.11 shared one mask in the batch: every clip has its
own, unless `shared`.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

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
        size = log_mel.shape[dim]
        n_masks = 1 if self.shared else len(log_mel)
        width, position = torch.rand(2, n_masks, 1, 1, 1, device=log_mel.device)
        width = width * self.max_width
        start = (position * (size - width)).floor()
        cell = torch.arange(size, device=log_mel.device).view([-1 if i == dim else 1 for i in range(4)])
        masked = (cell >= start) & (cell < start + width.floor())  # (mask, 1, mel, 1) or (mask, 1, 1, time)
        return replace(batch, log_mel=log_mel.masked_fill(masked, self.value))
