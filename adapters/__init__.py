"""Test-time adaptation: REFINE, focus, gate, and what they leave. Knows nothing of HTTP."""
