"""report.html in a real browser: a phone and a desktop, light and dark.

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver). Without them the tests are skipped
and say so, or fail where SAML_REQUIRE_BROWSER is set.
"""

import os
import shutil

import pytest

from saml_rec import comparison
from saml_rec.report_page import charts, render_page, write_page

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


def make_record(scenarios=21, seeds=3, models=("saml", "star", "hmoe", "shared_bottom")):
    """A comparison of plausible numbers; the last scenario has one class only and an unfriendly name."""
    names = [f"scenario {index}" for index in range(scenarios - 1)] + [HOSTILE]

    def scores(value, defined=True):
        return {"auc": value if defined else None, "logloss": 1 - value, "rows": 100}

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
            }
            bins = [{"predicted": (b + 0.5) / 10, "observed": (b + 0.4) / 10, "rows": 10} for b in range(10)]
            runs[model].append(
                {
                    "metrics": metrics,
                    "history": history,
                    "peak_bytes": 2**29,
                    "calibration": bins,
                    "mutual_weights": {"1": weights} if model == "saml" else None,
                }
            )
    return comparison.summarize(runs, names) | {
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
    text_outside = browser.execute_script(
        "return [...document.querySelectorAll('figure > svg')].flatMap(s => { const a = s.getBoundingClientRect();"
        "return [...s.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();"
        "return b.left < a.left - 1 || b.right > a.right + 1 || b.bottom > a.bottom + 1 || b.top < a.top - 1 })"
        ".map(t => t.textContent) })"
    )
    assert text_outside == []
    assert browser.get_log("browser") == []


def test_tables_wider_than_a_phone_scroll_by_themselves_and_by_keyboard(browser, page):
    show(browser, page, "phone", "light")
    tables = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(t => { t.scrollLeft = 1e6;"
        "return [t.tabIndex, t.getAttribute('aria-label'), t.scrollLeft, t.scrollWidth - t.clientWidth] })"
    )
    assert len(tables) == 4
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
            "...[0, 1, 2, 3].map(i => s('figure .s' + i).fill)]"
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


def test_the_page_says_what_exceeds_the_spread():
    record = make_record(scenarios=2)
    text = render_page(record)
    assert "overall: saml below star by 0.0200 AUC (spread between seeds 0.0010)" in text
    assert "Peak memory on the CPU is that of the whole process" in text
    same = make_record(scenarios=2, models=("saml",))
    assert "There is nothing to compare" in render_page(same)
    assert "One seed shows no spread" in render_page(make_record(scenarios=2, seeds=1))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.412, 0.413), (-3.0, 12_345.0), (0.69, 0.75), (0.9, 10.1)])
def test_ticks_are_round_few_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 8
    assert low - 1e-9 * (high - low) <= found[0]
    assert found[-1] <= high + 1e-9 * (high - low)
