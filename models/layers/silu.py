"""`nn.SiLU`: a table of the 256 levels in integers, x * sigmoid(x) in files."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.core import (
    Q_MAX,
    Q_MIN,
    ActivationQuantizer,
    Constants,
    FakeLayer,
    Place,
    QTensor,
    QuantConfig,
    dequantize,
    quantize,
)


class FakeSilu(FakeLayer):
    def __init__(self, _layer: nn.SiLU, _config: QuantConfig, _place: Place):
        super().__init__()
        self.output = ActivationQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(x))

    def convert(self) -> "IntSilu":
        return IntSilu(self.output.constants())


class IntSilu(nn.Module):
    float_part = "SiLU"

    def __init__(self, output: Constants):
        super().__init__()
        self.output = output

    def forward(self, x: QTensor) -> QTensor:
        if torch.compiler.is_exporting():
            real = x.dequantize()
            return QTensor(quantize(real * torch.sigmoid(real), *self.output), *self.output)
        levels = torch.arange(Q_MIN, Q_MAX + 1, device=x.device).to(torch.int8)
        table = quantize(F.silu(dequantize(levels, x.scale, x.zero_point)), *self.output)
        return QTensor(table[x.values.long() - Q_MIN], *self.output)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]
