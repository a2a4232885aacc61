"""What a process tells of itself: events that are kept, metrics that are counted, log lines that are read."""
