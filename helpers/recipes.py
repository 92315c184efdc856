"""Recipes: options of a script in a flat YAML file, `name: value`, that a command line overrides.

A recipe is read before the parser is made, since it may choose the parts whose options there are, and checked against
it. Every run stores its own, from which the same run can be started again.
"""

import argparse
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from datasets.files import ContentError, replacing
from helpers import cli
from helpers.errors import UserError
from helpers.parts import Parts, chosen_parts

log = logging.getLogger(__name__)

# What is said anew every time: it says where a run is kept or how it is looked at, not what it computes.
NOT_KEPT = {"config", "print_config", "resume", "resume_anyway", "run_id", "dry_run", "given", "script"}


class RecipeError(UserError, ValueError):
    """A recipe that cannot be read or does not fit the script; one line with the file, the option and the nearest."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} stands there twice")
        return super().construct_mapping(node, deep)


def script_of(recipe: Mapping[str, Any]) -> str:
    """The script that a recipe is for: one that names a network trains it, others start from a trained one."""
    if "model" in recipe:
        return "run_training.py"
    return "run_device_training.py" if "tune" in recipe else "run_qat.py"


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--config", metavar="FILE", help="YAML file of options, which the command line overrides")
    recipe.add_argument("--print_config", action=cli.OnOff, help="print the options in effect as such a file, and stop")


def read_recipe(path: Path | str) -> dict[str, Any]:
    """The options of a recipe as they stand there.

    Raises:
        RecipeError: when it is no flat YAML file; OSError when it cannot be read.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise RecipeError(f"{path} is no recipe: it must hold lines of `option: value`")
    return dict(content)


def check_recipe(parser: argparse.ArgumentParser, recipe: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """The options of a recipe, of the types that they have.

    Args:
        parser: of the parts that the recipe chooses. Where it has `reads`, names of options, the recipe may be that of
            another script: its other lines are passed over.

    Raises:
        RecipeError: for an option that the script does not have, or a value that it does not take.
    """
    known = {action.dest: action for action in parser._actions if action.dest not in {"help", *NOT_KEPT}}
    reads = getattr(parser, "reads", None)
    if reads is not None:
        if others := [name for name in recipe if name not in known]:
            log.info("%s: of no use here: %s", path, ", ".join(others))
        recipe = {name: value for name, value in recipe.items() if name in reads}
    values = {}
    for name, value in recipe.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f", the nearest is {nearest[0]}" if nearest else " (--help lists all)"
            raise RecipeError(f"{path}: there is no option {name}{hint}")
        try:
            values[name] = cli.typed(known[name], value)
        except ContentError as error:
            raise RecipeError(f"{path}: {error}") from error
    return values


def set_defaults(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> None:
    """Makes values the defaults of the options that there are; the command line may have chosen other parts."""
    for action in parser._actions:
        if action.dest in values:
            action.required = False
            action.default = values[action.dest]


def parse(
    make_parser: Callable[[Parts], argparse.ArgumentParser], argv: Sequence[str], saved: Mapping[str, Any] | None = None
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser for the chosen parts, and the options: of the command line, else of the recipe, else the defaults.

    `args.given` names those of the command line. With --print_config it prints the recipe of these options and ends.

    Args:
        make_parser: from the parts to the script's parser.
        saved: options of a run to resume; they choose the parts, where the command line does not.

    Raises:
        RecipeError: for a recipe that does not fit.
    """
    early = cli.Parser(add_help=False)
    early.add_argument("--config")
    path = early.parse_known_args(argv)[0].config
    recipe = {} if path is None else read_recipe(path)
    if path is not None:
        recipe = check_recipe(_of_command(make_parser(chosen_parts([], recipe)), argv)[0], recipe, path)
    parser = make_parser(chosen_parts(argv, saved if saved is not None else recipe))
    target, own_argv = _of_command(parser, argv)
    add_recipe_options(target)
    set_defaults(target, recipe)
    args = parser.parse_args(argv)
    args.given = sorted(cli.given_options(target, own_argv))
    if args.print_config:
        print(recipe_text(target, args), end="")
        parser.exit()
    return parser, args


def _of_command(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser of the command that a command line names, where a script has several, and what is behind its name."""
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    choices = commands[0].choices if commands else {}
    place = next((i for i, word in enumerate(argv) if word in choices), None)
    return (parser, argv) if place is None else (choices[argv[place]], argv[place + 1 :])


def recipe_text(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The options in effect as a recipe, in the order and under the titles of --help."""
    lines = [f"# python {parser.prog} --config THIS_FILE"]
    for group in parser._action_groups:
        names = [action.dest for action in group._group_actions if action.dest not in {"help", *NOT_KEPT}]
        names = [name for name in names if hasattr(args, name)]
        if names:
            lines += ["", f"# {group.title}"]
            lines += [f"{name}: {_yaml(getattr(args, name))}" for name in names]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def keep_recipe(folder: Path, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stores the recipe of a run in its folder."""
    with replacing(folder / "config.yaml") as file:
        file.write(recipe_text(parser, args))
