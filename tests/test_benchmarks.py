"""Every benchmark runs, at its smallest size; no time is judged."""

import runpy
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALLEST = {
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
    "students": ["--batch_size", "2", "--rounds", "1"],
    "passt_step": ["--batch_size", "1", "--depth", "1", "--rounds", "1"],
    "training_step": ["--batch_size", "2", "--rounds", "1"],
}


def test_every_benchmark_is_among_them():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
def test_runs_and_prints_a_table(name, capsys):
    n_threads = torch.get_num_threads()
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"))["main"](SMALLEST[name])
    finally:
        torch.set_num_threads(n_threads)
    assert len(capsys.readouterr().out.splitlines()) >= 3
