"""TF-SepNet as dragonsearch's DCASE 2023 Task 1 project has it: separable convolutions along frequency and along time.

Source: https://github.com/dragonsearch/DCASE-Task1, class TfSepNet, after Y. Cai, P. Zhang, S. Li, "TF-SepNet: An
Efficient 1D Kernel Design in CNNs for Low-Complexity Acoustic Scene Classification", ICASSP 2024,
https://arxiv.org/abs/2309.08200. Unlike the authors' network it has one 5x5 convolution as its stem, norms and ReLUs on
few convolutions only, a norm with a gain and an offset per channel, and shuffles of a fixed number of groups.

Departures: the Freq-MixStyle that the published network begins with in training is an augmentation here
(`--augment freq_mixstyle --mixstyle_p 0.5 --mixstyle_alpha 0.2`). The state dict is the published one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, Bounds, check_channels, check_numbers
from models.layers.affine_residual_norm import AffineResidualNorm

# Channels of the stem and of each stage relative to `width`, blocks of each stage, and whether a max pool ends it.
STEM = 2
STAGES = ((1, 2, True), (1.5, 2, True), (2, 2, False), (2.5, 3, False))
SMALLEST = 7  # mel bands and frames of which one position is left behind the stem and two pools


@dataclass(frozen=True)
class DragonsearchTfSepnetConfig:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    width: Annotated[int, "channels of the first stage; even", Bounds(2, MAX_CHANNELS // 3)] = 60
    dropout_rate: Annotated[float, "dropout in each half of a block; 0 is off", Bounds(0, 1, below=True)] = 0.33
    shuffle: Annotated[bool, "shuffle the channels of a block before it splits them"] = True
    shuffle_groups: Annotated[int, "groups of the channel shuffle; divides every width", Bounds(1, MAX_CHANNELS)] = 10

    def __post_init__(self):
        check_numbers(self)
        for width in self.widths[1:]:
            if width % 2 or (self.shuffle and width % self.shuffle_groups):
                raise ValueError(
                    f"width must give channels that 2 and shuffle_groups = {self.shuffle_groups} divide, "
                    f"got {self.width}: {', '.join(map(str, self.widths[1:]))}"
                )

    @property
    def widths(self) -> list[int]:
        """Channels of the stem and of each stage."""
        return [round(STEM * self.width)] + [round(factor * self.width) for factor, _, _ in STAGES]


class Conv(nn.Module):
    """A convolution without bias that keeps the size, and nothing else; its name is part of the published weights."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int] = (1, 1), groups: int = 1):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvNormRelu(nn.Module):
    """Pointwise convolution, batch norm, ReLU."""

    def __init__(self, n_channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(n_channels)
        self.conv = nn.Conv2d(n_channels, n_channels, 1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class TimeFreqBlock(nn.Module):
    """Shuffles and splits the channels; adds to one half a summary over frequency, to the other one over time.

    A summary is a depthwise line, a mean along it, a pointwise convolution and a dropout.

    Args:
        shuffle_groups: groups of the shuffle; 0 is off.
    """

    def __init__(self, c_in: int, c_out: int, dropout_rate: float, shuffle_groups: int):
        super().__init__()
        half = c_out // 2
        if c_in != c_out:
            self.trans_conv = Conv(c_in, c_out)
        self.changes_width, self.shuffle_groups = c_in != c_out, shuffle_groups
        self.freq_dw_conv = Conv(half, half, (3, 1), groups=half)
        self.temp_dw_conv = Conv(half, half, (1, 3), groups=half)
        self.freq_pw_conv = ConvNormRelu(half)
        self.temp_pw_conv = ConvNormRelu(half)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        if self.changes_width:
            x = self.trans_conv(x)
        if self.shuffle_groups:
            x = x.unflatten(1, (-1, self.shuffle_groups)).transpose(1, 2).flatten(1, 2)
        along_freq, along_time = x.chunk(2, dim=1)
        by_time = self.freq_dw_conv(along_freq).mean(dim=2, keepdim=True)  # (batch, channel / 2, 1, time)
        by_freq = self.temp_dw_conv(along_time).mean(dim=3, keepdim=True)  # (batch, channel / 2, freq, 1)
        along_freq = along_freq + self.dropout(self.freq_pw_conv(by_time))
        along_time = along_time + self.dropout(self.temp_pw_conv(by_freq))
        return torch.cat([along_freq, along_time], dim=1)


class DragonsearchTfSepnet(nn.Module):
    """Strided 5x5 stem, four stages of `TimeFreqBlock` with norms and two max pools, pointwise classifier, mean."""

    default_frontend = ("dragonsearch_mel", {})
    entry = "feature.2.freq_dw_conv.conv.weight"

    def __init__(self, config: DragonsearchTfSepnetConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        stem = nn.Conv2d(1, widths[0], 5, stride=2, padding=2, bias=False)
        self.feature = nn.Sequential(stem, AffineResidualNorm(widths[0]))
        c_in, groups = widths[0], config.shuffle_groups if config.shuffle else 0
        for c_out, (_, n_blocks, ends_in_pool) in zip(widths[1:], STAGES, strict=True):
            for _ in range(n_blocks):
                self.feature.append(TimeFreqBlock(c_in, c_out, config.dropout_rate, groups))
                c_in = c_out
            self.feature.append(AffineResidualNorm(c_out))
            if ends_in_pool:
                self.feature.append(nn.MaxPool2d(2))
        self.classifier = nn.Conv2d(c_in, config.n_classes, 1)
        _init(self)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to logits (batch, class), before softmax.

        Raises:
            ValueError: for another shape.
        """
        check_channels(log_mel, 1)
        if min(log_mel.shape[2:]) < SMALLEST:
            raise ValueError(
                f"log_mel must have at least {SMALLEST} mel bands and frames, "
                f"got {log_mel.shape[2]} and {log_mel.shape[3]}"
            )
        x = self.feature(log_mel)  # (batch, channel, mel / 8, time / 8)
        x = self.classifier(x)  # (batch, class, freq, time)
        return x.mean(dim=(2, 3))

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell.

        Shuffles leave no trace in it: the published number of groups is taken where it divides all widths, else the
        largest that does.

        Raises:
            ValueError: for widths that no config gives; LookupError for an incomplete state dict.
        """
        width = 2 * state["feature.2.freq_dw_conv.conv.weight"].shape[0]
        widths = [round(factor * width) for factor, _, _ in STAGES]
        known = math.gcd(*widths)
        default = DragonsearchTfSepnetConfig.shuffle_groups
        groups = default if known % default == 0 else known
        return {"n_classes": state["classifier.weight"].shape[0], "width": width, "shuffle_groups": groups}, {}


def _init(model: DragonsearchTfSepnet) -> None:
    """The stem and the four convolutions of a block; the others keep PyTorch's own start."""
    convs = [model.feature[0]]
    for block in model.modules():
        if isinstance(block, TimeFreqBlock):
            parts = (block.freq_dw_conv, block.temp_dw_conv, block.freq_pw_conv, block.temp_pw_conv)
            convs += [part.conv for part in parts]
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
