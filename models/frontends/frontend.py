"""What every front end is, and what it declares."""

from typing import Any

import torch
from torch import Tensor, nn


class Float32Constants(nn.Module):
    """A part that always computes in float32: `.double()` and `.half()` leave its constants as they are."""

    def _apply(self, fn, recurse: bool = True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now is not None and now.dtype != value.dtype:
                setattr(self, name, value.to(now.device))
        return self


class Frontend(Float32Constants):
    """Maps waveforms (batch, sample) in [-1, 1] to spectrograms (batch, 1, mel, time), float32; nothing is learned.

    Its config has a field `sample_rate` in Hz; `resampler` says how the published system brings clips to that rate.
    Constants are buffers that are not persistent: a state dict has none. A static `recognise(tensors)` may tell its
    options from buffers that others save beside a network, or None.
    """

    config: Any
    mask_value = 0.0  # what a masked cell holds, on the scale of the output
    resampler = "soxr_hq"  # librosa's default; or sinc, torchaudio's
    normalisation = "none"  # from the power in a band to the output, for the metadata of files

    @property
    def sample_rate(self) -> int:
        """Of the waveforms, in Hz."""
        return self.config.sample_rate

    def n_frames(self, n_samples: int) -> int:
        """How many frames the spectrogram of so many samples has.

        Raises:
            ValueError: when there are too few for one.
        """
        device = next(iter(self.buffers()), torch.zeros(())).device
        return self(torch.zeros(1, n_samples, device=device)).shape[-1]

    def for_export(self, n_samples: int, store_matrices: bool = False) -> nn.Module:
        """The same numbers from operators that runtimes have, for clips of one length; itself where it is that already.

        Args:
            store_matrices: keep large constants in the file, for runtimes that would compute them anew with every clip.

        Raises:
            ValueError: when there is no such form, or not for this length.
        """
        return self

    def forward(self, waveform: Tensor) -> Tensor:
        raise NotImplementedError
