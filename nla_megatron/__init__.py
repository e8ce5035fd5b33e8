"""Scale-out training of Natural Language Autoencoders on megatron-core and vLLM."""

__version__ = "0.1.0"
