"""SAEs by release and id: the places looked at, in their order, and what is said where there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.interventions.sae_files import load_sae
from nla_megatron.interventions.sae_lookup import find_sae
from tests.support.hooked import write_sae

REPOSITORY, ID = "someone/small-saes", "blocks.3.hook_resid_post"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(root: Path, commit: str, age: int = 0) -> Path:
    """One as the hub's client lays it out."""
    folder = root / "models--someone--small-saes" / "snapshots" / commit
    write_sae(folder / ID, 8, 4)
    os.utime(folder, (1_000_000 - age, 1_000_000 - age))
    return folder / ID


def test_the_newest_snapshot_of_the_hubs_cache_is_found_and_loads(hub: Path) -> None:
    snapshot(hub, "aaa", age=50)
    newer = snapshot(hub, "bbb")
    snapshot(hub, "ccc", age=100)
    assert find_sae(REPOSITORY, ID) == newer
    assert load_sae(find_sae(REPOSITORY, ID)).num_features == 4


def test_a_root_goes_before_the_cache_as_folders_or_as_another_cache(hub: Path, tmp_path: Path) -> None:
    snapshot(hub, "aaa")
    write_sae(tmp_path / "mine" / REPOSITORY / ID, 8, 4)
    other = snapshot(tmp_path / "other", "ddd")
    assert find_sae(REPOSITORY, ID, [tmp_path / "mine"]) == tmp_path / "mine" / REPOSITORY / ID
    assert find_sae(REPOSITORY, ID, [tmp_path / "other", tmp_path / "mine"]) == other


def test_a_short_name_is_looked_up_in_the_roots_own_list(hub: Path, tmp_path: Path) -> None:
    wanted = snapshot(hub, "aaa")
    (hub / "releases.json").write_text(json.dumps({"small-res": REPOSITORY}))
    assert find_sae("small-res", ID) == wanted


def test_the_home_of_the_hub_is_honoured_where_no_cache_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    wanted = snapshot(tmp_path / "home" / "hub", "aaa")
    assert find_sae(REPOSITORY, ID) == wanted


def test_what_is_not_there_is_named_with_the_places_and_how_to_get_it(hub: Path, tmp_path: Path) -> None:
    (hub / "models--someone--small-saes" / "snapshots" / "aaa" / ID).mkdir(parents=True)
    with pytest.raises(MissingFile) as caught:
        find_sae(REPOSITORY, ID, [tmp_path / "mine"])
    assert str(tmp_path / "mine" / REPOSITORY / ID) in caught.value.found and str(hub) in caught.value.found
    assert f"hf download {REPOSITORY}" in caught.value.remedy


@pytest.mark.parametrize(("release", "sae_id"), [("../secret", ID), (REPOSITORY, "/etc"), ("", ID)])
def test_names_that_leave_the_root_are_refused(hub: Path, release: str, sae_id: str) -> None:
    with pytest.raises(ConfigError, match="release or id"):
        find_sae(release, sae_id)


def test_a_list_of_releases_that_is_none_is_named(hub: Path) -> None:
    hub.mkdir()
    (hub / "releases.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"releases\.json"):
        find_sae(REPOSITORY, ID)
