"""Searches: their spaces, their limits, several processes at once, and what is left when one of them is killed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import yaml

import run_search
from datasets.tau import DataError, read_meta
from helpers.data import DataConfig, load_data
from helpers.search.page import importances, write_results
from helpers.search.space import SearchError, draw, read_space
from helpers.search.study import DIGEST, WORKER, finished, me, next_trial, open_study
from tests.conftest import make_tau

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "run_search.py"
SPACE = {
    "lr": {"low": "1e-4", "high": "1e-2", "log": True},
    "weight_decay": {"low": 0, "high": 1},
    "batch_size": {"low": 4, "high": 8, "step": 2},
    "model": {"cp_mobile": {"base_channels": [8, 16]}, "dcase24_baseline": None},
    "augment": [[], ["freq_mixstyle", "time_roll"]],
}
SMALL = ["--loss", "cross_entropy", "--augment", "time_roll", "--roll", "400", "--n_epochs", "2", "--batch_size", "8",
         "--resample_rate", "8000", "--window_size", "256", "--hop_size", "125", "--n_fft", "512", "--n_mels", "64",
         "--dataset_dir", "own", "--cache_path", "cache", "--project_name", "proj", "--val_fraction", "0.5",
         "--warm_up_len", "1", "--ramp_down_start", "1", "--ramp_down_len", "1"]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAU22_DIR", raising=False)
    folder = make_tau(tmp_path / "own", ["kitchen", "office"], ["phone", "webcam"], ["phone", "webcam"], n_segments=2,
                      rate=8000, seconds=0.5)  # fmt: skip
    rows = [row[0] for row in folder.rows]
    more = [folder.add(row[1], "rome", 90 + i, 0, row[3]) for i, row in enumerate(folder.rows[:8])]
    folder.write_lists(
        [file for file in rows if "paris" in file] + more, [file for file in rows if "paris" not in file]
    )
    write_space(SPACE)
    return tmp_path


def write_space(space) -> None:
    Path("space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))


def fixed(**params) -> optuna.trial.FixedTrial:
    return optuna.trial.FixedTrial(params)


def test_a_space_is_drawn_in_the_types_of_its_options(here):
    whole = run_search._whole_numbers({})
    space = read_space(Path("space.yaml"))
    trial = fixed(**{"lr": 1e-3, "weight_decay": 0.5, "batch_size": 6, "model": "cp_mobile",
                     "cp_mobile.base_channels": 16, "augment": '["freq_mixstyle", "time_roll"]'})  # fmt: skip
    assert draw(trial, space, whole) == {
        "lr": 1e-3, "weight_decay": 0.5, "batch_size": 6, "model": "cp_mobile", "base_channels": 16,
        "augment": ["freq_mixstyle", "time_roll"],
    }  # fmt: skip
    kinds = {name: type(kind).__name__ for name, kind in trial.distributions.items()}
    assert kinds == {
        "lr": "FloatDistribution",
        "weight_decay": "FloatDistribution",
        "batch_size": "IntDistribution",
    } | dict.fromkeys(("model", "cp_mobile.base_channels", "augment"), "CategoricalDistribution")
    other = fixed(lr=1e-3, weight_decay=0.5, batch_size=4, model="dcase24_baseline", augment="[]")
    assert "base_channels" not in draw(other, space, whole)


BAD = [
    ({"lrr": [1]}, SearchError, "no option lrr, the nearest is lr"),
    ({"lr": {"low": 1, "high": 0}}, SearchError, "low < high"),
    ({"lr": {"low": 0, "high": 1, "log": True}}, SearchError, "above 0"),
    ({"lr": {"low": 0, "high": float("inf")}}, SearchError, "must be numbers"),
    ({"lr": {"low": "a", "high": 1}}, SearchError, "must be numbers"),
    ({"lr": {"low": 0, "high": 1, "base": 2}}, SearchError, "has base; known: low, high, log, step"),
    ({"lr": 3}, SearchError, "must be a list of values"),
    ({"lr": [-1]}, SearchError, "lr"),
    ({"model": ["cp_mobil"]}, SearchError, "model"),
    ({"model": {"cnn3": {"expansion_rate": [2]}}}, SearchError, "no option expansion_rate"),
    ({}, SearchError, "names no options to search"),
]


@pytest.mark.parametrize(("space", "error", "message"), BAD, ids=[case[2][:30] for case in BAD])
def test_bad_spaces_are_one_line_and_nothing_is_written(here, space, error, message):
    write_space(space)
    with pytest.raises(error, match=message):
        run_search.main([*SMALL, "--search", "space.yaml"])
    assert not Path("proj").exists()


def test_what_else_does_not_fit_is_said(here, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_search.main(SMALL)
    with pytest.raises(SystemExit, match="2"):
        run_search.main([*SMALL, "--search", "space.yaml", "--val_fraction", "0"])
    said = capsys.readouterr().err
    assert "--search is needed" in said and "needs training recordings that are held out" in said
    with pytest.raises(SearchError, match=r"--storage postgresql://127.0.0.1:9/x cannot be used"):
        run_search.main([*SMALL, "--search", "space.yaml", "--storage", "postgresql://127.0.0.1:9/x"])
    with pytest.raises(SearchError, match="--storage nosuch://x cannot be used"):
        run_search.main([*SMALL, "--search", "space.yaml", "--storage", "nosuch://x"])
    Path("a_file").touch()
    with pytest.raises(SearchError, match="--storage a_file/journal cannot be used"):
        run_search.main([*SMALL, "--search", "space.yaml", "--storage", "a_file/journal"])


def test_nothing_over_the_limits_is_trained(here, monkeypatch):
    monkeypatch.setattr(run_search, "MOST_DRAWS", 5)
    monkeypatch.setattr(run_search, "run_trial", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(SearchError, match=r"5 draws from space.yaml in a row cannot be trained; the last: [\d,]+ MACs"):
        run_search.main([*SMALL, "--search", "space.yaml", "--max_macs", "1000"])
    with pytest.raises(SearchError, match="bytes of activations, limit 10"):
        run_search.main([*SMALL, "--search", "space.yaml", "--max_ram", "10"])
    rows = list(csv.DictReader(Path("proj/space/results.csv").open()))
    assert len(rows) == 10 and {row["state"] for row in rows} == {"over the limits"}
    with pytest.raises(SearchError, match="5 draws from"):  # where things are is another matter
        run_search.main([*SMALL, "--cache_path", "elsewhere", "--search", "space.yaml", "--max_macs", "1000"])
    with pytest.raises(SearchError, match=r"study space in proj/space/journal.log is of another recipe"):
        run_search.main([*SMALL, "--lr", "0.1", "--search", "space.yaml"])


def test_trials_that_cannot_be_trained_are_told(here):
    write_space({"lr": SPACE["lr"]})
    with pytest.raises(SearchError, match=r"no trial has come to its end; the last: error: .*no_such_file"):
        run_search.main([*SMALL, "--search", "space.yaml", "--n_trials", "1", "--pretrained", "no_such_file"])
    assert [row["state"] for row in results()] == ["fail"]


def test_trials_of_processes_that_are_gone_come_first(tmp_path):
    study = open_study("s", str(tmp_path / "j.log"), "none", 0, "digest")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = me().rpartition(":")[0]
    for worker in ("elsewhere:1", f"{host}:1", f"{host}:{dead.pid}"):  # 1: init, which is alive
        study.ask().set_user_attr(WORKER, worker)
    trial, _ = next_trial(study, 4)
    assert trial.number == 2 and trial.user_attrs[WORKER] == me()
    study.tell(trial, 1.0)
    assert next_trial(study, 4)[0].number == 3
    study.tell(3, 2.0)
    assert next_trial(study, 4) is None
    assert [one.number for one in finished(study)] == [3, 2] and study.user_attrs[DIGEST] == "digest"


def test_the_page_says_which_options_matter(tmp_path):
    study = open_study("s", str(tmp_path / "j.log"), "median", 3, "digest")
    assert study.pruner._n_warmup_steps == 3
    write_results(tmp_path, study, "val/acc")
    assert "0 trials" in (tmp_path / "search.html").read_text()
    for i in range(20):
        trial = study.ask()
        lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
        trial.suggest_categorical("augment", ["[]", '["time_roll"]'])
        trial.report(0.1, i % 3)
        study.tell(trial, 1 - abs(lr - 1e-3) / 1e-2)
    assert [*importances(study)] == ["lr", "augment"] and importances(study)["lr"] > 0.7
    write_results(tmp_path, study, "val/acc")
    page = (tmp_path / "search.html").read_text()
    assert page.index('scope="row">lr<') < page.index('scope="row">augment<') and "20 complete" in page
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    best = max(rows, key=lambda row: float(row["score"]))
    assert int(best["trial"]) == finished(study)[0].number == study.best_trial.number
    assert [int(row["epochs"]) for row in rows] == [1 + i % 3 for i in range(20)]


def test_devices_are_kept_out_of_training(here):
    def load(devices: str | None):
        return load_data(
            DataConfig(dataset_dir="own", cache_path="cache", val_fraction=0.5, val_devices=devices), 8000, 0
        )

    whole, data = load(None), load("webcam")
    devices = data.meta.recording_devices
    assert {devices[i] for i in data.train.recording_device.tolist()} == {"phone"}
    assert data.val.files.tolist() == whole.val.files.tolist() and data.groups["held_out"] == ("webcam",)
    assert set(data.train.files) < set(whole.train.files)
    with pytest.raises(DataError, match="--val_devices radio: the training part and what is held out have clips of"):
        load("radio")
    with pytest.raises(DataError, match="leaves no clips"):
        load("webcam, phone")
    with pytest.raises(ValueError, match="val_fraction above 0"):
        DataConfig(val_devices="phone")
    assert read_meta("own").recording_devices == ("phone", "webcam")


def test_a_trial_that_falls_behind_is_stopped(here, monkeypatch):
    write_space({"lr": SPACE["lr"]})
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: True)
    run_search.main([*SMALL, "--search", "space.yaml", "--n_trials", "1", "--n_epochs", "500"])
    (row,) = results()
    assert row["state"] == "pruned" and 1 <= int(row["epochs"]) < 100
    assert "stopped by SIGTERM" in Path("proj/space-0000/log.txt").read_text()


def test_the_example_is_a_space(here):
    path = SCRIPT.parent / "recipes/spaces/student.yaml"
    run_search.check_space(read_space(path), {}, run_search.training_parser, path)


# ---- processes ------------------------------------------------------------------------------------------------------


def start(n_trials: int, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *SMALL, "--search", "space.yaml", "--n_trials", str(n_trials), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(found, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def results() -> list[dict[str, str]]:
    return list(csv.DictReader(Path("proj/space/results.csv").open()))


def test_a_search_that_is_killed_goes_on_without_losing_or_repeating_a_trial(here):
    write_space({"lr": SPACE["lr"], "base_channels": [8, 16]})
    options = ["--n_epochs", "40", "--pruner", "none", "--objective", "val/acc/held_out", "--val_devices", "webcam"]
    first = start(2, *options)
    wait_for(lambda: Path("proj/space-0000/metrics.jsonl").is_file())
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(2, *options)
    said, _ = second.communicate(timeout=200)
    assert second.returncode == 0, said
    rows = results()
    assert [(row["trial"], row["state"], row["epochs"]) for row in rows] == [
        ("0", "complete", "40"),
        ("1", "complete", "40"),
    ]
    for row in rows:
        lines = [json.loads(line) for line in Path("proj", row["run"], "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [*range(40)]
        assert float(row["score"]) == lines[-1]["val/acc/held_out"]
    assert sorted(path.name for path in Path("proj").iterdir()) == ["space", "space-0000", "space-0001"]
    assert "stopped by SIGTERM" in Path("proj/space-0000/log.txt").read_text()  # it saved when its search had died
    page = Path("proj/space/search.html").read_text()
    assert "2 complete" in page and "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The address of a data base on this machine."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("needs PostgreSQL (initdb and pg_ctl, Debian's package postgresql)")
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    with tempfile.TemporaryDirectory(prefix="asc-") as folder:
        as_user: list[str] = []
        if os.getuid() == 0:  # which PostgreSQL does not run as
            as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            shutil.chown(folder, "nobody", "nogroup")

        def run(*command: str) -> None:
            with open(f"{folder}/said", "a") as said:
                done = subprocess.run([*as_user, *command], cwd=folder, stdout=said, stderr=said)
            assert done.returncode == 0, Path(folder, "said").read_text()

        run("initdb", "-D", "data", "-U", "asc", "--auth=trust", "--no-sync")
        serve = f"-c listen_addresses='' -k {folder} -c fsync=off"
        run("pg_ctl", "-D", "data", "-o", serve, "-l", "log", "-w", "start")
        try:
            yield f"postgresql+psycopg2://asc@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", "data", "-m", "immediate", "stop")


def test_two_processes_share_a_study_in_postgresql(here, postgresql):
    write_space({"lr": SPACE["lr"], "model": SPACE["model"]})
    both = [start(4, "--storage", postgresql, "--n_epochs", "3") for _ in range(2)]
    for process in both:
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
    rows = results()
    assert sorted(int(row["trial"]) for row in rows) == [0, 1, 2, 3]
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    assert len({row["lr"] for row in rows}) == 4
