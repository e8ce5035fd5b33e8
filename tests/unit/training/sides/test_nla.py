"""What is known of the task `nla` before a model is loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nla_megatron.config.compose import compose
from nla_megatron.contract.sidecar import (
    PoolSpec,
    read_dataset_sidecar,
    read_model_sidecar,
    write_dataset_sidecar,
    write_model_sidecar,
)
from nla_megatron.conversion.hf import VALUE_HEAD
from nla_megatron.errors import LayoutError
from nla_megatron.tasks.nla import NlaTask
from nla_megatron.training.sides.nla import NlaSide
from tests.support.tiny import tiny_model_sidecar, tiny_rows, tiny_table


def test_the_longest_prompt_is_that_of_the_most_activations_of_either_table(
    model_dir: Path, directory: Path, tmp_path: Path
) -> None:
    """Up to two in the one and up to three in the other, of one build."""
    tables = {
        count: tiny_table(tmp_path / f"{count}.parquet", model_dir, "rl", tiny_rows(64, positions=count, fewest=1))
        for count in (2, 3)
    }
    table = read_dataset_sidecar(tables[3])
    write_dataset_sidecar(tables[2], replace(read_dataset_sidecar(tables[2]), pool=PoolSpec("stack", 3, 1)))
    for role in ("av", "ar"):
        shutil.copytree(directory, tmp_path / role)
        sidecar = read_model_sidecar(tiny_model_sidecar(tmp_path / role, model_dir, role))
        write_model_sidecar(tmp_path / role, replace(sidecar, tokens=table.tokens, pool=table.pool))
    save_file({"weight": torch.eye(64)}, tmp_path / "ar" / VALUE_HEAD)
    models = (f"av={tmp_path / 'av'}", f"ar={tmp_path / 'ar'}")
    task = NlaTask.open(str(tables[3]), "rl", str(model_dir))
    lengths = [len(task.prompt(count).ids) for count in (1, 2, 3)]
    assert lengths == sorted(set(lengths))
    found = NlaSide.check(compose("rl", ["out=x", f"data={tables[2]}", *models]), 1)
    assert (found.rows, found.longest) == (48, lengths[1])
    # The AV has 4 blocks, the AR 3: each is dealt to stages by a key of its own.
    for stages in ("[1,3] parallel.ar_stages=[2,1]", "[3,1]"):
        words = f"parallel.pp=2 parallel.stages={stages}".split()
        NlaSide.check(compose("rl", ["out=x", f"data={tables[2]}", *models, *words]), 2)
    with pytest.raises(LayoutError, match=r"parallel.ar_stages=\[1, 3\] for 3 blocks"):
        words = ["parallel.pp=2", "parallel.stages=[1,3]", "parallel.ar_stages=[1,3]"]
        NlaSide.check(compose("rl", ["out=x", f"data={tables[2]}", *models, *words]), 2)
    for data, held_out in ((2, 3), (3, 2)):
        words = (f"data={tables[data]}", f"held_out={tables[held_out]}", *models)
        assert NlaSide.check(compose("rl", ["out=x", *words]), 1).longest == lengths[2]
