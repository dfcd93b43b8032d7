"""Token store, packing, deterministic order, tokenizers: the only code that imports pyarrow."""
