"""Files of answers: the forms that people write, matched to the clips of a data set, and what does not fit."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.tau import SCENES, DataError, read_clips, read_meta, train_rows
from datasets.tau import test_rows as rows_for_test
from datasets.waveforms import Clips
from helpers.evaluate.predictions import Predictions, _warn_of_chance, predictions_of, read_predictions
from helpers.evaluate.uncertainty import differences, intervals
from helpers.metrics import score
from tests.golden_inputs import wave


def logits_of(files) -> torch.Tensor:
    """A row for each clip that only its name decides."""
    return torch.stack([wave((10,), file, 4.0) for file in files]).double()


def table(files, probabilities, scenes=SCENES, separator="\t", form=".10f", labels=None, end="\n") -> str:
    probabilities = np.asarray(probabilities)
    labels = labels or [scenes[i] for i in probabilities.argmax(axis=1)]
    lines = [separator.join(["filename", "scene_label", *scenes])]
    for file, label, row in zip(files, labels, probabilities, strict=True):
        lines.append(separator.join([file, label, *(format(float(value), form) for value in row)]))
    return end.join(lines) + end


@pytest.fixture
def meta(tau):
    return read_meta(tau.root)


@pytest.fixture
def test_files(meta):
    return list(meta.files[rows_for_test(meta)])


def evaluation_set(root: Path, listed: str):
    (root / "evaluation_setup").mkdir(parents=True)
    (root / "evaluation_setup" / "fold1_test.csv").write_text(listed)
    return read_clips(root)


@pytest.mark.parametrize(
    ("separator", "folder", "form", "tolerance"),
    [("\t", "", ".10f", 1e-8), ("\t", "audio/", ".5f", 1e-5), (",", "", ".2f", 0.02), (";", "audio/", ".4f", 5e-4)],
    ids=["2022, 2023, 2024", "2025", "dragonsearch", "semicolons"],
)
def test_tables_are_matched_by_name_and_scene(meta, test_files, tmp_path, separator, folder, form, tolerance):
    shuffled = np.random.default_rng(0).permutation(test_files)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]  # of the columns
    rows = logits_of(shuffled).softmax(1)[:, order]
    names = [file.replace("audio/", folder) for file in shuffled]
    text = table(names, rows, [SCENES[i] for i in order], separator, form, end="\r\n")
    (tmp_path / "output.csv").write_text(text, newline="")
    found = read_predictions(tmp_path / "output.csv", meta)
    wanted = logits_of(test_files)
    torch.testing.assert_close(found.probabilities, wanted.softmax(1), rtol=0, atol=tolerance)
    assert (found.logits.argmax(1) == wanted.argmax(1)).all()  # also where rounded probabilities tie
    assert list(found.files) == test_files and found.scenes == SCENES
    assert (found.target == meta.scene[rows_for_test(meta)]).all()
    assert [file.rsplit("-", 1)[1][:-4] for file in found.files] == list(found.recording_device)
    assert set(found.city) == {"milan"} and len(set(found.recording)) == 3


@pytest.mark.parametrize("year", [2024, 2025])
def test_published_submissions_are_read(shared, tmp_path, year):
    folder = shared(f"golden/dcase_baselines/submission_{year}")
    data = evaluation_set(tmp_path / "set", (folder / "fold1_test.csv").read_text())
    found = read_predictions(folder / "output.csv", data)
    wanted = torch.load(folder / "logits.pt", weights_only=True)["eval_logits_fp32"].double().softmax(1)
    torch.testing.assert_close(found.probabilities, wanted, rtol=0, atol=5e-3)
    labels = [line.split("\t")[1] for line in (folder / "output.csv").read_text().splitlines()[1:]]
    assert [found.scenes[i] for i in found.logits.argmax(1)] == labels
    assert (found.target, found.city, found.recording) == (None, None, None)
    devices = None if year == 2024 else ["a", "b", "c", "s1", "s2", "s3", "s7", "s8", "unknown", "a"]
    assert devices == (None if found.recording_device is None else list(found.recording_device))


REFUSED = {
    "duplicate_file": "holds 1.wav more than once",
    "wrong_extension": "which is not among the 10 clips",
    "index_too_large": "which is not among the 10 clips",
    "illegal_label": "which is none of airport",
    "probability_not_a_number": "scores that are no numbers",
    "probability_nan": "is no number",
    "missing_column_tram": "is no number|add up to|is for the scenes|which is none of",
    "one_row_missing": "lacks 1 of 10 clips",
    "row_with_a_field_missing": "is no number",
}


def test_what_the_organisers_refuse_is_refused(shared, tmp_path, caplog):
    """And files with NaN, which their checker lets pass; tables with commas, as dragonsearch writes, are read."""
    data = evaluation_set(tmp_path / "set", "filename\n" + "".join(f"audio/{i}.wav\n" for i in range(10)))
    cases = json.loads(shared("golden/dcase_baselines/validator_2024.json").read_text())["output_cases"]
    for name, case in cases.items():
        (tmp_path / "a.csv").write_text(case["csv"])
        caplog.clear()
        if name in REFUSED:
            with pytest.raises(DataError, match=REFUSED[name]) as error:
                read_predictions(tmp_path / "a.csv", data)
            assert "a.csv" in str(error.value) and "\n" not in str(error.value)
        else:
            found = read_predictions(tmp_path / "a.csv", data)
            assert [found.scenes[i] for i in found.logits.argmax(1)[1:4]] == ["metro", "tram", "street_traffic"]
            assert ("1 labels are not the most probable scene" in caplog.text) == (name == "label_not_the_argmax")


def test_sp4ascs_table_is_read(golden, tmp_path):
    data = golden("sp4asc_metrics")
    (tmp_path / "a.csv").write_text(data["submission_csv"], newline="")
    listed = "\n".join(["filename", *data["submission_filenames"]])
    found = read_predictions(tmp_path / "a.csv", evaluation_set(tmp_path / "set", listed))
    torch.testing.assert_close(found.probabilities, data["probabilities"][:4].double(), rtol=0, atol=1e-6)


def test_our_own_file_may_hold_other_clips_of_the_data_set(meta, test_files, tmp_path):
    files = list(np.random.default_rng(1).permutation(meta.files))
    content = {"files": files, "logits": logits_of(files).bfloat16().requires_grad_(), "scenes": list(SCENES)}
    torch.save(content | {"is_table": True}, tmp_path / "logits.pt")  # what else is in it does not matter
    found = read_predictions(tmp_path / "logits.pt", meta)
    assert (found.logits == logits_of(test_files).bfloat16().double()).all()
    rows = train_rows(meta)
    assert (read_predictions(tmp_path / "logits.pt", meta, rows).target == meta.scene[rows]).all()


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("order", ["list", "meta.csv", "rows"])
def test_arrays_follow_the_list_of_the_split(meta, test_files, tmp_path, suffix, kind, order):
    listed = meta.root / "evaluation_setup" / "fold1_evaluate.csv"
    shuffled = list(np.random.default_rng(2).permutation(test_files))
    listed.write_text("\n".join(["filename", *shuffled]) + "\n")
    rows = rows_for_test(meta)[::-1] if order == "rows" else None
    files = {"list": shuffled, "meta.csv": list(meta.files), "rows": test_files[::-1]}[order]
    values = logits_of(files).softmax(1) if kind == "probabilities" else logits_of(files)
    path = tmp_path / f"a{suffix}"
    torch.save(values, path) if suffix == ".pt" else np.save(path, values.numpy())
    found = read_predictions(path, meta, rows)
    assert list(found.files) == (test_files[::-1] if rows is not None else test_files)
    torch.testing.assert_close(found.probabilities, logits_of(found.files).softmax(1), rtol=0, atol=1e-5)


def test_rows_that_know_nothing_are_warned_of(meta, tmp_path, caplog):
    rows = np.tile(rows_for_test(meta), 3)
    clips = Clips(meta, rows, None)
    wrong = np.roll(np.eye(10)[meta.scene[rows]], 1, axis=1)
    with caplog.at_level(logging.WARNING):
        _warn_of_chance(tmp_path, predictions_of(clips, torch.from_numpy(wrong)))
    assert "is right on 0.0% of the clips, chance is 10.0%" in caplog.text


P = np.full(10, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, p: (f[1:], p[1:]), "lacks 1 of 45 clips, first audio/bus-milan"),
        (lambda f, p: ([*f, "audio/x.wav"], [*p, P]), "holds audio/x.wav, which is not among the 45 clips"),
        (lambda f, p: ([*f, f[0].removeprefix("audio/")], [*p, P]), "more than once"),
        (lambda f, p: (f, [*p[:-1], 1.2 * P]), "add up to 1.2, not to 1 .1 clips in all"),
        (lambda f, p: (f, [*p[:-1], [-0.1, 0.3, *P[2:]]]), r"hold -0.1 \(1 clips in all"),
        (lambda f, p: (f, 3 * np.array(p)), "add up to 3, not to 1 .45 clips in all"),
        (lambda f, p: (f, [*p[:-1], [np.inf, *P[1:]]]), r"is no number \(1 in all"),
    ],
)
def test_tables_that_do_not_fit_are_refused(meta, test_files, tmp_path, change, message):
    files, probabilities = change(test_files, list(logits_of(test_files).softmax(1).numpy()))
    (tmp_path / "a.csv").write_text(table(files, probabilities))
    with pytest.raises(DataError, match=message) as error:
        read_predictions(tmp_path / "a.csv", meta)
    assert "a.csv" in str(error.value) and "\n" not in str(error.value)


def test_other_scenes_and_clips_of_training_are_refused(meta, test_files, tmp_path):
    own = table(test_files, logits_of(test_files).softmax(1))
    for text, message in [
        (own.replace("tram\n", "train\n", 1), "is for the scenes airport.*train; the data set has"),
        (own.replace("\tbus\t", "\ttrain\t", 1), "is for the scenes"),
        (own.splitlines()[0] + "\n", "floating-point numbers .clip, class. are needed"),
        ("nothing", "is a text file"),
        ("", "is empty"),
    ]:
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_predictions(tmp_path / "a.csv", meta)
    (tmp_path / "a.csv").write_text(table(meta.files, logits_of(meta.files).softmax(1)))
    with pytest.raises(DataError, match="which is not among the 45 clips"):
        read_predictions(tmp_path / "a.csv", meta)
    with pytest.raises(DataError, match=r"none\.csv is missing"):
        read_predictions(tmp_path / "none.csv", meta)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((44, 10)), "has 44 rows, .*fold1_evaluate.csv has 45 clips"),
        (np.zeros((45, 9)), "it holds 9 columns for the scenes"),
        (np.zeros((45, 10), int), "are needed, it holds a ndarray .45, 10. int64"),
        (np.zeros(45), "are needed"),
        (np.full((45, 10), np.nan), "is no number .45 in all"),
        (np.zeros((45, 10)), "add up to 0, not to 1"),
        (np.array([{}, {}]), "holds no array of numbers"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_arrays_that_do_not_fit_are_refused(meta, tmp_path, values, message, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    elif values.dtype == object:
        torch.save([1, 2], path)
        message = "are needed, it holds a list"
    else:
        torch.save(torch.from_numpy(values), path)
    with pytest.raises(DataError, match=message):
        read_predictions(path, meta)


def test_a_checkpoint_is_no_file_of_predictions(meta, tmp_path):
    torch.save({"model": {}, "scenes": list(SCENES)}, tmp_path / "last.pt")
    with pytest.raises(DataError, match=r"last.pt is no file of predictions: files is missing"):
        read_predictions(tmp_path / "last.pt", meta)


def test_systems_are_aligned_by_name(meta):
    rows = rows_for_test(meta)
    first = predictions_of(Clips(meta, rows, None), logits_of(meta.files[rows]))
    mixed = np.random.default_rng(3).permutation(rows)
    second = predictions_of(Clips(meta, mixed, None), logits_of(meta.files[mixed]))
    assert (second.aligned_to(first).logits == first.logits).all()
    groups = {"all": meta.recording_devices}
    assert score(second.clips, second.logits, groups) == pytest.approx(score(first.clips, first.logits, groups))
    same = differences(first.clips, first.logits, second.aligned_to(first).logits, groups, n_rounds=20)
    assert (same["loss"].value, same["loss"].p) == (0, 1)
    assert set(intervals(first.clips, first.logits, groups, n_rounds=20)) >= {"acc", "acc/all"}
    less = predictions_of(Clips(meta, rows[1:], None), logits_of(meta.files[rows[1:]]))
    for one, other in ((less, first), (first, less)):
        with pytest.raises(DataError, match=f"not answer the same clips .1 differ, first {meta.files[rows[0]]}"):
            one.aligned_to(other)


def test_answers_that_do_not_fit_their_clips_are_refused(meta):
    clips = Clips(meta, rows_for_test(meta), None)
    with pytest.raises(ValueError, match=r"logits \(44, 10\) do not fit 45 files and 10 scenes"):
        predictions_of(clips, torch.zeros(44, 10))
    broken = torch.zeros(45, 10)
    broken[3, 2] = torch.nan
    with pytest.raises(DataError, match=f"the answer for {clips.files[3]} is not finite .1 clips"):
        predictions_of(clips, broken)
    assert len(Predictions(clips.files, torch.zeros(45, 10), SCENES)) == 45
