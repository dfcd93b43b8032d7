"""Sequence mixers, one file each: single-device mathematics over the three-verb `Sequence` handle.

A mixer module defines `Config` (a frozen dataclass) and `Mixer` (an nn.Module).
"""
