"""The commands of `imprint`, one module each: `add_parser` describes it, `run` does it.

Modules here import nothing heavy at their top, so that `imprint --help` needs no torch.
"""
