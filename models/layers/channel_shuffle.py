"""Channel shuffle (X. Zhang et al., "ShuffleNet", CVPR 2018): another order of channels, the same in integers."""

from torch import Tensor, nn

from models.layers.core import FakeLayer, Place, QTensor, QuantConfig
from models.layers.xnnpack import XnnBetween


class ChannelShuffle(nn.Module):
    """Channels as a table (group, member of group), read column by column.

    Raises:
        ValueError: from `forward`, for channels that the groups do not divide.
    """

    def __init__(self, n_groups: int):
        super().__init__()
        self.n_groups = n_groups

    def forward(self, x: Tensor | QTensor) -> Tensor | QTensor:  # (batch, channel, freq, time)
        n_batch, n_channels, n_freqs, n_frames = x.shape
        if n_channels % self.n_groups:
            raise ValueError(f"{self.n_groups} groups do not divide {n_channels} channels")
        x = x.view(n_batch, self.n_groups, n_channels // self.n_groups, n_freqs, n_frames)
        return x.transpose(1, 2).reshape(n_batch, n_channels, n_freqs, n_frames)


class FakeChannelShuffle(FakeLayer):
    """What is rounded before stays so, and so does the layer."""

    takes_float, gives = True, "same"

    def __init__(self, layer: ChannelShuffle, _config: QuantConfig, _place: Place):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def convert(self) -> "IntChannelShuffle":
        return IntChannelShuffle(self.layer.n_groups)


class IntChannelShuffle(ChannelShuffle):
    def for_xnnpack(self, x: QTensor) -> XnnBetween:
        """As floats: their memory is laid out as XNNPACK has it, int8 values outside its operators are not."""
        return XnnBetween(ChannelShuffle(self.n_groups), (x.scale, x.zero_point))
