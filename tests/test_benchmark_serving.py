"""The serving benchmark: what it reads of the C++ process, its table, and that the page shows the result."""

import json
import sys

import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import page
import serving


def record(sizes: list[dict]) -> dict:
    machine = {"processor": "a processor", "cpu capability": "AVX2", "torch": "2.13.0"}
    return {"machine": machine, "rounds": 3, "calls": 50, "sizes": sizes}


def test_the_times_are_those_that_the_process_prints(tmp_path):
    script = tmp_path / "score.py"
    script.write_text("import sys\nprint(0.5)\nfor n in range(int(sys.argv[2])): print(n + 0.5, file=sys.stderr)\n")
    assert serving.process_times([sys.executable, str(script)], tmp_path / "rows.pt", 3) == [0.5, 1.5, 2.5]


def test_a_line_has_medians_and_extremes_over_rounds():
    microseconds = {"eager": [[100, 200], [300, 900], [200, 400]], "C++": [[10, 20], [11, 21], [12, 22]]}
    text = serving.table(record([{"rows": 64, "others": 0.014, "microseconds": microseconds}]))
    assert "| rows | eager, p50 | eager, p99 | C++, p50 | C++, p99 |" in text
    assert "| 64 | 200 (100–300) | 400 (200–900) | 11 (10–12) | 21 (20–22) |" in text
    assert "had 1% of all cores" in text


def test_the_page_shows_the_result():
    committed = json.loads(serving.RESULT.read_text(encoding="utf-8"))
    assert [size["rows"] for size in committed["sizes"]] == list(serving.ROWS)
    text = serving.PAGE.read_text(encoding="utf-8")
    assert page.fill(text, {"serving": serving.table(committed)}) == text, "run: python benchmarks/serving.py --render"
