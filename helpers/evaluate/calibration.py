"""Whether a network is as sure as it is right, and the temperature that makes it so.

Sources: C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
https://arxiv.org/abs/1706.04599; bins of as many clips each: M. P. Naeini, G. F. Cooper, M. Hauskrecht, AAAI 2015.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COLDEST, HOTTEST = 0.05, 20.0
Bins = Literal["width", "count"]


@dataclass(frozen=True)
class Reliability:
    """Clips by how sure the network is of its answer; arrays (bin,), bins without clips left out."""

    confidence: np.ndarray  # mean probability of the answer
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy, each bin weighted by its clips."""
        return float((self.count * np.abs(self.confidence - self.accuracy)).sum() / self.count.sum())


def reliability(
    logits: Tensor, target: Tensor, temperature: float = 1.0, n_bins: int = 15,
    bins: Bins = "width",
) -> Reliability:  # fmt: skip
    """Confidence and accuracy of logits (clip, class) in bins.

    Args:
        target: (clip,) numbers of the classes.
        bins: of the same width between 0 and 1, or of about as many clips each.

    Raises:
        ValueError: without clips.
    """
    if not len(logits):
        raise ValueError("reliability needs clips, got none")
    sure, answer = (logits.double() / temperature).softmax(dim=1).max(dim=1)
    sure, right = sure.numpy(), (answer == target).numpy()
    number = bins_of(sure, n_bins, bins)
    count = np.bincount(number, minlength=n_bins)
    there = count > 0
    sums = [np.bincount(number, values, n_bins)[there] for values in (sure, right)]
    return Reliability(sums[0] / count[there], sums[1] / count[there], count[there])


def bins_of(sure: np.ndarray, n_bins: int = 15, bins: Bins = "width") -> np.ndarray:
    """The bin of each clip (clip,) by the probability of its answer, `sure` (clip,)."""
    if bins == "width":
        return np.minimum((sure * n_bins).astype(np.int64), n_bins - 1)
    return np.argsort(np.argsort(sure, kind="stable"), kind="stable") * n_bins // len(sure)


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature whose logits / temperature have the least logarithmic loss; between 0.05 and 20.

    Fit it on recordings that nothing was trained or chosen on. The loss has one minimum in 1 / temperature, which
    halving finds.

    Args:
        logits: (clip, class).
        target: (clip,) numbers of the classes.
    """
    logits = logits.double()

    def slope(log_temperature: float) -> float:
        """Of the loss, with the logarithm of the temperature."""
        free = torch.tensor(log_temperature, dtype=torch.float64, requires_grad=True)
        F.cross_entropy(logits / free.exp(), target).backward()
        return free.grad.item()

    low, high = np.log(COLDEST), np.log(HOTTEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(np.exp((low + high) / 2))
