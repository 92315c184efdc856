"""Cropped training: windows of the clip length from the joined segments of a recording, instead of the segments.

Source: F. Schmid et al., technical report of DCASE 2023 Task 1, whose teachers train on such crops; no code of it is
published: https://dcase.community/documents/challenge2023/technical_reports/DCASE2023_Schmid_28_t1.pdf

TAU22's clips are recordings of ten seconds cut into segments of one, and the waveform store keeps the segments of a
recording side by side, so a window is one contiguous piece of the file. Where clips are resampled, that is a store of
its own, from `open_joined_store`: segments that were resampled one by one do not meet without a click.
"""

import numpy as np
import torch
from torch import Tensor

from datasets.cache import WaveformStore
from datasets.tau import DataError, Meta, follows
from datasets.waveforms import Clips

CROP_STREAM = 1  # keeps the draws apart from those of `epoch_order`, which takes the same seed and epoch


class CroppedClips(Clips):
    """A training part whose items are random windows; `start_epoch` draws them, and must be called first.

    The item at position i is a window, one clip long, of the run of clip i: the stretch of this part's clips that were
    recorded together, by one recording device, with no segment missing between them. Its start is uniform over the run,
    to the sample. Number of items, labels, recording device and city are those of `Clips`; a clip without neighbours
    gives itself.

    Teacher logits are interpolated linearly between the one or two segments that a window overlaps, each weighted by
    its share of the window: an approximation, exact where the window is a segment.

    Args:
        meta, rows, store, teacher_logits: as for `Clips`; the store is that of `open_joined_store`.

    Raises:
        DataError: where no two clips are neighbours.
    """

    def __init__(self, meta: Meta, rows: np.ndarray, store: WaveformStore, teacher_logits: np.ndarray | None = None):
        super().__init__(meta, rows, store, teacher_logits)
        by_row = np.argsort(self.store_rows)  # rank in the store -> position in this part
        self._resident_rows = self.store_rows[by_row]
        first, length = find_runs(self._resident_rows, self.files[by_row])
        rank = np.empty_like(by_row)
        rank[by_row] = np.arange(len(by_row))
        self._position = torch.from_numpy(by_row)  # (clip,) by rank
        self._run_first = torch.from_numpy(first[rank])  # (clip,) rank of the first segment of each clip's run
        self._run_length = torch.from_numpy(length[rank])  # (clip,) segments
        # Row of that first segment where the waveforms are read from: the file, or the device's memory.
        self._run_row = torch.from_numpy(self._resident_rows)[self._run_first]
        self._starts: Tensor | None = None
        if len(rows) and length.max() == 1:
            raise DataError(
                f"windows of recordings need neighbouring segments, which TAU22's file names tell; the training part "
                f"of {meta.root} has none: leave --cropped away"
            )

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Draws the windows of a whole epoch: a function of the arguments and the list of clips alone.

        So an interrupted epoch goes on with the same windows, and all processes of a distributed run draw the same.
        """
        last = (self._run_length.cpu().numpy() - 1) * self.store.n_samples
        starts = np.random.default_rng([seed, epoch, CROP_STREAM]).integers(last, endpoint=True)
        self._starts = torch.from_numpy(starts).to(self.scene.device)  # (clip,) samples from the start of the run

    def load_onto(self, device: torch.device) -> None:
        """Copies all waveforms, in the order of the store, and labels into the memory of `device`."""
        super().load_onto(device)
        for name in ("_position", "_run_first", "_run_length"):
            setattr(self, name, getattr(self, name).to(device))
        self._run_row = self._run_first
        if self._starts is not None:
            self._starts = self._starts.to(device)

    def _window_starts(self, index: Tensor) -> Tensor:
        """First samples (batch,) of the items' windows, from the start of their runs."""
        if self._starts is None:
            raise RuntimeError("start_epoch must be called before the batches of an epoch are read")
        return self._starts[index]

    def _waveform(self, index: Tensor) -> Tensor:
        return self._windows(self._run_row[index] * self.store.n_samples + self._window_starts(index))

    def _windows(self, start: Tensor) -> Tensor:
        """Windows (batch, sample) that begin at these samples (batch,) of all waveforms in a row."""
        n_samples = self.store.n_samples
        if self._on_device is None:
            return torch.from_numpy(self.store.read_windows(start.numpy(), n_samples))
        return self._on_device.view(-1).unfold(0, n_samples, 1)[start]  # of a view (start, sample): no index per sample

    def _teacher_logits(self, index: Tensor) -> Tensor:
        n_samples = self.store.n_samples
        start = self._window_starts(index)
        segment = start // n_samples
        share = (start % n_samples).float() / n_samples  # (batch,) of the window that lies in the following segment
        following = torch.minimum(segment + 1, self._run_length[index] - 1)  # itself, at a share of 0, at the end
        first = self._run_first[index]
        logits = self.teacher_logits[self._position[first + segment]].float()
        following_logits = self.teacher_logits[self._position[first + following]].float()
        return torch.lerp(logits, following_logits, share[:, None])


class ShiftedClips(CroppedClips):
    """A training part whose items are the clips themselves, moved back in their recordings by a step or several.

    Source: dragonsearch, https://github.com/dragonsearch/DCASE-Task1, as it means it: a run is joined, rolled by
    `step`, 2 `step`, ... (all under a clip's length, each as likely) to the right, and cut into clips again. So what
    comes first in a run begins with the end of the run. The published code cuts all clips of a shift at the beginning
    of the run, a sample apart.

    Args:
        meta, rows, store, teacher_logits: as for `CroppedClips`.
        step: of the shifts in seconds; shorter than a clip.

    Raises:
        DataError: for a step that is not.
    """

    def __init__(
        self, meta: Meta, rows: np.ndarray, store: WaveformStore, teacher_logits: np.ndarray | None = None,
        step: float = 0.1,
    ):  # fmt: skip
        super().__init__(meta, rows, store, teacher_logits)
        seconds = store.n_samples / store.sample_rate
        n_shifts = int(np.ceil(seconds / step - 1e-9)) - 1  # shifts shorter than a clip
        if n_shifts < 1:
            raise DataError(f"crop_shift must be below {seconds:g}, the seconds of a clip, got {step:g}")
        self.shifts = np.round(step * np.arange(1, n_shifts + 1) * store.sample_rate).astype(np.int64)  # samples
        rank = np.empty(len(self.files), dtype=np.int64)
        rank[self._position.numpy()] = np.arange(len(rank))
        self._segment = rank - self._run_first.numpy()  # (clip,) number of each clip in its run

    def start_epoch(self, seed: int, epoch: int) -> None:
        shift = np.random.default_rng([seed, epoch, CROP_STREAM]).choice(self.shifts, len(self._segment))
        self._starts = torch.from_numpy(self._segment * self.store.n_samples - shift).to(self.scene.device)

    def _waveform(self, index: Tensor) -> Tensor:
        n_samples, start = self.store.n_samples, self._window_starts(index)
        # The last clip of the run stands before its first.
        last, wraps = (self._run_length[index] - 1) * n_samples, start < 0
        run = self._run_row[index] * n_samples
        before = self._windows(run + torch.where(wraps, last, start))  # (batch, sample)
        after = self._windows(run + torch.where(wraps, 0, start))
        offset = torch.where(wraps, n_samples + start, 0)
        both = torch.cat([before, after], dim=1).unfold(1, n_samples, 1)  # (batch, sample + 1, sample), a view
        return both[torch.arange(len(index), device=offset.device), offset]

    def _teacher_logits(self, index: Tensor) -> Tensor:
        n_samples, length = self.store.n_samples, self._run_length[index]
        start = self._window_starts(index) % (length * n_samples)
        segment = start // n_samples
        share = (start % n_samples).float() / n_samples
        first = self._run_first[index]
        logits = self.teacher_logits[self._position[first + segment]].float()
        following = self.teacher_logits[self._position[first + (segment + 1) % length]].float()
        return torch.lerp(logits, following, share[:, None])


def find_runs(store_rows: np.ndarray, files: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the stretches of clips that are one piece of a recording, without gaps in the store or in time.

    Args:
        store_rows: rows of the store (clip,), ascending.
        files: the clips' file names (clip,).

    Returns:
        For each clip the position of the first clip of its run, and the number of clips in the run, both (clip,) int64.
    """
    starts = ~follows(files)  # whether a run begins here
    starts[1:] |= np.diff(store_rows) != 1
    run = np.cumsum(starts) - 1  # number of each clip's run
    return np.flatnonzero(starts)[run], np.bincount(run)[run]
