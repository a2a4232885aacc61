"""The checks of `interlock.testing.check_engine`, by theme. Each is a function of a `Bench`; its docstring is its sentence."""
