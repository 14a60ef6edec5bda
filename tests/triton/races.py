"""Triton's interpreter with all programs of a launch at once, and a check that memory accesses are ordered.

    with races.checking(seed=3):
        ...  # launches; one with a fault raises it

Programs are threads of which exactly one runs at a time; before every memory operation the turn may pass to another, by
chance that ``seed`` decides. Two accesses to a byte, one of which is a plain write, must be ordered by a chain of
release and acquire through atomics ("happens before"). What is ordered is known from vector clocks, what was accessed
from a shadow of every byte, so a race is found in whatever order the programs happened to run.

A program is a block of threads. One of them performs its scalar atomics: what these release is what the program did
before its last barrier, and what they acquire is known to all threads. test_memory_order.py checks that compiled code
is so.
"""

import ast
import inspect
import random
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton._C.libtriton import ir
from triton.language import int32
from triton.runtime import interpreter

from saml_kernels.backends.triton import schedule

ACQUIRES = ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE
RELEASES = ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE
SWITCH = 0.3
"""Chance that the turn passes on at a memory operation."""
MOST_POLLS = 1000
"""So many additions of zero in a row, each in another program's turn, are a deadlock."""
COUNTER_BYTES = 4


class Fault(Exception):
    """What is wrong with a launch."""


class Race(Fault):
    """Two accesses that nothing orders."""


class Deadlock(Fault):
    """Every program waits."""


class CountersLeft(Fault):
    """A launch began or ended with counters that are not zero."""


class OutOfBounds(Fault):
    """An access to what belongs to no tensor of the launch."""


class Stopped(BaseException):
    """Ends the other programs of a launch with a fault; no handler of exceptions in between takes it."""


class Clocks:
    """What programs know of each other. A program's clock counts its barriers."""

    def __init__(self, programs: int, ignored: set[int]) -> None:
        self.known = np.zeros((programs, programs), np.int32)
        """known[p, q]: what q did up to this clock of its own happened before p's next access."""
        # Above what others know at first, 0, by one already before the first barrier: see before_barrier.
        np.fill_diagonal(self.known, 2)
        self.released: dict[int, np.ndarray] = {}
        """Address of an atomic → what whoever acquires it will know."""
        self.ignored = ignored
        """Addresses that order nothing."""

    def now(self, program: int) -> int:
        return int(self.known[program, program])

    def before_barrier(self, program: int) -> int:
        """The clock up to which the program's atomics release its own accesses."""
        return self.now(program) - 1

    def barrier(self, program: int) -> None:
        self.known[program, program] += 1

    def atomic(self, program: int, addresses: list[int], order: Any) -> None:
        for address in addresses:
            if address in self.ignored:
                continue
            before = self.released.get(address)
            if order in ACQUIRES and before is not None:
                np.maximum(self.known[program], before, out=self.known[program])
            if order in RELEASES:
                # What was acquired is passed on, whether or not a barrier came since: one thread did both.
                clock = self.known[program].copy()
                clock[program] = self.before_barrier(program)
                # An atomic continues what earlier ones released at its address.
                self.released[address] = clock if before is None else np.maximum(before, clock)

    def overwritten(self, addresses: np.ndarray) -> None:
        """A plain store ends what atomics released."""
        if self.released:
            for address in self.released.keys() & set(addresses.tolist()):
                del self.released[address]


class Shadow:
    """The last accesses to every byte of a storage."""

    def __init__(self, name: str, start: int, size: int, programs: int) -> None:
        self.name, self.start, self.end = name, start, start + size
        self.writer = np.full(size, -1, np.int16)
        self.written = np.zeros(size, np.int32)
        """The writer's clock."""
        self.read = np.zeros((programs, size), np.int32)
        """Every program's clock at its last plain read."""
        self.atomic = np.zeros((programs, size), np.int32)
        """The same of atomics."""
        self.has_atomics = False

    def bytes_of(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Places of all bytes of the elements at some addresses."""
        first = (addresses - np.uint64(self.start)).astype(np.int64)
        return (first[:, None] + np.arange(size)).ravel()


class Launch:
    """The programs of a launch: whose turn it is, what they know, what they accessed."""

    def __init__(self, kernel: str, grid: tuple[int, int, int], tensors: dict[str, torch.Tensor], seed: int) -> None:
        self.kernel = kernel
        self.indices = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        programs = len(self.indices)
        ignored = set()
        if kernel == "persistent_kernel":
            # Which program draws an item is chance. That the ticket is drawn must order nothing.
            ignored = {tensors["counters"].data_ptr() + COUNTER_BYTES * schedule.TICKET}
        self.clocks = Clocks(programs, ignored)
        self.shadows: list[Shadow] = []
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes() and all(storage.data_ptr() != shadow.start for shadow in self.shadows):
                self.shadows.append(Shadow(name, storage.data_ptr(), storage.nbytes(), programs))
        self.shadows.sort(key=lambda shadow: shadow.start)
        self.starts = np.array([shadow.start for shadow in self.shadows], np.uint64)
        self.random = random.Random(seed)
        self.alive = list(range(programs))
        self.gates = [threading.Semaphore(0) for _ in range(programs)]
        self.current = 0
        self.polls = 0
        self.fault: BaseException | None = None

    def run(self, body: Callable[[], None]) -> None:
        """Runs ``body`` as every program."""

        def program(number: int) -> None:
            self.gates[number].acquire()
            self.current = number
            try:
                if self.fault is None:
                    body()
            except Stopped:
                pass
            except BaseException as error:
                self.fault = self.fault or error
            finally:
                self.alive.remove(number)
                if self.alive:
                    self.gates[self.random.choice(self.alive)].release()

        threads = [threading.Thread(target=program, args=(number,)) for number in self.alive]
        for thread in threads:
            thread.start()
        self.gates[self.random.choice(self.alive)].release()
        for thread in threads:
            thread.join()
        if self.fault is not None:
            raise self.fault

    def turn(self, chance: float = SWITCH) -> int:
        """Lets another program go on, by chance; the number of this one, whose turn it is on return."""
        program = self.current
        if self.random.random() < chance:
            other = self.random.choice(self.alive)
            if other != program:
                self.gates[other].release()
                self.gates[program].acquire()
                self.current = program
        if self.fault is not None:
            raise Stopped
        return program

    def load(self, addresses: np.ndarray, size: int) -> None:
        program = self.turn()
        self.polls = 0
        now, known = self.clocks.now(program), self.clocks.known[program]
        for shadow, places in self._places(addresses, size):
            self._after_writes("reads", program, shadow, places)
            if shadow.has_atomics:
                self._after("reads", "counted", shadow.atomic, program, known, shadow, places)
            shadow.read[program, places] = now

    def store(self, addresses: np.ndarray, size: int) -> None:
        program = self.turn()
        self.polls = 0
        now, known = self.clocks.now(program), self.clocks.known[program]
        for shadow, places in self._places(addresses, size):
            self._after_writes("writes", program, shadow, places)
            self._after("writes", "read", shadow.read, program, known, shadow, places)
            if shadow.has_atomics:
                self._after("writes", "counted", shadow.atomic, program, known, shadow, places)
                self.clocks.overwritten(addresses)
            shadow.writer[places], shadow.written[places] = program, now

    def atomic(self, addresses: np.ndarray, size: int, order: Any, poll: bool) -> None:
        program = self.turn(1.0 if poll else SWITCH)
        self.polls = self.polls + 1 if poll else 0
        if self.polls > MOST_POLLS:
            raise Deadlock(f"{self.kernel}: {len(self.alive)} programs wait, and none does anything else")
        known = self.clocks.known[program]
        for shadow, places in self._places(addresses, size):
            self._after_writes("counts", program, shadow, places)
            self._after("counts", "read", shadow.read, program, known, shadow, places)
            shadow.has_atomics = True
            # The thread that counts is the one that releases: no barrier is needed in between.
            shadow.atomic[program, places] = self.clocks.before_barrier(program)
        self.clocks.atomic(program, addresses.tolist(), order)

    def barrier(self) -> None:
        self.clocks.barrier(self.current)

    def _places(self, addresses: np.ndarray, size: int) -> Iterator[tuple[Shadow, np.ndarray]]:
        """The storages and the bytes in them that an access goes to."""
        if not len(addresses):
            return
        numbers = np.searchsorted(self.starts, addresses, side="right") - 1
        for number in np.unique(numbers):
            here = addresses[numbers == number]
            shadow = self.shadows[number]
            if number < 0 or int(here.max()) + size > shadow.end:
                raise OutOfBounds(f"{self.kernel}: program {self.current} leaves {shadow.name}")
            yield shadow, shadow.bytes_of(here, size)

    def _after_writes(self, what: str, program: int, shadow: Shadow, places: np.ndarray) -> None:
        """What was written to these bytes happened before."""
        writer, clock = shadow.writer[places], shadow.written[places]
        others = (writer >= 0) & (writer != program)
        unordered = others & (clock > self.clocks.known[program, np.maximum(writer, 0)])
        if unordered.any():
            self._report(what, program, shadow, places[unordered], f"program {writer[unordered][0]} writes")
        if what == "reads":
            # Another thread of the program may have written it.
            unordered = (writer == program) & (clock == self.clocks.now(program))
            if unordered.any():
                self._report(what, program, shadow, places[unordered], "it writes itself with no barrier since")

    def _after(
        self,
        what: str,
        other: str,
        clocks: np.ndarray,
        program: int,
        known: np.ndarray,
        shadow: Shadow,
        places: np.ndarray,
    ) -> None:
        """What other programs did to these bytes happened before."""
        unordered = clocks[:, places] > known[:, None]
        unordered[program] = False
        if unordered.any():
            programs, found = np.nonzero(unordered)
            self._report(what, program, shadow, places[found], f"program {programs[0]} {other}")

    def _report(self, what: str, program: int, shadow: Shadow, places: np.ndarray, other: str) -> None:
        raise Race(
            f"{self.kernel}: program {program} {what} bytes {places.min()} to {places.max()} of {shadow.name}, "
            f"which {other}; nothing orders the two"
        )


def tensors_of(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a kernel's argument, which may be tuples of tuples, with what to call them."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        for number, entry in enumerate(value):
            yield from tensors_of(entry, f"{name}.{fields[number]}" if fields else f"{name}[{number}]")


@contextmanager
def checking(seed: int = 0) -> Iterator[list[str]]:
    """Every launch inside runs with all its programs at once and is checked; gives the names of its kernels.

    Raises:
        Fault: of the first launch that has one.
    """
    launches: list[str] = []
    running: list[Launch] = []
    builder = interpreter.InterpreterBuilder
    original = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    }

    def element_bytes(pointers: Any) -> int:
        return int(pointers.get_element_ty().primitive_bitwidth) // 8

    def chosen(pointers: Any, mask: Any) -> np.ndarray:
        return np.asarray(pointers.data[mask.data.astype(bool)], np.uint64).ravel()

    def load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        running[0].load(chosen(pointers, mask), element_bytes(pointers))
        return original["create_masked_load"](self, pointers, mask, *others)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        running[0].store(chosen(pointers, mask), element_bytes(pointers))
        return original["create_masked_store"](self, pointers, value, mask, *others)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, order: Any, scope: Any) -> Any:
        addresses = chosen(pointers, mask)
        assert len(addresses) == 1, "an atomic of many threads is none of one thread's"
        running[0].atomic(addresses, element_bytes(pointers), order, poll=not value.data.any())
        return original["create_atomic_rmw"](self, operation, pointers, value, mask, order, scope)

    def compare_and_swap(self: Any, *arguments: Any) -> Any:
        raise NotImplementedError("no kernel compares and swaps, so nothing here says what that orders")

    def barrier(self: Any) -> None:
        running[0].barrier()

    def program_id(self: Any, axis: int) -> Any:
        launch = running[0]
        return interpreter.TensorHandle(np.array([launch.indices[launch.current][axis]], np.int32), int32)

    def execute(self: Any, *arguments: Any, **options: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        values = inspect.getcallargs(self.fn, *arguments, **{k: v for k, v in options.items() if k in names})
        given = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in values.items()
        }
        tensors = dict(pair for name, value in values.items() for pair in tensors_of(value, name))
        grid = (*self.grid, 1, 1)[:3]
        launch = Launch(self.fn.__name__, grid, tensors, seed + len(launches))
        launches.append(launch.kernel)
        patched = interpreter._patch_lang(self.fn)
        interpreter.interpreter_builder.set_grid_dim(*grid)
        running.append(launch)
        try:
            check_counters(launch.kernel, "begins", tensors)
            launch.run(lambda: self.fn(**given))
            check_counters(launch.kernel, "ends", tensors)
        finally:
            running.pop()
            patched.restore()

    with ExitStack() as stack:
        replaced = {
            "create_masked_load": load,
            "create_masked_store": store,
            "create_atomic_rmw": atomic,
            "create_atomic_cas": compare_and_swap,
            "create_barrier": barrier,
            "create_get_program_id": program_id,
        }
        stack.enter_context(mock.patch.multiple(builder, **replaced))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", execute))
        yield launches


def check_counters(kernel: str, when: str, tensors: dict[str, torch.Tensor]) -> None:
    """All counters are zero between launches."""
    counters = tensors.get("counters")
    if counters is not None and counters.any():
        raise CountersLeft(f"{kernel} {when} with counters {counters.nonzero().ravel().tolist()} above zero")


@contextmanager
def mutated(function: Any, old: str, new: str) -> Iterator[None]:
    """A kernel's function with a piece of its source replaced, in the interpreter."""
    source = textwrap.dedent(inspect.getsource(function.fn))
    source = source[source.index("\ndef ") :]
    if source.count(old) != 1:
        raise ValueError(f"{function.fn.__name__} has {old!r} {source.count(old)} times, not once")
    # Before, so that the function's module has what rewritten code names.
    function.rewrite()
    tree = interpreter.ASTTransformer().visit(ast.parse(source.replace(old, new)))
    found: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), f"<{new}>", "exec"), function.fn.__globals__, found)
    with mock.patch.dict(interpreter.InterpretedFunction.rewritten_fn, {function.fn: found[function.fn.__name__]}):
        yield
