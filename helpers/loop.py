"""The training loop of every script: one update path, one prediction path."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets.waveforms import Batch, Clips, batches, epoch_order
from helpers.averaging import WeightAverage
from helpers.data import Data
from helpers.errors import UserError
from helpers.machine import Machine, Precision
from helpers.metrics import score

READ_SECONDS = 0.5  # how often a loss is read from the device for the progress bar and the check for NaN
ONE_REQUEST_SECONDS = 2.0  # torchrun and make pass on a signal that the terminal has sent to every process already


class NonFiniteLossError(UserError, RuntimeError):
    """Training has diverged: something is NaN or infinite, and training cannot go on.

    Args:
        what: is not finite, with its verb.
        lr: learning rate of the epoch.
    """

    def __init__(self, what: str, lr: float, epoch: int | None = None):
        where = "" if epoch is None else f" in epoch {epoch}"
        super().__init__(
            f"{what} not finite{where} at learning rate {lr:g}; what was saved before is untouched: resume the run "
            "with a lower --lr, or with --precision fp32"
        )


class NonFiniteLogitsError(UserError, ValueError):
    """A network answers NaN or infinity; its scores would mean nothing."""


# Maps logits (batch, class) and the batch to a scalar, or to a named tuple of scalars; the first is minimised.
Loss = Callable[[Tensor, Batch], Tensor | tuple[Tensor, ...]]


@dataclass
class LoopState:
    """Where training stands; with the states of model, optimizer and generators all that resuming needs."""

    epoch: int = 0  # epochs finished
    step: int = 0  # batches done in the current epoch
    n_clips: int = 0  # clips done in the current epoch, by all processes
    sums: Tensor | None = None  # (loss term,) float64 on the device: losses of the epoch's own clips, summed
    names: tuple[str, ...] = ()  # of the loss terms
    best: float = float("-inf")  # best score on the held-out part so far
    n_worse: int = 0  # evaluations since then

    def add(self, means: dict[str, Tensor], n_own: int, n_clips: int) -> None:
        """Counts a step.

        Args:
            means: the loss terms of this process's share of the batch.
            n_own, n_clips: clips of that share, and of the whole batch.
        """
        sums = torch.stack(list(means.values())) * n_own
        self.names, self.sums = tuple(means), sums if self.sums is None else self.sums + sums
        self.step += 1
        self.n_clips += n_clips

    def finish_epoch(self) -> None:
        self.epoch, self.step, self.n_clips, self.sums = self.epoch + 1, 0, 0, None

    def check_finite(self, lr: float) -> None:
        """Waits for the device and stops on a loss that is NaN or infinite.

        Raises:
            NonFiniteLossError: with epoch and learning rate.
        """
        if self.sums is not None and not self.sums.isfinite().all():
            raise NonFiniteLossError("the loss is", lr, self.epoch)


class StopSignal(AbstractContextManager):
    """Turns SIGTERM or a first Ctrl-C into a request that the loop answers after its step; a second one stops hard."""

    def __init__(self):
        self.number: int | None = None
        self._at = 0.0

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, _frame) -> None:
        if self.number is not None and time.monotonic() - self._at > ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt
        if self.number is None:
            self.number, self._at = number, time.monotonic()

    def __exit__(self, *_exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@dataclass
class Update:
    """How a batch becomes a step of the optimizer, and where training stands.

    Args:
        machine: whose `batch_size` is the clips of a step, over all processes.
        precision: of the network; fp32, bf16 or fp16.
        rate: the learning rate of a step, from its epoch, its number in it, and how many the epoch has; None: the
            optimizer's own.
        max_norm: longer gradients, of all weights together, are shortened to it; 0 is off.
        average: follows the weights; None is off.
        n_parts: pieces that a process computes its share of the batch in, adding up their gradients; less memory, the
            same step but for batch norm's statistics. 1 is off.
    """

    optimizer: torch.optim.Optimizer
    machine: Machine
    precision: str = "fp32"
    n_parts: int = 1
    rate: Callable[[int, int, int], float] | None = None
    max_norm: float = 0.0
    average: WeightAverage | None = None
    state: LoopState = field(default_factory=LoopState)

    def __post_init__(self):
        self.autocast = Precision(self.precision, self.machine.device).autocast
        self.scaler = Precision(self.precision, self.machine.device).scaler()

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def set_lr(self, n_clips: int) -> None:
        """Sets the rate of the next step in an epoch of so many clips."""
        if self.rate is None:
            return
        lr = self.rate(self.state.epoch, self.state.step, -(-n_clips // self.machine.batch_size))
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, model: nn.Module, loss_fn: Loss, batch: Batch, weight: float = 1.0) -> dict[str, Tensor]:
        """One step; returns the loss terms: means over the batch, float64.

        Args:
            weight: of this process's gradient in the mean over all processes.
        """
        n_clips, means = len(batch.waveform), {}
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(_split(batch, self.n_parts))
        for i, part in enumerate(parts):
            share = len(part.waveform) / n_clips
            waits = isinstance(model, DistributedDataParallel) and i + 1 < len(parts)
            with model.no_sync() if waits else nullcontext():
                with self.autocast():
                    logits = model(part.log_mel)  # (batch, class)
                terms = named_terms(loss_fn(logits.float(), part))
                self.scaler.scale(terms["loss"] * (share * weight)).backward()
            means = {name: means.get(name, 0.0) + term.detach().double() * share for name, term in terms.items()}
        if isinstance(loss_fn, nn.Module):  # it learns too; the network's gradients were averaged on the way
            self.machine.processes.average_gradients(loss_fn)
        if self.max_norm:
            self.scaler.unscale_(self.optimizer)
            learning = [value for group in self.optimizer.param_groups for value in group["params"]]
            nn.utils.clip_grad_norm_(learning, self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.after_step()
        return means


def named_terms(terms: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a loss returns, a scalar or a named tuple of them, by name; the first is called loss."""
    if isinstance(terms, Tensor):
        return {"loss": terms}
    return dict(zip(("loss", *terms._fields[1:]), terms, strict=True))


def _split(batch: Batch, n_parts: int) -> Iterator[Batch]:
    if n_parts == 1:
        yield batch
        return
    pieces = {f.name: value.chunk(n_parts) for f in fields(batch) if (value := getattr(batch, f.name)) is not None}
    for i in range(len(pieces["waveform"])):
        yield replace(batch, **{name: values[i] for name, values in pieces.items()})


class Epoch:
    """This process's shares of the batches that the current epoch has left, in the epoch's own order.

    Args:
        clips: the training part.
        seed: of the order.
        after_step: called when `update.state` stands at a step's end; may raise to leave.
    """

    def __init__(self, clips: Clips, update: Update, seed: int, after_step: Callable[[], None] = lambda: None):
        self.clips, self.update, self.seed, self.after_step = clips, update, seed, after_step

    def __len__(self) -> int:
        """Clips of the whole epoch, over all processes."""
        return len(self.clips)

    def __iter__(self) -> Iterator[Batch]:
        state, machine = self.update.state, self.update.machine
        self.clips.start_epoch(self.seed, state.epoch)
        order = epoch_order(len(self.clips), self.seed, state.epoch)
        share = machine.processes.rank, machine.processes.size
        for batch in batches(
            self.clips, order, machine.batch_size, machine.device, state.step, machine.n_ahead, *share
        ):
            yield batch
            del batch  # else it would lie beside the next one
            self.after_step()


def train_one_epoch(
    model: nn.Module, frontend: nn.Module, augment: nn.ModuleDict, loss_fn: Loss, epoch: Epoch, update: Update
) -> dict[str, float]:
    """Trains on the batches that the epoch has left and returns the epoch's metrics, `train/...`.

    They are the mean losses over all clips of the epoch, the learning rate, the seconds and the clips per second.

    Raises:
        NonFiniteLossError: with epoch and learning rate.
    """
    for part in (model, frontend, augment):
        part.train()
    state, processes = update.state, update.machine.processes
    started, n_before = time.monotonic(), state.n_clips
    with Progress(update, len(epoch)) as progress:
        for batch in epoch:
            with torch.no_grad():
                batch = augment["waveform"](batch)
                batch = replace(batch, log_mel=frontend(batch.waveform))  # (batch, 1, mel, time)
                batch = augment["log_mel"](batch)
            n_clips = min(update.machine.batch_size, len(epoch) - state.n_clips)  # of all processes
            # 0 where the last batch has fewer clips than there are processes and this one stands in with another's.
            n_own = processes.count(n_clips)
            update.set_lr(len(epoch))
            means = update.step(model, loss_fn, batch, n_own * processes.size / n_clips)
            state.add(means, n_own, n_clips)
            progress.show(n_clips)
            del batch, means  # else they would lie beside those of the next step: 0.2 GB at batch 256
    state.check_finite(update.lr)
    processes.share_buffers(model)
    seconds = time.monotonic() - started
    sums = processes.sum(state.sums).tolist()
    metrics = {f"train/{name}": value / state.n_clips for name, value in zip(state.names, sums, strict=True)}
    metrics |= {"train/lr": update.lr, "train/seconds": seconds}
    return metrics | {"train/clips_per_second": (state.n_clips - n_before) / seconds}


class Progress(AbstractContextManager):
    """The bar of an epoch; where it reads the loss anyway, one that is not finite ends training.

    Args:
        n_total: clips of the epoch, over all processes.
    """

    def __init__(self, update: Update, n_total: int):
        self.update, self.next_read = update, time.monotonic() + READ_SECONDS
        state = update.state
        self.bar = tqdm(
            total=n_total, initial=state.n_clips, desc=f"epoch {state.epoch}", unit="clip", leave=False,
            disable=None if update.machine.processes.is_main else True,
        )  # fmt: skip

    def show(self, n_clips: int) -> None:
        self.bar.update(n_clips)
        if time.monotonic() > self.next_read:
            state, update = self.update.state, self.update
            state.check_finite(update.lr)
            mean = state.sums[0].item() * update.machine.processes.size / state.n_clips
            self.bar.set_postfix_str(f"loss {mean:.4f}, lr {update.lr:.2e}", refresh=False)
            self.next_read = time.monotonic() + READ_SECONDS

    def __exit__(self, *_exception) -> None:
        self.bar.close()


def check_shapes(model: nn.Module, frontend: nn.Module, n_samples: int, device: torch.device) -> None:
    """Sends silence through front end and network, so that options which do not go together end no run that has begun.

    In training mode, in which PaSST drops patches. Nothing is learned and no random number is used up.

    Args:
        n_samples: length of a clip.

    Raises:
        ValueError: when the clips are too short for the front end, or its spectrograms are not for this network.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch norm updates its statistics
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            log_mel = frontend.train()(torch.zeros(2, n_samples, device=device))  # (batch, 1, mel, time)
            torch.func.functional_call(model.train(), buffers, log_mel)
        except ValueError as error:
            raise ValueError(f"front end and network cannot take these clips: {error}") from error


@torch.inference_mode()
def predict(
    model: nn.Module, frontend: nn.Module, clips: Clips, machine: Machine, after_batch: Callable[[], None] | None = None
) -> Tensor:
    """Logits (clip, class) of all clips in their order, float32 on the CPU; nothing random, nothing is learned.

    A network that `answers_by_device` is told the recording devices, see models/device_models.py.

    Several processes share the clips, each clip with one of them, and all receive the logits of all.

    Args:
        after_batch: may raise to leave; all processes call it equally often.

    Raises:
        NonFiniteLogitsError: when the network answers NaN or infinity.
    """
    model.eval()
    frontend.eval()
    processes = machine.processes
    own = processes.share(torch.arange(len(clips)))
    n_rounds = -(-len(clips) // (processes.size * machine.batch_size))  # of the process with the most clips
    loader = iter(batches(clips, own, machine.batch_size, machine.device, n_ahead=machine.n_ahead))
    logits = []
    for _ in tqdm(
        range(n_rounds), desc="scoring", unit="batch", leave=False, disable=None if processes.is_main else True
    ):
        if (batch := next(loader, None)) is not None:
            of_devices = []
            if getattr(model, "answers_by_device", False):
                of_devices = [[clips.recording_devices[i] for i in batch.recording_device.tolist()]]
            logits.append(model(frontend(batch.waveform), *of_devices).float())
        if after_batch is not None:
            after_batch()
    logits = torch.cat(logits).cpu()
    if not logits.isfinite().all():
        raise NonFiniteLogitsError(
            "the network answers with NaN or infinity: its weights have diverged or are too large for its precision"
        )
    if processes.size == 1:
        return logits
    whole = logits.new_empty(len(clips), logits.shape[1])
    for rank, part in enumerate(processes.gather(logits)):
        whole[rank :: processes.size] = part
    return whole


def evaluate(
    model: nn.Module, frontend: nn.Module, data: Data, machine: Machine, prefix: str = "",
    after_batch: Callable[[], None] | None = None,
) -> tuple[dict[str, float], Tensor]:  # fmt: skip
    """Metrics of the held-out part, where there is one, and of the test part, and the logits of the latter.

    Args:
        prefix: of the metrics' names, `<prefix>val/...` and `<prefix>test/...`.
        after_batch: as for `predict`.
    """
    metrics, logits = {}, None
    for part, clips in (("val", data.val), ("test", data.test)):
        if clips is not None:
            logits = predict(model, frontend, clips, machine, after_batch)
            metrics |= {f"{prefix}{part}/{key}": value for key, value in score(clips, logits, data.groups).items()}
    return metrics, logits
