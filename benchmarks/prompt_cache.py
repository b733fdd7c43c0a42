"""The first token of a prompt with a long beginning: computed, still in memory, and read from disk after a restart.

Processes of their own are measured: one of GenAI's engine with its prefix cache in memory, and two of the engine that
keeps prompts in a folder. Before the second reads the folder, its files are dropped from the page cache (Linux), so
they come from the disk. It must give the first words that the process before it gave.

    python benchmarks/prompt_cache.py MODEL_DIR --tokens 8000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from program import check_counts, last_words, program

from ov_afm.errors import OVAFMError
from ov_afm.model_dir.model_directory import ModelDirectory

QUESTIONS = ("What comes first?", "And what comes last?")
NEW_TOKENS = 8


def prefix_of(pipeline: Any, tokens: int) -> str:
    """Random words with about so many tokens."""
    chooser, words = random.Random(0), ["valve", "rain", "copper", "map", "seven", "ledger", "north", "paper", "gate"]
    per_word = pipeline.count_tokens(" ".join(words * 20), raw=True) / (20 * len(words))
    return " ".join(chooser.choice(words) for _ in range(int(tokens / per_word)))


def child(model: str, tokens: int, folder: str) -> dict[str, Any]:
    """Load a model, ask two questions about the same beginning; what that took."""
    from ov_afm.pipeline import Params, Pipeline, PromptCache

    begin = time.perf_counter()
    cache = PromptCache(Path(folder)) if folder else None
    with Pipeline(model, prompt_cache=cache) as pipeline:
        load_s = time.perf_counter() - begin
        prefix = prefix_of(pipeline, tokens)
        params = Params(max_new_tokens=NEW_TOKENS, greedy=True, ignore_eos=True)
        answers = [pipeline.generate(f"{prefix}\n{question}", params, raw=True) for question in QUESTIONS]
    return {
        "load_s": load_s,
        "ttft_s": [answer.metrics.ttft_ms / 1000 for answer in answers],
        "prompt_tokens": answers[0].metrics.prompt_tokens,
        "texts": [answer.text for answer in answers],
    }


def measure(model: Path, tokens: int, folder: Path | None) -> dict[str, Any]:
    """The figures of a process."""
    arguments = [str(model), str(tokens), str(folder or "")]
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OVAFMError(f"a measurement failed: {last_words(done.stderr)}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def evict(folder: Path) -> None:
    """Write files to the disk and drop them from the page cache."""
    for path in folder.glob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@program
def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8000, help="tokens of the common beginning")
    parser.add_argument("--folder", type=Path, help="where to keep prompts meanwhile (default: a temporary folder)")
    options = parser.parse_args()
    check_counts(options, {"tokens": 256})
    ModelDirectory.open(options.model)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        genai = measure(options.model, options.tokens, None)
        cold = measure(options.model, options.tokens, folder)
        size_mb = sum(path.stat().st_size for path in folder.glob("*.kv")) / 1e6
        evict(folder)
        disk = measure(options.model, options.tokens, folder)
    same = "the same answers" if cold["texts"] == disk["texts"] else "OTHER ANSWERS"
    print(f"{options.model.name}, {cold['prompt_tokens']} tokens, kept in {size_mb:.0f} MB, {same} after the restart\n")
    print("| first token, seconds | computed | in memory | from disk after a restart |")
    print("|---|---|---|---|")
    print(f"| GenAI | {genai['ttft_s'][0]:.2f} | {genai['ttft_s'][1]:.2f} | – |")
    print(f"| with a prompt cache | {cold['ttft_s'][0]:.2f} | {cold['ttft_s'][1]:.2f} | {disk['ttft_s'][0]:.2f} |")
    return 0 if cold["texts"] == disk["texts"] else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], int(sys.argv[3]), sys.argv[4])))
    else:
        sys.exit(main())
