"""Time per clip of every stage of student training, beside a plain implementation of the same work in the same run.

  python benchmarks/training_step.py                       one CPU core, batches of 64 clips
  python benchmarks/training_step.py --batch_size 256 --threads 2
  python benchmarks/training_step.py --torch_device cuda --batch_size 256

The plain implementation does what the published code does: one cached tensor file per clip, SciPy's convolution clip by
clip, pre-emphasis as a convolution, a squared pair axis, a dense filter matrix built in every step, and a network in
NCHW order whose every step writes a new tensor. Both sides are timed in turn, round by round, so that a busy machine
slows both; the table shows the median over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.signal
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.cache import open_store
from datasets.tau import read_meta
from datasets.waveforms import Batch, Clips
from helpers.augment import AUGMENTATIONS, DEFAULT_CHAIN, build_chain
from helpers.augment.augmentation import Setting
from helpers.augment.device_impulse_response import DirConfig
from helpers.augment.freq_mixstyle import mix_style
from helpers.loop import Epoch, Update, train_one_epoch
from helpers.losses import kd_loss
from helpers.machine import Machine
from helpers.memory import keep_freed_memory
from models import get_frontend, get_model
from models.cp_mobile import CpMobileConfig, ResponseNorm
from models.frontends.cp_mel import hz_to_mel

RATE = 32000
DIR_PROB = 0.6


class PlainMel(nn.Module):
    """The front end step by step: convolution, transform, squared pair axis, dense filters built anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("coefficients", torch.tensor([[[-0.97, 1.0]]]))
        self.register_buffer("window", torch.hann_window(3072, periodic=False))

    def forward(self, waveform: Tensor) -> Tensor:
        x = F.conv1d(waveform.unsqueeze(1), self.coefficients).squeeze(1)
        spectrum = torch.stft(x, 4096, 500, 3072, self.window, center=True, normalized=False, return_complex=True)
        power = torch.view_as_real(spectrum).pow(2).sum(dim=-1)  # (batch, bin, time)
        f_max = 16000.0 - float(torch.randint(1000, ()))
        low, high = hz_to_mel(0.0), hz_to_mel(f_max)
        step = (high - low) / 257
        left = low + step * torch.arange(256)[:, None]
        mel = hz_to_mel(torch.arange(2048) * (RATE / 4096))[None]
        bank = torch.minimum((mel - left) / step, (left + 2 * step - mel) / step).clamp_min(0)
        bank = F.pad(bank, (0, 1)).to(waveform.device)
        return ((torch.matmul(bank, power) + 1e-5).log().add(4.5) / 5.0).unsqueeze(1)


class PlainResponseNorm(ResponseNorm):
    def forward(self, x: Tensor) -> Tensor:
        norm = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        response = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


def plain_network() -> nn.Module:
    """CP-Mobile as published: contiguous NCHW, nothing in place."""
    model = get_model("cp_mobile")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.ReLU())
            elif isinstance(child, ResponseNorm):
                setattr(module, name, PlainResponseNorm())
    return model


def write_recordings(root: Path, n_clips: int, rate: int = 44100) -> None:
    """A data set of noise in TAU's layout; the content does not matter here, the path through the files does."""
    (root / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["filename\tscene_label\tidentifier\tsource_label"]
    for i in range(n_clips):
        file = f"audio/park-paris-1-{i}-0-a.wav"
        soundfile.write(root / file, 0.05 * rng.standard_normal(rate), rate, subtype="PCM_24")
        lines.append(f"{file}\tpark\tparis-1\ta")
    (root / "meta.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--torch_device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # for both sides
    torch.manual_seed(0)
    device, n = torch.device(args.torch_device), args.batch_size

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "noise"
        write_recordings(root, 2 * n)
        meta = read_meta(root)
        clips = Clips(meta, np.arange(len(meta)), open_store(meta, RATE, folder, progress=False))
        cached = [Path(folder) / f"{row}.pt" for row in range(len(meta))]
        for row, path in enumerate(cached):
            torch.save(torch.from_numpy(clips.store.read(np.array([row]))).float() / 32768, path)

        rng = np.random.default_rng(1)
        (Path(folder) / "irs").mkdir()
        responses = [rng.standard_normal(12000).astype(np.float32) * np.exp(-np.arange(12000) / 500) for _ in range(66)]
        responses = [response.astype(np.float32) for response in responses]
        frontend, model = get_frontend("cp_mel").to(device), get_model("cp_mobile")
        for i, response in enumerate(responses):
            soundfile.write(Path(folder) / f"irs/{i}.wav", response, RATE, subtype="FLOAT")
        configs = {name: AUGMENTATIONS[name][0]() for name in DEFAULT_CHAIN} | {"dir": DirConfig(dir_prob=DIR_PROB)}
        setting = Setting(clips, frontend.mask_value, responses=Path(folder) / "irs")
        augment = build_chain(configs, setting).to(device)
        impulse_response, roll = augment["waveform"]
        model.to(device, memory_format=torch.channels_last)
        plain_frontend, plain_model = PlainMel().to(device), plain_network().to(device)
        target = F.one_hot(torch.arange(n) % 10, 10).float().to(device)
        teacher = torch.randn(n, 10, device=device)
        index = torch.randperm(len(meta))[:n]
        batch = clips.batch(index).to(device)
        log_mel = frontend(batch.waveform)

        def plain_read() -> Tensor:
            return torch.cat([torch.load(cached[i], weights_only=True) for i in index]).to(device)

        def plain_impulse_response(waveform: Tensor) -> Tensor:
            out = []
            for clip in waveform.cpu():
                if torch.rand(()) < DIR_PROB:
                    convolved = scipy.signal.convolve(clip.numpy(), responses[rng.integers(66)])[:RATE]
                    clip = torch.from_numpy(convolved.astype(np.float32))
                out.append(clip)
            return torch.stack(out).to(device)

        def plain_roll(waveform: Tensor) -> Tensor:
            return torch.stack([clip.roll(int(rng.integers(-4000, 4001))) for clip in waveform])

        def plain_masking(x: Tensor) -> Tensor:
            start = int(rng.integers(0, 208))
            x = x.clone()
            x[:, :, start : start + 24] = 0.9
            if rng.random() < 0.4:
                lam = torch.from_numpy(rng.beta(0.3, 0.3, n).astype(np.float32)).to(device)
                x = mix_style(x, lam, torch.randperm(n, device=device))
            return x

        def network(net: nn.Module, x: Tensor) -> Tensor:
            net.zero_grad(set_to_none=True)
            loss = kd_loss(net(x), target, teacher, 0.02, 2.0).loss
            loss.backward()
            return loss

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
        plain_optimizer = torch.optim.Adam(plain_model.parameters(), lr=1e-4, weight_decay=1e-4, foreach=False)

        def step() -> None:
            fresh = augment["waveform"](clips.batch(index).to(device))
            masked = augment["log_mel"](Batch(fresh.waveform, log_mel=frontend(fresh.waveform)))
            network(model, masked.log_mel)
            optimizer.step()

        def plain_step() -> None:
            x = plain_frontend(plain_roll(plain_impulse_response(plain_read())))
            network(plain_model, plain_masking(x))
            plain_optimizer.step()

        def loop() -> None:
            update = Update(optimizer, Machine(device, n))
            loss_fn = lambda y, _: kd_loss(y, target, teacher, 0.02, 2.0)  # noqa: E731
            train_one_epoch(model, frontend, augment, loss_fn, Epoch(clips, update, seed=0), update)

        def plain_loop() -> None:
            for _ in range(len(meta) // n):
                plain_step()

        stages = {
            "read": (plain_read, lambda: clips.batch(index).to(device)),
            "impulse responses": (lambda: plain_impulse_response(batch.waveform), lambda: impulse_response(batch)),
            "roll": (lambda: plain_roll(batch.waveform), lambda: roll(batch)),
            "front end": (lambda: plain_frontend(batch.waveform), lambda: frontend(batch.waveform)),
            "network": (lambda: network(plain_model, log_mel), lambda: network(model, log_mel)),
            "whole step": (plain_step, step),
            "whole loop": (plain_loop, loop),
        }
        assert model.config == CpMobileConfig()
        print(f"{args.threads} thread(s), {device}, batch {n}; ms per clip, median of {args.rounds} rounds")
        print(f"{'stage':<20}{'plain':>9}{'ours':>9}{'ratio':>8}{'clips/s':>10}")
        results = {}
        for name, sides in stages.items():
            for work in sides:
                work()
            n_clips = len(meta) if name == "whole loop" else n
            rounds = [[milliseconds(work, device) / n_clips for work in sides] for _ in range(args.rounds)]
            plain, ours = (statistics.median(times) for times in zip(*rounds, strict=True))
            ratio = statistics.median(b / a for a, b in rounds)
            print(f"{name:<20}{plain:>9.3f}{ours:>9.3f}{ratio:>8.2f}{1000 / ours:>10.0f}")
            results[name] = (plain, ours)
    return results


if __name__ == "__main__":
    main()
