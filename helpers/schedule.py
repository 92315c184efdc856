"""Learning-rate schedules by name. A schedule is its own config, and gives each epoch a factor of the peak rate."""

import math
from dataclasses import dataclass
from typing import Annotated

from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class WarmupRampdown:
    """Exponential warm-up, constant, linear ramp-down, constant floor, as the CP-JKU systems have it.

    Source: F. Schmid et al., DCASE Workshop 2023, https://github.com/fschmid56/cpjku_dcase23. The rate is set once, at
    the start of an epoch.
    """

    warm_up_len: Annotated[int, "epochs of exponential warm-up; 0 is off", Bounds(0)] = 14
    ramp_down_start: Annotated[int, "epoch after which the rate falls", Bounds(0)] = 50
    ramp_down_len: Annotated[int, "epochs of the linear ramp-down", Bounds(0)] = 84
    last_lr_value: Annotated[float, "rate after the ramp-down, relative to lr", Bounds(0)] = 0.005

    def __post_init__(self):
        check_numbers(self)

    def factor(self, epoch: int) -> float:
        return self._up(epoch) * self._down(epoch)

    def _up(self, epoch: int) -> float:
        if epoch >= self.warm_up_len:
            return 1.0
        return math.exp(-5.0 * (1.0 - max(epoch, 0.5) / self.warm_up_len) ** 2)  # epoch 0 counts as half an epoch

    def _down(self, epoch: int) -> float:
        if epoch <= self.ramp_down_start:
            return 1.0
        if epoch >= self.ramp_down_start + self.ramp_down_len:
            return self.last_lr_value
        left = (self.ramp_down_len - epoch + self.ramp_down_start) / self.ramp_down_len
        return self.last_lr_value + (1.0 - self.last_lr_value) * left


# name -> config; the keys are the choices on the command line, the first is the default.
SCHEDULES = {
    "warmup_rampdown": WarmupRampdown,
}
