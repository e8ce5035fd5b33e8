"""Configuration as frozen data: one dataclass per group of options."""
