"""Shape legend. Dimension names in docstrings across the project:

B  sequences of a batch          T  tokens of the whole sequence     L  tokens of it that one rank holds
H  heads                         G  key/value heads                  N  chunks
K  key (and query) head width    V  value head width                 D  model width
C  tokens of a chunk             P  sequence-parallel ranks          W  taps of a convolution

An axis is a dimension of the mesh of ranks (data, sequence); a dim is a dimension of a tensor.
"""
