"""Where documents and examples come from, one file each; `longtrain.data.source` has the contract."""
