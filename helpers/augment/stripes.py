"""Random stripes of spectrograms, as SpecAugment draws them in training and at test time."""

import torch
from torch import Tensor


def random_stripes(n_clips: int, n_stripes: int, width: int, size: int, device: torch.device) -> Tensor:
    """Draws stripes; True where one covers, (clip, cell)."""
    draws = torch.rand(2, n_clips, n_stripes, 1, device=device)
    widths = (draws[0] * width).floor()
    return covered((draws[1] * (size - widths)).floor(), widths, size)


def covered(start: Tensor, width: Tensor, size: int) -> Tensor:
    """Cells (clip, cell) that stripes (clip, stripe, 1) cover."""
    cell = torch.arange(size, device=start.device)
    return ((cell >= start) & (cell < start + width)).any(dim=1)
