"""Composes `conf/` with a user's overrides and loads the result into frozen typed dataclasses.

The dataclasses themselves live beside what they configure; this package knows none of them.
"""
