"""Power spectra for front ends that need no more than that: fast in training, and exported with them as they are."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.frontends.frontend import Float32Constants


class Spectrogram(Float32Constants):
    """Maps waveforms (batch, sample) to power spectra (batch, bin, time) with n_fft / 2 + 1 bins, float32.

    In exported files, whose runtimes have no fast Fourier transform, or one that is slow, the same spectra are a
    convolution with sines and cosines; its table is computed at load, so files stay small.

    Args:
        window: (sample,); its length is that of the transform.
        hop_length: step from frame to frame in samples.
        centred: frames are centred at 0, hop_length, ... of the waveform, which is mirrored at its ends; else the first
            one begins with it, and nothing is added.

    Raises:
        ValueError: from `forward`, for waveforms too short for a frame.
    """

    def __init__(self, window: Tensor, hop_length: int, centred: bool = True):
        super().__init__()
        self.n_fft, self.hop_length, self.centred = len(window), hop_length, centred
        self.register_buffer("window", window.float(), persistent=False)

    def n_frames(self, n_samples: int) -> int:
        added = 2 * (self.n_fft // 2) if self.centred else 0
        return 1 + (n_samples + added - self.n_fft) // self.hop_length

    def forward(self, waveform: Tensor) -> Tensor:
        half = self.n_fft // 2
        least = half + 1 if self.centred else self.n_fft
        if waveform.ndim != 2 or waveform.shape[1] < least:
            raise ValueError(
                f"waveform must be (batch, sample) with at least {least} samples, got {tuple(waveform.shape)}"
            )
        # Spectra need the range of float32, whatever autocast is set to outside.
        with torch.autocast(waveform.device.type, enabled=False):
            waveform = waveform.float()
            if self.centred:
                waveform = F.pad(waveform[:, None], (half, half), mode="reflect")[:, 0]
            if torch.compiler.is_exporting():
                return self._convolved(waveform)
            frames = waveform.unfold(1, self.n_fft, self.hop_length) * self.window  # (batch, time, sample)
            return torch.view_as_real(torch.fft.rfft(frames)).square().sum(dim=3).transpose(1, 2)

    def _convolved(self, waveform: Tensor) -> Tensor:
        sample = torch.arange(self.n_fft, device=waveform.device)
        turn = sample[: self.n_fft // 2 + 1, None] * sample % self.n_fft  # whole numbers, so that no angle is rounded
        angle = turn * (2 * math.pi / self.n_fft)  # (bin, sample)
        tables = [(f(angle) * self.window)[:, None] for f in (torch.cos, torch.sin)]
        real, imaginary = (F.conv1d(waveform[:, None], table, stride=self.hop_length) for table in tables)
        return real * real + imaginary * imaginary
