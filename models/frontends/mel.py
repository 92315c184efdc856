"""The one core of the mel front ends: waveform -> spectrum -> mel bands -> scale, on the waveform's own device.

A front end is this plus what sets it apart: window, filters, and what is done to the bands. Departures of all of them
from the published code: none in the result; the work is ordered for memory and filters are applied as narrow bands.
"""

import logging
import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bounds import MAX_FFT, MAX_MELS, Bounds, check_hop, check_numbers
from models.frontends.frontend import Frontend

log = logging.getLogger(__name__)

# Values of a piece of the batch, for each thread: about what stays in a core's cache from window to logarithm.
CPU_CHUNK_VALUES = 1 << 18

# Fields that all configs have.
SampleRate = Annotated[int, "sampling rate of the waveform in Hz", Bounds(1)]
NFft = Annotated[int, "length of the Fourier transform in samples", Bounds(1, MAX_FFT)]
WinLength = Annotated[int, "length of the window in samples", Bounds(1, MAX_FFT)]
HopLength = Annotated[int, "step from frame to frame in samples", Bounds(1)]
NMels = Annotated[int, "number of mel bands", Bounds(1, MAX_MELS)]
FMin = Annotated[float, "lower edge of the lowest band in Hz", Bounds(0)]
FMax = Annotated[float | None, "upper edge of the highest band in Hz; None: half the rate", Bounds(0)]


def check_mel_config(config: Any) -> None:
    """The checks of a config with the fields above; `f_max` None becomes half the rate.

    Raises:
        ValueError: naming the field.
    """
    check_numbers(config)
    check_hop(config)
    rate = getattr(config, "filter_rate", config.sample_rate)
    if config.f_max is None:
        object.__setattr__(config, "f_max", rate / 2)
    if config.n_fft < config.win_length:
        raise ValueError(f"n_fft must be >= win_length ({config.win_length}), got {config.n_fft}")
    if not 0 <= config.f_min < config.f_max <= rate / 2:
        raise ValueError(
            f"f_min and f_max must satisfy 0 <= f_min < f_max <= {rate / 2} Hz (half the sample rate), "
            f"got f_min {config.f_min}, f_max {config.f_max}"
        )


class Mel(Frontend):
    """Maps waveforms (batch, sample) to mel spectrograms (batch, 1, mel, time), float32. No parameters, no state.

    Frames are centred at 0, hop_length, ... of the waveform, or begin there.

    Args:
        window: (sample,), as long as a frame; stands in the middle of n_fft samples.
        bank: filters (mel, n_fft / 2 + 1), or in the narrow form of `narrow`. The Nyquist bin has no weight.

    Raises:
        ValueError: from `forward`, for clips that are too short for one frame with its mirrored ends.
    """

    preemphasis = 0.0  # y[t] = x[t + 1] - preemphasis * x[t]; 0: y = x
    offset = 0.0  # added to every sample
    is_centred = True  # else the first frame begins with the clip, and the last one is whole
    is_mirrored = True  # the ends of the clip, where frames reach beyond them; else zeros stand there
    removes_mean = False  # of the samples of every frame, before preemphasis
    warns_of_empty_bands = True
    is_magnitude = False  # filters sum magnitudes instead of powers

    def __init__(self, config: Any, window: Tensor, bank: Tensor | tuple[Tensor, Tensor]):
        super().__init__()
        self.config = config
        self.register_buffer("window", window, persistent=False)
        index, weight = narrow(bank[:, : config.n_fft // 2]) if isinstance(bank, Tensor) else bank
        self.register_buffer("band_index", index, persistent=False)
        self.register_buffer("band_weight", weight, persistent=False)
        n_empty = int((weight.sum(dim=1) == 0).sum())
        if n_empty and self.warns_of_empty_bands:
            log.warning(
                "%d of %d mel bands hold no bin of the transform and are constant: raise n_fft or lower n_mels",
                n_empty, config.n_mels,
            )  # fmt: skip

    def compress_(self, bands: Tensor) -> Tensor:
        """What is done to the sums of the filters, in place."""
        raise NotImplementedError

    def bands_of_batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The filters for one batch."""
        return self.band_index, self.band_weight

    def forward(self, waveform: Tensor) -> Tensor:
        n_least = self.least_samples
        if waveform.ndim != 2 or waveform.shape[1] < n_least:
            raise ValueError(
                f"waveform must be (batch, sample) with at least {n_least} samples for n_fft {self.config.n_fft}, got "
                f"{tuple(waveform.shape)}"
            )
        # Spectra need the range of float32, whatever autocast is set to outside.
        with torch.autocast(waveform.device.type, enabled=False), torch.no_grad():
            waveform = waveform.float() + self.offset if self.offset else waveform.float()
            return self._bands(waveform, *self.bands_of_batch(waveform.device)).unsqueeze(1)

    @property
    def least_samples(self) -> int:
        """Of a waveform."""
        if not self.is_centred:
            return len(self.window) + bool(self.preemphasis)
        return (self.config.n_fft // 2 + 1 if self.is_mirrored else 1) + bool(self.preemphasis)

    def n_frames(self, n_samples: int) -> int:
        if n_samples < self.least_samples:
            raise ValueError(f"clips must have at least {self.least_samples} samples, got {n_samples}")
        n = n_samples - bool(self.preemphasis)
        return 1 + (n if self.is_centred else n - len(self.window)) // self.config.hop_length

    def for_export(self, n_samples: int, store_matrices: bool = False) -> nn.Module:
        from models.frontends.mel_export import MelExport  # which needs this file

        return MelExport(self, n_samples, store_matrices)

    def _bands(self, waveform: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Bands (batch, mel, time), on a CPU a few clips at a time.

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
        bands = waveform.new_empty(n_clips, config.n_mels, n_frames)
        windowed = waveform.new_zeros(chunk, n_frames, config.n_fft)
        spectrum = waveform.new_empty(chunk * n_frames, n_bins, dtype=torch.complex64)
        by_bin = waveform.new_empty(n_bins, chunk * n_frames, dtype=torch.complex64)
        for start in range(0, n_clips, chunk):
            clips, into = waveform[start : start + chunk], bands[start : start + chunk]
            n = len(clips) * n_frames
            self._window(clips, windowed[: len(clips), :, : len(self.window)])
            torch.fft.rfft(windowed[: len(clips)].flatten(0, 1), out=spectrum[:n])
            squared = torch.view_as_real(by_bin[:, :n].copy_(spectrum[:n].t())).square_()  # (bin, clip x time, 2)
            if self.is_magnitude:
                rows = squared.sum(dim=2).sqrt_()  # (bin, clip x time)
                sums = F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weight)
                into.transpose(0, 1).copy_(sums.view(config.n_mels, len(clips), n_frames))
            else:  # real and imaginary part stand side by side in each row and are added last
                sums = F.embedding_bag(index, squared.flatten(1), offsets, mode="sum", per_sample_weights=weight)
                sums = sums.view(config.n_mels, len(clips), n_frames, 2)
                torch.add(sums[..., 0], sums[..., 1], out=into.transpose(0, 1))
            self.compress_(into)
        return bands

    def _window(self, waveform: Tensor, out: Tensor) -> None:
        """Writes the frames under the window to `out` (batch, time, sample)."""
        config, clips = self.config, waveform
        if self.preemphasis:
            clips = torch.add(clips[:, 1:], clips[:, :-1], alpha=-self.preemphasis)
        if self.is_centred:
            half = config.n_fft // 2
            clips = F.pad(clips, (half, half), mode="reflect" if self.is_mirrored else "constant")
            # Where the window stands among the n_fft samples of the transform changes the phase alone.
            clips = clips[:, (config.n_fft - len(self.window)) // 2 :]
        frames = clips.unfold(1, len(self.window), config.hop_length)[:, : out.shape[1]]
        if self.removes_mean:
            # Taken out after preemphasis, as the same multiple: of a constant frame exactly nothing is left.
            means = frame_means(waveform, len(self.window) + bool(self.preemphasis), config.hop_length)
            frames = torch.sub(frames, torch.add(means, means, alpha=-self.preemphasis), out=out)
        torch.mul(frames, self.window, out=out)


def frame_means(waveform: Tensor, n: int, hop_length: int) -> Tensor:
    """Mean of each whole frame of n samples, (batch, time, 1), from sums over the parts that frames have in common."""
    part = math.gcd(n, hop_length)
    sums = waveform[:, : waveform.shape[1] // part * part].unflatten(1, (-1, part)).sum(dim=2)  # (batch, part)
    return sums.unfold(1, n // part, hop_length // part).sum(dim=2, keepdim=True) / n


def narrow(bank: Tensor) -> tuple[Tensor, Tensor]:
    """A filter bank (mel, bin), mostly zeros, as runs of bins: their numbers (mel, n) and weights (mel, n)."""
    n_bins, used = bank.shape[1], bank > 0
    bins = torch.arange(n_bins)
    first = torch.where(used, bins, n_bins).amin(1).clamp_max(n_bins - 1)  # of an empty band, any
    last = torch.where(used, bins, 0).amax(1).maximum(first)
    index = (first[:, None] + torch.arange(int((last - first).max()) + 1)).clamp_max(n_bins - 1)
    weight = bank.gather(1, index) * (index > F.pad(index, (1, 0), value=-1)[:, :-1])  # the last bin once
    return index, weight


def triangles(config: Any, mel_scale: str, norm: str | None) -> Tensor:
    """Triangles whose slopes are linear in Hz, (mel, n_fft / 2 + 1), as torchaudio and librosa make them.

    Args:
        mel_scale: "htk" or "slaney".
        norm: "slaney" for the same area, None for a peak of 1.
    """
    from torchaudio.functional import melscale_fbanks  # slow to import

    bank = melscale_fbanks(
        config.n_fft // 2 + 1, config.f_min, config.f_max, config.n_mels, config.sample_rate, norm, mel_scale
    )
    return bank.t().contiguous()
