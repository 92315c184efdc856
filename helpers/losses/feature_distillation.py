"""Distillation of what a teacher sees inside, beside what it answers: of its feature maps, on the fly.

Source: H. Li et al., technical report of the entry Li_NTU to DCASE 2025 Task 1,
https://github.com/HaoWLee/dcase2025_task1_Li_NTU: `dfm` is that of its second system, `ssfm` of its first. Departures:
the teacher has its weights (the published code left it random without an error) and stays in eval mode; the first
system's second phase of training, of which none of its published weights are, is left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.waveforms import Batch
from helpers.losses.distillation import kd_loss
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class FeatureDistillationConfig:
    feature_teacher: Annotated[str, "whose features: a published network, the id of a run, a file"] = "li2025_teacher"
    feature_match: Annotated[
        Literal["dfm", "ssfm"],
        "dfm: the last maps, point by point; ssfm: of all stages, how alike the clips of a batch are at each point",
    ] = "dfm"
    feature_weight: Annotated[float, "weight of the features", Bounds(0, above=True)] = 0.1
    label_weight: Annotated[float, "weight of the labels", Bounds(0)] = 0.02
    kd_weight: Annotated[float, "weight of the teacher logits; 0 is off", Bounds(0)] = 0.88
    temperature: Annotated[float, "divides student and teacher logits", Bounds(0, above=True)] = 2.0

    def __post_init__(self):
        check_numbers(self)
        if self.feature_match not in ("dfm", "ssfm"):
            raise ValueError(f"feature_match must be dfm or ssfm, got {self.feature_match!r}")
        if not self.feature_teacher:
            raise ValueError("feature_teacher must name a published network, a run or a file, got nothing")


class FeatureLoss(NamedTuple):
    """The parts as they are logged: already weighted, so that they add up to the loss."""

    loss: Tensor
    label_loss: Tensor
    kd_loss: Tensor
    feature_loss: Tensor


class Maps:
    """The outputs of a network's `feature_layers` in its last forward pass outside of `no_grad` and inference mode.

    Args:
        network: what declares them, maps (batch, channel, freq, time) each.

    Raises:
        ValueError: for a network that declares none.
    """

    def __init__(self, network: nn.Module):
        names = getattr(network, "feature_layers", ())
        if not names:
            raise ValueError(
                f"{type(network).__name__} declares no feature_layers, so its features cannot be distilled"
            )
        self.network, self.names, self._found = network, tuple(names), {}
        for name in self.names:
            network.get_submodule(name).register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._found[name] = output

    def take(self) -> list[Tensor]:
        """The maps, from the first stage to the last; they are kept no longer."""
        found, self._found = self._found, {}
        return [found[name].float() for name in self.names]


class TeacherFrontend(nn.Module):
    """Gives a batch the teacher's spectrograms, before anything is done to the network's own."""

    def __init__(self, frontend: nn.Module):
        super().__init__()
        self.frontend = frontend.eval()

    def train(self, mode: bool = True) -> "TeacherFrontend":
        self.frontend.eval()  # its bands are drawn for no batch
        return self

    def forward(self, batch: Batch) -> Batch:
        return replace(batch, teacher_log_mel=self.frontend(batch.waveform))


class FeatureDistillation(nn.Module):
    """Weighted sum of cross-entropy, divergence from teacher logits where there are any, and distance of features.

    Its projections learn with the network and are thrown away afterwards.
    """

    def __init__(self, config: FeatureDistillationConfig):
        super().__init__()
        self.config = config
        self.hearing: Sequence[nn.Module] = ()
        self.of_student, self.of_teacher = nn.ModuleList(), nn.ModuleList()  # projections of each stage

    @property
    def teacher_temperature(self) -> float | None:
        return None if self.config.kd_weight == 0 else self.config.temperature

    @property
    def feature_teacher(self) -> str:
        """What the teacher is called."""
        return self.config.feature_teacher

    def take_teacher(self, network: nn.Module, frontend: nn.Module) -> None:
        """Takes the teacher; what `hearing` holds belongs at the head of the augmentations of spectrograms."""
        # In lists: no parts of this module, so neither learned nor saved with it.
        self._teacher = [network.eval().requires_grad_(False)]
        self.hearing = [TeacherFrontend(frontend)]

    def attach(self, student: nn.Module, frontend: nn.Module, n_samples: int) -> None:
        """Connects the teacher with a network on its device; what the loss learns is made for the maps of both.

        Args:
            frontend: the network's.
            n_samples: of a clip.

        Raises:
            ValueError: when one of them has no features, or they hear different rates.
        """
        device = next(student.parameters()).device
        teacher, theirs = self._teacher[0].to(device), self.hearing[0].frontend.to(device)
        if theirs.sample_rate != frontend.sample_rate:
            raise ValueError(
                f"the feature teacher hears {theirs.sample_rate} Hz and the network {frontend.sample_rate} Hz: choose "
                "another"
            )
        self._maps = Maps(student), Maps(teacher)
        silence, was_training = torch.zeros(2, n_samples, device=device), student.training
        student.eval()(frontend.eval()(silence))
        teacher(theirs(silence))
        student.train(was_training)
        own, theirs = self.pairs(*(maps.take() for maps in self._maps))
        width = theirs[-1].shape[1]
        self.of_student.extend(nn.Conv2d(x.shape[1], width, 1) for x in own)
        if self.config.feature_match == "ssfm":
            self.of_teacher.extend(nn.Conv2d(x.shape[1], width, 1) for x in theirs)
        self.to(device)

    def pairs(self, own: list[Tensor], theirs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The maps that are compared: the last ones, or those of the last stages that both have."""
        n = 1 if self.config.feature_match == "dfm" else min(len(own), len(theirs))
        return own[-n:], theirs[-n:]

    def forward(self, logits: Tensor, batch: Batch) -> FeatureLoss:
        config = self.config
        self._teacher[0](batch.teacher_log_mel)  # nothing in it learns, so nothing is kept for a backward pass
        own, theirs = self.pairs(*(maps.take() for maps in self._maps))
        distance = dfm if config.feature_match == "dfm" else ssfm
        feature = config.feature_weight * distance(own, theirs, self.of_student, self.of_teacher)
        label = config.label_weight * F.cross_entropy(logits, batch.target)
        kd = logits.new_zeros(())
        if batch.teacher_logits is not None and config.kd_weight > 0:
            divergence = kd_loss(logits, batch.target, batch.teacher_logits, 0.0, config.temperature).kd_loss
            kd = config.kd_weight * divergence
        return FeatureLoss(label + kd + feature, label, kd, feature)


def dfm(own: list[Tensor], theirs: list[Tensor], of_student: Iterable[nn.Module], _of_teacher: object) -> Tensor:
    """Mean square of the student's last map, projected, minus the teacher's, pooled to its size."""
    (x,), (y,), (project,) = own, theirs, of_student
    return F.mse_loss(project(x), F.adaptive_avg_pool2d(y, x.shape[2:]))


def ssfm(
    own: list[Tensor], theirs: list[Tensor], of_student: Iterable[nn.Module], of_teacher: Iterable[nn.Module]
) -> Tensor:
    """Over all stages, the mean square difference of the clips' similarities, at each point of the smaller map."""
    total = own[0].new_zeros(())
    for x, y, of_x, of_y in zip(own, theirs, of_student, of_teacher, strict=True):
        size = [min(sizes) for sizes in zip(x.shape[2:], y.shape[2:], strict=True)]
        grams = [similarities(F.adaptive_avg_pool2d(project(maps), size)) for project, maps in ((of_x, x), (of_y, y))]
        total = total + F.mse_loss(*grams)
    return total


def similarities(maps: Tensor) -> Tensor:
    """Gram matrices (freq, time, batch, batch) of maps (batch, channel, freq, time), divided by the channels."""
    at_point = maps.permute(2, 3, 0, 1)  # (freq, time, batch, channel)
    return at_point @ at_point.transpose(2, 3) / maps.shape[1]
