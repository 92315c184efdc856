"""What a finished run shows in TensorBoard and W&B, read back from their own files; and runs fetched from there."""

import json
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets.tau import read_meta
from helpers.checkpoints.checkpoint import CheckpointError
from helpers.data import DataConfig, load_data
from helpers.metrics import score
from helpers.report.results import results_of
from helpers.runs import wandb_logger
from helpers.runs.backend import Results
from helpers.runs.folder import source_checkpoint
from helpers.runs.logger import RunLogger
from helpers.teachers import find_teacher

pytestmark = pytest.mark.slow


@pytest.fixture
def results(own_tau, tmp_path) -> Results:
    """Of answers to a small data set, with a figure and a checkpoint."""
    import matplotlib.image

    data = load_data(DataConfig(dataset_dir=str(own_tau.root), cache_path=str(tmp_path / "cache")), 8000, seed=0)
    logits = torch.randn(len(data.test), 3, generator=torch.Generator().manual_seed(0))
    matplotlib.image.imsave(tmp_path / "bars.png", np.random.default_rng(0).random((6, 9, 3)))
    (tmp_path / "last.pt").write_bytes(b"weights")
    metrics = {f"test/{key}": value for key, value in score(data.test, logits, data.groups).items()}
    return results_of(data, logits, metrics, tmp_path, [tmp_path / "last.pt"])


def test_tables_say_what_the_scores_are(results, own_tau):
    table = results.tables["recording_devices"]
    assert table.columns == ["device", "accuracy", "log loss", "clips"]
    for name, accuracy, loss, count in table.rows:
        assert accuracy == results.metrics[f"test/acc/device/{name}"]
        assert (loss, count) == (
            results.metrics[f"test/loss/device/{name}"],
            results.metrics[f"test/count/device/{name}"],
        )
    assert [row[0] for row in results.tables["scenes"].rows] == ["kitchen", "office", "yard"]
    cells = results.tables["scenes_by_device"]
    assert cells.columns == ["scene", *read_meta(own_tau.root).recording_devices] and len(cells.rows) == 3
    recordings = {sound.name.rsplit("-", 2)[0] for sound in results.sounds}
    assert len(results.sounds) == len(recordings) == 3 and results.sounds[0].samples.shape == (8000,)


def test_tensorboard_has_scalars_hparams_figures_and_sounds(results, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    options = {"lr": 0.1, "model": "cp_mobile", "augment": ["time_roll"], "teacher_logits": None}
    with RunLogger(str(tmp_path / "project"), "abcd1234", options, ["tensorboard"]) as run:
        run.write(0, {"test/acc": 0.5})
        run.write(1, {"test/acc": 0.6})
        run.show(results)
    events = EventAccumulator(str(run.dir / "tensorboard"), size_guidance={"images": 0, "audio": 0}).Reload()
    assert [event.value for event in events.Scalars("test/acc")] == [0.5, pytest.approx(0.6)]
    (picture,) = events.Images("figures/bars")
    assert (picture.step, picture.width, picture.height) == (1, 9, 6)
    (sound,) = events.Audio(f"clips/{results.sounds[0].name}")
    assert sound.sample_rate == 8000 and sound.encoded_audio_string[:4] == b"RIFF"
    (table,) = events.Tensors("scenes/text_summary")
    assert b"| kitchen | " in table.tensor_proto.string_val[0]
    (caption,) = events.Tensors(f"clips/{results.sounds[0].name}/text_summary")
    assert results.sounds[0].caption.encode() in caption.tensor_proto.string_val[0]
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    kept = metadata.parse_session_start_info_plugin_data(content).hparams
    assert kept["lr"].number_value == 0.1 and kept["augment"].string_value == "['time_roll']"
    assert "teacher_logits" not in kept
    listed = events.summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content
    named = {info.name.tag for info in metadata.parse_experiment_plugin_data(listed).metric_infos}
    assert {"test/acc", "test/acc/device/phone"} <= named
    assert [path.is_file() for path in (run.dir / "tensorboard").iterdir()] == [True]  # one run, not two


SCRIPT = """
import pickle, sys
from helpers.runs.logger import RunLogger
with RunLogger(sys.argv[1], "abcd1234", {"lr": 0.1}, experiment_name="exp") as run:
    run.write(0, {"test/acc": 0.5})
    run.show(pickle.load(open(sys.argv[2], "rb")))
"""
BLOCK = 32768  # W&B's files are records in blocks, as LevelDB's logs


def records_of(path: Path) -> list:
    """The records of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def test_wandb_has_tables_confusions_summary_and_checkpoints(results, tmp_path):
    import pickle

    (tmp_path / "results.pkl").write_bytes(pickle.dumps(results))
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "project"), str(tmp_path / "results.pkl")],
        env=kept | {"HOME": str(tmp_path / "home"), "PYTHONPATH": ".", "WANDB_MODE": "offline"},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1, done.stderr
    (folder,) = (tmp_path / "project/abcd1234/wandb").glob("offline-run-*-abcd1234")
    records = records_of(folder / "run-abcd1234.wandb")
    logged: dict = {}
    for item in (item for record in records for item in record.history.item):
        *above, last = item.nested_key or [item.key]
        block = logged
        for key in above:
            block = block.setdefault(key, {})
        block[last] = json.loads(item.value_json)
    for name in results.tables:
        table = json.loads((folder / "files" / logged[name]["path"]).read_text())
        assert table["columns"] == results.tables[name].columns and len(table["data"]) == len(results.tables[name].rows)
    assert (folder / "files" / logged["figures/bars"]["path"]).read_bytes()[:4] == b"\x89PNG"
    assert logged["clips"]["captions"] == [sound.caption for sound in results.sounds]
    (confusion,) = [path for name, path in logged.items() if name.startswith("confusion") and "path" in path]
    cells = json.loads((folder / "files" / confusion["path"]).read_text())
    assert sum(row[-1] for row in cells["data"]) == len(results.targets)
    summary = {"/".join(item.nested_key) or item.key: item.value_json for r in records for item in r.summary.update}
    assert float(summary["test/macro_avg_acc"]) == pytest.approx(results.metrics["test/macro_avg_acc"])
    (artifact,) = [record.artifact for record in records if record.artifact.type == "model"]
    assert artifact.name == "checkpoints-abcd1234" and artifact.type == "model"
    assert [entry.path for entry in artifact.manifest.contents] == ["last.pt"]


class FakeApi:
    """W&B's server with the checkpoints of one run."""

    asked: list[str]

    def __init__(self, known: str):
        self.known, self.asked = known, []

    def artifact(self, name: str, type: str):
        self.asked.append(name)
        assert type == "model"
        if name != self.known:
            raise ValueError(f"artifact {name} not found\nmore")
        return SimpleNamespace(download=lambda root: Path(root, "last.pt").write_bytes(b"theirs"))


@pytest.fixture
def online(monkeypatch, tmp_path, caplog):
    """A working folder on another machine than the run's, with an account."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "helpers.runs.wandb_logger")
    api = FakeApi("project/checkpoints-abcd1234:latest")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda timeout: api, Error=RuntimeError))
    monkeypatch.setattr(wandb_logger, "_wandb_mode", lambda wandb: ("online", ""))
    return api


def test_a_run_of_another_machine_is_fetched_once(online, caplog):
    path, published = source_checkpoint("project", "abcd1234", None)
    assert path == Path("project/abcd1234/checkpoints/last.pt") and path.read_bytes() == b"theirs" and published is None
    assert "W&B: checkpoints of abcd1234 are in" in caplog.text
    assert find_teacher("abcd1234", "project").path == path
    assert online.asked == ["project/checkpoints-abcd1234:latest"]


def test_what_is_not_there_is_said_in_one_line(online, caplog):
    with pytest.raises(CheckpointError, match="no run other"):
        source_checkpoint("project", "other", None)
    assert caplog.messages == ["W&B has no checkpoints of other (artifact project/checkpoints-other:latest not found)"]
    assert not Path("project").exists()


def test_nobody_is_asked_offline(online, monkeypatch):
    monkeypatch.setattr(wandb_logger, "_wandb_mode", lambda wandb: ("offline", "not logged in"))
    with pytest.raises(CheckpointError, match="no teacher abcd1234"):
        find_teacher("abcd1234", "project")
    assert online.asked == []
