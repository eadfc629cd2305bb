#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the nimproxy authors
"""nimproxy: Claude Code on NVIDIA NIM and every other Chat Completions server.

A client that speaks Anthropic's Messages API asks this proxy on localhost; the
proxy asks an OpenAI-style Chat Completions server (the upstream) and answers in
Anthropic's words.  Where both speak one language already, bytes pass as they are.

    client --request--> body --chat_body--> chat --Upstream--> upstream
    client <--bytes---- events <--Message-- chunks <--frames-- upstream

One word, one thing:

    body        what the client sent         chat        what we send upstream
    message     what the client gets back    completion  what upstream answers
    event       a piece of a message         chunk       a piece of a completion
    block       one content block            frame       one event of an event stream
    config      all settings, resolved once  stage       generator: pieces in, list out
    question    a body on its way upstream   course      what became of a request
    ticket      an attempt's place in line   mend        a change for what was refused
    parcel      a request that passes        draft       a provider while it is set up
    finding     what doctor has seen         receipt     what undoes changed settings

The parts; each uses only parts above it, and the first twenty-one do no I/O:

    1. Numbers
    2. Errors and JSON
    3. Splices: JSON text changed where it stands
    4. Models and providers
    5. Files: YAML, JSON5 and .env
    6. Values: what settings may be
    7. OpenClaw: another client's file as settings
    8. Configuration
    9. Documents: text from PDF
   10. Requests: body to chat
   11. Token estimate
   12. Refusals: upstream's errors to ours
   13. Arguments: read and fitted
   14. Mends: chats that are taken after a refusal
   15. Calls in text: the rule of the tail
   16. Streams: chunks to events
   17. Event streams: bytes to chunks, events to bytes
   18. Passing: what stays as it is
   19. HTTP/1.1 messages
   20. Demonstration: the built-in upstream
   21. Pacing: whose turn it is, and when to ask again
   22. Upstream
   23. Memory
   24. Journal
   25. Asking: which model, whose turn, again and instead
   26. Page: what a browser gets
   27. Proxy
   28. Server
   29. Client programs
   30. Neighbours: proxies that are up here
   31. Saved: providers as they were set up
   32. Settings: Claude Code's own files
   33. Terminal: what is said and asked
   34. Setup: the wizard
   35. Doctor: what is wrong, and what mends it
   36. Reports: models, status and usage in lines
   37. Context: what a command works with
   38. Running: the server, and clients on it
   39. Commands: what each of them does
   40. Command line

Python 3.8 or newer; nothing else.  https://www.rfc-editor.org/rfc/rfc9112 and
https://html.spec.whatwg.org/multipage/server-sent-events.html are the two wires.
"""
from __future__ import annotations  # a SyntaxError here? Python is older than 3.8

import sys

if __name__ == "__main__" and sys.path[:1] == [""]:     # piped: that is the current
    del sys.path[0]         # folder, whose json.py would be taken for Python's own

import argparse
import asyncio
import base64
import collections
import contextlib
import errno
import functools
import ipaddress
import json
import logging
import math
import os
import re
import select
import shlex
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
import zlib
from http import HTTPStatus
from json.decoder import scanstring
from typing import (Any, AsyncIterator, Awaitable, Callable, ContextManager, Dict,
                    Generator, Iterable, Iterator, List, Mapping, NamedTuple, Optional,
                    Set, TextIO, Tuple, Union)
from urllib.parse import quote, unquote, urlsplit

# difflib, hmac, http.client, shutil and the like are imported where they are used: few
# runs need them, and these four alone are a tenth of the time that a start takes.

__version__ = "0.1.0"
__all__ = ["Background", "Config", "Message", "ProxyError", "chat_body",
           "count_tokens", "fold", "main", "resolve_config", "serve", "translation"]

Json = Dict[str, Any]
Headers = List[Tuple[str, str]]


# ---- 1. Numbers --------------------------------------------------------------
# Limits and times that hold the program up.  Units are in the names; each number
# says why it is what it is.  What a user may turn is in Configuration.

MAX_REQUEST_LINE_BYTES = 16 * 1024  # RFC 9112 asks for 8000 at least; node takes 16 kB
MAX_HEAD_BYTES = 64 * 1024      # start line and fields; as uvicorn, four times h11's
MAX_FIELDS = 150                # Claude Code sends 25; gunicorn 100, aiohttp 128
MAX_TRAILER_BYTES = 16 * 1024   # nobody needs trailers; they are read and dropped
MAX_BODY_BYTES = 64 << 20       # twice Anthropic's own limit for a request
MAX_CHUNK_LINE_BYTES = 4096     # a size in hex and, in theory, an extension
MAX_EXTENSION_BYTES = 16 * 1024     # all chunk extensions of one body together
MAX_PIPELINED_BYTES = 1 << 20   # read ahead while an answer is under way, then wait
MAX_INTERIM_ANSWERS = 10        # 1xx before the answer; Go allows 5
MAX_ANSWER_BYTES = 32 << 20     # an upstream answer that is read whole
MAX_INFLATED_BYTES = 256 * 1024     # at once; a gzip bomb grows a thousand times
MAX_TUNNEL_HEAD_BYTES = 16 * 1024   # an HTTP proxy's answer to CONNECT
MAX_LINE_BYTES = 16 << 20       # one line of an event stream: a whole tool call
MAX_ARGUMENT_BYTES = 16 << 20   # arguments of one message's tool calls, held whole
MAX_CALLS = 256                 # tool calls of one message
MAX_NAME_CHARS = 1024           # of a call's name or id; Anthropic's names have 128
MAX_PIECES = 4096               # of a call's arguments, before they are joined
MAX_CUT_CHARS = 64 * 1024       # of text in one read; more is not cut into deltas
MAX_FRAME_LINES = 4096          # of one event of an event stream; one is usual
MAX_BLANK_CHARS = 4096          # leading whitespace that waits for text to lead
MAX_MODEL_CHARS = 256           # of a model's id; the longest in the catalog has 46
MAX_REASON_CHARS = 2000         # of an upstream's error text, as quoted
MAX_ERROR_CHARS = 64 * 1024     # of the same, as looked at: some repeat the request
MAX_ITEMS = 1 << 20             # commas and brackets of a JSON text: about a token
                                # each, and no window has more; parsed, one may take 200
                                # bytes, and a body of empty lists gigabytes
MAX_DIGITS = 4300               # of an integer in JSON; Python's own limit, since 3.11
MAX_BODIES_BYTES = 256 << 20    # request bodies of all clients: four of the largest
MAX_CONNECTIONS = 256           # clients at once; well under any descriptor limit
MAX_DESCRIPTORS = 8192          # asked of the system: each answer takes two, or more
READ_BYTES = 64 * 1024          # one read; asyncio's own default buffer

HEAD_SECONDS = 15.0             # for a whole head, from its first byte; either side
BODY_SECONDS = 30.0             # of silence inside a request body
WRITE_SECONDS = 600.0           # for a client that takes nothing: it may be suspended
IDLE_SECONDS = 90.0             # a kept-alive client; longer than clients' own pools
POOL_SECONDS = 20.0             # an idle upstream connection; CDN edges drop at 30
ALIVE_SECONDS = 15.0            # of silence; then the kernel asks whether a peer lives
ALIVE_RETRY_SECONDS = 5.0       # between two such questions
ALIVE_TRIES = 3                 # of them unanswered: the peer is gone
DEAD_SECONDS = 20.0             # a reused connection that takes no byte is given up
USEFUL_SECONDS = 900.0          # of bytes that say nothing: comments, empty deltas;
                                # a cold start takes minutes, a dead queue for ever
CONNECT_SECONDS = 10.0          # per address, and again for TLS; Go takes 30 and 10
HAPPY_EYEBALLS_SECONDS = 0.25   # head start of one address family, RFC 8305
GRACE_SECONDS = 2.5             # from finish_reason to a [DONE] that may never come
POLL_SECONDS = 1.0              # between looks at a queued (202) NVCF request
FAILURE_SECONDS = 15.0          # a failure is kept for the client's own replay
DRAIN_SECONDS = 30.0            # for running answers after the first signal; gunicorn's
RESET_SECONDS = 60.0            # of silence; then an event that resets the client's
                                # watchdog (300 s), which pings do not
LINGER_SECONDS = 1.0            # read and drop, so that a refusal can be read
WAKE_SECONDS = 0.5              # until a signal is seen that does not wake the loop
LEAVING_SECONDS = 1.0           # between looks after a client that is not read from
OVERLOAD_SECONDS = 1.0          # until a refused client may ask again; as asyncio's own
                                # pause after an accept that failed
TROUBLE_SECONDS = 60.0          # between two log lines about connections not taken
TRIM_SECONDS = 2.0              # between giving freed memory back; it takes about 1 ms

KEPT_FAILURES = 64              # failures remembered at once
KEPT_ERRORS = 20                # last errors that `status` shows
KEPT_REQUESTS = 20              # and last requests
KEPT_DOCUMENTS = 16             # texts of PDFs, 400,000 characters at most each
KEPT_TOOLBOXES = 8              # sets of tools: each agent of a client has its own
MAX_KNOWN = 256                 # models that something is known of; users have ten


# ---- 2. Errors and JSON ------------------------------------------------------
# One exception type crosses the proxy.  It knows its HTTP status and how it is
# spelled on the wire, so that no other part builds error bodies.  JSON is strict.

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ProxyError(Exception):
    """Something the client should hear about: an HTTP status and a sentence.

    `kind` is Anthropic's error type where the status alone does not say it;
    `headers` go with the answer, `details` into the error object; `again` is a row
    of RETRIES, if asking once more may help.
    """

    def __init__(self, status: int, message: str, kind: str = "",
                 headers: Tuple[Tuple[str, str], ...] = (), again: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or ERROR_TYPES.get(status) or (
            "invalid_request_error" if status < 500 else "api_error")
        self.headers = list(headers)
        self.details: Json = {}
        self.words = ""         # upstream's own, if it is upstream that refuses
        self.said = 0           # the status that it said them with
        self.again = again
        self.pause = 0.0        # seconds that upstream wants to be left alone
        self.fallback = ""      # why another model may do better, in a word
        self.path = ""          # of the request, if it was refused before it was whole

    def body(self, request_id: str = "") -> Json:
        error = {"type": self.kind, "message": self.message}
        if self.details:
            error["details"] = self.details
        return {"type": "error", "error": error, "request_id": request_id}


def invalid(where: str, found: Any, wanted: str) -> ProxyError:
    """A 400 that names a field of the body, what it holds, and what it should."""
    return ProxyError(400, f"{where}: expected {wanted}, found {json_kind(found)}")


def json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing."""
    close = close_words(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def close_words(word: str, known: Iterable[str], most: int,
                alike: float = 0.5) -> List[str]:
    import difflib
    return difflib.get_close_matches(word, list(known), most, alike)


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def finite(text: str) -> float:
    value = float(text)
    if value - value != 0:  # 1e999 is read as infinity
        raise ValueError("a number beyond all bounds")
    return value


def short_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a number of too many digits")
    return int(text)


def integers() -> Callable[[str], int]:
    """`int`, where it refuses what would take minutes, as it does since 2022."""
    try:
        int("9" * 5000)
    except ValueError:
        return int                      # half as fast with a function of ours
    return short_integer


# NaN and Infinity are refused here, so that they cannot be passed on.
DECODER = json.JSONDecoder(parse_float=finite, parse_int=integers(),
                           parse_constant=refuse_constant)


def decode_json(text: str) -> Any:
    """The JSON value in a text; ValueError, RecursionError."""
    if len(text) > MAX_ITEMS:                   # else it cannot hold so many
        check_items(text)
    if text[:1] == "{" and text[-1:] == "}":    # a token's: no blanks to look for
        value, end = DECODER.raw_decode(text)
        if end == len(text):
            return value
    return DECODER.decode(text)


def check_items(text: str) -> None:
    """Raise ValueError for a JSON text whose value could take gigabytes."""
    if sum(map(text.count, ",[{")) > MAX_ITEMS:
        raise ValueError(f"it has more than {MAX_ITEMS} commas and brackets")


def shaped(value: Any, shape: type) -> Any:
    """The value if it is of a shape, else an empty one of it."""
    return value if isinstance(value, shape) else shape()


def value_in(text: Union[str, bytes]) -> Any:
    """The JSON value that a text is, None if it is none."""
    try:
        return decode_json(text if isinstance(text, str) else
                           text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def referred(pointer: Any, root: Any) -> Any:
    """What a pointer like #/$defs/a~1b points at; None if that is nothing."""
    if not isinstance(pointer, str) or not re.match(r"#(/|\Z)", pointer):
        return None
    for step in unquote(pointer).split("/")[1:]:
        root = shaped(root, dict).get(step.replace("~1", "/").replace("~0", "~"))
    return root


encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
encode_text = json.JSONEncoder(ensure_ascii=False).encode   # for a model to read


# ---- 3. Splices: JSON text changed where it stands ---------------------------
# One value after the other; every byte around them stays as somebody wrote it.

Path = Tuple[str, ...]          # of a value: the keys from the top to it
JSON_BLANKS = re.compile(r"[ \t\r\n]*")
NEW_LINE = re.compile(r"(?:\r\n|\r|\n)[ \t]*\Z")    # the last one, and the indent
# Values are only compared: digits stay digits, and cost nothing.
READER = json.JSONDecoder(parse_float=str, parse_int=str,
                          parse_constant=refuse_constant)


class Member(NamedTuple):
    """A member of an object in a text: `lead "name" colon value`."""
    name: str
    value: Any
    lead: str       # blanks before the name
    start: int      # of the name's quote
    colon: str      # from the name's end to the value
    at: int         # where the value begins
    end: int        # where it ends


def past_blanks(text: str, at: int) -> int:
    found = JSON_BLANKS.match(text, at)
    return found.end() if found else at


def object_start(text: str) -> int:
    return past_blanks(text, text.startswith("\ufeff"))


def object_members(text: str, start: int, reader: json.JSONDecoder = READER,
                   ) -> Tuple[List[Member], int]:
    """The members of the object whose brace is at `start` in a sound JSON text, and
    where it closes."""
    rows: List[Member] = []
    before = start + 1
    while True:
        at = past_blanks(text, before)
        if text[at] == "}":
            return rows, at
        name, end = scanstring(text, at + 1)
        value_at = past_blanks(text, text.index(":", end) + 1)
        value, close = reader.raw_decode(text, value_at)
        rows.append(Member(name, value, text[before:at], at, text[end:value_at],
                           value_at, close))
        before = past_blanks(text, close)
        if text[before] == "}":
            return rows, before
        before += 1                                     # a comma


def member_at(text: str, path: Path) -> Optional[Member]:
    """The member at a path, of equal names the last, as for the client; or None."""
    at, row = object_start(text), None
    for key in path:
        rows = object_members(text, at)[0]
        row = next((row for row in reversed(rows) if row.name == key), None)
        if row is None:
            return None
        at = row.at
    return row


def text_with(text: str, path: Path, raw: str) -> str:
    """The text with `raw` as the value at a path, in the manner of its neighbours."""
    row = member_at(text, path)
    if row:
        return text[:row.at] + raw + text[row.end:]
    holder = member_at(text, path[:-1])
    if path[:-1] and not holder:
        text = text_with(text, path[:-1], "{}")
        holder = member_at(text, path[:-1])
    start = holder.at if holder else object_start(text)
    rows, close = object_members(text, start)
    lead, colon, tail = neighbours_manner(text, rows, holder)
    words = lead + json.dumps(path[-1]) + colon + raw
    if rows:
        end = rows[-1].end
        return text[:end] + "," + words + text[end:]
    return text[:start + 1] + words + tail + text[close:]


def neighbours_manner(text: str, rows: List[Member], holder: Optional[Member]
                      ) -> Tuple[str, str, str]:
    """What goes before a new member's name, after it, and after a first member."""
    like = rows[-1] if rows else holder
    if not like:
        line = "\r\n" if "\r\n" in text else "\n"
        return line + "  ", ": ", line
    indent = NEW_LINE.search(like.lead)
    colon = ": " if NEW_LINE.search(like.colon) else like.colon
    if rows:
        alone = len(rows) == 1 and not like.lead and colon.endswith(" ")
        return indent[0] if indent else " " if alone else like.lead, colon, ""
    if not indent:
        return "", colon, ""
    return indent[0] + indent[0].lstrip("\r\n"), colon, indent[0]


def text_without(text: str, path: Path) -> str:
    """The text without the member at a path, and without its comma."""
    holder = member_at(text, path[:-1])
    start = holder.at if holder else object_start(text)
    rows, close = object_members(text, start)
    at = max(number for number, row in enumerate(rows) if row.name == path[-1])
    if at:
        return text[:rows[at - 1].end] + text[rows[at].end:]
    if len(rows) > 1:
        return text[:rows[0].start] + text[rows[1].start:]
    return text[:start + 1] + text[close:]


# ---- 4. Models and providers -------------------------------------------------
# What is known of the models and of who serves them, as rows.  A model that is
# in no row works too: it gets the defaults and no thinking switch.

class Model(NamedTuple):
    window: int             # context window, tokens
    output: int             # the most output tokens that are safe to ask for
    vision: bool            # takes images
    retired: bool           # answers 404 or 410 at its provider's by now
    sure: bool = True       # known, or told by the server; else nothing is cut for it
    capped: bool = False    # the output was told, and holds even where nothing is sure
    thinks: Optional[bool] = None   # whether it can; None: as its family does
    label: str = ""         # for people
    cost: Tuple[float, ...] = (0, 0, 0, 0)  # dollars for a million tokens: input,
                                            # output, read from cache, written to it


UNKNOWN_MODEL = Model(131072, 16384, vision=True, retired=False, sure=False)

# id, window, output, v: takes images, x: retired.  State of October 2026.
CATALOG = """
nvidia/nemotron-3-ultra-550b-a55b              1000000 32768 -
nvidia/nemotron-3-super-120b-a12b               262144 32768 x
nvidia/nemotron-3.5-lightning-30b-a3b           262144 32768 -
nvidia/nemotron-3-nano-omni-30b-a3b-reasoning   256000 65536 v
nvidia/nemotron-nano-3-30b-a3b                  262144 32768 -
nvidia/nemotron-3-nano-30b-a3b                  131072 32768 x
nvidia/llama-3.3-nemotron-super-49b-v1.5        131072 32768 x
nvidia/llama-3.3-nemotron-super-49b-v1          131072 32768 -
nvidia/llama-3.1-nemotron-ultra-253b-v1         128000 16384 x
nvidia/llama-3.1-nemotron-70b-instruct          128000  8192 -
nvidia/llama-3.1-nemotron-nano-8b-v1            131072 16384 -
nvidia/nvidia-nemotron-nano-9b-v2               131072 16384 x
nvidia/nemotron-nano-12b-v2-vl                  128000 16384 vx
z-ai/glm-5.3                                   1000000 32768 -
z-ai/glm-5.3-flash                             1000000 32768 v
z-ai/glm-5.2                                   1000000 32768 x
z-ai/glm-5.1                                    131072 32768 x
z-ai/glm5                                       202752 32768 x
z-ai/glm4.7                                     204800 32768 x
deepseek-ai/deepseek-v4.1-flash                1000000 32768 v
deepseek-ai/deepseek-v4-flash-0731             1000000 16384 x
deepseek-ai/deepseek-v4-pro-0813               1000000 16384 -
deepseek-ai/deepseek-v4-pro                    1048576 16384 x
deepseek-ai/deepseek-v4-flash                  1000000 16384 x
deepseek-ai/deepseek-v3.2                       163840 32768 x
deepseek-ai/deepseek-v3.1                       128000  8192 x
deepseek-ai/deepseek-r1                         128000  4096 x
moonshotai/kimi-k3                             1048576 32768 v
moonshotai/kimi-k2.6                            262144 32768 vx
moonshotai/kimi-k2.5                            262144 32768 vx
moonshotai/kimi-k2-instruct-0905                262144 16384 x
moonshotai/kimi-k2-instruct                     131072 16384 x
moonshotai/kimi-k2-thinking                     262144 32768 x
minimaxai/minimax-m3                           1000000 16384 vx
minimaxai/minimax-m2.7                          204800 32768 x
minimaxai/minimax-m2.5                          204800 32768 x
minimaxai/minimax-m2.1                          204800 32768 x
openai/gpt-oss-20b                              131072 32768 -
openai/gpt-oss-120b                             128000 32768 x
google/gemma-4-31b-it                           256000 16384 v
google/diffusiongemma-26b-a4b-it                250000 16384 v
google/gemma-3-12b-it                           131072  8192 v
mistralai/mistral-medium-3.5-128b               262144 32768 v
mistralai/mistral-large-3-675b-instruct-2512    262144 16384 v
mistralai/mistral-small-4-119b-2603             128000  8192 v
mistralai/devstral-2-123b-instruct-2512         262144 16384 x
mistralai/mistral-nemotron                      128000  8192 -
mistralai/mistral-large-2-instruct              128000  4096 -
mistralai/mistral-7b-instruct-v0.3               65536  8192 -
stepfun-ai/step-3.7-flash                       256000 16384 vx
poolside/laguna-xs-2.1                          262144 16384 -
thinkingmachines/inkling                       1048576 16384 v
meta/muse-glimmer-30b                           131072 16384 v
meta/llama-3.3-70b-instruct                     128000  4096 x
meta/llama-3.1-405b-instruct                    128000  4096 x
meta/llama-3.2-90b-vision-instruct              128000  4096 v
meta/llama-4-maverick-17b-128e-instruct         128000  4096 vx
qwen/qwen3-235b-a22b                            131072  8192 x
qwen/qwen2.5-coder-32b-instruct                 128000  4096 x
qwen/qwen3-coder-480b-a35b-instruct             262144 32768 x
qwen/qwen3-next-80b-a3b-instruct                262144 16384 x
qwen/qwen3.5-397b-a17b                          262144  8192 vx
qwen/qwen3.5-122b-a10b                          262144 32768 vx
bytedance/seed-oss-36b-instruct                 262000 16384 -
deepseek-flash                                 1000000 32768 v
deepseek-v4-pro                                1000000 32768 -
deepseek-chat                                   131072  8192 x
deepseek-reasoner                               131072  8192 x
kimi-k3                                        1048576 32768 v
kimi-k2.7-code                                  262144 32768 v
kimi-k2.6                                       262144 32768 v
kimi-k2.5                                       262144 32768 v
glm-5.3                                        1000000 32768 -
glm-5.3-flash                                  1000000 32768 v
glm-4.7                                         204800 32768 -
MiniMax-M3                                     1000000 32768 v
MiniMax-M3.1-Flash-Preview                     1000000 32768 v
MiniMax-M2.1                                    204800 32768 -
gpt-oss:20b                                     131072 16384 -
kimi-k2.5:cloud                                 262144 16384 v
zai-org/glm-4.7-flash                           131072  8192 -
"""


def catalog_rows(text: str) -> Dict[str, Model]:
    """Rows of `id window output flags` as models by id."""
    rows = {}
    for line in text.strip().splitlines():
        name, window, output, flags = line.split()
        rows[name] = Model(int(window), int(output), "v" in flags, "x" in flags)
    return rows


MODELS = catalog_rows(CATALOG)

OFFERS = {                  # provider: which ids of the catalog are its own
    "nvidia": "(?!zai-org/).+/.+", "ollama": ".+:.+", "lmstudio": "zai-org/.+",
    "kimi": "kimi-[^:]+", "deepseek": "deepseek-[^/]+", "glm": "glm-.+",
    "minimax": "MiniMax-.+",
}


def offered(provider: str) -> List[str]:
    """The catalog's ids of a provider; none for one that may serve anything."""
    return [name for name in MODELS if re.fullmatch(OFFERS.get(provider, ""), name)]


class Family(NamedTuple):
    """How one family of models is told to think, and what it must read back."""
    on: Json = {}           # merged into the chat when thinking is wanted; the keys
    off: Json = {}          # "first" and "last" are text around the system prompt
    efforts: Mapping[str, Json] = {}    # word, weakest first: what is merged for it
    replay: str = ""        # thinking in history: in a "field" of turns that thought
                            # or called, of "every" turn, in "tags", or not at all
    cumulative: bool = False        # reasoning deltas may repeat all so far
    opens: str = ""         # ends thinking whose opening tag is in the prompt

    def always_thinks(self) -> bool:
        return not self.off and bool(self.efforts or self.replay or self.opens)


def template(**kwargs: Any) -> Json:
    return {"chat_template_kwargs": kwargs}


def effort_words(*names: str) -> Dict[str, Json]:
    return {name: {"reasoning_effort": name} for name in names}


THREE = effort_words("low", "medium", "high")
LOW_HIGH_MAX = {**effort_words("low", "high"), "max": {}}   # max is their default
BOTH_ON = template(thinking=True, enable_thinking=True)     # each version its own
BOTH_OFF = template(thinking=False, enable_thinking=False)
ON, OFF = template(enable_thinking=True), template(enable_thinking=False)
END = "</think>"

# First pattern found in the lower-case model id wins.
FAMILIES = [(re.compile(pattern), family) for pattern, family in [
    (r"nemotron-super-49b-v1\.5|nemotron-nano-(9b|12b)-v2",
     Family({"last": "/think"}, {"last": "/no_think"}, opens=END)),
    (r"nemotron-super-49b|nemotron-ultra-253b|nemotron-nano-[48]b",
     Family({"first": "detailed thinking on"}, {"first": "detailed thinking off"})),
    (r"nemotron-3|nemotron-nano-3",
     Family(ON, OFF, {"low": template(low_effort=True), "high": {}}, "field",
            opens=END)),
    (r"deepseek-(v4|flash|chat|reasoner)",
     Family(BOTH_ON, BOTH_OFF,
            {**effort_words("low", "high"), "max": template(reasoning_effort="max")},
            "every")),
    (r"deepseek-v3", Family(BOTH_ON, BOTH_OFF, replay="field")),
    (r"deepseek-r1|qwq|qwen3.*-thinking", Family(opens=END)),
    (r"glm-?5\.3", Family(efforts=LOW_HIGH_MAX, replay="field")),
    (r"glm-?[45]", Family(template(enable_thinking=True, clear_thinking=False), OFF,
                          replay="field")),
    (r"kimi-k3", Family(efforts=LOW_HIGH_MAX, replay="field")),
    (r"kimi-k2\.[56]", Family(template(thinking=True), template(thinking=False),
                              replay="field")),
    (r"kimi-k2(-thinking|\.7)|kimi-for-coding", Family(replay="field")),
    (r"minimax-m3\.1-flash-preview", Family(replay="tags", cumulative=True)),
    (r"minimax-m3",
     Family(template(thinking_mode="enabled"), template(thinking_mode="disabled"),
            {"low": template(thinking_mode="adaptive"), "high": {}}, "field", True,
            "</mm:think>")),
    (r"minimax-m2", Family(replay="tags", cumulative=True, opens=END)),
    (r"gpt-oss|muse", Family(efforts=THREE, replay="field")),
    (r"qwen-?3(?!.*(coder|instruct|embed))|laguna", Family(ON, OFF)),
    (r"gemma-?4|diffusiongemma", Family(ON, OFF)),
    (r"mistral-(small-4|medium-3\.5)",
     Family({"reasoning_effort": "high"}, {"reasoning_effort": "none"})),
    (r"inkling",
     Family(template(reasoning_effort="high"), template(reasoning_effort="none"),
            {word: template(reasoning_effort=word) for word in THREE})),
    (r"stepfun|step-?[0-9]", Family(replay="field", opens=END)),
    (r"seed-oss",
     Family(template(thinking_budget=-1), template(thinking_budget=0),
            {"low": template(thinking_budget=1024),
             "medium": template(thinking_budget=4096), "high": {}})),
]]
NO_FAMILY = Family()


class Provider(NamedTuple):
    """Who serves the models, and how its API says what others say otherwise."""
    name: str
    label: str
    base_url: str           # the usual one; what is spoken there is told by `api_at`
    key_variable: str       # environment variable with the API key; "" if none
    key_page: str           # where one gets a key
    opus: str
    sonnet: str
    haiku: str
    hosts: str = ""         # pattern of the hosts where this API answers
    on: Json = {}           # in place of the family's own switch
    off: Json = {}
    efforts: Mapping[str, Json] = {}    # in place of the family's, if it has some
    everyone: bool = False  # the switch is for models of no family too
    replay: str = ""        # in place of the family's
    field: str = "reasoning_content"    # where thinking stands in history
    most_bytes: int = 0     # of a request; 0: not known
    image_bytes: int = 0    # of one image in base64 that every model takes; 0: any
    per_minute: int = 0     # requests of one key; 0: any number
    at_once: int = 0
    category: str = "Paid"
    other_urls: Tuple[str, ...] = ()    # of other regions, plans and APIs
    key_shape: str = ""     # pattern of its keys, as far as they have one
    key_words: str = ""     # the same for people
    guide: Tuple[str, ...] = ()         # what to do before it can be set up
    fallbacks: Tuple[str, ...] = ()     # asked in turn in place of its three models


THINKING_ON = {"thinking": {"type": "enabled"}}
THINKING_OFF = {"thinking": {"type": "disabled"}}
NO_EFFORT = {"reasoning_effort": "none"}
CATEGORIES = ("Free", "Paid", "Custom")

PROVIDERS = {row.name: row for row in [
    Provider(
        "nvidia", "NVIDIA NIM", "https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY",
        "https://build.nvidia.com", "nvidia/nemotron-3-ultra-550b-a55b",
        "nvidia/nemotron-3-ultra-550b-a55b", "openai/gpt-oss-20b",
        r"integrate\.api\.nvidia\.com", most_bytes=45 << 20, image_bytes=180000,
        per_minute=40, at_once=6, category="Free", key_shape="nvapi-.{16,}",
        key_words="nvapi-...", guide=(
            "Sign up at https://build.nvidia.com; no card is needed.",
            "Open any model and get a key: it begins with nvapi-, and is shown once.",
            "Free keys may ask 40 times a minute; nimproxy paces itself."),
        fallbacks=("z-ai/glm-5.3-flash", "deepseek-ai/deepseek-v4.1-flash",
                   "moonshotai/kimi-k3", "nvidia/nemotron-3.5-lightning-30b-a3b")),
    Provider(
        "ollama", "Ollama", "http://localhost:11434/v1", "", "https://ollama.com",
        "gpt-oss:20b", "gpt-oss:20b", "gpt-oss:20b", r".*:11434|ollama\.com",
        off=NO_EFFORT, efforts=THREE, everyone=True, field="reasoning",
        category="Free", other_urls=("https://ollama.com/v1",), guide=(
            "Install it from https://ollama.com and start it: ollama serve",
            "Get a model: ollama pull gpt-oss:20b (or kimi-k2.5:cloud, in the cloud)",
            "Claude Code needs a window of 32k at least: "
            "OLLAMA_CONTEXT_LENGTH=32768 ollama serve")),
    Provider(
        "lmstudio", "LM Studio", "http://localhost:1234/v1", "", "https://lmstudio.ai",
        "zai-org/glm-4.7-flash", "zai-org/glm-4.7-flash", "zai-org/glm-4.7-flash",
        r".*:1234", off=NO_EFFORT, efforts=THREE, everyone=True, category="Free",
        guide=(
            "Get LM Studio from https://lmstudio.ai, and a model: lms get NAME",
            "Load it with a window that Claude Code fits in: "
            "lms load NAME --context-length 32768",
            "Start its server: lms server start")),
    Provider(
        "kimi", "Kimi (Moonshot)", "https://api.moonshot.cn/anthropic",
        "MOONSHOT_API_KEY", "https://platform.moonshot.cn/console/api-keys", "kimi-k3",
        "kimi-k2.7-code", "kimi-k2.6", r"api\.moonshot\.(ai|cn)|api\.kimi\.com",
        THINKING_ON, THINKING_OFF, key_shape="sk-.{8,}", key_words="sk-...",
        other_urls=(
            "https://api.moonshot.ai/anthropic", "https://api.moonshot.ai/v1",
            "https://api.moonshot.cn/v1", "https://api.kimi.com/coding/v1"),
        guide=(
            "Create a key at https://platform.moonshot.cn/console/api-keys",
            "A key of platform.moonshot.ai goes with api.moonshot.ai instead.")),
    Provider(
        "deepseek", "DeepSeek", "https://api.deepseek.com/anthropic",
        "DEEPSEEK_API_KEY", "https://platform.deepseek.com/api_keys", "deepseek-v4-pro",
        "deepseek-flash", "deepseek-flash", r"api\.deepseek\.com",
        THINKING_ON, THINKING_OFF, effort_words("low", "high", "max"),
        key_shape="sk-.{8,}", key_words="sk-...",
        other_urls=("https://api.deepseek.com/v1",), guide=(
            "Create a key at https://platform.deepseek.com/api_keys",
            "The account needs some balance before it answers.")),
    Provider(
        "glm", "Z.ai", "https://api.z.ai/api/anthropic", "ZAI_API_KEY",
        "https://z.ai/manage-apikey/apikey-list", "glm-5.3", "glm-5.3-flash",
        "glm-5.3-flash", r"api\.z\.ai|open\.bigmodel\.cn",
        {"thinking": {"type": "enabled", "clear_thinking": False}}, THINKING_OFF,
        key_shape=r"[\w-]{8,}\.[\w-]{8,}", key_words="xxxx.xxxx", other_urls=(
            "https://open.bigmodel.cn/api/anthropic", "https://api.z.ai/api/paas/v4",
            "https://api.z.ai/api/coding/paas/v4",
            "https://open.bigmodel.cn/api/paas/v4"),
        guide=(
            "Create a key at https://z.ai/manage-apikey/apikey-list",
            "or at https://bigmodel.cn/usercenter/proj-mgmt/apikeys, which goes with "
            "open.bigmodel.cn.")),
    Provider(
        "minimax", "MiniMax", "https://api.minimaxi.com/anthropic", "MINIMAX_API_KEY",
        "https://platform.minimaxi.com/user-center/basic-information/interface-key",
        "MiniMax-M3", "MiniMax-M3", "MiniMax-M3", r"api\.minimaxi?\.(io|com|cn)",
        {"thinking": {"type": "adaptive"}}, THINKING_OFF, replay="tags",
        key_shape="(ey|sk-).{8,}", key_words="ey... or sk-...", other_urls=(
            "https://api.minimax.io/anthropic", "https://api.minimax.io/v1",
            "https://api.minimaxi.com/v1"),
        guide=(
            "Create a key at https://platform.minimaxi.com/user-center/"
            "basic-information/interface-key",
            "A key of platform.minimax.io goes with api.minimax.io instead.")),
    Provider(
        "custom", "Custom endpoint", "", "OPENAI_API_KEY", "your provider's page", "",
        "", "", category="Custom", other_urls=("https://api.openai.com/v1",), guide=(
            "Any Chat Completions server (https://host/v1), or one that speaks",
            "Anthropic's own API (https://host/anthropic).",
            "You need its base URL, a model's name and, mostly, a key.")),
]}


# What is asked in place of a retired id: what its provider has for Sonnet.
SUCCESSORS = {
    **{name: PROVIDERS[provider].sonnet for provider in OFFERS
       for name in offered(provider) if MODELS[name].retired},
    "meta/llama-4-maverick-17b-128e-instruct": "z-ai/glm-5.3-flash",    # sees images
}


class Limits(NamedTuple):
    """What a provider refuses of a chat that others take."""
    without: Tuple[str, ...] = ()   # fields
    choices: str = "any"            # tool_choice: any; "words", but no name; "auto" or
                                    # none; "only" auto; "" not sent at all
    schema: bool = True             # response_format of type json_schema
    tokens: str = "max_tokens"      # what that field is called
    ceiling: int = 0                # the most of them that is not refused; 0: no such
    coldest: float = 0              # the least temperature that is not refused
    add: Json = {}                  # fields to add where tools are streamed


SAMPLING, LONE = ("temperature", "top_p", "top_k"), ("top_k", "parallel_tool_calls")
NO_LIMITS = Limits()

# Provider, whether thinking is on (None: either), pattern in the id.  First row wins;
# what is not known here is learned from refusals, by Mends and Memory.
LIMITS = [
    ("deepseek", True, "", Limits(SAMPLING + LONE, "", False, ceiling=393216)),
    ("deepseek", False, "", Limits(LONE, "any", False, ceiling=393216)),
    ("kimi", None, "k3", Limits(SAMPLING, "words", True, "max_completion_tokens")),
    ("kimi", None, r"k2\.7|k2-think|coding", Limits(SAMPLING, "auto", ceiling=32768)),
    ("kimi", None, r"k2\.[56]", Limits(SAMPLING, "auto", ceiling=32768)),
    ("glm", None, "", Limits(LONE, "only", False, ceiling=131072,
                             add={"tool_stream": True})),
    ("minimax", None, "", Limits(("parallel_tool_calls",), "", False,
                                 "max_completion_tokens", 128000, coldest=0.01)),
    ("ollama", None, "", Limits(LONE, "")),
    ("lmstudio", None, "", Limits(("chat_template_kwargs",), "words")),
    ("nvidia", None, "llama-[34]|mistral|gemma-[23]", Limits(("top_k",))),
]


def limits_of(provider: str, model: str, thinks: bool) -> Limits:
    low = model.lower()
    return next((limits for name, on, pattern, limits in LIMITS if name == provider
                 and on in (None, thinks) and re.search(pattern, low)), NO_LIMITS)


APIS = ("openai-completions", "anthropic-messages")     # OpenClaw's words for them
OPENCLAW = ("nimproxy", "nimproxy-openai")      # what this proxy is called there: asked
                                                # in Anthropic's words, in OpenAI's
DEMO_MODEL = "nimproxy/demo"    # answered inside this process
TIERS = ("opus", "sonnet", "haiku")


def known_model(name: str) -> Model:
    return MODELS.get(name, UNKNOWN_MODEL)


def model_family(name: str) -> Family:
    """The family of a model id; NO_FAMILY if no pattern is found in it."""
    low = name.lower()
    return next((row for pattern, row in FAMILIES if pattern.search(low)), NO_FAMILY)


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def effort_word(wanted: str, efforts: Iterable[str]) -> str:
    """The weakest of `efforts` that is not weaker than `wanted`, else the last."""
    rank = EFFORTS.index(wanted)
    strong = [word for word in efforts if EFFORTS.index(word) >= rank]
    return strong[0] if strong else list(efforts)[-1]


# ---- 5. Files: YAML, JSON5 and .env ------------------------------------------
# Texts of configuration files to their settings, each with the line it stands in.
# What is not understood is an error with line and column, never a guess.

class File(NamedTuple):
    """A configuration file as read: its name for messages, its text, and the paths in
    it that do not hold."""
    name: str = ""
    text: str = ""
    left_out: Iterable[Tuple[str, ...]] = ()


Entries = Dict[Tuple[str, ...], Tuple[Any, str]]    # path: (value, "file:line")


def expanded(value: str, environ: Mapping[str, str], where: str) -> str:
    def variable(match: Any) -> str:
        if match[1] not in environ:
            raise ProxyError(400, f"{where}: ${{{match[1]}}} is not set: export it, or "
                                  "take the line out")
        return environ[match[1]]
    return re.sub(REFERENCE, variable, value)


REFERENCE = r"\$\{(\w+)\}"     # in a value as parsed; its variable's is not searched


class Node(NamedTuple):
    """A value of a JSON5 file: a scalar, a list of nodes, or nodes by key."""
    value: Any
    where: str              # "file:line"


def json_entries(tree: Node) -> Entries:
    """What a tree of maps holds, by path; a list is one value."""
    def walk(node: Node, path: Tuple[str, ...]) -> Iterator[Tuple[Any, Any]]:
        if isinstance(node.value, dict):
            for key, item in node.value.items():
                yield from walk(item, path + (key,))
        else:
            yield path, (plain_value(node), node.where)

    return dict(walk(tree, ()))


def plain_value(node: Node) -> Any:
    """The value alone, as json.loads gives it."""
    if isinstance(node.value, list):
        return [plain_value(item) for item in node.value]
    if isinstance(node.value, dict):
        return {key: plain_value(item) for key, item in node.value.items()}
    return node.value


def is_json5(file: File) -> bool:
    """Whether a file is a JSON5 object, comments first or not; no line of ours in YAML
    begins so."""
    return re.match(r"\s*(\{|//|/\*)", file.text.lstrip("\ufeff")) is not None


# https://spec.json5.org; a name's letters are checked when it is used.  Both patterns
# are compiled by the few starts that need them.
JSON5_TOKEN = r"""
    (?P<blank>[\t\n\v\f\r\ \xa0\u1680\u2000-\u200a]+
      | [\u2028\u2029\u202f\u205f\u3000\ufeff]+
      | //[^\n\r\u2028\u2029]* | /\*(?:[^*]|\*(?!/))*\*/)
  | (?P<mark>[{}\[\]:,])
  | (?P<string>"(?:[^"\\\n\r]|\\(?:\r\n|[\s\S]))*"
             |'(?:[^'\\\n\r]|\\(?:\r\n|[\s\S]))*')
  | (?P<number>(?:[+-]?(?:0[xX][0-9a-fA-F]+
        |(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
        |[+-](?:Infinity|NaN))(?![\w$.\\]))
  | (?P<name>(?:[$\w]|\\u[0-9a-fA-F]{4})(?:[$\w\u200c\u200d]|\\u[0-9a-fA-F]{4})*)
    """
# What is missing where no token can be read, by its first character.
JSON5_OPEN = {'"': 'a closing " on the same line', "'": "a closing ' on the same line",
              "/": "a // or /* comment */"}
JSON5_WORDS = {"null": None, "true": True, "false": False,
               "Infinity": math.inf, "NaN": math.nan}
JSON5_ESCAPE = (
    r"\\(?:(?P<hex>x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"
    r"|(?P<joined>\r\n|[\n\r\u2028\u2029])|(?P<bad>[xu1-9]|0[0-9])|(?P<sign>[\s\S]))")
JSON5_SIGNS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
               "0": "\0"}
MAX_FILE_DEPTH = 64         # maps and lists in each other; OpenClaw's own use ten
MAX_NUMBER_CHARS = 1000     # of a number in a file: Python would print no 4300 digits


class Token(NamedTuple):
    kind: str               # group of JSON5_TOKEN; "end" after the last
    text: str
    line: int               # where it begins, both from 1
    column: int


class Json5:
    """Reads one JSON5 text: `token` is what comes next, and has not been used."""

    def __init__(self, file: File) -> None:
        self.name = file.name
        self.text = file.text.lstrip("\ufeff")
        self.tokens = self.scan()
        self.token = next(self.tokens)

    def scan(self) -> Iterator[Token]:
        token_at = re.compile(JSON5_TOKEN, re.VERBOSE).match
        at, line, begins = 0, 1, 0          # begins: where the line does
        while at < len(self.text):
            match = token_at(self.text, at)
            found = match[0] if match else self.text[at]
            token = Token(match.lastgroup if match else "none", found, line,
                          at - begins + 1)
            if not match:
                raise self.error(JSON5_OPEN.get(found, "JSON5"), token)
            if token.kind != "blank":
                yield token
            at = match.end()
            if "\n" in found:
                line += found.count("\n")
                begins = match.start() + found.rindex("\n") + 1
        yield Token("end", "", line, at - begins + 1)

    def error(self, wanted: str, token: Optional[Token] = None) -> ProxyError:
        """What stands there may be half a secret: a string is not quoted."""
        token = token or self.token
        shown = {"end": "the end of the file", "string": "a string"}.get(
            token.kind, ascii(token.text[:20]))
        return ProxyError(400, f"{self.name}:{token.line}:{token.column}: expected "
                               f"{wanted}, found {shown}")

    def take(self, mark: str, wanted: str = "") -> None:
        if self.token.kind not in ("mark", "end") or self.token.text != mark:
            raise self.error(wanted or repr(mark))
        if mark:
            self.token = next(self.tokens)

    def node(self, depth: int) -> Node:
        token, where = self.token, f"{self.name}:{self.token.line}"
        if depth > MAX_FILE_DEPTH:
            raise self.error(f"at most {MAX_FILE_DEPTH} maps and lists in each other")
        if token.text == "{":
            return Node(self.members(depth), where)
        if token.text == "[":
            return Node(self.items(depth), where)
        if token.kind == "string":
            value = self.unquoted(token)
        elif token.kind == "number":
            value = self.number(token)
        elif token.text in JSON5_WORDS:
            value = JSON5_WORDS[token.text]
        else:
            raise self.error("a value")
        self.token = next(self.tokens)
        return Node(value, where)

    def members(self, depth: int) -> Dict[str, Node]:
        members: Dict[str, Node] = {}
        self.take("{")
        while self.token.text != "}":
            key = self.key()
            if key in members:
                raise self.error("each key once")
            self.token = next(self.tokens)
            self.take(":")
            members[key] = self.node(depth + 1)
            if self.token.text != "}":
                self.take(",", "',' or '}'")
        self.take("}")
        return members

    def items(self, depth: int) -> List[Node]:
        items = []
        self.take("[")
        while self.token.text != "]":
            items.append(self.node(depth + 1))
            if self.token.text != "]":
                self.take(",", "',' or ']'")
        self.take("]")
        return items

    def key(self) -> str:
        """A string, or an identifier of ECMAScript's; escapes are allowed in both."""
        if self.token.kind == "string":
            return self.unquoted(self.token)
        name = self.token.text
        if self.token.kind == "name":
            name = re.sub(JSON5_ESCAPE, self.escape, name)
        spelled = re.sub("[$\u200c\u200d]", "_", name)
        if self.token.kind != "name" or not spelled.isidentifier():
            raise self.error("a key or '}'")
        return name

    def unquoted(self, token: Token) -> str:
        text = re.sub(JSON5_ESCAPE, self.escape, token.text[1:-1])
        try:                                # two escapes may be one character
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise self.error("whole characters, not half of one", token) from None

    def escape(self, match: Any) -> str:
        if match["hex"]:
            return chr(int(match["hex"][1:], 16))
        if match["bad"]:
            raise self.error("escapes as in JSON5")
        if match["joined"]:
            return ""
        return JSON5_SIGNS.get(match["sign"], match["sign"])

    def number(self, token: Token) -> Any:
        """An int where it is written as one; math.inf and math.nan are numbers, too."""
        if len(token.text) > MAX_NUMBER_CHARS:
            raise self.error(f"a number of at most {MAX_NUMBER_CHARS} characters")
        if re.fullmatch("[+-]?0[xX].*", token.text):
            return int(token.text, 16)
        if re.fullmatch("[+-]?[0-9]+", token.text):
            return int(token.text)
        return float(token.text)


def json5_tree(file: File) -> Node:
    """The value of a JSON5 text; ProxyError(400) with line and column."""
    reader = Json5(file)
    tree = reader.node(0)
    reader.take("", "the end of the file")
    return tree


def json5_text(value: Any, indent: str = "") -> str:
    """A value as JSON5 in lines of 80 columns, as far as its strings allow: keys
    without quotes where they need none, and short members side by side."""
    if not isinstance(value, (dict, list)) or not value:
        return json.dumps(value)
    deeper = indent + "  "
    if isinstance(value, dict):
        pieces = [(key if re.fullmatch("[A-Za-z_$][\\w$]*", key, re.ASCII)
                   else json.dumps(key)) + ": " + json5_text(item, deeper)
                  for key, item in value.items()]
    else:
        pieces = [json5_text(item, deeper) for item in value]
    opens, closes = ("{ ", " }") if isinstance(value, dict) else ("[", "]")
    short = opens + ", ".join(pieces) + closes
    if "\n" not in short and len(short) <= 60:
        return short
    lines: List[str] = []
    for piece in pieces:
        if lines and "\n" not in lines[-1] + piece and len(
                deeper + lines[-1] + piece) <= 78:
            lines[-1] += f" {piece},"
        else:
            lines.append(piece + ",")
    return "\n".join([opens[0], *(deeper + line for line in lines),
                      indent + closes[-1]])


YAML_KEY = re.compile(r"""( *)("[^"]*"\s*|'[^']*'\s*|[^\s#&*!|>%@`{}\[\],"'-]"""
                      r"(?:[^:]|:(?=\S))*):(?:\s+(.*))?")


def yaml_entries(file: File) -> Entries:
    """The subset of YAML that configurations are written in.

    Nested maps, plain and quoted scalars, comments and flow lists.  Anything else
    is a ProxyError(400) with line and column, never a guess.
    """
    entries: Entries = {}
    stack: List[Tuple[int, str]] = []       # columns and keys of the maps we are in
    for number, line in enumerate(file.text.lstrip("\ufeff").splitlines(), 1):
        text = line.strip()
        if not text or text[0] == "#" or text == "---" and not entries:
            continue
        match = YAML_KEY.fullmatch(line.rstrip())
        if line[0] == "\t":
            raise yaml_error(file, number, line, "spaces, not tabs, before")
        if not match:
            raise yaml_error(file, number, line)
        column, above = len(match[1]), None
        while stack and stack[-1][0] >= column:
            above = stack.pop()
        parent = tuple(key for _, key in stack)
        if above is None and stack:
            if entries.pop(parent, ("",))[0] is not None:
                raise yaml_error(file, number, line, "a key at the outer level")
        elif column != (above[0] if above else 0):
            raise yaml_error(file, number, line, "the indentation of its neighbours")
        stack.append((column, match[2].strip().strip("\"'")))
        path = tuple(key for _, key in stack)
        if path in entries:
            raise yaml_error(file, number, line, "each key once")
        value = yaml_value(file, number, line, match[3] or "")
        entries[path] = value, f"{file.name}:{number}"
    return entries


def yaml_error(file: File, number: int, line: str, wanted: str = "") -> ProxyError:
    column = len(line) - len(line.lstrip()) + 1
    wanted = wanted or "'key: value' (nested maps, scalars and [flow, lists])"
    return ProxyError(400, f"{file.name}:{number}:{column}: expected {wanted}, "
                           f"found {line.strip()[:60]!r}")


YAML_QUOTED = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*(?:#.*)?""")
YAML_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


def yaml_value(file: File, number: int, line: str, text: str) -> Any:
    """One scalar or flow list."""
    quoted = YAML_QUOTED.fullmatch(text)
    if quoted and text[0] == "'":
        return quoted[1][1:-1].replace("''", "'")
    if quoted:
        with contextlib.suppress(ValueError):
            return json.loads(quoted[1])
        raise yaml_error(file, number, line, "escapes as in JSON")
    text = re.sub(r"(^|\s)#.*", "", text).strip()
    if re.fullmatch(r"\[(?:[^\[\]{}]|\$\{\w+\})*\]", text):
        items = re.findall(r"""\s*("[^"]*"|'[^']*'|[^,]+)\s*,?""", text[1:-1])
        return [yaml_value(file, number, line, item.strip()) for item in items]
    if re.search(r"^[\[\]{}&*!|>%@`\"',]|^-(?![0-9.])|:(\s|$)", text):
        raise yaml_error(file, number, line, "a scalar or a [flow, list]")
    if re.fullmatch(r"-?[0-9]{1,19}", text):    # Python reads 4300 digits and no more
        return int(text)
    if re.fullmatch(r"-?[0-9]*\.[0-9]+", text):
        return float(text)
    return YAML_WORDS.get(text.lower(), text)


def dotenv_values(text: str) -> Dict[str, str]:
    """KEY=value lines; comments, `export` and one layer of quotes are understood."""
    values = {}
    for line in text.lstrip("\ufeff").splitlines():
        match = re.fullmatch(r"(?:export\s+)?(\w+)\s*=\s*(.*)", line.strip(), re.ASCII)
        if match:
            quoted = re.fullmatch(r"""(["'])(.*)\1(?:\s+#.*)?""", match[2])
            plain = re.split(r"(?<!\s)\s+#", match[2])[0]
            values[match[1]] = quoted[2] if quoted else plain
    return values


# ---- 6. Values: what settings may be -----------------------------------------
# Kinds of settings, each with words for people and a parser for text or a file's own
# types.

def masked(url: str) -> str:
    """A URL, or a text with some, without user and password."""
    return re.sub(r"//[^/\s]*@", "//***@", url)


def masked_key(key: str) -> str:
    """`***cdef`: no more than the last four, and of a short key nothing."""
    return "***" + (key[-4:] if len(key) >= 12 else "")


ALIASES, FALLBACKS = "model_aliases", "fallbacks"   # the sections with free keys
LEVELS = ("debug", "info", "warning", "error")


def convert(kind: str, raw: Any, source: str) -> Any:
    """A value of the kind, from text or from a file's own type."""
    words, parse = KINDS[kind]
    try:
        return parse(raw)
    except (ValueError, TypeError):
        shown = "text that is not that" if kind == "secret" else masked(repr(raw))
        hint = ""
        if isinstance(raw, str) and kind in ("provider", "level"):
            hint = nearest(raw, PROVIDERS if kind == "provider" else LEVELS)
        message = f"{source}: expected {words}, found {shown}{hint}"
        raise ProxyError(400, message) from None


def as_text(raw: Any) -> str:
    """Text that neither ends a line nor steers a terminal, without blanks around it."""
    if not isinstance(raw, str):
        raise TypeError
    if not raw.strip().isprintable():
        raise ValueError
    return raw.strip()


def as_secret(raw: Any) -> str:
    """A key: printable ASCII, so that it can stand in a header line, and without the
    quotes that are pasted around some."""
    if not re.fullmatch(r"[!#-&(-~]+", as_text(raw)):
        raise ValueError
    return as_text(raw)


def as_host(raw: Any) -> str:
    host = as_text(raw)
    if ":" in host:
        ipaddress.IPv6Address(host.partition("%")[0])
        return host
    host.encode("idna")                     # UnicodeError, a ValueError: no host name
    if not host or re.search(r"[\[\]/\s]", host):
        raise ValueError
    return host


def as_url(raw: Any) -> str:
    url = urlsplit(as_text(raw))
    if url.scheme not in ("http", "https") or not url.hostname or url.query:
        raise ValueError
    if not re.fullmatch(r"[!-~]+", raw.strip()) or url.port == 0 or url.username:
        raise ValueError
    url.hostname.encode("idna")             # UnicodeError, a ValueError: no host name
    host = url.hostname.rstrip(".")
    if url.scheme == "http" and (provider_at("https://" + host) or host in (
            "api.openai.com", "api.anthropic.com")):
        raise ValueError                    # others could read key and prompts
    return raw.strip()


def within(low: float, high: float, number: type) -> Callable[[Any], Any]:
    """A parser of numbers in a range; text is read, booleans and NaN are refused."""
    def parse(raw: Any) -> Any:
        if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
            raise TypeError
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", str(raw).strip(), re.ASCII):
            raise ValueError
        value = number(str(raw).strip())
        if not low <= value <= high:
            raise ValueError
        return value
    return parse


def one_of(words: Iterable[str]) -> Callable[[Any], str]:
    def parse(raw: Any) -> str:
        if as_text(raw).lower() not in words:
            raise ValueError
        return raw.lower()
    return parse


def as_model(raw: Any) -> str:
    if not re.fullmatch(r"\S{1,256}", as_text(raw)) or not raw.isprintable():
        raise ValueError
    return raw


def as_level(raw: Any) -> str:
    """A log level; other programs' words and their upper case are understood."""
    return one_of(LEVELS)(LEVEL_WORDS.get(as_text(raw).lower(), raw))


LEVEL_WORDS = {"warn": "warning", "critical": "error", "trace": "debug"}


def as_switch(raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise TypeError
    return raw


def as_tokens(raw: Any) -> int:
    """A number of tokens, as JSON has it."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        raise TypeError
    if raw != raw or not 1 <= raw <= 1 << 27 or raw != int(raw):
        raise ValueError
    return int(raw)


def as_input(raw: Any) -> bool:
    """Whether images are among what a model takes."""
    if not isinstance(raw, list) or not all(isinstance(word, str) for word in raw):
        raise TypeError
    return "image" in raw


def as_cost(raw: Any) -> Tuple[float, ...]:
    """Model.cost from OpenClaw's map; what is not there costs nothing."""
    if not isinstance(raw, dict):
        raise TypeError
    costs = tuple(raw.get(name, 0) for name in COSTS)
    for cost in costs:
        if isinstance(cost, bool) or not isinstance(cost, (int, float)):
            raise TypeError
        if not 0 <= cost < math.inf:        # nor NaN
            raise ValueError
    return costs


COSTS = ("input", "output", "cacheRead", "cacheWrite")


def as_window(raw: Any) -> int:
    """A number of tokens, of 1024 if it ends in k, of 1024 * 1024 if in m."""
    match = re.fullmatch("([0-9]{1,9})([km]?)", str(raw).strip().lower(), re.ASCII)
    if isinstance(raw, bool) or not match:
        raise ValueError
    tokens = int(match[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[2]]
    if not 1024 <= tokens <= 1 << 27:
        raise ValueError
    return tokens


KINDS = {
    "text": ("printable characters", as_text),
    "secret": ("a key of printable ASCII without spaces or quotes", as_secret),
    "host": ("an address or a name of this machine", as_host),
    "url": ("a base URL such as https://host/v1 (http:// is for servers of your own)",
            as_url),
    "port": ("a port from 0 to 65535", within(0, 65535, int)),
    "seconds": ("seconds, 0 to 86400", within(0, 86400, float)),
    "count": ("a whole number, 0 to 100000", within(0, 100000, int)),
    "few": ("a whole number, 0 to 10", within(0, 10, int)),
    "switch": ("true or false", as_switch),
    "provider": ("one of " + ", ".join(PROVIDERS), one_of(PROVIDERS)),
    "level": ("one of " + ", ".join(LEVELS), as_level),
    "api": (" or ".join(APIS), one_of(APIS)),
    "format": ("native or xml", one_of(("native", "xml"))),
    "tokens": ("a whole number of tokens, 1 to 134217728", as_tokens),
    "input": ('a list of "text" and "image"', as_input),
    "cost": ("dollars for a million tokens, as in {input: 0, output: 0}", as_cost),
    "days": ("a number of days, 1 to 30", within(1, 30, int)),
    "window": ("tokens such as 32768, 128k or 1m", as_window),
    "model": ("a model's id, without spaces", as_model),
}


def api_at(base_url: str) -> str:
    """What is spoken at a base URL, as far as it tells: those who serve both APIs end
    the one with /anthropic."""
    own = re.search(r"/anthropic(/v1)?(/messages)?/*$|/v1/messages/*$|"
                    r"//api\.anthropic\.com|//api\.kimi\.com/coding/*$", base_url)
    return APIS[1] if own else APIS[0]


def provider_at(base_url: str) -> Optional[Provider]:
    """The row of those whose host a URL names; None if nobody's is known by it."""
    host = urlsplit(base_url).netloc.rpartition("@")[2].lower()
    return next((row for row in PROVIDERS.values()
                 if row.hosts and re.fullmatch(row.hosts, host)), None)


def clean_base_url(url: str, api: str) -> str:
    """The URL that paths are appended to, without the end that many copy along with it.

    It is `https://host/v1`, with /v1 if there is no path and the host is not known to
    have another; for `anthropic-messages` what the SDKs call it, without /v1.
    """
    if api == APIS[1]:
        return re.sub(r"(/v1)?(/messages)?/*$", "", url)
    url = re.sub(r"/(chat/)?completions/?$", "", url.rstrip("/"))
    known = (each for row in PROVIDERS.values() for each in (row.base_url,
                                                             *row.other_urls)
             if each.startswith(url + "/") and api_at(each) == api)
    return url if urlsplit(url).path else next(known, url + "/v1")


# ---- 7. OpenClaw: another client's file as settings --------------------------
# Its providers and models as entries of our own keys, with the lines they stand in.  Of
#
#     {env: {X: "..", vars: {X: ".."}},
#      agents: {defaults: {model: {primary: "name/id", fallbacks: ["name/id"]}}},
#      models: {providers: {name: {baseUrl, apiKey, api, models: [{id, ...}]}}}}
#
# one provider is taken; everything else is OpenClaw's own business.
# https://docs.openclaw.ai/gateway/configuration

PRIMARY = ("agents", "defaults", "model")
MODEL_KINDS = {             # key of a model there: (field of Model, row of KINDS)
    "name": ("label", "text"),
    "reasoning": ("thinks", "switch"),
    "input": ("vision", "input"),
    "contextWindow": ("window", "tokens"),
    "maxTokens": ("output", "tokens"),
    "cost": ("cost", "cost"),
}
KEPT_KEY = ("openclaw", "key")      # set: no variable's key goes to that server
FACTS = "openclaw models"           # the section of what is told of models


def openclaw_section(tree: Node) -> Optional[Node]:
    """The node that holds `providers`, by which such a file is known; it may be the
    file itself, as the section that is shown in many guides."""
    section = beneath(tree, "models") or tree
    return section if isinstance(tree.value, dict) and beneath(
        section, "providers") else None


def beneath(node: Optional[Node], *path: str) -> Optional[Node]:
    """What stands under a path of keys, None if nothing does."""
    for key in path:
        if node is None or not isinstance(node.value, dict):
            return None
        node = node.value.get(key)
    return node


def openclaw_entries(tree: Node, environ: Mapping[str, str], wanted: str) -> Entries:
    """The settings of ours that an OpenClaw file amounts to, with its lines.

    `wanted` is the provider's name there, "" for the one of the primary model.
    """
    block = env_block(tree)
    really = {name: value for name, value in environ.items() if value}
    told = OpenclawValues({**environ, **block, **really})
    primary = beneath(tree, *PRIMARY, "primary") or beneath(tree, *PRIMARY)
    ref = told.text(primary, "agents.defaults.model.primary")
    name, node = openclaw_provider(tree, wanted, ref.partition("/")[0])
    at = f"models.providers.{name}"
    base_url = told.value("url", beneath(node, "baseUrl"), f"{at}.baseUrl") or ""
    row = openclaw_row(name, base_url)
    if not (base_url or row.base_url):
        raise ProxyError(400, f"{node.where}: {at}: expected a baseUrl, found none")
    rows = told.models(beneath(node, "models"), f"{at}.models")
    mine = ref.startswith(tuple(each + "/" for each in (name, *OPENCLAW)))
    if mine and not ref.startswith(name + "/"):
        ref = f"{name}/{ref.partition('/')[2]}"     # through this proxy: the same id
    default = openclaw_id(name, rows, ref) if mine else next(iter(rows), "")
    key = told.key(beneath(node, "apiKey"), f"{at}.apiKey")
    own = not base_url or provider_at(base_url) is row
    found = {
        "provider": (row.name, node),
        "upstream.base_url": (base_url, beneath(node, "baseUrl")),
        "upstream.api_key": (key or own and block.get(row.key_variable) or "",
                             beneath(node, "apiKey")),
        "upstream.api": (told.value("api", beneath(node, "api"), f"{at}.api"),
                         beneath(node, "api")),
        "upstream.default_model": (
            default, primary if mine else beneath(node, "models"))}
    entries: Entries = {tuple(path.split(".")): (value, (there or node).where)
                        for path, (value, there) in found.items()}
    if not own:
        entries[KEPT_KEY] = True, node.where
    others = told.ids(beneath(tree, *PRIMARY, "fallbacks"), name, rows)
    for model in {default, SUCCESSORS.get(default, default)} if others else ():
        entries[FALLBACKS, model] = others, node.where
    entries[FACTS, ""] = (name, rows), node.where
    return entries


def openclaw_facts(entries: Entries) -> Json:
    prefix, models = entries.get((FACTS, ""), (("", {}), ""))[0]
    return {"prefix": prefix, "models": models}


def openclaw_provider(tree: Node, wanted: str, primary: str) -> Tuple[str, Node]:
    """The provider that is asked for, or the primary model's, or the only one; never
    this proxy, which would ask itself."""
    node = beneath(openclaw_section(tree), "providers") or tree
    if not isinstance(node.value, dict) or not node.value:
        raise ProxyError(400, f"{node.where}: models.providers: expected a map of "
                              f"providers, found {json_kind(plain_value(node))}")
    rows = {name: row for name, row in node.value.items() if name not in OPENCLAW}
    if not rows:
        raise ProxyError(400, f"{node.where}: models.providers: expected one that is "
                              f"not this proxy itself, found {', '.join(node.value)}")
    names = [wanted] if wanted else [primary] * (primary in rows) + list(rows)
    name = names[0]
    if name not in rows or len(rows) > 1 and name not in (wanted, primary):
        found = f"{wanted!r}{nearest(wanted, rows)}" if wanted else (
            "no primary model that names it")
        raise ProxyError(400, f"{node.where}: models.providers: expected --provider "
                              f"with one of {', '.join(rows)}, found {found}")
    if not isinstance(rows[name].value, dict):
        raise ProxyError(400, f"{rows[name].where}: models.providers.{name}: expected "
                              f"a map, found {json_kind(plain_value(rows[name]))}")
    return name, rows[name]


def openclaw_row(name: str, base_url: str) -> Provider:
    """Our row for a provider: by its host, or by its name."""
    return provider_at(base_url) or PROVIDERS.get(name, PROVIDERS["custom"])


def openclaw_id(name: str, ids: Iterable[str], ref: str) -> str:
    """The id that a model goes by upstream: the provider's name is no part of it,
    unless an id that is listed has it, or what remains is none of NVIDIA's."""
    rest = ref[len(name) + 1:] if ref.startswith(name + "/") else ref
    if rest not in ids and (ref in ids or name == "nvidia" and "/" not in rest):
        return ref
    return rest


def env_block(tree: Node) -> Dict[str, str]:
    """The variables that the file itself sets."""
    found: Dict[str, str] = {}
    for path in (("env",), ("env", "vars")):
        node = beneath(tree, *path)
        items = node.value if node and isinstance(node.value, dict) else {}
        found.update({name: str(item.value) for name, item in items.items()
                      if isinstance(item.value, (str, int, float))})
    return found


class OpenclawValues:
    """Values of an OpenClaw file, checked; `environ` is what ${VAR} stands for."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def value(self, kind: str, node: Optional[Node], at: str) -> Any:
        """A value of a row of KINDS; None if it is not there, null or empty."""
        if node is None or node.value in (None, ""):
            return None
        value = plain_value(node)
        if isinstance(value, str):
            value = expanded(value, self.environ, node.where)
        return convert(kind, value, f"{node.where}: {at}")

    def text(self, node: Optional[Node], at: str) -> str:
        if node and isinstance(node.value, dict):
            return ""                       # fallbacks without a primary
        return self.value("text", node, at) or ""

    def key(self, node: Optional[Node], at: str) -> str:
        """An API key: text, or OpenClaw's {source: "env", provider, id: "VARIABLE"}."""
        if node is None or not isinstance(node.value, dict):
            return self.value("secret", node, at) or ""
        source, name = beneath(node, "source"), beneath(node, "id")
        if source is None or name is None or source.value != "env" or (
                not re.fullmatch(r"\w+", str(name.value))):
            raise ProxyError(400, f"{node.where}: {at}: expected text or "
                                  '{source: "env", id: "VARIABLE"}, found another '
                                  "reference, which only OpenClaw can follow")
        where = f"{node.where}: {at}"
        value = expanded("${%s}" % name.value, self.environ, where)
        return convert("secret", value, where)

    def models(self, node: Optional[Node], at: str) -> Dict[str, Model]:
        """What is told of each model, by id."""
        rows = {}
        for number, item in enumerate(self.listed(node, at)):
            name = self.text(beneath(item, "id"), f"{at}[{number}].id")
            if not name:
                found = json_kind(plain_value(item))
                raise ProxyError(400, f"{item.where}: {at}[{number}]: expected a map "
                                      f"with an id, found {found} without")
            facts = known_model(name)._replace(window=0, output=0, sure=False)
            for key, (field, kind) in MODEL_KINDS.items():
                value = self.value(kind, beneath(item, key), f"{at}[{number}].{key}")
                if value is not None:
                    facts = facts._replace(**{field: value})
            rows[name] = facts
        return rows

    def listed(self, node: Optional[Node], at: str) -> List[Node]:
        if node is None or node.value is None:
            return []
        if not isinstance(node.value, list):
            raise ProxyError(400, f"{node.where}: {at}: expected a list, found "
                                  f"{json_kind(node.value)}")
        return node.value

    def ids(self, node: Optional[Node], name: str, rows: Iterable[str]) -> List[str]:
        """The fallbacks of this provider; no other's can be asked."""
        refs = [self.text(item, "agents.defaults.model.fallbacks")
                for item in self.listed(node, "agents.defaults.model.fallbacks")]
        return [openclaw_id(name, rows, ref) for ref in refs
                if ref.startswith(name + "/")]


# ---- 8. Configuration --------------------------------------------------------
# Flags over environment over .env over file over the provider's row, merged once
# by a pure function.  The environment and the files' texts are its arguments.

class Config(NamedTuple):
    """All settings.  Seconds and characters; an empty string is "not set"."""
    provider: str = "nvidia"
    base_url: str = PROVIDERS["nvidia"].base_url
    api: str = APIS[0]      # what is spoken there
    api_key: str = ""
    default_model: str = PROVIDERS["nvidia"].sonnet
    opus: str = PROVIDERS["nvidia"].opus
    sonnet: str = PROVIDERS["nvidia"].sonnet
    haiku: str = PROVIDERS["nvidia"].haiku
    host: str = "127.0.0.1"
    port: int = 8787        # 0: any free one
    proxy_key: str = ""     # what clients must present; "": nothing, on loopback
    log_level: str = "info"
    log_json: bool = False          # log lines as JSON objects
    ping_interval: float = 15.0
    text_delta_chars: int = 6       # 0: text goes out as it came in
    eager_after: float = 0.08
    first_byte_timeout: float = 300.0   # hosted queues; the client gets pings
    idle_timeout: float = 180.0         # silence inside an answer
    tool_format: str = "native"     # or "xml": tools in prose
    context_window: int = 0         # tokens, of every model; 0: as known or found
    requests_per_minute: Optional[int] = None   # of the key; 0: any number; None: as
    concurrency: Optional[int] = None           # the host's row says, so for both
    max_wait: float = 120.0         # for a turn; then the client gets a 429
    retries: int = 3                # of a request that upstream is too busy for
    start_retries: int = 1          # of an answer that breaks before its first word
    connect_warning: float = 15.0   # without a word: the log says so; 0: never
    fallbacks: Mapping[str, Tuple[str, ...]] = {}   # by model or tier, in order
    home: str = ""                  # folder for what is remembered; "": nowhere
    model_aliases: Mapping[str, str] = {}
    prefix: str = ""                # OpenClaw's name of the provider, before its ids
    models: Mapping[str, Model] = {}    # as the file tells them; 0 tokens: not told
    http_proxy: str = ""
    https_proxy: str = ""
    no_proxy: str = ""
    ca_files: Tuple[Tuple[str, str], ...] = ()      # (variable, path)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.shown().items())
        return f"Config({shown})"

    def shown(self) -> Json:
        """All values, with the secret ones as "***"."""
        values = self._asdict()
        for name in ("api_key", "proxy_key"):
            values[name] = values[name] and "***"
        for name in ("http_proxy", "https_proxy"):
            values[name] = masked(values[name])
        values["models"] = list(self.models)
        return values


class Setting(NamedTuple):
    field: str              # of Config
    variable: str           # environment variable, or ""
    key: str                # dotted key in the file
    kind: str               # row of KINDS
    found: str              # in a file that may be a stranger's it holds: "free"; where
                            # the server is the user's "own"; after a "yes"


SETTINGS = [
    Setting("provider", "", "provider", "provider", "own"),
    Setting("base_url", "NVIDIA_BASE_URL", "nvidia.base_url", "url", "own"),
    Setting("base_url", "", "upstream.base_url", "url", "own"),
    Setting("api_key", "NVIDIA_API_KEY", "nvidia.api_key", "secret", "own"),
    Setting("api_key", "", "upstream.api_key", "secret", "own"),
    Setting("default_model", "DEFAULT_NVIDIA_MODEL", "nvidia.default_model", "text",
            "own"),
    Setting("default_model", "", "upstream.default_model", "text", "own"),
    Setting("api", "", "upstream.api", "api", "own"),
    Setting("first_byte_timeout", "", "upstream.first_byte_timeout", "seconds", "free"),
    Setting("idle_timeout", "", "upstream.idle_timeout", "seconds", "free"),
    Setting("opus", "", "models.opus", "text", "own"),
    Setting("sonnet", "", "models.sonnet", "text", "own"),
    Setting("haiku", "", "models.haiku", "text", "own"),
    Setting("tool_format", "", "tool_format", "format", "own"),
    Setting("context_window", "", "max_context_window", "window", "own"),
    Setting("requests_per_minute", "", "limits.requests_per_minute", "count", "own"),
    Setting("concurrency", "", "limits.concurrency", "count", "own"),
    Setting("max_wait", "", "limits.max_wait", "seconds", "free"),
    Setting("retries", "", "limits.retries", "few", "free"),
    Setting("start_retries", "STREAM_START_RETRIES", "limits.start_retries",
            "few", "free"),
    Setting("connect_warning", "CONNECT_WARNING_SECONDS", "limits.connect_warning",
            "seconds", "free"),
    Setting("host", "PROXY_HOST", "server.host", "host", "yes"),
    Setting("port", "PROXY_PORT", "server.port", "port", "free"),
    Setting("proxy_key", "PROXY_API_KEY", "server.api_key", "secret", "yes"),
    Setting("log_level", "LOG_LEVEL", "server.log_level", "level", "free"),
    Setting("log_json", "", "server.log_json", "switch", "free"),
    Setting("ping_interval", "", "streaming.ping_interval", "seconds", "free"),
    Setting("text_delta_chars", "", "streaming.text_delta_chars", "count", "free"),
    Setting("eager_after", "", "streaming.eager_after", "seconds", "free"),
    Setting("home", "NIMPROXY_HOME", "", "text", "yes"),
]


class SavedProviders(NamedTuple):
    """What was set up earlier: a file's entries by provider, and which of them is to be
    used when none is named."""
    active: str = ""
    entries: Mapping[str, Entries] = {}


def resolve_config(flags: Json, environ: Mapping[str, str], dotenv: Mapping[str, str],
                   file: File, saved: SavedProviders = SavedProviders(),
                   ) -> Tuple[Config, Json]:
    """All settings, and for each field the words for where it came from.

    Raises ProxyError(400) that names source, setting, what was found and wanted.
    """
    entries, flags = file_entries(file, {**dotenv, **environ}, flags)
    own_place = flags.get("base_url") or any(
        path[0] == "nvidia" or path[0] == "upstream" and path[-1] in (
            "base_url", "api_key") for path in entries)
    active = "" if own_place else saved.active
    layers = {"environment": environ, ".env": dotenv}
    found, sources = asked_for(flags, layers, entries, saved._replace(active=active))
    if active and "provider" not in found:
        found["provider"], sources["provider"] = active, "the active provider"
    row = PROVIDERS[found.get("provider", "nvidia")]
    if not found.setdefault("base_url", row.base_url):
        raise ProxyError(400, f"{sources['provider']}: 'custom' needs --base-url URL")
    found.setdefault("api", api_at(found["base_url"]))
    found["base_url"] = clean_base_url(found["base_url"], found["api"])
    found[ALIASES] = model_aliases(entries, {**dotenv, **environ})
    found[FALLBACKS] = model_fallbacks(entries)
    unset = FALLBACKS not in {path[0] for path in entries}
    preset_models(found, sources, row, unset and found["base_url"] == row.base_url)
    found.update(openclaw_facts(entries))
    network = network_settings(environ)
    sources.update({name: source for name, source, value in (
        (ALIASES, "environment or file", found[ALIASES]),
        (FALLBACKS, sources.get(FALLBACKS, "file"), found[FALLBACKS]),
        ("prefix", file.name, found["prefix"]), ("models", file.name, found["models"]),
        *((name, "environment", value) for name, value in network.items())) if value})
    config = Config(**found, **network)
    return config._replace(requests_per_minute=requests_a_minute(config),
                           concurrency=requests_at_once(config)), sources


def asked_for(flags: Json, environs: Mapping[str, Mapping[str, str]], entries: Entries,
              saved: SavedProviders) -> Tuple[Json, Json]:
    """The fields that are set, each by the strongest of flags, environment, file and
    what was saved of the provider, and where they came from.  Keys stay with their
    server: what was saved at its own; a variable's at the provider's, unless the user
    names another now."""
    found: Json = {}
    sources: Json = {}
    for setting in SETTINGS:
        row = PROVIDERS[found.get("provider", saved.active or "nvidia")]
        if setting.key.startswith("nvidia.") and row.name != "nvidia":
            continue
        kept = saved.entries.get(row.name, {})
        server, place = kept.get(("upstream", "base_url"), ("", ""))
        server = str(server or row.base_url)
        variable, key = setting.variable, tuple(setting.key.split("."))
        if setting.key == "upstream.api_key":
            variable = row.key_variable
        if setting.field == "api_key" and (KEPT_KEY in entries or not own_server(
                server, row) and sources.get("base_url") == place):
            variable = ""
        flag = "model" if setting.field == "default_model" else setting.field
        value, where = entries.get(key, (None, ""))
        layers = [(flags.get(setting.field), "--" + flag.replace("_", "-")),
                  *((environ.get(variable), f"{name} {variable}")
                    for name, environ in environs.items()),
                  (value, f"{where}: {setting.key}")]
        saved_one = kept.get(key, (None, ""))
        if setting.field in TIERS and ("default_model" in found
                                       or saved_one[0] == getattr(row, setting.field)):
            saved_one = None, ""        # one for all tiers, or nobody's choice
        if same_server(found.get("base_url", server), server):
            layers.append(saved_one)
        for raw, source in layers:
            if raw not in (None, "") and setting.field not in found:
                found[setting.field] = convert(setting.kind, raw, source)
                sources[setting.field] = source
    return found, sources


def same_server(url: str, other: str) -> bool:
    """Whether a key for one URL may go to the other: not to another port, where
    another program may be, and not without the TLS that it was saved with."""
    try:
        one, two = ((place.scheme, place.hostname, place.port or PORTS_OF.get(
            place.scheme)) for place in map(urlsplit, (url, other)))
    except ValueError:                      # no port, or brackets: no URL
        return False
    return one == two


PORTS_OF = {"http": 80, "https": 443}


def own_server(url: str, row: Provider) -> bool:
    """Whether a URL is of one of a provider's own servers, where a key is needed."""
    return bool(row.key_variable) and any(
        same_server(url, each) for each in (row.base_url, *row.other_urls))


def led_away(base: Config, sources: Json, config: Config) -> List[str]:
    """The fields in which a stranger's files have changed what they may not: `config`
    is with them, `base` and its sources without.  Keys and models belong to the server
    that they stand beside."""
    row = PROVIDERS[base.provider]
    hosted = own_server(base.base_url, row)
    same = config.provider == base.provider and (config.base_url == base.base_url or (
        "base_url" not in sources and same_server(config.base_url, base.base_url)))
    words = {ALIASES: "own", FALLBACKS: "own",
             **{setting.field: setting.found for setting in SETTINGS}}
    fine = {"free": True, "own": same}
    return [name for name, value in config._asdict().items()
            if value != getattr(base, name) and not (
                fine.get(words.get(name, "yes"))
                and (name != "api_key" or hosted and name not in sources))]


def preset_models(found: Json, sources: Json, row: Provider, more: bool) -> None:
    """Fill in the models: one that was asked for serves every tier not set itself, and
    where none was, the provider's own, with its fallbacks if there may be `more`."""
    asked = found.get("default_model")
    for tier in TIERS:
        if tier not in found:
            found[tier] = asked or getattr(row, tier)
            sources[tier] = sources.get("default_model", "provider's default")
            if more and row.fallbacks and not asked:
                found[FALLBACKS][tier] = row.fallbacks
                sources[FALLBACKS] = sources[tier]
    found.setdefault("default_model", found["sonnet"])


def model_aliases(entries: Entries, environ: Mapping[str, str]) -> Dict[str, str]:
    """Aliases from the file, then from MODEL_ALIAS_X__Y_Z=model (x/y-z)."""
    aliases = {}
    for path, (value, where) in entries.items():
        if path[0] == ALIASES and len(path) == 2:
            aliases[path[1]] = convert("text", value, f"{where}: {path[1]}")
    for variable, value in environ.items():
        if variable.startswith("MODEL_ALIAS_") and value:
            name = variable[len("MODEL_ALIAS_"):].lower()
            aliases[name.replace("__", "/").replace("_", "-")] = value
    return aliases


def model_fallbacks(entries: Entries) -> Dict[str, Tuple[str, ...]]:
    """What to ask instead, by model or tier: one id, or a list of them."""
    fallbacks = {}
    for path, (value, where) in entries.items():
        if path[0] == FALLBACKS and len(path) == 2 and value:
            source = f"{where}: {FALLBACKS}.{path[1]}"
            if path[1] not in TIERS and close_words(path[1], TIERS, 1, 0.75):
                raise ProxyError(400, f"{source}: expected a model or a tier"
                                      f"{nearest(path[1], TIERS)}")
            ids = value if isinstance(value, list) else [value]
            fallbacks[path[1]] = tuple(convert("text", name, source) for name in ids)
    return fallbacks


CA_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
                "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")


def network_settings(environ: Mapping[str, str]) -> Json:
    """Proxies and certificate authorities.  Lower case wins, as with curl.

    HTTP_PROXY in upper case is a client's header under CGI (httpoxy): not then.
    """
    def pick(*names: str) -> str:
        return next((environ[name] for name in names if environ.get(name)), "")

    every = ("all_proxy", "ALL_PROXY")
    upper = () if environ.get("REQUEST_METHOD") else ("HTTP_PROXY",)
    return {
        "http_proxy": pick("http_proxy", *upper, *every),
        "https_proxy": pick("https_proxy", "HTTPS_PROXY", *every),
        "no_proxy": pick("no_proxy", "NO_PROXY"),
        "ca_files": tuple((name, path) for name in CA_VARIABLES if environ.get(name)
                          for path in ca_paths(name, environ[name])),
    }


def ca_paths(variable: str, value: str) -> List[str]:
    """The paths in a variable's value; OpenSSL takes several folders in one."""
    if variable != "SSL_CERT_DIR":
        return [value]
    return [path for path in value.split(":") if path]


def file_entries(file: File, environ: Mapping[str, str],
                 flags: Json) -> Tuple[Entries, Json]:
    """The file's settings by path, ${VAR} expanded, every key known; and the flags
    that are left, for an OpenClaw file has providers of its own."""
    entries, tree = raw_entries(file)
    if tree:
        entries = openclaw_entries(tree, environ, flags.get("provider") or "")
        return entries, {**flags, "provider": None}
    return own_entries({path: entry for path, entry in entries.items()
                        if path not in file.left_out}, environ), flags


def raw_entries(file: File) -> Tuple[Entries, Optional[Node]]:
    """What stands in a file, as it stands there; and its tree, if it is OpenClaw's."""
    if not is_json5(file):
        return yaml_entries(file), None
    tree = json5_tree(file)
    if not isinstance(tree.value, dict):
        raise ProxyError(400, f"{tree.where}: expected a map of settings")
    return json_entries(tree), tree if openclaw_section(tree) else None


def own_entries(entries: Entries, environ: Mapping[str, str]) -> Entries:
    known = [*filter(None, (setting.key for setting in SETTINGS)), ALIASES, FALLBACKS]
    for path, (value, where) in entries.items():
        key, free = ".".join(path), path[0] in (ALIASES, FALLBACKS)
        if free and len(path) != 2 and value is not None:
            raise ProxyError(400, f"{where}: {path[0]}: expected a map of names")
        if not free and key not in known:
            section = any(name.startswith(key + ".") for name in known)
            if section and value is None:
                continue
            found = json_kind(value) if section else f"{key!r}"
            raise ProxyError(400, f"{where}: expected a known key, found "
                                  f"{found}{nearest(key, known)}")
        if isinstance(value, str):
            entries[path] = expanded(value, environ, where), where
        if isinstance(value, list):
            entries[path] = [expanded(item, environ, where) if isinstance(item, str)
                             else item for item in value], where
    return entries


def model_facts(config: Config, name: str) -> Model:
    """What is known of a model: the file's words, what they leave open from the
    catalog."""
    known, told = known_model(name), config.models.get(name)
    if told is None:
        return known
    window, output = told.window or known.window, told.output or known.output
    return told._replace(window=window, output=min(output, window),
                         sure=told.window > 0 or known.sure, capped=told.output > 0)


def told_window(config: Config, name: str) -> int:
    """The window that the settings give a model, tokens; 0 if they do not."""
    told = config.models.get(name)
    return config.context_window or (told.window if told else 0)


def upstream_model(config: Config, asked: str) -> str:
    """The upstream's id for the model that the client asked for.

    An alias; a tier of Claude's; `nvidia/`, or OpenClaw's name of the provider, off
    where an id remains; else as it is.  `anthropic/` and `[1m]` are the client's own
    decoration.
    """
    if asked in config.model_aliases:
        return config.model_aliases[asked]
    name = re.sub(r"\[1m\]$", "", asked, flags=re.I)
    name = name[len("anthropic/"):] if name.startswith("anthropic/") else name
    if name in config.model_aliases:
        return config.model_aliases[name]
    if name in config.models:
        return name
    if name.startswith("claude") or name in TIERS:
        tier = next((tier for tier in TIERS if tier in name), "default_model")
        return getattr(config, tier)
    if config.prefix and name:
        name = openclaw_id(config.prefix, config.models, name)
    if name not in config.models and re.match(r"nvidia/.+/", name):
        return name[len("nvidia/"):]
    return name or config.default_model


def own_models(config: Config) -> List[str]:
    """The default, those of the tiers, and the file's, each once."""
    tiers = (getattr(config, tier) for tier in TIERS)
    return list(dict.fromkeys([config.default_model, *tiers, *config.models]))


def upstream_place(config: Config) -> str:
    return "built in" if config.default_model == DEMO_MODEL else config.base_url


def speaks_messages(config: Config) -> bool:
    """Whether upstream speaks the client's own language, so that nothing is translated;
    the built-in model does not."""
    return config.api == APIS[1] and config.default_model != DEMO_MODEL


def is_anthropic(config: Config) -> bool:
    """Whether upstream is Anthropic itself, not one that only speaks its language."""
    return urlsplit(config.base_url).hostname == "api.anthropic.com"


def upstream_api(config: Config) -> Provider:
    """Whose API answers: by the host, where that is known, else as configured."""
    return provider_at(config.base_url) or PROVIDERS[config.provider]


def host_row(config: Config) -> Provider:
    """The row of the host that is asked; one without limits if it is not known."""
    return provider_at(config.base_url) or PROVIDERS["custom"]


def requests_a_minute(config: Config) -> int:
    """The most requests a minute, as set or as the host takes them; 0: any number."""
    asked = config.requests_per_minute
    return host_row(config).per_minute if asked is None else asked


def requests_at_once(config: Config) -> int:
    """The most requests at once, likewise."""
    asked = config.concurrency
    return host_row(config).at_once if asked is None else asked


def fallbacks_of(config: Config, asked: str, model: str) -> Tuple[str, ...]:
    """What to ask in turn when upstream's `model`, which the client called `asked`,
    cannot answer: its own row, or that of a tier that it is.  A row may name tiers
    and aliases."""
    claude = re.match(rf"(anthropic/)?(claude.*)?({'|'.join(TIERS)})", asked)
    tiers = [claude[3]] if claude else [
        tier for tier in TIERS if getattr(config, tier) == model]
    rows = (config.fallbacks.get(name, ()) for name in (model, asked, *tiers))
    names = [upstream_model(config, name) for name in next(filter(None, rows), ())]
    return tuple(name for name in dict.fromkeys(names) if name != model)


def upstream_label(config: Config) -> str:
    """Who answers, for messages: the provider, or the host that took its place."""
    row = PROVIDERS[config.provider]
    own = urlsplit(row.base_url).netloc == urlsplit(config.base_url).netloc
    return row.label if own else urlsplit(config.base_url).netloc


def missing_key(config: Config) -> str:
    """What to say when the provider's own host needs a key and there is none."""
    row = PROVIDERS[config.provider]
    own = provider_at(config.base_url) is row
    if config.api_key or not row.key_variable or not own:
        return ""
    return (f"no API key for {row.label}: get one at {row.key_page} and set "
            f"{row.key_variable}, or run `setup`; `demo` and `code --demo` need none")


# ---- 9. Documents: text from PDF ---------------------------------------------
# A PDF's words, for models that read text alone: no images, no tables, no repairs.
# A file is hostile until read: all work on it is paid for from one budget, and what
# is malformed ends a font, a form or a page, not the answer.  ISO 32000-1.

MAX_PDF_PAGES = 100             # as many as Anthropic reads
MAX_PDF_CHARS = 400 * 1000      # of the result: 100,000 tokens, most of a window
MAX_PDF_OBJECTS = 100 * 1000    # of a file; samples have 10 to 300 a page
MAX_PDF_STREAM_BYTES = 8 << 20  # one object or stream; pages have 5 to 350 kB
MAX_PDF_BASE85_BYTES = 1 << 20  # the same: Python takes 0.1 s to undo as much
MAX_PDF_STRING_BYTES = 32767    # one string that is shown; annex C sets this limit
MAX_PDF_TARGET_BYTES = 64       # what one code stands for, in UTF-16; "ffi" has 6
MAX_PDF_OPERANDS = 200 * 1000   # before one operator: 3 for each of 65,536 widths
MAX_PDF_NESTING = 64            # of lists and tables, and of q; annex C has 28 q
MAX_PDF_FORM_DEPTH = 3          # of forms drawn in forms; MuPDF needs 2
MAX_PDF_STEPS = 1 << 20         # of work, 1 to 2 us each; a manual has 4000 a page
BYTES_PER_STEP = 32             # unpacked or looked through
STEPS_PER_OBJECT = 64           # for a look at an object or a font, however small

GAP_EM = 0.19       # to the right: a space; TeX's narrowest has 0.2, its kerns 0.1
LINE_EM = 0.5       # up or down: another line; an exponent is raised by 0.4
PARAGRAPH_EM = 2.0  # up or down: a blank line too; lines are 1.0 to 1.8 apart

MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
             zlib.error)        # what a value of the wrong kind or size leads to
Table = Dict[str, Any]          # a dictionary of the file; its keys lead with "/"
Matrix = Tuple[float, ...]      # six: x, y lead to a x + c y + e, b x + d y + f
Span = Tuple[str, float, float, float, float, float]    # text; x and y on the page of
                                # its start and of its end; size of the font there


class Ref(NamedTuple):
    number: float           # 12 for `12 0 R`; the 0 does not matter


class Place(NamedTuple):
    source: bytes           # the file, or what an object stream holds
    start: int              # of the object's text
    end: int                # of its text, and start of its stream
    stop: int               # of its stream


class Font(NamedTuple):
    size: int               # of a code, in bytes: 1 or 2
    texts: Dict[int, str]   # what a code stands for
    widths: Dict[int, float]    # of a code, in thousandths of an em


class Pdf(NamedTuple):
    objects: Dict[Ref, Place]
    fonts: Dict[Ref, Font]  # those met so far
    left: List[int]         # of MAX_PDF_STEPS: a list of one
    drawn: List[str]        # forms that are being drawn, from outside in


def pdf_text(data: bytes, left: Optional[List[int]] = None) -> str:
    """The text of a PDF, each page led by a line `[page N]`; "" if there is none.

    `left` is what is left of MAX_PDF_STEPS, if several documents share them.

    There is none in scans, in what is encrypted, and in what is no PDF.  Where a
    limit cuts, the last lines say so.  Never raises.
    """
    if b"%PDF-" not in data[:1024] or ENCRYPTED.search(data):
        return ""
    pdf = Pdf({}, {}, [MAX_PDF_STEPS] if left is None else left, [])
    find_objects(pdf, data)
    pages, count = pdf_pages(pdf, data)
    texts: List[str] = []
    room = MAX_PDF_CHARS
    for table, resources in pages:
        if room > 0 and pdf.left[0] > 0:
            texts.append(page_text(pdf, table, resources, room))
            room -= len(texts[-1])
    if not any(texts):
        return ""
    parts = [f"[page {n}]\n{text}".rstrip() for n, text in enumerate(texts, 1)]
    if room <= 0 or pdf.left[0] <= 0:
        parts.append(f"[page {len(texts)} is cut: the document is too large]")
    if count > len(texts):
        parts.append(f"[pages left out: {count - len(texts)}]")
    return "\n\n".join(parts)


# ---- objects

ENCRYPTED = re.compile(rb"/Encrypt[\0\s]{0,8}[<\d]")
OBJECT = re.compile(rb"(?<!\d)(\d{1,9})[\0\s]{1,8}\d{1,5}[\0\s]{1,8}obj")
OBJECT_END = re.compile(rb"endobj|>>[\0\s]{0,8}(stream) ?\r?\n")


def find_objects(pdf: Pdf, data: bytes) -> None:
    """Fill `pdf.objects` from the file, end to end; the last of a number counts.

    The file's own index is not looked at: after a cut or an edit it is wrong.
    """
    at, count = 0, 0
    while count < MAX_PDF_OBJECTS:
        head = OBJECT.search(data, at)
        if not head:
            return
        tail = OBJECT_END.search(data, head.end())
        end = at = tail.end() if tail else len(data)
        if tail and tail[1]:
            stop = data.find(b"endstream", end)
            at = stop if stop >= 0 else len(data)
        ref, count = Ref(int(head[1])), count + 1
        pdf.objects[ref] = Place(data, head.end(), end, at)
        if at > end and data.find(b"/ObjStm", head.end(), end) >= 0:
            packed = packed_objects(pdf, ref)
            pdf.objects.update(packed)
            count += len(packed)


def packed_objects(pdf: Pdf, ref: Ref) -> List[Tuple[Ref, Place]]:
    """The objects of an object stream: `number offset` pairs, then their texts."""
    try:
        plain = stream_bytes(pdf, ref)
        first = min(int(resolved(pdf, ref)["/First"]), len(plain))
    except MALFORMED:
        return []
    words = re.findall(rb"\d{1,9}", plain[:first])[:2 * MAX_PDF_OBJECTS]
    starts = [first + int(word) for word in words[1::2]]
    return [(Ref(int(word)), Place(plain, start, end, end)) for word, start, end
            in zip(words[::2], starts, starts[1:] + [len(plain)])]


def stream_bytes(pdf: Pdf, ref: Any) -> bytes:
    """What a stream holds, its filters undone; b"" where that cannot be done."""
    try:
        names = resolved(pdf, resolved(pdf, ref).get("/Filter", []))
        source, _, start, stop = pdf.objects[ref]
        plain = source[start:min(stop, start + MAX_PDF_STREAM_BYTES)]
        for name in names if isinstance(names, list) else [names]:
            spend(pdf, len(plain) // BYTES_PER_STEP)
            plain = FILTERS[name](plain)[:MAX_PDF_STREAM_BYTES]
        spend(pdf, len(plain) // BYTES_PER_STEP)
        return plain
    except MALFORMED:
        return b""


def from_hex(digits: bytes) -> bytes:
    text = b"".join(digits.split(b">")[0].split()).decode("ascii")
    return bytes.fromhex(text + "0" * (len(text) % 2))


FILTERS = {     # deflate without zlib's frame: a wrong checksum should not cost a page
    "/FlateDecode": lambda raw: zlib.decompressobj(-zlib.MAX_WBITS).decompress(
        raw[2:], MAX_PDF_STREAM_BYTES),
    "/ASCII85Decode": lambda raw: base64.a85decode(
        raw[:MAX_PDF_BASE85_BYTES].split(b"~")[0]),
    "/ASCIIHexDecode": from_hex}


def spend(pdf: Pdf, steps: int) -> None:
    """Pay for work; OverflowError, which is MALFORMED, when nothing is left."""
    pdf.left[0] -= steps
    if pdf.left[0] <= 0:
        raise OverflowError


def resolved(pdf: Pdf, value: Any) -> Any:
    """A value, or the one that a reference stands for; None if there is none."""
    if not isinstance(value, Ref):
        return value
    spend(pdf, STEPS_PER_OBJECT)
    source, start, end, _ = pdf.objects.get(value) or Place(b"", 0, 0, 0)
    text = source[start:min(end, start + MAX_PDF_STREAM_BYTES)]
    _, values = next(commands(pdf, text))
    return values[0] if values else None


# ---- values

LEXEME = re.compile(
    rb"[\0\s]*(?:([+-]?(?:\d{1,20}\.?\d{0,40}|\.\d{1,40}))(?![^\0\s()<>\[\]{}/%])"
    rb"|\(([^()\\]*)\)|(\()|<([0-9A-Fa-f\s]*)>"
    rb"|([^\0\s()<>\[\]{}/%]+|/[^\0\s()<>\[\]{}/%]*|<<|>>|\[|\])|%[^\r\n]*|[)<>{}])")
PARENTHESIS = re.compile(rb"\\.|[()]", re.S)
ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|(\r\n|.))", re.S)
ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"f": b"\f",
           b"\n": b"", b"\r": b"", b"\r\n": b""}
IMAGE_END = re.compile(rb"\sEI(?=\s[\s -~]{6}|\s*\Z)")     # with text behind it


def commands(pdf: Pdf, source: bytes) -> Iterator[Tuple[str, List[Any]]]:
    """Each operator of a page or a font's map with the values before it, and at the
    end what has none: lexemes, and the lists, tables and Refs that they make."""
    spend(pdf, len(source) // BYTES_PER_STEP)
    stack: List[List[Any]] = [[]]       # what is open, from outside in
    room = MAX_PDF_OPERANDS
    for value in lexemes(source):
        items, room = stack[-1], room - 1
        if room < 0:
            raise OverflowError
        if value == "%":
            continue        # a comment or a stray bracket: nothing but work
        if not isinstance(value, str) or value[0] == "/":
            items.append(value)
        elif value in ("[", "<<") and len(stack) < MAX_PDF_NESTING:
            stack.append([])
        elif value in ("]", ">>") and len(stack) > 1:
            stack.pop()
            table = zip(items[::2], items[1::2])
            stack[-1].append(items if value == "]" else dict(table))
        elif value == "R" and len(items) > 1 and isinstance(items[-2], float):
            items[-2:] = [Ref(items[-2])]
        elif len(stack) > 1:
            items.append(value)         # true, false, null
        else:
            spend(pdf, MAX_PDF_OPERANDS - room)
            yield value, items
            stack, room = [[]], MAX_PDF_OPERANDS
    spend(pdf, MAX_PDF_OPERANDS - room)
    yield "", stack[0]


def lexemes(source: bytes) -> Iterator[Any]:
    """Numbers as float, strings as bytes; "/names", words and brackets as str, and
    "%" for what says nothing."""
    found = LEXEME.match(source)
    while found:
        at, kind = found.end(), found.lastindex
        if kind == 1:
            yield float(found[1])
        elif kind == 2:
            yield found[2]
        elif kind == 3:
            end = string_end(source, at)
            string = source[at:min(end, at + MAX_PDF_STRING_BYTES)]
            yield ESCAPE.sub(escaped_byte, string)
            at = end + 1
        elif kind == 4:
            yield from_hex(found[4])
        elif kind == 5:
            yield found[5].decode("latin-1")
            if found[5] == b"ID":       # an inline image: bytes of no syntax
                image_end = IMAGE_END.search(source, at)
                at = image_end.end() if image_end else len(source)
        else:
            yield "%"
        found = LEXEME.match(source, at)


def string_end(source: bytes, start: int) -> int:
    """Where the parenthesis closes that opened before `start`, if not too far off."""
    depth = 1
    for mark in PARENTHESIS.finditer(source, start, start + 4 * MAX_PDF_STRING_BYTES):
        depth += {b"(": 1, b")": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.start()
    return len(source)


def escaped_byte(found: Any) -> bytes:
    if found[1]:
        return bytes([int(found[1], 8) & 255])
    return ESCAPED.get(found[2], found[2])


# ---- pages

ROOT = re.compile(rb"/Root[\0\s]{1,8}(\d{1,9})")
PAGE = re.compile(rb"/Type[\0\s]{0,8}/Page(?![A-Za-z])")
TIDY: Dict[int, Any] = {code: None for code in range(32) if code not in (9, 10, 13)}
TIDY.update({0xa0: " ", 0xad: "-", 0xfb00: "ff", 0xfb01: "fi", 0xfb02: "fl",
             0xfb03: "ffi", 0xfb04: "ffl"})


def pdf_pages(pdf: Pdf, data: bytes) -> Tuple[List[Tuple[Table, Any]], int]:
    """The pages to read, each with its resources, and how many there are in all."""
    every = [ref for ref, place in pdf.objects.items()
             if PAGE.search(place.source, place.start, place.end)]
    root = ROOT.match(data, max(0, data.rfind(b"/Root")))
    try:
        pages = tree_pages(pdf, [resolved(pdf, Ref(int(root[1])))["/Pages"]])
    except MALFORMED:
        pages = []
    return pages or tree_pages(pdf, every), len(every)


def tree_pages(pdf: Pdf, roots: List[Any]) -> List[Tuple[Table, Any]]:
    """The pages under some nodes, with the resources that they inherit."""
    pages: List[Tuple[Table, Any]] = []
    waiting, seen = [(root, None) for root in reversed(roots)], set()
    while waiting and len(pages) < MAX_PDF_PAGES:
        ref, resources = waiting.pop()
        if not isinstance(ref, Ref) or ref in seen:
            continue
        seen.add(ref)
        try:
            node = resolved(pdf, ref)
            resources = node.get("/Resources", resources)
            kids = resolved(pdf, node.get("/Kids", []))
            waiting.extend([(kid, resources) for kid in reversed(kids)])
        except MALFORMED:
            continue
        if "/Kids" not in node:
            pages.append((node, resources))
    return pages


def page_text(pdf: Pdf, table: Table, resources: Any, most: int) -> str:
    """A page's lines, at most `most` characters, as far as it is well-formed."""
    pieces: List[str] = []
    room = most
    try:
        parts = resolved(pdf, table["/Contents"])
        parts = parts if isinstance(parts, list) else [table["/Contents"]]
        source = b"\n".join([stream_bytes(pdf, part) for part in parts])
        for piece in laid_out(spans(pdf, source, resolved(pdf, resources), IDENTITY)):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                break
    except MALFORMED:
        pass        # what came before counts
    lines = [line.rstrip() for line in "".join(pieces).translate(TIDY).splitlines()]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip("\n")[:most]


def laid_out(shown: Iterable[Span]) -> Iterator[str]:
    """The texts, and between them the blanks that only their places tell of."""
    last, last_x, last_y, last_em = "", 0.0, 0.0, 0.0
    for text, x, y, end_x, end_y, em in shown:
        right, up, most = x - last_x, abs(y - last_y), max(em, last_em)
        if up > LINE_EM * most:
            yield "\n\n" if up > PARAGRAPH_EM * most else "\n"
        elif last[-1:] not in ("", " ") and text[0] != " ":
            yield "" if -most < right < GAP_EM * most else " "
        yield text
        last, last_x, last_y, last_em = text, end_x, end_y, em


# ---- operators

IDENTITY: Matrix = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)


def spans(pdf: Pdf, source: bytes, resources: Any, base: Matrix) -> Iterator[Span]:
    """What a page or a form shows, in its own order; `base` leads to the page."""
    line = text = IDENTITY      # where the line starts, and where the next glyph goes
    font, size, leading = PLAIN, 1.0, 0.0
    fonts = dict(resolved(pdf, resources.get("/Font")) or {}) if resources else {}
    saved: List[Any] = []
    for word, operands in commands(pdf, source):
        if word == "q" and len(saved) < MAX_PDF_NESTING:
            saved.append((base, font, size, leading))
        elif word == "Q" and saved:
            base, font, size, leading = saved.pop()
        elif word == "cm":
            base = product(operands, base)
        elif word == "Do":
            yield from form_spans(pdf, operands[0], resources, base)
        elif word == "Tf":
            name, size = operands
            font = fonts[name] = pdf_font(pdf, fonts.get(name))
        elif word == "TL":
            leading = operands[0]
        elif word in ("BT", "Tm"):
            line = text = tuple(operands) if word == "Tm" else IDENTITY
        elif word in ("Td", "TD"):
            leading = -operands[1] if word == "TD" else leading
            line = text = shifted(line, operands[0], operands[1])
        elif word in ("T*", "'", '"'):
            line = text = shifted(line, 0.0, -leading)
        shown = operands[-1:] if word in ("Tj", "TJ", "'", '"') else []
        for item in shown[0] if word == "TJ" else shown:
            string, width = decoded(font, item)
            start, text = text, shifted(text, width * size, 0.0)
            if string:
                here, there = product(start, base), product(text, base)
                em = abs(size) * (abs(here[2]) + abs(here[3]))
                yield (string, *here[4:], *there[4:], em)


def form_spans(pdf: Pdf, name: str, resources: Any, base: Matrix) -> Iterator[Span]:
    """What a form shows; nothing if it is an image, or too deep in other forms."""
    pdf.drawn.append(name)
    try:
        ref = resolved(pdf, resources["/XObject"])[name]
        form = resolved(pdf, ref)
        if form["/Subtype"] == "/Form" and len(pdf.drawn) <= MAX_PDF_FORM_DEPTH:
            own = resolved(pdf, form.get("/Resources", resources))
            base = product(resolved(pdf, form.get("/Matrix", IDENTITY)), base)
            yield from spans(pdf, stream_bytes(pdf, ref), own, base)
    except MALFORMED:
        return
    finally:
        pdf.drawn.pop()


def shifted(matrix: Matrix, x: float, y: float) -> Matrix:
    return product((1.0, 0.0, 0.0, 1.0, x, y), matrix)


def product(first: Iterable[float], then: Matrix) -> Matrix:
    a, b, c, d, e, f = first
    g, h, i, j, k, m = then
    return (a * g + b * i, a * h + b * j, c * g + d * i, c * h + d * j,
            e * g + f * i + k, e * h + f * j + m)


def decoded(font: Font, item: Any) -> Tuple[str, float]:
    """A string's text, and how many em it or a number in TJ takes the pen."""
    if isinstance(item, float):
        return "", -item / 1000
    codes: Iterable[int] = item[:MAX_PDF_STRING_BYTES]
    if font.size == 2:
        codes = [high << 8 | low for high, low in zip(item[::2], item[1::2])]
    usual = 500.0 * font.size       # Latin letters are half as wide as Chinese ones
    return ("".join([font.texts.get(code, "") for code in codes]),
            sum([font.widths.get(code, usual) for code in codes]) / 1000)


# ---- fonts

WINANSI = {code: bytes([code]).decode("cp1252", "ignore") for code in range(32, 256)}
PLAIN = Font(1, WINANSI, {})
GLYPHS = dict(zip(      # the rest is called what it is, or is at its usual place
    "space exclam quotedbl numbersign dollar percent ampersand quotesingle parenleft "
    "parenright asterisk plus comma hyphen period slash zero one two three four five "
    "six seven eight nine colon semicolon less equal greater question at bracketleft "
    "backslash bracketright underscore braceleft bar braceright quoteleft quoteright "
    "quotedblleft quotedblright endash emdash bullet ellipsis minus germandbls ff fi "
    "fl ffi ffl".split(),
    " !\"#$%&'()*+,-./0123456789:;<=>?@[\\]_{|}\u2018\u2019\u201c\u201d\u2013\u2014"
    "\u2022\u2026\u2212\xdf\ufb00\ufb01\ufb02\ufb03\ufb04"))


def pdf_font(pdf: Pdf, value: Any) -> Font:
    """How to read a font's strings; PLAIN where the file does not tell."""
    font = pdf.fonts.get(value) if isinstance(value, Ref) else value
    if isinstance(font, Font):
        return font
    try:
        spend(pdf, STEPS_PER_OBJECT)
        font = read_font(pdf, resolved(pdf, value))
    except MALFORMED:
        font = PLAIN
    if isinstance(value, Ref):
        pdf.fonts[value] = font
    return font


def read_font(pdf: Pdf, table: Table) -> Font:
    source = stream_bytes(pdf, table["/ToUnicode"]) if "/ToUnicode" in table else b""
    size, texts = unicode_map(pdf, source)
    if table.get("/Subtype") == "/Type0":
        inner = resolved(pdf, resolved(pdf, table["/DescendantFonts"])[0])
        return Font(size, texts, wide_widths(pdf, resolved(pdf, inner.get("/W", []))))
    encoding = resolved(pdf, table.get("/Encoding"))
    widths = resolved(pdf, table.get("/Widths", []))
    return Font(1, {**simple_texts(pdf, encoding), **texts},
                dict(enumerate(widths, int(table.get("/FirstChar", 0)))))


def wide_widths(pdf: Pdf, items: List[Any]) -> Dict[int, float]:
    """Widths of codes, from rows of two kinds: `first [w w ...]`, `first last w`."""
    widths: Dict[int, float] = {}
    at = 0
    while at + 1 < len(items):
        first, last = int(items[at]), items[at + 1]
        if isinstance(last, list):
            widths.update(enumerate(last, first))
            at += 2
        else:
            spend(pdf, max(0, int(last) - first + 1))
            widths.update(dict.fromkeys(range(first, int(last) + 1), items[at + 2]))
            at += 3
    return widths


def simple_texts(pdf: Pdf, encoding: Any) -> Dict[int, str]:
    """What bytes stand for; a glyph of an unknown name is what WinAnsi has there."""
    names = [encoding]
    if isinstance(encoding, dict):
        differences = resolved(pdf, encoding.get("/Differences", []))
        names = [encoding.get("/BaseEncoding"), *differences]
    codec = "mac_roman" if names[0] == "/MacRomanEncoding" else "cp1252"
    texts = {code: bytes([code]).decode(codec, "ignore") for code in range(32, 256)}
    code = 0
    for item in names[1:]:
        if isinstance(item, float):
            code = int(item)
        else:
            known = item[1:] if len(item) == 2 else texts.get(code, "")
            texts[code] = GLYPHS.get(item[1:], known)
            code += 1
    return texts


def unicode_map(pdf: Pdf, source: bytes) -> Tuple[int, Dict[int, str]]:
    """The size of a code in bytes, and what each stands for: a ToUnicode CMap."""
    size, texts = 2, {}
    for word, operands in commands(pdf, source):
        if word == "endcodespacerange":
            size = min(len(operands[0]), 2)
        elif word == "endbfchar":
            for code, target in zip(operands[::2], operands[1::2]):
                texts.update(range_texts(pdf, code, code, target))
        elif word == "endbfrange":
            for row in zip(operands[::3], operands[1::3], operands[2::3]):
                texts.update(range_texts(pdf, *row))
    return size, texts


def range_texts(pdf: Pdf, low: bytes, high: bytes, target: Any) -> Dict[int, str]:
    """What the codes from `low` to `high` stand for: one each of a list, or a text
    whose last unit counts up."""
    first, last = (int.from_bytes(code[-2:], "big") for code in (low, high))
    spend(pdf, max(0, last + 1 - first))
    codes = range(first, last + 1)
    if isinstance(target, bytes):
        lead, end = target[:-2], int.from_bytes(target[-2:], "big") - first
        target = [lead + (end + code & 0xffff).to_bytes(2, "big") for code in codes]
    return {code: text[:MAX_PDF_TARGET_BYTES].decode("utf-16-be", "ignore")
            for code, text in zip(codes, target)}


# ---- 10. Requests: body to chat ----------------------------------------------
# Pure functions from Anthropic's request body to OpenAI's.  Tolerant in: what is
# not used is not looked at.  Minimal out: only fields that upstreams take.

@contextlib.contextmanager
def not_too_deep() -> Iterator[None]:
    """Refuse what stands deeper in itself than Python can follow: 1000 frames."""
    try:
        yield
    except RecursionError:
        raise ProxyError(400, "JSON nested too deeply") from None


@not_too_deep()
def chat_body(body: Json, model: str, provider: Provider = PROVIDERS["custom"],
              prompt_tokens: int = 0, facts: Optional[Model] = None) -> Json:
    """The chat completion request for a Messages request.

        {"system": s, "messages": [...], "tools": [...], "max_tokens": n}
        -> {"model": m, "messages": [...], "tools": [...], "max_tokens": n}

    `prompt_tokens` (an estimate; 0: unknown) keeps max_tokens inside the model's
    window; `facts` are the model's if the catalog's are not.  Raises ProxyError(400)
    that names a field of the wrong type.
    """
    if "thread" in body:
        raise thread_error()
    facts = facts or known_model(model)
    family = model_family(model)
    thinks = facts.thinks is not False and wants_thinking(body, family)
    switch = reasoning_switch(body, family, provider, thinks)
    around = switch.pop("first", ""), switch.pop("last", "")
    tools = tool_fields(body)
    manner = Manner(provider.replay or family.replay, provider.field, bool(tools),
                    facts.vision)
    chat: Json = {"model": model, "messages": chat_messages(body, manner, around)}
    chat["max_tokens"] = max_tokens(body, facts, family, prompt_tokens)
    for name in ("temperature", "top_p", "top_k"):
        if typed(body, name, (int, float), "a number") is not None:
            chat[name] = body[name]
    stops = stop_sequences(body)[:MAX_UPSTREAM_STOPS]
    if stops:
        chat["stop"] = stops
    chat.update(tools)
    chat.update(response_format(body))
    if body.get("stream"):
        chat["stream"] = True
        chat["stream_options"] = {"include_usage": True}
    chat.update(switch)
    keep_within(chat, limits_of(provider.name, model, thinks))
    return chat


MAX_UPSTREAM_STOPS = 4      # older Dynamo and OpenAI refuse more; Streams minds all
LEAST_THINKING_TOKENS = 2048    # a model that cannot but think answers nothing in less
WINDOW_MARGIN_TOKENS = 512      # chat template, and what the estimate is off by
LEAST_OUTPUT_TOKENS = 1024      # an estimate alone never cuts below this


def typed(holder: Json, name: str, kinds: Any, wanted: str, where: str = "") -> Any:
    """`holder[name]`, or None if absent or null; ProxyError(400) for another type."""
    value = holder.get(name)
    if value is None or isinstance(value, kinds) and not (
            isinstance(value, bool) and kinds != bool):
        return value
    raise invalid(where + name, value, wanted)


def thread_error() -> ProxyError:
    """Told so, the SDKs' tool runners resend the whole conversation without threads."""
    error = ProxyError(400, "thread: message threads need a server that keeps "
                            "history; send the whole conversation")
    error.details = {"error_code": "thread_unsupported_request"}
    return error


def max_tokens(body: Json, facts: Model, family: Family, prompt_tokens: int) -> int:
    """The client's max_tokens as far as the model's window and output allow."""
    wanted = typed(body, "max_tokens", int, "a whole number of tokens")
    if wanted is not None and wanted < 1:
        raise ProxyError(400, f"max_tokens: expected at least 1, found {wanted}")
    if family.always_thinks():
        wanted = max(wanted or facts.output, LEAST_THINKING_TOKENS)
    if not facts.sure:
        wanted = wanted or facts.output
        return min(wanted, facts.output) if facts.capped else wanted
    room = facts.window - prompt_tokens - WINDOW_MARGIN_TOKENS
    return min(wanted or facts.output, facts.output, max(room, LEAST_OUTPUT_TOKENS))


def stop_sequences(body: Json) -> List[str]:
    stops = typed(body, "stop_sequences", list, "a list of strings") or []
    for number, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise invalid(f"stop_sequences[{number}]", stop, "a string")
    return list(dict.fromkeys(filter(None, stops)))


def response_format(body: Json) -> Json:
    output = typed(body, "output_config", dict, "an object") or {}
    wanted = output.get("format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return {}
    schema = {"name": "answer", "schema": wanted.get("schema") or {}}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


# ---- thinking

def wants_thinking(body: Json, family: Family) -> bool:
    """Whether thinking is asked for, and goes with what else is.

    DeepSeek and Kimi refuse a forced tool while they think; a summary that is all
    thinking would end Claude Code's turn.
    """
    thinking = typed(body, "thinking", dict, "an object") or {}
    wanted = thinking.get("type") in ("enabled", "adaptive")
    return wanted and not (family.off and forced_tool(body)
                           or asks_for_text_only(body))


def reasoning_switch(body: Json, family: Family, provider: Provider,
                     thinks: bool) -> Json:
    """The fields that turn thinking on, by effort, or off.

    For a family that always thinks off is its least effort.
    """
    always = family.always_thinks()
    switch = family.on if thinks else family.off
    if provider.off and not always and not {"first", "last"} & set(switch) and (
            family.off or provider.everyone):
        switch = provider.on if thinks else provider.off
    efforts = family.efforts and (provider.efforts or family.efforts)
    word = wanted_effort(body) if thinks else next(iter(efforts), "")
    if efforts and word and (thinks or always):
        switch = merged(switch, efforts[effort_word(word, efforts)])
    return dict(switch)


def merged(one: Json, other: Json) -> Json:
    """Both, and both of what is an object in both."""
    both = {**one, **other}
    for name in one:
        if name in other and isinstance(one[name], dict):
            both[name] = {**one[name], **other[name]}
    return both


def wanted_effort(body: Json) -> str:
    """An effort word from output_config.effort or the thinking budget; "" if none."""
    thinking = body.get("thinking") or {}
    effort = (typed(body, "output_config", dict, "an object") or {}).get("effort")
    if effort in EFFORTS:
        return effort
    budget = thinking.get("budget_tokens")
    if not isinstance(budget, int):
        return ""
    return "low" if budget < 4096 else "medium" if budget < 16384 else "high"


def forced_tool(body: Json) -> bool:
    choice = body.get("tool_choice")
    return isinstance(choice, dict) and choice.get("type") in ("any", "tool")


# ---- tools

TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
SERVER_TOOL = re.compile(r"_20\d{6}$")      # web_search_20250305 and its like
TEXT_ONLY = "CRITICAL: Respond with TEXT ONLY"      # how Claude Code asks to compact


def tool_fields(body: Json) -> Json:
    """tools, tool_choice and parallel_tool_calls; nothing if there are no tools."""
    tools = [chat_tool(tool) for tool in client_tools(body)]
    if not tools:
        return {}
    choice = typed(body, "tool_choice", dict, "an object") or {}
    fields = {"tools": tools, "tool_choice": tool_choice(body, choice, tools)}
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def client_tools(body: Json) -> List[Json]:
    """The tools that the client runs itself: the list's, as blocks in the messages then
    add and remove them.  Anthropic's server tools are left out."""
    tools = typed(body, "tools", list, "a list of tools") or []
    known = {tool["name"]: tool for number, tool in enumerate(tools)
             if runs_at_client(tool, f"tools[{number}]")}
    offered, messages = dict(known), typed(body, "messages", list, "a list of messages")
    contents = [message.get("content") for message in messages or []
                if isinstance(message, dict)]
    for block in [block for content in contents if isinstance(content, list)
                  for block in content if isinstance(block, dict)]:
        name, definition = tool_change(block)
        known.update({name: definition} if definition else {})
        if block.get("type") == "tool_addition" and name in known:
            offered[name] = known[name]
        else:
            offered.pop(name, None)
    return list(offered.values())


def runs_at_client(tool: Any, where: str) -> bool:
    """Whether a tool, which is checked, is the client's own."""
    if not isinstance(tool, dict):
        raise invalid(where, tool, "an object")
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "custom" and (
            SERVER_TOOL.search(kind) or "input_schema" not in tool):
        return False
    if not typed(tool, "name", str, "a string", where + "."):
        raise invalid(where + ".name", tool.get("name"), "a name")
    typed(tool, "input_schema", dict, "an object", where + ".")
    return True


TOOL_CHANGES = {"tool_addition": "can be called from here on",
                "tool_removal": "cannot be called any more"}


def tool_change(block: Json) -> Tuple[str, Json]:
    """The name of the tool that a block adds or removes, "" if it is about none, and
    the definition, if it brings one.  ProxyError(400) for what we cannot do, also of a
    kind to come: the client then finds another way."""
    kind = str(block.get("type"))
    new = kind.startswith("tool_") and kind not in NEEDED and "tool" in block
    if kind not in TOOL_CHANGES and not new:
        return "", {}
    tool = typed(block, "tool", dict, "an object", kind + ".") or {}
    shape = tool.get("type") if kind in TOOL_CHANGES else ""
    if shape == "tool_reference" and tool.get("name"):
        return str(tool["name"]), {}
    defined, where = tool.get("definition"), kind + ".tool.definition"
    if shape == "tool_definition" and runs_at_client(defined, where):
        return defined["name"], defined
    raise ProxyError(400, f"{kind}: such a tool cannot yet be defined in a message")


def chat_tool(tool: Json) -> Json:
    schema = {**(tool.get("input_schema") or {})}
    schema.pop("$schema", None)
    schema.setdefault("type", "object")
    schema.setdefault("properties", {})
    function = {
        "name": upstream_name(tool["name"]),
        "description": tool.get("description") or "",
        "parameters": schema,
    }
    return {"type": "function", "function": function}


def tool_choice(body: Json, choice: Json, tools: List[Json]) -> Any:
    kind, name = choice.get("type"), choice.get("name")
    if kind == "none" or asks_for_text_only(body):
        return "none"
    if kind == "tool" and isinstance(name, str):
        name = upstream_name(name)
        if any(tool["function"]["name"] == name for tool in tools):
            return {"type": "function", "function": {"name": name}}
    return {"any": "required", "tool": "required"}.get(str(kind), "auto")


def keep_within(chat: Json, limits: Limits) -> None:
    """Take out of a chat, and rename in it, what its provider would refuse."""
    keep_sampling(chat, limits)
    if not limits.schema:
        chat.pop("response_format", None)
    if limits.ceiling:
        chat["max_tokens"] = min(chat["max_tokens"], limits.ceiling)
    if limits.tokens != "max_tokens":
        chat[limits.tokens] = chat.pop("max_tokens")
    if "tools" in chat:
        choose_within(chat, limits.choices)
    if "tools" in chat and chat.get("stream"):
        chat.update(limits.add)


def keep_sampling(chat: Json, limits: Limits) -> None:
    for name in limits.without:
        chat.pop(name, None)
    if "temperature" in chat:
        chat["temperature"] = max(chat["temperature"], limits.coldest)


def choose_within(chat: Json, choices: str) -> None:
    """Say tool_choice in a form that is taken: a named tool can be the only one."""
    choice = chat.get("tool_choice")
    if not choice or choices == "any" or choices == "words" and isinstance(choice, str):
        return
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        chat["tools"] = [tool for tool in chat["tools"]
                         if tool["function"]["name"] == name]
        choice = "required"
    if choices != "words" and choice == "required":
        choice = "auto"
    if choice == "none" and choices in ("only", ""):
        del chat["tools"], chat["tool_choice"]
        return
    chat["tool_choice"] = choice
    if not choices:
        del chat["tool_choice"]


def asks_for_text_only(body: Json) -> bool:
    messages = typed(body, "messages", list, "a list of messages") or [{}]
    last = messages[-1] if isinstance(messages[-1], dict) else {}
    return any(block["text"].startswith(TEXT_ONLY)
               for block in as_blocks(last.get("content"), "messages[-1].content")
               if isinstance(block.get("text"), str))


def upstream_name(name: str) -> str:
    """A tool name that upstreams take: 64 of A-Z a-z 0-9 _ -, the same every time."""
    return name if TOOL_NAME.fullmatch(name) else short_name(name, 64)


def short_name(name: str, most: int) -> str:
    """A name of so many characters at most, that ends in a sign of the whole one."""
    digest = f"_{zlib.crc32(name.encode('utf-8', 'replace')):08x}"
    return "t_" + re.sub("[^A-Za-z0-9_-]", "_", name)[:most - 11] + digest


def declared_name(name: str, known: Iterable[str]) -> str:
    """The declared tool that a model's spelling means; "" if none or several.

        functions.Read:0, Read<|channel|>json, ReadRead -> Read    web-fetch -> WebFetch
    """
    names = known if isinstance(known, dict) else dict.fromkeys(known)
    plain = plain_name(name)
    twice = plain[:len(plain) // 2] if plain[:len(plain) // 2] * 2 == plain else plain
    same = next((word for word in (name, plain, twice) if word in names), "")
    if not same and re.search(r"_[0-9a-f]{8}\Z", plain):    # shortened on the way
        same = next((known for known in names
                     if short_name(known, len(plain)) == plain), "")
    return same or by_letters(names).get(letters(plain), "")


def plain_name(name: str) -> str:
    """A tool's name without what models and templates leave on it."""
    return re.sub(r"\Afunctions\.|:[0-9]+\Z", "", name.split("<")[0].strip())


def by_letters(names: Iterable[str]) -> Dict[str, str]:
    """Each name under its letters; "" where two have the same."""
    out: Dict[str, str] = {}
    for name in names:
        out[letters(name)] = "" if letters(name) in out else name
    return out


def letters(name: str) -> str:
    return re.sub('[_"-]', "", name).lower()


def declared_tools(body: Json) -> Dict[str, Json]:
    """The tools that may be called, by the names that upstream knows."""
    choice = body.get("tool_choice")
    none = isinstance(choice, dict) and choice.get("type") == "none"
    if none or asks_for_text_only(body):
        return {}
    return {upstream_name(tool["name"]): tool for tool in client_tools(body)}


# ---- messages

Turn = Tuple[str, List[Json]]       # "user" or "assistant", and its blocks


class Manner(NamedTuple):
    """How a model wants a conversation."""
    replay: str = ""        # as in Family
    field: str = ""         # as in Provider
    tools: bool = False     # some are declared
    vision: bool = True     # images can be shown


def chat_messages(body: Json, manner: Manner, around: Tuple[str, str] = ("", "")
                  ) -> List[Json]:
    """One system string, then the turns; each call has its result right behind it."""
    first, last = around
    system = "\n\n".join(filter(None, [first, system_text(body), last]))
    out = [{"role": "system", "content": system}] if system else []
    given: Set[str] = set()             # call ids so far, of the whole conversation
    waiting: Dict[str, str] = {}        # the client's ids of open calls, upstream's
    for role, blocks in turns(body):
        if role == "assistant":
            waiting = call_ids(blocks, given)
            out.append(assistant_message(blocks, waiting, manner))
        else:
            out.extend(user_messages(blocks, waiting, manner.vision))
            waiting = {}
    out.extend(user_messages([], waiting, manner.vision))
    if out and out[-1]["role"] == "assistant":      # a prefill: servers would not go on
        out.append({"role": "user", "content": CONTINUE})
    return out


CONTINUE = "Go on exactly where your last message ends, without repeating it."
NO_RESULT = "[no result: the call was interrupted]"
REMINDER = "<system-reminder>\n%s\n</system-reminder>"
BILLING = "x-anthropic-billing-header:"     # of no use to a model, new every time


def system_text(body: Json) -> str:
    blocks = as_blocks(body.get("system"), "system")
    texts = [block.get("text") or "" for block in blocks]
    return "\n\n".join(text for text in texts if text and not text.startswith(BILLING))


def turns(body: Json) -> List[Turn]:
    """Alternating turns.  What neither user nor assistant says becomes a reminder
    in the user's turn, at its place: some templates refuse later system messages."""
    messages = typed(body, "messages", list, "a list of messages")
    if messages is None:
        raise invalid("messages", None, "a list of messages")
    out: List[Turn] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise invalid(where, message, "an object")
        role = typed(message, "role", str, "a string", where + ".")
        blocks = as_blocks(message.get("content"), where + ".content")
        if role not in ("user", "assistant"):
            texts = "\n".join(filter(None, map(described, blocks)))
            role, blocks = "user", [{"type": "text", "text": REMINDER % texts}]
        if out and out[-1][0] == role:
            out[-1][1].extend(blocks)
        else:
            out.append((role, list(blocks)))
    return out


def as_blocks(content: Any, where: str) -> List[Json]:
    """Content as a list of blocks; a string is one text block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None:
        return []
    if not isinstance(content, list):
        raise invalid(where, content, "a string or a list of blocks")
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise invalid(f"{where}[{number}]", block, "an object")
        if not isinstance(block.get("text"), (str, type(None))):
            raise invalid(f"{where}[{number}].text", block["text"], "a string")
        kind = block.get("type")
        for field in NEEDED.get(kind, ()) if isinstance(kind, str) else ():
            if not block.get(field) or not isinstance(block[field], str):
                missing = f"{where}[{number}].{field}"
                raise invalid(missing, block.get(field), f"the {field} of a {kind}")
    return content


NEEDED = {"tool_use": ("id", "name"), "tool_result": ("tool_use_id",)}


def call_ids(blocks: List[Json], given: Set[str]) -> Dict[str, str]:
    """The turn's call ids, and for upstream one that no earlier turn has used."""
    ids = {}
    for block in blocks:
        if block.get("type") == "tool_use" and block["id"] not in ids:
            fresh, count = block["id"], 1
            while fresh in given:
                count += 1
                fresh = f"{block['id']}_{count}"
            given.add(fresh)
            ids[block["id"]] = fresh
    return ids


def assistant_message(blocks: List[Json], ids: Dict[str, str], manner: Manner) -> Json:
    texts, thoughts = [], []
    calls: Json = {}                    # by id; what repeats one is left out
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            arguments = encode_text(call_input(block))
            function = {"name": upstream_name(block["name"]), "arguments": arguments}
            call = {"id": ids[block["id"]], "type": "function", "function": function}
            calls.setdefault(block["id"], call)
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":
            texts.append(described(block))
    text, thought = "\n".join(filter(None, texts)), "\n".join(filter(None, thoughts))
    if thought and manner.replay == "tags":
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    message: Json = {"role": "assistant", "content": text}
    if (manner.replay == "field" and (thought or calls)
            or manner.replay == "every" and (thought or calls or manner.tools)):
        message[manner.field] = thought
    if calls:
        message["tool_calls"] = list(calls.values())
    elif not text:
        message["content"] = "(no content)"     # an empty turn is refused by some
    return message


def call_input(block: Json) -> Json:
    """A call's input as an object: upstreams refuse any other history.

    Arguments that were not JSON come back from Claude Code under a key of its own.
    """
    value = block.get("input")
    if not isinstance(value, dict) or "__unparsedToolInput" in value:
        return {}
    return value


def user_messages(blocks: List[Json], waiting: Dict[str, str],
                  vision: bool) -> Iterator[Json]:
    """Tool messages in the order of the calls, then what the user says and shows."""
    results: Dict[str, Json] = {}
    rest: List[Json] = []
    for block in blocks:
        call_id = block["tool_use_id"] if block.get("type") == "tool_result" else None
        if call_id in waiting and call_id not in results:
            results[call_id] = block
        else:
            rest.append(block)
    shown: List[Json] = []
    for call_id, upstream_id in waiting.items():
        text, images = result_parts(results.get(call_id), vision)
        yield {"role": "tool", "tool_call_id": upstream_id, "content": text}
        shown += images
    parts = [part for block in shown + rest for part in user_parts(block, vision)]
    if any(part["type"] == "image_url" for part in parts):
        yield {"role": "user", "content": parts}
    elif parts:
        yield {"role": "user", "content": "\n".join(part["text"] for part in parts)}


def result_parts(block: Optional[Json], vision: bool) -> Tuple[str, List[Json]]:
    """A tool result as text, and the images in it: those go into the user's turn."""
    if block is None:
        return NO_RESULT, []
    texts, images = [], []
    for part in as_blocks(block.get("content"), "tool_result.content"):
        if part.get("type") == "image" and vision:
            images.append(part)
            texts.append("[an image: see the next message]")
        else:
            texts.append(described(part))
    text = "\n".join(filter(None, texts))
    return ("Error: " + text if block.get("is_error") else text), images


def user_parts(block: Json, vision: bool) -> Iterator[Json]:
    """A user's block as content parts of a chat message."""
    url = image_url(block) if vision and block.get("type") == "image" else ""
    if url:
        yield {"type": "image_url", "image_url": {"url": url}}
    elif described(block):
        yield {"type": "text", "text": described(block)}


def image_url(block: Json) -> str:
    source = block.get("source")
    if not isinstance(source, dict):
        raise invalid("image.source", source, "an object")
    if source.get("type") == "base64":
        data = typed(source, "data", str, "base64 text", "image.source.")
        return f"data:{source.get('media_type') or 'image/png'};base64,{data or ''}"
    return typed(source, "url", str, "a URL", "image.source.") or ""


def described(block: Json) -> str:
    """Any block as text: its own if it has some, else what it was, in brackets."""
    kind = block.get("type")
    if isinstance(block.get("text"), str):
        return block["text"]
    if kind == "tool_reference":
        return f"Tool {block.get('tool_name')} loaded."
    if str(kind) in TOOL_CHANGES:
        return f"Tool {' '.join(plain_words(block.get('tool')))} {TOOL_CHANGES[kind]}."
    if kind == "document":
        return document_text(block)
    if kind == "image":
        return image_text(block)
    if kind == "tool_result":       # one whose call is gone from the conversation
        return f"[result of an earlier call]\n{result_parts(block, False)[0]}"
    words = " ".join(plain_words(block))[:MAX_REASON_CHARS]
    return f"[{kind or 'block'}{': ' if words else ''}{words}]"


def image_text(block: Json) -> str:
    """What stands in an image's place for a model that cannot see."""
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    data, kind = source.get("data"), source.get("media_type") or "image"
    size = f", {len(data) * 3 // 4} bytes" if isinstance(data, str) else ""
    return f"[image left out: {kind}{size}; this model cannot see images]"


def document_text(block: Json, left: Optional[List[int]] = None) -> str:
    """A document's text; for what is not text an honest word on what was left out."""
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    title = block.get("title") or source.get("media_type") or "document"
    if source.get("type") == "text" and isinstance(source.get("data"), str):
        return f"[{title}]\n{source['data']}"
    if source.get("type") == "content":
        inner = as_blocks(source.get("content"), "document.source.content")
        return f"[{title}]\n" + "\n".join(filter(None, map(described, inner)))
    data = source.get("data")
    data = data if isinstance(data, str) else ""
    words = pdf_text(base64_bytes(data), left) if data.startswith(PDF_BEGINS) else ""
    if words:
        return f"[{title}]\n{words}"
    size = f", {len(data) * 3 // 4} bytes" if data else ""
    why = ("there is too much to read in one request" if left and left[0] <= 0
           else "no text could be read from it")
    return f"[document left out: {title}{size}; {why}]"


PDF_BEGINS = "JVBERi"       # %PDF- in base64


def base64_bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError:
        return b""


@not_too_deep()
def read_documents(body: Json, read: Dict[int, str]) -> None:
    """Put the text of documents in their place.

    `read` are texts by the hash of the data: a client sends a document again and again.
    A text that is cut because others were read before it is none of them.
    """
    waiting: List[Any] = [body.get("messages")]
    left = [MAX_PDF_STEPS]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict) and value.get("type") == "document":
            source = value.get("source")
            data = source.get("data") if isinstance(source, dict) else None
            key = hash((data, str(value.get("title")))) if isinstance(data, str) else 0
            alone = left[0] == MAX_PDF_STEPS
            value["text"] = read.get(key) or document_text(value, left)
            if key and data.startswith(PDF_BEGINS) and (alone or left[0] > 0):
                read[key] = value["text"]
        elif isinstance(value, dict):
            waiting.append(value.get("content"))


WORDY = {"text", "title", "url", "query", "name", "error_code", "input", "content",
         "definition"}


def plain_words(value: Any, key: str = "text") -> Iterator[str]:
    """The strings in a block of unknown kind that a reader may want; no base64."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name in WORDY or key == "input":
                yield from plain_words(item, "input" if name == "input" else name)
    elif isinstance(value, list):
        for item in value:
            yield from plain_words(item, key)
    elif isinstance(value, str):
        yield value


# ---- 11. Token estimate ------------------------------------------------------
# No vocabulary, no download: a formula over kinds of characters, fitted to real
# tokenizers.  `make tokens` measures it.

LOWERCASE = b"abcdefghijklmnopqrstuvwxyz"
NOT_MARKS = LOWERCASE + bytes(range(128, 256))  # what is left: A-Z 0-9 symbols blanks
WORDS = bytes(97 if b in LOWERCASE else 32 for b in range(256))
SYMBOLS = bytes(b if b == 32 or 65 <= b <= 90 else 46 for b in range(256))
RULERS = b"-" * 8, b"=" * 8  # eight of them are one token
WINDOWS, WINDOW = 64, 384  # longer texts: so many evenly spaced windows of characters


def estimate_tokens(text: str) -> int:
    """Return about how many LLM tokens `text` has, without a vocabulary.

    Within 15 % for English, code, JSON and Chinese of 1 KB or more, mostly 40 % else.
    The weights, in tokens per occurrence, are fitted by relative least squares to the
    mean of the Qwen, DeepSeek, Mistral (tekken) and o200k tokenizers, whose counts
    differ by 10 %, in Chinese by 40 %: there they lean to all but tekken (25 % below).
    """
    step = len(text) // WINDOWS
    if step > WINDOW:
        sample = "".join([text[i * step : i * step + WINDOW] for i in range(WINDOWS)])
        return round(estimate_tokens(sample) * len(text) / len(sample))
    raw = b" " + text.encode("utf-8", "surrogatepass")
    left = raw.translate(None, NOT_MARKS)  # a blank, if the text has none
    marks = left.translate(None, b" ")  # capitals, digits, symbols, line ends
    tokens = 0.89 * raw.translate(WORDS).count(b" a")  # words; humps of a camelWord
    tokens += 0.02 * (len(raw) - len(left))  # letters: long words have more tokens
    tokens += 0.37 * (len(marks) - 7 * sum(map(left.count, RULERS)))
    tokens += 0.50 * (len(marks) - len(marks.translate(None, b"0123456789")))
    tokens += 1.10 * left.translate(SYMBOLS).count(b" .")  # not glued to the last word
    tokens += 0.30 * (len(raw) - 1 - len(text))  # UTF-8 beyond one byte a character
    return max(round(tokens), 1 if text else 0)


IMAGE_TOKENS = 1000     # about a megapixel for most vision models
MESSAGE_TOKENS = 4      # role and separators of a chat template
TOOL_TOKENS = 16        # what a template writes around one tool


@not_too_deep()
def count_tokens(body: Json) -> int:
    """The input tokens of a Messages request, estimated within 15 %."""
    texts: List[str] = []
    extra = tally(body.get("system"), texts)
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict):
            extra += MESSAGE_TOKENS + tally(message.get("content"), texts)
    tools = body.get("tools")
    if isinstance(tools, list) and tools:
        texts.append(json.dumps(tools, ensure_ascii=False))
        extra += TOOL_TOKENS * len(tools)
    return max(extra + estimate_tokens("\n".join(texts)), 1)


class Calibration:
    """How far a model's own count is from our estimate: the median of the last."""

    def __init__(self) -> None:
        self.ratios: Any = collections.deque(maxlen=CALIBRATED_OVER)
        self.factor = 1.0

    def learn(self, estimate: int, counted: int) -> None:
        """Note one request's estimate, and what upstream counted for it."""
        if estimate > 0 and LEAST_RATIO < counted / estimate < 1 / LEAST_RATIO:
            self.ratios.append(counted / estimate)
            self.factor = sorted(self.ratios)[len(self.ratios) // 2]


CALIBRATED_OVER = 20    # requests: what a conversation consists of changes slowly
LEAST_RATIO = 0.5       # what is further off was cut or counted otherwise


def tally(content: Any, texts: List[str]) -> int:
    """Collect the content's texts; the tokens of what is not text."""
    if isinstance(content, str):
        texts.append(content)
        return 0
    tokens = 0
    for block in content if isinstance(content, list) else []:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("text", "thinking"):
            texts.append(str(block.get(kind) or ""))
        elif kind == "tool_use":
            texts.append(f"{block.get('name')} {json.dumps(block.get('input'))}")
        elif kind == "tool_result":
            tokens += MESSAGE_TOKENS + tally(block.get("content"), texts)
        elif kind == "image":
            tokens += IMAGE_TOKENS
        elif kind:
            texts.append(described(block))
            texts += [json.dumps(block["tool"])] if "tool" in block else []
    return tokens


# ---- 12. Refusals: upstream's errors to ours ---------------------------------
# Every way in which an upstream says no, as the error that Claude Code and the
# SDKs act on rightly, with upstream's own words and what to do about it.

class Asked(NamedTuple):
    """Whom we asked for what; error texts name it."""
    config: Config
    model: str              # upstream's id
    prompt_tokens: int = 0  # our estimate
    window: int = 0         # the model's; 0: as in the catalog
    sent: bytes = b""       # the client's body: what refusals quote of it is no word


class Refusal(NamedTuple):
    statuses: Tuple[int, ...]       # upstream's; () for any
    pattern: str                    # in upstream's status and words; "" for any
    status: int                     # ours; 0: upstream's, or 502
    advice: str = ""                # may hold {key}, {page}, {model}, {instead}
    again: str = ""                 # row of RETRIES: asking once more may help
    fallback: str = ""              # another model may help, and why
    kind: str = ""                  # Anthropic's error type; "" as the status says


# First row that fits wins.  Claude Code retries 401, 408, 409, 429 and 5xx.
REFUSALS = [
    Refusal((), r"DEGRADED function", 529,
            "The model is down at the provider; wait, or choose another model.", "busy",
            "degraded"),
    Refusal((400, 402, 403, 429), r"(?i)\b1113\b|insufficient balance|arrears|"
            r"exceeded_current_quota|insufficient_quota|credits? (are )?exhausted", 402,
            "The account has no credit left; see {page}."),
    Refusal((400, 401, 403, 429), r"\((111[012]|112[01])\)", 403,
            "The account is closed or locked; see {page}."),
    Refusal((400, 422, 500), r"(?i)tool_use_failed|failed_generation|can't find closing"
            r"|invalid tool call arg|parsing tool call|failed to parse json(?! body)",
            0, "The model wrote a call that the server cannot read.", "broken", "busy"),
    Refusal((), r"jinja template", 400,
            "The chat template of {model} cannot take this; choose another model."),
    Refusal((), r"enable-auto-tool-choice|does not support tools", 400,
            "This host runs {model} without tool calls; choose another model."),
    Refusal((429,), r"(?i)\((1308|1310|1313)\)|\b(hour|dai|day|week|month)\w*\W+(usage "
            r"|token )?(quota|limit)", 429,
            "A quota of hours or days is used up; see {page}.", "", "busy"),
    Refusal((401,), "", 401,
            "The key is missing, wrong or expired: set {key}, from {page}.{elsewhere}"),
    Refusal((402,), "", 402, "See the account's balance at {page}."),
    Refusal((403,), r"(?i)authorization failed|authentication|api.?key|credential|"
            r"invalid token", 403,
            "The provider does not take the key: check {key}, from {page}.{elsewhere}",
            "", "gated", "authentication_error"),
    Refusal((403,), "", 403,
            "The provider does not allow this to the account of {key}: see {page}.", "",
            "gated"),
    Refusal((404,), r"Not found for account", 404,
            "{model} is not open to this account.", "", "gated"),
    Refusal((404,), r"try pulling it", 404, "Get it with: ollama pull {id}", "",
            "gone"),
    Refusal((400, 404, 410), r"^4(04|10) |\(1211\)|Model Not Exist", 404,
            "No model {model} there{instead}.", "", "gone"),
    Refusal((413,), "", 413, "The request is too large for this provider."),
    Refusal((400, 422), "", 400),
    Refusal((429,), "", 429, "The key or model is over its rate: wait a little.",
            "rate", "busy"),
    Refusal((), r"(?i)^5(03|04|29) |overloaded|ResourceExhausted|temporarily unavail",
            529, "The provider is busy; try again.", "busy", "busy"),
    Refusal((408, 500, 502), "", 0, "", "busy", "busy"),
    Refusal((), "", 0),
]

def refusal(asked: Asked, status: int, text: str, pause: float = 0.0) -> ProxyError:
    """The error for the client from upstream's status and words.

    `pause`: the seconds that upstream wants to be left alone, 0.0 if it has not said.
    """
    text = redacted(text[:MAX_ERROR_CHARS], asked.config.api_key)[:MAX_REASON_CHARS]
    own, provider = own_words(text, asked.sent), PROVIDERS[asked.config.provider]
    row = next(row for row in REFUSALS if re.search(row.pattern, f"{status} {own}")
               and (not row.statuses or status in row.statuses))
    advice = row.advice.format(
        key=provider.key_variable or "the key", page=provider.key_page,
        model=repr(asked.model), instead=instead(asked.model), id=asked.model,
        elsewhere=elsewhere(asked.config))
    message = f"{upstream_label(asked.config)} answered {status}: {text}"
    message = f"{message.rstrip('.')}. {advice}" if advice else message
    if row.status in (401, 403):    # Claude Code takes that word for "not logged in"
        message = re.sub("(?i)x-api-key", "API key", message)
    headers = []
    if row.status in (401, 402, 403, 429) and not row.again:
        headers.append(("x-should-retry", "false"))
    if row.status in (429, 529):
        headers.append(("retry-after", retry_after(pause)))
    ours = row.status or (502 if status < 500 else status)
    error = ProxyError(ours, message, row.kind, tuple(headers), row.again)
    error.fallback, error.pause = row.fallback, pause
    if row.again == "broken":
        return error
    found = overflow_figures(own)
    if found is not None:
        error = ProxyError(400, overflow_words(asked, found))
        error.fallback = "window"
    if status in (400, 413, 422, 500, 501):     # some engines say 500 for a template
        error.words, error.said = own, status
    return error


QUOTED_WORDS = 5        # fewer in a row are said by chance, and names of fields are one
MAX_QUOTED_BYTES = 4 << 20      # of a request; a second to go through
PYDANTIC = r"""(?s)(?:['"]input['"]: |input_value=).*?(?=\}, ?\{['"]type['"]|$)"""
BETWEEN = r"(?:[^0-9A-Za-z\\]+|\\+(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[bfnrt])?)+"


def own_words(text: str, sent: bytes) -> str:
    """A refusal without what it quotes of the request, in whatever marks and escapes:
    words in a row that stand there as well, behind a quotation mark or bracket.  All
    of it if hardly a word would be left: then it is the request that quotes."""
    text = re.sub(PYDANTIC, "", text)
    start = re.search(r"(?<!\w)[\"'`]|[\[{=]|\Z", text).start()
    plain = re.sub(BETWEEN, lambda found: " " * len(found[0]), text)
    words = list(re.compile(r"\S+").finditer(plain, start))
    if len(words) < QUOTED_WORDS:
        return text
    said = re.sub(BETWEEN.encode(), b" ", sent[-MAX_QUOTED_BYTES:])
    own, rest = "", 0
    for each in zip(*(words[at:] for at in range(QUOTED_WORDS))):
        if f" {' '.join(word[0] for word in each)} ".encode() in said:
            own += text[rest:each[0].start()]
            rest = each[-1].end()
    own += text[rest:]
    return own if len(re.sub("[^A-Za-z]", "", own)) > 5 else text


def elsewhere(config: Config) -> str:
    """Where else a key may belong: each region, and some plans, have their own."""
    row, host = host_row(config), urlsplit(config.base_url).netloc
    urls = [url for url in (row.base_url, *row.other_urls) if row.key_shape
            and api_at(url) == config.api and urlsplit(url).netloc != host]
    return (f" A key of another region or plan goes with --base-url "
            f"{' or '.join(urls)}" if urls else "")


def overflow_words(asked: Asked, found: Dict[str, int]) -> str:
    """What Claude Code's own patterns look for, in the figures of an overflow."""
    window = (found.get("n") or asked.window
              or model_facts(asked.config, asked.model).window)
    prompt = found.get("p") or window + found.get("over", 0)
    if "o" in found and prompt < window:
        return (f"input length and `max_tokens` exceed context limit: {prompt} + "
                f"{found['o']} > {window}")
    hint = window_hint(asked.config)
    if hint and "n" in found and window < LEAST_WINDOW_TOKENS:
        return (f"a window of {window} tokens is too small for Claude Code, whose "
                f"instructions alone fill it: {hint}")
    prompt = max(prompt, asked.prompt_tokens if "p" not in found else 0, window + 1)
    return f"prompt is too long: {prompt} tokens > {window} maximum"


# A prompt that does not fit: what is too large, and that it is, both in one sentence,
# in any order.
OVERFLOWS = [
    (r"context[ _](length|window|size|limit)|length of the (input|prompt|messages)|"
     r"(input|prompt|sequence|model|message)s? length",
     r"exceed|overflow|maximum|\bmax\b|\blimit|\bonly\b|should be \[|reduce|"
     r"too (long|large|big|small)|(longer|larger|greater|more) than"),
    (r"\b(prompt|context|tokens?|inputs?(?!['\"]:))\b",
     r"exceed|overflow|too (long|large|big|many)|longer than|more than max|must be <=|"
     r"must have less"),
    (r"\((1261|1039)\)|must be at least 1, got -", ""),     # Z.ai's, MiniMax's; NIM's
]
OUTPUT_NAMES = r"\bmax_(\w+_)?tokens\b|\b(completion|output) tokens\b"
OTHERWISE = (r"\bper (second|min|hour|day|month)|\b[rt]p[mhd]\b|quota|\brate|image|"
             r"\b(hour|dai|week|month)ly\b|audio|video|\bfile\b")
FIGURE = re.compile(r"(?<![\w.])(\d{1,3}(?:[,_]\d{3})+|\d{2,9})(?![,.]?\w)")
# What the words around a figure, #, make of it: n window, p prompt, o output asked
# for, over: by how much.  A row is surer than those below it.
TOLD_FIGURES = [
    ("", r"#\W*(characters|bytes|[km]b\b|%)|total[^#]*#|value=-?#"),
    ("over", r"\bby #|got -#"),
    ("o", r"# output|#( tokens)? (in|for) the (completion|output)|#\W+max_|\+ #"),
    ("p", r"#( tokens)?( [>+] |\W+(input|(in|from|of) (the |text )?(input|messages)))"),
    ("n", r"# maximum|[>=] #"),
    ("n", r"((?<!_)\bmax(imum)?\b|allowed|\blimit|context.(length|window|size)|"
          r"model length|\bonly\b|less than|should be).*#"),
    ("o", r"max_\w*tokens.*#"),
    ("p", r"(prompt|input|request|messages|keep|given).*#"),
]
LEAST_WINDOW_TOKENS = 24576     # Claude Code's system prompt and tools take 20,000
LEAST_TOLD = 2048       # tokens of a window; a smaller figure is a code or a time
# A server whose messages are of the user and the assistant alone.
UNKNOWN_ROLE = (r"only user and assistant roles|unknown variant .?system|"
                r"system (role|message)s? (not supported|must be)|"
                r"(unexpected|invalid|invalid message) role\b.{0,3}system|"
                r"\brole\b.*'user' (or|\|) 'assistant'")


def overflow_figures(text: str) -> Optional[Dict[str, int]]:
    """The figures in upstream's words for a prompt that does not fit: p prompt, n
    window, o output, over.  None if the words are about something else."""
    words, left, at = text.lower(), [], 0
    for each in FIGURE.finditer(words):
        around = f"{words[at:each.start()]}#{words[each.end():]}"
        left.append((around, int(re.sub("[,_]", "", each[1]))))
        at = each.end()
    found: Dict[str, int] = {}
    for role, pattern in TOLD_FIGURES:
        taken = [row for row in left if re.search(pattern, row[0], re.S)]
        left = [row for row in left if row not in taken]
        found.update({role: taken[0][1]} if taken and role not in found else {})
    found.pop("", 0)
    if found.get("n", LEAST_TOLD) < LEAST_TOLD:
        del found["n"]
    larger = found.get("p", 0) > found.get("n", 0) > 0
    sizes = sorted(value for _, value in left if value >= LEAST_TOLD)
    if (len(sizes) == 2 - ("n" in found) and not {"p", "over"} & {*found}
            and sizes[-1] > found.get("n", sizes[0])):
        found = {"n": sizes[0], **found, "p": sizes[-1]}
    if not any(re.search(subject, re.sub(OUTPUT_NAMES, "", each))
               and (larger or re.search(claim, each))
               for each in sentences(words) if not re.search(OTHERWISE, each)
               for subject, claim in OVERFLOWS):
        return None
    return found


def sentences(words: str) -> List[str]:
    """The statements of a refusal, and those of a list such as pydantic's."""
    joined = re.sub(r"\n[ \t]+", ": ", words)
    return re.split(r"(?<=[\w)\]'\"`}])[.;!]+(?:\s+|$)|\n|\}, ?\{", joined)


# Servers that load models with a small window, and cut the prompt without a word.
WINDOW_HINTS = {
    "ollama": "start Ollama with a larger one: OLLAMA_CONTEXT_LENGTH=65536 ollama "
              "serve",
    "lmstudio": "load the model with a larger one: lms load MODEL --context-length "
                "65536",
}


def window_hint(config: Config) -> str:
    return WINDOW_HINTS.get(upstream_api(config).name, "")


def empty_answer(asked: Asked) -> ProxyError:
    """The error for a 200 in which nothing was said."""
    error = ProxyError(529, f"{upstream_label(asked.config)} gave an empty answer; try "
                            "again", "", (("retry-after", retry_after(0.0)),), "broken")
    error.fallback = "busy"
    return error


def instead(model: str) -> str:
    """`; use X instead` for a retired id, or the nearest ones of the catalog."""
    if model in SUCCESSORS:
        return f"; use {SUCCESSORS[model]} instead"
    alive = (name for name, row in MODELS.items() if not row.retired and name != model)
    close = close_words(model, alive, 3)
    return f"; nearest known: {', '.join(close)}" if close else ""


def retry_after(pause: float) -> str:
    """Whole seconds as text, 1 to 60: Claude Code gives up at once beyond that."""
    return str(min(max(math.ceil(pause), 1), 60)) if pause else "2"


def retry_seconds(stated: str, now: float) -> float:
    """The seconds that a Retry-After asks for, in either form; 0.0 if it is absent,
    past or senseless.  `now` is seconds since the epoch; RFC 9110, section 10.2.3."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", stated):     # some say fractions
        return float(stated)
    from datetime import timezone
    from email.utils import parsedate_to_datetime
    try:
        date = parsedate_to_datetime(stated).replace(tzinfo=timezone.utc)
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return max(date.timestamp() - now, 0.0)


LEAST_SECRET_CHARS = 8      # shorter ones are words, such as `ollama`, and no secrets
CODES = r"(?:%|\\+u00|\\+x)([0-9A-Fa-f]{2})|&#?\w{1,31};|[\r\n]\s*|"
# How a text may be read: as it is; with its codes for single letters, and on over line
# ends; the same where a backslash may make a line end, and on over tags.
READINGS = [re.compile(codes) for codes in (
    r"(?!)", CODES + r"\\+", CODES + r"\\+[nrt]?|<[^<>]*>")]
MOST_READINGS = 5           # of codes within codes


def redacted(text: str, secret: str) -> str:
    """The text without a secret, in letters of either case, in any code for letters, or
    in base64; where it is found in a code only, that is read in all of the text."""
    if len(secret) < LEAST_SECRET_CHARS:
        return text
    for reading, trace in traces(secret):
        plain, count = trace.subn("***", uncoded(text, reading))
        text = plain if count else text
    return text


@functools.lru_cache(maxsize=64)
def traces(secret: str) -> List[Tuple[re.Pattern, re.Pattern]]:
    """For each reading, what a secret is there, if that leaves enough of it.  In base64
    it is one of three, by the bytes before it; the digits at its ends may hold some of
    its neighbours' bits."""
    digits = []
    for ahead in range(3):
        data = b" " * ahead + secret.encode()
        core = base64.b64encode(data).decode()[-(-ahead * 8 // 6):len(data) * 8 // 6]
        digits.append(core.replace("+", "[+-]").replace("/", "[/_]"))
    words = [uncoded(secret, reading) for reading in READINGS]
    words = [word if len(word) >= LEAST_SECRET_CHARS else secret for word in words]
    return [(reading, re.compile("|".join([f"(?i:{re.escape(word)})", *digits]),
                                 re.ASCII)) for reading, word in zip(READINGS, words)]


def uncoded(text: str, reading: re.Pattern) -> str:
    """A text without its codes, whatever these are written in."""
    import html
    for _ in range(MOST_READINGS):
        text = reading.sub(lambda code: chr(int(code[1], 16)) if code[1] else
                           html.unescape(code[0]) if code[0][0] == "&" else "", text)
    return text


def error_words(raw: bytes, status: int, secret: str = "") -> Tuple[str, int]:
    """An error body's sentence, and the status that it states, else `status`.  What is
    no JSON loses the secret here, for that may go on over a tag or a line end."""
    text, value = raw.decode("utf-8", "replace").strip(), value_in(raw)
    if isinstance(value, dict):
        return sentence(value) or text, stated_status(value, status)
    text = redacted(text[:MAX_ERROR_CHARS], secret)
    text = " ".join(re.sub(r"<[^<>]*>", " ", text).split())
    return text[:500] or "(empty body)", status


def sentence(value: Any, depth: int = 0) -> str:
    """What a parsed error body says, message, detail or title, wherever it is; nothing
    of what is nested too deep."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and depth < 20:
        return "; ".join(filter(None, (sentence(each, depth + 1) for each in value)))
    if not isinstance(value, dict) or depth >= 20:
        return ""
    names = ("msg", "error", "message", "detail", "status_msg", "base_resp", "title")
    said = next((value[name] for name in names if value.get(name)), "")
    code, kind = shaped(value.get("code"), str), shaped(value.get("type"), str)
    code = code or value.get("status_code")
    code = code or (kind if re.search("_quota|^[0-9]{4}$", kind) else "")
    words = sentence(said, depth + 1)
    words += f" ({code})" if words and code else ""
    where = (".".join(map(str, shaped(value.get("loc"), list)))
             or shaped(value.get("param"), str))
    return f"{where}: {words}" if words and where not in words else words


BASE_STATUSES = {               # MiniMax's codes
    "1002": 429, "1004": 401, "1008": 402, "1026": 400, "1027": 400, "1039": 400,
    "1041": 429, "2013": 400, "2049": 401, "2056": 429}


def stated_status(value: Json, status: int) -> int:
    """The HTTP status inside an error body: it may disagree with the answer's own."""
    base = str(shaped(value.get("base_resp"), dict).get("status_code"))
    codes = [BASE_STATUSES.get(base)]
    codes += [holder.get(name) for holder in (shaped(value.get("error"), dict), value)
              for name in ("code", "status", "http_code")]
    return next((code for code in codes
                 if isinstance(code, int) and 400 <= code <= 599), status)


# ---- 13. Arguments: read and fitted ------------------------------------------
# What the text of a finished tool call means, as its tool's schema wants it.  Only
# syntax is completed, never a string, a number or a word; what can be read in two
# ways is not read.  Text and schema are strangers', so all work is bounded.

MAX_DAMAGED_CHARS = 1 << 18     # of a text to repair: 64k tokens of output
MAX_DEPTH = 100     # of schemas, and of values; Python's recursion ends at 1000 frames
MAX_STEPS = 10000   # schemas that meet a value: 0.2 s; unions in unions multiply


class Spelled(float):
    """A fraction that knows how it was written: 3.10 may be a version."""

    def __new__(cls, text: str) -> Spelled:
        number = super().__new__(cls, finite(text))
        number.text = text
        return number


class Raw(str):
    """Text from between two tags: only the schema says whether it is more."""


def one_reading(pairs: List[Tuple[str, Any]]) -> Json:
    """The object of a text; ValueError if it says two things under one name."""
    value = dict(pairs)
    if len(value) < len(pairs) and any(value[name] != inner for name, inner in pairs):
        raise ValueError("a name with two values")
    return value


ARGUMENTS = json.JSONDecoder(parse_float=Spelled, parse_int=integers(),
                             parse_constant=refuse_constant,
                             object_pairs_hook=one_reading)


def read_arguments(text: str, schema: Json,
                   ended: bool = True) -> Tuple[Optional[Json], List[str]]:
    """The arguments that a text means, fitted to the schema, and what that took.

        {'filePath': '/a', 'limit': '3'     text
        {"file_path": "/a", "limit": 3}     ["repaired", "fitted"]

    (None, []) where it is none, or can be read in two ways.  "" and null are {} and no
    repair.  Where the answer has not `ended`, no last bracket is completed.
    """
    text, notes = text.strip(" \t\r\n"), []
    try:
        value = {} if text in ("", "null") else plain_object(text)
        if value is None:
            value, notes = repaired(text, ended), ["repaired"]
        better, _ = fitted(value, Fit(schema, iter(range(MAX_STEPS))), schema)
        if notes or better is not value:
            encode_json(better)         # what is too deep for that is none
    except (ValueError, RecursionError):
        return None, []
    if better is not value and isinstance(better, dict):    # if not, senseless schema
        value, notes = better, [*notes, "fitted"]
    return value, notes


def plain_object(text: str) -> Optional[Json]:
    """The object that a sound text is, None if it is none; ValueError for one that says
    two things, or more than can be right."""
    with contextlib.suppress(json.JSONDecodeError):
        check_items(text)
        value = ARGUMENTS.decode(text)
        return value if isinstance(value, dict) else None
    return None


def repaired(text: str, ended: bool, tries: int = 8) -> Json:
    """The object that a damaged text plainly means; ValueError if it takes a guess."""
    text = re.sub(r"\A(?:```\w*\s*)+", "", text).strip()
    if text in ("", "null", "None"):
        return {}
    if not tries or len(text) > MAX_DAMAGED_CHARS:
        raise ValueError("too much damage")
    strict, end = strict_json(text, 0, ended)
    value = ARGUMENTS.decode(strict)
    if not BEHIND.fullmatch(text, end) and (
            not isinstance(value, dict)
            or repaired(text[end:].lstrip(), ended, tries - 1) != value):
        raise ValueError("words around it")
    if isinstance(value, str):
        return repaired(value.strip(), ended, tries - 1)
    if isinstance(value, list) and len(value) == 1:
        value, = value
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


# What may stand behind an object and means nothing: brackets too many, marks, fences.
BEHIND = re.compile(r"(?:[\s\]}]|```|</\w{1,20}>|<\|\w{1,40}\|>)*")
LOOSE = re.compile(r"""(?s)\s*(?:
      (?P<string>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')
    | (?P<opens>[\[{]) | (?P<closes>[\]}]) | (?P<comma>,) | (?P<colon>:)
    | (?P<word>[A-Za-z_]\w*) | (?P<number>-?[0-9][0-9.eE+-]*)
    | (?P<other>\S|\Z))""", re.X)
JSON_WORDS = {"True": "true", "False": "false", "None": "null"}
VALUES = ("string", "word", "number", "closes")     # tokens that end a value


def strict_json(text: str, at: int, ended: bool) -> Tuple[str, int]:
    """The value that begins at a place, as JSON, and where it ends.

    Known are Python's quotes and words, raw line ends, escapes of no kind, a comma too
    many, brackets too few before a mark, or at the end of a text that has `ended`.
    BrokenOff for what stops elsewhere, ValueError for what is no JSON.
    """
    out: List[str] = []
    missing: List[str] = []
    last = "nothing"
    for token in LOOSE.finditer(text, at):
        kind = token.lastgroup
        word, end = token[kind], token.end()
        if kind == "other":
            end = token.start(kind)
            if missing and word not in ("", "<", "`"):
                raise ValueError("something else within it")
            break
        if last in VALUES and kind in ("string", "word", "number", "opens") or (
                kind == "comma" and last not in VALUES):
            raise ValueError("no JSON")
        if kind == "string":
            word = json_string(word)
        elif kind == "colon" and last == "word":    # a key that lacks its quotes
            out[-1] = f'"{out[-1]}"'
        elif kind == "opens":
            missing.append("]" if word == "[" else "}")
        elif kind == "closes":
            if last == "comma":
                out.pop()
            if not missing or missing.pop() != word:
                raise ValueError("brackets that do not match")
        out.append(JSON_WORDS.get(word, word))
        last = kind
        if not missing:
            return "".join(out), end
    if not (ended or word) or last not in ("string", "closes") or (
            len(missing) > MAX_DEPTH):
        raise BrokenOff("broken off")
    return "".join(out + missing[::-1]), end


class BrokenOff(ValueError):
    """A value that ends where no value can."""


# Paths of Windows: every backslash in them is a separator.
PATHS = re.compile(r"\b[A-Za-z]:(?:\\[\w.()$@~+-]+(?: [\w.()$@~+-]+"
                   r"(?=[\w. ()-]{0,64}\\))*)+")
BACKSLASH = re.compile(r"(?s)\\(u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|.)")
SPECIAL = re.compile(rf'{BACKSLASH.pattern}|["\0-\x1f]')


def json_string(word: str) -> str:
    r"""A string of JSON's or Python's as JSON: "\d" is "\\d", 'a "b"' is "a \"b\"".

    ValueError where backslashes can be read in two ways: one that begins no escape is
    itself only if no other begins one, or if all of them are a path's (C:\new\data).
    """
    python, inside = word[0] == "'", word[1:-1]
    kinds = set(BACKSLASH.findall(inside))
    known = {kind for kind in kinds if len(kind) == 5 or kind in "bfnrt\\"
             or python and len(kind) == 3}
    odd = kinds - known - {'"', "/", "'"}
    literal = odd and "\\" not in PATHS.sub("", inside).replace('\\"', "")
    doubtful = {"'"} & kinds and not python or {kind for kind in odd if len(kind) == 3}
    if not literal and (odd and known or doubtful or PATHS.fullmatch(inside)):
        raise ValueError("backslashes that can be read in two ways")

    def spelled(found: Any) -> str:
        kind = found[1]
        if kind is None:
            return encode_json(found[0])[1:-1]
        if kind in '"/' or kind == "'" and python:
            return {'"': '\\"', "/": "/", "'": "'"}[kind]
        if literal or kind not in known:
            return "\\\\" + encode_json(kind)[1:-1]
        return "\\u00" + kind[1:] if kind[0] == "x" else found[0]
    return f'"{SPECIAL.sub(spelled, inside)}"'


# ---- fitting: a value and a schema in, the value out, and whether it fits

class Fit(NamedTuple):
    root: Any                   # the whole schema: $ref points into it
    steps: Iterator[int]        # one for each schema that meets a value; they run out


def fitted(value: Any, fit: Fit, schema: Any, depth: int = 0) -> Tuple[Any, bool]:
    """The value as the schema wants it, and whether it is; itself if nothing helps."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH or next(fit.steps, -1) < 0 or (
            value is None and schema.get("nullable") is True):
        return value, True
    if isinstance(value, Raw):          # text, unless JSON in it fits as it is
        inside = value_in(value.strip()) if value.strip()[:1] in ("[", "{") else None
        nothing = [None] if value.strip() == "null" else []
        for word in [*([inside] if inside is not None else nothing), str(value)]:
            better, fits = fitted(word, fit, schema, depth + 1)
            if fits and type(better) is type(word):
                break
        return better, fits
    value, fits = as_wanted(value, schema)
    for part in [referred(schema.get("$ref"), fit.root), *listed(schema, "allOf")]:
        value, also = fitted(value, fit, part, depth + 1)
        fits = fits and also
    for branches in filter(None, (listed(schema, "anyOf"), listed(schema, "oneOf"))):
        tries = [better for better, good in (fitted(value, fit, branch, depth + 1)
                                             for branch in branches) if good]
        fits = fits and bool(tries)
        if not any(better is value for better in tries):
            value = (tries or [value])[0]
    if isinstance(value, dict):
        value, also = fitted_object(value, fit, schema, depth + 1)
        fits = fits and also
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        items = [fitted(item, fit, schema["items"], depth + 1) for item in value]
        fits = fits and all(good for _, good in items)
        if any(new is not old for (new, _), old in zip(items, value)):
            value = [new for new, _ in items]
    return value, fits


def listed(schema: Json, key: str) -> list:
    return shaped(schema.get(key), list)


JSON_TYPES = {type(None): ("null",), bool: ("boolean",), int: ("integer", "number"),
              float: ("number",), Spelled: ("number",), str: ("string",),
              Raw: ("string",), list: ("array",), dict: ("object",)}
ALL_TYPES = sum(JSON_TYPES.values(), ())


def as_wanted(value: Any, schema: Json) -> Tuple[Any, bool]:
    """The value as the first of the schema's types that it can be, and as the one of
    its words that it equals but for case."""
    kinds = schema.get("type")
    kinds = [kind for kind in (kinds if isinstance(kinds, list) else [kinds])
             if kind in ALL_TYPES]
    if kinds and not any(kind in kinds for kind in JSON_TYPES[type(value)]):
        can_be = [better for kind in kinds for better in coerced(value, kind)]
        if not can_be:
            return value, False
        value = can_be[0]
    words = [schema["const"]] if "const" in schema else listed(schema, "enum")
    if not words or value in words:
        return value, True
    same = [word for word in words if isinstance(word, str)
            and isinstance(value, str) and word.lower() == value.lower()]
    return (same[0], True) if len(same) == 1 else (value, False)


def coerced(value: Any, kind: str) -> list:
    """The value as another kind, alone in a list, if it plainly means one.

        "True" -> true    "3.0", 3.0 -> 3    "[1]" -> [1]    {"a": 1} -> '{"a": 1}'
    """
    if kind == "string":
        if value is None or isinstance(value, list):    # words, or JSON: who knows
            return []
        return [value.text if isinstance(value, Spelled) else encode_text(value)]
    if kind == "null":
        return [None] if value in ("null", "None") else []
    if isinstance(value, str):
        value = value_in(value.lower() if kind == "boolean" else value)
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    return [value] if kind in JSON_TYPES[type(value)] else []


def fitted_object(value: Json, fit: Fit, schema: Json, depth: int) -> Tuple[Json, bool]:
    """The object with its properties fitted; a null that is optional and unfit goes."""
    declared = shaped(schema.get("properties"), dict)
    required = listed(schema, "required")
    absent = by_letters(name for name in declared if name not in value)
    strange = by_letters(name for name in value if name not in declared)
    out: Json = {}
    fits = same = True
    for name, inner in value.items():
        own = name
        if strange.get(letters(name)) == name:  # {"filePath": 1} -> {"file_path": 1}
            own = absent.get(letters(name)) or name
        if isinstance(inner, str) and own in declared:
            inner = own_quotes(name, inner)
        better, good = fitted(inner, fit, declared.get(own), depth)
        if good or inner is not None or own not in declared or own in required:
            out[own], fits = better, fits and good
        same = same and own == name and out.get(own, out) is value[name]
    fits = fits and all(name in out for name in required if isinstance(name, str))
    return value if same else out, fits


def own_quotes(name: str, text: str) -> str:
    r"""A value without quotes that the model put into JSON's: Gemma's <|"|>, and those
    that are around its name, too: {"\"a\"": "\"b\""}."""
    marks = '<|"|>' if text[:5] == '<|"|>' else name[:1]
    quoted = marks in ('"', '<|"|>') and len(text) >= 2 * len(marks)
    quoted = quoted and text.startswith(marks) and text.endswith(marks)
    return text[len(marks):-len(marks)] if quoted else text


# ---- 14. Mends: chats that are taken after a refusal -------------------------
# What a refusal asks for, as the name of a mend, and the mends: each changes a chat a
# little.  They are written "name" or "name:argument", and so they are remembered.

MOST_LEARNED = 10_000_000   # tokens; nothing that has a limit has a larger one
MAX_MENDS = 4               # different ones for one request, then the refusal is told
UNABLE = r"not (?:be )?(?:support|allow|permit|avail)|n't support|unsupported"
MOST = (r"(?:maximum of|maximum length of|at most|up to|only|exceeds|longer than|limit "
        r"(?:of|is)) ([1-9]\d{0,8})\b(?! ?[km]i?b\b| bytes| pixel)")

# A subject and a claim about it, in one sentence of upstream's words in either order,
# and the mends to try in turn, which may hold \1: the figure that the claim has.  The
# first of a row that fits, and that changes the chat, wins.
MENDS = [
    (r"single tool-calls at once|parallel tool calls", "", "single"),
    (r"enable-auto-tool-choice|n[o']t support (tool|function)s?|"
     r"(?<!parallel )\btool(s|[ -]call\w*| use)? (is|are) not supported", "", "xml"),
    (r"\bmax_tokens\b", r"not supported|use '?max_completion_tokens", "rename"),
    (r"max_(completion_)?tokens|completion tokens|integer above maximum",
     r"(?:\[1, ?|at most |than or equal to |<= ?|\d > )([1-9]\d{1,8})\b", r"most:\1"),
    (r"\bname\b", MOST, r"names:\1"),
    (r"\btools\b", MOST + "(?!.?char)", r"tools:\1"),
    (r"image", MOST, r"images:\1"),
    (r"\bstop\b", MOST, r"stops:\1"),
    (r"a-z, A-Z, 0-9, with a length of 9", "", "ids"),
    (r"reasoning_(?:content|text)", r"must be passed|missing|required", "replay"),
    (r"tool.?choice type|supported string values", "", "choice:words"),
    (r"tool.?choice", r"\b(?:must|only)\b.*auto|requires|support|incompatible|thinking|"
     r"not a(?:vailable|llowed)", "choice:auto"),
    (UNKNOWN_ROLE, "", "fold"),
    (r"no user query found", "", "query"),
    (r"roles? must alternate|expected last role|unexpected role|\b3230\b", "", "turns"),
    (r"^(?!.*\b(?:format|size|scheme|media|image type)).*(?:image|multimodal|vision)",
     UNABLE + "|only text|invalid content type", "blind"),
    (r"content|not a multimodal", r"valid string|(must|should) be a string|multimodal|"
     r"expected a? ?string", "flat blind"),      # strings hold no images
    (r"\b(?:any|one|all)of\b|function.parameters.type|\$ref|\$defs|invalid schema|"
     r"upper\W+to type\W+undefined|exact null branch", "", "schema:plain"),
    ("grammar|json schema|unknown escape|number of repetitions|peg-native", "",
     "schema:bare drop:response_format"),
]
REFUSED = (UNABLE + r"|extra[ _](inputs|fields|forbidden)|unexpected keyword|unknown|"
           r"unrecognized|only allowed|unavailable|ignored|deprecated|cannot|"
           r"\binvalid\b|must be (?!passed)|should be")
# What is told of other fields, or of what one holds.
ASIDE = (r"(?<!not )\b(supported|known|valid|allowed) (field|parameter|argument)s\b.*|"
         r"\b(expected one of|value: ).*| (when|while|if) .*")
NEEDED_FIELDS = {"model", "messages", "stream", "tools", "max_tokens", "content",
                 "role", "name", "max_completion_tokens", "tool_calls", "tool_call_id"}


def mend_for(words: str, chat: Json, tried: List[str]) -> str:
    """The first mend that upstream's words ask for, and that changes the chat: one of
    the table, or to drop the fields that stand in a sentence with a refusal of them."""
    said, wanted = sentences(words), []
    for subject, claim, mend in MENDS:
        for each in said:
            found = re.search(claim, each, re.I)
            if found and re.search(subject, each, re.I):
                wanted += found.expand(mend).split()
    own = [re.sub(ASIDE, "", each, flags=re.I) for each in said]
    own = [each for each in own if re.search(REFUSED, each, re.I)]
    holders = [chat, chat.get("chat_template_kwargs") or {}, *chat["messages"]]
    fields = dict.fromkeys(
        name for holder in holders for name in holder if name not in NEEDED_FIELDS
        and any(re.search(rf"\b{re.escape(name)}\b(?! mode)", each) for each in own))
    for mend in [*wanted, "drop:" + ",".join(fields)]:
        trial = decode_json(encode_json(chat))
        apply_mend(mend, trial)
        if mend not in tried and trial != chat:
            return mend
    return ""


def change_of(mend: str) -> Change:
    """What a mend is; of several fields, what it is for the one whose loss is felt."""
    kind, _, names = mend.partition(":")
    each = (CHANGES.get(f"{kind}:{name}") for name in names.split(","))
    return next(filter(None, each), None) or CHANGES.get(kind) or Change()


def apply_mend(mend: str, chat: Json) -> None:
    """Change a chat as a mend says; nothing if this version has no such mend."""
    change_of(mend).apply(chat, mend.partition(":")[2])


def plausible(mend: str) -> bool:
    """Whether a mend may be remembered: one with a number only if that makes sense."""
    least, argument = change_of(mend).least, mend.partition(":")[2]
    return not least or bool(re.fullmatch("[0-9]{1,9}", argument)
                             and least <= int(argument) <= MOST_LEARNED)


def drop_fields(chat: Json, names: str) -> None:
    """Take fields out of the chat, of its template's arguments and its messages."""
    if "tool_choice" in names.split(","):
        choose_within(chat, "")     # what it says is then said by the tools themselves
    for name in set(names.split(",")) - NEEDED_FIELDS:
        for holder in [chat, chat.get("chat_template_kwargs") or {}, *chat["messages"]]:
            holder.pop(name, None)


def rename_tokens(chat: Json, _: str) -> None:
    if "max_tokens" in chat:
        chat["max_completion_tokens"] = chat.pop("max_tokens")


def cap_tokens(chat: Json, most: str) -> None:
    for name in {"max_tokens", "max_completion_tokens"} & {*chat}:
        chat[name] = min(chat[name], int(most))


def cut_list(chat: Json, name: str, most: str) -> None:
    """The first of a list: a client's own tools come before those added to them."""
    if name in chat:
        chat[name] = chat[name][:int(most)]


def shorten_names(chat: Json, most: str) -> None:
    """Tool names of at most so many characters; the end says which one it was."""
    calls = [call for message in chat["messages"]
             for call in message.get("tool_calls") or []]
    for holder in [*(chat.get("tools") or []), *calls, chat.get("tool_choice")]:
        function = shaped(holder, dict).get("function")
        if function and len(function["name"]) > int(most):
            function["name"] = short_name(function["name"], int(most))


def nine_characters(chat: Json, _: str) -> None:
    """Call ids as Mistral's templates want them."""
    for message in chat["messages"]:
        calls = [(call, "id") for call in message.get("tool_calls") or []]
        for holder, name in [(message, "tool_call_id"), *calls]:
            known = holder.get(name)
            if known and not re.fullmatch("[A-Za-z0-9]{9}", known):
                number = zlib.crc32(known.encode("utf-8", "replace"))
                holder[name] = f"{number:09d}"[-9:]


def replay_all(chat: Json, _: str) -> None:
    for message in chat["messages"]:
        if message["role"] == "assistant":
            message.setdefault("reasoning_content", "")


def fold_system(chat: Json, _: str) -> None:
    """The system's words in front of the user's first."""
    messages = chat["messages"]
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
        if not messages or messages[0]["role"] != "user":
            messages.insert(0, {"role": "user", "content": ""})
        put_text(messages[0], system, before=True)


def put_text(message: Json, text: str, before: bool = False) -> None:
    """Add text to a message, whose content is a string or a list of parts."""
    content = message["content"]
    if isinstance(content, list):
        content.insert(0 if before else len(content), {"type": "text", "text": text})
    else:
        both = [text, content] if before else [content, text]
        message["content"] = "\n\n".join(filter(None, both))


def ask_something(chat: Json, _: str) -> None:
    """A user's message, which Qwen's templates look for."""
    roles = [message["role"] for message in chat["messages"]]
    if "user" not in roles:
        at = roles[:1].count("system")
        chat["messages"].insert(at, {"role": "user", "content": "Continue."})


def take_turns(chat: Json, _: str) -> None:
    """A word of the assistant's between a tool's result and the user."""
    messages = chat["messages"]
    for at in range(len(messages) - 1, 0, -1):
        if (messages[at - 1]["role"], messages[at]["role"]) == ("tool", "user"):
            messages.insert(at, {"role": "assistant", "content": "."})


def keep_images(chat: Json, most: str) -> None:
    """The last images; a line in the place of those before them."""
    images = [part for message in chat["messages"]
              for part in shaped(message.get("content"), list)
              if part["type"] == "image_url"]
    for part in images[:max(len(images) - int(most or 0), 0)]:
        part.clear()
        part.update(type="text", text="[image left out: the model takes no more]")
    flatten(chat, "")


def flatten(chat: Json, _: str) -> None:
    """Content without images as one string."""
    for message in chat["messages"]:
        content = message.get("content") or []
        if isinstance(content, list) and all("text" in part for part in content):
            message["content"] = "\n".join(part["text"] for part in content)


def one_call_a_turn(chat: Json, _: str) -> None:
    """Turns with several calls as several turns, each with its result."""
    out: List[Json] = []
    results = {message["tool_call_id"]: message for message in chat["messages"]
               if message["role"] == "tool"}
    for message in chat["messages"]:
        calls = message.get("tool_calls") or []
        for call in calls:
            out.append({**message, "tool_calls": [call]})
            out += filter(None, [results.pop(call["id"], None)])
            message = {"role": "assistant", "content": ""}
        if not calls and (message["role"] != "tool"
                          or results.pop(message["tool_call_id"], None)):
            out.append(message)
    chat["messages"] = out
    if "tools" in chat:
        chat["parallel_tool_calls"] = False


MAX_SCHEMA_DEPTH = 12       # objects in objects
MAX_SCHEMAS = 2000          # in one tool's: references may multiply
BARE = {"type", "properties", "required", "items", "enum", "const", "description"}
UNLIKED = set("anyOf oneOf allOf $ref $defs definitions $schema $id $comment examples "
              "deprecated readOnly writeOnly title default".split())


def simplify_schemas(chat: Json, level: str) -> None:
    """Tool schemas "plain": without references, unions, lists of types, and keywords
    that are not liked; "bare": nothing but types, properties and values besides."""
    for tool in chat.get("tools") or []:
        root, left = tool["function"]["parameters"], iter(range(MAX_SCHEMAS))

        def simple(schema: Any, inside: Tuple[Any, ...]) -> Json:
            """`inside`: properties on the way here, and references resolved."""
            if not isinstance(schema, dict) or next(left, -1) < 0 or (
                    schema.get("$ref") in inside or len(inside) > MAX_SCHEMA_DEPTH):
                return {"type": "object", "properties": {}}
            for union in ("anyOf", "oneOf", "allOf"):
                branches = [each for each in shaped(schema.get(union), list)
                            if isinstance(each, dict) and each.get("type") != "null"]
                schema = {**schema, union: 0, **(branches[0] if branches else {})}
            if schema.get("$ref"):
                target = shaped(referred(schema["$ref"], root), dict)
                inside = (*inside, schema["$ref"])
                return simple({**schema, "$ref": 0, **target}, inside)
            out = {key: value for key, value in schema.items()
                   if key in (BARE if level == "bare" else {*schema} - UNLIKED)}
            if isinstance(out.get("type"), list):
                out["type"] = ([*filter("null".__ne__, out["type"])] or ["string"])[0]
            fields = shaped(out.get("properties"), dict)
            if fields or out.get("type") == "object":
                out.update(type="object", properties={
                    key: simple(each, (*inside, "")) for key, each in fields.items()})
            if isinstance(out.get("items"), dict):
                out["items"] = simple(out["items"], (*inside, ""))
            out.setdefault("type", "array" if "items" in out else "string")
            return out
        tool["function"]["parameters"] = {"type": "object", "properties": {},
                                          **simple(root, ())}


# ---- tools in prose: for models and servers without tool calls

XML_RULES = """\
# TOOL CALLING FORMAT

To call one of the tools that are listed below, write this:

<tool_code name="Read">
{"file_path": "/tmp/a.txt"}
</tool_code>

1. Write the tag as plain text, never inside a Markdown code fence.
2. Its name is exactly one of the list, in the same case. This is bad, for it has none:
   <tool_code>{"file_path": "/tmp/a.txt"}</tool_code>
3. Between the tags stands one valid JSON object: double quotes, no comments, no tags.
4. What you want to say or think comes before the tag.
5. For several calls write several tags. Then stop: results come as <tool_output>.

## Available Tools:
"""
XML_CALL = '<tool_code name="%(name)s">\n%(arguments)s\n</tool_code>'
XML_OUTPUT = "<tool_output>\n%s\n</tool_output>"


def tools_in_prose(chat: Json, _: str) -> None:
    """Tools, calls and results as text, which `text_calls` reads back."""
    tools, choice = chat.pop("tools", None), chat.pop("tool_choice", "auto")
    for name in ("parallel_tool_calls", "tool_stream"):
        chat.pop(name, None)
    out: List[Json] = []
    waiting = False                 # results, for what the user says besides
    for message in chat["messages"]:
        result = message["role"] == "tool"
        if result:
            message = {"role": "user", "content": XML_OUTPUT % message["content"]}
        for call in message.pop("tool_calls", None) or []:
            put_text(message, XML_CALL % call["function"])
        if waiting and message["role"] == "user":
            put_text(message, out.pop()["content"], before=result)
        out.append(message)
        waiting = result
    chat["messages"] = out
    if not tools or choice == "none":
        return
    chat.setdefault("temperature", 0)
    if not out or out[0]["role"] != "system":
        out.insert(0, {"role": "system", "content": ""})
    rows = ["- **%(name)s**: %(description)s\n  Parameters: " % tool["function"]
            + json.dumps(tool["function"]["parameters"], indent=2, ensure_ascii=False)
            for tool in tools]
    if choice != "auto":
        named = shaped(choice, dict).get("function", {}).get("name", "a tool")
        rows.append(f"\nCall {named} now.")
    put_text(out[0], XML_RULES + "\n".join(rows))


class Change(NamedTuple):
    """How a mend changes a chat; it is of the words before the colon, or of all."""
    apply: Callable[[Json, str], None] = lambda chat, argument: None
    least: int = 0          # of its number, to be remembered at all; 0: it has none
    loss: str = ""          # what a model is without by it: that is soon tried anew


CHANGES = {
    "drop": Change(drop_fields), "rename": Change(rename_tokens),
    "drop:response_format": Change(drop_fields, 0, "response_format is left out"),
    "most": Change(cap_tokens, 1024, "answers are kept short"),
    "now": Change(cap_tokens, 1 << 31),     # for one request alone
    "window": Change(least=4096, loss="prompts are kept short"),
    "tools": Change(lambda chat, most: cut_list(chat, "tools", most), 8,
                    "the last tools are left out"),
    "stops": Change(lambda chat, most: cut_list(chat, "stop", most), 1),
    "names": Change(shorten_names, 16), "ids": Change(nine_characters),
    "replay": Change(replay_all), "fold": Change(fold_system), "flat": Change(flatten),
    "query": Change(ask_something), "turns": Change(take_turns),
    "single": Change(one_call_a_turn), "choice": Change(choose_within),
    "schema": Change(simplify_schemas),
    "blind": Change(keep_images, 0, "images are left out"),
    "images": Change(keep_images, 1, "images are left out"),
    "xml": Change(tools_in_prose, 0, "tools are called in text"),
}


# ---- 15. Calls in text: the rule of the tail ---------------------------------
# How open models write a tool call where their server leaves it in the text.  From a
# mark on, outside of code, all to the end of the answer is calls in one format, or it
# is text, verbatim: nothing is searched inside of what failed.

Tools = Mapping[str, Json]      # the declared tools, by the names upstream knows
Told = List[Tuple[str, str]]    # calls as (the client's name, arguments)
Found = Tuple[List[Tuple[str, Any]], int]   # calls as written, and where they end

MAX_TAIL_CHARS = 1 << 20        # held from a mark on; a longer one is text
MAX_HEAD_CHARS = 400            # from a mark to the arguments; names have 128
MAX_PASSAGE_CHARS = 1024        # of code within a line, and of a line looked at again


class CallFormat(NamedTuple):
    starts: Tuple[str, ...]     # how a mark begins; at a line's, but for ANYWHERE
    head: Any               # pattern of a call up to its arguments, mostly with a name
    read: Any               # (head, tail) to what is Found; ValueError, BrokenOff
    around: Any             # pattern of what may stand behind a call, before the next
    ends: Any               # the same, at the end of a text


# ---- how arguments are written

def named_calls(head: Any, tail: str) -> Found:
    """{"name": "Read", "arguments": {...}}, or a list of such; ValueError for what says
    more, as the definition of a tool does."""
    value, end = first_value(tail, head.end())
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = shaped(call, dict).get("function")
        call = inner if isinstance(inner, dict) else {**shaped(call, dict)}
        if isinstance(inner, str):
            call["name"] = call.pop("function")
        names, arguments = ([call.pop(key) for key in keys if key in call]
                            for keys in (NAME_KEYS, ARGUMENT_KEYS))
        if len(names) != 1 or len(arguments) > 1 or set(call) - {"id", "type", "index"}:
            raise ValueError("expected a name and arguments")
        calls.append((names[0], (arguments or [{}])[0]))
    return calls, end


NAME_KEYS = ("name", "tool", "tool_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")


def own_arguments(head: Any, tail: str) -> Found:
    """{"file_path": "/a"}, behind the name."""
    value, end = first_value(tail, head.end())
    return [(head["name"], value)], end


def first_value(text: str, at: int) -> Tuple[Any, int]:
    """The JSON value, sound or repaired, that begins at a place, and where it ends."""
    try:
        return ARGUMENTS.raw_decode(text, at)
    except json.JSONDecodeError:
        strict, end = strict_json(text, at, False)
        return ARGUMENTS.decode(strict), end


def python_calls(head: Any, tail: str) -> Found:
    """[Read(file_path="/a", limit=2)], as Python reads it."""
    import ast
    import warnings
    end = PYTHON_END.search(tail, head.end()).start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of backslashes
        text = tail[head.end():end].strip()
        for word in STRINGS.findall(text):
            json_string(word)               # no backslash in two ways
        tree = ast.parse(text, mode="eval").body
    calls = tree.elts if isinstance(tree, ast.List) else [tree]
    if not all(isinstance(call, ast.Call) and not call.args for call in calls):
        raise ValueError("expected calls with names for all arguments")
    return [(getattr(call.func, "id", ""), one_reading([
        (word.arg, ast.literal_eval(word.value)) for word in call.keywords]))
        for call in calls], end


STRINGS = re.compile(r""""[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*'""", re.S)
PYTHON_END = re.compile(r"<\|(?:python|tool_call)_end\|>|<tool_call\|>|\Z")


def gemma_arguments(head: Any, tail: str) -> Found:
    """{file_path:<|"|>/a<|"|>,limit:2}; text may have JSON's quotes, or none."""
    def spelled(found: Any) -> str:
        text = found["text"] if found["bare"] in (None, *CONSTANTS) else found["bare"]
        return found[0] if text is None else encode_text(text)
    end = tail.find("<tool_call|>", head.end())
    end = len(tail) if end < 0 else end
    text = GEMMA.sub(spelled, tail[head.end():end])
    value, place = first_value(text, 0)
    if place < len(text.rstrip()):
        raise ValueError("more than arguments")
    return [(head["name"], value)], end


CONSTANTS = ("true", "false", "null", *JSON_WORDS)
GEMMA = re.compile(r"""(?xs)<\|"\|> (?P<text>(?:(?!<\|"\|>).)*) <\|"\|>
    | "[^"\\]*(?:\\.[^"\\]*)*" | '[^'\\]*(?:\\.[^'\\]*)*'
    | (?<=:)\s{0,16} (?P<open><\|"\|>)?
      (?P<bare>[^\s\d"'{}\[\],:<-][^\s{}\[\],"'<]{0,256})
      (?=\s*(?:(?(open)\}|[,}])))""")


def arrow_call(head: Any, tail: str) -> Found:
    """{tool => "Read", args => { --file_path "/a" }}"""
    values, at = [], head.end()
    for word in iter(lambda: ARROW_KEY.match(tail, at), None):
        value, at = first_value(tail, word.end())
        values.append((word[1], value))
    end = re.compile(r"\s*\}\s*\}").match(tail, at)
    if not end:
        raise ValueError("expected the end of a call")
    return [(head["name"], one_reading(values))], end.end()


ARROW_KEY = re.compile(r"\s*--([\w-]{1,128})\s+")


def minimax_arguments(head: Any, tail: str) -> Found:
    """]<]minimax[>[<path>/a]<]minimax[>[</path>: a tag a name, <item> in lists."""
    stack: List[Tuple[str, list, str]] = [("", [], "")]
    tags = re.compile(rf"(?s){M3}<(/?)([\w.-]{{1,128}})>((?:(?!{M3}).)*)")
    for tag in tags.finditer(tail, head.end()):
        if tag[2] == "invoke" and tag[1] and len(stack) == 1:
            return [(head["name"], one_reading(stack[0][1]))], tag.start(3)
        if not tag[1] and len(stack) < 32:
            stack.append((tag[2], [], tag[3]))
            continue
        key, inner, words = stack.pop()
        if key != tag[2] or not stack or tag[3].strip() or inner and words.strip():
            break
        is_list = inner and all(name == "item" for name, _ in inner)
        stack[-1][1].append((key, [value for _, value in inner] if is_list
                             else one_reading(inner) if inner else Raw(words)))
    raise ValueError("tags that cross")


def tagged(opener: str, closer: str, end: str, tags: str) -> Any:
    """The reader of parameters that have a tag each; the opener holds the <key>, what
    says that a value is <json>, and a <line> end that is the tags'.  Else values are
    raw text, and hold none of the format's tags."""
    opens, closes, ends, marks = map(re.compile, (
        opener, rf"(?:{closer}\s*)+", f"{end}|", tags))

    def read(head: Any, tail: str) -> Found:
        values: List[Tuple[str, Any]] = []
        at = BLANKS.match(tail, head.end()).end()
        if tail[at:at + 1] == "{":          # JSON between the tags of the call
            value, at = first_value(tail, at)
            values, at = list(value.items()), BLANKS.match(tail, at).end()
        for word in iter(lambda: opens.match(tail, at), None):
            mark = marks.search(tail, word.end())
            closing = closes.match(tail, mark.start()) if mark else None
            if not closing:
                raise ValueError("expected the end of a parameter")
            own, text = word.groupdict(), tail[word.end():mark.start()]
            at = closing.end()
            line = re.fullmatch(r"(?s)(.*)\n" if own.get("line") else r"\n(.+)\n", text)
            value = Raw(line[1] if line else text)
            with contextlib.suppress(json.JSONDecodeError):
                value = ARGUMENTS.decode(text.strip()) if own.get("json") else value
            values.append((own["key"], value))
        last = ends.match(tail, at)
        if not last[0]:
            raise ValueError("expected the end of a call")
        return [(head["name"], one_reading(values))], last.end()
    return read


# ---- the formats

BLANKS, S = re.compile(r"\s*"), r"\s{0,64}"
BAR, M3 = "[|\uff5c]", r"\]<\]minimax\[>\["
NAME, ATTRIBUTES = "[\"']?(?P<name>[\\w.:-]{1,128})[\"']?", r"[^<>|\n]{0,64}"
KEY = "[\"']?(?P<key>[^\"'<>=\\s]{1,128})[\"']?"
PREFIX = (rf"(?:antml:|atem:|steptml:|minimax:|seed:| ?{BAR}{{1,2}} ?DSML ?"
          rf"{BAR}{{1,2}} ?)?")
WRAPPERS = (rf"</?{PREFIX}(?:function_calls|tool_calls?|toolcalls|calls|tools?|TOOLCALL"
            rf"|tool_code)>|<{BAR}tool_calls?_(?:begin|end){BAR}>")
TURN_ENDS = r"<\|(?:im_end|eot_id|eom_id|endoftext)\|>|</s>"
ANYWHERE = re.compile(rf"< ?{BAR}|\]<\]minimax|\[TOOL_CALLS")   # special tokens


DEEP = " ".join(f"<{each}tool{gap}call" for each in "|\uff5c" for gap in "\u2581_")
DSML = [f"<{one}{each}{two}DSML" for one in ("", " ") for two in ("", " ")
        for each in ("|", "||", "\uff5c", "\uff5c\uff5c")]


def deep(words: str) -> str:
    """DeepSeek's token, with its own bars and blanks or with ASCII's."""
    return f"<{BAR}{words}{BAR}>".replace(" ", "[\u2581_]")


# How a mark begins, a call's head, the reader of its arguments, what may stand around.
FORMATS = [CallFormat(
    (*starts.split(), *(DSML if "invoke" in starts else ())), re.compile(head), read,
    *(re.compile(rf"(?:{around or TURN_ENDS}|{TURN_ENDS}|\s){end}")
      for end in ("*", r"+\Z"))) for starts, head, read, around in [
    # JSON: Hermes, Qwen 2.5 and 3, Nemotron 2; in XML mode, without a name in the tag
    ("<tool_call> <tool_calls> <tools> <tool> <TOOLCALL> <tool_code>",
     rf"(?:(?!</)(?:{WRAPPERS}){S})?(?P<fence>```(?:json)?{S})?(?=[\[{{])",
     named_calls, WRAPPERS),
    ("<tool_call>", rf"<tool_call>{S}{NAME}{S}(?={{)", own_arguments, "</tool_call>"),
    # Qwen-Coder, Qwen 3.5, Nemotron 3, Step 3.5, Seed-OSS
    ("<tool_call> <seed:tool_call> <function=",
     rf"(?:<(?:seed:)?tool_call>{S})?<function={NAME}>",
     tagged(rf"<parameter={KEY}[>=](?P<line>\n?)", "</parameter>",
            "</function>|</(?:seed:)?tool_call>",
            "</?(?:function|parameter)[=>]|</?(?:seed:)?tool_call>"),
     "</function>|</?(?:seed:)?tool_call>"),
    # GLM, Laguna
    ("<tool_call>", rf"<tool_call>{S}{NAME}{S}(?=<arg_key>|</tool_call>)",
     tagged(rf"<arg_key>{S}{KEY}{S}</arg_key>{S}<arg_value>", "</arg_value>",
            "</tool_call>", "</?(?:arg_key|arg_value|tool_call)>"), "</tool_call>"),
    # MiniMax M2, Muse, DeepSeek V3.2 and V4, Step 3, imitators of Claude
    ("<invoke <function_calls> <minimax:tool_call> <antml: <atem: <steptml: "
     + DEEP,
     rf"(?:(?!</)(?:{WRAPPERS}){S}|function<{BAR}tool_sep{BAR}>|<{BAR}tool_call_begin"
     rf"{BAR}>){{0,4}}<{PREFIX}invoke name={NAME}{ATTRIBUTES}>",
     tagged(rf"<{PREFIX}parameter name={KEY}(?P<json> string=\"false\")?{ATTRIBUTES}>",
            rf"</{PREFIX}parameter>", rf"</{PREFIX}invoke>",
            rf"</?{PREFIX}(?:invoke|parameter|function_calls|tool_calls?|calls)\b"),
     rf"{WRAPPERS}|</{PREFIX}invoke>"),
    ("]<]minimax[>[", rf"(?:{M3}<tool_call>{S})?{M3}<invoke name={NAME}>",
     minimax_arguments, rf"{M3}</?tool_call>"),
    # Kimi K2, K3
    ("<|tool_call", rf"(?:<\|tool_calls?_section_begin\|>{S})?<\|tool_call_begin\|>{S}"
     rf"{NAME}{S}<\|tool_call_argument_begin\|>{S}", own_arguments,
     r"<\|tool_calls?_(?:section_)?end\|>|<\|tool_calls?_section_begin\|>"),
    ("<|open|>tools <|open|>call", rf"(?:<\|open\|>tools(?:<\|sep\|>)?{S})?"
     rf"(?:<\|open\|>|(?<=tools))call tool={NAME}{ATTRIBUTES}<\|sep\|>",
     tagged(rf"<\|open\|>argument key={KEY}(?P<json> type=\"(?!string)\w+\")?"
            rf"{ATTRIBUTES}<\|sep\|>", r"<\|close\|>argument<\|sep\|>",
            r"<\|close\|>call<\|sep\|>", r"<\|(?:open|close)\|>"),
     r"<\|close\|>(?:call|tools|message|toolsmessage)<\|sep\|>"),
    # DeepSeek V3, R1, V3.1
    (DEEP,
     rf"(?:{deep('tool calls begin')}{S})?{deep('tool call begin')}{S}"
     rf"(?:function{deep('tool sep')})?{NAME}(?:{deep('tool sep')})?{S}"
     rf"(?P<fence>```(?:json)?{S})?(?={{)", own_arguments, deep("tool calls? end")),
    # Mistral, early and late
    ("[TOOL_CALLS]", rf"\[TOOL_CALLS\]{S}(?=\[{S}{{)", named_calls, ""),
    ("[TOOL_CALLS]", rf"\[TOOL_CALLS\]{S}{NAME}{S}(?:\[CALL_ID\]\w{{0,40}})?"
     rf"(?:\[ARGS\])?{S}(?={{)", own_arguments, ""),
    # gpt-oss
    ("<|start|> <|channel|>",
     r"(?=<\|)(?:<\|start\|>assistant)?(?:<\|channel\|>(?:commentary"
     rf"|analysis))?{S}to={NAME}{S}(?:<\|channel\|>(?:commentary|analysis))?{S}"
     rf"(?:<\|constrain\|>)?(?:json|code)?{S}<\|message\|>{S}", own_arguments,
     r"<\|(?:call|end)\|>"),
    # Gemma 4
    ("<|tool_call>", rf"<\|tool_call>{S}call:{NAME}(?={{)", gemma_arguments,
     r"<tool_call\|>"),
    ("<|tool_call>", rf"<\|tool_call>{S}call:(?=[\w.]{{1,128}}\()", python_calls,
     r"<tool_call\|>"),
    # Llama 4, LFM 2.5; Llama 3; Inkling; Phi 4
    ("<|python_start|> <|tool_call_start|>",
     rf"<\|(?:python_start|tool_call_start)\|>{S}(?=\[)", python_calls,
     r"<\|(?:python_end|tool_call_end)\|>"),
    ("<|python_tag|>", rf"(?:<\|python_tag\|>{S})?(?={{)", named_calls, ";"),
    ("<|content_invoke_tool_json|>", rf"<\|content_invoke_tool_json\|>{S}(?={{)",
     named_calls, r"<\|end_message\|>"),
    ("functools[", r"functools(?=\[)", named_calls, ""),     # only as a whole answer
    # MiniMax in LM Studio
    ("[TOOL_CALL]", rf"\[TOOL_CALL\]{S}{{{S}tool{S}=>{S}{NAME},{S}args{S}=>{S}{{",
     arrow_call, r"\[/TOOL_CALL\]"),
    # the XML mode
    ("<tool_code <TOOL_CODE", rf"<(?i:tool_code{S}name){S}={S}{NAME}{S}>{S}"
     rf"(?:<tool{ATTRIBUTES}>{S})?(?:\w{{1,40}}{S})?(?={{)", own_arguments,
     "</ ?(?i:tool_code) ?>|</tool>"),
]]


def text_calls(tail: str, tools: Tools, first: bool = False,
               ) -> Tuple[List[Tuple[str, str, List[str]]], bool]:
    """The calls that a tail is, as (the client's name, arguments, what it took), none
    if it is text; and whether text is nearly calls, so that asking again may help.

    With `first` they were asked for in this form, and what follows them is left out.
    """
    nearly, first = False, first and tail[:10].lower() == "<tool_code"
    for row in FORMATS:
        calls: list = []
        head = row.head.match(tail) if tail.startswith(row.starts) else None
        while head and len(calls) < MAX_CALLS:
            try:
                found, at = row.read(head, tail)
                calls += [fitted_call(name, value, tools) for name, value in found]
            except LookupError:
                break
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError
                    ) as error:         # Python's parser knows five ways to say no
                ended = row.ends.search(tail[-MAX_HEAD_CHARS:])
                spelled = NAME_IN.search(tail[:MAX_PASSAGE_CHARS])
                name = head.groupdict().get("name") or (
                    spelled[spelled.lastindex] if spelled else "")
                nearly = nearly or bool((ended or isinstance(error, BrokenOff))
                                        and declared_name(name, tools))
                break
            if head.groupdict().get("fence"):       # which this call has opened
                at = FENCE_END.match(tail, at).end()
            gap = row.around.match(tail, at)
            at = gap.end()
            bare = ENDED.search(gap[0]) and not tail.startswith(row.starts, at)
            head = None if bare else row.head.match(tail, at)
            if at == len(tail) or first and not head:
                return calls, False
    return [], nearly


def fitted_call(name: Any, value: Any, tools: Tools) -> Tuple[str, str, List[str]]:
    """A call as its tool wants it; LookupError if no such tool is declared, ValueError
    for arguments that are none or lack what is required."""
    text = value if isinstance(value, str) else encode_text(value)
    own = declared_name(str(name), tools)
    if not own and KIMI_ID.fullmatch(str(name)):    # Kimi: an id alone
        keys = set(shaped(value, dict))
        able = [known for known, tool in tools.items() if keys and keys.issubset(
            shaped(input_schema(tool).get("properties"), dict))
            and not lacking(value, tool)]
        own = able[0] if len(able) == 1 else ""
    tool = tools[own]
    if isinstance(value, dict):
        fit = Fit(input_schema(tool), iter(range(MAX_STEPS)))
        better = fitted(value, fit, fit.root)[0]
        notes = ["fitted"] if better is not value else []
    else:
        better, notes = read_arguments(text, input_schema(tool))
    schema = input_schema(tool)
    if not isinstance(better, dict) or lacking(better, tool) or not (
            schema.get("additionalProperties") or "patternProperties" in schema
            or set(better).issubset(shaped(schema.get("properties"), dict))):
        raise ValueError("expected what the tool requires, and no more")
    return tool["name"], encode_json(better), ["text", *notes]


FENCE_END = re.compile(r"\s*(?:```)?")
ENDED = re.compile(r"(?:</[^>]*|\|)>\s*\Z")      # then a mark must begin the next call
KIMI_ID = re.compile(r"call_\w+|[0-9]+")
NAME_IN = re.compile(r"""["'](?:name|tool)["']\s*:\s*["']([\w.:-]{1,128})["']|"""
                     r"([\w.:-]{1,128})\(")


def input_schema(tool: Json) -> Json:
    return shaped(tool.get("input_schema"), dict)


def lacking(value: Json, tool: Json) -> List[str]:
    """What a tool requires, and arguments do not have."""
    return [key for key in listed(input_schema(tool), "required") if key not in value]


def own_markup(name: str, text: str, tool: Json) -> Optional[str]:
    """The arguments of a structured call that its model wrote in a format of its own,
    perhaps behind the name: Read<arg_key>limit</arg_key><arg_value>3</arg_value>."""
    name, mark, rest = name.partition("<")
    text = mark + rest if text in ("", "{}") else text
    if "<" not in text or re.match(r"""\s*\{\s*["']""", text):
        return None
    for form in ("", "<function=%s>%s</function>", "<tool_call>%s%s</tool_call>",
                 '<invoke name="%s">%s</invoke>', "<|tool_call>call:%s%s<tool_call|>"):
        calls, _ = text_calls(form % (name, text) if form else text, {name: tool})
        if len(calls) == 1:
            return calls[0][1]
    return None


# ---- 16. Streams: chunks to events -------------------------------------------
# Sans-I/O.  One completion's chunks become one message's events, whatever their
# cut: one block open at a time, numbered from 0.  A tool call is told when it is
# whole, because Claude Code runs it as soon as its block closes.

Event = Tuple[str, Json]
Stage = Generator[list, Any, None]
DONE: Json = {"done": True}     # the chunk that [DONE] stands for
SIGNATURE = "nimproxy"          # marks thinking blocks as ours; nobody verifies it


class Reading(NamedTuple):
    """How to read one completion, known before it comes."""
    tools: Tools = {}                   # the declared ones, by upstream's names
    stops: Tuple[str, ...] = ()         # stop sequences, all of them
    text_delta_chars: int = 0           # 0: text deltas as long as they come
    input_tokens: int = 0               # our estimate, until upstream says
    cumulative: bool = False            # reasoning deltas may repeat all so far
    opens: str = ""                     # text may begin in thinking, up to this tag
    again: bool = False                 # what is no whole answer is raised: Unfinished
    own_form: bool = False              # calls were asked for as text, in our form
    promotes: bool = True               # thinking without an answer is told as one
    asked: Asked = Asked(Config(), "")  # for error texts


class Unfinished(Exception):
    """A finished answer that is none, or holds a call that means nothing: ask once
    more, then `amended`."""


class Message:
    """The message that the chunks spell out: `events` says what is new.

    Text and thinking wait in `pending` only until the end of the read that brought
    them; whitespace waits for text to lead, tags and stop sequences for their end.
    """

    def __init__(self, message_id: str, model: str,
                 reading: Reading = Reading()) -> None:
        self.id = message_id
        self.model = model
        self.reading = reading
        # what is out
        self.index = -1
        self.open = ""                      # "thinking", "text" or nothing
        self.told: List[Event] = []         # since the last call of events()
        self.repairs: List[Tuple[str, List[str]]] = []  # calls, and what those took
        # what is held
        self.pending: List[str] = []        # of the open block
        self.blank = ""                     # leading whitespace
        self.spoken = False                 # text was told
        self.thought = Tail(MAX_TAIL_CHARS if reading.opens else 8192)
        self.fielded = False                # reasoning came in a field of its own
        self.closed = ""                    # the tag that ended thinking
        self.calls = Calls(reading.tools)
        self.shown = ""                     # the client's name of a call that is open
        self.grown = 0                      # characters of it, for which blanks are out
        self.late: List[Tuple[str, str]] = []   # text and thinking behind its beginning
        self.tags: Optional[Stage] = started(think_tags(reading.opens))
        self.watch = TailWatch(reading.tools, reading.asked.model)  # calls in the text
        self.musing = TailWatch(reading.tools)  # and in the thinking, the last resort
        self.stops = started(stop_watch(reading.stops)) if reading.stops else None
        # how it ends
        self.chunks = 0
        self.finish = ""                    # upstream's finish_reason
        self.stop_sequence: Optional[str] = None
        self.halted = False                 # by a stop sequence that we found
        self.usage: Dict[str, int] = {}
        self.output_chars = 0
        self.over = False

    def restart(self, reading: Optional[Reading] = None) -> None:
        """Forget an answer of which nothing is out yet: upstream is asked anew."""
        self.__init__(self.id, self.model, reading or self.reading)

    def start(self) -> List[Event]:
        """The event before any chunk; usage is our estimate."""
        usage = dict(EMPTY_USAGE, input_tokens=self.reading.input_tokens)
        message = {
            "id": self.id, "type": "message", "role": "assistant",
            "model": self.model, "content": [], "stop_reason": None,
            "stop_sequence": None, "usage": usage,
        }
        return [("message_start", {"message": message})]

    def events(self, chunks: Iterable[Json]) -> List[Event]:
        """What some chunks add; the last event is message_stop once all is said.

        Raises ProxyError for an error that upstream put into the stream.
        """
        for chunk in chunks:
            if self.over:
                break
            if chunk is DONE:
                return self.end()
            self.take(chunk)
            if self.halted:
                return self.end()
        self.flush()
        return self.news()

    def news(self) -> List[Event]:
        told, self.told = self.told, []
        return told

    def end_of_input(self) -> List[Event]:
        """The last events where no [DONE] came; an error without a finish_reason."""
        if self.chunks and not self.finish and not self.over:
            words = "upstream broke off in the middle of its answer"
            raise ProxyError(502, words, again="broken")
        return [] if self.over else self.end()

    def complete(self) -> bool:
        """Whether all is said, and only the end is missing: errors then are none."""
        told = self.index >= 0 or self.calls.calls or self.watch.tail
        return bool(self.finish and told and not self.over)

    def take(self, chunk: Json) -> None:
        self.chunks += 1
        usage = chunk.get("usage")
        if usage:
            self.count(usage)
        choices = chunk.get("choices")
        if not choices or not isinstance(choices, list):
            return
        choice = choices[0] if isinstance(choices[0], dict) else {}
        delta = choice.get("delta") or choice.get("message")
        delta = delta if isinstance(delta, dict) else {}
        if not REASONING.isdisjoint(delta):
            self.reason(reasoning_text(delta))
        content = delta.get("content")
        if content:
            self.say(content)
        if delta.get("tool_calls"):
            self.calls.grow(delta["tool_calls"])
            if self.calls.calls:
                self.show_call()
        if delta.get("refusal"):
            self.finish = "content_filter"
            self.say(delta["refusal"])
        if choice.get("finish_reason"):
            self.finish = str(choice["finish_reason"])
            if choice.get("usage"):         # Moonshot says it here
                self.count(choice["usage"])
            if choice.get("stop_reason") in self.reading.stops:
                self.stop_sequence = choice["stop_reason"]

    def reason(self, text: str) -> None:
        """Reasoning from a field of its own; it may be empty."""
        if text:
            if not self.fielded and self.reading.opens and self.index < 0:
                self.tags = started(think_tags())   # the server knows where it ends
            self.fielded = True
            self.think(text)

    def think(self, text: str) -> None:
        if self.reading.cumulative:
            text = self.thought.news(text)
        self.thought.add(text)
        musing = self.musing
        if musing.idle and not MARKS.search(text):
            musing.line.append(text)
            if len(musing.line) > MAX_TOKENS:
                musing.lead()
        elif self.reading.tools:
            musing.feed(text)
        self.put("thinking", text)

    def say(self, content: Any) -> None:
        """Text that may hold think tags, or a list of parts."""
        if self.tags is None and isinstance(content, str):
            return self.speak(content)          # the path of a token
        for kind, text in content_parts(content):
            if kind == "thinking":
                self.think(text)
            elif self.tags is None:
                self.speak(text)
            else:
                self.untag(self.tags.send(text))

    def untag(self, pieces: List[Tuple[str, str]]) -> None:
        for kind, text in pieces:
            if kind == "text":
                self.speak(text)
            elif kind == "closed":
                self.closed = text
            elif kind == "orphan":
                self.watch.orphan = text
            elif kind == "before" and self.fielded:     # its thinking came elsewhere
                self.speak(text)
            elif not self.fielded:      # MiniMax says its reasoning in both places
                self.think(text)

    def speak(self, text: str) -> None:
        """Text that is certainly the answer's, but for what may be calls."""
        watch = self.watch
        if watch.idle and not MARKS.search(text):   # the path of a token
            watch.line.append(text)
            if len(watch.line) > MAX_TOKENS:
                watch.lead()
        else:
            text = watch.feed(text)
        if text:
            self.write(text)

    def write(self, text: str) -> None:
        """Text up to a stop sequence; blanks wait for something to lead."""
        if self.halted:
            return
        if self.stops:
            (text, self.stop_sequence), = self.stops.send(text)
            self.halted = self.stop_sequence is not None
        if self.open != "text":
            text = self.blank + text
            self.blank = text if text.isspace() and len(text) < MAX_BLANK_CHARS else ""
        if text and not self.blank:
            self.tags, self.spoken = None, True
            self.put("text", text)

    def show_call(self) -> None:
        """Let the client see the first call grow: its block is opened as soon as its
        name is sure, and gets a brace, then a blank for each character that is held."""
        call = self.calls.calls[0]
        if self.shown:
            if call.size > self.grown:
                self.tell_json(" " * (call.size - self.grown))
                self.grown = call.size
            return
        if self.grown or not call.size or self.stops:
            return
        name, self.grown = declared_name(call.name, self.calls.tools), call.size
        if not name:
            return
        if self.tags:
            self.untag(self.tags.send(None))
            self.tags = None
        text = self.watch.feed("", True)
        if text:
            self.write(text)
        if not self.watch.tail:
            self.close()
            self.shown = self.calls.tools[name]["name"]
            self.open_call(self.shown)

    def put(self, kind: str, text: str) -> None:
        if self.shown:
            self.late.append((kind, text))
            return
        if self.open != kind:
            self.close()
            self.index += 1
            self.open = kind
            block = dict(EMPTY_BLOCKS[kind])
            start = {"index": self.index, "content_block": block}
            self.told.append(("content_block_start", start))
        self.pending.append(text)

    def flush(self) -> None:
        """The pending text as deltas of the open block."""
        if not self.pending:
            return
        text, self.pending = "".join(self.pending), []
        self.output_chars += len(text)
        size = self.reading.text_delta_chars
        fine = size and self.open == "text" and len(text) <= MAX_CUT_CHARS
        pieces = cut(text, size) if fine else [text]
        delta_type = self.open + "_delta"
        for piece in pieces:
            delta = {"type": delta_type, self.open: piece}
            self.tell_delta(delta)

    def tell_delta(self, delta: Json) -> None:
        self.told.append(("content_block_delta", {"index": self.index, "delta": delta}))

    def close(self) -> None:
        self.flush()
        if self.open == "thinking":
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            self.tell_delta(delta)
        if self.open:
            self.told.append(("content_block_stop", {"index": self.index}))
        self.open = ""

    def count(self, usage: Any) -> None:
        """Usage may come on every chunk, cumulative: the greatest figures count."""
        for name, value in message_usage(usage).items():
            self.usage[name] = max(value, self.usage.get(name, 0))

    def held(self) -> int:
        """How much waits to be told: it grows as long as upstream says something."""
        return self.calls.size + len(self.watch.held) + self.watch.size

    def nudge(self) -> Event:
        """An event that says nothing, but resets Claude Code's watchdog."""
        if self.open or self.shown:
            delta = {"type": self.open + "_delta", self.open: ""} if self.open else {
                "type": "input_json_delta", "partial_json": ""}
            return "content_block_delta", {"index": self.index, "delta": delta}
        delta = {"stop_reason": None, "stop_sequence": None}
        return "message_delta", {"delta": delta, "usage": {"output_tokens": 0}}

    def broken_off(self, error: Json, drops: bool) -> List[Event]:
        """The last events when the answer cannot go on; none where it is better to drop
        the connection, if that is of use to the client.

        As Claude Code takes it: while no block is closed it asks anew by itself.  After
        that an error ends its turn, and keeps the text only if its block is closed.
        """
        if drops and self.open == "thinking" and not self.index:
            return []
        if self.open and self.index:
            self.close()
        return self.news() + [("error", error)]

    def end(self) -> List[Event]:
        """The last events, after [DONE], a stop sequence, or a finish_reason.

        Raises ProxyError if the finish_reason means failure, or nothing came at all.
        """
        self.over = True
        self.release()
        self.check()
        calls, sound = self.finished_calls()
        if not sound and self.reading.again:
            raise Unfinished
        return self.conclude(calls)

    def finished_calls(self) -> Tuple[Told, bool]:
        """The calls of an answer that is over, and whether it is whole and means
        something: else asking once more may help.

        Text from a mark on is calls if it is nothing else, and no structured call says
        anything else; thinking's end is where there is neither text nor call.
        """
        cut = self.halted or self.finish in CUT_FINISHES
        calls = [] if self.halted else self.calls.whole(self.finish)
        notes, nearly = self.calls.notes, False
        for watch in (self.watch, self.musing):
            tail = "".join(watch.tail)
            if cut or not tail or watch is self.musing and (calls or self.answers()):
                continue
            found, near = text_calls(tail, self.reading.tools, self.reading.own_form)
            same = [call for call in found if parsed(call) in map(parsed, calls)]
            nearly = nearly or near and watch is self.watch and not calls
            if found and len(same) == len(found) or not calls:
                watch.tail = [] if found else watch.tail
                calls = calls or [(name, arguments) for name, arguments, _ in found]
                notes = notes + [(name, took) for name, _, took in found if not same]
        self.repairs = notes
        unsaid = not (cut or calls or self.stop_sequence) and (
            self.finish in ("tool_calls", "function_call") and self.reading.tools
            or not self.answers() and not self.opened())
        return calls, not (self.calls.broken or nearly or unsaid)

    def opened(self) -> bool:
        """Whether what is told as thinking may be the answer: nothing has ended it."""
        return bool(self.reading.opens and not self.fielded and not self.closed)

    def answers(self) -> bool:
        """Whether there is text, told or held, or calls."""
        return bool(self.spoken or self.watch.tail or self.calls.calls)

    def amended(self, answer: Json) -> List[Event]:
        """The last events of what was Unfinished: with the calls, or the text, of a
        second completion if those are sound, else as the first one came."""
        second = Message(self.id, self.model, self.reading._replace(again=False))
        with contextlib.suppress(ProxyError):
            message = fold(second.start() + second.events([answer, DONE]))
            calls = [(block["name"], encode_json(block["input"]))
                     for block in message["content"] if block["type"] == "tool_use"]
            text = "".join(block["text"] for block in message["content"]
                           if block["type"] == "text")
            if calls and not (second.calls.broken or second.calls.cut) and (
                    self.shown in ("", calls[0][0])):
                self.watch.tail = []
                self.repairs = [*second.repairs, (calls[0][0], ["asked_again"])]
                return self.conclude(calls)
            if text and second.finish not in CUT_FINISHES and not self.answers():
                self.write(text)
        return self.conclude(self.finished_calls()[0])

    def conclude(self, calls: Told) -> List[Event]:
        if self.watch.tail:
            self.write(self.watch.text())
        if self.stops and not self.halted:
            self.write_held()
        calls = [] if self.halted else calls
        if not all(name for name, _ in calls):
            raise ProxyError(502, "upstream sent a tool call without a name")
        reason = self.stop_reason(calls)
        if self.shown:
            (_, arguments), *calls = calls
            self.shown = ""
            self.close_call(arguments if arguments[:1] == "{" else
                            encode_json(unparsed(arguments)), "{")
            for kind, text in self.late:
                self.put(kind, text)
        opened = self.opened()
        if self.open == "thinking" and reason == "end_turn" and (
                opened or self.reading.promotes):           # better than no answer
            self.put("text", "".join(self.thought.pieces) if opened else
                     self.thought.last_paragraph())
        self.close()
        for name, arguments in calls:
            self.tell_call(name, arguments)
        delta = {"stop_reason": reason, "stop_sequence": self.stop_sequence}
        last = {"delta": delta, "usage": self.final_usage()}
        self.told += [("message_delta", last), ("message_stop", {})]
        return self.news()

    def check(self) -> None:
        if self.finish in BROKEN_FINISHES:
            words = f"the model stopped with finish_reason {self.finish!r}"
            raise refusal(self.reading.asked, BROKEN_FINISHES[self.finish], words)
        told = (self.index >= 0 or self.calls.calls or self.watch.tail
                or self.stop_sequence is not None)
        empty = not told and self.finish in ("", "length")
        asked, hint = self.reading.asked, window_hint(self.reading.asked.config)
        if empty and hint:
            raise ProxyError(400, f"{upstream_label(asked.config)} gave an empty "
                                  f"answer to about {asked.prompt_tokens} tokens: its "
                                  f"context window is too small for them; {hint}")
        if not self.chunks or not self.finish and not told:
            raise empty_answer(self.reading.asked)

    def release(self) -> None:
        """What was held in case more came is text or thinking after all."""
        if self.tags:
            self.untag(self.tags.send(None))
        text = self.watch.feed("", True)
        if text:
            self.write(text)
        self.musing.feed("", True)

    def write_held(self) -> None:
        held, self.stops = self.stops.send(None), None
        self.write(held[0][0])

    def tell_call(self, name: str, arguments: str) -> None:
        """One whole tool call as a block."""
        self.open_call(name, "")
        self.close_call(arguments)

    def open_call(self, name: str, told: str = "{") -> None:
        """Begin a call's block; its id is unique because the message's is."""
        self.index += 1
        call_id = f"toolu_{self.id.replace('msg_', '', 1)}{self.index}"
        block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        self.told.append(("content_block_start", {"index": self.index,
                                                  "content_block": block}))
        if told:
            self.tell_json(told)

    def close_call(self, arguments: str, told: str = "") -> None:
        """Tell the arguments, of which the client has some, and end the block."""
        self.output_chars += len(arguments)
        self.tell_json(arguments[len(told):])
        self.told.append(("content_block_stop", {"index": self.index}))

    def tell_json(self, text: str) -> None:
        self.tell_delta({"type": "input_json_delta", "partial_json": text})

    def stop_reason(self, calls: Told) -> str:
        if self.stop_sequence is not None:
            return "stop_sequence"
        if self.calls.cut or self.finish in CUT_FINISHES and not calls:
            return STOP_REASONS.get(self.finish, "max_tokens")
        return "tool_use" if calls else STOP_REASONS.get(self.finish, "end_turn")

    def final_usage(self) -> Dict[str, int]:
        """Upstream's figures; where there are none, estimates instead of zeros."""
        estimate = {"input_tokens": self.reading.input_tokens,
                    "output_tokens": (self.output_chars + 3) // 4}
        usage = self.usage if any(self.usage.values()) else estimate
        return {**EMPTY_USAGE, **usage}


def parsed(call: Tuple) -> Tuple[str, Json]:
    """A call's name and input, to tell whether another one is the same."""
    return call[0], parsed_input(call[1])


EMPTY_BLOCKS = {
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
}
EMPTY_USAGE = {"input_tokens": 0, "cache_creation_input_tokens": 0,
               "cache_read_input_tokens": 0, "output_tokens": 0}

STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "content_filter": "refusal",
    "sensitive": "refusal",
    "model_context_window_exceeded": "model_context_window_exceeded",
}
CUT_FINISHES = {"length", "model_length", "max_tokens", "content_filter", "sensitive",
                "model_context_window_exceeded"}    # what came may end anywhere
BROKEN_FINISHES = {             # finish_reason: the status it amounts to
    "abort": 500, "error": 500, "network_error": 503,
    "insufficient_system_resource": 503,
}


def started(stage: Stage) -> Stage:
    """A stage that has said what comes before any input (nothing, here)."""
    next(stage)
    return stage


REASONING_NAMES = ("reasoning_content", "reasoning", "reasoning_text", "thinking",
                   "reasoning_details")     # what servers call it; the first one counts
REASONING = frozenset(REASONING_NAMES)


def reasoning_text(delta: Json) -> str:
    for name in REASONING_NAMES:
        value = delta.get(name)
        if value:
            if isinstance(value, str):
                return value
            return "".join(text for _, text in content_parts(value))
    return ""


def content_parts(content: Any) -> List[Tuple[str, str]]:
    """Content as (kind, text): a string, or Mistral's and others' lists of parts."""
    if isinstance(content, str):
        return [("text", content)]
    parts = content if isinstance(content, list) else [content]
    out = []
    for part in parts:
        part = part if isinstance(part, dict) else {"text": part}
        kind = "thinking" if "thinking" in part else "text"
        value = part.get(kind)
        if isinstance(value, list):         # {"type": "thinking", "thinking": [...]}
            value = "".join(str(inner.get("text", "")) for inner in value
                            if isinstance(inner, dict))
        if isinstance(value, str):
            out.append((kind, value))
    return out


def message_usage(usage: Any) -> Dict[str, int]:
    """Anthropic's figures from OpenAI's: cached tokens are not input tokens there."""
    if not isinstance(usage, dict):
        return {}
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    cached = whole(details.get("cached_tokens") or usage.get("prompt_cache_hit_tokens")
                   or usage.get("cached_tokens"))
    prompt = whole(usage.get("prompt_tokens"))
    cached = min(cached, prompt)
    return {
        "input_tokens": prompt - cached,
        "cache_read_input_tokens": cached,
        "output_tokens": whole(usage.get("completion_tokens")),
    }


def whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 53 else 0


def cut(text: str, size: int) -> List[str]:
    """The text in pieces of at most `size`, cut before whitespace where that fits."""
    if len(text) <= size:
        return [text]
    return re.findall(rf"\s?\S{{1,{max(size - 1, 1)}}}|\s{{1,{size}}}", text)


class Tail:
    """The reasoning so far, in bounded memory: its length, its head, its end."""

    def __init__(self, most: int) -> None:
        self.most = most                    # characters that are kept at least
        self.head = ""
        self.pieces: List[str] = []
        self.kept = self.length = 0

    def add(self, text: str) -> None:
        self.head = self.head or text[:64]
        self.pieces.append(text)
        self.kept += len(text)
        self.length += len(text)
        if self.kept > 2 * self.most or len(self.pieces) > MAX_PIECES:
            self.pieces = ["".join(self.pieces)[-self.most:]]
            self.kept = len(self.pieces[0])

    def news(self, text: str) -> str:
        """What a delta adds, where it may repeat all that was said before it."""
        repeats = self.length and len(text) > self.length and text.startswith(self.head)
        return text[self.length:] if repeats else text

    def last_paragraph(self) -> str:
        return re.split(r"\n\s*\n", "".join(self.pieces).strip())[-1]


class Call:
    """One tool call as it grows."""

    def __init__(self, call_id: str = "") -> None:
        self.id, self.name = call_id, ""
        self.size = 0                       # characters in the pieces
        self.pieces: List[str] = []
        self.torn = False                   # its arguments came in two versions
        self.repeats = False                # each piece repeats those before it

    def grow(self, name: str, value: Any, known: Tools) -> None:
        """Add a name and arguments: either whole, whole again, growing, or in pieces;
        arguments may be an object, too, that is yet to be filled."""
        if name and (not self.name or name.startswith(self.name)):
            self.name = name
        elif name != self.name and not self.pieces and (self.name not in known or any(
                each.startswith(self.name + name) for each in known)):
            self.name += name
        if isinstance(value, dict):
            held = parsed_input(self.arguments() or "{}")
            self.torn = self.torn or any(held.get(key, inner) != inner
                                         for key, inner in value.items())
            self.pieces, self.size = [], 0
            value = encode_text({**held, **value})
        if not isinstance(value, str) or not value:
            return
        if value[0] == "{" and 0 < self.size <= 2 * len(value):
            so_far = self.arguments()
            if so_far != "{}" and is_object(so_far):
                self.torn = self.torn or not is_object(value) or (
                    decode_json(value) != decode_json(so_far))
                return                      # the whole of it again, in the last chunk
            again = self.size > 8 and value.startswith(so_far)     # all of it, and more
            if so_far == "{}" or again:
                self.pieces, self.size, self.repeats = [], 0, again
        elif self.repeats:                  # or did it only look so
            self.torn = True
        self.pieces.append(value)
        self.size += len(value)
        if len(self.pieces) > MAX_PIECES:   # small ones take ten times their size
            self.pieces = ["".join(self.pieces)]

    def arguments(self) -> str:
        return "".join(self.pieces).strip()


def is_object(text: str) -> bool:
    return isinstance(value_in(text), dict)


class Calls:
    """The tool calls of one message in order of appearance, however they are cut.

    A call is known by its index and its id, by its id alone where servers leave the
    index out, by its place in the list where there is neither.
    """

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.calls: List[Call] = []
        self.at: Dict[Any, Call] = {}       # by index, id or place; None: the last one
        self.cut = False                    # the last call ends in the middle
        self.broken = False                 # one means nothing, or lacks arguments
        self.size = 0                       # characters of all arguments
        self.notes: List[Tuple[str, List[str]]] = []    # calls, and what those took

    def grow(self, entries: Any) -> None:
        entries = entries if isinstance(entries, list) else [entries]
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                continue
            function = entry.get("function")
            function = function if isinstance(function, dict) else entry
            name, value = function.get("name"), function.get("arguments")
            name = name if isinstance(name, str) else ""
            call = self.find(entry, name, value, place if len(entries) > 1 else -1)
            before = call.size
            call.grow(name, value, self.tools)
            self.size += call.size - before
            if (self.size > MAX_ARGUMENT_BYTES or len(self.calls) > MAX_CALLS
                    or len(call.name) > MAX_NAME_CHARS):
                raise ProxyError(502, f"upstream sent more than {MAX_CALLS} tool calls,"
                                      f" {MAX_ARGUMENT_BYTES} characters for them, or "
                                      f"{MAX_NAME_CHARS} for a tool's name")

    def find(self, entry: Json, name: str, value: Any, place: int) -> Call:
        """The call that an entry belongs to, a new one if it begins one."""
        index, call_id = str(entry.get("index")), entry.get("id")
        call_id = call_id[:MAX_NAME_CHARS] if isinstance(call_id, str) else ""
        key = (index if index.isdigit() else ("id", call_id) if call_id
               else ("place", place) if place >= 0 else None)
        call = self.at.get((key, call_id)) if call_id else None
        call = call or self.at.get(key)
        if call and not name and call_id in ("", call.id):
            new = False
        elif call and (call_id in ("", call.id) or not call.id):
            begins = isinstance(value, str) and value[:1] == "{" and is_object(value)
            so_far = call.arguments() if key is None or begins else ""
            new = name and (key is None and name != call.name or is_object(so_far) and (
                so_far != "{}" and (key is None or name != call.name
                                    or value_in(value) != value_in(so_far))))
        else:
            new = not call or call_id != call.id
        if new:
            call = Call(call_id)
            self.calls.append(call)
        call.id = call.id or call_id
        self.at.update({key: call, (key, call_id): call, None: call})
        return call

    def whole(self, finish: str) -> Told:
        """All calls, as their tools want them, at the end of the completion.

        One that the output limit cut is passed on as it is, no JSON and so nothing
        that could run; if it has no arguments yet, it is left out.
        """
        out, self.notes, self.broken = [], [], False
        for call in self.calls:
            arguments = call.arguments()
            cut = finish in CUT_FINISHES and not is_object(arguments)
            self.cut = self.cut or cut
            if cut and not call.size:
                continue
            name = declared_name(call.name, self.tools)
            tool = self.tools.get(name) or {"name": plain_name(call.name)}
            good = arguments if cut else self.good(call, tool, bool(finish))
            out.append((tool["name"], good))
        return out

    def good(self, call: Call, tool: Json, whole: bool) -> str:
        """The arguments as the tool's schema wants them, or as they came, and then so
        that they cannot run; `whole`: a finish_reason says that no more was to come."""
        arguments = call.arguments()
        value, notes = read_arguments(arguments, input_schema(tool), whole)
        if value is None or lacking(value, tool):
            own = own_markup(call.name, arguments, tool)
            if own:
                value, notes = decode_json(own), ["markup"]
        torn = call.torn or not call.name
        self.broken = (self.broken or torn or value is None or bool(
            lacking(value, tool)) or any(map(is_bare_path, value.items())))
        if notes:
            self.notes.append((tool["name"], notes))
        if torn or value is None and is_object(arguments):
            return encode_json(unparsed(arguments))
        return encode_json(value) if value is not None and (
            notes or not arguments) else arguments


def is_bare_path(argument: Tuple[str, Any]) -> bool:
    r"""Whether an argument is a path like D:\new, whose backslash was not escaped."""
    name, value = argument
    return bool(isinstance(value, str) and re.match("[A-Za-z]:[\b\f\n\r\t]", value)
                and re.search("(?i)path|file|dir|cwd", name))


# ---- what is held of a text: think tags, marks of calls, stop sequences

TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<mm:think>": "</mm:think>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",         # Kimi K2
    "<|open|>think<|sep|>": "<|close|>think<|sep|>",    # Kimi K3
    "<|channel>thought\n": "<channel|>",                # Gemma 4
    "<|channel|>analysis<|message|>": "<|end|>",        # gpt-oss
    "<|start|>assistant<|channel|>analysis<|message|>": "<|end|>",
    "Here's my thought process:": "Here's my response:",    # Granite
}


def think_tags(opens: str = "") -> Stage:
    """Text in, [(kind, text)] out: leading tagged passages are thinking.

    A tag counts only before the answer has begun: what is written about tags later
    is text.  Held back is no more than could become a tag.  With `opens` the opening
    tag was in the prompt: all up to `opens` is thinking.
    """
    held = closer = ""
    after = False           # a passage: then whitespace before the answer is its own
    piece = yield []
    while piece is not None:
        out, held, closer = split_tags(held + piece, closer)
        after = after or bool(out or closer)
        bare = held.lstrip()
        begun = bare and not could_begin(bare) or len(held) > MAX_BLANK_CHARS
        if begun and not closer and opens and not after:
            piece, held, closer = held, "", opens
            continue
        if begun and not closer:
            piece = yield out + ([("text", bare)] if after else orphan(held))
            while piece is not None:
                piece = yield [("text", piece)]
            held = ""
            break
        piece = yield out
    yield [("thinking" if closer else "text", held)] if held else []


def split_tags(held: str, closer: str) -> Tuple[List[Tuple[str, str]], str, str]:
    """The passages in `held`; what remains; the tag that closes it, "" outside one."""
    out = []
    while True:
        if closer:
            thought, found, rest = held.partition(closer)
            if not found:
                keep = len(held) - ending(held, (closer,))
                out += [("thinking", held[:keep])] if keep else []
                return out, held[keep:], closer
            out += [*([("thinking", thought)] if thought else []), ("closed", closer)]
            held, closer = rest, ""
        bare = held.lstrip()
        opener = next((tag for tag in TAGS if bare.startswith(tag)), "")
        if not opener:
            return out, held, ""
        held, closer = bare[len(opener):], TAGS[opener]


def orphan(text: str) -> List[Tuple[str, str]]:
    """Text that may hold a closing tag whose opening one was in the prompt."""
    found = ORPHAN.search(text)
    if not found or any(opener in text[:found.start()] for opener in TAGS):
        return [("text", text)]
    *lines, line = text[:found.start()].split("\n")
    place = functools.reduce(after_line, [*lines, line + "x"], Markdown())
    if place.shown() or place.ticks or OPENING.search(text[:found.start()]):
        return [("text", text)]
    return [("before", text[:found.start()])] * bool(found.start()) + [
        ("orphan", found[0].strip()), ("text", text[found.end():].lstrip())]


# A closing tag that stands alone: not one that a text speaks of, with words around it.
CLOSER = "|".join(re.escape(closer) for closer in TAGS.values() if "/" in closer)
ORPHAN = re.compile(rf"(?m)^[ \t]*(?:{CLOSER})|(?:{CLOSER})(?=[ \t]*$)|"
                    rf"(?<=[\w.!?)])(?:{CLOSER})(?=[\w<])")


def could_begin(text: str) -> bool:
    return any(len(text) < len(tag) and tag.startswith(text)
               for tag in (*TAGS, *TAGS.values()))


def ending(text: str, words: Iterable[str]) -> int:
    """How many of the last characters of `text` could begin one of the words."""
    sizes = ((size, word[:size]) for word in words
             for size in range(1, min(len(word), len(text) + 1)))
    return max((size for size, start in sizes if text.endswith(start)), default=0)


class Markdown(NamedTuple):
    """Where the lines so far lead in a Markdown text: CommonMark 0.31, as far as it
    says what is code, quoted, or a comment; where that takes more, it is."""
    fence: str = ""         # what opened a fence
    inset: int = 0          # and how far from the margin
    ticks: Tuple[int, ...] = ()     # of backticks that may have opened code in this
                                    # paragraph, and of those behind them
    quoted: bool = False
    html: str = ""          # pattern of what ends a block or comment of HTML
    far: bool = False       # from the margin, as code is

    def shown(self) -> bool:
        """Whether what stands here is code, quoted, or HTML."""
        return bool(self.fence or self.quoted or self.html or self.far)


OUTSIDE = Markdown()
ITEMS = re.compile(r"(?: *(?:[-*+]|[0-9]{1,9}[.)])(?= |\Z))*")
FENCE = re.compile(r" *(`{3,}(?=[^`]*\Z)|~{3,})(.*)")
INLINE = re.compile(r"(?<!\\)(\\*)(`+)|<!--|-->")
BLANK = r"^\s*\Z"
BLOCKS = {r"<(?:pre|script|style|textarea)\b": r"</(?:pre|script|style|textarea)>",
          "<!--": "-->", r"<\?": r"\?>", r"<!\[CDATA\[": r"\]\]>", "<![A-Z]": ">",
          "</?[A-Z]": BLANK}            # how HTML begins a line, and what ends it


def after_line(place: Markdown, line: str) -> Markdown:
    """The place behind one more line."""
    if place == OUTSIDE and (not line or line[0].isalpha() and "`" not in line
                           and "<!--" not in line):
        return place                    # as most lines are
    line = line.rstrip("\r").expandtabs(4)
    items = ITEMS.match(line).end()
    found = FENCE.fullmatch(line, items)
    if place.fence:
        found = FENCE.fullmatch(line)
        ends = found and found[1].startswith(place.fence) and not found[2].strip() and (
            0 <= found.start(1) - place.inset < 4)
        return place._replace(fence="") if ends else place
    bare = line[items:].lstrip(" ")
    html = place.html or next((end for begin, end in BLOCKS.items()
                               if re.match(begin, bare, re.I)), "")
    if html and html != INSIDE:
        ended = re.search(html, bare, re.I)
        return Markdown(html="" if ended else html, far=bool(line.strip()))
    if found:
        return Markdown(found[1], found.start(1))
    if not line.strip():
        return OUTSIDE
    run = () if items or bare[:1] == "#" else place.ticks
    for word in INLINE.finditer(bare):
        size = len(word[2] or "") - (0 if run else len(word[1] or "") % 2)
        if html or word[0] == "<!--":
            html = "" if word[0] == "-->" or run and not html else INSIDE
        elif size > 0:
            run = () if run[:1] == (size,) else (*run, size)[:MAX_RUNS]
    far = len(line) - len(line.lstrip(" ")) > 3 or (
        items and len(line) - items - len(bare) > 4)
    return Markdown("", 0, () if bare[:1] == "#" else run,
                    place.quoted or bare[:1] == ">", html, bool(far))


INSIDE = "inside"   # of a comment in a paragraph, and no longer than that
MAX_RUNS = 16       # of backticks that wait for their like; a paragraph has few


DEBRIS = [(models, re.compile(pattern)) for models, pattern in [    # says nothing
    ("gpt-oss", rf"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary){S}"
     rf"(?:<\|constrain\|>json)?<\|message\|>|<\|(?:return|end)\|>"),
    ("deepseek", rf"<{BAR}[^<>|\uff5c\s][^<>|\uff5c\n]{{0,63}}{BAR}>"),
    ("kimi", r"<\|(?:open|close)\|>[^<|\n]{0,64}<\|sep\|>|"
     r"<\|tool_calls?_section_(?:begin|end)\|>"),
]]
STARTS = sorted({start for row in FORMATS for start in row.starts})
OPENING = re.compile("|".join(map(re.escape, STARTS)))
OPENINGS = [re.compile("|".join([*map(re.escape, [*STARTS, *TAGS]), CLOSER, *more]))
            for more in ([], [f"<{BAR}"])]      # of models that leave debris
UNSURE = re.compile(rf"<{BAR}(?:[\w|\uff5c ][^\n]{{0,80}})?")     # may become debris
WRAPS = tuple(start for start in STARTS if start[-1] == ">")
BEGUN = {start[:size] for start in (*STARTS, *TAGS, *TAGS.values())
         for size in range(1, len(start))}
LONGEST = max(map(len, BEGUN)) + 1
MARKS = re.compile("[<\\[\\]\u25c1]")     # text without them begins nothing, once begun
MAX_TOKENS = 256                # of text, until the lines in it are looked at


class TailWatch:
    """Text in, text out, in pieces, up to a mark; what begins there is the `tail`."""

    def __init__(self, tools: Tools, model: str = "") -> None:
        self.tools = tools
        self.debris = next((pattern for models, pattern in DEBRIS
                            if models in model.lower()), None)
        self.orphan = ""                # a tag that ended thinking without beginning it
        self.place = Markdown()
        self.line: List[str] = []       # text since the lines that led to the place
        self.above = ""                 # the last of them that was not blank
        self.held = ""                  # may begin a mark
        self.tail: List[str] = []
        self.size = 0                   # characters of the tail
        self.over = False               # all is text: the tail was too long, or none
        self.begun = False              # there was more than blanks
        self.opener = False             # a tag that opens thinking was told as text
        self.idle = False               # a text without MARKS is just text

    def feed(self, text: str, last: bool = False) -> str:
        """What of the text so far is certainly text, and was not told before."""
        if self.over:
            return text
        if self.tail:
            self.tail.append(text)
            self.size += len(text)
            return "" if self.size <= MAX_TAIL_CHARS else self.text()
        text, self.held = self.held + text, ""
        told, at = [], 0
        opening = OPENINGS[bool(self.debris)]
        for found in iter(lambda: opening.search(text, at), None):
            self.tell(told, text[at:found.start()])
            kind, at = self.kind(text, found, last)
            if kind == "text":
                self.tell(told, text[found.start():at])
            elif kind != "debris":
                self.held = text[found.start():]
                break
        if not self.held:
            sizes = range(min(len(text) - at, LONGEST), 0, -1)
            keep = next((size for size in sizes if text[-size:] in BEGUN), 0)
            place = len(text) - (0 if last else keep)
            self.tell(told, text[at:place])
            self.held = text[place:]
        elif kind == "tail":
            self.tail, self.size, self.held = [self.held], len(self.held), ""
        self.idle = self.begun and not (self.held or self.tail)
        return "".join(told)

    def tell(self, told: List[str], text: str) -> None:
        told.append(text)
        self.line.append(text)
        self.begun = self.begun or bool(text.strip())

    def text(self) -> str:
        """The tail as text; there is no other."""
        text, self.tail, self.over = "".join(self.tail), [], True
        self.idle = False
        return text

    def lead(self) -> str:
        """The text of the line that we are in, once the lines before it are seen."""
        *lines, line = "".join(self.line).split("\n")
        for whole in lines:
            self.place = after_line(self.place, whole)
            self.above = whole.rstrip()[-MAX_HEAD_CHARS:] or self.above
        if len(line) > MAX_PASSAGE_CHARS:       # longer ones count as several
            self.place = after_line(self.place, line)
            line = " " * min(len(line) - len(line.lstrip()), 4) + "x"
        self.line = [line]
        return line

    def kind(self, text: str, found: Any, last: bool) -> Tuple[str, int]:
        """What begins at a place: a "tail", or "debris" or "text" up to another place;
        "held" is what cannot be told yet."""
        at, end, line = found.start(), found.end(), self.lead()
        rest = len(text) - at
        if found[0] in TAGS:
            self.opener = True
            return "text", end
        if found[0] in TAGS.values():
            if not last and rest < MAX_HEAD_CHARS and not text[end:].strip(" \t"):
                return "held", at
            near = ORPHAN.search(line + text[at:end + 80])
            if self.opener or not near or near.end() != len(line) + len(found[0]) or (
                    after_line(self.place, line + "x").shown()):
                return "text", at + 1
            self.orphan = found[0]
            return "debris", end
        if not ANYWHERE.match(text, at) and (line.strip(" ") or len(line) > 3
                                             or self.begun and text[at] == "f"
                                             or self.above.endswith(WRAPS)):
            return "text", at + 1       # nor within what begins in a line
        heads = [row.head.match(text, at) for row in FORMATS
                 if self.tools and text.startswith(row.starts, at)]
        head = next(filter(None, heads), None)
        name = head and head.groupdict().get("name")
        if name and not (declared_name(name, self.tools) or KIMI_ID.match(name)):
            head = None
        debris = self.debris.match(text, at) if self.debris and not head else None
        unsure = not (head or last) and (
            rest <= MAX_HEAD_CHARS if heads else text[at:at + LONGEST] in BEGUN
            or not debris and UNSURE.fullmatch(text, at))
        if not (head or debris or unsure):
            return "text", at + 1
        here = after_line(self.place, line + "x")
        if here.shown():
            return "text", at + 1
        code = closed(text, at, here.ticks, last) if here.ticks else False
        if code:
            return "text", at + 1
        if unsure or code is None:
            return "held", at
        return ("tail", at) if head else ("debris", debris.end())


def closed(text: str, at: int, ticks: Tuple[int, ...], last: bool) -> Optional[bool]:
    """Whether a place is in code within a line: backticks before it have their like
    behind it, in the same paragraph.  None if more text must tell."""
    closer = "|".join(rf"(?<!`)`{{{size}}}(?!`)" for size in ticks)
    found = re.compile(rf"{closer}|\n[ \t\r]*\n").search(
        text, at, at + MAX_PASSAGE_CHARS)
    if found and (last or found.end() < len(text)):
        return found[0][0] == "`"
    return None if not last and len(text) - at < MAX_PASSAGE_CHARS else False


def stop_watch(stops: Tuple[str, ...]) -> Stage:
    """Text in, [(text, stop)] out: up to the first stop sequence, and which it was."""
    held = ""
    piece = yield []
    while piece is not None:
        held += piece
        found = [(held.index(stop), stop) for stop in stops if stop in held]
        if found:
            place, stop = min(found)
            yield [(held[:place], stop)]
        keep = len(held) - ending(held, stops)
        piece = yield [(held[:keep], None)]
        held = held[keep:]
    yield [(held, None)]


# ---- a message in one piece

def fold(events: Iterable[Event]) -> Json:
    """The message that a finished run of events spells out."""
    message: Json = {}
    arguments: List[str] = []
    for name, data in events:
        if name == "message_start":
            message = {**data["message"], "content": []}
        elif name == "content_block_start":
            message["content"].append(dict(data["content_block"]))
            arguments = []
        elif name == "content_block_delta":
            fold_delta(message["content"][-1], data["delta"], arguments)
        elif name == "content_block_stop" and arguments:
            message["content"][-1]["input"] = parsed_input("".join(arguments))
        elif name == "message_delta":
            usage = {**message.get("usage", {}), **data["usage"]}
            message.update(data["delta"], usage=usage)
    return message


def fold_delta(block: Json, delta: Json, arguments: List[str]) -> None:
    for field in ("text", "thinking"):
        if field in delta:
            block[field] += delta[field]
    if "signature" in delta:
        block["signature"] = delta["signature"]
    if "partial_json" in delta:
        arguments.append(delta["partial_json"])


def parsed_input(text: str) -> Json:
    """A call's input; text that is no object is kept where Claude Code looks for it."""
    value = value_in(text)
    return value if isinstance(value, dict) else unparsed(text)


def unparsed(text: str) -> Json:
    """An input that no tool takes, which shows what the model wrote."""
    return {"__unparsedToolInput": {"raw": text, "len": len(text)}}


# ---- 17. Event streams: bytes to chunks, events to bytes ---------------------
# The WHATWG event stream, sans-I/O and cut anywhere, and the whole translation:
# upstream's bytes in, the client's bytes out.

class Frame(NamedTuple):
    """One event of an event stream, with the comments that stood in it."""
    event: str
    data: str
    comments: List[str]


def translation(message: Message) -> Stage:
    """Bytes of a completion stream in, bytes of a message stream out.

    next() gives the message_start, send(bytes) what they add, send(None) the end.
    Raises ProxyError for an error inside the stream.  The last output ends with the
    event message_stop; what upstream sends after it is not looked at.
    """
    frames = started(sse_frames())
    data = yield encoded(message.start())
    while data is not None:
        found = [] if message.over else frames.send(data)
        chunks = frame_chunks(found, message.reading.asked)
        data = yield encoded(message.events(chunks))
    found = [] if message.over else frames.send(None)
    chunks = frame_chunks(found, message.reading.asked)
    yield encoded(message.events(chunks) + message.end_of_input())


def sse_frames() -> Stage:
    """Bytes in, Frames out; lines end in CR, LF or CRLF, the last frame at None.

    An unfinished line grows in place: rest + piece would be quadratic for a tool call
    of megabytes, and a list of small pieces takes many times their size.
    """
    frame: Tuple[List[str], List[str], List[str]] = ([], [], [])
    held = bytearray()
    after_cr, first = False, True
    piece = yield []
    while piece is not None:
        if after_cr and piece[:1] == b"\n":     # the LF of a CRLF that was cut
            piece, after_cr = piece[1:], False
        if b"\r" in piece:
            after_cr = piece[-1:] == b"\r"
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        elif piece:
            after_cr = False
        if not held and not first and not any(frame) and is_lone_frame(piece):
            piece = yield [Frame("", piece[6:-2].decode("utf-8", "replace"), [])]
            continue
        held += piece
        if len(held) > MAX_LINE_BYTES and b"\n" not in piece:
            raise ProxyError(502, f"upstream sent a line over {MAX_LINE_BYTES} bytes")
        out: List[Frame] = []
        if b"\n" in piece:
            *lines, last = bytes(held).split(b"\n")
            if first:
                lines[0], first = re.sub(rb"^\xef\xbb\xbf", b"", lines[0]), False
            held = bytearray(last)
            sse_lines(lines, frame, out)
            check_frame(frame)
        piece = yield out
    out = []
    sse_lines([bytes(held), b""], frame, out)
    yield out


def is_lone_frame(piece: bytes) -> bool:
    """Whether a piece is one line of data and a blank one, as nearly every token is."""
    return (piece[:6] == b"data: " and piece[-1:] == b"\n"
            and piece.find(b"\n") == len(piece) - 2)


def sse_lines(lines: List[bytes], frame: Tuple[List[str], List[str], List[str]],
              out: List[Frame]) -> None:
    """Add lines to the open frame (events, data, comments); whole frames go to out."""
    events, data, comments = frame
    for line in lines:
        if line[:5] == b"data:":
            data.append(line[6 if line[5:6] == b" " else 5:].decode("utf-8", "replace"))
        elif not line:
            if data or events:
                event = events[-1] if events else ""
                out.append(Frame(event, "\n".join(data), list(comments)))
            for part in frame:
                part.clear()
        elif line[:1] == b":":
            comments.append(line[1:].decode("utf-8", "replace").strip())
        elif line[:6] == b"event:":
            events.append(line[6:].decode("utf-8", "replace").strip())
        elif line[:1] == b"{":      # JSON where a stream should be: Ollama's errors
            out.append(Frame("", line.decode("utf-8", "replace"), []))


def check_frame(frame: Tuple[List[str], List[str], List[str]]) -> None:
    """Raise ProxyError for an open frame that grows without end."""
    sizes = [len(line) for lines in frame for line in lines]
    if len(sizes) > MAX_FRAME_LINES or sum(sizes) > MAX_LINE_BYTES:
        raise ProxyError(502, f"upstream sent an event of over {MAX_FRAME_LINES} lines "
                              f"or {MAX_LINE_BYTES} bytes")


def frame_chunks(frames: List[Frame], asked: Asked) -> Iterator[Json]:
    """The frames' chunks; what is no chunk is left out, what is an error is raised.

    One at a time: an error after the end of the message is none.
    """
    for event, data, comments in frames:
        if event and event not in ("message", "error"):
            continue                    # Dynamo's side channels
        if data.strip() == "[DONE]" and event != "error":
            yield DONE
            continue
        try:
            chunk = decode_json(data)
        except (ValueError, RecursionError):
            chunk = None
            if event != "error" and data.strip():   # may be a piece of a call
                words = "upstream sent a chunk that is not JSON"
                raise ProxyError(502, words, again="broken") from None
        if event == "error":            # Dynamo says it in a comment, or as plain JSON
            words = sentence(chunk) or data.replace("[DONE]", "") or " ".join(comments)
            status = stated_status(chunk, 500) if isinstance(chunk, dict) else 500
            raise refusal(asked, status, words.strip() or "an error without words")
        if isinstance(chunk, dict):
            check_chunk(chunk, asked)
            yield chunk


def check_chunk(chunk: Json, asked: Asked) -> None:
    """Raises the error that a chunk, or a whole completion, holds inside a 200."""
    base = chunk.get("base_resp")
    failed = base and isinstance(base, dict) and base.get("status_code")
    if failed or chunk.get("error") or chunk.get("object") == "error":
        raise refusal(asked, stated_status(chunk, 500), sentence(chunk) or "an error")


def encoded(events: List[Event]) -> List[bytes]:
    return [encode_event(name, data) for name, data in events]


TEXT_DELTA = ('event: content_block_delta\ndata: {"type":"content_block_delta",'
              '"index":%d,"delta":{"type":"text_delta","text":%s}}\n\n')
encode_string = json.encoder.encode_basestring_ascii


def encode_event(name: str, data: Json) -> bytes:
    """One event as bytes, in ASCII: lone surrogates cannot break it."""
    delta = data.get("delta")
    if delta and delta.get("type") == "text_delta":     # the path of a token
        text = encode_string(delta["text"])
        return (TEXT_DELTA % (data["index"], text)).encode("ascii")
    payload = encode_json({"type": name, **data})
    return f"event: {name}\ndata: {payload}\n\n".encode("ascii")


# ---- 18. Passing: what stays as it is ----------------------------------------
# Bodies and event streams of servers that speak the client's own language: byte for
# byte, but for the model's name and what only its maker can read.

class Tongue(NamedTuple):
    """A language that clients speak: our own words in it, and what passes by."""
    error: Callable[[ProxyError, str], Json]    # the body of an error
    event: Callable[[str, Json], bytes]         # one event of its streams
    watch: Callable[[Passed, bytes], bytes]     # whole frames, as they are to go out


class Parcel(NamedTuple):
    """A request that goes upstream as it came, in the place of a chat."""
    model: str              # upstream's id
    path: str               # below the base URL, with the client's query
    data: bytes             # the body, with that model in it
    stream: bool
    headers: Headers = []   # the client's, that are for upstream


SIGNED = {"thinking": "signature", "redacted_thinking": "data"}     # by whom, where
GENUINE = re.compile("[A-Za-z0-9+/]{64,}={0,2}")    # Anthropic's have some hundred
LEFT_EMPTY = {"type": "text", "text": "(no text)"}  # roles have to alternate
STATUSES = {kind: status for status, kind in ERROR_TYPES.items()
            if status not in (405, 503)}            # of errors inside a stream


def passed_body(raw: bytes, model: str, own: bool = False) -> bytes:
    """A request's body for a model of upstream's, else byte for byte as it came, but
    for thinking that upstream has not signed; `own`: it is Anthropic.

    The body is a JSON object, as parse_body has found.
    """
    text = raw.decode("utf-8")
    found, _ = object_members(text, object_start(text), DECODER)
    named = [each for each in found if each.name == "model"]
    edits = [(each.at, each.end, encode_json(model)) for each in named
             if each.value != model]
    if not named:
        start = object_start(text) + 1
        comma = "," if found else ""
        edits.append((start, start, f'"model":{encode_json(model)}{comma}'))
    for each in found:
        history = each.name == "messages" and own_turns(each.value, own)
        if history and history is not each.value:
            edits.append((each.at, each.end, encode_json(history)))
    return edited(text, edits).encode("utf-8")


def edited(text: str, edits: List[Tuple[int, int, str]]) -> str:
    for start, end, instead in sorted(edits, reverse=True):
        text = text[:start] + instead + text[end:]
    return text


def own_turns(history: Any, own: bool) -> Any:
    """A conversation without what upstream cannot verify; itself, if it has none."""
    if not isinstance(history, list):
        return history
    mended = [own_turn(turn, own) for turn in history]
    same = all(new is turn for new, turn in zip(mended, history))
    return history if same else mended


def own_turn(turn: Any, own: bool) -> Any:
    blocks = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(blocks, list) or turn.get("role") != "assistant":
        return turn
    kept = [block for block in blocks if not is_foreign(block, own)]
    return turn if len(kept) == len(blocks) else {**turn, "content": kept or [
        LEFT_EMPTY]}


def is_foreign(block: Any, own: bool) -> bool:
    """Whether a block is thinking that was signed here, or, where upstream is
    Anthropic, by anybody else but Anthropic."""
    place = SIGNED.get(str(block.get("type"))) if isinstance(block, dict) else None
    if not place:
        return False
    mark = block.get(place)
    return mark == SIGNATURE or own and not GENUINE.fullmatch(str(mark))


def with_model(text: str, path: Tuple[str, ...], model: str) -> str:
    """A JSON text with another model's name at a path of objects, if it has one."""
    edits = []
    for each in object_members(text, object_start(text), DECODER)[0]:
        inner = text[each.at:each.end]
        if each.name == path[0] and len(path) == 1:
            edits.append((each.at, each.end, encode_json(model)))
        elif each.name == path[0] and isinstance(each.value, dict):
            edits.append((each.at, each.end, with_model(inner, path[1:], model)))
    return edited(text, edits)


class Passed:
    """An answer that passes, in the place of a Message: what is to be known of it."""

    def __init__(self, model: str, tongue: str, path: str = "",
                 headers: Headers = []) -> None:
        self.model, self.tongue = model, tongue     # as the client asked for it
        self.path, self.headers = path, headers     # of its request
        self.restart(Reading())

    def restart(self, reading: Optional[Reading] = None) -> None:
        """Forget an answer of which nothing is out yet: upstream is asked anew."""
        self.reading = reading or self.reading      # for error texts
        # what is held
        self.lead = b""             # before the first word
        self.ahead = b""            # what came in one read with an error, before it
        self.waiting = 0            # bytes of a frame that is not whole
        # what is known
        self.begun = False          # with the first word; then all goes out
        self.usage: Dict[str, int] = {}
        self.finish = ""
        self.over = False
        # what a Message has, and nothing that passes
        self.calls = Calls({})
        self.repairs: List[Tuple[str, List[str]]] = []
        self.fielded, self.watch = False, TailWatch({})

    def start(self) -> List[Event]:
        return []                   # upstream's own

    def held(self) -> int:
        return self.waiting

    def complete(self) -> bool:
        """Whether all is said, and only the end is missing: errors then are none."""
        return bool(self.finish and not self.over)

    def events(self, chunks: List[Json]) -> List[Event]:
        """The end of an answer that lacks it."""
        if chunks != [DONE]:
            raise ProxyError(502, "upstream answered in one piece where a stream was "
                                  "asked for")
        self.over = True
        return [("message_stop", {})]

    def nudge(self) -> Event:
        """An event that says nothing, but resets Claude Code's watchdog; a ping where
        none can stand."""
        if self.tongue != "anthropic" or not self.begun or self.finish:
            return "ping", {}
        usage = {"output_tokens": self.usage.get("output_tokens", 0)}
        delta = {"stop_reason": None, "stop_sequence": None}
        return "message_delta", {"delta": delta, "usage": usage}

    def count(self, usage: Any) -> None:
        """Usage in either language, which may come more than once, and grows."""
        if self.tongue == "openai":
            told = message_usage(usage)
        else:
            usage = usage if isinstance(usage, dict) else {}
            told = {name: whole(usage.get(name)) for name in EMPTY_USAGE}
        for name, value in told.items():
            self.usage[name] = max(value, self.usage.get(name, 0))

    def final_usage(self) -> Dict[str, int]:
        return {**EMPTY_USAGE, **self.usage}

    def answer(self, raw: bytes, value: Json) -> bytes:
        """An answer that does not stream; `value` is what it says."""
        self.count(value.get("usage"))
        if self.tongue == "openai":
            return raw
        text = raw.decode("utf-8", "surrogateescape")
        named = with_model(text, ("model",), self.model)
        return named.encode("utf-8", "surrogateescape")

    def told(self, frames: bytes) -> List[bytes]:
        """What goes out of whole frames; until the first word, nothing."""
        out = TONGUES[self.tongue].watch(self, frames)
        if not self.begun:
            self.lead += out
            if len(self.lead) > MAX_LINE_BYTES:
                raise ProxyError(502, f"upstream sent over {MAX_LINE_BYTES} bytes "
                                      "before its first word")
            return []
        out, self.lead = self.lead + out, b""
        return [out] if out else []

    def end_of_input(self, rest: bytes) -> List[bytes]:
        """What is left where upstream has not said that it was at its end."""
        sound = b"[DONE]" in rest or bool(frame_event(rest)[1])
        out = self.told(rest.rstrip() + b"\n\n") if sound else []
        if self.over:
            return out
        if self.complete():
            return out + encoded(self.events([DONE]))
        torn = rest.strip() and not sound
        if not self.begun and not torn:
            raise empty_answer(self.reading.asked)
        if torn or self.tongue == "anthropic":
            words = "upstream broke off in the middle of its answer"
            raise ProxyError(502, words, again="broken")
        self.over = True
        return out


def passage(passed: Passed) -> Stage:
    """Bytes of an event stream in, the same out, frame by frame: between them there is
    room for pings.  send(None) is the end; raises ProxyError as `translation` does."""
    held = bytearray()
    piece = yield []
    while piece is not None:
        frames = piece
        if held or piece[-2:] != b"\n\n":       # nearly always it is
            known = len(held)
            held += piece
            if len(held) > MAX_LINE_BYTES:
                words = f"upstream sent an event of over {MAX_LINE_BYTES} bytes"
                raise ProxyError(502, words)
            end = frames_end(held, known)
            frames = bytes(held[:end])
            del held[:end]
            passed.waiting = len(held)
        piece = yield passed.told(frames) if frames else []
    yield passed.end_of_input(bytes(held))


def frames_end(held: bytearray, known: int) -> int:
    """Where the last whole frame ends; 0 if none does, as up to `known` none did."""
    since = max(known - 3, 0)
    ends = [(held.rfind(end, since), len(end)) for end in FRAME_ENDS]
    return max(at + size if at >= 0 else 0 for at, size in ends)


FRAME_ENDS = (b"\n\n", b"\n\r\n", b"\r\r")
FRAME = re.compile(rb".*?(?:\n\r?\n|\r\r)", re.S)


def frame_event(raw: bytes) -> Tuple[str, Json, str]:
    """The type and value of the event that a frame is, and its text as it stands;
    nothing of one that is none."""
    for event, data, _ in started(sse_frames()).send(raw + b"\n\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = decode_json(data)
            if isinstance(value, dict):
                return str(value.get("type") or event), value, data
    return "", {}, ""


WORDS_OF = {"content_block_delta", "content_block_stop", "message_delta",
            "message_stop"}     # events with which an answer has begun


def watch_messages(passed: Passed, frames: bytes) -> bytes:
    """Frames of a message stream: usage is noted, the model's name changed; an error
    is raised."""
    if passed.begun and b'"message_' not in frames and b'"error"' not in frames:
        return frames                       # the path of a token
    out = b""
    for raw in FRAME.findall(frames):
        kind, value, text = frame_event(raw)
        if kind == "error" and passed.finish:       # all is said
            kind, raw = "message_stop", encode_event("message_stop", {})
        if kind == "error":
            passed.ahead = passed.lead + out if passed.begun else b""
            raise stream_error(passed, value, text)
        if kind == "message_start":
            passed.count(shaped(value.get("message"), dict).get("usage"))
            raw = renamed_frame(raw, text, passed.model)
        if kind == "message_delta":
            passed.count(value.get("usage"))
            delta = shaped(value.get("delta"), dict)
            passed.finish = str(delta.get("stop_reason") or passed.finish)
        out += raw
        passed.begun = passed.begun or kind in WORDS_OF
        if kind == "message_stop":
            passed.over = True
            break                           # what comes after it is not looked at
    return out


def renamed_frame(raw: bytes, text: str, model: str) -> bytes:
    """A message_start, whose JSON is `text`, with another model in it."""
    changed = with_model(text, ("message", "model"), model).encode("utf-8")
    found = text.encode("utf-8")
    if found in raw:
        return raw.replace(found, changed, 1)
    joined = b" ".join(changed.splitlines())        # it stood in several lines
    return b"event: message_start\ndata: " + joined + b"\n\n"


def watch_completions(passed: Passed, frames: bytes) -> bytes:
    """Frames of a completion stream, which stay as they are: usage is noted; an error
    before the first word is raised."""
    last = frames[-16:].rstrip().endswith(b"[DONE]")     # not a word of an answer
    if not passed.begun or b'"usage"' in frames and USAGE.search(frames):
        for raw in FRAME.findall(frames):
            kind, value, text = frame_event(raw)
            if not passed.begun and (kind == "error" or value.get("error")):
                raise stream_error(passed, value, text)
            passed.begun = passed.begun or bool(value) or b"[DONE]" in raw
            passed.count(value.get("usage"))
    if last:
        passed.finish, passed.over = "stop", True
    return frames


USAGE = re.compile(rb'"usage"\s*:\s*\{')         # some say null with every token


def stream_error(passed: Passed, value: Json, text: str) -> ProxyError:
    kind = shaped(value.get("error"), dict).get("type")
    status = stated_status(value, STATUSES.get(str(kind), 500))
    words = sentence(value) or "an error without words"
    error = refusal(passed.reading.asked, status, words)
    return kept_words(passed, error, status, value)


def kept_words(passed: Passed, error: ProxyError, status: int,
               value: Any) -> ProxyError:
    """The error, in upstream's own words where those are in the client's language.

    What makes Claude Code compact stays in the words that it knows, and what makes it
    do without system messages comes in such.
    """
    secret, words = passed.reading.asked.config.api_key, error.words
    error.words = ""                # nothing is mended in what passes
    said = shaped(shaped(value, dict).get("error"), dict)
    message = said.get("message")
    if passed.tongue == "openai":
        error.status = status if 400 <= status < 600 else 502
        error.details = {name: redacted(said[name], secret)
                         for name in ("type", "param", "code")
                         if isinstance(said.get(name), str)}
    elif (error.fallback == "window" or not isinstance(said.get("type"), str)
          or not 400 <= status < 600):
        return error
    else:
        error.status, error.kind = status, said["type"]
    if isinstance(message, str):
        message = redacted(message[:MAX_ERROR_CHARS], secret)[:MAX_REASON_CHARS]
        if (passed.tongue == "anthropic" and SYSTEM.search(passed.reading.asked.sent)
                and re.search(UNKNOWN_ROLE, words, re.I)):
            message = f'Unexpected role "system" in messages: {message}'
        if error.status in (401, 403):  # Claude Code takes it for "not logged in"
            message = re.sub("(?i)x-api-key", "API key", message)
        if error.status == 401:
            hint = elsewhere(passed.reading.asked.config)
            message = f"{message.rstrip('.')}.{hint}" if hint else message
        error.message = message
    return error


SYSTEM = re.compile(rb'"role"\s*:\s*"system"')    # not within a string: no backslash


def openai_error(error: ProxyError, request_id: str) -> Json:
    """An error's body as OpenAI's clients read it; the id is in the headers."""
    code = OPENAI_CODES.get(error.status)
    return {"error": {"message": error.message, "type": error.kind, "param": None,
                      "code": code, **error.details}}


OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


def openai_event(name: str, data: Json) -> bytes:
    """An event of ours in a stream of chunks, in ASCII; a ping is a comment."""
    return b": ping\n\n" if name == "ping" else b"data: %b\n\n" % encode_json(
        data).encode("ascii")


TONGUES = {
    "anthropic": Tongue(ProxyError.body, encode_event, watch_messages),
    "openai": Tongue(openai_error, openai_event, watch_completions),
}


# ---- 19. HTTP/1.1 messages ---------------------------------------------------
# RFC 9112, the part that both sides of a proxy need, on bytes and strictly: what
# is doubtful is refused, because two readings of one request are an attack.

class Request(NamedTuple):
    method: str
    target: str             # as sent; `path` is what routes go by
    headers: Headers        # names in lower case
    body: bytes = b""
    version: int = 1        # the minor one: HTTP/1.0 or 1.1

    def path(self) -> str:
        absolute = ABSOLUTE.match(self.target)
        target = self.target[absolute.end():] if absolute else self.target
        return re.split(r"[?#]", target)[0] or "/"

    def host(self) -> str:
        """Host and port as asked for, in lower case; an absolute target's win."""
        absolute = ABSOLUTE.match(self.target)
        return (absolute[1] if absolute else header(self.headers, "host")).lower()

    def keeps_alive(self) -> bool:
        wanted = connection_options(self.headers)
        return "close" not in wanted and (self.version > 0 or "keep-alive" in wanted)


class Response(NamedTuple):
    """An answer; who holds it closes its body.

    An empty piece of a body that is streamed ends it as if the line were cut, which
    the client can tell.  `pulse` gives the bytes that keep a silent stream alive, and
    `last` those that end it before its time.
    """
    status: int
    headers: Headers
    body: Union[bytes, AsyncIterator[bytes]] = b""
    pulse: Optional[Callable[[float], bytes]] = None
    last: Optional[Callable[[ProxyError], bytes]] = None


TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t -~\x80-\xff]*))?")
FIELD = re.compile(rb"(" + TOKEN + rb"):([\t -~\x80-\xff]*)")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
ABSOLUTE = re.compile(r"https?://([^/?#]*)")


def parse_request(head: bytes) -> Request:
    """The request of a head that ends with its blank line, strictly by RFC 9112.

    Raises ProxyError(400, 414, 431 or 505); its text never repeats the bytes.
    """
    start, _, fields = head.partition(b"\r\n")
    if len(start) > MAX_REQUEST_LINE_BYTES:
        raise ProxyError(414, f"request line over {MAX_REQUEST_LINE_BYTES} bytes")
    match = REQUEST_LINE.fullmatch(start)
    if not match:
        raise ProxyError(400, "malformed request line: expected METHOD target HTTP/1.1")
    if match[3] != b"1":
        raise ProxyError(505, "expected HTTP/1.1 or HTTP/1.0")
    method, target = match[1].decode(), match[2].decode()
    headers = parse_fields(fields)
    version = min(int(match[4]), 1)
    hosts, absolute = field_values(headers, "host"), ABSOLUTE.match(target)
    places = [*hosts, *(absolute.groups() if absolute else ())]
    if len(hosts) > 1 or version and not hosts or not all(map(sound_host, places)):
        raise ProxyError(400, "expected one Host header with a host and a port")
    if not absolute and target[0] != "/" and (method, target) != ("OPTIONS", "*"):
        raise ProxyError(400, "expected a request target that begins with /")
    if len(field_values(headers, "content-type")) > 1:
        raise ProxyError(400, "more than one Content-Type")
    return Request(method, target, headers, b"", version)


def sound_host(text: str) -> bool:
    """Whether a text is a host, and a port that there can be or none."""
    match = HOST.fullmatch(text)
    return bool(match) and int(match[2] or 0) < 65536


def parse_status(head: bytes) -> Tuple[int, Headers, int]:
    """Status, headers and minor version of an upstream's head; ProxyError(502)."""
    start, _, fields = head.partition(b"\r\n")
    match = STATUS_LINE.fullmatch(start)
    if not match:
        raise ProxyError(502, "upstream's answer is not HTTP/1.1")
    return int(match[2]), parse_fields(fields), int(match[1])


def parse_fields(data: bytes) -> Headers:
    """Header lines, the blank one included; names in lower case, values stripped."""
    headers = []
    for line in data.split(b"\r\n")[:-2]:
        match = FIELD.fullmatch(line)
        if not match:
            raise ProxyError(400, "malformed header line: expected 'name: value'")
        value = match[2].strip(b" \t").decode("latin-1")
        headers.append((match[1].decode().lower(), value))
    if len(headers) > MAX_FIELDS:
        raise ProxyError(431, f"more than {MAX_FIELDS} header fields")
    return headers


def header(headers: Headers, name: str) -> str:
    """The first value of a header; names are lower case."""
    return next((value for key, value in headers if key == name), "")


def field_values(headers: Headers, name: str) -> List[str]:
    """The values of all headers of a name; names are lower case."""
    return [value for key, value in headers if key == name]


def connection_options(headers: Headers) -> List[str]:
    values = ",".join(field_values(headers, "connection"))
    return [option.strip(" \t").lower() for option in values.split(",")]


def framing(headers: Headers, otherwise: Union[int, str]) -> Union[int, str]:
    """How the body ends: after a count of bytes, "chunked", or at "close".

    `otherwise` is for no header: 0 for a request, "close" for a response (RFC 9112,
    section 6.3).  Raises ProxyError(400) whenever there could be two readings.
    """
    codings = field_values(headers, "transfer-encoding")
    lengths = field_values(headers, "content-length")
    if len(codings) + len(lengths) > 1:
        raise ProxyError(400, "more than one Content-Length or Transfer-Encoding")
    if codings:
        if not re.fullmatch("[cC][hH][uU][nN][kK][eE][dD]", codings[0]):
            raise ProxyError(400, "expected Transfer-Encoding: chunked")
        return "chunked"
    if lengths:
        if not re.fullmatch("[0-9]{1,19}", lengths[0]):
            if re.fullmatch("[0-9]+", lengths[0]):
                raise ProxyError(413, "Content-Length beyond all bounds")
            raise ProxyError(400, "malformed Content-Length: expected digits")
        return int(lengths[0])
    return otherwise


Decoder = Generator[Tuple[bytes, Optional[bytes]], bytes, None]


def body_decoder(how: Union[int, str]) -> Decoder:
    """Wire bytes in, (body bytes, rest) out; rest is None until the body has ended,
    then what followed it.  Raises ProxyError(400) for malformed chunks."""
    decoder = (chunked_body() if how == "chunked" else endless_body() if how == "close"
               else counted_body(int(how)))
    next(decoder)
    return decoder


def endless_body() -> Decoder:
    data = yield b"", None
    while True:
        data = yield data, None


def counted_body(left: int) -> Decoder:
    data = yield b"", None
    while len(data) < left:
        left -= len(data)
        data = yield data, None
    yield data[:left], data[left:]


CHUNK_LINE = re.compile(rb"0{0,12}([0-9A-Fa-f]{1,8})(;[\t -~\x80-\xff]*)?")


def chunked_body() -> Decoder:
    """Chunks by size; their extensions and the trailers are read and dropped."""
    wire, body = bytearray(), bytearray()       # to be decoded; decoded
    wire += yield b"", None
    extensions = 0
    while True:
        whole_chunks(wire, body)
        if not wire:
            wire += yield drained(body), None
            continue
        line = yield from chunked_line(wire, body, MAX_CHUNK_LINE_BYTES)
        match = CHUNK_LINE.fullmatch(line)
        if not match:
            raise ProxyError(400, "malformed chunk size: expected hexadecimal digits")
        left = int(match[1], 16)
        extensions += len(match[2] or b"")
        if extensions > MAX_EXTENSION_BYTES:
            raise ProxyError(400, f"chunk extensions over {MAX_EXTENSION_BYTES} bytes")
        if not left:
            break
        while len(wire) < left:
            left -= len(wire)
            body += wire
            wire.clear()
            wire += yield drained(body), None
        body += wire[:left]
        del wire[:left]
        if (yield from chunked_line(wire, body, 2)):
            raise ProxyError(400, "expected CRLF after a chunk's data")
    yield from trailers(wire, body)
    yield bytes(body), bytes(wire)


PLAIN_CHUNK = re.compile(rb"([1-9A-Fa-f][0-9A-Fa-f]{0,7})\r\n")


def whole_chunks(wire: bytearray, body: bytearray) -> None:
    """Move what is there in whole, plain chunks: nearly always all there is."""
    done = 0
    match = PLAIN_CHUNK.match(wire)
    while match:
        start = match.end()
        end = start + int(match[1], 16)
        if wire[end:end + 2] != b"\r\n":
            break
        body += wire[start:end]
        done = end + 2
        match = PLAIN_CHUNK.match(wire, done)
    del match, wire[:done]      # a match holds the buffer, which then cannot shrink


def trailers(wire: bytearray, body: bytearray) -> Generator[Any, bytes, None]:
    left = MAX_TRAILER_BYTES
    while True:
        line = yield from chunked_line(wire, body, MAX_TRAILER_BYTES)
        left -= len(line)
        if not line:
            return
        if left < 0:
            raise ProxyError(431, f"trailers over {MAX_TRAILER_BYTES} bytes")
        if not FIELD.fullmatch(line):
            raise ProxyError(400, "malformed trailer line: expected 'name: value'")


def chunked_line(wire: bytearray, body: bytearray,
                 limit: int) -> Generator[Any, bytes, bytes]:
    """Take one line off the wire, CRLF off; hand out the body while more must come."""
    while True:
        end = wire.find(b"\n", 0, limit + 1)
        if end >= 0:
            break
        if len(wire) > limit:
            raise ProxyError(400, f"line over {limit} bytes in a chunked body")
        wire += yield drained(body), None
    line = bytes(wire[:end])
    del wire[:end + 1]
    if line[-1:] != b"\r":
        raise ProxyError(400, "expected CRLF in a chunked body")
    return line[:-1]


def drained(body: bytearray) -> bytes:
    data = bytes(body)
    body.clear()
    return data


def encode_head(start: str, headers: Headers) -> bytes:
    """A message head; ProxyError(500) for a header that would break out of its line."""
    lines = [start]
    for name, value in headers:
        if not re.fullmatch(r"[\t -~\x80-\xff]*", value):
            raise ProxyError(500, f"value of the header {name} is not printable")
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def encode_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def json_response(value: Json, status: int = 200, headers: Headers = []) -> Response:
    fields = [("Content-Type", "application/json"), *headers]
    return Response(status, fields, encode_json(value).encode("ascii"))


# ---- 20. Demonstration: the built-in upstream --------------------------------
# A scripted Chat Completions stream for the model `nimproxy/demo`: thinking, text
# and, where tools are declared, one call.  Pure, so it needs no key and no network.

DEMO_TEXT = ("This is nimproxy's built-in model: no key, no network, a fixed script. "
             "Give nimproxy a real model with NVIDIA_API_KEY or --base-url.")


def demo_chat(path: str, data: bytes) -> Json:
    """A chat that is sure to have the shape of ours, from a body that passes; only
    that: ProxyError(404)."""
    if not path.startswith("/chat/"):
        raise ProxyError(404, "the built-in model answers chat completions only")
    body = decode_json(data.decode("utf-8"))
    last = next(iter(reversed(shaped(body.get("messages"), list))), {})
    words = {"role": "user", "content": "", **shaped(last, dict)}
    return {"messages": [words], "stream": body.get("stream")}


def demo_stream(chat: Json) -> List[bytes]:
    """The answer to a chat as the pieces of an event stream."""
    thought, text, tool = demo_answer(chat)
    deltas: List[Json] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": piece} for piece in cut(thought, 8)]
    deltas += [{"content": piece} for piece in cut(text, 8)]
    if tool:
        named = {"index": 0, "id": "call_demo", "function": {"name": tool[0]}}
        deltas.append({"tool_calls": [named]})
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
                   for piece in cut(json.dumps(tool[1]), 8)]
    finish = "tool_calls" if tool else "stop"
    choices = [{"delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"delta": {}, "finish_reason": finish})
    usage = {"prompt_tokens": 100, "completion_tokens": len(deltas)}
    chunks: List[Json] = [{"choices": [choice]} for choice in choices]
    chunks.append({"choices": [], "usage": usage})
    frames = [f"data: {encode_json(chunk)}\n\n".encode() for chunk in chunks]
    return frames + [b"data: [DONE]\n\n"]


def demo_completion(chat: Json) -> bytes:
    """The same answer in one piece, for requests that do not stream."""
    thought, text, tool = demo_answer(chat)
    message: Json = {"content": text, "reasoning_content": thought}
    if tool:
        function = {"name": tool[0], "arguments": json.dumps(tool[1])}
        message["tool_calls"] = [{"id": "call_demo", "function": function}]
    choice = {"message": message, "finish_reason": "tool_calls" if tool else "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": len(text) // 4}
    return encode_json({"choices": [choice], "usage": usage}).encode()


def demo_answer(chat: Json) -> Tuple[str, str, Optional[Tuple[str, Json]]]:
    """Thought, text and call.  A tool's result is summed up, also where the client has
    something to add to it, as OpenClaw has; else a tool is called that can be called
    without guessing."""
    for message in reversed(chat["messages"]):
        if message.get("role") == "tool":
            said = f"The tool says: {message['content']}"
            return "The tool has answered.", said, None
        if message.get("role") == "assistant":
            break
    tool = None if chat.get("tool_choice") == "none" else demo_tool(chat)
    if tool:
        return "I should use a tool here.", f"Let me call {tool[0]}.\n", tool
    return "There is nothing to look up.", DEMO_TEXT, None


def demo_tool(chat: Json) -> Optional[Tuple[str, Json]]:
    """The shell if there is one, else a tool that needs nothing but strings."""
    functions = [tool["function"] for tool in chat.get("tools") or []]
    if any(function["name"] == "Bash" for function in functions):
        return "Bash", {"command": "echo hello from nimproxy", "description": "Say hi"}
    for function in functions:
        schema = function["parameters"]
        needed = schema.get("required") or []
        fields = [schema["properties"].get(field) or {} for field in needed]
        if all(field.get("type") == "string" for field in fields):
            return function["name"], {name: "demo" for name in needed}
    return None


# ---- 21. Pacing: whose turn it is, and when to ask again ---------------------
# Sans-I/O, on a clock that is given: how many requests go to one key and in which
# order, what a 429 teaches, and how patiently a failed one is repeated.

WINDOW_SECONDS = 61.0       # a minute, and a second for the way there
CEILING_SECONDS = 600.0     # in which a ceiling that a 429 taught is forgotten
LEAST_CEILING = 4           # requests a minute; what is slower yet, the pauses hold up
AGING_SECONDS = 60.0        # of waiting lift a request by one rank: nobody starves
PAUSE_SECONDS = 60.0        # of a model at most, whatever a Retry-After says
LOOK_AGAIN_SECONDS = 5.0    # a ceiling that grows lets requests go between events
MAX_WAITING = 128           # requests that wait for a turn; more are refused at once
MAX_SENT = 1024             # sends that are kept where only the cap counts

MAIN, SUBAGENT, SIDE = 0, 1, 2      # ranks: who goes first


class Retry(NamedTuple):
    first: float            # seconds before the first repetition; then twice as many
    most: float             # seconds before any; more are not waited for


RETRIES = {                 # ProxyError.again: how a failure is repeated
    "rate": Retry(2.0, 30.0),       # 429: the whole model pauses
    "busy": Retry(1.0, 30.0),       # 5xx, DEGRADED: gone in seconds, if at all
    "broken": Retry(0.5, 5.0),      # no answer, or one without a first word
}
RETRY_SECONDS = 90.0        # from a request's first failure to its last repetition;
                            # fallbacks are asked once after that, too


def back_off(retry: Retry, tries: int, chance: float) -> float:
    """Seconds before the next repetition after so many; `chance` is from 0 to 1, and
    spreads them by 30 % to both sides, so that clients do not come back together."""
    tries = min(tries, 16)      # a model may say 429 all day
    seconds = min(retry.first * 2 ** tries, retry.most)
    return seconds * (0.7 + 0.6 * chance)


class Ticket:
    """One attempt to ask upstream, while it waits and until it has its answer."""

    def __init__(self, model: str, session: str = "", rank: int = MAIN,
                 arrived: float = 0.0) -> None:
        self.model, self.session, self.rank = model, session, rank
        self.arrived = arrived      # keeps its place, whatever is tried again
        self.sent = -1.0            # when it went; below 0: it waits
        self.taken = True           # by upstream, as far as is known


class Pacer:
    """Lets tickets go: in no window more than `per_minute`, never more than `at_once`
    without an answer, and none to a model that asked for a pause.  0: any number.

    The first half of a window may go at once, the rest goes evenly, so that who comes
    late does not wait for a minute.  Of those that may go, the first by rank; then of
    the session that has sent the least in this window; then by arrival.
    """

    def __init__(self, per_minute: int, at_once: int,
                 clock: Callable[[], float]) -> None:
        self.per_minute, self.at_once, self.clock = per_minute, at_once, clock
        self.waiting: List[Ticket] = []
        self.out: Set[Ticket] = set()       # sent, not yet answered
        # the window
        self.sent: Any = collections.deque()
        self.by_session: Dict[str, int] = collections.Counter()
        self.by_model: Dict[str, int] = collections.Counter()
        self.last: Dict[str, float] = {}        # when one was sent, by model, "" by all
        # what 429s have taught, by model
        self.ceilings: Dict[str, Tuple[float, float]] = {}     # requests, since when
        self.pauses: Dict[str, float] = {}      # until when
        self.strikes: Dict[str, Tuple[int, float]] = {}     # 429s in a row, the last
        self.taken: Dict[str, float] = {}       # when upstream last took one

    def join(self, ticket: Ticket) -> None:
        self.waiting.append(ticket)

    def next(self) -> Optional[Ticket]:
        """The ticket whose turn it is, taken off the queue; None if it is nobody's."""
        now = self.clock()
        self.forget(now)
        if self.at_once and len(self.out) >= self.at_once:
            return None
        models = {model for model in self.models() if now >= self.soonest(model, now)}
        free = [ticket for ticket in self.waiting if ticket.model in models]
        if not free:
            return None
        ticket = min(free, key=lambda each: self.order(each, now))
        self.waiting.remove(ticket)
        ticket.sent = now
        self.out.add(ticket)
        self.sent.append(ticket)
        self.by_session[ticket.session] += 1
        self.by_model[ticket.model] += 1
        self.last[ticket.model] = self.last[""] = now
        return ticket

    def models(self) -> Set[str]:
        """Those that somebody waits for."""
        return {ticket.model for ticket in self.waiting}

    def soonest(self, model: str, now: float) -> float:
        """When time lets a request for a model go, as far as is known."""
        ceiling = self.ceiling(model, now)
        return max(self.pauses.get(model, 0.0),
                   self.free(len(self.sent), self.per_minute, ""),
                   self.free(self.by_model.get(model, 0), ceiling, model))

    def free(self, count: int, most: int, model: str) -> float:
        """When the next one may go after `count` of `most` in this window."""
        if not most or count < (most + 1) // 2:
            return 0.0
        if count >= most:
            return self.sent[0].sent + WINDOW_SECONDS
        return self.last.get(model, 0.0) + WINDOW_SECONDS / most

    def order(self, ticket: Ticket, now: float) -> Tuple[int, int, float]:
        lifted = int((now - ticket.arrived) / AGING_SECONDS)
        rank = max(ticket.rank - lifted, MAIN)
        return rank, self.by_session[ticket.session], ticket.arrived

    def ceiling(self, model: str, now: float) -> int:
        """The requests a minute that a model takes; 0: any number."""
        if model not in self.ceilings:
            return self.per_minute
        low, since = self.ceilings[model]
        grown = low + (self.per_minute - low) * (now - since) / CEILING_SECONDS
        return min(int(grown), self.per_minute)

    def forget(self, now: float) -> None:
        """Let go of what has left the window."""
        while self.sent and (now >= self.sent[0].sent + WINDOW_SECONDS
                             or not self.per_minute and len(self.sent) > MAX_SENT):
            self.uncount(self.sent.popleft())

    def uncount(self, ticket: Ticket) -> None:
        less(self.by_session, ticket.session)
        if ticket.taken:
            less(self.by_model, ticket.model)
        if ticket.model not in self.by_model:
            self.last.pop(ticket.model, None)

    def leave(self, ticket: Ticket) -> None:
        """Its answer is over, or nobody wants one any more: the place is free."""
        self.out.discard(ticket)
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    def give_back(self, ticket: Ticket) -> None:
        """It was let go, but went nowhere: its turn is another's."""
        self.out.discard(ticket)
        if ticket in self.sent:
            self.sent.remove(ticket)
            self.uncount(ticket)

    def answered(self, ticket: Ticket) -> None:
        """Upstream took it: 429s are in a row no more, if it was sent after them."""
        self.taken[ticket.model] = self.clock()
        while len(self.taken) > MAX_KNOWN:
            del self.taken[next(iter(self.taken))]
        when = self.strikes.get(ticket.model, (0, math.inf))[1]
        if ticket.sent > when:
            self.strikes[ticket.model] = 0, when

    def refused(self, ticket: Ticket, stated: float, chance: float) -> None:
        """Upstream answered 429: the model pauses, `stated` seconds or as it backs
        off, and for a while takes no more than it has taken in this window, or half of
        what it was thought to take: one 429 says little.

        Of several that were on their way together only the first one counts, but the
        longest pause that they state.
        """
        now, model = self.clock(), ticket.model
        count, when = self.strikes.get(model, (0, -1.0))
        if ticket.taken and ticket in self.sent:
            less(self.by_model, model)
        ticket.taken = False
        first = ticket.sent > when
        pause = back_off(RETRIES["rate"], count, chance) if first else 0.0
        until = now + min(max(stated, pause), PAUSE_SECONDS)
        self.pauses[model] = max(until, self.pauses.get(model, 0.0))
        if not first:
            return
        self.strikes[model] = count + 1, now
        if self.per_minute:
            known = self.ceiling(model, now)
            low = max(self.by_model[model], known // 2, LEAST_CEILING)
            self.ceilings[model] = min(low, known), now
        for kept in (self.strikes, self.pauses, self.ceilings):
            while len(kept) > MAX_KNOWN:
                del kept[next(iter(kept))]

    def hopeless(self, model: str, most: int) -> bool:
        """Whether a model says nothing but 429, or pauses for longer than one waits."""
        now, longest = self.clock(), RETRIES["rate"].most
        return (self.pauses.get(model, 0.0) - now > longest
                or self.strikes.get(model, (0, 0.0))[0] > most
                and now - self.taken.get(model, -math.inf) > longest)

    def rest(self) -> float:
        """Seconds until time alone may give somebody a turn; inf if it cannot."""
        now = self.clock()
        if not self.waiting:
            return math.inf
        ends = [self.soonest(model, now) for model in self.models()]
        ends += [self.sent[0].sent + WINDOW_SECONDS] if self.sent else []
        return min([LOOK_AGAIN_SECONDS, *(end - now for end in ends if end > now)])

    def delay(self, model: str) -> float:
        """Seconds that a request for a model waits at the least."""
        now = self.clock()
        return max(self.soonest(model, now) - now, 0.0)


def less(counter: Dict[str, int], name: str) -> None:
    """Take one off a count; names without any are not kept."""
    counter[name] -= 1
    if counter[name] <= 0:
        del counter[name]


# ---- 22. Upstream ------------------------------------------------------------
# The first part that waits.  Connections over plain TCP, TLS or an HTTP proxy,
# kept alive in a pool; one request and its answer at a time on each.

class Wire:
    """One connection of either side: what was read ahead, and a limit to silence.

    One task reads at a time.  `allow` starts the limit anew: a single timer looks at
    when bytes last came, so that a token costs no timer of its own.
    """

    def __init__(self, reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.held = b""                     # read, but not used yet
        self.time = time.monotonic
        self.heard = self.sent = self.time()    # when bytes last came and went
        self.target: Optional[Target] = None    # whose pool an upstream one goes to
        self.pooled = 0.0                   # when it went there, by the wall clock
        self.patience = 0.0
        self.paused = False                 # between two reads of an answer
        self.timer: Optional[asyncio.TimerHandle] = None
        self.expired = False

    async def read(self) -> bytes:
        """Whatever comes next; b"" at the end, and after too long a silence."""
        if self.held:
            data, self.held = self.held, b""
            return data
        data = await self.reader.read(READ_BYTES)
        self.heard = self.time()
        return data

    async def head(self) -> bytes:
        """One message head with its blank line; b"" if the peer closed before it.

        Raises ProxyError(400, 431) as soon as it cannot become one.
        """
        blank = True                        # one may precede, RFC 9112 section 2.2
        checked = 0
        while True:
            if blank and self.held[:2] == b"\r\n":
                self.held, blank = self.held[2:], False
            end = self.held.find(b"\r\n\r\n")
            if 0 <= end <= MAX_HEAD_BYTES:
                head, self.held = self.held[:end + 4], self.held[end + 4:]
                return head
            check_partial_head(self.held, checked)
            checked = max(len(self.held) - 1, 0)    # a CR may want its LF
            data = await self.reader.read(READ_BYTES)
            self.heard = self.time()
            self.held += data
            if not data:
                if self.held:
                    raise ProxyError(400, "connection closed inside a message head")
                return b""

    def quiet(self) -> bool:
        """Whether a read would wait: nothing unasked has come, nor the end."""
        reading = self.reader.read(1)
        try:
            reading.send(None)
        except (StopIteration, OSError):
            return False
        reading.close()
        return True

    async def departure(self) -> None:
        """Return when the peer has closed; what it sends meanwhile is kept."""
        while len(self.held) < MAX_PIPELINED_BYTES:
            data = await self.reader.read(READ_BYTES)
            if not data:
                return
            self.held += data
        while not self.hung_up():           # enough: from now on without reading
            await asyncio.sleep(LEAVING_SECONDS)

    def hung_up(self) -> bool:
        """Whether the peer has closed, as far as that shows behind unread bytes."""
        if self.writer.transport.is_closing():      # a write of ours has failed
            return True
        if not hasattr(select, "poll"):             # Windows
            return False
        ends = select.poll()                        # looks for errors in any case
        ends.register(self.writer.get_extra_info("socket").fileno(),
                      getattr(select, "POLLRDHUP", 0))
        return bool(ends.poll(0))

    def allow(self, seconds: float, total: bool = False) -> None:
        """Abort the connection after so many seconds of silence, or, if `total`, after
        so many in any case; 0: never."""
        self.patience, self.heard, self.paused = seconds, self.time(), False
        if self.timer:
            self.timer.cancel()
        self.timer = None
        if seconds:
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(seconds, self.expire if total else self.look)

    def look(self) -> None:
        left = self.patience
        if not self.paused:             # else it is we who do not listen
            left += self.heard - self.time()
        if left > 0:
            self.timer = asyncio.get_running_loop().call_later(left, self.look)
        else:
            self.expire()

    def expire(self) -> None:
        self.expired = True
        self.writer.transport.abort()

    async def flush(self) -> None:
        """Wait for a peer that reads slowly, but not for ever."""
        transport = self.writer.transport
        if transport.get_write_buffer_size():
            loop = asyncio.get_running_loop()
            timer = loop.call_later(WRITE_SECONDS, transport.abort)
            try:
                await self.writer.drain()
            finally:
                timer.cancel()

    def close(self) -> None:
        """Close after what was written has gone out."""
        self.allow(0)
        self.writer.close()

    def abort(self) -> None:
        self.allow(0)
        self.writer.transport.abort()


class Target(NamedTuple):
    """Where a connection leads."""
    secure: bool
    host: str
    port: int


BAD_HEAD = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|^[^!-~\r]")


def check_partial_head(held: bytes, checked: int) -> None:
    """Raise ProxyError for the beginning of a head that no end could make good.

    So many bytes of it have passed before: a head may come byte by byte.
    """
    start = held.partition(b"\n")[0]
    if len(start) > MAX_REQUEST_LINE_BYTES:
        raise ProxyError(414, f"start line over {MAX_REQUEST_LINE_BYTES} bytes")
    if len(held) > MAX_HEAD_BYTES:
        raise ProxyError(431, f"head over {MAX_HEAD_BYTES} bytes")
    if held[:2] == b"\x16\x03":
        raise ProxyError(400, "this is TLS, and plain HTTP is spoken here: "
                              "use a URL with http:// instead of https://")
    if b"\r\n" in held and b"HTTP/" not in start:
        raise ProxyError(400, "malformed head: expected HTTP/1.1 in its first line")
    if BAD_HEAD.search(held, checked):
        raise ProxyError(400, "malformed head: expected lines that end in CRLF")


class Answer:
    """An upstream's answer, its head read.  Whoever holds it releases it."""

    def __init__(self, upstream: Upstream, wire: Wire, status: int, headers: Headers,
                 how: Union[int, str]) -> None:
        self.upstream, self.wire = upstream, wire
        self.status, self.headers, self.how = status, headers, how
        self.decoder = body_decoder(how)
        self.rest: Optional[bytes] = None   # what followed the body, once it has ended
        self.reusable = False
        self.said = False                   # all that matters; the rest is framing
        self.packed = b""                   # compressed bytes that wait
        self.inflate = inflater(header(headers, "content-encoding"))

    async def read(self) -> bytes:
        """The next bytes of the body, b"" at its end.  Raises ProxyError(502, 504)."""
        piece = self.inflated(b"") if self.packed else b""
        if piece:
            return piece
        self.wire.paused, self.wire.heard = False, self.wire.time()
        since = 0.0
        while self.rest is None:
            try:
                data = await self.wire.read()
            except (OSError, EOFError) as error:
                raise self.broken(error) from error
            if not data:
                self.finish()
                return b""
            try:
                piece, self.rest = self.decoder.send(data)
            except ProxyError as error:
                words = f"upstream's answer: {error.message}"
                raise ProxyError(502, words, again="broken") from None
            piece = self.inflated(piece) if self.inflate else piece
            if piece:
                self.wire.paused = True
                return piece
            since = check_progress(since)
        return b""

    def finish(self) -> None:
        """At the end of the connection: fine only for a body that ends there."""
        if self.wire.expired or self.how != "close":
            raise self.broken(None)
        self.rest = b""

    def broken(self, error: Optional[BaseException]) -> ProxyError:
        if self.wire.expired:
            silence = f"upstream was silent for {self.wire.patience:g} s"
            return ProxyError(504, silence, again="broken")
        return ProxyError(502, f"upstream broke off in the middle of its answer"
                               f"{f' ({failure_words(error)})' if error else ''}",
                          again="broken")

    def inflated(self, piece: bytes) -> bytes:
        """What is in a piece, and in what waits: so much at most, the rest waits."""
        try:
            data = self.inflate.decompress(self.packed + piece, MAX_INFLATED_BYTES)
        except zlib.error as error:
            raise ProxyError(502, f"upstream's compressed answer: {error}") from None
        self.packed = self.inflate.unconsumed_tail
        if self.inflate.unused_data:
            raise ProxyError(502, "upstream's compressed answer goes on after its end")
        return data

    async def whole(self) -> bytes:
        """The whole body; blanks before it, which keep a connection alive, are cut."""
        body, since = bytearray(), 0.0
        while True:
            piece = await self.read()
            if not piece:
                return bytes(body)
            if not body and piece.isspace():
                since = check_progress(since)
                continue
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise ProxyError(502, f"upstream sent over {MAX_ANSWER_BYTES} bytes")

    def hurry(self) -> None:
        """All is said: what may still come has little time."""
        self.said = True
        self.wire.allow(GRACE_SECONDS, total=True)

    def release(self) -> None:
        """Keep the connection if all is said; else close it, so that upstream stops."""
        if self.rest is None and not (self.said and self.reusable):
            self.wire.abort()
        else:
            self.upstream.settle_soon(self)


def inflater(coding: str) -> Any:
    """What undoes a Content-Encoding, None if nothing does: none was asked for."""
    if coding.lower() in ("br", "zstd", "compress"):
        raise ProxyError(502, "upstream compressed its answer, unasked: expected "
                              "Content-Encoding identity or gzip")
    known = ("gzip", "x-gzip", "deflate")
    return zlib.decompressobj(47) if coding.lower() in known else None


def check_progress(since: float) -> float:
    """Since when nothing of use has come: `since`, or now if that is 0.

    Raises ProxyError(504) once that is too long ago.  It is asked only where bytes
    came that said nothing, so that a token costs no look at the clock.
    """
    now = time.monotonic()
    if since and now - since > USEFUL_SECONDS:
        raise ProxyError(504, "upstream sent only signs of life, but no answer, for "
                              f"{USEFUL_SECONDS:g} s")
    return since or now


class Upstream:
    """Asks the upstream; its pool holds connections that wait for their next use."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pool: Dict[Target, List[Wire]] = collections.defaultdict(list)
        self.context: Optional[ssl.SSLContext] = None
        self.settling: Set[asyncio.Future] = set()

    async def ask(self, path: str, payload: bytes = b"", stream: bool = False,
                  headers: Headers = []) -> Answer:
        """POST the payload, or GET if there is none, at a path below the base URL, or
        at a URL of the same server; with headers of the client's.

        The answer is whatever its status is.  Raises ProxyError(502, 504) if there
        is none: it could not be reached, broke off, or was silent for too long.
        """
        url = self.config.base_url + path if path[0] == "/" else path
        left = limit = self.config.first_byte_timeout
        until, pause = time.monotonic() + limit, 0.0
        request = self.request(url, payload, stream, headers)
        answer = await self.send(url, request, left)
        while answer.status == 202 and header(answer.headers, "nvcf-reqid"):
            await self.settle(answer)
            await asyncio.sleep(pause)
            pause = POLL_SECONDS
            left = limit and until - time.monotonic()
            if left < 0:
                raise ProxyError(504, "upstream has queued the request for over "
                                      f"{limit:g} s")
            url = poll_url(self.config.base_url, header(answer.headers, "nvcf-reqid"))
            answer = await self.send(url, self.request(url, b"", stream, []), left)
        return answer

    async def send(self, url: str, request: bytes, left: float) -> Answer:
        """One request, with `left` seconds to its answer, 0: any number; sent once
        more, on a fresh connection, if it went out on one of the pool that died before
        any byte of an answer."""
        target = url_target(url)
        wire = self.waiting(target)
        if wire:
            with contextlib.suppress(OSError):
                return await self.attempt(wire, request, left)
        wire = await self.connect(target)
        try:
            return await self.attempt(wire, request, left)
        except OSError as error:
            why = f" ({failure_words(error)})" if error.args else ""
            words = f"{target.host} closed the connection without an answer{why}"
            raise ProxyError(502, words, again="broken") from error

    def request(self, url: str, payload: bytes, stream: bool, more: Headers) -> bytes:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = [
            ("Host", parts.netloc),
            ("Accept", "text/event-stream" if stream else "application/json"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", f"nimproxy/{__version__}"),
            *credentials(self.config), *more,
        ]
        if speaks_messages(self.config) and not header(more, "anthropic-version"):
            headers.append(("anthropic-version", ANTHROPIC_VERSION))
        if payload:
            headers += [("Content-Type", "application/json"),
                        ("Content-Length", str(len(payload)))]
        proxy = proxy_for(self.config, url_target(url))
        if proxy and parts.scheme == "http":
            path = url
            headers += proxy_authorization(proxy)
        start = f"{'POST' if payload else 'GET'} {path} HTTP/1.1"
        return encode_head(start, headers) + payload

    async def attempt(self, wire: Wire, request: bytes, left: float) -> Answer:
        """One request on one connection.  Raises OSError if that ends before the first
        byte of an answer, else ProxyError(502, 504)."""
        try:
            return await self.exchange(wire, request, left)
        except BaseException as error:
            wire.abort()
            if isinstance(error, ProxyError):
                fault = head_fault(wire, error)
                fault.again = "broken"
                raise fault from None
            raise

    async def exchange(self, wire: Wire, request: bytes, left: float) -> Answer:
        """The answer's head.  Interim answers do not make the wait for it longer."""
        wire.writer.write(request)      # no drain: an early answer may be there
        limit = self.config.first_byte_timeout
        until = wire.time() + left
        for interim in range(MAX_INTERIM_ANSWERS):
            wire.allow(left and max(until - wire.time(), 0.001), total=True)
            try:
                wire.held = await wire.read()
                wire.allow(HEAD_SECONDS, total=True)
                head = await wire.head()
            except OSError as error:
                if wire.held or interim:    # a byte of an answer: not asked twice
                    words = f"upstream broke off ({failure_words(error)})"
                    raise ProxyError(502, words) from error
                raise
            if not head and wire.expired:
                raise ProxyError(504, f"upstream did not answer within {limit:g} s")
            if not head and interim:
                raise ProxyError(502, "upstream broke off before its answer")
            if not head:
                raise ConnectionAbortedError
            status, headers, version = parse_status(head)
            if status == 101:
                raise ProxyError(502, "upstream switched protocols unasked")
            if status >= 200:
                return self.answer(wire, status, headers, version)
        raise ProxyError(502, f"upstream sent {MAX_INTERIM_ANSWERS} interim answers")

    def answer(self, wire: Wire, status: int, headers: Headers, version: int) -> Answer:
        how = 0 if status in (204, 304) else framing(headers, "close")
        answer = Answer(self, wire, status, headers, how)
        options = connection_options(headers)
        answer.reusable = how != "close" and "close" not in options and (
            version > 0 or "keep-alive" in options)
        if how == 0:
            answer.rest = b""
        wire.allow(self.config.idle_timeout)
        return answer

    def waiting(self, target: Target) -> Optional[Wire]:
        """A connection of the pool that seems alive; the others are closed."""
        wires = self.pool[target]
        while wires:
            wire = wires.pop()
            away = abs(time.time() - wire.pooled)   # while suspended, too
            idle = max(wire.time() - wire.heard, away)
            if idle < POOL_SECONDS and wire.quiet():
                watch_deliveries(wire)
                return wire
            wire.abort()
        return None

    async def settle(self, answer: Answer) -> None:
        """Read what is left of an answer and keep its connection, or close it."""
        answer.wire.allow(GRACE_SECONDS, total=True)
        with contextlib.suppress(ProxyError):
            while await answer.read():
                pass
        if answer.reusable and answer.rest == b"":
            answer.wire.allow(POOL_SECONDS)
            answer.wire.pooled = time.time()
            self.pool[answer.wire.target].append(answer.wire)
        else:
            answer.wire.abort()

    def settle_soon(self, answer: Answer) -> None:
        """The same, without anybody waiting for it."""
        def settled(task: asyncio.Future) -> None:
            self.settling.discard(task)
            if task.cancelled():        # perhaps before it began
                answer.wire.abort()

        task = asyncio.ensure_future(self.settle(answer))
        self.settling.add(task)
        task.add_done_callback(settled)

    async def close(self) -> None:
        for task in self.settling:
            task.cancel()
        await asyncio.gather(*self.settling, return_exceptions=True)
        for wires in self.pool.values():
            for wire in wires:
                wire.abort()
        self.pool.clear()

    async def connect(self, target: Target) -> Wire:
        """A new connection.  Raises ProxyError(502) that says what failed where."""
        proxy = proxy_for(self.config, target)
        opening = asyncio.ensure_future(self.open(target, proxy))
        try:
            await asyncio.wait({opening}, timeout=2 * CONNECT_SECONDS)
            if not opening.done():
                raise asyncio.TimeoutError
            wire = Wire(*opening.result())
        except BaseException as error:
            opening.cancel()
            opening.add_done_callback(abort_opened)
            if isinstance(error, (OSError, asyncio.TimeoutError, ValueError)):
                raise unreachable(target, proxy, error) from error
            raise
        keep_alive(wire)
        wire.target = target
        return wire

    async def open(self, target: Target, proxy: str) -> Any:
        context = self.tls() if target.secure else None
        secured = {"ssl": context, "ssl_handshake_timeout": CONNECT_SECONDS} \
            if target.secure else {}
        if proxy and target.secure:
            sock = await tunnel(proxy, target)
            return await asyncio.open_connection(
                sock=sock, server_hostname=target.host, **secured)
        host, port = target.host, target.port
        if proxy:
            host, port = url_target(proxy)[1:]
        return await asyncio.open_connection(
            host, port, happy_eyeballs_delay=head_start(host), **secured)

    def tls(self) -> ssl.SSLContext:
        self.context = self.context or tls_context(self.config.ca_files)
        return self.context


ANTHROPIC_VERSION = "2023-06-01"        # the only one that there has been since


def credentials(config: Config) -> Headers:
    """The key as upstream takes it: those who speak Anthropic's language differ."""
    bearer = [("Authorization", f"Bearer {config.api_key}")]
    own = [("x-api-key", config.api_key)]
    if not config.api_key:
        return []
    if not speaks_messages(config):
        return bearer
    return own if is_anthropic(config) else own + bearer


def head_fault(wire: Wire, error: ProxyError) -> ProxyError:
    """An error in upstream's head as the client is to hear it."""
    if wire.expired and wire.held:
        words = f"upstream's head was not whole within {HEAD_SECONDS:g} s"
        return ProxyError(504, words)
    if wire.held[:2] in (b"\x15\x03", b"\x16\x03"):
        words = "upstream speaks TLS: the base URL should begin with https://"
        return ProxyError(502, words)
    if error.status < 500:
        return ProxyError(502, f"upstream's answer: {error.message}")
    return error


TCP_ALIVE = [       # options by their names: not every platform has each
    ("TCP_KEEPIDLE", ALIVE_SECONDS), ("TCP_KEEPALIVE", ALIVE_SECONDS),    # macOS
    ("TCP_KEEPINTVL", ALIVE_RETRY_SECONDS), ("TCP_KEEPCNT", ALIVE_TRIES),
]


def keep_alive(wire: Wire) -> None:
    """Let the kernel find out, in a silence, that a peer is gone without a word."""
    sock = wire.writer.get_extra_info("socket")
    with contextlib.suppress(OSError):      # it may have gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in TCP_ALIVE:
            if hasattr(socket, name):
                option = getattr(socket, name)
                sock.setsockopt(socket.IPPROTO_TCP, option, int(value))


def watch_deliveries(wire: Wire) -> None:
    """Give a connection of the pool up soon if what goes out on it arrives nowhere.

    Only such a one, whose request can be sent again: a peer that lives, but is too
    busy to read a long request, falls under the same limit on Linux.
    """
    sock = wire.writer.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        option = socket.TCP_USER_TIMEOUT
        sock.setsockopt(socket.IPPROTO_TCP, option, int(DEAD_SECONDS * 1000))


def head_start(host: str) -> Optional[float]:
    """Seconds between a name's addresses; None for an address, which races with none:
    asyncio's race leaves its socket to the garbage collector when it is cancelled."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return HAPPY_EYEBALLS_SECONDS
    return None


def abort_opened(opening: asyncio.Future) -> None:
    """Close a connection that was made when nobody waited for it any more."""
    if not opening.cancelled() and not opening.exception():
        opening.result()[1].transport.abort()


def url_target(url: str) -> Target:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    return Target(secure, parts.hostname or "", parts.port or (443 if secure else 80))


def poll_url(base_url: str, request_id: str) -> str:
    """Where a queued request is asked after; NVIDIA's hosted queue has its own host."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", request_id):
        raise ProxyError(502, "upstream's nvcf-reqid is not an id")
    parts = urlsplit(base_url)
    hosted = parts.hostname == "integrate.api.nvidia.com"
    host = "api.nvcf.nvidia.com" if hosted else parts.netloc
    return f"{parts.scheme}://{host}/v2/nvcf/pexec/status/{request_id}"


def unreachable(target: Target, proxy: str, error: BaseException) -> ProxyError:
    """A connection's failure in words: what was tried, what failed, what helps."""
    where = f"{target.host}:{target.port}"
    whose = "server"
    if proxy:
        where += f" through the proxy {urlsplit(proxy).hostname}"
        whose = "proxy"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        why = f"the {whose}'s name cannot be resolved; check it and the network"
    elif isinstance(error, asyncio.TimeoutError):
        why = f"no connection within {2 * CONNECT_SECONDS:g} s"
    elif error_numbers(error) == {errno.ECONNREFUSED}:
        why = f"nothing listens there; is the {whose} running?"
    else:
        why = failure_words(error)
    again = "broken" if isinstance(error, ConnectionResetError) else ""
    return ProxyError(502, f"cannot reach {where}: {why}", again=again)


CERTIFICATE_FAULTS = {      # OpenSSL's codes, the most frequent ones
    9: "is not valid yet; check this machine's clock",
    10: "has expired; whoever runs the server has to renew it",
    62: "is for another host; check the host in the base URL",
    64: "is for another address; check the host in the base URL",
}
NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL",
          "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}     # as versions name it


def failure_words(error: BaseException) -> str:
    """What a failed connection's error means, without addresses and numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        fault = CERTIFICATE_FAULTS.get(error.verify_code) or (
            f"is not trusted ({error.verify_message}); a company's own authority goes "
            "into SSL_CERT_FILE")
        return f"its certificate {fault}"
    if isinstance(error, ssl.SSLError):
        if error.reason in NO_TLS:
            return "it does not speak TLS; should the base URL begin with http://?"
        reason = (error.reason or "the connection was cut").lower().replace("_", " ")
        return f"TLS failed: {reason}"
    numbers = sorted(error_numbers(error))
    if numbers:
        return " and ".join(map(os.strerror, numbers)).lower()
    return str(error) or "the connection was closed while it was being made"


def error_numbers(error: BaseException) -> Set[int]:
    """All errnos of an error; asyncio tells those of several addresses in a text."""
    texts = re.findall(r"\[Errno (\d+)\]", str(error))
    return {int(text) for text in texts}


# ---- certificates and proxies

SYSTEM_CA_FILES = ("/etc/ssl/cert.pem", "/etc/ssl/certs/ca-certificates.crt",
                   "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem")


def tls_context(ca_files: Tuple[Tuple[str, str], ...]) -> ssl.SSLContext:
    """Verification is always on; the variables' authorities come on top of Python's.

    Raises ProxyError(502) naming variable and path of what cannot be loaded.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if not context.cert_store_stats()["x509_ca"]:       # python.org's macOS
        for path in filter(os.path.exists, SYSTEM_CA_FILES):
            context.load_verify_locations(cafile=path)
    for variable, path in ca_files:
        try:
            if os.path.isdir(path):
                context.load_verify_locations(capath=path)
            else:
                context.load_verify_locations(cafile=path)
        except OSError as error:
            raise ProxyError(502, f"{variable}={path}: {error}") from None
    if ca_files:    # Python 3.13 refuses company authorities that curl and node accept
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


def proxy_for(config: Config, target: Target) -> str:
    """The HTTP proxy's URL on the way to a target, or "" for the direct way.

    Raises ProxyError(502) for a proxy of a kind that is not spoken here: going
    around it silently would be wrong.
    """
    url = config.https_proxy if target.secure else config.http_proxy
    if not url or bypasses(config.no_proxy, target):
        return ""
    url = url if "://" in url else "http://" + url
    with contextlib.suppress(ValueError):
        if urlsplit(url).scheme == "http" and url_target(url).host:
            return url
    raise ProxyError(502, f"proxy {masked(url)}: expected http://host:port")


def on_loopback(host: str) -> bool:
    """Whether a host, which may be an address in brackets, is this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower().rstrip(".") == "localhost"


def bypasses(no_proxy: str, target: Target) -> bool:
    """Whether NO_PROXY, or being on this machine, exempts a target.

    Entries: *, host (with its sub-domains), .host, host:port, address, network.
    """
    host = target.host.lower().rstrip(".")
    if on_loopback(host):
        return True
    address = None
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        name, _, port = entry.rpartition(":") if re.search(r"[^:]:\d+$", entry) \
            else (entry, "", "")
        if not name or port and int(port) != target.port:
            continue
        with contextlib.suppress(ValueError):
            if address and address in ipaddress.ip_network(name.strip("[]"), False):
                return True
        bare = re.sub(r"^\*?\.", "", name).rstrip(".")
        if name == "*" or host == bare or host.endswith("." + bare):
            return True
    return False


def proxy_authorization(proxy: str) -> Headers:
    parts = urlsplit(proxy)
    if parts.username is None:
        return []
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return [("Proxy-Authorization", "Basic " + base64.b64encode(pair).decode())]


async def tunnel(proxy: str, target: Target) -> socket.socket:
    """A socket to the target through an HTTP proxy's CONNECT.  Raises OSError.

    Made by hand, because StreamWriter.start_tls exists only from Python 3.11 on.
    """
    loop = asyncio.get_running_loop()
    host = f"[{target.host}]" if ":" in target.host else target.host
    where = f"{host}:{target.port}"
    headers = [("Host", where), *proxy_authorization(proxy)]
    request = encode_head(f"CONNECT {where} HTTP/1.1", headers)
    sock = await connected_socket(url_target(proxy))
    try:
        await loop.sock_sendall(sock, request)
        head = b""
        while b"\r\n\r\n" not in head:
            data = await loop.sock_recv(sock, 4096)
            head += data
            if not data:
                raise OSError("the proxy closed the connection")
            if len(head) > MAX_TUNNEL_HEAD_BYTES:
                raise OSError(f"the proxy's head is over {MAX_TUNNEL_HEAD_BYTES} bytes")
        check_tunnel(head)
    except BaseException:
        sock.close()
        raise
    return sock


TUNNEL_FAULTS = {           # what the proxy's status calls for
    403: "; it does not let this host through",
    407: "; check user and password in HTTPS_PROXY",
    502: "; it cannot reach the host", 503: "; it cannot reach the host",
    504: "; it cannot reach the host",
}


def check_tunnel(head: bytes) -> None:
    """Raise OSError unless a proxy's answer to CONNECT opens a tunnel."""
    head, end, more = head.partition(b"\r\n\r\n")
    try:
        status, _, _ = parse_status(head + end)
    except ProxyError:
        raise OSError("the proxy does not answer in HTTP/1.1") from None
    if not 200 <= status < 300:
        raise OSError(f"the proxy answered {status}{TUNNEL_FAULTS.get(status, '')}")
    if more:
        raise OSError("the proxy sent bytes of its own into the tunnel")


async def connected_socket(place: Target) -> socket.socket:
    """A socket to the first of a place's addresses that takes the connection."""
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    failure: BaseException = OSError("it has no address")
    for family, kind, protocol, _, address in infos:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:        # a family that this machine does not have
            failure = error
            continue
        sock.setblocking(False)
        connecting = asyncio.ensure_future(loop.sock_connect(sock, address))
        try:
            await asyncio.wait({connecting}, timeout=CONNECT_SECONDS)
            if not connecting.done():
                raise asyncio.TimeoutError
            connecting.result()
            return sock
        except BaseException as error:
            connecting.cancel()
            connecting.add_done_callback(lambda task, sock=sock: sock.close())
            if not isinstance(error, (OSError, asyncio.TimeoutError)):
                raise
            failure = error
    raise failure


# ---- 23. Memory --------------------------------------------------------------
# What upstreams have refused, so that they are asked rightly the next time.  A file
# that may be deleted at any time; that it cannot be read or written is never fatal.

log = logging.getLogger("nimproxy")
RECENT_SECONDS = 600.0      # one refusal is believed for so long, and not written down
ANEW_SECONDS = 3600.0       # what takes something away from a model is tried without
LEARNED_SECONDS = 7 * 86400.0   # then a server may have become wiser, and is tried anew
MAX_LESSONS = 1024          # recent ones; a model has a few
MAX_LEARNED_BYTES = 1 << 20     # of the file; a model's entry has some 100
LOCK_TRIES = 100            # each a millisecond; a file is changed in less than one


class Lesson(NamedTuple):
    """A mend that helped, as this process saw it."""
    at: float               # on the monotonic clock
    words: str              # the refusal's, without figures; "": not to be kept
    asked: str              # the request's id


class Learned:
    """Mends by base URL and model: in force for a while after each that helped, and
    kept once a second request, sent without it, was refused in the same words.

        {"https://host/v1": {"some/model": {"drop:top_k": "2026-11-21T08:30:00Z"}}}

    When the file has changed it is read anew; of a model that has an empty row there,
    or of all if "" has or nothing is in it, what is not kept is forgotten as well.
    """

    def __init__(self, home: str) -> None:
        self.path = os.path.join(home, "learned.json") if home else ""
        self.tree: Dict[str, Dict[str, Dict[str, str]]] = {}
        self.read: Tuple[int, ...] = ()     # the state of the file that the tree is of
        self.recent: Dict[Tuple[str, str, str], Lesson] = {}
        self.lost: Dict[Tuple[str, str, str], str] = {}     # what was said to be so
        self.refresh()

    def refresh(self) -> None:
        state: Tuple[int, ...] = ()
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            state = found.st_mtime_ns, found.st_ino, found.st_size
        if state != self.read:
            self.tree, self.read = self.load() if state else {}, state
            rows = [row for models in self.tree.values() for row in models.items()]
            self.recent = {key: lesson for key, lesson in self.recent.items()
                           if rows and ("", {}) not in rows
                           and (key[1], {}) not in rows}

    def mends(self, base_url: str, model: str) -> Dict[str, str]:
        """A model's mends, the last ones last, and since when each is kept; "": not."""
        self.refresh()
        rows, kept = {}, self.tree.get(base_url, {}).get(model, {})
        for mend in sorted(kept, key=kept.get):
            seconds = ANEW_SECONDS if change_of(mend).loss else LEARNED_SECONDS
            if plausible(mend) and stamp(seconds) < kept[mend] <= stamp(0.0):
                rows[mend] = kept[mend]
        for (*place, mend), lesson in self.recent.items():
            if (place == [base_url, model]
                    and lesson.at > time.monotonic() - RECENT_SECONDS):
                rows.setdefault(mend, "")
        for key in [*self.lost]:
            if key[:2] == (base_url, model) and key[2] not in rows:
                log.warning("%r: tried anew without %s", model, self.lost.pop(key))
        return rows

    def models(self, base_url: str) -> Dict[str, Dict[str, str]]:
        """What is in force, by model."""
        self.refresh()
        names = [*self.tree.get(base_url, {}), *(key[1] for key in self.recent)]
        rows = {name: self.mends(base_url, name) for name in names}
        return {name: mends for name, mends in rows.items() if mends}

    def window(self, base_url: str, model: str) -> int:
        """The window that an overflow has told last, in tokens; 0 if none has."""
        windows = [mend[7:] for mend in self.mends(base_url, model)
                   if mend.startswith("window:")]
        return int(windows[-1]) if windows else 0

    def learn(self, base_url: str, model: str, mend: str, lesson: Lesson) -> None:
        """Note that a mend has helped; keep it if another request says the same."""
        self.refresh()
        key, loss = (base_url, model, mend), change_of(mend).loss
        first = self.recent.pop(key, lesson)
        self.recent[key] = lesson
        if loss and key not in self.lost:
            self.lost[key] = mend
            log.warning("%r: %s for a while, after a refusal (%s)", model, loss, mend)
        for rows in (self.recent, self.lost):
            while len(rows) > MAX_LESSONS:
                del rows[next(iter(rows))]
        when = self.mends(base_url, model).get(mend, "")    # "" once it has run out
        again = first.asked != lesson.asked and first.words == lesson.words
        if lesson.words and (again or when) and when < stamp(RECENT_SECONDS):
            with self.edited(lambda *_: True) as tree:
                tree.setdefault(base_url, {}).setdefault(model, {})[mend] = stamp(0.0)

    def forget(self, base_url: str, model: str = "", start: str = "") -> None:
        """Drop, in each process, the mends of a model, or of all, that start so."""
        def stays(name: str, mend: str) -> bool:
            return model not in ("", name) or not mend.startswith(start)

        self.recent = {key: lesson for key, lesson in self.recent.items()
                       if stays(*key[1:])}
        with self.edited(stays) as tree:
            tree.setdefault(base_url, {}).setdefault(model, {})

    def load(self) -> Dict[str, Dict[str, Dict[str, str]]]:
        """The file's rows; one that is not ours is set aside, and that is said."""
        try:
            with plain_file(self.path) as file:
                return learned_rows(decode_json(file.read(MAX_LEARNED_BYTES)))
        except OSError as error:
            log.warning("cannot read %s: %s", self.path, error.strerror)
        except (ValueError, RecursionError):
            log.warning("%s is damaged: set aside as %s.bad", self.path, self.path)
            with contextlib.suppress(OSError):
                os.replace(self.path, self.path + ".bad")
        return {}

    @contextlib.contextmanager
    def edited(self, stays: Callable[[str, str], bool]) -> Iterator[Json]:
        """What stays of the file, to be changed by nobody else meanwhile.  Who does not
        let go is not waited for, and Windows has no such locks."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ImportError, OSError):
                import fcntl
                os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
                folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
                stack.callback(os.close, folder)
                for _ in range(LOCK_TRIES):
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(0.001)
            self.refresh()
            oldest = stamp(LEARNED_SECONDS)
            for models in self.tree.values():
                for model, rows in list(models.items()):
                    models[model] = {mend: when for mend, when in rows.items()
                                     if when > oldest and stays(model, mend)}
                    if not models[model] or len(models) > MAX_KNOWN:
                        del models[model]
            yield self.tree
            try:
                if self.path:
                    replace_file(self.path, json.dumps(self.tree, indent=1) + "\n")
                    self.read = (0,)        # no state that a file has: it is read again
            except OSError as error:
                log.warning("cannot remember in %s: %s", self.path, error.strerror)
                self.path, self.read = "", ()       # said once


def plain_file(path: str, encoding: str = "utf-8") -> TextIO:
    """A file of ours, to be read.  Raises OSError, for a pipe, too: that would wait."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "expected a plain file")
    return open(path, encoding=encoding)


def replace_file(path: str, text: str) -> None:
    """Write a file of ours, for us alone, in one step; OSError leaves the old one."""
    fresh = f"{path}.{os.urandom(4).hex()}"
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    try:
        with open(fresh, "x", encoding="utf-8",
                  opener=functools.partial(os.open, mode=0o600)) as file:
            file.write(text)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


def stamp(ago: float) -> str:
    """A moment so many seconds ago, in a form that sorts by time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago))


def learned_rows(tree: Any) -> Dict[str, Dict[str, Dict[str, str]]]:
    """The file's tree; ValueError if it has another shape."""
    with contextlib.suppress(AttributeError):
        if all(isinstance(when, str) for models in tree.values()
               for rows in models.values() for when in rows.values()):
            return tree
    raise ValueError("expected times by mend, by model, by base URL")


# ---- 24. Journal -------------------------------------------------------------
# What became of requests: a line of the log for each, a file a day of those that
# failed, and one of the tokens of the others.  The files are bounded, may be deleted,
# and never stop an answer.

DAY_LOG_BYTES = 32 << 20        # of one day: 100,000 answers, or 50,000 errors
DAY_LOG_DAYS = 30               # that are kept: what a bug report looks back on
ERROR_LOG, USAGE_LOG = "error_logs", "token_usage"      # the folders' names


class Course:
    """What became of one request, as far as it has come."""

    def __init__(self, what: str = "") -> None:
        self.id = "req_" + os.urandom(12).hex()
        self.asked = what       # a path, or the model that the client asked for
        self.tongue = "anthropic"       # row of TONGUES: what the client speaks
        self.model = ""         # upstream's id of the one that answers
        self.session = ""       # the client's own id of the conversation
        self.rank = MAIN
        self.streams = False
        self.raises = False     # the client is an SDK, which raises what we say
        self.claude = False     # it is Claude Code, which asks again by itself
        self.began = time.monotonic()
        self.first = 0.0        # seconds to the first word
        self.queued = 0.0       # seconds without a turn
        self.tries: Dict[str, int] = collections.Counter()  # of this model, by kind
        self.retries = 0        # repetitions in all
        self.failed = 0.0       # when it first did
        self.fallback = ""      # why another model answers
        self.given_up: List[str] = []   # models that have failed
        self.ticket: Optional[Ticket] = None    # of the last attempt
        self.usage: Dict[str, int] = {}

    def facts(self, status: int) -> Json:
        """The course as the fields of a JSON log; what has no value is left out."""
        usage = self.usage
        facts = {
            "id": self.id[-8:], "asked": self.asked, "model": self.model,
            "status": status, "ttft": round(self.first, 3),
            "input_tokens": whole_prompt(usage),
            "output_tokens": usage.get("output_tokens", 0),
            "seconds": round(time.monotonic() - self.began, 3),
            "queued": round(self.queued, 3), "retries": self.retries,
            "fallback": self.fallback, "session": self.session[:8],
        }
        return {name: value for name, value in facts.items() if value}


def whole_prompt(usage: Dict[str, int]) -> int:
    """The tokens of the whole prompt: Anthropic counts the cached ones apart."""
    return sum(usage.get(name, 0) for name in PROMPT_FIGURES)


PROMPT_FIGURES = ("input_tokens", "cache_creation_input_tokens",
                  "cache_read_input_tokens")


def facts_line(facts: Json) -> str:
    """The same in words: `1a2b3c4d claude-opus -> z-ai/glm-5.3 200 ttft 0.51 s, ...`"""
    arrow = f" -> {facts['model']}" if "model" in facts else ""
    start = f"{facts['id']} {facts.get('asked') or '-'}{arrow} {facts['status']}"
    words = [phrase.format(facts[name]) for name, phrase in FACT_WORDS.items()
             if name in facts]
    return " ".join([start, ", ".join(words)]).rstrip()     # one refused has no words


FACT_WORDS = {
    "ttft": "ttft {:.2f} s", "input_tokens": "in {}", "output_tokens": "out {}",
    "seconds": "{:.2f} s", "queued": "queued {:.1f} s", "retries": "retries {}",
    "fallback": "fallback: {}",
}


def printable(text: str) -> str:
    """Text for one line of a log or a header: nothing that could forge another."""
    return re.sub(r"[^ -~]", lambda match: ascii(match[0])[1:-1], text)


class DayLog:
    """JSON lines in a folder, in a file a day."""

    def __init__(self, home: str, name: str) -> None:
        self.folder = os.path.join(home, name) if home else ""
        self.troubled = False               # what stops it is said once

    def add(self, row: Json) -> None:
        """Append a row, under the time of now; nothing is raised."""
        if not self.folder:
            return
        row = {"timestamp": time.strftime("%Y-%m-%dT%H:%M:%S"), **row}
        line = encode_json(row) + "\n"
        path = day_file(self.folder)
        try:
            self.write(path, line.encode("ascii"))
        except OSError as trouble:
            if not self.troubled:
                log.warning("cannot write %s: %s", path, trouble.strerror)
            self.troubled = True

    def write(self, path: str, line: bytes) -> None:
        """Append in one piece, to nothing but a plain file of ours; OSError."""
        if not os.path.exists(path):
            for folder in (os.path.dirname(self.folder), self.folder):
                os.makedirs(folder, 0o700, exist_ok=True)   # the mode is the last one's
            self.thin_out()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        flags |= getattr(os, "O_NONBLOCK", 0)   # a pipe that nobody reads is an error
        file = os.open(path, flags, 0o600)
        try:
            there = os.fstat(file)
            if not stat.S_ISREG(there.st_mode):
                raise OSError(errno.EINVAL, "expected a plain file there")
            if there.st_size + len(line) <= DAY_LOG_BYTES:
                os.write(file, line)
        finally:
            os.close(file)

    def thin_out(self) -> None:
        """Delete the days that are too old, before another one begins."""
        days = [name for name in os.listdir(self.folder) if DAY_FILE.fullmatch(name)]
        for name in sorted(days)[:1 - DAY_LOG_DAYS]:
            os.unlink(os.path.join(self.folder, name))


DAY_FILE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\.jsonl")     # by the local clock


def day_file(folder: str) -> str:
    """The path of today's file."""
    return os.path.join(folder, time.strftime("%Y-%m-%d") + ".jsonl")


def error_row(course: Course, error: ProxyError, config: Config) -> Json:
    """A request that failed, as the seed's own error log has it."""
    return {
        "request_id": course.id, "provider": upstream_place(config),
        "model_name": course.model, "streaming": course.streams, "error": {
            "message": error.message, "status": error.status, "type": error.kind}}


def usage_row(course: Course, config: Config) -> Json:
    """An answer's tokens, as the seed's own usage log has them: those of the prompt
    hold the cached ones."""
    cached = course.usage.get("cache_read_input_tokens", 0)
    return {
        "provider": upstream_place(config),
        "model_name": course.asked or course.model, "model": course.model,
        "input_tokens": whole_prompt(course.usage),
        "output_tokens": course.usage.get("output_tokens", 0),
        "streaming": course.streams,
        **({"cached_input_tokens": cached} if cached else {})}


# The figures of a row, under the names of the seed and of its own ancestor.
USAGE_FIGURES = [("input_tokens", "inputTokens"), ("output_tokens", "outputTokens"),
                 ("cached_input_tokens", "cachedInputTokens")]
USAGE_MODELS = ("model", "model_name", "modelName")


def usage_figures(line: str) -> Tuple[str, List[int]]:
    """The model of a line of a usage log, and its figures: 1 for the answer, tokens in,
    out and cached.  ValueError, RecursionError for a line that is none."""
    row = decode_json(line)
    if not isinstance(row, dict):
        raise ValueError("expected an object")
    model = next((row[name] for name in USAGE_MODELS if row.get(name)), None)
    values = [next((row[name] for name in names if row.get(name) is not None), 0)
              for names in USAGE_FIGURES]
    if not isinstance(model, str) or not all(type(value) is int and value >= 0
                                             for value in values):
        raise ValueError("expected a model and whole numbers of tokens")
    return model, [1, *values]


# ---- 25. Asking: which model, whose turn, again and instead ------------------
# A question's way to upstream: the model that it goes to, the turn that it waits for,
# how it is mended, repeated, or asked of another model, until an answer begins.

STICKY_SECONDS = 900.0      # with a fallback; then the model is tried anew
STICKY = ("gone", "gated", "degraded", "busy")      # the others are seen beforehand
IMAGE = re.compile(rb'"type"\s*:\s*"image"')      # not within a string: no backslash
WINDOW_KEYS = ("loaded_context_length", "max_model_len", "context_length",
               "max_context_length")
OWN_SERVERS = ("nvidia", "custom", "lmstudio")      # where the windows may be told
NEAR_SECONDS = 0.02         # a request waits for them, where the server is near
LOOK_SECONDS = 2.0          # for windows; a server that is near takes milliseconds


class Question(NamedTuple):
    """One request on its way upstream; held as long as its answer takes, so
    the parsed body is not in it."""
    raw: bytes              # the body as it came: a failure is remembered under it
    estimate: int           # of its tokens, before calibration
    model: str              # upstream's id
    message: Union[Message, Passed]     # what becomes of the answer
    course: Course


Again = Callable[[], Awaitable[Json]]   # asks anew, without streaming
Sent = Union[Json, Parcel]              # a chat, or a body that passes
Attempt = Callable[[Question, Sent], Awaitable[Any]]


class Trial(NamedTuple):
    """A mend under way: the refusal that it is for, and the chat without it."""
    mend: str = ""
    words: str = ""
    said: int = 0           # the status that they came with
    chat: Json = {}


class Asker:
    """Asks upstream for the clients; its state: what is known of upstream's models."""

    def __init__(self, config: Config, upstream: Upstream,
                 counts: Dict[str, int]) -> None:
        self.config, self.upstream, self.counts = config, upstream, counts
        self.gate = Gate(config)
        # what is known of models
        self.learned = Learned(config.home)
        self.sticky: Dict[Tuple[str, str], Tuple[str, str, float]] = {}  # see `chosen`
        self.windows: Dict[str, int] = {}   # as the server tells them
        self.looking: Any = None            # the task that asks for those
        self.calibrations: Dict[str, Calibration] = {}  # of the last MAX_KNOWN models
        self.fielded: Set[str] = set()      # models whose server parts off thinking
        self.orphans: Dict[str, str] = {}   # what ends thinking that nothing begins
        self.warned: Set[str] = set()       # what is said of a model only once
        # what requests have in common
        self.toolboxes: Any = collections.deque(maxlen=KEPT_TOOLBOXES)
        self.tool_texts: Any = collections.deque(maxlen=KEPT_TOOLBOXES)
        self.documents: Dict[int, str] = {}     # the text of the last PDFs

    async def close(self) -> None:
        if self.looking:
            self.looking.cancel()
            await asyncio.gather(self.looking, return_exceptions=True)
        self.gate.close()
        await self.upstream.close()

    # which model answers

    async def answered(self, question: Question, chat: Sent, attempt: Attempt) -> Any:
        """What an attempt gives: of the model, or else of its fallbacks in turn."""
        course, first = question.course, None
        while True:
            try:
                with alarm(self.config.connect_warning, self.warn, course):
                    done = await self.taken(question, chat, attempt)
            except ProxyError as error:
                first = first or error.with_traceback(None)     # which holds `first`
                model = self.next_model(question, error)
                if not model:
                    raise vain(first, [*course.given_up, question.model][1:])
                question, chat = self.turned(question, model, error)
            else:
                self.stick(course, first)
                return done

    def next_model(self, question: Question, error: ProxyError) -> str:
        """The model to ask after an error, each once; "" if none can help, or is left.

        A fallback that a session has come to use may be followed by those before it.
        """
        course = question.course
        models = self.models_for(course)
        if error.again:
            error.fallback = error.fallback or "busy"
        if not error.fallback or question.model not in models:
            return ""
        tried = {*course.given_up, question.model}
        rest = [name for name in turned_to(question.model, models) if name not in tried]
        return next((name for name in rest if not self.misfit(
            name, question.raw, question.estimate)), "")

    def turned(self, question: Question, model: str,
               error: ProxyError) -> Tuple[Question, Sent]:
        """The same question for another model, and its chat."""
        course = question.course
        log.warning("%s %s: %s (asking %s instead)", course.id[-8:],
                    question.model, error.message, model)
        course.given_up.append(question.model)
        course.fallback = error.fallback if model != self.own_model(course) else ""
        course.tries.clear()
        question = question._replace(model=model)
        body = parse_body(question.raw)
        self.read_documents(body)
        return question, self.chat(question, body)

    def stick(self, course: Course, error: Optional[ProxyError]) -> None:
        """Let a session stay with its fallback for a while: its cache is there."""
        if not course.session or not error or error.fallback not in STICKY:
            return
        key = (course.session, self.own_model(course))
        self.sticky.pop(key, None)
        while len(self.sticky) >= MAX_KNOWN:
            del self.sticky[next(iter(self.sticky))]
        if course.fallback:
            self.sticky[key] = (course.model, error.fallback, time.monotonic())

    def chosen(self, course: Course, raw: bytes, estimate: int) -> str:
        """The model to ask: the one that was asked for, the fallback that this session
        has come to use, or the first one that takes such a request at all."""
        models, why = self.models_for(course), ""
        model = models[0]
        if len(models) == 1:
            return model
        name, reason, since = self.sticky.get((course.session, model), (model, "", 0.0))
        if name in models and time.monotonic() - since < STICKY_SECONDS:
            models, why = turned_to(name, models), reason
        for name in models:
            misfit = self.misfit(name, raw, estimate)
            if not misfit:
                course.fallback = why if name != model else ""
                return name
            why = why or misfit
        return model

    def models_for(self, course: Course) -> List[str]:
        """The model that was asked for, and its fallbacks in order."""
        model = self.own_model(course)
        others = map(self.known_as, fallbacks_of(self.config, course.asked, model))
        return list(dict.fromkeys([model, *others]))

    def misfit(self, model: str, raw: bytes, estimate: int) -> str:
        """Why a model cannot take a request, as far as is known; "" if it can."""
        facts = self.facts(model)
        if not facts.vision or "blind" in self.mends(model):
            if IMAGE.search(raw):
                return "images"
        tokens = estimate * self.factor(model)
        small = facts.sure and tokens + LEAST_OUTPUT_TOKENS > facts.window
        return "window" if small else ""

    def own_model(self, course: Course) -> str:
        return self.known_as(upstream_model(self.config, course.asked))

    def known_as(self, model: str) -> str:
        """The id to ask for: a retired one's successor on NVIDIA's own endpoint."""
        if self.config.default_model == DEMO_MODEL:
            return DEMO_MODEL               # nothing of a demo goes anywhere else
        own = self.config.base_url == PROVIDERS[self.config.provider].base_url
        if not own or model not in SUCCESSORS:
            return model
        if model not in self.warned:
            self.warned.add(model)
            log.warning("%s is retired: asking %s instead", model, SUCCESSORS[model])
        return SUCCESSORS[model]

    def warn(self, course: Course) -> None:
        log.warning("%s %s: not a word for %g s; still waiting", course.id[-8:],
                    course.model, self.config.connect_warning)

    # mended and repeated

    async def taken(self, question: Question, chat: Sent, attempt: Attempt) -> Any:
        """What an attempt gives, of a chat that is mended as long as upstream's
        refusals say how; what helped is learned."""
        tried: List[str] = []
        last = Trial()
        while True:
            try:
                done = await attempt(question, chat)
            except ProxyError as error:
                if last.mend and signless(error.words) == signless(last.words):
                    chat, last = last.chat, Trial()     # in vain: without it, then
                mend = self.mend(question, chat, error, tried)
                if mend:                # the next hurdle, so that the last is taken
                    self.learn(question, last)
                elif not await self.patient(question, error):
                    error.message += self.image_hint(chat, error)
                    raise
                question.message.restart()
                if not mend:
                    continue
                tried.append(mend)
                last = Trial(mend, error.words, error.said, chat)
                chat = decode_json(encode_json(chat))
                apply_mend(mend, chat)
                log.info("%s %s: %s (asking again with %s)", question.course.id[-8:],
                         question.model, error.words, mend)
            else:
                self.learn(question, last)
                return done

    def mend(self, question: Question, chat: Sent, error: ProxyError,
             tried: List[str]) -> str:
        """The mend that a refusal asks for; "" if there is none, or no more."""
        if isinstance(chat, Parcel):
            return ""                   # it passes as it is
        if not error.words or len(tried) >= MAX_MENDS or question.message.index >= 0:
            return ""
        found = overflow_figures(error.words)
        if found is None:
            mend = mend_for(error.words, chat, tried)
            if mend == "blind":
                error.fallback = "images"
                if self.next_model(question, error):    # better seen by another model
                    self.learn(question, Trial(mend, error.words, error.said))
                    mend = ""
            return mend
        facts = model_facts(self.config, question.model)
        window = f"window:{found.get('n', 0)}"
        if plausible(window) and (found["n"] <= facts.window or not facts.sure):
            self.learn(question, Trial(window, error.words, error.said))
        margin = 4096 << len(tried) if "at least" in error.words else 64
        room = found.get("n", 0) - found.get("p", math.inf) - margin
        mend = f"now:{room}"
        fits = LEAST_OUTPUT_TOKENS <= room < wanted_tokens(chat)
        return mend if fits and mend not in tried else ""

    async def patient(self, question: Question, error: ProxyError) -> bool:
        """Wait until the same may be asked again; False if that is not worth while.

        Nothing of the answer is out yet, so that nothing is said or run twice.
        """
        config, course, kind = self.config, question.course, error.again
        self.strike(course, error)
        most = config.start_retries if kind == "broken" else config.retries
        tries, now = course.tries[kind], time.monotonic()
        if not kind or tries >= most or error.pause > RETRIES[kind].most:
            return False
        if kind == "rate" and tries == 0 and self.gate.given_up(question.model):
            return False                # others have been as patient
        if error.fallback == "degraded" and self.next_model(question, error):
            return False                # it takes hours rather than seconds
        pause = max(error.pause, back_off(RETRIES[kind], tries, dice()))
        course.failed = course.failed or now
        if now + pause > course.failed + RETRY_SECONDS:
            return False
        course.tries[kind] += 1
        course.retries += 1
        self.counts["retried_" + kind] += 1
        if kind == "rate":              # the whole model waits, at the gate
            pause = self.gate.pacer.delay(question.model)
        log.info("%s %s: %s (asking again in %.1f s)", course.id[-8:],
                 course.model, error.message, pause)
        if kind != "rate":
            await asyncio.sleep(pause)
        return True

    def strike(self, course: Course, error: ProxyError) -> None:
        """Let a model pause whose answer was a 429."""
        if error.again == "rate":
            self.gate.pacer.refused(course.ticket, error.pause, dice())

    def image_hint(self, chat: Sent, error: ProxyError) -> str:
        """A word on images that may be the reason of a refusal."""
        most = host_row(self.config).image_bytes
        if not error.words or not most:
            return ""
        sizes = [len(part["image_url"]["url"]) for message in chat["messages"]
                 if isinstance(message["content"], list) for part in message["content"]
                 if part["type"] == "image_url"]
        if max(sizes, default=0) <= most:
            return ""
        return (f" An image here has {max(sizes) // 1000} kB in base64; many models at "
                f"this host take {most // 1000}: scale it down.")

    def learn(self, question: Question, trial: Trial) -> None:
        """Count a mend that helped, and remember it; a server's own failure (5xx) is
        not to be kept."""
        if not trial.mend:
            return
        self.counts["mended_" + trial.mend.partition(":")[0]] += 1
        words = signless(trial.words) if trial.said < 500 else ""
        if plausible(trial.mend):
            self.learned.learn(
                self.config.base_url, question.model, trial.mend,
                Lesson(time.monotonic(), words, question.course.id))

    # one attempt

    async def told(self, question: Question, chat: Sent) -> Telling:
        """One attempt at a chat that streams, up to its first words."""
        telling = await self.taking(question, chat)
        try:
            await telling.begin()
        except BaseException:
            telling.release()
            raise
        course, message = question.course, question.message
        course.first = time.monotonic() - course.began
        asked = message.reading.asked._replace(sent=b"")    # what is refused is not
        message.reading = message.reading._replace(asked=asked)     # mended any more
        return telling

    async def read_whole(self, question: Question, chat: Sent) -> bytes:
        """One attempt at a chat that does not stream: the JSON that answers it."""
        telling = await self.taking(question, chat)
        try:
            return await telling.whole()
        finally:
            telling.release()

    async def taking(self, question: Question, chat: Sent) -> Telling:
        """An answer that takes the chat, about to be told; ProxyError for any other."""
        payload, course = self.payload(chat), question.course
        ticket = Ticket(question.model, course.session, course.rank, course.began)
        course.ticket, waits = ticket, time.monotonic()
        try:
            await self.gate.turn(ticket, course.queued)
        finally:
            course.queued += time.monotonic() - waits
        try:
            answer = await self.accepted(question, chat, payload)
        except BaseException:
            self.gate.leave(ticket)
            raise
        self.gate.pacer.answered(ticket)
        return Telling(question.message, answer, self.again(question, payload),
                       lambda: self.gate.leave(ticket))

    async def accepted(self, question: Question, chat: Sent,
                       payload: Tuple[str, str]) -> Any:
        """Upstream's answer, if it is a 200."""
        answer = await self.ask(chat, payload)
        try:
            await self.check(question, answer)
        except BaseException:
            answer.release()
            raise
        return answer

    async def ask(self, chat: Sent, payload: Tuple[str, str]) -> Any:
        """Upstream's answer to a chat, which is sent as its payload."""
        parcel = chat
        if not isinstance(chat, Parcel):
            data = "".join(payload).encode("ascii")
            parcel = Parcel(chat["model"], "/chat/completions", data, "stream" in chat)
        model, path, data, stream, headers = parcel
        if model == DEMO_MODEL:
            return Script(demo_chat(path, data) if parcel is chat else chat)
        most = host_row(self.config).most_bytes
        if 0 < most < len(data):
            raise ProxyError(413, f"the request has {len(data) >> 20} MB, and "
                                  f"{upstream_label(self.config)} takes {most >> 20}: "
                                  "fewer or smaller images and documents")
        return await self.upstream.ask(path, data, stream, headers)

    async def check(self, question: Question, answer: Any) -> None:
        """Raise what an answer other than 200 means."""
        if answer.status == 200:
            return
        raw = await answer.whole()
        asked = question.message.reading.asked
        text, status = error_words(raw, answer.status, asked.config.api_key)
        if 300 <= status < 400:
            found = re.match(r"https?://([^/?#@]+)", header(answer.headers, "location"))
            place = found[1] if found else "another place"
            text = f"a redirect to {place}, which is not followed"
        pause = retry_seconds(header(answer.headers, "retry-after"), time.time())
        error = refusal(asked, status, text, pause)
        if isinstance(question.message, Passed):
            error = kept_words(question.message, error, answer.status, value_in(raw))
        raise error

    def again(self, question: Question, payload: Tuple[str, str]) -> Again:
        """What asks a chat once more, for what can be used; {} if that fails.

        The chat is kept as text, which takes less memory.
        """
        async def ask() -> Json:
            chat = decode_json("".join(payload))
            for name in ("stream", "stream_options"):
                chat.pop(name, None)
            try:
                return await self.once_more(question, chat)
            except ProxyError as error:
                self.strike(question.course, error)
                log.warning("%s %s: %s (asked again in vain)", question.course.id[-8:],
                            question.model, error.message)
                return {}
        return ask

    async def once_more(self, question: Question, chat: Sent) -> Json:
        course = question.course
        ticket = Ticket(question.model, course.session, MAIN, time.monotonic())
        course.ticket = ticket
        await self.gate.turn(ticket)
        try:
            answer = await self.accepted(question, chat, self.payload(chat))
            try:
                return completion(await answer.whole(), question.message.reading.asked)
            finally:
                answer.release()
        finally:
            self.gate.leave(ticket)

    # the chat

    def chat(self, question: Question, body: Json) -> Sent:
        """The chat that puts a question to its model; its message is to be read so."""
        model, config = question.model, self.config
        if isinstance(question.message, Passed):
            return self.parcel(question)
        facts = self.facts(model)
        tokens = round(question.estimate * self.factor(model))
        mends, api = self.mends(model), upstream_api(config)
        if "replay" in mends:
            api = api._replace(replay="every")
        chat = chat_body(body, model, api, tokens, facts)
        for mend in mends:
            apply_mend(mend, chat)
        if "xml" in mends:                  # it has brought a temperature along
            thinks = wants_thinking(body, model_family(model))
            keep_sampling(chat, limits_of(api.name, model, thinks))
        question.message.restart(Reading(
            tools=self.toolbox(declared_tools(body)), stops=tuple(stop_sequences(body)),
            text_delta_chars=config.text_delta_chars, input_tokens=tokens,
            cumulative=model_family(model).cumulative, opens=self.opens(body, model),
            again=True, own_form="xml" in mends, promotes=not question.course.claude,
            asked=Asked(config, model, tokens, facts.window, question.raw)))
        question.course.model = model
        return chat

    def parcel(self, question: Question) -> Parcel:
        """The body that puts a question to its model, where that needs no chat."""
        model, config, passed = question.model, self.config, question.message
        tokens = round(question.estimate * self.factor(model))
        window = self.facts(model).window
        asked = Asked(config, model, tokens, window, question.raw)
        passed.restart(Reading(asked=asked))
        question.course.model = model
        data = passed_body(question.raw, model, is_anthropic(config))
        return Parcel(model, passed.path, data, question.course.streams, passed.headers)

    def read_documents(self, body: Json) -> None:
        read_documents(body, self.documents)
        while len(self.documents) > KEPT_DOCUMENTS:
            self.documents.pop(next(iter(self.documents)), None)

    def toolbox(self, tools: Tools) -> Tools:
        """The same tools as of an earlier request; by their text, since 1 == True."""
        text = encode_json(tools)
        for known, words in self.toolboxes:
            if words == text:
                return known
        self.toolboxes.append((tools, text))
        return tools

    def payload(self, chat: Sent) -> Tuple[str, str]:
        """The JSON of a chat in two pieces; the second one, the tools, is shared."""
        if isinstance(chat, Parcel):
            return "", ""               # that has its own bytes
        tools = chat.get("tools")
        if not tools:
            return encode_json(chat), ""
        text = ',"tools":' + encode_json(tools) + "}"
        if text in self.tool_texts:
            text = self.tool_texts[self.tool_texts.index(text)]
        else:
            self.tool_texts.append(text)
        rest = {name: value for name, value in chat.items() if name != "tools"}
        return encode_json(rest)[:-1], text

    def mends(self, model: str) -> List[str]:
        """What a chat needs so as not to be refused, as far as it is known."""
        known = self.learned.mends(self.config.base_url, model)
        prose = self.config.tool_format == "xml" or "xml" in known
        rest = [mend for mend in known if mend != "xml"]
        return [*(["xml"] if prose else []), *rest]     # it adds what others take out

    def opens(self, body: Json, model: str) -> str:
        """The tag that ends thinking which may begin without one.

        Hosts that we know part thinking off; there only a model that always thinks
        and has not been seen to do so in a field may begin inside of it.
        """
        family = model_family(model)
        always = family.always_thinks()
        own = not upstream_api(self.config).hosts
        own = own and self.facts(model).thinks is not False
        thinks = always or own and wants_thinking(body, family)
        return (self.orphans.get(model) or family.opens if thinks else
                self.orphans.get(model, "")) if model not in self.fielded else ""

    # what is known of models

    def facts(self, model: str) -> Model:
        """What is known of a model: as configured, learned, told by the server, or in
        the catalog."""
        facts = model_facts(self.config, model)
        window = (told_window(self.config, model)
                  or self.windows.get(model, 0)
                  or self.learned.window(self.config.base_url, model))
        if not window:
            return facts
        return facts._replace(window=window, output=min(facts.output, window),
                              sure=True)

    def factor(self, model: str) -> float:
        """What our estimate for a model is to be multiplied by."""
        known = self.calibrations.get(model)
        return known.factor if known else 1.0

    def compare(self, question: Question) -> None:
        """Learn from upstream's own figures; say so if it has cut the prompt."""
        message, model = question.message, question.course.model
        if message.fielded and len(self.fielded) < MAX_KNOWN:
            self.fielded.add(model)
        if message.watch.orphan and len(self.orphans) < MAX_KNOWN:
            self.orphans[model] = message.watch.orphan
        elif message.reading.opens and message.opened() and message.answers():
            self.orphans.pop(model, None)
        counted = whole_prompt(message.usage)
        if not counted:                 # upstream has told nothing
            return
        if counted > self.learned.window(self.config.base_url, model) > 0:
            self.learned.forget(self.config.base_url, model, "window:")
        while len(self.calibrations) >= MAX_KNOWN:
            del self.calibrations[next(iter(self.calibrations))]
        known = self.calibrations.setdefault(model, Calibration())
        known.learn(question.estimate, counted)
        hint = window_hint(self.config)
        if (hint and 0 < counted < question.estimate * LEAST_RATIO
                and counted > LEAST_OUTPUT_TOKENS and hint not in self.warned):
            self.warned.add(hint)
            log.warning("%s: upstream read %d of about %d tokens: its context window "
                        "is too small; %s", model, counted, question.estimate, hint)

    def look(self) -> Optional[asyncio.Task]:
        """Begin, once, to ask a server of the user's own for its windows."""
        config = self.config
        own = (upstream_api(config).name in OWN_SERVERS and not speaks_messages(config)
               and config.base_url != PROVIDERS["nvidia"].base_url
               and config.default_model != DEMO_MODEL)
        if own and not config.context_window and not self.looking:
            root = re.sub(r"/v\d+$", "", config.base_url)
            places = ["/models", root + "/props", root + "/api/v0/models"]
            self.looking = asyncio.ensure_future(
                asyncio.gather(*map(self.windows_at, places)))
        return self.looking

    async def look_near(self) -> None:
        """The same, and wait as long as a server needs that is near."""
        looking = self.look()
        if looking and not looking.done():
            await asyncio.wait({looking}, timeout=NEAR_SECONDS)

    async def windows_at(self, place: str) -> None:
        """Take down the windows that a server tells at a path or URL, if it does."""
        with contextlib.suppress(ProxyError, asyncio.TimeoutError):
            value = await asyncio.wait_for(self.fetched(place), LOOK_SECONDS)
            self.windows.update(told_windows(value, self.config.default_model))

    async def fetched(self, place: str) -> Json:
        """The JSON object at a path or URL of upstream's; ProxyError."""
        answer = await self.upstream.ask(place)
        try:
            raw = await answer.whole()
        finally:
            answer.release()
        asked = Asked(self.config, "")
        if answer.status != 200:
            text = error_words(raw, answer.status, self.config.api_key)[0]
            raise refusal(asked, answer.status, text)
        return completion(raw, asked)


def signless(words: str) -> str:
    """A refusal without numbers, and words with a digit or of great length: ids."""
    return re.sub(r"[\w+/=-]*\d[\w+/=-]*|\w{24,}", "", words)


def turned_to(name: str, models: List[str]) -> List[str]:
    """The models in their order, but from a certain one on, and then from the start."""
    at = models.index(name)
    return models[at:] + models[:at]


def dice() -> float:
    """From 0 to 1, at random; the module `random` would take its time to import."""
    return os.urandom(1)[0] / 255


def vain(error: ProxyError, tried: List[str]) -> ProxyError:
    """The first error of several models, with the others that failed as well."""
    if tried:
        error.message += f" (asked in vain as well: {', '.join(tried)})"
    return error


@contextlib.contextmanager
def alarm(seconds: float, work: Callable[..., None], *args: Any) -> Iterator[None]:
    """Do some work if what is inside takes longer; 0: never."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(seconds, work, *args) if seconds else None
    try:
        yield
    finally:
        if timer:
            timer.cancel()


def parse_body(data: bytes) -> Json:
    """The request body, a JSON object; ProxyError(400) says where it is not."""
    try:
        value = decode_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ProxyError(400, f"body is not UTF-8: byte {error.start}") from None
    except ValueError as error:
        raise ProxyError(400, f"body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid("body", value, "a JSON object")
    return value


def wanted_tokens(chat: Json) -> int:
    return chat.get("max_tokens") or chat.get("max_completion_tokens") or 0


def completion(raw: bytes, asked: Asked) -> Json:
    """A JSON answer of upstream's; ProxyError(502) for anything else in a 200."""
    value = value_in(raw)
    if not isinstance(value, dict):
        text = raw[:MAX_ERROR_CHARS].decode("utf-8", "replace")
        shown = redacted(text, asked.config.api_key)[:80] or "nothing"
        words = f"upstream sent no JSON object, but {shown}"
        raise ProxyError(502, words, again="broken")
    inner = shaped(value.get("data"), dict)
    value = inner if "choices" in inner and "choices" not in value else value
    check_chunk(value, asked)
    if value.get("success") is False:       # so Z.ai's gateway says no in a 200
        raise refusal(asked, stated_status(value, 500), sentence(value) or "an error")
    return value


def list_path(config: Config) -> str:
    """Where upstream lists its models, below the base URL."""
    return "/v1/models" if speaks_messages(config) else "/models"


def listed_ids(value: Json) -> List[str]:
    return [row["id"] for row in shaped(value.get("data"), list)
            if isinstance(row, dict) and isinstance(row.get("id"), str)]


def told_windows(value: Json, model: str) -> Dict[str, int]:
    """Windows by model, from a list of models (vLLM, NIM, LM Studio) or the properties
    of llama.cpp's one model."""
    settings = shaped(value.get("default_generation_settings"), dict)
    rows = [row for row in shaped(value.get("data"), list) if isinstance(row, dict)]
    rows.append({"id": model, "max_model_len": settings.get("n_ctx")})
    out = {}
    for row in rows:
        sizes = [row.get(key) for key in WINDOW_KEYS]
        size = next((size for size in sizes if isinstance(size, int) and size > 0), 0)
        if size and isinstance(row.get("id"), str):
            out[row["id"]] = size
    return out


class Telling:
    """An upstream's answer while it is being told."""

    def __init__(self, message: Message, answer: Any, again: Again,
                 leave: Callable[[], None]) -> None:
        self.message, self.answer, self.again = message, answer, again
        self.leave = leave                  # others may have its turn
        passes = isinstance(message, Passed)
        self.stage = passage(message) if passes else translation(message)
        self.hurried = False
        self.first = b""                    # what follows message_start, once begun

    async def begin(self) -> None:
        """Wait for the first words, or for the whole if the answer does not stream."""
        next(self.stage)
        if "json" in header(self.answer.headers, "content-type"):
            asked = self.message.reading.asked
            chunk = completion(await self.answer.whole(), asked)
            self.first = b"".join(encoded(await self.last([chunk, DONE])))
            return
        try:
            self.first = await self.more()
        except ProxyError:
            if "html" in header(self.answer.headers, "content-type"):
                raise web_page() from None
            raise

    async def whole(self) -> bytes:
        """The JSON of an answer that does not stream."""
        raw = await self.answer.whole()
        value = completion(raw, self.message.reading.asked)
        if isinstance(self.message, Passed):
            return self.message.answer(raw, value)
        events = self.message.start() + await self.last([value, DONE])
        return encode_json(fold(events)).encode("ascii")

    async def last(self, chunks: List[Json]) -> List[Event]:
        """The events of the last chunks, with a second answer's if need be."""
        try:
            return self.message.events(chunks)
        except Unfinished:
            return await self.amended()

    async def rescued(self, fault: Exception) -> List[bytes]:
        """The end of an answer that is Unfinished, or whole but for what came behind
        its end; else the fault."""
        if isinstance(fault, Unfinished):
            return encoded(await self.amended())
        if not self.message.complete():
            raise fault
        return encoded(await self.last([DONE]))

    async def amended(self) -> List[Event]:
        self.leave()
        return self.message.amended(await self.again())

    def release(self) -> None:
        self.answer.release()
        self.leave()

    async def more(self) -> bytes:
        """The next bytes for the client, one piece per read; b"" at the end."""
        since, held = 0.0, -1
        while not self.message.over:
            try:
                data = await self.answer.read()
            except ProxyError:
                if not self.message.finish:     # all was said; the end is a formality
                    raise
                data = b""
            try:
                out = self.stage.send(data or None)     # a token waits for nothing
            except (Unfinished, ProxyError) as fault:
                out = await self.rescued(fault)
            if self.message.finish and not self.hurried:
                self.hurried = True
                self.answer.hurry()
            if out:
                return b"".join(out)
            known, held = held, self.message.held()
            since = check_progress(since if held == known else 0.0)
        return b""


def web_page() -> ProxyError:
    """The error for a 200 that is a page for people, as of a proxy or a login."""
    return ProxyError(502, "upstream sent a web page instead of an answer: is the base "
                           "URL right, up to its /v1?", again="broken")


class Script:
    """The built-in upstream's answer, with the methods of Answer."""
    status = 200

    def __init__(self, chat: Json) -> None:
        self.pieces = demo_stream(chat) if chat.get("stream") else []
        self.completion = demo_completion(chat)
        self.headers: Headers = []

    async def read(self) -> bytes:
        await asyncio.sleep(0.01)           # at a pace that one can watch
        return self.pieces.pop(0) if self.pieces else b""

    async def whole(self) -> bytes:
        return self.completion

    def hurry(self) -> None:
        pass

    def release(self) -> None:
        pass


class Gate:
    """The pacer at work: who waits for a turn, is called when it has come."""

    def __init__(self, config: Config) -> None:
        self.config = config
        limits = (requests_a_minute(config), requests_at_once(config))
        limits = (0, 0) if config.default_model == DEMO_MODEL else limits
        self.pacer = Pacer(*limits, time.monotonic)
        self.turns: Dict[Ticket, Tuple[asyncio.Future, float]] = {}  # and until when
        self.timer: Optional[asyncio.TimerHandle] = None

    async def turn(self, ticket: Ticket, waited: float = 0.0) -> None:
        """Wait until a ticket may go; ProxyError(429) if that takes too long, together
        with the seconds that its request has `waited` for other turns."""
        pacer = self.pacer
        left = max(self.config.max_wait - waited, 0.0)
        delay = pacer.delay(ticket.model)
        if (len(pacer.waiting) >= MAX_WAITING or delay > left
                or delay and self.given_up(ticket.model)):
            raise self.busy(ticket)
        pacer.join(ticket)
        self.call()
        if ticket.sent >= 0:
            return
        turn = asyncio.get_running_loop().create_future()
        self.turns[ticket] = turn, time.monotonic() + left
        try:
            await asyncio.wait({turn}, timeout=left)
            if ticket.sent < 0:
                raise self.busy(ticket)
        except BaseException:
            pacer.leave(ticket)
            pacer.give_back(ticket)
            self.call()
            raise
        finally:
            del self.turns[ticket]

    def call(self) -> None:
        """Let go who may, and who would wait in vain; look again when time may have
        changed that."""
        pacer, now = self.pacer, time.monotonic()
        while pacer.next():
            pass
        for ticket, (turn, until) in self.turns.items():
            late = ticket.sent < 0 and now + pacer.delay(ticket.model) > until
            if not turn.done() and (ticket.sent >= 0 or late):
                turn.set_result(None)
        if self.timer:
            self.timer.cancel()
        rest, self.timer = self.pacer.rest(), None
        if rest < math.inf:
            self.timer = asyncio.get_running_loop().call_later(rest, self.call)

    def leave(self, ticket: Ticket) -> None:
        """Its place is free for the next one, once it is known why it was left: after
        a 429 its model pauses."""
        self.pacer.leave(ticket)
        asyncio.get_running_loop().call_soon(self.call)

    def given_up(self, model: str) -> bool:
        """Whether a model has answered 429 for as long as one request is patient: then
        the client does the waiting, and its user sees that."""
        return self.pacer.hopeless(model, max(self.config.retries, 1))

    def busy(self, ticket: Ticket) -> ProxyError:
        pacer, rest = self.pacer, self.pacer.delay(ticket.model)
        rates = [f"{pacer.per_minute} a minute"] if pacer.per_minute else []
        rates += [f"{pacer.at_once} at once"] if pacer.at_once else []
        most = f" (limits: {', '.join(rates)})" if rates else ""
        words = (f"no turn within {self.config.max_wait:g} s, with "
                 f"{len(pacer.waiting)} waiting{most}")
        if pacer.pauses.get(ticket.model, 0.0) > pacer.clock():
            words = (f"upstream answered 429 before: {ticket.model} is left alone for "
                     f"{rest:.0f} s")
        error = ProxyError(429, words, headers=(("retry-after", retry_after(rest)),))
        error.fallback = "busy"
        return error

    def close(self) -> None:
        if self.timer:
            self.timer.cancel()


# ---- 26. Page: what a browser gets -------------------------------------------
# A page that asks for the status, once a second, and shows it.  It holds nothing of
# its own, so it needs no key; what it shows comes as text, never as markup.

LIVE_PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>nimproxy</title>
<style>
:root { color-scheme: light dark; --dim: #667; --good: #08653c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --dim: #9aa; --good: #5fd39b; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }
h1, h2 { font-size: 1rem; margin: 1.3rem 0 .3rem; }
#state { color: var(--good); }
.gone #state, .bad { color: var(--bad); }
.gone main { opacity: .45; }
.side { display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: 0; }
dd { margin: 0; }
dt, th, .dim { color: var(--dim); font-weight: normal; }
th, td { padding-right: 1rem; text-align: left; vertical-align: top; }
.wide { overflow-x: auto; }
.wide, td:nth-child(-n+2) { white-space: nowrap; }
</style>
<h1>nimproxy <span id="version" class="dim"></span></h1>
<p id="state" role="status">asking ...</p>
<form id="form" hidden><label>PROXY_API_KEY <input id="key" type="password"
  autocomplete="off" required></label> <button>Show</button></form>
<main hidden>
<div class="side">
<section><h2>Upstream</h2><dl id="upstream"></dl></section>
<section><h2>Limits</h2><dl id="limits"></dl></section>
<section><h2>Since the start</h2><dl id="counts"></dl></section>
</div>
<h2>Last requests</h2><div class="wide"><table id="requests"></table></div>
<h2>Last errors</h2><table id="errors"></table>
</main>
<noscript>This page needs its script; <a href="status">/status</a> does not.</noscript>
<script>
"use strict";
const at = id => document.getElementById(id), main = document.querySelector("main");
let pause = 1, timer;

function put(parent, tag, text, kind = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = kind;
  parent.append(element);
  return element;
}
function list(id, rows) {
  at(id).replaceChildren();
  for (const [name, words] of rows)
    if (words) { put(at(id), "dt", name); put(at(id), "dd", words); }
}
function table(id, titles, rows) {
  at(id).replaceChildren();
  const head = put(at(id), "tr", "");
  for (const title of rows.length ? titles : ["none"]) put(head, "th", title);
  for (const cells of rows) {
    const row = put(at(id), "tr", "", cells[0] < 400 ? "" : "bad");
    for (const cell of cells) put(row, "td", cell ?? "");
  }
}
function span(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const from = units.findIndex(([size]) => seconds >= size || size === 1);
  return units.slice(from, from + 2).map(([size, name], more) => Math.floor(
    (more ? seconds % units[from][0] : seconds) / size) + " " + name).join(" ");
}
const clock = at => new Date(at * 1000).toLocaleTimeString();
const number = count => (count ?? 0).toLocaleString("en");
const secs = value => value === undefined ? "" : value.toFixed(2) + " s";
const part = (used, most) => number(used) + (most ? " of " + number(most) : "");

function show(it) {
  const limits = it.limits, rows = name => Object.entries(name);
  const counted = (...starts) => rows(it.counts)
    .filter(([name]) => starts.some(start => name.startsWith(start))).sort()
    .map(([name, count]) => name.replace(/^[a-z]+_/, "") + " " + count).join(", ");
  at("version").textContent = it.version;
  at("state").textContent = "up for " + span(it.uptime_seconds);
  list("upstream", [["at", it.base_url], ["provider", it.provider],
                    ...rows(it.models)]);
  list("limits", [
    ["this minute", part(limits.sent_this_minute, limits.requests_per_minute)],
    ["running", part(limits.running, limits.concurrency)],
    ["waiting", number(limits.waiting)],
    ...rows(limits.pauses).map(([model, rest]) => ["pause", `${model}, ${span(rest)}`]),
    ...it.fallbacks.map(row =>
      ["instead", `${row.instead} of ${row.model}: ${row.reason}`])]);
  list("counts", [
    ...["requests", "answers", "input_tokens", "output_tokens", "clients_left"].map(
      name => [name.replace("_", " "), number(it.counts[name])]),
    ["asked again", counted("retried_")], ["fallbacks", counted("fallback_")],
    ["mended", counted("calls_", "mended_")], ["errors", counted("errors_")]]);
  table("requests", ["", "at", "model", "first word", "whole", "in", "out"],
    it.last_requests.reverse().map(row => [row.status, clock(row.at), row.model,
      secs(row.ttft), secs(row.seconds), number(row.input_tokens),
      number(row.output_tokens), row.retries ? "asked again " + row.retries : "",
      row.fallback ? "fallback: " + row.fallback : ""]));
  table("errors", ["", "at", "message"], it.last_errors.reverse().map(
    row => [row.status, clock(row.at), row.message]));
}
function turn(asks, kind, words) {
  at("form").hidden = !asks;
  main.hidden = asks;
  document.body.className = kind;
  if (words) at("state").textContent = words;
}
async function look() {
  clearTimeout(timer);
  const key = sessionStorage.getItem("key");
  try {
    const answer = await fetch("status", {cache: "no-store", redirect: "error",
      headers: key ? {authorization: "Bearer " + key} : {},
      signal: AbortSignal.timeout(5000)});
    if (answer.status === 401) return turn(true, key ? "gone" : "", key ?
      "That is not this proxy's key." : "This proxy has a key; it stays in this tab.");
    if (!answer.ok) throw new Error("status " + answer.status);
    show(await answer.json());
    turn(false, "", "");
    pause = 1;
  } catch (error) {
    pause = Math.min(pause * 2, 30);
    turn(!at("form").hidden, "gone",
         `No answer: is the proxy still up? ${error.message}; again in ${pause} s.`);
  }
  timer = setTimeout(look, pause * 1000);
}
at("form").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value.replace(/[^!-~]/g, ""));
  at("key").value = "";
  look();
});
look();
</script>
"""


def page_headers() -> Headers:
    """What keeps the page to itself: its own script and style, by their hashes, may
    run; it asks nobody but the proxy, and nobody may frame it."""
    import hashlib
    hashes = {}
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", LIVE_PAGE, re.S):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag] = f"'sha256-{digest}'"
    policy = "; ".join([
        "default-src 'none'", f"script-src {hashes['script']}",
        f"style-src {hashes['style']}", "img-src data:", "connect-src 'self'",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'"])
    return [("Content-Type", "text/html; charset=utf-8"),
            ("Content-Security-Policy", policy), ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"), ("Vary", "Accept")]


# ---- 27. Proxy ---------------------------------------------------------------
# What each path does.  `messages` is the file's story; `relay` is the one place
# where waiting meets translation.

EVENT_STREAM: Headers = [
    ("Content-Type", "text/event-stream"),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),        # nginx in between would hold events back
]
MODELS_SECONDS = 2.0        # Claude Code's own discovery waits 3
MODELS_FRESH_SECONDS = 3600.0   # a provider adds a model every few days
CLIENT_LEFT = 499           # a status for the log alone; nginx's, too
PUZZLES = (401, 403, 404, 502, 504)     # what `doctor` may know the cause of


class Proxy:
    """Answers requests; its state: counts, the last errors, failures to replay."""

    def __init__(self, config: Config, upstream: Optional[Upstream] = None) -> None:
        self.config = config
        self.counts: Dict[str, int] = collections.Counter()
        self.asker = Asker(config, upstream or Upstream(config), self.counts)
        self.failures: Dict[int, Tuple[float, ProxyError]] = {}
        self.errors: Any = collections.deque(maxlen=KEPT_ERRORS)
        self.hinted = False         # at what may help; once is enough
        self.requests: Any = collections.deque(maxlen=KEPT_REQUESTS)
        self.error_log = DayLog(config.home, ERROR_LOG)
        self.usage_log = DayLog(config.home, USAGE_LOG)
        self.listed: Tuple[float, List[str]] = (0.0, [])
        self.traffic: Callable[[], Json] = dict     # what a server adds to the status
        self.began = time.time()
        self.secret = os.urandom(32).hex()      # proves to this user that it is us
        self.stopping = False               # the server cuts answers off, and says so

    # every path

    async def close(self) -> None:
        await self.asker.close()

    async def respond(self, request: Request) -> Response:
        try:
            with guarded():
                response = await self.route(request)(request)
        except ProxyError as error:
            return self.refuse(request.path(), error)
        if header(response.headers, "request-id"):
            return response
        stamp = ("request-id", Course().id)
        return response._replace(headers=[*response.headers, stamp])

    def refuse(self, what: str, error: ProxyError) -> Response:
        """The answer that an error is, counted and logged."""
        course = Course(what)
        course.tongue = path_tongue(what)
        return self.failed(course, error)

    def failed(self, course: Course, error: ProxyError) -> Response:
        self.note(course, error)
        headers = [*error.headers, *served(course)]
        body = TONGUES[course.tongue].error(error, course.id)
        return json_response(body, error.status, headers)

    def route(self, request: Request) -> Callable[[Request], Any]:
        """The handler of a path; ProxyError(404, 405)."""
        path = request.path()
        found = {method: handler for method, pattern, handler in ROUTES
                 if re.fullmatch(pattern, path)}
        method = "GET" if request.method == "HEAD" else request.method
        if not found:
            known = ("POST /v1/messages, POST /v1/messages/count_tokens, "
                     "POST /v1/chat/completions, GET /v1/models")
            raise ProxyError(404, f"no such path; there are {known}, GET /health")
        if method not in found:
            allow = ", ".join(sorted({*found, *(["HEAD"] if "GET" in found else [])}))
            raise ProxyError(405, f"this path takes {allow}", "", (("Allow", allow),))
        return getattr(self, found[method])

    def admit(self, request: Request, port: int) -> None:
        """Refuse what a web page or a stranger sends; before the body is read.

        A page in the user's browser can reach localhost, under a name of its own
        (DNS rebinding) or as a cross-site request: neither gets to spend the key.
        `port` is where the request came in.
        """
        config, headers = self.config, request.headers
        names = (*LOOPBACK, config.host)
        host = re.sub(r":[0-9]+$", "", request.host())
        if on_loopback(config.host) and host and host not in names:
            raise ProxyError(403, "expected a Host header of this machine's loopback")
        origins = set(field_values(headers, "origin"))
        sites = set(field_values(headers, "sec-fetch-site"))
        if (origins - {f"http://{name}:{port}" for name in names}
                or sites - {"none", "same-origin"}
                or origins and FORM.match(header(headers, "content-type"))):
            raise ProxyError(403, "requests from web pages are refused")
        if config.proxy_key and request.path() not in OPEN_PATHS:
            import hmac
            bearer = re.sub("(?i)^bearer +", "", header(headers, "authorization"))
            wanted = config.proxy_key.encode()
            given = (header(headers, "x-api-key").encode("latin-1"),
                     bearer.encode("latin-1"))
            if not any([hmac.compare_digest(key, wanted) for key in given]):
                raise ProxyError(401, "expected this proxy's own key (PROXY_API_KEY) "
                                      "as a bearer token")

    def note(self, course: Course, error: ProxyError) -> None:
        """Count an error, keep it for `status`, and log one line."""
        self.counts[f"errors_{error.status}"] += 1
        self.errors.append({"at": time.time(), "status": error.status,
                            "message": error.message[:400], "model": course.model})
        facts = {**self.ended(course, error.status), "error": error.kind,
                 "message": error.message}
        log.warning("%s: %s: %s", facts_line(facts), error.kind, error.message,
                    extra={"facts": facts})
        if course.model:
            self.error_log.add(error_row(course, error, self.config))
            if error.status in PUZZLES and not self.counts["answers"] + self.hinted:
                log.warning("no answer so far: `doctor` looks for the cause")
                self.hinted = True

    def left(self, course: Course) -> None:
        """Count a client that did not wait for its answer's end, or was cut off, and
        log one line."""
        if self.stopping:
            self.note(course, stopped())
            return
        self.counts["clients_left"] += 1
        facts = {**self.ended(course, CLIENT_LEFT), "error": "client_left"}
        log.info("%s: the client left", facts_line(facts), extra={"facts": facts})

    def ended(self, course: Course, status: int) -> Json:
        """The facts of a course at its end, kept for `status` if it got to a model."""
        facts = course.facts(status)
        if course.model:
            self.requests.append({"at": time.time(), **facts})
        return facts

    # the story

    async def messages(self, request: Request) -> Response:
        """A Messages request: asked upstream, answered in Anthropic's words.

        A completion of OpenAI's goes the same way, but passes as it is.
        """
        course = Course(request.path().rpartition("/v1/")[2].rstrip("/"))
        course.tongue = path_tongue(request.path())
        try:
            await self.asker.look_near()
            question, chat = await aside(request, self.question, course)
            if not course.streams:
                return await self.whole(question, chat)
            return await self.streamed(question, chat)
        except ProxyError as error:
            return self.failed(course, error)
        except asyncio.CancelledError:
            if self.stopping:
                return self.failed(course, stopped())
            self.left(course)
            raise

    async def streamed(self, question: Question, chat: Sent) -> Response:
        """A request that streams: its 200 goes out soon, or the error before it."""
        start = asyncio.ensure_future(self.begin(question, chat))
        try:
            await asyncio.wait({start}, timeout=self.patience(question.message))
        except asyncio.CancelledError:      # the client left
            drop(start)
            raise
        if start.done():
            start.result()                  # an error so early is a real status
        course = question.course
        return Response(200, EVENT_STREAM + served(course), self.relay(question, start),
                        self.pulse(question), lambda error: failed_event(course, error))

    def patience(self, message: Union[Message, Passed]) -> Optional[float]:
        """Seconds until a stream's 200 goes out, whatever upstream says; None: never
        before that.

        Where an answer passes there is nothing of ours to tell early, and only a
        silence that might be too long for the client is a reason to give up the status.
        """
        passes = isinstance(message, Passed)
        return self.config.ping_interval or None if passes else self.config.eager_after

    def question(self, request: Request, course: Course) -> Tuple[Question, Sent]:
        """The question, and the chat that asks it, or the parcel."""
        body = parse_body(request.body)
        asked = typed(body, "model", str, "a string") or ""
        if len(asked) > MAX_MODEL_CHARS:
            raise ProxyError(400, f"model: longer than {MAX_MODEL_CHARS} characters")
        course.asked, course.streams = asked, bool(body.get("stream"))
        course.session = header(request.headers, "x-claude-code-session-id")
        agent = header(request.headers, "user-agent")
        course.raises = agent.startswith("Anthropic/")
        course.claude = agent.startswith("claude-cli/")
        course.rank = rank_of(request.headers, body)
        estimate = 0                    # not known of what is not for us to read
        if course.tongue == "anthropic":
            self.asker.read_documents(body)
            estimate = count_tokens(body)
        model = self.asker.chosen(course, request.body, estimate)
        message = self.message(request, course, asked or model)
        question = Question(request.body, estimate, model, message, course)
        chat = self.asker.chat(question, body)
        self.counts["requests"] += 1
        return question, chat

    def message(self, request: Request, course: Course,
                model: str) -> Union[Message, Passed]:
        """What becomes of an answer: a Message, or one that passes as it is."""
        relays = speaks_messages(self.config)
        openai = course.tongue == "openai"
        if relays and openai:
            raise ProxyError(404, f"{upstream_label(self.config)} is asked in "
                                  "Anthropic's language here: use /v1/messages, or a "
                                  "base URL that speaks Chat Completions")
        if not relays and not openai:
            return Message("msg_" + os.urandom(12).hex(), model)
        path = re.sub("^.*/v1(?=/)" if openai else "^.*(?=/v1/)", "", request.path())
        query = request.target.partition("#")[0].partition("?")
        headers = [(name, value) for name, value in request.headers
                   if name in PASSED_HEADERS]
        return Passed(model, course.tongue, path.rstrip("/") + query[1] + query[2],
                      headers if relays else [])

    async def begin(self, question: Question, chat: Sent) -> Telling:
        """Ask upstream, up to the first words of its answer; ProxyError if it fails."""
        with guarded():
            return await self.asker.answered(question, chat, self.asker.told)

    async def relay(self, question: Question,
                    start: asyncio.Future) -> AsyncIterator[bytes]:
        """The message's bytes as upstream's come, whichever way it ends."""
        message, event = question.message, TONGUES[question.course.tongue].event
        opening = b"".join(encoded(message.start()))
        try:
            if not start.done():
                yield opening or event("ping", {})
                opening = b""
            telling = await start
            question = question._replace(raw=b"")   # nothing will be replayed now
            yield opening + telling.first
            with guarded():
                data = await telling.more()
                while data:
                    yield data
                    data = await telling.more()
            self.record(question)
        except ProxyError as error:
            self.note(question.course, error)
            if question.raw and question.course.session and not message.calls.calls:
                self.remember(question, error)      # else asking anew may help
            yield last_words(question, error)
        except (asyncio.CancelledError, GeneratorExit):
            if message.over:            # it has all, and did not wait for our end
                self.record(question)
            else:
                self.left(question.course)
            raise
        finally:
            drop(start)

    async def whole(self, question: Question, chat: Sent) -> Response:
        """A request that does not stream: the same translation, folded."""
        failure = self.remembered(question)
        if failure:
            raise failure
        raw = await self.asker.answered(question, chat, self.asker.read_whole)
        self.record(question)
        kind = ("Content-Type", "application/json")
        return Response(200, [kind, *served(question.course)], raw)

    # what is remembered

    def pulse(self, question: Question) -> Callable[[float], bytes]:
        """What keeps a silent stream alive: a ping, and at times a real event, because
        pings do not reset Claude Code's watchdog."""
        interval, message = self.config.ping_interval, question.message
        event = TONGUES[question.course.tongue].event

        def beat(quiet: float) -> bytes:
            if quiet // RESET_SECONDS > (quiet - interval) // RESET_SECONDS:
                return event(*message.nudge())
            return event("ping", {})
        return beat

    def remember(self, question: Question, error: ProxyError) -> None:
        """Keep a failure that came after the eager start: the client's replay without
        streaming then gets the true status, and upstream is not asked again.

        Not its traceback, whose frames hold the chat and all that was parsed for it.
        """
        error.__traceback__ = error.__context__ = error.__cause__ = None
        if len(self.failures) >= KEPT_FAILURES:
            del self.failures[next(iter(self.failures))]
        self.failures[failure_key(question)] = (time.monotonic(), error)

    def remembered(self, question: Question) -> Optional[ProxyError]:
        if not self.failures:
            return None
        when, error = self.failures.pop(failure_key(question), (0.0, None))
        return error if time.monotonic() - when < FAILURE_SECONDS else None

    def record(self, question: Question) -> None:
        """Count an answer, and log one line about it."""
        course, usage = question.course, question.message.final_usage()
        self.counts["answers"] += 1
        for tool, notes in question.message.repairs:
            self.counts.update("calls_" + note for note in notes)
            log.info("%s %s: a call of %s was not plain (%s)", course.id[-8:],
                     printable(course.model), printable(tool), ", ".join(notes))
        if course.fallback:
            self.counts["fallback_" + course.fallback] += 1
        self.asker.compare(question)
        self.counts["input_tokens"] += usage["input_tokens"]
        self.counts["output_tokens"] += usage["output_tokens"]
        course.usage = usage
        demo = course.model == DEMO_MODEL
        if any(usage.values()) and not demo:    # without any, nobody has told
            self.usage_log.add(usage_row(course, self.config))
        facts = self.ended(course, 200)
        log.info("%s", facts_line(facts), extra={"facts": facts})

    # the other paths

    async def count_tokens(self, request: Request) -> Response:
        return json_response({"input_tokens": await aside(request, self.counted)})

    def counted(self, request: Request) -> int:
        body = parse_body(request.body)
        self.asker.read_documents(body)
        typed(body, "messages", list, "a list of messages")
        asked = typed(body, "model", str, "a string") or ""
        model = self.asker.known_as(upstream_model(self.config, asked))
        return round(count_tokens(body) * self.asker.factor(model))

    async def models(self, request: Request) -> Response:
        """The models in a shape that both SDK families and Claude Code accept."""
        discovery = header(request.headers, "user-agent").startswith("claude-code/")
        rows = [model_row(name, self.asker.facts(name).window,
                          "anthropic/" if discovery else "")
                for name in await self.model_ids()]
        return json_response({
            "object": "list", "data": rows, "has_more": False,
            "first_id": rows[0]["id"] if rows else None,
            "last_id": rows[-1]["id"] if rows else None,
        })

    async def model(self, request: Request) -> Response:
        asked = unquote(request.path().partition("/models/")[2])
        ids = await self.model_ids()
        name = upstream_model(self.config, asked)
        if name not in ids and name not in MODELS:
            raise ProxyError(404, f"no model {asked!r}{nearest(asked, ids)}")
        if self.asker.look():
            await asyncio.wait({self.asker.look()})
        window = self.asker.facts(name).window
        return json_response({**model_row(name, window), "id": asked})

    async def model_ids(self) -> List[str]:
        """Upstream's list, an hour old at most; what we know of if it does not come."""
        when, ids = self.listed
        if ids and time.monotonic() - when < MODELS_FRESH_SECONDS:
            return ids
        own = own_models(self.config)
        live = asyncio.ensure_future(self.live_models())
        live.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            await asyncio.wait({live}, timeout=MODELS_SECONDS)
        finally:
            live.cancel()               # of no effect once it is done
        if live.done() and not live.exception() and live.result():
            ids = list(dict.fromkeys(own + live.result()))
            self.listed = (time.monotonic(), ids)
            return ids
        hosted = self.config.base_url == PROVIDERS["nvidia"].base_url
        alive = [name for name in offered("nvidia")
                 if hosted and not MODELS[name].retired]
        return list(dict.fromkeys(own + alive))

    async def live_models(self) -> List[str]:
        """The ids that upstream lists; ProxyError if it does not."""
        if self.config.default_model == DEMO_MODEL:
            return []
        value = await self.asker.fetched(list_path(self.config))
        self.asker.windows.update(told_windows(value, self.config.default_model))
        return listed_ids(value)

    async def home(self, request: Request) -> Response:
        """The live page for a browser, what /health says for everybody else."""
        if "text/html" not in ",".join(field_values(request.headers, "accept")):
            return await self.health(request)
        return Response(200, page_headers(), LIVE_PAGE.encode("ascii"))

    async def health(self, request: Request) -> Response:
        """That we are up; with `?nonce=` and 64 hex digits, the proof that it is us."""
        facts = {"status": "ok", "service": "nimproxy", "version": __version__}
        nonce = re.search(r"\?nonce=([0-9a-f]{64})$", request.target)
        if nonce:
            facts["proof"] = proof(self.secret, nonce[1])
        return json_response(facts)

    async def status(self, request: Request) -> Response:
        config, pacer = self.config, self.asker.gate.pacer
        now = time.monotonic()
        pacer.forget(now)
        return json_response({
            "service": "nimproxy", "version": __version__, "pid": os.getpid(),
            "uptime_seconds": round(time.time() - self.began, 1),
            "provider": config.provider, "base_url": upstream_place(config),
            "models": {"default": config.default_model, "opus": config.opus,
                       "sonnet": config.sonnet, "haiku": config.haiku},
            "limits": {
                "requests_per_minute": pacer.per_minute, "concurrency": pacer.at_once,
                "sent_this_minute": len(pacer.sent), "running": len(pacer.out),
                "waiting": len(pacer.waiting),
                "pauses": {model: round(until - now, 1)
                           for model, until in pacer.pauses.items() if until > now},
                "ceilings": {model: pacer.ceiling(model, now)
                             for model in pacer.ceilings}},
            "fallbacks": [{"session": session[:8], "model": model, "instead": name,
                           "reason": why} for (session, model), (name, why, since)
                          in self.asker.sticky.items() if now - since < STICKY_SECONDS],
            "learned": self.asker.learned.models(config.base_url),
            "counts": dict(self.counts), "last_errors": list(self.errors),
            "last_requests": list(self.requests),
            **self.traffic(),
        })

    async def metrics(self, request: Request) -> Response:
        """The counts in Prometheus' text format, version 0.0.4."""
        pacer = self.asker.gate.pacer
        pacer.forget(time.monotonic())
        gauges = {"waiting": len(pacer.waiting), "running": len(pacer.out),
                  "sent_this_minute": len(pacer.sent),
                  "uptime_seconds": round(time.time() - self.began, 1)}
        lines = [f"# TYPE nimproxy_{name} gauge\nnimproxy_{name} {value}"
                 for name, value in gauges.items()]
        lines += [f"# TYPE nimproxy_{name}_total counter\nnimproxy_{name}_total {value}"
                  for name, value in sorted(self.counts.items())]
        text = "\n".join([*lines, ""]).encode("ascii")
        return Response(200, [("Content-Type", "text/plain; version=0.0.4")], text)


# Any prefix is fine for Anthropic's own paths: base URLs come with and without /v1.
ROUTES = [
    ("POST", r".*/v1/messages/?", "messages"),
    ("POST", r".*/v1/messages/count_tokens/?", "count_tokens"),
    ("POST", r".*/v1/chat/completions/?", "messages"),
    ("POST", r".*/v1/completions/?", "messages"),
    ("POST", r".*/v1/embeddings/?", "messages"),
    ("GET", r".*/v1/models/?", "models"),
    ("GET", r".*/v1/models/.+", "model"),
    ("GET", r"/", "home"),
    ("GET", r"/healthz?|\*", "health"),
    ("GET", r"/status", "status"),
    ("GET", r"/metrics", "metrics"),
]
OPENAI_PATHS = re.compile(r".*/v1/(chat/completions|completions|embeddings)/?")
PASSED_HEADERS = ("anthropic-version", "anthropic-beta")    # the client's own, to relay
OPEN_PATHS = ("/", "/health", "/healthz")       # nothing in them is worth a key
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
FORM = re.compile(r"(?i)text/plain|application/x-www-form|multipart/")  # a page's own


def path_tongue(path: str) -> str:
    """What the clients of a path speak, as a row of TONGUES."""
    return "openai" if OPENAI_PATHS.fullmatch(path) else "anthropic"


def failed_event(course: Course, error: ProxyError) -> bytes:
    """An error inside of a stream, in its client's language."""
    tongue = TONGUES[course.tongue]
    return tongue.event("error", tongue.error(error, course.id))


def last_words(question: Question, error: ProxyError) -> bytes:
    """The last bytes of a stream that cannot go on; none: it is better cut."""
    course, message = question.course, question.message
    if isinstance(message, Passed):
        return message.ahead + failed_event(course, error)
    return b"".join(encoded(message.broken_off(error.body(course.id),
                                               not course.raises)))


def proof(secret: str, nonce: str) -> str:
    import hmac
    return hmac.new(secret.encode(), nonce.encode(), "sha256").hexdigest()


def exposure(config: Config) -> str:
    """What is wrong with listening where others can reach us; "" if nothing is."""
    if on_loopback(config.host) or len(config.proxy_key) >= LEAST_KEY_CHARS:
        return ""
    return f"listening at {config.host} lets others spend your key"


LEAST_KEY_CHARS = 16        # of a key that others might guess


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turn what must not happen into an error that the client hears about.

    The one broad `except` in this file: a fault of ours ends one answer, not all.
    """
    try:
        yield
    except ProxyError:
        raise
    except RecursionError:
        raise ProxyError(400, "JSON nested too deeply") from None
    except Exception as error:
        log.exception("internal error")
        raise ProxyError(500, f"internal error: {type(error).__name__}") from error


def served(course: Course) -> Headers:
    """Headers that say which request this was, who answers, and why not another."""
    headers = [("request-id", course.id)]
    if course.tongue == "openai":
        headers.append(("x-request-id", course.id))
    if course.model:
        headers.append(("x-nimproxy-model", printable(course.model)))
    if course.fallback:
        headers.append(("x-nimproxy-fallback", course.fallback))
    return headers


def rank_of(headers: Headers, body: Json) -> int:
    """Who waits for the answer: the user, a subagent, or nobody in particular, as with
    titles and suggestions, which stream and have no tools."""
    if header(headers, "x-claude-code-agent-id"):
        return SUBAGENT
    claude = header(headers, "x-claude-code-session-id")
    return SIDE if claude and body.get("stream") and not body.get("tools") else MAIN


def stopped() -> ProxyError:
    return ProxyError(503, "nimproxy is being stopped; ask again when it is up again")


def drop(start: asyncio.Future) -> None:
    """Stop an answer that may not have begun, or give its connection back.

    Nothing is awaited: a second cancellation could come in between.
    """
    start.cancel()
    start.add_done_callback(release_begun)


def release_begun(start: asyncio.Future) -> None:
    if not start.cancelled() and not start.exception():
        start.result().release()


async def aside(request: Request, work: Callable[..., Any], *more: Any) -> Any:
    """What some work on a request gives; on a thread if it holds a PDF, which may take
    a second that other answers would have to wait."""
    if PDF_BEGINS.encode() not in request.body:
        return work(request, *more)
    return await asyncio.get_running_loop().run_in_executor(None, work, request, *more)


def failure_key(question: Question) -> int:
    """Session and body; `stream` is what the client's replay differs in."""
    body = decode_json(question.raw.decode())
    body.pop("stream", None)
    return hash((question.course.session, json.dumps(body, sort_keys=True)))


def model_row(name: str, window: int, prefix: str = "") -> Json:
    return {
        "type": "model", "id": prefix + name, "display_name": name,
        "created_at": "2026-01-01T00:00:00Z", "object": "model", "created": 1767225600,
        "owned_by": name.partition("/")[0],
        "max_input_tokens": window,
    }


# ---- 28. Server --------------------------------------------------------------
# Bytes to Request, Response to bytes, until the connection ends.  It knows nothing
# of what the paths mean.

RUN_FILES = "run"           # the folder's name


class LocalProxy(NamedTuple):
    """A proxy of this user's, as its run file tells: ~/.nimproxy/run/<pid>.json."""
    url: str = ""
    key: str = ""           # what it asks of clients, or ""
    command: str = ""       # what it is up for: `serve`, or a client's name
    upstream: str = ""
    start: float = 0.0      # seconds since the epoch
    version: str = ""
    secret: str = ""        # by which whoever answers at the URL proves to be it
    machine: str = ""       # of several that may share a home
    pid: int = 0


class Server:
    """Connections and the tasks that serve them; `serve` makes one that listens."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.listeners: List[asyncio.AbstractServer] = []   # for each address
        self.tasks: Dict[asyncio.Future, Wire] = {}
        self.idle: Dict[Wire, None] = {}    # those between two requests, oldest first
        self.running: Dict[Wire, asyncio.Future] = {}   # the answers under way
        self.bodies: Dict[Wire, int] = {}   # bytes of request bodies that are held
        self.draining = False               # no new request is taken
        self.cutting = False                # an answer that is cancelled says so
        self.troubled = 0.0                 # when trouble was last logged
        self.other: Any = None              # the loop's exception handler before ours
        self.run_file = ""                  # by which this user's commands know us
        proxy.traffic = self.traffic

    @property
    def url(self) -> str:
        host, port = self.listeners[0].sockets[0].getsockname()[:2]
        return http_url(host, port)

    def traffic(self) -> Json:
        """For the status, whose own answer is not counted among the running ones."""
        return {"connections": len(self.tasks), "running": len(self.running) - 1}

    def announce(self, command: str) -> None:
        """Write the run file.  Without a home, or where it cannot be written, the proxy
        runs, and other commands take it for a stranger."""
        config, pid = self.proxy.config, os.getpid()
        if not config.home:
            return
        path = os.path.join(config.home, RUN_FILES, f"{pid}.json")
        facts = LocalProxy(self.url, config.proxy_key, command, upstream_place(config),
                           time.time(), __version__, self.proxy.secret,
                           socket.gethostname(), pid)
        try:
            os.makedirs(config.home, 0o700, exist_ok=True)
            replace_file(path, encode_json(facts._asdict()) + "\n")
            self.run_file = path
        except OSError as error:
            log.warning("cannot write %s: %s; other commands will not know this proxy",
                        path, error.strerror)

    def connected(self, reader: asyncio.StreamReader,
                  writer: asyncio.StreamWriter) -> None:
        full = len(self.tasks) >= MAX_CONNECTIONS and not self.make_room()
        if full:
            self.trouble(f"closed a new connection: {MAX_CONNECTIONS} are busy")
        if full or self.draining:
            writer.transport.abort()
            return
        wire = Wire(reader, writer)
        task = asyncio.ensure_future(self.converse(wire))
        self.tasks[task] = wire             # or it could be collected while it waits
        task.add_done_callback(self.tasks.pop)

    def make_room(self) -> bool:
        """Close what has been idle for longest, since its client can come anew, and a
        refused one cannot; whether there was one."""
        wire = next(iter(self.idle), None)
        if wire:
            del self.idle[wire]
            wire.abort()
        return bool(wire)

    def trouble(self, words: str) -> None:
        """Log that connections are not taken, once in a while: they come in floods."""
        now = time.monotonic()
        if not self.troubled or now - self.troubled > TROUBLE_SECONDS:
            self.troubled = now
            self.proxy.note(Course("server"), ProxyError(503, words))

    def hear(self, loop: asyncio.AbstractEventLoop, context: Json) -> None:
        """The loop's exception handler.  Without descriptors asyncio's accept fails
        once for each place in the backlog, and is tried again a second later."""
        if not re.search("accept|_start_serving", context.get("message", "")):
            (self.other or type(loop).default_exception_handler)(loop, context)
        elif not self.draining:
            self.trouble(f"cannot take connections: {context.get('exception')}")
            while self.make_room():
                pass

    async def converse(self, wire: Wire) -> None:
        """One request after the other, in order, while the connection lasts."""
        try:
            while await self.exchange(wire):
                self.bodies.pop(wire, None)
            await self.part(wire)
        except OSError:
            pass                            # the client left; there is no one to tell
        finally:
            self.bodies.pop(wire, None)
            wire.abort()                    # of no effect on one that is closed
            with contextlib.suppress(OSError):
                await wire.writer.wait_closed()

    async def part(self, wire: Wire) -> None:
        """Close when all that was written has gone out, or nobody takes it."""
        wire.close()
        timer = asyncio.get_running_loop().call_later(
            WRITE_SECONDS, wire.writer.transport.abort)
        try:
            await wire.writer.wait_closed()
        finally:
            timer.cancel()

    async def exchange(self, wire: Wire) -> bool:
        """One request and its response; whether the connection can carry another."""
        rebuff = None
        try:
            request = await self.receive(wire)
        except ProxyError as error:
            rebuff = self.proxy.refuse(error.path or "request", error)
        if rebuff:                         # out here, where no error holds the body
            self.bodies.pop(wire, None)
            wire.allow(LINGER_SECONDS)
            await self.write_whole(wire, rebuff, None)
            await self.linger(wire)
        if rebuff or not request:
            return False
        answering = asyncio.ensure_future(self.answer(wire, request))
        leaving = asyncio.ensure_future(wire.departure())
        del request                         # a long answer need not hold its body
        self.running[wire] = answering
        try:
            await asyncio.wait({answering, leaving},
                               return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self.running[wire]
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        return not answering.cancelled() and answering.result()

    async def receive(self, wire: Wire) -> Optional[Request]:
        """The next request; None if the client has closed or said nothing for long."""
        if self.draining and not wire.held:
            return None
        wire.allow(IDLE_SECONDS)
        self.idle[wire] = None
        try:
            wire.held = await wire.read()
        finally:
            self.idle.pop(wire, None)
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(HEAD_SECONDS, wire.writer.transport.abort)
        try:
            head = await wire.head()
        finally:
            deadline.cancel()
        if not head:
            return None
        request = parse_request(head)
        try:
            self.proxy.admit(request, wire.writer.get_extra_info("sockname")[1])
            if self.draining:
                raise stopped()
            wire.allow(BODY_SECONDS)
            body = await self.body(wire, request)
        except ProxyError as error:
            error.path = request.path()
            raise
        wire.allow(0)
        return request._replace(body=body)

    async def body(self, wire: Wire, request: Request) -> bytes:
        """The whole request body, within its limit; 100 Continue if that is awaited."""
        how = framing(request.headers, 0)
        if how == "chunked" and not request.version:
            raise ProxyError(400, "Transfer-Encoding in HTTP/1.0")
        if how != "chunked" and int(how) > MAX_BODY_BYTES:
            raise ProxyError(413, f"body of {how} bytes; at most {MAX_BODY_BYTES}")
        expected = header(request.headers, "expect").lower()
        if expected not in ("", "100-continue"):
            raise ProxyError(417, "expected no Expect but 100-continue")
        if expected and request.version and how and not wire.held:
            wire.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.reserve(wire, 0 if how == "chunked" else int(how))
        decoder, pieces, size = body_decoder(how), [], 0
        data, rest = wire.held, None
        while rest is None:
            wire.held = b""
            piece, rest = decoder.send(data)
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise ProxyError(413, f"body over {MAX_BODY_BYTES} bytes")
            self.reserve(wire, size)
            if rest is None:
                data = await wire.read()
                if not data:
                    raise ConnectionAbortedError("closed inside a request body")
        wire.held = rest
        return b"".join(pieces)

    def reserve(self, wire: Wire, size: int) -> None:
        """Count a body against what all may hold together; ProxyError(503) beyond it.

        It counts until its answer has ended: what was parsed of it lives about as
        long, and only bodies full of images come near the limit.
        """
        held = self.bodies.get(wire, 0)
        if size > held:
            if sum(self.bodies.values()) - held + size > MAX_BODIES_BYTES:
                raise ProxyError(503, "the request bodies under way are too much to "
                                      "hold together: try again in a moment", "",
                                 (("retry-after", f"{OVERLOAD_SECONDS:.0f}"),))
            self.bodies[wire] = size

    async def answer(self, wire: Wire, request: Request) -> bool:
        try:
            response = await self.proxy.respond(request)
        except asyncio.CancelledError:
            if not self.cutting:
                raise
            response = self.proxy.refuse(request.path(), stopped())
        request = request._replace(body=b"")
        if isinstance(response.body, bytes):
            return await self.write_whole(wire, response, request)
        return await self.write_stream(wire, response, request)

    async def write_whole(self, wire: Wire, response: Response,
                          request: Optional[Request]) -> bool:
        """Write an answer in one piece; whether the connection stays open."""
        keep = bool(request and request.keeps_alive() and not self.draining)
        length = ("Content-Length", str(len(response.body)))
        body = b"" if request and request.method == "HEAD" else response.body
        wire.writer.write(response_head(response, [length], keep) + body)
        await wire.flush()
        return keep

    async def write_stream(self, wire: Wire, response: Response,
                           request: Request) -> bool:
        """Write the pieces as they come, with heartbeats in long silences."""
        chunked = request.version > 0
        keep = chunked and request.keeps_alive() and not self.draining
        coding = [("Transfer-Encoding", "chunked")] if chunked else []
        frame = encode_chunk if chunked else bytes
        lead = response_head(response, coding, keep)
        wire.sent = wire.time()
        beating = asyncio.ensure_future(self.beat(wire, response, frame))
        try:
            async for data in response.body:
                if not data:
                    return False        # dropped: without its last chunk
                wire.writer.write(lead + frame(data))
                lead = b""
                wire.sent = wire.time()
                await wire.flush()
        except asyncio.CancelledError:
            if not self.cutting or not response.last:
                raise
            wire.writer.write(lead + frame(response.last(stopped())))
        finally:
            beating.cancel()                # nothing may follow the last chunk
            await response.body.aclose()
        wire.writer.write(LAST_CHUNK if chunked else b"")
        await wire.flush()
        return keep

    async def beat(self, wire: Wire, response: Response,
                   frame: Callable[[bytes], bytes]) -> None:
        """Between pieces, so never inside one: what the response says in silences."""
        interval = self.proxy.config.ping_interval
        beats, last = 0, wire.sent
        while interval and response.pulse:
            await asyncio.sleep(max(last + (beats + 1) * interval - wire.time(), 0))
            if wire.sent != last:
                beats, last = 0, wire.sent
                continue
            beats += 1
            wire.writer.write(frame(response.pulse(beats * interval)))

    async def linger(self, wire: Wire) -> None:
        """Let a refusal be read: closing on unread bytes would reset the connection."""
        with contextlib.suppress(OSError):
            if wire.writer.can_write_eof():
                wire.writer.write_eof()
            until = wire.time() + LINGER_SECONDS
            while wire.time() < until and await wire.read():
                pass

    def drain(self) -> int:
        """Take no new request, close what is idle; how many answers are under way."""
        self.draining = True
        with contextlib.suppress(OSError):
            os.unlink(self.run_file)
        for listener in self.listeners:
            listener.close()
        for wire in list(self.tasks.values()):
            if wire in self.idle:
                wire.abort()
            elif wire not in self.running and not wire.writer.is_closing():
                wire.allow(LINGER_SECONDS)  # a request that is still coming
        return len(self.running)

    async def close(self, limit: float = 0.0) -> None:
        """Stop listening, let running answers finish for `limit` seconds, cut the rest.

        Who is cut off is told so, as far as it takes that within LINGER_SECONDS.
        """
        self.drain()
        if limit and self.tasks:
            await asyncio.wait(list(self.tasks), timeout=limit)
        writing = [task for task, wire in self.tasks.items()
                   if wire in self.running or wire.writer.is_closing()]
        self.cutting = self.proxy.stopping = True
        for answering in self.running.values():
            answering.cancel()
        if writing:
            await asyncio.wait(writing, timeout=LINGER_SECONDS)
        self.cutting = False
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.proxy.close()
        asyncio.get_running_loop().set_exception_handler(self.other)


def response_head(response: Response, framed: Headers, keep: bool) -> bytes:
    phrase = "Overloaded"                   # 529 is Anthropic's own
    with contextlib.suppress(ValueError):
        phrase = HTTPStatus(response.status).phrase
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    fields = [("Date", date), *response.headers, *framed]
    fields.append(("Connection", "keep-alive" if keep else "close"))
    return encode_head(f"HTTP/1.1 {response.status} {phrase}", fields)


def http_url(host: str, port: int) -> str:
    """Where a client of this machine finds who listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(config: Config, ports: Iterable[int] = (), command: str = "serve"
                ) -> Server:
    """Listen as the config says, or at the first of `ports` that is free, for a command
    that the run file names.  Raises OSError if the address is taken, or all are."""
    socks = free_sockets(config.host, ports or [config.port])
    server, loop = Server(Proxy(config)), asyncio.get_running_loop()
    for sock in socks:
        server.listeners.append(await asyncio.start_server(
            server.connected, sock=sock, limit=READ_BYTES))
    server.other = loop.get_exception_handler()
    loop.set_exception_handler(server.hear)
    server.announce(command)
    return server


# On Windows a port that another program has for itself is forbidden, not in use.
TAKEN = (errno.EADDRINUSE, *([errno.EACCES] if os.name == "nt" else []))


def free_sockets(host: str, ports: Iterable[int]) -> List[socket.socket]:
    """Sockets at the first port that is free, which only binding it can tell: nobody
    comes in between.  OSError, the first port's, if there is none."""
    troubles: List[OSError] = []
    for port in ports:
        try:
            return listening_sockets(host, port)
        except OSError as error:
            troubles.append(error)
            if error.errno not in TAKEN:
                break
    raise troubles[0]


def listening_sockets(host: str, port: int) -> List[socket.socket]:
    """A socket for each address of a host, all at one port; OSError if it is taken."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM,
                               flags=socket.AI_PASSIVE)
    socks: List[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for family, address in dict.fromkeys((row[0], row[4]) for row in found):
            try:
                sock = bound_socket(family, (address[0], port, *address[2:]))
            except OSError as error:        # localhost on a machine without IPv6
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                continue
            socks.append(stack.enter_context(sock))
            port = sock.getsockname()[1]
        if not socks:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        stack.pop_all()
    return socks


def bound_socket(family: int, address: Tuple[Any, ...]) -> socket.socket:
    """A socket that listens, also where a program has just ended that did.

    On Windows SO_REUSEADDR would share a port with a program that uses it: there it
    is that option's opposite which is asked for.
    """
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        sock.setsockopt(socket.SOL_SOCKET, exclusive, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen()
    except BaseException:
        sock.close()
        raise
    return sock


class Background:
    """A proxy on a thread and an event loop of its own, for the time of a `with`; at
    the first of `ports` that is free, if some are given.

        with Background(config) as url: ...
    """

    def __init__(self, config: Config, ports: Iterable[int] = (),
                 command: str = "serve") -> None:
        self.config, self.ports, self.command = config, ports, command
        self.ready = threading.Event()
        self.failed: Optional[BaseException] = None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        self.ready.wait()
        if self.failed:
            self.thread.join()
            raise self.failed
        return self.url

    def __exit__(self, *_: Any) -> None:
        self.loop.call_soon_threadsafe(self.stopping.set)
        self.thread.join()

    def run(self) -> None:
        asyncio.run(self.main())

    async def main(self) -> None:
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            server = await serve(self.config, self.ports, self.command)
            self.url = server.url
        except (OSError, OverflowError) as error:
            self.failed = error
            return
        finally:
            self.ready.set()
        await self.stopping.wait()
        await server.close()


# ---- 29. Client programs -----------------------------------------------------
# The environment that makes Claude Code and the SDKs work through the proxy, OpenClaw's
# configuration, and running them: terminal, signals and exit code are theirs.

# What would lead the client around the proxy, or hand it a key it does not need.
BYPASSES = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_UNIX_SOCKET",
            "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX",
            "CLAUDE_CODE_USE_FOUNDRY", "ANTHROPIC_CUSTOM_HEADERS")
REMOVED = (*BYPASSES,
           *(row.key_variable for row in PROVIDERS.values() if row.key_variable))
# A wish of the user's, and the variable of ours that would defeat it.
DEFEATED = {"ENABLE_TOOL_SEARCH": "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS",
            "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY":
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"}


def client_environment(config: Config, url: str, one_model: bool,
                       environ: Mapping[str, str]) -> Dict[str, str]:
    """What to add to a client's environment; what the user has set there wins.

    `one_model`: one was asked for, so subagents get it too.  Ids that begin with
    `claude-` would lose the window variables, ours do not.
    """
    tokens = str(config.context_window
                 or model_facts(config, config.default_model).window)
    wanted = {
        "ANTHROPIC_MODEL": config.default_model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": config.opus,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": config.sonnet,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": config.haiku,
        "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": tokens,
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": tokens,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "API_TIMEOUT_MS": "1800000",
        "API_FORCE_IDLE_TIMEOUT": "0",
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1800000",
    }
    if one_model:
        wanted["ANTHROPIC_CUSTOM_MODEL_OPTION"] = config.default_model
        wanted["CLAUDE_CODE_SUBAGENT_MODEL"] = config.default_model
    for wish, ours in DEFEATED.items():
        if environ.get(wish):
            del wanted[ours]
    added = {name: value for name, value in wanted.items() if not environ.get(name)}
    added["ANTHROPIC_BASE_URL"] = url
    added["ANTHROPIC_AUTH_TOKEN"] = config.proxy_key or "unused"
    proxied = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    names = [name for name in re.split(r"[\s,]+", proxied) if name]
    names += [name for name in ("127.0.0.1", "localhost", "::1") if name not in names]
    added["NO_PROXY"] = added["no_proxy"] = ",".join(names)
    return added


def child_environment(added: Mapping[str, str],
                      environ: Mapping[str, str]) -> Dict[str, str]:
    kept = {name: value for name, value in environ.items() if name not in REMOVED}
    return {**kept, **added}


EXPORTS = {                 # shell: one line of `env`, what ends its quotes, escaped
    "sh": ("export {}='{}'", "'", r"'\\''"),    # always: zsh looks up =x
    "fish": ("set -gx {} '{}'", r"['\\]", r"\\\g<0>"),
    "powershell": ("$env:{} = '{}'", "['\u2018-\u201b]", r"\g<0>\g<0>"),  # its own, too
}


def export_lines(added: Mapping[str, str], shell: str) -> List[str]:
    line, special, escape = EXPORTS[shell]
    return [line.format(name, re.sub(special, escape, value))
            for name, value in added.items()]


CLAUDE_PLACES = ("~/.local/bin", "~/.claude/local", "~/.npm-global/bin",
                 "/opt/homebrew/bin", "/usr/local/bin")
CLAUDE_INSTALL = "npm install -g @anthropic-ai/claude-code"


def claude_program(environ: Mapping[str, str]) -> str:
    """The path of Claude Code, "" if it is nowhere."""
    import shutil
    path = environ.get("PATH", os.defpath)
    places = os.pathsep.join(map(os.path.expanduser, CLAUDE_PLACES))
    found = (shutil.which("claude", path=path) for path in (path, places))
    return next(filter(None, found), "")


VERSION_SECONDS = 10.0      # for --version; node takes one on a slow disk


def program_version(path: str, environ: Mapping[str, str]) -> Tuple[str, str]:
    """What a program answers to --version, and why it does not."""
    try:
        done = subprocess.run([path, "--version"], env=dict(environ),
                              stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=VERSION_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"no version within {VERSION_SECONDS:g} s"
    except OSError as error:
        return "", error.strerror or str(error)
    said, trouble = (raw.decode("utf-8", "replace").strip()
                     for raw in (done.stdout, done.stderr))
    if done.returncode:
        return "", trouble or said or f"it ended with {done.returncode}"
    return said, ""


def run_child(command: List[str], environ: Mapping[str, str], piped: bool) -> int:
    """Run a program on this terminal and return its exit code (128 + signal).

    Ctrl-C reaches it by the terminal; the signals that end a process are handed on.
    `piped`: our standard input is this program's text, so the child gets the
    terminal instead.
    """
    stdin: Any = None
    if piped:
        try:
            stdin = open("/dev/tty")
        except OSError:
            stdin = open(os.devnull)
    with stdin or contextlib.nullcontext():
        handlers = {number: signal.signal(number, hand_on([])) for number in HANDED_ON}
        try:
            child = subprocess.Popen(command, env=dict(environ), stdin=stdin)
            for number in HANDED_ON:
                signal.signal(number, hand_on([child]))
            code = child.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


HANDED_ON = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
             if hasattr(signal, name)]


def hand_on(children: List[subprocess.Popen]) -> Callable[[int, Any], None]:
    """A signal handler; it is reset to the default in the child by exec itself."""
    def handler(number: int, _: Any) -> None:
        for child in children:
            if number != signal.SIGINT and child.poll() is None:
                child.send_signal(number)
    return handler


def openclaw_config(config: Config, url: str) -> Json:
    """What makes OpenClaw use the proxy at `url` by either API, or its upstream itself.

    {"agents": .., "models": {"mode": "merge", "providers": {name: provider}}}, with
    references to keys and no key.  https://docs.openclaw.ai/gateway/config-tools
    """
    models = [openclaw_model(config, name) for name in openclaw_ids(config)]
    key = "${PROXY_API_KEY}" if config.proxy_key else "unused"
    blocks = {OPENCLAW[0]: (url, key, APIS[1]),
              OPENCLAW[1]: (url + "/v1", key, APIS[0])}
    variable = PROVIDERS[config.provider].key_variable
    if config.default_model != DEMO_MODEL:
        if config.api == APIS[1]:           # a relay has no other words to offer
            del blocks[OPENCLAW[1]]
        key = "${%s}" % variable if variable else "local"
        blocks[config.prefix or config.provider] = config.base_url, key, config.api
    return {
        "agents": {"defaults": {"model": {
            "primary": f"{OPENCLAW[0]}/{models[0]['id']}"}}},
        "models": {"mode": "merge", "providers": {
            name: {"baseUrl": base_url, "apiKey": key, "api": api, "models": models}
            for name, (base_url, key, api) in blocks.items()}},
    }


def openclaw_ids(config: Config) -> List[str]:
    """The default, the tiers, the file's own, and what lives of NVIDIA's catalog."""
    hosted = config.base_url == PROVIDERS["nvidia"].base_url
    ids = own_models(config)
    if hosted and config.default_model != DEMO_MODEL:
        ids = [SUCCESSORS.get(name, name) for name in ids]
        ids += [name for name in offered("nvidia") if not MODELS[name].retired]
    return list(dict.fromkeys(ids))


def openclaw_model(config: Config, name: str) -> Json:
    facts, family = model_facts(config, name), model_family(name)
    thinks = family != NO_FAMILY if facts.thinks is None else facts.thinks
    return {"id": name, "name": facts.label or name.rpartition("/")[2],
            "reasoning": thinks, "input": ["text"] + ["image"] * facts.vision,
            "contextWindow": config.context_window or facts.window,
            "maxTokens": facts.output, "cost": dict(zip(COSTS, facts.cost))}


# ---- 30. Neighbours: proxies that are up here --------------------------------
# How one is known, by its run file and a proof, and asked; who else has its port.

def streamed_answer(config: Config, url: str, body: Json) -> Tuple[Any, Any]:
    """Connection and response of a Messages request; ProxyError if it was refused."""
    connection, response = ask_proxy(config, url, "POST", "/v1/messages", body)
    if response.status == 200:
        return connection, response
    with contextlib.closing(connection):
        text = error_words(response.read(), response.status)[0]
        raise ProxyError(response.status, text)


def streamed_events(connection: Any, response: Any) -> Iterator[Event]:
    """The events of a streamed answer; ProxyError for one that failed."""
    from http.client import HTTPException
    frames, data = started(sse_frames()), b" "
    with contextlib.closing(connection):
        while data:
            try:
                data = response.read1(READ_BYTES)
            except HTTPException:
                raise ProxyError(502, "the answer broke off in its middle") from None
            for frame in frames.send(data):
                event = decode_json(frame.data)
                if frame.event == "error":
                    raise ProxyError(502, sentence(event))
                yield frame.event, event


LOOKUP_SECONDS = 2.0        # for what a proxy knows; of a model, it may ask its server
ANSWER_SECONDS = 600.0      # of silence in an answer; pings come long before
MAX_STATUS_BYTES = 1 << 20  # forty requests and errors and some hundred counts


def ask_proxy(config: Config, url: str, method: str, path: str,
              body: Optional[Json] = None) -> Tuple[Any, Any]:
    """http.client's connection and response; OSError for whatever fails."""
    from http.client import HTTPConnection, HTTPException
    seconds = ANSWER_SECONDS if body else LOOKUP_SECONDS
    connection = HTTPConnection(urlsplit(url).netloc, timeout=seconds)
    headers = {"x-api-key": config.proxy_key} if config.proxy_key else {}
    payload = json.dumps(body) if body else None
    try:
        connection.request(method, path, payload, headers)
        return connection, connection.getresponse()
    except (OSError, HTTPException) as error:
        connection.close()
        raise OSError(f"{url} does not answer: {error}") from None


def proxy_json(config: Config, url: str, path: str) -> Json:
    """The JSON object that answers a GET; {} for all else, as strangers may send."""
    from http.client import HTTPException
    try:
        connection, response = ask_proxy(config, url, "GET", path)
        with contextlib.closing(connection):
            if not 0 < (response.length or 0) < MAX_STATUS_BYTES:
                return {}                   # which may have no end
            return shaped(value_in(response.read()), dict)
    except (OSError, HTTPException):
        return {}


def running_proxy(config: Config, command: str = "") -> Optional[LocalProxy]:
    """A proxy that asks the same upstream, from the configured port on; else whichever
    is at that port itself.  `command`: only one that is up for it."""
    own = None
    for port in near_ports(config):
        proxy = proved(config, http_url(config.host, port))
        if proxy and command in ("", proxy.command):
            if proxy.upstream == upstream_place(config):
                return proxy
            own = proxy if port == config.port else own
    return own


def proved(config: Config, url: str) -> Optional[LocalProxy]:
    """The proxy of this user's that is up at a URL.

    Nobody is asked there without a run file that names the place, and nobody believed
    who does not prove to know its secret, which stays here: strangers get no key.
    """
    import hmac
    nonce, place = os.urandom(32).hex(), urlsplit(url)
    hosts = ["127.0.0.1", "::1"] if place.hostname == "localhost" else [place.hostname]
    urls = [http_url(host or "", place.port or 80) for host in hosts]
    for proxy in local_proxies(config.home):
        if proxy.url in urls:
            answer = proxy_json(Config(), proxy.url, f"/healthz?nonce={nonce}")
            if hmac.compare_digest(ascii(answer.get("proof")),
                                   ascii(proof(proxy.secret, nonce))):
                return proxy
    return None


MAX_RUN_FILE_BYTES = 64 * 1024      # of a run file, which has some 500


def local_proxies(home: str) -> Iterator[LocalProxy]:
    """What this user's run files tell; those that a crash has left are taken away."""
    folder = os.path.join(home, RUN_FILES) if home else ""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        try:
            with plain_file(path) as file:
                ours = os.fstat(file.fileno()).st_uid == getattr(os, "geteuid", int)()
                row = decode_json(file.read(MAX_RUN_FILE_BYTES))
            proxy = LocalProxy(*[row[field] for field in LocalProxy._fields])
        except (OSError, LookupError, TypeError, ValueError, RecursionError):
            continue                    # it has just ended, or is of another version
        sound = list(map(type, proxy)) == list(map(type, LocalProxy()))
        sound = sound and proxy.secret.isascii()    # else it has no bytes to prove by
        if ours and sound and proxy.machine == socket.gethostname():
            if process_lives(proxy.pid):
                yield proxy
                continue
            with contextlib.suppress(OSError):
                os.unlink(path)


def met(config: Config, proxy: LocalProxy) -> Config:
    """Settings that lead to a proxy that has proved to be ours."""
    place = urlsplit(proxy.url)
    return config._replace(host=place.hostname, port=place.port, proxy_key=proxy.key)


ONCE_SECONDS = 0.05         # what comes within them has come at once, at no rate


def figures_line(message: Json, times: List[float]) -> str:
    """`first token 0.51 s, 40.2 tokens/s, in 7, out 3, end_turn`; the rate is that of
    the time after the first token."""
    usage, seconds = message["usage"], times[-1] - times[0]
    read = usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    rate = "all at once"
    if seconds > ONCE_SECONDS:
        rate = f"{max(usage['output_tokens'] - 1, 0) / seconds:.1f} tokens/s"
    return (f"first token {times[0]:.2f} s, {rate}, in {read}, "
            f"out {usage['output_tokens']}, {message['stop_reason']}")


def config_url(config: Config) -> str:
    return http_url(config.host, config.port)


PORTS = 10                  # that are tried; as an older program did


def near_ports(config: Config) -> range:
    """The configured port and the nine after it; 0 means any, and has none after it."""
    return range(config.port, min(config.port + (PORTS if config.port else 1), 65536))


def in_the_way(config: Config) -> str:
    """Who has our port, in a sentence; "" if nobody has.  ProxyError if it is not ours
    to have."""
    try:
        for sock in listening_sockets(config.host, config.port):
            sock.close()
        return ""
    except OSError as error:
        where = f"{config.host}:{config.port}"
        if error.errno in TAKEN:
            return (f"{where} is in use by {port_user(config)}, which has not proved "
                    "to be a `serve` of yours")
        raise ProxyError(400, f"cannot listen at {where}: {error.strerror or error}; "
                              "--host and --port name another place") from None


def port_user(config: Config) -> str:
    """Who listens where we would: `python3 (pid 7)`, if the system tells (Linux: of
    one's own processes)."""
    proxy, found = proved(config, config_url(config)), set()
    if proxy:
        return f"nimproxy already (pid {proxy.pid})"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as rows:
            found.update(f"socket:[{row.split()[9]}]" for row in rows if re.match(
                rf" *\d+: \w+:{config.port:04X} \w+:\w+ 0A ", row))     # it listens
    for pid in os.listdir("/proc") if found else ():
        with contextlib.suppress(OSError):      # another user's, or just ended
            places = f"/proc/{pid}/fd"
            if any(os.readlink(f"{places}/{number}") in found
                   for number in (os.listdir(places) if pid.isdigit() else ())):
                with open(f"/proc/{pid}/comm", errors="replace") as name:
                    return f"{name.read().strip()} (pid {pid})"
    return "another program"


def start_mark(pid: int) -> str:
    """When a process began, in the system's words; "" if it has ended or none tells.

    Process ids are used again, above all after the machine was started anew.
    """
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    if os.name == "nt" or os.path.exists("/proc/self/stat"):
        return ""
    environ = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
    try:
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], env=environ,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("ascii", "replace").strip()


PROCESS_SYNCHRONIZE = 0x100000      # Windows: the right to wait for a process
WAIT_TIMEOUT = 0x102                # Windows: it has not ended yet


def process_lives(pid: int) -> bool:
    if os.path.exists("/proc/self/stat"):
        return bool(start_mark(pid))
    if os.name != "nt":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True             # another user's
        return True
    import ctypes
    kernel = getattr(ctypes, "windll").kernel32     # os.kill would end it there
    handle = kernel.OpenProcess(PROCESS_SYNCHRONIZE, False, pid)
    if not handle:
        return False
    lives = kernel.WaitForSingleObject(handle, 0) == WAIT_TIMEOUT
    kernel.CloseHandle(handle)
    return lives


# ---- 31. Saved: providers as they were set up --------------------------------
# Files under ~/.nimproxy, in the shapes of claude-adapter, whose own are read where
# there are none of ours:
#
#     settings.json           which provider is active
#     metadata.json           when and by which version this folder was begun
#     providers/<name>.json   one provider as it was set up, with its key
#     trusted.json            files of other folders that got a yes: path and content

MAX_SAVED_BYTES = 1 << 20   # of such a file; one has some 400
OLD_WINDOWS = {"lmstudio": 4096, "ollama": 8192}    # claude-adapter's own guesses, in
                                                    # which Claude Code does not fit
SAVED_KEYS = {              # of our settings: their names, also in older files
    "upstream.base_url": ("base_url", "baseUrl"),
    "upstream.api_key": ("api_key", "apiKey"),
    "upstream.api": ("api",),
    "tool_format": ("tool_format", "toolFormat"),
    "server.port": ("port",),
    "max_context_window": ("max_context_window", "maxContextWindow"),
}


class Draft(NamedTuple):
    """A provider while it is set up."""
    provider: str = ""
    base_url: str = ""
    api_key: str = ""
    port: int = 8787
    opus: str = ""
    sonnet: str = ""
    haiku: str = ""
    tool_format: str = "native"
    window: int = 0         # tokens; 0: as known, or as the server tells
    own_server: bool = False        # of the user's, which may need no key
    category: str = ""
    again: bool = False     # it is to be set up anew
    claude: bool = False    # Claude Code's settings may be changed
    unasked: bool = False   # and that is not to be asked
    ready: bool = False     # it is as it was saved

    def relayed(self) -> bool:
        return api_at(self.base_url) == APIS[1]

    def record(self, now: str, before: Json) -> Json:
        """What is saved of it: one of claude-adapter's two shapes, by the API."""
        models = {tier: getattr(self, tier) for tier in TIERS}
        start = {"provider": self.provider, "base_url": self.base_url,
                 "api_key": self.api_key}
        if self.relayed():
            window = {"max_context_window": self.window} if self.window else {}
            return {**start, "created_at": before.get("created_at") or now,
                    "last_updated": now, "default_models": models, "preset_label":
                    PROVIDERS[self.provider].label, "port": self.port, **window}
        return {**start, "models": models, "tool_format": self.tool_format,
                "port": self.port, "max_context_window": self.window or None}


class Store:
    """The files of what was set up.

    `home` and `old_home` are folders, "" for nowhere.  What cannot be read is as if it
    were not there, and is told in `troubles`.
    """

    def __init__(self, home: str, old_home: str = "") -> None:
        self.home, self.old_home = home, old_home
        self.troubles: List[Tuple[str, str]] = []       # path and words
        self.records: Dict[str, Json] = {}      # what the files hold, by provider
        self.paths: Dict[str, str] = {}         # and where
        for folder in filter(None, (home, old_home)):
            for name in PROVIDERS:
                self.take(name, os.path.join(folder, "providers", name + ".json"))
        ours, theirs = (self.read(os.path.join(folder, "settings.json")) if folder
                        else {} for folder in (home, old_home))
        self.settings = ours
        self.trusted = self.read(os.path.join(home, "trusted.json")) if home else {}
        active = ours.get("active_provider", theirs.get("active_provider"))
        path = os.path.join(old_home, "config.json")    # of claude-adapter's own
        older = self.read(path) if old_home and not self.records else {}    # ancestor
        if older:
            name = (provider_at(str(older.get("baseUrl"))) or PROVIDERS["custom"]).name
            self.records[name], self.paths[name] = older, path
            active = active or name
        usable = [*self.records, *KEYLESS]
        self.active = active if active in usable else ""

    def keep_private(self) -> None:
        """Take from others what they may do in our folders."""
        for name in ("", "providers", RUN_FILES, ERROR_LOG, USAGE_LOG):
            folder = os.path.join(self.home, name)
            try:
                mode = os.stat(folder).st_mode if self.home and os.name != "nt" else 0
                if mode & stat.S_ISVTX:
                    raise OSError(errno.EPERM, "it is shared, as /tmp is")
                if mode & 0o077:
                    os.chmod(folder, 0o700)
            except FileNotFoundError:
                pass
            except OSError as error:
                self.troubles.append((folder, "others have access to it, which cannot "
                                              f"be changed: {error.strerror}"))

    def take(self, name: str, path: str) -> None:
        record = self.read(path) if name not in self.records else {}
        if record:
            self.records[name], self.paths[name] = record, path

    def read(self, path: str) -> Json:
        """A JSON object; {} if there is none."""
        try:
            with plain_file(path, "utf-8-sig") as file:
                value = decode_json(file.read(MAX_SAVED_BYTES))
            if not isinstance(value, dict):
                raise ValueError("it is no JSON object")
            return value
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            self.troubles.append((path, f"cannot be read: {why}"))
            return {}

    def saved(self) -> SavedProviders:
        return SavedProviders(self.active, {
            name: saved_entries(record, self.paths[name], self.old_home)
            for name, record in self.records.items()})

    def keep(self, draft: Draft) -> None:
        """Save a provider, if it has changed, and make it the active one.  Raises
        OSError; then it is the active one all the same, as long as we run."""
        name, now = draft.provider, time.strftime("%Y-%m-%dT%H:%M:%S")
        if draft.ready:
            return self.activate(name)
        if not draft.unasked and not draft.claude:      # a yes counts when its
            self.settings["claude_settings"] = False    # changes have been shown
        self.active = name
        self.records[name] = draft.record(now, self.records.get(name, {}))
        self.paths[name] = os.path.join(self.home, "providers", name + ".json")
        os.makedirs(self.home, 0o700, exist_ok=True)
        replace_file(self.paths[name], indented(self.records[name]))
        about = os.path.join(self.home, "metadata.json")
        if not os.path.exists(about):
            replace_file(about, indented(
                {"current_version": __version__, "created_at": now}))
        self.activate(name)

    def activate(self, name: str) -> None:
        """Use a provider from now on; "" for none.  Raises OSError."""
        self.active = name
        self.settings.update(active_provider=name or None,
                             last_used=time.strftime("%Y-%m-%dT%H:%M:%S"))
        replace_file(os.path.join(self.home, "settings.json"), indented(self.settings))

    def trust(self, digests: Mapping[str, str]) -> None:
        """Remember a yes to files, if only as long as we run."""
        self.trusted.update(digests)
        with contextlib.suppress(OSError):
            place = os.path.join(self.home, "trusted.json")
            replace_file(place, indented(self.trusted))

    def remove(self, name: str) -> None:
        """Forget a provider.  Raises OSError."""
        os.unlink(self.paths[name])
        del self.records[name], self.paths[name]
        if name == self.active:
            self.activate("")


KEYLESS = [row.name for row in PROVIDERS.values() if not row.key_variable]


def saved_entries(record: Json, path: str, old_home: str) -> Entries:
    """What a saved provider sets, as the entries of a configuration file."""
    entries: Entries = {}
    for key, names in SAVED_KEYS.items():
        value = next((record[name] for name in names if name in record), None)
        entries[tuple(key.split("."))] = value, f"{path}: {names[0]}"
    guess = OLD_WINDOWS.get(str(record.get("provider")))
    if old_home and path.startswith(old_home) and guess:
        if record.get("max_context_window") == guess:
            del entries[("max_context_window",)]
    models = record.get("models") or record.get("default_models")
    for tier in TIERS:
        value = models.get(tier) if isinstance(models, dict) else None
        value = value or record.get(tier + "_model")    # in files of its first version
        entries[("models", tier)] = value, f"{path}: {tier}"
    return entries


def indented(value: Json) -> str:
    return json.dumps(value, indent=2) + "\n"


# ---- 32. Settings: Claude Code's own files -----------------------------------
# `env` in settings.json and a flag in .claude.json, set key by key; every other byte
# stays.  A receipt beside them says what was there and who holds the change: the last
# holder to leave puts it back, or the next start, if that one crashed.

MAX_SETTINGS_BYTES = 16 << 20   # of one file; a .claude.json of years has some MB
MAX_RECEIPT_BYTES = 4 << 20     # some hundred bytes for a key, and its old value
EDIT_TRIES = 5                  # while Claude Code itself writes; it takes milliseconds
LOCK_SECONDS = 5.0              # for another nimproxy, which takes milliseconds, too
LOCK_POLL_SECONDS = 0.02        # between looks whether it has done
KEPT_OURS = 8                   # values of ours for a key: one for each port of late


class ClaudePaths(NamedTuple):
    """Where Claude Code keeps what is changed here, and where we say what was."""
    settings: str       # its `env` goes over the shell's own variables
    profile: str        # .claude.json; .config.json, of older times, if it is there
    receipt: str


def claude_paths(environ: Mapping[str, str]) -> ClaudePaths:
    home = environ.get("USERPROFILE" if os.name == "nt" else "HOME", "")
    home = home or os.path.expanduser("~")
    folder = environ.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude")
    if not os.path.isabs(folder):
        raise ProxyError(400, "Claude Code's settings: expected a whole path in HOME "
                              f"or CLAUDE_CONFIG_DIR, found {folder!r}")
    profile = os.path.join(folder, ".config.json")
    if not os.path.exists(profile):
        profile = os.path.join(environ.get("CLAUDE_CONFIG_DIR") or home, ".claude.json")
    settings = os.path.join(folder, "settings.json")
    return ClaudePaths(settings, profile, settings + ".nimproxy-receipt")


@contextlib.contextmanager
def claude_settings(paths: ClaudePaths, env: Mapping[str, str],
                    tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Lead Claude Code here for as long as this lasts.

    Gives a function that puts everything back at once; calling it twice does no harm.
    What fails is told in one line, and never stops anything.
    """
    mine = {"kind": "run", "id": os.urandom(4).hex(), "pid": os.getpid(),
            "mark": start_mark(os.getpid()), "env": dict(env)}

    def put_back() -> None:
        if mine:
            try:
                if os.path.exists(paths.receipt):       # else `uninstall` came first
                    change_settings(paths, lambda rows: all_but(rows, mine), tell)
            except ProxyError as error:
                tell(f"Claude Code's settings are not put back: {error.message}")
            mine.clear()

    try:
        change_settings(paths, lambda rows: all_but(rows, mine) + [mine], tell, True)
    except ProxyError as error:
        tell(f"{error.message}; left alone. To lead Claude Code here, "
             f"set ANTHROPIC_BASE_URL to {env.get('ANTHROPIC_BASE_URL')} by hand")
        mine.clear()
    try:
        if mine:
            tell("Claude Code's settings lead to "
                 f"{env.get('ANTHROPIC_BASE_URL')} while this runs")
        yield put_back
    finally:
        put_back()


def all_but(holders: List[Json], mine: Json) -> List[Json]:
    return [row for row in holders if row["id"] != mine["id"]]


def install_settings(paths: ClaudePaths, env: Mapping[str, str],
                     tell: Callable[[str], None]) -> None:
    """Lead Claude Code to where `env` says until `uninstall_settings`."""
    change_settings(paths, with_install(env), tell, True)


def with_install(env: Mapping[str, str]) -> Callable[[List[Json]], List[Json]]:
    row = {"kind": "install", "id": "install", "pid": 0, "mark": "", "env": dict(env)}
    return lambda rows: [row] + all_but(rows, row)      # runs go over it


def uninstall_settings(paths: ClaudePaths, tell: Callable[[str], None]) -> bool:
    """Put back what was there, whoever holds the change; False if there is nothing."""
    if not os.path.exists(paths.receipt):
        return False
    change_settings(paths, lambda rows: [], tell)
    return True


def mend_settings(paths: ClaudePaths, tell: Callable[[str], None]) -> None:
    """Put back what a crashed run has left; one line if there was something."""
    try:
        receipt = read_receipt(paths) if os.path.exists(paths.receipt) else {}
        gone = [row for row in receipt.get("holders", ()) if not is_holding(row)]
        if not receipt or receipt["holders"] and receipt["settled"] and not gone:
            return
        numbers = "".join(f" (pid {row['pid']})" for row in gone)
        if change_settings(paths, list, tell) or gone:
            tell("put back what a crashed run had left in Claude Code's settings"
                 + numbers)
    except ProxyError as error:
        tell(f"Claude Code's settings are not put back: {error.message}")


def installed_env(paths: ClaudePaths) -> Optional[Dict[str, str]]:
    """What `install` has set; None without it, or if nobody can tell."""
    try:
        holders = read_receipt(paths)["holders"]
    except ProxyError:
        return None
    return next((row["env"] for row in holders if row["kind"] == "install"), None)


def settings_env(paths: ClaudePaths) -> Json:
    """`env` in settings.json as it is; ProxyError for a file that cannot be read."""
    text = read_settings(paths.settings)
    check_settings(text, paths.settings, {"env"})
    return env_in(text)


def own_env(paths: ClaudePaths) -> Json:
    """`env` in settings.json as it is without us: its values, numbers as strings.

    ProxyError for a file that is not to be touched.
    """
    text = read_settings(paths.settings)
    check_settings(text, paths.settings, {"env"})
    return env_in(restored(text, read_receipt(paths)["files"].get("settings", {}))[0])


def env_in(text: Optional[str]) -> Json:
    row = member_at(text, ("env",)) if text and text.strip(" \t\r\n") else None
    return row.value if row else {}


# ---- the two files, and the receipt

class Edit(NamedTuple):
    """One file's way from what it holds to what is wanted there."""
    name: str                   # its name in the receipt
    path: str
    before: Optional[str]       # None: there is no such file
    after: Optional[str]
    record: Json                # what undoes it; {} if there is nothing to undo
    kept: List[str]             # keys of ours that someone else has changed since
    trouble: str = ""           # why it is left alone


def change_settings(paths: ClaudePaths, change: Callable[[List[Json]], List[Json]],
                    tell: Callable[[str], None], entering: bool = False) -> bool:
    """Change who holds the settings, and what they say by it; whether a file changed.

    The last holder's values are there; without holders, what was there before any.
    Whoever enters sets what it wants; after one has left, what the user has changed
    stays.  The receipt is written before the files, with all that undoes either state.
    ProxyError if settings.json is not to be touched.
    """
    with the_folder(paths) as existed:
        receipt = read_receipt(paths)
        previous = dict(receipt)
        receipt.setdefault("folder", existed)
        receipt["holders"] = change(list(filter(is_holding, receipt["holders"])))
        kept: Set[str] = set()
        edits = carried_out(paths, receipt, entering, kept)
        if entering and edits[0].trouble:
            write_receipt(paths, previous)
            raise ProxyError(400, edits[0].trouble)
        receipt["files"] = {edit.name: edit.record for edit in edits if edit.record}
        receipt["settled"] = True
        write_receipt(paths, receipt)
    for words in sorted(kept):
        tell(words + ": changed since, and left as found")
    troubles = [edit.trouble for edit in edits if edit.trouble]
    if troubles and not entering:
        raise ProxyError(400, "; ".join(troubles))
    for words in troubles:
        tell(words + "; left alone")
    return any(edit.after != edit.before for edit in edits)


def carried_out(paths: ClaudePaths, receipt: Json, entering: bool, kept: Set[str]
                ) -> List[Edit]:
    """The edits that were made; the receipt holds what undoes both states meanwhile.

    `kept` gets what someone else has changed since.
    """
    for _ in range(EDIT_TRIES):
        edits = settings_edits(paths, receipt, entering)
        kept.update(f"{edit.path}: {', '.join(edit.kept)}" for edit in edits
                    if edit.kept)
        if entering and edits[0].trouble:
            return edits
        old = receipt["files"]
        receipt["files"] = {
            edit.name: joint_record(edit.record, old.get(edit.name, {}))
            for edit in edits}
        receipt["settled"] = False
        write_receipt(paths, receipt)
        for number, edit in enumerate(edits):
            why = write_edit(edit)
            if why:
                undo = receipt["files"][edit.name]
                edits[number] = edit._replace(trouble=why, record=undo)
            if why and entering:
                break                   # the other file is not touched, either
        if not any(edit.trouble.endswith(OVERTAKEN) for edit in edits):
            return edits
    return edits


def settings_edits(paths: ClaudePaths, receipt: Json, entering: bool) -> List[Edit]:
    """What has to change in the two files, settings.json first."""
    wanted: Dict[str, Dict[Path, Any]] = {"settings": {}, "profile": {}}
    if receipt["holders"]:
        env = receipt["holders"][-1]["env"]
        wanted["settings"] = {("env", name): value for name, value in env.items()}
        wanted["profile"] = {("hasCompletedOnboarding",): True}
    files = {"settings": paths.settings, "profile": paths.profile}
    return [file_edit(path, receipt["files"].get(name, {}), wanted[name], entering)
            ._replace(name=name) for name, path in files.items()]


def install_edits(paths: ClaudePaths, env: Mapping[str, str]) -> List[Edit]:
    """What `install_settings` would do now."""
    receipt = read_receipt(paths)
    holders = with_install(env)(list(filter(is_holding, receipt["holders"])))
    return settings_edits(paths, {**receipt, "holders": holders}, True)


def file_edit(path: str, record: Json, wanted: Dict[Path, Any], entering: bool) -> Edit:
    """Undo what was done, then do what is wanted; `trouble` if that cannot be."""
    if not record and not wanted:
        return Edit("", path, None, None, {}, [])
    try:
        before = read_settings(path)
        changes = [tuple(row["path"]) for row in record.get("changes", ())]
        check_settings(before, path, {keys[0] for keys in [*changes, *wanted]
                                      if len(keys) > 1})
        base, kept = restored(before, record)
        names = [keys[-1] for keys in kept]
        if not entering:
            wanted = {keys: value for keys, value in wanted.items() if keys not in kept}
        after, fresh = imposed(base, wanted)
        if after != before:
            check_writable(path)
    except ProxyError as error:
        words = error.message
        if record and not entering:
            names = [row["path"][-1] for row in record["changes"]]
            words += f"; take out by hand: {', '.join(names)}"
        return Edit("", path, None, None, record, [], words)
    for row in fresh.get("changes", ()):
        ours = [value for old in record.get("changes", ()) for value in old["ours"]
                if old["path"] == row["path"] and value not in row["ours"]]
        row["ours"] = (row["ours"] + ours)[:KEPT_OURS]
    return Edit("", path, before, after, fresh, [] if entering else names)


def joint_record(record: Json, old: Json) -> Json:
    """What undoes a file in either state, before a change and after it."""
    if not record or not old:
        return record or old
    paths = [row["path"] for row in record["changes"]]
    rest = [row for row in old["changes"] if row["path"] not in paths]
    return {**record, **old, "hollow": {**record["hollow"], **old["hollow"]},
            "changes": record["changes"] + rest}


def read_settings(path: str) -> Optional[str]:
    """A file's text, None if there is none; ProxyError if it is not to be touched."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ProxyError(400, f"{path}: expected a file")
        if status.st_size > MAX_SETTINGS_BYTES:
            raise ProxyError(400, f"{path}: expected {MAX_SETTINGS_BYTES >> 20} MB at "
                                  f"most, found {status.st_size >> 20} MB")
        with open(path, "rb") as file:
            return file.read().decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProxyError(400, f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ProxyError(400, f"{path}: expected UTF-8, found something else at byte "
                              f"{error.start}") from None


def check_writable(path: str) -> None:
    """A file without a write bit is meant so, even where we could replace it."""
    try:
        writable = os.stat(path).st_mode & 0o222 and os.access(path, os.W_OK)
    except FileNotFoundError:
        return
    if not writable:
        raise ProxyError(400, f"{path}: it is read-only")


OVERTAKEN = "another program keeps writing it"


def write_edit(edit: Edit) -> str:
    """Write an edit's file; why it could not be, or OVERTAKEN."""
    if edit.after == edit.before or edit.trouble:
        return edit.trouble
    target = os.path.realpath(edit.path)        # a link stays one
    fresh = f"{target}.{os.urandom(4).hex()}"
    try:
        if edit.after is not None:
            write_fresh(fresh, edit.after, target)
        if read_settings(edit.path) != edit.before:
            return f"{edit.path}: {OVERTAKEN}"
        if edit.after is None:
            os.unlink(target)
        else:
            os.replace(fresh, target)
    except OSError as error:
        return f"{edit.path}: cannot be written: {error.strerror}"
    except ProxyError as error:
        return error.message
    finally:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
    return ""


def write_fresh(fresh: str, text: str, like: str) -> None:
    """A new file with the mode and owner of another; 0600 if that is not there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(fresh, flags, 0o600), "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileNotFoundError):
        there, ours = os.stat(like), os.stat(fresh)
        if (there.st_uid, there.st_gid) != (ours.st_uid, ours.st_gid):
            os.chown(fresh, there.st_uid, there.st_gid)
        os.chmod(fresh, stat.S_IMODE(there.st_mode))


def read_receipt(paths: ClaudePaths) -> Json:
    """The receipt, empty if there is none; a damaged one is set aside, and an error.

        {"folder": bool,                           whether it was there before us
         "settled": bool,                          false while files are changed
         "files": {"settings": record, ...},       see `imposed`
         "holders": [{"kind": "run", "id": "5e1f", "pid": 7, "mark": "812", "env": {}}]}
    """
    try:
        return sound_receipt(paths)
    except (FileNotFoundError, NotADirectoryError):
        return {"files": {}, "holders": [], "settled": True}
    except OSError as error:
        raise ProxyError(400, f"{paths.receipt}: cannot be read: {error.strerror}"
                         ) from None
    except DAMAGES:
        with contextlib.suppress(OSError):
            os.replace(paths.receipt, paths.receipt + ".bad")
        raise ProxyError(400, f"{paths.receipt} is damaged, and set aside with .bad at "
                              "its end: what was changed cannot be told") from None


# What a receipt of another shape raises when it is read and checked.
DAMAGES = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def sound_receipt(paths: ClaudePaths) -> Json:
    """The receipt as it is; OSError, or one of DAMAGES."""
    with plain_file(paths.receipt) as file:
        receipt = decode_json(file.read(MAX_RECEIPT_BYTES))
    check_receipt(receipt)
    return receipt


def check_receipt(receipt: Json) -> None:
    """Any usual exception if a receipt has not the shape that is relied on."""
    rows: List[Tuple[Dict, Dict]] = [(receipt, {"settled": bool, "folder": bool})]
    rows += [(row, {"kind": str, "id": str, "pid": int, "mark": str, "env": dict})
             for row in receipt["holders"]]
    for record in receipt["files"].values():
        rows.append((record, {"existed": bool, "hollow": dict, "changes": list}))
        rows += [(row, {"path": list, "ours": list}) for row in record["changes"]]
        texts = [record["blank"], *(row["old"] for row in record["changes"]),
                 *record["hollow"].values()]
        rows += [({"text": text or ""}, {"text": str}) for text in texts]
        for path in [row["path"] for row in record["changes"]]:
            rows.append(({"top": path[0], "key": path[-1]}, {"top": str, "key": str}))
            if len(path) > 2:
                raise ValueError("nothing of ours is as deep")
    for row, kinds in rows:
        if not all(isinstance(row[name], kind) for name, kind in kinds.items()):
            raise ValueError("another shape")


def write_receipt(paths: ClaudePaths, receipt: Json) -> None:
    """Write a receipt, or take it away if there is nothing to put back any more."""
    fresh = f"{paths.receipt}.{os.urandom(4).hex()}"
    about = "what nimproxy has changed here; `uninstall` puts it back"
    try:
        if not receipt["holders"] and not any(receipt["files"].values()):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(paths.receipt)
            return
        write_fresh(fresh, json.dumps({"about": about, **receipt}, indent=1) + "\n",
                    fresh)
        os.replace(fresh, paths.receipt)
    except OSError as error:
        raise ProxyError(400, f"{paths.receipt}: cannot be written: {error.strerror}"
                         ) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(fresh)


@contextlib.contextmanager
def the_folder(paths: ClaudePaths) -> Iterator[bool]:
    """Claude Code's folder, for one nimproxy at a time: whether it was there.

    It is made if need be, and taken away if that leaves it empty.
    """
    folder = os.path.dirname(paths.receipt)
    existed = os.path.isdir(folder)
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        lock = folder_lock(folder)
    except OSError as error:
        raise ProxyError(400, f"{folder}: cannot be used: {error.strerror}") from None
    made = not existed
    try:
        made = not read_receipt(paths).get("folder", existed)
        yield existed
    finally:
        if made and not os.path.exists(paths.receipt):
            with contextlib.suppress(OSError):      # something else is in it
                os.rmdir(folder)
        if lock >= 0:
            os.close(lock)


def folder_lock(folder: str) -> int:
    """A descriptor that holds the lock; -1 where there are none (Windows).

    The kernel lets go of it when a process ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:
        return -1
    last = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < last:
        os.makedirs(folder, 0o700, exist_ok=True)   # its last user may have removed it
        number = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(number), os.stat(folder)):
                return number
        except BlockingIOError:
            time.sleep(LOCK_POLL_SECONDS)
        except FileNotFoundError:
            pass
        except OSError:
            return number           # a network disk without locks
        os.close(number)
    raise ProxyError(400, f"{folder}: another nimproxy holds it locked")


def is_holding(row: Json) -> bool:
    """Whether a holder is still one: `install` until `uninstall`, a run as it lives."""
    mark = start_mark(row["pid"]) if row["pid"] else ""
    if row["kind"] == "install" or mark and row["mark"]:
        return row["kind"] == "install" or mark == row["mark"]
    return process_lives(row["pid"])


# ---- what is set in a text, and undone

WORD_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)')


def imposed(text: Optional[str], wanted: Dict[Path, Any]) -> Tuple[Optional[str], Json]:
    """The text with what is wanted in it, and a record for `restored`; {} if none.

        {"existed": bool, "blank": its whole text if that was blank, else None,
         "hollow": {"env": raw text of an empty object, None if it was not there},
         "changes": [{"path": ["env", "X"], "old": raw text or None, "ours": [value]}]}
    """
    blank = text if text is None or not text.strip(" \t\r\n") else None
    record: Json = {"existed": text is not None, "blank": blank, "hollow": {},
                    "changes": []}
    draft = "{}\n" if text is None or blank is not None else text
    for path, value in wanted.items():
        row = member_at(draft, path)
        if row and (row.value == value or value is True and row.value):
            continue                    # so it is anyway: nothing of ours
        if not record["changes"]:
            record["hollow"] = hollow_objects(draft, path)
        old = draft[row.at:row.end] if row else None
        record["changes"].append({"path": list(path), "old": old, "ours": [value]})
        draft = text_with(draft, path, json.dumps(value))
    return (draft, record) if record["changes"] else (text, {})


def hollow_objects(text: str, path: Path) -> Dict[str, Optional[str]]:
    """The objects on the way to a value that are empty, or not there yet."""
    found: Dict[str, Optional[str]] = {}
    start = object_start(text)
    rows, close = object_members(text, start)
    if not rows:
        found[""] = text[start:close + 1]
    for key in path[:-1]:
        row = member_at(text, (key,))
        if not row or not row.value:
            found[key] = text[row.at:row.end] if row else None
    return found


def restored(text: Optional[str], record: Json) -> Tuple[Optional[str], List[Path]]:
    """The text before `imposed`, and the paths where others have changed it: they stay.

    Byte for byte, if nobody else has touched it.
    """
    if text is None or not text.strip(" \t\r\n") or not record:
        return text, []                 # no file any more: whoever took it, knows
    kept: List[Path] = []
    for change in reversed(record["changes"]):
        path, old = tuple(change["path"]), change["old"]
        row = member_at(text, path)
        if row is None or row.value not in change["ours"]:
            if (text[row.at:row.end] if row else None) != old:
                kept.insert(0, path)
        else:
            text = (text_without(text, path) if old is None
                    else text_with(text, path, old))
    for key in sorted(record["hollow"], reverse=True):
        text = hollow_again(text, key, record["hollow"][key])
    start = object_start(text)
    rows, close = object_members(text, start)
    if not rows and not record["existed"]:
        return None, kept
    return (record["blank"] if not rows and record["blank"] is not None else text), kept


def hollow_again(text: str, key: str, raw: Optional[str]) -> str:
    """An object that has become empty gets its old text back; None: it goes."""
    start = object_start(text)
    close = object_members(text, start)[1]
    if not key:
        empty = not object_members(text, start)[0]
        return text[:start] + (raw or "{}") + text[close + 1:] if empty else text
    row = member_at(text, (key,))
    if not row or row.value != {}:
        return text
    return text_without(text, (key,)) if raw is None else text_with(text, (key,), raw)


def check_settings(text: Optional[str], name: str, objects: Set[str]) -> None:
    """ProxyError with line and column if a text is no JSON object, nor blank.

    `objects`: members that have to be objects, too, if they are there.
    """
    if text is None or not text.strip(" \t\r\n"):
        return
    start = object_start(text)
    try:
        value, end = READER.raw_decode(text, start)
        end = past_blanks(text, end)
        if end < len(text):
            raise json.JSONDecodeError("Expecting the end", text, end)
    except json.JSONDecodeError as error:
        found = text[error.pos:error.pos + 1]
        what = f"found {found!r}" if found else "found its end"
        words = f"not JSON: {error.msg}, {what}"
        raise unfit_text(text, error.pos, name, words) from None
    except ValueError as error:
        spots = [match.start() for match in WORD_OR_CONSTANT.finditer(text) if match[1]]
        raise unfit_text(text, spots[0] if spots else 0, name, str(error)) from None
    except RecursionError:
        raise unfit_text(text, start, name, "it is nested too deeply") from None
    if not isinstance(value, dict):
        raise unfit_text(text, start, name,
                         f"expected an object, found {text[start]!r}")
    for key in objects & set(value):
        if not isinstance(value[key], dict):
            at = [row.at for row in object_members(text, start)[0] if row.name == key]
            raise unfit_text(text, at[-1], name, f"{key}: expected an object, found "
                                            f"{text[at[-1]]!r}")


def unfit_text(text: str, at: int, name: str, why: str) -> ProxyError:
    line = text.count("\n", 0, at) + 1
    return ProxyError(400, f"{name}:{line}:{at - text.rfind(chr(10), 0, at)}: {why}")


# ---- 33. Terminal: what is said and asked ------------------------------------
# Lines for people, in what their terminal can show, and menus by keys or numbers.

def program() -> str:
    """How this file was started, for hints."""
    name = sys.argv[0]
    if name in ("", "-", "-c"):
        return "python3 nimproxy.py"        # once it is saved
    return f"python3 {shlex.quote(name)}" if name.endswith(".py") else shlex.quote(name)


# What steers a terminal, hides or turns words: controls, directions, no width.
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e"
                    r"\u2060-\u206f\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    return UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def say(text: str = "", end: str = "\n", style: str = "") -> None:
    """Print, whatever is in a text and the terminal's encoding can do; `style` is what
    an escape sequence sets, in its own numbers."""
    coding = output_coding()
    words = visible(text).encode(coding, "replace").decode(coding)
    words = f"\x1b[{style}m{words}\x1b[0m" if style and words.strip() else words
    print(words, end=end, flush=True)


def output_coding() -> str:
    return getattr(sys.stdout, "encoding", None) or "ascii"


def can_show(text: str) -> bool:
    try:
        text.encode(output_coding())
    except (UnicodeError, LookupError):
        return False
    return True


def complain(text: str) -> None:
    """Say on standard error, in ASCII, what is wrong or under way."""
    words = visible(text).encode("ascii", "backslashreplace").decode()
    print("nimproxy: " + words, file=sys.stderr, flush=True)


def agreed(question: str) -> bool:
    """Whether the user says yes; ProxyError if there is nobody to ask."""
    if not on_terminal(sys.stdin):
        raise ProxyError(400, f"{question} Nobody can be asked here: add --yes")
    try:
        return read_line(f"{question} [y/N] ").lower() in ("y", "yes")
    except Leave:
        return False


class Leave(Exception):
    """Whoever is asked has chosen to leave: by a menu, Ctrl-C, or end of input."""


class Back(Exception):
    """Whoever is asked has chosen to go back to the question before."""


class Choice(NamedTuple):
    """A row of a menu."""
    value: Any
    label: str
    hint: str = ""


GO_BACK, EXIT = Choice(Back, "Go back"), Choice(Leave, "Exit")
CHINESE = {                 # of the menus' words, shown beside them
    "Choose provider type": "\u9009\u62e9\u63d0\u4f9b\u5546\u7c7b\u578b",
    "Choose provider": "\u9009\u62e9\u63d0\u4f9b\u5546",
    "choose action": "\u9009\u62e9\u64cd\u4f5c",
    "Go back": "\u8fd4\u56de\u91cd\u65b0\u9009\u62e9",
    "Exit": "\u9000\u51fa",
    "Use saved config": "\u4f7f\u7528\u5df2\u5b58\u50a8\u7684\u914d\u7f6e\u542f\u52a8",
    "Reconfigure": "\u91cd\u65b0\u914d\u7f6e\u53c2\u6570",
    "Configure": "\u914d\u7f6e\u53c2\u6570",
    "Continue": "\u7ee7\u7eed",
    "Save": "\u4fdd\u5b58",
}
KEY_SECONDS = 0.05          # between the bytes of one key; a lone Esc has no more
PRESSES = {b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up", b"\x1b[B": "down",
           b"\x1bOB": "down", b"j": "down", b"\r": "enter", b"\n": "enter",
           b"\x1b": "back", b"\x7f": "back", b"\x1b[D": "back", b"q": "exit",
           b"\x04": "exit", b"": "exit"}


class Terminal:
    """Questions for the person at the terminal."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.keys = reads_keys(environ)     # one by one, and moves its cursor
        self.beside = CHINESE if can_show("".join(CHINESE.values())) else {}

    def words(self, text: str) -> str:
        """A text with its Chinese beside it, if it has some and that can be shown."""
        found = next((name for name in self.beside if text.endswith(name)), "")
        return f"{text}  {self.beside[found]}" if found else text

    def choose(self, title: str, rows: List[Choice], at: int = 0) -> Any:
        """The value of the row that is chosen; `at` is the one that Enter takes.
        Raises Back and Leave, which every menu offers."""
        rows = [*rows, GO_BACK, EXIT]
        say()
        with kept_terminal():
            value = (self.chosen_by_keys if self.keys else self.chosen_by_number)(
                f"? {self.words(title)}{'' if title[-1] == '?' else ':'}", rows, at)
        if value in (Back, Leave):
            raise value
        return value

    def lines(self, rows: List[Choice], at: int) -> List[str]:
        width = max(len(row.label) for row in rows)
        columns = terminal_width() - 1
        lines = []
        for number, row in enumerate(rows):
            hint = row.hint or self.beside.get(row.label, "")
            line = f"{'>' if number == at else ' '} {number + 1}. " \
                   f"{row.label:{width}}  {hint}"
            lines.append(cut_to(line.rstrip(), columns))
        return lines

    def chosen_by_number(self, title: str, rows: List[Choice], at: int) -> Any:
        say("\n".join([title, *self.lines(rows, at)]))
        while True:
            word = read_line(f"  1-{len(rows)} [{at + 1}]: ") or str(at + 1)
            names = [row.label.lower() for row in rows]
            if word.lower() in names:
                return rows[names.index(word.lower())].value
            if word.isdecimal() and 1 <= int(word) <= len(rows):
                return rows[int(word) - 1].value
            say(f"  expected a number from 1 to {len(rows)}, found {word}")

    def chosen_by_keys(self, title: str, rows: List[Choice], at: int) -> Any:
        with single_keys() as read:         # from here on, typed ahead or not
            line = title + "  (arrow keys or a number, then Enter)"
            say(line if cut_to(line, terminal_width() - 1) == line else title)
            say("\n".join(self.lines(rows, at)))
            while True:
                key = read()
                name = PRESSES.get(key, "")
                if key.isdigit() and 1 <= int(key) <= len(rows):
                    at = int(key) - 1       # many type Enter behind it, as elsewhere
                at = (at + {"up": -1, "down": 1}.get(name, 0)) % len(rows)
                if name in ("back", "exit"):
                    at = len(rows) - (2 if name == "back" else 1)
                print(f"\x1b[{len(rows)}A\x1b[J", end="")
                say("\n".join(self.lines(rows, at)))
                if name in ("enter", "back", "exit"):
                    return rows[at].value

    def enter(self, prompt: str, default: str, parse: Callable[[str, bool], Any],
              hidden: str = "") -> Any:
        """What a line means that is typed; an empty one is the default.

        `parse` gets the text, and whether it has just been typed before: what is
        doubtful is then taken.  It raises ProxyError, whose words are said.  `hidden`
        is what stands for the default of a secret.  Raises Back and Leave.
        """
        shown = hidden or default
        ask = read_hidden if hidden else read_line
        before = None
        while True:
            with kept_terminal():
                text = ask(f"  {prompt}{f' [{shown}]' if shown else ''}: ") or default
            if text == "<":
                raise Back
            if text.lower() == "exit":
                raise Leave
            try:
                return parse(text, text == before)
            except ProxyError as error:
                say("  " + error.message)
                before = text


def reads_keys(environ: Mapping[str, str]) -> bool:
    """Whether keys can be read one by one, and the cursor moved: not on Windows."""
    try:
        import termios
        termios.tcgetattr(sys.stdin.fileno())
    except (ImportError, OSError, ValueError, termios.error):
        return False
    return sys.stdout.isatty() and environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def single_keys() -> Iterator[Callable[[], bytes]]:
    """A reader of single keys, as the bytes that they send; the terminal is as before
    at the end.  Ctrl-C stays what it is."""
    import termios
    import tty
    place = sys.stdin.fileno()
    before = termios.tcgetattr(place)

    def read() -> bytes:
        key = os.read(place, 1)
        while key[:1] == b"\x1b" and len(key) < 8 and (
                select.select([place], [], [], KEY_SECONDS)[0]):
            key += os.read(place, 1)
            if key[1:2] not in b"[O" or key[2:] and b"@" <= key[-1:] <= b"~":
                break
        return key

    try:
        tty.setcbreak(place, termios.TCSANOW)
        yield read
    finally:
        termios.tcsetattr(place, termios.TCSANOW, before)


@contextlib.contextmanager
def kept_terminal() -> Iterator[None]:
    """While somebody is asked: what ends us leaves the terminal as it was."""
    numbers = [getattr(signal, name, 0) for name in ("SIGTERM", "SIGQUIT")]
    numbers = [number for number in numbers             # else it is ignored
               if number and signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def read_line(prompt: str) -> str:
    """A line from the terminal, without its ends; Leave at the end of input."""
    say(prompt, end="")                     # names in it may be none of ASCII
    try:
        return input().strip()
    except UnicodeDecodeError:
        return NO_TEXT
    except EOFError:
        raise Leave from None


NO_TEXT = "\0"              # stands for bytes that are none; no answer may hold it


def read_hidden(prompt: str) -> str:
    import getpass
    try:
        return getpass.getpass(prompt).strip()
    except UnicodeDecodeError:
        return NO_TEXT
    except EOFError:
        raise Leave from None


def terminal_width() -> int:
    import shutil
    return shutil.get_terminal_size((80, 24)).columns or 80   # 0: not told, on 3.8


def cut_to(text: str, columns: int) -> str:
    """As much of a text as fits: Chinese characters take two columns."""
    import unicodedata
    used = 0
    for at, letter in enumerate(text):
        used += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if used > columns:
            return text[:at]
    return text


COLUMNS = 80                # of what is printed: every terminal has them
SPIN_SECONDS = 0.1          # between two turns of the spinner


def folded(text: str, indent: str, most: int = 9) -> str:
    """Text in lines that fit, the second and later ones indented; the rest is cut."""
    import textwrap
    return textwrap.fill(visible(text), COLUMNS, subsequent_indent=indent,
                         max_lines=most, placeholder=" ...", break_on_hyphens=False)


def on_terminal(stream: Any) -> bool:
    return bool(stream and stream.isatty())


def at_terminal() -> bool:
    """Whether there is somebody to ask.  Where standard input was this program's text,
    the terminal takes its place."""
    if sys.argv[:1] == ["-"] and on_terminal(sys.stdout):
        with contextlib.suppress(OSError):
            place = os.open("/dev/tty", os.O_RDWR)
            os.dup2(place, 0)
            os.close(place)
    return on_terminal(sys.stdin) and on_terminal(sys.stdout)


def takes_colour(stream: Any, environ: Mapping[str, str]) -> bool:
    """Whether escape sequences are seen as colours, and nobody minds."""
    plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
    old = os.name == "nt" and not environ.get("WT_SESSION")
    return on_terminal(stream) and not plain and not old


async def spin(words: str) -> None:
    """Show that one waits, on standard error if that is a terminal; until cancelled."""
    try:
        while on_terminal(sys.stderr):
            for mark in "|/-\\":
                print(f"\r{mark} {words}", end="", file=sys.stderr, flush=True)
                await asyncio.sleep(SPIN_SECONDS)
    finally:
        if on_terminal(sys.stderr):
            print("\r" + " " * (len(words) + 2), end="\r", file=sys.stderr, flush=True)


# ---- 34. Setup: the wizard ---------------------------------------------------
# From nothing to a working provider, step by step, and back at each of them.

Listed = Callable[[Config], List[str]]      # the models that an upstream lists
Probed = Callable[[Config, str], str]       # what is wrong with one; "": nothing


class Wizard:
    """Asks for a provider; each of STEPS is a question, and can be gone back to.

    `listed` and `probed` ask upstream; nothing is written.
    """

    def __init__(self, terminal: Terminal, store: Store, environ: Mapping[str, str],
                 upstream: Tuple[Listed, Probed]) -> None:
        self.terminal, self.store, self.environ = terminal, store, environ
        self.listed, self.probed = upstream
        self.given: Json = {}                   # flags, which go over what is saved
        self.known: Dict[str, List[str]] = {}   # models, by base URL

    def run(self, draft: Draft = Draft()) -> Draft:
        """The draft when all is answered, from what is known already.  Raises Leave."""
        say("  Enter takes what is in brackets; < goes back; exit or Ctrl-C changes "
            "nothing.")
        at, past = 0, []
        while at < len(STEPS):
            name, asked = STEPS[at]
            try:
                after = getattr(self, name)(draft) if asked(draft) else None
            except Back:                    # from the first one: to the same
                at, draft = past.pop() if past else (at, draft)
                continue
            except KeyboardInterrupt:
                raise Leave from None
            if after:
                past.append((at, draft))
                draft = after
            at += 1
        return draft

    # which provider

    def category(self, draft: Draft) -> Draft:
        rows = []
        for name in CATEGORIES:
            labels = [row.label for row in PROVIDERS.values() if row.category == name]
            rows.append(Choice(name, name, ", ".join(labels)))
        name = self.terminal.choose("Choose provider type", rows)
        only = [row.name for row in PROVIDERS.values() if row.category == name]
        return draft._replace(category=name, provider=only[0] if only[1:] == [] else "")

    def provider(self, draft: Draft) -> Draft:
        rows = [Choice(row.name, row.label, row.base_url) for row in PROVIDERS.values()
                if row.category == draft.category]
        return draft._replace(provider=self.terminal.choose("Choose provider", rows))

    def action(self, draft: Draft) -> Draft:
        label = PROVIDERS[draft.provider].label
        fresh = self.begun(draft)
        if draft.provider not in self.store.records:
            self.terminal.choose(f"No config for {label}, choose action", [
                Choice(0, "Configure")])
            return fresh
        use = self.terminal.choose(f"{label} found, choose action", [
            Choice(True, "Use saved config"), Choice(False, "Reconfigure")])
        return fresh._replace(ready=use)

    def begun(self, draft: Draft) -> Draft:
        """The draft with what is saved, or usual, of its provider."""
        name = draft.provider
        row, own = PROVIDERS[name], self.store.saved().entries.get(name, {})
        flags = {"provider": name, "base_url": "" if row.base_url else EXAMPLE_URL}
        saved = SavedProviders(name, {name: own})
        if own.get(("upstream", "base_url"), ("",))[0]:
            flags["base_url"] = ""
        try:
            config, _ = resolve_config({**flags, **self.given}, {}, {}, File(), saved)
        except ProxyError as error:
            if not own:
                raise                       # what was given is wrong
            say("  " + error.message)
            del self.store.records[name]    # as if it were not there
            return self.begun(draft)
        return draft._replace(
            base_url=config.base_url, api_key=config.api_key, port=config.port,
            opus=config.opus, sonnet=config.sonnet, haiku=config.haiku,
            tool_format=config.tool_format, window=config.context_window)

    def guide(self, draft: Draft) -> Draft:
        row = PROVIDERS[draft.provider]
        if not draft.base_url:
            draft = self.begun(draft)
        say(f"\n{row.label}")
        say("\n".join(f"  {number}. {line}" for number, line in
                      enumerate(row.guide, 1)))
        rows = [Choice(False, "Continue")]
        if row.name == "nvidia":
            rows = [Choice(False, "Continue", "with the hosted catalog"),
                    Choice(True, "My own NIM", "a container at a base URL of mine")]
        own = self.terminal.choose(row.label, rows)
        if own and same_server(draft.base_url, row.base_url):
            draft = draft._replace(base_url=OWN_NIM_URL)
        return draft._replace(own_server=own)

    # how it is asked

    def api_key(self, draft: Draft) -> Draft:
        row = PROVIDERS[draft.provider]
        say(f"\nThe key is not shown as it is typed or pasted; it is kept in\n"
            f"  {os.path.join(self.store.home, 'providers', row.name + '.json')}")
        given = self.environ.get(row.key_variable, "")
        keep = ("the saved one" if draft.api_key else
                f"the one in {row.key_variable}" if given else
                "none" if draft.own_server or not row.key_shape else "")
        shape = "" if draft.own_server else row.key_words

        def parse(text: str, sure: bool) -> str:
            if not text and not keep:
                raise ProxyError(400, f"{row.label} needs a key: {row.key_page}")
            sure = sure or draft.own_server or text == draft.api_key
            return clean_key(text, "" if sure else row.key_shape)

        key = self.terminal.enter(f"API key {shape}".strip(), draft.api_key, parse,
                                  keep or "hidden")
        return draft._replace(api_key=key)

    def base_url(self, draft: Draft) -> Draft:
        row = PROVIDERS[draft.provider]
        say(f"\nWhere {row.label} answers")
        for url in row.other_urls:
            say(f"  also known: {url}")
        url = self.terminal.enter("Base URL", draft.base_url, parsed_url)
        if row.hosts and provider_at(url) is not row:
            draft = draft._replace(own_server=True)     # no longer the hosted one
        if not own_server(url, row):        # where the variable's key does not go
            given = self.environ.get(row.key_variable, "")
            draft = draft._replace(api_key=draft.api_key or given)
        kept, draft = self.begun(draft), draft._replace(base_url=url)
        if draft.api_key and draft.api_key == kept.api_key and not same_server(
                url, kept.base_url):
            say("  That is another server than the one that the key was saved for.")
            return self.api_key(draft._replace(api_key=""))
        return draft

    def port(self, draft: Draft) -> Draft:
        say("\nWhere nimproxy listens, on this machine only")
        port = self.terminal.enter("Port", str(draft.port), kind_parser("port", "Port"))
        return draft._replace(port=port)

    def opus(self, draft: Draft) -> Draft:
        names = self.names(draft)
        say("\nThe models that stand for Claude's")
        if names:
            say("  " + cut_to("there are " + ", ".join(names), terminal_width() * 3))
        return self.model(draft, "opus")

    def sonnet(self, draft: Draft) -> Draft:
        return self.model(draft, "sonnet")

    def haiku(self, draft: Draft) -> Draft:
        return self.model(draft, "haiku")

    def model(self, draft: Draft, tier: str) -> Draft:
        names = self.names(draft)
        default = getattr(draft, tier) or draft.opus
        if names and default not in names and len(names) < 20:     # what there is here
            default = draft.opus if tier != "opus" else names[0]

        def parse(text: str, sure: bool) -> str:
            name = convert("model", text, tier.capitalize())
            if names and name not in names and not sure:
                raise ProxyError(400, f"{name} is not listed there; the same again is "
                                      f"taken{nearest(name, names)}")
            return name

        name = self.terminal.enter(tier.capitalize(), default, parse)
        return draft._replace(**{tier: name})

    def names(self, draft: Draft) -> List[str]:
        """The models that are listed at the draft's base URL; [] if that fails."""
        if draft.base_url not in self.known:
            names = self.listed(self.config(draft))
            self.known[draft.base_url] = [name for name in names if is_model(name)]
        return self.known[draft.base_url]

    def tool_format(self, draft: Draft) -> Draft:
        rows = [Choice("native", "native", "the API's own function calls"),
                Choice("xml", "xml", "in prose, for local models that cannot call")]
        return draft._replace(tool_format=self.terminal.choose(
            "Tool format", rows, at=["native", "xml"].index(draft.tool_format)))

    def window(self, draft: Draft) -> Draft:
        say("\nThe context window in tokens: 32768, 128k or 1m; auto: as is known of "
            "the model,\nor as the server tells")

        def parse(text: str, sure: bool) -> int:
            return 0 if text == "auto" else convert("window", text, "Window")

        window = self.terminal.enter("Window", str(draft.window or "auto"), parse)
        return draft._replace(window=window)

    def claude(self, draft: Draft) -> Draft:
        say("\nWhile `serve` runs it can stand in ~/.claude/settings.json, so that a "
            "plain\n`claude` finds it; what was there is put back at its end.")
        rows = [Choice(False, "No", "`code` and `env` work without that"),
                Choice(True, "Yes", "what would change is shown first")]
        return draft._replace(claude=self.terminal.choose(
            "May it change Claude Code's settings?", rows, at=int(draft.claude)))

    # whether it is right

    def summary(self, draft: Draft) -> Draft:
        say()
        for name, value in summary_rows(draft):
            say(f"  {name:12} {value}")
        rows = [Choice(True, "Check and save", "one tiny request to each model"),
                Choice(False, "Save", "without a check")]
        check = self.terminal.choose("All right?", rows)
        models = dict.fromkeys(getattr(draft, tier) for tier in TIERS if check)
        if not all([self.answers(draft, model) for model in models]):
            self.terminal.choose("It does not answer as it should", [
                Choice(0, "Save", "all the same")])
        return draft

    def answers(self, draft: Draft, model: str) -> bool:
        say(f"  {model}: ", end="")
        words = self.probed(self.config(draft), model)
        say(words or "ok")
        return not words

    def config(self, draft: Draft) -> Config:
        """The settings that a draft makes, together with the environment's."""
        flags = {"provider": draft.provider, "base_url": draft.base_url,
                 "api_key": draft.api_key, "tool_format": draft.tool_format,
                 "default_model": draft.sonnet or draft.opus or "unknown",
                 "context_window": draft.window or None,
                 **{tier: getattr(draft, tier) for tier in TIERS}}
        return resolve_config(flags, self.environ, {}, File())[0]


def unnamed(draft: Draft) -> bool:
    return not draft.provider


def unready(draft: Draft) -> bool:
    return not draft.ready


def translated(draft: Draft) -> bool:
    return unready(draft) and not draft.relayed()


STEPS: List[Tuple[str, Callable[[Draft], bool]]] = [    # and of which drafts
    ("category", unnamed), ("provider", unnamed),
    ("action", lambda draft: not draft.again), ("guide", unready),
    ("api_key", lambda draft: unready(draft) and draft.provider not in KEYLESS),
    ("base_url", unready), ("port", unready), ("opus", unready), ("sonnet", unready),
    ("haiku", unready), ("tool_format", translated), ("window", unready),
    ("claude", lambda draft: unready(draft) and not draft.unasked),
    ("summary", unready)]
EXAMPLE_URL = "https://api.openai.com/v1"
OWN_NIM_URL = "http://localhost:8000/v1"


def is_model(name: str) -> bool:
    """Whether a name that upstream lists is one; others could steer the terminal."""
    with contextlib.suppress(ProxyError):
        return bool(convert("model", name, ""))
    return False


def kind_parser(kind: str, label: str) -> Callable[[str, bool], Any]:
    return lambda text, sure: convert(kind, text, label)


def parsed_url(text: str, sure: bool) -> str:
    url = convert("url", text, "Base URL")
    return clean_base_url(url, api_at(url))


def clean_key(text: str, shape: str) -> str:
    """A key as pasted; ProxyError if it has not the shape of one."""
    key = convert("secret", text, "API key") if text else ""
    if key and shape and not re.fullmatch(shape, key):
        raise ProxyError(400, f"that has {len(key)} characters and not the shape of a "
                              "key of theirs; the same again is taken")
    return key


def summary_rows(draft: Draft) -> List[Tuple[str, str]]:
    rows = [("provider", PROVIDERS[draft.provider].label), ("base URL", draft.base_url),
            ("API key", masked_key(draft.api_key) if draft.api_key else "-"),
            ("port", str(draft.port))]
    rows += [(tier, getattr(draft, tier)) for tier in TIERS]
    how = (("API", "Anthropic's own, relayed as it is") if draft.relayed()
           else ("tool format", draft.tool_format))
    return [*rows, how, ("window", str(draft.window or "auto"))]


# ---- 35. Doctor: what is wrong, and what mends it ----------------------------
# Checks as rows, from this machine outwards; each finding comes with the step that
# mends it.  Nothing is changed, and every wait is bounded, with and without a network.

OK, NOTE, BROKEN = "ok", "note", "BROKEN"       # BROKEN: something cannot work so
CHECK_SECONDS = 8.0         # for a name, a connection, an answer; a person waits
MODEL_SECONDS = 90.0        # for one probe of a model; a cold start takes a minute
LEAST_CLAUDE = (2, 1)       # what knows the variables for a model's window
FRESH_ERROR_SECONDS = 3600  # an older error may have been mended long since
PROBE_TOKENS = 256          # enough to think a little and say ok
Said = Iterator[Tuple[str, str, str]]           # state, what was found, what mends it


class Finding(NamedTuple):
    check: str              # a name in CHECKS
    state: str
    found: str
    mend: str               # a command, or a step; "" where nothing need be done


class Patient:
    """What is examined, and what earlier checks have found for the later ones.

    `faults` are (state, words, mend) for settings that are left out of the
    configuration: BROKEN where they could not be understood.
    """

    def __init__(self, config: Config, sources: Json, store: Store,
                 environ: Mapping[str, str]) -> None:
        self.config, self.sources = config, sources
        self.store, self.environ = store, environ
        self.faults: List[Tuple[str, str, str]] = []
        self.probe = False
        self.asked = True                       # whether upstream can be asked
        self.live: List[str] = []               # the models that it lists
        self.windows: Dict[str, int] = {}       # tokens, as it tells them
        self.idle: Set[str] = set()             # models that it has not loaded
        self.learned = Learned("")              # from refusals, if that can be read
        self.built_in = config.default_model == DEMO_MODEL


def findings(patient: Patient) -> Iterator[Finding]:
    """What each check finds, without secrets."""
    for name, check in CHECKS.items():
        try:
            for state, found, mend in check(patient):
                yield Finding(name, state, public(patient, found),
                              public(patient, mend))
        except (ProxyError, OSError) as error:
            words = getattr(error, "message", "") or str(error)
            yield Finding(name, BROKEN, public(patient, words), "")


def public(patient: Patient, text: str) -> str:
    """Words without any key, for upstream may quote one."""
    config = patient.config
    keys = {patient.environ.get(row.key_variable, "") for row in PROVIDERS.values()}
    for secret in {config.api_key, config.proxy_key, *keys}:
        text = redacted(text, secret)
    return masked(text)


# ---- this machine

def check_program(patient: Patient) -> Said:
    import platform
    yield OK, f"nimproxy {__version__}, Python {platform.python_version()}", ""


def check_home(patient: Patient) -> Said:
    """The folder of what is kept: there, writable, and whole."""
    store, home = patient.store, patient.store.home
    if not home:
        yield BROKEN, "there is no home: nothing is kept", "set NIMPROXY_HOME"
        return
    damaged = list(store.troubles)
    looking = Store("")
    memory = os.path.join(home, "learned.json")
    try:
        learned_rows(looking.read(memory))
    except ValueError as error:
        looking.troubles.append((memory, f"cannot be read: {error}"))
    if not looking.troubles:                    # else that would set it aside
        patient.learned = Learned(home)
    damaged += looking.troubles
    for path, words in damaged:
        yield BROKEN, f"{path}: {words}", f"repair or delete it: rm {shlex.quote(path)}"
    place = home
    while not os.path.lexists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        yield BROKEN, f"{place} cannot be written: nothing is kept", (
            "NIMPROXY_HOME names another folder")
        return
    if not damaged:
        saved = ", ".join(store.records) or "no provider"
        yield OK, f"{home}, {saved} set up", ""


# ---- what is set

def check_choices(patient: Patient) -> Said:
    config, sources = patient.config, patient.sources
    variable = PROVIDERS[config.provider].key_variable
    told = f"environment {variable}:"               # by the next check
    for state, words, mend in patient.faults:
        if words.startswith(told) and key_fault(patient.environ.get(variable, "")):
            continue
        yield state, words + "; it is left out here" * (state == BROKEN), mend
    if patient.built_in:
        yield OK, "the built-in model, which needs neither key nor network", ""
    else:
        source = sources.get("base_url") or sources.get("provider", "default")
        yield OK, (f"{upstream_label(config)}, {config.base_url} (by {source}), "
                   f"{config.api}"), ""
    if exposure(config):
        yield BROKEN, exposure(config), (
            "export PROXY_API_KEY=$(openssl rand -hex 16), or --host 127.0.0.1")


def check_key(patient: Patient) -> Said:
    config, row = patient.config, host_row(patient.config)
    own = PROVIDERS[config.provider]
    raw = patient.environ.get(own.key_variable, "")
    example = f"export {own.key_variable}={own.key_words or 'KEY'}"
    fault = key_fault(raw)
    if fault and raw.strip() in ("", config.api_key) or fault and not config.api_key:
        yield BROKEN, f"{own.key_variable} {fault}", f"{example}, and nothing else"
    elif patient.built_in or not config.api_key:
        missing = missing_key(config) and not patient.built_in
        if missing:
            yield BROKEN, f"there is no API key for {own.label}", (
                f"get one at {own.key_page}, then {example}, or `{program()} setup`")
        else:
            yield OK, "none is set, and none is known to be needed", ""
    else:
        shown = f"{masked_key(config.api_key)}, by {patient.sources.get('api_key')}"
        whose = key_owner(config.api_key)
        if whose and row.key_shape and not re.fullmatch(row.key_shape, config.api_key):
            yield BROKEN, f"{shown}: a key of {whose}, and {row.label} is asked", (
                f"{example}, from {own.key_page}, or --provider")
        elif row.key_shape and not re.fullmatch(row.key_shape, config.api_key):
            yield NOTE, f"{shown}: it has not the shape {row.key_words}", (
                f"copy it again from {row.key_page}")
        else:
            yield OK, shown, ""


def key_fault(raw: str) -> str:
    """What is wrong with a key as it stands in a variable; "" if nothing is."""
    if re.search(r"""["'`\u2018-\u201d]""", raw):
        return "has quotes in it, as they are pasted around keys"
    if re.match(r"(?i)bearer\s", raw):
        return "begins with the word Bearer, which is no part of a key"
    if re.search(r"\s", raw.strip()):
        return "has blanks or line ends in it"
    if "..." in raw or raw.strip("*xX.") == "" != raw:
        return "holds an example instead of a key"
    return "" if re.fullmatch("[!-~]*", raw.strip()) else "holds what is no plain ASCII"


def key_owner(key: str) -> str:
    """Whose keys begin so, as far as that is sure."""
    return next((words for start, words in KEY_STARTS.items() if key.startswith(start)),
                "")


KEY_STARTS = {"nvapi-": "NVIDIA", "sk-ant-": "Anthropic", "sk-or-": "OpenRouter",
              "sk-": "another provider (sk-)", "hf_": "Hugging Face",
              "gsk_": "Groq", "AIza": "Google"}


# ---- the way to upstream

PROXY_VARIABLES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY",
                   "all_proxy", "ALL_PROXY")


def check_proxy(patient: Patient) -> Said:
    """The HTTP proxy on the way, and whether clients would take it to come here."""
    config = patient.config
    named = [name for name in PROXY_VARIABLES if patient.environ.get(name)]
    exempt = config.no_proxy if on_loopback(config.host) else "*"
    if named and not ({"127.0.0.1", "*"} & set(re.split(r"[\s,]+", exempt))):
        yield NOTE, f"{named[0]} without 127.0.0.1 in NO_PROXY: programs that are " \
            "started by hand ask it for this proxy", (
                f'eval "$({program()} env)", or export NO_PROXY=127.0.0.1,localhost')
    if patient.built_in:
        return
    try:
        proxy = proxy_for(config, url_target(config.base_url))
    except ProxyError as error:
        patient.asked = False
        yield BROKEN, error.message, f"unset {' '.join(named)}, or mend it"
        return
    if not proxy:
        yield OK, "no HTTP proxy on the way to upstream", ""
        return
    place = url_target(proxy)
    fault = place_fault(place)
    name = next((name for name in named if masked(patient.environ[name]) in
                 (masked(proxy), masked(proxy).partition("//")[2])), "a variable")
    if fault:
        patient.asked = False
        host = urlsplit(config.base_url).hostname
        yield BROKEN, f"{name} leads to a proxy that does not answer: {fault}", (
            f"start it, unset {name}, or add {host} to NO_PROXY")
    else:
        yield OK, f"{name}: {place.host}:{place.port} answers", ""


def check_authorities(patient: Patient) -> Said:
    """The files of certificate authorities that variables name."""
    for variable, path in patient.config.ca_files:
        mend = f"unset {variable}, or let it name a file of certificates (PEM)"
        if not os.path.exists(path):
            yield BROKEN, f"{variable}={path}: no such file", mend
        elif not os.access(path, os.R_OK):
            yield BROKEN, f"{variable}={path}: it may not be read", mend
        else:
            try:
                tls_context(((variable, path),))
                yield OK, f"{variable}={path}", ""
            except ProxyError as error:
                yield BROKEN, error.message, mend


def check_connection(patient: Patient) -> Said:
    """The host's name, a connection, and TLS on it."""
    config, target = patient.config, url_target(patient.config.base_url)
    if patient.built_in or not patient.asked:
        yield (OK if patient.built_in else NOTE), "not needed" if patient.built_in \
            else "not tried: the proxy on the way does not answer", ""
        return
    where = f"{target.host}:{target.port}"
    try:
        if not proxy_for(config, target):
            name_resolved(target)
        began = time.monotonic()
        tls = asyncio.run(asyncio.wait_for(handshake(config, target), CHECK_SECONDS))
        yield OK, f"{where} in {time.monotonic() - began:.2f} s{tls}", ""
    except (ProxyError, asyncio.TimeoutError) as error:
        words = getattr(error, "message", f"{where}: nothing within {CHECK_SECONDS:g} "
                                          "s")
        patient.asked = False
        yield BROKEN, words, connection_mend(config, words)


async def handshake(config: Config, target: Target) -> str:
    """`, TLSv1.3` for a connection that could be made.  Raises ProxyError."""
    upstream = Upstream(config)
    wire = await upstream.connect(target)
    tls = wire.writer.get_extra_info("ssl_object")
    wire.abort()
    return f", {tls.version()}" if tls else ""


def name_resolved(target: Target) -> None:
    """Resolve a host's name; ProxyError if that fails or takes too long.

    On a thread that nobody waits for at the end: a resolver without a network may take
    half a minute.
    """
    failures: List[BaseException] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            failures.append(error)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(CHECK_SECONDS)
    if thread.is_alive():
        failures.append(socket.gaierror("no answer"))
    if failures:
        raise unreachable(target, "", failures[0])


def place_fault(place: Target) -> str:
    """Why nothing can be reached at a place; "" if something can."""
    try:
        name_resolved(place)
        socket.create_connection((place.host, place.port), CHECK_SECONDS).close()
    except ProxyError as error:
        return error.message
    except OSError as error:
        return unreachable(place, "", error).message
    return ""


SERVER_STARTS = {"ollama": "ollama serve", "lmstudio": "lms server start"}
CONNECTION_MENDS = [        # pattern in the words, what mends it
    ("not trusted", "export SSL_CERT_FILE=/path/to/its-authority.pem"),
    ("has expired", "renew the server's certificate, or set this machine's clock"),
    ("not valid yet", "set this machine's clock"),
    ("another (host|address)", "name it in --base-url as its certificate does"),
    ("not speak TLS", "--base-url with http:// instead of https://"),
    ("resolved", "check the network, and the host's name in the base URL"),
    ("nothing listens", "start the server, or name another by --base-url"),
    ("", "check the network and firewall; a company's proxy goes into HTTPS_PROXY"),
]


def connection_mend(config: Config, words: str) -> str:
    start = SERVER_STARTS.get(upstream_api(config).name, "")
    if start and re.search("nothing listens|resolved", words):
        return start
    return next(mend for pattern, mend in CONNECTION_MENDS if re.search(pattern, words))


# ---- upstream and its models

def check_upstream(patient: Patient) -> Said:
    """The list of models: whether the base URL and the key are taken."""
    config = patient.config
    if patient.built_in or not patient.asked:
        yield (OK if patient.built_in else NOTE), "it is built in" if patient.built_in \
            else "not asked: there is no connection", ""
        return
    try:
        status, headers, raw = fetched(config, list_path(config))
    except ProxyError as error:
        patient.asked = False
        yield BROKEN, error.message, connection_mend(config, error.message)
        return
    value = shaped(value_in(raw), dict)
    patient.live = listed_ids(value)
    patient.windows.update(told_windows(value, config.default_model))
    if status == 200 and patient.live:
        yield OK, f"lists {len(patient.live)} models; listed is not open to you: " \
            "--probe asks them", ""
        look_closer(patient)
    else:
        patient.asked = status < 300 or status in (404, 405, 429, 501)
        yield listing_fault(config, status, headers, raw)


def fetched(config: Config, place: str) -> Tuple[int, Headers, bytes]:
    """Status, headers and body of a GET at a path or URL; ProxyError if none comes."""
    async def ask() -> Tuple[int, Headers, bytes]:
        upstream = Upstream(config._replace(first_byte_timeout=CHECK_SECONDS))
        try:
            answer = await upstream.ask(place)
            try:
                return answer.status, answer.headers, await answer.whole()
            finally:
                answer.release()
        finally:
            await upstream.close()
    try:
        return asyncio.run(asyncio.wait_for(ask(), CHECK_SECONDS))
    except asyncio.TimeoutError:
        raise ProxyError(504, f"no whole answer within {CHECK_SECONDS:g} s") from None


def listing_fault(config: Config, status: int, headers: Headers, raw: bytes
                  ) -> Tuple[str, str, str]:
    """What an answer that is no list of models means."""
    base, row = config.base_url, PROVIDERS[config.provider]
    versioned = re.search(r"/v\d+(/|$)", base) or speaks_messages(config)
    with_version = f"--base-url {base if versioned else base + '/v1'}"
    text = error_words(raw, status, config.api_key)[0]
    error = refusal(Asked(config, ""), status, text)
    page = raw.lstrip()[:1] == b"<" or "html" in header(headers, "content-type")
    if 300 <= status < 400:
        place = header(headers, "location")
        base = re.sub("(/v1)?/models/?$" if speaks_messages(config) else "/models/?$",
                      "", place)
        return BROKEN, f"answers {status}, which leads to {place or 'nowhere'}; " \
            "redirects are not followed", f"--base-url {base or 'URL'}"
    if status in (401, 403):
        return BROKEN, error.message, (
            f"a new key from {row.key_page}, into {row.key_variable or 'upstream.'}"
            f"{'' if row.key_variable else 'api_key'}")
    if page and status < 500:
        return BROKEN, f"a web page answers at {base}", (
            f"{with_version}" if not versioned else
            "check the base URL; a login page may be in between")
    if status == 404 and not versioned:
        return BROKEN, f"there is nothing at {base}/models (404)", with_version
    if status in (404, 405, 501):
        return NOTE, f"lists no models ({status}), as some do not", "--probe asks them"
    if status == 429:
        return NOTE, error.message, "wait some minutes"
    if status == 200:
        return NOTE, "answers, but not with a list of models", "--probe asks them"
    return BROKEN, error.message, "wait; what the provider says of its state may help"


def look_closer(patient: Patient) -> None:
    """Which models the servers that load them have loaded, and with which window."""
    config, name = patient.config, upstream_api(patient.config).name
    root = re.sub(r"/v\d+$", "", config.base_url)
    place = {"ollama": "/api/ps", "lmstudio": "/api/v0/models"}.get(name)
    value: Json = {}
    if place:
        with contextlib.suppress(ProxyError):
            value = shaped(value_in(fetched(config, root + place)[2]), dict)
    rows = [row for row in shaped(value.get("models" if name == "ollama" else "data"),
                                  list) if isinstance(row, dict)]
    key, size = ("name", "context_length") if name == "ollama" else (
        "id", "loaded_context_length")
    loaded = {str(row.get(key)): whole(row.get(size)) for row in rows
              if row.get("state") != "not-loaded"}
    if value:
        patient.windows = {name: tokens for name, tokens in loaded.items() if tokens}
        patient.idle = {name for name in patient.live if name not in loaded}


def check_models(patient: Patient) -> Said:
    """Each model that is configured: listed, alive, and with window enough."""
    config, learned = patient.config, patient.learned
    for name, roles in named_models(config).items():
        listed = name if name in patient.live else name + ":latest"     # Ollama's
        yield model_said(patient, name, listed, f"{name} ({', '.join(roles)})")
        mends = learned.mends(config.base_url, name)
        if mends:
            yield OK, f"{name}: learned from refusals: {', '.join(mends)}", (
                f"`{program()} forget {shlex.quote(name)}`, if that is no longer so")


def named_models(config: Config) -> Dict[str, List[str]]:
    """What the models that are configured are there for."""
    found: Dict[str, List[str]] = collections.defaultdict(list)
    for tier in TIERS:
        found[getattr(config, tier)].append(tier)
    if config.default_model not in found:
        found[config.default_model].append("default")
    for alias, name in config.model_aliases.items():
        found[name].append(f"alias {alias}")
    for asked, names in config.fallbacks.items():
        for name in names if names != PROVIDERS[config.provider].fallbacks else ():
            found[upstream_model(config, name)].append(f"instead of {asked}")
    return found


def model_said(patient: Patient, name: str, listed: str, what: str
               ) -> Tuple[str, str, str]:
    config, facts = patient.config, model_facts(patient.config, name)
    if name == DEMO_MODEL:
        return OK, f"{what}: built in", ""
    hosted = config.base_url == PROVIDERS["nvidia"].base_url
    kind, gone = upstream_api(config).name, bool(patient.live) and (
        listed not in patient.live)
    if facts.retired and (gone or not patient.live):
        follows = SUCCESSORS.get(name, "")
        if follows and hosted:
            return NOTE, f"{what} is retired; {follows} is asked in its place", (
                f"put {follows} where {name} is set")
        return BROKEN, f"{what} is retired{instead(name)}", (
            f"--model {follows or 'ID'}, or `{program()} models --live`")
    if gone:
        pull = {"ollama": f"ollama pull {name}", "lmstudio": f"lms get {name}"}
        return BROKEN, f"{what} is not among the {len(patient.live)} models there" \
            f"{nearest(name, patient.live)}", pull.get(
                kind, f"--model ID of `{program()} models --live`")
    return window_said(patient, name, listed, what)


def window_said(patient: Patient, name: str, listed: str, what: str
                ) -> Tuple[str, str, str]:
    config, facts = patient.config, model_facts(patient.config, name)
    learned = patient.learned.window(config.base_url, name)
    window = (told_window(config, name) or patient.windows.get(listed) or learned
              or facts.window * facts.sure)
    hint = window_hint(config) or f"max_context_window: {LEAST_WINDOW_TOKENS} or more"
    kind = upstream_api(config).name
    words = f"{what}: {'listed' if listed in patient.live else 'set'}"
    if listed in patient.idle and kind == "lmstudio":
        return NOTE, f"{words}, but not loaded yet", (
            f"lms load {name} --context-length 65536")
    if listed in patient.idle and not told_window(config, name):
        return NOTE, f"{words}, but not loaded: its window is not known", hint
    if not window:
        return NOTE, f"{words}; its window is not known, and {facts.window} tokens " \
            "are assumed", "max_context_window: TOKENS in config.yaml"
    if window < LEAST_WINDOW_TOKENS:
        return BROKEN, f"{words}; its window of {window} tokens is too small for " \
            "Claude Code", hint
    text = "" if facts.vision else ", text only: images become a line of text"
    return OK, f"{words}, window {window}{text}", ""


# ---- one small request to each model

PROBE_TOOL = {"name": "report", "description": "Reports a state.", "input_schema": {
    "type": "object", "properties": {"state": {"type": "string"}},
    "required": ["state"]}}
PROBE_MENDS = [             # pattern in the words of a model that fails, what mends it
    ("answered 401|answered 403", "a new key from {page}, or a model that it may use"),
    (r"answered (404|410)|No model|not open to", "--model with another id: "
     "`{program} models --live`"),
    ("answered 429|over its rate|no turn", "wait some minutes; `fallbacks` in "
     "config.yaml names what to ask instead"),
    ("DEGRADED|busy|answered 5|empty answer", "wait, or `fallbacks` in config.yaml"),
    ("within|silen", "it may still be loading: again, or a smaller model"),
    ("tool", "{prose}another model"),
    ("", "`{program} test --model {model}` shows it whole"),
]


def check_probe(patient: Patient) -> Said:
    """Text and a tool call, streamed, by each model that stands for a tier."""
    config = patient.config
    if not patient.probe:
        return
    if not patient.asked and not patient.built_in:
        yield NOTE, "not tried: upstream cannot be asked", ""
        return
    models = list(dict.fromkeys([*(getattr(config, tier) for tier in TIERS),
                                 config.default_model]))
    if patient.built_in:
        models = [DEMO_MODEL]
    with Background(probing(config, models)) as url:
        for name in models:
            try:
                yield OK, f"{name}: {probed(config, url, name)}", ""
            except (ProxyError, OSError) as error:
                words = getattr(error, "message", "") or str(error)
                mend = next(mend for pattern, mend in PROBE_MENDS
                            if re.search(pattern, words))
                yield BROKEN, f"{name}: {words}", mend.format(
                    page=PROVIDERS[config.provider].key_page, program=program(),
                    model=name, prose="" if speaks_messages(config)
                    else "tool_format: xml in config.yaml, or ")


def probing(config: Config, models: List[str]) -> Config:
    """The settings of a proxy for trials: what fails does so at once, and is told as
    the status that it has."""
    return config._replace(
        port=0, host="127.0.0.1", proxy_key="", home="", retries=0, start_retries=0,
        fallbacks={}, model_aliases={name: name for name in models},
        eager_after=MODEL_SECONDS, first_byte_timeout=MODEL_SECONDS, ping_interval=2.0)


def probed(config: Config, url: str, name: str) -> str:
    """How fast a model says a word and calls a tool; ProxyError, OSError."""
    message, times = answered(config, url, probe_body(name, "Say ok."))
    speed = figures_line(message, times).partition(", in ")[0]
    body = probe_body(name, "Call report with the state ok.")
    message, _ = answered(config, url, {**body, "tools": [PROBE_TOOL], "tool_choice": {
        "type": "tool", "name": PROBE_TOOL["name"]}})
    if not any(block["type"] == "tool_use" for block in message["content"]):
        raise ProxyError(502, f"text comes ({speed}), but no tool call")
    return f"text and a tool call, {speed}"


def probe_body(name: str, words: str) -> Json:
    return {"model": name, "max_tokens": PROBE_TOKENS, "stream": True,
            "messages": [{"role": "user", "content": words}]}


def answered(config: Config, url: str, body: Json) -> Tuple[Json, List[float]]:
    """The message that answers, and the seconds at which its pieces came; ProxyError,
    OSError, also if it takes too long."""
    began, times, events = time.monotonic(), [], []
    config = config._replace(proxy_key="")
    for name, data in streamed_events(*streamed_answer(config, url, body)):
        now = time.monotonic() - began
        if now > MODEL_SECONDS:
            raise ProxyError(504, f"not done within {MODEL_SECONDS:g} s")
        times += [now] if name == "content_block_delta" else []
        events.append((name, data))
    return fold(events), times or [time.monotonic() - began]


# ---- a proxy that runs here

def check_port(patient: Patient) -> Said:
    """Who listens where we would, and how it goes if that is one of us."""
    config = patient.config
    proxy = running_proxy(config)
    words = "" if proxy else in_the_way(config)
    if proxy:
        yield from running_said(config, proxy)
    elif words:
        yield NOTE, f"{words}: a start here takes the next free one", (
            "--port, or end that program")
    else:
        yield OK, f"{config_url(config)} is free" if config.port else (
            "any that is free"), ""


def running_said(config: Config, proxy: LocalProxy) -> Said:
    status = proxy_json(met(config, proxy), proxy.url, "/status")
    place, url = upstream_place(config), proxy.url
    counts, limits = (shaped(status.get(key), dict) for key in ("counts", "limits"))
    if proxy.upstream != place:
        yield NOTE, f"the nimproxy at {url} asks {proxy.upstream}, not {place}", (
            "end it, or take another --port here")
    else:
        yield OK, f"nimproxy at {url} (pid {proxy.pid}): " \
            f"{counts.get('requests', 0)} requests, {counts.get('answers', 0)} " \
            "answers", ""
    if proxy.version != __version__:
        yield NOTE, f"it is version {proxy.version}, this is {__version__}", (
            "start it anew")
    if whole(limits.get("waiting")):
        yield NOTE, f"{limits.get('sent_this_minute')} of " \
            f"{limits.get('requests_per_minute')} requests of this minute are used " \
            f"up, and {limits['waiting']} wait", "fewer subagents, or `limits`"
    for model, seconds in shaped(limits.get("pauses"), dict).items():
        yield NOTE, f"{model} pauses {seconds} s after a 429", (
            "wait, or `fallbacks` in config.yaml")
    usual = whole(limits.get("requests_per_minute"))
    for model, most in shaped(limits.get("ceilings"), dict).items():
        if whole(most) and most < (usual or most + 1):
            yield NOTE, f"{model} has been cut to {most} requests a minute by 429s", (
                "wait: it grows again")
    errors = {str(row.get("message")): row for row in
              shaped(status.get("last_errors"), list) if isinstance(row, dict)
              and time.time() - shaped(row.get("at"), float) < FRESH_ERROR_SECONDS}
    for words, row in list(errors.items())[-3:]:
        yield NOTE, f"it answered {row.get('status')}: {words}", (
            f"`{program()} status` shows more")


# ---- Claude Code

def check_claude_settings(patient: Patient) -> Said:
    """What leads Claude Code here, elsewhere, or to nobody; the strongest first."""
    paths, seen = claude_paths(patient.environ), set()
    yield from receipt_said(paths)
    led = False
    for path in (*MANAGED_SETTINGS, os.path.abspath(".claude/settings.local.json"),
                 os.path.abspath(".claude/settings.json"), paths.settings):
        if os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        try:
            env = settings_env(paths._replace(settings=path))
        except ProxyError as error:
            led = True
            yield BROKEN, error.message, f"repair {path} by hand"
            continue
        for said in env_said(patient, env, path):
            led = True
            yield said
    for said in env_said(patient, patient.environ, ""):
        led = True
        yield said
    if not led:
        yield OK, "nothing leads Claude Code elsewhere", ""


MANAGED_SETTINGS = ("/etc/claude-code/managed-settings.json",
                    "/Library/Application Support/ClaudeCode/managed-settings.json")


def receipt_said(paths: ClaudePaths) -> Said:
    """What a crashed run has left in the settings."""
    if not os.path.exists(paths.receipt):
        return
    try:
        receipt = sound_receipt(paths)      # which sets none aside
    except DAMAGES:
        yield BROKEN, f"{paths.receipt} is damaged: what was changed cannot be told", (
            f"look through {paths.settings} by hand, and delete it")
        return
    gone = [row["pid"] for row in receipt["holders"] if not is_holding(row)]
    if gone or not receipt["settled"]:
        which = f" (pid {', '.join(map(str, gone))})" if gone else ""
        yield BROKEN, f"a run that crashed{which} has left its changes in " \
            f"{paths.settings}", f"{program()} uninstall"


def env_said(patient: Patient, env: Mapping[str, Any], path: str) -> Said:
    """What the variables of a settings file, or of the shell ("") do to a client."""
    where = path or "the shell"
    url = env.get("ANTHROPIC_BASE_URL")
    undo = f"delete it from {path}" if path else "unset ANTHROPIC_BASE_URL"
    if url:
        yield base_said(patient, url, where, undo)
    around = [name for name in BYPASSES if env.get(name) not in (None, "", "0")]
    if around:
        names = " ".join(around)
        yield NOTE, f"{where} sets {names}, which may lead claude around a proxy; " \
            f"`code` takes {'them' if around[1:] else 'it'} away", (
                f"delete from {path}: {names}" if path else f"unset {names}")


def base_said(patient: Patient, url: Any, where: str, undo: str
              ) -> Tuple[str, str, str]:
    try:
        target = url_target(convert("url", url, f"ANTHROPIC_BASE_URL in {where}"))
    except ProxyError as error:
        return BROKEN, error.message, undo
    words = f"ANTHROPIC_BASE_URL in {where} leads to {url}"
    if not on_loopback(target.host):
        return NOTE, f"{words}: plain claude goes there", f"{undo}; `code` goes here"
    if target.secure:
        return BROKEN, f"{words}, and http:// is spoken here", undo
    if proved(patient.config, url):
        return OK, f"{words}, where a nimproxy answers", ""
    port = "" if target.port == patient.config.port else f" --port {target.port}"
    return BROKEN, f"{words}, where no nimproxy answers", (
        f"`{program()}{port}` to serve there, or {undo}")


def check_claude(patient: Patient) -> Said:
    """The program: found, runnable, new enough, and only one."""
    import shutil
    path = claude_program(patient.environ)
    if not path:
        yield NOTE, "the claude program is not on PATH", CLAUDE_INSTALL
        return
    folders = patient.environ.get("PATH", os.defpath).split(os.pathsep)
    every = [shutil.which("claude", path=folder) for folder in folders if folder]
    places = {os.path.realpath(place): place for place in reversed(every) if place}
    if len(places) > 1:
        others = sorted(place for place in places.values() if place != path)
        yield NOTE, f"{path} is taken; there is also {', '.join(others)}", (
            "uninstall what is not wanted")
    found, trouble = program_version(path, patient.environ)
    numbers = re.search(r"(\d+)\.(\d+)\.\d+", found)
    if trouble:
        node = re.search("(?i)node", trouble) and not shutil.which(
            "node", path=patient.environ.get("PATH", os.defpath))
        yield BROKEN, f"{path} does not run: {trouble}", (
            "install Node.js 18 or newer: https://nodejs.org" if node else
            CLAUDE_INSTALL)
    elif not numbers:
        yield NOTE, f"{path} says no version, but {found[:60] or 'nothing'}", ""
    elif tuple(map(int, numbers.groups())) < LEAST_CLAUDE:
        least = ".".join(map(str, LEAST_CLAUDE))
        yield NOTE, f"{path} is version {numbers[0]}; before {least} it knows no " \
            "windows of other models", "claude update"
    else:
        yield OK, f"{path}, version {numbers[0]}", ""


CHECKS: Dict[str, Callable[[Patient], Said]] = {
    "program": check_program, "home": check_home,
    "settings": check_choices, "key": check_key,
    "proxy": check_proxy, "authorities": check_authorities,
    "connection": check_connection, "upstream": check_upstream,
    "models": check_models, "probe": check_probe,
    "port": check_port,
    "clients": check_claude_settings, "claude": check_claude,
}
FOUND_COLUMN = 20           # of a line: after state and check


def finding_lines(finding: Finding) -> str:
    """`BROKEN  key         there is no ...`, and the mend below it."""
    indent = " " * FOUND_COLUMN
    start = f"{finding.state:8}{finding.check:{FOUND_COLUMN - 8}}"
    lines = folded(start + finding.found, indent, most=4)
    if finding.mend:
        lines += "\n" + folded(f"{indent}-> {finding.mend}", indent + "   ", most=4)
    return lines


def verdict(found: List[Finding]) -> str:
    broken, notes = ([row for row in found if row.state == state]
                     for state in (BROKEN, NOTE))
    noted = f"{len(notes)} note{'s' * (len(notes) != 1)}"
    if not broken:
        return f"nothing is broken, {noted}"
    return (f"{len(broken)} broken, {noted}: mend {broken[0].check} first, then ask "
            "again")


def findings_json(found: List[Finding]) -> Json:
    states = collections.Counter(row.state for row in found)
    return {"findings": [{**row._asdict(), "state": row.state.lower()}
                         for row in found],
            "summary": {**{state.lower(): states[state]
                           for state in (OK, NOTE, BROKEN)},
                        "verdict": verdict(found)}}


# ---- 36. Reports: models, status and usage in lines --------------------------
# What the commands of these names print, as rows and as lines of 80 columns.

def model_rows(config: Config, live: Optional[List[str]]) -> List[Json]:
    """What is known of each model that the catalog, the configuration or, if it was
    asked, the provider names."""
    tiers = {tier: getattr(config, tier) for tier in TIERS}
    tiers["default"] = config.default_model
    hosted = config.base_url == PROVIDERS[config.provider].base_url
    known = offered(config.provider) if hosted or live is None else []
    theirs = {*(live or []), *config.models, *tiers.values()}
    named = [*(live or []), *config.models, *known, *tiers.values()]
    learned = Learned(config.home)
    rows = [model_about(config, name, learned)
            for name in dict.fromkeys(filter(None, named))]
    for row in rows:
        name = row["id"]
        row["tiers"] = [tier for tier, model in tiers.items() if model == name]
        row["new"] = name in (live or ()) and name not in MODELS
        row["gone"] = live is not None and name not in live
        if not hosted and name in theirs:       # retired there, and not here
            row.update(retired=False, instead=None)
    return [row for row in rows
            if row["tiers"] or not (row["gone"] and row["retired"])]


def model_about(config: Config, name: str, learned: Learned) -> Json:
    """What the catalog and the configuration know of a model, None where they know
    nothing, and what was learned."""
    known = model_facts(config, name)
    sure, thinks = known.sure, known.thinks
    if thinks is None:
        thinks = model_family(name) is not NO_FAMILY
    window = learned.window(config.base_url, name) or (known.window if sure else None)
    mends = learned.mends(config.base_url, name)
    return {"id": name, "window": window, "output": known.output if sure else None,
            "images": known.vision if sure else None,
            "thinking": thinks, "tools": "text" if "xml" in mends else "native",
            "retired": known.retired, "instead": SUCCESSORS.get(name)}


def model_line(row: Json) -> str:
    """`z-ai/glm-5.3   1M          thinking  opus`; notes that do not fit come below."""
    notes = [mark for mark in ("new", "gone") if row[mark]]
    notes += row["tiers"][:-1] if row["tiers"][1:] else row["tiers"]
    notes += ["tools as text"] if row["tools"] == "text" else []
    size = short_window(row["window"]) if row["window"] else "?"
    words = [word if row[word] else " " * len(word) for word in ("images", "thinking")]
    line = f"{row['id']:46} {size:>6} {' '.join(words)}"
    end = ", ".join(notes)
    if len(line) + 1 + len(end) <= COLUMNS:
        return f"{line} {end}".rstrip()
    return f"{line.rstrip()}\n{'':39}{end}"


def short_window(tokens: int) -> str:
    """`128k` for 128000 and for 131072, `1M` for 1000000 and for 1048576."""
    kilo = 1000 if tokens % 1000 == 0 or tokens % 1024 else 1024
    return (f"{tokens / kilo ** 2:.3g}M" if tokens >= kilo ** 2
            else f"{tokens / kilo:.0f}k")


KINDS_OF_COUNTS = {         # title: how the names of its counts begin
    "mended": ("calls_", "mended_"), "asked again": ("retried_",),
    "fallbacks": ("fallback_",),
}
SHOWN_REQUESTS, SHOWN_ERRORS = 8, 5     # the last ones; a screen has 24 lines


def status_lines(status: Json, url: str) -> List[str]:
    """A status for people, in lines that fit."""
    counts = status["counts"]
    sums = [f"{name.replace('_', ' ')} {short_count(counts.get(name, 0))}" for name in
            ("requests", "answers", "input_tokens", "output_tokens")]
    lines = [f"nimproxy {status['version']} at {url}, up "
             f"{time_span(status['uptime_seconds'])}, pid {status['pid']}",
             f"  upstream {status['base_url']}"]
    lines += [f"  {tier:8} {model}" for tier, model in status["models"].items()]
    lines += ["  " + ", ".join(sums), "  " + limits_line(status["limits"])]
    for title, kinds in KINDS_OF_COUNTS.items():
        found = [f"{name.partition('_')[2]} {count}" for name, count in counts.items()
                 if name.startswith(kinds)]
        if found:
            lines.append(f"  {title}: " + ", ".join(sorted(found)))
    turned = collections.Counter(f"  {row['instead']} instead of {row['model']}: "
                                 f"{row['reason']}" for row in status["fallbacks"])
    lines += [words + (f", in {count} sessions" if count > 1 else "")
              for words, count in turned.items()]
    lines += [f"  learned of {model}: {', '.join(mends)}"
              for model, mends in status.get("learned", {}).items()]
    lines = [folded(line, "    ") for line in lines]
    last = status.get("last_requests", [])[-SHOWN_REQUESTS:]
    lines += [f"  last requests{'':42}first   all    in   out"] if last else []
    lines += [request_line(row) for row in last]
    lines += ["  last errors"] if status["last_errors"] else []
    for error in status["last_errors"][-SHOWN_ERRORS:]:
        clock = time.strftime("%d %b %H:%M:%S", time.localtime(error["at"]))
        lines.append(folded(f"  {clock} {error['status']} {error['message']}",
                            " " * 22, most=3))
    return lines


def request_line(row: Json) -> str:
    """`  12:00:07 200 z-ai/glm-5.3    1.8   9.2   24k   512`: seconds, then tokens."""
    clock = time.strftime("%H:%M:%S", time.localtime(row["at"]))
    name = row["model"]
    name = name if len(name) <= 41 else name[:39] + ".."
    first = f"{row['ttft']:.1f}" if "ttft" in row else ""
    read, wrote = (short_count(row.get(key, 0)) for key in ("input_tokens",
                                                            "output_tokens"))
    return (f"  {clock} {row['status']} {name:41} {first:>5} "
            f"{row.get('seconds', 0):>5.1f} {read:>5} {wrote:>5}")


def short_count(number: int) -> str:
    """`999`, `24k`, `1.2M`."""
    if number >= 999500:
        return f"{number / 1e6:.1f}M"
    return f"{number / 1000:.0f}k" if number >= 10000 else str(number)


SPANS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def time_span(seconds: float) -> str:
    """`7 s`, `3 h 12 min`: the largest unit, and the next one."""
    at = next((at for at, (size, _) in enumerate(SPANS) if seconds >= size), 3)
    size, name = SPANS[at]
    words = f"{seconds // size:.0f} {name}"
    rest = [f" {seconds % size // small:.0f} {unit}" for small, unit in SPANS[at + 1:]]
    return words + "".join(rest[:1])


def limits_line(limits: Json) -> str:
    """What of the limits is used up: `7 of 40 requests this minute, 2 of 6 running`."""
    rows = (("requests_per_minute", "sent_this_minute", "requests this minute"),
            ("concurrency", "running", "running"))
    words = [f"{limits[used]}{f' of {limits[most]}' if limits[most] else ''} {what}"
             for most, used, what in rows] + [f"{limits['waiting']} waiting"]
    words += [f"{model} pauses {time_span(seconds)}"
              for model, seconds in limits["pauses"].items()]
    return ", ".join(words)


USAGE_DAYS = 7              # a week, unless told otherwise
NAME_COLUMNS = 28           # of a usage table: models are cut
LEAST_BAR = 8               # columns for the longest; in less there are none
FIGURES = ("answers", "input_tokens", "output_tokens", "cached_input_tokens")
Usage = Dict[str, Dict[str, List[int]]]     # figures by day and model


def usage_files(home: str, old_home: str) -> Dict[str, str]:
    """The log of each day, by its date; the older program's where ours has none."""
    found = {}
    for place in filter(None, (old_home, home)):
        folder, names = os.path.join(place, USAGE_LOG), []
        with contextlib.suppress(OSError):
            names = os.listdir(folder)
        for name in names:
            path = os.path.join(folder, name)
            if DAY_FILE.fullmatch(name) and os.path.isfile(path):
                found[name[:10]] = path
    return found


def read_usage(path: str) -> Tuple[Dict[str, List[int]], int]:
    """The figures of a day by model, and how many lines could not be read."""
    models: Dict[str, List[int]] = {}
    unread = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                try:
                    model, figures = usage_figures(line)
                except (ValueError, RecursionError):
                    unread += 1
                    continue
                models[model] = summed([models.get(model, [0, 0, 0, 0]), figures])
    except OSError as error:
        complain(f"cannot read {path}: {error.strerror}")
    return models, unread


def summed(rows: Iterable[List[int]]) -> List[int]:
    return [sum(column) for column in zip(*rows)]


def usage_totals(usage: Usage) -> Dict[str, List[int]]:
    """The figures of all days by model, the largest first."""
    totals: Dict[str, List[int]] = {}
    for models in usage.values():
        for model, figures in models.items():
            totals[model] = summed([totals.get(model, [0, 0, 0, 0]), figures])
    return largest_first(totals)


def largest_first(models: Dict[str, List[int]]) -> Dict[str, List[int]]:
    return dict(sorted(models.items(), key=lambda row: (-tokens_of(row[1]), row[0])))


def tokens_of(figures: List[int]) -> int:
    return figures[1] + figures[2]


def usage_json(usage: Usage, unread: int) -> Json:
    def named(models: Dict[str, List[int]]) -> Json:
        rows = [{"model": model, **dict(zip(FIGURES, figures))}
                for model, figures in largest_first(models).items()]
        total = summed(models.values()) or [0, 0, 0, 0]
        return {**dict(zip(FIGURES, total)), "models": rows}
    return {"days": [{"day": date, **named(models)} for date, models in usage.items()],
            "total": named(usage_totals(usage)), "unreadable_lines": unread}


def usage_lines(usage: Usage, columns: int, mark: str) -> List[str]:
    """The table: each day with its models, then all days; bars are to one scale in
    either."""
    rows: List[Tuple[str, List[str], float]] = [("", ["answers", "in", "out"], 0.0)]
    days = {date: summed(models.values()) for date, models in usage.items()}
    totals = usage_totals(usage)
    most = max(map(tokens_of, days.values()))
    blocks = [(date, most, models) for date, models in usage.items()]
    blocks.append((f"{len(days)} day{'s' * (len(days) > 1)}",
                   tokens_of(summed(totals.values())), totals))
    for title, scale, models in blocks:
        found = {title: summed(models.values())}
        found.update(("  " + name, row) for name, row in largest_first(models).items())
        rows += [(name, [f"{value:,}" for value in row[:3]],
                  tokens_of(row) / max(scale, 1)) for name, row in found.items()]
    room = columns - max(len(usage_line(*row[:2])) for row in rows) - 2
    return [usage_line(name, figures, bar(part, room) * mark)
            for name, figures, part in rows]


def usage_line(name: str, figures: List[str], marks: str = "") -> str:
    name = name if len(name) <= NAME_COLUMNS else name[:NAME_COLUMNS - 3] + "..."
    answers, taken, given = figures
    line = f"{name:{NAME_COLUMNS}} {answers:>7} {taken:>13} {given:>11}"
    return f"{line}  {marks}".rstrip()


def bar(part: float, room: int) -> int:
    """How long a bar is; one that stands for anything can be seen."""
    return max(round(room * part), 1) if part and room >= LEAST_BAR else 0


def bar_mark() -> str:
    """What bars are made of: blocks where the output can show them."""
    return "\u2588" if can_show("\u2588") else "#"


# ---- 37. Context: what a command works with ----------------------------------
# Options, settings with their sources, files and log, put together once.

class Context(NamedTuple):
    """What a command works with."""
    options: argparse.Namespace
    config: Config
    sources: Json
    arguments: List[str]    # positional ones, or the child's
    environ: Dict[str, str]
    store: Store


class Given(NamedTuple):
    """Where settings come from, beside the flags."""
    environ: Mapping[str, str] = {}
    dotenv: Mapping[str, str] = {}
    file: File = File()
    saved: SavedProviders = SavedProviders()


def make_context(options: argparse.Namespace, arguments: List[str],
                 store: Store) -> Context:
    given = Given(dict(os.environ), {}, named_config(options), store.saved())
    config, sources = all_settings(options, given, store, complain)
    config = config._replace(home=store.home)
    return Context(options, config, sources, arguments, dict(os.environ), store)


def named_config(options: argparse.Namespace) -> File:
    name = options.config or os.environ.get("PROXY_CONFIG") or ""
    return File(name, read_text(name, open)) if name else File()


def configured(options: argparse.Namespace, given: Given) -> Tuple[Config, Json]:
    flags = {name: getattr(options, name, None) for name in Config._fields}
    flags["default_model"] = options.model
    if options.demo:
        flags["default_model"] = DEMO_MODEL
    return resolve_config(flags, *given)


FOUND = ("config.yaml", ".env")     # what is looked for in the current folder
ASKING = ("serve", "code", "run")   # the commands that ask about it
MAX_DOUBTS = 8                      # that a line tells; the question tells them all
MAX_DOUBT_CHARS = 200               # of a value


def all_settings(options: argparse.Namespace, given: Given, store: Store,
                 tell: Callable[[str], None]) -> Tuple[Config, Json]:
    """All settings with their sources; files in the current folder hold in full beside
    the program and after a yes to their content, else for what leads nothing away."""
    own, part, digests, marked, whole = found_files(options, given, store, tell)
    base, sources = configured(options, own)
    config, told = configured(options, part)
    away, shown = led_away(base, sources, config), config.shown()
    mine = [name for name in away if told.get(name, "").startswith(FOUND)] or away
    doubts = [printable(words) for words in (
        *(f"{name} = {shown[name]} ({told.get(name, 'default')})" for name in mine),
        *marked)]
    asks = options.command in ASKING and not options.show_config
    names = " and ".join("./" + os.path.basename(path) for path in digests)
    if doubts and asks and at_terminal():
        say("\n  ".join([f"{names} may be a stranger's, and would set", *whole]))
        if agreed("Take all of it, now and whenever it is the same?"):
            store.trust(digests)
            return all_settings(options, given, store, tell)
    elif doubts:
        doubts[MAX_DOUBTS:] = ["and more"] * bool(doubts[MAX_DOUBTS:])
        tell(f"{names} may be a stranger's; left out: {'; '.join(doubts)}; if meant, "
             "say --config ./config.yaml, or set it by an option or the environment")
    if config.api_key != base.api_key and "api_key" not in away:
        tell(f"the key of ./{told['api_key']} is used: there is no other")
    kept = {name: getattr(base, name) for name in away}
    return config._replace(**kept), {
        **told, **{name: sources.get(name, "default") for name in away}}


def found_files(options: argparse.Namespace, given: Given, store: Store,
                tell: Callable[[str], None]
                ) -> Tuple[Given, Given, Dict[str, str], List[str], List[str]]:
    """What is given with the user's own files of the current folder; also with what may
    be looked at of others; the digests of these by path, words for what may not, and
    for all that a yes would let them set."""
    import hashlib
    own, part, digests, marked, whole = given, given, {}, [], []
    place = globals().get("__file__", "<stdin>")        # which lies in no folder
    beside = place != "<stdin>" and os.path.dirname(os.path.realpath(place))
    for name in FOUND:
        if not os.path.lexists(name) or name == "config.yaml" and given.file.name:
            continue
        path = os.path.abspath(name)
        try:
            text = read_text(name, plain_file)
            digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
            mine = store.trusted.get(path) == digest or beside == os.path.dirname(path)
            adds, words = {"dotenv": dotenv_values(text)}, []
            if name == "config.yaml":
                adds, words = unexpanded(File(name, text), mine)
            if mine:
                own = own._replace(**adds)
            else:
                configured(options, part._replace(**adds))
                digests[path] = digest
                whole += all_it_sets(name, text, "\n".join([given.file.text, *whole]))
            part, marked = part._replace(**adds), marked + words
        except ProxyError as error:
            if beside == os.path.dirname(path):
                raise
            configured(options, part)       # what is wrong without it is said first
            tell(f"./{name} is left out: {error.message}")
    return own, part, digests, marked, whole


def all_it_sets(name: str, text: str, seen: str) -> List[str]:
    """A line for each setting of a found file that is not free, whatever the options;
    URLs stand last, where nothing scrolls them away.  `seen` is what may name more of
    .env's variables."""
    settings = [setting for setting in SETTINGS if setting.found != "free"]
    if name == "config.yaml":
        free = {setting.key for setting in SETTINGS} - {each.key for each in settings}
        rows = [(f"{where}: ", ".".join(path), str(value)) for path, (value, where)
                in raw_entries(File(name, text))[0].items()]
        rows = [row for row in rows if row[1] not in free]
    else:
        asked = {*(setting.variable for setting in settings), *re.findall(r"\w+", seen),
                 *(row.key_variable for row in PROVIDERS.values())}
        rows = [(name + " ", key, value) for key, value in dotenv_values(text).items()
                if key in asked or key.startswith("MODEL_ALIAS_")]
    rows.sort(key=lambda row: "://" in row[2])
    keys = re.findall(r"(?im)key\S*\s*[=:].*?(\w+)\W*$", seen)     # api_key = ${THIS}
    return [printable(f"{where}{key} = {shown_setting(key, value, key in keys)}")
            for where, key, value in rows]


def shown_setting(key: str, value: str, secret: bool) -> str:
    """A value as far as it is no secret; a reference to one is none."""
    named = re.search("(?i)key|token|secret|password", key)
    if secret or named and not re.search(REFERENCE, value):
        return "***"
    return masked(value)[:MAX_DOUBT_CHARS]


def unexpanded(file: File, mine: bool) -> Tuple[Json, List[str]]:
    """What a file adds, and words for what it takes from the environment, left out
    unless it is one's own; OpenClaw's is that of another server, all of it."""
    entries, tree = ({}, None) if mine else raw_entries(file)
    marked = {path: f"{where}: {'.'.join(path)} = {value}"
              for path, (value, where) in entries.items()
              if re.search(REFERENCE, str(value))
              or tree and path[-1] in ("baseUrl", "id")}
    part = {} if tree else {"file": file._replace(left_out=marked)}
    return part, [*marked.values()] or ["models.providers"] * bool(tree)


def home_folders(environ: Mapping[str, str]) -> Tuple[str, str]:
    """Our folder and claude-adapter's, "" where the home is not known."""
    named = environ.get("NIMPROXY_HOME") or os.path.join("~", ".nimproxy")
    places = (named, os.path.join("~", ".claude-adapter"))
    known = environ.get("HOME") != ""       # else the root folder would be it
    home, old = (os.path.expanduser(place) if known or place[0] != "~" else "~"
                 for place in places)
    return "" if home[0] == "~" else home, "" if old[0] == "~" else old


def read_text(path: str, opened: Callable[[str], TextIO]) -> str:
    """A file of UTF-8, with its line ends as they are."""
    try:
        with opened(path) as file:
            raw = file.buffer.read(MAX_SAVED_BYTES + 1)
        if len(raw) > MAX_SAVED_BYTES:
            raise OSError(errno.EFBIG, "it is larger than any settings")
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ProxyError(400, f"{path}: cannot be read: {why}") from None


def start_log(context: Context, quiet: bool) -> None:
    """Log to standard error; where the terminal is another's, only if asked to."""
    level = context.config.log_level.upper()
    if quiet and "log_level" not in context.sources:
        level = "CRITICAL"
    handler = logging.StreamHandler()
    handler.setFormatter(LogLines(context.config))
    log.handlers[:] = [handler]
    log.setLevel(level)


MAX_LOG_CHARS = 1000        # of a line; upstream's own words may have twice as many


class LogLines:
    """Formats log records, as logging wants it: one line each, nothing that could forge
    another, no secret; tracebacks are indented, or a field of the JSON."""

    def __init__(self, config: Config) -> None:
        self.json = config.log_json
        self.secrets = [config.api_key, config.proxy_key]
        for proxy in (config.http_proxy, config.https_proxy):
            with contextlib.suppress(ValueError):       # no URL: it is not used either
                self.secrets.append(unquote(urlsplit(proxy).password or ""))

    def format(self, record: logging.LogRecord) -> str:
        trace = ""
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
        words = self.clean(record.getMessage())[:MAX_LOG_CHARS]
        trace = "".join("\n    " + self.clean(line) for line in trace.splitlines())
        if not self.json:
            clock = time.strftime("%H:%M:%S", time.localtime(record.created))
            return f"{clock} {record.levelname} {words}{trace}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        row = {"time": f"{when}.{record.msecs:03.0f}Z", "level": record.levelname}
        facts = getattr(record, "facts", None)
        row.update(facts or {"message": words}, **({"trace": trace} if trace else {}))
        return self.clean(encode_json(row))

    def clean(self, text: str) -> str:
        for secret in self.secrets:
            text = redacted(text, secret)
        return printable(masked(text))


# ---- 38. Running: the server, and clients on it ------------------------------
# The server until a signal ends it; Claude Code or any program for as long as it runs;
# Claude Code's settings meanwhile.

# Options that a client's environment depends on: hints repeat them.
HINTED = ("--config", "--provider", "--model", "--base-url", "--host", "--port",
          "--demo")


def hinted(context: Context, port: int) -> str:
    """The options for a hint: as they were given, but the port as it is."""
    given = ""
    for name in HINTED:
        value = getattr(context.options, name[2:].replace("-", "_"))
        if name == "--port" and (value or port != context.config.port):
            value = str(port)
        if value:
            given += f" {name}" + ("" if value is True else f" {shlex.quote(value)}")
    return given


def raise_descriptor_limit() -> None:
    """Let this process have as many sockets as it may; macOS begins at 256."""
    with contextlib.suppress(ImportError, OSError, ValueError):     # Windows
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        boundless = resource.RLIM_INFINITY
        wanted = MAX_DESCRIPTORS if hard == boundless else min(hard, MAX_DESCRIPTORS)
        if soft != boundless and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_config(config: Config) -> None:
    """What can be known to be wrong before anything listens."""
    if config.default_model != DEMO_MODEL and missing_key(config):
        raise ProxyError(400, missing_key(config))
    if exposure(config):
        raise ProxyError(400, f"{exposure(config)}: set PROXY_API_KEY to "
                              f"{LEAST_KEY_CHARS} characters or more")
    for variable, path in config.ca_files:
        if not os.path.exists(path):
            raise ProxyError(400, f"{variable}={path}: no such file")


async def serve_forever(context: Context) -> int:
    """Serve until a signal; the first drains, the second stops at once."""
    config = context.config
    try:
        server = await serve(config, near_ports(config))
    except OSError as error:
        complain(address_trouble(config, error))
        return 1
    port = tell_port(config, server.url)
    stopping = asyncio.Event()
    tasks = [] if heed_signals(stopping) else [asyncio.ensure_future(wake())]
    tasks.append(asyncio.ensure_future(trim_memory(server.proxy.counts)))
    say(f"nimproxy {__version__} listening on {server.url}")
    say(f"  upstream {described_upstream(config)}")
    say(f"  Claude Code: eval \"$({program()} env{hinted(context, port)})\" && claude")
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:       # both wait for files, and for others
        led = clients_led(context, server.url)
        await loop.run_in_executor(None, stack.enter_context, led)
        await stopping.wait()
        await loop.run_in_executor(None, stack.close)
    count = server.drain()
    if count:
        with contextlib.suppress(OSError):      # the terminal may have gone
            tell = log.warning if config.log_json else complain
            tell(f"waiting for {count} answer{'s' * (count > 1)}; "
                 "again to stop at once")
    await server.close(DRAIN_SECONDS)
    for task in tasks:
        task.cancel()
    # A thread that still resolves a name does not hold the end up.
    loop.call_later(LINGER_SECONDS, os._exit, 0)
    return 0


STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")      # as far as there are


def heed_signals(stopping: asyncio.Event) -> bool:
    """Set the event at the first signal, end the program at the second; whether they
    wake the loop.

    SIGHUP, the end of a terminal, comes twice or along with others: it is never the
    second.  Under nohup it stays ignored.
    """
    loop = asyncio.get_running_loop()

    def stop(name: str) -> None:
        if stopping.is_set() and name != "SIGHUP":
            # Threads that resolve names would hold a plain exit up.  Not at once: what
            # waits for the first signal may not have heard of it yet.
            loop.call_soon(os._exit, 130)
        stopping.set()

    wakes = True
    for name in STOP_SIGNALS:
        number = getattr(signal, name, 0)
        ignored = number and signal.getsignal(number) == signal.SIG_IGN
        if not number or name == "SIGHUP" and ignored:
            continue
        try:
            loop.add_signal_handler(number, stop, name)
        except NotImplementedError:     # Windows
            wakes = False
            signal.signal(number, lambda *_, name=name: loop.call_soon_threadsafe(
                stop, name))
    return wakes


async def wake() -> None:
    """Windows looks for signals only between two steps of a loop."""
    while True:
        await asyncio.sleep(WAKE_SECONDS)


async def trim_memory(counts: Mapping[str, int]) -> None:
    """Give free memory back after requests: glibc keeps 20 MB of a hundred."""
    trim, before, last = None, 0, 0
    await asyncio.sleep(TRIM_SECONDS)       # ctypes takes 2 ms: not while starting
    with contextlib.suppress(ImportError, OSError, TypeError):      # Windows
        import ctypes
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)      # only glibc has it
    while trim:
        if counts["requests"] != before:    # of the time before last: what was asked
            trim(0)                         # then may have been held until now
        before, last = last, counts["requests"]
        await asyncio.sleep(TRIM_SECONDS)


def described_upstream(config: Config) -> str:
    return f"{upstream_place(config)}, model {config.default_model}"


def tell_port(config: Config, url: str) -> int:
    """The port of a URL; that it is not the configured one is said, and why."""
    port = urlsplit(url).port or 0
    if config.port not in (0, port):
        complain(f"port {config.port} is in use by {port_user(config)}; taking {port}")
    return port


def address_trouble(config: Config, error: OSError) -> str:
    where, ports = f"{config.host}:{config.port}", near_ports(config)
    if error.errno in TAKEN:
        return (f"{where} is in use by {port_user(config)}, and no port up to "
                f"{ports[-1]} is free; end one of them, or choose with --port "
                f"(`{program()} status` shows a nimproxy that is up)")
    return f"cannot listen at {where}: {error.strerror or error}; try --host or --port"


def launch(context: Context, command: List[str]) -> int:
    """Run a client on a proxy of its own: a free port, a key that lives as long."""
    mend_claude(context)
    config = context.config
    if "port" not in context.sources:
        config = config._replace(port=0)
    if not config.proxy_key:
        config = config._replace(proxy_key=os.urandom(24).hex())
    if not {"--help", "-h", "--version", "-v"}.intersection(context.arguments):
        check_config(config)
    proxy = running_proxy(config, "serve")
    if proxy and proxy.upstream == upstream_place(config):
        return run_client(context, met(config, proxy), proxy.url, command)
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(Background(config, near_ports(config),
                                                 os.path.basename(command[0])))
        except OSError as error:
            complain(address_trouble(config, error))
            return 1
        tell_port(config, url)
        return run_client(context, config, url, command)


def run_client(context: Context, config: Config, url: str, command: List[str]) -> int:
    window = ask_window(config, url) or config.context_window
    config = config._replace(context_window=window)
    added = client_environment(config, url, asks_one_model(context), context.environ)
    name = os.path.basename(command[0])
    complain(f"{name} on {described_upstream(config)}, by way of {url}")
    piped = sys.argv[:1] == ["-"]       # python3 - code < nimproxy.py
    try:
        with settings_over(context, command[0], added) as flags:
            command = [command[0], *flags, *command[1:]]
            code = run_child(command, child_environment(added, context.environ), piped)
    except OSError as error:
        complain(f"cannot run {command[0]}: {error.strerror or error}")
        return 126
    tell_failure(config, url)
    return code


def asks_one_model(context: Context) -> bool:
    """Whether a flag names the model, so that it serves the client's subagents, too."""
    return context.sources.get("default_model", "").startswith("--")


def tell_failure(config: Config, url: str) -> None:
    """Say what upstream has refused, if a client got nothing else all the time."""
    status = proxy_json(config, url, "/status")
    counts, errors = status.get("counts") or {}, status.get("last_errors")
    if errors and not counts.get("answers") and errors[-1]["status"] in PUZZLES:
        complain(f"{errors[-1]['message']}; `{program()} doctor` looks for the cause")


@contextlib.contextmanager
def settings_over(context: Context, command: str, added: Mapping[str, str]
                  ) -> Iterator[List[str]]:
    """Flags for Claude Code where its settings.json would lead it elsewhere.

    What stands there goes over the environment; what --settings names goes over both.
    A file, because others may read a command line, and it holds the proxy's key.
    """
    led = {}
    if os.path.basename(command).partition(".")[0] == "claude":
        with contextlib.suppress(ProxyError):
            paths = claude_paths(context.environ)
            led = led_elsewhere(settings_env(paths), own_env(paths), added)
    if not led or any(word.startswith("--settings") for word in context.arguments):
        yield []
        return
    from tempfile import TemporaryDirectory
    with TemporaryDirectory(prefix="nimproxy-") as folder:
        path = os.path.join(folder, "settings.json")
        with open(path, "w", encoding="ascii") as file:
            json.dump({"env": led}, file)
        yield ["--settings", path]


def led_elsewhere(there: Json, own: Json, added: Mapping[str, str]) -> Dict[str, str]:
    """What has to go over `there`, the env of settings.json, for a client of ours.

    `own` is what the user alone has there: models and the like, which win.
    """
    led = {name: "" for name in BYPASSES if there.get(name)}
    for name, value in added.items():
        ours = name in there and there[name] != own.get(name)
        if ours or name in there and name in LEADS:
            led[name] = value
    return {name: value for name, value in led.items() if there[name] != value}


def ask_window(config: Config, url: str) -> int:
    """The default model's window as the proxy knows it, tokens; 0 if it cannot say."""
    path = "/v1/models/" + quote(config.default_model, safe="/")
    return whole(proxy_json(config, url, path).get("max_input_tokens"))


# What decides where a client goes; all else in settings.json is the user's to choose.
LEADS = ("ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN")


def mend_claude(context: Context) -> None:
    """Put back what a crashed run has left in Claude Code's settings."""
    if not context.options.no_claude_settings:
        with contextlib.suppress(ProxyError):       # no home: nothing is left there
            mend_settings(claude_paths(context.environ), warn)


def warn(words: str) -> None:
    log.warning("%s", words)


@contextlib.contextmanager
def clients_led(context: Context, url: str) -> Iterator[None]:
    """Lead Claude Code to `url` in its settings, if the user has once said yes."""
    with contextlib.ExitStack() as stack:
        try:
            if not context.options.no_claude_settings:
                stack.enter_context(led_by_settings(context, url))
        except ProxyError as error:
            log.warning("%s; Claude Code's settings are left alone", error.message)
        yield


def led_by_settings(context: Context, url: str) -> ContextManager:
    paths = claude_paths(context.environ)
    installed = installed_env(paths) or {}
    wished = context.store.settings.get("claude_settings") is True
    there = installed.get("ANTHROPIC_BASE_URL", "" if wished else url)
    if there == url or there and proved(context.config, there):
        return contextlib.nullcontext()
    return claude_settings(paths, settings_wish(context, paths, url), warn)


def settings_wish(context: Context, paths: ClaudePaths, url: str) -> Dict[str, str]:
    """What `env` in settings.json should hold; the user's own wins, but for models and
    what leads elsewhere.  ProxyError for a file that is not to be touched.

    Not NO_PROXY: settings go over the shell's variables, and there it may be longer.
    """
    own = own_env(paths)
    wishes = {name: context.environ.get(name, "") for name in DEFEATED}
    wishes.update((name, str(value)) for name, value in own.items()
                  if value and not name.startswith("ANTHROPIC_"))
    wish = client_environment(context.config, url, asks_one_model(context), wishes)
    del wish["NO_PROXY"], wish["no_proxy"]
    return {**wish, **{name: "" for name in BYPASSES if own.get(name)}}


# ---- 39. Commands: what each of them does ------------------------------------
# One function for each, whose result is the exit code.

def run_serve(context: Context) -> int:
    if unready_here(context):
        context = set_up(context)
    check_config(context.config)
    raise_descriptor_limit()
    mend_claude(context)
    return asyncio.run(serve_forever(context))


def unready_here(context: Context) -> bool:
    """Whether a provider is to be set up first, and there is somebody to do it."""
    config = context.config
    if config.default_model == DEMO_MODEL or not missing_key(config):
        return False
    asks = at_terminal()
    if asks:
        say(f"nimproxy {__version__}: no provider is set up yet.")
    return asks


def run_setup(context: Context) -> int:
    """The wizard; then what was asked for beside it, or is chosen."""
    fresh = set_up(context)
    start = context.options.command
    rows = [Choice("code", "Launch Claude Code", f"{program()} code"),
            Choice("serve", "Start the proxy", program())]
    while start == "setup":
        try:
            start = Terminal(context.environ).choose("It is set up. Start now?", rows)
        except Leave:
            return 0
        except Back:
            context.options.provider, context.options.reconfigure = None, True
            fresh = set_up(context)
    start_log(fresh, quiet=start != "serve")
    return run_code(fresh) if start == "code" else run_serve(fresh)


def set_up(context: Context) -> Context:
    """What commands work with after the wizard, which keeps what it was told."""
    options, store = context.options, context.store
    draft = asked_draft(context)
    if not draft.ready:                     # what was given is answered
        options.base_url = options.port = options.model = None
    try:
        store.keep(draft)
    except OSError as error:
        complain(f"cannot keep it in {store.home} ({error.strerror}): it is used now, "
                 "and forgotten then")
    options.reconfigure = None
    fresh = make_context(options, context.arguments, store)
    if draft.claude and not draft.ready:
        agree_on_settings(fresh)
    start_log(fresh, quiet=options.command != "serve")
    return fresh


def asked_draft(context: Context) -> Draft:
    """The wizard's answers.  ProxyError if there is nobody to ask, or nowhere to keep
    them; Leave."""
    options, store = context.options, context.store
    if not at_terminal():
        raise ProxyError(400, "setup asks questions, and there is no terminal to ask "
                              f"at: set {PROVIDERS['nvidia'].key_variable}, or write a "
                              "config.yaml")
    if not store.home:
        raise ProxyError(400, "there is no home to keep it in: set NIMPROXY_HOME")
    start_log(context, quiet=True)      # a check's requests are told by the wizard
    again = store.active if options.reconfigure else ""
    draft = Draft(provider=(options.provider or again).lower(), again=bool(again),
                  unasked=bool(options.no_claude_settings),
                  claude=store.settings.get("claude_settings") is True)
    if draft.provider and draft.provider not in PROVIDERS:
        raise ProxyError(400, f"--provider: expected one of {', '.join(PROVIDERS)}, "
                              f"found {draft.provider!r}")
    wizard = Wizard(Terminal(context.environ), store, context.environ,
                    (listed_models, probed_model))
    given = {"base_url": options.base_url, "port": options.port,
             "default_model": options.model}
    wizard.given = {name: value for name, value in given.items() if value is not None}
    return wizard.run(draft)


def agree_on_settings(context: Context) -> None:
    """Show what serving would change in Claude Code's settings, and ask once more."""
    paths, config, store = claude_paths(context.environ), context.config, context.store
    try:
        wish = settings_wish(context, paths, config_url(config))
        edits = install_edits(paths, wish)
    except ProxyError as error:
        complain(f"{error.message}; it is left alone")
        return
    for edit in edits:
        say(edit.trouble or "\n".join(diff_lines(edit)))
    store.settings["claude_settings"] = agreed(
        "Write this, each time while `serve` runs?")
    with contextlib.suppress(OSError):          # said already
        store.activate(store.active)


def listed_models(config: Config) -> List[str]:
    """The models that upstream lists; [] if it does not say within some seconds."""
    try:
        return asyncio.run(asyncio.wait_for(live_list(config), LIST_SECONDS))
    except (ProxyError, asyncio.TimeoutError):
        return []


def probed_model(config: Config, model: str) -> str:
    """What is wrong with a model, by one tiny request to it; "" if it answers."""
    try:
        with Background(probing(config, [model])) as url:
            answered(config, url, probe_body(model, "Say ok."))
    except (ProxyError, OSError) as error:
        return getattr(error, "message", "") or str(error)
    return ""


LIST_SECONDS = 4.0          # for a list of models, while somebody waits at a question


def run_doctor(context: Context) -> int:
    """What is wrong, line by line as it is found."""
    start_log(context, quiet=True)
    patient = examined(context)
    found: List[Finding] = []
    colour = takes_colour(sys.stdout, context.environ)
    for finding in findings(patient):
        found.append(finding)
        if not context.options.json:
            lines, state = finding_lines(finding), finding.state
            say(state, end="", style=STATE_COLOURS[state] if colour else "")
            say(lines[len(state):])
    say(json.dumps(findings_json(found), indent=1) if context.options.json
        else "\n" + verdict(found))
    return int(any(finding.state == BROKEN for finding in found))


STATE_COLOURS = {OK: "32", NOTE: "33", BROKEN: "31"}


def examined(context: Context) -> Patient:
    """The patient, with all settings that can be understood.  ProxyError for wrong
    flags, which nobody needs a doctor for."""
    options, store = context.options, context.store
    config, sources, faults = sound_settings(options, store)
    patient = Patient(config._replace(home=store.home), sources, store, context.environ)
    patient.faults, patient.probe = faults, bool(options.probe)
    return patient


def sound_settings(options: argparse.Namespace, store: Store
                   ) -> Tuple[Config, Json, List[Tuple[str, str, str]]]:
    """What can be understood of all settings, and the patient's faults for the rest.
    ProxyError where flags are wrong."""
    faults: List[Tuple[str, str, str]] = []
    environ, alone = dict(os.environ), False
    given = Given(environ, {}, File(), store.saved())
    try:
        given = given._replace(file=named_config(options))
    except ProxyError as error:
        faults.append((BROKEN, error.message, "name another file, or none"))
    while True:
        notes: List[str] = []
        try:
            config, sources = (configured(options, given) if alone else
                               all_settings(options, given, store, notes.append))
            return config, sources, [*faults, *((NOTE, words, "") for words in notes)]
        except ProxyError as error:
            words = error.message
        variable = re.match(r"environment (\w+):", words)
        if variable:
            del environ[variable[1]]
            mend = f"unset {variable[1]}, or mend it"
        elif given.saved.entries and words.startswith(tuple(store.paths.values())):
            given = given._replace(saved=given.saved._replace(entries={}))
            mend = f"`{program()} setup` asks for it anew"
        elif given.file.name and words.startswith(given.file.name):
            given, mend = given._replace(file=File()), f"mend {given.file.name}"
        elif alone:
            raise ProxyError(400, words)
        else:                               # a file in the program's own folder
            alone, mend = True, "mend it, or take the file away"
        faults.append((BROKEN, words, mend))


def run_ls(context: Context) -> int:
    """The providers that are set up, as claude-adapter's columns."""
    store = context.store
    rows = []
    for name in dict.fromkeys(filter(None, [*store.records, store.active])):
        try:
            config, _ = resolve_config({"provider": name}, {}, {}, File(),
                                       store.saved())
        except ProxyError as error:         # the others are still to be seen
            complain(error.message)
            continue
        rows.append({"provider": name, "type": "proxy" if config.api == APIS[0]
                     else "relay", "base_url": config.base_url,
                     "models": {tier: getattr(config, tier) for tier in TIERS},
                     "active": name == store.active, "path": store.paths.get(name)})
    if context.options.json:
        say(json.dumps(rows, indent=1))
        return 0
    if not store.records:
        say(f"no provider is set up; `{program()} setup` does it")
    for row in rows:
        models = ", ".join(dict.fromkeys(row["models"].values()))
        say(f"{'*' if row['active'] else ' '} {row['provider']:10}{row['type']:7}"
            f"{row['base_url']}")
        say(cut_to(f"  {'':17}{models}", 79))
    return 0


def run_use(context: Context) -> int:
    store = context.store
    name = named_provider(context, [*store.records, *KEYLESS])
    try:
        store.activate(name)
    except OSError as error:
        complain(f"cannot write {store.home}: {error.strerror}")
        return 1
    say(f"{PROVIDERS[name].label} is the active provider")
    return 0


def run_rm(context: Context) -> int:
    store = context.store
    name = named_provider(context, store.records)
    path = store.paths[name]
    if not path.startswith(os.path.join(store.home, "")):
        complain(f"{path} is another program's: delete it there")
        return 1
    if not context.options.force:
        if not at_terminal():
            raise ProxyError(400, "rm: there is no terminal to ask at; add -f")
        Terminal(context.environ).choose(f"Forget {name}, with its key?",
                                         [Choice(0, "Forget it", path)])
    try:
        store.remove(name)
    except OSError as error:
        complain(f"cannot remove {path}: {error.strerror}")
        return 1
    say(f"{name} is forgotten")
    older = Store("", store.old_home).paths.get(name)
    if older:
        say(f"but {older} is another program's, and is now used in its place")
    return 0


def named_provider(context: Context, names: Iterable[str]) -> str:
    """The provider that a command is given; ProxyError if it is none of the names."""
    found, known = " ".join(context.arguments), list(dict.fromkeys(names))
    if found not in known:
        what = f"found {found!r}{nearest(found, known)}" if found else "found nothing"
        listed = ", ".join(known) or f"nothing yet: `{program()} setup`"
        raise ProxyError(400, f"expected one of the providers that are set up "
                              f"({listed}), {what}")
    return found


def run_code(context: Context) -> int:
    path = claude_program(context.environ)
    if not path:
        complain("the claude program was not found on PATH; install it with "
                 f"`{CLAUDE_INSTALL}`")
        return 1
    if unready_here(context):
        context = set_up(context)
    arguments = context.arguments
    if context.options.model:
        arguments = ["--model", context.options.model, *arguments]
    return launch(context, [path, *arguments])


def run_program(context: Context) -> int:
    if not context.arguments or context.arguments[0].startswith("-"):
        raise ProxyError(400, "run: expected a command, as in `run -- CMD ...`")
    import shutil
    path = shutil.which(context.arguments[0], path=context.environ.get("PATH"))
    if not path:
        complain(f"run: no program {context.arguments[0]!r} on PATH")
        return 127
    return launch(context, [path, *context.arguments[1:]])


def run_install(context: Context) -> int:
    """Lead every Claude Code of this user here, until `uninstall`."""
    config = context.config
    if not config.port:
        raise ProxyError(400, "install: expected the port that `serve` will listen at")
    there = proved(config, config_url(config))
    refuse_strangers(config, there)
    url = there.url if there else config_url(config)
    mend_claude(context)
    paths = claude_paths(context.environ)
    try:
        wish = settings_wish(context, paths, url)
        edits = install_edits(paths, wish)
        if edits[0].trouble:
            raise ProxyError(400, edits[0].trouble)
    except ProxyError as error:
        raise ProxyError(400, f"{error.message}; nothing was changed. What `{program()}"
                              " env` prints may go into its \"env\" by hand") from None
    changes = [edit for edit in edits if edit.after != edit.before]
    for edit in changes:
        say("\n".join(diff_lines(edit)))
    if changes and not context.options.yes and not agreed("Write this?"):
        complain("nothing was changed")
        return 1
    install_settings(paths, wish, complain)
    say(f"Claude Code goes to {url}, where `{program()}"
        f"{hinted(context, config.port)}` has to serve")
    say(f"`{program()} uninstall` puts everything back")
    return 0


MAX_DIFF_CHARS = 79         # of a line: some files have but one
SECRET_MEMBER = re.compile(  # not ..._TOKENS
    r'("[^"]*(?:KEY|TOKEN|SECRET|PASSWORD|HEADERS)"\s*:\s*")(?:[^"\\]|\\.)+')


def diff_lines(edit: Edit) -> List[str]:
    """What an edit does, as a unified diff without secrets."""
    import difflib
    texts = [[SECRET_MEMBER.sub(r"\1***", line) for line in (text or "").splitlines()]
             for text in (edit.before, edit.after)]
    names = [edit.path if edit.before is not None else os.devnull, edit.path]
    return [line[:MAX_DIFF_CHARS] for line in difflib.unified_diff(*texts, *names,
                                                                   lineterm="")]


def run_uninstall(context: Context) -> int:
    paths = claude_paths(context.environ)
    try:
        found = uninstall_settings(paths, complain)
    except ProxyError as error:
        complain(f"not put back: {error.message}")
        return 1
    say(f"Claude Code's settings are put back: {paths.settings}" if found else
        f"nothing to undo: nimproxy has changed nothing in {paths.settings}")
    return 0


def refuse_strangers(config: Config, proxy: Optional[LocalProxy]) -> None:
    """ProxyError if a client would be led to somebody else at our port."""
    words = "" if proxy and proxy.command == "serve" else in_the_way(config)
    if words:
        raise ProxyError(400, f"{words}: nothing leads there. Start `{program()}`, and "
                              "give --port where it says that it listens")


def run_env(context: Context) -> int:
    shell = context.options.shell or "sh"
    if shell not in EXPORTS:
        raise ProxyError(400, f"--shell: expected one of {', '.join(EXPORTS)}, "
                              f"found {shell!r}{nearest(shell, EXPORTS)}")
    config = context.config
    proxy = running_proxy(config, "serve")
    refuse_strangers(config, proxy)
    config = met(config, proxy) if proxy else config
    url = config_url(config)
    added = client_environment(config, url, asks_one_model(context), context.environ)
    say("\n".join(export_lines(added, shell)))
    return 0


DEMO_ASKS = "Greet the file server."
DEMO_TOOL = {"name": "greet", "description": "Greets somebody.", "input_schema": {
    "type": "object", "properties": {"whom": {"type": "string"}}, "required": ["whom"]}}


def run_demo() -> int:
    """One tool round trip through a real server, shown on both wires."""
    config = Config(default_model=DEMO_MODEL, opus=DEMO_MODEL, sonnet=DEMO_MODEL,
                    haiku=DEMO_MODEL, port=0, text_delta_chars=0)
    turns: List[Json] = [{"role": "user", "content": DEMO_ASKS}]
    body = {"model": DEMO_MODEL, "max_tokens": 256, "stream": True,
            "tools": [DEMO_TOOL], "messages": turns}
    with Background(config) as url:
        for step in ("1. The model calls a tool", "2. The tool has answered"):
            say(f"\n{step}\n")
            message = show_round_trip(config, url, body)
            turns.append({"role": "assistant", "content": message["content"]})
            turns.append({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": block["id"],
                 "content": f"Hello, {block['input']['whom']}!"}
                for block in message["content"] if block["type"] == "tool_use"]})
    say(f"\nDone. With a key from https://build.nvidia.com:\n"
        f"  NVIDIA_API_KEY=nvapi-... {program()} code")
    return 0


def show_round_trip(config: Config, url: str, body: Json) -> Json:
    chat = chat_body(body, DEMO_MODEL)
    show_lines("client asks", [encode_json(body["messages"][-1])])
    show_lines("upstream asked", [encode_json(chat["messages"][-1])])
    show_lines("upstream says", [frame.decode().strip() for frame in demo_stream(chat)])
    events = list(streamed_events(*streamed_answer(config, url, body)))
    show_lines("client gets", [f"{name}: {encode_json(data)}" for name, data in events])
    message = fold(events)
    for block in message["content"]:
        kind = block["type"]
        words = block.get(kind) or f"{block['name']}({encode_json(block['input'])})"
        say(f"  so there is    {kind}: {words.strip()}")
    return message


def show_lines(who: str, lines: List[str]) -> None:
    """Lines of a wire, the middle ones of many left out, each within 79 columns."""
    if len(lines) > 10:
        lines = lines[:4] + [f"... {len(lines) - 9} more"] + lines[-5:]
    for line in lines:
        say(f"  {who:14} {line if len(line) <= 62 else line[:59] + '...'}")


def run_test(context: Context) -> int:
    config = context.config
    prompt = " ".join(context.arguments) or "Say hi in five words."
    if prompt == "-":
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise ProxyError(400, "test -: expected a prompt on standard input")
    body = {"model": context.options.model or config.default_model, "max_tokens": 512,
            "stream": True, "messages": [{"role": "user", "content": prompt}]}
    proxy = running_proxy(config)
    if proxy:
        return show_answer(context, met(config, proxy), body)
    check_config(config)
    with Background(config._replace(port=0), command="test") as url:
        return show_answer(context, config._replace(port=urlsplit(url).port), body)


def show_answer(context: Context, config: Config, body: Json) -> int:
    """Stream an answer to the terminal; then how fast it was, what it took, and who
    gave it."""
    began, times, events = time.monotonic(), [], []
    shade, kind = takes_colour(sys.stdout, context.environ), ""
    try:
        connection, response = streamed_answer(config, config_url(config), body)
        for name, data in streamed_events(connection, response):
            kind = (data.get("content_block") or {}).get("type", kind)
            if name == "content_block_delta":
                times.append(time.monotonic() - began)
            say(shown_event(name, data, kind, shade), end="",
                style="2" if shade and kind == "thinking" else "")
            events.append((name, data))
    except (ProxyError, OSError) as error:
        say(end="\n" if events else "")
        complain(str(error))
        complain(f"`{program()} doctor` looks for the cause")
        return 1
    message = fold(events)
    say("\n\n" + figures_line(message, times or [time.monotonic() - began]))
    say(folded(answerer(config, response.headers["request-id"], message), "  "))
    return 0


def shown_event(name: str, data: Json, kind: str, shade: bool) -> str:
    """What an event of a block of some kind adds to the terminal: thinking is dim, or
    has a title; a call stands in brackets."""
    if name == "content_block_start" and kind == "thinking":
        return "" if shade else "thinking: "
    if name == "content_block_start" and kind == "tool_use":
        return f"\n[calls {data['content_block']['name']} "
    if name == "content_block_stop":
        return {"thinking": "\n\n", "tool_use": "]"}.get(kind, "")
    delta = data.get("delta") or {}
    words = (delta.get(key) for key in ("text", "thinking", "partial_json"))
    return next(filter(None, words), "")


def answerer(config: Config, request_id: str, message: Json) -> str:
    """Which model answered a request, where, and why not the one that was asked."""
    status = proxy_json(config, config_url(config), "/status")
    row = next((row for row in status.get("last_requests", [])
                if request_id.endswith(row["id"])), {})
    why = row.get("fallback", "")
    why = why and f", instead of {row['asked']}: {why}"
    place = status.get("base_url") or upstream_place(config)
    return (f"{row.get('model') or message['model']} at {place}{why}, by way of "
            f"{config_url(config)}")


def run_models(context: Context) -> int:
    """The catalog's rows of the provider, or its own list beside them."""
    config, live = context.config, None
    if not (offered(config.provider) or config.models or context.options.live):
        raise ProxyError(400, f"there is no catalog for {config.provider}: add --live")
    try:
        if context.options.live:
            live = asyncio.run(live_list(config))
    except ProxyError as error:
        complain(str(error))
        return 1
    rows = model_rows(config, live)
    if context.options.json:
        say(json.dumps(rows, indent=1))
        return 0
    label = PROVIDERS[config.provider].label
    say(f"{label}, from the catalog; --live asks it" if live is None
        else f"{label} at {config.base_url}")
    say(f"{'model':46} window abilities, beside tools")
    bold = takes_colour(sys.stdout, context.environ)
    for row in rows:
        if not row["retired"]:
            say(model_line(row), style="1" if bold and row["tiers"] else "")
    retired = [row for row in rows if row["retired"]]
    if retired:
        say(f"\n{'retired':39}  use instead")
    for row in retired:
        say(f"{row['id']:39}  {row['instead'] or ''}".rstrip())
    return 0


async def live_list(config: Config) -> List[str]:
    spinner = asyncio.ensure_future(spin(f"asking {config.base_url}"))
    proxy = Proxy(config)
    try:
        return sorted(set(await proxy.live_models()))
    finally:
        spinner.cancel()
        await asyncio.wait({spinner})
        await proxy.close()


def run_status(context: Context) -> int:
    config, proxy = context.config, running_proxy(context.config)
    status = proxy_json(met(config, proxy), proxy.url, "/status") if proxy else {}
    if not proxy or not status:
        complain(in_the_way(config) or f"no nimproxy answers at {config_url(config)}; "
                                       f"start one with `{program()}`")
        if context.options.json:
            say(json.dumps({"running": False}))
        return 1
    if context.options.json:
        say(json.dumps(status, indent=1))
        return 0
    for line in status_lines(status, proxy.url):
        say(line)
    return 0


OPENCLAW_NOTE = """\
// For ~/.openclaw/openclaw.json; keep of the providers what you want.
// {0}: this proxy in Anthropic's words; {1}: in OpenAI's,
// unless it relays; any other: that server itself.
// Keys are taken from the environment.
"""


def run_openclaw(context: Context) -> int:
    """Print OpenClaw's configuration; with a provider's name, for that one alone."""
    tree = openclaw_config(context.config, config_url(context.config))
    providers = tree["models"]["providers"]
    for name in context.arguments[:1]:
        if name not in providers:
            raise ProxyError(400, f"openclaw: expected one of {', '.join(providers)}, "
                                  f"found {name!r}{nearest(name, providers)}")
        first = providers[name]["models"][0]["id"]
        tree["agents"]["defaults"]["model"]["primary"] = f"{name}/{first}"
        tree["models"]["providers"] = {name: providers[name]}
    if context.options.json:
        say(json.dumps(tree, indent=1))
        return 0
    say(OPENCLAW_NOTE.format(*OPENCLAW) * (not context.arguments) + json5_text(tree))
    return 0


def run_usage(context: Context) -> int:
    """Tokens per day and model, from the usage log."""
    days = convert("days", context.options.days or USAGE_DAYS, "--days")
    oldest = time.strftime("%Y-%m-%d", time.localtime(
        time.time() - 86400 * (days - 1)))
    usage: Usage = {}
    unread = 0
    store = context.store
    for date, path in sorted(usage_files(store.home, store.old_home).items()):
        if date >= oldest:
            usage[date], count = read_usage(path)
            unread += count
    usage = {date: models for date, models in usage.items() if models}
    if context.options.json:
        say(json.dumps(usage_json(usage, unread), indent=1))
        return 0
    if not usage:
        say(f"no tokens logged in {days} day{'s' * (days > 1)}, in "
            f"{os.path.join(store.home or '(no home)', USAGE_LOG)}")
    else:
        columns = min(terminal_width(), COLUMNS)
        say("\n".join(usage_lines(usage, columns, bar_mark())))
    if unread:
        say(f"{unread} line{'s' * (unread > 1)} could not be read")
    return 0


def run_forget(context: Context) -> int:
    """Drop what was learned of a model, or of all, in the proxies that run as well."""
    learned, model = Learned(context.config.home), " ".join(context.arguments)
    model = model and upstream_model(context.config, model)
    learned.forget(context.config.base_url, model)
    if not learned.path:
        complain("cannot write learned.json: `doctor` says why")
        return 1
    say(f"forgotten: what was learned of {model or 'all models'}")
    return 0


def run_version() -> int:
    place = globals().get("__file__", "<stdin>")
    say(f"nimproxy {__version__}, Python {sys.version.split()[0]}, {place}")
    return 0


# ---- 40. Command line --------------------------------------------------------
# Words and options as rows, and which function they call; errors become exit codes.

class Command(NamedTuple):
    run: str                # the function's name
    help: str


COMMANDS = {
    "serve": Command("run_serve", "serve in the foreground (also: proxy, or nothing)"),
    "code": Command("run_code", "launch Claude Code on its own proxy: code [ARGS]"),
    "run": Command("run_program", "the same for any program: run -- CMD ..."),
    "setup": Command("run_setup", "choose and set up a provider (also: init, or -r)"),
    "ls": Command("run_ls", "the providers that are set up"),
    "use": Command("run_use", "make one of them the active one: use NAME"),
    "rm": Command("run_rm", "forget one of them: rm NAME [-f]"),
    "env": Command("run_env", "the client's environment as exports"),
    "demo": Command("run_demo", "the main job shown, with neither key nor network"),
    "test": Command("run_test", "one request, streamed to the terminal: test [PROMPT]"),
    "doctor": Command("run_doctor", "what is wrong, and what mends it"),
    "models": Command("run_models", "what the provider offers (--live: ask it)"),
    "status": Command("run_status", "is a proxy up here, for which upstream"),
    "usage": Command("run_usage", "tokens per day and model, as they were logged"),
    "openclaw": Command("run_openclaw", "OpenClaw's configuration for this proxy"),
    "install": Command("run_install", "lead every Claude Code here, in its settings"),
    "uninstall": Command("run_uninstall", "put Claude Code's settings back"),
    "forget": Command("run_forget", "drop what refusals have taught: forget [MODEL]"),
    "version": Command("run_version", "version, Python, file"),
}
OTHER_NAMES = {"proxy": "serve", "init": "setup"}
SHORT = {"-p": "--port", "-f": "--force", "-r": "--reconfigure", "-y": "--yes"}

OPTIONS = {                 # name: (what it takes, or "" for a switch; help)
    "--config": ("FILE", "YAML, JSON5 or OpenClaw's (default: ./config.yaml)"),
    "--provider": ("NAME", "who answers: nvidia, ollama, kimi, custom and others"),
    "--model": ("ID", "the one model to use"),
    "--base-url": ("URL", "a Chat Completions server, such as http://host:8000/v1"),
    "--host": ("HOST", "address to listen at (default 127.0.0.1)"),
    "--port": ("PORT", "port to listen at (default 8787; with code only --port)"),
    "--log-level": ("LEVEL", ", ".join(LEVELS)),
    "--log-json": ("", "log lines as JSON objects"),
    "--demo": ("", "use the built-in upstream"),
    "--show-config": ("", "print each setting with its source, and exit"),
    "--live": ("", "models: ask the provider"),
    "--json": ("", "lists and reports as JSON"),
    "--probe": ("", "doctor: one small request to each model"),
    "--days": ("N", "usage: of so many days (default 7, at most 30)"),
    "--shell": ("SHELL", "env: sh, fish or powershell"),
    "--reconfigure": ("", "set the active provider up anew, then serve"),
    "--force": ("", "rm: without a question"),
    "--yes": ("", "install: without a question"),
    "--no-claude-settings": ("", "leave Claude Code's own settings as they are"),
}
CHILD_COMMANDS = ("code", "run")
PLAIN_COMMANDS = ("demo", "version")    # of no concern to any setting
STORE_COMMANDS = ("setup", "ls", "use", "rm", "doctor")     # which mend or tell what
                                                            # would stop others


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command line; the exit code is 0 done, 1 failed, 2 usage or settings."""
    if sys.version_info < (3, 8):
        print("nimproxy needs Python 3.8 or newer", file=sys.stderr)
        return 2
    try:
        own, rest = split_arguments(list(sys.argv[1:] if argv is None else argv))
        options = argument_parser().parse_intermixed_args(own)
        command = options.command = known_command(options.command)
        if command in PLAIN_COMMANDS:
            return globals()[COMMANDS[command].run]()
        if options.reconfigure and command == "serve":
            command = "setup"
        arguments, store = rest or options.arguments, Store(*home_folders(os.environ))
        if command != "doctor":             # which changes nothing, and tells itself
            store.keep_private()
            for path, words in store.troubles:
                complain(f"{path}: {words}")
        if command in STORE_COMMANDS:
            context = Context(options, Config(), {}, arguments, dict(os.environ), store)
            return globals()[COMMANDS[command].run](context)
        context = make_context(options, arguments, store)
        if options.show_config:
            return show_config(context)
        start_log(context, quiet=command != "serve")
        return globals()[COMMANDS[command].run](context)
    except ProxyError as error:
        complain(error.message)
        return 2
    except BrokenPipeError:     # `nimproxy models | head`
        sys.stdout = None
        return 1
    except (KeyboardInterrupt, Leave):
        return 130


def split_arguments(argv: List[str]) -> Tuple[List[str], List[str]]:
    """Our arguments and, for `code` and `run`, the child's, in their order.

    Only our own long options are taken out: `-p` is Claude Code's, not a port.
    """
    own: List[str] = []
    rest: List[str] = []
    command = ""
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        name = word.partition("=")[0]
        for_child = command in CHILD_COMMANDS
        if for_child and word == "--":
            rest += waiting
            break
        if for_child and name not in OPTIONS:
            rest.append(word)
        elif not command and not word.startswith("-"):
            command = word
            own.insert(0, word)
        else:
            own.append(word)
            takes = OPTIONS.get(SHORT.get(name, name), ("", ""))[0]
            if takes and name == word and waiting:
                own.append(waiting.pop(0))
    return own, rest


def argument_parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").split("\n")[0]
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {row.help}" for name, row in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog=program(), description=summary, allow_abbrev=False,
        usage=f"{program()} [COMMAND] [OPTIONS]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, width=COLUMNS, max_help_position=24),
        epilog="commands:\n" + "\n".join(rows))
    parser.add_argument("command", nargs="?", default="serve", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    for name, (takes, text) in OPTIONS.items():
        names = [*(short for short, long in SHORT.items() if long == name), name]
        if takes:
            parser.add_argument(*names, metavar=takes, help=text)
        else:
            parser.add_argument(*names, action="store_true", default=None,
                                help=text or argparse.SUPPRESS)
    return parser


def known_command(word: str) -> str:
    name = OTHER_NAMES.get(word, word)
    if name not in COMMANDS:
        raise ProxyError(400, f"no command {word!r}{nearest(word, COMMANDS)} "
                              f"({', '.join(COMMANDS)})")
    return name


def show_config(context: Context) -> int:
    for name, value in context.config.shown().items():
        source = context.sources.get(name, "default")
        say(f"{name:20} {str(value):40} {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
