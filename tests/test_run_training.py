"""The training script as its users meet it: on a small data set, killed, resumed, with all that can be wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import run_training
from helpers import cli
from helpers.checkpoints.checkpoint import CheckpointError, load_checkpoint, load_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# A front end and a network small enough for seconds of training.
SMALL = [
    "--logger", "none", "--resample_rate", "8000", "--window_size", "256", "--hop_size", "125", "--n_fft", "512",
    "--n_mels", "32", "--fmax_aug_range", "200", "--freqm", "8", "--roll", "400", "--base_channels", "8",
    "--batch_size", "8", "--warm_up_len", "1", "--n_epochs", "3",
]  # fmt: skip


@pytest.fixture
def responses(tmp_path) -> Path:
    folder = tmp_path / "irs"
    folder.mkdir()
    for i in range(3):
        response = np.random.default_rng(i).normal(size=400) * np.exp(-np.arange(400) / 30)
        soundfile.write(folder / f"{i}.wav", 0.3 * response, 44100, subtype="PCM_24")
    return folder


@pytest.fixture
def options(tau, responses, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAU22_DIR", raising=False)
    return [
        *SMALL,
        "--dataset_dir",
        str(tau.root),
        "--dirs_path",
        str(responses),
        "--cache_path",
        str(tmp_path / "cache"),
    ]


def run_of(folder: Path = Path("DCASE23_Task1")) -> Path:
    (run,) = folder.iterdir()
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / "last.pt")["model"]["state"]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run: Path) -> list[dict]:
    timed = ("train/seconds", "train/clips_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines(run)]


@pytest.mark.plots
def test_a_run_leaves_everything_it_promises(options, capsys):
    metrics = run_training.main([*options, "--n_epochs", "2"])
    run = run_of()
    assert {path.name for path in run.iterdir()} == {
        ".lock", "options.json", "config.yaml", "metrics.jsonl", "checkpoints", "curves.png",
        "confusion_matrix.png", "report.md", "report.html", "devices.png", "reliability.png",
    }  # fmt: skip
    assert all((run / name).stat().st_size > 10_000 for name in ("curves.png", "confusion_matrix.png"))
    assert [line["epoch"] for line in lines(run)] == [0, 1]
    assert lines(run)[1]["test/acc"] == metrics["test/acc"]
    assert {"test/acc/real", "test/acc/unseen", "test/acc/device/s4", "test/acc/city/milan"} <= set(metrics)
    assert os.listdir(run / "checkpoints") == ["last.pt"]  # no best without a held-out part
    assert "last epoch: test accuracy" in capsys.readouterr().out
    loaded = load_model(run / "checkpoints" / "last.pt")
    assert loaded.scenes[1] == "bus"
    assert loaded.frontend.config.n_mels == 32


def test_training_learns(options):
    """27 clips of three tones: the loss of the last epoch is far below that of guessing."""
    metrics = run_training.main([*options, "--n_epochs", "12", "--lr", "0.01", "--mixstyle_p", "0", "--dir_prob", "0"])
    assert metrics["train/loss"] < 0.5 * np.log(10)
    assert metrics["test/acc"] > 0.6


def test_the_same_seed_gives_the_same_run_and_another_does_not(options, tmp_path):
    for name, seed in (("one", "5"), ("two", "5"), ("three", "6")):
        run_training.main([*options, "--project_name", name, "--seed", seed, "--n_epochs", "1"])
    one, two, three = (weights(run_of(tmp_path / name)) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_training.py"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("save_minutes", ["10", "0"], ids=["within an epoch", "after every step"])
def test_a_killed_run_ends_with_the_same_bits(options, tmp_path, save_minutes):
    arguments = [*options, "--n_epochs", "5", "--save_minutes", save_minutes]
    run_training.main([*arguments, "--project_name", "whole"])
    process = start([*arguments, "--n_epochs", "5", "--project_name", "killed"], tmp_path)
    killed = tmp_path / "killed"
    wait_for(process, lambda: any(len(p.read_text().splitlines()) >= 2 for p in killed.glob("*/metrics.jsonl")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = run_of(killed)
    assert load_checkpoint(run / "checkpoints" / "last.pt")["loop"]["epoch"] < 5
    run_training.main(["--project_name", "killed", "--resume", run.name])
    expected, resumed = weights(run_of(tmp_path / "whole")), weights(run)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert without_times(run) == without_times(run_of(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_finishes_its_step_saves_and_says_how_to_go_on(options, tmp_path, number):
    arguments = [*options, "--n_epochs", "200", "--eval_every", "200"]
    process = start([*arguments, "--project_name", "stopped"], tmp_path)
    stopped = tmp_path / "stopped"
    wait_for(process, lambda: any(p.read_text() for p in stopped.glob("*/metrics.jsonl")))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    run = run_of(stopped)
    assert process.returncode == 128 + number
    assert f"resume with: python run_training.py --project_name stopped --resume {run.name}" in errors
    assert "Traceback" not in errors
    loop = load_checkpoint(run / "checkpoints" / "last.pt")["loop"]
    n_epochs = str(loop["epoch"] + 1)
    run_training.main(["--project_name", "stopped", "--resume", run.name, "--n_epochs", n_epochs])
    run_training.main([*arguments, "--project_name", "whole", "--n_epochs", n_epochs])
    expected, resumed = weights(run_of(tmp_path / "whole")), weights(run)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_finished_run_resumes_to_its_report(options, capsys):
    first = run_training.main([*options, "--n_epochs", "1"])
    again = run_training.main(["--resume", run_of().name])
    assert {key: value for key, value in first.items() if key.startswith("test/")} == again
    run_training.main(["--resume", run_of().name, "--n_epochs", "2"])
    assert [line["epoch"] for line in lines(run_of())] == [0, 1]


def test_a_held_out_part_gives_the_temperature_of_the_logits(options):
    run_training.main([*options, "--n_epochs", "1", "--val_fraction", "0.4", "--run_id", "held"])
    run_training.main([*options, "--n_epochs", "1", "--run_id", "plain"])
    content = load_checkpoint("DCASE23_Task1/held/checkpoints/last.pt")
    assert 0.05 <= content["temperature"] <= 20 and "temperature" not in load_checkpoint(
        "DCASE23_Task1/plain/checkpoints/last.pt"
    )


def test_best_is_kept_only_for_a_held_out_part(options):
    metrics = run_training.main([*options, "--val_fraction", "0.34"])
    assert sorted(os.listdir(run_of() / "checkpoints")) == ["best.pt", "last.pt"]
    assert metrics["val/count"] == 9
    best = load_checkpoint(run_of() / "checkpoints" / "best.pt")
    accuracies = [line["val/acc"] for line in lines(run_of())]
    assert best["loop"]["epoch"] == 1 + int(np.argmax(accuracies))


def test_a_data_set_with_its_own_labels_and_devices(own_tau, responses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = run_training.main([*SMALL, "--dataset_dir", str(own_tau.root), "--dirs_path", str(responses)])
    assert {"test/acc/seen", "test/acc/unseen", "test/acc/scene/kitchen", "test/acc/device/webcam"} <= set(metrics)
    assert load_model(run_of() / "checkpoints" / "last.pt").scenes == ("kitchen", "office", "yard")


def test_teacher_logits_of_a_file_are_used(options, tau, tmp_path):
    from datasets.tau import read_meta

    meta = read_meta(tau.root)
    logits = 5 * torch.nn.functional.one_hot(torch.from_numpy(meta.scene), 10).half()
    torch.save({"files": meta.files.tolist(), "logits": logits, "scenes": list(meta.scenes)}, tmp_path / "own.pt")
    metrics = run_training.main([*options, "--teacher_logits", str(tmp_path / "own.pt"), "--n_epochs", "1"])
    assert metrics["train/kd_loss"] > 0
    assert metrics["train/loss"] == pytest.approx(metrics["train/label_loss"] + metrics["train/kd_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "extra",
    [
        ["--precision", "bf16"],
        ["--precision", "fp16"],
        ["--no-channels_last", "--num_workers", "0"],
        ["--data_on_device", "yes", "--dir_devices", "all"],
        ["--channels_multiplier", "1.8", "--expansion_rate", "2.1", "--fmin", "50.5"],
        ["--timem", "4", "--mixstyle_p", "1", "--dir_devices", "a,b"],
    ],
)
def test_options_work(options, extra):
    metrics = run_training.main([*options, "--n_epochs", "1", *extra])
    assert np.isfinite(metrics["train/loss"])


def test_defaults_are_the_published_recipe():
    args = run_training.make_parser().parse_args([])
    published = {
        "project_name": "DCASE23_Task1", "experiment_name": "CPJKU_cp-mobile_student_training", "in_channels": 1,
        "cache_path": "datasets/cpath", "base_channels": 32, "channels_multiplier": 2.3, "expansion_rate": 3,
        "n_epochs": 150, "batch_size": 256, "mixstyle_p": 0.4, "mixstyle_alpha": 0.3, "weight_decay": 0.0001,
        "roll": 4000, "dir_prob": 0.6, "temperature": 2.0, "kd_lambda": 0.02, "lr": 0.0009, "warm_up_len": 14,
        "ramp_down_start": 50, "ramp_down_len": 84, "last_lr_value": 0.005,
        "resample_rate": 32000, "window_size": 3072, "hop_size": 500,
        "n_fft": 4096, "n_mels": 256, "freqm": 48, "timem": 0, "fmin": 0, "fmax": None, "fmin_aug_range": 1,
        "fmax_aug_range": 1000,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published


def test_help_and_dry_run_need_no_data(capsys):
    with pytest.raises(SystemExit) as caught:
        run_training.main(["--help"])
    assert caught.value.code == 0
    assert "--dir_prob" in capsys.readouterr().out
    result = run_training.main(["--dry_run", "--enforce_limits"])
    assert result == {"n_parameters": 126_952, "macs": 28_889_088}
    printed = capsys.readouterr().out
    for expected in ("channels_multiplier      2.3\n", "stages.s1.b1.block.1", "29,561,088", "within the limits"):
        assert expected in printed


@pytest.mark.parametrize("extra", [["--dry_run"], []], ids=["dry run", "training"])
def test_a_network_over_the_limits_is_refused_when_asked(options, extra, monkeypatch, capsys):
    wide = [*options, "--base_channels", "64", "--expansion_rate", "4", "--resample_rate", "8000", "--n_mels", "256"]
    status, errors = outcome([*wide, "--enforce_limits", *extra], monkeypatch, capsys)
    assert status == 2
    assert errors.strip().splitlines()[-1].startswith("error: the network is over the challenge's limits: ")
    assert "bytes of parameters at int8, limit 128,000; " in errors
    assert "MACs for one clip, limit 30,000,000" in errors
    assert "Traceback" not in errors
    assert not Path("DCASE23_Task1").exists()


def test_enforcing_limits_changes_nothing_for_a_network_within_them(options, tmp_path):
    for name, extra in (("one", []), ("two", ["--enforce_limits"])):
        run_training.main([*options, "--project_name", name, "--n_epochs", "1", *extra])
    one, two = (weights(run_of(tmp_path / name)) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_network_over_the_limits_is_described_when_not_refused(capsys):
    assert run_training.main(["--dry_run", "--channels_multiplier", "3"])["n_parameters"] == 215_608
    printed = capsys.readouterr().out.strip().splitlines()
    assert "over the limits: 213,062 bytes of parameters at int8" in printed[-1]
    assert "40,125,412 MACs for one clip" in printed[-1]


def outcome(arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Exit status and standard error of the script, through the same door as the command line."""
    monkeypatch.setattr(sys, "argv", ["run_training.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(run_training.main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lr", "0"], "--lr: must be > 0"),
        (["--n_epochs", "1.5"], "--n_epochs: '1.5' is no whole number"),
        (["--dir_prob", "60"], "dir_prob must be in [0, 1]"),
        (["--subset", "30"], "subset must be one of 5, 10, 25, 50, 100"),
        (["--fmax", "9000"], "f_max <= 4000"),
        (["--n_fft", "100"], "n_fft must be >= win_length"),
        (["--torch_device", "toaster"], "no such device"),
        (["--torch_device", "cuda:99"], "CUDA GPUs were found"),
        (["--logger", "paper"], "invalid choice: 'paper'"),
        (["--model", "resnet"], "invalid choice: 'resnet'"),
        (["--no_such_option"], "unrecognized arguments: --no_such_option"),
        (["--n_classes", "12"], "has 10 scenes"),
        (["--dataset_dir", "nowhere"], "nowhere/meta.csv is missing"),
        (["--dirs_path", "nowhere"], "nowhere holds no impulse responses"),
        (["--dir_devices", "phone"], "the data set has a, b, c"),
        (["--kd_lambda", "0.5"], "no teacher logits are known"),
        (["--teacher_logits", "nowhere.pt"], "nowhere.pt is missing"),
        (["--resume", "nosuchid"], "no run nosuchid in DCASE23_Task1; there is none"),
        (["--val_fraction", "0.999"], "leaves one part empty"),
        (["--roll", "-1"], "roll must be >= 0, got -1"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(options, extra, message, monkeypatch, capsys):
    status, errors = outcome([*options, *extra], monkeypatch, capsys)
    last = errors.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in errors
    assert not Path("DCASE23_Task1").exists()


def test_a_broken_clip_is_one_line_and_exit_status_2(options, tau, monkeypatch, capsys):
    (file := sorted((tau.root / "audio").iterdir())[3]).write_bytes(b"RIFF")
    status, errors = outcome(options, monkeypatch, capsys)
    assert status == 2
    assert errors.strip().splitlines()[-1].startswith(f"error: {file} cannot be read as audio")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "last.pt is empty"), (b"not a checkpoint", "last.pt is a text file"), (None, "last.pt is damaged")],
    ids=["empty", "foreign", "truncated"],
)
def test_a_damaged_checkpoint_is_one_line_and_exit_status_2(options, content, message, monkeypatch, capsys):
    run_training.main([*options, "--n_epochs", "1"])
    last = run_of() / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:2000] if content is None else content)
    status, errors = outcome(["--resume", run_of().name], monkeypatch, capsys)
    assert status == 2
    assert message in errors.strip().splitlines()[-1]


def test_options_that_decide_the_result_cannot_change_on_resume(options, monkeypatch, capsys):
    run_training.main([*options, "--n_epochs", "1"])
    status, errors = outcome(["--resume", run_of().name, "--batch_size", "7"], monkeypatch, capsys)
    assert status == 2
    assert "--batch_size cannot change when a run is resumed" in errors


def test_labels_that_the_checkpoint_does_not_know_are_refused(options, own_tau, monkeypatch, capsys):
    run_training.main([*options, "--n_epochs", "1"])
    arguments = ["--resume", run_of().name, "--dataset_dir", str(own_tau.root)]
    status, errors = outcome(arguments, monkeypatch, capsys)
    assert status == 2
    assert "kitchen" in errors or "3 scenes" in errors


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(options, monkeypatch, capsys):
    run_training.main([*options, "--n_epochs", "1"])
    before = weights(run_of())
    monkeypatch.setattr("helpers.losses.distillation.kd_loss", lambda logits, *_: run_training_nan(logits))
    status, errors = outcome(["--resume", run_of().name, "--n_epochs", "2"], monkeypatch, capsys)
    assert status == 2
    assert "not finite in epoch 1 at learning rate 0.0009" in errors
    assert all(torch.equal(before[name], value) for name, value in weights(run_of()).items())


def run_training_nan(logits):
    from helpers.losses import KdLoss

    nan = logits.sum() * float("nan")
    return KdLoss(nan, nan, nan)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(options, monkeypatch, capsys):
    run_training.main([*options, "--n_epochs", "1"])
    before = weights(run_of())

    def full(*_):
        raise OSError(28, "No space left on device", "last.pt")

    monkeypatch.setattr("helpers.checkpoints.checkpoint._save", full)
    status, errors = outcome(["--resume", run_of().name, "--n_epochs", "2"], monkeypatch, capsys)
    assert status == 2
    assert errors.strip().splitlines()[-1] == "error: No space left on device: last.pt"
    assert all(torch.equal(before[name], value) for name, value in weights(run_of()).items())


def test_the_environment_variable_names_the_data_set(options, tau, monkeypatch):
    monkeypatch.setenv("TAU22_DIR", str(tau.root))
    where = options.index("--dataset_dir")
    run_training.main([*options[:where], *options[where + 2 :], "--n_epochs", "1"])
    shutil.rmtree("DCASE23_Task1")


def test_features_of_an_own_run_are_distilled_and_resuming_changes_nothing(options, capsys):
    plain = [*options, "--dir_prob", "0", "--fmax_aug_range", "1"]
    run_training.main([*plain, "--n_epochs", "1", "--run_id", "teacher"])
    student = [*plain, "--loss", "feature_distillation", "--feature_teacher", "teacher", "--kd_weight", "0",
               "--augment", "spec_mask", "mixup", "--mixup_alpha", "0.3"]  # fmt: skip
    for name in ("--dir_prob", "--dirs_path", "--roll"):
        del student[(i := student.index(name)) : i + 2]
    run_training.main([*student, "--n_epochs", "2", "--run_id", "whole"])
    run_training.main([*student, "--n_epochs", "1", "--run_id", "resumed"])
    run_training.main(["--resume", "resumed", "--n_epochs", "2"])
    whole, resumed = (load_checkpoint(f"DCASE23_Task1/{name}/checkpoints/last.pt") for name in ("whole", "resumed"))
    for part in ("loss", "model"):
        states = [content[part] if part == "loss" else content[part]["state"] for content in (whole, resumed)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert lines(Path("DCASE23_Task1/whole"))[-1]["train/feature_loss"] > 0
    del student[(i := student.index("--base_channels")) : i + 2]
    for more, message in (
        (["--compile"], "--compile leaves no features for --loss feature_distillation"),
        (["--feature_teacher", "nobody"], "no teacher nobody: there is no such file and no such run"),
        (["--model", "cnn3", "--frontend", "cp_mel", "--n_mels", "40"], "Cnn3 declares no feature_layers"),
    ):
        with pytest.raises((SystemExit, CheckpointError)) as stop:
            run_training.main([*student, *more, "--run_id", "bad"])
        assert message in f"{stop.value}{capsys.readouterr().err}"
        assert not Path("DCASE23_Task1/bad").exists()
