"""The same clips through every form of a network: how far logits and decisions of the files are from PyTorch's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datasets.audio import resample
from datasets.synthetic.devices import MICROPHONES, record
from datasets.synthetic.scenes import render_scene
from datasets.synthetic.signals import SAMPLE_RATE, named_rng
from datasets.tau import SCENES

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class Tolerance:
    """What two forms of a network may differ by."""

    largest: float | None  # of any logit; None where single roundings may fall the other way and change a clip's logits
    mean: float  # of all logits
    agreement: float  # share of equal decisions

    @property
    def tie(self) -> float:
        """Two classes that the reference scores closer than this may change places."""
        return 2 * (self.mean if self.largest is None else self.largest)


# Sums in another order, nothing else.
FLOAT = Tolerance(largest=1e-3, mean=1e-4, agreement=1.0)
# Another way to the same spectrogram; loud narrow tones differ by up to 3e-3 in it.
FLOAT_FRONTEND = Tolerance(largest=5e-2, mean=2e-3, agreement=0.99)
HALF = Tolerance(largest=0.2, mean=2e-2, agreement=0.95)
# XNNPACK rounds halves of sums the other way.
INTEGER_PROGRAM = Tolerance(largest=None, mean=0.05, agreement=0.98)
# The same network with roundings that fall the other way here and there: the noise of 8 bits, seen from inside.
ROUNDING = Tolerance(largest=None, mean=0.15, agreement=0.95)
TIES = 0.01  # share of the clips in which a sum of the first convolution, which is float, may lie on a tie


def integer_tolerance(n_clips: int, step: float) -> Tolerance:
    """For the same integers but where the first convolution's sum, in float, lies on a tie and rounds either way.

    That moves all that follows in this clip, its logits by a part of a step; one of few clips may be such a one.

    Args:
        step: of the 8-bit values whose means are the logits.
    """
    n_ties = max(1.0, TIES * n_clips)
    return Tolerance(largest=None, mean=max(1e-3, step / 4 * n_ties / n_clips), agreement=1 - n_ties / n_clips)


@dataclass(frozen=True)
class Comparison:
    """One form of a network beside the one that it should equal."""

    name: str
    reference: str
    largest: float
    mean: float
    agreement: float
    by_device: dict[str, tuple[int, float, float]]  # recording device: clips, largest difference, equal decisions
    tolerance: Tolerance | None  # None: shown, not judged

    @property
    def passes(self) -> bool:
        if self.tolerance is None:
            return True
        return (
            (self.tolerance.largest is None or self.largest <= self.tolerance.largest)
            and self.mean <= self.tolerance.mean
            and self.agreement >= self.tolerance.agreement
        )


def compare(
    name: str, logits: Tensor, reference_name: str, reference: Tensor, recording_devices: Sequence[str],
    tolerance: Tolerance | None,
) -> Comparison:  # fmt: skip
    """Compares logits (clip, class); NaN never passes. Ties within the tolerance count as equal decisions.

    Args:
        recording_devices: name for each clip.
    """
    difference = (logits.double() - reference.double()).abs()
    lead = reference.amax(dim=1) - reference.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    same = (lead <= (0 if tolerance is None else tolerance.tie)).double()
    by_device = {}
    for device in dict.fromkeys(recording_devices):
        rows = torch.tensor([i for i, other in enumerate(recording_devices) if other == device])
        by_device[device] = (len(rows), difference[rows].max().item(), same[rows].mean().item())
    return Comparison(
        name, reference_name, difference.max().item(), difference.mean().item(), same.mean().item(), by_device,
        tolerance,
    )  # fmt: skip


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a Markdown table, and one of the devices."""
    lines = [
        "| form | beside | largest | mean | same decision | allowed: largest, mean, decisions | |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        allowed, verdict = "shown only", ""
        if c.tolerance is not None:
            t = c.tolerance
            largest = "any" if t.largest is None else f"{t.largest:g}"
            allowed, verdict = f"{largest}, {t.mean:g}, {t.agreement:.0%}", "ok" if c.passes else "FAILS"
        lines.append(
            f"| {c.name} | {c.reference} | {c.largest:.2g} | {c.mean:.2g} | {c.agreement:.1%} | {allowed} | {verdict} |"
        )
    devices = list(comparisons[0].by_device)
    lines += ["", "Largest difference and share of equal decisions by recording device:", ""]
    counts = [f"{device} ({comparisons[0].by_device[device][0]})" for device in devices]
    lines += [f"| form | {' | '.join(counts)} |", "|---" * (len(devices) + 1) + "|"]
    for c in comparisons:
        cells = [f"{c.by_device[device][1]:.2g}, {c.by_device[device][2]:.0%}" for device in devices]
        lines.append(f"| {c.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def generated_clips(sample_rate: int, n_samples: int, n_clips: int = 40) -> tuple[Tensor, list[str]]:
    """The first `n_clips` generated clips (clip, sample), each of ten scenes on three devices, and the devices' names.

    For parity alone: they sound like nothing in particular, but fill the spectrogram as recordings do.
    """
    clips, devices = [], []
    names = list(MICROPHONES)
    for i, scene in enumerate(SCENES):
        if len(clips) >= n_clips:
            break
        spectrum = render_scene(0, scene, f"{scene}-parity", f"{scene}-parity-0")
        for device in names[i % 3 :: 3]:
            x = resample(record(spectrum, device, named_rng(0, "parity", scene, device)), SAMPLE_RATE, sample_rate)
            if len(x) < n_samples:
                x = np.resize(x, n_samples)
            clips.append(x[:n_samples])
            devices.append(device)
    return torch.from_numpy(np.stack(clips[:n_clips]).astype(np.float32)), devices[:n_clips]


def open_session(path: Path, n_threads: int = 1, exact: bool = False) -> "onnxruntime.InferenceSession":
    """ONNX Runtime for one file.

    Args:
        exact: 32-bit sums on every CPU, slower on x86 CPUs without VNNI; else those add 8-bit products in 16 bits.
    """
    import onnxruntime  # slow to import, and not needed for --help

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(path: Path, inputs: Tensor, batch_size: int = 32, exact: bool = False) -> Tensor:
    """Logits (clip, class) of an ONNX file in ONNX Runtime; `exact` as in `open_session`."""
    session = open_session(path, exact=exact)
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: part.numpy()})[0] for part in inputs.split(batch_size)]
    return torch.from_numpy(np.concatenate(logits))


def latencies(files: Sequence[Path], inputs: Sequence[Tensor], n_rounds: int = 200, n_threads: int = 1) -> list[float]:
    """Median milliseconds of each ONNX file for one clip; the files take turns.

    Args:
        inputs: one clip for each file.
    """
    sessions = [open_session(path, n_threads) for path in files]
    feeds = [{session.get_inputs()[0].name: x[:1].numpy()} for session, x in zip(sessions, inputs, strict=True)]
    times = np.zeros((n_rounds, len(files)))
    for i in range(-10, n_rounds):  # the first ten warm up
        for j, (session, feed) in enumerate(zip(sessions, feeds, strict=True)):
            started = time.perf_counter()
            session.run(None, feed)
            if i >= 0:
                times[i, j] = 1000 * (time.perf_counter() - started)
    return np.median(times, axis=0).tolist()
