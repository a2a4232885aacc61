"""Interlock runs a fleet of LLM inference engines as one service."""

__version__ = "0.1.0"
