"""The runner: claims jobs, runs their handlers, writes rows under a lease."""
