"""Before a job is queued: its memory, time and data rate."""
