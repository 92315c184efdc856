"""`nn.MaxPool2d`: the largest integer stands for the largest value, exactly."""

import torch
from torch import Tensor, nn

from models.layers.core import FakeLayer, Place, QTensor, QuantConfig, quantize
from models.layers.xnnpack import XnnTensor, xnn_dequantize, xnn_quantize


class FakeMaxPool(FakeLayer):
    """What is rounded before stays so.

    Raises:
        ValueError: for one that returns positions too.
    """

    takes_float, gives = True, "same"

    def __init__(self, layer: nn.MaxPool2d, _config: QuantConfig, _place: Place):
        super().__init__()
        if layer.return_indices:
            raise ValueError("it must not return indices")
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def convert(self) -> "IntMaxPool":
        return IntMaxPool(self.layer)


class IntMaxPool(nn.Module):
    def __init__(self, layer: nn.MaxPool2d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor | QTensor) -> Tensor | QTensor:
        if not isinstance(x, QTensor):
            return self.layer(x)
        if torch.compiler.is_exporting():
            return x._replace(values=quantize(self.layer(x.dequantize()), x.scale, x.zero_point))
        return x._replace(values=self.layer(x.values.float()).to(torch.int8))

    def for_xnnpack(self, _x: Tensor | QTensor) -> "XnnMaxPool":
        return XnnMaxPool(self.layer)


class XnnMaxPool(nn.Module):
    def __init__(self, layer: nn.MaxPool2d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor | QTensor) -> Tensor | XnnTensor:
        if not isinstance(x, QTensor):
            return self.layer(x)
        return xnn_quantize(self.layer(xnn_dequantize(x)), (x.scale, x.zero_point))
