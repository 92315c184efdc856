"""BEATs: a transformer on the patches of a spectrogram, pre-trained on AudioSet without labels; a teacher.

Source: S. Chen, Y. Wu, C. Wang, S. Liu, D. Tompkins, Z. Chen, F. Wei, "BEATs: Audio Pre-Training with Acoustic
Tokenizers", ICML 2023, https://github.com/microsoft/unilm/tree/master/beats, as used in
https://github.com/yqcai888/easy_dcase_task1. State dict and options are the published ones. Departures, none of which
changes a result: the input is (batch, 1, mel, time) as everywhere here; tokens are (batch, token, width); attention is
PyTorch's fused one; tokens are averaged before the classifier; layer drop is drawn from torch's generator, not NumPy's.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.bounds import MAX_CHANNELS, MAX_LAYERS, MOST, Bounds, check_numbers, check_weights

INIT_STD = 0.02
GATE_UNITS = 4  # outputs of grep_linear that are summed to one gate
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "glu": lambda x: x,  # in `GatedLinear`
}


@dataclass(frozen=True)
class BeatsConfig:
    """Options as in the cfg of the authors' checkpoints; the defaults are those of BEATs_iter3+ (AS2M)."""

    n_classes: Annotated[int, "number of scenes; training takes it from the data set", Bounds(1, MAX_CHANNELS)] = 10
    input_patch_size: Annotated[int, "side of a patch in mel bands and frames", Bounds(1, 1024)] = 16
    embed_dim: Annotated[int, "width of an embedded patch", Bounds(1, MAX_CHANNELS)] = 512
    encoder_layers: Annotated[int, "transformer layers; 12 in all published weights", Bounds(1, MAX_LAYERS)] = 12
    encoder_embed_dim: Annotated[int, "width of the tokens; 768 in all published weights", Bounds(1, MAX_CHANNELS)] = (
        768
    )
    encoder_ffn_embed_dim: Annotated[
        int, "width inside the feed-forward part; 3072 in all published weights", Bounds(1, MAX_CHANNELS)
    ] = 3072
    encoder_attention_heads: Annotated[int, "attention heads; 12 in all published weights", Bounds(1)] = 12
    dropout: Annotated[
        float, "training: dropout after attention and feed-forward part; 0 is off", Bounds(0, 1, below=True)
    ] = 0.0
    attention_dropout: Annotated[
        float, "training: dropout of attention weights; 0 is off", Bounds(0, 1, below=True)
    ] = 0.0
    activation_dropout: Annotated[
        float, "training: dropout inside the feed-forward part; 0 is off", Bounds(0, 1, below=True)
    ] = 0.0
    dropout_input: Annotated[float, "training: dropout of the embedded patches; 0 is off", Bounds(0, 1, below=True)] = (
        0.0
    )
    predictor_dropout: Annotated[
        float, "training: dropout before the classifier; 0 is off", Bounds(0, 1, below=True)
    ] = 0.1
    encoder_layerdrop: Annotated[
        float, "training: probability that a layer is skipped, per batch; 0 is off", Bounds(0, 1, below=True)
    ] = 0.05
    layer_wise_gradient_decay_ratio: Annotated[
        float, "training: factor of the gradient from each layer to the one below; 1 is off", Bounds(0, 1, above=True)
    ] = 0.6
    grad_checkpointing: Annotated[bool, "training: compute layers again in the backward pass to save memory"] = False
    activation_fn: Literal[tuple(ACTIVATIONS)] = "gelu"
    layer_norm_first: bool = False  # norm before attention and feed-forward part, not after the sum
    deep_norm: bool = True  # DeepNet's weight of the shortcut, and its initialisation
    conv_bias: bool = False  # of the patch embedding
    conv_pos: int = 128  # taps of the convolution that tells positions, in tokens
    conv_pos_groups: int = 16
    relative_position_embedding: bool = True
    num_buckets: int = 320  # of distances between tokens, both directions
    max_distance: int = 800  # in tokens; all that is farther shares a bucket
    gru_rel_pos: bool = True  # every token weighs the position bias
    # What the authors' fine-tuning on AudioSet left in cfg. It tells where weights come from, and changes nothing.
    finetuned_model: bool = False
    predictor_class: int = 527

    def __post_init__(self):
        check_numbers(self)
        for name in ("predictor_class", "conv_pos", "conv_pos_groups", "max_distance"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        width = self.encoder_embed_dim
        layer = 4 * width**2 + 2 * width * self.encoder_ffn_embed_dim
        check_weights(layer * self.encoder_layers, "encoder_embed_dim, encoder_ffn_embed_dim or encoder_layers")
        for name in ("encoder_attention_heads", "conv_pos_groups"):
            if width % getattr(self, name):
                raise ValueError(f"{name} must divide encoder_embed_dim ({width}), got {getattr(self, name)}")
        if self.activation_fn not in ACTIVATIONS:
            raise ValueError(f"unknown activation_fn {self.activation_fn!r}; known: {', '.join(ACTIVATIONS)}")
        if self.deep_norm and (self.layer_norm_first or self.activation_fn == "glu"):
            raise ValueError("deep_norm goes neither with layer_norm_first nor with activation_fn glu")
        most = 4 * self.max_distance - 1
        if self.relative_position_embedding and not 4 <= self.num_buckets <= most:
            raise ValueError(f"num_buckets must be in 4 .. 4 * max_distance - 1 ({most}), got {self.num_buckets}")


class PositionConv(nn.Module):
    """Grouped convolution over the tokens, as many out as in; its weights are normalised tap by tap."""

    def __init__(self, width: int, n_taps: int, n_groups: int):
        super().__init__()
        self.n_groups = n_groups
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_g = nn.Parameter(torch.ones(1, 1, n_taps))
        self.weight_v = nn.Parameter(torch.empty(width, width // n_groups, n_taps))

    def forward(self, x: Tensor) -> Tensor:  # (batch, width, token)
        weight = self.weight_v * (self.weight_g / _tap_norm(self.weight_v))
        y = F.conv1d(x, weight, self.bias, padding=weight.shape[2] // 2, groups=self.n_groups)
        return y[..., : x.shape[2]]  # an even number of taps gives one token more


def _tap_norm(weight: Tensor) -> Tensor:
    return weight.square().sum(dim=(0, 1), keepdim=True).sqrt()  # a quarter of the time of vector_norm


class GatedLinear(nn.Module):
    """Two linear maps; the second, through swish, is the gate of the first."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.linear = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.linear(x).chunk(2, dim=-1)
        return value * F.silu(gate)


class Attention(nn.Module):
    def __init__(self, config: BeatsConfig, with_table: bool):
        super().__init__()
        width, self.n_heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.dropout, self.gated = config.attention_dropout, config.gru_rel_pos
        if self.gated:
            self.grep_a = nn.Parameter(torch.ones(1, self.n_heads, 1, 1))
        if with_table:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, self.n_heads)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        if self.gated:
            self.grep_linear = nn.Linear(width // self.n_heads, 2 * GATE_UNITS)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Maps tokens (batch, token, width) to the same shape; bias (head, token, token) is added to the scores."""
        query, key, value = (
            project(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, head, token, width of a head)
        if bias is not None:
            bias = (self._gate(query) * bias if self.gated else bias[None]).to(query.dtype)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _gate(self, query: Tensor) -> Tensor:
        """What each query weighs the position bias with, (batch, head, token, 1)."""
        # Outputs are summed in two groups of four: so may their weights be, which are fewer.
        weight = self.grep_linear.weight.unflatten(0, (2, GATE_UNITS)).sum(dim=1)
        offset = self.grep_linear.bias.unflatten(0, (2, GATE_UNITS)).sum(dim=1)
        a, b = F.linear(query, weight, offset).sigmoid().chunk(2, dim=-1)
        return a * (b * self.grep_a - 1) + 2


class BeatsLayer(nn.Module):
    """Attention and feed-forward part, each added to its input; norm after the sums, or first."""

    def __init__(self, config: BeatsConfig, with_table: bool):
        super().__init__()
        width, hidden = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.norm_first = config.layer_norm_first
        self.alpha = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0
        self.act = ACTIVATIONS[config.activation_fn]
        self.dropout, self.inner_dropout = nn.Dropout(config.dropout), nn.Dropout(config.activation_dropout)
        self.self_attn = Attention(config, with_table)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = GatedLinear(width, hidden) if config.activation_fn == "glu" else nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # (batch, token, width), (head, token, token)
        if self.norm_first:
            x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), bias))
            return x + self._feed_forward(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(self.alpha * x + self.dropout(self.self_attn(x, bias)))
        return self.final_layer_norm(self.alpha * x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.inner_dropout(self.act(self.fc1(x)))))


class BeatsTransformer(nn.Module):
    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        width = config.encoder_embed_dim
        self.pos_conv = nn.Sequential(PositionConv(width, config.conv_pos, config.conv_pos_groups), nn.GELU())
        with_table = config.relative_position_embedding
        self.layers = nn.ModuleList(BeatsLayer(config, with_table and i == 0) for i in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(width)
        if with_table:
            for layer in self.layers[1:]:  # one table for all
                layer.self_attn.relative_attention_bias = self.layers[0].self_attn.relative_attention_bias
            self.register_buffer("bucket", _bucket_of_distance(config), persistent=False)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, token, width)
        config = self.config
        x = x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2)
        if not config.layer_norm_first:
            x = self.layer_norm(x)
        x = F.dropout(x, config.dropout, self.training)
        bias = self._position_bias(x.shape[1]) if config.relative_position_embedding else None
        # Drawn on the CPU: nobody waits for a device to know which layers run.
        drawn = torch.rand(len(self.layers)).tolist() if self.training and config.encoder_layerdrop else None
        for i, layer in enumerate(self.layers):
            if config.layer_wise_gradient_decay_ratio != 1 and x.requires_grad:
                x = torch.lerp(x.detach(), x, config.layer_wise_gradient_decay_ratio)  # x, with a part of the gradient
            if drawn is not None and layer.training and drawn[i] < config.encoder_layerdrop:
                continue
            again = config.grad_checkpointing and layer.training and torch.is_grad_enabled()
            x = checkpoint(layer, x, bias, use_reentrant=False) if again else layer(x, bias)
        return self.layer_norm(x) if config.layer_norm_first else x

    def _position_bias(self, n_tokens: int) -> Tensor:
        """What the distance from query to key adds to every score, (head, query, key)."""
        offset = torch.arange(1 - n_tokens, n_tokens, device=self.bucket.device)  # key - query
        bucket = self.bucket[offset.abs().clamp_max(self.config.max_distance)]
        bucket = bucket + (offset > 0) * (self.config.num_buckets // 2)
        values = self.layers[0].self_attn.relative_attention_bias(bucket).t()  # (head, 2 token - 1)
        # The row of the last query begins at the first offset, that of each query before it one later.
        return values.unfold(1, n_tokens, 1).flip(1)


def _bucket_of_distance(config: BeatsConfig) -> Tensor:
    """Bucket of the distances 0 .. max_distance: one each when near, then ever wider ones, as in T5."""
    n_buckets = config.num_buckets // 2  # of one direction
    n_exact = n_buckets // 2
    distance = torch.arange(config.max_distance + 1)
    share = (distance.clamp_min(n_exact).float() / n_exact).log() / math.log(config.max_distance / n_exact)
    wide = n_exact + (share * (n_buckets - n_exact)).long()
    return torch.where(distance < n_exact, distance, wide.clamp_max(n_buckets - 1))


def _init(transformer: BeatsTransformer) -> None:
    config = transformer.config
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    if config.deep_norm:
        gain = (8 * config.encoder_layers) ** -0.25
        for layer in transformer.layers:
            attn = layer.self_attn
            for linear in (attn.q_proj, attn.k_proj):
                nn.init.xavier_normal_(linear.weight)
            for linear in (attn.v_proj, attn.out_proj, layer.fc1, layer.fc2):
                nn.init.xavier_normal_(linear.weight, gain)
    conv = transformer.pos_conv[0]
    nn.init.normal_(conv.weight_v, std=(4 / (config.conv_pos * config.encoder_embed_dim)) ** 0.5)
    with torch.no_grad():
        conv.weight_g.copy_(_tap_norm(conv.weight_v))


class BeatsEncoder(nn.Module):
    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        patch, width = config.input_patch_size, config.encoder_embed_dim
        self.post_extract_proj = nn.Linear(config.embed_dim, width) if config.embed_dim != width else None
        # Holds the published names; patches do not overlap, so a product of patches does the same, and faster.
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, patch, bias=config.conv_bias)
        self.encoder = BeatsTransformer(config)
        self.layer_norm = nn.LayerNorm(config.embed_dim)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to tokens (batch, token, width), all of a time before the next."""
        patch = self.config.input_patch_size
        if log_mel.ndim != 4 or log_mel.shape[1] != 1 or min(log_mel.shape[2:]) < patch:
            raise ValueError(
                f"log_mel must be (batch, 1, mel, time) with at least {patch} mel bands and frames, the side of a "
                f"patch, got {tuple(log_mel.shape)}"
            )
        n_rows, n_columns = (size // patch for size in log_mel.shape[2:])
        x = log_mel[:, 0, : n_rows * patch, : n_columns * patch]  # what is left over is not used
        x = x.unflatten(2, (n_columns, patch)).unflatten(1, (n_rows, patch))  # (batch, row, mel, column, time)
        x = x.permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)  # (batch, column x row, time x mel)
        x = F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        x = self.layer_norm(x)  # (batch, token, embed_dim)
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        return self.encoder(F.dropout(x, self.config.dropout_input, self.training))


class Beats(nn.Module):
    """Patches of 16 x 16 as tokens, transformer layers with relative positions, linear classifier, mean over tokens.

    Made for the `kaldi_fbank` front end: 128 bands at 16 kHz; 1 second gives 48 tokens, 10 seconds 496. Any length from
    one patch will do; rows and columns that do not fill a patch are left out. With `encoder_layerdrop` some layers get
    no gradient in a step, which DistributedDataParallel has to be told (`find_unused_parameters=True`).

    Raises:
        ValueError: from `forward` and `features`, for spectrograms with more than a channel or smaller than a patch.
    """

    default_frontend = ("kaldi_fbank", {})
    entry = "encoder.patch_embedding.weight"

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        self.frozen: list[nn.Module] = []  # see `freeze_encoder`
        self.encoder = BeatsEncoder(config)
        self.classifier = nn.Sequential(OrderedDict(linear=nn.Linear(config.encoder_embed_dim, config.n_classes)))

    def forward(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to logits (batch, class), before softmax (or sigmoid, for AudioSet)."""
        x = self.features(log_mel)  # (batch, token, width)
        x = F.dropout(x, self.config.predictor_dropout, self.encoder.training)
        return self.classifier(x.mean(dim=1))  # linear: the mean of all tokens' logits

    def features(self, log_mel: Tensor) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to tokens (batch, token, encoder_embed_dim), a column after the other."""
        return self.encoder(log_mel)

    @property
    def skips_layers(self) -> bool:
        return self.config.encoder_layerdrop > 0

    @staticmethod
    def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config, and options of the front end, that the shapes of a fine-tuned network's state dict tell."""
        from models.beats_checkpoint import config_of_shapes  # which needs this file

        return config_of_shapes(state), {}

    @staticmethod
    def read_authors_file(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Config and state of a checkpoint in the authors' form, with or without a classifier; None for another one.

        Raises:
            ValueError: for one that is damaged.
        """
        from models.beats_checkpoint import read_checkpoint

        if not {"cfg", "model"} <= content.keys():
            return None
        config, state = read_checkpoint(content)
        return asdict(config), state

    @staticmethod
    def pretrained_url(config: BeatsConfig) -> str:
        """
        Raises:
            ValueError: always; says where the files are.
        """
        raise ValueError(
            "--pretrained must name a file of weights for BEATs, or none for random ones; the links of its authors are "
            "dead (https://github.com/microsoft/unilm/issues/1671); copies of BEATs_iter3_plus_AS2M.pt and "
            "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt are found by name on Hugging Face"
        )

    def freeze_encoder(self, n_layers: int | None = None) -> None:
        """Keeps the encoder as it is; only what is above it goes on learning.

        What is frozen requires no gradient, and stays in eval mode when `train()` is called (no dropout, no layer
        drop): all that comes before the layers, and the first `n_layers` of them. They read the table of relative
        positions, so it is frozen with the first. Call it before an optimizer or DistributedDataParallel is built.

        Args:
            n_layers: None for the whole encoder: only the classifier learns, as in easy_dcase_task1's SSL* teacher.

        Raises:
            ValueError: when there are not that many layers.
        """
        encoder, transformer = self.encoder, self.encoder.encoder
        n_all = len(transformer.layers)
        if n_layers is not None and not 0 <= n_layers <= n_all:
            raise ValueError(f"n_layers to freeze must be in 0 .. {n_all}, or None for all, got {n_layers}")
        if n_layers in (None, n_all):
            parts = [encoder]
        else:
            parts = [encoder.patch_embedding, encoder.layer_norm, encoder.post_extract_proj, transformer.pos_conv]
            parts += [None if self.config.layer_norm_first else transformer.layer_norm, *transformer.layers[:n_layers]]
        self.requires_grad_(True)
        self.frozen = [part.requires_grad_(False) for part in parts if part is not None]
        self.train(self.training)

    def train(self, mode: bool = True) -> "Beats":
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self
