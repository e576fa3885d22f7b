"""The command line: what it needs to start, its errors and exit codes, and what it says to a
server.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from imprint.server.cli import build_parser, main
from imprint.server.config import options

ADAPTATION = {"id": "adp_1", "object": "adaptation", "status": "queued"}
ANSWERS = {
    "object": "answers",
    "answers": [
        {"question": "Which number?", "answer": " 1234567", "adapted": True},
        {"question": "Who?", "answer": "", "adapted": False},
    ],
}


def sse(*records):
    return "".join(f"data: {json.dumps(r)}\n\n" for r in records) + "data: [DONE]\n\n"


class ScriptedServer:
    """A real HTTP server on a free port; `replies` maps "METHOD path" to (status, body text)."""

    def __init__(self):
        self.replies = {}
        self.bodies = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self):
                length = int(self.headers.get("Content-Length", 0))
                outer.bodies.append(json.loads(self.rfile.read(length)) if length else None)
                status, text = outer.replies[f"{self.command} {self.path}"]
                payload = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = reply

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server():
    scripted = ScriptedServer()
    thread = threading.Thread(target=scripted.http.serve_forever, args=(0.01,))
    thread.start()
    yield scripted
    scripted.http.shutdown()
    scripted.http.server_close()
    thread.join()


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text("The magic number is 1234567.", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["eval", "ruler", "--help"]]
)
def test_help_starts_without_torch(arguments):
    code = (
        "import sys; from imprint.server.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: code = done.code\n"
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: imprint" in done.stdout


def test_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("imprint 0.")


def test_every_setting_is_a_flag_of_serve():
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--nonsense"])
    for option in options():
        arguments = build_parser().parse_args(["serve", option.flag, "x"])
        assert getattr(arguments, option.name) == "x"
    assert not any(option.name in build_parser().parse_args(["serve"]) for option in options())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve", "--port", "70000"], 2, "--port (IMPRINT_PORT): Input should be less than"),
        (["serve", "--port", "x", "--threads", "0"], 2, "--threads (IMPRINT_THREADS)"),
        (["serve", "--model", "/nowhere"], 2, "/nowhere is not a checkpoint folder"),
        (["answer", "/nowhere.txt", "-q", "x"], 2, "cannot read /nowhere.txt: No such file"),
        (["answer", "{document}", "-q", " "], 2, "a question is empty"),
        (["answer", "{document}", "-q", "x", "--url", "localhost"], 1, "must start with http"),
        (
            ["answer", "{document}", "-q", "x", "--url", "http://127.0.0.1:9"],
            1,
            "no server answers",
        ),
        (
            ["answer", "{document}", "-q", "x", "--url", "http://a", "--model", "m"],
            2,
            "--model cannot go with --url",
        ),
        (["adapt", "{document}", "--set", "steps=x"], 2, "steps must be an integer, got 'x'"),
        (["adapt", "{document}", "--set", "steps"], 2, "--set needs FIELD=VALUE, got 'steps'"),
        (["adapt", "{document}", "--preset", "big"], 2, "preset must be one of"),
        (
            ["eval", "ruler", "--model", "/nowhere", "--haystack", "{document}"],
            2,
            "is not a checkpoint folder",
        ),
        (
            ["eval", "ruler", "--haystack", "/nowhere.txt"],
            2,
            "cannot read /nowhere.txt: No such file",
        ),
        (["eval", "ruler", "--tasks", "x", "--haystack", "{document}"], 2, "tasks: unknown 'x'"),
        (
            ["train", "pretrain", "--config", "/no", "--corpus", ".", "--out", "."],
            2,
            "--config: /no",
        ),
    ],
)
def test_user_errors_are_one_message_and_a_code(arguments, code, message, document, capsys):
    arguments = [argument.replace("{document}", document) for argument in arguments]
    assert main(arguments) == code
    streams = capsys.readouterr()
    assert message in streams.err
    assert "Traceback" not in streams.err
    assert streams.out == ""


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "is empty"), (b"ab\xff", "is not UTF-8 text (byte 2)")]
)
def test_documents_must_hold_text(tmp_path, capsys, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert main(["answer", str(path), "-q", "x"]) == 2
    assert message in capsys.readouterr().err


def test_answers_come_from_a_running_server(server, document, capsys):
    progress = {"object": "answer.progress", "phase": "read", "step": 1, "steps": 4}
    delta = {"object": "answer.delta", "index": 0, "text": " 123"}
    server.replies["POST /v1/answers"] = (200, sse(progress, delta, ANSWERS))
    arguments = ["answer", document, "-q", "Which number?", "-q", "Who?", "--url", server.url]
    assert main([*arguments, "--no-focus", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert out == "Which number?\n  1234567  [adapted]\nWho?\n    [not adapted]\n"
    assert server.bodies[0] == {
        "document": "The magic number is 1234567.",
        "questions": ["Which number?", "Who?"],
        "focus": False,
        "seed": 3,
        "stream": True,
    }


def test_an_answer_from_passages_says_so(server, document, capsys):
    answers = [
        {"question": way, "answer": "7", "adapted": way == "focus", "focus": {"way": way}}
        for way in ("passages", "document", "focus")
    ]
    reply = {"object": "answers", "answers": answers}
    server.replies["POST /v1/answers"] = (200, sse(reply))
    assert main(["answer", document, "-q", "q", "--url", server.url]) == 0
    said = [line.split("7  ")[1] for line in capsys.readouterr().out.splitlines()[1::2]]
    right = ["[not adapted, from passages read again]", "[not adapted]", "[adapted]"]
    assert said == right


def test_what_the_model_says_cannot_steer_the_terminal(server, document, capsys):
    reply = {"object": "answers", "answers": [{"question": "q", "answer": "\x1b[2Jgone\r"}]}
    server.replies["POST /v1/answers"] = (200, sse(reply))
    assert main(["answer", document, "-q", "q", "--url", server.url]) == 0
    assert capsys.readouterr().out == "q\n  \ufffd[2Jgone  [not adapted]\n"


def test_answers_as_json_are_the_servers_reply(server, document, capsys):
    server.replies["POST /v1/answers"] = (200, sse(ANSWERS))
    assert main(["answer", document, "-q", "Who?", "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == ANSWERS


def test_a_refusal_is_told_in_the_servers_words(server, document, capsys):
    error = {"error": {"message": "the document is too long", "code": "document_too_large"}}
    server.replies["POST /v1/answers"] = (413, json.dumps(error))
    assert main(["answer", document, "-q", "Who?", "--url", server.url]) == 1
    assert capsys.readouterr().err == "imprint: the document is too long\n"


@pytest.mark.parametrize(
    ("status", "code"), [("succeeded", 0), ("rejected", 0), ("failed", 1), ("cancelled", 1)]
)
def test_adapt_waits_for_the_end_and_tells_it(server, document, capsys, status, code):
    job = {**ADAPTATION, "status": status, "result": {"probe_before": 2.5}, "error": None}
    server.replies["POST /v1/adaptations"] = (202, json.dumps(ADAPTATION))
    server.replies["GET /v1/adaptations/adp_1/events"] = (200, sse({"kind": "step", "data": {}}))
    server.replies["GET /v1/adaptations/adp_1"] = (200, json.dumps(job))
    arguments = ["adapt", document, "--preset", "fast", "--set", "steps=2", "--url", server.url]
    assert main(arguments) == code
    assert capsys.readouterr().out == f"adp_1 {status}\n  probe_before: 2.5\n"
    assert server.bodies[0]["method"] == {"type": "refine", "preset": "fast", "steps": 2}


def test_without_a_server_one_runs_for_the_command(tiny_checkpoint, document, tmp_path, capsys):
    model = ["--model", str(tiny_checkpoint)]
    assert main(["answer", document, "-q", "Which?", "--max-tokens", "4", "--json", *model]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert [answer["question"] for answer in reply["answers"]] == ["Which?"]
    assert reply["answers"][0]["usage"]["completion_tokens"] <= 4

    data = tmp_path / "data"
    fast = ["--preset", "fast", "--set", "steps=1", "--data-dir", str(data)]
    assert main(["adapt", document, "--json", *fast, *model]) == 0
    job = json.loads(capsys.readouterr().out)
    assert job["status"] in ("succeeded", "rejected")
    assert [path.stem for path in (data / "adapters").glob("adp_*")] == [job["id"]]


def test_a_model_that_cannot_be_loaded_is_told(tiny_checkpoint, tmp_path, document, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    assert main(["answer", document, "-q", "x", "--model", str(broken)]) == 1
    assert "the worker dies while it starts" in capsys.readouterr().err
    assert main(["answer", document, "-q", "x", "--model", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_bench_answer_prints_json(tiny_checkpoint, capsys):
    code = main(
        f"bench answer --model {tiny_checkpoint} --num-questions 1 --document-tokens 60 "
        "--background-tokens 60 --background-documents 2 --json".split()
    )
    assert code == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["num_questions"], numbers["background_documents"]) == (1, 2)
    assert numbers["max_quantum_s"] == 0.1
    assert {"idle", "adapting", "longest_quantum_s"} < set(numbers)


def test_bench_adapt_compares_the_two_ways(tiny_checkpoint, capsys):
    code = main(
        f"bench adapt --model {tiny_checkpoint} --documents 2 --tokens 120 --preset fast "
        "--rounds 1 --json".split()
    )
    assert code == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["same_bits"]
    assert numbers["together_over_alone"] > 0
    assert numbers["alone"]["documents_per_quantum"] == 1
    assert numbers["alone"]["quanta"] > numbers["together"]["quanta"]
    assert {"read", "backward", "probe"} < set(numbers["together"]["phase_s"])


def test_bench_kernels_prints_json(tiny_checkpoint, capsys):
    code = main(
        f"bench kernels --model {tiny_checkpoint} --num-tokens 48 --segment-tokens 32 --heads 1 "
        "--batch-sizes 1,3 --repeats 2 --json".split()
    )
    assert code == 0
    numbers = json.loads(capsys.readouterr().out)
    for name in ("delta_rule_64", "gated_delta_rule_128"):
        assert numbers[name]["share_of_matmul_rate"] > 0
    assert numbers["delta_rule_64"]["chunk_size"] == 32
    assert numbers["reading"]["tokens_per_s"] > 0
    assert numbers["decoding"]["batch_3_over_1_with_deltas"] > 0
    assert list(numbers["decoding"]["without_deltas"]) == ["1", "3"]


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--device", "abacus", "--device must be cpu, cuda or cuda:N"),
        ("--device", "meta", "--device must be cpu, cuda or cuda:N"),
        ("--device", "cuda:99", "CUDA devices here"),
        ("--batch-sizes", "1,many", "--batch-sizes needs numbers"),
        ("--heads", "0", "--heads must be at least 1"),
    ],
)
def test_bench_kernels_tells_what_it_cannot_use(flag, value, told, capsys):
    assert main(["bench", "kernels", flag, value]) == 2
    assert told in capsys.readouterr().err
