"""Several processes that train one network together, as torchrun starts them; one process alone is a group of one.

  torchrun --nproc_per_node=2 run_training.py ...     gloo on CPUs, NCCL between GPUs

`--batch_size` is the size of the batch that all processes share: each takes every n-th clip of it, so steps, learning
rates and metrics are those of one process. Gradients are averaged over clips, not over processes. Batch norm normalises
with the statistics of a process's own share; the running statistics of process 0 are the ones that are kept. Evaluation
shares out the clips without repeating any.
"""

import atexit
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.tau import DataError

# The others wait while one process downloads or caches the data set.
TIMEOUT = timedelta(hours=4)


@dataclass(frozen=True)
class Processes:
    """This process among its kind. Every method that exchanges something must be called by all processes alike."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that logs, saves and prints."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """The part (some,) of index (n,) that this process works on."""
        return index[self.rank :: self.size]

    def count(self, n: int) -> int:
        """How many of n clips are this process's."""
        return len(range(self.rank, n, self.size))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, on the device of `values`."""
        if self.size == 1:
            return values
        total = values.to("cpu", copy=True)  # the sum is made in place
        dist.all_reduce(total)
        return total.to(values.device)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; how they agree on what to do next."""
        if self.size == 1:
            return number
        agreed = torch.tensor(number)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all processes the buffers (running statistics) of process 0."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wrap(self, model: nn.Module, device: torch.device, some_unused: bool = False) -> nn.Module:
        """The network whose backward pass averages the gradients over the processes.

        Args:
            some_unused: the forward pass leaves out layers now and then; costs time.
        """
        if self.size == 1:
            return model
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=some_unused)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """One process of each machine goes first through a with block: it downloads and caches, the others find it."""
        goes_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if self.size > 1 and not goes_first:
            dist.barrier()
        yield
        if self.size > 1 and goes_first:
            dist.barrier()

    def seed(self, seed: int) -> None:
        """Seeds the generators that augmentations draw from, each process its own way; one alone goes on as it is."""
        if self.size > 1:
            torch.manual_seed(seed + 1_000_003 * (1 + self.rank))

    def check_clips(self, n_train: int, n_test: int, batch_size: int) -> None:
        """
        Raises:
            DataError: when a process would have nothing to do.
        """
        for n, what in ((n_train, "training clips"), (n_test, "test clips"), (batch_size, "clips of a batch")):
            if n < self.size:
                raise DataError(f"{self.size} processes cannot share {n} {what}: lower torchrun's --nproc_per_node")


ALONE = Processes()


def local_rank() -> int | None:
    """Number of this process on its machine when torchrun started it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def join_processes(device: torch.device) -> Processes:
    """Meets the other processes that torchrun started; alone where it did not."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return ALONE
    if not dist.is_initialized():
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(_meet(store, rank, size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size())


def _meet(store: dist.Store, rank: int, size: int) -> str:
    """A name that the processes alive now have in common and those before them had not.

    torchrun gives processes that it starts again the store of the ended ones (PyTorch 2.13), whose addresses are still
    in it: about every third restart then waited for them for ever. So every process introduces itself to process 0
    under a new name until it has the answer to that name.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", own)
        common = store.get(f"common/{own}").decode()  # waits
        store.set(f"known/{common}/{rank}", "")
        return common
    missing = set(range(1, size))
    while missing:
        for other in [other for other in missing if store.check([f"here/{other}"])]:
            store.set(f"common/{store.get(f'here/{other}').decode()}", own)  # of an ended process, perhaps
            if store.check([f"known/{own}/{other}"]):
                missing.discard(other)
        time.sleep(0.02)
    return own
