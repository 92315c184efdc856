"""What a script computes with: the device, the processes that share the work, and the batches that they are fed."""

import argparse
import os
import shutil
from dataclasses import dataclass, field

import torch
from torch import nn

from helpers.distributed import ALONE, Processes, join_processes, local_rank
from helpers.errors import UserError
from helpers.memory import keep_freed_memory


class CompilerError(UserError):
    """There is no compiler; one line that says which."""


@dataclass(frozen=True)
class Precision:
    """What the network computes in; front end, loss and weights stay float32."""

    name: str  # fp32, bf16 or fp16
    device: torch.device

    def autocast(self) -> torch.autocast:
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


@dataclass(frozen=True)
class Machine:
    """The defaults are a process alone on the CPU.

    Args:
        batch_size: clips of a batch, over all processes.
        n_ahead: batches that a thread reads ahead; 0 reads in turn.
        channels_last: memory layout of the network.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 256
    n_ahead: int = 1
    channels_last: bool = True
    processes: Processes = ALONE

    def compile(self, model: nn.Module) -> nn.Module:
        """The network for --compile.

        Raises:
            CompilerError: when there is no compiler to write its code for.
        """
        is_gpu = self.device.type == "cuda"
        variable, compilers = ("CC", ("gcc", "clang", "cc")) if is_gpu else ("CXX", ("g++", "clang++"))
        names = [os.environ[variable]] if os.environ.get(variable) else compilers
        if not any(shutil.which(name) for name in names):
            found = f"{' or '.join(names)} was not found"
            raise CompilerError(f"--compile needs a compiler, {found}: install one, or leave it away")
        return torch.compile(model, mode="reduce-overhead" if is_gpu else None)

    def share(self, model: nn.Module) -> nn.Module:
        """The network whose backward pass averages the gradients over the processes."""
        return self.processes.wrap(model, self.device, getattr(model, "skips_layers", False))

    def take(self, model: nn.Module) -> nn.Module:
        """The network on the device, in its memory layout."""
        return model.to(
            self.device, memory_format=torch.channels_last if self.channels_last else torch.contiguous_format
        )


def open_machine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Machine:
    """The machine that the options describe, together with the other processes of a torchrun command.

    Ends with the parser's error for a device that is not there.
    """
    device = torch_device(parser, args.torch_device)
    if device.type == "cpu":
        keep_freed_memory()
    processes = ALONE if getattr(args, "dry_run", False) else join_processes(device)
    return Machine(device, args.batch_size, args.num_workers, args.channels_last, processes)


def torch_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device called `name`; auto is a CUDA GPU where there is one, else the CPU.

    Of the processes that torchrun starts on a machine, each takes the GPU of its number for auto and cuda.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank() is not None:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--torch_device {name}: no such device; use auto, cpu, cuda or cuda:<number>")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--torch_device {name}: only CPUs and CUDA GPUs; use auto, cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--torch_device {name}: {torch.cuda.device_count()} CUDA GPUs were found; use auto or cpu")
    return device
