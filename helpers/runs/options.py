"""The options of a run: of its command line and recipe, or its own when it is resumed."""

import argparse
import logging
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.files import ContentError, check_content, read_json
from helpers import cli, recipes
from helpers.checkpoints.checkpoint import CheckpointError
from helpers.distributed import launched_as, main_decides, recall
from helpers.parts import Parts
from helpers.runs.folder import known_runs

log = logging.getLogger(__name__)

# Of a run that diverged.
REMEDIES = ("lr", "precision")
# What a resumed run may be given anew: it decides where the run goes on or how far, not what it computes.
FREE_ON_RESUME = {
    "resume", "n_epochs", "num_workers", "cache_path", "dataset_dir", "dirs_path", "teacher_logits", "data_on_device",
    "save_minutes", "logger", "project_name", "run_id", "enforce_limits", "resume_anyway", "print_config",
}  # fmt: skip
# Scripts of older versions -> the one that goes on with their runs, and what their options are called there.
FOLLOWS = {"run_teacher_training.py": ("run_training.py", {"teacher": "model"})}


def parse_run_options(
    make_parser: Callable[[Parts], argparse.ArgumentParser], argv: Sequence[str], changeable: Collection[str] = REMEDIES
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser and the options as `recipes.parse` gives them; a resumed run has its own for all that are not given.

    Processes that torchrun starts again after a failure resume the run that they had begun.

    Args:
        changeable: options that a resumed run may be given anew, and keeps from then on.

    Raises:
        CheckpointError: for an unknown or damaged run; RecipeError for a recipe that does not fit.
    """
    argv = list(argv)
    project, run, config, stays = _asked_for(make_parser, argv)
    if run is not None and config is not None:
        make_parser(Parts()).error("--config means nothing with --resume: a run goes on with its own options")
    if not stays and run is None and (begun := main_decides("run to go on with", lambda: _begun(project))):
        argv, run = [*argv, "--resume", begun], begun
        log.info("run %s goes on after a failure", begun)
    saved = None if run is None else _saved_options(project, run, make_parser(Parts()).prog)
    parser, args = recipes.parse(make_parser, argv, saved)
    cli.check_sweep(parser, set(args.given))
    if saved is not None:
        args = _resumed(parser, args, argv, saved, changeable)
    args.script = parser.prog
    return parser, args


def _asked_for(make_parser: Callable, argv: Sequence[str]) -> tuple[str, str | None, str | None, bool]:
    """Project, run to resume, recipe, and whether the command line only asks for something to be shown."""
    early = cli.Parser(add_help=False)
    early.add_argument("--project_name", default=make_parser(Parts()).get_default("project_name"))
    early.add_argument("--resume")
    early.add_argument("--config")
    for name in ("--dry_run", "--print_config"):
        early.add_argument(name, action=cli.OnOff)
    early.add_argument("-h", "--help", action="store_true")
    args, _ = early.parse_known_args(argv)
    return args.project_name, args.resume, args.config, args.dry_run or args.print_config or args.help


def _saved_options(project: str, run: str, script: str) -> dict[str, Any]:
    """The options in the folder of a run, under today's names.

    Raises:
        CheckpointError: for an unknown or damaged run, or one of another script.
    """
    path = Path(project) / run / "options.json"
    if not path.is_file():
        several = "; all machines need the same folder" if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else ""
        raise CheckpointError(f"no run {run} in {project}; there is {known_runs(project)}{several}")
    try:
        saved = read_json(path)
        check_content(saved, {"script?": str, "given?": [str]})
    except ContentError as error:
        raise CheckpointError(f"{path} is damaged ({error}): start the run again") from error
    own, names = FOLLOWS.get(saved.get("script"), (saved.get("script", script), {}))
    if own != script:
        raise CheckpointError(f"run {run} is one of {own}: {resume_command(own, project, run)}")
    return {names.get(name, name): value for name, value in saved.items()}


def _resumed(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str], saved: Mapping[str, Any],
    changeable: Collection[str],
) -> argparse.Namespace:  # fmt: skip
    """The options of a run that goes on; ends with the parser's error for one that cannot change."""
    path = Path(args.project_name) / args.resume / "options.json"
    try:
        cli.check_saved(parser, saved)
    except ContentError as error:
        raise CheckpointError(f"{path} is damaged ({error}): start the run again") from error
    changed = {
        name for name in set(args.given) - FREE_ON_RESUME - set(changeable) if getattr(args, name) != saved.get(name)
    }
    if changed:
        parser.error(f"{', '.join(f'--{name}' for name in sorted(changed))} cannot change when a run is resumed")
    parser.set_defaults(**{name: value for name, value in saved.items() if name in vars(args)})
    given = {*args.given, *({"kd_lambda", "teacher_logits"} & set(saved.get("given", ())))}
    args = parser.parse_args(argv)
    args.given = sorted(given)
    return args


def _begun(project: str) -> str:
    """The run that the same torchrun command began before one of its processes failed, once it has a checkpoint."""
    run = recall("run")
    return run if run and (Path(project) / run / "checkpoints" / "last.pt").is_file() else ""


def resume_command(script: str, project: str, run: str) -> str:
    """What the user types to go on with a run, with as many processes as now."""
    command, launched = ["python", script], launched_as()
    if launched is not None and (launched[1] > 1 or "TORCHELASTIC_RUN_ID" in os.environ):
        machines, n_local = ["--standalone"], os.environ.get("LOCAL_WORLD_SIZE", launched[1])
        if (n_machines := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":
            machines = [f"--nnodes={n_machines}", "--rdzv_backend=c10d", "--rdzv_endpoint=HOST:PORT"]
        n_restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        restarts = [] if n_restarts == "0" else [f"--max_restarts={n_restarts}"]
        command = ["torchrun", *machines, f"--nproc_per_node={n_local}", *restarts, script]
    return shlex.join([*command, "--project_name", project, "--resume", run])
