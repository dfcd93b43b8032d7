"""The model: embedding, pre-norm blocks of a mixer and a gated MLP, final norm, head."""

import math
from collections.abc import Sequence as Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.core.contracts import Sequence, SequenceMixer
from longtrain.model.config import ModelConfig


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        gate, value = self.input(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: SequenceMixer) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.mixer: SequenceMixer = mixer
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.mlp = GatedMLP(config.width, config.mlp_width)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.mixer(self.mixer_norm(x), sequence)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Tokens to the hidden states that the head reads; `streaming` applies the head, a few tokens at a time."""

    def __init__(self, config: ModelConfig, mixers: Collection[SequenceMixer], vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in mixers)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialize(config.initializer_std, len(mixers))

    def forward(self, tokens: Tensor, sequence: Sequence) -> Tensor:
        """[B, L] int64 -> [B, L, D]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, sequence)
        return self.norm(x)

    @property
    def layers(self) -> list[Block]:
        """In order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def flops_per_token(self, context: float) -> float:
        """Forward and backward floating-point operations for a token that sees `context` tokens on average."""
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        mixing = sum(layer.mixer.flops_per_token(context) for layer in self.layers)
        return 3 * (2 * linear + mixing)

    @torch.no_grad()
    def _initialize(self, std: float, num_layers: int) -> None:
        """Normal projections and embeddings; those that end a residual branch (named `output`) are scaled down with
        depth (Radford et al. 2019, section 2.3). Mixers initialise what else they have themselves."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_branch = name.rpartition(".")[2] == "output"
                module.weight.normal_(0.0, std / math.sqrt(2 * num_layers) if ends_branch else std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
