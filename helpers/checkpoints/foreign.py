"""Checkpoints of others: which network they hold, read off the names and shapes of their weights.

Read are, with the front end that each network was trained with:
- Lightning checkpoints of the published CP-JKU scripts (`state_dict` with `model.` names: CP-Mobile, CP-ResNet, PaSST)
  and of easy_dcase_task1 (`state_dict` with `backbone.` names: BEATs);
- state dicts of the same networks, bare as the published teachers are, or below other keys and prefixes of names;
- CP-Mobile after the published quantization-aware training: its folded biases become norms again;
- BEATs in its authors' form, {"cfg": {...}, "model": {...}}, with a classifier.
None of them but the last says what its network is. What leaves no trace in the shapes (strides, pools, attention heads
of PaSST) is taken from the published network.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from helpers.checkpoints.state_dicts import as_float32, candidates, log_found, unfolded
from models.beats import BeatsConfig, some
from models.beats_checkpoint import TABLE, read_checkpoint
from models.cp_mobile import make_divisible
from models.cp_resnet import CpResnetConfig, kernel_sizes
from models.passt import ARCHITECTURES, PATCH, PasstConfig
from models.published import FRONTEND_OF

log = logging.getLogger(__name__)

State = Mapping[str, Tensor]
NETWORKS = "CP-Mobile, CP-ResNet, PaSST or BEATs"
PASST_MELS = 128
PASST_STRIDES = (10, 12, 14, 16)
HEAD_WIDTH = 64  # of PaSST and BEATs


class ForeignError(ValueError):
    """A checkpoint that is not of this project holds no network that is known here, or not the whole of it."""


def recognise(path: Path | str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The parts `model` and `frontend` ({name, config, state} each) of a checkpoint that is not of this project.

    Args:
        path: for messages.
        content: what `torch.load` returns.

    Raises:
        ForeignError: when it holds none of the known networks, or an incomplete one.
    """
    found = candidates(content, {name: entry for name, (entry, _) in RECOGNISED.items()})
    if not found and {"cfg", "model"} <= content.keys():
        return _parts(path, "beats", _beats_of_the_authors(path, content))
    if not found:
        inner = content.get("state_dict")
        problem = "is neither a checkpoint of this project nor one of" if inner is None else "holds no"
        names = inner if isinstance(inner, Mapping) else content
        raise ForeignError(f"{path} {problem} {NETWORKS} network; found: {some(map(str, names))}")
    if len(found) > 1:
        places = [f"{one.network} in {f'{one.where}*' if one.where else 'names without prefix'}" for one in found]
        raise ForeignError(
            f"{path} holds more than one network ({' and '.join(places)}): save the one that is meant alone"
        )
    name, state = found[0].network, as_float32(found[0].state)
    log_found(path, found[0])
    if name == "cp_mobile":
        state = unfolded(state)
    try:
        return _parts(path, name, RECOGNISED[name][1](path, state))
    except KeyError as error:
        raise ForeignError(f"{path} is no whole {name} network: {error} is not in it") from error
    except (IndexError, AttributeError, TypeError, ZeroDivisionError) as error:
        raise ForeignError(f"{path} is no {name} network, its weights have other shapes: {error}") from error


def _parts(path: Path | str, name: str, network: tuple[dict[str, Any], State]) -> dict[str, Any]:
    config, state = network
    frontend, options = FRONTEND_OF.get(name, ("cp_mel", {}))  # CP-Mobile has the front end's defaults
    if name == "passt" and config["input_fdim"] != PASST_MELS:
        options = options | {"n_mels": config["input_fdim"]}
    log.info("%s is recognised as %s with %d classes", path, name, config["n_classes"])
    return {
        "model": {"name": name, "config": config, "state": state},
        "frontend": {"name": frontend, "config": options, "state": {}},
    }


def _cp_mobile(path: Path | str, state: State) -> tuple[dict[str, Any], State]:
    stem = state["in_c.0.0.weight"]
    base = state["in_c.1.0.weight"].shape[0]
    named = re.compile(r"stages\.s([0-9]{1,9})\.b([0-9]{1,9})\.block\.2\.0\.weight")
    blocks = [m.groups() for name in state if (m := named.fullmatch(name))]
    n_stages = max((int(s) for s, _ in blocks), default=0)
    if len({int(s) for s, _ in blocks}) != max(n_stages, 1):
        raise KeyError("stages")
    n_blocks = [sum(int(s) == i for s, _ in blocks) for i in range(1, 1 + n_stages)]
    expansions = [tuple(state[f"stages.s{s}.b{b}.block.0.0.weight"].shape[1::-1]) for s, b in blocks]
    last = {int(s): state[f"stages.s{s}.b{b}.block.2.0.weight"].shape[0] for s, b in blocks}

    # Widths are rounded to multiples of 8, so many values give the same network; the nearest to the default is taken.
    def solve(fits: Callable[[float], bool], default: float) -> float:
        candidates = sorted((round(0.05 * i, 2) for i in range(1, 200)), key=lambda value: abs(value - default))
        value = next((value for value in candidates if fits(value)), None)
        if value is None:
            raise ForeignError(f"{path}: the widths of its blocks are not those of a CP-Mobile network")
        return value

    config = {
        "n_classes": state["feed_forward.0.weight"].shape[0],
        "in_channels": stem.shape[1],
        "base_channels": base,
        "channels_multiplier": solve(
            lambda m: all(make_divisible(base * m ** (stage - 1)) == width for stage, width in last.items()), 2.3
        ),
        "expansion_rate": solve(lambda r: all(make_divisible(c * r) == width for c, width in expansions), 3.0),
        "n_blocks": n_blocks,
    }
    return config, state


def _cp_resnet(path: Path | str, state: State) -> tuple[dict[str, Any], State]:
    base, in_channels = state["in_c.0.weight"].shape[0], state["in_c.0.weight"].shape[1]
    names = [m.groups() for name in state if (m := re.fullmatch(r"stage([123])\.block(\d+)\.conv1\.weight", name))]
    n_blocks = [sum(stage == number for stage, _ in names) for number in "123"]
    config = {
        "n_classes": state["feed_forward.0.weight"].shape[0], "in_channels": in_channels, "base_channels": base,
        "n_blocks": n_blocks,
    }  # fmt: skip
    found, c_in = {}, base
    for stage in (number for number in (1, 2, 3) if n_blocks[number - 1]):
        for block in range(1, n_blocks[stage - 1] + 1):
            convs = [state[f"stage{stage}.block{block}.conv{i}.weight"] for i in (1, 2)]
            found[stage, block] = tuple(conv.shape[2] for conv in convs)
        width = state[f"stage{stage}.block1.conv1.weight"].shape[0]
        config[f"s{stage}_group"] = c_in // state[f"stage{stage}.block1.conv1.weight"].shape[1]
        if stage > 1:
            config[f"cut_channels_s{stage}"] = round(base * CpResnetConfig.channels_multiplier ** (stage - 1)) - width
        c_in = width

    def fits(rho: int) -> bool:
        kernels = kernel_sizes(rho)
        return all(size == kernels[stage - 1][block - 1] for (stage, block), size in found.items() if block <= 2)

    # Blocks that are not there leave no trace; of the values that give this network the nearest to the default is taken
    rhos = sorted((rho for rho in range(1, 12) if fits(rho)), key=lambda rho: abs(rho - CpResnetConfig.rho))
    if not rhos:
        raise ForeignError(f"{path}: the kernel sizes are those of no CP-ResNet network: {found}")
    return config | {"rho": rhos[0]}, state


def _passt(path: Path | str, state: State) -> tuple[dict[str, Any], State]:
    width, in_channels = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[1]
    grid = state["freq_new_pos_embed"].shape[2], state["time_new_pos_embed"].shape[3]
    arch = next((arch for arch in ARCHITECTURES if PasstConfig(arch=arch).grid == grid), None)
    config = {
        "n_classes": state["head.1.weight"].shape[0],
        "in_channels": in_channels,
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "n_heads": width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else PasstConfig.n_heads,
        "s_patchout_f": min(PasstConfig.s_patchout_f, grid[0] - 1),  # of training
    }
    if arch is not None:
        return config | {"arch": arch, "input_fdim": PASST_MELS}, state
    rows, columns = grid
    stride = next((n for n in PASST_STRIDES if (PASST_MELS - PATCH) // n + 1 == rows), PASST_STRIDES[0])
    return config | {
        "fstride": stride,
        "tstride": stride,
        "input_fdim": PASST_MELS if (PASST_MELS - PATCH) // stride + 1 == rows else (rows - 1) * stride + PATCH,
        "input_tdim": (columns - 1) * stride + PATCH,
    }, state


def _beats(path: Path | str, state: State) -> tuple[dict[str, Any], State]:
    """BEATs under the names of the fine-tuned network, `encoder.` and `classifier.`; its cfg comes from the shapes."""
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
    return _beats_of_the_authors(path, {"cfg": cfg, "model": model})


def _author_name(name: str) -> str:
    return name.removeprefix("encoder.").replace("classifier.linear.", "predictor.")


def _beats_of_the_authors(path: Path | str, content: Mapping[str, Any]) -> tuple[dict[str, Any], State]:
    try:
        config, state = read_checkpoint(content)
    except ValueError as error:
        raise ForeignError(f"{path}: {error}") from error
    if not any(name.startswith("classifier.") for name in state):
        raise ForeignError(
            f"{path} is a BEATs encoder without a classifier, so it names no scenes: fine-tune it with "
            "run_teacher_training.py first"
        )
    return asdict(config), state


# Network -> (an entry that only its state dict has, what reads it). CP-ResNet and CP-Mobile share other names.
RECOGNISED: dict[str, tuple[str, Callable[[Path | str, State], tuple[dict[str, Any], State]]]] = {
    "cp_mobile": ("in_c.0.0.weight", _cp_mobile),
    "cp_resnet": ("stage1.block1.conv1.weight", _cp_resnet),
    "passt": ("patch_embed.proj.weight", _passt),
    "beats": ("encoder.patch_embedding.weight", _beats),
}
