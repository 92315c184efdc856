"""Test-time augmentation against the published SP4ASC, and what each kind of copy is."""

from dataclasses import replace

import pytest
import soundfile
import torch
from torch import nn

from helpers.augment.stripes import covered
from helpers.evaluate.systems import NO_EPS, NetworkSystem, Treatment, TreatmentConfig, drawn, without_eps
from helpers.evaluate.test_time import TestTimeAugmentation, TestTimeConfig
from helpers.teachers import TeacherSource
from models import get_frontend, get_model
from models.layers.fold import fold
from tests.golden_inputs import clip, fill_state
from tests.test_cnn6_60k import PUBLISHED, decibels

MEL = {"sample_rate": 8000, "n_fft": 512, "win_length": 256, "hop_length": 125, "n_mels": 32}


def stripes(lines: list[list[int]], size: int) -> torch.Tensor:
    """Published masks of one clip, [start, width] each: (1, cell)."""
    start, width = torch.tensor(lines).T.float()[..., None]
    return covered(start[None], width[None], size)


@pytest.mark.parametrize("name", PUBLISHED, ids=["mixup", "focal"])
def test_stripes_average_as_published(shared, name):
    path = shared(f"golden/sp4asc/trained_models/{name}/ckpt.pth")
    cases = torch.load(shared("golden/sp4asc/checkpoint_logits.pt"), weights_only=True)["checkpoints"][name]["tta"]
    for case in cases:
        waveform, _ = soundfile.read(next(shared("audio").glob(f"*/{case['clip']}")), dtype="float32")
        config = TreatmentConfig("fp16_weights", "without_eps")
        if case["weights"] == "fused_exact":
            config = TreatmentConfig("fp32", "exact")
        system = NetworkSystem(TeacherSource("x", path), Treatment(config))
        loaded = system.source.load()
        copies = TestTimeAugmentation(system._network(loaded.model, loaded), nn.Identity(), TestTimeConfig()).eval()
        log_mel = decibels(torch.from_numpy(waveform)[None])
        with torch.no_grad():
            found = [
                copies.striped(
                    log_mel, stripes(mask["freq"], log_mel.shape[2]), stripes(mask["time"], log_mel.shape[3])
                )
                for mask in case["masks"]
            ]
        atol = 1e-4 if case["weights"] == "fused_exact" else 2e-3
        torch.testing.assert_close(torch.cat(found), case["probabilities"], rtol=0, atol=atol)
        torch.testing.assert_close(torch.cat(found).mean(0), case["average"], rtol=0, atol=atol)


@pytest.mark.parametrize("name", PUBLISHED, ids=["mixup", "focal"])
def test_folding_without_epsilon_and_rounded_weights_are_the_published_ones(shared, name):
    path = shared(f"golden/sp4asc/trained_models/{name}/ckpt.pth")
    logits = torch.load(shared("golden/sp4asc/checkpoint_logits.pt"), weights_only=True)["checkpoints"][name]["logits"]
    kinds = {"fused_published": ("fp32", "without_eps", 2e-3),
             "fused_published_fp16": ("fp16_weights", "without_eps", 0.02),
             "fused_exact_fp16": ("fp16_weights", "exact", 0.02)}  # fmt: skip
    for file, wanted in logits.items():
        waveform, _ = soundfile.read(next(shared("audio").glob(f"*/{file}")), dtype="float32")
        log_mel = decibels(torch.from_numpy(waveform)[None])
        for kind, (precision, folding, atol) in kinds.items():
            system = NetworkSystem(TeacherSource("x", path), Treatment(TreatmentConfig(precision, folding)))
            loaded = system.source.load()
            with torch.no_grad():
                found = system._network(loaded.model, loaded).eval()(log_mel)[0]
            torch.testing.assert_close(found, wanted[kind], rtol=0, atol=atol)


def test_norms_without_epsilon_leave_the_network_alone():
    model = fill_state(get_model("cnn6_60k", input_fdim=32)).eval()
    bare = without_eps(model)
    assert {m.eps for m in bare.modules() if hasattr(m, "eps")} == {NO_EPS}
    assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {1e-5}
    x = torch.randn(1, 1, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(fold(bare, x)(x), bare(x), rtol=1e-4, atol=1e-4)


def small(name: str = "cp_mobile") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    options = {"base_channels": 8} if name == "cp_mobile" else {"input_fdim": 32, "channels": (8, 16)}
    return get_model(name, n_classes=3, **options).eval(), get_frontend("cp_mel", **MEL).eval()


def augmented(config: TestTimeConfig, name: str = "cp_mobile") -> torch.Tensor:
    with drawn(0), torch.no_grad():
        return TestTimeAugmentation(*small(name), config).eval()(clip(1.0, 8000, "tta", 3))


@pytest.mark.parametrize("tta", ["stripes", "roll", "crop"])
@pytest.mark.parametrize("name", ["cp_mobile", "cnn6_60k"])
def test_copies_are_averaged_and_the_same_every_time(tta, name):
    config = TestTimeConfig(n_tta=5, tta=tta, mel_width=8, time_width=16)
    found = augmented(config, name)
    assert torch.equal(found, augmented(config, name))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3))
    model, frontend = small(name)
    with torch.no_grad():
        plain = model(frontend(clip(1.0, 8000, "tta", 3))).log_softmax(1)
    assert not torch.allclose(found, plain, atol=1e-5)
    still = replace(config, n_time_stripes=0, n_mel_stripes=0) if tta == "stripes" else replace(config, tta_shift=0.0)
    torch.testing.assert_close(augmented(still, name), plain, rtol=0, atol=1e-5)


def test_copies_moved_in_time_are_spread_evenly():
    waveform = clip(1.0, 8000, "tta", 2)
    for tta in ("roll", "crop"):
        copies = TestTimeAugmentation(*small(), TestTimeConfig(n_tta=3, tta=tta, tta_shift=0.01))
        moved = [copies._moved(waveform, i) for i in range(3)]
        assert torch.equal(moved[1], waveform)
        assert torch.equal(moved[0][:, :-80], waveform[:, 80:]) and torch.equal(moved[2][:, 80:], waveform[:, :-80])
        tail = waveform[:, :80] if tta == "roll" else waveform[:, -81:-1].flip(1)
        assert torch.equal(moved[0][:, -80:], tail)


def test_stripes_wider_than_the_clip_are_cut_to_it():
    found = augmented(TestTimeConfig(n_tta=2, time_width=10_000, mel_width=10_000))
    assert found.isfinite().all()
