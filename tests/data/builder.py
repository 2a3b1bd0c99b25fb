"""A process that builds a length index as slowly as another one: INDEX_DIR TRAIN TOKENIZER DATA_ROOT."""

import json
import sys
import time
from pathlib import Path

from megatron_vl.config.schema import DataConfig
from megatron_vl.data import lengths_build
from megatron_vl.data.jsonl import JsonlSource
from tests.data.tiny import MODEL


def main() -> None:
    index_dir, train, tokenizer, root = sys.argv[1:]
    measured, whole = [], lengths_build.measure

    def slowly(source, builder, start, stop, split):
        time.sleep(0.2)
        measured.append(stop - start)
        return whole(source, builder, start, stop, split)

    lengths_build.measure = slowly
    data = DataConfig(train=[train], data_root=root, tokenizer=tokenizer, seq_length=96, num_workers=0)
    source = JsonlSource(data.train)
    (Path(root) / "ready").touch()
    index = lengths_build.length_index(index_dir, "web/a b", source, data, MODEL, chunk=8)
    print(json.dumps({"measured": sum(measured), "digest": index.digest}))


if __name__ == "__main__":
    main()
