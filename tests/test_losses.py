import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from datasets.waveforms import Batch
from helpers.losses import LOSSES, kd_loss
from helpers.schedule import SCHEDULES, Cosine, Place, WarmRestarts, WarmupCosine, WarmupRampdown
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


def loss_of(name: str, logits: torch.Tensor, target: torch.Tensor, teacher=None, **options) -> torch.Tensor:
    config, cls = LOSSES[name]
    batch = Batch(waveform=torch.zeros(len(logits), 1), target=target, teacher_logits=teacher)
    return cls(config(**options))(logits, batch)


def one_hot(labels) -> torch.Tensor:
    return F.one_hot(torch.as_tensor(labels), 10).float()


def test_losses_of_sp4asc_are_the_published_ones(golden):
    for case in golden("sp4asc_training")["cases"]:
        logits = wave(tuple(case["logits_shape"]), case["logits_key"], case["logits_scale"])
        plain, mixed = one_hot(case["targets"]), case["mixed_targets"]
        for expected, found in [
            ("ce_one_hot", loss_of("cross_entropy", logits, plain)),
            ("ce_mixed", loss_of("cross_entropy", logits, mixed)),
            ("focal_gamma1", loss_of("focal", logits, plain)),
            ("focal_gamma2", loss_of("focal", logits, plain, focal_gamma=2.0)),
            ("focal_gamma1_mixed", loss_of("focal", logits, mixed)),
        ]:
            assert found.item() == pytest.approx(case[expected], abs=1e-5), expected


def test_focal_loss_of_mixed_labels_is_the_sum_over_both():
    logits, a, b = wave((6, 10), "focal", 3.0), one_hot([0, 1, 2, 3, 4, 5]), one_hot([5, 5, 5, 9, 9, 9])
    mixed = loss_of("focal", logits, 0.7 * a + 0.3 * b, focal_mixed=True)
    parts = 0.7 * loss_of("focal", logits, a) + 0.3 * loss_of("focal", logits, b)
    torch.testing.assert_close(mixed, parts)
    torch.testing.assert_close(loss_of("focal", logits, a, focal_gamma=0.0), F.cross_entropy(logits, a))


def test_focal_loss_keeps_the_digits_of_sure_answers_and_its_gradient():
    logits = torch.tensor([[12.0, 0.0], [60.0, 0.0]], requires_grad=True)
    loss = loss_of("focal", logits, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), focal_gamma=1.0)
    p = 1 / (1 + math.exp(-12.0))
    assert loss.item() == pytest.approx((1 - p) * -math.log(p) / 2, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()


def test_smoothed_labels_are_mixed_with_all_scenes():
    logits, target = wave((6, 10), "smooth", 3.0), one_hot([0, 1, 2, 3, 4, 5])
    expected = F.cross_entropy(logits, 0.9 * target + 0.1 / 10)
    torch.testing.assert_close(loss_of("cross_entropy", logits, target, label_smoothing=0.1), expected)


def test_distillation_of_easy_dcase_task1_is_the_published_one(golden):
    data = golden("easy_losses")
    shape = tuple(data["shape"])
    logits, target = wave(shape, data["student_key"], data["student_scale"]), one_hot(data["labels"])
    keys = zip(data["teacher_keys"], data["teacher_scales"], strict=True)
    teacher = torch.stack([wave(shape, key, scale) for key, scale in keys]).mean(0)
    weights = {"temperature": data["temperature"], "kd_lambda": data["kd_lambda"]}
    for case, lam in (("plain", 1.0), ("mixed", data["lam"])):
        terms = [
            loss_of("distillation", logits, target[rows], teacher[rows], **weights)
            for rows in (slice(None), data["perm"])
        ]
        loss = lam * terms[0].loss + (1 - lam) * terms[1].loss
        assert loss.item() == pytest.approx(data[case]["loss"], abs=1e-5)


def test_distillation_of_dragonsearch_is_the_published_one(golden):
    for case in golden("dragonsearch_training")["cases"]:
        shape = (len(case["targets"]), 10)
        logits = wave(shape, case["student_key"], case["logit_scale"]).requires_grad_()
        teacher = wave(shape, case["teacher_key"], case["logit_scale"])
        target = case["lambda"] * one_hot(case["targets_a"]) + (1 - case["lambda"]) * one_hot(case["targets_b"])
        weights = {"temperature": case["temperature"], "kd_lambda": case["weight_teacher"]}
        terms = loss_of("distillation", logits, target, teacher, kd_reduction="batchmean", **weights)
        assert terms.loss.item() == pytest.approx(case["loss"], abs=1e-5)
        (gradient,) = torch.autograd.grad(terms.loss, logits)
        torch.testing.assert_close(gradient, case["grad_student"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lr_training", "lr_qat", "lr_cpresnet", "lr_passt"])
def test_schedule_matches_the_published_one(golden, name):
    data = golden(name)
    schedule = WarmupRampdown(
        data["warm_up_len"], data["ramp_down_start"], data["ramp_down_len"], data["last_lr_value"]
    )
    factors = [schedule.factor(Place(epoch)) for epoch in range(len(data["factors"]))]
    torch.testing.assert_close(torch.tensor(factors, dtype=torch.float64), data["factors"], rtol=0, atol=1e-12)


def test_schedule_refuses_negative_lengths():
    with pytest.raises(ValueError, match="warm_up_len"):
        WarmupRampdown(warm_up_len=-1)


def test_warm_restarts_of_easy_dcase_task1_are_the_published_ones(golden):
    data = golden("easy_lr")["cosine_warm_restarts"]
    schedule = WarmRestarts(restart_epochs=data["T_0"], restart_factor=data["T_mult"], last_lr_value=data["eta_min"])
    rates = [data["base_lr"] * schedule.factor(Place(epoch)) for epoch in range(len(data["lr_per_epoch"]))]
    assert rates == pytest.approx(data["lr_per_epoch"], rel=1e-9)
    assert schedule.factor(Place(3, 7, 10)) == schedule.factor(Place(3))  # once an epoch


def test_linear_down_of_easy_dcase_task1_is_the_published_one(golden):
    data = golden("easy_lr")["exp_warmup_linear_down"]
    schedule = WarmupRampdown(data["warmup_len"], data["warmup_len"], data["down_len"], data["min_lr_factor"])
    factors = [schedule.factor(Place(epoch)) for epoch in range(len(data["factor_per_epoch"]))]
    assert factors == pytest.approx(data["factor_per_epoch"], rel=1e-9)


def test_cosine_of_sp4asc_is_the_published_one(golden):
    rates = golden("sp4asc_training")["lr_per_epoch"]
    found = [1e-3 * Cosine(0.01).factor(Place(epoch, n_epochs=200)) for epoch in range(201)]
    assert found == pytest.approx(rates, abs=1e-9)


def test_warm_restarts_of_dragonsearch_are_the_published_ones(golden):
    data = golden("dragonsearch_training")
    schedule = WarmRestarts(restart_epochs=30, restart_factor=1, last_lr_value=1e-3, every_step=True)
    places = [Place(int(at), round(4 * (at % 1)), 4) for at in data["lr_positions"]]
    assert [place.epoch + place.step / 4 for place in places] == data["lr_positions"]
    rates = [data["lr_initial"] * schedule.factor(place) for place in places]
    assert rates == pytest.approx(data["lr_values"], abs=1e-9)


def test_warm_up_and_cosine_of_the_baselines_are_the_published_ones():
    cases = json.loads((Path(__file__).parent / "golden/dcase_lr_schedule.json").read_text())
    for case in cases.values():
        schedule, n_steps = WarmupCosine(case["warmup_steps"]), case["steps_per_epoch"]
        for step, rate in case["lr_at_step"].items():
            place = Place(int(step) // n_steps, int(step) % n_steps, n_steps, case["epochs"])
            assert case["peak_lr"] * schedule.factor(place) == pytest.approx(rate, abs=1e-12), step


def test_warm_up_and_cosine_of_tan_end_at_a_tenth():
    schedule = WarmupCosine(warmup_steps=20, cosine_turns=0.4)
    assert schedule.factor(Place(0, 5, 100, 10)) == 0.25
    assert schedule.factor(Place(10, 0, 100, 10)) == pytest.approx(0.0955, abs=1e-4)


def test_every_schedule_gives_factors_from_0_to_1():
    for config in SCHEDULES.values():
        factors = [config().factor(Place(epoch, step, 5, 40)) for epoch in range(41) for step in range(5)]
        assert all(0 <= factor <= 1 for factor in factors) and max(factors) > 0.04, config


def test_a_step_takes_the_rate_of_its_place():
    from helpers.loop import LoopState, Update

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    machine = SimpleNamespace(device=torch.device("cpu"), batch_size=4)
    update = Update(optimizer, machine, rate=lambda *place: sum(place), state=LoopState(epoch=2, step=3))
    update.set_lr(17)
    assert update.lr == 2 + 3 + 5  # five batches of four hold 17 clips
