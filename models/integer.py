"""Layers of the target: int8 weights and activations, 32-bit sums, one rounding per output.

Run eagerly, a layer computes in integers (held in floating point, where they are exact), so its output has the same
bits on every run and thread count, and is what ONNX Runtime's integer kernels give (the first layer alone is float,
unless the input is quantized). Exported, the same layer shows itself as float operators between `quantize` and
`dequantize`, the form that runtimes recognise and fuse (QDQ).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import AvgPool
from models.cp_mobile import RESPONSE_EPS

Q_MIN, Q_MAX = -128, 127
LEVELS = Q_MAX - Q_MIN
EXACT_FLOAT32 = 1 << 24  # float32 sums of integers are exact below
Constants = tuple[float, int]  # scale and zero point


# Operators that an exported graph shows; a file format makes of them what it has.


@torch.library.custom_op("asc::quantize", mutates_args=())
def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """round(x / scale) + zero_point, ties to even, clamped to int8."""
    return torch.clamp(torch.round(x / scale) + zero_point, Q_MIN, Q_MAX).to(torch.int8)


@torch.library.custom_op("asc::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return (q.float() - zero_point) * scale


@torch.library.custom_op("asc::dequantize_channels", mutates_args=())
def dequantize_channels(q: Tensor, scale: Tensor) -> Tensor:
    """Weights (channel, ...) times their channel's scale (channel,)."""
    return q.float() * scale.view(-1, *[1] * (q.dim() - 1))


quantize.register_fake(lambda x, scale, zero_point: torch.empty_like(x, dtype=torch.int8))
dequantize.register_fake(lambda q, scale, zero_point: torch.empty_like(q, dtype=torch.float32))
dequantize_channels.register_fake(lambda q, scale: torch.empty_like(q, dtype=torch.float32))


class QTensor(NamedTuple):
    """An int8 activation and what it stands for: (values - zero_point) * scale."""

    values: Tensor
    scale: float
    zero_point: int

    def dequantize(self) -> Tensor:
        return dequantize(self.values, self.scale, self.zero_point)

    def integers(self) -> Tensor:
        """Values without the zero point, as float32: exact, and the only way to convolve them quickly everywhere."""
        return self.values.float() - self.zero_point


def _requantize(integers: Tensor, factor: Tensor | float, scale: float, zero_point: int) -> QTensor:
    """The output of an integer layer: one float32 product, rounded to nearest, ties to even."""
    values = torch.clamp(torch.round(integers.float() * factor) + zero_point, Q_MIN, Q_MAX)
    return QTensor(values.to(torch.int8), scale, zero_point)


def _float32(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32)


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z, rounded to float32 once, as CPUs do: the product of two float32 numbers is exact in float64."""
    return (x.double() * y.double() + z.double()).float()


class IntSums(nn.Module):
    """A convolution in 32-bit sums: `weight` int8, `weight_scale` float32 and `bias` float16, by output channel.

    Args:
        output: scale and zero point; a ReLU is a zero point of -128.
        input: scale and zero point of a float input that is to be rounded first.
    """

    def __init__(
        self, stride: Sequence[int], padding: Sequence[int], groups: int, output: Constants,
        input: Constants | None = None,
    ):  # fmt: skip
        super().__init__()
        self.stride, self.padding, self.groups = tuple(stride), tuple(padding), groups
        self.input, self.output = input, output
        self.register_buffer("whole_bias", None)  # int32, in units of the sums; set by `fix_bias`
        self.register_buffer("step", None)  # float32, what one unit stands for

    def forward(self, x: Tensor | QTensor) -> QTensor:
        if self.input is not None:
            x = QTensor(quantize(x, *self.input), *self.input)
        step = self.weight_scale * x.scale if isinstance(x, QTensor) else None  # what one unit of the sums stands for
        if step is None or torch.compiler.is_exporting():
            return self._in_float(x.dequantize() if isinstance(x, QTensor) else x)
        bias = self._bias_in(step)
        largest = LEVELS * self.weight.float().abs().sum(dim=(1, 2, 3)).max() + bias.abs().max()
        # A GPU's convolutions may round float32 products.
        exact = torch.float32 if largest < EXACT_FLOAT32 and self.weight.device.type == "cpu" else torch.float64
        sums = self._convolve(x.integers().to(exact), self.weight.to(exact), bias.to(exact))
        return _requantize(sums, (step / self.output[0])[:, None, None], *self.output)

    def fix_bias(self, x: Tensor | QTensor) -> None:
        """From here on exported as a whole number, int32 in units of the sums; `x` is an input, for its scale."""
        scale = x.scale if isinstance(x, QTensor) else self.input and self.input[0]
        if scale is not None:
            self.step = self.weight_scale * scale
            self.whole_bias = self._bias_in(self.step).to(torch.int32)

    def _bias_in(self, step: Tensor) -> Tensor:
        return torch.round(self.bias.float() / step)

    def _in_float(self, x: Tensor) -> QTensor:
        # A GPU would round the factors to TF32; on a CPU float32 sums are those of ONNX Runtime.
        wide = torch.float32 if x.device.type == "cpu" or torch.compiler.is_exporting() else torch.float64
        weight = dequantize_channels(self.weight, self.weight_scale).to(wide)
        bias = self.bias if self.whole_bias is None else dequantize_channels(self.whole_bias, self.step)
        y = self._convolve(x.to(wide), weight, bias.to(wide)).float()
        return QTensor(quantize(y, *self.output), *self.output)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.backends.nnpack.flags(enabled=False):  # its transforms round
            return F.conv2d(x, weight, bias, self.stride, self.padding, groups=self.groups)


class IntConv(IntSums):
    """Convolution of an int8 activation, or of a float one with int8 weights (the network's first layer).

    Args:
        weight: int8 (channel, ...).
        weight_scale: float32 (channel,).
        bias: float16 (channel,); rounded to the scale of the 32-bit sums in use.
        output, input: as `IntSums`.
        reads_float: the input is float and stays so.
    """

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int],
        groups: int, output: Constants, input: Constants | None = None, reads_float: bool = False,
    ):  # fmt: skip
        super().__init__(stride, padding, groups, output, input)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.float_part = "reads the float spectrogram: int8 weights, float sums" if reads_float else ""


class IntAvgPool(IntSums):
    """Average pool as a depthwise convolution with weights 1: that is exact, and faster than the runtimes' own."""

    def __init__(self, layer: AvgPool, output: Constants):
        n, kernel = layer.n_channels, layer.kernel_size
        super().__init__(layer.stride, (layer.padding, layer.padding), n, output)
        # Nothing that was learned: these names do not count as parameters.
        self.register_buffer("ones", torch.ones(n, 1, kernel, kernel, dtype=torch.int8))
        self.register_buffer("share", torch.full((n,), 1 / kernel**2))
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


class IntAdd(nn.Module):
    def __init__(self, output: Constants):
        super().__init__()
        self.output = output

    def forward(self, x: QTensor, y: QTensor) -> QTensor:
        if torch.compiler.is_exporting():
            return QTensor(quantize(x.dequantize() + y.dequantize(), *self.output), *self.output)
        scale, zero_point = self.output
        # In the order of ONNX Runtime's kernel, on unsigned values: sums that lie between two levels round alike.
        a, b = _float32(x.scale) / scale, _float32(y.scale) / scale
        x_zero, y_zero = _float32(x.zero_point + 128), _float32(y.zero_point + 128)
        offset = (zero_point + 128) - _fma(a, x_zero, b * y_zero)
        total = _fma(x.values.float() + 128, a, _fma(y.values.float() + 128, b, offset))
        return _requantize(total, 1.0, scale, Q_MIN)._replace(zero_point=zero_point)


class IntResponseNorm(nn.Module):
    """Response norm and ReLU; integers but for a square root and a division per channel and clip.

    relu(x * (1 + gamma * n) + beta): 1 + gamma * n is rounded with a scale of one over a whole number and beta to steps
    of the output's scale, so adding either is a shift of the integers and the ReLU is the end of their range.

    Args:
        square, power, response: scale and zero point of the squares, of their means, and of 1 + gamma * n.
        output: scale, and beta in steps of it.
    """

    float_part = "square root and division, once per channel and clip"

    def __init__(
        self, gamma: float, square: Constants, power: Constants, response: Constants, output: tuple[float, int]
    ):
        super().__init__()
        self.gamma, self.square, self.power, self.response, self.output = gamma, square, power, response, output

    def forward(self, x: QTensor) -> QTensor:  # (batch, channel, freq, time)
        scale, shift = self.output
        # A positive bias moves the zero point of the product, a negative one is taken off the rounded product.
        product = (scale, Q_MIN + max(shift, 0))
        if torch.compiler.is_exporting():
            value = x.dequantize()
            square = QTensor(quantize(value * value, *self.square), *self.square).dequantize()
            value = x.dequantize()  # anew: partitions of a graph that share a node cannot be lowered one by one
            power = QTensor(quantize(square.mean(dim=(2, 3), keepdim=True), *self.power), *self.power).dequantize()
            # As wide as x, which spares runtimes a broadcast along the innermost axis of the large product.
            response = self._response(power.sqrt(), x.values.shape[3]).dequantize()
            y = quantize(value * response, *product)
            if shift < 0:
                beta = QTensor(
                    quantize(value.new_full((1, 1, 1, 1), shift * scale), scale, Q_MIN - shift), scale, Q_MIN - shift
                )
                y = quantize(dequantize(y, scale, Q_MIN) + beta.dequantize(), scale, Q_MIN)
            return QTensor(y, scale, Q_MIN)
        integers, n_positions = x.integers(), x.values.shape[2] * x.values.shape[3]
        step = _float32(x.scale)
        square = _requantize(integers * integers, step * step / self.square[0], *self.square)
        total = square.integers().double().sum(dim=(2, 3), keepdim=True)
        power = _requantize(total, self.square[0] / _float32(self.power[0] * n_positions), *self.power)
        response = self._response((power.integers() * self.power[0]).sqrt(), 1)
        factor = step * self.response[0] / scale
        y = _requantize(integers * response.integers(), factor, *product)
        if shift < 0:
            y = y._replace(values=(y.values.int() + shift).clamp_min(Q_MIN).to(torch.int8))
        return QTensor(y.values, scale, Q_MIN)

    def _response(self, norm: Tensor, width: int) -> QTensor:
        """1 + gamma * n as int8 (batch, channel, 1, width); gamma is the quotient of two scales, 1 a shift."""
        scale, zero_point = self.response
        eps = torch.full((1, 1, 1, width), RESPONSE_EPS, device=norm.device)
        mean = norm.mean(dim=1, keepdim=True)
        relative = norm / (eps + mean if self.gamma >= 0 else -eps - mean)
        values = quantize(relative, scale / max(abs(self.gamma), 1e-12), zero_point + round(1 / scale))
        return QTensor(values, scale, zero_point)


class IntGlobalMean(nn.Module):
    """Mean over freq and time, in float: (batch, channel, freq, time) to (batch, channel)."""

    float_part = "mean of the logits over freq and time"

    def forward(self, x: QTensor) -> Tensor:
        if torch.compiler.is_exporting():
            return x.dequantize().mean(dim=(2, 3))
        return (x.integers().double().mean(dim=(2, 3)) * x.scale).float()
