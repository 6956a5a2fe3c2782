"""A judge: a language model behind an OpenAI-compatible chat endpoint.

    OPENAI_API_KEY     the key; an endpoint on this machine or in the local network needs none
    OPENAI_BASE_URL    https://api.openai.com/v1 if unset; for example http://localhost:8000/v1
    AUTOINTERP_MODEL   gpt-4o-mini if unset

The key goes into the Authorization header of requests to that address and nowhere else. An answer is kept by the hash
of its question, so that none is paid for twice; in which form the server wanted to be asked is no part of that.
"""

from __future__ import annotations

import contextlib
import html
import ipaddress
import json
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from evals.cache import digest
from evals.storage import network

OPENAI_URL, DEFAULT_MODEL = "https://api.openai.com/v1", "gpt-4o-mini"
PRICES = {"gpt-4o-mini": (0.15, 0.60)}  # USD per million tokens in and out
PRICES_FROM = "OpenAI's list price of July 2024"
CHARS_PER_TOKEN = 4  # of English, roughly; only for the estimate
FIRST_DELAY, LONGEST_DELAY = 1.0, 120.0  # seconds between tries; the first is doubled each time
FAILURES_IN_A_ROW = 10  # requests without an answer after which the endpoint counts as gone
MOST_ANSWERS = 50_000  # kept on disk, about 200 bytes each; the least recently used go first
ROOMS = (512, 2048, 8192)  # tokens for reasoning beside the answer's own: more where one was cut before it began
SLOW = 20  # tokens per second that a slow judge writes: the time that such room may take
WORDS, BODY = 300, 20_000  # characters of a server's complaint that are passed on, and that are looked at

CHECK = "check the endpoint and run the same command again: answers are kept"
UNPAID = {"insufficient_quota", "billing_not_active", "billing_hard_limit_reached"}  # OpenAI's: waiting mends none
NOBODY = {  # what lies under a connection that did not come about: what to say and to do
    "ProxyError": ("the proxy does not connect to {host}", "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"),
    "SSLError": ("no secure connection to {host}: its certificate is not trusted, or it speaks plain HTTP",
                 "write http:// in OPENAI_BASE_URL for a server without TLS; REQUESTS_CA_BUNDLE names certificates"),
    "ConnectionRefusedError": ("nothing listens at {host} (connection refused)",
                               "start the server there, or set OPENAI_BASE_URL to where it listens"),
    "gaierror": ("the host {host} is not found", "check OPENAI_BASE_URL and the network"),
}
LIMIT = re.compile(r"\bmax_\w*tokens\b")
LIMITS = ("max_tokens", "max_completion_tokens")  # the second since OpenAI's reasoning models
NOT_TAKEN = re.compile(
    r"(?:not|n't) (?:be )?(?:support|accept|permit|allow|recogni|valid|available|compatible|implement)|unsupported|"
    r"unrecogni[sz]ed|unknown|unexpected|\bextra\b|disallowed|deprecated|instead|\buse\b|"
    r"invalid (?:request )?(?:param|arg|field|key)", re.IGNORECASE)
BAD_VALUE = re.compile(
    r"too (?:large|small|high|low|long|big)|at (?:least|most)|(?:greater|less) than|context length|exceed",
    re.IGNORECASE)
NO_SYSTEM = re.compile(
    r"roles must alternate|only user.{0,30}assistant|developer instruction.{0,30}\bnot\b|"
    r"\bsystem\b.{0,40}\bnot (?:support|allow|accept|permit)|not support.{0,30}\bsystem\b", re.IGNORECASE)
TOO_SHORT = re.compile(r"could not finish the message|higher max_\w*tokens", re.IGNORECASE)  # OpenAI's words, in a 400
THINKS = r"(?:think|thinking|thought|reasoning)"


class Unanswered(Exception):
    """One request got no usable answer, for the reason given; others may. `advice`: what to do if none does."""

    def __init__(self, reason: str, advice: str = CHECK):
        super().__init__(reason)
        self.advice = advice


class _Again(Exception):
    """One try failed in a way that may pass: (reason, seconds the server asks to wait, advice if nobody answered)."""


class _Unfit(Exception):
    """The server wants to be asked in another form: (that form, why)."""


class Form(NamedTuple):
    """How this server takes a question."""

    limit: str | None = LIMITS[0]  # its name for the most tokens of an answer; None: it takes no limit
    room: int = 0  # tokens beside the answer's own, for reasoning
    system: bool = True  # whether it takes a system message
    refused: tuple[str, ...] = ()  # names for the limit that it did not take


@dataclass(frozen=True)
class Endpoint:
    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)


def endpoint() -> Endpoint | None:
    """The endpoint that the environment names, None if its key is lacking; ValueError for an unusable setting."""
    url = os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/").removesuffix("/chat/completions") or OPENAI_URL
    key = os.environ.get("OPENAI_API_KEY", "").strip() or None
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  ValueError if it is none
        more = "@" in parts.netloc or parts.query or parts.fragment
        usable = parts.scheme in ("http", "https") and parts.hostname and not more
    except ValueError:
        usable = False
    if not usable:  # its text stays unsaid: it may hold a password
        raise ValueError("OPENAI_BASE_URL is not a plain address\n"
                         f"write it like {OPENAI_URL} or http://localhost:8000/v1; the key belongs in OPENAI_API_KEY")
    if key and not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its exception
        raise ValueError("OPENAI_API_KEY holds a line break or a character that cannot be in a key\ncopy the key again")
    model = os.environ.get("AUTOINTERP_MODEL", "").strip() or DEFAULT_MODEL
    return Endpoint(url, model, key) if key or _local(parts.hostname) else None


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private  # loopback included
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost"))


class Judge:
    """Asks an endpoint from several threads; after its `with` block nothing more is sent, whatever is still queued.

    `folder` keeps the answers; `timeout` is seconds without a byte, `tries` counts the first, `sleep` waits between.
    """

    def __init__(self, at: Endpoint, folder: Path, timeout: float, tries: int, workers: int,
                 sleep: Callable | None = None, say: Callable[[str], None] = print):
        import requests

        self.at, self.folder, self.timeout, self.tries, self.workers = at, Path(folder), timeout, tries, workers
        self.say = say
        self.where = f"the judge {at.model} at {at.base_url}"
        self.form = Form()
        self._tokens_in = self._tokens_out = self._cut = 0
        self._failed_in_a_row = 0
        self._heard = False  # anything, from whoever listens at the address
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._sleep = sleep or self._stopped.wait  # ends at once when stopped
        self._jitter = random.Random()
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=workers))

    def __enter__(self) -> Judge:
        self.folder.mkdir(parents=True, exist_ok=True)
        oldest_first = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in oldest_first[: max(0, len(oldest_first) - MOST_ANSWERS)]:
            path.unlink(missing_ok=True)
        return self

    def __exit__(self, *error) -> None:
        self._stopped.set()
        self._session.close()

    def each(self, work: Callable, items: Iterable) -> Iterator[tuple]:
        """(item, work(item)) as they get done, `workers` at a time; the first exception ends it."""
        def guarded(item):
            with self._stopping():  # here, before this thread takes the next item
                return work(item)

        pool = ThreadPoolExecutor(self.workers)
        futures = {pool.submit(guarded, item): item for item in items}
        try:
            with self._stopping():  # Ctrl-C or a consumer that goes away: what is queued must not be sent and billed
                for future in as_completed(futures):
                    yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Nothing more is sent after an exception in here."""
        try:
            yield
        except BaseException:
            self._stopped.set()
            raise

    def forecast(self, requests: list[tuple[list[dict], int]]) -> str:
        """What requests, each messages and a limit of the answer's tokens, will take: "200 requests to …, about …"."""
        tokens_in = sum(len(message["content"]) // CHARS_PER_TOKEN for messages, _ in requests for message in messages)
        tokens_out = sum(limit + self.form.room for _, limit in requests)
        most, unknown = f"at most {tokens_out:,}", ""
        if self.form.limit is None:
            most, unknown = "any number", " (it takes no limit)"
        elif not self.form.room and self.at.model not in PRICES:  # those do not reason
            unknown = f" (if it reasons before it answers, more: at most {ROOMS[-1]:,} each)"
        return (f"{len(requests):,} requests to {self.at.model} at {self.at.base_url}, about {tokens_in:,} tokens in "
                f"and {most} out{self._price(tokens_in, tokens_out)}{unknown}")

    def spent(self) -> str:
        """The tokens of all answers that were asked for now, useless ones too, as the endpoint counts them."""
        price = self._price(self._tokens_in, self._tokens_out)
        cut = f"; {self._cut:,} answers were cut while it reasoned" if self._cut else ""
        return f"{self._tokens_in:,} tokens in, {self._tokens_out:,} out{price}{cut}"

    def _price(self, tokens_in: int, tokens_out: int) -> str:
        if self.at.base_url != OPENAI_URL or self.at.model not in PRICES:
            return ""
        price_in, price_out = PRICES[self.at.model]
        dollars = (tokens_in * price_in + tokens_out * price_out) / 1e6
        return f": ${dollars:.2f} at ${price_in:g} and ${price_out:g} per million, {PRICES_FROM}"

    def known(self, messages: list[dict], max_tokens: int) -> str | None:
        """The answer to this request if it was given before."""
        path = self._path(messages, max_tokens)
        try:
            text = without_reasoning(json.loads(path.read_text(encoding="utf-8"))["text"])
            os.utime(path)
            return text or None
        except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: it is asked again
            return None

    def forget(self, messages: list[dict], max_tokens: int) -> None:
        """Ask this again the next time."""
        with contextlib.suppress(OSError):
            self._path(messages, max_tokens).unlink()

    def ask(self, messages: list[dict], max_tokens: int) -> str:
        """The answer's text, never blank and without reasoning, asked only if it is not known.

        Unanswered after the last try. PermissionError, ValueError or ConnectionError if no other request can succeed.
        """
        text = self.known(messages, max_tokens)
        if text is not None:
            return text
        tried = 0
        while True:
            if self._stopped.is_set():
                raise Unanswered("stopped")
            form = self.form
            try:
                text = self._post(form, messages, max_tokens)
                self._keep(messages, max_tokens, text)
                self._failed_in_a_row = 0
                return text
            except _Unfit as unfit:  # no try: every form differs from those before, so these are few
                self._refit(form, *unfit.args)
            except _Again as failure:
                reason, asked_for, nobody = failure.args
                tried += 1
                if nobody and not self._heard and tried > 1:
                    raise ConnectionError(f"{self.where}: {reason}\n{nobody}") from None
                if tried >= self.tries:
                    self._give_up(Unanswered(reason, nobody or CHECK))
                apart = self._jitter.uniform(0.5, 1.0)  # or all threads come back together
                backoff = FIRST_DELAY * 2 ** (tried - 1) * apart
                self._sleep(min(LONGEST_DELAY, max(backoff, asked_for or 0.0)))
            except Unanswered as refused:
                self._give_up(refused)

    def _give_up(self, failure: Unanswered) -> None:
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= FAILURES_IN_A_ROW:
                raise ConnectionError(f"{self.where} left {self._failed_in_a_row} requests in a row unanswered: "
                                      f"{failure}\n{failure.advice}") from None
        raise failure from None

    def _refit(self, sent: Form, wanted: Form, why: str) -> None:
        """Ask in another form from here on, unless another thread has seen to it since."""
        with self._lock:
            if self.form is not sent:
                return
            self.form = wanted
        self.say(f"the judge {self.at.model} {why} from here on")

    def _path(self, messages: list[dict], max_tokens: int) -> Path:
        question = {"model": self.at.model, "messages": messages, "max_tokens": max_tokens}
        return self.folder / f"{digest([self.at.base_url, question])[:32]}.json"

    def _keep(self, messages: list[dict], max_tokens: int, text: str) -> None:
        path = self._path(messages, max_tokens)
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.write_text(json.dumps({"text": text}), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:  # a full disk costs the money of a second run, not this one
            print(f"judge: an answer is not stored ({error}); going on without", flush=True)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _signed(self, request):
        if self.at.key:  # as an auth function, because the HTTP library would let a .netrc entry replace a plain header
            request.headers["Authorization"] = f"Bearer {self.at.key}"
        return request

    def _post(self, form: Form, messages: list[dict], max_tokens: int) -> str:
        import requests

        seconds, question = self.timeout + form.room / SLOW, written(form, self.at.model, messages, max_tokens)
        try:
            reply = self._session.post(f"{self.at.base_url}/chat/completions", json=question, timeout=seconds,
                                       auth=self._signed, allow_redirects=False, proxies=self._proxies())
        except requests.Timeout:
            raise _Again(f"no answer within {seconds:g} s", None, None) from None
        except requests.RequestException as error:  # its text names objects by address
            raise self._unreached(error) from None
        self._heard = True
        body = reply.content.decode("utf-8-sig", errors="replace")
        answer = parsed(body)
        error = answer.get("error") if isinstance(answer, dict) and not answer.get("choices") else None
        if 200 <= reply.status_code < 300 and not error:
            return self._text(form, answer, body)
        raise self._refused(form, reply, body, answer)

    def _proxies(self) -> dict[str, str]:
        """This machine is not reached through a proxy, whatever the environment leaves out."""
        host = urlsplit(self.at.base_url).hostname
        with contextlib.suppress(ValueError):
            if host == "localhost" or ipaddress.ip_address(host).is_loopback:
                return {"no_proxy": host}
        return {}

    def _unreached(self, error: Exception) -> _Again:
        causes = {kind.__name__ for e in network.chain(error) for kind in type(e).__mro__}
        for name, (words, advice) in NOBODY.items():
            if name in causes:
                return _Again(words.format(host=urlsplit(self.at.base_url).netloc), None, advice)
        return _Again(f"no complete answer ({type(error).__name__})", None, None)

    def _refused(self, form: Form, reply, body: str, answer: Any) -> Exception:
        """What to raise for a reply that is no answer, in the server's own words."""
        error = answer.get("error") if isinstance(answer, dict) else None
        dicts = [part for part in (answer, error) if isinstance(part, dict)]
        fields = [str(part.get(key)) for part in dicts for key in ("code", "type", "status")]
        words = self._words(body, answer)
        status, reason = reply.status_code, f"HTTP {reply.status_code}"
        if status < 300:  # some gateways put the status into the body
            status = next((int(f) for f in fields if re.fullmatch("[45][0-9][0-9]", f)), 500)
            reason = "an error in place of an answer"
        reason += f": {words}" if words else f" ({reply.reason})"
        parameter = error.get("param") if isinstance(error, dict) else None
        if status == 400 and TOO_SHORT.search(words):
            return self._cut_short(form)
        fit = refitted(form, words, parameter) if status in (400, 422, 500) else None  # 500: llama.cpp's chat templates
        if fit:
            return _Unfit(*fit)
        if 300 <= status < 400:
            to = self._hidden(reply.headers.get("Location", "elsewhere")).partition("?")[0][:WORDS]
            to = to.removesuffix("/chat/completions")
            return ValueError(f"{self.where} sends the request on to {to} (HTTP {status})\n"
                              "set OPENAI_BASE_URL to the address that answers itself: the key is not sent on")
        if status == 401:
            return PermissionError(f"{self.where} refuses the key: {reason}\n"
                                   "set OPENAI_API_KEY to a key that is valid there")
        if status == 402 or UNPAID & {*fields}:
            return PermissionError(f"{self.where} wants to be paid first: {reason}\n"
                                   "top up the account and run the same command again: answers are kept")
        if status == 404 and "model" in words.lower():
            return ValueError(f"{self.where} does not exist: {reason}\nset AUTOINTERP_MODEL to a model that it offers")
        if status in (404, 405):
            return ValueError(f"{self.where} does not exist: {reason}\n"
                              "set OPENAI_BASE_URL to the address before /chat/completions, which mostly ends in /v1, "
                              "and AUTOINTERP_MODEL to a model that it offers")
        if status in (408, 409, 425, 429) or status >= 500:
            return _Again(reason, _seconds(reply.headers.get("Retry-After")), None)
        if status == 403:  # not at once: some gateways refuse single texts with it
            return Unanswered(reason, "use a key (OPENAI_API_KEY) that may ask this model, or another AUTOINTERP_MODEL")
        return Unanswered(reason, "mend what it names (the model is AUTOINTERP_MODEL, the address OPENAI_BASE_URL), "
                                  "or use another judge")

    def _text(self, form: Form, answer: Any, body: str) -> str:
        try:
            choice = answer["choices"][0]
            message = choice.get("message") or {"content": choice.get("text")}
            content = spoken(message.get("content"))
        except (LookupError, TypeError, AttributeError):
            raise _Again(f"not a chat completion: {self._words(body, None) or 'nothing'}", None, None) from None
        usage = answer.get("usage")
        with self._lock, contextlib.suppress(LookupError, TypeError):  # not every server counts
            self._tokens_in += usage["prompt_tokens"]
            self._tokens_out += usage["completion_tokens"]
        text, finish = without_reasoning(content), str(choice.get("finish_reason")).lower()
        aloud = text != content.strip() or message.get("reasoning_content") or message.get("reasoning")
        if finish in ("length", "max_tokens") and (aloud or _reasoned(usage) or not text):
            raise self._cut_short(form)
        if not text and (message.get("refusal") or finish == "content_filter"):
            words = self._words(str(message.get("refusal") or finish), None)
            raise Unanswered(f"it declines: {words}", "use another judge")
        if not text:
            words = self._words("", choice["error"]) if choice.get("error") else ""
            raise _Again(f"an answer without text: {words}" if words else "an answer without text", None, None)
        return text.replace(self.at.key, "***") if len(self.at.key or "") >= 12 else text

    def _cut_short(self, form: Form) -> Exception:
        """What to raise for an answer that ended before it began, because reasoning took all its tokens."""
        with self._lock:
            self._cut += 1
        larger = [room for room in ROOMS if room > form.room]
        if form.limit and larger:
            why = f"reasons, and an answer was cut before it began: room for {larger[0]:,} tokens more in each"
            return _Unfit(form._replace(room=larger[0]), why)
        return Unanswered(f"cut while it reasoned, with room for {form.room:,} tokens",
                          "let it reason less on the server, or set AUTOINTERP_MODEL to a model that reasons less")

    def _words(self, body: str, answer: Any) -> str:
        """A body on one short line without the key: the server's own words."""
        words = plain(body[:BODY]) if answer is None else said(answer)
        return self._hidden(" ".join(words[:BODY].split())[: 4 * WORDS])[:WORDS].strip()

    def _hidden(self, words: str) -> str:
        """Without the key, its parts of 8 characters and more, and what a server has masked itself."""
        key = self.at.key or ""
        if 0 < len(key) < 8:
            return re.sub(rf"(?<!\w){re.escape(key)}(?!\w)", "***", words)
        for size in range(len(key), 7, -1):
            for start in range(len(key) - size + 1):
                words = words.replace(key[start : start + size], "***")
        return re.sub(r"[\w-]*\*{3,}[\w*-]*", "***", words)


# ------------------------------------------------------------------------------------------------ forms of a question


def written(form: Form, model: str, messages: list[dict], max_tokens: int) -> dict:
    """The body of a request in that form."""
    if not form.system:
        instructions = [message["content"] for message in messages if message["role"] == "system"]
        first, *rest = [message for message in messages if message["role"] != "system"]
        messages = [first | {"content": "\n\n".join([*instructions, first["content"]])}, *rest]
    limit = {form.limit: max_tokens + form.room} if form.limit else {}
    return {"model": model, "messages": messages, **limit}


def refitted(form: Form, words: str, parameter: str | None) -> tuple[Form, str] | None:
    """The form that a complaint asks for and what to say of it; None if it asks for no other."""
    if form.system and NO_SYSTEM.search(words):
        return form._replace(system=False), "takes no system message: its text stands before the question"
    named = LIMIT.findall(f"{parameter or ''} {words}")
    if not named or named[0] != form.limit or not NOT_TAKEN.search(words) or BAD_VALUE.search(words):
        return None
    refused = (*form.refused, form.limit)
    name = next((name for name in (*named, *LIMITS) if name not in refused), None)
    instead = f"it is sent {name}" if name else "the length of its answers is not limited"
    return form._replace(limit=name, refused=refused), f"does not take {form.limit}: {instead}"


# ------------------------------------------------------------------------------------------------ what a server says


def parsed(body: str) -> Any:
    """A body as JSON, put together where it was sent as a stream of events; None if it is neither."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(body)
    lines = [line[5:].strip() for line in re.split("\r\n|\r|\n", body) if line.startswith("data:")]
    try:
        events = [json.loads(line) for line in lines if line and line != "[DONE]"]
    except (ValueError, RecursionError):
        return None
    events = [event for event in events if isinstance(event, dict)]
    failed = [event for event in events if event.get("error")]
    if failed:
        return failed[0]
    choices = [event["choices"][0] for event in events if isinstance(event.get("choices"), list) and event["choices"]]
    finish = [choice["finish_reason"] for choice in choices if isinstance(choice, dict) and choice.get("finish_reason")]
    if not finish and "[DONE]" not in lines:  # none, or it broke off
        return None
    deltas = [choice.get("delta") or {} for choice in choices if isinstance(choice, dict)]
    keys = ("content", "reasoning_content", "reasoning")
    message = {key: "".join(spoken(delta.get(key)) for delta in deltas) for key in keys}
    usage = [event["usage"] for event in events if event.get("usage")]
    return {"choices": [{"message": message, "finish_reason": (finish or [None])[-1]}], "usage": (usage or [None])[-1]}


def spoken(content: Any) -> str:
    """The text of a message's content, a string or a list of parts; what a model thinks has parts of its own."""
    if isinstance(content, list):
        return "".join(spoken(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _reasoned(usage: Any) -> bool:
    """Whether tokens of an answer went into reasoning, by the server's count."""
    with contextlib.suppress(LookupError, TypeError):
        return usage["completion_tokens_details"]["reasoning_tokens"] > 0
    return False


def without_reasoning(text: str) -> str:
    """What is left of a text behind the reasoning at its beginning, between tags; "" if that does not end."""
    text = text.split("<|channel|>final<|message|>")[-1].strip()  # of gpt-oss, where the server leaves its tokens in
    if text.startswith("<|channel|>analysis"):
        return ""
    if re.match(rf"<{THINKS}>", text):
        return re.split(rf"</{THINKS}>", text)[-1].strip() if re.search(rf"</{THINKS}>", text) else ""
    ends = list(re.finditer(rf"</{THINKS}>\s*(?:\n|$)", text))  # where the opening tag stands in the prompt
    return text[ends[-1].end() :].strip() if ends else text


def said(value: Any) -> str:
    """The words in a JSON body of an error, wherever the server puts them."""
    if isinstance(value, list):
        return "; ".join(said(part) for part in value)
    if not isinstance(value, dict):
        return str(value)
    keys = ("error", "message", "detail", "msg", "errors", "error_message")
    words = next((said(value[key]) for key in keys if value.get(key)), None) or json.dumps(value, ensure_ascii=False)
    if isinstance(value.get("loc"), list):  # pydantic's place of what is wrong
        words = ".".join(str(part) for part in value["loc"]) + f": {words}"
    inner = value.get("metadata")
    if isinstance(inner, dict) and inner.get("raw"):  # a gateway passes on its provider's body
        raw = str(inner["raw"])
        words += f": {said(parsed(raw) or raw)}"
    return words


def plain(body: str) -> str:
    """A body that is no JSON, without the tags of a web page."""
    if re.match(r"\s*<(?:!doctype|html|\?xml)", body, re.IGNORECASE):
        body = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", body, flags=re.IGNORECASE | re.DOTALL)
    return html.unescape(body)


def _seconds(retry_after: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which gives seconds or a date."""
    if not retry_after:
        return None
    try:
        return float(retry_after)
    except ValueError:
        with contextlib.suppress(ValueError):
            return parsedate_to_datetime(retry_after).timestamp() - time.time()
        return None
