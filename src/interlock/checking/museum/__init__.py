"""Public races rebuilt with their historical rule, one file each; imported by nothing but the gallery (DESIGN §9)."""
