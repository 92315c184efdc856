from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from datasets.tau import (
    CITIES,
    RECORDING_DEVICES,
    SCENES,
    ClipName,
    DataError,
    Meta,
    device_groups,
    hold_out_recordings,
    parse_clip_name,
    read_meta,
    recording_key,
    segment_order,
)
from datasets.tau import test_rows as rows_for_test
from datasets.tau import train_rows as rows_for_training


def test_index_matches_the_published_loader(golden, tmp_path):
    data = golden("dataset_index")
    (tmp_path / "evaluation_setup").mkdir()
    (tmp_path / "meta.csv").write_text(data["meta_csv"])
    (tmp_path / "evaluation_setup" / "fold1_train.csv").write_text(data["fold1_train_csv"])
    (tmp_path / "evaluation_setup" / "fold1_evaluate.csv").write_text(data["fold1_evaluate_csv"])
    meta = read_meta(tmp_path)
    for part, rows in (("train", rows_for_training(meta)), ("test", rows_for_test(meta))):
        assert rows.tolist() == data[f"{part}_meta_rows"]
        assert meta.files[rows].tolist() == data[f"{part}_files"]
        assert meta.scene[rows].tolist() == data[f"{part}_labels"]
        assert meta.recording_device[rows].tolist() == data[f"{part}_devices"]
        assert meta.city[rows].tolist() == data[f"{part}_cities"]


@pytest.fixture(scope="module")
def full_size(shared, tmp_path_factory) -> Meta:
    """The real list of files, without audio."""
    tmp_path = tmp_path_factory.mktemp("tau22")
    index = pd.read_csv(shared("audio/tau22_index.csv.gz"))
    place = index.filename.str.extract(r"-(\w+-[^-]+)-[^-]+-\d-")[0]
    meta = pd.DataFrame(
        {
            "filename": index.filename,
            "scene_label": index.scene_label,
            "identifier": place,
            "source_label": index.device,
        }
    )
    meta.to_csv(tmp_path / "meta.csv", sep="\t", index=False)
    (tmp_path / "evaluation_setup").mkdir()
    for fold, name in (("train", "fold1_train"), ("test", "fold1_evaluate")):
        index[index.fold == fold][["filename"]].to_csv(
            tmp_path / "evaluation_setup" / f"{name}.csv", sep="\t", index=False
        )
    return read_meta(tmp_path)


@pytest.mark.slow
def test_the_real_list_has_the_published_counts(full_size):
    train, test = rows_for_training(full_size), rows_for_test(full_size)
    assert (len(full_size), len(train), len(test)) == (230_350, 139_620, 29_680)
    assert full_size.is_tau22
    assert (full_size.scenes, full_size.recording_devices, full_size.cities) == (SCENES, RECORDING_DEVICES, CITIES)
    in_train = np.bincount(full_size.recording_device[train], minlength=9)
    assert in_train.tolist() == [102_150, 7_490, 7_480, 7_500, 7_500, 7_500, 0, 0, 0]
    assert device_groups(full_size, train)["unseen"] == ("s4", "s5", "s6")


@pytest.mark.slow
def test_ten_segments_lie_side_by_side_in_the_real_list(full_size):
    ordered = full_size.files[segment_order(full_size.files)]
    names = [parse_clip_name(file) for file in ordered]
    assert sorted(ordered) == sorted(full_size.files)
    for a, b in pairwise(names):
        if b.segment > 0:  # not every recording has all ten
            assert a == ClipName(b.scene, b.city, b.location, b.recording, a.segment, b.recording_device)
            assert a.segment < b.segment


@pytest.mark.slow
def test_held_out_recordings_are_whole_and_on_all_devices(full_size):
    rows = rows_for_training(full_size)
    kept, held = hold_out_recordings(full_size, rows, 0.1, seed=3)
    assert sorted([*kept, *held]) == rows.tolist()
    assert len(held) / len(rows) == pytest.approx(0.1, abs=0.02)
    assert not {recording_key(f) for f in full_size.files[kept]} & {recording_key(f) for f in full_size.files[held]}
    again = hold_out_recordings(full_size, rows, 0.1, seed=3)[1]
    other = hold_out_recordings(full_size, rows, 0.1, seed=4)[1]
    assert np.array_equal(held, again)
    assert not np.array_equal(held, other)


def test_fitting_labels_keep_the_published_order(tau):
    meta = read_meta(tau.root)
    assert meta.scenes == SCENES
    assert set(meta.scene) == {SCENES.index(name) for name in ("bus", "park", "tram")}
    assert not meta.is_tau22


def test_other_labels_come_from_the_data_set(own_tau):
    meta = read_meta(own_tau.root)
    assert meta.scenes == ("kitchen", "office", "yard")
    assert meta.recording_devices == ("phone", "webcam")
    assert device_groups(meta, rows_for_training(meta)) == {"seen": ("phone",), "unseen": ("webcam",)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("source_label", "device"), "source_label"),
        (lambda text: "\n".join(text.splitlines()[:2] + text.splitlines()[1:2]) + "\n", "more than once"),
        (lambda text: text.splitlines()[0] + "\n", "no clips"),
        (lambda text: "", "no tab-separated table"),
        (lambda text: text.replace("\tbus\t", "\t\t", 1), "scene_label is empty"),
        (lambda text: text.replace("\t", ","), "lacks the column"),
    ],
)
def test_a_broken_meta_is_one_clear_error(tau, change, message):
    path = tau.root / "meta.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        read_meta(tau.root)


def test_a_split_with_an_unknown_clip_is_an_error(tau):
    with open(tau.root / "evaluation_setup" / "fold1_evaluate.csv", "a") as file:
        file.write("audio/none-such.wav\n")
    with pytest.raises(DataError, match="audio/none-such"):
        rows_for_test(read_meta(tau.root))


def test_a_missing_data_set_names_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"--dataset_dir.*run_dataset.py download"):
        read_meta(tmp_path)


def write_meta(root, rows: list[tuple[str, str, str, str]]) -> None:
    lines = ["filename\tscene_label\tidentifier\tsource_label", *("\t".join(row) for row in rows)]
    (root / "meta.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_recordings_of_older_editions_are_held_out_on_all_devices(tmp_path):
    """TAU 2019 and 2020 name scene, city, location, segment and device; the devices recorded together."""
    rows = [
        (f"audio/bus-lyon-{place}-{segment}-{device}.wav", "bus", f"lyon-{place}", device)
        for place in range(5) for segment in range(4) for device in ("a", "b", "s1")
    ]  # fmt: skip
    write_meta(tmp_path, rows)
    meta = read_meta(tmp_path)
    assert meta.recordings_by == "the file names, up to segment and device"
    assert len(set(meta.recording)) == 20
    kept, held = hold_out_recordings(meta, np.arange(len(meta)), 0.25, seed=0)
    assert len(held) == 15
    assert not {meta.files[i].rsplit("-", 1)[0] for i in kept} & {meta.files[i].rsplit("-", 1)[0] for i in held}


def test_recordings_under_other_names_are_told_by_the_identifier(tmp_path):
    rows = [(f"clips/{i:04}.flac", "bus", f"paris-{i // 5}", "phone") for i in range(30)]
    write_meta(tmp_path, rows)
    meta = read_meta(tmp_path)
    assert meta.recordings_by == "the column identifier of meta.csv"
    assert len(set(meta.recording)) == 6
    rows.append(("audio/bus-lyon-1-2-0-a.wav", "bus", "lyon-1", "a"))
    write_meta(tmp_path, rows)
    assert "the column identifier for 30 clips with other names" in read_meta(tmp_path).recordings_by


@pytest.mark.slow
def test_the_recordings_of_tau22_are_what_they_were(full_size):
    assert full_size.recording.tolist() == [recording_key(file) for file in full_size.files]


def test_blanks_make_no_new_classes(tmp_path, caplog):
    write_meta(tmp_path, [("audio/1.wav", "bus ", "lyon-1", "a"), ("audio/2.wav", " bus", "lyon-1", "a ")])
    meta = read_meta(tmp_path)
    assert meta.scenes == SCENES and set(meta.scene) == {SCENES.index("bus")}
    assert set(meta.recording_device) == {0}
    assert "blanks around 2 values of scene_label" in caplog.text
    assert "blanks around 1 values of source_label" in caplog.text


@pytest.mark.parametrize("name", ["../x.wav", "audio/../../x.wav", "/etc/x.wav", "C:\\x.wav", "..\\x.wav", "a\x00.wav"])
def test_clips_outside_of_the_folder_are_refused(tmp_path, name):
    write_meta(tmp_path, [("audio/..wav", "bus", "lyon-1", "a"), (name, "bus", "lyon-1", "a")])
    with pytest.raises(DataError, match=r"line 3: .* does not lie in the data set's folder"):
        read_meta(tmp_path)


def test_a_mark_of_the_encoding_is_no_part_of_a_column(tmp_path):
    write_meta(tmp_path, [("audio/1.wav", "bus", "lyon-1", "a")])
    text = (tmp_path / "meta.csv").read_text()
    (tmp_path / "meta.csv").write_text(text, encoding="utf-8-sig")
    assert len(read_meta(tmp_path)) == 1


@pytest.mark.parametrize("segment", ["\u00b2", "\u0663", "-1", "1.5", "9" * 30])
def test_a_segment_is_a_plain_number(segment):
    assert parse_clip_name(f"audio/bus-lyon-1-2-{segment}-a.wav") is None
