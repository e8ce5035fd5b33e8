"""The worker side of vLLM: its own workers, whose model calls our sites and whose runner marks the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nla_megatron.interventions.sae_files import load_sae
from nla_megatron.interventions.spec import Intervention
from nla_megatron.interventions.steering import formula_of
from nla_megatron.rollout import adapter, plugin
from nla_megatron.rollout.blocks import call_sites, site_name
from nla_megatron.rollout.marking import Marker
from nla_megatron.rollout.sites import Site

_GREEDY = 1e-5  # vLLM draws nothing at a temperature below


class InterveningWorker:
    """Mixed into a worker class of vLLM, before it. The interventions are in the engine's `additional_config`."""

    vllm_config: Any
    model_runner: Any
    device: Any

    def load_model(self, **options: Any) -> None:
        # Sites are built outside vLLM's memory pool, which sleeping gives back.
        super().load_model(**options)  # type: ignore[misc]
        plugin.register()
        wanted = self.vllm_config.additional_config.get(plugin.NAME, [])
        interventions = [Intervention.from_dict(each) for each in wanted]
        model, scheduler = self.model_runner.get_model(), self.vllm_config.scheduler_config
        sites = [self._site(each) for each in interventions]
        call_sites(model, interventions)
        context = self.vllm_config.compilation_config.static_forward_context
        context.update({site_name(number): site for number, site in enumerate(sites)})
        if self.vllm_config.lora_config is not None:
            manager = self.model_runner.lora_manager
            manager.__class__ = adapter.from_memory(type(manager))
        self.model_runner.__class__ = self.runner_class(type(self.model_runner))
        self.model_runner.marker = Marker(sites, scheduler.max_num_seqs)
        self.model_runner.sampler.__class__ = tempering(type(self.model_runner.sampler))

    def runner_class(self, base: Any) -> Any:
        """The class that the model runner, of class `base`, is turned into."""
        return marking(base)

    def _site(self, intervention: Intervention) -> Site:
        width = self.vllm_config.model_config.get_hidden_size()
        sae = None if intervention.sae is None else load_sae(intervention.sae).to(self.device)
        formula = formula_of(intervention, width, sae)
        scheduler = self.vllm_config.scheduler_config
        tokens, slots = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        return Site(intervention, formula, tokens, slots, width, self.device)


def marking(base: Any) -> Any:
    """A class of vLLM's model runners that tells its `marker` what is scheduled and what is about to run."""

    class MarkingRunner(base):
        marker: Marker

        def _update_states(self, scheduler_output: Any) -> Any:
            updated = super()._update_states(scheduler_output)
            self.marker.follow(scheduler_output)
            return updated

        def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
            starts = self.query_start_loc.np[: self.input_batch.num_reqs]
            self.marker.mark(self.input_batch, starts, num_scheduled_tokens)
            return prepared

    return MarkingRunner


def tempering(base: Any) -> Any:
    """A class of vLLM's samplers whose raw log-probs are those at the temperature of each request.

    vLLM itself gives them before the temperature, or after the temperature and the filters: the trainer has the former,
    and no filters. Greedy requests are at temperature 1. Tokens that are given, and not drawn, are scored at that of
    `scoring`.
    """

    class TemperingSampler(base):
        drawn: Tensor | float | None = None  # of the batch that tokens are being drawn for
        given: float = 1.0

        @contextmanager
        def scoring(self, temperature: float) -> Iterator[None]:
            self.given = temperature
            try:
                yield
            finally:
                self.given = 1.0

        def forward(self, logits: Tensor, sampling_metadata: Any, *rest: Any, **options: Any) -> Any:
            drawn_R = sampling_metadata.temperature
            # A batch that is greedy throughout has no temperatures at all.
            self.drawn = 1.0 if drawn_R is None else torch.where(drawn_R < _GREEDY, 1.0, drawn_R)[:, None]
            try:
                return super().forward(logits, sampling_metadata, *rest, **options)
            finally:
                self.drawn = None

        def compute_logprobs(self, logits: Tensor) -> Tensor:
            return super().compute_logprobs(logits.float() / (self.given if self.drawn is None else self.drawn))

    return TemperingSampler


def runner_of(llm: Any) -> Any:
    """The model runner of an engine that runs in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner
