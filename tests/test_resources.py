import hashlib
import io
import json
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from datasets.tau import SUBSETS, DataError
from helpers import data as data_module
from helpers.data import DataConfig, load_data
from helpers.fetch import resources
from helpers.fetch.download import DownloadError
from tests.http_server import FileServer, Served

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_impulse_responses_are_fetched_once_and_checked(shared, tmp_path):
    files = {
        f"/{path.name.replace('&', '%26')}": Served(path.read_bytes()) for path in shared("audio/dirs").glob("*.wav")
    }
    with FileServer(files) as server:
        folder = resources.micirp_folder(tmp_path / "dirs", server.url(""))
        assert len(list(folder.glob("*.wav"))) == 66
        n_requests = len(server.requests)
        resources.micirp_folder(tmp_path / "dirs", server.url(""))
        assert len(server.requests) == n_requests == 66
    (folder / "Doremi_.wav").write_bytes(b"another file")
    with pytest.raises(DownloadError, match=r"Doremi_\.wav"):
        resources.micirp_folder(tmp_path / "dirs", "http://127.0.0.1:9")


def test_swapped_teacher_logits_are_noticed(tmp_path):
    torch.save(torch.zeros(4, 10), tmp_path / "source.pt")
    with FileServer({"/logits.pt": Served((tmp_path / "source.pt").read_bytes())}) as server:
        path = resources.teacher_logits_file(tmp_path / "r", server.url("/logits.pt"))
        assert resources.teacher_logits_file(tmp_path / "r", server.url("/logits.pt")) == path
        assert len(server.requests) == 1
        torch.save(torch.ones(4, 10), path)
        with pytest.raises(DownloadError, match=r"ensemble_logits\.pt"):
            resources.teacher_logits_file(tmp_path / "r", server.url("/logits.pt"))


PAGE = b'{"message": "not found", "status": 404}'


def passt_weights(folder: Path, url: str) -> Path:
    return resources.pretrained_file("passt", f"{url}/passt-s.pt", folder)


@pytest.mark.parametrize(
    "find, name, good",
    [
        (resources.teacher_logits_file, "ensemble_logits.pt", None),
        (
            lambda folder, url: resources.subset_file(5, folder, url),
            "split5.csv",
            b"filename\tscene_label\na.wav\tbus\n",
        ),
        (passt_weights, "passt-s*.pt", None),
    ],
    ids=["logits", "split", "passt"],
)
def test_an_error_page_is_never_recorded(tmp_path, find, name, good):
    folder = tmp_path / "r"
    served = Served(PAGE, content_type="text/plain")
    with FileServer({"*": served}) as server:
        with pytest.raises(DownloadError, match="not the file that is published there") as caught:
            find(folder, server.url("/x"))
        assert "weights_only" not in str(caught.value) and list(folder.iterdir()) == []
        folder.mkdir(exist_ok=True)
        served.content_type = "application/json"
        with pytest.raises(DownloadError, match="JSON message instead of"):
            find(folder, server.url("/x"))
        assert list(folder.iterdir()) == []
        if good is not None:
            served.content, served.content_type = good, "text/csv"
            assert find(folder, server.url("/x")).match(name)
            assert (folder / "checksums.json").is_file()


@pytest.mark.parametrize(
    "find, place, option",
    [
        (resources.micirp_folder, "wav", "--dirs_path"),
        (resources.teacher_logits_file, "ensemble_logits.pt", "--teacher_logits"),
        (
            passt_weights,
            "passt-s",
            "--pretrained",
        ),
        (partial(resources.published_file, "c0a7nzin"), "c0a7nzin.ckpt", ""),
    ],
    ids=["responses", "logits", "passt", "student"],
)
def test_without_a_network_the_place_and_the_option_are_named(tmp_path, monkeypatch, find, place, option):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(DownloadError, match=f"may be put at {tmp_path}/.*{place}.*{option}"):
        find(tmp_path, "http://127.0.0.1:9")


def test_a_wrong_file_put_there_by_hand_is_named_and_kept(tmp_path):
    (tmp_path / "ensemble_logits.pt").write_bytes(PAGE)
    with pytest.raises(
        DownloadError, match=r"ensemble_logits\.pt is no file of teacher logits.*put the right file there"
    ):
        resources.teacher_logits_file(tmp_path, "http://127.0.0.1:9/x")
    assert [path.name for path in tmp_path.iterdir()] == ["ensemble_logits.pt"]


def test_two_processes_that_need_a_file_fetch_it_once(tmp_path, monkeypatch):
    """As the first processes of two machines do, at the same moment: the second waits."""
    content = io.BytesIO()
    torch.save(torch.zeros(4, 10), content)
    started = threading.Event()
    fetch = resources.fetch_recorded

    def slow(*arguments):
        started.set()
        time.sleep(0.2)
        return fetch(*arguments)

    monkeypatch.setattr(resources, "fetch_recorded", slow)
    with FileServer({"/l.pt": Served(content.getvalue())}) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(resources.teacher_logits_file, tmp_path / "r", server.url("/l.pt"))
        assert started.wait(10)
        second = pool.submit(resources.teacher_logits_file, tmp_path / "r", server.url("/l.pt"))
        assert first.result() == second.result()
        assert len(server.requests) == 1


def test_data_efficient_splits_have_the_published_sizes(shared, tmp_path, monkeypatch):
    """The real list at full size, without audio: the parts that `--subset` leaves."""
    index = pd.read_csv(shared("audio/tau22_index.csv.gz"))
    root = tmp_path / "tau22"
    (root / "evaluation_setup").mkdir(parents=True)
    place = index.filename.str.extract(r"-(\w+-[^-]+)-[^-]+-\d-")[0]
    columns = {
        "filename": index.filename,
        "scene_label": index.scene_label,
        "identifier": place,
        "source_label": index.device,
    }
    pd.DataFrame(columns).to_csv(root / "meta.csv", sep="\t", index=False)
    for fold, name in (("train", "fold1_train"), ("test", "fold1_evaluate")):
        index[index.fold == fold][["filename"]].to_csv(root / "evaluation_setup" / f"{name}.csv", sep="\t", index=False)
    published = json.loads(shared("golden/dcase_baselines/splits.json").read_text())
    for subset in SUBSETS[:-1]:
        split = index[index[f"in_split{subset}"]][["filename", "scene_label"]].sample(frac=1, random_state=0)
        split.to_csv(tmp_path / f"split{subset}.csv", sep="\t", index=False)

    class NoAudio:
        def rows(self, files):
            return np.arange(len(files))

    monkeypatch.setattr(data_module, "open_store", lambda *_, **__: NoAudio())
    monkeypatch.setattr(data_module, "read_meta", cache(data_module.read_meta))  # seconds
    monkeypatch.setattr(data_module, "subset_file", lambda subset: tmp_path / f"split{subset}.csv")
    for subset in SUBSETS:
        parts = load_data(DataConfig(dataset_dir=str(root), subset=subset), 32000, seed=0)
        for name, clips in ((f"split{subset}", parts.train), ("test", parts.test)):
            wanted, meta = published[name], parts.meta
            assert len(clips) == wanted["items"]
            devices = Counter(meta.recording_devices[i] for i in meta.recording_device[clips.rows])
            scenes = Counter(meta.scenes[i] for i in meta.scene[clips.rows])
            assert (devices, scenes) == (wanted["per_device"], wanted["per_class"])
            digest = hashlib.sha256("\n".join(sorted(clips.files)).encode()).hexdigest()
            assert digest == wanted.get("sha256_of_sorted_filenames", digest)
    assert parts.groups["unseen"] == ("s4", "s5", "s6")


def test_clips_in_both_parts_are_refused(tau, tmp_path):
    setup = tau.root / "evaluation_setup"
    shutil.copy(setup / "fold1_train.csv", setup / "fold1_evaluate.csv")
    with pytest.raises(DataError, match="27 clips are in the training and in the test part"):
        load_data(DataConfig(dataset_dir=str(tau.root), cache_path=str(tmp_path)), 8000, seed=0)


def test_another_data_set_has_subsets_where_it_has_lists(tau, tmp_path):
    def load(subset: int):
        config = DataConfig(dataset_dir=str(tau.root), cache_path=str(tmp_path / "cache"), subset=subset)
        return load_data(config, 8000, seed=0)

    with pytest.raises(DataError, match=r"--subset 5 names a list of TAU22's clips; .*tau is another data set"):
        load(5)
    files = load(100).train.files[:4].tolist()
    (tau.root / "evaluation_setup/split10.csv").write_text("\n".join(["filename", *files]) + "\n")
    assert load(10).train.files.tolist() == files
