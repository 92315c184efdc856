"""The command line itself: forms of on/off options, absurd numbers, devices, streams that close, interruptions."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch

import run_dataset
import run_device_training
import run_evaluation
import run_export
import run_qat
import run_teacher_logits
import run_teacher_validation
import run_training
from datasets.files import ContentError
from helpers import cli
from helpers.augment import AUGMENTATIONS
from helpers.data import DataConfig
from helpers.errors import UserError
from helpers.losses import LOSSES
from helpers.machine import Machine
from helpers.parts import Parts
from helpers.schedule import SCHEDULES
from models import FRONTENDS, MODELS
from models.bounds import bounded_fields

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CONFIGS = [config for table in (MODELS, FRONTENDS, LOSSES, AUGMENTATIONS) for config, _ in table.values()]
CONFIGS += [*SCHEDULES.values(), DataConfig]


def outcome(arguments: list[str], capsys) -> str:
    """The one line with which run_training.py refuses these arguments."""
    with pytest.raises(SystemExit) as ended:
        run_training.main(["--dry_run", "--logger", "none", *arguments])
    assert ended.value.code == cli.USAGE_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = cli.Parser()
    parser.add_argument("--on", action=cli.OnOff, default=True, help="h")
    parser.add_argument("--off", action=cli.OnOff, help="h")
    parser.add_argument("--n", type=cli.number(int, 1), default=3)
    parser.add_argument("--names", nargs="+", choices=["a", "b"], default=["a"])
    return parser


@pytest.mark.parametrize(
    ("arguments", "on", "off"),
    [
        ([], True, False),
        (["--no-on", "--off"], False, True),
        (["--on=False", "--off=True"], False, True),
        (["--on=true", "--off=false"], True, False),
        (["--on", "False", "--off", "1"], False, True),
        (["--on", "--no-off"], True, False),
    ],
)
def test_on_and_off_are_written_in_every_common_way(parser, arguments, on, off):
    args = parser.parse_args(arguments)
    assert (args.on, args.off) == (on, off)
    assert cli.given_options(parser, arguments) == ({"on", "off"} if arguments else set())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on=Tru"], "is True or False, got 'Tru'"),
        (["--no-on=True"], "takes no value, got 'True'"),
        (["--on="], "is empty"),
    ],
)
def test_another_word_for_on_is_refused(parser, capsys, arguments, message):
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_help_shows_each_on_off_option_once(parser):
    assert "--[no-]on [True|False]" in parser.format_help()


def test_every_on_off_option_of_every_script_takes_both_forms():
    (commands,) = (action for action in run_dataset.make_parser()._actions if action.dest == "command")
    parsers = [*commands.choices.values(), *(run_training.make_parser(Parts(model=name)) for name in MODELS)]
    scripts = (
        run_evaluation,
        run_training,
        run_qat,
        run_device_training,
        run_export,
        run_teacher_logits,
        run_teacher_validation,
    )
    parsers += [script.make_parser() for script in scripts]
    actions = [action for parser in parsers for action in parser._actions if action.dest != "help"]
    flags = [action for action in actions if action.nargs == 0 or isinstance(action.default, bool)]
    assert len(flags) > 20 and all(isinstance(action, cli.OnOff) for action in flags)


def test_a_flag_that_a_sweep_left_out_is_not_taken_for_on(tmp_path, monkeypatch, capsys):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("wandb_version: 1\nchannels_last:\n  value: false\nlr:\n  value: 0.001\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(sweep))
    assert "the sweep turned channels_last off" in outcome(["--lr", "0.001"], capsys)
    run_training.main(["--dry_run", "--logger", "none", "--lr=0.001", "--channels_last=False"])


def test_a_sweep_file_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep.yaml").write_text("a: [1")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "sweep.yaml"))
    assert "sweep.yaml, which is no YAML" in outcome([], capsys)


def test_every_number_of_every_part_has_bounds():
    for config in CONFIGS:
        hints = get_type_hints(config, include_extras=True)
        numbers = {
            field.name
            for field in fields(config)
            if get_origin(hints[field.name]) is Annotated
            and {int, float} & {get_args(hints[field.name])[0], *get_args(get_args(hints[field.name])[0])}
        }
        assert {name for name, _, _ in bounded_fields(config)} == numbers


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_numbers_that_no_one_means_are_refused_before_anything_is_built(config):
    for name, kind, bounds in bounded_fields(config):
        wrong = [float("nan"), float("inf"), -float("inf"), 10**40, True, "1"]
        wrong += [0.5] if kind is int else []
        wrong += [bounds.low if bounds.above else bounds.low - 1]
        for value in wrong:
            with pytest.raises(ValueError, match=name):
                config(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "must be >= 0 and <= 4294967295, got -1"),
        (["--seed", "99999999999999999999"], "must be >= 0 and <= 4294967295"),
        (["--lr", "inf"], "must be > 0 and <= 1000000, got inf"),
        (["--lr", "nan"], "must be > 0 and <= 1000000, got nan"),
        (["--batch_size", "1e400"], "'1e400' is no whole number"),
        (["--batch_size", "10000000000000"], "must be >= 1 and <= 1000000"),
        (["--resample_rate", "1000000000000"], "sample_rate must be at most 1,000,000"),
        (["--in_channels", "2"], "log_mel must be (batch, 2, mel, time), got (1, 1, 256, 64)"),
        (["--base_channels", "16000", "--expansion_rate", "90"], "channels: lower base_channels, channels_multiplier"),
        (["--project_name", "a\0b"], "holds a NUL character"),
        (["--hop_size", "1"], "hop_length must be >= 16 at 32000 Hz"),
        (["--torch_device", "meta"], "only CPUs and CUDA GPUs"),
        (["--torch_device", "mps"], "only CPUs and CUDA GPUs"),
        (["--torch_device", "xpu:3"], "only CPUs and CUDA GPUs"),
        (["--torch_device", "gpu"], "no such device"),
    ],
)
def test_what_no_one_means_is_one_line(capsys, arguments, message):
    assert message in outcome(arguments, capsys)


def test_compile_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"--compile needs a compiler, g\+\+ or clang\+\+ was not found"):
        Machine().compile(torch.nn.Identity())


@pytest.mark.parametrize(
    "saved", [{"on": 1}, {"n": "3"}, {"n": 0}, {"n": True}, {"n": 2.5}, {"names": "a"}, {"names": ["c"]}, {"n": [3]}]
)
def test_saved_options_that_the_parser_would_refuse_are_named(parser, saved):
    with pytest.raises(ContentError, match=next(iter(saved))):
        cli.check_saved(parser, saved)


def test_the_parsers_own_defaults_are_saved_options(parser):
    for any_parser in (parser, run_training.make_parser(), run_qat.make_parser()):
        cli.check_saved(any_parser, vars(any_parser.parse_args([])))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # what `run` puts in their place goes with the test
    monkeypatch.setattr(sys, "stderr", sys.stderr)

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == cli.USAGE_ERROR
    assert capsys.readouterr().err.startswith("error: out of memory: a smaller --batch_size")


def shell(command: str) -> subprocess.CompletedProcess:
    """The outcome of a shell command in which `run` is python run_training.py."""
    command = f'run() {{ {shlex.join([sys.executable, str(ROOT / "run_training.py")])} "$@"; }}; {command}'
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)


def test_a_reader_that_leaves_does_not_end_the_program():
    done = shell("set -o pipefail; run --dry_run --logger none | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_closed_streams_are_no_traceback(tmp_path):
    done = shell(f"run --dry_run --logger none --seed -1 2>&- >&-; echo $? > {shlex.quote(str(tmp_path))}/status")
    assert (tmp_path / "status").read_text() == "2\n"
    assert done.stderr == ""


def test_an_interruption_of_the_imports_is_one_word():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / "run_training.py"), "--dry_run"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    seen = []
    for line in process.stderr:  # as soon as the long ones begin
        seen.append(line)
        if "helpers.start" in line:
            process.send_signal(signal.SIGINT)
            break
    seen += process.stderr.readlines()
    lines = [line for line in seen if not line.startswith("import time:")]
    assert lines == ["interrupted\n"]
    assert process.wait() in (130, -signal.SIGINT)


def test_idle_threads_sleep_unless_the_user_chose(tmp_path):
    show = "import os, helpers.start; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    bare = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for own, expected in (({}, "None 1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")):
        done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, env=bare | own, capture_output=True, text=True)
        assert done.stdout.strip() == expected
