"""From a checkpoint's network to files that run outside PyTorch, and what these files say about themselves."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.complexity import peak_values
from helpers.errors import ExportError
from helpers.export.executorch_program import export_executorch
from models.layers.fold import fold

WAVEFORM, LOG_MEL = "waveform", "log_mel"  # names of the two kinds of input


def describe_file(
    frontend: nn.Module, scenes: Sequence[str], n_samples: int, precision: str, temperature: float = 1.0
) -> dict[str, str]:
    """Metadata that every file carries: what goes in, what comes out, and how the spectrogram is made.

    Args:
        n_samples: length of a clip at the front end's rate.
        temperature: that divides the logits before their softmax.
    """
    rate = frontend.sample_rate
    return {
        "labels": json.dumps(list(scenes)),
        "sample_rate_hz": str(rate),
        "resampler": frontend.resampler,
        "clip_samples": str(n_samples),
        "clip_seconds": f"{n_samples / rate:g}",
        "precision": precision,
        "waveform": "(batch, sample) float32 in -1 .. 1, mono",
        "output": "logits (batch, class) before softmax, in the order of labels; divide them by temperature for it",
        "temperature": f"{temperature:g}",
        "frontend": json.dumps({"name": type(frontend).__name__, **asdict(frontend.config)}),
        "normalisation": frontend.normalisation,
    }


def example_input(frontend: nn.Module, n_samples: int, with_frontend: bool) -> Tensor:
    """A silent clip (1, sample), or its spectrogram (1, 1, mel, time): what an export needs to know of the shape.

    Raises:
        ExportError: when the front end does not take clips of this length.
    """
    waveform = torch.zeros(1, n_samples)
    if with_frontend:
        return waveform
    try:
        return frontend.cpu().eval()(waveform)
    except ValueError as error:
        raise ExportError(f"clips of {n_samples} samples are too short for the front end: {error}") from error


def whole(network: nn.Module, frontend: nn.Module, n_samples: int, store_matrices: bool = False) -> nn.Module:
    """Front end and network as one module from waveform (batch, sample) to logits; all of it can be exported.

    Args:
        store_matrices: keep large constants in the file, for runtimes that would compute them anew with every clip.

    Raises:
        ExportError: when there is no such form of the front end, or not for this length of clips.
    """
    try:
        form = frontend.for_export(n_samples, store_matrices)
        return nn.Sequential(OrderedDict(frontend=form, network=network)).eval()
    except ValueError as error:
        raise ExportError(f"the front end cannot go into files for clips of {n_samples} samples: {error}") from error


def activation_bytes(network_bytes: int, frontend: nn.Module, n_samples: int, with_frontend: bool) -> int:
    """Peak activation memory of a file for one clip: the larger of its network's and, where inside, its front end's.

    Args:
        network_bytes: the network's.
    """
    if not with_frontend:
        return network_bytes
    form = whole(nn.Identity(), frontend, n_samples)
    return max(network_bytes, 4 * peak_values(form, (n_samples,)))  # the front end computes in float32


def write_onnx(
    network: nn.Module, frontend: nn.Module, scenes: Sequence[str], n_samples: int, precision: str,
    with_frontend: bool, path: Path, *, temperature: float = 1.0,
) -> Path:  # fmt: skip
    """Writes one ONNX file with a free batch size.

    Args:
        network: as the target computes it, from `quantization.for_target`, on the CPU; float ones are folded.
        precision: fp32, fp16 or int8; for the metadata.
        with_frontend: waveform in instead of log-mel.
        temperature: of the logits, for the metadata.
    """
    from helpers.export.onnx_file import export_onnx  # slow to import, and not needed for --help

    network = fold(network, example_input(frontend, n_samples, False)) if precision != "int8" else network
    model = whole(network, frontend, n_samples) if with_frontend else network
    metadata = describe_file(frontend, scenes, n_samples, precision, temperature)
    example = example_input(frontend, n_samples, with_frontend)
    return export_onnx(model, example, path, WAVEFORM if with_frontend else LOG_MEL, metadata)


def write_executorch(
    network: nn.Module, frontend: nn.Module, scenes: Sequence[str], n_samples: int, precision: str,
    with_frontend: bool, path: Path, *, temperature: float = 1.0,
) -> Path:  # fmt: skip
    """Writes one ExecuTorch program for one clip; arguments as `write_onnx`."""
    network = fold(network, example_input(frontend, n_samples, False)) if precision != "int8" else network
    model = whole(network, frontend, n_samples, store_matrices=True) if with_frontend else network
    metadata = describe_file(frontend, scenes, n_samples, precision, temperature)
    return export_executorch(model, example_input(frontend, n_samples, with_frontend), path, metadata)
