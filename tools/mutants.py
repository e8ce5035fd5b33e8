"""Break the package one line at a time, and see which test notices: `python tools/mutants.py`.

Each mutation is made in a copy of the working tree, the files of tests that should notice run there, and what they find
is told; one that they let pass goes through all the short tests. Run it before tests are merged, thinned or sped up:
what it caught before it has to catch after.

    --only WORD     mutations whose name has this word
    --list          names, files and tests, without running anything
    --hints         the files named beside each mutation alone, not all short tests where they notice nothing

The last line is JSON: how many were noticed, the names of those that were not, seconds. The exit code is 1 where one
was not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nla_megatron"


@dataclass(frozen=True)
class Mutation:
    """One line of a file of the package in place of another, and the test files that should notice, the first first."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, tree: Path) -> None:
        path = tree / PACKAGE / self.file
        text = path.read_text()
        assert text.count(self.before) == 1, f"{self.name}: {text.count(self.before)} times in {self.file}"
        path.write_text(text.replace(self.before, self.after))


def _(name: str, file: str, before: str, after: str, *tests: str) -> Mutation:
    return Mutation(name, file, before, after, tuple(f"tests/{test}.py" for test in tests))


MUTATIONS = (
    # What is injected, and where.
    _("norm_add forgets the stream's norm", "interventions/maths.py",
      "return scale * stream_ND.float().norm(dim=-1, keepdim=True) * _unit(vectors_ND)",
      "return scale * _unit(vectors_ND)", "unit/interventions/test_maths"),
    _("an injected vector is not normalised", "interventions/maths.py",
      "return vectors / vectors.norm(dim=-1, keepdim=True)", "return vectors", "unit/interventions/test_maths"),
    _("tokens of the response begin one late", "interventions/placement.py",
      "boundary = min(max(span.prompt_tokens - span.first, 0), span.count)",
      "boundary = min(max(span.prompt_tokens + 1 - span.first, 0), span.count)",
      "unit/interventions/test_placement"),
    _("a row's second vector enters at its first marker", "interventions/placement.py",
      "each = enumerate(positions, (slot + 1) * vectors - len(positions))",
      "each = enumerate(positions[::-1], (slot + 1) * vectors - len(positions))",
      "unit/interventions/test_placement"),
    _("a schedule goes on beyond its end", "interventions/schedules.py",
      "done = min(max(step, 0), self.steps) / self.steps", "done = max(step, 0) / self.steps",
      "unit/interventions/test_schedules"),
    _("the sampler injects nothing", "rollout/op.py",
      "get_forward_context().no_compile_layers[site].change(hidden_TD, residual_TD)", "get_forward_context()",
      "distributed/test_engine"),
    _("nobody counts what was injected", "rollout/accounting.py",
      "if period.marked[index] != period.applied[index]:", "if False:",
      "distributed/test_engine"),
    _("a cached block is shared by other vectors", "rollout/accounting.py",
      'digest.update(b"none" if vector_D is None else np.ascontiguousarray(vector_D, dtype=np.float32).tobytes())',
      'digest.update(b"none")', "unit/rollout/test_requests"),
    _("a recomputed chunk is marked from the prompt's start", "rollout/marking.py",
      "span = Span(first, count, asked.prompt_tokens)", "span = Span(0, count, asked.prompt_tokens)",
      "unit/rollout/test_marking"),
    _("ids of a neighbour of the marker are not looked at", "contract/prompts.py",
      "if prompt[p - 1 : p + 2] == wanted]", "if prompt[p] == wanted[1]]", "unit/contract/test_prompts"),
    _("a marker in the response is taken", "contract/prompts.py",
      "prompt = list(ids if prompt_length is None else ids[:prompt_length])", "prompt = list(ids)",
      "unit/contract/test_prompts"),
    # What the sampler returns.
    _("the end token is part of the text", "rollout/requests.py",
      "text=tokenizer.decode(ids[:-1] if ended else ids),", "text=tokenizer.decode(ids),",
      "unit/rollout/test_requests", "distributed/test_text"),
    _("another rank's rollouts", "rollout/accounting.py",
      "rollouts += sent or []", "rollouts += everyone[0][2] or []",
      "unit/rollout/test_accounting", "distributed/test_engine"),
    _("ranks of a replica may differ", "rollout/accounting.py",
      "if digest != everyone[first][0]:", "if False:", "unit/rollout/test_accounting"),
    _("log-probs of the sampler at temperature one", "rollout/worker.py",
      "return super().compute_logprobs(logits.float() / (self.given if self.drawn is None else self.drawn))",
      "return super().compute_logprobs(logits.float())", "distributed/test_engine"),
    _("the seed is the same for every row", "tasks/nla.py",
      'return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{row}".encode()).digest()[:4], "big") >> 1',
      'return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:4], "big") >> 1',
      "unit/tasks/test_nla"),
    _("the tied output layer keeps its old weights", "rollout/engine.py",
      'if self.tied and name == "model.embed_tokens.weight":', "if False:", "distributed/test_engine",
      "distributed/test_reshard"),
    _("the prefix cache survives a load", "rollout/engine.py",
      'assert self.llm.reset_prefix_cache(), "no request is under way"', "pass",
      "distributed/test_engine"),
    # Models.
    _("a rope base of 10,000", "models/rotary.py",
      "base = shape.rope_theta if own_base is None else own_base", "base = 10_000.0 if own_base is None else own_base",
      "unit/models/test_rotary"),
    _("the halves of a head turn the other way", "models/rotary.py",
      "torch.cat((-second, first), dim=-1)", "torch.cat((second, -first), dim=-1)", "unit/models/test_attention",
      "unit/models/test_builder", "distributed/test_layouts"),
    _("a window sees one token more", "models/attention.py",
      "seen & (back < window)", "seen & (back <= window)", "unit/models/test_attention"),
    _("log-probs of a token by its own position", "models/batching.py",
      "return torch.cat([ids_BT[:, 1:], torch.zeros_like(ids_BT[:, :1])], dim=1)", "return ids_BT",
      "unit/models/test_batching", "unit/models/test_logprobs", "unit/training/test_policy_loss"),
    _("the mask of a response leaves its end out", "models/batching.py",
      "return ((at >= first) & (at < last)).float()", "return ((at >= first) & (at < last - 1)).float()",
      "unit/models/test_batching"),
    _("the AR reads the last token of the padded row", "models/heads.py",
      "return stream_TBD[lengths_B - 1, rows_B].float()", "return stream_TBD[-1, rows_B].float()",
      "unit/models/test_heads"),
    _("an adapter adds twice its share", "models/lora.py",
      "return (self.B.detach() @ self.A.detach()) * self.scale", "return (self.B.detach() @ self.A.detach()) * 2",
      "unit/models/test_lora"),
    _("the entropy forgets the temperature", "models/logprobs.py",
      "logits = tempered(logits_BTV, temperature).clamp(min=torch.finfo(torch.float32).min)",
      "logits = logits_BTV.float().clamp(min=torch.finfo(torch.float32).min)", "unit/models/test_logprobs"),
    _("padding rows of the vocabulary take probability", "models/verbalizer.py",
      "if real >= logits_BTV.shape[-1]:", "if True:", "unit/models/test_logprobs", "unit/models/test_builder",
      "distributed/test_layouts"),
    # Rewards and algorithms.
    _("the reward's sign", "geometry.py", "        return -mse_N\n", "        return mse_N\n", "unit/test_geometry"),
    _("a failed response is worth nothing lost", "tasks/nla.py",
      "mse_N = torch.full((len(explanations),), 2.0)", "mse_N = torch.zeros(len(explanations))", "unit/tasks/test_nla"),
    _("an unfinished response has an explanation", "tasks/nla.py",
      "return [extract_explanation(rollout.text) if rollout.finished else None for rollout in rollouts]",
      "return [extract_explanation(rollout.text) for rollout in rollouts]", "unit/tasks/test_nla"),
    _("groups share one baseline", "algorithms/advantages.py",
      "out = rewards - _per_group(rewards, groups_N, \"sum\") / size", "out = rewards - rewards.mean()",
      "unit/algorithms/test_advantages"),
    _("the sign of the KL", "algorithms/kl.py",
      "difference = (reference - logprobs).clamp(-clamp, clamp)",
      "difference = (logprobs - reference).clamp(-clamp, clamp)", "unit/algorithms/test_kl"),
    _("the ratio is clipped from above alone", "algorithms/surrogates.py",
      "loss_BT = -(ratio_BT * advantages_BT).minimum(bounded_BT * advantages_BT)",
      "loss_BT = -bounded_BT * advantages_BT", "unit/algorithms/test_policy_gradient", "unit/algorithms/test_trl"),
    _("each response weighs by its length", "algorithms/weights.py",
      "return mask_NT / mask_NT.sum(1, keepdim=True).clamp(min=1) / rows", "return mask_NT / mask_NT.sum()",
      "unit/algorithms/test_weights"),
    _("values of the next token are forgotten", "algorithms/returns.py",
      "error_N = rewards_NT[:, at].double() + gamma * next_value_N - value_N",
      "error_N = rewards_NT[:, at].double() - value_N", "unit/algorithms/test_returns"),
    _("an overlong response is not punished", "rewards/length.py",
      "return ((start - self.lengths(measured)) / self.options.buffer).clamp(-1, 0)",
      "return self.lengths(measured) * 0", "unit/rewards/test_length"),
    _("FVE over the sum of squares", "geometry.py",
      "return deviation(v_ND, v_ND.double().mean(dim=0), None)",
      "return deviation(v_ND, v_ND.double().mean(dim=0) * 0, None)", "unit/test_geometry"),
    # Training.
    _("the loss is that of one rank", "models/pipeline.py",
      "scale = len(parts) * world.dp", "scale = len(parts)", "distributed/test_layouts"),
    _("rows that only fill up count", "training/losses.py",
      'mask_BT = part.fields["mask"] * part.weights[:, None]', 'mask_BT = part.fields["mask"]',
      "distributed/test_layouts", "unit/training/test_sft"),
    _("the critic's rows are the policy's minibatch before", "training/policy.py",
      'fields = {"old_values": sampled.values[chosen], "returns": credit.returns[chosen], "token_weights": weights}',
      'fields = {"old_values": sampled.values[chosen], "returns": credit.returns[: len(chosen)], '
      '"token_weights": weights}', "unit/training/test_policy"),
    _("the sampler's log-probs stand one late", "training/policy.py",
      "first = len(rollout.prompt_ids) - 1\n        out[index", "first = len(rollout.prompt_ids)\n        out[index",
      "unit/training/test_policy", "end_to_end/test_demo"),
    _("the sampler keeps the weights of the step before", "training/rl.py",
      'with clock.phase("reload"):\n            self.engine.take_weights()',
      'with clock.phase("reload"):\n            pass',
      "end_to_end/test_demo", "end_to_end/test_rl_layouts"),
    _("every epoch has the order of the first", "training/data_order.py",
      "order = np.random.default_rng([seed, epoch]).permutation(n_rows)",
      "order = np.random.default_rng([seed, 0]).permutation(n_rows)", "unit/training/test_data_order"),
    _("the warm-up never ends", "training/optimizer.py",
      "return config.lr * (step + 1) / config.warmup_steps", "return config.lr / config.warmup_steps",
      "unit/training/test_optimizer_schedule"),
    _("AdamW's steps are shared after a resume", "training/optimizer.py",
      'state["step"] = torch.as_tensor(state["step"]).clone()', "pass", "end_to_end/test_resume"),
    _("a checkpoint of another stage is taken", "training/checkpoint.py",
      "if found.get(key) != value:", "if False:", "unit/training/test_checkpoint"),
    # Data, conversion, resharding.
    _("rows of a held-out document are trained on", "contract/splits.py",
      'return _uniform(f"held_out\\0{doc_id}") < fraction', "return False", "unit/contract/test_splits"),
    _("the activation is that of the token before", "datagen/extract.py",
      "window_NWD = stream_TD[last_N[:, None] - back_W].float()",
      "window_NWD = stream_TD[last_N[:, None] - 1 - back_W].float()", "unit/datagen/test_extract_positions",
      "end_to_end/test_demo"),
    _("the shuffled control is not shuffled", "evaluation/held_out.py",
      "turned[place] = rows[following]", "turned[place] = rows[place]", "unit/evaluation/test_held_out"),
    _("k and v change places", "conversion/families/llama_like.py",
      "return Part(q, per_group), Part(k), Part(v)", "return Part(q, per_group), Part(v), Part(k)",
      "unit/conversion/test_rules", "unit/models/test_builder", "distributed/test_layouts"),
    _("the gate and the up projection change places", "conversion/families/llama_like.py",
      'Rule(f"{ours}linear_fc1.weight", (2, ffn, d), (gate, up), tp_axis=1, slot_axis=0, expert=expert)',
      'Rule(f"{ours}linear_fc1.weight", (2, ffn, d), (up, gate), tp_axis=1, slot_axis=0, expert=expert)',
      "unit/conversion/test_rules", "distributed/test_layouts"),
    _("a rank reads the slice of the next one", "conversion/rules.py",
      "start, stop = tp_rank * per_rank * inner, (tp_rank + 1) * per_rank * inner",
      "start, stop = (tp_rank + 1) % tp * per_rank * inner, ((tp_rank + 1) % tp + 1) * per_rank * inner",
      "unit/conversion/test_rules", "distributed/test_layouts"),
    _("a region off by one", "reshard/regions.py",
      "offset += (its.start - mine.start) // mine.step * stride",
      "offset += ((its.start - mine.start) // mine.step + (its.start > mine.start)) * stride",
      "unit/reshard/test_regions"),
    _("regions meet one element too far", "reshard/regions.py",
      "low, stop = max(a.start, b.start), min(a.stop, b.stop)",
      "low, stop = max(a.start, b.start), min(a.stop, b.stop) + 1", "unit/reshard/test_regions"),
    _("what no rank holds is not missed", "reshard/plan.py",
      "if complete and covered != region.size:", "if False:", "unit/reshard/test_plan"),
    _("a sum over the world leaves the others out", "parallel/collectives.py",
      "        dist.all_reduce(total, group=world.control)", "        pass", "distributed/test_layouts"),
)  # fmt: skip


def copy_of_the_tree(into: Path) -> Path:
    """Tracked and new files as they stand, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    return into


def first_failure(tree: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails there, None where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found.group(1) if found else f"pytest ended with {done.returncode}: {done.stdout.strip()[-200:]}"


def noticed(tree: Path, mutation: Mutation, hints_alone: bool) -> str | None:
    """The test that fails on a mutated tree, which is as it was afterwards."""
    path = tree / PACKAGE / mutation.file
    whole = path.read_text()
    mutation.apply(tree)
    try:
        return first_failure(tree, mutation.tests) or (None if hints_alone else first_failure(tree, ["tests"]))
    finally:
        path.write_text(whole)


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the package one line at a time, and see which test notices.")
    parser.add_argument("--only", default="", help="mutations whose name has this word")
    parser.add_argument("--list", action="store_true", help="names, files and tests, without running anything")
    parser.add_argument("--hints", action="store_true", help="run the files named beside each mutation alone")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name:55} {mutation.file:38} {' '.join(mutation.tests)}")
        return 0
    start, missed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        tree = copy_of_the_tree(Path(scratch))
        for mutation in chosen:
            test = noticed(tree, mutation, options.hints)
            missed += [] if test else [mutation.name]
            print(f"{mutation.name:55} {test or 'NOT NOTICED'}", flush=True)
    seconds = round(time.monotonic() - start)
    print(
        json.dumps(
            {"mutations": len(chosen), "noticed": len(chosen) - len(missed), "missed": missed, "seconds": seconds}
        )
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
