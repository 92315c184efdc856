"""Checkpoints: tensors and plain values, so they load without running code, and everything to build the parts again.

Our own hold `model` and `frontend` as {name, config, state}, the class names, the options of the run and, for resuming,
the state of optimizer, scaler, random generators and loop. `precision` says what the network is for: fp32 (or left
out), fp16, or int8: the state then includes the ranges of activations, and `quantization` holds its config. Checkpoints
of others are read too, see helpers/published.py.
"""

import logging
import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets.tau import SCENES, Meta
from helpers.loop import LoopState, Update
from helpers.published import ForeignError, recognise
from helpers.quantization import prepare
from models import FRONTENDS, MODELS, get_frontend, get_model
from models.beats import differences
from models.quantized import QuantConfig
from models.teachers import FRONTEND_OF

log = logging.getLogger(__name__)

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
    content = load_file(Path(path))
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this project (no {FORMAT!r} in it)")
    return content


def describe_run(
    model: nn.Module, frontend: nn.Module, meta: Meta, n_samples: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint of every script holds beside the state of training.

    Args:
        n_samples: length of a clip.
        options: the resolved ones of the script.
    """
    return {
        "model": describe(model, MODELS),
        "frontend": describe(frontend, FRONTENDS),
        "scenes": list(meta.scenes),
        "recording_devices": list(meta.recording_devices),
        "clip_samples": n_samples,
        "options": dict(options),
    }


def training_state(update: Update, loop: LoopState, device: torch.device) -> dict[str, Any]:
    """Everything beside the network that an exact continuation needs; all processes must call it together."""
    rng = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    sums = None if loop.sums is None else update.processes.sum(loop.sums)
    return {
        "optimizer": update.optimizer.state_dict(),
        "scaler": update.scaler.state_dict(),
        "loop": {**vars(loop), "names": list(loop.names), "sums": sums},
        "rng": update.processes.gather(rng),  # by process
    }


def restore_training(
    path: Path | str,
    content: Mapping[str, Any],
    scenes: Sequence[str],
    model: nn.Module,
    update: Update,
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
    processes = update.processes
    try:
        model.load_state_dict(content["model"]["state"])
        update.optimizer.load_state_dict(content["optimizer"])
        update.scaler.load_state_dict(content["scaler"])
        for name, value in content["loop"].items():
            setattr(loop, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        if loop.sums is not None and not processes.is_main:
            loop.sums = torch.zeros_like(loop.sums)  # the sums of all are with process 0 now
        states = content["rng"]
        if len(states) != processes.size:
            log.warning(
                "%s was written by %d processes, now there are %d: augmentation draws other numbers from here on",
                path, len(states), processes.size,
            )  # fmt: skip
        if processes.rank < len(states):
            rng = states[processes.rank]
            torch.set_rng_state(rng["cpu"])
            if device.type == "cuda" and rng["cuda"] is not None:
                torch.cuda.set_rng_state(rng["cuda"], device)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit this run: {error}") from error


def load_model(path: Path | str, network: tuple[str, Mapping[str, Any]] | None = None) -> LoadedModel:
    """Builds network and front end from a checkpoint of ours or a published one; weights load strictly.

    Args:
        network: architecture and options of a teacher that the file, a bare state dict, must hold; None: what is in it
            is recognised.

    Raises:
        CheckpointError: when the file is missing, damaged or foreign, or its weights do not fit the network it names.
    """
    path = Path(path)
    content = load_file(path)
    if network is not None:
        (name, options), (frontend, frontend_options) = network, FRONTEND_OF[network[0]]
        parts = {
            "model": {"name": name, "config": options, "state": content},
            "frontend": {"name": frontend, "config": frontend_options, "state": {}},
        }
    elif content.get("format") == FORMAT:
        parts = content
    else:
        try:
            parts = recognise(path, content)
        except ForeignError as error:
            raise CheckpointError(str(error)) from error
    precision = parts.get("precision", "fp32")
    model = build_part(parts["model"], MODELS, path, precision, parts.get("quantization")).eval()
    scenes = tuple(parts["scenes"]) if parts is content else SCENES if model.config.n_classes == len(SCENES) else ()
    return LoadedModel(
        model=model,
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
        if what := differences(part["state"], built.state_dict()):
            raise ValueError(what)
        built.load_state_dict(part["state"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the network it describes: {error}") from error
    return built


def load_file(path: Path) -> dict[str, Any]:
    """What is in a checkpoint of anybody, on the CPU; no code of the file is run.

    Raises:
        CheckpointError: when it is missing, damaged, or no dict.
    """
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
