"""Convolution, batch norm and ReLU under the names that easy_dcase_task1's checkpoints have.

In 8 bits it is what its parts are, which `nn.Conv2d` finds behind itself (`conv_unit.py`).
"""

from torch import nn


class ConvBnRelu(nn.Sequential):
    """Convolution (`_conv`), batch norm (`_bn`) and, where asked for, ReLU (`_relu`).

    Args:
        c_in, c_out: channels.
        kernel: odd sizes, (freq, time); zeros around the input keep its size where the stride is 1.
        stride: in both directions.
        groups: `c_in` makes it depthwise.
        bias: whether the convolution has one, which the norm makes superfluous; parity with published checkpoints.
        relu: whether it ends in a ReLU.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, groups: int = 1,
        bias: bool = False, relu: bool = True,
    ):  # fmt: skip
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.add_module("_conv", nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias))
        self.add_module("_bn", nn.BatchNorm2d(c_out))
        if relu:
            # In place: the norm does not need its output for the backward pass.
            self.add_module("_relu", nn.ReLU(inplace=True))
