"""Convolution + batch norm + ReLU as one layer: `ConvUnit`, and plain `nn.Conv2d` with what follows it.

On the target products, sum and bias are integers, the ReLU is the lower end of the output's range, and one float factor
per channel takes the sum to the output's scale. A convolution that reads floats, the network's first, has int8 weights
but float input and arithmetic (1 % of the network's): a rounded one-channel input costs accuracy, and runtimes have no
fast int8 kernel for it. With `quantize_input` it is as the others.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.core import (
    Q_MAX,
    ActivationQuantizer,
    Constants,
    FakeLayer,
    Place,
    QTensor,
    QuantConfig,
    dequantize_channels,
    quantize,
    relu_if,
    requantize,
)
from models.layers.integer_sums import IntegerSums
from models.layers.weights import WeightRounding, count_overflows
from models.layers.xnnpack import XnnTensor, operators, xnn_dequantize, xnn_quantize


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


# ---- fake quantization ----------------------------------------------------------------------------------------------


class FakeConvolution(FakeLayer):
    """A convolution as on the target: the batch norm behind it is folded into the weights before they are rounded.

    While the norm learns, the convolution runs with the rounded folded weights divided by the folding factor of the
    running statistics, and the norm follows with the statistics of the batch; once frozen, and in eval mode, the folded
    convolution is all there is.

    Subclasses `keep` parameters where their names in the state dict want them, and say which they are.

    Raises:
        ValueError: for padding with anything but zeros, or a norm without running statistics.
    """

    takes_float, may_be_shared, absorbs_relu = True, False, True

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, config: QuantConfig, place: Place, relu: bool):
        super().__init__()
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {conv.padding_mode!r}")
        if norm is not None and norm.running_var is None:
            raise ValueError("the norm behind it must have running statistics")
        self.keep(conv, norm)
        self.stride, self.padding, self.dilation = conv.stride, padding_of(conv), conv.dilation
        self.groups = conv.groups
        self.has_relu = relu or place.ends_in_relu
        self.reads_float = place.reads_float
        self.input = ActivationQuantizer() if place.reads_float and config.quantize_input else None
        self.output = ActivationQuantizer()
        is_depthwise = conv.groups == conv.in_channels == conv.out_channels
        is_float = place.reads_float and self.input is None
        may_overflow = config.limit_pairs and not config.reduced_range
        self.weights = WeightRounding(config.weight_max, may_overflow and not is_float and not is_depthwise)

    weight: Tensor
    conv_bias: Tensor | None
    norm: nn.BatchNorm2d | None

    def keep(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.input is not None:
            x = self.input(x)
        norm, factor = self.norm, self._factor()
        if norm is not None and self.training and not self.norm_frozen:
            factor = factor.detach()  # the norm below has its own gradient
            weight = self._round(self.weight * factor[:, None, None, None])
            y = self._normalise(self._convolve(x, weight / factor[:, None, None, None], self.conv_bias))
        else:
            weight = self.weight if factor is None else self.weight * factor[:, None, None, None]
            y = self._convolve(x, self._round(weight), self._bias(factor))
        return self.output(relu_if(y, self.has_relu))

    def _normalise(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _factor(self) -> Tensor | None:
        norm = self.norm
        if norm is None:
            return None
        factor = torch.rsqrt(norm.running_var + norm.eps)
        factor = factor if norm.weight is None else norm.weight * factor
        return torch.where(factor.abs() < 1e-8, 1e-8, factor)  # a channel that its norm switched off

    def _round(self, weight: Tensor) -> Tensor:
        return self.weights.fake(weight) if self.rounding else weight

    def _bias(self, factor: Tensor | None) -> Tensor | None:
        bias, norm = self.conv_bias, self.norm
        if norm is not None:
            shift = norm.running_mean if bias is None else norm.running_mean - bias
            bias = -shift * factor if norm.bias is None else norm.bias - shift * factor
        if bias is None or not self.rounding:
            return bias
        return bias + (bias.half().float() - bias).detach()

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    @torch.no_grad()
    def convert(self) -> "IntConv":
        factor = self._factor()
        weight = self.weight if factor is None else self.weight * factor[:, None, None, None]
        values, scale = self.weights.integers(weight)
        bias = self._bias(factor)
        return IntConv(
            values, scale, None if bias is None else bias.half(), self.stride, self.padding, self.groups,
            self.output.constants(), None if self.input is None else self.input.constants(),
            reads_float=self.reads_float and self.input is None, dilation=self.dilation,
        )  # fmt: skip


class FakeConvUnit(FakeConvolution):
    """`ConvUnit`: children have the unit's names, so the state dict only gains the quantizers' entries."""

    def __init__(self, unit: ConvUnit, config: QuantConfig, place: Place):
        super().__init__(unit[0], unit[1], config, place, relu=len(unit) == 3)

    def keep(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        self.add_module("0", conv)
        self.add_module("1", norm)

    @property
    def weight(self) -> Tensor:
        return self.get_submodule("0").weight

    @property
    def conv_bias(self) -> Tensor | None:
        return self.get_submodule("0").bias

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.get_submodule("1")


class FakeConv(FakeConvolution):
    """A plain convolution, at its place and with its names; a norm that belongs to it stays at its own place.

    Args:
        norm: what `FoldedNorm` made of the norm that alone reads this convolution, or None.
    """

    def __init__(self, conv: nn.Conv2d, config: QuantConfig, place: Place, norm: "FoldedNorm | None" = None):
        super().__init__(conv, norm, config, place, relu=False)

    def keep(self, conv: nn.Conv2d, norm: "FoldedNorm | None") -> None:
        self.weight, self.bias = conv.weight, conv.bias
        self._norm = (norm,)  # in a tuple: no child, its entries in the state dict belong to its place

    @property
    def conv_bias(self) -> Tensor | None:
        return self.bias

    @property
    def norm(self) -> "FoldedNorm | None":
        return self._norm[0]

    def _normalise(self, x: Tensor) -> Tensor:
        return self.norm.normalise(x)


class FoldedNorm(nn.BatchNorm2d):
    """A norm that the convolution before it computes: keeps its entries in the state dict, hands on what it gets."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, "meta")
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def normalise(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def convert(self) -> nn.Module:
        return nn.Identity()


def padding_of(conv: nn.Conv2d) -> tuple[int, ...]:
    """In numbers, (freq, time) at either end.

    Raises:
        ValueError: for "same" where the two ends would differ.
    """
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding != "same":
        return conv.padding
    sizes = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(size % 2 for size in sizes):
        raise ValueError(f"padding='same' must be as wide before as behind, got the kernel {conv.kernel_size}")
    return tuple(size // 2 for size in sizes)


# ---- integers -------------------------------------------------------------------------------------------------------


class IntSums(IntegerSums):
    """A convolution in 32-bit sums, of `weight`, `weight_scale` and `bias` as `IntegerSums`.

    Args:
        output: scale and zero point; a ReLU is a zero point of -128.
        input: scale and zero point of a float input that is to be rounded first.
    """

    def __init__(
        self, stride: Sequence[int], padding: Sequence[int], groups: int, output: Constants,
        input: Constants | None = None, dilation: Sequence[int] = (1, 1),
    ):  # fmt: skip
        super().__init__(input)
        self.stride, self.padding, self.groups = tuple(stride), tuple(padding), groups
        self.dilation, self.output = tuple(dilation), output

    def forward(self, x: Tensor | QTensor) -> QTensor:
        x = self._read(x)
        if not isinstance(x, QTensor) or torch.compiler.is_exporting():
            y = self._in_float(x.dequantize() if isinstance(x, QTensor) else x)
            return QTensor(quantize(y, *self.output), *self.output)
        step = self.weight_scale * x.scale
        return requantize(self._sums(x, step), (step / self.output[0])[:, None, None], *self.output)

    def sum(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.backends.nnpack.flags(enabled=False):  # its transforms round
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]

    def for_xnnpack(self, x: Tensor | QTensor) -> "XnnConv":
        return XnnConv(self, x)


class IntConv(IntSums):
    """Convolution of an int8 activation, or of a float one with int8 weights (the network's first layer).

    Args:
        weight: int8 (channel, ...).
        weight_scale: float32 (channel,).
        bias: float16 (channel,), or None; rounded to the scale of the 32-bit sums in use.
        output, input, dilation: as `IntSums`.
        reads_float: the input is float and stays so.
    """

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
        groups: int, output: Constants, input: Constants | None = None, reads_float: bool = False,
        dilation: Sequence[int] = (1, 1),
    ):  # fmt: skip
        super().__init__(stride, padding, groups, output, input, dilation)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.float_part = "reads the float spectrogram: int8 weights, float sums" if reads_float else ""

    @property
    def is_depthwise(self) -> bool:
        return self.groups == len(self.weight) and self.weight.shape[1] == 1

    def n_overflows(self) -> int:
        return 0 if self.float_part or self.is_depthwise else count_overflows(self.weight)  # depthwise: 32 bits

    def widen(self, extra: int, dim: int) -> None:
        """Adds channels of zeros, behind those of the output (`dim` 0) or of the input (1); no other output changes."""
        shape = list(self.weight.shape)
        shape[dim] = extra
        if dim == 0:
            self.groups += extra if self.is_depthwise else 0
            self.weight_scale = torch.cat([self.weight_scale, self.weight_scale.new_ones(extra)])
            self.bias = None if self.bias is None else torch.cat([self.bias, self.bias.new_zeros(extra)])
        self.weight = torch.cat([self.weight, self.weight.new_zeros(shape)], dim)


# ---- XNNPACK --------------------------------------------------------------------------------------------------------


class XnnConv(nn.Module):
    """Integer convolution, or average pool as one; with float weights where its input is float."""

    def __init__(self, layer: IntSums, x: Tensor | QTensor):
        super().__init__()
        weight, scale, bias = layer.weight, layer.weight_scale, layer.bias
        self.groups, self.input, self.dilation = layer.groups, layer.input, layer.dilation
        self.stride, self.padding, self.output = layer.stride, layer.padding, layer.output
        if self.input is not None:
            x = xnn_quantize(x, self.input)
        self.reads_float, bias = not isinstance(x, QTensor), torch.zeros_like(scale) if bias is None else bias.float()
        if self.reads_float:
            weight = dequantize_channels(weight, scale)
        else:
            # Rounded to whole steps of the sums as `IntSums` does: ExecuTorch would round others in its own way.
            step = scale * x.scale
            bias = torch.round(bias / step) * step
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int64))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor | QTensor) -> XnnTensor:
        if self.input is not None:
            x = xnn_quantize(x, self.input)
        weight = self.weight
        if not self.reads_float:
            x, limits = xnn_dequantize(x), (-Q_MAX, Q_MAX, torch.int8)
            weight = operators().dequantize_per_channel(weight, self.scale, self.zero_point, 0, *limits)
        y = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return xnn_quantize(y, self.output)
