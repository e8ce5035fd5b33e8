"""The configuration of every command as frozen dataclasses: Hydra's structured schemas, and what the code receives.

A YAML file of `conf/` gives values, these classes give names, types, defaults and their reasons. Nothing mutates a
configuration after it is composed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from omegaconf import MISSING

from nla_megatron.config.logger import LoggerOptions
from nla_megatron.config.options import bind
from nla_megatron.errors import ConfigError
from nla_megatron.types import POOLINGS

_DTYPES = ("float32", "bfloat16")
_STORED_DTYPES = ("float32", "bfloat16", "float16")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r}", f"one of {', '.join(choices)}", f"set {key}= to one of these")


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least:  # so that NaN is refused too
        raise ConfigError(f"{key}={value}", f"at least {least:g}", f"raise {key}=")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{key}={value}", "between 0 and 1", f"correct {key}=")


@dataclass(frozen=True)
class ParallelConfig:
    """Training layout: world = tp x pp x dp; the experts of a mixture lie on etp x ep of each stage's tp x dp ranks."""

    tp: int = 1
    pp: int = 1
    dp: int | None = None
    """None: what the world size leaves over (1 when the command starts its own processes)."""
    ep: int = 1
    """Ranks that share the experts out among them."""
    etp: int | None = None
    """Ranks that cut each expert's matrices. None: as many as tp."""
    vpp: int = 1
    """Chunks of blocks on each pipeline stage, interleaved with the other stages'."""
    stages: list[int] | None = None
    """Blocks of each of the pp x vpp chunks in the model's order. None: even, the first ones taking the remainder."""
    recompute: str = "none"
    """full: keep only the inputs of blocks and run each block again in the backward pass; less memory, more time."""
    sequence_parallel: bool = False
    """Between a block's matrix products each TP rank keeps its part of the tokens; less memory."""
    timeout_minutes: float = 10.0
    """A collective that waits longer ends the run: a lost rank is never waited for for ever."""

    def __post_init__(self) -> None:
        for key in ("tp", "pp", "dp", "ep", "etp", "vpp"):
            if getattr(self, key) is not None:
                _at_least(f"parallel.{key}", getattr(self, key), 1)
        _one_of("parallel.recompute", self.recompute, ("none", "full"))
        for blocks in self.stages or ():
            _at_least("parallel.stages", blocks, 1)


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


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay (docs/method.md)."""

    lr: float = 2e-5
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    schedule: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, ("cosine", "constant"))
        _at_least("lr", self.lr, 0.0)


@dataclass(frozen=True)
class InterventionConfig:
    """How the activation enters the AV's residual stream (docs/method.md)."""

    method: str = "norm_add"
    layer: int = 1
    """Output of this block, 0-based: 1 is the second block, where the published recipe injects. -1 is the token
    embedding, after any factor that the model applies to it."""
    scale: float = 1.0
    """alpha of norm_add and add; the norm s of replace."""
    layers: list[int] | None = None
    """Several blocks at once, each changed by the same vector, method and scale. None: `layer` alone."""

    def __post_init__(self) -> None:
        _one_of("intervention.method", self.method, ("norm_add", "replace", "add"))
        for block in self.blocks:
            _at_least("intervention.layer" if self.layers is None else "intervention.layers", block, -1)
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise ConfigError(f"intervention.layers={list(self.blocks)}", "different blocks", "set intervention.layers")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Every block at which the vector enters."""
        return (self.layer,) if self.layers is None else tuple(self.layers)


@dataclass(frozen=True)
class CurriculumConfig:
    """From an injection that is easy to read to the one that the table records, over the first steps of a training.

    The last step always trains on the recorded injection, and every evaluation uses it.
    """

    kind: str = "constant"
    """How the factor on the injection's strength leads from `start` to 1: linear, cosine, or constant, at 1 always."""
    start: float = 1.0
    """The factor at step 0."""
    layers: list[int] = field(default_factory=list)
    """Blocks at which the vector enters in turn, each for an equal part of the steps, before it enters at its own."""
    steps: int = 0
    """Training steps until the injection is the recorded one; 0 is no curriculum."""

    def __post_init__(self) -> None:
        _one_of("curriculum.kind", self.kind, ("constant", "linear", "cosine"))
        _at_least("curriculum.steps", self.steps, 0)
        _at_least("curriculum.start", self.start, 0.0)
        for block in self.layers:
            _at_least("curriculum.layers", block, -1)
        if (self.kind == "constant") != (self.start == 1.0):
            raise ConfigError(
                f"curriculum.kind={self.kind} with curriculum.start={self.start}",
                "constant at 1, or linear or cosine from another factor", "set both",
            )  # fmt: skip
        if (self.kind != "constant" or bool(self.layers)) != (self.steps > 0) or len(self.layers) > self.steps:
            raise ConfigError(
                f"curriculum.steps={self.steps} with kind {self.kind} and layers {list(self.layers)}",
                "as many steps as there are layers or more; 0 where nothing changes", "set curriculum.steps",
            )  # fmt: skip


def check_curriculum_ends(curriculum: CurriculumConfig, steps: int) -> None:
    """Raises ConfigError where training would end on another injection than the model's sidecar says."""
    if curriculum.steps >= steps:
        raise ConfigError(
            f"curriculum.steps={curriculum.steps} of steps={steps}", "fewer: the last step trains on what is recorded",
            "lower curriculum.steps",
        )  # fmt: skip


@dataclass(frozen=True)
class ArConfig:
    """How the AR makes a vector of its stream; recorded in its sidecar, from which `rl` and `eval` take it."""

    pooling: str = "last"
    """Over a text's tokens: the last, their mean, their max, cls (the first, which in a causal model has read nothing
    of what follows it) or weighted (by a softmax over one learned number for each position)."""
    projection_layers: int = 1
    """1: a matrix. More: so many less one of linear, LayerNorm, ReLU and dropout come before it."""
    dropout: float = 0.0
    """Behind each ReLU; of a single layer, before it."""
    layer: int | None = None
    """Read behind this block, 0-based; deeper ones are not kept. None: K, the block of the activations."""

    def __post_init__(self) -> None:
        _one_of("reconstructor.pooling", self.pooling, POOLINGS)
        _at_least("reconstructor.projection_layers", self.projection_layers, 1)
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"reconstructor.dropout={self.dropout}", "0 or above, below 1", "set reconstructor.dropout"
            )
        if self.layer is not None:
            _at_least("reconstructor.layer", self.layer, 0)


@dataclass(frozen=True)
class ArLossConfig:
    """What the AR is trained on. Scores, rewards and FVE are the mean squared error of the contract whatever it is."""

    kind: str = "mse"
    """mse or smooth_l1 of prediction and activation, both at norm sqrt(D); or cosine, 1 less their cosine."""
    weight: float = 1.0
    """Factor on it, against the two regularisers."""
    smooth_l1_beta: float = 1.0
    """Below this difference smooth_l1 is quadratic."""
    l2_reg: float = 0.0
    """Factor on the mean square of the predictions, as the head gives them."""
    variance_reg: float = 0.0
    """Factor on the mean squared difference of the standard deviations, in each dimension, of predictions and
    activations over the global batch, both at norm sqrt(D). It costs one more forward pass."""

    def __post_init__(self) -> None:
        _one_of("ar_loss.kind", self.kind, ("mse", "smooth_l1", "cosine"))
        for key in ("weight", "l2_reg", "variance_reg"):
            _at_least(f"ar_loss.{key}", getattr(self, key), 0.0)
        if not self.smooth_l1_beta > 0:
            raise ConfigError(f"ar_loss.smooth_l1_beta={self.smooth_l1_beta}", "above 0", "set ar_loss.smooth_l1_beta")


@dataclass(frozen=True)
class TemplateConfig:
    """Prompt templates; None takes the contract's own (`nla_megatron.contract.prompts`)."""

    av: str | None = None
    ar: str | None = None
    marker: str | None = None
    positions: int = 1
    """How often the marker stands in the AV's prompt, the same vector at each. A template of your own holds `<INJECT>`
    so many times, each between the same neighbours."""

    def __post_init__(self) -> None:
        _at_least("templates.positions", self.positions, 1)


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to advantages and losses. Formulas and sources are in the files of `nla_megatron/algorithms/`."""

    name: str = "grpo"
    baseline: str | None = None
    """What a reward is compared with. None: the algorithm's own. grpo, gspo, cispo: group or leave_one_out; reinforce:
    mean, none, ema or scst; reinforce_pp: none or group."""
    normalise_std: bool = True
    """Divide group-relative advantages by the deviation of their group."""
    advantage_epsilon: float = 1e-6
    """Added to every deviation that advantages are divided by."""
    ema_decay: float = 0.9
    """What `baseline: ema` keeps of its average in each step."""
    clip_low: float = 0.2
    """The ratio of the policy to the one before the step's first update counts as no less than 1 minus this."""
    clip_high: float = 0.2
    """The same ratio counts as no more than 1 plus this."""
    loss_mean: str = "token"
    """All tokens of a step count alike, or all responses, or (constant) a response counts as the sum of its tokens
    divided by `loss_length`."""
    loss_length: int | None = None
    """Tokens that `loss_mean: constant` divides by, usually the longest that a response may be."""
    kl: str = "k3"
    """Which estimate of the KL from one token (`nla_megatron/algorithms/kl.py`)."""
    kl_in: str = "loss"
    """In the reward, each token's KL is taken off before anything is compared."""
    kl_weighted: bool = False
    """Multiply the KL in the loss by the token's ratio to the old policy: then k1 and k3 have the KL's own gradient."""
    kl_coef: float = 0.01
    """Weight of the KL to the reference; 0 keeps no reference."""
    kl_clamp: float = 12.0
    """Bound on the log-ratio inside the estimate: one outlier token cannot dominate a step."""
    reference: str = "initial"
    """The policy that the KL is measured to: the one this stage starts from, or a moving average of its weights."""
    reference_decay: float = 0.99
    """What `reference: ema` keeps of its weights in each step."""
    entropy_coef: float = 0.0
    """Weight of the bonus for the entropy of each token's distribution."""
    correction: str = "none"
    """Importance correction of the sampler's numerical difference from the trainer
    (`nla_megatron/algorithms/correction.py`)."""
    correction_low: float = 0.5
    """icepop and sequence_mask drop what is under this many times as likely to the trainer as to the sampler."""
    correction_high: float = 2.0
    """icepop and sequence_mask drop what is over this many times as likely; tis bounds its weight by it."""
    epochs: int = 1
    """Passes over a step's rollouts."""
    minibatches: int = 1
    """Optimizer steps per pass; above 1 in all, the clipped ratio starts to matter."""
    dynamic_sampling: int = 0
    """How often in a step prompts whose samples all have one reward are replaced by others; 0 keeps them."""
    gamma: float = 1.0
    """Discount per token, where rewards are followed along a response (ppo, reinforce_pp)."""
    gae_lambda: float = 1.0
    """1: advantages from whole returns; 0: from one token and the critic's next value (ppo)."""
    value_clip: float | None = 0.2
    """How far a critic's value may move from its old one before its loss stops falling (ppo); None is no bound."""
    whiten: bool = True
    """Standardise advantages over all tokens of a step (ppo)."""
    options: dict[str, Any] = field(default_factory=dict)
    """What an algorithm of your own takes beside these."""

    def __post_init__(self) -> None:
        _one_of("algorithm.loss_mean", self.loss_mean, ("token", "sequence", "constant"))
        _one_of("algorithm.kl", self.kl, ("k1", "k2", "k3"))
        _one_of("algorithm.kl_in", self.kl_in, ("loss", "reward"))
        _one_of("algorithm.reference", self.reference, ("initial", "ema"))
        _one_of("algorithm.correction", self.correction, ("none", "tis", "icepop", "sequence_mask"))
        for key in ("epochs", "minibatches"):
            _at_least(f"algorithm.{key}", getattr(self, key), 1)
        positive = ("kl_coef", "kl_clamp", "entropy_coef", "clip_low", "clip_high", "correction_low", "correction_high")
        for key in (*positive, "advantage_epsilon", "dynamic_sampling"):
            _at_least(f"algorithm.{key}", getattr(self, key), 0.0)
        for key in ("ema_decay", "reference_decay", "gamma", "gae_lambda"):
            _share(f"algorithm.{key}", getattr(self, key))
        for key in ("loss_length", "value_clip"):
            if getattr(self, key) is not None:
                _at_least(f"algorithm.{key}", getattr(self, key), 1 if key == "loss_length" else 0.0)
        self._check_together()

    def _check_together(self) -> None:
        if self.loss_mean == "constant" and self.loss_length is None:
            raise ConfigError(
                "algorithm.loss_mean=constant without algorithm.loss_length", "tokens to divide by",
                "set algorithm.loss_length=, for example to rollout.max_new_tokens",
            )  # fmt: skip
        if self.kl_weighted and self.kl_in == "reward":
            raise ConfigError(
                "algorithm.kl_weighted=true with algorithm.kl_in=reward", "a weight for the KL in the loss only",
                "drop algorithm.kl_weighted=, or set algorithm.kl_in=loss",
            )  # fmt: skip
        if self.kl == "k1" and self.kl_in == "loss" and self.kl_coef > 0 and not self.kl_weighted:
            raise ConfigError(
                "algorithm.kl=k1 in the loss", "k2 or k3 in the loss, or k1 in the reward",
                "set algorithm.kl_in=reward, algorithm.kl=k3 or algorithm.kl_weighted=true: the expected gradient of k1"
                " is zero",
            )  # fmt: skip
        if self.correction_low > self.correction_high:
            raise ConfigError(
                f"algorithm.correction_low={self.correction_low} above correction_high={self.correction_high}",
                "a lower bound below the upper one", "exchange them",
            )  # fmt: skip
        if self.reference == "ema" and self.kl_coef == 0:
            raise ConfigError(
                "algorithm.reference=ema with algorithm.kl_coef=0", "a KL that is measured to the reference",
                "set algorithm.kl_coef=, or drop algorithm.reference=",
            )  # fmt: skip


@dataclass(frozen=True)
class RewardTermConfig:
    """One term of a reward: what it is, and what it counts for. Its weight may change once, at a step or an epoch."""

    term: str = ""
    """A registered term, or the import path `package.module:Name` of a class or a function. Empty: as its label."""
    weight: float = 1.0
    """Of the term in the reward."""
    later_weight: float | None = None
    """The weight from `change_at` on. None: it stays."""
    change_at: int | None = None
    """The first step or epoch, 0-based, that has `later_weight`."""
    change_by: str = "step"
    """Whether `change_at` counts steps or passes over the table."""
    options: dict[str, Any] = field(default_factory=dict)
    """The term's own."""

    def __post_init__(self) -> None:
        _one_of("change_by", self.change_by, ("step", "epoch"))
        if (self.later_weight is None) != (self.change_at is None):
            raise ConfigError(
                f"later_weight={self.later_weight} with change_at={self.change_at}", "both or neither", "add the other"
            )
        if self.change_at is not None:
            _at_least("change_at", self.change_at, 0)

    @property
    def changes(self) -> bool:
        """Whether the weight does."""
        return self.change_at is not None


@dataclass(frozen=True)
class RewardConfig:
    """Which terms a reward has, and how they become one number (docs/rewards.md)."""

    terms: dict[str, Any] = field(default_factory=dict)
    """By label, each a RewardTermConfig; the labels `correctness`, `length` and `format` have a role below."""
    composition: str = "additive"
    """`additive`: the weighted sum. `weighted_length_penalty`: the length counts only where the answer is right."""
    product: str = "correctness_length"
    """What the length is multiplied by in `weighted_length_penalty`: correctness, or correctness and format."""
    strict_format_gate: bool = False
    """A response whose term `format` is 0 gets `non_strict_penalty` in the place of everything else."""
    non_strict_penalty: float = -1.0

    def __post_init__(self) -> None:
        _one_of("reward.composition", self.composition, ("additive", "weighted_length_penalty"))
        _one_of("reward.product", self.product, ("correctness_length", "correctness_length_format"))
        if not math.isfinite(self.non_strict_penalty):
            raise ConfigError(f"reward.non_strict_penalty={self.non_strict_penalty}", "a finite number", "correct it")
        _ = self.parts  # so that a term's mistakes are named when the configuration is composed

    @cached_property
    def parts(self) -> dict[str, RewardTermConfig]:
        """The terms by label. Raises ConfigError for an unknown key or a wrong type."""
        for label, one in self.terms.items():
            if not isinstance(one, Mapping):
                raise ConfigError(
                    f"reward.terms.{label}={one!r}", "the keys of a term", f"set reward.terms.{label}.weight or .term"
                )
        return {label: bind(RewardTermConfig, one, f"reward.terms.{label}") for label, one in self.terms.items()}


@dataclass(frozen=True)
class RolloutConfig:
    """vLLM in the trainer's own processes."""

    tp: int = 1
    max_new_tokens: int = 150
    temperature: float = 1.0
    dtype: str = "float32"
    max_model_len: int = 1024
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.3
    """The rest of the device belongs to training."""
    cpu_kv_cache_gib: float = 1.0
    kv_block_size: int | None = None
    """Tokens of a block of the cache; only whole blocks are shared. None: vLLM's own, 16 on a GPU and 128 on a CPU."""
    prefix_caching: bool = True
    """Prompts with equal tokens and equal interventions are computed once."""
    compiled: bool | None = None
    """torch.compile and CUDA graphs. None: on a GPU; a CPU engine would start in half a minute in place of seconds."""
    sleep: bool = False
    """On a GPU, make the engine's memory returnable between rollouts (`Engine.sleep`)."""
    lora: str = "merged"
    """How a LoRA policy reaches the sampler: "merged" into the weights, or as an "adapter" beside the base's own."""
    lora_rank: int = 16
    """With `lora: adapter`, the largest rank that one may have."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response; they belong to it, and it counts as finished."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that have this probability together; log-probs stay those of all tokens."""
    top_k: int = 0
    """Sample among so many likeliest tokens; 0 is no limit."""
    max_logprob_gap: float | None = None
    """Above it the step stops: the sampler no longer runs the policy that is trained. None measures only."""
    record: bool = False
    """Write every step's rollouts to `rollouts/step_*.jsonl` in the run's directory."""
    replay: str | None = None
    """A run directory with recorded rollouts: the engine scores those token for token in place of sampling."""

    def __post_init__(self) -> None:
        _at_least("rollout.tp", self.tp, 1)
        _at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        _at_least("rollout.top_k", self.top_k, 0)
        _at_least("rollout.lora_rank", self.lora_rank, 1)
        _one_of("rollout.lora", self.lora, ("merged", "adapter"))
        if not all(self.stop):
            raise ConfigError(f"rollout.stop={list(self.stop)}", "texts of at least one character", "remove the empty")
        _one_of("rollout.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.temperature < 0:
            raise ConfigError(f"rollout.temperature={self.temperature}", "0 (greedy) or above", "raise it")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p={self.top_p}", "above 0, at most 1", "set rollout.top_p")


@dataclass(frozen=True)
class ProviderConfig:
    """Which provider explains, and its own options."""

    name: str = "keywords"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskConfig:
    """What is asked of the policy in RL, and the task's own options."""

    name: str = "nla"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageConfig:
    """What every stage has."""

    out: str = MISSING
    seed: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logger: LoggerOptions = field(default_factory=LoggerOptions)

    @property
    def layout(self) -> ParallelConfig:
        """How the ranks are laid out."""
        return self.parallel

    @property
    def ranks(self) -> int:
        """How many ranks the command starts where nobody else has."""
        return self.parallel.tp * self.parallel.pp * (self.parallel.dp or 1)


@dataclass(frozen=True)
class TrainingStageConfig(StageConfig):
    """What every training stage has."""

    steps: int = 1000
    batch_size: int = 64
    micro_batch_size: int = 8
    dtype: str = "float32"
    optim: OptimConfig = field(default_factory=OptimConfig)
    save_every: int = 100
    keep_checkpoints: int = 2
    keep_every: int = 0
    """Steps between checkpoints that stay for good, in `checkpoints/permanent`; 0 keeps none."""
    export: bool = True
    """Write the Hugging Face directories at the end."""

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("micro_batch_size", self.micro_batch_size, 1)
        _at_least("save_every", self.save_every, 1)
        _at_least("keep_checkpoints", self.keep_checkpoints, 1)
        _at_least("keep_every", self.keep_every, 0)
        _one_of("dtype", self.dtype, _DTYPES)


@dataclass(frozen=True)
class PretrainConfig(TrainingStageConfig):
    """A base model from nothing: next-token prediction on a corpus."""

    corpus: str = MISSING
    tokenizer: str = MISSING
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    sequence_length: int = 256
    held_out: float = 0.1


@dataclass(frozen=True)
class ExtractConfig(StageConfig):
    """Activations of a model at sampled positions of a corpus."""

    model: str = MISSING
    corpus: str = MISSING
    """A parquet or JSONL file with the columns `doc_id` and `text`."""
    layer: int | None = None
    """K: the output of this block. None: two thirds of the depth, rounded down."""
    max_length: int = 2048
    long_documents: str = "truncate"
    """truncate: the first max_length tokens. window: consecutive windows, each sampled like a document of its own."""
    min_position: int = 50
    positions_per_doc: int = 10
    pool: str = "last"
    """last: the activation of a sampled position. mean: the mean of the last `pool_window` positions' up to it."""
    pool_window: int = 1
    documents_start: int = 0
    documents_length: int | None = None
    batch_size: int = 8
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _one_of("long_documents", self.long_documents, ("truncate", "window"))
        _one_of("dtype", self.dtype, _DTYPES)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("positions_per_doc", self.positions_per_doc, 1)
        _at_least("min_position", self.min_position, 0)
        _at_least("max_length", self.max_length, self.min_position + 1)
        _one_of("pool", self.pool, ("last", "mean"))
        _at_least("pool_window", self.pool_window, 1)
        if self.pool == "last" and self.pool_window > 1:
            raise ConfigError(f"pool_window={self.pool_window} with pool=last", "pool=mean", "set pool=mean")
        if self.pool_window > self.min_position + 1:
            raise ConfigError(
                f"pool_window={self.pool_window} with min_position={self.min_position}",
                f"at most {self.min_position + 1}, so that every window is full", "raise min_position=",
            )  # fmt: skip


@dataclass(frozen=True)
class ExplainConfig(StageConfig):
    """Gold explanations for the rows of a base table."""

    input: str = MISSING
    provider: ProviderConfig = field(default_factory=ProviderConfig)
    max_failures: float = 0.2
    """A larger share of failed rows stops the stage (docs/method.md)."""


@dataclass(frozen=True)
class BuildConfig(StageConfig):
    """Document-level splits of an explained table into the tables of the training stages."""

    input: str = MISSING
    model: str = MISSING
    held_out: float = 0.05
    fractions: dict[str, float] = field(default_factory=lambda: {"av_sft": 0.25, "ar_sft": 0.25, "rl": 0.5})
    templates: TemplateConfig = field(default_factory=TemplateConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)


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
    reconstructor: ArConfig = field(default_factory=ArConfig)
    ar_loss: ArLossConfig = field(default_factory=ArLossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("role", self.role, ("av", "ar", "both"))
        if (self.role == "both") != (self.ar_data is not None):
            raise ConfigError(
                f"role={self.role} with ar_data={self.ar_data}", "ar_data= with role=both, and only with it",
                "set both, or neither",
            )  # fmt: skip
        if self.ar_model is not None and self.role != "both":
            raise ConfigError(f"role={self.role} with ar_model={self.ar_model}", "role=both", "drop ar_model=")
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
    critic_optim: OptimConfig = field(default_factory=OptimConfig)
    """Of the value model, where the algorithm has one."""
    ar_loss: ArLossConfig = field(default_factory=ArLossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("ar_updates", self.ar_updates, 1)
        check_curriculum_ends(self.curriculum, self.steps)
        if self.rollout.temperature == 0:
            raise ConfigError(
                "rollout.temperature=0", "a temperature above 0", "greedy samples of a group are all alike"
            )
        if self.rollout.lora != "merged":
            raise ConfigError(
                f"rollout.lora={self.rollout.lora}", "merged", "rl trains all weights, of which there is no adapter"
            )
        _at_least("samples_per_prompt", self.samples_per_prompt, 1)
        if self.algorithm.minibatches > self.batch_size:
            raise ConfigError(
                f"algorithm.minibatches={self.algorithm.minibatches} with batch_size={self.batch_size}",
                "at least one prompt in each", "lower algorithm.minibatches or raise batch_size",
            )  # fmt: skip


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
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(temperature=0.0))

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, _DTYPES)
        _at_least("micro_batch_size", self.micro_batch_size, 1)
        _at_least("bootstrap", self.bootstrap, 1)
        _at_least("samples", self.samples, 1)
        _at_least("examples", self.examples, 0)


@dataclass(frozen=True)
class ConvertConfig(StageConfig):
    """Between a Hugging Face directory and a megatron-core distributed checkpoint (`torch_dist`), and whether the two
    are the same model."""

    direction: str = "import"
    """import (hf to out), export (checkpoint to out) or verify (hf against checkpoint)."""
    out: str = ""
    """The directory that an import or an export makes. The same command continues one that was killed."""
    hf: str = ""
    """A Hugging Face directory: what is imported, what a checkpoint is verified against, and in an export the
    configuration and tokenizer of a checkpoint that has none beside it."""
    checkpoint: str = ""
    """A megatron-core checkpoint: of an import, of a training run, or of another tool. To verify also another Hugging
    Face directory."""
    dtype: str | None = None
    """Of the weights that are written, and in which `verify` computes. None: as they are; `verify` takes float32."""
    layers: int | None = None
    """Import the first so many blocks as an AR: K+1 of them, where activations are of block K."""
    shard_size: str = "5GB"
    """The most that one file of an export or a checkpoint holds."""
    processes: int | None = None
    """Workers of an import or export; each holds one tensor. None: as many as `parallel` has ranks."""
    dry_run: bool = False
    """Print files, bytes, memory and time from config.json alone, and do nothing."""
    disk_rate: float = 1.0
    """GB per second that the disk of a dry run reads and writes."""
    text: str = "The capital of France is Paris, and 2 + 2 = 4.\ndef f(x):\n    return x"
    """On what `verify` compares logits."""
    logits: bool = True
    """Compare logits too, which needs memory for the model; else only the weights, tensor by tensor."""

    def __post_init__(self) -> None:
        _one_of("direction", self.direction, ("import", "export", "verify"))
        if self.dtype is not None:
            _one_of("dtype", self.dtype, _STORED_DTYPES)
        for key in ("layers", "processes"):
            if getattr(self, key) is not None:
                _at_least(key, getattr(self, key), 1)
        if not self.disk_rate > 0:
            raise ConfigError(f"disk_rate={self.disk_rate}", "above 0", "set disk_rate= to GB per second")
        if not self.shard_bytes:
            raise ConfigError(
                f"shard_size={self.shard_size!r}", "a size such as 5GB or 500MB", "set shard_size= to one"
            )

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; 0 where it is none."""
        match = re.fullmatch(r"([0-9.]+) *([KMGT]?)B?", self.shard_size.strip().upper())
        if match is None or match[1].count(".") > 1 or not match[1].strip("."):
            return 0
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))

    @property
    def layout(self) -> ParallelConfig:
        """Ranks share files and tensors, not a model; `verify` cuts one by `parallel` afterwards."""
        return ParallelConfig(timeout_minutes=24 * 60.0)

    @property
    def ranks(self) -> int:
        if self.dry_run:
            return 1
        return self.processes if self.processes is not None and self.direction != "verify" else super().ranks


@dataclass(frozen=True)
class MergeConfig(StageConfig):
    """A LoRA adapter merged into its base model."""

    base: str = MISSING
    """The Hugging Face directory that the adapter was trained on."""
    adapter: str = MISSING
    """A directory that `peft` saved, or an adapter of ours."""
    out: str = MISSING
    """The merged Hugging Face directory; it must not exist yet."""
    dtype: str | None = None
    """Of the weights that are written. None: each keeps its own."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            _one_of("dtype", self.dtype, _DTYPES)


@dataclass(frozen=True)
class AdoptConfig(StageConfig):
    """Another NLA trainer's checkpoint made a directory of ours. What its sidecar does not say is told here."""

    checkpoint: str = MISSING
    """A whole AV or AR, or an adapter of one."""
    out: str = MISSING
    """The adopted directory; it must not exist yet. `rl` and `eval` take it where its injection is that of their
    table."""
    base: str | None = None
    """The whole model that an adapter was trained on."""
    sidecar: str | None = None
    """A directory with the sidecar, where the checkpoint has none."""
    trainer: str | None = None
    """Whose conventions fill what the sidecar leaves out: kitft or easynla."""
    layer_index: int | None = None
    """Block K of the activations, where the sidecar has none."""
    bos_policy: str | None = None
    """Whether prompts as text get the tokenizer's special tokens: tokenizer or none."""
    dtype: str | None = None
    """Of merged weights. None: each keeps its own."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            _one_of("dtype", self.dtype, _DTYPES)


@dataclass(frozen=True)
class DemoConfig:
    """The whole loop on text that is on every machine with Python."""

    out: str = "runs/demo"
    seed: int = 0
    vocab_size: int = 2048
    corpus_limit: int | None = None
    """Documents; None takes all."""
    stages: dict[str, list[str]] = field(default_factory=dict)
    """Overrides of each stage's command, as they would be typed."""


@dataclass(frozen=True)
class PlanConfig(StageConfig):
    """What something would take, on paper: from config.json alone, nothing is started."""

    what: str = "reshard"
    """reshard: how the trainer's weights would reach the sampler."""
    out: str = ""
    """Nothing is written."""
    hf: str = ""
    """A Hugging Face directory, of which only config.json is read."""
    rollout_tp: int = 1
    """Ranks of one replica of the sampler; the replicas fill the training ranks."""
    expert_parallel: bool = False
    """Whether the sampler shares experts out whole in place of cutting each."""
    dtype: str = "bfloat16"
    """Of the trainer's parameters."""
    rollout_dtype: str = "bfloat16"
    """Of the sampler's."""
    staging_mb: int = 256
    """Packed messages on one rank at once, MiB."""

    def __post_init__(self) -> None:
        _one_of("what", self.what, ("reshard",))
        for key in ("dtype", "rollout_dtype"):
            _one_of(key, getattr(self, key), ("float32", "bfloat16"))
        for key in ("rollout_tp", "staging_mb"):
            _at_least(key, getattr(self, key), 1)


@dataclass(frozen=True)
class LauncherConfig:
    """Where the jobs of a sweep or a comparison run."""

    name: str = "local"
    """Processes of this machine, or a job array of Slurm by submitit."""
    partition: str | None = None
    """Slurm's; null takes the cluster's default, here and in the keys that follow."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that a node must have."""
    nodes: int = 1
    """Nodes of one job; its ranks are divided evenly among them."""
    gpus_per_node: int | None = None
    """GPUs of one job on each of its nodes."""
    cpus_per_task: int | None = None
    """CPU cores of one task: the job on one node, a rank on several."""
    memory_gb: float | None = None
    """Memory of one job on each of its nodes."""
    minutes: int = 1440
    """Time limit of one job."""
    requeues: int = 3
    """How often a job that was preempted or met its time limit is queued again, to resume."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that each job begins with, such as `module load cuda`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `sbatch`, without their dashes."""
    wait: bool = True
    """Wait for the queue to finish. false leaves: the same command tells later how the jobs stand."""

    def __post_init__(self) -> None:
        _one_of("launcher.name", self.name, ("local", "slurm"))
        _at_least("launcher.nodes", self.nodes, 1)
        _at_least("launcher.minutes", self.minutes, 1)
        _at_least("launcher.requeues", self.requeues, 0)


@dataclass(frozen=True)
class SweepConfig:
    """One command many times, with every combination of the values given. `COMMAND -m key=a,b out=DIR` says the same as
    `sweep COMMAND key=a,b out=DIR`; there, the keys below begin with `sweep.`, all others but `out` are the command's.
    """

    command: str = MISSING
    """The command that is repeated."""
    out: str = MISSING
    """The sweep's directory; each job has its own inside, `sweep.json` says how they stand. The same command resumes,
    with more values it adds jobs. With `${...}` in it, the job's own directory."""
    overrides: list[str] = field(default_factory=list)
    """What is typed for the command, by Hydra's grammar: `a,b`, `choice(a,b)`, `range(0,3)`, `glob(*)`."""
    subdir: str | None = None
    """A job's directory in `out`, with `${...}` for values of its configuration; null takes number and swept values."""
    jobs: int = 1
    """Jobs at a time; on GPUs each has its own. On Slurm, the most of the array that run at once."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """Where jobs run."""

    def __post_init__(self) -> None:
        _at_least("jobs", self.jobs, 1)


@dataclass(frozen=True)
class CompareConfig:
    """Every finished run under a folder, evaluated and put beside the others."""

    root: str = MISSING
    """The folder; runs are found at any depth."""
    out: str = MISSING
    """Tables, charts, the page and the evaluations. The same command does what is new since."""
    command: str = "rl"
    """Runs of this command are compared."""
    checkpoints: str = "final"
    """What a run exported at its end (final), every checkpoint that `keep_every` kept (permanent), or all of these."""
    metric: str | None = None
    """What runs are sorted by: a figure of the evaluations or a scalar of `metrics.jsonl`. null: the first there
    is of FVE, accuracy, richness, reward and loss."""
    best: str | None = None
    """Whether the largest or the smallest value comes first. null: the smallest of a loss, else the largest."""
    last: int = 10
    """A scalar of `metrics.jsonl` is its mean over so many last steps that have it."""
    data: str | None = None
    """The rows to evaluate on; null takes those that each run held out, where it did."""
    evaluate: bool = True
    """Run `eval` for each. false takes what runs have recorded themselves."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every `eval`; typed one by one as `eval.rows=100 eval.rollout.max_new_tokens=40`."""
    curves: list[str] = field(default_factory=list)
    """Scalars of `metrics.jsonl` to draw; empty takes those that say most."""
    png: bool = True
    """Write each chart as PNG too."""
    jobs: int = 1
    """Evaluations at a time; on GPUs each has its own."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """Where evaluations run."""

    def __post_init__(self) -> None:
        _one_of("checkpoints", self.checkpoints, ("final", "permanent", "all"))
        _one_of("command", self.command, ("rl", "sft", "pretrain"))
        if self.best is not None:
            _one_of("best", self.best, ("max", "min"))
        _at_least("last", self.last, 1)
        _at_least("jobs", self.jobs, 1)


SCHEMAS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "extract": ExtractConfig,
    "explain": ExplainConfig,
    "build": BuildConfig,
    "sft": SftConfig,
    "rl": RlConfig,
    "eval": EvalConfig,
    "convert": ConvertConfig,
    "plan": PlanConfig,
    "merge": MergeConfig,
    "adopt": AdoptConfig,
    "demo": DemoConfig,
    "sweep": SweepConfig,
    "compare": CompareConfig,
}
