"""From a model's shape and a parallel layout to Megatron's configuration and layer specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nla_megatron.models.attention import RotaryAttention, SdpaCoreAttention
from nla_megatron.models.builder import Layout, blocks_per_chunk, check_layout
from nla_megatron.models.interventions import Changes
from nla_megatron.models.layers import NormedRowParallelLinear, RmsNorm, biased, gelu_tanh
from nla_megatron.models.quantized import NF4, NONE, in_nf4
from nla_megatron.models.rotary import RotaryTables
from nla_megatron.parallel.world import World
from nla_megatron.types import ModelShape


class IntervenedLayer(TransformerLayer):
    """A block whose output interventions change.

    Their data comes as `attention_bias`: of what Megatron hands to every block, it alone may be any object and is kept
    with its microbatch for the recomputation; no attention of ours has a bias.
    """

    def forward(
        self, *args: Any, attention_bias: Changes | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        stream_TBD, context = super().forward(*args, **options)
        for change in (attention_bias or {}).get(self.layer_number - 1, ()):
            stream_TBD = change(stream_TBD)
        return stream_TBD, context


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": gelu_tanh,
}


_Holding = Callable[[type], type]
_HOLDINGS: dict[str, _Holding] = {NONE: lambda linear: linear, NF4: in_nf4}
"""From a class of linear layers to the class that holds its weight so."""

# Each block keeps its input only, and runs again in the backward pass.
_RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron's configuration, carrying what it does not know to the modules of ours that it is handed to."""

    shape: ModelShape | None = None
    quantize: str = NONE
    """How the blocks' linear layers hold their weights: as they are, or as NF4."""


def decoder_config(shape: ModelShape, world: World, dtype: torch.dtype, quantize: str = NONE) -> DecoderConfig:
    """The configuration of this shape on this layout. Raises LayoutError."""
    check_layout(shape, world, "convert")
    return DecoderConfig(
        shape=shape,
        quantize=quantize,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        layernorm_zero_centered_gamma=shape.zero_centered_norms,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[shape.activation],
        # Layers with a bias are named in the specification, one by one.
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=world.tp,
        pipeline_model_parallel_size=world.pp,
        virtual_pipeline_model_parallel_size=world.vpp if world.vpp > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(shape.num_layers, world),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # The master weight is drawn whole and split: no two TP ranks start with the same shard.
        use_cpu_initialization=True,
        # On the meta device there is nothing to draw.
        perform_initialization=world.device.type != "meta",
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        sequence_parallel=world.sequence_parallel,
        # Of two stages each is before and after the other: batched exchanges of chunks would mix the two up.
        overlap_p2p_comm=world.vpp > 1,
        batch_p2p_comm=world.vpp == 1,
        **(_RECOMPUTED if world.recompute == "full" else {}),
        **_expert_options(shape, world),
    )


def _expert_options(shape: ModelShape, world: World) -> dict[str, Any]:
    if shape.experts is None:
        return {}
    # Without Transformer Engine the router asks for a name that its module has not defined.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    return {
        "num_moe_experts": shape.experts.count,
        "moe_ffn_hidden_size": shape.experts.ffn_hidden_size,
        "moe_router_topk": shape.experts.top_k,
        # The softmax over the chosen experts alone is the softmax over all, renormalised.
        "moe_router_pre_softmax": not shape.experts.renormalized,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": world.ep,
        "expert_tensor_parallel_size": world.etp,
    }


def _pipeline_layout(num_layers: int, layout: Layout) -> list[list[str]] | None:
    if layout.pp == 1:
        return None
    chunks = [["decoder"] * blocks for blocks in blocks_per_chunk(num_layers, layout)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def block_spec(shape: ModelShape, config: DecoderConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """This stage's (or chunk's) layers and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[_layer_spec(shape, config.quantize)] * layers, layer_norm=RmsNorm)


def _layer_spec(shape: ModelShape, quantize: str) -> ModuleSpec:
    """Megatron's local layers with our norms and attention."""
    qk_norm = RmsNorm if shape.qk_norm else IdentityOp
    row = NormedRowParallelLinear if shape.sandwich_norms else RowParallelLinear
    held = _HOLDINGS[quantize]
    rotary = (RotaryTables(shape), RotaryTables(shape, local=True))
    attention = ModuleSpec(
        module=RotaryAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rotary": rotary},
        submodules=SelfAttentionSubmodules(
            linear_qkv=held(ColumnParallelLinear),
            core_attention=SdpaCoreAttention,
            linear_proj=held(biased(row) if shape.output_bias else row),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    # The keys in checkpoints are those of Transformer Engine's layers, whose linear layers hold the norm before them.
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if shape.experts is None:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=IntervenedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RmsNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RmsNorm,
            mlp=_feed_forward_spec(shape, row, held),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def _feed_forward_spec(shape: ModelShape, row: type, held: _Holding) -> ModuleSpec:
    if shape.experts is not None:
        assert not shape.sandwich_norms and not shape.mlp_bias, "no family has a norm behind a mixture, or biases in it"
        linears = MLPSubmodules(linear_fc1=held(ColumnParallelLinear), linear_fc2=held(RowParallelLinear))
        experts = ModuleSpec(module=SequentialMLP, submodules=linears)
        return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    column = ColumnParallelLinear
    if shape.mlp_bias:
        column, row = biased(column), biased(row)
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=held(column), linear_fc2=held(row)))
