"""Evaluation: needle tasks after RULER, scoring, and the comparison of base and adapted answers
per document.
"""
