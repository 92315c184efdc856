"""CNN6 with separable convolutions, 60 thousand parameters: the entry of valeo.ai, SP4ASC, in DCASE 2021 Task 1a.

Source: G. Puy, H. Jain, A. Bursuc, "Separable Convolutions and Test-Time Augmentations for Low-Complexity and
Calibrated Acoustic Scene Classification", DCASE Challenge technical report 2021,
https://github.com/valeoai/SP4ASC; after CNN6 of Q. Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks
for Audio Pattern Recognition", IEEE/ACM TASLP 2020.

Departures: it takes spectrograms as (mel, time) and turns them; SpecAugment, which the published network contains, is
an augmentation and no part of it, and so are repeated predictions; 8-bit networks store 3 x 3 kernels (see
models/layers/plus_conv.py). The state dict is the published one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, MAX_LAYERS, MAX_MELS, Bounds, check_channels, check_numbers
from models.layers.mel_norm import MelNorm
from models.layers.plus_conv import PlusConv
from models.state_dicts import adding_norm


@dataclass(frozen=True)
class Cnn6Config:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    input_fdim: Annotated[int, "mel bands of the spectrogram, each with its own norm", Bounds(1, MAX_MELS)] = 256
    dropout: Annotated[float, "dropout before each linear layer; 0 is off", Bounds(0, 1, below=True)] = 0.2
    channels: Sequence[int] = (64, 128, 128, 128)  # of each block; every block halves both axes

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        check_numbers(self)
        if not 1 <= len(self.channels) <= MAX_LAYERS or not all(1 <= width <= MAX_CHANNELS for width in self.channels):
            raise ValueError(f"channels must name 1 to {MAX_CHANNELS} channels for each block, got {self.channels}")
        if self.input_fdim < self.smallest_size:
            raise ValueError(
                f"input_fdim must be >= {self.smallest_size} for {len(self.channels)} blocks that halve them, "
                f"got {self.input_fdim}"
            )

    @property
    def smallest_size(self) -> int:
        """Mel bands and frames of which one position is left behind all pools."""
        return 2 ** len(self.channels)


class Cnn6(nn.Module):
    """Norm of the mel bands, blocks of `PlusConv` and average pool, mean over mel, max + mean over time, two layers."""

    default_frontend = ("sp4asc_mel", {})
    entry = "conv1.ch_conv1.weight"

    input_norm = "bn0"  # behind which SpecAugment sets stripes to zero

    def __init__(self, config: Cnn6Config):
        super().__init__()
        self.config = config
        self.bn0 = MelNorm(config.input_fdim)
        for i, (c_in, c_out) in enumerate(pairwise((1, *config.channels)), start=1):
            self.add_module(f"conv{i}", PlusConv(c_in, c_out))
            self.add_module(f"pool{i}", nn.AvgPool2d(2))
        width = config.channels[-1]
        self.dropout1 = nn.Dropout(config.dropout)
        self.fc1 = nn.Linear(width, width)
        self.relu = nn.ReLU()
        self.dropout2 = nn.Dropout(config.dropout)
        self.fc2 = nn.Linear(width, config.n_classes)

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return tuple(f"conv{i}" for i in range(1, 1 + len(self.config.channels)))

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to logits (batch, class), before softmax.

        Raises:
            ValueError: for another shape.
        """
        check_channels(log_mel, 1)
        config, (_, _, n_mels, n_frames) = self.config, log_mel.shape
        if n_mels != config.input_fdim:
            raise ValueError(f"log_mel must have {config.input_fdim} mel bands, got {n_mels}")
        if n_frames < config.smallest_size:
            raise ValueError(f"log_mel must have at least {config.smallest_size} frames, got {n_frames}")
        x = self.bn0(log_mel).transpose(2, 3)  # (batch, 1, time, mel), as the published weights have it
        for i in range(1, 1 + len(config.channels)):
            x = self.get_submodule(f"conv{i}")(x)
            x = self.get_submodule(f"pool{i}")(x)  # (batch, channel, time / 2**i, mel / 2**i)
        x = x.mean(dim=3)  # (batch, channel, time)
        x = x.amax(dim=2) + x.mean(dim=2)  # (batch, channel)
        x = self.relu(self.fc1(self.dropout1(x)))
        return self.fc2(self.dropout2(x))

    @staticmethod
    def unfolded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights into which the published test script has folded the norms, with norms that do what is left to do."""
        plain = dict(state)
        if "bn0.running_mean" not in state and "bn0.weight" in state and "bn0.bias" in state:
            plain |= adding_norm("bn0", state["bn0.bias"].flatten()) | {"bn0.weight": state["bn0.weight"].flatten()}
        for name in [name for name in state if re.fullmatch(r"conv[0-9]{1,2}\.sp_conv2\.bias", name)]:
            plain |= adding_norm(f"{name.split('.')[0]}.bn", plain.pop(name))
        return plain

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell.

        Raises:
            LookupError: for an incomplete state dict.
        """
        named = re.compile(r"conv([0-9]{1,2})\.ch_conv1\.weight")
        n_blocks = sum(named.fullmatch(name) is not None for name in state)
        n_mels = state["bn0.weight"].shape[0]
        return {
            "n_classes": state["fc2.weight"].shape[0],
            "input_fdim": n_mels,
            "channels": [state[f"conv{i}.ch_conv1.weight"].shape[0] for i in range(1, 1 + n_blocks)],
        }, {"n_mels": n_mels}
