"""The recipes of run_teacher_training.py beside the published ones."""

import re

import pytest
import torch

import run_teacher_training
from helpers import cli
from helpers.schedule import WarmupRampdown


def defaults(teacher: str) -> dict:
    return vars(run_teacher_training.make_parser(teacher).parse_args([]))


@pytest.mark.parametrize(("teacher", "column"), [("cp_resnet", "cp-resnet"), ("passt", "passt")])
def test_flags_and_defaults_are_the_published_ones(shared, teacher, column):
    lines = shared("reference/cpjku_dcase23.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    where = next(row for row in rows if row[0] == "flag").index(column)
    published = {row[0].strip("`-"): row[where] for row in rows if row[0].startswith("`--") and len(row) > where}
    published = {name: value for name, value in published.items() if value != "\u2013"}
    assert len(published) > 25
    own = defaults(teacher)
    given = [f"--{name}={value}" for name, value in published.items() if value != "None"]
    args = vars(run_teacher_training.make_parser(teacher).parse_args(given))
    for name, value in published.items():
        wanted = None if value == "None" else type(args[name])(value)
        assert args[name] == wanted, name
        # A thread reads ahead in the place of processes; the number of classes is that of the data set.
        if name not in ("num_workers", "n_classes"):
            assert own[name] == wanted, name


def test_the_recipe_of_beats_is_the_published_one(shared):
    text = shared("reference/easy_dcase_task1.md").read_text(encoding="utf-8")
    trainer = next(line for line in text.splitlines() if line.startswith("| beats_ssl+sl | beats_finetune"))
    _file, name, n_epochs, _, batch_size, _, rate, *_ = [cell.strip() for cell in trainer.strip("|").split("|")]
    recipe = next(line for line in text.splitlines() if line.startswith("| beats_ssl, beats_ssl+sl | MixUp"))
    own = defaults("beats")
    assert [own[key] for key in ("experiment_name", "n_epochs", "batch_size", "resample_rate")] == [
        name, int(n_epochs), int(batch_size), int(rate),
    ]  # fmt: skip
    always, beta1 = 1.0, 0.9  # masks in every batch; the optimizer's own
    names = ("mixup_alpha", "mixstyle_alpha", "mixstyle_p", "dir_prob", "mask_share", always, "lr", beta1, "beta2")
    names += ("weight_decay", "warm_up_len", "ramp_down_len", "last_lr_value")
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", recipe)]
    assert numbers == [own.get(key, key) for key in names]
    assert "AdamW" in recipe and own["optimizer"] == "adamw"
    assert own["ramp_down_start"] == own["warm_up_len"]
    assert own["roll"] == own["freqm"] == own["timem"] == 0  # what it does not have


def factors(teacher: str, n_epochs: int) -> list[float]:
    schedule = cli.config_from(run_teacher_training.make_parser(teacher).parse_args([]), WarmupRampdown)
    return [schedule.factor(epoch) for epoch in range(n_epochs)]


@pytest.mark.parametrize(("teacher", "name"), [("cp_resnet", "lr_cpresnet"), ("passt", "lr_passt")])
def test_learning_rates_are_the_published_ones(golden, teacher, name):
    data, own = golden(name), defaults(teacher)
    assert (own["lr"], own["n_epochs"]) == (data["lr"], data["n_epochs"])
    assert factors(teacher, data["n_epochs"]) == pytest.approx(data["factors"].tolist(), rel=1e-12)


def test_learning_rates_of_beats_are_the_published_ones(shared):
    data = torch.load(shared("golden/easy_dcase_task1/lr.pt"), weights_only=True)["exp_warmup_linear_down"]
    assert factors("beats", len(data["factor_per_epoch"])) == pytest.approx(data["factor_per_epoch"], rel=1e-9)
    assert defaults("beats")["lr"] == data["base_lr"]


@pytest.mark.parametrize("teacher", ["cp_resnet", "passt", "beats"])
def test_help_shows_the_options_of_the_teacher(teacher, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")  # no breaks within names
    with pytest.raises(SystemExit) as caught:
        run_teacher_training.main(["--teacher", teacher, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    own = {"cp_resnet": "--cut_channels_s3", "passt": "--s_patchout_f", "beats": "--encoder_layerdrop"}
    assert [name for name, option in own.items() if f"{option} " in printed] == [teacher]
    assert f"(default: {defaults(teacher)['experiment_name']})" in printed


def test_frozen_beats_has_the_recipe_of_the_published_one(shared):
    text = shared("reference/easy_dcase_task1.md").read_text(encoding="utf-8")
    trainer = next(line for line in text.splitlines() if line.startswith("| beats_ssl_star | "))
    _file, name, n_epochs, _, batch_size, *_ = [cell.strip() for cell in trainer.strip("|").split("|")]
    recipe = run_teacher_training.chosen_recipe(["--teacher", "beats", "--freeze", "all"])
    own = vars(run_teacher_training.make_parser(*recipe).parse_args([]))
    assert [own["experiment_name"], own["n_epochs"], own["batch_size"]] == [name, int(n_epochs), int(batch_size)]
    assert (own["optimizer"], own["lr"], own["weight_decay"]) == ("adam", 1e-3, 0)
    assert own["dir_prob"] == own["mixstyle_p"] == 0
    assert (own["mixup_alpha"], own["mask_share"]) == (0.3, 0.2)
    schedule = cli.config_from(run_teacher_training.make_parser(*recipe).parse_args([]), WarmupRampdown)
    assert {schedule.factor(epoch) for epoch in range(60)} == {1.0}  # no schedule
    assert defaults("beats")["mixstyle_axis"] == "time" and defaults("passt")["mixstyle_axis"] == "mel"
