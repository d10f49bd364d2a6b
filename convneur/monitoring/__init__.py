"""Who looks on while a run trains, and when one of them ends it."""
