"""What states in int8 cost: answers to needles from the same documents, exact and packed.

`OMP_NUM_THREADS=1 python benchmarks/idle_states.py`, on the bundled model. Every document is read
once; its question is answered from the state as it is, and from the state as `--idle-states int8`
keeps it. One JSON object a cell: the error of the logits after the question, and of the answers.
Limit: one model, documents that were only read, greedy answers.
"""

import argparse
import json
import sys

import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.evaluation.answering import GreedyAnswerer
from imprint.adapters.evaluation.cases import Cell
from imprint.adapters.evaluation.haystack import Haystack
from imprint.adapters.evaluation.ruler_suite import RulerConfig, RulerSuite
from imprint.models import (
    FastWeightModel,
    RecurrentState,
    Tokenizer,
    load_model,
    load_tokenizer,
    prefill,
)
from imprint.server.config import BUNDLED_MODEL
from imprint.server.idle_states import PackedAdapter

SEGMENT_TOKENS = 256


def read(model: FastWeightModel, tokens: list[int]) -> Adapter:
    """A document's adapter, without a study."""
    state: RecurrentState | None = None
    for piece_1C in torch.tensor([tokens]).split(SEGMENT_TOKENS, 1):
        _, state = prefill(model, piece_1C, state)
    assert state is not None
    tokens_T = torch.tensor(tokens)
    return Adapter(tokens_T=tokens_T, entropy_T=torch.zeros(len(tokens)), state=state)


def measure(model: FastWeightModel, tokenizer: Tokenizer, cell: Cell) -> dict[str, object]:
    """The numbers of one cell."""
    answerer = GreedyAnswerer(model, tokenizer, max_new_tokens=cell.max_new_tokens)
    errors: list[float] = []
    spreads: list[float] = []
    scores: dict[str, list[float]] = {"exact": [], "int8": []}
    num_same = num_same_first = 0
    smaller = 0.0
    for index in range(cell.num_cases):
        case = cell.case(index)
        question = case.questions[0]
        adapter = read(model, tokenizer.encode(case.document))
        packed = PackedAdapter.of(adapter)
        smaller = packed.nbytes / adapter.nbytes
        prompt = tokenizer.encode(question.prompt, continues=True)
        texts, logits = [], []
        for name, state in (("exact", adapter.state), ("int8", packed.to(model.device).state)):
            logits.append(prefill(model, torch.tensor([prompt]), state)[0])
            texts.append(answerer.answer([prompt], state).texts[0])
            scores[name].append(cell.scoring.scores(texts[-1], question.answers)["exact"])
        errors.append(float((logits[0] - logits[1]).abs().max()))
        spreads.append(float(logits[0].std()))
        num_same += texts[0] == texts[1]
        num_same_first += bool(logits[0].argmax() == logits[1].argmax())
    num = cell.num_cases
    return {
        "cell": cell.title,
        "length": cell.length,
        "documents": num,
        "bytes_int8_over_exact": round(smaller, 3),
        "largest_logit_error_mean": round(sum(errors) / num, 4),
        "largest_logit_error_max": round(max(errors), 4),
        "logit_standard_deviation": round(sum(spreads) / num, 3),
        "same_first_token": num_same_first,
        "same_answer": num_same,
        "exact_match": {name: sum(values) / num for name, values in scores.items()},
    }


@torch.no_grad()
def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--tasks", nargs="+", default=["niah_single", "niah_multikey"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    arguments = parser.parse_args()
    model, tokenizer = load_model(BUNDLED_MODEL), load_tokenizer(BUNDLED_MODEL)
    config = RulerConfig(
        tasks=tuple(arguments.tasks),
        lengths=tuple(arguments.lengths),
        num_documents=arguments.documents,
    )
    haystack = Haystack.from_file(BUNDLED_MODEL / "heldout.txt")
    for cell in RulerSuite(config, tokenizer, haystack=haystack).cells():
        sys.stdout.write(json.dumps(measure(model, tokenizer, cell)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
