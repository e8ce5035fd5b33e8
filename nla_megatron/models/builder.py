"""From a model's shape and a parallel layout to Megatron's configuration and layer specification."""

from __future__ import annotations

from typing import Any

import torch

from nla_megatron.errors import LayoutError
from nla_megatron.parallel.world import World
from nla_megatron.types import ModelShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_layout(shape: ModelShape, tp: int, pp: int) -> None:
    """Raises LayoutError where heads, groups, vocabulary or blocks do not fit the layout."""
    cut = {
        "attention heads": shape.num_heads,
        "key/value heads": shape.num_kv_heads,
        "feed-forward columns": shape.ffn_hidden_size,
        "vocabulary rows (padded)": shape.padded_vocab_size,
    }
    for name, size in cut.items():
        if size % tp:
            raise LayoutError(
                f"{size} {name} at parallel.tp={tp}", f"a tp that divides {size}", "choose another parallel.tp"
            )
    if shape.num_layers < pp:
        raise LayoutError(
            f"{shape.num_layers} blocks at parallel.pp={pp}",
            "at least one block for each pipeline stage",
            "lower parallel.pp",
        )


def blocks_per_stage(num_layers: int, pp: int) -> list[int]:
    """Blocks of each pipeline stage, the first stages taking the remainder: 3 over 2 stages is [2, 1]."""
    return [num_layers // pp + (stage < num_layers % pp) for stage in range(pp)]


def transformer_config(shape: ModelShape, world: World, dtype: torch.dtype) -> Any:
    """megatron-core's TransformerConfig for this shape on this layout."""
    from megatron.core.transformer import TransformerConfig

    check_layout(shape, world.tp, world.pp)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=world.tp,
        pipeline_model_parallel_size=world.pp,
        pipeline_model_parallel_layout=_pipeline_layout(shape.num_layers, world.pp),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # The master weight is drawn whole and split: no two TP ranks start with the same shard.
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _pipeline_layout(num_layers: int, pp: int) -> list[list[str]] | None:
    if pp == 1:
        return None
    stages = [["decoder"] * blocks for blocks in blocks_per_stage(num_layers, pp)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def layer_spec(shape: ModelShape) -> Any:
    """Megatron's local layers with SDPA as core attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from nla_megatron.models.attention import SdpaCoreAttention

    spec = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return spec


def placed(model: torch.nn.Module, world: World, dtype: str) -> None:
    """Move a built model to its device with every parameter in `dtype`: torch's own norms are built in fp32."""
    model.to(world.device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
