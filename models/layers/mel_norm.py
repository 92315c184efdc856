"""Batch norm of a spectrogram band by band, the first layer of a network: a float factor and offset per mel band.

The spectrogram is float on the target, and what a convolution would take into its weights is one value per channel, not
per band: so this stays float there, two parameters per band.
"""

import copy

import torch
from torch import Tensor, nn

from models.layers.core import FakeLayer, Place, QuantConfig


def by_band(x: Tensor) -> Tensor:
    """(batch, channel, mel, time) as (batch, mel, channel * time).

    Three axes, not four: of a tensor with an axis of length 1 the memory layout is ambiguous, and PyTorch's batch norm
    then takes its input's for that of the gradient, which gives wrong gradients on a CPU (2.13).
    """
    return x.transpose(1, 2).flatten(2)


class MelNorm(nn.BatchNorm1d):
    """Batch norm over the mel bands of (batch, channel, mel, time), with statistics over batch, channel and time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(by_band(x)).unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    def folded(self) -> "MelNorm":
        """A copy whose weight and bias are all there is, one gain and one shift for each band."""
        folded = copy.deepcopy(self).eval()
        gain = self.weight / (self.running_var + self.eps).sqrt()
        folded.weight, folded.bias = nn.Parameter(gain), nn.Parameter(self.bias - gain * self.running_mean)
        nn.init.zeros_(folded.running_mean), nn.init.ones_(folded.running_var)
        folded.eps = 0.0
        return folded


class FakeMelNorm(FakeLayer):
    """Keeps the norm's names; nothing is rounded."""

    takes_float, gives, may_be_shared = True, "float", False

    def __init__(self, layer: MelNorm, _config: QuantConfig, place: Place):
        super().__init__()
        if not place.reads_float:
            raise ValueError("it must read the spectrogram")
        self.eps, self.momentum = layer.eps, layer.momentum
        self._parameters.update(layer._parameters)
        self._buffers.update(layer._buffers)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, mel, time)
        learns = self.training and not self.norm_frozen
        if learns:
            self.num_batches_tracked += 1
        y = nn.functional.batch_norm(
            by_band(x), self.running_mean, self.running_var, self.weight, self.bias, learns, self.momentum, self.eps
        )
        return y.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    @torch.no_grad()
    def convert(self) -> "BandScale":
        factor = self.weight * torch.rsqrt(self.running_var + self.eps)
        return BandScale(factor, self.bias - self.running_mean * factor)


class BandScale(nn.Module):
    """A factor and an offset for each mel band, in float."""

    float_part = "factor and offset of the spectrogram's mel bands"

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight[:, None])  # (mel, 1)
        self.register_buffer("bias", bias[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias
