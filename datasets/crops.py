"""Cropped training: windows of the clip length from the joined segments of a recording, instead of the segments.

Source: F. Schmid et al., technical report of DCASE 2023 Task 1, whose teachers train on such crops; no code of it is
published: https://dcase.community/documents/challenge2023/technical_reports/DCASE2023_Schmid_28_t1.pdf

TAU22's clips are recordings of ten seconds cut into segments of one, and the waveform store keeps the segments of a
recording side by side, so a window is one contiguous piece of the file. Where clips are resampled, that is a store of
its own, from `open_joined_store`: segments that were resampled one by one do not meet without a click.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from datasets.cache import WaveformStore
from datasets.tau import Meta, follows
from datasets.waveforms import Clips

log = logging.getLogger(__name__)

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
            log.warning("cropped training has no effect: no two clips here are neighbouring segments of a recording")

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
        n_samples = self.store.n_samples
        start = self._run_row[index] * n_samples + self._window_starts(index)
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
