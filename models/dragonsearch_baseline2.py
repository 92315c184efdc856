"""The second baseline of dragonsearch's DCASE 2023 Task 1 project: the CNN of the challenge's baseline of 2022.

Source: https://github.com/dragonsearch/DCASE-Task1, class BaselineDCASECNN2, after I. Martín-Morató et al.,
"Low-Complexity Acoustic Scene Classification in DCASE 2022 Challenge", DCASE Workshop 2022, https://arxiv.org/abs/2206.03835.
Departures: the size of its input is an option. The state dict is the published one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, MAX_MELS, Bounds, check_channels, check_numbers

HIDDEN = 100
WIDTH = 32  # channels of the last convolution
POOLS = ((5, 5), (4, 10))  # (mel, time)


@dataclass(frozen=True)
class DragonsearchBaseline2Config:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    dropout: Annotated[float, "dropout behind each pool and the hidden layer; 0 is off", Bounds(0, 1, below=True)] = 0.3
    input_fdim: Annotated[int, "mel bands of the spectrogram", Bounds(20, MAX_MELS)] = 40
    input_tdim: Annotated[int, "frames of the spectrogram", Bounds(50, 1 << 14)] = 51

    def __post_init__(self):
        check_numbers(self)

    @property
    def positions(self) -> tuple[int, int]:
        """What the pools leave of (mel, time)."""
        return _positions(self.input_fdim, self.input_tdim)


class DragonsearchBaseline2(nn.Module):
    """Three 7x7 convolutions, pools behind the second and third, a hidden layer and the classifier."""

    default_frontend = ("cnn3_mel", {})
    entry = "batch_norm3.weight"

    def __init__(self, config: DragonsearchBaseline2Config):
        super().__init__()
        self.config = config
        self.conv1, self.batch_norm1 = nn.Conv2d(1, 16, 7, padding=3), nn.BatchNorm2d(16)
        self.conv2, self.batch_norm2 = nn.Conv2d(16, 16, 7, padding=3), nn.BatchNorm2d(16)
        self.conv3, self.batch_norm3 = nn.Conv2d(16, WIDTH, 7, padding=3), nn.BatchNorm2d(WIDTH)
        self.relu1, self.relu2, self.relu3, self.relu4 = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool1, self.pool2 = (nn.MaxPool2d(size) for size in POOLS)
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(config.dropout) for _ in range(3))
        n_freqs, n_frames = config.positions
        self.fc1 = nn.Linear(WIDTH * n_freqs * n_frames, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, config.n_classes)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to logits (batch, class), before softmax.

        Raises:
            ValueError: for spectrograms of which the pools leave another size than of the config's.
        """
        check_channels(log_mel, 1)
        n_mels, n_frames = log_mel.shape[2:]
        if _positions(n_mels, n_frames) != self.config.positions:
            raise ValueError(
                f"log_mel must have about {self.config.input_fdim} mel bands and {self.config.input_tdim} frames, "
                f"got {n_mels} and {n_frames}: set input_fdim and input_tdim"
            )
        x = self.relu1(self.batch_norm1(self.conv1(log_mel)))  # (batch, 16, mel, time)
        x = self.relu2(self.batch_norm2(self.conv2(x)))
        x = self.dropout1(self.pool1(x))  # (batch, 16, mel / 5, time / 5)
        x = self.relu3(self.batch_norm3(self.conv3(x)))
        x = self.dropout2(self.pool2(x))  # (batch, WIDTH, mel / 20, time / 50)
        x = self.dropout3(self.relu4(self.fc1(x.flatten(1))))
        return self.fc2(x)

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell.

        Of the input the product of what the pools leave is all that they tell: the published mel bands are taken.

        Raises:
            ValueError: for a size that does not go with them; LookupError for an incomplete state dict.
        """
        config = DragonsearchBaseline2Config
        n_inputs, (n_freqs, _) = state["fc1.weight"].shape[1], config().positions
        n_frames, rest = divmod(n_inputs, WIDTH * n_freqs)
        if rest or not n_frames:
            raise ValueError(f"its hidden layer reads {n_inputs} values, no multiple of {WIDTH * n_freqs}")
        known = n_frames == config().positions[1]
        return {
            "n_classes": state["fc2.weight"].shape[0],
            "input_tdim": config.input_tdim if known else 50 * n_frames,
        }, {"n_mels": config.input_fdim}


def _positions(n_mels: int, n_frames: int) -> tuple[int, int]:
    (mel1, time1), (mel2, time2) = POOLS
    return n_mels // mel1 // mel2, n_frames // time1 // time2
