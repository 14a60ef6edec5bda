"""Which rows of a data set are trained on, drawn so that anybody draws them alike."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest


def drawn_splits(keys: Sequence[str], shares: Mapping[str, float]) -> dict[str, str]:
    """By key its split: in the order of the keys' SHA-256, so many for each as ``shares`` says, the others "test"."""
    drawn = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
    chosen = [split for split, share in shares.items() for _ in range(round(share * len(keys)))]
    return dict(zip_longest(drawn, chosen, fillvalue="test"))
