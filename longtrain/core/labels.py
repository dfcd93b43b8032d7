"""The convention between data and objectives."""

IGNORED_LABEL = -100
"""Label of a token at which nothing is to be predicted (torch.nn.functional.cross_entropy's own default)."""
