"""Scripts in two processes on the CPU, against one process with the same batches; two tests start them by torchrun."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.checkpoints.checkpoint import load_checkpoint
from tests.conftest import make_tau, write_nothing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# Nothing random but the weights and the order: every process draws its own augmentation.
PLAIN = [
    "--dir_prob", "0", "--roll", "0", "--mixstyle_p", "0", "--freqm", "0", "--timem", "0", "--fmax_aug_range", "1",
    "--logger", "none", "--torch_device", "cpu", "--batch_size", "8",
]  # fmt: skip
PASST = [  # clips as long as the time embedding: no offset is drawn
    "run_training.py", *PLAIN, "--config", str(ROOT / "recipes/passt.yaml"), "--pretrained", "none",
    "--embed_dim", "16",
    "--depth", "1", "--n_heads", "2", "--s_patchout_f", "0", "--input_tdim", "100", "--lr", "1e-3", "--n_epochs", "2",
]  # fmt: skip
STUDENT = [
    "run_training.py", *PLAIN, "--resample_rate", "8000", "--window_size", "256", "--hop_size", "125", "--n_fft", "512",
    "--n_mels", "32", "--base_channels", "8", "--warm_up_len", "1", "--n_epochs", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """27 training and 45 test clips: neither is a multiple of two, and the last batch of 8 has three clips."""
    folder = tmp_path_factory.mktemp("distributed")
    make_tau(folder / "tau", ["bus", "park", "tram"], ["a", "b", "s1", "s4", "s5"], ["a", "b", "s1"], rate=16000)
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> str:
    """The id of a student's run, from two processes, that nothing interrupted."""
    run_two(folder, [*STUDENT, "--run_id", "whole"])
    return "whole"


def with_data(arguments: list[str]) -> list[str]:
    return [str(ROOT / arguments[0]), "--dataset_dir", "tau", "--cache_path", "cache", *arguments[1:]]


def start(folder: Path, command: list[str], **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, **pipes)


def torchrun(folder: Path, arguments: list[str], *options: str) -> subprocess.Popen:
    return start(folder, ["-m", "torch.distributed.run", *options, *with_data(arguments)])


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_one(folder: Path, arguments: list[str], monkeypatch) -> None:
    script, *options = with_data(arguments)
    monkeypatch.chdir(folder)
    importlib.import_module(Path(script).stem).main(options)


def run_two(folder: Path, arguments: list[str]) -> str:
    """As torchrun starts them, in a fraction of its time; returns what was printed."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [start(folder, with_data(arguments), **shared, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]
    done = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], [errors for _, errors in done]
    return "".join(printed for printed, _ in done)


def checkpoint(folder: Path, run_id: str) -> dict:
    return load_checkpoint(folder / "DCASE23_Task1" / run_id / "checkpoints/last.pt")


def metrics(folder: Path, run_id: str) -> list[dict]:
    lines = (folder / "DCASE23_Task1" / run_id / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def compare(ours: list[dict], theirs: list[dict], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name not in ("train/seconds", "train/clips_per_second"):
                # Sums in another order, and twelve steps of Adam on what they gave.
                assert a[name] == pytest.approx(b[name], abs=tolerance), name


def test_two_processes_train_and_score_as_one_does(folder, monkeypatch):
    """PaSST has no batch norm: gradients, weights and metrics are those of the whole batch."""
    run_one(folder, [*PASST, "--run_id", "passt1"], monkeypatch)
    # In pieces, whose gradients add up to those of the batch.
    printed = run_two(folder, [*PASST, "--run_id", "passt2", "--accumulate", "2"])
    assert printed.count("last epoch:") == 1  # one process prints
    one, two = checkpoint(folder, "passt1"), checkpoint(folder, "passt2")
    for name, value in one["model"]["state"].items():
        torch.testing.assert_close(two["model"]["state"][name], value, rtol=0, atol=1e-5, msg=name)
    for key, ours in two["optimizer"]["state"].items():
        theirs = one["optimizer"]["state"][key]
        torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-6)  # means of gradients
    compare(metrics(folder, "passt2"), metrics(folder, "passt1"))
    assert metrics(folder, "passt2")[-1]["test/count"] == 45  # nothing twice


def test_a_killed_process_on_one_of_two_machines_is_started_again_and_the_run_goes_on_exactly(folder, whole):
    """Batch norm, saved before every step. Each machine's torchrun counts the failures of its own processes alone."""
    before = set((folder / "DCASE23_Task1").iterdir())
    machines = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--max_restarts=1"]
    arguments = [*STUDENT, "--run_id", "killed", "--save_minutes", "0"]
    started = [torchrun(folder, arguments, "--nproc_per_node=1", *machines, f"--node_rank={rank}") for rank in range(2)]
    log = folder / "DCASE23_Task1/killed/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.is_file() or not log.read_text():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), [process.communicate()[1] for process in started]
        time.sleep(0.05)
    (worker,) = subprocess.run(["pgrep", "-P", str(started[0].pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(worker), signal.SIGKILL)
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert "goes on after a failure" in errors[0]
    # torchrun's own agent may leave one when the other machine's has ended before it.
    assert not any('run_training.py", line' in text for text in errors), errors
    ours, theirs = checkpoint(folder, "killed")["model"]["state"], checkpoint(folder, whole)["model"]["state"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    compare(metrics(folder, "killed"), metrics(folder, whole))
    begun = set((folder / "DCASE23_Task1").iterdir()) - before
    assert {path.name for path in begun} == {"killed"}  # no second run


def test_two_processes_fine_tune_to_8_bits_as_one_does(folder, whole, monkeypatch):
    """With its norms frozen a student has no statistics of batches."""
    options = ["run_qat.py", *PLAIN[:10], *PLAIN[12:], "--wandb_id", whole, "--n_epochs", "1", "--lr", "1e-4"]
    options += ["--freeze_params_epochs", "1", "--run_id"]
    monkeypatch.setattr("run_qat.write_onnx", write_nothing)
    run_one(folder, [*options, "int8_1"], monkeypatch)
    run_two(folder, [*options, "int8_2"])
    one, two = (checkpoint(folder, f"int8_{n}")["model"]["state"] for n in (1, 2))
    before = checkpoint(folder, whole)["model"]["state"]
    assert any(not torch.equal(one[name], before[name]) for name in before)
    for name, value in one.items():
        # Four steps of Adam go up to 4e-4; a rounding that falls the other way changes a gradient.
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4, msg=name)
    compare(metrics(folder, "int8_2"), metrics(folder, "int8_1"), 1e-3)
    assert (folder / "DCASE23_Task1/int8_2/network_int8.onnx").is_file()


def test_a_request_to_stop_saves_once_and_resumes_exactly(folder, whole):
    process = torchrun(folder, [*STUDENT, "--run_id", "stopped"], "--standalone", "--nproc_per_node=2")
    log = folder / "DCASE23_Task1/stopped/metrics.jsonl"
    while not log.is_file() or not log.read_text():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    command_line = re.search("all saved; resume with: (.*)", errors)[1]
    assert command_line.startswith("torchrun ")
    assert command_line.endswith("--nproc_per_node=2 run_training.py --project_name DCASE23_Task1 --resume stopped")
    run_two(folder, ["run_training.py", "--resume", "stopped"])
    ours, theirs = checkpoint(folder, "stopped")["model"]["state"], checkpoint(folder, whole)["model"]["state"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_more_processes_than_clips_is_one_line(folder):
    process = torchrun(folder, [*STUDENT, "--batch_size", "1"], "--standalone", "--nproc_per_node=2")
    _, printed = process.communicate(timeout=240)
    assert process.returncode != 0
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert errors == ["error: 2 processes cannot share 1 clips of a batch: lower torchrun's --nproc_per_node"]
    assert "exitcode  : 2" in printed
