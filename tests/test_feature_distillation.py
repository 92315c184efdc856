"""Distillation of features against its formulas written out in NumPy, and on the networks that it connects."""

import numpy as np
import pytest
import torch
from torch import nn

from datasets.waveforms import Batch
from helpers.augment.mixup import MixUp
from helpers.losses import LOSSES, kd_loss
from helpers.losses.feature_distillation import Maps, TeacherFrontend, dfm, ssfm
from models import MODELS, get_frontend, get_model
from tests.golden_inputs import clip, fill_state, wave

MEL = {"n_fft": 512, "win_length": 512, "hop_length": 160, "n_mels": 64, "sample_rate": 8000}
WITH_FEATURES = ["cp_mobile", "dcase24_baseline", "cp_resnet", "tf_sepnet", "bc_resnet", "cnn6_60k"]


def attached(student, **options):
    config, Loss = LOSSES["feature_distillation"]
    loss = Loss(config(**options))
    frontends = get_frontend("cp_mel", **MEL), get_frontend("cp_mel", **(MEL | {"hop_length": 240}))
    teacher = fill_state(get_model("cp_resnet", base_channels=8, cut_channels_s3=0))
    loss.take_teacher(teacher, frontends[1])
    loss.attach(student, frontends[0], 8000)
    return loss, teacher, frontends


def pooled(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Adaptive average pool of (batch, channel, freq, time), from its definition."""
    out = np.empty((*x.shape[:2], *size))
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * x.shape[2] // size[0], -(-(i + 1) * x.shape[2] // size[0]))
            columns = slice(j * x.shape[3] // size[1], -(-(j + 1) * x.shape[3] // size[1]))
            out[:, :, i, j] = x[:, :, rows, columns].mean(axis=(2, 3))
    return out


def projected(layer: nn.Conv2d, x: torch.Tensor) -> np.ndarray:
    weight, bias = layer.weight.detach().double().numpy()[:, :, 0, 0], layer.bias.detach().double().numpy()
    return np.einsum("oc,bcft->boft", weight, x.double().numpy()) + bias[:, None, None]


def test_feature_maps_are_compared_point_by_point():
    x, y, layer = wave((3, 6, 5, 4), "own"), wave((3, 9, 8, 7), "theirs"), nn.Conv2d(6, 9, 1)
    expected = ((projected(layer, x) - pooled(y.double().numpy(), (5, 4))) ** 2).mean()
    assert dfm([x], [y], [layer], ()).item() == pytest.approx(expected, rel=1e-5)


def test_similarities_of_the_clips_are_compared_in_every_stage():
    own = [wave((3, 4, 6, 2), "s1"), wave((3, 6, 3, 5), "s2")]
    theirs = [wave((3, 5, 4, 4), "t1"), wave((3, 7, 4, 4), "t2")]
    of_own, of_theirs = [nn.Conv2d(x.shape[1], 7, 1) for x in own], [nn.Conv2d(x.shape[1], 7, 1) for x in theirs]
    expected = 0.0
    for x, y, p, q in zip(own, theirs, of_own, of_theirs, strict=True):
        size = min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3])
        s, r = pooled(projected(p, x), size), pooled(projected(q, y), size)
        difference = [
            s[:, :, f, t] @ s[:, :, f, t].T / 7 - r[:, :, f, t] @ r[:, :, f, t].T / 7
            for f in range(size[0])
            for t in range(size[1])
        ]
        expected += (np.array(difference) ** 2).mean()
    assert ssfm(own, theirs, of_own, of_theirs).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", WITH_FEATURES)
@pytest.mark.parametrize("match", ["dfm", "ssfm"])
def test_network_and_projections_learn_and_the_teacher_does_not(name, match):
    student = fill_state(get_model(name, **({"input_fdim": 64} if name == "cnn6_60k" else {}))).train()
    loss, teacher, frontends = attached(student, feature_match=match)
    assert student.training and not teacher.training
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    batch = Batch(clip(1.0, 8000, "features", 3), target=torch.eye(10)[:3], teacher_logits=wave((3, 10), "t", 3))
    batch = loss.hearing[0].train()(batch)
    terms = loss(student(frontends[0].eval()(batch.waveform)), batch)
    assert terms.loss.item() == pytest.approx(sum(term.item() for term in terms[1:]))
    assert terms.feature_loss > 0
    terms.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loss.parameters())
    stages = len(student.feature_layers) if match == "ssfm" else 1
    assert len(loss.of_student) == min(stages, 3) and len(loss.of_teacher) == (min(stages, 3) if match == "ssfm" else 0)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_terms_have_their_published_weights():
    student = fill_state(get_model("cp_mobile", base_channels=8))
    loss, _, frontends = attached(student)
    batch = Batch(clip(1.0, 8000, "weights", 3), target=torch.eye(10)[:3], teacher_logits=wave((3, 10), "t", 3))
    logits = student(frontends[0].eval()(batch.waveform))
    terms = loss(logits, loss.hearing[0](batch))
    parts = kd_loss(logits, batch.target, batch.teacher_logits, 0.02, 2.0)
    torch.testing.assert_close(terms.label_loss, parts.label_loss)
    torch.testing.assert_close(terms.kd_loss, parts.kd_loss / 0.98 * 0.88)
    assert loss.teacher_temperature == 2.0 and attached(student, kd_weight=0.0)[0].teacher_temperature is None


def test_evaluation_keeps_no_features():
    student = get_model("cp_mobile", base_channels=8)
    maps = Maps(student)
    with torch.inference_mode():
        student(wave((1, 1, 64, 20), "x"))
    with pytest.raises(KeyError):
        maps.take()


def test_mixup_mixes_what_the_teacher_hears():
    frontend = TeacherFrontend(get_frontend("cp_mel", **MEL))
    batch = frontend(Batch(clip(1.0, 8000, "mixup", 4), target=torch.eye(4)))
    batch = MixUp(0.3).mix(
        Batch(batch.waveform, batch.target, log_mel=batch.teacher_log_mel, teacher_log_mel=batch.teacher_log_mel),
        torch.tensor(0.3), torch.tensor([1, 2, 3, 0]),
    )  # fmt: skip
    torch.testing.assert_close(batch.teacher_log_mel, batch.log_mel, rtol=0, atol=0)


def test_networks_that_do_not_go_together_are_refused():
    loss = LOSSES["feature_distillation"][1](LOSSES["feature_distillation"][0]())
    loss.take_teacher(get_model("cp_resnet"), get_frontend("cp_mel", **(MEL | {"sample_rate": 16000})))
    with pytest.raises(ValueError, match="hears 16000 Hz and the network 8000 Hz"):
        loss.attach(get_model("cp_mobile", base_channels=8), get_frontend("cp_mel", **MEL), 8000)
    with pytest.raises(ValueError, match="Cnn3 declares no feature_layers"):
        loss.attach(get_model("cnn3"), get_frontend("cp_mel", **(MEL | {"sample_rate": 16000})), 16000)
    with_features = [
        name for name in MODELS if name not in ("passt", "beats") and hasattr(get_model(name), "feature_layers")
    ]
    assert sorted(with_features) == sorted(WITH_FEATURES)
