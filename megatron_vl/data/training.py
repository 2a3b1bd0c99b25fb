"""The training data of a run as one loader: JSONL files one row each, or domains after a data plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_vl.config.mixture import DomainConfig
from megatron_vl.config.schema import DataConfig, RunConfig
from megatron_vl.data.bad_samples import BadSampleLog
from megatron_vl.data.lengths import Source
from megatron_vl.data.loader import Loader, Place, train_loader
from megatron_vl.data.packed import (
    DomainSources,
    PackedMicroBatches,
    open_plan,
    order_description,
    packed_loader,
)
from megatron_vl.data.plan_report import record_of, report_lines
from megatron_vl.data.plan_settings import PlanSettings, training_domains
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sources.megatron_bin import TokenRule
from megatron_vl.data.sources.open import open_source


def is_planned(data: DataConfig) -> bool:
    """Whether a data plan is made ahead: for packed rows and for mixtures."""
    return data.packing.enabled or bool(data.domains) or bool(data.mixture)


def training_loader(
    config: RunConfig,
    place: Place,
    num_steps: int,
    timeout_seconds: float,
    log: BadSampleLog,
    first: bool,
    say: Callable[[str], None],
) -> Loader:
    """The loader of a run's training data for the rank at ``place``.

    first: one process of the run, which indexes what is not indexed yet while the others wait, and stores the plan
    in ``data_plan.json`` of the run folder. log: gets what a source refused when it was indexed.
    """
    data, train = config.data, config.train
    batch = (train.micro_batch_size, train.global_batch_size)
    if not is_planned(data):
        return train_loader(
            data, config.model, place, *batch, num_steps=num_steps, timeout_seconds=timeout_seconds
        )
    domains = training_domains(data.train, data.domains)
    sources = [open_domain(domain, config, say) for domain in domains]
    for source in sources:
        log.add(source.refused())
    settings = PlanSettings.of(
        data, data.packing, domains, data.mixture, config.model, train.global_batch_size
    )
    readings = [f"{domain.format} {domain.action_schema or ''}".strip() for domain in domains]
    folder = Path(config.run_dir)
    plan = open_plan(
        settings, sources, data, data.packing, config.model, folder, num_steps, first, say, readings
    )
    if first:
        say("\n".join(report_lines(plan, place.dp_size)))
        (folder / "data_plan.json").write_text(json.dumps(record_of(plan), indent=1) + "\n")
    rows = RowBuilder(data, config.model)
    micro_batches = PackedMicroBatches(DomainSources(sources), plan, rows, place, train.micro_batch_size)
    return packed_loader(micro_batches, timeout_seconds=timeout_seconds)


def open_domain(domain: DomainConfig, config: RunConfig, say: Callable[[str], None]) -> Source:
    """The samples of a domain; the index of its files is kept in the run folder, or in packing.index_dir."""
    folder = config.data.packing.index_dir or str(Path(config.run_dir) / "data_index")
    return open_source(
        domain.paths,
        domain.format,
        cache_dir=str(Path(folder) / "files"),
        say=say,
        action_schema=domain.action_schema,
        token_rule=TokenRule.for_model(config.model),
    )


def sample_order(config: RunConfig, loader: Loader) -> str:
    """What decides which samples step k trains on; it must not change when a run is resumed."""
    micro_batches = loader.micro_batches
    if isinstance(micro_batches, PackedMicroBatches):
        return order_description(micro_batches.plan)
    files = [
        f"{f['path']} ({f['samples']} samples, {f['bytes']} bytes)" for f in micro_batches.source.describe()
    ]
    return f"{', '.join(files)} with seed {config.data.seed} and {config.train.global_batch_size} rows a step"
