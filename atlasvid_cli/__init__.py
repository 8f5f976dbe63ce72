"""AtlasVid: ultra-high-resolution long video from a proxy and windowed detail (arXiv 2605.16649)."""

import os

__version__ = "0.1.0"

# Before torch allocates: with huge pages a 4K convolution takes two thirds of the time (docs/LOG.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
