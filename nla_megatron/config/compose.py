"""From command-line overrides to a frozen configuration: Hydra composes, the schema checks what Hydra lets pass."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml

from nla_megatron.config.recipes import chosen_recipe, let_groups_win, without_recipe
from nla_megatron.config.typed import check_grammar, home_expanded, texts_quoted
from nla_megatron.errors import ConfigError, MissingFile

# What Hydra and OmegaConf add for people who write configurations in Python; adding keys with `+` is refused here.
_BESIDE_THE_POINT = re.compile(
    r"To append to your config use \S+|(reference|object)_type=.*|See https?://\S+ for details"
)

# What is said to a model.
_NO_PATHS = ("templates", "rubrics", "text")


def conf_dir() -> Path:
    """The `conf` directory: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if candidate.is_dir():
            return candidate
    raise MissingFile(
        f"no 'conf' directory beside {package}", "the configuration shipped with the package", "reinstall nla_megatron"
    )


def compose(command: str, overrides: Sequence[str] = ()) -> Any:
    """The frozen configuration of `command` with Hydra overrides applied.

    Raises:
        ConfigError: unknown key (also one added with `+`), wrong type, missing group, missing required value, a recipe
            of another command.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from nla_megatron.config.schema import SCHEMAS

    if command not in SCHEMAS:
        raise ConfigError(f"command {command!r}", f"one of {', '.join(SCHEMAS)}", "run `nla-megatron --help`")
    schema = SCHEMAS[command]
    overrides = texts_quoted(schema, overrides)
    check_grammar(command, schema, overrides, conf_dir())
    try:
        store_schemas()
        # Hydra lets `+extra=1` pass; merging into the structured schema refuses it, and converts types.
        merged = OmegaConf.merge(_writable(schema), OmegaConf.create(_composed(command, overrides)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"no value for {', '.join(missing)}", f"a value for every required key of `{command}`",
                f"add {' '.join(f'{key}=...' for key in missing)}",
            )  # fmt: skip
        return OmegaConf.to_object(_homes_expanded(merged))
    except (HydraException, OmegaConfBaseException) as error:
        raise named_refusal(command, schema, error) from None


def _homes_expanded(merged: Any) -> Any:
    """`~/` at the beginning of a path is the home directory's, in whatever file or word it stands."""
    from omegaconf import DictConfig, OmegaConf

    def visit(node: Any) -> None:
        for key in node:
            if key in _NO_PATHS or OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
                continue
            value = node[key]
            if isinstance(value, DictConfig):
                visit(value)
            elif isinstance(value, str) and value.startswith("~"):
                node[key] = home_expanded(value)

    visit(merged)
    return merged


def completed(command: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the keys that the schema has gained since, at their defaults.

    Options that a task or a provider has gained stand as the file of its group says.

    Raises:
        ConfigError: a key that the schema does not have, or not any more.
    """
    from omegaconf import OmegaConf

    return cast(dict[str, Any], OmegaConf.to_container(_on_schema(command, record)))


def restored(command: str, record: Mapping[str, Any]) -> Any:
    """The frozen configuration of a record, `completed`. Raises ConfigError as that, and for values out of range."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(_on_schema(command, record))


def _on_schema(command: str, record: Mapping[str, Any]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from nla_megatron.config.schema import SCHEMAS

    parts: list[Any] = [_writable(SCHEMAS[command])]
    for group, value in record.items():
        name = value.get("name") if isinstance(value, dict) and "options" in value else None
        path = conf_dir() / group / f"{name}.yaml"
        if name is not None and path.is_file():
            parts.append({group: {"options": yaml.safe_load(path.read_text(encoding="utf-8")).get("options", {})}})
    try:
        return OmegaConf.merge(*parts, dict(record))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or str(error).splitlines()[0]}", f"keys and types of `{command}` as they are now",
            "use the version of nla_megatron that wrote it",
        ) from None  # fmt: skip


def _composed(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What Hydra makes of the files and the overrides, interpolations unresolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    def composed(changes: Sequence[str]) -> dict[str, Any]:
        return cast(dict[str, Any], OmegaConf.to_container(hydra_compose(config_name=command, overrides=list(changes))))

    recipe = chosen_recipe(command, overrides, conf_dir())
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=command):
        if recipe is None:
            return composed(without_recipe(overrides))
        return let_groups_win(composed(overrides), composed(without_recipe(overrides)), overrides, conf_dir())


@cache
def store_schemas() -> None:
    """Make every command's schema known to Hydra as `{command}_schema`, the first entry of each root's defaults."""
    from hydra.core.config_store import ConfigStore

    from nla_megatron.config.schema import SCHEMAS

    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=_writable(schema))


def get_ready() -> None:
    """Do what the first `compose` of a process does once: find Hydra's plugins, make the schemas known."""
    from hydra.core.plugins import Plugins

    Plugins.instance()
    store_schemas()


def _writable(schema: type) -> Any:
    """The structured configuration of a frozen dataclass, which OmegaConf would treat as read-only at every level.

    Mappings with free keys (a provider's options) stay open, where Hydra would refuse every key they do not have yet.
    """
    from omegaconf import DictConfig, OmegaConf

    def thaw(node: Any) -> None:
        OmegaConf.set_readonly(node, None)
        if not is_dataclass(OmegaConf.get_type(node)):
            OmegaConf.set_struct(node, False)
        for child in node._content.values():
            if isinstance(child, DictConfig) and isinstance(child._content, dict):
                thaw(child)

    structured = OmegaConf.structured(schema)
    thaw(structured)
    return structured


def named_refusal(command: str, schema: type, error: Exception) -> ConfigError:
    """One line of Hydra's message, with the nearest known key as a remedy."""
    text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
    text = _BESIDE_THE_POINT.sub("", text.split("Config search path")[0])
    found = " ".join(text.split())[:400]
    known = _keys(schema)
    words = found.replace("'", " ").replace("=", " ").replace("+", " ").split()
    near = [match for word in words for match in difflib.get_close_matches(word.strip(".,"), known, n=1, cutoff=0.75)]
    remedy = f"did you mean {near[0]}? " if near and near[0] not in words else ""
    return ConfigError(
        found, f"keys and types of `nla-megatron {command}`", f"{remedy}`nla-megatron {command} --help` lists them"
    )


def _keys(schema: type, prefix: str = "") -> list[str]:
    hints, names = get_type_hints(schema), []
    for item in fields(schema):
        names.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            names += _keys(hints[item.name], f"{prefix}{item.name}.")
    return names


def describe(command: str) -> str:
    """Every key of a command with its default as YAML; `???` marks what must be given."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    store_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=command):
        composed = hydra_compose(config_name=command)
    return OmegaConf.to_yaml(composed)


def as_yaml(config: Any) -> str:
    """A composed configuration as YAML, for the run's directory and for `--help`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
