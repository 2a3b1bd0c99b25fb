"""A reinforcement learning run on one rank: its live parts in one place, built once from the description."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_vl.checkpoint.resume import choose
from megatron_vl.checkpoint.saver import Saver
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.config.dump import to_yaml
from megatron_vl.config.load import LoadedRun
from megatron_vl.config.rl import JudgeConfig, RewardConfig
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.bad_samples import BadSampleLog
from megatron_vl.generate.features import FeatureStore
from megatron_vl.generate.prompts import PromptBuilder
from megatron_vl.generate.request import Prompt, SamplingParams, end_ids
from megatron_vl.generate.rollout import LocalRollouts
from megatron_vl.parallel.heartbeat import Phase, slow_seconds
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.rl.build import Models, build_models
from megatron_vl.rl.prompt_set import PromptSet
from megatron_vl.rl.rewards.chat_server import ChatServer, ServerSettings
from megatron_vl.rl.rewards.judge import Judge
from megatron_vl.rl.rewards.kept_verdicts import KeptVerdicts
from megatron_vl.rl.rewards.math_pool import MathPool, MathSettings
from megatron_vl.rl.rewards.score import Services
from megatron_vl.train.console import startup_report
from megatron_vl.train.faults import StopRequest
from megatron_vl.train.metrics import MetricsFile, device_peak
from megatron_vl.train.prepare import first_weights, resolved, write_resolved


@dataclass
class RlRun:
    """services: on rank 0, which verifies. file: metrics of rank 0. stored: the checkpoint to continue from."""

    config: RunConfig
    runtime: Runtime
    models: Models
    store: FeatureStore
    rollouts: LocalRollouts
    prompts: PromptSet
    eval_prompts: PromptSet | None
    services: Services
    saver: Saver
    stored: Stored | None
    refused: BadSampleLog
    say: Callable[[str], None]
    phase: Phase
    folder: Path
    file: MetricsFile | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    closing: ExitStack = field(default_factory=ExitStack)

    @property
    def params(self) -> SamplingParams:
        """How responses are drawn."""
        rollout = self.config.rl.rollout
        ends = end_ids(self.config.model.tokens)
        return SamplingParams(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k, ends)

    @property
    def step_seconds(self) -> float:
        """How long a phase may last without progress."""
        return self.config.parallel.timeout_seconds

    def features_of(self, prompt: Prompt) -> torch.Tensor:
        """Projected features of a prompt's images in stream order, ``[rows, h]``."""
        return self.store.features(prompt.images)

    def close(self) -> None:
        """End verifying processes and loaders."""
        self.closing.close()


def prepare(loaded: LoadedRun, runtime: Runtime, phase: Phase) -> RlRun:
    """Build models, sampler, feature store, prompts, verifiers and saver of this rank; rank 0 prints what it is."""
    config, first = loaded.config, runtime.rank == 0
    folder = Path(config.run_dir)

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    phase.enter("looking for a checkpoint")
    stored = choose(folder / "checkpoints", config.checkpoint, runtime, say)
    phase.enter("building the models", limit=slow_seconds(config.parallel))
    with_reference = config.rl.ppo.kl_coef > 0  # it is read from the first weights, also when the run goes on
    weights = first_weights(config, None if with_reference else stored, runtime)
    models = build_models(config, runtime, weights.source)
    phase.enter("opening the prompts")
    rl = config.rl
    builder = PromptBuilder(config.data, config.model, rl.rollout.open_thinking)
    store = FeatureStore(models.actor, builder.images, config.generate.feature_dir or folder / "features")
    rollouts = LocalRollouts(models.actor, store.features, tick=phase.tick)
    limits = (config.data.seq_length, rl.rollout.max_tokens)
    prompts = PromptSet(rl.prompts, builder, *limits)
    held_out = PromptSet(rl.eval_prompts, builder, *limits) if rl.eval_prompts else None
    closing = ExitStack()
    services = start_services(rl.rewards, folder, closing) if first else Services()
    chosen = to_yaml(resolved(config, models.actor))
    if first:
        write_resolved(folder, loaded, chosen)
    saver = Saver(folder / "checkpoints", config.checkpoint, models.live(), chosen, say)
    saver.source_dtypes = weights.dtypes
    parts = models.actor
    names = (parts.backend.name, parts.fused_kernels)
    say("\n".join(startup_report(loaded, runtime, *names, parts.dtype, device_peak(runtime))))
    say(f"{len(prompts)} prompts; {rl.iterations} iterations of {rl.rollout.samples} responses")
    log = BadSampleLog(str(folder / "bad_samples.jsonl"), write=first)
    return RlRun(
        config, runtime, models, store, rollouts, prompts, held_out, services, saver, stored, log, say, phase, folder,
        closing=closing,
    )  # fmt: skip


def start_services(rewards: RewardConfig, folder: Path, closing: ExitStack) -> Services:
    """What verifies outside of this process: mathematics in processes that start when they are asked, and the judge."""
    pool = closing.enter_context(MathPool(MathSettings(processes=rewards.math_processes)))
    judge = None
    if rewards.judge.base_url:
        kept = KeptVerdicts(folder / "judge")
        closing.callback(kept.close)
        judge = Judge(ChatServer(server_settings(rewards.judge)), kept)
    return Services(pool, judge)


def server_settings(judge: JudgeConfig) -> ServerSettings:
    """Raises ConfigErrors for an address that is none."""
    return ServerSettings(
        judge.base_url,
        judge.model,
        judge.api_key_env,
        request_seconds=judge.request_seconds,
        total_seconds=judge.total_seconds,
        attempts=judge.attempts,
        backoff_seconds=judge.backoff_seconds,
        max_tokens=judge.max_tokens,
        concurrency=judge.concurrency,
    )
