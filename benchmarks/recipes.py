"""Trains every recipe for a few epochs on the embedded data set and notes what it has learned.

  python benchmarks/recipes.py                                 all of them, 6 epochs each: about an hour on one core
  python benchmarks/recipes.py --recipes tan2025 --n_epochs 20

Recipes are made for hundreds of epochs on TAU22: schedules are squeezed into the few, batches are of 64 clips, all
clips are used, and the transformers have two layers and start from nothing. A teacher that a recipe needs is
cp_resnet's. The numbers say that a recipe works, not how good it is. Results are kept in
benchmarks/results/recipes.csv, a line each.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.recipes import read_recipe, script_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/recipes.csv"
TEACHER = "cp_resnet"  # comes first
IN_EPOCHS = ("warm_up_len", "ramp_down_start", "ramp_down_len", "restart_epochs", "freeze_params_epochs")
SMALLER = {  # a full transformer takes a GPU, and its published weights are not at hand everywhere
    "passt": ["--pretrained", "none", "--depth", "2", "--lr", "0.0003"],
    "beats_ssl": ["--pretrained", "none", "--encoder_layers", "2", "--lr", "0.0003"],
    "beats_ssl_sl": ["--pretrained", "none", "--encoder_layers", "2", "--lr", "0.0003"],
    "beats_ssl_star": ["--pretrained", "none", "--encoder_layers", "2"],
    **{name: ["--time_width", "40"] for name in ("sp4asc_ce", "sp4asc_mixup", "sp4asc_focal")},  # 44 frames in a second
}


def squeezed(recipe: dict, n_epochs: int) -> list[str]:
    """Options that fit a recipe's epochs into fewer."""
    whole = recipe.get("n_epochs", n_epochs)
    options = ["--n_epochs", str(n_epochs), "--eval_every", str(n_epochs), "--batch_size", "64"]
    for name in IN_EPOCHS:
        if name in recipe:
            least = 1 if name == "restart_epochs" else 0
            options += [f"--{name}", str(max(least, round(recipe[name] * n_epochs / whole)))]
    if "warmup_steps" in recipe:
        options += ["--warmup_steps", str(round(recipe["warmup_steps"] * n_epochs / whole))]
    if "average_last" in recipe:
        options += ["--average_last", "2"]
    return options


def call(script: str, options: list[str]) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *options], check=True, stdout=subprocess.DEVNULL)


def run(name: str, n_epochs: int, project: str, dataset: list[str]) -> dict[str, object]:
    """Trains or quantizes by a recipe; returns its line of the results."""
    recipe, started = read_recipe(ROOT / f"recipes/{name}.yaml"), time.monotonic()
    options = ["--config", str(ROOT / f"recipes/{name}.yaml"), *dataset, "--project_name", project]
    options += ["--logger", "none", "--run_id", name, *SMALLER.get(name, [])]
    if "subset" in recipe:
        options += ["--subset", "100"]
    if "teacher_logits" in recipe or "kd_weight" in recipe or 0 < recipe.get("kd_lambda", 1) < 1:
        options += ["--teacher_logits", str(Path(project) / "teacher.pt")]
    if "feature_teacher" in recipe:
        options += ["--feature_teacher", TEACHER]
    script = script_of(recipe)
    if script == "run_training.py":
        call(script, [*options, *squeezed(recipe, n_epochs)])
    elif script == "run_device_training.py":
        call(script, [*options, "--wandb_id", "dcase25_baseline", *squeezed(recipe, 2)])
    else:
        source = "tf_sepnet" if "ptq" in recipe else "cpjku_student"
        call("run_qat.py", [*options, "--wandb_id", source, *([] if "ptq" in recipe else squeezed(recipe, 2))])
    lines = [json.loads(line) for line in (Path(project) / name / "metrics.jsonl").read_text().splitlines()]
    return {
        "recipe": name,
        "epochs": n_epochs if "model" in recipe else len(lines) if "n_epochs" in recipe else 0,
        "first training loss": round(lines[0].get("train/loss", float("nan")), 4),
        "last training loss": round(lines[-1].get("train/loss", float("nan")), 4),
        "test accuracy": round(100 * lines[-1]["test/acc"], 2),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    all_recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    ordered = sorted(all_recipes, key=lambda name: (name != TEACHER, "model" not in read_recipe_of(name), name))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=ordered, default=ordered, metavar="NAME")
    parser.add_argument("--n_epochs", type=int, default=6)
    parser.add_argument("--project_name", default="recipe_runs", help="folder of the runs; finished ones are kept")
    parser.add_argument("--dataset_dir", help="another data set, laid out like TAU22")
    parser.add_argument("--results", default=str(RESULTS))
    args = parser.parse_args(argv)
    dataset = ["--dataset_dir", args.dataset_dir] if args.dataset_dir else ["--dataset", "synthetic"]
    results = Path(args.results)
    lines = list(csv.DictReader(results.open(encoding="utf-8"))) if results.is_file() else []
    for name in args.recipes:
        if not (Path(args.project_name) / name / "report.md").is_file():
            line = run(name, args.n_epochs, args.project_name, dataset)
            print(line, flush=True)
            lines = sorted([*(old for old in lines if old["recipe"] != name), line], key=lambda one: one["recipe"])
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(line), lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
        logits = Path(args.project_name) / "teacher.pt"
        if name == TEACHER and not logits.is_file():
            where = ["--project_name", args.project_name, *dataset, "--output", str(logits)]
            call("run_teacher_logits.py", ["--teachers", name, *where])
    return lines


def read_recipe_of(name: str) -> dict:
    return read_recipe(ROOT / f"recipes/{name}.yaml")


if __name__ == "__main__":
    main()
