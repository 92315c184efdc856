"""`make pipeline` as the Makefile has it, on a small data set with small networks."""

import importlib
import shlex
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch

from tests.conftest import write_nothing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FRONTEND = ["--resample_rate", "8000", "--window_size", "256", "--hop_size", "125", "--n_fft", "512", "--n_mels", "32"]
TRAINING = ["--n_epochs", "1", "--batch_size", "8", "--dir_prob", "0", "--freqm", "8", "--roll", "400"]
SMALLER = {
    "run_teacher_logits": [],
    "run_training": [*FRONTEND, *TRAINING, "--fmax_aug_range", "200", "--base_channels", "8"],
    "run_qat": [*TRAINING, "--freeze_params_epochs", "1"],
    "run_export": ["--latency_rounds", "0", "--inputs", "network"],
}


def test_the_pipeline_runs_from_teacher_to_files(tau, tmp_path, monkeypatch):
    listed = subprocess.run(
        ["make", "-n", "pipeline", "PIPELINE=runs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = [shlex.split(line) for line in listed.splitlines() if " run_" in line]
    scripts = [Path(command[1]).stem for command in commands]
    assert scripts == ["run_training", "run_teacher_logits", "run_training", "run_qat", "run_export"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run_qat.write_onnx", write_nothing)
    for name, (_python, _script, *options) in zip(scripts, commands, strict=True):
        options = [str(ROOT / word) if word.startswith("recipes/") else word for word in options]
        data = ["--dataset", "tau22", "--dataset_dir", str(tau.root), "--cache_path", str(tmp_path / "cache")]
        wider = ["--base_channels", "16"] if name == "run_training" and "teacher" in options else []
        # What is said last counts.
        result = importlib.import_module(name).main([*options, *data, *SMALLER[name], *wider])
        assert not isinstance(result, int) or result == 0
    logits = torch.load("runs/teacher_logits.pt", weights_only=True)
    assert len(logits["files"]) == 27
    assert {path.name for path in Path("runs").iterdir() if path.is_dir()} == {"teacher", "student", "int8"}
    (report,) = Path("runs/int8").rglob("parity.md")
    session = onnxruntime.InferenceSession(str(report.with_name("network_int8.onnx")))
    assert session.run(None, {"log_mel": torch.zeros(2, 1, 32, 64).numpy()})[0].shape == (2, 10)
