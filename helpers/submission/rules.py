"""What the rules of DCASE Task 1 want handed in, edition by edition.

Sources: the task's pages of 2023 to 2025, the organisers' format checkers
(https://github.com/toni-heittola/dcase2023_task1_submission_validator and dcase2024_...), and the inference package of
2025 (https://github.com/CPJKU/dcase2025_task1_inference). No checker and no template of meta information is known of
2025: there it is that of 2024 without splits.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets.known import DATASETS
from datasets.tau import SCENES, SUBSETS

COLUMNS = ("filename", "scene_label", *SCENES)
MAX_SYSTEMS = 4
# The complexity test of 2025 asks for the networks of these.
PROBED_DEVICES = ("a", "b", "c", *(f"s{i}" for i in range(1, 11)))
DESCRIPTION = (
    "input_sampling_rate", "acoustic_features", "data_augmentation", "machine_learning_method", "external_data_usage",
    "complexity_management", "pipeline", "framework",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """One edition.

    Args:
        n_clips: of its evaluation set, which are called `0.wav` and so on.
        splits: percent of the training part; a system is a network for each. (): one network.
        description: keys of `system.description` in the meta information.
        complexity: keys of `system.complexity`.
        has_energy: `system.energy_consumption` is wanted.
        by_device: the recording device of a clip is told, and each may have a network of its own.
    """

    year: int
    n_clips: int
    splits: tuple[int, ...] = ()
    description: tuple[str, ...] = DESCRIPTION
    complexity: tuple[str, ...] = ("total_model_size", "total_parameters", "macs")
    has_energy: bool = False
    by_device: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks of scores in the meta information; empty where the scores stand there directly."""
        return tuple(f"split_{split}" for split in self.splits)

    def outputs(self, label: str) -> dict[str, Path]:
        """The tables of a system's answers by the name of their block ("" where there is one), inside the package."""
        folder = Path("task1", label)
        if not self.splits:
            return {"": folder / f"{label}.output.csv"}
        return {block: folder / f"{label}.output.{block}.csv" for block in self.blocks}


RULES = {
    2023: Rules(
        2023,
        DATASETS["eval23"].n_clips,
        description=(*DESCRIPTION, "embeddings", "ensemble_method_subsystem_count", "decision_making"),
        complexity=("total_model_size", "total_parameters", "total_parameters_non_zero", "memory_use", "macs"),
        has_energy=True,
    ),
    2024: Rules(
        2024,
        DATASETS["eval24"].n_clips,
        splits=SUBSETS,
        description=(*DESCRIPTION, "split_adaptations", "system_adaptations"),
    ),
    2025: Rules(
        2025,
        DATASETS["eval25"].n_clips,
        description=(*DESCRIPTION, "system_adaptations"),
        by_device=True,
    ),
}
