"""What a job will take and how it is best done: memory, placement, schedule, time."""
