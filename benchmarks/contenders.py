"""Who takes part: the peers, eager and compiled, and the backends of saml_kernels.multi_branch, by precision."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from peers import PEERS
from saml_kernels.testing.problem import Problem, Trunk, backend
from workload import Cell


@dataclass(frozen=True)
class Contender:
    """One implementation of the trunk in one precision."""

    implementation: str
    """A key of peers.PEERS, or a backend of saml_kernels."""
    compiled: bool = False
    """Under torch.compile (inductor)."""
    dtype: torch.dtype = torch.float32
    """Of inputs, parameters and results."""
    foreign_dtype: torch.dtype | None = None
    schedule: str = "auto"
    """Of the Triton forward: "persistent", "per_layer" or "auto"."""

    @property
    def is_peer(self) -> bool:
        return self.implementation in PEERS

    @property
    def name(self) -> str:
        parts = [self.implementation]
        parts += [short(self.dtype)] if self.dtype != torch.float32 else []
        parts += [f"foreign {short(self.foreign_dtype)}"] if self.foreign_dtype else []
        parts += [self.schedule] if self.schedule != "auto" else []
        parts += ["compiled"] if self.compiled else []
        return ", ".join(parts)

    def function(self, *, dynamic: bool = False) -> Trunk:
        """The implementation; compiling happens at its first calls, for any shapes if ``dynamic``."""
        if not self.is_peer:
            return backend(self.implementation, foreign_dtype=self.foreign_dtype, schedule=self.schedule)
        peer = PEERS[self.implementation]
        if not self.compiled:
            return of_problem(peer.function)
        return of_problem(torch.compile(peer.function, dynamic=dynamic, options=dict(peer.inductor_options)))

    def record(self) -> dict[str, Any]:
        """Who it is, for a result file."""
        fields = {name: short(value) for name in ("dtype", "foreign_dtype") if (value := getattr(self, name))}
        fields |= {"schedule": self.schedule} if self.schedule != "auto" else {}
        return {"name": self.name, "peer": self.is_peer, **fields}

    def bytes_needed(self, cell: Cell) -> int:
        """A rough upper bound of a training step's memory, to leave out what would exhaust it."""
        copies = PEERS[self.implementation].stream_copies if self.is_peer else 4
        return copies * cell.B * cell.M * cell.hidden_dims[0] * self.dtype.itemsize


def of_problem(peer: Callable[..., Any]) -> Trunk:
    """A peers.Trunk as a function of the problem."""

    def function(problem: Problem) -> Any:
        return peer(problem.x_local, problem.x_global, problem.scenario, problem.params)

    return function


EAGER_PEERS: Final = tuple(Contender(name) for name, peer in PEERS.items() if "cpu" in peer.devices)
COMPILED_PEERS: Final = tuple(replace(peer, compiled=True) for peer in EAGER_PEERS)
LOW_PRECISION_PEERS: Final = tuple(
    Contender("grouped", compiled=compiled, dtype=torch.bfloat16) for compiled in (False, True)
)
REFERENCE: Final = Contender("reference")
CPP: Final = Contender("cpp")
CPP_FOREIGN: Final = Contender("cpp", foreign_dtype=torch.bfloat16)
CPP_INT8: Final = Contender("cpp", foreign_dtype=torch.int8)
REFERENCE_INT8: Final = Contender("reference", foreign_dtype=torch.int8)
CPP_LOW_PRECISION: Final = Contender("cpp", dtype=torch.bfloat16)


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Product:
    """One matrix product of layer 1's size, all branches: the rate against which the trunk's is held."""

    library: str
    """"torch.mm" (the BLAS torch was built with), or "oneDNN"."""
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"product {self.library} {short(self.dtype)}"

    def record(self) -> dict[str, str]:
        """Which one it is, for a result file."""
        return {"name": self.name, "library": self.library, "dtype": short(self.dtype)}

    def call(self, cell: Cell) -> Callable[[], object]:
        """x (B, D_l + a_1) times w (D_l + a_1, M·d_1)."""
        K, N = cell.local_dim + cell.hidden_dims[0], cell.M * cell.hidden_dims[0]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(cell.B, K, generator=generator).to(self.dtype)
        w = torch.randn(N, K, generator=generator).to(self.dtype)
        if self.library == "oneDNN":
            return lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        w = w.t().contiguous()
        return lambda: torch.mm(x, w)


def products(dtypes: set[torch.dtype]) -> list[Product]:
    """Those that this torch has on this processor, and that do not take minutes."""
    found = []
    for dtype in sorted(dtypes, key=short):
        onednn = onednn_multiplies(dtype)
        found += [Product("torch.mm", dtype)] if onednn or dtype == torch.float32 else []
        found += [Product("oneDNN", dtype)] if onednn else []
    return found


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN does on this processor: bfloat16 from AVX-512 on only. Without it torch.mm is slow."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    one = torch.ones(1, 1, dtype=dtype)
    try:
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
    except RuntimeError:
        return False
    return True
