"""The second pass: the rules that need to know all samples. Pure: arrays in, decisions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_vl.data.curate.clusters import allowances, assign_clusters
from megatron_vl.data.curate.mosaic import draw
from megatron_vl.data.curate.near_duplicates import choose_survivors
from megatron_vl.data.curate.outcome import Outcome, Pair
from megatron_vl.data.curate.reasons import Finding
from megatron_vl.data.curate.rules import ConceptBalance, CurationConfig, NearDuplicates
from megatron_vl.errors import DataError


@dataclass
class Gathered:
    """What the second pass keeps of the first, for the samples that are kept so far, in input order.

    Numbers of samples count over all sources. hash_samples and hashes: one entry per image.
    """

    numbers: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    pixels: list[int] = field(default_factory=list)
    hash_samples: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    pairs: dict[int, Pair] = field(default_factory=dict)

    def add(self, number: int, source: int, outcome: Outcome) -> None:
        if outcome.reason is not None:
            return
        self.numbers.append(number)
        self.ids.append(outcome.id)
        self.sources.append(source)
        self.pixels.append(outcome.pixels)
        self.hash_samples += [number] * len(outcome.hashes)
        self.hashes += outcome.hashes
        if outcome.pair is not None:
            self.pairs[number] = outcome.pair


@dataclass
class Decisions:
    """dropped: by sample number. mosaics: four sample numbers each. facts: what the report says about it."""

    dropped: dict[int, Finding] = field(default_factory=dict)
    mosaics: list[tuple[int, int, int, int]] = field(default_factory=list)
    facts: dict[str, dict[str, int]] = field(default_factory=dict)


def decide(config: CurationConfig, gathered: Gathered) -> Decisions:
    """Near-duplicates first, then concept balance, then mosaics of what is left."""
    decisions = Decisions()
    ids = dict(zip(gathered.numbers, gathered.ids))
    if config.near_duplicates.enabled:
        decisions.dropped |= drop_near_duplicates(config.near_duplicates, gathered, ids)
    if config.concept_balance.enabled:
        names = [source.name for source in config.sources]
        chosen = {names.index(name) for name in config.concept_balance.sources} or set(range(len(names)))
        left = [
            (number, sample_id)
            for number, sample_id, source in zip(gathered.numbers, gathered.ids, gathered.sources)
            if number not in decisions.dropped and source in chosen
        ]
        dropped, facts = balance(config.concept_balance, left)
        decisions.dropped |= dropped
        decisions.facts["concept_balance"] = facts
    if config.mosaic.enabled:
        source_of = dict(zip(gathered.numbers, gathered.sources))
        left = [number for number in gathered.pairs if number not in decisions.dropped]
        decisions.mosaics, unused = group_in_fours(left, source_of)
        decisions.facts["mosaic"] = {"mosaics": len(decisions.mosaics), "pairs_left_over": unused}
    return decisions


def drop_near_duplicates(rule: NearDuplicates, gathered: Gathered, ids: dict[int, str]) -> dict[int, Finding]:
    """Findings by sample number."""
    numbers = np.array(gathered.numbers, dtype=np.int64)
    order = numbers
    if rule.prefer == "largest":
        order = numbers[np.argsort(-np.array(gathered.pixels, dtype=np.int64), kind="stable")]
    found = choose_survivors(
        np.array(gathered.hash_samples, dtype=np.int64),
        np.array(gathered.hashes, dtype=np.uint64),
        order,
        rule.radius,
        rule.min_share,
    )
    return {
        duplicate.sample: Finding(
            "near_duplicate", f"its images are within {duplicate.distance} bits of {ids[duplicate.survivor]}"
        )
        for duplicate in found
    }


def balance(
    rule: ConceptBalance, samples: Sequence[tuple[int, str]]
) -> tuple[dict[int, Finding], dict[str, int]]:
    """Findings by sample number, and facts. samples: (number, id) of those to be balanced.

    Within a cluster the samples with the lowest draw stay; a draw depends on the seed and the id, so the
    choice does not change with the order of the data.
    """
    rows = read_ids(rule.ids)
    clusters = cluster_rows(rule, len(rows))
    missing = [sample_id for _, sample_id in samples if sample_id not in rows]
    if missing and rule.missing == "error":
        raise DataError(
            f"{rule.ids}: no row for {len(missing)} of {len(samples)} samples, the first is {missing[0]!r}; "
            "add them, or set concept_balance.missing: keep"
        )
    members: dict[int, list[tuple[float, int]]] = {}
    for number, sample_id in samples:
        if sample_id in rows:
            place = (draw(rule.seed, sample_id), number)
            members.setdefault(int(clusters[rows[sample_id]]), []).append(place)
    found = sorted(members)
    counts = np.array([len(members[cluster]) for cluster in found], dtype=np.int64)
    allowed = allowances(counts, rule.max_per_cluster, rule.target_samples, rule.power)
    dropped = {}
    for cluster, limit in zip(found, allowed.tolist()):
        for _, number in sorted(members[cluster])[limit:]:
            detail = f"cluster {cluster} has {len(members[cluster])} samples, {limit} stay"
            dropped[number] = Finding("cluster_cap", detail)
    facts = {
        "samples": len(samples),
        "without_row": len(missing),
        "clusters": len(found),
        "largest_before": int(counts.max(initial=0)),
        "largest_after": int(allowed.max(initial=0)),
    }
    return dropped, facts


def read_ids(path: str) -> dict[str, int]:
    """Row of every id of a text file with one id per line. DataError for an id that is given twice."""
    rows: dict[str, int] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            sample_id = line.rstrip("\r\n")
            if sample_id in rows:
                first = rows[sample_id] + 1
                raise DataError(
                    f"{path}:{number + 1}: the id {sample_id!r} stands on line {first} too; ids must differ"
                )
            rows[sample_id] = number
    return rows


def cluster_rows(rule: ConceptBalance, count: int) -> np.ndarray:
    """Cluster of every row: int64 [count]. DataError for an array of another form."""
    path = rule.cluster_ids or rule.embeddings
    assert path is not None
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path}: is not a .npy file of plain numbers ({error}); write it with numpy.save"
        ) from error
    if rule.cluster_ids:
        wanted, right = "[n] whole numbers", array.ndim == 1 and array.dtype.kind in "iu"
    else:
        wanted, right = (
            "[n, d] floating point",
            array.ndim == 2 and array.dtype.kind == "f" and array.shape[1] > 0,
        )
    if not right or len(array) != count or not count:
        shape = "x".join(map(str, array.shape))
        raise DataError(
            f"{path}: is {shape} {array.dtype}; {wanted} with n = {count} (lines of {rule.ids}) is needed"
        )
    if rule.cluster_ids:
        return np.asarray(array, dtype=np.int64)
    return assign_clusters(array, rule.num_clusters, rule.iterations, rule.fit_samples, rule.seed)


def group_in_fours(
    numbers: Sequence[int], source_of: dict[int, int]
) -> tuple[list[tuple[int, int, int, int]], int]:
    """Neighbours of one source in fours, in input order, and how many are left over."""
    groups, left_over = [], 0
    for source in sorted({source_of[number] for number in numbers}):
        own = [number for number in sorted(numbers) if source_of[number] == source]
        whole = len(own) - len(own) % 4
        groups += [tuple(own[start : start + 4]) for start in range(0, whole, 4)]
        left_over += len(own) % 4
    return groups, left_over
