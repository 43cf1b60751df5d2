"""Local steps: ranks train alone, without a word to each other, and exchange weights every so often.

Gradients are not summed over ranks: DDP wraps the model and lies in ``no_sync``, from the first step or, in
post-local SGD (Lin et al., 2018, arXiv 1808.07217), after some. A step's loss is per supervised token of this
rank; what is logged is per supervised token of all ranks, told once for all steps since the last exchange, so
that a slow rank holds up nobody in between.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import IntervalStrategy

from compresskit.errors import Fault, PlanError
from compresskit.training.driver.exchange import DiLoCo, Exchange, LocalSGD
from compresskit.training.driver.own_state import OwnState
from compresskit.training.engine import running_engine
from compresskit.training.finite import bad_gradient, culprit, not_finite
from compresskit.training.objective import LOSS
from compresskit.training.order import supervised
from compresskit.training.trainer import StageTrainer, summed

NORM, TOKENS, DONE = "norm", "tokens", "exchanges done"


class LocalTrainer(OwnState):
    """The trainer of ``synchronise: local_sgd`` and ``diloco``; takes what StageTrainer takes.

    Raises:
        PlanError: zeros are moved while it trains, or it learns from the model's own text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("zeroing", "on_policy"):
            if kwargs.get(name) is not None:
                cure = "Use synchronise every_step."
                raise PlanError(Fault("synchronise", f"every_step beside {name}", "steps of each rank", cure))
        super().__init__(*args, **kwargs)
        self.args.logging_strategy = IntervalStrategy.NO  # which would ask all ranks after each step
        self._sums_of_step: dict[str, float | Tensor] = {}
        self._steps_untold: list[dict[str, float]] = []
        self._rates: list[float] = []
        self._parted = False

    @cached_property
    def _exchange(self) -> Exchange:
        """Made when ranks have the same weights: DDP has sent them those of the first."""
        fields, weights = self._setting.fields, list(self._trained().values())
        if fields.synchronise == "local_sgd":
            return LocalSGD(weights, every=fields.synchronise_every)
        return DiLoCo(
            weights,
            every=fields.synchronise_every,
            delay=fields.synchronise_delay,
            learning_rate=fields.outer_learning_rate,
            momentum=fields.outer_momentum,
        )

    @property
    def engine(self) -> str:
        """See :attr:`StageTrainer.engine`; with what was exchanged in fact."""
        ran = running_engine(self.model_wrapped, cast(nn.Module, self.model))
        return f"{ran}, {self._exchange.words}" if self._exchange.done else ran

    def when_prepared(self) -> None:
        """Also note the weights that ranks begin with."""
        assert self._exchange is not None
        super().when_prepared()

    def when_stepping(self) -> None:
        """Part the ranks, once the steps are over that they take together."""
        if not self._parted and self.state.global_step >= self._setting.fields.synchronise_from:
            self.resources.enter_context(cast(DistributedDataParallel, self.model_wrapped).no_sync())
            self._parted = True
        super().when_stepping()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Supervised tokens of one optimiser step of this rank."""
        return torch.tensor(sum(map(supervised, batch_samples)), device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the mean over the supervised tokens of this rank's step.

        Raises:
            NumericError: the loss is not finite here; the launch ends the other ranks.
        """
        sums = self._sums(model, inputs)
        if not sums[LOSS].isfinite():
            layer = culprit(self.accelerator.unwrap_model(model), model, self._fed(inputs))
            raise not_finite("loss", self.state.global_step + 1, layer)
        for part, value in sums.items():
            self._sums_of_step[part] = self._sums_of_step.get(part, 0.0) + value.detach().double()
        here = supervised(inputs)
        self._sums_of_step[TOKENS] = self._sums_of_step.get(TOKENS, 0.0) + here
        loss = sums[LOSS] / max(int(num_items_in_batch or here), 1)
        return (loss, sums) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip by the norm of this rank's gradient, which has to be finite."""
        norm = super(StageTrainer, self)._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self._sums_of_step[NORM] = float(norm)
        self._rates.append(float(self._get_learning_rate()))  # type: ignore[no-untyped-call]
        if not torch.isfinite(torch.as_tensor(float(norm))):
            layer = bad_gradient(cast(nn.Module, self.model).named_parameters())
            raise not_finite("gradient", self.state.global_step + 1, layer)
        return norm

    def when_stepped(self) -> None:
        """Exchange weights where it is time, and tell of the steps since; before the first step nothing."""
        step, steps = self.state.global_step, self.state.max_steps
        if not step:
            return
        self._steps_untold.append({name: float(value) for name, value in self._sums_of_step.items()})
        self._sums_of_step.clear()
        before = self._exchange.done
        self._exchange.stepped(step, last=step == steps)
        if self._exchange.done > before:
            self._tell()

    def _tell(self) -> None:
        """Log all steps that are not yet, over all ranks; every rank calls it."""
        if not self._steps_untold:
            return
        names = sorted(self._steps_untold[0])
        table = torch.tensor(
            [[row[name] for name in names] for row in self._steps_untold],
            dtype=torch.float64,
            device=self.args.device,
        )
        first = self.state.global_step - len(self._steps_untold) + 1
        rows = [dict(zip(names, row, strict=True)) for row in summed(table).tolist()]
        rates, self._rates = self._rates, []
        self._steps_untold = []
        if self._watch is None:
            return
        for step, (row, rate) in enumerate(zip(rows, rates, strict=True), first):
            tokens, norm = max(row.pop(TOKENS), 1.0), row.pop(NORM) / self.args.world_size
            loss = row.pop(LOSS) / tokens
            parts = {name: total / tokens for name, total in row.items()}
            self._watch.step(step, loss, rate, norm, False, parts)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """See :meth:`StageTrainer.evaluate`: of the weights that all ranks agree on."""
        self._tell()
        with self._exchange.agreed():
            return super().evaluate()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._tell()
        super()._save_checkpoint(model, trial)

    def more_state(self) -> dict[str, Any]:
        """The exchange's, and how many there were."""
        return {**self._exchange.state(), DONE: self._exchange.done}

    def load_more(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`more_state`; older checkpoints do not tell how many there were."""
        self._exchange.load(state)
        self._exchange.done = state.get(DONE, 0)
