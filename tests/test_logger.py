import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.runs import wandb_logger
from helpers.runs.logger import LOGGERS, RunLogger

pytestmark = pytest.mark.slow


def lines_of(run: RunLogger) -> list[dict]:
    return [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def project(tmp_path) -> str:
    return str(tmp_path / "project")


def start(project: str, run_id: str | None = None, **arguments) -> RunLogger:
    return RunLogger(project, run_id, {"lr": 0.001}, arguments.pop("backends", ["none"]), **arguments)


# --- run folder


def test_run_folder_holds_options_metrics_and_a_place_for_checkpoints(tmp_path):
    options = {
        "lr": 0.001,
        "dirs_path": Path("a/b"),
        "n_blocks": (3, 2, 1),
        "fmax": None,
        "limit": math.inf,
        "on": True,
    }
    with RunLogger(str(tmp_path / "project"), None, options, ["none"]) as run:
        run.write(0, {"test/acc": np.float32(0.5), "test/count": 7, "train/loss": torch.tensor(0.25)})
        run.write(1, {"test/acc": 0.75})
    assert re.fullmatch("[a-z0-9]{8}", run.id)
    assert run.dir == tmp_path / "project" / run.id
    assert run.checkpoint_dir == run.dir / "checkpoints" and run.checkpoint_dir.is_dir()
    plain = {"lr": 0.001, "dirs_path": "a/b", "n_blocks": [3, 2, 1], "fmax": None, "limit": None, "on": True}
    assert json.loads((run.dir / "options.json").read_text()) == plain
    assert lines_of(run) == [
        {"epoch": 0, "test/acc": 0.5, "test/count": 7, "train/loss": 0.25},
        {"epoch": 1, "test/acc": 0.75},
    ]
    assert {path.name for path in run.dir.iterdir()} == {"options.json", "metrics.jsonl", "checkpoints"}


def test_metrics_are_on_disk_as_soon_as_they_are_written(project):
    run = start(project)  # never closed, as after a kill
    run.write(0, {"test/acc": 0.5})
    assert lines_of(run) == [{"epoch": 0, "test/acc": 0.5}]


def test_nan_and_infinity_become_null(project):
    with start(project) as run:
        run.write(0, {"a": math.nan, "b": -math.inf, "c": np.float64("nan"), "d": 1.0})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = json.loads((run.dir / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"epoch": 0, "a": None, "b": None, "c": None, "d": 1.0}


def test_ids_differ_although_the_seed_does_not(project):
    ids = set()
    for _ in range(3):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        ids.add(start(project).id)
    assert len(ids) == 3


@pytest.mark.parametrize("run_id", ["../other", "a/b", "a\\b", "", ".hidden", "x" * 129, "a b"])
def test_refuses_an_id_that_is_no_folder_name(project, run_id):
    with pytest.raises(ValueError, match="run id"):
        start(project, run_id)
    assert not Path(project).exists()


def test_an_unknown_backend_lists_the_known_ones(project):
    with pytest.raises(ValueError, match=r"'csv'.*wandb, tensorboard, none"):
        start(project, backends=["none", "csv"])
    assert not Path(project).exists()


def test_a_new_run_does_not_write_into_an_old_one(project):
    start(project, "abcd1234").write(0, {"test/acc": 0.5})
    with pytest.raises(FileExistsError, match="abcd1234 already exists"):
        start(project, "abcd1234")


def test_backends_get_the_same_metrics_and_the_end_of_the_run(project, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, run):
            seen.append((run.id, run.project, run.experiment_name, run.options, run.resume_epoch))

        def write(self, epoch, metrics):
            seen.append((epoch, metrics))

        def close(self, failed=False):
            seen.append(failed)

    monkeypatch.setitem(LOGGERS, "recorder", Recorder)
    with start(project, "abcd1234", backends=["recorder", "none"], experiment_name="exp") as run:
        run.write(0, {"test/acc": 0.5})
    run.close()  # a second time does nothing
    assert seen == [("abcd1234", "project", "exp", {"lr": 0.001}, None), (0, {"test/acc": 0.5}), False]
    with pytest.raises(KeyboardInterrupt), start(project, backends=["recorder"]):
        raise KeyboardInterrupt
    assert seen[-1] is True


# --- resuming


@pytest.mark.parametrize("torn", ["", '{"epoch": 3, "test/a', '{"epoch": 1', '{"epoch": 3, "test/acc": 0.5}', "\0\0\0"])
@pytest.mark.parametrize("n_finished", [0, 2, 3, 4])
def test_resuming_drops_what_the_checkpoint_has_not_finished(project, torn, n_finished):
    run = start(project, "abcd1234")
    for epoch in range(3):
        run.write(epoch, {"test/acc": epoch / 10})
    before = lines_of(run)
    with (run.dir / "metrics.jsonl").open("a") as file:
        file.write(torn)

    resumed = RunLogger(project, "abcd1234", {"lr": 5.0}, ["none"], resume_epoch=n_finished)
    assert lines_of(resumed) == before[:n_finished]
    resumed.write(n_finished, {"test/acc": 0.9})
    assert lines_of(resumed) == [*before[:n_finished], {"epoch": n_finished, "test/acc": 0.9}]
    assert json.loads((run.dir / "options.json").read_text()) == {"lr": 0.001}
    assert not list(run.dir.glob("*.tmp"))


def test_no_epoch_is_written_twice(project):
    run = start(project)
    run.write(0, {"test/acc": 0.5})
    with pytest.raises(ValueError, match="epoch 0"):
        run.write(0, {"test/acc": 0.6})
    assert len(lines_of(run)) == 1


# --- tensorboard


def test_tensorboard_can_be_read_back_and_has_no_epoch_twice_after_resuming(project):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with start(project, "abcd1234", backends=["tensorboard"]) as run:
        for epoch in range(4):
            run.write(epoch, {"test/acc": epoch / 4, "test/loss": math.nan})
    with start(project, "abcd1234", backends=["tensorboard"], resume_epoch=2) as run:
        run.write(2, {"test/acc": 0.9})
    events = EventAccumulator(str(run.dir / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("test/acc")] == [(0, 0.0), (1, 0.25), (2, pytest.approx(0.9))]
    assert len(events.Scalars("test/loss")) == 2


# --- W&B

SCRIPT = """
import sys, time, logging
before = sys.stdout
from helpers.runs.logger import RunLogger
import helpers.report.report
slow = {"wandb", "matplotlib", "tensorboard", "torch"} & set(sys.modules)
assert not slow, f"imported too early: {slow}"
started = time.monotonic()
logging.basicConfig(level=logging.INFO, format="%(message)s")
with RunLogger(sys.argv[1], "abcd1234", {"lr": 0.1}, experiment_name="exp") as run:
    for epoch in range(3):
        run.write(epoch, {"test/acc": epoch / 3, "nan": float("nan")})
assert sys.stdout is before
print(time.monotonic() - started)
"""


def run_with_wandb(tmp_path: Path, **environment: str) -> tuple[float, float, str]:
    """A run of its own process with W&B, alone in its home; seconds in the logger and altogether, standard error."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    (tmp_path / "home").mkdir()
    environment = kept | {"HOME": str(tmp_path / "home"), "PYTHONPATH": "."} | environment
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "project")],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout), time.monotonic() - started, done.stderr


@pytest.fixture
def silent_server():
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_wandb_without_account_or_network_records_offline(tmp_path):
    seconds, _, stderr = run_with_wandb(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9")
    folder = tmp_path / "project" / "abcd1234" / "wandb"
    assert stderr.splitlines() == [
        f"W&B records offline (not logged in, see `wandb login`); to upload it later: wandb sync {folder}"
    ]
    assert seconds < 15  # about 2 s on a quiet machine, nearly all of it W&B's own imports
    (recorded,) = folder.glob("offline-run-*-abcd1234/run-abcd1234.wandb")
    assert b"test/acc" in recorded.read_bytes()
    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(folder)],
        env=os.environ | {"HOME": str(tmp_path / "home")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Would sync 1 run" in listed.stdout + listed.stderr


def test_wandb_server_that_never_answers_does_not_block(tmp_path, silent_server):
    seconds, total, stderr = run_with_wandb(tmp_path, WANDB_BASE_URL=silent_server, WANDB_API_KEY="a" * 40)
    assert f"no answer from {silent_server}" in stderr and len(stderr.splitlines()) == 1
    assert seconds < 18  # 3 s of waiting
    assert total - seconds < 8  # nothing waits at the end of the process either: W&B's usage reports did, for 10 s
    assert list((tmp_path / "project" / "abcd1234" / "wandb").glob("offline-run-*-abcd1234"))


class FakeWandb:
    """W&B's interface as far as it is used; `fails` names the calls that raise."""

    Error = RuntimeError
    Settings = SimpleNamespace

    def __init__(self, mode: str = "online", logged_in: bool = True, fails: tuple[str, ...] = ()):
        self.mode, self.logged_in, self.fails = mode, logged_in, fails
        self.calls: list[tuple] = []

    def setup(self, settings):
        assert settings.silent
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode, base_url="http://127.0.0.1:9"))

    def login(self, prompt, verify):
        assert not prompt  # it would wait for an answer
        return self.logged_in

    def teardown(self):
        self.calls.append(("teardown",))

    def init(self, mode, settings, **arguments):
        assert settings.silent and settings.console == "off"
        self.calls.append(("init", mode, arguments["id"], arguments["resume"], str(arguments["dir"])))
        self._raise_if(f"init {mode}")
        return self

    url = "http://127.0.0.1:9/project/runs/abcd1234"

    def log(self, metrics, step, commit):
        self._raise_if("log")
        self.calls.append(("log", step, metrics))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))
        self._raise_if("finish", TimeoutError)

    def _raise_if(self, name: str, kind: type[Exception] = RuntimeError):
        if name in self.fails:
            raise kind(f"{name} failed\nsecond line")


@pytest.fixture
def run_fake(project, monkeypatch, caplog):
    """Runs two epochs with a fake W&B whose server answers, or not; gives its calls and the messages."""

    def run(fake: FakeWandb | None, answers: bool = True, wandb_mode: str | None = None) -> tuple[list, list[str]]:
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monkeypatch.setattr(wandb_logger, "_answers", lambda url, seconds: answers)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if wandb_mode is not None:
            monkeypatch.setenv("WANDB_MODE", wandb_mode)
        with (
            caplog.at_level(logging.INFO, "helpers.runs.wandb_logger"),
            start(project, "abcd1234", backends=["wandb"]) as run,
        ):
            run.write(0, {"test/acc": 0.5})
            run.write(1, {"test/acc": 0.6})
        assert [line["test/acc"] for line in lines_of(run)] == [0.5, 0.6]
        return (fake.calls if fake else []), caplog.messages

    return run


def test_wandb_with_account_and_network_goes_online_under_the_runs_id(run_fake, project):
    calls, messages = run_fake(FakeWandb())
    assert calls == [
        ("init", "online", "abcd1234", "allow", f"{project}/abcd1234"),
        ("log", 0, {"epoch": 0, "test/acc": 0.5}),
        ("log", 1, {"epoch": 1, "test/acc": 0.6}),
        ("finish", 0),
    ]
    assert messages == [f"W&B: {FakeWandb.url}"]


@pytest.mark.parametrize(
    ("fake", "answers", "wandb_mode", "reason"),
    [
        (FakeWandb(logged_in=False), True, None, "not logged in"),
        (FakeWandb(logged_in=False), True, "online", "not logged in"),
        (FakeWandb(), False, None, "no answer from http://127.0.0.1:9"),
        (FakeWandb(mode="offline"), True, "offline", "WANDB_MODE=offline"),
        (FakeWandb(mode="dryrun"), True, "dryrun", "WANDB_MODE=dryrun"),
        (FakeWandb(mode="offline"), True, None, "setting of `wandb offline`"),
    ],
)
def test_wandb_goes_offline_and_says_why_and_how_to_sync(run_fake, fake, answers, wandb_mode, reason):
    calls, messages = run_fake(fake, answers, wandb_mode)
    assert [call[:2] for call in calls] == [("init", "offline"), ("log", 0), ("log", 1), ("finish", 0)]
    assert len(messages) == 1 and reason in messages[0] and "wandb sync " in messages[0]


def test_wandb_mode_online_is_not_second_guessed(run_fake):
    calls, _ = run_fake(FakeWandb(), answers=False, wandb_mode="online")
    assert calls[0][:2] == ("init", "online")


def test_wandb_mode_disabled_records_nothing(run_fake):
    calls, messages = run_fake(FakeWandb(mode="disabled"), wandb_mode="disabled")
    assert calls == [] and messages == ["W&B is switched off (WANDB_MODE=disabled)"]


def test_wandb_that_refuses_the_run_is_recorded_offline(run_fake):
    calls, messages = run_fake(FakeWandb(fails=("init online",)))
    assert [call[:2] for call in calls][:3] == [("init", "online"), ("teardown",), ("init", "offline")]
    assert len(messages) == 1 and "init online failed" in messages[0] and "second line" not in messages[0]


@pytest.mark.parametrize("fails", [("log",), ("init online", "init offline")], ids=["while running", "at the start"])
def test_a_failure_of_wandb_does_not_end_the_run(run_fake, fails):
    _, messages = run_fake(FakeWandb(fails=fails))
    stopped = [message for message in messages if "stops recording" in message]
    assert len(stopped) == 1 and f"{fails[-1]} failed" in stopped[0]


def test_wandb_that_does_not_upload_in_time_says_how_to_sync(run_fake):
    _, messages = run_fake(FakeWandb(fails=("finish",)))
    assert "wandb sync --include-online" in messages[-1]


def test_goes_on_without_wandb_where_it_is_not_installed(run_fake):
    _, messages = run_fake(None)  # None in sys.modules makes the import fail
    assert len(messages) == 1 and "cannot be imported" in messages[0] and "pip install wandb" in messages[0]
