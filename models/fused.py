"""CP-Mobile's widest training steps on a CPU with fewer passes over memory; the same functions, to rounding.

On a CPU, batch norm, ReLU and response normalisation cost more than the convolutions, because each reads and writes the
whole batch several times. Here the batch goes through the cache in chunks:

- `conv_norm_relu` (1x1 convolution, batch norm, ReLU): mean and variance of a linear map follow from the moments of its
  input, which is narrower, so the convolution's output is normalised in the moment it is computed and never stored.
- `norm_relu_conv` (batch norm, ReLU, 1x1 convolution): what lies between is made again in the backward pass instead of
  being kept.
- `response_norm_relu`: works clip by clip anyway, so forward and backward each need a single pass.

Formulas: S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015, equations of its section 3, with z = W x put in.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as module_state

from models.blocks import ConvUnit

CHUNK_VALUES = 1 << 17  # of the widest tensor, for each thread: a few such chunks fit a core's cache
DTYPES = (torch.float32,)
MIN_VALUES = 1 << 20  # of a smaller input, all tensors stay in the cache as it is


def applies(x: Tensor) -> bool:
    """Whether the chunked steps are of use for x (batch, channel, freq, time): training large batches on a CPU.

    They compute in float32 and differentiate once; where something else is asked for, the plain layers do it.
    """
    return (
        x.device.type == "cpu"
        and x.numel() >= MIN_VALUES
        and x.dtype in DTYPES
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def are_plain(block: nn.Sequential) -> bool:
    """Whether expansion, depthwise and projection are layers as they were built, so that passing by their `forward`
    changes nothing: no other layers in their place, hooks, pruned or otherwise computed weights, norms in eval mode.
    """
    units = list(block)
    if len(units) != 3 or any(type(unit) is not ConvUnit for unit in units):
        return False
    kinds = [[type(layer) for layer in unit] for unit in units]
    wanted = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    if kinds != [wanted, wanted, wanted[:2]] or module_state._has_any_global_hook():
        return False
    (expand, norm1, _), (_, norm2, _), (project, _) = units
    return (
        all(_is_pointwise(conv) for conv in (expand, project))
        and all(_learns_statistics(norm) for norm in (norm1, norm2))
        and not any(_is_altered(module) for module in block.modules())
    )


def _is_pointwise(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups, conv.bias)
    return shape == ((1, 1), (1, 1), (0, 0), 1, None) and conv.weight.dtype in DTYPES


def _learns_statistics(norm: nn.BatchNorm2d) -> bool:
    return norm.training and norm.track_running_stats and norm.affine and norm.momentum is not None


def _is_altered(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    is_computed = "weight" in module._modules or (hasattr(module, "weight") and "weight" not in module._parameters)
    return any(hooks) or is_computed or "parametrizations" in module._modules or "forward" in vars(module)


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


def response_norm_relu(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """relu(x * (1 + gamma * n) + beta), n the norm over (freq, time) relative to its mean over the channels."""
    return _ResponseNormRelu.apply(x, gamma, beta, eps)


def _as_rows(x: Tensor) -> Tensor:
    """(batch, channel, freq, time) in channels-last order as (row, channel), without a copy."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_maps(rows: Tensor, shape: torch.Size) -> Tensor:
    """(row, channel) as (batch, channel, freq, time) in channels-last order, without a copy."""
    return rows.view(shape[0], *shape[2:], -1).permute(0, 3, 1, 2)


def _chunk_length(values_each: int) -> int:
    return max(1, CHUNK_VALUES * torch.get_num_threads() // values_each)


def _relu_backward(gradient: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(gradient, output, 0)


class _ConvNormRelu(torch.autograd.Function):
    """Returns the output, and mean and biased variance (channel,) of the convolution's output."""

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps):
        rows, weight = _as_rows(x), weight.flatten(1)  # (row, in), (out, in)
        length = _chunk_length(len(weight))
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
        return _as_maps(out, x.shape), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _mean, _var):
        rows, out, weight, mean_in, cov_in, scale, gain = ctx.saved_tensors
        n, length = len(rows), _chunk_length(len(weight))
        folded = gain[:, None] * weight  # (out, in)
        grad_in = torch.empty_like(rows)
        grad_beta = torch.zeros_like(gain)
        with_input = torch.zeros_like(weight)  # (out, in): sum of gradient times input, then centred input
        pieces = (tensor.split(length) for tensor in (rows, out, _as_rows(grad_out), grad_in))
        for piece, output, gradient, into in zip(*pieces, strict=True):
            masked = _relu_backward(gradient, output)
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
        return _as_maps(grad_in, ctx.shape), grad_weight[:, :, None, None], grad_gamma, grad_beta, None


class _NormReluConv(torch.autograd.Function):
    """Returns the output, and mean and biased variance (channel,) of the input."""

    @staticmethod
    def forward(ctx, x, gamma, beta, weight, eps):
        rows, weight = _as_rows(x), weight.flatten(1)  # (row, in), (out, in)
        length = _chunk_length(rows.shape[1])
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
        return _as_maps(out, x.shape), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _mean, _var):
        rows, weight, mean, scale, gain, offset = ctx.saved_tensors
        n, length = len(rows), _chunk_length(rows.shape[1])
        grad_in, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
        grad_beta, with_input = torch.zeros_like(gain), torch.zeros_like(gain)
        pieces = (tensor.split(length) for tensor in (rows, _as_rows(grad_out), grad_in))
        for piece, gradient, into in zip(*pieces, strict=True):
            hidden = torch.addcmul(offset, piece, gain).relu_()
            grad_weight.addmm_(gradient.t(), hidden)
            masked = _relu_backward(torch.mm(gradient, weight), hidden)
            grad_beta += masked.sum(dim=0)
            with_input += torch.mul(piece, masked, out=hidden).sum(dim=0)
            torch.mul(masked, gain, out=into)
        grad_gamma = scale * (with_input - mean * grad_beta)
        # gain * (g - mean(g) - x^ * mean(g x^)), with x^ = scale * (x - mean)
        slope = -gain * scale * grad_gamma / n
        constant = -gain * grad_beta / n - slope * mean
        for piece, into in zip(rows.split(length), grad_in.split(length), strict=True):
            into.addcmul_(piece, slope).add_(constant)
        return _as_maps(grad_in, ctx.shape), grad_gamma, grad_beta, grad_weight[:, :, None, None], None


class _ResponseNormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        maps = _as_rows(x).view(len(x), -1, x.shape[1])  # (batch, position, channel)
        length = _chunk_length(maps[0].numel())
        out, norm = torch.empty_like(maps), maps.new_empty(len(maps), 1, maps.shape[2])
        for piece, into, norms in zip(maps.split(length), out.split(length), norm.split(length), strict=True):
            torch.sum(piece * piece, dim=1, keepdim=True, out=norms).sqrt_()
            response = norms / (norms.mean(dim=2, keepdim=True) + eps)
            torch.addcmul(beta, piece, 1 + gamma * response, out=into).relu_()
        ctx.save_for_backward(maps, out, norm, gamma)
        ctx.eps, ctx.shape = eps, x.shape
        return _as_maps(out.flatten(0, 1), x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        maps, out, norm, gamma = ctx.saved_tensors
        length = _chunk_length(maps[0].numel())
        grad_in = torch.empty_like(maps)
        grad_gamma, grad_beta = torch.zeros_like(gamma), torch.zeros_like(gamma)
        gradients = _as_rows(grad_out).view_as(maps)
        pieces = (tensor.split(length) for tensor in (maps, out, gradients, norm, grad_in))
        for piece, output, gradient, norms, into in zip(*pieces, strict=True):
            masked = _relu_backward(gradient, output)
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
        return _as_maps(grad_in.flatten(0, 1), ctx.shape), grad_gamma, grad_beta, None
