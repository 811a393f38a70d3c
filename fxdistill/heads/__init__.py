"""Read a vocabulary head, in a graph or in a running model, so that logits need not be stored."""
