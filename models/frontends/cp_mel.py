"""The front end of the CP-JKU DCASE 2023 systems (student and CP-ResNet; PaSST with other numbers).

Pre-emphasis, power spectrum, Kaldi-style triangles on the mel axis, logarithm, fixed normalisation. In training the
edges of the bands may be drawn anew for every batch. Source: https://github.com/fschmid56/cpjku_dcase23.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from models.bounds import Bounds, check_numbers
from models.frontends import mel

PREEMPHASIS = 0.97
LOG_OFFSET = 1e-5
# out = (ln(power) + SHIFT) / SCALE: about zero mean, unit deviation on AudioSet, for which PaSST chose them.
SHIFT, SCALE = 4.5, 5.0


@dataclass(frozen=True)
class CpMelConfig:
    sample_rate: mel.SampleRate = 32000
    n_fft: mel.NFft = 4096
    win_length: mel.WinLength = 3072
    hop_length: mel.HopLength = 500
    n_mels: mel.NMels = 256
    f_min: mel.FMin = 0.0
    f_max: Annotated[
        float | None, "upper edge of the highest band in Hz; None: half the rate minus half fmax_aug_range", Bounds(0)
    ] = None
    bank_rate: Annotated[
        int | None, "rate in Hz that the filters are made for, where it is not the waveform's; None: it is", Bounds(1)
    ] = None
    fmin_aug_range: Annotated[
        int, "training: f_min rises by 0 .. this - 1 Hz, drawn per batch; 1 is off", Bounds(1)
    ] = 1
    fmax_aug_range: Annotated[
        int, "training: f_max is drawn per batch from a range this wide in Hz; 1 is off", Bounds(1)
    ] = 1000

    def __post_init__(self):
        check_numbers(self)
        if self.f_max is None:
            object.__setattr__(self, "f_max", float(self.filter_rate // 2 - self.fmax_aug_range // 2))
        mel.check_mel_config(self)
        lowest = self.f_max + self.fmax_aug_range // 2 - (self.fmax_aug_range - 1)
        highest = self.f_min + self.fmin_aug_range - 1
        if lowest <= highest:
            raise ValueError(
                f"training would draw an f_max down to {lowest:g} Hz and an f_min up to {highest:g} Hz: lower "
                f"fmax_aug_range ({self.fmax_aug_range}) or fmin_aug_range ({self.fmin_aug_range}; 1 is off)"
            )

    @property
    def filter_rate(self) -> int:
        """What the filters take for the rate of the waveform, in Hz: one published network does not resample."""
        return self.bank_rate or self.sample_rate


def hz_to_mel(hz: Tensor | float) -> Tensor:
    """Mel scale of Kaldi and HTK: 1127 ln(1 + f / 700)."""
    return 1127.0 * torch.log1p(torch.as_tensor(hz, dtype=torch.float32) / 700.0)


def kaldi_triangles(
    bin_mel: Tensor, n_mels: int, n_band_bins: int, f_min: Tensor, f_max: Tensor
) -> tuple[Tensor, Tensor]:
    """Kaldi's filter bank in narrow form: spectrum bins (mel, n) and their weights (mel, n) for edges in Hz.

    A triangle on the mel axis covers few of the bins (of 256 x 2048 weights 3,940 are not zero at the defaults), so
    each filter is a run of `n_band_bins` consecutive bins that surely holds it. Computed on the device of the edges,
    without waiting for it.

    Args:
        bin_mel: (bin,) mel of each bin below the Nyquist bin, which has no weight.
    """
    low, high = hz_to_mel(f_min), hz_to_mel(f_max)
    step = (high - low) / (n_mels + 1)
    left = low + step * torch.arange(n_mels, device=low.device)  # (mel,)
    first = torch.searchsorted(bin_mel, left)  # first bin at or above the left edge
    index = first[:, None] + torch.arange(n_band_bins, device=low.device)  # (mel, n)
    inside = index < len(bin_mel)
    index = index.clamp_max(len(bin_mel) - 1)
    rising = (bin_mel[index] - left[:, None]) / step
    falling = (left[:, None] + 2 * step - bin_mel[index]) / step
    return index, torch.minimum(rising, falling).clamp_min(0) * inside


def widest_band(config: CpMelConfig) -> int:
    """Bins that the widest filter can cover for any edges that may be drawn: the topmost, for the widest range."""
    low = hz_to_mel(config.f_min)
    high = hz_to_mel(config.f_max + config.fmax_aug_range // 2)
    step = (high - low) / (config.n_mels + 1)
    width_hz = 700.0 * (torch.exp(high / 1127.0) - torch.exp((high - 2 * step) / 1127.0))
    return min(int(width_hz * config.n_fft / config.filter_rate) + 2, config.n_fft // 2)


class CpMel(mel.Mel):
    """Maps waveforms (batch, sample) to normalised log-mel spectrograms (batch, 1, mel, time), float32.

    Frames: 1 + floor((sample - 1) / hop_length). In training mode the band edges are drawn anew for each batch from the
    global generator of the waveform's device; in eval mode they are exactly f_min and f_max. No parameters, no state.

    Raises:
        ValueError: for clips too short for one reflected frame (n_fft / 2 + 2 samples).
    """

    # What a masked cell holds: 0 on the logarithmic scale, before normalisation.
    mask_value = SHIFT / SCALE
    # From the power in a band to the output, for the metadata of files.
    normalisation = f"log_mel = (ln(power + {LOG_OFFSET:g}) + {SHIFT:g}) / {SCALE:g}"

    preemphasis = PREEMPHASIS

    def __init__(self, config: CpMelConfig):
        bin_hz = torch.arange(config.n_fft // 2) * (config.filter_rate / config.n_fft)
        bin_mel, n_band_bins = hz_to_mel(bin_hz), widest_band(config)
        edges = torch.tensor([config.f_min, config.f_max], dtype=torch.float32)
        bank = kaldi_triangles(bin_mel, config.n_mels, n_band_bins, *edges)
        super().__init__(config, torch.hann_window(config.win_length, periodic=False), bank)
        self.register_buffer("bin_mel", bin_mel, persistent=False)  # (bin,)
        self.n_band_bins = n_band_bins

    def compress_(self, bands: Tensor) -> Tensor:
        return bands.add_(LOG_OFFSET).log_().add_(SHIFT).div_(SCALE)

    def bands_of_batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.training and (self.config.fmin_aug_range > 1 or self.config.fmax_aug_range > 1):
            return self.bands(*self._draw_edges(device))
        return super().bands_of_batch(device)

    def bands(self, f_min: Tensor, f_max: Tensor) -> tuple[Tensor, Tensor]:
        """The filters for edges in Hz, as `kaldi_triangles` gives them."""
        return kaldi_triangles(self.bin_mel, self.config.n_mels, self.n_band_bins, f_min, f_max)

    def _draw_edges(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """One pair of band edges in whole Hz, f_min first, as the published code draws them."""
        config = self.config
        f_min = config.f_min + torch.randint(config.fmin_aug_range, (), device=device)
        f_max = config.f_max + config.fmax_aug_range // 2 - torch.randint(config.fmax_aug_range, (), device=device)
        return f_min.float(), f_max.clamp_max(config.filter_rate / 2).float()  # beyond, a band would be empty
