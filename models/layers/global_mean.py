"""Mean over freq and time, in float, so that logits are not multiples of a step; `x.mean(dim=(2, 3))` does the same."""

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from models.layers.core import FakeLayer, Place, QTensor, QuantConfig
from models.layers.xnnpack import XnnTensor


class GlobalMean(nn.Module):
    """Mean over freq and time: (batch, channel, freq, time) to (batch, channel)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))

    def for_xnnpack(self, _x: Tensor) -> "XnnGlobalMean":
        return XnnGlobalMean()


class FakeGlobalMean(FakeLayer):
    """`GlobalMean`, and `nn.AdaptiveAvgPool2d(1)`, which keeps the axes.

    Raises:
        ValueError: for an adaptive pool to more than one position.
    """

    takes_float, gives = True, "float"

    def __init__(self, layer: GlobalMean | nn.AdaptiveAvgPool2d, _config: QuantConfig, _place: Place):
        super().__init__()
        self.keepdim = isinstance(layer, nn.AdaptiveAvgPool2d)
        if self.keepdim and tuple(_pair(layer.output_size)) != (1, 1):
            raise ValueError(f"its output_size must be 1, got {layer.output_size}")

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=self.keepdim)

    def convert(self) -> "IntGlobalMean":
        return IntGlobalMean(self.keepdim)


class IntGlobalMean(nn.Module):
    float_part = "mean of the logits over freq and time"

    def __init__(self, keepdim: bool = False):
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: QTensor) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=self.keepdim)

    def for_xnnpack(self, _x: QTensor) -> "XnnGlobalMean":
        return XnnGlobalMean(self.keepdim)


class XnnGlobalMean(nn.Module):
    """XNNPACK has no mean that drops axes."""

    def __init__(self, keepdim: bool = False):
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor | QTensor) -> Tensor:
        x = XnnTensor(*x).dequantize() if isinstance(x, QTensor) else x
        y = x.mean(dim=(2, 3), keepdim=True)
        return y if self.keepdim else y.flatten(1)
