"""What a command line says of the network and front end of a checkpoint: believed where the file does not say it."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from helpers import cli
from helpers.checkpoints.checkpoint import LoadedModel
from helpers.options import FRONTEND_OPTIONS
from helpers.teachers import TeacherSource
from models import FRONTENDS, MODELS
from models.beats import differences

NETWORK, FRONTEND = MODELS["cp_mobile"][0], FRONTENDS["cp_mel"][0]  # whose published options there are


def add_stated_options(parser: argparse.ArgumentParser, with_network: bool = True) -> None:
    """Options of network and front end, without defaults: nothing needs to be said that the checkpoint says."""
    parts = [("network", NETWORK, {})] if with_network else []
    parts += [("front end", FRONTEND, FRONTEND_OPTIONS)]
    for title, config, names in parts:
        hint = "where it does not say them; else they must agree"
        cli.add_config_arguments(parser, f"{title} of the checkpoint, {hint}", config, names)
        parser.set_defaults(**{names.get(field.name, field.name): None for field in fields(config)})


def believe(parser: argparse.ArgumentParser, args: argparse.Namespace, loaded: LoadedModel, path: Path) -> LoadedModel:
    """The checkpoint with the front end that the options name, where it records none itself.

    Ends with the parser's error for an option that contradicts the checkpoint or that its network does not have.
    """
    for part, stated, names in ((loaded.model, NETWORK, {}), (loaded.frontend, FRONTEND, FRONTEND_OPTIONS)):
        given = {field.name: getattr(args, names.get(field.name, field.name), None) for field in fields(stated)}
        given = {name: value for name, value in given.items() if value is not None}
        known = {field.name for field in fields(part.config)}
        for name, value in given.items():
            option = f"--{names.get(name, name)}"
            if name not in known:
                parser.error(f"{option} {value}, but {path} holds a {type(part).__name__}, which has no such option")
            held = getattr(part.config, name)
            if value == held or (not loaded.is_recorded and (part is loaded.frontend or _same(part, name, value))):
                continue
            parser.error(f"{option} {value}, but {path} has {held}: leave the option away")
        if part is loaded.frontend and not loaded.is_recorded and given:
            n_mels = getattr(loaded.model.config, "input_fdim", None)
            if n_mels is not None and given.get("n_mels", n_mels) != n_mels:
                parser.error(f"--n_mels {given['n_mels']}, but the network in {path} takes {n_mels}")
            with cli.option_errors(parser):
                frontend = type(part)(_changed(part.config, given)).eval()
            loaded = replace(loaded, frontend=frontend)
    return loaded


def believe_of_teachers(
    parser: argparse.ArgumentParser, args: argparse.Namespace, sources: Sequence[TeacherSource]
) -> list[TeacherSource]:
    """The teachers with the front end that the options name, those whose files record none.

    Ends with the parser's error for an option that contradicts one of these files, or that is there for no teacher.
    """
    if not any(value is not None for value in stated_frontend(args).values()):
        return list(sources)
    believed, contradicted = [], None
    for source in sources:
        loaded = source.load()
        if loaded.is_recorded:
            contradicted = contradicted or (loaded, source.path)
            believed.append(source)
        else:
            believed.append(replace(source, frontend=believe(parser, args, loaded, source.path).frontend))
    if contradicted is not None and not any(source.frontend for source in believed):
        believe(parser, args, *contradicted)  # every file says it: the options must agree
    return believed


def stated_frontend(args: argparse.Namespace) -> dict[str, Any]:
    """The front end's fields as the command line states them, None where it does not."""
    return {field.name: getattr(args, FRONTEND_OPTIONS.get(field.name, field.name), None) for field in fields(FRONTEND)}


def _changed(config: Any, given: Mapping[str, Any]) -> Any:
    """The config with other values; what it derived from those, as f_max from the rate, is derived anew."""
    default = type(config)()
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    return type(config)(**{name: value for name, value in own.items() if value != getattr(default, name)} | given)


def _same(model, name: str, value) -> bool:
    """Whether another value gives the same network; what is recognised by shapes may be any of them."""
    try:
        other = type(model)(replace(model.config, **{name: value}))
    except ValueError:
        return False
    return not differences(model.state_dict(), other.state_dict())
