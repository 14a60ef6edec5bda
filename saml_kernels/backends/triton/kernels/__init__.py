"""Device code: the scheduler (persistent), and one module for each kind of work."""
