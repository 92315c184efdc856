"""`nn.Linear`: int8 weights per output channel, 8-bit input, float output.

Products and sums are integers; one float factor per output channel makes floats of them, so that logits are not
multiples of a step. Float values that it reads, such as means over freq and time, it rounds to 8 bits itself.
"""

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
    dequantize_channels,
)
from models.layers.integer_sums import IntegerSums
from models.layers.weights import WeightRounding, count_overflows
from models.layers.xnnpack import xnn_dequantize, xnn_quantize


class FakeLinear(FakeLayer):
    takes_float, gives, may_be_shared = True, "float", False

    def __init__(self, layer: nn.Linear, config: QuantConfig, place: Place):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.input = ActivationQuantizer() if place.reads_float else None
        self.weights = WeightRounding(config.weight_max, config.limit_pairs and not config.reduced_range)

    def forward(self, x: Tensor) -> Tensor:  # (..., feature)
        x = x if self.input is None else self.input(x)
        if not self.rounding:
            return F.linear(x, self.weight, self.bias)
        bias = self.bias
        if bias is not None:
            bias = bias + (bias.half().float() - bias).detach()
        return F.linear(x, self.weights.fake(self.weight), bias)

    @torch.no_grad()
    def convert(self) -> "IntLinear":
        values, scale = self.weights.integers(self.weight)
        bias = None if self.bias is None else self.bias.half()
        return IntLinear(values, scale, bias, None if self.input is None else self.input.constants())


class IntLinear(IntegerSums):
    """Float values from int8 ones, or from floats that it rounds.

    Args:
        weight: int8 (channel, feature).
        weight_scale: float32 (channel,).
        bias: float16 (channel,), or None; rounded to the scale of the 32-bit sums in use.
        input: scale and zero point that a float input is rounded with.
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input: Constants | None = None):
        super().__init__(input)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor | QTensor) -> Tensor:  # (..., feature)
        x = self._read(x)
        if torch.compiler.is_exporting():
            return self._in_float(x.dequantize())
        step = self.weight_scale * x.scale
        return self._sums(x, step).float() * step

    def sum(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def n_overflows(self) -> int:
        return count_overflows(self.weight)

    def step_of_output(self, step: float) -> float:
        """What its outputs move by when every input moves one level up or down, in the mean: they have no step."""
        lengths = (self.weight.float() * self.weight_scale[:, None]).norm(dim=1)
        return (step if self.input is None else self.input[0]) * lengths.mean().item()

    def for_xnnpack(self, x: Tensor | QTensor) -> "XnnLinear":
        return XnnLinear(self, x)


class XnnLinear(nn.Module):
    """With float weights, each an int8 value times its scale: XNNPACK has no kernel from 8 bits to float."""

    def __init__(self, layer: IntLinear, x: Tensor | QTensor):
        super().__init__()
        self.input, bias = layer.input, layer.bias
        step = layer.weight_scale * (x.scale if isinstance(x, QTensor) else self.input[0])
        self.register_buffer("weight", dequantize_channels(layer.weight, layer.weight_scale))
        self.register_buffer("bias", None if bias is None else torch.round(bias.float() / step) * step)

    def forward(self, x: Tensor | QTensor) -> Tensor:
        x = x if isinstance(x, QTensor) else xnn_quantize(x, self.input)
        return F.linear(xnn_dequantize(x), self.weight, self.bias)
