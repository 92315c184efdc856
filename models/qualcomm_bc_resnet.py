"""BC-ResNet as its authors published it, for spoken keywords: broadcasted residual learning in sizes `tau`.

Source: B. Kim, S. Chang, J. Lee, D. Sung, "Broadcasted Residual Learning for Efficient Keyword Spotting", Interspeech
2021, https://arxiv.org/abs/2106.04140, https://github.com/Qualcomm-AI-research/bcresnet. Departures: none in the
function or in the state dict; `tau` may be any number, and its default front end is this project's at their resolution
(40 bands, windows of 30 ms, steps of 10 ms, 16 kHz), with pre-emphasis and another logarithmic offset.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from models.bounds import MAX_CHANNELS, Bounds, check_channels, check_numbers
from models.layers.add import Add
from models.layers.axis_mean import AxisMean
from models.layers.sub_spectral_norm import SubSpectralNorm

N_BLOCKS = (2, 2, 4, 4)  # of each stage
WIDTHS = (2, 1, 1.5, 2, 2.5, 4)  # of stem, stages and head, in base channels
STRIDES = (1, 2, 2, 1)  # of each stage's first block, along freq
N_BANDS = 5  # of the sub-spectral norms


@dataclass(frozen=True)
class QualcommBcResnetConfig:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    in_channels: Annotated[int, "channels of the spectrogram", Bounds(1, MAX_CHANNELS)] = 1
    tau: Annotated[
        float,
        "size: the first stage has 8 * tau channels, rounded down; published are 1, 1.5, 2, 3, 6 and 8",
        Bounds(0.25, 100),
    ] = 1.0
    dropout: Annotated[float, "share of channels dropped at the end of a branch", Bounds(0, 1, below=True)] = 0.1

    def __post_init__(self):
        check_numbers(self)

    @property
    def widths(self) -> list[int]:
        """Channels of the stem, of each stage, and of the head."""
        base = int(8 * self.tau)
        return [int(base * factor) for factor in WIDTHS]


def unit(*layers: nn.Module) -> nn.Sequential:
    """Layers below the name `block`, as the published state dict has them."""
    return nn.Sequential(OrderedDict(block=nn.Sequential(*layers)))


class BroadcastedBlock(nn.Module):
    """A depthwise convolution along freq (f2), and what a branch along time (f1) makes of its mean over freq.

    The branch is added to every row, and the input too where the width stays; a pointwise transition is the first
    layer of f2 where it changes.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, dilation: int, dropout: float):
        super().__init__()
        is_transition = c_in != c_out
        transition = unit(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        along_freq = nn.Conv2d(c_out, c_out, (3, 1), (stride, 1), padding=(1, 0), groups=c_out, bias=False)
        along_time = nn.Conv2d(
            c_out, c_out, (1, 3), padding=(0, dilation), dilation=(1, dilation), groups=c_out, bias=False
        )
        norm = SubSpectralNorm(c_out, N_BANDS, norm_name="ssnorm")
        self.f2 = nn.Sequential(*([transition] if is_transition else []), unit(along_freq, norm))
        self.mean = AxisMean(2)
        self.f1 = nn.Sequential(
            unit(along_time, nn.BatchNorm2d(c_out), nn.SiLU()),
            nn.Conv2d(c_out, c_out, 1, bias=False),
            nn.Dropout2d(dropout),
        )
        self.broadcast_add = Add()
        self.shortcut_add = None if is_transition else Add()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channel, freq, time)
        rows = self.f2(x)
        y = self.broadcast_add(rows, self.f1(self.mean(rows)))  # f1: (batch, channel, 1, time)
        if self.shortcut_add is not None:
            y = self.shortcut_add(y, x)
        return self.relu(y)


class QualcommBcResnet(nn.Module):
    """Strided stem, four stages of `BroadcastedBlock` that dilate more and more, a head over all rows.

    Raises:
        ValueError: from `forward`, for mel bands whose rows the five sub-bands do not divide in every stage; 40 and
            other multiples of 40 do.
    """

    # Its recipe's spectrogram: ln(power + 1e-6) in torchaudio's filters.
    default_frontend = (
        "dragonsearch_mel",
        {"sample_rate": 16000, "n_fft": 512, "win_length": 480, "hop_length": 160, "n_mels": 40, "scale": "ln"},
    )
    entry = "BCBlocks.0.0.f2.1.block.1.ssnorm.weight"

    def __init__(self, config: QualcommBcResnetConfig):
        super().__init__()
        self.config = config
        stem, *stages, head = config.widths
        self.cnn_head = nn.Sequential(
            nn.Conv2d(config.in_channels, stem, 5, stride=(2, 1), padding=2, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        self.BCBlocks, c_in = nn.ModuleList(), stem
        for i, (c_out, n_blocks, stride) in enumerate(zip(stages, N_BLOCKS, STRIDES, strict=True)):
            stage = nn.ModuleList()
            for j in range(n_blocks):
                stage.append(BroadcastedBlock(c_in, c_out, 1 if j else stride, 2**i, config.dropout))
                c_in = c_out
            self.BCBlocks.append(stage)
        self.classifier = nn.Sequential(
            nn.Conv2d(c_in, c_in, 5, padding=(0, 2), groups=c_in, bias=False),
            nn.Conv2d(c_in, head, 1, bias=False),
            nn.BatchNorm2d(head),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(head, config.n_classes, 1),
        )

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, channel, mel, time) to logits (batch, class), before softmax."""
        check_channels(log_mel, self.config.in_channels)
        rows = [(log_mel.shape[2] + 1) // 2]
        for stride in STRIDES[:-1]:
            rows.append((rows[-1] + stride - 1) // stride)
        if any(n % N_BANDS for n in rows) or not log_mel.shape[3]:
            raise ValueError(
                f"{N_BANDS} sub-bands must divide the rows of every stage, {', '.join(map(str, rows[1:]))} for "
                f"{log_mel.shape[2]} mel bands: take 40, or a multiple"
            )
        x = self.cnn_head(log_mel)  # (batch, 2 * base, mel / 2, time)
        for stage in self.BCBlocks:
            for block in stage:
                x = block(x)
        x = self.classifier(x)  # (batch, class, 1, 1)
        return x.mean(dim=(2, 3))

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell; dropout is the published one.

        Raises:
            LookupError: for an incomplete state dict.
        """
        stem = state["cnn_head.0.weight"]
        return {
            "n_classes": state["classifier.5.weight"].shape[0],
            "in_channels": stem.shape[1],
            "tau": stem.shape[0] / 16,
        }, {}
