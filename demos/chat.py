"""The chat in a browser: `python demos/chat.py MODEL_DIR...`, the same as `ov-afm chat --ui MODEL_DIR...`.

Every option of `ov-afm chat` works, for example `--device GPU`, or `--url http://127.0.0.1:8000/v1` to
talk to a server instead of loading a model. Needs: pip install 'ov-afm[chat]'
"""

import sys

from ov_afm.cli.chat import main

if __name__ == "__main__":
    sys.exit(main(["--ui", *sys.argv[1:]]))
