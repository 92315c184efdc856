"""What all kinds of layers share: 8-bit values, the operators that files show, rounding in training.

Activations are int8 per tensor, affine; weights int8 per output channel, symmetric; sums of products 32-bit integers.

Run eagerly, an integer layer computes in integers (held in floating point, where they are exact), so its output has the
same bits on every run and thread count, and is what ONNX Runtime's integer kernels give. Exported, the same layer shows
itself as float operators between `quantize` and `dequantize`, the form that runtimes recognise and fuse (QDQ).

Sources: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018 (affine int8, folding in training); R. Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference", arXiv 1806.08342 (batch norm frozen at the end).
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Q_MIN, Q_MAX = -128, 127
LEVELS = Q_MAX - Q_MIN
Constants = tuple[float, int]  # scale and zero point


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


# ---- 8-bit values ---------------------------------------------------------------------------------------------------

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
    """An int8 activation and what it stands for: (values - zero_point) * scale.

    Between layers it answers what a tensor answers without computing (`ANSWERS`), and means, which are float. Anything
    else is an error: `helpers/quantization.py` refuses it before, by the name of the module that does it.
    """

    values: Tensor
    scale: float
    zero_point: int

    def dequantize(self) -> Tensor:
        return dequantize(self.values, self.scale, self.zero_point)

    def integers(self) -> Tensor:
        """Values without the zero point, as float32: exact, and the only way to convolve them quickly everywhere."""
        return self.values.float() - self.zero_point

    def mean(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
        """In float, so that means are not multiples of a step."""
        if torch.compiler.is_exporting():
            return self.dequantize().mean(dim=dim, keepdim=keepdim)
        return (self.integers().double().mean(dim=dim, keepdim=keepdim) * self.scale).float()

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def device(self) -> torch.device:
        return self.values.device

    def size(self, *args: int) -> Any:
        return self.values.size(*args)

    def dim(self) -> int:
        return self.values.dim()

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "QTensor":
        return self._replace(values=self.values.flatten(start_dim, end_dim))

    def view(self, *shape: Any) -> "QTensor":
        return self._replace(values=self.values.view(*shape))

    def reshape(self, *shape: Any) -> "QTensor":
        return self._replace(values=self.values.reshape(*shape))

    def permute(self, *dims: Any) -> "QTensor":
        return self._replace(values=self.values.permute(*dims))

    def transpose(self, dim0: int, dim1: int) -> "QTensor":
        return self._replace(values=self.values.transpose(dim0, dim1))

    def squeeze(self, *dims: Any) -> "QTensor":
        return self._replace(values=self.values.squeeze(*dims))

    def unsqueeze(self, dim: int) -> "QTensor":
        return self._replace(values=self.values.unsqueeze(dim))

    def contiguous(self) -> "QTensor":
        return self._replace(values=self.values.contiguous())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """What `torch.*` and `torch.nn.functional.*` make of it: of a tuple they would make something else."""
        if func not in ANSWERS or not isinstance(args[0], QTensor):
            raise TypeError(f"{getattr(func, '__name__', func)} does not compute 8-bit values: use a layer for it")
        return getattr(args[0], ANSWERS[func])(*args[1:], **(kwargs or {}))

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("operators do not compute 8-bit values: use a layer, such as Add of models/layers/add.py")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __matmul__ = __neg__ = _refuse


# What may be done with activations outside layers, as PyTorch names it, and the method of `QTensor` that answers.
ANSWERS = {
    getattr(where, name): name
    for name in ("mean", "flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze")
    for where in (torch, Tensor)
}
ANSWERS |= {getattr(Tensor, name): name for name in ("view", "contiguous", "size", "dim")}
ANSWERS |= {getattr(Tensor, name).__get__: name for name in ("shape", "ndim", "device")}
AS_LEVELS = {"flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "view", "contiguous"}


def requantize(integers: Tensor, factor: Tensor | float, scale: float, zero_point: int) -> QTensor:
    """The output of an integer layer: one float32 product, rounded to nearest, ties to even."""
    values = torch.clamp(torch.round(integers.float() * factor) + zero_point, Q_MIN, Q_MAX)
    return QTensor(values.to(torch.int8), scale, zero_point)


def float32(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32)


# ---- rounding in training -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """What the flow of data through a network says of one layer in it."""

    reads_float: bool = False  # its input is no 8-bit value of another layer
    ends_in_relu: bool = False  # a ReLU alone reads its output, and becomes the lower end of its range
    input_shape: tuple[int, ...] = ()  # of one clip, batch axis included


class Rounding(nn.Module):
    """What `helpers/quantization.py` turns on and off, module by module; not part of the state dict."""

    rounding = True  # False: the layer computes in float
    norm_frozen = False  # batch norm uses its running statistics in training mode too


class FakeLayer(Rounding):
    """A layer with fake quantization: rounds weights and activations as the target will.

    It is made from the float layer, a `QuantConfig` and a `Place`; ValueError says why this one has no 8-bit form.
    `convert()` gives the integer layer, which may declare: `float_part`, what it computes in float, in words;
    `n_overflows()`; `fix_bias(x)`; `step_of_output(step)`; `for_xnnpack(x)`. Float layers whose operators XNNPACK lacks
    declare `for_xnnpack(x)` too.
    """

    # What its integer layer takes and gives, so that `prepare` refuses what would not fit together.
    takes_float = False  # also takes float values
    gives = "levels"  # or "float", or "same" as it takes
    may_be_shared = True  # whether it may be called more than once
    absorbs_relu = False  # whether it heeds `Place.ends_in_relu`

    def convert(self) -> nn.Module:
        raise NotImplementedError


class ActivationQuantizer(Rounding):
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

    def constants(self) -> Constants:
        scale, zero_point = self.params()
        return scale.item(), int(zero_point)


def relu_if(x: Tensor, wanted: bool) -> Tensor:
    return F.relu(x) if wanted else x
