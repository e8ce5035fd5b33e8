"""Names of the Hugging Face hub wherever a model, a corpus or a problem set may be named by a path.

`owner/name` is a model, `owner/name`, `owner/name:split` or `owner/name:config:split` a data set; `@` and a revision
may follow the name. What is there under that path on this machine always wins. A command resolves the names in its
configuration before anything reads them, through huggingface_hub's cache, so that everybody else sees paths alone.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.reading import read_text
from nla_megatron.types import DATASET_SIDECAR

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]+))?((?::[^:/]+){{0,2}})")
_FILES = (".parquet", ".jsonl", ".ndjson", ".json")
_NO_NAMES = (*_FILES, ".gz", ".zst", ".txt", ".csv", ".yaml", ".yml", ".safetensors", ".arrow", ".html")
# What no reader of ours takes, mostly second copies of the weights.
_LEFT_OUT = ("*.bin", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.tflite", "*.ot", "*.pth", "original/*", "onnx/*")
_SHARD = r"(?:-\d+-of-\d+)?"
_SNAPSHOT = re.compile(r"(models|datasets)--(.+?)--(.+)")
CACHE_ONLY = "NLA_MEGATRON_HUB_CACHE_ONLY"
"""In the environment of processes whose starter has asked the hub already."""


@dataclass(frozen=True)
class Name:
    """What a name of the hub asks for; `subset` is the configuration of a data set."""

    repository: str
    revision: str | None = None
    subset: str = ""
    split: str = "train"
    kind: str = "model"

    @property
    def told(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"the {'model' if self.kind == 'model' else 'data set'} {self.repository}{at}"


def model_directory(value: str, key: str = "model", only: Sequence[str] | None = None) -> str:
    """A directory of this machine: `value` itself, or where the hub's cache has the model of that name.

    Args:
        key: of the configuration, for messages.
        only: patterns of the files that are needed; None is all that is read of a model.

    Raises:
        MissingFile: no model of that name, a gated one, or neither in the cache nor reachable.
    """
    name = _named(value, "model")
    if name is None:
        return value
    from huggingface_hub import snapshot_download

    with _refusals(name, key):
        return str(
            snapshot_download(
                name.repository, revision=name.revision, ignore_patterns=list(_LEFT_OUT),
                allow_patterns=None if only is None else list(only), local_files_only=_cache_only(),
            )
        )  # fmt: skip


def dataset_path(value: str, key: str = "data") -> str:
    """A path of this machine: `value` itself, or that of a split's file in the hub's cache, with a `*` for several.

    Raises:
        MissingFile: as `model_directory`, or no such configuration or split.
        ConfigError: files of several configurations, none of which is named.
    """
    name = _named(value, "dataset")
    if name is None:
        return value
    return _as_one_path(split_files(name, key), name, key)


def split_files(name: Name, key: str = "data") -> list[Path]:
    """The files of a data set's split in the hub's cache, downloaded where it lacks them. Raises as `dataset_path`."""
    from huggingface_hub import HfApi, hf_hub_download

    held = _held(name, key)
    if held:
        return held
    with _refusals(name, key):
        if _cache_only():
            from huggingface_hub.errors import OfflineModeIsEnabled

            raise OfflineModeIsEnabled("only the cache may be asked")
        info = HfApi().dataset_info(name.repository, revision=name.revision)
        listed = [file.rfilename for file in info.siblings or ()]

        def local(file: str) -> Path:
            return Path(hf_hub_download(name.repository, file, repo_type="dataset", revision=info.sha))

        card = read_text(local("README.md")) if "README.md" in listed else ""
        chosen = _chosen(listed, card, name, key)
        for sidecar in (f"{file}{DATASET_SIDECAR}" for file in chosen):
            if sidecar in listed:
                local(sidecar)
        return [local(file) for file in chosen]


def files_at(path: str | Path) -> list[Path]:
    """The file at a path, or those that its last part names with a `*`, in order; none where there is none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if "*" not in path.name or not path.parent.is_dir():
        return []
    return sorted(file for file in path.parent.glob(path.name) if file.is_file())


def name_of(path: str | Path) -> str:
    """`owner/name@commit` of what lies in a snapshot of the hub's cache, with its place there; "" of anything else."""
    parts = Path(path).parts
    for at, part in enumerate(parts[:-2]):
        found = _SNAPSHOT.fullmatch(part)
        if found is not None and parts[at + 1] == "snapshots":
            return ":".join([f"{found[2]}/{found[3]}@{parts[at + 2]}", *parts[at + 3 :]])
    return ""


def repository_of(path: str | Path) -> str:
    """What others call a model or a corpus: `owner/name` of one in the hub's cache, else the path itself."""
    return name_of(path).partition("@")[0] or str(path)


def _named(value: str, kind: str) -> Name | None:
    """The hub's name that a value is; None where it is a path."""
    found = _NAME.fullmatch(value)
    if found is None or value.endswith(_NO_NAMES) or (found[3] and kind == "model") or Path(value).exists():
        return None
    parts = found[3].split(":")[1:]
    subset, split = parts if len(parts) == 2 else ("", *(parts or ["train"]))
    return Name(found[1], found[2], subset, split, kind)


def _cache_only() -> bool:
    return bool(os.environ.get(CACHE_ONLY))


def _held(name: Name, key: str) -> list[Path]:
    """The split's files of a snapshot that is on this machine already, so that a resume needs no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    held: str | None
    try:
        held = snapshot_download(name.repository, repo_type="dataset", revision=name.revision, local_files_only=True)
    except HFValidationError as error:
        raise ConfigError(f"{key}={name.repository!r}: {error}", "owner/name", f"correct {key}=") from error
    except LocalEntryNotFoundError as error:
        # A snapshot of which only some files were asked for may well hold all of this split's.
        held = getattr(error, "snapshot_path", None)
    if held is None:
        return []
    root = Path(held)
    listed = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    card = read_text(root / "README.md") if "README.md" in listed else ""
    try:
        chosen = _chosen(listed, card, name, key)
    except MissingFile:
        return []
    # A download that was cut short left some shards only.
    counts = {int(found[1]) for file in chosen if (found := re.search(r"-of-(\d+)\.\w+$", file))}
    whole = not counts or counts == {len(chosen)}
    return [root / file for file in chosen] if whole else []


def _chosen(listed: Sequence[str], card: str, name: Name, key: str) -> list[str]:
    """The files of a split: as the data set's card says, or by their names. Raises MissingFile, ConfigError."""
    files = [file for file in listed if file.endswith(_FILES) and not Path(file).name.startswith((".", "dataset_info"))]
    chosen = _by_card(files, card, name, key) or _by_name(files, name)
    best = next((end for end in _FILES if any(file.endswith(end) for file in chosen)), "")
    chosen = sorted(file for file in chosen if file.endswith(best))
    if not chosen:
        raise MissingFile(
            f"no files of split {name.split!r} in {name.repository} ({name.subset or 'any configuration'})",
            f"some of {', '.join(sorted(files)[:20]) or 'no files of rows'}",
            f"correct {key}={name.repository}:CONFIG:SPLIT",
        )
    folders = sorted({str(Path(file).parent) for file in chosen})
    if len(folders) > 1 and not name.subset:
        raise ConfigError(
            f"split {name.split!r} of several configurations in {name.repository}: {', '.join(folders)}",
            "one of them", f"name it: {key}={name.repository}:CONFIG:{name.split}",
        )  # fmt: skip
    return chosen


def _by_name(files: Sequence[str], name: Name) -> list[str]:
    folder = f"(?:.*/)?{re.escape(name.subset)}/" if name.subset else "(?:.*/)?"
    return [file for file in files if re.fullmatch(rf"{folder}{re.escape(name.split)}{_SHARD}\.\w+", file)]


def _by_card(files: Sequence[str], card: str, name: Name, key: str) -> list[str]:
    """The files that the card's `configs` give a split; none where it has none, or says it another way.

    Raises:
        ConfigError: several configurations, none of which is named or the default.
    """
    configs = [each for each in _configs(card) if name.subset in ("", each.get("config_name"))]
    if not name.subset and len(configs) > 1:
        named = ", ".join(str(each.get("config_name")) for each in configs)
        configs = [each for each in configs if each.get("default") or each.get("config_name") == "default"]
        if len(configs) != 1:
            raise ConfigError(
                f"several configurations of {name.repository}: {named}", "one of them",
                f"name it: {key}={name.repository}:CONFIG:{name.split}",
            )  # fmt: skip
    parts = [part for each in configs for part in _list(each.get("data_files")) if isinstance(part, dict)]
    patterns = [str(one) for part in parts if part.get("split") == name.split for one in _list(part.get("path"))]
    return [file for file in files if any(fnmatch.fnmatch(file, one) for one in patterns)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _configs(card: str) -> list[dict[str, Any]]:
    import yaml

    head = card.split("---")[1] if card.startswith("---") and card.count("---") > 1 else ""
    try:
        configs = (yaml.safe_load(head) or {}).get("configs") or ()
    except (yaml.YAMLError, AttributeError):
        return []  # a card is prose for people; names of files then say what is what
    return [each for each in configs if isinstance(each, dict)]


def _as_one_path(files: Sequence[Path], name: Name, key: str) -> str:
    """One file's path, or a pattern that names all of several and nothing else beside them."""
    if len(files) == 1:
        return str(files[0])
    names = [file.name for file in files]
    start = os.path.commonprefix(names)
    end = os.path.commonprefix([one[len(start) :][::-1] for one in names])[::-1]
    path = files[0].parent / f"{glob.escape(start)}*{glob.escape(end)}"
    if list(files_at(path)) != sorted(files):
        raise ConfigError(
            f"the files of {name.told} lie in several folders, or among others: {', '.join(map(str, files[:3]))}",
            "files of one split side by side", f"give the folder, or one of the files, as {key}=",
        )  # fmt: skip
    return str(path)


@contextmanager
def _refusals(name: Name, key: str) -> Iterator[None]:
    """Whatever the hub, its client and the network refuse, as named errors."""
    from huggingface_hub import constants, errors

    expected = f"{'a model' if name.kind == 'model' else 'a data set'} of the Hugging Face hub, or a path that is there"
    cannot = f"{name.told} cannot be fetched, and there is no path {name.repository} here"
    page = f"{constants.ENDPOINT}/{'' if name.kind == 'model' else 'datasets/'}{name.repository}"
    kind = " --repo-type dataset" if name.kind == "dataset" else ""
    elsewhere = (
        f"run `hf download {name.repository}{kind}` where there is a network and bring its cache here (HF_HOME), "
        f"or give a path as {key}="
    )
    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigError(f"{key}={name.repository!r}: {error}", "owner/name", f"correct {key}=") from error
    except errors.GatedRepoError as error:
        remedy = f"accept its terms at {page}, then `hf auth login` or set HF_TOKEN"
        raise MissingFile(f"{cannot}: it is gated, and this account has no access", expected, remedy) from error
    except errors.RevisionNotFoundError as error:
        found = f"{cannot}: it has no revision {name.revision!r}"
        raise MissingFile(found, expected, f"correct what stands behind @ in {key}=") from error
    except errors.RepositoryNotFoundError as error:
        remedy = f"correct {key}=; for a private one `hf auth login` or set HF_TOKEN"
        raise MissingFile(f"{cannot}: {page} is not there, or private", expected, remedy) from error
    except errors.LocalEntryNotFoundError as error:
        found = f"{cannot}: {_why(error)}, and the cache {constants.HF_HUB_CACHE} lacks it"
        raise MissingFile(found, expected, elsewhere) from error
    except errors.OfflineModeIsEnabled as error:
        found = f"{cannot}: HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} lacks it"
        raise MissingFile(found, expected, f"unset HF_HUB_OFFLINE, or {elsewhere}") from error
    # The client's other refusals, and those of the HTTP library that it was built on, whichever that is.
    except (errors.HTTPError, OSError) as error:
        raise MissingFile(f"{cannot}: {str(error).splitlines()[0]}", expected, elsewhere) from error
    # A proxy's page, or another service, in place of the hub's answer: the client takes it apart all the same.
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        found = f"{cannot}: {constants.ENDPOINT} answers what is none of the hub's ({type(error).__name__}: {error})"
        remedy = (
            f"look what answers there (a proxy, HF_ENDPOINT); set HF_HUB_OFFLINE=1 to use the cache, or {elsewhere}"
        )
        raise MissingFile(found, expected, remedy) from error


def _why(error: BaseException) -> str:
    """What a missing entry of the cache came from, in a few words."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    cause = error.__cause__ or error.__context__
    return f"the hub cannot be reached ({str(cause).splitlines()[0][:120]})" if cause else "the hub was not asked"
