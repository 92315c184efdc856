"""Run folders, and the services that metrics are logged to.

A run lives in `<project_name>/<id>/`: `options.json`, `metrics.jsonl` (one JSON object a line: epoch, metrics) and
`checkpoints/`. The folder is always written; W&B and TensorBoard are further copies of the same metrics.
"""

import json
import logging
import os
import re
import secrets
import string
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets.files import plain, replacing
from helpers.runs.backend import NoLogger, Results, Run
from helpers.runs.tensorboard_logger import TensorboardLogger
from helpers.runs.wandb_logger import WandbLogger

log = logging.getLogger(__name__)

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

LOGGERS = {"wandb": WandbLogger, "tensorboard": TensorboardLogger, "none": NoLogger}


class RunLogger:
    """Opens the folder of a run and writes metrics to it and to the backends.

    Args:
        project_name: folder of all runs of a project; its last part is the project's name for the backends.
        run_id: id of the run, which is also W&B's; None draws a new one.
        options: resolved options; kept in `options.json` by the start, untouched when the run is resumed.
        backends: names from LOGGERS.
        experiment_name: name that the backends show.
        resume_epoch: number of epochs the checkpoint has finished; later lines of `metrics.jsonl` are dropped, as they
            will be written again. None starts a new run.

    Raises:
        ValueError: for an unknown backend or an id that cannot be a folder's name.
        FileExistsError: if a new run is given the id of an existing one that has saved something.
    """

    def __init__(
        self,
        project_name: str,
        run_id: str | None,
        options: Mapping[str, Any],
        backends: Sequence[str] = ("wandb",),
        experiment_name: str | None = None,
        resume_epoch: int | None = None,
    ):
        unknown = [name for name in backends if name not in LOGGERS]
        if unknown:
            raise ValueError(f"unknown logger {', '.join(map(repr, unknown))}; known are {', '.join(LOGGERS)}")
        if run_id is not None and not RUN_ID.fullmatch(run_id):
            raise ValueError(f"run id must be letters, digits, '.', '_' or '-', with no path separator, got {run_id!r}")

        project = Path(project_name)
        self.id = run_id or new_id(project)
        self.dir = project / self.id
        self.checkpoint_dir = self.dir / "checkpoints"
        if resume_epoch is None and has_results(self.dir):
            raise FileExistsError(f"run {self.id} already exists in {project}: resume it, or choose another id")

        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        self._options = options = plain(options)
        if resume_epoch is None or not (self.dir / "options.json").exists():
            with replacing(self.dir / "options.json") as file:
                file.write(json.dumps(options, indent=2, allow_nan=False) + "\n")
        self._metrics = self.dir / "metrics.jsonl"
        self._last_epoch = -1
        if resume_epoch is not None and self._metrics.exists():
            self._last_epoch = _drop_epochs_from(self._metrics, resume_epoch)

        run = Run(self.dir, self.id, project.resolve().name, experiment_name, options, resume_epoch)
        self._backends = [LOGGERS[name](run) for name in dict.fromkeys(backends)]

    def keep_options(self, names: Collection[str]) -> None:
        """Writes the values that a resumed run was given anew into `options.json`, for the next time."""
        path = self.dir / "options.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = {name: self._options[name] for name in names if self._options.get(name) != saved.get(name)}
        if changed:
            log.info("from epoch %d on: %s", self._last_epoch + 1, ", ".join(f"{k} {v}" for k, v in changed.items()))
            with replacing(path) as file:
                file.write(json.dumps(saved | changed, indent=2, allow_nan=False) + "\n")

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of an epoch; they are on disk when this returns. NaN and infinity become null.

        Raises:
            ValueError: if the epoch was written before.
            OSError: if the disk is full.
        """
        if epoch <= self._last_epoch:
            raise ValueError(f"{self._metrics} holds epoch {self._last_epoch}; it cannot be followed by epoch {epoch}")
        line = json.dumps(plain({"epoch": epoch, **metrics}), allow_nan=False)
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._last_epoch = epoch
        for backend in self._backends:
            backend.write(epoch, metrics)

    def show(self, results: Results) -> None:
        """Shows in the backends what is there at the end."""
        for backend in self._backends:
            backend.show(results)

    def close(self, failed: bool = False) -> None:
        """Finishes the backends; `failed` marks the run as such where a backend can show it."""
        for backend in self._backends:
            backend.close(failed)
        self._backends = []

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.close(failed=kind is not None)


def has_results(folder: Path) -> bool:
    """Whether a run has saved a checkpoint or metrics; one that was stopped before may be begun again."""
    metrics, checkpoints = folder / "metrics.jsonl", (folder / "checkpoints").glob("*")
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(path.suffix != ".tmp" for path in checkpoints)


def new_id(project: Path) -> str:
    """Draws an id in W&B's form, eight lower-case letters and digits, that no run of the project has yet."""
    while True:
        # The operating system's generator: a seeded one would give every run of a recipe the same id.
        run_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
        if not (project / run_id).exists():
            return run_id


def _drop_epochs_from(path: Path, epoch: int) -> int:
    """Removes from metrics.jsonl the lines of `epoch` and later, and what is no whole line; returns the last left.

    A process that was killed leaves half a line, or epochs that its last checkpoint knows nothing about.
    """
    kept, last = [], -1
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        with suppress(ValueError, TypeError, LookupError, RecursionError):  # no JSON, no epoch: half a line
            if line.endswith("\n") and last < (found := json.loads(line)["epoch"]) < epoch:
                kept.append(line)
                last = found
    if len(kept) < len(lines):
        with replacing(path) as file:
            file.write("".join(kept))
        log.info("%s: %d lines after epoch %d are dropped and written again", path, len(lines) - len(kept), last)
    return last
