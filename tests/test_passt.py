import logging
import math

import pytest
import torch
import torch.nn.functional as F

from helpers.checkpoints.pretrained import take_weights
from models import get_frontend
from models.passt import ARCHITECTURES, Passt, PasstConfig
from tests.golden_inputs import clip, fill_state, wave

SMALL = {"embed_dim": 24, "depth": 3, "n_heads": 3}
CPU = torch.device("cpu")


def small(**options) -> Passt:
    return fill_state(Passt(PasstConfig(**{**SMALL, **options})))


def inputs_of(data: dict) -> torch.Tensor:
    gain = torch.tensor(data["sample_gain"])[:, None, None, None]
    return wave(tuple(data["input_shape"]), data["input_key"], data["input_scale"]) * gain


@pytest.fixture(scope="module")
def published() -> Passt:
    """The network in its published size; filling it takes seconds."""
    return fill_state(Passt(PasstConfig()))


def reference(model: Passt, log_mel: torch.Tensor, first: int, columns: list[int], rows: list[int]) -> torch.Tensor:
    """The network from its description: strided convolution, all tokens in all blocks, attention as a softmax."""
    state = dict(model.named_parameters())
    x = F.conv2d(
        log_mel, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], model.patch_embed.proj.stride
    )
    x = x + state["time_new_pos_embed"][..., first : first + x.shape[3]] + state["freq_new_pos_embed"]
    x = x[:, :, :, columns][:, :, rows].flatten(2).transpose(1, 2)
    special = [state[f"{name}_token"] + state["new_pos_embed"][:, i : i + 1] for i, name in enumerate(("cls", "dist"))]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in special), x], dim=1)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps=1e-6):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    for i in range(model.config.depth):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        n_batch, n_tokens, width = x.shape
        qkv = qkv.reshape(n_batch, n_tokens, 3, model.config.n_heads, -1)
        scores = torch.einsum("bnhc,bmhc->bhnm", qkv[:, :, 0], qkv[:, :, 1]) / math.sqrt(qkv.shape[-1])
        mixed = torch.einsum("bhnm,bmhc->bnhc", scores.exp() / scores.exp().sum(-1, keepdim=True), qkv[:, :, 2])
        x = x + linear(mixed.reshape(n_batch, n_tokens, width), f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    x = norm(x, "norm")
    return linear(norm((x[:, 0] + x[:, 1]) / 2, "head.0", eps=1e-5), "head.1")


def pin(monkeypatch, model: Passt, offset: int | None, columns: list[int], rows: list[int], n_columns: int) -> None:
    kept = torch.tensor([row * n_columns + column for row in rows for column in columns])
    draws = (None if offset is None else torch.tensor([offset]), kept)
    monkeypatch.setattr(model, "draw_patches", lambda *_: draws)


def test_matches_the_published_network(golden, published):
    data, model = golden("passt_1s"), published.eval()
    assert list(model.state_dict()) == data["names"]
    assert [list(value.shape) for value in model.state_dict().values()] == data["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == data["n_params"]
    assert list(model.grid) == data["grid"]
    with torch.no_grad():
        embedding = model.features(inputs_of(data))
        torch.testing.assert_close(embedding, data["embedding"], rtol=0, atol=1e-4)
        torch.testing.assert_close(model.head(embedding), data["logits"], rtol=0, atol=1e-4)


def test_matches_the_published_network_under_pinned_patchout(golden, published, monkeypatch):
    data, model = golden("passt_train_patchout"), published.train()
    pin(monkeypatch, model, data["time_offset"], data["time_columns"], data["freq_rows"], n_columns=9)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_of(data)), data["logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(model.features(inputs_of(data)), data["embedding"], rtol=0, atol=1e-4)


def test_matches_the_published_system_from_clip_to_logits(golden, published):
    data = golden("e2e_passt")
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"], data["clip_batch"])
    log_mel = get_frontend("cp_mel", n_fft=1024, win_length=800, hop_length=320, n_mels=128).eval()(waveform)
    assert list(log_mel.shape) == data["spec_shape"]
    assert log_mel.mean().item() == pytest.approx(data["spec_mean"], abs=1e-4)
    assert log_mel.std().item() == pytest.approx(data["spec_std"], abs=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(published.eval()(log_mel), data["logits"], rtol=0, atol=1e-4)


# Offset None: all columns of the time embedding are used, as by 10-second clips (1000 frames).
@pytest.mark.parametrize(
    ("n_frames", "offset", "columns", "rows"),
    [
        (100, 5, [0, 2, 3, 7], [1, 4, 11]),
        (16, 98, [0], [0, 11]),
        (1000, None, list(range(0, 99, 7)), [2, 3]),
    ],
)
def test_training_is_that_of_an_explicit_transformer(monkeypatch, n_frames, offset, columns, rows):
    model, x = small().double().train(), wave((2, 1, 128, n_frames), "passt/reference").double()
    pin(monkeypatch, model, offset, columns, rows, n_columns=(n_frames - 16) // 10 + 1)
    target = torch.tensor([3, 7])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected_logits = reference(model, x, offset or 0, columns, rows)
    expected = torch.autograd.grad(F.cross_entropy(expected_logits, target), list(trained.values()))
    logits = model(x)
    F.cross_entropy(logits, target).backward()
    torch.testing.assert_close(logits, expected_logits, rtol=1e-8, atol=1e-10)
    for (name, parameter), gradient in zip(trained.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("n_frames", [16, 100, 998, 1000])
def test_eval_uses_every_patch_and_the_first_columns(n_frames):
    model, x = small(u_patchout=3, s_patchout_t=2).double().eval(), wave((2, 1, 128, n_frames), "passt/eval").double()
    expected = reference(model, x, 0, list(range((n_frames - 16) // 10 + 1)), list(range(12)))
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-10)


def test_a_batch_gives_what_its_clips_give():
    model, x = small().eval(), wave((3, 1, 128, 60), "passt/batch")
    torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-5, atol=1e-6)


def test_patches_beyond_the_time_embedding_are_left_out_with_one_warning(caplog):
    model, x = small(input_tdim=60).eval(), wave((2, 1, 128, 90), "passt/long")
    with caplog.at_level(logging.WARNING):
        logits = model(x)
        model(x)
    assert torch.equal(logits, model(x[..., :56]))  # 5 columns: 4 steps of 10 and a patch
    assert [record.getMessage() for record in caplog.records] == [
        "clips have 90 frames, only 56 are used: input_tdim is 60"
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_published_architecture_has_its_strides_and_length(name):
    with torch.device("meta"):
        model = Passt(PasstConfig(arch=name))
    stride = next((int(part[1:]) for part in name.split("_") if part in ("s16", "s14", "s12")), 10)
    frames = {"20sec": 2000, "30sec": 3000}.get(next((part for part in name.split("_") if "sec" in part), None), 998)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == 159
    assert shapes["freq_new_pos_embed"] == (1, 768, (128 - 16) // stride + 1, 1)
    assert shapes["time_new_pos_embed"] == (1, 768, 1, (frames - 16) // stride + 1)
    assert model.patch_embed.proj.stride == (stride, stride)
    tiny = small(arch=name, depth=1)
    for mode in (True, False):
        assert tiny.train(mode)(torch.zeros(2, 1, 128, 100)).shape == (2, 10)


def test_strides_and_length_may_be_others_than_the_architecture_has():
    model = small(arch="passt_s_p16_s16_128_ap468", fstride=8, tstride=12, input_fdim=64, input_tdim=120, in_channels=2)
    assert model.grid == (7, 9)
    x = wave((2, 2, 64, 100), "passt/strides").double()
    expected = reference(model.double().eval(), x, 0, list(range(8)), list(range(7)))
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-10)


def test_patchout_is_drawn_in_the_published_order():
    model = small(s_patchout_t=2, s_patchout_f=5, u_patchout=7)
    torch.manual_seed(3)
    offset, kept = model.draw_patches(9, CPU)
    torch.manual_seed(3)
    assert torch.equal(offset, torch.randint(99 - 9 + 1, (1,)))
    columns, rows = (torch.randperm(9)[:7].sort().values, torch.randperm(12)[:7].sort().values)
    structured = [row * 9 + column for row in rows.tolist() for column in columns.tolist()]
    left = torch.randperm(49)[:42].sort().values
    assert kept.tolist() == [structured[i] for i in left]


def test_patchout_covers_every_offset_and_patch_and_is_off_at_zero():
    torch.manual_seed(0)
    model = small(input_tdim=56, s_patchout_t=1, s_patchout_f=2)
    draws = [model.draw_patches(3, CPU) for _ in range(200)]
    assert {offset.item() for offset, _ in draws} == {0, 1, 2}
    assert {patch for _, kept in draws for patch in kept.tolist()} == set(range(36))
    assert all(len(kept) == 2 * 10 and kept.diff().min() > 0 for _, kept in draws)
    off, before = small(s_patchout_f=0), torch.get_rng_state()
    assert off.draw_patches(99, CPU) == (None, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_time_embedding_moves_even_without_patchout():
    model, x = small(s_patchout_f=0).train(), wave((2, 1, 128, 40), "passt/offset")
    torch.manual_seed(0)
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(0)
    assert torch.equal(first, model(x))


def test_checkpointing_computes_blocks_twice_and_gives_the_same_gradients():
    x, results = wave((2, 1, 128, 60), "passt/checkpointing"), []
    for recompute in (False, True):
        model, n_calls = small(grad_checkpointing=recompute).train(), []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, calls=n_calls: calls.append(1))
        torch.manual_seed(5)
        F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
        assert len(n_calls) == (6 if recompute else 3)
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_every_parameter_but_the_unused_head_gets_a_gradient():
    model = small().train()
    model(wave((2, 1, 128, 60), "passt/gradients")).sum().backward()
    for name, parameter in model.named_parameters():
        unused = name.startswith("head_dist.")
        assert parameter.requires_grad != unused and (parameter.grad is None) == unused, name


EMBEDDING = {
    "cls_token", "dist_token", "new_pos_embed", "freq_new_pos_embed", "time_new_pos_embed", "patch_embed.proj.weight",
    "patch_embed.proj.bias",
}  # fmt: skip
HEAD = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}


def learning(model: Passt) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("n_layers", [0, 1, 3, None])
def test_frozen_layers_require_no_gradient(n_layers):
    model = small()
    everything = learning(model)
    blocks = {name for name in everything if name.startswith("blocks.")}
    assert everything == EMBEDDING | HEAD | blocks | {"norm.weight", "norm.bias"} and len(blocks) == 3 * 12
    model.freeze_encoder(n_layers)
    if n_layers is None:
        assert learning(model) == HEAD
    else:
        kept = {name for name in blocks if int(name.split(".")[1]) < n_layers}
        assert learning(model) == everything - EMBEDDING - kept
    model.freeze_encoder(0)  # what was frozen before does not matter
    assert learning(model) == everything - EMBEDDING


@pytest.mark.parametrize(("n_layers", "moving"), [(None, HEAD), (2, {"blocks.2.attn.qkv.weight", "norm.weight"})])
def test_a_step_moves_only_what_is_not_frozen(n_layers, moving):
    model = small().train()
    model.freeze_encoder(n_layers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = learning(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)  # what has no gradient is not decayed
    F.cross_entropy(model(wave((2, 1, 128, 60), "passt/frozen")), torch.tensor([1, 2])).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == wanted and moving <= moved


def test_patchout_goes_on_in_a_frozen_encoder():
    model, x = small(s_patchout_f=5, input_tdim=60).train(), wave((2, 1, 128, 60), "passt/frozen")
    model.freeze_encoder()
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("n_layers", [-1, 4])
def test_refuses_to_freeze_layers_that_are_not_there(n_layers):
    model = small()
    before = learning(model)
    with pytest.raises(ValueError, match=rf"n_layers to freeze must be in 0 \.\. 3, or None for all, got {n_layers}"):
        model.freeze_encoder(n_layers)
    assert learning(model) == before


def test_autocast_stays_close():
    model, x = small().eval(), wave((2, 1, 128, 60), "passt/autocast")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    torch.testing.assert_close(logits.float(), model(x), rtol=0, atol=0.05)  # 8 bits of mantissa


def test_initial_weights_are_spread_as_specified():
    torch.manual_seed(0)
    model = Passt(PasstConfig(embed_dim=192, depth=1))
    state = model.state_dict()
    for name in ("new_pos_embed", "time_new_pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight"):
        # The standard deviation of n draws is known to about 1 / sqrt(2 n) of itself; five of these.
        assert state[name].std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * state[name].numel())), name
    assert not any(state[name].any() for name in state if name.startswith("blocks") and name.endswith("qkv.bias"))
    assert state["patch_embed.proj.weight"].abs().max() <= 1 / 16  # uniform, fan-in 256


def test_audioset_weights_load_without_their_classifier():
    audioset, model = small(n_classes=527), Passt(PasstConfig(**SMALL))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dropped = take_weights(model, audioset.state_dict())
    assert dropped == ("head.1.weight", "head.1.bias", "head_dist.weight", "head_dist.bias")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in dropped else audioset.state_dict()[name]), name
    same = Passt(PasstConfig(**SMALL, n_classes=527))
    assert take_weights(same, audioset.state_dict()) == ()
    assert torch.equal(same.head[1].weight, audioset.head[1].weight)


def test_weights_that_do_not_fit_are_refused_untouched():
    state, model = small(n_classes=527).state_dict(), Passt(PasstConfig(**SMALL))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {name: value for name, value in state.items() if not name.startswith("blocks.2.")}
    wrong |= {"pos_embed": torch.zeros(3), "norm.bias": torch.zeros(7)}
    with pytest.raises(ValueError) as caught:
        take_weights(model, wrong)
    message = str(caught.value)
    assert "blocks.2.norm1.weight, " in message and "and 7 more missing" in message
    assert "pos_embed unknown" in message and "norm.bias (7,) for (24,) of another shape" in message
    with pytest.raises(ValueError, match=r"head_dist\.bias missing"):
        ten = small().state_dict()
        del ten["head_dist.bias"]
        take_weights(model, ten)
    with pytest.raises(ValueError, match="cls_token unknown"):
        take_weights(model, {**state, "cls_token": "text"})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "vit_base"}, "unknown arch 'vit_base'; known: passt_s_swa_p16_128_ap476, "),
        ({"n_classes": 0}, "n_classes"),
        ({"tstride": 0}, "tstride"),
        ({"input_fdim": 15}, "input_fdim must be >= 16"),
        ({"input_tdim": 10}, "input_tdim must be >= 16"),
        ({"s_patchout_f": 12}, "s_patchout_f .* 12 x 99"),
        ({"s_patchout_f": -1}, "s_patchout_f"),
        ({"s_patchout_t": 99}, "s_patchout_t"),
        ({"u_patchout": 12 * 99}, "u_patchout"),
        ({"embed_dim": 100}, "multiple of n_heads"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        PasstConfig(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 256, 100), r"\(batch, 1, 128, time\), got \(2, 1, 256, 100\)"),
        ((2, 128, 100), r"got \(2, 128, 100\)"),
        ((2, 3, 128, 100), r"got \(2, 3, 128, 100\)"),
        ((2, 1, 128, 15), "at least 16 frames"),
    ],
)
def test_refuses_spectrograms_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        small().eval()(torch.zeros(shape))


@pytest.mark.parametrize("options", [{"s_patchout_t": 9}, {"u_patchout": 54}])
def test_refuses_patchout_that_leaves_nothing_of_a_short_clip(options):
    with pytest.raises(ValueError, match="leaves nothing of the 12 x 9 patches"):
        small(**options).train()(torch.zeros(2, 1, 128, 100))
