"""Renders chat templates in a process of its own; run as a script, one JSON request and reply a line.

A template comes with the model, so it may be hostile: loop for ever, or build a string of many gigabytes in
one operation. No check inside the interpreter stops both; a process under a memory limit, which its parent
can kill, does. The sandbox keeps the template from Python's attributes on top of that.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template


def compile_template(source: str) -> Template:
    """Compile with what Hugging Face gives to chat templates (`apply_chat_template`)."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


def limit_memory(max_bytes: int) -> None:
    """Let allocations beyond `max_bytes` of address space fail, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the time limit alone
        return
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def answer(template: Template, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    """Render once: `{"text": ...}` or `{"error": ...}`."""
    try:
        text = template.render(variables)
    except Exception as error:
        return {"error": str(error) or type(error).__name__}
    if len(text) > max_chars:
        return {"error": f"it gave {len(text)} characters, more than {max_chars}"}
    return {"text": text}


def main() -> None:
    """Serve until standard input ends. The first line is `{"path", "max_bytes", "max_chars", "template"}`."""
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]
    limit_memory(setup["max_bytes"])
    try:
        template = compile_template(setup["template"])
    except Exception as error:
        print(json.dumps({"error": str(error) or type(error).__name__}), flush=True)
        return
    for line in sys.stdin:
        print(json.dumps(answer(template, json.loads(line), setup["max_chars"])), flush=True)


if __name__ == "__main__":
    main()
