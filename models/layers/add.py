"""Sum of two tensors, as for a shortcut: integers in and out, a float factor for each input."""

import torch
from torch import Tensor, nn

from models.layers.core import (
    Q_MIN,
    ActivationQuantizer,
    Constants,
    FakeLayer,
    Place,
    QTensor,
    QuantConfig,
    float32,
    quantize,
    relu_if,
    requantize,
)
from models.layers.xnnpack import XnnTensor, xnn_dequantize, xnn_quantize


class Add(nn.Module):
    """Sum of two tensors of one shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class FakeAdd(FakeLayer):
    absorbs_relu = True

    def __init__(self, _layer: Add, _config: QuantConfig, place: Place):
        super().__init__()
        self.has_relu = place.ends_in_relu
        self.output = ActivationQuantizer()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.output(relu_if(x + y, self.has_relu))

    def convert(self) -> "IntAdd":
        return IntAdd(self.output.constants())


class IntAdd(nn.Module):
    def __init__(self, output: Constants):
        super().__init__()
        self.output = output

    def forward(self, x: QTensor, y: QTensor) -> QTensor:
        if torch.compiler.is_exporting():
            return QTensor(quantize(x.dequantize() + y.dequantize(), *self.output), *self.output)
        scale, zero_point = self.output
        # In the order of ONNX Runtime's kernel, on unsigned values: sums that lie between two levels round alike.
        a, b = float32(x.scale) / scale, float32(y.scale) / scale
        x_zero, y_zero = float32(x.zero_point + 128), float32(y.zero_point + 128)
        offset = (zero_point + 128) - _fma(a, x_zero, b * y_zero)
        total = _fma(x.values.float() + 128, a, _fma(y.values.float() + 128, b, offset))
        return requantize(total, 1.0, scale, Q_MIN)._replace(zero_point=zero_point)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]

    def for_xnnpack(self, _x: QTensor) -> "XnnAdd":
        return XnnAdd(self)


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z, rounded to float32 once, as CPUs do: the product of two float32 numbers is exact in float64."""
    return (x.double() * y.double() + z.double()).float()


class XnnAdd(nn.Module):
    def __init__(self, layer: IntAdd):
        super().__init__()
        self.output = layer.output

    def forward(self, x: QTensor, y: QTensor) -> XnnTensor:
        return xnn_quantize(xnn_dequantize(x) + xnn_dequantize(y), self.output)
