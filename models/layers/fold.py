"""Folds batch norms into the convolutions before them, for float networks on the target."""

import copy

import torch
from torch import Tensor, nn

from models.layers.conv_unit import ConvUnit
from models.layers.flow import trace


def fold(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy in which every `ConvUnit` is a convolution with bias; the same function in eval mode, to rounding.

    State-dict names are those of the published fused networks: `<unit>.0.0.*` before a ReLU, else `<unit>.0.*`. Other
    layers that have norms inside may say by themselves what is left of them, with `folded()`.

    Args:
        example: an input of the network, float32, on which a copy is run once to find every other convolution whose
            result goes into a batch norm and nowhere else; those are folded too, under their own names. None folds
            units alone.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ConvUnit):
                conv, relu = torch.nn.utils.fuse_conv_bn_eval(child[0], child[1]), list(child)[2:]
                setattr(module, name, nn.Sequential(nn.Sequential(conv, *relu) if relu else conv))
            elif hasattr(child, "folded"):
                setattr(module, name, child.folded())
    for conv, norm in ({} if example is None else trace(model, example).norm_of).items():
        model.set_submodule(conv, torch.nn.utils.fuse_conv_bn_eval(*map(model.get_submodule, (conv, norm))))
        model.set_submodule(norm, nn.Identity())
    return model
