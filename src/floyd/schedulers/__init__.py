"""The components of a pipeline that say how its model was noised and how to sample from it."""
