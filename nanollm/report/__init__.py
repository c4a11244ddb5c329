"""One page of a run, or of several side by side: what was done, what came of it."""
