"""BC-ResNet for acoustic scenes: residual blocks whose branch is averaged over freq and broadcast back.

Source: B. Kim, S. Chang, J. Lee, D. Sung, "Broadcasted Residual Learning for Efficient Keyword Spotting", Interspeech
2021, https://arxiv.org/abs/2106.04140, with the residual norms of "Domain Generalization on Efficient Acoustic Scene
Classification using Residual Normalization", DCASE Workshop 2021, https://arxiv.org/abs/2111.06531, in the form of
https://github.com/yqcai888/easy_dcase_task1. Departures: none in the function or in the state dict. The authors' own
network, for keywords, is another one: dilated, with five sub-bands, strides in place of pools, and a wider head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, Bounds, check_channels, check_numbers
from models.layers.add import Add
from models.layers.axis_mean import AxisMean
from models.layers.conv_bn_relu import ConvBnRelu
from models.layers.conv_classifier import ConvClassifier
from models.layers.residual_norm import ResidualNorm
from models.layers.sub_spectral_norm import sub_spectral_norm

# A number: a block with so many times the base channels; N: residual norm; M: max pool, 2x2.
LAYOUT = ("N", 1, 1, "N", "M", 1.5, 1.5, "N", "M", 2, 2, "N", 2.5, 2.5, 2.5, "N")
N_HALVINGS = 3  # of freq and time: the stem's stride and two pools


@dataclass(frozen=True)
class BcResnetConfig:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    in_channels: Annotated[int, "channels of the spectrogram", Bounds(1, MAX_CHANNELS)] = 1
    base_channels: Annotated[
        int, "channels of the first stage; the last has 2.5 times as many", Bounds(1, MAX_CHANNELS)
    ] = 40
    depth: Annotated[int, "layers, as its authors count: only 15", Bounds(15, 15)] = 15
    kernel_size: Annotated[int, "length of the depthwise kernels, odd", Bounds(1, 99)] = 3
    dropout: Annotated[float, "share of values dropped at the end of a branch", Bounds(0, 1, below=True)] = 0.1
    sub_bands: Annotated[
        int, "bands of mel rows that are normalised by themselves; 1 is off, a power of 2 for 256 mel bands", Bounds(1)
    ] = 1

    def __post_init__(self):
        check_numbers(self)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.sub_bands * self.base_channels * 2.5 > MAX_CHANNELS:
            raise ValueError(
                f"sub_bands times 2.5 * base_channels must be at most {MAX_CHANNELS}, got {self.sub_bands} and "
                f"{self.base_channels}"
            )


class BroadcastBlock(nn.Module):
    """A depthwise convolution along freq, and beside it what a branch along time makes of its mean over freq.

    Both are added, the branch to every row, and the input too where the width stays. A pointwise transition comes
    first where it changes.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, dropout: float, sub_bands: int):
        super().__init__()
        self.trans_conv = ConvBnRelu(c_in, c_out) if c_in != c_out else None
        self.freq_dw_conv = nn.Conv2d(
            c_out, c_out, (kernel_size, 1), padding=(kernel_size // 2, 0), groups=c_out, bias=False
        )
        self.ssn = sub_spectral_norm(c_out, sub_bands)
        self.freq_mean = AxisMean(2)
        self.temp_dw_conv = ConvBnRelu(c_out, c_out, (1, kernel_size), groups=c_out, relu=False)
        self.swish = nn.SiLU()
        self.pw_conv = nn.Conv2d(c_out, c_out, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.broadcast_add = Add()
        self.shortcut_add = Add() if c_in == c_out else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        if self.trans_conv is not None:
            x = self.trans_conv(x)
        rows = self.ssn(self.freq_dw_conv(x))
        y = self.swish(self.temp_dw_conv(self.freq_mean(rows)))  # (batch, channel, 1, time)
        y = self.broadcast_add(rows, self.dropout(self.pw_conv(y)))  # (batch, channel, freq, time)
        if self.shortcut_add is not None:
            y = self.shortcut_add(y, x)
        return self.relu(y)


class BcResnet(nn.Module):
    """Strided 5x5 stem, blocks with residual norms and max pools between, pointwise classifier.

    Raises:
        ValueError: from `forward`, for spectrograms that the pools or the sub-bands do not fit.
    """

    # Their front end has no random band edges: those end at half the sampling rate.
    default_frontend = ("cp_mel", {"fmax_aug_range": 1})
    entry = "middle_layers.1.ssn._bn.weight"

    def __init__(self, config: BcResnetConfig):
        super().__init__()
        self.config = config
        width = 2 * config.base_channels
        self.conv_layers = nn.Conv2d(config.in_channels, width, 5, stride=2, padding=2, bias=False)
        self.middle_layers = nn.Sequential()
        for what in LAYOUT:
            if what == "N":
                layer = ResidualNorm()
            elif what == "M":
                layer = nn.MaxPool2d(2)
            else:
                c_in, width = width, int(what * config.base_channels)
                layer = BroadcastBlock(c_in, width, config.kernel_size, config.dropout, config.sub_bands)
            self.middle_layers.append(layer)
        # What goes into every norm but the first is the end of a stage.
        self.feature_layers = tuple(f"middle_layers.{i - 1}" for i, what in enumerate(LAYOUT) if what == "N" and i > 0)
        self.classifier = ConvClassifier(width, config.n_classes)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, channel, mel, time) to logits (batch, class), before softmax."""
        check_channels(log_mel, self.config.in_channels)
        self._check_size(*log_mel.shape[2:])
        x = self.conv_layers(log_mel)  # (batch, 2 * base, mel / 2, time / 2)
        x = self.middle_layers(x)  # (batch, 2.5 * base, mel / 8, time / 8)
        return self.classifier(x)

    def _check_size(self, n_mels: int, n_frames: int) -> None:
        least = 2**N_HALVINGS - 1  # the stem rounds up, pools down
        if min(n_mels, n_frames) < least:
            raise ValueError(
                f"log_mel must have at least {least} mel bands and {least} frames, got {n_mels} and {n_frames}"
            )
        rows = [(n_mels + 1) // 2 >> i for i in range(N_HALVINGS)]
        if any(n % self.config.sub_bands for n in rows):
            raise ValueError(
                f"sub_bands must divide the rows that {n_mels} mel bands leave in each stage, "
                f"{', '.join(map(str, rows))}, got {self.config.sub_bands}"
            )

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell; dropout is the published one.

        Raises:
            LookupError: for an incomplete state dict.
        """
        stem, kernel = state["conv_layers.weight"], state["middle_layers.1.freq_dw_conv.weight"]
        return {
            "n_classes": state["classifier.conv.weight"].shape[0],
            "in_channels": stem.shape[1],
            "base_channels": stem.shape[0] // 2,
            "kernel_size": kernel.shape[2],
            "sub_bands": state["middle_layers.1.ssn._bn.weight"].shape[0] // kernel.shape[0],
        }, {}
