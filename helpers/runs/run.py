"""A run while it trains: its folder, logger and lock, saving on the way, stopping when asked to, its report."""

import argparse
import logging
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from datasets.files import locked
from datasets.synthetic import SYNTHETIC_NOTICE
from datasets.waveforms import Clips
from helpers.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Subject,
    describe_run,
    restore_training,
    save_checkpoint,
    training_state,
)
from helpers.complexity import measure
from helpers.data import changed_data
from helpers.distributed import Processes, keep, recall
from helpers.errors import StoppedError
from helpers.evaluate.scoring import compare
from helpers.loop import Epoch, StopSignal, Update
from helpers.quantization import float_network
from helpers.recipes import keep_recipe
from helpers.report.page import write_page
from helpers.report.report import epoch_line, metric_tables, read_history, write_report
from helpers.report.results import results_of
from helpers.report.sections import Entry
from helpers.runs.backend import Results
from helpers.runs.logger import RunLogger, has_results, new_id
from helpers.runs.options import REMEDIES, resume_command

log = logging.getLogger(__name__)


class OtherProcess:
    """What the processes that neither log nor save have in the place of a RunLogger."""

    id, dir, checkpoint_dir = "", Path(), Path()

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        pass

    def show(self, results: Results) -> None:
        pass


@contextmanager
def open_logger(
    processes: Processes, args: argparse.Namespace, resume_epoch: int | None = None
) -> Iterator[RunLogger | OtherProcess]:
    """The logger of process 0 with the folder of the run, its own as long as it is open; the others have none.

    Args:
        resume_epoch: epochs finished by the checkpoint that the run goes on from; None for a new run.

    Raises:
        BusyError: when another program is writing to the run.
    """
    if not processes.is_main:
        yield OtherProcess()
        return
    named = getattr(args, "resume", None) or getattr(args, "run_id", None)
    run_id = named or recall("run") or new_id(Path(args.project_name))
    folder = Path(args.project_name) / run_id
    with locked(folder / ".lock", f"run {run_id}"):
        if not has_results(folder):
            keep("run", run_id)  # processes that follow after a failure take this run
        backends = args.logger, args.experiment_name
        with RunLogger(args.project_name, run_id, vars(args), *backends, resume_epoch=resume_epoch) as logger:
            logger.keep_options(REMEDIES)
            yield logger


@contextmanager
def open_run(
    parser: argparse.ArgumentParser, args: argparse.Namespace, subject: Subject, update: Update,
    begun: Checkpoint | None = None,
) -> Iterator["Run"]:  # fmt: skip
    """A run to train in: brought to where it stood, logged, saved on the way, stopped by a signal after its step.

    Args:
        subject: what it trains and on which data.
        begun: the checkpoint that it goes on from; None for a new run, whose first checkpoint is written at once.

    Raises:
        CheckpointError: when data or network are not those that the run began with.
        BusyError: when another program is writing to the run.
    """
    processes = update.machine.processes
    processes.seed(args.seed)
    if begun is not None:
        check_data(begun, subject.digests, args.resume_anyway)
        restore_training(begun, subject, update)
    with open_logger(processes, args, None if begun is None else update.state.epoch) as logger, StopSignal() as stop:
        data = subject.data
        log.info("run %s in %s: %d training and %d test clips", logger.id, logger.dir, len(data.train), len(data.test))
        run = Run(args, subject, update, logger, stop)
        if processes.is_main:
            keep_recipe(logger.dir, parser, args)
        if begun is None:
            run.save("last.pt")  # from here on a killed run can be resumed
        yield run


def check_data(begun: Checkpoint, digests: Mapping[str, str], anyway: bool) -> None:
    """Refuses to go on with a run on other data than it began with.

    Args:
        digests: of the data as they are now.
        anyway: the user means it; a warning is all.

    Raises:
        CheckpointError: naming what has changed.
    """
    path, content = begun.path, begun.content
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


@dataclass
class Run:
    """What `open_run` gives; the loop tells it of every step and epoch."""

    args: argparse.Namespace
    subject: Subject
    update: Update
    logger: RunLogger | OtherProcess
    stop: StopSignal

    def __post_init__(self):
        self.saved_at = time.monotonic()

    @property
    def id(self) -> str:
        return self.logger.id

    @property
    def dir(self) -> Path:
        return self.logger.dir

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.update.state.epoch

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or as many evaluations without a better score as --early_stopping says."""
        state, patience = self.update.state, getattr(self.args, "early_stopping", 0)
        return state.epoch >= self.args.n_epochs or 0 < patience <= state.n_worse

    @property
    def is_scored(self) -> bool:
        """Whether the current epoch ends with an evaluation."""
        return self.epoch + 1 == self.args.n_epochs or (self.epoch + 1) % self.args.eval_every == 0

    def batches(self, clips: Clips) -> Epoch:
        """What the current epoch has left of a training part; saves and stops between its steps."""
        return Epoch(clips, self.update, self.args.seed, self.after_step)

    def after_step(self) -> None:
        """Saves when it is time, or when the run is asked to stop, and then leaves. All processes call it together.

        Raises:
            StoppedError: after saving, with the command that goes on.
            NonFiniteLossError: instead of saving a network that is lost.
        """
        state = self.update.state
        is_due = time.monotonic() - self.saved_at >= 60 * self.args.save_minutes
        # Signals reach the processes at different steps and their clocks differ: they act on what any of them wants.
        wish = self.update.machine.processes.largest(self.stop.number or int(is_due))
        if wish == 0:
            return
        state.check_finite(self.update.lr)
        self.save("last.pt")
        if wish > 1:  # the number of a signal
            resume = resume_command(self.args.script, self.args.project_name, self.logger.id)
            raise StoppedError(
                f"stopped by {signal.Signals(wish).name} in epoch {state.epoch} after {state.step} steps, all saved; "
                f"resume with: {resume}",
                exit_status=128 + wish,
            )

    def finish_epoch(self, metrics: Mapping[str, float]) -> None:
        """Logs and counts an epoch, and saves; best.pt too when the held-out part was never scored better."""
        state = self.update.state
        log.info(epoch_line(state.epoch, metrics))
        self.logger.write(state.epoch, metrics)
        better = metrics.get("val/acc", float("-inf")) > state.best
        if better:
            state.best = metrics["val/acc"]
        if "val/acc" in metrics:
            state.n_worse = 0 if better else state.n_worse + 1
        state.finish_epoch()
        for name in ("best.pt", "last.pt") if better else ("last.pt",):
            self.save(name)

    def save(self, name: str) -> None:
        """Writes a checkpoint; all processes call it together."""
        training = training_state(self.update)
        if self.update.machine.processes.is_main:
            content = describe_run(self.subject, vars(self.args))
            save_checkpoint(self.logger.checkpoint_dir / name, content | training)
        self.saved_at = time.monotonic()

    def keep_temperature(self, temperature: float) -> None:
        """Adds the temperature that the held-out part asks for to last.pt; all processes call it together."""
        log.info("temperature of the logits, by the held-out recordings: %.3f", temperature)
        self.subject = replace(self.subject, more={**self.subject.more, "temperature": temperature})
        self.save("last.pt")

    def report(self, metrics: Mapping[str, float], logits: Tensor) -> None:
        """Writes and prints the report of a finished run, with a confusion matrix of its test part.

        Args:
            logits: of the test part (clip, class).
        """
        if not self.update.machine.processes.is_main:
            return
        test, note = self.subject.data.test, SYNTHETIC_NOTICE if self.args.dataset == "synthetic" else ""
        self._write_page(logits, note)
        write_report(
            self.logger.dir, logits.argmax(dim=1).numpy(), test.scene.cpu().numpy(), test.meta.scenes, note=note,
            draw=False,
        )  # fmt: skip
        checkpoints = sorted(self.logger.checkpoint_dir.glob("*.pt")) if self.args.wandb_checkpoints else []
        self.logger.show(results_of(self.subject.data, logits, metrics, self.logger.dir, checkpoints))
        print(metric_tables(metrics))

    def _write_page(self, logits: Tensor, note: str) -> None:
        """Writes report.html about the last epoch."""
        subject, n_rounds = self.subject, 2000  # enough for a look; run_evaluation.py draws more
        precision = subject.more.get("precision", "fp32")
        network = float_network(subject.model) if precision == "int8" else subject.model
        frontend = subject.frontend.eval()
        device = next(network.parameters()).device

        def log_mel(waveform: Tensor) -> Tensor:
            with torch.inference_mode():
                return frontend(waveform.to(device)).cpu()

        shape = log_mel(torch.zeros(1, subject.data.store.n_samples)).shape[1:]
        history = read_history(self.logger.dir / "metrics.jsonl")
        entry = Entry(logits, vars(self.args), (measure(network, tuple(shape)), precision), history)
        compared = compare(subject.data, {self.id: logits}, n_rounds)
        write_page(
            self.logger.dir, subject.data, {self.id: entry}, f"Run {self.id}", compared=compared, log_mel=log_mel,
            note=note,
        )  # fmt: skip
