import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from helpers.memory import keep_freed_memory
from models import fused, get_model
from models.cp_mobile import ResponseNorm
from tests.golden_inputs import fill_state, wave


def with_and_without(monkeypatch, module, x: torch.Tensor, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Output, gradients and statistics of one training step with the chunked steps, then without."""
    results = []
    monkeypatch.setattr(fused, "MIN_VALUES", 0)
    monkeypatch.setattr(fused, "DTYPES", (torch.float32, torch.float64))
    for chunked in (True, False):
        fill_state(module).to(dtype).train()
        for name, buffer in module.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()
        taken = x.to(dtype).clone().requires_grad_()
        module.zero_grad()
        with monkeypatch.context() as patch:
            if not chunked:
                patch.setattr(fused, "applies", lambda _x: False)
            y = module(taken.to(memory_format=torch.channels_last))
        (y * wave(tuple(y.shape), "fused/weights").to(dtype)).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        results.append({"output": y.detach(), "input": taken.grad} | gradients | buffers)
    return results


@pytest.mark.parametrize("chunk_values", [1, 1000, 1 << 17], ids=["row by row", "uneven", "as used"])
def test_a_training_step_is_the_plain_one_in_float64(monkeypatch, chunk_values):
    monkeypatch.setattr(fused, "CHUNK_VALUES", chunk_values)
    model = get_model("cp_mobile", base_channels=8, n_classes=3).to(memory_format=torch.channels_last)
    chunked, plain = with_and_without(monkeypatch, model, wave((3, 1, 32, 16), "fused"), torch.float64)
    for name, value in plain.items():
        torch.testing.assert_close(chunked[name].double(), value.double(), rtol=1e-8, atol=1e-10, msg=name)


def test_the_default_network_agrees_in_float32(monkeypatch):
    model = get_model("cp_mobile").to(memory_format=torch.channels_last)
    chunked, plain = with_and_without(monkeypatch, model, wave((4, 1, 256, 64), "fused32"), torch.float32)
    torch.testing.assert_close(chunked["output"], plain["output"], rtol=0, atol=1e-4)
    # ReLU kinks make gradients this loose in float32, even between versions of PyTorch.
    for name, value in plain.items():
        if name.endswith("weight"):
            assert (chunked[name] - value).norm() <= 0.05 * value.norm(), name


def test_a_silent_channel_has_no_slope_and_no_nan(monkeypatch):
    x = wave((2, 8, 4, 4), "fused/silent")
    x[:, 3] = 0
    module = ResponseNorm().to(memory_format=torch.channels_last)
    chunked, plain = with_and_without(monkeypatch, module, x, torch.float64)
    for name, value in plain.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_the_plain_way_is_taken_where_the_chunks_are_of_no_use():
    x = torch.zeros(64, 32, 64, 16).to(memory_format=torch.channels_last)
    assert not fused.applies(x[:8])
    assert fused.applies(x)
    assert not fused.applies(x.contiguous())
    with torch.no_grad():
        assert not fused.applies(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fused.applies(x)


X = (2, 1, 32, 16)


def small_network() -> nn.Module:
    model = fill_state(get_model("cp_mobile", base_channels=8, n_classes=3, n_blocks=(1, 1, 1), strides={}))
    return model.to(memory_format=torch.channels_last).train()


def norm_in_eval_mode(model):
    model.stages.s1.b1.block[0][1].eval()


def pruned(model):
    for unit in (0, 2):
        prune.l1_unstructured(model.stages.s1.b1.block[unit][0], "weight", 0.3)


def parametrized(model):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(model.stages.s2.b2.block[0][0], "weight", Halved())


def other_activation(model):
    model.stages.s1.b1.block[0][2] = nn.SiLU()


def other_norm(model):
    model.stages.s1.b1.block[1][1] = nn.InstanceNorm2d(24, affine=True)


def mean_of_all_batches(model):
    model.stages.s1.b1.block[0][1].momentum = None


def frozen(model):
    for parameter in model.stages.s1.b1.block.parameters():
        parameter.requires_grad = False


CHANGES = [norm_in_eval_mode, pruned, parametrized, other_activation, other_norm, mean_of_all_batches, frozen]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_user_changes_in_a_network_counts_at_any_batch_size(monkeypatch, change):
    results = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(fused, "MIN_VALUES", least)
        model = small_network()
        change(model)
        for _ in range(2):  # a second step on the first one's weights
            model.zero_grad()
            y = model(wave(X, "changed").to(memory_format=torch.channels_last))
            (y * wave(tuple(y.shape), "slope")).sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad
        results.append(model.state_dict())
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_layer_are_called(monkeypatch, kind):
    monkeypatch.setattr(fused, "MIN_VALUES", 0)
    model = small_network()
    layers = [layer for layer in model.stages.modules() if not isinstance(layer, nn.Identity)]
    if "backward" in kind:  # PyTorch refuses them before a ReLU that works in place
        layers = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    called = set()
    for layer in layers:
        getattr(layer, f"register_{kind}_hook")(lambda module, *_: called.add(module) and None)
    model(wave(X, "hooks").to(memory_format=torch.channels_last)).sum().backward()
    assert called == set(layers)


def test_transforms_and_double_precision_take_the_plain_layers(monkeypatch):
    monkeypatch.setattr(fused, "MIN_VALUES", 0)
    x, seen = wave(X, "func").to(memory_format=torch.channels_last), []
    torch.func.grad(lambda z: seen.append(fused.applies(z)) or z.sum())(x)
    assert seen == [False]
    assert fused.applies(x) and not fused.applies(x.double())


def test_freed_memory_is_kept_where_the_c_library_can():
    assert isinstance(keep_freed_memory(), bool)
    assert torch.ones(10_000_000).sum() == 10_000_000
