"""Sizes that files and the compiled kernel share with the tensor functions."""

BAND = 64
"""Rows, or columns where the inputs lie along the rows, that make a band; the first band starts at 0."""

OCTAVES, PARTS = 16, 4
"""Levels of the shares: a share under 2**-OCTAVES counts as the lowest."""

TABLE_BITS = 20
"""The table of random numbers has 2**20 places: 4 MiB as int32."""

SEGMENT = 4096
"""Columns that are read from consecutive places of the table."""

USUAL = 2.0**-50, 2.0**50
"""The sizes of numbers whose products and quotients by a unit are normal, too."""

BLOCK_ELEMENTS = 3 << 17
"""Elements that are worked on at a time: a block's few float32 buffers then stay in a core's cache."""

BLOCK_COLUMNS = 512
"""Columns of a block, at most: products of a low rank are a fifth faster than with thousands."""

SMALL_ELEMENTS = 1 << 17
"""Elements up to which parts cost more than they save."""
