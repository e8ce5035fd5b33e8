r"""Problems in files: GSM8K (`#### answer`), Hendrycks' MATH (`\boxed{answer}`), and tables with an answer of its own.

Each reads `path` (parquet, JSON lines, JSON, or a directory of them), or `hub` with `subset` and `split`. A question is
a text or a list of messages; a reference is a text, or a mapping with `ground_truth`; a row of anything else is
refused. Problems whose reference is null or cannot be read are left out and counted; a file of which none
can be read is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

from nla_megatron.errors import ColumnError, ConfigError
from nla_megatron.hub import Name, dataset_path, split_files
from nla_megatron.tasks.math.answers import readable
from nla_megatron.tasks.math.problems import Problem, register
from nla_megatron.tasks.math.responses import after_hashes, last_box
from nla_megatron.tasks.rows import Row, question_of, read_rows, reference_of


@dataclass
class FileProvider:
    """What providers of files share.

    `path`: a file or a directory. `hub`: a data set of the hub in its place, as owner/name. `limit`: at most so many
    rows, the first ones.
    """

    path: str = ""
    hub: str = ""
    subset: str = ""
    split: str = "train"
    limit: int | None = None
    _problems: list[Problem] = field(init=False, repr=False)
    unreadable: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.hub):
            raise ConfigError(
                f"path={self.path!r} and hub={self.hub!r} of a provider of problems", "exactly one of them",
                "set data= (or the provider's path), or hub=",
            )  # fmt: skip
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} of a provider of problems", "1 or more", "raise limit")
        paths = [dataset_path(self.path, "path")] if self.path else split_files(self._named, "hub")
        rows = [row for path in paths for row in read_rows(path, self._columns)][: self.limit]
        made = [self._problem(row) for row in rows if self._wanted(row)]
        self._problems = [each for each in made if readable(each.reference)]
        self.unreadable = len(made) - len(self._problems)
        if not self._problems:
            found = f"no reference answer can be read in {len(made)} problems" if made else f"none of {len(rows)} rows"
            raise ColumnError(f"{found} of {self.path or self.hub}", self._expected, "correct the file or the options")

    def __len__(self) -> int:
        return len(self._problems)

    def problem(self, index: int) -> Problem:
        return self._problems[index]

    @property
    def conversations(self) -> bool:
        """Whether something was said before some question."""
        return any(problem.before for problem in self._problems)

    @property
    def _named(self) -> Name:
        return Name(self.hub, None, self.subset, self.split, "dataset")

    @property
    @abstractmethod
    def _columns(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def _expected(self) -> str: ...

    @abstractmethod
    def _problem(self, row: Row) -> Problem: ...

    def _wanted(self, row: Row) -> bool:
        return True


@dataclass
class QuestionAnswers(FileProvider):
    """A column of questions and one of answers, in whichever form."""

    question_column: str = "question"
    answer_column: str = "answer"

    @property
    def _columns(self) -> tuple[str, ...]:
        return (self.question_column, self.answer_column)


@register("gsm8k")
@dataclass
class Gsm8k(QuestionAnswers):
    """Columns `question` and `answer`; the reference follows the answer's last `####`."""

    @property
    def _expected(self) -> str:
        return f"'#### number' at the end of {self.answer_column!r}"

    def _problem(self, row: Row) -> Problem:
        text, bare = reference_of(row, self.answer_column, bare=False)
        return _made(row, self.question_column, after_hashes(text or "") or (text if bare else None))


@register("hendrycks_math")
@dataclass
class HendrycksMath(FileProvider):
    r"""Columns `problem`, `solution`, `level` ("Level 3") and `type` (the subject); the reference is the last box.

    `levels`, `subjects`: keep those only; none keep all. Subjects are compared without case, spaces and underscores.
    """

    levels: tuple[int, ...] = ()
    subjects: tuple[str, ...] = ()
    subject_column: str = "type"
    question_column: str = "problem"
    answer_column: str = "solution"

    def __post_init__(self) -> None:
        wrong = [level for level in self.levels if not 1 <= level <= 5]
        if wrong:
            raise ConfigError(f"levels={list(self.levels)}", "levels of 1 to 5", "correct levels")
        super().__post_init__()

    @property
    def _columns(self) -> tuple[str, ...]:
        return (self.question_column, self.answer_column, "level", self.subject_column)

    @property
    def _expected(self) -> str:
        chosen = f" of levels {list(self.levels)} and subjects {list(self.subjects)}"
        return f"\\boxed{{answer}} in {self.answer_column!r}" + (chosen if self.levels or self.subjects else "")

    @cached_property
    def _subjects(self) -> set[str]:
        return {_plain(subject) for subject in self.subjects}

    def _wanted(self, row: Row) -> bool:
        level = "".join(character for character in _level(row) if character.isdigit())
        fits = not self.levels or (level.isdigit() and int(level) in self.levels)
        return fits and (not self._subjects or _plain(row.text(self.subject_column)) in self._subjects)

    def _problem(self, row: Row) -> Problem:
        text, bare = reference_of(row, self.answer_column, bare=False)
        reference = last_box(text or "") or (text if bare else None)
        return _made(row, self.question_column, reference, _level(row), row.text(self.subject_column))


@register("table")
@dataclass
class AnswerTable(QuestionAnswers):
    """A column of questions and one of bare answers."""

    @property
    def _expected(self) -> str:
        return f"an answer in {self.answer_column!r}"

    def _problem(self, row: Row) -> Problem:
        return _made(row, self.question_column, reference_of(row, self.answer_column, bare=True)[0])


def _made(row: Row, question_column: str, reference: str | None, level: str = "", subject: str = "") -> Problem:
    question = question_of(row, question_column)
    return Problem(question.text, reference, level, subject, question.before, row.place)


def _level(row: Row) -> str:
    """`Level 3`, of which some copies of the data set have the number alone."""
    level = row["level"]
    return f"Level {level}" if isinstance(level, int) and not isinstance(level, bool) else row.text("level")


def _plain(subject: str) -> str:
    return "".join(character for character in subject.casefold() if character.isalnum())
