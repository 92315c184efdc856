"""Every benchmark runs, at its smallest size; no time is judged."""

import runpy
from pathlib import Path

import pytest
import torch
import yaml

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
    "gpu": [
        "--torch_device",
        "cpu",
        "--n_clips",
        "60",
        "--batch_size",
        "2",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--no_compile",
    ],
    "intervals": ["--n_clips", "200", "--n_rounds", "5"],
    "students": ["--batch_size", "2", "--rounds", "1"],
    "passt_step": ["--batch_size", "1", "--depth", "1", "--rounds", "1"],
    "training_step": ["--batch_size", "2", "--rounds", "1"],
}


def test_every_benchmark_is_among_them():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALLEST, "recipes", "run"}


def run(name: str, options: list[str]) -> object:
    n_threads = torch.get_num_threads()
    try:
        return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](options)
    finally:
        torch.set_num_threads(n_threads)


def test_workloads_are_of_benchmarks_and_their_options():
    for path in (FOLDER / "workloads").glob("*.yaml"):
        options = yaml.safe_load(path.read_text())
        text = (FOLDER / f"{options.pop('benchmark')}.py").read_text()
        assert all(f'"--{option}"' in text for option in options), path
        assert (FOLDER / "results" / f"{path.stem}.csv").is_file(), "it has not been measured"


def test_a_workload_is_measured_and_kept_with_the_machine(tmp_path, monkeypatch):
    runner = runpy.run_path(str(FOLDER / "run.py"))
    (tmp_path / "results").mkdir()
    (tmp_path / "step.py").write_text(
        "def main(argv):\n    assert argv == ['--rounds', '3']\n    return {'roll': (2, 1)}\n"
    )
    (tmp_path / "tiny.yaml").write_text("benchmark: step\nrounds: 3\n")
    monkeypatch.setitem(runner["measure"].__globals__, "HERE", tmp_path)
    runner["measure"](tmp_path / "tiny.yaml")
    text = runner["with_tables"]("<!-- workload: tiny -->\nold\n<!-- end of workload -->\n")
    assert "| roll | 2.000 | 1.000 | 2.00 |" in text and f"torch {torch.__version__}" in text and "old" not in text


def test_the_tables_of_the_documents_are_those_of_the_results():
    runner = runpy.run_path(str(FOLDER / "run.py"))
    text = (FOLDER.parent / "docs/speed.md").read_text()
    assert text.count("<!-- workload: ") == len(list((FOLDER / "workloads").glob("*.yaml")))
    assert runner["with_tables"](text) == text, "python benchmarks/run.py --tables"


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
