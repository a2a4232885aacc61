"""The simulated machine: virtual time, a seeded scheduler, network, disks and processes that fail on demand."""
