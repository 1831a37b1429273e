"""How any model is trained: engine, loop, optimiser, checkpoints and the run's log."""
