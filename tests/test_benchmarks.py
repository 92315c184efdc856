"""Every benchmark runs, at its smallest size; no time is judged."""

import runpy
from pathlib import Path

import pytest
import torch

from datasets.synthetic import write_synthetic

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALLEST = {
    "augmentations": ["--batch_size", "2", "--rounds", "1"],
    "artifact_latency": ["--n_rounds", "2", "--inputs", "network"],
    "busy_machine": [
        "--batch_size",
        "1",
        "--threads",
        "1",
        "--programs",
        "1",
        "--seconds",
        "0.1",
        "--rounds",
        "1",
        "--sides",
        "brief",
    ],
    "crops": ["--n_clips", "64", "--batch_size", "8", "--sample_rate", "800", "--rounds", "1"],
    "kaldi_fbank": ["--batch_size", "2", "--rounds", "1"],
    "evaluation": ["--n_clips", "4", "--n_answers", "200", "--n_rounds", "5", "--rounds", "1"],
    "intervals": ["--n_clips", "200", "--n_rounds", "5"],
    "students": ["--batch_size", "2", "--rounds", "1"],
    "passt_step": ["--batch_size", "1", "--depth", "1", "--rounds", "1"],
    "training_step": ["--batch_size", "2", "--rounds", "1"],
}


def test_every_benchmark_is_among_them():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALLEST, "recipes"}


def run(name: str, options: list[str]) -> object:
    n_threads = torch.get_num_threads()
    try:
        return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](options)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("name", SMALLEST)
def test_runs_and_prints_a_table(name, capsys):
    run(name, SMALLEST[name])
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_recipes_are_trained_and_what_is_done_is_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_synthetic(tmp_path / "set", n_train_recordings=2, n_test_recordings=1, n_workers=2)
    options = ["--recipes", "cnn3", "--n_epochs", "1", "--dataset_dir", "set", "--results", "results.csv"]
    (line,) = run("recipes", options)
    assert (line["recipe"], line["epochs"]) == ("cnn3", 1) and 0 <= line["test accuracy"] <= 100
    assert (tmp_path / "results.csv").read_text().startswith("recipe,epochs,first training loss,")
    capsys.readouterr()
    assert run("recipes", options) == [{key: str(value) for key, value in line.items()}]
    assert capsys.readouterr().out == ""
