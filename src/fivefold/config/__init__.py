"""Settings: their schema, where their values come from, and the shipped recipes."""
