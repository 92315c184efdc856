"""Freq-MixStyle: mixes the frequency-wise statistics of pairs of spectrograms, and so the style of their devices.

Source: F. Schmid, S. Masoudian, K. Koutini, G. Widmer, "CP-JKU Submission to DCASE22: Distilling Knowledge for
Low-Complexity Convolutional Neural Networks From a Patchout Audio Transformer", DCASE 2022; MixStyle is from K. Zhou et
al., ICLR 2021, https://arxiv.org/abs/2104.02008. Departures: none.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from datasets.waveforms import Batch
from helpers.augment.augmentation import Augmentation, Setting
from models.bounds import Bounds, check_numbers

EPS = 1e-6
OVER = {"mel": (1, 3), "time": (1, 2), "none": (2, 3)}  # axes of (batch, channel, mel, time) that statistics are over


@dataclass(frozen=True)
class FreqMixStyleConfig:
    mixstyle_p: Annotated[float, "share of batches with Freq-MixStyle; 0 is off", Bounds(0, 1)] = 0.4
    mixstyle_alpha: Annotated[float, "parameter of its Beta distribution", Bounds(0, above=True)] = 0.3
    mixstyle_axis: Annotated[
        Literal["mel", "time", "none"],
        "what has statistics of its own: bands; frames, as in BEATs' published recipe; or nothing, as MixStyle has it",
    ] = "mel"
    mixstyle_per: Annotated[Literal["clip", "batch"], "what draws a mixing weight"] = "clip"

    def __post_init__(self):
        check_numbers(self)


class FreqMixStyle(Augmentation):
    """With probability `p`, once for the whole batch, gives every clip statistics mixed with those of another clip.

    Args:
        p: probability for a batch; 0 is off.
        alpha: parameter of the Beta(alpha, alpha) distribution of each clip's mixing weight, > 0.
        axis: each band (mel), each frame (time) or the spectrogram as a whole (none) has statistics of its own.
        per: each clip draws a weight, or the batch one for all.

    Raises:
        ValueError: for a value out of range.
    """

    stage = "log_mel"

    def __init__(self, p: float, alpha: float, axis: str = "mel", per: Literal["clip", "batch"] = "clip"):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"mixstyle_p must be in [0, 1], got {p}")
        if not alpha > 0:
            raise ValueError(f"mixstyle_alpha must be > 0, got {alpha}")
        if axis not in OVER:
            raise ValueError(f"mixstyle_axis must be mel, time or none, got {axis!r}")
        if per not in ("clip", "batch"):
            raise ValueError(f"mixstyle_per must be clip or batch, got {per!r}")
        self.p, self.alpha, self.axis, self.per = p, alpha, axis, per

    @classmethod
    def from_config(cls, config: FreqMixStyleConfig, setting: Setting) -> "FreqMixStyle":
        return cls(config.mixstyle_p, config.mixstyle_alpha, config.mixstyle_axis, config.mixstyle_per)

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.p == 0:
            return batch
        x = batch.log_mel
        n_clips = len(x)
        lam = _beta(self.alpha, n_clips if self.per == "clip" else 1, x.device)  # (batch,) or (1,)
        # A coin that comes up tails mixes nothing; asked for on the device, so that nobody waits for it.
        on = torch.rand((), device=x.device) < self.p
        partner = torch.randperm(n_clips, device=x.device)
        if x.device.type == "cpu" and not on:
            return batch
        return replace(batch, log_mel=torch.where(on, mix_style(x, lam, partner, self.axis), x))


def mix_style(x: Tensor, lam: Tensor, partner: Tensor, axis: str = "mel") -> Tensor:
    """Gives x (batch, channel, mel, time) mixed statistics: a share lam (batch,) its own, the rest of `partner`'s."""
    lam = lam.view(-1, 1, 1, 1)
    var, mean = torch.var_mean(x, dim=OVER[axis], keepdim=True)  # unbiased
    std = (var + EPS).sqrt()
    mixed_mean = lam * mean + (1 - lam) * mean[partner]
    mixed_std = lam * std + (1 - lam) * std[partner]
    return (x - mean) / std * mixed_std + mixed_mean


def _beta(alpha: float, n: int, device: torch.device) -> Tensor:
    """Draws (n,) from Beta(alpha, alpha) on the device: the share of one of two gamma variates in their sum.

    In logarithms: for a small alpha both variates are smaller than any float32. A variate of alpha is one of alpha + 1
    times a uniform number to the power of 1 / alpha (G. Marsaglia, W. W. Tsang, ACM TOMS 26, 2000, section 8).
    """
    gamma = torch._standard_gamma(torch.full((2, n), alpha + 1.0, device=device))
    log_gamma = gamma.log() - torch.empty_like(gamma).exponential_() / alpha
    return torch.sigmoid(log_gamma[0] - log_gamma[1])
