"""autointerp: the choice of windows against slow references, and the judge against a server that fails in every way."""

import json
import math
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evals import Setup, autointerp, declared
from evals.autointerp import judge, windows
from evals.cache import Cache, digest
from evals.common import pooling
from evals.model import built_in
from evals.texts.source import Source
from tests.evals import scarce

BOS, EOS = 0, 1
KEY = "sk-never-to-be-seen-0123456789"
T, BUFFER = 24, 3
WORDS = [f"w{i:02d}" for i in range(40)]


# ------------------------------------------------------------------------------------------------ a server that judges


class Server:
    """An OpenAI-compatible endpoint here; `reply(number, body)` -> (status, headers, bytes[, seconds to wait])."""

    def __init__(self):
        self.reply, self.bodies, self.keys = honest, [], []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    number = len(outer.bodies)
                assert self.path == "/v1/chat/completions"
                status, headers, content, *delay = outer.reply(number, body)
                time.sleep(*delay or [0])
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client did not wait
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def says(text, status=200, headers=None):
    return status, headers or {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}],
                                              "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode()


def chats(message, finish="stop", **usage):
    """A completion with any message; `usage` beside 100 tokens in and 10 out."""
    return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": finish}],
                                "usage": {"prompt_tokens": 100, "completion_tokens": 10} | usage}).encode()


def complains(status, message="no", **error):
    return status, {}, json.dumps({"error": {"message": message, **error}}).encode()


def is_explaining(body):
    return "<<" in body["messages"][1]["content"]


def honest(number, body):
    """Explains by the word that is marked most often, and finds it again."""
    text = body["messages"][1]["content"]
    if is_explaining(body):
        marked = re.findall(r"<< (w\d+)>>", text)
        return says(f"This unit activates on the word {max(sorted(set(marked)), key=marked.count)}.")
    word = re.search(r"activates on the word (w\d+)\.", text).group(1)
    passages = text.split("passages:\n\n")[1].split("\n")
    return says(", ".join(line.split(".")[0] for line in passages if word in line) or "None")


@pytest.fixture
def server(monkeypatch):
    server = Server()
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "AUTOINTERP_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    monkeypatch.setattr(judge, "FIRST_DELAY", 0.001)
    yield server
    server.close()


def ask(server, tmp_path, number=1, tries=3, timeout=5.0, workers=1, key=KEY):
    """Ask `number` different questions; the answers (or the Unanswered) in order, and the seconds waited."""
    waited = []

    def one(i):
        try:
            return asked.ask([{"role": "user", "content": f"question {i}"}], 5)
        except judge.Unanswered as reason:
            return reason

    at = judge.Endpoint(getattr(server, "url", server), "m", key)
    with judge.Judge(at, tmp_path / "judge", timeout, tries, workers, waited.append) as asked:
        answers = dict(asked.each(one, range(number)))
    return [answers[i] for i in range(number)], waited


# ------------------------------------------------------------------------------------------------ the client


def test_an_answer_is_paid_for_once(server, tmp_path):
    """Fails if a known answer is asked for again, a damaged one believed, or another model or limit gets the same."""
    server.reply = lambda number, body: says(f" answer {number} ")
    assert ask(server, tmp_path)[0] == ["answer 1"] == ask(server, tmp_path)[0]
    assert server.bodies == [{"model": "m", "messages": [{"role": "user", "content": "question 0"}], "max_tokens": 5}]
    assert server.keys == [f"Bearer {KEY}"]
    (file,) = (tmp_path / "judge").iterdir()
    file.write_text(file.read_text()[:5])
    assert ask(server, tmp_path)[0] == ["answer 2"] == ask(server, tmp_path)[0]
    with judge.Judge(judge.Endpoint(server.url, "other", KEY), tmp_path / "judge", 5, 1, 1) as asked:
        assert asked.ask([{"role": "user", "content": "question 0"}], 5) == "answer 3"
        assert asked.ask([{"role": "user", "content": "question 0"}], 6) == "answer 4"
    assert len(list((tmp_path / "judge").iterdir())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("failure, reason", [
    (lambda: complains(500), "HTTP 500: no"),
    (lambda: complains(429), "HTTP 429: no"),
    (lambda: (503, {}, b""), "HTTP 503 (Service Unavailable)"),
    (lambda: (200, {}, b'{"choices": [{"mess'), 'not a chat completion: {"choices": [{"mess'),
    (lambda: (200, {"Content-Length": "500"}, b"{}"), "no complete answer (ChunkedEncodingError)"),
    (lambda: (200, {}, b'{"choices": []}'), 'not a chat completion: {"choices": []}'),
    (lambda: (200, {}, b'["no"]'), 'not a chat completion: ["no"]'),
    (lambda: (200, {"Content-Type": "text/html"}, b"<!doctype html><style>a{}</style><title>A</title><p>Log&nbsp;in"),
     "not a chat completion: A Log in"),
    (lambda: (200, {}, b'{"error": {"message": "overloaded"}}'), "an error in place of an answer: overloaded"),
    (lambda: (200, {}, b'data: {"choices": [{"delta": {"content": "1, "}}]}\n\n'),
     'not a chat completion: data: {"choices": [{"delta": {"content": "1, "}}]}'),
    (lambda: says(None), "an answer without text"),
    (lambda: says(" \n"), "an answer without text"),
    (lambda: (*says("late"), 1.5), "no answer within 0.4 s"),
])
def test_what_may_pass_is_tried_again(server, tmp_path, failure, reason):
    """Fails if a passing failure is final, is taken for an answer, goes on for ever, or gets no reason."""
    server.reply = lambda number, body: failure() if number < 3 else says("fine")
    answers, waited = ask(server, tmp_path, timeout=0.4 if "within" in reason else 5.0)
    assert answers == ["fine"] and len(server.bodies) == 3
    assert 0.0005 <= waited[0] <= 0.001 <= waited[1] <= 0.002
    server.reply = lambda number, body: failure()
    (answer,), waited = ask(server, tmp_path / "again", timeout=0.4 if "within" in reason else 5.0)
    assert isinstance(answer, judge.Unanswered) and str(answer) == reason
    assert len(server.bodies) == 6 and len(waited) == 2 and not list((tmp_path / "again" / "judge").iterdir())


@pytest.mark.parametrize("header, least, most", [
    ("7", 7, 7), ("0.25", 0.25, 0.25), ("100000", 120, 120), ("soon", 0, 0.001), ("nan", 0, 0.001), ("-5", 0, 0.001),
    ("in 40 s", 10, 41)])
def test_retry_after_is_obeyed(server, tmp_path, header, least, most):
    """Fails if the server's own delay is not waited for, as seconds or as a date, or is waited for without bound."""
    if header == "in 40 s":
        header = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 40))
    server.reply = lambda number, body: (429, {"Retry-After": header}, b"") if number == 1 else says("fine")
    answers, (waited,) = ask(server, tmp_path)
    assert answers == ["fine"] and least <= waited <= most


@pytest.mark.parametrize("reply, error", [
    (lambda: complains(401, f"wrong key {KEY}"), PermissionError), (lambda: complains(402), PermissionError),
    (lambda: complains(429, code="insufficient_quota"), PermissionError),
    (lambda: complains(429, type="insufficient_quota"), PermissionError),
    (lambda: (404, {}, f"no {KEY}".encode()), ValueError),
    (lambda: (200, {}, b'{"error": {"message": "wrong key", "code": 401}}'), PermissionError),
    (lambda: (308, {"Location": f"https://judge.example/v1/chat/completions?key={KEY}"}, b""), ValueError)])
def test_what_no_request_can_pass_stops_at_once(server, tmp_path, reply, error):
    """Fails if a refused key is tried again, others are still sent, or the key that a server repeats is passed on."""
    server.reply = lambda number, body: reply()
    with pytest.raises(error) as raised:
        ask(server, tmp_path, number=30, workers=2)
    assert len(server.bodies) <= 2
    assert KEY not in str(raised.value) and len(str(raised.value).split("\n")) == 2 and raised.value.__cause__ is None


@pytest.mark.parametrize("status, body, words", [
    (400, '{"error": {"message": "the texts are too long", "code": null}}', "the texts are too long"),
    (400, '{"error": "the texts\\nare too long"}', "the texts are too long"),
    (422, '{"detail": [{"loc": ["body", "messages"], "msg": "Field required"}]}', "body.messages: Field required"),
    (400, '{"object": "error", "message": "the texts are too long"}', "the texts are too long"),
    (400, '[{"error": {"code": 400, "message": "the texts are too long"}}]', "the texts are too long"),
    (400, '{"error": {"message": "Provider returned error", "metadata": {"raw": "{\\"error\\": \\"too long\\"}"}}}',
     "Provider returned error: too long"),
    (413, "the texts are too long\n", "the texts are too long"),
    (403, "<html><head><title>Forbidden</title></head><body><h1>Not from &amp; to here</h1></body></html>",
     "Forbidden Not from & to here"),
    (400, f'{{"error": "the key {KEY[:20]}… of {KEY}, sk-ab********cd"}}', "the key ***… of ***, ***"),
    (400, '{"error": {"message": "max_tokens is too large: 5, use less"}}', "max_tokens is too large: 5, use less")])
def test_the_servers_own_words_are_passed_on(server, tmp_path, status, body, words):
    """Fails if a refusing server's words are lost in any of these forms, take more than a line, or hold the key."""
    server.reply = lambda number, _: (status, {}, body.encode())
    (answer,), waited = ask(server, tmp_path)
    assert str(answer) == f"HTTP {status}: {words}" and not waited and len(server.bodies) == 1


def test_advice_is_about_what_is_wrong(server, tmp_path):
    """Fails if a missing model, a wrong address or a redirection is answered with advice about something else."""
    for reply, advice in ((complains(404, "The model `m` does not exist"), "AUTOINTERP_MODEL"),
                          ((404, {}, b'{"detail":"Not Found"}'), "/v1"), ((405, {}, b""), "/v1"),
                          ((308, {"Location": "https://judge.example/v1/chat/completions"}, b""), "OPENAI_BASE_URL")):
        server.reply = lambda number, _, reply=reply: reply
        with pytest.raises(ValueError) as raised:
            ask(server, tmp_path)
        what, to_do = str(raised.value).split("\n")
        assert f"the judge m at {server.url} " in what and advice in to_do
    assert "on to https://judge.example/v1 (HTTP 308)" in what and server.bodies[4:] == []


@pytest.mark.parametrize("url, said", [
    ("http://127.0.0.1:{port}/v1", "nothing listens at 127.0.0.1:{port} (connection refused)"),
    ("http://judge.invalid/v1", "the host judge.invalid is not found"),
    ("https://127.0.0.1:{plain}/v1", "no secure connection to 127.0.0.1:{plain}")])
def test_an_address_where_nobody_answers_is_named_at_once(server, tmp_path, monkeypatch, url, said):
    """Fails if a judge that is not there is waited for, its address not said, or this machine asked by proxy."""
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    if "invalid" in url:
        monkeypatch.delenv("HTTP_PROXY")
    gone = Server()
    gone.close()
    ports = {"port": gone.http.server_port, "plain": server.http.server_port}
    with pytest.raises(ConnectionError) as raised:
        ask(url.format(**ports), tmp_path, tries=6)
    what, to_do = str(raised.value).split("\n")
    assert said.format(**ports) in what and to_do and not server.bodies


def test_a_judge_that_goes_away_for_a_moment_is_waited_for(server, tmp_path, monkeypatch):
    """Fails if a refused connection is final although the judge has answered before."""
    import requests

    def post(*args, **kwargs):
        calls.append(0)
        if 2 <= len(calls) <= 4:
            raise requests.ConnectionError("x") from ConnectionRefusedError()
        return real(*args, **kwargs)

    calls, real = [], requests.Session.post
    monkeypatch.setattr(requests.Session, "post", post)
    server.reply = lambda number, body: says("fine")
    answers, waited = ask(server, tmp_path, number=2, tries=5)
    assert answers == ["fine", "fine"] and len(waited) == 3


OPENAI_SAYS = ("Unsupported parameter: 'max_tokens' is not supported with this model. "
               "Use 'max_completion_tokens' instead.")


@pytest.mark.parametrize("takes, reply, form", [
    ("max_completion_tokens", complains(400, OPENAI_SAYS, param="max_tokens", code="unsupported_parameter"),
     {"max_completion_tokens": 5}),
    ("max_completion_tokens", complains(400, "Unrecognized request argument supplied: max_tokens"),
     {"max_completion_tokens": 5}),
    ("max_output_tokens", complains(400, "max_tokens: unknown field, use max_output_tokens"), {"max_output_tokens": 5}),
    ("nothing", None, {}),
    ("system", complains(400, "System role not supported"), None),
    ("system", complains(500, "Conversation roles must alternate user/assistant/user/assistant/..."), None)])
def test_a_parameter_that_is_refused_by_name_is_sent_in_another_form(server, tmp_path, takes, reply, form):
    """Fails if a server's word on a parameter is not acted upon or remembered, or changes what answers are known by."""
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question"}]

    def picky(number, body):
        limits = [name for name in body if name.startswith("max_")]
        if takes == "nothing" and limits:
            detail = [{"loc": ["body", limits[0]], "msg": "Extra inputs are not permitted"}]
            return 422, {}, json.dumps({"detail": detail}).encode()
        refused = takes == "system" and body["messages"][0]["role"] == "system"
        return reply if refused or (takes.startswith("max") and takes not in body) else says(f"answer {number}")

    server.reply = picky
    said, at = [], judge.Endpoint(server.url, "m", KEY)
    with judge.Judge(at, tmp_path, 5, 1, 1, say=said.append) as asked:
        first = asked.ask(chat, 5)
        refusals = len(server.bodies) - 1
        assert asked.ask(chat[1:], 5) == f"answer {refusals + 2}" and len(server.bodies) == refusals + 2
        assert "at most" in asked.forecast([(chat, 5)]) or takes == "nothing"
    assert len(said) == refusals == (2 if takes == "nothing" else 1)
    if form is None:
        assert server.bodies[1]["messages"] == [{"role": "user", "content": "be brief\n\nquestion"}]
        assert "system message" in said[0]
    else:
        assert server.bodies[-2] == {"model": "m", "messages": chat, **form} and "max_tokens" in said[0]
    with judge.Judge(at, tmp_path, 5, 1, 1) as asked:
        assert asked.ask(chat, 5) == first and len(server.bodies) == refusals + 2


def test_a_refused_parameter_is_argued_about_once(server, tmp_path, capsys):
    """Fails if a server that refuses every form is asked for ever, or if several threads each change the form."""
    together = threading.Barrier(3)

    def refuse(number, body):
        if number <= 3:
            together.wait(5)  # all three are sent in the first form
        return complains(400, OPENAI_SAYS)

    server.reply = refuse
    answers, _ = ask(server, tmp_path, number=6, workers=3)
    assert all(str(answer) == f"HTTP 400: {OPENAI_SAYS}" for answer in answers) and len(server.bodies) == 6 + 3
    assert capsys.readouterr().out.count("from here on") == 1
    assert {tuple(body)[2:] for body in server.bodies} == {("max_tokens",), ("max_completion_tokens",)}


@pytest.mark.parametrize("cut", [
    chats({"content": None, "reasoning_content": "Let me see"}, "length"), chats({"content": ""}, "length"),
    chats({"content": "<think>\nLet me see"}, "length"), chats({"content": "1,", "reasoning": "Passage 1"}, "length"),
    chats({"content": "1,"}, "length", completion_tokens_details={"reasoning_tokens": 4}),
    complains(400, "Could not finish the message because max_tokens or model output limit was reached.")])
def test_reasoning_gets_room_within_bounds(server, tmp_path, cut):
    """Fails if an answer cut by reasoning is an answer, is asked for ever, costs its room again, or is not counted."""
    server.reply = lambda number, body: says("1, 3") if body["max_tokens"] >= 2000 else cut
    chat, said, at = [{"role": "user", "content": "question"}], [], judge.Endpoint(server.url, "m", KEY)
    with judge.Judge(at, tmp_path, 5, 1, 1, say=said.append) as asked:
        more = "(if it reasons before it answers, more: at most 8,192 each)"
        assert f"at most 5 out {more}" in asked.forecast([(chat, 5)])
        assert asked.ask(chat, 5) == "1, 3" and [b["max_tokens"] for b in server.bodies] == [5, 517, 2053]
        assert "at most 2,053 out" in asked.forecast([(chat, 5)]) and len(said) == 2
        assert asked.ask([*chat, *chat], 5) == "1, 3" and [b["max_tokens"] for b in server.bodies[3:]] == [2053]
        counted = "400 tokens in, 40 out" if cut[0] == 200 else "200 tokens in, 20 out"
        assert asked.spent() == f"{counted}; 2 answers were cut while it reasoned"
        server.reply = lambda number, body: cut
        with pytest.raises(judge.Unanswered):
            asked.ask([*chat, *chat, *chat], 5)
        assert [b["max_tokens"] for b in server.bodies[4:]] == [2053, 8197]
    with judge.Judge(at, tmp_path, 5, 1, 1) as asked:
        assert asked.ask(chat, 5) == "1, 3" and len(server.bodies) == 6  # known by the question, not by the room


def test_an_explanation_that_is_only_cut_is_an_answer(server, tmp_path):
    """Fails if an answer of a judge that does not reason costs more because it reached its limit."""
    server.reply = lambda number, body: chats({"content": "the word river in names of"}, "length")
    assert ask(server, tmp_path)[0] == ["the word river in names of"] and len(server.bodies) == 1


@pytest.mark.parametrize("content, text", [
    ("<think>\n3? no\n</think>\n\n1, 3", "1, 3"), ("3? no\n</think>\n\n1, 3", "1, 3"), ("<thinking>a</thinking>1", "1"),
    ("<|channel|>analysis<|message|>3?<|end|><|start|>assistant<|channel|>final<|message|>1, 3", "1, 3"),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "3?"}]}, {"type": "text", "text": "1, 3"}], "1, 3"),
    ("This unit activates on the tag '</think>' in code", "This unit activates on the tag '</think>' in code")])
def test_reasoning_is_no_part_of_an_answer(server, tmp_path, content, text):
    """Fails if what a judge thinks aloud is read as its answer, or if an answer about such tags is cut."""
    server.reply = lambda number, body: chats({"content": content})
    assert ask(server, tmp_path)[0] == [text]


def test_an_answer_in_pieces_is_put_together(server, tmp_path):
    """Fails if a server that streams unasked, under whatever Content-Type, gives no answer or a part of one."""
    pieces = [{"delta": {"content": text}} for text in ("", "1, ", "3 \u2028", "↵")]
    pieces.append({"delta": {}, "finish_reason": "stop"})
    events = [json.dumps({"choices": [piece]}, ensure_ascii=False) for piece in pieces]
    lines = [": waiting", *(f"data: {event}\n" for event in events), "data: [DONE]\n"]
    server.reply = lambda number, body: (200, {"Content-Type": "text/plain"}, "\n".join(lines).encode())
    assert ask(server, tmp_path)[0] == ["1, 3 \u2028↵"] and len(server.bodies) == 1
    server.reply = lambda number, body: (200, {}, b'data: {"error": {"message": "overloaded"}}\n\ndata: [DONE]\n')
    assert str(ask(server, tmp_path / "b")[0][0]) == "an error in place of an answer: overloaded"


def test_a_judge_that_declines_is_not_asked_again(server, tmp_path):
    """Fails if a refusal by the model is paid for at every try."""
    server.reply = lambda number, body: chats({"content": None, "refusal": "I can't help with that"})
    (answer,), waited = ask(server, tmp_path)
    assert str(answer) == "it declines: I can't help with that" and len(server.bodies) == 1 and not waited


def test_a_dead_endpoint_is_given_up(server, tmp_path, monkeypatch):
    """Fails if every request is tried against an endpoint that is gone, or if single failures among answers end it."""
    monkeypatch.setattr(judge, "FAILURES_IN_A_ROW", 4)
    server.reply = lambda number, body: says("fine") if number % 4 == 0 else complains(400)
    answers, _ = ask(server, tmp_path, number=12)
    assert [a == "fine" for a in answers] == [False, False, False, True] * 3
    server.reply = lambda number, body: complains(400)
    with pytest.raises(ConnectionError, match="4 requests in a row unanswered: HTTP 400: no\n"):
        ask(server, tmp_path, number=30)
    assert len(server.bodies) == 12 + 4


def test_nothing_is_sent_after_an_interruption(server, tmp_path):
    """Fails if what is queued is still sent, and billed, after an interruption, or more run at a time than allowed."""
    running = [0, 0]

    def slow(number, body):
        running[0] += 1
        running[1] = max(running)
        time.sleep(0.02)
        running[0] -= 1
        return says("fine")

    server.reply = slow
    with judge.Judge(judge.Endpoint(server.url, "m"), tmp_path, 5, 3, 3) as asked:
        answers = asked.each(lambda i: asked.ask([{"role": "user", "content": str(i)}], 5), range(600))
        with pytest.raises(KeyboardInterrupt):
            for number, _ in enumerate(answers):
                if number == 4:
                    answers.throw(KeyboardInterrupt)
    sent = len(server.bodies)
    time.sleep(0.1)
    assert 5 <= sent == len(server.bodies) < 600 and running[1] <= 3
    assert set(server.keys) == {None}


def test_the_environment_names_the_endpoint(monkeypatch):
    """Fails if a secret can reach a message or the run's fingerprint, or if a key is asked for on this machine."""
    def endpoint(**values):
        for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "AUTOINTERP_MODEL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return judge.endpoint()

    assert endpoint() is None and autointerp.outside() == []
    assert endpoint(OPENAI_BASE_URL="https://judge.example/v1") is None
    for local in ("http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:9/v1", "http://192.168.1.7/v1",
                  "http://vllm:8000/v1"):
        assert endpoint(OPENAI_BASE_URL=local).base_url == local
    assert endpoint(OPENAI_BASE_URL=" http://vllm:8000/v1/chat/completions\n").base_url == "http://vllm:8000/v1"
    found = endpoint(OPENAI_API_KEY=f" {KEY}\n", AUTOINTERP_MODEL="other")
    assert found == judge.Endpoint("https://api.openai.com/v1", "other", KEY) and KEY not in repr(found)
    assert autointerp.outside() == ["https://api.openai.com/v1", "other"]
    assert autointerp.repositories(autointerp.CONFIG["gemma"], None) == ["monology/pile-uncopyrighted"]
    for bad in ({"OPENAI_BASE_URL": f"https://me:{KEY}@judge.example/v1"},
                {"OPENAI_BASE_URL": f"https://judge.example/v1?key={KEY}"},
                {"OPENAI_BASE_URL": "judge.example"},
                {"OPENAI_BASE_URL": "http://localhost:80000/v1"},
                {"OPENAI_API_KEY": f"{KEY[:9]}\n{KEY[9:]}"}):
        with pytest.raises(ValueError) as error:
            endpoint(**bad)
        assert KEY[:9] not in str(error.value)
        (problem,) = autointerp.requirements(autointerp.CONFIG["tiny"], {})
        assert problem == f"autointerp: {error.value}"


def test_the_forecast_is_in_tokens_and_where_known_in_dollars(tmp_path):
    """Fails if the price is wrong, or is told for a model or an endpoint whose price is not known."""
    chat = [{"role": "system", "content": "x" * 2_000_000}, {"role": "user", "content": "y" * 2_000_000}]

    def forecast(*endpoint):
        return judge.Judge(judge.Endpoint(*endpoint), tmp_path, 1, 1, 1).forecast([(chat, 500_000)])

    at_openai = forecast(judge.OPENAI_URL, "gpt-4o-mini", KEY)
    for part in ("1 requests to gpt-4o-mini", "1,000,000 tokens in", "500,000 out: $0.45 at"):
        assert part in at_openai
    assert "$" not in forecast(judge.OPENAI_URL, "another", KEY) + forecast("http://localhost/v1", "gpt-4o-mini")


# -------------------------------------------------------------------------------------------- a language model and SAEs


class FakeTokenizer:
    """Words after a space are one token each; EOS may stand between them."""

    eos_token = bos_token = "<eos>"

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        found = [re.findall(r"<eos>|w\d\d", text) for text in texts]
        return {"input_ids": [[EOS if word == "<eos>" else 2 + WORDS.index(word) for word in words] for words in found]}

    def decode(self, ids):
        return " ".join(WORDS[i - 2] for i in ids)

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        return ["<eos>" if i < 2 else f" {WORDS[i - 2]}" for (i,) in rows]


class FakeLM:
    """One-hot tokens times a factor between 1 and 2 that depends on what stands before; counts the rows it is given."""

    name, digest, device, d_model, vocab_size, bos, special_ids = "fake", "d1", "cpu", 42, 42, BOS, {BOS, EOS}

    def __init__(self):
        self.tokenizer, self.rows = FakeTokenizer(), 0

    def residual(self, tokens_BT, layer):
        self.rows += len(tokens_BT)
        before_BT = (tokens_BT * torch.arange(1, tokens_BT.shape[1] + 1) ** 3).cumsum(1).double()
        factor_BT = 1 + (before_BT * 0.75487766 % 1).float()
        return torch.nn.functional.one_hot(tokens_BT, 42) * factor_BT[..., None]


def words_sae(gain=None):
    """Feature f fires on word f, a dense one (0) on every third, all most on BOS and EOS; `gain` switches some off."""
    W_DF = torch.zeros(42, 40)
    W_DF[:2] = 9.0
    W_DF[torch.arange(2, 42), torch.arange(40)] = 1.0
    W_DF[2::3, 0] = 1.0
    W_DF = W_DF * (torch.ones(40) if gain is None else gain)
    return SimpleNamespace(encode=lambda x: x.float() @ W_DF, W_dec=torch.zeros(40, 42))


def documents(number=120, seed=0):
    rng = random.Random(seed)
    weights = [1 + (i % 7) for i in range(40)]
    return [" " + " ".join(rng.choices(WORDS, weights, k=rng.randint(30, 90))) for _ in range(number)]


def make_setup(tmp_path, lm=None, texts=None, seed=0, limit_gb=1.0, **config):
    given = {"total_tokens": 5000, "llm_context_size": T, "buffer": BUFFER, "n_latents": 12, "dead_latent_threshold": 5}
    config = autointerp.CONFIG["tiny"] | given | config
    texts = documents() if texts is None else texts
    said = []
    setup = Setup(lm or FakeLM(), 3, "", config, lambda: iter(texts), digest(texts), Cache(tmp_path, limit_gb), None,
                  seed, said.append)
    object.__setattr__(setup, "said", said)
    return setup


def activations(setup, sae):
    """All of them, [R, T, F], 0 at special tokens."""
    tokens_RT = windows.token_rows(setup)
    z_RTF = sae.encode(setup.lm.residual(tokens_RT, 3))
    return tokens_RT, z_RTF * (tokens_RT > 1)[..., None]


# ------------------------------------------------------------------------------------------------ text and windows


def test_text_is_packed_as_in_the_protocol():
    """Fails if short texts stay, documents are not joined by EOS, parts do not begin with BOS, or rows do not."""
    long = [" ".join(WORDS * 3), " ".join(WORDS[20:] * 5)]
    rows_RT = windows.pack([long[0], "w01 w02", long[1]], FakeLM(), 8, 10_000)
    joined = "<eos>".join(long)
    size = -(-len(joined) // 20)
    expected = []
    for start in range(0, len(joined), size):
        expected += [BOS] + FakeTokenizer()([joined[start : start + size]], False)["input_ids"][0]
    assert EOS in expected and len(rows_RT) == len(expected) // 8 and (rows_RT[:, 0] == BOS).all()
    assert rows_RT[:, 1:].tolist() == [expected[r * 8 + 1 : r * 8 + 8] for r in range(len(rows_RT))]
    assert windows.pack(documents(), FakeLM(), 8, 103).shape == (14, 8)  # (103 + 8 + 1) // 8
    assert windows.pack(["w01"], FakeLM(), 8, 100).shape == (0, 8)


def test_token_ids_are_packed_as_the_text_they_stand_for():
    """Fails if token ids in place of a text give other rows, or keep a BOS of their own."""
    rows_RT = windows.pack([" ".join(WORDS)], FakeLM(), 8, 10_000)
    assert torch.equal(windows.pack([[BOS, *range(2, 42)]], FakeLM(), 8, 10_000), rows_RT) and len(rows_RT) > 3


def test_a_data_set_in_the_hubs_format_gives_the_same_rows(tmp_path):
    """Fails if a data set's texts are read otherwise than held-out ones, reordered, or not known by their content."""
    file = tmp_path / "texts.jsonl"
    rows_RT = windows.token_rows(make_setup(tmp_path))
    for texts, same in ((documents(), True), (documents()[::-1], False)):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        assert torch.equal(rows_RT, windows.token_rows(make_setup(tmp_path, dataset_name=str(file)))) == same


@pytest.mark.parametrize("batch, part, block", [(3, 10**9, 10**9), (3, 10**9, 8 * T * 40), (50, 7 * T * 40, 0)])
def test_windows_against_a_slow_reference(tmp_path, monkeypatch, batch, part, block):
    """Fails if the strongest windows overlap, are not the strongest or leave their row, or values are another's."""
    monkeypatch.setattr(pooling, "PART_FLOATS", part)
    monkeypatch.setattr(windows, "BLOCK_FLOATS", block)
    setup, sae = make_setup(tmp_path, llm_batch_size=batch), words_sae()
    tokens_RT, z_RTF = activations(setup, sae)
    seen = windows.look(setup, tokens_RT, {"s": sae}, {"s": list(range(40))})["s"]
    assert seen.bad == 0 and torch.equal(seen.fired_F, (z_RTF > 0).sum((0, 1)))
    for latent in range(40):
        z_RT = z_RTF[..., latent].numpy()
        centres = [(r, t) for r in range(len(z_RT)) for t in range(BUFFER, T - BUFFER) if z_RT[r, t] > 0]
        chosen = []
        for r, t in sorted(centres, key=lambda rt: -z_RT[rt]):
            if len(chosen) < 12 and all(r != row or abs(t - column) > BUFFER for row, column in chosen):
                chosen.append((r, t))
        top, drawn = (seen.windows[latent][kind] for kind in ("top", "drawn"))
        got = windows.spread(top["place"].tolist(), top["acts"][:, BUFFER].tolist(), 12, BUFFER)
        assert [divmod(int(top["place"][k]), T) for k in got] == chosen
        below = {rt for rt in centres if z_RT[rt] < z_RT[chosen[-1]]} if len(chosen) == 12 else set()
        taken = [divmod(int(place), T) for place, acts in zip(drawn["place"], drawn["acts"])
                 if 0 < acts[BUFFER] < z_RT[chosen[-1]]][:7]
        assert len(set(taken)) == len(taken) == min(7, len(below)) and set(taken) <= below
        for kind in seen.windows[latent].values():
            for place, acts in zip(kind["place"].tolist(), kind["acts"].tolist()):
                r, t = divmod(place, T)
                assert BUFFER <= t < T - BUFFER and acts == z_RT[r, t - BUFFER : t + BUFFER + 1].tolist()
        assert len(seen.windows[latent]["random"]["place"]) == 17


def test_a_feature_below_0_is_shown_as_one_above(tmp_path):
    """Fails if windows leave out, or rank by sign, activations below 0: a turned SAE is the same."""
    sae = words_sae()
    turned = SimpleNamespace(encode=lambda x: -sae.encode(x), W_dec=-sae.W_dec)
    setup = make_setup(tmp_path)
    tokens_RT = windows.token_rows(setup)
    seen = windows.look(setup, tokens_RT, {"s": sae, "t": turned}, {"s": list(range(40)), "t": list(range(40))})
    assert torch.equal(seen["t"].fired_F, seen["s"].fired_F) and seen["s"].fired_F.all()
    for kinds, theirs in zip(seen["s"].windows.values(), seen["t"].windows.values()):
        for name, tensors in kinds.items():
            assert all(torch.equal(tensors[key], theirs[name][key]) for key in tensors)


def test_windows_are_drawn_in_proportion_to_the_squared_activation(tmp_path):
    """Fails if the first draw is not proportional to z², the second not to z² of the rest, over two batches."""
    z_P, trials, width = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 1.0]), 4000, 2 + 2 * BUFFER
    z_CRT = torch.zeros(trials, 3, width)  # a latent per trial
    z_CRT[..., BUFFER:-BUFFER] = z_P.view(3, 2)
    setup = make_setup(tmp_path)
    kept = windows._nothing(setup, torch.zeros(3, width), list(range(trials)))
    windows._keep(setup, kept, z_CRT[:, :1], 0)
    windows._keep(setup, kept, z_CRT[:, 1:], 1)
    counts = np.zeros((6, 6))
    for pair in kept["drawn"]["place"][:, :2].tolist():
        counts[tuple(place // width * 2 + place % width - BUFFER for place in pair)] += 1
    p = (z_P**2 / (z_P**2).sum()).double().numpy()
    expected = trials * np.array([[p[i] * p[j] / (1 - p[i]) * (i != j) for j in range(6)] for i in range(6)])
    assert counts[expected == 0].sum() == 0
    chi_squared = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_squared < 31.3  # .1 % point at 11 degrees of freedom (12 pairs)


def test_a_case_by_hand(tmp_path):
    """Fails if threshold, split, order, filling up or the reason to leave a latent out is not the protocol's."""
    config = dict(n_top_ex_for_generation=2, n_top_ex_for_scoring=1, n_iw_sampled_ex_for_generation=1,
                  n_iw_sampled_ex_for_scoring=2, n_random_ex_for_scoring=4, buffer=1, act_threshold_frac=0.1)
    setup = make_setup(tmp_path, **config)
    tokens_RT = torch.arange(100).view(10, 10) % 40 + 2

    def made(*values):
        place = torch.tensor([10 * r + 5 for r in range(len(values))])
        return {"place": place, "acts": torch.tensor([[edge, centre, 0.0] for edge, centre in values])}

    seen = {"top": made((20.0, 9.0), (0.0, 8.0), (0.0, 7.0), (0.0, 6.0)),
            "drawn": made((0.0, 9.0), (0.0, 7.0), (0.0, 3.0)),
            "random": made(*[(0.0, float(n)) for n in range(7)])}
    case = windows.case(setup, tokens_RT, {i: f"<{i}>" for i in range(50)}, 5, seen)
    assert case.threshold == 2.0  # a tenth of 20, which stands beside a centre
    centres = [w.acts[1] for w in case.generation + case.scoring]
    # 3 of the strongest, the one drawn below 7, 2 random ones to fill up, 4 random ones
    assert sorted(centres) == sorted([9.0, 8.0, 7.0, 3.0, 4.0, 5.0, 0.0, 1.0, 2.0, 3.0])
    assert sorted(w.acts[1] for w in case.scoring if w.random) == [0.0, 1.0, 2.0, 3.0]
    assert not any(w.random for w in case.generation)
    peaks = [max(w.acts) for w in case.generation]
    assert len(peaks) == 3 and peaks == sorted(peaks, reverse=True)
    assert next(w for w in case.generation + case.scoring if w.acts[1] == 8.0).tokens == ["<16>", "<17>", "<18>"]
    few = {**seen, "top": made((0.0, 9.0), (0.0, 8.0), (0.0, 0.0))}
    nothing_below = {**seen, "drawn": made((0.0, 9.0), (0.0, 7.0))}
    for other in (few, nothing_below):
        assert windows.case(setup, tokens_RT, dict.fromkeys(range(50), ""), 5, other) is None


def test_latents_are_those_alive_and_a_second_pass_finds_more(tmp_path):
    """Fails if a dead latent is judged, if living ones are missed because many are dead, or if a pass is in vain."""
    gain = torch.zeros(40)
    gain[[0, 5, 6, 12, 13, 19, 20, 26, 27, 33, 34]] = 1.0
    setup = make_setup(tmp_path, n_latents=10, limit_gb=0)
    cases, problems = windows.cases_of(setup, {"few": words_sae(gain), "all": words_sae()})
    rows = len(windows.token_rows(setup))
    assert len(cases["few"]) == 10 == len(cases["all"]) and problems == {"few": [], "all": []}
    assert {c.latent for c in cases["few"]} <= set(gain.nonzero().flatten().tolist()) and setup.lm.rows == 2 * rows
    setup = make_setup(tmp_path, n_latents=10, limit_gb=0)
    windows.cases_of(setup, {"all": words_sae()})
    assert setup.lm.rows == rows
    gain[[0, 5]] = 0.0
    cases, problems = windows.cases_of(setup, {"few": words_sae(gain)})
    assert len(cases["few"]) == 9
    assert problems["few"][0].startswith("9 of 10 latents for the judge: 9 of 40 fire more than 5 times in 5,000 "
                                         "tokens, 0 of those")


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("answer, numbers", [
    ("1, 2, 13", [1, 2, 13]), ("None", []), ("None.", []), (" 3. ", [3]), ("2 and 4", [2, 4]), ("99", [99]),
    ("none", None), ("1; 2", None), ("Examples 1, 2", None), ("²", None), ("-1", None)])
def test_answers_are_read_as_by_the_reference(answer, numbers):
    """Fails if an answer is read in another way than SAEBench does, or breaks the reading."""
    assert autointerp.numbers_in(answer) == numbers


@pytest.mark.parametrize("answer, numbers", [
    ("none", []), ("None of them.", []), ("None of the passages mention rivers", []), ("No passages", []),
    ("all", [1, 2, 3, 4, 5]), ("All of them", [1, 2, 3, 4, 5]), ("All 5 passages", [1, 2, 3, 4, 5]),
    ("2-4", [2, 3, 4]), ("1, 3–5", [1, 3, 4, 5]), ("2 to 3, and 5", [2, 3, 5]), ("1; 2", [1, 2]), ("1 3", [1, 3]),
    ("Answer: 1, 3", [1, 3]), ("**Answer:** 1, 3", [1, 3]), ("**1, 3**", [1, 3]), ("`1, 3`", [1, 3]),
    ("[1, 3]", [1, 3]), ('"1, 3"', [1, 3]), ("Passages 1 and 3.", [1, 3]),
    ("The unit would be active on passages 1, 3.", [1, 3]),
    ('{"indices": [1, 3]}', [1, 3]), ('```json\n{"passages": ["1", "3"], "why": "x"}\n```', [1, 3]),
    ("```\n1, 3\n```", [1, 3]), ('{"indices": []}', []), ("- 1\n- 3", [1, 3]), ("1\n3", [1, 3]),
    ("1, 3\n\nBoth mention 2 rivers.", [1, 3]),
    ("Passage 2 is about 4 roads.\n\nAnswer: 1, 3", [1, 3]), ("1, 3 (both mention a river)", [1, 3]),
    ("3 because of the river", [3]), ("\\boxed{1, 3}", [1, 3]), ("1, 2, 13", [1, 2, 13]), ("None", []),
    ("maybe 3", None), ("", []), ("I cannot tell", None), ("None except 3", None), ("all but 2", None),
    ("All 4", None), ("4-2", None), ("1. a river\n2. a road", None), ("1. a river", None), ("1-99", None),
    ("-1", None), ("²", None), ('{"indices": [0, 3]}', None), ("1, 3\nor rather\n1, 4", None), ("9" * 5000, None),
    ("Not 1, 3", None), ('{"a": [1], "b": [2]}', None)])
def test_answers_in_another_form_are_read_if_they_are_certain(answer, numbers):
    """Fails if a clear answer in another form than asked for is lost, or windows are read out of an unclear one."""
    assert autointerp.windows_in(answer, 5) == numbers


@pytest.mark.parametrize("answer, explanation", [
    ("This unit activates on the word 'a'.", "the word 'a'"),
    ("**This unit activates on** the word 'a'", "the word 'a'"),
    ('{"explanation": "This unit activates on the word \'a\'."}', "the word 'a'"),
    ("**Explanation:** the word 'a'", "the word 'a'"),
    ('```json\n{"explanation": "the word \'a\'"}\n```', "the word 'a'"),
    ('{"explanation": "the word \'a\' in nam', "the word 'a' in nam"),
    ("This unit activates on ** and *", "** and *")])
def test_explanations_lose_their_wrapping(answer, explanation):
    """Fails if JSON, bold type or a label stays in an explanation, or if one about such signs is damaged."""
    assert autointerp.explanation_in(answer) == explanation


def test_scores_by_hand():
    """Fails if random windows that fire change the compatible score, or not the checked one; or on unusable answers."""
    def window(act, random):
        return windows.Window(["a", " \nb"], [0.0, act], random)

    scoring = [window(5.0, False), window(0.5, False), window(5.0, True), window(0.1, True)]
    verdicts = [{"case": windows.Case(latent, 1.0, [window(5.0, False)], scoring), "explanation": "b",
                 "answer": answer}
                for latent, answer in ((7, "1, 3"), (8, "None"), (9, "no idea"))]
    verdicts.append({"case": verdicts[0]["case"], "failed": "HTTP 500"})
    result = autointerp._result({"n_random_ex_for_scoring": 2}, verdicts, [], [])
    # fires in 1 and 3; the compatible score takes 3 for silent: "1, 3" has 3 and 4 of 4 right, "None" 3 and 2 of 4
    assert result.metrics == {"autointerp": {"autointerp_score": 0.75, "autointerp_std_dev": 0.0}}
    assert result.corrected == {"autointerp_score_checked": pytest.approx(0.5), "autointerp_latents": 3,
                                "autointerp_unparsable_share": pytest.approx(1 / 3), "autointerp_failed_requests": 1,
                                "autointerp_random_windows_active": 0.5}
    assert result.stderrs == {}  # of three latents
    assert [result.unstructured[k]["correct seqs"] for k in "789"] == [[1]] * 3
    assert [result.unstructured[k]["correct seqs checked"] for k in "789"] == [[1, 3]] * 3
    assert result.problems == ["no answer to 1 requests (1 × HTTP 500): 1 of 4 latents are not scored",
                               "1 of 3 predictions are no list of numbers: not in autointerp_score, nothing right in "
                               "autointerp_score_checked"]
    assert autointerp.passages(scoring[:2], 1.0) == "1. a<< ↵b>>\n2. a ↵b"
    verdicts[1]["answer"], verdicts[3]["case"] = "Answer: 1, 3", verdicts[0]["case"]
    result = autointerp._result({"n_random_ex_for_scoring": 2}, verdicts, [], [])
    assert result.metrics["autointerp"]["autointerp_score"] == 0.75
    assert result.corrected["autointerp_score_checked"] == pytest.approx(2 / 3)
    assert result.problems[1] == ("2 of 3 predictions are no list of numbers: not in autointerp_score; 1 of them are "
                                  "read all the same for autointerp_score_checked")


# ------------------------------------------------------------------------------------------------ the eval


def test_a_judge_that_reads_the_prompt_foresees_every_word(server, tmp_path, monkeypatch, capfd):
    """Fails if marks, windows, numbers or labels are mixed up before the score, or if the key is written down."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    gain = torch.ones(40)
    gain[0] = 0.0  # no single word explains the dense one
    setup = make_setup(tmp_path)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    result = autointerp.run(setup, {"sae": words_sae(gain)})["sae"]
    assert torch.equal(torch.get_rng_state(), state)
    assert result.corrected["autointerp_score_checked"] == 1.0 and result.corrected["autointerp_latents"] == 12
    wrong = [v["random windows active"] / 14 for v in result.unstructured.values()]
    assert 0 < result.corrected["autointerp_random_windows_active"] == pytest.approx(np.mean(wrong) * 1.4)
    assert result.metrics["autointerp"]["autointerp_score"] == pytest.approx(1 - np.mean(wrong))
    assert result.metrics["autointerp"]["autointerp_std_dev"] == pytest.approx(np.std(wrong, ddof=1))
    assert result.stderrs["autointerp_score"] == pytest.approx(np.std(wrong, ddof=1) / math.sqrt(12))
    assert not result.problems
    assert {*result.metrics["autointerp"], *result.corrected} == set(declared("autointerp", "METRICS"))
    assert len(server.bodies) == 24 and {b["max_tokens"] for b in server.bodies} == {30, 33}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert all(b["messages"][1]["content"].count("\n") == (16 if is_explaining(b) else 17) for b in server.bodies)
    assert setup.said[0].startswith(f"autointerp: 24 requests to gpt-4o-mini at {server.url}, about ")
    assert "2,400 tokens in" in setup.said[1]

    again = make_setup(tmp_path)
    assert autointerp.run(again, {"other": words_sae(), "sae": words_sae(gain)})["sae"] == result
    assert len(server.bodies) <= 24 + 4 and again.lm.rows == 0  # at most the dense latent was new
    written = "".join(f.read_bytes().decode("latin-1") for f in tmp_path.rglob("*") if f.is_file())
    assert "the word w" in written
    for shown in (written, repr(result), *setup.said, *again.said, *capfd.readouterr()):
        assert KEY not in shown


def test_an_interrupted_run_pays_for_the_rest_only(server, tmp_path, monkeypatch):
    """Fails if answers are lost with the run that asked for them, or if a dead endpoint gives a result."""
    monkeypatch.setattr(judge, "FAILURES_IN_A_ROW", 3)
    server.reply = lambda number, body: honest(number, body) if number <= 10 else complains(403)
    with pytest.raises(ConnectionError):
        autointerp.run(make_setup(tmp_path, max_concurrent=1), {"sae": words_sae()})
    asked, server.reply = len(server.bodies), honest
    assert asked == 13
    setup = make_setup(tmp_path)
    result = autointerp.run(setup, {"sae": words_sae()})["sae"]
    assert result.corrected["autointerp_latents"] == 12
    assert len(server.bodies) == 13 + 14 and "14 requests" in setup.said[0]


def test_no_answer_is_dropped_in_silence(server, tmp_path):
    """Fails if failed or unusable answers change a score uncounted, or if a judge that never answers gives a result."""
    saes, n_scoring = {"sae": words_sae()}, [0]

    def partly(number, body):
        if is_explaining(body):
            return honest(number, body)
        n_scoring[0] += 1
        return [honest(number, body), says("maybe 3"), complains(400)][n_scoring[0] % 3]

    server.reply = partly
    result = autointerp.run(make_setup(tmp_path, max_concurrent=1), saes)["sae"]
    assert (result.corrected["autointerp_latents"], result.corrected["autointerp_failed_requests"]) == (8, 4)
    assert result.corrected["autointerp_unparsable_share"] == 0.5
    scores = [v["score"] for v in result.unstructured.values()]
    mean = pytest.approx(np.mean([score for score in scores if score]))
    assert scores.count(None) == 4 and result.metrics["autointerp"]["autointerp_score"] == mean
    failed, unread = result.problems
    assert "4 × HTTP 400" in failed and "4 of 8 predictions" in unread
    server.reply = lambda number, body: complains(400)
    with pytest.raises(ConnectionError, match="none of the first 3 latents: HTTP 400: no\n"):
        autointerp.run(make_setup(tmp_path / "b", n_latents=3, max_concurrent=1), saes)


@pytest.mark.parametrize("judge_says, kind, words, paid", [
    (lambda body: says("I would\nrather not") if not is_explaining(body) else says("the word w01"), ValueError,
     "form that can be read: 'I would rather not', where numbers of passages like \"2, 5\"", 6),
    (lambda body: says("This unit activates on."), ValueError, "'(an empty explanation)'", 6),
    (lambda body: complains(403, "not you"), ConnectionError, "none of the first 3 latents: HTTP 403: not you", 3)])
def test_three_latents_show_whether_a_judge_is_of_use(server, tmp_path, judge_says, kind, words, paid):
    """Fails if more than three latents are paid for where none gets a usable answer, or if those are believed later."""
    server.reply = lambda number, body: judge_says(body)
    with pytest.raises(kind) as raised:
        autointerp.run(make_setup(tmp_path), {"sae": words_sae()})
    assert words in str(raised.value) and len(str(raised.value).split("\n")) == 2 and len(server.bodies) == paid
    server.reply = honest
    result = autointerp.run(make_setup(tmp_path), {"sae": words_sae()})["sae"]
    assert result.corrected["autointerp_latents"] == 12 and not result.problems and len(server.bodies) == paid + 24


def test_one_useless_answer_among_known_ones_stops_nothing(server, tmp_path):
    """Fails if a run whose other answers were paid for before stops because the last few are of no use."""
    saes = {"sae": words_sae()}
    autointerp.run(make_setup(tmp_path), saes)
    files = sorted((tmp_path / "judge").iterdir())
    predictions = [f for f in files if "activates" not in f.read_text()]
    for file in predictions[:2]:
        file.unlink()
    server.reply = lambda number, body: says("I would rather not")
    result = autointerp.run(make_setup(tmp_path), saes)["sae"]
    assert result.corrected["autointerp_unparsable_share"] == pytest.approx(2 / 12) and len(server.bodies) == 24 + 2


def test_eos_is_kept_where_it_is_the_padding_token():
    """Fails if documents lose their boundary or rows lose tokens where padding is EOS, or if EOS counts as text."""
    kept = []
    for padding in ("<pad>", None):
        tokenizer = built_in.tiny_tokenizer()
        tokenizer.pad_token = padding or tokenizer.eos_token
        special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        lm = SimpleNamespace(tokenizer=tokenizer, bos=tokenizer.bos_token_id, special_ids=special)
        tokens_RT = windows.pack(["the cat sat on the mat. " * 6] * 4, lm, 16, 400)
        content_RT = windows.content(SimpleNamespace(lm=lm), tokens_RT)
        assert int((tokens_RT == tokenizer.eos_token_id).sum()) == 3
        assert set(tokens_RT[~content_RT].tolist()) == {tokenizer.bos_token_id, tokenizer.eos_token_id}
        kept.append(tokens_RT)
    assert torch.equal(*kept)


def test_without_a_judge_nothing_is_computed(server, tmp_path, monkeypatch):
    """Fails if a missing key is an error, costs a pass of the model, or leaves a score without a word."""
    monkeypatch.delenv("OPENAI_BASE_URL")
    setup = make_setup(tmp_path)
    result = autointerp.run(setup, {"sae": words_sae()})["sae"]
    assert result.metrics["autointerp"]["autointerp_score"] is None and set(result.corrected.values()) == {None}
    assert all(word in result.problems[0] for word in ("skipped", "OPENAI_API_KEY", "autointerp_score"))
    assert "OPENAI_API_KEY" in setup.said[0] and setup.lm.rows == 0 and not list(tmp_path.iterdir())
    assert autointerp.requirements(setup.config, {}) == [] == autointerp.repositories(autointerp.CONFIG["gemma"], None)


def test_what_cannot_be_judged_is_a_problem_with_its_figure(server, tmp_path):
    """Fails if a dead SAE, NaN features or too little text end the eval, pass for a score or take other SAEs along."""
    saes = {"dead": words_sae(torch.zeros(40)), "good": words_sae(),
            "nan": SimpleNamespace(encode=lambda x: torch.where(x == 0, x, torch.nan), W_dec=torch.zeros(42, 42))}
    results = autointerp.run(make_setup(tmp_path), saes)
    assert results["good"].metrics["autointerp"]["autointerp_score"] > 0.5 and not results["good"].problems
    assert "0 of 12 latents for the judge: 0 of 40 fire" in results["dead"].problems[0]
    assert "NaN or inf in the features of " in results["nan"].problems[0]
    short = autointerp.run(make_setup(tmp_path, texts=["too short"]), saes)["good"]
    for result in (results["dead"], results["nan"], short):
        assert result.metrics["autointerp"]["autointerp_score"] is None and "no autointerp_score" in result.problems[0]


def test_the_tiny_profile_has_text_enough(server, tmp_path):
    """Fails if the tiny profile's settings, texts or tokenizer do not give cases for the judge."""
    lm, source = FakeLM(), Source("tiny", cache_dir=tmp_path)
    lm.tokenizer = built_in.tiny_tokenizer()
    lm.bos, lm.special_ids = lm.tokenizer.bos_token_id, {0, 1, 2}

    def residual(tokens_BT, layer):
        return torch.nn.functional.one_hot(tokens_BT % 42, 42) * (1 + tokens_BT.cumsum(1) % 97)[..., None] / 98

    lm.residual = residual
    setup = make_setup(tmp_path, lm, **autointerp.CONFIG["tiny"])
    object.__setattr__(setup, "texts", lambda: source.documents("heldout"))
    server.reply = lambda number, body: says("on something" if is_explaining(body) else "None")
    result = autointerp.run(setup, {"sae": words_sae()})["sae"]
    assert not result.problems and result.corrected["autointerp_latents"] == 6
    scores = [v["score"] for v in result.unstructured.values()]  # the 2 strongest windows always fire
    assert all(10 / 14 <= score <= 12 / 14 for score in scores)


@pytest.mark.slow
def test_a_gpu_too_small_for_a_batch_changes_no_number(tmp_path):
    """Fails as scarce.check_every_batch says."""
    scarce.check_every_batch(windows.cases_of, make_setup(tmp_path), words_sae())


def test_requirements_name_the_setting(server):
    """Fails if a row without room for a window, or a count that is none, is let through."""
    config = autointerp.CONFIG["embedded"]
    assert autointerp.requirements(config, {}) == []
    assert "llm_context_size" in autointerp.requirements(config | {"llm_context_size": 20}, {})[0]
    assert "n_latents = 0" in autointerp.requirements(config | {"n_latents": 0}, {})[0]
