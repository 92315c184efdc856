"""Searches options: draws them, trains with them, stops what falls behind, and tells what they did.

  python run_search.py --config recipes/cpjku_student.yaml --search space.yaml --val_fraction 0.1 --n_trials 50
  python run_search.py ... --storage postgresql://user@host/name     many machines at once, each with this command

A search space is a YAML file, see helpers/search/space.py: any options of run_training.py, networks, front ends, losses
and chains of augmentations too. Every trial is an ordinary run, judged by training recordings that are held out; the
test part has no say. Options behind --search are those of run_training.py, the same for all trials. What is over the
limits is never trained. A search that was killed goes on with the same command: trials that had begun are resumed.

The folder of the study, <project_name>/<study>/, gets results.csv and search.html. Sampler and pruner are those of
T. Akiba et al., "Optuna", KDD 2019.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from datasets.files import locked, replacing
from helpers import cli, parts
from helpers.complexity import MAX_MACS, MAX_PARAMETER_BYTES, measure_second
from helpers.options import add_training_options
from helpers.parts import STUDENT, Parts, chosen_parts
from helpers.recipes import NOT_KEPT, RecipeError, parse, read_recipe
from helpers.report.text import align
from helpers.runs.folder import last_checkpoint
from helpers.search.page import write_results
from helpers.search.space import SearchError, check_space, draw, fitted, read_space
from helpers.search.study import (
    OPTIONS,
    OVER,
    claiming,
    digest_of,
    finished,
    n_counted,
    next_trial,
    open_study,
)

log = logging.getLogger(__name__)

TRAINING = Path(__file__).resolve().parent / "run_training.py"
POLL_SECONDS = 0.2
MOST_DRAWS = 200  # in a row that are over the limits, or
MOST_FAILURES = 3  # in a row that do not train
PARENT_DIES = 1  # Linux' PR_SET_PDEATHSIG
# Of the search, not of its trials; where trials are kept is the search's affair too.
OWN = {"search", "study", "storage", "n_trials", "objective", "pruner", "n_warmup", "max_bytes", "max_macs", "max_ram"}
# What may differ between machines that share a study: where data are, and what they are computed with.
OF_A_MACHINE = {
    "dataset_dir", "cache_path", "dirs_path", "teacher_logits", "num_workers", "data_on_device", "torch_device",
    "channels_last", "save_minutes", "compile",
}  # fmt: skip
KEPT_HERE = {"project_name", "experiment_name", "logger", *NOT_KEPT}


def training_parser(chosen: Parts = STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__, prog="run_search.py", usage="python %(prog)s --search FILE [--option value ...]")
    add_training_options(parser, chosen)
    return parser


def make_parser(chosen: Parts = STUDENT) -> argparse.ArgumentParser:
    parser = training_parser(chosen)
    group = parser.add_argument_group("search")
    group.add_argument("--search", metavar="FILE", help="the search space")
    group.add_argument("--study", metavar="NAME", help="name of the study (default: that of the search space's file)")
    group.add_argument("--storage", metavar="PLACE",
                       help="a file, or a data base's address as Optuna takes it (default: a file in the study's "
                            "folder)")  # fmt: skip
    group.add_argument("--n_trials", type=cli.number(int, 1), default=50, help="of the study, by all processes")
    group.add_argument("--objective", default="val/acc", metavar="METRIC",
                       help="what is maximised, of the last epoch: val/macro_avg_acc, or val/acc/held_out for devices "
                            "that --val_devices keeps out of training, ...")  # fmt: skip
    group.add_argument("--pruner", choices=["median", "none"], default="median",
                       help="median: stop a trial that is worse than half of the others were by then")  # fmt: skip
    group.add_argument("--n_warmup", type=cli.number(int, 0), default=5, metavar="EPOCHS",
                       help="before a trial may be stopped")  # fmt: skip
    group.add_argument("--max_bytes", type=cli.number(int, 1), default=MAX_PARAMETER_BYTES,
                       help="of the parameters in 8 bits")  # fmt: skip
    group.add_argument("--max_macs", type=cli.number(int, 1), default=MAX_MACS, help="for a second of sound")
    group.add_argument("--max_ram", type=cli.number(int, 1), metavar="BYTES",
                       help="of activations in 8 bits that are alive at once (default: no limit)")  # fmt: skip
    parser.set_defaults(logger=["none"])
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(make_parser, argv)
    if args.search is None:
        parser.error("--search is needed: the file of the search space")
    path = Path(args.search)
    recipe = {} if args.config is None else read_recipe(args.config)
    base = {name: value for name, value in recipe.items() if name not in OWN | KEPT_HERE}
    base |= {name: getattr(args, name) for name in args.given if name not in OWN | KEPT_HERE}
    if args.objective.startswith("val/") and not args.val_fraction:
        parser.error(f"--objective {args.objective} needs training recordings that are held out: --val_fraction 0.1")
    if args.objective.startswith("test/"):
        log.warning("--objective %s: the test part decides here, so its scores are no results any more", args.objective)
    space = read_space(path)
    check_space(space, base, training_parser, path)
    name = args.study or path.stem
    folder = Path(args.project_name) / name
    folder.mkdir(parents=True, exist_ok=True)
    storage = args.storage or str(folder / "journal.log")
    alike = {key: value for key, value in base.items() if key not in OF_A_MACHINE}
    digest = digest_of([alike, path.read_text(encoding="utf-8"), args.objective])
    study = open_study(name, storage, args.pruner, args.n_warmup, digest)
    signal.signal(signal.SIGTERM, _stop)
    try:
        search(args, study, folder, space, base, path)
    except KeyboardInterrupt:
        log.info("the same command goes on with the trial that was running")
        raise
    finally:
        write_results(folder, study, args.objective)
    print(summary(study, args.objective))
    print(f"all trials are in {folder / 'results.csv'} and {folder / 'search.html'}")


def search(
    args: argparse.Namespace, study: Any, folder: Path, space: tuple, base: Mapping[str, Any], path: Path
) -> None:
    """Runs trials until the study has enough of them.

    Raises:
        SearchError: when nothing that is drawn is inside the limits, or trials do not train.
    """
    n_over = n_failed = 0
    while True:
        with claiming(folder):
            got = next_trial(study, args.n_trials)
        if got is None:
            return
        trial, options = got
        if options is None:
            try:
                options = fitted(draw(trial, space, _whole_numbers(base)), base, training_parser, path)
                problem = over_limits(options, args)
            except (RecipeError, ValueError) as error:  # options that do not go together
                problem = str(error)
            if problem is not None:
                trial.set_user_attr(OVER, problem)
                study.tell(trial, state=_state("PRUNED"))
                n_over += 1
                if n_over == MOST_DRAWS:
                    raise SearchError(f"{MOST_DRAWS} draws from {path} in a row cannot be trained; the last: {problem}")
                continue
            trial.set_user_attr("run", f"{study.study_name}-{trial.number:04d}")
            trial.set_user_attr(OPTIONS, options)
        n_over = 0
        log.info("trial %d: %s", trial.number, described(trial.params))
        said = run_trial(args, study, trial, options)
        n_failed = n_failed + 1 if said else 0
        if n_failed == MOST_FAILURES:
            raise SearchError(f"{MOST_FAILURES} trials in a row have failed; the last: {said}")
        if said and not finished(study) and n_counted(study) >= args.n_trials:
            raise SearchError(f"no trial has come to its end; the last: {said}")
        write_results(folder, study, args.objective)


def over_limits(options: Mapping[str, Any], args: argparse.Namespace) -> str | None:
    """Says what a trial's network costs too much of; None when it may be trained."""
    parser = training_parser(chosen_parts([], options))
    parser.set_defaults(**options)
    own = parser.parse_args([])
    parts.check_configs(own)
    report = measure_second(parts.build_model(own), parts.build_frontend(own))
    costs = [
        ("bytes of parameters", report.folded.parameter_bytes("int8"), args.max_bytes),
        ("MACs", report.trained.macs, args.max_macs),
        ("bytes of activations", report.folded.peak_bytes("int8"), args.max_ram),
    ]
    over = [f"{n:,} {what}, limit {limit:,}" for what, n, limit in costs if limit is not None and n > limit]
    return "; ".join(over) or None


def run_trial(args: argparse.Namespace, study: Any, trial: Any, options: Mapping[str, Any]) -> str | None:
    """Trains a trial in a process of its own and tells the study; the last line of one that failed, else None."""
    run = trial.user_attrs["run"]
    folder = Path(args.project_name) / run
    with locked(folder / ".lock", f"run {run}", wait=True):
        pass  # its last process may still be saving
    config = folder / "trial.yaml"
    with replacing(config) as file:
        yaml.safe_dump(dict(options), file)
    command = [sys.executable, str(TRAINING), "--project_name", args.project_name]
    try:
        last_checkpoint(args.project_name, run)
        command += ["--resume", run]
    except ValueError:
        command += ["--config", str(config), "--run_id", run]
        command += ["--logger", *args.logger, "--experiment_name", study.study_name]
    n_told = len(trial._cached_frozen_trial.intermediate_values)
    with open(folder / "log.txt", "a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent)
        try:
            while True:
                is_over = process.poll() is not None
                scores = scores_of(folder / "metrics.jsonl", args.objective)
                for epoch, score in scores[n_told:]:
                    trial.report(score, epoch)
                    n_told += 1
                    if not is_over and trial.should_prune():
                        process.terminate()  # it saves, and could be gone on with by hand
                        process.wait()
                        study.tell(trial, state=_state("PRUNED"))
                        return None
                if is_over:
                    break
                time.sleep(POLL_SECONDS)
        except BaseException:  # the trial stays as it is, and is gone on with the next time
            process.terminate()
            process.wait()
            raise
    said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
    if process.returncode == 0 and scores:
        study.tell(trial, scores[-1][1])
        return None
    if process.returncode in (130, 143):
        raise KeyboardInterrupt
    if process.returncode == 0:
        raise SearchError(f"--objective {args.objective}: the runs have no such metric, see {folder / 'metrics.jsonl'}")
    log.warning("trial %d has failed: %s", trial.number, said[-1])
    study.tell(trial, state=_state("FAIL"))
    return said[-1]


def scores_of(path: Path, objective: str) -> list[tuple[int, float]]:
    """Epochs and scores of a run so far; half a line at the end is passed over."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found = [(line["epoch"], line.get(objective)) for line in map(json.loads, lines)]
    return [(epoch, score) for epoch, score in found if score is not None]


def summary(study: Any, objective: str, n: int = 5) -> str:
    """The best trials, for people."""
    best = finished(study)[:n]
    if not best:
        return "no trial has come to its end"
    rows = [["trial", objective, "options"]]
    for one in best:
        rows.append([str(one.number), f"{one.value:.4f}", described(one.params)])
    return "\n".join(line.rstrip() for line in align(rows, n_left=3))


def described(options: Mapping[str, Any]) -> str:
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in options.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _whole_numbers(base: Mapping[str, Any]) -> Any:
    """Tells whether an option takes whole numbers alone: (option, drawn so far) -> bool."""

    def is_whole(option: Any, values: Mapping[str, Any]) -> bool:
        parser = training_parser(chosen_parts([], {**base, **values}))
        action = next(one for one in parser._actions if one.dest == option.name)
        try:
            cli.typed(action, option.low + 0.382 * (option.high - option.low) + 1e-3)
        except ValueError:
            return True
        return False

    return is_whole


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


def _die_with_parent() -> None:
    """A run whose search was killed saves and stops, as after Ctrl-C; on Linux."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGTERM)


def _stop(number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    cli.run(main)
