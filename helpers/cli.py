"""Command lines: config dataclasses as option groups, and errors of the user as one line with exit status 2."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import torch

from datasets.tau import DataError
from helpers.checkpoint import CheckpointError
from helpers.complexity import LimitError
from helpers.distributed import local_rank
from helpers.errors import ExportError
from helpers.logger import RUN_ID
from helpers.loop import NonFiniteLogitsError, NonFiniteLossError, StoppedError
from helpers.quantization import QuantizationError

USAGE_ERROR = 2
# What the user can mend; each is one line that says how.
USER_ERRORS = (
    DataError, CheckpointError, NonFiniteLossError, NonFiniteLogitsError, QuantizationError, LimitError, ExportError,
    OSError,
)  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an option; the usage of sixty options would bury it."""

    def __init__(self, description: str | None = None, **options: Any):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and "" in arg_strings:  # an unset shell variable: never taken for "no such option"
            raise argparse.ArgumentError(action, "is empty: name something, or leave the option away")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        _say(f"error: {message} (--help lists all options)")
        self.exit(USAGE_ERROR)


def add_config_arguments(
    parser: argparse.ArgumentParser, title: str, config: type, names: Mapping[str, str] | None = None
) -> None:
    """Adds a group with an option for every `Annotated` field of a config dataclass, with its default and help.

    Args:
        names: option name for a field whose published flag is called otherwise.
    """
    group = parser.add_argument_group(title)
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        if get_origin(hints[field.name]) is not Annotated:
            continue  # set from code only
        kind, description = get_args(hints[field.name])
        option = (names or {}).get(field.name, field.name)
        default = None if field.default is MISSING else field.default
        if get_origin(kind) is Literal:
            group.add_argument(f"--{option}", choices=get_args(kind), default=default, help=description)
        elif kind is bool:
            group.add_argument(f"--{option}", action=argparse.BooleanOptionalAction, default=default, help=description)
        else:
            group.add_argument(f"--{option}", type=_scalar(kind), default=default, help=description)


def config_from(args: argparse.Namespace, config: type, names: Mapping[str, str] | None = None) -> Any:
    """Builds the config from parsed options; its own checks apply.

    Raises:
        ValueError: for a value that the config refuses, in terms of the options.
    """
    options = {field.name: (names or {}).get(field.name, field.name) for field in fields(config)}
    values = {name: getattr(args, option) for name, option in options.items() if hasattr(args, option)}
    optional = {field.name for field in fields(config) if field.default is None}
    return config(**{name: value for name, value in values.items() if value is not None or name in optional})


def given_options(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """Names of the options that the command line itself sets, defaults left out."""
    unset = argparse.Namespace(**{action.dest: _UNSET for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not _UNSET}


@contextmanager
def option_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turns a value that a part refuses at construction into the parser's own error: one line, exit status 2."""
    try:
        yield
    except USER_ERRORS:
        raise  # about a file, not an option
    except ValueError as error:
        parser.error(str(error))


def number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], float]:
    """An option type: a number of `kind` in [low, high], or above `low`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None
        if not (low < value if above else low <= value) or value > high or value != value:
            limit = f"{'>' if above else '>='} {low}" + (f" and <= {high}" if high != float("inf") else "")
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value

    return parse


def run_id(text: str) -> str:
    """An option type: the name of a run's folder."""
    if not RUN_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be letters, digits, '.', '_' or '-', got {text!r}")
    return text


def torch_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device called `name`; auto is a CUDA GPU where there is one, else the CPU.

    Of the processes that torchrun starts on a machine, each takes the GPU of its number for auto and cuda.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank() is not None:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--torch_device {name}: no such device; use auto, cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--torch_device {name}: {torch.cuda.device_count()} CUDA GPUs were found; use auto or cpu")
    return device


def run(main: Callable[[list[str] | None], Any]) -> None:
    """Runs a script's main. What the user can mend ends in one line and exit status 2, not in a traceback."""
    logging.basicConfig(level=logging.WARNING if _is_other() else logging.INFO, format="%(message)s")
    try:
        result = main(None)
        sys.exit(result if isinstance(result, int) else 0)
    except StoppedError as stopped:
        _say(str(stopped))
        sys.exit(stopped.exit_status)
    except USER_ERRORS as error:
        logging.getLogger(__name__).debug("", exc_info=True)
        _say(f"error: {_one_line(error)}")
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


_UNSET = object()


def _is_other() -> bool:
    """Whether this is one of several processes, and not the one that speaks."""
    return int(os.environ.get("RANK", "0")) > 0


def _say(line: str) -> None:
    """Tells the user why the script ends.

    What ends one of several processes mostly ends all, with the same line: the others wait for process 0 to say it and
    for torchrun to end them, and speak only when that does not happen.
    """
    if _is_other():
        time.sleep(3)
    print(line, file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split())


def _scalar(kind: Any) -> Callable[[str], Any]:
    """The type that reads an option's text: of `float | None`, float."""
    if get_origin(kind) in (Union, type(int | None)):
        return next(option for option in get_args(kind) if option is not type(None))
    return kind
