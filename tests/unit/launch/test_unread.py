"""A key that is typed for a mode which does not read it is refused by name; what files set besides may be idle."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nla_megatron.algorithms import register
from nla_megatron.algorithms import unread as algorithm_unread
from nla_megatron.algorithms.policy_gradient import PolicyGradient
from nla_megatron.config.compose import compose, conf_dir
from nla_megatron.config.recipes import command_of
from nla_megatron.config.run_directory import claim_run_directory
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.config.unread import idle
from nla_megatron.errors import ConfigError
from nla_megatron.launch.commands import unread

NEEDED = {
    "rl": ("av=av", "ar=ar", "data=d"),
    "sft": ("model=m", "data=d"),
    "eval": ("data=d",),
    "judge": ("evaluation=e",),
    "build": ("input=i", "model=m"),
    "plan": ("hf=h",),
}
STEERED = ("task=sae", "model=m")


def check(command: str, *words: str, out: str = "out") -> None:
    typed = [*NEEDED.get(command, ()), f"out={out}", *words]
    config = compose(command, typed)
    for refusal in idle(command, config, typed, unread(command, config)).values():
        raise refusal


@pytest.mark.parametrize(
    ("command", "words", "found"),
    [
        ("rl", ["critic_optim.lr=1e-3"], "critic_optim.lr=0.001 with algorithm.name=grpo, which has no critic"),
        ("rl", ["critic_optim={lr: 1e-3}"], "critic_optim.lr=0.001"),
        ("rl", ["algorithm.value_clip=null"], "algorithm.value_clip=None with algorithm.name=grpo"),
        ("rl", ["algorithm.gae_lambda=0.5"], "algorithm.gae_lambda=0.5"),
        ("rl", ["algorithm=reinforce", "algorithm.whiten=false"], "algorithm.whiten=False"),
        ("rl", ["algorithm=ppo", "algorithm.normalise_std=false"], "algorithm.normalise_std=False"),
        ("rl", ["algorithm.loss_length=7"], "algorithm.loss_length=7 with algorithm.loss_mean=token"),
        ("rl", ["algorithm.reference_decay=0.5"], "algorithm.reference_decay=0.5 with algorithm.reference=initial"),
        ("rl", ["algorithm.correction_low=0.1"], "algorithm.correction_low=0.1 with algorithm.correction=none"),
        ("rl", ["algorithm.kl_coef=0", "algorithm.kl=k2"], "algorithm.kl='k2' with algorithm.kl_coef=0"),
        ("rl", ["rollout.lora_rank=8"], "rollout.lora_rank=8 without an adapter for the sampler"),
        ("rl", ["lora.rank=2", "rollout.lora=merged", "rollout.lora_rank=8"], "rollout.lora_rank=8 without an adapter"),
        *(
            ("rl", ["rollout.engine=policy", f"rollout.{word}"], f"rollout.{word} with rollout.engine=policy")
            for word in (
                "dtype='bfloat16'", "sleep=True", "gpu_memory_utilization=0.5", "cpu_kv_cache_gib=2.0", "compiled=True",
                "max_num_seqs=8", "max_num_batched_tokens=64", "kv_block_size=32", "prefix_caching=False",
                "lora_rank=8",
            )
        ),
        ("rl", [*STEERED, "task.options.objective=mse", "samples_per_prompt=2"], "samples_per_prompt=2 where nothing"),
        ("rl", [*STEERED, "task.options.objective=mse", "rollout.top_k=2"], "rollout.top_k=2 where nothing is sampled"),
        ("sft", ["role=ar", "ar_optim.lr=1"], "ar_optim.lr=1.0 with role=ar"),
        ("sft", ["role=ar", "parallel.ar_stages=[1]"], "parallel.ar_stages=[1] in sft, where no AR learns beside"),
        ("eval", ["parallel.ar_stages=[1]"], "parallel.ar_stages=[1] in eval"),
        ("rl", [*STEERED, "parallel.ar_stages=[1]"], "parallel.ar_stages=[1] in rl"),
        ("eval", ["model=m"], "model='m' in eval task=nla"),
        ("eval", ["task=math", "ar=a"], "ar='a' in eval task=math"),
        ("eval", ["task=lexical", "dtype=bfloat16"], "dtype='bfloat16' in eval task=lexical"),
        ("eval", [*STEERED, "task.options.objective=mse"], "task.options.objective='mse' in eval task=sae"),
        ("eval", [*STEERED, "task.options.reference=predictor"], "task.options.reference='predictor' in eval task=sae"),
        ("eval", [*STEERED, "task.options.fixed_strengths=[1]", "dtype=bfloat16"], "dtype='bfloat16' with"),
        ("judge", ["~rubrics", "high=5"], "high=5 without rubrics"),
        ("judge", ["parallel=tp2"], "parallel.tp=2 in judge"),
        ("build", ["parallel.pp=2"], "parallel.pp=2 in build"),
        ("convert", ["direction=verify", "shard_size=1GB"], "shard_size='1GB' in convert verify"),
        ("convert", ["direction=import", "logits=false"], "logits=False in convert import"),
    ],
)  # fmt: skip
def test_a_typed_key_that_is_not_read_is_named(command: str, words: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(command, *words)
    assert caught.value.found.startswith(found) and caught.value.found.endswith(", which does not read it")
    assert "its default" in caught.value.expected


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("rl", ["algorithm=ppo", "critic_optim.lr=1e-3", "algorithm.value_clip=null"]),
        ("rl", ["critic_optim.lr=2e-5", "rollout.engine=policy", "rollout.dtype=float32"]),
        ("rl", ["recipe=easynla", "model=m", "av=", "ar=", "rollout={engine: policy}"]),
        ("rl", ["algorithm=dr_grpo", "algorithm={loss_mean: token}"]),
        ("rl", ["algorithm=ppo", "algorithm.kl_coef=0"]),
        ("rl", ["recipe=nano_rl_actor_critic", "algorithm=grpo", "av=", "ar=", "model=m"]),
        ("rl", ["recipe=verl_sae", "rollout.engine=policy", "av=", "ar=", "model=m"]),
        ("rl", ["rollout.engine=policy", "rollout.top_k=2", "rollout.record=true", "rollout.max_logprob_gap=1"]),
        ("rl", ["rollout.lora=adapter", "lora.rank=2", "rollout.lora_rank=2"]),
        ("rl", ["lora.rank=2", "rollout.lora_rank=2"]),
        ("rl", ["lora.rank=2", "rollout.lora=merged", "rollout.dtype=bfloat16", "algorithm.correction_high=3"]),
        (
            "rl",
            [
                "+algorithm.options.x=1",
                "algorithm.name='tests.unit.launch.test_unread:Critical'",
                "algorithm.value_clip=null",
            ],
        ),
        ("sft", ["role=both", "ar_data=d", "ar_optim.lr=1", "parallel.ar_stages=[1]"]),
        ("rl", ["parallel.ar_stages=[1]"]),
        ("eval", [*STEERED, "dtype=bfloat16", "reward=lexical"]),
        ("plan", ["parallel=tp2"]),
        ("convert", ["direction=verify", "logits=false"]),
    ],
)
def test_what_is_read_is_a_default_or_came_from_a_file_passes(command: str, words: list[str]) -> None:
    check(command, *words)


def test_an_algorithm_that_does_not_say_what_it_reads_is_told_anything() -> None:
    register("silent")(type("Silent", (PolicyGradient,), {}))
    idle_keys = [key for key, _ in algorithm_unread(AlgorithmConfig(name="silent"))]
    assert "algorithm.gamma" not in idle_keys and "algorithm.reference_decay" in idle_keys


class Critical:
    """An algorithm of one's own may read what it likes."""

    def __init__(self, config: object):
        from nla_megatron.types import Needs

        self.needs = Needs(values=True)

    def credit(self) -> None:
        """Makes it an algorithm."""


@pytest.mark.parametrize("preset", sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml")))
def test_no_preset_sets_what_its_algorithm_does_not_read(preset: str) -> None:
    values = yaml.safe_load((conf_dir() / "algorithm" / f"{preset}.yaml").read_text())
    typed = [f"algorithm.{key}={value}".replace("None", "null") for key, value in values.items() if key != "name"]
    check("rl", f"algorithm={preset}", *typed)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml")))
def test_every_recipe_passes(recipe: str) -> None:
    command = command_of(recipe)
    words = {"sft": (), "rl": ("model=m",), "build": (), "extract": ("model=m", "corpus=c")}[command]
    check(command, *words, f"recipe={recipe}")


def test_a_run_that_has_begun_goes_on_as_it_was_told(tmp_path: Path) -> None:
    words = (*NEEDED["rl"], "critic_optim.lr=1e-3", f"out={tmp_path}")
    claim_run_directory("rl", compose("rl", words))
    check("rl", *words[3:], out=str(tmp_path))
