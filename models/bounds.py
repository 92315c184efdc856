"""Bounds of the numbers in a config, declared where the field is: `width: Annotated[int, "help", Bounds(1)]`.

What no one means is refused before anything is allocated: without an upper bound, one digit too many ends in a process
killed for its memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torch import Tensor

MOST = 1_000_000  # larger than any number of hertz, samples, classes or epochs that makes sense
MAX_CHANNELS = 1 << 14  # of a layer
MAX_LAYERS = 100
MAX_FFT = 1 << 17  # samples
MAX_MELS = 1 << 12
MAX_FRAME_RATE = 2000  # frames a second
MAX_WEIGHTS = 1 << 31  # of a network


@dataclass(frozen=True)
class Bounds:
    """A range of numbers, both ends in it unless `above` or `below` says otherwise."""

    low: float = 0
    high: float = MOST
    above: bool = False  # `low` itself is out
    below: bool = False  # `high` itself is out

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        """In words: ">= 1", "> 0", "in [0, 1)"; the general upper bound goes without saying."""
        if self.high == MOST and not self.below:
            return f"{'>' if self.above else '>='} {self.low:g}"
        return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"


def bounded_fields(config: type) -> Iterator[tuple[str, type, Bounds]]:
    """Name, kind (int or float) and bounds of every field of a config that declares bounds."""
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        if get_origin(hints[field.name]) is Annotated:
            kind, _, *bounds = get_args(hints[field.name])
            if bounds:
                yield field.name, int if int in (kind, *get_args(kind)) else float, bounds[0]


def check_numbers(config: Any) -> None:
    """Checks every field of a config that declares bounds; None, where a field may be None, is left to the config.

    Raises:
        ValueError: for what is no number of the field's kind, not finite, or out of bounds.
    """
    for name, kind, bounds in bounded_fields(type(config)):
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
            raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if value in bounds:
            continue
        if bounds.high == MOST and value > MOST:
            raise ValueError(f"{name} must be at most {MOST:,}, got {value}")
        raise ValueError(f"{name} must be {bounds}, got {value}")


def check_hop(config: Any) -> None:
    """Refuses a front end whose frames are absurdly dense, which would take gigabytes for a second of sound.

    Raises:
        ValueError: naming the least hop_length.
    """
    least = math.ceil(config.sample_rate / MAX_FRAME_RATE)
    if config.hop_length < least:
        raise ValueError(
            f"hop_length must be >= {least} at {config.sample_rate} Hz (at most {MAX_FRAME_RATE} frames a second), "
            f"got {config.hop_length}"
        )


def check_channels(log_mel: Tensor, n: int) -> None:
    """Checks that a network's input is (batch, channel, mel, time) with n channels.

    Raises:
        ValueError: when it is not.
    """
    if log_mel.ndim != 4 or log_mel.shape[1] != n:
        raise ValueError(f"log_mel must be (batch, {n}, mel, time), got {tuple(log_mel.shape)}")


def check_weights(n: int, names: str) -> None:
    """Refuses a network of more weights than any of this field: n of them, lowered through the options `names`.

    Raises:
        ValueError: naming these options.
    """
    if n > MAX_WEIGHTS:
        raise ValueError(f"the network would have {n:,} weights: lower {names}")
