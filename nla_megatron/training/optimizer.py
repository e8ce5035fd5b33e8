"""Megatron's distributed AdamW, its schedule as a function of the step, and a state that fits any layout."""

from __future__ import annotations

import math
from typing import Any

import torch

from nla_megatron.config.schema import OptimConfig
from nla_megatron.parallel.cpu import megatron_device

RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
"""The default sharding of the optimizer's state cannot be read back on another layout."""


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of `step` (0-based): linear warm-up, then cosine to `min_lr_ratio` at the last step, or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def build_optimizer(chunks: list[Any], config: OptimConfig, dtype: torch.dtype) -> Any:
    """A distributed optimizer over a model's DDP-wrapped chunks; fp32 masters where parameters are bf16."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    _keep_step_when_loading()
    with megatron_device():
        return get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                weight_decay=config.weight_decay,
                clip_grad=config.clip_grad,
                params_dtype=dtype,
                bf16=dtype == torch.bfloat16,
                use_distributed_optimizer=True,
            ),
            chunks,
        )


def parts(optimizer: Any) -> list[Any]:
    """The single optimizers of a chain."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def materialise_state(optimizer: Any) -> None:
    """Create AdamW's moments, as zeros: a state must exist before it can be described to a checkpoint."""
    for part in parts(optimizer):
        counted = isinstance(part.optimizer, torch.optim.AdamW)
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in part.optimizer.state:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    # torch counts the steps of each parameter, Transformer Engine those of each group.
                    part.optimizer.state[parameter] = {"step": torch.zeros(()), **moments} if counted else moments


def separate_steps(optimizer: Any) -> None:
    """Give each parameter its own step count again.

    A loaded torch AdamW shares one step tensor between all parameters and would advance it once for each of them.
    """
    for part in parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"]).clone()


def _keep_step_when_loading() -> None:
    """Loading asks for torch AdamW's per-parameter `step`, which a checkpoint keeps once per group instead."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    patched: Any = DistributedOptimizer
    if getattr(patched, "keeps_step", False):
        return
    set_states = patched._set_main_param_and_optimizer_states

    def keeping_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        return set_states(self, parameter, {**tensors, "step": state["step"]} if "step" in state else tensors)

    patched._set_main_param_and_optimizer_states = keeping_step
    patched.keeps_step = True
