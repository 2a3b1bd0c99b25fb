"""Clusters, caps and groups of four."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_vl.data.curate.clusters import allowances, assign_clusters
from megatron_vl.data.curate.decide import balance, group_in_fours
from megatron_vl.data.curate.rules import ConceptBalance
from megatron_vl.errors import DataError


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around well separated directions in 16 dimensions, shuffled, with their true cluster."""
    draw = np.random.default_rng(seed)
    truth = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = np.eye(16)[: len(sizes)]
    return (centres[truth] + draw.normal(0, 0.05, (len(truth), 16))).astype(np.float16), truth


def test_k_means_finds_separated_clusters():
    points, truth = blobs([200, 50, 10, 5])
    labels = assign_clusters(points, 4, 20, 1000, seed=1)
    pairs = set(zip(truth.tolist(), labels.tolist()))
    assert len(pairs) == 4 and {a for a, _ in pairs} == {b for _, b in pairs} == {0, 1, 2, 3}


def test_k_means_is_deterministic_and_depends_on_the_seed_only():
    points = np.random.default_rng(3).normal(size=(500, 16)).astype(np.float32)
    first = assign_clusters(points, 12, 10, 200, seed=5)
    assert np.array_equal(first, assign_clusters(points.copy(), 12, 10, 200, seed=5))
    assert not np.array_equal(first, assign_clusters(points, 12, 10, 200, seed=6))


def test_k_means_with_fewer_points_than_clusters_and_equal_points():
    assert len(assign_clusters(np.eye(3, dtype=np.float32), 10, 5, 100, 0)) == 3
    assert set(assign_clusters(np.ones((50, 4), dtype=np.float32), 5, 5, 100, 0)) == {0}
    with pytest.raises(DataError, match="NaN"):
        assign_clusters(np.full((5, 4), np.nan, dtype=np.float32), 2, 5, 100, 0)


@pytest.mark.parametrize(
    ("cap", "target", "power", "expected"),
    [
        (50, None, 0.5, [50, 50, 9, 0]),
        (None, None, 0.5, [900, 100, 9, 0]),
        (None, 209, 0.0, [100, 100, 9, 0]),  # equal shares, small clusters whole
        (None, 109, 0.5, [79, 26, 4, 0]),
        (None, 2000, 0.0, [900, 100, 9, 0]),
        (None, 101, 1.0, [90, 10, 1, 0]),
        (40, 60, 0.0, [26, 25, 9, 0]),
        (None, 1, 0.0, [1, 0, 0, 0]),
    ],
)
def test_allowances(cap, target, power, expected):
    found = allowances(np.array([900, 100, 9, 0]), cap, target, power).tolist()
    if expected == [79, 26, 4, 0]:  # in proportion to 30 : 10 : 3, by the sum and the order of size
        assert sum(found) == 109 and abs(found[0] - 109 * 30 / 43) < 1 and abs(found[2] - 109 * 3 / 43) < 1
    else:
        assert found == expected


@pytest.fixture
def given(tmp_path):
    (tmp_path / "ids.txt").write_text("".join(f"s{number}\n" for number in range(20)))
    np.save(tmp_path / "clusters.npy", np.array([0] * 12 + [1] * 6 + [7] * 2))
    rule = ConceptBalance(True, ids=str(tmp_path / "ids.txt"), cluster_ids=str(tmp_path / "clusters.npy"))
    return replace(rule, max_per_cluster=4)


SAMPLES = [(number, f"s{number}") for number in range(20)]


def test_caps_per_given_cluster(given):
    dropped, facts = balance(given, SAMPLES)
    kept = sorted(set(range(20)) - set(dropped))
    assert [sum(low <= number < high for number in kept) for low, high in ((0, 12), (12, 18), (18, 20))] == [
        4,
        4,
        2,
    ]
    assert {finding.reason for finding in dropped.values()} == {"cluster_cap"}
    assert facts["largest_before"] == 12 and facts["largest_after"] == 4 and facts["clusters"] == 3


def test_the_choice_depends_on_ids_not_on_order(given):
    dropped, _ = balance(given, SAMPLES)
    backwards = [(100 - number, sample_id) for number, sample_id in reversed(SAMPLES)]
    other, _ = balance(given, backwards)
    assert {100 - number for number in other} == set(dropped)
    assert set(balance(replace(given, seed=1), SAMPLES)[0]) != set(dropped)


def test_samples_without_a_row(given):
    with pytest.raises(DataError, match="no row for 1 of 21 samples, the first is 'new'"):
        balance(given, [*SAMPLES, (50, "new")])
    dropped, facts = balance(replace(given, missing="keep"), [*SAMPLES, (50, "new")])
    assert 50 not in dropped and facts["without_row"] == 1


def test_wrong_arrays_are_named(given, tmp_path):
    np.save(tmp_path / "short.npy", np.zeros(3, dtype=int))
    np.save(tmp_path / "float.npy", np.zeros(20))
    np.save(tmp_path / "objects.npy", np.array([None] * 20), allow_pickle=True)
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    for name, message in (("short", "n = 20"), ("float", "whole numbers"), ("objects", "plain numbers")):
        with pytest.raises(DataError, match=message):
            balance(replace(given, cluster_ids=str(tmp_path / f"{name}.npy")), SAMPLES)
    with pytest.raises(DataError, match="twice.txt:3: the id 'a' stands on line 1 too"):
        balance(replace(given, ids=str(tmp_path / "twice.txt")), SAMPLES)


def test_embeddings_are_clustered(given, tmp_path):
    points, truth = blobs([12, 5, 3])
    np.save(tmp_path / "e.npy", points)
    rule = replace(given, cluster_ids=None, embeddings=str(tmp_path / "e.npy"), num_clusters=3)
    dropped, _ = balance(rule, SAMPLES)
    kept = np.array(sorted(set(range(20)) - set(dropped)))
    assert np.bincount(truth[kept]).tolist() == [4, 4, 3]


def test_fours_stay_within_their_source():
    source_of = {number: int(number >= 10) for number in range(20)}
    groups, left_over = group_in_fours([0, 2, 3, 5, 8, 12, 13, 15, 19], source_of)
    assert groups == [(0, 2, 3, 5), (12, 13, 15, 19)] and left_over == 1
    assert group_in_fours([], {}) == ([], 0)
