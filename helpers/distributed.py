"""Several processes that train or score together, as torchrun starts them; one process alone is a group of one.

  torchrun --nproc_per_node=2 run_training.py ...     gloo on CPUs, NCCL between GPUs

`--batch_size` is the size of the batch that all processes share: each takes every n-th clip of it, so steps, learning
rates and metrics are those of one process. Gradients are averaged over clips, not over processes. Batch norm normalises
with the statistics of a process's own share; the running statistics of process 0 are the ones that are kept. Evaluation
shares out the clips without repeating any.
"""

import atexit
import functools
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.tau import DataError
from helpers.errors import UserError

# The others wait while one process downloads or caches the data set; one that is lost is noticed much earlier.
TIMEOUT = timedelta(hours=4)
MEETING_TIMEOUT = timedelta(minutes=5)  # torchrun starts all processes at about the same time
BEAT_SECONDS = 5.0  # how often a process tells the others that it is alive
LOST_SECONDS = 120.0  # after which one that does not is lost


class LaunchError(UserError, OSError):
    """Processes that were started together cannot work together; one line with the reason."""


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
        self.share_tensors(model.buffers())

    def share_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the tensors of process 0."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def average_gradients(self, part: nn.Module) -> None:
        """Gives all processes the mean of their gradients."""
        for parameter in part.parameters() if self.size > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.size

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
        goes_first = local_rank() in (None, 0)
        if not goes_first:
            self.wait()
        yield
        if goes_first:
            self.wait()

    def wait(self) -> None:
        """Returns once all processes are here."""
        self.largest(0)

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
            self.check_share(n, what)

    def check_share(self, n: int, what: str) -> None:
        """
        Raises:
            DataError: when there are fewer of them than processes.
        """
        if n < self.size:
            raise DataError(f"{self.size} processes cannot share {n} {what}: lower torchrun's --nproc_per_node")


ALONE = Processes()


def launched_as() -> tuple[int, int] | None:
    """Rank and number of the processes that torchrun started; None for one that was started alone.

    Raises:
        LaunchError: when the environment says it only in part.
    """
    if "RANK" not in os.environ:
        return None
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise LaunchError(
            f"the environment has RANK, which torchrun sets, but not {', '.join(missing)}: start several processes "
            "with torchrun, and one alone after `unset RANK`"
        )
    rank, size, port = (_whole_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= size or port > 65535:
        raise LaunchError(
            f"the environment has RANK {rank} of WORLD_SIZE {size} and MASTER_PORT {port}, which cannot be: start "
            "several processes with torchrun, and one alone after `unset RANK`"
        )
    return rank, size


def local_rank() -> int | None:
    """Number of this process on its machine when torchrun started it."""
    return _whole_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None


def _whole_number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise LaunchError(f"the environment has {name}={text!r}, which torchrun sets to a whole number: unset it")
    return int(text)


@dataclass(frozen=True)
class Launch:
    """The processes of one torchrun command that are alive now and have met.

    Args:
        kept: the store of the command, which lasts while processes end and are started again.
        store: a part of it that only these processes use.
    """

    kept: dist.Store
    store: dist.Store
    rank: int
    size: int


@functools.cache
def _launch() -> Launch | None:
    """Meets the other processes; None where there are none, as without torchrun."""
    if (found := launched_as()) is None:
        return None
    rank, size = found
    try:
        kept, _, _ = next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))
        store = dist.PrefixStore(_meet(kept, rank, size), kept)
    except (dist.DistError, TimeoutError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"process {rank} of {size} cannot meet the others at {address}: {str(error).splitlines()[0]}"
        ) from error
    kept.set_timeout(TIMEOUT)
    if size > 1:
        Heartbeat(dist.PrefixStore("alive", store.clone()), rank, size).start()
    return Launch(kept, store, rank, size)


def join_processes(device: torch.device) -> Processes:
    """Makes the processes that torchrun started a group; a process alone is a group of one.

    Raises:
        LaunchError: when they do not find each other.
    """
    if (launch := _launch()) is None or launch.size == 1:
        return ALONE
    if not dist.is_initialized():
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=launch.store, rank=launch.rank, world_size=launch.size, timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)
    return Processes(launch.rank, launch.size)


def leave_processes() -> None:
    """Ends together with the others: one that ends early would be lost to them, and none could be started again."""
    if dist.is_initialized():
        Processes(dist.get_rank(), dist.get_world_size()).wait()


def end_process(status: int) -> NoReturn:
    """Ends this process, one of several without taking the interpreter down.

    Once everything is written and what was registered for the end has run, threads of torch that are still there abort
    the interpreter's own end now and then, and torchrun would count the run as failed.
    """
    if dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_loss(error: Exception) -> bool:
    """Whether an exchange with the other processes failed because one of them is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def main_decides(name: str, decide: Callable[[], str]) -> str:
    """The answer of process 0, for all processes; needs no group yet. `name` is asked for once in a process's life."""
    if (launch := _launch()) is None:
        return decide()
    if launch.rank == 0:
        launch.store.set(f"decided/{name}", decide())
    return launch.store.get(f"decided/{name}").decode()  # waits


def keep(name: str, value: str) -> None:
    """Keeps a value for the processes that torchrun may start again in the place of these; without it, nothing."""
    if (launch := _launch()) is not None:
        launch.kept.set(f"kept/{name}", value)


def recall(name: str) -> str | None:
    """What a process of the same torchrun command has kept; None when there is nothing."""
    launch = _launch()
    if launch is None or not launch.kept.check([f"kept/{name}"]):
        return None
    return launch.kept.get(f"kept/{name}").decode()


class Heartbeat:
    """Tells the others that this process is alive; ends it when another one says nothing for LOST_SECONDS.

    A process that ends closes its connections, which the others notice at once. One that is lost with its machine or
    network does not, and they would wait for it as long as for one that builds the waveform store.

    Args:
        store: one that no other thread uses.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self._beats = {other: b"" for other in range(size) if other != rank}  # the last one of each
        # Since then, counted in steps of this process: while all of them are stopped (Ctrl-Z), none is lost.
        self._silence = dict.fromkeys(self._beats, 0)
        self._over = threading.Event()
        # Without the network the store does not answer either, so one thread talks to it and another one judges.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._judge)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(BEAT_SECONDS)

    def _exchange(self) -> None:
        n_beats = 0
        while not self._over.wait(BEAT_SECONDS):
            n_beats += 1
            with suppress(RuntimeError):  # of a store that is lost
                self.store.set(str(self.rank), str(n_beats))
                for other, beat in self._beats.items():
                    if self.store.check([str(other)]) and (now := self.store.get(str(other))) != beat:
                        self._beats[other], self._silence[other] = now, 0

    def _judge(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for other in self._silence:
                self._silence[other] += 1
            lost = [str(other) for other, steps in self._silence.items() if steps * BEAT_SECONDS > LOST_SECONDS]
            if lost:
                print(
                    f"error: process {self.rank} of {self.size} has not heard of process {', '.join(lost)} for "
                    f"{LOST_SECONDS:.0f} seconds and ends: its machine or the network is lost",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(1)  # the main thread waits for the lost one, in a call that nothing else interrupts


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
    missing, started = set(range(1, size)), time.monotonic()
    while missing:
        if time.monotonic() - started > MEETING_TIMEOUT.total_seconds():
            raise TimeoutError(f"no sign of process {', '.join(map(str, sorted(missing)))}")
        for other in [other for other in missing if store.check([f"here/{other}"])]:
            store.set(f"common/{store.get(f'here/{other}').decode()}", own)  # of an ended process, perhaps
            if store.check([f"known/{own}/{other}"]):
                missing.discard(other)
        time.sleep(0.02)
    return own
