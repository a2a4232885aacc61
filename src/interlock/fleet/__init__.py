"""Many engines as one service: membership, targets, routing, the ledger of requests and their continuation elsewhere."""
