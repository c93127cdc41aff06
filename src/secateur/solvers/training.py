"""Training all linear maps of the blocks towards a reference's predictions: what a block's own error does not see.

The loss is the last one, KL(reference || model) of the next token. No weight of the model is touched: the training's
own, in float32 whatever the model's dtype, come out as edits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from secateur.engine.blocks import BlockInputs, activation_bytes, run_block
from secateur.engine.loss import KLDivergence, logit_bytes, loss_slopes
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError
from secateur.model.handle import Model
from secateur.model.modeling_secateur import row_dim
from secateur.run import Run
from secateur.surgery.edits import SetWeight

Weights = dict[int, dict[str, Tensor]]  # by block number and the weight's path in the block

STEP_TOKENS = 2048  # per optimizer step
KEEP_EVERY_S = 300.0  # what is trained, so that a kill costs no more than that; more where writing it takes long
KEEP_SHARE = 0.05  # of the time, at most, goes into writing it
SAVED_BYTES = 4 * 2**30  # of activations kept for the backward pass; beyond, each block's are computed again
_SAVED = 3  # times what a block holds while it runs: what its backward pass reads
_MASTER_BYTES = 16  # per trained weight: itself, its gradient and AdamW's two moments, in float32
_KEPT_BYTES = 12  # of these, without the gradient
_WARM_UP = 0.1  # of the steps
_BETAS = (0.9, 0.99)
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch calls AdamW's
_LARGEST_NORM = 1.0  # of the gradient
_CURVE = 20  # points of the noted loss


def check_training(passes: float, rate: float) -> None:
    """
    Raises:
        InvalidOptionError: a value out of its range.
    """
    if not (0 < passes < math.inf and 0 < rate < math.inf):
        raise InvalidOptionError(f"training takes passes and a rate above 0, not {passes} and {rate}")


def trained(
    model: Model, tokens: Tokens, run: Run, reference: Tensor, *, passes: float, rate: float
) -> Iterator[SetWeight]:
    """Train, as one journaled step named "training", and yield the weights. Interrupted, it goes on from the states
    that were kept last.

    AdamW without weight decay, the rate falling along a cosine, the windows in an order of the run's seed. A pass costs
    3 forwards of the blocks for every window, or 4 where activations are computed again, and 4 of the head.

    Args:
        reference: its hidden states after the last block, (samples, length, hidden), for the model's own final norm
            and head.
        passes: over all of these windows; rate: see `compensation.refine`.

    Raises:
        NumericalError: the loss is NaN or Inf.
    """
    course = _Course(model, tokens, run, passes, rate)
    result: dict[str, Any] = run.step("training", lambda: course.train(reference), scratch_bytes=course.held_bytes)
    run.note("KL while training", result["curve"])
    for key, weight in result["weights"].items():
        number, _, role = key.partition("/")
        yield SetWeight(int(number), role, weight)


class _Course:
    """One training, and what it takes."""

    def __init__(self, model: Model, tokens: Tokens, run: Run, passes: float, rate: float) -> None:
        self.model, self.tokens, self.run, self.rate = model, tokens, run, rate
        self.rows = min(tokens.samples, max(1, STEP_TOKENS // tokens.length))  # windows per step
        self.steps = max(1, round(passes * tokens.samples / self.rows))
        blocks, between = len(model.numbers), self.rows * tokens.length * model.hidden_size * model.dtype.itemsize
        saved = _SAVED * self.rows * activation_bytes(model, tokens.length)  # of one block
        self.recompute = saved * blocks > SAVED_BYTES
        self.parameters = sum(block.attention + block.mlp for block in model.layout().blocks.values())
        self.name = run.name_walk("training")
        self.held_bytes = (
            _MASTER_BYTES * self.parameters
            + (saved + between * blocks if self.recompute else saved * blocks)
            + 2 * logit_bytes(model, tokens.length)
        )

    def train(self, reference: Tensor) -> dict[str, Any]:
        """Trained `weights`, (out, in) in the model's dtype, by "block/role"; the `curve` of the loss."""
        weights, losses = self._masters(), [0.0]
        if self.run.rehearses:
            self.run.hold_on_disk(2 * _KEPT_BYTES * self.parameters)  # the new ones are there before the old ones go
            for _ in range(self.steps):
                self._count()
        else:
            losses = self._descend(weights, KLDivergence(reference))
        size = math.ceil(len(losses) / _CURVE)
        means = [sum(some) / len(some) for some in (losses[at : at + size] for at in range(0, len(losses), size))]
        return {
            "weights": {f"{number}/{role}": w for number in weights for role, w in self._by_role(number, weights)},
            "curve": [round(mean, 4) for mean in means],
        }

    def _masters(self) -> Weights:
        """Float32 copies of the weights that are trained."""
        masters: Weights = {}
        for number in self.model.numbers:
            with self.model.open(number) as block:
                masters[number] = {
                    f"{path}.weight": block.linear(path).weight.detach().to(torch.float32, copy=True).requires_grad_()
                    for path in block.roles.values()
                }
        return masters

    def _by_role(self, number: int, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        with self.model.open(number) as block:
            for role, path in block.roles.items():
                weight = weights[number][f"{path}.weight"].detach().to(self.model.dtype)
                yield role, weight.T if row_dim(block.linear(path)) else weight

    def _descend(self, weights: Weights, metric: KLDivergence) -> list[float]:
        """Train the weights in place; the loss of every step."""
        leaves = [weight for block in weights.values() for weight in block.values()]
        peaks = [self.rate * float(leaf.detach().square().mean().sqrt()) for leaf in leaves]
        groups = [{"params": [leaf], "lr": peak} for leaf, peak in zip(leaves, peaks, strict=True)]
        optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)
        warm = max(1, round(_WARM_UP * self.steps))
        inputs, losses = BlockInputs(self.model), self._taken_up(leaves, optimizer)
        kept, pause = time.monotonic(), KEEP_EVERY_S
        with self.run.progress("training", self.steps) as advance:
            advance(len(losses))
            for step, windows in list(enumerate(self._order()))[len(losses) :]:
                cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, self.steps - warm))
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * min((step + 1) / warm, cosine)
                loss, gradients = self._gradients(weights, leaves, windows, inputs, metric)
                if not math.isfinite(loss):
                    raise NumericalError(f"the loss of the training is NaN or Inf at step {step + 1}; try a lower rate")
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient
                torch.nn.utils.clip_grad_norm_(leaves, _LARGEST_NORM)
                optimizer.step()
                optimizer.zero_grad()
                del gradients  # or the next backward pass would hold them beside its own
                losses.append(loss)
                self._count()
                advance(1)
                if (began := time.monotonic()) - kept >= pause:
                    self._keep(leaves, optimizer, losses)
                    kept = time.monotonic()
                    pause = max(KEEP_EVERY_S, (kept - began) / KEEP_SHARE)
        return losses

    def _keep(self, leaves: list[Tensor], optimizer: torch.optim.AdamW, losses: list[float]) -> None:
        moments = [[optimizer.state[leaf][moment].cpu() for leaf in leaves] for moment in _MOMENTS]
        # From the CPU they come back to the CPU: a device would have to hold them twice.
        kept = {"losses": losses, "weights": [leaf.cpu() for leaf in leaves], "moments": moments}
        self.run.store.put_states(self.name, kept)

    def _taken_up(self, leaves: list[Tensor], optimizer: torch.optim.AdamW) -> list[float]:
        """The losses of the steps that an interrupted run took, whose weights and moments are put in place."""
        try:
            stored = self.run.store.get_states(self.name)
        except KeyError:
            return []
        losses: list[float] = stored["losses"]
        with torch.no_grad():
            for leaf, weight, *moments in zip(leaves, stored["weights"], *stored["moments"], strict=True):
                leaf.copy_(weight)
                own = {name: each.to(leaf.device, copy=True) for name, each in zip(_MOMENTS, moments, strict=True)}
                optimizer.state[leaf] = {"step": torch.tensor(float(len(losses))), **own}
        for _ in losses:
            self._count()
        return losses

    def _order(self) -> Iterator[Tensor]:
        """The windows of each step: every window once before any comes again, in an order of its own each time."""
        ahead = torch.empty(0, dtype=torch.long)
        for step in range(self.steps):
            if len(ahead) < self.rows:
                more = torch.randperm(self.tokens.samples, generator=self.run.rng("order", step))
                ahead = torch.cat([ahead, more])
            yield ahead[: self.rows]
            ahead = ahead[self.rows :]

    @torch.enable_grad()
    def _gradients(
        self, weights: Weights, leaves: list[Tensor], windows: Tensor, inputs: BlockInputs, metric: KLDivergence
    ) -> tuple[float, tuple[Tensor, ...]]:
        """The mean loss over the windows' counted predictions, and its gradients by the weights."""
        with self.model.open_ends():
            hidden = inputs.embed(self.tokens.ids[windows])
        for number in self.model.numbers:
            arguments = inputs.arguments(number, *hidden.shape[:2])
            if self.recompute:
                hidden = checkpoint(
                    self._through, number, weights[number], hidden, arguments,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                hidden = self._through(number, weights[number], hidden, arguments)
        # By the head at once, so that its logits need not wait for the backward pass.
        loss, slopes = loss_slopes(self.model, hidden.detach(), self.tokens, windows, metric)
        return loss, torch.autograd.grad(hidden, leaves, slopes)

    def _through(self, number: int, weights: dict[str, Tensor], hidden: Tensor, arguments: Any) -> Tensor:
        with self.model.open(number) as block:
            here = {path: weight.to(self.model.dtype) for path, weight in weights.items()}
            return run_block(
                lambda *args, **kwargs: functional_call(block.module, here, args, kwargs), hidden, arguments
            )

    def _count(self) -> None:
        """A step's work: a forward and a backward, which counts as two; the blocks again where their activations are
        recomputed; the head once for the reference."""
        meter, tokens = self.run.meter, self.rows * self.tokens.length
        meter.block_tokens += (3 + self.recompute) * tokens * len(self.model.numbers)
        meter.asked_tokens += (3 + self.recompute) * tokens * len(self.model.numbers)
        meter.head_tokens += 4 * tokens
