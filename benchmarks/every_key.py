"""How many needles of a document are recalled before and after studying it, questions unknown.

Documents of `imprint eval ruler --tasks niah_multikey`; but every key of a document is asked, not
one of four, so that a study is judged by four answers. The study is a worker's, gate included. Each
`--method` (fields of the method as JSON) gets the same documents. Limit: needles, one model.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from imprint.adapters.config import RefineConfig
from imprint.adapters.document import DocumentReader
from imprint.adapters.evaluation.answering import GreedyAnswerer
from imprint.adapters.evaluation.haystack import Haystack, read_texts
from imprint.adapters.evaluation.ruler import TASKS, build_sample
from imprint.adapters.gate import load_neutral
from imprint.adapters.refine import Refiner
from imprint.models.checkpoint import load_model
from imprint.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "pretrained" / "imprint-tiny"
NEEDLE = re.compile(r"magic numbers for (\S+) is: (\d+)")


class Documents:
    """Documents with every question that can be asked about them."""

    def __init__(self, folder: Path, length: int) -> None:
        self.model, self.tokenizer = load_model(folder), load_tokenizer(folder)
        self.neutral = load_neutral(folder, self.tokenizer)
        self.answerer = GreedyAnswerer(self.model, self.tokenizer, max_new_tokens=16)
        self._haystack = Haystack(read_texts(BUNDLED / "heldout.txt"))
        self._length = length

    def draw(self, seed: int) -> tuple[list[int], list[list[int]], list[str]]:
        """Tokens of a document, a prompt for every key, and the values."""
        sample = build_sample(
            TASKS["niah_multikey"],
            self._haystack,
            length=self._length,
            num_tokens=lambda text: len(self.tokenizer.encode(text)),
            seed=seed,
        )
        held = dict(NEEDLE.findall(sample.document))
        prompts = [sample.query.replace(sample.keys[0], key) for key in held]
        encode = self.tokenizer.encode
        return (
            encode(sample.document),
            [encode(prompt, continues=True) for prompt in prompts],
            list(held.values()),
        )

    def base(self, tokens: list[int], prompts: list[list[int]]) -> list[str]:
        """Answers from the state at the document's end."""
        reader = DocumentReader(self.model, tokens, segment_tokens=512)
        finish(reader.run())
        assert reader.adapter is not None
        return list(self.answerer.answer(prompts, reader.adapter.state).texts)

    def studied(
        self, tokens: list[int], prompts: list[list[int]], config: RefineConfig
    ) -> tuple[list[str], bool]:
        """Answers after a study, and whether its gate let it pass."""
        refiner = Refiner(self.model, tokens, config, neutral=self.neutral)
        finish(refiner.run())
        adapter = refiner.adapter
        assert adapter is not None
        answers = self.answerer.answer(prompts, adapter.state, delta=adapter.delta)
        return list(answers.texts), adapter.adapted


def finish(work: Iterator[object]) -> None:
    """Run to the end."""
    for _ in work:
        pass


def compare(documents: Documents, seeds: range, methods: list[str]) -> None:
    """Print a line of JSON for each method."""
    configs = [RefineConfig.from_dict(json.loads(method)) for method in methods]
    base: list[bool] = []
    after: list[list[bool]] = [[] for _ in configs]
    passed = [0] * len(configs)
    for seed in seeds:
        tokens, prompts, values = documents.draw(seed)
        answers = documents.base(tokens, prompts)
        base += [value in answer for value, answer in zip(values, answers, strict=True)]
        for i, config in enumerate(configs):
            answers, adapted = documents.studied(tokens, prompts, config)
            after[i] += [value in answer for value, answer in zip(values, answers, strict=True)]
            passed[i] += adapted
    for method, right, used in zip(methods, after, passed, strict=True):
        pairs = list(zip(base, right, strict=True))
        line = {
            "method": json.loads(method),
            "questions": len(base),
            "base": sum(base) / len(base),
            "adapted": sum(right) / len(base),
            "better": sum(now and not before for before, now in pairs),
            "worse": sum(before and not now for before, now in pairs),
            "passed": used / len(seeds),
        }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def main() -> None:
    """Compare methods on the same documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--seed", type=int, default=2_000_000, help="of the first document")
    parser.add_argument("--method", action="append", metavar="JSON", help="may be given repeatedly")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(arguments.seed, arguments.seed + arguments.documents)
    compare(Documents(arguments.model, arguments.length), seeds, arguments.method or ["{}"])


if __name__ == "__main__":
    main()
