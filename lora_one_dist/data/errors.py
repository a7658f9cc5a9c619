"""What is wrong with data, and where."""

from __future__ import annotations


class DataError(ValueError):
    """Bad data: where (file and line, or row) and value, rule, remedy."""


class RowError(DataError):
    """A row that does not fit, by its number: whoever knows where the rows come from names the place."""

    def __init__(self, row: int, problem: str):
        super().__init__(f"row {row} (the first is 0): {problem}")
        self.row, self.problem = row, problem

    def __reduce__(self) -> tuple[type[RowError], tuple[int, str]]:
        return RowError, (self.row, self.problem)
