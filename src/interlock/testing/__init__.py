"""Public: what tests of Interlock, and of engines and stores written for it, need. Imported by tests, and lazily by commands."""
