"""HTTP handlers. They translate between requests and services, and do nothing else."""
