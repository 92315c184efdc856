"""Weights to start from: every network takes them, and for other scenes begins with a new classifier."""

import logging
from argparse import Namespace

import pytest
import torch

from helpers.checkpoints.checkpoint import FORMAT, CheckpointError
from helpers.checkpoints.nearest import nothing_found
from helpers.checkpoints.pretrained import classifier_names, find_weights, take_weights, warn_of_frontend
from models import MODELS, get_model
from tests.golden_inputs import fill_state

SMALL = {
    "passt": {"embed_dim": 64, "depth": 1, "n_heads": 1},
    "beats": {"encoder_layers": 1, "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 96, "embed_dim": 32,
              "encoder_attention_heads": 4, "conv_pos": 16, "conv_pos_groups": 4},
}  # fmt: skip
CLASSIFIERS = {
    "cp_mobile": ("feed_forward.",),
    "dcase24_baseline": ("feed_forward.",),
    "passt": ("head.1.", "head_dist."),
}


@pytest.mark.parametrize("name", MODELS)
def test_for_other_scenes_all_but_the_classifier_is_taken(name):
    source = fill_state(get_model(name, n_classes=13, **SMALL.get(name, {})))
    model = get_model(name, n_classes=10, **SMALL.get(name, {}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dropped = take_weights(model, source.state_dict())
    assert dropped and set(dropped) == set(classifier_names(model))
    if name in CLASSIFIERS:
        assert all(key.startswith(CLASSIFIERS[name]) for key in dropped)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in dropped else source.state_dict()[key]), key
    same = get_model(name, n_classes=13, **SMALL.get(name, {}))
    assert take_weights(same, source.state_dict()) == ()
    torch.testing.assert_close(same.state_dict(), source.state_dict(), rtol=0, atol=0)


def options(pretrained: str, **more) -> Namespace:
    return Namespace(model="cp_mobile", pretrained=pretrained, project_name="none", frontend="cp_mel", **more)


def test_weights_of_a_file_for_a_device_are_refused(tmp_path):
    part = {"name": "cp_mobile", "config": {}, "state": {}}
    content = {"format": FORMAT, "model": part, "frontend": {"name": "cp_mel", "config": {}, "state": {}}, "scenes": []}
    torch.save(content | {"precision": "fp16"}, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match=r"half\.pt is fp16: start from the checkpoint of floats"):
        find_weights(options(str(tmp_path / "half.pt")))
    torch.save(content, tmp_path / "float.pt")
    assert find_weights(options(str(tmp_path / "float.pt"))).frontend == ("cp_mel", {})


def test_another_front_end_than_the_weights_were_trained_with_is_said(tmp_path, caplog):
    part = {"name": "cp_mobile", "config": {}, "state": {}}
    front = {"name": "cp_mel", "config": {"hop_length": 750}, "state": {}}
    torch.save({"format": FORMAT, "model": part, "frontend": front, "scenes": []}, tmp_path / "w.pt")
    from helpers.cli import Parser
    from helpers.parts import STUDENT, add_network_options  # a whole command line's options

    parser = Parser()
    add_network_options(parser, STUDENT)
    args = parser.parse_args([], options(str(tmp_path / "w.pt")))
    with caplog.at_level(logging.WARNING):
        warn_of_frontend(args, find_weights(args))
    assert "w.pt was trained with another front end: hop_length 750, now 500" in caplog.text


def test_a_file_that_fits_nothing_is_compared_with_the_nearest_network():
    state = get_model("tf_sepnet", base_channels=32).state_dict()
    del state["conv_layers.0._conv.weight"]
    content = {"state_dict": {f"net.{name}": value for name, value in state.items()} | {"net.extra": torch.zeros(1)}}
    message = nothing_found(content)
    assert "nearest is tf_sepnet, of which 253 of 254 entries are there below net.*" in message
    assert "conv_layers.0._conv.weight missing" in message and "extra unknown" in message
    packed = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    assert "quantized: take the float checkpoint" in nothing_found({"model": {"a.weight": packed}})
    assert nothing_found({"epoch": 3}).endswith("found: epoch")
