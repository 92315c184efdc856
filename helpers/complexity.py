"""Size and cost of a network, as the challenge counts them."""

from dataclasses import dataclass

import torch
from torch import nn

MAX_PARAMETER_BYTES = 128_000
MAX_MACS = 30_000_000


@dataclass(frozen=True)
class Complexity:
    n_parameters: int
    macs: int  # multiply-accumulates of all convolutions and linear layers for one clip

    def __str__(self) -> str:
        return (
            f"{self.n_parameters:,} parameters ({self.n_parameters:,} bytes at 8 bits, limit {MAX_PARAMETER_BYTES:,}), "
            f"{self.macs / 1e6:.2f} million MACs for one clip (limit {MAX_MACS / 1e6:.0f})"
        )


def count_complexity(model: nn.Module, input_shape: tuple[int, ...]) -> Complexity:
    """Counts parameters, and the MACs of one input of `input_shape` (channel, mel, time), with the weights alone."""
    macs = 0

    def count(module: nn.Module, _inputs, output: torch.Tensor) -> None:
        nonlocal macs
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        macs += module.weight.numel() * positions

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape, device=device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return Complexity(sum(p.numel() for p in model.parameters()), macs)
