"""Layers that several networks are built from, and that `quantized.py` knows how to run in integers.

A network that is to run in 8 bits consists of these (and of layers with an entry in `quantized.QUANTIZED`): each place
where its forward pass computes has a module, so that the module can be exchanged. They add nothing to the state dict.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class Float32Constants(nn.Module):
    """A part that always computes in float32: `.double()` and `.half()` leave its constants as they are."""

    def _apply(self, fn, recurse: bool = True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now is not None and now.dtype != value.dtype:
                setattr(self, name, value.to(now.device))
        return self


class HalfPrecision(nn.Module):
    """Runs a network in 16-bit floats behind float32 inputs and logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.half()

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.model(log_mel.half()).float()


def fold(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy in which every `ConvUnit` is a convolution with bias; the same function in eval mode, to rounding.

    State-dict names are those of the published fused networks: `<unit>.0.0.*` before a ReLU, else `<unit>.0.*`.

    Args:
        example: an input of the network, float32, on which a copy is run once to find every other convolution whose
            result goes into a batch norm and nowhere else; those are folded too, under their own names. None folds
            units alone.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ConvUnit):
                conv, relu = torch.nn.utils.fuse_conv_bn_eval(child[0], child[1]), list(child)[2:]
                setattr(module, name, nn.Sequential(nn.Sequential(conv, *relu) if relu else conv))
    for conv, norm in [] if example is None else _convolutions_with_norm(model, example):
        model.set_submodule(conv, torch.nn.utils.fuse_conv_bn_eval(*map(model.get_submodule, (conv, norm))))
        model.set_submodule(norm, nn.Identity())
    return model


@torch.no_grad()
def _convolutions_with_norm(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of the convolutions, and of the norms that alone read their results; both called once."""
    model = copy.deepcopy(model).float()
    made_by: dict[int, str] = {}  # address of a result -> its convolution
    pairs, calls, names = [], Counter(), {module: name for name, module in model.named_modules()}
    reads = _Reads()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        name = names[module]
        calls[name] += 1
        if isinstance(module, nn.BatchNorm2d):
            if module.track_running_stats and (conv := made_by.get(_address(args[0]))) is not None:
                pairs.append((conv, name, _address(args[0])))
        else:
            made_by[_address(output)] = name

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [module.register_forward_hook(leave) for module in names if isinstance(module, kinds)]
    try:
        with reads:
            result = model(example)
    finally:
        for handle in handles:
            handle.remove()
    answers = {_address(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
    return [
        (conv, norm)
        for conv, norm, address in pairs
        if calls[conv] == calls[norm] == reads.count[address] == 1 and address not in answers
    ]


class _Reads(TorchDispatchMode):
    """Counts how many operations take each piece of memory, views included."""

    def __init__(self):
        super().__init__()
        self.count: Counter[int] = Counter()
        self._kept: list[Any] = []  # an address stands for one tensor only as long as none is freed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count.update({_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)})
        self._kept += [value.untyped_storage() for value in tree_leaves(result) if isinstance(value, Tensor)]
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
