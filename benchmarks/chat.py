"""What the browser chat costs beside its engine: seconds to the page, memory, idle processor time, latency of Stop.

python benchmarks/chat.py MODEL_DIR
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time

import psutil
from program import last_words, program

from ov_afm.chat.engine import Choice, Engine
from ov_afm.errors import OVAFMError
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.runtime.sampling import Params

IDLE_S = 10.0
STOPS = 10


def page(model_dir: str) -> None:
    """Start the chat; print when the page answers, and what it uses while nobody asks."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "ov_afm", "chat", "--ui", "--no-browser", "--port", "0", model_dir]
        begun = time.monotonic()
        environment = {**os.environ, "OV_AFM_DATA": data}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
            try:
                assert running.stderr
                log = ""
                while not re.search("chat on", log):
                    line = running.stderr.readline()
                    if not line:
                        raise OVAFMError(f"the chat did not start: {last_words(log)}")
                    log += line
                print(f"page served after {time.monotonic() - begun:.1f} s")
                time.sleep(IDLE_S)
                process = psutil.Process(running.pid)
                print(f"page's process {process.memory_info().rss / 1e6:.0f} MB")
                for child in process.children():
                    print(f"engine's process {child.memory_info().rss / 1e6:.0f} MB")
                before, at = sum(process.cpu_times()[:2]), time.monotonic()
                time.sleep(IDLE_S)
                used = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - at)
                print(f"page's process idle: {used:.1%} of a core")
            finally:
                running.terminate()


def stop(model_dir: str) -> None:
    """Stop answers in their middle; print how long the last step took to come and what a token takes."""
    engine = Engine(Choice(model_dir))
    begun = time.monotonic()
    engine.wait()
    print(f"engine ready after {time.monotonic() - begun:.1f} s")
    waits, tokens_ms = [], []
    for number in range(STOPS):
        cancel = threading.Event()
        messages = [{"role": "user", "content": f"Story number {number}: tell a long one about the sea."}]
        pressed = 0.0
        for steps, step in enumerate(engine.answer(messages, Params(max_new_tokens=400, ignore_eos=True), cancel)):
            if steps == 20:
                pressed = time.monotonic()
                cancel.set()
            if step.metrics and step.metrics.tpot_ms:
                waits.append((time.monotonic() - pressed) * 1000)
                tokens_ms.append(step.metrics.tpot_ms)
    engine.close()
    waits.sort()
    print(
        f"stop: median {waits[len(waits) // 2]:.0f} ms, most {waits[-1]:.0f} ms; a token takes {min(tokens_ms):.0f} ms"
    )


@program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory")
    args = parser.parse_args()
    ModelDirectory.open(args.model)
    page(args.model)
    stop(args.model)


if __name__ == "__main__":
    sys.exit(main())
