"""What a document costs beside its share of the linear work: the part that differs between packed rows.

Every packed row has the same number of tokens, so its products of tokens with weights cost the same. Rows
differ in the views that the tower encodes and in the squares of their documents' lengths (causal attention
inside each document). Balancing that difference balances the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.plan.cost import sample_flops, tower_and_decoder, train_flops
from megatron_vl.plan.vision_share import CROP, GLOBAL


@dataclass(frozen=True)
class WorkRates:
    """Training FLOPs, whole numbers, so that sums are exact in any order and on any machine.

    per_global, per_crop: one view, tower and projector. per_token: linear work of the decoder and the head.
    per_token_squared: causal attention of a document, times the square of its length. Recomputation is not
    counted: how a run saves memory must not change the order of its data.
    """

    per_global: int
    per_crop: int
    per_token: int
    per_token_squared: int

    @classmethod
    def of(cls, model: ModelConfig) -> WorkRates:
        """The rates of a model, from `plan.cost` (frozen parts cost what they cost there)."""
        views = [
            int(tower_and_decoder(train_flops(model, sample_flops(model, [kind], [])))[0])
            for kind in (GLOBAL, CROP)
        ]
        one_token = train_flops(model, sample_flops(model, [], [1]))
        attention = int(one_token["decoder_attention"])
        linear = int(sum(one_token.values())) - attention
        return cls(views[0], views[1], linear, attention)

    def vision(self, num_globals: int, num_crops: int) -> int:
        """Tower FLOPs of so many views."""
        return num_globals * self.per_global + num_crops * self.per_crop

    def document(self, tokens: int, num_globals: int, num_crops: int) -> int:
        """What a document adds to the row that it goes to: its views and its attention."""
        return self.vision(num_globals, num_crops) + tokens * tokens * self.per_token_squared
