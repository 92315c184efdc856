"""The front end of the early DCASE baselines: 40 bands of magnitudes, as dcase_util and easy_dcase_task1 compute them.

Sources: T. Heittola's dcase_util (MelExtractor), https://github.com/DCASE-REPO/dcase_util;
https://github.com/yqcai888/easy_dcase_task1. Departures: none in the result; a batch at a time, on the device.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from models.frontends import mel

EPS = 2.0**-52  # of float64; added to waveform and bands, so that silence has a logarithm
# "asymmetric" is SciPy's word for a window of a period: its last value is not its first again.
WINDOWS = {
    "hamming_asymmetric": (torch.hamming_window, True), "hamming_symmetric": (torch.hamming_window, False),
    "hann_asymmetric": (torch.hann_window, True), "hann_symmetric": (torch.hann_window, False),
}  # fmt: skip


@dataclass(frozen=True)
class Cnn3MelConfig:
    sample_rate: mel.SampleRate = 44100
    n_fft: mel.NFft = 2048
    win_length: mel.WinLength = 1764
    hop_length: mel.HopLength = 882
    n_mels: mel.NMels = 40
    f_min: mel.FMin = 0.0
    f_max: mel.FMax = None
    window_type: Annotated[
        Literal["hamming_asymmetric", "hamming_symmetric", "hann_asymmetric", "hann_symmetric"], "window"
    ] = "hamming_asymmetric"
    spectrogram_type: Annotated[Literal["magnitude", "power"], "what the filters add up"] = "magnitude"
    htk: Annotated[bool, "HTK's mel scale instead of Slaney's"] = False
    normalize_mel_bands: Annotated[bool, "filters with a peak of 1 instead of the same area"] = False
    logarithmic: Annotated[bool, "natural logarithm of the bands"] = True

    def __post_init__(self):
        mel.check_mel_config(self)
        if self.window_type not in WINDOWS:
            raise ValueError(f"window_type must be one of {', '.join(WINDOWS)}, got {self.window_type!r}")
        if self.spectrogram_type not in ("magnitude", "power"):
            raise ValueError(f"spectrogram_type must be magnitude or power, got {self.spectrogram_type!r}")


class Cnn3Mel(mel.Mel):
    """Maps waveforms (batch, sample) to log-mel spectrograms (batch, 1, mel, time), float32.

    Beyond the ends of a clip there are zeros. Frames: 1 + floor(sample / hop_length), 51 a second.
    """

    is_mirrored = False
    offset = EPS

    def __init__(self, config: Cnn3MelConfig):
        make, is_periodic = WINDOWS[config.window_type]
        bank = mel.triangles(config, "htk" if config.htk else "slaney", "slaney")
        if config.normalize_mel_bands:
            bank = bank / bank.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        super().__init__(config, make(config.win_length, periodic=is_periodic), bank)
        self.is_magnitude = config.spectrogram_type == "magnitude"
        kind = "magnitude" if self.is_magnitude else "power"
        self.normalisation = f"log_mel = ln({kind} + {EPS:.17g})" if config.logarithmic else f"log_mel = {kind}"

    def compress_(self, bands: Tensor) -> Tensor:
        return bands.add_(EPS).log_() if self.config.logarithmic else bands
