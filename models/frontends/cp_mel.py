"""Log-mel front ends: waveform -> normalised log-mel spectrogram, on the waveform's own device.

`CpMel` is the front end of the CP-JKU DCASE 2023 systems (student and CP-ResNet; PaSST with other numbers):
pre-emphasis, power spectrum, Kaldi-style triangles on the mel axis, logarithm, fixed normalisation. Departures from the
published code: none in the result; the work is ordered for memory and the filters are applied as narrow bands.
"""

import logging
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bounds import MAX_FFT, MAX_MELS, Bounds, check_hop, check_numbers
from models.frontends.frontend import Frontend

log = logging.getLogger(__name__)

PREEMPHASIS = 0.97
LOG_OFFSET = 1e-5
# out = (ln(power) + SHIFT) / SCALE: about zero mean, unit deviation on AudioSet, for which PaSST chose them.
SHIFT, SCALE = 4.5, 5.0
# Values of a piece of the batch, for each thread: about what stays in a core's cache from window to logarithm.
CPU_CHUNK_VALUES = 1 << 18


@dataclass(frozen=True)
class CpMelConfig:
    sample_rate: Annotated[int, "sampling rate of the waveform in Hz", Bounds(1)] = 32000
    n_fft: Annotated[int, "length of the Fourier transform in samples", Bounds(1, MAX_FFT)] = 4096
    win_length: Annotated[int, "length of the Hann window in samples", Bounds(1, MAX_FFT)] = 3072
    hop_length: Annotated[int, "step from frame to frame in samples", Bounds(1)] = 500
    n_mels: Annotated[int, "number of mel bands", Bounds(1, MAX_MELS)] = 256
    f_min: Annotated[float, "lower edge of the lowest band in Hz", Bounds(0)] = 0.0
    f_max: Annotated[
        float | None, "upper edge of the highest band in Hz; None: half the rate minus half fmax_aug_range", Bounds(0)
    ] = None
    fmin_aug_range: Annotated[
        int, "training: f_min rises by 0 .. this - 1 Hz, drawn per batch; 1 is off", Bounds(1)
    ] = 1
    fmax_aug_range: Annotated[
        int, "training: f_max is drawn per batch from a range this wide in Hz; 1 is off", Bounds(1)
    ] = 1000

    def __post_init__(self):
        check_numbers(self)
        check_hop(self)
        if self.f_max is None:
            object.__setattr__(self, "f_max", float(self.sample_rate // 2 - self.fmax_aug_range // 2))
        if self.n_fft < self.win_length:
            raise ValueError(f"n_fft must be >= win_length ({self.win_length}), got {self.n_fft}")
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"f_min and f_max must satisfy 0 <= f_min < f_max <= {self.sample_rate / 2} Hz (half the sample rate), "
                f"got f_min {self.f_min}, f_max {self.f_max}"
            )
        lowest = self.f_max + self.fmax_aug_range // 2 - (self.fmax_aug_range - 1)
        highest = self.f_min + self.fmin_aug_range - 1
        if lowest <= highest:
            raise ValueError(
                f"training would draw an f_max down to {lowest:g} Hz and an f_min up to {highest:g} Hz: lower "
                f"fmax_aug_range ({self.fmax_aug_range}) or fmin_aug_range ({self.fmin_aug_range}; 1 is off)"
            )


def hz_to_mel(hz: Tensor | float) -> Tensor:
    """Mel scale of Kaldi and HTK: 1127 ln(1 + f / 700)."""
    return 1127.0 * torch.log1p(torch.as_tensor(hz, dtype=torch.float32) / 700.0)


class CpMel(Frontend):
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

    def __init__(self, config: CpMelConfig):
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.win_length, periodic=False), persistent=False)
        bin_hz = torch.arange(config.n_fft // 2) * (config.sample_rate / config.n_fft)
        self.register_buffer("bin_mel", hz_to_mel(bin_hz), persistent=False)  # (bin,); the Nyquist bin has no weight
        self.n_band_bins = self._widest_band()
        edges = torch.tensor([config.f_min, config.f_max], dtype=torch.float32)
        index, weight = self.bands(*edges)
        self.register_buffer("band_index", index, persistent=False)
        self.register_buffer("band_weight", weight, persistent=False)
        n_empty = int((weight.sum(dim=1) == 0).sum())
        if n_empty:
            log.warning(
                "%d of %d mel bands hold no bin of the transform and are constant: raise n_fft or lower n_mels",
                n_empty, config.n_mels,
            )  # fmt: skip

    def forward(self, waveform: Tensor) -> Tensor:
        n_least = self.config.n_fft // 2 + 2
        if waveform.ndim != 2 or waveform.shape[1] < n_least:
            raise ValueError(
                f"waveform must be (batch, sample) with at least n_fft / 2 + 2 = {n_least} samples, got "
                f"{tuple(waveform.shape)}"
            )
        # Spectra need the range of float32, whatever autocast is set to outside.
        with torch.autocast(waveform.device.type, enabled=False), torch.no_grad():
            if self.training and (self.config.fmin_aug_range > 1 or self.config.fmax_aug_range > 1):
                index, weight = self.bands(*self._draw_edges(waveform.device))
            else:
                index, weight = self.band_index, self.band_weight
            return self._log_mel(waveform.float(), index, weight).unsqueeze(1)

    def n_frames(self, n_samples: int) -> int:
        return 1 + (n_samples - 1) // self.config.hop_length

    def for_export(self, n_samples: int, store_matrices: bool = False) -> nn.Module:
        from models.frontends.cp_mel_export import CpMelExport  # which needs this file

        return CpMelExport(self, n_samples, store_matrices)

    def bands(self, f_min: Tensor, f_max: Tensor) -> tuple[Tensor, Tensor]:
        """The filter bank in narrow form: spectrum bins (mel, n) and their weights (mel, n) for edges in Hz.

        A triangle on the mel axis covers few of the bins (of 256 x 2048 weights 3,940 are not zero at the defaults), so
        each filter is stored as a run of `n_band_bins` consecutive bins that surely holds it. Computed on the device of
        the edges, without waiting for it.
        """
        low, high = hz_to_mel(f_min), hz_to_mel(f_max)
        step = (high - low) / (self.config.n_mels + 1)
        left = low + step * torch.arange(self.config.n_mels, device=low.device)  # (mel,)
        first = torch.searchsorted(self.bin_mel, left)  # first bin at or above the left edge
        index = first[:, None] + torch.arange(self.n_band_bins, device=low.device)  # (mel, n)
        inside = index < len(self.bin_mel)
        index = index.clamp_max(len(self.bin_mel) - 1)
        rising = (self.bin_mel[index] - left[:, None]) / step
        falling = (left[:, None] + 2 * step - self.bin_mel[index]) / step
        return index, torch.minimum(rising, falling).clamp_min(0) * inside

    def _draw_edges(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """One pair of band edges in whole Hz, f_min first, as the published code draws them."""
        config = self.config
        f_min = config.f_min + torch.randint(config.fmin_aug_range, (), device=device)
        f_max = config.f_max + config.fmax_aug_range // 2 - torch.randint(config.fmax_aug_range, (), device=device)
        return f_min.float(), f_max.clamp_max(config.sample_rate / 2).float()  # beyond, a band would be empty

    def _widest_band(self) -> int:
        """Bins that the widest filter can cover for any edges that may be drawn: the topmost, for the widest range."""
        config = self.config
        low = hz_to_mel(config.f_min)
        high = hz_to_mel(config.f_max + config.fmax_aug_range // 2)
        step = (high - low) / (config.n_mels + 1)
        width_hz = 700.0 * (torch.exp(high / 1127.0) - torch.exp((high - 2 * step) / 1127.0))
        return min(int(width_hz * config.n_fft / config.sample_rate) + 2, config.n_fft // 2)

    def _log_mel(self, waveform: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Normalised log-mel (batch, mel, time), on a CPU a few clips at a time.

        There the time goes into moving memory, not into the transform, so a piece of the batch goes through all steps
        while it is in the cache, in buffers that are used again. Spectra are kept bin by bin, (bin, clip x time),
        because the weighted sum over the bins of a filter is then a sum of rows: an embedding bag, which is fast on
        CPU and GPU alike.
        """
        config = self.config
        n_clips, n_bins = len(waveform), config.n_fft // 2 + 1
        n_frames = self.n_frames(waveform.shape[-1])
        chunk, offsets = max(1, n_clips), None
        if waveform.device.type == "cpu":
            chunk = min(chunk, max(1, CPU_CHUNK_VALUES * torch.get_num_threads() // (config.n_fft * n_frames)))
            used = weight > 0  # exact bags instead of runs of one length: a quarter of the rows
            offsets = F.pad(used.sum(1).cumsum(0), (1, 0))[:-1]
            index, weight = index[used], weight[used]
        log_mel = waveform.new_empty(n_clips, config.n_mels, n_frames)
        windowed = waveform.new_zeros(chunk, n_frames, config.n_fft)
        spectrum = waveform.new_empty(chunk * n_frames, n_bins, dtype=torch.complex64)
        by_bin = waveform.new_empty(n_bins, chunk * n_frames, dtype=torch.complex64)
        # The window is centred in n_fft samples; where it stands in the transform changes the phase alone.
        offset = (config.n_fft - config.win_length) // 2
        for start in range(0, n_clips, chunk):
            clips, into = waveform[start : start + chunk], log_mel[start : start + chunk]
            n = len(clips) * n_frames
            emphasised = torch.add(clips[:, 1:], clips[:, :-1], alpha=-PREEMPHASIS)
            padded = F.pad(emphasised, (config.n_fft // 2, config.n_fft // 2), mode="reflect")
            frames = padded[:, offset:].unfold(1, config.win_length, config.hop_length)[:, :n_frames]
            torch.mul(frames, self.window, out=windowed[: len(clips), :, : config.win_length])
            torch.fft.rfft(windowed[: len(clips)].flatten(0, 1), out=spectrum[:n])
            squared = torch.view_as_real(by_bin[:, :n].copy_(spectrum[:n].t())).square_()  # (bin, clip x time, 2)
            # Real and imaginary part stand side by side in each row and are added last.
            sums = F.embedding_bag(index, squared.flatten(1), offsets, mode="sum", per_sample_weights=weight)
            sums = sums.view(config.n_mels, len(clips), n_frames, 2)
            torch.add(sums[..., 0], sums[..., 1], out=into.transpose(0, 1))
            into.add_(LOG_OFFSET).log_().add_(SHIFT).div_(SCALE)
        return log_mel
