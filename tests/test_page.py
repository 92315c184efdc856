"""The page of an evaluation: what is on it, that it needs nothing else, and how a browser shows it."""

import base64
import html
import io
import re
import shutil
import subprocess
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.cache import open_store
from datasets.tau import RECORDING_DEVICES, SCENES, Meta, read_meta
from datasets.tau import test_rows as rows_for_test
from datasets.waveforms import Clips
from helpers.complexity import measure
from helpers.data import Data
from helpers.evaluate.scoring import compare
from helpers.report.page import Page, render, write_page
from helpers.report.sections import Cell, Entry, Grid, Section, published_scores
from models import get_frontend, get_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<script>alert("x")</script> & {{ 7 * 7 }}'
# Appended to a copy of the page: what a visitor would trip over, for the window that it is opened in.
PROBE = """<script>
const odd = [];
window.onerror = message => odd.push("error: " + message);
window.onload = () => {
  if (document.documentElement.scrollWidth > window.innerWidth) odd.push("wider than the window");
  for (const img of document.images) if (!img.complete || !img.naturalWidth) odd.push("broken picture: " + img.alt);
  for (const one of document.querySelectorAll("audio")) one.load();
  setTimeout(() => {
    for (const one of document.querySelectorAll("audio")) if (one.error) odd.push("broken sound");
    document.title = "checked " + window.innerWidth + " " + JSON.stringify(odd);
  }, 300);
};
</script>"""


def part(tau, tmp_path: Path) -> Data:
    meta = read_meta(tau.root)
    store, rows = open_store(meta, 8000, tmp_path / "cache", progress=False), rows_for_test(meta)
    groups = {"seen": ("a", "b", "s1"), "unseen": ("s4", "s5")}
    return Data(meta, store, Clips(meta, rows, store), None, Clips(meta, rows, store), groups)


def logits(data: Data, seed: int) -> torch.Tensor:
    noise = torch.randn(len(data.test), len(data.meta.scenes), generator=torch.Generator().manual_seed(seed))
    return noise + 2 * torch.nn.functional.one_hot(data.test.scene, len(data.meta.scenes))


@pytest.fixture
def page(tau, tmp_path) -> Path:
    """A page about three systems, two of which differ in their seed; names are what an attacker would choose."""
    data = part(tau, tmp_path)
    model, frontend = (
        get_model("cp_mobile", base_channels=8),
        get_frontend("cp_mel", sample_rate=8000, n_mels=32).eval(),
    )
    cost = measure(model, (1, 32, 16)), "int8"
    history = [{"epoch": i, "train/loss": 2.0 - i, "train/lr": 0.1, "test/acc": 0.1 * i} for i in range(2)]
    options = {"lr": 0.1, "note": EVIL}
    entries = {
        "first": Entry(logits(data, 0), options | {"seed": 0}, cost, history),
        "second": Entry(logits(data, 1), options | {"seed": 1}, cost),
        EVIL: Entry(logits(data, 2)),
    }
    compared = compare(data, {name: entry.logits for name, entry in entries.items()}, 100)
    command = ["run_evaluation.py", "--model", "a b"]
    (tmp_path / "out").mkdir()
    return write_page(tmp_path / "out", data, entries, f"Evaluation of {EVIL}", compared=compared, log_mel=frontend,
                      command=command, note="generated")  # fmt: skip


@pytest.mark.plots
def test_it_needs_nothing_else_and_takes_names_for_text(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and html.escape(EVIL, quote=False).split("&quot;")[0][:20] in text
    assert all(target.startswith("data:") for target in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert not re.search(r"url\(|@import|https?://", text)
    assert page.stat().st_size < 3_000_000
    pictures = {path.name for path in page.parent.glob("*.png")}
    assert {
        "confusion_matrix.png",
        "confusion_matrix_3.png",
        "devices.png",
        "reliability.png",
        "curves.png",
    } <= pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.glob("*.png"))
    for title in ("Scores", "Scenes", "Recording devices", "Scenes and devices", "Confusions", "Sureness", "Complexity",
                  "Learning curves", "Hardest clips", "How to repeat it"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert "first, second" in text and "python run_evaluation.py --model &#39;a b&#39;" in text
    assert "generated" in text


@pytest.mark.plots
def test_clips_can_be_heard(page):
    sounds = re.findall(r'data:audio/wav;base64,([^"]*)', page.read_text(encoding="utf-8"))
    assert 1 <= len(sounds) <= 8
    with wave.open(io.BytesIO(base64.b64decode(sounds[0]))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 1, 8000)
        samples = np.frombuffer(file.readframes(8000), "<i2")
    assert abs(samples).max() >= 32766


@pytest.mark.plots
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize(("width", "scheme"), [(360, 0), (820, 1), (1600, 0)])
def test_a_browser_shows_all_of_it(page, tmp_path, width, scheme):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    # A frame of its own width: windows are at least 500 pixels wide.
    frame = tmp_path / "frame.html"
    told = "setTimeout(() => document.title = this.contentDocument.title, 1500)"
    frame.write_text(f'<body style="margin:0"><iframe src="probed.html" width="{width}" height="900" onload="{told}">')
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1700,1000",
        "--virtual-time-budget=5000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f"<title>checked {width} []</title>" in done.stdout, done.stdout[:400]
    assert "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.plots
def test_published_numbers_stand_beside_those_of_the_same_split(tau, tmp_path, monkeypatch):
    data = part(tau, tmp_path)
    monkeypatch.setattr(Meta, "is_tau22", property(lambda _: True))
    entry = Entry(logits(data, 0), {"subset": 25})
    text = write_page(tmp_path, data, {"x": entry}, "x").read_text(encoding="utf-8")
    assert "baseline 2024, published %" in text and "baseline 2025, by device, published %" in text
    assert "50.29 ± 0.87" in text and "61.19" in text and "56.99" not in text
    text = write_page(tmp_path, data, {"x": replace(entry, options={})}, "x").read_text(encoding="utf-8")
    assert "56.99 ± 1.11" in text and "50.29" not in text
    monkeypatch.undo()
    assert "published" not in write_page(tmp_path, data, {"x": entry}, "x").read_text(encoding="utf-8")


def test_published_numbers_add_up():
    for one in published_scores()["systems"]:
        assert len(one["class"]) == len(SCENES) and len(one["device"]) == len(RECORDING_DEVICES)
        assert np.mean(one["class"]) == pytest.approx(one["macro"], abs=0.02)
        assert np.mean(one["device"]) == pytest.approx(one["macro"], abs=0.1)


def test_a_page_without_anything_is_a_page():
    grid = Grid("", ["a", "b"], [["x", Cell("1")]])
    text = render(Page("t", "", "", [], [Section("s", tables=[grid])]))
    assert "<h2>s</h2>" in text and "<td>1</td>" in text
