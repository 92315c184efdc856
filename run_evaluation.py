"""Tells in which scene a recording was made.

  python run_evaluation.py recording.wav                          the published student of CP-JKU 2023, fetched once
  python run_evaluation.py --model <id> recordings/ talk.mp3      an own run; folders, any format, rate and length
  python run_evaluation.py --model best.pt long.flac --output scenes.csv
  arecord -f S16_LE -r 44100 -t raw | python run_evaluation.py -  raw samples, answered as they come

A recording is cut into windows as long as the clips that the network was trained on, --hop seconds apart; what is left
at the end is answered with a window that ends with the recording, and a shorter recording is repeated until it fills
one. The answer for a recording is the mean of its windows' probabilities, the softmax of the logits.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch

from datasets.files import replacing
from datasets.tau import DataError
from helpers import cli
from helpers.checkpoints.stated import add_stated_options, believe_of_teachers
from helpers.evaluate.recordings import PCM, find_recordings, read_pcm, read_recording, windows
from helpers.machine import open_machine
from helpers.options import add_compute_options
from helpers.parts import STUDENT, Parts
from helpers.recipes import parse
from helpers.report.text import align
from helpers.teachers import find_teacher, scorer

BATCH = 32  # windows that a network answers at once
UNKNOWN = "unknown"
BAR = 24  # characters of a probability of 1


@dataclass(frozen=True)
class Answer:
    """What a network says of a window: seconds from `start` to `end`, and probabilities (class,)."""

    start: float
    end: float
    probabilities: np.ndarray


@dataclass(frozen=True)
class Listener:
    """A network with its front end, ready to answer."""

    model: torch.nn.Module
    frontend: torch.nn.Module
    scenes: tuple[str, ...]
    n_samples: int
    hop: int
    temperature: float
    unknown_below: float
    device: torch.device

    def name(self, probabilities: np.ndarray) -> str:
        """The most likely scene, or that it is not known."""
        best = int(probabilities.argmax())
        return self.scenes[best] if probabilities[best] >= self.unknown_below else UNKNOWN

    @torch.inference_mode()
    def answers(self, pieces: Iterator[np.ndarray], batch: int = BATCH) -> Iterator[Answer]:
        """Answers the windows of a recording, a batch at a time."""
        waiting, rate = windows(pieces, self.n_samples, self.hop), self.frontend.sample_rate
        while some := list(islice(waiting, batch)):
            waveform = torch.from_numpy(np.stack([window.samples for window in some])).to(self.device)
            logits = self.model(self.frontend(waveform)).float() / self.temperature
            for window, row in zip(some, logits.softmax(dim=1).cpu().numpy(), strict=True):
                yield Answer(window.start / rate, window.end / rate, row)


def make_parser(chosen: Parts = STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, prog="run_evaluation.py", usage="python %(prog)s [--model NAME] RECORDING [...]")
    parser.add_argument("recordings", nargs="+", metavar="RECORDING", help="files, folders, or - for raw samples")
    network = parser.add_argument_group("network")
    network.add_argument("--model", dest="network", default="cpjku2023", metavar="NAME",
                         help="a published network, the id of a run, or a checkpoint")  # fmt: skip
    network.add_argument("--project_name", default="DCASE23_Task1", help="folder of the runs")
    network.add_argument("--temperature", type=cli.number(float, 0, above=True),
                         help="divides the logits: above 1 for a network that is surer than it is right (default: "
                              "what training with --val_fraction has found, else 1)")  # fmt: skip
    cut = parser.add_argument_group("windows")
    cut.add_argument("--window", type=cli.number(float, 0, above=True), metavar="SECONDS",
                     help="length of a window (default: of the clips that the network was trained on)")  # fmt: skip
    cut.add_argument("--hop", type=cli.number(float, 0, above=True), metavar="SECONDS",
                     help="from window to window (default: a window)")  # fmt: skip
    out = parser.add_argument_group("answers")
    out.add_argument("--top", type=cli.number(int, 1), default=3, help="scenes that are printed for a recording")
    out.add_argument("--unknown_below", type=cli.number(float, 0, 1), default=0.0, metavar="P",
                     help="answer unknown where the most likely scene has a smaller probability")  # fmt: skip
    out.add_argument("--output", metavar="FILE", help="also write all probabilities of all windows: .csv or .json")
    raw = parser.add_argument_group("raw samples on standard input")
    raw.add_argument("--pcm_format", choices=[*PCM], default="s16le", help="of a sample")
    raw.add_argument("--pcm_rate", type=cli.number(int, 100, 768_000), default=44100, help="in Hz")
    raw.add_argument("--pcm_channels", type=cli.number(int, 1, 64), default=1, help="that take turns")
    add_compute_options(parser)
    add_stated_options(parser, chosen, with_network=False)
    parser.set_defaults(batch_size=BATCH, num_workers=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Answers every recording; status 1 when some of a folder could not be read."""
    parser, args = parse(make_parser, sys.argv[1:] if argv is None else argv)
    if args.output is not None and Path(args.output).suffix not in (".csv", ".json"):
        parser.error(f"--output {args.output}: must end in .csv or .json")
    if args.recordings.count("-") and len(args.recordings) > 1:
        parser.error("- stands for standard input and goes alone")
    listener = open_listener(parser, args)
    if args.recordings == ["-"]:
        return listen(args, listener)
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
            answers = list(listener.answers(read_recording(file, listener.frontend.sample_rate)))
        except DataError as error:
            message = str(error) if str(file) in str(error) else f"{file} {error}"
            if not is_in_folder:
                raise DataError(message) from error
            print(f"error: {message}", file=sys.stderr)
            n_broken += 1
            continue
        answered[str(file)] = answers
        print("\n".join(described(str(file), answers, listener, args.top)), flush=True)
    if skipped:
        print(f"{skipped} files that are no audio were left out")
    if args.output is not None:
        write_answers(Path(args.output), answered, listener)
        print(f"all probabilities are in {args.output}")
    return 1 if n_broken else 0


def open_listener(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Listener:
    """The network that the options name, proved on silence."""
    source = find_teacher(args.network, args.project_name).fetch()
    (source,) = believe_of_teachers(parser, args, [source])
    loaded, machine = source.load(), open_machine(parser, args)
    rate = loaded.frontend.sample_rate
    n_samples = loaded.content.get("clip_samples", rate) if args.window is None else round(args.window * rate)
    hop = n_samples if args.hop is None else max(1, round(args.hop * rate))
    model, frontend = scorer(source, loaded, n_samples, machine)
    scenes = loaded.scenes or tuple(f"class {i}" for i in range(loaded.model.config.n_classes))
    temperature = args.temperature or loaded.content.get("temperature", 1.0)
    return Listener(model, frontend, scenes, n_samples, hop, temperature, args.unknown_below, machine.device)


def listen(args: argparse.Namespace, listener: Listener) -> int:
    """Answers standard input, a line for each window as it comes; Ctrl-C ends it."""
    if args.output is not None:
        raise DataError("--output is for files; what is answered from standard input goes to standard output")
    rate = listener.frontend.sample_rate
    pieces = read_pcm(sys.stdin.buffer, args.pcm_format, args.pcm_rate, args.pcm_channels, rate)
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


def described(name: str, answers: Sequence[Answer], listener: Listener, n_top: int) -> list[str]:
    """Lines for people: the most likely scenes of a recording, and over time where it has several windows."""
    mean = np.mean([answer.probabilities for answer in answers], axis=0)
    best = np.argsort(-mean)[:n_top]
    rows = [[listener.scenes[i], f"{mean[i]:.2f}", "#" * round(BAR * mean[i])] for i in best]
    lines = [f"{name} ({answers[-1].end:.1f} s)"]
    if listener.name(mean) == UNKNOWN:
        lines[0] += f": {UNKNOWN}, the most likely are"
    lines += [f"  {line.rstrip()}" for line in align([[a, b, c.ljust(BAR)] for a, b, c in rows])]
    if len(answers) > 1:
        spans = []
        for scene, group in groupby(answers, key=lambda answer: listener.name(answer.probabilities)):
            same = list(group)
            sure = np.mean([answer.probabilities.max() for answer in same])
            spans.append([f"{clock(same[0].start)} - {clock(same[-1].end)}", scene, f"{sure:.2f}"])
        lines += ["  over time:", *(f"    {line}" for line in align(spans, n_left=2))]
    return lines


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are some."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def write_answers(path: Path, answered: dict[str, list[Answer]], listener: Listener) -> None:
    """All windows as a table, a line each, or as JSON by recording."""
    scenes = listener.scenes
    with replacing(path) as file:
        if path.suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "start", "end", "scene", "probability", *scenes])
            for name, answers in answered.items():
                for one in answers:
                    values = [f"{value:.6f}" for value in (one.probabilities.max(), *one.probabilities)]
                    scene = listener.name(one.probabilities)
                    writer.writerow([name, f"{one.start:.3f}", f"{one.end:.3f}", scene, *values])
            return
        content = []
        for name, answers in answered.items():
            spans = [
                {"start": one.start, "end": one.end, "probabilities": _by_scene(one.probabilities, scenes)}
                for one in answers
            ]
            mean = np.mean([one.probabilities for one in answers], axis=0)
            content.append({"file": name, "scene": listener.name(mean),
                            "probabilities": _by_scene(mean, scenes), "windows": spans})  # fmt: skip
        json.dump(content, file, indent=1)


def _by_scene(probabilities: np.ndarray, scenes: Sequence[str]) -> dict[str, float]:
    return {scene: round(float(value), 6) for scene, value in zip(scenes, probabilities, strict=True)}


if __name__ == "__main__":
    cli.run(main)
