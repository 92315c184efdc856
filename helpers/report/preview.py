"""What augmentations do to a clip: waveform and log-mel before and after, and their difference, one PNG each.

An augmentation is drawn as training draws it, with the strength of the recipe, until it has changed the clip a few
times: a probability decides how often that is, not what it looks like. Of these draws the middle one is shown, by how
far it changes the log-mel, as the first may be an extreme one. The front end is in eval mode, so that all that differs
is the augmentation.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets.files import replacing
from datasets.tau import DataError
from datasets.waveforms import Batch, Clips
from helpers.report.report import _figure

log = logging.getLogger(__name__)

N_CLIPS = 8  # the clip and those that it may be mixed with
N_DRAWS = 1000  # after which an augmentation is taken to change nothing
N_CHANGES = 21  # draws that change the clip, of which the middle one is shown
VISIBLE = 1e-3  # smallest change that counts, as a share of the clip's range; more than rounding
N_COLUMNS = 1200  # of a drawn waveform
LOWEST, HIGHEST = 2, 99.9  # percentiles of the scale of colours: some front ends have a band without a value
TICK_SPACE = 0.04  # least distance of two ticks, as a share of the axis
TICKS_HZ = (50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)
LINE_LENGTH = 150  # characters of a title


@dataclass(frozen=True)
class Step:
    """One thing that happens to a batch with its spectrograms.

    Args:
        options: as the recipe has them, for the title.
        apply: maps the batch to the one afterwards, spectrograms included; the same batch where nothing happens.
        has_waveform: whether waveforms change.
    """

    name: str
    options: str
    apply: Callable[[Batch], Batch]
    has_waveform: bool


@dataclass(frozen=True)
class Drawn:
    """A batch before and after a step.

    Args:
        n_changes: draws that changed the clip; the middle one is `after`.
        n_draws: draws that it took.
    """

    before: Batch
    after: Batch
    n_changes: int = 0
    n_draws: int = 0


@dataclass(frozen=True)
class Scale:
    """What the axes of the pictures say.

    Args:
        seconds: length of a clip.
        bands: frequency in Hz -> the band that answers to it.
    """

    seconds: float
    bands: Mapping[int, int]
    scenes: Sequence[str]


def write_previews(
    folder: Path, clips: Clips, index: Tensor, chain: nn.ModuleDict, configs: Mapping[str, Any], frontend: nn.Module,
    seed: int,
) -> tuple[list[Path], list[str]]:  # fmt: skip
    """Draws what every augmentation of a chain does to a clip, and what they do together.

    Args:
        folder: for the pictures, `<number>_<name>.png` in order of application and `chain.png`.
        clips: the training part.
        index: positions (n,) in it: the clip, and others to mix it with.
        chain: as `helpers.augment.build_chain` returns it.
        configs: of its augmentations by name.
        frontend: from waveforms (batch, sample) to log-mel (batch, 1, mel, time).
        seed: of every step, so that each looks the same whatever else is in the chain.

    Returns:
        The pictures, and the names of what changes nothing with these options, or not on this clip.
    """
    chain.train()
    frontend.eval()
    plain = Clips(clips.meta, clips.rows, clips.store, clips.teacher_logits)
    batch = with_log_mel(plain.batch(index).to(torch.device("cpu")), frontend)
    scale = Scale(
        batch.waveform.shape[1] / frontend.sample_rate,
        bands_of(frontend, batch.waveform.shape[1]),
        clips.meta.scenes,
    )
    clip = (
        f"{clips.files[index[0]]}, recorded by device {clips.meta.recording_devices[clips.recording_device[index[0]]]}"
    )
    pictures, idle, together = [], [], Drawn(batch, batch)
    done: list[Step] = []
    for step in [*crop_steps(clips, index, frontend, seed), *chain_steps(chain, configs, frontend)]:
        drawn = draw(step, batch, seed)
        if drawn is None:
            idle.append(step.name)
            continue
        times = f"the middle one of {drawn.n_changes} draws that change it, in {drawn.n_draws}"
        path = folder / f"{len(pictures) + 1}_{step.name}.png"
        write_picture(path, [f"{step.name}: {step.options}", f"{clip}; {times}"], drawn, step.has_waveform, scale)
        pictures.append(path)
        # Behind others a step has other clips before it, so what it needs may be another number of draws.
        if (drawn := draw(step, together.after, seed)) is not None:
            together = replace(together, after=drawn.after)
            done.append(step)
    if done:
        path = folder / "chain.png"
        names = ", ".join(step.name for step in done)
        title = [f"the whole chain: {names}", f"{clip}; each as it changes the clip"]
        write_picture(path, title, together, any(step.has_waveform for step in done), scale)
        pictures.append(path)
    return pictures, idle


def pick_clips(clips: Clips, name: str | None, seed: int) -> Tensor:
    """Positions (n,) of a clip of the training part, and of others to mix it with: other recordings, other scenes.

    Args:
        name: file name, with or without its folder; None: the first clip of the device that recorded most.

    Raises:
        DataError: when the training part has no such clip.
    """
    devices = clips.recording_device.numpy()
    if name is None:
        first = int(np.flatnonzero(devices == np.bincount(devices).argmax())[0])
    else:
        found = [i for i, file in enumerate(clips.files) if name in (file, Path(file).name)]
        if not found:
            raise DataError(
                f"--clip {name} is not in the training part of {clips.meta.root}, which begins with {clips.files[0]}"
            )
        first = found[0]
    recording, scene = clips.meta.recording[clips.rows], clips.scene.numpy()
    others = np.flatnonzero((recording != recording[first]) & (scene != scene[first]))
    if not len(others):
        others = np.flatnonzero(recording != recording[first])
    chosen = np.random.default_rng(seed).permutation(others)[: N_CLIPS - 1]
    return torch.from_numpy(np.concatenate([[first], chosen]).astype(np.int64))


def crop_steps(clips: Clips, index: Tensor, frontend: nn.Module, seed: int) -> Iterator[Step]:
    """What drawing the clips themselves anew for every epoch does, where they are random windows."""
    if type(clips).start_epoch is Clips.start_epoch:
        return
    epochs = count()

    def apply(_batch: Batch) -> Batch:
        clips.start_epoch(seed, next(epochs))
        return with_log_mel(clips.batch(index).to(torch.device("cpu")), frontend)

    yield Step("cropped", "windows of whole recordings", apply, has_waveform=True)


def chain_steps(chain: nn.ModuleDict, configs: Mapping[str, Any], frontend: nn.Module) -> Iterator[Step]:
    """The augmentations of a chain, in order of application."""

    def on_waveform(part: nn.Module) -> Callable[[Batch], Batch]:
        def apply(batch: Batch) -> Batch:
            after = part(batch)
            return batch if after is batch else with_log_mel(after, frontend)

        return apply

    for stage, parts in chain.items():
        for name, part in parts.named_children():
            if name in configs:
                options = ", ".join(
                    f"{option} {value}" for option, value in asdict(configs[name]).items() if value is not None
                )
                has_waveform = stage == "waveform"
                yield Step(name, options, on_waveform(part) if has_waveform else part, has_waveform)


def draw(step: Step, batch: Batch, seed: int) -> Drawn | None:
    """Applies a step until it has changed the first clip N_CHANGES times; None when it never does in N_DRAWS."""
    torch.manual_seed(seed)
    found, n_draws = [], 0
    while len(found) < N_CHANGES and n_draws < N_DRAWS:
        with torch.no_grad():
            after = step.apply(batch)
        n_draws += 1
        if after is not batch and is_changed(batch, after):
            found.append(after)
    if not found:
        return None
    by_change = sorted(found, key=lambda after: (after.log_mel[0] - batch.log_mel[0]).abs().mean().item())
    return Drawn(batch, by_change[(len(found) - 1) // 2], len(found), n_draws)


def is_changed(before: Batch, after: Batch) -> bool:
    """Whether the first clip, its target or its teacher logits changed by more than rounding."""
    for name in ("waveform", "log_mel", "target", "teacher_logits"):
        then, now = getattr(before, name), getattr(after, name)
        if then is not None and (now[0] - then[0]).abs().max() > VISIBLE * (then[0].max() - then[0].min()):
            return True
    return False


def with_log_mel(batch: Batch, frontend: nn.Module) -> Batch:
    with torch.no_grad():
        return replace(batch, log_mel=frontend(batch.waveform))


def bands_of(frontend: nn.Module, n_samples: int) -> dict[int, int]:
    """Which band of a front end answers most to a tone: frequency in Hz -> band, for tones whose bands lie apart.

    Measured, so that any front end has an axis in Hz, the right way round.
    """
    tones = [hz for hz in TICKS_HZ if hz < frontend.sample_rate / 2]
    if not tones:
        return {}
    t = torch.arange(n_samples) / frontend.sample_rate
    waveform = 0.5 * torch.sin(2 * torch.pi * torch.tensor(tones)[:, None] * t)  # (tone, sample)
    with torch.no_grad():
        answer = frontend(waveform).mean(dim=(1, 3))  # (tone, mel)
    n_mels, found = answer.shape[1], {}
    for hz, band in zip(tones, answer.argmax(dim=1).tolist(), strict=True):
        # The outermost bands answer also to what lies beyond them.
        if 0 < band < n_mels - 1 and all(abs(band - other) >= TICK_SPACE * n_mels for other in found.values()):
            found[hz] = band
    return found


def write_picture(path: Path, title: Sequence[str], drawn: Drawn, has_waveform: bool, scale: Scale) -> None:
    """Draws the first clip of both batches and the difference: columns before, after, after - before."""
    rows = (["waveform"] if has_waveform else []) + ["log_mel"]
    figure = _figure(15, 2.4 + 2.9 * len(rows))
    axes = figure.subplots(len(rows), 3, squeeze=False)
    lines = [*title, *target_lines(drawn, scale.scenes)]
    figure.suptitle("\n".join(_shortened(line) for line in lines), fontsize=11, parse_math=False)
    if has_waveform:
        _draw_waveforms(axes[0], drawn, scale)
    _draw_spectrograms(figure, axes[-1], drawn, scale)
    for axis, name in zip(axes[0], ("before", "after", "after - before"), strict=True):
        axis.set_title(name, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("time (s)")
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png")


def target_lines(drawn: Drawn, scenes: Sequence[str]) -> Iterator[str]:
    """What the first clip is to be taken for, and what the teacher takes it for, where there is something to say."""
    for name, words in (("target", "target"), ("teacher_logits", "teacher")):
        then, now = getattr(drawn.before, name), getattr(drawn.after, name)
        if then is None:
            continue
        if name == "teacher_logits":
            then, now = then.softmax(dim=1), now.softmax(dim=1)
        shares = [_shares(x[0], scenes) for x in (then, now)]
        yield f"{words}: {shares[0]}" + (f" -> {shares[1]}" if shares[0] != shares[1] else ", as before")


def _shares(x: Tensor, scenes: Sequence[str]) -> str:
    """The largest of (class,) shares in words: bus 0.72, tram 0.28."""
    best = x.argsort(descending=True, stable=True)[:3].tolist()
    return ", ".join(f"{scenes[i]} {x[i]:.2f}" for i in best if x[i] >= 0.005)


def _draw_waveforms(axes: Sequence[Any], drawn: Drawn, scale: Scale) -> None:
    before, after = (batch.waveform[0].numpy() for batch in (drawn.before, drawn.after))
    most = 1.05 * max(np.abs(before).max(), np.abs(after).max(), 1e-6)
    for axis, x, colour in zip(axes, (before, after, after - before), ("#0072B2", "#0072B2", "#D55E00"), strict=True):
        # The range of the samples behind each column: a line of all of them would hide how dense they lie.
        starts = np.arange(0, len(x), -(-len(x) // N_COLUMNS))
        at = (starts + np.append(starts[1:], len(x))) / 2 / len(x) * scale.seconds
        low, high = np.minimum.reduceat(x, starts), np.maximum.reduceat(x, starts)
        axis.fill_between(at, low, high, color=colour, linewidth=0.6)
        axis.set(xlim=(0, scale.seconds), ylim=(-most, most))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("amplitude (full scale 1)")


def _draw_spectrograms(figure: Any, axes: Sequence[Any], drawn: Drawn, scale: Scale) -> None:
    before, after = (batch.log_mel[0, 0].numpy() for batch in (drawn.before, drawn.after))  # (mel, time)
    low, high = np.percentile(np.concatenate([before.ravel(), after.ravel()]), [LOWEST, HIGHEST])
    difference = after - before
    most = max(np.percentile(np.abs(difference), 99.9), 1e-6)
    n_mels = len(before)
    extent = (0, scale.seconds, -0.5, n_mels - 0.5)  # the lowest band at the bottom
    shown = {"aspect": "auto", "origin": "lower", "extent": extent, "interpolation": "nearest"}
    image = axes[0].imshow(before, vmin=low, vmax=high, cmap="magma", **shown)
    axes[1].imshow(after, vmin=low, vmax=high, cmap="magma", **shown)
    other = axes[2].imshow(difference, vmin=-most, vmax=most, cmap="RdBu_r", **shown)
    figure.colorbar(image, ax=axes[:2], label="log-mel, the front end's scale", pad=0.01, fraction=0.05)
    figure.colorbar(other, ax=axes[2], label="difference", pad=0.02)
    for axis in axes:
        if scale.bands:
            axis.set_yticks([*scale.bands.values()], [f"{hz:,}" for hz in scale.bands])
    axes[0].set_ylabel(f"frequency (Hz), {n_mels} bands" if scale.bands else "band")


def _shortened(line: str) -> str:
    return line if len(line) <= LINE_LENGTH else line[: LINE_LENGTH - 1] + "…"
