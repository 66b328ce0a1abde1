"""Templates render as Hugging Face's, and hostile ones are stopped."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from taper.errors import UsageError
from taper.tokenizer import ChatTemplate

CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "Hi <b>世界</b>"}]


def render(source, messages=HELLO, **options):
    template = ChatTemplate(source, options)
    try:
        return template.render(messages)
    finally:
        template.close()


def test_chatml():
    assert render(CHATML) == "<|im_start|>user\nHi <b>世界</b><|im_end|>\n<|im_start|>assistant\n"


def test_generation_prompt_can_be_left_out():
    template = ChatTemplate(CHATML)
    assert template.render(HELLO, add_generation_prompt=False).endswith("<|im_end|>\n")
    template.close()


def test_variables_filters_and_functions_of_hugging_face():
    source = "{{ bos_token }}{{ messages[0].content | tojson }}{{ strftime_now('%Y') }}{% break_me %}"
    assert (
        render(source.replace("{% break_me %}", ""), bos_token="<s>")
        == f'<s>"Hi <b>世界</b>"{time.strftime("%Y")}'
    )


def test_blocks_are_trimmed_and_loops_can_be_left():
    source = "{% for m in [1, 2, 3] %}\n  {% if m == 2 %}\n{% break %}\n  {% endif %}\n{{ m }}\n{% endfor %}"
    assert render(source) == "1\n"


def test_one_process_serves_many_renders():
    template = ChatTemplate(CHATML)
    template.render(HELLO)
    worker = template._worker
    template.render(HELLO)
    assert template._worker is worker
    template.close()
    assert worker.poll() is not None


def test_the_process_ends_with_the_template():
    template = ChatTemplate(CHATML)
    template.render(HELLO)
    worker = template._worker
    del template
    assert worker.poll() is not None


def test_a_worker_that_died_is_replaced():
    template = ChatTemplate(CHATML)
    template.render(HELLO)
    template._worker.kill()
    template._worker.wait()
    assert template.render(HELLO).startswith("<|im_start|>user")
    template.close()


def test_an_interrupted_render_does_not_answer_the_next_one(monkeypatch):
    template = ChatTemplate(CHATML)
    template.render(HELLO)

    def interrupted(self, worker, line):
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ChatTemplate, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "first"}])
    assert "second" in template.render([{"role": "user", "content": "second"}])
    template.close()


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 9 ** 99999999 %}{{ x }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
        "{{ 'a' | center(99999999999) }}",
        "{{ '%99999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 20000000 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for",
        "{{ raise_exception('roles must alternate') }}",
        "{{ nothing.at_all }}",
        "{% include 'file' %}",
    ],
)
def test_hostile_and_wrong_templates_are_stopped_with_one_line(source):
    template = ChatTemplate(source, time_limit_s=1.0)
    start = time.monotonic()
    with pytest.raises(UsageError, match="chat template") as error:
        template.render(HELLO)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 5
    template.close()


def test_a_refusal_of_the_template_is_passed_on():
    with pytest.raises(UsageError, match="roles must alternate"):
        render("{{ raise_exception('roles must\nalternate') }}")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to RLIMIT_AS")
def test_memory_is_limited():
    """1.5 GiB would be there without the limit, and be refused for its length instead."""
    with pytest.raises(UsageError, match="MemoryError"):
        render("{% set n = 3 * 2 ** 29 %}{{ 'a' * n }}")


def peak_bytes():
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_the_parent_stays_small():
    """The worker's memory is not ours: a template that fills its limit leaves this process as it was."""
    before = peak_bytes()
    with pytest.raises(UsageError):
        ChatTemplate("{{ 'a' * 900000000 }}", time_limit_s=1.0).render(HELLO)
    assert peak_bytes() - before < 100 << 20


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"content": "a"}], "message 0 has no role"),
        ([HELLO[0], {"role": "user", "content": None}], "message 1 has no content"),
        ([HELLO[0], "text"], "message 1 has no role"),
        ([{"role": "user", "content": "a", "extra": object()}], "cannot be written as JSON"),
    ],
)
def test_bad_messages_are_refused(messages, reason):
    with pytest.raises(UsageError, match=reason):
        ChatTemplate(CHATML).render(messages)


def test_tools_are_given_to_the_template():
    source = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{{ messages[0].content }}"
    template = ChatTemplate(source)
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert template.knows_tools
    assert template.render([{"role": "user", "content": "x"}], tools=tools) == "look;x"
    assert template.render([{"role": "user", "content": "x"}]) == "x"
    assert not ChatTemplate(CHATML).knows_tools
    template.close()
