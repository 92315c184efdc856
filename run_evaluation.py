"""Tells in which scene a recording was made, and scores networks and other systems on a data set.

  python run_evaluation.py recording.wav                          the published student of CP-JKU 2023, fetched once
  python run_evaluation.py --model <id> recordings/ talk.mp3      an own run; folders, any format, rate and length
  arecord -f S16_LE -r 44100 -t raw | python run_evaluation.py -  raw samples, answered as they come

  python run_evaluation.py --model <id> --dataset_dir TAU         no recordings: scores on the data set's test part
  python run_evaluation.py --model <id> --compare best.pt network_int8.onnx answers.csv --dataset_dir TAU
                                                                  several, alone and together
  python run_evaluation.py --model sp4asc_focal --fold without_eps --precision fp16_weights --n_tta 30 \\
                           --dataset_dir TAU20                    as SP4ASC was scored

Recordings are cut into windows as long as the clips that the network was trained on, --hop seconds apart; what is left
at the end is answered with a window that ends with the recording, and a shorter one is repeated until it fills one. The
answer for a recording is the mean of its windows' probabilities, the softmax of the logits. Where folders or names in
TAU's pattern tell the scenes of recordings, those that are right are counted.

What is scored: published networks, ids of runs, checkpoints, exported .onnx and .pte files, tables of answers (ours and
those handed in to the challenge) and plain arrays of them in the order of the test part. Of an evaluation set without
labels, the answers are written and nothing is scored.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import logging
import os
import sys
from pathlib import Path

import numpy as np

from datasets.cache import open_store
from datasets.synthetic import SYNTHETIC_NOTICE
from datasets.tau import DataError, is_evaluation_set, read_evaluation
from datasets.waveforms import UnlabelledClips
from helpers import cli
from helpers.checkpoints.stated import add_stated_options, believe_of_teachers
from helpers.data import DataConfig, dataset_root
from helpers.evaluate.listener import UNKNOWN, Answer, Listener, clock, described, right_ones, write_answers
from helpers.evaluate.pages import write_page_of
from helpers.evaluate.predictions import write_predictions
from helpers.evaluate.recordings import PCM, find_recordings, read_pcm, read_recording
from helpers.evaluate.scoring import ENSEMBLES, answers_of, compare, comparisons, load_for, scores_of, summary
from helpers.evaluate.systems import System, Treatment, TreatmentConfig, find_systems
from helpers.evaluate.test_time import TestTimeConfig
from helpers.machine import Machine, open_machine
from helpers.options import add_compute_options, add_data_options
from helpers.parts import STUDENT, Parts
from helpers.recipes import parse
from helpers.report.report import metric_tables
from helpers.report.results import results_of
from helpers.runs.logger import LOGGERS
from helpers.runs.run import open_logger

log = logging.getLogger(__name__)


def make_parser(chosen: Parts = STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, prog="run_evaluation.py", usage="python %(prog)s [--model NAME ...] [RECORDING ...]")
    parser.add_argument("recordings", nargs="*", metavar="RECORDING", help="files, folders, or - for raw samples")
    system = parser.add_argument_group("systems")
    system.add_argument("--model", dest="network", default="cpjku2023", metavar="NAME",
                        help="a published network, the id of a run, a checkpoint, an exported file; to be scored also "
                             "a table or array of answers")  # fmt: skip
    system.add_argument("--compare", nargs="+", default=[], metavar="NAME",
                        help="further ones to score beside it, and together")  # fmt: skip
    system.add_argument("--project_name", default="DCASE23_Task1", help="folder of the runs")
    system.add_argument("--temperature", type=cli.number(float, 0, above=True),
                        help="divides the logits: above 1 for a network that is surer than it is right (default: "
                             "what training with --val_fraction has found, else 1)")  # fmt: skip
    cli.add_config_arguments(parser, "how networks are run", TreatmentConfig)
    cli.add_config_arguments(parser, "test-time augmentation", TestTimeConfig)
    cut = parser.add_argument_group("recordings")
    cut.add_argument("--window", type=cli.number(float, 0, above=True), metavar="SECONDS",
                     help="length of a window (default: of the clips that the network was trained on)")  # fmt: skip
    cut.add_argument("--hop", type=cli.number(float, 0, above=True), metavar="SECONDS",
                     help="from window to window (default: a window)")  # fmt: skip
    cut.add_argument("--top", type=cli.number(int, 1), default=3, help="scenes that are printed for a recording")
    cut.add_argument("--unknown_below", type=cli.number(float, 0, 1), default=0.0, metavar="P",
                     help="answer unknown where the most likely scene has a smaller probability")  # fmt: skip
    cut.add_argument("--output", metavar="FILE", help="also write all probabilities of all windows: .csv or .json")
    raw = parser.add_argument_group("raw samples on standard input")
    raw.add_argument("--pcm_format", choices=[*PCM], default="s16le", help="of a sample")
    raw.add_argument("--pcm_rate", type=cli.number(int, 100, 768_000), default=44100, help="in Hz")
    raw.add_argument("--pcm_channels", type=cli.number(int, 1, 64), default=1, help="that take turns")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--ensemble", choices=ENSEMBLES, default="logits",
                        help="what is averaged where several systems answer together")  # fmt: skip
    scores.add_argument("--n_rounds", type=cli.number(int, 0, 1_000_000), default=10_000,
                        help="draws of recordings for confidence intervals; 0 is off")  # fmt: skip
    scores.add_argument("--experiment_name", default="evaluation", help="name shown by the logger")
    scores.add_argument("--logger", nargs="+", choices=[*LOGGERS], default=["none"], help="one or more")
    scores.add_argument("--batch_size", type=cli.number(int, 1), default=64)
    add_data_options(parser)
    add_compute_options(parser)
    add_stated_options(parser, chosen, with_network=False)
    parser.set_defaults(data_on_device="no")  # a clip is read once
    return parser


def main(argv: list[str] | None = None) -> int | dict[str, float]:
    """Answers every recording (status 1 when some of a folder could not be read), or returns all metrics."""
    parser, args = parse(make_parser, sys.argv[1:] if argv is None else argv)
    if args.output is not None and Path(args.output).suffix not in (".csv", ".json"):
        parser.error(f"--output {args.output}: must end in .csv or .json")
    if args.recordings.count("-") and len(args.recordings) > 1:
        parser.error("- stands for standard input and goes alone")
    if args.recordings and args.compare:
        parser.error("--compare is for scores on a data set: leave the recordings away, or it")
    if not (args.recordings or args.dataset_dir or os.environ.get("TAU22_DIR") or args.dataset == "synthetic"):
        parser.error("name recordings to listen to, or a data set to score on: --dataset_dir, or --dataset synthetic")
    args.argv = sys.argv[1:] if argv is None else argv
    with cli.option_errors(parser):
        config = cli.config_from(args, DataConfig)
        treatment = Treatment(
            cli.config_from(args, TreatmentConfig), cli.config_from(args, TestTimeConfig), args.temperature
        )
    machine = open_machine(parser, args)
    with machine.processes.main_first():
        systems = find_systems(
            [args.network, *args.compare],
            args.project_name,
            treatment,
            lambda sources: believe_of_teachers(parser, args, sources),
        )
    if args.recordings:
        return listen(args, open_listener(args, systems[0], machine))
    root = dataset_root(config)
    if is_evaluation_set(root):
        return answer_evaluation_set(args, root, systems, machine)
    return score_all(args, config, systems, machine)


# ---- recordings -----------------------------------------------------------------------------------------------------


def open_listener(args: argparse.Namespace, system: System, machine: Machine) -> Listener:
    """The network ready to answer windows, proved on silence."""
    model, frontend = system.open(machine)
    rate = system.sampling.rate
    n_samples = system.n_samples if args.window is None else round(args.window * rate)
    hop = n_samples if args.hop is None else max(1, round(args.hop * rate))
    system.prove(n_samples)
    return Listener(model, frontend, system.scenes, system.sampling, n_samples, hop, args.unknown_below, machine.device)


def listen(args: argparse.Namespace, listener: Listener) -> int:
    """Answers files and folders; 1 when some of a folder could not be read."""
    if args.recordings == ["-"]:
        return follow(args, listener)
    files, skipped = [], 0
    for name in args.recordings:
        found, others = find_recordings(Path(name))
        if not found:
            raise DataError(f"{name} holds no audio files")
        files += [(file, Path(name).is_dir()) for file in found]
        skipped += others
    answered: dict[str, list[Answer]] = {}
    n_broken = 0
    for file, is_in_folder in files:
        try:
            answers = list(listener.answers(read_recording(file, listener.sampling)))
        except DataError as error:
            message = str(error) if str(file) in str(error) else f"{file} {error}"
            if not is_in_folder:
                raise DataError(message) from error
            print(f"error: {message}", file=sys.stderr)
            n_broken += 1
            continue
        answered[str(file)] = answers
        print("\n".join(described(str(file), answers, listener, args.top)), flush=True)
    if (right := right_ones(answered, listener)) is not None:
        print(right)
    if skipped:
        print(f"{skipped} files that are no audio were left out")
    if args.output is not None:
        write_answers(Path(args.output), answered, listener)
        print(f"all probabilities are in {args.output}")
    return 1 if n_broken else 0


def follow(args: argparse.Namespace, listener: Listener) -> int:
    """Answers standard input, a line for each window as it comes; Ctrl-C ends it."""
    if args.output is not None:
        raise DataError("--output is for files; what is answered from standard input goes to standard output")
    pieces = read_pcm(sys.stdin.buffer, args.pcm_format, args.pcm_rate, args.pcm_channels, listener.sampling)
    try:
        for answer in listener.answers(pieces, batch=1):
            best = np.argsort(-answer.probabilities)[: args.top]
            words = "  ".join(f"{listener.scenes[i]} {answer.probabilities[i]:.2f}" for i in best)
            if listener.name(answer.probabilities) == UNKNOWN:
                words = f"{UNKNOWN}: {words}"
            print(f"{clock(answer.start)} - {clock(answer.end)}  {words}", flush=True)
    except KeyboardInterrupt:
        print()
    except DataError as error:
        raise DataError(f"standard input {error}" if "standard input" not in str(error) else str(error)) from error
    return 0


# ---- data sets ------------------------------------------------------------------------------------------------------


def score_all(
    args: argparse.Namespace, config: DataConfig, systems: list[System], machine: Machine
) -> dict[str, float]:
    """Scores the systems on the test part, prints and writes what there is to say; all metrics."""
    data = load_for(systems, config, machine, args.data_on_device)
    part = next(iter(data.values()))
    with open_logger(machine.processes, args) as logger:
        answers = answers_of(systems, data, machine, args.ensemble)
        metrics = scores_of(part, answers)
        logger.write(0, metrics)
        if machine.processes.is_main:
            compared = compare(part, answers, args.n_rounds)
            for name, logits in answers.items():
                write_predictions(logger.dir / f"{name}.csv", part.test.files, logits, part.meta.scenes)
                print(f"{metric_tables(metrics, f'{name}/test')}\n")
            print(summary(metrics, list(answers)))
            if args.n_rounds:
                print("\n".join(["", *comparisons(compared, args.n_rounds)]))
            if args.dataset == "synthetic":
                print(SYNTHETIC_NOTICE)
            note, command = SYNTHETIC_NOTICE if args.dataset == "synthetic" else "", ["run_evaluation.py", *args.argv]
            page = write_page_of(logger.dir, part, systems, answers, compared, command, note)
            logger.show(results_of(part, next(iter(answers.values())), metrics, logger.dir))
            print(f"metrics, answers and report are in {logger.dir}: {page}")
    return metrics


def answer_evaluation_set(args: argparse.Namespace, root: Path, systems: list[System], machine: Machine) -> int:
    """Writes the answers of the systems for a list of clips without labels."""
    clips = read_evaluation(root)
    with open_logger(machine.processes, args) as logger:
        for system in systems:
            if system.sampling is None:
                raise DataError(f"{system.path} holds answers already, and {root} has no labels to score them with")
            with machine.processes.main_first():
                store = open_store(clips, system.sampling, args.cache_path)
            system.prove(store.n_samples)
            for name, logits in system.answers(UnlabelledClips(clips, store), machine).items():
                if machine.processes.is_main:
                    path = logger.dir / f"{name}.csv"
                    write_predictions(path, clips.files, logits, system.scenes)
                    print(f"{len(clips):,} answers are in {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
