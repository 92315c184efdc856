"""Checkpoints of others: which network they hold, read off the names and shapes of their weights.

Read are Lightning checkpoints, state dicts bare or below other keys and prefixes of names, and the files of a network's
own authors, of every network in MODELS that declares how: `entry` and `recognise(state)`, `read_authors_file(content)`
(see models/__init__.py). What leaves no trace in the shapes, such as strides, pools and attention heads, is taken from
the published network. So is the front end, where no buffers of one stand beside the network; that is said aloud: a
wrong one gives chance accuracy without any error.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from helpers.checkpoints.nearest import nothing_found
from helpers.checkpoints.state_dicts import as_float32, candidates, device_states, is_for_device, log_found
from helpers.errors import UserError
from models import FRONTENDS, MODELS, default_frontend, get_frontend, get_model
from models.published import PUBLISHED, Published
from models.state_dicts import some

log = logging.getLogger(__name__)


class ForeignError(UserError, ValueError):
    """A checkpoint that is not of this project holds no network that is known here, or not the whole of it."""


def recognise(path: Path | str, content: Mapping[str, Any], row: Published | None = None) -> dict[str, Any]:
    """The parts `model` and `frontend` ({name, config, state} each) of a checkpoint that is not of this project, and
    `device_models`, the states of networks for single recording devices beside a general one.

    Args:
        path: for messages.
        content: what `torch.load` returns.
        row: of models.published, where the file is known.

    Raises:
        ForeignError: when it holds none of the known networks, or an incomplete one.
    """
    frontend = None if row is None else row.frontend or default_frontend(row.architecture)
    if row is not None and row.options is not None:  # a bare state dict
        return _described(row.architecture, row.options, content, frontend)
    known = {name: cls for name, (_, cls) in MODELS.items() if hasattr(cls, "recognise")}
    found = candidates(content, known, "" if row is None else row.within)
    if not found:
        return _whole(path, content)
    if len(found) > 1:
        places = [f"{one.network} in {f'{one.where}*' if one.where else 'names without prefix'}" for one in found]
        raise ForeignError(
            f"{path} holds more than one network ({' and '.join(places)}): save the one that is meant alone"
        )
    name = found[0].network
    log_found(path, found[0])

    def plain(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = as_float32(state)
        return known[name].unfolded(state) if hasattr(known[name], "unfolded") else state

    state = plain(found[0].state)
    try:
        config, frontend_options = known[name].recognise(state)
    except KeyError as error:
        raise ForeignError(f"{path} is no whole {name} network: {error} is not in it") from error
    except ValueError as error:
        raise ForeignError(f"{path}: {error}") from error
    except (IndexError, AttributeError, TypeError, ZeroDivisionError) as error:
        raise ForeignError(f"{path} is no {name} network, its weights have other shapes: {error}") from error
    if frontend is not None:
        parts = _described(name, config, state, frontend)
    else:
        parts = _parts(path, name, config, state, frontend_options, found[0].others)
    if not is_for_device(found[0]):
        parts["device_models"] = {d: plain(own) for d, own in device_states(content, known, name).items()}
    return parts


def _described(
    name: str, config: Mapping[str, Any], state: Mapping[str, Any], frontend: tuple[str, Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "model": {"name": name, "config": dict(config), "state": state},
        "frontend": {"name": frontend[0], "config": dict(frontend[1]), "state": {}},
    }


def read_authors_file(path: Path | str, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """{name, config, state} of a network in the form in which its authors save it, its classifier left out perhaps.

    Raises:
        ForeignError: for such a file that is damaged.
    """
    for name, (_, cls) in MODELS.items():
        try:
            found = cls.read_authors_file(content) if hasattr(cls, "read_authors_file") else None
        except ValueError as error:
            raise ForeignError(f"{path}: {error}") from error
        if found is not None:
            return {"name": name, "config": found[0], "state": found[1]}
    return None


def _whole(path: Path | str, content: Mapping[str, Any]) -> dict[str, Any]:
    part = read_authors_file(path, content)
    if part is None:
        raise ForeignError(f"{path} {nothing_found(content)}")
    with torch.device("meta"):  # names are all that is wanted
        missing = [name for name in get_model(part["name"], **part["config"]).state_dict() if name not in part["state"]]
    if missing:
        raise ForeignError(
            f"{path} is a {part['name']} network without a classifier, so it names no scenes ({some(missing)} missing):"
            " fine-tune it first with run_training.py --pretrained"
        )
    return _parts(path, part["name"], part["config"], part["state"], {}, {})


def _parts(
    path: Path | str, name: str, config: Mapping, state: Mapping, frontend_options: Mapping,
    others: Mapping[str, torch.Tensor],
) -> dict[str, Any]:  # fmt: skip
    log.info("%s is recognised as %s with %d classes", path, name, config["n_classes"])
    frontend = read_frontend(path, others)
    if frontend is None:
        frontend, options = default_frontend(name)
        frontend = frontend, options | frontend_options
        log.warning(
            "%s does not tell its front end: taken is %s; of the published %s networks some have %s (--frontend, "
            "--hop_size and the others of front ends say otherwise)",
            path, _in_words(*frontend), name, " or ".join(published_frontends(name)),
        )  # fmt: skip
    return _described(name, config, state, frontend)


def published_frontends(architecture: str) -> list[str]:
    """The front ends of its published networks, and the one that it takes by default, in words."""
    own = default_frontend(architecture)
    rows = [row.frontend or own for row in PUBLISHED.values() if row.architecture == architecture]
    words = [" ".join([name, *(f"{key} {value}" for key, value in options.items())]) for name, options in [own, *rows]]
    return list(dict.fromkeys(words))


def read_frontend(path: Path | str, tensors: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the front end whose buffers are among tensors; None where there is none that is known."""
    for name, (_, cls) in FRONTENDS.items():
        options = cls.recognise(tensors) if hasattr(cls, "recognise") else None
        if options is not None:
            log.warning(
                "%s holds buffers of %s, which do not tell the hop: taken is %s (--hop_size says otherwise)",
                path, name, _in_words(name, options),
            )  # fmt: skip
            return name, options
    return None


def _in_words(name: str, options: Mapping[str, Any]) -> str:
    config = get_frontend(name, **options).config
    return f"{name} with " + ", ".join(f"{key} {value}" for key, value in vars(config).items())
