"""CP-ResNet: a residual network on log-mel spectrograms whose receptive field is kept small on purpose; a teacher.

Source: K. Koutini, H. Eghbal-zadeh, G. Widmer, "Receptive Field Regularization Techniques for Audio Classification and
Tagging With Deep Convolutional Neural Networks", IEEE/ACM TASLP 2021, in the size of
https://github.com/fschmid56/cpjku_dcase23 (128 thousand parameters). Departures: the initial weights depend on the
blocks of this network, not on all that the process has built before, and the first pool's stride is an option of its
own. The state dict is the published one.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, Bounds, check_channels, check_numbers

PAIRS = ("maxpool_stage1_pos0_kernel", "maxpool_stage1_pos0_stride", "maxpool_kernel", "maxpool_stride")


@dataclass(frozen=True)
class CpResnetConfig:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    in_channels: Annotated[int, "channels of the spectrogram", Bounds(1, MAX_CHANNELS)] = 1
    rho: Annotated[int, "receptive field: 1 to 11, larger turns more 1x1 into 3x3 convolutions", Bounds(1, 11)] = 8
    base_channels: Annotated[int, "channels of stage 1", Bounds(1, MAX_CHANNELS)] = 32
    channels_multiplier: Annotated[
        float, "growth of the channels from stage to stage, before the cuts", Bounds(0, 100, above=True)
    ] = 2
    cut_channels_s2: Annotated[int, "channels taken off stage 2; 0 is off", Bounds(0, MAX_CHANNELS)] = 0
    cut_channels_s3: Annotated[int, "channels taken off stage 3; 0 is off", Bounds(0, MAX_CHANNELS)] = 36
    s1_group: Annotated[int, "groups of every convolution of stage 1", Bounds(1)] = 1
    s2_group: Annotated[int, "groups of every convolution of stage 2", Bounds(1)] = 2
    s3_group: Annotated[int, "groups of every convolution of stage 3", Bounds(1)] = 1
    n_blocks: Sequence[int] = (2, 1, 1)  # blocks in each stage; 0 leaves the stage out
    # Max pools before the first block (0) or after block i; positions that a stage does not have are passed over.
    maxpool_pos_stage1: Sequence[int] = (0, 1, 2, 4)
    maxpool_pos_stage2: Sequence[int] = ()
    maxpool_pos_stage3: Sequence[int] = ()
    maxpool_stage1_pos0_kernel: Sequence[int] = (2, 2)  # (freq, time), as all that follow
    maxpool_stage1_pos0_stride: Sequence[int] = (2, 2)
    maxpool_kernel: Sequence[int] = (2, 1)
    maxpool_stride: Sequence[int] = (2, 1)

    def __post_init__(self):
        for name in ("n_blocks", "maxpool_pos_stage1", "maxpool_pos_stage2", "maxpool_pos_stage3", *PAIRS):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_numbers(self)
        if len(self.n_blocks) != 3 or min(self.n_blocks) < 0 or self.n_blocks[0] < 1:
            raise ValueError(f"n_blocks must be three numbers >= 0, the first >= 1, got {self.n_blocks}")
        for stage in (1, 2, 3):
            positions = getattr(self, f"maxpool_pos_stage{stage}")
            if min(positions, default=0) < 0:
                raise ValueError(f"maxpool_pos_stage{stage} must hold positions >= 0, got {positions}")
        for name in PAIRS:
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be (freq, time), both >= 1, got {getattr(self, name)}")
        for stage, (c_in, c_out) in enumerate(self.widths, start=1):
            if c_out > MAX_CHANNELS:
                raise ValueError(f"stage {stage} has {c_out} channels: lower base_channels or channels_multiplier")
            if c_out < 1:
                raise ValueError(f"stage {stage} has {c_out} channels: lower cut_channels_s{stage}")
            groups = getattr(self, f"s{stage}_group")
            if groups < 1 or c_in % groups or c_out % groups:
                raise ValueError(
                    f"s{stage}_group must divide the {c_in} and {c_out} channels of its stage, got {groups}"
                )

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Channels before and after each stage."""
        c_in, widths = self.base_channels, []
        for i, cut in enumerate((0, self.cut_channels_s2, self.cut_channels_s3)):
            c_out = round(self.base_channels * self.channels_multiplier**i) - cut if self.n_blocks[i] else c_in
            widths.append((c_in, c_out))
            c_in = c_out
        return widths


def kernel_sizes(rho: int) -> list[list[tuple[int, int]]]:
    """Kernel sizes of the two convolutions of the first two blocks of each stage; those of a further block are 1."""
    extra = rho - 4

    def size(is_wide: bool) -> int:
        return 3 if is_wide else 1

    return [
        [(3, 1), (size(extra >= -2), size(extra >= -1))],
        [(size(extra >= 0), size(extra > 0)), (size(extra > 1), size(extra > 2))],
        [(size(extra > 3), size(extra > 4)), (size(extra > 5), size(extra > 6))],
    ]


class CpResnetBlock(nn.Module):
    """Two convolutions with norms, ReLU between and after; a 1x1 convolution as shortcut where the width changes."""

    def __init__(self, c_in: int, c_out: int, kernels: tuple[int, int], groups: int):
        super().__init__()
        k1, k2 = kernels
        self.conv1 = nn.Conv2d(c_in, c_out, k1, padding=k1 // 2, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        # In place: the norm does not need its output for the backward pass.
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, k2, padding=k2 // 2, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if c_in != c_out:
            self.shortcut.add_module("conv", nn.Conv2d(c_in, c_out, 1, groups=groups, bias=False))
            self.shortcut.add_module("bn", nn.BatchNorm2d(c_out))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class CpResnet(nn.Module):
    """Strided 5x5 stem, three stages of `CpResnetBlock` with max pools, pointwise classifier, mean over freq and time.

    A fresh network answers 0 for every class: its residual branches and its classifier start at zero.

    Raises:
        ValueError: from `forward`, for spectrograms that are too small for the pools.
    """

    default_frontend = ("cp_mel", {"hop_length": 750})
    entry = "stage1.block1.conv1.weight"

    def __init__(self, config: CpResnetConfig):
        super().__init__()
        self.config = config
        self.in_c = nn.Sequential(
            nn.Conv2d(config.in_channels, config.base_channels, 5, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(config.base_channels),
            nn.ReLU(inplace=True),
        )
        for stage in (1, 2, 3):
            self.add_module(f"stage{stage}", _stage(config, stage))
        c_out = config.widths[-1][1]
        self.feed_forward = nn.Sequential(
            nn.Conv2d(c_out, config.n_classes, 1, bias=False), nn.BatchNorm2d(config.n_classes)
        )
        self.smallest_input = _smallest_input(self)
        _init(self)

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return tuple(f"stage{i}" for i, n_blocks in enumerate(self.config.n_blocks, start=1) if n_blocks)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, channel, mel, time) to logits (batch, class), before softmax."""
        check_channels(log_mel, self.config.in_channels)
        if log_mel.shape[2] < self.smallest_input[0] or log_mel.shape[3] < self.smallest_input[1]:
            raise ValueError(
                f"log_mel must have at least {self.smallest_input[0]} mel bands and {self.smallest_input[1]} frames, "
                f"got {log_mel.shape[2]} and {log_mel.shape[3]}"
            )
        x = self.in_c(log_mel)  # (batch, base, mel / 2, time / 2)
        x = self.stage1(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.feed_forward(x)  # (batch, class, freq, time)
        return x.mean(dim=(2, 3))

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell; pools are the published ones.

        Raises:
            ValueError: for kernel sizes that no config gives; LookupError for an incomplete state dict.
        """
        base, in_channels = state["in_c.0.weight"].shape[0], state["in_c.0.weight"].shape[1]
        names = [m.groups() for name in state if (m := re.fullmatch(r"stage([123])\.block(\d+)\.conv1\.weight", name))]
        n_blocks = [sum(stage == number for stage, _ in names) for number in "123"]
        config = {
            "n_classes": state["feed_forward.0.weight"].shape[0], "in_channels": in_channels, "base_channels": base,
            "n_blocks": n_blocks,
        }  # fmt: skip
        found, c_in = {}, base
        for stage in (number for number in (1, 2, 3) if n_blocks[number - 1]):
            for block in range(1, n_blocks[stage - 1] + 1):
                convs = [state[f"stage{stage}.block{block}.conv{i}.weight"] for i in (1, 2)]
                found[stage, block] = tuple(conv.shape[2] for conv in convs)
            width = state[f"stage{stage}.block1.conv1.weight"].shape[0]
            config[f"s{stage}_group"] = c_in // state[f"stage{stage}.block1.conv1.weight"].shape[1]
            if stage > 1:
                config[f"cut_channels_s{stage}"] = (
                    round(base * CpResnetConfig.channels_multiplier ** (stage - 1)) - width
                )
            c_in = width

        def fits(rho: int) -> bool:
            kernels = kernel_sizes(rho)
            return all(size == kernels[stage - 1][block - 1] for (stage, block), size in found.items() if block <= 2)

        # Blocks that are not there leave no trace; of the values that give this network that nearest to the default.
        rhos = sorted((rho for rho in range(1, 12) if fits(rho)), key=lambda rho: abs(rho - CpResnetConfig.rho))
        if not rhos:
            raise ValueError(f"the kernel sizes are those of no CP-ResNet network: {found}")
        return config | {"rho": rhos[0]}, {}


def _stage(config: CpResnetConfig, number: int) -> nn.Sequential:
    stage, n_blocks = nn.Sequential(), config.n_blocks[number - 1]
    if not n_blocks:
        return stage
    kernels = kernel_sizes(config.rho)[number - 1]
    c_in, c_out = config.widths[number - 1]
    positions = getattr(config, f"maxpool_pos_stage{number}")
    if 0 in positions:
        kernel, stride = config.maxpool_kernel, config.maxpool_stride
        if number == 1:
            kernel, stride = config.maxpool_stage1_pos0_kernel, config.maxpool_stage1_pos0_stride
        stage.add_module("maxpool0_0", nn.MaxPool2d(kernel, stride))
    for block in range(1, n_blocks + 1):
        sizes = kernels[block - 1] if block <= len(kernels) else (1, 1)
        groups = getattr(config, f"s{number}_group")
        stage.add_module(f"block{block}", CpResnetBlock(c_in if block == 1 else c_out, c_out, sizes, groups))
        for i, position in enumerate(positions):
            if position == block:
                stage.add_module(f"maxpool{block}_{i}", nn.MaxPool2d(config.maxpool_kernel, config.maxpool_stride))
    return stage


def _smallest_input(model: CpResnet) -> tuple[int, int]:
    """Mel bands and frames of which one position is left after the stem and all pools."""
    pools = [module for module in model.modules() if isinstance(module, nn.MaxPool2d)]
    sizes = []
    for axis in (0, 1):
        n = 1
        for pool in reversed(pools):
            n = (n - 1) * pool.stride[axis] + pool.kernel_size[axis]
        sizes.append((n - 1) * 2 + 3)  # the stem: stride 2, kernel 5, padding 1 on both sides
    return sizes[0], sizes[1]


def _init(model: CpResnet) -> None:
    """Fixup (Zhang, Dauphin, Ma, ICLR 2019): every block starts as its shortcut, the first convolution damped."""
    nn.init.kaiming_normal_(model.in_c[0].weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(model.feed_forward[0].weight)
    blocks = [module for module in model.modules() if isinstance(module, CpResnetBlock)]
    for block in blocks:
        nn.init.normal_(block.conv1.weight, std=_fan_out_std(block.conv1) / math.sqrt(len(blocks)))
        nn.init.zeros_(block.conv2.weight)
        if len(block.shortcut):
            nn.init.normal_(block.shortcut.conv.weight, std=_fan_out_std(block.shortcut.conv))


def _fan_out_std(conv: nn.Conv2d) -> float:
    return math.sqrt(2 / (conv.out_channels * math.prod(conv.kernel_size)))
