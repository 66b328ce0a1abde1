"""Memory that the system hands out as it fills."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

from taper.errors import DoesNotFitError


def anonymous(num_bytes: int, huge_pages: bool = False) -> npt.NDArray[np.uint8]:
    """Zeros whose pages become resident when they are first written, so that a large capacity costs address
    space only. The map dies with the array.

    Args:
        num_bytes: at least 1.
        huge_pages: ask for pages of 2 MiB where the system has them: fewer misses of the address cache, and
            memory that grows in such steps.

    Raises:
        DoesNotFitError: when the system refuses the address space.
    """
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise DoesNotFitError(
            f"the KV cache needs {num_bytes} bytes, which the system refuses ({error})",
            hint="ask for a smaller context",
        ) from error
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if huge_pages and advice is not None:
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(advice)
    return np.frombuffer(pages, dtype=np.uint8)
