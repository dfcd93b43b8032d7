"""longtrain_kernels: local compute, one folder per operation, each with the slow definition beside the fast forms.

Imports nothing of longtrain. Single-device mathematics on plain tensors: B sequences, L tokens, H heads, K key
width, V value width.
"""
