"""Means of a network's weights over training: what is scored and kept, while the weights themselves go on learning.

Running statistics of norms are averaged like weights, which needs no further pass through the data: each is the
statistic of a network close to the mean. Counters are the latest.

Sources: B. T. Polyak, A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim.
1992; P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
https://arxiv.org/abs/1803.05407; over last epochs as Li's entry to DCASE 2025 Task 1, but not chosen on test data.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from helpers.distributed import Processes

log = logging.getLogger(__name__)


class WeightAverage:
    """None: the network's own weights are scored and kept."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.live = model.state_dict()  # the network's own tensors: they change with it
        self.n = 0  # weights that went into the mean; 0: there is none yet
        self.values: dict[str, Tensor] = {}  # the mean; while it is in use, what learns
        self.in_use = False

    def after_step(self) -> None:
        """Called after every step of the optimizer."""

    def finish_epoch(self, epoch: int, n_epochs: int, processes: Processes) -> None:
        """Called at the end of every epoch, by all processes together.

        Args:
            epoch: its number, from 0.
            n_epochs: of the whole training.
        """

    @contextmanager
    def scored(self) -> Iterator[None]:
        """Puts the mean in the place of the weights, where there is one, and the weights back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self.n == 0:
            return
        for name, value in self.live.items():
            kept = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(kept)
        self.in_use = not self.in_use

    @torch.no_grad()
    def _add(self, share: float) -> None:
        """Moves the mean towards the weights, by a share of the way."""
        if self.n == 0:
            self.values = {name: value.clone() for name, value in self.live.items()}
        floats = [name for name, value in self.live.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in floats], [self.live[name] for name in floats], share)
        for name in self.live.keys() - set(floats):
            self.values[name].copy_(self.live[name])
        self.n += 1

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds beside the mean, which is its network; nothing where there is none."""
        if self.n == 0:
            return {}
        return {"learning": self.values if self.in_use else self.live, "average": {"n": self.n}}

    def mean(self) -> Mapping[str, Tensor]:
        """The state dict to score and keep."""
        return self.values if self.n and not self.in_use else self.live

    def restore(self, content: Mapping[str, Any]) -> None:
        """Puts mean and weights back to what a checkpoint holds.

        Raises:
            RuntimeError: for the state of another network.
        """
        if "average" not in content:
            return
        self.model.load_state_dict(content["model"]["state"])
        self.values = {name: value.clone() for name, value in self.live.items()}
        self.model.load_state_dict(content["learning"])
        self.n = content["average"]["n"]


class ExponentialAverage(WeightAverage):
    """Moving average over the steps: of each, a share of `decay` stays.

    The first steps count more, (1 + n) / (10 + n) after n of them: else a short training would keep its random start.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    def after_step(self) -> None:
        self._add(1 - min(self.decay, (1 + self.n) / (10 + self.n)))

    def finish_epoch(self, epoch: int, n_epochs: int, processes: Processes) -> None:
        processes.share_tensors(self.values.values())  # norms see other clips in each process


class LastEpochs(WeightAverage):
    """Mean of the weights at the ends of the last `n_last` epochs; until then the weights themselves."""

    def __init__(self, model: nn.Module, n_last: int):
        super().__init__(model)
        self.n_last = n_last
        self.ends = 0  # epochs of the training whose last ones these are
        self.latest = -1  # epoch that the mean ends with

    def finish_epoch(self, epoch: int, n_epochs: int, processes: Processes) -> None:
        if self.n and self.ends != n_epochs:
            log.warning("training goes on to epoch %d: the mean of the last weights begins anew", n_epochs)
            self.n = 0
        self.ends = n_epochs
        # A run that stopped while it was scored ends its epoch a second time.
        if epoch >= n_epochs - self.n_last and (self.n == 0 or epoch > self.latest):
            self._add(1 / (self.n + 1))
            self.latest = epoch

    def saved(self) -> dict[str, Any]:
        saved = super().saved()
        return saved | {"average": {"n": self.n, "ends": self.ends, "latest": self.latest}} if saved else {}

    def restore(self, content: Mapping[str, Any]) -> None:
        super().restore(content)
        saved = content.get("average", {})
        self.ends, self.latest = saved.get("ends", 0), saved.get("latest", -1)
