"""What integer layers with weights share: convolutions, average pools as such, and linear layers."""

import torch
from torch import Tensor, nn

from models.layers.core import LEVELS, Constants, QTensor, dequantize_channels, quantize

EXACT_FLOAT32 = 1 << 24  # float32 sums of integers are exact below


class IntegerSums(nn.Module):
    """A layer in 32-bit sums; has `weight` int8 (channel, ...), `weight_scale` float32 and `bias` float16 or None.

    Args:
        input: scale and zero point of a float input that is to be rounded first.
    """

    def __init__(self, input: Constants | None = None):
        super().__init__()
        self.input = input
        self.register_buffer("whole_bias", None)  # int32, in units of the sums; set by `fix_bias`
        self.register_buffer("step", None)  # float32, what one unit stands for

    def sum(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def n_overflows(self) -> int:
        """Pairs of weights whose products x86 CPUs without VNNI, which add them in 16 bits, may not add exactly."""
        return 0

    def fix_bias(self, x: Tensor | QTensor) -> None:
        """From here on exported as a whole number, int32 in units of the sums; `x` is an input, for its scale."""
        scale = x.scale if isinstance(x, QTensor) else self.input and self.input[0]
        if scale is not None and self.bias is not None:
            self.step = self.weight_scale * scale
            self.whole_bias = torch.round(self.bias.float() / self.step).to(torch.int32)

    def _read(self, x: Tensor | QTensor) -> Tensor | QTensor:
        if self.input is None or isinstance(x, QTensor):
            return x
        return QTensor(quantize(x, *self.input), *self.input)

    def _sums(self, x: QTensor, step: Tensor) -> Tensor:
        """Exact sums of an eager run; `step` (channel,) is what one unit of them stands for."""
        bias = None if self.bias is None else torch.round(self.bias.float() / step)
        largest = LEVELS * self.weight.float().abs().flatten(1).sum(dim=1).max()
        largest += 0 if bias is None else bias.abs().max()
        # A GPU's convolutions may round float32 products.
        exact = torch.float32 if largest < EXACT_FLOAT32 and self.weight.device.type == "cpu" else torch.float64
        return self.sum(x.integers().to(exact), self.weight.to(exact), None if bias is None else bias.to(exact))

    def _in_float(self, x: Tensor) -> Tensor:
        # A GPU would round the factors to TF32; on a CPU float32 sums are those of ONNX Runtime.
        wide = torch.float32 if x.device.type == "cpu" or torch.compiler.is_exporting() else torch.float64
        weight = dequantize_channels(self.weight, self.weight_scale).to(wide)
        bias = self.bias if self.whole_bias is None else dequantize_channels(self.whole_bias, self.step)
        return self.sum(x.to(wide), weight, None if bias is None else bias.to(wide)).float()
