"""The checks of submissions beside the verdicts of the organisers' format checker."""

import copy
import json

from helpers.submission.check import check_meta, check_table
from helpers.submission.rules import RULES

GOLDEN = "golden/dcase_baselines/validator_2024.json"


def test_tables_are_judged_as_by_the_organisers(shared, tmp_path):
    cases = json.loads(shared(GOLDEN).read_text())["output_cases"]
    path = tmp_path / "x.csv"
    for name, case in cases.items():
        path.write_text(case["csv"])
        found = check_table(path, 10)
        wanted = case["errors"]
        assert len(found.problems) == wanted if wanted >= 0 else found.problems, name
        assert bool(found.notes) == (name in ("probability_nan", "label_not_the_argmax")), name


def edited(meta: dict, path: str, value=None) -> dict:
    """A copy with the entry at a path set, or removed where no value is given."""
    meta = copy.deepcopy(meta)
    *above, last = path.split(".")
    block = meta
    for key in above:
        block = block[key]
    if value is None:
        del block[last]
    else:
        block[last] = value
    return meta


def test_meta_information_is_judged_as_by_the_organisers(shared):
    golden = json.loads(shared(GOLDEN).read_text())
    meta = golden["meta_example"]
    author = meta["submission"]["authors"][0]
    development = "results.development_dataset"
    cases = {
        "valid": meta,
        "abbreviation_over_10_characters": edited(meta, "submission.abbreviation", "ELEVENCHARS"),
        "two_corresponding_authors": edited(meta, "submission.authors", [author, author]),
        "no_corresponding_author": edited(meta, "submission.authors", [author | {"corresponding": False}]),
        "label_with_three_parts": edited(meta, "submission.label", "Golden_TEAM_task1"),
        "label_of_task2": edited(meta, "submission.label", "Golden_TEAM_task2_1"),
        "split_50_block_missing": edited(meta, f"{development}.split_50"),
        "device_missing_inside_split_5": edited(meta, f"{development}.split_5.device_wise.s6"),
        "macs_missing": edited(meta, "system.complexity.macs"),
        "total_parameters_text": edited(meta, "system.complexity.total_parameters", "61148"),
        "no_external_datasets": edited(meta, "system.external_datasets", []),
        "split_adaptations_missing": edited(meta, "system.description.split_adaptations"),
    }
    assert cases.keys() == golden["meta_cases"].keys()
    for name, case in cases.items():
        found = check_meta(case, RULES[2024])
        assert len(found.problems) == golden["meta_cases"][name], name
        assert bool(found.notes) == (name == "device_missing_inside_split_5"), name
