import re

import pytest
import torch

import run_export
import run_qat
from helpers import cli
from helpers.checkpoints.checkpoint import describe, load_model, save_checkpoint
from helpers.checkpoints.stated import add_stated_options, believe
from helpers.parts import STUDENT
from models import FRONTENDS, MODELS, get_frontend, get_model


def answer(path, *options):
    parser = cli.Parser("test")
    add_stated_options(parser, STUDENT)
    return believe(parser, parser.parse_args(list(options)), load_model(path), path)


@pytest.fixture
def foreign(tmp_path):
    def write(name: str, **options):
        torch.save(get_model(name, **options).state_dict(), tmp_path / "w.pt")
        return tmp_path / "w.pt"

    return write


def test_a_front_end_that_is_not_recorded_is_believed(foreign):
    loaded = answer(
        foreign("cp_mobile", base_channels=8), "--hop_size", "320", "--fmax", "15000", "--base_channels", "8"
    )
    assert (loaded.frontend.config.hop_length, loaded.frontend.config.f_max) == (320, 15000)
    assert loaded.frontend(torch.rand(1, 32000)).shape[-1] == 100
    assert not loaded.frontend.training


def test_what_follows_from_a_believed_rate_follows_it(foreign):
    config = answer(foreign("cp_mobile"), "--resample_rate", "16000").frontend.config
    assert (config.sample_rate, config.f_max) == (16000, 7500)


def test_another_value_of_the_same_network_is_no_contradiction(foreign):
    path = foreign("cp_mobile", base_channels=30, channels_multiplier=2.31)  # read as 32 and 2.3
    assert answer(path, "--base_channels", "30", "--channels_multiplier", "2.31")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cp_resnet", ["--base_channels", "999"], "--base_channels 999, but .* has 32: leave"),
        ("cp_resnet", ["--expansion_rate", "3"], "--expansion_rate 3.*holds a CpResnet, which has no such option"),
        ("cp_mobile", ["--base_channels", "64"], "--base_channels 64, but .* has 32: leave"),
        ("cp_mobile", ["--n_classes", "9"], "--n_classes 9, but .* has 10"),
        ("cp_mobile", ["--hop_size", "0"], "hop_length"),
    ],
)
def test_what_contradicts_is_refused(foreign, capsys, name, options, message):
    path = foreign(name)
    with pytest.raises(SystemExit) as caught:
        answer(path, *options)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert re.search(message, text), text


def test_a_recorded_front_end_is_not_overruled(tmp_path, capsys):
    model, frontend = get_model("cp_resnet"), get_frontend("cp_mel", hop_length=750)
    path = tmp_path / "last.pt"
    parts = {"model": describe(model, MODELS), "frontend": describe(frontend, FRONTENDS)}
    save_checkpoint(path, {**parts, "scenes": [str(i) for i in range(10)]})
    assert answer(path, "--hop_size", "750", "--base_channels", "32")
    for option, value in (("--hop_size", "320"), ("--base_channels", "999")):
        with pytest.raises(SystemExit):
            answer(path, option, value)
        assert f"{option} {value}, but {path} has" in capsys.readouterr().err


@pytest.mark.parametrize("script", [run_qat, run_export])
def test_scripts_refuse_options_that_contradict(foreign, capsys, script):
    path = foreign("cp_resnet")
    with pytest.raises(SystemExit) as caught:
        script.main(["--checkpoint", str(path), "--precision", "fp16", "--base_channels", "999"])
    assert caught.value.code == 2
    assert f"--base_channels 999, but {path} has 32" in capsys.readouterr().err
