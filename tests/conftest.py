"""One seed for the property tests of all processes of a run, printed before and after it."""

import budget
import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Before pytest-xdist starts its workers, which have this process's environment.
    budget.choose_seed()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    # Not pytest_report_header, which pytest -q leaves out.
    _print(session.config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    _print(terminalreporter.config)


def _print(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(budget.seed_line())
