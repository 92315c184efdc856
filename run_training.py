"""Trains a low-complexity student on TAU22 with labels and, where there are, teacher logits.

  python run_training.py                                   the published recipe on TAU22 (TAU22_DIR or --dataset_dir)
  python run_training.py --dir_prob=0.4 --logger none      another option, no logging service
  python run_training.py --dataset synthetic --n_epochs 15 generated sounds, needs no download
  python run_training.py --resume abcd1234                 goes on where that run stopped

Recipe: F. Schmid et al., "Distilling the Knowledge of Transformers and CNNs with CP-Mobile", DCASE Workshop 2023.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from datasets.synthetic import SYNTHETIC_NOTICE
from datasets.tau import DataError
from datasets.waveforms import Batch, batches, epoch_order
from helpers import cli
from helpers.augment import build_augment
from helpers.checkpoint import (
    describe,
    load_checkpoint,
    restore_training,
    save_checkpoint,
    training_state,
)
from helpers.complexity import Report, enforce_limits, measure, table
from helpers.data import DataConfig, load_data, load_responses, load_teacher, place_on_device
from helpers.logger import RunLogger
from helpers.loop import LoopState, Precision, StopSignal, predict, train_one_epoch
from helpers.losses import kd_loss
from helpers.memory import keep_freed_memory
from helpers.metrics import score
from helpers.options import (
    FRONTEND_OPTIONS,
    add_augmentation_options,
    add_compute_options,
    add_data_options,
    add_distillation_options,
    add_optimisation_options,
    add_run_options,
)
from helpers.report import epoch_line, metric_tables, write_report
from helpers.runs import Autosave, last_checkpoint, parse_options
from helpers.schedule import WarmupRampdown
from models import FRONTENDS, MODELS

log = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, usage="python run_training.py [--option value ...]")
    run = add_run_options(parser)
    run.add_argument("--dry_run", action="store_true", help="print options and complexity, then stop; needs no data")
    run.add_argument(
        "--enforce_limits", action="store_true", help="refuse a network over the challenge's limits at int8 (status 2)"
    )
    add_data_options(parser)
    compute = add_compute_options(parser)
    compute.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the network in training"
    )
    compute.add_argument("--compile", action="store_true", help="torch.compile the network (CUDA graphs on a GPU)")
    parser.add_argument_group("network").add_argument(
        "--model", choices=["cp_mobile"], default="cp_mobile", help="student"
    )
    cli.add_config_arguments(parser, "options of cp_mobile", MODELS["cp_mobile"][0])
    parser.set_defaults(n_classes=None)
    cli.add_config_arguments(parser, "front end", FRONTENDS["cp_mel"][0], FRONTEND_OPTIONS)
    add_augmentation_options(parser)
    add_distillation_options(parser)
    add_optimisation_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = make_parser()
    args, given = parse_options(parser, sys.argv[1:] if argv is None else argv)
    path = last_checkpoint(args.project_name, args.resume) if args.resume else None
    checkpoint = None if path is None else load_checkpoint(path)
    device = cli.torch_device(parser, args.torch_device)
    precision = Precision(args.precision, device)
    torch.manual_seed(args.seed)
    if device.type == "cpu":
        keep_freed_memory()

    frontend_config, Frontend = FRONTENDS["cp_mel"]
    model_config, Model = MODELS[args.model]
    with cli.option_errors(parser):
        schedule = cli.config_from(args, WarmupRampdown)
        data_config = cli.config_from(args, DataConfig)
        frontend = Frontend(cli.config_from(args, frontend_config, FRONTEND_OPTIONS)).to(device)
        if args.dry_run:
            return dry_run(args, Model(cli.config_from(args, model_config)), frontend)

    data = load_data(data_config, args.resample_rate, args.seed)
    n_classes = len(data.meta.scenes)
    if args.n_classes not in (None, n_classes):
        raise DataError(
            f"--n_classes {args.n_classes}, but {data.meta.root} has {n_classes} scenes: leave the option away"
        )
    args.n_classes = n_classes
    responses, dir_devices = load_responses(data, data_config, args.dirs_path, args.dir_prob, args.dir_devices)
    load_teacher(data, args.kd_lambda, args.teacher_logits, demanded=bool({"kd_lambda", "teacher_logits"} & given))
    place_on_device(data.train, args.data_on_device, device)
    with cli.option_errors(parser):
        model = Model(cli.config_from(args, model_config))
        if args.enforce_limits:
            enforce_limits(complexity(args, model, frontend))
        augment = build_augment(
            responses, data.store.n_samples, args.dir_prob, dir_devices, args.roll, args.freqm, args.timem,
            Frontend.mask_value, args.mixstyle_p, args.mixstyle_alpha,
        ).to(device)  # fmt: skip
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    forward = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None) if args.compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    scaler = precision.scaler()
    state = LoopState()
    if checkpoint is not None:
        restore_training(path, checkpoint, data.meta.scenes, model, optimizer, scaler, state, device)

    def loss_fn(logits: Tensor, batch: Batch):
        return kd_loss(logits, batch.target, batch.teacher_logits, args.kd_lambda, args.temperature)

    logger = RunLogger(
        args.project_name, args.resume, vars(args), args.logger, args.experiment_name,
        resume_epoch=None if checkpoint is None else state.epoch,
    )  # fmt: skip
    with logger, StopSignal() as stop:
        log.info("run %s in %s: %d training and %d test clips", logger.id, logger.dir, len(data.train), len(data.test))
        last = logger.checkpoint_dir / "last.pt"

        def save(path: Path = last) -> None:
            save_checkpoint(
                path,
                {
                    "model": describe(model, MODELS),
                    "frontend": describe(frontend, FRONTENDS),
                    "scenes": list(data.meta.scenes),
                    "recording_devices": list(data.meta.recording_devices),
                    "clip_samples": data.store.n_samples,
                    "options": vars(args),
                    **training_state(optimizer, scaler, state, device),
                },
            )

        resume = f"python run_training.py --project_name {args.project_name} --resume {logger.id}"
        autosave = Autosave(save, args.save_minutes, stop, state, optimizer, resume)
        if checkpoint is None:
            save()  # from here on a killed run can be resumed
        metrics: dict[str, float] = {}
        while state.epoch < args.n_epochs:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule.factor(state.epoch)
            started, n_before = time.monotonic(), state.n_clips
            order = epoch_order(len(data.train), args.seed, state.epoch)
            loader = batches(data.train, order, args.batch_size, device, start=state.step, n_ahead=args.num_workers)
            losses = train_one_epoch(
                forward, frontend, augment, loss_fn, loader, optimizer, scaler, precision, state, autosave, len(order)
            )
            seconds = time.monotonic() - started
            metrics = {f"train/{name}": value for name, value in losses.items()}
            metrics |= {"train/lr": optimizer.param_groups[0]["lr"], "train/seconds": seconds}
            metrics["train/clips_per_second"] = (state.n_clips - n_before) / seconds

            is_last = state.epoch + 1 == args.n_epochs
            if is_last or (state.epoch + 1) % args.eval_every == 0:
                for name, clips in (("val", data.val), ("test", data.test)):
                    if clips is not None:
                        logits = predict(forward, frontend, clips, args.batch_size, device, args.num_workers)
                        metrics |= {f"{name}/{key}": value for key, value in score(clips, logits, data.groups).items()}
            log.info(epoch_line(state.epoch, metrics))
            logger.write(state.epoch, metrics)
            better = metrics.get("val/acc", float("-inf")) > state.best
            if better:
                state.best = metrics["val/acc"]
            state.finish_epoch()
            if better:
                save(logger.checkpoint_dir / "best.pt")
            save()
            autosave.saved_at = time.monotonic()

        logits = predict(forward, frontend, data.test, args.batch_size, device, args.num_workers)
        metrics |= {f"test/{key}": value for key, value in score(data.test, logits, data.groups).items()}
        print(metric_tables(metrics))
        note = SYNTHETIC_NOTICE if args.dataset == "synthetic" else ""
        predictions, targets = logits.argmax(dim=1).numpy(), data.test.scene.cpu().numpy()
        write_report(logger.dir, predictions, targets, data.meta.scenes, note=note)
        print(f"\nlast epoch: test accuracy {metrics['test/acc']:.2%}; report and checkpoints are in {logger.dir}")
    return metrics


def dry_run(args: argparse.Namespace, model: torch.nn.Module, frontend: torch.nn.Module) -> dict[str, float]:
    """Prints the options in effect, and the complexity of the network for a one-second clip.

    Raises:
        LimitError: with --enforce_limits, after the table, for a network over the challenge's limits.
    """
    for name, value in sorted(vars(args).items()):
        print(f"{name:24} {value}")
    report = complexity(args, model, frontend)
    print(f"\n{args.model} on {report.input_shape} (channel, mel, time), one second:\n{table(report)}")
    if args.enforce_limits:
        enforce_limits(report)
    return {"n_parameters": report.trained.n_parameters, "macs": report.trained.arithmetic_macs}


def complexity(args: argparse.Namespace, model: torch.nn.Module, frontend: torch.nn.Module) -> Report:
    """Counts the network for a clip of one second, which is what the challenge's limit on MACs is about."""
    device = next(frontend.buffers()).device
    log_mel = frontend.eval()(torch.zeros(1, args.resample_rate, device=device))
    return measure(model, tuple(log_mel.shape[1:]))


if __name__ == "__main__":
    cli.run(main)
