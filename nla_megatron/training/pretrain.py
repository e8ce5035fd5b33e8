"""`pretrain`: a small base model from nothing, where no pretrained one can be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nla_megatron.config.run_directory import check_run_directory, mark_done
from nla_megatron.config.schema import PretrainConfig
from nla_megatron.contract.corpus import read_corpus
from nla_megatron.contract.splits import held_out
from nla_megatron.contract.tokenizer import ModelTokenizer, load_tokenizer
from nla_megatron.conversion.families import FAMILIES
from nla_megatron.conversion.hf import check_vocabulary
from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.models.builder import check_layout
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.training.export import export
from nla_megatron.training.loop import train
from nla_megatron.training.losses import cross_entropy
from nla_megatron.training.module import TrainModule
from nla_megatron.types import ModelShape


def shape_of(config: PretrainConfig, vocab_size: int) -> ModelShape:
    return config.architecture.shape(vocab_size)


def check(config: PretrainConfig, world_size: int) -> None:
    """Everything that can be known before the first step; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    if not Path(config.corpus).is_file():
        raise MissingFile(f"no {config.corpus}", "a corpus of documents", "correct corpus=")
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.check_ends()
    check_layout(shape_of(config, len(tokenizer)), config.parallel)
    check_vocabulary(Path(config.tokenizer), len(tokenizer))
    check_run_directory("pretrain", config)


def run(config: PretrainConfig, world: World) -> None:
    tokenizer = load_tokenizer(config.tokenizer)
    stream = token_stream(config, tokenizer)
    width = config.sequence_length
    if len(stream) <= width:
        raise ConfigError(
            f"{len(stream)} tokens in {config.corpus}", f"more than sequence_length={width}", "give a larger corpus"
        )
    torch.manual_seed(config.seed)
    shape = shape_of(config, len(tokenizer))
    model = build_verbalizer(shape, world, config.dtype)
    module = TrainModule(model, world, config.optim, config.steps, config.micro_batch_size, config.dtype)

    def step(number: int) -> dict[str, float]:
        # Windows start anywhere, so that no document always begins at the same offset.
        rng = np.random.default_rng([config.seed, 1, number])
        starts = rng.integers(0, len(stream) - width - 1, config.batch_size)
        batch = Batch(
            ids=[stream[start : start + width + 1].tolist() for start in starts],
            fields={"mask": response_mask([1] * config.batch_size, [width + 1] * config.batch_size, width + 1)},
        )
        update = module.update(batch, cross_entropy(float(config.batch_size * width)), ("loss",), number)
        return {"loss": update.statistics["loss"], "lr": update.learning_rate, "grad_norm": update.grad_norm}

    train("pretrain", "pretrain", config, world, {"lm": module}, step)
    if config.export:
        hf_config = {
            **FAMILIES[shape.family].config_from_shape(shape),
            **tokenizer.config_ids(),
        }
        export(model, config.tokenizer, Path(config.out) / "hf", world, config=hf_config)
    if world.is_main:
        mark_done(config)


def token_stream(config: PretrainConfig, tokenizer: ModelTokenizer) -> np.ndarray:
    """All training documents, shuffled, one after another with an end token between: (tokens,) int32."""
    documents = [text for doc_id, text in read_corpus(config.corpus) if not held_out(doc_id, config.held_out)]
    order = np.random.default_rng([config.seed, 2]).permutation(len(documents))
    encoded = tokenizer.encode_each([documents[index] for index in order])
    return np.concatenate([np.asarray([*ids, tokenizer.end_id], dtype=np.int32) for ids in encoded])
