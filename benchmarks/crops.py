"""Clips per second of cropped training's windows, beside reading whole clips and beside reading two clips and cutting.

  python benchmarks/crops.py                            1 second at 32 kHz, batch 256, a store of 4096 clips
  python benchmarks/crops.py --n_clips 40000 --torch_device cuda

A store of generated samples is written to a temporary folder, so its pages are in the system's cache. *whole clips* is
what training without crops reads; *two clips, cut* reads the two segments that a window overlaps and cuts the window
out, which is what remains where a reader knows only whole clips. All sides take their turn round by round, so that a
busy machine slows all; the table shows the median and the fastest of the rounds, in clips per second. *on device* are
both kinds from the memory of --torch_device, without the move of the finished batch.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.cache import WaveformStore
from datasets.crops import CroppedClips
from datasets.store_spec import STORE_VERSION, StoreSpec
from datasets.tau import Meta
from datasets.waveforms import Clips
from helpers.memory import keep_freed_memory

N_SEGMENTS = 10  # of a recording, as in TAU22


def make_store(folder: Path, n_clips: int, rate: int) -> WaveformStore:
    """A store of noise with TAU22's file names; one second per clip."""
    files = [f"audio/bus-paris-1-{i // N_SEGMENTS}-{i % N_SEGMENTS}-a.wav" for i in range(n_clips)]
    rng = np.random.default_rng(0)
    with open(folder / "waveforms.i16", "wb") as file:
        for _ in files:
            file.write(rng.integers(-(2**15), 2**15, rate, dtype=np.int16).tobytes())
    return WaveformStore(folder, StoreSpec(STORE_VERSION, rate, rate, rate, rate, "none", files, [0] * n_clips))


def make_meta(files: list[str]) -> Meta:
    zeros = np.zeros(len(files), dtype=np.int64)
    return Meta(Path("."), np.array(files, dtype=object), zeros, zeros, zeros, ("bus",), ("a",), ("paris",))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_clips", type=int, default=4096, help="clips in the store")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--sample_rate", type=int, default=32000, help="samples of a clip")
    parser.add_argument("--torch_device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)
    keep_freed_memory()  # for all sides
    device, rng = torch.device(args.torch_device), np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), args.n_clips, args.sample_rate)
        meta, n = make_meta(store.spec.files), store.n_samples
        plain, cropped, plain_on_device, cropped_on_device = (
            cls(meta, np.arange(args.n_clips), store) for cls in (Clips, CroppedClips, Clips, CroppedClips)
        )
        plain_on_device.load_onto(device)
        cropped_on_device.load_onto(device)
        for clips in (cropped, cropped_on_device):
            clips.start_epoch(0, 0)

        def two_clips_and_cut(index: torch.Tensor) -> torch.Tensor:
            """The same windows (batch, sample), of what `read` gives."""
            start = (cropped._run_row[index] * n + cropped._starts[index]).numpy()
            rows = start // n
            pairs = store.read(np.stack([rows, np.minimum(rows + 1, args.n_clips - 1)], axis=1).ravel())
            pairs = pairs.reshape(len(index), 2 * n)
            return torch.from_numpy(np.stack([pair[s : s + n] for pair, s in zip(pairs, start % n, strict=True)]))

        sides: dict[str, Callable[[torch.Tensor], object]] = {
            "whole clips": plain.batch,
            "windows": cropped.batch,
            "two clips, cut": two_clips_and_cut,
            "whole clips, on device": plain_on_device.batch,
            "windows, on device": cropped_on_device.batch,
        }
        index = torch.arange(0, args.n_clips, max(1, args.n_clips // args.batch_size))
        expected = cropped.batch(index).waveform
        for found in (two_clips_and_cut(index), cropped_on_device.batch(index).waveform.cpu()):
            if not torch.equal(found, expected):
                raise RuntimeError("the sides do not read the same windows")
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            index = torch.from_numpy(rng.integers(args.n_clips, size=args.batch_size))
            for name, work in sides.items():
                times[name].append(seconds(lambda work=work, index=index: work(index), device) / args.batch_size)
    result = {name: 1 / statistics.median(values) for name, values in times.items()}
    where = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{args.n_clips} clips of {n} samples, batches of {args.batch_size}, {where}; clips per second")
    print(f"{'':24}{'median':>10}{'fastest':>10}{'of whole clips':>16}")
    for name, values in times.items():
        ratio = result[name] / result["whole clips"]
        print(f"{name:24}{result[name]:10.0f}{1 / min(values):10.0f}{ratio:16.2f}")
    return result


if __name__ == "__main__":
    main()
