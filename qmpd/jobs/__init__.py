"""Long-running jobs: the state machine and what drives it."""
