"""Embedding, blocks, head. `build.py` is the only place where a mixer meets a sequence-parallel algorithm."""
