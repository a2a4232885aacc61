"""One process tree an engine: the interface an engine fits, vLLM behind it, and the runner that speaks for it."""
