"""Learning-rate schedules by name. A schedule is its own config, and gives each step a factor of the peak rate."""

import math
from dataclasses import dataclass
from typing import Annotated

from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class Place:
    """Where a step stands in training.

    Args:
        epoch: epochs finished.
        step: steps done in the current epoch, which has `n_steps`.
        n_epochs: of the whole training.
    """

    epoch: int
    step: int = 0
    n_steps: int = 1
    n_epochs: int = 1


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

    def factor(self, place: Place) -> float:
        return self._up(place.epoch) * self._down(place.epoch)

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


@dataclass(frozen=True)
class Cosine:
    """Half a cosine over all epochs, set once an epoch, as SP4ASC has it (there to 0.01 of lr).

    Source: I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
    https://arxiv.org/abs/1608.03983, without restarts.
    """

    last_lr_value: Annotated[float, "rate at the end, relative to lr", Bounds(0, 1)] = 0.01

    def __post_init__(self):
        check_numbers(self)

    def factor(self, place: Place) -> float:
        return _cosine(min(place.epoch / place.n_epochs, 1.0), self.last_lr_value)


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up and then a cosine to the last step, set at every step.

    The DCASE 2024 and 2025 baselines warm up for 2,000 steps and take half a turn, to 0; Tan (2025) warms up for 20 and
    takes 0.4 turns, to 0.0955 of lr. As published, the first step has rate 0.
    """

    warmup_steps: Annotated[int, "steps of linear warm-up; 0 is off", Bounds(0)] = 2000
    cosine_turns: Annotated[float, "turns of the cosine after it", Bounds(0, 100)] = 0.5

    def __post_init__(self):
        check_numbers(self)

    def factor(self, place: Place) -> float:
        step, n_steps = place.epoch * place.n_steps + place.step, place.n_epochs * place.n_steps
        if step < self.warmup_steps:
            return step / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, n_steps - self.warmup_steps)
        return max(0.0, _cosine(2 * self.cosine_turns * share))


@dataclass(frozen=True)
class WarmRestarts:
    """Half a cosine again and again, from lr to the last value; source as for `Cosine`.

    easy_dcase_task1: 10 epochs, each cycle twice as long as the one before, set once an epoch. dragonsearch: cycles of
    30 epochs down to 0.001 of lr, set at every step (there each step has the rate of the one before it).
    """

    restart_epochs: Annotated[int, "epochs of the first cycle", Bounds(1)] = 10
    restart_factor: Annotated[int, "each cycle is so many times as long as the one before", Bounds(1)] = 2
    last_lr_value: Annotated[float, "rate at the end of a cycle, relative to lr", Bounds(0, 1)] = 0.0
    every_step: Annotated[bool, "sets the rate at every step, not once an epoch"] = False

    def __post_init__(self):
        check_numbers(self)

    def factor(self, place: Place) -> float:
        since, length = place.epoch, self.restart_epochs  # whole epochs since the last restart
        if self.restart_factor == 1:
            since %= length
        while since >= length:
            since, length = since - length, length * self.restart_factor
        within = place.step / place.n_steps if self.every_step else 0.0
        return _cosine((since + within) / length, self.last_lr_value)


def _cosine(share: float, last: float = 0.0) -> float:
    """From 1 at share 0 to `last` at share 1, along half a turn; beyond that it rises again."""
    return last + (1.0 - last) * (1.0 + math.cos(math.pi * share)) / 2


# name -> config; the keys are the choices on the command line, the first is the default.
SCHEDULES = {
    "warmup_rampdown": WarmupRampdown,
    "cosine": Cosine,
    "warmup_cosine": WarmupCosine,
    "warm_restarts": WarmRestarts,
}
