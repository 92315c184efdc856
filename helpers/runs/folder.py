"""Runs in their folders, <project>/<id>: which there are, and their checkpoints."""

import re
from pathlib import Path

from helpers.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from helpers.fetch.resources import published_file
from helpers.runs.logger import RUN_ID
from helpers.runs.wandb_logger import fetch_checkpoints
from models.published import ALIASES, PUBLISHED, published_name


def known_runs(project: str) -> str:
    """The ids of a project's runs, for messages."""
    found = {path.parent.name for path in Path(project).glob("*/checkpoints")}
    return ", ".join(sorted(found)) or "none"


def last_checkpoint(project: str, run: str) -> Path:
    """What a run resumes from.

    Raises:
        CheckpointError: when it has not saved yet.
    """
    path = Path(project) / run / "checkpoints" / "last.pt"
    if not path.is_file():
        raise CheckpointError(f"run {run} has no {path}: it stopped before its first checkpoint, start it again")
    return path


def begun_run(project: str, run: str | None) -> Checkpoint | None:
    """The checkpoint that a run to resume goes on from; None for a new run.

    Raises:
        CheckpointError: when it has not saved yet, or its checkpoint is damaged.
    """
    if run is None:
        return None
    path = last_checkpoint(project, run)
    return Checkpoint(path, load_checkpoint(path))


def trained_checkpoint(project: str, run: str) -> Path | None:
    """The checkpoint of a finished or published run: our last.pt, else the .ckpt file of the latest epoch."""
    folder = Path(project) / run / "checkpoints"
    if (folder / "last.pt").is_file():
        return folder / "last.pt"

    def epoch(path: Path) -> int:  # numbers, not text: epoch=149 is later than epoch=99
        match = re.search(r"epoch=(\d+)", path.name)
        return int(match[1]) if match else -1

    return max(folder.glob("*.ckpt"), key=epoch, default=None)


def fetched_checkpoint(project: str, run: str) -> Path | None:
    """The checkpoint of a run of another machine, fetched from W&B; None where there is none."""
    known = RUN_ID.fullmatch(run) and fetch_checkpoints(Path(project), run)
    return trained_checkpoint(project, run) if known else None


def source_checkpoint(project: str, run: str | None, checkpoint: str | None) -> tuple[Path, str | None]:
    """The checkpoint that --wandb_id or --checkpoint names, and its key in PUBLISHED where it is a published network,
    which is fetched when it is not there.

    Raises:
        CheckpointError: when not exactly one is named, or there is no such run.
    """
    there_is = f"runs in {project}: {known_runs(project)}; published: {', '.join([*ALIASES, *PUBLISHED])}"
    if (run is None) == (checkpoint is None):
        raise CheckpointError(f"name a run with --wandb_id or a file with --checkpoint, one of them; {there_is}")
    if checkpoint is not None:
        if (checkpoint in PUBLISHED or checkpoint in ALIASES) and not Path(checkpoint).exists():
            return published_source(checkpoint)
        return Path(checkpoint), None
    found = trained_checkpoint(project, run)
    if found is None and (run in PUBLISHED or run in ALIASES):
        return published_source(run)
    if found is None:
        found = fetched_checkpoint(project, run)
    if found is None:
        raise CheckpointError(f"no run {run} with a checkpoint in {project}; {there_is}")
    return found, None


def published_source(name: str) -> tuple[Path, str]:
    """The file of a published network, fetched when it is not there, and its key in PUBLISHED.

    Raises:
        DownloadError: when it cannot be fetched; ValueError for an unknown name.
    """
    name = published_name(name)
    return published_file(name), name
