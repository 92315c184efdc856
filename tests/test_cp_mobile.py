import pytest
import torch
import torch.nn.functional as F

from helpers.complexity import count_complexity
from helpers.losses import kd_loss
from models import get_frontend, get_model
from tests.golden_inputs import clip, fill_state, wave


def model_of(data: dict) -> torch.nn.Module:
    strides = dict(zip(data["stride_blocks"], data["stride_values"], strict=True))
    names = ("n_classes", "in_channels", "base_channels", "channels_multiplier", "expansion_rate", "n_blocks")
    return fill_state(get_model("cp_mobile", strides=strides, **{name: data[name] for name in names}))


def inputs_of(data: dict) -> torch.Tensor:
    gain = torch.tensor(data["sample_gain"])[:, None, None, None]
    return wave(tuple(data["input_shape"]), data["input_key"], data["input_scale"]) * gain


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["cpmobile_default", "cpmobile_small", "cpmobile_large"])
def test_matches_the_published_network(golden, name, layout):
    data = golden(name)
    model, x = model_of(data).eval().to(memory_format=layout), inputs_of(data)
    assert list(model.state_dict()) == data["names"]
    assert [list(value.shape) for value in model.state_dict().values()] == data["shapes"]
    torch.testing.assert_close(model(x), data["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(model.double()(x.double()), data["logits64"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["cpmobile_default", "cpmobile_small", "cpmobile_large"])
def test_complexity_is_the_published_one(golden, name):
    data = golden(name)
    complexity = count_complexity(model_of(data), (1, 256, 64))
    assert complexity.n_parameters == data["n_params"]
    assert complexity.macs == data["conv_macs"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["cpmobile_default", "cpmobile_small"])
def test_training_matches_the_published_network_in_float64(golden, name, layout):
    data, config = golden(f"{name}_train"), golden(name)
    model, x = model_of(config).double().train().to(memory_format=layout), inputs_of(data).double()
    target = F.one_hot(torch.tensor(data["labels"]), 10).double()
    teacher = wave((len(x), 10), data["teacher_key"], data["teacher_scale"]).double()

    def loss_of() -> torch.Tensor:
        return kd_loss(model(x), target, teacher, data["kd_lambda"], data["temperature"]).loss

    optimizer = torch.optim.Adam(model.parameters(), lr=data["adam_lr"], weight_decay=data["adam_weight_decay"])
    losses = []
    for step in range(6):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = dict(model.named_parameters())
            norms = torch.stack([gradients[name].grad.norm() for name in data["grad_names"]])
            torch.testing.assert_close(norms, data["grad_norms64"], rtol=1e-8, atol=0)
            first = gradients[data["grad_names"][0]].grad
            torch.testing.assert_close(first, data["first_param_grad64"], rtol=1e-8, atol=1e-12)
            for key in ("first", "last"):
                norm = model.get_submodule(data[f"bn_{key}"])
                torch.testing.assert_close(norm.running_mean, data[f"bn_{key}_mean64"], rtol=1e-8, atol=0)
                torch.testing.assert_close(norm.running_var, data[f"bn_{key}_var64"], rtol=1e-8, atol=0)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(losses, data["adam_losses64"], rtol=1e-8, atol=0)


def test_matches_the_published_system_from_clip_to_logits(golden):
    data = golden("e2e_cpmobile_default")
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"], data["clip_batch"])
    log_mel = get_frontend("cp_mel").eval()(waveform)
    assert list(log_mel.shape) == data["spec_shape"]
    assert log_mel.mean().item() == pytest.approx(data["spec_mean"], abs=1e-4)
    assert log_mel.std().item() == pytest.approx(data["spec_std"], abs=1e-4)
    logits = fill_state(get_model("cp_mobile")).eval()(log_mel)
    torch.testing.assert_close(logits, data["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": {"b9": (1, 1)}}, "b1, b2"),
        ({"strides": {"b2": (0, 1)}}, "b2"),
        ({"n_blocks": ()}, "n_blocks"),
        ({"expansion_rate": 0.0}, "expansion_rate"),
        ({"base_channels": 0}, "base_channels"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        get_model("cp_mobile", **options)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="cp_mobile"):
        get_model("resnet")
    with pytest.raises(ValueError, match="cp_mel"):
        get_frontend("mfcc")


@pytest.mark.parametrize(
    ("base_channels", "options", "stem", "n_parameters"),
    [(44, {"channels_multiplier": 1.9, "expansion_rate": 2.7}, (12, 1, 3, 3), 180_964), (1, {}, (2, 1, 3, 3), None)],
)
def test_the_stem_has_a_quarter_of_the_rounded_width(base_channels, options, stem, n_parameters):
    model = get_model("cp_mobile", base_channels=base_channels, **options)
    assert tuple(model.in_c[0][0].weight.shape) == stem
    if n_parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters
