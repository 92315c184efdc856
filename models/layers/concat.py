"""Concatenation of channels; in 8 bits all parts take one scale, a table of 256 values for each part."""

import torch
from torch import Tensor, nn

from models.layers.core import ActivationQuantizer, Constants, FakeLayer, Place, QTensor, QuantConfig, quantize
from models.layers.xnnpack import XnnTensor, xnn_dequantize, xnn_quantize


class Concat(nn.Module):
    """Channels of all inputs, one input behind the other."""

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, dim=1)


class FakeConcat(FakeLayer):
    def __init__(self, _layer: Concat, _config: QuantConfig, _place: Place):
        super().__init__()
        self.output = ActivationQuantizer()

    def forward(self, *parts: Tensor) -> Tensor:
        return self.output(torch.cat(parts, dim=1))

    def convert(self) -> "IntConcat":
        return IntConcat(self.output.constants())


class IntConcat(nn.Module):
    def __init__(self, output: Constants):
        super().__init__()
        self.output = output

    def forward(self, *parts: QTensor) -> QTensor:
        # Through float, value by value: this is ONNX Runtime's table, to the bit.
        return QTensor(quantize(torch.cat([part.dequantize() for part in parts], dim=1), *self.output), *self.output)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]

    def for_xnnpack(self, _x: QTensor) -> "XnnConcat":
        return XnnConcat(self.output)


class XnnConcat(nn.Module):
    """XNNPACK joins what has one scale already."""

    def __init__(self, output: Constants):
        super().__init__()
        self.output = output

    def forward(self, *parts: QTensor) -> XnnTensor:
        parts = [xnn_dequantize(xnn_quantize(xnn_dequantize(part), self.output)) for part in parts]
        return xnn_quantize(torch.cat(parts, dim=1), self.output)
