"""report.html: as text, and in a real browser on a phone and a desktop, light and dark.

The browser is chromium with chromedriver (Debian: apt-get install chromium chromium-driver). Without them its tests are
skipped and say so, or fail where SAML_REQUIRE_BROWSER is set.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import jinja2
import matplotlib
import pytest

from saml_rec import comparison
from saml_rec.comparison.report_page import charts, render_page, write_page
from saml_rec.comparison.significance import RowError

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
HOSTILE = '<img src=x onerror=alert(1)> & "scenario with a long name"'


class SameErrors:
    """As of rows on which every metric and difference varies as much."""

    def __init__(self, error=0.004):
        self.error = RowError(error, "DeLong")

    def of(self, measure, scenario, first, second=None):
        return self.error


def make_record(scenarios=21, seeds=3, models=("saml", "star", "hmoe", "shared_bottom"), groups=False, error=0.004):
    """A comparison of plausible numbers; the last scenario has one class only and an unfriendly name."""
    names = [f"scenario {index}" for index in range(scenarios - 1)] + [HOSTILE]

    def scores(value, defined=True):
        found = {"auc": value if defined else None, "logloss": 1 - value, "rows": 100, "ece": value / 50}
        found |= {"pr_auc": value, "normalised_entropy": value, "predicted_over_observed": 2 * value}
        return found | ({"gauc": value - 0.1, "gauc_groups": 1234, "gauc_rows": 5678} if groups else {})

    runs = {}
    for m, model in enumerate(models):
        runs[model] = []
        for seed in range(seeds):
            value = 0.70 + 0.02 * m + 0.001 * seed
            history = [
                {"train_loss": 0.7 / epoch, "valid": scores(value - 0.1 / epoch), "rows_per_second": 9e3}
                for epoch in (1, 2, 3)
            ]
            weights = [[0.0 if i == j else (1 + (i * j) % 5) / 60 for j in range(scenarios)] for i in range(scenarios)]
            metrics = {
                "overall": scores(value),
                "scenarios": {name: scores(value + 0.01, name != HOSTILE) for name in names},
                "parameters": 1000,
                "timing": {"rows_per_second": 9e3 + 100 * seed},
                "backend": {"grouped_mlp": "cpp"},
                "device": "cpu",
                "options": {"seed": seed},
                "best_epoch": 2,
                "epochs": 3,
                "stopped_by": "epochs",
            }
            bins = [{"predicted": (b + 0.5) / 10, "observed": (b + 0.4) / 10, "weight": 10} for b in range(10)]
            runs[model].append(
                {
                    "metrics": metrics,
                    "history": history,
                    "peak_bytes": 2**29,
                    "calibration": bins,
                    "mutual_weights": {"1": weights} if model == "saml" else None,
                }
            )
    return comparison.summarize(runs, names, SameErrors(error)) | {
        "tuned": None,
        "seeds": list(range(seeds)),
        "data": {"path": None, "rows": {"train": 800, "valid": 100, "test": 100}},
        "threads": 2,
        "versions": {"torch": "2"},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(make_record(), path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in programs:
        reason = "no browser: chromium and chromedriver are not installed"
        if os.environ.get("SAML_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    webdriver = pytest.importorskip("selenium.webdriver", reason="the extra saml-kernels[test] is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def show(browser, page, size, scheme):
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def luminance(color):
    """Relative luminance of ``rgb(r, g, b)`` as in WCAG 2."""
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def assert_texts_fit(browser):
    text_outside = browser.execute_script(
        "return [...document.querySelectorAll('figure > svg')].flatMap(s => { const a = s.getBoundingClientRect();"
        "return [...s.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();"
        "return b.left < a.left - 1 || b.right > a.right + 1 || b.bottom > a.bottom + 1 || b.top < a.top - 1 })"
        ".map(t => t.textContent) })"
    )
    assert text_outside == []
    # A turned label's box is upright; half a unit is what rounding leaves of two that touch.
    overlapping = browser.execute_script(
        "return [...document.querySelectorAll('figure > svg')].flatMap(s => {"
        "const all = [...s.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);"
        "return all.flatMap(([t, a], i) => all.slice(i + 1).filter(([, b]) => Math.min(a.right, b.right) - "
        "Math.max(a.left, b.left) > .5 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > .5"
        ").map(([u]) => t + ' and ' + u)) })"
    )
    assert overlapping == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_overflows_every_figure_shows_and_nothing_is_reported(browser, page, size, scheme):
    show(browser, page, size, scheme)
    assert browser.execute_script("return innerWidth") == SIZES[size][0]
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) == 0
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure > svg')].map(s => {"
        "const b = s.getBoundingClientRect(); return [b.left, b.right, b.width, b.height] })"
    )
    assert len(boxes) == 5
    for left, right, width, height in boxes:
        assert left >= 0
        assert right <= SIZES[size][0]
        assert width > 250
        assert height > 100
    assert_texts_fit(browser)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(
    ("scenarios", "seeds", "models"),
    [
        (1, 1, ["saml"]),
        (4, 2, [f"model number {index}" for index in range(12)]),
        (9, 2, [f"model number {index}" for index in range(5)]),
        (30, 2, ["WWWWWWWWWWWWWWWW", "saml"]),
    ],
)
@pytest.mark.parametrize(("speed", "auc"), [(999.0, 1e-4), (96_000.0, 0.25), (12_345_678.0, 1e-3)])
def test_texts_fit_for_few_and_many_for_small_and_large_numbers(
    browser, tmp_path, scenarios, seeds, models, speed, auc
):
    record = make_record(scenarios=scenarios, seeds=seeds, models=models)
    for index, model in enumerate(record["models"].values()):
        model["rows_per_second"] = {"mean": speed, "deviation": speed / 50}
        for entry in [model["overall"], *model["scenarios"][:-1]]:
            entry["auc"] = entry["auc"] | {"mean": 0.70021 + auc * index, "deviation": auc / 2}
        for run in model["history"]:
            for epoch, entry in enumerate(run):
                entry["valid"]["logloss"] = 0.70021 + auc * epoch
    write_page(record, tmp_path / "report.html")
    show(browser, tmp_path / "report.html", "phone", "light")
    assert_texts_fit(browser)


def test_tables_wider_than_a_phone_scroll_by_themselves_and_by_keyboard(browser, page):
    show(browser, page, "phone", "light")
    tables = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(t => { t.scrollLeft = 1e6;"
        "return [t.tabIndex, t.getAttribute('aria-label'), t.scrollLeft, t.scrollWidth - t.clientWidth] })"
    )
    assert len(tables) == 3 + 6 + 2 + 6
    for tab_index, label, scrolled, hidden in tables:
        assert tab_index == 0
        assert label
        assert scrolled == pytest.approx(hidden, abs=1)
    assert max(hidden for *_, hidden in tables) > 50
    widest = "return Math.max(...[...document.querySelectorAll('tbody th')].map(c => c.getBoundingClientRect().width))"
    assert browser.execute_script(widest) < 200  # the figures begin on the first screen


def test_text_and_marks_are_legible_in_both_schemes(browser, page):
    background = {}
    for scheme in SCHEMES:
        show(browser, page, "desktop", scheme)
        style = "const s = q => getComputedStyle(document.querySelector(q));"
        colors = browser.execute_script(
            style + "return [s('body').backgroundColor, s('figure').backgroundColor, s('body').color,"
            "s('.muted').color, s('figure svg text').fill,"
            "...[0, 1, 2, 3].map(i => s(`figure use[style*='--s${i})']`).fill)]"
        )
        body, card, text, muted, label, *series = colors
        background[scheme] = luminance(body)
        assert contrast(text, body) > 7
        assert contrast(muted, body) > 4.5
        assert contrast(label, card) > 4.5
        assert len(set(series)) == 4
        assert all(contrast(color, card) > 3 for color in series)
    assert background["light"] > 0.8
    assert background["dark"] < 0.05


def test_names_are_text_and_nothing_is_loaded(browser, page):
    show(browser, page, "desktop", "light")
    assert browser.execute_script("return document.images.length + document.scripts.length") == 0
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert HOSTILE in browser.find_element("tag name", "body").text


def test_the_page_says_what_differs():
    record = make_record(scenarios=2)
    text = render_page(record)
    assert "By AUC, shared_bottom is the best network; hmoe, star and saml are worse." in text
    assert "6 pairs of models were tested at 95 %" in text
    assert "Peak memory on the CPU is that of the whole process" in text
    alike = render_page(make_record(scenarios=2, error=0.05))
    assert "shared_bottom is the best network; it cannot be told apart from hmoe, star and saml." in alike
    same = make_record(scenarios=2, models=("saml",))
    assert "There is nothing to compare" in render_page(same)
    assert "One seed: this rests on the test rows alone" in render_page(make_record(scenarios=2, seeds=1))


def test_the_page_recommends_the_logistic_regression_that_is_better():
    models = ("saml", "star", "lightgbm", "logistic_regression")
    text = render_page(make_record(scenarios=2, models=models))
    assert "By AUC, star is the best network; saml is worse." in text
    assert "logistic_regression is better than the best network, star (AUC difference +0.0400" in text
    assert ": take logistic_regression.</li>" in text
    level = render_page(make_record(scenarios=2, models=models, error=0.03))
    assert "logistic_regression is level with the best network, star" in level


def test_a_model_without_epochs_and_without_scores_in_validation():
    record = make_record(scenarios=2, models=("saml", "logistic_regression"))
    record["models"]["logistic_regression"]["history"] = [[], [], []]
    assert "logistic_regression" in render_page(record)


class Page(HTMLParser):
    """What a page shows and how: its text, every chart's texts and tooltips, tables as rows of cells."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.charts, self.tables, self.urls, self.open = [], [], [], [], [], []
        self.plain = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag in ("text", "title", "th", "td"):
            self.text.append("")

    def handle_startendtag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.urls += [value for name, value in attributes.items() if name in ("href", "src") or "url(" in value]
        if tag == "svg":
            self.charts.append(
                {"label": attributes.get("aria-label"), "role": attributes.get("role"), "text": [], "title": []}
            )
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])

    @property
    def tables_by_label(self):
        labels = [attributes["aria-label"] for _, attributes in self.tags if attributes.get("role") == "region"]
        return dict(zip(labels, self.tables, strict=True))

    def handle_data(self, data):
        self.plain += data
        if self.text and self.open and self.open[-1] in ("text", "title", "th", "td"):
            self.text[-1] += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("th", "td"):
            self.tables[-1][-1].append(self.text.pop())
        elif tag in ("text", "title"):
            text = self.text.pop()
            if "svg" in self.open:
                self.charts[-1][tag].append(text)


def chart(source):
    (only,) = Page(source).charts
    return only


def numbers(texts):
    return [float(text.replace("−", "-")) for text in texts if re.fullmatch(r"−?[\d.]+", text)]


def test_charts_and_tables_say_what_they_show():
    page = Page(render_page(make_record(scenarios=3)))
    figures = [figure for figure in page.charts if figure["role"] == "img"]
    assert [figure["label"] for figure in figures] == [
        "test AUC of every scenario and model",
        "share of label 1 against mean prediction",
        "log loss against epoch",
        "rows per second",
        "learned mutual weights",
    ]
    assert len(page.charts) - len(figures) == 4  # marks of the legend, beside their names
    dots, *_, weights = figures
    assert {"scenario 0, star: 0.7310 ± 0.0010", HOSTILE} <= set(dots["title"])
    assert not any(title.startswith(f"{HOSTILE}, ") for title in dots["title"])  # its AUC is not defined
    assert "scenario 0 ← scenario 1: 0.017" in weights["title"]
    assert len([title for title in weights["title"] if "←" in title]) == 6
    tables = page.tables_by_label
    metrics = ["AUC", "log loss", "PR AUC", "normalised entropy", "predicted/observed", "ECE"]
    assert list(tables) == [
        "overall metrics",
        "other metrics",
        *(f"{metric}, row minus column" for metric in metrics),
        "AUC verdicts by scenario",
        "log loss verdicts by scenario",
        *(f"{metric} by scenario" for metric in metrics),
        "differences",
    ]
    assert tables["overall metrics"][1][:5] == [
        "saml",
        "0.7010 ± 0.0010",
        "0.6932 – 0.7088",
        "0.2990 ± 0.0010",
        "0.2912 – 0.3068",
    ]
    assert tables["other metrics"][1] == [
        "saml",
        "0.7010 ± 0.0010",
        "0.7010 ± 0.0010",
        "1.4020 ± 0.0020",
        "0.0140 ± 0.0000",
    ]
    assert tables["AUC by scenario"][0] == ["AUC by scenario", "rows", "saml", "star", "hmoe", "shared_bottom"]
    assert tables["AUC by scenario"][1][:3] == ["scenario 0", "100", "0.7110 ± 0.0010"]
    assert tables["AUC by scenario"][3] == [HOSTILE, "100", "-", "-", "-", "-"]
    assert tables["predicted/observed by scenario"][3][2] == "1.4220 ± 0.0020"
    assert tables["AUC, row minus column"][1] == ["saml", "", "-0.0200 ●", "-0.0400 ●", "-0.0600 ●"]
    assert tables["AUC, row minus column"][2] == ["star", "+0.0200 ●", "", "-0.0200 ●", "-0.0400 ●"]
    assert tables["AUC verdicts by scenario"][1] == ["scenario 0", "shared_bottom", "-", "hmoe, star, saml"]
    assert len(tables["AUC verdicts by scenario"]) == 3  # one class: no AUC, no verdict
    assert tables["differences"][1] == [
        "overall",
        "AUC",
        "saml − star",
        "-0.0200",
        "-0.0278 – -0.0122",
        "0.0010",
        "0.0040",
        "0.0000",
        "differs",
        "differs",
    ]


def test_groups_have_their_column():
    page = Page(render_page(make_record(scenarios=3, groups=True)))
    heads = page.tables_by_label["overall metrics"][0]
    assert heads[:7] == ["model", "AUC", "interval", "log loss", "interval", "GAUC", "interval"]
    assert "GAUC verdicts by scenario" in page.tables_by_label
    assert "GAUC is of the 1,234 groups that have both labels, with 5,678 rows." in page.plain


def test_a_scenario_named_overall_is_not_the_total():
    record = make_record(scenarios=3)
    for entry in record["differences"]:
        if entry["scenario"] == "scenario 0":
            entry["scenario"] = "overall"
    record["scenarios"][0]["name"] = "overall"
    page = Page(render_page(record))
    dots = next(figure for figure in page.charts if figure["label"] == "test AUC of every scenario and model")
    assert {"all rows, saml: 0.7010 ± 0.0010", "overall, saml: 0.7110 ± 0.0010"} <= set(dots["title"])
    named = [row[0] for row in page.tables_by_label["differences"][1:]]
    assert named.count("all rows") == 6 * 6
    assert named.count("overall") == 2 * 6
    assert page.tables_by_label["AUC verdicts by scenario"][1][0] == "overall"
    assert page.tables_by_label["AUC by scenario"][1][0] == "overall"


def test_twelve_models_are_told_apart():
    models = [f"model {index}" for index in range(12)]
    looks = [charts._look(index) for index in range(12)]
    assert len({tuple(look.values()) for look in looks}) == 12
    record = make_record(scenarios=30, seeds=5, models=models)
    page = Page(render_page(record))
    assert len(page.tables_by_label["AUC, row minus column"][0]) == 13
    assert "66 pairs of models were tested" in page.plain
    # Of all rows only: thousands of rows would make the page slow.
    assert len(page.tables_by_label["differences"]) == 1 + 6 * 66
    lines = [figure for figure in page.charts if figure["label"] == "log loss against epoch"]
    assert len(lines) == 1
    assert "Validation log loss after every epoch, mean over seeds" in page.plain
    few = Page(render_page(make_record(scenarios=3)))
    assert "Validation log loss after every epoch, one line a seed" in few.plain


def test_the_page_is_the_same_for_the_same_record_whatever_matplotlib_is_set_to():
    first = render_page(make_record())
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        assert render_page(make_record()) == first


def test_identifiers_are_unique_and_nothing_outside_is_named():
    source = render_page(make_record(scenarios=3))
    page = Page(source)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert identifiers
    assert len(identifiers) == len(set(identifiers))
    assert page.urls
    for url in page.urls:
        assert url == "data:," or url.removeprefix("url(").rstrip(")").removeprefix("#") in identifiers
    assert "//" not in source
    assert "@import" not in source
    assert [tag for tag, _ in page.tags].count("style") == 1  # a chart's own style would hold for the whole page


@pytest.mark.parametrize("name", [HOSTILE, "$x^2$", "</title></svg><script>", "{{ 7 * 7 }}", "两个场景", "a\nb\0c"])
def test_names_are_text_in_tables_and_charts(name):
    record = make_record(scenarios=2, seeds=2, models=("saml", name))
    record["scenarios"][0]["name"] = name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(render_page(record))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.tables_by_label["overall metrics"][2][0].replace("\ufffd", "\0") == name
    assert page.tables_by_label["AUC by scenario"][1][0].replace("\ufffd", "\0") == name
    shown = name.replace("\n", " ").replace("\0", " ")
    assert shown in page.charts[2]["title"]
    assert charts.short(name) in page.charts[2]["text"]
    assert f"{shown}, saml: 0.7105 ± 0.0007" in page.charts[2]["title"]


def test_a_template_that_lacks_a_value_is_an_error():
    record = make_record(scenarios=2)
    del record["threads"]
    with pytest.raises(jinja2.UndefinedError, match="threads"):
        render_page(record)


def test_measures_that_are_not_defined_leave_their_place_empty():
    nan = {"mean": math.nan, "deviation": math.nan}
    some = {"mean": 0.7, "deviation": 0.1}
    drawn = chart(charts.dots([("overall", [some, None]), ("first", [nan, some])], ["saml", "star"], "test AUC"))
    told = [title for title in drawn["title"] if ", " in title]
    assert set(told) == {"overall, saml: 0.7000 ± 0.1000", "first, star: 0.7000 ± 0.1000"}
    assert chart(charts.dots([("overall", [nan, None])], ["saml", "star"], "test AUC"))["text"] == [
        "not defined for these rows"
    ]
    assert chart(charts.lines([[], [[(1, math.nan)]]], "epoch", "log loss"))["text"] == ["no validation rows"]
    assert {"1", "2"} <= set(
        chart(charts.lines([[[(1, 0.5), (2, math.nan)], [(1, 0.5), (2, 0.4)]]], "epoch", "y", whole=True))["text"]
    )
    assert "saml" in chart(charts.bars([("saml", nan), ("star", some)], "rows per second"))["text"]
    assert chart(charts.heat_map([[None]], ["only"]))["text"] == ["no scenario weighs another"]
    weights = chart(charts.heat_map([[0.0, None], [0.25, 0.0]], ["a", "b"]))
    assert weights["title"] == ["b ← a: 0.250"]


def test_needs_no_display_and_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys, saml_rec.comparison.report_page as page; assert 'matplotlib' not in sys.modules;"
        "from saml_rec.comparison.report_page import charts;"
        "print(charts.bars([('saml', {'mean': 2.0, 'deviation': None})], 'rows'));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"MPLBACKEND": "TkAgg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert chart(done.stdout)["label"] == "rows"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.412, 0.413), (-3.0, 12_345.0), (0.69, 0.75), (0.9, 10.1)])
def test_ticks_are_round_few_and_inside(low, high):
    drawn = chart(charts.lines([[[(1, low), (2, high)]]], "epoch", "loss", whole=True))
    texts = [text for text in drawn["text"] if text not in ("epoch", "loss", "1", "2")]
    found = numbers(texts)
    assert len(found) == len(texts)
    assert 2 <= len(found) <= 8
    assert len(set(found)) == len(found)
    margin = 0.07 * (high - low)
    assert low - margin <= min(found)
    assert max(found) <= high + margin
    step = (max(found) - min(found)) / (len(found) - 1)
    assert f"{step:.0e}"[0] in "125"
    assert step == pytest.approx(float(f"{step:.0e}"))
