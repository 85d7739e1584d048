"""How much is worked on at once: the one place that knows sizes, in bytes, rows and columns."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

KEPT_BYTES = 2**29  # up to which a contrast's logits and numerators are kept
BLOCK_BYTES = 2**22  # of a block of kept scores, so few that a cache holds them
LONE_BLOCK_BYTES = 2**25  # of a block that is worked out whenever it is needed: more, for the products' sake
LEAST_ROWS = 64  # of a block
TILE = 512  # rows and columns of what is mirrored at once on the CPU, whose caches hold few
DEVICE_TILE = 8192  # elsewhere, where each operation has to be a large one
PAIRS_AT_ONCE = 2**22  # of rows whose logits, distances or marks are held at once
WIDE = 64  # columns that are listed for an anchor, beyond which marks on the whole pool are cheaper


def fits(anchors: Tensor, pool: Tensor, matrices: int = 2) -> bool:
    """Whether so many matrices [anchors, pool] are kept: logits and numerators, or what autograd needs."""
    return matrices * len(anchors) * len(pool) * pool.element_size() <= KEPT_BYTES


def blocks(count: int, row_bytes: int, kept: bool) -> list[slice]:
    """Slices of `count` rows of `row_bytes` each, a block of scores at a time."""
    # Beyond, not up to, the latter: more than 32 MiB is given back to the system, less may be left in pieces.
    step = max(LEAST_ROWS, BLOCK_BYTES // row_bytes if kept else LONE_BLOCK_BYTES // row_bytes + 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def blocks_of(anchors: Tensor, pool: Tensor) -> list[slice]:
    """The blocks of anchors whose scores are worked out at once."""
    return blocks(len(anchors), len(pool) * pool.element_size(), fits(anchors, pool))


def rows_at_once(width: int, least: int = 1) -> int:
    """So many rows that their pairs with `width` others are about as many as are held at once."""
    return max(least, PAIRS_AT_ONCE // width)


def is_wide(columns: Tensor) -> bool:
    """Whether so many columns [n, k] are listed that marks on the whole pool are cheaper."""
    return columns.shape[1] > WIDE


def tile_size(rows: Tensor) -> int:
    """The rows and columns of a tile of the rows' products with each other."""
    return TILE if rows.device.type == "cpu" else DEVICE_TILE


def tile_pairs(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """The tiles, on and above the diagonal, of a square of the rows' products with each other."""
    size, count = tile_size(rows), len(rows)
    tiles = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return ((rows, columns) for place, rows in enumerate(tiles) for columns in tiles[place:])
