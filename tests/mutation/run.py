"""Changes Python files of the two packages one small step at a time, and lists the changes that no test notices.

    python tests/mutation/run.py [--against COMMIT] [FILE ...]

Without files these are the lines that differ from a commit. Everything happens in a copy of the working tree. The tests
of a file are those that tests.toml names, or else those whose text has the name of its module. They run once with
coverage.py; a mutant then meets the tests that run its lines, the fastest ones first, in a process that is forked from
one where torch and the other libraries are imported already: that takes a second and not ten. Survivors that
survivors.toml gives a reason for do not count.
"""

import argparse
import ast
import contextlib
import difflib
import gc
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest
from mutations import Mutant, mutants_of
from swapping import Swap, Swapping, forget_compiled, swaps_between, wait_for

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ("python/saml_rec", "saml_kernels")
UNMARKED = "not slow and not gpu and not interpreter and not races and not aot"
LEAST_SECONDS, TIMES_LONGER = 20.0, 10.0
"""A mutant may take so long, and so many times as long as its tests do without it; of the processor's time a third."""


@dataclass
class Baseline:
    """Tests without a mutant.

    Args:
        seconds: by test.
        tests: by line those that run it; import is none.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tests: dict[int, set[str]] = field(default_factory=dict)

    def of_lines(self, first: int, last: int) -> list[str]:
        """The tests that run one of these lines, all of them where none does; the fastest first."""
        found = {test for line in range(first, last + 1) for test in self.tests.get(line, ())}
        return sorted(found or self.seconds, key=lambda test: self.seconds[test])

    def limit(self, tests: Sequence[str]) -> float:
        """Seconds that these tests may take with a mutant."""
        return LEAST_SECONDS + TIMES_LONGER * sum(self.seconds[test] for test in tests)


class Chosen:
    """A pytest plugin: runs certain tests, in their order, and ends the process with the first that fails."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.place), key=lambda item: self.place[item.nodeid]
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os._exit(1)


class Timed:
    """A pytest plugin: which lines each test runs, and how long it takes."""

    def __init__(self, coverage: object) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = time.perf_counter() - start
        self.coverage.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help="of these all lines; otherwise those that differ from a commit")
    parser.add_argument("--against", default="", help="commit; default: origin/main if there is one, else HEAD~1")
    parser.add_argument("--most", type=int, default=0, help="survivors without a reason that are no failure")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, and say so")
    parser.add_argument("--record", action="store_true", help="add survivors to survivors.toml, without a reason")
    given = parser.parse_args(arguments)
    lines = dict.fromkeys(given.files) if given.files else changed_lines(given.against or default_commit())
    reasons = read_reasons()
    unexplained = 0
    end = time.monotonic() + given.seconds
    with copy_of_the_tree() as copy:
        for file, chosen in lines.items():
            found = survivors_of(copy, file, chosen, end)
            known = reasons.get(file, {})
            new = [change for change in found if change not in known]
            for change in new:
                print(f"\n{file}: survived\n{change.shown()}", flush=True)
            if chosen is None and time.monotonic() < end:
                for change in known.keys() - set(found):
                    print(f"\n{file}: does not survive, but stands in survivors.toml\n{change.shown()}", flush=True)
            if given.record and new:
                record(file, new)
            unexplained += len(new)
            print(f"{file}: {len(new)} survivors without a reason, {len(found) - len(new)} with one", flush=True)
    if time.monotonic() > end:
        print("stopped before the end")
    return int(unexplained > given.most)


def default_commit() -> str:
    known = subprocess.run(["git", "rev-parse", "-q", "--verify", "origin/main"], cwd=ROOT, capture_output=True)
    return "HEAD~1" if known.returncode else "origin/main"


def changed_lines(commit: str) -> dict[str, set[int] | None]:
    """By file the lines of the working tree that a commit does not have."""
    command = ["git", "diff", "--unified=0", "--no-color", "--diff-filter=d", commit, "--", *SOURCES]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: dict[str, set[int] | None] = {}
    for part in re.split(r"^diff --git .*$", text, flags=re.MULTILINE):
        name = re.search(r"^\+\+\+ b/(.*\.py)$", part, re.MULTILINE)
        if name is None:
            continue
        hunks = re.findall(r"^@@ \S+ \+(\d+)(?:,(\d+))? @@", part, re.MULTILINE)
        found[name[1]] = {line for start, count in hunks for line in range(int(start), int(start) + int(count or 1))}
    return found


@contextlib.contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """A directory with the files that git knows or would add, and the built extension."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    files += [str(path.relative_to(ROOT)) for path in (ROOT / "saml_kernels").glob("*.so")]
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copy = Path(directory)
        for name in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
        yield copy


def tests_of(file: str) -> list[str]:
    """Files of tests: those of tests.toml, or those that name the module."""
    table = tomllib.loads((HERE / "tests.toml").read_text(encoding="utf-8"))
    for pattern, tests in table.items():
        if fnmatch(file, pattern):
            return tests
    package, _, name = module_of(file).rpartition(".")
    module = re.compile(rf"\b{re.escape(package)}(?:\.{name}\b| import [^\n]*\b{name}\b)")
    named = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if module.search(path.read_text(encoding="utf-8"))
    ]
    if not named:
        raise SystemExit(f"{file}: no test names {module_of(file)}; add its tests to {HERE / 'tests.toml'}")
    return named


def module_of(file: str) -> str:
    return file.removeprefix("python/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def survivors_of(copy: Path, file: str, lines: set[int] | None, end: float) -> list["Change"]:
    """What changes of a file its tests do not notice.

    Args:
        copy: of the tree.
        file: relative to it.
        lines: those that are changed; None for all.
        end: when to stop, by the monotonic clock.
    """
    text = (copy / file).read_text(encoding="utf-8")
    mutants = [*mutants_of(text, lines)]
    if not mutants:
        return []
    tests = tests_of(file)
    if not tests:
        print(f"{file}: left out, its tests need a process of their own")
        return []
    print(f"{file}: {len(mutants)} mutants, tests of {', '.join(tests)}", flush=True)
    baseline = measure(copy, file, tests)
    statements = spans_of_statements(text)
    chosen = [baseline.of_lines(*statement_of(statements, mutant.first, mutant.last)) for mutant in mutants]
    outcomes = swapped(copy, file, tests, text, mutants, chosen, baseline, end)
    found = []
    for number, (mutant, own) in enumerate(zip(mutants, chosen, strict=True)):
        if time.monotonic() > end:
            once = [mutant for mutant, survived in zip(mutants[number:], outcomes[number:], strict=False) if survived]
            print(
                f"{file}: {max(number, len(outcomes))} of {len(mutants)} mutants had their turn, {len(once)} one look"
            )
            found += [Change.between(text, mutant.text) for mutant in once]
            break
        # Survivors of a swap are looked at once more, with all that an import brings.
        if number < len(outcomes) and outcomes[number] is False:
            continue
        (copy / file).write_text(mutant.text, encoding="utf-8")
        if survives(copy, file, own, baseline.limit(own)):
            found.append(Change.between(text, mutant.text))
    (copy / file).write_text(text, encoding="utf-8")
    return list(dict.fromkeys(found))


def swapped(
    copy: Path,
    file: str,
    tests: Sequence[str],
    text: str,
    mutants: Sequence[Mutant],
    chosen: Sequence[Sequence[str]],
    baseline: Baseline,
    end: float,
) -> list[bool | None]:
    """By mutant whether it survives, None where that takes an import; shorter where time is up."""
    answers = copy / ".answers"
    answers.write_text("")

    def work() -> int:
        forget_compiled(copy / file)
        with answers.open("w", buffering=1) as target:

            def in_turn() -> Iterator[tuple[Sequence[str], float, list[Swap] | None]]:
                # The first one changes nothing: with it the tests have to pass.
                yield [*baseline.seconds], baseline.limit([*baseline.seconds]), []
                for mutant, own in zip(mutants, chosen, strict=True):
                    if time.monotonic() > end:
                        return
                    # For tests that start Python themselves.
                    (copy / file).write_text(mutant.text, encoding="utf-8")
                    yield own, baseline.limit(own), swaps_between(text, mutant.text, file)

            plugin = Swapping(module_of(file), in_turn(), lambda answer: print(answer, file=target))
            return int(pytest.main(pytest_arguments(copy, tests), plugins=[plugin]))

    os.waitpid(in_a_fork(copy, work), 0)
    (copy / file).write_text(text, encoding="utf-8")
    names = {"True": True, "False": False, "None": None}
    control, *found = [names[line] for line in answers.read_text().split()] or [None]
    if control is not True:
        print(f"{file}: its tests need an import for every mutant, which takes longer")
        return []
    return found


def spans_of_statements(text: str) -> list[tuple[int, int]]:
    """First and last lines of the simple statements and of the heads of the others."""
    spans = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if isinstance(body, list) and body else node.end_lineno
            spans.append((node.lineno, last))
    return spans


def statement_of(spans: Iterable[tuple[int, int]], first: int, last: int) -> tuple[int, int]:
    """The lines of the shortest statement around a change: coverage.py counts some of them only."""
    around = [span for span in spans if span[0] <= first and last <= span[1]]
    return min(around, key=lambda span: span[1] - span[0], default=(first, last))


def in_a_fork(copy: Path, work) -> int:
    """Starts a function in the copy, in a process group of its own; the process's number."""
    if child := os.fork():
        return child
    status = 99
    try:
        os.setsid()
        os.chdir(copy)
        with Path(os.devnull).open("r+b") as nowhere:
            for stream in range(3):
                os.dup2(nowhere.fileno(), stream)
        os.environ["PYTHONPATH"] = f"{copy}{os.pathsep}{copy / 'python'}"
        sys.path[:0] = [str(copy), str(copy / "python")]
        status = work()
    finally:
        os._exit(status)


def pytest_arguments(copy: Path, tests: Iterable[str]) -> list[str]:
    # The plugins left out look for what nobody collected, through all objects that the libraries made.
    left_out = ("cacheprovider", "unraisableexception", "threadexception")
    plugins = [part for name in left_out for part in ("-p", f"no:{name}")]
    return [*tests, "-q", "-x", "--tb=no", "-m", UNMARKED, f"--basetemp={copy / '.tests'}", *plugins]


def installed_modules() -> list[str]:
    """Modules of libraries that are imported."""
    origins = {name: getattr(getattr(module, "__spec__", None), "origin", None) for name, module in sys.modules.items()}
    return sorted(name for name, origin in origins.items() if "site-packages" in str(origin))


def measure(copy: Path, file: str, tests: Sequence[str]) -> Baseline:
    """Runs the tests of a file without a mutant; imports what libraries they need, for the processes to come."""
    answer = copy / ".baseline.json"

    def work() -> int:
        import coverage

        measured = coverage.Coverage(data_file=None, include=[str(copy / file)], config_file=False)
        measured.start()
        timed = Timed(measured)
        status = pytest.main(pytest_arguments(copy, tests), plugins=[timed])
        measured.stop()
        data = measured.get_data()
        contexts = data.contexts_by_lineno(str((copy / file).resolve())) if data.measured_files() else {}
        covered = {line: [name for name in names if name] for line, names in contexts.items()}
        found = {"seconds": timed.seconds, "lines": covered, "failed": timed.failed, "imported": installed_modules()}
        answer.write_text(json.dumps(found))
        return int(status)

    _, status = os.waitpid(in_a_fork(copy, work), 0)
    if not answer.exists():
        raise SystemExit(f"{file}: its tests did not come to an end without a mutant (status {status})")
    found = json.loads(answer.read_text())
    answer.unlink()
    if found["failed"] or status:
        raise SystemExit(f"{file}: its tests fail without a mutant: {found['failed'] or status}")
    for name in found["imported"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # Collections of garbage in the processes to come do not go through these.
    gc.freeze()
    return Baseline(found["seconds"], {int(line): set(names) for line, names in found["lines"].items()})


def survives(copy: Path, file: str, tests: Sequence[str], seconds: float) -> bool:
    """Whether these tests pass with the file as it is now."""

    def work() -> int:
        forget_compiled(copy / file)
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return int(pytest.main(pytest_arguments(copy, files), plugins=[Chosen(tests)]))

    return wait_for(in_a_fork(copy, work), seconds) == 0


@dataclass(frozen=True)
class Change:
    """The lines that a mutant has in place of others, without their indentation."""

    before: tuple[str, ...]
    after: tuple[str, ...]

    @classmethod
    def between(cls, text: str, mutated: str) -> "Change":
        lines = [*difflib.ndiff(text.splitlines(), mutated.splitlines())]
        return cls(*(tuple(line[2:].strip() for line in lines if line.startswith(sign)) for sign in ("- ", "+ ")))

    def shown(self) -> str:
        return "\n".join([*(f"- {line}" for line in self.before), *(f"+ {line}" for line in self.after)])


def read_reasons() -> dict[str, dict[Change, str]]:
    """By file why a change of it is none, or none that a test could notice."""
    found: dict[str, dict[Change, str]] = {}
    for file, entries in tomllib.loads((HERE / "survivors.toml").read_text(encoding="utf-8")).items():
        for entry in entries:
            if not entry["why"].strip():
                raise SystemExit(f"survivors.toml: {file} has a survivor without a reason: {entry['before']}")
            change = Change(*(tuple(entry[name].strip().splitlines()) for name in ("before", "after")))
            found.setdefault(file, {})[change] = entry["why"]
    return found


def record(file: str, changes: Iterable[Change]) -> None:
    """Adds survivors to the list, for somebody to say why."""
    with (HERE / "survivors.toml").open("a", encoding="utf-8") as target:
        for change in changes:
            target.write(f'\n[["{file}"]]\n')
            for name in ("before", "after"):
                target.write(f"{name} = {json.dumps(chr(10).join(getattr(change, name)), ensure_ascii=False)}\n")
            target.write('why = ""\n')


if __name__ == "__main__":
    # A failure is enough: nobody reads its smallest example.
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")
    sys.exit(main(sys.argv[1:]))
