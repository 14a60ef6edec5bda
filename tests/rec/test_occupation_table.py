"""The page on MovieLens 100k by occupation shows the results it names."""

import json

import pytest

import occupation_table


def test_the_page_shows_the_results():
    if not occupation_table.RESULTS.exists():
        assert "<!-- occupation -->" not in occupation_table.PAGE.read_text(encoding="utf-8")
        pytest.skip("MovieLens 100k by occupation has not been measured")
    page = occupation_table.PAGE.read_text(encoding="utf-8")
    record = json.loads(occupation_table.RESULTS.read_text(encoding="utf-8"))
    assert page == occupation_table.render_page(page, record)
    assert occupation_table.table(record) in page
    assert len(record["scenarios"]) == 21
