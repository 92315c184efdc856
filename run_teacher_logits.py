"""Turns any teachers into one file of logits that run_training.py distils from.

  python run_teacher_logits.py --teachers <id> <id>                          own runs, over the training part
  python run_teacher_logits.py --teachers passt_dirfms_1 cpr_128k_fms_1 --weights 2 1 --output ensemble.pt
  python run_teacher_logits.py --teachers <id> predictions_split25.pt --subset 25 --average log_probabilities
  python run_training.py --teacher_logits ensemble.pt

A teacher is a published name, the id of a run, a checkpoint, or a file of logits: one of this script, the published
ensemble_logits.pt, predictions_<subset>.pt of easy_dcase_task1, or the table of a challenge entry (filename,
scene_label, a column for each scene). Audio is streamed; what the networks answered lies in <output>.parts until the
end, so the same command goes on where a stopped or killed one was. Under torchrun the processes share out the clips.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import hashlib
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.audio import Sampling
from datasets.cache import WaveformStore, open_store
from datasets.files import ContentError, locked
from datasets.synthetic import SYNTHETIC_NOTICE
from datasets.tau import DataError, Meta, read_meta, read_split, test_rows, train_rows
from datasets.teacher_logits import is_logits, read_logits, read_logits_file
from datasets.waveforms import Clips, batches
from helpers import cli
from helpers.checkpoints.checkpoint import CheckpointError, check_scenes, save_checkpoint
from helpers.data import DataConfig, dataset_root, place_on_device, sampling_of
from helpers.fetch.download import file_hash
from helpers.machine import Machine, Precision, open_machine
from helpers.options import add_compute_options, add_data_options
from helpers.parts import STUDENT, Parts
from helpers.recipes import parse
from helpers.fetch.resources import RESOURCES, subset_file
from helpers.checkpoints.stated import add_stated_options, believe_of_teachers
from helpers.teachers import (
    AVERAGES,
    PartFile,
    TeacherSource,
    check_distinct,
    find_teacher,
    mean_logits,
    scorer,
    unique_names,
)

log = logging.getLogger(__name__)

FORMAT = "low-complexity ASC teacher logits 1"
SHIFT_RATE = 32000  # Hz; --max_shift is in samples at this rate
BLOCK_ROWS = 8192  # clips that are averaged at a time


@dataclass
class Source:
    """One teacher, and what it answers: logits (clip, class)."""

    name: str
    path: Path
    sha256: str
    weight: float
    architecture: str = "file of logits"
    teacher: TeacherSource | None = None  # None: a file of logits
    sampling: Sampling | None = None
    shifts: list[int] | None = None  # samples at that rate
    provenance: Any = None  # of a file of logits: what it says of itself
    logits: np.ndarray | None = None

    @property
    def stated_frontend(self) -> dict[str, Any] | None:
        """Config of a front end that the file does not record."""
        stated = None if self.teacher is None else self.teacher.frontend
        return None if stated is None else asdict(stated.config)

    def describe(self) -> dict[str, Any]:
        kept = {"name": self.name, "path": str(self.path), "sha256": self.sha256, "architecture": self.architecture}
        if self.stated_frontend is not None:
            kept["frontend"] = self.stated_frontend
        return kept | {"weight": self.weight, "shifts": self.shifts, "provenance": self.provenance}


def make_parser(chosen: Parts = STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(
        __doc__,
        prog="run_teacher_logits.py",
        usage="python %(prog)s --teachers X ... [--option value ...]",
    )
    teachers = parser.add_argument_group("teachers")
    teachers.add_argument("--teachers", nargs="+", required=True, metavar="X",
                          help="published names, ids of runs, checkpoints, files of logits")  # fmt: skip
    teachers.add_argument("--weights", nargs="+", type=cli.number(float, 0), metavar="W",
                          help="one for each teacher, in any scale (default: all the same)")  # fmt: skip
    teachers.add_argument("--average", choices=AVERAGES, default="logits",
                          help="mean of the logits, or of their log-softmax")  # fmt: skip
    teachers.add_argument("--n_shifts", type=cli.number(int, 1, 1000), default=1,
                          help="circularly shifted copies of each clip that a network's answer is averaged over; "
                               "1 is off; does not change files of logits")  # fmt: skip
    teachers.add_argument("--max_shift", type=cli.number(int, 0), default=4000,
                          help=f"spreads the copies from minus to plus this; samples at {SHIFT_RATE} Hz")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--part", choices=["train", "test", "all"], default="train", help="clips that get logits")
    output.add_argument("--output", metavar="FILE", help="(default: resources/teacher_logits_<data set>_<part>.pt)")
    output.add_argument("--overwrite", action=cli.OnOff, help="replace the file where it exists")
    output.add_argument("--project_name", default="DCASE23_Task1", help="folder of all runs of the project")
    output.add_argument("--batch_size", type=cli.number(int, 1), default=32)
    add_data_options(parser)
    compute = add_compute_options(parser)
    compute.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the networks")
    add_stated_options(parser, chosen, with_network=False)
    parser.set_defaults(data_on_device="no")  # a clip is read once
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser, args = parse(make_parser, sys.argv[1:] if argv is None else argv)
    with cli.option_errors(parser):
        config = cli.config_from(args, DataConfig)
    weights = args.weights or [1.0] * len(args.teachers)
    if len(weights) != len(args.teachers) or sum(weights) == 0:
        parser.error(f"--weights must give each of the {len(args.teachers)} teachers one, not all 0, got {weights}")
    if config.val_fraction:
        parser.error("--val_fraction means nothing here: every training clip gets logits")

    machine = open_machine(parser, args)
    processes = machine.processes
    with processes.main_first():
        meta = read_meta(dataset_root(config))
        rows = part_rows(meta, args.part, config.subset)
        output = Path(args.output) if args.output else default_output(meta, args.part, config.subset)
        if processes.is_main and output.exists() and not (args.overwrite and output.is_file()):
            raise DataError(f"{output} exists: give another --output, or --overwrite to replace that file")
        sources = find_sources(args.teachers, weights, args.project_name)
        teachers = believe_of_teachers(parser, args, [source.teacher for source in networks(sources)])
        for source, teacher in zip(networks(sources), teachers, strict=True):
            source.teacher = teacher
        stores = check_sources(sources, meta, rows, args, machine)

    parts = output.with_name(f"{output.name}.parts")
    with locked(parts / "lock", str(parts)) if processes.is_main else nullcontext():
        if processes.is_main:
            identities = {
                source.name: identity(source, meta, rows, stores, args, machine.device) for source in networks(sources)
            }
            PartFile.remove_others(parts, identities.values())
        for source in networks(sources):
            clips = Clips(meta, rows, stores[source.sampling])
            place_on_device(clips, args.data_on_device, machine.device)
            part = None
            if processes.is_main:
                part = PartFile(parts, identities[source.name], (len(rows), len(meta.scenes)), args.batch_size)
                source.logits = part.logits
            answer(source, clips, part, args, machine)
        if not processes.is_main:
            return {}
        logits, metrics = combine(sources, meta, rows, args.average)
        content = {"files": meta.files[rows].tolist(), "logits": logits, "scenes": list(meta.scenes)}
        provenance = describe(sources, meta, args, len(rows))
        save_checkpoint(output, {"format": FORMAT, **content, "provenance": provenance})
        shutil.rmtree(parts)

    width = max(map(len, metrics))
    print(f"accuracy on the labels of {len(rows)} clips ({args.part}):")
    for name, accuracy in metrics.items():
        print(f"  {name:{width}}  {accuracy:.2%}")
    if args.dataset == "synthetic":
        print(SYNTHETIC_NOTICE)
    print(f"logits are in {output}")
    if args.part != "test":
        print(f"train with them: {training_command(args, output)}")
    return metrics


def part_rows(meta: Meta, part: str, subset: int) -> np.ndarray:
    """Rows of meta.csv (clip,) that get logits."""
    if part == "all":
        return np.arange(len(meta))
    if part == "test":
        return test_rows(meta)
    rows = train_rows(meta)
    return rows if subset == 100 else np.intersect1d(rows, read_split(meta, subset_file(subset)))


def default_output(meta: Meta, part: str, subset: int) -> Path:
    kept = f"_{subset}" if part == "train" and subset != 100 else ""
    return RESOURCES / f"teacher_logits_{meta.root.resolve().name}_{part}{kept}.pt"


def networks(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if source.teacher is not None]


def find_sources(specs: Sequence[str], weights: Sequence[float], project: str) -> list[Source]:
    """All teachers with their files in place; every name is checked before the first download.

    Raises:
        CheckpointError: for a name that stands for nothing.
        DownloadError: when a published file cannot be fetched or was changed.
    """
    found = []
    for spec in specs:
        is_file, provenance = read_provenance(spec)
        path = Path(spec)
        found.append((path.stem, path, provenance) if is_file else find_teacher(spec, project))
    names = [item.name if isinstance(item, TeacherSource) else item[0] for item in found]
    _, *names = unique_names(["ensemble", *names])
    sources = []
    for item, name, weight in zip(found, names, weights, strict=True):
        if isinstance(item, TeacherSource):
            teacher = item.fetch()
            sources.append(Source(name, teacher.path, file_hash(teacher.path, "sha256"), weight, teacher=teacher))
        else:
            _, path, provenance = item
            sources.append(Source(name, path, file_hash(path, "sha256"), weight, provenance=provenance))
    within = ["" if source.teacher is None else source.teacher.within for source in sources]
    check_distinct([(spec, source.path, place) for spec, source, place in zip(specs, sources, within, strict=True)])
    return sources


def read_provenance(spec: str) -> tuple[bool, Any]:
    """Whether `spec` is a file of logits, and what it says of where it comes from."""
    if not Path(spec).is_file():
        return False, None
    try:
        content = read_logits_file(Path(spec))
    except ContentError:
        return False, None  # as a checkpoint it is told what is wrong with it
    if not is_logits(content):
        return False, None
    return True, content.get("provenance") if isinstance(content, dict) else None


def check_sources(
    sources: Sequence[Source], meta: Meta, rows: np.ndarray, args: argparse.Namespace, machine: Machine
) -> dict[int, WaveformStore]:
    """Everything that can be told before the work: files of logits are read, every network answers once.

    Returns:
        The waveform stores by how they are sampled.

    Raises:
        DataError, CheckpointError: for what does not fit, with the file and the clip.
    """
    part = {"train": "training", "test": "test", "all": "listed"}[args.part]
    for source in sources:
        if source.teacher is None:
            source.logits = read_logits(source.path, meta, rows, subset_file, part)
        else:
            loaded = source.teacher.load()
            check_scenes(source.teacher.path, loaded, meta, "take another teacher")
            source.architecture = type(loaded.model).__name__
            source.sampling = sampling_of(loaded.frontend)
            source.shifts = shifts(args.n_shifts, args.max_shift, source.sampling.rate)
    wanted = sorted({source.sampling for source in networks(sources)})
    stores = {sampling: open_store(meta, sampling, args.cache_path) for sampling in wanted}
    for source in networks(sources):
        scorer(source.teacher, source.teacher.load(), stores[source.sampling].n_samples, machine)
    return stores


def shifts(n_shifts: int, max_shift: int, sample_rate: int) -> list[int]:
    """Circular shifts in samples at `sample_rate` Hz, evenly from -max_shift to max_shift (in samples at SHIFT_RATE).

    A single one is 0: the clip as it is.
    """
    largest = max_shift * sample_rate / SHIFT_RATE if n_shifts > 1 else 0.0
    return [round(shift) for shift in np.linspace(-largest, largest, n_shifts).tolist()]


def identity(
    source: Source, meta: Meta, rows: np.ndarray, stores: dict[Sampling, WaveformStore], args: argparse.Namespace,
    device: torch.device,
) -> str:  # fmt: skip
    """Digest of everything that decides the bits of a network's answers: only equal ones are gone on with."""
    everything = {
        "teacher": source.sha256,
        "clips": hashlib.sha256("\n".join(meta.files[rows]).encode()).hexdigest(),
        "store": file_hash(stores[source.sampling].folder / "manifest.json", "sha256"),
        "options": [source.shifts, args.average, args.batch_size, args.precision, args.channels_last],
        "program": [FORMAT, torch.__version__, str(device), source.name if source.teacher.published else ""],
        "frontend": source.stated_frontend,
    }
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:24]


@torch.inference_mode()
def answer(source: Source, clips: Clips, part: PartFile | None, args: argparse.Namespace, machine: Machine) -> None:
    """Lets a network answer for the clips that its part file does not have yet.

    Several processes take whole batches in turn, so their number decides neither the bits nor what can be gone on with.

    Args:
        part: of process 0; None in the others.

    Raises:
        CheckpointError: for logits that are not finite, with the first clip.
    """
    processes = machine.processes
    order = torch.arange(len(clips)).split(args.batch_size)
    n_done, n_batches = processes.gather(part.n_done if part is not None else 0)[0], len(order)
    if n_done:
        log.info("%s: %d of %d batches are there already", source.name, n_done, n_batches)
    if n_done == n_batches:
        return
    model, frontend = scorer(source.teacher, source.teacher.load(), clips.store.n_samples, machine)
    precision = Precision(args.precision, machine.device)
    own = torch.cat([torch.empty(0, dtype=torch.int64), *order[n_done + processes.rank :: processes.size]])
    loader = iter(batches(clips, own, args.batch_size, machine.device, n_ahead=machine.n_ahead) if len(own) else ())
    hidden = None if processes.is_main else True
    with tqdm(total=n_batches, initial=n_done, desc=source.name, unit="batch", disable=hidden) as bar:
        for first in range(n_done, n_batches, processes.size):
            batch, logits = next(loader, None), None
            if batch is not None:
                copies = []
                for shift in source.shifts:
                    log_mel = frontend(batch.waveform.roll(shift, dims=1) if shift else batch.waveform)
                    with precision.autocast():
                        copies.append(model(log_mel).float())  # (batch, class)
                logits = (copies[0] if len(copies) == 1 else mean_logits(copies, average=args.average)).cpu()
            for number, answered in enumerate(processes.gather(logits)[: n_batches - first], start=first):
                bad = torch.nonzero(~answered.isfinite().all(dim=1)).flatten().tolist()
                if bad:
                    raise CheckpointError(
                        f"{source.path} gives logits that are not finite for {len(bad)} of {len(answered)} clips, "
                        f"first {clips.files[number * args.batch_size + bad[0]]}: use --precision fp32, or another "
                        "teacher"
                    )
                if part is not None:
                    part.write(answered)
                bar.update()


def combine(sources: Sequence[Source], meta: Meta, rows: np.ndarray, average: str) -> tuple[Tensor, dict[str, float]]:
    """The mean (clip, class) float16, and the accuracy of each teacher and of the ensemble.

    Raises:
        DataError: when the mean leaves the range of float16, with the first clip.
    """
    result = torch.empty(len(rows), len(meta.scenes), dtype=torch.float16)
    n_correct = dict.fromkeys([*(source.name for source in sources), "ensemble"], 0)
    for start in range(0, len(rows), BLOCK_ROWS):  # so that the teachers' number does not decide the memory
        block = slice(start, start + BLOCK_ROWS)
        scene = torch.from_numpy(meta.scene[rows[block]])
        tables = [torch.from_numpy(np.array(source.logits[block])) for source in sources]
        mean = mean_logits(tables, [source.weight for source in sources], average)
        result[block] = mean.half()
        for name, table in zip(n_correct, [*tables, mean], strict=True):
            n_correct[name] += int((table.argmax(dim=1) == scene).sum())
    bad = torch.nonzero(~result.isfinite().all(dim=1)).flatten().tolist()
    if bad:
        raise DataError(
            f"the mean of the logits leaves the range of 16-bit floats for {len(bad)} of {len(rows)} clips, first "
            f"{meta.files[rows[bad[0]]]}: leave out the teacher that is so sure"
        )
    return result, {name: count / len(rows) for name, count in n_correct.items()}


def describe(sources: Sequence[Source], meta: Meta, args: argparse.Namespace, n_clips: int) -> dict[str, Any]:
    """Where the logits come from, in plain values."""
    return {
        "teachers": [source.describe() for source in sources],
        "average": args.average,
        "n_shifts": args.n_shifts,
        "max_shift": args.max_shift,
        "precision": args.precision,
        "data_set": meta.root.resolve().name,
        "part": args.part,
        "subset": args.subset,
        "n_clips": n_clips,
        "torch_version": str(torch.__version__),
    }


def training_command(args: argparse.Namespace, output: Path) -> str:
    words = ["python", "run_training.py"]
    words += ["--dataset", args.dataset] if args.dataset != "tau22" else []
    words += ["--dataset_dir", args.dataset_dir] if args.dataset_dir else []
    words += ["--subset", str(args.subset)] if args.subset != 100 else []
    return shlex.join([*words, "--teacher_logits", str(output)])


if __name__ == "__main__":
    cli.run(main)
