from __future__ import annotations

import email.utils
import threading
import time

import pytest

from nla_megatron import messages
from nla_megatron.datagen.providers import ExplainRequest, Explanation, Provider, anthropic, make_provider
from nla_megatron.errors import ConfigError, ProviderError
from tests.support.messages_server import MessagesServer, Received, Reply, within

GOOD = "<explanation>\nA recipe is under way.\nThe final token is a comma.\n</explanation>"
GOOD_BODY = "A recipe is under way.\nThe final token is a comma."


@pytest.fixture
def api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ANTHROPIC_BASE_URL", "ANTHROPIC_CUSTOM_HEADERS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in (("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1"), ("ANTHROPIC_API_KEY", "test-key")):
        monkeypatch.setenv(variable, value)


def rows(*texts: str) -> list[ExplainRequest]:
    return [ExplainRequest(row, text) for row, text in enumerate(texts)]


def asking(server: MessagesServer, **options: object) -> Provider:
    """A provider that asks `server`, with short pauses."""
    return make_provider("anthropic", **{"base_url": server.base_url, "timeout": 20.0, "backoff": 0.01, **options})


def explain(provider: Provider, *texts: str, seconds: float = 30.0) -> dict[int, Explanation]:
    """What the provider says, by row; every text answered exactly once."""
    explanations = within(seconds, lambda: list(provider.explain(rows(*texts))))
    assert sorted(explanation.row for explanation in explanations) == list(range(len(texts)))
    return {explanation.row: explanation for explanation in explanations}


def wait_for_workers(seconds: float = 10.0) -> None:
    """Returns when no worker thread is left; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while any(thread.name.startswith("ask_") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "worker threads outlive the call"
        time.sleep(0.02)


@pytest.mark.usefixtures("api_key")
class TestAnthropicRequest:
    def test_request_holds_model_limit_instructions_and_text(self) -> None:
        with MessagesServer(lambda _: Reply(GOOD)) as server:
            found = explain(asking(server, model="some-model", max_tokens=321), "Beat the eggs, \n")
        assert found == {0: Explanation(0, GOOD_BODY, None)}
        [request] = server.received
        assert request.path == "/v1/messages" and request.headers["authorization"] == "Bearer test-key"
        assert request.body == {
            "model": "some-model",
            "max_tokens": 321,
            "system": anthropic.INSTRUCTION_PROMPT,
            "messages": [{"role": "user", "content": "<text>Beat the eggs, \n</text>"}],
        }

    def test_temperature_goes_with_the_api_version_that_takes_it(self) -> None:
        with MessagesServer(lambda _: Reply(GOOD)) as server:
            provider = asking(server, temperature=0.25)
            assert explain(provider, "x")[0].text == GOOD_BODY
        [request] = server.received
        assert request.body["temperature"] == 0.25 == provider.summary()["temperature"]
        assert request.headers["anthropic-version"] == messages.SAMPLING_API_VERSION

    def test_missing_key_is_named_before_any_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(messages.API_KEY_VARIABLE, " ")
        with (
            MessagesServer(lambda _: Reply(GOOD)) as server,
            pytest.raises(ConfigError, match=r"ANTHROPIC_API_KEY[\s\S]*keywords"),
        ):
            asking(server)
        assert not server.received

    def test_key_shows_in_no_representation(self) -> None:
        assert "test-key" not in repr(make_provider("anthropic"))

    @pytest.mark.parametrize(
        "options",
        [{"max_tokens": n} for n in (0, "400", True)]
        + [{"timeout": 0}, {"timeout": float("inf")}, {"concurrency": 0}, {"max_retries": -1}, {"backoff": -1}]
        + [{"temperature": 1.5}, {"base_url": "localhost"}, {"model": ""}],
    )
    def test_option_out_of_range_is_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            make_provider("anthropic", **options)

    def test_no_rows_ask_nothing(self) -> None:
        with MessagesServer(lambda _: Reply(GOOD)) as server:
            assert explain(asking(server)) == {}
        assert not server.received


@pytest.mark.usefixtures("api_key")
class TestAnthropicRetries:
    def test_retry_after_is_honoured(self) -> None:
        def behaviour(request: Received) -> Reply:
            return Reply("slow", status=429, headers={"retry-after": "0.6"}) if request.attempt == 1 else Reply(GOOD)

        with MessagesServer(behaviour) as server:
            assert explain(asking(server), "x")[0].text == GOOD_BODY
        first, second = server.received
        assert second.at - first.at >= 0.6

    def test_overload_is_retried_until_it_passes(self) -> None:
        def behaviour(request: Received) -> Reply:
            return Reply("overloaded", status=529) if request.attempt <= 2 else Reply(GOOD)

        with MessagesServer(behaviour) as server:
            assert explain(asking(server), "x")[0].text == GOOD_BODY
        assert len(server.received) == 3

    def test_lost_connection_is_retried(self) -> None:
        with MessagesServer(lambda request: Reply(GOOD, drop=request.attempt == 1)) as server:
            assert explain(asking(server), "x")[0].text == GOOD_BODY
        assert len(server.received) == 2

    def test_backoff_doubles(self) -> None:
        with MessagesServer(lambda _: Reply("broken", status=500)) as server:
            explain(asking(server, backoff=0.2, max_retries=2), "x")
        a, b, c = (request.at for request in server.received)
        assert b - a >= 0.15 and c - b >= 0.3  # a quarter may be taken off

    def test_failing_row_leaves_the_others_delivered(self) -> None:
        def behaviour(request: Received) -> Reply:
            return Reply("broken", status=500) if "bad" in request.user else Reply(GOOD)

        with MessagesServer(behaviour) as server:
            found = explain(asking(server, max_retries=2, concurrency=2), "a", "bad", "c", "d", "e")
        assert {row for row, e in found.items() if e.text == GOOD_BODY} == {0, 2, 3, 4}
        assert str(found[1].error).startswith("500") and "broken" in str(found[1].error)
        assert [r.attempt for r in server.received if "bad" in r.user] == [1, 2, 3]

    def test_slow_answer_fails_the_row(self) -> None:
        def behaviour(request: Received) -> Reply:
            return Reply(GOOD, delay=20.0 if "slow" in request.user else 0.0)

        with MessagesServer(behaviour) as server:
            found = explain(asking(server, timeout=1.0, max_retries=2, concurrency=2), "slow", "quick", seconds=60)
        assert found[0].text is None and "1.0 s" in str(found[0].error)
        assert found[1].text == GOOD_BODY

    def test_retry_after_beyond_the_limit_fails_the_row(self) -> None:
        with MessagesServer(lambda _: Reply("later", status=429, headers={"retry-after": "3600"})) as server:
            error = explain(asking(server), "x")[0].error
        assert error is not None and error.startswith("429") and len(server.received) == 1

    def test_server_can_forbid_the_retry(self) -> None:
        with MessagesServer(lambda _: Reply("no", status=500, headers={"x-should-retry": "false"})) as server:
            assert explain(asking(server), "x")[0].error is not None
        assert len(server.received) == 1

    @pytest.mark.parametrize(
        ("value", "seconds"), [("2", 2.0), ("0", None), ("-1", None), ("nan", None), ("soon", None)]
    )
    def test_retry_after_reads_seconds(self, value: str, seconds: float | None) -> None:
        assert messages.retry_after_seconds({"retry-after": value}) == seconds

    def test_retry_after_reads_dates(self) -> None:
        seconds = messages.retry_after_seconds({"retry-after": email.utils.formatdate(time.time() + 50, usegmt=True)})
        assert seconds is not None and 30 < seconds <= 50
        assert messages.retry_after_seconds({}) is None


@pytest.mark.usefixtures("api_key")
class TestAnthropicAnswers:
    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            (Reply("<explanation>\none\ntwo", stop_reason="max_tokens"), "max_tokens"),
            (Reply("Sure! one\ntwo"), "no well-formed"),
            (Reply("", stop_reason="refusal"), "refusal"),
            (Reply("<explanation>Only one feature.\n\n</explanation>"), "features in the answer: 1, needed: 2"),
            (Reply(raw="<html>proxy</html>", headers={"content-type": "text/html"}), "not a message"),
            (Reply(raw="{}"), "not a message"),
            (Reply(raw='{"cut'), "cannot be read"),
            (Reply("prompt is too long: 9 tokens > 8 maximum", status=400), "too long"),
            (Reply("too large", status=413), "413"),
        ],
    )
    def test_unusable_answer_fails_its_row_only(self, reply: Reply, reason: str) -> None:
        with MessagesServer(lambda request: reply if "bad" in request.user else Reply(GOOD)) as server:
            found = explain(asking(server, concurrency=1), "bad", "good")
        assert found[0].text is None and reason in str(found[0].error)
        assert found[1] == Explanation(1, GOOD_BODY, None)
        assert len(server.received) == 2  # asking again would cost the same answer

    def test_blank_lines_between_features_are_dropped(self) -> None:
        with MessagesServer(lambda _: Reply("<explanation>\n one \n\n\ntwo\n</explanation>")) as server:
            assert explain(asking(server), "x")[0].text == "one\ntwo"


@pytest.mark.usefixtures("api_key")
class TestAnthropicFatal:
    @pytest.mark.parametrize(
        ("status", "message"),
        [
            *[(401, "invalid key"), (402, "no credit"), (403, "not allowed"), (404, "model: no-such-model")],
            *[(400, "model: unknown name"), (400, "`temperature` is deprecated"), (400, "Your credit balance is low")],
        ],
    )
    def test_refusal_for_all_rows_stops_at_once(self, status: int, message: str) -> None:
        with MessagesServer(lambda _: Reply(message, status=status)) as server:
            provider = asking(server, concurrency=3)
            with pytest.raises(ProviderError) as raised:
                explain(provider, *map(str, range(60)))
            wait_for_workers()
        assert str(status) in raised.value.found and message in raised.value.found
        assert len(server.received) <= 6  # three in flight, and the three that replace them at the very most

    def test_refusal_stops_the_workers_while_the_reader_is_busy(self) -> None:
        with MessagesServer(
            lambda request: Reply(GOOD) if ">0<" in request.user else Reply("key", status=401)
        ) as server:
            results = asking(server, concurrency=1).explain(rows(*map(str, range(60))))
            assert within(20, lambda: next(results)).text == GOOD_BODY
            time.sleep(0.5)  # for requests that must not come: one that is late only lets a fault pass
            assert len(server.received) <= 3
            with pytest.raises(ProviderError):
                within(20, lambda: next(results))

    def test_rows_finished_before_the_refusal_are_delivered(self) -> None:
        with MessagesServer(
            lambda request: Reply("key", status=401) if ">2<" in request.user else Reply(GOOD)
        ) as server:
            results = asking(server, concurrency=1).explain(rows(*map(str, range(5))))
            assert [within(20, lambda: next(results)).row for _ in range(2)] == [0, 1]
            with pytest.raises(ProviderError, match="401"):
                within(20, lambda: next(results))

    def test_refusal_wakes_a_row_that_waits_to_retry(self) -> None:
        waiting = threading.Event()

        def behaviour(request: Received) -> Reply:
            if "busy" in request.user:
                waiting.set()
                return Reply("slow", status=429, headers={"retry-after": "40"})
            assert waiting.wait(20)
            return Reply("key", status=401, delay=0.3)

        with MessagesServer(behaviour) as server:
            with pytest.raises(ProviderError):
                explain(asking(server, concurrency=2), "busy", "refused")
            wait_for_workers()
        assert len(server.received) == 2


@pytest.mark.usefixtures("api_key")
class TestAnthropicConcurrency:
    def test_bound_is_reached_and_never_passed(self) -> None:
        together = threading.Barrier(3)

        def behaviour(_: Received) -> Reply:
            together.wait(20)  # breaks, and so fails the rows, unless three are in flight at once
            return Reply(GOOD, delay=0.15)

        with MessagesServer(behaviour) as server:
            found = explain(asking(server, concurrency=3, max_retries=0), *map(str, range(9)), seconds=60)
        assert [found[row].text for row in range(9)] == [GOOD_BODY] * 9
        assert server.peak_in_flight == 3

    def test_results_come_as_they_finish(self) -> None:
        second_seen = threading.Event()

        def behaviour(request: Received) -> Reply:
            if ">first<" in request.user:
                assert second_seen.wait(20)
            return Reply(GOOD)

        with MessagesServer(behaviour) as server:
            results = asking(server, concurrency=2).explain(rows("first", "second"))
            assert within(20, lambda: next(results)).row == 1
            second_seen.set()
            assert within(20, lambda: next(results)).row == 0

    def test_leaving_the_loop_asks_no_more(self) -> None:
        with MessagesServer(lambda _: Reply(GOOD, delay=0.05)) as server:
            results = asking(server, concurrency=1).explain(rows(*map(str, range(200))))
            within(20, lambda: next(results))
            within(20, results.close)  # type: ignore[attr-defined]
            wait_for_workers()
            assert len(server.received) < 20

    def test_leaving_the_loop_wakes_a_row_that_waits_to_retry(self) -> None:
        busy = Reply("slow", status=429, headers={"retry-after": "40"})
        with MessagesServer(lambda r: busy if "busy" in r.user else Reply(GOOD, delay=0.3)) as server:
            results = asking(server, concurrency=2).explain(rows("busy", "good"))
            assert within(20, lambda: next(results)).row == 1
            within(20, results.close)  # type: ignore[attr-defined]
            wait_for_workers()
        assert len(server.received) == 2
