"""Packing and truncation of a data set, against TRL, on one core:

    python -m benchmarks.packing

needs TRL (pip install -e '.[parity]'). Both sides get the same documents, 16 to 1,024 tokens long, already tokenized:
ours as flat arrays, theirs as the Arrow data set that SFTTrainer makes. They take turns in one process; medians of the
rounds, caches off.

    packing     rows of at most 1,024 tokens: minitrl's order of documents and where rows begin, against
                trl.pack_dataset(strategy="bfd"), in batches of 1,000 documents (its default) and all in one batch (its
                fullest rows); the faster of the two counts
    truncation  to 512 tokens: Documents.truncated, which also leaves out what then has nothing to learn, against the map
                over rows in SFTTrainer._prepare_dataset (its filter for the same is timed, and does not count)
    million     minitrl alone on 1,000,000 documents, beside one sort of their lengths; memory is what the process has
                held at most, before and after

Writes benchmarks/results/packing.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from pathlib import Path

import numpy as np

from minitrl import packing
from minitrl.data import Documents

RESULTS = Path(__file__).parent / "results" / "packing.json"
CAPACITY, SHORT = 1024, 512


def documents(count: int) -> Documents:
    """Random documents, the second half of each learnt."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(16, CAPACITY + 1, count)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = generator.integers(0, 49152, ends[-1], dtype=np.int32)
    trained = (np.arange(ends[-1]) >= np.repeat(starts + lengths // 2, lengths)).astype(np.uint8)
    return Documents(tokens, trained, starts, ends, starts + lengths // 2, "")


def arrow(ours: Documents):
    """The same as SFTTrainer has them."""
    import datasets
    import pyarrow

    offsets = np.append(ours.starts, ours.ends[-1]).astype(np.int32)
    labels = np.where(ours.trained, ours.tokens, -100).astype(np.int64)
    columns = {"input_ids": ours.tokens, "labels": labels}
    arrays = {name: pyarrow.ListArray.from_arrays(offsets, pyarrow.array(flat)) for name, flat in columns.items()}
    return datasets.Dataset(pyarrow.table(arrays))


def pack(ours: Documents) -> int:
    """How many rows there are, once it is known what stands in them."""
    members, starts = packing.rows_of(*packing.pack_lengths(ours.lengths, CAPACITY))
    assert len(members) == len(ours)
    return len(starts) - 1


def their_pack(theirs, batch_size: int) -> int:
    import trl

    return len(trl.pack_dataset(theirs, CAPACITY, "bfd", {"batch_size": batch_size}))


def occupancy(ours: Documents, rows: int) -> float:
    """The share of the rows' capacity that holds tokens."""
    return float(ours.lengths.sum() / CAPACITY / rows)


def truncate(example, sl):  # as SFTTrainer._prepare_dataset has it
    return {"input_ids": example["input_ids"][sl], "labels": example["labels"][sl]}


def timed(function, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def against_trl(count: int, rounds: int) -> list[dict]:
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    ours = documents(count)
    theirs = arrow(ours)
    sides = {
        "packing": {
            "ours": lambda: pack(ours),
            "theirs, batches of 1,000": lambda: their_pack(theirs, 1000),
            "theirs, one batch": lambda: their_pack(theirs, count),
        },
        "truncation": {
            "ours": lambda: len(ours.truncated(SHORT)),
            "theirs": lambda: theirs.map(truncate, fn_kwargs={"sl": slice(None, SHORT)}),
        },
    }
    rows = []
    for section, functions in sides.items():
        seconds, results = {side: [] for side in functions}, {}
        for _ in range(rounds):
            for side, function in functions.items():
                spent, results[side] = timed(function)
                seconds[side].append(spent)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        ratio = min(value for side, value in medians.items() if side != "ours") / medians["ours"]
        row = {"section": section, "documents": count, "medians": medians, "seconds": seconds, "times_as_fast": ratio}
        if section == "packing":
            row["occupancy"] = {side: occupancy(ours, rows) for side, rows in results.items()}
        else:
            cut = results["theirs"]
            has_labels = lambda example: any(label != -100 for label in example["labels"])  # noqa: E731
            row["their_filter_seconds"], kept = timed(cut.filter, has_labels)
            assert len(kept) == results["ours"]
        rows.append(row)
    return rows


def million(count: int = 1_000_000, rounds: int = 5) -> dict:
    lengths = np.random.default_rng(0).integers(16, CAPACITY + 1, count)
    ends = np.cumsum(lengths)
    flat = np.empty(0, np.int32), np.empty(0, np.uint8)
    ours = Documents(*flat, ends - lengths, ends, ends - lengths // 2, "")
    before = peak()
    seconds = {name: [] for name in ("sort", "packing", "truncation")}
    for _ in range(rounds):
        seconds["sort"].append(timed(np.sort, lengths)[0])
        seconds["packing"].append(timed(pack, ours)[0])
        seconds["truncation"].append(timed(ours.truncated, SHORT)[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"section": "million", "documents": count, "medians": medians, "seconds": seconds,
            "occupancy": occupancy(ours, pack(ours)), "memory_mib": {"before": before, "after": peak()}}  # fmt: skip


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = [million()]  # first: its memory is then its own
    print({key: value for key, value in rows[0].items() if key != "seconds"}, flush=True)
    rows += against_trl(options.documents, options.rounds)
    for row in rows[1:]:
        print({key: value for key, value in row.items() if key != "seconds"}, flush=True)
    import datasets
    import trl

    versions = {"numpy": np.__version__, "datasets": datasets.__version__, "trl": trl.__version__}
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), **versions}
    machine |= {"load_average": os.getloadavg()[0]}
    value = {"command": "python -m benchmarks.packing", "machine": machine, "rows": rows}
    RESULTS.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
