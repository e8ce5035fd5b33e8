"""The AV and the AR as Megatron models: building, injecting, log-probs and predictions."""
