"""The sections of a page about an evaluation: tables, figures and clips, as `templates/page.html` shows them."""

import base64
import io
import shlex
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from datasets.audio import resample
from datasets.waveforms import Clips
from helpers.complexity import MAX_MACS, MAX_PARAMETER_BYTES, Report
from helpers.data import Data
from helpers.evaluate.calibration import reliability
from helpers.evaluate.scores import class_device_table
from helpers.evaluate.scoring import Compared
from helpers.report import figures
from helpers.report.report import spread, write_confusion_matrix, write_curves

HERE = Path(__file__).parent
N_HARDEST = 8  # clips that are shown
CLIP_RATE = 16000  # Hz of the clips in the page
MOST_SECONDS = 3.0  # of a clip in the page
NOT_THE_NETWORK = ("seed", "run_id", "resume", "experiment_name", "logger")  # options in which runs of one kind differ


@dataclass(frozen=True)
class Entry:
    """A system on the page.

    Args:
        logits: (clip, class) on the test part.
        options: of its run; empty where they are not known.
        cost: of the network, and the precision that its parameters have; None for answers from a file.
        history: metrics by epoch, as `read_history` gives them.
    """

    logits: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    cost: tuple[Report, str] | None = None
    history: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Cell:
    text: str
    shade: int | None = None  # percent of the colour behind it


@dataclass(frozen=True)
class Grid:
    """A table: rows begin with a name, the rest are cells; rows from `n_parts` on are summaries.

    Args:
        folded: shown by a click on its title.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    n_parts: int = 10**9
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    caption: str
    data: str  # base64
    width: int
    height: int


@dataclass(frozen=True)
class Clip:
    file: str
    scene: str
    answer: str
    device: str
    loss: float
    picture: str  # base64
    audio: str  # base64


@dataclass(frozen=True)
class Section:
    title: str
    words: Sequence[str] = ()
    tables: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()
    clips: Sequence[Clip] = ()
    texts: Sequence[tuple[str, str]] = ()


def overview(
    data: Data, entries: Mapping[str, Entry], scored: Mapping[str, dict], compared: Mapping[str, Compared]
) -> Section:
    groups = [group for group in data.groups if any(f"acc/{group}" in scores for scores in scored.values())]
    has_others = bool(compared) and len(entries) > 1
    header = ["system", "macro %", *(["95 % interval"] if compared else []), "accuracy %",
              *(f"{group} %" for group in groups), "log loss", "ECE %",
              *(["to the first", "95 % interval", "p"] if has_others else [])]  # fmt: skip
    rows = []
    for name, entry in entries.items():
        scores, ece = scored[name], reliability(entry.logits, data.test.scene.cpu()).error
        row = [name, _percent(scores["macro_avg_acc"], 2)]
        row += [Cell(compared[name].interval.in_percent())] if compared else []
        row += [_percent(scores["acc"], 2), *(_percent(scores.get(f"acc/{group}"), 2) for group in groups)]
        row += [Cell(f"{scores['loss']:.3f}"), _percent(ece, 1)]
        if has_others and (more := compared[name].difference) is not None:
            row += map(Cell, (f"{100 * more.value:+.2f}", more.in_percent("+"), f"{more.p:.2g}"))
        elif has_others:
            row += [Cell("")] * 3
        rows.append(row)
    words = []
    if compared:
        words = ["Intervals, differences and their p come from draws of whole recordings, as the clips of one are not "
                 "independent."]  # fmt: skip
    return Section("Scores", words, [Grid("", header, rows), *_seeds(entries, scored)])


def _seeds(entries: Mapping[str, Entry], scored: Mapping[str, dict]) -> list[Grid]:
    """Means over runs that differ in their seed alone, where there are some."""
    kept = (("macro_avg_acc", 100), ("acc", 100), ("loss", 1))
    rows = [
        [", ".join(names), *(Cell(spread([factor * scored[name][key] for name in names])) for key, factor in kept)]
        for names in _kinds(entries)
    ]
    header = ["runs", "macro %", "accuracy %", "log loss"]
    return [Grid("Mean and standard deviation over seeds (runs)", header, rows)] if rows else []


def _kinds(entries: Mapping[str, Entry]) -> list[list[str]]:
    """Names of runs that differ in their seed alone, two or more of a kind."""
    found: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry.options:
            kept = {key: value for key, value in entry.options.items() if key not in NOT_THE_NETWORK}
            found.setdefault(repr(sorted(kept.items(), key=lambda item: item[0])), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def by_group(
    title: str, kind: str, data: Data, entries: Mapping[str, Entry], scored: Mapping[str, dict],
    pictures: Sequence[Picture] = (),
) -> Section | None:  # fmt: skip
    prefix, own = f"count/{kind}/", next(iter(scored.values()))
    names = [key.removeprefix(prefix) for key in own if key.startswith(prefix)]
    if len(names) < 2 and kind == "city":
        return None
    published = _published(data, entries) if kind in ("scene", "device") else []
    header = [kind, "clips", *(f"{name} %" for name in entries), *(f"{name} log loss" for name in entries)]
    header += [f"{one['name']}, published %" for one in published]
    rows = []
    for name in names:
        row = [name, Cell(f"{own[prefix + name]:,.0f}")]
        row += [_percent(scores[f"acc/{kind}/{name}"], 2, shaded=True) for scores in scored.values()]
        row += [Cell(f"{scores[f'loss/{kind}/{name}']:.3f}") for scores in scored.values()]
        rows.append([*row, *(Cell(f"{_of(one, kind, name):.2f}") for one in published)])
    if kind == "scene":
        row = ["macro average", Cell(f"{len(data.test):,}")]
        row += [_percent(scores["macro_avg_acc"], 2) for scores in scored.values()]
        row += [Cell(f"{scores['macro_avg_loss']:.3f}") for scores in scored.values()]
        rows.append([*row, *(Cell(f"{one['macro']:.2f} ± {one['spread']:.2f}") for one in published)])
    return Section(title, (), [Grid("", header, rows, len(names))], pictures)


def _published(data: Data, entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """What others publish for the same split of TAU22 as the first system was trained on."""
    if not data.meta.is_tau22:
        return []
    subset = next(iter(entries.values())).options.get("subset", 100)
    return [one for one in published_scores()["systems"] if one["subset"] == subset]


def published_scores() -> dict[str, Any]:
    """Published accuracies in percent by class and device, see published_scores.yaml."""
    return yaml.safe_load((HERE / "published_scores.yaml").read_text(encoding="utf-8"))


def _of(one: Mapping[str, Any], kind: str, name: str) -> float:
    names = published_scores()["classes" if kind == "scene" else "devices"]
    return one["class" if kind == "scene" else "device"][names.index(name)]


def bars(folder: Path, data: Data, scored: Mapping[str, dict]) -> Picture:
    devices = [f"acc/device/{device}" for device in data.meta.recording_devices]
    accuracies = {
        name: {key.rsplit("/", 1)[1]: scores[key] for key in devices if key in scores}
        for name, scores in scored.items()
    }
    figures.write_device_bars(accuracies, folder / "devices.png")
    return _picture(folder / "devices.png", "Accuracy by recording device")


def cells(data: Data, entries: Mapping[str, Entry]) -> Section:
    tables = []
    for name, entry in entries.items():
        table = class_device_table(data.test, entry.logits)
        rows = [
            [scene, *(_percent(_filled(value), 1, shaded=True) for value in table.accuracy[i]),
             _percent(_filled(table.class_average()[i]), 1)]
            for i, scene in enumerate(table.scenes)
        ]  # fmt: skip
        mean = [_percent(_filled(value), 1) for value in (*table.domain_average, table.domain_average.mean())]
        title = name if len(entries) > 1 else ""
        header = ["accuracy %", *table.devices, "mean"]
        tables.append(Grid(title, header, [*rows, ["mean", *mean]], len(rows), folded=bool(tables)))
    return Section("Scenes and devices", (), tables)


def confusions(folder: Path, data: Data, entries: Mapping[str, Entry]) -> Section:
    pictures = []
    for i, (name, entry) in enumerate(entries.items()):
        path = folder / ("confusion_matrix.png" if i == 0 else f"confusion_matrix_{i + 1}.png")
        targets = data.test.scene.cpu().numpy()
        write_confusion_matrix(entry.logits.argmax(dim=1).numpy(), targets, data.meta.scenes, path)
        pictures.append(_picture(path, f"Which scene {name} takes for which"))
    return Section("Confusions", (), (), pictures)


def sureness(folder: Path, data: Data, entries: Mapping[str, Entry]) -> Section:
    target = data.test.scene.cpu()
    found = {name: reliability(entry.logits, target) for name, entry in entries.items()}
    figures.write_reliability(found, folder / "reliability.png")
    words = ["A network is calibrated when it is right on as many clips as its confidence says, on the dotted line. "
             "The area of a point is its share of the clips; ECE, the expected calibration error, is the mean "
             "distance."]  # fmt: skip
    return Section("Sureness", words, (), [_picture(folder / "reliability.png", "Accuracy over confidence, 15 bins")])


def costs(entries: Mapping[str, Entry]) -> Section | None:
    rows = []
    for name, entry in entries.items():
        if entry.cost is None:
            continue
        report, precision = entry.cost
        n_bytes, macs = report.folded.parameter_bytes(precision), report.trained.macs
        keeps = n_bytes <= MAX_PARAMETER_BYTES and macs <= MAX_MACS
        cells = [f"{report.trained.n_parameters:,}", precision, f"{n_bytes:,}",
                 f"{report.folded.parameter_bytes('int8'):,}", f"{macs:,}",
                 f"{report.folded.peak_bytes(precision):,}", "yes" if keeps else "no"]  # fmt: skip
        rows.append([name, *map(Cell, cells)])
    if not rows:
        return None
    words = [f"The challenge allows {MAX_PARAMETER_BYTES:,} bytes of parameters and {MAX_MACS:,} MACs for one clip. "
             "Bytes are those of the folded network, MACs as its counter has them."]  # fmt: skip
    header = [
        "system",
        "parameters",
        "precision",
        "bytes",
        "bytes at int8",
        "MACs",
        "peak activation bytes",
        "within the limits",
    ]
    return Section("Complexity", words, [Grid("", header, rows)])


def curves(folder: Path, entries: Mapping[str, Entry]) -> Section | None:
    pictures = []
    for i, (name, entry) in enumerate(entries.items()):
        if entry.history:
            path = folder / ("curves.png" if i == 0 else f"curves_{i + 1}.png")
            write_curves(entry.history, path)
            pictures.append(_picture(path, f"Training of {name}"))
    return Section("Learning curves", (), (), pictures) if pictures else None


def hardest_clips(clips: Clips, logits: Tensor, n: int) -> list[int]:
    """Positions of the clips with the largest losses, one of each recording: its other clips are much like it."""
    shown, seen = [], set()
    for i in _losses(clips, logits).argsort(descending=True).tolist():
        recording = clips.meta.recording[clips.rows[i]]
        if recording not in seen:
            shown.append(i)
            seen.add(recording)
        if len(shown) == n:
            break
    return shown


def _losses(clips: Clips, logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.double(), clips.scene.cpu(), reduction="none")


def hardest(data: Data, entries: Mapping[str, Entry], log_mel: Callable[[Tensor], Tensor] | None) -> Section | None:
    """The clips with the largest losses of the first system, with picture and sound."""
    if log_mel is None or data.test.store is None:
        return None
    clips, logits = data.test, next(iter(entries.values())).logits.double()
    loss = _losses(clips, logits)
    shown = hardest_clips(clips, logits, N_HARDEST)
    waveform = clips.batch(torch.tensor(shown)).to(torch.device("cpu")).waveform
    found = []
    for i, samples, picture in zip(shown, waveform, log_mel(waveform), strict=True):
        found.append(
            Clip(
                Path(str(clips.files[i])).name, clips.meta.scenes[int(clips.scene[i])],
                clips.meta.scenes[int(logits[i].argmax())], clips.recording_devices[int(clips.recording_device[i])],
                float(loss[i]), _base64(figures.spectrogram(picture[0].numpy())),
                _sound(samples.numpy(), clips.store.sample_rate),
            )
        )  # fmt: skip
    words = [f"Those with the largest log loss of {next(iter(entries))}, one of each recording."]
    return Section("Hardest clips", words, clips=found)


def how(entries: Mapping[str, Entry], command: Sequence[str]) -> Section | None:
    texts = [("This page", f"python {shlex.join(command)}")] if command else []
    for name, entry in entries.items():
        if entry.options:
            options = {key: value for key, value in entry.options.items() if key != "given"}
            texts.append((f"Options of {name}", yaml.safe_dump(options, sort_keys=True, allow_unicode=True)))
    return Section("How to repeat it", texts=texts) if texts else None


def _percent(value: float | None, digits: int, shaded: bool = False) -> Cell:
    if value is None or not np.isfinite(value):
        return Cell("-")
    return Cell(f"{100 * value:.{digits}f}", round(100 * value) if shaded else None)


def _filled(value: Any) -> float:
    return float("nan") if np.ma.is_masked(value) else float(value)


def _picture(path: Path, caption: str) -> Picture:
    content = path.read_bytes()
    width, height = figures.png_size(content)
    return Picture(caption, _base64(content), width, height)


def _sound(samples: np.ndarray, rate: int) -> str:
    """A waveform (sample,) as a wav file in base64, at most three seconds of it, as loud as 16 bits can hold."""
    x = samples[: round(MOST_SECONDS * rate)]
    if rate > CLIP_RATE:
        x, rate = resample(x, rate, CLIP_RATE), CLIP_RATE
    x = x / max(np.abs(x).max(), 1e-4)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1), writer.setsampwidth(2), writer.setframerate(rate)
        writer.writeframes((32767 * x).astype("<i2").tobytes())
    return _base64(file.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
