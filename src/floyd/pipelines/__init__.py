"""The assembly: components loaded together, one loop, six tasks, three stages, one chain."""
