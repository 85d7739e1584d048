"""Sizes of blocks and tiles, in bytes, rows and columns. Limits of what users watch or keep stand elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

KEPT_BYTES = 2**29  # most bytes of a contrast's logits and numerators that are kept
BLOCK_BYTES = 2**22  # size of a block of kept scores; it fits into a cache
LONE_BLOCK_BYTES = 2**25  # size of a block that is computed again when it is needed; larger, for fast products
LEAST_ROWS = 64  # fewest rows of a block
TILE = 512  # rows and columns of a tile on the CPU, so that it fits into a cache
DEVICE_TILE = 8192  # rows and columns of a tile on other devices, which need large operations
PAIRS_AT_ONCE = 2**22  # pairs of rows whose logits, distances or masks are held at once
WIDE = 64  # most columns listed for an anchor; for more, a mask of the whole pool is cheaper
FEW = 4  # excluded columns whose distances to the pool are subtracted one after the other
CHUNK = 64  # columns of which the largest is found first
PADDING = 16  # numbers between rows: a power of two apart, all entries of a column would share a few lines of the cache
AUTOGRAD_MATRICES = 8  # matrices [anchors, pool] that autograd keeps for a weighted sum
LEAST_ROWS_AT_ONCE = 16  # of a block of tasks or distances in the plain path


def fits(anchors: Tensor, pool: Tensor, matrices: int = 2) -> bool:
    """Whether `matrices` matrices [anchors, pool] are small enough to be kept.

    Args:
        anchors: Embeddings [n, d].
        pool: The candidates [m, d].
        matrices: How many matrices of that shape: logits and numerators, or what autograd needs.

    Returns:
        True if they take at most 512 MiB.

    Examples:
        >>> fits(torch.zeros(64, 8), torch.zeros(1024, 8))
        True
    """
    return matrices * len(anchors) * len(pool) * pool.element_size() <= KEPT_BYTES


def blocks(count: int, row_bytes: int, kept: bool) -> list[slice]:
    """Returns slices that divide `count` rows of `row_bytes` bytes each into blocks.

    Args:
        count: The number of rows.
        row_bytes: The size of a row of scores, in bytes.
        kept: Whether the scores of all blocks are kept. Blocks have then 4 MiB, otherwise a little more than 32 MiB,
            and always at least 64 rows.

    Returns:
        The slices, in order.

    Examples:
        >>> blocks(100, row_bytes=2**16, kept=True)
        [slice(0, 64, None), slice(64, 100, None)]
    """
    # A little more than 32 MiB, not less: the allocator returns only such blocks to the system in one piece.
    step = max(LEAST_ROWS, BLOCK_BYTES // row_bytes if kept else LONE_BLOCK_BYTES // row_bytes + 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def blocks_of(anchors: Tensor, pool: Tensor) -> list[slice]:
    """Returns the blocks of anchors whose scores are computed at once.

    Args:
        anchors: Embeddings [n, d].
        pool: The candidates [m, d].

    Returns:
        Slices of the anchors, in order.

    Examples:
        >>> blocks_of(torch.zeros(100, 8), torch.zeros(2**16, 8))
        [slice(0, 64, None), slice(64, 100, None)]
    """
    return blocks(len(anchors), len(pool) * pool.element_size(), fits(anchors, pool))


def rows_at_once(width: int, least: int = 1) -> int:
    """Returns how many rows to work on at once, so that they form about 2^22 pairs with `width` others.

    Args:
        width: How many other rows each row is paired with.
        least: The smallest result.

    Returns:
        The number of rows, at least `least`.

    Examples:
        >>> rows_at_once(2**20)
        4
    """
    return max(least, PAIRS_AT_ONCE // width)


def is_wide(columns: Tensor) -> bool:
    """Whether more than 64 columns [n, k] are listed for each row. A mask of the whole pool is then cheaper.

    Examples:
        >>> is_wide(torch.zeros(4, 2)), is_wide(torch.zeros(4, 65))
        (False, True)
    """
    return columns.shape[1] > WIDE


def tile_size(rows: Tensor) -> int:
    """Returns how many rows and columns a tile of the products `rows @ rows.T` has on the device of the rows.

    Examples:
        >>> tile_size(torch.zeros(2048, 8))
        512
    """
    return TILE if rows.device.type == "cpu" else DEVICE_TILE


def tile_pairs(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields the tiles on and above the diagonal of `rows @ rows.T`, as pairs of slices (rows, columns).

    Examples:
        >>> [(rows.start, columns.start) for rows, columns in tile_pairs(torch.zeros(1024, 8))]
        [(0, 0), (0, 512), (512, 512)]
    """
    size, count = tile_size(rows), len(rows)
    tiles = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return ((rows, columns) for place, rows in enumerate(tiles) for columns in tiles[place:])
