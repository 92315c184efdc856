"""TF-SepNet: convolutions along freq and along time side by side, each on half of the channels.

Source: Y. Cai, P. Zhang, S. Li, "TF-SepNet: An Efficient 1D Kernel Design in CNNs for Low-Complexity Acoustic Scene
Classification", ICASSP 2024, https://arxiv.org/abs/2309.08200, in the form of their DCASE 2024 system,
https://github.com/yqcai888/easy_dcase_task1. Departures: none in the function or in the state dict.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, Bounds, check_channels, check_numbers
from models.layers.add import Add
from models.layers.axis_mean import AxisMean
from models.layers.channel_shuffle import ChannelShuffle
from models.layers.concat import Concat
from models.layers.conv_bn_relu import ConvBnRelu
from models.layers.conv_classifier import ConvClassifier
from models.layers.residual_norm import ResidualNorm
from models.layers.split import Split

# A number: a block with so many times the base channels; N: residual norm; M: max pool, 2x2.
LAYOUTS = {
    17: ("N", 1, 1, "N", "M", 1.5, 1.5, "N", "M", 2, 2, "N", "M", 2.5, 2.5, 2.5, "N"),
    16: ("N", 1, 1, "N", "M", 1.5, 1.5, "N", "M", 2, 2, "N", 2.5, 2.5, 2.5, "N"),
}


@dataclass(frozen=True)
class TfSepnetConfig:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    in_channels: Annotated[int, "channels of the spectrogram", Bounds(1, MAX_CHANNELS)] = 1
    base_channels: Annotated[
        int, "channels of the first stage, a multiple of 4; the last has 2.5 times as many", Bounds(4, MAX_CHANNELS)
    ] = 64
    depth: Annotated[int, "17, or 16 without the third max pool", Bounds(16, 17)] = 17
    kernel_size: Annotated[int, "length of the depthwise kernels, odd", Bounds(1, 99)] = 3
    dropout: Annotated[float, "share of values dropped behind each pointwise convolution", Bounds(0, 1, below=True)] = (
        0.1
    )

    def __post_init__(self):
        check_numbers(self)
        if self.base_channels % 4:
            raise ValueError(
                f"base_channels must be a multiple of 4, got {self.base_channels}: blocks work on halves of 1, 1.5, 2 "
                "and 2.5 times as many channels"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")


class TimeFreqSepBlock(nn.Module):
    """A pointwise transition where the width changes, shuffle, and a branch along freq beside one along time.

    A branch is a depthwise convolution along its axis, the mean over that axis, and a pointwise convolution, whose
    result is added to every position of the axis.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, dropout: float):
        super().__init__()
        half = c_out // 2
        self.trans_conv = ConvBnRelu(c_in, c_out) if c_in != c_out else None
        self.shuffle, self.split = ChannelShuffle(2), Split(2)
        self.freq_dw_conv = ConvBnRelu(half, half, (kernel_size, 1), groups=half)
        self.freq_mean = AxisMean(2)
        self.freq_pw_conv = ConvBnRelu(half, half)
        self.freq_dropout, self.freq_add = nn.Dropout(dropout), Add()
        self.temp_dw_conv = ConvBnRelu(half, half, (1, kernel_size), groups=half)
        self.temp_mean = AxisMean(3)
        self.temp_pw_conv = ConvBnRelu(half, half)
        self.temp_dropout, self.temp_add = nn.Dropout(dropout), Add()
        self.concat = Concat()

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        if self.trans_conv is not None:
            x = self.trans_conv(x)
        x1, x2 = self.split(self.shuffle(x))  # (batch, channel / 2, freq, time)
        y1 = self.freq_pw_conv(self.freq_mean(self.freq_dw_conv(x1)))  # (batch, channel / 2, 1, time)
        y2 = self.temp_pw_conv(self.temp_mean(self.temp_dw_conv(x2)))  # (batch, channel / 2, freq, 1)
        y1 = self.freq_add(x1, self.freq_dropout(y1))
        y2 = self.temp_add(x2, self.temp_dropout(y2))
        return self.concat(y1, y2)


class TfSepnet(nn.Module):
    """Two strided convolutions, blocks with residual norms and max pools between, pointwise classifier.

    Raises:
        ValueError: from `forward`, for spectrograms that are too small for the pools.
    """

    # Their front end has no random band edges: those end at half the sampling rate.
    default_frontend = ("cp_mel", {"n_mels": 512, "fmax_aug_range": 1})
    entry = "conv_layers.0._conv.weight"

    def __init__(self, config: TfSepnetConfig):
        super().__init__()
        self.config = config
        base, layout = config.base_channels, LAYOUTS[config.depth]
        self.conv_layers = nn.Sequential(
            ConvBnRelu(config.in_channels, base // 2, (3, 3), stride=2),
            ConvBnRelu(base // 2, 2 * base, (3, 3), stride=2, groups=base // 2),
        )
        self.middle_layers, width = nn.Sequential(), 2 * base
        for what in layout:
            if what == "N":
                layer = ResidualNorm()
            elif what == "M":
                layer = nn.MaxPool2d(2)
            else:
                c_in, width = width, int(what * base)
                layer = TimeFreqSepBlock(c_in, width, config.kernel_size, config.dropout)
            self.middle_layers.append(layer)
        # What goes into every norm but the first is the end of a stage.
        self.feature_layers = tuple(f"middle_layers.{i - 1}" for i, what in enumerate(layout) if what == "N" and i > 0)
        self.classifier = ConvClassifier(width, config.n_classes)
        # Two strides round up, pools down.
        self.smallest_input = 4 * (2 ** layout.count("M") - 1) + 1

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, channel, mel, time) to logits (batch, class), before softmax."""
        check_channels(log_mel, self.config.in_channels)
        if min(log_mel.shape[2:]) < self.smallest_input:
            raise ValueError(
                f"log_mel must have at least {self.smallest_input} mel bands and frames at depth {self.config.depth}, "
                f"got {log_mel.shape[2]} and {log_mel.shape[3]}"
            )
        x = self.conv_layers(log_mel)  # (batch, 2 * base, mel / 4, time / 4)
        x = self.middle_layers(x)  # (batch, 2.5 * base, mel / 32, time / 32)
        return self.classifier(x)

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell; dropout is the published one.

        Raises:
            LookupError: for an incomplete state dict.
        """
        stem, kernel = state["conv_layers.0._conv.weight"], state["middle_layers.1.freq_dw_conv._conv.weight"]
        # Without the third pool the last blocks stand one place earlier.
        depth = 16 if any(name.startswith("middle_layers.12.") for name in state) else 17
        return {
            "n_classes": state["classifier.conv.weight"].shape[0],
            "in_channels": stem.shape[1],
            "base_channels": 2 * stem.shape[0],
            "depth": depth,
            "kernel_size": kernel.shape[2],
        }, {}
