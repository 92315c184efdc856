"""The training loop of every script: one update path, one prediction path."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets.waveforms import Batch, Clips, batches, epoch_order
from helpers.data import Data
from helpers.distributed import ALONE, Processes
from helpers.metrics import score

READ_SECONDS = 0.5  # how often a loss is read from the device for the progress bar and the check for NaN
ONE_REQUEST_SECONDS = 2.0  # torchrun and make pass on a signal that the terminal has sent to every process already


class NonFiniteLossError(RuntimeError):
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


class NonFiniteLogitsError(ValueError):
    """A network answers NaN or infinity; its scores would mean nothing."""


class StoppedError(Exception):
    """Training was asked to stop and has saved its state; the message says how to resume."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


@dataclass
class LoopState:
    """Where training stands; with the states of model, optimizer and generators all that resuming needs."""

    epoch: int = 0  # epochs finished
    step: int = 0  # batches done in the current epoch
    n_clips: int = 0  # clips done in the current epoch, by all processes
    sums: Tensor | None = None  # (loss term,) float64 on the device: losses of the epoch's own clips, summed
    names: tuple[str, ...] = ()  # of the loss terms
    best: float = float("-inf")  # best score on the held-out part so far

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
class Update:
    """How a batch becomes a step of the optimizer.

    Args:
        batch_size: clips of a step, over all processes.
        n_parts: pieces that a process computes its share of the batch in, adding up their gradients; less memory, the
            same step but for batch norm's statistics. 1 is off.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    batch_size: int
    processes: Processes = ALONE
    n_parts: int = 1

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(
        self, model: nn.Module, loss_fn: Callable[[Tensor, Batch], tuple[Tensor, ...]], batch: Batch, weight: float
    ) -> tuple[tuple[str, ...], Tensor]:
        """One step; returns the names of the loss terms and their means over the batch (loss term,) float64.

        Args:
            weight: of this process's gradient in the mean over all processes.
        """
        n_clips, sums, names = len(batch.waveform), 0.0, ()
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(_split(batch, self.n_parts))
        for i, part in enumerate(parts):
            share = len(part.waveform) / n_clips
            waits = isinstance(model, DistributedDataParallel) and i + 1 < len(parts)
            with model.no_sync() if waits else nullcontext():
                with self.precision.autocast():
                    logits = model(part.log_mel)  # (batch, class)
                terms = loss_fn(logits.float(), part)
                self.scaler.scale(terms[0] * (share * weight)).backward()
            names, sums = terms._fields, sums + torch.stack([term.detach().double() for term in terms]) * share
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return names, sums


def _split(batch: Batch, n_parts: int) -> Iterator[Batch]:
    if n_parts == 1:
        yield batch
        return
    pieces = {f.name: value.chunk(n_parts) for f in fields(batch) if (value := getattr(batch, f.name)) is not None}
    for i in range(len(pieces["waveform"])):
        yield replace(batch, **{name: values[i] for name, values in pieces.items()})


def train_one_epoch(
    model: nn.Module,
    frontend: nn.Module,
    augment: nn.ModuleDict,
    loss_fn: Callable[[Tensor, Batch], tuple[Tensor, ...]],
    loader: Iterable[Batch],
    update: Update,
    state: LoopState,
    after_step: Callable[[], None],
    n_total: int,
) -> dict[str, float]:
    """Trains on the batches that the epoch has left and returns the epoch's metrics, `train/...`.

    They are the mean losses over all clips of the epoch, the learning rate, the seconds and the clips per second.

    Args:
        loss_fn: maps logits (batch, class) and the batch to a named tuple of scalars; the first is minimised.
        loader: this process's shares of the batches, on the device.
        state: advanced with every step.
        after_step: called when `state` stands at a step's end; may raise to leave.
        n_total: clips of a whole epoch, over all processes.

    Raises:
        NonFiniteLossError: with epoch and learning rate.
    """
    for part in (model, frontend, augment):
        part.train()
    processes = update.processes
    started, n_before = time.monotonic(), state.n_clips
    next_read = started + READ_SECONDS
    with tqdm(
        total=n_total, initial=state.n_clips, desc=f"epoch {state.epoch}", unit="clip", leave=False,
        disable=None if processes.is_main else True,
    ) as bar:  # fmt: skip
        for batch in loader:
            with torch.no_grad():
                batch = augment["waveform"](batch)
                batch = replace(batch, log_mel=frontend(batch.waveform))  # (batch, 1, mel, time)
                batch = augment["log_mel"](batch)
            n_clips = min(update.batch_size, n_total - state.n_clips)  # of all processes
            # 0 where the last batch has fewer clips than there are processes and this one stands in with another's.
            n_own = processes.count(n_clips)
            state.names, means = update.step(model, loss_fn, batch, n_own * processes.size / n_clips)
            state.sums = means * n_own if state.sums is None else state.sums + means * n_own
            state.step += 1
            state.n_clips += n_clips
            bar.update(n_clips)
            if time.monotonic() > next_read:
                state.check_finite(update.lr)
                mean = state.sums[0].item() * processes.size / state.n_clips
                bar.set_postfix_str(f"loss {mean:.4f}, lr {update.lr:.2e}", refresh=False)
                next_read = time.monotonic() + READ_SECONDS
            del batch, means  # else they would lie beside those of the next step: 0.2 GB at batch 256
            after_step()
    state.check_finite(update.lr)
    processes.share_buffers(model)
    seconds = time.monotonic() - started
    sums = processes.sum(state.sums).tolist()
    metrics = {f"train/{name}": value / state.n_clips for name, value in zip(state.names, sums, strict=True)}
    metrics |= {"train/lr": update.lr, "train/seconds": seconds}
    return metrics | {"train/clips_per_second": (state.n_clips - n_before) / seconds}


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


def epoch_batches(
    clips: Clips, update: Update, state: LoopState, seed: int, device: torch.device, n_ahead: int = 1
) -> Iterator[Batch]:
    """This process's shares of the batches that the epoch has left, in the epoch's own order."""
    clips.start_epoch(seed, state.epoch)
    order = epoch_order(len(clips), seed, state.epoch)
    processes = update.processes
    return batches(clips, order, update.batch_size, device, state.step, n_ahead, processes.rank, processes.size)


@torch.inference_mode()
def predict(
    model: nn.Module,
    frontend: nn.Module,
    clips: Clips,
    batch_size: int,
    device: torch.device,
    n_ahead: int = 1,
    processes: Processes = ALONE,
    after_batch: Callable[[], None] | None = None,
) -> Tensor:
    """Logits (clip, class) of all clips in their order, float32 on the CPU; nothing random, nothing is learned.

    Several processes share the clips, each clip with one of them, and all receive the logits of all.

    Args:
        after_batch: may raise to leave; all processes call it equally often.

    Raises:
        NonFiniteLogitsError: when the network answers NaN or infinity.
    """
    model.eval()
    frontend.eval()
    own = processes.share(torch.arange(len(clips)))
    n_rounds = -(-len(clips) // (processes.size * batch_size))  # of the process with the most clips
    loader = iter(batches(clips, own, batch_size, device, n_ahead=n_ahead))
    logits = []
    for _ in tqdm(
        range(n_rounds), desc="scoring", unit="batch", leave=False, disable=None if processes.is_main else True
    ):
        if (batch := next(loader, None)) is not None:
            logits.append(model(frontend(batch.waveform)).float())
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
    model: nn.Module,
    frontend: nn.Module,
    data: Data,
    batch_size: int,
    device: torch.device,
    n_ahead: int = 1,
    processes: Processes = ALONE,
    prefix: str = "",
    after_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Metrics of the held-out part, where there is one, and of the test part: `<prefix>val/...`, `<prefix>test/...`.

    Args:
        after_batch: as for `predict`.
    """
    metrics = {}
    for part, clips in (("val", data.val), ("test", data.test)):
        if clips is not None:
            logits = predict(model, frontend, clips, batch_size, device, n_ahead, processes, after_batch)
            metrics |= {f"{prefix}{part}/{key}": value for key, value in score(clips, logits, data.groups).items()}
    return metrics
