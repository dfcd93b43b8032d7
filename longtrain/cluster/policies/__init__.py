"""Failure policies, one module each: they decide, the controller acts."""
