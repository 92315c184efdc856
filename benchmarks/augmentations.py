"""What each augmentation costs, in ms per clip: one-second clips of 32 kHz, spectrograms of 256 bands and 64 frames.

  python benchmarks/augmentations.py                    one CPU core, batches of 64 clips
  python benchmarks/augmentations.py --batch_size 256

Every one is applied to the whole batch, whatever its default share is. None should cost more than 0.2 ms but impulse
responses and pitch shift, which transform the waveform.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.waveforms import Batch
from helpers.augment import AUGMENTATIONS
from helpers.augment.augmentation import Setting
from helpers.memory import keep_freed_memory
from models import get_frontend

RATE = 32000
ON = {"mixup": {"mixup_alpha": 0.3}, "share_mask": {"mask_share": 0.2}, "spec_mask": {"timem": 20},
      "spec_stripes": {"time_width": 40}}  # fmt: skip


def config_of(name: str, responses: Path) -> Any:
    """The default options, but switched on for all clips."""
    config = AUGMENTATIONS[name][0]()
    shares = {field.name: 1.0 for field in fields(config) if field.name.endswith(("_p", "_prob"))}
    more = {"dirs_path": str(responses), "dir_devices": "all"} if name == "dir" else ON.get(name, {})
    return replace(config, **shares, **more)


def write_responses(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(66):
        response = rng.standard_normal(12000) * np.exp(-np.arange(12000) / 500)
        soundfile.write(folder / f"{i}.wav", 0.3 * response, RATE, subtype="FLOAT")
    return folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--torch_device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    device, n = torch.device(args.torch_device), args.batch_size
    waveform = 0.1 * torch.randn(n, RATE)
    log_mel = get_frontend("cp_mel").eval()(waveform)
    batch = Batch(
        waveform, target=torch.eye(10)[torch.arange(n) % 10], recording_device=torch.zeros(n, dtype=torch.int64),
        log_mel=log_mel,
    ).to(device)  # fmt: skip
    print(f"{args.threads} thread(s), {device}, batch {n}; ms per clip, median of {args.rounds} rounds")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        responses = write_responses(Path(name))
        clips = SimpleNamespace(  # all that they are asked for
            meta=SimpleNamespace(recording_devices=("a",)), store=SimpleNamespace(sample_rate=RATE, n_samples=RATE)
        )
        for name, (_, cls) in AUGMENTATIONS.items():
            setting = Setting(clips, shape=tuple(log_mel.shape[2:]), sample_rate=RATE)
            augment = cls.from_config(config_of(name, responses), setting).to(device).train()
            times = []
            for _ in range(args.rounds + 1):
                started = time.perf_counter()
                augment(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - started) / n)
            results[name] = statistics.median(times[1:])
            print(f"{name:<16}{results[name]:>9.3f}", flush=True)
    return results


if __name__ == "__main__":
    main()
