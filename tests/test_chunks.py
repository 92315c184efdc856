import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from helpers.memory import keep_freed_memory
from models import get_model
from models.layers import chunks
from models.layers.inverted_bottleneck import InvertedBottleneck, are_plain
from models.layers.response_norm import ResponseNorm
from tests.golden_inputs import fill_state, wave


def with_and_without(monkeypatch, module, x: torch.Tensor, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Output, gradients and statistics of one training step with the chunked steps, then without."""
    results = []
    monkeypatch.setattr(chunks, "MIN_VALUES", 0)
    monkeypatch.setattr(chunks, "DTYPES", (torch.float32, torch.float64))
    for chunked in (True, False):
        fill_state(module).to(dtype).train()
        for name, buffer in module.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()
        taken = x.to(dtype).clone().requires_grad_()
        module.zero_grad()
        with monkeypatch.context() as patch:
            if not chunked:
                patch.setattr(chunks, "applies", lambda _x: False)
            y = module(taken.to(memory_format=torch.channels_last))
        (y * wave(tuple(y.shape), "fused/weights").to(dtype)).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        results.append({"output": y.detach(), "input": taken.grad} | gradients | buffers)
    return results


@pytest.mark.parametrize("chunk_values", [1, 1000, 1 << 17], ids=["row by row", "uneven", "as used"])
def test_a_training_step_is_the_plain_one_in_float64(monkeypatch, chunk_values):
    monkeypatch.setattr(chunks, "CHUNK_VALUES", chunk_values)
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
    assert not chunks.applies(x[:8])
    assert chunks.applies(x)
    assert not chunks.applies(x.contiguous())
    with torch.no_grad():
        assert not chunks.applies(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not chunks.applies(x)


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
        monkeypatch.setattr(chunks, "MIN_VALUES", least)
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
    monkeypatch.setattr(chunks, "MIN_VALUES", 0)
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
    monkeypatch.setattr(chunks, "MIN_VALUES", 0)
    x, seen = wave(X, "func").to(memory_format=torch.channels_last), []
    torch.func.grad(lambda z: seen.append(chunks.applies(z)) or z.sum())(x)
    assert seen == [False]
    assert chunks.applies(x) and not chunks.applies(x.double())


X32 = (2, 8, 4, 6)


def response_norm() -> ResponseNorm:
    module = ResponseNorm().train()
    nn.init.constant_(module.gamma, 0.7)
    nn.init.constant_(module.beta, -0.1)
    return module


def is_chunked(y: torch.Tensor) -> bool:
    return y.grad_fn is not None and "ResponseNorm" in type(y.grad_fn).__name__


def test_the_response_norm_takes_its_fast_step_only_where_it_changes_nothing(monkeypatch):
    monkeypatch.setattr(chunks, "MIN_VALUES", 0)
    x = wave(X32, "response").to(memory_format=torch.channels_last)
    norm = response_norm()
    plain = response_norm().eval()(x)
    torch.testing.assert_close(norm(x), plain)
    assert is_chunked(norm(x))
    assert not is_chunked(norm.eval()(x))
    norm.train()
    assert not is_chunked(norm(x.contiguous()))
    with torch.no_grad():
        assert norm(x).grad_fn is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_chunked(norm(x))
    assert not is_chunked(norm(x.double()))
    y = response_norm().double()(x)  # parameters of another type: the result has the wider one
    assert not is_chunked(y) and y.dtype == torch.float64
    with FlopCounterMode(display=False):
        assert not is_chunked(norm(x))
    with forward_ad.dual_level():  # derivatives in forward direction, which the fast step does not have
        dual = norm(forward_ad.make_dual(x, torch.ones_like(x)))
        assert not is_chunked(dual) and forward_ad.unpack_dual(dual).tangent is not None
    torch.func.grad(lambda z: norm(z).sum())(x)
    called = []
    norm.register_forward_hook(lambda *_: called.append(1))
    assert is_chunked(norm(x)) and called == [1]


def test_what_computes_the_response_norms_parameters_learns(monkeypatch):
    results = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(chunks, "MIN_VALUES", least)
        norm = response_norm()
        prune.l1_unstructured(norm, "gamma", 1)  # a mask of 0
        norm(wave(X32, "response").to(memory_format=torch.channels_last)).square().sum().backward()
        results.append((norm.gamma_orig.grad, norm.beta.grad))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0] == 0


def test_hooks_of_the_block_itself_run_beside_the_fast_step(monkeypatch):
    monkeypatch.setattr(chunks, "MIN_VALUES", 0)
    model, called = small_network(), []
    model.stages.s1.b1.block.register_forward_hook(lambda _module, _inputs, y: called.append(y) or 2 * y)
    x = wave(X, "hooks").to(memory_format=torch.channels_last)
    chunked = model(x)
    monkeypatch.setattr(chunks, "MIN_VALUES", 1 << 40)
    torch.testing.assert_close(chunked, model(x), rtol=1e-3, atol=1e-4)
    assert len(called) == 2


def test_a_block_of_other_layers_is_a_plain_sequence(monkeypatch):
    monkeypatch.setattr(chunks, "MIN_VALUES", 0)
    block = InvertedBottleneck(4, 8, 4).train()
    x = wave((2, 4, 8, 8), "block").to(memory_format=torch.channels_last)
    assert are_plain(block)
    assert not are_plain(InvertedBottleneck(4, 8, 4).double())
    block[1] = nn.Identity()
    block[2] = nn.Conv2d(8, 4, 1)
    assert block(x).shape == (2, 4, 8, 8)


def test_freed_memory_is_kept_where_the_c_library_can():
    assert isinstance(keep_freed_memory(), bool)
    assert torch.ones(10_000_000).sum() == 10_000_000
