"""The load generator: traffic against a running server, and the targets it is held to."""
