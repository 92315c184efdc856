"""Trains a low-complexity student on TAU22 with labels and, where there are, teacher logits.

  python run_training.py                                   the published recipe on TAU22 (TAU22_DIR or --dataset_dir)
  python run_training.py --dir_prob=0.4 --logger none      another option, no logging service
  python run_training.py --dataset synthetic --n_epochs 15 generated sounds, needs no download
  python run_training.py --resume abcd1234                 goes on where that run stopped

Recipe: F. Schmid et al., "Distilling the Knowledge of Transformers and CNNs with CP-Mobile", DCASE Workshop 2023.
"""

import argparse
import json
import logging
import signal
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
    CheckpointError,
    describe,
    load_checkpoint,
    restore_training,
    save_checkpoint,
    training_state,
)
from helpers.complexity import count_complexity
from helpers.data import DataConfig, load_data, load_responses, load_teacher, place_on_device
from helpers.logger import LOGGERS, RunLogger
from helpers.loop import LoopState, Precision, StoppedError, StopSignal, predict, train_one_epoch
from helpers.losses import kd_loss
from helpers.memory import keep_freed_memory
from helpers.metrics import score
from helpers.report import metric_tables, write_report
from helpers.schedule import WarmupRampdown
from models import FRONTENDS, MODELS

log = logging.getLogger(__name__)

# Published option names of the front end's fields.
FRONTEND_OPTIONS = {
    "sample_rate": "resample_rate",
    "win_length": "window_size",
    "hop_length": "hop_size",
    "f_min": "fmin",
    "f_max": "fmax",
}
# What a resumed run may be given anew: it decides where the run goes on or how far, not what it computes.
FREE_ON_RESUME = {
    "resume", "n_epochs", "num_workers", "cache_path", "dataset_dir", "dirs_path", "teacher_logits", "data_on_device",
    "save_minutes", "logger", "project_name",
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, usage="python run_training.py [--option value ...]")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--project_name", default="DCASE23_Task1", help="project of the logger, and folder of all its runs"
    )
    run.add_argument("--experiment_name", default="CPJKU_cp-mobile_student_training", help="name shown by the logger")
    run.add_argument("--logger", nargs="+", choices=[*LOGGERS], default=["wandb"], help="one or more")
    run.add_argument("--resume", metavar="ID", help="continue this run exactly, with its options")
    run.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    run.add_argument("--dry_run", action="store_true", help="print options and complexity, then stop; needs no data")
    run.add_argument(
        "--save_minutes", type=cli.number(float, 0), default=10.0, help="time between checkpoints within an epoch"
    )
    run.add_argument(
        "--eval_every", type=cli.number(int, 1), default=1, help="epochs between evaluations; the last is always scored"
    )

    cli.add_config_arguments(parser, "data", DataConfig)
    data = parser.add_argument_group("loading")
    data.add_argument(
        "--num_workers", type=cli.number(int, 0), default=1, help="batches read ahead by a thread; 0 reads in turn"
    )
    data.add_argument("--data_on_device", choices=["auto", "yes", "no"], default="auto",
                      help="keep the training part in the device's memory; auto: on a GPU where it fits")  # fmt: skip

    compute = parser.add_argument_group("computation")
    compute.add_argument(
        "--torch_device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ..."
    )
    compute.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the network in training"
    )
    compute.add_argument("--compile", action="store_true", help="torch.compile the network (CUDA graphs on a GPU)")
    compute.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=True,
                         help="memory layout of the network; the faster one on a CPU")  # fmt: skip

    parser.add_argument_group("network").add_argument("--model", choices=[*MODELS], default="cp_mobile", help="student")
    cli.add_config_arguments(parser, "options of cp_mobile", MODELS["cp_mobile"][0])
    parser.set_defaults(n_classes=None)
    cli.add_config_arguments(parser, "front end", FRONTENDS["cp_mel"][0], FRONTEND_OPTIONS)

    augment = parser.add_argument_group("augmentation")
    augment.add_argument(
        "--roll", type=cli.number(int, 0), default=4000, help="largest circular shift of a clip, in samples; 0 is off"
    )
    augment.add_argument(
        "--dir_prob",
        type=cli.number(float, 0, 1),
        default=0.6,
        help="share of clips given a device impulse response; 0 is off",
    )
    augment.add_argument("--dirs_path", help="folder of impulse responses (default: MicIRP's, fetched once)")
    augment.add_argument("--dir_devices", default="auto",
                         help="recording devices to convolve: names joined by commas, all, or auto (a)")  # fmt: skip
    augment.add_argument(
        "--mixstyle_p", type=cli.number(float, 0, 1), default=0.4, help="share of batches with Freq-MixStyle; 0 is off"
    )
    augment.add_argument(
        "--mixstyle_alpha",
        type=cli.number(float, 0, above=True),
        default=0.3,
        help="parameter of its Beta distribution",
    )
    augment.add_argument(
        "--freqm", type=cli.number(int, 0), default=48, help="widest frequency mask plus one, in mel bins; 0 is off"
    )
    augment.add_argument(
        "--timem", type=cli.number(int, 0), default=0, help="widest time mask plus one, in frames; 0 is off"
    )

    kd = parser.add_argument_group("distillation")
    kd.add_argument(
        "--temperature", type=cli.number(float, 0, above=True), default=2.0, help="divides student and teacher logits"
    )
    kd.add_argument(
        "--kd_lambda",
        type=cli.number(float, 0, 1),
        default=0.02,
        help="weight of the labels; the teacher has the rest; 1 is off",
    )
    kd.add_argument(
        "--teacher_logits", metavar="FILE", help="logits of the training clips (default: TAU22's, fetched once)"
    )

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--n_epochs", type=cli.number(int, 1), default=150)
    optim.add_argument("--batch_size", type=cli.number(int, 1), default=256)
    optim.add_argument("--lr", type=cli.number(float, 0, above=True), default=0.0009, help="peak learning rate of Adam")
    optim.add_argument("--weight_decay", type=cli.number(float, 0), default=0.0001, help="added to the gradient")
    cli.add_config_arguments(parser, "schedule (epochs)", WarmupRampdown)
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = make_parser()
    args, given = parse(parser, sys.argv[1:] if argv is None else argv)
    checkpoint = load_checkpoint(last_checkpoint(args)) if args.resume else None
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
        path = last_checkpoint(args)
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
                    "options": vars(args),
                    **training_state(optimizer, scaler, state, device),
                },
            )

        saved_at = time.monotonic()

        def after_step() -> None:
            nonlocal saved_at
            if stop.number is None and time.monotonic() - saved_at < 60 * args.save_minutes:
                return
            state.check_finite(optimizer.param_groups[0]["lr"])
            save()
            saved_at = time.monotonic()
            if stop.number is not None:
                raise StoppedError(
                    f"stopped by {signal.Signals(stop.number).name} in epoch {state.epoch} after {state.step} steps, "
                    "all saved; resume with: "
                    f"python run_training.py --project_name {args.project_name} --resume {logger.id}",
                    exit_status=128 + stop.number,
                )

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
                forward, frontend, augment, loss_fn, loader, optimizer, scaler, precision, state, after_step, len(order)
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
            saved_at = time.monotonic()

        logits = predict(forward, frontend, data.test, args.batch_size, device, args.num_workers)
        metrics |= {f"test/{key}": value for key, value in score(data.test, logits, data.groups).items()}
        print(metric_tables(metrics))
        note = SYNTHETIC_NOTICE if args.dataset == "synthetic" else ""
        predictions, targets = logits.argmax(dim=1).numpy(), data.test.scene.cpu().numpy()
        write_report(logger.dir, predictions, targets, data.meta.scenes, note=note)
        print(f"\nlast epoch: test accuracy {metrics['test/acc']:.2%}; report and checkpoints are in {logger.dir}")
    return metrics


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """Parsed options and the names of those given explicitly; a resumed run takes its other options from its folder."""
    args, given = parser.parse_args(argv), cli.given_options(parser, argv)
    if args.resume:
        path = Path(args.project_name) / args.resume / "options.json"
        if not path.is_file():
            known = sorted(found.parent.name for found in Path(args.project_name).glob("*/options.json"))
            raise CheckpointError(f"no run {args.resume} in {args.project_name}; there is {', '.join(known) or 'none'}")
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}): start the run again") from error
        changed = {name for name in given - FREE_ON_RESUME if getattr(args, name) != saved.get(name)}
        if changed:
            parser.error(f"{', '.join(f'--{name}' for name in sorted(changed))} cannot change when a run is resumed")
        parser.set_defaults(**{name: value for name, value in saved.items() if name in vars(args)})
        args = parser.parse_args(argv)
        given |= {name for name in ("kd_lambda", "teacher_logits") if name in saved.get("given", ())}
    args.given = sorted(given)
    return args, given


def last_checkpoint(args: argparse.Namespace) -> Path:
    path = Path(args.project_name) / args.resume / "checkpoints" / "last.pt"
    if not path.is_file():
        raise CheckpointError(
            f"run {args.resume} has no {path}: it stopped before its first checkpoint, start it again"
        )
    return path


def dry_run(args: argparse.Namespace, model: torch.nn.Module, frontend: torch.nn.Module) -> dict[str, float]:
    """Prints the options in effect, and the complexity of the network for a one-second clip."""
    for name, value in sorted(vars(args).items()):
        print(f"{name:24} {value}")
    device = next(frontend.buffers()).device
    log_mel = frontend.eval()(torch.zeros(1, args.resample_rate, device=device))
    complexity = count_complexity(model, tuple(log_mel.shape[1:]))
    print(f"{args.model} on {tuple(log_mel.shape[1:])} (channel, mel, time): {complexity}")
    return {"n_parameters": complexity.n_parameters, "macs": complexity.macs}


def epoch_line(epoch: int, metrics: dict[str, float]) -> str:
    line = (
        f"epoch {epoch}: loss {metrics['train/loss']:.4f}, lr {metrics['train/lr']:.2e}, "
        f"{metrics['train/clips_per_second']:.0f} clips/s"
    )
    for part in ("val", "test"):
        if f"{part}/acc" in metrics:
            groups = [
                f"{g} {metrics[key]:.1%}" for g in ("real", "seen", "unseen") if (key := f"{part}/acc/{g}") in metrics
            ]
            line += f"; {part} accuracy {metrics[f'{part}/acc']:.1%} ({', '.join(groups)})"
    return line


if __name__ == "__main__":
    cli.run(main)
