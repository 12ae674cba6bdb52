"""The training loop, and the optimizer step: gradients, guard, optimizer, loss scale, metrics."""
