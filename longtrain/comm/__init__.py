"""Mesh and autograd-aware collectives: with engine and checkpoint the only code that imports torch.distributed."""
