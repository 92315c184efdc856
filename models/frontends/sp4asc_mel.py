"""The front end of SP4ASC (valeo.ai, DCASE 2021 Task 1a): librosa's mel filters, in decibels.

Source: https://github.com/valeoai/SP4ASC, with torchlibrosa. Departures: time is the last axis here, as everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.frontends import mel

FLOOR = 1e-10  # of the power, -100 dB


@dataclass(frozen=True)
class Sp4ascMelConfig:
    sample_rate: mel.SampleRate = 44100
    n_fft: mel.NFft = 2048
    win_length: mel.WinLength = 2048
    hop_length: mel.HopLength = 1024
    n_mels: mel.NMels = 256
    f_min: mel.FMin = 0.0
    f_max: mel.FMax = None

    def __post_init__(self):
        mel.check_mel_config(self)


class Sp4ascMel(mel.Mel):
    """Maps waveforms (batch, sample) to mel spectrograms (batch, 1, mel, time) in dB, float32.

    Filters are Slaney's triangles of the same area. Frames: 1 + floor(sample / hop_length), 44 a second.
    """

    mask_value = -100.0  # silence
    normalisation = f"log_mel = 10 * log10(max(power, {FLOOR:g}))"

    def __init__(self, config: Sp4ascMelConfig):
        super().__init__(config, torch.hann_window(config.win_length), mel.triangles(config, "slaney", "slaney"))

    def compress_(self, bands: Tensor) -> Tensor:
        return bands.clamp_min_(FLOOR).log10_().mul_(10)
