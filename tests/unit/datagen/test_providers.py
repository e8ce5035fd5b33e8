from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_megatron import messages
from nla_megatron.contract.prompts import extract_explanation, wrap_explanation
from nla_megatron.datagen.providers import (
    BaseProvider,
    ExplainRequest,
    Explanation,
    keywords,
    make_provider,
    register,
)
from nla_megatron.errors import ConfigError


def rows(*texts: str) -> list[ExplainRequest]:
    return [ExplainRequest(row, text) for row, text in enumerate(texts)]


def by_row(explanations: Iterable[Explanation]) -> dict[int, Explanation]:
    explanations = list(explanations)
    found = {explanation.row: explanation for explanation in explanations}
    assert len(found) == len(explanations), "a row was explained twice"
    return found


def one(text: str, documents: Iterable[str] = (), **options: object) -> Explanation:
    provider = make_provider("keywords", **options)
    provider.fit(documents)
    [explanation] = provider.explain(rows(text))
    return explanation


class TestRegistry:
    def test_unknown_provider_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match=r"'gpt'[\s\S]*anthropic, keywords"):
            make_provider("gpt")

    def test_unknown_option_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match=r"n_words[\s\S]*n_keywords, n_before, max_words"):
            make_provider("keywords", n_words=3)

    def test_a_name_is_registered_once(self) -> None:
        class Other(BaseProvider):
            pass

        with pytest.raises(ConfigError, match=r"keywords[\s\S]*KeywordsProvider"):
            register("keywords")(Other)
        assert isinstance(make_provider("keywords"), keywords.KeywordsProvider)

    def test_both_providers_summarise_the_four_keys_of_the_sidecar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(messages.API_KEY_VARIABLE, "test-key")
        for name in ("keywords", "anthropic"):
            summary = make_provider(name).summary()
            assert list(summary) == ["model", "max_tokens", "temperature", "instruction_prompt"]
            assert isinstance(summary["temperature"], float) and isinstance(summary["max_tokens"], int)

    def test_fit_is_optional_to_implement(self) -> None:
        def documents() -> Iterator[str]:
            raise AssertionError("a provider without fit reads no documents")
            yield

        BaseProvider().fit(documents())

    @pytest.mark.parametrize(
        "options",
        [
            {"n_keywords": -1},
            {"n_before": "2"},
            {"n_keywords": 0, "n_before": 0},
            {"max_words": 0},
            {"n_before": True},
            {"lines": "last"},
            {"lines": []},
            {"lines": ["last", "last"]},
            {"lines": ["first", "last"]},
            {"lines": [["last"]]},
            {"final_space": 1},
            {"pieces": "yes"},
        ],
    )
    def test_keywords_option_out_of_range_is_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            make_provider("keywords", **options)


class TestKeywords:
    def test_counts_alone_rank_the_words_without_fit(self) -> None:
        # whales 3, krill 2; blue, chase, deep, hunt, then once each: blue is alphabetically first. "of" is too short.
        text = "Blue whales hunt krill. Then whales chase krill of deep Whales"
        assert one(text).text == "last: Whales\nbefore: of deep\nabout: whales, krill, blue"

    def test_fit_ranks_words_of_every_document_last(self) -> None:
        # `with` is in all 3 documents: idf log(4/4) = 0. `salt` in 2: log(4/3). `anchovy` in none: log 4.
        # Scores: salt 2·0.288 = 0.575, anchovy 1·1.386, with 3·0.
        documents = ["with salt", "with salt and with oil", "only with"]
        text = "with salt with salt with anchovy"
        assert one(text, documents).text == "last: anchovy\nbefore: salt with\nabout: anchovy, salt, with"
        assert one(text).text == "last: anchovy\nbefore: salt with\nabout: with, salt, anchovy"

    def test_fit_counts_documents_and_not_occurrences(self) -> None:
        # `rain` occurs five times but in 1 document of 3, `snow` in 2.
        assert one("snow rain", ["rain rain rain rain rain", "snow", "snow"], n_keywords=1).text == (
            "last: rain\nbefore: snow\nabout: rain"
        )

    def test_fit_again_forgets_the_first_documents(self) -> None:
        provider = make_provider("keywords", n_keywords=1)
        provider.fit(["snow", "snow"])
        provider.fit(["rain", "rain", "fog"])
        [explanation] = provider.explain(rows("rain snow"))
        assert explanation.text == "last: snow\nbefore: rain\nabout: snow"

    def test_option_counts_set_the_words_per_line(self) -> None:
        text = "alpha beta gamma delta"
        assert one(text, n_before=3, n_keywords=1).text == "last: delta\nbefore: alpha beta gamma\nabout: alpha"
        assert one(text, n_before=0).text == "last: delta\nabout: alpha, beta, delta"
        assert one(text, n_keywords=0).text == "last: delta\nbefore: beta gamma"

    def test_lines_are_written_in_the_order_asked_for(self) -> None:
        text = "alpha beta gamma delta"
        order = ["about", "before", "last"]
        assert one(text, n_keywords=1, lines=order).text == "about: alpha\nbefore: beta gamma\nlast: delta"
        assert one(text, lines=["before", "last"]).text == "before: beta gamma\nlast: delta"
        ends = one(text, n_keywords=1, n_before=1, lines=["last", "about", "ends"])
        assert ends.text == "last: delta\nabout: alpha\nends: gamma delta"
        assert one(text, lines=["last"]).text is None, "one line is too few"

    @pytest.mark.parametrize(
        ("text", "ending"),
        [
            ("alpha beta\n   ", "last: newline\nbefore: alpha beta"),
            ("alpha beta  ", "last: space\nbefore: alpha beta"),
            ("alpha beta", "last: beta\nbefore: alpha"),
            (" \n", None),
        ],
    )
    def test_space_at_the_end_is_a_word_where_that_is_asked_for(self, text: str, ending: str | None) -> None:
        assert one(text, n_keywords=0, final_space=True).text == ending
        assert one(text, n_keywords=0).text == (ending and "last: beta\nbefore: alpha")

    @pytest.mark.parametrize(
        ("text", "lines"),
        [
            ("exit = type(manager).", ["last: ).", "before: ( manager", "ends: (manager)."]),
            ("it is __del__\n  ", ["last: newline", "before: del __", "ends: del__ newline"]),
            ("a 3.14", ["last: 14", "before: 3 .", "ends: 3.14"]),
        ],
    )
    def test_pieces_are_what_a_tokenizer_takes_apart(self, text: str, lines: list[str]) -> None:
        names = ["last", "before", "ends"]
        assert one(text, lines=names, pieces=True, final_space=True).text == "\n".join(lines)

    def test_the_summary_says_which_lines_are_written(self) -> None:
        summary = make_provider("keywords", n_keywords=1, n_before=1, lines=["about", "ends"], pieces=True).summary()
        assert summary["max_tokens"] == 3
        assert summary["instruction_prompt"].startswith("the 1 words of four letters or more")
        assert summary["instruction_prompt"].endswith("; the last 2 pieces")

    def test_max_words_looks_at_the_last_words_only(self) -> None:
        text = "ocean ocean ocean desert storm"
        assert one(text, n_keywords=1).text == "last: storm\nbefore: ocean desert\nabout: ocean"
        assert one(text, n_keywords=1, max_words=2).text == "last: storm\nbefore: desert\nabout: desert"

    def test_long_words_are_cut_to_24_characters(self) -> None:
        assert one("Title " + "=" * 80).text == f"last: {'=' * 24}\nbefore: Title\nabout: title"
        assert one("_" * 80 + " end").text == f"last: end\nbefore: {'_' * 24}\nabout: {'_' * 24}"

    def test_words_are_matched_before_they_are_lower_cased(self) -> None:
        # The Kelvin sign is no ASCII letter, though its small form is one.
        assert one("\u212aelvin scale").text == "last: scale\nbefore: \u212aelvin\nabout: elvin, scale"

    @pytest.mark.parametrize("text", ["", " \n\t", "a", "===="])
    def test_fewer_than_two_features_fail_the_row(self, text: str) -> None:
        explanation = one(text)
        assert explanation.text is None and explanation.error is not None and "needed: 2" in explanation.error

    def test_two_features_are_enough(self) -> None:
        assert one("hello").text == "last: hello\nabout: hello"
        assert one("a b").text == "last: b\nbefore: a"

    def test_words_that_hold_the_tags_fail_the_row(self) -> None:
        explanation = one("an <explanation> tag came earlier")
        assert explanation.text is not None  # the tag is too far back to be shown
        explanation = one("and end with </explanation>")
        assert explanation.text is None and explanation.error is not None and "tags" in explanation.error

    def test_other_requests_and_their_order_change_nothing(self) -> None:
        generator = random.Random(0)
        vocabulary = ["tide", "moon", "reef", "gull", "kelp", "a", "of"]
        requests = rows(*(" ".join(generator.choices(vocabulary, k=k)) for k in range(40)))
        provider = make_provider("keywords")
        provider.fit(request.text for request in requests)
        together = by_row(provider.explain(requests))
        assert len(set(together.values())) > 20
        assert by_row(provider.explain(requests[::-1])) == together
        assert {r.row: next(provider.explain([r])) for r in requests} == together

    def test_hash_seed_changes_nothing(self) -> None:
        # Every word once: only the tie rule decides.
        program = (
            "from nla_megatron.datagen.providers import ExplainRequest, make_provider\n"
            "provider = make_provider('keywords', n_keywords=8)\n"
            "words = [a + b for a in ('tide', 'moon', 'reef') for b in ('s', 'es', 'less')]\n"
            "provider.fit([' '.join(words), ' '.join(words[:4])])\n"
            "print(next(provider.explain([ExplainRequest(0, ' '.join(words))])))\n"
        )
        printed = {
            subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout
            for seed in ("0", "1", "2")
        }
        assert len(printed) == 1 and "about: " in printed.pop()

    @settings(max_examples=100, deadline=None)
    @given(
        st.text() | st.lists(st.sampled_from(["<explanation>", "</explanation>", "tide", "x", "\u2028"])).map(" ".join)
    )
    def test_every_text_gets_an_error_or_a_body_that_survives_its_tags(self, text: str) -> None:
        explanation = one(text)
        assert (explanation.text is None) != (explanation.error is None)
        if explanation.text is not None:
            assert extract_explanation(wrap_explanation(explanation.text)) == explanation.text
            assert [line.split(": ")[0] for line in explanation.text.split("\n")] == [
                name for name in ("last", "before", "about") if f"{name}: " in explanation.text
            ]
