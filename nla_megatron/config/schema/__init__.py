"""The configuration of every command as frozen dataclasses: Hydra's structured schemas, and what the code receives.

A YAML file of `conf/` gives values, these classes give names, types, defaults and their reasons. Nothing mutates a
configuration after it is composed.
"""

from __future__ import annotations

from nla_megatron.config.schema.conversion import AdoptConfig, ConvertConfig, MergeConfig, PlanConfig
from nla_megatron.config.schema.credit import AlgorithmConfig, RewardConfig, RewardTermConfig
from nla_megatron.config.schema.data import BuildConfig, ExplainConfig, ExtractConfig, ProviderConfig
from nla_megatron.config.schema.nla import (
    ArConfig,
    ArLossConfig,
    CurriculumConfig,
    InterventionConfig,
    ProjectionConfig,
    TemplateConfig,
    check_curriculum_ends,
)
from nla_megatron.config.schema.runs import CompareConfig, DemoConfig, LauncherConfig, SweepConfig
from nla_megatron.config.schema.shared import (
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    RolloutConfig,
    StageConfig,
    TaskConfig,
    TrainingStageConfig,
)
from nla_megatron.config.schema.training import (
    ArchitectureConfig,
    EvalConfig,
    ExportConfig,
    JudgeConfig,
    PretrainConfig,
    RlConfig,
    SftConfig,
)

__all__ = [
    "AdoptConfig",
    "AlgorithmConfig",
    "ArConfig",
    "ArLossConfig",
    "ArchitectureConfig",
    "BuildConfig",
    "CompareConfig",
    "ConvertConfig",
    "CurriculumConfig",
    "DemoConfig",
    "EvalConfig",
    "ExplainConfig",
    "ExportConfig",
    "ExtractConfig",
    "InterventionConfig",
    "JudgeConfig",
    "LauncherConfig",
    "LoraConfig",
    "MergeConfig",
    "OptimConfig",
    "ParallelConfig",
    "PlanConfig",
    "PretrainConfig",
    "ProjectionConfig",
    "ProviderConfig",
    "RewardConfig",
    "RewardTermConfig",
    "RlConfig",
    "RolloutConfig",
    "SCHEMAS",
    "SftConfig",
    "StageConfig",
    "SweepConfig",
    "TaskConfig",
    "TemplateConfig",
    "TrainingStageConfig",
    "check_curriculum_ends",
]

SCHEMAS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "extract": ExtractConfig,
    "explain": ExplainConfig,
    "build": BuildConfig,
    "sft": SftConfig,
    "rl": RlConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "judge": JudgeConfig,
    "convert": ConvertConfig,
    "plan": PlanConfig,
    "merge": MergeConfig,
    "adopt": AdoptConfig,
    "demo": DemoConfig,
    "sweep": SweepConfig,
    "compare": CompareConfig,
}
