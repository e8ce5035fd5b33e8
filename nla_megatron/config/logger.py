"""Options of what a run shows and records."""

from __future__ import annotations

from dataclasses import dataclass

from nla_megatron.errors import ConfigError

WANDB_MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class LoggerOptions:
    """Where the scalars of each step go, besides `metrics.jsonl`, which is always written.

    Args:
        progress: draw progress bars. None draws them only if stderr is a terminal: a log file wants one line per stage.
        wandb: write a Weights & Biases run. Off, because it is a second copy of `metrics.jsonl`.
        wandb_project: the project the run appears in.
        wandb_mode: `offline` (the default: compute nodes rarely reach the network), `online` or `disabled`.
        tensorboard: write TensorBoard event files. Off, for the same reason as `wandb`.

    Raises:
        ConfigError: `wandb_mode` is not one of the three.
    """

    progress: bool | None = None
    wandb: bool = False
    wandb_project: str = "nla_megatron"
    wandb_mode: str = "offline"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.wandb_mode not in WANDB_MODES:
            raise ConfigError(
                f"logger.wandb_mode={self.wandb_mode!r}",
                f"one of {', '.join(WANDB_MODES)}",
                "set logger.wandb_mode=offline, and upload later with `wandb sync`",
            )
