"""`--dry-run`: what a run would do, how long it would take and how much memory, without loading torch."""
