"""Writes what DCASE Task 1 wants handed in, and checks it as the organisers' format checkers do.

  python run_submission.py --year 2025 --label Doe_TU_task1 --model <id> --dataset_dir TAU --evaluation_dir TAU2025 \\
                           --about about.yaml             an inference package, its answers and their complexity
  python run_submission.py --year 2024 --label Doe_TU_task1 --model 5=<id> 10=<id> 25=<id> 50=<id> 100=<id> ...
                                                          a network for each share of the training part
  python run_submission.py --year 2024 --print_about      the meta information that authors fill in
  python run_submission.py --year 2024 --check FOLDER     looks at a folder that is there already

A submission holds up to four systems: --model is repeated for each. The answers are those of the network in half
precision (an int8 network's as it is), on the test part of the development set and on the evaluation set. Every network
has to be within 128 kB of parameters and 30 million MACs. Nothing is written before all is there and checked; what the
checks find is printed, and the exit status is then 1.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from datasets.audio_files import AudioFiles
from datasets.files import ContentError, replacing, replacing_folder, write_json
from datasets.tau import SCENES, DataError, Evaluation, read_evaluation, read_table
from datasets.waveforms import Clips, UnlabelledClips
from helpers import cli
from helpers.checkpoints.checkpoint import CheckpointError
from helpers.checkpoints.stated import add_stated_options, believe_of_teachers
from helpers.complexity import LimitError, Report, check_limits, measure_second
from helpers.data import Data, DataConfig, load_labels
from helpers.evaluate.systems import NetworkSystem, Treatment, TreatmentConfig, find_systems
from helpers.machine import Machine, open_machine
from helpers.options import add_compute_options
from helpers.parts import STUDENT, Parts
from helpers.quantization import float_network, for_target
from helpers.recipes import parse
from helpers.submission.about import meta_of, read_about, template
from helpers.submission.check import LABEL, Findings, check_submission
from helpers.submission.package import PackageError, answers_of_package, complexity_of, write_package
from helpers.submission.rules import MAX_SYSTEMS, RULES, Rules
from helpers.submission.tables import development_scores, half_state, metrics_of, write_output
from models.device_models import DeviceModels

log = logging.getLogger(__name__)

N_PROVED = 16  # clips on which a package is run
PROOF = 0.02  # how far its probabilities may lie from ours on average: it resamples with another filter


@dataclass(frozen=True)
class Network:
    """A network of a system: all of it, or for one share of the training part.

    Args:
        reports: of the general network, and of those for single recording devices.
    """

    system: NetworkSystem
    precision: str  # int8 or fp16
    reports: Mapping[str, Report]

    @property
    def is_folded(self) -> bool:
        """Whether its norms are in its convolutions, as in 8 bits; the organisers count what is handed in."""
        return self.precision == "int8"

    def n_bytes(self, report: Report) -> int:
        return (report.folded if self.is_folded else report.trained).parameter_bytes(self.precision)

    @property
    def largest(self) -> Report:
        return max(self.reports.values(), key=self.n_bytes)


@dataclass(frozen=True)
class Answered:
    """A network with its logits (clip, class) on the test part of the development set, and on the evaluation set."""

    network: Network
    test: Tensor
    evaluation: Tensor


@dataclass(frozen=True)
class Submission:
    """All that is written.

    Args:
        systems: their networks by block of the rules, "" where those have none.
        about: what the authors say.
        data: the development set.
        clips: the evaluation set.
    """

    label: str
    rules: Rules
    about: Mapping[str, Any]
    systems: Sequence[Mapping[str, Answered]]
    data: Data
    clips: Evaluation

    def labels(self) -> list[str]:
        return [f"{self.label}_{number}" for number in range(1, len(self.systems) + 1)]


def make_parser(chosen: Parts = STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, prog="run_submission.py", usage="python %(prog)s --year YEAR [options]")
    group = parser.add_argument_group("submission")
    group.add_argument("--year", type=int, choices=[*RULES], default=max(RULES), help="edition of the challenge")
    group.add_argument("--label", metavar="NAME", help="<Lastname>_<Institute>_task1; systems add _1, _2, ...")
    group.add_argument("--model", dest="systems", nargs="+", action="append", metavar="NAME",
                       help="a system: the id of a run, a checkpoint or a published network; in 2024 one for each "
                            "share of the training part, as 25=NAME or as its run says; again for others")  # fmt: skip
    group.add_argument("--project_name", default="DCASE23_Task1", help="folder of the runs")
    group.add_argument("--dataset", choices=["tau22", "synthetic"], default="tau22", help="as in run_training.py")
    group.add_argument("--dataset_dir", metavar="DIR", help="folder of meta.csv; without it the variable TAU22_DIR")
    group.add_argument("--evaluation_dir", metavar="DIR", help="the evaluation set of that year")
    group.add_argument("--about", metavar="FILE", help="what only the authors know, as --print_about writes it")
    group.add_argument("--output", metavar="DIR", help="folder to write (default: submission_<year>)")
    group.add_argument("--force", action="store_true", help="replace what is in that folder")
    group.add_argument("--n_clips", type=cli.number(int, 1), metavar="N",
                       help="clips of the evaluation set, for one that is not the official one")  # fmt: skip
    group.add_argument("--print_about", action="store_true", help="print a file for --about and end")
    group.add_argument("--check", metavar="DIR", help="check a submission that is there already, and end")
    group.add_argument("--batch_size", type=cli.number(int, 1), default=256)
    add_compute_options(parser)
    add_stated_options(parser, chosen, with_network=False)
    parser.set_defaults(num_workers=1)  # batches that are read ahead
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when the checks have found something."""
    parser, args = parse(make_parser, sys.argv[1:] if argv is None else argv)
    rules = RULES[args.year]
    if args.print_about:
        print(template(rules), end="")
        return 0
    if args.check is not None:
        if not Path(args.check).is_dir():
            parser.error(f"--check {args.check}: no such folder")
        return tell(check_submission(Path(args.check), rules, args.n_clips), args.check)
    plan = planned(parser, args, rules)
    about = read_about(Path(args.about), rules)
    folder = Path(args.output or f"submission_{rules.year}")
    refuse_what_is_there(folder, args.force)
    clips = evaluation_clips(Path(args.evaluation_dir), rules)
    machine = open_machine(parser, args)
    specs = list(dict.fromkeys(name for names in plan for name in names.values()))
    found = find_systems(
        specs, args.project_name, Treatment(temperature=1.0), lambda sources: believe_of_teachers(parser, args, sources)
    )
    networks = {spec: open_network(system, rules) for spec, system in zip(specs, found, strict=True)}
    plan = [by_block(parser, names, networks, rules) for names in plan]
    data = load_labels(DataConfig(args.dataset, args.dataset_dir))
    for network in networks.values():
        network.system.check(data.meta)
    answered = {spec: answer(network, data, clips, machine) for spec, network in networks.items()}
    systems = [{block: answered[spec] for block, spec in names.items()} for names in plan]
    submission = Submission(args.label, rules, about, systems, data, clips)
    with replacing_folder(folder, args.force) as new:
        if rules.by_device:
            write_inference_package(new, submission)
        else:
            write_task1(new, submission, args.batch_size)
        result = check_submission(new, rules, args.n_clips)
    print(f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return tell(result, folder)


def tell(found: Findings, where: object) -> int:
    for line in found.lines():
        print(line)
    if not found.problems:
        print(f"{where} passes the checks")
    return 1 if found.problems else 0


# ---- what goes in ---------------------------------------------------------------------------------------------------


def planned(parser: argparse.ArgumentParser, args: argparse.Namespace, rules: Rules) -> list[dict[str, str]]:
    """The names of the networks of each system, by split ("" where it is to be told by the run, or there is none)."""
    for option in ("label", "systems", "evaluation_dir", "about"):
        if getattr(args, option) is None:
            parser.error(f"--{'model' if option == 'systems' else option} is needed: see --help")
    if not LABEL.fullmatch(args.label):
        parser.error(f"--label {args.label}: must be <Lastname>_<Institute>_task1")
    if len(args.systems) > MAX_SYSTEMS:
        parser.error(f"--model is given {len(args.systems)} times: at most {MAX_SYSTEMS} systems can be handed in")
    plan = []
    for names in args.systems:
        if not rules.splits and len(names) > 1:
            parser.error(f"--model {' '.join(names)}: a system of {rules.year} is one network; say --model again for "
                         "another system")  # fmt: skip
        system: dict[str, str] = {}
        for i, name in enumerate(names):
            split, sign, spec = name.partition("=")
            is_split = bool(sign) and split.isdecimal() and int(split) in rules.splits
            key = f"split_{split}" if is_split else f"?{i}" if rules.splits else ""
            if key in system:
                parser.error(f"--model names two networks for {split} percent")
            system[key] = spec if is_split else name
        plan.append(system)
    return plan


def by_block(
    parser: argparse.ArgumentParser, names: Mapping[str, str], networks: Mapping[str, Network], rules: Rules
) -> dict[str, str]:
    """Names of a system's networks by block; those that the command line does not tell are told by their runs."""
    found: dict[str, str] = {}
    for key, spec in names.items():
        if key.startswith("?"):
            subset = networks[spec].system.load().content.get("options", {}).get("subset")
            if subset is None:
                parser.error(f"--model {spec}: it does not say on how much it was trained; write 25={spec} or the like")
            key = f"split_{subset}"
        if key in found:
            parser.error(f"--model names two networks for {key.removeprefix('split_')} percent: {found[key]}, {spec}")
        found[key] = spec
    if missing := [block.removeprefix("split_") for block in rules.blocks if block not in found]:
        parser.error(f"--model lacks networks for {', '.join(missing)} percent: a system of {rules.year} has one for "
                     f"each of {', '.join(map(str, rules.splits))}")  # fmt: skip
    return {block: found[block] for block in rules.blocks} if rules.blocks else found


def refuse_what_is_there(folder: Path, force: bool) -> None:
    if not force and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ContentError(f"{folder} is there already: name another folder with --output, or replace it with --force")
    parent = next(path for path in folder.resolve().parents if path.exists())
    if not os.access(parent, os.W_OK):
        raise ContentError(f"{parent} cannot be written: name another folder with --output")


def evaluation_clips(root: Path, rules: Rules) -> Evaluation:
    """The list of the evaluation set; for 2025 with the recording devices."""
    if not root.is_dir():
        raise DataError(f"--evaluation_dir {root}: no such folder")
    clips = read_evaluation(root)
    if rules.by_device and clips.recording_device is None:
        raise DataError(f"{root} tells no recording devices in a column device_id: is it the set of {rules.year}?")
    return clips


def open_network(system: Any, rules: Rules) -> Network:
    """A network that may be handed in, as it is to be run."""
    if not isinstance(system, NetworkSystem):
        raise CheckpointError(f"{system.path}: a submission needs the network itself, a run or a checkpoint")
    if system.scenes != SCENES:
        raise CheckpointError(f"{system.path} knows the scenes {', '.join(system.scenes)}, not those of the challenge")
    loaded = system.load()
    precision = "int8" if loaded.precision == "int8" else "fp16"
    if rules.by_device and precision == "int8":
        raise CheckpointError(f"{system.path} is int8: the complexity test of {rules.year} counts floats alone: hand "
                              "in the network that it was made from")  # fmt: skip
    own = loaded.device_models if rules.by_device else {}
    general = float_network(loaded.model) if precision == "int8" else loaded.model
    reports = {"": measure_second(general, loaded.frontend)}
    reports |= {device: measure_second(model, loaded.frontend) for device, model in own.items()}
    network = Network(system, precision, reports)
    for device, report in reports.items():
        if breaches := check_limits(report, precision, network.is_folded):
            which = f"the network for device {device}" if device else "the network"
            raise LimitError(f"{system.path}: {which} is over the challenge's limits: {'; '.join(breaches)}")
    config = TreatmentConfig("stored" if precision == "int8" else "fp16", general=not rules.by_device)
    system.treatment = replace(system.treatment, config=config)
    return network


def answer(network: Network, data: Data, evaluation: Evaluation, machine: Machine) -> Answered:
    """Runs a network on clips as their files hold them: a waveform store would round them to 16 bits."""
    system = network.system
    test = Clips(data.meta, data.test.rows, AudioFiles(data.meta.root, data.test.files, system.sampling))
    parts = [test, UnlabelledClips(evaluation, AudioFiles(evaluation.root, evaluation.files, system.sampling))]
    for part in parts:
        system.prove(part.store.n_samples)
    both = [system.answers(part, machine) for part in parts]
    return Answered(network, *(list(by_name.values())[-1] for by_name in both))  # the last: each device by its own


# ---- what comes out -------------------------------------------------------------------------------------------------


def write_task1(folder: Path, submission: Submission, batch_size: int) -> None:
    """The folder task1 of 2023 and 2024, and what the published script leaves for each network."""
    rules, files, clips = submission.rules, submission.clips.files, submission.data.test
    for label, system in zip(submission.labels(), submission.systems, strict=True):
        scores = {}
        for block, path in rules.outputs(label).items():
            one = system[block]
            scores[block] = development_scores(clips, one.test, submission.data.groups)
            left = folder / "predictions" / ".".join(filter(None, (label, block)))
            for output in (folder / path, left / "output.csv"):
                write_output(output, files, one.evaluation, in_short=True)
            cost = one.network.largest.trained
            info = {"MACs": cost.macs, "Params": cost.n_parameters, "test": [metrics_of(clips, one.test, batch_size)]}
            with replacing(left / "info.json") as file:
                json.dump(info, file)
            with replacing(left / "model_state_dict.pt", "wb") as file:
                torch.save(weights_of(one.network), file)
        largest = max((one.network for one in system.values()), key=lambda one: cost_of(one)["total_model_size"])
        write_meta(folder / "task1" / label / f"{label}.meta.yaml", submission, label, largest,
                   scores if rules.splits else scores[""])  # fmt: skip


def write_inference_package(folder: Path, submission: Submission) -> None:
    """The package of 2025 and, for each system, what the organisers' scripts would write with it."""
    name, clips, systems = submission.label, submission.clips, [system[""] for system in submission.systems]
    parts = []
    for one in systems:
        loaded = one.network.system.load()
        about = f"{type(loaded.model).__name__}, with networks for {', '.join(loaded.device_models) or 'no device'}"
        parts.append((about, DeviceModels(loaded.model, loaded.device_models), loaded.frontend))
    meta, test = submission.data.meta, submission.data.test
    files = read_table(meta.root / "evaluation_setup" / "fold1_evaluate.csv", ["filename"]).filename
    test_list = [(file, meta.scenes[meta.scene[meta.row_of[file]]]) for file in files]
    write_package(folder / name, name, parts, test_list)
    for label, one, (_, model, frontend) in zip(submission.labels(), systems, parts, strict=True):
        left = folder / "predictions" / label
        write_output(left / "output.csv", clips.files, one.evaluation, in_short=False)
        right = float((one.test.argmax(dim=1) == test.scene).float().mean())
        write_json(left / "test_accuracy.json", {"Test Accuracy": round(100 * right, 2)})
        write_json(left / "complexity.json", complexity_of(model, frontend))
        torch.save(half_state(model), left / "model_state_dict.pt")
        write_meta(left / f"{label}.meta.yaml", submission, label, one.network,
                   development_scores(test, one.test, submission.data.groups))  # fmt: skip
    prove_package(folder / name, name, [one.evaluation for one in systems], clips)


def prove_package(folder: Path, name: str, logits: list[Tensor], clips: Evaluation) -> None:
    """Runs the package in a process of its own on some clips, and compares its answers (clip, class) with ours.

    Raises:
        PackageError: when it answers something else.
    """
    rows = np.unique(np.linspace(0, len(clips) - 1, N_PROVED).astype(int))
    files = [clips.root / file for file in clips.files[rows]]
    found = answers_of_package(folder, name, len(logits), files, clips.recording_device[rows].tolist())
    for number, (theirs, ours) in enumerate(zip(found, logits, strict=True), start=1):
        apart = (theirs.softmax(dim=1) - ours[torch.from_numpy(rows)].softmax(dim=1)).abs()
        log.info("%s_%d, run by itself: on %d clips its probabilities differ from ours by %.4f, at most %.4f", name,
                 number, len(rows), apart.mean(), apart.max())  # fmt: skip
        if apart.mean() > PROOF:
            raise PackageError(f"{name}_{number} answers something else than the network that it was made from: its "
                               f"probabilities differ by {apart.mean():.3f} on average")  # fmt: skip


def weights_of(network: Network) -> dict[str, Tensor]:
    """The state of the network alone, as it is run."""
    model = network.system.load().model
    return for_target(model, "int8").state_dict() if network.precision == "int8" else half_state(model)


def cost_of(network: Network) -> dict[str, int]:
    """The block system.complexity of the meta information."""
    report, state = network.largest, network.system.load().model
    return {
        "total_model_size": network.n_bytes(report),
        "total_parameters": report.trained.n_parameters,
        "total_parameters_non_zero": sum(int(value.count_nonzero()) for value in state.parameters()),
        "memory_use": report.folded.peak_bytes(network.precision),
        "macs": report.trained.macs,
    }


def write_meta(path: Path, submission: Submission, label: str, network: Network, scores: Mapping[str, Any]) -> None:
    known = {
        "input_sampling_rate": f"{network.system.sampling.rate / 1000:g}kHz",
        "acoustic_features": "log-mel energies",
        "framework": "pytorch",
    }
    meta = meta_of(submission.about, submission.rules, label, known, cost_of(network), scores)
    with replacing(path) as file:
        yaml.safe_dump(meta, file, sort_keys=False, allow_unicode=True)


if __name__ == "__main__":
    cli.run(main)
