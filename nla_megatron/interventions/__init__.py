"""What happens to the residual stream, as data and as pure functions: no hook, no process group, no engine."""
