"""Networks for recording devices, trained from a general one: what learns, what stays, stopped and resumed."""

import shutil
from pathlib import Path

import pytest
import torch

import run_device_training
import run_training
from helpers.checkpoints.checkpoint import CheckpointError, load_checkpoint, load_model
from helpers.errors import StoppedError
from helpers.options import is_weight
from tests.test_averaging import stop_after
from tests.test_run_training import SMALL

pytestmark = pytest.mark.slow

DEVICES = ["a", "b", "s1"]  # of the training part


@pytest.fixture(scope="module")
def general(small_tau, tmp_path_factory) -> Path:
    """The folder of a project with a general network."""
    folder = tmp_path_factory.mktemp("general")
    options = [*SMALL, "--augment", "--dataset_dir", str(small_tau.root), "--cache_path", str(folder / "cache")]
    del options[(i := options.index("--freqm")) : i + 2]
    del options[(i := options.index("--roll")) : i + 2]
    run_training.main([*options, "--n_epochs", "1", "--run_id", "general", "--project_name", str(folder / "runs")])
    return folder


@pytest.fixture
def options(general, small_tau, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(general / "runs", "runs")
    return [
        "--project_name", "runs", "--logger", "none", "--dataset_dir", str(small_tau.root), "--subset", "100",
        "--cache_path", str(general / "cache"), "--batch_size", "4", "--freqm", "8", "--roll", "400", "--lr", "0.01",
        "--warmup_steps", "1", "--n_epochs", "2", "--eval_every", "1",
    ]  # fmt: skip


def states(run: str) -> dict[str, dict[str, torch.Tensor]]:
    content = load_checkpoint(f"runs/{run}/checkpoints/last.pt")
    return {"general": content["model"]["state"], **content["device_models"]}


def test_each_device_gets_a_network_and_the_general_one_stays(options, capsys):
    metrics = run_device_training.main([*options, "--wandb_id", "general", "--run_id", "d"])
    before = load_checkpoint("runs/general/checkpoints/last.pt")["model"]["state"]
    found = states("d")
    assert list(found) == ["general", *DEVICES]
    assert all(torch.equal(value, before[name]) for name, value in found["general"].items())
    name = "in_c.0.0.weight"
    assert len({found[device][name].sum().item() for device in found}) == 4
    assert "device s1" in capsys.readouterr().out
    for device in ("s4", "s5"):  # answered by the general network
        assert metrics[f"test/acc/device/{device}"] == metrics[f"general/test/acc/device/{device}"]
    whole, container = (load_model(f"runs/d/checkpoints/{file}.pt") for file in ("last", "container"))
    for loaded in (whole, container):
        assert list(loaded.device_models) == DEVICES
        for device, network in loaded.device_models.items():
            assert all(torch.equal(value, found[device][key]) for key, value in network.state_dict().items())
    lines = Path("runs/d/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6 and '"s1/test/acc"' in lines[5] and '"test/acc"' in lines[3]


def test_a_stopped_run_ends_with_the_same_bits(options, monkeypatch):
    run_device_training.main([*options, "--wandb_id", "general", "--run_id", "whole"])
    whole = states("whole")
    for n_calls in (2, 19, 33):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_after(patch, n_calls)
            run_device_training.main([*options, "--wandb_id", "general", "--run_id", f"stopped{n_calls}"])
        run_device_training.main(["--project_name", "runs", "--resume", f"stopped{n_calls}"])
        torch.testing.assert_close(states(f"stopped{n_calls}"), whole, rtol=0, atol=0)


def test_norms_and_biases_alone_may_learn(options):
    more = ["--devices", "b", "--tune", "norms", "--n_epochs", "1"]
    run_device_training.main([*options, "--wandb_id", "general", "--run_id", "n", *more])
    found = states("n")
    assert list(found) == ["general", "b"]
    parameters = dict(load_model("runs/n/checkpoints/last.pt").model.named_parameters())
    changed = {name for name in parameters if not torch.equal(found["b"][name], found["general"][name])}
    assert changed and not any(is_weight(name, parameters[name]) for name in changed)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--wandb_id", "general", "--devices", "s4"], "--devices s4: the training part has clips of a, b, s1"),
        ([], "name a run with --wandb_id or a file with --checkpoint"),
        (["--resume", "d", "--n_epochs", "5"], "--n_epochs cannot change"),
    ],
)
def test_bad_input_is_one_line(options, more, message, capsys):
    if "--resume" in more:
        run_device_training.main(
            [*options, "--wandb_id", "general", "--run_id", "d", "--devices", "a", "--n_epochs", "1"]
        )
        options = ["--project_name", "runs"]
    with pytest.raises((SystemExit, CheckpointError)) as stop:
        run_device_training.main([*options, *more])
    assert message in f"{stop.value}{capsys.readouterr().err}"
