#!/usr/bin/env python3
"""Tests for nimproxy, in the order of its parts.

    make test           all of them but e2e and bench; no network, under a minute
    make e2e            the real Claude Code and both SDKs, through the proxy
    make bench          the figures of the README

A fake upstream on a real socket says what a test tells it to; the proxy runs on a
thread of its own; clients are the standard library's or the real ones.
"""
import ast
import asyncio
import base64
import contextlib
import gc
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
                nim.answer(self, json.loads(self.rfile.read(length)))
        return Handler

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
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
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


# ---- The proxy under test ----------------------------------------------------

class Client:
    """Asks a running proxy, with the standard library's HTTP client."""

    def __init__(self, url):
        self.url = url
        self.address = (url.rpartition(":")[0].partition("//")[2], int(url.split(":")[-1]))

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

    def raw(self, *pieces):
        """Bytes over a socket of one's own; everything that comes back."""
        with socket.create_connection(self.address, 10) as sock:
            with contextlib.suppress(OSError):
                for piece in pieces:
                    sock.sendall(piece)
            return received(sock)


def received(sock):
    data = b""
    with contextlib.suppress(OSError):
        while True:
            piece = sock.recv(65536)
            if not piece:
                break
            data += piece
    return data


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
    base = {"base_url": url, "api_key": "nvapi-test", "port": 0, "default_model": "m"}
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


# ---- 0. The file itself ------------------------------------------------------
# The map in the docstring is true, and each part uses only what it may.

SOURCE = Path(np.__file__).read_text(encoding="utf-8")
BANNERS = [(SOURCE.count("\n", 0, found.start()) + 1, int(found[1]), found[2])
           for found in re.finditer(r"^# ---- (\d+)\. (.+?) -+$", SOURCE, re.M)]

PURE = 11           # parts 1 to 11 do no I/O and read no clock
USES = {            # part: the other parts it may use
    1: [], 2: [], 3: [2], 4: [2, 3], 5: [1, 2, 3], 6: [5], 7: [1, 2, 3, 4],
    8: [1, 2, 4, 7], 9: [1, 2, 7, 8], 10: [1, 2], 11: [2, 3, 8], 12: [1, 2, 4, 10],
    13: range(1, 13), 14: [1, 2, 4, 10, 12, 13], 15: [3, 4], 16: range(1, 16),
}
KEPT = {            # names that only some parts may use
    "asyncio": range(12, 17), "time": range(12, 17), "socket": [12], "open": [15, 16],
    "secrets": [13, 16], "subprocess": [15], "os": [12, 15, 16], "sys": [16],
    "print": [16], "input": [16], "threading": [14], "logging": [13, 16],
}


def part_of(line):
    return max((number for start, number, _ in BANNERS if start <= line), default=0)


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
            allowed = home.get(leaf.id, 0) in [0, here, *USES[here]]
            if not allowed or here not in KEPT.get(leaf.id, [here]):
                breaches.append((leaf.lineno, here, leaf.id))
    assert not breaches


def test_pure_parts_are_those_that_may_not_wait():
    assert min(min(parts) for name, parts in KEPT.items() if name in (
        "asyncio", "time", "socket", "open")) == PURE + 1


def test_it_is_one_file_of_the_standard_library():
    modules = {name.split(".")[0] for node in ast.walk(ast.parse(SOURCE))
               for name in ([alias.name for alias in node.names]
                            if isinstance(node, ast.Import) else
                            [node.module] if isinstance(node, ast.ImportFrom) else [])}
    known = getattr(sys, "stdlib_module_names", modules)
    assert modules <= set(known)


def test_functions_are_short_and_lines_narrow():
    assert max(map(len, SOURCE.splitlines())) <= 88
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
    ("dynamo, flat", b'{"message":"no x","type":"Bad Request","code":422}', "no x", 422),
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
     "login fail", 500),
    ("plain text", b"404 page not found", "404 page not found", 500),
    ("HTML", b"<html><h1>Bad  Gateway</h1></html>", "Bad Gateway", 500),
    ("nothing", b"", "(empty body)", 500),
    ("not UTF-8", b"\xff\xfe", "\ufffd\ufffd", 500),
    ("a list", b'["x"]', '["x"]', 500),
]


@pytest.mark.parametrize("raw, words, status", [row[1:] for row in ERROR_BODIES],
                         ids=[row[0] for row in ERROR_BODIES])
def test_error_words(raw, words, status):
    assert np.error_words(raw, 500) == (words, status)


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]"])
def test_json_without_nan(text):
    with pytest.raises(ValueError):
        np.decode_json(text)


# ---- 3. Models and providers -------------------------------------------------

def test_catalog_rows_make_sense():
    assert len(np.MODELS) > 70
    for name, row in np.MODELS.items():
        assert 4096 <= row.output <= row.window <= 1 << 21, name


def test_successors_are_alive():
    for retired, successor in np.SUCCESSORS.items():
        assert not np.MODELS[successor].retired, retired


def test_tier_defaults_are_alive():
    row = np.PROVIDERS["nvidia"]
    for name in (row.opus, row.sonnet, row.haiku):
        assert name in np.MODELS and not np.MODELS[name].retired


SEEDS = ["nvidia/llama-3.3-nemotron-super-49b-v1.5", "meta/llama-3.3-70b-instruct",
         "nvidia/llama-3.1-nemotron-ultra-253b-v1", "nvidia/nvidia-nemotron-nano-9b-v2",
         "qwen/qwen3-235b-a22b", "meta/llama-4-maverick-17b-128e-instruct",
         "deepseek-ai/deepseek-r1", "minimaxai/minimax-m2.1",
         "mistralai/mistral-large-2-instruct", "meta/llama-3.1-405b-instruct"]


def test_models_of_the_seeds_are_known():
    assert set(SEEDS) <= set(np.MODELS)


EFFORT_ROWS = [("low", "low", "low"), ("medium", "medium", "high"),
               ("high", "high", "high"), ("xhigh", "high", "max"), ("max", "high", "max")]


@pytest.mark.parametrize("asked, three, low_high_max", EFFORT_ROWS)
def test_effort_words(asked, three, low_high_max):
    assert np.effort_word(asked, np.THREE) == three
    assert np.effort_word(asked, np.LOW_HIGH_MAX) == low_high_max


# ---- 4. Configuration --------------------------------------------------------

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


PORTS = [
    ("default", {}, 8787),
    ("file", {"file": "server:\n  port: 1\n"}, 1),
    (".env over file", {"file": "server:\n  port: 1", "dotenv": {"PROXY_PORT": "2"}}, 2),
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
    ("misspelt key", "server:\n  prot: 1\n", "config.yaml:2: expected a known key, "
     "found 'server.prot'; did you mean 'server.port'?"),
    ("wrong type", "server:\n  port: many\n", "config.yaml:2: server.port: expected a "
     "port from 0 to 65535, found 'many'"),
    ("out of range", "server:\n  port: 70000\n", "found 70000"),
    ("tab", "server:\n\tport: 1\n", "config.yaml:2:2: expected 'key: value'"),
    ("block list", "- a\n", "config.yaml:1:1: expected 'key: value'"),
    ("block scalar", "log: |\n", "config.yaml:1:1: expected a scalar"),
    ("flow map", "server: {port: 1}\n", "config.yaml:1:1: expected a scalar"),
    ("anchor", "server: &x\n", "config.yaml:1:1: expected a scalar"),
    ("two colons", "provider: a: b\n", "config.yaml:1:1: expected a scalar"),
    ("deeper than a scalar", "provider: nvidia\n  port: 1\n", "config.yaml:2:3: "),
    ("between two levels", "server:\n    port: 1\n  host: x\n", "config.yaml:3:3: "),
    ("twice", "provider: nvidia\nprovider: nvidia\n", "config.yaml:2:1: expected each "),
    ("a section that is a value", "server: 5\n", "expected a known key, found a number"),
    ("unset variable", "provider: ${NOPE}\n", "config.yaml:1: ${NOPE} is not set"),
    ("bad JSON", '{"server": }', "config.yaml: not JSON"),
    ("JSON, wrong type", '{"server":\n {"port": "x"}}', "config.yaml:2: server.port"),
    ("unknown provider", "provider: nvida\n", "did you mean 'nvidia'?"),
    ("list for text", "models:\n  opus: [a, b]\n", "expected text, found ['a', 'b']"),
    ("bad escape", 'provider: "\\q"\n', "expected escapes as in JSON"),
    ("boolean for seconds", "streaming:\n  eager_after: true\n", "expected seconds"),
]


@pytest.mark.parametrize("file, message", [row[1:] for row in BAD_CONFIGS],
                         ids=[row[0] for row in BAD_CONFIGS])
def test_bad_configuration_is_named(file, message):
    with pytest.raises(np.ProxyError) as caught:
        resolved(file)
    assert message in caught.value.message


BAD_FLAGS = [({"base_url": "ftp://x"}, "--base-url: expected a base URL"),
             ({"base_url": "http://u:p@x"}, "--base-url"),
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
               ("5.5", 5.5), ("true", True), ("~", None), ("a#b", "a#b"), ("a # b", "a"),
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


BASE_URLS = [("http://h:1", "http://h:1/v1"), ("http://h/v1/", "http://h/v1"),
             ("https://h/api/paas/v4", "https://h/api/paas/v4"),
             ("http://h/v1/chat/completions", "http://h/v1")]


@pytest.mark.parametrize("given, clean", BASE_URLS)
def test_base_urls(given, clean):
    assert resolved(base_url=given)[0].base_url == clean


TIERS = dict(opus="o/o", sonnet="s/s", haiku="h/h", default_model="d/d",
             model_aliases={"mine": "a/a", "gpt-4": "a/b"})
MODEL_NAMES = [
    ("mine", "a/a"), ("anthropic/mine", "a/a"), ("claude-opus-4-8", "o/o"),
    ("claude-opus-4-8[1m]", "o/o"), ("claude-haiku-4-5-20251001", "h/h"),
    ("claude-3-5-sonnet-20241022", "s/s"), ("claude-fable-5", "d/d"), ("opus", "o/o"),
    ("anthropic/claude-sonnet-5", "s/s"), ("anthropic/z-ai/glm-5.3", "z-ai/glm-5.3"),
    ("nvidia/meta/llama-3.3-70b-instruct", "meta/llama-3.3-70b-instruct"),
    ("nvidia/nvidia/nemotron-3-super-120b-a12b", "nvidia/nemotron-3-super-120b-a12b"),
    ("nvidia/nemotron-3-super-120b-a12b", "nvidia/nemotron-3-super-120b-a12b"),
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
    assert config.base_url == "https://api.deepseek.com/v1"


def test_a_missing_key_says_where_to_get_one():
    message = np.missing_key(resolved()[0])
    assert "https://build.nvidia.com" in message and "NVIDIA_API_KEY" in message
    assert not np.missing_key(resolved(base_url="http://localhost:8000/v1")[0])


def test_proxies_from_the_environment():
    environ = {"HTTPS_PROXY": "http://u:1", "https_proxy": "http://l:1",
               "HTTP_PROXY": "http://c:1", "no_proxy": "a,b"}
    config = resolved(environ=environ)[0]
    assert (config.https_proxy, config.http_proxy) == ("http://l:1", "http://c:1")
    config = resolved(environ={**environ, "REQUEST_METHOD": "GET"})[0]
    assert config.http_proxy == ""      # a CGI's header, not a setting


# ---- 5. Requests: body to chat -----------------------------------------------

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


PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": "iVBO"}}
PIXEL_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}
LS = {"role": "assistant", "content": "", "tool_calls": [chat_call()]}
LS_RESULT = {"role": "tool", "tool_call_id": "t1", "content": "a b"}
TURNS = [   # (case, messages, what upstream is asked)
    ("string", [{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}]),
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
    ("call at the end", [assistant(call())], [LS, {**LS_RESULT, "content": np.NO_RESULT}]),
    ("orphaned result", [user(result("gone", "x"), said("go"))],
     [{"role": "user", "content": "[result of an earlier call]\nx\ngo"}]),
    ("result twice", [assistant(call()), user(result(), result("t1", "other"))],
     [LS, LS_RESULT, {"role": "user", "content": "[result of an earlier call]\nother"}]),
    ("failed result", [assistant(call()), user(result(is_error=True))],
     [LS, {**LS_RESULT, "content": "Error: a b"}]),
    ("ids used again", [assistant(call()), user(result()), assistant(call()),
                        user(result())],
     [LS, LS_RESULT, {**LS, "tool_calls": [chat_call("t1_2")]},
      {**LS_RESULT, "tool_call_id": "t1_2"}]),
    ("image", [user(said("see"), PIXEL)],
     [{"role": "user", "content": [{"type": "text", "text": "see"}, PIXEL_PART]}]),
    ("image by URL", [user({"type": "image", "source": {"type": "url", "url": "http://x"}})],
     [{"role": "user", "content": [{"type": "image_url",
                                    "image_url": {"url": "http://x"}}]}]),
    ("image in a result", [assistant(call()), user(result(content=[PIXEL, said("ok")]))],
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
     [{"role": "assistant", "content": "(no content)"}, {"role": "user", "content": "c"}]),
    ("redacted thinking", [assistant({"type": "redacted_thinking", "data": "x"}, said("b")),
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
     [{"role": "user", "content": "[document left out: application/pdf, 3 bytes; only "
                                  "its name can be passed on]"}]),
    ("server tool", [assistant({"type": "server_tool_use", "id": "s", "name": "web_search",
                                "input": {"query": "q"}},
                               {"type": "web_search_tool_result", "content": [
                                   {"title": "T", "url": "u", "encrypted_content": "zz"}]}),
                     user(said("c"))],
     [{"role": "assistant", "content": "[server_tool_use: web_search q]\n"
                                       "[web_search_tool_result: T u]"},
      {"role": "user", "content": "c"}]),
    ("unknown block", [user({"type": "hologram", "title": "T", "data": "base64"})],
     [{"role": "user", "content": "[hologram: T]"}]),
    ("no content", [user(), user(said("a"))], [{"role": "user", "content": "a"}]),
]


@pytest.mark.parametrize("messages, wanted", [row[1:] for row in TURNS],
                         ids=[row[0] for row in TURNS])
def test_turns(messages, wanted):
    assert chat_of(*messages)["messages"] == wanted


def test_system_is_one_string_without_the_billing_header():
    system = [said("x-anthropic-billing-header: cc_version=2"), said("You are"), said("")]
    assert chat_of(user(said("a")), system=system)["messages"][0] == {
        "role": "system", "content": "You are"}
    assert chat_of(user(said("a")), system="S")["messages"][0]["content"] == "S"


GREP = {"name": "Grep", "description": "d" * 5000, "input_schema": {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
    "properties": {"x": {"type": ["string", "null"]}}, "additionalProperties": False}}
CHOICES = [
    (None, "auto"), ({"type": "auto"}, "auto"), ({"type": "any"}, "required"),
    ({"type": "none"}, "none"), ({"type": "new"}, "auto"),
    ({"type": "tool", "name": "Grep"}, {"type": "function", "function": {"name": "Grep"}}),
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
    parameters = np.chat_tool({"name": "x", "input_schema": {}})["function"]["parameters"]
    assert parameters == {"type": "object", "properties": {}}


def test_server_tools_are_dropped_and_deferred_ones_kept():
    tools = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
             {"type": "bash_20250124", "name": "bash"}, {"type": "new_thing", "name": "n"}]
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


def test_long_names_are_shortened_and_found_again():
    tools = [{"name": LONG, "input_schema": {}}, {"name": LONG + "y", "input_schema": {}},
             {"name": "a.b c", "input_schema": {}}, {"name": "9x", "input_schema": {}}]
    names = np.tool_names({"tools": tools})
    assert list(names.values()) == [tool["name"] for tool in tools]
    assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_-]{0,63}", name) for name in names)
    chat = chat_of(assistant(call(name=LONG)), user(result()), tools=tools)
    called = chat["messages"][0]["tool_calls"][0]["function"]["name"]
    assert names[called] == LONG


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
    ("safe output", "nvidia/nemotron-3-super-120b-a12b", 64000, 0, 32768),
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
    ("nvidia/nemotron-3-super-120b-a12b", ON, HIGH, "nvidia",
     template(enable_thinking=True)),
    ("nvidia/nemotron-3-super-120b-a12b", None, HIGH, "nvidia",
     template(enable_thinking=False)),
    ("nvidia/nemotron-3-super-120b-a12b", OFF, None, "nvidia",
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
    ("MiniMax-M3", ON, None, "minimax", {"thinking": {"type": "adaptive"}}),
    ("meta/llama-3.3-70b-instruct", ON, HIGH, "nvidia", {}),
    ("gpt-4o", ON, HIGH, "custom", {}),
]


@pytest.mark.parametrize("model, thinking, output, provider, fields", SWITCHES)
def test_thinking_switches(model, thinking, output, provider, fields):
    body = {"messages": [user(said("a"))], "thinking": thinking, "output_config": output}
    chat = np.chat_body(body, model, np.PROVIDERS[provider])
    extra = set(chat) - {"model", "messages", "max_tokens"}
    assert {name: chat[name] for name in extra} == fields


def test_thinking_by_system_directive():
    chat = chat_of(user(said("a")), system="S", thinking=ON,
                   model="nvidia/llama-3.3-nemotron-super-49b-v1.5")
    assert chat["messages"][0]["content"] == "S\n\n/think"
    chat = chat_of(user(said("a")), model="nvidia/llama-3.1-nemotron-ultra-253b-v1")
    assert chat["messages"][0]["content"] == "detailed thinking off"


def test_a_forced_tool_turns_thinking_off():
    chat = chat_of(user(said("a")), thinking=ON, tools=[GREP], tool_choice={"type": "any"},
                   model="moonshotai/kimi-k2.6")
    assert chat["chat_template_kwargs"] == {"thinking": False}


THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "nimproxy"}
REPLAYS = [
    ("deepseek-ai/deepseek-v4.1-flash", {"content": "", "reasoning_content": "hm"}),
    ("minimaxai/minimax-m3.1-flash", {"content": "<think>\nhm\n</think>\n\n"}),
    ("z-ai/glm-5.3", {"content": ""}),
]


@pytest.mark.parametrize("model, fields", REPLAYS)
def test_thinking_is_replayed_to_those_that_need_it(model, fields):
    chat = chat_of(assistant(THOUGHT, call()), user(result()), model=model)
    assert chat["messages"][0] == {**LS, **fields}


def test_a_call_without_thinking_is_replayed_with_none():
    chat = chat_of(assistant(call()), user(result()), model="moonshotai/kimi-k2.6")
    assert chat["messages"][0]["reasoning_content"] == ""


BAD_BODIES = [
    ("no messages", {"messages": None}, "messages: expected a list of messages"),
    ("messages is text", {"messages": "hi"}, "messages: expected a list"),
    ("a message is text", {"messages": ["hi"]}, "messages[0]: expected an object"),
    ("a role is a number", {"messages": [{"role": 1, "content": ""}]}, "messages[0].role"),
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
    ("an image without source", {"messages": [user({"type": "image"})]}, "image.source"),
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


# ---- 6. Token estimate -------------------------------------------------------

CHINESE = """
\u4eca\u5929\u65e9\u4e0a\u6211\u4eec\u5728\u5317\u4eac\u5f00\u4e86\u4e00\u4e2a\u4f1a\u3002
"""


def test_an_empty_conversation_has_a_token():
    assert np.count_tokens({"messages": []}) == 1
    assert np.estimate_tokens("") == 0


def test_base64_does_not_count_as_text():
    image = {"type": "image", "source": {"type": "base64", "data": "A" * 1000000}}
    pdf = {"type": "document", "source": {"type": "base64", "data": "A" * 1000000}}
    assert np.count_tokens({"messages": [user(image, pdf)]}) < 2000


def test_every_part_of_a_request_counts():
    parts = [{"system": "word " * 100}, {"tools": [GREP]}, {"messages": [
        assistant(call(arguments={"x": "word " * 100})), user(result(content="word " * 99))]}]
    for part in parts:
        assert np.count_tokens({"messages": [], **part}) > 90


def test_counting_fifteen_contexts_takes_50_ms():
    body = {"messages": [user(said("def f(x): return x + 1\n" * 4000))], "tools": [GREP]}
    began = time.process_time()
    for _ in range(15):
        np.count_tokens(body)
    assert time.process_time() - began < 0.05


# ---- 7. Refusals: upstream's errors to ours ----------------------------------

ASKED = np.Asked(np.Config(api_key="nvapi-secret"), "meta/llama-9", 1000)
REFUSED = [     # (case, upstream's status, words, our status, type, in the message)
    ("400", 400, "bad x", 400, "invalid_request_error", "NVIDIA NIM answered 400: bad x"),
    ("422", 422, "bad x", 400, "invalid_request_error", "bad x"),
    ("401", 401, "Authentication failed", 401, "authentication_error", "NVIDIA_API_KEY"),
    ("402", 402, "pay", 402, "billing_error", "balance"),
    ("403", 403, "Authorization failed", 403, "authentication_error", "NVIDIA_API_KEY"),
    ("404", 404, "404 page not found", 404, "not_found_error", "nearest known: meta/"),
    ("gated", 404, "Function 'x': Not found for account 'y'", 404, "not_found_error",
     "not open to this account"),
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
    ("overloaded in words", 500, "engine_overloaded_error", 529, "overloaded_error", ""),
    ("no tool parser", 400, '"auto" tool choice requires --enable-auto-tool-choice', 400,
     "invalid_request_error", "choose another model"),
    ("redirect", 302, "a redirect to evil", 502, "api_error", "a redirect to evil"),
]


@pytest.mark.parametrize("status, words, ours, kind, message", [r[1:] for r in REFUSED],
                         ids=[row[0] for row in REFUSED])
def test_refusals(status, words, ours, kind, message):
    error = np.refusal(ASKED, status, words)
    assert (error.status, error.kind) == (ours, kind)
    assert message in error.message and words.rstrip(".")[:20] in error.message


def test_retired_models_are_answered_with_their_successor():
    asked = np.Asked(np.Config(), "meta/llama-3.3-70b-instruct")
    message = np.refusal(asked, 410, "gone").message
    assert "use nvidia/nemotron-3-super-120b-a12b instead" in message


def test_no_secret_and_no_word_for_not_logged_in():
    error = np.refusal(ASKED, 401, "bad X-Api-Key nvapi-secret")
    assert "nvapi-secret" not in error.message
    assert "x-api-key" not in error.message.lower()
    assert ("x-should-retry", "false") in error.headers


RETRY_AFTER = [("", "2"), ("7", "7"), ("0", "1"), ("3600", "60"), ("-5", "2"),
               ("nan", "2"), ("1.5", "2"), ("9" * 40, "2"), ("Wed, 21 Oct 2026", "2")]


@pytest.mark.parametrize("stated, sent", RETRY_AFTER)
def test_retry_after(stated, sent):
    assert ("retry-after", sent) in np.refusal(ASKED, 429, "x", stated).headers


TOO_LONG = [    # upstream's words, what Claude Code reads
    ("This model's maximum context length is 131072 tokens. However, your prompt contains "
     "at least 140001 input tokens, which exceeds this limit", "140001 > 131072"),
    ("This model's maximum context length is 196608 tokens. However, your messages resulted "
     "in 199906 tokens. Please reduce the length", "199906 > 196608"),
    ("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens "
     "(4000 in the messages, 1000 in the completion).", "4000 + 1000 > 4096"),
    ("This model's maximum context length is 4096 tokens. However, you requested 900 output "
     "tokens and your prompt contains at least 3900 input tokens, for a total of at least",
     "3900 + 900 > 4096"),
    ("'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum "
     "context length is 4096 tokens and your request has 4000 input tokens",
     "4000 + 5000 > 4096"),
    ("You passed 5000 input tokens and requested 100 output tokens. However, the model's "
     "context length is only 4096 tokens, resulting", "5000 > 4096"),
    ("This model's maximum context length is 8000 tokens. However, your prompt contains "
     "600000 characters (more than 32000 characters", "8001 > 8000"),
    ("max_tokens must be at least 1, got -736. (parameter=max_tokens, value=-736)",
     "131808 > 131072"),
    ("The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
     "5000 > 4096"),
    ("Input length (5000) exceeds model's maximum context length (4096).", "5000 > 4096"),
    ("Input length 877338 exceeds the maximum allowed input length of 639968 tokens",
     "877338 > 639968"),
    ("Input length (5000 tokens) exceeds the maximum allowed length (4096 tokens). Use",
     "5000 > 4096"),
    ("The input (5000 tokens) is longer than the model's context length (4096 tokens).",
     "5000 > 4096"),
    ("Requested token count exceeds the model's maximum context length of 4096 tokens. You "
     "requested a total of 5000 tokens: 4000 tokens from the input messages and 1000 tokens "
     "for the completion.", "4000 + 1000 > 4096"),
    ("request (13392 tokens) exceeds the available context size (8192 tokens), try",
     "13392 > 8192"),
    ("Trying to keep the first 5000 tokens when context the overflows. However, the model is "
     "loaded with context length of only 4096 tokens", "5000 > 4096"),
    ("prompt too long; exceeded max context length by 28 tokens", "131100 > 131072"),
    ("Invalid request: Your request exceeded model token limit: 262144 (requested: 270000)",
     "270000 > 262144"),
    ("Prompt contains 5000 tokens and 0 draft tokens, too large for model with 4096 maximum "
     "context length", "5000 > 4096"),
    ("This model's maximum prompt length is 4096 but the request contains 5000 tokens.",
     "5000 > 4096"),
    ("Range of input length should be [1, 129024]", "129025 > 129024"),
    ("invalid params, context window exceeds limit (2013)", "131073 > 131072"),
    ("Prompt exceeds max length (1261)", "131073 > 131072"),
    ("Context size has been exceeded.", "131073 > 131072"),
    ("the input length exceeds the context length", "131073 > 131072"),
    ("tokens to keep from the initial prompt is greater than the context length", ""),
    ("context_length_exceeded", ""),
]


@pytest.mark.parametrize("words, figures", TOO_LONG)
def test_overflows_are_said_in_anthropics_words(words, figures):
    for status in (400, 413, 422, 500):
        error = np.refusal(ASKED, status, words)
        assert (error.status, error.kind) == (400, "invalid_request_error")
        if "+" in figures:
            assert error.message.endswith("exceed context limit: " + figures)
        else:
            found = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum",
                                 error.message)
            assert int(found[1]) > int(found[2])
            assert figures in ("", f"{found[1]} > {found[2]}")


# ---- 8. Streams: chunks to events --------------------------------------------

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
                    tool_calls=None), says(content="ok"), END], [said("ok")], "end_turn"),
    ("Mistral's lists", [says(content=[{"type": "thinking", "thinking": [
        {"type": "text", "text": "hm"}]}, {"type": "text", "text": "ok"}]), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("think tags", [says(content="<think>hm</think>\n\nok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("think tags in pieces", [says(content=c) for c in "\n<think>hm</think>\n\nok"] + [END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("other tags", [says(content="[THINK]hm[/THINK]ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
    ("two passages", [says(content="<think>a</think><think>b</think>ok"), END],
     [thinking("ab"), said("ok")], "end_turn"),
    ("an opener without end", [says(content="<think>hm"), END],
     [thinking("hm"), said("hm")], "end_turn"),
    ("a closer without opener", [says(content="hm</think>ok"), END],
     [thinking("hm"), said("ok")], "end_turn"),
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
    ("interleaved", [piece(0, "c", "ls"), piece(1, "d", "cat"), piece(0, arguments='{"p":'),
                     piece(1, arguments='{"p":'), piece(1, arguments='"b"}'),
                     piece(0, arguments='"a"}'), CALLED], [A, B], "tool_use"),
    ("arguments before the name", [piece(0, arguments='{"p":'), piece(0, "c", "ls", '"a"}'),
                                   CALLED], [A], "tool_use"),
    ("no ids", [piece(0, None, "ls", '{"p":"a"}'), piece(1, None, "cat", '{"p":"b"}'),
                CALLED], [A, B], "tool_use"),
    ("empty ids", [piece(0, "", "ls", '{"p":'), piece(0, "", arguments='"a"}'), CALLED],
     [A], "tool_use"),
    ("id on every piece", [piece(0, "c", "ls", '{"p":'), piece(0, "c", arguments='"a"}'),
                           CALLED], [A], "tool_use"),
    ("index always 0", [piece(0, "c", "ls", '{"p":"a"}'), piece(0, "d", "cat", '{"p":"b"}'),
                        CALLED], [A, B], "tool_use"),
    ("the same id twice", [piece(0, "c", "ls", '{"p":"a"}'), piece(1, "c", "cat",
                                                                 '{"p":"b"}'), CALLED],
     [A, B], "tool_use"),
    ("index as text", [piece("0", "c", "ls", '{"p":'), piece("0", arguments='"a"}'), CALLED],
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
    ("empty arguments", [piece(0, "c", "ls", ""), CALLED], [used_tool("ls")], "tool_use"),
    ("all of it again at the end", [piece(0, "c", "ls", '{"p":"a"}'),
                                    piece(0, "c", "ls", '{"p": "a"}'), CALLED],
     [A], "tool_use"),
    ("snapshots", [piece(0, "c", "ls", '{"p":"aaaa'), piece(0, None, None,
                                                          '{"p":"aaaabbb"}'), CALLED],
     [used_tool("ls", p="aaaabbb")], "tool_use"),
    ("finish stop with calls", [piece(0, "c", "ls", '{"p":"a"}'), END], [A], "tool_use"),
    ("finish null with calls", [piece(0, "c", "ls", '{"p":"a"}')], [A], "tool_use"),
    ("tool_calls without calls", [says(content="ok"), CALLED], [said("ok")], "end_turn"),
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
    ("strange shapes", [{"choices": None}, {"choices": {}}, {"choices": ["x"]}, {},
                        {"choices": [{"delta": None}]}, says(tool_calls=["x", None]),
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
    assert re.fullmatch("message_start( start( delta)* stop)* message_delta message_stop",
                        names)
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
    names = np.tool_names({"tools": [{"name": LONG, "input_schema": {}}]})
    blocks, _ = content(calls((list(names)[0], {})), names=names)
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
    message = np.fold(told([says(content=each) for each in pieces] + [END], stops=stops))
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


# ---- 9. Event streams: bytes to chunks, events to bytes ----------------------

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
    ("thinking and a call", sse(says(reasoning_content="h\u00e4"), says(content="Look. "),
                                *calls(("ls", {"p": ODD})))),
    ("think tags", sse(says(content="<think>hm</th"), says(content="ink>ok"), END)),
    ("CRLF", sse(*text("Hel", "lo")).replace(b"\n", b"\r\n")),
    ("CR", sse(*text("Hel", "lo")).replace(b"\n", b"\r")),
    ("no space after the colon", sse(*text("Hel", "lo")).replace(b"data: ", b"data:")),
    ("comments, ids, names", b": keep-alive\n\nid: 1\nretry: 5\nevent: message\n"
     + sse(*text("Hel", "lo"))),
    ("BOM", b"\xef\xbb\xbf" + sse(*text("Hel", "lo"))),
    ("data over lines", b'data: {"choices":\ndata: [{"delta":\ndata: {"content":"Hello"},'
     b'"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'),
    ("no DONE", sse(*text("Hel", "lo"), done=False)),
    ("no last blank line", sse(*text("Hel", "lo"), done=False).rstrip(b"\n")),
    ("side channels", b'event: tool_call_dispatch\ndata: {"choices":[]}\n\n'
     + sse(*text("Hel", "lo"))),
    ("garbage between", b"data: {broken\n\ndata: null\n\ndata: []\n\n: \xff\n\n"
     + sse(*text("Hel", "lo"))),
    ("after DONE", sse(*text("Hel", "lo")) + sse(*text("more"))),
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


def test_text_comes_out_exactly():
    raw = sse(says(content=ODD), says(content="\ud83d"), END)
    assert plain_text(translated([raw])) == ODD + "\ud83d"


def test_an_event_is_out_as_soon_as_its_blank_line_is_in():
    for newline in (b"\n", b"\r\n", b"\r"):
        stage = np.translation(np.Message("m", "x"))
        next(stage)
        raw = sse(says(content="Hel"), done=False).replace(b"\n", newline)
        assert b'"Hel"' in b"".join(stage.send(raw))


ERRORS_INSIDE = [   # (case, bytes, status, words)
    ("a comment, Dynamo", b"event: error\n: ResourceExhausted: full (163/32)\n\n"
     b"data: [DONE]\n\n", 529, "ResourceExhausted: full (163/32)"),
    ("a comment with an empty frame", b"event: error\n: full\ndata: [DONE]\n\n", 500, "full"),
    ("named event, newer Dynamo", b'event: error\ndata: {"message":"bad","code":500}\n\n',
     500, "bad"),
    ("an error object, vLLM", b'data: {"error":{"message":"bad","code":400}}\n\n', 400,
     "bad"),
    ("an error as text", b'data: {"error":"bad"}\n\n', 500, "bad"),
    ("with choices", b'data: {"error":{"message":"bad","code":429},"choices":[]}\n\n', 429,
     "bad"),
    ("LM Studio", b'event: error\ndata: {"error":{"message":"bad"},"message":"bad"}\n\n',
     500, "bad"),
    ("a JSON line, Ollama", b'{"error":"bad"}\n', 500, "bad"),
    ("object error", b'data: {"object":"error","message":"bad","code":404}\n\n', 404, "bad"),
    ("MiniMax", b'data: {"base_resp":{"status_code":1008,"status_msg":"insufficient '
     b'balance"},"choices":null}\n\n', 500, "insufficient balance"),
    ("overflow", b'data: {"error":{"message":"Context size has been exceeded."}}\n\n', 400,
     "prompt is too long"),
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
    events = parse_events(translated([raw[at:at + 1000] for at in range(0, len(raw), 1000)]))
    assert len(np.fold(events)["content"][0]["input"]["p"]) == 1000000
    assert time.process_time() - began < 1


def test_fold_undoes_the_split():
    chunks = [says(reasoning_content="hm"), *text("a ", "b"), *calls(("ls", {"p": 1}))]
    once = content(chunks)[0]
    message = {"content": "a b", "reasoning_content": "hm", "tool_calls": [
        {"function": {"name": "ls", "arguments": '{"p": 1}'}}]}
    assert content([{"choices": [{"message": message, "finish_reason": "stop"}]}])[0] == once


