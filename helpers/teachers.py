"""What a teacher's name on a command line stands for, whether it fits the data, and what it and several answer."""

import logging
import os
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from helpers.checkpoints.checkpoint import CheckpointError, LoadedModel, load_model
from helpers.fetch.download import file_hash
from helpers.fetch.resources import published_file
from helpers.machine import Machine
from helpers.quantization import float_network, for_target
from helpers.runs.folder import fetched_checkpoint, trained_checkpoint
from models.published import ALIASES, OLD_NAMES, PUBLISHED, TEACHERS, published_name

log = logging.getLogger(__name__)

Average = Literal["logits", "log_probabilities"]
AVERAGES: tuple[str, ...] = get_args(Average)


@dataclass(frozen=True)
class TeacherSource:
    """A teacher that was named: where its weights are."""

    name: str  # short, for metric keys and tables
    path: Path | None  # None: a published file that is fetched when it is needed
    published: str | None = None  # key of PUBLISHED
    frontend: nn.Module | None = None  # that the command line states, where the file records none

    @property
    def within(self) -> str:
        """Where in its file the weights are, see models.published.Published."""
        return PUBLISHED[self.published].within if self.published else ""

    def fetch(self) -> "TeacherSource":
        """Itself with the file in its place.

        Raises:
            DownloadError: when the file cannot be fetched, or is not the one that was fetched at first.
        """
        if self.path is not None:
            return self
        return replace(self, path=published_file(self.published))

    def load(self) -> LoadedModel:
        """Network and front end, in eval mode on the CPU.

        Raises:
            CheckpointError: when the file is damaged, foreign, or holds another network than its name says.
        """
        if self.published is None:
            loaded = load_model(self.path)
            return loaded if self.frontend is None else replace(loaded, frontend=self.frontend)
        row = PUBLISHED[self.published]
        try:
            return load_model(self.path, self.published)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; it should be the {row.architecture} {self.published}: delete {self.path} and its entry "
                f"in {self.path.with_name('checksums.json')} to have it downloaded again"
            ) from error


def find_teacher(spec: str, project: str) -> TeacherSource:
    """What `spec` stands for; nothing is fetched yet.

    Args:
        spec: the name of a published teacher (today's or an older one), the id of a run, or the path of a checkpoint.
        project: folder of the runs.

    Raises:
        CheckpointError: when it is none of them; the message lists the published names and the runs.
    """
    if spec in TEACHERS or spec in OLD_NAMES:
        try:
            name = published_name(spec)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if name != spec:
            log.warning("%s is an older name, of a network that is published no more: %s took its place", spec, name)
        return TeacherSource(name, None, name)
    if Path(spec).is_file():
        path = Path(spec)
        return TeacherSource(path.parent.parent.name if path.parent.name == "checkpoints" else path.stem, path)
    if (path := trained_checkpoint(project, spec)) is not None:
        return TeacherSource(Path(spec).name, path)
    if spec in PUBLISHED or spec in ALIASES:
        return TeacherSource(spec, None, published_name(spec))
    if (path := fetched_checkpoint(project, spec)) is not None:
        return TeacherSource(spec, path)
    runs = sorted(folder.parent.name for folder in Path(project).glob("*/checkpoints"))
    runs = [run for run in runs if trained_checkpoint(project, run) is not None]
    raise CheckpointError(
        f"no teacher {spec}: there is no such file and no such run (runs in {project}: {', '.join(runs) or 'none'}); "
        f"published: {', '.join([*ALIASES, *PUBLISHED])}"
    )


def find_teachers(specs: Sequence[str], project: str) -> list[TeacherSource]:
    """All teachers with their files in place; every name is checked before the first download.

    Raises:
        CheckpointError: as `find_teacher`.
        DownloadError: as `TeacherSource.fetch`.
    """
    found = [find_teacher(spec, project) for spec in specs]
    _, *names = unique_names(["ensemble", *(source.name for source in found)])  # of all together, so no teacher's
    sources = [replace(source, name=name).fetch() for source, name in zip(found, names, strict=True)]
    check_distinct([(spec, source.path, source.within) for spec, source in zip(specs, sources, strict=True)])
    return sources


def check_distinct(teachers: Sequence[tuple[str, Path, str]]) -> None:
    """Refuses files that hold the same bytes: a teacher would count twice.

    Args:
        teachers: what each was called on the command line, its file, and where in it the weights are.

    Raises:
        CheckpointError: naming the first two.
    """
    seen: dict[tuple[str, str], str] = {}
    sizes = Counter(path.stat().st_size for _, path, _ in teachers if path.is_file())
    for spec, path, within in teachers:
        if not path.is_file() or sizes[path.stat().st_size] == 1:
            continue
        digest = file_hash(path, "sha256"), within
        if digest in seen:
            raise CheckpointError(
                f"{seen[digest]} and {spec} are the same file or copies of it ({path}), which would count twice: name "
                "it once"
            )
        seen[digest] = spec


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with `_2`, `_3`, ... after those that were there before."""
    unique: list[str] = []
    for name in names:
        candidates = (name if n == 1 else f"{name}_{n}" for n in range(1, len(names) + 2))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique


def load_teacher_model(spec: str, project: str) -> LoadedModel:
    """Network and front end of the teacher that `spec` names, see `find_teacher`; a published one is fetched.

    Raises:
        CheckpointError: when there is no such teacher, or its file does not fit.
        DownloadError: when a published file cannot be fetched or was changed.
    """
    return find_teacher(spec, project).fetch().load()


def bring_feature_teacher(loss_fn: Any, project: str) -> None:
    """Gives a loss that learns from the inside of a teacher that teacher; does nothing for others.

    Raises:
        CheckpointError, DownloadError: as `load_teacher_model`.
    """
    if hasattr(loss_fn, "feature_teacher"):
        loaded = load_teacher_model(loss_fn.feature_teacher, project)
        loss_fn.take_teacher(float_network(loaded.model) if loaded.precision == "int8" else loaded.model.float(),
                             loaded.frontend)  # fmt: skip


def scorer(source: TeacherSource, loaded: LoadedModel, n_samples: int, machine: Machine) -> tuple[nn.Module, nn.Module]:
    """Network (as its target computes it) and front end on the device, proved on one silent clip.

    Raises:
        CheckpointError: when clips of `n_samples` samples do not fit the front end or the network.
    """
    model = for_target(machine.take(loaded.model), loaded.precision).eval()
    frontend = loaded.frontend.to(machine.device).eval()
    try:
        with torch.inference_mode():
            model(frontend(torch.zeros(1, n_samples, device=machine.device)))
    except ValueError as error:
        raise CheckpointError(f"{source.path} does not take clips of {n_samples} samples: {error}") from error
    return model, frontend


def mean_logits(
    logits: Sequence[Tensor], weights: Sequence[float] | None = None, average: Average = "logits"
) -> Tensor:
    """Weighted mean of the answers of several teachers, computed in float64: logits (clip, class) float32.

    Args:
        logits: one table (clip, class) for each teacher, the same clips and classes in all.
        weights: one for each, >= 0, in any scale; None: all the same.
        average: `logits` takes the mean of the logits as they are, so a teacher with larger ones counts for more;
            `log_probabilities` that of their log-softmax: the geometric mean of the probabilities, not normalised.

    Raises:
        ValueError: when there is nothing to average, or shapes, weights or `average` do not fit.
    """
    weights = [1.0] * len(logits) if weights is None else list(weights)
    if not logits or len(weights) != len(logits):
        raise ValueError(f"there must be one weight for each of the {len(logits)} teachers, got {len(weights)}")
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        raise ValueError(f"weights must be finite, >= 0 and not all 0, got {weights}")
    if len({tuple(table.shape) for table in logits}) > 1:
        raise ValueError(f"teachers must answer for the same clips and classes, got {[tuple(t.shape) for t in logits]}")
    if average not in AVERAGES:
        raise ValueError(f"unknown average {average!r}; known: {', '.join(AVERAGES)}")
    total = torch.zeros(logits[0].shape, dtype=torch.float64, device=logits[0].device)
    for table, weight in zip(logits, weights, strict=True):
        table = table.double()
        total += weight / sum(weights) * (table.log_softmax(dim=1) if average == "log_probabilities" else table)
    return total.float()


class PartFile:
    """What one network answered so far: a memory-mapped file (clip, class), and a checksum for each finished batch.

    A batch counts once its line in the journal is whole and its rows have the checksum there: whatever a kill or a
    crash of the machine left behind, nothing half-written is taken for an answer.
    """

    def __init__(self, folder: Path, identity: str, shape: tuple[int, int], batch_size: int):
        path, self.journal, self.batch_size = folder / f"{identity}.f32", folder / f"{identity}.txt", batch_size
        is_whole = path.is_file() and path.stat().st_size == 4 * shape[0] * shape[1]
        if not is_whole:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash at a later write
                    os.posix_fallocate(file.fileno(), 0, 4 * shape[0] * shape[1])
                else:
                    file.truncate(4 * shape[0] * shape[1])
        self.logits = np.memmap(path, np.float32, "r+", shape=shape)
        lines = self.journal.read_text(encoding="utf-8").splitlines() if is_whole and self.journal.is_file() else []
        self.n_done = 0  # batches
        while self.n_done < len(lines) and lines[self.n_done] == self._line(self.n_done):
            self.n_done += 1
        self.journal.write_text("".join(f"{line}\n" for line in lines[: self.n_done]), encoding="utf-8")

    def _rows(self, batch: int) -> slice:
        return slice(batch * self.batch_size, (batch + 1) * self.batch_size)

    def _line(self, batch: int) -> str:
        return f"{zlib.crc32(np.ascontiguousarray(self.logits[self._rows(batch)])):08x} ."

    def write(self, logits: Tensor) -> None:
        """Adds the next batch (clip, class)."""
        self.logits[self._rows(self.n_done)] = logits.numpy()
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(f"{self._line(self.n_done)}\n")
        self.n_done += 1

    @staticmethod
    def remove_others(folder: Path, identities: Collection[str]) -> None:
        """Removes what other teachers, clips or options left in the folder."""
        stale = [path for path in folder.glob("*.*") if path.stem not in identities]
        if stale:
            log.info("%s holds answers of other teachers, clips or options: they are computed anew", folder)
        for path in stale:
            path.unlink()
