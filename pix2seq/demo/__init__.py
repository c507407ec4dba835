"""A page on which a detector shows what it writes, while it writes it."""
