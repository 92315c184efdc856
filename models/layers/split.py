"""Split of channels into equal parts, in integers as in float."""

from torch import Tensor, nn

from models.layers.core import FakeLayer, Place, QTensor, QuantConfig
from models.layers.xnnpack import XnnTensor, xnn_dequantize, xnn_quantize


class Split(nn.Module):
    """Hands on `n` neighbouring parts of the channels, as many channels in each.

    Raises:
        ValueError: from `forward`, for channels that cannot be split so.
    """

    def __init__(self, n: int = 2):
        super().__init__()
        self.n = n

    def forward(self, x: Tensor | QTensor) -> tuple[Tensor, ...] | tuple[QTensor, ...]:  # (batch, channel, freq, time)
        if x.shape[1] % self.n:
            raise ValueError(f"{x.shape[1]} channels cannot be split into {self.n} equal parts")
        if isinstance(x, QTensor):
            return tuple(x._replace(values=part) for part in x.values.chunk(self.n, dim=1))
        return x.chunk(self.n, dim=1)


class FakeSplit(FakeLayer):
    """What is rounded before stays so, and so does the layer."""

    takes_float, gives = True, "same"

    def __init__(self, layer: Split, _config: QuantConfig, _place: Place):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x)

    def convert(self) -> "IntSplit":
        return IntSplit(self.layer.n)


class IntSplit(Split):
    def for_xnnpack(self, _x: QTensor) -> "XnnSplit":
        return XnnSplit(self.n)


class XnnSplit(nn.Module):
    """As floats, see `IntChannelShuffle`."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: QTensor) -> tuple[XnnTensor, ...]:
        return tuple(xnn_quantize(part, (x.scale, x.zero_point)) for part in xnn_dequantize(x).chunk(self.n, dim=1))
