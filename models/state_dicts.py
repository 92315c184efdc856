"""What two state dicts differ in, in words."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


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
