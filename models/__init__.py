"""Networks and front ends by name: plain tables, and what is built from them.

A network is built from its config and maps log-mel (batch, 1, mel, time) to logits (batch, class). It may declare:

- `default_frontend`, a name in FRONTENDS and options of that; else it takes cp_mel with its defaults;
- `pretrained_url(config)`, `freeze_encoder(n_layers)`: where published weights to start from are, and which layers can
  stay as they are;
- `feature_layers`: submodules that put out maps (batch, channel, freq, time), the last of each stage, for distillation;
- `skips_layers`: in training it leaves out layers now and then;
- `entry`, `recognise(state)`, `read_authors_file(content)`: a tensor that only its state dict has, what the shapes tell
  of its config, and the form that its authors save it in: so checkpoints that do not say what they hold are read;
- `claims(names)`: of networks that share an `entry`, whether a state dict with these names is its own;
- `unfolded(state)`: a state dict whose norms were folded into its weights, with norms again.

A front end is a `models.frontends.frontend.Frontend`, which lists what it declares.
"""

from typing import Any

from torch import nn

from models.bc_resnet import BcResnet, BcResnetConfig
from models.beats import Beats, BeatsConfig
from models.cnn3 import Cnn3, Cnn3Config
from models.cnn6_60k import Cnn6, Cnn6Config
from models.cnn_gru import CnnGru, CnnGruConfig
from models.cp_mobile import CpMobile, CpMobileConfig
from models.cp_resnet import CpResnet, CpResnetConfig
from models.dcase24_baseline import Dcase24Baseline, Dcase24BaselineConfig
from models.dragonsearch_baseline1 import DragonsearchBaseline1, DragonsearchBaseline1Config
from models.dragonsearch_baseline2 import DragonsearchBaseline2, DragonsearchBaseline2Config
from models.dragonsearch_tf_sepnet import DragonsearchTfSepnet, DragonsearchTfSepnetConfig
from models.frontends.cnn3_mel import Cnn3Mel, Cnn3MelConfig
from models.frontends.cp_mel import CpMel, CpMelConfig
from models.frontends.dcase24_mel import Dcase24Mel, Dcase24MelConfig
from models.frontends.dragonsearch_mel import DragonsearchMel, DragonsearchMelConfig
from models.frontends.kaldi_fbank import KaldiFbank, KaldiFbankConfig
from models.frontends.sp4asc_mel import Sp4ascMel, Sp4ascMelConfig
from models.passt import Passt, PasstConfig
from models.qualcomm_bc_resnet import QualcommBcResnet, QualcommBcResnetConfig
from models.tf_sepnet import TfSepnet, TfSepnetConfig

# name -> (config, class); the keys are the choices on the command line.
MODELS = {
    "cp_mobile": (CpMobileConfig, CpMobile),
    "cp_resnet": (CpResnetConfig, CpResnet),
    "passt": (PasstConfig, Passt),
    "beats": (BeatsConfig, Beats),
    "tf_sepnet": (TfSepnetConfig, TfSepnet),
    "bc_resnet": (BcResnetConfig, BcResnet),
    "qualcomm_bc_resnet": (QualcommBcResnetConfig, QualcommBcResnet),
    "cnn3": (Cnn3Config, Cnn3),
    "dcase24_baseline": (Dcase24BaselineConfig, Dcase24Baseline),
    "cnn6_60k": (Cnn6Config, Cnn6),
    "cnn_gru": (CnnGruConfig, CnnGru),
    "dragonsearch_baseline1": (DragonsearchBaseline1Config, DragonsearchBaseline1),
    "dragonsearch_baseline2": (DragonsearchBaseline2Config, DragonsearchBaseline2),
    "dragonsearch_tf_sepnet": (DragonsearchTfSepnetConfig, DragonsearchTfSepnet),
}
FRONTENDS = {
    "cp_mel": (CpMelConfig, CpMel),
    "kaldi_fbank": (KaldiFbankConfig, KaldiFbank),
    "dcase24_mel": (Dcase24MelConfig, Dcase24Mel),
    "sp4asc_mel": (Sp4ascMelConfig, Sp4ascMel),
    "dragonsearch_mel": (DragonsearchMelConfig, DragonsearchMel),
    "cnn3_mel": (Cnn3MelConfig, Cnn3Mel),
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


def default_frontend(name: str) -> tuple[str, dict[str, Any]]:
    """Name and options of the front end that a network takes when none is chosen."""
    return getattr(MODELS[name][1], "default_frontend", ("cp_mel", {}))
