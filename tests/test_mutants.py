"""The mutants of ``make mutants`` can still be put into the code; whether the tests find them is found out there."""

from __future__ import annotations

import ast
import json
from collections import Counter

from helpers.paths import ROOT
from mutants.catalogue import RESULTS, load


def test_every_mutant_still_applies_and_names_its_tests() -> None:
    mutants = load()
    repeated = [name for name, count in Counter(m.id for m in mutants).items() if count > 1]
    assert not repeated
    for mutant in mutants:
        text = (ROOT / mutant.file).read_text()
        mutated = mutant.applied_to(text)
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text)), f"{mutant.id} changes nothing"
        assert mutant.bug and mutant.tests, mutant.id
        for test in mutant.tests:
            file, _, name = test.partition("::")
            place = ROOT / file
            assert place.is_dir() or f"def {name}(" in place.read_text() or not name, f"{mutant.id}: no {test}"


def test_the_results_are_those_of_these_mutants() -> None:
    """After a change of the list: ``make mutants ONLY=ID``."""
    found = json.loads(RESULTS.read_text())
    assert list(found) == [mutant.id for mutant in load()]
    killed = sum(result["outcome"].startswith("killed") for result in found.values())
    assert f"{killed} of {len(found)}" in (ROOT / "CONTRIBUTING.md").read_text()
