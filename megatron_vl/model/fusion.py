"""Put image features into their ``<im_patch>`` slots."""

from __future__ import annotations

import torch

from megatron_vl.errors import DataError


def feature_slots(
    input_ids: torch.Tensor, index: torch.Tensor | None, im_patch: int, num_features: int, names: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where this rank's image positions are and which feature row each one takes.

    input_ids: int64 ``[b, S]``, whole rows. index: the positions that this context-parallel rank holds, None for
    all. Features stand in stream order (row-major over ``[b, S]``). Returns ``(rows, positions, features)``,
    int64 each: row and local position of a slot, and its feature row.

    Raises:
        DataError: slots and features differ in number. ``data/batch.check_image_slots`` has compared them sample by
            sample before, so here something was lost between data and model.
    """
    is_patch = input_ids == im_patch
    slots = int(is_patch.sum())
    if slots != num_features:
        per_row = ", ".join(str(n) for n in is_patch.sum(dim=1).tolist())
        raise DataError(
            f"samples {', '.join(names)}: {slots} <im_patch> ids ({per_row} by row) but {num_features} image feature "
            "rows; each image must be expanded exactly once, by data/template.py"
        )
    order = is_patch.flatten().cumsum(0).reshape(input_ids.shape) - 1
    if index is not None:
        is_patch, order = is_patch[:, index], order[:, index]
    rows, positions = is_patch.nonzero(as_tuple=True)
    return rows, positions, order[rows, positions]


def put_features(
    embeddings: torch.Tensor, features: torch.Tensor, slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """``embeddings`` ``[s, b, h]`` with the rows of ``features`` ``[n, h]`` in their slots; differentiable in both."""
    rows, positions, order = slots
    return embeddings.index_put((positions, rows), features.index_select(0, order).to(embeddings.dtype))
