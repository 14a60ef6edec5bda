"""Builds the operators, saml_kernels/_ops.torch<release>.so, and installs saml_kernels and saml_rec as one wheel.

The library has no symbol of Python's: one file serves every Python, and a C++ process. It is built for one release of
torch, whose name it bears, so that a wheel can hold several.

Environment variables (docs/building.md explains each):
    SAML_KERNELS_SKIP_CUDA=1    leave the CUDA sources out
    SAML_KERNELS_FORCE_CUDA=1   fail instead of leaving them out
    SAML_KERNELS_WERROR=1       compiler warnings are errors
    TORCH_CUDA_ARCH_LIST        CUDA architectures; a GPU need not be visible
    MAX_JOBS                    parallel compile jobs
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
LIBRARY = "saml_kernels._ops"
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"
# A translation unit that includes the torch headers peaks at about this much.
BYTES_PER_JOB = 2 * 1024**3


def release(version: str) -> str:
    """The part of torch's version within which its C++ interface stays: 2.13 of 2.13.1+cu130."""
    return ".".join(version.split(".")[:2])


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"saml-kernels: {name} must be 0 or 1, got {value!r}")
    return value == "1"


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def default_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = available_memory()
    return max(1, cores if memory is None else min(cores, memory // BYTES_PER_JOB))


def cuda_omitted(torch_cuda: str | None, cuda_home: str | None) -> str | None:
    """None when the CUDA sources can be built, else why they are left out. Never looks for a GPU."""
    skip, force = switch("SAML_KERNELS_SKIP_CUDA"), switch("SAML_KERNELS_FORCE_CUDA")
    if skip and force:
        raise SystemExit("saml-kernels: SAML_KERNELS_SKIP_CUDA and SAML_KERNELS_FORCE_CUDA exclude each other")
    if skip:
        reason = "SAML_KERNELS_SKIP_CUDA is set"
    elif torch_cuda is None:
        reason = "the installed torch is a CPU build"
    elif cuda_home is None or not (Path(cuda_home) / "bin" / "nvcc").exists():
        reason = "nvcc was not found (set CUDA_HOME)"
    elif (toolkit := toolkit_version(cuda_home)) is None or toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        reason = (
            f"the installed torch is built for CUDA {torch_cuda}, and nvcc in {cuda_home} is of "
            f"{'an unknown version' if toolkit is None else f'CUDA {toolkit}'} (set CUDA_HOME)"
        )
    elif not has_cudart(cuda_home):
        reason = f"libcudart was not found in {cuda_home} (install the toolkit's cudart, or set CUDA_HOME)"
    else:
        return None
    if force:
        raise SystemExit(f"saml-kernels: SAML_KERNELS_FORCE_CUDA is set, but {reason}")
    return reason


def toolkit_version(cuda_home: str) -> str | None:
    """What its nvcc says: 13.0; None where it does not run or says nothing of the kind."""
    try:
        command = [str(Path(cuda_home) / "bin" / "nvcc"), "--version"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else None


def has_cudart(cuda_home: str) -> bool:
    """Whether the linker will find it: in the toolkit's folders, or in those of LIBRARY_PATH."""
    folders = ("lib64", "lib", "lib/*-linux-gnu", "targets/*/lib", "lib/x64")
    inside = (path for folder in folders for path in Path(cuda_home).glob(f"{folder}/*cudart*"))
    named = (Path(folder) for folder in os.environ.get("LIBRARY_PATH", "").split(os.pathsep) if folder)
    found = (*inside, *(path for folder in named for path in folder.glob("libcudart*")))
    # Not libcudart.so.13 alone, which runs programs and links none.
    return any(path.name in ("libcudart.so", "cudart.lib") for path in found)


def extension_arguments() -> dict[str, Any]:
    """ext_modules and cmdclass for setup()."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return missing_torch_arguments()

    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    omitted = cuda_omitted(torch.version.cuda, cpp_extension.CUDA_HOME)
    macros = [("SAML_KERNELS_TORCH_VERSION", f'"{torch.__version__}"')]
    # Python's own flags may ask for debug information: 17.7 MB instead of 1.6.
    compile_flags = ["-g0", "-fvisibility=hidden"]
    # Comparisons that might trap make GCC keep exp's bounds as branches, and no loop over a sigmoid vectorises.
    compile_flags += ["-std=c++20", "-O3", "-fno-trapping-math", "-Wall", "-Wextra"]
    # torch's own headers warn; as system headers they stay silent and ours do not hide behind them.
    compile_flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    # at::parallel_for is a header: compiled without OpenMP it runs on one thread and says nothing. The library is the
    # one that torch has loaded already, under the same name.
    openmp = ["-fopenmp"] if sys.platform == "linux" and torch.backends.openmp.is_available() else []
    compile_flags += openmp
    link_flags = [*openmp, "-Wl,--strip-all"] if sys.platform == "linux" else openmp
    cuda_flags = ["-std=c++20", "-O3", "-lineinfo", *(f"-isystem={path}" for path in cpp_extension.include_paths())]
    if switch("SAML_KERNELS_WERROR"):
        compile_flags.append("-Werror")
        cuda_flags += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]

    if omitted is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
        macros.append(("SAML_KERNELS_CUDA", f'"{torch.version.cuda}"'))
        library = cpp_extension.CUDAExtension(
            LIBRARY,
            sources("*.cpp", "cpu/*.cpp", "cuda/*.cu"),
            define_macros=macros,
            extra_compile_args={"cxx": compile_flags, "nvcc": cuda_flags},
            extra_link_args=link_flags,
        )
    else:
        print(
            f"saml-kernels: building without CUDA kernels: {omitted}; SAML_KERNELS_FORCE_CUDA=1 makes this an error",
            file=sys.stderr,
        )
        macros.append(("SAML_KERNELS_CUDA_OMITTED", f'"{omitted}"'))
        library = cpp_extension.CppExtension(
            LIBRARY,
            sources("*.cpp", "cpu/*.cpp"),
            define_macros=macros,
            extra_compile_args={"cxx": compile_flags},
            extra_link_args=link_flags,
        )
    library.libraries.remove("torch_python")

    class BuildLibrary(cpp_extension.BuildExtension):
        """Builds a plain shared library, not a Python module."""

        def get_ext_filename(self, fullname: str) -> str:
            return str(Path(*fullname.split("."))) + f".torch{release(torch.__version__)}.so"

        def get_export_symbols(self, extension: Extension) -> list[str]:
            return []

    return {"ext_modules": [library], "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": AnyPython}}


class AnyPython(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def missing_torch_arguments() -> dict[str, Any]:
    """Source distributions and metadata need no torch; compiling says what to do."""

    class MissingTorch(build_ext):
        def run(self) -> None:
            raise SystemExit(
                "saml-kernels: torch is not installed in the build environment. Install torch, setuptools and "
                "ninja first, then build against them: pip install --no-build-isolation ."
            )

    return {"ext_modules": [Extension(LIBRARY, sources("*.cpp"))], "cmdclass": {"build_ext": MissingTorch}}


setup(
    packages=[*find_packages(include=["saml_kernels", "saml_kernels.*"]), *find_packages("python")],
    package_dir={"saml_kernels": "saml_kernels", "saml_rec": "python/saml_rec"},
    package_data={"": ["py.typed", "*.jinja", "*.css"]},
    **extension_arguments(),
)
