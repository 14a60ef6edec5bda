"""Files that are nearly right: those of a corpus with bits flipped, pieces lost, doubled, or of another put in."""

import io
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"


def corpus(kind: str) -> dict[str, bytes]:
    """The files of ``corpus/kind`` by their names."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / kind).iterdir())}


@st.composite
def mutated(draw: st.DrawFn, files: Sequence[bytes], tokens: Sequence[bytes] = (b"",), most: int = 5) -> bytes:
    """One of the files after up to ``most`` changes, at least one; ``tokens`` mean something in such files."""
    content = draw(st.sampled_from(files))
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        head, piece, tail = content[:start], content[start:end], content[end:]
        match draw(st.sampled_from(["flip", "token", "token", "bytes", "lose", "double", "cut", "splice"])):
            case "flip":
                bits = bytes([1 << draw(st.integers(0, 7))])
                content = head + bytes([piece[0] ^ bits[0]]) + piece[1:] + tail if piece else content + bits
            case "token":
                content = head + draw(st.sampled_from(tokens)) + draw(st.sampled_from([piece, b""])) + tail
            case "bytes":
                content = head + draw(st.binary(max_size=8)) + draw(st.sampled_from([piece, b""])) + tail
            case "lose":
                content = head + tail
            case "double":
                content = head + piece * draw(st.sampled_from([2, 3, 50])) + tail
            case "cut":
                content = draw(st.sampled_from([head, tail]))
            case "splice":
                other = draw(st.sampled_from(files))
                content = head + other[draw(st.integers(0, len(other))) :]
    return content


@st.composite
def flipped(draw: st.DrawFn, content: bytes, parts: Sequence[range] = (), most: int = 3) -> bytes:
    """Of the same length, with one to ``most`` bits that are others: what formats notice least.

    Each lies anywhere, or in one of some parts, of which a short one is as likely as a long one.
    """
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(draw(st.sampled_from([range(len(content)), *parts]))))
        changed[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def entries(archive: bytes) -> list[range]:
    """Where the contents of a zip archive's entries lie that are not compressed."""
    found = []
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        for entry in file.infolist():
            name, extra = struct.unpack_from("<HH", archive, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            found.append(range(start, start + entry.file_size))
    return [part for part in found if part]
