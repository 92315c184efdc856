"""The network of the DCASE Task 1 baselines of 2024 and 2025: CP-Mobile with a plain ReLU behind each block.

Source: F. Schmid, P. Primus, T. Heittola, A. Mesaros, I. Martín-Morató, K. Koutini, G. Widmer, "Data-Efficient
Low-Complexity Acoustic Scene Classification in the DCASE 2024 Challenge", DCASE Workshop 2024,
https://arxiv.org/abs/2405.10018; https://github.com/CPJKU/dcase2024_task1_baseline and dcase2025_task1_baseline.

What differs from CP-Mobile: no response normalisation, other strides and another size. Departures: the defaults are
those of the published command line, not of its constructor.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import Bounds
from models.cp_mobile import CpMobile, CpMobileConfig, read_shapes

DEFAULT_STRIDES = MappingProxyType({"b3": (1, 2), "b4": (2, 1)})


@dataclass(frozen=True)
class Dcase24BaselineConfig(CpMobileConfig):
    channels_multiplier: Annotated[float, "growth of the channels from stage to stage", Bounds(0, 100, above=True)] = (
        1.8
    )
    expansion_rate: Annotated[float, "inner width of a block relative to its input", Bounds(0, 100, above=True)] = 2.1
    strides: Mapping[str, Sequence[int]] = field(default_factory=lambda: dict(DEFAULT_STRIDES))  # b<i>: (freq, time)


class Dcase24Baseline(CpMobile):
    """Stem of two strided convolutions, inverted-residual blocks with a ReLU each, classifier, mean over freq and time.

    Maps log-mel (batch, channel, mel, time) to logits (batch, class).
    """

    default_frontend = ("dcase24_mel", {})
    after_block = nn.ReLU

    @staticmethod
    def claims(names: Collection[str]) -> bool:
        return not CpMobile.claims(names)

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell.

        Strides leave no trace in it, and forks have others: those of the baseline are taken.

        Raises:
            ValueError: for a network with response norms, and widths that no config gives; LookupError for an
                incomplete state dict.
        """
        if CpMobile.claims(state):
            raise ValueError("its blocks have response norms: it is no network of the 2024 baseline")
        return read_shapes(state, Dcase24BaselineConfig), {}
