"""The README as its readers use it: every command is run in its order, on a small data set, and the Python is executed.

Small options are added at the end of a command, where they count; what would be downloaded is stood in for.
"""

import importlib
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import torch
from torch.distributed.run import get_args_parser

import run_dataset
import run_search
from helpers import teachers
from helpers.recipes import add_recipe_options
from helpers.submission.about import template
from helpers.submission.rules import RULES
from models import get_model
from models.published import TEACHERS
from tests.conftest import write_nothing
from tests.golden_inputs import fill_state
from tests.test_beats_checkpoint import checkpoint_of
from tests.test_benchmarks import SMALLEST
from tests.test_teacher_training import DATA, SMALL, SMALL_BEATS, make_project, work_in

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# Run by whoever runs the tests, or by a test of their own.
ELSEWHERE = {"python3 -m venv", ".venv/bin/python -m pip", ".venv/bin/ruff check", "make test", "make pipeline"}
RUN = {
    "run_evaluation": "student",
    "run_training": "student",
    "run_qat": "student",
    "run_device_training": "student",
    "run_submission": "student",
}  # what <id> stands for; for the teachers' scripts: resnet, passt
STUDENT = [*SMALL["cp_resnet"][len(DATA) + 2 : -2], "--dataset", "tau22"]
NO_DIR = [word for word in DATA if word not in ("--dir_prob", "0")]
SMALL_MEL = ["--window_size", "256", "--hop_size", "125", "--n_fft", "512", "--n_mels", "64"]
SMALL_RECIPES = {
    "beats_ssl_star": NO_DIR,
    "dcase25_baseline": [*NO_DIR, *SMALL_MEL, "--subset", "100", "--base_channels", "8", "--freqm", "8", "--roll",
                         "400"],
}  # fmt: skip
PREVIEW = ["--dataset", "tau22", "--dataset_dir", "tau", "--cache_path", "cache"]
SMALLER = {
    "run_training": [*DATA, *STUDENT],
    "run_qat": [*DATA[:-8], "--dir_prob", "0", "--batch_size", "8", "--n_epochs", "1", "--freeze_params_epochs", "1",
                "--calibration_clips", "8", "--freqm", "8"],
    "run_device_training": [*DATA[:-8], "--subset", "100", "--batch_size", "3", "--n_epochs", "1", "--devices", "a",
                            "--freqm", "8", "--roll", "400"],
    "run_export": ["--latency_rounds", "0", "--n_clips", "8", "--clips", "tau/audio", "--precision", "fp32",
                   "--inputs", "waveform"],
    "run_teacher_logits": ["--dataset", "tau22", "--dataset_dir", "tau", "--cache_path", "cache", "--batch_size", "8"],
    "run_evaluation": ["--dataset_dir", "tau", "--cache_path", "cache", "--mel_width", "9", "--time_width", "9",
                       "--n_rounds", "9"],
    "run_teacher_validation": ["--logger", "none", "--dataset_dir", "tau", "--cache_path", "cache"],
    "run_submission": ["--dataset_dir", "tau", "--n_clips", "2"],
}  # fmt: skip


def blocks(language: str) -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [content for name, content in fenced if name == language]


def commands(block: str) -> list[list[str]]:
    """The words of every command, with shell variables put in."""
    found, variables = [], {}
    for line in block.splitlines():
        if named := re.fullmatch(r'([A-Z]+)="(.*)"', line):
            variables[named[1]] = named[2]
        elif line.split(" ")[0] in ("python", "python3", ".venv/bin/python", ".venv/bin/ruff", "torchrun", "make"):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            found.append(shlex.split(line, comments=True))
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("readme"))


@pytest.fixture
def here(project, tmp_path, monkeypatch) -> Path:
    """The working folder of `work_in`, with stand-ins for what a reader has or downloads."""
    folder = work_in(tmp_path, project, monkeypatch)
    monkeypatch.setenv("TAU22_DIR", "tau")
    shutil.copy("DCASE23_Task1/passt/checkpoints/last.pt", "weights.pt")
    torch.save(checkpoint_of(fill_state(get_model("beats", **SMALL_BEATS))), "BEATs_iter3_plus_AS2M.pt")
    Path("DCASE23_Task1/cpjku2023/checkpoints").mkdir(parents=True)
    state = {f"model.{name}": value for name, value in fill_state(get_model("cp_mobile")).state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "1.9.4"},
               "DCASE23_Task1/cpjku2023/checkpoints/epoch=149-step=81900.ckpt")  # fmt: skip
    Path("recordings").mkdir()
    for file in ("recording.wav", "recordings/a.wav"):
        soundfile.write(file, 0.1 * torch.randn(50000, generator=torch.Generator().manual_seed(0)).numpy(), 44100)
    for year in (24, 25):
        Path(f"eval{year}/evaluation_setup").mkdir(parents=True)
        Path(f"eval{year}/audio").mkdir()
        Path(f"eval{year}/evaluation_setup/fold1_test.csv").write_text(
            "filename\tdevice_id\naudio/0.wav\ta\naudio/1.wav\tunknown\n"
        )
        for i, path in enumerate(sorted(Path("tau/audio").iterdir())[:2]):
            shutil.copy(path, f"eval{year}/audio/{i}.wav")
    for seed, name in enumerate(TEACHERS):  # all small: what counts here is the command
        torch.manual_seed(seed)
        torch.save(get_model("cp_resnet").state_dict(), f"{name}.pt")
    monkeypatch.setattr(teachers, "published_file", lambda name: folder / f"{name}.pt")
    monkeypatch.setattr("run_qat.write_onnx", write_nothing)
    return folder


def run(script: str, options: list[str]) -> None:
    """Runs one command in this process, made small."""
    ids = iter(
        [*[RUN[script]] * (5 if script == "run_submission" else 1), "resnet"] if script in RUN else ["resnet", "passt"]
    )
    options = [re.sub("<id>", lambda _: next(ids), word) for word in options]
    options = [word.replace("DCASE23_Task1/resnet", "DCASE23_Task1/student") for word in options]
    options = [word.replace("passt_", "cpr_128k_") if word in TEACHERS else word for word in options]
    if script == "run_dataset":
        if options[0] in ("download", "cut", "convert"):  # have tests of their own, with what they need
            run_dataset.make_parser().parse_args(options)
            return
        smaller = {"cache": ["--cache_path", "cache"], "preview": PREVIEW}.get(options[0], [])
        smaller = [*smaller, "--augment", "time_roll"] if "--config" in options else smaller
        options = [str(ROOT / word) if word.startswith("recipes/") else word for word in options]
        assert run_dataset.main([*options, *smaller]) in (None, 0, 1)
        return
    smaller = SMALLER.get(script, [])
    if script == "run_submission":
        year = int(options[options.index("--year") + 1])
        Path("about.yaml").write_text(template(RULES[year]).replace('"..."', "words"))
        options = options[: [*options, ">"].index(">")]  # a file takes what is printed
    if script == "run_search":  # has tests of its own, with processes
        parser = run_search.make_parser()
        add_recipe_options(parser)
        parser.parse_args(options)
        return
    if script == "run_training" and "--config" in options:
        name = Path(options[options.index("--config") + 1]).stem
        options = [str(ROOT / word) if word.startswith("recipes/") else word for word in options]
        smaller = SMALL_RECIPES.get(name) or SMALL[name]
        smaller = [word for i, word in enumerate(smaller) if "--config" not in smaller[max(0, i - 1) : i + 1]]
        smaller += ["--dataset", "tau22"]
    if script == "run_training" and "--model" in options:
        smaller = [*NO_DIR, *SMALL_MEL, "--dataset", "tau22", "--base_channels", "8", "--roll", "400"]
    if "--val_fraction" in options:
        smaller = [*smaller, "--val_fraction", "0.4"]
    if "--resume" in options:
        smaller = ["--n_epochs", "2"]
    result = importlib.import_module(script).main([*options, *smaller])
    assert not isinstance(result, int) or result == 0


def test_there_are_commands():
    assert sum(len(commands(block)) for block in blocks("")) >= 30


WITH_COMMANDS = [block for block in blocks("") if commands(block)]


@pytest.mark.parametrize("block", WITH_COMMANDS, ids=[block.split("\n")[0][:40] for block in WITH_COMMANDS])
def test_every_command_runs(here, block):
    for words in commands(block):
        if " ".join(words[:3]).startswith(tuple(ELSEWHERE)):
            continue
        if words[0] == "make":
            listed = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
            (words,) = (shlex.split(line) for line in listed.stdout.splitlines() if " run_" in line)
        if words[0] == "torchrun":  # test_distributed.py starts several processes
            started = get_args_parser().parse_args(words[1:])
            words = ["python", started.training_script, *started.training_script_args]
        path = Path(words[1])
        assert (ROOT / path).is_file(), words
        if path.parent.name == "benchmarks":
            n_threads = torch.get_num_threads()
            runpy.run_path(str(ROOT / path))["main"]([*words[2:], *(SMALLEST | {"run": ["--tables"]})[path.stem]])
            torch.set_num_threads(n_threads)
        else:
            run(path.stem, words[2:])


def test_its_python_does_what_it_says(here, monkeypatch):
    with_file, with_model = blocks("python")
    checkpoint = "DCASE23_Task1/student/checkpoints/last.pt"
    importlib.import_module("run_export").main(["--checkpoint", checkpoint, "--out_dir", ".", *SMALLER["run_export"]])
    # The small data set has a rate of 8 kHz, and its student is not quantized.
    exec(with_file.replace("32000", "8000").replace("int8", "fp32"), {})
    names: dict = {}
    exec(with_model.replace("<id>", "student"), names)
    assert names["logits"].shape == (1, 10)
