"""The training loop of every script: one update path, one prediction path."""

import signal
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets.waveforms import Batch, Clips, batches

READ_SECONDS = 0.5  # how often a loss is read from the device for the progress bar and the check for NaN


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; training cannot go on."""


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
    n_clips: int = 0  # clips done in the current epoch
    sums: Tensor | None = None  # (loss term,) float64 on the device: losses of the current epoch, summed over clips
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
            raise NonFiniteLossError(
                f"the loss is not finite in epoch {self.epoch} at learning rate {lr:g}: lower --lr or use "
                "--precision fp32; what was saved before is untouched"
            )


class StopSignal(AbstractContextManager):
    """Turns SIGTERM or a first Ctrl-C into a request that the loop answers after its step; a second one stops hard."""

    def __init__(self):
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, _frame) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

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


def train_one_epoch(
    model: nn.Module,
    frontend: nn.Module,
    augment: nn.ModuleDict,
    loss_fn: Callable[[Tensor, Batch], tuple[Tensor, ...]],
    loader: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    state: LoopState,
    after_step: Callable[[], None],
    n_total: int,
) -> dict[str, float]:
    """Trains on the batches that the epoch has left and returns the epoch's mean losses.

    Args:
        loss_fn: maps logits (batch, class) and the batch to a named tuple of scalars; the first is minimised.
        loader: batches on the device.
        state: advanced with every step.
        after_step: called when `state` stands at a step's end; may raise to leave.
        n_total: clips of a whole epoch, for the progress bar.

    Raises:
        NonFiniteLossError: with epoch and learning rate.
    """
    for part in (model, frontend, augment):
        part.train()
    lr = optimizer.param_groups[0]["lr"]
    next_read = time.monotonic() + READ_SECONDS
    with tqdm(
        total=n_total, initial=state.n_clips, desc=f"epoch {state.epoch}", unit="clip", leave=False, disable=None
    ) as bar:
        for batch in loader:
            with torch.no_grad():
                batch = augment["waveform"](batch)
                batch = replace(batch, log_mel=frontend(batch.waveform))  # (batch, 1, mel, time)
                batch = augment["log_mel"](batch)
            with precision.autocast():
                logits = model(batch.log_mel)  # (batch, class)
            terms = loss_fn(logits.float(), batch)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(terms[0]).backward()
            scaler.step(optimizer)
            scaler.update()

            n_clips = len(batch.waveform)
            state.names = terms._fields
            weighted = torch.stack([term.detach().double() for term in terms]) * n_clips
            state.sums = weighted if state.sums is None else state.sums + weighted
            state.step += 1
            state.n_clips += n_clips
            bar.update(n_clips)
            if time.monotonic() > next_read:
                state.check_finite(lr)
                bar.set_postfix_str(f"loss {state.sums[0].item() / state.n_clips:.4f}, lr {lr:.2e}", refresh=False)
                next_read = time.monotonic() + READ_SECONDS
            del batch, logits, terms, weighted  # else they would lie beside those of the next step: 0.2 GB at batch 256
            after_step()
    state.check_finite(lr)
    return {name: value / state.n_clips for name, value in zip(state.names, state.sums.tolist(), strict=True)}


@torch.inference_mode()
def predict(
    model: nn.Module, frontend: nn.Module, clips: Clips, batch_size: int, device: torch.device, n_ahead: int = 1
) -> Tensor:
    """Logits (clip, class) of all clips in their order, float32 on the CPU; nothing random, nothing is learned."""
    model.eval()
    frontend.eval()
    logits = [
        model(frontend(batch.waveform)).float()
        for batch in tqdm(
            batches(clips, torch.arange(len(clips)), batch_size, device, n_ahead=n_ahead),
            total=-(-len(clips) // batch_size),
            desc="scoring",
            unit="batch",
            leave=False,
            disable=None,
        )
    ]
    return torch.cat(logits).cpu()
