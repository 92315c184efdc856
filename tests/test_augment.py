from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchaudio
from scipy.signal import fftconvolve
from scipy.stats import beta, chisquare, kstest

from datasets.impulse_responses import read_impulse_responses
from datasets.waveforms import Batch
from helpers.augment import AUGMENTATIONS, build_chain
from helpers.augment.augmentation import Setting
from helpers.augment.device_impulse_response import DeviceImpulseResponse, fast_fft_length
from helpers.augment.freq_mixstyle import FreqMixStyle, _beta, mix_style
from helpers.augment.gain import Gain, GainConfig
from helpers.augment.pitch_shift import PitchShift, PitchShiftConfig, pitch_shift, resample
from helpers.augment.share_mask import ShareMask
from helpers.augment.spec_mask import SpecMask
from helpers.augment.spec_stripes import SpecStripes, SpecStripesConfig
from helpers.augment.stripes import covered, random_stripes
from helpers.augment.time_roll import TimeRoll, copied, gathered
from helpers.losses import kd_loss
from models import get_frontend, get_model
from tests.golden_inputs import clip, fill_state, wave


def batch_of(n_clips: int = 6, n_samples: int = 3200) -> Batch:
    log_mel = wave((n_clips, 1, 24, 16), "augment/log_mel")
    return Batch(
        wave((n_clips, n_samples), "augment", 0.3), recording_device=torch.arange(n_clips) % 3, log_mel=log_mel
    )


def responses_of(*lengths: int) -> list[np.ndarray]:
    return [wave((n,), f"augment/ir{n}").numpy() for n in lengths]


@pytest.mark.parametrize("n_taps", [1, 48, 3200, 5000])
def test_impulse_response_is_a_direct_convolution_cut_to_the_clip(n_taps):
    batch, responses = batch_of(), responses_of(n_taps)
    out = DeviceImpulseResponse(responses, 3200, p=1.0)(batch).waveform
    for before, after in zip(batch.waveform.numpy(), out.numpy(), strict=True):
        reference = np.convolve(before.astype(np.float64), responses[0].astype(np.float64))[:3200]
        # float32 transforms: 1e-6 of the largest sample, with a margin for the sum over taps
        np.testing.assert_allclose(after, reference, rtol=0, atol=5e-6 * np.abs(reference).max())


def test_impulse_response_matches_the_published_augmentation(golden, shared):
    data = torch.load(shared("golden/cpjku_dcase23/dir_short.pt"), weights_only=True)
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"])
    out = DeviceImpulseResponse([data["ir"].numpy()], waveform.shape[1], p=1.0)(Batch(waveform)).waveform
    torch.testing.assert_close(out, data["output"], rtol=0, atol=1e-5)
    rolled = out.roll(data["roll_shift"], dims=1)[0]
    torch.testing.assert_close(rolled[:64], data["rolled_head"], rtol=0, atol=1e-5)
    torch.testing.assert_close(rolled[-64:], data["rolled_tail"], rtol=0, atol=1e-5)


def test_real_responses_match_the_published_augmentation(shared):
    data = torch.load(shared("golden/cpjku_dcase23/dir_real.pt"), weights_only=True)
    folder = shared("audio/dirs")
    names = sorted(path.name for path in folder.glob("*.wav"))
    everything = read_impulse_responses(folder, data["clip_rate"])
    assert len(everything) == 66
    responses = [everything[names.index(name)] for name in data["ir_files"]]
    assert [len(response) for response in responses] == data["ir_lengths"]
    for response, head, l2 in zip(responses, data["ir_head"], data["ir_l2"], strict=True):
        np.testing.assert_allclose(response[:128], head, rtol=0, atol=1e-6)
        assert np.linalg.norm(response) == pytest.approx(l2, rel=1e-5)
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"])
    augment = DeviceImpulseResponse(responses, waveform.shape[1], p=1.0)
    out = augment.convolve(waveform.expand(2, -1), torch.tensor([0, 1]))
    torch.testing.assert_close(out, data["output"], rtol=0, atol=1e-5)
    reference = fftconvolve(waveform[0].double(), responses[0].astype(np.float64))[: waveform.shape[1]]
    np.testing.assert_allclose(out[0], reference, rtol=0, atol=1e-5)


def test_impulse_response_takes_part_by_device_and_probability():
    torch.manual_seed(0)
    batch = batch_of(n_clips=3000, n_samples=64)
    out = DeviceImpulseResponse(responses_of(5), 64, p=0.4, recording_devices=[1])(batch).waveform
    changed = (out != batch.waveform).any(dim=1)
    assert not changed[batch.recording_device != 1].any()
    assert changed[batch.recording_device == 1].float().mean().item() == pytest.approx(0.4, abs=0.05)  # 3 sigma


def test_every_response_is_used():
    torch.manual_seed(0)
    batch = Batch(torch.ones(400, 32))
    responses = [np.array([gain], dtype=np.float32) for gain in (1.0, 2.0, 3.0)]
    gains = DeviceImpulseResponse(responses, 32, p=1.0)(batch).waveform[:, 0].round()
    counts = torch.bincount(gains.long(), minlength=4)[1:]
    assert counts.min() > 100  # 133 expected, sigma 9.4


@pytest.mark.parametrize("n", [1, 2, 97, 43_999, 48_000])
def test_fft_lengths_are_even_and_smooth(n):
    length = fast_fft_length(n)
    assert length >= n
    assert length % 2 == 0
    for factor in (2, 3, 5):
        while length % factor == 0:
            length //= factor
    assert length == 1


def test_every_clip_is_rolled_by_its_own_shift():
    torch.manual_seed(0)
    batch = batch_of(n_clips=200, n_samples=128)
    rolled = TimeRoll(max_shift=5)(batch).waveform
    shifts = []
    for before, after in zip(batch.waveform, rolled, strict=True):
        shifts += [s for s in range(-5, 6) if torch.equal(after, before.roll(s))][:1]
    assert len(shifts) == 200
    assert set(shifts) == set(range(-5, 6))  # both ends included


@pytest.mark.parametrize("roll", [copied, gathered])
def test_clips_are_rolled_as_by_torch(roll):
    waveform, shift = torch.randn(5, 97), torch.tensor([0, 1, 50, 95, 96])
    expected = torch.stack([clip.roll(int(n)) for clip, n in zip(waveform, shift, strict=True)])
    assert torch.equal(roll(waveform, shift), expected)


def test_a_roll_longer_than_the_clip_wraps():
    torch.manual_seed(0)
    batch = batch_of(n_clips=8, n_samples=16)
    for before, after in zip(batch.waveform, TimeRoll(max_shift=100)(batch).waveform, strict=True):
        assert any(torch.equal(after, before.roll(s)) for s in range(16))


@pytest.mark.parametrize("axis", ["mel", "time"])
def test_masks_are_one_band_of_the_given_value_per_clip(axis):
    torch.manual_seed(0)
    log_mel = torch.randn(500, 1, 24, 16) + 100
    masked = SpecMask(max_width=8, axis=axis, value=0.9)(Batch(log_mel, log_mel=log_mel)).log_mel
    hit = masked == 0.9
    assert torch.equal(masked[~hit], log_mel[~hit])
    band = hit[:, 0].any(dim=2 if axis == "mel" else 1)  # (clip, mel or frame)
    assert torch.equal(hit[:, 0].sum(dim=(1, 2)), band.sum(1) * (16 if axis == "mel" else 24))
    widths = band.sum(1)
    assert set(widths.tolist()) == set(range(8))  # 0 .. max_width - 1
    edges = torch.diff(torch.nn.functional.pad(band.int(), (1, 1)), dim=1)
    assert ((edges == 1).sum(1) == (widths > 0).int()).all()  # contiguous
    assert len({tuple(row) for row in band.int().tolist()}) > 50


def test_a_shared_mask_is_the_same_for_all_clips():
    torch.manual_seed(1)
    log_mel = torch.zeros(5, 1, 24, 16)
    masked = SpecMask(max_width=20, axis="mel", value=0.9, shared=True)(Batch(log_mel, log_mel=log_mel)).log_mel
    assert (masked == masked[:1]).all()
    assert (masked == 0.9).any()


@pytest.mark.parametrize("axis", ["mel", "time"])
def test_masks_of_a_share_are_those_of_the_published_augmentation(axis, shared):
    data = torch.load(shared("golden/easy_dcase_task1/augment.pt"), weights_only=True)
    log_mel = torch.ones(data["specaug_input_ones"])  # (batch, 1, mel, time)
    torch.manual_seed(data["specaug_seed"])
    if axis == "time":
        torch.rand(2 * len(log_mel))  # what the published code drew for the other axis before
    masked = ShareMask(data["specaug_mask_size"], axis, value=0.0, p=1.0)(Batch(log_mel, log_mel=log_mel)).log_mel
    zero = (masked == 0).all(dim=3 if axis == "mel" else 2).sum(dim=(1, 2))  # (batch,) cells of the axis
    assert torch.equal(zero, data["specaug_zero_rows" if axis == "mel" else "specaug_zero_cols"])
    assert set(masked.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("max_share", "bound"), [(0.1, 2), (0.27, 6), (1.0, 24)])  # 2.4 and 6.48 of 24 are rounded
def test_masks_of_a_share_stay_below_the_rounded_share(max_share, bound):
    torch.manual_seed(0)
    log_mel = torch.ones(2000, 1, 24, 4)
    masked = ShareMask(max_share, "mel", value=-0.5, p=1.0)(Batch(log_mel, log_mel=log_mel)).log_mel
    widths = (masked == -0.5).sum(dim=(1, 2, 3)) // 4
    counts = torch.bincount(widths, minlength=bound)
    assert len(counts) == bound  # 0 .. bound - 1
    assert chisquare(counts.numpy()).pvalue > 0.001


def test_masks_of_a_share_happen_to_whole_batches_at_their_rate():
    torch.manual_seed(0)
    log_mel = torch.ones(40, 1, 24, 16)
    mask = ShareMask(0.9, "time", value=0.0, p=0.3)
    hit = [(mask(Batch(log_mel, log_mel=log_mel)).log_mel == 0).any(dim=(1, 2, 3)).float().mean() for _ in range(1000)]
    hit = torch.stack(hit)
    # Of 40 clips about 37 have a width over 0 where the coin says yes, and none where it says no.
    assert ((hit == 0) | (hit > 0.5)).all()
    assert (hit > 0).float().mean().item() == pytest.approx(0.3, abs=0.05)  # 3 sigma


def test_mixstyle_matches_the_published_one(golden):
    data = golden("mixstyle_small")
    mixed = mix_style(data["x"], data["lam"], torch.tensor(data["perm"]))
    torch.testing.assert_close(mixed, data["output"], rtol=0, atol=1e-5)


def test_mixstyle_of_a_whole_spectrogram_matches_the_published_one(shared):
    data = torch.load(shared("golden/cpjku_dcase23/mixstyle_student.pt"), weights_only=True)
    mixed = mix_style(data["x"], data["lam"], torch.tensor(data["perm"]))
    torch.testing.assert_close(mixed, data["output"], rtol=0, atol=1e-5)


def test_mixstyle_happens_to_whole_batches_at_its_rate():
    torch.manual_seed(0)
    batch = batch_of(n_clips=2)
    changed = [not torch.equal(FreqMixStyle(p=0.3, alpha=0.4)(batch).log_mel, batch.log_mel) for _ in range(1000)]
    # A pairing of each clip with itself changes rounding alone, but does change it.
    assert np.mean(changed) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("alpha", [0.001, 0.01])
def test_tiny_parameters_of_the_beta_distribution_give_ends_not_middles(alpha):
    torch.manual_seed(0)
    lam = _beta(alpha, 4000, torch.device("cpu")).numpy()
    assert np.isfinite(lam).all()
    for share in (1e-6, 0.1, 0.5, 1 - 1e-6):
        expected = beta(alpha, alpha).cdf(share)
        assert abs((lam <= share).mean() - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5 + 1e-3
    assert (np.abs(lam - 0.5) < 1e-3).mean() < 0.01


def test_styles_of_frames_are_mixed_where_that_is_asked_for():
    x = torch.rand(4, 1, 8, 16)
    lam, partner = torch.tensor([0.2, 0.5, 0.9, 0.0]), torch.tensor([1, 0, 3, 2])
    by_frame = mix_style(x, lam, partner, "time")
    torch.testing.assert_close(by_frame, mix_style(x.transpose(2, 3), lam, partner).transpose(2, 3))
    assert not torch.allclose(by_frame, mix_style(x, lam, partner))
    with pytest.raises(ValueError, match="mixstyle_axis must be mel, time or none"):
        FreqMixStyle(0.5, 0.3, "freq")


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_mixing_weights_follow_the_beta_distribution(alpha):
    torch.manual_seed(0)
    assert kstest(_beta(alpha, 5000, torch.device("cpu")).numpy(), beta(alpha, alpha).cdf).pvalue > 0.01


def test_the_whole_training_path_matches_the_published_one(golden):
    data = golden("pipeline_train")
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"], data["clip_batch"])
    augment = DeviceImpulseResponse([data["ir"].numpy()], waveform.shape[1], p=1.0)
    convolved = augment.convolve(waveform, torch.zeros(len(waveform), dtype=torch.long))
    waveform = torch.where(torch.tensor(data["dir_on"])[:, None] == 1, convolved, waveform)
    waveform = torch.stack([w.roll(s) for w, s in zip(waveform, data["roll_shifts"], strict=True)])
    frontend = get_frontend("cp_mel", f_max=float(data["fmax"]), fmax_aug_range=1)
    log_mel = frontend(waveform)
    start, stop = data["freq_mask"]
    log_mel[:, :, start:stop] = frontend.mask_value
    torch.testing.assert_close(log_mel.mean(dim=(1, 2, 3)), data["spec_mean"], rtol=0, atol=1e-4)
    mixed = mix_style(log_mel, data["lam"], torch.tensor(data["perm"]))
    # Masked rows have variance 0, so rounding is amplified a thousand times.
    torch.testing.assert_close(mixed[:1, 0], data["mixed_first"], rtol=0, atol=1e-3)
    logits = fill_state(get_model("cp_mobile")).train()(mixed)
    torch.testing.assert_close(logits, data["logits"], rtol=0, atol=1e-3)
    target = torch.nn.functional.one_hot(torch.tensor(data["labels"]), 10).float()
    teacher = wave((4, 10), data["teacher_key"], data["teacher_scale"])
    assert kd_loss(logits, target, teacher, 0.02, 2.0).loss.item() == pytest.approx(data["loss"], abs=1e-5)


def chain(**options) -> torch.nn.ModuleDict:
    defaults = {
        "dir_prob": 1.0, "roll": 50, "freqm": 8, "timem": 4, "mixstyle_p": 1.0, "mask_share": 0.2, "mixup_alpha": 0.3,
    }  # fmt: skip
    options = defaults | options
    impulse_response = DeviceImpulseResponse(responses_of(9), 3200, p=options.pop("dir_prob"))
    configs = {
        name: config(**{field.name: options[field.name] for field in fields(config) if field.name in options})
        for name, (config, _) in AUGMENTATIONS.items() if name != "dir"
    }  # fmt: skip
    augment = build_chain(configs, Setting(clips=None, mask_value=0.9))
    augment["waveform"] = torch.nn.Sequential(impulse_response, *augment["waveform"])
    return augment


def test_everything_is_inert_in_eval_and_when_off():
    batch = batch_of()
    off = chain(
        dir_prob=0.0, roll=0, freqm=0, timem=0, mixstyle_p=0.0, mask_share=0.0, mixup_alpha=0.0, gain_p=0.0,
        pitch_p=0.0, stripes_p=0.0,
    )  # fmt: skip
    for augment in (chain().eval(), off):
        for part in ("waveform", "log_mel"):
            assert augment[part](batch) is batch


@pytest.mark.parametrize(
    "mask",
    [ShareMask(0.0, "mel", 0.0, p=1.0), ShareMask(0.5, "mel", 0.0, p=0.0), ShareMask(0.5, "time", 0.0, p=1.0).eval()],
    ids=["no share", "no chance", "eval"],
)
def test_masks_of_a_share_are_inert_when_off_or_in_eval(mask):
    batch = batch_of()
    assert mask(batch) is batch


def test_the_chain_is_repeatable_and_changes_nothing_in_place():
    batch = batch_of()
    kept = replace(batch, waveform=batch.waveform.clone(), log_mel=batch.log_mel.clone())
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        out = chain()["log_mel"](chain()["waveform"](batch))
        results.append(out)
    assert torch.equal(results[0].waveform, results[1].waveform)
    assert torch.equal(results[0].log_mel, results[1].log_mel)
    assert torch.equal(batch.waveform, kept.waveform)
    assert torch.equal(batch.log_mel, kept.log_mel)
    assert not torch.equal(results[0].waveform, kept.waveform)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DeviceImpulseResponse(responses_of(4), 64, p=1.5),
        lambda: DeviceImpulseResponse([], 64, p=0.5),
        lambda: TimeRoll(-1),
        lambda: SpecMask(-1, "mel", 0.0),
        lambda: SpecMask(1, "frequency", 0.0),
        lambda: ShareMask(0.1, "frequency", 0.0, p=1.0),
        lambda: ShareMask(1.1, "mel", 0.0, p=1.0),
        lambda: ShareMask(-0.1, "mel", 0.0, p=1.0),
        lambda: ShareMask(0.1, "time", 0.0, p=1.1),
        lambda: ShareMask(float("nan"), "time", 0.0, p=1.0),
        lambda: FreqMixStyle(p=-0.1, alpha=0.3),
        lambda: FreqMixStyle(p=0.1, alpha=0.0),
    ],
)
def test_refuses_values_out_of_range(build):
    with pytest.raises(ValueError, match=r"must be|needs"):
        build()


# ---- gain -----------------------------------------------------------------------------------------------------------


def test_gain_matches_the_published_one(shared):
    data = torch.load(shared("golden/dragonsearch/transforms.pt"), weights_only=True)
    waveform = clip(data["seconds"], data["rate"], data["key"], 1)
    half = 20 * np.log10(0.5)
    out = Gain(GainConfig(gain_p=1.0, gain_low=half, gain_high=half))(Batch(waveform)).waveform
    torch.testing.assert_close(out[:, :64], data["vol_gain_0.5"], rtol=0, atol=1e-6)


def test_gain_is_uniform_in_decibels_and_clips_what_is_too_loud():
    torch.manual_seed(0)
    out = Gain(GainConfig(gain_p=0.5, gain_low=-12.0, gain_high=-6.0))(Batch(torch.full((4000, 3), 0.5))).waveform
    assert (out == out[:, :1]).all()
    changed = out[:, 0] != 0.5
    assert changed.float().mean() == pytest.approx(0.5, abs=0.03)
    db = 20 * torch.log10(out[changed, 0] / 0.5)
    assert kstest(((db + 12) / 6).numpy(), "uniform").pvalue > 0.01
    loud = Gain(GainConfig(gain_p=1.0, gain_low=20.0, gain_high=20.0))(Batch(torch.tensor([[0.5, -0.05, -0.5]])))
    torch.testing.assert_close(loud.waveform, torch.tensor([[1.0, -0.5, -1.0]]))
    with pytest.raises(ValueError, match="gain_low must be <= gain_high"):
        GainConfig(gain_low=1.0, gain_high=0.0)


# ---- pitch shift ----------------------------------------------------------------------------------------------------


def test_pitch_shift_matches_the_published_one(shared):
    data = torch.load(shared("golden/dragonsearch/transforms.pt"), weights_only=True)
    waveform, published = clip(data["seconds"], data["rate"], data["key"], 1), data["pitch_shift"]
    out = pitch_shift(waveform, data["rate"], published["n_steps"])
    torch.testing.assert_close(out, published["output"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("rate", "new_rate"), [(44100, 32000), (32000, 44100), (35919, 32000), (1001, 1000)])
def test_resampling_is_torchaudios(rate, new_rate):
    waveform = wave((2, 700), "augment/resample", 0.5)
    small = {35919: (3592, 3200)}.get(rate, (rate, new_rate))  # its kernel for the true ratio takes gigabytes
    reference = torchaudio.functional.resample(waveform.double(), *small)  # its float32 kernel is 4e-5 off
    torch.testing.assert_close(resample(waveform, *small).double(), reference, rtol=0, atol=2e-6)


def test_a_shifted_tone_is_higher_and_no_longer():
    rate, t = 16000, torch.arange(16000) / 16000
    tone = torch.sin(2 * torch.pi * 440 * t)[None]
    for n_steps in (-5, 7):
        out = pitch_shift(tone, rate, n_steps)
        assert out.shape == tone.shape
        loudest = torch.fft.rfft(out[0, 2000:14000]).abs().argmax() * rate / 12000
        assert loudest == pytest.approx(440 * 2 ** (n_steps / 12), abs=2)


def test_some_clips_are_shifted_and_the_others_stay():
    torch.manual_seed(0)
    batch = Batch(wave((40, 4000), "augment/pitch", 0.3))
    out = PitchShift(PitchShiftConfig(pitch_p=0.5), 8000)(batch).waveform
    same = (out == batch.waveform).all(dim=1)
    assert 8 < same.sum() < 32
    assert PitchShift(PitchShiftConfig(pitch_p=1.0), 8000).eval()(batch) is batch


# ---- stripes --------------------------------------------------------------------------------------------------------


def test_stripes_cover_what_the_published_ones_do(shared):
    for case in torch.load(shared("golden/sp4asc/specaugment.pt"), weights_only=True)["cases"]:
        for kind, key, size in (("time", "kept_frames", case["frames"]), ("freq", "kept_mels", case["mel_bins"])):
            stripes = torch.tensor(case["masks"][kind])  # (clip, stripe, (start, width))
            if stripes.numel():
                masked = covered(stripes[..., :1], stripes[..., 1:], size)
                assert torch.equal(~masked, case[key].bool())


def test_stripes_are_drawn_as_published():
    torch.manual_seed(0)
    masked = random_stripes(20000, 1, 5, 9, torch.device("cpu"))
    widths = masked.sum(dim=1)
    assert chisquare(torch.bincount(widths, minlength=5).numpy()).pvalue > 0.01
    starts = masked[widths == 3].int().argmax(dim=1)
    assert chisquare(torch.bincount(starts, minlength=6).numpy()).pvalue > 0.01  # {0, ..., 9 - 3 - 1}


def test_stripes_hold_the_mean_of_their_band():
    torch.manual_seed(1)
    batch = batch_of()
    config = SpecStripesConfig(time_width=8, n_time_stripes=2, mel_width=6, n_mel_stripes=1)
    out = SpecStripes(config)(batch).log_mel
    mean = batch.log_mel.mean(dim=(0, 3), keepdim=True).expand_as(out)
    changed = out != batch.log_mel
    assert changed.any() and torch.equal(out[changed], mean[changed])
    with pytest.raises(ValueError, match="time_width must be <= 100, the size of the spectrogram, got 128"):
        SpecStripes.from_config(SpecStripesConfig(), Setting(clips=None, shape=(64, 100)))
    SpecStripes.from_config(SpecStripesConfig(n_time_stripes=0), Setting(clips=None, shape=(64, 100)))


# ---- the other published systems' draws -----------------------------------------------------------------------------


def test_mixstyle_of_dragonsearch_is_the_published_one(shared):
    for case in torch.load(shared("golden/dragonsearch/mixstyle.pt"), weights_only=True)["cases"]:
        x = wave(tuple(case["shape"]), case["key"], case["scale"])
        axis = "mel" if case["kind"] == "freq_mixstyle" else "none"
        mixed = mix_style(x, case["lambda"], case["permutation"], axis)
        torch.testing.assert_close(mixed, case["output"], rtol=1e-5, atol=1e-5)


def test_mixstyle_of_the_baselines_is_the_published_one(shared):
    data = torch.load(shared("golden/dcase_baselines/mixstyle.pt"), weights_only=True)
    x = wave(tuple(data["shape"]), data["input_key"], data["scale"])
    mixed = mix_style(x, torch.tensor(data["lambda"]), torch.tensor(data["perm"]))
    torch.testing.assert_close(mixed, data["out"], rtol=1e-5, atol=1e-5)


def test_impulse_responses_of_easy_dcase_task1_are_the_published_ones(shared):
    """On device a alone, cut to the length of the clip (mode full)."""
    data = torch.load(shared("golden/easy_dcase_task1/augment.pt"), weights_only=True)
    seconds, rate, key, n_clips = data["dir_clip"]
    batch = Batch(clip(seconds, rate, key, n_clips), recording_device=torch.tensor(data["dir_devices"]))
    augment = DeviceImpulseResponse([data["dir_ir"].numpy()], batch.waveform.shape[1], p=1.0, recording_devices=[0])
    torch.testing.assert_close(augment(batch).waveform, data["dir_full"], rtol=0, atol=1e-3)


def test_a_batch_may_draw_one_mixing_weight_for_all_clips():
    torch.manual_seed(0)
    log_mel = torch.randn(64, 1, 4, 50) * torch.arange(1.0, 65).view(-1, 1, 1, 1)
    weights = []
    for per in ("clip", "batch"):
        torch.manual_seed(3)
        mixed = FreqMixStyle(1.0, 0.4, per=per)(Batch(log_mel, log_mel=log_mel)).log_mel
        torch.manual_seed(3)
        lam = _beta(0.4, 64 if per == "clip" else 1, torch.device("cpu"))
        torch.rand(())
        partner = torch.randperm(64)
        own, new, other = (x.std(dim=3)[:, 0, 0] for x in (log_mel, mixed, log_mel[partner]))
        torch.testing.assert_close(new, lam * own + (1 - lam) * other, rtol=1e-3, atol=1e-3)
        weights.append(lam)
    assert weights[0].std() > 0.1 and len(weights[1]) == 1


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "build",
    [
        lambda p: TimeRoll(50, p),
        lambda p: SpecMask(20, "mel", value=9.0, p=p),
    ],
    ids=["roll", "mask"],
)
def test_a_share_of_the_clips_is_changed(build, p):
    torch.manual_seed(0)
    x = torch.randn(3000, 100)
    batch = Batch(x, log_mel=x.view(3000, 1, 25, 4))
    out = build(p)(batch)
    changed = (out.waveform != x).any(dim=1) | (out.log_mel != batch.log_mel).flatten(1).any(dim=1)
    # Of masks one in twenty has no width, of rolls one in a hundred no shift.
    assert changed.float().mean().item() == pytest.approx(p, abs=0.04)


def test_a_probability_that_is_none_is_refused():
    for build in (lambda: TimeRoll(5, 2.0), lambda: SpecMask(5, "mel", 0.0, p=-1.0)):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            build()
