"""TensorBoard's event files."""

import logging
from collections.abc import Mapping
from typing import Any

from helpers.runs.backend import Results, Run

log = logging.getLogger(__name__)


class TensorboardLogger:
    """Writes event files to `<run>/tensorboard`; the step is the epoch.

    Raises:
        ValueError: if tensorboard is not installed.
    """

    def __init__(self, run: Run):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"logger tensorboard needs a package ({error}): pip install tensorboard") from None
        # From purge_step on, TensorBoard hides what an interrupted run wrote before it was resumed.
        self._writer = SummaryWriter(run.dir / "tensorboard", purge_step=run.resume_epoch)
        self._options, self._epoch = run.options, run.resume_epoch or 0

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, epoch)
        self._epoch = epoch
        self._writer.flush()

    def show(self, results: Results) -> None:
        from matplotlib.image import imread
        from torch.utils.tensorboard.summary import hparams

        options = {name: _simple(value) for name, value in self._options.items() if value is not None}
        for summary in hparams(options, {name: float(value) for name, value in results.metrics.items()}):
            self._writer.file_writer.add_summary(summary)  # its own add_hparams would put them into another run
        for name, path in results.figures.items():
            self._writer.add_image(name, imread(path)[..., :3], self._epoch, dataformats="HWC")
        for name, table in results.tables.items():
            self._writer.add_text(name, _markdown(table.columns, table.rows), self._epoch)
        for sound in results.sounds:
            self._writer.add_audio(f"clips/{sound.name}", sound.samples[None], self._epoch, sound.rate)
            self._writer.add_text(f"clips/{sound.name}", sound.caption, self._epoch)
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        self._writer.close()


def _simple(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _markdown(columns: list[str], rows: list[list[Any]]) -> str:
    cells = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
