import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from helpers.report import report
from helpers.report.report import (
    metric_tables,
    read_history,
    spread,
    write_confusion_matrix,
    write_curves,
    write_report,
)

pytestmark = [pytest.mark.plots, pytest.mark.slow]

SCENES = ("airport", "bus", "street_pedestrian")


def metrics_of(
    epoch: int = 0, scenes=SCENES, devices=("a", "b", "s4"), groups=("real", "unseen"), split="test"
) -> dict:
    """Metrics of one epoch, with values that tell every entry apart."""
    metrics = {f"{split}/acc": 0.5947 + epoch / 1000, f"{split}/macro_avg_acc": 0.5946, f"{split}/loss": 1.1041}
    metrics |= {f"{split}/count": 29680}
    keys = [f"scene/{x}" for x in scenes] + [f"device/{x}" for x in devices] + list(groups) + ["city/lyon"]
    for i, key in enumerate(keys):
        metrics |= {
            f"{split}/acc/{key}": 0.1 + i / 100,
            f"{split}/loss/{key}": 2 + i / 10,
            f"{split}/count/{key}": 100 + i,
        }
    return metrics


def history_of(n_epochs: int, **options) -> list[dict]:
    train = {
        "train/loss": 0.05,
        "train/label_loss": 0.01,
        "train/kd_loss": 0.04,
        "train/lr": 9e-4,
        "train/seconds": 60.0,
    }
    return [{"epoch": epoch, **train, **metrics_of(epoch, **options)} for epoch in range(n_epochs)]


# --- tables


def test_tables_show_every_scene_device_group_and_city():
    lines = metric_tables(metrics_of()).splitlines()
    assert lines[0] == "test (29,680 clips): accuracy 59.47 %, macro average 59.46 %, log loss 1.104"
    text = [" ".join(line.split()) for line in lines]
    assert text[2] == "scene acc % log loss clips device acc % log loss clips"
    assert text[4] == "airport 10.00 2.000 100 a 13.00 2.300 103"
    assert text[6] == "street_pedestrian 12.00 2.200 102 s4 15.00 2.500 105"
    joined = "\n".join(text)
    assert "macro average 59.46 - -" in joined
    assert "real 16.00 2.600 106" in joined and "unseen 17.00 2.700 107" in joined
    assert "lyon 18.00 2.800 108" in joined
    assert joined.count("all 59.47 1.104 29,680") == 3


def test_columns_are_aligned():
    metrics = {key: value for key, value in metrics_of(devices=(), groups=()).items() if "/city/" not in key}
    _, _, *table = metric_tables(metrics).splitlines()
    assert len(table) == 8 and {len(line) for line in table} == {42}


@pytest.mark.parametrize("n_classes", [2, 3, 50])
@pytest.mark.parametrize("length", [1, 30, 200])
def test_tables_fit_the_terminal_with_any_classes(n_classes, length):
    scenes = [f"{'x' * length}{i}" for i in range(n_classes)]
    text = metric_tables(metrics_of(scenes=scenes))
    assert max(map(len, text.splitlines())) <= 100
    assert sum("x" in line.split()[0] for line in text.splitlines() if line) == n_classes
    assert all(f"x{i} " in text for i in range(n_classes))  # what tells long names apart is not cut off


def test_absent_groups_have_no_rows():
    text = metric_tables(metrics_of(scenes=("park",), devices=(), groups=()))
    assert "device" not in text and "real" not in text and "park" in text
    assert metric_tables({"test/acc": 0.25}) == "test: accuracy 25.00 %"
    only_group = metric_tables({"test/acc": 0.25, "test/acc/unseen": 0.125})
    assert "unseen" in only_group and "12.50" in only_group


def test_values_that_were_not_measured_are_dashes():
    text = metric_tables({"test/acc": 0.5, "test/acc/scene/bus": 0.0, "test/loss/scene/bus": math.nan})
    assert ["bus", "0.00", "-", "-"] in [line.split() for line in text.splitlines()]


def test_another_split_is_kept_apart():
    metrics = metrics_of() | metrics_of(split="val", scenes=("only_in_val",))
    assert "only_in_val" in metric_tables(metrics, "val") and "only_in_val" not in metric_tables(metrics)
    with pytest.raises(ValueError, match=r"'eval'.*test, val"):
        metric_tables(metrics, "eval")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([57.1, 56.2, 58.3], "57.2 +- 1.1 (3)"),  # 57.2, and 1.0536 = sqrt(((-0.1)**2 + 1 + 1.21) / 2)
        ([0.571, 0.562, 0.583], "0.572 +- 0.011 (3)"),
        ([100.0, 300.0], "200 +- 141 (2)"),
        ([0.5, 0.5], "0.5000 +- 0.0000 (2)"),
        ([0.5947], "0.5947 (1)"),
    ],
)
def test_spread_is_mean_and_sample_deviation(values, text):
    assert spread(values) == text
    assert spread(np.array(values)) == text


def test_spread_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        spread([])


# --- figures


def pixels(path) -> np.ndarray:
    image = imread(path)[..., :3]  # (row, column, colour)
    assert len(np.unique(image.sum(axis=2))) > 20, "the image is nearly empty"
    return image


def share_of(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Part of the pixels within 2 of a colour of 0..255."""
    return float((np.abs(255 * image - np.array(colour)) < 2.5).all(axis=-1).mean())


@pytest.mark.parametrize("n_epochs", [1, 150])
def test_curves_are_drawn_for_one_epoch_and_for_many(tmp_path, n_epochs):
    write_curves(history_of(n_epochs), tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    assert image.shape == (720, 1320, 3)
    assert share_of(image, (0xD5, 0x5E, 0x00)) > 1e-5  # training loss and the first device group


@pytest.mark.parametrize(("kd_loss", "drawn"), [(0.0, False), (0.3, True)])
def test_distillation_is_drawn_where_there_is_a_teacher(tmp_path, monkeypatch, kd_loss, drawn):
    labels, draw = [], report._draw_lines

    def recording(axes, history, names, *rest, **options):
        labels.extend(names)
        draw(axes, history, names, *rest, **options)

    monkeypatch.setattr(report, "_draw_lines", recording)
    losses = {"train/loss": 1.0 + kd_loss, "train/label_loss": 1.0, "train/kd_loss": kd_loss}
    write_curves([{"epoch": epoch, **losses} for epoch in range(3)], tmp_path / "curves.png")
    assert "train/loss" in labels
    assert ("train/kd_loss" in labels) == ("train/label_loss" in labels) == drawn


def test_curves_leave_out_what_is_missing_and_what_is_nan(tmp_path):
    history = [{"epoch": 0, "train/loss": math.nan}, {"epoch": 3, "train/loss": 1.0}, {"epoch": 5, "test/acc": 0.5}]
    write_curves(history, tmp_path / "curves.png")
    pixels(tmp_path / "curves.png")
    write_curves([{"epoch": 0}], tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="no epoch"):
        write_curves([], tmp_path / "empty.png")


@pytest.mark.parametrize("n_classes", [1, 3, 12, 50])
def test_confusion_matrix_takes_any_number_of_classes(tmp_path, n_classes):
    targets = np.arange(4 * n_classes) % n_classes
    names = [f"a_scene_with_a_rather_long_name_{i}" for i in range(n_classes)]
    write_confusion_matrix(targets, targets, names, tmp_path / "matrix.png")
    image = pixels(tmp_path / "matrix.png")
    assert all(400 < size < 2200 for size in image.shape[:2])
    dark_blue = share_of(image, (8, 48, 107))  # 100 % on Blues: the diagonal, 1 / n_classes of the cells
    assert 0.2 / n_classes < dark_blue < 1 / n_classes


def test_confusion_matrix_normalises_rows(tmp_path):
    """A hundred clips of one class and two of another give the same colours when the same share is right."""
    targets, predictions = [0] * 100 + [1] * 2, [0] * 50 + [1] * 50 + [0, 1]
    write_confusion_matrix(predictions, targets, ["x$\\y$z", "b"], tmp_path / "matrix.png")  # no formulas in names
    image = pixels(tmp_path / "matrix.png")
    half = (0x6A, 0xAE, 0xD6)  # 50 % on Blues
    assert share_of(image, half) > 0.4 and share_of(image, (8, 48, 107)) < 0.01


def test_confusion_matrix_greys_classes_without_clips(tmp_path):
    write_confusion_matrix([0, 1], [0, 0], ["a", "b"], tmp_path / "matrix.png")
    assert share_of(pixels(tmp_path / "matrix.png"), (0xE8, 0xE8, 0xE8)) > 0.15


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([0, 1], [0], "as many predictions"),
        ([], [], "as many"),
        ([0, 2], [0, 1], r"\[0, 1\]"),
        ([0], [-1], r"\[0, 1\]"),
    ],
)
def test_confusion_matrix_refuses_what_does_not_fit(tmp_path, predictions, targets, message):
    with pytest.raises(ValueError, match=message):
        write_confusion_matrix(predictions, targets, ["a", "b"], tmp_path / "matrix.png")


# --- report


def write_history(run_dir, history) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))


def test_history_reads_null_as_nan_and_leaves_out_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0, "a": null}\n{"epoch": 1, "a": 0.5}\n{"epoch": 2, "a')
    first, second = read_history(path)
    assert math.isnan(first["a"]) and second == {"epoch": 1, "a": 0.5}


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[" * 100_000, "3", "[]", "null", "{}", '{"a": 1}', '{"epoch": 1, "a": "b"}', '{"epoch": [1]}', "\0"],
)
def test_a_damaged_line_of_the_history_costs_that_line_alone(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"epoch": 0}}\n{line}\n{{"epoch": 2}}\n')
    assert read_history(path) == [{"epoch": 0}, {"epoch": 2}]
    assert f"{path}: line 2 does not hold the metrics of an epoch" in caplog.text


def test_report_shows_the_last_epoch_not_the_best(tmp_path):
    history = history_of(3)
    history[1]["test/acc"] = 0.9
    write_history(tmp_path / "abcd1234", history)
    targets = np.arange(30) % 3
    path = write_report(tmp_path / "abcd1234", targets, targets, SCENES, note="Generated sounds.")
    text = path.read_text()
    assert path.name == "report.md" and "# Run abcd1234" in text and "> Generated sounds." in text
    assert "after epoch 2" in text and "accuracy 59.67 %" in text and "90.00" not in text
    assert "| airport | 10.00 | 2.000 | 100 |" in text and "| **real** | **16.00** |" in text
    assert "3 min" in text
    for name in ("curves.png", "confusion_matrix.png"):
        assert f"({name})" in text
        pixels(path.parent / name)


def test_report_without_scores_or_without_a_history_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, [0], [0], ["a"])
    write_history(tmp_path, [{"epoch": 0, "train/loss": 1.0}])
    with pytest.raises(ValueError, match="no test metrics"):
        write_report(tmp_path, [0], [0], ["a"])
