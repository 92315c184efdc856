"""The parts that a run is made of: chosen by name in their tables, described by the options that they bring along.

A script's parser is made for the parts that its command line, its recipe or the run to resume chooses, so that --help
lists their options and no others.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers import cli
from helpers.augment import AUGMENTATIONS, DEFAULT_CHAIN, Setting, build_chain
from helpers.data import Data
from helpers.losses import LOSSES
from helpers.schedule import SCHEDULES, Place
from models import FRONTENDS, MODELS, default_frontend

# Published option names of the fields that front ends have in common.
FRONTEND_OPTIONS = {
    "sample_rate": "resample_rate",
    "win_length": "window_size",
    "hop_length": "hop_size",
    "f_min": "fmin",
    "f_max": "fmax",
}


@dataclass(frozen=True)
class Parts:
    """Names of the chosen parts, keys of their tables."""

    model: str = next(iter(MODELS))
    frontend: str = ""  # "": the network's own
    loss: str = next(iter(LOSSES))
    schedule: str = next(iter(SCHEDULES))
    augment: tuple[str, ...] = DEFAULT_CHAIN

    def __post_init__(self):
        object.__setattr__(self, "augment", tuple(self.augment))
        if not self.frontend:
            object.__setattr__(self, "frontend", default_frontend(self.model)[0])


STUDENT = Parts()  # of the published student's recipe
TABLES = {"model": MODELS, "frontend": FRONTENDS, "loss": LOSSES, "schedule": SCHEDULES, "augment": AUGMENTATIONS}


def chosen_parts(argv: Sequence[str], values: Mapping[str, Any]) -> Parts:
    """The parts that a command line names, else those of `values`, else the published student's.

    Args:
        values: options of a recipe or of the run to resume.

    What is no name in a table is left to the script's parser, to refuse or, as a checkpoint's name, to take.
    """
    parser = cli.Parser(add_help=False)
    for kind in TABLES:
        parser.add_argument(f"--{kind}", nargs="*" if kind == "augment" else None)
    named, _ = parser.parse_known_args(argv)
    chosen: dict[str, Any] = {}
    for source in (vars(named), values):
        for kind, table in TABLES.items():
            value = source.get(kind)
            names = value if isinstance(value, list) else [value]
            is_known = all(name in table for name in names if name is not None)
            if value is not None and isinstance(value, list) == (kind == "augment") and is_known:
                chosen.setdefault(kind, value)
    return Parts(**chosen)


def add_network_options(parser: argparse.ArgumentParser, parts: Parts) -> argparse._ArgumentGroup:
    """Options of the network and its front end; the latter's defaults are those that the network declares."""
    network = parser.add_argument_group("network")
    network.add_argument("--model", choices=[*MODELS], default=parts.model, help="architecture")
    network.add_argument("--frontend", choices=[*FRONTENDS], default=parts.frontend, help="what makes its spectrogram")
    cli.add_config_arguments(parser, f"options of {parts.model}", MODELS[parts.model][0])
    cli.add_config_arguments(parser, f"options of {parts.frontend}", FRONTENDS[parts.frontend][0], FRONTEND_OPTIONS)
    name, options = default_frontend(parts.model)
    own = {FRONTEND_OPTIONS.get(field, field): value for field, value in options.items() if name == parts.frontend}
    parser.set_defaults(n_classes=None, **own)
    return network


def add_loss_options(parser: argparse.ArgumentParser, parts: Parts) -> None:
    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss", choices=[*LOSSES], default=parts.loss, help="what is minimised")
    loss.add_argument(
        "--teacher_logits", metavar="FILE", help="logits of the training clips (default: TAU22's, fetched once)"
    )
    cli.add_config_arguments(parser, f"options of {parts.loss}", LOSSES[parts.loss][0])


def add_augmentation_options(parser: argparse.ArgumentParser, parts: Parts) -> None:
    group = parser.add_argument_group("augmentation")
    group.add_argument("--augment", nargs="*", choices=[*AUGMENTATIONS], default=list(parts.augment), metavar="NAME",
                       help=f"the chain, in order of application: {', '.join(AUGMENTATIONS)}")  # fmt: skip
    for name in dict.fromkeys(parts.augment):
        cli.add_config_arguments(parser, f"options of {name}", AUGMENTATIONS[name][0])


def add_schedule_options(parser: argparse.ArgumentParser, parts: Parts) -> None:
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--schedule", choices=[*SCHEDULES], default=parts.schedule, help="learning rate over epochs and steps"
    )
    cli.add_config_arguments(parser, f"options of {parts.schedule}", SCHEDULES[parts.schedule])


def model_config(args: argparse.Namespace) -> Any:
    """The config of the chosen network as the options have it. This and what follows raise ValueError for a value that
    the part refuses."""
    return cli.config_from(args, MODELS[args.model][0])


def build_model(args: argparse.Namespace) -> nn.Module:
    return MODELS[args.model][1](model_config(args))


def build_frontend(args: argparse.Namespace) -> nn.Module:
    config, Frontend = FRONTENDS[args.frontend]
    return Frontend(cli.config_from(args, config, FRONTEND_OPTIONS))


def build_loss(args: argparse.Namespace) -> Any:
    config, Loss = LOSSES[args.loss]
    return Loss(cli.config_from(args, config))


def build_rate(args: argparse.Namespace) -> Callable[[int, int, int], float]:
    """The learning rate of a step, from its epoch, its number in the epoch, and how many the epoch has."""
    schedule = cli.config_from(args, SCHEDULES[args.schedule])
    return lambda epoch, step, n_steps: args.lr * schedule.factor(Place(epoch, step, n_steps, args.n_epochs))


def augment_configs(args: argparse.Namespace) -> dict[str, Any]:
    """The configs of the chain by name, in order."""
    twice = sorted({name for name in args.augment if args.augment.count(name) > 1})
    if twice:
        raise ValueError(f"augment names {', '.join(twice)} twice: each has one set of options")
    return {name: cli.config_from(args, AUGMENTATIONS[name][0]) for name in args.augment}


def check_configs(args: argparse.Namespace) -> None:
    """Builds the configs of network and augmentations for their checks, before anything is read or written.

    Raises:
        ValueError: for a value that a part refuses.
    """
    model_config(args)
    augment_configs(args)


def build_augment(args: argparse.Namespace, data: Data, frontend: nn.Module, loss_fn: Any) -> nn.ModuleDict:
    """The chain of augmentations for a training part, with the files that it needs.

    Raises:
        DataError, DownloadError: for files that are missing or do not fit.
    """
    has_teacher = data.train.teacher_logits is not None
    setting = Setting(
        clips=data.train,
        mask_value=frontend.mask_value,
        teacher_temperature=getattr(loss_fn, "teacher_temperature", None) if has_teacher else None,
        responses=Path(data.meta.root) / "dirs" if args.dataset == "synthetic" else None,
        sample_rate=frontend.sample_rate,
        shape=spectrogram_shape(frontend, data.store.n_samples),
    )
    return build_chain(augment_configs(args), setting, getattr(loss_fn, "hearing", ()))


def spectrogram_shape(frontend: nn.Module, n_samples: int) -> tuple[int, int] | None:
    """(mel, time) of a clip's spectrogram; None where clips are too short, as `check_shapes` will say."""
    try:
        return tuple(frontend.eval()(torch.zeros(1, n_samples)).shape[2:])  # in eval mode nothing is drawn
    except ValueError:
        return None
