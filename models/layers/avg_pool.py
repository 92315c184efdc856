"""Average pools: a depthwise convolution with weights 1 on the target, exact, and faster than the runtimes' own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from models.layers.conv_unit import IntSums
from models.layers.core import ActivationQuantizer, Constants, FakeLayer, Place, QuantConfig


class AvgPool(nn.AvgPool2d):
    """Average pool whose padding counts as zeros; knows its channels, as the target runs it as a convolution."""

    def __init__(self, n_channels: int, kernel: int, stride: Sequence[int], padding: int):
        super().__init__(kernel, tuple(stride), padding)
        self.n_channels = n_channels

    def for_xnnpack(self, _x: Tensor) -> "XnnAvgPool":
        return XnnAvgPool(self)


class FakeAvgPool(FakeLayer):
    """`AvgPool`, and `nn.AvgPool2d`, whose channels its input tells.

    Raises:
        ValueError: for what is no plain mean over the kernel.
    """

    may_be_shared = False

    def __init__(self, layer: nn.AvgPool2d, _config: QuantConfig, place: Place):
        super().__init__()
        if layer.ceil_mode or layer.divisor_override or (any(_pair(layer.padding)) and not layer.count_include_pad):
            raise ValueError("it must have no ceil_mode, no divisor_override, and count its padding")
        self.layer, self.n_channels = layer, getattr(layer, "n_channels", None) or place.input_shape[1]
        self.output = ActivationQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layer(x))

    def convert(self) -> "IntAvgPool":
        return IntAvgPool(self.layer, self.output.constants(), self.n_channels)


class IntAvgPool(IntSums):
    def __init__(self, layer: nn.AvgPool2d, output: Constants, n_channels: int | None = None):
        n, kernel = n_channels or layer.n_channels, _pair(layer.kernel_size)
        super().__init__(_pair(layer.stride), _pair(layer.padding), n, output)
        # Nothing that was learned: these names do not count as parameters.
        self.register_buffer("ones", torch.ones(n, 1, *kernel, dtype=torch.int8))
        self.register_buffer("share", torch.full((n,), 1 / (kernel[0] * kernel[1])))
        self.register_buffer("zeros", torch.zeros(n, dtype=torch.float16))

    @property
    def weight(self) -> Tensor:
        return self.ones

    @property
    def weight_scale(self) -> Tensor:
        return self.share

    @property
    def bias(self) -> Tensor:
        return self.zeros


class XnnAvgPool(nn.Module):
    """The padding, which XNNPACK's pool would leave out of the mean, is an operator of its own."""

    def __init__(self, layer: AvgPool):
        super().__init__()
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, [self.padding] * 4), self.kernel_size, self.stride)
