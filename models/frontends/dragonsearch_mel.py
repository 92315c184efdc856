"""The front end of dragonsearch's DCASE-Task1: torchaudio's mel spectrogram, of which its networks take the power.

Source: https://github.com/dragonsearch/DCASE-Task1. Its module with a logarithm, which its training leaves out, is
`scale` ln. Departures: none.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from models.frontends import mel

LOG_OFFSET = 1e-6


@dataclass(frozen=True)
class DragonsearchMelConfig:
    sample_rate: mel.SampleRate = 32000
    n_fft: mel.NFft = 2048
    win_length: mel.WinLength = 2048
    hop_length: mel.HopLength = 744
    n_mels: mel.NMels = 128
    f_min: mel.FMin = 0.0
    f_max: mel.FMax = None
    scale: Annotated[Literal["power", "ln"], "power, as published; ln: its logarithm"] = "power"

    def __post_init__(self):
        mel.check_mel_config(self)
        if self.scale not in ("power", "ln"):
            raise ValueError(f"scale must be power or ln, got {self.scale!r}")


class DragonsearchMel(mel.Mel):
    """Maps waveforms (batch, sample) to mel spectrograms (batch, 1, mel, time), float32: power, up to some 10,000.

    Frames: 1 + floor(sample / hop_length), 44 a second.
    """

    resampler = "sinc"

    def __init__(self, config: DragonsearchMelConfig):
        super().__init__(config, torch.hann_window(config.win_length), mel.triangles(config, "htk", None))
        is_log = config.scale == "ln"
        self.mask_value = math.log(LOG_OFFSET) if is_log else 0.0
        self.normalisation = f"log_mel = ln(power + {LOG_OFFSET:g})" if is_log else "log_mel = power"

    def compress_(self, bands: Tensor) -> Tensor:
        return bands.add_(LOG_OFFSET).log_() if self.config.scale == "ln" else bands
