"""`rl`: the policy writes, its task judges, the policy learns, and the sampler gets the new weights.

With the task `nla` the policy is the AV, and the judge is the AR, which learns beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import partial

import torch

from nla_megatron.algorithms import check_algorithm, make_algorithm
from nla_megatron.algorithms import unread as algorithm_unread
from nla_megatron.config.run_directory import check_run_directory, mark_done
from nla_megatron.config.schema import RlConfig
from nla_megatron.config.unread import Unread
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_critic
from nla_megatron.conversion.projections import load_projections
from nla_megatron.errors import ConfigError, LayoutError
from nla_megatron.models.builder import check_layout, check_rollout_layout
from nla_megatron.models.interventions import intervene
from nla_megatron.parallel.collectives import by_rank_0
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.rewards import make_reward
from nla_megatron.rollout.plugin import check_installed
from nla_megatron.training.clock import PhaseClock
from nla_megatron.training.loop import train
from nla_megatron.training.lora import algorithm_of, check_lora
from nla_megatron.training.module import TrainModule
from nla_megatron.training.policy import Learned, PolicyLearning, means
from nla_megatron.training.recorder import check_replay
from nla_megatron.training.reference import MovingCopy
from nla_megatron.training.sampler import SamplerOf, make_sampler
from nla_megatron.training.sampling import Sampling, Scored
from nla_megatron.training.sides import make_side, side_of
from nla_megatron.training.sides.base import Prompts
from nla_megatron.types import Credit

_READ_BY_POLICY = (
    "engine", "max_new_tokens", "max_model_len", "temperature", "stop", "top_p", "top_k", "record", "replay",
    "max_logprob_gap",
)  # fmt: skip
"""Of `rollout`, with engine=policy."""


def check(config: RlConfig, world_size: int) -> None:
    """Everything that can be known before the first step; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    side = side_of(config)
    _check_keys(config, side.own_keys)
    prompts = side.check(config, world_size)
    longest = prompts.longest + config.rollout.max_new_tokens
    shape = read_shape(side.directory_of(config))
    check_layout(shape, config.parallel)
    check_lora(config.lora, shape, config.parallel)
    check_rollout_layout(shape, config.rollout.tp, world_size, config.rollout.expert_parallel)
    limit = min(config.rollout.max_model_len, shape.max_positions)
    if longest > limit:
        raise LayoutError(
            f"a prompt and rollout.max_new_tokens={config.rollout.max_new_tokens} make {longest} tokens",
            f"at most {limit} tokens in all", "lower rollout.max_new_tokens or raise rollout.max_model_len",
        )  # fmt: skip
    if side.alone(config) is None:
        if config.rollout.engine == "vllm":
            check_installed()
        _check_credit(config, prompts)
        check_replay(config)
    check_run_directory("rl", config)


def _check_keys(config: RlConfig, own: tuple[str, ...]) -> None:
    """A key of another task says nothing here, and whoever set it believes that it does."""
    unset = RlConfig()
    for key in ("model", "av", "ar", "ar_optim", "ar_updates", "ar_loss", "curriculum", "lora", "ar_lora"):
        if key not in own and getattr(config, key) != getattr(unset, key):
            raise ConfigError(
                f"{key}={getattr(config, key)!r} with task={config.task.name}, which does not read it",
                f"of such keys only {', '.join(own)}", f"remove {key}, or choose another task=",
            )  # fmt: skip


def _check_credit(config: RlConfig, prompts: Prompts) -> None:
    """Whether algorithm and reward can work on what the task gives them."""
    check_algorithm(config.algorithm, config.samples_per_prompt)
    reward = make_reward(config.reward, prompts.rows / config.batch_size, prompts.rows)
    reward.check_needs(prompts.values, config.task.name)


def unread(config: RlConfig) -> Iterator[Unread]:
    """What this run does not read."""
    if side_of(config).alone(config) is not None:
        idle = ("rollout", "algorithm", "reward", "samples_per_prompt", "critic_optim", "eval_rows")
        yield from ((key, "where nothing is sampled") for key in idle)
        return
    corrected = config.lora.rank and config.rollout.dtype != "float32"
    yield from algorithm_unread(config.algorithm, "tis" if corrected else "none")
    if not make_algorithm(config.algorithm).needs.values:
        yield "critic_optim", f"with algorithm.name={config.algorithm.name}, which has no critic"
    if config.rollout.engine == "policy":
        keys = (item.name for item in fields(config.rollout) if item.name not in _READ_BY_POLICY)
        yield from ((f"rollout.{key}", "with rollout.engine=policy") for key in keys)
    elif config.rollout.lora == "merged" or not config.lora.rank:
        yield "rollout.lora_rank", "without an adapter for the sampler"


def run(config: RlConfig, world: World) -> None:
    torch.manual_seed(config.seed)
    alone = side_of(config).alone(config)
    if alone is not None:
        return alone(config, world)
    trainer = RlTrainer(config, world)
    train(
        "rl", "rl", config, world, trainer.learners, trainer.step,
        on_resume=trainer.engine.take_weights, memory={"algorithm": trainer.algorithm, "reward": trainer.reward},
    )  # fmt: skip
    if config.export:
        trainer.side.export()
    if world.is_main:
        mark_done(config)
    trainer.engine.close()


class RlTrainer:
    """The task's side, the sampler, and one step of the loop."""

    def __init__(self, config: RlConfig, world: World, sampler: SamplerOf = make_sampler):
        self.config, self.world = config, world
        self.side = side = make_side(config, world)
        self.algorithm = make_algorithm(algorithm_of(config, side.shape))
        self.reward = make_reward(
            config.reward, side.n_rows / config.batch_size, side.n_rows, once=partial(by_rank_0, world=world)
        )
        self.critic = self._critic() if self.algorithm.needs.values else None
        # Before a checkpoint is loaded: a reference is of the policy that this stage starts from.
        self.reference = side.make_reference() if self.algorithm.needs.reference else None
        self.learners = dict(side.learners)
        if self.critic is not None:
            self.learners["critic"] = self.critic
        if isinstance(self.reference, MovingCopy):
            self.learners["reference"] = self.reference
        self.engine = sampler(config, side, world)
        self.sampling = Sampling(config, side, self.engine, self.algorithm, self.reward, world)
        self.learning = PolicyLearning(config, side, self.algorithm, self.critic, self.reference, world)
        # The sampler starts from the same directory, but the trainer's weights are the ones that count.
        self.engine.take_weights()

    def step(self, number: int) -> dict[str, float]:
        """One step: write, judge, credit, learn, hand over. Returns what to log."""
        clock = PhaseClock()
        before = self._before(clock) if number == 0 else {}
        scored = self.sampling.step(number, clock)
        with clock.phase("look"):
            sampled = self.learning.look(scored, number)
            credit = self.algorithm.credit(sampled)
        with clock.phase("policy"):
            learned = self.learning.update(scored.batch, sampled, credit, number)
        with clock.phase("learn"):
            beside = self.side.learn(scored.batch, scored.measured, number)
        with clock.phase("reload"):
            self.engine.take_weights()
        scalars = {**_of_rollouts(scored), **_of_learning(credit, learned), **beside}
        if self.config.eval_every and (number + 1) % self.config.eval_every == 0:
            with clock.phase("eval"):
                scalars |= self.side.evaluate(self.engine, number)
        return {**before, **scalars, **clock.seconds}

    def _before(self, clock: PhaseClock) -> dict[str, float]:
        """What later evaluations are compared with: that of the policy as the run starts."""
        if not self.config.eval_every:
            return {}
        with clock.phase("eval"):
            return {f"before_{name}": value for name, value in self.side.evaluate(self.engine, -1).items()}

    def _critic(self) -> TrainModule:
        """It starts from the policy's blocks, and reads what the policy reads."""
        config, side = self.config, self.side
        model = load_critic(side.directory, side.shape, self.world, config.dtype)
        intervene(model, side.interventions)
        load_projections(model, side.directory)
        return TrainModule(model, self.world, config.critic_optim, config.steps, config.micro_batch_size, config.dtype)


def _of_rollouts(scored: Scored) -> dict[str, float]:
    rollouts, rewards_N = scored.batch.rollouts, scored.scores.rewards
    return {
        "reward": float(rewards_N.mean()),
        "reward_std": float(rewards_N.std()),
        **{f"reward_{name}": float(values.mean()) for name, values in scored.scores.terms.items()},
        **scored.measured.counts,
        "response_length": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
        "truncated": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
        "injected": scored.batch.injections.injected,
        "expected_injections": scored.batch.injections.expected,
        "sampling_rounds": scored.rounds,
        "replaced_prompts": scored.replaced,
    }


def _of_learning(credit: Credit, learned: Learned) -> dict[str, float]:
    out = {f"policy_{name}" if name == "loss" else name: value for name, value in means(learned.policy).items()}
    out |= {f"critic_{name}": value for name, value in means(learned.critic).items()}
    for name, updates in (("policy", learned.policy), ("critic", learned.critic)):
        if updates:
            out |= {f"{name}_grad_norm": updates[-1].grad_norm, f"{name}_lr": updates[-1].learning_rate}
    skipped = sum(update.skipped for update in (*learned.policy, *learned.critic))
    return {**out, **credit.statistics, "skipped": skipped}
