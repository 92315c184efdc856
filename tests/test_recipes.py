"""Recipes: those that are shipped beside the published ones, and what is wrong with others."""

import argparse
import importlib
import re
from pathlib import Path

import pytest
import torch

import run_qat
import run_training
from helpers import cli
from helpers.recipes import RecipeError, parse, read_recipe, script_of
from helpers.schedule import Place, WarmupRampdown

ROOT = Path(__file__).parents[1]


def parsed(recipe: str, *options: str) -> argparse.Namespace:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    return parse(run_training.make_parser, ["--config", str(path), *options])[1]


def defaults(recipe: str) -> dict:
    return vars(parsed(recipe))


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
    args = vars(parsed(teacher, *given))
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
    own = defaults("beats_ssl_sl")
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
    assert own["augment"] == ["dir", "freq_mixstyle", "share_mask", "mixup"]
    other = defaults("beats_ssl")
    assert {name for name in own if own[name] != other[name]} <= {"config", "experiment_name"}


def factors(teacher: str, n_epochs: int) -> list[float]:
    schedule = cli.config_from(parsed(teacher), WarmupRampdown)
    return [schedule.factor(Place(epoch)) for epoch in range(n_epochs)]


@pytest.mark.parametrize(("teacher", "name"), [("cp_resnet", "lr_cpresnet"), ("passt", "lr_passt")])
def test_learning_rates_are_the_published_ones(golden, teacher, name):
    data, own = golden(name), defaults(teacher)
    assert (own["lr"], own["n_epochs"]) == (data["lr"], data["n_epochs"])
    assert factors(teacher, data["n_epochs"]) == pytest.approx(data["factors"].tolist(), rel=1e-12)


def test_learning_rates_of_beats_are_the_published_ones(shared):
    data = torch.load(shared("golden/easy_dcase_task1/lr.pt"), weights_only=True)["exp_warmup_linear_down"]
    assert factors("beats_ssl", len(data["factor_per_epoch"])) == pytest.approx(data["factor_per_epoch"], rel=1e-9)
    assert defaults("beats_ssl")["lr"] == data["base_lr"]


@pytest.mark.parametrize("teacher", ["cp_resnet", "passt", "beats"])
def test_help_shows_the_options_of_the_teacher(teacher, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")  # no breaks within names
    with pytest.raises(SystemExit) as caught:
        run_training.main(["--model", teacher, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    own = {"cp_resnet": "--cut_channels_s3", "passt": "--s_patchout_f", "beats": "--encoder_layerdrop"}
    assert [name for name, option in own.items() if f"{option} " in printed] == [teacher]


def test_frozen_beats_has_the_recipe_of_the_published_one(shared):
    text = shared("reference/easy_dcase_task1.md").read_text(encoding="utf-8")
    trainer = next(line for line in text.splitlines() if line.startswith("| beats_ssl_star | "))
    _file, name, n_epochs, _, batch_size, *_ = [cell.strip() for cell in trainer.strip("|").split("|")]
    own = defaults("beats_ssl_star")
    assert [own["experiment_name"], own["n_epochs"], own["batch_size"]] == [name, int(n_epochs), int(batch_size)]
    assert (own["optimizer"], own["lr"], own["weight_decay"]) == ("adam", 1e-3, 0)
    assert own["augment"] == ["share_mask", "mixup"] and own["freeze"] == "all"
    assert (own["mixup_alpha"], own["mask_share"]) == (0.3, 0.2)
    schedule = cli.config_from(parsed("beats_ssl_star"), WarmupRampdown)
    assert {schedule.factor(Place(epoch)) for epoch in range(60)} == {1.0}  # no schedule
    assert defaults("beats_ssl")["mixstyle_axis"] == "time" and defaults("passt")["mixstyle_axis"] == "mel"


def test_the_student_is_what_nothing_else_said_gives():
    bare = vars(parse(run_training.make_parser, [])[1])
    own = defaults("cpjku_student")
    assert own["augment"] == bare["augment"][:4]  # the others are off
    assert {name for name in own if own[name] != bare[name]} == {"augment", "config", "given"}
    assert bare["mask_share"] == bare["mixup_alpha"] == 0


def test_qat_is_what_nothing_else_said_gives():
    path = str(ROOT / "recipes/cpjku_qat.yaml")
    bare, own = (vars(parse(run_qat.make_parser, argv)[1]) for argv in ([], ["--config", path]))
    assert {name for name in own if own[name] != bare[name]} == {"augment", "config", "given"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_print_config_prints_is_the_same_recipe(path, tmp_path, capsys):
    make_parser = importlib.import_module(script_of(read_recipe(path)).removesuffix(".py")).make_parser
    _, args = parse(make_parser, ["--config", str(path), "--seed", "3"])
    with pytest.raises(SystemExit) as caught:
        parse(make_parser, ["--config", str(path), "--seed", "3", "--print_config"])
    assert caught.value.code in (None, 0)
    (tmp_path / "own.yaml").write_text(capsys.readouterr().out)
    _, again = parse(make_parser, ["--config", str(tmp_path / "own.yaml")])
    differs = {name for name, value in vars(args).items() if vars(again)[name] != value}
    assert differs <= {"config", "given"} and again.seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_epoch: 3", "there is no option n_epoch, the nearest is n_epochs"),
        ("resume: abcd1234", "there is no option resume"),
        ("lr: fast", "lr is 'fast', it 'fast' is no number"),
        ("lr: -1", "lr is -1, it must be > 0"),
        ("n_epochs: 1.5", "n_epochs is 1.5, it '1.5' is no whole number"),
        ("cropped: 3", "cropped is 3, it must be true or false"),
        ("logger: none", "logger is 'none', it must be a list"),
        ("augment: [roll]", "augment is 'roll', it must be one of dir, time_roll"),
        ("model: resnet", "model is 'resnet', it must be one of cp_mobile"),
        ("lr: null", "lr is None"),
        ("lr: 1\nlr: 2", "lr stands there twice"),
        ("- lr", "it must hold lines of `option: value`"),
        ("lr: [", "is no YAML file"),
        ("base_channels: 8\nmodel: passt", "there is no option base_channels"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        parse(run_training.make_parser, ["--config", str(path)])
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_the_command_line_goes_before_the_recipe():
    args = parsed("passt", "--lr", "0.5")
    assert args.lr == 0.5 and args.model == "passt" and args.given == ["config", "lr"]


def test_options_of_parts_that_the_command_line_exchanges_are_left_aside():
    args = parsed("beats_ssl", "--augment", "mixup", "--model", "cp_mobile")
    assert args.mixup_alpha == 0.3 and args.frontend == "kaldi_fbank" and not hasattr(args, "mask_share")


def test_numbers_as_yaml_takes_them_for_words(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: 1e-5\nfmax: null\ndata_on_device: no\nfreeze: 2\n")
    _, args = parse(run_training.make_parser, ["--config", str(tmp_path / "x.yaml")])
    assert (args.lr, args.fmax, args.data_on_device, args.freeze) == (1e-5, None, "no", "2")


def test_an_empty_recipe_says_nothing(tmp_path):
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert read_recipe(tmp_path / "x.yaml") == {}
