"""Asking a model behind the Anthropic Messages API, through the official SDK: many requests, a bound on each of them.

Requests are concurrent and answered as they finish. One that fails costs itself only; a refusal that holds for every
one (key, model, quota) ends the call at once. The retry loop is here and not the SDK's, because the SDK sleeps between
attempts where nothing can wake it, and follows a `retry-after` of any length.
"""

from __future__ import annotations

import email.utils
import math
import os
import random
import re
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING

from nla_megatron.config.options import check_option
from nla_megatron.errors import ConfigError, ProviderError

if TYPE_CHECKING:
    import anthropic
    from anthropic.types import Message

API_KEY_VARIABLE = "ANTHROPIC_API_KEY"
# The backoff doubles from attempt to attempt up to this many seconds.
MAX_BACKOFF_SECONDS = 30.0
# A server that asks for a longer pause is not coming back within the run: the request fails.
MAX_RETRY_AFTER_SECONDS = 600.0
# The last API version that takes a temperature; the SDK's own refuses it whatever its value.
SAMPLING_API_VERSION = "2023-06-01"
# What the API samples at when no temperature is sent.
DEFAULT_TEMPERATURE = 1.0

# Refusals that every other request would meet too. Wrong key, no credit, not allowed, no such model.
_FATAL_STATUS = frozenset({401, 402, 403, 404})
_FATAL_CODES = frozenset({"contract_spend_limit_reached", "enforced_spend_limit_reached", "organization_on_hold"})
# A 400 is about one request (too long a text) unless its message is about an option or the account. Where the wording
# changes, the requests fail one by one instead, and the caller's limit on failures ends the stage.
_FATAL_BAD_REQUEST = re.compile(
    r"^\W*(model|temperature|max_tokens)\b|\b(invalid|unknown|unsupported) model\b|credit balance|usage limit",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Endpoint:
    """Which model is asked, and how patiently.

    Args:
        model: its name; the small one of the current family, as many short answers are wanted.
        max_tokens: the longest answer, what a model thinks before it included.
        temperature: 0 to 1; None leaves it to the API, which is all that recent models accept.
        concurrency: requests in flight at once, at most; more than the account's rate limit only adds retries.
        max_retries: further attempts after 408, 409, 429, 5xx, a lost connection or a timeout.
        timeout: seconds without a byte from the server before an attempt is given up.
        base_url: another server that speaks the Messages API; None for ANTHROPIC_BASE_URL, or the public one.
        backoff: seconds before the first retry, doubled for each further one; a `retry-after` takes its place.

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> Endpoint("claude-haiku-5-5", max_tokens=512, concurrency=4)
    """

    model: str = "claude-haiku-5-5"
    max_tokens: int = 2048
    temperature: float | None = None
    concurrency: int = 8
    max_retries: int = 6
    timeout: float = 120.0
    base_url: str | None = None
    backoff: float = 0.5

    def __post_init__(self) -> None:
        check_option("model", self.model, (str,), bool, "a model's name")
        check_option("max_tokens", self.max_tokens, (int,), lambda n: n >= 1, "an integer, at least 1")
        check_option("concurrency", self.concurrency, (int,), lambda n: n >= 1, "an integer, at least 1")
        check_option("max_retries", self.max_retries, (int,), lambda n: n >= 0, "an integer, at least 0")
        check_option("timeout", self.timeout, (int, float), lambda s: 0 < s < math.inf, "seconds, more than 0")
        check_option("backoff", self.backoff, (int, float), lambda s: 0 <= s < math.inf, "seconds, at least 0")
        if self.temperature is not None:
            check_option("temperature", self.temperature, (int, float), lambda t: 0 <= t <= 1, "from 0 to 1, or None")
        if self.base_url is not None:
            check_option("base_url", self.base_url, (str,), lambda u: u.startswith("http"), "an http(s) address")


@dataclass(frozen=True)
class Answer:
    """What came back for one request: exactly one of `text` and `error` is set.

    `number`: of the request; `stop_reason`: the API's, where there is a text.
    """

    number: int
    text: str | None
    error: str | None = None
    stop_reason: str | None = None


def api_key(without: str) -> str:
    """The key in the environment; `without` says what a user can do who has none. Raises ConfigError."""
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if not key:
        raise ConfigError(
            f"no {API_KEY_VARIABLE} in the environment",
            "a key of the Anthropic API",
            f"export {API_KEY_VARIABLE}, or {without}",
        )
    return key


class Asker:
    """One client for all calls: it is safe to share between threads and keeps connections open."""

    def __init__(self, endpoint: Endpoint, key: str, system: str):
        self.endpoint, self.system, self._key = endpoint, system, key

    def ask(self, texts: Sequence[str]) -> Generator[Answer, None, None]:
        """One answer per user's turn, in the order of completion. Leaving the loop cancels what is not in flight yet.

        Raises:
            ProviderError: a refusal that holds for every request, after all answers that came before it.
        """
        client = self._client
        stop = threading.Event()
        done: SimpleQueue[Future[Answer]] = SimpleQueue()

        def finished(future: Future[Answer]) -> None:
            done.put(future)  # before `stop`, so that whoever obeys `stop` queues up behind the error
            if not future.cancelled() and future.exception() is not None:
                stop.set()

        pool = ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="ask")
        try:
            for number, text in enumerate(texts):
                pool.submit(self._answer, client, number, text, stop).add_done_callback(finished)
            for _ in texts:
                yield done.get().result()
        finally:
            stop.set()
            # Requests in flight end by themselves within `timeout`; nobody waits for them.
            pool.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _client(self) -> anthropic.Anthropic:
        import anthropic

        end = self.endpoint
        return anthropic.Anthropic(
            api_key=self._key, base_url=end.base_url, timeout=end.timeout, max_retries=0, open_telemetry=False
        )

    def _answer(self, client: anthropic.Anthropic, number: int, text: str, stop: threading.Event) -> Answer:
        import anthropic

        if stop.is_set():
            return Answer(number, None, "not asked: the run was stopped")
        try:
            message = self._ask(client, text, stop)
        except anthropic.APIError as error:
            if _is_fatal(error):
                raise self._fatal(error) from error
            return Answer(number, None, self._reason(error))
        except ValueError as error:  # a body that says it is JSON and is not
            return Answer(number, None, f"the answer cannot be read: {error}")
        # The SDK does not validate: another server's answer may be a plain string, or lack its fields.
        content = getattr(message, "content", None)
        if not isinstance(content, list):
            return Answer(number, None, f"the answer is not a message: {str(message)[:80]!r}")
        texts = [getattr(block, "text", None) for block in content if getattr(block, "type", None) == "text"]
        if not all(isinstance(part, str) for part in texts) or None in content:
            return Answer(number, None, f"the answer's content is no text: {str(content)[:80]!r}")
        return Answer(number, "".join(map(str, texts)), None, message.stop_reason)

    def _ask(self, client: anthropic.Anthropic, text: str, stop: threading.Event) -> Message:
        """The model's answer; retries what a retry can cure, and raises the last `anthropic.APIError` otherwise."""
        import anthropic

        end = self.endpoint
        sampling = end.temperature is not None
        attempt = 0
        while True:
            try:
                return client.messages.create(
                    model=end.model,
                    max_tokens=end.max_tokens,
                    system=self.system,
                    messages=[{"role": "user", "content": text}],
                    extra_body={"temperature": end.temperature} if sampling else None,
                    extra_headers={"anthropic-version": SAMPLING_API_VERSION} if sampling else None,
                )
            except anthropic.APIError as error:
                delay = _retry_delay(error, end.backoff * 2**attempt)
                if delay is None or attempt >= end.max_retries or stop.wait(delay):
                    raise
                attempt += 1

    def _fatal(self, error: anthropic.APIError) -> ProviderError:
        return ProviderError(
            f"the API refused the request for {self.endpoint.model!r}: {self._reason(error)}",
            "a key, a model, options and a quota that the API accepts",
            f"check {API_KEY_VARIABLE}, the model and its options, and the account's limits; then run again",
        )

    def _reason(self, error: anthropic.APIError) -> str:
        import anthropic

        if isinstance(error, anthropic.APIStatusError):
            return f"{error.status_code} {error.type or ''}: {error.api_message or error.message}"[:300]
        if isinstance(error, anthropic.APITimeoutError):
            return f"timed out: no answer within {self.endpoint.timeout} s"
        return f"{error.message} {error.__cause__ or ''}".strip()[:300]


def _is_fatal(error: anthropic.APIError) -> bool:
    """Whether every other row would be refused for the same reason."""
    import anthropic

    if not isinstance(error, anthropic.APIStatusError):
        return False
    if error.status_code in _FATAL_STATUS or error.error_code in _FATAL_CODES:
        return True
    return error.status_code == 400 and _FATAL_BAD_REQUEST.search(error.api_message or error.message) is not None


def _retry_delay(error: anthropic.APIError, backoff: float) -> float | None:
    """Seconds to wait before the next attempt, or None when another one cannot help or must wait too long.

    Args:
        error: what the last attempt ended with.
        backoff: seconds to wait when the server names no time; shortened by up to a quarter, at random, so that
            rows refused together do not return together.
    """
    import anthropic

    if isinstance(error, anthropic.APIStatusError):
        if _is_fatal(error) or not _is_transient(error.status_code, error.response.headers):
            return None
        told = retry_after_seconds(error.response.headers)
        if told is not None:
            return told if told <= MAX_RETRY_AFTER_SECONDS else None
    elif not isinstance(error, anthropic.APIConnectionError):
        return None
    return min(backoff, MAX_BACKOFF_SECONDS) * random.uniform(0.75, 1.0)


def _is_transient(status: int, headers: Mapping[str, str]) -> bool:
    told = headers.get("x-should-retry")
    return told == "true" if told in ("true", "false") else status in (408, 409, 429) or status >= 500


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The pause in seconds that `retry-after` asks for as a number or an HTTP date; None when it asks for none."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        if date is None:
            return None
        seconds = email.utils.mktime_tz(date) - time.time()
    return seconds if seconds > 0 else None
