"""Checkpoints: safetensors shards and a JSON manifest of digests, committed by an atomic rename. Never pickle."""
