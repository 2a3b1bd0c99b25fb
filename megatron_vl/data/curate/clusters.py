"""Deterministic k-means on unit vectors (cosine similarity), and how many samples each cluster may keep."""

from __future__ import annotations

import numpy as np

from megatron_vl.errors import DataError

_ROWS = 8192  # of the embedding array in memory at a time


def assign_clusters(
    embeddings: np.ndarray, num_clusters: int, iterations: int, fit_samples: int, seed: int
) -> np.ndarray:
    """Cluster of every row: int64 [n].

    embeddings: floating point [n, d], may be a memory map; rows are scaled to length 1. The centres are
    fitted on `fit_samples` rows spread evenly over the array. Deterministic for a seed on one machine.
    """
    count = len(embeddings)
    fit_rows = np.unique(np.linspace(0, count - 1, min(fit_samples, count)).astype(np.int64))
    points = unit_rows(embeddings[fit_rows])
    centres = _first_centres(points, min(num_clusters, len(points)), np.random.default_rng(seed))
    labels = np.full(len(points), -1)
    for _ in range(iterations):
        new_labels, similarity = nearest(points, centres)
        if np.array_equal(new_labels, labels):
            break
        labels = new_labels
        centres = _moved(points, labels, similarity, centres)
    blocks = (unit_rows(embeddings[row : row + _ROWS]) for row in range(0, count, _ROWS))
    return np.concatenate([nearest(block, centres)[0] for block in blocks])


def nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most similar centre of each point and the similarity; the lowest number among equals."""
    labels, best = np.empty(len(points), dtype=np.int64), np.empty(len(points), dtype=np.float32)
    for start in range(0, len(points), _ROWS):
        similarity = points[start : start + _ROWS] @ centres.T
        labels[start : start + _ROWS] = similarity.argmax(axis=1)
        best[start : start + _ROWS] = similarity.max(axis=1)
    return labels, best


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """float32 rows of length 1; rows of zeros stay. DataError for NaN and infinity."""
    rows = np.asarray(rows, dtype=np.float32)
    if not np.isfinite(rows).all():
        raise DataError("an embedding holds NaN or infinity; remove or recompute it")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def allowances(
    counts: np.ndarray, max_per_cluster: int | None, target_samples: int | None, power: float
) -> np.ndarray:
    """Samples that each cluster may keep: int64 [k], never more than it has.

    With a cap: min(count, cap). With a target: min(count, scale * count ** power), the scale being the one
    that keeps `target_samples` in all; what rounding leaves over goes to the largest remainders.
    """
    counts = counts.astype(np.int64)
    allowed = counts if max_per_cluster is None else np.minimum(counts, max_per_cluster)
    if target_samples is None or target_samples >= allowed.sum():
        return allowed
    shares = np.where(counts > 0, counts.astype(np.float64) ** power, 0)
    low, high = 0.0, float(target_samples) + float(counts.max())
    for _ in range(100):  # bisection to the last bit of a double
        middle = (low + high) / 2
        if np.minimum(allowed, middle * shares).sum() < target_samples:
            low = middle
        else:
            high = middle
    exact = np.minimum(allowed, high * shares)
    kept = np.floor(exact + 1e-9).astype(np.int64)
    remainder = np.where(kept < allowed, exact - kept, -1.0)
    for cluster in np.argsort(-remainder, kind="stable")[: target_samples - int(kept.sum())]:
        kept[cluster] += 1
    return kept


def _first_centres(points: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """k-means++: each centre drawn with probability in proportion to its distance from the ones before."""
    chosen = [int(random.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < count:
        similarity = points @ points[chosen[-1]]
        distance = np.minimum(distance, np.clip(1 - similarity.astype(np.float64), 0, None))
        distance[chosen[-1]] = 0
        cumulated = np.cumsum(distance)
        if cumulated[-1] <= 1e-6 * len(points):  # fewer different points than clusters
            break
        drawn = int(np.searchsorted(cumulated, random.random() * cumulated[-1], side="right"))
        chosen.append(min(drawn, len(points) - 1))
    return points[chosen]


def _moved(points: np.ndarray, labels: np.ndarray, similarity: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The mean direction of each cluster; an empty one moves to the point that fits worst."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    moved = centres.copy()
    moved[found] = unit_rows(np.add.reduceat(points[order], starts, axis=0))
    empty = np.setdiff1d(np.arange(len(centres)), found)
    worst = np.argsort(similarity, kind="stable")[: len(empty)]
    moved[empty] = points[worst]
    return moved
