"""Layers trained with fake quantization: what rounds where, in training as on the target.

Each layer of `QUANTIZED` has a counterpart here that rounds weights and activations as the target will, and whose
`convert()` gives the target's own layer (`integer.py`). Activations are int8 per tensor, affine; weights int8 per
output channel, symmetric; sums of products 32-bit integers:

- convolution + batch norm (+ ReLU): products, sum and bias are integers, the ReLU is the lower end of the output's
  range; one float factor per channel takes the sum to the output's scale.
- the first convolution: int8 weights, but float input and arithmetic (1 % of the network's). A rounded one-channel
  input costs accuracy, and runtimes have no fast int8 kernel for it. With `quantize_input` it is as the others.
- residual add: integers in and out, a float factor for each input.
- average pool: a depthwise convolution with weights 1.
- response norm: squares, their means, the product with the response, bias and ReLU are integers; the square root and
  the division, once per channel and clip, are float.
- mean over the classifier's positions: float, so that logits are not multiples of a step.

Sources: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018 (affine int8, folding in training); R. Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference", arXiv 1806.08342 (batch norm frozen at the end).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import Add, AvgPool, ConvUnit, GlobalMean
from models.cp_mobile import RESPONSE_EPS, ResponseNorm
from models.integer import LEVELS, Q_MAX, Q_MIN, IntAdd, IntAvgPool, IntConv, IntGlobalMean, IntResponseNorm

# Scales are kept representable in 16-bit floats, so that files can store them so.
MIN_WEIGHT_SCALE = 2.0**-14
MAX_PAIR = 32767 // 255  # largest sum of two int8 weights whose products with uint8 activations add up in 16 bits


@dataclass(frozen=True)
class QuantConfig:
    reduced_range: Annotated[
        bool,
        "weights in -63 .. 63: no overflow on CPUs that add pairs of 8-bit products in 16 bits (x86 without VNNI)",
    ] = False
    quantize_input: Annotated[bool, "round the spectrogram too: the first convolution then runs in integers"] = False
    limit_pairs: Annotated[
        bool,
        "weaken pairs of weights whose products could overflow the 16-bit sums of x86 CPUs without VNNI, a few percent "
        "of all; --no-limit_pairs for targets that add in 32 bits",
    ] = True

    @property
    def weight_max(self) -> int:
        return 63 if self.reduced_range else 127


class Switches(nn.Module):
    """What `helpers/quantization.py` turns on and off, module by module; not part of the state dict."""

    rounding = True  # False: the layer computes in float
    norm_frozen = False  # batch norm uses its running statistics in training mode too


class ActivationQuantizer(Switches):
    """Rounds activations to 8 bits within a range that includes 0; `helpers/quantization.py` sets it from clips.

    Nothing is learned in a forward pass. Ranges that follow the extremes of training batches, the usual way, were wider
    than those of least squared error and cost accuracy.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.round(x, *self.params()) if self.rounding else x

    def set_range(self, low: float, high: float) -> None:
        self.low.fill_(min(low, 0))
        self.high.fill_(max(high, 1e-8))  # activations that are all 0 have a range too

    @property
    def has_range(self) -> bool:
        return bool(self.high > 0)

    def params(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32)."""
        scale = ((self.high - self.low) / LEVELS).clamp_min(1e-8)
        zero_point = (Q_MIN - torch.round(self.low / scale)).clamp(Q_MIN, Q_MAX)
        return scale, zero_point.to(torch.int32)

    @staticmethod
    def round(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Nearest level; the gradient passes inside the range and is 0 outside."""
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, Q_MIN, Q_MAX)

    def constants(self) -> tuple[float, int]:
        scale, zero_point = self.params()
        return scale.item(), int(zero_point)


class ResponseQuantizer(ActivationQuantizer):
    """For 1 + x: one over its scale is a whole number, so 1 is a level, and adding it is a shift of the integers."""

    def params(self) -> tuple[Tensor, Tensor]:
        low = self.low.clamp_min(1 - LEVELS)  # beyond, 1 would not be a level any more
        per_one = torch.floor(LEVELS / (self.high.clamp_min(1) - low)).clamp_min(1)
        return 1 / per_one, (Q_MIN - torch.round(low * per_one)).to(torch.int32)


def weight_scale(weight: Tensor, q_max: int) -> Tensor:
    """Symmetric scale of each output channel (channel,), a 16-bit float's value."""
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.dim())))
    return (largest / q_max).clamp_min(MIN_WEIGHT_SCALE).half().float()


def limit_pairs(weight: Tensor) -> Tensor:
    """Integer weights without pairs whose products with 8-bit activations leave 16 bits; the others stay as they are.

    ONNX Runtime's kernels for x86 CPUs without VNNI add the products of two neighbouring weights with unsigned
    activations in saturating 16 bits (the instruction vpmaddubsw). Neighbours are weights (0, 1), (2, 3), ... of an
    output channel, counted along input channels first, then time, then freq. Two of one sign whose magnitudes add up to
    more than 32,767 / 255 both lose half of the excess. Depthwise kernels add in 32 bits.

    Args:
        weight: whole numbers in -127 .. 127 (channel, input channel, freq, time), of any type.
    """
    ordered = weight.permute(0, 2, 3, 1)  # (channel, freq, time, input channel)
    flat = ordered.flatten(1)
    n_weights = flat.shape[1]
    pairs = F.pad(flat, (0, n_weights % 2)).unflatten(1, (-1, 2))  # (channel, pair, 2)
    excess = (pairs.sum(dim=2).abs() - MAX_PAIR).clamp_min(0)  # of opposite signs the sum is small
    half = torch.div(excess, 2, rounding_mode="floor")
    limited = pairs - pairs.sign() * torch.stack([excess - half, half], dim=2)
    return limited.flatten(1)[:, :n_weights].view_as(ordered).permute(0, 3, 1, 2).contiguous()


def count_overflows(weight: Tensor) -> int:
    """How many pairs of weights can overflow, in the sense of `limit_pairs`; arguments as there."""
    flat = weight.int().permute(0, 2, 3, 1).flatten(1)
    pairs = F.pad(flat, (0, flat.shape[1] % 2)).unflatten(1, (-1, 2))
    return int((pairs.sum(dim=2).abs() > MAX_PAIR).sum())


def paired_scale(weight: Tensor, q_max: int) -> Tensor:
    """As `weight_scale`, where `limit_pairs` follows: of 17 scales up to twice as wide that of least squared error.

    Weakening its largest pairs may cost a channel more than coarser steps do.
    """
    plain, weight = weight_scale(weight, q_max), weight.detach()
    scales = (plain * torch.linspace(1, 2, 17, device=plain.device)[:, None]).half().float()  # (candidate, channel)
    n_scales = len(scales)
    scale = scales.flatten()[:, None, None, None]
    wanted = weight.repeat(n_scales, 1, 1, 1)  # (candidate x channel, input channel, freq, time)
    values = limit_pairs(torch.round(wanted / scale).clamp(-q_max, q_max))
    error = (values * scale - wanted).square().sum(dim=(1, 2, 3)).view(n_scales, -1)
    return scales.gather(0, error.argmin(dim=0, keepdim=True))[0]


class FakeConvUnit(Switches):
    """`ConvUnit` as on the target: batch norm is folded into the weights before they are rounded.

    While the norm learns, the convolution runs with the rounded folded weights divided by the folding factor of the
    running statistics, and the norm follows with the statistics of the batch; once frozen, and in eval mode, the folded
    convolution is all there is. Children have the unit's names, so the state dict only gains the quantizers' entries.
    """

    def __init__(self, unit: ConvUnit, config: QuantConfig, is_first: bool):
        super().__init__()
        self.add_module("0", unit[0])
        self.add_module("1", unit[1])
        self.has_relu = len(unit) == 3
        self.config, self.is_first = config, is_first
        self.input = ActivationQuantizer() if is_first and config.quantize_input else None
        self.output = ActivationQuantizer()

    @property
    def conv(self) -> nn.Conv2d:
        return self.get_submodule("0")

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.get_submodule("1")

    @property
    def adds_pairs(self) -> bool:
        """Whether the target may add products in pairs: in integers, and not channel by channel."""
        is_depthwise = self.conv.groups == self.conv.in_channels == self.conv.out_channels
        is_float = self.is_first and self.input is None
        may_overflow = self.config.limit_pairs and not self.config.reduced_range
        return may_overflow and not is_float and not is_depthwise

    def forward(self, x: Tensor) -> Tensor:
        if self.input is not None:
            x = self.input(x)
        learns = self.training and not self.norm_frozen
        factor = self._factor().detach() if learns else self._factor()  # the norm below has its own gradient
        weight = self._round(self.conv.weight * factor[:, None, None, None])
        if learns:
            y = self.norm(self._convolve(x, weight / factor[:, None, None, None]))
        else:
            y = self._convolve(x, weight, self._bias(factor))
        return self.output(F.relu(y) if self.has_relu else y)

    def _factor(self) -> Tensor:
        factor = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        return torch.where(factor.abs() < 1e-8, 1e-8, factor)  # a channel that its norm switched off

    def _round(self, weight: Tensor) -> Tensor:
        if not self.rounding:
            return weight
        q_max = self.config.weight_max
        scale = self._scale(weight)
        zero_points = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, -q_max, q_max)
        if not self.adds_pairs:
            return rounded
        scale = scale[:, None, None, None]
        limited = limit_pairs(torch.round(rounded.detach() / scale)) * scale
        return rounded + (limited - rounded).detach()  # the gradient passes, as it does through rounding

    def _scale(self, weight: Tensor) -> Tensor:
        return (paired_scale if self.adds_pairs else weight_scale)(weight, self.config.weight_max)

    def _bias(self, factor: Tensor) -> Tensor:
        bias = self.norm.bias - self.norm.running_mean * factor
        return bias + (bias.half().float() - bias).detach() if self.rounding else bias

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        conv = self.conv
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @torch.no_grad()
    def convert(self) -> "IntConv":
        factor = self._factor()
        weight = self.conv.weight * factor[:, None, None, None]
        scale, q_max = self._scale(weight), self.config.weight_max
        values = torch.clamp(torch.round(weight / scale[:, None, None, None]), -q_max, q_max)
        values = limit_pairs(values) if self.adds_pairs else values
        conv = self.conv
        return IntConv(
            values.to(torch.int8), scale, self._bias(factor).half(), conv.stride, conv.padding, conv.groups,
            self.output.constants(), None if self.input is None else self.input.constants(),
            reads_float=self.is_first and self.input is None,
        )  # fmt: skip


class FakeAdd(Switches):
    def __init__(self, _layer: Add, _config: QuantConfig, _is_first: bool):
        super().__init__()
        self.output = ActivationQuantizer()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.output(x + y)

    def convert(self) -> "IntAdd":
        return IntAdd(self.output.constants())


class FakeAvgPool(Switches):
    def __init__(self, layer: AvgPool, _config: QuantConfig, _is_first: bool):
        super().__init__()
        self.layer = layer
        self.output = ActivationQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layer(x))

    def convert(self) -> "IntAvgPool":
        return IntAvgPool(self.layer, self.output.constants())


class FakeResponseNorm(Switches):
    """`ResponseNorm` with rounded squares, mean squares, responses 1 + gamma * n, and output.

    The bias is rounded to a multiple of the output's scale: on the target it shifts the integers.
    """

    def __init__(self, layer: ResponseNorm, _config: QuantConfig, _is_first: bool):
        super().__init__()
        self.gamma, self.beta = layer.gamma, layer.beta
        self.square, self.power = ActivationQuantizer(), ActivationQuantizer()
        self.response, self.output = ResponseQuantizer(), ActivationQuantizer()

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        power = self.power(self.square(x * x).mean(dim=(2, 3), keepdim=True))  # (batch, channel, 1, 1)
        norm = power.clamp_min(1e-12).sqrt()  # the slope of the root at 0 is infinite
        response = self.response(1 + self.gamma * norm / (norm.mean(dim=1, keepdim=True) + RESPONSE_EPS))
        if not self.output.rounding:
            return self.output(F.relu(x * response + self.beta))
        y = x * response
        scale, shift = self._output()
        beta = self.beta + (scale * shift - self.beta).detach()
        y = torch.minimum(F.relu(y + beta), scale * (LEVELS + shift.clamp_max(0)))
        return self.output.round(y, scale, torch.full_like(shift, Q_MIN, dtype=torch.int32))

    def _output(self) -> tuple[Tensor, Tensor]:
        """Scale of the output, and the bias in steps of it.

        A negative bias is taken off after rounding, and the range has room for it.
        """
        beta = self.beta.detach().squeeze()
        scale = ((self.output.high + F.relu(-beta)) / LEVELS).clamp_min(1e-8)
        return scale, torch.round(beta / scale).clamp(-LEVELS, LEVELS)

    def convert(self) -> "IntResponseNorm":
        scale, shift = self._output()
        return IntResponseNorm(
            self.gamma.item(), self.square.constants(), self.power.constants(), self.response.constants(),
            (scale.item(), int(shift)),
        )  # fmt: skip


class FakeGlobalMean(Switches):
    def __init__(self, layer: GlobalMean, _config: QuantConfig, _is_first: bool):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def convert(self) -> "IntGlobalMean":
        return IntGlobalMean()


QUANTIZED: dict[type[nn.Module], type[Switches]] = {
    ConvUnit: FakeConvUnit,
    Add: FakeAdd,
    AvgPool: FakeAvgPool,
    ResponseNorm: FakeResponseNorm,
    GlobalMean: FakeGlobalMean,
}
