"""Reads checkpoints of BEATs in the authors' format, {"cfg": {...}, "model": {...}}."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.beats import BeatsConfig, BeatsEncoder
from models.state_dicts import differences, some

logger = logging.getLogger(__name__)

TABLE = "relative_attention_bias.weight"
HEAD_WIDTH = 64  # of the published networks
# What the authors' code takes for an option that the cfg of a checkpoint does not name; where it differs from ours.
CODE_DEFAULTS = {
    "input_patch_size": -1,
    "layer_wise_gradient_decay_ratio": 1.0,
    "deep_norm": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "encoder_layerdrop": 0.0,
    "relative_position_embedding": False,
    "max_distance": 1280,
    "gru_rel_pos": False,
}


def read_checkpoint(content: Any, n_classes: int | None = None) -> tuple[BeatsConfig, dict[str, Tensor]]:
    """Config and weights from the content of a checkpoint in the authors' format, {"cfg": {...}, "model": {...}}.

    Both kinds are read: the self-supervised ones, which have no classifier, and those fine-tuned on AudioSet, whose
    `predictor` is returned as the classifier. For another number of classes than the
    predictor's it is dropped when they are loaded, as in the published fine-tuning.

    Args:
        content: what `torch.load` returns.
        n_classes: of the network to build; None: those of the predictor, 10 where there is none.

    Returns:
        The config, and the state dict under the names of `Beats`; `dataclasses.replace` changes options of training.

    Raises:
        ValueError: when it is something else, incomplete, or its weights do not fit its cfg; the message says in what.
    """
    missing = [name for name in ("cfg", "model") if not (isinstance(content, Mapping) and name in content)]
    if missing:
        found = some(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"no BEATs checkpoint: it lacks {' and '.join(missing)}; found: {found}")
    cfg, model = content["cfg"], content["model"]
    for name, part in (("cfg", cfg), ("model", model)):
        if not isinstance(part, Mapping):
            raise ValueError(f"no BEATs checkpoint: {name} must be a dict, got {type(part).__name__}")
    config = _config_from_cfg(cfg)
    with torch.device("meta"):  # shapes alone
        encoder = BeatsEncoder(config).state_dict()
        predictor = nn.Linear(config.encoder_embed_dim, config.predictor_class).state_dict(prefix="predictor.")
    if not predictor.keys() & model.keys():
        predictor = {}
    if what := differences(model, encoder | predictor):
        raise ValueError(f"the weights of the BEATs checkpoint do not fit its cfg: {what}")
    tables = [name for name in encoder if name.endswith(TABLE)]
    for name in tables[1:]:
        if not torch.equal(model[name], model[tables[0]]):
            raise ValueError(f"all layers of BEATs share a table of positions, but {name} differs from {tables[0]}")
    state = {f"encoder.{name}": model[name] for name in encoder}
    state |= {name.replace("predictor.", "classifier.linear."): model[name] for name in predictor}
    if n_classes is None:
        n_classes = config.predictor_class if predictor else config.n_classes
    return replace(config, n_classes=n_classes), state


def config_of_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Config of BEATs under the names of the fine-tuned network, `encoder.` and `classifier.`, read off the shapes.

    Raises:
        ValueError: for weights that do not fit together; LookupError for an incomplete state dict.
    """
    layer = "encoder.encoder.layers.0."
    is_glu = f"{layer}fc1.linear.weight" in state
    has_table, is_gated = f"{layer}self_attn.{TABLE}" in state, f"{layer}self_attn.grep_a" in state
    patches, taps = state["encoder.patch_embedding.weight"], state["encoder.encoder.pos_conv.0.weight_v"]
    width = state["encoder.encoder.layer_norm.weight"].shape[0]
    cfg = {field.name: field.default for field in fields(BeatsConfig)} | {
        "input_patch_size": patches.shape[2],
        "embed_dim": patches.shape[0],
        "conv_bias": "encoder.patch_embedding.bias" in state,
        "encoder_layers": len({name.split(".")[3] for name in state if name.startswith("encoder.encoder.layers.")}),
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": state[f"{layer}fc2.weight"].shape[1],
        "encoder_attention_heads": width // HEAD_WIDTH,
        "conv_pos": taps.shape[2],
        "conv_pos_groups": width // taps.shape[1],
        "relative_position_embedding": has_table,
        "gru_rel_pos": is_gated,
        "predictor_class": state["classifier.linear.weight"].shape[0],
    }
    if is_glu:
        cfg |= {"activation_fn": "glu", "deep_norm": False}
    if has_table:
        table = state[f"{layer}self_attn.{TABLE}"]
        cfg |= {"num_buckets": table.shape[0], "encoder_attention_heads": table.shape[1]}
    elif is_gated:
        cfg["encoder_attention_heads"] = state[f"{layer}self_attn.grep_a"].shape[1]
    model = {_author_name(name): value for name, value in state.items()}
    config, _ = read_checkpoint({"cfg": cfg, "model": model})
    return asdict(config)


def _author_name(name: str) -> str:
    return name.removeprefix("encoder.").replace("classifier.linear.", "predictor.")


def _config_from_cfg(cfg: Mapping[str, Any]) -> BeatsConfig:
    kinds = {field.name: type(field.default) for field in fields(BeatsConfig)}
    ours = ("n_classes", "grad_checkpointing")
    values = {name: cfg[name] for name in kinds if name in cfg and name not in ours}
    for name, value in values.items():
        if kinds[name] is bool and type(value) is int and value in (0, 1):
            values[name] = bool(value)
        elif not (type(value) is kinds[name] or (kinds[name] is float and type(value) is int)):
            raise ValueError(f"cfg of the BEATs checkpoint: {name} must be a {kinds[name].__name__}, got {value!r}")
    if unknown := [name for name in cfg if name not in values]:
        logger.info("cfg of the BEATs checkpoint: not known and not used: %s", some(map(str, unknown)))
    try:
        return BeatsConfig(**(CODE_DEFAULTS | values))
    except ValueError as error:
        raise ValueError(f"cfg of the BEATs checkpoint: {error}") from error
