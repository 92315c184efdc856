"""Layers in the form in which XNNPACK takes them, for ExecuTorch programs: the same numbers from other operators.

XNNPACK is to get a whole network as one graph: each gap costs copies and changes of layout, and runs in slow kernels.
It lacks means over channels, average pools that count their padding, and products with a constant on the left. It reads
an int8 value with the scale and zero point that it was written with, so where `integer.py` shifts a zero point, a
constant is added here. And it keeps activations with the channels last: a constant that stands alone would take what it
is added to out of this layout and back.

What it rounds differently: sums of two int8 (halves go up, and quotients of scales have 21 bits), and the last bit of
the response's float32 arithmetic. Either shows where a value lies within about 1e-4 steps of the middle of two levels.
"""

import copy

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import AvgPool, GlobalMean
from models.cp_mobile import RESPONSE_EPS, ResponseNorm
from models.frontends.cp_mel import LOG_OFFSET, PREEMPHASIS, SCALE, SHIFT
from models.frontends.cp_mel_export import CpMelExport
from models.integer import (
    Q_MAX,
    Q_MIN,
    Constants,
    IntAdd,
    IntAvgPool,
    IntConv,
    IntGlobalMean,
    IntResponseNorm,
    IntSums,
    QTensor,
    dequantize_channels,
)

MIN_GAMMA = 1e-12


def for_xnnpack(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a model, in eval mode, whose layers are exchanged for those of `FORMS`; front ends take one clip then.

    Args:
        model: on the CPU.
        example: an input of the final shape; a run with it shows what each layer reads.
    """
    model = nn.Sequential(copy.deepcopy(model)).eval()
    inputs: dict[nn.Module, Tensor | QTensor] = {}

    def note_input(layer: nn.Module, arguments: tuple) -> None:
        inputs[layer] = arguments[0]

    hooks = [layer.register_forward_pre_hook(note_input) for layer in model.modules() if type(layer) in FORMS]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child in inputs:
                setattr(module, name, FORMS[type(child)](child, inputs[child]))
    return model


def _quantize(x: Tensor, constants: Constants) -> QTensor:
    limits = Q_MIN, Q_MAX, torch.int8
    return QTensor(torch.ops.quantized_decomposed.quantize_per_tensor(x, *constants, *limits), *constants)


def _dequantize(x: QTensor) -> Tensor:
    limits = Q_MIN, Q_MAX, torch.int8
    return torch.ops.quantized_decomposed.dequantize_per_tensor(x.values, x.scale, x.zero_point, *limits)


class XnnConv(nn.Module):
    """Integer convolution, or average pool as one; with float weights where its input is float."""

    def __init__(self, layer: IntSums, x: Tensor | QTensor):
        super().__init__()
        weight, scale, bias = layer.weight, layer.weight_scale, layer.bias
        self.groups, self.input = layer.groups, layer.input
        self.stride, self.padding, self.output = layer.stride, layer.padding, layer.output
        if self.input is not None:
            x = _quantize(x, self.input)
        self.reads_float, bias = not isinstance(x, QTensor), bias.float()
        if self.reads_float:
            weight = dequantize_channels(weight, scale)
        else:
            # Rounded to whole steps of the sums as `integer.py` does: ExecuTorch would round others in its own way.
            step = scale * x.scale
            bias = torch.round(bias / step) * step
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int64))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor | QTensor) -> QTensor:
        if self.input is not None:
            x = _quantize(x, self.input)
        weight = self.weight
        if not self.reads_float:
            x, limits = _dequantize(x), (-Q_MAX, Q_MAX, torch.int8)
            dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
            weight = dequantize(weight, self.scale, self.zero_point, 0, *limits)
        return _quantize(F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups), self.output)


class XnnAdd(nn.Module):
    def __init__(self, layer: IntAdd, _x: QTensor):
        super().__init__()
        self.output = layer.output

    def forward(self, x: QTensor, y: QTensor) -> QTensor:
        return _quantize(_dequantize(x) + _dequantize(y), self.output)


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

    def forward(self, x: QTensor) -> QTensor:  # (batch, channel, freq, time)
        value = _dequantize(x)
        square = _dequantize(_quantize(value * value, self.square))
        power = _dequantize(_quantize(square.mean(dim=(2, 3), keepdim=True), self.power))
        response, _ = self.respond(power.sqrt())
        # x anew: XNNPACK's operators share int8 values, but not what they are in float.
        y = _quantize(_dequantize(x) * _dequantize(_quantize(response, self.response)), self.product)
        if self.beta is None:
            return y
        return _quantize(_dequantize(y) + _dequantize(QTensor(self.beta, *self.beta_constants)), self.output)


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


class XnnAvgPool(nn.Module):
    """The padding, which XNNPACK's pool would leave out of the mean, is an operator of its own."""

    def __init__(self, layer: AvgPool, _x: Tensor):
        super().__init__()
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, [self.padding] * 4), self.kernel_size, self.stride)


class XnnGlobalMean(nn.Module):
    def __init__(self, _layer: GlobalMean | IntGlobalMean, _x: Tensor | QTensor):
        super().__init__()

    def forward(self, x: Tensor | QTensor) -> Tensor:
        x = _dequantize(x) if isinstance(x, QTensor) else x
        return x.mean(dim=(2, 3), keepdim=True).flatten(1)


class XnnMel(nn.Module):
    """`CpMelExport` with its constant matrices on the right, where XNNPACK packs them once, at load.

    Mirroring the ends of the clip and gathering frames and rows of filters stays with ExecuTorch's portable kernels.
    """

    def __init__(self, layer: CpMelExport, _x: Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("stage2", layer._stage2().transpose(1, 2).contiguous())  # (k1, (re/im, n2), (re/im, k2))
        layer.stage2 = layer.angle = layer.cos = layer.sin = None  # a program would carry them unused

    def forward(self, waveform: Tensor) -> Tensor:
        mel = self.layer
        y = F.linear(self._frames(waveform).transpose(1, 2), mel.stage1)  # (time, n2, (k1, re/im))
        y = y.unflatten(2, (-1, 2)).permute(2, 0, 3, 1).flatten(2)  # (k1, time, (re/im, n2))
        spectrum = torch.bmm(y, self.stage2)  # (k1, time, (re/im, k2))
        square = spectrum * spectrum
        power = square[:, :, : mel.q] + square[:, :, mel.q :]  # (k1, time, k2)
        power = power.transpose(1, 2).flatten(0, 1)  # ((k1, k2), time)
        bands = [
            F.linear(power.index_select(0, getattr(mel, f"rows{i}")).t(), getattr(mel, f"filters{i}"))
            for i in range(mel.n_blocks)
        ]
        log_mel = (torch.log(torch.cat(bands, 1) + LOG_OFFSET) + SHIFT) / SCALE  # (time, mel)
        return log_mel.t().reshape(1, 1, -1, mel.n_frames)  # (batch, 1, mel, time)

    def _frames(self, waveform: Tensor) -> Tensor:
        """As in `CpMelExport`, but only the mirrored samples are gathered one by one."""
        mel, before = self.layer, waveform[:, :-1]
        x = (waveform[:, 1:] - before) + (1 - PREEMPHASIS) * before
        end = x.shape[1] - 1
        parts = [x[:, 1 : mel.n_left + 1].flip(1), x, x[:, end - mel.n_right : end].flip(1)]
        x = torch.cat([part for part in parts if part.shape[1]], 1)
        if mel.n_zeros > 0:
            x = F.pad(x, (0, mel.n_zeros))
        elif mel.n_zeros < 0:
            x = x[:, : mel.n_zeros]
        x = x.reshape(1, -1, mel.piece).index_select(1, mel.piece_index)
        frames = x.view(-1, mel.n_gathered)  # (time, sample)
        if mel.n_gathered > len(mel.window):
            frames = frames[:, : len(mel.window)]
        return (frames * mel.window).view(-1, len(mel.window) // mel.q, mel.q)  # (time, n1, n2)


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    IntConv: XnnConv,
    IntAvgPool: XnnConv,
    IntAdd: XnnAdd,
    IntResponseNorm: XnnIntResponseNorm,
    IntGlobalMean: XnnGlobalMean,
    ResponseNorm: XnnResponseNorm,
    AvgPool: XnnAvgPool,
    GlobalMean: XnnGlobalMean,
    CpMelExport: XnnMel,
}
