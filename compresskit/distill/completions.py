"""What a completions server says about a text: the likeliest next tokens at each place. No torch.

Protocol: the completions of OpenAI's HTTP API, with vLLM's ``prompt_logprobs``: for each token of a prompt
but the first, the log-probabilities of the likeliest tokens in its place and its own
(https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html).

Shapes: T = tokens of a prompt, K = listed ids.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from math import isfinite
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from compresskit.errors import Fault, RunError

LONGEST_WAIT_S = 60.0
DOUBLINGS = 64
SAID_CHARACTERS = 200
PASSING = frozenset({408, 409, 425, 429})
"""Of the statuses that blame the request, those that may pass."""

Entry = Mapping[str, Any]


class Unusable(Exception):
    """An answer that will not change by asking again."""


class Passing(Exception):
    """A failure that may pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """A model behind a server.

    Attributes:
        url: of the API, such as ``http://localhost:8000/v1``.
        model: as the server names it.
        top_k: K.
        vocabulary: ids there are.
        timeout_s: seconds to wait for an answer.
        retries: how many times a request is repeated that failed.
        backoff_s: seconds before the first repetition, doubled with each, at most a minute.
        api_key_env: environment variable that holds the key, where the server wants one.
    """

    url: str
    model: str
    top_k: int
    vocabulary: int
    timeout_s: float = 120.0
    retries: int = 6
    backoff_s: float = 1.0
    api_key_env: str | None = None

    def likeliest(self, prompt_T: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probabilities of the likeliest tokens after each token of the prompt but the last.

        Returns:
            Both T - 1 lists of K; the likeliest comes first.

        Raises:
            RunError: the server does not answer, or not usably, after all repetitions.
        """
        begun = time.monotonic()
        for attempt in range(self.retries + 1):
            try:
                return self.read(self.ask(prompt_T))
            except Unusable as error:
                raise self._lost(str(error)) from error
            except Passing as error:
                if attempt == self.retries:
                    seconds = time.monotonic() - begun
                    said = f"{error} ({attempt + 1} attempts in {seconds:.0f} s)"
                    raise self._lost(said) from error
            time.sleep(wait_s(self.backoff_s, attempt))
        raise AssertionError("unreachable")

    def models(self) -> dict[str, Entry]:
        """What the server serves, by name; asks once.

        Raises:
            Unusable, Passing: it does not tell.
        """
        answer = self._call("/models", None)
        try:
            return {str(entry["id"]): entry for entry in answer["data"]}
        except (KeyError, TypeError) as error:
            raise Passing("a list of models in another form") from error

    def ask(self, prompt_T: Sequence[int]) -> list[Mapping[int, Entry]]:
        """What is said of each token of the prompt but the first, by id; asks once.

        Raises:
            Unusable, Passing: nothing usable is said.
        """
        body = {
            "model": self.model,
            "prompt": list(prompt_T),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.top_k,
            "add_special_tokens": False,
        }
        answer = self._call("/completions", body)
        try:
            said = answer["choices"][0].get("prompt_logprobs")
            if said is None:
                raise Unusable("an answer without prompt_logprobs")
            places: list[Mapping[int, Entry]] = [
                {int(token): entry for token, entry in place.items()} for place in said[1:]
            ]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Passing("an answer in another form") from error
        if len(said) != len(prompt_T):
            raise Passing(f"log-probabilities of {len(said)} tokens for a prompt of {len(prompt_T)}")
        return places

    def read(self, places: Sequence[Mapping[int, Entry]]) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probabilities of the K likeliest tokens of each place.

        Raises:
            Unusable: an id that there is not.
            Passing: fewer tokens, or no numbers.
        """
        ids, logs = [], []
        for place in places:
            try:
                found = sorted(((float(e["logprob"]), token) for token, e in place.items()), reverse=True)
            except (KeyError, TypeError, ValueError) as error:
                raise Passing("a token without a log-probability") from error
            if len(found) < self.top_k:
                raise Passing(f"{len(found)} tokens where {self.top_k} were asked for")
            if outside := [token for token in place if not 0 <= token < self.vocabulary]:
                raise Unusable(f"token id {outside[0]}, where the student has {self.vocabulary}")
            kept = found[: self.top_k]
            if not all(isfinite(log) and log <= 1e-3 for log, _ in kept):
                raise Passing(f"a log-probability of {kept[0][0]}")
            logs.append([min(log, 0.0) for log, _ in kept])
            ids.append([token for _, token in kept])
        return ids, logs

    def _call(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key_env:
            headers["Authorization"] = f"Bearer {os.environ.get(self.api_key_env, '')}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url.rstrip("/") + path, data, headers)
        try:
            with urlopen(request, timeout=self.timeout_s) as answer:
                return json.loads(answer.read())
        except HTTPError as error:
            with error:
                said = f"HTTP status {error.code}: {_reason(error)}"
            kind = Unusable if 400 <= error.code < 500 and error.code not in PASSING else Passing
            raise kind(said) from error
        except (OSError, HTTPException) as error:
            raise Passing(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from error
        except ValueError as error:
            raise Passing("an answer that is no JSON") from error

    def _lost(self, got: str) -> RunError:
        where, expected = f"teacher at {self.url}", f"log-probabilities from {self.model}"
        cure = "See what the server's log says, start it again, and repeat the command."
        return RunError(Fault(where, expected, got, cure))


def wait_s(backoff_s: float, attempt: int) -> float:
    """Seconds before what failed ``attempt`` + 1 times is asked again."""
    return min(backoff_s * 2.0 ** min(attempt, DOUBLINGS), LONGEST_WAIT_S)


def patience_s(timeout_s: float, retries: int, backoff_s: float) -> float:
    """Seconds until a server that never answers a request counts as lost, about."""
    growing = min(retries, DOUBLINGS)
    waits_s = sum(wait_s(backoff_s, attempt) for attempt in range(growing))
    waits_s += (retries - growing) * wait_s(backoff_s, DOUBLINGS)
    return (retries + 1) * timeout_s + waits_s


def _reason(error: HTTPError) -> str:
    """The server's own words, shortened."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        said = json.loads(text)
        inner = said.get("error", said)
        text = str(inner.get("message", text))
    except (ValueError, AttributeError):
        pass
    text = " ".join(text.split())
    return text if len(text) <= SAID_CHARACTERS else f"{text[:SAID_CHARACTERS]}..."
