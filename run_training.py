"""Trains any network: a low-complexity student, alone or with teacher logits, or a teacher.

  python run_training.py                                   the published student on TAU22 (TAU22_DIR or --dataset_dir)
  python run_training.py --config recipes/cp_resnet.yaml   another recipe; --print_config shows the options in effect
  python run_training.py --dir_prob=0.4 --logger none      another option, no logging service
  python run_training.py --dataset synthetic --n_epochs 15 generated sounds, needs no download
  python run_training.py --model passt --pretrained auto   another network, from AudioSet's weights
  python run_training.py --resume abcd1234                 goes on where that run stopped

--help lists the options of the chosen network, front end, loss, augmentations and schedule.

Default recipe: F. Schmid et al., "Distilling the Knowledge of Transformers and CNNs with CP-Mobile", DCASE Workshop
2023; the others name their sources.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import os
import shlex
import sys
from contextlib import nullcontext

import torch

from datasets.tau import read_meta
from helpers import cli, parts
from helpers.augment import chain_digests
from helpers.checkpoints.checkpoint import Subject
from helpers.checkpoints.pretrained import start_network
from helpers.complexity import enforce_limits, measure_second, table
from helpers.data import (
    DataConfig,
    check_n_classes,
    data_digests,
    dataset_root,
    load_data,
    load_teacher,
    place_on_device,
    sampling_of,
)
from helpers.evaluate.calibration import fit_temperature
from helpers.loop import Update, check_shapes, evaluate, predict, train_one_epoch
from helpers.machine import open_machine
from helpers.options import add_training_options, build_average, build_optimizer, check_selection
from helpers.runs.folder import begun_run
from helpers.runs.options import parse_run_options
from helpers.runs.run import open_run
from helpers.teachers import bring_feature_teacher


def make_parser(chosen: parts.Parts = parts.STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, prog="run_training.py", usage="python %(prog)s [--option value ...]")
    add_training_options(parser, chosen)
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser, args = parse_run_options(make_parser, sys.argv[1:] if argv is None else argv)
    begun = begun_run(args.project_name, args.resume)
    machine = open_machine(parser, args)
    torch.manual_seed(args.seed)
    with cli.option_errors(parser):
        frontend, loss_fn, rate = parts.build_frontend(args), parts.build_loss(args), parts.build_rate(args)
        data_config = cli.config_from(args, DataConfig)
        parts.check_configs(args)
        check_selection(args)
        if args.compile and hasattr(loss_fn, "feature_teacher"):
            parser.error(f"--compile leaves no features for --loss {args.loss}: leave one of them away")
        if args.dry_run:
            return dry_run(args, parts.build_model(args), frontend)

    with machine.processes.main_first():
        data = load_data(data_config, sampling_of(frontend), args.seed, args.cropped, args.crop_shift)
        # Of a run to resume, the scenes themselves are compared.
        args.n_classes = check_n_classes(None if begun else args.n_classes, data)
        load_teacher(data, args.teacher_logits, loss_fn, args.given)
        bring_feature_teacher(loss_fn, args.project_name)
        with cli.option_errors(parser):
            augment = parts.build_augment(args, data, frontend, loss_fn).to(machine.device)
            model = start_network(args, begun)
    machine.processes.check_clips(len(data.train), len(data.test), args.batch_size)
    place_on_device(data.train, args.data_on_device, machine.device)
    with cli.option_errors(parser):
        if args.enforce_limits:
            enforce_limits(measure_second(model, frontend))
        model, frontend = machine.take(model), frontend.to(machine.device)
        check_shapes(model, frontend, data.store.n_samples, machine.device)
        learns = isinstance(loss_fn, torch.nn.Module)  # the loss has parameters of its own, for this network's features
        if learns:
            loss_fn.attach(model, frontend, data.store.n_samples)
    forward = machine.compile(model) if args.compile else model
    optimizer, average = build_optimizer(args, model, *[loss_fn] * learns), build_average(args, model)
    update = Update(optimizer, machine, args.precision, args.accumulate, rate, args.clip_grad_norm, average)
    digests = data_digests(data) | chain_digests(augment)
    subject = Subject(model, frontend, data, digests, loss=loss_fn if learns else None, average=average)

    with open_run(parser, args, subject, update, begun) as run:
        learner, metrics, logits = machine.share(forward), {}, None

        def score() -> tuple[dict[str, float], torch.Tensor]:
            with nullcontext() if average is None else average.scored():
                return evaluate(forward, frontend, data, machine, after_batch=run.after_step)

        while not run.is_over:
            metrics = train_one_epoch(learner, frontend, augment, loss_fn, run.batches(data.train), update)
            if average is not None:
                average.finish_epoch(run.epoch, args.n_epochs, machine.processes)
            if run.is_scored:
                scores, logits = score()
                metrics |= scores
            run.finish_epoch(metrics)
        if logits is None:  # a finished run, resumed
            metrics, logits = score()
        if data.val is not None:
            with nullcontext() if average is None else average.scored():
                held_out = predict(forward, frontend, data.val, machine, run.after_step)
            run.keep_temperature(fit_temperature(held_out, data.val.scene.cpu()))
        run.report(metrics, logits)
        print(f"\nlast epoch: test accuracy {metrics['test/acc']:.2%}; report and checkpoints are in {run.dir}")
        as_teacher = ["python", "run_teacher_logits.py", "--project_name", args.project_name, "--teachers", run.id]
        print(f"logits to distil from: {shlex.join(as_teacher)}")
    return metrics


def dry_run(args: argparse.Namespace, model: torch.nn.Module, frontend: torch.nn.Module) -> dict[str, float]:
    """Prints the options in effect, and the complexity of the network for a one-second clip.

    Raises:
        LimitError: with --enforce_limits, after the table, for a network over the challenge's limits.
    """
    for name, value in sorted(vars(args).items()):
        print(f"{name:24} {value}")
    report = measure_second(model, frontend)
    print(f"\n{args.model} on {report.input_shape} (channel, mel, time), one second:\n{table(report)}")
    config = cli.config_from(args, DataConfig)
    if args.val_fraction > 0 and (config.dataset_dir or os.environ.get("TAU22_DIR")):
        print(f"\nheld out are whole recordings, told apart by {read_meta(dataset_root(config)).recordings_by}")
    if args.enforce_limits:
        enforce_limits(report)
    return {"n_parameters": report.trained.n_parameters, "macs": report.trained.arithmetic_macs}


if __name__ == "__main__":
    cli.run(main)
