"""Examples of bodies and replies for the OpenAPI document, by the name of their shape. Data only.

A test compares each with its shape.
"""

from typing import Any

_DOCUMENT = "doc_5f0c1d2e3b4a59687716a5b4"
_ADAPTATION = "adp_8e1f0a2b3c4d5e6f70819203"
_TEXT = "The harbour office opens at nine. The access code of the boathouse is 4711."
_QUESTION = "What is the access code of the boathouse?"
_SHA256 = "9f2c7a55d0f4a0a4f1c1a3b3f0b1f1e2d3c4b5a697887766554433221100ffee"
_USAGE = {
    "prompt_tokens": 31,
    "completion_tokens": 3,
    "total_tokens": 34,
    "prompt_tokens_details": {"cached_tokens": 19},
}

PARAMETERS = {
    "/v1/adaptations/{id": _ADAPTATION,
    "/v1/documents/{id": _DOCUMENT,
    "/v1/models/{name": f"imprint-tiny:{_ADAPTATION}",
}
"""Parameters in paths, by the path before them and their name."""

STREAMS = {
    "/v1/answers": 'data: {"object": "answer.delta", "index": 0, "text": "47"}\n\ndata: [DONE]\n\n',
    "/v1/completions": 'data: {"id": "cmpl_1", "object": "text_completion", …}\n\ndata: [DONE]\n\n',
    "/v1/chat/completions": (
        'data: {"id": "chatcmpl-1", "object": "chat.completion.chunk", …}\n\ndata: [DONE]\n\n'
    ),
    "/v1/adaptations/{id}/events": (
        'id: 3\ndata: {"object": "adaptation.event", "sequence": 3, "kind": "step", …}\n\n'
        "data: [DONE]\n\n"
    ),
}
"""Server-sent events, by path."""

_ADAPTATION_OBJECT: dict[str, Any] = {
    "id": _ADAPTATION,
    "object": "adaptation",
    "status": "succeeded",
    "model": "imprint-tiny",
    "method": {"type": "read"},
    "seed": 0,
    "priority": 0,
    "document_id": _DOCUMENT,
    "sha256": _SHA256,
    "num_tokens": 19,
    "bytes": 75,
    "adapter_bytes": 131072,
    "attempt": 1,
    "created_at": 1767225600.0,
    "started_at": 1767225600.1,
    "finished_at": 1767225600.4,
    "estimated_finish": None,
    "expires_at": None,
    "used_at": 1767225600.9,
    "idle_expires_after_s": None,
    "seconds": 0.3,
    "error": None,
    "progress": {"phase": "finished", "step": 0, "steps": 0, "num_tokens": 19},
    "usage": {"tokens_forward": 19},
    "result": {"accepted": False},
    "metadata": {"source": "harbour"},
}
_DOCUMENT_OBJECT: dict[str, Any] = {
    "id": _DOCUMENT,
    "object": "document",
    "title": "Harbour",
    "media_type": "text/plain",
    "version": 1,
    "sha256": _SHA256,
    "num_tokens": 19,
    "bytes": 75,
    "num_references": 0,
    "created_at": 1767225600.0,
    "updated_at": 1767225600.0,
    "expires_at": None,
    "metadata": {"source": "harbour"},
}
_MODEL: dict[str, Any] = {
    "id": f"imprint-tiny:{_ADAPTATION}",
    "object": "model",
    "created": 1767225600,
    "owned_by": "imprint",
    "parent": "imprint-tiny",
    "adapted": True,
}
_EVENT: dict[str, Any] = {
    "object": "adaptation.event",
    "sequence": 3,
    "created_at": 1767225600.2,
    "kind": "step",
    "data": {"step": 1, "steps": 8, "reward_mean": 0.41},
}
_STUDY_STEP: dict[str, Any] = {
    "step": 1,
    "num_positions": 1,
    "positions": [
        {
            "position": 12,
            "cue": "The access code of the boathouse is",
            "truth": " 4711.",
            "rollouts": [{"text": " 4700.", "reward": 0.6}],
        }
    ],
}


def _page(item: dict[str, Any], key: str = "id") -> dict[str, Any]:
    return {
        "object": "list",
        "data": [item],
        "first_id": item[key],
        "last_id": item[key],
        "has_more": False,
    }


EXAMPLES: dict[str, dict[str, Any]] = {
    "AppendText": {"text": "On the fourth day the bell was sold.", "version": 1},
    "CreateDocument": {"text": _TEXT, "title": "Harbour", "metadata": {"source": "harbour"}},
    "CreateAdaptation": {
        "document_id": _DOCUMENT,
        "method": {"type": "refine", "preset": "fast", "steps": 8},
        "seed": 0,
    },
    "CreateAnswers": {"document": _TEXT, "questions": [_QUESTION], "max_tokens": 24},
    "CreateCompletion": {
        "model": f"imprint-tiny:{_ADAPTATION}",
        "prompt": "The access code is",
        "max_tokens": 8,
        "temperature": 0.0,
    },
    "Document": _DOCUMENT_OBJECT,
    "AppendedDocument": {**_DOCUMENT_OBJECT, "version": 2, "adaptation": _ADAPTATION_OBJECT},
    "Page_Document_": _page(_DOCUMENT_OBJECT),
    "DocumentContent": {
        "object": "document.content",
        "id": _DOCUMENT,
        "version": 1,
        "text": _TEXT,
        "references": [{"kind": "page", "number": 1, "start": 0, "end": 75}],
    },
    "Adaptation": _ADAPTATION_OBJECT,
    "Page_Adaptation_": _page(_ADAPTATION_OBJECT),
    "Page_AdaptationEvent_": _page(_EVENT, "sequence"),
    "StudySteps": {"adaptation": _ADAPTATION, "num_tokens": 19, **_page(_STUDY_STEP, "step")},
    "StudyProfile": {
        "object": "study.profile",
        "adaptation": _ADAPTATION,
        "num_tokens": 19,
        "entropy_mean": 2.25,
        "low": 0.125,
        "high": 5.5,
        "entropies": [5.125, 1.5],
    },
    "StudyTokens": {
        "object": "study.tokens",
        "adaptation": _ADAPTATION,
        "num_tokens": 19,
        "first": 0,
        "texts": ["The", " harbour"],
        "entropies": [None, 5.125],
        "has_more": True,
    },
    "Deleted": {"id": _ADAPTATION, "object": "adaptation", "deleted": True},
    "Answers": {
        "id": "ans_0a1b2c3d4e5f60718293a4b5",
        "object": "answers",
        "created_at": 1767225601.0,
        "model": "imprint-tiny",
        "adaptation": _ADAPTATION_OBJECT,
        "answers": [
            {
                "index": 0,
                "question": _QUESTION,
                "answer": "4711",
                "adapted": True,
                "finish_reason": "stop",
                "usage": _USAGE,
                "focus": {
                    "steps": 8,
                    "alpha": 0.25,
                    "probe_before": 2.51,
                    "probe_after": 1.16,
                    "reward_first": None,
                    "reward_last": None,
                    "passage_tokens": 260,
                    "way": "focus",
                    "drafts": {
                        "focus": {"confidence": -0.02, "grounding": 6},
                        "passages": {"confidence": -0.05, "grounding": 6},
                        "document": {"confidence": -0.61, "grounding": 1},
                    },
                    "reason": "recall improved",
                },
            }
        ],
        "usage": _USAGE,
    },
    "Completion": {
        "id": "cmpl_0a1b2c3d4e5f60718293a4b5",
        "object": "text_completion",
        "created": 1767225601,
        "model": f"imprint-tiny:{_ADAPTATION}",
        "choices": [{"index": 0, "text": " 4711.", "finish_reason": "stop", "logprobs": None}],
        "usage": _USAGE,
    },
    "CreateChatCompletion": {
        "model": f"imprint-tiny:{_DOCUMENT}",
        "messages": [{"role": "user", "content": _QUESTION}],
        "max_tokens": 24,
    },
    "ChatCompletion": {
        "id": "chatcmpl-0a1b2c3d4e5f60718293a4b5",
        "object": "chat.completion",
        "created": 1767225601,
        "model": f"imprint-tiny:{_DOCUMENT}",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "4711", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": _USAGE,
    },
    "Tokenize": {"prompt": "The code", "return_token_strs": True},
    "Tokenized": {
        "count": 2,
        "max_model_len": 131072,
        "tokens": [510, 1871],
        "token_strs": ["The", " code"],
    },
    "Detokenize": {"tokens": [510, 1871]},
    "Detokenized": {"prompt": "The code"},
    "Model": _MODEL,
    "Page_Model_": _page(_MODEL),
    "Alive": {"status": "ready"},
    "Health": {
        "status": "ready",
        "version": "0.1.0",
        "model": "imprint-tiny",
        "device": "cpu",
        "num_parameters": 4700000,
        "adaptations": 0,
        "requests": 1,
        "workers": [{"name": "0", "up": True, "heartbeat_age_s": 0.2, "restarts": {}}],
    },
    "Version": {"version": "0.1.0", "model": "imprint-tiny", "python": "3.11.7"},
    "ErrorReply": {
        "error": {
            "message": "no document 'doc_x'",
            "type": "invalid_request_error",
            "param": "document_id",
            "code": "document_not_found",
        }
    },
}
