"""AtlasVid: ultra-high-resolution long video from a proxy and windowed detail (arXiv 2605.16649)."""

__version__ = "0.1.0"
