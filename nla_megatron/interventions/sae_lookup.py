"""Where an SAE is that is named as `sae_lens` names it: a release and an id in it, already on this machine.

A release is a repository of the Hugging Face hub; the id is a folder in it. `sae_lens` keeps a list of short names of
releases, which are no names of repositories: those are written in `releases.json` of the first root, or as folders.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.interventions.sae_files import CONFIG, WEIGHTS
from nla_megatron.reading import read_json

RELEASES = "releases.json"
"""In a root, optionally: {short name of a release: name of its repository or folder}."""


def hub_cache() -> Path:
    """Where the hub's client keeps what it has downloaded, by the variables that it reads."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")


def find_sae(release: str, sae_id: str, roots: Sequence[Path | str] = ()) -> Path:
    """The directory of an SAE.

    In each root, then in the hub's cache, these are looked at in turn: `root/release/id`, and
    `root/models--org--name/snapshots/*/id` where a release is `org/name`, the newest snapshot first.

    Args:
        release: a repository (`org/name`), a folder, or a short name in a root's `releases.json`.
        sae_id: a folder in it, such as `blocks.8.hook_resid_pre`.
        roots: directories to look into before the hub's cache.

    Raises:
        ConfigError: a name that leaves its root, or a `releases.json` that is none.
        MissingFile: in none of the places; says which they were, and how to get it.
    """
    for name in (release, sae_id):
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{name!r} as an SAE's release or id", "a relative name", "set release and sae_id")
    looked: list[Path] = []
    for root in (*map(Path, roots), hub_cache()):
        name = _repository(root, release)
        snapshots = root / f"models--{name.replace('/', '--')}" / "snapshots"
        newest = sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for directory in (root / name / sae_id, *(path / sae_id for path in newest)):
            if (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file():
                return directory
        looked += [root / name / sae_id, snapshots]
    raise MissingFile(
        f"no SAE {sae_id!r} of release {release!r} in {', '.join(map(str, looked))}",
        f"a directory with {CONFIG} and {WEIGHTS}",
        f"download it where there is a network (hf download {release} --include '{sae_id}/*'), or set its path",
    )


def _repository(root: Path, release: str) -> str:
    listed = root / RELEASES
    if not listed.is_file():
        return release
    names = read_json(listed, ConfigError, "correct it")
    if not isinstance(names, dict) or not isinstance(names.get(release, ""), str):
        raise ConfigError(f"'{listed}' does not map names to names", "short names to repositories", "correct it")
    return str(names.get(release, release))
