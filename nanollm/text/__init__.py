"""Characters and ids; never torch."""
