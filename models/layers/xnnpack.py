"""What the XNNPACK forms of layers share, for ExecuTorch programs: the same numbers from other operators.

XNNPACK is to get a whole network as one graph: each gap costs copies and changes of layout, and runs in slow kernels.
It lacks means over channels, average pools that count their padding, and products with a constant on the left. It reads
an int8 value with the scale and zero point that it was written with, so where an integer layer shifts a zero point, a
constant is added here. And it keeps activations with the channels last: a constant that stands alone would take what it
is added to out of this layout and back.

What it rounds differently: sums of two int8 (halves go up, and quotients of scales have 21 bits), and the last bit of
the response norm's float32 arithmetic. Either shows where a value lies within about 1e-4 steps of the middle of two
levels.
"""

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from models.layers.core import Q_MAX, Q_MIN, Constants, QTensor


def for_xnnpack(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a model, in eval mode, in which layers are exchanged for what their `for_xnnpack(x)` gives, x an input.

    Front ends take one clip then.

    Args:
        model: on the CPU.
        example: an input of the final shape; a run with it shows what each layer reads.
    """
    model = nn.Sequential(copy.deepcopy(model)).eval()
    inputs: dict[nn.Module, Tensor | QTensor] = {}

    def note_input(layer: nn.Module, arguments: tuple) -> None:
        inputs[layer] = arguments[0]

    hooks = [layer.register_forward_pre_hook(note_input) for layer in model.modules() if hasattr(layer, "for_xnnpack")]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child in inputs:
                setattr(module, name, child.for_xnnpack(inputs[child]))
    return model


@cache
def operators():
    """ExecuTorch's operators for 8-bit values; the import registers them."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


class XnnTensor(QTensor):
    """A `QTensor` that computes with ExecuTorch's operators."""

    def dequantize(self) -> Tensor:
        return operators().dequantize_per_tensor(self.values, self.scale, self.zero_point, Q_MIN, Q_MAX, torch.int8)

    def mean(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
        x = self.dequantize()
        if keepdim or dim is None or x.dim() != 4 or set(dim if isinstance(dim, tuple | list) else (dim,)) != {2, 3}:
            return x.mean(dim=dim, keepdim=keepdim)
        return x.mean(dim=(2, 3), keepdim=True).flatten(1)  # XNNPACK has no mean that drops axes


class XnnBetween(nn.Module):
    """A layer that computes in float between 8-bit values: `compute` maps its float inputs to what is rounded."""

    def __init__(self, compute: Callable[..., Tensor], output: Constants):
        super().__init__()
        self.compute, self.output = compute, output

    def forward(self, *parts: QTensor) -> XnnTensor:
        return xnn_quantize(self.compute(*map(xnn_dequantize, parts)), self.output)


def xnn_quantize(x: Tensor, constants: Constants) -> XnnTensor:
    limits = Q_MIN, Q_MAX, torch.int8
    return XnnTensor(operators().quantize_per_tensor(x, *constants, *limits), *constants)


def xnn_dequantize(x: QTensor) -> Tensor:
    return XnnTensor(*x).dequantize()
