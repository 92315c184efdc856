"""Time roll: a random circular shift of each clip."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from datasets.waveforms import Batch
from helpers.augment.augmentation import Augmentation, Setting
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class TimeRollConfig:
    roll: Annotated[int, "largest circular shift of a clip, in samples; 0 is off", Bounds(0)] = 4000
    roll_p: Annotated[float, "share of clips that are rolled; 0 is off", Bounds(0, 1)] = 1.0

    def __post_init__(self):
        check_numbers(self)


class TimeRoll(Augmentation):
    """Rolls each clip by its own random shift; what leaves one end enters the other.

    Args:
        max_shift: largest shift to either side, in samples, itself included; 0 is off.
        p: share of the clips; 0 is off.

    Raises:
        ValueError: for a value out of range.
    """

    stage = "waveform"

    def __init__(self, max_shift: int, p: float = 1.0):
        super().__init__()
        if max_shift < 0:
            raise ValueError(f"roll must be >= 0 samples, got {max_shift}")
        if not 0 <= p <= 1:
            raise ValueError(f"roll_p must be in [0, 1], got {p}")
        self.max_shift, self.p = max_shift, p

    @classmethod
    def from_config(cls, config: TimeRollConfig, setting: Setting) -> "TimeRoll":
        return cls(config.roll, config.roll_p)

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.max_shift == 0 or self.p == 0:
            return batch
        waveform = batch.waveform  # (batch, sample)
        n_clips, n_samples = waveform.shape
        shift = torch.randint(-self.max_shift, self.max_shift + 1, (n_clips,), device=waveform.device)
        if self.p < 1:
            shift = shift * (torch.rand(n_clips, device=waveform.device) < self.p)
        roll = copied if waveform.device.type == "cpu" else gathered
        return replace(batch, waveform=roll(waveform, shift % n_samples))


def copied(waveform: Tensor, shift: Tensor) -> Tensor:
    """Waveforms (batch, sample) rolled to the right by shifts (batch,), from 0 to below the length.

    Two copies for each clip, whose shifts a GPU would have to be waited for.
    """
    n_samples = waveform.shape[1]
    rolled = torch.empty_like(waveform)
    for old, new, n in zip(waveform.unbind(), rolled.unbind(), shift.tolist(), strict=True):
        new[n:] = old[: n_samples - n]
        new[:n] = old[n_samples - n :]
    return rolled


def gathered(waveform: Tensor, shift: Tensor) -> Tensor:
    """The same on the device alone: a shifted copy is a window into the clip written twice."""
    n_clips, n_samples = waveform.shape
    windows = torch.cat([waveform, waveform], dim=1).unfold(1, n_samples, 1)  # (batch, sample + 1, sample), a view
    return windows[torch.arange(n_clips, device=waveform.device), (n_samples - shift) % n_samples]
