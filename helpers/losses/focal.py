"""The focal loss, in which answers that are sure and right count less; SP4ASC trains with it.

Source: T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, https://arxiv.org/abs/1708.02002; as in
https://github.com/valeoai/SP4ASC without class weights. Departures: none by default.
"""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from datasets.waveforms import Batch
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class FocalConfig:
    focal_gamma: Annotated[float, "how much less sure answers count; 0 is cross-entropy", Bounds(0)] = 1.0
    focal_mixed: Annotated[
        bool, "counts both labels of a mixed clip in their proportion, not the larger alone as published"
    ] = False

    def __post_init__(self):
        check_numbers(self)


class Focal:
    """Mean over the batch of -(1 - p)^gamma log p, with p the probability of the label."""

    def __init__(self, config: FocalConfig):
        self.config = config

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        target, log_p = batch.target, F.log_softmax(logits, dim=1)  # (batch, class)
        if not self.config.focal_mixed:
            target = F.one_hot(target.argmax(dim=1), target.shape[1])
        # expm1: 1 - p of a sure answer would lose its digits.
        return -((-log_p.expm1()) ** self.config.focal_gamma * target * log_p).sum(dim=1).mean()
