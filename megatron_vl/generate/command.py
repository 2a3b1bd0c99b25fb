"""``python -m megatron_vl generate CONFIG --prompt TEXT [--image FILE]``: answers on the console, as they come."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_vl.config.load import LoadedRun
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.launch import launched, read_environment, run_local
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.layout import Layout


def main(argv: Sequence[str]) -> int:
    """Check the run, then launch the ranks or be one of them."""
    arguments = parse(argv)
    world_size = read_environment().world_size if launched() else arguments.nproc
    overrides = list(arguments.overrides)
    if arguments.checkpoint is not None:
        overrides += [f"train.init_from={arguments.checkpoint}"]
    loaded = load_checked_run(arguments.config, overrides, None, world_size)
    check(loaded.config, arguments)
    layout = Layout.from_config(loaded.config.parallel, world_size)
    if arguments.nproc > 1 and not launched():
        return run_local([sys.executable, "-m", "megatron_vl", "generate", *argv], layout)
    return answer(loaded, arguments)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of ``generate``."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vl generate", description="Answer a prompt with the weights of a run."
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace the file's"
    )
    parser.add_argument("--prompt", required=True, help="what the user says")
    parser.add_argument(
        "--image", action="append", default=[], help="an image file before the text; may be repeated"
    )
    parser.add_argument(
        "--checkpoint",
        help="checkpoint or folder of a run (default: the newest of this run, or train.init_from...)",
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="longest response (default 256)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 = the most probable token (default 1)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="share of probability that is kept (default 1)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="tokens that are kept (default 0 = all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first response (default 0)")
    parser.add_argument(
        "--n", type=int, default=1, help="responses (default 1); the next ones count the seed up"
    )
    parser.add_argument("--think", action="store_true", help="open the answer with <think>, as released")
    parser.add_argument("--nproc", type=int, default=1, help="start this many local ranks (default 1)")
    return parser.parse_intermixed_args(list(argv))


def check(config: RunConfig, arguments: argparse.Namespace) -> None:
    """What `generate` needs beyond a possible run.

    Raises:
        ConfigError: no tokenizer, a backend without KV cache, an image that is no file, fewer than one response.
    """
    from megatron_vl.generate.request import SamplingParams

    if not config.data.tokenizer:
        raise ConfigError("data.tokenizer: no tokenizer; give a tokenizer.json or a SentencePiece .model")
    if config.parallel.layer_backend == "transformer_engine":
        raise ConfigError(
            "parallel.layer_backend = transformer_engine: its attention takes no KV cache of ours; set "
            "parallel.layer_backend=torch"
        )
    for image in arguments.image:
        if not Path(image).is_file():
            raise ConfigError(f"--image {image}: no such file")
    if arguments.n < 1:
        raise ConfigError(f"--n {arguments.n}: must be at least 1")
    if arguments.seed < 0:
        raise ConfigError(f"--seed {arguments.seed}: must be at least 0")
    SamplingParams(arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.top_k)


def answer(loaded: LoadedRun, arguments: argparse.Namespace) -> int:
    """Be one rank: build the model, compute image features, sample, print on rank 0."""
    from megatron_vl.parallel.runtime import reported, start_from_environment

    phase = Phase("joining the other ranks")
    config = loaded.config
    with start_from_environment(config.parallel, config.train.seed) as runtime, reported(runtime, phase):
        _answer(config, arguments, runtime, phase)
    return 0


def _answer(config: RunConfig, arguments: argparse.Namespace, runtime, phase: Phase) -> None:
    from megatron_vl.generate.features import FeatureStore
    from megatron_vl.generate.request import Request, SamplingParams, end_ids
    from megatron_vl.generate.rollout import LocalRollouts
    from megatron_vl.generate.screen import Screen

    phase.enter("reading the prompt")
    # a file named on the command line may lie anywhere: it is not a path from a data set
    builder, (prompt, images) = read_prompt(config, arguments)
    phase.enter("building the model")
    parts = load(config, runtime)
    phase.enter("computing image features")
    store = FeatureStore(
        parts, builder.images, config.generate.feature_dir or Path(config.run_dir) / "features"
    )
    store.ensure(images)
    params = SamplingParams(
        arguments.max_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        end_ids(config.model.tokens),
    )
    requests = [Request(prompt, number, arguments.seed + number) for number in range(arguments.n)]
    phase.enter("sampling")
    rollouts = LocalRollouts(parts, store.features, large=True, tick=phase.tick)
    screen = Screen(builder.text, params.stop_ids) if runtime.rank == 0 else None
    if screen:
        _to_stderr(rollouts.cost.describe(len(prompt.ids) + params.max_tokens))
    responses = rollouts.generate(requests, params, screen.show if screen else None)
    if screen:
        screen.finish(responses)


def read_prompt(config: RunConfig, arguments: argparse.Namespace):
    """(builder, (prompt, images)): one user turn, the images before the text."""
    from megatron_vl.data.sample import ImagePart, Message, Sample, TextPart
    from megatron_vl.generate.prompts import PromptBuilder

    builder = PromptBuilder(replace(config.data, data_root="/"), config.model, arguments.think)
    images = [ImagePart(str(Path(image).absolute())) for image in arguments.image]
    parts = (*images, *([TextPart(arguments.prompt)] if arguments.prompt else []))
    if not parts:
        raise ConfigError("--prompt: empty, and there is no --image; say something")
    return builder, builder.build(Sample("prompt", (Message("user", parts),)))


def load(config: RunConfig, runtime):
    """The model with the weights of ``--checkpoint``, of the run's newest checkpoint, or the run's first weights.

    Raises:
        ConfigError: there are only weights that were never trained.
    """
    from megatron_vl.checkpoint.resume import choose
    from megatron_vl.train.build import build
    from megatron_vl.train.prepare import first_weights

    train, folder = config.train, Path(config.run_dir) / "checkpoints"
    stored = None if train.init_from else choose(folder, config.checkpoint, runtime, _to_stderr)
    if stored is None and train.init_from is None and train.init_from_hf is None:
        raise ConfigError(
            f"run_dir = {config.run_dir}: it has no checkpoint, and neither train.init_from nor train.init_from_hf "
            "names weights; give --checkpoint DIR"
        )
    first = first_weights(config, stored, runtime)
    # frozen, the weights get no memory for gradients
    model = replace(config.model, freeze_vision=True, freeze_projector=True, freeze_decoder=True)
    parts = build(
        replace(config, model=model), runtime, stored.weight if stored else first.source, with_optimizer=False
    )
    if runtime.rank == 0:
        _to_stderr(f"weights: {stored.folder if stored else train.init_from or train.init_from_hf}")
    return parts


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
