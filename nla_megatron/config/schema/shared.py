"""What several commands have: layout, optimizer, sampler, task, and the stages themselves."""

from __future__ import annotations

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from nla_megatron.config.logger import LoggerOptions
from nla_megatron.config.schema.checks import DTYPES, at_least, one_of
from nla_megatron.errors import ConfigError

LARGEST_ADAPTER = 512
"""The largest rank of an adapter that vLLM takes."""


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
    ar_stages: list[int] | None = None
    """The same of the AR where it learns beside an AV, whose blocks `stages` then are: an AR ends at the block that it
    reads, so that it has fewer."""
    recompute: str = "none"
    """full: keep only the inputs of blocks and run each block again in the backward pass; less memory, more time."""
    sequence_parallel: bool = False
    """Between a block's matrix products each TP rank keeps its part of the tokens; less memory."""
    timeout_minutes: float = 10.0
    """A collective that waits longer ends the run: a lost rank is never waited for for ever."""

    def __post_init__(self) -> None:
        for key in ("tp", "pp", "dp", "ep", "etp", "vpp"):
            if getattr(self, key) is not None:
                at_least(f"parallel.{key}", getattr(self, key), 1)
        one_of("parallel.recompute", self.recompute, ("none", "full"))
        for key in ("stages", "ar_stages"):
            for blocks in getattr(self, key) or ():
                at_least(f"parallel.{key}", blocks, 1)


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
        one_of("schedule", self.schedule, ("cosine", "constant"))
        at_least("lr", self.lr, 0.0)


@dataclass(frozen=True)
class LoraConfig:
    """Two small matrices beside each target (Hu et al., 2021) learn in place of the model's weights."""

    rank: int = 0
    """0 trains all weights."""
    alpha: float = 16.0
    """The product of the two is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; or all-linear."""
    rslora: bool = False
    """It is scaled by alpha / sqrt(rank) in place of that (Kalajdzievski, 2023)."""
    quantize: str = "none"
    """How the blocks' linear layers hold their weights, which do not learn: with nf4 in 4 bits each (QLoRA: Dettmers et
    al., 2023)."""

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 0)
        one_of("quantize", self.quantize, ("none", "nf4"))
        if not self.alpha > 0 or not self.targets:
            raise ConfigError(
                f"LoRA with alpha={self.alpha} and targets={list(self.targets)}", "a positive alpha, and targets",
                "correct alpha or targets",
            )  # fmt: skip
        unread = [
            f"{key.name}={getattr(self, key.name)}"
            for key in fields(self)
            if getattr(self, key.name) != (key.default if key.default_factory is NO_DEFAULT else key.default_factory())
        ]
        if not self.rank and unread:
            raise ConfigError(
                f"LoRA with {', '.join(unread)}, of rank 0",
                "a rank of at least 1, or no such key: all weights are trained", "set rank, or leave these out",
            )  # fmt: skip


@dataclass(frozen=True)
class RolloutConfig:
    """vLLM in the trainer's own processes."""

    engine: str = "vllm"
    """With "policy" the model that `rl` trains writes its responses itself, a forward pass for each token: slow, for
    machines without vLLM. It reads max_new_tokens, max_model_len, temperature, stop, top_p and top_k here, and the
    loop record, replay and max_logprob_gap."""
    tp: int = 1
    expert_parallel: bool = False
    """On a GPU, share the experts of a mixture out whole over the ranks of a replica in place of cutting each."""
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
    lora: str | None = None
    """How a LoRA policy reaches the sampler: "merged" into the weights, or as an "adapter" beside the base's own. None:
    an adapter, since weights of 16 bits take up little of a first update's; merged where vLLM takes none (4-bit
    weights, whose base the sampler does not have, mixtures of experts, ranks above 512)."""
    lora_rank: int | None = None
    """With an adapter, the largest rank that one may have. None: the policy's own."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response; they belong to it, and it counts as finished."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that have this probability together; log-probs stay those of all tokens."""
    top_k: int = 0
    """Sample among so many likeliest tokens; 0 is no limit."""
    max_logprob_gap: float | None = None
    """Above it the step stops: the sampler no longer runs the policy that is trained. `logprob_gap/` in the run's
    directory then has the worst responses, token by token. None measures only."""
    record: bool = False
    """Write every step's rollouts to `rollouts/step_*.jsonl` in the run's directory."""
    replay: str | None = None
    """A run directory with recorded rollouts: the engine scores those token for token in place of sampling."""

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("vllm", "policy"))
        if self.engine == "policy" and (self.tp > 1 or self.expert_parallel or self.lora is not None):
            raise ConfigError(
                f"rollout.engine=policy with rollout.tp={self.tp}, expert_parallel={self.expert_parallel} and "
                f"lora={self.lora}", "tp=1, expert_parallel=false and no lora: it is the policy, as `parallel` says",
                "leave these keys out, or set rollout.engine=vllm",
            )  # fmt: skip
        at_least("rollout.tp", self.tp, 1)
        at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        at_least("rollout.top_k", self.top_k, 0)
        if self.lora_rank is not None:
            at_least("rollout.lora_rank", self.lora_rank, 1)
            if self.lora_rank > LARGEST_ADAPTER:
                raise ConfigError(
                    f"rollout.lora_rank={self.lora_rank}", f"at most {LARGEST_ADAPTER}, vLLM's largest",
                    "set rollout.lora=merged",
                )  # fmt: skip
        if self.lora is not None:
            one_of("rollout.lora", self.lora, ("merged", "adapter"))
        if not all(self.stop):
            raise ConfigError(f"rollout.stop={list(self.stop)}", "texts of at least one character", "remove the empty")
        one_of("rollout.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.temperature < 0:
            raise ConfigError(f"rollout.temperature={self.temperature}", "0 (greedy) or above", "raise it")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p={self.top_p}", "above 0, at most 1", "set rollout.top_p")


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
    allow_unknown_config: list[str] = field(default_factory=list)
    """Keys of a model's config.json that are not known here and are to be passed over. Those that are known to change
    what the model computes stay refused."""

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
        at_least("steps", self.steps, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("micro_batch_size", self.micro_batch_size, 1)
        at_least("save_every", self.save_every, 1)
        at_least("keep_checkpoints", self.keep_checkpoints, 1)
        at_least("keep_every", self.keep_every, 0)
        one_of("dtype", self.dtype, DTYPES)
