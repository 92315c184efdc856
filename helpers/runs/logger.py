"""Run folders, and the services that metrics are logged to.

A run lives in `<project_name>/<id>/`: `options.json`, `metrics.jsonl` (one JSON object a line: epoch, metrics) and
`checkpoints/`. The folder is always written; W&B and TensorBoard are further copies of the same metrics.
"""

import dataclasses
import json
import logging
import os
import re
import secrets
import shlex
import ssl
import string
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from datasets.files import plain, replacing

log = logging.getLogger(__name__)

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

WANDB_PROBE_S = 3.0  # seconds for the server to answer at the start; beyond that the run is recorded offline
WANDB_INIT_S = 20.0  # seconds for a server that did answer to accept the run
WANDB_FINISH_S = 60.0  # seconds at the end for what is not yet uploaded; the rest stays on disk


@dataclasses.dataclass(frozen=True)
class Run:
    """What a backend may know about the run it records."""

    dir: Path
    id: str
    project: str
    experiment_name: str | None
    options: dict[str, Any]
    resume_epoch: int | None  # epochs finished by the checkpoint that the run goes on from; None for a new run


class NoLogger:
    """Records nothing besides the run folder."""

    def __init__(self, run: Run):
        pass

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        pass


class TensorboardLogger:
    """Writes event files to `<run>/tensorboard`; the step is the epoch.

    Raises:
        ValueError: if tensorboard is not installed.
    """

    def __init__(self, run: Run):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"logger tensorboard needs a package ({error}): pip install tensorboard") from None
        # From purge_step on, TensorBoard hides what an interrupted run wrote before it was resumed.
        self._writer = SummaryWriter(run.dir / "tensorboard", purge_step=run.resume_epoch)

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases: online with an account and a network, else offline under the run folder.

    Neither asks nor waits, and no failure of the service ends the run: it is reported in one line, and the run folder
    holds all metrics anyway. WANDB_MODE and the setting of `wandb offline` are respected.
    """

    def __init__(self, run: Run):
        self._run = None
        self._folder = shlex.quote(str(run.dir / "wandb"))  # holds one folder for each time the run was resumed
        # W&B's own usage reports go over the network even offline, and keep the process from ending where it hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except Exception as error:  # missing, or broken by another package's version
            log.warning("W&B cannot be imported (%s): the run goes on without; pip install wandb", _first_line(error))
            return
        try:
            self._start(wandb, run)
        except Exception as error:
            self._give_up(error)

    def _start(self, wandb, run: Run) -> None:
        mode, reason = _wandb_mode(wandb)
        if mode == "disabled":
            log.info("W&B is switched off (%s)", reason)
            return
        arguments = {
            "project": run.project,
            "id": run.id,
            "name": run.experiment_name,
            "dir": run.dir,
            "config": run.options,
            "resume": "allow",
            "reinit": "create_new",  # a run that the process did not finish must not receive this one's metrics
        }
        settings = {"silent": True, "console": "off", "disable_code": True, "init_timeout": WANDB_INIT_S}
        settings["x_transaction_log_flush_interval"] = 1.0  # seconds that a kill may lose of an offline run, not 15
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings |= {"finish_timeout": WANDB_FINISH_S, "finish_timeout_raises": True}
        if mode != "offline":
            try:
                self._run = wandb.init(mode=mode, settings=wandb.Settings(**settings), **arguments)
            except Exception as error:
                mode, reason = "offline", f"going online failed: {_first_line(error)}"
                wandb.teardown()  # else the id counts as in use
        if mode == "offline":
            self._run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)
            log.warning("W&B records offline (%s); to upload it later: wandb sync %s", reason, self._folder)
        else:
            log.info("W&B: %s", self._run.url)

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"epoch": epoch, **metrics}, step=epoch, commit=True)
        except Exception as error:
            self._give_up(error)

    def close(self, failed: bool = False) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            log.warning("W&B has not uploaded all; to do so later: wandb sync --include-online %s", self._folder)
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        """Goes on without W&B: a logging service is no reason to lose a training run."""
        self._run = None
        log.warning("W&B stops recording (%s); metrics.jsonl goes on", _first_line(error))


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


def _wandb_mode(wandb) -> tuple[str, str]:
    """W&B's mode (online, offline, disabled, or what WANDB_MODE names) and why; takes WANDB_PROBE_S at most."""
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    mode = "offline" if settings.mode == "dryrun" else settings.mode
    chosen = f"WANDB_MODE={os.environ['WANDB_MODE']}" if "WANDB_MODE" in os.environ else "setting of `wandb offline`"
    if mode in ("offline", "disabled"):
        return mode, chosen
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        return "offline", f"the login cannot be used: {_first_line(error)}"
    if not logged_in:
        return "offline", "not logged in, see `wandb login`"
    if "WANDB_MODE" not in os.environ and not _answers(settings.base_url, WANDB_PROBE_S):
        return "offline", f"no answer from {settings.base_url}"
    return mode, chosen


def _answers(url: str, seconds: float) -> bool:
    """Whether a web server answers within so many seconds, be it with a refusal."""
    answers = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=seconds) as response:
                answers.append(response.status < 500)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
        except urllib.error.URLError as error:
            # Something did answer. W&B looks for certificates elsewhere than Python and may well trust it.
            answers.append(isinstance(error.reason, ssl.SSLError))
        except (OSError, HTTPException, ValueError):
            answers.append(False)

    # In a thread of its own, as neither looking up a name nor a server that drips bytes respects the time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
