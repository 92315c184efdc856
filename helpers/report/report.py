"""What a run looks like at its end: tables for the terminal, curves, a confusion matrix, and a report of all three."""

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.tau import DataError
from helpers.evaluate.confusions import confusion_matrix
from helpers.report.text import align

log = logging.getLogger(__name__)

# Okabe & Ito's palette: told apart with any kind of colour vision.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TABLE_WIDTH = 100  # columns of the terminal
NAME_WIDTH = 48  # columns for a name in a table
LABEL_LENGTH = 24  # characters of a name in a figure
KINDS = ("scene", "device", "city")


@dataclass(frozen=True)
class Table:
    """Scores of one kind of group; rows are (name, accuracy in [0, 1], log loss, clips), None where not measured."""

    title: str
    rows: list[tuple[str, float | None, float | None, float | None]]
    n_parts: int  # rows before the summaries

    def cells(self) -> list[tuple[str, str, str, str]]:
        """Text of the header and of every row."""
        header = (self.title, "acc %", "log loss", "clips")
        return [header] + [
            (name, _number(acc and 100 * acc, ".2f"), _number(loss, ".3f"), _number(count, ",.0f"))
            for name, acc, loss, count in self.rows
        ]


def metric_tables(metrics: Mapping[str, float], split: str = "test") -> str:
    """Class-wise, device-wise and city-wise tables of one split, as lines of at most 100 columns; only what occurs.

    Args:
        metrics: by path, such as `test/acc/device/s5`; accuracies in [0, 1], shown in percent.

    Raises:
        ValueError: if the metrics hold no accuracy of the split.
    """
    tables = _tables(metrics, split)
    blocks = [[_summary(metrics, split)]]
    row: list[list[str]] = []
    for table in map(_text_table, tables):
        if row and sum(len(lines[0]) + 4 for lines in [*row, table]) - 4 > TABLE_WIDTH:
            blocks.append(_side_by_side(row))
            row = []
        row.append(table)
    if row:
        blocks.append(_side_by_side(row))
    return "\n\n".join("\n".join(lines) for lines in blocks)


def epoch_line(epoch: int, metrics: Mapping[str, float]) -> str:
    """What the terminal shows of an epoch: loss, learning rate, speed, and accuracies where they were measured."""
    line = f"epoch {epoch}:"
    if "train/loss" in metrics:
        line += f" loss {metrics['train/loss']:.4f}, lr {metrics['train/lr']:.2e}, "
        line += f"{metrics['train/clips_per_second']:.0f} clips/s"
    for part in ("val", "test", "fp32/val", "fp32/test"):
        if f"{part}/acc" in metrics:
            groups = [
                f"{g} {metrics[key]:.1%}" for g in ("real", "seen", "unseen") if (key := f"{part}/acc/{g}") in metrics
            ]
            line += f"; {part} accuracy {metrics[f'{part}/acc']:.1%} ({', '.join(groups)})"
    return line


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation over seeds with their number, such as `57.0 +- 1.1 (5)`.

    The deviation has two significant digits and the mean as many decimals; a single value stands alone.

    Raises:
        ValueError: if there is no value.
    """
    if not len(values):
        raise ValueError("spread needs at least one value, got none")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.4g} (1)"
    deviation = statistics.stdev(values)
    decimals = max(0, 1 - math.floor(math.log10(deviation))) if 0 < deviation < math.inf else 4
    return f"{mean:.{decimals}f} +- {deviation:.{decimals}f} ({len(values)})"


def read_history(path: Path | str) -> list[dict[str, float]]:
    """Reads metrics.jsonl: one dict per epoch, NaN where the file says null.

    Half a last line is left out, and with a warning each line that does not hold the numbers of an epoch: one damaged
    line must not cost the report of a long run.

    Raises:
        OSError: if the file cannot be read.
    """
    history = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # a run that is being written, or was killed while it wrote
        try:
            row = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
        except (ValueError, AttributeError, RecursionError):
            row = {}
        if "epoch" in row and all(type(value) in (int, float) for value in row.values()):
            history.append(row)
        else:
            log.warning("%s: line %d does not hold the metrics of an epoch and is left out", path, number)
    return history


def write_curves(history: Sequence[Mapping[str, float]], path: Path | str) -> None:
    """Draws losses, learning rate and accuracies over the epochs as PNG; what was not logged is left out.

    Args:
        history: metrics by path with the key `epoch`, as `read_history` gives them.

    Raises:
        ValueError: if the history is empty.
    """
    if not history:
        raise ValueError(f"{path}: no epoch to draw")
    from matplotlib.ticker import LogLocator

    figure = _figure(11, 6)
    axes = figure.subplot_mosaic([["loss", "acc"], ["lr", "acc"]], height_ratios=[2, 1])
    groups = dict.fromkeys(key for row in history for key in row if key.startswith("test/acc/") and key.count("/") == 2)
    losses = {
        "test/loss": "test",
        "val/loss": "validation",
        "train/loss": "train",
        "train/label_loss": "train: labels",
        "train/kd_loss": "train: distillation",
    }
    if not any(row.get("train/kd_loss") for row in history):  # no teacher: the labels' loss is the whole
        del losses["train/label_loss"], losses["train/kd_loss"]
    accuracies = {"test/acc": "test", "val/acc": "validation"} | {key: f"test: {key.split('/')[2]}" for key in groups}
    _draw_lines(axes["loss"], history, losses, "loss")
    _draw_lines(axes["lr"], history, {"train/lr": "learning rate"}, "learning rate")
    _draw_lines(axes["acc"], history, accuracies, "accuracy (%)", factor=100)
    lowest, highest = axes["loss"].dataLim.intervaly
    if 0 < lowest < highest / 10:  # distillation and log loss differ by more than a factor of ten
        axes["loss"].set_yscale("log")
        axes["loss"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes["loss"].yaxis.set_major_formatter("{x:g}")
        axes["loss"].minorticks_off()
    axes["lr"].set_ylim(bottom=0)
    axes["lr"].yaxis.set_major_formatter("{x:g}")
    for name in ("loss", "acc"):
        # Above the panel, where no curve runs. Nothing drawn, as after training without evaluation, needs no legend.
        if axes[name].lines:
            axes[name].legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    for name in ("lr", "acc"):
        axes[name].set_xlabel("epoch")
    figure.savefig(path)


def write_confusion_matrix(
    predictions: Sequence[int] | np.ndarray,
    targets: Sequence[int] | np.ndarray,
    names: Sequence[str],
    path: Path | str,
) -> None:
    """Draws as PNG which class is taken for which: rows are true classes and add up to 100 %.

    Up to 12 classes the cells hold percent and number of clips, up to 24 percent alone, beyond that colours.

    Args:
        predictions: class numbers (clip,).
        targets: true class numbers (clip,).
        names: class names by number.

    Raises:
        ValueError: if the two differ in length, or a number has no name.
    """
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    n_classes = len(names)
    if predictions.shape != targets.shape or predictions.ndim != 1 or not len(targets):
        raise ValueError(f"need as many predictions as targets, got {predictions.shape} and {targets.shape}")
    if min(predictions.min(), targets.min()) < 0 or max(predictions.max(), targets.max()) >= n_classes:
        raise ValueError(f"class numbers must lie in [0, {n_classes - 1}], as there are {n_classes} names")
    counts = confusion_matrix(predictions, targets, n_classes)
    n_clips = counts.sum(axis=1, keepdims=True)  # (true class, 1)
    percent = np.divide(100 * counts, n_clips, where=n_clips > 0, out=np.full(counts.shape, np.nan))

    cell = 0.62 if n_classes <= 12 else 0.42 if n_classes <= 24 else 0.25  # inches
    side = max(3.2, cell * n_classes)
    figure = _figure(side, side, layout="none")  # grows around the cells, which keep their size, when it is saved
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_facecolor("#e8e8e8")  # shows where a class has no clips, which imshow leaves blank
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    font = 9 if n_classes <= 24 else 7
    labels = [_shorten(name, LABEL_LENGTH) for name in names]
    axes.set_xticks(range(n_classes), labels, rotation=45 if n_classes <= 24 else 90, fontsize=font, parse_math=False)
    if n_classes <= 24:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n_classes), labels, fontsize=font, parse_math=False)
    axes.set_xticks(np.arange(n_classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n_classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1 if n_classes <= 24 else 0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="true")
    cells = "cells: % of the true class" + (", below it clips" if n_classes <= 12 else "") if n_classes <= 24 else ""
    axes.set_title(f"{np.trace(counts) / counts.sum():.2%} of {counts.sum():,} clips are right\n{cells}", fontsize=10)
    bar = figure.colorbar(image, cax=axes.inset_axes([1 + 0.15 / side, 0, 0.2 / side, 1]))
    bar.set_label("% of the true class")
    bar.outline.set_visible(False)

    if n_classes <= 24:
        for true, predicted in zip(*np.nonzero(counts), strict=True):
            share, count = percent[true, predicted], counts[true, predicted]
            text = f"{share:.0f}\n{count:,}" if n_classes <= 12 else f"{share:.0f}"
            axes.text(predicted, true, text, ha="center", va="center", fontsize=8, linespacing=1.3,
                      color="white" if share > 55 else "black")  # fmt: skip
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)


def write_report(
    run_dir: Path | str,
    predictions: Sequence[int] | np.ndarray,
    targets: Sequence[int] | np.ndarray,
    names: Sequence[str],
    split: str = "test",
    note: str = "",
    draw: bool = True,
) -> Path:
    """Writes curves.png, confusion_matrix.png and report.md into a run folder with metrics.jsonl; returns the last.

    Args:
        predictions: class numbers (clip,) after the last epoch.
        targets: true class numbers (clip,).
        names: class names by number.
        note: what a reader must know before the numbers, such as that the data are generated.
        draw: False where the figures are there already.

    Raises:
        OSError: if metrics.jsonl cannot be read or the disk is full.
        DataError: if no epoch has metrics of the split.
    """
    run_dir = Path(run_dir)
    history = read_history(run_dir / "metrics.jsonl")
    scored = [row for row in history if f"{split}/acc" in row]
    if not scored:
        raise DataError(f"{run_dir / 'metrics.jsonl'} holds no {split} metrics")
    if draw:
        write_curves(history, run_dir / "curves.png")
        write_confusion_matrix(predictions, targets, names, run_dir / "confusion_matrix.png")

    metrics = scored[-1]
    hours = sum(row.get("train/seconds", 0.0) for row in history) / 3600
    parts = [f"# Run {run_dir.resolve().name}"]
    if note:
        parts.append("\n".join(f"> {line}" for line in note.splitlines()))
    parts += [
        f"Metrics after epoch {metrics['epoch']:.0f}, counted from 0: the last one, not the best.\n"
        f"Training took {_duration(hours)}. Options are in [options.json](options.json), the metrics of all epochs in "
        "[metrics.jsonl](metrics.jsonl).",
        f"**{_summary(metrics, split)}**",
        *map(_markdown_table, _tables(metrics, split)),
        *(["More is in [report.html](report.html)."] if (run_dir / "report.html").is_file() else []),
        "![Loss, learning rate and accuracy over the epochs](curves.png)",
        "![Confusion matrix](confusion_matrix.png)",
    ]
    path = run_dir / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _tables(metrics: Mapping[str, float], split: str) -> list[Table]:
    if f"{split}/acc" not in metrics:
        splits = sorted({key.split("/")[0] for key in metrics if "/acc" in key})
        raise ValueError(f"there are no metrics of the split {split!r}; there are {', '.join(splits) or 'none'}")

    def row(name: str, key: str) -> tuple:
        return name, *(metrics.get(f"{split}/{field}{key}") for field in ("acc", "loss", "count"))

    prefix = f"{split}/acc/"
    keys = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    tables = []
    for kind in KINDS:
        rows = [row(key.removeprefix(f"{kind}/"), f"/{key}") for key in keys if key.startswith(f"{kind}/")]
        n_parts = len(rows)
        if kind == "scene" and rows:
            rows.append(("macro average", metrics.get(f"{split}/macro_avg_acc"), None, None))
        if kind == "device":
            rows += [row(key, f"/{key}") for key in keys if "/" not in key]
        if rows:
            tables.append(Table(kind, [*rows, row("all", "")], n_parts))
    return tables


def _summary(metrics: Mapping[str, float], split: str) -> str:
    count, macro, loss = (metrics.get(f"{split}/{key}") for key in ("count", "macro_avg_acc", "loss"))
    parts = [f"accuracy {_number(100 * metrics[f'{split}/acc'], '.2f')} %"]
    parts += [] if macro is None else [f"macro average {_number(100 * macro, '.2f')} %"]
    parts += [] if loss is None else [f"log loss {_number(loss, '.3f')}"]
    return f"{split}{'' if count is None else f' ({count:,.0f} clips)'}: {', '.join(parts)}"


def _text_table(table: Table) -> list[str]:
    lines = align([(_shorten(name, NAME_WIDTH), *numbers) for name, *numbers in table.cells()])
    rule = "-" * len(lines[0])
    parts = lines[1 : 1 + table.n_parts]
    return [lines[0], rule, *parts, *([rule] if parts else []), *lines[1 + table.n_parts :]]


def _markdown_table(table: Table) -> str:
    header, *rows = table.cells()
    lines = [header, ("---", "---:", "---:", "---:"), *rows[: table.n_parts]]
    lines += [tuple(f"**{cell}**" for cell in row) for row in rows[table.n_parts :]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _side_by_side(tables: Sequence[list[str]]) -> list[str]:
    height = max(map(len, tables))
    padded = [lines + [" " * len(lines[0])] * (height - len(lines)) for lines in tables]
    return ["    ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _duration(hours: float) -> str:
    minutes = 60 * hours
    return f"{60 * minutes:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _shorten(name: str, length: int) -> str:
    """Cuts out the middle of a long name: numbered names differ at their ends."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"


def _figure(width: float, height: float, layout: str = "constrained"):
    """A matplotlib figure (inches) that is drawn without a window and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _draw_lines(axes: Any, history: Sequence[Mapping], labels: Mapping[str, str], ylabel: str, factor: int = 1) -> None:
    """Draws the metrics that occur, each over the epochs that have it: not every epoch need be evaluated."""
    from matplotlib.ticker import MaxNLocator

    for i, (key, label) in enumerate(labels.items()):  # a colour stands for the same metric in every run
        points = [(row["epoch"], factor * row[key]) for row in history if math.isfinite(row.get(key, math.nan))]
        if points:
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": "--" if key.startswith("val/") else "-"}
            marker = "o" if len(points) <= 25 else None  # a single epoch is no line
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, linewidth=1.6, **style)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
