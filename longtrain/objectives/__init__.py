"""Objectives, one file each: `Config` and `Objective`; they return sums and counts, never means."""
