"""The table that the families share: blocks of grouped-query attention and a gated feed-forward, dense or of experts.

What differs is in the shape (biases, norms, experts) and in `Names`, the Hugging Face names.
"""

from __future__ import annotations

from dataclasses import dataclass

from nla_megatron.conversion.rules import Part, Rule
from nla_megatron.types import ModelShape


@dataclass(frozen=True)
class Names:
    """Names within a Hugging Face block.

    Args:
        before_mlp: the norm before the feed-forward.
        after_attention, after_mlp: the norms behind, where the shape has sandwich norms.
        router, expert: of a mixture; `{}` is the expert's number.
        gate, up, down: the matrices of a feed-forward or of an expert.
    """

    before_mlp: str = "post_attention_layernorm"
    after_attention: str = "post_attention_layernorm"
    after_mlp: str = "post_feedforward_layernorm"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class _Block:
    """The prefixes of one block on both sides."""

    ours: str
    theirs: str

    def vector(self, ours: str, theirs: str, width: int) -> Rule:
        """A replicated vector: a norm, or the bias of a row-parallel layer."""
        return Rule(self.ours + ours, (width,), (Part(self.theirs + theirs),), vector=True)


def decoder_rules(shape: ModelShape, with_head: bool, names: Names = Names()) -> list[Rule]:
    """Embedding, blocks in order, then the final norm and output layer where there is a head."""
    embedding = (shape.padded_vocab_size, shape.hidden_size)
    embed = Part("model.embed_tokens.weight")
    table = [Rule("embedding.word_embeddings.weight", embedding, (embed,), tp_axis=0, rows=shape.vocab_size)]
    for number in range(shape.num_layers):
        block = _Block(f"decoder.layers.{number}.", f"model.layers.{number}.")
        feed_forward = _dense if shape.experts is None else _mixture
        table += [*_norms(shape, block, names), *_attention(shape, block), *feed_forward(shape, block, names)]
    if with_head:
        norm = Part("model.norm.weight")
        table.append(Rule("decoder.final_layernorm.weight", (shape.hidden_size,), (norm,), vector=True))
        tied = shape.tied_embeddings
        head = embed if tied else Part("lm_head.weight")
        table.append(Rule("output_layer.weight", embedding, (head,), tp_axis=0, rows=shape.vocab_size, alias=tied))
    return table


def _norms(shape: ModelShape, block: _Block, names: Names) -> list[Rule]:
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": names.before_mlp}
    if shape.sandwich_norms:
        norms["self_attention.linear_proj.post_layernorm"] = names.after_attention
        norms["mlp.linear_fc2.post_layernorm"] = names.after_mlp
    table = [block.vector(f"{our}.weight", f"{their}.weight", shape.hidden_size) for our, their in norms.items()]
    if shape.qk_norm:
        for one in "qk":
            name = f"self_attention.{one}_layernorm.weight", f"self_attn.{one}_norm.weight"
            table.append(block.vector(*name, shape.head_dim))
    return table


def _attention(shape: ModelShape, block: _Block) -> list[Rule]:
    ours, theirs = f"{block.ours}self_attention.", f"{block.theirs}self_attn."
    d, width, groups = shape.hidden_size, shape.head_dim, shape.num_kv_heads
    per_group = shape.num_heads // groups
    view = (groups, per_group + 2, width)

    def projections(kind: str) -> tuple[Part, Part, Part]:
        q, k, v = (f"{theirs}{one}_proj.{kind}" for one in "qkv")
        return Part(q, per_group), Part(k), Part(v)

    table = [
        Rule(f"{ours}linear_qkv.weight", (*view, d), projections("weight"), tp_axis=0, slot_axis=1),
        Rule(f"{ours}linear_proj.weight", (d, shape.num_heads * width), (Part(f"{theirs}o_proj.weight"),), tp_axis=1),
    ]
    if shape.qkv_bias:
        table.append(Rule(f"{ours}linear_qkv.bias", view, projections("bias"), tp_axis=0, slot_axis=1, vector=True))
    if shape.output_bias:
        table.append(block.vector("self_attention.linear_proj.bias", "self_attn.o_proj.bias", d))
    if shape.sinks:
        sinks = Part(f"{theirs}sinks")
        table.append(Rule(f"{ours}core_attention.softmax_offset", (shape.num_heads,), (sinks,), tp_axis=0, vector=True))
    return table


def _dense(shape: ModelShape, block: _Block, names: Names) -> list[Rule]:
    table = _gated(shape.hidden_size, shape.ffn_hidden_size, f"{block.ours}mlp.", f"{block.theirs}mlp.", names)
    if shape.mlp_bias:
        parts = tuple(Part(f"{block.theirs}mlp.{name}.bias") for name in (names.gate, names.up))
        view = (2, shape.ffn_hidden_size)
        table.append(Rule(f"{block.ours}mlp.linear_fc1.bias", view, parts, tp_axis=1, slot_axis=0, vector=True))
        table.append(block.vector("mlp.linear_fc2.bias", f"mlp.{names.down}.bias", shape.hidden_size))
    return table


def _mixture(shape: ModelShape, block: _Block, names: Names) -> list[Rule]:
    experts, d = shape.experts, shape.hidden_size
    assert experts is not None
    router = Part(f"{block.theirs}{names.router}.weight")
    table = [Rule(f"{block.ours}mlp.router.weight", (experts.count, d), (router,))]
    for number in range(experts.count):
        ours = f"{block.ours}mlp.experts.local_experts.{number}."
        theirs = f"{block.theirs}{names.expert.format(number)}."
        table += _gated(d, experts.ffn_hidden_size, ours, theirs, names, number)
    return table


def _gated(d: int, ffn: int, ours: str, theirs: str, names: Names, expert: int | None = None) -> list[Rule]:
    gate, up, down = (Part(f"{theirs}{name}.weight") for name in (names.gate, names.up, names.down))
    return [
        Rule(f"{ours}linear_fc1.weight", (2, ffn, d), (gate, up), tp_axis=1, slot_axis=0, expert=expert),
        Rule(f"{ours}linear_fc2.weight", (d, ffn), (down,), tp_axis=1, expert=expert),
    ]
