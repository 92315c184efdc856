"""Augmentations: each maps a `Batch` to a new one, is inert in eval mode, and draws from the global generator of the
batch's device. This module holds the ordered chain of all recipes, and its options with the student's defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from torch import nn

from helpers.augment.device_impulse_response import DeviceImpulseResponse
from helpers.augment.freq_mixstyle import FreqMixStyle
from helpers.augment.mixup import MixUp
from helpers.augment.spec_mask import ShareMask, SpecMask
from helpers.augment.time_roll import TimeRoll
from models.bounds import Bounds, check_numbers


@dataclass(frozen=True)
class AugmentConfig:
    roll: Annotated[int, "largest circular shift of a clip, in samples; 0 is off", Bounds(0)] = 4000
    dir_prob: Annotated[float, "share of clips given a device impulse response; 0 is off", Bounds(0, 1)] = 0.6
    dirs_path: Annotated[str | None, "folder of impulse responses (default: MicIRP's, fetched once)"] = None
    dir_devices: Annotated[str, "recording devices to convolve: names joined by commas, all, or auto (a)"] = "auto"
    mixstyle_p: Annotated[float, "share of batches with Freq-MixStyle; 0 is off", Bounds(0, 1)] = 0.4
    mixstyle_alpha: Annotated[float, "parameter of its Beta distribution", Bounds(0, above=True)] = 0.3
    mixstyle_axis: Annotated[
        Literal["mel", "time"], "what has statistics of its own: bands, or frames as in BEATs' published recipe"
    ] = "mel"
    freqm: Annotated[int, "widest frequency mask plus one, in mel bins; 0 is off", Bounds(0)] = 48
    timem: Annotated[int, "widest time mask plus one, in frames; 0 is off", Bounds(0)] = 0
    mask_share: Annotated[float, "widest masks of both axes, as shares of the spectrogram; 0 is off", Bounds(0, 1)] = (
        0.0
    )
    mixup_alpha: Annotated[float, "parameter of mixup's Beta distribution; 0 is off", Bounds(0)] = 0.0

    def __post_init__(self):
        check_numbers(self)


def build_augment(
    config: AugmentConfig,
    responses: Sequence[np.ndarray],
    dir_devices: Sequence[int] | None,
    n_samples: int,
    mask_value: float,
    temperature: float | None = None,
) -> nn.ModuleDict:
    """The chain: `waveform` goes before the front end, `log_mel` after it; order is order of application.

    Args:
        responses: impulse responses (sample,) at the rate of the clips.
        dir_devices: positions of the recording devices that they are meant for; None is all.
        n_samples: length of a clip.
        mask_value: what a masked cell holds, on the scale of the front end's output.
        temperature: of the distillation loss, which mixup needs with a teacher.
    """
    return nn.ModuleDict(
        {
            "waveform": nn.Sequential(
                DeviceImpulseResponse(responses, n_samples, p=config.dir_prob, recording_devices=dir_devices),
                TimeRoll(max_shift=config.roll),
            ),
            "log_mel": nn.Sequential(
                SpecMask(max_width=config.freqm, axis="mel", value=mask_value),
                SpecMask(max_width=config.timem, axis="time", value=mask_value),
                FreqMixStyle(config.mixstyle_p, config.mixstyle_alpha, config.mixstyle_axis),
                ShareMask(max_share=config.mask_share, axis="mel", value=0.0),
                ShareMask(max_share=config.mask_share, axis="time", value=0.0),
                MixUp(alpha=config.mixup_alpha, temperature=temperature),
            ),
        }
    )
