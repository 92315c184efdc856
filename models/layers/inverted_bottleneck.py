"""Expansion, depthwise and projection as one block, with a fast step for training on a CPU.

- `conv_norm_relu` (1x1 convolution, batch norm, ReLU): mean and variance of a linear map follow from the moments of its
  input, which is narrower, so the convolution's output is normalised in the moment it is computed and never stored.
- `norm_relu_conv` (batch norm, ReLU, 1x1 convolution): what lies between is made again in the backward pass instead of
  being kept.

Formulas: S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015, equations of its section 3, with z = W x put in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.layers import chunks
from models.layers.chunks import as_maps, as_rows, chunk_length, relu_backward
from models.layers.conv_unit import ConvUnit


class InvertedBottleneck(nn.Sequential):
    """1x1 convolution to `width` channels, depthwise 3x3, 1x1 convolution to `c_out`; the last without a ReLU.

    Large training batches on a CPU take the chunked step, where the layers are as they were built.
    """

    def __init__(self, c_in: int, width: int, c_out: int, stride: int | Sequence[int] = 1):
        super().__init__(
            ConvUnit(c_in, width, 1),
            ConvUnit(width, width, 3, stride, groups=width),
            ConvUnit(width, c_out, 1, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        if not (self.training and chunks.applies(x) and are_plain(self)):
            return super().forward(x)
        expand, depthwise, project = self
        y = conv_norm_relu(x, expand[0], expand[1])
        y = norm_relu_conv(depthwise[0](y), depthwise[1], project[0])
        return project[1](y)


def are_plain(block: nn.Sequential) -> bool:
    """Whether expansion, depthwise and projection are layers as they were built, so that passing by their `forward`
    changes nothing: no other layers in their place, hooks, pruned or otherwise computed weights, norms in eval mode.
    """
    units = list(block)
    if len(units) != 3 or any(type(unit) is not ConvUnit for unit in units):
        return False
    kinds = [[type(layer) for layer in unit] for unit in units]
    wanted = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    if kinds != [wanted, wanted, wanted[:2]] or chunks.has_global_hooks():
        return False
    (expand, norm1, _), (_, norm2, _), (project, _) = units
    return (
        all(_is_pointwise(conv) for conv in (expand, project))
        and all(_learns_statistics(norm) for norm in (norm1, norm2))
        and not any(chunks.is_altered(module) for unit in units for module in unit.modules())
    )


def _is_pointwise(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups, conv.bias)
    return shape == ((1, 1), (1, 1), (0, 0), 1, None) and conv.weight.dtype in chunks.DTYPES


def _learns_statistics(norm: nn.BatchNorm2d) -> bool:
    learns = norm.training and norm.track_running_stats and norm.affine and norm.momentum is not None
    return learns and norm.weight.dtype in chunks.DTYPES


def conv_norm_relu(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """relu(norm(conv(x))) for a 1x1 convolution without bias and a norm in training mode; updates its statistics."""
    y, mean, var = _ConvNormRelu.apply(x, conv.weight, norm.weight, norm.bias, norm.eps)
    _update_statistics(norm, mean, var, x.numel() // x.shape[1])
    return y


def norm_relu_conv(x: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d) -> Tensor:
    """conv(relu(norm(x))) for a 1x1 convolution without bias and a norm in training mode; updates its statistics."""
    y, mean, var = _NormReluConv.apply(x, norm.weight, norm.bias, conv.weight, norm.eps)
    _update_statistics(norm, mean, var, x.numel() // x.shape[1])
    return y


@torch.no_grad()
def _update_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n: int) -> None:
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(var * (n / (n - 1)), norm.momentum)


class _ConvNormRelu(torch.autograd.Function):
    """Returns the output, and mean and biased variance (channel,) of the convolution's output."""

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps):
        rows, weight = as_rows(x), weight.flatten(1)  # (row, in), (out, in)
        length = chunk_length(len(weight))
        mean_in = rows.mean(dim=0)
        cov_in = weight.new_zeros(rows.shape[1], rows.shape[1])
        for piece in rows.split(length):
            centred = piece - mean_in
            cov_in.addmm_(centred.t(), centred)
        cov_in /= len(rows)
        mean = weight @ mean_in
        var = ((weight @ cov_in) * weight).sum(dim=1).clamp_min_(0)
        scale = (var + eps).rsqrt()
        gain = gamma * scale
        # relu(gain * (z - mean) + beta) as one affine map of the input
        folded, offset = (gain[:, None] * weight).t().contiguous(), beta - gain * mean
        out = rows.new_empty(len(rows), len(weight))
        for piece, into in zip(rows.split(length), out.split(length), strict=True):
            torch.addmm(offset, piece, folded, out=into).relu_()
        ctx.save_for_backward(rows, out, weight, mean_in, cov_in, scale, gain)
        ctx.shape = x.shape
        ctx.mark_non_differentiable(mean, var)
        return as_maps(out, x.shape), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _mean, _var):
        rows, out, weight, mean_in, cov_in, scale, gain = ctx.saved_tensors
        n, length = len(rows), chunk_length(len(weight))
        folded = gain[:, None] * weight  # (out, in)
        grad_in = torch.empty_like(rows)
        grad_beta = torch.zeros_like(gain)
        with_input = torch.zeros_like(weight)  # (out, in): sum of gradient times input, then centred input
        pieces = (tensor.split(length) for tensor in (rows, out, as_rows(grad_out), grad_in))
        for piece, output, gradient, into in zip(*pieces, strict=True):
            masked = relu_backward(gradient, output)
            grad_beta += masked.sum(dim=0)
            with_input.addmm_(masked.t(), piece)
            torch.mm(masked, folded, out=into)
        with_input -= grad_beta[:, None] * mean_in
        grad_gamma = scale * (with_input * weight).sum(dim=1)
        # The gradient of z is gain * (g - mean(g) - z^ * mean(g z^)), with z^ = scale * W (x - mean).
        share = scale * grad_gamma / n  # (out,)
        grad_weight = gain[:, None] * (with_input - n * share[:, None] * (weight @ cov_in))
        through_var = folded.t() @ (share[:, None] * weight)  # (in, in)
        constant = mean_in @ through_var.t() - (grad_beta / n) @ folded
        for piece, into in zip(rows.split(length), grad_in.split(length), strict=True):
            into.addmm_(piece, through_var.t(), alpha=-1).add_(constant)
        return as_maps(grad_in, ctx.shape), grad_weight[:, :, None, None], grad_gamma, grad_beta, None


class _NormReluConv(torch.autograd.Function):
    """Returns the output, and mean and biased variance (channel,) of the input."""

    @staticmethod
    def forward(ctx, x, gamma, beta, weight, eps):
        rows, weight = as_rows(x), weight.flatten(1)  # (row, in), (out, in)
        length = chunk_length(rows.shape[1])
        shift = rows[:length].mean(dim=0)  # near enough to the mean for the squares to lose no digits
        first, second = torch.zeros_like(shift), torch.zeros_like(shift)
        for piece in rows.split(length):
            centred = piece - shift
            first += centred.sum(dim=0)
            second += centred.square_().sum(dim=0)
        first, second = first / len(rows), second / len(rows)
        mean, var = shift + first, (second - first * first).clamp_min_(0)
        scale = (var + eps).rsqrt()
        gain = gamma * scale
        offset = beta - gain * mean
        transposed = weight.t().contiguous()
        out = rows.new_empty(len(rows), len(weight))
        for piece, into in zip(rows.split(length), out.split(length), strict=True):
            torch.mm(torch.addcmul(offset, piece, gain).relu_(), transposed, out=into)
        ctx.save_for_backward(rows, weight, mean, scale, gain, offset)
        ctx.shape = x.shape
        ctx.mark_non_differentiable(mean, var)
        return as_maps(out, x.shape), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _mean, _var):
        rows, weight, mean, scale, gain, offset = ctx.saved_tensors
        n, length = len(rows), chunk_length(rows.shape[1])
        grad_in, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
        grad_beta, with_input = torch.zeros_like(gain), torch.zeros_like(gain)
        pieces = (tensor.split(length) for tensor in (rows, as_rows(grad_out), grad_in))
        for piece, gradient, into in zip(*pieces, strict=True):
            hidden = torch.addcmul(offset, piece, gain).relu_()
            grad_weight.addmm_(gradient.t(), hidden)
            masked = relu_backward(torch.mm(gradient, weight), hidden)
            grad_beta += masked.sum(dim=0)
            with_input += torch.mul(piece, masked, out=hidden).sum(dim=0)
            torch.mul(masked, gain, out=into)
        grad_gamma = scale * (with_input - mean * grad_beta)
        # gain * (g - mean(g) - x^ * mean(g x^)), with x^ = scale * (x - mean)
        slope = -gain * scale * grad_gamma / n
        constant = -gain * grad_beta / n - slope * mean
        for piece, into in zip(rows.split(length), grad_in.split(length), strict=True):
            into.addcmul_(piece, slope).add_(constant)
        return as_maps(grad_in, ctx.shape), grad_gamma, grad_beta, grad_weight[:, :, None, None], None
