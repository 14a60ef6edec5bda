"""A finished run as files that score rows without Python: the compiled network, its encoder as data, a manifest.

The network is exported by torch.export and compiled ahead of time by AOTInductor. The operators of saml_kernels stay
calls into their library, which is copied beside it: a C++ process loads both (examples/serve_cpp).
"""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from saml_kernels import extension
from saml_rec.console import say
from saml_rec.data.encoding import Encoder
from saml_rec.data.table import Batch
from saml_rec.errors import InputError
from saml_rec.evaluation.scoring import TrainedModel, load_trained
from saml_rec.files import check_output_file, replacing, write_json
from saml_rec.models.construction import backends_used, parameter_count
from saml_rec.models.fitted import FittedModel
from saml_rec.run_directory import RunDirectory, versions

FORMAT = 1
OUTPUTS = (("logit", "float32"), ("prediction", "float64"))
CHECKED_ROWS = (1, 7)
TOLERANCE = 1e-5
"""Of the compiled logits against the model's, relative to the largest."""


class Input(NamedTuple):
    """One tensor that the program takes.

    Args:
        name: scenario, dense, or features.<name>.
        dtype: of its numbers.
        width: None: (rows,); a number: (rows, width); a name: (rows, any), values of every row in order, then zeros.
    """

    name: str
    dtype: str
    width: int | str | None

    @property
    def shape(self) -> list[int | str]:
        return ["rows"] if self.width is None else ["rows", self.width]


class Scores(nn.Module):
    """A model as a function of tensors: logit (rows,) float32 and its sigmoid (rows,) float64, as predict gives it."""

    def __init__(self, model: nn.Module, features: Sequence[str]) -> None:
        super().__init__()
        self.model, self.features = model, tuple(features)

    def forward(self, scenario: Tensor, dense: Tensor, *ids: Tensor) -> tuple[Tensor, Tensor]:
        batch = {"scenario": scenario, "dense": dense, "features": dict(zip(self.features, ids, strict=True))}
        logit = self.model(batch).logit
        return logit, logit.double().sigmoid()


def inputs_of(encoder: Encoder) -> tuple[Input, ...]:
    """What the program takes, in order."""
    schema = encoder.schema
    single = [Input(f"features.{feature.name}", "int64", None) for feature in schema.of_kind("sparse")]
    ragged = [*schema.of_kind("multi"), *schema.of_kind("sequence")]
    several = [Input(f"features.{feature.name}", "int64", f"length of {feature.name}") for feature in ragged]
    return Input("scenario", "int64", None), Input("dense", "float32", encoder.dense_width), *single, *several


def tensors_of(encoder: Encoder, batch: Batch) -> tuple[Tensor, ...]:
    """A batch as the program takes it."""
    given = {"scenario": batch["scenario"], "dense": batch["dense"]}
    given |= {f"features.{name}": ids for name, ids in batch["features"].items()}
    return tuple(given[each.name] for each in inputs_of(encoder))


def program_of(model: nn.Module, encoder: Encoder) -> ExportedProgram:
    """The model in evaluation mode, for any number of rows and any length of bags and sequences."""
    inputs = inputs_of(encoder)
    scores = Scores(model, [each.name.removeprefix("features.") for each in inputs[2:]]).eval()
    rows = Dim("rows", min=1)
    lengths = {each.width: Dim(f"length{n}", min=1) for n, each in enumerate(inputs) if isinstance(each.width, str)}
    dims = [{0: rows} | ({1: lengths[each.width]} if each.width in lengths else {}) for each in inputs]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own
        given = _drawn(encoder, 3)
        return torch.export.export(scores, given, dynamic_shapes=(dims[0], dims[1], tuple(dims[2:])), strict=False)


def export(
    run: Path,
    out: Path,
    *,
    backend: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes a finished run's model as ``<out>``, its encoder as ``<stem>.encoder.json``, both described in
    ``<stem>.json``, and beside them the operators' library where the model calls it.

    Args:
        run: the run directory.
        out: a name that ends in .pt2; files of the same names are replaced.
        backend: of the kernels; None: as in training.
        console: where to say what is done; None prints nothing.

    Returns:
        The manifest, the content of ``<stem>.json``: docs/serving.md describes it.

    Raises:
        InputError: no finished run, a model that is no network, a name that does not end in .pt2, no C++ compiler.
        OSError: a file cannot be written.
    """
    if out.suffix != ".pt2":
        raise InputError(f"{out}: the name must end in .pt2")
    encoder_file, manifest_file = out.with_suffix(".encoder.json"), out.with_suffix(".json")
    for file in (out, encoder_file, manifest_file):
        check_output_file(file)
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(f"export compiles the model with a C++ compiler, and {compiler!r} is not there; set CXX")
    trained = load_trained(run, device="cpu", backend=backend)
    name = trained.content["options"]["model"]
    if isinstance(trained.model, FittedModel):
        raise InputError(f"model {name} is no network: export takes those that are trained by steps")
    say(console, "compiling the model ...")
    program = program_of(trained.model, trained.encoder)
    calls_operators = _calls_operators(program)
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compiled(program, Path(folder) / "model.pt2")
        _check(compiled, trained)
        _copy(compiled, out)
    write_json(encoder_file, trained.encoder.to_dict())
    files = {"model": out, "encoder": encoder_file}
    used = backends_used(trained.model, trained.device)
    if calls_operators:
        library = extension.library_path(torch.__version__)
        files["operators"] = out.with_name(library.name)
        _copy(library, files["operators"])
    manifest = {
        "format": FORMAT,
        "model": name,
        "parameters": parameter_count(trained.model),
        "inputs": [
            {"name": each.name, "dtype": each.dtype, "shape": each.shape} for each in inputs_of(trained.encoder)
        ],
        "outputs": [{"name": output, "dtype": dtype, "shape": ["rows"]} for output, dtype in OUTPUTS],
        "scenario": {"column": trained.schema.scenario, "names": list(trained.encoder.scenario_names)},
        "files": {kind: _described(path) for kind, path in files.items()},
        "trained": {"best_epoch": trained.content["best_epoch"], "sha256": _digest(RunDirectory(run).model)},
        "backend": used,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }
    write_json(manifest_file, manifest)
    return manifest


def _drawn(encoder: Encoder, rows: int) -> tuple[Tensor, ...]:
    """Inputs of random ids."""
    generator = torch.Generator().manual_seed(0)

    def drawn(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    schema = encoder.schema
    batch: dict[str, Any] = {
        "scenario": drawn(encoder.num_scenarios, rows),
        "dense": torch.randn(rows, encoder.dense_width, generator=generator),
        "features": {f.name: drawn(encoder.vocabulary_sizes[f.name], rows) for f in schema.of_kind("sparse")},
    }
    # Lengths that differ, so that no two of them are taken for one.
    for length, feature in enumerate((*schema.of_kind("multi"), *schema.of_kind("sequence")), start=rows + 1):
        batch["features"][feature.name] = drawn(encoder.vocabulary_sizes[feature.item or feature.name], rows, length)
    return tensors_of(encoder, batch)  # type: ignore[arg-type]


def _compiled(program: ExportedProgram, path: Path) -> Path:
    # Threads as many as the serving process wants, not as many as this one has.
    options = {"cpp.dynamic_threads": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    return path


def _check(compiled: Path, trained: TrainedModel) -> None:
    """RuntimeError unless the compiled program gives the model's scores."""
    program = torch._inductor.aoti_load_package(str(compiled))
    names = [each.name.removeprefix("features.") for each in inputs_of(trained.encoder)[2:]]
    for rows in CHECKED_ROWS:
        given = _drawn(trained.encoder, rows)
        with torch.no_grad():
            expected, _ = Scores(trained.model, names)(*given)
        found, _ = program(*given)
        distance = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
        if not distance <= TOLERANCE:
            raise RuntimeError(f"the compiled model's logits are {float(distance):.1e} from the model's; report this")


def _calls_operators(program: ExportedProgram) -> bool:
    # Under autocast's switch they stand in graphs of their own.
    graphs = (each.graph for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule))
    return any(getattr(node.target, "namespace", None) == "saml_kernels" for graph in graphs for node in graph.nodes)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as content, replacing(target) as file:
        shutil.copyfileobj(content, file)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _digest(path)}
