"""What a run may be told: settings, how they are read, what is refused.  Uses no other room."""
