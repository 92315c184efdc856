"""What a command line says of the network and front end of a checkpoint: believed where the file does not say it."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from helpers import cli
from helpers.checkpoints.checkpoint import LoadedModel
from helpers.parts import FRONTEND_OPTIONS, Parts
from helpers.teachers import TeacherSource
from models import FRONTENDS, MODELS
from models.state_dicts import differences


def add_stated_options(parser: argparse.ArgumentParser, parts: Parts, with_network: bool = True) -> None:
    """Options of network and front end, without defaults: nothing needs to be said that the checkpoint says."""
    kinds = [("model", "network", MODELS, {})] if with_network else []
    kinds += [("frontend", "front end", FRONTENDS, FRONTEND_OPTIONS)]
    for kind, title, table, names in kinds:
        title = f"{title} of the checkpoint, where it does not say them; else they must agree"
        config = table[getattr(parts, kind)][0]
        cli.add_config_arguments(parser, title, config, names)
        parser.set_defaults(**{names.get(field.name, field.name): None for field in fields(config)})
        parser.add_argument_group(title).add_argument(f"--{kind}", choices=[*table], help="which one it is")


def believe(parser: argparse.ArgumentParser, args: argparse.Namespace, loaded: LoadedModel, path: Path) -> LoadedModel:
    """The checkpoint with the front end that the options name, where it records none itself.

    Ends with the parser's error for an option that contradicts the checkpoint or that its network does not have.
    """
    check_kind(parser, args, "model", loaded.model, MODELS, path)
    check_stated(parser, args, loaded, path, loaded.model)
    if loaded.is_recorded or stated_name(args) in (None, name_of(loaded.frontend, FRONTENDS)):
        check_kind(parser, args, "frontend", loaded.frontend, FRONTENDS, path)
        base = loaded.frontend.config
    else:
        base = FRONTENDS[args.frontend][0]()
        loaded = replace(loaded, frontend=FRONTENDS[args.frontend][1](base).eval())
    check_stated(parser, args, loaded, path, loaded.frontend)
    given = {name: value for name, value in stated_frontend(args).items() if value is not None}
    if loaded.is_recorded or not given:
        return loaded
    n_mels = getattr(loaded.model.config, "input_fdim", None)
    if n_mels is not None and given.get("n_mels", n_mels) != n_mels:
        parser.error(f"--n_mels {given['n_mels']}, but the network in {path} takes {n_mels}")
    with cli.option_errors(parser):
        return replace(loaded, frontend=type(loaded.frontend)(_changed(base, given)).eval())


def stated_name(args: argparse.Namespace) -> str | None:
    """The front end that the command line names."""
    return getattr(args, "frontend", None)


def name_of(part: Any, table: Mapping[str, tuple[type, type]]) -> str:
    return next(name for name, (_, cls) in table.items() if type(part) is cls)


def check_kind(
    parser: argparse.ArgumentParser, args: argparse.Namespace, kind: str, part: Any, table: Mapping, path: Path
) -> None:
    """Ends with the parser's error where the command line names another network or front end than the file holds."""
    stated, held = getattr(args, kind, None), name_of(part, table)
    if stated not in (None, held):
        parser.error(f"--{kind} {stated}, but {path} has {held}: leave the option away")


def check_stated(
    parser: argparse.ArgumentParser, args: argparse.Namespace, loaded: LoadedModel, path: Path, part: Any
) -> None:
    """Ends with the parser's error for an option of network or front end that contradicts the file."""
    is_frontend = part is loaded.frontend
    names = FRONTEND_OPTIONS if is_frontend else {}
    stated = stated_frontend(args) if is_frontend else stated_network(args)
    known = {field.name for field in fields(part.config)}
    for name, value in stated.items():
        if value is None:
            continue
        option = f"--{names.get(name, name)}"
        if name not in known:
            parser.error(f"{option} {value}, but {path} holds a {type(part).__name__}, which has no such option")
        held = getattr(part.config, name)
        if value == held or (not loaded.is_recorded and (is_frontend or _same(part, name, value))):
            continue
        parser.error(f"{option} {value}, but {path} has {held}: leave the option away")


def believe_of_teachers(
    parser: argparse.ArgumentParser, args: argparse.Namespace, sources: Sequence[TeacherSource]
) -> list[TeacherSource]:
    """The teachers with the front end that the options name, those whose files record none.

    Ends with the parser's error for an option that contradicts one of these files, or that is there for no teacher.
    """
    if stated_name(args) is None and all(value is None for value in stated_frontend(args).values()):
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


def stated_network(args: argparse.Namespace) -> dict[str, Any]:
    """The network's fields as the command line states them, None where it does not."""
    return _stated(args, MODELS[getattr(args, "model", None) or Parts().model][0], {})


def stated_frontend(args: argparse.Namespace) -> dict[str, Any]:
    """The front end's fields as the command line states them, None where it does not."""
    return _stated(args, FRONTENDS[stated_name(args) or Parts().frontend][0], FRONTEND_OPTIONS)


def _stated(args: argparse.Namespace, config: type, names: Mapping[str, str]) -> dict[str, Any]:
    return {field.name: getattr(args, names.get(field.name, field.name), None) for field in fields(config)}


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
