"""The command line is a promise: tests/golden/options.txt lists every option of every script with its default.

A change of an option is a change of that file, for everybody to see:

  python -m tests.test_options      writes it anew

A line is: script or part, option, kind or choices, default. `*` marks the options of the published scripts, which keep
their names and meanings.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import run_dataset
import run_device_training
import run_evaluation
import run_export
import run_qat
import run_search
import run_submission
import run_teacher_logits
import run_teacher_validation
import run_training
from helpers.augment import AUGMENTATIONS
from helpers.cli import OnOff
from helpers.losses import LOSSES
from helpers.options import run_id
from helpers.parts import STUDENT
from helpers.recipes import add_recipe_options
from helpers.schedule import SCHEDULES
from models import FRONTENDS, MODELS, default_frontend

LIST = Path(__file__).parent / "golden" / "options.txt"
SCRIPTS = (
    run_evaluation,
    run_training,
    run_qat,
    run_device_training,
    run_export,
    run_teacher_validation,
    run_teacher_logits,
    run_submission,
    run_search,
)
# Flags of the published scripts, from their specification.
PUBLISHED = """
    project_name experiment_name num_workers cache_path n_classes in_channels base_channels channels_multiplier
    expansion_rate n_epochs batch_size mixstyle_p mixstyle_alpha weight_decay roll dir_prob temperature kd_lambda lr
    warm_up_len ramp_down_start ramp_down_len last_lr_value resample_rate window_size hop_size n_fft n_mels freqm timem
    fmin fmax fmin_aug_range fmax_aug_range wandb_id freeze_params_epochs model_name arch input_fdim s_patchout_t
    s_patchout_f
""".split()


def kind_of(action: argparse.Action) -> str:
    if isinstance(action, OnOff):
        kind = "on/off"
    elif action.choices is not None:
        kind = "|".join(map(str, action.choices))
    else:
        kind = {None: "text", int: "int", float: "float", run_id: "text"}.get(action.type, "number")
    return f"{kind} ..." if action.nargs in ("+", "*") else kind


def lines_of(title: str, parser: argparse.ArgumentParser) -> dict[str, str]:
    lines = {}
    for action in parser._actions:
        if action.dest not in ("help", "command"):
            mark = "*" if action.dest in PUBLISHED else " "
            default = "required" if action.required else action.default
            lines[action.dest] = f"{mark} {title:24} --{action.dest:32} {kind_of(action):12} {default}"
    return lines


def options() -> Iterator[str]:
    """The lines of all scripts as they start, and what other parts bring along to run_training.py."""
    for script in SCRIPTS:
        parser = script.make_parser()
        add_recipe_options(parser)
        yield from lines_of(Path(script.__file__).name, parser).values()
    training = lines_of("", run_training.make_parser())
    (commands,) = (action for action in run_dataset.make_parser()._actions if action.dest == "command")
    for name, parser in commands.choices.items():
        add_recipe_options(parser)
        lines = lines_of(f"run_dataset.py {name}", parser)
        if name == "preview":  # it has all options of run_training.py
            lines = {option: line for option, line in lines.items() if option not in training}
        yield from lines.values()
    common = lines_of("", run_training.make_parser())
    choices = [("model", name, replace(STUDENT, model=name, frontend=default_frontend(name)[0])) for name in MODELS]
    choices += [("frontend", name, replace(STUDENT, frontend=name)) for name in FRONTENDS]
    choices += [("loss", name, replace(STUDENT, loss=name)) for name in LOSSES]
    choices += [("schedule", name, replace(STUDENT, schedule=name)) for name in SCHEDULES]
    choices += [("augment", name, replace(STUDENT, augment=(name,))) for name in AUGMENTATIONS]
    for kind, name, parts in choices:
        own = lines_of("", run_training.make_parser(parts))
        title = f"--{kind} {name}"
        for option, line in own.items():
            if common.get(option) != line and option != kind:
                yield line.replace(f"{'':24}", f"{title:24}", 1)


def test_options_and_defaults_are_those_of_the_list():
    assert LIST.read_text(encoding="utf-8").splitlines() == list(options()), "python -m tests.test_options writes it"


def test_no_two_parts_that_go_together_have_an_option_in_common():
    """argparse refuses an option that is there twice."""
    for name in MODELS:
        for frontend in FRONTENDS:
            run_training.make_parser(replace(STUDENT, model=name, frontend=frontend, augment=tuple(AUGMENTATIONS)))


def test_published_flags_are_there(shared):
    text = shared("reference/cpjku_dcase23.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    flags = {row[0].strip("`-") for row in rows if row[0].startswith("`--")}
    there = {line.split(" --", 1)[1].split()[0] for line in options() if line.startswith("*")}
    assert len(flags) > 35 and flags <= there


if __name__ == "__main__":
    LIST.write_text("\n".join(options()) + "\n", encoding="utf-8")
