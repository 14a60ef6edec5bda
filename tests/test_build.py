"""The build: what setup.py decides, and that the packages work without what is optional."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from saml_kernels.backends.triton import availability

ROOT = Path(__file__).parent.parent


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("MAX_JOBS", "1")
    for name in ("SAML_KERNELS_SKIP_CUDA", "SAML_KERNELS_FORCE_CUDA", "SAML_KERNELS_WERROR"):
        monkeypatch.delenv(name, raising=False)
    return loaded(ROOT / "setup.py")


@pytest.fixture
def cuda_home(tmp_path: Path) -> str:
    """A toolkit of CUDA 13.0, as far as the build looks at it."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    nvcc.chmod(0o755)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart.so").touch()
    return str(tmp_path)


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_cuda_joins_in_with_torch_and_nvcc_alone(setup_py, cuda_home):
    assert setup_py.cuda_omitted("13.0", cuda_home) is None


@pytest.mark.parametrize(
    ("torch_cuda", "home", "reason"),
    [(None, "", "CPU build"), ("13.0", None, "nvcc"), ("13.0", "/nonexistent", "nvcc")],
)
def test_cuda_left_out_says_why(setup_py, torch_cuda, home, reason):
    assert reason in setup_py.cuda_omitted(torch_cuda, home)


def test_a_toolkit_for_another_torch_is_left_out(setup_py, cuda_home, monkeypatch):
    assert setup_py.cuda_omitted("13.2", cuda_home) is None
    omitted = setup_py.cuda_omitted("12.8", cuda_home)
    assert omitted == (
        f"the installed torch is built for CUDA 12.8, and nvcc in {cuda_home} is of CUDA 13.0 (set CUDA_HOME)"
    )
    monkeypatch.setenv("SAML_KERNELS_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA is set, but the installed torch is built for CUDA 12\.8"):
        setup_py.cuda_omitted("12.8", cuda_home)
    monkeypatch.delenv("SAML_KERNELS_FORCE_CUDA")
    Path(cuda_home, "bin", "nvcc").write_text("#!/bin/sh\nexit 1\n")
    assert "is of an unknown version" in setup_py.cuda_omitted("13.0", cuda_home)


def test_a_toolkit_without_cudart_is_left_out(setup_py, cuda_home, tmp_path, monkeypatch):
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    library = Path(cuda_home, "lib64", "libcudart.so")
    # What programs run with, but not what the linker takes.
    library.rename(library.with_name("libcudart.so.13"))
    assert setup_py.cuda_omitted("13.0", cuda_home).startswith(f"libcudart was not found in {cuda_home}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "libcudart.so").touch()
    monkeypatch.setenv("LIBRARY_PATH", str(elsewhere))
    assert setup_py.cuda_omitted("13.0", cuda_home) is None


def test_cuda_switches(setup_py, cuda_home, monkeypatch):
    monkeypatch.setenv("SAML_KERNELS_SKIP_CUDA", "1")
    assert "SKIP_CUDA" in setup_py.cuda_omitted("13.0", cuda_home)
    monkeypatch.setenv("SAML_KERNELS_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="exclude each other"):
        setup_py.cuda_omitted("13.0", cuda_home)
    monkeypatch.setenv("SAML_KERNELS_SKIP_CUDA", "0")
    assert setup_py.cuda_omitted("13.0", cuda_home) is None
    with pytest.raises(SystemExit, match="FORCE_CUDA is set, but the installed torch is a CPU build"):
        setup_py.cuda_omitted(None, cuda_home)
    monkeypatch.setenv("SAML_KERNELS_FORCE_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        setup_py.cuda_omitted("13.0", cuda_home)


@pytest.mark.parametrize(("memory", "jobs"), [(None, 8), (64 * 2**30, 8), (5 * 2**30, 2), (2**20, 1)])
def test_jobs_are_bounded_by_cores_and_memory(setup_py, monkeypatch, memory, jobs):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(setup_py, "available_memory", lambda: memory)
    assert setup_py.default_jobs() == jobs


def test_max_jobs_is_honoured(setup_py):
    assert os.environ["MAX_JOBS"] == "1"


def test_what_is_emulated_is_what_the_kernels_use():
    """Beyond AVX2; a compiler's intrinsic that is not emulated would stop `make sanitize`."""
    name = r"(?:_mm256_dp|_mm512_|_tile_)\w+"
    kernels = "".join(path.read_text() for path in (ROOT / "csrc/cpu/kernels").glob("*.h"))
    emulated = (ROOT / "tests/emulation/intrinsics.h").read_text()
    assert set(re.findall(rf"\b{name}", kernels)) == set(re.findall(rf"^#define ({name})", emulated, re.MULTILINE))


def test_every_folder_of_modules_is_packaged():
    # setup.py finds packages by their __init__.py: a folder without one would be left out of the wheel.
    folders = {module.parent for name in ("saml_kernels", "python/saml_rec") for module in (ROOT / name).rglob("*.py")}
    assert len(folders) > 4
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


WITHOUT_OPTIONAL = """
import sys
sys.modules["triton"] = None
import torch
import saml_kernels, saml_rec
from saml_kernels import doctor
layer = saml_kernels.layers.MultiBranchMLP(2, 3, 4, (5,))
scenario = torch.tensor([0, 1, 1])
assert layer(torch.ones(3, 3), torch.ones(3, 4), scenario).own.shape == (3, 5)
assert saml_kernels.group_by_scenario(scenario, 2).offsets.tolist() == [0, 1, 3]
try:
    saml_kernels.group_by_scenario(scenario, 2, backend="cpp")
except saml_kernels.BackendUnavailable as error:
    print(error)
print(doctor.report())
"""


def test_imports_and_computes_without_extension_and_triton(tmp_path):
    for name in ("saml_kernels", "python/saml_rec"):
        shutil.copytree(ROOT / name, tmp_path / Path(name).name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    hidden = run(sys.executable, "-c", WITHOUT_OPTIONAL, cwd=Path("/"), PYTHONPATH=str(tmp_path))
    assert hidden.returncode == 0, hidden.stderr
    assert hidden.stderr == ""
    assert (
        "backend 'cpp' cannot run group_by_scenario: the compiled extension saml_kernels._ops is not built"
        in hidden.stdout
    )
    assert re.search(r"triton +not installed", hidden.stdout)


def test_loads_no_cuda_and_no_triton_at_import():
    code = "import sys, saml_kernels, saml_rec; print('triton' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=Path("/")).stdout == "False\n"


def test_the_lowest_versions_are_the_same_everywhere():
    """Those that `make test-oldest` runs, that wheels are built for and that an old Triton is refused by."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = (ROOT / "Makefile").read_text()
    lowest = {
        name: re.search(rf"{name}>=([\d.]+)", " ".join(requirements))[1]
        for name, requirements in (
            ("torch", metadata["dependencies"]),
            ("triton", metadata["optional-dependencies"]["triton"]),
        )
    }
    for name, version in lowest.items():
        assert re.search(rf"^OLDEST_{name.upper()} := (\S+)$", makefile, re.MULTILINE)[1] == f"{version}.0"
    assert lowest["triton"] == availability.OLDEST
    releases = re.search(r"^ +torch: (\[.*\])$", (ROOT / ".github/workflows/wheels.yml").read_text(), re.MULTILINE)[1]
    first, *_, last = json.loads(releases)
    assert first == lowest["torch"]
    assert f"torch=={last}." in (ROOT / "constraints.txt").read_text()


@pytest.fixture
def join_wheels() -> ModuleType:
    return loaded(ROOT / ".github" / "join_wheels.py")


def packed(folder: Path, files: dict[str, str], version: str = "1.0") -> Path:
    """A wheel of the files, texts by their names."""
    content = folder / f"saml_kernels-{version}"
    described = {f"saml_kernels-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"}
    for name, text in (files | described).items():
        path = content / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert run(sys.executable, "-m", "wheel", "pack", str(content), "--dest-dir", str(folder)).returncode == 0
    (wheel,) = folder.glob("*.whl")
    return wheel


PYTHON = {"saml_kernels/a.py": "A = 1\n"}


def operators(release: str) -> dict[str, str]:
    return {f"saml_kernels/_ops.torch{release}.so": release}


def test_wheels_of_several_releases_of_torch_are_one(join_wheels, tmp_path):
    wheels = [packed(tmp_path / release, PYTHON | operators(release)) for release in ("2.8", "2.9", "2.13")]
    joined = join_wheels.join(wheels, tmp_path / "out" / "here")
    assert joined == tmp_path / "out" / "here" / wheels[0].name
    with zipfile.ZipFile(joined) as archive:
        record = archive.read("saml_kernels-1.0.dist-info/RECORD").decode()
        for release in ("2.8", "2.9", "2.13"):
            name = f"saml_kernels/_ops.torch{release}.so"
            assert archive.read(name).decode() == release
            assert f"{name},sha256=" in record
        assert archive.read("saml_kernels/a.py").decode() == PYTHON["saml_kernels/a.py"]
        assert len(archive.namelist()) == 6


@pytest.mark.parametrize(
    ("second", "version", "message"),
    [
        (PYTHON | operators("2.8"), "1.0", r"saml_kernels/_ops\.torch2\.8\.so is in several wheels"),
        ({"saml_kernels/a.py": "A = 2\n"} | operators("2.9"), "1.0", r"saml_kernels/a\.py differs between wheels"),
        (operators("2.9"), "1.0", r"saml_kernels/a\.py differs between wheels"),
        (PYTHON | operators("2.9") | {"saml_kernels/b.py": ""}, "1.0", r"saml_kernels/b\.py differs between wheels"),
        (PYTHON | operators("2.9"), "1.1", r"wheels must have one name, got .*-1\.0-.*-1\.1-"),
    ],
)
def test_wheels_that_are_no_one_package(join_wheels, tmp_path, second, version, message):
    wheels = [packed(tmp_path / "1", PYTHON | operators("2.8")), packed(tmp_path / "2", second, version)]
    with pytest.raises(ValueError, match=f"^{message}"):
        join_wheels.join(wheels, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_torch_the_build_says_what_to_do(tmp_path):
    hide_torch = tmp_path / "torch.py"
    hide_torch.write_text("raise ImportError('hidden')")
    built = run(sys.executable, "setup.py", "-q", "build_ext", PYTHONPATH=str(tmp_path))
    assert built.returncode != 0
    assert "pip install --no-build-isolation" in built.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    "architecture", ["90", pytest.param("80", marks=pytest.mark.slow), pytest.param("100", marks=pytest.mark.slow)]
)
def test_cuda_sources_compile_without_a_gpu(tmp_path, architecture):
    """To machine code, with warnings as errors; nothing spills. torch's CPU build has the headers all the same."""
    headers = [f"-isystem={path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    if not any(Path(path, "c10/cuda/CUDAGuard.h").exists() for path in cpp_extension.include_paths()):
        pytest.skip("this torch has no headers for CUDA")
    # All but this one, which the CUDA build of torch generates.
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        compiled = run(
            *("nvcc", "-std=c++20", "-O3", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"),
            *("-Xcompiler=-Wall,-Wextra,-Werror", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"),
            *(*headers, f"-isystem={tmp_path}", str(source), "-o", str(tmp_path / "kernels.cubin")),
        )
        assert compiled.returncode == 0, compiled.stderr
        spills = re.findall(r"(\d+) bytes spill", compiled.stderr)
        assert spills
        assert set(spills) == {"0"}


@pytest.mark.slow
def test_sdist_builds_the_wheel_and_the_wheel_works(setup_py, tmp_path):
    """Source distribution from the tree, wheel from the source distribution, use in another environment."""
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")

    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    page = {f"saml_rec/comparison/report_page/report.{suffix}" for suffix in ("html.jinja", "css")}
    sources = {f"python/{file}" for file in {"saml_rec/cli/__init__.py", *page}}
    assert {"csrc/ops.cpp", "csrc/grouping.h", "csrc/cuda/grouping.cu", "LICENSE", *sources} <= names
    # For every Python, and stripped.
    assert "-py3-none-" in wheel.name
    content = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
    (library,) = (name for name in content if name.startswith("saml_kernels/_ops."))
    assert library == f"saml_kernels/_ops.torch{setup_py.release(torch.__version__)}.so"
    assert content[library] < 3_000_000
    with zipfile.ZipFile(wheel) as archive:
        assert b".symtab" not in archive.read(library)
    assert {
        "saml_rec/cli/__init__.py",
        "saml_rec/comparison/report_page/report.html.jinja",
        "saml_rec/comparison/report_page/report.css",
        "saml_kernels/py.typed",
        "saml_rec/py.typed",
    } <= set(content)
    assert not any(name.startswith(("tests/", "csrc")) for name in content)

    # The other environment shares torch and the like; only what the wheel brings must come from the wheel.
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    installed = run(str(environment / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    assert installed.returncode == 0, installed.stderr
    shared = next(path for path in sys.path if path.endswith("site-packages"))
    doctor = run(
        str(environment / "bin" / "saml-rec"), "doctor", cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(site), shared])
    )
    assert doctor.returncode == 0, doctor.stderr
    assert re.search(r"group_by_scenario +available", doctor.stdout.split("cpp")[1])
