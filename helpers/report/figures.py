"""Figures of evaluations as PNG files: accuracy by device, reliability, and spectrograms."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from helpers.evaluate.calibration import Reliability
from helpers.report.report import COLOURS, _figure, _shorten


def write_device_bars(accuracies: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draws accuracies (in [0, 1]) by system and device as groups of bars, a group for each device."""
    devices = list(dict.fromkeys(device for found in accuracies.values() for device in found))
    figure = _figure(max(5.0, min(11.0, 0.4 * len(devices) * (len(accuracies) + 1))), 3.6)
    axes = figure.add_subplot()
    width = 0.8 / len(accuracies)
    for i, (name, found) in enumerate(accuracies.items()):
        at = np.arange(len(devices)) + (i - (len(accuracies) - 1) / 2) * width
        heights = [100 * found.get(device, np.nan) for device in devices]
        axes.bar(at, heights, width, label=_shorten(name, 32), color=COLOURS[(i + 1) % len(COLOURS)])
    axes.set_xticks(range(len(devices)), [_shorten(device, 16) for device in devices], parse_math=False,
                    rotation=0 if len(devices) <= 12 else 60)  # fmt: skip
    axes.set(ylabel="accuracy (%)", xlabel="recording device", ylim=(0, 100))
    _finish(axes, len(accuracies))
    figure.savefig(path)


def write_reliability(reliabilities: Mapping[str, Reliability], path: Path) -> None:
    """Draws accuracy over confidence, each point as large as its share of the clips; on the diagonal both are equal."""
    figure = _figure(4.6, 4.6)
    axes = figure.add_subplot()
    axes.plot([0, 100], [0, 100], color="#888888", linewidth=1, linestyle=":")
    for i, (name, found) in enumerate(reliabilities.items()):
        colour = COLOURS[(i + 1) % len(COLOURS)]
        label = f"{_shorten(name, 28)}: ECE {100 * found.error:.1f} %"
        axes.plot(100 * found.confidence, 100 * found.accuracy, color=colour, linewidth=1.2, label=label)
        axes.scatter(100 * found.confidence, 100 * found.accuracy, 400 * found.count / found.count.sum(), color=colour)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100), aspect="equal")
    _finish(axes, 1)
    figure.savefig(path)


def spectrogram(log_mel: np.ndarray) -> bytes:
    """A spectrogram (mel, time) as a PNG file with a pixel for each cell, low bands at the bottom."""
    from matplotlib.image import imsave

    low, high = np.percentile(log_mel, [0.5, 99.9])
    file = io.BytesIO()
    imsave(file, log_mel, vmin=low, vmax=max(high, low + 1e-6), cmap="magma", origin="lower", format="png")
    return file.getvalue()


def _finish(axes, n_columns: int) -> None:
    axes.grid(color="#dddddd", linewidth=0.6, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=min(n_columns, 3), loc="lower left", bbox_to_anchor=(0, 1))


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG file in pixels."""
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
