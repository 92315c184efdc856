"""Cross-entropy with the labels, and the divergence from a teacher's answers where there are any.

Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531. Published forms: F. Schmid et al., DCASE Workshop 2023, average the divergence over
clips and classes, a tenth of the usual value for ten classes; so do easy_dcase_task1 and, for its logits, Li (2025);
dragonsearch adds it up over classes.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from datasets.waveforms import Batch
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class DistillationConfig:
    temperature: Annotated[float, "divides student and teacher logits", Bounds(0, above=True)] = 2.0
    kd_lambda: Annotated[float, "weight of the labels; the teacher has the rest; 1 is off", Bounds(0, 1)] = 0.02
    kd_reduction: Annotated[
        Literal["mean", "batchmean"],
        "mean: over clips and classes, as CP-JKU, easy_dcase_task1 and Li; batchmean: over clips, as dragonsearch",
    ] = "mean"

    def __post_init__(self):
        check_numbers(self)
        if self.kd_reduction not in ("mean", "batchmean"):
            raise ValueError(f"kd_reduction must be mean or batchmean, got {self.kd_reduction!r}")


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
        weights = self.config.kd_lambda, self.config.temperature, self.config.kd_reduction
        return kd_loss(logits, batch.target, batch.teacher_logits, *weights)


def kd_loss(
    logits: Tensor, target: Tensor, teacher_logits: Tensor | None, kd_lambda: float, temperature: float,
    reduction: str = "mean",
) -> KdLoss:  # fmt: skip
    """Cross-entropy with the labels plus Kullback-Leibler divergence from the teacher at `temperature`.

    Args:
        logits: (batch, class).
        target: (batch, class), rows sum to 1.
        teacher_logits: (batch, class); None leaves the labels alone, whatever kd_lambda is.
        kd_lambda: weight of the labels, in [0, 1]; 1 is no distillation.
        temperature: divides both logits, > 0.
        reduction: of the divergence, "mean" over clips and classes or "batchmean" over clips.
    """
    label = F.cross_entropy(logits, target)
    if teacher_logits is None:
        return KdLoss(label, label, label.new_zeros(()))
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.to(logits.dtype) / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True)  # (batch, class)
    divergence = (divergence if reduction == "mean" else divergence.sum(dim=1)).mean() * temperature**2
    label, divergence = kd_lambda * label, (1 - kd_lambda) * divergence
    return KdLoss(label + divergence, label, divergence)
