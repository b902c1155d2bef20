"""Arrays whose axes have names, and whose positions have the tokens that stand there."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.extras import extra_module


@dataclasses.dataclass(frozen=True, repr=False)
class LabelledArray:
    """Values on the host with named axes; NumPy functions take it as it is.

    Attributes:
        name: of the point that it was captured at.
        array: the values; behind the end of a row NaN, or -1 where they are integers.
        axes: name of each dimension.
        labels: axis -> a label for each of its entries, where there are better ones than numbers.
    """

    name: str
    array: np.ndarray
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.array.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values."""
        return np.array(self.array, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        """Entries of the first axis."""
        return len(self.array)

    def sel(self, **places: int | slice) -> "LabelledArray":
        """A part of it: axis=number drops the axis, axis=slice keeps a part of it.

        Raises:
            InputError: an axis that there is not, or a place outside of it.
        """
        index: list[Any] = [slice(None)] * self.array.ndim
        for axis, place in places.items():
            if axis not in self.axes:
                raise InputError(f"{self.name} has no axis {axis!r}; expected one of {', '.join(self.axes)}.")
            dimension = self.axes.index(axis)
            size = self.array.shape[dimension]
            if not isinstance(place, slice) and not -size <= place < size:
                raise InputError(f"{axis} is {place}, and {self.name} has {size} of them.")
            index[dimension] = place
        kept = [axis for axis, at in zip(self.axes, index, strict=True) if isinstance(at, slice)]
        labels = {
            axis: list(self.labels[axis])[index[self.axes.index(axis)]]
            for axis in kept
            if axis in self.labels
        }
        return LabelledArray(self.name, self.array[tuple(index)], tuple(kept), labels)

    def coordinates(self, axis: str) -> list[Any]:
        """What each entry of an axis is called."""
        size = self.array.shape[self.axes.index(axis)]
        return list(self.labels.get(axis, range(size)))

    def to_pandas(self) -> Any:
        """A Series of one axis, a DataFrame of two (rows, columns), or one row a value of more.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        pandas = extra_module("pandas", "notebooks")
        coordinates = [self.coordinates(axis) for axis in self.axes]
        if self.array.ndim == 1:
            return pandas.Series(self.array, pandas.Index(coordinates[0], name=self.axes[0]), name=self.name)
        if self.array.ndim == 2:
            rows, columns = (
                pandas.Index(c, name=axis) for c, axis in zip(coordinates, self.axes, strict=True)
            )
            return pandas.DataFrame(self.array, rows, columns)
        index = pandas.MultiIndex.from_product(coordinates, names=self.axes)
        return pandas.DataFrame({self.name: self.array.reshape(-1)}, index).reset_index()

    def to_xarray(self) -> Any:
        """A DataArray with the same axes and labels.

        Raises:
            MissingExtraError: xarray is not installed.
        """
        coordinates = {axis: list(labels) for axis, labels in self.labels.items()}
        return extra_module("xarray", "notebooks").DataArray(
            self.array, dims=self.axes, coords=coordinates, name=self.name
        )

    def __repr__(self) -> str:
        return f"{self._summary()}\n{np.array2string(self.array, precision=3, threshold=60, edgeitems=2)}"

    def _repr_html_(self) -> str:
        table = np.array2string(self.array, precision=3, threshold=60, edgeitems=2)
        return f"<b>{html.escape(self._summary())}</b><pre>{html.escape(table)}</pre>"

    def _summary(self) -> str:
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.array.shape, strict=True))
        return f"{self.name} ({sizes}) {self.array.dtype}"


@dataclasses.dataclass(frozen=True)
class RouterCapture:
    """What a router chose.

    Attributes:
        ids: chosen experts, (batch, position, slot), -1 behind a row's end.
        weights: their weights.
    """

    ids: LabelledArray
    weights: LabelledArray

    def counts(self, experts: int) -> np.ndarray:
        """How many tokens chose each expert, [experts]."""
        chosen = self.ids.array
        return np.bincount(chosen[chosen >= 0], minlength=experts)
