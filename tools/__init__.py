"""Uses the engine from outside: simulated GPUs, models to try it on, the benchmark and the demo."""
