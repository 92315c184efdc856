"""Training steps on a CPU with fewer passes over memory: when they apply, and how a batch goes through the cache.

On a CPU, batch norm, ReLU and response normalisation cost more than the convolutions, because each reads and writes the
whole batch several times. The layers that know a way around that (`inverted_bottleneck.py`, `response_norm.py`) take
the batch through the cache in chunks: the same functions, to rounding.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_state
from torch.utils._python_dispatch import _get_current_dispatch_mode

CHUNK_VALUES = 1 << 17  # of the widest tensor, for each thread: a few such chunks fit a core's cache
DTYPES = (torch.float32,)
MIN_VALUES = 1 << 20  # of a smaller input, all tensors stay in the cache as it is


def applies(x: Tensor) -> bool:
    """Whether the chunked steps are of use for x (batch, channel, freq, time): training large batches on a CPU.

    They compute in float32 and differentiate once, backward; where something else is asked for, or somebody watches the
    operators (a dispatch mode, such as those that count), the plain layers do it.
    """
    return (
        type(x) in (Tensor, nn.Parameter)  # not 8 bits, and no other class with operators of its own
        and x.device.type == "cpu"
        and x.numel() >= MIN_VALUES
        and x.dtype in DTYPES
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def is_altered(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, pruned or otherwise computed weights."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    is_computed = "weight" in module._modules or (hasattr(module, "weight") and "weight" not in module._parameters)
    return any(hooks) or is_computed or "parametrizations" in module._modules or "forward" in vars(module)


def has_global_hooks() -> bool:
    return module_state._has_any_global_hook()


def as_rows(x: Tensor) -> Tensor:
    """(batch, channel, freq, time) in channels-last order as (row, channel), without a copy."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_maps(rows: Tensor, shape: torch.Size) -> Tensor:
    """(row, channel) as (batch, channel, freq, time) in channels-last order, without a copy."""
    return rows.view(shape[0], *shape[2:], -1).permute(0, 3, 1, 2)


def chunk_length(values_each: int) -> int:
    return max(1, CHUNK_VALUES * torch.get_num_threads() // values_each)


def relu_backward(gradient: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(gradient, output, 0)
