"""Which data a run sees in which shares, and how documents are packed into rows.

Only names, numbers and the rules that concern one key stand here. Rules between keys are in
`plan/mixture_checks.py`; what depends on the data (an empty domain) is found when the plan is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.key import key


@dataclass(frozen=True)
class DomainConfig:
    """One domain of the training data: files that are weighed as one."""

    name: str = key("name in plans and logs, unique")
    paths: list[str] = key("its files or folders", factory=list)
    modality: str = key(
        "side of a phase's text_share that the domain counts for; text domains may hold no image",
        "multimodal",
        choices=("text", "multimodal"),
    )
    weight: float | None = key(
        "share of the tokens, relative to the other domains (of its modality, with text_share); 0 = none",
        None,
        at_least=0,
    )
    epochs: float | None = key(
        "instead of a weight: how often each document is seen in a phase", None, at_least=0
    )
    max_epochs: float | None = key(
        "a plan that repeats the domain more often over the whole run is refused; none = no limit",
        None,
        above=0,
    )
    format: str = key(
        "auto = by the names of the files, see docs/data.md",
        "auto",
        choices=("auto", "jsonl", "sharegpt", "gui", "html", "webdataset", "megatron", "parquet"),
    )
    action_schema: str | None = key("file that lists the actions of format gui", None)


@dataclass(frozen=True)
class DomainShare:
    """What one domain gets in one phase, instead of what the domain itself says."""

    name: str = key("name of the domain")
    weight: float | None = key("as domains[].weight", None, at_least=0)
    epochs: float | None = key("as domains[].epochs", None, at_least=0)


@dataclass(frozen=True)
class MixturePhase:
    """One stretch of the run with its own mixture."""

    tokens: int | None = key(
        "length in row tokens, padding included, as in schedule.phases; none = the rest of the run, or what "
        "the epochs make",
        None,
        at_least=1,
    )
    text_share: float | None = key(
        "share of the tokens that text domains get, e.g. 0.9 for 9:1; none = as the weights say",
        None,
        at_least=0,
        at_most=1,
    )
    domains: list[DomainShare] = key(
        "weights or epochs of this phase; a domain that is not named gets none; empty = those of the domains",
        factory=list,
    )


@dataclass(frozen=True)
class PackingConfig:
    """How whole documents are joined into rows. The plan that follows does not depend on the layout."""

    enabled: bool = key("several documents per row, each attending to itself only", False)
    pad_multiple: int = key(
        "documents are padded to a multiple of this, in every layout; the multiple that the layout needs "
        "(2 x CP, x TP with sequence parallelism) must divide it",
        32,
        at_least=1,
    )
    look_ahead_rows: int = key("rows' worth of documents that are packed together", 128, at_least=1)
    max_global_views: int | None = key("global views in a row; none = no limit", None, at_least=1)
    max_crops: int | None = key("crops in a row; none = no limit", None, at_least=1)
    overlong: str = key(
        "a conversation that no row takes: refuse it, or cut it between turns; both are counted",
        "refuse",
        choices=("refuse", "split_turns"),
    )
    balance: bool = key("spread vision and attention work evenly over the rows", True)
    index_dir: str | None = key("folder of the length indices; none = data_index in the run folder", None)
    index_workers: int = key("processes that build a length index; 0 = in this process", 4, at_least=0)
