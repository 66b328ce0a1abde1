"""The official client with a deadline and a quality floor: python examples/openai_client.py [URL].

Needs `pip install openai` and a running `taper serve`. The client knows nothing of Taper's fields;
`extra_body` carries them.
"""

from __future__ import annotations

import os
import sys

import openai


def main() -> None:
    """Stream an answer that must be there within two seconds, at no fewer than three bits."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8642"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("TAPER_API_KEY", "none"))
    model = client.models.list().data[0].id
    terms = {"deadline_ms": 2000, "bits": {"min": 3}, "on_miss": "lower_bits"}
    stream = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=64, temperature=0, stream=True, extra_body=terms
    )
    record: dict[str, object] = {}
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
        record = chunk.model_extra["taper"]
    print(f"\n{record['bits']:.2f} bits a token, deadline met: {record['deadline_met']}")


if __name__ == "__main__":
    main()
