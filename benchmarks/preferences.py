"""Preferences from sums: the right answer over a wrong one that looks the same. And demonstrations: the right answer.

    python -m benchmarks.preferences OUT       after python -m benchmarks.real OUT, which writes the sums

    OUT/chain_sum_pairs_train.jsonl    4 pairs for each of 754 sums and differences
    OUT/chain_sum_pairs_test.jsonl     2 pairs for each of 128 more, of other numbers
    OUT/chain_sum_demonstrations_{train,test}.jsonl     the same questions, each once with its answer

A wrong answer is the right one to another question of the same file, with the same sign and as many digits. So neither
length nor form tells it from a right one, nor which answers are frequent: what is left is the sum.
"""

import argparse
import json
import random
from pathlib import Path


def pairs(rows: list[dict], each: int, seed: int = 0) -> list[dict]:
    """`each` pairs for every row of {"prompt", "answer"}."""
    draw = random.Random(seed)
    alike: dict[tuple, list[str]] = {}
    for row in rows:
        alike.setdefault(form(row["answer"]), []).append(row["answer"])
    found = []
    for row in rows:
        others = [answer for answer in alike[form(row["answer"])] if answer != row["answer"]]
        for wrong in draw.choices(others, k=each) if others else []:
            chosen, rejected = [assistant(row["answer"])], [assistant(wrong)]
            found.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return found


def assistant(text: str) -> dict:
    """A message."""
    return {"role": "assistant", "content": text}


def form(answer: str) -> tuple[bool, int]:
    """Sign and number of characters."""
    return answer.startswith("-"), len(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder that benchmarks.real was given")
    out = parser.parse_args().out
    for name, each in (("train", 4), ("test", 2)):
        rows = [json.loads(line) for line in (out / f"chain_sum_{name}.jsonl").read_text().splitlines()]
        answered = [{"prompt": row["prompt"], "completion": [assistant(row["answer"])]} for row in rows]
        for kind, made in (("pairs", pairs(rows, each)), ("demonstrations", answered)):
            path = out / f"chain_sum_{kind}_{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in made))
            print(f"{path}: {len(made)} rows")


if __name__ == "__main__":
    main()
