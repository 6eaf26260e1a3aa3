"""From files of all kinds to documents: what cannot be read is a dropped document with a reason, never the end of a run."""
