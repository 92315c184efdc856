"""CP-Mobile: inverted-residual blocks with global response normalisation on log-mel spectrograms.

Source: F. Schmid, T. Morocutti, S. Masoudian, K. Koutini, G. Widmer, "Distilling the Knowledge of Transformers and
CNNs with CP-Mobile", DCASE Workshop 2023, https://github.com/fschmid56/cpjku_dcase23. Departures: none in the
function or in the state dict; the response normalisation is written as one multiply-add (see `ResponseNorm`).
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, Bounds, check_channels, check_numbers
from models.layers.add import Add
from models.layers.avg_pool import AvgPool
from models.layers.conv_unit import ConvUnit
from models.layers.global_mean import GlobalMean
from models.layers.inverted_bottleneck import InvertedBottleneck
from models.layers.response_norm import ResponseNorm
from models.state_dicts import unfolded_units

DEFAULT_STRIDES = MappingProxyType({"b2": (2, 2), "b4": (2, 1)})


def make_divisible(value: float, divisor: int = 8) -> int:
    """Rounds to the nearest multiple of `divisor`, at least one, and never below 90 % of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@dataclass(frozen=True)
class CpMobileConfig:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    in_channels: Annotated[int, "channels of the spectrogram", Bounds(1, MAX_CHANNELS)] = 1
    base_channels: Annotated[
        int, "channels of the first stage, rounded to a multiple of 8", Bounds(1, MAX_CHANNELS)
    ] = 32
    channels_multiplier: Annotated[float, "growth of the channels from stage to stage", Bounds(0, 100, above=True)] = (
        2.3
    )
    expansion_rate: Annotated[float, "inner width of a block relative to its input", Bounds(0, 100, above=True)] = 3.0
    n_blocks: Sequence[int] = (3, 2, 1)  # blocks in each stage
    strides: Mapping[str, Sequence[int]] = field(default_factory=lambda: dict(DEFAULT_STRIDES))  # b<i>: (freq, time)

    def __post_init__(self):
        object.__setattr__(self, "n_blocks", tuple(self.n_blocks))
        object.__setattr__(self, "strides", {name: tuple(stride) for name, stride in self.strides.items()})
        check_numbers(self)
        if not self.n_blocks or min(self.n_blocks) < 1:
            raise ValueError(f"n_blocks must name at least one block per stage, got {self.n_blocks}")
        widest = max(self.widths) * max(1.0, self.expansion_rate)
        if widest > MAX_CHANNELS:
            raise ValueError(
                f"the widest layer has {widest:g} channels: lower base_channels, channels_multiplier or expansion_rate "
                f"(at most {MAX_CHANNELS})"
            )
        known = [f"b{i}" for i in range(1, sum(self.n_blocks) + 1)]
        for name, stride in self.strides.items():
            if name not in known:
                raise ValueError(f"strides name {name!r}, the blocks are {', '.join(known)}")
            if len(stride) != 2 or min(stride) < 1:
                raise ValueError(f"strides[{name!r}] must be (freq, time), both >= 1, got {stride}")

    @property
    def widths(self) -> list[int]:
        """Channels before the first stage and after each."""
        base = make_divisible(self.base_channels)
        return [base] + [make_divisible(base * self.channels_multiplier**i) for i in range(len(self.n_blocks))]


class CpMobileBlock(nn.Module):
    """Pointwise expansion, depthwise 3x3, pointwise projection, shortcut where the width allows, norm, ReLU.

    Args:
        after_block: makes what follows the sum.
    """

    def __init__(
        self, c_in: int, c_out: int, expansion_rate: float, stride: Sequence[int], after_block: Callable[[], nn.Module]
    ):
        super().__init__()
        self.after_block_norm = after_block()
        self.block = InvertedBottleneck(c_in, make_divisible(c_in * expansion_rate), c_out, stride)
        if c_in != c_out:
            self.shortcut = None
        elif tuple(stride) == (1, 1):
            self.shortcut = nn.Identity()
        else:  # zeros of the padding count in the mean
            self.shortcut = AvgPool(c_in, 3, stride, padding=1)
        self.add = None if self.shortcut is None else Add()

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        y = self.block(x)
        if self.shortcut is not None:
            y = self.add(y, self.shortcut(x))
        return self.after_block_norm(y)


class CpMobile(nn.Module):
    """Stem of two strided convolutions, stages of `CpMobileBlock`, pointwise classifier, mean over freq and time."""

    entry = "in_c.0.0.weight"
    unfolded = staticmethod(unfolded_units)  # published checkpoints of quantization-aware training have no norms
    after_block = ResponseNorm

    def __init__(self, config: CpMobileConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        base = widths[0]
        self.in_c = nn.Sequential(
            ConvUnit(config.in_channels, base // 4, 3, stride=2), ConvUnit(base // 4, base, 3, stride=2)
        )
        self.stages = nn.Sequential()
        n_built = 0
        for i, n_blocks in enumerate(config.n_blocks):
            stage = nn.Sequential()
            for j in range(n_blocks):
                n_built += 1
                name = f"b{n_built}"
                c_in = widths[i] if j == 0 else widths[i + 1]
                stride = config.strides.get(name, (1, 1))
                block = CpMobileBlock(c_in, widths[i + 1], config.expansion_rate, stride, self.after_block)
                stage.add_module(name, block)
            self.stages.add_module(f"s{i + 1}", stage)
        self.feed_forward = ConvUnit(widths[-1], config.n_classes, 1, relu=False)
        self.pool = GlobalMean()
        self.apply(_init)

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return tuple(f"stages.s{i}" for i in range(1, 1 + len(self.config.n_blocks)))

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, channel, mel, time) to logits (batch, class), before softmax.

        Raises:
            ValueError: for another shape.
        """
        check_channels(log_mel, self.config.in_channels)
        x = self.in_c(log_mel)  # (batch, base, mel / 4, time / 4)
        x = self.stages(x)
        x = self.feed_forward(x)  # (batch, class, freq, time)
        return self.pool(x)

    @staticmethod
    def claims(names: Collection[str]) -> bool:
        """Whether a state dict is of this network, and not of one without response norms."""
        return any(name.endswith(".after_block_norm.gamma") for name in names)

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell.

        Strides leave no trace in it: those of the published network are taken.

        Raises:
            ValueError: for widths that no config gives; LookupError for an incomplete state dict.
        """
        if not CpMobile.claims(state):
            raise KeyError("after_block_norm.gamma")
        return read_shapes(state, CpMobileConfig), {}


def read_shapes(state: Mapping[str, Tensor], config: type[CpMobileConfig]) -> dict[str, Any]:
    """What the shapes of a state dict tell of its config; of values that give the same, those nearest to its defaults.

    Raises:
        ValueError: for widths that no config gives; LookupError for an incomplete state dict.
    """
    stem = state["in_c.0.0.weight"]
    base = state["in_c.1.0.weight"].shape[0]
    named = re.compile(r"stages\.s([0-9]{1,9})\.b([0-9]{1,9})\.block\.2\.0\.weight")
    blocks = [m.groups() for name in state if (m := named.fullmatch(name))]
    n_stages = max((int(s) for s, _ in blocks), default=0)
    if len({int(s) for s, _ in blocks}) != max(n_stages, 1):
        raise KeyError("stages")
    expansions = [tuple(state[f"stages.s{s}.b{b}.block.0.0.weight"].shape[1::-1]) for s, b in blocks]
    last = {int(s): state[f"stages.s{s}.b{b}.block.2.0.weight"].shape[0] for s, b in blocks}
    multiplier = _nearest(
        lambda m: all(make_divisible(base * m ** (stage - 1)) == width for stage, width in last.items()),
        config.channels_multiplier,
    )
    rate = _nearest(lambda r: all(make_divisible(c * r) == width for c, width in expansions), config.expansion_rate)
    return {
        "n_classes": state["feed_forward.0.weight"].shape[0],
        "in_channels": stem.shape[1],
        "base_channels": base,
        "channels_multiplier": multiplier,
        "expansion_rate": rate,
        "n_blocks": [sum(int(s) == i for s, _ in blocks) for i in range(1, 1 + n_stages)],
    }


def _nearest(fits: Callable[[float], bool], default: float) -> float:
    """Of the values that give the same network, as widths are rounded to multiples of 8, the nearest to `default`."""
    candidates = sorted((round(0.05 * i, 2) for i in range(1, 200)), key=lambda value: abs(value - default))
    value = next((value for value in candidates if fits(value)), None)
    if value is None:
        raise ValueError("the widths of its blocks are not those of a CP-Mobile network")
    return value


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
