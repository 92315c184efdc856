"""Test-time augmentation: a network answers several changed copies of each clip, and the probabilities are averaged.

Source of `stripes`: V. Gaudefroy et al. (valeo.ai), DCASE 2021 Task 1a, https://github.com/valeoai/SP4ASC, which calls
it TTA: SpecAugment as in training, the clip as it is not among the copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.augment.stripes import random_stripes
from models.bounds import Bounds, check_numbers

Kind = Literal["stripes", "roll", "crop"]


@dataclass(frozen=True)
class TestTimeConfig:
    __test__ = False  # no test of pytest's

    n_tta: Annotated[int, "copies of each clip whose probabilities are averaged; 0 is off", Bounds(0, 10_000)] = 0
    tta: Annotated[Kind, "copies with random stripes of SpecAugment; or moved in time, around the clip (roll) or with "
                         "its ends mirrored (crop)"] = "stripes"  # fmt: skip
    tta_shift: Annotated[float, "seconds that copies are moved by at most, both ways", Bounds(0)] = 0.1
    time_width: Annotated[int, "widest time stripe plus one, in frames", Bounds(1)] = 128
    n_time_stripes: Annotated[int, "time stripes; 0 is off", Bounds(0, 100)] = 2
    mel_width: Annotated[int, "widest frequency stripe plus one, in mel bins", Bounds(1)] = 32
    n_mel_stripes: Annotated[int, "frequency stripes; 0 is off", Bounds(0, 100)] = 2

    def __post_init__(self):
        check_numbers(self)


class TestTimeAugmentation(nn.Module):
    """Maps waveforms (batch, sample) to log-probabilities (batch, class), of the mean probability of all copies.

    Stripes are zero behind the network's first norm, where it names one as `input_norm`, as in its training; else they
    hold the clip's mean of each band. Draws come from the global generator.

    Args:
        temperature: of the logits of each copy.
    """

    __test__ = False

    def __init__(self, model: nn.Module, frontend: nn.Module, config: TestTimeConfig, temperature: float = 1.0):
        super().__init__()
        self.model, self.frontend, self.config, self.temperature = model, frontend, config, temperature
        self.answers_by_device = getattr(model, "answers_by_device", False)
        self.masked: Tensor | None = None  # (batch, 1, mel, time) of the copy that is under way
        self.norm = model.get_submodule(model.input_norm) if hasattr(model, "input_norm") else None
        if self.norm is not None:
            self.norm.register_forward_hook(self._mask)

    def forward(self, waveform: Tensor, devices: Sequence[str] | None = None) -> Tensor:
        total: Tensor | int = 0
        log_mel = self.frontend(waveform) if self.config.tta == "stripes" else None
        for i in range(self.config.n_tta):
            if log_mel is not None:
                probabilities = self.striped(log_mel, *self._draw(log_mel), devices)
            else:
                probabilities = self._answer(self.frontend(self._moved(waveform, i)), devices)
            total = total + probabilities
        return (total / self.config.n_tta).log()

    def striped(self, log_mel: Tensor, mel: Tensor, time: Tensor, devices: Sequence[str] | None = None) -> Tensor:
        """Probabilities (batch, class) with the bands `mel` and the frames `time` (batch, cell) hidden."""
        masked = mel[:, None, :, None] | time[:, None, None, :]
        if self.norm is None:
            return self._answer(torch.where(masked, log_mel.mean(dim=3, keepdim=True), log_mel), devices)
        self.masked = masked
        try:
            return self._answer(log_mel, devices)
        finally:
            self.masked = None

    def _draw(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        config, (n_clips, _, n_mels, n_frames) = self.config, log_mel.shape
        mel_width, time_width = min(config.mel_width, n_mels), min(config.time_width, n_frames)
        mel = random_stripes(n_clips, config.n_mel_stripes, mel_width, n_mels, log_mel.device)
        return mel, random_stripes(n_clips, config.n_time_stripes, time_width, n_frames, log_mel.device)

    def _answer(self, log_mel: Tensor, devices: Sequence[str] | None) -> Tensor:
        logits = self.model(log_mel) if devices is None else self.model(log_mel, devices)
        return (logits.float() / self.temperature).softmax(dim=1)

    def _moved(self, waveform: Tensor, i: int) -> Tensor:
        """Copy i; the copies are spread evenly over all shifts, a single one stays where it is."""
        n, most = self.config.n_tta, self.config.tta_shift * self.frontend.sample_rate
        shift = round(most * (2 * i / (n - 1) - 1)) if n > 1 else 0
        if self.config.tta == "roll":
            return waveform.roll(shift, dims=1)
        most = min(abs(shift), waveform.shape[1] - 1)
        padded = F.pad(waveform[:, None], (most, most), mode="reflect")[:, 0]
        return padded[:, : waveform.shape[1]] if shift > 0 else padded[:, padded.shape[1] - waveform.shape[1] :]

    def _mask(self, _norm: nn.Module, _inputs: tuple, normed: Tensor) -> Tensor | None:
        return None if self.masked is None else normed.masked_fill(self.masked, 0)
