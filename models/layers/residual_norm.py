"""Residual normalisation over mel bands, of BC-ResNet and TF-SepNet.

Source: B. Kim, S. Yang, J. Kim, S. Chang, "Domain Generalization on Efficient Acoustic Scene Classification using
Residual Normalization", DCASE Workshop 2021, https://arxiv.org/abs/2111.06531. It takes a recording device's colour, a
gain per band, mostly out of a clip. Departure of easy_dcase_task1, kept: the variance is the unbiased one.

On the target the statistics of a clip decide the scale, so it stays in float between two 8-bit tensors.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.core import (
    ActivationQuantizer,
    Constants,
    FakeLayer,
    Place,
    QTensor,
    QuantConfig,
    dequantize,
    quantize,
)
from models.layers.xnnpack import XnnBetween


def normalised(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps), with the unbiased variance of each clip and band over channels and frames.

    Args:
        x: (batch, channel, freq, time).
    """
    n = x.shape[1] * x.shape[3]
    if torch.compiler.is_exporting():  # from operators that all runtimes have
        centred = x - x.mean(dim=(1, 3), keepdim=True)
        variance = centred.square().mean(dim=(1, 3), keepdim=True) * (n / (n - 1))
        return centred * torch.rsqrt(variance + eps)
    # With the channels last in memory a clip's band is one run of values: one pass forward and one backward. The
    # layer norm has the biased variance, so it takes the factor between the two out of eps and into its gain.
    bands = x.permute(0, 2, 3, 1)  # (batch, freq, time, channel)
    share = (n - 1) / n
    gain = bands.new_full(bands.shape[2:], math.sqrt(share))
    return F.layer_norm(bands, bands.shape[2:], gain, eps=eps * share).permute(0, 3, 1, 2)


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
        return torch.add(normalised(x, self.eps), x, alpha=self.identity_share)


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
    """Sums of the integers and of their squares, from these a float gain and bias for each band, and rounding.

    The sums are exact and the statistics in float64, so that every runtime finds the same gain and bias in float32:
    with float32 statistics some of its many values rounded the other way, and logits moved by a step.
    """

    float_part = "normalises each band by statistics of the clip"

    def __init__(self, layer: ResidualNorm, output: Constants):
        super().__init__()
        self.layer, self.output = layer, output

    def forward(self, x: QTensor) -> QTensor:  # (batch, channel, freq, time)
        integers = dequantize(x.values, 1.0, x.zero_point)
        n = x.shape[1] * x.shape[3]
        # Over time first: sums of 258 squares fit in float32, and few values are left for float64.
        total, squares = (
            part.sum(dim=3, keepdim=True).double().sum(dim=1, keepdim=True) for part in (integers, integers * integers)
        )  # (batch, 1, freq, 1)
        variance = (squares - total * total / n) / (n - 1) * x.scale**2
        inverse = 1 / torch.sqrt(variance + self.layer.eps)
        gain = (inverse + self.layer.identity_share) * x.scale
        bias = total * inverse * (-x.scale / n)
        return QTensor(quantize(integers * gain.float() + bias.float(), *self.output), *self.output)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]

    def for_xnnpack(self, _x: QTensor) -> XnnBetween:
        return XnnBetween(self.layer, self.output)
