"""Cross-entropy with the labels, and the divergence from a teacher's answers where there are any.

Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531, as F. Schmid et al., DCASE Workshop 2023, train with it: the divergence is averaged
over clips and classes, a tenth of the usual value for ten classes.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from datasets.waveforms import Batch
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class DistillationConfig:
    temperature: Annotated[float, "divides student and teacher logits", Bounds(0, above=True)] = 2.0
    kd_lambda: Annotated[float, "weight of the labels; the teacher has the rest; 1 is off", Bounds(0, 1)] = 0.02

    def __post_init__(self):
        check_numbers(self)


class KdLoss(NamedTuple):
    """The parts as they are logged: already weighted, so that loss = label_loss + kd_loss."""

    loss: Tensor
    label_loss: Tensor
    kd_loss: Tensor


class Distillation:
    """`kd_loss` of a batch; of one without teacher logits the cross-entropy alone."""

    def __init__(self, config: DistillationConfig):
        self.config = config

    @property
    def teacher_temperature(self) -> float | None:
        return None if self.config.kd_lambda == 1 else self.config.temperature

    def __call__(self, logits: Tensor, batch: Batch) -> KdLoss:
        return kd_loss(logits, batch.target, batch.teacher_logits, self.config.kd_lambda, self.config.temperature)


def kd_loss(
    logits: Tensor, target: Tensor, teacher_logits: Tensor | None, kd_lambda: float, temperature: float
) -> KdLoss:
    """Cross-entropy with the labels plus Kullback-Leibler divergence from the teacher at `temperature`.

    Args:
        logits: (batch, class).
        target: (batch, class), rows sum to 1.
        teacher_logits: (batch, class); None leaves the labels alone, whatever kd_lambda is.
        kd_lambda: weight of the labels, in [0, 1]; 1 is no distillation.
        temperature: divides both logits, > 0.
    """
    label = F.cross_entropy(logits, target)
    if teacher_logits is None:
        return KdLoss(label, label, label.new_zeros(()))
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.to(logits.dtype) / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).mean() * temperature**2
    label, divergence = kd_lambda * label, (1 - kd_lambda) * divergence
    return KdLoss(label + divergence, label, divergence)
