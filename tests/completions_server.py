"""A completions server on loopback with a tiny real model behind it, which can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from compresskit.modeling import load_model, load_tokenizer

NAME = "tiny"
Spoil = Callable[[int, Any], tuple[int, Any]]
"""From the number of the request, counted from 1, and its answer to a status and an answer."""


class Teacher:
    """What the server knows, and what it was asked.

    Attributes:
        prompts: in the order of requests.
        spoil: changes answers.
        lives: requests after which it stops answering; None for ever.
        max_model_len: as it tells.
    """

    def __init__(self, directory: Path) -> None:
        self.model: Any = load_model(directory)
        self.tokenizer = load_tokenizer(directory)
        self.prompts: list[list[int]] = []
        self.keys: list[str | None] = []
        self.spoil: Spoil = lambda number, answer: (200, answer)
        self.lives: int | None = None
        self.max_model_len = 128
        self._lock = threading.Lock()

    def complete(self, body: Any) -> tuple[int, Any] | None:
        """As vLLM does: of every place its likeliest tokens and the one that stands there; or nothing."""
        prompt, count = body["prompt"], body["prompt_logprobs"]
        assert body["model"] == NAME
        assert body["max_tokens"] == 1
        with self._lock:
            if self.lives is not None and len(self.prompts) >= self.lives:
                return None
            self.prompts.append(prompt)
            number = len(self.prompts)
            with torch.no_grad():
                log_p = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        places: list[Any] = [None]
        for place, token in zip(log_p, prompt[1:], strict=False):
            top = place.topk(count).indices.tolist()
            ranks = {t: r for r, t in enumerate(place.argsort(descending=True).tolist(), 1)}
            places.append({str(t): self._entry(place, t, ranks[t]) for t in dict.fromkeys([token, *top])})
        answer = {
            "object": "text_completion",
            "choices": [{"index": 0, "text": "", "prompt_logprobs": places}],
        }
        return self.spoil(number, answer)

    def _entry(self, place: torch.Tensor, token: int, rank: int) -> dict[str, Any]:
        return {"logprob": float(place[token]), "rank": rank, "decoded_token": self.tokenizer.decode([token])}


def _handler(teacher: Teacher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [{"id": NAME, "object": "model", "max_model_len": teacher.max_model_len}]
            self._send(200, {"object": "list", "data": models} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = teacher.complete(body)
            if answer is None:
                self.close_connection = True  # without a word, as of a process that was killed
                return
            teacher.keys.append(self.headers.get("Authorization"))
            self._send(*answer)

        def _send(self, status: int, answer: Any) -> None:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # whoever asked has left

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(directory: Path) -> Iterator[tuple[str, Teacher]]:
    """The address of the API, and what is behind it."""
    teacher = Teacher(directory)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(teacher))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", teacher
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def once(status: int, answer: Any) -> Spoil:
    """The first answer is another one."""
    return lambda number, right: (status, answer) if number == 1 else (200, right)


def late(seconds: float) -> Spoil:
    """The first answer takes so long."""

    def wait(number: int, right: Any) -> tuple[int, Any]:
        time.sleep(seconds if number == 1 else 0)
        return 200, right

    return wait
