import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.checkpoints.pretrained import take_weights
from models.beats import Beats, BeatsConfig
from models.frontends.kaldi_fbank import KaldiFbank, KaldiFbankConfig
from tests.golden_inputs import clip, fill_state, wave

TABLE = "encoder.encoder.layers.{}.self_attn.relative_attention_bias.weight"
SMALL = {
    "encoder_layers": 3,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 80,
    "encoder_attention_heads": 4,
    "embed_dim": 32,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_buckets": 40,
    "max_distance": 60,
    "encoder_layerdrop": 0.0,
    "predictor_dropout": 0.0,
}


def small(**options) -> Beats:
    return Beats(BeatsConfig(**{**SMALL, **options}))


def log_mel_of(n_frames: int = 64, n_mels: int = 64, n_clips: int = 2) -> Tensor:
    return wave((n_clips, 1, n_mels, n_frames), "beats/log_mel")


def model_of(case: dict) -> Beats:
    return fill_state(Beats(BeatsConfig(n_classes=case["num_classes"], **case["config"]))).eval()


def check_case(case: dict, model: Beats, features: Tensor, rows: slice) -> None:
    log_mel = KaldiFbank(KaldiFbankConfig())(clip(*case["clip"]))
    assert list(log_mel.transpose(2, 3).shape) == case["fbank_shape"]  # published: (batch, 1, time, mel)
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == case["manifest"]
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]
    with torch.no_grad():
        tokens = model.features(log_mel)
        # Twelve layers of float32: the published values are 3e-5 off a float64 run.
        torch.testing.assert_close(tokens[:, rows], features, rtol=0, atol=5e-4)
        torch.testing.assert_close(model.classifier(tokens.mean(dim=1)), case["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("index", [0, 1], ids=["norm_after", "norm_first"])
def test_matches_the_published_network(golden, index):
    case = golden("beats_small")["cases"][index]
    model = model_of(case)
    check_case(case, model, case["features_every_4th"], slice(None, None, 4))
    log_mel = KaldiFbank(KaldiFbankConfig())(clip(*case["clip"]))
    torch.testing.assert_close(model(log_mel), case["logits"], rtol=0, atol=1e-4)
    # All layers share the table: what is loaded for one is there for all.
    state = model.state_dict()
    first = wave(tuple(state[TABLE.format(0)].shape), TABLE.format(0), 1.2 / state[TABLE.format(0)].shape[1] ** 0.5)
    model.load_state_dict(state | {TABLE.format(i): first for i in range(3)})
    torch.testing.assert_close(model(log_mel), case["logits_rel0"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_matches_the_published_architecture(shared):
    cases = torch.load(shared("golden/easy_dcase_task1/beats.pt"), weights_only=True)["cases"]
    case = next(case for case in cases if case["config"]["encoder_layers"] == 12)
    # Our defaults are the published weights' cfg; the fine-tuned ones differ in what they say of their predictor.
    published = {"finetuned_model": True, "predictor_dropout": 0.0}
    assert BeatsConfig(**published) == BeatsConfig(n_classes=case["num_classes"], **case["config"])
    check_case(case, model_of(case), case["features"], slice(None))


def plain_layer(layer, x: Tensor, table: Tensor, config: BeatsConfig) -> Tensor:
    """A layer that normalises its sums, head by head and distance by distance, as the paper's formulas say."""
    attn, n_tokens, n_heads = layer.self_attn, x.shape[1], config.encoder_attention_heads
    width = config.encoder_embed_dim // n_heads
    half, exact = config.num_buckets // 2, config.num_buckets // 4

    def bucket(distance: int) -> int:  # of a key this far behind the query
        near = abs(distance)
        if near >= exact:
            share = math.log(near / exact) / math.log(config.max_distance / exact)
            near = min(half - 1, exact + int(share * (half - exact)))
        return near + (half if distance > 0 else 0)

    buckets = torch.tensor([[bucket(key - query) for key in range(n_tokens)] for query in range(n_tokens)])
    query, key, value = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    heads = []
    for head in range(n_heads):
        part = slice(head * width, (head + 1) * width)
        gates = attn.grep_linear(query[..., part]).view(len(x), n_tokens, 2, 4).sum(-1).sigmoid()
        gate = gates[..., 0] * (gates[..., 1] * attn.grep_a[0, head, 0, 0] - 1) + 2  # (batch, token)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        scores = scores + gate[..., None] * table[buckets, head]
        heads.append(scores.softmax(-1) @ value[..., part])
    alpha = (2 * config.encoder_layers) ** 0.25
    x = layer.self_attn_layer_norm(alpha * x + attn.out_proj(torch.cat(heads, dim=-1)))
    return layer.final_layer_norm(alpha * x + layer.fc2(F.gelu(layer.fc1(x))))


def test_matches_an_independent_computation_in_float64():
    """On a clip so long that distances reach the last bucket."""
    model = fill_state(small(encoder_layers=1)).double().eval()
    log_mel, config = log_mel_of(n_frames=16 * 25 + 5, n_mels=70).double(), model.config
    encoder, transformer = model.encoder, model.encoder.encoder
    x = encoder.patch_embedding(log_mel.transpose(2, 3)).flatten(2).transpose(1, 2)  # column by column
    x = encoder.post_extract_proj(encoder.layer_norm(x))
    conv = transformer.pos_conv[0]
    weight = conv.weight_g * conv.weight_v / conv.weight_v.flatten(0, 1).norm(dim=0)
    positions = F.conv1d(x.transpose(1, 2), weight, conv.bias, padding=8, groups=4)[..., :-1]
    x = transformer.layer_norm(x + F.gelu(positions).transpose(1, 2))
    table = transformer.layers[0].self_attn.relative_attention_bias.weight
    expected = plain_layer(transformer.layers[0], x, table, config)
    assert expected.shape == (2, 25 * 4, 48)
    torch.testing.assert_close(model.features(log_mel), expected, rtol=0, atol=1e-10)
    expected = model.classifier.linear(expected).mean(dim=1)  # published: the mean of the tokens' logits
    torch.testing.assert_close(model(log_mel), expected, rtol=0, atol=1e-10)


def test_a_batch_equals_its_clips_one_by_one():
    model, log_mel = fill_state(small()).eval(), log_mel_of(n_clips=3)
    single = torch.cat([model(x[None]) for x in log_mel])
    torch.testing.assert_close(model(log_mel), single, rtol=0, atol=1e-5)


def test_takes_any_length_and_leaves_out_what_fills_no_patch():
    model = fill_state(small()).eval()
    assert model.features(torch.zeros(1, 1, 128, 998)).shape == (1, 496, 48)
    log_mel = log_mel_of(n_frames=48 + 7, n_mels=32 + 9)
    assert torch.equal(model(log_mel), model(log_mel[:, :, :32, :48]))
    assert model.features(log_mel).shape == (2, 6, 48)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_fn": "glu", "deep_norm": False},
        {"activation_fn": "gelu_fast"},
        {"activation_fn": "relu", "layer_norm_first": True, "deep_norm": False},
        {"relative_position_embedding": False},
        {"gru_rel_pos": False, "conv_bias": True},
        {"conv_pos": 15, "embed_dim": 48},
    ],
    ids=lambda options: "-".join(options),
)
def test_variants_run_and_have_the_published_names(options):
    model = fill_state(small(**options)).eval()
    names = set(model.state_dict())
    assert ("encoder.encoder.layers.0.fc1.linear.weight" in names) == (options.get("activation_fn") == "glu")
    assert (TABLE.format(2) in names) == options.get("relative_position_embedding", True)
    assert ("encoder.encoder.layers.0.self_attn.grep_a" in names) == options.get("gru_rel_pos", True)
    assert ("encoder.patch_embedding.bias" in names) == options.get("conv_bias", False)
    assert ("encoder.post_extract_proj.weight" in names) == ("embed_dim" not in options)
    assert model.encoder.encoder.pos_conv[0].weight_g.shape == (1, 1, options.get("conv_pos", 16))
    logits = model(log_mel_of())
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert not torch.allclose(logits, fill_state(small()).eval()(log_mel_of()))


def gradients(model: Beats, log_mel: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(log_mel).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_memory_alone():
    dropouts = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "encoder_layerdrop": 0.3}
    plain, model = (small(grad_checkpointing=on, **dropouts) for on in (False, True))
    model.load_state_dict(plain.state_dict())
    results = []
    for network in (plain, model):
        torch.manual_seed(4)
        results.append((network.train()(log_mel_of()), gradients(network, log_mel_of())))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)

    def bytes_kept(network: Beats) -> int:
        kept = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = network(log_mel_of(n_frames=320))
        assert logits.requires_grad
        return sum(kept.values())

    no_drop = {"encoder_layers": 12}
    assert bytes_kept(small(grad_checkpointing=True, **no_drop)) < 0.5 * bytes_kept(small(**no_drop))


def test_gradient_decays_from_layer_to_layer():
    options = {"relative_position_embedding": False, "gru_rel_pos": False}
    plain = fill_state(small(layer_wise_gradient_decay_ratio=1.0, **options)).double()
    model = fill_state(small(layer_wise_gradient_decay_ratio=0.5, **options)).double()
    log_mel = log_mel_of().double()
    assert torch.equal(model(log_mel), plain(log_mel))
    full, decayed = gradients(plain, log_mel), gradients(model, log_mel)
    assert full.keys() == dict(model.named_parameters()).keys()
    for name, gradient in full.items():
        factor = 0.5 ** (2 - int(name.split(".")[3])) if ".layers." in name else 0.5**3
        factor = 1.0 if name.startswith("classifier.") else factor
        torch.testing.assert_close(decayed[name], factor * gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_layers_are_skipped_as_often_as_asked_and_only_in_training():
    model = small(encoder_layerdrop=0.3, encoder_layers=8)
    ran = [0] * 8
    for i, layer in enumerate(model.encoder.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(200):
            model.train()(log_mel_of(16, 16, 1))
        assert abs(sum(ran) / 1600 - 0.7) < 0.05  # four standard errors
        assert len(set(ran)) > 1  # every layer is drawn on its own
        model.eval()(log_mel_of(16, 16, 1))
        before = list(ran)
        model(log_mel_of(16, 16, 1))
    assert ran == [n + 1 for n in before]


def test_autocast_gives_about_the_same():
    model = fill_state(small()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(log_mel_of())
    torch.testing.assert_close(logits.float(), model(log_mel_of()), rtol=0, atol=0.05)  # 8 bits of mantissa


def test_starts_as_published():
    torch.manual_seed(0)
    model = Beats(BeatsConfig(encoder_layers=2))
    layer, conv = model.encoder.encoder.layers[1], model.encoder.encoder.pos_conv[0]
    gain = 16**-0.25
    expected = {
        layer.self_attn.q_proj.weight: (2 / 1536) ** 0.5,
        layer.self_attn.out_proj.weight: gain * (2 / 1536) ** 0.5,
        layer.fc1.weight: gain * (2 / 3840) ** 0.5,
        layer.self_attn.grep_linear.weight: 0.02,
        layer.self_attn.relative_attention_bias.weight: 0.02,
        conv.weight_v: (4 / (128 * 768)) ** 0.5,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.1 if weight.numel() < 1000 else 0.03)
    plain = Beats(BeatsConfig(encoder_layers=2, deep_norm=False)).encoder.encoder.layers[0]
    assert plain.fc1.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.self_attn.q_proj.bias.abs().max() == 0
    torch.testing.assert_close(conv.weight_g, conv.weight_v.norm(dim=(0, 1), keepdim=True))


class TestFreezing:
    def learned(self, model: Beats) -> set[str]:
        """Names of what one step of training changes."""
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model(log_mel_of()).square().sum().backward()
        optimizer.step()
        return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    def test_of_the_encoder_leaves_the_classifier(self):
        model = small(dropout=0.5, encoder_layerdrop=0.9, predictor_dropout=0.5)
        model.freeze_encoder()
        assert self.learned(model) == {"classifier.linear.weight", "classifier.linear.bias"}
        # As under the published callback, nothing in the encoder is random, the dropout before the classifier included.
        assert torch.equal(model(log_mel_of()), model(log_mel_of()))
        assert model.training
        assert model.classifier.training

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_of_some_layers_leaves_the_upper_ones(self, norm_first):
        model = small(layer_norm_first=norm_first, deep_norm=not norm_first, dropout=0.5)
        model.freeze_encoder(2)
        learned = self.learned(model)
        upper = {name for name in model.state_dict() if ".layers.2." in name and name != TABLE.format(2)}
        norm = {f"encoder.encoder.layer_norm.{name}" for name in ("weight", "bias")}
        assert learned == upper | {"classifier.linear.weight", "classifier.linear.bias"} | (
            norm if norm_first else set()
        )
        layers = model.encoder.encoder.layers
        assert [layer.training for layer in layers] == [False, False, True]
        model.freeze_encoder(0)
        learned = self.learned(model)
        assert {TABLE.format(i) for i in range(3)} < learned
        assert not any("patch_embedding" in name or "pos_conv" in name for name in learned)

    def test_survives_a_copy(self):
        model = small(dropout=0.5)
        model.freeze_encoder()
        twin = copy.deepcopy(model)
        assert torch.equal(twin.train()(log_mel_of()), model(log_mel_of()))
        assert self.learned(twin) == {"classifier.linear.weight", "classifier.linear.bias"}
        assert not twin.encoder.training

    @pytest.mark.parametrize("n_layers", [-1, 4])
    def test_refuses_other_numbers(self, n_layers):
        with pytest.raises(ValueError, match=r"0 \.\. 3"):
            small().freeze_encoder(n_layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_attention_heads": 5}, "encoder_attention_heads"),
        ({"conv_pos_groups": 7}, "conv_pos_groups"),
        ({"encoder_layers": 0}, "encoder_layers"),
        ({"input_patch_size": -1}, "input_patch_size"),
        ({"encoder_layerdrop": 1.0}, "encoder_layerdrop"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"layer_wise_gradient_decay_ratio": 0.0}, "layer_wise_gradient_decay_ratio"),
        ({"activation_fn": "swish"}, "gelu_accurate"),
        ({"layer_norm_first": True}, "deep_norm"),
        ({"activation_fn": "glu"}, "deep_norm"),
        ({"max_distance": 10}, "num_buckets"),
        ({"n_classes": 0}, "n_classes"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("shape", [(2, 1, 15, 64), (2, 1, 64, 15), (2, 2, 64, 64), (2, 64, 64)])
def test_refuses_spectrograms_of_another_shape(shape):
    with pytest.raises(ValueError, match="log_mel must be"):
        small()(torch.zeros(shape))


def test_weights_of_another_network_are_refused_and_nothing_is_loaded():
    model = fill_state(small())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.2\..* missing; .*fc1\.weight \(96, 48\) for \(80, 48\)"):
        take_weights(model, small(encoder_ffn_embed_dim=96, encoder_layers=2).state_dict())
    with pytest.raises(ValueError, match=r"in_c\.0\.weight unknown"):
        take_weights(model, model.state_dict() | {"in_c.0.weight": torch.zeros(1)})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
