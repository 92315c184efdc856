"""Fine-tunes a network for each recording device of the training part, from a general one.

  python run_device_training.py --wandb_id=<id>                     a run of run_training.py, or a published network
  python run_device_training.py --checkpoint best.pt --tune norms   any checkpoint; norms and biases alone learn
  python run_device_training.py --resume abcd1234                   goes on where that run stopped

Each device in turn gets a copy of the general network, which learns from the device's own clips with an optimizer and a
schedule of its own; the general network stays as it is and answers for devices that nobody has trained on. Every device
ends with a score of the whole test part by device (`test/...`); `general/test/...` is the general network's. The run
leaves checkpoints/last.pt, which holds them all, and checkpoints/container.pt in the published layout.

Without --config it does what recipes/dcase25_devices.yaml says. Source: F. Schmid et al., DCASE 2025 Task 1,
https://github.com/CPJKU/dcase2025_task1_baseline.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import copy
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets.waveforms import Clips
from helpers import cli, parts
from helpers.augment import chain_digests
from helpers.checkpoints.checkpoint import Checkpoint, CheckpointError, Subject, check_scenes, load_model
from helpers.checkpoints.stated import add_stated_options, believe
from helpers.data import Data, DataConfig, data_digests, load_data, load_teacher, place_on_device, sampling_of
from helpers.loop import Update, evaluate, train_one_epoch
from helpers.machine import open_machine
from helpers.options import (
    add_compute_options,
    add_data_options,
    add_optimisation_options,
    add_precision_options,
    add_run_options,
    build_optimizer,
    is_weight,
)
from helpers.runs.folder import last_checkpoint, source_checkpoint
from helpers.runs.options import parse_run_options
from helpers.runs.run import Run, open_run
from models.device_models import DeviceModels

RECIPE = Path(__file__).resolve().parent / "recipes/dcase25_devices.yaml"


def make_parser(chosen: parts.Parts = parts.STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(
        __doc__, prog="run_device_training.py", usage="python %(prog)s --wandb_id ID | --checkpoint PATH [options]"
    )
    source = parser.add_argument_group("the general network")
    source.add_argument("--wandb_id", metavar="ID", help="run of this project; its checkpoint is found by itself")
    source.add_argument("--checkpoint", metavar="PATH", help="instead of a run: a checkpoint, ours or published")
    source.add_argument("--devices", nargs="+", metavar="NAME",
                        help="recording devices that get a network (default: all of the training part)")  # fmt: skip
    source.add_argument("--tune", choices=["all", "norms"], default="all",
                        help="what learns: all weights, or norms and biases alone")  # fmt: skip
    add_run_options(parser)
    add_data_options(parser)
    add_precision_options(add_compute_options(parser))
    parts.add_augmentation_options(parser, chosen)
    parts.add_loss_options(parser, chosen)
    add_optimisation_options(parser)
    parts.add_schedule_options(parser, chosen)
    add_stated_options(parser, chosen)
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not {"--config", "--resume"} & {word.split("=")[0] for word in argv}:
        argv = ["--config", str(RECIPE), *argv]
    parser, args = parse_run_options(make_parser, argv)
    torch.manual_seed(args.seed)
    with cli.option_errors(parser):
        loss_fn, rate = parts.build_loss(args), parts.build_rate(args)
        data_config = cli.config_from(args, DataConfig)
        parts.augment_configs(args)
    if hasattr(loss_fn, "feature_teacher"):
        parser.error(f"--loss {args.loss} is for run_training.py")
    if args.resume:
        path = last_checkpoint(args.project_name, args.resume)
        source = load_model(path)
    else:
        path, published = source_checkpoint(args.project_name, args.wandb_id, args.checkpoint)
        source = believe(parser, args, load_model(path, published), path)
    if source.precision != "fp32":
        raise CheckpointError(f"{path} is {source.precision}: fine-tune the network of floats that it was made from")

    machine = open_machine(parser, args)
    frontend, general = source.frontend.to(machine.device), machine.take(source.model)
    with machine.processes.main_first():
        data = load_data(data_config, sampling_of(frontend), args.seed)
        check_scenes(path, source, data.meta, "take another checkpoint")
        load_teacher(data, args.teacher_logits, loss_fn, args.given)
        devices = chosen_devices(parser, args.devices, data)
        with cli.option_errors(parser):
            augment = parts.build_augment(args, data, frontend, loss_fn).to(machine.device)
    by_device = {device: of_device(data, device) for device in devices}
    for device, part in by_device.items():
        machine.processes.check_share(len(part.train), f"training clips of device {device}")
        place_on_device(part.train, args.data_on_device, machine.device)

    begun = Checkpoint(path, source.content) if args.resume else None
    if begun is not None and begun.content["options"]["n_epochs"] != args.n_epochs:
        parser.error("--n_epochs cannot change when a run is resumed: it is that of each device")
    tuned = {device: machine.take(network) for device, network in source.device_models.items() if begun is not None}
    states = {device: network.state_dict() for device, network in tuned.items()}

    def next_network(device: str) -> nn.Module:
        """A copy of the general network, or what the run has made of it so far; checkpoints hold it from then on."""
        network = tuned.setdefault(device, copy.deepcopy(general))
        states[device] = network.state_dict()
        for name, value in network.named_parameters():
            value.requires_grad_(args.tune == "all" or not is_weight(name, value))
        return network

    position = 0 if begun is None else begun.content["loop"]["epoch"] // args.n_epochs  # of the device in turn
    first = next_network(devices[min(position, len(devices) - 1)])
    update = Update(
        build_optimizer(args, first), machine, args.precision, args.accumulate, rate_of_device(rate, args.n_epochs),
        args.clip_grad_norm,
    )  # fmt: skip
    digests = data_digests(data) | chain_digests(augment) | {"devices": ", ".join(devices)}
    subject = Subject(general, frontend, data, digests, {"device_models": states})

    with open_run(parser, args, subject, update, begun) as run:
        general_scores, _ = evaluate(general, frontend, data, machine, "general/")
        metrics, logits = {}, None
        while run.epoch < len(devices) * args.n_epochs:
            device = devices[run.epoch // args.n_epochs]
            network = next_network(device)
            if run.epoch % args.n_epochs == 0 and update.state.step == 0:
                update.optimizer = build_optimizer(args, network)
            metrics, logits = train_device(run, device, network, by_device[device], frontend, augment, loss_fn)
            if run.epoch % args.n_epochs == args.n_epochs - 1:
                scores, logits = evaluate(DeviceModels(general, tuned), frontend, data, machine)
                metrics |= scores | general_scores
            run.finish_epoch(metrics)
        if logits is None:  # a finished run, resumed
            metrics, logits = evaluate(DeviceModels(general, tuned), frontend, data, machine)
        metrics |= general_scores
        run.report(metrics, logits)
        if machine.processes.is_main:
            container = run.dir / "checkpoints/container.pt"
            torch.save(DeviceModels(general, tuned).cpu().state_dict(), container)
            print(f"\n{summary(metrics, devices)}\nin the published layout: {shlex.quote(str(container))}")
    return metrics


def chosen_devices(parser: argparse.ArgumentParser, names: list[str] | None, data: Data) -> list[str]:
    """The recording devices to train for, in the data set's order.

    Ends with the parser's error for one that has no clips in the training part.
    """
    known = [data.meta.recording_devices[i] for i in np.unique(data.train.meta.recording_device[data.train.rows])]
    for name in names or ():
        if name not in known:
            parser.error(f"--devices {name}: the training part has clips of {', '.join(known)}")
    return [device for device in known if names is None or device in names]


def of_device(data: Data, device: str) -> Data:
    """The data set's clips of one recording device; the test part may have none."""

    def only(clips: Clips | None) -> Clips | None:
        if clips is None:
            return None
        own = np.flatnonzero(data.meta.recording_device[clips.rows] == data.meta.recording_devices.index(device))
        logits = None if clips.teacher_logits is None else clips.teacher_logits[torch.from_numpy(own)]
        return Clips(data.meta, clips.rows[own], clips.store, logits) if len(own) else None

    return replace(data, train=only(data.train), val=only(data.val), test=only(data.test))


def rate_of_device(rate: Callable[[int, int, int], float], n_epochs: int) -> Callable[[int, int, int], float]:
    """The schedule, begun anew for every device."""
    return lambda epoch, step, n_steps: rate(epoch % n_epochs, step, n_steps)


def train_device(
    run: Run, device: str, network: nn.Module, data: Data, frontend: nn.Module, augment: nn.ModuleDict,
    loss_fn: Callable,
) -> tuple[dict[str, float], Tensor | None]:  # fmt: skip
    """An epoch of a device's network on its own clips; its metrics, also under `<device>/`, and no logits yet."""
    machine, n_epochs = run.update.machine, run.args.n_epochs
    learner = machine.share(network)
    metrics = train_one_epoch(learner, frontend, augment, loss_fn, run.batches(data.train), run.update)
    local = run.epoch % n_epochs + 1
    if data.test is not None and (local == n_epochs or local % run.args.eval_every == 0):
        scores, _ = evaluate(network, frontend, data, machine, f"{device}/", run.after_step)
        metrics |= scores
    return metrics, None


def summary(metrics: dict[str, float], devices: list[str]) -> str:
    """Test accuracies of the general network and of those for devices, in percent."""
    names = [("all clips", "acc"), *((f"device {device}", f"acc/device/{device}") for device in devices)]
    lines = ["test accuracy, general network -> by device:"]
    for words, key in names:
        if f"test/{key}" in metrics:
            lines.append(f"  {words:<12}{metrics[f'general/test/{key}']:8.2%} -> {metrics[f'test/{key}']:.2%}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
