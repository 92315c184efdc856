"""Weights as int8: their scales, and the pairs of them whose products could overflow on some CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Scales are kept representable in 16-bit floats, so that files can store them so.
MIN_WEIGHT_SCALE = 2.0**-14
MAX_PAIR = 32767 // 255  # largest sum of two int8 weights whose products with uint8 activations add up in 16 bits


def weight_scale(weight: Tensor, q_max: int) -> Tensor:
    """Symmetric scale of each output channel (channel,), a 16-bit float's value."""
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.dim())))
    return (largest / q_max).clamp_min(MIN_WEIGHT_SCALE).half().float()


def _as_read(weight: Tensor) -> Tensor:
    """In the order in which kernels read it: (channel, freq, time, input channel)."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1)


def limit_pairs(weight: Tensor) -> Tensor:
    """Integer weights without pairs whose products with 8-bit activations leave 16 bits; the others stay as they are.

    ONNX Runtime's kernels for x86 CPUs without VNNI add the products of two neighbouring weights with unsigned
    activations in saturating 16 bits (the instruction vpmaddubsw). Neighbours are weights (0, 1), (2, 3), ... of an
    output channel, counted along input channels first, then time, then freq. Two of one sign whose magnitudes add up to
    more than 32,767 / 255 both lose half of the excess. Depthwise kernels add in 32 bits.

    Args:
        weight: whole numbers in -127 .. 127, of any type: (channel, input channel, freq, time), or (channel, feature)
            of a linear layer, whose neighbouring features are paired.
    """
    ordered = _as_read(weight)
    flat = ordered.flatten(1)
    n_weights = flat.shape[1]
    pairs = F.pad(flat, (0, n_weights % 2)).unflatten(1, (-1, 2))  # (channel, pair, 2)
    excess = (pairs.sum(dim=2).abs() - MAX_PAIR).clamp_min(0)  # of opposite signs the sum is small
    half = torch.div(excess, 2, rounding_mode="floor")
    limited = pairs - pairs.sign() * torch.stack([excess - half, half], dim=2)
    limited = limited.flatten(1)[:, :n_weights].view_as(ordered)
    return limited if weight.dim() == 2 else limited.permute(0, 3, 1, 2).contiguous()


def count_overflows(weight: Tensor) -> int:
    """How many pairs of weights can overflow, in the sense of `limit_pairs`; arguments as there."""
    flat = _as_read(weight.int()).flatten(1)
    pairs = F.pad(flat, (0, flat.shape[1] % 2)).unflatten(1, (-1, 2))
    return int((pairs.sum(dim=2).abs() > MAX_PAIR).sum())


def paired_scale(weight: Tensor, q_max: int) -> Tensor:
    """As `weight_scale`, where `limit_pairs` follows: of 17 scales up to twice as wide that of least squared error.

    Weakening its largest pairs may cost a channel more than coarser steps do.
    """
    plain, weight = weight_scale(weight, q_max), weight.detach()
    scales = (plain * torch.linspace(1, 2, 17, device=plain.device)[:, None]).half().float()  # (candidate, channel)
    n_scales = len(scales)
    scale = scales.flatten().view(-1, *[1] * (weight.dim() - 1))
    wanted = weight.repeat(n_scales, *[1] * (weight.dim() - 1))  # (candidate x channel, input channel, freq, time)
    values = limit_pairs(torch.round(wanted / scale).clamp(-q_max, q_max))
    error = (values * scale - wanted).square().sum(dim=tuple(range(1, weight.dim()))).view(n_scales, -1)
    return scales.gather(0, error.argmin(dim=0, keepdim=True))[0]


class WeightRounding:
    """For fake layers with weights (channel, ...): the same values in training and on the target.

    Args:
        q_max: largest magnitude.
        adds_pairs: whether the target may add products in pairs: in integers, and not channel by channel.
    """

    def __init__(self, q_max: int, adds_pairs: bool):
        self.q_max, self.adds_pairs = q_max, adds_pairs

    def scale(self, weight: Tensor) -> Tensor:
        return (paired_scale if self.adds_pairs else weight_scale)(weight, self.q_max)

    def fake(self, weight: Tensor) -> Tensor:
        q_max = self.q_max
        scale = self.scale(weight)
        zero_points = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, -q_max, q_max)
        if not self.adds_pairs:
            return rounded
        scale = scale.view(-1, *[1] * (weight.dim() - 1))
        limited = limit_pairs(torch.round(rounded.detach() / scale)) * scale
        return rounded + (limited - rounded).detach()  # the gradient passes, as it does through rounding

    @torch.no_grad()
    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 values (channel, ...) and scales (channel,)."""
        scale = self.scale(weight)
        values = torch.round(weight / scale.view(-1, *[1] * (weight.dim() - 1))).clamp(-self.q_max, self.q_max)
        return (limit_pairs(values) if self.adds_pairs else values).to(torch.int8), scale
