"""Published networks by name, students and teachers: one row for each set of weights.

Sources: F. Schmid et al., "Distilling the Knowledge of Transformers and CNNs with CP-Mobile", DCASE Workshop 2023,
https://github.com/fschmid56/cpjku_dcase23; entries to DCASE 2025 Task 1, and SP4ASC, each at the address in its row.
Nothing of them is kept in this repository: a file is fetched from its authors when it is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        within: keys and prefix of names that its weights lie below, in a file that holds several networks; "": the
            general one.
        frontend: name and options; None: the network's own.
        accuracy: as published, and on what; "": their authors state none.
        licence: None where the repository has none: use is for the user to settle with the authors.
    """

    architecture: str
    url: str
    sha256: str | None = None
    options: Mapping[str, Any] | None = None
    frontend: tuple[str, Mapping[str, Any]] | None = None
    accuracy: str = ""
    licence: str | None = None
    within: str = ""

    @property
    def file(self) -> str:
        """What the file is called here: after the first network that is in it."""
        name = next(name for name, row in PUBLISHED.items() if row.url == self.url)
        return name + PurePosixPath(self.url).suffix


def in_git(repository: str, commit: str, path: str) -> str:
    """Address of a file on GitHub as it was at a commit."""
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{quote(path)}"


CPJKU = "fschmid56/cpjku_dcase23"
RELEASE = f"https://github.com/{CPJKU}/releases/download/ensemble_logits"
LI = "HaoWLee/dcase2025_task1_Li_NTU", "7d467d6ab31001c55d55d91576d0cd844ac88ad9"
SP4ASC = "valeoai/SP4ASC", "4be54c9902b50e1a46008c57c575e6e1e19b2d47"
JEONG = "wa976/dcase2025_task1_inference", "985133cf141795ecd7d725f1f7b356bc16c2064f"
KARASIN = "turquenite/dcase2025_task1_inference", "b21b3b54795af98bccec66416db83acb46e49160"
SHAM = "Sham-cn/dcase2025_task1_inference", "22b8377a1c073ce9da327e2df54706e78e1b75cc"
TAN = "joesephgit/DCASE2025", "4c7f3ca525a4c09bf23660719721a196a1d0bf23"
ZHOU = "Azhou0/dcase2025t1", "3d174333d3b4b4436bbd83f3a737e8e227e62a47"
SP4ASC_RUN = "trained_models/configs.cnn6_small_dropout_2_specAugment_128_2"
CP_RESNET: Mapping[str, Any] = MappingProxyType({})
PASST = MappingProxyType({"s_patchout_f": 6})  # of training; inert in eval mode
CP_MEL = ("cp_mel", MappingProxyType({}))
# Samples at 44.1 kHz go through filters that are made for 32 kHz.
JEONG_MEL = ("cp_mel", MappingProxyType({"sample_rate": 44100, "bank_rate": 32000, "n_fft": 2048, "win_length": 2048,
                                         "hop_length": 744, "fmax_aug_range": 1}))  # fmt: skip
SELECTED = "on TAU22's test part, on which it was selected; trained on 25 %"

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
        frontend=CP_MEL, accuracy=f"58.79 % {SELECTED}",
    ),
    "li2025_2": Published(
        "cp_mobile", in_git(*LI, "averaged_ckpt/averaged_model_sub2.ckpt"),
        "a58b7510c3343945bf06395e1b6183c988023b88fe398695e48029af2b9bb442",
        frontend=CP_MEL, accuracy=f"59.32 % {SELECTED}",
    ),
    "li2025_teacher": Published(
        "cp_resnet", in_git(*LI, "teacher_ckpt/via2gkii/checkpoints/epoch=149-step=20550.ckpt"),
        "9e39e29c6b65ec615c57646a389eab25147a31b12c50f32c119531229601a031",
        frontend=("cp_mel", MappingProxyType({"hop_length": 750})),
    ),
    "karasin2025_4": Published(
        "dcase24_baseline", in_git(*KARASIN, "Karasin_JKU_task1/ckpts/sys4.ckpt"),
        "2c60c0869049ca216abe6d946ea3a58210d2040a2f85eece197dfb193ada5be0",
        accuracy="61.47 % on the evaluation set of 2025, with its networks for devices; trained on 25 %",
    ),
    "tan2025_1": Published(
        "cnn_gru", in_git(*TAN, "predictions/Tan_SNTLNTU_task1_1/model_state_dict.pt"),
        "ce8b35ba34c151e538e76ad97a22c50f13eb5ece0cda3f4d054ab5fed4731afc",
        accuracy=f"60.35 % {SELECTED}",
    ),
    "tan2025_2": Published(
        "cnn_gru", in_git(*TAN, "predictions/Tan_SNTLNTU_task1_2/model_state_dict.pt"),
        "3f1603f643324420991c0d3f1ff7e0e4080783915dd9c73c651e3579bd88a255",
        accuracy=f"60.27 % {SELECTED}",
    ),
    "zhou2025": Published(
        "tf_sepnet",
        in_git(*ZHOU, "Zhou_XJTLU_task1/ckpts/device_unknown-val_acc=0.5849.ckpt"),
        "b2cffca4b7902561a799023b4cbd66946e13badf075dcb2918f9ff67a00f6d12",
        accuracy=f"58.49 % {SELECTED}",
    ),
    "jeong2025_1": Published(
        "dcase24_baseline", in_git(*JEONG, "predictions/Jeong_SEOULTECH_task1_1/model_state_dict.pt"),
        "13816ebd4568e062cce5c708f553a146a7fe5f85e265c3bd53fcac49e51ff54c",
        frontend=JEONG_MEL, accuracy=f"54.62 %, with its networks for devices 57.93 %, {SELECTED}",
    ),
    "jeong2025_2": Published(
        "dcase24_baseline", in_git(*JEONG, "predictions/Jeong_SEOULTECH_task1_2/model_state_dict.pt"),
        "9fa68d8417007dc62bd3af2d94b2b71d6cdbc2ccbb151f5702566ff943cf1818",
        frontend=JEONG_MEL, accuracy=f"with its networks for devices 57.93 %, {SELECTED}",
    ),
    "sham2025_cnn": Published(
        "cp_mobile", in_git(*SHAM, "ckpt/cnn/net.pkl"),
        "051c630aa920a46502fd91ee9d575b471ef690fbea968a9435eba5be033eb9e3",
        frontend=("dcase24_mel", MappingProxyType({})), accuracy=f"57.66 % {SELECTED}",
    ),
    "sham2025_transformer": Published(
        "cp_mobile", in_git(*SHAM, "ckpt/transformer/net.pkl"),
        "b915d5d6acd9851fe80f8eb87dce18957e2f25efbb49d7e9a8a0561c079fbf17",
        frontend=("dcase24_mel", MappingProxyType({})), accuracy=f"56.06 % {SELECTED}",
    ),
    "sham2025_all": Published(
        "cp_mobile", in_git(*SHAM, "ckpt/all/net.pkl"),
        "f18d0b410b043d20a06f214b63184098c9f8d16cbf43555372107a65f042d58b",
        frontend=("dcase24_mel", MappingProxyType({})), accuracy=f"56.54 % {SELECTED}",
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
# Of the two of Li, which are averages: the members, by epoch.
PUBLISHED |= {
    f"li2025_{entry}_{epoch}": Published(
        "cp_mobile", in_git(*LI, f"model_soup/sub{entry}/epoch={epoch}-valacc=0.{digits}.ckpt"), sha256,
        frontend=CP_MEL, accuracy=f"{int(digits) / 100:.2f} % {SELECTED}",
    )
    for entry, epoch, digits, sha256 in (
        (1, 126, "5864", "f7154479b82bcf288aacb40e1666228adf2a8bea0b62aa6bbd90392757086701"),
        (1, 127, "5866", "6b76029d08f57838dacf6ce84aca9d0d5d8e97231174a31c60952dc1644ce263"),
        (1, 155, "5863", "990048e3ffa2f24cc101c2c3f14a294b2dd60fb321a8016dd5eef32262648307"),
        (2, 123, "5920", "e6f146c5507c88d64beac7fb56878fdc32c208f2c3e30852be5b85ce10461d25"),
        (2, 125, "5910", "02f3d743024d811a4a3593bf29a105a78a85a1f6b4e31e0f0c8d935f6734f8f5"),
        (2, 130, "5923", "2279b61af998ec7931a36ab625648fcc08c2b34e0f0aca551e39857819ce75c3"),
        (2, 148, "5911", "08ba6e8a546eaabf24eac5257fb1489e61b10a7f0d5cd4c37ff529501d9214c5"),
    )
}  # fmt: skip
# For single devices: Karasin's and Jeong's in the file of the general network, Zhou's in files of their own.
PUBLISHED |= {
    f"{name}_{device}": replace(PUBLISHED[name], accuracy="", within=f"{container}device_models.{device}.")
    for name, container in (
        ("karasin2025_4", "state_dict.multi_device_model."), ("jeong2025_1", ""), ("jeong2025_2", ""),
    )
    for device in ("a", "b", "c", "s1", "s2", "s3")
}  # fmt: skip
PUBLISHED |= {
    f"zhou2025_{device}": Published(
        "tf_sepnet", in_git(*ZHOU, f"Zhou_XJTLU_task1/ckpts/device_{device}-val_acc=0.{digits}.ckpt"), sha256,
        accuracy=f"{int(digits) / 100:.2f} % on device {device} of TAU22's test part, on which it was selected",
    )
    for device, digits, sha256 in (
        ("a", "6761", "4375a915c685e919ede53428c61fad10e18092f65662024446ce519e13e9ee48"),
        ("b", "6036", "b11f092bb4d30d79ddddf0b1d82e2ef10e43a4df3db9b5013c197c1497a0f458"),
        ("c", "6191", "f6c460b14ab94edb44b34cd12781ced7f2fa577537d5643cc04e8f64cf153de5"),
        ("s1", "5830", "c6d790efeaa34f72cf3bb72ccad9b619e3b163a4a756f664263615ef01c6f03b"),
        ("s2", "5679", "122faa0013c76dd5ba1d0d602a7cfbbd81867c78d6a05de160f99d34ab9d0957"),
        ("s3", "5991", "828a8ac6f1cca9e8901807e5554c0e313482bcf91168f4226e5d7e6a79302179"),
    )
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
BY_SHA256 = {row.sha256: name for name, row in PUBLISHED.items() if row.sha256 and not row.within}
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
