"""What the checker of races takes for granted of a program, read in compiled code (PTX), on every path through it.

    pytest -m aot tests/triton/test_memory_order.py

A thread's release comes right after a barrier, so it covers all threads' stores; what a thread acquires reaches the
others through a barrier before any of them loads; no load takes the path that is not coherent; and no asynchronous copy
is under way when an item's wait begins.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

from saml_kernels.backends.triton import availability

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(availability.INTERPRETED, reason="TRITON_INTERPRET replaces the compiler"),
]

sys.path.insert(0, str(Path(__file__).parent))

BARRIER = re.compile(r"\bbar(rier)?(\.cta)?\.sync\b")
RELEASE = re.compile(r"\b(atom|red)\.\S*release\b")
ACQUIRE = re.compile(r"\b(atom|ld)\.\S*acquire\b")
BOTH = re.compile(r"\b(atom|red)\.\S*acq_rel\b")
COPY = re.compile(r"\bcp\.async\.(ca|cg|bulk)\b")
LOAD = re.compile(r"\bld\.global\b|" + COPY.pattern)
ACCESS = re.compile(r"\b(ld|st|atom|red)\.global\b|" + COPY.pattern)
TARGETS = re.compile(r"(\$\w+):\s*\.branchtargets([^;]*);")
NOT_COHERENT = re.compile(r"\bld\.global\S*\.nc\b")


class Code:
    """The instructions of a kernel, and which may follow which."""

    def __init__(self, ptx):
        self.instructions, labels = [], {}
        ptx = ptx[ptx.index(".entry") :]
        self.tables = {name: re.findall(r"\$\w+", targets) for name, targets in TARGETS.findall(ptx)}
        for line in re.split(r"[;\n]", TARGETS.sub("", ptx)):
            text = line.split("//")[0].strip(" \t{}")
            if label := re.fullmatch(r"(\$\w+):", text):
                labels[label[1]] = len(self.instructions)
            elif text and not text.startswith("."):
                self.instructions.append(text)
        self.next = [self._next(number, labels) for number in range(len(self.instructions))]
        self.previous = [[] for _ in self.instructions]
        for number, following in enumerate(self.next):
            for each in following:
                self.previous[each].append(number)

    def _next(self, number, labels):
        text = self.instructions[number]
        following = [number + 1] if number + 1 < len(self.instructions) else []
        if jump := re.search(r"\bbra(\.uni)?\s+(\$\w+)", text):
            return [labels[jump[2]], *(following if text.startswith("@") else [])]
        if jump := re.search(r"\bbrx\.idx\S*\s.*(\$\w+)", text):
            return [labels[target] for target in self.tables[jump[1]]]
        return [] if re.match(r"(ret|exit|trap)\b", text) else following

    def all(self, pattern):
        return [number for number, text in enumerate(self.instructions) if pattern.search(text)]

    def met_first(self, start, patterns, steps):
        """The first instruction after ``start`` with one of the patterns, on every path along ``steps``."""
        found, seen, waiting = set(), set(), list(steps[start])
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            text = self.instructions[number]
            if any(pattern.search(text) for pattern in patterns):
                found.add(text)
            else:
                waiting += steps[number]
        return found


def unordered(code, releases, acquires):
    """What is wrong with a kernel whose releases and acquires have these patterns."""
    for number in code.all(releases):
        for text in code.met_first(number, (BARRIER, ACCESS), code.previous):
            if not BARRIER.search(text):
                yield "no barrier before a release", text
    for number in code.all(acquires):
        for text in code.met_first(number, (BARRIER, LOAD), code.next):
            if not BARRIER.search(text):
                yield "no barrier after an acquire", text
    if acquires is ACQUIRE:
        for number in code.all(COPY):
            for text in code.met_first(number, (RELEASE, ACQUIRE), code.next):
                if ACQUIRE.search(text):
                    yield "a copy before an acquire", code.instructions[number]
    for number in code.all(NOT_COHERENT):
        yield "a load that is not coherent", code.instructions[number]


def orders(launch):
    """Patterns of the releases and acquires that order a launch's items: its tickets', which are both, need not."""
    return (BOTH, BOTH) if launch.name == "weight_gradient_kernel" else (RELEASE, ACQUIRE)


@pytest.fixture(scope="module")
def aot():
    """Imported late: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    import aot

    return aot


def waiting_launches(aot, dtype, **options):
    schedule = "per_layer" if options.get("foreign_dtype") else "persistent"
    for launch in aot.recorded(dtype, aot.Trunk(**options), schedule):
        if launch.name == "weight_gradient_kernel" or (launch.plan and launch.plan.persistent):
            yield launch


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"mutual_layers": (0, 1)}),
        (torch.bfloat16, {"foreign_dtype": torch.int8}),
        (torch.float32, {}),
    ],
    ids=["bf16", "two_units", "int8", "fp32"],
)
def test_memory_order(aot, dtype, options, chip):
    for launch in waiting_launches(aot, dtype, **options):
        code = Code(aot.compiled(launch, aot.CHIPS[chip]).asm["ptx"])
        releases, acquires = orders(launch)
        assert code.all(releases), aot.title(launch)
        assert code.all(acquires), aot.title(launch)
        assert code.all(COPY), aot.title(launch)
        assert not list(unordered(code, releases, acquires)), aot.title(launch)


def test_what_is_found(aot):
    """In the code of a real launch with one fault put into it at a time."""
    (forward, *_) = aot.recorded(torch.bfloat16, aot.Trunk(), "persistent")
    lines = aot.compiled(forward, aot.CHIPS["sm_90"]).asm["ptx"].splitlines()
    release, acquire, copy = (
        next(number for number, line in enumerate(lines) if pattern.search(line))
        for pattern in (RELEASE, ACQUIRE, COPY)
    )
    barriers = [number for number, line in enumerate(lines) if BARRIER.search(line)]
    before_release = max(number for number in barriers if number < release)
    behind_acquire = min(number for number in barriers if number > acquire)

    def inserted(number, line):
        return [*lines[:number], line, *lines[number:]]

    changed = {
        "no barrier before a release": [*lines[:before_release], *lines[before_release + 1 :]],
        "no barrier after an acquire": inserted(behind_acquire, "ld.global.b32 %r1, [%rd1];"),
        "a copy before an acquire": inserted(acquire, lines[copy]),
        "a load that is not coherent": inserted(acquire, "ld.global.nc.b32 %r1, [%rd1];"),
    }
    for kind, code in changed.items():
        found = unordered(Code("\n".join(code)), RELEASE, ACQUIRE)
        assert {name for name, _ in found} == {kind}


def test_paths():
    code = Code(
        """.visible .entry kernel()
        {
            .reg .b32 %r<3>;
            @%p1 bra $L__BB0_2;
            $L_brx_0: .branchtargets
                $L__BB0_1,
                $L__BB0_2;
            brx.idx %r3, $L_brx_0;
        $L__BB0_1:
            bar.sync 0; // 1
        $L__BB0_2:
            atom.global.release.gpu.add.u32 %r1, [%rd1], 1;
            bra.uni $L__BB0_4;
            ld.global.b32 %r2, [%rd2];
        $L__BB0_4:
            ret;
        }"""
    )
    (release,) = code.all(RELEASE)
    jumps = {"@%p1 bra $L__BB0_2", "brx.idx %r3, $L_brx_0"}
    assert code.met_first(release, (BARRIER,), code.previous) == {"bar.sync 0"}
    assert code.met_first(release, (re.compile("br[ax]"), BARRIER), code.previous) == {"bar.sync 0", *jumps}
    assert code.met_first(release, (LOAD,), code.next) == set()
