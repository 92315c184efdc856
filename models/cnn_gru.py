"""CNN-GRU: factorised convolutions in two branches, then a GRU; second in DCASE 2025 Task 1.

Source: E.-L. Tan, J. W. Yeow, S. Peksi, H. Li, Z. Yang, W.-S. Gan, "Acoustic Scene Classification Using CNN-GRU Model
Without Knowledge Distillation", DCASE Challenge technical report 2025, https://arxiv.org/abs/2509.09931; entries
Tan_SNTLNTU_task1_1 and _2, https://github.com/joesephgit/DCASE2025.

The GRU does not run over time, which is averaged away before it: its steps are the channels, and the features of a step
the positions left of the mel axis.

Departures: the number of classes and of mel bands is an option. Names of the state dict are the published ones, the two
modules that variant 2 has and never uses included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, MAX_MELS, Bounds, check_channels, check_numbers

STEM_CHANNELS = 7
HIDDEN = 64  # units of the GRU
MEL_REDUCTION = 16  # mel bands for each feature of the GRU
MIN_FRAMES = 6


@dataclass(frozen=True)
class CnnGruConfig:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    variant: Annotated[int, "1: with channel shuffles; 2: without, and with a linear end", Bounds(1, 2)] = 1
    base_channels: Annotated[int, "twice the channels of the first block; 4 divides it", Bounds(4, MAX_CHANNELS)] = 24
    channels_multiplier: Annotated[float, "width of both branches in base_channels", Bounds(0, 100, above=True)] = 1.5
    expansion_rate: Annotated[int, "growth of the channels inside a block", Bounds(1, 100)] = 2
    divisor: Annotated[float, "how often the GRU's steps go into the widest layer", Bounds(1, MAX_CHANNELS)] = 5
    input_fdim: Annotated[int, "mel bands of the spectrogram, a multiple of 16", Bounds(MEL_REDUCTION, MAX_MELS)] = 256

    def __post_init__(self):
        check_numbers(self)
        if self.base_channels % 4:
            raise ValueError(f"base_channels must be a multiple of 4, got {self.base_channels}")
        if self.input_fdim % MEL_REDUCTION:
            raise ValueError(f"input_fdim must be a multiple of {MEL_REDUCTION}, got {self.input_fdim}")
        _, narrow, wide, widest, steps = self.widths
        if not steps or narrow < 1 or wide % 2 or wide % narrow:
            raise ValueError(
                "base_channels, channels_multiplier, expansion_rate and divisor must give a branch whose width divides "
                f"its expanded one, which is even, and a step, got {narrow}, {wide} and {steps}"
            )
        if widest > MAX_CHANNELS:
            raise ValueError(f"the widest layer has {widest} channels: lower base_channels or expansion_rate")

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """Channels of the stem, of the branches before and after expansion, of the widest layer, steps of the GRU."""
        narrow = int(self.base_channels * self.channels_multiplier)
        wide = int(self.base_channels * self.channels_multiplier * self.expansion_rate)
        widest = int(self.base_channels * self.channels_multiplier * self.expansion_rate**2)
        return self.base_channels // 2, narrow, wide, widest, int(widest / self.divisor)


class ConvNorm(nn.Sequential):
    """Convolution without bias (.0) and batch norm (.1); an odd kernel (freq, time) keeps the size at stride 1."""

    def __init__(
        self, c_in: int, c_out: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), groups: int = 1
    ):
        padding = (kernel[0] // 2, kernel[1] // 2)
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a number in 0 .. 1 that the means of all channels decide (Hu et al., CVPR 2018)."""

    def __init__(self, n_channels: int):
        super().__init__()
        self.fc1 = nn.Linear(n_channels, n_channels // 2)
        self.fc2 = nn.Linear(n_channels // 2, n_channels)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3))))))  # (batch, channel)
        return x * scale[:, :, None, None]


def shuffle(x: Tensor, n_groups: int) -> Tensor:
    """Takes channels in turn from each group: channel i of group g moves to place g of row i."""
    return x.unflatten(1, (n_groups, -1)).transpose(1, 2).flatten(1, 2)


class CnnGru(nn.Module):
    """One block, two branches behind a max and an average pool, their weighted sum, two convolutions, GRU and end."""

    default_frontend = (
        "dcase24_mel", {"sample_rate": 44100, "n_fft": 8192, "win_length": 8192, "hop_length": 1364},
    )  # fmt: skip
    entry = "bgru2d_4_1.weight_ih_l0"

    def __init__(self, config: CnnGruConfig):
        super().__init__()
        self.config = config
        first, narrow, wide, widest, steps = config.widths
        expansion = config.expansion_rate
        # Shares of the one in a sum of two, free numbers: average pools, max pools, u behind, average branch.
        self.param1, self.param2, self.param3, self.param4 = (nn.Parameter(torch.tensor(0.5)) for _ in range(4))
        self.conv2d_1_0 = ConvNorm(1, STEM_CHANNELS, (3, 3))
        self.conv2d_1_1 = ConvNorm(STEM_CHANNELS, first, (1, 1))
        self.codw2d_1L1 = ConvNorm(first, expansion * first, (3, 1), groups=first)
        self.codw2d_1R1 = ConvNorm(expansion * first, expansion * first, (1, 3), groups=first)
        self.se_1_1 = SqueezeExcitation(expansion * first)
        for branch in (1, 2):  # behind the max pool, behind the average pool
            self.add_module(f"conv2d_2_{branch}", ConvNorm(expansion * first, narrow, (1, 1)))
            self.add_module(f"codw2d_2_{branch}L", ConvNorm(narrow, wide, (5, 1), groups=narrow))
            self.add_module(f"codw2d_2_{branch}R", ConvNorm(wide, wide, (1, 5), (2, 2), groups=wide))
        self.se_2_1, self.se_2_2 = SqueezeExcitation(wide), SqueezeExcitation(wide)
        self.conv2d_3_1 = ConvNorm(wide, wide, (1, 1))
        if config.variant == 2:
            self.bthnorm2d_3 = nn.BatchNorm2d(wide)  # never used, but in the published weights
        self.codw2d_3_1 = ConvNorm(wide, widest, (5, 1), (2, 1), groups=wide)
        self.drop_channels = nn.Dropout2d(0.3)
        self.conv2d_4_1 = ConvNorm(widest, steps, (5, 1))
        self.bgru2d_4_1 = nn.GRU(config.input_fdim // MEL_REDUCTION, HIDDEN, batch_first=True)
        self.drop_steps = nn.Dropout1d(0.5)
        if config.variant == 2:
            self.line2d_5_1 = nn.Linear(steps, config.n_classes)  # never used either
        self.conv1d_5_2 = nn.Conv1d(1, config.n_classes, steps)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to logits (batch, class), before softmax.

        Raises:
            ValueError: for another shape.
        """
        config, shuffles = self.config, self.config.variant == 1
        check_channels(log_mel, 1)
        if log_mel.shape[2] != config.input_fdim or log_mel.shape[3] < MIN_FRAMES:
            raise ValueError(
                f"log_mel must have {config.input_fdim} mel bands and at least {MIN_FRAMES} frames, "
                f"got {log_mel.shape[2]} and {log_mel.shape[3]}"
            )
        x = self.conv2d_1_1(self.conv2d_1_0(log_mel))  # (batch, base / 2, mel, time)
        if shuffles:
            x = shuffle(x, config.base_channels // 4)
        x = F.silu(self.codw2d_1R1(self.codw2d_1L1(x)))
        x = self.se_1_1(x)

        x_max = self._branch(F.max_pool2d(x, 2), 1)  # (batch, wide, mel / 4, time / 4)
        x_mean = self._branch(F.avg_pool2d(x, 2), 2)
        averages = _mix(self.param1, F.avg_pool2d(x_mean, 2), F.avg_pool2d(x_max, 2))
        largest = _mix(self.param2, F.max_pool2d(x_max, 2), F.max_pool2d(x_mean, 2))
        x = _mix(self.param4, averages, largest)  # (batch, wide, mel / 8, time / 8)

        x = x + self.conv2d_3_1(x)
        if shuffles:
            x = shuffle(x, x.shape[1] // 2)
        x = self.drop_channels(F.silu(self.codw2d_3_1(x)))  # (batch, widest, mel / 16, time / 8)
        x = F.silu(self.conv2d_4_1(x))
        x = x.mean(dim=3)  # (batch, step, mel / 16)

        y, _ = self.bgru2d_4_1(x)  # (batch, step, HIDDEN)
        y = self.drop_steps(y)
        z = _mix(self.param3, x.mean(dim=2), y.mean(dim=2))  # (batch, step)
        if shuffles:
            z = F.silu(z)
        return self.conv1d_5_2(z[:, None]).flatten(1)

    @property
    def skips_layers(self) -> bool:
        return self.config.variant == 2  # those that it never uses

    def _branch(self, x: Tensor, number: int) -> Tensor:
        x = self.get_submodule(f"conv2d_2_{number}")(x)
        x = self.get_submodule(f"codw2d_2_{number}L")(x)
        x = F.silu(self.get_submodule(f"codw2d_2_{number}R")(x))
        return self.get_submodule(f"se_2_{number}")(x)

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell.

        Raises:
            ValueError: for widths that no config gives; LookupError for an incomplete state dict.
        """
        first, expanded = state["conv2d_1_1.0.weight"].shape[0], state["codw2d_1L1.0.weight"].shape[0]
        narrow, widest = state["conv2d_2_1.0.weight"].shape[0], state["codw2d_3_1.0.weight"].shape[0]
        n_classes, _, steps = state["conv1d_5_2.weight"].shape
        n_mels = MEL_REDUCTION * state["bgru2d_4_1.weight_ih_l0"].shape[1]
        config = {
            "n_classes": n_classes,
            "variant": 2 if "line2d_5_1.weight" in state else 1,
            "base_channels": 2 * first,
            "channels_multiplier": narrow / (2 * first),
            "expansion_rate": expanded // first,
            "divisor": CnnGruConfig.divisor,
            "input_fdim": n_mels,
        }
        # 144 / 5 is truncated to 28, so the default is tried first, then whole numbers, then the quotient itself.
        for divisor in (CnnGruConfig.divisor, round(widest / steps), widest / steps):
            if int(widest / divisor) == steps:
                config["divisor"] = divisor
                break
        else:
            raise ValueError(f"{steps} steps of the GRU follow from no divisor of {widest} channels")
        return config, {"n_mels": n_mels}


def _mix(share: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return share * a + (1 - share) * b
