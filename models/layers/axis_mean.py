"""Mean over one axis, which stays with the size 1: integer sums and one float factor."""

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
        # Sums of integers are exact in float32, in whatever order a runtime adds (below 2 ** 16 positions).
        total = dequantize(x.values, 1.0, x.zero_point).sum(dim=self.dim, keepdim=True)
        return QTensor(quantize(total * (x.scale / x.shape[self.dim]), *self.output), *self.output)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]

    def for_xnnpack(self, _x: QTensor) -> XnnBetween:
        return XnnBetween(AxisMean(self.dim), self.output)
