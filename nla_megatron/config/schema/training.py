"""The commands that train and evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nla_megatron.config.schema.checks import DTYPES, ascending, at_least, one_of
from nla_megatron.config.schema.credit import AlgorithmConfig, RewardConfig
from nla_megatron.config.schema.nla import ArConfig, ArLossConfig, CurriculumConfig, check_curriculum_ends
from nla_megatron.config.schema.shared import (
    LARGEST_ADAPTER,
    LoraConfig,
    OptimConfig,
    RolloutConfig,
    StageConfig,
    TaskConfig,
    TrainingStageConfig,
)
from nla_megatron.errors import ConfigError
from nla_megatron.types import ModelShape


@dataclass(frozen=True)
class ArchitectureConfig:
    """A new Qwen3-shaped model, for `pretrain`."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True

    def shape(self, vocab_size: int) -> ModelShape:
        """With a vocabulary of this size."""
        return ModelShape(
            family="Qwen3ForCausalLM",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=vocab_size,
            rope_theta=self.rope_theta,
            norm_eps=1e-6,
            tied_embeddings=self.tie_word_embeddings,
            qk_norm=True,
            max_positions=self.max_position_embeddings,
        )


@dataclass(frozen=True)
class PretrainConfig(TrainingStageConfig):
    """A base model from nothing: next-token prediction on a corpus."""

    corpus: str = MISSING
    tokenizer: str = MISSING
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    sequence_length: int = 256
    held_out: float = 0.1


@dataclass(frozen=True)
class SftConfig(TrainingStageConfig):
    """Supervised warm start of one of the two models, or of both in one run."""

    role: str = MISSING
    model: str = MISSING
    data: str = MISSING
    max_length: int = 512
    """Longer rows are refused by name, never cut: a cut explanation has no end tag."""
    ar_data: str | None = None
    """With role both, the AR's table; `data` is the AV's."""
    ar_model: str | None = None
    """With role both, what the AR starts from. None: `model`."""
    ar_optim: OptimConfig = field(default_factory=OptimConfig)
    """With role both, the AR's optimizer; `optim` is the AV's."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Of the model that `role` names; with role both, of the AV. An AR's head learns whole."""
    ar_lora: LoraConfig = field(default_factory=LoraConfig)
    """With role both, of the AR."""
    reconstructor: ArConfig = field(default_factory=ArConfig)
    ar_loss: ArLossConfig = field(default_factory=ArLossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("role", self.role, ("av", "ar", "both"))
        if (self.role == "both") != (self.ar_data is not None):
            raise ConfigError(
                f"role={self.role} with ar_data={self.ar_data}", "ar_data= with role=both, and only with it",
                "set both, or neither",
            )  # fmt: skip
        if self.ar_model is not None and self.role != "both":
            raise ConfigError(f"role={self.role} with ar_model={self.ar_model}", "role=both", "drop ar_model=")
        if self.ar_lora.rank and self.role != "both":
            raise ConfigError(
                f"role={self.role} with ar_lora.rank={self.ar_lora.rank}", "role=both", "set lora= for a single model"
            )
        if self.role == "av":
            for key, value in (("reconstructor", self.reconstructor), ("ar_loss", self.ar_loss)):
                if value != type(value)():
                    raise ConfigError(f"{key} other than its defaults, with role=av", "role=ar or both", f"drop {key}")
        check_curriculum_ends(self.curriculum, self.steps)
        if self.role == "ar" and self.curriculum.steps:
            raise ConfigError(
                f"curriculum.steps={self.curriculum.steps} with role=ar", "role=av or both: the AR has no injection",
                "drop curriculum",
            )  # fmt: skip


@dataclass(frozen=True)
class RlConfig(TrainingStageConfig):
    """On-policy training of a policy on a task. `batch_size` is prompts per step, `optim` the policy's."""

    task: TaskConfig = field(default_factory=TaskConfig)
    av: str = ""
    """The policy of the task `nla`."""
    ar: str = ""
    """Who reads the AV's text, in the task `nla`."""
    model: str = ""
    """The policy of every other task: a Hugging Face directory."""
    data: str = ""
    """The task's table."""
    held_out: str | None = None
    eval_every: int = 0
    eval_rows: int = 128
    samples_per_prompt: int = 8
    ar_optim: OptimConfig = field(default_factory=OptimConfig)
    ar_updates: int = 1
    """AR optimizer steps per RL step, over the step's rollouts in as many minibatches."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Of the policy. The initial reference of a KL term is the policy without it. A critic trains all its weights."""
    ar_lora: LoraConfig = field(default_factory=LoraConfig)
    """Of the AR, whose head learns whole."""
    critic_optim: OptimConfig = field(default_factory=OptimConfig)
    """Of the value model, where the algorithm has one."""
    ar_loss: ArLossConfig = field(default_factory=ArLossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("ar_updates", self.ar_updates, 1)
        check_curriculum_ends(self.curriculum, self.steps)
        if self.rollout.temperature == 0:
            raise ConfigError(
                "rollout.temperature=0", "a temperature above 0", "greedy samples of a group are all alike"
            )
        largest = LARGEST_ADAPTER if self.rollout.lora_rank is None else self.rollout.lora_rank
        if self.rollout.lora == "adapter" and not 0 < self.lora.rank <= largest:
            raise ConfigError(
                f"rollout.lora=adapter with lora.rank={self.lora.rank}", f"an adapter, of a rank of at most {largest}",
                "set lora.rank and rollout.lora_rank, or rollout.lora=merged",
            )  # fmt: skip
        if self.rollout.lora == "adapter" and self.lora.quantize != "none":
            raise ConfigError(
                f"rollout.lora=adapter with lora.quantize={self.lora.quantize}", "rollout.lora=merged",
                "leave rollout.lora out: beside an adapter the sampler would keep weights that are not quantised",
            )  # fmt: skip
        at_least("samples_per_prompt", self.samples_per_prompt, 1)
        if self.algorithm.minibatches > self.batch_size:
            raise ConfigError(
                f"algorithm.minibatches={self.algorithm.minibatches} with batch_size={self.batch_size}",
                "at least one prompt in each", "lower algorithm.minibatches or raise batch_size",
            )  # fmt: skip


@dataclass(frozen=True)
class ExportConfig(StageConfig):
    """One checkpoint of an `rl` run as the models that the run exports at its end: adapters merged, projections beside
    the weights, sidecars. What they begin with has to be where the run found it."""

    checkpoint: str = MISSING
    """The directory of a step in a run's `checkpoints` or `checkpoints/permanent`."""


@dataclass(frozen=True)
class EvalConfig(StageConfig):
    """How well a model does its task on rows that nobody trained on: for `nla`, FVE with its controls."""

    task: TaskConfig = field(default_factory=TaskConfig)
    av: str = ""
    ar: str = ""
    model: str = ""
    """Who answers, in every task but `nla`: a Hugging Face directory."""
    data: str = ""
    rows: int = 400
    samples: int = 1
    """Responses per row; more need a temperature. Of several, `math` reports pass@k. `nla` takes one."""
    micro_batch_size: int = 32
    dtype: str = "float32"
    examples: int = 20
    bootstrap: int = 1000
    compare: str | None = None
    """Another evaluation's directory: the paired difference in FVE (or in the task's own figure) is reported too."""
    frozen_ar: str | None = None
    """`nla`: another AR that reads the AV's texts too, such as the one that an RL run began with: what of the FVE does
    not hang on what AV and AR have agreed on since."""
    quote_words: int = 0
    """`nla`: the AR also reads the last so many words of the row's own text, as they stand: what text alone gives."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """`nla`: words to look for in the explanations, whole and in any case, by their figure's name: of how many rows the
    text names one of them."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """`sae`: what responses are worth, beside the task's own figure. Without terms they have no reward."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(temperature=0.0))

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        for key in ("engine", "lora", "record", "replay"):
            found, usual = getattr(self.rollout, key), getattr(RolloutConfig(), key)
            if found != usual:
                raise ConfigError(f"rollout.{key}={found} in eval", f"{usual}", f"leave rollout.{key} out: it is rl's")
        empty = [name for name, words in self.names.items() if not words or not all(map(str.strip, words))]
        if empty or (self.names and self.task.name != "nla"):
            raise ConfigError(
                f"names.{empty[0]}={self.names[empty[0]]}" if empty else f"names in the task {self.task.name}",
                "words to look for, in the task nla", "correct names=, or leave it out",
            )  # fmt: skip
        at_least("micro_batch_size", self.micro_batch_size, 1)
        at_least("bootstrap", self.bootstrap, 1)
        at_least("samples", self.samples, 1)
        at_least("examples", self.examples, 0)
        at_least("quote_words", self.quote_words, 0)


@dataclass(frozen=True)
class JudgeConfig(StageConfig):
    """What another model makes of the texts of a finished evaluation. Needs ANTHROPIC_API_KEY in the environment."""

    evaluation: str = MISSING
    """The directory of an `eval` of the task nla. Its examples are judged; its `examples=` says how many there are."""
    texts: list[str] = field(default_factory=lambda: ["explanation", "gold"])
    """Which of an example's texts. One that is not there, as its response had no explanation, gets the worst score."""
    rubrics: dict[str, str] = field(default_factory=dict)
    """What makes a text good, in words, by the figure's name. The judge sees the text and its source."""
    low: int = 1
    """A rubric's worst score."""
    high: int = 10
    """A rubric's best score."""
    candidates: int = 4
    """Sources of other documents and the text's own, of which the judge has to find that one; 0 asks for no match."""
    bootstrap: int = 1000
    endpoint: dict[str, Any] = field(default_factory=dict)
    """Who judges, and how patiently: the options of the reward term `judge` but for rubric, scale and reference.
    Judgements are kept in `out` unless `cache` says where."""

    def __post_init__(self) -> None:
        at_least("bootstrap", self.bootstrap, 1)
        if self.candidates < 0 or self.candidates == 1:
            raise ConfigError(f"candidates={self.candidates}", "0, or at least 2", "correct candidates=")
        ascending("low", self.low, "high", self.high)
        taken = ("source_match", "absent")
        for name, rubric in self.rubrics.items():
            if not rubric.strip() or name in taken or name.endswith(("_failed", "_ci95")):
                raise ConfigError(
                    f"rubrics.{name}={rubric!r}", f"words, and not the name of {', '.join(taken)}, *_failed or *_ci95",
                    "write the rubric, or rename it",
                )  # fmt: skip
        if not (self.rubrics or self.candidates) or not self.texts or len(set(self.texts)) < len(self.texts):
            raise ConfigError(
                f"texts {self.texts}, {len(self.rubrics)} rubrics and candidates={self.candidates}",
                "each text once, and rubrics or candidates", "correct texts=, rubrics= or candidates=",
            )  # fmt: skip
