"""Time from the start of `taper run` to the first byte of its answer, as one line of JSON.

python benchmarks/end_to_end/first_token.py
"""

import json
import subprocess
import sys
import time

PROMPT = "Once upon a time"


def main() -> None:
    """Print one JSON object."""
    command = [sys.executable, "-m", "taper", "run", "--max-tokens", "16", "--temperature", "0", PROMPT]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        first = time.perf_counter()
        process.stdout.read()
    if process.returncode != 0 or not byte:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode} and no answer")
    print(json.dumps({"first_token_s": first - begin, "exit_s": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
