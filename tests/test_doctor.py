import shutil

import numpy as np
import pytest
import soundfile

from datasets.doctor import check
from datasets.tau import DataError, read_meta


def problems(root, **options) -> dict[str, list[str]]:
    return {finding.problem: finding.files for finding in check(root, progress=False, **options)[1]}


def test_a_sound_data_set_has_no_findings(tau):
    counts, findings = check(tau.root, progress=False)
    assert findings == []
    assert counts.splitlines()[1].split() == ["all", "72"]
    assert [line.split() for line in counts.splitlines() if line.startswith("s4 ")] == [["s4", "9", "0", "9"]]


def test_every_kind_of_damage_is_found_with_its_file(tau):
    files = read_meta(tau.root).files
    paths = [tau.root / file for file in files[:8]]
    paths[0].unlink()
    paths[1].write_bytes(b"not audio")
    soundfile.write(paths[2], np.zeros(44100), 44100, subtype="PCM_24")
    shutil.copy(paths[4], paths[3])
    soundfile.write(paths[5], soundfile.read(paths[5])[0][:48000], 48000, subtype="PCM_24")
    soundfile.write(paths[6], soundfile.read(paths[6])[0][:22050], 44100, subtype="PCM_24")
    shutil.copy(paths[7], tau.root / "audio" / "extra.wav")
    found = problems(tau.root)
    assert found.pop("listed clip has no file") == [files[0]]
    assert found.pop("file cannot be read as audio") == [files[1]]
    assert found.pop("clip is silent") == [files[2]]
    assert found.pop("clips hold the same samples") == [" = ".join(sorted(files[3:5]))]
    assert found.pop("another rate: 44100 samples at 48000 Hz instead of 44100 samples at 44100 Hz") == [files[5]]
    assert found.pop("another length: 22050 samples at 44100 Hz instead of 44100 samples at 44100 Hz") == [files[6]]
    assert found.pop("audio file that meta.csv does not list") == ["audio/extra.wav"]
    assert found == {}


def test_labels_that_contradict_the_file_name_are_found(tau):
    path = tau.root / "meta.csv"
    path.write_text(path.read_text().replace("\tbus\t", "\ttram\t", 1))
    assert list(problems(tau.root)) == ["labels in meta.csv do not agree with the file name"]


def test_a_missing_list_is_found(tau):
    (tau.root / "evaluation_setup" / "fold1_train.csv").unlink()
    assert any("fold1_train.csv is missing" in problem for problem in problems(tau.root, quick=True))


def test_a_clip_in_both_parts_is_found(tau):
    setup = tau.root / "evaluation_setup"
    shutil.copy(setup / "fold1_train.csv", setup / "fold1_evaluate.csv")
    assert len(problems(tau.root, quick=True)["clip in both the training and the test part"]) == 27


def test_a_part_of_tau22_is_compared_with_the_published_counts(tau, tmp_path):
    root = tmp_path / "TAU-urban-acoustic-scenes-2022-mobile-development"
    tau.root.rename(root)
    counts, findings = check(root, progress=False)
    assert counts.splitlines()[1].split() == ["all", "72", "230,350"]
    assert "training part has 27 clips, published are 139,620" in {finding.problem for finding in findings}


def test_a_folder_without_meta_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"meta\.csv is missing"):
        check(tmp_path)


def as_float(path, change) -> None:
    samples, rate = soundfile.read(path, dtype="float32")
    soundfile.write(path, change(samples), rate, subtype="FLOAT")


def test_float_files_are_read_as_floats(tau):
    for file in read_meta(tau.root).files:
        as_float(tau.root / file, lambda x: 0.4 * x)
    assert problems(tau.root) == {}


def test_samples_that_no_recording_holds_are_reported(tau):
    files = read_meta(tau.root).files

    def with_nan(x):
        x[7] = np.nan
        return x

    as_float(tau.root / files[0], with_nan)
    as_float(tau.root / files[1], lambda x: 32768 * x)
    (found,) = problems(tau.root).values()
    found = {file: message for message in found for file in files if file in message}
    assert found.keys() == {files[0], files[1]}
    assert "NaN or infinite" in found[files[0]]
    assert "where 1 is full scale" in found[files[1]]


def test_other_formats_than_wav_are_read(tau):
    meta = tau.root / "meta.csv"
    for path in sorted((tau.root / "audio").glob("*.wav")):
        samples, rate = soundfile.read(path)
        soundfile.write(path.with_suffix(".flac"), samples, rate, subtype="PCM_24")
        path.unlink()
    for table in (meta, *(tau.root / "evaluation_setup").glob("*.csv")):
        table.write_text(table.read_text().replace(".wav", ".flac"))
    (tau.root / "audio" / "._bus.flac").write_bytes(b"what a Mac leaves")
    assert problems(tau.root) == problems(tau.root, quick=True) == {}
    (tau.root / "audio" / "more.flac").write_bytes(b"")
    assert problems(tau.root)["audio file that meta.csv does not list"] == ["audio/more.flac"]
