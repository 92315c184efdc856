"""Cross-entropy with the labels, smoothed where asked.

Source of the smoothing: C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
https://arxiv.org/abs/1512.00567.
"""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from datasets.waveforms import Batch
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class CrossEntropyConfig:
    label_smoothing: Annotated[
        float, "share of each label that goes to all scenes alike; 0 is off", Bounds(0, 1, below=True)
    ] = 0.0

    def __post_init__(self):
        check_numbers(self)


class CrossEntropy:
    """Mean over the batch of -sum_k t_k log p_k; targets may be mixed."""

    def __init__(self, config: CrossEntropyConfig):
        self.label_smoothing = config.label_smoothing

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch.target, label_smoothing=self.label_smoothing)
