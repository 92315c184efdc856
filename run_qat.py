"""Takes a trained student to 8 bits: fine-tunes it with fake quantization, scores it, writes it for the target.

  python run_qat.py --wandb_id=<id>                       a run of run_training.py, or the published c0a7nzin
  python run_qat.py --checkpoint best.pt --n_epochs 5     any checkpoint
  python run_qat.py --wandb_id=<id> --ptq                 no training: ranges from 1,024 training clips
  python run_qat.py --wandb_id=<id> --precision fp16      half precision, which needs no training either
  python run_qat.py --resume abcd1234                     goes on where that run stopped

Network and front end come from the checkpoint. Every evaluation scores the integer network (`test/...`) and the same
weights in float32 (`fp32/test/...`); `source/test/...` is the checkpoint as it came. The run ends with
checkpoints/last.pt, which run_export.py takes further, and the network for the target as an ONNX file.

Published recipe: F. Schmid et al., DCASE Workshop 2023; what rounds where: models/layers/.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from datasets.waveforms import batches, epoch_order
from helpers import cli, parts
from helpers.augment import chain_digests
from helpers.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    LoadedModel,
    Subject,
    check_scenes,
    load_model,
)
from helpers.checkpoints.stated import add_stated_options, believe
from helpers.data import DataConfig, data_digests, load_data, load_teacher, place_on_device, sampling_of
from helpers.export.files import write_onnx
from helpers.loop import Update, evaluate, train_one_epoch
from helpers.machine import open_machine
from helpers.options import (
    add_compute_options,
    add_training_data_options,
    add_optimisation_options,
    add_run_options,
    build_optimizer,
)
from helpers.quantization import calibrate, for_target, freeze, prepare, rounding_off
from helpers.runs.folder import last_checkpoint, source_checkpoint
from helpers.runs.options import parse_run_options
from helpers.runs.run import Run, open_run
from models.layers.core import QuantConfig


def make_parser(chosen: parts.Parts = parts.STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, prog="run_qat.py", usage="python %(prog)s --wandb_id ID | --checkpoint PATH [options]")
    source = parser.add_argument_group("what to quantize")
    source.add_argument("--wandb_id", metavar="ID", help="run of this project; its checkpoint is found by itself")
    source.add_argument(
        "--checkpoint", metavar="PATH", help="instead of a run: a checkpoint of ours or a published one"
    )
    add_run_options(parser)
    add_training_data_options(parser)
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
    parts.add_augmentation_options(parser, chosen)
    parts.add_loss_options(parser, chosen)
    add_optimisation_options(parser)
    parts.add_schedule_options(parser, chosen)
    add_stated_options(parser, chosen)  # for command lines of the published script
    parser.set_defaults(
        experiment_name="CPJKU_QAT", n_epochs=20, lr=5e-5, warm_up_len=0, ramp_down_start=1, ramp_down_len=16,
        last_lr_value=0.1,
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser, args = parse_run_options(make_parser, sys.argv[1:] if argv is None else argv, changeable=["lr"])
    torch.manual_seed(args.seed)
    trains = args.precision == "int8" and args.ptq is None
    with cli.option_errors(parser):
        loss_fn, rate = parts.build_loss(args), parts.build_rate(args)
        quant_config, data_config = cli.config_from(args, QuantConfig), cli.config_from(args, DataConfig)
        parts.augment_configs(args)
        if hasattr(loss_fn, "feature_teacher"):
            parser.error(f"--loss {args.loss} is for run_training.py: in 8 bits a network is distilled by its logits")
    if args.ptq is not None and args.precision == "fp16":
        parser.error("--ptq chooses ranges of 8-bit integers, half precision has none: leave one of them away")
    if trains and args.freeze_params_epochs > args.n_epochs:
        parser.error(f"--freeze_params_epochs {args.freeze_params_epochs} is more than --n_epochs {args.n_epochs}")
    path, source = find_source(parser, args)

    machine = open_machine(parser, args)
    frontend = source.frontend.to(machine.device)
    with machine.processes.main_first():
        data = load_data(data_config, sampling_of(frontend), args.seed, args.cropped, args.crop_shift)
        check_scenes(path, source, data.meta, "take another checkpoint")
        augment = torch.nn.ModuleDict()
        if trains:
            load_teacher(data, args.teacher_logits, loss_fn, args.given)
            with cli.option_errors(parser):
                augment = parts.build_augment(args, data, frontend, loss_fn).to(machine.device)
    machine.processes.check_clips(len(data.train), len(data.test), args.batch_size)
    if trains:
        place_on_device(data.train, args.data_on_device, machine.device)
    order = epoch_order(len(data.train), args.seed, 0)[: args.calibration_clips]

    def calibration_batches() -> Iterator[Tensor]:
        for batch in batches(data.train, order, machine.batch_size, machine.device, n_ahead=machine.n_ahead):
            yield frontend.eval()(batch.waveform)

    begun = Checkpoint(path, source.content) if args.resume else None
    model = machine.take(source.model)
    if begun is not None:
        source_scores = begun.content["source_scores"]
    else:
        source_scores, _ = evaluate(model, frontend, data, machine, "source/")
        if args.precision == "int8":
            model = prepare(model, quant_config, next(calibration_batches())[:1])
            calibrate(model, calibration_batches, args.ptq or "mse", args.percentile)
        else:
            model = model.half()
    update = Update(build_optimizer(args, model), machine, rate=rate, max_norm=args.clip_grad_norm)
    more = {
        "precision": args.precision,
        "quantization": asdict(quant_config) if args.precision == "int8" else None,
        "source_scores": source_scores,
    }
    subject = Subject(model, frontend, data, data_digests(data) | chain_digests(augment), more)

    def score_target(run: Run) -> tuple[dict[str, float], Tensor]:
        """Scores of the network as the target computes it and of its weights in float32, and the former's logits."""
        target = for_target(model, args.precision)
        metrics, logits = evaluate(target, frontend, data, machine, after_batch=run.after_step)
        if args.precision == "int8":
            with rounding_off(model):
                metrics |= evaluate(model, frontend, data, machine, "fp32/", run.after_step)[0]
        return metrics, logits

    with open_run(parser, args, subject, update, begun) as run:
        learner, metrics, logits = machine.share(model) if trains else model, {}, None
        while trains and run.epoch < args.n_epochs:
            n_frozen = run.epoch - (args.n_epochs - args.freeze_params_epochs)  # epochs since ranges froze
            if n_frozen >= 0:
                freeze(model)
            if n_frozen <= 0 and update.state.step == 0 and run.epoch > 0:
                calibrate(model, calibration_batches)  # the weights have moved
            metrics = train_one_epoch(learner, frontend, augment, loss_fn, run.batches(data.train), update)
            if run.is_scored:
                scores, logits = score_target(run)
                metrics |= scores
            run.finish_epoch(metrics | (source_scores if run.epoch == 0 else {}))
        if logits is None:  # nothing to train, or a finished run, resumed
            metrics, logits = score_target(run)
        metrics |= source_scores
        if not trains and run.epoch == 0:
            run.finish_epoch(metrics)
        run.report(metrics, logits)
        if machine.processes.is_main:
            target = for_target(model, args.precision).cpu()
            file = write_onnx(
                target, frontend.cpu(), data.meta.scenes, data.store.n_samples, args.precision, False,
                run.dir / f"network_{args.precision}.onnx",
            )  # fmt: skip
            print(f"\n{summary(metrics, args.precision)}\n{file}: {file.stat().st_size:,} bytes")
            last = shlex.quote(str(run.dir / "checkpoints" / "last.pt"))
            print(f"further files and a parity report: python run_export.py --checkpoint {last}")
    return metrics


def find_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Path, LoadedModel]:
    """The checkpoint to quantize, or of the run to resume.

    Raises:
        CheckpointError: for one that is quantized already.
    """
    if args.resume:
        path = last_checkpoint(args.project_name, args.resume)
        return path, load_model(path)
    path, published = source_checkpoint(args.project_name, args.wandb_id, args.checkpoint)
    source = load_model(path, published)
    if source.precision != "fp32":
        raise CheckpointError(
            f"{path} is {source.precision} already; only fp32 networks are quantized: take the run it came from"
        )
    return path, believe(parser, args, source, path)


def summary(metrics: dict[str, float], precision: str) -> str:
    """The accuracies side by side."""
    lines = [f"test accuracy, {precision}: {metrics['test/acc']:.2%}"]
    if "fp32/test/acc" in metrics:
        lines.append(f"the same weights in fp32: {metrics['fp32/test/acc']:.2%}")
    lines.append(f"the checkpoint as it came: {metrics['source/test/acc']:.2%}")
    return "; ".join(lines)


if __name__ == "__main__":
    cli.run(main)
