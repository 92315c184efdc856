"""The front end of the DCASE 2024 and 2025 Task 1 baselines; with other numbers that of Tan's entry of 2025.

torchaudio's mel spectrogram: power, HTK mel.triangles, natural logarithm, no normalisation. Sources:
https://github.com/CPJKU/dcase2024_task1_baseline, https://github.com/CPJKU/dcase2025_task1_baseline. Departures: the
published module resamples 44.1 kHz to 32 kHz inside, here the data set does that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.frontends import mel

LOG_OFFSET = 1e-5
RATES = (32000, 44100, 16000, 22050, 48000)  # that saved filters are compared with


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

    resampler = "sinc"
    mask_value = math.log(LOG_OFFSET)  # masked before the logarithm
    normalisation = f"log_mel = ln(power + {LOG_OFFSET:g})"

    def __init__(self, config: Dcase24MelConfig):
        super().__init__(config, torch.hann_window(config.win_length), mel.triangles(config, "htk", None))

    @staticmethod
    def recognise(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Options that the buffers of the published module tell, beside whose network they are saved; else None.

        The hop leaves no trace. The rate and the edges of the bands are those whose filters are the saved ones.
        """
        ends = {"spectrogram.window": "win_length", "mel_scale.fb": "bank"}
        found = {ends[end]: value for name, value in tensors.items() for end in ends if name.endswith(f".{end}")}
        if found.keys() != set(ends.values()) or found["bank"].ndim != 2:
            return None
        n_fft, n_mels = 2 * (len(found["bank"]) - 1), found["bank"].shape[1]
        options = {"n_fft": n_fft, "win_length": len(found["win_length"]), "n_mels": n_mels}
        for rate in RATES:
            config = Dcase24MelConfig(sample_rate=rate, **options)
            if torch.allclose(mel.triangles(config, "htk", None).t(), found["bank"].float(), atol=1e-3):
                return options | {"sample_rate": rate}
        return None

    def compress_(self, bands: Tensor) -> Tensor:
        return bands.add_(LOG_OFFSET).log_()
