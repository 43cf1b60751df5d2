"""What calibration measures about the inputs of a linear layer.

Shapes: T = tokens, N = tokens of a sample, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.calibration.gram import Workspace, add_gram, bfloat16_factors, mirror
from compresskit.errors import Fault, StatisticError

# What a method may name in its ``needs``, and the field of LayerStats that holds it.
STATISTICS: Mapping[str, str] = {
    "input_mean": "input_mean_I",
    "input_sq_mean": "input_sq_mean_I",
    "input_abs_mean": "input_abs_mean_I",
    "input_abs_max": "input_abs_max_I",
    "input_gram": "input_gram_II",
}
SAMPLE = 1024
"""Inputs that are kept as they are: so many tokens at most."""
ROWS = 1024
"""Rows of a weight that are made float32 at a time."""


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Statistics of one layer's inputs over all calibration tokens; padding does not count.

    Each is None unless a method asked for it, and float32.

    Attributes:
        num_tokens: tokens seen; 0 means the layer never ran.
        input_sq_mean_I: mean of x_j**2, (I,), in squared activation units.
        input_mean_I: mean of x_j, (I,), in activation units.
        input_variance_I: variance of x_j, (I,), in squared activation units: there if both means above are,
            whose difference in float32 would lose that of inputs which hardly vary.
        input_abs_mean_I: mean of ``|x_j|``, (I,), in activation units.
        input_abs_max_I: maximum of ``|x_j|``, (I,), in activation units.
        input_gram_II: mean of x_i x_j, (I, I), in squared activation units.
        sample_NI: inputs themselves, (N, I), in the dtype computed in: all of them if they are no more than
            :data:`SAMPLE`, else so many drawn evenly, or None beside a Gram matrix, which tells of all.
        layer: its name, for errors.
        shared: what a method made of the inputs alone and wants to find again: layers that are fed the very
            same inputs have the same mapping, which begins empty.
    """

    num_tokens: int
    input_sq_mean_I: Tensor | None = None
    input_mean_I: Tensor | None = None
    input_variance_I: Tensor | None = None
    input_abs_mean_I: Tensor | None = None
    input_abs_max_I: Tensor | None = None
    input_gram_II: Tensor | None = None
    sample_NI: Tensor | None = None
    layer: str = ""
    shared: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def divided_by(self, scale_I: Tensor) -> LayerStats:
        """The statistics of the same inputs, each divided by its entry of ``scale_I`` (I,), all positive."""
        scale = scale_I.float()
        fields = {}
        for need, name in STATISTICS.items():
            value = getattr(self, name)
            if need == "input_gram" and value is not None:
                value = (value / scale).div_(scale[:, None])
            elif value is not None:
                value = value / (scale.square() if need == "input_sq_mean" else scale)
            fields[name] = value
        if self.input_variance_I is not None:
            fields["input_variance_I"] = self.input_variance_I / scale.square()
        sample = None if self.sample_NI is None else (self.sample_NI / scale).to(self.sample_NI.dtype)
        return replace(self, sample_NI=sample, shared={}, **fields)

    def relative_error(self, former_OI: Tensor, new_OI: Tensor) -> float | None:
        """How far the layer's output moves on the inputs that these statistics are of, its bias left out.

        Args:
            former_OI: the weight (O, I) before.
            new_OI: and after.

        Returns:
            Squared norm of the change over that of the former output: over all inputs where they are no more
            than :data:`SAMPLE` or their Gram matrix is at hand, else over the sample. None where there were
            none, or the former output was zero.
        """
        change = former = 0.0
        # Rounding the factors of bfloat16 models moves sums over so many products by a millionth or so.
        with bfloat16_factors(former_OI.dtype == torch.bfloat16):
            for start in range(0, len(former_OI), ROWS):
                old_OI = former_OI[start : start + ROWS].float()
                change += self._energy(new_OI[start : start + ROWS].float() - old_OI)
                former += self._energy(old_OI)
        return max(change, 0.0) / former if former > 0 else None

    def _energy(self, weight_OI: Tensor) -> float:
        """Squared norm of what ``weight_OI`` makes of the inputs, up to a factor that is theirs alone."""
        if self.sample_NI is not None:
            wide = self.sample_NI.dtype if self.sample_NI.dtype == torch.bfloat16 else torch.float32
            output_NO = nn.functional.linear(self.sample_NI.to(wide), weight_OI.to(wide))
            return float(output_NO.float().square().sum(dtype=torch.float64))
        if self.input_gram_II is None:
            return 0.0
        total = 0.0
        for start in range(0, weight_OI.shape[1], ROWS):  # the matrix is symmetric: half of it will do
            stop = start + ROWS
            part_OI = weight_OI[:, start:stop] @ self.input_gram_II[start:stop, :stop]
            part_OI *= weight_OI[:, :stop]
            total += float(2 * part_OI[:, :start].sum(dtype=torch.float64))
            total += float(part_OI[:, start:].sum(dtype=torch.float64))
        return total

    def require_input_sq_mean(self, in_features: int) -> Tensor:
        """Return ``input_sq_mean_I`` or raise StatisticError saying why it is unusable."""
        return self.require("input_sq_mean", in_features)

    def require(self, need: str, in_features: int) -> Tensor:
        """The statistic called ``need``, checked.

        Args:
            need: a name of :data:`STATISTICS`.
            in_features: I of the layer.

        Returns:
            float32, (I,), or (I, I) for ``input_gram``.

        Raises:
            StatisticError: it was not collected, the layer saw no tokens, or it is misshapen or not finite.
        """
        value: Tensor | None = getattr(self, STATISTICS[need])
        where = f"{self.layer or 'layer'}: {need}"
        if value is None or self.num_tokens == 0:
            got = "no calibration tokens" if self.num_tokens == 0 else "a statistic that was not collected"
            cure = "Give more calibration samples, or add the layer to ignore."
            raise StatisticError(Fault(where, "statistics of the layer's inputs", got, cure))
        shape = (in_features, in_features) if need == "input_gram" else (in_features,)
        if value.shape != shape:
            cure = "Collect it for this layer."
            raise StatisticError(Fault(where, f"shape {shape}", f"{tuple(value.shape)}", cure))
        if not torch.isfinite(value).all():
            cure = "Calibrate in bfloat16 or float32 instead of float16, or look for faults in the model."
            raise StatisticError(Fault(where, "finite values", "inf or nan", cure))
        return value


class Accumulator:
    """Sums up one layer's inputs batch by batch; the vectors in float64, the Gram matrix in float32.

    Args:
        needs: names of :data:`STATISTICS`.
        in_features: I.
        device: where to keep the sums.
        workspace: shared with others; None makes one.

    Raises:
        KeyError: a name in ``needs`` is no statistic; the fault of a method, not of a user.
    """

    def __init__(
        self,
        needs: frozenset[str],
        in_features: int,
        device: torch.device,
        *,
        workspace: Workspace | None = None,
    ) -> None:
        if unknown := needs - STATISTICS.keys():
            raise KeyError(f"no such statistics: {sorted(unknown)}; known are {sorted(STATISTICS)}")
        self.num_tokens = 0
        self._vectors = {
            need: torch.zeros(in_features, dtype=torch.float64, device=device)
            for need in sorted(needs - {"input_gram"})
        }
        # The variance wants sums that are not rounded.
        self._exact = {"input_mean", "input_sq_mean"} <= needs
        self._gram_II: Tensor | None = None
        if "input_gram" in needs:
            self._gram_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._workspace = workspace or Workspace()
        # Inputs not yet in the Gram matrix, few of which are no work for a product; else the sample.
        self._kept: list[Tensor] = []
        self._keys_N = torch.zeros(0)
        self._chance = torch.Generator().manual_seed(0)

    def add(self, input_TI: Tensor) -> None:
        """Count the rows of ``input_TI`` (T, I), of any float dtype, as tokens."""
        input_TI = input_TI.detach()
        self.num_tokens += len(input_TI)
        if not len(input_TI):
            return
        if self._vectors:
            self._add_vectors(input_TI)
        if self._gram_II is None:
            self._draw(input_TI)
        elif len(input_TI) >= SAMPLE and self.num_tokens > SAMPLE:
            self._add_kept()
            self._add_gram(input_TI)
        else:
            self._kept.append(input_TI.clone())
            if sum(map(len, self._kept)) > SAMPLE:
                self._add_kept()

    def finish(self, layer: str = "") -> LayerStats:
        """The statistics of the layer called ``layer``; call once, the sums are used up."""
        tokens = max(self.num_tokens, 1)
        for need, sums in self._vectors.items():
            if need != "input_abs_max":
                sums /= tokens
        fields: Any = {STATISTICS[need]: sums.float() for need, sums in self._vectors.items()}
        if self._exact:
            square_I, mean_I = self._vectors["input_sq_mean"], self._vectors["input_mean"]
            fields["input_variance_I"] = (square_I - mean_I.square()).clamp_(min=0).float()
        kept_NI = torch.cat(self._kept) if self._kept else None
        if self._gram_II is not None:
            self._add_kept()
            kept_NI = kept_NI if self.num_tokens <= SAMPLE else None
            mirror(self._gram_II)
            fields["input_gram_II"] = self._gram_II.div_(tokens)
        return LayerStats(num_tokens=self.num_tokens, sample_NI=kept_NI, layer=layer, **fields)

    def _add_kept(self) -> None:
        if self._kept:
            self._add_gram(torch.cat(self._kept))
            self._kept.clear()

    def _add_gram(self, input_TI: Tensor) -> None:
        assert self._gram_II is not None
        add_gram(self._gram_II, input_TI, self._workspace)

    def _add_vectors(self, input_TI: Tensor) -> None:
        """Float32 adds up so few tokens well; what it would lose are single ones beside all the others."""
        for part_TI in torch.split(input_TI, SAMPLE):
            x_TI = self._workspace.widened(part_TI)
            for need, sums in self._vectors.items():
                if need == "input_mean":
                    sums += x_TI.sum(0, dtype=torch.float64) if self._exact else x_TI.sum(0)
                elif need == "input_sq_mean":  # the last by name: the others have seen x
                    sums += (x_TI.double() if self._exact else x_TI).square_().sum(0)
                elif need == "input_abs_mean":
                    sums += x_TI.abs().sum(0)
                elif need == "input_abs_max":
                    torch.maximum(sums, x_TI.abs().amax(0).double(), out=sums)

    def _draw(self, input_TI: Tensor) -> None:
        """Keep the inputs with the least of random keys: each is as likely to stay as any other."""
        keys_T = torch.rand(len(input_TI), generator=self._chance)
        room = SAMPLE - len(self._keys_N)
        if room:
            self._kept.append(input_TI[:room].clone())
            self._keys_N = torch.cat([self._keys_N, keys_T[:room]])
            if len(self._keys_N) == SAMPLE:
                self._kept = [torch.cat(self._kept)]
        if len(input_TI) <= room:
            return
        # The new ones that are among the least take the places of those that no longer are.
        both = torch.cat([self._keys_N, keys_T[room:]])
        stays = torch.zeros(len(both), dtype=torch.bool)
        stays[both.topk(SAMPLE, largest=False).indices] = True
        places, new = (~stays[:SAMPLE]).nonzero().flatten(), stays[SAMPLE:].nonzero().flatten()
        self._keys_N[places] = keys_T[room:][new]
        device = input_TI.device
        self._kept[0][places.to(device)] = input_TI[room:][new.to(device)]
