"""Layers that several networks are built from, and that `quantized.py` knows how to run in integers.

A network that is to run in 8 bits consists of these (and of layers with an entry in `quantized.QUANTIZED`): each place
where its forward pass computes has a module, so that the module can be exchanged. They add nothing to the state dict.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ConvUnit(nn.Sequential):
    """Convolution without bias (.0), batch norm (.1) and ReLU (.2) where asked for; one layer once they are folded.

    Args:
        c_in, c_out: channels.
        kernel: size in both directions; the padding is (kernel - 1) // 2.
        stride: one number, or (freq, time).
        groups: `c_in` makes it depthwise.
        relu: whether the unit ends in a ReLU.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int | Sequence[int] = 1, groups: int = 1, relu: bool = True
    ):
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False)
        # In place: the norm does not need its output for the backward pass.
        super().__init__(conv, nn.BatchNorm2d(c_out), *([nn.ReLU(inplace=True)] if relu else []))


class Add(nn.Module):
    """Sum of two tensors of one shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class AvgPool(nn.AvgPool2d):
    """Average pool whose padding counts as zeros; knows its channels, as the target runs it as a convolution."""

    def __init__(self, n_channels: int, kernel: int, stride: Sequence[int], padding: int):
        super().__init__(kernel, tuple(stride), padding)
        self.n_channels = n_channels


class GlobalMean(nn.Module):
    """Mean over freq and time: (batch, channel, freq, time) to (batch, channel)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class HalfPrecision(nn.Module):
    """Runs a network in 16-bit floats behind float32 inputs and logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.half()

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.model(log_mel.half()).float()


def fold(model: nn.Module) -> nn.Module:
    """A copy in which every `ConvUnit` is a convolution with bias; the same function in eval mode, to rounding.

    State-dict names are those of the published fused networks: `<unit>.0.0.*` before a ReLU, else `<unit>.0.*`.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ConvUnit):
                conv, relu = torch.nn.utils.fuse_conv_bn_eval(child[0], child[1]), list(child)[2:]
                setattr(module, name, nn.Sequential(nn.Sequential(conv, *relu) if relu else conv))
    return model
