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
import sys

from datasets.synthetic import SYNTHETIC_NOTICE
from helpers import cli
from helpers.checkpoints.stated import add_stated_options, believe_of_teachers
from helpers.data import DataConfig
from helpers.evaluate.pages import write_page_of
from helpers.evaluate.scoring import answers_of, compare, comparisons, load_for, scores_of, summary
from helpers.evaluate.systems import NetworkSystem, Treatment, TreatmentConfig
from helpers.machine import open_machine
from helpers.options import add_compute_options, add_data_options
from helpers.parts import STUDENT, Parts
from helpers.recipes import parse
from helpers.report.report import metric_tables
from helpers.report.results import results_of
from helpers.runs.logger import LOGGERS
from helpers.runs.run import open_logger
from helpers.teachers import find_teachers


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
    names = args.model_name if not args.checkpoint or "model_name" in args.given else []
    with machine.processes.main_first():
        sources = find_teachers([*names, *args.checkpoint], args.project_name)
        sources = believe_of_teachers(parser, args, sources)
    treatment = Treatment(TreatmentConfig(general=args.general))
    systems = [NetworkSystem(source, treatment) for source in sources]
    data = load_for(systems, config, machine, args.data_on_device)
    part = next(iter(data.values()))
    with open_logger(machine.processes, args) as logger:
        answers = answers_of(systems, data, machine)
        metrics = scores_of(part, answers)
        logger.write(0, metrics)
        if machine.processes.is_main:
            compared = compare(part, answers, args.n_rounds)
            note = SYNTHETIC_NOTICE if args.dataset == "synthetic" else ""
            command = ["run_teacher_validation.py", *(sys.argv[1:] if argv is None else argv)]
            page = write_page_of(logger.dir, part, systems, answers, compared, command, note)
            logger.show(results_of(part, next(iter(answers.values())), metrics, logger.dir))

    if machine.processes.is_main:
        for name in answers:
            print(f"{metric_tables(metrics, f'{name}/test')}\n")
        print(summary(metrics, list(answers), "teacher"))
        if args.n_rounds:
            print("\n".join(["", *comparisons(compared, args.n_rounds)]))
        if note:
            print(note)
        print(f"metrics are in {logger.dir}, the report is {page}")
    return metrics


if __name__ == "__main__":
    cli.run(main)
