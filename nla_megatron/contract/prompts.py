"""The two prompts, the injection marker, and everything about them that a tokenizer can get wrong.

The AV's prompt is a chat turn (or, for a base model, plain text) holding `<concept>{marker}</concept>`; the activation
is injected at the marker. The AR's prompt is plain text with a fixed end; the reconstruction is read at its last token.
`PromptContract` records the token ids both depend on, and `check` compares them with the live tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import date
from string import Formatter
from typing import TYPE_CHECKING

from nla_megatron.contract.blocks import AvPromptSpec
from nla_megatron.contract.chat import Rendered, parse_day
from nla_megatron.contract.markers import (
    INJECT,
    check_av_template,
    choose_marker,
    marker_neighbours,
    messages_of,
    repeated,
    repeated_within,
    times,
)
from nla_megatron.contract.tokenizer import ModelTokenizer, wrapped
from nla_megatron.contract.tokens import live_bos_policy, stable_suffix
from nla_megatron.errors import ConfigError, MarkerError, NlaError, SidecarError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nla_megatron.contract.tokenizer import AnyTokenizer

AV_TEMPLATE = """Below, between <concept> tags, stands an activation vector: the state of a language model at the last \
token of a text it was reading. Describe what the vector says about that text. Name two or three features that would \
help to predict how the text goes on, the last of them about its final token, in about 80 to 100 words.

<concept><INJECT></concept>

Write your explanation inside <explanation> tags, and nothing outside of them."""
AV_PLAIN_TEMPLATE = """A language model was reading a text. Between <concept> tags stands an activation vector: its \
state at the last token that it had read. Between <explanation> tags follows what the vector says about that text: \
two or three features that help to predict how the text goes on, the last of them about its final token, in about 80 \
to 100 words.

<concept><INJECT></concept>

"""
AR_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"

_OPEN, _CLOSE = "<explanation>", "</explanation>"


def wrap_explanation(text: str) -> str:
    """The response that supervised training teaches: the explanation on its own lines between the tags."""
    return f"{_OPEN}\n{text}\n{_CLOSE}"


def bare_explanation(text: str) -> str | None:
    """A gold explanation without the tags that somebody left around the whole of it; None where tags stand elsewhere:
    taught between tags of their own, those could not be told apart.
    """
    body = text.strip()
    if body.startswith(_OPEN) and body.endswith(_CLOSE):
        text = body[len(_OPEN) : -len(_CLOSE)].strip()
    return None if _OPEN in text or _CLOSE in text else text


def extract_explanation(response: str) -> str | None:
    """The text between the tags, stripped, or None when the response is not exactly one tagged explanation.

    Strict on purpose: text outside the tags, a second tag, an open end (truncation) or an empty body all fail, because
    whatever passes here is rewarded.
    """
    body = response.strip()
    if not (body.startswith(_OPEN) and body.endswith(_CLOSE)):
        return None
    if body.count(_OPEN) != 1 or body.count(_CLOSE) != 1:
        return None
    return body[len(_OPEN) : -len(_CLOSE)].strip() or None


@dataclass(frozen=True)
class PromptContract:
    """Both templates and the token ids they give with one tokenizer.

    Attributes:
        templates_av: user message with `<INJECT>` where the marker goes, once or several times.
        templates_ar: format string with one `{explanation}`; literal braces are doubled.
        marker, marker_id, left_id, right_id: the marker, its id, and the ids at ±1 in the templated prompt.
        ar_suffix_ids: the last ids of every AR prompt, whatever the explanation. Empty only when a sidecar of another
            trainer did not record them.
        bos_policy: `"tokenizer"`: AR prompts get the special tokens the tokenizer adds; `"none"`: they get none.
        repeats: (least, most) activations of a row, for each of which a prompt repeats the one marker of
            `templates_av`; None where the template has as many as every prompt.
        form: how the AV's message becomes its prompt. Compared by `AvPromptSpec.same_prompt`, since others record less.

    Example:
        >>> contract = PromptContract.derive(tokenizer, AV_TEMPLATE, AR_TEMPLATE)
        >>> ids = contract.av_prompt_ids(tokenizer)
        >>> ids[contract.marker_position(ids)] == contract.marker_id
        True
    """

    templates_av: str
    templates_ar: str
    marker: str
    marker_id: int
    left_id: int
    right_id: int
    ar_suffix_ids: tuple[int, ...]
    bos_policy: str
    repeats: tuple[int, int] | None = None
    form: AvPromptSpec = field(default=AvPromptSpec(), compare=False)

    @classmethod
    def derive(
        cls,
        tokenizer: AnyTokenizer,
        av_template: str = AV_TEMPLATE,
        ar_template: str = AR_TEMPLATE,
        marker: str | None = None,
        bos_policy: str | None = None,
        positions: int = 1,
        repeats: tuple[int, int] | None = None,
        form: AvPromptSpec = AvPromptSpec(),  # noqa: B008 (frozen)
    ) -> PromptContract:
        """Compute the contract from the live tokenizer.

        Args:
            tokenizer: a fast tokenizer; with a chat template, unless `form` says plain.
            av_template: holds `<INJECT>` exactly `positions` times.
            ar_template: holds `{explanation}` exactly once, with text after it.
            marker: None chooses it by `choose_marker`.
            bos_policy: None takes the tokenizer's own habit; `"none"` keeps special tokens out of AR prompts, and out
                of a plain AV prompt.
            repeats: as the attribute; `positions` is then 1.
            form: its `text` is made anew; without a `date`, a chat template that writes one is told today's.

        Raises:
            MarkerError: no usable marker, or the given one is not, or repeated it has other neighbours.
            ConfigError: a malformed template, one whose marker cannot be repeated, an unknown policy, or a chat
                template that is not there or fails.
        """
        tokenizer = wrapped(tokenizer)
        check_av_template(av_template, positions)
        _check_ar_template(ar_template)
        if bos_policy not in (None, "none", "tokenizer"):
            raise ConfigError(f"bos_policy {bos_policy!r}", "none or tokenizer", "set one of the two")
        form = fixed_form(tokenizer, av_template, form)
        assert form.text is not None
        policy = "none" if bos_policy == "none" else live_bos_policy(tokenizer)
        special = form.format == "plain" and policy != "none"
        longest = form.text if repeats is None else repeated_within(form.text, av_template, repeats[1])
        marker = choose_marker(tokenizer, longest, special) if marker is None else marker
        # What stands before the first of a shorter prompt's markers, and behind its last, is what does so here.
        count = positions if repeats is None else repeats[1]
        ids = marker_neighbours(tokenizer, longest, marker, count, special)
        suffix_ids = stable_suffix(tokenizer, ar_template, policy)
        return cls(av_template, ar_template, marker, *ids, suffix_ids, policy, repeats, form)

    def fixed(self, tokenizer: AnyTokenizer) -> PromptContract:
        """The same with the AV's prompt recorded, as `av_prompt_ids` has it, where it was not."""
        form = self.form if self.form.text is not None else fixed_form(wrapped(tokenizer), self.templates_av, self.form)
        return replace(self, form=form)

    def check(self, tokenizer: AnyTokenizer) -> None:
        """Compare what is recorded with what the live tokenizer gives.

        `bos_policy: none` holds with every tokenizer, since nothing is asked of it. How many ids of the AR prompt's end
        are recorded differs between trainers, so these are compared with the end of a plain prompt.

        Raises:
            MarkerError: the marker is not one token, or not once in the prompt.
            SidecarError: the first difference, with the recorded and the live value.
        """
        tokenizer = wrapped(tokenizer)
        try:
            self._check(tokenizer)
        except (MarkerError, SidecarError) as error:
            if self.literal(tokenizer) is None:
                raise
            import transformers

            raise type(error)(
                error.found, error.expected,
                f"transformers {transformers.__version__} makes {type(tokenizer.fast).__name__} anew by its own rules; "
                "tokenizer.json as it stands gives the recorded ids: set tokenizer_class to PreTrainedTokenizerFast in "
                f"{tokenizer.directory}/tokenizer_config.json (`adopt` does so)",
            ) from error  # fmt: skip

    def _check(self, tokenizer: ModelTokenizer) -> None:
        live = PromptContract.derive(
            tokenizer, self.templates_av, self.templates_ar, self.marker, self.bos_policy, self.positions, self.repeats,
            self.form,
        )  # fmt: skip
        plain_ids = live.ar_ids(tokenizer, "A plain sentence.")
        for name in ("marker_id", "left_id", "right_id", "ar_suffix_ids", "bos_policy"):
            recorded, actual = getattr(self, name), getattr(live, name)
            if name == "ar_suffix_ids":
                actual = tuple(plain_ids[len(plain_ids) - len(recorded) :])
            if recorded != actual:
                raise SidecarError(
                    f"the sidecar records {name} = {recorded} for marker {self.marker!r}",
                    f"{name} = {actual}, as tokenizer {tokenizer.name!r} gives it",
                    "use the tokenizer the sidecar was written for, or build the data again with this one",
                )
        if not self.form.same_prompt(live.form):
            raise SidecarError(
                f"the sidecar records the AV prompt {self.form.text!r}",
                f"{live.form.text!r}, as tokenizer {tokenizer.name!r} gives it",
                "use the tokenizer, chat template included, that the sidecar was written for, or build the data again "
                "with this one",
            )  # fmt: skip

    def literal(self, tokenizer: ModelTokenizer) -> ModelTokenizer | None:
        """The tokenizer read as its file stands, where that gives what is recorded and `tokenizer` does not."""
        other = tokenizer.as_it_stands()
        return other if other is not None and self._holds(other) and not self._holds(tokenizer) else None

    def _holds(self, tokenizer: ModelTokenizer) -> bool:
        try:
            self._check(tokenizer)
        except NlaError:
            return False
        return True

    def with_suffix_of(self, other: PromptContract) -> PromptContract:
        """The same contract with as many of the AR prompt's last ids recorded as `other` has, where both agree.

        Trainers record different numbers of them; one that ends like the other says nothing else.
        """
        mine, theirs = self.ar_suffix_ids, other.ar_suffix_ids
        common = min(len(mine), len(theirs))
        agree = mine[len(mine) - common :] == theirs[len(theirs) - common :]
        return replace(self, ar_suffix_ids=theirs) if agree else self

    @property
    def positions(self) -> int:
        """How often the marker stands in the AV's template."""
        return self.templates_av.count(INJECT)

    def markers(self, activations: int) -> int:
        """How often the marker stands in the prompt of a row with so many activations.

        Raises:
            MarkerError: more or fewer than `repeats` says.
        """
        if self.repeats is None:
            return self.positions
        least, most = self.repeats
        if not least <= activations <= most:
            raise MarkerError(
                f"a prompt for {activations} activations", f"{least} to {most}, as the sidecar says",
                "use the table and the model of one build",
            )  # fmt: skip
        return activations

    def messages(self, activations: int = 1) -> list[dict[str, str]]:
        """The AV prompt as tables store it: one user message with the literal `<INJECT>`.

        Args:
            activations: of the row, where `repeats` says that a prompt repeats the marker; raises as `markers`.
        """
        count = self.markers(activations)
        return messages_of(self.templates_av if self.repeats is None else repeated(self.templates_av, count))

    def prompt_text(self, tokenizer: AnyTokenizer, activations: int = 1) -> str:
        """The text of the AV's prompt, with `<INJECT>`: as it is recorded, or as the tokenizer gives it now.

        Args:
            activations: as of `messages`.
        """
        count, text = self.markers(activations), self.fixed(tokenizer).form.text
        assert text is not None
        return text if self.repeats is None else repeated_within(text, self.templates_av, count)

    def av_prompt_ids(
        self,
        tokenizer: AnyTokenizer,
        messages: Sequence[Mapping[str, str]] | None = None,
        activations: int = 1,
    ) -> list[int]:
        """Token ids of the AV prompt, marker in place, up to where the response starts; `activations` as `messages`.

        A chat template writes every special token itself, so the tokenizer adds none: there is never a second BOS. A
        plain prompt gets the tokenizer's own, as AR prompts do.
        """
        tokenizer = wrapped(tokenizer)
        if messages is None:
            text = self.prompt_text(tokenizer, activations)
        else:
            text = _text_of(tokenizer, messages, self.form).text
        special = self.form.format == "plain" and self.bos_policy != "none"
        return tokenizer.beginning(text.replace(INJECT, self.marker), special).ids

    def marker_position(self, ids: Sequence[int], prompt_length: int | None = None) -> int:
        """The first of `marker_positions`, and of most contracts the only one."""
        return self.marker_positions(ids, prompt_length)[0]

    def marker_positions(
        self, ids: Sequence[int], prompt_length: int | None = None, activations: int = 1
    ) -> tuple[int, ...]:
        """Where to inject: the positions of the prompt with the marker and both its neighbours, ascending.

        Args:
            ids: a prompt, or a prompt followed by a response.
            prompt_length: how many of `ids` are the prompt; None means all. Give it for a whole sequence, since the
                policy can write the marker, neighbours included, into its response.
            activations: as of `messages`.

        Raises:
            MarkerError: fewer or more of them than the template has, or the row activations.
        """
        count = self.markers(activations)
        prompt = list(ids if prompt_length is None else ids[:prompt_length])
        wanted = [self.left_id, self.marker_id, self.right_id]
        positions = [p for p in range(1, len(prompt) - 1) if prompt[p - 1 : p + 2] == wanted]
        if len(positions) != count:
            raise MarkerError(
                f"ids {wanted} stand at positions {positions} of a prompt of {len(prompt)} tokens "
                f"(the marker {self.marker!r} alone: {prompt.count(self.marker_id)} times)",
                "exactly one position" if count == 1 else f"{count} positions",
                f"check that the row's prompt holds <INJECT> {times(count)}, between its neighbours",
            )
        return tuple(positions)

    def ar_ids(self, tokenizer: AnyTokenizer, explanation: str) -> list[int]:
        """Token ids of the AR prompt; the reconstruction is read at the last one.

        Raises:
            SidecarError: the ids do not end with `ar_suffix_ids`.
        """
        return self.ar_prompt_ids(tokenizer, self.templates_ar.format(explanation=explanation))

    def ar_prompt_ids(self, tokenizer: AnyTokenizer, prompt: str) -> list[int]:
        """Token ids of a fully formatted AR prompt, as ar_sft tables hold it; raises SidecarError as `ar_ids` does."""
        ids = wrapped(tokenizer).encode(prompt, special=self.bos_policy != "none")
        tail = tuple(ids[len(ids) - len(self.ar_suffix_ids) :])
        if tail != self.ar_suffix_ids:
            raise SidecarError(
                f"an AR prompt ends with the ids {tail}; its text ends with {prompt[-40:]!r}",
                f"the recorded ar_suffix_ids {self.ar_suffix_ids}",
                "use the tokenizer the sidecar was written for, or an AR template that ends in plain words",
            )
        return ids

    def av_response_ids(self, tokenizer: AnyTokenizer, response: str) -> list[int]:
        """Token ids of a response, end token included, as supervised training appends them to the prompt.

        In a chat it is the end of a turn that the chat template writes, otherwise the tokenizer's own.

        Raises:
            ConfigError: nothing ends a response.
        """
        tokenizer = wrapped(tokenizer)
        end = tokenizer.end_id if self.form.format == "plain" else tokenizer.turn_end_id
        return [*tokenizer.encode(response), end]


def fixed_form(tokenizer: ModelTokenizer, av_template: str, form: AvPromptSpec) -> AvPromptSpec:
    """The same with the AV's prompt as it is now, and the day where the chat template writes one.

    Raises:
        ConfigError: a chat template that is not there or fails, or a plain prompt with options for one.
    """
    rendered = _text_of(tokenizer, messages_of(av_template), form)
    day = form.date or date.today().isoformat()
    return replace(form, text=rendered.text, date=day if rendered.dated else None)


def _text_of(tokenizer: ModelTokenizer, messages: Sequence[Mapping[str, str]], form: AvPromptSpec) -> Rendered:
    if form.format == "plain":
        return Rendered("\n\n".join(message["content"] for message in messages), False)
    day = None if form.date is None else parse_day(form.date, "templates.date")
    return tokenizer.render(messages, form.chat_options, day)


def _check_ar_template(template: str) -> None:
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError:  # a single brace somewhere
        fields = []
    if fields != [("explanation", "", None)]:
        raise ConfigError(
            f"the AR template {template!r}",
            "{explanation} exactly once and no other single brace",
            "write {explanation} where the explanation goes and double every literal brace",
        )
