import pytest
import torch
import torch.nn.functional as F

from helpers.losses import kd_loss
from helpers.schedule import WarmupRampdown
from tests.golden_inputs import wave


@pytest.mark.parametrize("name", ["kd_default", "kd_other"])
def test_kd_loss_matches_the_published_one(golden, name):
    data = golden(name)
    logits = data["student_logits"].requires_grad_()
    target = F.one_hot(torch.tensor(data["labels"]), data["classes"]).float()
    terms = kd_loss(logits, target, data["teacher_logits"], data["kd_lambda"], data["temperature"])
    assert terms.loss.item() == pytest.approx(data["loss"], abs=1e-5)
    assert terms.label_loss.item() == pytest.approx(data["logged_label_loss"], abs=1e-5)
    assert terms.kd_loss.item() == pytest.approx(data["logged_kd_loss"], abs=1e-5)
    (gradient,) = torch.autograd.grad(terms.loss, logits)
    torch.testing.assert_close(gradient, data["grad"], rtol=0, atol=1e-5)


def test_without_a_teacher_the_labels_have_full_weight():
    logits, target = wave((8, 5), "loss"), torch.eye(5).repeat(2, 1)[:8]
    terms = kd_loss(logits, target, None, kd_lambda=0.02, temperature=2.0)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.kd_loss.item() == 0


def test_a_student_like_its_teacher_has_no_divergence():
    logits = wave((8, 5), "same", 3.0)
    terms = kd_loss(logits, logits.softmax(1), logits, kd_lambda=0.0, temperature=2.0)
    assert terms.loss.item() == pytest.approx(0.0, abs=1e-7)
    assert kd_loss(logits, logits.softmax(1), logits.flip(1), 0.0, 2.0).loss.item() > 0.1


@pytest.mark.parametrize("name", ["lr_training", "lr_qat", "lr_cpresnet", "lr_passt"])
def test_schedule_matches_the_published_one(golden, name):
    data = golden(name)
    schedule = WarmupRampdown(
        data["warm_up_len"], data["ramp_down_start"], data["ramp_down_len"], data["last_lr_value"]
    )
    factors = [schedule.factor(epoch) for epoch in range(len(data["factors"]))]
    torch.testing.assert_close(torch.tensor(factors, dtype=torch.float64), data["factors"], rtol=0, atol=1e-12)


def test_schedule_refuses_negative_lengths():
    with pytest.raises(ValueError, match="warm_up_len"):
        WarmupRampdown(warm_up_len=-1)
