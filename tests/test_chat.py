"""edge.template.template: what templates get, what they give, and what they are not allowed."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edge.errors import CancelledError, InputError, ModelFileError, TemplateError
from edge.native.cancel import Cancel
from edge.template.budget import Limits
from edge.template.template import ChatTemplate

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **options)


# --- what a template gets -------------------------------------------------------------------


def test_messages_and_generation_prompt() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    assert render(source, messages) == "[system]Be brief.[user]Hi[assistant]"
    assert render(source, messages, add_generation_prompt=False) == "[system]Be brief.[user]Hi"


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "no name", ""])
def test_names_that_no_variable_can_have(name: str) -> None:
    with pytest.raises(InputError, match="cannot have the name"):
        render("x", variables={name: 1})


def test_do_and_json() -> None:
    assert render("{% do messages[0].items() %}{% do 'x'.upper() %}a") == "a"
    assert render("{{ ('[1, {\"a\": [true]}]'|fromjson)[1].a[0] }}") == "True"
    assert render('{{ \'{"b": null, "a": 2}\'|from_json|tojson }}') == '{"b": null, "a": 2}'


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'no json'|fromjson }}",
        "{{ ('[' * 100000)|fromjson }}",
        "{{ ('[' ~ '[],' * 1000000 ~ '0]')|fromjson }}",
        "{{ ('9' * 100000)|fromjson }}",
        "{% do [].append(1) %}",
        "{% for i in range(99999) %}{% do '[1, 2, 3]'|fromjson %}{% endfor %}",
        "{% set ns = namespace() %}{% do ns.__init__() %}",
    ],
)
def test_do_and_json_have_bounds(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source, limits=Limits(seconds=0.5)).render(USER)
    assert "\n" not in str(caught.value)


def test_tokens_tools_and_variables() -> None:
    assert render("{{ bos_token }}|{{ eos_token }}") == "<s>|</s>"
    assert render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert render("{{ tools[0].function.name }}", tools=[TOOL]) == "f"
    assert render("{{ think }}{{ unknown }}", variables={"think": False}) == "False"


def test_whitespace_is_trimmed_as_in_transformers() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc\n") == "a\nb\nc"


def test_loop_controls_and_generation_marks() -> None:
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"  # noqa: E501
    assert render(source) == "02"
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aHib"


def test_tojson_keeps_characters() -> None:
    value = {"b": "<é'\n>", "a": [1, None, True, 1.5]}
    assert render("{{ v|tojson }}", variables={"v": value}) == json.dumps(value, ensure_ascii=False)
    pretty = json.dumps(value, ensure_ascii=False, indent=4)
    assert render("{{ v | tojson(indent=4) }}", variables={"v": value}) == pretty


EXPRESSIONS = {
    "'a' ~ 1 ~ none": "a1None",
    "[1, 2] + [3]": "[1, 2, 3]",
    "messages[::-1][0].role": "user",
    "messages[0].content[1:]": "i",
    "'%s-%03d' % ('a', 7)": "a-007",
    "'%s!'|format('a')": "a!",
    "'{:>4}|{}'.format('a', 2)": "   a|2",
    "'a,b'.split(',')|join('+')": "a+b",
    "messages|map(attribute='role')|join(',')": "user",
    "messages|selectattr('role', 'equalto', 'user')|list|length": "1",
    "' x '.strip() + 'ab'.upper()": "xAB",
    "'abc'|replace('b', 'x')": "axc",
    "{'a': 1}.items()|list": "[('a', 1)]",
    "'a\nb'|indent(2)": "a\n  b",
    "'x'|center(3)": " x ",
    "dict(a=1).get('b', 2)": "2",
    "(messages[0].content|e) ~ '<'|safe": "Hi<",
    "[3, 1, 2]|sort|first": "1",
    "[1, 2]|sum": "3",
    "2 ** 10 // 3": "341",
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression(expression: str) -> None:
    expected = EXPRESSIONS[expression]
    assert render("{{ " + expression + " }}") == expected
    inside = "{% for i in [1] %}{% if i %}{{ " + expression + " }}{% endif %}{% endfor %}"
    assert render(inside) == expected
    assert render("{% block b %}{{ " + expression + " }}{% endblock %}") == expected


BLOCKS = {
    "{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}": "3",  # noqa: E501
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=3) }}": "1213",
    "{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x }}": "a1a1",
    "{% for x in 'ab' %}{{ loop.index }}{{ loop.last }}{{ loop.length }} {% endfor %}": "1False2 2True2 ",  # noqa: E501
    "{% for x in [[1], [2]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}": "12",
    "{% for i in range(5) if i is odd %}{{ i }}{% else %}none{% endfor %}": "13",
    "{% filter upper %}a{% endfilter %}": "A",
    "{% macro m() %}({{ caller() }}){% endmacro %}{% call m() %}x{% endcall %}": "(x)",
    "{% if 1 < 2 <= 2 and 1 in [1] and none is none and x is not defined %}y{% endif %}": "y",
    "{% for i in [1, 1] %}{{ loop.cycle('a', 'b') }}{{ loop.changed(i) }}{% endfor %}": "aTruebFalse",  # noqa: E501
}


@pytest.mark.parametrize("source", BLOCKS)
def test_block(source: str) -> None:
    assert render(source) == BLOCKS[source]


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_messages_stay_as_they_were() -> None:
    message = {"role": "user", "content": "a", "extra": {"b": [1]}}
    with pytest.raises(TemplateError):
        render("{{ messages[0].extra.update(b=2) }}", [message])
    assert message == {"role": "user", "content": "a", "extra": {"b": [1]}}


# --- refused with a reason ------------------------------------------------------------------


def test_raise_exception_says_why() -> None:
    with pytest.raises(TemplateError, match=r"says: roles must alternate$"):
        render("{{ raise_exception('roles must\n alternate') }}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("\n{% if %}", "line 2: Expected an expression"),
        ("{{ 'a'|nothing }}", "No filter named 'nothing'"),
        ("{{ a.b }}", "'a' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% include 'x' %}", "Include in line 1 is not allowed"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile: RecursionError"),
        ("{% if 1 %}" * 1500 + "{% endif %}" * 1500, "does not compile: RecursionError"),
        ("x" * 300_000, "has 300000 characters"),
    ],
)
def test_a_broken_template_says_where(source: str, reason: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ("hello", "list of dicts"),
        ([1], "message 0 is a int"),
        ([{"content": "a"}], "message 0 has no role"),
        ([{"role": "user"}], "content of message 0 (user) must be text"),
        ([*USER, {"role": "assistant", "content": None}], "content of message 1"),
        ([{"role": "user", "content": "a", "x": object()}], "only JSON values"),
        ([{"role": "user", "content": "a", "x": {1: 2}}], "a key that is not text"),
    ],
)
def test_messages_that_are_none(messages: Any, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        render("", messages)
    assert reason in str(caught.value)


def test_values_nested_too_deeply() -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(InputError, match="nested"):
        render("", tools=[{"x": deep}])


def test_tool_calls_may_go_without_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    assert render("{{ messages[0].content is none }}", [call]) == "True"


# --- hostile templates ----------------------------------------------------------------------

DOUBLING = "{%% set ns = namespace(s=%s) %%}{%% for i in range(100) %%}{%% set ns.s = %s %%}{%% endfor %%}{{ ns.s }}"  # noqa: E501
BIG = "{% set a = 'x' * 10000000 %}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",  # noqa: E501
    "huge range": "{{ range(10**12)|list }}",
    "loops in C": "{% for i in range(99999) %}{{ -1 in range(99999)|map('abs') }}{% endfor %}",
    "generators": "{{ range(99999)|map('string')|map('center', 9999)|join|length }}",
    "tree of macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",  # noqa: E501
    "deep macros": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "deep blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "deep loops": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "times": "{{ 'x' * 10**9 }}",
    "times, turned": "{{ 10**9 * 'x' }}",
    "list times": "{{ [0] * 10**9 }}",
    "number": DOUBLING % ("7", "ns.s * ns.s"),
    "power": "{{ 10 ** (10 ** 10) }}",
    "percent": "{{ '%20000000000d' % 1 }}",
    "percent, many": "{{ ('%99999d' * 9999) % 1 }}",
    "percent, star": "{{ '%*d' % (10**9, 1) }}",
    "percent, precision": "{{ '%.999999999f' % 1.0 }}",
    "percent, brackets": "{{ '%(a(b))999999999d' % {'a(b)': 1} }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "percent, slow to read": "{{ ('%(' * 4000000) % {'a': 1} }}",
    "format, slow to read": "{{ ('{}' * 4000000).format(1) }}",
    "format, nested": "{{ '{:{}}'.format(1, 999999999) }}",
    "format_map": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "format filter": "{{ '%999999999d'|format(1) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "rjust": "{{ 'a'.rjust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ 'a'|center(10**9) }}",
    "center through map": "{{ ['a']|map('center', 10**9)|list }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "replace": "{{ ('a' * 10000).replace('a', 'b' * 10000) }}",
    "replace, by name": "{{ ('a' * 10000)|replace(new='b' * 10000, old='a') }}",
    "rsplit, by name": "{{ ('a' * 8000000).rsplit(maxsplit=1, sep='b' ~ 'a' * 4000000) }}",
    "replace filter": "{{ ('a' * 10000)|replace('', 'b' * 10000) }}",
    "join": "{{ ('a' * 10000).join(range(99999)|map('string')) }}",
    "join filter": "{{ range(99999)|join('a' * 10000) }}",
    "split": "{{ ('a ' * 4000000).split()|length }}",
    "characters": "{{ ('a' * 8000000)|list|length }}",
    "strip": "{{ ('a' * 8000000).strip('b' * 8000000 ~ 'a') }}",
    "search backwards": "{{ ('a' * 8000000).rfind('b' ~ 'a' * 4000000) }}",
    "indent": "{{ ('\n' * 9999)|indent(99999, true, true) }}",
    "indent of JSON": "{{ messages|tojson(indent=10**9) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "round": "{{ 1.5|round(10**8, 'ceil') }}",
    "digits": "{{ ('9' * 100000)|int }}",
    "sum of lists": "{{ ([[1]] * 99999)|sum(start=[]) }}",
    "dates": "{{ strftime_now('%999999999Y') }}",
    "doubling ~": DOUBLING % ("'x'", "ns.s ~ ns.s"),
    "doubling +": DOUBLING % ("'x'", "ns.s + ns.s"),
    "doubling lists": DOUBLING % ("[]", "[ns.s, ns.s]"),
    "doubling dicts": DOUBLING % ("1", "{'a': ns.s, 'b': ns.s}"),
    "doubling calls": DOUBLING % ("1", "dict(a=ns.s, b=ns.s)"),
    "equal trees": "{% set a = namespace(s=[1]) %}{% set b = namespace(s=[1]) %}{% for i in range(60) %}{% set a.s = [a.s, a.s] %}{% set b.s = [b.s, b.s] %}{% endfor %}{{ a.s == b.s }}",  # noqa: E501
    "deep lists": "{% set ns = namespace(s=1) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",  # noqa: E501
    "views": "{{ ([{'a': 'x' * 999999}.items()] * 999)|string }}",
    "output": BIG + "{% for i in range(99999) %}{{ a }}{% endfor %}",
    "set block": BIG + "{% set b %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endset %}",
    "macro output": BIG
    + "{% macro m() %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endmacro %}{{ m()|length }}",
    "many values": "".join(f"{{% set a{i} = 'x' * (10000000 + {i}) %}}" for i in range(99)),
    "many slices": BIG + "".join(f"{{% set a{i} = a[{i}:] %}}" for i in range(1, 99)),
    "many comparisons": "{% set a = 'x' * 9000000 %}{% set b = a ~ 'y' %}"
    + "{{ 'xy' in b }}" * 2500,
    "comparisons in a row": "{{ 1" + " < 1" * 10000 + " }}",
    "mro": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ messages.__class__.__base__.__subclasses__() }}",
    "mro by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals": "{{ namespace.__init__.__globals__['sys'] }}",
    "loop insides": "{% for a in [1] %}{{ loop._iterable.gi_frame.f_back }}{% endfor %}",
    "append": "{% set l = [] %}{{ l.append(1) }}",
    "translate": "{{ 'a'.translate({97: 'x'}) }}",
    "encode": "{{ 'a'.encode().ljust(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "lipsum": "{{ lipsum(n=99999) }}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_stopped(name: str) -> None:
    template = ChatTemplate(HOSTILE[name], limits=Limits(seconds=0.5))
    start = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        template.render(USER)
    assert time.monotonic() - start < 10  # far from forever, even on a busy machine
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ('{0.__class__}'|attr('format'))('') }}",
    ],
)
def test_insides_of_python_are_undefined(source: str) -> None:
    with contextlib.suppress(TemplateError):
        assert render(source) == ""


def test_memory_of_hostile_templates_is_bounded() -> None:
    import tracemalloc

    bombs = ("doubling ~", "many values", "macro output")
    tracemalloc.start()
    try:
        for name in bombs:
            with pytest.raises(TemplateError):
                ChatTemplate(HOSTILE[name], limits=Limits(total_bytes=40 << 20)).render(USER)
        assert tracemalloc.get_traced_memory()[1] < 120 << 20
    finally:
        tracemalloc.stop()


def test_printing_a_namespace_prints_nothing_of_it() -> None:
    source = "{% set ns = namespace(s=1) %}{% set ns.s = [ns, ns] %}{{ ns }}"
    assert render(source) == "<namespace>"


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 600
    source = "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s ~ '[' ~ m.role ~ ']' %}{{ m.content|trim ~ '\n' }}{% endfor %}"  # noqa: E501
    assert len(render(source, messages)) == 600 * 1000


def test_time_is_the_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others do with the CPU, and what the clock on the wall says, is nobody's fault here."""
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert render("{% for i in range(999) %}{{ i }}{% endfor %}")
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    with pytest.raises(TemplateError, match="it ran longer than 3 s"):
        render("{% for i in range(999) %}{{ i }}{% endfor %}")


SLOW_FILTERS = {
    "sort": "{{ (['a'] * 50000)|sort(attribute='%s') }}",
    "unique": "{{ (['a'] * 50000)|unique(attribute='%s')|list }}",
    "groupby": "{{ (['a'] * 50000)|groupby('%s') }}",
    "join": "{{ (['a'] * 50000)|join('', '%s') }}",
    "min": "{{ (['a'] * 50000)|min(attribute='%s') }}",
}


@pytest.mark.parametrize("name", SLOW_FILTERS)
def test_time_is_bounded_inside_a_filter(name: str) -> None:
    template = ChatTemplate(SLOW_FILTERS[name] % ".".join("0" * 9000), limits=Limits(seconds=0.2))
    began = time.thread_time()
    with pytest.raises(TemplateError, match=r"it ran longer than 0\.2 s"):
        template.render(USER)
    assert time.thread_time() - began < 2  # without a look inside: minutes


@pytest.mark.parametrize("part", ["{{ a.b }}", "{% if a %}{% endif %}", "{{ [1, a, 2] }}"])
def test_time_is_bounded_in_compiling(part: str) -> None:
    render("a")  # what is imported for the first of them
    template = ChatTemplate(part * 2000, limits=Limits(seconds=0.02))
    with pytest.raises(TemplateError, match=r"refused: it ran longer than 0\.02 s"):
        template.render(USER)


@pytest.mark.parametrize(
    "source", ["{% for i in range(9999) %}{{ i }}{% endfor %}", "{{ 1|abs }}", "{{ a }}" * 999]
)
def test_a_rendering_can_be_cancelled(source: str) -> None:
    cancel = Cancel()
    cancel.set()
    with pytest.raises(CancelledError):
        ChatTemplate(source).render(USER, cancel=cancel)


def test_limits_follow_from_the_context() -> None:
    """A conversation that fills it is well within them, whatever its characters."""
    for context in (256, 4096, 131072):
        limits, n = Limits.of_context(context), context // 60
        messages = [{"role": "user", "content": "word \U0001f600 " * 48}] * n
        source = "{% for m in messages[1:] %}{{ '<|' + m.role + '|>' + m.content|trim + '\n' }}{% endfor %}"  # noqa: E501
        assert ChatTemplate(source, limits=limits).render(messages)


def test_joined_texts_are_as_wide_as_the_widest() -> None:
    """A character of four bytes makes all others take four."""
    limits = Limits(value_bytes=3 << 20, total_bytes=9 << 20)
    wide = "{% set a = 'a' * 1000000 %}{{ (JOINED)|length }}"
    for joined in ("a ~ b", "a + b", "[a, b]|join", "a.replace('a', b, 1)", "b.join([a, a])"):
        source = wide.replace("JOINED", joined)
        assert ChatTemplate("{% set b = 'b' %}" + source, limits=limits).render(USER)
        with pytest.raises(TemplateError, match="more than 3 MiB"):
            ChatTemplate("{% set b = '\U0001f600' %}" + source, limits=limits).render(USER)


# --- threads, metadata ----------------------------------------------------------------------


def test_threads_share_a_template() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content * 9 }}{% endfor %}")
    results: dict[int, str] = {}

    def work(i: int) -> None:
        results[i] = template.render([{"role": "user", "content": f"{i},"}] * 50)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {i: f"{i}," * 450 for i in range(8)}


def test_from_metadata() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}{{ eos_token }}",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0xFFFFFFFF,  # none
    }
    assert ChatTemplate.from_metadata(metadata).render(USER) == "b"
    metadata["tokenizer.ggml.eos_token_id"] = 7
    with pytest.raises(ModelFileError, match="token 7 is outside"):
        ChatTemplate.from_metadata(metadata)


NAMED = {
    "tokenizer.chat_templates": ["rag", "tool_use", "gone", "default"],
    "tokenizer.chat_template": "plain",
    "tokenizer.chat_template.rag": "rag",
    "tokenizer.chat_template.tool_use": "tools",
}


@pytest.mark.parametrize(
    ("gone", "name", "plain", "with_tools"),
    [
        ((), None, "plain", "tools"),
        (("tokenizer.chat_templates",), None, "plain", "tools"),
        ((), "rag", "rag", "rag"),
        ((), "default", "plain", "plain"),
        (("tokenizer.chat_template.tool_use",), None, "plain", "plain"),
        (("tokenizer.chat_template",), None, "rag", "tools"),
    ],
)
def test_named_templates(
    gone: tuple[str, ...], name: str | None, plain: str, with_tools: str
) -> None:
    metadata = {key: value for key, value in NAMED.items() if key not in gone}
    template = ChatTemplate.from_metadata(metadata, name=name)
    assert (template.render(USER), template.render(USER, tools=[TOOL])) == (plain, with_tools)
    assert template.render(USER, tools=[]) == plain


def test_named_templates_that_are_none() -> None:
    with pytest.raises(InputError, match="template 'gone': its templates are 'default', 'rag'"):
        ChatTemplate.from_metadata(NAMED, name="gone")
    for key in NAMED:
        with pytest.raises(ModelFileError, match="chat_template"):
            ChatTemplate.from_metadata(NAMED | {key: 7})


def test_a_model_without_template_says_what_to_do() -> None:
    with pytest.raises(TemplateError, match=r"x.gguf has no chat template: use `complete`"):
        ChatTemplate.from_metadata({}, "x.gguf")
    with pytest.raises(ModelFileError, match="chat_template"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 1}, "x.gguf")


@pytest.mark.model
def test_smollm2(smollm2: Path) -> None:
    from edge.files.gguf import GGUF

    with GGUF.open(smollm2) as gguf:
        template = ChatTemplate.from_metadata(gguf.metadata, gguf.path)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert template.render(USER) == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
