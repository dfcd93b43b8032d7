"""StreamBP (Luo et al. 2025), where the package `streambp` is installed: the same weights, tokens and labels.

It streams Hugging Face's Llama a layer at a time in chunks, as `block1` does. Its parameters are views of ours, so that
nothing is held twice.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from longtrain.bench._report import installed, one_line
from longtrain.bench._stream_modes import Mode
from longtrain.bench._stream_plan import Plan
from longtrain.bench._stream_step import Step, Workload
from longtrain.core.layout import SequenceLayout
from longtrain.mixers import softmax
from longtrain.model.config import ModelConfig, parse_pattern
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.waiting import Watch

STREAMBP = Mode("streambp", 1, chunked=True, whole_logits=False)
_LONGEST = 2**31 - 1
_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_OF_LAYERS = {
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.output.weight": "mlp.down_proj.weight",
}


@dataclass(frozen=True, kw_only=True)
class StreamBP(Workload):
    """One rank's."""

    wrapped: Any
    """Its model."""
    views: dict[str, list[nn.Parameter]]
    """Of each of our parameters, those of the other model that it is cut into by rows."""

    @property
    def gradient_bytes(self) -> int:
        """In the parameters' own type."""
        return self.parameter_bytes

    def gradients(self, length: int, config: StreamConfig, watch: Watch | None = None) -> Step:
        """See `Workload.gradients`; it tells no phases."""
        tokens, labels = self._part(SequenceLayout(length, 1, ((0,),)))
        # There the logits of a token are compared with the label of the next one, and the first label is not used.
        shifted = torch.cat([tokens[:, :1], labels[:, :-1]], dim=1)
        self.wrapped.logits_chunk_size, self.wrapped.checkpoint_chunk_size = config.logit_tokens, config.chunk_tokens
        with self._autocast():
            found = self.wrapped(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),  # without it chunks after the first attend to the wrong keys
                labels=shifted,
                use_cache=False,
                output_attentions=False,
                output_hidden_states=False,
                return_dict=True,
            )
        return Step(found.loss.item() * _all_over_labelled(length))

    def clear(self) -> None:
        """See `Workload.clear`."""
        self.wrapped.zero_grad(set_to_none=True)

    def grads(self, length: int) -> dict[str, Tensor]:
        """See `Workload.grads`."""
        scale = _all_over_labelled(length)
        parts = {name: [view.grad for view in views] for name, views in self.views.items()}
        return {name: torch.cat([p for p in part if p is not None]) * scale for name, part in parts.items()}


def _all_over_labelled(length: int) -> float:
    """It divides by all tokens, although the last one has no label."""
    return length / (length - 1)


def missing(plan: Plan) -> str:
    """Why StreamBP is not measured; "" where it is."""
    if installed("streambp") is None:
        return "not installed"
    if plan.ranks > 1:
        return "of one rank alone"
    if set(parse_pattern(plan.job.config.model.pattern)) != {"softmax"}:
        return "of softmax layers alone"
    if plan.document_tokens is not None:
        return "of one document alone"
    return ""


def peers(plan: Plan, ours: Workload) -> Iterator[tuple[Mode, Workload | str]]:
    """Those that are measured beside our modes, or what it was that kept one from it."""
    if not plan.peers or missing(plan):
        return
    try:
        yield STREAMBP, _streambp(plan, ours)
    except Exception as error:  # whatever an installed version raises is a result
        yield STREAMBP, one_line(error)


def _streambp(plan: Plan, ours: Workload) -> StreamBP:
    config, options = plan.job.config.model, plan.job.config.mixer.options["softmax"]
    llama = _llama(config, options, plan.sizes.vocabulary, ours.device)
    views = {name: _assign(llama, name, p, options) for name, p in ours.model.named_parameters()}
    if config.tie_embeddings:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    wrapped = importlib.import_module("streambp.stream_model").StreamModel(llama, gradient_accumulation_steps=1)
    wrapped.gradient_checkpointing_enable()
    wrapped.train()
    given = {field.name: getattr(ours, field.name) for field in fields(Workload)}
    return StreamBP(**given, wrapped=wrapped, views=views)


def _llama(config: ModelConfig, options: softmax.Config, vocabulary: int, device: torch.device) -> Any:
    """Of our shape, without parameters yet."""
    transformers = importlib.import_module("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_key_value_heads,
        head_dim=options.head_dim,
        intermediate_size=config.mlp_width,
        rms_norm_eps=config.norm_epsilon,
        rope_theta=options.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=_LONGEST,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(shape)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config=shape, device=device)  # its buffer is no parameter
    return llama


def _assign(llama: nn.Module, name: str, parameter: nn.Parameter, options: softmax.Config) -> list[nn.Parameter]:
    views = []
    for target, rows in _parts(name, parameter.detach(), options):
        module, _, leaf = target.rpartition(".")
        views.append(nn.Parameter(rows))
        setattr(llama.get_submodule(module), leaf, views[-1])
    return views


def _parts(name: str, rows: Tensor, options: softmax.Config) -> list[tuple[str, Tensor]]:
    """A parameter of ours by the names that it has there."""
    if name in _NAMES:
        return [(_NAMES[name], rows)]
    _, number, own = name.split(".", 2)
    layer = f"model.layers.{number}."
    if own == "mixer.input.weight":
        heads = (options.num_heads, options.num_key_value_heads, options.num_key_value_heads)
        parts = rows.split([count * options.head_dim for count in heads])
        return [(f"{layer}self_attn.{part}_proj.weight", x) for part, x in zip("qkv", parts, strict=True)]
    if own == "mlp.input.weight":
        return [(f"{layer}mlp.{part}_proj.weight", x) for part, x in zip(("gate", "up"), rows.chunk(2), strict=True)]
    return [(layer + _OF_LAYERS[own], rows)]
