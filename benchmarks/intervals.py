"""Time of the confidence intervals of a whole test part: 29,680 clips of 2,968 recordings, all scores at once.

  python benchmarks/intervals.py                       10,000 rounds, one system and the difference of two;
                                                       details: each scene on each device, confusions, calibration

The baseline draws clips instead of recordings and scores each draw anew, as a plain loop does; for few rounds, scaled
up.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.tau import CITIES, DEVICE_GROUPS, RECORDING_DEVICES, SCENES, Meta
from datasets.waveforms import Clips
from helpers.evaluate.uncertainty import differences, intervals
from helpers.metrics import score


def make_part(n_clips: int) -> Clips:
    rng = np.random.default_rng(0)
    recording = np.arange(n_clips) // 10
    of_recording = [rng.integers(n, size=len(recording))[recording] for n in (len(SCENES), len(RECORDING_DEVICES), 10)]
    meta = Meta(
        Path(), np.array([f"audio/{i}.wav" for i in range(n_clips)], dtype=object), *of_recording, SCENES,
        RECORDING_DEVICES, CITIES, np.array([f"r{i}" for i in recording], dtype=object),
    )  # fmt: skip
    return Clips(meta, np.arange(n_clips), store=None)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_clips", type=int, default=29_680)
    parser.add_argument("--n_rounds", type=int, default=10_000)
    args = parser.parse_args(argv)
    clips, n_plain = make_part(args.n_clips), min(20, args.n_rounds)
    first, second = (torch.randn(args.n_clips, len(SCENES)) for _ in "ab")

    def plain() -> None:
        rng = np.random.default_rng(0)
        for _ in range(n_plain):
            index = rng.integers(args.n_clips, size=args.n_clips)
            score(Clips(clips.meta, index, store=None), first[torch.from_numpy(index)], DEVICE_GROUPS)

    sides = {
        "plain loop, one system": (plain, args.n_rounds / n_plain),
        "one system": (lambda: intervals(clips, first, DEVICE_GROUPS, args.n_rounds), 1.0),
        "difference of two": (lambda: differences(clips, first, second, DEVICE_GROUPS, args.n_rounds), 1.0),
        "one system, details": (lambda: intervals(clips, first, DEVICE_GROUPS, args.n_rounds, detail=True), 1.0),
        "difference, details": (
            lambda: differences(clips, first, second, DEVICE_GROUPS, args.n_rounds, detail=True),
            1.0,
        ),
    }
    print(f"{args.n_clips} clips, {args.n_rounds} rounds, {torch.get_num_threads()} threads; seconds")
    seconds = {}
    for name, (work, times) in sides.items():
        started = time.perf_counter()
        work()
        seconds[name] = times * (time.perf_counter() - started)
        print(f"{name:<24}{seconds[name]:>10.1f}", flush=True)
    return seconds


if __name__ == "__main__":
    main()
