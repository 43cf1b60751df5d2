"""A teacher behind an OpenAI-compatible server that returns prompt log-probabilities, such as vLLM."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from compresskit.distill.placements.base import Teaching, processes_of, row_tokens
from compresskit.errors import Fault, InputError
from compresskit.options import Within

if TYPE_CHECKING:
    from compresskit.distill.completions import Completions
    from compresskit.stage import Outlook
    from compresskit.training.job import Part
    from compresskit.training.lesson import Taught

SERVED = "compresskit.distill.served:Served"
PROBED = 16
"""Tokens of the request that is made at plan time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Asks for the likeliest next tokens; all others count as one outcome.

    Attributes:
        url: of the API, such as ``http://localhost:8000/v1``.
        model: as the server names it.
        top_k: how many tokens are asked for; a server may allow no more than 20 unless told otherwise.
        timeout_s: seconds to wait for an answer.
        retries: how many times a request is repeated that failed, before the run stops.
        backoff_s: seconds before the first repetition, doubled with each, at most a minute.
        api_key_env: environment variable that holds the key, where the server wants one.
    """

    url: str
    model: str
    top_k: Annotated[int, Within(1)] = 20
    timeout_s: Annotated[float, Within(0, above=True)] = 120.0
    retries: Annotated[int, Within(0)] = 6
    backoff_s: Annotated[float, Within(0)] = 1.0
    api_key_env: str | None = None

    def faults(self, stage: Taught, model: Outlook, teaching: Teaching, where: str) -> list[Fault]:
        """See ``Placement.faults``; asks the server for a few tokens."""
        faults = self._own_faults(teaching, where) + self._patience_faults(stage, where)
        return faults or self._server_faults(stage, model, teaching, where)

    def held_bytes(self, stage: Taught, model: Outlook, teaching: Teaching) -> int:
        """See ``Placement.held_bytes``: nothing."""
        return 0

    def part(self, teaching: Teaching) -> Part:
        """See ``Placement.part``."""
        from compresskit.training.job import Part

        return Part(SERVED, {"server": {**asdict(self), "vocabulary": teaching.vocabulary}})

    def _own_faults(self, teaching: Teaching, where: str) -> list[Fault]:
        faults = []
        if not self.url.startswith(("http://", "https://")):
            cure = "Write the address of the API, such as http://localhost:8000/v1."
            faults.append(Fault(f"{where}.url", "an address that begins with http", repr(self.url), cure))
        if self.api_key_env and not os.environ.get(self.api_key_env):
            cure = f"Set {self.api_key_env} to the server's key, or leave api_key_env out."
            got = "no such variable"
            faults.append(Fault(f"{where}.api_key_env", "a variable of the environment", got, cure))
        if self.top_k > teaching.vocabulary:
            expected = f"at most {teaching.vocabulary}, the ids there are"
            faults.append(Fault(f"{where}.top_k", expected, str(self.top_k), "Lower top_k."))
        if teaching.blocks:
            cure = "Leave features out, or use a placement with the model itself: replicate, shard, 4bit."
            faults.append(Fault(where, "a teacher whose blocks features can look at", "a server", cure))
        if teaching.temperature != 1:
            cure = "Set temperature to 1, or use a placement with the model itself: replicate, shard, 4bit."
            got = f"temperature {teaching.temperature:g}, and log-probabilities at 1 from a server"
            faults.append(Fault(where, "a teacher at the temperature of the loss", got, cure))
        tops = {dict(loss.options).get("top_k") for loss in teaching.losses} - {None, self.top_k}
        if tops:
            cure = "Leave top_k out of the loss, or make both equal."
            got = f"top_k {', '.join(map(str, sorted(tops, key=str)))} in the loss and {self.top_k} here"
            faults.append(Fault(f"{where}.top_k", "one number of tokens to compare", got, cure))
        return faults

    def _patience_faults(self, stage: Taught, where: str) -> list[Fault]:
        """Why other processes would not wait until this one knows that the server is lost."""
        from compresskit.distill.completions import patience_s
        from compresskit.training.setting import COLLECTIVE_S

        seconds = patience_s(self.timeout_s, self.retries, self.backoff_s)
        most_s = COLLECTIVE_S / 2  # a step may ask more than once before it knows
        if processes_of(stage) < 2 or seconds < most_s:
            return []
        expected = f"less than {most_s:,.0f} s, half of the time for which processes wait for each other"
        got = f"{seconds:,.0f} s until a server that does not answer counts as lost"
        return [Fault(f"{where}.retries", expected, got, "Lower timeout_s or retries.")]

    def _server_faults(self, stage: Taught, model: Outlook, teaching: Teaching, where: str) -> list[Fault]:
        """What the server says when it is asked once."""
        from compresskit.distill.completions import Passing, Unusable

        server = self._completions(teaching.vocabulary)
        try:
            served = server.models()
        except (Passing, Unusable) as error:
            cure = "Start the server, or correct url: it ends in /v1 as a rule."
            return [Fault(f"{where}.url", "a server that tells its models", str(error), cure)]
        if self.model not in served:
            got = ", ".join(served) or "none"
            cure = "Choose one of these, or start the server with this one."
            return [Fault(f"{where}.model", f"a model that the server has: not {self.model}", got, cure)]
        faults = _length_faults(stage, model, served[self.model].get("max_model_len"), where)
        prompt = [teaching.vocabulary * i // PROBED for i in range(PROBED)]
        try:
            places = server.ask(prompt)
            server.read(places)
        except (Passing, Unusable) as error:
            cure = (
                f"Serve the model with the student's vocabulary from a server that knows prompt_logprobs; of "
                f"vLLM ask no more than its --max-logprobs, or raise that to {self.top_k}."
            )
            expected = f"the {self.top_k} likeliest tokens of each place of a prompt"
            return [*faults, Fault(where, expected, str(error), cure)]
        own = [place.get(token, {}) for place, token in zip(places, prompt[1:], strict=True)]
        return faults + _vocabulary_faults(model, prompt[1:], [e.get("decoded_token") for e in own], where)

    def _completions(self, vocabulary: int) -> Completions:
        from compresskit.distill.completions import Completions

        return Completions(**asdict(self), vocabulary=vocabulary)


def _length_faults(stage: Taught, model: Outlook, limit: Any, where: str) -> list[Fault]:
    """Whether a row, and the one token that a server insists on making, fit into the server's context."""
    try:
        row = row_tokens(stage, model)
    except InputError:
        return []  # told of the student itself
    if not isinstance(limit, int) or row < limit:
        return []
    cure = f"Start the server with --max-model-len {row + 1}, or lower context_length to {limit - 1}."
    return [Fault(where, f"a context of at least {row + 1} tokens", f"{limit} on the server", cure)]


def _vocabulary_faults(model: Outlook, ids: list[int], said: list[Any], where: str) -> list[Fault]:
    """Whether the server means the same tokens by most of these ids, as far as it tells."""
    from compresskit.modeling import load_tokenizer

    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    known = len(tokenizer)
    pairs = [
        (token, tokenizer.decode([token]), text)
        for token, text in zip(ids, said, strict=True)
        if token < known and isinstance(text, str)
    ]
    # Parts of a character have no text of their own.
    told = [(token, a, b) for token, a, b in pairs if "\ufffd" not in a + b and (a.strip() or b.strip())]
    differ = [(token, a, b) for token, a, b in told if a.strip() != b.strip()]
    if 2 * len(differ) <= len(told):
        return []
    shown = ", ".join(f"{token} is {a!r} and {b!r}" for token, a, b in differ[:3])
    cure = "Serve a model with the student's tokenizer, or build the student anew with the teacher's."
    got = f"{len(differ)} of {len(told)} tokens that differ (student and server): {shown}"
    return [Fault(where, "the same token ids in student and server", got, cure)]
