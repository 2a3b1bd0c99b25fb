"""A process that indexes files in workers that never end, and leaves by os._exit: FOLDER FILE ..."""

import os
import sys
import threading
import time
from pathlib import Path

from megatron_vl.data.sources.index_build import index_files

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")


def endless(path: str):
    (Path(path).parent / f"worker.{os.getpid()}").touch()
    time.sleep(600)


def main() -> None:
    def leave():
        while len(list(FOLDER.glob("worker.*"))) < 2:
            time.sleep(0.05)
        os._exit(3)

    threading.Thread(target=leave, daemon=True).start()
    index_files(sys.argv[2:], endless, "endless-1", None, workers=2)


if __name__ == "__main__":
    main()
