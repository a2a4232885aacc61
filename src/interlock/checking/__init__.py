"""Exhaustive exploration of the protocols of core: explorer, worlds, and a museum of public races it must find."""
