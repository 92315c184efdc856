"""Meta information of a system: what only its authors know, from their file, and what is measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from helpers.errors import UserError
from helpers.submission.check import check_meta
from helpers.submission.rules import Rules

TEMPLATE = """\
# What run_submission.py cannot know of a system (--about FILE). It adds label, input_sampling_rate, acoustic_features,
# framework, complexity and scores; what stands here under the same name goes first.
submission:
  name: "..."                     # of the system, in words
  abbreviation: "..."             # at most 10 characters
  authors:                        # exactly one is corresponding
    - lastname: "..."
      firstname: "..."
      email: "..."
      corresponding: true
      affiliation:
        abbreviation: "..."
        institute: "..."
        location: "..."           # city, country
system:
  description:
    data_augmentation: "..."      # such as: freq-mixstyle, time rolling, device impulse responses
    machine_learning_method: "..."  # such as: CNN
    external_data_usage: null     # such as: pre-trained model, directly or in a teacher
    complexity_management: "..."  # such as: precision_16, knowledge distillation
    pipeline: "..."               # such as: pretraining, training, knowledge distillation
{description}{energy}  external_datasets: []           # name, url, total_audio_length (minutes) of each
  source_code: null               # address
"""
ENERGY = """\
  energy_consumption:             # kWh, measured with codecarbon on one machine
    training: "..."
    inference: "..."
    baseline_inference: "..."
"""
PLACEHOLDER = "..."
LABEL_EXAMPLE = "Doe_TU_task1_1"
MEASURED = ("input_sampling_rate", "acoustic_features", "framework")


class AboutError(UserError, ValueError):
    """The authors' file is missing, unreadable, or leaves something open; one line."""


def template(rules: Rules) -> str:
    """The file for authors to fill in."""
    more = [key for key in rules.description if key not in MEASURED and f"    {key}:" not in TEMPLATE]
    description = "".join(f"    {key}: null\n" for key in more)
    return TEMPLATE.format(description=description, energy=ENERGY if rules.has_energy else "")


def read_about(path: Path, rules: Rules) -> dict[str, Any]:
    """What the authors have written.

    Raises:
        AboutError: when it cannot be read, something that the rules want is missing, or still as in the template.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AboutError(f"{path} is missing: `run_submission.py --print_about` writes one to fill in") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AboutError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("submission", "system")):
        raise AboutError(f"{path} must have the blocks submission and system, as --print_about writes them")
    if opened := _placeholders(content):
        raise AboutError(f"{path}: fill in {', '.join(opened)}")
    for name in ("description", "complexity"):
        if not isinstance(content["system"].get(name, {}), dict | None):
            raise AboutError(f"{path}: system.{name} must hold entries by name")
    # What is measured stands in for itself, so that what authors have left out is told before anything is.
    blocks = {block: {} for block in rules.blocks}
    measured = dict.fromkeys(MEASURED, ""), dict.fromkeys(rules.complexity, 0)
    if problems := check_meta(meta_of(content, rules, LABEL_EXAMPLE, *measured, blocks), rules).problems:
        raise AboutError(f"{path}: {'; '.join(problems)}")
    return content


def _placeholders(value: Any, where: str = "") -> list[str]:
    if isinstance(value, dict):
        return [name for key, item in value.items() for name in _placeholders(item, f"{where}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [name for i, item in enumerate(value) for name in _placeholders(item, f"{where}[{i}]")]
    return [where] if value == PLACEHOLDER else []


def meta_of(
    about: Mapping[str, Any], rules: Rules, label: str, known: Mapping[str, Any], complexity: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The meta information of a system, ready for its YAML file.

    Args:
        known: of `system.description`.
        complexity: of `system.complexity`; what the edition does not ask for is left out.
        scores: of the development set; by block where there are several.
    """
    system = dict(about["system"])
    description = dict(known) | dict(system.pop("description", None) or {})
    cost = dict(complexity) | dict(system.pop("complexity", None) or {})
    return {
        "submission": {"label": label, **about["submission"]},
        "system": {
            "description": description,
            "complexity": {key: value for key, value in cost.items() if key in rules.complexity},
            **system,
        },
        "results": {"development_dataset": dict(scores)},
    }
