"""The run directory and what keeps it sound: atomic files, locks, the cache of finished steps."""
