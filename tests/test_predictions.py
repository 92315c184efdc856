"""Tables and arrays of answers: ours, those handed in to the challenge, and what does not fit."""

import json

import numpy as np
import pytest
import torch

from datasets.tau import DEVICE_GROUPS, SCENES, DataError
from helpers.evaluate.predictions import is_predictions, read_predictions, write_predictions
from helpers.metrics import class_by_device, confusion, score
from tests.test_metrics import clips_of


def rows(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 10, generator=torch.Generator().manual_seed(0)).softmax(1)


FILES = [f"audio/{i}.wav" for i in range(4)]


def test_what_is_written_is_read(tmp_path):
    write_predictions(tmp_path / "a.csv", FILES, rows(), SCENES)
    found = read_predictions(tmp_path / "a.csv").of(FILES[::-1], SCENES)
    torch.testing.assert_close(found.softmax(1).float(), rows().flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("year", [2024, 2025])
def test_published_tables_are_read(shared, year):
    folder = shared(f"golden/dcase_baselines/submission_{year}")
    files = [f"audio/{i}.wav" for i in range(10)]
    found = read_predictions(folder / "output.csv").of(files, SCENES).softmax(1)
    wanted = torch.load(folder / "logits.pt", weights_only=True)["eval_logits_fp32"].softmax(1)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=5e-3)


def test_every_table_that_the_organisers_accept_is_read(shared, tmp_path):
    cases = json.loads(shared("golden/dcase_baselines/validator_2024.json").read_text())["output_cases"]
    for name in ("as_written_by_the_2024_script", "audio_prefix_kept", "columns_in_another_order"):
        (tmp_path / "a.csv").write_text(cases[name]["csv"])
        found = read_predictions(tmp_path / "a.csv").of([f"{i}.wav" for i in range(10)], SCENES)
        assert [SCENES[i] for i in found.argmax(1)][:4] == ["park", "metro", "tram", "street_traffic"]


def test_sp4ascs_tables_and_scores_are_the_published_ones(shared, tmp_path):
    data = torch.load(shared("golden/sp4asc/metrics.pt"), weights_only=True)
    (tmp_path / "a.csv").write_text(data["submission_csv"], newline="")
    found = read_predictions(tmp_path / "a.csv").of(data["submission_filenames"], SCENES)
    torch.testing.assert_close(found.softmax(1).float(), data["probabilities"][:4].float(), rtol=0, atol=1e-6)
    torch.save(data["probabilities"].float(), tmp_path / "a.pt")
    clips = clips_of(data["targets"].tolist(), data["devices"])
    metrics = score(clips, read_predictions(tmp_path / "a.pt").of(clips.files, SCENES), DEVICE_GROUPS)
    results = data["results"]
    found = {"overall": {"overall": ("macro_avg_loss", "macro_avg_acc")},
             "class_wise": {scene: (f"loss/scene/{scene}", f"acc/scene/{scene}") for scene in SCENES},
             "device_wise": {d: (f"loss/device/{d}", f"acc/device/{d}") for d in set(data["devices"])}}  # fmt: skip
    for kind, keys in found.items():
        for name, (loss, acc) in keys.items():
            wanted = results["overall"] if kind == "overall" else results[kind][name]
            assert metrics[loss] == pytest.approx(wanted["logloss"], abs=1e-5)
            assert 100 * metrics[acc] == pytest.approx(wanted["accuracy"], abs=1e-5)


def test_device_and_city_accuracies_are_dragonsearchs(shared):
    data = torch.load(shared("golden/dragonsearch/metrics.pt"), weights_only=True)
    for kind, order in (("device", data["device_order"]), ("city", data["city_order"])):
        case = data[kind]
        groups = case["groups"].tolist()
        devices = [order[i] if kind == "device" else "a" for i in groups]
        clips = clips_of(case["targets"].tolist(), devices, groups if kind == "city" else None)
        metrics = score(clips, case["predictions"], DEVICE_GROUPS)
        for name, total, accuracy in zip(order, case["total"].tolist(), case["accuracy"].tolist(), strict=True):
            assert metrics.get(f"count/{kind}/{name}", 0) == total
            assert metrics.get(f"acc/{kind}/{name}", 0) == pytest.approx(accuracy, abs=1e-6)


def test_the_table_of_classes_and_devices_is_easy_dcase_task1s(shared):
    data = torch.load(shared("golden/easy_dcase_task1/report.pt"), weights_only=True)
    devices = ["a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6"]
    clips = clips_of(data["y"], [devices[i] for i in data["d"]])
    logits = torch.nn.functional.one_hot(torch.tensor(data["pred"]), 10).float()
    cells = class_by_device(clips, logits)
    lines = [line.split("|")[2:-2] for line in data["markdown"].strip().splitlines()[2:-1]]
    wanted = [[np.nan if cell.strip() == "N/A" else float(cell) for cell in line] for line in lines]
    np.testing.assert_allclose(100 * cells, wanted, rtol=0, atol=0.051)
    counts = confusion(clips, logits)
    shares = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(shares, data["confusion"].numpy() / data["confusion"].numpy().sum(1, keepdims=True),
                               rtol=0, atol=6e-3)  # fmt: skip


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_arrays_are_logits_or_probabilities_in_the_order_of_the_clips(tmp_path, suffix, kind):
    values = 3 * rows().log() if kind == "logits" else rows()
    path = tmp_path / f"a{suffix}"
    np.save(path, values.numpy()) if suffix == ".npy" else torch.save(values, path)
    assert is_predictions(path)
    wanted = values if kind == "logits" else rows().log()
    found = read_predictions(path).of(FILES, SCENES).log_softmax(1).float()
    torch.testing.assert_close(found, wanted.log_softmax(1), rtol=0, atol=1e-5)


def test_windows_of_a_recording_are_averaged(tmp_path):
    lines = ["file,start,end,scene,probability,yard,office", "x/a.wav,0,1,yard,.9,.9,.1", "x/a.wav,1,2,office,.7,.3,.7"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    found = read_predictions(tmp_path / "a.csv").of(["a.wav"], ["office", "yard"]).softmax(1)
    torch.testing.assert_close(found.float(), torch.tensor([[0.4, 0.6]]))


def table(*lines: str) -> str:
    return "\n".join("\t".join(line.split()) for line in ("filename scene_label yes no", *lines))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table("a.wav yes 0.9 0.1"), "lacks 1 of 2 clips, first b.wav"),
        (
            table("a.wav yes .9 .1", "b.wav yes .9 .1", "c.wav yes .9 .1"),
            "holds 1 clips that are not asked for, first c",
        ),
        (table("a.wav yes .9 .1", "a.wav yes .9 .1"), "names a.wav more than once"),
        (table("a.wav yes .9 .3"), "line 2: these are no probabilities"),
        (table("a.wav yes nan .3"), "line 2: these are no probabilities"),
        (table("a.wav yes .9"), "line 2: there must be a number for each class"),
        (table("a.wav yes x .1"), "line 2: there must be a number for each class"),
        (
            table("a.wav maybe .9 .1").replace("no", "perhaps"),
            "holds the classes yes, perhaps; the data set has yes, no",
        ),
        ("nothing", "must have a column filename"),
        ("", "must have a column filename"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path / "a.csv").of(["audio/a.wav", "audio/b.wav"], ["yes", "no"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3)), "holds 3 classes; the data set has yes, no"),
        (np.zeros((3, 2)), "holds 3 rows, there are 2 clips"),
        (np.zeros((2, 2), int), r"must hold numbers \(clip, class\), got \(2, 2\)"),
        (np.zeros(2), r"must hold numbers \(clip, class\), got \(2,\)"),
        (np.full((2, 2), np.nan), "row 0 holds NaN or infinity"),
        (np.array([{}, {}]), "holds no array of answers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path / "a.npy").of(["audio/a.wav", "audio/b.wav"], ["yes", "no"])
