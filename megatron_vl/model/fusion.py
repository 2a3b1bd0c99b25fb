"""Put image features into their ``<im_patch>`` slots."""

from __future__ import annotations

import numpy as np
import torch

from megatron_vl.errors import DataError


def image_slots(
    input_ids: torch.Tensor, im_patch: int, num_features: int, names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Row and position of every image feature in stream order (row-major), int64 ``[num_features]`` on the host.

    input_ids: int64 ``[b, S]``, whole rows, the same on every rank of a replica, so that all ranks raise or none.

    Raises:
        DataError: slots and features differ in number. ``data/batch.check_image_slots`` has compared them sample by
            sample before, so here something was lost between data and model.
    """
    is_patch = input_ids == im_patch
    rows, positions = is_patch.nonzero().cpu().numpy().T
    if len(rows) != num_features:
        per_row = ", ".join(str(n) for n in is_patch.sum(dim=1).tolist())
        raise DataError(
            f"samples {', '.join(names)}: {len(rows)} <im_patch> ids ({per_row} by row) but {num_features} image "
            "feature rows; each image must be expanded exactly once, by data/template.py"
        )
    return rows, positions


def put_features(
    embeddings: torch.Tensor, features: torch.Tensor, rows: np.ndarray, positions: np.ndarray
) -> torch.Tensor:
    """``embeddings`` ``[s, b, h]`` with ``features`` ``[n, h]`` in their slots; differentiable in both.

    rows, positions: int64 ``[n]``, batch row and position among the ``s`` of each feature.
    """
    where = [torch.from_numpy(index).to(embeddings.device, non_blocking=True) for index in (positions, rows)]
    return embeddings.index_put(where, features.to(embeddings.dtype))
