"""vLLM in the trainer's own processes: the engine, and the worker side that injects activations."""
