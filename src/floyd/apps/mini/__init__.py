"""The recipe of the built-in cascade: from nothing to weights."""
