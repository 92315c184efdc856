"""Option groups that scripts share; defaults are those of the student's recipe."""

import argparse

import torch
from torch import nn

from helpers import cli, parts
from helpers.averaging import ExponentialAverage, LastEpochs, WeightAverage
from helpers.data import DataConfig
from helpers.runs.logger import LOGGERS, RUN_ID

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def run_id(text: str) -> str:
    """An option type: the name of a run's folder."""
    if not RUN_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be letters, digits, '.', '_' or '-', got {text!r}")
    return text


def add_run_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    run = parser.add_argument_group("run")
    run.add_argument(
        "--project_name", default="DCASE23_Task1", help="project of the logger, and folder of all its runs"
    )
    run.add_argument("--experiment_name", default="CPJKU_cp-mobile_student_training", help="name shown by the logger")
    run.add_argument("--logger", nargs="+", choices=[*LOGGERS], default=["wandb"], help="one or more")
    run.add_argument("--wandb_checkpoints", action=cli.OnOff, default=True,
                     help="upload the checkpoints of a finished run to W&B, where --wandb_id finds them")  # fmt: skip
    run.add_argument("--run_id", type=run_id, metavar="ID",
                     help="name of the new run's folder (default: eight random characters)")  # fmt: skip
    run.add_argument("--resume", metavar="ID", help="continue this run exactly, with its options")
    run.add_argument("--resume_anyway", action=cli.OnOff,
                     help="go on although the data are not those that the run began with")  # fmt: skip
    run.add_argument("--seed", type=cli.number(int, 0, 2**32 - 1), default=0, help="of weights, order and augmentation")
    run.add_argument(
        "--save_minutes", type=cli.number(float, 0), default=10.0, help="time between checkpoints within an epoch"
    )
    run.add_argument(
        "--eval_every", type=cli.number(int, 1), default=1, help="epochs between evaluations; the last is always scored"
    )
    return run


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    cli.add_config_arguments(parser, "data", DataConfig)
    data = parser.add_argument_group("loading")
    data.add_argument(
        "--num_workers", type=cli.number(int, 0, 256), default=1, help="batches read ahead by a thread; 0 reads in turn"
    )
    data.add_argument("--data_on_device", choices=["auto", "yes", "no"], default="auto",
                      help="keep the training part in the device's memory; auto: on a GPU where it fits")  # fmt: skip
    return data


def add_training_data_options(parser: argparse.ArgumentParser) -> None:
    data = add_data_options(parser)
    data.add_argument(
        "--cropped", action=cli.OnOff, help="train on random windows of the joined segments of a recording"
    )
    data.add_argument("--crop_shift", type=cli.number(float, 0), default=0.0, metavar="SECONDS",
                      help="windows of --cropped are the segments moved back by random multiples of this, around the "
                           "recording, as dragonsearch has it; 0: windows are anywhere")  # fmt: skip


def add_compute_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    compute = parser.add_argument_group("computation")
    compute.add_argument(
        "--torch_device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ..."
    )
    compute.add_argument("--channels_last", action=cli.OnOff, default=True,
                         help="memory layout of the network; the faster one on a CPU")  # fmt: skip
    return compute


def add_precision_options(compute: argparse._ArgumentGroup) -> None:
    compute.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the network in training"
    )
    compute.add_argument("--compile", action=cli.OnOff, help="torch.compile the network (CUDA graphs on a GPU)")
    compute.add_argument("--accumulate", type=cli.number(int, 1), default=1,
                         help="pieces that a batch is computed in, to save memory; a step stays the same")  # fmt: skip


def add_optimisation_options(parser: argparse.ArgumentParser) -> None:
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--n_epochs", type=cli.number(int, 1), default=150)
    optim.add_argument("--batch_size", type=cli.number(int, 1), default=256)
    optim.add_argument("--lr", type=cli.number(float, 0, above=True), default=0.0009, help="peak learning rate")
    optim.add_argument("--weight_decay", type=cli.number(float, 0), default=0.0001, help="Adam adds it to the gradient")
    optim.add_argument("--optimizer", choices=[*OPTIMIZERS], default="adam",
                       help="adamw takes weight decay out of the gradient")  # fmt: skip
    optim.add_argument("--decay_on", choices=["all", "weights"], default="all",
                       help="what weight_decay is for: all parameters, as published, or weights of convolutions and "
                            "matrices alone, not biases and norms")  # fmt: skip
    optim.add_argument("--clip_grad_norm", type=cli.number(float, 0), default=0.0, metavar="NORM",
                       help="longer gradients, of all weights together, are shortened to this; 0 is off")  # fmt: skip
    optim.add_argument("--beta2", type=cli.number(float, 0, 1, below=True), default=0.999, help="of the optimizer")


def add_training_options(parser: argparse.ArgumentParser, chosen: parts.Parts) -> None:
    """All options of run_training.py."""
    run = add_run_options(parser)
    run.add_argument("--dry_run", action=cli.OnOff, help="print options and complexity, then stop; needs no data")
    run.add_argument(
        "--enforce_limits", action=cli.OnOff, help="refuse a network over the challenge's limits at int8 (status 2)"
    )
    network = parts.add_network_options(parser, chosen)
    network.add_argument("--pretrained", metavar="PATH", default="none",
                         help="weights to start from: a published network by name, the id of a run, a file, "
                              "auto (AudioSet's, for transformers) or none; for other scenes the classifier starts "
                              "anew")  # fmt: skip
    network.add_argument("--freeze", default="none", metavar="N",
                         help="the first N transformer layers, and all before them, stay as they are; all: only the "
                              "head learns")  # fmt: skip
    add_training_data_options(parser)
    add_precision_options(add_compute_options(parser))
    parts.add_augmentation_options(parser, chosen)
    parts.add_loss_options(parser, chosen)
    add_optimisation_options(parser)
    add_selection_options(parser)
    parts.add_schedule_options(parser, chosen)


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    kept = parser.add_argument_group("which weights are scored and kept")
    kept.add_argument("--ema_decay", type=cli.number(float, 0, 1, below=True), default=0.0, metavar="SHARE",
                      help="a moving average of the weights, of which this share stays at each step, such as 0.999; 0: "
                           "the weights themselves")  # fmt: skip
    kept.add_argument("--average_last", type=cli.number(int, 0), default=0, metavar="N",
                      help="the mean of the weights after each of the last N epochs; 0 is off")  # fmt: skip
    kept.add_argument("--early_stopping", type=cli.number(int, 0), default=0, metavar="N",
                      help="end after N evaluations without a better accuracy on the recordings that --val_fraction "
                           "holds out; 0 is off")  # fmt: skip


def check_selection(args: argparse.Namespace) -> None:
    """Raises ValueError for options of `add_selection_options` that do not go together."""
    if args.ema_decay and args.average_last:
        raise ValueError("ema_decay and average_last are two averages of the weights: leave one of them away")
    if args.early_stopping and args.val_fraction == 0:
        raise ValueError("early_stopping looks at held-out recordings alone: say how many with --val_fraction")
    if args.early_stopping and args.average_last:
        raise ValueError("average_last must know the last epoch, which early_stopping does not: take ema_decay")


def build_average(args: argparse.Namespace, model: nn.Module) -> WeightAverage | None:
    if args.ema_decay:
        return ExponentialAverage(model, args.ema_decay)
    return LastEpochs(model, args.average_last) if args.average_last else None


def is_weight(name: str, value: nn.Parameter) -> bool:
    """Whether a parameter is a weight of a convolution or a matrix, and no bias, gain of a norm or learned scale."""
    # Gains of norms are called weight too, but have one axis; learned scales of other layers have other names.
    return name.split(".")[-1].startswith("weight") and value.ndim > 1


def build_optimizer(args: argparse.Namespace, *parts: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the weights that learn, of the network and of a loss that has some."""
    learning = [(name, value) for part in parts for name, value in part.named_parameters() if value.requires_grad]
    groups = [{"params": [value for _, value in learning]}]
    if args.decay_on == "weights":
        groups = [
            {"params": [value for name, value in learning if is_weight(name, value)]},
            {"params": [value for name, value in learning if not is_weight(name, value)], "weight_decay": 0.0},
        ]
    return OPTIMIZERS[args.optimizer](
        groups, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True
    )
