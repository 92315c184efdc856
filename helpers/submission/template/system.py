"""The functions that DCASE 2025 Task 1 asks for; the checkpoint is ckpts/<name of this module>.pt beside it."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from . import inference

CHECKPOINT = Path(__file__).parent / "ckpts" / f"{__name__.rpartition('.')[2]}.pt"


def load_model(model_file_path: str | Path | None = None) -> inference.System:
    """Front end and networks, ready on the CPU; `.model` holds the networks.

    Args:
        model_file_path: another checkpoint of this package; None: its own.
    """
    return inference.open_system(CHECKPOINT if model_file_path is None else model_file_path)


def load_inputs(
    file_paths: Sequence[str | Path], device_ids: Sequence[str], model: inference.System
) -> list[Tensor]:  # fmt: skip
    """Inputs of the network, (1, 1, mel, time) float16 each, in the order of the files."""
    return inference.log_mels(file_paths, model)


def get_model_for_device(model: inference.System, device_id: str) -> nn.Module:
    """The network that answers for a recording device; for those without one of their own, the general network."""
    return model.model.for_device(device_id)


def predict(
    file_paths: Sequence[str | Path],
    device_ids: Sequence[str],
    model_file_path: str | Path | None = None,
    use_cuda: bool = False,
) -> tuple[list[Tensor], list[str]]:
    """Logits (class,) of the files in their order, and the names of the classes in the order of the logits."""
    model = load_model(model_file_path)
    if use_cuda:
        model = model.cuda()
    return inference.answers(file_paths, device_ids, model), list(model.scenes)
