"""Losses on logits (batch, class)."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class KdLoss(NamedTuple):
    """The parts as they are logged: already weighted, so that loss = label_loss + kd_loss."""

    loss: Tensor
    label_loss: Tensor
    kd_loss: Tensor


def kd_loss(
    logits: Tensor, target: Tensor, teacher_logits: Tensor | None, kd_lambda: float, temperature: float
) -> KdLoss:
    """Cross-entropy with the labels plus Kullback-Leibler divergence from the teacher at `temperature`.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015. As in the published
    training, the divergence is averaged over clips and classes, a tenth of the usual value for ten classes.

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
