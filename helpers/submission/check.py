"""What the organisers' format checkers look for in a submission, and what they overlook.

`problems` are what they refuse, one for each count of theirs (where they crash, one problem says what is wrong).
`notes` are what passes them and is wrong all the same: probabilities that are no numbers or do not add up, labels that
are not the most probable scene.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from datasets.tau import RECORDING_DEVICES, SCENES
from helpers.complexity import MAX_MACS, MAX_PARAMETER_BYTES
from helpers.submission.rules import COLUMNS, MAX_SYSTEMS, PROBED_DEVICES, Rules

LABEL = re.compile(r"[^\W_]+_[^\W_]+_task1")
SYSTEM_LABEL = re.compile(rf"{LABEL.pattern}_[1-{MAX_SYSTEMS}]")
MAX_ABBREVIATION = 10  # characters
LINES_NAMED = 5  # of a table with many problems
ROUNDING = 4e-3  # by which probabilities of half precision may miss a sum of 1


@dataclass
class Findings:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Findings") -> "Findings":
        self.problems += other.problems
        self.notes += other.notes
        return self

    def under(self, where: object) -> "Findings":
        """The same, each line beginning with where it was found."""
        return Findings(*([f"{where}: {line}" for line in lines] for lines in (self.problems, self.notes)))

    def lines(self) -> Iterator[str]:
        """For people; what repeats is shortened."""
        for kind, found in (("problem", self.problems), ("note", self.notes)):
            yield from (f"{kind}: {line}" for line in found[:LINES_NAMED])
            if len(found) > LINES_NAMED:
                yield f"{kind}s in all: {len(found)}"


def check_table(path: Path, n_clips: int) -> Findings:
    """Checks a table of answers.

    Args:
        n_clips: of the evaluation set, which are called `0.wav` and so on.
    """
    found = Findings()
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            header = next(reader, [])
            if missing := [name for name in COLUMNS if name not in header]:
                hint = "; tabs must part them" if len(header) < 2 else ""
                found.problems.append(f"the columns {', '.join(missing)} are missing{hint}")
                return found
            place = [header.index(name) for name in COLUMNS]
            _check_rows(reader, place, len(header), n_clips, found)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found.problems.append(f"cannot be read: {getattr(error, 'strerror', None) or error}")
    return found


def _check_rows(rows: Iterator[list[str]], place: list[int], width: int, n_clips: int, found: Findings) -> None:
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        if len(row) != width:
            found.problems.append(f"line {number} has {len(row)} fields, the header has {width}")
            continue
        file, label, *texts = (row[i] for i in place)
        name = file.rpartition("/")[2]
        stem, _, suffix = name.rpartition(".")
        if name in seen:
            found.problems.append(f"line {number}: {name} comes more than once")
        seen.add(name)
        if suffix != "wav":
            found.problems.append(f"line {number}: {name} does not end in .wav")
        elif not stem.isascii() or not stem.isdecimal() or int(stem) >= n_clips:
            found.problems.append(f"line {number}: {name} is none of 0.wav .. {n_clips - 1}.wav")
        if label not in SCENES:
            found.problems.append(f"line {number}: {label!r} is no scene")
        try:
            values = [float(text) for text in texts]
        except ValueError as error:
            found.problems.append(f"line {number}: a probability is no number ({error})")
            continue
        if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > ROUNDING:
            found.notes.append(f"line {number}: the probabilities add up to {sum(values):.4g}, not to 1")
        elif label in SCENES and values[SCENES.index(label)] < max(values):
            found.notes.append(f"line {number}: {label} is not the most probable scene")
    if len(seen) != n_clips:
        found.problems.append(f"{len(seen):,} different clips, the evaluation set has {n_clips:,}")


def check_meta(meta: Any, rules: Rules, label: str | None = None) -> Findings:
    """Checks meta information, as it comes out of its YAML file.

    Args:
        label: that the file's name tells; None does not compare.
    """
    found = Findings()

    def need(block: Any, name: str, keys: tuple[str, ...]) -> bool:
        if not isinstance(block, Mapping):
            found.problems.append(f"{name} is missing")
            return False
        missing = [key for key in keys if key not in block]
        found.problems.extend(f"{name}.{key} is missing" for key in missing)
        return True

    if not isinstance(meta, Mapping):
        return Findings(["it holds no blocks by name"])
    submission, system = meta.get("submission"), meta.get("system")
    if need(submission, "submission", ("label", "name", "abbreviation", "authors")):
        _check_submission(submission, label, found)
    if need(system, "system", ("description", "complexity", "source_code")):
        if "description" in system:
            need(system["description"], "system.description", rules.description)
        if "complexity" in system and need(system["complexity"], "system.complexity", rules.complexity):
            n_parameters = system["complexity"].get("total_parameters", 0)
            if type(n_parameters) is not int:
                found.problems.append(f"system.complexity.total_parameters is no whole number: {n_parameters!r}")
        if rules.has_energy:
            need(system.get("energy_consumption"), "system.energy_consumption",
                 ("training", "inference", "baseline_inference"))  # fmt: skip
        others = system.get("external_datasets") or []
        for i, one in enumerate(others if isinstance(others, list) else [others]):
            need(one, f"system.external_datasets[{i}]", ("name", "url", "total_audio_length"))
    results = meta.get("results")
    scores = results.get("development_dataset") if isinstance(results, Mapping) else None
    if need(scores, "results.development_dataset", rules.blocks):
        blocks = {name: scores[name] for name in rules.blocks if name in scores} if rules.blocks else {"": scores}
        for name, block in blocks.items():
            _note_scores(block, f"results.development_dataset.{name}".rstrip("."), found)
    return found


def _check_submission(submission: Mapping[str, Any], label: str | None, found: Findings) -> None:
    if "label" in submission:
        own = str(submission["label"])
        if not SYSTEM_LABEL.fullmatch(own):
            found.problems.append(f"submission.label {own} is not <Lastname>_<Institute>_task1_<1..{MAX_SYSTEMS}>")
        elif label is not None and own != label:
            found.problems.append(f"submission.label {own} stands in the file of {label}")
    if len(str(submission.get("abbreviation", ""))) > MAX_ABBREVIATION:
        found.problems.append(f"submission.abbreviation has more than {MAX_ABBREVIATION} characters")
    if "authors" not in submission:
        return
    authors = submission["authors"] if isinstance(submission["authors"], list) else []
    for i, author in enumerate(authors):
        missing = [key for key in ("lastname", "firstname", "email", "affiliation") if not _get(author, key)]
        found.problems.extend(f"submission.authors[{i}].{key} is missing" for key in missing)
    n_corresponding = sum(bool(_get(author, "corresponding")) for author in authors)
    if n_corresponding != 1:
        found.problems.append(f"{n_corresponding} authors are corresponding, it must be one")


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _note_scores(block: Any, where: str, found: Findings) -> None:
    """The checkers do not look inside."""
    wanted = [("overall",), *(("class_wise", scene) for scene in SCENES)]
    wanted += [("device_wise", device) for device in RECORDING_DEVICES]
    for path in wanted:
        value = block
        for key in path:
            value = _get(value, key)
        if _get(value, "accuracy") is None or _get(value, "logloss") is None:
            found.notes.append(f"{where}.{'.'.join(path)} has no accuracy and logloss")


def read_meta_file(path: Path) -> Any:
    """What is in a YAML file of meta information; a text that says why where nothing can be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"


def check_complexity(path: Path) -> Findings:
    """Checks complexity.json of 2025: all devices are there, and every network is inside the limits."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        by_device = {name: (one["MACs"], one["Params"]) for name, one in content["per_device"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Findings([f"cannot be read: {error}"])
    found = Findings([f"device {name} is missing" for name in PROBED_DEVICES if name not in by_device])
    for name, (macs, n_bytes) in by_device.items():
        if macs > MAX_MACS or n_bytes > MAX_PARAMETER_BYTES:
            found.problems.append(f"device {name}: {macs:,} MACs and {n_bytes:,} bytes, limits {MAX_MACS:,} and "
                                  f"{MAX_PARAMETER_BYTES:,}")  # fmt: skip
    return found


def check_submission(folder: Path, rules: Rules, n_clips: int | None = None) -> Findings:
    """Checks a folder as `run_submission.py` writes it, or the unpacked one of somebody else.

    Args:
        n_clips: of the evaluation set; None: the official one.
    """
    n_clips = rules.n_clips if n_clips is None else n_clips
    return (_check_package if rules.by_device else _check_task1)(folder, rules, n_clips)


def _check_task1(folder: Path, rules: Rules, n_clips: int) -> Findings:
    found = Findings()
    task = folder / "task1"
    systems = sorted(path for path in task.iterdir() if path.is_dir()) if task.is_dir() else []
    if not systems:
        return Findings([f"{task} holds no folder of a system"])
    if len(systems) > MAX_SYSTEMS:
        found.problems.append(f"{len(systems)} systems, at most {MAX_SYSTEMS} can be handed in")
    for system in systems:
        label = system.name
        if not SYSTEM_LABEL.fullmatch(label):
            found.problems.append(f"{label} is not <Lastname>_<Institute>_task1_<1..{MAX_SYSTEMS}>")
        outputs = [folder / path for path in rules.outputs(label).values()]
        meta = system / f"{label}.meta.yaml"
        for path in outputs:
            found += check_table(path, n_clips).under(path.name)
        found += check_meta(read_meta_file(meta), rules, label).under(meta.name)
        others = [path for path in sorted(system.iterdir()) if path.suffix != ".pdf" and path not in (*outputs, meta)]
        found.problems += [f"{system.name}/{path.name} belongs to no submission" for path in others]
    return found


def _check_package(folder: Path, rules: Rules, n_clips: int) -> Findings:
    found = Findings()
    packages = [path.parent for path in folder.glob("*/*/__init__.py") if LABEL.fullmatch(path.parent.name)]
    if len(packages) != 1:
        return Findings([f"{folder} holds {len(packages)} packages called <Lastname>_<Institute>_task1, not one"])
    (package,) = packages
    modules = [package / f"{package.name}_{i}.py" for i in range(1, MAX_SYSTEMS + 1)]
    modules = [path for path in modules if path.is_file()]
    if not modules:
        found.problems.append(f"{package.name} has no module {package.name}_1")
    for part in ("ckpts/__init__.py", "resources/__init__.py", "resources/dummy.wav", "resources/test.csv"):
        if not (package / part).is_file():
            found.problems.append(f"{package.name} has no {part}")
    for module in modules:
        written = folder / "predictions" / module.stem
        found += check_complexity(written / "complexity.json").under(f"{module.stem}/complexity.json")
        found += check_table(written / "output.csv", n_clips).under(f"{module.stem}/output.csv")
        meta = written / f"{module.stem}.meta.yaml"
        if meta.is_file():
            found += check_meta(read_meta_file(meta), rules, module.stem).under(meta.name)
    return found
