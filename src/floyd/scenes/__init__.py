"""The procedural captioned scenes that the built-in model is made for, and the judge that reads a picture."""
