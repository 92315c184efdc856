"""Adaptive residual normalisation with a gain and an offset per channel, of dragonsearch's TF-SepNet."""

import torch
from torch import Tensor, nn

from models.layers.residual_norm import normalised


class AffineResidualNorm(nn.Module):
    """A learned mixture of the input and its frequency-wise normalisation, then a gain and an offset per channel.

    n = (x - mean) / sqrt(var + eps), mean and unbiased variance of each mel band of each clip, over channel and time;
    y = gamma * (rho * x + (1 - rho) * n) + beta. All three are free numbers per channel.
    """

    def __init__(self, n_channels: int, eps: float = 1e-5):
        super().__init__()
        self.rho = nn.Parameter(torch.full((1, n_channels, 1, 1), 0.5))
        self.gamma = nn.Parameter(torch.ones(1, n_channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, n_channels, 1, 1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        # In float32: in 16 bits sums of squares overflow.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mixed = torch.lerp(normalised(wide, self.eps).to(x.dtype), x, self.rho)
        return torch.addcmul(self.beta, self.gamma, mixed)
