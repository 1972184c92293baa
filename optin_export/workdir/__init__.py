"""The run directory and its consistency: atomic files, locks, the cache of finished steps."""
