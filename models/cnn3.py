"""The small CNN of the early DCASE baselines: three convolutions, two wide pools, two linear layers.

Source: I. Martín-Morató, F. Paissan, A. Ancilotto, T. Heittola, A. Mesaros, E. Farella, A. Brutti, T. Virtanen,
"Low-Complexity Acoustic Scene Classification in DCASE 2022 Challenge", DCASE Workshop 2022,
https://arxiv.org/abs/2206.03835, in the form of https://github.com/yqcai888/easy_dcase_task1. Departures: none in the
function or in the state dict.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, Bounds, check_channels, check_numbers
from models.layers.conv_bn_relu import ConvBnRelu

N_HIDDEN = 100


@dataclass(frozen=True)
class Cnn3Config:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    in_channels: Annotated[int, "channels of the spectrogram", Bounds(1, MAX_CHANNELS)] = 1
    base_channels: Annotated[
        int, "channels of the first two convolutions; the third has twice as many", Bounds(1, MAX_CHANNELS // 4)
    ] = 16
    kernel_size: Annotated[int, "size of the kernels in both directions, odd", Bounds(1, 99)] = 7
    dropout: Annotated[float, "share of values dropped behind pools and hidden layer", Bounds(0, 1, below=True)] = 0.3

    def __post_init__(self):
        check_numbers(self)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")


class Cnn3(nn.Module):
    """Convolutions with norms and ReLUs, pools to two positions along freq and one along time, two linear layers.

    Raises:
        ValueError: from `forward`, for spectrograms that the pools do not take to these: clips of about a second fit.
    """

    default_frontend = ("cnn3_mel", {})
    entry = "conv1._conv.weight"

    def __init__(self, config: Cnn3Config):
        super().__init__()
        self.config = config
        base, kernel = config.base_channels, (config.kernel_size, config.kernel_size)
        # The norms make the convolutions' biases superfluous; published checkpoints have them.
        self.conv1 = ConvBnRelu(config.in_channels, base, kernel, bias=True)
        self.conv2 = ConvBnRelu(base, base, kernel, bias=True)
        self.max_pooling1, self.dropout1 = nn.MaxPool2d((5, 5)), nn.Dropout(config.dropout)
        self.conv3 = ConvBnRelu(base, 2 * base, kernel, bias=True)
        self.max_pooling2, self.dropout2 = nn.MaxPool2d((4, 10)), nn.Dropout(config.dropout)
        self.flatten = nn.Flatten()
        self.linear1, self.relu, self.dropout3 = nn.Linear(4 * base, N_HIDDEN), nn.ReLU(), nn.Dropout(config.dropout)
        self.linear2 = nn.Linear(N_HIDDEN, config.n_classes)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, channel, mel, time) to logits (batch, class), before softmax."""
        check_channels(log_mel, self.config.in_channels)
        n_mels, n_frames = log_mel.shape[2:]
        if not (40 <= n_mels < 60 and 50 <= n_frames < 100):
            raise ValueError(f"log_mel must have 40 to 59 mel bands and 50 to 99 frames, got {n_mels} and {n_frames}")
        x = self.conv2(self.conv1(log_mel))  # (batch, base, mel, time)
        x = self.conv3(self.dropout1(self.max_pooling1(x)))  # (batch, 2 * base, mel / 5, time / 5)
        x = self.flatten(self.dropout2(self.max_pooling2(x)))  # (batch, 4 * base)
        x = self.dropout3(self.relu(self.linear1(x)))
        return self.linear2(x)

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell; dropout is the published one.

        Raises:
            LookupError: for an incomplete state dict.
        """
        conv = state["conv1._conv.weight"]
        return {
            "n_classes": state["linear2.weight"].shape[0],
            "in_channels": conv.shape[1],
            "base_channels": conv.shape[0],
            "kernel_size": conv.shape[2],
        }, {}
