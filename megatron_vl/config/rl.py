"""Reinforcement learning: PPO with a critic. Every quantity with its formula: docs/rl.md.

Defaults are those of the STEP3-VL-10B report where it gives one. "Not published" marks the others; they follow
Open-Reasoner-Zero, which the report says its PPO follows.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.key import key


@dataclass(frozen=True)
class ActorConfig:
    """Learning rate of the policy; the rest of its optimizer is `optim`."""

    lr: float = key("learning rate", 2e-6, at_least=0)
    lr_warmup_steps: int = key("linear warm-up from 0, in optimizer steps (not published)", 0, at_least=0)


@dataclass(frozen=True)
class CriticConfig:
    """The critic: the decoder with a value head, its own weights, optimizer and learning rate."""

    lr: float = key("learning rate", 5e-6, at_least=0)
    lr_warmup_steps: int = key("linear warm-up from 0, in optimizer steps (not published)", 0, at_least=0)
    warmup_iterations: int = key(
        "first iterations in which only the critic is trained (not published)", 0, at_least=0
    )
    updates: int = key("optimizer steps per iteration, each on its share of the rows", 4, at_least=1)
    init_std: float = key(
        "standard deviation of the fresh value head; 0 = it begins with V = 0 (not published)",
        1e-5,
        at_least=0,
    )


@dataclass(frozen=True)
class PpoConfig:
    """Advantages and losses."""

    gamma: float = key("discount per token", 1.0, above=0, at_most=1)
    lambda_actor: float = key("lambda of the advantages", 1.0, at_least=0, at_most=1)
    lambda_critic: float = key("lambda of the returns that the critic learns", 1.0, at_least=0, at_most=1)
    clip_low: float = key("the ratio is clipped below 1 minus this (not published)", 0.2, above=0, at_most=1)
    clip_high: float = key("the ratio is clipped above 1 plus this (not published)", 0.2, above=0)
    dual_clip: float | None = key(
        "where the advantage is negative a token's loss is at most this times its size; none = no limit",
        None,
        above=1,
    )
    value_clip: float | None = key(
        "values may move this far from those before the update; none = no limit (not published)", 0.2, above=0
    )
    ratio_mode: str = key(
        "old_logprob: against the policy before the iteration; detached: against itself, always 1; none: no ratio",
        "old_logprob",
        choices=("old_logprob", "detached", "none"),
    )
    tis_clip: float | None = key(
        "limit C of the truncated importance weight between trainer and sampler; none = no weight",
        8.0,
        above=0,
    )
    kl_coef: float = key("weight of the KL to the reference policy in the loss", 0.0, at_least=0)
    kl_form: str = key("k2 = half the squared log-ratio, k3 = r - 1 - log r", "k3", choices=("k2", "k3"))
    entropy_coef: float = key("weight of the entropy, which is maximised", 0.0, at_least=0)
    normalize_advantages: bool = key(
        "zero mean and unit deviation over all response tokens of the iteration (not published)", True
    )
    mini_batches: int = key("optimizer steps of the policy per iteration", 4, at_least=1)
    strict_on_policy: bool = key("one step per iteration on samples of the very weights; checked", False)
    truncated_reward: str = key(
        "a response cut at its length limit: zero = reward 0; bootstrap = the critic's value at the cut",
        "zero",
        choices=("zero", "bootstrap"),
    )


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn, and when the sampler's log-probabilities are too far off."""

    prompts_per_iteration: int = key("prompts of one iteration", 512, at_least=1)
    samples_per_prompt: int = key("responses to each prompt", 16, at_least=1)
    max_tokens: int = key("longest response in tokens", 16_384, at_least=1)
    temperature: float = key("temperature of sampling; the losses are those of temperature 1", 1.0, above=0)
    top_p: float = key("share of probability that is kept; 1 = all", 1.0, above=0, at_most=1)
    top_k: int = key("tokens that are kept; 0 = all", 0, at_least=0)
    open_thinking: bool = key("prompts end with <think>, as the released template has it", True)
    wave: int = key("responses between two entries of the journal: what a kill may cost", 512, at_least=1)
    alarm_mean: float = key(
        "mean |log-prob of the trainer - of the sampler| from which the iteration warns", 0.02, above=0
    )
    alarm_max: float | None = key("the same of one token; none = no limit", None, above=0)
    alarm_kl: float = key(
        "k3 estimate of KL(sampler || trainer) from which the iteration warns", 1e-3, above=0
    )

    @property
    def samples(self) -> int:
        """Responses of one iteration."""
        return self.prompts_per_iteration * self.samples_per_prompt


@dataclass(frozen=True)
class JudgeConfig:
    """A model that verifies, behind an OpenAI-compatible server. Needed where tasks ask for one."""

    base_url: str = key("address up to and including /v1; empty = no judge", "")
    model: str = key("name of the model as the server answers it", "")
    api_key_env: str = key("environment variable that holds the key; empty = none", "")
    request_seconds: float = key("of one attempt", 120.0, above=0)
    total_seconds: float = key("of all attempts of one request", 600.0, above=0)
    attempts: int = key(
        "of one request, after time-outs, refused connections and busy servers", 4, at_least=1
    )
    backoff_seconds: float = key(
        "pause after the first attempt that failed, doubled after each up to 30", 1.0, at_least=0, at_most=30
    )
    max_tokens: int = key("of the judge's reply, its reasoning included", 4096, at_least=1)
    concurrency: int = key("requests at once", 32, at_least=1)


@dataclass(frozen=True)
class RewardConfig:
    """From verdicts to rewards. Weights are not published."""

    score: float = key("what a right answer is worth", 1.0, above=0)
    language: float = key(
        "the most that words in another script than the prompt's cost; 0 = nothing", 0.0, at_least=0
    )
    language_share: float = key(
        "share of words in the prompt's script from which nothing is deducted", 0.8, above=0, at_most=1
    )
    accept_at: float = key("a response counts as accepted from this score on", 1.0, above=0, at_most=1)
    max_error_share: float = key(
        "share of an iteration's verdicts that may fail before the run stops", 0.05, at_least=0, at_most=1
    )
    math_processes: int = key("processes that compare mathematics", 4, at_least=1)
    judge: JudgeConfig = key("verifying model", factory=JudgeConfig)


@dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning."""

    prompts: list[str] = key("JSONL files of prompts, each with its task", factory=list)
    eval_prompts: list[str] = key("JSONL files of held-out prompts", factory=list)
    iterations: int = key("length of the run: each draws, scores and learns once", 600, at_least=1)
    eval_interval: int = key("iterations between evaluations, one before the first; 0 = never", 0, at_least=0)
    eval_samples: int = key("responses to each held-out prompt", 1, at_least=1)
    keep_journal: int = key("iterations whose tokens and log-probabilities are kept", 2, at_least=1)
    page_prompts: int = key("prompts shown on each iteration's page of rollouts; 0 = no page", 8, at_least=0)
    actor: ActorConfig = key("the policy", factory=ActorConfig)
    critic: CriticConfig = key("the value function", factory=CriticConfig)
    ppo: PpoConfig = key("advantages and losses", factory=PpoConfig)
    rollout: RolloutConfig = key("samples", factory=RolloutConfig)
    rewards: RewardConfig = key("verifiers and rewards", factory=RewardConfig)

    @property
    def pieces(self) -> int:
        """Parts into which an iteration's rows are cut, so that steps of actor and critic are whole parts."""
        return max(self.ppo.mini_batches, self.critic.updates)
