"""Engines that others run: a vLLM `AsyncLLM` in a trainer's process, a `vllm serve` by its URL, as members of a fleet."""
