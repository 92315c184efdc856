"""Tables of recipes and published weights in README.md, recipes/ and docs/, and recipes' sizes, are made from data.

python -m tests.test_recipe_table      writes all of it anew
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import run_training
from helpers import parts
from helpers.complexity import measure_second
from helpers.recipes import parse, read_recipe
from models import MODELS, default_frontend
from models.published import PUBLISHED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "recipes/README.md"
RESULTS = ROOT / "benchmarks/results/recipes.csv"
README, WEIGHTS = ROOT / "README.md", ROOT / "docs/weights.md"
WEIGHTS_HEAD = """# Published weights

Every script that takes a checkpoint takes these names: the file is fetched from its authors, once, compared with its
SHA-256, and loaded strictly. `cpjku2023` stands for `c0a7nzin`. Accuracies are as their authors state them; where a
repository has no licence, use is to be settled with its authors. A name with a device at its end (`_s1`) is the network
for that recording device, of a file that holds several.
"""
SIZES: dict[str, str] = {}
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
HEAD = """# Recipes

Published systems as options of `run_training.py`: `--config recipes/NAME.yaml`, which the command line overrides. Those
that start from any trained network are for `run_qat.py` or, `dcase25_devices`, for `run_device_training.py`. Each file
says what it is and where it departs from its source. Parameters are those that are trained, MACs those of one second as
the challenge counts them, and with attention, which its counter leaves out. What was published was mostly selected on
TAU22's test part, which nothing here does; accuracies are in percent.

The last column shows that each recipe learns: test accuracy after so many epochs on the embedded data set, where chance
is 10 and whose numbers say nothing about TAU22 (`python benchmarks/recipes.py`; the transformers have two layers there
and start from nothing).

| recipe | network | parameters | million MACs | published | generated sounds |
|---|---|---|---|---|---|
"""


def header(path: Path) -> dict[str, str]:
    """What the comment at the head of a recipe says: about, and its fields Source, Published and Size."""
    found, name = {"about": ""}, "about"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if match := re.match("(Source|Published|Size): ", text):
            name, text = match[1], text.removeprefix(match[0])
            found[name] = ""
        found[name] = f"{found[name]} {text}".strip()
    return found


def size(path: Path) -> str:
    """Parameters and MACs of the network of a recipe; that of one that quantizes is another's."""
    if "model" not in read_recipe(path):
        return "that of the network it starts from"
    args = parse(run_training.make_parser, ["--config", str(path), "--n_classes", "10"])[1]
    model, frontend = parts.model_config(args), parts.build_frontend(args)
    if (key := repr((args.model, model, frontend.config))) not in SIZES:  # the transformers take seconds
        report = measure_second(MODELS[args.model][1](model), frontend).trained
        macs = max(report.macs, report.arithmetic_macs)
        SIZES[key] = f"{report.n_parameters:,} parameters, {macs / 1e6:.2f} million MACs"
    return SIZES[key]


def row(path: Path, stated: Mapping[str, str]) -> str:
    words = re.findall(r"[\d,.]*\d", stated["Size"])
    cells = [f"[{path.stem}]({path.name})", read_recipe(path).get("model", "any"), *(words[:2] or ["", ""])]
    return f"| {' | '.join([*cells, stated.get('Published', ''), learned(path.stem)])} |\n"


def learned(recipe: str) -> str:
    """What benchmarks/recipes.py has noted of a recipe."""
    with RESULTS.open(encoding="utf-8") as file:
        line = next(line for line in csv.DictReader(file) if line["recipe"] == recipe)
    epochs = f" ({line['epochs']} epochs)" if int(line["epochs"]) else ""
    return f"{line['test accuracy']}{epochs}"


def table() -> str:
    return HEAD + "".join(row(path, header(path)) for path in RECIPES)


def systems() -> str:
    """The table in README.md, of recipes that say what they are about."""
    lines = ["| recipe | network | parameters | million MACs | published accuracy (%) |", "|---|---|---|---|---|"]
    for path in RECIPES:
        stated = header(path)
        words = re.findall(r"[\d,.]*\d", stated["Size"])
        if len(words) == 2:
            cells = [
                f"[{path.stem}](recipes/{path.name})",
                read_recipe(path)["model"],
                *words,
                stated.get("Published", ""),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def weights() -> str:
    """docs/weights.md."""
    lines = [WEIGHTS_HEAD, "| name | network | front end | published accuracy | licence |", "|---|---|---|---|---|"]
    for name, one in PUBLISHED.items():
        frontend = (one.frontend or default_frontend(one.architecture))[0]
        cells = [f"[{name}]({one.url})", one.architecture, frontend, one.accuracy, one.licence or "none stated"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_systems(text: str) -> str:
    """README.md with the table in its place."""
    before, rest = text.split("<!-- systems -->\n")
    return f"{before}<!-- systems -->\n{systems()}\n<!-- end of systems -->{rest.split('<!-- end of systems -->')[1]}"


def test_the_readmes_table_is_that_of_the_recipes():
    text = README.read_text(encoding="utf-8")
    assert text == with_systems(text), "python -m tests.test_recipe_table writes it"


def test_the_table_of_weights_is_that_of_the_published_networks():
    assert WEIGHTS.read_text(encoding="utf-8") == weights(), "python -m tests.test_recipe_table writes it"


def test_the_table_is_that_of_the_recipes():
    assert TABLE.read_text(encoding="utf-8") == table(), "python -m tests.test_recipe_table writes it"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_where_it_is_from_and_what_it_costs(path):
    stated = header(path)
    assert stated["about"] and "http" in stated["Source"]
    assert stated["Size"] == size(path)
    assert all(len(line) <= 120 for line in path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    for one in RECIPES:
        lines = one.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if not line.startswith("# Size: ")]
        at = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        one.write_text("\n".join([*lines[:at], f"# Size: {size(one)}", *lines[at:], ""]), encoding="utf-8")
    TABLE.write_text(table(), encoding="utf-8")
    WEIGHTS.write_text(weights(), encoding="utf-8")
    README.write_text(with_systems(README.read_text(encoding="utf-8")), encoding="utf-8")
