"""The front end of the DCASE 2024 and 2025 Task 1 baselines; with other numbers that of Tan's entry of 2025.

torchaudio's mel spectrogram: power, HTK mel.triangles, natural logarithm, no normalisation. Sources:
https://github.com/CPJKU/dcase2024_task1_baseline, https://github.com/CPJKU/dcase2025_task1_baseline. Departures: the
published module resamples 44.1 kHz to 32 kHz inside, here the data set does that.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.frontends import mel

LOG_OFFSET = 1e-5


@dataclass(frozen=True)
class Dcase24MelConfig:
    sample_rate: mel.SampleRate = 32000
    n_fft: mel.NFft = 4096
    win_length: mel.WinLength = 3072
    hop_length: mel.HopLength = 500
    n_mels: mel.NMels = 256
    f_min: mel.FMin = 0.0
    f_max: mel.FMax = None

    def __post_init__(self):
        mel.check_mel_config(self)


class Dcase24Mel(mel.Mel):
    """Maps waveforms (batch, sample) to log-mel spectrograms (batch, 1, mel, time), float32: ln(power + 1e-5).

    Frames: 1 + floor(sample / hop_length), 65 a second at the defaults.
    """

    mask_value = math.log(LOG_OFFSET)  # masked before the logarithm
    normalisation = f"log_mel = ln(power + {LOG_OFFSET:g})"

    def __init__(self, config: Dcase24MelConfig):
        super().__init__(config, torch.hann_window(config.win_length), mel.triangles(config, "htk", None))

    def compress_(self, bands: Tensor) -> Tensor:
        return bands.add_(LOG_OFFSET).log_()
