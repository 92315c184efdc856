"""A ReLU that is part of no other layer: a clamp of integers, exact. Behind a convolution or sum it costs nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.core import FakeLayer, Place, QTensor, QuantConfig, quantize
from models.layers.xnnpack import XnnTensor, xnn_dequantize, xnn_quantize


class FakeRelu(FakeLayer):
    """Zero is a level: what is rounded before stays so."""

    takes_float, gives = True, "same"

    def __init__(self, _layer: nn.ReLU, _config: QuantConfig, _place: Place):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def convert(self) -> "IntRelu":
        return IntRelu()


class IntRelu(nn.Module):
    def forward(self, x: Tensor | QTensor) -> Tensor | QTensor:
        if not isinstance(x, QTensor):
            return F.relu(x)
        if torch.compiler.is_exporting():
            return x._replace(values=quantize(F.relu(x.dequantize()), x.scale, x.zero_point))
        return x._replace(values=x.values.clamp_min(x.zero_point))

    def for_xnnpack(self, _x: Tensor | QTensor) -> "XnnRelu":
        return XnnRelu()


class XnnRelu(nn.Module):
    def forward(self, x: Tensor | QTensor) -> Tensor | XnnTensor:
        if not isinstance(x, QTensor):
            return F.relu(x)
        return xnn_quantize(F.relu(xnn_dequantize(x)), (x.scale, x.zero_point))
