"""Of a file in which no known network was found: which comes nearest, and what it lacks."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.checkpoints.state_dicts import dicts_of_tensors
from models import MODELS, get_model
from models.state_dicts import differences, some

LEAST = 0.1  # of a network's names that must be there to call it near


class Near(NamedTuple):
    """A network that a part of a file resembles."""

    share: float  # of its names that are there, or of the names there that are its own, the smaller
    network: str
    prefix: str  # of the names in the file
    state: dict[str, Tensor]  # names without the prefix
    own: Mapping[str, Tensor]  # the network's, with its default options


def nothing_found(content: Mapping[str, Any]) -> str:
    """What to tell of a file that holds none of the known networks: the nearest and what differs."""
    whole = list(dicts_of_tensors(content))
    if any(value.is_quantized for _, tensors in whole for value in tensors.values()):
        return "holds weights that PyTorch has quantized: take the float checkpoint that they were made from"
    near = max((near for _, tensors in whole for near in _resembling(tensors)), default=None, key=lambda one: one.share)
    names = ", ".join(MODELS)
    if near is None or near.share < LEAST:
        found = [name for _, tensors in whole for name in tensors] or [str(key) for key in content]
        return f"holds none of the networks {names}; found: {some(found)}"
    n_there = sum(name in near.own for name in near.state)
    below = f" below {near.prefix}*" if near.prefix else ""
    what = differences(near.state, near.own)
    return (
        f"holds none of the networks {names}; nearest is {near.network}, of which {n_there} of {len(near.own)} entries "
        f"are there{below}, but against its default options: {what}"
    )


def _resembling(tensors: Mapping[str, Tensor]) -> list[Near]:
    found = []
    for network in MODELS:
        with torch.device("meta"):  # names and shapes are all that is wanted
            own = get_model(network).state_dict()
        prefixes: Counter[str] = Counter()
        for name in tensors:
            parts = name.split(".")
            prefixes.update(".".join([*parts[:i], ""]) for i in range(len(parts)) if ".".join(parts[i:]) in own)
        for prefix, n_there in prefixes.most_common(1):
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            found.append(Near(n_there / max(len(own), len(state)), network, prefix, state, own))
    return found
