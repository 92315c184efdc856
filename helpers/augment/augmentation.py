"""What an augmentation is, and what it may know of the run that it is built for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from datasets.waveforms import Batch, Clips


@dataclass(frozen=True)
class Setting:
    """The run that a chain of augmentations is built for."""

    clips: Clips  # the training part
    mask_value: float = 0.0  # of a masked cell, on the scale of the front end's output
    teacher_temperature: float | None = None  # at which the loss reads teacher logits; None without a teacher
    responses: Path | None = None  # impulse responses that come with the data set
    sample_rate: int = 32000  # of the waveforms in Hz
    shape: tuple[int, int] | None = None  # (mel, time) of a clip's spectrogram; None is not known


class Augmentation(nn.Module):
    """Maps a `Batch` to a new one; inert in eval mode. Draws from the global generator of the batch's device."""

    stage: Literal["waveform", "log_mel"]  # whether it goes before or after the front end

    @classmethod
    def from_config(cls, config: Any, setting: Setting) -> nn.Module:
        """Builds it from its options; most need nothing else."""
        return cls(config)

    def forward(self, batch: Batch) -> Batch:
        raise NotImplementedError

    def digests(self) -> Mapping[str, str]:
        """What is in files that it reads, by a name for people: a run is resumed with the same ones."""
        return {}
