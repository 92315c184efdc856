"""Quantization and export as their users meet them: from a small trained run to files, killed, resumed, misused."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch

import run_export
import run_qat
import run_training
from datasets.tau import SCENES
from helpers import cli
from helpers.checkpoints.checkpoint import load_checkpoint, load_model
from helpers.export.files import write_onnx
from helpers.quantization import convert
from helpers.runs.folder import trained_checkpoint
from tests.conftest import make_tau, write_nothing
from tests.golden_inputs import wave

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DATA = ["--logger", "none", "--batch_size", "8", "--freqm", "8", "--roll", "400", "--dir_prob", "0"]
QAT = [*DATA, "--n_epochs", "3", "--freeze_params_epochs", "1", "--lr", "1e-3", "--calibration_clips", "16"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a small data set and the run of a small network, id `small`."""
    folder = tmp_path_factory.mktemp("qat")
    make_tau(folder / "tau", ["bus", "park", "tram"], ["a", "b", "s1", "s4", "s5"], ["a", "b", "s1"])
    before = Path.cwd()
    os.chdir(folder)
    try:
        run_training.main([
            *DATA, "--dataset_dir", "tau", "--cache_path", "cache", "--resample_rate", "8000", "--window_size", "256",
            "--hop_size", "125", "--n_fft", "512", "--n_mels", "32", "--fmax_aug_range", "200", "--base_channels", "8",
            "--warm_up_len", "1", "--n_epochs", "4", "--lr", "0.01", "--eval_every", "4",
        ])  # fmt: skip
    finally:
        os.chdir(before)
    (run,) = (folder / "DCASE23_Task1").iterdir()
    run.rename(run.with_name("small"))
    return folder


@pytest.fixture
def here(project, tmp_path, monkeypatch) -> Path:
    """An own copy of the project, as working folder."""
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.delenv("TAU22_DIR", raising=False)
    monkeypatch.setattr(run_qat, "write_onnx", write_nothing)
    return tmp_path / "p"


@pytest.fixture(scope="module")
def exported(project, tmp_path_factory) -> tuple[Path, int, str]:
    """An own copy with the run `ptq` in 8 bits and its files; the exit status of run_export.py and what it printed."""
    folder = tmp_path_factory.mktemp("exported") / "p"
    shutil.copytree(project, folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(run_qat, "write_onnx", write_nothing)
        run_qat.main([*DATA, *COMMON, "--wandb_id", "small", "--ptq", "--run_id", "ptq"])
        options = ["--wandb_id", "ptq", "--precision", "int8", "--latency_rounds", "3"]
        status = run_export.main([*options, *COMMON])
    return folder, status, printed.getvalue()


COMMON = ["--dataset_dir", "tau", "--cache_path", "cache"]


def new_run(project: Path, known: tuple[str, ...] = ("small",)) -> Path:
    (run,) = (path for path in (project / "DCASE23_Task1").iterdir() if path.name not in known)
    return run


@pytest.mark.usefixtures("here")
def test_scores_integers_and_floats_side_by_side_and_ends_with_a_file(here, monkeypatch):
    monkeypatch.setattr(run_qat, "write_onnx", write_onnx)
    metrics = run_qat.main([*QAT, *COMMON, "--wandb_id", "small"])
    for key in ("test/acc", "fp32/test/acc", "source/test/acc", "test/acc/device/s5", "fp32/test/acc/unseen"):
        assert 0 <= metrics[key] <= 1, key
    run = new_run(here)
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [0, 1, 2]
    assert all("test/acc" in row and "fp32/test/acc" in row for row in history)
    assert "source/test/acc" in history[0]

    loaded = load_model(run / "checkpoints/last.pt")
    assert loaded.precision == "int8"
    network = convert(loaded.model)
    log_mel = wave((5, 1, 32, 64), "qat", 1.0)
    session = onnxruntime.InferenceSession(str(run / "network_int8.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == list(SCENES)
    logits = session.run(None, {"log_mel": log_mel.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), network(log_mel), rtol=0, atol=1e-5)


def test_ranges_and_statistics_are_frozen_in_the_last_epochs(here):
    def trained(n_frozen: str, n_epochs: str) -> dict[str, torch.Tensor]:
        options = ["--wandb_id", "small", "--n_epochs", n_epochs, "--freeze_params_epochs", n_frozen]
        run_id = f"frozen{n_frozen}of{n_epochs}"
        run_qat.main([*QAT, *COMMON, *options, "--run_id", run_id])
        return load_checkpoint(here / "DCASE23_Task1" / run_id / "checkpoints/last.pt")["model"]["state"]

    source = load_checkpoint(here / "DCASE23_Task1/small/checkpoints/last.pt")["model"]["state"]
    learning, frozen = trained("0", "2"), trained("1", "1")
    for name in (name for name in source if "running" in name):
        assert torch.equal(frozen[name], source[name]), name
        assert not torch.equal(learning[name], source[name]), name
    assert any(not torch.equal(frozen[name], source[name]) for name in source if name.endswith("weight"))
    ranges = [name for name in frozen if name.endswith((".low", ".high"))]
    assert sum(not torch.equal(learning[name], frozen[name]) for name in ranges) > len(ranges) / 3


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_ptq_calibrates_from_training_clips_alone(here, method, monkeypatch):
    seen = []
    original = run_qat.batches
    monkeypatch.setattr(
        run_qat, "batches", lambda clips, order, *a, **k: seen.append(clips) or original(clips, order, *a, **k)
    )
    metrics = run_qat.main([*DATA, *COMMON, "--wandb_id", "small", "--ptq", method, "--calibration_clips", "12"])
    assert seen and all(list(clips.files) == list(seen[0].files) for clips in seen)
    test_files = set((here / "tau/evaluation_setup/fold1_evaluate.csv").read_text().split())
    assert not {str(file) for file in seen[0].files} & test_files
    assert metrics["fp32/test/acc"] == metrics["source/test/acc"]


def test_half_precision_is_written_and_scored(here):
    metrics = run_qat.main([*DATA, *COMMON, "--wandb_id", "small", "--precision", "fp16"])
    run = new_run(here)
    assert load_model(run / "checkpoints/last.pt").precision == "fp16"
    assert metrics["test/acc"] == pytest.approx(metrics["source/test/acc"], abs=0.05)
    state = load_checkpoint(run / "checkpoints/last.pt")["model"]["state"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float16}


def test_killed_run_resumes_to_the_same_bits(here):
    run_qat.main([*QAT, *COMMON, "--wandb_id", "small"])
    whole = new_run(here)
    command = [sys.executable, str(ROOT / "run_qat.py"), *QAT, *COMMON, "--wandb_id", "small", "--save_minutes", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        runs = [path for path in Path("DCASE23_Task1").iterdir() if path.name not in ("small", whole.name)]
        if runs and (runs[0] / "metrics.jsonl").is_file():  # in the second epoch
            killed = runs[0]
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()
    assert killed is not None
    run_qat.main(["--resume", killed.name])
    a, b = (load_checkpoint(run / "checkpoints/last.pt")["model"]["state"] for run in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_export_of_a_quantized_run_passes_its_own_report(exported):
    folder, status, printed = exported
    run = folder / "DCASE23_Task1/ptq"
    assert status == 0, printed
    names = {"network_int8.onnx", "waveform_int8.onnx", "parity.md"}
    assert {path.name for path in (run / "export").iterdir()} == names
    assert "s5" in (run / "export/parity.md").read_text() and "in_c.0: reads the float spectrogram" in printed


def test_an_int8_file_that_only_this_cpu_gets_wrong_names_the_remedy(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported[0])
    monkeypatch.setattr(run_export, "write_onnx", lambda *_, **_options: None)  # they are there
    original = run_export.parity.run_onnx

    def saturating(path, inputs, exact=False):
        return original(path, inputs, exact=exact) + (0 if exact or "fp32" in path.name else 0.3)

    monkeypatch.setattr(run_export.parity, "run_onnx", saturating)
    options = ["--wandb_id", "ptq", "--precision", "int8", "--latency_rounds", "0", "--n_clips", "3"]
    assert run_export.main(options) == 1
    printed, error = capsys.readouterr()
    assert "| network_int8.onnx, exact integers | PyTorch, integers |" in printed
    assert "No pair of int8 weights can overflow 16 bits" in printed
    here = [f"{kind}_int8.onnx, as this CPU computes" for kind in ("network", "waveform")]
    assert f"parity fails for {', '.join(here)}: though no pair of their weights can overflow" in error
    assert "session.x64quantprecision=1" in error and "limit_pairs" not in error and "do not use" not in error
    monkeypatch.setattr(run_export, "overflowing_layers", lambda _network: [("in_c.1", 3)])
    assert run_export.main(options) == 1
    printed, error = capsys.readouterr()
    assert "3 pairs of int8 weights can overflow 16 bits, in in_c.1 (3)" in printed
    assert f"parity fails for {', '.join(here)}: this CPU adds 8-bit products in 16 bits" in error
    assert "--limit_pairs" in error and "do not use" not in error
    monkeypatch.setattr(run_export.parity, "run_onnx", lambda *args, **options: original(*args, **options) + 0.3)
    assert run_export.main(options) == 1
    assert "network_int8.onnx, exact integers" in (error := capsys.readouterr().err) and "do not use" in error
    monkeypatch.setattr(run_export.parity, "run_onnx", original)
    for n_clips in ("1", "2", "6"):
        assert run_export.main([*options[:-1], n_clips]) == 0


def test_export_needs_no_data(here):
    assert (
        run_export.main(["--wandb_id", "small", "--latency_rounds", "0", "--out_dir", "files", "--inputs", "network"])
        == 0
    )
    assert sorted(path.name for path in Path("files").glob("*.onnx")) == ["network_fp16.onnx", "network_fp32.onnx"]


def test_export_fails_loudly_when_a_file_is_wrong(here, monkeypatch, capsys):
    original = run_export.parity.run_onnx
    monkeypatch.setattr(run_export.parity, "run_onnx", lambda path, inputs, exact=False: original(path, inputs) + 0.3)
    assert (
        run_export.main(["--wandb_id", "small", "--latency_rounds", "0", "--inputs", "network", "--precision", "fp32"])
        == 1
    )
    assert "parity fails for network_fp32.onnx" in capsys.readouterr().err


def test_published_run_is_found_and_later_epochs_win(shared, tmp_path):
    published = shared("golden/cpjku_dcase23/c0a7nzin/checkpoints/epoch=149-step=81900.ckpt")
    folder = tmp_path / "p/c0a7nzin/checkpoints"
    folder.mkdir(parents=True)
    for epoch in (99, 149, 9):
        shutil.copy(published, folder / f"epoch={epoch}-step=1.ckpt")
    assert trained_checkpoint(str(tmp_path / "p"), "c0a7nzin").name == "epoch=149-step=1.ckpt"


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            run_qat,
            ["--wandb_id", "nope"],
            "no run nope with a checkpoint in DCASE23_Task1; runs in DCASE23_Task1: small",
        ),
        (run_qat, [], "name a run with --wandb_id or a file with --checkpoint"),
        (run_qat, ["--wandb_id", "small", "--base_channels", "16"], "has 8"),
        (run_qat, ["--wandb_id", "small", "--n_mels", "64"], "has 32"),
        (run_qat, ["--checkpoint", "tau/meta.csv"], "is a text file"),
        (run_qat, ["--wandb_id", "small", "--ptq", "--precision", "fp16"], "half precision has none"),
        (run_qat, ["--checkpoint", "missing.pt"], "missing.pt is missing"),
        (run_qat, ["--wandb_id", "small", "--freeze_params_epochs", "9"], "is more than --n_epochs"),
        (run_qat, ["--resume", "small"], "run_training.py --project_name DCASE23_Task1 --resume small"),
        (run_export, ["--wandb_id", "small", "--precision", "int8"], "quantize it first: python run_qat.py"),
        (run_export, ["--wandb_id", "small", "--sample_rate", "16000"], "works at 8000 Hz"),
        (run_export, ["--wandb_id", "small", "--clip_seconds", "0.01"], "too short for the front end"),
        (run_export, ["--wandb_id", "small", "--clips", "cache"], "no wav files"),
        (run_export, ["--wandb_id", "small", "--clips", "nowhere"], "--clips nowhere is no folder"),
        (run_export, ["--wandb_id", "small", "--clips", "tau/meta.csv"], "--clips tau/meta.csv is no folder"),
        (
            run_export,
            ["--wandb_id", "small", "--clips", "empty"],
            "empty/a.WAV holds no samples: remove it from the fo",
        ),
        (
            run_export,
            ["--wandb_id", "small", "--clips", "pipes"],
            "pipes/a.wav is no regular file: remove it from the ",
        ),
        (run_export, ["--wandb_id", "small", "--clips", "texts"], "texts/a.wav cannot be read as audio"),
        (run_export, ["--wandb_id", "nope"], "no run nope"),
    ],
)
@pytest.mark.usefixtures("here")
def test_bad_input_is_one_line_and_status_2(script, options, message, capsys, monkeypatch):
    for folder in ("empty", "pipes", "texts"):
        Path(folder).mkdir()
    soundfile.write("empty/a.WAV", np.zeros(0), 8000)
    Path("empty/._a.wav").write_bytes(b"left by a Mac")
    os.mkfifo("pipes/a.wav")
    Path("texts/a.wav").write_text("no sound")
    extra = [*QAT, *COMMON] if script is run_qat and "--resume" not in options else []
    monkeypatch.setattr(sys, "argv", ["script", *extra, *options])
    with pytest.raises(SystemExit) as stopped:
        cli.run(script.main)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and message in error[-1] and error[-1].startswith("error: ")


def test_quantized_checkpoint_is_not_quantized_again_and_keeps_its_options(here):
    run_qat.main([*DATA, *COMMON, "--wandb_id", "small", "--ptq"])
    run = new_run(here)
    with pytest.raises(ValueError, match="int8 already"):
        run_qat.main([*QAT, *COMMON, "--wandb_id", run.name])
    with pytest.raises(SystemExit):
        run_qat.main(["--resume", run.name, "--reduced_range"])


def test_network_over_the_limits_is_refused_when_asked(here):
    with pytest.raises(ValueError, match="limit"):
        big = "--base_channels 64".split()
        run_training.main([
            *DATA, "--dataset_dir", "tau", "--cache_path", "cache", "--resample_rate", "8000", "--n_fft", "512",
            "--window_size", "256", "--hop_size", "125", "--n_mels", "32", "--fmax_aug_range", "200", "--n_epochs", "1",
            "--warm_up_len", "0", *big,
        ])  # fmt: skip
        run = new_run(here)
        run_export.main(["--wandb_id", run.name, "--enforce_limits", "--latency_rounds", "0"])
