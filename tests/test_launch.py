"""What processes that torchrun starts, and starts again, agree on; without starting any."""

import logging
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import run_training
from helpers import cli, distributed
from helpers.checkpoints.checkpoint import CheckpointError
from helpers.distributed import Heartbeat, Launch, LaunchError, keep, launched_as, local_rank, main_decides, recall
from helpers.runs import run as runs
from tests.test_run_training import lines, options, outcome, responses, run_of, weights, without_times

pytestmark = pytest.mark.slow

__all__ = ["options", "responses"]  # fixtures

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}


class Command:
    """A torchrun command with one process: its store stays while processes end and others take their place."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.kept = monkeypatch, dist.HashStore()
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # as on the machines whose processes did not fail

    def start(self, arguments: list[str]) -> dict[str, float]:
        launch = Launch(self.kept, dist.PrefixStore(str(time.monotonic()), self.kept), 0, 1)
        self.monkeypatch.setattr(distributed, "_launch", lambda: launch)
        return run_training.main(arguments)

    def fail(self, arguments: list[str], module, where: str, n_times: int) -> None:
        """Starts a process that dies at the n-th call of a function."""
        calls, function = [], getattr(module, where)

        def dying(*positional, **named):
            calls.append(1)
            if len(calls) == n_times:
                raise ZeroDivisionError
            return function(*positional, **named)

        with self.monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(module, where, dying)
            self.start(arguments)


@pytest.fixture
def torchrun(monkeypatch) -> Command:
    return Command(monkeypatch)


@pytest.mark.parametrize(
    ("when", "run_id"),
    [
        ("before the first checkpoint", []),
        ("before the first checkpoint", ["--run_id", "mine"]),
        ("after an epoch", []),
    ],
)
def test_processes_started_again_go_on_with_their_run(options, torchrun, when, run_id, caplog):
    options += ["--n_epochs", "2"]
    run_training.main([*options, "--project_name", "whole"])
    caplog.set_level(logging.INFO)
    if when == "after an epoch":
        torchrun.fail([*options, *run_id], run_training, "train_one_epoch", 2)
        assert len(lines(run_of())) == 1
    else:
        torchrun.fail([*options, *run_id], runs, "save_checkpoint", 1)
        assert (run_of() / "options.json").is_file() and not list((run_of() / "checkpoints").iterdir())
    before = run_of()
    torchrun.start([*options, *run_id])
    assert run_of() == before and (not run_id or before.name == "mine")
    assert (f"run {before.name} goes on after a failure" in caplog.text) == (when == "after an epoch")
    assert without_times(run_of()) == without_times(run_of(Path("whole")))
    ours, theirs = weights(run_of()), weights(run_of(Path("whole")))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_another_run_is_not_taken_for_the_one_that_failed(options, torchrun):
    run_training.main([*options, "--run_id", "mine", "--n_epochs", "1"])
    for _ in range(2):  # torchrun starts the process again
        with pytest.raises(FileExistsError, match="run mine already exists"):
            torchrun.start([*options, "--run_id", "mine", "--n_epochs", "2"])
    assert len(lines(run_of())) == 1


def test_a_run_that_saved_nothing_can_be_begun_again(options, torchrun, monkeypatch):
    torchrun.fail([*options, "--run_id", "mine", "--lr", "0.5"], runs, "save_checkpoint", 1)
    monkeypatch.setattr(distributed, "_launch", lambda: None)
    with pytest.raises(CheckpointError, match="stopped before its first checkpoint, start it again"):
        run_training.main(["--resume", "mine"])
    run_training.main([*options, "--run_id", "mine", "--n_epochs", "1"])
    run_training.main(["--resume", "mine", "--n_epochs", "2"])
    assert len(lines(run_of())) == 2


def test_a_folder_that_is_not_shared_is_named(options, monkeypatch):
    monkeypatch.setattr("helpers.runs.options.main_decides", lambda *_: "abc")  # what process 0 says
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match=r"no run abc in DCASE23_Task1.*all machines need the same folder"):
        run_training.main(options)


def test_process_0_decides_for_all(monkeypatch):
    store = dist.HashStore()
    answers = {}

    def ask(rank: int) -> None:
        launches[threading.get_ident()] = Launch(store, store, rank, 3)
        answers[rank] = main_decides("what", lambda: f"as {rank} says")

    launches: dict[int, Launch] = {}
    monkeypatch.setattr(distributed, "_launch", lambda: launches[threading.get_ident()])
    threads = [threading.Thread(target=ask, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == dict.fromkeys(range(3), "as 0 says")


def test_one_process_has_nobody_to_ask(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    keep("run", "abc")
    assert recall("run") is None
    assert main_decides("what", lambda: "own") == "own"


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """Messages of the processes that a heartbeat has ended; one that beats 250 times as fast."""
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(distributed, "LOST_SECONDS", 0.4)
    messages = []

    def end(status: int) -> None:
        assert status == 1
        raise SystemExit  # of the thread

    monkeypatch.setattr(distributed.os, "_exit", end)
    monkeypatch.setattr(distributed, "print", lambda text, **_: messages.append(text), raising=False)
    return messages


def wait_for(n: int, ended: list[str]) -> list[str]:
    deadline = time.monotonic() + 10
    while len(ended) < n and time.monotonic() < deadline:
        time.sleep(0.01)
    return sorted(ended)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_says_nothing_any_more_ends_the_others(ended):
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    beats = [Heartbeat(server.clone(), rank, 3) for rank in range(3)]
    for beat in beats:
        beat.start()
    time.sleep(0.8)
    assert not ended  # long work alone is no loss
    beats[2].stop()
    messages = wait_for(2, ended)
    for beat in beats[:2]:
        beat.stop()
    assert [message.split(" for ")[0] for message in messages] == [
        "error: process 0 of 3 has not heard of process 2",
        "error: process 1 of 3 has not heard of process 2",
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_store_that_does_not_answer_is_a_loss_too(ended):
    answer = threading.Event()

    class Unreachable:
        def set(self, *_):
            answer.wait()

        check = get = set

    beat = Heartbeat(Unreachable(), 1, 2)
    beat.start()
    (message,) = wait_for(1, ended)
    answer.set()
    beat.stop()
    assert "process 1 of 2 has not heard of process 0" in message


def test_processes_that_never_come_are_named(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setattr(distributed, "MEETING_TIMEOUT", distributed.timedelta(seconds=0.1))
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    with pytest.raises(LaunchError, match="process 0 of 2 cannot meet the others at localhost:0: no sign of process 1"):
        distributed._launch.__wrapped__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "has RANK, which torchrun sets, but not MASTER_PORT"),
        ({"MASTER_PORT": None, "MASTER_ADDR": "", "WORLD_SIZE": None}, "not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "one"}, "has RANK='one', which torchrun sets to a whole number"),
        ({"RANK": ""}, "has RANK=''"),
        ({"RANK": "²"}, "has RANK='²'"),
        ({"RANK": "-1"}, "has RANK='-1'"),
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT 70000, which cannot be"),
        ({"LOCAL_RANK": "x"}, "has LOCAL_RANK='x'"),
    ],
)
def test_half_an_environment_of_torchrun_is_one_line(options, changes, message, monkeypatch, capsys):
    for name, value in (ENVIRONMENT | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.time, "sleep", lambda _: None)
    distributed._launch.cache_clear()
    with pytest.raises(LaunchError, match=message.replace("²", ".")):
        launched_as(), local_rank()
    if "LOCAL_RANK" not in changes:
        status, errors = outcome(options, monkeypatch, capsys)
        assert status == 2 and message in errors and "Traceback" not in errors


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_one_prints(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    for argument in ("--dry_run", "--help"):
        monkeypatch.setattr(sys, "argv", ["run_training.py", argument])
        with pytest.raises(SystemExit) as ended:
            cli.run(run_training.main)
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and bool(printed) == (rank == "0")
