"""As `preload`, for commands that sample nothing: they need not wait for vLLM."""

from importlib import import_module

from nla_megatron.config.compose import get_ready
from nla_megatron.launch.commands import silence_libraries
from nla_megatron.launch.local import keep_for_forks

silence_libraries()
torch = import_module("torch")

if not torch.cuda.is_available():
    # A fork of a process with worker threads would wait for them for ever.
    torch.set_num_threads(1)
    import_module("nla_megatron.training.sft")
    get_ready()
    keep_for_forks()
