"""The bounded Jinja environment, and a template compiled in it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from edge.errors import CancelledError, TemplateError
from edge.template.budget import (
    ITEM_BYTES,
    Budget,
    Refused,
    joined_bytes,
    n_bytes,
    running,
    spending,
)
from edge.template.filters import allowed_filters
from edge.template.text import (
    OTHER_METHODS,
    TEXT_METHODS,
    BoundFormat,
    as_text,
    check_format,
    check_percent,
)

if TYPE_CHECKING:
    from edge.native.cancel import Cancel
    from edge.template.budget import Limits

__all__ = ["Program"]

_MAX_INT_BITS = 4096
_SCOPES = ("_loop_vars", "_block_vars")  # arguments that jinja2 adds for itself
_MAX_COMPARISONS = 8  # in one a < b < c
_VIEWS: Any = (type({}.items()), type({}.keys()), type({}.values()))


class Program:
    """A compiled template. Raises TemplateError where it does not compile, CancelledError."""

    def __init__(self, source: str, limits: Limits, cancel: Cancel | None = None) -> None:
        self._limits = limits
        if len(source) > limits.source_chars:
            raise TemplateError(
                f"the chat template has {len(source)} characters, at most {limits.source_chars}"
            )
        environment, budget = _environment(), Budget(limits, cancel)
        try:
            with spending(budget):
                tree = _Bounding(environment).visit(environment.parse(source))
                code = environment.compile(tree)
                budget.look()
            self._template = jinja2.Template.from_code(environment, code, environment.globals)
        except Refused as error:
            raise TemplateError(f"the chat template was refused: {error}") from None
        except CancelledError:
            raise
        except jinja2.TemplateSyntaxError as error:
            message = _one_line(error.message or "")
            raise TemplateError(f"the chat template, line {error.lineno}: {message}") from error
        except Exception as error:  # RecursionError, MemoryError, errors of Python's compiler
            raise TemplateError(f"the chat template does not compile: {_reason(error)}") from error

    def render(self, names: dict[str, Any], cancel: Cancel | None = None) -> str:
        """The output. TemplateError says what the template raised or which bound it broke.
        Raises CancelledError.
        """
        budget = Budget(self._limits, cancel)
        try:
            with spending(budget):
                return self._run(budget, names)
        except _Raised as error:
            raise TemplateError(f"the chat template says: {_one_line(str(error))}") from None
        except Refused as error:
            raise TemplateError(f"the chat template was stopped: {error}") from None
        except CancelledError:
            raise
        except Exception as error:  # a template can raise anything that Python can
            raise TemplateError(f"the chat template failed: {_reason(error)}") from error

    def _run(self, budget: Budget, names: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.root_render_func(self._template.new_context(names)):
            size += n_bytes(piece)
            budget.reserve(size)
            budget.charge(ITEM_BYTES)
            budget.step()
            pieces.append(piece)
        budget.charge(joined_bytes(pieces))
        return "".join(pieces)


class _Raised(Exception):
    """What a template says through raise_exception()."""


def _one_line(text: str) -> str:
    return " ".join(text[:2000].split())[:300]


def _reason(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateError):
        return _one_line(str(error))
    return _one_line(f"{type(error).__name__}: {error}")


class _Bounding(NodeTransformer):
    """Puts a filter around every node that can loop, or make a value of any size."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        running().tick()
        return super().visit(node, *args, **kwargs)

    def _through(self, name: str, node: nodes.Node) -> nodes.Expr:
        wrapped = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        return wrapped.set_environment(self._environment)  # type: ignore[return-value]

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through("_steps", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        plain = all(isinstance(item, nodes.Const) for item in node.items)
        return node if plain else self._through("_made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        plain = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        return node if plain else self._through("_made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_made", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return self._through("_made", node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) > _MAX_COMPARISONS:
            raise Refused(f"more than {_MAX_COMPARISONS} comparisons in a row")
        return self._through("_step", node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_step", node)

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise Refused(f"{type(node).__name__} in line {node.lineno} is not allowed")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse
    visit_EvalContextModifier = visit_ScopedEvalContextModifier = _refuse


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks text for training; the body is rendered."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Ticking(Extension):
    """Checks the clock while a template is parsed."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for token in stream:
            running().tick()
            yield token


class _Generator(CodeGenerator):
    """Checks the clock while a template's code is generated."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        running().tick()
        return super().visit(node, *args, **kwargs)


class _Namespace(Namespace):
    """namespace(): as jinja2's, but printing it does not print its values."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    """Passes operators and calls through the budget of the rendering that runs."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = running()
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    budget.reserve(budget.size(value) * times)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.reserve(joined_bytes((left, right)))
        elif operator == "+" and isinstance(left, (list, tuple)):
            budget.reserve(budget.size(left) + budget.size(right))
        elif operator == "%" and isinstance(left, str):
            check_percent(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        return budget.made(_sane(super().call_binop(context, operator, left, right)))

    def getitem(self, obj: Any, argument: Any) -> Any:
        running().tick()  # filters call it for each part of an attribute's path
        return super().getitem(obj, argument)

    def call(
        __self,  # as jinja2 spells it: keyword arguments may have any name
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        budget = running()
        with budget.call():
            names = {k: v for k, v in kwargs.items() if k not in _SCOPES}
            args = __self._checked_call(budget, __obj, args, names)
            target = __obj.function if isinstance(__obj, BoundFormat) else __obj
            result: Any = super().call(__context, target, *args, **kwargs)
        if isinstance(result, _VIEWS):
            result = list(result)
        return budget.made(_sane(result))

    def _checked_call(
        self, budget: Budget, callee: Any, args: tuple[Any, ...], names: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Refuse a function that is not allowed; return the arguments to call it with."""
        owner = getattr(callee, "__self__", None)
        name = getattr(callee, "__name__", "")
        if isinstance(callee, BoundFormat):
            check_format(callee.text, [*args, *names.values()])
        elif isinstance(callee, LoopContext):  # loop(...) of a recursive loop
            return tuple(map(budget.iterate, args))
        elif isinstance(callee, types.BuiltinMethodType) and type(owner) is str:
            rule = TEXT_METHODS.get(name)
            if rule is None:
                raise Refused(f"it calls the method {name!r} of a text, which is not allowed")
            if name == "join" and args:
                args = (budget.listed(args[0]),)
            budget.reserve(rule(owner, *args, **names))
        elif isinstance(callee, types.BuiltinMethodType):
            if name not in OTHER_METHODS.get(type(owner), ()):
                kind = type(owner).__name__
                raise Refused(f"it calls the method {name!r} of a {kind}, which is not allowed")
        elif not self._is_ours(callee, owner):
            raise Refused(f"it calls a {type(callee).__name__}, which is not allowed")
        return args

    def _is_ours(self, callee: Any, owner: Any) -> bool:
        if isinstance(callee, types.MethodType):
            return isinstance(owner, (LoopContext, Cycler, Joiner))
        if isinstance(callee, (Macro, BlockReference, Joiner, Undefined)):
            return True
        return any(callee is value for value in self.globals.values())

    def wrap_str_format(self, value: Any) -> Any:
        function = super().wrap_str_format(value)
        if function is None:
            return None
        if value.__name__ != "format":
            raise Refused("it calls the method 'format_map' of a text, which is not allowed")
        return BoundFormat(value.__self__, function)


def _sane(value: Any) -> Any:
    """The same value, refused when it is a number of too many bits."""
    if isinstance(value, int):
        _check_bits(value.bit_length())
    return value


def _check_bits(n_bits: int) -> None:
    if n_bits > _MAX_INT_BITS:
        raise Refused(f"a number of more than {_MAX_INT_BITS} bits")


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """The text that {{ ... }} prints. jinja2 does not call a function with context in compiling."""
    running().step()
    return as_text(value)


@pass_context
def _steps(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    return running().iterate(values)


@pass_context
def _step(context: Context, value: Any) -> Any:
    running().step()
    return value


@pass_context
def _made(context: Context, value: Any) -> Any:
    return running().made(value)


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    running().step()
    return _joined(list(map(as_text, values)))


def _joined(pieces: Iterable[str]) -> str:
    """One text of the pieces that a macro or a {% set %} block has output."""
    texts = list(pieces)
    running().charge(joined_bytes(texts))
    return "".join(texts)


def _raise_exception(message: Any = "") -> None:
    raise _Raised(as_text(message))


def _strftime_now(form: Any) -> str:
    text = as_text(form)
    if len(text) > 200 or any(c.isdigit() for c in text):
        raise Refused("a date format that is too long or has widths")
    return datetime.now().strftime(text)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    """The environment that all templates share; it has no state of its own."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        autoescape=False,
        finalize=_finalize,
        cache_size=0,
        extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols", _Generation, _Ticking],
    )
    environment.concat = _joined  # type: ignore[method-assign]
    internal: dict[str, Callable[..., Any]] = {
        "_concat": _concat,
        "_made": _made,
        "_step": _step,
        "_steps": _steps,
    }
    environment.filters = {**allowed_filters(), **internal}
    names = ("range", "dict", "cycler", "joiner")
    environment.globals = {name: environment.globals[name] for name in names}
    environment.globals.update(
        namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
    )
    return environment
