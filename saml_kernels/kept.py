"""What the C++ kernels keep between calls: laid out weights where it is asked for, and memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from saml_kernels import extension


@contextmanager
def keep_layouts() -> Iterator[None]:
    """While it lasts, calls without gradients keep the copies of weights that the C++ kernels lay out for themselves.

    A batch then reads them at once; up to 8 rows read float32 and float64 weights where they stand, and keep none of
    these. What is kept is as large as the parameters that are read, and is given back at the end of the last such
    block of the process. Kept are layouts of parameters: tensors that require a gradient, made outside inference mode,
    float32 or float64; not of what is computed for one call, such as weights that are widened from bfloat16 or STAR's
    products. A weight that has been written to since is laid out again: torch counts the writes of optimizers,
    ``load_state_dict`` and every operation in place. It does not count writes through ``.data``, through ``.numpy()``
    or by other libraries: leave the block before such a write, and enter it again.

    Results are the same bits as without it. All threads of the process are concerned. Without the extension, and for
    other backends, nothing happens.
    """
    keep = None if extension.EXTENSION_MISSING is not None else torch.ops.saml_kernels.keep_layouts
    if keep is not None:
        keep(True)
    try:
        yield
    finally:
        if keep is not None:
            keep(False)


def release_memory() -> int:
    """Gives the memory that the C++ kernels keep for calls to come back to the system.

    Results, gradients and what a step saves for its backward, in blocks of 1 MiB and more, are written into pages that
    stay with the process when the tensors are gone: the system takes longer to hand a page out than a kernel to fill
    it. What is kept and what is in use are together never more than what was in use at once since the last call of this
    function, and pages that some hundred steps did not need go back by themselves. SAML_KERNELS_KEEP_MEMORY=0 in the
    environment keeps nothing.

    Returns:
        Bytes given back; 0 without the extension.
    """
    if extension.EXTENSION_MISSING is not None:
        return 0
    released: int = torch.ops.saml_kernels.release_memory()
    return released
