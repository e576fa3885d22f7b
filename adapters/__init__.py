"""Test-time adaptation: REFINE steps, focus, gate and what they leave behind. Knows nothing of HTTP."""
