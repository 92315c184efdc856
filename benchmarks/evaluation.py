"""Time of an evaluation beside what its network and front end take alone, and of the page about 29,680 answers.

  python benchmarks/evaluation.py                      the student, 1,200 clips of noise at 32 kHz
  python benchmarks/evaluation.py --n_clips 4000 --rounds 5

The baseline runs network and front end over the same batches, which lie in memory as floats; both sides take turns.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.intervals import make_part
from benchmarks.training_step import write_recordings
from datasets.cache import open_store
from datasets.tau import DEVICE_GROUPS, Meta, read_meta
from datasets.waveforms import Clips, batches
from helpers.data import Data
from helpers.evaluate.scoring import compare
from helpers.loop import predict
from helpers.machine import Machine
from helpers.report.page import write_page
from helpers.report.sections import Entry
from models import default_frontend, get_frontend, get_model


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_clips", type=int, default=1200, help="that a network answers")
    parser.add_argument("--n_answers", type=int, default=29_680, help="that the page is about")
    parser.add_argument("--n_rounds", type=int, default=10_000, help="draws of recordings")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    found = overhead(args) | page(args)
    for name, value in found.items():
        print(f"{name:<44}{value:>10.3f}")
    return found


def overhead(args: argparse.Namespace) -> dict[str, float]:
    """Seconds for all clips of a part, with the loop of the scripts and without."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "noise"
        write_recordings(root, args.n_clips, rate=32000)  # that of the front end
        return _overhead(args, read_meta(root), Path(folder) / "cache")


def _overhead(args: argparse.Namespace, meta: Meta, cache: Path) -> dict[str, float]:
    model, machine = get_model("cp_mobile").eval(), Machine(batch_size=64)
    name, options = default_frontend("cp_mobile")
    frontend = get_frontend(name, **options).eval()
    model = machine.take(model)
    clips = Clips(meta, np.arange(len(meta)), open_store(meta, frontend.sample_rate, cache, progress=False))
    waveforms = [batch.waveform for batch in batches(clips, torch.arange(len(clips)), 64, machine.device)]

    def alone() -> None:
        with torch.inference_mode():
            for waveform in waveforms:
                model(frontend(waveform))

    sides = {"network and front end alone, s": alone, "evaluation, s": lambda: predict(model, frontend, clips, machine)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(args.rounds + 1):
        for side, work in sides.items():
            started = time.perf_counter()
            work()
            if i:  # the first warms up
                seconds[side].append(time.perf_counter() - started)
    found = {side: statistics.median(times) for side, times in seconds.items()}
    ratios = [ours / plain for plain, ours in zip(*seconds.values(), strict=True)]
    return found | {"evaluation / alone": statistics.median(ratios)}


def page(args: argparse.Namespace) -> dict[str, float]:
    """Seconds for the statistics and the page, and its size."""
    clips = make_part(args.n_answers)
    data = Data(clips.meta, None, clips, None, clips, DEVICE_GROUPS)
    answers = {name: torch.randn(len(clips), len(clips.meta.scenes)) for name in ("first", "second")}
    started = time.perf_counter()
    compared = compare(data, answers, args.n_rounds)
    found = {"intervals and difference of two, s": time.perf_counter() - started}
    entries = {name: Entry(logits) for name, logits in answers.items()}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = write_page(Path(folder), data, entries, "benchmark", compared=compared)
        found["page about both, s"] = time.perf_counter() - started
        found["page about both, MB"] = path.stat().st_size / 1e6
    return found


if __name__ == "__main__":
    main()
