from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from datasets.tau import CITIES, DEVICE_GROUPS, RECORDING_DEVICES, SCENES, Meta
from datasets.waveforms import Clips
from helpers.metrics import score


def clips_of(labels: list[int], devices: list[str], cities: list[int] | None = None) -> Clips:
    n = len(labels)
    meta = Meta(
        root=Path(),
        files=np.array([f"audio/{i}.wav" for i in range(n)], dtype=object),
        scene=np.array(labels),
        recording_device=np.array([RECORDING_DEVICES.index(device) for device in devices]),
        city=np.array(cities if cities is not None else [0] * n),
        scenes=SCENES,
        recording_devices=RECORDING_DEVICES,
        cities=CITIES,
    )
    return Clips(meta, np.arange(n), store=None)


def test_matches_the_published_metrics(golden):
    data = golden("metrics_student")
    clips, logits = clips_of(data["labels"], data["devices"]), data["logits"]
    metrics = score(clips, logits, DEVICE_GROUPS)
    published = dict(zip(data["metric_names"], data["metric_values"], strict=True))
    kinds = {"vacc": "acc", "vloss": "loss", "vcnt": "count", "acc": "acc", "lloss": "loss", "count": "count"}
    n_compared = 0
    for name, value in published.items():
        if "." not in name:
            continue
        kind, part = name.split(".")
        place = "" if part in DEVICE_GROUPS else "device/" if part in RECORDING_DEVICES else "scene/"
        assert metrics[f"{kinds[kind]}/{place}{part}"] == pytest.approx(value, abs=1e-5), name
        n_compared += 1
    assert n_compared == len(published) - 3
    assert metrics["acc"] == pytest.approx(published["val_acc"], abs=1e-5)
    assert metrics["macro_avg_acc"] == pytest.approx(published["macro_avg_acc"], abs=1e-5)
    # The published loss is a mean of batch means, in which a clip of the last, smaller batch counts for more; ours is
    # the mean over clips. The same clips give the published number when they are averaged its way.
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(data["labels"]), reduction="none")
    batch_means = torch.stack([batch.mean() for batch in losses.split(data["batch_size"])])
    assert batch_means.mean().item() == pytest.approx(published["val_loss"], abs=1e-5)
    assert metrics["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)


def test_matches_scikit_learn():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 10, 200), torch.from_numpy(rng.normal(size=(200, 10)))
    metrics = score(clips_of(labels.tolist(), ["a"] * 200, (labels % 3).tolist()), logits, DEVICE_GROUPS)
    predicted = logits.argmax(1).numpy()
    assert metrics["acc"] == pytest.approx(accuracy_score(labels, predicted))
    assert metrics["macro_avg_acc"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics["loss"] == pytest.approx(log_loss(labels, logits.softmax(1).numpy()))
    in_city = labels % 3 == 1
    assert metrics["acc/city/helsinki"] == pytest.approx(accuracy_score(labels[in_city], predicted[in_city]))


def test_only_groups_that_occur_have_metrics():
    metrics = score(clips_of([0, 4], ["a", "s4"]), torch.eye(10)[[0, 3]], DEVICE_GROUPS)
    assert {key for key in metrics if key.startswith("acc/")} == {
        "acc/real", "acc/unseen", "acc/scene/airport", "acc/scene/park", "acc/device/a", "acc/device/s4",
        "acc/city/barcelona",
    }  # fmt: skip
    assert metrics["macro_avg_acc"] == 0.5
