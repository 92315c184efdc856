"""How data flows between the layers of a network, found by running it: what follows what, and who else computes."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.layers.core import ANSWERS, AS_LEVELS


@dataclass
class Flow:
    """Names are those of `named_modules`; a layer counts as followed by another where that alone reads its result."""

    calls: Counter[str] = field(default_factory=Counter)
    norm_of: dict[str, str] = field(default_factory=dict)  # convolution -> batch norm
    relu_of: dict[str, str] = field(default_factory=dict)  # layer of any kind -> ReLU
    dropout_before: set[str] = field(default_factory=set)  # norms that read the result through a dropout
    reads: dict[str, list[bool]] = field(default_factory=dict)  # layer -> of each input, whether it is in 8 bits
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outside: list[tuple[str, str]] = field(default_factory=list)  # module that computes 8-bit values itself, with what
    answers_in_8_bits: bool = False

    def is_alone(self, *names: str) -> bool:
        return all(self.calls[name] == 1 for name in names)


Gives = Callable[[nn.Module, list[bool]], bool | None]


@torch.no_grad()
def trace(model: nn.Module, example: Tensor, gives_8_bits: Gives = lambda _module, _reads: None) -> Flow:
    """Runs a copy of a network, in eval mode, float32 and on the CPU.

    Args:
        gives_8_bits: says of a module and its inputs whether its output will be in 8 bits; None: the module is no layer
            but something that contains layers, and what it computes itself shows.
    """
    model = copy.deepcopy(model).eval()
    is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model = (model.to_empty(device="cpu") if is_meta else model.cpu()).float()
    flow, names = Flow(), {module: name for name, module in model.named_modules()}
    made_by: dict[int, str] = {}  # address of a result -> its convolution
    given_by: dict[int, str] = {}  # -> any layer
    dropped: set[int] = set()
    found: list[tuple[str, str, str, int]] = []  # what, layer, follower, address
    in_8_bits: set[int] = set()
    running: list[tuple[nn.Module, bool]] = []  # modules, innermost last; whether it, or one around it, is a layer
    reads = _Reads()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, states = names[module], [_address(x) in in_8_bits for x in _tensors((args, kwargs))]
        inside = bool(running) and running[-1][1]
        running.append((module, inside or gives_8_bits(module, states) is not None))
        flow.reads[name] = states
        flow.input_shapes[name] = next((_shape(x) for x in _tensors((args, kwargs))), ())

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        running.pop()
        name = names[module]
        flow.calls[name] += 1
        first = next(_tensors((args, kwargs)), None)
        source = None if first is None else _address(first)
        if isinstance(module, nn.BatchNorm2d) and source in made_by and module.track_running_stats:
            found.append(("norm", made_by[source], name, source))
            if source in dropped:
                flow.dropout_before.add(name)
        if isinstance(module, nn.ReLU) and source in given_by:
            found.append(("relu", given_by[source], name, source))
        if isinstance(module, nn.modules.dropout._DropoutNd) and source is not None:
            dropped.add(source)
            return
        is_layer = next(module.children(), None) is None or gives_8_bits(module, flow.reads[name]) is not None
        for tensor in _tensors(output):
            if is_layer and _address(tensor) != source:  # else it hands on what another gave
                given_by[_address(tensor)] = name
            if isinstance(module, nn.Conv2d):
                made_by[_address(tensor)] = name
        gives = gives_8_bits(module, flow.reads[name])
        if gives is not None and not (running and running[-1][1]):
            for tensor in _tensors(output):
                (in_8_bits.add if gives else in_8_bits.discard)(_address(tensor))

    handles = []
    for module in names:
        module._forward_pre_hooks.clear()  # of others, whom this run is no business of
        module._forward_hooks.clear()
        if isinstance(module, nn.ReLU):
            module.inplace = False  # else what it reads and what it gives would be one piece of memory
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))

    def compute(func: Any, args: tuple, kwargs: dict) -> Any:
        result = func(*args, **kwargs)
        if (running and running[-1][1]) or not any(_address(x) in in_8_bits for x in _tensors((args, kwargs))):
            return result
        first = args[0] if args else None
        answer = ANSWERS.get(func)
        if answer is None or not isinstance(first, Tensor) or _address(first) not in in_8_bits:
            module = running[-1][0] if running else model
            flow.outside.append((names[module], _name(func)))
        elif answer in AS_LEVELS:
            in_8_bits.update(_address(x) for x in _tensors(result))
        return result

    with reads, _Functions(compute):
        result = model(example.detach().cpu().float())
    answers = {_address(tensor) for tensor in _tensors(result)}
    flow.answers_in_8_bits = bool(answers & in_8_bits)
    for what, layer, follower, address in found:
        if flow.is_alone(layer, follower) and reads.count[address] == 1 and address not in answers:
            (flow.norm_of if what == "norm" else flow.relu_of)[layer] = follower
    return flow


class _Reads(TorchDispatchMode):
    """Counts how many operations take each piece of memory, views included."""

    def __init__(self):
        super().__init__()
        self.count: Counter[int] = Counter()
        self._kept: list[Any] = []  # an address stands for one tensor only as long as none is freed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count.update({_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)})
        self._kept += [value.untyped_storage() for value in tree_leaves(result) if isinstance(value, Tensor)]
        return result


class _Functions(TorchFunctionMode):
    """Hands on what is called on tensors from Python, and nothing that this calls in turn."""

    def __init__(self, compute: Callable[[Any, tuple, dict], Any]):
        super().__init__()
        self.compute = compute

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})


def _name(func: Any) -> str:
    """`relu`, `add`; of a property that is read, its own name."""
    return getattr(getattr(func, "__self__", None) if func.__name__ == "__get__" else func, "__name__", str(func))


def _tensors(value: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    with torch._C.DisableTorchFunction():
        return tuple(tensor.shape)


def _address(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():  # or this would count as a computation
        return tensor.untyped_storage().data_ptr()
