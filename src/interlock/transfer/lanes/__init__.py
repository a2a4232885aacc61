"""What carries bytes between two paired endpoints: shared memory, TCP connections, NIXL."""
