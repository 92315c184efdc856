"""Published networks by name, students and teachers: one row for each set of weights.

Sources: F. Schmid et al., "Distilling the Knowledge of Transformers and CNNs with CP-Mobile", DCASE Workshop 2023,
https://github.com/fschmid56/cpjku_dcase23; the entries of Li, Karasin, Tan and Zhou to DCASE 2025 Task 1, and SP4ASC,
each at the address in its row.
Nothing of them is kept in this repository: a file is fetched from its authors when it is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any
from urllib.parse import quote


@dataclass(frozen=True)
class Published:
    """One published set of weights.

    Args:
        architecture: key of models.MODELS.
        url: of the file; those in a git repository by commit.
        sha256: of the file; None where nobody states it: then the first download is recorded and compared from then on.
        options: of the network, for a bare state dict; None: read off the weights.
        frontend: name and options; None: the network's own.
        accuracy: as published, and on what.
        licence: None where the repository has none: use is for the user to settle with the authors.
    """

    architecture: str
    url: str
    sha256: str | None = None
    options: Mapping[str, Any] | None = None
    frontend: tuple[str, Mapping[str, Any]] | None = None
    accuracy: str = ""
    licence: str | None = None

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix


def in_git(repository: str, commit: str, path: str) -> str:
    """Address of a file on GitHub as it was at a commit."""
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{quote(path)}"


CPJKU = "fschmid56/cpjku_dcase23"
RELEASE = f"https://github.com/{CPJKU}/releases/download/ensemble_logits"
LI = "HaoWLee/dcase2025_task1_Li_NTU", "7d467d6ab31001c55d55d91576d0cd844ac88ad9"
SP4ASC = "valeoai/SP4ASC", "4be54c9902b50e1a46008c57c575e6e1e19b2d47"
TAN = "joesephgit/DCASE2025", "4c7f3ca525a4c09bf23660719721a196a1d0bf23"
SP4ASC_RUN = "trained_models/configs.cnn6_small_dropout_2_specAugment_128_2"
CP_RESNET: Mapping[str, Any] = MappingProxyType({})
PASST = MappingProxyType({"s_patchout_f": 6})  # of training; inert in eval mode
CP_MEL = ("cp_mel", MappingProxyType({}))

PUBLISHED: dict[str, Published] = {
    "c0a7nzin": Published(
        "cp_mobile",
        in_git(CPJKU, "2e20abaa64264f227c50696e5a43d4c706543ff4",
               "DCASE23_Task1/c0a7nzin/checkpoints/epoch=149-step=81900.ckpt"),
        "41a1ff72cadb90f6ce0345ed961822f7d0a77ab92b5fcafe9e07d00d891ce118",
        frontend=CP_MEL,
    ),
    "li2025_1": Published(
        "cp_mobile", in_git(*LI, "averaged_ckpt/averaged_model_sub1.ckpt"),
        "f700291b5792d73783cb47b43482006dc779de1fe93ed2f99c8774bf32885c31",
        frontend=CP_MEL, accuracy="58.79 % on TAU22's test part, on which it was selected; trained on 25 %",
    ),
    "li2025_2": Published(
        "cp_mobile", in_git(*LI, "averaged_ckpt/averaged_model_sub2.ckpt"),
        "a58b7510c3343945bf06395e1b6183c988023b88fe398695e48029af2b9bb442",
        frontend=CP_MEL, accuracy="59.32 % on TAU22's test part, on which it was selected; trained on 25 %",
    ),
    "li2025_teacher": Published(
        "cp_resnet", in_git(*LI, "teacher_ckpt/via2gkii/checkpoints/epoch=149-step=20550.ckpt"),
        "9e39e29c6b65ec615c57646a389eab25147a31b12c50f32c119531229601a031",
        frontend=("cp_mel", MappingProxyType({"hop_length": 750})),
    ),
    "karasin2025_4": Published(  # the general network; those for devices lie beside it
        "dcase24_baseline",
        in_git("turquenite/dcase2025_task1_inference", "b21b3b54795af98bccec66416db83acb46e49160",
               "Karasin_JKU_task1/ckpts/sys4.ckpt"),
        "2c60c0869049ca216abe6d946ea3a58210d2040a2f85eece197dfb193ada5be0",
        accuracy="61.47 % on the evaluation set of 2025, with its networks for devices; trained on 25 %",
    ),
    "tan2025_1": Published(
        "cnn_gru", in_git(*TAN, "predictions/Tan_SNTLNTU_task1_1/model_state_dict.pt"),
        "ce8b35ba34c151e538e76ad97a22c50f13eb5ece0cda3f4d054ab5fed4731afc",
        accuracy="60.35 % on TAU22's test part, on which it was selected; trained on 25 %",
    ),
    "tan2025_2": Published(
        "cnn_gru", in_git(*TAN, "predictions/Tan_SNTLNTU_task1_2/model_state_dict.pt"),
        "3f1603f643324420991c0d3f1ff7e0e4080783915dd9c73c651e3579bd88a255",
        accuracy="60.27 % on TAU22's test part, on which it was selected; trained on 25 %",
    ),
    "zhou2025": Published(
        "tf_sepnet",
        in_git("Azhou0/dcase2025t1", "3d174333d3b4b4436bbd83f3a737e8e227e62a47",
               "Zhou_XJTLU_task1/ckpts/device_unknown-val_acc=0.5849.ckpt"),
        "b2cffca4b7902561a799023b4cbd66946e13badf075dcb2918f9ff67a00f6d12",
        accuracy="58.49 % on TAU22's test part, on which it was selected; trained on 25 %",
    ),
    "sp4asc_ce": Published(
        "cnn6_60k", in_git(*SP4ASC, f"{SP4ASC_RUN}_32_2/ckpt.pth"),
        "714103cd210b1c01b5683758478f43add01e043fddc7b6cead3cf5ff75e65bcf", licence="Apache 2.0",
    ),
    "sp4asc_ce_mu": Published(
        "cnn6_60k", in_git(*SP4ASC, f"{SP4ASC_RUN}_16_2_mixup_2/ckpt.pth"),
        "1c1dea32af53386078e228f7021b621a9084fef009a4019cfa347223d6f8e855", licence="Apache 2.0",
    ),
    "sp4asc_focal": Published(
        "cnn6_60k", in_git(*SP4ASC, f"{SP4ASC_RUN}_32_2_focal_loss/ckpt.pth"),
        "f48ba7b41e901ae9cc5725716017a953ab496cb6361056bdbe7b5e310cb12603", licence="Apache 2.0",
        accuracy="67.1 % and a log loss of 0.94 on TAU 2020's test part, clips of 10 s",
    ),
}  # fmt: skip
# The teachers of CP-JKU 2023: device impulse responses and Freq-MixStyle (dirfms), or Freq-MixStyle alone (fms).
TEACHERS: dict[str, Published] = {
    f"{name}_{i}": Published(architecture, f"{RELEASE}/{name}_{i}.pt", options=options)
    for name, architecture, options in (
        ("passt_dirfms", "passt", PASST), ("passt_fms", "passt", PASST),
        ("cpr_128k_dirfms", "cp_resnet", CP_RESNET), ("cpr_128k_fms", "cp_resnet", CP_RESNET),
    )
    for i in (1, 2, 3)
}  # fmt: skip
PUBLISHED |= TEACHERS
BY_SHA256 = {row.sha256: name for name, row in PUBLISHED.items() if row.sha256}
ALIASES = {"cpjku2023": "c0a7nzin"}

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
    """The key of `PUBLISHED` that a name, an alias or an older name stands for.

    Raises:
        ValueError: for a network that is published no more, and for an unknown name; the message lists the known.
    """
    known = f"published: {', '.join([*ALIASES, *PUBLISHED])}"
    name = ALIASES.get(name, name)
    if name in PUBLISHED:
        return name
    if name not in OLD_NAMES:
        raise ValueError(f"unknown network {name!r}; {known}")
    if OLD_NAMES[name] is None:
        raise ValueError(f"the teacher {name} is published no more and nothing took its place; {known}")
    return OLD_NAMES[name]
