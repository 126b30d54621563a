"""The numbers in docs/reliability.md are those of the campaign's run."""

from __future__ import annotations

import json

from faults import results


def test_the_page_has_the_numbers_of_the_run() -> None:
    text, page = results.RESULTS.read_text(), results.PAGE.read_text()
    assert results.with_table(page, text) == page, "PYTHONPATH=tests python -m faults.results writes them"
    total = json.loads(text)["total"]
    assert 0 < total["tried"] == total["survived"]
