"""A judge: a language model behind an OpenAI-compatible chat endpoint.

    OPENAI_API_KEY     the key; an endpoint on this machine or in the local network needs none
    OPENAI_BASE_URL    https://api.openai.com/v1 if unset; for example http://localhost:8000/v1
    AUTOINTERP_MODEL   gpt-4o-mini if unset

The key goes into the Authorization header of requests to that address and nowhere else. An answer is kept by the hash of its
request, so that none is paid for twice.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from evals.cache import digest

OPENAI_URL, DEFAULT_MODEL = "https://api.openai.com/v1", "gpt-4o-mini"
PRICES = {"gpt-4o-mini": (0.15, 0.60)}  # USD per million tokens in and out
PRICES_FROM = "OpenAI's list price of July 2024"
CHARS_PER_TOKEN = 4  # of English, roughly; only for the estimate
FIRST_DELAY, LONGEST_DELAY = 1.0, 120.0  # seconds between tries; the first is doubled each time
FAILURES_IN_A_ROW = 10  # requests without an answer after which the endpoint counts as gone
MOST_ANSWERS = 50_000  # kept on disk, about 200 bytes each; the least recently used go first


class Unanswered(Exception):
    """One request got no usable answer, for the reason given; others may."""


class _Again(Exception):
    """One try failed in a way that may pass: (reason, seconds the server asks to wait or None)."""


@dataclass(frozen=True)
class Endpoint:
    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)


def endpoint() -> Endpoint | None:
    """The endpoint that the environment names, None without a key where one is needed; ValueError for an unusable setting."""
    url = os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/") or OPENAI_URL
    key = os.environ.get("OPENAI_API_KEY", "").strip() or None
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and not (parts.query or parts.fragment)
    except ValueError:
        plain = False
    if not plain:  # its text stays unsaid: it may hold a password
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

    `folder` keeps the answers; `timeout` is seconds without a byte, `tries` counts the first; `sleep` waits between them.
    """

    def __init__(self, at: Endpoint, folder: Path, timeout: float, tries: int, workers: int, sleep: Callable | None = None):
        import requests

        self.at, self.folder, self.timeout, self.tries, self.workers = at, Path(folder), timeout, tries, workers
        self._tokens_in = self._tokens_out = 0
        self._failed_in_a_row = 0
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
        """What these requests, each messages and a limit of the answer's tokens, will take: "200 requests to …, about …"."""
        tokens_in = sum(len(message["content"]) // CHARS_PER_TOKEN for messages, _ in requests for message in messages)
        tokens_out = sum(limit for _, limit in requests)
        return (f"{len(requests):,} requests to {self.at.model} at {self.at.base_url}, about {tokens_in:,} tokens in and at most "
                f"{tokens_out:,} out{self._price(tokens_in, tokens_out)}")

    def spent(self) -> str:
        """The tokens of all answers that were asked for now, as the endpoint counts them."""
        return f"{self._tokens_in:,} tokens in, {self._tokens_out:,} out{self._price(self._tokens_in, self._tokens_out)}"

    def _price(self, tokens_in: int, tokens_out: int) -> str:
        if self.at.base_url != OPENAI_URL or self.at.model not in PRICES:
            return ""
        price_in, price_out = PRICES[self.at.model]
        dollars = (tokens_in * price_in + tokens_out * price_out) / 1e6
        return f": ${dollars:.2f} at ${price_in:g} and ${price_out:g} per million, {PRICES_FROM}"

    def known(self, messages: list[dict], max_tokens: int) -> str | None:
        """The answer to this request if it was given before."""
        path = self._path(self._body(messages, max_tokens))
        try:
            text = json.loads(path.read_text(encoding="utf-8"))["text"]
            os.utime(path)
            return text
        except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: it is asked again
            return None

    def ask(self, messages: list[dict], max_tokens: int) -> str:
        """The answer's text, never blank, asked only if it is not known.

        Unanswered after the last try. PermissionError, ValueError or ConnectionError where no other request can succeed either.
        """
        if (text := self.known(messages, max_tokens)) is not None:
            return text
        body = self._body(messages, max_tokens)
        for attempt in range(self.tries):
            if self._stopped.is_set():
                raise Unanswered("stopped")
            try:
                text = self._post(body)
                self._keep(body, text)
                self._failed_in_a_row = 0
                return text
            except _Again as failure:
                reason, asked_for = failure.args
                if attempt + 1 < self.tries:
                    backoff = FIRST_DELAY * 2**attempt * self._jitter.uniform(0.5, 1.0)  # apart, or all come back together
                    self._sleep(min(LONGEST_DELAY, max(backoff, asked_for or 0.0)))
            except Unanswered as refused:
                reason = str(refused)
                break
        self._count_failure(reason)
        raise Unanswered(reason)

    def _count_failure(self, reason: str) -> None:
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= FAILURES_IN_A_ROW:
                raise ConnectionError(f"the judge {self.at.model} at {self.at.base_url} left {self._failed_in_a_row} requests in a row "
                                      f"unanswered: {reason}\ncheck the endpoint and run the same command again: answers are kept")

    def _body(self, messages: list[dict], max_tokens: int) -> dict:
        return {"model": self.at.model, "messages": messages, "max_tokens": max_tokens}

    def _path(self, body: dict) -> Path:
        return self.folder / f"{digest([self.at.base_url, body])[:32]}.json"

    def _keep(self, body: dict, text: str) -> None:
        path = self._path(body)
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

    def _post(self, body: dict) -> str:
        import requests

        try:
            reply = self._session.post(f"{self.at.base_url}/chat/completions", json=body, timeout=self.timeout, auth=self._signed,
                                       allow_redirects=False)
        except requests.Timeout:
            raise _Again(f"no answer within {self.timeout:g} s", None) from None
        except requests.RequestException as error:  # its text names objects by address
            raise _Again(f"no complete answer ({type(error).__name__})", None) from None
        if reply.status_code == 200:
            return self._text(reply)
        reason = f"HTTP {reply.status_code}"
        message, code = self._complaint(reply)
        where = f"the judge {self.at.model} at {self.at.base_url}"
        if reply.status_code == 401:
            raise PermissionError(f"{where} refuses the key: {reason}: {message}\nset OPENAI_API_KEY to a key that is valid there")
        if reply.status_code == 402 or code == "insufficient_quota":
            raise PermissionError(f"{where} wants to be paid first: {reason}: {message}\n"
                                  "top up the account and run the same command again: answers are kept")
        if reply.status_code == 404:
            raise ValueError(f"{where} does not exist: {reason}: {message}\nset OPENAI_BASE_URL and AUTOINTERP_MODEL to what it offers")
        if reply.status_code in (408, 409, 425, 429) or reply.status_code >= 500:
            raise _Again(reason, _seconds(reply.headers.get("Retry-After")))
        raise Unanswered(reason)

    def _text(self, reply) -> str:
        try:
            answer = reply.json()
            text = answer["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _Again("not a chat completion", None) from None
        if not isinstance(text, str) or not text.strip():
            raise _Again("an answer without text", None)
        usage = answer.get("usage")
        with self._lock, contextlib.suppress(LookupError, TypeError):  # not every server counts
            self._tokens_in += usage["prompt_tokens"]
            self._tokens_out += usage["completion_tokens"]
        return text.strip()

    def _complaint(self, reply) -> tuple[str, str | None]:
        """The server's own words on one short line without the key, and its error code."""
        try:
            error = reply.json()["error"]
            words, code = (error["message"], error.get("code")) if isinstance(error, dict) else (error, None)
        except (ValueError, LookupError, TypeError):
            words, code = reply.text, None
        words = " ".join(str(words).split())
        return (words.replace(self.at.key, "***") if self.at.key else words)[:200], code


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
