"""The inference server: HTTP, scheduling, workers and the command line."""
