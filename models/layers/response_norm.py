"""Global response normalisation with ReLU, of CP-Mobile.

On the target squares, their means, the product with the response, bias and ReLU are integers; the square root and the
division, once per channel and clip, are float.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.layers import chunks
from models.layers.chunks import as_maps, as_rows, chunk_length, relu_backward
from models.layers.core import (
    LEVELS,
    Q_MIN,
    ActivationQuantizer,
    Constants,
    FakeLayer,
    Place,
    QTensor,
    QuantConfig,
    dequantize,
    float32,
    quantize,
    requantize,
)
from models.layers.xnnpack import XnnTensor, xnn_dequantize, xnn_quantize

RESPONSE_EPS = 1e-6
MIN_GAMMA = 1e-12


class ResponseNorm(nn.Module):
    """Global response normalisation (Woo et al., ConvNeXt V2) with a scalar gain and bias for all channels, then ReLU.

    n = l2 norm of a channel over (freq, time), divided by the mean of these norms over the channels;
    y = relu(gamma * x * n + beta + x), computed as x * (1 + gamma * n) + beta to read and write x only once.
    """

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        if self.training and chunks.applies(x) and self.gamma.dtype == self.beta.dtype == x.dtype:
            return _ResponseNormRelu.apply(x, self.gamma, self.beta, RESPONSE_EPS)
        eps = RESPONSE_EPS
        if torch.compiler.is_exporting():  # the same ratio from means: runtimes have slow kernels for norms
            norm = (x * x).mean(dim=(2, 3), keepdim=True).sqrt()
            eps /= (x.shape[2] * x.shape[3]) ** 0.5
        else:
            norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)  # (batch, channel, 1, 1)
        response = norm / (norm.mean(dim=1, keepdim=True) + eps)
        return torch.addcmul(self.beta, x, 1 + self.gamma * response).relu_()

    def for_xnnpack(self, x: Tensor) -> "XnnResponseNorm":
        return XnnResponseNorm(self, x)


class _ResponseNormRelu(torch.autograd.Function):
    """Clip by clip, so that forward and backward each need a single pass over memory."""

    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        maps = as_rows(x).view(len(x), -1, x.shape[1])  # (batch, position, channel)
        length = chunk_length(maps[0].numel())
        out, norm = torch.empty_like(maps), maps.new_empty(len(maps), 1, maps.shape[2])
        for piece, into, norms in zip(maps.split(length), out.split(length), norm.split(length), strict=True):
            torch.sum(piece * piece, dim=1, keepdim=True, out=norms).sqrt_()
            response = norms / (norms.mean(dim=2, keepdim=True) + eps)
            torch.addcmul(beta, piece, 1 + gamma * response, out=into).relu_()
        ctx.save_for_backward(maps, out, norm, gamma)
        ctx.eps, ctx.shape = eps, x.shape
        return as_maps(out.flatten(0, 1), x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        maps, out, norm, gamma = ctx.saved_tensors
        length = chunk_length(maps[0].numel())
        grad_in = torch.empty_like(maps)
        grad_gamma, grad_beta = torch.zeros_like(gamma), torch.zeros_like(gamma)
        gradients = as_rows(grad_out).view_as(maps)
        pieces = (tensor.split(length) for tensor in (maps, out, gradients, norm, grad_in))
        for piece, output, gradient, norms, into in zip(*pieces, strict=True):
            masked = relu_backward(gradient, output)
            grad_beta += masked.sum()
            below = norms.mean(dim=2, keepdim=True) + ctx.eps
            response = norms / below
            by_response = (masked * piece).sum(dim=1, keepdim=True)  # (batch, 1, channel)
            grad_gamma += (by_response * response).sum()
            by_response = gamma * by_response
            by_norm = (by_response - (by_response * response).mean(dim=2, keepdim=True)) / below
            # The norm of a channel that is zero everywhere has no slope.
            slope = torch.where(norms > 0, by_norm / norms, 0.0)
            torch.mul(masked, 1 + gamma * response, out=into).addcmul_(piece, slope)
        return as_maps(grad_in.flatten(0, 1), ctx.shape), grad_gamma, grad_beta, None


# ---- fake quantization ----------------------------------------------------------------------------------------------


class ResponseQuantizer(ActivationQuantizer):
    """For 1 + x: one over its scale is a whole number, so 1 is a level, and adding it is a shift of the integers."""

    def params(self) -> tuple[Tensor, Tensor]:
        low = self.low.clamp_min(1 - LEVELS)  # beyond, 1 would not be a level any more
        per_one = torch.floor(LEVELS / (self.high.clamp_min(1) - low)).clamp_min(1)
        return 1 / per_one, (Q_MIN - torch.round(low * per_one)).to(torch.int32)


class FakeResponseNorm(FakeLayer):
    """`ResponseNorm` with rounded squares, mean squares, responses 1 + gamma * n, and output.

    The bias is rounded to a multiple of the output's scale: on the target it shifts the integers.
    """

    def __init__(self, layer: ResponseNorm, _config: QuantConfig, _place: Place):
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


# ---- integers -------------------------------------------------------------------------------------------------------


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
        step = float32(x.scale)
        square = requantize(integers * integers, step * step / self.square[0], *self.square)
        total = square.integers().double().sum(dim=(2, 3), keepdim=True)
        power = requantize(total, self.square[0] / float32(self.power[0] * n_positions), *self.power)
        response = self._response((power.integers() * self.power[0]).sqrt(), 1)
        factor = step * self.response[0] / scale
        y = requantize(integers * response.integers(), factor, *product)
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

    def step_of_output(self, _step: float) -> float:
        return self.output[0]

    def for_xnnpack(self, x: QTensor) -> "XnnIntResponseNorm":
        return XnnIntResponseNorm(self, x)


# ---- XNNPACK --------------------------------------------------------------------------------------------------------


class Response(nn.Module):
    """1 + gamma * n of a response norm, from norms (batch, channel, 1, 1); and t, the same for all channels.

    With t = (mean of the norms + eps) / gamma it is (norm + t) / t, and t is a convolution.
    """

    def __init__(self, gamma: float, n_channels: int, eps: float):
        super().__init__()
        gamma = gamma if abs(gamma) > MIN_GAMMA else MIN_GAMMA
        self.register_buffer("weight", torch.full((1, n_channels, 1, 1), 1 / (n_channels * gamma)))
        self.register_buffer("bias", torch.full((1,), eps / gamma))

    def forward(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        total = F.conv2d(norm, self.weight, self.bias)  # (batch, 1, 1, 1)
        return (norm + total) / total, total


class XnnIntResponseNorm(nn.Module):
    def __init__(self, layer: IntResponseNorm, x: QTensor):
        super().__init__()
        self.square, self.power, self.response = layer.square, layer.power, layer.response
        self.respond = Response(layer.gamma, x.values.shape[1], RESPONSE_EPS)
        scale, self.shift = layer.output
        self.product, self.output = (scale, Q_MIN + max(self.shift, 0)), (scale, Q_MIN)
        # `shift` steps of the scale, as int8.
        self.beta_constants = scale, Q_MIN - min(self.shift, 0)
        beta = torch.full((1, 1, 1, 1), Q_MIN + max(self.shift, 0), dtype=torch.int8)
        self.register_buffer("beta", beta if self.shift else None)

    def forward(self, x: QTensor) -> XnnTensor:  # (batch, channel, freq, time)
        value = xnn_dequantize(x)
        square = xnn_dequantize(xnn_quantize(value * value, self.square))
        power = xnn_dequantize(xnn_quantize(square.mean(dim=(2, 3), keepdim=True), self.power))
        response, _ = self.respond(power.sqrt())
        # x anew: XNNPACK's operators share int8 values, but not what they are in float.
        y = xnn_quantize(xnn_dequantize(x) * xnn_dequantize(xnn_quantize(response, self.response)), self.product)
        if self.beta is None:
            return y
        return xnn_quantize(xnn_dequantize(y) + xnn_dequantize(QTensor(self.beta, *self.beta_constants)), self.output)


class XnnResponseNorm(nn.Module):
    def __init__(self, layer: ResponseNorm, x: Tensor):
        super().__init__()
        _, n_channels, n_freqs, n_frames = x.shape
        eps = RESPONSE_EPS / (n_freqs * n_frames) ** 0.5  # norms are roots of means here, not of sums
        self.respond = Response(layer.gamma.item(), n_channels, eps)
        self.register_buffer("zero", torch.zeros(1, 1, 1, 1))
        self.register_buffer("beta", layer.beta.detach().view(1))

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        response, total = self.respond((x * x).mean(dim=(2, 3), keepdim=True).sqrt())
        beta = F.conv2d(total, self.zero, self.beta)  # a constant in XNNPACK's layout
        return F.relu(x * response + beta)
