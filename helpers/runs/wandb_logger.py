"""Weights & Biases: runs recorded online or offline, and their checkpoints brought back from there."""

import logging
import os
import shlex
import shutil
import ssl
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

from datasets.files import replacing
from helpers.runs.backend import Results, Run

log = logging.getLogger(__name__)

WANDB_PROBE_S = 3.0  # seconds for the server to answer at the start; beyond that the run is recorded offline
WANDB_INIT_S = 20.0  # seconds for a server that did answer to accept the run
WANDB_FINISH_S = 60.0  # seconds at the end for what is not yet uploaded; the rest stays on disk


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

    def show(self, results: Results) -> None:
        if self._run is None:
            return
        try:
            import wandb

            tables = results.tables.items()
            shown = {name: wandb.Table(columns=table.columns, data=table.rows) for name, table in tables}
            shown |= {name: wandb.Image(str(path)) for name, path in results.figures.items()}
            shown["confusion"] = wandb.plot.confusion_matrix(
                y_true=results.targets.tolist(), preds=results.answers.tolist(), class_names=list(results.scenes)
            )
            shown["clips"] = [
                wandb.Audio(sound.samples, sample_rate=sound.rate, caption=sound.caption) for sound in results.sounds
            ]
            self._run.log({name: value for name, value in shown.items() if value})
            self._run.summary.update(dict(results.metrics))
            if results.checkpoints:
                artifact = wandb.Artifact(artifact_name(self._run.id), type="model")
                for path in results.checkpoints:
                    artifact.add_file(str(path), policy="immutable")  # else a copy goes into W&B's own folder
                self._run.log_artifact(artifact)
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


def artifact_name(run_id: str) -> str:
    """Of the checkpoints of a run."""
    return f"checkpoints-{run_id}"


def fetch_checkpoints(project: Path, run_id: str) -> bool:
    """Brings the checkpoints of a run of another machine from W&B into its folder; whether there were any.

    Does nothing without an account or network, or where W&B is switched off.

    Raises:
        OSError: when they cannot be written.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    folder = project / run_id / "checkpoints"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            import wandb

            if _wandb_mode(wandb)[0] != "online":
                return False
            api = wandb.Api(timeout=round(WANDB_INIT_S))
            artifact = api.artifact(f"{project.resolve().name}/{artifact_name(run_id)}:latest", type="model")
            artifact.download(root=scratch)
        except Exception as error:
            log.info("W&B has no checkpoints of %s (%s)", run_id, _first_line(error))
            return False
        files = [path for path in sorted(Path(scratch).iterdir()) if path.suffix == ".pt"]
        for path in files:
            with replacing(folder / path.name, "wb") as file, open(path, "rb") as source:
                shutil.copyfileobj(source, file)
    log.info("W&B: checkpoints of %s are in %s", run_id, folder)
    return bool(files)


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
