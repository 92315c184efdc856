"""A run and what can happen to it: a second program, other data, a signal at the wrong moment, divergence."""

import json
import multiprocessing
import os
import shutil
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import run_teacher_logits
import run_training
from datasets.files import locked
from helpers import loop
from helpers.checkpoints.checkpoint import load_checkpoint
from helpers.runs.run import resume_command
from tests.test_run_training import lines, options, outcome, responses, run_of, weights, without_times

pytestmark = pytest.mark.slow

__all__ = ["options", "responses"]  # fixtures


def hold(path: Path, ready, done) -> None:
    with locked(path, "x"):
        ready.set()
        done.wait(60)


def test_a_run_belongs_to_one_program(options, monkeypatch, capsys):
    run_training.main([*options, "--n_epochs", "1"])
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(run_of() / ".lock", ready, done))
    other.start()
    try:
        assert ready.wait(30)
        before = {path: path.stat().st_mtime_ns for path in run_of().rglob("*") if path.is_file()}
        status, errors = outcome(["--resume", run_of().name, "--n_epochs", "2"], monkeypatch, capsys)
        assert status == 2
        assert f"run {run_of().name} is in use by another process" in errors
        assert before == {path: path.stat().st_mtime_ns for path in run_of().rglob("*") if path.is_file()}
    finally:
        done.set()
        other.join()
    run_training.main(["--resume", run_of().name, "--n_epochs", "2"])


@pytest.mark.parametrize(
    "option", ["resume", "run_id", "dataset_dir", "cache_path", "teacher_logits", "dirs_path", "project_name"]
)
def test_an_empty_name_is_not_the_absence_of_an_option(options, option, monkeypatch, capsys):
    for arguments in ([f"--{option}", ""], [f"--{option}="]):
        status, errors = outcome([*options, *arguments], monkeypatch, capsys)
        assert status == 2
        assert f"--{option}: is empty" in errors
    assert not Path("DCASE23_Task1").exists()


def other_labels(root: Path, _responses: Path) -> list[str]:
    text = (root / "meta.csv").read_text().splitlines()
    first = next(i for i, line in enumerate(text) if "paris" in line and "\tbus\t" in line)
    text[first] = text[first].replace("\tbus\t", "\tpark\t")
    (root / "meta.csv").write_text("\n".join(text) + "\n")
    return []


def fewer_clips(root: Path, _responses: Path) -> list[str]:
    path = root / "evaluation_setup" / "fold1_train.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    return []


def other_audio(root: Path, _responses: Path) -> list[str]:
    file = root / (root / "evaluation_setup" / "fold1_train.csv").read_text().splitlines()[1]
    soundfile.write(file, np.zeros(44100), 44100, subtype="PCM_24")
    return []


def other_responses(_root: Path, folder: Path) -> list[str]:
    (folder / "0.wav").unlink()
    return []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_labels, "training clips changed"),
        (fewer_clips, "training clips, audio of the training clips changed"),
        (other_audio, "error: audio of the training clips changed"),
        (other_responses, "error: impulse responses changed"),
    ],
)
def test_changed_data_are_noticed(options, tau, responses, change, message, monkeypatch, capsys):
    run_training.main([*options, "--n_epochs", "1"])
    resume = ["--resume", run_of().name, "--n_epochs", "2", *change(tau.root, responses)]
    status, errors = outcome(resume, monkeypatch, capsys)
    assert status == 2
    assert message in errors and "--resume_anyway" in errors
    assert len(lines(run_of())) == 1
    run_training.main([*resume, "--resume_anyway"])
    assert len(lines(run_of())) == 2


def test_data_may_move_and_old_checkpoints_have_no_digests(options, tau, tmp_path):
    run_training.main([*options, "--n_epochs", "1"])
    moved = shutil.copytree(tau.root, tmp_path / "moved" / "tau")
    path = run_of() / "checkpoints" / "last.pt"
    run_training.main(["--resume", run_of().name, "--n_epochs", "2", "--dataset_dir", str(moved)])
    content = torch.load(path, weights_only=True)
    del content["data"]
    torch.save(content, path)
    run_training.main(["--resume", run_of().name, "--n_epochs", "3"])
    assert len(lines(run_of())) == 3


@pytest.mark.parametrize("when", ["after an epoch", "after the last one"])
def test_a_signal_during_evaluation_is_answered_before_the_next_batch(options, tmp_path, when, monkeypatch, capsys):
    arguments = [*options, "--n_epochs", "2", "--eval_every", "1" if when == "after an epoch" else "2"]
    run_training.main([*arguments, "--project_name", "whole"])
    reads, batches = [], loop.batches

    def interrupting(*positional, **options):
        is_evaluation = "n_ahead" in options
        for batch in batches(*positional, **options):
            if is_evaluation:
                reads.append(1)
                if len(reads) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "batches", interrupting)
    status, errors = outcome([*arguments, "--project_name", "stopped"], monkeypatch, capsys)
    assert status == 128 + signal.SIGTERM
    assert "all saved; resume with: python run_training.py --project_name stopped" in errors
    assert len(reads) == 2
    run_training.main(["--project_name", "stopped", "--resume", run_of(Path("stopped")).name])
    expected, resumed = weights(run_of(Path("whole"))), weights(run_of(Path("stopped")))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert without_times(run_of(Path("stopped"))) == without_times(run_of(Path("whole")))


def test_weights_that_diverge_in_the_last_step_are_not_saved(options, monkeypatch, capsys):
    run_training.main([*options, "--n_epochs", "1"])
    before = weights(run_of())
    step = loop.Update.step

    def diverging(self, model, *rest):  # the loss of the last step is finite still
        result = step(self, model, *rest)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] = torch.inf
        return result

    with monkeypatch.context() as patched:
        patched.setattr(loop.Update, "step", diverging)
        patched.setattr(run_training, "evaluate", lambda *_, **__: ({}, None))
        arguments = ["--resume", run_of().name, "--n_epochs", "2", "--batch_size", "8"]
        status, errors = outcome(arguments, monkeypatch, capsys)
    assert status == 2
    assert "not finite" in errors and "lower --lr" in errors
    assert all(torch.equal(before[name], value) for name, value in weights(run_of()).items())
    # The advice works, and is kept.
    run_training.main(["--resume", run_of().name, "--n_epochs", "2", "--lr", "0.0001"])
    assert json.loads((run_of() / "options.json").read_text())["lr"] == 0.0001
    run_training.main(["--resume", run_of().name, "--n_epochs", "3"])
    assert load_checkpoint(run_of() / "checkpoints" / "last.pt")["options"]["lr"] == 0.0001


def test_commands_to_go_on_are_quoted_and_start_as_many_processes(monkeypatch):
    for name in ("RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert resume_command("run_qat.py", "my runs", "a1") == "python run_qat.py --project_name 'my runs' --resume a1"
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    # Started by another launcher, which does not say how many there are on a machine.
    assert resume_command("run_qat.py", "p", "a").startswith("torchrun --standalone --nproc_per_node=4 run_qat.py")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command("run_qat.py", "p", "a1") == (
        "torchrun --standalone --nproc_per_node=2 run_qat.py --project_name p --resume a1"
    )
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert resume_command("run_qat.py", "p", "a1").startswith(
        "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT --nproc_per_node=2 --max_restarts=3 run_qat"
    )


def test_what_is_written_has_the_mode_that_the_umask_leaves(options, tau, tmp_path):
    """Others of the group read, and go on with, what one of them has trained."""
    before = os.umask(0o002)
    try:
        run_training.main([*options, "--n_epochs", "1", "--val_fraction", "0.5"])
        data = ["--dataset_dir", str(tau.root), "--cache_path", "cache"]
        run_teacher_logits.main([*data, "--teachers", run_of().name, "--output", "logits/l.pt"])
    finally:
        os.umask(before)
    written = [path for folder in ("DCASE23_Task1", "cache", "logits") for path in (tmp_path / folder).rglob("*")]
    assert {"last.pt", "best.pt", "l.pt", "waveforms.i16", "metrics.jsonl"} <= {path.name for path in written}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {path.name: 0o775 if path.is_dir() else 0o664 for path in written}


@pytest.mark.parametrize("text", ["", "[" * 10_000, "3", '{"script": 3}', '{"given": 7}', '{"given": [1]}', "\x00"])
def test_damaged_options_of_a_run_are_one_line(options, text, monkeypatch, capsys):
    folder = Path("DCASE23_Task1") / "r1"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "options.json").write_text(text)
    status, errors = outcome(["--resume", "r1"], monkeypatch, capsys)
    assert status == 2
    assert "options.json is damaged" in errors
