"""Student training on one GPU at TAU22's full size, beside a plain loop: clips a second, memory, hours of a recipe.

  python benchmarks/gpu.py                       139,620 clips of noise in GPU memory, batches of 256: under 8 minutes
  python benchmarks/gpu.py --batch_size 1024 --precisions bf16

Stages are timed one by one, then the training loop as run_training.py has it, in float32 and bfloat16, with and without
--compile. The plain loop does what the published code does, with data in the machine's memory: clips are stacked one by
one and copied to the GPU, rolled one by one, the filter matrix is built in every step, the network is in NCHW order. It
has no impulse responses, which the published code convolves with SciPy on the CPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training_step import DIR_PROB, RATE, PlainMel, plain_network
from datasets.known import DATASETS
from datasets.tau import RECORDING_DEVICES, SCENES, Meta
from datasets.waveforms import Batch, Clips
from helpers.augment import AUGMENTATIONS, DEFAULT_CHAIN, build_chain
from helpers.augment.augmentation import Setting
from helpers.augment.device_impulse_response import DirConfig
from helpers.loop import Epoch, Update, train_one_epoch
from helpers.losses import kd_loss
from helpers.machine import Machine
from models import get_frontend, get_model

N_EPOCHS = 150  # of the recipe whose time is projected


class NoiseClips(Clips):
    """A training part of noise, in the device's memory as `load_onto` would have put it there."""

    def __init__(self, n_clips: int, device: torch.device):
        rng = np.random.default_rng(0)
        files = np.array([f"audio/{i}.wav" for i in range(n_clips)], dtype=object)
        codes = [rng.integers(0, n, n_clips) for n in (len(SCENES), len(RECORDING_DEVICES), 1)]
        meta = Meta(Path(), files, *codes, SCENES, RECORDING_DEVICES, ("paris",))
        super().__init__(meta, np.arange(n_clips), None, np.zeros((n_clips, len(SCENES)), np.float32))
        self.store = SimpleNamespace(sample_rate=RATE, n_samples=RATE)
        self._on_device = torch.randint(-2000, 2000, (n_clips, RATE), dtype=torch.int16, device=device)
        self.scene, self.recording_device = self.scene.to(device), self.recording_device.to(device)
        self.teacher_logits = self.teacher_logits.to(device)


class EnoughError(Exception):
    """So many steps were done."""


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    return kd_loss(logits, batch.target, batch.teacher_logits, 0.02, 2.0)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device, n_rounds: int) -> float:
    """Median over the rounds, after one that does not count."""
    times = []
    for _ in range(n_rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def build_augment(clips: Clips, mask_value: float, folder: Path) -> nn.ModuleDict:
    """The default chain, with responses of noise."""
    rng = np.random.default_rng(1)
    for i in range(66):
        response = rng.standard_normal(12000) * np.exp(-np.arange(12000) / 500)
        soundfile.write(folder / f"{i}.wav", response.astype(np.float32), RATE, subtype="FLOAT")
    configs = {name: AUGMENTATIONS[name][0]() for name in DEFAULT_CHAIN} | {"dir": DirConfig(dir_prob=DIR_PROB)}
    return build_chain(configs, Setting(clips, mask_value, responses=folder))


def loop_speed(work: Callable[[Callable[[], None]], object], device: torch.device, n_warm: int, n_steps: int) -> float:
    """Steps a second of a loop that calls back after each of its steps; those at the start do not count."""
    marks: list[float] = []

    def after_step() -> None:
        if len(marks) in (n_warm, n_warm + n_steps):
            synchronize(device)
        marks.append(time.perf_counter())
        if len(marks) > n_warm + n_steps:
            raise EnoughError

    with suppress(EnoughError):
        work(after_step)
    return n_steps / (marks[n_warm + n_steps] - marks[n_warm])


def ours(
    clips: Clips, augment: nn.ModuleDict, frontend: nn.Module, machine: Machine, precision: str, compiled: bool
) -> Callable[[Callable[[], None]], object]:
    """The training loop of run_training.py."""
    model = machine.take(get_model("cp_mobile"))
    forward = machine.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), fused=machine.device.type == "cuda")
    update = Update(optimizer, machine, precision)
    return lambda after: train_one_epoch(forward, frontend, augment, loss_of, Epoch(clips, update, 0, after), update)


def plain(waveforms: Tensor, machine: Machine) -> Callable[[Callable[[], None]], object]:
    """The loop of the published code, see above; waveforms (clip, sample) are in the machine's memory."""
    device, n = machine.device, machine.batch_size
    frontend, model = PlainMel().to(device), plain_network().to(device).train()
    optimizer = torch.optim.Adam(model.parameters())
    target = F.one_hot(torch.arange(n) % len(SCENES), len(SCENES)).float().to(device)
    teacher = torch.zeros(n, len(SCENES), device=device)

    def run(after_step: Callable[[], None]) -> None:
        for index in indices():
            x = torch.stack([waveforms[i] for i in index.tolist()]).to(device)
            x = torch.stack([clip.roll(int(torch.randint(-4000, 4001, ()))) for clip in x])
            loss = kd_loss(model(frontend(x)), target, teacher, 0.02, 2.0).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step()

    def indices() -> Iterator[Tensor]:
        while True:
            yield torch.randint(0, len(waveforms), (n,))

    return run


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Clips a second by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_device", default="cuda")
    parser.add_argument("--n_clips", type=int, default=DATASETS["tau22"].n_train, help="of the training part")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--no_compile", action="store_true", help="leave out the runs with --compile")
    parser.add_argument("--rounds", type=int, default=20, help="of each stage")
    parser.add_argument("--steps", type=int, default=100, help="of each loop")
    args = parser.parse_args(argv)
    device = torch.device(args.torch_device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here that PyTorch can use")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.n_clips:,} clips, batch {args.batch_size}")
    found: dict[str, float] = {}

    def say(title: str, clips_per_second: float, more: str = "") -> None:
        found[title] = clips_per_second
        if "loop" in title:
            more += f", {N_EPOCHS * args.n_clips / clips_per_second / 3600:.2f} h for {N_EPOCHS} epochs"
        print(f"{title:<28}{clips_per_second:>12,.0f} clips/s{more}", flush=True)

    machine = Machine(device, args.batch_size)
    waveforms = time_ours(args, machine, say)
    n_steps = max(1, args.steps // 4)
    say("plain loop fp32", args.batch_size * loop_speed(plain(waveforms, machine), device, 3, n_steps))
    return found


def time_ours(args: argparse.Namespace, machine: Machine, say: Callable[..., None]) -> Tensor:
    """Times stages and loops; some of the waveforms (clip, sample), float32 in the machine's memory."""
    device, n = machine.device, machine.batch_size
    clips, frontend = NoiseClips(args.n_clips, device), get_frontend("cp_mel").to(device)
    with tempfile.TemporaryDirectory() as folder:
        augment = build_augment(clips, frontend.mask_value, Path(folder)).to(device).train()
    frontend.train()
    index = torch.randperm(len(clips))[:n]
    batch = clips.batch(index).to(device)
    stages: dict[str, Callable[[], object]] = {"read": lambda: clips.batch(index).to(device)}
    for part in augment["waveform"]:
        stages[type(part).__name__] = lambda part=part: part(batch)
    stages["front end"] = lambda: frontend(batch.waveform)
    with torch.no_grad():
        for title, work in stages.items():
            say(title, 1000 * n / milliseconds(work, device, args.rounds))
    for precision in args.precisions:
        for compiled in (False,) if args.no_compile else (False, True):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            speed = n * loop_speed(ours(clips, augment, frontend, machine, precision, compiled), device, 10, args.steps)
            memory = f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type == "cuda" else ""
            say(f"loop {precision}{' compiled' if compiled else ''}", speed, memory)
    return clips._on_device[:20_000].float().cpu() / 32768


if __name__ == "__main__":
    main()
