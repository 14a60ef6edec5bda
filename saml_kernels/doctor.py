"""What this machine can run, and why not the rest."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from saml_kernels import __version__, extension
from saml_kernels.backends import BACKENDS, available_backends
from saml_kernels.backends.base import OPERATIONS


def machine() -> dict[str, str]:
    """Name → value of everything a result depends on: versions, processor, threads, GPU."""
    return {
        "saml-kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version() or "not installed",
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "gpu": _gpu(),
    }


def report() -> str:
    """Text for a person: the machine, the extension, and every backend's operations or the reason against them."""
    lines = ["Machine"]
    lines += [f"  {name:<15} {value}" for name, value in machine().items()]
    lines += ["", "Compiled extension"]
    info = extension.build_info()
    if info is None:
        lines += [f"  not available: {extension.EXTENSION_MISSING}"]
    else:
        cuda = info["cuda"] or f"left out: {info['cuda_omitted']}"
        lines += [
            f"  library         {extension.library_path(torch.__version__)}",
            f"  built for       torch {info['torch']}, compiler {info['compiler']}",
            f"  CUDA kernels    {cuda}",
            f"  CPU kernels     {', '.join(info['cpu_capabilities'])} (the first is used)",
        ]
    lines += ["", "Backends"]
    reasons = {operation: available_backends(operation) for operation in OPERATIONS}
    for backend in BACKENDS:
        lines.append(f"  {backend}")
        lines += [f"    {operation:<18} {reasons[operation][backend] or 'available'}" for operation in OPERATIONS]
    return "\n".join(lines)


def _triton_version() -> str | None:
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "none: the installed torch is a CPU build"
    if not torch.cuda.is_available():
        return "none: torch sees no GPU"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
