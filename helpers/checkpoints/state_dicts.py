"""Finds the one network in a file of another program: below which keys and which prefix of names its weights are."""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.state_dicts import some

log = logging.getLogger(__name__)

DEPTH = 4  # of dicts within dicts that are searched
OF_TEACHER = re.compile(r"(^|[._])teachers?([._0-9]|$)")
# Parts of distillation beside a network whose names have no prefix.
BESIDE = re.compile(r"^(\w*teachers?\w*|\w*proj(ect\w*|s|\d*)?(_\w+)?|regressor\w*|adapter\w*)\.")
OF_DEVICE = re.compile(r"(^|\.)device_models\.([^.]+)\.$")  # in the container of DCASE 2025, beside the general network


class Candidate(NamedTuple):
    """A network in a file."""

    network: str
    where: str  # keys of the dicts around it and prefix of its names
    state: dict[str, Tensor]  # names without the prefix
    others: dict[str, Tensor]  # what stands beside it and is not of it, by its whole name


def candidates(content: Mapping[str, Any], known: Mapping[str, type], within: str = "") -> list[Candidate]:
    """The networks in a file; weights that are there twice once.

    A teacher is left aside where there is anything else, and networks for single devices where there is a general one.

    Args:
        known: networks by name, with the `entry` and the `claims` that models/__init__.py speaks of.
        within: keys and prefix of names of the one that is meant; "": any.
    """
    found = _all_candidates(content, known)
    if within:
        return [candidate for candidate in found if candidate.where == within]
    students = [candidate for candidate in found if not OF_TEACHER.search(candidate.where)]
    unique: list[Candidate] = []
    general = [candidate for candidate in students if not is_for_device(candidate)]
    for candidate in general or students or found:
        if not any(_same(candidate.state, other.state) for other in unique):
            unique.append(candidate)
    return unique


def is_for_device(candidate: Candidate) -> bool:
    """Whether it is a network for one recording device."""
    return OF_DEVICE.search(candidate.where) is not None


def device_states(content: Mapping[str, Any], known: Mapping[str, type], network: str) -> dict[str, dict[str, Tensor]]:
    """The weights of networks of one kind that are for single recording devices, by device."""
    found = [candidate for candidate in _all_candidates(content, known) if candidate.network == network]
    return {match[2]: one.state for one in found if (match := OF_DEVICE.search(one.where))}


def _all_candidates(content: Mapping[str, Any], known: Mapping[str, type]) -> list[Candidate]:
    found: list[Candidate] = []
    for keys, tensors in dicts_of_tensors(content):
        for network, cls in known.items():
            for name, value in tensors.items():
                if (name == cls.entry or name.endswith(f".{cls.entry}")) and not value.is_quantized:
                    candidate = _candidate(network, keys, tensors, name.removesuffix(cls.entry))
                    if not hasattr(cls, "claims") or cls.claims(candidate.state):
                        found.append(candidate)
    return found


def as_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain tensors, floats in float32, and the counters of batch norms, which old and converted files leave out."""
    plain = {name: value.detach().float() if value.is_floating_point() else value for name, value in state.items()}
    for name in state:
        if name.endswith(".running_mean"):
            plain.setdefault(f"{name.removesuffix('running_mean')}num_batches_tracked", torch.tensor(0))
    return plain


def dicts_of_tensors(content: Mapping, keys: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of a file by name, for each of the dicts within dicts, with the keys that lead to it."""
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield keys, tensors
    for key, value in content.items() if depth else ():
        if isinstance(value, Mapping):
            yield from dicts_of_tensors(value, f"{keys}{key}.", depth - 1)


def _candidate(network: str, keys: str, tensors: dict[str, Tensor], prefix: str) -> Candidate:
    names = [name for name in tensors if name.startswith(prefix)]
    if not prefix:
        names = [name for name in names if not BESIDE.match(name)]
    inside = set(names)
    state = {name.removeprefix(prefix): tensors[name] for name in names}
    others = {name: value for name, value in tensors.items() if name not in inside}
    return Candidate(network, f"{keys}{prefix}", state, others)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in a)


def log_found(path: Any, candidate: Candidate) -> None:
    others = [name for name in candidate.others if "device_models." not in name]
    if others:
        log.info("%s: of other parts than the network, not used: %s", path, some(others))
