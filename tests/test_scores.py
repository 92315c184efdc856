"""Scores against what published code, scikit-learn and plain loops make of the same answers."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import log_loss

from datasets.tau import CITIES, DEVICE_GROUPS, RECORDING_DEVICES, SCENES
from helpers.evaluate.calibration import reliability
from helpers.evaluate.confusions import confusion_matrix
from helpers.evaluate.scores import accuracy_by, class_device_table, details
from helpers.metrics import judge, score
from tests.test_metrics import clips_of

# The baselines' names of our fields; `loss` and `cnt` are of devices and scenes, `lloss` and `count` of groups.
FIELDS = {"acc": "acc", "loss": "loss", "lloss": "loss", "cnt": "count", "count": "count"}
PREFIXES = {"v" + field: name for field, name in FIELDS.items()} | FIELDS  # as CP-JKU has them


def place(name: str) -> str:
    return name if name in DEVICE_GROUPS else f"device/{name}" if name in RECORDING_DEVICES else f"scene/{name}"


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("case", ["all_devices", "device_missing"])
@pytest.mark.parametrize(("part", "tolerance"), [("val", 1e-5), ("test", 2e-3)])
@pytest.mark.parametrize("year", ["r24", "r25"])
def test_matches_the_baselines(golden, case, part, tolerance, year):
    """At test they compute in 16 bits, ours only takes their 16-bit logits; groups without clips are NaN for them."""
    data = golden(f"dcase_metrics_{case}")
    logits = data["logits"].half().float() if part == "test" else data["logits"]
    found = score(clips_of(data["labels"].tolist(), data["devices"]), logits, DEVICE_GROUPS)
    n_compared = 0
    for key, value in data[f"{year}_{part}"].items():
        field, _, name = key.removeprefix(f"{part}/").partition(".")
        if name:
            ours = f"{FIELDS[field]}/{place(name)}"
            if name == "s5" and case == "device_missing":
                assert ours not in found and not value > 0  # NaN, or no clips
                continue
            assert found[ours] == pytest.approx(value, rel=tolerance, abs=1e-6), key
        elif field != "loss":  # theirs is a mean of batch means
            assert found[field] == pytest.approx(value, abs=1e-6), key
        n_compared += 1
    assert n_compared == 69 - 3 * (case == "device_missing")


def test_matches_cp_jku(golden):
    """Its teacher script, which has devices and groups; the student's values are in test_metrics.py."""
    data = golden("metrics_cpresnet")
    found = score(clips_of(data["labels"], data["devices"]), data["logits"], DEVICE_GROUPS)
    for key, value in zip(data["metric_names"], data["metric_values"], strict=True):
        field, _, name = key.partition(".")
        if name and key != "val.loss":  # a mean of batch means
            assert found[f"{PREFIXES[field]}/{place(name)}"] == pytest.approx(value, abs=1e-5), key
    assert found["acc"] == pytest.approx(data["metric_values"][data["metric_names"].index("val_acc")])


def test_matches_sp4asc(golden):
    """Its overall values are means over the scenes."""
    data = golden("sp4asc_metrics")
    clips = clips_of(data["targets"].tolist(), data["devices"])
    found, published = score(clips, data["probabilities"].log(), DEVICE_GROUPS), data["results"]
    assert found["macro_avg_loss"] == pytest.approx(published["overall"]["logloss"], rel=1e-5)
    assert 100 * found["macro_avg_acc"] == pytest.approx(published["overall"]["accuracy"], rel=1e-5)
    for kind in ("scene", "device"):
        for name, values in published[{"scene": "class_wise", "device": "device_wise"}[kind]].items():
            assert found[f"loss/{kind}/{name}"] == pytest.approx(values["logloss"], rel=1e-5), name
            assert 100 * found[f"acc/{kind}/{name}"] == pytest.approx(values["accuracy"], rel=1e-5), name
    assert found["loss"] == pytest.approx(log_loss(data["targets"].numpy(), data["probabilities"].numpy()), rel=1e-5)


@pytest.mark.parametrize("kind", ["device", "city"])
def test_matches_dragonsearch(golden, kind):
    data, names = golden("dragonsearch_metrics")[kind], {"device": RECORDING_DEVICES, "city": CITIES}[kind]
    assert list(names) == golden("dragonsearch_metrics")[f"{kind}_order"]
    n = len(data["targets"])
    devices = [RECORDING_DEVICES[i] for i in data["groups"]] if kind == "device" else ["a"] * n
    clips = clips_of(data["targets"].tolist(), devices, data["groups"].tolist() if kind == "city" else None)
    found = accuracy_by(clips, data["predictions"], kind, absent=0.0)
    assert tuple(found) == names
    assert list(found.values()) == pytest.approx(data["accuracy"].tolist(), abs=1e-6)
    there = accuracy_by(clips, data["predictions"], kind)
    assert tuple(there) == tuple(name for name, total in zip(names, data["total"], strict=True) if total)
    assert there == {name: found[name] for name in there}


@pytest.fixture
def report(golden):
    data = golden("easy_report")
    logits = torch.eye(10)[torch.tensor(data["pred"])]
    return data, clips_of(data["y"], [RECORDING_DEVICES[i] for i in data["d"]]), logits


def test_matches_the_table_of_easy_dcase_task1(report):
    data, clips, logits = report
    table = class_device_table(clips, logits)
    assert table.markdown(published=True).strip() == data["markdown"].strip()
    counts = confusion_matrix(np.array(data["pred"]), np.array(data["y"]), 10)
    np.testing.assert_allclose(counts / counts.sum(axis=1, keepdims=True), data["confusion"], atol=1e-6)
    assert (counts == sklearn_confusion_matrix(data["y"], data["pred"])).all()


def test_cells_without_clips_do_not_count(report):
    _, clips, logits = report
    table = class_device_table(clips, logits)
    by_hand = []
    for scene in range(10):
        cells = []
        for device in range(9):
            own = ((clips.scene == scene) & (clips.recording_device == device)).numpy()
            if own.any():
                cells.append((logits.argmax(1).numpy()[own] == scene).mean())
        by_hand.append(np.mean(cells))
    np.testing.assert_allclose(table.class_average(), by_hand)
    assert "| metro | 80.0 | 66.7 | 25.0 | 100.0 | N/A | 100.0 | 80.0 | 100.0 | 50.0 | 75.2 |" in table.markdown()
    judged = judge(clips, logits, DEVICE_GROUPS, cells=True)
    found = judged.scores()
    assert found["domain_avg_acc"] == pytest.approx(table.domain_average.mean())
    assert found["acc/scene/bus/device/c"] == pytest.approx(table.accuracy[1, 2])
    assert "acc/scene/metro/device/s2" not in found
    plain = score(clips, logits, DEVICE_GROUPS)
    assert {key: found[key] for key in plain if "count" not in key} == {
        k: v for k, v in plain.items() if "count" not in k
    }


def test_absent_scenes_and_devices_are_left_out():
    clips, logits = clips_of([1, 1, 4], ["a", "s4", "s4"]), torch.eye(10)[[1, 0, 4]]
    table = class_device_table(clips, logits)
    assert (table.scenes, table.devices) == (("bus", "park"), ("a", "s4"))
    assert table.markdown().splitlines()[3:] == [
        "| bus | 100.0 | 0.0 | 50.0 |",
        "| park | N/A | 100.0 | 100.0 |",
        "| Domain Avg. | 100.0 | 50.0 | 75.0 |",
    ]
    whole = class_device_table(clips, logits, all_names=True)
    assert (whole.scenes, whole.devices) == (SCENES, RECORDING_DEVICES)
    assert "| airport | N/A | N/A | N/A | N/A | N/A | N/A | N/A | N/A | N/A | N/A |" in whole.markdown()
    assert (whole.class_average().count(), whole.domain_average.count()) == (2, 2)
    assert accuracy_by(clips, logits, "scene", names=["park", "tram"], absent=0.0) == {"park": 1.0, "tram": 0.0}


def test_reliability_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits, target = torch.from_numpy(rng.normal(size=(400, 10))), torch.from_numpy(rng.integers(0, 10, 400))
    sure, answer = logits.softmax(1).max(1)
    for bins, strategy in (("width", "uniform"), ("count", "quantile")):
        found = reliability(logits, target, n_bins=8, bins=bins)
        accuracy, confidence = calibration_curve((answer == target).numpy(), sure, n_bins=8, strategy=strategy)
        np.testing.assert_allclose(found.accuracy, accuracy)
        np.testing.assert_allclose(found.confidence, confidence)
        by_hand = sum(found.count / 400 * np.abs(accuracy - confidence))
        assert found.error == pytest.approx(by_hand)


def test_details_of_all_clips_are_the_plain_scores():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 90).tolist()  # most scenes never occur
    clips, logits = clips_of(labels, ["a"] * 90), torch.from_numpy(rng.normal(size=(90, 10)))
    found = {}
    for measure in details(clips, logits):
        part = rng.integers(0, 7, 90)
        sums = measure.sums(part, 7)
        found |= measure.scores_of(sums.sum(axis=0))
        one = measure.sums(np.zeros(90, dtype=int), 1)
        np.testing.assert_allclose(sums.sum(axis=0), one[0])
    assert found["ece"] == pytest.approx(reliability(logits, clips.scene).error)
    assert found["ece_adaptive"] == pytest.approx(reliability(logits, clips.scene, bins="count").error)
    counts = confusion_matrix(logits.argmax(1).numpy(), np.array(labels), 10)
    assert {key.split("/")[1] for key in found if key.startswith("confusion")} == set(SCENES[:3])
    assert found["confusion/bus/tram"] == counts[1, 9] / counts[1].sum()


def test_names_may_hold_slashes():
    clips = clips_of([0, 1, 1], ["a", "a", "b"])
    names = {"scenes": ("in/out", *SCENES[1:]), "recording_devices": ("x/y/z", *RECORDING_DEVICES[1:])}
    clips.meta = replace(clips.meta, **names)
    found = judge(clips, torch.eye(10)[[0, 1, 0]], {}, cells=True).scores()
    assert found["macro_avg_acc"] == 0.75
    assert (found["acc/scene/bus/device/x/y/z"], found["domain_avg_acc"]) == (1.0, 0.5)
