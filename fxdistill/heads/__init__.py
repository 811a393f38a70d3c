"""Reading a vocabulary head, in a graph or in a model that runs, so that logits need not exist."""
