"""The arms of a comparison by name. Loads no torch, so that the command line can tell them."""

from __future__ import annotations

from typing import Final

ARMS: Final = {
    "base": "base weights, cached state",
    "adapted": "studied without the questions, gate on",
    "ungated": "the same study without its gate",
    "focus": "studied with the questions known",
    "adapted_focus": "studied without the questions, then with them",
    "ntp_only": "next-token loss only, as many token passes as adapted",
    "reread": "read twice",
    "retrieval": "best passage only, by BM25",
    "retrieval_top": "best passages only",
    "retrieval_after": "best passages read again after the document",
}
"""Ways to answer, with what they do; all but `base` are compared with it."""
