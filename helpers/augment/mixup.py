"""MixUp: trains on sums of two spectrograms, weighted, and on the labels in the same proportion.

Source: H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
https://arxiv.org/abs/1710.09412. As in easy_dcase_task1, one weight serves the whole batch. Departures, none of which
changes a gradient: targets are mixed, not losses; with a teacher its distributions are mixed (see the class).
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.waveforms import Batch
from helpers.augment.augmentation import Augmentation, Setting
from helpers.augment.freq_mixstyle import _beta
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class MixUpConfig:
    mixup_alpha: Annotated[float, "parameter of mixup's Beta distribution; 0 is off", Bounds(0)] = 0.0
    mixup_p: Annotated[float, "share of batches that are mixed; 0 is off", Bounds(0, 1)] = 1.0

    def __post_init__(self):
        check_numbers(self)


class MixUp(Augmentation):
    """Mixes every spectrogram with that of another clip: a share lam ~ Beta(alpha, alpha) its own, for all the same.

    Targets are mixed in the same proportion. Cross-entropy is linear in the target, so the loss is that of the two
    labels, weighted: CE(z, lam a + (1 - lam) b) = lam CE(z, a) + (1 - lam) CE(z, b).

    Teacher logits become those of the mixed distributions at `temperature`. For a Kullback-Leibler loss at that
    temperature this gives the same gradient as the weighted sum of the two divergences; the value is smaller by what
    does not depend on the student, the entropy that mixing adds to the teacher.

    Waveform and recording device stay those of the clip itself. Goes last in the chain after the front end.

    Args:
        alpha: parameter of the Beta distribution; 0 is off.
        temperature: of the distillation loss, > 0; None where there is no teacher.
        p: share of the batches; 0 is off.

    Raises:
        ValueError: for a value out of range; at use, for a batch with teacher logits where no temperature was given.
    """

    stage = "log_mel"

    def __init__(self, alpha: float, temperature: float | None = None, p: float = 1.0):
        super().__init__()
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"mixup_alpha must be >= 0 and finite, got {alpha}")
        if temperature is not None and not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if not 0 <= p <= 1:
            raise ValueError(f"mixup_p must be in [0, 1], got {p}")
        self.alpha, self.temperature, self.p = alpha, temperature, p

    @classmethod
    def from_config(cls, config: MixUpConfig, setting: Setting) -> "MixUp":
        return cls(config.mixup_alpha, setting.teacher_temperature, config.mixup_p)

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.alpha == 0 or self.p == 0:
            return batch
        device = batch.log_mel.device
        lam = _beta(self.alpha, 1, device)[0]
        if self.p < 1:  # a share of 1 mixes nothing; decided on the device, so that nobody waits for it
            lam = torch.where(torch.rand((), device=device) < self.p, lam, 1.0)
        return self.mix(batch, lam, torch.randperm(len(batch.log_mel), device=device))

    def mix(self, batch: Batch, lam: Tensor, partner: Tensor) -> Batch:
        """Mixes a share lam () of each clip with 1 - lam of the clip at its `partner` (batch,)."""

        def mixed(x: Tensor) -> Tensor:
            return torch.lerp(x[partner], x, lam)

        target, teacher_logits = batch.target, batch.teacher_logits
        if teacher_logits is not None:
            if self.temperature is None:
                raise ValueError("temperature must be given to mix a batch with teacher logits, got None")
            teacher_logits = mix_logits(teacher_logits, lam, partner, self.temperature)
        return replace(
            batch,
            log_mel=mixed(batch.log_mel),
            target=None if target is None else mixed(target),
            teacher_logits=teacher_logits,
            teacher_log_mel=None if batch.teacher_log_mel is None else mixed(batch.teacher_log_mel),
        )


def mix_logits(logits: Tensor, lam: Tensor, partner: Tensor, temperature: float) -> Tensor:
    """Logits (batch, class) whose softmax at `temperature` is the mixture of the softmaxes of clip and partner."""
    log_p = F.log_softmax(logits / temperature, dim=1)
    # Logarithms throughout: a class that a sure teacher rules out would underflow to log 0.
    return temperature * torch.logaddexp(lam.log() + log_p, torch.log1p(-lam) + log_p[partner])
