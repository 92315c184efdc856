"""Residual normalisation over mel bands, of BC-ResNet and TF-SepNet.

Source: B. Kim, S. Yang, J. Kim, S. Chang, "Domain Generalization on Efficient Acoustic Scene Classification using
Residual Normalization", DCASE Workshop 2021, https://arxiv.org/abs/2111.06531. It takes a recording device's colour, a
gain per band, mostly out of a clip. Departure of easy_dcase_task1, kept: the variance is the unbiased one.

On the target the statistics of a clip decide the scale, so it stays in float between two 8-bit tensors.
"""

import torch
from torch import Tensor, nn

from models.layers.core import ActivationQuantizer, Constants, FakeLayer, Place, QTensor, QuantConfig, quantize


def normalise_bands(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of each clip's bands over channels and frames, (batch, 1, freq, 1) both."""
    if torch.compiler.is_exporting():  # files have no operator for a variance
        mean = x.mean(dim=(1, 3), keepdim=True)
        n = x.shape[1] * x.shape[3]
        variance = ((x - mean) ** 2).mean(dim=(1, 3), keepdim=True) * (n / (n - 1))
    else:
        variance, mean = torch.var_mean(x, dim=(1, 3), keepdim=True)
    return mean, torch.rsqrt(variance + eps)


class ResidualNorm(nn.Module):
    """out = lambda * x + (x - mean) / sqrt(variance + eps), with statistics of each clip and band; the same in eval.

    Args:
        identity_share: lambda, what of the input stays.
        eps: added to the variance.
    """

    def __init__(self, identity_share: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.identity_share, self.eps = identity_share, eps

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        mean, inverse = normalise_bands(x, self.eps)
        return torch.addcmul(x * self.identity_share, x - mean, inverse)


# ---- fake quantization ----------------------------------------------------------------------------------------------


class FakeResidualNorm(FakeLayer):
    def __init__(self, layer: ResidualNorm, _config: QuantConfig, _place: Place):
        super().__init__()
        self.layer, self.output = layer, ActivationQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layer(x))

    def convert(self) -> "IntResidualNorm":
        return IntResidualNorm(self.layer, self.output.constants())


# ---- integers -------------------------------------------------------------------------------------------------------


class IntResidualNorm(nn.Module):
    """Takes 8-bit values to float, normalises, and rounds; eagerly the sums behind the statistics are exact."""

    float_part = "normalises each band by statistics of the clip"

    def __init__(self, layer: ResidualNorm, output: Constants):
        super().__init__()
        self.layer, self.output = layer, output

    def forward(self, x: QTensor) -> QTensor:  # (batch, channel, freq, time)
        if torch.compiler.is_exporting():
            return QTensor(quantize(self.layer(x.dequantize()), *self.output), *self.output)
        integers = x.integers().double()
        n = integers.shape[1] * integers.shape[3]
        total = integers.sum(dim=(1, 3), keepdim=True)  # (batch, 1, freq, 1)
        squares = (integers * integers).sum(dim=(1, 3), keepdim=True)
        variance = (squares - total * total / n) / (n - 1) * x.scale**2
        inverse = torch.rsqrt(variance + self.layer.eps)
        y = x.scale * (integers * self.layer.identity_share + (integers - total / n) * inverse)
        return QTensor(quantize(y.float(), *self.output), *self.output)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]
