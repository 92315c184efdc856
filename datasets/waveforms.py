"""Batches of waveforms: the part of a data set that a script trains or scores on, read by index from its store."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.audio import FULL_SCALE
from datasets.cache import WaveformStore
from datasets.tau import UNKNOWN_DEVICE, Evaluation, Meta


@dataclass(frozen=True)
class Batch:
    """What flows from the store to the loss. Every field but `waveform` may be None; nothing is changed in place."""

    waveform: Tensor  # (batch, sample) float32 in [-1, 1]; int16 as stored until `to` is called
    target: Tensor | None = None  # (batch, class) float32, rows sum to 1
    recording_device: Tensor | None = None  # (batch,) int64
    teacher_logits: Tensor | None = None  # (batch, class) float32
    log_mel: Tensor | None = None  # (batch, 1, mel, time) float32
    teacher_log_mel: Tensor | None = None  # (batch, 1, mel, time) float32, of a teacher that is run on the fly

    def to(self, device: torch.device) -> "Batch":
        """Moves every field; 16-bit waveforms travel as they are and become floats there."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        if moved["waveform"].dtype == torch.int16:
            moved["waveform"] = moved["waveform"].float() / FULL_SCALE
        return replace(self, **moved)


class Clips:
    """One part of a data set: its waveforms and everything known about each clip.

    Args:
        meta: the data set.
        rows: rows of meta.csv (clip,), in the order of this part.
        store: the waveforms; None where only the labels are needed.
        teacher_logits: (clip, class) float, aligned with `rows`; None without a teacher.
    """

    def __init__(
        self, meta: Meta, rows: np.ndarray, store: WaveformStore | None, teacher_logits: np.ndarray | None = None
    ):
        self.meta = meta
        self.rows = rows
        self.files = meta.files[rows]
        self.scene = torch.from_numpy(meta.scene[rows])
        self.recording_device = torch.from_numpy(meta.recording_device[rows])
        self.city = torch.from_numpy(meta.city[rows])
        self.teacher_logits = None if teacher_logits is None else torch.as_tensor(teacher_logits)
        self.store = store
        self.store_rows = None if store is None else store.rows(self.files)
        self._resident_rows = self.store_rows  # in the order in which `load_onto` keeps them
        self._on_device: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def recording_devices(self) -> tuple[str, ...]:
        """Names of the devices, by the numbers in `recording_device`."""
        return self.meta.recording_devices

    @property
    def n_bytes(self) -> int:
        """Size of the waveforms of this part in memory, as stored."""
        return 2 * len(self) * self.store.n_samples

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Called before an epoch's batches; a part whose items change from epoch to epoch draws them here."""

    def load_onto(self, device: torch.device) -> None:
        """Copies all waveforms and labels into the memory of `device`, block by block; batches then start there."""
        waveforms = torch.empty(len(self), self.store.n_samples, dtype=torch.int16, device=device)
        for start in range(0, len(self), 1024):
            block = self.store.read(self._resident_rows[start : start + 1024])
            waveforms[start : start + 1024] = torch.from_numpy(block).to(device)
        self._on_device = waveforms
        self.scene, self.recording_device = self.scene.to(device), self.recording_device.to(device)
        if self.teacher_logits is not None:
            self.teacher_logits = self.teacher_logits.to(device)

    def batch(self, index: Tensor) -> Batch:
        """The clips at positions `index` (batch,) of this part."""
        index = index.to(self.scene.device)
        return Batch(
            waveform=self._waveform(index),
            target=F.one_hot(self.scene[index], len(self.meta.scenes)).float(),
            recording_device=self.recording_device[index],
            teacher_logits=None if self.teacher_logits is None else self._teacher_logits(index),
        )

    def _waveform(self, index: Tensor) -> Tensor:
        """Waveforms (batch, sample) int16 of the items at `index`."""
        if self._on_device is None:
            return torch.from_numpy(self.store.read(self.store_rows[index.numpy()]))
        return self._on_device[index]

    def _teacher_logits(self, index: Tensor) -> Tensor:
        """Teacher logits (batch, class) float32 of the items at `index`."""
        return self.teacher_logits[index].float()


class UnlabelledClips(Clips):
    """The clips of an evaluation set: audio, and the recording devices where the list tells them; nothing to learn."""

    def __init__(self, evaluation: Evaluation, store: WaveformStore):
        names = np.full(len(evaluation), UNKNOWN_DEVICE, dtype=object)
        if evaluation.recording_device is not None:
            names = evaluation.recording_device
        self._device_names, codes = np.unique(names.astype(str), return_inverse=True)
        self.meta, self.rows, self.files = evaluation, np.arange(len(evaluation)), evaluation.files
        self.scene = torch.full((len(evaluation),), -1)
        self.recording_device = torch.from_numpy(codes)
        self.teacher_logits, self._on_device = None, None
        self.store, self.store_rows = store, store.rows(self.files)
        self._resident_rows = self.store_rows

    @property
    def recording_devices(self) -> tuple[str, ...]:
        return tuple(self._device_names.tolist())

    def batch(self, index: Tensor) -> Batch:
        index = index.to(self.scene.device)
        return Batch(waveform=self._waveform(index), recording_device=self.recording_device[index])


def epoch_order(n_clips: int, seed: int, epoch: int) -> Tensor:
    """The order (clip,) in which epoch `epoch` goes through the training part: a function of its arguments alone.

    So an interrupted epoch can go on where it stopped without any sampler state but the number of batches done.
    """
    shuffled = np.random.default_rng([seed, epoch]).permutation(n_clips)
    return torch.from_numpy(shuffled)


def batches(
    clips: Clips,
    order: Tensor,
    batch_size: int,
    device: torch.device,
    start: int = 0,
    n_ahead: int = 1,
    rank: int = 0,
    n_ranks: int = 1,
) -> Iterator[Batch]:
    """Yields the clips in `order` (clip,) as batches on `device`; the last, smaller one is kept.

    Args:
        start: number of batches to pass over.
        n_ahead: batches that a thread reads ahead while the device computes; 0 reads in the caller's thread.
        rank: which share of every batch to read when `n_ranks` processes share it: every n-th clip. Where there are
            fewer clips than processes, the first clip stands in; its loss must not count there.
    """
    pieces = [piece if n_ranks == 1 else _share(piece, rank, n_ranks) for piece in order.split(batch_size)][start:]
    pin = device.type == "cuda"

    def read(piece: Tensor) -> Batch:
        batch = clips.batch(piece)
        return _pin(batch) if pin and batch.waveform.device.type == "cpu" else batch

    if n_ahead == 0 or clips._on_device is not None:
        for piece in pieces:
            yield read(piece).to(device)
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = [reader.submit(read, piece) for piece in pieces[:n_ahead]]
        try:
            for i in range(len(pieces)):
                if i + n_ahead < len(pieces):
                    waiting.append(reader.submit(read, pieces[i + n_ahead]))
                yield waiting.pop(0).result().to(device)
        finally:
            for future in waiting:
                future.cancel()


def _share(piece: Tensor, rank: int, n_ranks: int) -> Tensor:
    own = piece[rank::n_ranks]
    return own if len(own) else piece[:1]


def _pin(batch: Batch) -> Batch:
    pinned = {f.name: value.pin_memory() for f in fields(batch) if (value := getattr(batch, f.name)) is not None}
    return replace(batch, **pinned)
