"""Mathematics only: no files, no ranks, no optimizers, no text."""
