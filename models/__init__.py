"""Networks and front ends by name: plain tables, and the two functions that build from them."""

from torch import nn

from models.beats import Beats, BeatsConfig
from models.cp_mobile import CpMobile, CpMobileConfig
from models.cp_resnet import CpResnet, CpResnetConfig
from models.frontends.cp_mel import CpMel, CpMelConfig
from models.frontends.kaldi_fbank import KaldiFbank, KaldiFbankConfig
from models.passt import Passt, PasstConfig

# name -> (config, class); the keys are the choices on the command line.
MODELS = {
    "cp_mobile": (CpMobileConfig, CpMobile),
    "cp_resnet": (CpResnetConfig, CpResnet),
    "passt": (PasstConfig, Passt),
    "beats": (BeatsConfig, Beats),
}
FRONTENDS = {
    "cp_mel": (CpMelConfig, CpMel),
    "kaldi_fbank": (KaldiFbankConfig, KaldiFbank),
}


def get_model(name: str, **options) -> nn.Module:
    """Builds a network that maps log-mel (batch, 1, mel, time) to logits (batch, class); options as in its config.

    Raises:
        ValueError: for an unknown name or a value that does not fit; TypeError for an unknown option.
    """
    return _build(MODELS, "model", name, options)


def get_frontend(name: str, **options) -> nn.Module:
    """Builds a front end that maps waveform (batch, sample) to log-mel (batch, 1, mel, time).

    Raises:
        ValueError: for an unknown name or a value that does not fit; TypeError for an unknown option.
    """
    return _build(FRONTENDS, "front end", name, options)


def _build(table: dict, kind: str, name: str, options: dict) -> nn.Module:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(table)}")
    config, cls = table[name]
    return cls(config(**options))
