"""Trains a low-complexity student on TAU22 with labels and, where there are, teacher logits.

  python run_training.py                                   the published recipe on TAU22 (TAU22_DIR or --dataset_dir)
  python run_training.py --dir_prob=0.4 --logger none      another option, no logging service
  python run_training.py --dataset synthetic --n_epochs 15 generated sounds, needs no download
  python run_training.py --resume abcd1234                 goes on where that run stopped

Recipe: F. Schmid et al., "Distilling the Knowledge of Transformers and CNNs with CP-Mobile", DCASE Workshop 2023.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import logging
import os
import sys

import torch
from torch import Tensor

from datasets.synthetic import SYNTHETIC_NOTICE
from datasets.tau import read_meta
from datasets.waveforms import Batch
from helpers import cli
from helpers.augment import AugmentConfig
from helpers.checkpoints.checkpoint import (
    describe_run,
    load_checkpoint,
    restore_training,
    save_checkpoint,
    training_state,
)
from helpers.complexity import Report, enforce_limits, measure, table
from helpers.data import (
    DataConfig,
    check_n_classes,
    data_digests,
    dataset_root,
    load_augment,
    load_data,
    load_teacher,
    place_on_device,
)
from helpers.distributed import join_processes
from helpers.loop import (
    LoopState,
    Precision,
    StopSignal,
    Update,
    check_shapes,
    epoch_batches,
    evaluate,
    predict,
    train_one_epoch,
)
from helpers.losses import kd_loss
from helpers.memory import keep_freed_memory
from helpers.metrics import score
from helpers.options import (
    FRONTEND_OPTIONS,
    add_compute_options,
    add_data_options,
    add_distillation_options,
    add_optimisation_options,
    add_precision_options,
    add_run_options,
)
from helpers.runs.run import (
    Autosave,
    check_data,
    final_report,
    last_checkpoint,
    open_run,
    parse_options,
    resume_command,
)
from helpers.schedule import WarmupRampdown
from models import FRONTENDS, MODELS

log = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, prog="run_training.py", usage="python %(prog)s [--option value ...]")
    run = add_run_options(parser)
    run.add_argument("--dry_run", action=cli.OnOff, help="print options and complexity, then stop; needs no data")
    run.add_argument(
        "--enforce_limits", action=cli.OnOff, help="refuse a network over the challenge's limits at int8 (status 2)"
    )
    add_data_options(parser)
    add_precision_options(add_compute_options(parser))
    parser.add_argument_group("network").add_argument(
        "--model", choices=["cp_mobile"], default="cp_mobile", help="student"
    )
    cli.add_config_arguments(parser, "options of cp_mobile", MODELS["cp_mobile"][0])
    parser.set_defaults(n_classes=None)
    cli.add_config_arguments(parser, "front end", FRONTENDS["cp_mel"][0], FRONTEND_OPTIONS)
    cli.add_config_arguments(parser, "augmentation", AugmentConfig)
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
        augment_config = cli.config_from(args, AugmentConfig)
        frontend = Frontend(cli.config_from(args, frontend_config, FRONTEND_OPTIONS)).to(device)
        if args.dry_run:
            return dry_run(args, Model(cli.config_from(args, model_config)), frontend)

    processes = join_processes(device)
    with processes.main_first():
        data = load_data(data_config, args.resample_rate, args.seed)
        # Of a run to resume, `restore_training` compares the scenes themselves.
        args.n_classes = check_n_classes(args.n_classes if checkpoint is None else None, data)
        demanded = bool({"kd_lambda", "teacher_logits"} & given)
        has_teacher = load_teacher(data, args.kd_lambda, args.teacher_logits, demanded)
        with cli.option_errors(parser):
            temperature = args.temperature if has_teacher else None
            augment = load_augment(augment_config, data, data_config, Frontend.mask_value, temperature).to(device)
        digests = data_digests(data, data_config, augment_config)
        if checkpoint is not None:
            check_data(path, checkpoint, digests, args.resume_anyway)
    processes.check_clips(len(data.train), len(data.test), args.batch_size)
    place_on_device(data.train, args.data_on_device, device)
    with cli.option_errors(parser):
        model = Model(cli.config_from(args, model_config))
        if args.enforce_limits:
            enforce_limits(complexity(args, model, frontend))
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    with cli.option_errors(parser):
        check_shapes(model, frontend, data.store.n_samples, device)
    compiled = cli.compiled(parser, model, device) if args.compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    update = Update(optimizer, precision.scaler(), precision, args.batch_size, processes, args.accumulate)
    state = LoopState()
    processes.seed(args.seed)
    if checkpoint is not None:
        restore_training(path, checkpoint, data.meta.scenes, model, update, state, device)
    forward = processes.wrap(compiled, device)

    def loss_fn(logits: Tensor, batch: Batch):
        return kd_loss(logits, batch.target, batch.teacher_logits, args.kd_lambda, args.temperature)

    run = open_run(
        processes, args.project_name, args.resume or args.run_id, vars(args), args.logger, args.experiment_name,
        resume_epoch=None if checkpoint is None else state.epoch,
    )  # fmt: skip
    with run as logger, StopSignal() as stop:
        log.info("run %s in %s: %d training and %d test clips", logger.id, logger.dir, len(data.train), len(data.test))

        def save(name: str) -> None:
            training = training_state(update, state, device)
            if processes.is_main:
                content = describe_run(model, frontend, data.meta, data.store.n_samples, vars(args), digests)
                save_checkpoint(logger.checkpoint_dir / name, content | training)

        resume = resume_command("run_training.py", args.project_name, logger.id)
        autosave = Autosave(save, args.save_minutes, stop, state, update, resume)
        if checkpoint is None:
            save("last.pt")  # from here on a killed run can be resumed
        metrics: dict[str, float] = {}
        while state.epoch < args.n_epochs:
            update.set_lr(args.lr * schedule.factor(state.epoch))
            loader = epoch_batches(data.train, update, state, args.seed, device, args.num_workers)
            n_clips = len(data.train)
            metrics = train_one_epoch(forward, frontend, augment, loss_fn, loader, update, state, autosave, n_clips)
            if state.epoch + 1 == args.n_epochs or (state.epoch + 1) % args.eval_every == 0:
                metrics |= evaluate(
                    compiled, frontend, data, args.batch_size, device, args.num_workers, processes, after_batch=autosave
                )
            autosave.finish_epoch(metrics, logger)

        logits = predict(compiled, frontend, data.test, args.batch_size, device, args.num_workers, processes, autosave)
        metrics |= {f"test/{key}": value for key, value in score(data.test, logits, data.groups).items()}
        if processes.is_main:
            note = SYNTHETIC_NOTICE if args.dataset == "synthetic" else ""
            print(final_report(logger.dir, metrics, logits, data.test, note))
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
    data_config = cli.config_from(args, DataConfig)
    if args.val_fraction > 0 and (data_config.dataset_dir or os.environ.get("TAU22_DIR")):
        print(f"\nheld out are whole recordings, told apart by {read_meta(dataset_root(data_config)).recordings_by}")
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
