import shutil

import numpy as np
import pytest
import soundfile

import run_dataset
import run_training
from datasets.doctor import check
from datasets.tau import follows, hold_out_recordings, read_meta, segment_order
from datasets.tau import test_rows as rows_for_test
from datasets.tau import train_rows as rows_for_training
from tests.test_run_dataset import outcome

SCENES = ("Bus", "Cafe", "Car", "CrowdedIndoor", "Elevator", "Kitchen", "Park", "ResidentialArea", "Restaurant",
          "Restroom", "Street", "Subway", "SubwayStation")  # fmt: skip
RATE = 8000
USERS = {"Train": ("user0419", "user0802", "user0003"), "Val": ("user0100",), "Test": ("user0500",)}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """CochlScene's own layout: Train/Bus/Bus_user0419_14867701_002.wav, ten seconds each."""
    root = tmp_path_factory.mktemp("original") / "CochlScene"
    for part, users in USERS.items():
        for i, scene in enumerate(SCENES):
            user = users[i % len(users)]
            for piece in range(2 if i == 0 else 1):
                path = root / part / scene / f"{scene}_{user}_{14867701 + i}_{piece:03}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                samples = np.random.default_rng([i, piece, len(part)]).uniform(-0.5, 0.5, 10 * RATE)
                soundfile.write(path, samples, RATE, subtype="PCM_16")
    return root


@pytest.fixture
def cochlscene(original, tmp_path):
    return shutil.copytree(original, tmp_path / "CochlScene")


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "cochlscene"
    assert run_dataset.main(["convert", "--dataset_dir", str(original.parent), "--out", str(out)]) == 0
    return out


def test_it_becomes_a_data_set_with_its_own_scenes(original, converted):
    meta = read_meta(converted)
    assert meta.scenes == SCENES
    assert meta.recording_devices == ("phone",)
    assert (len(meta), len(rows_for_training(meta)), len(rows_for_test(meta))) == (420, 140, 140)
    assert meta.files[10] == "audio/Bus-cochlscene-user0419-14867701_001-0-phone.wav"
    first = original / "Train" / "Bus" / "Bus_user0419_14867701_001.wav"
    joined = [soundfile.read(converted / file, dtype="int16")[0] for file in meta.files[10:20]]
    assert np.array_equal(np.concatenate(joined), soundfile.read(first, dtype="int16")[0])
    assert "Creative Commons Attribution-ShareAlike 3.0" in (converted / "README.md").read_text()
    assert check(converted, progress=False)[1] == []


def test_parts_are_those_of_its_folders(converted):
    meta = read_meta(converted)
    users = {part: {file.split("-")[2] for file in meta.files[rows(meta)]}
             for part, rows in (("Train", rows_for_training), ("Test", rows_for_test))}  # fmt: skip
    assert users == {part: set(USERS[part]) for part in users}
    validation = (converted / "evaluation_setup" / "fold1_validate.csv").read_text().splitlines()
    assert len(validation) == 141 and "-user0100-" in validation[1]


def test_held_out_recordings_are_of_whole_users(converted):
    meta = read_meta(converted)
    assert meta.recordings_by == "the column recording of meta.csv"
    kept, held = hold_out_recordings(meta, rows_for_training(meta), 0.34, seed=0)
    users = [{file.split("-")[2] for file in meta.files[rows]} for rows in (kept, held)]
    assert len(users[1]) == 1 and not users[0] & users[1]


def test_windows_stay_within_a_file(converted):
    """Whether the files of a recording follow each other without a gap is not told."""
    meta = read_meta(converted)
    ordered = meta.files[segment_order(meta.files)]
    starts = [file for file, is_next in zip(ordered, follows(ordered), strict=True) if not is_next]
    assert len(starts) == 42 and all("-0-phone" in file for file in starts)


def test_networks_train_on_its_thirteen_scenes(converted, tmp_path):
    options = ["--dataset_dir", str(converted), "--cache_path", str(tmp_path / "cache"), "--resample_rate", "8000"]
    options += ["--n_fft", "256", "--window_size", "256", "--hop_size", "128", "--n_mels", "40", "--freqm", "8"]
    options += ["--base_channels", "8", "--channels_multiplier", "1.5", "--expansion_rate", "1.5", "--dir_prob", "0"]
    options += ["--project_name", str(tmp_path / "runs"), "--logger", "none", "--n_epochs", "1", "--batch_size", "64"]
    metrics = run_training.main([*options, "--val_fraction", "0.34"])
    assert {f"test/acc/scene/{scene}" for scene in SCENES} <= metrics.keys()


def test_other_lengths_keep_their_whole_seconds(cochlscene, tmp_path, caplog):
    path = cochlscene / "Train" / "Bus" / "Bus_user0419_14867701_000.wav"
    soundfile.write(path, soundfile.read(path)[0][: 8 * RATE + 100], RATE, subtype="PCM_16")
    longer = cochlscene / "Test" / "Cafe" / "Cafe_user0500_14867702_000.wav"
    soundfile.write(longer, np.tile(soundfile.read(longer)[0], 2), RATE, subtype="PCM_16")
    short = cochlscene / "Val" / "Cafe" / "Cafe_user0100_14867702_000.wav"
    soundfile.write(short, soundfile.read(short)[0][: RATE // 2], RATE, subtype="PCM_16")
    out = tmp_path / "out"
    assert run_dataset.main(["convert", "--dataset_dir", str(cochlscene), "--out", str(out)]) == 0
    assert "3 files are not ten seconds long" in caplog.text
    assert len(read_meta(out)) == 408
    assert check(out, progress=False)[1] == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "Val"), "Val is missing: name the extracted CochlScene"),
        (lambda root: (root / "Test/Car/Bus_user1_2_3.wav").write_bytes(b""), "is not named <Scene>_user<user>"),
        (lambda root: (root / "Test/Car/Car_user1_2_3.wav").write_bytes(b"?"), "cannot be read as audio"),
        (lambda root: [shutil.rmtree(root / "Val"), (root / "Val").mkdir()], "holds no <Scene>/*.wav"),
    ],
)
def test_what_does_not_fit_is_one_line(cochlscene, tmp_path, monkeypatch, capsys, damage, message):
    damage(cochlscene)
    assert outcome(["convert", "--dataset_dir", cochlscene, "--out", tmp_path / "out"], monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
