"""Scores of several systems on the same clips, alone and together, and which differences are more than chance."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from datasets.audio import Sampling
from datasets.tau import read_meta
from helpers.data import Data, DataConfig, dataset_root, load_data, load_labels, place_on_device
from helpers.evaluate.calibration import reliability
from helpers.evaluate.systems import System
from helpers.evaluate.uncertainty import Difference, Interval, differences, intervals, mcnemar
from helpers.machine import Machine
from helpers.metrics import score
from helpers.report.text import align
from helpers.teachers import mean_logits

log = logging.getLogger(__name__)

Ensemble = Literal["logits", "log_probabilities", "probabilities", "none"]
ENSEMBLES: tuple[str, ...] = get_args(Ensemble)


def load_for(
    systems: Sequence[System], config: DataConfig, machine: Machine, data_on_device: str
) -> dict[Sampling | None, Data]:
    """The data set as every system wants it sampled; where none hears it, its labels alone, as that of None.

    Every system is proved on what it is to be scored on, so that what does not fit is told before any work.

    Raises:
        CheckpointError, DataError: for a system of other scenes, or that does not take these clips.
    """
    wanted = sorted({system.sampling for system in systems if system.sampling is not None})
    with machine.processes.main_first():
        meta = read_meta(dataset_root(config))
        for system in systems:
            system.check(meta)
        data = {sampling: load_data(config, sampling, seed=0) for sampling in wanted} or {None: load_labels(config)}
    machine.processes.check_share(len(next(iter(data.values())).test), "test clips")
    for part in data.values():
        if part.store is not None:
            place_on_device(part.test, data_on_device, machine.device)
    for system in systems:
        if system.sampling is not None:
            system.prove(data[system.sampling].store.n_samples)
    return data


def answers_of(
    systems: Sequence[System], data: Mapping[Sampling | None, Data], machine: Machine, ensemble: Ensemble = "logits"
) -> dict[str, Tensor]:
    """Logits (clip, class) on the test part by the name of the system, and of all together where there are several."""
    answers: dict[str, Tensor] = {}
    for system in systems:
        part = data.get(system.sampling) or next(iter(data.values()))
        log.info("%s (%s): %d test clips", system.name, system.path, len(part.test))
        answers |= system.answers(part.test, machine)
    if len(systems) > 1 and ensemble != "none":
        together = [answers[system.name] for system in systems]
        answers["ensemble"] = mean_probabilities(together) if ensemble == "probabilities" else mean_logits(
            together, average=ensemble
        )  # fmt: skip
    return answers


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """The arithmetic mean of the probabilities of several systems, as logits (clip, class): its logarithm."""
    return torch.stack([table.double().softmax(dim=1) for table in logits]).mean(dim=0).log().float()


def scores_of(data: Data, answers: Mapping[str, Tensor]) -> dict[str, float]:
    """All metrics of all systems, by `<system>/test/<metric>`; `ece` is the expected calibration error."""
    metrics: dict[str, float] = {}
    target = data.test.scene.cpu()
    for name, logits in answers.items():
        metrics |= {f"{name}/test/{key}": value for key, value in score(data.test, logits, data.groups).items()}
        metrics[f"{name}/test/ece"] = reliability(logits, target).error
    return metrics


def summary(metrics: Mapping[str, float], names: Sequence[str], title: str = "system") -> str:
    """Accuracies in percent, log loss and calibration error, a line for each system."""
    groups = [group for group in ("real", "seen", "unseen") if f"{names[0]}/test/acc/{group}" in metrics]
    rows = [[title, "acc %", "macro %", *(f"{group} %" for group in groups), "log loss", "ECE %"]]
    for name in names:
        shares = [metrics[f"{name}/test/{key}"] for key in ("acc", "macro_avg_acc", *(f"acc/{g}" for g in groups))]
        loss, ece = metrics[f"{name}/test/loss"], metrics[f"{name}/test/ece"]
        rows.append([name, *(f"{100 * share:.2f}" for share in shares), f"{loss:.3f}", f"{100 * ece:.2f}"])
    return "\n".join(align(rows))


@dataclass(frozen=True)
class Compared:
    """The macro-average accuracy of a system, and how it differs from the first one's."""

    interval: Interval
    difference: Difference | None = None
    mcnemar: float | None = None  # p, for clips that are taken for independent


def compare(data: Data, answers: Mapping[str, Tensor], n_rounds: int) -> dict[str, Compared]:
    """Intervals of all systems and differences to the first; empty where the test part is a single recording.

    Args:
        n_rounds: draws of recordings; 0 is off.
    """
    clips, key = data.test, "macro_avg_acc"
    if not n_rounds or len(set(clips.meta.recording[clips.rows])) < 2:
        return {}
    found: dict[str, Compared] = {}
    first = next(iter(answers.values()))
    for name, logits in answers.items():
        one = intervals(clips, logits, data.groups, n_rounds)[key]
        if not found:
            found[name] = Compared(one)
            continue
        more = differences(clips, first, logits, data.groups, n_rounds)[key]
        found[name] = Compared(one, more, mcnemar(clips, first, logits))
    return found


def comparisons(compared: Mapping[str, Compared], n_rounds: int) -> list[str]:
    """Lines for people of what `compare` gives."""
    if not compared:
        return ["the test part is a single recording, which tells nothing about how sure its scores are"]
    lines = [f"macro %, 95 % interval of {n_rounds:,} draws of recordings; the difference to the first and its p; "
             "McNemar's p"]  # fmt: skip
    rows = []
    for name, one in compared.items():
        row = [name, f"{100 * one.interval.value:.2f}", one.interval.in_percent()]
        if (more := one.difference) is not None:
            row += [f"{100 * more.value:+.2f}", more.in_percent("+"), f"{more.p:.2g}", f"{one.mcnemar:.2g}"]
        rows.append([*row, *[""] * (7 - len(row))])
    return [*lines, *(line.rstrip() for line in align(rows))]
