"""Networks for single recording devices: the published container, its checkpoints, and how they are scored."""

import copy

import pytest
import torch
from torch import nn

import run_teacher_validation
from helpers.checkpoints.checkpoint import load_model
from models import get_model
from models.device_models import DeviceModels
from tests.golden_inputs import fill_state, wave

DEVICES = ("a", "b", "c", "s1", "s2", "s3")


def container(base: nn.Module) -> DeviceModels:
    return DeviceModels(base, {device: copy.deepcopy(base) for device in DEVICES})


def test_answers_are_those_of_the_published_container(shared):
    data = torch.load(shared("golden/dcase_baselines/multi_device.pt"), weights_only=True)
    model = container(get_model("dcase24_baseline", **data["config"]))
    assert len(model.state_dict()) == data["n_state_entries"]
    assert [*dict.fromkeys(".".join(name.split(".")[:2 if name[0] == "d" else 1]) for name in model.state_dict())] == (
        data["prefixes"]
    )  # fmt: skip
    model = fill_state(model).eval()
    x = wave(tuple(data["input_shape"]), data["input_key"], data["input_scale"])
    with torch.no_grad():
        for name, wanted in data["outputs"].items():
            devices = {"none": None, "mixed": data["batch_devices_mixed"]}.get(
                name, [name.removeprefix("all_")] * len(x)
            )
            if "half" not in name:
                torch.testing.assert_close(model(x, devices), wanted, rtol=0, atol=1e-4)
        mixed = copy.deepcopy(model).half()(x.half(), data["batch_devices_mixed"]).float()
    torch.testing.assert_close(mixed, data["outputs"]["mixed_half_cpu"].float(), rtol=0, atol=5e-3)
    for device, is_base in data["get_model_for_device_is_base"].items():
        assert (model.for_device(device) is model.base_model) == is_base
    with pytest.raises(ValueError, match="one for each of 5 clips, got 2"):
        model(x, ["a", "b"])


def test_the_winner_of_2025_answers_by_device(shared):
    loaded = load_model(shared("golden/dcase2025/karasin_sys4_checkpoint.ckpt"))
    assert tuple(loaded.device_models) == DEVICES
    data = torch.load(shared("golden/dcase2025/karasin_sys4.pt"), weights_only=True)
    model = DeviceModels(loaded.model, loaded.device_models)
    x = data["logmel"][None].repeat(3, 1, 1, 1)
    with torch.no_grad():
        logits = model(x, ["s3", "unknown", "a"])
    for found, network in zip(logits, ("s3", "general", "a"), strict=True):
        torch.testing.assert_close(found, data["logits_fp32"][network][0], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_validation_scores_the_general_network_and_those_for_devices(tau, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = fill_state(get_model("cp_mobile", base_channels=8)).eval()
    state = {f"base_model.{name}": value for name, value in base.state_dict().items()}
    for device in ("a", "s1"):
        other = get_model("cp_mobile", base_channels=8)
        other.feed_forward[1].bias.data[0 if device == "a" else 1] = 100.0  # always the same scene
        state |= {f"device_models.{device}.{name}": value for name, value in other.state_dict().items()}
    torch.save({"state_dict": {f"multi_device_model.{name}": value for name, value in state.items()}}, "w.ckpt")
    options = ["--checkpoint", "w.ckpt", "--dataset_dir", str(tau.root), "--cache_path", "cache", "--logger", "none"]
    metrics = run_teacher_validation.main(options)
    for device in ("b", "s4", "s5"):
        assert metrics[f"w_by_device/test/acc/device/{device}"] == metrics[f"w/test/acc/device/{device}"]
    assert metrics["w_by_device/test/acc/device/s1"] == pytest.approx(1 / 3)  # bus, one of three scenes
    assert "w_by_device" in capsys.readouterr().out
    assert not any("by_device" in name for name in run_teacher_validation.main([*options, "--general"]))
