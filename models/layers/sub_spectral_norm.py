"""Sub-spectral normalisation: batch norm of each channel and each of several bands of neighbouring mel rows by itself.

Source: S. Chang, H. Park, J. Cho, H. Park, S. Yun, K. Hwang, "SubSpectral Normalization for Neural Audio Data
Processing", ICASSP 2021, https://arxiv.org/abs/2103.13620. Departures: none.

With one band it is a batch norm, which the convolution before it takes over. With several it cannot: a convolution's
weights are the same at every row. On the target it is then a float gain and bias between two 8-bit tensors.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.core import ActivationQuantizer, Constants, FakeLayer, Place, QTensor, QuantConfig, quantize
from models.layers.xnnpack import XnnBetween


def sub_spectral_norm(n_channels: int, n_bands: int) -> nn.Module:
    """The norm that a network wants; its entries in the state dict are the same for one band and for several."""
    if n_bands > 1:
        return SubSpectralNorm(n_channels, n_bands)
    return nn.Sequential(OrderedDict(_bn=nn.BatchNorm2d(n_channels)))


class SubSpectralNorm(nn.Module):
    """Channel c of band b is channel c * n_bands + b of the batch norm inside.

    Args:
        n_channels: of its input.
        n_bands: bands, of as many rows each.
        norm_name: what the batch norm is called in the state dict; published networks differ.

    Raises:
        ValueError: from `forward`, for rows that the bands do not divide.
    """

    def __init__(self, n_channels: int, n_bands: int, norm_name: str = "_bn"):
        super().__init__()
        self.n_bands, self.norm_name = n_bands, norm_name
        self.add_module(norm_name, nn.BatchNorm2d(n_channels * n_bands))

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.get_submodule(self.norm_name)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        return self.norm(as_bands(x, self.n_bands)).reshape(x.shape)


def as_bands(x: Tensor, n_bands: int) -> Tensor:
    """(batch, channel, freq, time) as (batch, channel * band, freq / band, time)."""
    n_batch, n_channels, n_freqs, n_frames = x.shape
    if n_freqs % n_bands:
        raise ValueError(f"{n_bands} bands do not divide {n_freqs} rows along freq")
    return x.reshape(n_batch, n_channels * n_bands, n_freqs // n_bands, n_frames)


# ---- fake quantization ----------------------------------------------------------------------------------------------


class FakeSubSpectralNorm(FakeLayer):
    """Rounds what the norm gives."""

    def __init__(self, layer: SubSpectralNorm, _config: QuantConfig, _place: Place):
        super().__init__()
        self.n_bands, self.norm_name = layer.n_bands, layer.norm_name
        self.add_module(layer.norm_name, layer.norm)
        self.output = ActivationQuantizer()

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.get_submodule(self.norm_name)

    def forward(self, x: Tensor) -> Tensor:
        norm, bands = self.norm, as_bands(x, self.n_bands)
        if self.norm_frozen:
            y = F.batch_norm(bands, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            y = norm(bands)
        return self.output(y.reshape(x.shape))

    @torch.no_grad()
    def convert(self) -> "IntSubSpectralNorm":
        norm = self.norm
        gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return IntSubSpectralNorm(self.n_bands, gain, norm.bias - norm.running_mean * gain, self.output.constants())


# ---- integers -------------------------------------------------------------------------------------------------------


class IntSubSpectralNorm(nn.Module):
    """The norm as a gain and a bias.

    Args:
        weight, bias: float32 (channel * band,).
    """

    float_part = "gain and bias of each channel and band"

    def __init__(self, n_bands: int, weight: Tensor, bias: Tensor, output: Constants):
        super().__init__()
        self.n_bands, self.output = n_bands, output
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: QTensor) -> QTensor:
        return QTensor(quantize(self.normalise(x.dequantize()), *self.output), *self.output)

    def normalise(self, x: Tensor) -> Tensor:
        """A product and a sum in float32, as every runtime computes them."""
        y = as_bands(x, self.n_bands) * self.weight[:, None, None] + self.bias[:, None, None]
        return y.reshape(x.shape)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]

    def for_xnnpack(self, _x: QTensor) -> XnnBetween:
        return XnnBetween(self.normalise, self.output)
