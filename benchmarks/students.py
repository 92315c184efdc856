"""Training step of every student, beside the same network written plainly, in the same run.

  python benchmarks/students.py                        all of them, one CPU core, batches of 64 clips
  python benchmarks/students.py --networks tf_sepnet --threads 2

Forward and backward pass on spectrograms of one second, as the network's own front end makes them. The plain network
does what the published code does: contiguous NCHW, nothing in place, norms by bands as separate operations. Both sides
are timed in turn, round by round; the table shows medians.
"""

import argparse
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.memory import keep_freed_memory
from models import MODELS, default_frontend, get_frontend, get_model
from models.layers.adaptive_residual_norm import AdaptiveResidualNorm
from models.layers.affine_residual_norm import AffineResidualNorm
from models.layers.plus_conv import PlusConv
from models.layers.residual_norm import ResidualNorm
from models.layers.response_norm import ResponseNorm

TEACHERS = ("cp_resnet", "passt", "beats")
AIM = 1.5
# Why some are not that much faster than their plain form; measured with PyTorch's profiler.
KERNELS = "its 7 x 7 convolutions compute near the peak of a core in either layout"
WHY = {
    "cnn3": KERNELS,
    "dragonsearch_baseline2": KERNELS,
    "dragonsearch_baseline1": "its wide 3 x 3 convolutions are PyTorch's own kernels on both sides",
    "cnn_gru": "long depthwise convolutions and norms, PyTorch's own kernels on both sides, take two thirds",
    "qualcomm_bc_resnet": "maps of a few thousand values: starting its many small steps takes as long as the steps",
}


def bands(x: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(1, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps)


def plain_response_norm(layer: ResponseNorm, x: Tensor) -> Tensor:
    norm = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    response = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
    return torch.relu(layer.gamma * (x * response) + layer.beta + x)


def plain_affine_norm(layer: AffineResidualNorm, x: Tensor) -> Tensor:
    return layer.gamma * (layer.rho * x + (1 - layer.rho) * bands(x, layer.eps)) + layer.beta


def plain_plus_conv(layer: PlusConv, x: Tensor) -> Tensor:
    x = layer.ch_conv1(x)
    return layer.relu(layer.bn(layer.sp_conv1(x) + layer.sp_conv2(x)))


PLAIN = {
    ResponseNorm: plain_response_norm,
    ResidualNorm: lambda layer, x: layer.identity_share * x + bands(x, layer.eps),
    AdaptiveResidualNorm: lambda layer, x: (
        layer._gamma * (layer._rho * x + (1 - layer._rho) * bands(x, layer.eps)) + layer._beta
    ),
    AffineResidualNorm: plain_affine_norm,
    PlusConv: plain_plus_conv,
}


def plain_network(name: str) -> nn.Module:
    """The network as it was published: contiguous NCHW, nothing in place, nothing fused."""
    model = get_model(name)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
        if type(module) in PLAIN:
            module.forward = types.MethodType(PLAIN[type(module)], module)
    return model


def spectrograms(name: str, n: int) -> Tensor:
    """Noise (batch, 1, mel, time) of one second."""
    frontend, options = default_frontend(name)
    frontend = get_frontend(frontend, **options).eval()
    return frontend(0.1 * torch.randn(n, frontend.sample_rate))


def milliseconds(model: nn.Module, x: Tensor) -> float:
    started = time.perf_counter()
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    return 1000 * (time.perf_counter() - started) / len(x)


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Milliseconds per clip by network, plain and ours."""
    students = [name for name in MODELS if name not in TEACHERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=students, default=students, metavar="NAME")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # for both sides
    torch.manual_seed(0)
    print(f"{args.threads} thread(s), batch {args.batch_size}; ms per clip, median of {args.rounds} rounds")
    print(f"{'network':<24}{'spectrogram':>14}{'plain':>9}{'ours':>9}{'times as fast':>15}")
    times = {}
    for name in args.networks:
        x = spectrograms(name, args.batch_size)
        sides = plain_network(name).train(), get_model(name).train().to(memory_format=torch.channels_last)
        for model in sides:
            milliseconds(model, x)
        rounds = [[milliseconds(model, x) for model in sides] for _ in range(args.rounds)]
        plain, ours = (statistics.median(times) for times in zip(*rounds, strict=True))
        times[name] = plain, ours
        speedup = statistics.median(a / b for a, b in rounds)
        size = " x ".join(map(str, x.shape[2:]))
        why = f"  {WHY[name]}" if speedup < AIM and name in WHY else ""
        print(f"{name:<24}{size:>14}{plain:>9.2f}{ours:>9.2f}{speedup:>15.2f}{why}", flush=True)
    return times


if __name__ == "__main__":
    main()
