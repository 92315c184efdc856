"""PaSST: a vision transformer on overlapping spectrogram patches, of which training drops some (patchout); a teacher.

Source: K. Koutini, J. Schlüter, H. Eghbal-zadeh, G. Widmer, "Efficient Training of Audio Transformers with Patchout",
Interspeech 2022, https://github.com/kkoutini/PaSST, as used in https://github.com/fschmid56/cpjku_dcase23. The state
dict is the published one. Departures, none of which changes a result: `forward` returns the logits alone and `features`
the embedding; dropped patches are left out before they are projected; the last block computes only the two tokens that
are read; `head_dist` takes no part in training.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.bounds import MAX_CHANNELS, MAX_LAYERS, Bounds, check_numbers, check_weights

logger = logging.getLogger(__name__)

PATCH = 16  # mel bands and frames
MLP_RATIO = 4
NORM_EPS = 1e-6  # of every norm but head.0, which has PyTorch's default
INIT_STD = 0.02
STRIDES = (10, 12, 14, 16)  # of published networks
HEAD_WIDTH = 64
RELEASES = "https://github.com/kkoutini/PaSST/releases/download"


@dataclass(frozen=True)
class Architecture:
    """What a published set of weights was trained with; all are 12 blocks of width 768."""

    weights: str | None  # file below RELEASES; none on AudioSet for the ImageNet transformer
    stride: int = 10  # of the patches, in mel bands and in frames
    input_tdim: int = 998  # frames that the time embedding spans


ARCHITECTURES = {
    "passt_s_swa_p16_128_ap476": Architecture("v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt"),
    "passt_s_swa_p16_128_ap4761": Architecture("v0.0.2-audioset/passt-s-f128-p16-s10-ap.4761-swa.pt"),
    "passt_s_p16_128_ap472": Architecture("v0.0.2-audioset/passt-s-f128-p16-s10-ap.472.pt"),
    "passt_s_p16_s16_128_ap468": Architecture("v0.0.2-audioset/passt-s-f128-p16-s16-ap.468.pt", 16),
    "passt_s_swa_p16_s16_128_ap473": Architecture("v0.0.2-audioset/passt-s-f128-p16-s16-ap.473-swa.pt", 16),
    "passt_s_swa_p16_s14_128_ap471": Architecture("v0.0.2-audioset/passt-s-f128-p16-s14-ap.471-swa.pt", 14),
    "passt_s_p16_s14_128_ap469": Architecture("v0.0.2-audioset/passt-s-f128-p16-s14-ap.469.pt", 14),
    "passt_s_swa_p16_s12_128_ap473": Architecture("v0.0.2-audioset/passt-s-f128-p16-s12-ap.473-swa.pt", 12),
    "passt_s_p16_s12_128_ap470": Architecture("v0.0.2-audioset/passt-s-f128-p16-s12-ap.470.pt", 12),
    "passt_s_f128_20sec_p16_s10_ap474": Architecture("v0.0.5/passt-s-f128-20sec-p16-s10-ap.474-swa.pt", 10, 2000),
    "passt_s_f128_30sec_p16_s10_ap473": Architecture("v0.0.5/passt-s-f128-30sec-p16-s10-ap.473-swa.pt", 10, 3000),
    "passt_deit_bd_p16_384": Architecture(None),
}


@dataclass(frozen=True)
class PasstConfig:
    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    arch: Annotated[
        Literal[tuple(ARCHITECTURES)], "published weights that this network fits; decides strides and input_tdim"
    ] = "passt_s_swa_p16_128_ap476"
    in_channels: Annotated[int, "channels of the spectrogram", Bounds(1, MAX_CHANNELS)] = 1
    fstride: Annotated[int | None, "step from patch to patch in mel bands; None: that of arch", Bounds(1)] = None
    tstride: Annotated[int | None, "step from patch to patch in frames; None: that of arch", Bounds(1)] = None
    input_fdim: Annotated[int, "mel bands of the spectrogram", Bounds(PATCH)] = 128
    input_tdim: Annotated[
        int | None,
        "frames that the time embedding spans; shorter clips take a part of it; None: that of arch",
        Bounds(PATCH),
    ] = None
    u_patchout: Annotated[int, "training: patches dropped anywhere, drawn per batch; 0 is off", Bounds(0)] = 0
    s_patchout_t: Annotated[
        int, "training: whole columns (time) of patches dropped, drawn per batch; 0 is off", Bounds(0)
    ] = 0
    s_patchout_f: Annotated[
        int, "training: whole rows (mel) of patches dropped, drawn per batch; 0 is off", Bounds(0)
    ] = 6
    grad_checkpointing: Annotated[bool, "training: compute blocks again in the backward pass to save memory"] = False
    embed_dim: Annotated[int, "width of the tokens; 768 in all published weights", Bounds(1, MAX_CHANNELS)] = 768
    depth: Annotated[int, "number of blocks; 12 in all published weights", Bounds(1, MAX_LAYERS)] = 12
    n_heads: Annotated[int, "attention heads; 12 in all published weights", Bounds(1)] = 12

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unknown arch {self.arch!r}; known: {', '.join(ARCHITECTURES)}")
        arch = ARCHITECTURES[self.arch]
        for name, own in (("fstride", arch.stride), ("tstride", arch.stride), ("input_tdim", arch.input_tdim)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, own)
        check_numbers(self)
        check_weights(12 * self.embed_dim**2 * self.depth, "embed_dim or depth")
        if self.embed_dim % self.n_heads:
            raise ValueError(f"embed_dim must be a multiple of n_heads ({self.n_heads}), got {self.embed_dim}")
        rows, columns = self.grid
        for name, n in (("u_patchout", rows * columns), ("s_patchout_t", columns), ("s_patchout_f", rows)):
            if not 0 <= getattr(self, name) < n:
                raise ValueError(
                    f"{name} must be >= 0 and leave some of the {rows} x {columns} patches, got {getattr(self, name)}"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows (mel) and columns (time) of patches in the longest input."""
        return _n_patches(self.input_fdim, self.fstride), _n_patches(self.input_tdim, self.tstride)


def _n_patches(size: int, stride: int) -> int:
    return (size - PATCH) // stride + 1


class PatchEmbed(nn.Module):
    """Projects the patches of a spectrogram, row by row, to tokens; only those that are kept."""

    def __init__(self, in_channels: int, width: int, stride: tuple[int, int]):
        super().__init__()
        # Holds weight and bias under the published names; as a product of patches it takes a half to a quarter of the
        # time, because a convolution with few input channels is slow and cannot leave patches out.
        self.proj = nn.Conv2d(in_channels, width, PATCH, stride)

    def forward(self, log_mel: Tensor, kept: Tensor | None) -> Tensor:
        patches = F.unfold(log_mel, PATCH, stride=self.proj.stride)  # (batch, channel x 16 x 16, patch)
        if kept is not None:
            patches = patches.index_select(2, kept)
        return F.linear(patches.transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)  # (batch, patch, width)


class Attention(nn.Module):
    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, n_out: int | None) -> Tensor:
        """Maps tokens (batch, token, width) to (batch, n_out, width): what the first `n_out` (None: all) attend to."""
        if n_out is None:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            query = F.linear(x[:, :n_out], self.qkv.weight[:width], self.qkv.bias[:width])
            key, value = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, dim=-1)
        # (batch, head, token, width of a head); scores are scaled by the root of that width
        query, key, value = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in (query, key, value))
        y = F.scaled_dot_product_attention(query, key, value)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PasstBlock(nn.Module):
    """Attention and MLP, each on a normalised copy that is added back; returns the first `n_out` tokens (None: all)."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, n_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, n_out: int | None = None) -> Tensor:
        x = x[:, :n_out] + self.attn(self.norm1(x), n_out)
        return x + self.mlp(self.norm2(x))


class Passt(nn.Module):
    """Tokens for the patches of a log-mel spectrogram and two for the answer, transformer blocks, linear classifier.

    Clips may have any length from one patch (16 frames). Short ones take the first columns of the time embedding in
    eval mode, and a randomly placed run of columns in training mode. Of clips longer than `input_tdim` the patches
    beyond its end are left out, as published, and a warning is logged once: choose an `input_tdim`, or an arch, that
    fits.

    Patchout is drawn from torch's generator of the input's device, once for the whole batch, in the published order.

    `head_dist` is there for the published state dict alone. Nothing reads it, so it does not require a gradient:
    neither an optimizer nor DistributedDataParallel waits for one.

    Raises:
        ValueError: from `forward` and `features`, for spectrograms with other mel bands, shorter than a patch, or with
            too few patches for the patchout.
    """

    default_frontend = ("cp_mel", {"n_fft": 1024, "win_length": 800, "hop_length": 320, "n_mels": 128})
    entry = "patch_embed.proj.weight"

    def __init__(self, config: PasstConfig):
        super().__init__()
        self.config = config
        self.grid = config.grid
        width, (rows, columns) = config.embed_dim, config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))  # of the two tokens
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, rows, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, columns))
        self.patch_embed = PatchEmbed(config.in_channels, width, (config.fstride, config.tstride))
        self.blocks = nn.ModuleList(PasstBlock(width, config.n_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.n_classes))
        self.head_dist = nn.Linear(width, config.n_classes)
        self.head_dist.requires_grad_(False)
        self._warned = False
        _init(self)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, channel, mel, time) to logits (batch, class), before softmax."""
        return self.head(self.features(log_mel))

    def features(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, channel, mel, time) to embeddings (batch, embed_dim), from which `head` answers."""
        log_mel = self._fit(log_mel)
        n_columns = _n_patches(log_mel.shape[3], self.config.tstride)
        offset, kept = self.draw_patches(n_columns, log_mel.device) if self.training else (None, None)
        x = self._tokens(log_mel, n_columns, offset, kept)  # (batch, 2 + patch, width)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            n_out = 2 if i == last else None  # only the two tokens are read
            if self.config.grad_checkpointing and self.training and torch.is_grad_enabled():
                # Nothing in a block is random.
                x = checkpoint(block, x, n_out, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, n_out)
        return self.norm(x).mean(dim=1)

    def draw_patches(self, n_columns: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Draws what training randomises, without waiting for the device.

        Returns:
            First column of the time embedding, (1,), None for 0; and the patches to keep, (patch,), ascending, numbered
            row * n_columns + column, None for all.
        """
        config, (rows, columns) = self.config, self.grid
        n_kept = (rows - config.s_patchout_f) * (n_columns - config.s_patchout_t) - config.u_patchout
        if n_columns <= config.s_patchout_t or n_kept < 1:
            raise ValueError(
                f"patchout (s_patchout_t {config.s_patchout_t}, s_patchout_f {config.s_patchout_f}, u_patchout "
                f"{config.u_patchout}) leaves nothing of the {rows} x {n_columns} patches of these clips"
            )

        def draw(n: int, n_dropped: int) -> Tensor:  # (n - n_dropped,), ascending
            if not n_dropped:
                return torch.arange(n, device=device)
            return torch.randperm(n, device=device)[: n - n_dropped].sort().values

        offset = kept = None
        if n_columns < columns:
            offset = torch.randint(columns - n_columns + 1, (1,), device=device)
        if config.s_patchout_t or config.s_patchout_f or config.u_patchout:
            column, row = draw(n_columns, config.s_patchout_t), draw(rows, config.s_patchout_f)
            kept = (row[:, None] * n_columns + column).flatten()
            kept = kept.index_select(0, draw(len(kept), config.u_patchout))
        return offset, kept

    def _fit(self, log_mel: Tensor) -> Tensor:
        """Checks the shape and leaves out the frames beyond the time embedding."""
        config = self.config
        if log_mel.ndim != 4 or log_mel.shape[1] != config.in_channels or log_mel.shape[2] != config.input_fdim:
            raise ValueError(
                f"log_mel must be (batch, {config.in_channels}, {config.input_fdim}, time), got {tuple(log_mel.shape)}"
            )
        n_frames = log_mel.shape[3]
        if n_frames < PATCH:
            raise ValueError(f"log_mel must have at least {PATCH} frames, the side of a patch, got {n_frames}")
        if _n_patches(n_frames, config.tstride) <= self.grid[1]:
            return log_mel
        n_used = (self.grid[1] - 1) * config.tstride + PATCH
        if not self._warned:
            logger.warning(
                "clips have %d frames, only %d are used: input_tdim is %d", n_frames, n_used, config.input_tdim
            )
            self._warned = True
        return log_mel[..., :n_used]

    def _tokens(self, log_mel: Tensor, n_columns: int, offset: Tensor | None, kept: Tensor | None) -> Tensor:
        x = self.patch_embed(log_mel, kept)  # (batch, patch, width)
        freq = self.freq_new_pos_embed[0, :, :, 0].t()  # (row, width)
        time = self.time_new_pos_embed[0, :, 0].t()  # (column, width)
        if offset is None:
            time = time[:n_columns]
        else:
            time = time.index_select(0, offset + torch.arange(n_columns, device=offset.device))
        position = (freq[:, None] + time).flatten(0, 1)  # (row x column, width)
        if kept is not None:
            position = position.index_select(0, kept)
        cls, dist = self.cls_token + self.new_pos_embed[:, :1], self.dist_token + self.new_pos_embed[:, 1:]
        return torch.cat([cls.expand(len(x), -1, -1), dist.expand(len(x), -1, -1), x + position], dim=1)

    def freeze_encoder(self, n_layers: int | None = None) -> None:
        """Keeps the embedding of the patches and the first `n_layers` blocks as they are; the rest goes on learning.

        Nothing in them behaves otherwise in training, so they only require no gradient. Patchout goes on. Call it
        before an optimizer or DistributedDataParallel is built.

        Args:
            n_layers: None for the whole encoder, its last norm included: only the head learns.

        Raises:
            ValueError: when there are not that many blocks.
        """
        n_all = len(self.blocks)
        if n_layers is not None and not 0 <= n_layers <= n_all:
            raise ValueError(f"n_layers to freeze must be in 0 .. {n_all}, or None for all, got {n_layers}")
        self.requires_grad_(True)
        self.head_dist.requires_grad_(False)
        for name, parameter in self.named_parameters(recurse=False):
            parameter.requires_grad_(not name.endswith(("_token", "_embed")))
        for part in (self.patch_embed, *self.blocks[:n_layers], *([self.norm] if n_layers is None else [])):
            part.requires_grad_(False)

    @staticmethod
    def pretrained_url(config: PasstConfig) -> str:
        """Where the weights from AudioSet are that fit the architecture.

        Raises:
            ValueError: for an architecture without such weights.
        """
        weights = ARCHITECTURES[config.arch].weights
        if weights is None:
            raise ValueError(f"{config.arch} has no weights from AudioSet: name a file with --pretrained, or none")
        return f"{RELEASES}/{weights}"

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a state dict tell.

        Raises:
            LookupError: for an incomplete state dict.
        """
        width, in_channels = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[1]
        rows, columns = grid = state["freq_new_pos_embed"].shape[2], state["time_new_pos_embed"].shape[3]
        config = {
            "n_classes": state["head.1.weight"].shape[0],
            "in_channels": in_channels,
            "embed_dim": width,
            "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "n_heads": width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else PasstConfig.n_heads,
            "s_patchout_f": min(PasstConfig.s_patchout_f, rows - 1),  # of training
        }
        n_mels = PasstConfig.input_fdim
        arch = next((arch for arch in ARCHITECTURES if PasstConfig(arch=arch).grid == grid), None)
        if arch is not None:
            return config | {"arch": arch, "input_fdim": n_mels}, {}
        stride = next((n for n in STRIDES if (n_mels - PATCH) // n + 1 == rows), STRIDES[0])
        if (n_mels - PATCH) // stride + 1 != rows:
            n_mels = (rows - 1) * stride + PATCH
        config |= {"fstride": stride, "tstride": stride, "input_fdim": n_mels}
        return config | {"input_tdim": (columns - 1) * stride + PATCH}, {"n_mels": n_mels}


def _init(model: Passt) -> None:
    """Truncated normal for linear layers, tokens and embeddings; the patch convolution keeps PyTorch's default."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=INIT_STD)
            nn.init.zeros_(module.bias)
    for name in ("cls_token", "dist_token", "new_pos_embed", "freq_new_pos_embed", "time_new_pos_embed"):
        nn.init.trunc_normal_(getattr(model, name), std=INIT_STD)
