"""Runs in their folders, <project>/<id>: their options, their checkpoints, going on with them, saving on the way."""

import argparse
import logging
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets.files import ContentError, check_content, locked, read_json
from datasets.waveforms import Clips
from helpers import cli
from helpers.checkpoints.checkpoint import CheckpointError
from helpers.data import changed_data
from helpers.distributed import Processes, keep, launched_as, main_decides, recall
from helpers.fetch.resources import PUBLISHED_RUN, published_checkpoint
from helpers.loop import LoopState, StoppedError, StopSignal, Update
from helpers.options import FREE_ON_RESUME
from helpers.report.report import epoch_line, metric_tables, write_report
from helpers.runs.logger import RunLogger, has_results, new_id

log = logging.getLogger(__name__)

# Of a run that diverged.
REMEDIES = ("lr", "precision")


def known_runs(project: str) -> str:
    """The ids of a project's runs, for messages."""
    found = {path.parent.name for path in Path(project).glob("*/checkpoints")}
    return ", ".join(sorted(found)) or "none"


def parse_options(
    parser: argparse.ArgumentParser, argv: list[str], changeable: Collection[str] = REMEDIES
) -> tuple[argparse.Namespace, set[str]]:
    """Parsed options and the names of those given explicitly; a resumed run takes its other options from its folder.

    Processes that torchrun starts again after a failure resume the run that they had begun.

    Args:
        changeable: options that a resumed run may be given anew, and keeps from then on.

    Raises:
        CheckpointError: for an unknown or damaged run.
    """
    args, given = parser.parse_args(argv), cli.given_options(parser, argv)
    cli.check_sweep(parser, given)
    is_new = not args.resume and not getattr(args, "dry_run", False)
    if is_new and (begun := main_decides("run to go on with", lambda: _begun(args.project_name))):
        argv, given = [*argv, "--resume", begun], given | {"resume"}
        args = parser.parse_args(argv)
        log.info("run %s goes on after a failure", begun)
    if args.resume:
        path = Path(args.project_name) / args.resume / "options.json"
        if not path.is_file():
            several = "; all machines need the same folder" if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else ""
            raise CheckpointError(
                f"no run {args.resume} in {args.project_name}; there is {known_runs(args.project_name)}{several}"
            )
        try:
            saved = read_json(path)
            check_content(saved, {"script?": str, "given?": [str]})
            script = saved.get("script", parser.prog)
            if script == parser.prog:
                cli.check_saved(parser, saved)
        except ContentError as error:
            raise CheckpointError(f"{path} is damaged ({error}): start the run again") from error
        if script != parser.prog:
            command = resume_command(script, args.project_name, args.resume)
            raise CheckpointError(f"run {args.resume} is one of {script}: {command}")
        changed = {name for name in given - FREE_ON_RESUME - set(changeable) if getattr(args, name) != saved.get(name)}
        if changed:
            parser.error(f"{', '.join(f'--{name}' for name in sorted(changed))} cannot change when a run is resumed")
        parser.set_defaults(**{name: value for name, value in saved.items() if name in vars(args)})
        args = parser.parse_args(argv)
        given |= {name for name in ("kd_lambda", "teacher_logits") if name in saved.get("given", ())}
    args.given, args.script = sorted(given), parser.prog
    return args, given


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


def check_data(path: Path, content: Mapping[str, Any], digests: Mapping[str, str], anyway: bool) -> None:
    """Refuses to go on with a run on other data than it began with.

    Args:
        path, content: the checkpoint that the run goes on from.
        digests: of the data as they are now, from `data_digests`.
        anyway: the user means it; a warning is all.

    Raises:
        CheckpointError: naming what has changed.
    """
    if "data" not in content:
        log.info("%s is of an older version, which kept no digests: whether the data are the same is not known", path)
        return
    changed = changed_data(content["data"], digests)
    if changed and not anyway:
        raise CheckpointError(
            f"{', '.join(changed)} changed since the run of {path} began: bring the data back, start a new run, or go "
            "on with --resume_anyway"
        )
    if changed:
        log.warning("the run goes on with other data than it began with: %s changed", ", ".join(changed))


class OtherProcess:
    """What the processes that neither log nor save have in the place of a RunLogger."""

    id, dir, checkpoint_dir = "", Path(), Path()

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        pass


@contextmanager
def open_run(
    processes: Processes, project: str, run_id: str | None, *arguments: Any, **options: Any
) -> Iterator[RunLogger | OtherProcess]:
    """The logger of process 0, with the arguments of `RunLogger`; the other processes have one that does nothing.

    Raises:
        BusyError: when another program is writing to the run.
    """
    if not processes.is_main:
        yield OtherProcess()
        return
    run_id = run_id or recall("run") or new_id(Path(project))
    folder = Path(project) / run_id
    with locked(folder / ".lock", f"run {run_id}"):
        if not has_results(folder):
            keep("run", run_id)  # processes that follow after a failure take this run
        with RunLogger(project, run_id, *arguments, **options) as logger:
            logger.keep_options(REMEDIES)
            yield logger


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

    Args:
        save: writes the checkpoint of that name; all processes call it together.
        minutes: between checkpoints within an epoch.
        resume_command: what the user types to go on.

    Raises (when called):
        StoppedError: after saving, with the command that goes on.
        NonFiniteLossError: instead of saving a network that is lost.
    """

    def __init__(
        self, save: Callable[[str], None], minutes: float, stop: StopSignal, state: LoopState, update: Update,
        resume_command: str,
    ):  # fmt: skip
        self.save, self.seconds, self.stop, self.state = save, 60 * minutes, stop, state
        self.update, self.resume_command = update, resume_command
        self.saved_at = time.monotonic()

    def __call__(self) -> None:
        is_due = time.monotonic() - self.saved_at >= self.seconds
        # Signals reach the processes at different steps and their clocks differ: they act on what any of them wants.
        wish = self.update.processes.largest(self.stop.number or int(is_due))
        if wish == 0:
            return
        self.state.check_finite(self.update.lr)
        self._save("last.pt")
        if wish > 1:  # the number of a signal
            raise StoppedError(
                f"stopped by {signal.Signals(wish).name} in epoch {self.state.epoch} after "
                f"{self.state.step} steps, all saved; resume with: {self.resume_command}",
                exit_status=128 + wish,
            )

    def finish_epoch(self, metrics: Mapping[str, float], logger: RunLogger | OtherProcess) -> None:
        """Logs and counts an epoch, and saves; best.pt too when the held-out part was never scored better."""
        log.info(epoch_line(self.state.epoch, metrics))
        logger.write(self.state.epoch, metrics)
        better = metrics.get("val/acc", float("-inf")) > self.state.best
        if better:
            self.state.best = metrics["val/acc"]
        self.state.finish_epoch()
        if better:
            self._save("best.pt")
        self._save("last.pt")

    def _save(self, name: str) -> None:
        self.save(name)
        self.saved_at = time.monotonic()


def final_report(run_dir: Path, metrics: Mapping[str, float], logits: Tensor, clips: Clips, note: str = "") -> str:
    """Writes the report of a finished run, with a confusion matrix of its test part, and returns its tables.

    Args:
        logits: of the test part (clip, class).
        note: for the top of the report.
    """
    write_report(run_dir, logits.argmax(dim=1).numpy(), clips.scene.cpu().numpy(), clips.meta.scenes, note=note)
    return metric_tables(metrics)
