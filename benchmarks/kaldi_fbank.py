"""Time per clip of BEATs' filter banks, batched, beside torchaudio called clip by clip in the same run.

  python benchmarks/kaldi_fbank.py                            one CPU core, 64 clips of 1 second
  python benchmarks/kaldi_fbank.py --threads 2 --batch_size 256
  python benchmarks/kaldi_fbank.py --torch_device cuda

The clip-by-clip side is what the published front end does: scale to 16 bits, `torchaudio.compliance.kaldi.fbank`,
stack, normalise. Both sides are timed in turn, round by round, so that a busy machine slows both; the table shows the
median and the fastest of the rounds. The largest difference between both results is printed too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchaudio
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.memory import keep_freed_memory
from models.frontends.kaldi_fbank import KaldiFbank, KaldiFbankConfig


def clip_by_clip(config: KaldiFbankConfig, waveform: Tensor) -> Tensor:
    """(batch, sample) to (batch, 1, mel, time)."""
    clips = [
        torchaudio.compliance.kaldi.fbank(
            clip.unsqueeze(0) * 2**15, num_mel_bins=config.n_mels, sample_frequency=config.sample_rate
        )
        for clip in waveform
    ]
    fbank = (torch.stack(clips) - config.dataset_mean) / (2 * config.dataset_std)
    return fbank.transpose(1, 2).unsqueeze(1)


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a clip")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--torch_device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # for both sides
    torch.manual_seed(0)
    device, config = torch.device(args.torch_device), KaldiFbankConfig()
    frontend = KaldiFbank(config).to(device)
    waveform = 0.1 * torch.randn(args.batch_size, round(args.seconds * config.sample_rate), device=device)

    sides = {"clip by clip": lambda: clip_by_clip(config, waveform), "batched": lambda: frontend(waveform)}
    difference = (sides["clip by clip"]() - sides["batched"]()).abs().max().item()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, work in sides.items():
            times[name].append(milliseconds(work, device) / args.batch_size)
    plain, ours = times.values()
    result = {"median": statistics.median(plain) / statistics.median(ours), "fastest": min(plain) / min(ours)}
    where = f"{args.threads} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{args.batch_size} clips of {args.seconds:g} s, {where}; ms per clip; largest difference {difference:.1e}")
    print(f"{'':8}{'clip by clip':>14}{'batched':>10}{'times faster':>14}")
    for name, summary in (("median", statistics.median), ("fastest", min)):
        print(f"{name:8}{summary(plain):14.3f}{summary(ours):10.3f}{result[name]:14.1f}")
    return result


if __name__ == "__main__":
    main()
