"""Optimizer and parameter sharding."""
