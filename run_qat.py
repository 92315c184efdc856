"""Takes a trained student to 8 bits: fine-tunes it with fake quantization, scores it, writes it for the target.

  python run_qat.py --wandb_id=<id>                       a run of run_training.py, or the published c0a7nzin
  python run_qat.py --checkpoint best.pt --n_epochs 5     any checkpoint
  python run_qat.py --wandb_id=<id> --ptq                 no training: ranges from 1,024 training clips
  python run_qat.py --wandb_id=<id> --precision fp16      half precision, which needs no training either
  python run_qat.py --resume abcd1234                     goes on where that run stopped

Network and front end come from the checkpoint. Every evaluation scores the integer network (`test/...`) and the same
weights in float32 (`fp32/test/...`); `source/test/...` is the checkpoint as it came. The run ends with
checkpoints/last.pt, which run_export.py takes further, and the network for the target as an ONNX file.

Published recipe: F. Schmid et al., DCASE Workshop 2023; what rounds where: models/quantized.py.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from datasets.synthetic import SYNTHETIC_NOTICE
from datasets.waveforms import Batch, batches, epoch_order
from helpers import cli
from helpers.augment import AugmentConfig
from helpers.checkpoints.checkpoint import (
    CheckpointError,
    LoadedModel,
    describe_run,
    load_model,
    restore_training,
    save_checkpoint,
    training_state,
)
from helpers.data import DataConfig, data_digests, load_augment, load_data, load_teacher, place_on_device
from helpers.distributed import join_processes
from helpers.export.files import write_onnx
from helpers.loop import LoopState, Precision, StopSignal, Update, epoch_batches, evaluate, predict, train_one_epoch
from helpers.losses import kd_loss
from helpers.memory import keep_freed_memory
from helpers.options import (
    add_compute_options,
    add_data_options,
    add_distillation_options,
    add_optimisation_options,
    add_run_options,
)
from helpers.quantization import calibrate, for_target, freeze, prepare, rounding_off
from helpers.runs.run import (
    Autosave,
    check_data,
    final_report,
    last_checkpoint,
    open_run,
    parse_options,
    resume_command,
    source_checkpoint,
)
from helpers.schedule import WarmupRampdown
from helpers.checkpoints.stated import add_stated_options, believe
from models.quantized import QuantConfig

log = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, prog="run_qat.py", usage="python %(prog)s --wandb_id ID | --checkpoint PATH [options]")
    source = parser.add_argument_group("what to quantize")
    source.add_argument("--wandb_id", metavar="ID", help="run of this project; its checkpoint is found by itself")
    source.add_argument(
        "--checkpoint", metavar="PATH", help="instead of a run: a checkpoint of ours or a published one"
    )
    add_run_options(parser)
    add_data_options(parser)
    add_compute_options(parser)

    quant = parser.add_argument_group("quantization")
    quant.add_argument("--precision", choices=["int8", "fp16"], default="int8", help="of the network on the target")
    quant.add_argument("--ptq", nargs="?", choices=["mse", "percentile", "minmax"], const="mse",
                       help="do not train: choose ranges by least squared error, percentile or extremes")  # fmt: skip
    quant.add_argument("--percentile", type=cli.number(float, 50, 100), default=99.99,
                       help="share of the values that --ptq percentile keeps in range, in percent")  # fmt: skip
    quant.add_argument("--calibration_clips", type=cli.number(int, 1), default=1024,
                       help="training clips that activation ranges come from, anew for every epoch")  # fmt: skip
    quant.add_argument("--freeze_params_epochs", type=cli.number(int, 0), default=4,
                       help="last epochs in which ranges and batch-norm statistics stay fixed")  # fmt: skip
    cli.add_config_arguments(parser, "8-bit arithmetic", QuantConfig)
    cli.add_config_arguments(parser, "augmentation", AugmentConfig)
    add_distillation_options(parser)
    add_optimisation_options(parser)

    add_stated_options(parser)  # for command lines of the published script
    parser.set_defaults(
        experiment_name="CPJKU_QAT", n_epochs=20, lr=5e-5, warm_up_len=0, ramp_down_start=1, ramp_down_len=16,
        last_lr_value=0.1,
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = make_parser()
    args, given = parse_options(parser, sys.argv[1:] if argv is None else argv, changeable=["lr"])
    device = cli.torch_device(parser, args.torch_device)
    torch.manual_seed(args.seed)
    if device.type == "cpu":
        keep_freed_memory()
    trains = args.precision == "int8" and args.ptq is None
    with cli.option_errors(parser):
        schedule = cli.config_from(args, WarmupRampdown)
        quant_config = cli.config_from(args, QuantConfig)
        data_config = cli.config_from(args, DataConfig)
        augment_config = cli.config_from(args, AugmentConfig)
    if args.ptq is not None and args.precision == "fp16":
        parser.error("--ptq chooses ranges of 8-bit integers, half precision has none: leave one of them away")
    if trains and args.freeze_params_epochs > args.n_epochs:
        parser.error(f"--freeze_params_epochs {args.freeze_params_epochs} is more than --n_epochs {args.n_epochs}")

    path = last_checkpoint(args.project_name, args.resume) if args.resume else None
    path = path or source_checkpoint(args.project_name, args.wandb_id, args.checkpoint)
    source = load_model(path)
    check_source(args, source, path)
    source = source if args.resume else believe(parser, args, source, path)
    frontend = source.frontend.to(device)
    processes = join_processes(device)
    with processes.main_first():
        data = load_data(data_config, frontend.config.sample_rate, args.seed)
        if source.scenes != tuple(data.meta.scenes):
            raise CheckpointError(
                f"{path} knows the scenes {', '.join(source.scenes) or 'of no known data set'}; "
                f"{data.meta.root} has {', '.join(data.meta.scenes)}"
            )
        if trains:
            demanded = bool({"kd_lambda", "teacher_logits"} & given)
            has_teacher = load_teacher(data, args.kd_lambda, args.teacher_logits, demanded)
            temperature, mask_value = args.temperature if has_teacher else None, type(frontend).mask_value
            with cli.option_errors(parser):
                augment = load_augment(augment_config, data, data_config, mask_value, temperature).to(device)
        digests = data_digests(data, data_config, augment_config if trains else None)
        if args.resume:
            check_data(path, source.content, digests, args.resume_anyway)
    processes.check_clips(len(data.train), len(data.test), args.batch_size)
    if trains:
        place_on_device(data.train, args.data_on_device, device)

    def calibration_batches() -> Iterator[Tensor]:
        order = epoch_order(len(data.train), args.seed, 0)[: args.calibration_clips]
        for batch in batches(data.train, order, args.batch_size, device, n_ahead=args.num_workers):
            yield frontend.eval()(batch.waveform)

    def scores(network: torch.nn.Module, prefix: str = "", after_batch: Autosave | None = None) -> dict[str, float]:
        return evaluate(
            network, frontend, data, args.batch_size, device, args.num_workers, processes, prefix, after_batch
        )

    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    source.model.to(device, memory_format=memory_format)
    model = source.model
    if args.resume:
        source_scores = source.content["source_scores"]
    else:
        source_scores = scores(source.model, "source/")
        if args.precision == "int8":
            model = prepare(model, quant_config)
            calibrate(model, calibration_batches, args.ptq or "mse", args.percentile)
        else:
            model = model.half()
    state, precision = LoopState(), Precision("fp32", device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=trains)
    update = Update(optimizer, precision.scaler(), precision, args.batch_size, processes)
    processes.seed(args.seed)
    if args.resume:
        restore_training(path, source.content, data.meta.scenes, model, update, state, device)
    forward = processes.wrap(model, device) if trains else model

    def loss_fn(logits: Tensor, batch: Batch):
        return kd_loss(logits, batch.target, batch.teacher_logits, args.kd_lambda, args.temperature)

    run = open_run(
        processes, args.project_name, args.resume or args.run_id, vars(args), args.logger, args.experiment_name,
        resume_epoch=state.epoch if args.resume else None,
    )  # fmt: skip
    with run as logger, StopSignal() as stop:
        log.info("run %s in %s: %s of %s", logger.id, logger.dir, args.precision, path)

        def save(name: str) -> None:
            training = training_state(update, state, device)
            if processes.is_main:
                content = describe_run(model, frontend, data.meta, data.store.n_samples, vars(args), digests)
                quantization = {
                    "precision": args.precision,
                    "quantization": asdict(quant_config) if args.precision == "int8" else None,
                    "source_scores": source_scores,
                }
                save_checkpoint(logger.checkpoint_dir / name, content | quantization | training)

        def target_scores() -> dict[str, float]:
            """Scores of the network as the target computes it, and of its weights in float32."""
            metrics = scores(for_target(model, args.precision), after_batch=autosave)
            if args.precision == "int8":
                with rounding_off(model):
                    metrics |= scores(model, "fp32/", autosave)
            return metrics

        resume = resume_command("run_qat.py", args.project_name, logger.id)
        autosave = Autosave(save, args.save_minutes, stop, state, update, resume)
        if not args.resume:
            save("last.pt")  # from here on a killed run can be resumed
        metrics: dict[str, float] = {}
        while trains and state.epoch < args.n_epochs:
            update.set_lr(args.lr * schedule.factor(state.epoch))
            n_frozen = state.epoch - (args.n_epochs - args.freeze_params_epochs)  # epochs since ranges froze
            if n_frozen >= 0:
                freeze(model)
            if n_frozen <= 0 and state.step == 0 and state.epoch > 0:
                calibrate(model, calibration_batches)  # the weights have moved
            loader = epoch_batches(data.train, update, state, args.seed, device, args.num_workers)
            n_clips = len(data.train)
            metrics = train_one_epoch(forward, frontend, augment, loss_fn, loader, update, state, autosave, n_clips)
            if state.epoch + 1 == args.n_epochs or (state.epoch + 1) % args.eval_every == 0:
                metrics |= target_scores()
            autosave.finish_epoch(metrics | (source_scores if state.epoch == 0 else {}), logger)

        metrics |= target_scores() if "test/acc" not in metrics else {}
        metrics |= source_scores
        if not trains and state.epoch == 0:
            logger.write(0, metrics)
            state.finish_epoch()
            save("last.pt")
        target = for_target(model, args.precision)
        logits = predict(target, frontend, data.test, args.batch_size, device, args.num_workers, processes, autosave)
        if processes.is_main:
            note = SYNTHETIC_NOTICE if args.dataset == "synthetic" else ""
            print(final_report(logger.dir, metrics, logits, data.test, note))
            file = write_onnx(
                target.cpu(), frontend.cpu(), data.meta.scenes, data.store.n_samples, args.precision, False,
                logger.dir / f"network_{args.precision}.onnx",
            )  # fmt: skip
            print(f"\n{summary(metrics, args.precision)}\n{file}: {file.stat().st_size:,} bytes")
            last = shlex.quote(str(logger.checkpoint_dir / "last.pt"))
            print(f"further files and a parity report: python run_export.py --checkpoint {last}")
    return metrics


def check_source(args: argparse.Namespace, source: LoadedModel, path: Path) -> None:
    """Refuses a checkpoint that is quantized already."""
    if not args.resume and source.precision != "fp32":
        raise CheckpointError(
            f"{path} is {source.precision} already; only fp32 networks are quantized: take the run it came from"
        )


def summary(metrics: dict[str, float], precision: str) -> str:
    """The accuracies side by side."""
    lines = [f"test accuracy, {precision}: {metrics['test/acc']:.2%}"]
    if "fp32/test/acc" in metrics:
        lines.append(f"the same weights in fp32: {metrics['fp32/test/acc']:.2%}")
    lines.append(f"the checkpoint as it came: {metrics['source/test/acc']:.2%}")
    return "; ".join(lines)


if __name__ == "__main__":
    cli.run(main)
