"""A chat template turned into text, in bounded time and memory.

A chat template is a program from the model's repository. Transformers runs it in Jinja's sandbox, which keeps
it from files and from Python's internals, but not from looping for ever (`range` inside `range`) or from
filling the memory (`"x" * 10**9`). Here the same template runs with three bounds:

    time      CPU seconds of this thread, checked every few hundred lines of the template
    memory    growth of the process since the template began, checked at the same places
    sizes     of every value made by an operator, a call, a filter or a display (`[a, a]`); where one step
              could make a very large value, its size is computed before the step runs

The first two are checked by a trace function, which works on every thread and system and can stop a loop
between two of its lines. The third is needed because a single step runs in C, between two lines.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from gptq_cli.errors import ModelError
from gptq_cli.wording import first_line

CPU_SECONDS = 1.0
GROWTH_BYTES = 400 << 20
SIZE = 2_000_000
"""Characters of a text, or items of a nested list, that a template may make at once; and 4 times what the
conversation holds."""
TEMPLATE_CHARACTERS = 1_000_000
_LINES = 256
_INTEGER_BITS = 100_000
_WIDE = re.compile(r"%(?:\([^)]*\))?[#0\- +]*[0-9.]*[0-9]{5}|\{[^{}]*:[^{}]*[0-9]{5}")
"""A field of `%` or `format` that is padded to 10,000 characters or more."""
_GIVEN = re.compile(r"%(?:\([^)]*\))?[#0\- +]*[0-9.]*\*|\{[^{}]*:[^{}]*\{")
"""A field whose width is one of the values."""
_HINT = "the template would not end, or would fill the memory: repair it, take it from the model's author"


class _Stop(BaseException):
    """Leaves a template that ran for too long; no `except Exception` on the way catches it."""


class _TooLarge(Exception):  # noqa: N818 - private, turned into a ModelError here
    """One step of a template would make something too large."""


class _Watch:
    """The bounds of one rendering, and the trace function that checks them."""

    def __init__(self, size: int) -> None:
        import psutil

        self.size = size
        self._process = psutil.Process()
        self._until = time.thread_time() + CPU_SECONDS
        self._max_bytes = self._process.memory_info().rss + GROWTH_BYTES
        self._lines = 0
        self._stopped = False

    def __call__(self, frame: FrameType, event: str, arg: object) -> _Watch | None:
        self._lines += 1
        if self._lines % _LINES == 0:
            self.read()
        return self if frame.f_code.co_filename == "<template>" else None

    def read(self) -> None:
        """Raise `_Stop` where a bound is exceeded; once, because the code that handles it is traced too."""
        if self._stopped:
            return
        if time.thread_time() > self._until:
            self._stopped = True
            raise _Stop(f"it runs for more than {CPU_SECONDS:g} s")
        if self._process.memory_info().rss > self._max_bytes:
            self._stopped = True
            raise _Stop(f"it takes more than {GROWTH_BYTES >> 20} MiB of memory")

    def check(self, size: int) -> None:
        """Raise `_TooLarge` for a value that is too large; check the other bounds after a large one."""
        if size > self.size:
            raise _TooLarge(f"it makes a value of {size} characters or items; allowed: {self.size}")
        if size > 100_000:
            self.read()


_WATCH: ContextVar[_Watch] = ContextVar("_WATCH")


def chat_text(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """The conversation as the tokenizer's chat template writes it: what Transformers' `apply_chat_template`
    gives with `tokenize=False`.

    Raises `ModelError` where the template runs for too long or makes something too large; what the template
    itself raises (Jinja's `TemplateError`, for one) is passed on.
    """
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    if own is not PreTrainedTokenizerBase.apply_chat_template:  # no Jinja template (mistral-common)
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        if not isinstance(text, str):
            raise TypeError(f"it returns a {type(text).__name__}, not a text")
        return text
    source = str(tokenizer.get_chat_template())
    if len(source) > TEMPLATE_CHARACTERS:
        raise ModelError(
            f"the chat template has {len(source)} characters; allowed: {TEMPLATE_CHARACTERS}", hint=_HINT
        )
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    variables = {**tokenizer.special_tokens_map, "messages": _prepared(plain), "tools": None}
    variables |= {"documents": None, "add_generation_prompt": add_generation_prompt}
    with _bounded(SIZE + 4 * _characters(plain)):
        return str(_compiled(source).render(**variables))


def template_fault(source: str) -> str:
    """Why Jinja cannot read a chat template; "" where it can. The template is compiled, and does not run."""
    from jinja2 import TemplateError

    try:
        with _bounded(SIZE):  # constants are folded while it is compiled
            _compiled(source)
    except (TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        return first_line(error) + (f" (line {line})" if line is not None else "")
    except ModelError as error:
        return error.message
    return ""


def _prepared(messages: list[dict[str, Any]]) -> Any:
    """The messages as the installed Transformers shows them to a template."""
    from transformers.utils import chat_template_utils

    found: Any = messages
    for step in ("_plain_template_data", "_alias_reasoning_fields"):
        found = getattr(chat_template_utils, step, lambda value: value)(found)
    return found


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(item) for item in value.values())
    return sum(_characters(item) for item in value) if isinstance(value, (list, tuple)) else 1


@contextmanager
def _bounded(size: int) -> Iterator[None]:
    """Bound time, memory and sizes inside the `with`, on this thread."""
    watch = _Watch(size)
    token, before = _WATCH.set(watch), sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    except (_Stop, _TooLarge) as error:
        raise ModelError(f"the chat template was stopped: {error}", hint=_HINT) from None
    except MemoryError:
        raise ModelError(
            "the chat template was stopped: there is no memory left for it", hint=_HINT
        ) from None
    finally:
        sys.settrace(before)
        _WATCH.reset(token)


def _checked(value: Any) -> Any:
    """`value`, if it is not too large."""
    if isinstance(value, (str, bytes)):
        _WATCH.get().check(len(value))
    elif isinstance(value, (list, tuple, dict)):
        watch = _WATCH.get()
        watch.check(_weight(value, {}))
    return value


def _weight(value: object, known: dict[int, int]) -> int:
    """Items and characters of a nested value as if it were written out. A part that occurs twice counts
    twice, but is measured only once."""
    if isinstance(value, str):
        return 1 + len(value)
    if not isinstance(value, (list, tuple, dict)):
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # a value inside itself
        items: Iterable[object] = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_weight(item, known) for item in items)
    return known[id(value)]


def _check_operator(operator: str, left: Any, right: Any) -> None:
    """Before an operator runs: raise `_TooLarge` for `"x" * 10**9` and the like."""
    watch = _WATCH.get()
    if operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(items, (str, bytes, list, tuple)):
                watch.check(max(0, times) * max(1, _weight(items, {})))
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(0, right)
        )
        if abs(left) > 1 and bits > _INTEGER_BITS:
            raise _TooLarge(f"it makes a number of {bits} bits; allowed: {_INTEGER_BITS}")
    if operator == "%" and isinstance(left, (str, bytes)):
        values = (
            right.values() if isinstance(right, dict) else right if isinstance(right, tuple) else (right,)
        )
        _check_format(str(left), "%", values)


def _check_format(text: str, mark: str, values: Iterable[object]) -> None:
    """Before a text is formatted: refuse very wide fields, and values repeated too often."""
    watch, values = _WATCH.get(), list(values)
    if _WIDE.search(text):
        raise _TooLarge("it pads a text to more than 9999 characters")
    if _GIVEN.search(text):
        watch.check(max((abs(value) for value in values if isinstance(value, int)), default=0))
    watch.check(len(text) + text.count(mark) * _weight(values, {}))


def _check_call(function: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Before a method of a text, a number or a list runs: refuse results that are too large."""
    owner = getattr(function, "__self__", None)
    if not isinstance(owner, (str, bytes, int, list, tuple, dict)):
        return
    watch, name = _WATCH.get(), getattr(function, "__name__", "")
    values = (*arguments, *named.values())
    if name == "replace" and len(values) >= 2:
        watch.check(_replaced(owner, values[0], values[1]))
    elif name == "join" and values and isinstance(values[0], (list, tuple, dict)):
        watch.check(_weight(values[0], {}) + len(values[0]) * len(owner))  # type: ignore[arg-type]
    elif name == "translate" and values and isinstance(values[0], dict):
        longest = max((len(v) for v in values[0].values() if isinstance(v, str)), default=1)
        watch.check(len(owner) * max(1, longest))  # type: ignore[arg-type]
    elif name == "expandtabs":
        width = values[0] if values and isinstance(values[0], int) else 8
        watch.check(len(owner) + owner.count("\t") * max(0, width))  # type: ignore[arg-type, union-attr]
    for value in values:
        if isinstance(value, int) and name in ("ljust", "rjust", "center", "zfill", "to_bytes"):
            watch.check(value)


def _replaced(text: Any, old: Any, new: Any) -> int:
    """Characters of `text.replace(old, new)`, at most."""
    found = len(text) // max(1, len(str(old))) + 1
    return len(text) + found * len(str(new))


def _check_filter(name: str, value: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Before a filter runs: refuse arguments that make its result too large."""
    watch, values = _WATCH.get(), (*arguments, *named.values())
    numbers = [abs(item) for item in values if isinstance(item, int)]
    texts = [item for item in values if isinstance(item, str)]
    if name == "round" and any(number > 300 for number in numbers):
        raise _TooLarge("it rounds to more than 300 places")
    if name == "replace" and len(values) >= 2:
        watch.check(_replaced(str(value), values[0], values[1]))
    elif name == "format":
        _check_format(str(value), "%", values)
    elif name in ("indent", "wordwrap", "tojson", "pprint", "join", "xmlattr"):
        width = max([*numbers, *(len(text) for text in texts), 1])
        lines = str(value).count("\n") + 1 if isinstance(value, str) else 1
        if name == "join" or not isinstance(value, str):
            lines = _weight(value, {})
        watch.check(width * lines)
    elif name not in ("default", "d", "int", "float", "sum"):
        watch.check(max(numbers, default=0))


def _guarded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is checked before and after it runs. Jinja may pass its context as the first argument."""
    skip = 1 if hasattr(run, "jinja_pass_arg") else 0

    @functools.wraps(run)
    def guarded(*arguments: Any, **named: Any) -> Any:
        if len(arguments) > skip:
            _check_filter(name, arguments[skip], arguments[skip + 1 :], named)
        return _checked(run(*arguments, **named))

    return guarded


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> Any:
    """The template in Transformers' own environment, with the steps that make values checked."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    known = _compile_jinja_template("").environment
    sandbox: Any = type(known)
    environment: Any = object.__new__(_bounded_kind(sandbox))
    environment.__dict__.update(known.__dict__)
    environment.overlayed, environment.linked_to, environment.cache = True, known, None
    environment.filters = {name: _guarded(name, run) for name, run in known.filters.items()}
    environment.extensions = {key: value.bind(environment) for key, value in known.extensions.items()}
    return environment.from_string(source)


@functools.cache
def _bounded_kind(base: Hashable) -> Any:
    """A subclass of the sandbox whose operators, calls, displays and concatenations are checked."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame

    class Generator(CodeGenerator):
        """Writes `environment.checked(…)` around the code for a list, a tuple or a dictionary."""

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - Jinja's name
            self.write("environment.concat([str(part) for part in ")
            self.visit_List(nodes.List(node.nodes), frame)
            self.write("])")

        def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
            self._wrapped(super().visit_List, node, frame)

        def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
            self._wrapped(super().visit_Dict, node, frame)

        def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
            if node.ctx == "load":
                self._wrapped(super().visit_Tuple, node, frame)
            else:
                super().visit_Tuple(node, frame)

        def _wrapped(self, visit: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
            self.write("environment.checked(")
            visit(node, frame)
            self.write(")")

    class Bounded(base):  # type: ignore[misc, valid-type]  # the sandbox that Transformers chose
        """The sandbox, with bounds."""

        code_generator_class = Generator
        intercepted_binops = frozenset({"*", "**", "%", "+"})
        checked = staticmethod(_checked)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return _checked(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            _check_call(__obj, args, kwargs)
            return _checked(super().call(__context, __obj, *args, **kwargs))

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None

            @functools.wraps(wrapped)
            def checked(*args: Any, **kwargs: Any) -> str:
                _check_format(str(value.__self__), "{", (*args, *kwargs.values()))
                return str(wrapped(*args, **kwargs))

            return checked

        @staticmethod
        def concat(parts: Iterable[str]) -> str:
            """Join what a template, a macro or a `set` block wrote."""
            watch, kept, size = _WATCH.get(), [], 0
            for part in parts:
                kept.append(part)
                size += len(part)
                watch.check(size)
            return "".join(kept)

    return Bounded
