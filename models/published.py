"""Published teachers by name: one row for each set of weights.

The published weights are plain state dicts of CP-ResNet and PaSST, see F. Schmid et al., "Distilling the Knowledge of
Transformers and CNNs with CP-Mobile", DCASE Workshop 2023, https://github.com/fschmid56/cpjku_dcase23.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RELEASE = "https://github.com/fschmid56/cpjku_dcase23/releases/download/ensemble_logits"


@dataclass(frozen=True)
class Teacher:
    """One published set of weights."""

    architecture: str  # key of models.MODELS
    file: str  # in RELEASE
    options: Mapping[str, Any] = field(default_factory=dict)  # of the network, where it is not the default one


CP_RESNET = ("cp_resnet", {})
PASST = ("passt", {"s_patchout_f": 6})  # of training; inert in eval mode

TEACHERS: dict[str, Teacher] = {
    name: Teacher(architecture, f"{name}.pt", options)
    for name, (architecture, options) in {
        "passt_dirfms_1": PASST,  # device impulse responses and Freq-MixStyle
        "passt_dirfms_2": PASST,
        "passt_dirfms_3": PASST,
        "passt_fms_1": PASST,  # Freq-MixStyle
        "passt_fms_2": PASST,
        "passt_fms_3": PASST,
        "cpr_128k_dirfms_1": CP_RESNET,
        "cpr_128k_dirfms_2": CP_RESNET,
        "cpr_128k_dirfms_3": CP_RESNET,
        "cpr_128k_fms_1": CP_RESNET,
        "cpr_128k_fms_2": CP_RESNET,
        "cpr_128k_fms_3": CP_RESNET,
    }.items()
}

# Names in the README before 2023-08-08 -> the teacher with the same augmentation that took the place; None: gone.
# They stood for other networks (CP-ResNet: 22,050 Hz, rho 7, 128 base channels) that are published no more.
OLD_NAMES: dict[str, str | None] = {
    "passt_ms_dir_1": "passt_dirfms_1",
    "passt_ms_dir_2": "passt_dirfms_2",
    "passt_ms_1": "passt_fms_1",
    "passt_ms_2": "passt_fms_2",
    "passt_dir_1": None,
    "passt_dir_2": None,
    "cpr_ms_dir_1": "cpr_128k_dirfms_1",
    "cpr_ms_dir_2": "cpr_128k_dirfms_2",
    "cpr_ms_1": "cpr_128k_fms_1",
    "cpr_ms_2": "cpr_128k_fms_2",
    "cpr_dir_1": None,
    "cpr_dir_2": None,
}


def published_name(name: str) -> str:
    """The key of `TEACHERS` that a name, today's or an older one, stands for.

    Raises:
        ValueError: for a teacher that is published no more, and for an unknown name; the message lists the known.
    """
    known = f"published: {', '.join(TEACHERS)}"
    if name in TEACHERS:
        return name
    if name not in OLD_NAMES:
        raise ValueError(f"unknown teacher {name!r}; {known}")
    if OLD_NAMES[name] is None:
        raise ValueError(f"the teacher {name} is published no more and nothing took its place; {known}")
    return OLD_NAMES[name]
