"""Augmentations: each maps a `Batch` to a new one, is inert in eval mode, and draws from the global generator of the
batch's device. This module holds the ordered chain of the student recipe."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from helpers.augment.device_impulse_response import DeviceImpulseResponse
from helpers.augment.freq_mixstyle import FreqMixStyle
from helpers.augment.spec_mask import SpecMask
from helpers.augment.time_roll import TimeRoll


def build_augment(
    responses: Sequence[np.ndarray],
    n_samples: int,
    dir_prob: float,
    dir_devices: Sequence[int] | None,
    roll: int,
    freqm: int,
    timem: int,
    mask_value: float,
    mixstyle_p: float,
    mixstyle_alpha: float,
) -> nn.ModuleDict:
    """The published chain: `waveform` goes before the front end, `log_mel` after it; order is order of application."""
    return nn.ModuleDict(
        {
            "waveform": nn.Sequential(
                DeviceImpulseResponse(responses, n_samples, p=dir_prob, recording_devices=dir_devices),
                TimeRoll(max_shift=roll),
            ),
            "log_mel": nn.Sequential(
                SpecMask(max_width=freqm, axis="mel", value=mask_value),
                SpecMask(max_width=timem, axis="time", value=mask_value),
                FreqMixStyle(p=mixstyle_p, alpha=mixstyle_alpha),
            ),
        }
    )
