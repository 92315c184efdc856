"""The network that a training run starts with: new, with weights of others, or that of a run to resume."""

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.files import plain
from helpers.checkpoints.checkpoint import Checkpoint, CheckpointError, load_file, read_parts
from helpers.checkpoints.foreign import read_authors_file
from helpers.fetch.resources import pretrained_file
from helpers.parts import build_frontend, model_config
from helpers.runs.folder import known_runs, published_source, trained_checkpoint
from models import MODELS, get_frontend
from models.published import ALIASES, PUBLISHED
from models.state_dicts import differences

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights to start from."""

    path: Path
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]  # perhaps without a classifier
    frontend: tuple[str, Mapping[str, Any]] | None = None  # that they were trained with; None is not known


def start_network(args: argparse.Namespace, begun: Checkpoint | None = None) -> nn.Module:
    """Builds the network with its frozen layers; with the weights of --pretrained where they are named.

    Weights come with the network that they are for; options that the user gives go before, and `args` tells what holds
    in the end. A run to resume knows its network to the last option, also those that the command line has not; its
    weights are loaded later.

    Raises:
        CheckpointError: when the weights are missing or do not fit.
        ValueError: for layers to freeze that there are not.
    """
    config_class, Model = MODELS[args.model]
    weights = None
    if begun is not None:
        config = config_class(**begun.content["model"]["config"])
    else:
        config = model_config(args)
        if args.pretrained != "none":
            weights = find_weights(args)
            names = {field.name for field in fields(config_class)} & {*args.given, "n_classes"}
            config = config_class(**(dict(weights.config) | {name: getattr(config, name) for name in names}))
            vars(args).update({name: value for name, value in vars(config).items() if name in vars(args)})
    model = Model(config)
    if weights is not None:
        try:
            dropped = take_weights(model, weights.state)
        except ValueError as error:
            raise CheckpointError(f"{weights.path}: {error}") from error
        log.info("weights from %s; not taken: %s", weights.path, ", ".join(dropped) or "none")
        warn_of_frontend(args, weights)
    if args.freeze != "none":
        freeze(model, args.model, args.freeze)
    return model


def warn_of_frontend(args: argparse.Namespace, weights: Weights) -> None:
    """Says so when the network saw other spectrograms before than it will see now."""
    if weights.frontend is None:
        return
    then, options = weights.frontend
    ours, theirs = plain(build_frontend(args).config), plain(get_frontend(then, **options).config)
    changed = {name: f"{name} {theirs.get(name)}, now {value}" for name, value in ours.items()}
    changed = [words for name, words in changed.items() if theirs.get(name) != ours[name]]
    if then != args.frontend:
        changed = [f"{then}, now {args.frontend}"]
    if changed:
        log.warning("%s was trained with another front end: %s", weights.path, "; ".join(changed))


def take_weights(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Loads weights strictly; the classifier keeps its random values where there is none, or one for other scenes.

    What depends on the number of classes is the classifier. Nothing is loaded when the rest does not fit.

    Args:
        state: of this network, with or without its classifier.

    Returns:
        Names of the entries that were dropped: the classifier's, when it is for another number of classes.

    Raises:
        ValueError: when anything else is missing, unknown or of another shape; the message lists what.
    """
    own, head = model.state_dict(), classifier_names(model)
    fits = all(isinstance(state.get(name), Tensor) and state[name].shape == own[name].shape for name in head)
    # A file without any classifier, or with one for other scenes; one that has lost a part of it is damaged.
    other = all(name in state for name in head) or not any(name in state for name in head)
    dropped = tuple(name for name in head if name in state) if not fits and other else ()
    taken = {name: value for name, value in state.items() if name not in dropped}
    wanted = own if fits or not other else {name: own[name] for name in own if name not in head}
    if what := differences(taken, wanted):
        raise ValueError(f"the weights do not fit this {type(model).__name__}: {what}")
    model.load_state_dict(own | taken)
    return dropped


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the entries of a state dict whose shapes depend on the number of classes."""
    own = model.state_dict()
    with torch.device("meta"):  # shapes are all that is wanted
        other = type(model)(replace(model.config, n_classes=model.config.n_classes + 1)).state_dict()
    return [name for name, value in own.items() if value.shape != other[name].shape]


def freeze(model: nn.Module, name: str, layers: str) -> None:
    """Keeps layers as they are.

    Args:
        layers: a number, or all.

    Raises:
        ValueError: for a network that has none to freeze, and for layers that there are not.
    """
    if not hasattr(model, "freeze_encoder"):
        raise ValueError(f"--freeze is for transformers; {name} learns as a whole")
    if layers != "all" and not re.fullmatch("[0-9]{1,4}", layers):
        raise ValueError(f"--freeze takes a number of layers, all or none, got {layers[:40]}")
    model.freeze_encoder(None if layers == "all" else int(layers))


def find_weights(args: argparse.Namespace) -> Weights:
    """The weights that --pretrained names: auto, a published network, the id of a run, or a file.

    Raises:
        CheckpointError: when they are missing, foreign, quantized, or of another architecture.
        DownloadError: when a published file cannot be fetched.
    """
    path, published = _source(args)
    part, frontend = None if published else _authors_file(path), None
    if part is None:
        parts, is_recorded = read_parts(path, published)
        precision, part = parts.get("precision", "fp32"), parts["model"]
        if precision != "fp32":
            raise CheckpointError(f"{path} is {precision}: start from the checkpoint of floats that it was made from")
        if is_recorded:
            frontend = parts["frontend"]["name"], dict(parts["frontend"]["config"])
    if part["name"] != args.model:
        raise CheckpointError(f"{path} holds a {part['name']} network, --model is {args.model}")
    return Weights(path, part["config"], part["state"], frontend)


def _source(args: argparse.Namespace) -> tuple[Path, str | None]:
    Model, name = MODELS[args.model][1], args.pretrained
    if name == "auto":
        if not hasattr(Model, "pretrained_url"):
            others = " or ".join(name for name, (_, cls) in MODELS.items() if hasattr(cls, "pretrained_url"))
            raise CheckpointError(
                f"{args.model} has no weights of its own to start from: name a published network, a run or a file "
                f"with --pretrained, or choose --model {others}"
            )
        try:
            return pretrained_file(args.model, Model.pretrained_url(model_config(args))), None
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if Path(name).is_file():
        return Path(name), None
    if (path := trained_checkpoint(args.project_name, name)) is not None:
        return path, None
    if name in PUBLISHED or name in ALIASES:
        return published_source(name)
    own = [key for key, row in PUBLISHED.items() if row.architecture == args.model]
    raise CheckpointError(
        f"--pretrained {name}: there is no such file and no such run (runs in {args.project_name}: "
        f"{known_runs(args.project_name)}); published as {args.model}: {', '.join(own) or 'none'}"
    )


def _authors_file(path: Path) -> dict[str, Any] | None:
    try:
        return read_authors_file(path, load_file(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
