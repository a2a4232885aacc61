"""The disk tier of the store: packs of blocks, the mapped index of what lies in them, and their driver."""
