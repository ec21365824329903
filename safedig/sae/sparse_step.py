"""The steps that replace those of sae-lens' training classes: the same losses and gradients at a fraction of the cost.

On a CPU in float32 a step computes one dense product, the preactivations, and the rest at the codes that are not
zero. Whatever else is asked for (another device or type, autocast, hooks, normalisation at run time) is left to
sae-lens.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .firing import codes
from .memory import Memory
from .options import EncoderDtype
from .rough import rough_scores
from .selection import top_of_batch, top_of_rows
from .sparse_ops import Support, decoding, encoding, scored, squared_error

if TYPE_CHECKING:
    from sae_lens import TopKTrainingSAE
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
else:
    TopKTrainingSAE = object  # of the class that a step is put before

SPARE = 8  # one further candidate for so many winners (and no fewer than 4) is scored in float32 after low precision
AT_RUN_TIME = ("layer_norm", "constant_norm_rescale")  # normalisations that are not folded into the weights


class SparseStep(TopKTrainingSAE):
    """The step of TopK; to be put before one of sae-lens' classes."""

    encoder_dtype: EncoderDtype | None = None

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.W_enc.data = _by_feature(self.W_enc.data).t()  # so that a feature's gradient lies in one piece
        self.memory = Memory()

    def training_forward_pass(self, step_input: "TrainStepInput") -> "TrainStepOutput":
        if not self._can_be_sparse(step_input.sae_in):
            return super().training_forward_pass(step_input)
        from sae_lens.saes.sae import TrainStepOutput

        a = step_input.sae_in
        x = a - self.b_dec.detach() if self.cfg.apply_b_dec_to_input else a
        with torch.no_grad():
            length = self.get_W_dec_norm() if self.cfg.rescale_acts_by_decoder_norm else torch.ones_like(self.b_enc)
            scores, support, known = self._winners(x, length)
        b_in = self.b_dec if self.cfg.apply_b_dec_to_input else torch.zeros_like(self.b_dec)
        values = encoding(known, x, self.W_enc, self.b_enc, b_in, support, self.memory).relu()
        *inner, out = self._reconstructions(values, support)
        losses = {"mse_loss": squared_error(out, a, self.memory)}
        losses |= self.calculate_aux_loss(step_input, feature_acts=values, hidden_pre=scores, sae_out=out)
        losses |= {f"inner_mse_loss_{width}": squared_error(part, a) for width, part in inner}
        acts = values.detach() * length[support.columns]
        return TrainStepOutput(
            sae_in=a,
            sae_out=out,
            feature_acts=codes(acts, support),
            hidden_pre=scores,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            metrics=self._noted(acts),
        )

    def _can_be_sparse(self, a: Tensor) -> bool:
        return (
            a.ndim == 2
            and {a.device.type, self.W_dec.device.type} == {"cpu"}
            and {a.dtype, self.W_dec.dtype, self.W_enc.dtype} == {torch.float32}
            and not a.requires_grad
            and not torch.is_autocast_enabled("cpu")
            and not self.cfg.use_sparse_activations
            and not getattr(self.cfg, "use_matryoshka_aux_loss", False)
            and self.cfg.normalize_activations not in AT_RUN_TIME
            and not any(part._forward_hooks or part._backward_hooks for part in self.modules() if part is not self)
        )

    def _winners(
        self, x: Float[Tensor, "batch d_in"], length: Float[Tensor, " d_sae"]
    ) -> tuple[Tensor, Support, Float[Tensor, " entries"]]:
        """What codes competed with (preactivation times decoder length), those that are active, and their
        preactivations; the scores lie in memory that the next step writes over."""
        weight = _by_feature(self.W_enc.detach())
        if self.encoder_dtype is None:
            scores = self.memory.kept("scores", (len(x), self.cfg.d_sae), torch.float32)
            torch.addmm(self.b_enc, x, weight.t(), out=scores).mul_(length)
            support = self._best(scores, self.cfg.k)
            return scores, support, scores.flatten().index_select(0, support.places) / length[support.columns]
        scores = rough_scores(x, weight, self.b_enc, length, self.encoder_dtype, self.memory)
        support = self._best(scores, self.cfg.k + max(4, self.cfg.k / SPARE))
        known = scored(x, weight, support) + self.b_enc[support.columns]
        kept = self._best_of(known * length[support.columns], len(x))
        winners = Support(support.rows[kept], support.columns[kept], support.batch, support.d_sae)
        return scores.view(torch.bfloat16), winners, known[kept]

    def _best(self, scores: Tensor, k: float) -> Support:
        return Support.of_rows(top_of_rows(scores, min(int(k), self.cfg.d_sae)), self.cfg.d_sae)

    def _best_of(self, candidates: Float[Tensor, " entries"], batch: int) -> Tensor:
        """Which of the candidates win, in order of their rows."""
        by_row = candidates.view(batch, -1)
        best = by_row.topk(int(self.cfg.k), sorted=False).indices
        return (best + by_row.shape[1] * torch.arange(batch)[:, None]).flatten()

    def _reconstructions(self, values: Tensor, support: Support) -> list[Any]:
        """Those of inner levels with their widths, and last the whole."""
        return [decoding(values, self.W_dec, support, self.memory).add_(self.b_dec)]

    def _noted(self, acts: Tensor) -> dict[str, Any]:
        return {}

    def calculate_topk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Bool[Tensor, " d_sae"] | None
    ) -> Tensor:
        """sae-lens' loss, its products restricted to the dead features."""
        if hidden_pre.requires_grad or dead_neuron_mask is None:
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        dead = dead_neuron_mask.nonzero().flatten()
        if len(dead) == 0:
            return sae_out.new_tensor(0.0)
        most = self.cfg.d_in // 2  # of them active in a row
        W_enc, W_dec = self.W_enc.t().index_select(0, dead), self.W_dec.index_select(0, dead)
        bias = self.b_enc[dead]
        if self.cfg.apply_b_dec_to_input:
            bias = bias - W_enc @ self.b_dec
        pre = torch.addmm(bias, sae_in, W_enc.t())
        if len(dead) > most:
            length = W_dec.norm(dim=1) if self.cfg.rescale_acts_by_decoder_norm else 1
            best = (pre * length).detach().topk(most, sorted=False).indices
            pre = torch.where(torch.zeros_like(pre, dtype=torch.bool).scatter_(1, best, True), pre, 0)
        missing = (pre @ W_dec - (sae_in - sae_out).detach()).square().sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(dead) / most, 1.0) * missing

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()


class SparseBatchStep(SparseStep):
    """The step of BatchTopK: k active codes on average, and a threshold that follows the least of them."""

    def _best(self, scores: Tensor, k: float) -> Support:
        n = min(int(k * len(scores)), scores.numel())
        return Support.of_batch(top_of_batch(scores, n), *scores.shape)

    def _best_of(self, candidates: Float[Tensor, " entries"], batch: int) -> Tensor:
        return candidates.topk(int(self.cfg.k * batch), sorted=False).indices.sort().values

    def _noted(self, acts: Tensor) -> dict[str, Any]:
        self.update_topk_threshold(acts)  # pyright: ignore
        return {"topk_threshold": self.topk_threshold}


class SparseMatryoshkaStep(SparseBatchStep):
    """The step of Matryoshka BatchTopK: one decode serves the reconstructions of all widths."""

    def _reconstructions(self, values: Tensor, support: Support) -> list[Any]:
        widths: list[int] = self.cfg.matryoshka_widths  # pyright: ignore
        level = torch.bucketize(support.columns, torch.tensor(widths), right=True)
        bags, order = (level * support.batch + support.rows).sort(stable=True)
        levels = Support(bags, support.columns[order], len(widths) * support.batch, support.d_sae)
        added = decoding(values[order], self.W_dec, levels, self.memory)
        outs = added.view(len(widths), support.batch, -1).cumsum(0) + self.b_dec
        return [*zip(widths[:-1], outs[:-1], strict=True), outs[-1]]


def _by_feature(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_sae d_in"]:
    return W_enc.t().contiguous()
