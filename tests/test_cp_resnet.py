import math

import pytest
import torch
import torch.nn.functional as F

from models import get_frontend
from models.cp_resnet import CpResnet, CpResnetBlock, CpResnetConfig, kernel_sizes
from tests.golden_inputs import clip, fill_state, wave


def inputs_of(data: dict) -> torch.Tensor:
    gain = torch.tensor(data["sample_gain"])[:, None, None, None]
    return wave(tuple(data["input_shape"]), data["input_key"], data["input_scale"]) * gain


def build(**options) -> CpResnet:
    return CpResnet(CpResnetConfig(**options))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matches_the_published_network(golden, layout):
    data = golden("cpresnet_default")
    model, x = fill_state(build()).eval().to(memory_format=layout), inputs_of(data)
    assert list(model.state_dict()) == data["names"]
    assert [list(value.shape) for value in model.state_dict().values()] == data["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == data["n_params"]
    torch.testing.assert_close(model(x), data["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(model.double()(x.double()), data["logits64"], rtol=0, atol=1e-9)


def test_every_stage_gives_what_the_published_one_does(golden):
    data, taps = golden("cpresnet_default"), {}
    model = fill_state(build()).eval()
    for name in data["tap_names"]:
        # Copied at once: what follows works in place.
        model.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: taps.update({name: y.clone()}))
    model(inputs_of(data))
    outputs = [taps[name] for name in data["tap_names"]]
    assert [list(y.shape) for y in outputs] == data["tap_shapes"]
    for got, name in [
        (torch.stack([y.mean() for y in outputs]), "tap_mean"),
        (torch.stack([y.std() for y in outputs]), "tap_std"),
        (torch.stack([y.flatten()[-8:] for y in outputs]), "tap_last8"),
    ]:
        torch.testing.assert_close(got, data[name], rtol=0, atol=1e-4)


def test_multiply_accumulates_are_the_published_ones(golden):
    macs, model = 0, build().eval()

    def count(conv: torch.nn.Conv2d, _x, y: torch.Tensor) -> None:
        nonlocal macs
        macs += conv.weight.numel() * y[0, 0].numel()

    for conv in model.modules():
        if isinstance(conv, torch.nn.Conv2d):
            conv.register_forward_hook(count)
    model(torch.zeros(1, 1, 256, 43))
    assert macs == golden("cpresnet_default")["conv_macs"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_matches_the_published_network_in_float64(golden, layout):
    data = golden("cpresnet_default_train")
    model, x = fill_state(build()).double().train().to(memory_format=layout), inputs_of(data).double()
    target = torch.tensor(data["labels"])
    optimizer = torch.optim.Adam(model.parameters(), lr=data["adam_lr"], weight_decay=data["adam_weight_decay"])
    losses = []
    for step in range(6):
        logits = model(x)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            torch.testing.assert_close(logits, data["logits64"], rtol=1e-8, atol=1e-10)
            gradients = dict(model.named_parameters())
            assert list(gradients) == data["grad_names"]
            norms = torch.stack([gradients[name].grad.norm() for name in data["grad_names"]])
            torch.testing.assert_close(norms, data["grad_norms64"], rtol=1e-8, atol=0)
            first = gradients[data["grad_names"][0]].grad
            torch.testing.assert_close(first, data["first_param_grad64"], rtol=1e-8, atol=1e-12)
            for key in ("first", "last"):
                norm = model.get_submodule(data[f"bn_{key}"])
                torch.testing.assert_close(norm.running_mean, data[f"bn_{key}_mean64"], rtol=1e-8, atol=0)
                torch.testing.assert_close(norm.running_var, data[f"bn_{key}_var64"], rtol=1e-8, atol=0)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(losses, data["adam_losses64"], rtol=1e-8, atol=0)


def test_matches_the_published_system_from_clip_to_logits(golden):
    data = golden("e2e_cpresnet_default")
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"], data["clip_batch"])
    log_mel = get_frontend("cp_mel", hop_length=750).eval()(waveform)
    assert list(log_mel.shape) == data["spec_shape"]
    assert log_mel.mean().item() == pytest.approx(data["spec_mean"], abs=1e-4)
    assert log_mel.std().item() == pytest.approx(data["spec_std"], abs=1e-4)
    torch.testing.assert_close(fill_state(build()).eval()(log_mel), data["logits"], rtol=0, atol=1e-4)


def test_rho_widens_one_convolution_after_the_other():
    # (stage, block, convolution) in the order in which a growing rho turns them from 1x1 into 3x3.
    order = [
        (0, 1, 0),
        (0, 1, 1),
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 0),
        (1, 1, 1),
        (2, 0, 0),
        (2, 0, 1),
        (2, 1, 0),
        (2, 1, 1),
    ]
    for rho in range(-1, 14):
        sizes = kernel_sizes(rho)
        assert [sizes[s][b][c] for s, b, c in order] == [3 if rho >= i + 2 else 1 for i in range(10)]
        assert sizes[0][0] == (3, 1)


def test_widths_groups_and_pools_follow_the_options():
    model = build(
        n_classes=3,
        base_channels=8,
        channels_multiplier=1.5,
        cut_channels_s2=4,
        cut_channels_s3=2,
        n_blocks=(3, 2, 1),
        s2_group=4,
        s3_group=8,
        maxpool_pos_stage1=(3,),
        maxpool_pos_stage2=(0, 2),
        maxpool_kernel=(3, 2),
        maxpool_stride=(2, 1),
    )
    assert list(model.stage1._modules) == ["block1", "block2", "block3", "maxpool3_0"]
    assert list(model.stage2._modules) == ["maxpool0_0", "block1", "block2", "maxpool2_1"]
    assert model.stage1.block3.conv1.kernel_size == model.stage1.block3.conv2.kernel_size == (1, 1)
    assert model.stage2.block1.conv1.weight.shape == (8, 2, 3, 3)  # no shortcut: 8 channels before and after
    assert not len(model.stage2.block1.shortcut)
    assert model.stage3.block1.shortcut.conv.weight.shape == (16, 1, 1, 1)
    assert model.stage2.maxpool0_0.kernel_size == (3, 2) and model.stage2.maxpool0_0.stride == (2, 1)
    assert model(torch.zeros(2, 1, 64, 20)).shape == (2, 3)


def test_the_first_pool_has_a_stride_of_its_own():
    model = build(maxpool_stage1_pos0_kernel=(3, 3), maxpool_stage1_pos0_stride=(2, 1))
    assert model.stage1.maxpool0_0.kernel_size == (3, 3) and model.stage1.maxpool0_0.stride == (2, 1)


def test_a_stage_may_be_left_out():
    model = build(n_blocks=(1, 1, 0))
    assert model.feed_forward[0].weight.shape == (10, 64, 1, 1)
    assert model(torch.zeros(2, 1, 64, 20)).shape == (2, 10)


def test_a_batch_gives_what_its_clips_give():
    model, x = fill_state(build()).eval(), wave((3, 1, 64, 21), "cp_resnet/batch")
    torch.testing.assert_close(model(x), torch.cat([model(clip) for clip in x.split(1)]), rtol=1e-5, atol=1e-6)


def test_the_smallest_input_is_what_it_says():
    model = fill_state(build(rho=3)).eval()
    n_mels, n_frames = model.smallest_input
    assert model(torch.zeros(2, 1, n_mels, n_frames)).shape == (2, 10)
    for shape in ((n_mels - 1, n_frames), (n_mels, n_frames - 1)):
        with pytest.raises(
            ValueError, match=f"{n_mels} mel bands and {n_frames} frames, got {shape[0]} and {shape[1]}"
        ):
            model(torch.zeros(2, 1, *shape))
        with pytest.raises(RuntimeError):  # it is the pools that cannot
            model.stage1(model.in_c(torch.zeros(2, 1, *shape)))


def test_a_fresh_network_answers_zero_whatever_was_built_before():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build().state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["in_c.0.weight"], other["in_c.0.weight"])
    x = wave((2, 1, 256, 43), "cp_resnet/fresh")
    for mode in (True, False):
        assert not build().train(mode)(x).any()


def test_initial_weights_are_spread_as_specified():
    torch.manual_seed(0)
    model = build(base_channels=128, n_blocks=(2, 2, 1))
    blocks = [module for module in model.modules() if isinstance(module, CpResnetBlock)]
    assert len(blocks) == 5
    spreads = {model.in_c[0]: math.sqrt(2 / 25)}
    for block in blocks:
        assert not block.conv2.weight.any()
        kernel = block.conv1.kernel_size[0] ** 2
        spreads[block.conv1] = math.sqrt(2 / (kernel * block.conv1.out_channels)) / math.sqrt(5)
        if len(block.shortcut):
            spreads[block.shortcut.conv] = math.sqrt(2 / block.shortcut.conv.out_channels)
    for conv, spread in spreads.items():
        # The standard deviation of n draws is known to about 1 / sqrt(2 n) of itself; five of these.
        bound = 5 / math.sqrt(2 * conv.weight.numel())
        assert conv.weight.std().item() == pytest.approx(spread, rel=bound)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_classes": 0}, "n_classes"),
        ({"base_channels": 0}, "base_channels"),
        ({"channels_multiplier": 0}, "channels_multiplier"),
        ({"n_blocks": (1, 1)}, "n_blocks"),
        ({"n_blocks": (0, 1, 1)}, "n_blocks"),
        ({"cut_channels_s3": 128}, "cut_channels_s3"),
        ({"s2_group": 3}, "s2_group must divide the 32 and 64 channels"),
        ({"s3_group": 0}, "s3_group"),
        ({"maxpool_pos_stage2": (-1,)}, "maxpool_pos_stage2"),
        ({"maxpool_kernel": (2,)}, "maxpool_kernel"),
        ({"maxpool_stage1_pos0_stride": (0, 2)}, "maxpool_stage1_pos0_stride"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
