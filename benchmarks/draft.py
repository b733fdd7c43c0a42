"""A pruned model as draft for the full one: how many of its tokens are accepted, and what that does to the speed.

    python benchmarks/draft.py MODEL_DIR DRAFT_DIR [--assistant-tokens 4] [--new-tokens 96]

Greedy answers to a few questions, with and without the draft, in turn; tokens per second of decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from program import check_counts, program

from ov_afm.model_dir.model_directory import ModelDirectory

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain what a computer is to a child.",
    "Give me three tips for learning to cook.",
    "Write a short story about a lighthouse keeper.",
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
)


@program
def main() -> None:
    import openvino_genai as genai

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--assistant-tokens", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=96)
    args = parser.parse_args()
    check_counts(args, {"assistant_tokens": 1, "new_tokens": 2})
    for folder in (args.model, args.draft):
        ModelDirectory.open(folder)
    alone = genai.LLMPipeline(args.model, "CPU")
    drafted = genai.LLMPipeline(args.model, "CPU", draft_model=genai.draft_model(args.draft, "CPU"))
    config = {"max_new_tokens": args.new_tokens, "ignore_eos": True, "do_sample": False}
    seconds: dict[str, list[float]] = {"alone": [], "drafted": []}
    accepted, proposed, same = 0, 0, 0
    for question in QUESTIONS:
        answers = {}
        for name, pipeline, extra in (
            ("alone", alone, {}),
            ("drafted", drafted, {"num_assistant_tokens": args.assistant_tokens}),
        ):
            started = time.perf_counter()
            result = pipeline.generate([question], **config, **extra)
            seconds[name].append(time.perf_counter() - started)
            answers[name] = result.texts[0]
        metrics = result.extended_perf_metrics
        accepted += metrics.get_num_accepted_tokens()
        proposed += metrics.get_num_draft_tokens()
        same += answers["alone"] == answers["drafted"]
    speed = {name: round(args.new_tokens / statistics.median(each), 2) for name, each in seconds.items()}
    print(
        json.dumps(
            {
                "tokens_per_s": speed,
                "speedup": round(speed["drafted"] / speed["alone"], 3),
                "accepted": accepted,
                "drafted": proposed,
                "acceptance": round(accepted / proposed, 3) if proposed else None,
                "same_answers": f"{same} of {len(QUESTIONS)}",
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
