"""Augmentations by name: a plain table, and the chain that applies several in order."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from helpers.augment.augmentation import Augmentation, Setting
from helpers.augment.device_impulse_response import DeviceImpulseResponse, DirConfig
from helpers.augment.freq_mixstyle import FreqMixStyle, FreqMixStyleConfig
from helpers.augment.gain import Gain, GainConfig
from helpers.augment.mixup import MixUp, MixUpConfig
from helpers.augment.pitch_shift import PitchShift, PitchShiftConfig
from helpers.augment.share_mask import ShareMask, ShareMaskConfig
from helpers.augment.spec_mask import SpecMask, SpecMaskConfig
from helpers.augment.spec_stripes import SpecStripes, SpecStripesConfig
from helpers.augment.time_roll import TimeRoll, TimeRollConfig

# name -> (config, class); the keys are the choices on the command line.
AUGMENTATIONS = {
    "dir": (DirConfig, DeviceImpulseResponse),
    "time_roll": (TimeRollConfig, TimeRoll),
    "spec_mask": (SpecMaskConfig, SpecMask),
    "freq_mixstyle": (FreqMixStyleConfig, FreqMixStyle),
    "share_mask": (ShareMaskConfig, ShareMask),
    "mixup": (MixUpConfig, MixUp),
    "gain": (GainConfig, Gain),
    "pitch_shift": (PitchShiftConfig, PitchShift),
    "spec_stripes": (SpecStripesConfig, SpecStripes),
}
DEFAULT_CHAIN = ("dir", "time_roll", "spec_mask", "freq_mixstyle", "share_mask", "mixup")


def build_chain(configs: Mapping[str, Any], setting: Setting, before: Sequence[nn.Module] = ()) -> nn.ModuleDict:
    """The chain: `waveform` goes before the front end, `log_mel` after it; order is order of application.

    Args:
        configs: of the augmentations by name, in order.
        before: what goes before all others behind the front end.
    """
    chain = nn.ModuleDict({"waveform": nn.Sequential(), "log_mel": nn.Sequential(*before)})
    for name, config in configs.items():
        cls = AUGMENTATIONS[name][1]
        chain[cls.stage].add_module(name, cls.from_config(config, setting))
    return chain


def chain_digests(chain: nn.Module) -> dict[str, str]:
    """What is in the files that a chain reads, see `Augmentation.digests`."""
    parts = [part for part in chain.modules() if isinstance(part, Augmentation)]
    return {name: digest for part in parts for name, digest in part.digests().items()}
