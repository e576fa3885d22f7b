"""What each code of the error shape means, and what its client should do.

Data only, and the source of docs/reference/errors.md. A test reads the server's sources and asks
that every code that is raised stands here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """One stable name for programs."""

    status: str
    """HTTP status; "-" where it only stands in an adaptation's `error`."""
    meaning: str
    remedy: str


ERROR_CODES: dict[str, ErrorCode] = {
    # the request
    "invalid_request": ErrorCode("400", "A field has a value that cannot be used.", "See `param`."),
    "invalid_json": ErrorCode("400", "The body is not JSON.", "Send UTF-8 JSON."),
    "missing_parameter": ErrorCode("400", "A field is needed.", "Add the field of `param`."),
    "unknown_parameter": ErrorCode("400", "There is no such field.", "Check its spelling."),
    "unsupported_parameter": ErrorCode(
        "400", "OpenAI's API has this parameter, this server does not.", "Leave it out."
    ),
    "invalid_method": ErrorCode(
        "400", "The method or focus cannot be run.", "The message names the field."
    ),
    "encoder_failed": ErrorCode(
        "500", "The reward encoder gave no vectors for its texts.", "The message says what it gave."
    ),
    "invalid_token": ErrorCode(
        "500", "A token id lies outside the model's vocabulary.", "Use the model's own tokenizer."
    ),
    "invalid_http": ErrorCode("400", "The bytes are not HTTP/1.1.", "Use an HTTP library."),
    "context_length_exceeded": ErrorCode(
        "400", "A question or prompt is too long.", "Shorten it, or raise max_document_tokens."
    ),
    "document_empty": ErrorCode("400", "The document holds no text.", "Send some text."),
    "document_too_large": ErrorCode(
        "413",
        "The document has more tokens than the server takes, or studying it needs more memory.",
        "Split it, or raise max_document_tokens or adaptation_bytes.",
    ),
    "body_too_large": ErrorCode(
        "413", "The body is longer than max_body_bytes.", "Split it, or raise the setting."
    ),
    "headers_too_large": ErrorCode("431", "The headers are too long.", "Send fewer or shorter."),
    "request_timeout": ErrorCode("408", "The body came too slowly.", "Send it again."),
    "unsupported_media_type": ErrorCode(
        "415", "The body is of another type.", "Send the Content-Type that the route names."
    ),
    "method_not_allowed": ErrorCode("405", "The route has no such method.", "See /openapi.json."),
    "adapter_torn": ErrorCode(
        "400", "The file is no whole safetensors file.", "Download and send it again."
    ),
    "adapter_format_mismatch": ErrorCode(
        "400", "The file is no adapter, or of another format.", "Export it with this version."
    ),
    "adapter_checksum_mismatch": ErrorCode(
        "400", "The file was changed since it was written.", "Download and send it again."
    ),
    "adapter_model_mismatch": ErrorCode(
        "400", "The adapter is of a model with other weights.", "Serve that model, or adapt anew."
    ),
    "adapter_manifest_invalid": ErrorCode(
        "400", "The adapter's manifest does not describe its file.", "Send it as it was exported."
    ),
    # who asks
    "invalid_api_key": ErrorCode(
        "401", "There is no key, or not a known one.", "Send `Authorization: Bearer KEY`."
    ),
    "forbidden": ErrorCode("403", "The request may not come from there.", "See the message."),
    "host_not_allowed": ErrorCode(
        "403", "Without keys, the server answers to its own names only.", "Configure keys."
    ),
    "origin_not_allowed": ErrorCode(
        "403", "A web page of another origin asked.", "Name the origin in cors_origins."
    ),
    "rate_limit_exceeded": ErrorCode(
        "429", "This key asks for more than its share.", "Wait for Retry-After."
    ),
    "share_exceeded": ErrorCode(
        "429",
        "This key's name holds its share of a queue; there is room for others.",
        "Wait for Retry-After.",
    ),
    # what is asked for
    "not_found": ErrorCode("404", "There is no such route or resource.", "Check the address."),
    "model_not_found": ErrorCode("404", "This model is not served.", "See `GET /v1/models`."),
    "adaptation_not_found": ErrorCode(
        "404", "No adaptation of yours has this id.", "It may have been deleted: adapt again."
    ),
    "document_not_found": ErrorCode(
        "404", "No document of yours has this id.", "It may have been deleted: send it again."
    ),
    "version_conflict": ErrorCode(
        "409", "The document has another version by now.", "Look at it, then append again."
    ),
    "invalid_idempotency_key": ErrorCode(
        "400", "The header Idempotency-Key cannot be used.", "Send 1 to 255 ASCII characters."
    ),
    "idempotency_key_in_use": ErrorCode(
        "409", "The first request with this key is not answered yet.", "Wait for Retry-After."
    ),
    "idempotency_key_reused": ErrorCode(
        "409", "The key belongs to another request.", "Take a new key for each request."
    ),
    "conflict": ErrorCode("409", "The resource's state does not allow this.", "See the message."),
    "adaptation_not_ready": ErrorCode(
        "409", "It is queued or running.", "Wait for Retry-After, or follow its events."
    ),
    "adaptation_cancelled": ErrorCode("409", "It was cancelled.", "Adapt again."),
    "adaptation_failed": ErrorCode("409", "It failed.", "Its `error` says why."),
    "study_not_ready": ErrorCode("409", "The document is not read yet.", "Wait for Retry-After."),
    "gone": ErrorCode("410", "It existed and cannot be used any more.", "Make it again."),
    "adapter_evicted": ErrorCode("410", "The adapter's file is gone.", "Adapt again."),
    "adapter_idle": ErrorCode("410", "Nobody asked it for too long.", "Adapt again."),
    "adaptation_expired": ErrorCode("410", "Its time was over.", "Adapt again."),
    "adapter_corrupt": ErrorCode(
        "410", "The adapter's file is damaged, or of another model.", "Adapt again."
    ),
    "adapter_not_found": ErrorCode(
        "410", "The adapter was deleted while it was asked.", "Adapt again."
    ),
    "study_gone": ErrorCode("410", "How it was studied is not kept.", "Adapt again."),
    # the server
    "queue_full": ErrorCode("503", "All queues are full.", "Wait for Retry-After."),
    "draining": ErrorCode("503", "The server is stopping.", "Ask another, or later."),
    "not_ready": ErrorCode("503", "A worker is not ready yet.", "Wait for Retry-After."),
    "unavailable": ErrorCode("503", "The server cannot serve this now.", "Wait for Retry-After."),
    "unusable_model": ErrorCode(
        "503", "The workers cannot load the model.", "For the operator: see the log."
    ),
    "worker_died": ErrorCode(
        "503", "The worker died under the work, more than once.", "Try again."
    ),
    "out_of_memory": ErrorCode("503", "The worker ran out of memory.", "Send less at once."),
    "store_failed": ErrorCode(
        "503", "An adapter could not be written or read.", "For the operator: see the disk."
    ),
    "journal_unavailable": ErrorCode(
        "503", "The journal cannot be written; nothing was promised.", "Wait for Retry-After."
    ),
    "deletion_pending": ErrorCode(
        "503", "The deletion goes on; a worker has not confirmed it yet.", "Delete again."
    ),
    "cancelled": ErrorCode("409", "The work was cancelled.", "Ask again."),
    "deadline_exceeded": ErrorCode(
        "504", "`timeout_s`, or the server's limit, has passed.", "Give more time, or ask less."
    ),
    "non_finite": ErrorCode(
        "500", "The model's numbers left the finite.", "Use a lower learning_rate."
    ),
    "model_not_available": ErrorCode(
        "-", "It was accepted for a model that is not served any more.", "Adapt again."
    ),
    "adapter_does_not_fit": ErrorCode(
        "-", "A tensor of the imported file does not fit the model.", "Send it as it was exported."
    ),
    "internal_error": ErrorCode(
        "500", "A bug; the log has a traceback under the request's id.", "Report it."
    ),
    "http_error": ErrorCode("4xx", "Another refusal of the HTTP layer.", "See the message."),
}
