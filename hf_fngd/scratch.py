"""Tables that may lie in a file instead of in memory."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from hf_fngd.errors import FNGDError

_MIB = 2**20


def zeros(rows: int, columns: int, dtype: torch.dtype, folder: str | os.PathLike | None) -> Tensor:
    """Makes a matrix of zeros, in memory or in a file of its own.

    The file has no name any more when this returns: no other process finds it, and nothing of it
    is left when the matrix is gone, however the process ends.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        dtype: Type of the entries.
        folder: Where the file is to lie; None for main memory.

    Returns:
        The matrix `[rows, columns]`.

    Raises:
        FNGDError: If there is no such folder, or no room in it.
    """
    count = rows * columns
    if folder is None or count == 0:
        return torch.zeros(rows, columns, dtype=dtype)
    size = count * dtype.itemsize
    try:
        descriptor, path = tempfile.mkstemp(prefix="hf_fngd-", dir=folder)
        try:
            # A mapped file that finds the disk full later ends the process (SIGBUS).
            os.posix_fallocate(descriptor, 0, size)
            table = torch.from_file(path, shared=True, size=count, dtype=dtype)
        finally:
            os.close(descriptor)
            os.unlink(path)
    except (OSError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not on this system"
        raise FNGDError(
            f"store_dir={str(folder)!r} cannot take the {size / _MIB:.0f} MiB of coefficients "
            f"({reason}): name a folder with room for them, leave store_dir out, or set "
            "share=layer or share=label, which need little"
        ) from None
    return table.view(rows, columns)
