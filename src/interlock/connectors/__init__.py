"""How foreign engines reach the store."""
