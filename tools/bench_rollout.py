"""What injection costs the sampler, and what the prefix cache is worth. Plain vLLM runs beside ours, in turns.

    python tools/bench_rollout.py                  # both layouts, on the ranks it starts itself
    python tools/bench_rollout.py --repeats 3 --requests 64 --new-tokens 16

The last line is JSON. `injected_over_plain_tp1` and `injected_over_plain_tp2`: tokens/s with a vector of its own in
each request, accounts and exchange included, over vLLM alone on the same prompts, medians of paired runs.
`prefix_cache_speedup`: groups of 8 with a long prompt, with the cache over without. `logprob_error_max`: against a
transformers model hooked by hand. Plain is vLLM's own worker on an unchanged model. The machine should have nothing
else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

FLOORS = {
    "injected_over_plain_tp1": 0.95,
    "injected_over_plain_tp2": 0.95,
    "prefix_cache_speedup": 1.5,
    "logprob_error_max": 1e-4,
}
EOS, POSITION, LAYER, GROUP, LONG = 2, 7, 1, 8, 640


class Plain:
    """vLLM without anything of ours, asked for the same tokens."""

    def __init__(self, directory: str, config: Any):
        from vllm import LLM

        self.config = config
        self.llm = LLM(
            directory, skip_tokenizer_init=True, dtype=config.dtype, max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=True, tensor_parallel_size=config.tp,
            distributed_executor_backend="external_launcher",
            logprobs_mode="processed_logprobs", enforce_eager=True, disable_log_stats=True, use_tqdm_on_load=False,
            kv_cache_memory_bytes=int(config.cpu_kv_cache_gib * 2**30), seed=0,
        )  # fmt: skip

    def tokens(self, requests: list[Any], vectors: Any) -> int:
        from vllm import SamplingParams

        assert self.llm.reset_prefix_cache()
        params = [
            SamplingParams(
                n=request.samples, max_tokens=self.config.max_new_tokens, seed=request.seed, logprobs=0,
                stop_token_ids=[EOS], detokenize=False,
            )
            for request in requests
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(each.prompt_token_ids) + len(sample.token_ids) for each in outputs for sample in each.outputs)


def make_model(directory: Path, layers: int, width: int) -> None:
    """A random Qwen3 of a size at which the model, and not Python, takes the time."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from nla_megatron.datagen.tokenizer import train_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    train_tokenizer((topics[name] for name in sorted(topics)), 4096, directory)


def measure(options: argparse.Namespace, result: Path) -> None:
    """On every rank of one layout; the first writes what was found."""
    import numpy as np

    from nla_megatron.config.schema import ParallelConfig, RolloutConfig
    from nla_megatron.conversion.hf import read_shape
    from nla_megatron.interventions.spec import Intervention
    from nla_megatron.parallel.collectives import barrier
    from nla_megatron.parallel.world import initialise
    from nla_megatron.rollout.engine import Engine

    world, directory = initialise(ParallelConfig(tp=options.tp)), str(options.model)
    if world.is_main and not options.model.exists():
        make_model(options.model, options.layers, options.width)
    barrier(world)
    shape = read_shape(directory)
    config = RolloutConfig(
        tp=options.tp, max_new_tokens=options.new_tokens, max_model_len=1024, max_num_seqs=options.requests,
        max_num_batched_tokens=options.requests * options.prompt_tokens, cpu_kv_cache_gib=options.cache_gib,
    )  # fmt: skip
    vectors = np.random.default_rng(1).standard_normal((options.requests, shape.hidden_size)).astype(np.float32)
    ours = Engine(directory, shape, config, [Intervention(LAYER, "norm_add")], world, EOS, 0)
    plain = Plain(directory, config)
    out = {f"injected_over_plain_tp{options.tp}": paired(options, ours, plain, vectors)}
    if options.tp == 1:
        uncached = Engine(directory, shape, replace(config, prefix_caching=False), [Intervention(LAYER)], world, EOS, 0)
        out["prefix_cache_speedup"] = prefix_cache(options, ours, uncached, vectors)
    out["logprob_error_max"] = error(directory, ours, vectors)
    if world.is_main:
        result.write_text(json.dumps(out))


def requests_of(prompts: list[tuple[int, ...]], samples: int = 1) -> list[Any]:
    from nla_megatron.rollout.requests import PromptRequest

    return [PromptRequest(row, row, ids, POSITION, row, samples=samples) for row, ids in enumerate(prompts)]


def random_prompts(count: int, length: int, seed: int) -> list[tuple[int, ...]]:
    import numpy as np

    rng = np.random.default_rng(seed)
    return [tuple(int(each) for each in rng.integers(5, 4096, length)) for _ in range(count)]


def timed(engine: Any, requests: list[Any], vectors: Any) -> tuple[int, float]:
    """(prompt and response tokens, seconds) of one call, with nothing in the cache before it."""
    start = time.perf_counter()
    if isinstance(engine, Plain):
        tokens = engine.tokens(requests, vectors)
        return tokens, time.perf_counter() - start
    engine.forget()
    rollouts = engine.generate(requests, lambda rows: vectors[list(rows)], 1).rollouts
    tokens = sum(len(each.prompt_ids) + len(each.response_ids) for each in rollouts)
    return tokens, time.perf_counter() - start


def ratio(rate: Callable[[Any], float], first: Any, second: Any, repeats: int, what: str) -> float:
    """Median over pairs of the first engine's rate over the second's; who begins alternates."""
    for engine in (first, second, first, second):
        rate(engine)  # the first calls of an engine are slow
    pairs = []
    for number in range(repeats):
        order = (first, second) if number % 2 else (second, first)
        rates = {id(engine): rate(engine) for engine in order}
        pairs.append((rates[id(first)], rates[id(second)]))
    medians = [statistics.median(each) for each in zip(*pairs, strict=True)]
    median = statistics.median(a / b for a, b in pairs)
    spread = f"{min(a / b for a, b in pairs):.3f} to {max(a / b for a, b in pairs):.3f}"
    if first.world.is_main:
        print(f"{what}: {medians[0]:.0f} over {medians[1]:.0f} tokens/s, {median:.3f} ({spread})", file=sys.stderr)
    return median


def paired(options: argparse.Namespace, ours: Any, plain: Any, vectors: Any) -> float:
    requests = requests_of(random_prompts(options.requests, options.prompt_tokens, 2))

    def rate(engine: Any) -> float:
        tokens, seconds = timed(engine, requests, vectors)
        return tokens / seconds

    return ratio(rate, ours, plain, options.repeats, f"injected over plain, tp {options.tp}")


def prefix_cache(options: argparse.Namespace, cached: Any, uncached: Any, vectors: Any) -> float:
    """Prompt tokens per second of groups whose members share a long prompt and its vector."""
    requests = requests_of(random_prompts(options.groups, LONG, 3), GROUP)
    for engine in (cached, uncached):
        engine.config = replace(engine.config, max_new_tokens=1)

    def rate(engine: Any) -> float:
        _, seconds = timed(engine, requests, vectors)
        return options.groups * GROUP * LONG / seconds

    return ratio(rate, cached, uncached, (options.repeats + 1) // 2, "groups of 8, prefix cache")


def error(directory: str, engine: Any, vectors: Any) -> float:
    """Largest difference of log-probs from a hooked transformers model."""
    import torch
    from transformers import AutoModelForCausalLM

    engine.config = replace(engine.config, max_new_tokens=16)
    requests = requests_of(random_prompts(8, 40, 4), 2)
    rollouts = engine.generate(requests, lambda rows: vectors[list(rows)], 2).rollouts
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    worst = 0.0
    for rollout in rollouts:
        v = torch.from_numpy(vectors[rollout.row])

        def change(module: Any, inputs: Any, output: Any, v: Any = v) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            stream[0, POSITION] += stream[0, POSITION].norm() * v / v.norm()
            return output

        handle = model.model.layers[LAYER].register_forward_hook(change)
        ids = torch.tensor([*rollout.prompt_ids, *rollout.response_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0], -1)[:-1].gather(-1, ids[1:, None])[:, 0]
        handle.remove()
        gap = logprobs[len(rollout.prompt_ids) - 1 :] - torch.tensor(rollout.logprobs)
        worst = max(worst, float(gap.abs().max()))
    return worst


def on_ranks(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    measure(options, options.result)
    return 0


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("--requests", type=int, default=256, help="as many vectors")
    each.add_argument("--prompt-tokens", type=int, default=48)
    each.add_argument("--new-tokens", type=int, default=32)
    each.add_argument("--groups", type=int, default=2, help="groups of 8 for the prefix cache")
    each.add_argument(
        "--repeats", type=int, default=11, help="pairs of runs; half as many of the prefix cache, whose effect is large"
    )
    each.add_argument("--layers", type=int, default=6)
    each.add_argument("--width", type=int, default=256)
    each.add_argument("--cache-gib", type=float, default=1.5)
    each.add_argument("--tp", type=int, default=None, help="one layout only")
    each.add_argument("--model", type=Path, default=None, help=argparse.SUPPRESS)
    each.add_argument("--result", type=Path, default=None, help=argparse.SUPPRESS)
    return each


def main() -> int:
    from nla_megatron.launch.local import launch

    options = parser().parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        for tp in (1, 2) if options.tp is None else (options.tp,):
            result = Path(scratch) / f"tp{tp}.json"
            arguments = [*sys.argv[1:], "--tp", str(tp), "--model", str(model), "--result", str(result)]
            if code := launch(on_ranks, arguments, tp, []):
                return code
            for key, value in json.loads(result.read_text()).items():
                found[key] = max(found.get(key, 0.0), value)
    for key, value in found.items():
        good = value <= FLOORS[key] if key == "logprob_error_max" else value >= FLOORS[key]
        print(f"{key} {value:.3g}, floor {FLOORS[key]:g}: {'met' if good else 'MISSED'}", file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
