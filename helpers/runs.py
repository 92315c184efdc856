"""Runs in their folders, <project>/<id>: their options, their checkpoints, going on with them, saving on the way."""

import argparse
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from helpers import cli
from helpers.checkpoint import CheckpointError
from helpers.loop import LoopState, StoppedError, StopSignal
from helpers.options import FREE_ON_RESUME
from helpers.resources import PUBLISHED_RUN, published_checkpoint


def known_runs(project: str) -> str:
    """The ids of a project's runs, for messages."""
    found = {path.parent.name for path in Path(project).glob("*/checkpoints")}
    return ", ".join(sorted(found)) or "none"


def parse_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """Parsed options and the names of those given explicitly; a resumed run takes its other options from its folder.

    Raises:
        CheckpointError: for an unknown or damaged run.
    """
    args, given = parser.parse_args(argv), cli.given_options(parser, argv)
    if args.resume:
        path = Path(args.project_name) / args.resume / "options.json"
        if not path.is_file():
            raise CheckpointError(
                f"no run {args.resume} in {args.project_name}; there is {known_runs(args.project_name)}"
            )
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}): start the run again") from error
        changed = {name for name in given - FREE_ON_RESUME if getattr(args, name) != saved.get(name)}
        if changed:
            parser.error(f"{', '.join(f'--{name}' for name in sorted(changed))} cannot change when a run is resumed")
        parser.set_defaults(**{name: value for name, value in saved.items() if name in vars(args)})
        args = parser.parse_args(argv)
        given |= {name for name in ("kd_lambda", "teacher_logits") if name in saved.get("given", ())}
    args.given = sorted(given)
    return args, given


def last_checkpoint(project: str, run: str) -> Path:
    """What a run resumes from.

    Raises:
        CheckpointError: when it has not saved yet.
    """
    path = Path(project) / run / "checkpoints" / "last.pt"
    if not path.is_file():
        raise CheckpointError(f"run {run} has no {path}: it stopped before its first checkpoint, start it again")
    return path


def trained_checkpoint(project: str, run: str) -> Path | None:
    """The checkpoint of a finished or published run: our last.pt, else the .ckpt file of the latest epoch."""
    folder = Path(project) / run / "checkpoints"
    if (folder / "last.pt").is_file():
        return folder / "last.pt"

    def epoch(path: Path) -> int:  # numbers, not text: epoch=149 is later than epoch=99
        match = re.search(r"epoch=(\d+)", path.name)
        return int(match[1]) if match else -1

    return max(folder.glob("*.ckpt"), key=epoch, default=None)


def source_checkpoint(project: str, run: str | None, checkpoint: str | None) -> Path:
    """The checkpoint that --wandb_id or --checkpoint names; the published one is fetched when it is not there.

    Raises:
        CheckpointError: when not exactly one is named, or there is no such run.
    """
    there_is = f"runs in {project}: {known_runs(project)}; published: {PUBLISHED_RUN}"
    if (run is None) == (checkpoint is None):
        raise CheckpointError(f"name a run with --wandb_id or a file with --checkpoint, one of them; {there_is}")
    if checkpoint is not None:
        return Path(checkpoint)
    found = trained_checkpoint(project, run)
    if found is None and run == PUBLISHED_RUN:
        return published_checkpoint()
    if found is None:
        raise CheckpointError(f"no run {run} with a checkpoint in {project}; {there_is}")
    return found


class Autosave:
    """Called after every step: saves when it is time, or when the run is asked to stop, and then leaves.

    Raises (when called):
        StoppedError: after saving, with the command that goes on.
        NonFiniteLossError: instead of saving a network that is lost.
    """

    def __init__(
        self, save: Callable[[], None], minutes: float, stop: StopSignal, state: LoopState,
        optimizer: torch.optim.Optimizer, resume_command: str,
    ):  # fmt: skip
        self.save, self.seconds, self.stop, self.state = save, 60 * minutes, stop, state
        self.optimizer, self.resume_command = optimizer, resume_command
        self.saved_at = time.monotonic()

    def __call__(self) -> None:
        if self.stop.number is None and time.monotonic() - self.saved_at < self.seconds:
            return
        self.state.check_finite(self.optimizer.param_groups[0]["lr"])
        self.save()
        self.saved_at = time.monotonic()
        if self.stop.number is not None:
            raise StoppedError(
                f"stopped by {signal.Signals(self.stop.number).name} in epoch {self.state.epoch} after "
                f"{self.state.step} steps, all saved; resume with: {self.resume_command}",
                exit_status=128 + self.stop.number,
            )
