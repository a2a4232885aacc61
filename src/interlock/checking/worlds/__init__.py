"""A module per protocol: `worlds(budget)` lists what is explored of it. Drop a file here and `interlock explore` has it."""
