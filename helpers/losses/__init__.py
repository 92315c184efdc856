"""Losses on logits (batch, class) by name: a plain table.

A loss is built from its config and called with the logits and the batch that they answer. It returns a scalar, or a
named tuple of scalars: the first is minimised, all are logged. One that learns from teacher logits says so with
`teacher_temperature`, at which it reads them; None, or no such attribute: it takes none. One that learns from the
inside of a teacher has `attach` and names the teacher, see `FeatureDistillation`; what it learns itself are its
parameters.
"""

from helpers.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
from helpers.losses.distillation import Distillation, DistillationConfig, KdLoss, kd_loss
from helpers.losses.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from helpers.losses.focal import Focal, FocalConfig

# name -> (config, class); the keys are the choices on the command line, the first is the default.
LOSSES = {
    "distillation": (DistillationConfig, Distillation),
    "cross_entropy": (CrossEntropyConfig, CrossEntropy),
    "feature_distillation": (FeatureDistillationConfig, FeatureDistillation),
    "focal": (FocalConfig, Focal),
}

__all__ = ["LOSSES", "Distillation", "DistillationConfig", "KdLoss", "kd_loss"]
