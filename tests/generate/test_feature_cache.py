"""Image features on disk: what is written is read, damage is seen, processes share a folder."""

import multiprocessing

import pytest
import torch

from megatron_vl.generate.feature_cache import DamagedFeatures, FeatureCache, feature_key, pack, unpack

KEY = feature_key("image", "weights", "rule")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path, dtype):
    features = torch.randn(5, 8).to(dtype)
    FeatureCache(tmp_path / "new" / "folder").write(KEY, features)
    found = FeatureCache(tmp_path / "new" / "folder").read(KEY, 5, 8, dtype)
    assert found.dtype == dtype and torch.equal(found, features)
    assert FeatureCache(tmp_path).read(KEY, 5, 8, dtype) is None


def test_each_part_of_the_key_counts():
    keys = {KEY, feature_key("other", "weights", "rule"), feature_key("image", "other", "rule")}
    keys |= {feature_key("image", "weights", "other"), feature_key("imageweights", "", "rule")}
    assert len(keys) == 5 and all(len(key) == 64 for key in keys)


def test_damage_is_seen_wherever_it_is(tmp_path):
    cache = FeatureCache(tmp_path)
    whole = pack(torch.arange(12.0).reshape(3, 4))
    assert unpack(whole, (3, 4), torch.float32)[2, 3] == 11
    (path,) = write_bytes(cache, whole)
    for place in (0, 5, 30, len(whole) - 1):
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        with pytest.raises(DamagedFeatures):
            cache.read(KEY, 3, 4, torch.float32)
    for cut in (0, 3, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedFeatures):
            cache.read(KEY, 3, 4, torch.float32)
    path.write_bytes(whole)
    for shape, dtype in (((4, 3), torch.float32), ((3, 4), torch.bfloat16)):
        with pytest.raises(DamagedFeatures, match="wanted"):
            cache.read(KEY, *shape, dtype)


def write_bytes(cache: FeatureCache, data: bytes) -> list:
    cache.write(KEY, torch.zeros(1, 1))
    found = [path for path in cache.folder.rglob("*") if path.is_file()]
    for path in found:
        path.write_bytes(data)
    return found


def write_often(folder: str, seed: int) -> None:
    cache = FeatureCache(folder)
    for _ in range(20):
        cache.write(KEY, torch.full((50, 64), float(seed)))


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path):
    """Readers meet a whole entry of one of the writers, never a mixture."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(str(tmp_path), seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    cache, seen = FeatureCache(tmp_path), 0
    while any(writer.is_alive() for writer in writers) or not seen:
        found = cache.read(KEY, 50, 64, torch.float32)
        if found is not None:
            seen += 1
            assert len(found.unique()) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen
