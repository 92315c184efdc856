"""Command lines: config dataclasses as option groups, and errors of the user as one line with exit status 2."""

import argparse
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn, TextIO, Union, get_args, get_origin, get_type_hints

import yaml

from datasets.files import ContentError
from helpers.distributed import end_process, is_loss, leave_processes
from helpers.errors import StoppedError, UserError
from helpers.start import THRESHOLDS
from models.bounds import MOST

USAGE_ERROR = 2
# What the user can mend; each is one line that says how.
USER_ERRORS = (UserError, OSError)
# How torch and numpy begin to say that memory is short; neither has a class of errors for it on a CPU.
OUT_OF_MEMORY = re.compile(r"can't allocate memory|Unable to allocate|out of memory|Cannot allocate memory")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, OnOff):
            return f"--[no-]{action.dest} [True|False]"
        return super()._format_action_invocation(action)


class OnOff(argparse.Action):
    """An option that is on or off: `--x` or `--no-x`, and `--x=True` or `--x=False` as sweep agents write it."""

    WORDS = MappingProxyType({"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False})

    def __init__(self, option_strings: list[str], dest: str, default: bool | None = False, help: str | None = None):
        names = [*option_strings, *(f"--no-{name.removeprefix('--')}" for name in option_strings)]
        super().__init__(names, dest, nargs="?", default=default, help=help)

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        is_on = not option_string.startswith("--no-")
        if value is not None and not is_on:
            raise argparse.ArgumentError(self, f"takes no value, got {value!r}")
        if value is not None and value.lower() not in self.WORDS:
            raise argparse.ArgumentError(self, f"is True or False, got {value!r}")
        setattr(namespace, self.dest, is_on if value is None else self.WORDS[value.lower()])


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an option; the usage of sixty options would bury it."""

    reads: Collection[str] | None = None  # options that it takes from a recipe, see `recipes.check_recipe`; None: all

    def __init__(self, description: str | None = None, **options: Any):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and "" in arg_strings:  # an unset shell variable: never taken for "no such option"
            raise argparse.ArgumentError(action, "is empty: name something, or leave the option away")
        if any("\0" in text for text in arg_strings):  # no file can be called so
            raise argparse.ArgumentError(action, f"holds a NUL character: {arg_strings}")
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
        kind, description, *_ = get_args(hints[field.name])
        option = (names or {}).get(field.name, field.name)
        default = None if field.default is MISSING else field.default
        if get_origin(kind) is Literal:
            group.add_argument(f"--{option}", choices=get_args(kind), default=default, help=description)
        elif kind is bool:
            group.add_argument(f"--{option}", action=OnOff, default=default, help=description)
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


def check_sweep(parser: argparse.ArgumentParser, given: set[str]) -> None:
    """Ends with the parser's error when a sweep of W&B turned an option off and its command line does not say so.

    With `${args_no_boolean_flags}` an agent leaves out what is false, and an option that is on by default would stay on
    while the sweep's table says off.
    """
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path or not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            chosen = yaml.safe_load(file)
    except (yaml.YAMLError, ValueError) as error:
        parser.error(f"WANDB_SWEEP_PARAM_PATH names {path}, which is no YAML: {' '.join(str(error).split())}")
    for action in parser._actions:
        entry = chosen.get(action.dest) if isinstance(chosen, dict) else None
        is_off = isinstance(entry, dict) and entry.get("value") is False
        if isinstance(action, OnOff) and action.default is True and is_off and action.dest not in given:
            parser.error(
                f"the sweep turned {action.dest} off, but the command line does not say so: take ${{args}} instead of "
                "${args_no_boolean_flags}"
            )


def check_saved(parser: argparse.ArgumentParser, saved: Mapping[str, Any]) -> None:
    """Checks the options that a run stored against the parser's own.

    Raises:
        ContentError: naming the first that the parser would not accept.
    """
    for action in parser._actions:
        value = saved.get(action.dest)
        if value is not None and typed(action, value) != value:
            raise ContentError(f"{action.dest} is {value!r}")


def typed(action: argparse.Action, value: Any) -> Any:
    """The value of an option in a file, as the option's own type has it.

    Raises:
        ContentError: when the option does not take it.
    """
    if value is None and action.default is None:
        return None
    if action.nargs in ("+", "*"):
        if not isinstance(value, list) or (action.nargs == "+" and not value):
            raise ContentError(f"{action.dest} is {value!r}, it must be a list")
        return [_typed_entry(action, entry) for entry in value]
    return _typed_entry(action, value)


def _typed_entry(action: argparse.Action, entry: Any) -> Any:
    if isinstance(action, OnOff):
        if not isinstance(entry, bool):
            raise ContentError(f"{action.dest} is {entry!r}, it must be true or false")
        return entry
    choices = None if action.choices is None else list(action.choices)
    if isinstance(entry, bool) and choices and {"yes", "no"} <= set(choices):
        entry = "yes" if entry else "no"  # what YAML makes of the words
    if isinstance(entry, bool) or not isinstance(entry, str | int | float):
        raise ContentError(f"{action.dest} is {entry!r}")
    try:
        result = str(entry) if action.type is None else action.type(str(entry))
    except argparse.ArgumentTypeError as error:
        raise ContentError(f"{action.dest} is {entry!r}, it {error}") from None
    except (ValueError, OverflowError):
        raise ContentError(f"{action.dest} is {entry!r}") from None
    if choices is not None and result not in choices:
        raise ContentError(f"{action.dest} is {entry!r}, it must be one of {', '.join(map(str, choices))}")
    return result


def number(
    kind: type, low: float, high: float = MOST, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """An option type: a number of `kind` in [low, high], or above `low`, or below `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no {'whole ' if kind is int else ''}number") from None
        if not (low < value if above else low <= value) or not (value < high if below else value <= high):
            raise argparse.ArgumentTypeError(
                f"must be {'>' if above else '>='} {low} and {'<' if below else '<='} {high}, got {text[:40]}"
            )
        return value

    return parse


class UnreadStream:
    """A standard stream whose reader may leave (`| head -1`): from then on what is written is dropped, no error."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._or_drop(self._stream.write, text)

    def flush(self) -> None:
        self._or_drop(self._stream.flush)

    def _or_drop(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except BrokenPipeError:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self._stream.fileno())  # takes what is buffered, too
            return call(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[list[str] | None], Any]) -> None:
    """Runs a script's main. What the user can mend ends in one line and exit status 2, not in a traceback."""
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    # Of several processes, one prints.
    sys.stdout = open(os.devnull, "w", encoding="utf-8") if _is_other() else UnreadStream(sys.stdout)
    sys.stderr = UnreadStream(sys.stderr)
    logging.basicConfig(level=logging.WARNING if _is_other() else logging.INFO, format="%(message)s")
    try:
        result = main(None)
        leave_processes()
        sys.stdout.flush()
        end_process(result if isinstance(result, int) else 0)
    except StoppedError as stopped:
        _say(str(stopped))
        end_process(stopped.exit_status)
    except USER_ERRORS as error:
        logging.getLogger(__name__).debug("", exc_info=True)
        _say(f"error: {_one_line(error)}")
        sys.exit(USAGE_ERROR)
    except (RuntimeError, MemoryError) as error:
        if is_loss(error):
            logging.getLogger(__name__).debug("", exc_info=True)
            _say("error: another process of this run has ended: its own message says why, see above or on its machine")
            sys.exit(1)
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        logging.getLogger(__name__).debug("", exc_info=True)
        _say("error: out of memory: a smaller --batch_size, shorter clips or a smaller network need less")
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


class _Unset(list):
    """Stands for options that are not given; a list, so that an action may append to a copy of it."""


_UNSET = _Unset()


def _is_other() -> bool:
    """Whether this is one of several processes, and not the one that speaks."""
    rank = os.environ.get("RANK", "0")
    return rank.isdecimal() and int(rank) > 0


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
