"""Pictures with captions, from a folder or from shards, in an order that a seed decides."""
