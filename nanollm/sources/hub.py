"""How is a dataset of the Hugging Face hub read without downloading it first?

Through the `datasets` library in streaming mode: rows arrive one by one and nothing is kept. The name may also be a
local folder of Parquet files, which the same library reads in the same way.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from nanollm.sources.files import BadRecord, OnBad, Row, need, problem


def stream_rows(
    name: str,
    split: str,
    columns: Sequence[str],
    on_bad: OnBad,
    config_name: str | None = None,
) -> Iterator[Row]:
    """The values of the columns for each row where all of them are text; the other rows go to `on_bad`, by number."""
    rows = iter(_open(name, split, config_name))
    for number in count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # whatever the network or a broken file raises
            raise OSError(f"{name} ({split}) broke off at row {number}: {_line(error)}; try again later") from error
        if absent := [column for column in columns if column not in row]:
            there = ", ".join(row)
            raise ValueError(f"{name} has no column {' or '.join(absent)}, only {there}; choose with --text_column")
        values = tuple(row[column] for column in columns)
        if reason := problem(values, columns):
            on_bad(BadRecord(f"{name}:{split}", number, reason))
        else:
            yield values


def _open(name: str, split: str, config_name: str | None) -> Any:
    datasets = need("datasets", f"to read {name} from the hub")
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=True)
    except Exception as error:  # no such name, no network, no access, an old script, ...
        raise ValueError(
            f"cannot open the dataset {name} ({split}): {_line(error)}; check the name, the split and the network, "
            f"or give files instead"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
