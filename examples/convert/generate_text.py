#!/usr/bin/env python3
"""Let transformers continue a question with the text part of an exported checkpoint: greedy, text only.

    generate_text.py --hf DIR --tokenizer FILE --prompt "How many shapes are there?" [--tokens 16]

The whole model, images included, needs the release's remote code (README.md in this folder). Its decoder is a plain
Qwen3 under the names of `Qwen3ForCausalLM`, so this reads the tensors below ``model.`` and ``lm_head.`` and leaves
out the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# A clone runs its own code, installed or not; nothing is fetched from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

from megatron_vl.checkpoint.hf_load import HFCheckpoint  # noqa: E402
from megatron_vl.config.hf_config import model_from_hf, read_json_object  # noqa: E402
from megatron_vl.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_vl.errors import MegatronVLError  # noqa: E402


def text_part(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The decoder's config.json and tensors, as a Qwen3ForCausalLM folder has them."""
    config = read_json_object(folder / "config.json", required=True)["text_config"]
    checkpoint = HFCheckpoint(folder)
    names = [name for name in checkpoint.files if name.startswith(("model.", "lm_head."))]
    return config, {name: checkpoint.tensor(name) for name in names}


def load(folder: Path):
    """transformers' Qwen3 with the decoder's weights, in their format."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config, tensors = text_part(folder)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config))
    model.load_state_dict(tensors, strict=True, assign=True)
    # computed, not stored: the angles of the rotary embedding
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="exported folder")
    parser.add_argument(
        "--tokenizer", required=True, metavar="FILE", help="tokenizer.json or SentencePiece model"
    )
    parser.add_argument("--prompt", required=True, help="the user's question")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    options = parser.parse_args()
    try:
        described = model_from_hf(options.hf)
        special = described.tokens
        tokenizer = load_tokenizer(options.tokenizer, special, described.text.vocab_size)
        model = load(options.hf)
    except MegatronVLError as error:
        print(f"generate_text.py: {error}", file=sys.stderr)
        return 2
    except ImportError:
        print("generate_text.py: needs transformers: pip install transformers", file=sys.stderr)
        return 2
    ids = [special.chat_start, *tokenizer.encode(f"user\n{options.prompt}"), special.chat_end]
    ids += [*tokenizer.encode("\n"), special.chat_start, *tokenizer.encode("assistant\n")]
    ends = [special.endoftext, special.chat_end, special.im_patch]
    with torch.no_grad():
        made = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=options.tokens, eos_token_id=ends, pad_token_id=special.endoftext,
        )  # fmt: skip
    answer = made[0, len(ids) :].tolist()
    print(json.dumps({"prompt": options.prompt, "ids": answer, "text": tokenizer.decode(answer, special)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
