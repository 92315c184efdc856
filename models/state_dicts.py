"""State dicts: what two differ in, and norms that were folded into weights."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

OF_OBSERVERS = re.compile(r"(^|\.)(weight_fake_quant|activation_post_process|\w*observer)\.")


def differences(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    """What is missing in a state dict, unknown or of another shape; empty when it fits."""
    known = {name: value for name, value in state.items() if name in expected and isinstance(value, Tensor)}
    lists = {
        "missing": [name for name in expected if name not in state],
        "unknown": [str(name) for name in state if name not in known],
        "of another shape": [
            f"{name} {tuple(value.shape)} for {tuple(expected[name].shape)}"
            for name, value in known.items()
            if value.shape != expected[name].shape
        ],
    }
    return "; ".join(f"{some(names)} {kind}" for kind, names in lists.items() if names)


def some(names: Iterable[str]) -> str:
    names = list(names)
    return (", ".join(names[:5]) or "nothing") + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def adding_norm(name: str, bias: Tensor, eps: float = 1e-5) -> dict[str, Tensor]:
    """The entries of a batch norm called `name` that adds a bias (channel,) and does nothing else."""
    return {
        f"{name}.weight": torch.ones_like(bias),
        f"{name}.bias": bias,
        f"{name}.running_mean": torch.zeros_like(bias),
        f"{name}.running_var": torch.full_like(bias, 1 - eps),
        f"{name}.num_batches_tracked": torch.tensor(0),
    }


def unfolded_units(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of units (convolution .0, norm .1) whose norms were folded into biases, with norms that add the biases.

    Observers and fake quantization of PyTorch's own quantization-aware training are left aside.
    """
    plain = {name: value for name, value in state.items() if not OF_OBSERVERS.search(name)}
    for name in [name for name in plain if name.endswith(".0.bias")]:
        unit = name.removesuffix(".0.bias")
        if any(other.startswith(f"{unit}.1.") for other in plain) or f"{unit}.0.weight" not in plain:
            continue
        plain |= adding_norm(f"{unit}.1", plain.pop(name))
    return plain
