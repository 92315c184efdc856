"""Scores published or own teachers on the test part; several of them alone and as an ensemble.

  python run_teacher_validation.py --model_name passt_dirfms_1            a published teacher, fetched once
  python run_teacher_validation.py --model_name passt_fms_1 cpr_128k_fms_1
  python run_teacher_validation.py --checkpoint <id> weights.pt           own runs and local files

Published teachers: passt_dirfms_1..3, passt_fms_1..3 (PaSST), cpr_128k_dirfms_1..3, cpr_128k_fms_1..3 (CP-ResNet).
Files may also hold BEATs, in its authors' form or as a checkpoint of easy_dcase_task1. Front end, sampling rate and
network follow from the teacher. Under torchrun the processes share out the clips.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
from collections.abc import Mapping
import logging
import sys

from torch import Tensor

from datasets.synthetic import SYNTHETIC_NOTICE
from datasets.tau import read_meta
from helpers import cli
from helpers.checkpoints.checkpoint import check_scenes
from helpers.checkpoints.stated import add_stated_options, believe_of_teachers
from helpers.evaluate.uncertainty import differences, intervals, mcnemar
from helpers.data import Data, DataConfig, dataset_root, load_data, place_on_device
from helpers.loop import predict
from helpers.machine import open_machine
from helpers.metrics import score
from helpers.options import add_compute_options, add_data_options
from helpers.parts import STUDENT, Parts
from helpers.recipes import parse
from helpers.report.report import metric_tables
from helpers.report.text import align
from helpers.runs.logger import LOGGERS
from helpers.runs.run import open_logger
from models.device_models import DeviceModels
from helpers.teachers import TeacherSource, find_teachers, mean_logits, scorer

log = logging.getLogger(__name__)


def make_parser(chosen: Parts = STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(
        __doc__,
        prog="run_teacher_validation.py",
        usage="python %(prog)s [--model_name NAME ...] [--checkpoint X ...]",
    )
    teachers = parser.add_argument_group("teachers")
    teachers.add_argument("--model_name", nargs="+", default=["passt_dirfms_1"], metavar="NAME",
                          help="published ones; --checkpoint alone switches the default off")  # fmt: skip
    teachers.add_argument("--checkpoint", nargs="+", default=[], metavar="X", help="ids of own runs, or files")
    teachers.add_argument("--general", action=cli.OnOff,
                          help="leave out the networks for single recording devices that a file may hold")  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument(
        "--project_name", default="DCASE23_Task1", help="project of the logger, and folder of all its runs"
    )
    run.add_argument("--experiment_name", default="CPJKU_Teacher_Validation", help="name shown by the logger")
    run.add_argument("--logger", nargs="+", choices=[*LOGGERS], default=["wandb"], help="one or more")
    run.add_argument("--batch_size", type=cli.number(int, 1), default=32)
    run.add_argument("--n_rounds", type=cli.number(int, 0, 1_000_000), default=10_000,
                     help="draws of recordings for confidence intervals; 0 is off")  # fmt: skip
    add_data_options(parser)
    add_compute_options(parser)
    add_stated_options(parser, chosen, with_network=False)
    parser.set_defaults(data_on_device="no")  # a clip is read once
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser, args = parse(make_parser, sys.argv[1:] if argv is None else argv)
    with cli.option_errors(parser):
        config = cli.config_from(args, DataConfig)
    machine = open_machine(parser, args)
    processes = machine.processes
    names = args.model_name if not args.checkpoint or "model_name" in args.given else []
    data: dict[int, Data] = {}
    with processes.main_first():
        sources = find_teachers([*names, *args.checkpoint], args.project_name)
        sources = believe_of_teachers(parser, args, sources)
        rates = check_all(sources, config)
        for rate in sorted(set(rates)):
            data[rate] = load_data(config, rate, seed=0)
    processes.check_share(len(data[rates[0]].test), "test clips")
    for part in data.values():
        place_on_device(part.test, args.data_on_device, machine.device)
    for source, rate in zip(sources, rates, strict=True):  # not kept: twelve would take gigabytes
        scorer(source, source.load(), data[rate].store.n_samples, machine)

    metrics: dict[str, float] = {}
    answers: dict[str, Tensor] = {}
    with open_logger(processes, args) as logger:
        for source, rate in zip(sources, rates, strict=True):
            part = data[rate]
            log.info("scoring %s (%s) on %d test clips at %d Hz", source.name, source.path, len(part.test), rate)
            model, frontend = scorer(source, source.load(), part.store.n_samples, machine)
            answers[source.name] = predict(model, frontend, part.test, machine)
            own = source.load().device_models
            if own and not args.general:
                by_device = DeviceModels(model, {device: machine.take(network) for device, network in own.items()})
                answers[f"{source.name}_by_device"] = predict(by_device, frontend, part.test, machine)
        if len(sources) > 1:
            answers["ensemble"] = mean_logits([answers[source.name] for source in sources])
        part = data[rates[0]]
        for name, logits in answers.items():
            metrics |= {f"{name}/test/{key}": value for key, value in score(part.test, logits, part.groups).items()}
        logger.write(0, metrics)

    if processes.is_main:
        for name in answers:
            print(f"{metric_tables(metrics, f'{name}/test')}\n")
        print(summary(metrics, list(answers)))
        if args.n_rounds:
            print("\n".join(["", *comparisons(part, answers, args.n_rounds)]))
        if args.dataset == "synthetic":
            print(SYNTHETIC_NOTICE)
        print(f"metrics are in {logger.dir}")
    return metrics


def check_all(sources: list[TeacherSource], config: DataConfig) -> list[int]:
    """Loads every teacher once, so that a file that does not fit is told before any work; their sampling rates in Hz.

    Raises:
        CheckpointError: for a file that is damaged or foreign, or a teacher of other scenes.
    """
    meta = read_meta(dataset_root(config))
    rates = []
    for source in sources:
        loaded = source.load()
        check_scenes(source.path, loaded, meta, "take another teacher")
        rates.append(loaded.frontend.sample_rate)
    return rates


def comparisons(data: Data, answers: Mapping[str, Tensor], n_rounds: int) -> list[str]:
    """Macro-average accuracies with their 95 % intervals, and what the others have more or less than the first."""
    clips, key = data.test, "macro_avg_acc"
    if len(set(clips.meta.recording[clips.rows])) < 2:
        return ["the test part is a single recording, which tells nothing about how sure its scores are"]
    lines = [f"macro %, 95 % interval of {n_rounds:,} draws of recordings; the difference to the first; McNemar's p"]
    rows, first = [], next(iter(answers.values()))
    for name, logits in answers.items():
        one = intervals(clips, logits, data.groups, n_rounds)[key]
        row = [name, f"{100 * one.value:.2f}", f"[{100 * one.low:.2f}, {100 * one.high:.2f}]"]
        if logits is not first:
            more = differences(clips, first, logits, data.groups, n_rounds)[key]
            row += [f"{100 * more.value:+.2f}", f"[{100 * more.low:+.2f}, {100 * more.high:+.2f}]"]
            row += [f"{mcnemar(clips, first, logits):.2g}"]
        rows.append([*row, *[""] * (6 - len(row))])
    return [*lines, *(line.rstrip() for line in align(rows))]


def summary(metrics: dict[str, float], names: list[str]) -> str:
    """Accuracies in percent, a line for each teacher."""
    groups = [group for group in ("real", "seen", "unseen") if f"{names[0]}/test/acc/{group}" in metrics]
    header = ["teacher", "acc %", "macro %", *(f"{group} %" for group in groups), "log loss"]
    rows = [header]
    for name in names:
        keys = ["acc", "macro_avg_acc", *(f"acc/{group}" for group in groups)]
        rows.append(
            [
                name,
                *(f"{100 * metrics[f'{name}/test/{key}']:.2f}" for key in keys),
                f"{metrics[f'{name}/test/loss']:.3f}",
            ]
        )
    return "\n".join(align(rows))


if __name__ == "__main__":
    cli.run(main)
