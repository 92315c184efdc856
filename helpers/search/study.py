"""An Optuna study that processes share, on one machine or many, and that goes on after any of them is killed."""

import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets.files import locked
from helpers.search.space import SearchError

N_ATTEMPTS = 5
WORKER, OVER, OPTIONS, DIGEST = "worker", "over the limits", "options", "recipe"


def open_study(name: str, storage: str, pruner: str, n_warmup: int, digest: str) -> Any:
    """The study, begun where there is none.

    Args:
        storage: a file, whose folder is made, or an address of a data base as Optuna takes it.
        pruner: median or none.
        n_warmup: epochs before a trial is stopped.
        digest: of recipe and search space.

    Raises:
        SearchError: for a storage that cannot be reached, or a study of another recipe.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if "://" in storage:
            kept = _open_data_base(storage)
        else:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            kept = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
        pruners = {"median": optuna.pruners.MedianPruner(n_warmup_steps=n_warmup), "none": optuna.pruners.NopPruner()}
        # Trials that others are running count as bad ones, so that two do not try the same.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # for options that choices bring
            sampler = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True)
        study = optuna.create_study(
            storage=kept, sampler=sampler, pruner=pruners[pruner], study_name=name, direction="maximize",
            load_if_exists=True,
        )  # fmt: skip
        theirs = study.user_attrs.get(DIGEST)
        if theirs is None:
            study.set_user_attr(DIGEST, digest)
    except (SQLAlchemyError, ImportError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise SearchError(f"--storage {storage} cannot be used: {reason[:200]}") from error
    if theirs not in (None, digest):
        raise SearchError(f"study {name} in {storage} is of another recipe or search space: name another --study")
    return study


def _open_data_base(address: str) -> Any:
    """Optuna's tables in a data base, made where there are none; two processes may begin at once."""
    import optuna
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    for _ in range(N_ATTEMPTS - 1):
        try:
            return optuna.storages.RDBStorage(address, engine_kwargs={"pool_pre_ping": True})
        except (IntegrityError, ProgrammingError):  # the other one is making them
            time.sleep(1)
    return optuna.storages.RDBStorage(address, engine_kwargs={"pool_pre_ping": True})


def digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def claiming(folder: Path) -> Iterator[None]:
    """One process of a machine at a time looks for what to do next."""
    with locked(folder / "search.lock", "the search", wait=True):
        yield


def me() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def next_trial(study: Any, n_trials: int) -> tuple[Any, dict[str, Any] | None] | None:
    """A trial to run, claimed, and its options where it had been begun before; None when the search is over.

    First come trials whose process on this machine is gone. Those that another machine runs are left to it.
    """
    import optuna

    running = [one for one in study.get_trials(deepcopy=False) if one.state == optuna.trial.TrialState.RUNNING]
    for one in running:
        if _is_left(one.user_attrs.get(WORKER)):
            trial = optuna.trial.Trial(study, one._trial_id)
            trial.set_user_attr(WORKER, me())
            return trial, one.user_attrs.get(OPTIONS)
    if n_counted(study) >= n_trials:
        return None
    trial = study.ask()
    trial.set_user_attr(WORKER, me())
    return trial, None


def _is_left(worker: str | None) -> bool:
    """Whether a process of this machine ran a trial, and is gone."""
    if worker is None:
        return False
    host, _, pid = worker.rpartition(":")
    if host != socket.gethostname() or int(pid) == os.getpid():
        return host == socket.gethostname()
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def n_counted(study: Any) -> int:
    """Trials, but for those over the limits."""
    return sum(OVER not in one.user_attrs for one in study.get_trials(deepcopy=False))


def finished(study: Any) -> list[Any]:
    """Trials with a score, best first."""
    import optuna

    done = [one for one in study.get_trials(deepcopy=False) if one.state == optuna.trial.TrialState.COMPLETE]
    return sorted(done, key=lambda one: -one.value)


def row_of(trial: Any) -> Mapping[str, Any]:
    """A trial as a line of the results table."""
    seconds = trial.duration.total_seconds() if trial.duration else None
    return {
        "trial": trial.number,
        "state": "over the limits" if OVER in trial.user_attrs else trial.state.name.lower(),
        "score": trial.value if trial.state.name == "COMPLETE" else None,
        "epochs": 1 + max(trial.intermediate_values) if trial.intermediate_values else 0,
        "minutes": None if seconds is None else round(seconds / 60, 2),
        "run": trial.user_attrs.get("run", ""),
        **trial.params,
    }
