"""Averages of the weights, clipping, decay groups and early stopping: by hand, and in runs that stop and resume."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import run_training
from datasets.waveforms import Batch
from helpers.averaging import ExponentialAverage, LastEpochs
from helpers.checkpoints.checkpoint import load_checkpoint
from helpers.distributed import ALONE
from helpers.errors import StoppedError
from helpers.loop import Update
from helpers.machine import Machine
from helpers.options import build_optimizer
from helpers.runs.run import Run
from models import get_model
from tests.test_run_training import SMALL

OPTIONS = [*SMALL, "--augment", "spec_mask", "--warm_up_len", "0"]
for option in ("--roll",):
    del OPTIONS[(i := OPTIONS.index(option)) : i + 2]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def learn(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(value)
    model.train()(value * torch.ones(2, 1, 4, 4))


def test_the_last_epochs_are_averaged():
    model, states = network(), []
    average = LastEpochs(model, 3)
    for epoch in range(5):
        learn(model, 1.0 + epoch)
        average.finish_epoch(epoch, 5, ALONE)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        assert average.n == max(0, epoch - 1)
    with average.scored():
        for name, value in model.state_dict().items():
            wanted = torch.stack([state[name].double() for state in states[2:]]).mean(0)
            torch.testing.assert_close(value.double(), states[-1][name].double() if "num" in name else wanted)
    assert all(torch.equal(value, states[-1][name]) for name, value in model.state_dict().items())


def test_a_moving_average_begins_fast():
    model = network()
    average, wanted = ExponentialAverage(model, 0.9), None
    for step in range(200):
        learn(model, 0.1)
        average.after_step()
        decay = min(0.9, (1 + step) / (10 + step))
        value = model[0].weight.detach().double()
        wanted = value.clone() if wanted is None else decay * wanted + (1 - decay) * value
    torch.testing.assert_close(average.mean()["0.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    assert average.mean()["1.num_batches_tracked"] == 200


def test_training_that_goes_on_longer_begins_the_mean_anew(caplog):
    model = network()
    average = LastEpochs(model, 2)
    for epoch in range(3):
        average.finish_epoch(epoch, 3, ALONE)
    assert average.n == 2
    average.finish_epoch(3, 6, ALONE)
    assert average.n == 0 and "training goes on to epoch 6" in caplog.text
    average.finish_epoch(4, 6, ALONE)
    assert average.n == 1


def stop_after(monkeypatch, n_calls: int) -> None:
    """Saves and leaves a run as a signal does, after so many steps and scored batches."""
    calls = []

    def after_step(self: Run) -> None:
        calls.append(None)
        if len(calls) == n_calls:
            self.save("last.pt")
            raise StoppedError("enough", exit_status=130)

    monkeypatch.setattr(Run, "after_step", after_step)


AVERAGES = [
    ["--ema_decay", "0.9", "--clip_grad_norm", "0.5", "--decay_on", "weights"],
    ["--average_last", "2", "--clip_grad_norm", "0.5"],
]


# Of 10 calls an epoch, 4 are after steps and 6 after scored batches, in which the mean is in use.
@pytest.mark.slow
@pytest.mark.parametrize("more", AVERAGES, ids=["moving average", "last epochs"])
def test_a_stopped_run_ends_with_the_same_bits(tau, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    options = [*OPTIONS, "--dataset_dir", str(tau.root), "--cache_path", str(tmp_path / "cache"), *more]
    run_training.main([*options, "--run_id", "whole"])
    whole = load_checkpoint("DCASE23_Task1/whole/checkpoints/last.pt")
    name = "stages.s1.b1.block.0.0.weight"
    assert not torch.equal(whole["learning"][name], whole["model"]["state"][name])
    for n_calls in (2, 17, 26):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_after(patch, n_calls)
            run_training.main([*options, "--run_id", f"stopped{n_calls}"])
        run_training.main(["--resume", f"stopped{n_calls}"])
        resumed = load_checkpoint(f"DCASE23_Task1/stopped{n_calls}/checkpoints/last.pt")
        for part in ("learning", "average", "optimizer"):
            torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
        torch.testing.assert_close(resumed["model"]["state"], whole["model"]["state"], rtol=0, atol=0)
    metrics = [
        json.loads(Path(f"DCASE23_Task1/{run}/metrics.jsonl").read_text().splitlines()[-1])["test/loss"]
        for run in ("whole", "stopped17")
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_early_stopping_ends_a_run_for_good(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*OPTIONS, "--dataset_dir", str(tau.root), "--cache_path", str(tmp_path / "cache"), "--run_id", "r"]
    options += ["--lr", "1e-30", "--val_fraction", "0.4", "--early_stopping", "2", "--n_epochs", "9"]
    run_training.main(options)
    lines = Path("DCASE23_Task1/r/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3  # the first is the best
    run_training.main(["--resume", "r"])
    assert Path("DCASE23_Task1/r/metrics.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ema_decay", "0.9", "--average_last", "2"], "ema_decay and average_last are two averages"),
        (["--early_stopping", "3"], "say how many with --val_fraction"),
        (["--early_stopping", "3", "--val_fraction", "0.2", "--average_last", "2"], "must know the last epoch"),
        (["--ema_decay", "1"], "--ema_decay: must be >= 0 and < 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_training.main([*SMALL, *more])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("n_parts", [1, 2])
def test_a_long_gradient_is_shortened(n_parts):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    before = [value.detach().clone() for value in model.parameters()]
    update = Update(torch.optim.SGD(model.parameters(), 1.0), Machine(), max_norm=0.01, n_parts=n_parts)
    batch = Batch(torch.zeros(4, 2), target=torch.eye(3)[[0, 1, 2, 0]], log_mel=torch.randn(4, 1, 2, 3))
    update.step(model, lambda logits, part: nn.functional.cross_entropy(logits, part.target), batch)
    moved = [value - old for value, old in zip(model.parameters(), before, strict=True)]
    assert torch.linalg.vector_norm(torch.cat([part.flatten() for part in moved])).item() == pytest.approx(
        0.01, rel=1e-3
    )


@pytest.mark.parametrize("name", ["cp_mobile", "cnn_gru", "dragonsearch_tf_sepnet", "cnn6_60k"])
def test_weight_decay_is_for_convolutions_and_matrices(name):
    model = get_model(name)
    args = Namespace(optimizer="adamw", lr=1.0, beta2=0.999, weight_decay=0.1, decay_on="weights")
    decayed, others = build_optimizer(args, model).param_groups
    names = {id(value): key for key, value in model.named_parameters()}
    modules = dict(model.named_modules())
    for group, decays in ((decayed, True), (others, False)):
        assert group["weight_decay"] == (0.1 if decays else 0)
        for value in group["params"]:
            owner, _, last = names[id(value)].rpartition(".")
            kind = isinstance(modules[owner], (nn.Conv1d, nn.Conv2d, nn.Linear, nn.GRU)) and "weight" in last
            assert kind == decays, names[id(value)]
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    (whole,) = build_optimizer(Namespace(**(vars(args) | {"decay_on": "all"})), model).param_groups
    assert whole["weight_decay"] == 0.1 and len(whole["params"]) == len(names)
