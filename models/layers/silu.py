"""`nn.SiLU`: a table of what the 256 levels give, so that every runtime rounds alike."""

import math

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
from models.layers.xnnpack import XnnBetween


class FakeSilu(FakeLayer):
    def __init__(self, _layer: nn.SiLU, _config: QuantConfig, _place: Place):
        super().__init__()
        self.output = ActivationQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(x))

    def convert(self) -> "IntSilu":
        return IntSilu(self.output.constants())


class IntSilu(nn.Module):
    def __init__(self, output: Constants):
        super().__init__()
        self.output = output

    def forward(self, x: QTensor) -> QTensor:
        # Plain numbers, so that a file holds them and not the way to them.
        levels = [(level - x.zero_point) * x.scale for level in range(Q_MIN, Q_MAX + 1)]
        table = torch.tensor([value / (1 + math.exp(-max(value, -500))) for value in levels], device=x.device)
        index = dequantize(x.values, 1.0, Q_MIN).long()  # 0 .. 255, whether a file stores int8 or uint8
        return QTensor(quantize(table[index], *self.output), *self.output)

    def step_of_output(self, _step: float) -> float:
        return self.output[0]

    def for_xnnpack(self, _x: QTensor) -> XnnBetween:
        return XnnBetween(F.silu, self.output)
