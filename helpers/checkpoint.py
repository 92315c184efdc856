"""Checkpoints: tensors and plain values, so they load without running code, and everything to build the parts again.

Our own hold `model` and `frontend` as {name, config, state}, the class names, the options of the run and, for resuming,
the state of optimizer, scaler, random generators and loop. `precision` says what the network is for: fp32 (or left
out), fp16, or int8: the state then includes the ranges of activations, and `quantization` holds its config. The
published Lightning checkpoints (CP-Mobile) are read too: their network is recognised from the shapes of its weights,
since they hold no hyper-parameters.
"""

import os
import pickle
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets.tau import SCENES
from helpers.loop import LoopState
from helpers.quantization import prepare
from models import FRONTENDS, MODELS, get_frontend, get_model
from models.cp_mobile import make_divisible
from models.quantized import QuantConfig

FORMAT = "low-complexity ASC checkpoint 1"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another program, or does not fit; one line with the remedy."""


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module  # eval mode, on the CPU; of an int8 checkpoint with fake quantization, see helpers/quantization.py
    frontend: nn.Module
    precision: str  # fp32, int8 or fp16
    scenes: tuple[str, ...]  # what the outputs stand for
    content: dict[str, Any]  # the whole file


def describe(part: nn.Module, table: Mapping[str, tuple[type, type]]) -> dict[str, Any]:
    """Name, config and state of a network or front end, as stored in a checkpoint."""
    name = next(name for name, (_, cls) in table.items() if type(part) is cls)
    return {"name": name, "config": _plain(asdict(part.config)), "state": part.state_dict()}


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes atomically: a temporary file beside it, flushed to the disk, then renamed over what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _save(content: Mapping[str, Any], file) -> None:
    try:
        torch.save({"format": FORMAT, **content}, file)
    except RuntimeError as error:  # torch hides the reason of a failed write, such as a full disk
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Loads one of our checkpoints onto the CPU.

    Raises:
        CheckpointError: when it is missing, damaged, or not ours.
    """
    content = _load(Path(path))
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this project (no {FORMAT!r} in it)")
    return content


def training_state(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loop: LoopState, device: torch.device
) -> dict[str, Any]:
    """Everything beside the network that an exact continuation needs."""
    return {
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "loop": {**vars(loop), "names": list(loop.names)},
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        },
    }


def restore_training(
    path: Path | str,
    content: Mapping[str, Any],
    scenes: Sequence[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loop: LoopState,
    device: torch.device,
) -> None:
    """Puts network, optimizer, scaler, loop and random generators back to what a checkpoint of ours holds.

    Raises:
        CheckpointError: when the labels of the data set or the shapes of the network are others.
    """
    if tuple(content["scenes"]) != tuple(scenes):
        raise CheckpointError(
            f"{path} knows the scenes {', '.join(content['scenes'])}; the data set has {', '.join(scenes)}"
        )
    try:
        model.load_state_dict(content["model"]["state"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        for name, value in content["loop"].items():
            setattr(loop, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        torch.set_rng_state(content["rng"]["cpu"])
        if device.type == "cuda" and content["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["rng"]["cuda"], device)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit this run: {error}") from error


def load_model(path: Path | str) -> LoadedModel:
    """Builds network and front end from a checkpoint of ours or a published one of CP-Mobile; weights load strictly.

    Raises:
        CheckpointError: when the file is missing, damaged or foreign, or its weights do not fit the network it names.
    """
    path = Path(path)
    content = _load(path)
    if content.get("format") == FORMAT:
        parts, scenes = content, tuple(content["scenes"])
    elif isinstance(content.get("state_dict"), Mapping):
        state = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
        model = {"name": "cp_mobile", "config": _cp_mobile_config(path, state), "state": state}
        parts = {"model": model, "frontend": {"name": "cp_mel", "config": {}, "state": {}}}
        scenes = SCENES if model["config"]["n_classes"] == len(SCENES) else ()
    else:
        raise CheckpointError(f"{path} is neither a checkpoint of this project nor a published CP-Mobile one")
    precision = parts.get("precision", "fp32")
    return LoadedModel(
        model=build_part(parts["model"], MODELS, path, precision, parts.get("quantization")).eval(),
        frontend=build_part(parts["frontend"], FRONTENDS, path).eval(),
        precision=precision,
        scenes=scenes,
        content=content,
    )


def build_part(
    part: Mapping[str, Any],
    table: Mapping,
    path: Path,
    precision: str = "fp32",
    quantization: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a network or front end from its description and loads its state strictly.

    Raises:
        CheckpointError: when name, config or state do not fit.
    """
    try:
        built = (get_model if table is MODELS else get_frontend)(part["name"], **part["config"])
        if precision == "int8":
            built = prepare(built, QuantConfig(**quantization))
        elif precision == "fp16":
            built = built.half()
        built.load_state_dict(part["state"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the network it describes: {error}") from error
    return built


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be loaded, it is damaged or no checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no checkpoint but a {type(content).__name__}")
    return content


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts: what loads without running code."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _cp_mobile_config(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Reads CP-Mobile's options off the shapes of its weights. Strides leave no trace: the defaults are assumed."""
    try:
        stem = state["in_c.0.0.weight"]
        base = state["in_c.1.0.weight"].shape[0]
        n_classes = state["feed_forward.0.weight"].shape[0]
        blocks = [
            m.groups() for name in state if (m := re.fullmatch(r"stages\.s(\d+)\.b(\d+)\.block\.2\.0\.weight", name))
        ]
        n_blocks = [sum(int(s) == i for s, _ in blocks) for i in range(1, 1 + max(int(s) for s, _ in blocks))]
        expansions = [tuple(state[f"stages.s{s}.b{b}.block.0.0.weight"].shape[1::-1]) for s, b in blocks]
        last = {int(s): state[f"stages.s{s}.b{b}.block.2.0.weight"].shape[0] for s, b in blocks}
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no CP-Mobile network: {error} is not in it") from error

    # Widths are rounded to multiples of 8, so many values give the same network; the nearest to the default is taken.
    def solve(fits, default: float) -> float:
        candidates = sorted((round(0.05 * i, 2) for i in range(1, 200)), key=lambda value: abs(value - default))
        value = next((value for value in candidates if fits(value)), None)
        if value is None:
            raise CheckpointError(f"{path}: the widths of its blocks are not those of a CP-Mobile network")
        return value

    return {
        "n_classes": n_classes,
        "in_channels": stem.shape[1],
        "base_channels": base if base // 4 == stem.shape[0] else 4 * stem.shape[0],
        "channels_multiplier": solve(
            lambda m: all(make_divisible(base * m ** (stage - 1)) == width for stage, width in last.items()), 2.3
        ),
        "expansion_rate": solve(lambda r: all(make_divisible(c * r) == width for c, width in expansions), 3.0),
        "n_blocks": n_blocks,
    }
