"""Kaldi filter banks, batched: the front end of BEATs.

Source: D. Povey et al., "The Kaldi Speech Recognition Toolkit", ASRU 2011 (`compute-fbank-feats`, as in
`torchaudio.compliance.kaldi.fbank` without dither), with the settings and the normalisation of S. Chen et al., "BEATs:
Audio Pre-Training with Acoustic Tokenizers", ICML 2023, https://github.com/microsoft/unilm/tree/master/beats.
Departures: none in the result, to rounding; a batch takes a few calls instead of some fifty for every clip.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from models.bounds import MAX_FFT, MAX_MELS, MOST, Bounds, check_hop, check_numbers
from models.frontends.frontend import Frontend

PREEMPHASIS = 0.97
POVEY_EXPONENT = 0.85  # the window is a Hann window to this power
FULL_SCALE = 2.0**15  # Kaldi computes on 16-bit sample values
POWER_FLOOR = torch.finfo(torch.float32).eps
GROUP = 16  # neighbouring filters that are applied in one matrix product
# Values of a piece of the batch, for each thread: small enough for the caches, large enough for the time of the calls.
CPU_CHUNK_VALUES = 1 << 19


@dataclass(frozen=True)
class KaldiFbankConfig:
    sample_rate: Annotated[int, "sampling rate of the waveform in Hz", Bounds(1)] = 16000
    win_length: Annotated[int | None, "length of a frame in samples; None: 25 ms", Bounds(3, MAX_FFT)] = None
    hop_length: Annotated[int | None, "step from frame to frame in samples; None: 10 ms", Bounds(1)] = None
    n_mels: Annotated[int, "number of mel bands", Bounds(1, MAX_MELS)] = 128
    f_min: Annotated[float, "lower edge of the lowest band in Hz", Bounds(0)] = 20.0
    f_max: Annotated[float | None, "upper edge of the highest band in Hz; None: half the rate", Bounds(0)] = None
    dataset_mean: Annotated[float, "subtracted from the logarithm; BEATs' value for AudioSet", Bounds(-MOST)] = 15.41663
    dataset_std: Annotated[
        float, "the result is divided by twice this; BEATs' value for AudioSet", Bounds(0, above=True)
    ] = 6.55582

    def __post_init__(self):
        check_numbers(self)
        for name, default in (
            ("win_length", self.sample_rate * 25 // 1000),
            ("hop_length", self.sample_rate * 10 // 1000),
            ("f_max", self.sample_rate / 2),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_numbers(self)  # of a low rate, 10 ms are no sample
        check_hop(self)
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"f_min and f_max must satisfy 0 <= f_min < f_max <= {self.sample_rate / 2} Hz (half the sample rate), "
                f"got f_min {self.f_min}, f_max {self.f_max}"
            )

    @property
    def n_fft(self) -> int:
        """Length of the Fourier transform in samples: the frame's, rounded up to a power of two."""
        return 1 << (self.win_length - 1).bit_length()


def mel_bank(config: KaldiFbankConfig) -> Tensor:
    """Kaldi's triangles on the mel axis, (mel, n_fft / 2): unit peak; the Nyquist bin has no weight.

    In float32, step by step as Kaldi does it: a bin that stands on the edge of a filter has a weight of rounding alone,
    and where it is the only one of a narrow filter, its logarithm depends on that rounding.
    """
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (config.f_min, config.f_max))
    step = (high - low) / (config.n_mels + 1)
    band = torch.arange(config.n_mels)[:, None]
    left, centre, right = low + band * step, low + (band + 1.0) * step, low + (band + 2.0) * step  # (mel, 1)
    bin_hz = config.sample_rate / config.n_fft * torch.arange(config.n_fft // 2)
    mel = 1127.0 * (1.0 + bin_hz / 700.0).log()  # (bin,)
    return torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp_min(0)


class KaldiFbank(Frontend):
    """Maps waveforms (batch, sample) in [-1, 1] to normalised filter banks (batch, 1, mel, time), float32.

    Frames: 1 + floor((sample - win_length) / hop_length); there is no padding, the samples after the last whole frame
    are not used. The result is the same in training and eval mode. No parameters, no state. In memory the mel axis runs
    fastest, as `Beats` reads it.

    Raises:
        ValueError: for clips shorter than one frame.
    """

    # What a masked cell holds: 0, about the mean of AudioSet, as in the published fine-tuning.
    mask_value = 0.0

    def __init__(self, config: KaldiFbankConfig):
        super().__init__()
        self.config = config
        window = torch.hann_window(config.win_length, periodic=False).pow(POVEY_EXPONENT)
        # The first sample of a frame has weight 0, so frames start at the second. Scaling by a power of two is exact.
        self.register_buffer("window", FULL_SCALE * window[1:], persistent=False)
        bank = mel_bank(config)
        # A row for the real and one for the imaginary part of each bin: their squares are added in the product.
        self.register_buffer("bank", bank.t().repeat_interleave(2, dim=0), persistent=False)  # (2 bins, mel)
        self.groups = []  # slices of mel bands, and of the rows of `bank` that they read
        for first in range(0, config.n_mels, GROUP):
            used = bank[first : first + GROUP].any(dim=0).nonzero().flatten().tolist() or [0]
            self.groups.append((slice(first, first + GROUP), slice(2 * used[0], 2 * used[-1] + 2)))

    def forward(self, waveform: Tensor) -> Tensor:
        if waveform.ndim != 2 or waveform.shape[1] < self.config.win_length:
            raise ValueError(
                f"waveform must be (batch, sample) with at least {self.config.win_length} samples, one frame, "
                f"got {tuple(waveform.shape)}"
            )
        n_frames = self.n_frames(waveform.shape[1])
        # Made outside of inference mode: training needs the result in its graph.
        fbank = waveform.new_empty(len(waveform), n_frames, self.config.n_mels, dtype=torch.float32)
        if len(waveform):
            # Spectra need the range of float32, whatever autocast is set to outside.
            with torch.autocast(waveform.device.type, enabled=False), torch.inference_mode():
                self._fbank(waveform.detach().float(), fbank)
        return fbank.transpose(1, 2).unsqueeze(1)

    def n_frames(self, n_samples: int) -> int:
        return 1 + (n_samples - self.config.win_length) // self.config.hop_length

    def for_export(self, n_samples: int, store_matrices: bool = False) -> nn.Module:
        raise ValueError("front end KaldiFbank has no form for files: export the network alone (--inputs network)")

    @property
    def normalisation(self) -> str:
        """From the power in a band, of samples times 32768, to the output, for the metadata of files."""
        mean, scale = self.config.dataset_mean, 2 * self.config.dataset_std
        return f"log_mel = (ln(max(power, {POWER_FLOOR:.8g})) - {mean:.8g}) / {scale:.8g}"

    def _fbank(self, waveform: Tensor, out: Tensor) -> None:
        """Writes the normalised filter banks (batch, time, mel) to `out`, on a CPU a few clips at a time.

        Kaldi subtracts the mean m of each frame x, takes y[i] = x[i] - 0.97 x[i - 1] and multiplies with the window.
        Here the difference is taken once for the clip, and then m - 0.97 m subtracted from it in every frame; where a
        frame is constant, both are the same number, and nothing is left of it.
        """
        config, n_fft = self.config, self.config.n_fft
        n_clips, n_frames = out.shape[:2]
        chunk = n_clips
        if waveform.device.type == "cpu":
            chunk = min(n_clips, max(1, CPU_CHUNK_VALUES * torch.get_num_threads() // (n_fft * n_frames)))
        n_used = (n_frames - 1) * config.hop_length + config.win_length
        emphasised = waveform.new_empty(chunk, n_used - 1)
        frames = emphasised.unfold(1, config.win_length - 1, config.hop_length)  # (chunk, time, win_length - 1)
        padded = waveform.new_zeros(chunk, n_frames, n_fft)
        windowed = padded[..., : config.win_length - 1]
        means = self._frame_means(waveform[:, :n_used])
        means = torch.sub(means, means, alpha=PREEMPHASIS)
        weights = [self.bank[rows, bands] for bands, rows in self.groups]
        # All views at once: so many calls for every chunk would take a good part of the time.
        pieces = (waveform[:, 1:n_used], waveform[:, : n_used - 1], means, out)
        outs = [out[..., bands].flatten(0, 1).split(chunk * n_frames) for bands, _ in self.groups]
        for now, before, mean, into, *bands in zip(*(piece.split(chunk) for piece in pieces), *outs, strict=True):
            n = len(now)
            if n < chunk:  # the last one
                emphasised, frames, padded, windowed = (x[:n] for x in (emphasised, frames, padded, windowed))
            torch.sub(now, before, alpha=PREEMPHASIS, out=emphasised)
            torch.sub(frames, mean, out=windowed).mul_(self.window)
            squared = torch.fft.rfft(padded.flatten(0, 1)).view(torch.float32).square_()  # (clip x time, 2 bins)
            for (_, rows), weight, band in zip(self.groups, weights, bands, strict=True):
                torch.mm(squared[:, rows], weight, out=band)
            into.clamp_min_(POWER_FLOOR).log_().sub_(config.dataset_mean).mul_(1 / (2 * config.dataset_std))

    def _frame_means(self, waveform: Tensor) -> Tensor:
        """Mean of each frame, (batch, time, 1), from sums over the parts that frames have in common."""
        win_length, hop_length = self.config.win_length, self.config.hop_length
        part = math.gcd(win_length, hop_length)
        sums = waveform.unflatten(1, (-1, part)).sum(dim=2)  # (batch, part)
        return sums.unfold(1, win_length // part, hop_length // part).sum(dim=2, keepdim=True) / win_length
