"""Imported once by the server that commands are forked from; with CUDA it imports nothing, see `launch.local`."""

from importlib import import_module

from nla_megatron.config.compose import get_ready
from nla_megatron.launch.commands import silence_libraries
from nla_megatron.launch.local import keep_for_forks

silence_libraries()
torch = import_module("torch")

if not torch.cuda.is_available():
    # A fork of a process with worker threads would wait for them for ever.
    torch.set_num_threads(1)
    for room in ("evaluation.command", "training.rl", "rollout.preload"):
        import_module(f"nla_megatron.{room}")
    get_ready()
    keep_for_forks()
