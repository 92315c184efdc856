"""Writes networks as ExecuTorch programs (`.pte`) for phones and embedded Linux, and runs them. ExecuTorch is optional.

XNNPACK gets the network as one graph, and ExecuTorch's portable kernels what XNNPACK lacks: see
`models/layers/xnnpack.py`.
"""

import errno
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.files import replacing
from helpers.errors import ExportError
from models.layers.xnnpack import for_xnnpack

INSTALL = "pip install -r requirements-executorch.txt"
METADATA = "metadata"  # name of the method that returns a file's metadata
SEGMENT_ALIGNMENT = 16  # bytes, what XNNPACK asks for; ExecuTorch's own 128 add 5 kB of padding


class ExecuTorchMissingError(ExportError):
    """The optional package is not installed; one line with the remedy."""


def is_installed() -> bool:
    return find_spec("executorch") is not None


def export_executorch(model: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes `model` to one file, for one input at a time; replaced at once.

    Args:
        model: in eval mode on the CPU: an integer network (int8), a folded one (fp32), or a front end before either.
        example: an input of the final shape, batch size 1.
        metadata: becomes a method "metadata" of the program, which returns it as a string of JSON.

    Raises:
        ExecuTorchMissingError: when the package is missing.
    """
    _check_installed()
    with _quiet(), torch.no_grad():
        content = _lower(model, example, json.dumps(dict(metadata or {})))
    with replacing(path, "wb") as file:
        file.write(content)
    return path


def load_program(path: Path, n_threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function from inputs (batch, ...) to logits (batch, class) that runs the program in a file clip by clip.

    Args:
        n_threads: for all programs in this process, not while one runs; None leaves it as it is (at first all cores).

    Raises:
        ExecuTorchMissingError: when the package is missing.
        FileNotFoundError: when the file is.
    """
    program = _open(path)
    if n_threads is not None:
        from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool

        if _threadpool_get_thread_count() != n_threads:
            _unsafe_reset_threadpool(n_threads)
    program.load_method("forward")

    def run(inputs: Tensor) -> Tensor:
        method = program.load_method("forward")  # the same one again; needs the program alive
        return torch.cat([method.execute([clip[None].contiguous()])[0] for clip in inputs])

    return run


def run_program(path: Path, inputs: Tensor) -> Tensor:
    """Logits (batch, class) that the program in a file gives for inputs (batch, ...)."""
    return load_program(path)(inputs)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that a program was written with."""
    return json.loads(_open(path).load_method(METADATA).execute([])[0])


def _check_installed() -> None:
    if not is_installed():
        raise ExecuTorchMissingError(f"ExecuTorch is not installed, which .pte files need: {INSTALL}")


def _open(path: Path) -> Any:
    _check_installed()
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with _quiet():
        from executorch.runtime import Runtime

        return Runtime.get().load_program(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """The packages report their inner steps, and parts of theirs that are not there; errors still come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _lower(model: nn.Module, example: Tensor, metadata: str) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.backend.utils import tag_constant_data

    class Partitioner(XnnpackPartitioner):
        def partition(self, exported_program: torch.export.ExportedProgram) -> Any:
            result = super().partition(exported_program)
            tag_constant_data(exported_program)  # else the constants of additions would be inputs of XNNPACK's graph
            return result

    program = torch.export.export(for_xnnpack(model, example), (example,), strict=False)
    edge = to_edge_transform_and_lower(program, partitioner=[Partitioner()], constant_methods={METADATA: metadata})
    return edge.to_executorch(ExecutorchBackendConfig(segment_alignment=SEGMENT_ALIGNMENT)).buffer
