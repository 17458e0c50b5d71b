"""Graph mode: the decode steps of a model as CUDA graphs, replayed token after token."""
