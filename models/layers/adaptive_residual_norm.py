"""Adaptive residual normalisation: `ResidualNorm` whose share of the input, gain and bias are learned per channel.

Source: the published code of TF-SepNet, https://github.com/yqcai888/easy_dcase_task1, whose parameter names it keeps.
It has no 8-bit form.
"""

import torch
from torch import Tensor, nn

from models.layers.residual_norm import normalised


class AdaptiveResidualNorm(nn.Module):
    """out = gamma * (rho * x + (1 - rho) * (x - mean) / sqrt(variance + eps)) + beta, statistics of each clip and band.

    Args:
        n_channels: of its input.
        learns: whether rho, gamma and beta are parameters; else they keep the values 0.5, 1 and 0.
        eps: added to the variance.
    """

    def __init__(self, n_channels: int, learns: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("_rho", 0.5), ("_gamma", 1.0), ("_beta", 0.0)):
            self.register_parameter(name, nn.Parameter(torch.full((1, n_channels, 1, 1), value), requires_grad=learns))

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        return torch.addcmul(self._beta, self._gamma, torch.lerp(normalised(x, self.eps), x, self._rho))
