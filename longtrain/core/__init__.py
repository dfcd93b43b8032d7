"""Contracts, shape legend, errors, units, the registry of components. Imports nothing of ours but longtrain_kernels."""
