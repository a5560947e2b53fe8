"""What a client asks of the probes in the body of a request, and the body that vLLM gets instead."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lmprobe_tl.checked_record import shown
from lmprobe_tl.errors import InputError
from lmprobe_tl.vllm.runtime import WANTS_SCORES, WANTS_STOP

PREFIXES = {"/v1/completions": "cmpl", "/v1/chat/completions": "chatcmpl"}
Number = TypeVar("Number", bool, int)


class FieldError(InputError):
    """A field of a request that cannot be used as given; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class ProbeRequest:
    """A request whose answer gets scores.

    names: what vLLM calls its prompts; n: completions of each. lists_scores: whether the logits are wanted, or only alarms
    and running scores. stop: whether an alarm ends it. keeps_token_ids: whether the client wants to see token ids. body: for
    vLLM.
    """

    names: tuple[str, ...]
    n: int
    lists_scores: bool
    stop: bool
    keeps_token_ids: bool
    body: bytes

    def place_of(self, choice: int) -> tuple[str, int]:
        """Name of the prompt, and index among its completions, of a choice of the answer."""
        return self.names[choice // self.n], choice % self.n


def read_request(path: str, body: bytes, request_id: str, *, can_stop: bool) -> ProbeRequest | bytes:
    """The request, or the body alone where the answer is to be passed on as it is: no JSON object, which is vLLM's to
    refuse, or no scores wanted. FieldError for fields that cannot be used."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(fields, dict):
        return body
    scores = _take_flag(fields, WANTS_SCORES)
    stop = _take_flag(fields, WANTS_STOP) or False
    if stop:
        _check_can_stop(fields, can_stop)
    if _as_vllm_reads(bool, fields.get("use_beam_search")):
        if scores or stop:
            raise FieldError("use_beam_search", f"{WANTS_SCORES} and {WANTS_STOP} do not go with it; leave one out.")
        scores = False
    extra = fields.get("vllm_xargs")
    wanted = scores is not False or stop
    if not wanted or not (extra is None or isinstance(extra, dict)):
        return json.dumps(fields).encode()
    fields["vllm_xargs"] = {**(extra or {}), WANTS_SCORES: 1, WANTS_STOP: int(stop)}
    keeps_token_ids = _as_vllm_reads(bool, fields.get("return_token_ids"))
    if not _as_vllm_reads(bool, fields.get("echo")):  # with both, vLLM leaves the prompt's text out
        fields["return_token_ids"] = True
    name = f"{PREFIXES[path]}-{request_id}"
    names = [name] if path.endswith("chat/completions") else [f"{name}-{index}" for index in range(_n_prompts(fields))]
    return ProbeRequest(
        tuple(names),
        max(1, _as_vllm_reads(int, fields.get("n"))),
        scores is not False,
        stop,
        keeps_token_ids,
        json.dumps(fields).encode(),
    )


def _take_flag(fields: dict[str, Any], name: str) -> bool | None:
    value = fields.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise FieldError(name, f"{name} is {shown(value)}; expected true or false.")
    return value


def _check_can_stop(fields: dict[str, Any], can_stop: bool) -> None:
    if not can_stop:
        raise FieldError(
            WANTS_STOP,
            f"{WANTS_STOP} needs the probes on the last pipeline stage, which samples the tokens, and a tokenizer with an "
            "end-of-sequence token.",
        )
    for other, kind in (("ignore_eos", bool), ("min_tokens", int)):
        if _as_vllm_reads(kind, fields.get(other)):
            raise FieldError(
                WANTS_STOP,
                f"{WANTS_STOP} ends a request by its end-of-sequence token, which {other}={shown(fields[other])} makes vLLM "
                "ignore; leave one of them out.",
            )
    grammar = next((name for name in _GRAMMARS if _has_grammar(name, fields.get(name))), None)
    if grammar is not None:
        raise FieldError(
            WANTS_STOP,
            f"{WANTS_STOP} ends a request by its end-of-sequence token, which the grammar of {grammar} may not allow at an "
            "alarm; leave one of them out.",
        )


_GRAMMARS = ("response_format", "structured_outputs", "tool_choice")  # fields that may bring one


def _has_grammar(name: str, value: Any) -> bool:
    if name == "response_format":
        return isinstance(value, dict) and value.get("type") != "text"
    if name == "tool_choice":
        return value == "required" or isinstance(value, dict)
    return value is not None


def _as_vllm_reads(kind: type[Number], value: Any) -> Number:
    """A flag or a number as vLLM's models take it, such as "false" for false and 2.0 for 2. What is none is vLLM's to
    refuse, and counts as 0."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return kind(0)


def _n_prompts(fields: dict[str, Any]) -> int:
    """Of a completion request, whose prompts are texts, token ids, or embeddings."""
    count = 0
    for value in (fields.get("prompt_embeds"), fields.get("prompt")):
        if isinstance(value, list) and not all(type(item) is int for item in value):
            count += len(value)
        elif value is not None:
            count += 1
    return max(count, 1)
