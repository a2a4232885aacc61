"""Where a fleet's processes run: this machine (`local`)."""
