"""Mean over one axis, which stays with the size 1: integer sums and one float factor."""

import torch
from torch import Tensor, nn

from models.layers.core import (
    ActivationQuantizer,
    Constants,
    FakeLayer,
    Place,
    QTensor,
    QuantConfig,
    float32,
    quantize,
    requantize,
)


class AxisMean(nn.Module):
    """Mean over the axis `dim` of (batch, channel, freq, time): 2 is freq, 3 is time. What reads it may be rounded."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=self.dim, keepdim=True)


class FakeAxisMean(FakeLayer):
    def __init__(self, layer: AxisMean, _config: QuantConfig, _place: Place):
        super().__init__()
        self.dim, self.output = layer.dim, ActivationQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x.mean(dim=self.dim, keepdim=True))

    def convert(self) -> "IntAxisMean":
        return IntAxisMean(self.dim, self.output.constants())


class IntAxisMean(nn.Module):
    def __init__(self, dim: int, output: Constants):
        super().__init__()
        self.dim, self.output = dim, output

    def forward(self, x: QTensor) -> QTensor:
        if torch.compiler.is_exporting():
            return QTensor(quantize(x.dequantize().mean(dim=self.dim, keepdim=True), *self.output), *self.output)
        total = x.integers().double().sum(dim=self.dim, keepdim=True)
        return requantize(total, float32(x.scale) / float32(self.output[0] * x.shape[self.dim]), *self.output)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]
