"""Joins wheels of this package, each built against another release of torch, into one that serves all of them.

    python .github/join_wheels.py WHEEL WHEEL ... --out DIRECTORY

What they differ in are the operators, saml_kernels/_ops.torch<release>.so, of which a process loads that of its torch.
"""

import argparse
import filecmp
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

OPERATORS = re.compile(r"saml_kernels/_ops\.torch[\d.]+\.so")


def join(wheels: Sequence[Path], out: Path) -> Path:
    """The joined wheel, in ``out``, named as the wheels are.

    Raises:
        ValueError: wheels have other names than one another, the operators of one release, or files that differ.
    """
    if len({wheel.name for wheel in wheels}) != 1:
        raise ValueError(f"wheels must have one name, got {', '.join(sorted({wheel.name for wheel in wheels}))}")
    with tempfile.TemporaryDirectory() as folder:
        first, *others = [_unpacked(wheel, Path(folder) / str(number)) for number, wheel in enumerate(wheels)]
        for other in others:
            for name in sorted(_files(first) | _files(other)):
                if OPERATORS.fullmatch(name) and (other / name).exists():
                    if (first / name).exists():
                        raise ValueError(f"{name} is in several wheels")
                    shutil.copy2(other / name, first / name)
                elif not OPERATORS.fullmatch(name) and not _same(first / name, other / name):
                    raise ValueError(f"{name} differs between wheels")
        out.mkdir(parents=True, exist_ok=True)
        _wheel("pack", str(first), "--dest-dir", str(out))
    return out / wheels[0].name


def _unpacked(wheel: Path, folder: Path) -> Path:
    _wheel("unpack", str(wheel), "--dest", str(folder))
    (unpacked,) = folder.iterdir()
    return unpacked


def _files(folder: Path) -> set[str]:
    """All but the list of files, which packing makes again."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not name.endswith(".dist-info/RECORD")}


def _same(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def _wheel(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "wheel", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        print(join(given.wheels, given.out))
    except ValueError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
