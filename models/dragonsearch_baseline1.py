"""The first baseline of dragonsearch's DCASE 2023 Task 1 project: three 3x3 convolutions, two linear layers.

Source: https://github.com/dragonsearch/DCASE-Task1, class BaselineDCASECNN; no paper. Departures: it prints nothing,
and the size of its input is an option. The state dict is the published one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, MAX_MELS, Bounds, check_channels, check_numbers

HIDDEN = 100
WIDTH = 32  # channels of the last convolution
SMALLEST = 20  # mel bands and frames of which one position is left behind the pools


@dataclass(frozen=True)
class DragonsearchBaseline1Config:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    dropout: Annotated[float, "dropout behind each pool; 0 is off", Bounds(0, 1, below=True)] = 0.3
    input_fdim: Annotated[int, "mel bands of the spectrogram", Bounds(SMALLEST, MAX_MELS)] = 64
    input_tdim: Annotated[int, "frames of the spectrogram", Bounds(SMALLEST, 1 << 14)] = 128

    def __post_init__(self):
        check_numbers(self)

    @property
    def positions(self) -> tuple[int, int]:
        """What the pools leave of (mel, time)."""
        return _positions(self.input_fdim), _positions(self.input_tdim)


class DragonsearchBaseline1(nn.Module):
    """Two convolutions, pool, a third without padding, pool, a linear layer and the classifier."""

    # 129 frames a second, of which the pools leave what they leave of 128.
    default_frontend = ("dragonsearch_mel", {"n_mels": 64, "hop_length": 250})
    entry = "batch_norm_3.weight"

    def __init__(self, config: DragonsearchBaseline1Config):
        super().__init__()
        self.config = config
        self.conv2d_1, self.batch_norm_1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2d_2, self.batch_norm_2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2d_3, self.batch_norm_3 = nn.Conv2d(16, WIDTH, 3), nn.BatchNorm2d(WIDTH)
        self.relu_1, self.relu_2, self.relu_3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool_1, self.pool_2 = nn.MaxPool2d(5), nn.MaxPool2d(2)
        self.dropout_1, self.dropout_2 = nn.Dropout(config.dropout), nn.Dropout(config.dropout)
        n_freqs, n_frames = config.positions
        self.dense_1 = nn.Linear(WIDTH * n_freqs * n_frames, HIDDEN)
        self.dropout_3 = nn.Dropout(0.5)
        self.dense_2 = nn.Linear(HIDDEN, config.n_classes)  # nothing between the two linear layers, as published

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to logits (batch, class), before softmax.

        Raises:
            ValueError: for spectrograms of which the pools leave another size than of the config's.
        """
        check_channels(log_mel, 1)
        n_mels, n_frames = log_mel.shape[2:]
        if (_positions(n_mels), _positions(n_frames)) != self.config.positions:
            raise ValueError(
                f"log_mel must have about {self.config.input_fdim} mel bands and {self.config.input_tdim} frames, "
                f"got {n_mels} and {n_frames}: set input_fdim and input_tdim"
            )
        x = self.relu_1(self.batch_norm_1(self.conv2d_1(log_mel)))  # (batch, 16, mel, time)
        x = self.relu_2(self.batch_norm_2(self.conv2d_2(x)))
        x = self.dropout_1(self.pool_1(x))  # (batch, 16, mel / 5, time / 5)
        x = self.relu_3(self.batch_norm_3(self.conv2d_3(x)))
        x = self.dropout_2(self.pool_2(x))  # (batch, WIDTH, about mel / 10 - 1, time / 10 - 1)
        x = self.dropout_3(self.dense_1(x.flatten(1)))
        return self.dense_2(x)

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell.

        Of the input the product of what the pools leave is all that they tell: the published mel bands are taken.

        Raises:
            ValueError: for a size that does not go with them; LookupError for an incomplete state dict.
        """
        config = DragonsearchBaseline1Config
        n_inputs, n_freqs = state["dense_1.weight"].shape[1], _positions(config.input_fdim)
        n_frames, rest = divmod(n_inputs, WIDTH * n_freqs)
        if rest or not n_frames:
            raise ValueError(f"its linear layer reads {n_inputs} values, no multiple of {WIDTH * n_freqs}")
        known = n_frames == _positions(config.input_tdim)
        return {
            "n_classes": state["dense_2.weight"].shape[0],
            "input_tdim": config.input_tdim if known else 10 * n_frames + 10,
        }, {"n_mels": config.input_fdim}


def _positions(n: int) -> int:
    """Of n mel bands or frames: a pool of 5, a 3x3 convolution without padding, a pool of 2."""
    return (n // 5 - 2) // 2
