import pytest
import torch

from helpers.memory import keep_freed_memory
from models import fused, get_model
from models.cp_mobile import ResponseNorm
from tests.golden_inputs import fill_state, wave


def with_and_without(monkeypatch, module, x: torch.Tensor, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Output, gradients and statistics of one training step with the chunked steps, then without."""
    results = []
    monkeypatch.setattr(fused, "MIN_VALUES", 0)
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


def test_freed_memory_is_kept_where_the_c_library_can():
    assert isinstance(keep_freed_memory(), bool)
    assert torch.ones(10_000_000).sum() == 10_000_000
