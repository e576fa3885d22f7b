"""The operators of fast-weight models. Each has a plain-torch form that runs anywhere."""
