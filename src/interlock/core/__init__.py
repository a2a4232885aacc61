"""The protocols, pure: frozen states, events, effects, and one `transition` each. No clock, no I/O, no randomness."""
