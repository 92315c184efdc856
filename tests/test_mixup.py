from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta, kstest
from torch import Tensor

from datasets.waveforms import Batch
from helpers.augment.mixup import MixUp, mix_logits
from helpers.losses import kd_loss
from tests.golden_inputs import wave

TEMPERATURE, KD_LAMBDA = 2.0, 0.02


def batch_of(n_clips: int = 6, n_classes: int = 10, teacher: bool = False) -> Batch:
    """Spectrograms that differ from clip to clip and are linear in the clip's number, so a mixture is easy to read."""
    number = torch.arange(n_clips)
    return Batch(
        waveform=wave((n_clips, 50), "mixup"),
        target=F.one_hot(number % n_classes, n_classes).float(),
        recording_device=number % 3,
        teacher_logits=wave((n_clips, n_classes), "mixup/teacher", 3.0) if teacher else None,
        log_mel=number.float().view(-1, 1, 1, 1).expand(n_clips, 1, 4, 5).clone(),
    )


def test_spectrograms_and_labels_match_the_published_ones(shared):
    data = torch.load(shared("golden/easy_dcase_task1/augment.pt"), weights_only=True)
    shape = data["input_shape"]
    log_mel = torch.stack([wave(shape[1:], f"{data['input_key']}/{b}", 1 + 0.5 * b) for b in range(shape[0])])
    labels, partner, lam = torch.tensor(data["labels"]), torch.tensor(data["perm"]), data["lam"]
    batch = Batch(log_mel, target=F.one_hot(labels, 10).float(), log_mel=log_mel)
    mixed = MixUp(0.3).mix(batch, torch.tensor(lam), partner)
    torch.testing.assert_close(mixed.log_mel, data["mixup_x"], rtol=0, atol=1e-6)  # rounding of values up to 4
    two_labels = lam * F.one_hot(data["mixup_ya"], 10) + (1 - lam) * F.one_hot(data["mixup_yb"], 10)
    torch.testing.assert_close(mixed.target, two_labels, rtol=0, atol=1e-6)


def test_teachers_are_paired_as_published(shared):
    data = torch.load(shared("golden/easy_dcase_task1/augment.pt"), weights_only=True)
    soft = wave((4, 10), data["soft_key"], data["soft_scale"])
    lam = torch.tensor(data["lam"])
    mixed = mix_logits(soft, lam, torch.tensor(data["perm"]), TEMPERATURE)
    a, b = ((data[name] / TEMPERATURE).softmax(1) for name in ("softmixup_sa", "softmixup_sb"))
    torch.testing.assert_close((mixed / TEMPERATURE).softmax(1), lam * a + (1 - lam) * b, rtol=0, atol=1e-6)


def two_term_loss(logits: Tensor, target: Tensor, teacher: Tensor, lam: float, partner: Tensor) -> tuple:
    """The published loss: the losses with both partners' labels and teachers, weighted; (loss, label, divergence)."""
    own = kd_loss(logits, target, teacher, KD_LAMBDA, TEMPERATURE)
    other = kd_loss(logits, target[partner], teacher[partner], KD_LAMBDA, TEMPERATURE)
    return tuple(lam * a + (1 - lam) * b for a, b in zip(own, other, strict=True))


def test_cross_entropy_and_distillation_have_the_gradients_of_the_published_two_term_losses(shared):
    data = torch.load(shared("golden/easy_dcase_task1/losses.pt"), weights_only=True)
    shape, lam, partner = tuple(data["shape"]), data["lam"], torch.tensor(data["perm"])
    assert (data["temperature"], data["kd_lambda"]) == (TEMPERATURE, KD_LAMBDA)
    logits = wave(shape, data["student_key"], data["student_scale"]).requires_grad_()
    teachers = [wave(shape, k, s) for k, s in zip(data["teacher_keys"], data["teacher_scales"], strict=True)]
    teacher = torch.stack(teachers).mean(0)
    target = F.one_hot(torch.tensor(data["labels"]), 10).float()

    published = two_term_loss(logits, target, teacher, lam, partner)
    expected = data["mixed"]  # first that the two terms here are the published ones
    assert published[0].item() == pytest.approx(expected["loss"], abs=1e-5)
    assert published[1].item() == pytest.approx(KD_LAMBDA * expected["label_loss"], abs=1e-5)
    assert published[2].item() == pytest.approx((1 - KD_LAMBDA) * expected["kd_loss"], abs=1e-5)
    (published_gradient,) = torch.autograd.grad(published[0], logits)

    batch = Batch(wave((6, 50), "x"), target=target, teacher_logits=teacher, log_mel=wave((6, 1, 4, 5), "y"))
    mixed = MixUp(0.3, TEMPERATURE).mix(batch, torch.tensor(lam), partner)
    ours = kd_loss(logits, mixed.target, mixed.teacher_logits, KD_LAMBDA, TEMPERATURE)
    (gradient,) = torch.autograd.grad(ours.loss, logits)
    torch.testing.assert_close(gradient, published_gradient, rtol=1e-5, atol=1e-7)  # float32 rounding
    assert ours.label_loss.item() == pytest.approx(published[1].item(), abs=1e-6)

    # The value lacks what mixing adds to the teachers' entropy, as the class says.
    p = (teacher / TEMPERATURE).softmax(1)
    p_mixed = lam * p + (1 - lam) * p[partner]
    entropies = [-(q * q.log()).mean() for q in (p_mixed, p, p[partner])]
    added = (1 - KD_LAMBDA) * TEMPERATURE**2 * (entropies[0] - lam * entropies[1] - (1 - lam) * entropies[2])
    assert added > 0.001
    assert (published[2] - ours.kd_loss).item() == pytest.approx(added.item(), abs=1e-6)


@pytest.mark.parametrize("lam", [0.0, 1e-30, 0.5, 1.0])
def test_teachers_that_rule_classes_out_stay_finite(lam):
    logits = torch.tensor([[900.0, -900.0, 0.0], [0.0, 0.0, -900.0]])
    mixed = mix_logits(logits, torch.tensor(lam), torch.tensor([1, 0]), 1.0)
    assert mixed.isfinite().all()
    p = logits.softmax(1)
    torch.testing.assert_close(mixed.softmax(1), lam * p + (1 - lam) * p[[1, 0]], rtol=0, atol=1e-6)
    assert kd_loss(torch.zeros(2, 3), p, mixed, 0.5, 1.0).loss.isfinite()


@pytest.mark.parametrize("teacher", [False, True])
def test_one_weight_and_one_permutation_serve_the_whole_batch(teacher):
    torch.manual_seed(0)
    batch = batch_of(n_clips=8, teacher=teacher)
    kept = replace(batch, log_mel=batch.log_mel.clone(), target=batch.target.clone())
    out = MixUp(0.8, TEMPERATURE)(batch)
    assert torch.equal(batch.log_mel, kept.log_mel)  # nothing in place
    assert torch.equal(batch.target, kept.target)
    assert out.waveform is batch.waveform
    assert out.recording_device is batch.recording_device
    # Clip i became lam i + (1 - lam) partner(i), its label likewise: labels tell partner and weight.
    own = out.target.diagonal()
    lam = own.min().item()  # of a clip that was not its own partner
    partner = torch.where(own > 0.9999, torch.arange(8), (out.target - lam * batch.target).argmax(1))
    assert sorted(partner.tolist()) == list(range(8))
    number = torch.arange(8.0)
    expected = lam * number + (1 - lam) * number[partner]
    torch.testing.assert_close(out.log_mel, expected.view(-1, 1, 1, 1).expand_as(out.log_mel))
    torch.testing.assert_close(out.target.sum(1), torch.ones(8))
    assert (out.teacher_logits is not None) == teacher
    if teacher:
        p = (batch.teacher_logits / TEMPERATURE).softmax(1)
        mixture = lam * p + (1 - lam) * p[partner]
        torch.testing.assert_close((out.teacher_logits / TEMPERATURE).softmax(1), mixture, rtol=0, atol=1e-6)


def test_weights_follow_the_beta_distribution():
    torch.manual_seed(0)
    batch = Batch(torch.zeros(2, 4), log_mel=torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
    weights = []
    while len(weights) < 1000:
        x = MixUp(0.5)(batch).log_mel[:, 0, 0, 0]
        if not torch.equal(x, torch.tensor([0.0, 1.0])):  # else each clip was its own partner
            weights.append(x[1].item())
    assert kstest(weights, beta(0.5, 0.5).cdf).pvalue > 0.01


def test_is_repeatable_and_pairs_at_random():
    batch, results = batch_of(n_clips=50), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(MixUp(1.0)(batch).log_mel)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    moved = np.mean((results[0] != batch.log_mel).any(dim=(1, 2, 3)).numpy())
    assert moved > 0.8  # about one clip in fifty is its own partner


@pytest.mark.parametrize("mixup", [MixUp(0.0), MixUp(0.3).eval()], ids=["off", "eval"])
def test_is_inert_when_off_or_in_eval(mixup):
    batch = batch_of(teacher=True)  # without a temperature: what is off asks for none
    assert mixup(batch) is batch


@pytest.mark.parametrize("arguments", [(-0.1,), (float("nan"),), (float("inf"),), (0.3, 0.0), (0.3, float("nan"))])
def test_refuses_values_out_of_range(arguments):
    with pytest.raises(ValueError, match="must be >"):
        MixUp(*arguments)


def test_teacher_logits_without_a_temperature_are_an_error():
    with pytest.raises(ValueError, match="temperature must be given"):
        MixUp(0.3)(batch_of(teacher=True))
