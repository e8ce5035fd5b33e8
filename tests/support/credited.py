"""Every algorithm preset in `rl` without vLLM: the commands, their files, and a sampler with fixed responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_megatron.config.compose import conf_dir
from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.contract.prompts import wrap_explanation
from nla_megatron.contract.sidecar import InjectionSpec, ProjectionSpec, read_dataset_sidecar, write_dataset_sidecar
from nla_megatron.conversion.heads import write_reconstructor_head
from nla_megatron.conversion.projections import write_projections
from nla_megatron.interventions.projection import Projection
from nla_megatron.rollout.requests import PromptRequest, Vectors
from nla_megatron.types import InjectionCount, Rollout, RolloutBatch
from tests.support.covering import chosen
from tests.support.tiny import INJECTION, LAYER, SHAPE, tiny_model, tiny_model_sidecar, tiny_table

STEPS, PROMPTS, SAMPLES, ROWS = 3, 4, 3, 48
TASKS = ("lexical", "nla")
LAYOUTS = {"single": 1, "tp2": 2, "pp2": 2}
"""Files of `conf/parallel/`, with their numbers of processes."""
PRESETS = tuple(sorted(file.stem for file in (conf_dir() / "algorithm").glob("*.yaml")))
_SEVERAL = ("algorithm.epochs=2", "algorithm.minibatches=2")
_MOVING = ("algorithm.reference=ema", "algorithm.reference_decay=0.5", "algorithm.kl_coef=1.0")
SEVERAL = {
    f"{name} several": (f"algorithm={name}", *_SEVERAL) for name in ("cispo", "grpo", "gspo", "reinforce", "rloo")
}
"""Several updates on a step's rollouts, as of the presets `ppo` alone makes: ratios other than 1, some of them cut."""
CASES = {
    **{preset: (f"algorithm={preset}",) for preset in PRESETS},
    "grpo moving": ("algorithm=grpo", *_MOVING),
    **SEVERAL,
}
PROJECTED = {"ppo projected": ("algorithm=ppo",)}
"""On a table whose activations are projected, by the policy, its reference and the critic."""
RUNS = tuple((case, task) for task in TASKS for case in CASES if task == "lexical" or case not in SEVERAL)
"""What a ratio is made of does not depend on the task."""
RUNS += tuple((case, "nla") for case in PROJECTED)
SPREAD = chosen(product(RUNS, [layout for layout in LAYOUTS if layout != "single"]), lambda run: (*run[0], run[1]))
"""Runs, and the layouts of several ranks on which they are repeated."""
PROJECT = InjectionSpec("project", 1, 1.0, None, ProjectionSpec("norm_add", 2))
_WORDS = "a token of the class is not an object but any other name that its value may have in this block".split()


def write_files(folder: Path, write_model: Callable[[Path], Path] = tiny_model) -> None:
    """A model that is the policy, the AV and the AR, prompts for `lexical`, and the tables of `nla`."""
    model = write_model(folder / "model")
    for name, role, injection in (("av", "av", INJECTION), ("projecting", "av", PROJECT), ("ar", "ar", None)):
        write_model(folder / name)
        tiny_model_sidecar(folder / name, model, role, injection)
    write_projections(folder / "projecting", {0: Projection(SHAPE.hidden_size, SHAPE.hidden_size, 2, seed=1)})
    head = torch.randn(SHAPE.hidden_size, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1))
    write_reconstructor_head(folder / "ar", {"weight": head}, ReconstructorSpec(), LAYER)
    for name, injection in (("av", INJECTION), ("projecting", PROJECT)):
        table = tiny_table(folder / f"{name}.parquet", model, "rl")
        write_dataset_sidecar(table, replace(read_dataset_sidecar(table), injection=injection))
    prompts = [{"prompt": f"Document {row} tells" + " more" * (row % 3)} for row in range(ROWS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def overrides(folder: Path, layout: str, case: str, task: str) -> list[str]:
    """What a user would type after `rl`. Rates are high, so that weights that go apart are seen."""
    av = "projecting" if case in PROJECTED else "av"
    own = {
        "lexical": ["reward=lexical", f"model={folder / 'model'}", f"data={folder / 'prompts.jsonl'}",
                    "task.options.held_out_fraction=0"],
        "nla": [f"av={folder / av}", f"ar={folder / 'ar'}", f"data={folder / av}.parquet", "ar_updates=2"],
    }  # fmt: skip
    rates = [
        f"{name}.{key}"
        for name in (
            "optim",
            *(("critic_optim",) if _has_critic(case) else ()),
            *(("ar_optim",) if task == "nla" else ()),
        )
        for key in ("lr=1e-3", "warmup_steps=0", "schedule=constant")
    ]
    return [
        f"task={task}", *own[task], *(CASES | PROJECTED)[case], f"parallel={layout}",
        f"out={out_of(folder, layout, case, task)}",
        f"steps={STEPS}", f"batch_size={PROMPTS}", f"samples_per_prompt={SAMPLES}", "seed=5",
        # It divides neither a step nor a minibatch: rows that only fill the last microbatch are there.
        "micro_batch_size=5", "rollout.max_new_tokens=64", *rates,
    ]  # fmt: skip


def _has_critic(case: str) -> bool:
    return case.split()[0] in ("ppo", "actor_critic")


def out_of(folder: Path, layout: str, case: str, task: str) -> Path:
    """The run's directory."""
    return folder / layout / f"{case} {task}".replace(" ", "_")


class WrittenSampler:
    """Of a `training.sampler.Sampler` what a step of these tasks asks. Responses depend on row and sample alone.

    All samples of every fourth row are worth the same: one text for `lexical`, and for `nla` several without an
    explanation. One sample of every fourth row is cut off.
    """

    def __init__(self, config: Any, side: Any, world: Any):
        self.tokenizer, self.nla = side.tokenizer, config.task.name == "nla"

    def generate(
        self, requests: Sequence[PromptRequest], vectors: Vectors, samples: int, training_step: int = 0
    ) -> RolloutBatch:
        rollouts = tuple(
            self._rollout(request, SAMPLES if request.greedy else sample)
            for request in requests
            for sample in range(samples)
        )
        return RolloutBatch(rollouts, InjectionCount(len(rollouts), len(rollouts)))

    def _rollout(self, request: PromptRequest, sample: int) -> Rollout:
        dull, finished = request.row % 4 == 0, (request.row % 4, sample) != (1, 1)
        rng = np.random.default_rng([request.row, 0 if dull and not self.nla else sample])
        text = " ".join(rng.choice(_WORDS, rng.integers(2, 16)))
        ids = self.tokenizer.encode(wrap_explanation(text) if self.nla and not dull else text)
        written = [*ids, self.tokenizer.end_id] if finished else ids[:-2]
        logprobs = rng.uniform(-7, -5, len(written)).tolist()
        return Rollout(
            group=request.group, sample=0 if request.greedy else sample, row=request.row, prompt_ids=request.prompt_ids,
            response_ids=tuple(written), logprobs=tuple(logprobs), finished=finished,
            text=self.tokenizer.decode(written[:-1] if finished else written),
        )  # fmt: skip

    def take_weights(self) -> None:
        """The responses are what they are."""

    def close(self) -> None:
        """Nothing runs."""
