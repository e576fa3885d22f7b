"""Reward `semantic`: how alike two texts are, by an encoder that the user plugs in.

Limit: knows texts and vectors. The encoder is the user's own code; it runs in the process that
studies, and what it says must depend on its texts alone, or studies cannot be repeated.
"""

# N = branches, G = rollouts per branch, K = rollout length, D = width of the encoder's vectors

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.adapters.config import NO_ENCODER, RefineConfig
from imprint.adapters.errors import AdaptationError, ConfigError

Encoder = Callable[[list[str]], Any]
"""Texts to vectors: [len(texts), D], as anything that numpy takes for an array."""


class EncoderError(Exception):
    """An encoder that cannot be loaded; the message names it."""


def load_encoder(name: str) -> Encoder:
    """The function that `module:function` names. Raises EncoderError that says what is wrong."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise EncoderError(f"a reward encoder is named module:function, got {name!r}")
    try:
        found = importlib.import_module(module)
    except (ImportError, SyntaxError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise EncoderError(f"the reward encoder {name} cannot be loaded: {error}") from error
    encoder = getattr(found, function, None)
    if not callable(encoder):
        raise EncoderError(f"the reward encoder {name}: {module} has no function {function}")
    return encoder  # type: ignore[no-any-return]


class Similarity:
    """Cosines of an encoder's vectors for texts that are given as tokens."""

    def __init__(self, name: str, encoder: Encoder, decode: Callable[[list[int]], str]) -> None:
        """`name` stands in messages and manifests; `decode` turns tokens into text."""
        self.name, self._encoder, self._decode = name, encoder, decode

    def cosines(self, tokens_NGK: Tensor, truth_NK: Tensor) -> Tensor:
        """Of each rollout and its branch's truth, [N, G] in float64, -1 to 1.

        Raises AdaptationError where the encoder gives no vectors.
        """
        num, group, _ = tokens_NGK.shape
        rows = [*tokens_NGK.flatten(0, 1).tolist(), *truth_NK.tolist()]
        texts = [self._decode(row) for row in rows]
        distinct = list(dict.fromkeys(texts))
        vectors = self._encode(distinct)
        places = {text: place for place, text in enumerate(distinct)}
        vectors_RD = vectors[[places[text] for text in texts]]
        rollouts_NGD = vectors_RD[: num * group].view(num, group, -1)
        truths_N1D = vectors_RD[num * group :].unsqueeze(1)
        return F.cosine_similarity(rollouts_NGD, truths_N1D, dim=-1).to(truth_NK.device)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        given = self._encoder(list(texts))
        try:
            if isinstance(given, Tensor):
                given = given.detach().cpu().double()
            vectors = torch.from_numpy(np.array(given, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise self._failure(str(error)) from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise self._failure(
                f"{list(vectors.shape)} for {len(texts)} texts, not [{len(texts)}, width]"
            )
        if not bool(vectors.isfinite().all()):
            raise self._failure("numbers that are not finite")
        return vectors

    def _failure(self, what: str) -> AdaptationError:
        return AdaptationError("encoder_failed", f"the reward encoder {self.name} gave {what}")


def load_similarity(name: str, decode: Callable[[list[int]], str]) -> Similarity | None:
    """The similarity of the encoder of that name; None for no name. Raises EncoderError."""
    return Similarity(name, load_encoder(name), decode) if name else None


def check_reward(config: RefineConfig, similarity: Similarity | None) -> None:
    """Raises ConfigError where a reward needs an encoder and there is none."""
    if config.reward == "semantic" and similarity is None:
        raise ConfigError("reward", NO_ENCODER)
