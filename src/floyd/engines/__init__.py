"""Other ways to run a network: faster, on some machines, with needs of their own. Each is asked for by name."""
