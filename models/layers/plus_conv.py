"""Separable convolution in the form of a plus: 1x1 convolution, then one depthwise line along each axis, summed.

On the target the two lines are one depthwise 3x3 kernel, whose corners are 0, with the norm folded in and the ReLU as
the lower end of the output's range: integers, and a kernel that runtimes have. The corners cost three weights per
channel, and multiplications by 0. Float files keep the lines, with the norm folded into both and one bias.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv_unit import FakeConv, FakeConvolution
from models.layers.core import Place, QuantConfig


class PlusConv(nn.Module):
    """1x1 convolution, the sum of two dilated depthwise lines of three taps, batch norm, ReLU.

    Args:
        c_in, c_out: channels.
        dilation: of both lines.
    """

    def __init__(self, c_in: int, c_out: int, dilation: int = 2):
        super().__init__()
        d = dilation
        self.bn = nn.BatchNorm2d(c_out)
        self.ch_conv1 = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.sp_conv1 = nn.Conv2d(
            c_out, c_out, (3, 1), dilation=(d, 1), padding=(d, 0), groups=c_out, bias=False
        )  # fmt: skip
        self.sp_conv2 = nn.Conv2d(
            c_out, c_out, (1, 3), dilation=(1, d), padding=(0, d), groups=c_out, bias=False
        )  # fmt: skip
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, first axis, second axis)
        if self.training and x.shape[1] == 1:
            # A single channel does not tell its memory layout; as a matrix product the result has channels last.
            x = F.linear(x.permute(0, 2, 3, 1), self.ch_conv1.weight.flatten(1)).permute(0, 3, 1, 2)
        else:
            x = self.ch_conv1(x)
        return self.relu(self.bn(self.sp_conv1(x) + self.sp_conv2(x)))

    def folded(self) -> "PlusConv":
        """A copy without norm: both lines scaled, what it adds as a bias of the second."""
        folded = copy.deepcopy(self).eval()
        no_shift = copy.deepcopy(self.bn)
        nn.init.zeros_(no_shift.running_mean), nn.init.zeros_(no_shift.bias)
        folded.sp_conv1 = nn.utils.fuse_conv_bn_eval(self.sp_conv1.eval(), no_shift.eval())
        folded.sp_conv1.bias = None
        folded.sp_conv2 = nn.utils.fuse_conv_bn_eval(self.sp_conv2.eval(), self.bn.eval())
        folded.bn = nn.Identity()
        return folded


def plus_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Lines (channel, 1, 3, 1) and (channel, 1, 1, 3) as one kernel (channel, 1, 3, 3)."""
    return F.pad(first, (1, 1)) + F.pad(second, (0, 0, 1, 1))


class FakePlusConv(FakeConvolution):
    """`PlusConv` as on the target, two integer convolutions; children have the names of its own."""

    absorbs_relu = False  # it has one

    def __init__(self, layer: PlusConv, config: QuantConfig, place: Place):
        line = layer.sp_conv1
        n, dilation = line.out_channels, line.dilation[0]
        square = nn.Conv2d(n, n, 3, padding=dilation, dilation=dilation, groups=n, bias=False, device="meta")
        super().__init__(square, layer.bn, config, Place(), relu=True)
        self.ch_conv1 = FakeConv(layer.ch_conv1, config, place)
        self.sp_conv1, self.sp_conv2 = layer.sp_conv1, layer.sp_conv2

    def keep(self, _square: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        self.bn = norm

    @property
    def weight(self) -> Tensor:
        return plus_kernel(self.sp_conv1.weight, self.sp_conv2.weight)

    @property
    def conv_bias(self) -> None:
        return None

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.bn

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, first axis, second axis)
        return super().forward(self.ch_conv1(x))

    @torch.no_grad()
    def convert(self) -> nn.Sequential:
        return nn.Sequential(self.ch_conv1.convert(), super().convert())
