"""Exact backpropagation in blocks of layers and chunks of time, so that memory does not grow with all of both."""
