"""QMP sessions: one client each; dispatch, events and replies."""
