"""How the sequence axis is cut over ranks: one file per algorithm and verb, and the handle that mixers see."""
