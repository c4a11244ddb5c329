"""How good is it? Bits per byte first."""
