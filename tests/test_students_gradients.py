"""What is fast in training is right: gradients of every student are those of the network written plainly."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.students import TEACHERS, plain_network, spectrograms
from models import MODELS, get_model


def plain_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm from its definition: PyTorch's own is wrong for some memory layouts, see models/layers/mel_norm.py."""
    over = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x, dim=over, keepdim=True, correction=0)
    weight, bias = (value.view(1, -1, *[1] * (x.ndim - 2)) for value in (norm.weight, norm.bias))
    return (x - mean) / torch.sqrt(variance + norm.eps) * weight + bias


@pytest.mark.parametrize("name", [name for name in MODELS if name not in TEACHERS])
def test_gradients_are_those_of_the_plain_network(name):
    torch.manual_seed(1)
    x = spectrograms(name, 3).double()
    ours, plain = get_model(name).double().train(), plain_network(name).double().train()
    plain.load_state_dict(ours.state_dict())
    for model in (ours, plain):
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d)):
                module.p = 0.0
    for module in plain.modules():
        if type(module) is nn.BatchNorm2d:
            module.forward = types.MethodType(plain_norm, module)
    ours = ours.to(memory_format=torch.channels_last)
    for model in (ours, plain):
        F.cross_entropy(model(x), torch.tensor([1, 5, 0])).backward()
    wanted = {name: value.grad for name, value in plain.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in wanted.values() if gradient is not None)
    for key, value in ours.named_parameters():
        if wanted[key] is not None:  # rounding of float64, larger where norms divide by little
            torch.testing.assert_close(value.grad, wanted[key], rtol=1e-6, atol=1e-8 * largest, msg=key)
