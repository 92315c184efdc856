"""Device impulse response augmentation: makes clips of one device sound as if others had recorded them.

Source: T. Morocutti, F. Schmid, K. Koutini, G. Widmer, "Device-Robust Acoustic Scene Classification via Impulse
Response Augmentation", EUSIPCO 2023, https://arxiv.org/abs/2305.07499. Parity with its code: the whole linear
convolution cut to the length of the clip, delay kept, no change of gain. Departure: a batched FFT on the batch's own
device.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from datasets.impulse_responses import read_impulse_responses, response_files
from datasets.tau import DataError
from datasets.waveforms import Batch, Clips
from helpers.augment.augmentation import Augmentation, Setting
from helpers.fetch.resources import micirp_folder
from models.bounds import Bounds, check_numbers

CPU_CHUNK_CLIPS = 4


@dataclass(frozen=True)
class DirConfig:
    dir_prob: Annotated[float, "share of clips given a device impulse response; 0 is off", Bounds(0, 1)] = 0.6
    dirs_path: Annotated[str | None, "folder of impulse responses (default: MicIRP's, fetched once)"] = None
    dir_devices: Annotated[str, "recording devices to convolve: names joined by commas, all, or auto (a)"] = "auto"

    def __post_init__(self):
        check_numbers(self)


class DeviceImpulseResponse(Augmentation):
    """Convolves each clip, with probability `p`, with one of `responses`, chosen uniformly and for each clip anew.

    Args:
        responses: impulse responses (tap,), at the sampling rate of the clips.
        n_samples: length of the clips.
        p: probability for a clip; 0 is off.
        recording_devices: positions of the recording devices whose clips take part; None takes all.

    Raises:
        ValueError: for a probability outside [0, 1], or p > 0 without responses.
    """

    stage = "waveform"

    def __init__(
        self, responses: Sequence[np.ndarray], n_samples: int, p: float, recording_devices: Sequence[int] | None = None
    ):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dir_prob must be in [0, 1], got {p}")
        if p > 0 and not responses:
            raise ValueError(f"dir_prob {p} needs impulse responses, got none")
        self.p = p
        self.files: list[Path] = []
        self.n_samples = n_samples
        # What a longer response would add lies beyond the end of the clip.
        n_taps = min(max((len(response) for response in responses), default=1), n_samples)
        self.n_fft = fast_fft_length(n_samples + n_taps - 1)  # long enough that nothing wraps around
        spectra = torch.stack([self._spectrum(response[:n_samples]) for response in responses]) if p > 0 else None
        self.register_buffer("spectra", spectra, persistent=False)  # (response, bin) complex
        devices = None if recording_devices is None else torch.as_tensor(list(recording_devices))
        self.register_buffer("recording_devices", devices, persistent=False)

    @classmethod
    def from_config(cls, config: DirConfig, setting: Setting) -> "DeviceImpulseResponse":
        """With the responses of the named folder, else the data set's own, else MicIRP's; `dir_prob` 0 reads nothing.

        Raises:
            DataError: for an unknown device or missing responses; DownloadError when MicIRP's cannot be fetched.
        """
        store = setting.clips.store
        if config.dir_prob == 0:
            return cls([], store.n_samples, 0.0)
        folder = Path(config.dirs_path) if config.dirs_path is not None else setting.responses or micirp_folder()
        responses = read_impulse_responses(folder, store.sample_rate, store.n_samples)
        part = cls(responses, store.n_samples, config.dir_prob, meant_devices(config.dir_devices, setting.clips))
        part.files = response_files(folder)
        return part

    def digests(self) -> Mapping[str, str]:
        if not self.files:
            return {}
        content = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in self.files)
        return {"impulse responses": hashlib.sha256(content).hexdigest()[:16]}

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.p == 0:
            return batch
        n_clips = len(batch.waveform)
        device = batch.waveform.device
        chosen = torch.rand(n_clips, device=device) < self.p  # (batch,)
        if self.recording_devices is not None:
            chosen &= torch.isin(batch.recording_device, self.recording_devices)
        response = torch.randint(len(self.spectra), (n_clips,), device=device)
        if device.type == "cpu":  # only the chosen clips, few at a time so that their spectra stay in the cache
            waveform = batch.waveform.clone()
            clips = chosen.nonzero().flatten()
            for start in range(0, len(clips), CPU_CHUNK_CLIPS):
                piece = clips[start : start + CPU_CHUNK_CLIPS]
                waveform[piece] = self.convolve(batch.waveform[piece], response[piece])
        else:  # all clips at once: cheaper than asking the device which ones
            waveform = torch.where(chosen[:, None], self.convolve(batch.waveform, response), batch.waveform)
        return replace(batch, waveform=waveform)

    def convolve(self, waveform: Tensor, response: Tensor) -> Tensor:
        """Waveform (batch, sample) convolved with the responses at positions `response` (batch,), cut to its length."""
        spectrum = torch.fft.rfft(waveform, self.n_fft).mul_(self.spectra[response])
        return torch.fft.irfft(spectrum, self.n_fft)[:, : self.n_samples]

    def _spectrum(self, response: np.ndarray) -> Tensor:
        return torch.fft.rfft(torch.as_tensor(response, dtype=torch.float32), self.n_fft)


def meant_devices(names: str, clips: Clips) -> list[int] | None:
    """Positions of the recording devices that `names` means; None is all.

    Args:
        names: joined by commas, `all`, or `auto`: a as published, else the most frequent in training.

    Raises:
        DataError: for a device that the data set has not.
    """
    known = clips.meta.recording_devices
    if names == "all":
        return None
    if names == "auto":
        most_frequent = Counter(clips.recording_device.tolist()).most_common(1)[0][0]
        chosen = ["a"] if "a" in known else [known[most_frequent]]
    else:
        chosen = [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        raise DataError(f"--dir_devices names {', '.join(unknown)}; the data set has {', '.join(known)}")
    return [known.index(name) for name in chosen]


def fast_fft_length(at_least: int) -> int:
    """The smallest even length >= `at_least` whose only prime factors are 2, 3 and 5."""
    length = at_least + at_least % 2
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 2
