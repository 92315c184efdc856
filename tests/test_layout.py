"""Who may import whom; the folders' own names must not be shadowed either."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.nn.functional as F

from helpers.augment import AUGMENTATIONS
from helpers.losses import LOSSES
from models import FRONTENDS, MODELS

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models", "helpers.errors"},
    "datasets": {"datasets", "helpers.errors"},  # which imports nothing: one kind of error for all
    "helpers": {"helpers", "datasets", "models"},
    "benchmarks": {"helpers", "datasets", "models", "benchmarks"},
}
HANDED_IN = ROOT / "helpers/submission/template"  # goes as it is into a package without us


def files_of(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if HANDED_IN not in path.parents)


FILES = [path for folder in MAY_IMPORT for path in files_of(folder)]
SUBMODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
OURS = {*MAY_IMPORT, *(path.stem for path in ROOT.glob("run_*.py"))}


def imported(path: Path, inside_functions: bool = True) -> set[str]:
    """Modules that a file imports, by their full names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner if inner <= SUBMODULES else inner | {node.module}
    return names


def is_below(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def modules() -> dict[str, Path]:
    """Our modules by their full names."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_they_may(folder):
    files = files_of(folder)
    assert files
    for path in files:
        ours = {name for name in imported(path) if is_below(name, OURS)}
        others = {name for name in ours if not is_below(name, MAY_IMPORT[folder])}
        assert others <= {"helpers"}, path  # of `from helpers.errors import ...`


def test_no_module_needs_itself():
    """Follows what each module imports when it is imported."""
    ours = modules()
    needs = {name: imported(path, inside_functions=False) & ours.keys() for name, path in ours.items()}

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " needs ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(needs[name]):
                walk(other, (*above, name))
            done.add(name)

    done: set[str] = set()
    for name in ours:
        walk(name, ())


# The parts by kind: their table, and where they may be named beside their own file, which is their table's and more.
PARTS = {
    "network": (MODELS, ("models/__init__.py", "models/published.py")),
    "front end": (FRONTENDS, ("models/",)),  # a network names the one that it takes by default
    "augmentation": (AUGMENTATIONS, ("helpers/augment/__init__.py",)),
    "loss": (LOSSES, ("helpers/losses/__init__.py",)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_no_part_is_named_outside_its_file_and_table(kind):
    """In code, that is: names and strings that are no documentation."""
    table, places = PARTS[kind]
    words = {path.relative_to(ROOT).as_posix(): set(words_of_code(path)) for path in [*FILES, *ROOT.glob("run_*.py")]}
    for name, (config, cls) in table.items():
        own = cls.__module__.replace(".", "/") + ".py"
        names = {config.__name__, cls.__name__, cls.__module__}
        if re.search("[_0-9]", name) and not hasattr(F, name):  # else it is a word, or PyTorch's
            names.add(name)
        for path, found in words.items():
            builds_on_it = cls.__module__ in found and Path(path).parent == Path(own).parent
            if not (path == own or path.startswith((*places, "benchmarks/")) or builds_on_it):
                assert not names & found, path


def words_of_code(path: Path) -> Iterator[str]:
    """Names of a file, and its strings but for docstrings and messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
            yield node.value


def test_no_script_imports_another():
    for path in ROOT.glob("run_*.py"):
        assert not {name for name in imported(path) if name.startswith("run_")}, path


def test_torchaudio_imports_beside_this_torch():
    import torchaudio

    assert torchaudio.compliance.kaldi.fbank is not None
