"""Trains or fine-tunes a teacher: CP-ResNet from scratch, PaSST and BEATs from weights pre-trained on AudioSet.

  python run_teacher_training.py --teacher cp_resnet                      the published recipe on TAU22
  python run_teacher_training.py --teacher passt --cropped                random windows of the 10-second recordings
  python run_teacher_training.py --teacher beats --pretrained BEATs.pt    BEATs' authors' checkpoint
  python run_teacher_training.py --teacher passt --help                   the options and defaults of that teacher
  python run_teacher_training.py --resume abcd1234                        goes on where that run stopped

run_teacher_logits.py turns the runs into the file that run_training.py distils from.

Recipes: F. Schmid et al., DCASE Workshop 2023 (CP-ResNet, PaSST); Y. Cai et al., DCASE Task 1 2024,
https://github.com/yqcai888/easy_dcase_task1 (BEATs).
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.cache import open_joined_store
from datasets.crops import CroppedClips
from datasets.synthetic import SYNTHETIC_NOTICE
from datasets.waveforms import Batch
from helpers import cli
from helpers.augment import AugmentConfig
from helpers.checkpoints.checkpoint import (
    FORMAT,
    CheckpointError,
    describe_run,
    load_checkpoint,
    load_file,
    restore_training,
    save_checkpoint,
    training_state,
)
from helpers.data import (
    DataConfig,
    check_n_classes,
    data_digests,
    load_augment,
    load_data,
    load_teacher,
    place_on_device,
)
from helpers.distributed import join_processes, local_rank
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
from helpers.checkpoints.foreign import recognise
from helpers.fetch.resources import passt_file
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
from models.beats_checkpoint import read_checkpoint
from models.published import FRONTEND_OF

log = logging.getLogger(__name__)

BEATS_SOURCE = (
    "the links of BEATs' authors are dead (https://github.com/microsoft/unilm/issues/1671); copies of "
    "BEATs_iter3_plus_AS2M.pt and BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt are found by name on Hugging Face"
)
# Where a recipe differs from the student's.
RECIPES = {
    "cp_resnet": {
        "experiment_name": "CPJKU_cp-resnet_teacher_training", "pretrained": "none",
        "n_epochs": 150, "batch_size": 256, "lr": 1e-3, "weight_decay": 1e-3,
        "warm_up_len": 15, "ramp_down_start": 50, "ramp_down_len": 85, "last_lr_value": 0.005,
        "roll": 4000, "dir_prob": 0.4, "mixstyle_p": 0.8, "mixstyle_alpha": 0.4, "freqm": 48, "timem": 0,
    },
    "passt": {
        "experiment_name": "CPJKU_passt_teacher_training", "pretrained": "auto",
        "n_epochs": 25, "batch_size": 80, "lr": 1e-5, "weight_decay": 1e-3,
        "warm_up_len": 3, "ramp_down_start": 3, "ramp_down_len": 10, "last_lr_value": 0.01,
        "roll": 10_000, "dir_prob": 0.6, "mixstyle_p": 0.4, "mixstyle_alpha": 0.4, "freqm": 48, "timem": 20,
    },
    "beats": {
        "experiment_name": "beats_finetune", "pretrained": "auto", "optimizer": "adamw", "beta2": 0.98,
        "n_epochs": 30, "batch_size": 128, "lr": 1e-5, "weight_decay": 0.01,
        "warm_up_len": 4, "ramp_down_start": 4, "ramp_down_len": 26, "last_lr_value": 0.005,
        "roll": 0, "dir_prob": 0.6, "mixstyle_p": 0.4, "mixstyle_alpha": 0.4, "freqm": 0, "timem": 0,
        "mask_share": 0.2, "mixup_alpha": 0.3, "mixstyle_axis": "time",
    },
}  # fmt: skip
# Of a network of which only the head learns, --freeze all: the teacher that its authors call SSL*.
FROZEN_RECIPES = {
    "beats": RECIPES["beats"] | {
        "experiment_name": "beats_ssl_star", "optimizer": "adam", "beta2": 0.999,
        "n_epochs": 60, "batch_size": 256, "lr": 1e-3, "weight_decay": 0.0,
        "warm_up_len": 0, "ramp_down_start": 60, "ramp_down_len": 0, "last_lr_value": 1.0,
        "dir_prob": 0.0, "mixstyle_p": 0.0,
    },
}  # fmt: skip


def chosen_recipe(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """What --teacher names, or what the run to resume trains, and its recipe: they decide on the options and defaults.

    A resumed run has its own values for all options of the recipe.
    """
    parser = cli.Parser(add_help=False)
    parser.add_argument("--teacher", choices=[*RECIPES])
    parser.add_argument("--freeze")
    parser.add_argument("--resume")
    parser.add_argument("--project_name", default=add_run_options(cli.Parser()).get_default("project_name"))
    args, _ = parser.parse_known_args(argv)
    if args.teacher is None and args.resume is not None:
        try:
            saved = json.loads((Path(args.project_name) / args.resume / "options.json").read_text(encoding="utf-8"))
            args.teacher = saved["teacher"] if saved.get("teacher") in RECIPES else None
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            pass  # `parse_options` says what is wrong with the run; `main`, when it is another script's
    teacher = args.teacher or "cp_resnet"
    return teacher, (FROZEN_RECIPES if args.freeze == "all" else RECIPES).get(teacher, RECIPES[teacher])


def make_parser(teacher: str, recipe: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    parser = cli.Parser(
        __doc__,
        prog="run_teacher_training.py",
        usage="python run_teacher_training.py --teacher NAME [--option value ...]",
    )
    frontend, frontend_options = FRONTEND_OF[teacher]
    network = parser.add_argument_group("network")
    network.add_argument("--teacher", choices=[*RECIPES], default=teacher, help="architecture and its recipe")
    network.add_argument("--pretrained", metavar="PATH",
                         help="weights to start from: a file, none, or auto (those of PaSST's --arch)")  # fmt: skip
    network.add_argument("--freeze", default="none", metavar="N",
                         help="the first N transformer layers, and all before them, stay as they are; "
                              "all: only the head learns, for which BEATs has a recipe of its own")  # fmt: skip
    cli.add_config_arguments(parser, f"options of {teacher}", MODELS[teacher][0])
    cli.add_config_arguments(parser, "front end", FRONTENDS[frontend][0], FRONTEND_OPTIONS)
    add_run_options(parser)
    add_data_options(parser)
    parser.add_argument_group("cropped training").add_argument(
        "--cropped", action=cli.OnOff, help="train on random windows of the joined segments of a recording"
    )
    add_precision_options(add_compute_options(parser))
    cli.add_config_arguments(parser, "augmentation", AugmentConfig)
    add_distillation_options(parser)
    optimisation = add_optimisation_options(parser)
    optimisation.add_argument("--optimizer", choices=["adam", "adamw"], default="adam",
                              help="adamw takes weight decay out of the gradient")  # fmt: skip
    optimisation.add_argument("--beta2", type=cli.number(float, 0, 1), default=0.999, help="of the optimizer")
    frontend_defaults = {FRONTEND_OPTIONS.get(name, name): value for name, value in frontend_options.items()}
    parser.set_defaults(n_classes=None, kd_lambda=1.0, **frontend_defaults, **(recipe or RECIPES[teacher]))
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(*chosen_recipe(argv))
    args, given = parse_options(parser, argv)
    if args.teacher_logits is not None and args.kd_lambda == 1:
        parser.error("--teacher_logits needs a --kd_lambda below 1: the weight of the labels")
    if args.beta2 == 1:
        parser.error("--beta2 must be below 1: the optimizer would keep no mean of squared gradients")
    path = last_checkpoint(args.project_name, args.resume) if args.resume else None
    checkpoint = None if path is None else load_checkpoint(path)
    device = cli.torch_device(parser, args.torch_device)
    precision = Precision(args.precision, device)
    torch.manual_seed(args.seed)
    if device.type == "cpu":
        keep_freed_memory()

    frontend_config, Frontend = FRONTENDS[FRONTEND_OF[args.teacher][0]]
    with cli.option_errors(parser):
        schedule = cli.config_from(args, WarmupRampdown)
        data_config = cli.config_from(args, DataConfig)
        augment_config = cli.config_from(args, AugmentConfig)
        frontend = Frontend(cli.config_from(args, frontend_config, FRONTEND_OPTIONS)).to(device)
        cli.config_from(args, MODELS[args.teacher][0])  # for its checks, before the data are read

    processes = join_processes(device)
    with processes.main_first():
        data = load_data(data_config, args.resample_rate, args.seed)
        # Of a run to resume, `restore_training` compares the scenes themselves.
        args.n_classes = check_n_classes(args.n_classes if checkpoint is None else None, data)
        if args.cropped:
            store = open_joined_store(
                data.meta, data.store, data_config.cache_path, checked=local_rank() not in (None, 0)
            )
            data = replace(data, train=CroppedClips(data.meta, data.train.rows, store))
        has_teacher = load_teacher(data, args.kd_lambda, args.teacher_logits, demanded="kd_lambda" in given)
        with cli.option_errors(parser):
            temperature = args.temperature if has_teacher else None
            augment = load_augment(augment_config, data, data_config, Frontend.mask_value, temperature).to(device)
            model = build_model(args, given, checkpoint)
        digests = data_digests(data, data_config, augment_config)
        if checkpoint is not None:
            check_data(path, checkpoint, digests, args.resume_anyway)
    processes.check_clips(len(data.train), len(data.test), args.batch_size)
    place_on_device(data.train, args.data_on_device, device)
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    with cli.option_errors(parser):
        check_shapes(model, frontend, data.store.n_samples, device)
    compiled = cli.compiled(parser, model, device) if args.compile else model
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer](
        learning, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True
    )
    update = Update(optimizer, precision.scaler(), precision, args.batch_size, processes, args.accumulate)
    state = LoopState()
    processes.seed(args.seed)
    if checkpoint is not None:
        restore_training(path, checkpoint, data.meta.scenes, model, update, state, device)
    # A layer that BEATs skips in a step has no gradient there.
    forward = processes.wrap(compiled, device, some_unused=getattr(args, "encoder_layerdrop", 0) > 0)

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

        resume = resume_command("run_teacher_training.py", args.project_name, logger.id)
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
            words = ["--project_name", args.project_name, "--teachers", logger.id]
            print(f"logits to distil from: {shlex.join(['python', 'run_teacher_logits.py', *words])}")
    return metrics


def build_model(args: argparse.Namespace, given: set[str], checkpoint: Mapping[str, Any] | None) -> nn.Module:
    """The network with its frozen layers: a new one with the weights of --pretrained, or that of a run to resume.

    Weights come with the network that they are for; options that the user gives go before. A run to resume knows its
    network to the last option, also those that the command line has not; its weights are loaded later.

    Raises:
        CheckpointError: when the weights are missing or do not fit.
        ValueError: for layers to freeze that there are not.
    """
    config_class, Model = MODELS[args.teacher]
    part = None
    if checkpoint is not None:
        config = config_class(**checkpoint["model"]["config"])
    else:
        config = cli.config_from(args, config_class)
        if args.pretrained != "none":
            path, part = pretrained_part(args)
            names = {field.name for field in fields(config_class)} & (given | {"n_classes"})
            config = config_class(**(part["config"] | {name: getattr(config, name) for name in names}))
            vars(args).update({name: value for name, value in vars(config).items() if name in vars(args)})
    model = Model(config)
    if part is not None:
        try:
            dropped = model.load_pretrained(part["state"])
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        log.info("weights from %s; not taken: %s", path, ", ".join(dropped) or "none")
    if args.freeze != "none":
        if not hasattr(model, "freeze_encoder"):
            raise ValueError(f"--freeze is for transformers; {args.teacher} learns as a whole")
        if args.freeze != "all" and not re.fullmatch("[0-9]{1,4}", args.freeze):
            raise ValueError(f"--freeze takes a number of layers, all or none, got {args.freeze[:40]}")
        model.freeze_encoder(None if args.freeze == "all" else int(args.freeze))
    return model


def pretrained_part(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The file of --pretrained, and name, config and state of the network in it.

    Raises:
        CheckpointError: when it is missing, foreign, or of another architecture.
    """
    if not hasattr(MODELS[args.teacher][1], "load_pretrained"):
        others = " or ".join(name for name in RECIPES if hasattr(MODELS[name][1], "load_pretrained"))
        raise CheckpointError(
            f"{args.teacher} has no pre-trained weights: leave --pretrained away, or choose --teacher {others}"
        )
    if args.pretrained != "auto":
        path = Path(args.pretrained)
    elif args.teacher == "passt":
        path = passt_file(args.arch)
    else:
        raise CheckpointError(
            f"--pretrained must name a file of weights for {args.teacher}, or none for random ones; {BEATS_SOURCE}"
        )
    content = load_file(path)
    try:
        if content.get("format") == FORMAT:
            part = content["model"]
        elif {"cfg", "model"} <= content.keys():  # of BEATs' authors, without a classifier perhaps
            config, state = read_checkpoint(content)
            part = {"name": "beats", "config": asdict(config), "state": state}
        else:
            part = recognise(path, content)["model"]
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if part["name"] != args.teacher:
        raise CheckpointError(f"{path} holds a {part['name']} network, --teacher is {args.teacher}")
    return path, part


if __name__ == "__main__":
    cli.run(main)
