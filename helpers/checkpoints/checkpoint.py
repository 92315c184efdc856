"""Checkpoints: tensors and plain values, so they load without running code, and everything to build the parts again.

Our own hold `model` and `frontend` as {name, config, state}, the class names, the options of the run and, for resuming,
the state of optimizer, scaler, random generators and loop. `precision` says what the network is for: fp32 (or left
out), fp16, or int8: the state then includes the ranges of activations, and `quantization` holds its config. Checkpoints
of others are read too, see helpers/checkpoints/foreign.py.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.files import ContentError, check_content, matching, plain, replacing
from datasets.tau import SCENES, Meta
from datasets.torch_file import read_torch_file
from helpers.averaging import WeightAverage
from helpers.checkpoints.foreign import ForeignError, recognise
from helpers.data import Data
from helpers.errors import UserError
from helpers.fetch.download import file_hash
from helpers.loop import NonFiniteLossError, Update
from helpers.quantization import prepare
from models import FRONTENDS, MODELS, get_frontend, get_model
from models.layers.core import QuantConfig
from models.published import BY_SHA256, PUBLISHED
from models.state_dicts import differences

log = logging.getLogger(__name__)

FORMAT = "low-complexity ASC checkpoint 1"

STATE = matching(
    lambda state: all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()),
    "must hold tensors by name",
)
PART = {"name": str, "config": {}, "state": STATE}
COUNT = matching(lambda n: type(n) is int and n >= 0, "must be a whole number")
# What a file of ours holds; what one of today has and older ones have not ends in "?".
SCHEMA = {
    "model": PART,
    "frontend": PART,
    "scenes": [str],
    "recording_devices?": [str],
    "device_models?": matching(
        lambda states: all(isinstance(device, str) and isinstance(state, dict) for device, state in states.items()),
        "must hold weights by recording device",
    ),
    "clip_samples?": matching(lambda n: type(n) is int and 0 < n < 1 << 31, "must be a number of samples"),
    "options?": {},
    "precision?": matching(lambda name: name in ("fp32", "int8", "fp16"), "must be fp32, int8 or fp16"),
    "quantization?": (dict, type(None)),
    "temperature?": matching(
        lambda value: isinstance(value, int | float) and 0 < value < 1000, "must be a number above 0"
    ),
    "source_scores?": matching(
        lambda scores: all(isinstance(k, str) and isinstance(v, int | float) for k, v in scores.items()),
        "must hold numbers by name",
    ),
    "data?": matching(
        lambda digests: all(isinstance(k, str) and isinstance(v, str) for k, v in digests.items()),
        "must hold digests by name",
    ),
}
TRAINING_SCHEMA = {
    "optimizer": {"state": {}, "param_groups": [{"lr": (int, float), "params": [int]}]},
    "scaler": {},
    "loss?": STATE,
    "learning?": STATE,  # the weights that learn, where the network is their average
    "average?": {"n": COUNT, "ends?": COUNT, "latest?": COUNT},
    "loop": {
        "epoch": COUNT,
        "step": COUNT,
        "n_clips": COUNT,
        "sums": (torch.Tensor, type(None)),
        "names": [str],
        "best": (int, float),
        "n_worse?": COUNT,
    },
    "rng": [{"cpu": torch.Tensor, "cuda": (torch.Tensor, type(None))}],
}


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, damaged, of another program, or does not fit; one line with the remedy."""


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module  # eval mode, on the CPU; of an int8 checkpoint with fake quantization, see helpers/quantization.py
    frontend: nn.Module
    precision: str  # fp32, int8 or fp16
    scenes: tuple[str, ...]  # what the outputs stand for
    content: dict[str, Any]  # the whole file, of one of ours
    device_models: Mapping[str, nn.Module] = field(default_factory=dict)  # for single recording devices, in eval mode
    is_recorded: bool = True  # the file, or the published name, says what network and front end are; else: recognised


@dataclass(frozen=True)
class Checkpoint:
    """One of our checkpoints, and where it lies."""

    path: Path
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """What a run trains and on which data: what its checkpoints hold beside the state of training.

    Args:
        digests: of the data, from `helpers.data.data_digests` and the augmentations.
        more: further entries of the checkpoint.
        loss: one that learns too; None for others.
        average: of the network's weights, which is scored and kept in their place; None: they are.
    """

    model: nn.Module
    frontend: nn.Module
    data: Data
    digests: Mapping[str, str]
    more: Mapping[str, Any] = field(default_factory=dict)
    loss: nn.Module | None = None
    average: WeightAverage | None = None


def describe(part: nn.Module, table: Mapping[str, tuple[type, type]]) -> dict[str, Any]:
    """Name, config and state of a network or front end, as stored in a checkpoint."""
    name = next(name for name, (_, cls) in table.items() if type(part) is cls)
    return {"name": name, "config": plain(part.config), "state": part.state_dict()}


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes atomically: a temporary file beside it, flushed to the disk, then renamed over what was there."""
    with replacing(path, "wb") as file:
        _save(content, file)


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


def describe_run(subject: Subject, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of every script holds beside the state of training.

    Args:
        options: the resolved ones of the script.

    Raises:
        NonFiniteLossError: for weights or running statistics that are not finite, so that nothing good is replaced.
    """
    if not_finite(subject.model.state_dict()) is not None:
        raise NonFiniteLossError("the weights are", options["lr"])
    meta, model, average = subject.data.meta, describe(subject.model, MODELS), subject.average
    if average is not None:
        model["state"] = average.mean()
    return {
        "data": dict(subject.digests),
        "model": model,
        **({} if average is None else average.saved()),
        "frontend": describe(subject.frontend, FRONTENDS),
        "scenes": list(meta.scenes),
        "recording_devices": list(meta.recording_devices),
        "clip_samples": subject.data.store.n_samples,
        "options": dict(options),
        **({} if subject.loss is None else {"loss": subject.loss.state_dict()}),
        **subject.more,
    }


def training_state(update: Update) -> dict[str, Any]:
    """Everything beside the network that an exact continuation needs; all processes must call it together.

    Raises:
        NonFiniteLossError: when weights or averages of the optimizer are not finite, so that nothing good is replaced.
    """
    state, optimizer, device = update.state, update.optimizer, update.machine.device
    state.check_finite(update.lr)
    averages = [value for entry in optimizer.state.values() for value in entry.values()]
    weights = [value for group in optimizer.param_groups for value in group["params"]]
    tensors = [value for value in (*weights, *averages) if isinstance(value, torch.Tensor)]
    if not_finite({str(i): value.detach() for i, value in enumerate(tensors)}) is not None:
        raise NonFiniteLossError("the weights are", update.lr, state.epoch)
    rng = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    processes = update.machine.processes
    sums = None if state.sums is None else processes.sum(state.sums)
    return {
        "optimizer": optimizer.state_dict(),
        "scaler": update.scaler.state_dict(),
        "loop": {**vars(state), "names": list(state.names), "sums": sums},
        "rng": processes.gather(rng),  # by process
    }


def restore_training(begun: Checkpoint, subject: Subject, update: Update) -> None:
    """Puts network, optimizer, scaler, loop and random generators back to what a checkpoint of ours holds.

    Raises:
        CheckpointError: when the labels of the data set or the shapes of the network are others.
    """
    path, content, scenes = begun.path, begun.content, subject.data.meta.scenes
    if tuple(content["scenes"]) != tuple(scenes):
        raise CheckpointError(
            f"{path} knows the scenes {', '.join(content['scenes'])}; the data set has {', '.join(scenes)}"
        )
    state, processes, device = update.state, update.machine.processes, update.machine.device
    try:
        subject.model.load_state_dict(content["model"]["state"])
        if subject.average is not None:
            subject.average.restore(content)
        if subject.loss is not None:
            subject.loss.load_state_dict(content["loss"])
        update.optimizer.load_state_dict(content["optimizer"])
        update.scaler.load_state_dict(content["scaler"])
        for name, value in content["loop"].items():
            setattr(state, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        if state.sums is not None and not processes.is_main:
            state.sums = torch.zeros_like(state.sums)  # the sums of all are with process 0 now
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
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit this run: {error}") from error


def read_parts(path: Path, name: str | None = None) -> tuple[dict[str, Any], bool]:
    """What a checkpoint of ours or a published one holds: `model` and `frontend`, each {name, config, state}, and more.

    Args:
        name: key of PUBLISHED, of the network that the file must hold; None: what is in it is recognised.

    Returns:
        The parts, and whether the file, or a published name, says what they are; else they were recognised.

    Raises:
        CheckpointError: when the file is missing, damaged or foreign.
    """
    content = load_file(path)
    is_ours = content.get("format") == FORMAT
    if name is None and is_ours:
        return content, True
    if name is None:
        name = BY_SHA256.get(file_hash(path, "sha256"))
    try:
        return recognise(path, content, None if name is None else PUBLISHED[name]), name is not None
    except ForeignError as error:
        raise CheckpointError(str(error)) from error


def load_model(path: Path | str, name: str | None = None) -> LoadedModel:
    """Builds network and front end from a checkpoint of ours or a published one; weights load strictly.

    Args:
        name: key of PUBLISHED, of the network that the file must hold; None: what is in it is recognised.

    Raises:
        CheckpointError: when the file is missing, damaged or foreign, or its weights do not fit the network it names.
    """
    path = Path(path)
    parts, is_recorded = read_parts(path, name)
    precision = parts.get("precision", "fp32")
    frontend = build_part(parts["frontend"], FRONTENDS, path).eval()
    example = None
    if precision == "int8":
        try:
            example = frontend(torch.zeros(1, parts.get("clip_samples", frontend.sample_rate)))
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit the front end it describes: {error}") from error
    model = build_part(parts["model"], MODELS, path, precision, parts.get("quantization"), example).eval()
    devices = {
        device: build_part({**parts["model"], "state": state}, MODELS, path).eval()
        for device, state in parts.get("device_models", {}).items()
    }
    scenes = tuple(parts.get("scenes", SCENES if model.config.n_classes == len(SCENES) else ()))
    return LoadedModel(
        model=model,
        frontend=frontend,
        precision=precision,
        scenes=scenes,
        content=parts,
        device_models=devices,
        is_recorded=is_recorded,
    )


def check_scenes(path: Path | str, loaded: LoadedModel, meta: Meta, remedy: str) -> None:
    """Refuses a network whose outputs stand for other scenes than those of the data set.

    Raises:
        CheckpointError: with both lists.
    """
    if loaded.scenes != tuple(meta.scenes):
        known = ", ".join(loaded.scenes) or f"{loaded.model.config.n_classes} classes of no known data set"
        raise CheckpointError(f"{path} knows the scenes {known}; {meta.root} has {', '.join(meta.scenes)}: {remedy}")


def build_part(
    part: Mapping[str, Any],
    table: Mapping,
    path: Path,
    precision: str = "fp32",
    quantization: Mapping[str, Any] | None = None,
    example: Tensor | None = None,
) -> nn.Module:
    """Builds a network or front end from its description and loads its state strictly.

    Args:
        example: a spectrogram as the network reads it; needed for int8.

    Raises:
        CheckpointError: when name, config or state do not fit.
    """
    try:
        built = (get_model if table is MODELS else get_frontend)(part["name"], **part["config"])
        if precision == "int8":
            stored = {name: part["state"][name] for name in built.state_dict() if name in part["state"]}
            if what := differences(stored, built.state_dict()):  # before anything runs
                raise ValueError(what)
            built = prepare(built, QuantConfig(**quantization), example)
        elif precision == "fp16":
            built = built.half()
        if what := differences(part["state"], built.state_dict()):
            raise ValueError(what)
        built.load_state_dict(part["state"])
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"{path} does not fit the network it describes: {error}") from error
    if (name := not_finite(built.state_dict())) is not None:
        raise CheckpointError(
            f"{path} holds weights that are NaN or infinite, first in {name}: take another checkpoint"
        )
    return built


def load_file(path: Path) -> dict[str, Any]:
    """What is in a checkpoint of anybody, on the CPU; no code of the file is run.

    Raises:
        CheckpointError: when it is missing, damaged, no dict, or one of ours with entries that no such file has.
    """
    try:
        content = read_torch_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: no such checkpoint") from error
    except ContentError as error:
        raise CheckpointError(f"{path} {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no checkpoint but a {type(content).__name__}")
    if content.get("format") == FORMAT:
        try:
            check_content(content, SCHEMA)
            if "loop" in content:
                check_content(content, TRAINING_SCHEMA)
        except ContentError as error:
            raise CheckpointError(
                f"{path} is no whole checkpoint of this project ({error}): take another one"
            ) from error
    return content


def not_finite(state: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity; None where all is well."""
    floats = {name: value for name, value in state.items() if value.is_floating_point()}
    if not floats or bool(torch.stack([value.isfinite().all() for value in floats.values()]).all()):
        return None  # one answer of the device instead of one for each tensor
    return next(name for name, value in floats.items() if not bool(value.isfinite().all()))
