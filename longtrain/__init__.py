"""longtrain: distributed long-context training on Ray. Start at README.md; `longtrain --help` lists the commands."""

__version__ = "0.1.0"
