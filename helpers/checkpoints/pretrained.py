"""The network that a training run starts with: new, with weights of others, or that of a run to resume."""

import argparse
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from helpers.checkpoints.checkpoint import FORMAT, Checkpoint, CheckpointError, load_file
from helpers.checkpoints.foreign import read_authors_file, recognise
from helpers.fetch.resources import pretrained_file
from helpers.parts import model_config
from models import MODELS

log = logging.getLogger(__name__)


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
    part = None
    if begun is not None:
        config = config_class(**begun.content["model"]["config"])
    else:
        config = model_config(args)
        if args.pretrained != "none":
            path, part = pretrained_part(args)
            names = {field.name for field in fields(config_class)} & {*args.given, "n_classes"}
            config = config_class(**(part["config"] | {name: getattr(config, name) for name in names}))
            vars(args).update({name: value for name, value in vars(config).items() if name in vars(args)})
    model = Model(config)
    if part is not None:
        try:
            dropped = model.load_pretrained(part["state"])
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        log.info("weights from %s; not taken: %s", path, ", ".join(dropped) or "none")
    if args.freeze != "none":
        freeze(model, args.model, args.freeze)
    return model


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


def pretrained_part(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The file of --pretrained, and name, config and state of the network in it.

    Raises:
        CheckpointError: when it is missing, foreign, or of another architecture.
    """
    Model = MODELS[args.model][1]
    if not hasattr(Model, "load_pretrained"):
        others = " or ".join(name for name, (_, cls) in MODELS.items() if hasattr(cls, "load_pretrained"))
        raise CheckpointError(
            f"{args.model} has no pre-trained weights: leave --pretrained away, or choose --model {others}"
        )
    try:
        if args.pretrained == "auto":
            path = pretrained_file(args.model, Model.pretrained_url(model_config(args)))
        else:
            path = Path(args.pretrained)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    content = load_file(path)
    if content.get("format") == FORMAT:
        part = content["model"]
    else:
        try:
            part = read_authors_file(path, content) or recognise(path, content)["model"]
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if part["name"] != args.model:
        raise CheckpointError(f"{path} holds a {part['name']} network, --model is {args.model}")
    return path, part
