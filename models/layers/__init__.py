"""The kinds of layers that run in 8 bits: one line per kind, and one file per kind with all its forms.

A network takes part when its forward pass is built from these: then it is quantized, exported and counted without
another edit. Its own `forward` may also take means of activations and change their shape (`core.ANSWERS`).

A kind's file has, as far as it needs them: the float layer; the fake-quantized one, a `FakeLayer` made from it, which
says what it takes and gives; the integer one that this converts to, whose `forward` is also its ONNX form while it is
exported; and the XNNPACK form. A fast training step stands beside the layer too. What rounds where is said in each.
"""

from torch import nn

from models.layers.add import Add, FakeAdd
from models.layers.avg_pool import AvgPool, FakeAvgPool
from models.layers.axis_mean import AxisMean, FakeAxisMean
from models.layers.channel_shuffle import ChannelShuffle, FakeChannelShuffle
from models.layers.concat import Concat, FakeConcat
from models.layers.conv_unit import ConvUnit, FakeConv, FakeConvUnit
from models.layers.core import FakeLayer
from models.layers.global_mean import FakeGlobalMean, GlobalMean
from models.layers.linear import FakeLinear
from models.layers.max_pool import FakeMaxPool
from models.layers.mel_norm import FakeMelNorm, MelNorm
from models.layers.plus_conv import FakePlusConv, PlusConv
from models.layers.relu import FakeRelu
from models.layers.residual_norm import FakeResidualNorm, ResidualNorm
from models.layers.response_norm import FakeResponseNorm, ResponseNorm
from models.layers.silu import FakeSilu
from models.layers.split import FakeSplit, Split
from models.layers.sub_spectral_norm import FakeSubSpectralNorm, SubSpectralNorm

# float layer -> fake-quantized layer
KINDS: dict[type[nn.Module], type[FakeLayer]] = {
    ConvUnit: FakeConvUnit,
    nn.Conv2d: FakeConv,  # with the BatchNorm2d that alone reads it
    nn.Linear: FakeLinear,
    Add: FakeAdd,
    AvgPool: FakeAvgPool,
    nn.AvgPool2d: FakeAvgPool,
    nn.MaxPool2d: FakeMaxPool,
    GlobalMean: FakeGlobalMean,
    nn.AdaptiveAvgPool2d: FakeGlobalMean,
    AxisMean: FakeAxisMean,
    ResponseNorm: FakeResponseNorm,
    ResidualNorm: FakeResidualNorm,
    SubSpectralNorm: FakeSubSpectralNorm,
    ChannelShuffle: FakeChannelShuffle,
    Split: FakeSplit,
    Concat: FakeConcat,
    nn.SiLU: FakeSilu,
    MelNorm: FakeMelNorm,
    PlusConv: FakePlusConv,
    nn.ReLU: FakeRelu,  # where it is not part of the layer before it
}
# Layers that hand activations on and need no other form: dropouts are gone on the target.
HAND_ON = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
