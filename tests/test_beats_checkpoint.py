import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers.checkpoints.pretrained import take_weights
from models.beats import Beats
from models.beats_checkpoint import read_checkpoint
from tests.golden_inputs import fill_state, wave
from tests.test_beats import TABLE, log_mel_of, small


def checkpoint_of(model: Beats, n_predicted: int | None = None) -> dict:
    """A file in the authors' format, written and read back."""
    ours = ("n_classes", "grad_checkpointing")
    content = {
        "cfg": {name: value for name, value in vars(model.config).items() if name not in ours},
        "model": model.encoder.state_dict(),
    }
    if n_predicted is not None:
        content["cfg"] |= {"finetuned_model": True, "predictor_class": n_predicted}
        content["model"] |= {
            "predictor.weight": wave((n_predicted, model.config.encoder_embed_dim), "predictor.weight"),
            "predictor.bias": wave((n_predicted,), "predictor.bias"),
        }
        content["label_dict"] = {0: "/m/09x0r"}
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ENCODER_TABLE = TABLE.format(1).removeprefix("encoder.")  # as the authors' files name it


def changed(content: dict, part: str, **entries) -> dict:
    return content | {part: {**content[part], **entries}}


def without(content: dict, part: str, entry: str) -> dict:
    return content | {part: {name: value for name, value in content[part].items() if name != entry}}


def test_of_self_supervised_training_gives_an_encoder():
    source = fill_state(small()).eval()
    config, state = read_checkpoint(checkpoint_of(source), n_classes=7)
    assert config == replace(source.config, n_classes=7)
    model = Beats(config).eval()
    head = model.classifier.linear.weight.clone()
    assert take_weights(model, state) == ()
    assert torch.equal(model.features(log_mel_of()), source.features(log_mel_of()))
    assert torch.equal(model.classifier.linear.weight, head)


def test_of_fine_tuning_gives_its_classifier_too():
    source = fill_state(small()).eval()
    content = checkpoint_of(source, n_predicted=527)
    config, state = read_checkpoint(content)
    assert config.n_classes == 527
    model = Beats(config).eval()
    model.load_state_dict(state)  # complete
    expected = F.linear(
        source.features(log_mel_of()), *(content["model"][f"predictor.{n}"] for n in ("weight", "bias"))
    )
    torch.testing.assert_close(model(log_mel_of()), expected.mean(dim=1), rtol=0, atol=1e-5)


def test_for_other_classes_drops_the_classifier_and_says_so():
    source = fill_state(small()).eval()
    config, state = read_checkpoint(checkpoint_of(source, n_predicted=527), n_classes=10)
    model = Beats(replace(config, grad_checkpointing=True)).eval()
    head = model.classifier.linear.weight.clone()
    assert set(take_weights(model, state)) == {"classifier.linear.weight", "classifier.linear.bias"}
    assert torch.equal(model.features(log_mel_of()), source.features(log_mel_of()))
    assert torch.equal(model.classifier.linear.weight, head)


def test_options_that_it_does_not_name_are_those_of_the_authors_code():
    content = checkpoint_of(small(relative_position_embedding=False, gru_rel_pos=False, deep_norm=False))
    names = ("dropout", "attention_dropout", "layer_wise_gradient_decay_ratio", "encoder_layerdrop")
    for name in (*names, "relative_position_embedding", "gru_rel_pos", "deep_norm", "num_buckets", "max_distance"):
        del content["cfg"][name]
    content["cfg"] |= {"something_new": 3, "conv_bias": 0, "dropout_input": 0}
    config, _ = read_checkpoint(content)
    assert [getattr(config, name) for name in names] == [0.1, 0.1, 1.0, 0.0]
    assert (config.deep_norm, config.gru_rel_pos, config.relative_position_embedding) == (False, False, False)
    assert (config.num_buckets, config.max_distance, config.predictor_dropout) == (320, 1280, 0.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: 3, "it lacks cfg and model; found: int"),
        (lambda c: {"state_dict": {}}, "it lacks cfg and model; found: state_dict"),
        (lambda c: {"cfg": c["cfg"]}, "it lacks model; found: cfg"),
        (lambda c: c | {"cfg": [1]}, "cfg must be a dict, got list"),
        (lambda c: without(c, "cfg", "input_patch_size"), "input_patch_size must be in"),
        (lambda c: changed(c, "cfg", encoder_layers="3"), "encoder_layers must be a int, got '3'"),
        (lambda c: changed(c, "cfg", deep_norm=2), "deep_norm must be a bool, got 2"),
        (lambda c: changed(c, "cfg", activation_fn="swish"), "unknown activation_fn 'swish'"),
        (lambda c: changed(c, "cfg", encoder_ffn_embed_dim=96), r"fc1.weight \(80, 48\) for \(96, 48\)"),
        (lambda c: changed(c, "cfg", encoder_layers=4), "layers.3.self_attn.* missing"),
        (lambda c: changed(c, "cfg", predictor_class=10), r"predictor.weight \(527, 48\) for \(10, 48\)"),
        (lambda c: changed(c, "model", **{"quantize.embed": torch.zeros(2)}), "quantize.embed unknown"),
        (lambda c: changed(c, "model", **{"predictor.bias": None}), "predictor.bias unknown"),
        (lambda c: without(c, "model", "predictor.bias"), "predictor.bias missing"),
        (lambda c: without(c, "model", "layer_norm.bias"), "layer_norm.bias missing"),
        (lambda c: changed(c, "model", **{ENCODER_TABLE: c["model"][ENCODER_TABLE] + 1}), "share a table"),
    ],
)
def test_of_something_else_is_refused_in_one_line(spoil, message):
    content = checkpoint_of(small(), n_predicted=527)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(spoil(content))
    assert "\n" not in str(error.value)
