"""Which options a search draws, and from which values: a YAML file.

lr: {low: 1e-4, high: 1e-2, log: true}      numbers; whole ones where the option takes those; step: of a grid
weight_decay: [0, 1e-4, 1e-3]               one of these
augment:                                    of lists too
  - [time_roll]
  - [freq_mixstyle, time_roll]
model:                                      a choice that brings options of its own
  cp_mobile: {base_channels: [16, 24, 32]}
  tf_sepnet: {}
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from helpers.errors import UserError
from helpers.parts import Parts, chosen_parts
from helpers.recipes import RecipeError, check_recipe, read_recipe

SIMPLE = (str, int, float, bool, type(None))  # what a study keeps as it is
RANGE = {"low", "high", "log", "step"}


class SearchError(UserError, ValueError):
    """A search that cannot be begun or gone on with; one line that says why."""


def text_of(choice: Any) -> str:
    """How a choice is called in a study, which knows no lists."""
    return choice if isinstance(choice, str) else json.dumps(choice)


@dataclass(frozen=True)
class Option:
    """An option that is drawn, from a range or from choices.

    Args:
        name: of the option.
        choices: values; () where there is a range.
        low, high, log, step: of the range.
        below: further options that a choice brings, by the text of the choice.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    below: Mapping[str, tuple["Option", ...]] = field(default_factory=dict)

    def options_of(self, choice: Any) -> tuple["Option", ...]:
        """The further options that a choice brings."""
        return self.below.get(text_of(choice), ())


def read_space(path: Path) -> tuple[Option, ...]:
    """Reads a search space; the values are not looked at.

    Raises:
        SearchError: when it is none; OSError when it cannot be read.
    """
    try:
        content = read_recipe(path)
    except RecipeError as error:
        raise SearchError(str(error).replace("no recipe", "no search space")) from error
    if not content:
        raise SearchError(f"{path} names no options to search")
    return tuple(_options(content, path))


def _options(content: Mapping[str, Any], path: Path) -> Iterator[Option]:
    for name, value in content.items():
        if isinstance(value, list) and value:
            yield Option(name, tuple(value))
        elif isinstance(value, Mapping) and value.keys() >= {"low", "high"}:
            yield _range(name, value, path)
        elif isinstance(value, Mapping) and value and all(isinstance(one, Mapping | None) for one in value.values()):
            below = {text_of(choice): tuple(_options(more or {}, path)) for choice, more in value.items()}
            yield Option(name, tuple(value), below=below)
        else:
            raise SearchError(f"{path}: {name} must be a list of values, a range (low, high), or choices that bring "
                              f"options, got {value!r}")  # fmt: skip


def _range(name: str, value: Mapping[str, Any], path: Path) -> Option:
    numbers = [value[key] for key in ("low", "high", "step") if value.get(key) is not None]
    if others := value.keys() - RANGE:
        raise SearchError(f"{path}: the range of {name} has {', '.join(sorted(map(str, others)))}; known: low, high, "
                          "log, step")  # fmt: skip
    try:
        low, high = _number(value["low"]), _number(value["high"])
        step = None if value.get("step") is None else _number(value["step"])
    except (TypeError, ValueError) as error:
        raise SearchError(f"{path}: the range of {name} must be numbers, got {numbers}") from error
    log = value.get("log", False)
    if not low < high or (log and (low <= 0 or step is not None)) or (step is not None and step <= 0):
        raise SearchError(f"{path}: the range of {name} must have low < high, above 0 and without step where log, got "
                          f"{dict(value)}")  # fmt: skip
    return Option(name, (), low, high, bool(log), step)


def _number(value: Any) -> float:
    """YAML takes 1e-4 for a text."""
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return int(number) if number == int(number) and not (isinstance(value, str) and "." in value) else number


def check_space(
    space: tuple[Option, ...], recipe: Mapping[str, Any], make_parser: Callable[[Parts], argparse.ArgumentParser],
    path: Path,
) -> None:  # fmt: skip
    """Tries every value, beside the first choices of the others.

    Raises:
        SearchError: for an option that the script does not have with these parts, or a value that it does not take.
    """

    def first_of(options: tuple[Option, ...]) -> dict[str, Any]:
        values = {}
        for option in options:
            values[option.name] = option.choices[0] if option.choices else option.low
            if option.choices:
                values |= first_of(option.options_of(option.choices[0]))
        return values

    def attempt(values: Mapping[str, Any]) -> None:
        try:
            fitted(values, recipe, make_parser, path)
        except RecipeError as error:
            raise SearchError(str(error)) from error

    def walk(options: tuple[Option, ...], others: Mapping[str, Any]) -> None:
        for option in options:
            for value in option.choices or (option.low, option.high):
                below = option.options_of(value)
                values = {**others, **first_of(options), option.name: value}
                for name in {inner.name for own in option.below.values() for inner in own}:
                    values.pop(name, None)
                attempt(values | first_of(below))
                walk(below, values)

    walk(space, {})


def fitted(
    values: Mapping[str, Any], recipe: Mapping[str, Any], make_parser: Callable[[Parts], argparse.ArgumentParser],
    path: Path,
) -> dict[str, Any]:  # fmt: skip
    """The recipe of a trial: drawn values go first, and what the recipe says of parts that were not drawn goes.

    Raises:
        RecipeError: for an option or a value that does not fit.
    """
    both = {**recipe, **values}
    parser = make_parser(chosen_parts([], both))
    known = {action.dest for action in parser._actions}
    return check_recipe(parser, {name: value for name, value in both.items() if name in values or name in known}, path)


def draw(
    trial: Any, space: tuple[Option, ...], is_whole: Callable[[Option, Mapping[str, Any]], bool], prefix: str = "",
    above: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """Draws the options of an Optuna trial; those that a choice brings are called `<choice>.<option>` there.

    Args:
        is_whole: whether an option takes whole numbers alone, beside what has been drawn.
        above: drawn so far.
    """
    values: dict[str, Any] = {}
    for option in space:
        name = prefix + option.name
        if option.choices:
            known = {choice if isinstance(choice, SIMPLE) else text_of(choice): choice for choice in option.choices}
            choice = known[trial.suggest_categorical(name, [*known])]
            values[option.name] = choice
            values |= draw(trial, option.options_of(choice), is_whole, f"{choice}.", {**above, **values})
        elif is_whole(option, {**above, **values}):
            values[option.name] = trial.suggest_int(
                name, int(option.low), int(option.high), log=option.log, step=int(option.step or 1)
            )
        else:
            values[option.name] = trial.suggest_float(name, option.low, option.high, log=option.log, step=option.step)
    return values
